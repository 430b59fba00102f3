"""Everything that borrows the user's model, one row each; `core/test_borrow.py` checks that it is given back.

Adding a method adds a row for each of its calls that runs the model.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_classfilters import (
    ALDSplitter,
    ClassFilters,
    HeadMoments,
    InfluentialFeatures,
    PathDecoupler,
    filter_ambiguity,
    metrics,
)
from captum_classfilters.core.labels import check_range
from captum_classfilters.decoupling import PathAttribution


class Row(NamedTuple):
    """A call: ``run(model, loader)`` where it reads a loader, else ``run(model, images, target)``."""

    name: str
    reads: str  # "loader" or "tensor"
    run: Callable[..., Any]


def any_filters(model: nn.Module) -> ClassFilters:
    """A table that fits the network of the test: 4 classes, 6 channels."""
    scores = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    return ClassFilters(scores, scores.clone(), torch.ones(4, dtype=torch.int64), "histogram", "fc", tuple("abcd"))


def decoupler_of(model: nn.Module) -> PathDecoupler:
    """Gates on both convolutions; the error that a test has set into the model waits for the call to come."""
    wire: Any = model.pool
    waiting, wire.error, left = wire.error, None, wire.calls_left
    with torch.random.fork_rng():  # a new module draws its weights
        decoupler = PathDecoupler(model, ["conv1", "conv2"])
    wire.error, wire.calls_left = waiting, left
    return decoupler


def path_attribution(model: nn.Module, images: Tensor, target: int) -> tuple[Tensor, ...]:
    """Gates know no target: a bad one is an error of the caller's, after the model ran."""
    found = PathAttribution(decoupler_of(model)).attribute(images)
    check_range(torch.tensor([target]), 4)
    return found


def head_moments(model: nn.Module, loader: Any) -> HeadMoments:
    """Moments look at no labels: bad ones are an error of the caller's, after the model ran."""
    seen = []

    def recorded() -> Iterator[Any]:
        for images, labels in loader:
            seen.append(labels)
            yield images, labels

    moments = HeadMoments.collect(model, recorded())
    check_range(torch.cat(seen), 4)
    return moments


ROWS = (
    Row(
        "InfluentialFeatures.attribute(loader)",
        "loader",
        lambda model, loader: InfluentialFeatures(model).attribute(loader),
    ),
    Row(
        "InfluentialFeatures.attribute(tensor)",
        "tensor",
        lambda model, images, target: InfluentialFeatures(model).attribute(images, target),
    ),
    Row(
        "InfluentialFeatures.explain",
        "tensor",
        lambda model, images, target: InfluentialFeatures(model).explain(images, target, any_filters(model), 2),
    ),
    Row(
        "ALDSplitter.attribute",
        "tensor",
        lambda model, images, target: ALDSplitter(model).attribute(images, target, stage=1, min_size=2),
    ),
    Row("HeadMoments.collect", "loader", lambda model, loader: head_moments(model, loader)),
    Row("filter_ambiguity", "loader", lambda model, loader: filter_ambiguity(model, loader, steps=3)),
    Row("PathDecoupler.paths", "loader", lambda model, loader: decoupler_of(model).paths(loader)),
    Row("PathAttribution.attribute", "tensor", path_attribution),
    Row("metrics.path_accuracy", "loader", lambda model, loader: metrics.path_accuracy(decoupler_of(model), loader)),
)


class Snapshot(NamedTuple):
    """What must be as before: of the model, and of torch."""

    state: list[tuple[str, Tensor]]  # keys, their order, values
    identities: dict[str, int]
    classes: dict[str, type]
    training: dict[str, bool]
    attributes: dict[str, list[str]]
    requires_grad: dict[str, bool]
    grads: dict[str, tuple[int, Tensor | None]]
    hooks: dict[str, list[int]]
    torch: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Take the snapshot; values are copied."""
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(
            state=[(key, value.clone()) for key, value in model.state_dict().items()],
            identities={name: id(tensor) for name, tensor in [*parameters.items(), *model.named_buffers()]},
            classes={name: type(module) for name, module in modules.items()},
            training={name: module.training for name, module in modules.items()},
            attributes={name: sorted(vars(module)) for name, module in modules.items()},
            requires_grad={name: parameter.requires_grad for name, parameter in parameters.items()},
            grads={name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in parameters.items()},
            hooks=dict(_hooks(model)),
            torch={
                "grad mode": torch.is_grad_enabled(),
                "inference mode": torch.is_inference_mode_enabled(),
                "default dtype": torch.get_default_dtype(),
                "random state": torch.get_rng_state().tolist(),
                "global hooks": [len(found) for found in _global_hooks()],
            },
        )

    def assert_same(self, before: "Snapshot") -> None:
        """Fail on the first thing that differs, naming it."""
        assert [key for key, _ in self.state] == [key for key, _ in before.state]
        for (key, now), (_, was) in zip(self.state, before.state, strict=True):
            assert torch.equal(now, was), key
        for what in ("identities", "classes", "training", "attributes", "requires_grad", "hooks", "torch"):
            assert getattr(self, what) == getattr(before, what), what
        for name, (identity, value) in self.grads.items():
            was_identity, was = before.grads[name]
            assert identity == was_identity, f"grad of {name}"
            assert value is None or torch.equal(value, was), f"grad of {name}"


def _hooks(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            if "_hooks" in attribute and hasattr(value, "keys"):
                yield f"{name}.{attribute}", list(value)


def _global_hooks() -> list[Any]:
    everything = vars(torch.nn.modules.module)
    return [everything[name] for name in sorted(everything) if name.startswith("_global_") and "hooks" in name]
