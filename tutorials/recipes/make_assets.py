"""Make everything that ships in ``captum_classfilters/assets``: networks and a stratified sample of images.

    python tutorials/recipes/make_assets.py

The networks come from ``make_networks.py``, which trains those that are not in ``--runs`` yet.
"""

import argparse
from pathlib import Path

import torch
from data import Split, load
from make_networks import make

from captum_classfilters import assets


def sample(split: Split, class_names: tuple[str, ...], each: int, generator: torch.Generator) -> assets.ImageSample:
    """``each`` random images of every class, in random order."""
    order = torch.randperm(len(split.labels), generator=generator)
    picked = torch.cat([order[split.labels[order] == label][:each] for label in range(len(class_names))])
    picked = picked[torch.randperm(len(picked), generator=generator)]
    return assets.ImageSample(split.images[picked], split.labels[picked], class_names)


def make_sample(folder: Path, data_set: str, each: int) -> None:
    """Write ``fashion_mnist_sample.safetensors``: ``each`` images of every class and split."""
    data = load(data_set)
    generator = torch.Generator().manual_seed(0)
    train, test = (sample(split, data.class_names, each, generator) for split in (data.train, data.test))
    folder.mkdir(parents=True, exist_ok=True)
    assets.save_images(folder / "fashion_mnist_sample.safetensors", train, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", help="fashion_mnist, or a folder with its four files")
    parser.add_argument("--each", type=int, default=100, help="images of each class and split")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the trainings (default: runs)")
    parser.add_argument("--to", type=Path, default=Path(assets.__file__).parent, help="default: the package")
    parser.add_argument("--images-only", action="store_true", help="make the sample and no network")
    options, further = parser.parse_known_args()
    make_sample(options.to, options.data, options.each)
    if options.images_only:
        return
    further = ["--data", options.data, *further]
    for method, seeds in assets.SHIPPED.items():
        for seed in seeds:
            make(assets.network_name(seed, method), options.to, options.runs, further)


if __name__ == "__main__":
    main()
