"""Attack the decoupled network and keep the paths, which `benchmarks.results.detection_results` reads.

    python -m benchmarks.results.detection_pairs FOLDER

Three disjoint sets of images: those to learn from (of the training set), those for calibration (the first half of the
test set) and those to judge by (its second half). Finished files are not made again. The attack
that is transferred needs a second network: ``--networks``.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captum.robust import FGSM, PGD
from torch import Tensor, nn

from benchmarks.lib.networks import Networks, add_networks_argument
from benchmarks.lib.recipes import Loader, Split, load
from benchmarks.lib.report import stamp
from captum_classfilters import PathDecoupler
from captum_classfilters.attacks import Attack, FoolboxAttack, LocalSearch, OnePixel
from captum_classfilters.detection import PathPairs, adversarial_paths

EPSILONS = (1, 2, 4, 8)  # of 255
CALIBRATION = 5000


class Job(NamedTuple):
    """An attack, how many pairs are wanted to learn from and to judge by, and on how many images at most."""

    name: str
    attack: Callable[[nn.Module], Callable[..., Tensor]]
    epsilon: float | None
    train: tuple[int, int]
    test: tuple[int, int]


def jobs(networks: Networks) -> list[Job]:
    found = []
    for epsilon in EPSILONS:
        # 6,000 pairs for the sizes of table 4
        wanted = 6000 if epsilon == 2 else 1000
        found.append(Job(f"pgd {epsilon}", pgd, epsilon / 255, (wanted, 40_000), (1000, 5000)))
        found.append(Job(f"fgsm {epsilon}", fgsm, epsilon / 255, (1000, 20_000), (1000, 5000)))
    found.append(Job("transfer 2", partial(transferred, networks), 2 / 255, (0, 0), (1000, 5000)))
    found.append(Job("cw", carlini, None, (500, 700), (500, 700)))
    found.append(Job("local search", local_search, None, (0, 0), (100, 120)))
    found.append(Job("one pixel", one_pixel, None, (0, 0), (100, 100)))
    return found


LOSS = nn.CrossEntropyLoss(reduction="none")


def pgd(model: nn.Module) -> PGD:
    return PGD(model, LOSS, 0.0, 1.0)


def fgsm(model: nn.Module) -> FGSM:
    return FGSM(model, LOSS, 0.0, 1.0)


def transferred(networks: Networks, _: nn.Module) -> PGD:
    """Made on another seed's network."""
    return pgd(networks.decoupled(1, "decoupled-paper"))


def carlini(model: nn.Module) -> FoolboxAttack:
    # ART's takes 330 s for 55 images and finds 16, Foolbox's 12 s and 50
    import foolbox

    return FoolboxAttack(model, foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=3, steps=30))


def local_search(model: nn.Module) -> LocalSearch:
    return LocalSearch(model, rounds=30, candidates=78)


def one_pixel(model: nn.Module) -> OnePixel:
    return OnePixel(model, max_iter=10)


def network() -> PathDecoupler:
    return Networks().decoupled()


def images() -> dict[str, Split]:
    """Images to learn from, in random order; for calibration; to judge by."""
    data = load("fashion_mnist")
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    return {
        "train": Split(*(part[order] for part in data.train)),
        "calibration": Split(*(part[:CALIBRATION] for part in data.test)),
        "test": Split(*(part[CALIBRATION:] for part in data.test)),
    }


def make(job: Job, split: str, decoupler: PathDecoupler, given: Split, folder: Path) -> None:
    wanted, most = job.train if split == "train" else job.test
    target = folder / f"{job.name} {split}.safetensors"
    if not wanted or target.exists():
        return
    started = time.time()
    some = Split(*(part[:most] for part in given))
    options: dict[str, Any] = {"logits": True, "keep_images": True, "max_pairs": wanted}
    pairs = adversarial_paths(decoupler, Loader(some), Attack(job.attack(decoupler), job.epsilon), **options)
    pairs.save(target)
    print(f"- {job.name}, {split}: {pairs}; {time.time() - started:.0f} s", flush=True)


def read(folder: Path, name: str, split: str) -> PathPairs:
    return PathPairs.load(folder / f"{name} {split}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", help="of these attacks")
    add_networks_argument(parser)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # of Foolbox and ART
    print(stamp("results.detection_pairs", "cpu"))
    decoupler, data = network(), images()
    for job in jobs(Networks(options.networks)):
        if not options.only or job.name in options.only:
            for split in ("train", "test"):
                make(job, split, decoupler, data[split], options.folder)


if __name__ == "__main__":
    main()
