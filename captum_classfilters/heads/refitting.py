"""`RefitOptions`, and from it and the data the object that fits: one for all who refit heads."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_classfilters.core.check import integer, number, one_of
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.heads.binary import BinaryRefitter
from captum_classfilters.heads.logistic import LogisticRefitter, check_classes
from captum_classfilters.heads.moments import HeadMoments, check_moments
from captum_classfilters.heads.refits import DiscriminantRefitter, Refitter

REFITS = (None, "least_squares", "omp", "discriminant", "logistic", "binary")
# Those that learn from labels; without a table they choose the features, too
FROM_LABELS = ("discriminant", "logistic", "binary")


class Fitter(Protocol):
    """New weights for given features, and a choice of features."""

    def fit(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights ``(C, k)``, biases ``(C,)`` and ridges ``(C,)`` for the features ``(C, k)``."""

    def pursue(self, k: int) -> Tensor:
        """Features of the fitter's own choice, ``(C, k)``, the most wanted first."""


@dataclass(frozen=True)
class RefitOptions:
    """How a small head gets its weights, where the name of the refit is not enough.

    Args:
        name: As ``refit`` of `decompose`.
        l2: For ``"logistic"``: strength of the penalty ``l2 / 2 sum w^2`` beside the mean loss, w on features of unit
            variance. None: chosen among 1e-2 to 1e-6 on a fifth of the training samples, held out.
        shared: For ``"binary"``: all classes choose from so many channels.
        exact: For ``"binary"`` with ``shared``: the best choice, by SciPy's HiGHS, instead of the greedy one; for heads
            of a few thousand unknowns.
        seed: For ``"logistic"``: of what is held out.

    Raises:
        OptionError: A value is out of range, or the refit does not read it.

    Example:
        >>> RefitOptions("binary", shared=20)
        RefitOptions(name='binary', l2=None, shared=20, exact=False, seed=0)
    """

    name: str
    l2: float | None = None
    shared: int | None = None
    exact: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self.name, "name", REFITS[1:])
        if self.l2 is not None:
            if self.name != "logistic":
                raise OptionError(f'l2 is for "logistic"; leave it out for {self.name!r}')
            number(self.l2, "l2", 0, open_ends=True)
        if self.name != "binary" and (self.shared is not None or self.exact):
            raise OptionError(f'shared and exact are for "binary"; leave them out for {self.name!r}')
        if self.shared is not None:
            integer(self.shared, "shared", 1, 2**31)
        if self.exact and self.shared is None:
            raise OptionError("exact=True chooses the shared channels; pass shared=, how many they are")


def refit_options(refit: Any, filters: Any, moments: Any) -> RefitOptions | None:
    """The options of a refit; refused are an unknown refit, one without its data, and what the refit does not read."""
    if isinstance(refit, RefitOptions):
        options = refit
    else:
        one_of(refit, "refit", REFITS)
        if refit is None:
            if moments is not None:
                raise OptionError(
                    'moments without a refit; pass refit="least_squares" or refit="omp", or leave them out'
                )
            return None
        options = RefitOptions(refit)
    name = options.name
    if name == "logistic":
        if not isinstance(moments, HeadPass):
            raise OptionError(
                'refit="logistic" reads features and labels: it needs moments=HeadPass(model, loader) of labelled '
                f"training images, got {'None' if moments is None else type(moments).__name__}"
            )
    elif not isinstance(moments, HeadMoments | HeadPass):
        got = "None" if moments is None else type(moments).__name__
        labelled = ", by_class=True" if name in FROM_LABELS else ""
        raise OptionError(f"refit={name!r} needs moments=HeadMoments.collect(model, loader{labelled}), got {got}")
    if name == "omp" and filters is not None:
        raise OptionError('refit="omp" chooses the features itself; pass filters=None, or refit="least_squares"')
    if name == "least_squares" and filters is None:
        raise OptionError('refit="least_squares" needs a table, filters=; or pass refit="omp", which chooses itself')
    if options.shared is not None and filters is not None:
        raise OptionError("shared= chooses the channels itself; pass filters=None")
    return options


def as_moments(refit: RefitOptions, moments: Any) -> Any:
    """The data that the refit reads; of a `HeadPass` its moments are collected where it needs no more."""
    if refit.name != "logistic" and isinstance(moments, HeadPass):
        return HeadMoments.collect(moments, by_class=refit.name in FROM_LABELS)
    return moments


def fitter(refit: RefitOptions, moments: Any, head: Head) -> Fitter:
    """The object that fits this head.

    Raises:
        OptionError: A class has no sample among the labels, or options do not fit.
        ShapeError: The data are of another head.
    """
    if isinstance(moments, HeadPass):
        theirs = moments.head
        if theirs.weight.shape != head.weight.shape or not torch.equal(theirs.weight.cpu(), head.weight.cpu()):
            raise ShapeError(
                f"the HeadPass is of another head, {theirs!r}, than {head!r} of this network; make it with this model"
            )
        return LogisticRefitter(moments, refit.l2, refit.seed)
    check_moments(moments, head.name, head.num_features)
    if refit.name in FROM_LABELS:
        means = moments.class_means
        if len(means) != head.num_classes:
            raise ShapeError(f"the moments are of {len(means)} classes, the head {head.name} has {head.num_classes}")
        check_classes(moments.class_counts)
    if refit.name == "binary":
        return BinaryRefitter(moments, refit.shared, refit.exact)
    if refit.name == "discriminant":
        return DiscriminantRefitter(moments, head.weight.device)
    return Refitter(moments, head.weight, head.bias)
