"""How these tests read a head: networks whose logits tell images apart, and the first batch of the stream."""

from contextlib import contextmanager

import timm
import torch
import torchvision
from torch import nn

from captum_classfilters.core.head_pass import HeadPass


@contextmanager
def batches(model, loader, *, need_labels=True, need_maps=False, num_classes=None, description="", **options):
    """One pass over a loader: ``with batches(model, loader) as stream``; ``options`` are those of `HeadPass`."""
    head_pass = HeadPass(model, loader, **options)
    wanted = {"need_labels": need_labels, "need_maps": need_maps, "num_classes": num_classes}
    with head_pass.batches(**wanted, description=description) as stream:
        yield stream


def read(model, *inputs, need_maps=False, **options):
    """The first batch of the stream."""
    with batches(model, [(inputs, None)], need_labels=False, need_maps=need_maps, **options) as stream:
        return next(stream)


def random_images(count, size, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def built(make, size):
    """A network with random weights whose logits tell images apart, and two images.

    Heads that begin at zero are filled, and batch norms take their statistics from data: otherwise activations fade to
    nothing in many networks, and any feature would do.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)
        if norms:
            model.train()(random_images(4, size, seed=1))
    return model.eval(), random_images(2, size)


def assert_linear(batch, logits):
    """features @ W.T + b is the model's output, and neither the bias alone nor another image's features give it."""
    again = batch.features @ batch.head.weight.T + batch.head.bias
    scale = float(logits.abs().max())
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-4 * scale)
    assert float((logits[0] - logits[1]).abs().max()) > 2e-4 * scale


def tv(name, **options):
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **options)


def tm(name, **options):
    return lambda: timm.create_model(name, pretrained=False, num_classes=10, **options)


class Tail(nn.Module):
    """A small network whose logits go through ``tail``."""

    def __init__(self, model, tail):
        super().__init__()
        self.model = model
        self.tail = tail

    def forward(self, images):
        return self.tail(self.model(images))
