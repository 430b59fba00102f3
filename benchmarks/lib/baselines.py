"""What others detect adversarial images by, on the network and the images of this benchmark.

Largest softmax; Mahalanobis distances of pooled features (Lee et al. 2018, "A simple unified framework for detecting
out-of-distribution samples and adversarial attacks", without its input preprocessing); critical data routing paths
(Wang et al. 2018, "Interpret neural networks by identifying critical data routing paths", section 3).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters import PathDecoupler
from captum_classfilters.core.borrow import borrowed

# of Wang et al., section 3.2: 30 steps of SGD at .1 with momentum .9, gamma .05
STEPS, RATE, MOMENTUM, GAMMA = 30, 0.1, 0.9, 0.05


def softmax_score(decoupler: PathDecoupler, images: Tensor, size: int = 500) -> np.ndarray:
    """One minus the largest probability, ``(N,)``."""
    with torch.no_grad():
        return torch.cat([1 - decoupler(part).softmax(1).amax(1) for part in images.split(size)]).double().numpy()


class Mahalanobis:
    """Distance of each layer's pooled features to the nearest class mean, with one covariance: ``(N, L)``."""

    def __init__(self, decoupler: PathDecoupler, images: Tensor, labels: Tensor) -> None:
        self.decoupler = decoupler
        self.means, self.precisions = [], []
        for features in self.features(images):
            means = torch.stack([features[labels == label].mean(0) for label in labels.unique()])
            apart = features - means[labels]
            covariance = apart.T @ apart / len(apart)
            self.means.append(means)
            self.precisions.append(torch.linalg.pinv(covariance, rtol=1e-6, hermitian=True))

    def features(self, images: Tensor, size: int = 500) -> list[Tensor]:
        """Of every gated layer, as the next one gets it: ``(N, K_l)`` float64."""
        parts: list[list[Tensor]] = [[] for _ in self.decoupler.units]
        with ExitStack() as stack, torch.no_grad():
            for index, unit in enumerate(self.decoupler.units):
                module = self.decoupler.model.get_submodule(unit.site)
                keep = parts[index]

                def hook(module: nn.Module, args: object, output: Tensor, keep: list[Tensor] = keep) -> None:
                    keep.append(output.relu().mean((2, 3)).double())

                stack.callback(module.register_forward_hook(hook).remove)
            for part in images.split(size):
                self.decoupler(part)
        return [torch.cat(part) for part in parts]

    def read(self, images: Tensor) -> np.ndarray:
        found = []
        for features, means, precision in zip(self.features(images), self.means, self.precisions, strict=True):
            apart = features[:, None] - means
            found.append(torch.einsum("nck,kl,ncl->nc", apart, precision, apart).amin(1))
        return torch.stack(found, 1).numpy()


def critical_paths(decoupler: PathDecoupler, images: Tensor, size: int = 250) -> np.ndarray:
    """For each image the gates, one for each channel, that keep what the network says and are few: ``(N, K)``."""
    return np.concatenate([_critical(decoupler, part).numpy() for part in images.split(size)])


def _critical(decoupler: PathDecoupler, images: Tensor) -> Tensor:
    gates = [torch.ones(len(images), channels, requires_grad=True) for channels in decoupler.channels]
    optimizer = torch.optim.SGD(gates, RATE, MOMENTUM)
    with borrowed(decoupler, grad=True), _without_gradients(decoupler):
        with torch.no_grad():
            wanted = decoupler(images).softmax(1)
        best = torch.cat([gate.detach() for gate in gates], 1)
        with _multiplied(decoupler, gates):
            for _ in range(STEPS):
                logits = decoupler(images)
                loss = F.cross_entropy(logits, wanted, reduction="sum") + GAMMA * sum(gate.sum() for gate in gates)
                now = torch.cat([gate.detach() for gate in gates], 1)
                # the sparsest that still says the same
                same = logits.argmax(1) == wanted.argmax(1)
                better = same & (now.sum(1) < best.sum(1))
                best[better] = now[better]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for gate in gates:
                        gate.clamp_(0)
    return best


@contextmanager
def _multiplied(decoupler: PathDecoupler, gates: list[Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for unit, gate in zip(decoupler.units, gates, strict=True):

            def hook(module: nn.Module, args: object, output: Tensor, gate: Tensor = gate) -> Tensor:
                return output * gate[:, :, None, None]

            stack.callback(decoupler.model.get_submodule(unit.site).register_forward_hook(hook).remove)
        yield


@contextmanager
def _without_gradients(decoupler: PathDecoupler) -> Iterator[None]:
    """Of parameters, which nothing needs."""
    wanted = [parameter for parameter in decoupler.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
