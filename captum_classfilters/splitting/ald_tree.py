"""`ALDTree`: how one class's weights are split, node by node."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from captum_classfilters.core.check import integer, number
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.files import checked_tensor, contents, read, text, write
from captum_classfilters.splitting.laplace import AsymmetricLaplace
from captum_classfilters.splitting.splits import BRANCHES, Side, Splits

_KIND, _VERSION = "ALDTree", 1
_SIGN = {"positive": "+", "negative": "-"}


@dataclass(frozen=True)
class ALDNode:
    """A set of neurons of one class: those whose weights lie beyond ``threshold``.

    Attributes:
        name: ``"+1"``, ``"+2"``, ... on the positive side, ``"-1"``, ... on the negative: as in the paper's figure 5.
        size: How many neurons.
        threshold: Distance from the first threshold that they exceed.
        mean: Of their distances; the next node has what exceeds it.
        slope: a of the line ``log(distance) = a * i / size + b``.
        intercept: b.
        r2: Of that line; NaN where all distances are alike.
    """

    name: str
    size: int
    threshold: float
    mean: float
    slope: float
    intercept: float
    r2: float


class ALDTree:
    """How one class's final-layer weights are split; `ALDSplitter.split` makes it.

    Example:
        >>> import torch
        >>> from captum_classfilters.splitting.splits import split_weights
        >>> weights = torch.tensor([[-3.0, -1.0, 1.0, 2.0, 3.0, 8.0]])
        >>> tree = ALDTree(split_weights(weights, min_size=3), 0)
        >>> print(tree)
        class 0: 6 weights of layer 'unknown'
        +1     4 neurons > 0      slope 2.66  R2 .97
          +2   1 neurons > 3.5    terminal
        -1     2 neurons < 0      slope 2.2  R2 1.00  terminal
        >>> tree.terminal("positive")
        tensor([5])
    """

    def __init__(self, splits: Splits, row: int) -> None:
        self._splits, self._row = splits, row

    @property
    def target(self) -> int:
        """Which class."""
        return self._splits.targets[self._row]

    @property
    def layer(self) -> str:
        """Name of the head."""
        return self._splits.layer

    @property
    def weights(self) -> Tensor:
        """``(K,)``, the class's weights."""
        return self._splits.weights[self._row]

    @property
    def zeros(self) -> int:
        """Weights that are exactly 0 and belong to no node."""
        return int(self._splits.zeros[self._row])

    @property
    def first_threshold(self) -> float:
        """Where the two sides part."""
        return float(self._splits.first[self._row])

    @property
    def min_size(self) -> int:
        """A node with fewer neurons is not split."""
        return self._splits.min_size

    @property
    def laplace(self) -> AsymmetricLaplace | None:
        """The distribution fitted by maximum likelihood, ``(1,)`` each; None where it was not asked for."""
        fitted = self._splits.laplace
        return None if fitted is None else AsymmetricLaplace(*(part[self._row : self._row + 1] for part in fitted))

    @property
    def nodes(self) -> dict[str, ALDNode]:
        """All nodes by name, positive side first, each side from the outside in."""
        return {
            node.name: node for branch in BRANCHES for node in map(self._node, *self._names(branch)) if node is not None
        }

    def channels(self, name: str) -> Tensor:
        """The neurons of a node, strongest first; 1-D int64.

        Raises:
            OptionError: There is no such node.
        """
        branch = self._branch_of(name)
        away = self._splits.distances(branch)[self._row]
        threshold = float(self._splits.side(branch).threshold[self._row, int(name[1:]) - 1])
        ranked = away.sort(descending=True, stable=True)
        return ranked.indices[ranked.values > threshold]

    def terminal(self, branch: str) -> Tensor:
        """The neurons of a side's last node, strongest first: the most discriminative, or the most confusing ones.

        Args:
            branch: ``"positive"`` or ``"negative"``.

        Returns:
            1-D int64; empty where the class has no weights on that side.
        """
        depth = self.depth(branch)
        return self.channels(f"{_SIGN[branch]}{depth}") if depth else torch.zeros(0, dtype=torch.int64)

    def depth(self, branch: str) -> int:
        """Stages of a side; 0 where the class has no weights there."""
        return int((self._splits.side(branch).size[self._row] > 0).sum())

    def __repr__(self) -> str:
        return f"ALDTree(class {self.target}, {len(self.weights)} weights, nodes {', '.join(self.nodes)})"

    def __str__(self) -> str:
        dropped = f", {self.zeros} of them 0 and dropped" if self.zeros else ""
        lines = [f"class {self.target}: {len(self.weights)} weights of layer {self.layer!r}{dropped}"]
        for branch in BRANCHES:
            depth = self.depth(branch)
            for stage, node in enumerate(list(map(self._node, *self._names(branch))), 1):
                lines.append(self._line(node, stage, stage == depth))
            if not depth:
                lines.append(f"no weights on the {branch} side")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tree to a safetensors file; whole or not at all."""
        tensors = {"weights": self.weights[None].contiguous()}
        row = slice(self._row, self._row + 1)
        for branch in BRANCHES:
            for name, column in zip(Side._fields, self._splits.side(branch), strict=True):
                tensors[f"{branch} {name}"] = torch.from_numpy(column[row].copy())
        if self._splits.laplace is not None and self._splits.likelihood is not None:
            columns = (*self._splits.laplace, self._splits.likelihood)
            tensors["laplace"] = torch.from_numpy(np.stack([column[row] for column in columns]))
        # numbers in full: JSON's are float64's shortest form
        about = {
            "target": self.target,
            "first": self.first_threshold,
            "zeros": self.zeros,
            "min_size": self.min_size,
            "layer": self.layer,
        }
        write(path, tensors, kind=_KIND, version=_VERSION, meta=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ALDTree":
        """Read what `save` wrote; runs no code of the file.

        Raises:
            FileNotFoundError: No such file.
            FileFormatError: Broken, truncated, foreign, or not a tree.
        """
        tensors, about = read(path, kind=_KIND, version=_VERSION)
        with contents(path, "a whole tree"):
            channels = tensors["weights"].shape[-1]
            weights = checked_tensor(tensors, "weights", None, 1, channels)
            positive, negative = (_side(tensors, branch, channels) for branch in BRANCHES)
            fitted = checked_tensor(tensors, "laplace", torch.float64, 4, 1).numpy() if "laplace" in tensors else None
            return cls(
                Splits(
                    weights,
                    (integer(about["target"], "target", 0, 2**62),),
                    np.array([number(about["first"], "first")], np.float64),
                    np.array([integer(about["zeros"], "zeros", 0, channels)], np.int64),
                    positive,
                    negative,
                    None if fitted is None else AsymmetricLaplace(*fitted[:3]),
                    None if fitted is None else fitted[3],
                    integer(about["min_size"], "min_size", 0, 2**62),
                    text(about["layer"], "layer"),
                ),
                0,
            )

    def _names(self, branch: str) -> tuple[list[str], list[int]]:
        stages = range(1, self.depth(branch) + 1)
        return [branch] * len(stages), list(stages)

    def _node(self, branch: str, stage: int) -> ALDNode:
        side = self._splits.side(branch)
        numbers = {field.name: getattr(side, field.name)[self._row, stage - 1].item() for field in fields(ALDNode)[1:]}
        return ALDNode(f"{_SIGN[branch]}{stage}", **numbers)

    def _line(self, node: ALDNode, stage: int, last: bool) -> str:
        beyond = self.first_threshold + (node.threshold if node.name[0] == "+" else -node.threshold)
        sign, indented = (">" if node.name[0] == "+" else "<"), "  " * (stage - 1) + node.name
        parts = [f"{indented:<6} {node.size} neurons {sign} {beyond:<6.3g}"]
        if np.isfinite(node.r2):
            parts.append(f"slope {node.slope:.3g}  R2 {node.r2:.2f}".replace("R2 0.", "R2 ."))
        return "  ".join([*parts, "terminal"] if last else parts)

    def _branch_of(self, name: str) -> str:
        names = list(self.nodes)
        if name not in names:
            raise OptionError(
                f"the tree of class {self.target} has no node {name!r}; its nodes are: {', '.join(names)}"
            )
        return "positive" if name.startswith("+") else "negative"


def _side(tensors: Mapping[str, Tensor], branch: str, channels: int) -> Side:
    """One side's nodes, as a file has them: sizes that fall from stage to stage, floats beside them."""
    sizes = tensors[f"{branch} size"]
    stages = sizes.shape[-1]
    if stages > channels:
        raise ValueError(f"the {branch} side has {stages} stages for {channels} weights")
    checked_tensor(tensors, f"{branch} size", torch.int64, 1, stages)
    if bool((sizes > channels).any()) or bool((sizes.diff() > 0).any()):
        raise ValueError(f"the sizes of the {branch} side must fall from at most {channels}")
    for name in Side._fields[1:]:
        values = tensors[f"{branch} {name}"]
        # NaN is what a line through equal distances has for r2
        if values.dtype != torch.float64 or values.shape != sizes.shape:
            raise ValueError(
                f"the tables do not fit together: {branch} {name} must be float64 of shape {tuple(sizes.shape)}"
            )
    return Side(*(tensors[f"{branch} {name}"].numpy() for name in Side._fields))
