"""Put trained networks and a stratified sample of images into the package.

python tutorials/recipes/make_assets.py runs/resnet20-s0 runs/resnet20-s1 runs/resnet20-s2
"""

import argparse
import shutil
from pathlib import Path

import torch
from data import Split, load

from captum_classfilters import assets


def sample(split: Split, class_names: tuple[str, ...], each: int, generator: torch.Generator) -> assets.ImageSample:
    """``each`` random images of every class, in random order."""
    order = torch.randperm(len(split.labels), generator=generator)
    picked = torch.cat([order[split.labels[order] == label][:each] for label in range(len(class_names))])
    picked = picked[torch.randperm(len(picked), generator=generator)]
    return assets.ImageSample(split.images[picked], split.labels[picked], class_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of train_fashion_mnist.py")
    parser.add_argument("--each", type=int, default=100, help="images of each class and split")
    options = parser.parse_args()
    folder = Path(assets.__file__).parent
    for run in options.runs:
        model, meta = assets.load_network(run / "network.safetensors")
        target = folder / f"resnet{model.depth}_s{meta['seed']}.safetensors"
        shutil.copyfile(run / "network.safetensors", target)
        print(f"{target.name}: test accuracy {meta['test_accuracy']:.4f}")
    data = load("fashion_mnist")
    generator = torch.Generator().manual_seed(0)
    train, test = (sample(split, data.class_names, options.each, generator) for split in (data.train, data.test))
    assets.save_images(folder / "fashion_mnist_sample.safetensors", train, test)


if __name__ == "__main__":
    main()
