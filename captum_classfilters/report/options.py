"""What a report shows and how large it may be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_classfilters.core.check import integer, number
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError


@dataclass(frozen=True, eq=False)
class ReportOptions:
    """What a report shows and how large it may be.

    Attributes:
        k: Channels of each class that a page opens with.
        most: Channels of each class that the slider reaches; all of them have pictures.
        images: Pictures of each channel.
        examples: Confused images in all whose logits can be recomputed in the page.
        of_each_pair: Confused images of one pair of classes.
        max_mb: The file's largest size in megabytes (10^6 bytes). What does not fit is left out, and the page says so.
        folder: Write a folder of files instead of one file: without a limit, and without scripts inside the page.
        selector: How channels are chosen, as in `InfluentialFeatures.attribute`; not used where a table is passed.
        pixels: Takes images as the network gets them, ``(N, 1 or 3, H, W)``; gives them in [0, 1]. None: guessed.
        control: The random control of the accuracy with k channels and of the suspects.
        methods: What `compare` returned, to be shown on a page of its own.
        title: Of the page; None: the name of the network's class.
        command: How to make the report again; None: the call with its options.
        tile: Most pixels along a side of a picture.
        show_progress: A tqdm bar.

    Raises:
        OptionError: A number is out of range.

    Example:
        >>> ReportOptions(k=3, max_mb=10).most
        10
    """

    k: int = 5
    most: int = 10
    images: int = 6
    examples: int = 600
    of_each_pair: int = 12
    max_mb: float = 25
    folder: bool = False
    selector: str = "histogram"
    pixels: Callable[[Tensor], Tensor] | None = None
    control: Control = Control()
    methods: Any = None
    title: str | None = None
    command: str | None = None
    tile: int = 80
    show_progress: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("k", 1, 100), ("most", 1, 100), ("images", 1, 24), ("examples", 0, 100_000), ("of_each_pair", 1, 1000),
            ("tile", 16, 512),
        ):  # fmt: skip
            object.__setattr__(self, name, integer(getattr(self, name), name, low, high))
        object.__setattr__(self, "most", max(self.k, self.most))
        number(self.max_mb, "max_mb", 0.1, meaning="the size of the file in megabytes")
        if self.selector == "random":
            raise OptionError("the random selector is the control of every report; choose another selector")
        if self.pixels is not None and not callable(self.pixels):
            raise OptionError(f"pixels must be a function or None, got {type(self.pixels).__name__}")
