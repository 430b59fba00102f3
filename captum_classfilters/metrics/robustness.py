"""How often does an attack fool each of several networks on the same images, and how often do random pixels?"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from captum.robust import Perturbation
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters.attacks.oracle import Bounds, Oracle, check_bounds, check_images, in_top, one_input
from captum_classfilters.core.check import integer
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.intervals import mean_interval, wilson
from captum_classfilters.core.labels import check_range
from captum_classfilters.core.stream import samples
from captum_classfilters.core.wide import portions, wide

_COLUMNS = ["model", "attack", "control", "tried", "succeeded", "success", "low", "high", "pixels", "l2"]


def attack_success(
    models: Mapping[str, nn.Module],
    loader: Iterable[Any],
    attacks: Mapping[str, Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]],
    *,
    bounds: Bounds = (0.0, 1.0),
    max_images: int | None = None,
    batch_size: int = 64,
    control: Control = Control(),
    show_progress: bool = False,
) -> pd.DataFrame:
    """Share of images on which each attack changes the predicted class of each network.

    Source: "Training interpretable CNNs towards class-specific filters", table 3. Differs: only images that all
    networks classify correctly are attacked; there are intervals, and a control that changes equally many random
    pixels.

    Args:
        models: Networks by name, from images to logits; borrowed.
        loader: Batches ``(images, labels)``, images ``(N, colours, H, W)`` in the bounds. Attacked images are kept in
            memory.
        attacks: Functions by name, from a network to its attack: ``lambda model: LocalSearch(model)``. An attack takes
            ``(images, labels)`` and returns images of the same shape, as `attacks.Attack` and a
            `captum.robust.Perturbation` do. It fails on an image if the network still predicts its label. It runs in
            eval mode, and gradients are enabled. The function runs once for each network; set the seed in it.
        bounds: Smallest and largest value of a pixel.
        max_images: Attack the first images, at most this many; shuffle the loader if its order matters. None: all.
        batch_size: Images given to an attack at once.
        control: The random sets of pixels.
        show_progress: A tqdm bar.

    Returns:
        One row for each network and attack, and below it the row of its control, ``"random (<attack>)"`` with
        ``control=True``. The control sets random pixels to random extremes of colour; their number is the median of the
        attack's successes on this network (1 if it had none). ``tried`` images (for the control: times draws);
        ``succeeded``; ``success``, the share; ``low``, ``high``: Wilson 95 % interval, for the control Student-t over
        draws; ``pixels``: mean number of changed places, ``l2``: mean Euclidean length of the change, both over
        successes, NaN where there are none.

    Raises:
        OptionError: There is nothing to compare, a name is taken, an option or a pixel is out of range, or no image is
            classified right by all networks.
        ShapeError: The loader does not give images, or an attack changed their shape.
        LabelError, EmptyLoaderError: The labels do not fit; the loader is empty.
    """
    bounds = check_bounds(bounds)
    batch_size = integer(batch_size, "batch_size", 1)
    max_images = None if max_images is None else integer(max_images, "max_images", 1)
    _check_names(models, "models")
    control_names = {name: f"random ({name})" for name in _check_names(attacks, "attacks")}
    for name in set(control_names.values()) & set(attacks):
        raise OptionError(f"an attack may not be named {name!r}, because a control has that name; rename the attack")
    for name, attack in attacks.items():
        if isinstance(attack, Perturbation):
            kind = type(attack).__name__
            raise OptionError(
                f"attack {name!r} belongs to one network; pass a function of the network: lambda model: {kind}(model)"
            )
    oracles = {name: Oracle(model, batch_size) for name, model in models.items()}
    images, labels = _all_right(oracles, loader, bounds, max_images)
    rows = []
    with tqdm(total=len(models) * len(attacks), desc="attack_success", disable=not show_progress) as bar:
        for name, oracle in oracles.items():
            for title, make in attacks.items():
                with oracle.open(grad=True):
                    outcome = _attacked(oracle, make(models[name]), title, images, labels, bounds, batch_size)
                interval = map(float, wilson(outcome.fooled.sum(), len(images)))
                rows.append([name, title, False, *_row(outcome, *interval)])
                count = _typical(outcome)
                with oracle.open():
                    parts = [
                        _measured(oracle, images, _random_pixels(images, count, bounds, generator), labels)
                        for generator in [control.generator()]
                        for _ in range(control.draws)
                    ]
                _, low, high = mean_interval([part.fooled.mean() for part in parts])
                together = _Outcome(*map(np.concatenate, zip(*parts, strict=True)))
                rows.append([name, control_names[title], True, *_row(together, float(low), float(high))])
                bar.update()
    return pd.DataFrame(rows, columns=_COLUMNS)


class _Outcome(NamedTuple):
    """For each image: whether the network is fooled, how many places changed, and the length of the change."""

    fooled: Any
    pixels: Any
    l2: Any


def _check_names(functions: Any, what: str) -> list[str]:
    if not isinstance(functions, Mapping) or not functions or not all(map(callable, functions.values())):
        got = list(functions) if isinstance(functions, Mapping) else type(functions).__name__
        raise OptionError(f"{what} must be at least one function by name, {{name: ...}}; got {got}")
    return list(functions)


def _all_right(
    oracles: Mapping[str, Oracle], loader: Iterable[Any], bounds: Bounds, most: int | None
) -> tuple[Tensor, Tensor]:
    """The images that every network classifies as their label, in the order of the loader."""
    images, labels, seen = [], [], 0
    hits = dict.fromkeys(oracles, 0)
    with samples(loader) as stream:
        for index, inputs, targets, *_ in stream:
            some: Tensor = one_input(inputs, index)
            check_images(some, bounds, f"images of batch {index}")
            wanted: Tensor = targets.to(some.device)  # type: ignore[union-attr]
            everyone = torch.ones_like(wanted, dtype=torch.bool)
            for name, oracle in oracles.items():
                with oracle.open():
                    logits = oracle.logits(some)
                check_range(wanted, logits.shape[1], index)
                right = in_top(logits, wanted)
                hits[name] += int(right.sum())
                everyone &= right
            seen += len(some)
            images.append(some[everyone].detach())
            labels.append(wanted[everyone])
            if most is not None and sum(map(len, images)) >= most:
                break
    if not any(map(len, images)):
        raise OptionError(
            f"all networks together classify none of {seen} images correctly (each alone: {hits}), and only such "
            "images are attacked; pass more images, better networks, or labels in the networks' order"
        )
    return torch.cat(images)[:most], torch.cat(labels)[:most]


def _attacked(
    oracle: Oracle, attack: Any, title: str, images: Tensor, labels: Tensor, bounds: Bounds, size: int
) -> _Outcome:
    if not callable(attack):
        raise OptionError(f"the function of attack {title!r} must return a Perturbation or a function, got {attack}")
    parts = []
    for some, wanted in portions(size, images, labels):
        placed = oracle.place(some)
        with torch.enable_grad():
            # a copy: an attack may write into what it gets
            changed = attack(placed.clone(), wanted.to(placed.device))
        if not isinstance(changed, Tensor) or changed.shape != some.shape:
            got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise ShapeError(f"attack {title!r} must return images of shape {tuple(some.shape)}, got {got}")
        check_images(changed, bounds, f"images of attack {title!r}")
        with torch.no_grad():
            parts.append(_measured(oracle, placed, changed.detach(), wanted))
    return _Outcome(*map(np.concatenate, zip(*parts, strict=True)))


def _measured(oracle: Oracle, images: Tensor, changed: Tensor, labels: Tensor) -> _Outcome:
    logits = oracle.logits(changed)
    fooled = ~in_top(logits, labels.to(logits.device))
    pixels = (changed != images).any(1).flatten(1).sum(1)
    l2 = (wide(changed) - wide(images)).flatten(1).norm(dim=1)
    return _Outcome(*(values.cpu().numpy() for values in (fooled, pixels, l2)))


def _typical(outcome: _Outcome) -> int:
    """Median number of pixels of a success; at least 1, because rounding can hide the changes of a success."""
    return max(1, round(float(np.median(outcome.pixels[outcome.fooled])))) if outcome.fooled.any() else 1


def _random_pixels(images: Tensor, count: int, bounds: Bounds, generator: torch.Generator) -> Tensor:
    """Set ``count`` random places of each image to the lower or upper bound, colour by colour."""
    shape, places = images.shape, images[0, 0].numel()
    chance = torch.rand(len(images), places, generator=generator)
    chosen = torch.zeros_like(chance, dtype=torch.bool).scatter_(1, chance.topk(min(count, places)).indices, True)
    high = torch.rand(shape, generator=generator) < 0.5
    extreme = torch.where(high, bounds[1], bounds[0]).to(images)
    return torch.where(chosen.view(len(images), 1, *shape[2:]).to(images.device), extreme, images)


def _row(outcome: _Outcome, low: float, high: float) -> list[Any]:
    fooled = outcome.fooled
    tried, succeeded = len(fooled), int(fooled.sum())
    of_successes = [float(values[fooled].mean()) if succeeded else np.nan for values in (outcome.pixels, outcome.l2)]
    return [tried, succeeded, succeeded / tried, low, high, *of_successes]
