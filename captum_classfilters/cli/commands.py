"""What each command does, from top to bottom."""

import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_classfilters.class_filters import ClassFilters, check_table
from captum_classfilters.cli.data import Loader, Source, open_unlabelled
from captum_classfilters.cli.prepare import Job, working
from captum_classfilters.cli.writing import as_csv, as_json, top_csv, top_lines
from captum_classfilters.core.errors import OptionError, quoted
from captum_classfilters.core.files import replacing
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.core.outputs import LogitReader, find_logits
from captum_classfilters.heads import DecomposedLinear, HeadMoments
from captum_classfilters.heads import decompose as make_small
from captum_classfilters.heads.decompose import Pointwise
from captum_classfilters.heads.refitting import FROM_LABELS
from captum_classfilters.influential import InfluentialFeatures

_JUDGED_BY = (1, 2, 3, 5, 10, 20, 50)
_ENOUGH = 20  # images: of fewer, chance explains any accuracy
_LEGIBLE = 200  # classes: with more, a pair of classes is less than a pixel of the picture


def demo(options: Any) -> None:
    """The shipped network on the shipped images."""
    from captum_classfilters.cli.demo import run_demo

    try:
        run_demo(options.out)
    except OSError as error:
        raise OSError(
            f"cannot write to {options.out}: {error.strerror or error}; choose another folder with --out"
        ) from error


def attribute(options: Any) -> None:
    """A network and images in, class filters out."""
    suffixes = {name: f"_{name}" if len(options.selector) > 1 else "" for name in options.selector}
    files = [f"filters{suffix}.safetensors" for suffix in suffixes.values()]
    pictures = [f"{what}{suffix}.png" for suffix in suffixes.values() for what in ("class_filters", "overlap")]
    curve = ["accuracy_curve.csv", "accuracy_curve.png"] if options.judge else []
    _check_judged(options, options.selector)
    with working(options, [*files, "top.csv", *pictures, *curve]) as job:
        tables = _tables(job, options, options.selector)
        for name, table in tables.items():
            with job.output.into(f"filters{suffixes[name]}.safetensors") as path:
                table.save(path)
        job.output.text("top.csv", top_csv(tables, options.k))
        _tell_tables(job, tables, options.k)
        for name, table in tables.items():
            _draw(job, table, options.k, suffixes[name])
        if job.judge is not None:
            ks = sorted({k for k in (*_JUDGED_BY, options.k) if k <= job.head.num_features})
            _judge(job, options, tables, ks, draw=True)


def decompose(options: Any) -> None:
    """A network and its class filters in, the same network with a small head out."""
    refit = None if options.refit == "none" else options.refit
    chooses = refit == "omp" or (refit in FROM_LABELS and options.filters is None and options.selector is None)
    if options.selector is None:
        options.selector = "histogram"
    if refit in FROM_LABELS and options.unseen == "dense":
        raise OptionError(f"--unseen dense does not fit --refit {refit}; add images, or pass --refit least_squares")
    if refit == "omp" and options.filters is not None:
        raise OptionError("--refit omp chooses the features itself; leave --filters out, or pass --refit least_squares")
    saved = None if options.filters is None else ClassFilters.load(options.filters)
    made = ["filters.safetensors"] if saved is None and not chooses else []
    made += ["moments.safetensors"] if refit else []
    curve = ["accuracy.csv"] if options.judge else []
    if not chooses:
        _check_judged(options, [saved.method if saved else options.selector])
    with working(options, [*made, "small.safetensors", "decompose.json", *curve]) as job:
        if saved is not None:
            check_table(saved, job.head)
            _check_names_of(saved, job, options.filters)

        filters = saved
        if filters is None and not chooses:
            (filters,) = _tables(job, options, [options.selector]).values()
            with job.output.into("filters.safetensors") as path:
                filters.save(path)
        _check_seen(filters, options.unseen)
        moments = _learnt_from(job, options, refit)
        small = make_small(
            job.model, filters, options.k,
            refit=refit, moments=moments, backend=options.backend, unseen=options.unseen, layer=options.layer,
        )  # fmt: skip
        _save_network(job, small)
        _tell_small(job, options, small, refit, chooses)
        if job.judge is not None:
            tables = None if filters is None else {filters.method: filters}
            _judge(job, options, tables, [options.k], refit=refit, moments=moments)
        job.output.text("decompose.json", as_json(job.console.facts) + "\n")


def report(options: Any) -> None:
    """A network and its images in, one HTML file out."""
    from captum_classfilters.report import ReportOptions
    from captum_classfilters.report import report as write_report

    target = options.out
    if not options.folder and (target.is_dir() or not target.suffix):
        target = target / "report.html"
    place = options.out = target.parent
    with working(options, [] if options.folder else [target.name]) as job:
        settings = ReportOptions(
            k=options.k,
            max_mb=options.max_mb,
            folder=options.folder,
            selector=options.selector,
            pixels=job.preprocessing.pixels,
            methods=_compared(job, options) if options.methods else None,
            title=options.title or job.network.about.partition(",")[0],
            command=_command_line(),
            show_progress=_bars(options),
        )
        training = HeadPass(
            job.model, job.loader, layer=options.layer, class_names=job.class_names, show_progress=_bars(options)
        )
        with _counting(job):
            made = write_report(training, None, job.judge, target, options=settings)
        job.output.written.append(made.path)
        job.console.facts |= {
            "report": str(made.path),
            "bytes": made.size,
            "dropped": list(made.dropped),
            "suspects": made.suspects.head(10).to_dict("records"),
        }
        for words in made.dropped:
            job.console.note(words)
        first = made.suspects.head(3)
        job.console.say(
            "\nFirst suspects: channels that could be shortcuts (look at the pictures before you believe it)"
        )
        for row in first.itertuples():
            job.console.say(
                f"  channel {row.channel:<6}{row.class_name:<20} recall {row.recall:.3f}, without it {row.without:.3f}"
            )
        job.console.say(f"\n{made.size / 1e6:.1f} MB. Open {made.path if place != Path('.') else made.path.name}")


def _compared(job: Job, options: Any) -> Any:
    """All methods on the same images."""
    from captum_classfilters import compare

    judged = job.judge if job.judge is not None else job.loader
    ks = [k for k in (1, 3, 5, 10) if k <= job.head.num_features]
    return compare(job.model, job.loader, judged, ks, layer=options.layer)


def _command_line() -> str:
    """What was typed, to repeat it."""
    return shlex.join(["captum-classfilters", *sys.argv[1:]])


def watch(options: Any) -> None:
    """A network, its training images and clean ones in; alarms for other images out."""
    from captum_classfilters.detection import FamiliarityDetector
    from captum_classfilters.detection.conformal import check_enough

    with working(options, ["scores.csv", "alarms.png", "detector.skops", "watch.json"]) as job:
        clean, watched = (open_unlabelled(text, job.class_names) for text in (options.calibrate, options.images))
        if clean.about == job.console.facts["data"]:
            raise OptionError(
                f"--calibrate {options.calibrate} names the images that the detector learns from; the promised rate of "
                "false alarms needs clean images that it has not seen"
            )
        check_enough(len(clean.labels), options.alpha)

        def head_pass(loader: Any) -> HeadPass:
            return HeadPass(job.model, loader, layer=options.layer, show_progress=_bars(options))

        with _counting(job):
            detector = FamiliarityDetector(options.method).fit(head_pass(job.loader))
        detector.calibrate(head_pass(job.loader_of(clean)), options.alpha)
        with job.output.into("detector.skops") as path:
            detector.save(path)
        scores = _watched(job, detector, job.loader_of(watched), head_pass)
        job.output.text("scores.csv", as_csv(scores))
        _tell_alarms(job, options, scores)
        _draw_alarms(job, options, detector, scores, watched)
        job.output.text("watch.json", as_json(job.console.facts) + "\n")


def _watched(job: Job, detector: Any, loader: Loader, head_pass: Callable[[Any], HeadPass]) -> Any:
    """One row for each image that could be read: strangeness, p-value, alarm, and what the network says."""
    import numpy as np
    import pandas as pd

    from captum_classfilters.detection.conformal import goes_off, p_values
    from captum_classfilters.detection.familiarity import HeadValues

    strangeness, predicted = [], []
    with head_pass(loader).batches(need_labels=None, description="watch") as stream:
        for batch in stream:
            strangeness.append(detector.score_values(HeadValues.of(batch)))
            predicted += batch.logits.argmax(1).tolist()
    scores = np.concatenate(strangeness)
    p = p_values(scores, detector.calibration_scores_)
    return pd.DataFrame(
        {
            "image": loader.names_read(),
            "strangeness": scores,
            "p_value": p,
            "alarm": goes_off(p, detector.alpha_),
            "predicted": [job.class_names[index] for index in predicted],
        }
    )


# -- passes over the images --------------------------------------------------------------------------------------------


def _tables(job: Job, options: Any, selectors: list[str]) -> dict[str, ClassFilters]:
    """One pass over the images; if it ends early, what was counted until then is kept."""
    try:
        with _counting(job):
            tables: dict[str, ClassFilters] = InfluentialFeatures(job.model, options.layer).attribute(
                job.loader,
                selector=selectors,
                k1=options.k1,
                class_names=job.class_names,
                show_progress=_bars(options),
            )
    except BaseException as error:
        for name, table in getattr(error, "partial_result", {}).items():
            stem = f"filters_{name}" if len(selectors) > 1 else "filters"
            _keep_partial(job, stem, table, int(table.counts.sum()))
        raise
    return tables


@contextmanager
def _counting(job: Job) -> Iterator[None]:
    """Count what the network gets right in a pass, and tell it afterwards; warn where it is no better than chance."""
    if "accuracy_on_images_read" in job.console.facts:
        yield  # a second pass over the same images
        return
    right: list[int] = []
    samples: list[int] = []

    reader = LogitReader()

    def count(_: nn.Module, __: Any, output: Any) -> None:
        labels, logits = job.loader.labels, find_logits(output)
        logits = None if logits is None else reader.class_logits(output)
        if labels is None or logits is None or logits.dim() != 2 or len(logits) != len(labels):
            return
        job.loader.labels = None  # once for each batch
        right.append(int((logits.detach().argmax(1).cpu() == labels).sum()))
        samples.append(len(labels))

    handle = job.model.register_forward_hook(count)
    try:
        with reader:
            yield
    finally:
        handle.remove()
    if not samples:
        return
    share, images = sum(right) / sum(samples), sum(samples)
    job.console.facts["accuracy_on_images_read"] = share
    job.console.say(f"\nAccuracy of the network on the {images} images read: {share:.3f}")
    chance = 1 / job.head.num_classes
    if images >= _ENOUGH and share <= chance + 2 * math.sqrt(chance * (1 - chance) / images):
        job.console.note(
            f"the network gets {share:.3f} of the images read right, and chance {chance:.3f}: the usual reasons are "
            "classes in another order than the network's (--classes FILE) and another preprocessing than in training "
            "(--mean, --std, --image-size)"
        )


def _learnt_from(job: Job, options: Any, refit: str | None) -> HeadMoments | HeadPass | None:
    """What a refit reads: moments of the head's input, or its features and labels."""
    if refit is None:
        return None
    head_pass = HeadPass(job.model, job.loader, layer=options.layer, show_progress=_bars(options))
    if refit != "logistic":
        return _moments(job, head_pass, refit in FROM_LABELS)
    with _counting(job):
        head_pass = head_pass.cached()
    # the lines that load the small head again make its form from them
    _moments(job, head_pass, True)
    return head_pass


def _moments(job: Job, head_pass: HeadPass, by_class: bool) -> HeadMoments:
    try:
        with _counting(job):
            moments = HeadMoments.collect(head_pass, by_class=by_class)
    except BaseException as error:
        if (partial := getattr(error, "partial_result", None)) is not None:
            _keep_partial(job, "moments", partial, partial.count)
        raise
    with job.output.into("moments.safetensors") as path:
        moments.save(path)
    return moments


def _bars(options: Any) -> bool:
    """Progress bars are for people at a terminal."""
    return not options.quiet and sys.stderr.isatty()


def _keep_partial(job: Job, stem: str, partial: Any, images: int) -> None:
    path = job.output.keep_partial(stem, partial)
    job.console.note(f"ended early; what the first {images} images gave is kept in {path}")


def _judge(
    job: Job,
    options: Any,
    tables: Mapping[str, ClassFilters] | None,
    ks: list[int],
    *,
    draw: bool = False,
    refit: str | None = None,
    moments: HeadMoments | HeadPass | None = None,
) -> None:
    """Accuracy with k channels for each class, on images that had no part in choosing them, and a random control."""
    from captum_classfilters import HeadPass, metrics, visualize

    judged = HeadPass(
        job.model,
        job.judge,  # type: ignore[arg-type]
        layer=options.layer,
        class_names=job.class_names,
        show_progress=_bars(options),
    )
    curve = metrics.accuracy_curve(judged, tables, ks=ks, refit=refit, moments=moments)
    stem = "accuracy_curve" if draw else "accuracy"
    job.output.text(f"{stem}.csv", as_csv(curve))
    if draw:
        job.output.picture(f"{stem}.png", lambda: visualize.accuracy_curve(curve))
    overall = curve[curve.class_name == "all"].drop(columns="class_name")
    job.console.facts["judged"] = overall.to_dict("records")
    job.console.say(
        f"\nAccuracy on {int(overall.samples.iloc[0])} other images (dense: all channels; random: a control)"
    )
    for row in overall.itertuples():
        job.console.say(f"  {row.filters:<24}k = {row.k:<6}{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]")


def _tell_alarms(job: Job, options: Any, scores: Any) -> None:
    found = scores[scores.alarm].sort_values("strangeness", ascending=False)
    job.console.facts |= {
        "method": options.method,
        "alpha": options.alpha,
        "watched": len(scores),
        "alarms": len(found),
        "strangest": found.head(20).to_dict("records"),
    }
    job.console.say(
        f"\n{len(found)} of {len(scores)} images raise an alarm ({options.method}); of images like the clean ones "
        f"{options.alpha:.3g} would, {options.alpha * len(scores):.1f} of {len(scores)}"
    )
    for row in found.head(10).itertuples():
        job.console.say(f"  {row.p_value:<10.3g}{row.image}  (predicted: {row.predicted})")
    if len(found) > 10:
        job.console.say(f"  ... and {len(found) - 10} more, in scores.csv")


def _draw_alarms(job: Job, options: Any, detector: Any, scores: Any, watched: Source) -> None:
    """The strangest images, whether or not they raise an alarm."""
    from captum_classfilters import visualize
    from captum_classfilters.detection import explain_alarm
    from captum_classfilters.detection.familiarity import SUMS

    if detector.method not in SUMS:
        job.console.note(
            f"no picture: the score of {detector.method} is no sum over channels; --method mahalanobis is one"
        )
        return
    strangest = scores.sort_values("strangeness", ascending=False).head(options.most)
    places = {watched.name(index): index for index in range(len(watched.images))}
    chosen = [places[name] for name in strangest.image]
    part = watched._replace(images=[watched.images[index] for index in chosen], labels=[0] * len(chosen), left_out={})
    inputs = torch.cat([images for images, _ in job.loader_of(part)])
    alarm = explain_alarm(detector, job.model, inputs, layer=options.layer)
    titles = [
        f"{Path(row.image).name}\np = {row.p_value:.3g}, predicted: {row.predicted}" for row in strangest.itertuples()
    ]
    pixels = job.preprocessing.pixels(inputs)
    job.output.picture("alarms.png", lambda: visualize.unfamiliar(pixels, alarm, titles))


# -- what came out -----------------------------------------------------------------------------------------------------


def _tell_tables(job: Job, tables: Mapping[str, ClassFilters], k: int) -> None:
    job.console.facts["filters"] = {
        name: {
            "samples": int(table.counts.sum()),
            "k": k,
            "top": dict(zip(table.class_names, table.top(k).tolist(), strict=True)),
        }
        for name, table in tables.items()
    }
    for name, table in tables.items():
        job.console.say(f"\nTop {k} of {table.num_channels} channels for each class, by {name}")
        for line in top_lines(table, k):
            job.console.say(line)


def _draw(job: Job, table: ClassFilters, k: int, suffix: str) -> None:
    from captum_classfilters import visualize

    # few classes leave most of many channels empty
    scored = int(table.scores.any(0).sum())
    channels = min(256, scored) or table.num_channels
    job.output.picture(f"class_filters{suffix}.png", lambda: visualize.class_filters(table, k=k, max_channels=channels))
    if table.num_classes > _LEGIBLE:
        job.console.note(
            f"no picture of what {table.num_classes} classes share: it cannot be read with more than {_LEGIBLE}"
        )
        return
    job.output.picture(f"overlap{suffix}.png", lambda: visualize.overlap(table, k))


def _save_network(job: Job, small: nn.Module) -> None:
    from safetensors.torch import save_file

    # clones: the format refuses tensors that share memory
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in small.state_dict().items()}
    with job.output.into("small.safetensors") as path, replacing(path) as beside:
        save_file(state, beside, metadata={"format": "pt"})


def _tell_small(job: Job, options: Any, small: nn.Module, refit: str | None, chooses: bool) -> None:
    layer = small.get_submodule(job.head.name) if small is not job.model else small
    kept, form = _kept(layer)
    total = job.head.num_classes * job.head.num_features
    # with a plain linear head it is still the same kind of network
    fits = small.state_dict().keys() == job.model.state_dict().keys() and form == "dense"
    lines = _recipe(job, options, refit, chooses, form, fits)
    job.console.facts |= {
        "k": options.k,
        "refit": options.refit,
        "backend": form,
        "unseen": options.unseen,
        "kept_weights": kept,
        "total_weights": total,
        "load": lines,
    }
    job.console.say(f"\nThe head keeps {kept} of {total} weights ({options.k} for each class; form: {form})")
    job.console.say("To load it again:")
    for line in lines:
        job.console.say(f"  {line}")


def _kept(layer: nn.Module) -> tuple[int, str]:
    """Weights that are not left out, and the form of the head."""
    if isinstance(layer, Pointwise):
        layer = layer.linear
    if isinstance(layer, DecomposedLinear):
        return layer.weight.numel(), layer.backend
    return int(torch.count_nonzero(layer.weight)), "dense"  # type: ignore[arg-type]


def _recipe(job: Job, options: Any, refit: str | None, chooses: bool, form: str, fits: bool) -> list[str]:
    """Lines of Python that load the small network: the network, or the call that made the small one; its weights."""
    folder = options.out.resolve()
    load = ["from safetensors.torch import load_file"]
    weights = f"load_state_dict(load_file({str(folder / 'small.safetensors')!r}))"
    if fits:
        return [*job.network.recipe, *load, f"model.{weights}", "model.eval()"]
    filters = "None"
    if not chooses:
        file = Path(options.filters).resolve() if options.filters else folder / "filters.safetensors"
        filters = f"ClassFilters.load({str(file)!r})"
    moments = f"HeadMoments.load({str(folder / 'moments.safetensors')!r})"
    # what a logistic refit needs is not in a file; any refit makes the form, the weights are loaded
    extra = f', refit="{"binary" if refit == "logistic" else refit}", moments={moments}' if refit else ""
    unseen = ', unseen="dense"' if options.unseen == "dense" else ""
    return [
        *job.network.recipe,
        *load,
        "from captum_classfilters import ClassFilters, HeadMoments, decompose",
        f'small = decompose(model, {filters}, {options.k}{extra}, backend="{form}"{unseen})',
        f"small.{weights}",
        "small.eval()",
    ]


def _check_judged(options: Any, selectors: list[str]) -> None:
    if options.judge and set(selectors) == {"random"}:
        raise OptionError("--judge has a random control of its own; name another selector, too, or leave --judge out")


def _check_seen(filters: ClassFilters | None, unseen: str) -> None:
    if filters is None or unseen == "dense" or bool(filters.seen.all()):
        return
    missing = [name for name, seen in zip(filters.class_names, filters.seen.tolist(), strict=True) if not seen]
    raise OptionError(
        f"no image of class {quoted(missing)}, so its features cannot be chosen; add some, or keep all weights of such "
        "classes with --unseen dense"
    )


def _check_names_of(filters: ClassFilters, job: Job, path: Path) -> None:
    if filters.class_names != job.class_names:
        raise OptionError(
            f"{path} is of the classes {', '.join(filters.class_names[:5])}, ... ({filters.num_classes}), the images "
            f"of {', '.join(job.class_names[:5])}, ... ({len(job.class_names)}); pass the table made with these"
        )
