"""The page itself: one HTML file, or a folder of files; nothing in it asks for anything from elsewhere."""

import base64
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.files import replacing
from captum_classfilters.report.pack import Packed, as_script_json
from captum_classfilters.visualize.kit import AGAINST, FOR

_HERE = Path(__file__).parent
_SUMMARY = 200  # classes in the table that is there without scripts
_MARK = "captum_classfilters_report.txt"  # says that a folder is a report, and may be written again


def write_page(packed: Packed, path: Path, folder: bool) -> int:
    """Write the report; returns its size in bytes.

    Args:
        packed: What is shown.
        path: The file; or the folder, which gets an ``index.html``.
        folder: Write a folder.

    Raises:
        OSError: It cannot be written.
    """
    packed.data["dropped"] = packed.dropped
    texts = {name: (_HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    texts["css"] = texts["css"].replace("FOR_COLOUR", FOR).replace("AGAINST_COLOUR", AGAINST)
    chunks = {name: base64.b64encode(chunk).decode() for name, chunk in packed.chunks.items()}
    data = as_script_json(packed.data)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html")
    shown = {"data": packed.data, "classes": _summary(packed.data), "most": _SUMMARY}
    if not folder:
        html = template.render(**shown, inline=True, css=texts["css"], js=texts["js"], json=data, chunks=chunks)
        with replacing(path) as beside:
            beside.write_text(html, encoding="utf-8")
        return path.stat().st_size
    path.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path / "chunks", ignore_errors=True)
    (path / "chunks").mkdir()
    files = {
        "index.html": template.render(**shown, inline=False),
        "page.css": texts["css"],
        "page.js": texts["js"],
        "data.js": f"window.REPORT_DATA = {data};\n",
        _MARK: "This folder is a report of captum_classfilters: open index.html. It may be written again.\n",
    }
    files |= {f"chunks/{name}.js": f'window.reportChunk("{name}", "{chunk}");\n' for name, chunk in chunks.items()}
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
    return sum(len(text.encode()) for text in files.values())


def checked_path(path: Path, folder: bool) -> Path:
    """Where to write, refused before any work if it cannot be written.

    Args:
        path: A file, or a folder for ``report.html``; with ``folder`` a folder that is new, empty or a report's.
        folder: Write a folder.

    Raises:
        OptionError: There is no such folder, or it holds other files.
    """
    if not folder:
        path = path / "report.html" if path.is_dir() else path
        if not path.parent.is_dir():
            raise OptionError(f"there is no folder {path.parent}; make it, or pass another path")
        return path
    if path.exists() and not path.is_dir():
        raise OptionError(f"{path} is a file; with folder=True pass the name of a folder, new or of an earlier report")
    if path.is_dir() and any(path.iterdir()) and not (path / _MARK).exists():
        raise OptionError(f"{path} holds other files; pass a folder that is new, empty, or an earlier report's")
    return path


def _summary(data: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The first classes, for readers without scripts."""
    return [
        {"name": name, "recall": recall, "samples": samples, "top": top[: data["k"]]}
        for name, recall, samples, top in zip(
            data["names"][:_SUMMARY],
            data["recall"][:_SUMMARY],
            data["samples"][:_SUMMARY],
            data["top"][:_SUMMARY],
            strict=True,
        )
    ]
