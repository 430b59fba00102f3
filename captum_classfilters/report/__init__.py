"""One HTML file that anybody can open: classes, channels, confusions, suspects.

``from captum_classfilters import report`` gives this room, and calling it is calling `report`.
"""

import sys
from types import ModuleType
from typing import Any

from captum_classfilters.report.make import Report, report
from captum_classfilters.report.options import ReportOptions

__all__ = ["Report", "ReportOptions", "report"]


class _Room(ModuleType):
    """The room has the name of its one function: whoever asks the package for ``report`` can call either."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
