"""`report`: a network and its images in, one HTML file out that anybody can open."""

import datetime
import html
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from captum_classfilters._version import __version__
from captum_classfilters.class_filters import ClassFilters, one_table
from captum_classfilters.core.borrow import unwrap
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.core.stream import refuse_iterator
from captum_classfilters.report.gather import PARTS, Judged, Trained, judge_pass, train_pass
from captum_classfilters.report.options import ReportOptions
from captum_classfilters.report.pack import packed
from captum_classfilters.report.page import checked_path, write_page


@dataclass(frozen=True, eq=False)
class Report:
    """What `report` wrote, and its tables.

    Attributes:
        path: The file to open.
        size: Bytes.
        filters: The table of class filters that is shown.
        suspects: One row for each class and each of its strongest channels, the most suspicious first.
            ``class_name``, ``channel``, ``suspicion`` (how much the class leans on the channel, times how oddly it
            fires), ``also_in`` (other classes that have the channel among theirs), ``recall`` of the class,
            ``without`` the channel, with ``low`` and ``high`` (Wilson 95 %), ``random`` (recall without a random
            channel: the control), ``lost_low`` (at least this share of the class is lost without it), ``share`` (part
            of the class's lead over its rival that the channel gives), ``beside`` (share of the channel's map where
            the rest of the class's evidence is not), ``elsewhere`` (share of its mean map where the evidence for
            other classes is not), ``border`` and ``border_rest`` (share of the map along the edge, and of the rest of
            the evidence), ``one_place`` (1: always one position; 0: everywhere), ``one_colour`` (1: always the same
            colour under the map), ``fires`` (share of the class's images), ``samples``. Measures of places are NaN
            without maps.
        curve: Accuracy against k, as from `metrics.accuracy_curve`.
        dropped: What was left out to keep the size, in words.
    """

    path: Path
    size: int
    filters: ClassFilters
    suspects: pd.DataFrame
    curve: pd.DataFrame
    dropped: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Report({str(self.path)!r}, {self.size / 1e6:.1f} MB)"

    def _repr_html_(self) -> str:
        name = html.escape(str(self.path))
        return f'<p>Report: <a href="{name}" target="_blank">{name}</a> ({self.size / 1e6:.1f} MB)</p>'


def report(
    model: Any,
    loader: Iterable[Any] | None,
    test_loader: Iterable[Any] | None = None,
    path: str | PathLike[str] = "report.html",
    *,
    filters: ClassFilters | None = None,
    class_names: Sequence[str] | None = None,
    options: ReportOptions = ReportOptions(),
) -> Report:
    """Write one HTML file that shows which channels work for which class, why images are confused, and what is odd.

    The file needs no network, no server and no installation. It has an overview, a page for each class and each
    channel, the confused images of each two classes with the channels that confused them (set some to 0, and the
    logits are computed anew in the page), and a ranked list of suspects: channels that look like shortcuts.

    Each loader is read once. The filters come from ``loader``; everything that is judged or shown comes from
    ``test_loader``.

    Args:
        model: The network; borrowed. Or a `HeadPass`, for its layer, its output and its further arguments; its own
            loader then is the training images, and ``loader`` is None.
        loader: Batches ``(inputs, labels)`` of training images; None where ``filters`` is passed.
        test_loader: Batches of other images, to judge and to show. None: the training images are read a second time,
            and the page says so.
        path: The file to write, or with ``options.folder`` the folder.
        filters: A table made before, of any method; None: made from ``loader`` by ``options.selector``.
        class_names: C names; None: those of the table, of the data set or of the model, otherwise numbers.
        options: What is shown, and how large the file may be.

    Returns:
        A `Report`: the path, and the tables of the page as frames.

    Raises:
        OptionError: Neither images nor a table, or both a table and training images.
        HeadError, LabelError, ShapeError, EmptyLoaderError, NonFiniteError: As for `HeadPass`.
        OSError: The file cannot be written.

    Example:
        >>> import os, tempfile
        >>> from captum_classfilters.assets import load_demo_network, load_images
        >>> images = load_images("test").batches(250)[:2]
        >>> path = os.path.join(tempfile.mkdtemp(), "report.html")
        >>> made = report(load_demo_network()[0], images[:1], images[1:], path, options=ReportOptions(most=5))
        >>> made.path.name, made.size < 5e6
        ('report.html', True)
    """
    target = checked_path(Path(path), options.folder)
    if filters is not None and loader is not None and test_loader is not None:
        raise OptionError("the filters are there already: leave the training images out, loader=None")
    judging, training = _passes(model, loader, test_loader, filters, class_names, options)
    trained = Trained(one_table(filters), []) if training is None else train_pass(training, options, class_names)
    judged = judge_pass(judging, trained.filters, options)
    same = training is not None and test_loader is None
    content = packed(trained, judged, options, _about(model, judging, trained, judged, options, same))
    size = write_page(content, target, options.folder)
    return Report(
        target / "index.html" if options.folder else target,
        size,
        trained.filters,
        judged.suspects,
        judged.curve,
        tuple(content.dropped),
    )


def _passes(
    model: Any,
    loader: Any,
    test_loader: Any,
    filters: ClassFilters | None,
    class_names: Sequence[str] | None,
    options: ReportOptions,
) -> tuple[HeadPass, HeadPass | None]:
    """The pass over the judged images, and the one over the training images, if there is one."""
    if isinstance(model, HeadPass):
        first, source = model, model.loader if loader is None else loader
    elif loader is None and test_loader is None:
        raise OptionError("there are no images: pass a loader of training images and one of test images")
    else:
        source = loader
        first = HeadPass(model, test_loader if loader is None else loader, show_progress=options.show_progress)
    if filters is not None:
        return first.over(test_loader if test_loader is not None else source), None
    if source is None:
        raise OptionError("there are no training images and no table: pass loader=, or filters= made before")
    if test_loader is None:
        refuse_iterator(source, "the loader")
    training = first.over(source)
    return training.over(source if test_loader is None else test_loader), training


def _about(
    model: Any, judging: HeadPass, trained: Trained, judged: Judged, options: ReportOptions, same: bool
) -> dict[str, Any]:
    network = unwrap(model.model if isinstance(model, HeadPass) else model)
    filters = trained.filters
    notes = [*judged.notes, judged.pictures.note]
    if same:
        notes.append(
            "The images that are judged are those that the filters were made from: accuracies look better than they "
            "are. Pass other images as test_loader."
        )
    unseen = int((~filters.seen).sum())
    if unseen:
        notes.append(f"{unseen} classes had no training image: they have no filters here.")
    empty = int((judged.samples == 0).sum())
    if empty:
        notes.append(f"{empty} classes have no judged image: they have no recall.")
    if not trained.parts:
        notes.append("The table was made before this report: how stable its ranking is, is not known here.")
    return {
        "title": options.title or type(network).__name__,
        "model": type(network).__name__,
        "layer": filters.layer,
        "trainImages": int(filters.counts.sum()),
        "judgedImages": int(judged.samples.sum()),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": options.command or "report(model, loader, test_loader, path)",
        "versions": {
            "captum_classfilters": __version__,
            "torch": str(torch.__version__),
            "Python": platform.python_version(),
        },
        "settings": {
            "method": filters.method,
            **{str(key): str(value) for key, value in filters.meta.items()},
            "k": options.k,
            "most": options.most,
            "images": options.images,
            "control draws": options.control.draws,
            "control seed": options.control.seed,
            "parts": PARTS if trained.parts else 0,
            "same images": same,
        },
        "notes": [note for note in notes if note],
    }
