"""Find everything that a command line names, and refuse what is wrong before a pass over the images starts."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from captum_classfilters.class_filters import check_k, check_names
from captum_classfilters.cli.data import (
    Loader,
    Preprocessing,
    Source,
    choose_preprocessing,
    first_of_each,
    in_order_of,
    interleaved,
    open_source,
)
from captum_classfilters.cli.models import Network, find_device, find_model
from captum_classfilters.cli.writing import Console, Output
from captum_classfilters.core.errors import ClassFiltersError, OptionError, quoted
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import single_batch


class Job(NamedTuple):
    """What a command works on."""

    console: Console
    output: Output
    network: Network
    head: Head
    class_names: tuple[str, ...]
    loader: Loader
    judge: Loader | None
    preprocessing: Preprocessing
    loader_of: Callable[[Source], Loader]  # reads other images in the same way
    loaders: list[Loader]  # all that were made

    @property
    def model(self) -> torch.nn.Module:
        """The network, on its device."""
        return self.network.model


@contextmanager
def working(options: Any, files: Iterable[str]) -> Iterator[Job]:
    """Find everything that the command line names; in the end, good or bad, say which files there are.

    Args:
        options: The command line.
        files: Names of the files that the command will write.
    """
    output = Output(options.out, files)
    try:
        job = _prepare(options, output)
        yield job
    except BaseException:
        if output.written:
            print(f"note: written before that: {', '.join(map(str, output.written))}", file=sys.stderr)
        output.remove_if_empty()
        raise
    skipped = [part for part in job.loaders if part.skipped]
    for part in skipped:
        job.console.note(part.skipped_words())
    names = ", ".join(path.name for path in job.output.written)
    job.console.say(f"\nIn {job.output.folder.resolve()}: {names}")
    job.console.facts["skipped"] = [name for part in skipped for name in part.skipped]
    job.console.facts["left_out"] = [name for part in job.loaders for name in part.left_out]
    if old := job.output.from_before():
        job.console.note(f"from an earlier run, not of this one: {', '.join(old)} in {job.output.folder}")
    job.console.facts["files"] = job.output.written
    job.console.finish()


def _prepare(options: Any, output: Output) -> Job:
    console = Console(options.json, options.quiet)
    device = find_device(options.device)
    source, judge = _sources(options)
    network = find_model(options, len(source.class_names))
    # data sets of small images are seldom enlarged to what an architecture was published with
    published = None if network.guessed and source.whole else network.preprocessing
    preprocessing = choose_preprocessing(source, published, network.model, options)
    network.model.to(device)
    head = _head(network, preprocessing, options.layer)
    _check_classes(head, source, network)
    check_k(options.k, head.num_features, "--k")
    loaders: list[Loader] = []

    def loader_of(part: Source) -> Loader:
        loaders.append(Loader(part, preprocessing, options.batch_size, options.workers, options.strict))
        if part.left_out:
            console.note(loaders[-1].left_out_words())
        return loaders[-1]

    loader, judging = loader_of(source), None if judge is None else loader_of(judge)
    console.facts = {
        "command": options.command,
        "model": network.about,
        "layer": head.name,
        "channels": head.num_features,
        "data": source.about,
        "images": len(source.labels),
        "classes": source.class_names,
        "preprocessing": preprocessing.facts(),
        "device": str(device),
    }
    if options.random_weights:
        console.note("random weights: the result shows how the command works, and says nothing about a network")
    console.say(f"Network: {network.about}; head {head.name}, {head.num_features} channels, on {device}")
    console.say(f"Images:  {source.about}: {len(source.labels)} of {len(source.class_names)} classes")
    console.say(f"         {preprocessing}")
    return Job(console, output, network, head, source.class_names, loader, judging, preprocessing, loader_of, loaders)


def _sources(options: Any) -> tuple[Source, Source | None]:
    source = _source(options, options.data, options.split)
    check_names(source.class_names)
    if options.judge is None:
        if options.judge_split is not None:
            raise OptionError("--judge-split says which part of --judge to take; pass --judge, too")
        return source, None
    judge = _source(options, options.judge, options.judge_split, judging=True)
    if judge.class_names != source.class_names:
        raise OptionError(
            f"--judge {options.judge} has {len(judge.class_names)} classes ({quoted(judge.class_names, 5)}), DATA has "
            f"{len(source.class_names)} ({quoted(source.class_names, 5)}); they must be the same"
        )
    if judge.about == source.about:
        raise OptionError(
            f"--judge {options.judge} names the images that the filters are made from; judge on others, such as those "
            "of another folder or --judge-split"
        )
    return source, judge


def _source(options: Any, text: str, split: str | None, judging: bool = False) -> Source:
    source = in_order_of(open_source(text, split, judging=judging), options.classes)
    return interleaved(first_of_each(source, options.limit))


def _head(network: Network, preprocessing: Preprocessing, layer: str | None) -> Head:
    """The head, found by a pass of one image of noise."""
    size = (1, preprocessing.channels, preprocessing.crop, preprocessing.crop)
    noise = torch.rand(size, generator=torch.Generator().manual_seed(0))
    try:
        return single_batch(network.model, noise, layer=layer).head
    except (ClassFiltersError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()), "")
        raise OptionError(
            f"{network.about} does not take an image of shape {size[1:]} ({first}); pass the --image-size it was "
            "trained with"
        ) from error


def _check_classes(head: Head, source: Source, network: Network) -> None:
    if head.num_classes == len(source.class_names):
        return
    raise OptionError(
        f"{network.about} tells {head.num_classes} classes apart, {source.about} has {len(source.class_names)} "
        f"({quoted(source.class_names, 5)}); they must be the same, in the same order: pass the weights of a network "
        "for these classes, or the images it was trained on; where folders are missing, list all its classes in a "
        "file: --classes FILE"
    )
