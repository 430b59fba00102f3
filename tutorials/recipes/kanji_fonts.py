"""Fonts as images: find faces, draw their glyphs, say which faces are of one foundry.

Nothing here sees a network. A face is one style of one font file. Images are 32x32 bytes, ink 255 on 0.
"""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fontTools.ttLib import TTCollection, TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse.csgraph import connected_components

SIDE, OVERSAMPLING = 32, 2
INK_SPAN = 28  # pixels that the widest glyphs of a face fill
EMPTY = 64  # an image with no brighter pixel shows nothing
BOXED = 0.95  # correlation with the missing-glyph box
PROBES = 100  # glyphs that stand for a face
# Correlations of glyphs. Debian's fonts leave a gap for ALIKE: derived ones from 0.963 up, others up to 0.934
SAME, ALIKE = 0.998, 0.95
SUFFIXES = {".ttf", ".otf", ".ttc", ".otc"}
# What font editors write where nobody chose a vendor: it says nothing about who drew the glyphs
NO_VENDOR = {"", "none", "pfed", "take", "1", "ukwn", "xxxx"}
FOREIGN = 0.3  # a face that correlates less with the median other is cursive, or hollow: no print
# Made from another family, or by its author, which neither vendor nor glyphs tell: first three letters of both
KIN = {"ric": "mpl", "kou": "aoy"}


class Face(NamedTuple):
    """One style of one font file, and what the file says of itself."""

    path: str
    index: int  # within a collection
    family: str
    style: str
    vendors: tuple[str, ...]  # manufacturer (name 8) and vendor mark (OS/2), those that say something
    licence: str  # names 13 and 14
    characters: frozenset[int]  # code points with a glyph other than .notdef


def find_faces(folders: Iterable[Path]) -> list[Face]:
    """Every face under ``folders``, in the order of path and index; files that are no fonts are skipped."""
    paths = {path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    faces = []
    for path in sorted(paths):
        try:
            with path.open("rb") as stream:
                collection = path.suffix.lower() in (".ttc", ".otc")
                fonts = TTCollection(stream, lazy=True).fonts if collection else [TTFont(stream, lazy=True)]
                faces += [_describe(path, index, font) for index, font in enumerate(fonts)]
        except (TTLibError, OSError, KeyError, AssertionError) as error:
            print(f"left out {path.name}: not readable as a font ({error})")
    return faces


def _describe(path: Path, index: int, font: TTFont) -> Face:
    name = partial(_name, font["name"])
    mark = font["OS/2"].achVendID if "OS/2" in font else ""
    vendors = (re.sub(r"\W", "", vendor).lower() for vendor in (name(8), mark))
    licence = " ".join(filter(None, (name(13), name(14))))
    order = font.getGlyphOrder()
    drawn = frozenset(code for code, glyph in (font.getBestCmap() or {}).items() if glyph != order[0])
    known = tuple(vendor for vendor in vendors if vendor not in NO_VENDOR)
    return Face(str(path), index, name(16) or name(1), name(17) or name(2), known, licence, drawn)


def _name(table: object, number: int) -> str:
    return " ".join((table.getDebugName(number) or "").replace("\0", "").split())


def draw(face: Face, characters: Sequence[str], size: int) -> np.ndarray:
    """The glyphs of ``characters``: ``(len(characters), 32, 32)`` uint8, centred.

    What is centred is the box as it is set: across the advance, down from the ink's top to its end or the baseline.
    Drawn twice as large and averaged: at 32 pixels hinting and embedded bitmaps would draw another font.

    Raises:
        OSError: FreeType cannot draw one of them.
    """
    font = _open(face, size)
    return np.stack([_glyph(font, character) for character in characters])


def size_for(face: Face, characters: Sequence[str]) -> int:
    """The font size, before averaging, at which nearly all ``characters`` span at most 28 of the 32 pixels."""
    size = INK_SPAN * OVERSAMPLING
    font = _open(face, size)
    boxes = np.array([font.getbbox(character) for character in characters])
    widest = np.percentile(np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]), 95)
    return round(size * size / widest) if widest > 0 else size


def _open(face: Face, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(face.path, size, index=face.index, layout_engine=ImageFont.Layout.BASIC)


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    side = SIDE * OVERSAMPLING
    canvas = Image.new("L", (side, side))
    left, top, right, bottom = font.getbbox(character)
    ImageDraw.Draw(canvas).text(((side - left - right) // 2, (side - top - bottom) // 2), character, 255, font)
    return np.asarray(canvas.reduce(OVERSAMPLING))


def missing(face: Face, characters: Sequence[str], images: np.ndarray, size: int) -> list[str]:
    """Those ``characters`` whose image is empty, another's too, or the box for a glyph that the face does not have."""
    absent = next(chr(code) for code in range(0xE000, 0x110000) if code not in face.characters)
    box = draw(face, [absent], size)
    bad = images.max((1, 2)) < EMPTY
    if box.max() >= EMPTY and not bad.all():
        # not equality: hinting may differ between a letter and no letter
        bad[~bad] = similarity(np.stack([images[~bad], np.repeat(box, (~bad).sum(), 0)]))[0, 1] > BOXED
    _, which, count = np.unique(images.reshape(len(images), -1), axis=0, return_inverse=True, return_counts=True)
    bad |= count[which.ravel()] > 1
    return [character for character, is_bad in zip(characters, bad, strict=True) if is_bad]


def draw_whole(face: Face, characters: Sequence[str]) -> np.ndarray | str:
    """What `draw` gives; or why this face cannot be used, in words."""
    try:
        size = size_for(face, characters[:PROBES])
        images = draw(face, characters, size)
        lost = missing(face, characters, images, size)
    except OSError as error:
        return f"FreeType cannot draw it ({error})"
    return f"{len(lost)} glyphs are empty, boxed or doubled, such as {''.join(lost[:5])}" if lost else images


def draw_all(faces: Sequence[Face], characters: Sequence[str], workers: int) -> tuple[list[Face], np.ndarray]:
    """The faces that have all ``characters``, and ``(faces, characters, 32, 32)`` uint8; says which it leaves out."""
    task = partial(draw_whole, characters=characters)
    if workers > 1:
        # spawn: a fork of a process with torch's threads may hang
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            drawn = list(pool.map(task, faces, chunksize=4))
    else:
        drawn = [task(face) for face in faces]
    for face, result in zip(faces, drawn, strict=True):
        if isinstance(result, str):
            print(f"left out {label(face)}: {result}")
    kept = [(face, result) for face, result in zip(faces, drawn, strict=True) if not isinstance(result, str)]
    if not kept:
        raise SystemExit(f"none of {len(faces)} faces has all {len(characters)} characters; install more fonts")
    return [face for face, _ in kept], np.stack([result for _, result in kept])


def label(face: Face) -> str:
    return f"{face.family} {face.style} ({Path(face.path).name}:{face.index})"


def similarity(images: np.ndarray) -> np.ndarray:
    """Correlation of the same glyph in two faces: ``(faces, faces, glyphs)``."""
    flat = images.reshape(*images.shape[:2], -1).astype(np.float32)
    flat -= flat.mean(2, keepdims=True)
    flat /= np.linalg.norm(flat, axis=2, keepdims=True)
    return np.stack([glyph @ glyph.T for glyph in flat.transpose(1, 0, 2)], 2)


def distinct(images: np.ndarray) -> list[int]:
    """Indices of faces that draw these glyphs as no earlier face does; many files differ in kana or metrics only."""
    same = similarity(images).mean(2) > SAME
    return [index for index in range(len(images)) if not same[index, :index].any()]


def printed(faces: Sequence[Face], images: np.ndarray) -> list[int]:
    """Indices of faces that look like the others; cursive and ornamental ones are left out, and named."""
    like = np.median(np.median(similarity(images), 2), 1)
    for index in np.flatnonzero(like < FOREIGN):
        print(f"left out {label(faces[index])}: correlates {like[index]:.2f} with the median face, a script of its own")
    return np.flatnonzero(like >= FOREIGN).tolist()


def groups_of(faces: Sequence[Face], images: np.ndarray) -> np.ndarray:
    """One number for each face: equal where two faces may share outlines, directly or through others.

    Two faces are joined by a vendor, by the first three letters of the family, or where the best tenth of their
    glyphs is nearly identical: one was then made from the other, weight apart. A wrong join costs variety only,
    a missed one would leak test outlines into training.
    """
    joined = np.quantile(similarity(images), 0.9, axis=2) > ALIKE
    for first, one in enumerate(faces):
        for second, other in enumerate(faces[:first]):
            if set(one.vendors) & set(other.vendors) or _stem(one) == _stem(other):
                joined[first, second] = True
    return connected_components(joined, directed=False)[1]


def _stem(face: Face) -> str:
    stem = re.sub(r"\W", "", face.family).lower()[:3]
    return KIN.get(stem, stem)


def split_groups(groups: np.ndarray, share: float, seed: int, least: int = 0) -> np.ndarray:
    """Which faces to hold out, as booleans: whole groups in a seeded order, at least ``share`` of the faces.

    Groups of more than a third of what is held out stay for training: a few families would be the whole test.
    """
    wanted = max(round(share * len(groups)), least, 1)
    sizes = np.bincount(groups)
    held = np.zeros(len(groups), bool)
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if held.sum() < wanted and sizes[group] <= max(wanted / 3, 1):
            held |= groups == group
    if held.all() or not held.any():
        raise SystemExit(f"{len(sizes)} groups of {len(groups)} faces cannot be split; install more fonts")
    return held
