"""Train networks by name, those that ship and those that only a published figure needs, and put them into a folder.

    python tutorials/recipes/make_networks.py resnet20_lsg_s1 vgg_decoupled_s0 kanji_resnet14 --to networks

A name is NETWORK_METHOD_sSEED. NETWORK is resnet20, vgg or inception. METHOD is

- lsg: the plain network of that seed trained on with a gate; tuned, its control: trained on the same way without one;
- lsg_scratch: with a gate from the start, after five plain epochs; lsg_noise: as the paper, with a gate that began as
  noise; fixed_gate;
- decoupled, decoupled_paper (eq. 12), decoupled_r0 (eq. 12, target rate 0).

A plain network has none. ``kanji_resnet14`` is the network of ``kanji.py``. The folder
then has what `captum_classfilters.assets.load_network` reads, with the gate as ``gate_*`` and the controllers of paths
as ``paths_*`` beside it. Other options, such as ``--device cuda`` or ``--precision float32``, go to every training.
A training that was stopped resumes; one that is finished is not run again.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from captum_classfilters import PathDecoupler, assets, metrics

RECIPES = Path(__file__).parent
SCRIPT = "train_fashion_mnist.py"
# For decoupled networks: largest mean cross-entropy of the class from gates, smallest share of dynamic filters
LARGEST_ENTROPY, SMALLEST_DYNAMIC = 1.8, 0.3
METHODS = "lsg|tuned|lsg_scratch|lsg_noise|fixed_gate|decoupled|decoupled_paper|decoupled_r0"
NAME = re.compile(rf"(resnet20|vgg|inception)(?:_({METHODS}))?_s(\d+)")


class Training(NamedTuple):
    """One call of a recipe: the script, its options, and the name of its folder under ``--runs``."""

    script: str
    options: tuple[str, ...]
    run: str


def trainings(name: str, runs: Path) -> list[Training]:
    """What has to be run, in order; the last one makes the network called ``name``."""
    if name == "kanji_resnet14":
        return [Training("kanji.py", (), "kanji-s0")]
    parsed = NAME.fullmatch(name)
    if parsed is None:
        raise SystemExit(
            f"no recipe for {name!r}; expected kanji_resnet14 or NETWORK_METHOD_sSEED such as resnet20_s1, "
            "resnet20_lsg_s1, resnet20_tuned_s1, resnet20_fixed_gate_s0, resnet20_decoupled_s0, vgg_decoupled_s0"
        )
    network, method, seed = parsed[1], parsed[2] or "std", parsed[3]
    run = _run_name(network, method, seed)
    if method in ("std", "lsg_scratch", "lsg_noise", "fixed_gate"):
        kind = () if network == "resnet20" else ("--network", network, "--epochs", "8")
        way: tuple[str, ...] = {
            "std": (),
            "lsg_scratch": ("--method", "lsg", "--warmup", "5"),
            # Algorithm 1, as the paper has it
            "lsg_noise": ("--method", "lsg", "--gate-start", "noise", "--scheme", "alternating", "--ablation", "0"),
            "fixed_gate": ("--method", "fixed-gate", "--scheme", "alternating", "--ablation", "0"),
        }[method]
        return [Training(SCRIPT, (*kind, *way, "--seed", seed), run)]
    plain = assets.network_name(int(seed), "std", network)
    shipped = Path(assets.__file__).parent / f"{plain}.safetensors"
    before = [] if shipped.is_file() else trainings(plain, runs)
    start = ("--from", str(runs / before[-1].run / "network.safetensors" if before else shipped), "--seed", seed)
    if method in ("lsg", "tuned"):
        way = ("--method", "lsg") if method == "lsg" else ("--method", "std")
        few = ("--epochs", "6", "--lr", "0.02", "--images-per-epoch", "12000")
        return [*before, Training(SCRIPT, (*way, *start, *few), run)]
    if method == "decoupled":
        way = ("--epochs", "18", "--lr", "0.1", "--target-rate", "0.51")
        return [*before, Training(SCRIPT, ("--method", "decoupled", *start, *way), run)]
    decoupled = Training(
        SCRIPT,
        (
            "--method", "decoupled", "--recipe", "paper", *start, "--epochs", "6", "--lr", "0.05",
            "--information-weight", "1" if network == "vgg" else "0.3",
            "--target-rate", "0" if method == "decoupled_r0" else "0.5",
        ),
        run,
    )  # fmt: skip
    settling = (
        "--method", "settled", "--from", str(runs / run / "network.safetensors"), "--epochs", "2", "--lr", "0.02",
        "--seed", seed,
    )  # fmt: skip
    return [*before, decoupled, Training(SCRIPT, settling, run.replace("decoupled", "settled"))]


def _run_name(network: str, method: str, seed: str) -> str:
    """Folders are called as in ``benchmarks/results``: resnet20-s0, lsg-s0, decoupled-s0, decoupled-vgg-s0."""
    if method == "std":
        return f"{network}-s{seed}"
    short = {"fixed_gate": "fixed"}.get(method, method.replace("_", "-"))
    return f"{short}-s{seed}" if network == "resnet20" else f"{short}-{network}-s{seed}"


def make(name: str, folder: Path, runs: Path, further: Sequence[str] = (), *, check: bool = True) -> Path:
    """Train what is not trained yet, and copy the network called ``name``, with its gate or paths, into ``folder``."""
    steps = trainings(name, runs)
    for training in steps:
        run = runs / training.run
        if (run / "network.safetensors").is_file():
            continue
        command = [sys.executable, RECIPES / training.script, *training.options, "--out", run, *further]
        print(" ".join(map(str, command[1:])), flush=True)
        status = subprocess.run([*map(str, command)]).returncode
        if status:
            raise SystemExit(status)
    run = runs / steps[-1].run
    paths, gate = run / "paths.safetensors", run / "gate.safetensors"
    if check and paths.is_file():
        check_paths(run)
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}.safetensors"
    shutil.copyfile(run / "network.safetensors", made)
    if paths.is_file():
        shutil.copyfile(paths, folder / f"paths_{name}.safetensors")
    if gate.is_file():
        shutil.copyfile(gate, folder / f"{name.replace('resnet20', 'gate')}.safetensors")
    print(f"{made}: test accuracy {assets.load_network(made)[1]['test_accuracy']:.4f}", flush=True)
    return made


def check_paths(run: Path) -> None:
    """Refuse a training whose gates are the same for every image: judged by images of the training set."""
    decoupler = (
        PathDecoupler(assets.load_network(run / "network.safetensors")[0]).load(run / "paths.safetensors").eval()
    )
    with torch.inference_mode():
        paths = decoupler.paths(assets.load_images("train").batches())
    information = metrics.path_information(decoupler, paths).query("not control").set_index("layer")
    entropy = information.cross_entropy["all"]
    states = paths.states()
    dynamic = states.dynamic.sum() / states.channels.sum()
    print(f"{run.name}: cross-entropy of gates {entropy:.3f}, dynamic filters {dynamic:.3f}")
    if entropy > LARGEST_ENTROPY or dynamic < SMALLEST_DYNAMIC:
        raise SystemExit(
            f"{run}: the training failed: expected a cross-entropy of at most {LARGEST_ENTROPY} and at least "
            f"{SMALLEST_DYNAMIC} dynamic filters; train with a larger --information-weight"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="such as resnet20_lsg_s1")
    parser.add_argument("--to", type=Path, default=Path("networks"), help="folder for the networks (default: networks)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the trainings (default: runs)")
    parser.add_argument("--unchecked", action="store_true", help="copy decoupled networks whatever their gates say")
    options, further = parser.parse_known_args()
    for name in options.names:
        trainings(name, options.runs)  # refuses a wrong name before any training
    for name in options.names:
        make(name, options.to, options.runs, further, check=not options.unchecked)


if __name__ == "__main__":
    main()
