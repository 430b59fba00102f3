"""Heads whose weights are all 1: which channels each class reads, alone or from a set that all classes share.

S channels shared by all C classes, each of which reads k of them. Everything follows from correlations.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from captum_classfilters.class_filters import check_k
from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import OptionError
from captum_classfilters.heads.moments import HeadMoments

# More decisions than this, and an exact assignment does not end
_EXACT_CELLS = 2**12
# Seconds after which the solver gives the best that it has, if that is proved to be this near to the best there is
_SOLVER_SECONDS, _SOLVER_GAP = 120.0, 1e-6


class BinaryRefitter:
    """Weights of 1 on standardised features; of the features themselves ``1 / deviation``, alike in all classes.

    Source: Norrenbrock et al., "QPM: Discrete Optimization for Globally Interpretable Image Classification", ICLR 2025:
    every class reads k of S shared features with weights of 1; S and the assignment maximise correlation with the class
    less correlation among the features. Differs from the paper: greedy, or exact by SciPy's HiGHS, where the paper
    needs a commercial solver; no fine-tuning follows.

    Args:
        moments: Moments by class of the head's input.
        shared: S, or None: each class chooses from all channels.
        exact: The best choice for this goal instead of the greedy one; small heads only.
    """

    def __init__(self, moments: HeadMoments, shared: int | None = None, exact: bool = False) -> None:
        self._correlation = moments.class_correlation
        if shared is not None:
            integer(shared, "shared", 1, moments.num_features)
        self._shared, self._exact = shared, exact
        covariance = moments.covariance
        variance = covariance.diagonal()
        usable = variance > 1e-12 * moments.second.diagonal() / moments.count
        self._inverse = torch.where(usable, variance.clamp(min=1e-300).rsqrt(), 0.0)
        self._alike = covariance * torch.outer(self._inverse, self._inverse)
        self._mean = moments.mean

    def fit(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights ``(C, k)``, biases ``(C,)`` and ridges, all 0."""
        weight = self._inverse.to(indices.device)[indices]
        bias = -(weight * self._mean.to(indices.device)[indices]).sum(1)
        return weight, bias, torch.zeros_like(bias)

    def pursue(self, k: int) -> Tensor:
        """Channels of each class, ``(C, k)``, that of highest correlation first."""
        check_k(k, self._correlation.shape[1], "k")
        if self._shared is None:
            return self._correlation.argsort(stable=True, dim=1, descending=True)[:, :k]
        if k > self._shared:
            raise OptionError(f"k={k} channels for each class cannot come from shared={self._shared}; raise shared")
        if self._exact:
            return exact_assignment(self._correlation, self._alike, k, self._shared)
        pool = greedy_pool(self._correlation, self._alike, k, self._shared)
        return _best_of(self._correlation, pool, k)


def shared_value(correlation: Tensor, alike: Tensor, indices: Tensor, pool: Tensor) -> float:
    """What the choice maximises: correlations of the classes with their channels, less squares among the pool.

    ``sum over c, j in J_c of r_cj  -  C k / (S (S - 1)) * sum over i != j in the pool of alike_ij^2``.

    Args:
        correlation: ``(C, K)``, of the channels with the classes.
        alike: ``(K, K)``, of the channels with one another.
        indices: ``(C, k)``.
        pool: ``(S,)``.
    """
    among = alike[pool][:, pool].square()
    redundancy = among.sum() - among.diagonal().sum()
    return float(correlation.gather(1, indices).sum() - _price(len(indices), indices.shape[1], len(pool)) * redundancy)


def _price(classes: int, k: int, shared: int) -> float:
    return classes * k / max(1, shared * (shared - 1))


def greedy_pool(correlation: Tensor, alike: Tensor, k: int, shared: int) -> Tensor:
    """S channels, one by one that which adds most to `shared_value`, ``(S,)``."""
    classes, channels = correlation.shape
    price = 2 * _price(classes, k, shared)
    best = correlation.new_full((classes, k), -1.0)  # of each class, the k highest correlations so far
    redundancy, free = correlation.new_zeros(channels), torch.ones(channels, dtype=torch.bool)
    pool: list[int] = []
    for _ in range(shared):
        gain = (correlation - best[:, -1:]).clamp(min=0).sum(0) - price * redundancy
        chosen = int(gain.masked_fill(~free, -torch.inf).argmax())
        pool.append(chosen)
        free[chosen] = False
        redundancy = redundancy + alike[chosen].square()
        best = torch.cat([best, correlation[:, chosen, None]], 1).sort(1, descending=True).values[:, :k]
    return torch.tensor(pool)


def _best_of(correlation: Tensor, pool: Tensor, k: int) -> Tensor:
    pool = pool.sort().values
    return pool[correlation[:, pool].argsort(stable=True, dim=1, descending=True)[:, :k]]


def exact_assignment(correlation: Tensor, alike: Tensor, k: int, shared: int) -> Tensor:
    """The choice of highest `shared_value`, by a mixed-integer program, ``(C, k)``.

    Raises:
        OptionError: The head is too large, or the solver did not end in two minutes.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    classes, channels = correlation.shape
    # pairs that count: squares below this change nothing that one can see
    pairs = [(i, j) for i, j in itertools.combinations(range(channels), 2) if abs(float(alike[i, j])) > 1e-6]
    cells = classes * channels
    if cells + len(pairs) > _EXACT_CELLS:
        raise OptionError(
            f"an exact choice among {classes} x {channels} weights and {len(pairs)} pairs of channels has more than "
            f"{_EXACT_CELLS} unknowns; use exact=False, the greedy choice"
        )
    # unknowns: class c reads channel j; channel j is in the pool; both of a pair are
    size = cells + channels + len(pairs)
    among = np.array([float(alike[pair]) ** 2 for pair in pairs])
    price = 2 * _price(classes, k, shared)
    goal = np.concatenate([-correlation.double().numpy().ravel(), np.zeros(channels), price * among])
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    low: list[float] = []
    high: list[float] = []

    def constrain(terms: list[tuple[int, float]], least: float, most: float) -> None:
        rows.extend([len(low)] * len(terms))
        columns.extend(column for column, _ in terms)
        values.extend(value for _, value in terms)
        low.append(least)
        high.append(most)

    for c in range(classes):
        constrain([(c * channels + j, 1.0) for j in range(channels)], k, k)
        for j in range(channels):
            constrain([(c * channels + j, 1.0), (cells + j, -1.0)], -np.inf, 0)
    constrain([(cells + j, 1.0) for j in range(channels)], shared, shared)
    for place, (i, j) in enumerate(pairs):
        constrain([(cells + i, 1.0), (cells + j, 1.0), (cells + channels + place, -1.0)], -np.inf, 1)
    matrix = coo_array((values, (rows, columns)), shape=(len(low), size))
    whole = np.concatenate([np.zeros(cells), np.ones(channels), np.zeros(len(pairs))])
    result = milp(
        goal,
        integrality=whole,
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        options={"time_limit": _SOLVER_SECONDS, "mip_rel_gap": _SOLVER_GAP},
    )
    if not result.success:
        raise OptionError(f"the exact choice did not end ({result.message}); use exact=False, the greedy choice")
    pool = torch.from_numpy(np.flatnonzero(result.x[cells : cells + channels] > 0.5))
    return _best_of(correlation, pool, k)
