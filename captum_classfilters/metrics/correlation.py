"""How alike are filters? Correlation of each two, and of the filters that different classes use.

Two kinds, never mixed: of the weights, as in the paper, and of the activations. K channels, C classes, N samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import check_k
from captum_classfilters.core.borrow import Borrowed, borrowed, unwrap
from captum_classfilters.core.check import one_of, some_of
from captum_classfilters.core.control import Control, random_masks
from captum_classfilters.core.errors import HeadError, OptionError
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.core.intervals import draws_interval

KINDS = ("weights", "activations")
_FILTERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(10))


def filter_correlation(
    model: Any,
    loader: Iterable[Any] | None = None,
    *,
    kind: str = "weights",
    conv: nn.Module | str | None = None,
    layer: nn.Module | str | None = None,
) -> pd.DataFrame:
    """Correlation of each two filters: of their weights, or of what they give.

    Source: "Training interpretable CNNs towards class-specific filters", section 4.4 and figure 7: the inner product of
    two filters' weights. Differs: each filter's weights are first brought to length 1, without which a threshold means
    nothing; also the activations, named apart. `correlated_share` sets the matrix beside its control.

    Args:
        model: The network; borrowed. Or a `HeadPass`; then ``loader`` and ``layer`` are left out. One that is cached
            runs no convolution, so it has the kind ``"activations"`` only.
        loader: Batches of inputs, or ``(inputs, labels)``; for ``"weights"`` only the first is read.
        kind: ``"weights"``: of the last convolution or Linear with K outputs that runs before the head. In a ResNet
            the head's channels are the sum of this convolution and a shortcut, so it is a part of each channel.
            ``"activations"``: Pearson's correlation, over samples, of the head's input.
        conv: That convolution or Linear, or its name, if another is meant.
        layer: The head, if it cannot be found.

    Returns:
        ``K x K``; index and columns are named ``"channel"``. A filter of zeros, or one that never varies, has
        correlation 0 with others and 1 with itself. ``attrs``: ``kind``, ``layer`` and ``dimension``, the length of the
        vectors that are compared: weights of a filter, or samples less one.

    Raises:
        HeadError: No layer with K outputs runs before the head, or ``conv`` did not.
        OptionError: ``kind`` or ``conv`` is not one that can be, or there are fewer than two samples.
    """
    head_pass = HeadPass.of(model, loader, layer)
    one_of(kind, "kind", KINDS)
    correlation = _collect(head_pass, [kind], conv, "filter_correlation").correlations[kind]
    channels = pd.RangeIndex(len(correlation.matrix), name="channel")
    frame = pd.DataFrame(correlation.matrix, index=channels, columns=channels)
    frame.attrs.update(kind=kind, layer=correlation.layer, dimension=correlation.dimension)
    return frame


def correlated_share(
    correlation: pd.DataFrame | Mapping[Any, pd.DataFrame],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    dimension: int | None = None,
) -> pd.DataFrame:
    """Share of filter pairs with a correlation above each threshold, beside that of random filters.

    Source: "Training interpretable CNNs towards class-specific filters", figure 7e. The paper does not say whether the
    diagonal counts; here it does not: a filter with itself says nothing.

    Args:
        correlation: What `filter_correlation` gave, or several by name.
        thresholds: Each in ``[-1, 1)``.
        dimension: Length of the vectors behind the matrix; None: what `filter_correlation` wrote into its ``attrs``.

    Returns:
        One row for each matrix and threshold: ``correlation``, ``threshold``, ``control``, ``share``, ``low``, ``high``
        (jackknife that leaves out one filter at a time, for pairs share filters), ``pairs``. Behind these rows the same
        with ``control`` True, for each matrix its own: ``share`` of independent directions (Gaussian vectors) of the
        same dimension, exactly; ``low``, ``high``: the central 95 % of a matrix of such directions.

    Raises:
        OptionError: A matrix is not square with at least two filters, a threshold is out of range, or the dimension is
            unknown.
    """
    if not isinstance(correlation, Mapping):
        correlation = {getattr(correlation, "attrs", {}).get("kind", "given"): correlation}
    limits = np.asarray(thresholds, float)
    if limits.ndim != 1 or not len(limits) or not ((limits >= -1) & (limits < 1)).all():
        raise OptionError(f"thresholds must be a list of numbers in [-1, 1), got {thresholds!r}")
    frames, controls = [], []
    for name, matrix in correlation.items():
        values = np.asarray(matrix, float)
        if values.ndim != 2 or values.shape[0] != values.shape[1] or len(values) < 2:
            raise OptionError(
                f"correlation {name!r} must be a K x K matrix of at least two filters, got shape {values.shape}; "
                "pass what filter_correlation gives"
            )
        size = dimension if dimension is not None else getattr(matrix, "attrs", {}).get("dimension")
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise OptionError(
                f"the control needs the length of the vectors behind correlation {name!r}, got {size!r}; pass "
                "dimension=: weights of one filter, or samples less one"
            )
        share, low, high = pair_interval((values > limits[:, None, None]).astype(float))
        pairs = len(values) * (len(values) - 1) // 2
        chance = _chance_above(limits, int(size))
        # indicators of two pairs of independent directions are independent, even where they share one
        half = 1.96 * np.sqrt(chance * (1 - chance) / pairs)
        place = {"correlation": str(name), "threshold": limits, "control": False}
        frames.append(
            pd.DataFrame(place | {"share": share, "low": low.clip(0, 1), "high": high.clip(0, 1), "pairs": pairs})
        )
        low, high = (chance - half).clip(0, 1), (chance + half).clip(0, 1)
        controls.append(
            pd.DataFrame(place | {"control": True, "share": chance, "low": low, "high": high, "pairs": pairs})
        )
    if not frames:
        raise OptionError("no correlation was given; pass what filter_correlation gives")
    return pd.concat([*frames, *controls], ignore_index=True)


def inter_class_correlation(
    model: Any,
    loader: Iterable[Any] | None = None,
    m: int = 6,
    *,
    kinds: Sequence[str] = KINDS,
    conv: nn.Module | str | None = None,
    layer: nn.Module | str | None = None,
    absolute: bool = False,
    control: Control = Control(draws=20),
) -> pd.DataFrame:
    """Average correlation of the filters that different classes activate most: C_IC.

    Source: "Training interpretable CNNs towards class-specific filters", section 4.4 and table 2: the mean of
    ``corr(k, k')`` over classes ``c != c'``, ``k`` in ``A_c``, ``k'`` in ``A_c'``, where ``A_c`` are the m filters with
    the highest average activation on images of class c. No difference for ``"weights"``, but that weights are brought
    to length 1 (`filter_correlation`); also of activations; a control and intervals. A filter that two classes share
    counts as in the formula, with its correlation of 1: ``shared`` says how often.

    Args:
        model: The network; borrowed. Or a `HeadPass`, as for `filter_correlation`.
        loader: Batches ``(inputs, labels)``.
        m: Filters of each class, in ``[1, K]``. In the paper 6 for ResNet-20, 25 for AlexNet.
        kinds: As `filter_correlation`'s ``kind``: one or both.
        conv: As for `filter_correlation`.
        layer: The head, if it cannot be found.
        absolute: Of magnitudes, so that opposite filters do not cancel. The paper does not say which; its .16 for a
            plain network is of the size that magnitudes have here.
        control: Random sets of m filters for each class: how many, and the seed.

    Returns:
        One row for each kind: ``kind``, ``control``, ``m``, ``c_ic``, ``low``, ``high`` (jackknife that leaves out one
        class at a time: how far it depends on which classes there are; NaN for two classes); ``shared``: share of the
        ``C (C - 1) m^2`` pairs that are one and the same filter; ``classes`` with samples, others are left out;
        ``samples``. Behind these rows the same with ``control`` True: for random sets, mean over draws, with the
        Student-t interval of ``c_ic`` over draws.

    Raises:
        HeadError: As for `filter_correlation`.
        OptionError: m, kinds or conv is out of range, or there are samples of fewer than two classes.
    """
    head_pass = HeadPass.of(model, loader, layer)
    kinds = some_of(kinds, "kinds", KINDS)
    collected = _collect(head_pass, kinds, conv, "inter_class_correlation", m=m)
    present = collected.counts > 0
    if int(present.sum()) < 2:
        raise OptionError(
            f"classes are compared, but the loader has samples of {int(present.sum())}; pass at least two"
        )
    averages = collected.sums[present] / collected.counts[present, None]
    order = averages.sort(dim=1, descending=True, stable=True).indices[:, :m]
    highest = torch.zeros_like(averages, dtype=torch.bool).scatter_(1, order, True)
    chance = random_masks((len(averages), averages.shape[1]), m, control.draws, control.generator())
    sets = torch.stack([highest, *chance]).numpy().astype(float)
    shared = pair_interval(sets @ sets.transpose(0, 2, 1) / m**2)[0]
    rows, controls = [], []
    for kind in kinds:
        matrix = collected.correlations[kind].matrix
        matrix = np.abs(matrix) if absolute else matrix
        means, low, high = pair_interval(sets @ matrix @ sets.transpose(0, 2, 1) / m**2)
        rows.append((kind, False, m, means[0], low[0], high[0], shared[0]))
        controls.append((kind, True, m, *draws_interval(means[1:]), shared[1:].mean()))
    columns = ["kind", "control", "m", "c_ic", "low", "high", "shared"]
    samples = int(collected.counts.sum())
    return pd.DataFrame(rows + controls, columns=columns).assign(classes=len(averages), samples=samples)


def normalised_products(weight: Tensor) -> Tensor:
    """Inner products of filters of length 1.

    Args:
        weight: ``(K, ...)``, one filter a row.

    Returns:
        ``(K, K)`` float64; a filter of zeros has 0 with others and 1 with itself.
    """
    rows = weight.detach().double().flatten(1)
    # by the largest first: squares of tiny weights would vanish
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    rows = F.normalize(rows, dim=1)
    return (rows @ rows.T).fill_diagonal_(1.0)


class CoMoments:
    """Running mean and centred products of features, K x K, in float64; large means do not destroy them.

    Source: Chan, Golub and LeVeque 1979, the merging of two parts.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = self._mean = self._products = torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Take a batch in, ``(N, K)``."""
        features = features.detach().double()
        if self.count == 0:
            # the first row: a channel that never varies becomes exactly 0
            self._shift = features[0].clone()
        features = features - self._shift
        mean = features.mean(0)
        centred = features - mean
        products, size = centred.T @ centred, len(features)
        if self.count == 0:
            self._mean, self._products = mean, products
        else:
            apart = mean - self._mean
            whole = self.count + size
            products += torch.outer(apart, apart) * (self.count * size / whole)
            self._mean, self._products = self._mean + apart * (size / whole), self._products + products
        self.count += size

    def correlation(self) -> Tensor:
        """``(K, K)`` float64; a channel that never varies has 0 with others and 1 with itself."""
        variance = self._products.diagonal()
        scale = torch.where(variance > 0, variance, 1).rsqrt()
        return (self._products * scale[:, None] * scale).clamp(-1, 1).fill_diagonal_(1.0)


def pair_interval(tables: Any) -> tuple[Any, Any, Any]:
    """Mean over pairs of different members, with the Student-t interval of the jackknife that leaves out one member.

    Args:
        tables: ``(..., n, n)``, symmetric: a value for each two of n members; the diagonal is not read.

    Returns:
        ``(mean, low, high)``, each ``(...)``; no interval, NaN, for two members.

    Example:
        >>> mean, low, high = pair_interval(np.array([[9, 1, 2], [1, 9, 3], [2, 3, 9]]))
        >>> float(mean), bool(low < 2 < high)
        (2.0, True)
    """
    tables = np.asarray(tables, float)
    n = tables.shape[-1]
    rows = tables.sum(-1) - np.diagonal(tables, axis1=-2, axis2=-1)
    total = rows.sum(-1)
    mean = total / (n * (n - 1))
    if n < 3:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    without = (total[..., None] - 2 * rows) / ((n - 1) * (n - 2))
    error = np.sqrt((n - 1) * without.var(-1))
    half = stats.t.ppf(0.975, n - 1) * error
    return mean, mean - half, mean + half


class _Correlation(NamedTuple):
    matrix: Any  # (K, K) float64
    layer: str
    dimension: int


class _Collected(NamedTuple):
    correlations: dict[str, _Correlation]
    sums: Tensor  # (C, K) float64, of each class's features
    counts: Tensor  # (C,)


def _collect(
    head_pass: HeadPass, kinds: Sequence[str], conv: nn.Module | str | None, description: str, m: int | None = None
) -> _Collected:
    """One pass: the matrices of these kinds and, if m filters of each class are wanted, the classes' averages."""
    if conv is not None and "weights" not in kinds:
        raise OptionError("conv= says whose weights are compared, but no weights are asked for; leave it out")
    module = unwrap(head_pass.model)
    model = module if isinstance(module, nn.Module) else None
    correlations: dict[str, _Correlation] = {}
    moments, sums, counts = CoMoments(), torch.zeros(()), torch.zeros(())
    with (
        borrowed(model) as borrow,
        head_pass.batches(need_labels=m is not None, description=description) as stream,
    ):
        search = _FilterSearch(model, conv, borrow) if "weights" in kinds else None
        for batch in stream:
            if m is not None:
                check_k(m, batch.head.num_features, "m")
                # a product, not index_add_: the same on a GPU every time
                members = F.one_hot(batch.labels, batch.head.num_classes).double()  # type: ignore[arg-type]
                sums = sums + members.T @ batch.features.double()
                counts = counts + members.sum(0)
            if search is not None:
                correlations["weights"] = search.result(batch.head)
                search = None
            if "activations" in kinds:
                moments.add(batch.features)
            elif m is None:
                break
        layer_name = batch.head.name
    if "activations" in kinds:
        if moments.count < 2:
            raise OptionError("a correlation over samples needs at least two, the loader gave one; pass more")
        matrix = moments.correlation().cpu().numpy()
        correlations["activations"] = _Correlation(matrix, layer_name, max(1, moments.count - 1))
    return _Collected(correlations, sums.cpu(), counts.cpu())


class _FilterSearch:
    """Hooks for the first batch that tell which convolution or Linear makes the head's channels."""

    def __init__(self, model: nn.Module | None, conv: nn.Module | str | None, borrow: Borrowed) -> None:
        self._names = {module: name for name, module in model.named_modules()} if model is not None else {}
        self._requested = conv if conv is None else self._find(conv)
        self._ran: list[Any] = []
        modules = self._names if self._requested is None else {**self._names, self._requested: ""}
        self._removers = [borrow.after(module, self._note) for module in modules if isinstance(module, _FILTERS)]

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._ran.append(module)

    def _find(self, conv: nn.Module | str) -> Any:
        by_name = {name: module for module, name in self._names.items()}
        module = by_name.get(conv) if isinstance(conv, str) else conv
        if not isinstance(module, _FILTERS):
            near = [name for name, module in by_name.items() if isinstance(module, _FILTERS)]
            got = repr(conv) if isinstance(conv, str) else type(conv).__name__
            raise OptionError(
                f"conv must be a convolution or Linear of the model, or its name, got {got}; some: {near[-6:]}"
            )
        return module

    def result(self, head: Head) -> _Correlation:
        for remove in self._removers:
            remove()
        before = list(takewhile(lambda module: module is not head.module, self._ran))
        fitting = [module for module in before if len(module.weight) == head.num_features]
        if not fitting or self._requested not in (None, *fitting):
            ran = [f"{self._names.get(module, '')} ({len(module.weight)} outputs)" for module in before[-6:]]
            raise HeadError(
                f"expected a convolution or Linear with {head.num_features} outputs, the channels of head {head.name}, "
                f"that runs before it; before it ran: {', '.join(ran) or 'none'}. Pass conv= with one that fits, a "
                'HeadPass that is not cached, or ask for the kind "activations"'
            )
        module = fitting[-1] if self._requested is None else self._requested
        matrix = normalised_products(module.weight).cpu().numpy()
        return _Correlation(matrix, self._names.get(module, type(module).__name__), module.weight[0].numel())


def _chance_above(thresholds: Any, dimension: int) -> Any:
    """Probability that the inner product of two independent directions lies above."""
    if dimension == 1:
        return np.full(len(thresholds), 0.5)
    half = (dimension - 1) / 2
    return stats.beta.sf((1 + thresholds) / 2, half, half)
