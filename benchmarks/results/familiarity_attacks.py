"""Adversarial images on a plain network: scores of the head's input, a forest on what each class has to say, and LID.

    python -m benchmarks.results.familiarity_attacks

The network is the plain ResNet-20 that ships, seed 0. A forest learns from attacked training images; alarms are
calibrated on the first 5,000 test images, and attacks are judged on images of the other 5,000. Only images count that
were seen right before and wrong after. Noise of the same size counts as clean, in learning and in judging.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import foolbox
import numpy as np
import pandas as pd
import torch
from captum.robust import FGSM, PGD
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lib.networks import Networks
from benchmarks.lib.recipes import Loader, load
from benchmarks.lib.report import interval, markdown, stamp
from benchmarks.results.detection_pairs import LOSS, images
from captum_classfilters import FamiliarityDetector, HeadPass, PathDetector
from captum_classfilters.attacks import Attack, FoolboxAttack
from captum_classfilters.detection.conformal import goes_off, p_values
from captum_classfilters.metrics import wilson

Array = np.ndarray[Any, Any]
METHODS = (
    "mahalanobis", "relative_mahalanobis", "class_gaussian", "nearest_neighbours", "vim", "react", "energy",
    "max_softmax",
)  # fmt: skip
LEARN, JUDGE, KNOWING = 500, 500, 300
SLOW = 150  # images for Carlini and Wagner's


class Pairs(NamedTuple):
    """Images that an attack turned: before, after, and with noise of the same size."""

    clean: Tensor
    attacked: Tensor
    noisy: Tensor
    place: Array  # in the data they were made from
    tried: int


def attacks(model: nn.Module) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    made: dict[str, Any] = {}
    for size in (2, 4, 8):
        made[f"PGD-10, {size}/255"] = Attack(PGD(model, LOSS, 0.0, 1.0), size / 255)
        made[f"FGSM, {size}/255"] = Attack(FGSM(model, LOSS, 0.0, 1.0), size / 255)
    made["Carlini-Wagner L2"] = FoolboxAttack(
        model, foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=3, steps=30)
    )
    return made


def pairs_of(model: nn.Module, attack: Any, pictures: Tensor, labels: Tensor, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    right = torch.cat([answers(model, x) == y for x, y in zip(pictures.split(500), labels.split(500), strict=True)])
    place = right.nonzero().flatten()
    pictures, labels = pictures[place], labels[place]
    made = torch.cat([attack(x, y).detach() for x, y in zip(pictures.split(100), labels.split(100), strict=True)])
    change = made - pictures
    # as many pixels as far: random signs for a bounded attack, a random direction for Carlini and Wagner's
    noise = torch.randn(change.shape, generator=generator)
    if attack_is_bounded(attack):
        noise = noise.sign() * change.abs().amax((1, 2, 3), keepdim=True)
    else:
        noise = noise / noise.flatten(1).norm(dim=1)[:, None, None, None]
        noise = noise * change.flatten(1).norm(dim=1)[:, None, None, None]
    noisy = (pictures + noise).clamp(0, 1)
    fooled = torch.cat([answers(model, x) != y for x, y in zip(made.split(500), labels.split(500), strict=True)])
    return Pairs(pictures[fooled], made[fooled], noisy[fooled], place[fooled].numpy(), len(place))


def attack_is_bounded(attack: Any) -> bool:
    return isinstance(attack, Attack) and attack.epsilon is not None


@torch.inference_mode()
def answers(model: nn.Module, pictures: Tensor) -> Tensor:
    return model(pictures).argmax(1)


class Lid:
    """Local intrinsic dimensionality of the head's input (Ma et al. 2018): 5,000 training images, 20 neighbours."""

    def __init__(self, features: Tensor, neighbours: int = 20) -> None:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:5000]
        self._features, self._neighbours = features[order].double(), neighbours

    def score(self, features: Tensor) -> Array:
        near = torch.cdist(features.double(), self._features).topk(self._neighbours, largest=False).values
        return (-1 / (near / near[:, -1:]).clamp(min=1e-12).log().mean(1)).numpy()


class Watch:
    """Every detector, fitted and calibrated: pictures in, strangeness out."""

    def __init__(self, model: nn.Module, train: Any, calibration: Any) -> None:
        self.model = model
        learnt = HeadPass(model, Loader(train)).cached()
        self.detectors = {name: FamiliarityDetector(name).fit(learnt) for name in METHODS}
        with learnt.batches() as stream:
            features = torch.cat([batch.features for batch in stream])
        self._lid = Lid(features)
        self._forests: dict[str, PathDetector] = {}
        self._calibration = HeadPass(model, Loader(calibration)).cached()

    def learn(self, name: str, pairs: list[Pairs]) -> None:
        """A forest on the logits and the distances to the class means."""
        clean, attacked = (
            torch.cat([getattr(part, kind) for part in pairs for kind in kinds])
            for kinds in (("clean", "noisy"), ("attacked",))
        )
        rows = [self._evidence(HeadPass(self.model, list(part.split(500)))) for part in (clean, attacked)]
        truth = np.repeat([0, 1], [len(part) for part in rows])
        forest = RandomForestClassifier(300, min_samples_leaf=2, random_state=0, class_weight="balanced")
        self._forests[name] = PathDetector(forest).fit(np.concatenate(rows), truth)

    def _evidence(self, head_pass: HeadPass) -> Array:
        return self.detectors["class_gaussian"].evidence(head_pass)

    def scores(self, pictures: Tensor) -> dict[str, Array]:
        return self._scores(HeadPass(self.model, list(pictures.split(500))).cached(need_labels=False))

    def calibration(self) -> dict[str, Array]:
        return self._scores(self._calibration)

    def _scores(self, head_pass: HeadPass) -> dict[str, Array]:
        found = {name: detector.strangeness(head_pass) for name, detector in self.detectors.items()}
        with head_pass.batches(need_labels=False) as stream:
            found["LID, last features"] = np.concatenate([self._lid.score(batch.features) for batch in stream])
        evidence = self._evidence(head_pass)
        return found | {name: forest.strangeness(evidence) for name, forest in self._forests.items()}


def knowing(watch: Watch, pictures: Tensor, labels: Tensor) -> None:
    """An attacker who knows of the Mahalanobis distance: 40 steps against the loss and the alarm together."""
    detector, model = watch.detectors["mahalanobis"], watch.model
    means = torch.from_numpy(detector.classes_gaussian_.means)
    factor = torch.from_numpy(detector.classes_gaussian_.factor)
    seen: list[Tensor] = []
    handle = model.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    right = answers(model, pictures) == labels
    pictures, labels = pictures[right][:KNOWING], labels[right][:KNOWING]
    rows, clean = {}, watch.calibration()
    for size in (2, 4, 8):
        for weight in (0.0, 0.1, 1.0, 10.0):
            made = pictures.clone()
            for _ in range(40):
                made.requires_grad_(True)
                seen.clear()
                logits = model(made)
                distance = (((seen[0].double()[:, None] - means) @ factor) ** 2).sum(2).amin(1)
                goal = F.cross_entropy(logits, labels, reduction="sum") - weight * distance.div(64).sum()
                (step,) = torch.autograd.grad(goal, made)
                made = made.detach() + size / 255 / 8 * step.sign()
                made = (pictures + (made - pictures).clamp(-size / 255, size / 255)).clamp(0, 1)
            fooled = (answers(model, made) != labels).numpy()
            scores = watch.scores(made)
            cells = {"fooled": f"{fooled.mean():.2f} of {len(labels)}"}
            for name in ("mahalanobis", "vim", *watch._forests):
                alarm = goes_off(p_values(scores[name], clean[name]), 0.05)
                cells[f"unnoticed by {name}"] = interval(*_share(fooled & ~alarm))
            rows[f"{size}/255, weight of the alarm {weight:g}"] = cells
    handle.remove()
    markdown(
        pd.DataFrame(rows).T,
        "The attacker who knows: share that is seen wrong and raises no alarm at 5 % [95 % interval]",
    )


def _share(hits: Array) -> tuple[float, float, float]:
    low, high = wilson(int(hits.sum()), len(hits))
    return float(hits.mean()), low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.simplefilter("ignore")
    print(stamp("results.familiarity_attacks", "cpu"), flush=True)
    model, data = Networks().plain(0), images()
    watch = Watch(model, load("fashion_mnist").train, data["calibration"])
    made: dict[str, dict[str, Pairs]] = {}
    for name, attack in attacks(model).items():
        started = time.time()
        count = {"train": LEARN, "test": JUDGE} if attack_is_bounded(attack) else {"train": SLOW, "test": SLOW}
        made[name] = {
            part: pairs_of(
                model, attack, data[part].images[: count[part]].float() / 255, data[part].labels[: count[part]]
            )
            for part in count
        }
        told = made[name]["test"]
        print(f"- {name}: {len(told.place)} of {told.tried} fooled; {time.time() - started:.0f} s", flush=True)
    watch.learn("forest, all attacks", [parts["train"] for parts in made.values()])
    watch.learn("forest, PGD alone", [made[f"PGD-10, {size}/255"]["train"] for size in (2, 4, 8)])
    knowing(watch, data["test"].images[:400].float() / 255, data["test"].labels[:400])
    attack_by_attack(watch, {name: parts["test"] for name, parts in made.items()})


def attack_by_attack(watch: Watch, made: dict[str, Pairs]) -> None:
    clean = watch.calibration()
    auc: dict[str, dict[str, str]] = {}
    caught: dict[str, dict[str, str]] = {}
    noticed: dict[str, dict[int, list[bool]]] = {}
    for name, pairs in made.items():
        parts = {kind: watch.scores(getattr(pairs, kind)) for kind in ("clean", "noisy", "attacked")}
        for detector, scores in parts["attacked"].items():
            negatives = np.concatenate([parts["clean"][detector], parts["noisy"][detector]])
            truth = np.repeat([0, 1], [len(negatives), len(scores)])
            auc.setdefault(name, {})[detector] = f"{roc_auc_score(truth, np.r_[negatives, scores]):.3f}"
            alarm = goes_off(p_values(scores, clean[detector]), 0.05)
            caught.setdefault(name, {})[detector] = interval(*_share(alarm))
            for place, one in zip(pairs.place.tolist(), alarm.tolist(), strict=True):
                noticed.setdefault(detector, {}).setdefault(place, []).append(one)
    worst = {
        detector: interval(*_share(np.array([all(alarms) for alarms in images_.values()])))
        for detector, images_ in noticed.items()
    }
    count = len(next(iter(noticed.values())))
    markdown(pd.DataFrame(auc), "AUC: attacked images against clean and noisy ones")
    shown = pd.DataFrame(caught)
    shown[f"all attacks on an image ({count} images)"] = pd.Series(worst)
    markdown(
        shown, "Share noticed at 5 % false alarms [95 % interval]; last column: every attack that fooled is noticed"
    )


if __name__ == "__main__":
    main()
