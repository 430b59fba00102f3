"""Ten photographs with boxes round a few concepts: batches for ``captum_classfilters.metrics.concept_scores``.

    python tutorials/recipes/photo_concepts.py boxes.png     # the photographs with their boxes

The photographs are those that scikit-image and foolbox carry in their packages; nothing is downloaded. The boxes were
drawn by hand, by eye, on the pictures as they are cut here, for this project; each is good to a few pixels. Boxes are
no outlines: the corners of a wheel's box are road. Ten photographs make a worked example, not a benchmark.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from captum_classfilters.metrics.localisation import box_objects

SIDE = 224
# By hand. x1, y1, x2, y2 in pixels of the picture whose shorter side is 224 and whose middle square is cut out
BOXES: dict[tuple[str, str], dict[str, list[tuple[int, int, int, int]]]] = {
    ("skimage", "astronaut.png"): {
        "head": [(66, 7, 132, 82)],
        "eye": [(82, 38, 95, 48), (102, 38, 116, 48)],
        "nose": [(94, 45, 104, 57)],
    },
    # its head is the whole picture, and has no box
    ("skimage", "chelsea.png"): {"eye": [(44, 62, 98, 111), (163, 81, 201, 123)], "nose": [(117, 166, 163, 201)]},
    ("skimage", "coffee.png"): {"cup": [(41, 10, 173, 137), (53, 126, 86, 174)]},
    ("skimage", "motorcycle_left.png"): {"wheel": [(1, 105, 76, 181), (172, 120, 224, 202)]},
    ("foolbox", "imagenet_00_243.jpg"): {  # a dog
        "head": [(52, 74, 137, 158)],
        "eye": [(77, 98, 96, 113), (108, 97, 125, 112)],
        "nose": [(99, 120, 118, 136)],
    },
    ("foolbox", "imagenet_06_609.jpg"): {  # a jeep
        "wheel": [(46, 100, 59, 128), (86, 103, 115, 148), (147, 122, 178, 137)],
        "window": [(53, 65, 80, 86), (80, 62, 142, 82)],
    },
    ("foolbox", "imagenet_07_609.jpg"): {  # a car on a slope
        "wheel": [(29, 92, 66, 129), (149, 134, 186, 170)],
        "window": [(86, 73, 150, 98), (136, 83, 208, 122)],
    },
    ("foolbox", "imagenet_13_471.jpg"): {"wheel": [(33, 29, 136, 112), (63, 87, 195, 198)]},  # a cannon
    ("foolbox", "imagenet_15_99.jpg"): {  # geese
        "head": [(47, 41, 77, 57), (119, 29, 153, 46), (96, 82, 129, 101), (206, 60, 224, 76)]
    },
    ("foolbox", "imagenet_17_22.jpg"): {"head": [(104, 114, 135, 151)]},  # an eagle
}


class Photos(NamedTuple):
    names: tuple[str, ...]
    images: Tensor  # (N, 3, side, side) float32 in [0, 1]
    masks: list[dict[str, Tensor]]  # of each image, by concept: (side, side) bool


def load(side: int = SIDE) -> Photos:
    """The photographs, the shorter side made ``side`` pixels long and the middle square cut out, and their masks."""
    images, masks = [], []
    for (package, name), concepts in BOXES.items():
        pixels = np.array(_square(_folder(package) / name, side))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
        masks.append({concept: _mask(boxes, side) for concept, boxes in concepts.items()})
    return Photos(tuple(name for _, name in BOXES), torch.stack(images), masks)


def batches(
    side: int = SIDE, batch_size: int = 5, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> list[tuple[Tensor, list[dict[str, Tensor]]]]:
    """``(images, masks)`` for ``metrics.concept_scores``; images normalised by ``mean`` and ``std`` if given."""
    _, images, masks = load(side)
    if mean is not None and std is not None:
        images = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    starts = range(0, len(images), batch_size)
    return [(images[start : start + batch_size], masks[start : start + batch_size]) for start in starts]


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        name = "scikit-image" if package == "skimage" else package
        raise SystemExit(f"the photographs are those of {name}, which is not installed: pip install {name}")
    return Path(spec.origin).parent / "data"


def _square(path: Path, side: int) -> Image.Image:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    scale = side / min(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))


def _mask(boxes: list[tuple[int, int, int, int]], side: int) -> Tensor:
    scaled = torch.tensor(boxes, dtype=torch.float64) * side / SIDE
    return box_objects(scaled, (len(boxes), side, side)).any(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="where to write the photographs with their boxes")
    parser.add_argument("--scale", type=int, default=2)
    options = parser.parse_args()
    scale, columns = options.scale, 5
    rows = -(-len(BOXES) // columns)
    sheet = Image.new("RGB", (columns * SIDE * scale, rows * SIDE * scale))
    for index, ((package, name), concepts) in enumerate(BOXES.items()):
        photo = _square(_folder(package) / name, SIDE).resize((SIDE * scale, SIDE * scale))
        draw = ImageDraw.Draw(photo)
        for concept, boxes in concepts.items():
            for box in boxes:
                draw.rectangle([value * scale for value in box], outline="yellow", width=2)
                draw.text((box[0] * scale + 4, box[1] * scale + 2), concept, fill="yellow")
        sheet.paste(photo, (index % columns * SIDE * scale, index // columns * SIDE * scale))
    sheet.save(options.picture)


if __name__ == "__main__":
    main()
