"""Is this argument what it may be? An integer, a number in a range, one of these names.

Checks stand at the public door: a public function checks once what its user passed and trusts it afterwards.
Python's numbers and numpy's are alike; a bool is no number. Each check returns the plain Python value.
"""

import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

from captum_classfilters.core.errors import OptionError


def integer(value: Any, name: str, low: int = 0, high: int | None = None, *, meaning: str = "") -> int:
    """``value`` as an ``int`` in ``[low, high]``.

    Args:
        value: What the user passed.
        name: The argument's name, for the message.
        low: The smallest integer that is allowed.
        high: The largest; None: no bound.
        meaning: What the bound is, such as ``"the number of channels"``.

    Raises:
        OptionError: It is not such an integer.

    Example:
        >>> integer(3, "k", 1, 64)
        3
    """
    fits = not isinstance(value, bool) and isinstance(value, Integral)
    if not fits or int(value) < low or (high is not None and int(value) > high):
        bounds = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise OptionError(f"{name} must be an integer {bounds}{f', {meaning}' if meaning else ''}; got {value!r}")
    return int(value)


def number(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, *, open_ends: bool = False, meaning: str = ""
) -> float:
    """``value`` as a finite ``float`` in ``[low, high]``.

    Args:
        value: What the user passed.
        name: The argument's name, for the message.
        low: The smallest number that is allowed.
        high: The largest.
        open_ends: The bounds themselves are not allowed.
        meaning: What the bounds are.

    Raises:
        OptionError: It is not such a number.

    Example:
        >>> number(0.5, "density", 0, 1)
        0.5
    """
    fits = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(float(value))
    inside = fits and (low < float(value) < high if open_ends else low <= float(value) <= high)
    if not inside:
        if math.isinf(low) and math.isinf(high):
            bounds = "a finite number"
        elif math.isinf(high):
            bounds = f"a finite number {'above' if open_ends else 'of at least'} {low:g}"
        else:
            bounds = f"a number {'between' if open_ends else 'in'} " + (
                f"{low:g} and {high:g}" if open_ends else f"[{low:g}, {high:g}]"
            )
        raise OptionError(f"{name} must be {bounds}{f', {meaning}' if meaning else ''}; got {value!r}")
    return float(value)


def one_of(value: Any, name: str, options: Collection[Any]) -> Any:
    """``value``, if it is one of ``options``.

    Raises:
        OptionError: It is another.

    Example:
        >>> one_of("abs", "importance", ("abs", "signed"))
        'abs'
    """
    if not isinstance(value, str | int | float | None) or value not in options:
        raise OptionError(f"{name} must be one of {list(options)}, got {value!r}")
    return value


def some_of(values: Any, name: str, options: Collection[str]) -> list[str]:
    """``values`` as a list of one or more of ``options``, each once; a single name stands for a list of one.

    Raises:
        OptionError: There is none, or one that is not among the options.

    Example:
        >>> some_of("zero", "modes", ("noise", "zero"))
        ['zero']
    """
    names = [values] if isinstance(values, str) else list(values) if isinstance(values, Iterable) else [values]
    if not names or any(not isinstance(entry, str) or entry not in options for entry in names):
        raise OptionError(f"{name} must be some of {list(options)}, got {values!r}")
    return list(dict.fromkeys(names))


def integers(values: Any, name: str, low: int = 0, high: int | None = None, *, meaning: str = "") -> list[int]:
    """``values`` as a list of different integers in ``[low, high]``, in rising order.

    Raises:
        OptionError: It is not a list, it is empty, or an entry is out of range.

    Example:
        >>> integers((5, 1, 5), "ks", 1, 64)
        [1, 5]
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise OptionError(f"{name} must be a list of integers, such as [1, 3, 5]; got {values!r}")
    entries = list(values)
    if not entries:
        raise OptionError(f"{name} must be a list of at least one integer, such as [1, 3, 5]; got an empty one")
    return sorted({integer(entry, f"each of {name}", low, high, meaning=meaning) for entry in entries})
