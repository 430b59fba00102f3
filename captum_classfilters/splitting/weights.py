"""The final layer's weights, read without any data: dense, decomposed, sparse or quantised."""

from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.core.borrow import unwrap
from captum_classfilters.core.errors import HeadError, NonFiniteError, OptionError, quoted
from captum_classfilters.core.head import Head, find_head, last_head
from captum_classfilters.core.layers import find_module
from captum_classfilters.heads import DecomposedLinear


def head_weights(model: Any, layer: nn.Module | str | None) -> tuple[str, Tensor]:
    """Name of the head, and its weights ``(C, K)`` on the CPU, float32 or float64.

    Args:
        model: The model, or a function, then with ``layer``.
        layer: The head; None: the last layer with a matrix of weights.

    Raises:
        HeadError: There is none, or it is no linear layer.
        NonFiniteError: NaN or infinity among its weights.
    """
    module = unwrap(model)
    known = module if isinstance(module, nn.Module) else None
    if known is None and not isinstance(layer, nn.Module):
        raise HeadError("a bare function does not show its layers: pass layer= with the nn.Linear that is its head")
    small = _decomposed(known, layer)
    if small is not None:
        name, weight = small
    else:
        head = _head(known, layer)
        name, weight = head.name, head.module.weight.detach()
        weight = (weight if weight.layout == torch.strided else weight.to_dense()).flatten(1)
    if weight.is_meta:
        raise OptionError(f"layer {name} has no weights yet, it is on the meta device; load them first")
    # numpy, which sorts them, knows no bfloat16
    weight = weight.cpu().to(torch.promote_types(weight.dtype, torch.float32))
    # a sum is not finite if a term is not: a tenth of the time of looking at each
    rows = [] if bool(torch.isfinite(weight.sum())) else (~torch.isfinite(weight).all(1)).nonzero().flatten().tolist()
    if rows:
        raise NonFiniteError(
            f"expected finite weights, got NaN or infinity in layer {name}, classes {quoted(rows)}; load a whole "
            "checkpoint"
        )
    return name, weight


def _head(model: nn.Module | None, layer: nn.Module | str | None) -> Head:
    if layer is not None:
        return find_head(model if model is not None else layer, layer)  # type: ignore[arg-type]  # a module, above
    return last_head(model)  # type: ignore[arg-type]


def _decomposed(model: nn.Module | None, layer: nn.Module | str | None) -> tuple[str, Tensor] | None:
    """A head that `decompose` made smaller: what it left out is 0."""
    if layer is not None:
        chosen = find_module(model, layer, error=HeadError)
    else:
        # its weights are a list, not a matrix, so it is not found as the last one with a matrix
        small = [module for module in model.modules() if isinstance(module, DecomposedLinear)]  # type: ignore[union-attr]
        chosen = small[-1] if small else nn.Identity()
    if not isinstance(chosen, DecomposedLinear):
        return None
    names = {module: name for name, module in model.named_modules()} if model is not None else {}
    return names.get(chosen, type(chosen).__name__), chosen.to_dense().weight.detach()
