"""Do a head's weights follow an asymmetric Laplace distribution? And may those that do not be pruned?

C classes, K weights in each.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from captum_classfilters.class_filters import names_of
from captum_classfilters.core.check import some_of
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head_pass import Batch, HeadPass
from captum_classfilters.core.intervals import Floats, mean_interval, wilson
from captum_classfilters.core.many_labels import ManyScores
from captum_classfilters.core.targets import classes_of
from captum_classfilters.splitting.ald_splitter import ALDSplitter
from captum_classfilters.splitting.laplace import fit_mle, ks_distance
from captum_classfilters.splitting.splits import Splits, split_weights

CRITERIA = ("deviation", "magnitude", "random")

# Numbers of a bootstrap that are made at once
_CELLS = 2**21


def ald_evidence(
    model: Any,
    *,
    layer: nn.Module | str | None = None,
    targets: Iterable[int] | None = None,
    bootstrap: int = 200,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    show_progress: bool = False,
) -> pd.DataFrame:
    """How well the asymmetric Laplace distribution fits each class's weights, beside four others.

    The paper shows plots of the line in log space. Its R2 is high for whatever is monotone, so each row has a control,
    the R2 of as many normal numbers; distance and likelihood say more. Exact zeros are dropped.

    Args:
        model: The network; only its weights are read.
        layer: The head; None: the last layer with a matrix of weights.
        targets: Which classes; None: all.
        bootstrap: Samples for each p value, at least 20; 0: none, and ``p`` is NaN.
        seed: Seed of the random draws.
        class_names: C names; otherwise numbers.
        show_progress: A tqdm bar.

    Returns:
        One row for each class: ``class_name``, ``control`` (False), ``weights`` (how many that are not 0), ``zeros``;
        ``r2_positive``, ``r2_negative``: R2 of the paper's line on each side; ``ks``: Kolmogorov and Smirnov's distance
        from the fit by maximum likelihood; ``p``: share of samples of that fit that lie at least as far from their own
        fit (parametric bootstrap: below .05 the distribution is refused); ``aic_ald``, ``aic_laplace``, ``aic_normal``,
        ``aic_student_t``, ``aic_skew_normal``: Akaike's criterion, the lower the better; ``best``: whose is lowest.
        scipy fits Student's t and the skew normal; where its optimiser ends below the normal distribution, which both
        contain, that one's likelihood is taken. A class without two different weights has NaN. Then one row for each
        class with ``control`` True: ``r2_positive`` of as many normal numbers; the other figures are NaN.

    Raises:
        OptionError: ``bootstrap`` is out of range, or ``class_names`` are not C.
        HeadError, LabelError, NonFiniteError: As for `ALDSplitter.split`.
    """
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int) or (bootstrap and bootstrap < 20):
        raise OptionError(
            f"bootstrap must be 0 or at least 20 samples, got {bootstrap!r}; fewer give no p value to speak of"
        )
    splits = ALDSplitter(model, layer).splits(min_size=2)
    classes = len(splits.weights)
    requested = list(targets) if isinstance(targets, Iterable) else [targets]
    device = splits.weights.device
    chosen = range(classes) if targets is None else classes_of(requested, len(requested), classes, device).tolist()
    names = names_of(class_names, classes)
    generator = np.random.default_rng(seed)
    judged, controls = [], []
    for row in tqdm(chosen, desc="ald_evidence", disable=not show_progress):
        numbers = _evidence(splits, row, bootstrap, generator)
        control_r2 = numbers.pop("r2_normal")
        judged.append({"class_name": names[row], "control": False, **numbers})
        controls.append({"class_name": names[row], "control": True, "r2_positive": control_r2})
        controls[-1] |= {name: numbers[name] for name in ("weights", "zeros")}
    return pd.DataFrame([*judged, *controls])


def pruning_curve(
    model: Any,
    loader: Iterable[Any] | None = None,
    shares: Iterable[float] = (0.1, 0.25, 0.5, 0.75, 0.9),
    *,
    criteria: Sequence[str] = CRITERIA,
    layer: nn.Module | str | None = None,
    control: Control = Control(),
) -> pd.DataFrame:
    """Accuracy when a share of the final layer's weights is set to 0, without retraining.

    Source: the paper's section VI proposes to prune the weights that deviate from the distribution, and shows no
    result. Here a weight's deviation is the distance of its logarithm from its side's line, `Splits.deviations`.

    Args:
        model: The network, borrowed; or a `HeadPass`.
        loader: Batches ``(inputs, labels)``; without labels there is agreement alone. Left out with a `HeadPass`.
        shares: Of each class's weights, in [0, 1); 0 always comes first.
        criteria: What goes first: ``"deviation"`` the weights that deviate most, ``"magnitude"`` the smallest,
            ``"random"`` any, the control, which is always there.
        layer: The head, if it cannot be found; left out with a `HeadPass`.
        control: Random weights.

    Returns:
        One row for each criterion and share: ``criterion``, ``share``, ``control`` (True where the criterion is
        ``"random"``), ``weights`` that are left; ``accuracy``, ``low``, ``high`` (Wilson; Student-t over draws for the
        control), ``agreement`` with the whole head's predictions, ``agreement_low``, ``agreement_high``, ``samples``.
        Accuracy is NaN without labels. Of many labels: ``average_precision`` and ``balanced_accuracy``, means over
        classes, with the columns of `metrics.accuracy_curve`; ``agreement`` of the logits' signs.

    Raises:
        OptionError: ``shares`` or ``criteria`` are out of range.
        ShapeError: The head that was read is not the one that the model uses.
    """
    if not isinstance(shares, Iterable) or isinstance(shares, str):
        raise OptionError(f"shares must be a list of numbers in [0, 1), got {shares!r}")
    all_shares = sorted({0.0, *(float(share) for share in shares)})
    if wrong := [share for share in all_shares if not 0 <= share < 1]:
        raise OptionError(f"shares must lie in [0, 1), got {wrong[0]}")
    names = list(dict.fromkeys([*some_of(criteria, "criteria", CRITERIA), "random"]))
    heads: dict[tuple[str, float], list[Tensor]] = {}
    tallies: dict[tuple[str, float], Tensor] = {}
    samples, labelled = 0, True
    head_pass = HeadPass.of(model, loader, layer)
    with head_pass.batches(need_labels=False, description="pruning_curve", many_labels=True) as stream:
        many, batches = ManyScores.read(stream, control.seed)
        if many is not None:
            return _pruned_of_many(many, _kept(many.first, names, all_shares, control))
        for batch in batches:
            if not heads:
                kept = _kept(batch, names, all_shares, control)
                heads = {
                    key: [batch.head.weight * mask.to(batch.head.weight.device) for mask in masks]
                    for key, masks in kept.items()
                }
                tallies = {key: torch.zeros(2, len(masks), dtype=torch.int64) for key, masks in kept.items()}
            features = batch.features.to(batch.head.weight.dtype)
            whole, labels = batch.logits.argmax(1), batch.labels
            labelled, samples = labelled and labels is not None, samples + len(features)
            for key, weights in heads.items():
                predicted = torch.stack([F.linear(features, weight, batch.head.bias).argmax(1) for weight in weights])
                right = predicted == (whole if labels is None else labels)
                tallies[key] += torch.stack([right.sum(1), (predicted == whole).sum(1)]).cpu()
    left = {key: float(np.mean([int((weight != 0).sum()) for weight in weights])) for key, weights in heads.items()}
    return pd.DataFrame(
        [_pruned_row(*key, left[key], tally.numpy(), samples, labelled) for key, tally in tallies.items()]
    )


def _pruned_of_many(scores: ManyScores, kept: Mapping[tuple[str, float], list[Tensor]]) -> pd.DataFrame:
    """The frame of `pruning_curve` of many labels."""
    head, rows = scores.head, []
    features, whole = scores.features.to(head.weight.dtype), scores.logits > 0
    for (criterion, share), masks in kept.items():
        weights = [head.weight * mask.to(head.weight.device) for mask in masks]
        logits = [F.linear(features, weight, head.bias) for weight in weights]
        chance = criterion == "random" and len(logits) > 1
        columns = scores.chance_columns(logits) if chance else scores.columns(logits[0])
        row = {"criterion": criterion, "share": share, "control": criterion == "random"}
        row["weights"] = float(np.mean([int((weight != 0).sum()) for weight in weights]))
        row |= {name: values[0] for name, values in columns.items()}
        row["agreement"] = float(np.mean([float(((few > 0) == whole).double().mean()) for few in logits]))
        rows.append({**row, "samples": len(features)})
    return pd.DataFrame(rows)


# -- evidence ----------------------------------------------------------------------------------------------------------


def _evidence(splits: Splits, row: int, bootstrap: int, generator: np.random.Generator) -> dict[str, Any]:
    weights = splits.weights[row].double().numpy()
    weights = np.sort(weights[weights != 0])
    fitted, likelihood = fit_mle(weights[None]) if len(weights) else (None, [np.nan])
    figures: dict[str, Any] = {
        "weights": len(weights),
        "zeros": int(splits.zeros[row]),
        "r2_positive": splits.positive.r2[row, 0],
        "r2_negative": splits.negative.r2[row, 0],
        "r2_normal": _control_r2(len(weights), generator),
    }
    if fitted is None or np.isnan(likelihood[0]):
        nothing = dict.fromkeys(["ks", "p", *(f"aic_{name}" for name in ("ald", *_OTHERS))], np.nan)
        return figures | nothing | {"best": None}
    figures["ks"] = float(ks_distance(weights[None], fitted)[0])
    figures["p"] = _bootstrap_p(figures["ks"], fitted, len(weights), bootstrap, generator)
    criteria = {"ald": 2 * 3 - 2 * float(likelihood[0])}
    normal = _normal(weights)
    for name, (parameters, likelihood_of) in _OTHERS.items():
        criteria[name] = 2 * parameters - 2 * max(likelihood_of(weights), normal if parameters == 3 else -np.inf)
    figures |= {f"aic_{name}": value for name, value in criteria.items()}
    return figures | {"best": min(criteria, key=lambda name: criteria[name])}


def _control_r2(size: int, generator: np.random.Generator) -> float:
    """R2 of the positive side of as many normal numbers."""
    if size < 2:
        return float("nan")
    normal = torch.from_numpy(generator.standard_normal((1, size)))
    return float(split_weights(normal, min_size=2).positive.r2[0, 0])


def _bootstrap_p(distance: float, fitted: Any, size: int, samples: int, generator: np.random.Generator) -> float:
    if not samples:
        return float("nan")
    further, at_once = 0, max(1, _CELLS // size)
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        drawn = np.sort(type(fitted)(*(np.repeat(part, count) for part in fitted)).sample(size, generator), axis=1)
        further += int((ks_distance(drawn, fit_mle(drawn)[0]) >= distance).sum())
    # the sample itself counts as one, so that p is never 0
    return (1 + further) / (1 + samples)


def _normal(weights: Floats) -> float:
    return float(stats.norm.logpdf(weights, weights.mean(), weights.std()).sum())


def _laplace(weights: Floats) -> float:
    median = np.median(weights)
    return float(stats.laplace.logpdf(weights, median, np.abs(weights - median).mean()).sum())


def _by_scipy(distribution: Any) -> Callable[[Floats], float]:
    def likelihood_of(weights: Floats) -> float:
        # at unit scale, because the optimiser's steps are absolute
        scale = weights.std()
        with np.errstate(all="ignore"):
            fitted = distribution.fit(weights / scale)
            likelihood = distribution.logpdf(weights / scale, *fitted).sum() - len(weights) * np.log(scale)
        return float(likelihood) if np.isfinite(likelihood) else -np.inf

    return likelihood_of


# How many parameters, and the logarithm of the likelihood
_OTHERS: dict[str, tuple[int, Callable[[Floats], float]]] = {
    "laplace": (2, _laplace),
    "normal": (2, _normal),
    "student_t": (3, _by_scipy(stats.t)),
    "skew_normal": (3, _by_scipy(stats.skewnorm)),
}


# -- pruning -----------------------------------------------------------------------------------------------------------


def _kept(
    batch: Batch, names: Sequence[str], shares: Sequence[float], control: Control
) -> dict[tuple[str, float], list[Tensor]]:
    """Which weights stay, ``(C, K)`` bool: one mask for each criterion and share, several for the control."""
    weights = batch.head.weight.cpu().to(torch.promote_types(batch.head.weight.dtype, torch.float32))
    if weights.shape[1] < 2:
        raise ShapeError(f"the head has {weights.shape[1]} features; pruning needs at least two")
    generator = control.generator()
    # weights with a high key go first
    orders = {
        "deviation": lambda: [split_weights(weights, min_size=2).deviations()],
        "magnitude": lambda: [-weights.abs()],
        "random": lambda: [torch.rand(weights.shape, generator=generator) for _ in range(control.draws)],
    }
    kept = {}
    for name in names:
        # place in the order of going: 0 goes first
        places = [key.argsort(1, descending=True).argsort(1) for key in orders[name]()]
        for share in shares:
            kept[name, share] = [place >= round(share * weights.shape[1]) for place in places]
    return kept


def _pruned_row(criterion: str, share: float, left: float, tally: Any, samples: int, labelled: bool) -> dict[str, Any]:
    numbers = []
    for hits in tally:
        if criterion == "random":
            numbers += list(map(float, mean_interval(hits / samples)))
        else:
            numbers += [float(hits[0] / samples), *(float(bound) for bound in wilson(hits[0], samples))]
    if not labelled:
        numbers[:3] = [float("nan")] * 3
    columns = ("accuracy", "low", "high", "agreement", "agreement_low", "agreement_high")
    return {
        "criterion": criterion,
        "share": share,
        "control": criterion == "random",
        "weights": left,
        **dict(zip(columns, numbers, strict=True)),
        "samples": samples,
    }
