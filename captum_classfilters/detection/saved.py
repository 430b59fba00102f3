"""Detectors in files, by skops: types are named in the file, and only those that are trusted are made."""

import os
from collections.abc import Sequence
from typing import Any

from captum_classfilters._version import __version__
from captum_classfilters.core.errors import FileFormatError, OptionError
from captum_classfilters.core.files import replacing

_KIND, _VERSION = "captum_classfilters detector", 1
_ROOM = "captum_classfilters.detection"
# ours, which hold numbers and names alone; scikit-learn's and numpy's own skops knows
_TRUSTED = (
    f"{_ROOM}.detector.PathDetector",
    f"{_ROOM}.outlier.PathOutlierDetector",
    f"{_ROOM}.profiles.ClassProfiles",
    f"{_ROOM}.tables.PathTable",
)


def save(detector: Any, path: str | os.PathLike[str]) -> None:
    """See `PathDetector.save`."""
    skops = _skops()
    content = {"kind": _KIND, "version": _VERSION, "package": __version__, "detector": detector}
    with replacing(path) as beside:
        skops.dump(content, beside)


def load(kind: type, path: str | os.PathLike[str], trusted: Sequence[str]) -> Any:
    """See `PathDetector.load`."""
    skops = _skops()
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}")
    if isinstance(trusted, str):
        raise OptionError(f"trusted must be a list of full names of types, got the string {trusted!r}")
    known = {*_TRUSTED, *trusted}
    try:
        if strangers := sorted(set(skops.get_untrusted_types(file=path)) - known):
            raise FileFormatError(
                f"{path} holds types that are not trusted: {', '.join(strangers)}; if you know where the file comes "
                "from and expect them, pass trusted=[...] with their names"
            )
        content = skops.load(path, trusted=sorted(known))
    except FileFormatError:
        raise
    # skops reads what it finds: a broken file fails wherever it is broken, by whatever error that is
    except Exception as error:
        raise FileFormatError(f"{path} is broken, or no file of a detector ({error}); save it again") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise FileFormatError(f"{path} holds no detector; expected what {kind.__name__}.save wrote")
    if content.get("version") != _VERSION:
        raise FileFormatError(
            f"{path} has schema version {content.get('version')}, this package reads {_VERSION}; use the package that "
            f"wrote it ({content.get('package')})"
        )
    if not isinstance(detector := content.get("detector"), kind):
        raise FileFormatError(f"{path} holds a {type(detector).__name__}, expected a {kind.__name__}")
    return detector


def _skops() -> Any:
    try:
        from skops import io
    except ImportError as error:
        raise OptionError(
            f"saving and loading detectors needs skops, which could not be loaded ({error}); install it: "
            "pip install 'captum-classfilters[persist]'"
        ) from error
    return io
