"""The paper's ImageNet tables with torchvision's weights: A_f, A_d and r_A at k1 = k2 = 50.

    python tutorials/recipes/imagenet.py /data/imagenet resnet50 resnet101 resnet152

The folder holds ``train/<wnid>/`` and ``val/<wnid>/``. torchvision downloads the weights. Filters come from training
images (``--limit`` of them, at random), accuracy from validation images; one pass each.
"""

import argparse
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from captum_classfilters import HeadPass, InfluentialFeatures, metrics


def loader(folder: Path, transform: object, options: argparse.Namespace, limit: int | None) -> DataLoader:
    images = ImageFolder(folder, transform)
    if limit is not None and limit < len(images):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
        images = Subset(images, order[:limit].tolist())
    return DataLoader(
        images, batch_size=options.batch_size, num_workers=options.workers, pin_memory=torch.cuda.is_available()
    )


def evaluate(name: str, options: argparse.Namespace) -> None:
    weights = None if options.random_weights else torchvision.models.get_model_weights(name).DEFAULT
    model = torchvision.models.get_model(name, weights=weights).to(options.device)
    default = torchvision.models.ResNet50_Weights.DEFAULT
    transform = (weights or default).transforms()
    train = loader(options.folder / "train", transform, options, options.limit)
    found = InfluentialFeatures(model).attribute(
        train, k1=options.k, selector=["histogram", "mean_activation", "contribution"], show_progress=True
    )
    test = loader(options.folder / "val", transform, options, None)
    curve = metrics.accuracy_curve(HeadPass(model, test, show_progress=True), found, ks=[options.k])
    columns = ["filters", "k", "accuracy", "low", "high", "relative", "agreement"]
    print(
        f"\n{name}\n{curve[curve.class_name == 'all'][columns].to_string(index=False, float_format='%.4f')}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", help="names of torchvision classifiers")
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--limit", type=int, default=None, help="training images to look at (default: all)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--random-weights", action="store_true", help="no download; to try the rest")
    options = parser.parse_args()
    for name in options.models:
        evaluate(name, options)


if __name__ == "__main__":
    main()
