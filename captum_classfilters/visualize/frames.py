"""Reads the DataFrame that `metrics.accuracy_curve` returns: which rows are asked for, and is what is needed there."""

from collections.abc import Sequence

import pandas as pd

from captum_classfilters.core.errors import OptionError, quoted

DENSE, RANDOM = "dense", "random"


def rows_of(curve: pd.DataFrame, class_name: str, columns: Sequence[str], without: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of one class, or of ``"all"``, that have a number in the first of ``columns``.

    Args:
        curve: The frame.
        class_name: Whose rows.
        columns: What is needed besides ``filters``, ``k`` and ``class_name``.
        without: Names in ``filters`` that are left out.

    Raises:
        OptionError: Not a frame, a column is missing, unknown class, a class without samples, or two rows for one k.
    """
    if not isinstance(curve, pd.DataFrame):
        raise OptionError(
            f"curve must be the DataFrame that metrics.accuracy_curve returns, got {type(curve).__name__}"
        )
    needed = ["filters", "k", "class_name", *columns]
    if missing := [column for column in needed if column not in curve.columns]:
        raise OptionError(
            f"curve lacks the columns {missing}, got {list(curve.columns)}; pass the frame that "
            "metrics.accuracy_curve returns"
        )
    rows = curve[curve["class_name"] == class_name]
    if rows.empty:
        known = quoted(curve["class_name"].unique())
        raise OptionError(f"curve has no rows of class {class_name!r}; its classes are: {known or 'none'}")
    rows = rows[~rows["filters"].isin(without)]
    if rows.empty:
        raise OptionError(f"curve has only rows of filters {list(without)}; measure some tables besides")
    if bool(rows[columns[0]].isna().all()):
        raise OptionError(f"class {class_name!r} has no {columns[0]}: it had no samples; choose another class")
    twice = rows[rows["filters"] != DENSE].duplicated(["filters", "k"])
    if bool(twice.any()):
        first = rows[rows["filters"] != DENSE][twice].iloc[0]
        raise OptionError(
            f"curve has several rows of filters {first['filters']!r} at k={first['k']}; name the runs apart in filters"
        )
    return rows
