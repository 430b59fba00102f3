"""Class activation maps by hand: float64, loops, no Captum."""

import torch
from test_equations import weights_by_loop

from captum_classfilters import LayerGradCamPlusPlus, LayerSmoothGradCamPlusPlus

CLASSES = (LayerGradCamPlusPlus, LayerSmoothGradCamPlusPlus)


def gradient_and_map(forward, layer, images, chosen, as_maps=lambda tensor: tensor):
    """In float64, without Captum; ``chosen`` picks one number of each sample's output."""
    kept = []

    def keep(module, args, output):
        kept.append(output)
        return output.clone()  # an in-place operation may follow

    handle = layer.register_forward_hook(keep)
    score = chosen(forward(images)).sum()
    handle.remove()
    return as_maps(torch.autograd.grad(score, kept[0])[0]).double(), as_maps(kept[0].detach()).double()


def by_loop(forward, layer, images, chosen, sign=1, **options):
    """Each channel's part of the map, ``(N, K, ...)``."""
    gradient, maps = gradient_and_map(forward, layer, images, chosen, **options)
    gradient = sign * gradient
    weights = weights_by_loop(gradient, gradient**2, gradient**3, maps)
    return weights.view(*weights.shape, *[1] * (maps.dim() - 2)) * maps


def of_class(*targets):
    return lambda logits: logits[torch.arange(len(logits)), list(targets) * (len(logits) // len(targets))]


def heat(model, images, target=1, layer="relu", **options):
    return LayerGradCamPlusPlus(model, layer).attribute(images, target, **options)


def close(found, expected, rtol=1e-4):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-5 * float(expected.abs().max()))
