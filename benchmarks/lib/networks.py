"""Trained networks for the published tables: those that ship, and others from a folder that a recipe made."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from captum_classfilters import LabelSensitiveGate, PathDecoupler, assets

PACKAGE = Path(assets.__file__).parent


def add_networks_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks",
        type=Path,
        help="folder of tutorials/recipes/make_networks.py, for networks that do not ship",
    )


class Networks:
    """Finds networks by seed and method in ``folder``, then among those that ship."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def plain(self, seed: int = 0, method: str = "std", network: str = "resnet20") -> nn.Module:
        return assets.load_network(self._file(assets.network_name(seed, method, network)))[0]

    def gate(self, seed: int, method: str) -> LabelSensitiveGate:
        name = assets.network_name(seed, method)
        return LabelSensitiveGate.load(self._file(name, name.replace("resnet20", "gate")))

    def decoupled(self, seed: int = 0, method: str = "decoupled", network: str = "resnet20") -> PathDecoupler:
        name = assets.network_name(seed, method, network)
        decoupler = PathDecoupler(assets.load_network(self._file(name))[0])
        return decoupler.load(self._file(name, f"paths_{name}")).eval()

    def kanji(self) -> nn.Module:
        return assets.load_network(self._file("kanji_resnet14"))[0]

    def _file(self, network: str, stem: str | None = None) -> Path:
        """The file of that stem (default: the network's own)."""
        folders: Sequence[Path] = [*([] if self._folder is None else [self._folder]), PACKAGE]
        for folder in folders:
            if (path := folder / f"{stem or network}.safetensors").is_file():
                return path
        target = self._folder or Path("networks")
        raise SystemExit(
            f"{stem or network}.safetensors does not ship and is not in --networks; train it by "
            f"python tutorials/recipes/make_networks.py {network} --to {target}, and give --networks {target}"
        )
