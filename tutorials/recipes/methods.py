"""Which way of training the command line asks for."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from decoupled import Decoupled, Pruned, Settled, add_path_arguments, told_by_paths
from gated import GATE_OPTIONS, Gated, add_gate_arguments
from training import Standard

PLAIN_OR_GATED = ("std", "lsg", "fixed-gate")
# These begin with a trained network
FROM_TRAINED = ("decoupled", "settled", "l1")
_KINDS = {"lsg": Gated, "fixed-gate": Gated, "decoupled": Decoupled, "settled": Settled, "l1": Pruned}


def add_method_arguments(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    help_text = "lsg: with a gate before the head that is trained as well; decoupled: with gates for each image"
    parser.add_argument("--method", default="std", choices=methods, help=help_text)
    add_gate_arguments(parser)
    if "decoupled" in methods:
        add_path_arguments(parser)


def method_of(options: argparse.Namespace) -> Any:
    """What `training.train` takes."""
    return Standard if options.method == "std" else partial(_KINDS[options.method], options=options)


def told_by(options: argparse.Namespace) -> dict[str, Any]:
    """What the network's file says of the method."""
    about: dict[str, Any] = {"method": options.method}
    if options.method == "lsg":
        about |= {name: getattr(options, name) for name in GATE_OPTIONS}
    if options.method in FROM_TRAINED:
        about |= told_by_paths(options)
    return about
