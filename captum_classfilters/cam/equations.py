"""The equations of Grad-CAM++ and Smooth Grad-CAM++, on tensors alone.

N samples, K channels; ``*`` stands for one or more positions, such as ``h, w``.
"""

import torch
from torch import Tensor


def pixel_alphas(second: Tensor, third: Tensor, activations: Tensor) -> Tensor:
    """How much each position's gradient counts for its channel.

    Source: Chattopadhay et al. 2018, "Grad-CAM++", eq. 19: ``D2 / (2 D2 + sum(A) D3)``, where the derivatives of
    ``exp(S)`` are ``exp(S) g^p`` for a piecewise linear network, and ``exp(S)`` cancels. Differs: nothing is added to
    the denominator, so that small gradients count as large ones do; 0 where there is no gradient; and its second term
    counts only where it is positive, as it always is for Grad-CAM++ behind a ReLU. With negative activations, or with
    means over noise, it can bring the denominator near 0, and a single position would make the map, of either sign.

    Args:
        second: ``D2``, squares of gradients, ``(N, K, *)`` float64: the square of a small float32 is 0 in float32.
        third: ``D3``, their cubes.
        activations: ``A``, ``(N, K, *)``.

    Returns:
        ``(N, K, *)``, in [0, 0.5].
    """
    total = activations.double().flatten(2).sum(2).view(*activations.shape[:2], *[1] * (activations.dim() - 2))
    denominator = 2 * second + (total * third).relu()
    # 1 in place of 0: a division by 0 in the branch not taken would still be NaN for gradients
    divided = second / torch.where(denominator == 0, 1.0, denominator)
    return torch.where(denominator == 0, 0.0, divided)


def channel_weights(first: Tensor, second: Tensor, third: Tensor, activations: Tensor) -> Tensor:
    """The weight of each channel's map: its positive gradients, each position by its alpha.

    Source: Grad-CAM++, eq. 10; with means over noisy copies of the image in place of the derivatives, Omeiza et al.
    2019, "Smooth Grad-CAM++", eq. 13. Differs from the latter: it has ``D1`` in the numerator of alpha where Grad-CAM++
    has ``D2``; ``D2`` is taken, as everybody does.

    Args:
        first: ``D1``, gradients of the logit with respect to the layer, ``(N, K, *)`` float64, or their mean.
        second: ``D2``, their squares, or the mean of these.
        third: ``D3``, their cubes, or the mean of these.
        activations: ``(N, K, *)``.

    Returns:
        ``(N, K)`` float64, never below 0.
    """
    return (pixel_alphas(second, third, activations) * first.relu()).flatten(2).sum(2)
