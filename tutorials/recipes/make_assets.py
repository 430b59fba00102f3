"""Put trained networks and a stratified sample of images into the package.

    python tutorials/recipes/make_assets.py runs/resnet20-s0 runs/resnet20-s1 runs/resnet20-s2
    python tutorials/recipes/make_assets.py runs/lsg-s0 runs/lsg-s1 runs/lsg-s2 runs/fixed-s0
    python tutorials/recipes/make_assets.py runs/decoupled-s0 runs/decoupled-s1 runs/decoupled-s2 runs/decoupled-vgg
    python tutorials/recipes/make_assets.py --kanji runs/kanji-s0

The kanji of the sample come from faces under the SIL Open Font License or the IPA Font License only.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from data import Split, load
from kanji import Drawn, degrade, load_drawn

from captum_classfilters import PathDecoupler, assets, metrics

KANJI_CLASSES, KANJI_EACH = 50, 5
# Of decoupled networks that may ship: mean cross-entropy of the class from gates, share of dynamic filters
LARGEST_ENTROPY, SMALLEST_DYNAMIC = 1.8, 0.3
# How the families begin that Debian's copyright files put under the OFL or the IPA licence; fonts rarely say so
OPEN = (
    "BIZ UD", "DotGothic16", "Hana", "IPA", "Klee One", "LXGW", "M PLUS", "MigMix", "Migu", "Monapo", "Noto",
    "Reggae One", "Ricty", "RocknRoll One", "Sawarabi Mincho", "SetoFont", "Stick", "YOz", "Yusei Magic",
)  # fmt: skip


def sample(split: Split, class_names: tuple[str, ...], each: int, generator: torch.Generator) -> assets.ImageSample:
    """``each`` random images of every class, in random order."""
    order = torch.randperm(len(split.labels), generator=generator)
    picked = torch.cat([order[split.labels[order] == label][:each] for label in range(len(class_names))])
    picked = picked[torch.randperm(len(picked), generator=generator)]
    return assets.ImageSample(split.images[picked], split.labels[picked], class_names)


def kanji_samples(drawn: Drawn, seed: int = 0) -> tuple[list[assets.ImageSample], list[str]]:
    """Degraded images of the same 50 random classes for training and test, and the families they were drawn with."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([face["family"].startswith(OPEN) for face in drawn.faces])
    classes = torch.randperm(len(drawn.data.class_names), generator=generator)[:KANJI_CLASSES]
    samples, families = [], set()
    for split, faces in ((drawn.data.train, drawn.train_faces), (drawn.data.test, drawn.test_faces)):
        rows = (allowed[faces] & torch.isin(split.labels, classes)).nonzero().flatten()
        images = Split(rows, split.labels[rows])  # rows in the images' place: to know whose they are
        picked = sample(images, drawn.data.class_names, KANJI_EACH, generator).images
        pixels = split.images[picked]
        if split is drawn.data.train:
            pixels = degrade(pixels, generator, drawn.meta["strength"])
        samples.append(assets.ImageSample(pixels, split.labels[picked], drawn.data.class_names))
        families |= {drawn.faces[face]["family"] for face in faces[picked].tolist()}
    return samples, sorted(families)


def make_kanji(run: Path, data: Path, folder: Path) -> None:
    drawn = load_drawn(data)
    samples, families = kanji_samples(drawn)
    assets.save_images(folder / "kanji_sample.safetensors", *samples)
    print("drawn with " + ", ".join(families))
    _, meta = assets.load_network(run / "network.safetensors")
    shutil.copyfile(run / "network.safetensors", folder / "kanji_resnet14.safetensors")
    print(f"kanji_resnet14.safetensors: test accuracy {meta['test_accuracy']:.4f} on {meta['test_images']} images")


def make_fashion_mnist(runs: list[Path], each: int, folder: Path) -> None:
    data = load("fashion_mnist")
    generator = torch.Generator().manual_seed(0)
    train, test = (sample(split, data.class_names, each, generator) for split in (data.train, data.test))
    for run in runs:
        model, meta = assets.load_network(run / "network.safetensors")
        way = meta.get("method", "std")
        if way == "decoupled":
            check_paths(run, model, train)
            way += "" if meta["target_rate"] else "_r0"
        method = "" if way == "std" else f"{way.replace('-', '_')}_"
        kind = {"SmallVGG": "vgg", "SmallInception": "inception"}.get(type(model).__name__) or f"resnet{model.depth}"
        target = folder / f"{kind}_{method}s{meta['seed']}.safetensors"
        shutil.copyfile(run / "network.safetensors", target)
        if way.startswith("decoupled"):
            shutil.copyfile(run / "paths.safetensors", folder / f"paths_{target.name}")
        elif method:
            shutil.copyfile(run / "gate.safetensors", folder / f"gate_{method}s{meta['seed']}.safetensors")
        print(f"{target.name}: test accuracy {meta['test_accuracy']:.4f}")
    assets.save_images(folder / "fashion_mnist_sample.safetensors", train, test)


def check_paths(run: Path, model: Any, train: assets.ImageSample) -> None:
    """Refuse a training whose gates are the same for every image: judged by images of the training set."""
    decoupler = PathDecoupler(model).load(run / "paths.safetensors").eval()
    paths = decoupler.paths(train.batches())
    entropy = metrics.path_information(decoupler, paths).cross_entropy["all"]
    states = paths.states()
    dynamic = states.dynamic.sum() / states.channels.sum()
    print(f"{run.name}: cross-entropy of gates {entropy:.3f}, dynamic filters {dynamic:.3f}")
    if entropy > LARGEST_ENTROPY or dynamic < SMALLEST_DYNAMIC:
        raise SystemExit(
            f"{run}: a failed training (at most {LARGEST_ENTROPY} and at least {SMALLEST_DYNAMIC} were expected); "
            "train with a larger --information-weight"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of train_fashion_mnist.py")
    parser.add_argument("--each", type=int, default=100, help="images of each class and split of Fashion-MNIST")
    parser.add_argument("--kanji", type=Path, help="folder of kanji.py; nothing of Fashion-MNIST is made then")
    parser.add_argument("--kanji-data", type=Path, help="the file it drew (default: data.safetensors in that folder)")
    parser.add_argument("--to", type=Path, default=Path(assets.__file__).parent, help="default: the package")
    options = parser.parse_args()
    if options.kanji:
        make_kanji(options.kanji, options.kanji_data or options.kanji / "data.safetensors", options.to)
    else:
        make_fashion_mnist(options.runs, options.each, options.to)


if __name__ == "__main__":
    main()
