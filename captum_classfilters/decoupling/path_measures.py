"""What the paths of a trained decoupler are compared with: gates that are the same for every image."""

import torch
from torch import Tensor

from captum_classfilters.core.errors import OptionError
from captum_classfilters.decoupling.decoupler import PathDecoupler

_STEPS = 40


def l1_gates(decoupler: PathDecoupler, image: Tensor, macs: float) -> tuple[Tensor, ...]:
    """Close the filters of smallest l1 norm, the same share in every gated layer, down to a share of the MACs.

    Source: "Pruning filters for efficient ConvNets" (Li et al. 2017), section 3.1, with one share for all layers; the
    "L1" rows of "Interpretable neural network decoupling", table 2.

    Args:
        decoupler: Whose layers are pruned; use the gates in ``decoupler.frozen``.
        image: ``(1, colours, H, W)``: its size is that of the images.
        macs: Share of the network's MACs that may remain, in (0, 1].

    Returns:
        For each layer ``(1, K_l)`` float32, 0 or 1; at least one filter stays in each.

    Raises:
        OptionError: ``macs`` is out of range, or less than what cannot be pruned.
    """
    if not 0 < macs <= 1:
        raise OptionError(f"macs is a share in (0, 1], got {macs!r}")
    first = next(decoupler.model.parameters())
    costs = decoupler.costs(image.to(first.device, first.dtype))
    weights = [decoupler.model.get_submodule(name).weight.detach() for name in decoupler.layers]
    norms = [weight.flatten(1).abs().sum(1) for weight in weights]
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        share = (low + high) / 2
        spent = float(costs.of(_kept(norms, share), controllers=False)) / costs.dense
        low, high = (share, high) if spent <= macs else (low, share)
    gates = _kept(norms, high if macs == 1 else low)
    if float(costs.of(gates, controllers=False)) / costs.dense > macs:
        raise OptionError(
            f"macs={macs} cannot be reached by pruning {len(norms)} layers: one filter in each and what is not gated "
            f"take {float(costs.of(gates, controllers=False)) / costs.dense:.3f}; ask for more"
        )
    return tuple(gate.float().to(weight.device) for gate, weight in zip(gates, weights, strict=True))


def _kept(norms: list[Tensor], share: float) -> list[Tensor]:
    """The strongest ``share`` of each layer's filters, at least one, as ``(1, K_l)`` bool."""
    gates = []
    for norm in norms:
        count = max(1, round(share * len(norm)))
        gate = torch.zeros(1, len(norm), dtype=torch.bool)
        gate[0, norm.topk(count).indices.cpu()] = True
        gates.append(gate)
    return gates
