"""Closed-form refits of a head of 1000 classes, and the usual way beside them: SAGA at the same sparsity."""

import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from benchmarks.lib.report import Table
from benchmarks.lib.workload import Settings
from captum_classfilters.heads import HeadMoments
from captum_classfilters.heads.refits import least_squares, omp

LEAST_SQUARES, OMP = 5.0, 60.0


def run(settings: Settings) -> Table:
    table = Table("refits: from moments, without SGD")
    torch.manual_seed(0)
    features = _features(20_000, 2048, settings.device)
    weight, bias = torch.randn(1000, 2048, device=settings.device) / 45, torch.randn(1000, device=settings.device)
    start = _now(settings.device)
    moments = HeadMoments(features.sum(0).cpu(), (features.T @ features).cpu(), len(features), "fc")
    table.add("moments of 20,000 x 2048 features, seconds", f"{_now(settings.device) - start:.2f}")
    indices = torch.rand(1000, 2048, device=settings.device).topk(50, 1).indices
    for name, limit, work in (
        ("least squares", LEAST_SQUARES, lambda: least_squares(moments, weight, bias, indices)),
        ("OMP", OMP, lambda: omp(moments, weight, bias, 50)),
    ):
        start = _now(settings.device)
        found = work()
        seconds = _now(settings.device) - start
        what = f"{name}, C 1000, K 2048, k 50: seconds"
        table.add(what, f"{seconds:.2f} (variance explained {float(found.explained.mean()):.2f})", seconds, limit)
    saga(table)
    table.notes = [
        "features: ReLU of mixed Gaussians; weights random: a hard case, for no feature matters more than another",
        "SAGA: scikit-learn's multinomial logistic regression with an l1 penalty on the same features, standardised, "
        "trained on the full head's predictions, 20 epochs a fit, not to convergence; its penalty was halved or "
        "doubled until a class kept about k features",
        "agreement: share of 2,000 other samples on which the small head predicts what the full one does",
    ]
    return table


def saga(table: Table) -> None:
    """A third of the size in each direction: C 333, K 683, k 17."""
    classes, channels, kept = 333, 683, 17
    torch.manual_seed(1)
    features = _features(8_000, channels, "cpu")
    # class prototypes, as a trained head has them
    weight = torch.randn(classes, channels) * (torch.rand(classes, channels) < 0.1)
    bias = torch.zeros(classes)
    logits = features.float() @ weight.T
    weight, bias = weight / logits.std(), bias - logits.mean(0) / logits.std()
    target = (features @ weight.double().T + bias.double()).argmax(1)
    train, test = slice(0, 6_000), slice(6_000, None)

    start = time.perf_counter()
    moments = HeadMoments(features[train].sum(0), features[train].T @ features[train], 6_000, "fc")
    found = omp(moments, weight, bias, kept)
    seconds = time.perf_counter() - start
    small = torch.zeros_like(weight, dtype=torch.float64).scatter_(1, found.indices, found.weight)
    agreement = ((features[test] @ small.T + found.bias).argmax(1) == target[test]).double().mean()
    table.add(f"C {classes}, K {channels}: OMP, k {kept}", f"{seconds:.2f} s, agreement {float(agreement):.3f}")

    mean, deviation = features[train].mean(0), features[train].std(0)
    scaled = ((features - mean) / deviation).numpy().astype(np.float32)
    total, strength, kept_each = 0.0, 0.02, 0.0
    for _ in range(5):
        model = LogisticRegression(penalty="elasticnet", l1_ratio=1.0, solver="saga", C=strength, max_iter=20, tol=1e-3)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", FutureWarning)
            model.fit(scaled[train], target[train].numpy())
        total += time.perf_counter() - start
        kept_each = float((model.coef_ != 0).sum(1).mean())
        if 0.7 * kept < kept_each < 1.4 * kept:
            break
        strength *= 2 if kept_each < kept else 0.5
    right = float((model.predict(scaled[test]) == target[test].numpy()).mean())
    table.add(
        f"C {classes}, K {channels}: SAGA, {kept_each:.0f} features a class",
        f"{total:.0f} s, agreement {right:.3f}",
    )
    table.add("SAGA / OMP: time", f"{total / seconds:.0f}")


def _features(count: int, channels: int, device: str) -> torch.Tensor:
    mixing = torch.eye(channels, device=device) + 0.5 * torch.randn(channels, channels, device=device) / channels**0.5
    return (torch.randn(count, channels, device=device) @ mixing).relu().double()


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
