"""What detection costs: an alarm beside the forward pass, pairs beside the attack, critical paths in batches.

python -m benchmarks.speed.detection_speed --threads 1
"""

import argparse
from functools import partial

import torch
from captum.robust import FGSM
from sklearn.ensemble import AdaBoostClassifier, HistGradientBoostingClassifier, RandomForestClassifier

from benchmarks.lib.baselines import critical_paths
from benchmarks.lib.report import Table, machine
from benchmarks.lib.timing import interleaved, ratio
from benchmarks.results.detection_pairs import LOSS, network, pgd
from captum_classfilters import PathDetector, PathOutlierDetector, adversarial_paths
from captum_classfilters.assets import load_images
from captum_classfilters.attacks import Attack

EPSILON = 4 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decoupler = network()
    pairs = adversarial_paths(decoupler, load_images("train").batches(), Attack(FGSM(decoupler, LOSS, 0, 1), EPSILON))
    X, y, _ = pairs.stack()
    table = Table("Detection: times, as ratios of one run")
    detectors = {
        "random forest of 100": PathDetector(RandomForestClassifier(random_state=0)),
        "AdaBoost of 50": PathDetector(AdaBoostClassifier(random_state=0)),
        "gradient boosting of 100": PathDetector(HistGradientBoostingClassifier(random_state=0)),
    }
    fitted = {name: detector.fit(X, y) for name, detector in detectors.items()}
    fitted["outlier"] = PathOutlierDetector().fit(pairs.clean)
    images = load_images("test").images.float() / 255
    for size in (32, 128, 500):
        batch = images[:size]
        paths = decoupler.paths(batch)
        for name, detector in fitted.items():
            detector.calibrate(pairs.clean)
            runs = {"forward": partial(plain, decoupler, batch), "alarm": partial(detector.alarms, paths)}
            found = ratio(interleaved(runs, options.repeats, 2), "alarm", "forward")
            table.add(f"alarm of {size} images / forward, {name}", str(found), found.value, 0.2)
        asked = partial(asked_of_images, fitted["gradient boosting of 100"], decoupler, batch)
        found = ratio(
            interleaved({"forward": partial(plain, decoupler, batch), "asked": asked}, options.repeats, 2),
            "asked",
            "forward",
        )
        table.add(f"alarms(paths(x)), x of {size} / forward, gradient boosting", str(found))
    building(table, decoupler, images, max(3, options.repeats // 5))
    critical(table, decoupler, images)
    print(table)
    print(f"\n<!-- python -m benchmarks.speed.detection_speed --threads {options.threads}; {machine('cpu')} -->")


def building(table: Table, decoupler, images: torch.Tensor, repeats: int) -> None:
    """All of `adversarial_paths` beside the attack alone and two forwards (three with noise)."""
    sample = load_images("test")
    batch = [(images[:200], sample.labels[:200])]
    with torch.no_grad():
        right = decoupler(images[:200]).argmax(1) == sample.labels[:200]
    attack, steps = pgd(decoupler), {"step_num": 10, "step_size": EPSILON / 4}

    def alone() -> None:
        plain(decoupler, images[:200])
        given = images[:200][right].clone().requires_grad_()
        plain(decoupler, attack.perturb(given, radius=EPSILON, target=sample.labels[:200][right], **steps).detach())

    runs = {"alone": alone, "whole": partial(adversarial_paths, decoupler, batch, Attack(attack, EPSILON, **steps))}
    found = ratio(interleaved(runs, repeats), "whole", "alone")
    table.add("adversarial_paths / (PGD-10 + two forwards)", str(found), found.value, 1.15)
    table.notes.append("adversarial_paths also runs the noisy twins: a third forward, of the images that were fooled")


def critical(table: Table, decoupler, images: torch.Tensor) -> None:
    for size in (32, 250):
        runs = {
            "batch": partial(critical_paths, decoupler, images[:size], size),
            "loop": partial(critical_paths, decoupler, images[:8], 1),
        }
        found = ratio(interleaved(runs, 3), "loop", "batch")
        faster = found.value * size / 8
        title = f"critical paths, image by image / in batches of {size}"
        table.add(title, f"{faster:.1f}", faster, 20.0, at_least=True)


def asked_of_images(detector, decoupler, images: torch.Tensor) -> None:
    detector.alarms(decoupler.paths(images))


def plain(decoupler, images: torch.Tensor) -> None:
    with torch.no_grad():
        decoupler(images)


if __name__ == "__main__":
    main()
