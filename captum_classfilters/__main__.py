"""``captum-classfilters``, or ``python -m captum_classfilters``: arguments in, an exit status out.

0: done. 1: an error, in words on stderr. 2: the command line was not understood. 130: Ctrl-C.
"""

import sys
import warnings
from typing import Any

from captum_classfilters.cli.parser import build_parser
from captum_classfilters.core.errors import ClassFiltersError, SingularMomentsWarning, UnseenClassWarning


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _as_note
        for category in (UnseenClassWarning, SingularMomentsWarning):
            warnings.simplefilter("always", category)
        try:
            _run(options)
        except KeyboardInterrupt as error:
            return _ended(error, "interrupted", options.debug, 130)
        except Exception as error:
            words = _words(error)
            if words is None:
                raise  # a bug: its traceback helps most
            return _ended(error, f"error: {words}", options.debug, 1)
    return 0


def _run(options: Any) -> None:
    # slow to import, and of no use to --help
    import captum_classfilters.cli.commands as commands

    getattr(commands, options.command)(options)


def _words(error: Exception) -> str | None:
    """What to print for an error that the user can mend; None for an error of this package."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return f"the device has too little memory ({_first_line(error)}); pass a smaller --batch-size, or --device cpu"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ImportError) and error.name:
        return f"{_first_line(error)}; install it: pip install {error.name.split('.')[0]}"
    return str(error) if isinstance(error, ClassFiltersError | OSError) else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _ended(error: BaseException, said: str, debug: bool, status: int) -> int:
    if debug:
        sys.excepthook(type(error), error, error.__traceback__)
    print(f"captum-classfilters: {said}", file=sys.stderr)
    return status


def _as_note(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning without the line of code it comes from, which is not the user's."""
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
