"""A real task with many classes: recognise 1,000 kanji in typefaces of foundries that training never saw.

    python tutorials/recipes/kanji.py --out runs/kanji-s0

Draws the kanji in every face found (``--fonts``; a Debian machine with its Japanese and Chinese fonts has some 160
distinct ones) into ``OUT/data.safetensors``, splits the faces by foundry, and trains a ResNet-14 with K = 192.
``--data FILE`` takes a file drawn before; ``--draw-only`` stops there.

Images are 32x32 bytes, ink 255 on 0. Test images are degraded once, by seed: small affine maps, blur, 16x16 pixels,
faint ink, noise, an occluded patch. Training images are kept clean and degraded anew in every batch.

The task was made as hard as it is so that the dense network lands between 90 and 98 %: `STRENGTH` was first 1 (92 % of
validation foundries after a short training, ``--validate``; but 97.9 % of the test's after a whole one), then 1.35
(91.9 %), now 1.2. Test accuracy chose this difficulty and nothing else. The network trained at 1.35 was kept.
About 100 s an epoch over 130,000 images on two CPU cores. The file keeps one face after the other.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from data import Data, Split
from kanji_fonts import PROBES, Face, distinct, draw_all, find_faces, groups_of, printed, similarity, split_groups
from methods import PLAIN_OR_GATED, add_method_arguments, method_of, told_by
from torch import Tensor
from torch.nn import functional as F
from training import add_arguments, train

from captum_classfilters.assets.networks import SmallResNet
from captum_classfilters.core.files import read, write

FONTS = (Path("/usr/share/fonts"), Path.home() / ".fonts")
DEPTH, WIDTHS, STEM_STRIDE = 14, (32, 64, 192), 2
STRENGTH, TRAINING_STRENGTH = 1.2, 1.35  # of the degradation
COVERAGE = 0.8  # a face with less of JIS level 1 is another script's
TEST_SHARE, TEST_LEAST, VALIDATION_SHARE = 0.15, 25, 0.08
KIND, VERSION = "KanjiData", 1
# Each row looks alike
CONFUSIONS = (
    "土士", "未末", "大太犬", "人入八", "日曰目", "田由甲申", "干千于", "王玉主", "木本", "力刀", "己巳", "石右",
    "牛午", "白自百", "夫天", "水氷永", "矢失", "問間聞", "待持侍", "倹険検", "微徴", "復複", "遺遣", "析折",
    "鳥烏島", "車東", "貝見", "名各", "若苦", "住往", "縁緑", "列例", "官宮", "爪瓜", "綱網", "輪輸",
)  # fmt: skip


class Drawn(NamedTuple):
    """What a data file holds: clean training images, degraded test images, and of which face each is."""

    data: Data
    train_faces: Tensor  # (N,) int64, into faces
    test_faces: Tensor
    faces: list[dict[str, Any]]  # family, style, file, licence, group
    meta: dict[str, Any]  # seed, strength


def jis_level_1() -> list[str]:
    """The 2,965 kanji of daily use: rows 16 to 47 of JIS X 0208."""
    cells = (bytes((0xA0 + row, 0xA0 + cell)) for row in range(16, 48) for cell in range(1, 95))
    return [character for cell in cells if (character := cell.decode("euc_jp", errors="ignore"))]


def usable(faces: list[Face], characters: list[str]) -> tuple[list[Face], list[str]]:
    """Faces that have most of ``characters``, and those that all of these faces have."""
    codes = {ord(character) for character in characters}
    faces = [face for face in faces if len(codes & face.characters) >= COVERAGE * len(codes)]
    shared = codes.intersection(*(face.characters for face in faces)) if faces else set()
    return faces, [character for character in characters if ord(character) in shared]


def choose_classes(characters: list[str], images: np.ndarray, count: int, seed: int) -> list[str]:
    """Natural confusions, then pairs that look most alike up to half of ``count``, then any: in the given order.

    Args:
        characters: To choose from.
        images: One image of each, ``(len(characters), 32, 32)``; a mean over faces will do.
        count: How many.
        seed: Of the rest.
    """
    if len(characters) < count:
        raise SystemExit(f"the faces share {len(characters)} characters, {count} were asked for; lower --classes")
    known = {character: index for index, character in enumerate(characters)}
    rows = [[known[c] for c in row if c in known] for row in CONFUSIONS]
    chosen = dict.fromkeys(index for row in rows if len(row) > 1 for index in row)
    alike = similarity(images[:, None])[:, :, 0]
    first, second = np.triu_indices(len(characters), 1)
    for pair in np.argsort(-alike[first, second], kind="stable"):
        if len(chosen) >= count // 2:
            break
        chosen |= dict.fromkeys((int(first[pair]), int(second[pair])))
    rest = np.random.default_rng(seed).permutation(len(characters)).tolist()
    return [characters[index] for index in sorted(list(dict.fromkeys([*chosen, *rest]))[:count])]


def degrade(images: Tensor, generator: torch.Generator, strength: float = STRENGTH) -> Tensor:
    """Bytes ``(N, 1, 32, 32)`` in and out; ``strength`` 0 leaves them as they are. All on the CPU."""
    count, side = len(images), images.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low

    pixels = _affine(images.float() / 255, uniform, strength)
    coarse = F.interpolate(F.avg_pool2d(pixels, 2), size=(side, side), mode="bilinear", align_corners=False)
    pixels = torch.where(uniform(0, 1) < min(0.3 * strength, 1), coarse, pixels)
    blurred = F.avg_pool2d(F.avg_pool2d(pixels, 3, 1, 1), 3, 1, 1)
    pixels = pixels.lerp(blurred, uniform(0, min(strength, 1)))
    pixels = pixels * uniform(max(1 - 0.5 * strength, 0), 1)
    pixels = _occlude(pixels, uniform, strength)
    noise = torch.randn(pixels.shape, generator=generator) * uniform(0, 0.12 * strength)
    return (pixels + noise).clamp_(0, 1).mul_(255).round_().byte()


def _affine(pixels: Tensor, uniform: Any, strength: float) -> Tensor:
    """At strength 1: turn by up to 8 degrees, scale by 15 %, shear by 0.1 and shift by two pixels."""
    angle = uniform(-1, 1) * (math.radians(8) * strength)
    zoom_x, zoom_y = (1 + uniform(-1, 1) * 0.15 * strength for _ in range(2))
    shear = uniform(-1, 1) * 0.1 * strength
    shift_x, shift_y = (uniform(-1, 1) * (2 * strength / (pixels.shape[-1] / 2)) for _ in range(2))
    rows = (
        torch.cat([angle.cos() * zoom_x, shear - angle.sin(), shift_x], 2),
        torch.cat([shear + angle.sin(), angle.cos() * zoom_y, shift_y], 2),
    )
    grid = F.affine_grid(torch.cat(rows, 3).squeeze(1).mT, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def _occlude(pixels: Tensor, uniform: Any, strength: float) -> Tensor:
    """At strength 1: paint half of the images over with a grey rectangle of up to 10x10 pixels."""
    side = pixels.shape[-1]
    at = torch.arange(side).float()
    tall, wide = (uniform(0, 10 * strength) for _ in range(2))
    top, left = (uniform(0, side - 1) for _ in range(2))
    down, across = at.view(1, 1, -1, 1) - top, at.view(1, 1, 1, -1) - left
    inside = (down >= 0) & (down < tall) & (across >= 0) & (across < wide)
    return torch.where(inside & (uniform(0, 1) < 0.5), uniform(0, 1), pixels)


def draw_data(options: argparse.Namespace, path: Path) -> None:
    """Find faces, choose classes, draw, group and split; write ``path``."""
    faces, pool = usable(find_faces(options.fonts), options.characters or jis_level_1())
    print(f"{len(faces)} faces share {len(pool)} of the characters")
    random = np.random.default_rng(options.seed)
    probes = [pool[index] for index in sorted(random.permutation(len(pool))[:PROBES])]
    faces, images = draw_all(faces, probes, options.workers)
    kept = distinct(images)
    print(f"{len(kept)} of {len(faces)} faces draw them differently")
    faces, images = [faces[index] for index in kept], images[kept]
    kept = printed(faces, images)
    faces, images = [faces[index] for index in kept], images[kept]
    few = [faces[index] for index in np.unique(groups_of(faces, images), return_index=True)[1]]
    means = draw_all(few, pool, options.workers)[1].mean(0)
    classes = choose_classes(pool, means, options.classes, options.seed)
    faces, images = draw_all(faces, classes, options.workers)
    groups = groups_of(faces, images[:, random.permutation(len(classes))[:PROBES]])
    held = split_groups(groups, TEST_SHARE, options.seed, min(TEST_LEAST, len(faces) // 4))
    print_groups(faces, groups, held)
    write_data(path, faces, groups, held, images, classes, options.seed)


def print_groups(faces: list[Face], groups: np.ndarray, held: np.ndarray) -> None:
    for group in range(groups.max() + 1):
        members = np.flatnonzero(groups == group)
        families = ", ".join(sorted({faces[index].family for index in members}))
        print(f"{'test' if held[members[0]] else 'train':5}  {len(members):3} faces  {families}")


def write_data(
    path: Path,
    faces: list[Face],
    groups: np.ndarray,
    held: np.ndarray,
    images: np.ndarray,
    classes: list[str],
    seed: int,
) -> None:
    if set(groups[held]) & set(groups[~held]):
        raise AssertionError("a foundry is on both sides")
    tensors = {}
    for split, rows in (("train", ~held), ("test", held)):
        indices = torch.from_numpy(np.flatnonzero(rows))
        drawn = torch.from_numpy(images[rows]).flatten(0, 1).unsqueeze(1)
        if split == "test":
            drawn = degrade(drawn, torch.Generator().manual_seed(seed))
        tensors[f"{split}_images"] = drawn
        tensors[f"{split}_labels"] = torch.arange(len(classes)).repeat(len(indices))
        tensors[f"{split}_faces"] = indices.repeat_interleave(len(classes))
    told = [
        {"family": f.family, "style": f.style, "file": Path(f.path).name, "licence": f.licence, "group": int(g)}
        for f, g in zip(faces, groups, strict=True)
    ]
    meta = {"class_names": classes, "faces": told, "seed": seed, "strength": STRENGTH}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, tensors, kind=KIND, version=VERSION, meta=meta)


def load_drawn(path: str | Path) -> Drawn:
    """Read what `draw_data` wrote."""
    found, meta = read(path, kind=KIND, version=VERSION)
    splits = [Split(found[f"{split}_images"], found[f"{split}_labels"]) for split in ("train", "test")]
    names = tuple(meta["class_names"])
    return Drawn(Data("kanji", *splits, names), found["train_faces"], found["test_faces"], meta["faces"], meta)


def load_kanji(path: str | Path) -> Data:
    """Clean training images and degraded test images, as `data.load` gives other sets."""
    return load_drawn(path).data


def calibration(data: Data, count: int, seed: int, strength: float = STRENGTH) -> Split:
    """``count`` training images degraded as the test images are: filters and refits see the same distribution.

    Every class has ``count / C`` of them, give or take one.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train.labels), generator=generator)
    by_class = order[data.train.labels[order].argsort(stable=True)]
    rank = torch.cat([torch.arange(int(n)) for n in data.train.labels.bincount()])
    picked = by_class[rank.argsort(stable=True)[:count]]
    return Split(degrade(data.train.images[picked], generator, strength), data.train.labels[picked])


def validation(drawn: Drawn, seed: int, strength: float = STRENGTH) -> Data:
    """Part of the training foundries held out, degraded, in the place of the test images."""
    faces = drawn.train_faces.unique()
    groups = np.array([drawn.faces[face]["group"] for face in faces])
    _, groups = np.unique(groups, return_inverse=True)
    held = torch.isin(drawn.train_faces, faces[torch.from_numpy(split_groups(groups, VALIDATION_SHARE, seed))])
    images, labels = drawn.data.train
    judged = Split(degrade(images[held], torch.Generator().manual_seed(seed), strength), labels[held])
    return drawn.data._replace(train=Split(images[~held], labels[~held]), test=judged)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, nargs="+", default=FONTS, help="folders of .ttf, .otf and .ttc")
    parser.add_argument("--characters", help="to choose classes from (default: JIS level 1)")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument("--data", type=Path, help="a file drawn before (default: OUT/data.safetensors)")
    parser.add_argument("--draw-only", action="store_true")
    parser.add_argument("--validate", action="store_true", help="judge on held-out training foundries")
    parser.add_argument("--images-per-epoch", type=int, default=None, help="a random so many (default: all)")
    add_method_arguments(parser, PLAIN_OR_GATED)
    add_arguments(parser, epochs=6)
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    path = options.data or options.out / "data.safetensors"
    if not path.is_file():
        draw_data(options, path)
    drawn = load_drawn(path)
    data = validation(drawn, options.seed) if options.validate else drawn.data
    print(f"{len(data.class_names)} classes, {len(data.train.labels)} training and {len(data.test.labels)} test images")
    if options.draw_only:
        return
    meta = {
        **told_by(options),
        "test_images": len(data.test.labels),
        "faces": len(drawn.faces),
        "test_faces": len(drawn.test_faces.unique()),
        "groups": len({face["group"] for face in drawn.faces}),
        "strength": drawn.meta["strength"],
        "training_strength": TRAINING_STRENGTH,
    }
    network = partial(SmallResNet, DEPTH, widths=WIDTHS, stem_stride=STEM_STRIDE)
    harder = partial(degrade, strength=TRAINING_STRENGTH)
    train(
        options, data, network, harder, images_per_epoch=options.images_per_epoch, meta=meta, method=method_of(options)
    )


if __name__ == "__main__":
    main()
