"""Run the benchmarks named, or all: ``python -m benchmarks [names...] [--device cpu|cuda] [--threads N]``."""

import argparse
from importlib import import_module

import torch

from benchmarks.lib.report import machine
from benchmarks.lib.workload import Settings

NAMES = (
    "attribute_speed", "memory", "grid", "import_time", "determinism", "head_speed", "refit_speed", "ranks_speed",
    "gate_speed", "path_speed", "split_speed", "compare_speed",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; none: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    parser.add_argument("--network", help="determinism: file of a trained SmallResNet; default: the packaged one")
    args = parser.parse_args()
    if unknown := sorted({*args.names} - {*NAMES}):
        parser.error(f"no benchmark is named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; leave --device out")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(machine(args.device))
    for name in args.names or NAMES:
        table = import_module(f"benchmarks.speed.{name}").run(Settings(args.device, args.network))
        print(f"\n{table}", flush=True)


if __name__ == "__main__":
    main()
