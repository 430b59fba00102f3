"""The errors of this package: each says what was expected, what came, and what to do.

All derive from `ClassFiltersError`; those that are also a wrong value or a wrong type say so by a second
base, so that ``except ValueError`` keeps working.
"""

from collections.abc import Iterable


class ClassFiltersError(Exception):
    """Base of every error raised by captum_classfilters."""


class HeadError(ClassFiltersError, ValueError):
    """The classifier head could not be found, or is not one this package can read."""


class LayerError(ClassFiltersError, ValueError):
    """A layer does not exist, is of the wrong kind, or is used in a way that cannot be followed."""


class ShapeError(ClassFiltersError, ValueError):
    """A tensor has the wrong shape or dtype."""


class LabelError(ClassFiltersError, ValueError):
    """Labels are missing, of the wrong type, or out of range."""


class OptionError(ClassFiltersError, ValueError):
    """An argument lies outside what it may be."""


class EmptyLoaderError(ClassFiltersError, ValueError):
    """The loader gave no batch."""


class NonFiniteError(ClassFiltersError, ArithmeticError):
    """NaN or infinity where a number was needed."""


class FileFormatError(ClassFiltersError, ValueError):
    """A file is broken, foreign, or of another schema version."""


class MergeError(ClassFiltersError, ValueError):
    """Parts that do not belong together were to be merged."""


class DeviceError(ClassFiltersError, ValueError):
    """The model is not on the device that was asked for."""


class CalibrationError(ClassFiltersError, ValueError):
    """Too few clean samples for the rate of false positives that was asked for."""


class NotCalibratedError(ClassFiltersError, ValueError, AttributeError):
    """An alarm was asked of a detector that has not seen clean samples: as of one that is not fitted."""


class UnseenClassWarning(UserWarning):
    """A class had no sample in the loader."""


class HardGatesWarning(UserWarning):
    """A loss with gradients was asked for while gates are hard, as they are in eval mode."""


class UngatedLayerWarning(UserWarning):
    """A convolution is used in a way that gating cannot follow, and was left alone."""


class AttackFailedWarning(UserWarning):
    """An attack fooled the network on no image."""


class IdleChannelWarning(UserWarning):
    """A channel has no positive score for any class."""


class ZeroMapWarning(UserWarning):
    """A heat map is zero by its definition: the chosen channels have no positive gradient for the target."""


class NoPositionsWarning(UserWarning):
    """A map has a single position: it says how strong, and nothing of where."""


class DegenerateFitWarning(UserWarning):
    """A class has no two different weights, so no distribution can be fitted to them."""


class SingularMomentsWarning(UserWarning):
    """Features that follow from one another over the samples seen."""


def quoted(names: Iterable[object], most: int = 10) -> str:
    """The first names of many, for a message."""
    listed = list(names)
    return ", ".join(repr(name) for name in listed[:most]) + (", ..." if len(listed) > most else "")


def printable(text: str) -> str:
    r"""The text with escapes for what a terminal or a font cannot show: control characters, half of a letter.

    Example:
        >>> printable("red\x1b[31m")
        'red\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def brief(value: object, most: int = 300) -> str:
    """``value`` as text for a message, cut in the middle where it is long: a file may hold megabytes.

    Example:
        >>> brief("abcdefghij", 7)
        'ab...ij'
    """
    text = str(value)
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"
