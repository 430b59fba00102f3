"""`decompose`: the same network, each class reading only a few of the head's features.

A copy; only its head differs. What the head becomes is in `decomposed_linear.py`, new weights come from `refits.py`.
"""

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_classfilters.class_filters import ClassFilters, check_k, check_table, one_table
from captum_classfilters.core.borrow import unwrap
from captum_classfilters.core.calls import CONVS
from captum_classfilters.core.check import one_of
from captum_classfilters.core.copies import copied
from captum_classfilters.core.errors import HeadError, LayerError, OptionError, ShapeError, SingularMomentsWarning
from captum_classfilters.core.head import Head, Part, find_head, has_layer, is_candidate
from captum_classfilters.core.head_pass import HeadPass, ran_on_noise
from captum_classfilters.heads.decomposed_linear import BACKENDS, DecomposedLinear, blank_linear
from captum_classfilters.heads.moments import HeadMoments, check_moments
from captum_classfilters.heads.refits import Refitter
from captum_classfilters.heads.refitting import FROM_LABELS, RefitOptions, as_moments, fitter, refit_options

# Measured on one CPU thread (`benchmarks/speed/head_speed.py`): a sparse head wins at every batch size when the dense
# one has at least so many weights ...
_LARGE = 2**17
# ... of which at most this share is kept
_SHARE = 1 / 8


def decompose(
    model: nn.Module,
    filters: ClassFilters | None,
    k: int,
    *,
    refit: str | RefitOptions | None = None,
    moments: HeadMoments | HeadPass | None = None,
    backend: str = "auto",
    unseen: str = "refuse",
    layer: nn.Module | str | None = None,
) -> nn.Module:
    """A copy of the network whose head reads only k features for each class.

    Source: Badola et al. 2022, section 3.2: ``z_y = sum of W_yj f_j over the class's k features + b_y``. Beyond the
    paper: heads that are really cheaper, and refits without SGD.

    The head is faster under ``torch.no_grad`` or ``inference_mode``; its output can then be a transposed view. To load
    a state dict of such a network, decompose with the same k and backend first.

    The head is a very small share of a network's work: this makes a head that people can read, not a fast network.

    Args:
        model: The network; not changed.
        filters: Which features; any method's table. None with ``refit="omp"``, which chooses its own, and with refits
            from labels, if they shall choose: forward selection for their loss.
        k: Features for each class, in ``[1, K]``.
        refit: None keeps the weights as they are. ``"least_squares"`` gives the kept features the weights that come
            nearest to the full head's logits; ``"omp"`` chooses the features, too (`refits.py`). From labels, better
            where few features are left: ``"logistic"``, multinomial logistic regression; ``"discriminant"``, least
            squares of the class membership, in closed form; ``"binary"``, weights of 1 on standardised features. All
            need ``moments`` and add a bias where the head has none. `RefitOptions` for more than the name, such as
            shared channels.
        moments: What a refit learns from, many *different* training images: a refit on crops of a few images fits
            those few. `HeadMoments` of this network, from labels with ``by_class=True``; or a `HeadPass` of it over
            labelled training images, which ``"logistic"`` needs and of which it keeps N x K features. Judge a refit on
            other images (`metrics.accuracy_curve`).
        backend: A backend of `DecomposedLinear`; or ``"dense"``, a plain ``nn.Linear`` with zeros. ``"auto"``: a sparse
            form where it won at every batch size (CPU, float32 or float64, at least 2^17 weights of which at most an
            eighth is kept), else dense.
        unseen: Classes without samples in the table: ``"refuse"``, or ``"dense"``, which keeps all their weights; not
            with a refit from labels, whose logits are of another scale.
        layer: The head, if it has another name than in the table and moments.

    Returns:
        The copy, in the same mode and on the same device.

    Raises:
        OptionError: k is out of range, a class has no samples, a refit has too few, or options do not fit together.
        ShapeError: The table or the moments have another shape or layer than the head. (Those of another network with
            the same shape and names cannot be told apart.)
        HeadError: The layer asked for is not in the model, or is not a plain ``nn.Linear`` or 1x1 convolution.

    Warns:
        SingularMomentsWarning: Some classes' features are linear combinations of one another; a ridge decided.
    """
    one_of(backend, "backend", (*BACKENDS, "dense"))
    one_of(unseen, "unseen", ("refuse", "dense"))
    options = refit_options(refit, filters, moments)
    if options is None or filters is not None:
        one_table(filters)
    if options is not None:
        if options.name in FROM_LABELS and unseen == "dense":
            raise OptionError(
                f'unseen="dense" does not fit refit={options.name!r}: its logits are of another scale than the kept '
                'ones; give images of all classes, or use refit="least_squares"'
            )
        moments = as_moments(options, moments)
    module = unwrap(model)
    made: Any = filters if filters is not None else moments.head if isinstance(moments, HeadPass) else moments
    about = {} if made is None else made.meta if isinstance(made, ClassFilters) else _about(made)
    channels = made.num_channels if isinstance(made, ClassFilters) else 0 if made is None else made.num_features
    head = find_head(module, layer if layer is not None else _layer_of(made, module), about, channels)
    if not head.weight.is_floating_point() or torch.finfo(head.weight.dtype).bits < 16:
        raise HeadError(f"head {head.name} is {head.weight.dtype}; use the network before quantisation")
    if layer is not None:
        filters = replace(filters, layer=head.name) if isinstance(filters, ClassFilters) else filters
        moments = replace(moments, layer=head.name) if isinstance(moments, HeadMoments) else moments
    check_k(k, head.num_features, "k")
    if options is None:
        bias = head.bias if head.has_bias else None
        dense = _Dense(head.weight, bias, _chosen(filters, head, k, unseen))
    elif options.name == "least_squares":
        dense = _refitted(head, _chosen(filters, head, k, unseen), filters.seen, k, moments)  # type: ignore[union-attr]
    else:
        mask = None if filters is None else _chosen(filters, head, k, unseen)
        dense = _fitted(head, mask, k, options, moments)
    if head.one_logit:
        dense = _one_row(dense)
    return _replaced(module, head, dense, backend)


class _Dense(NamedTuple):
    """The new head, with all its weights."""

    weight: Tensor  # (C, K)
    bias: Tensor | None  # (C,)
    mask: Tensor  # (C, K) bool: which weights are kept


def _layer_of(made: Any, model: nn.Module) -> str:
    """The layer that a table or moments name, if the model has it."""
    layer: str = made.name if isinstance(made, Head) else made.layer
    if not has_layer(model, layer):
        raise ShapeError(
            f"the {type(made).__name__} are of layer {layer!r}, which this network does not have; use those made with "
            "this model, or name its head with layer="
        )
    return layer


def _about(made: Any) -> Any:
    return made.about() if isinstance(made, Head) else made.about


def _chosen(filters: Any, head: Head, k: int, unseen: str) -> Tensor:
    """The features of each class as a ``(C, K)`` mask; all of them in a class that is kept dense."""
    check_table(filters, head)
    missing = [name for name, seen in zip(filters.class_names, filters.seen.tolist(), strict=True) if not seen]
    if missing and unseen == "refuse":
        shown = ", ".join(missing[:10]) + (f", ... ({len(missing)} in all)" if len(missing) > 10 else "")
        raise OptionError(
            f"no sample of class {shown}: its features cannot be ranked; make the table from images of all classes, "
            'or keep all weights of such classes with unseen="dense"'
        )
    mask: Tensor = filters.mask(k) | ~filters.seen[:, None]
    return mask.to(head.weight.device)


def _refitted(head: Head, mask: Tensor, seen: Tensor, k: int, moments: Any) -> _Dense:
    """Least squares in every class that was seen; one that is kept dense stays as it is."""
    check_moments(moments, head.name, head.num_features)
    rows = seen.nonzero().flatten().to(mask.device)
    indices = mask[rows].nonzero()[:, 1].view(len(rows), k)
    fitted, shift, ridge = Refitter(moments, head.weight[rows], head.bias[rows]).fit(indices)
    weight, bias = head.weight.clone(), head.bias.clone()
    weight[rows], bias[rows] = _spread(indices, fitted, weight), shift.to(bias.dtype)
    _warn_singular(ridge, moments)
    return _Dense(weight, bias, mask)


def _fitted(head: Head, mask: Tensor | None, k: int, options: RefitOptions, moments: Any) -> _Dense:
    """New weights in every class, on the features of the mask or of the refit's own choice."""
    made = fitter(options, moments, head)
    indices = made.pursue(k) if mask is None else mask.nonzero()[:, 1].view(len(mask), k)
    indices = indices.to(head.weight.device)
    fitted, bias, ridge = made.fit(indices)
    _warn_singular(ridge, moments)
    if head.one_logit and options.name in FROM_LABELS:
        # the one logit is the log of the odds: the difference of the two rows, of which half will be taken
        fitted, bias = fitted * 2, bias * 2
    mask = torch.zeros_like(head.weight, dtype=torch.bool).scatter_(1, indices, True)
    return _Dense(_spread(indices, fitted, head.weight), bias.to(head.weight), mask)


def _spread(indices: Tensor, fitted: Tensor, like: Tensor) -> Tensor:
    weight = like.new_zeros(len(indices), like.shape[1])
    return weight.scatter_(1, indices, fitted.to(like))


def _warn_singular(ridge: Tensor, moments: Any) -> None:
    singular = int((ridge > 0).sum())
    if singular:
        warnings.warn(
            f"for {singular} of {len(ridge)} classes the kept features follow from one another over the "
            f"{moments.count} samples; a ridge of {float(ridge.max()):.0e} shared their weight out. More "
            "samples or a smaller k avoid it",
            SingularMomentsWarning,
            stacklevel=4,
        )


def _backend(asked: str, dense: _Dense) -> str:
    """The measured rule behind ``"auto"``."""
    if asked != "auto":
        return asked
    weight = dense.weight
    measured = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    wins = measured and weight.numel() >= _LARGE and int(dense.mask.sum()) <= _SHARE * weight.numel()
    return "auto" if wins else "dense"


def _one_row(dense: _Dense) -> _Dense:
    """The two rows of a network with one logit as the one that it has: half of the second row less the first."""
    weight, bias, mask = dense
    kept = weight.masked_fill(~mask, 0.0)
    row = (kept[1:] - kept[:1]) / 2
    return _Dense(row, None if bias is None else (bias[1:] - bias[:1]) / 2, mask.any(0, keepdim=True))


def _small_head(head: Head, dense: _Dense, backend: str) -> nn.Module:
    weight, bias, mask = dense
    linear = blank_linear(head.num_features, len(weight), bias is not None, weight)
    with torch.no_grad():
        linear.weight.copy_(weight.masked_fill(~mask, 0.0))
        if bias is not None:
            linear.bias.copy_(bias)
    learns = [parameter.requires_grad for parameter in head.module.parameters()]
    linear.weight.requires_grad_(head.module.weight.requires_grad if is_candidate(head.module) else any(learns))
    if bias is not None:
        own = getattr(head.module, "bias", None)
        linear.bias.requires_grad_(own.requires_grad if isinstance(own, nn.Parameter) else any(learns))
    small: nn.Module = linear if backend == "dense" else DecomposedLinear.from_linear(linear, mask, backend)
    if isinstance(head.module, CONVS):
        small = Pointwise(small)
    # where the device has no float64, the head's numbers were given on the CPU
    return small.to(head.device).train(head.module.training)


def _replaced(model: nn.Module, head: Head, dense: _Dense, backend: str) -> nn.Module:
    """The copy: the new head stands in for the old one, divided by what the model multiplies its output by."""
    first, *others = head.parts or (Part(head.module, 1.0),)
    weight, bias, mask = dense
    if bias is not None and head.offset:
        bias = bias - bias.new_tensor(head.offset)
    dense = _Dense(weight / first.factor, None if bias is None else bias / first.factor, mask)
    small = _small_head(head, dense, _backend(backend, dense))
    if model is head.module:
        return small
    # of averaged heads one takes all, the others give 0
    nothing = {part.module: Nothing(len(weight)).train(part.module.training) for part in others}
    twin = copied(model, {first.module: small, **nothing})
    # one forward proves that the copy is one: else the head that runs is still the original's
    if ran_on_noise(twin, small) is False:
        raise LayerError(
            "a copy of the model still runs the original: its code uses a module by a global name, or keeps it in an "
            "object of its own; let it use its own submodules, self.<name>"
        )
    return twin


class Nothing(nn.Module):
    """Zeros in the place of a head: ``(N, K)`` to ``(N, C)``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, features: Tensor) -> Tensor:
        """Zeros of the features' dtype."""
        return features.new_zeros(*features.shape[:-1], self.num_classes)


class Pointwise(nn.Module):
    """A linear layer in the place of a 1x1 convolution: ``(N, K, *positions)`` to ``(N, C, *positions)``."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, maps: Tensor) -> Tensor:
        """The linear layer at each position."""
        out: Tensor = self.linear(maps.movedim(1, -1)).movedim(-1, 1)
        return out
