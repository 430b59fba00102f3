"""Fit and split of a whole head: numbers for all classes, in tables. `ald_tree.py` shows one class of them.

C classes, K weights in each.
"""

import warnings
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_classfilters.core.errors import DegenerateFitWarning, NonFiniteError, OptionError, ShapeError, quoted
from captum_classfilters.splitting.laplace import AsymmetricLaplace, Floats, fit_mle
from captum_classfilters.splitting.stages import Ints, Side, split_sides

FITS = ("loglinear", "mle")
FIRST = ("zero", "mean")
BRANCHES = ("positive", "negative")


@dataclass(frozen=True, eq=False)
class Splits:
    """What is known of C classes.

    Attributes:
        weights: ``(C, K)``.
        targets: ``(C,)``, which classes these are.
        first: ``(C,)`` float64, the first threshold: 0, or the row's mean.
        zeros: ``(C,)``, weights that are exactly 0 and were dropped.
        positive: The nodes of what lies above the first threshold.
        negative: Of what lies below it.
        laplace: The fit by maximum likelihood; None where it was not asked for.
        likelihood: ``(C,)``, its log-likelihood.
        min_size: A node with fewer neurons is not split.
        layer: Name of the head.
    """

    weights: Tensor
    targets: tuple[int, ...]
    first: Floats
    zeros: Ints
    positive: Side
    negative: Side
    laplace: AsymmetricLaplace | None
    likelihood: Floats | None
    min_size: int
    layer: str

    def side(self, branch: str) -> Side:
        """The nodes of a branch."""
        if branch not in BRANCHES:
            raise OptionError(f'branch must be "positive" or "negative", got {branch!r}')
        return self.positive if branch == "positive" else self.negative

    def distances(self, branch: str) -> Tensor:
        """``(C, K)`` float64: how far each weight lies beyond the first threshold, on the branch's side positive."""
        away = self.weights.double() - torch.from_numpy(self.first)[:, None]
        # exact zeros belong to nobody, wherever the threshold is
        away = away if branch == "positive" else -away
        return away.masked_fill(self.weights == 0, -torch.inf)

    def depths(self, branch: str) -> Tensor:
        """``(C,)`` int64: stages of the branch; 0 where it is empty."""
        return torch.from_numpy((self.side(branch).size > 0).sum(1))

    def stages(self, branch: str) -> Tensor:
        """``(C, K)`` int64: the deepest stage that holds each neuron; 0: it is not in the branch."""
        away, side = self.distances(branch), self.side(branch)
        found = torch.zeros(away.shape, dtype=torch.int64)
        for stage in range(side.size.shape[1]):
            # NaN, where a class has no such stage, is below nothing
            found += away > torch.from_numpy(side.threshold[:, stage])[:, None]
        return found

    def deviations(self) -> Tensor:
        """``(C, K)`` float64: how far the logarithm of each weight lies from its side's line; 0 for exact zeros.

        Source: the paper's section VI, which proposes to prune what deviates and leaves the measure open.
        """
        found = torch.zeros(self.weights.shape, dtype=torch.float64)
        for branch in BRANCHES:
            away, side = self.distances(branch), self.side(branch)
            inside = away > 0
            order = away.argsort(1).argsort(1)
            size = inside.sum(1, keepdim=True)
            place = (order - (away.shape[1] - size)).double() / size
            slope, intercept = (torch.from_numpy(column[:, :1]) for column in (side.slope, side.intercept))
            line = slope.nan_to_num(0) * place + intercept
            logs = torch.where(inside, away, 1.0).log()
            found = torch.where(inside, (logs - line.nan_to_num(0)).abs(), found)
        return found


def split_weights(
    weights: Tensor,
    *,
    targets: tuple[int, ...] | None = None,
    fit: str = "loglinear",
    first_threshold: str = "zero",
    min_size: int = 20,
    layer: str = "unknown",
) -> Splits:
    """Fit and split every row.

    Source: "An interpretation of the final fully connected layer", Algorithm 1 and section IV. Differs as
    `stages.split_sides` and `laplace.fit_mle` say.

    Args:
        weights: ``(C, K)`` float32 or float64 on the CPU, finite.
        targets: Which classes the rows are; otherwise 0 to C - 1.
        fit: ``"loglinear"``: slope and intercept of each node. ``"mle"``: besides, location, rate and asymmetry of each
            row's asymmetric Laplace distribution.
        first_threshold: ``"zero"`` (the paper) or ``"mean"`` of the row (the published code); distances are from it.
        min_size: A node with fewer neurons is not split any more.
        layer: Name of the head.

    Raises:
        OptionError: An option is not among what it may be, or no row could be split.
        ShapeError: Not one row for each class.
        NonFiniteError: NaN or infinity among the weights.

    Warns:
        DegenerateFitWarning: Rows of alike numbers, to which no distribution can be fitted.
    """
    _check(weights, fit, first_threshold, min_size)
    # sorted as they are: float32 takes half the time
    ordered = np.sort(weights.detach().numpy(), axis=1).astype(np.float64)
    # NaN is sorted to the end
    if not np.isfinite(ordered[:, [0, -1]]).all():
        raise NonFiniteError("weights must be finite, got NaN or infinity; load a whole checkpoint")
    zeros = (ordered == 0).sum(1)
    if first_threshold == "mean":
        first = ordered.sum(1) / np.maximum(ordered.shape[1] - zeros, 1)
        away = ordered - first[:, None]
        # what is dropped must not come back as a distance
        away[ordered == 0] = 0
        away = np.sort(away, axis=1) if zeros.any() else away
    else:
        first, away = np.zeros(len(ordered)), ordered
    laplace, likelihood = fit_mle(ordered) if fit == "mle" else (None, None)
    known = tuple(range(len(weights))) if targets is None else targets
    if laplace is not None and np.isnan(laplace.location).any():
        rows = [known[row] for row in np.flatnonzero(np.isnan(laplace.location))]
        warnings.warn(
            f"classes {quoted(rows)} have no two different weights, so no distribution can be fitted: its parameters "
            'are NaN; fit="loglinear" needs none',
            DegenerateFitWarning,
            stacklevel=4,  # past `ALDSplitter.split`, to its caller
        )
    return Splits(weights, known, first, zeros, *split_sides(away, min_size), laplace, likelihood, int(min_size), layer)


def _check(weights: Tensor, fit: Any, first_threshold: Any, min_size: Any) -> None:
    if fit not in FITS:
        raise OptionError(f"fit must be one of {list(FITS)}, got {fit!r}")
    if first_threshold not in FIRST:
        raise OptionError(f"first_threshold must be one of {list(FIRST)}, got {first_threshold!r}")
    if isinstance(min_size, bool) or not isinstance(min_size, Integral) or int(min_size) < 2:
        raise OptionError(f"min_size must be an integer of at least 2, got {min_size!r}")
    if weights.dim() != 2 or not len(weights):
        raise ShapeError(f"weights must have shape (C, K), one row for each class; got {tuple(weights.shape)}")
    if weights.shape[1] < int(min_size):
        raise OptionError(
            f"the head has {weights.shape[1]} features, fewer than min_size={min_size}, so nothing would be split; "
            "pass a smaller min_size"
        )
