"""``captum-classfilters``, or ``python -m captum_classfilters``: arguments in, an exit status out.

0: done. 1: an error, in words on stderr. 2: the command line was not understood. 130: Ctrl-C. 143: SIGTERM.
"""

import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captum_classfilters.cli.parser import build_parser
from captum_classfilters.core.errors import ClassFiltersError, SingularMomentsWarning, UnseenClassWarning


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    with _terminable(), warnings.catch_warnings():
        warnings.showwarning = _as_note
        for category in (UnseenClassWarning, SingularMomentsWarning):
            warnings.simplefilter("always", category)
        try:
            _run(options)
        except _Terminated as error:
            return _ended(error, "terminated", options.debug, 143)
        except KeyboardInterrupt as error:
            return _ended(error, "interrupted", options.debug, 130)
        except Exception as error:
            words = _words(error)
            if words is None:
                raise  # a bug, for which the traceback helps most
            return _ended(error, f"error: {words}", options.debug, 1)
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what was counted so far is kept as after Ctrl-C."""


def _terminate(*_: Any) -> None:
    raise _Terminated


@contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: Any) -> None:
    # slow to import, and --help does not need it
    import captum_classfilters.cli.commands as commands

    getattr(commands, options.command)(options)


def _words(error: Exception) -> str | None:
    """The message of an error that the user can fix; None for a bug of this package."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return f"the device has too little memory ({_first_line(error)}); pass a smaller --batch-size, or --device cpu"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ImportError) and error.name:
        return f"{_first_line(error)}; install it: pip install {error.name.split('.')[0]}"
    if isinstance(error, ClassFiltersError | OSError):
        return str(error)
    place = _in_users_code(error)
    return place and f"{type(error).__name__}: {_first_line(error)} (raised in {place}); pass --debug to see how"


def _in_users_code(error: Exception) -> str | None:
    """File and line of the user's own code that raised an error, such as their network's; None: it was not theirs."""
    package = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    entered = next((i for i, frame in enumerate(frames) if frame.filename.startswith(package)), len(frames))
    theirs = [
        frame
        for frame in frames[entered:]
        if not frame.filename.startswith((package, sys.base_prefix, sys.prefix, "<"))
        and "-packages" not in frame.filename
    ]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}" if theirs else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _ended(error: BaseException, said: str, debug: bool, status: int) -> int:
    if debug:
        sys.excepthook(type(error), error, error.__traceback__)
    print(f"captum-classfilters: {said}", file=sys.stderr)
    return status


def _as_note(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning without its line of code, which is not the user's."""
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
