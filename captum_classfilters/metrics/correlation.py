"""How similar are filters? Correlations between all filters, and between the filters that different classes use.

There are two kinds of correlation: of the weights, as in the paper, and of the activations. K channels, C classes,
N samples.
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
    """Correlation of every pair of filters: of their weights, or of their activations.

    Source: "Training interpretable CNNs towards class-specific filters", section 4.4 and figure 7: the inner product of
    two filters' weights. Differs: each filter's weights are first scaled to length 1, so that a threshold has a
    meaning; activations can be compared too. `correlated_share` compares the matrix with its control.

    Args:
        model: The network; borrowed. Or a `HeadPass`; then ``loader`` and ``layer`` are left out. A cached one runs no
            convolution, so it allows only the kind ``"activations"``.
        loader: Batches of inputs, or ``(inputs, labels)``; for ``"weights"`` only the first is read.
        kind: ``"weights"``: of the last convolution or Linear with K outputs that runs before the head. In a ResNet
            the head's channels are the sum of this convolution and a shortcut, so it is a part of each channel.
            ``"activations"``: Pearson's correlation, over samples, of the head's input.
        conv: Another convolution or Linear whose weights to compare, or its name.
        layer: The head, if it cannot be found.

    Returns:
        ``K x K``; index and columns are named ``"channel"``. A filter of zeros, or one that never varies, has
        correlation 0 with others and 1 with itself. ``attrs``: ``kind``, ``layer`` and ``dimension``, the length of the
        vectors that are compared: the number of a filter's weights, or the number of samples minus one.

    Raises:
        HeadError: No layer with K outputs runs before the head, or ``conv`` does not.
        OptionError: ``kind`` or ``conv`` is not a possible value, or there are fewer than two samples.
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
    """Share of filter pairs with a correlation above each threshold, and the same share of random filters.

    Source: "Training interpretable CNNs towards class-specific filters", figure 7e. The paper does not say whether the
    diagonal counts; here it does not, because the correlation of a filter with itself is always 1.

    Args:
        correlation: The result of `filter_correlation`, or several by name.
        thresholds: Numbers in ``[-1, 1)``.
        dimension: Length of the vectors behind the matrix; None: what `filter_correlation` wrote into its ``attrs``.

    Returns:
        One row for each matrix and threshold: ``correlation``, ``threshold``, ``control``, ``share``, ``low``, ``high``
        (from a jackknife that leaves out one filter at a time, because pairs share filters), ``pairs``. The control
        rows of each matrix follow: ``share`` is the exact one of independent directions (Gaussian vectors) of the same
        dimension; ``low``, ``high`` are the central 95 % of a matrix of such directions.

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
                "pass the result of filter_correlation"
            )
        size = dimension if dimension is not None else getattr(matrix, "attrs", {}).get("dimension")
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise OptionError(
                f"the control needs the length of the vectors behind correlation {name!r}, got {size!r}; pass "
                "dimension=: the number of weights of a filter, or the number of samples minus one"
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
        raise OptionError("no correlation was given; pass the result of filter_correlation")
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
    the highest average activation on images of class c. Differs: weights are scaled to length 1, activations can be
    compared too, and there are a control and intervals. A filter that two classes share counts with its correlation of
    1, as in the formula; ``shared`` says how often this happens.

    Args:
        model: The network; borrowed. Or a `HeadPass`, as for `filter_correlation`.
        loader: Batches ``(inputs, labels)``.
        m: Filters of each class, in ``[1, K]``. The paper takes 6 for ResNet-20 and 25 for AlexNet.
        kinds: One or both values of ``kind`` in `filter_correlation`.
        conv: As for `filter_correlation`.
        layer: The head, if it cannot be found.
        absolute: Average the magnitudes of correlations, so that opposite filters do not cancel. The paper does not say
            which it does; its .16 for a plain network is as large as the mean of magnitudes here.
        control: Random sets of m filters for each class.

    Returns:
        One row for each kind: ``kind``, ``control``, ``m``, ``c_ic``, ``low``, ``high`` (from a jackknife that leaves
        out one class at a time, which shows how much the value depends on the classes; NaN for two classes);
        ``shared``: share of the ``C (C - 1) m^2`` pairs that are the same filter twice; ``classes``: number of classes
        with samples; the others are left out; ``samples``. The control rows follow: means over draws of random sets,
        and the Student-t interval of ``c_ic`` over draws.

    Raises:
        HeadError: As for `filter_correlation`.
        OptionError: m, kinds or conv is out of range, or fewer than two classes have samples.
    """
    head_pass = HeadPass.of(model, loader, layer)
    kinds = some_of(kinds, "kinds", KINDS)
    collected = _collect(head_pass, kinds, conv, "inter_class_correlation", m=m)
    present = collected.counts > 0
    if int(present.sum()) < 2:
        raise OptionError(
            f"expected samples of at least two classes, because classes are compared; the loader has samples of "
            f"{int(present.sum())}; pass a loader with more classes"
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
    """Inner products of filters that are scaled to length 1.

    Args:
        weight: ``(K, ...)``, one filter in each row.

    Returns:
        ``(K, K)`` float64; a filter of zeros has 0 with others and 1 with itself.
    """
    rows = weight.detach().double().flatten(1)
    # divided by the largest weight first, because squares of tiny weights would vanish
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    rows = F.normalize(rows, dim=1)
    return (rows @ rows.T).fill_diagonal_(1.0)


class CoMoments:
    """Running mean and centred products of features, K x K, in float64; they stay precise for large means.

    Source: Chan, Golub and LeVeque 1979, the formula that merges two parts.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = self._mean = self._products = torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Add a batch, ``(N, K)``."""
        features = features.detach().double()
        if self.count == 0:
            # the first row is subtracted, so that a channel that never varies becomes exactly 0
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
        tables: ``(..., n, n)``, symmetric: a value for each pair of n members; the diagonal is not read.

    Returns:
        ``(mean, low, high)``, each ``(...)``; the interval is NaN for two members.

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
    """In one pass collect the matrices of these kinds and, if ``m`` is not None, sums of features by class."""
    if conv is not None and "weights" not in kinds:
        raise OptionError("conv= says whose weights to compare, but the kind 'weights' is not requested; leave it out")
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
                # a product and not index_add_, whose result on a GPU can differ from run to run
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
            raise OptionError("a correlation over samples needs at least two samples, the loader gave one; pass more")
        matrix = moments.correlation().cpu().numpy()
        correlations["activations"] = _Correlation(matrix, layer_name, max(1, moments.count - 1))
    return _Collected(correlations, sums.cpu(), counts.cpu())


class _FilterSearch:
    """Finds, by hooks during the first batch, the convolution or Linear that makes the head's channels."""

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
                f"conv must be a convolution or Linear of the model, or its name, got {got}; pass one of {near[-6:]}"
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
                f"expected a convolution or Linear with {head.num_features} outputs (the channels of head {head.name}) "
                f"that runs before the head; these ran before it: {', '.join(ran) or 'none'}; pass conv= with a layer "
                'that fits, a HeadPass that is not cached, or the kind "activations"'
            )
        module = fitting[-1] if self._requested is None else self._requested
        matrix = normalised_products(module.weight).cpu().numpy()
        return _Correlation(matrix, self._names.get(module, type(module).__name__), module.weight[0].numel())


def _chance_above(thresholds: Any, dimension: int) -> Any:
    """Probability that the inner product of two independent directions exceeds each threshold."""
    if dimension == 1:
        return np.full(len(thresholds), 0.5)
    half = (dimension - 1) / 2
    return stats.beta.sf((1 + thresholds) / 2, half, half)
