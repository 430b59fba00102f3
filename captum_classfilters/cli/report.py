"""What a command says: prose on stdout, or one JSON document; notes on stderr. Nothing here knows what it is about."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class Report:
    """Prose as it comes, facts for ``--json`` at the end.

    Args:
        as_json: The facts are printed by `finish`, and no prose.
        quiet: No prose.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json, self._silent = as_json, as_json or quiet
        self.facts: dict[str, Any] = {}

    def say(self, text: str = "") -> None:
        """A line of prose."""
        if not self._silent:
            print(text)

    def note(self, text: str) -> None:
        """Something to know, whatever the output."""
        print(f"note: {text}", file=sys.stderr)

    def finish(self) -> None:
        """Print the facts, if JSON was asked for."""
        if self._as_json:
            print(as_json(self.facts))


def as_json(value: Any) -> str:
    """Strict JSON, indented: NaN, which JSON has not, becomes null; paths become text."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
