"""Paths of images and of their adversarial twins, to train and judge a detector.

N images are read, n of them are kept; K channels in all layers together.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple
from warnings import warn

import numpy as np
import torch
from torch import Tensor

from captum_classfilters.attacks import Attack, Normalized
from captum_classfilters.attacks.oracle import check_images, one_input
from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import AttackFailedWarning, OptionError
from captum_classfilters.core.files import checked_tensor, contents, read, write
from captum_classfilters.core.stream import Placement, Samples, samples
from captum_classfilters.decoupling import PathDecoupler, Paths
from captum_classfilters.decoupling.path_reader import PathReader

_KIND, _VERSION = "PathPairs", 1
_PARTS = ("clean", "adversarial", "noise", "misclassified")
_BESIDE = ("index", "images", "adversarial_images", "noise_images")


@dataclass(frozen=True, eq=False)
class PathPairs:
    """Paths of images that a network classified correctly, and of the same images after an attack that fooled it.

    Attributes:
        clean: Paths of n images.
        adversarial: Paths of the same images, attacked; labels are still the true classes.
        noise: Paths of the same images with a random change of the same size. They count as clean, because a detector
            of attacks should not detect noise.
        misclassified: Paths of the images that were misclassified and not attacked. They are clean as well.
        index: ``(n,)`` int64: the position of each pair's image in the loader. Pairs of several attacks can be grouped
            by it if the loader does not shuffle.
        tried: How many images were attacked; with ``max_pairs`` up to the image of the last pair.
        succeeded: How often the attack changed the predicted class; this is n until pairs are selected by an index.
        images: ``(n, colours, H, W)``, or None if ``keep_images`` was False.
        adversarial_images: The same after the attack.
        noise_images: The same with noise.
    """

    clean: Paths
    adversarial: Paths
    noise: Paths
    misclassified: Paths
    index: Tensor
    tried: int
    succeeded: int
    images: Tensor | None = None
    adversarial_images: Tensor | None = None
    noise_images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def dropped(self) -> int:
        """How many images were attacked without success."""
        return self.tried - self.succeeded

    @property
    def success(self) -> float:
        """Share of the attacked images that were fooled; NaN if none was attacked."""
        return self.succeeded / self.tried if self.tried else float("nan")

    def __getitem__(self, rows: Any) -> "PathPairs":
        """Some of the pairs; ``tried``, ``succeeded`` and ``misclassified`` stay as they are for all pairs."""
        if isinstance(rows, Integral):  # one pair is a row as well; IndexError ends a loop over the pairs
            index = range(len(self))[int(rows)]
            rows = slice(index, index + 1)
        kept: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows] for name in (*_PARTS[:3], *_BESIDE)
        }
        return replace(self, **kept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write safetensors with a JSON header."""
        tensors = {f"{part}.{name}": value for part in _PARTS for name, value in getattr(self, part).tensors().items()}
        tensors |= {name: value for name in _BESIDE if (value := getattr(self, name)) is not None}
        write(
            path,
            tensors,
            kind=_KIND,
            version=_VERSION,
            meta={**self.clean.meta(), "tried": self.tried, "succeeded": self.succeeded},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PathPairs":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, FileFormatError: There is no such file, or it holds something else.
        """
        tensors, meta = read(path, kind=_KIND, version=_VERSION)
        with contents(path, "whole pairs"):
            by_part = {
                part: {name[len(part) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{part}.")}
                for part in _PARTS
            }
            parts: dict[str, Any] = {part: Paths.checked(by_part[part], meta) for part in _PARTS}
            pairs = len(parts["clean"])
            checked_tensor(tensors, "index", torch.int64, pairs)
            kept = [name for name in _BESIDE[1:] if name in tensors]
            for name in kept:
                checked_tensor(tensors, name, None, pairs, *tensors[kept[0]].shape[1:])
            if {len(parts[part]) for part in _PARTS[:3]} != {pairs}:
                raise ValueError("clean, adversarial and noisy images must be as many")
            tried = integer(meta["tried"], "tried", 0, 2**62)
            succeeded = integer(meta["succeeded"], "succeeded", 0, tried)
            beside: dict[str, Any] = {name: tensors.get(name) for name in _BESIDE}
            return cls(**parts, **beside, tried=tried, succeeded=succeeded)

    def __repr__(self) -> str:
        return (
            f"PathPairs({self.succeeded} of {self.tried} attacked images fooled the network, "
            f"{len(self.misclassified)} were misclassified before)"
        )

    def stack(self, *, noise: bool = True) -> tuple[Paths, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Clean and adversarial paths in one table, for scikit-learn, grouped by image; see `pairs.stack_pairs`.

        Args:
            noise: Include the noisy twins, as clean.

        Returns:
            ``(X, y, groups)``: `Paths`, which scikit-learn takes as ``(3n, K)`` or ``(2n, K)`` bits; 1 for adversarial
            and 0 for clean; one group for an image and its twins.
        """
        return stack_pairs(self.clean, self.adversarial, self.noise if noise else None, groups=self.index)


def stack_pairs(
    clean: Paths, adversarial: Paths, noise: Paths | None = None, *, groups: Any = None
) -> tuple[Paths, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Clean and adversarial paths in one table, for scikit-learn.

    Args:
        clean: Paths of n images.
        adversarial: Paths of the same images in the same order.
        noise: Paths of these images with noise; they count as clean and belong to the same groups.
        groups: ``(n,)``, the image of each pair; None: a number for each pair.

    Returns:
        ``(X, y, groups)``: `Paths`, which scikit-learn takes as ``(2n, K)`` or ``(3n, K)`` bits; 1 for adversarial and
        0 for clean, ``int64``; the same group for an image and its twins. Split by groups, so that a detector is not
        trained on twins of the paths that it is tested on.

    Raises:
        OptionError: The parts are not twins: their numbers or their true classes differ.
        MergeError: The parts are of different networks.
    """
    parts = [clean, adversarial, *([] if noise is None else [noise])]
    if len({len(part) for part in parts}) > 1:
        counts = ", ".join(str(len(part)) for part in parts)
        raise OptionError(f"clean and adversarial paths must be of the same images in the same order, got {counts}")
    for part in parts[1:]:
        if clean.labels is not None and part.labels is not None and not torch.equal(clean.labels, part.labels):
            raise OptionError("these are not twins: their true classes differ; pass both in the order of the images")
    index = np.arange(len(clean)) if groups is None else np.asarray(groups)
    if index.shape != (len(clean),):
        raise OptionError(f"groups must have shape ({len(clean)},), one for each pair, got {index.shape}")
    marks = np.repeat([0, 1, 0][: len(parts)], len(clean)).astype(np.int64)
    return Paths.merge(*parts), marks, np.tile(index, len(parts))


def adversarial_paths(
    decoupler: PathDecoupler | Normalized,
    loader: Iterable[Any],
    attack: Attack | Callable[[Tensor, Tensor], Tensor],
    *,
    logits: bool = False,
    keep_images: bool = False,
    max_pairs: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> PathPairs:
    """Attack every image that the network classifies correctly; keep paths of successful attacks and of their twins.

    Source: "Interpretable neural network decoupling", section 4.4. Differs: only attacks that succeeded count, and
    noise of the same size is a control.

    Args:
        decoupler: The network to attack, borrowed; in `Normalized` if it takes normalised images.
        loader: Batches ``(images, labels)``: pixels ``(N, colours, H, W)`` in the bounds; read once.
        attack: An `attacks.Attack`: ``Attack(PGD(decoupler, ...), epsilon=8 / 255)``. A `captum.robust.Perturbation` or
            a function ``(images, labels) -> images`` becomes an `Attack` without epsilon. An attack that was made on
            another network tests whether it transfers to this one.
        logits: Keep the gates' logits.
        keep_images: Keep the images.
        max_pairs: Stop when there are this many pairs. None: all.
        seed: Seed of the noise. Every pixel changes by the attack's ``epsilon``, up or down at random. Without an
            epsilon, or if it bounds another norm than each pixel's change, the attack's changes are moved to random
            places with random signs.
        show_progress: A tqdm bar.

    Returns:
        `PathPairs`. If the attack never succeeds, they are empty and a warning is given.

    Raises:
        OptionError: Images or attacked images lie outside the bounds or changed by more than ``epsilon``; ``attack`` is
            not an attack, or lacks an argument.
        ShapeError, DeviceError, NonFiniteError: The attack or the loader gives something that does not fit.
        LabelError, EmptyLoaderError: There are no labels, or no batch.

    An exception that ends the pass early, KeyboardInterrupt too, carries the pairs of the batches before it as
    ``error.partial_result``.

    Example:
        >>> from captum.robust import FGSM
        >>> from captum_classfilters.assets import load_demo_network, load_images, paths_file
        >>> decoupler = PathDecoupler(load_demo_network(0, "decoupled")[0]).load(paths_file())
        >>> fgsm = FGSM(decoupler, torch.nn.CrossEntropyLoss(reduction="none"), lower_bound=0, upper_bound=1)
        >>> adversarial_paths(decoupler, load_images().batches(50)[:1], Attack(fgsm, epsilon=8 / 255))
        PathPairs(26 of 48 attacked images fooled the network, 2 were misclassified before)
    """
    network = unwrap(decoupler)
    inner = network.model if isinstance(network, Normalized) else network
    if not isinstance(inner, PathDecoupler):
        raise OptionError(f"expected a PathDecoupler, or Normalized(a PathDecoupler, ...), got {type(inner).__name__}")
    max_pairs = None if max_pairs is None else integer(max_pairs, "max_pairs", 1, meaning="or None, for all")
    attack = attack if isinstance(attack, Attack) else Attack(attack)
    attacked = unwrap(getattr(attack.perturbation, "forward_func", None))
    if isinstance(network, Normalized) and (attacked is inner or attacked is inner.model):
        raise OptionError(
            "the attack was made on the network without Normalized, which takes other images; make it on Normalized"
        )
    generator = torch.Generator().manual_seed(integer(seed, "seed"))
    finished: list[_Batch] = []
    batches = samples(loader, placement=Placement.of(inner), description="attack", show_progress=show_progress)
    with borrowed(network, grad=True), batches as stream:
        reader = _PixelReader(network, PathReader(inner, logits))
        try:
            for batch in _attacked_batches(reader, stream, attack, generator, keep_images):
                finished.append(batch)
                if max_pairs is not None and sum(len(part.clean) for part in finished) >= max_pairs:
                    break
        except BaseException as error:
            if finished:
                error.partial_result = _together(finished)  # type: ignore[attr-defined]
            raise
    pairs = _together(finished)
    if not len(pairs):
        warn(_in_vain(pairs, attack), AttackFailedWarning, stacklevel=2)
    return pairs if max_pairs is None or len(pairs) <= max_pairs else _first(pairs, max_pairs, finished)


class _PixelReader(NamedTuple):
    """Reads paths of pixels, and normalises them first if the network takes normalised images."""

    network: Any
    reader: PathReader

    def paths(self, images: Tensor, labels: Tensor, index: int) -> Paths:
        normalised = self.network.normalize(images) if isinstance(self.network, Normalized) else images
        return self.reader.read((normalised,), labels, index)


class _Batch(NamedTuple):
    clean: Paths
    adversarial: Paths
    noise: Paths
    misclassified: Paths
    pair_index: Tensor  # positions of the pairs' images in the loader
    attacked: Tensor  # positions of all attacked images in the loader
    images: tuple[Tensor, ...]  # clean, attacked, with noise; empty if images are not kept


def _attacked_batches(
    reader: _PixelReader, stream: Iterator[Samples], attack: Attack, generator: torch.Generator, keep_images: bool
) -> Iterator[_Batch]:
    first = 0
    for number, inputs, targets, *_ in stream:
        images: Tensor = one_input(inputs, number)
        labels: Tensor = targets  # type: ignore[assignment]  # `samples` refuses batches without labels
        check_images(images, attack.bounds, what=f"images of batch {number}")
        images = images.detach()
        before = reader.paths(images, labels, number)
        right = torch.eq(before.predictions, labels.cpu())
        images, classes, clean = images[right.to(images.device)], labels[right.to(labels.device)], before[right]
        changed = attack(images, classes) if len(images) else images
        after = reader.paths(changed, classes, number) if len(images) else clean
        fooled = torch.ne(after.predictions, classes.cpu())
        images, changed = images[fooled.to(images.device)], changed[fooled.to(changed.device)]
        classes = classes[fooled.to(classes.device)]
        noisy = _noisy(images, changed, attack, generator)
        noise = reader.paths(noisy, classes, number) if len(noisy) else after[fooled]
        attacked = first + right.nonzero()[:, 0]
        first += len(right)
        yield _Batch(
            clean=clean[fooled],
            adversarial=after[fooled],
            noise=noise,
            misclassified=before[~right],
            pair_index=attacked[fooled],
            attacked=attacked,
            images=(images.cpu(), changed.cpu(), noisy.cpu()) if keep_images else (),
        )


def _noisy(images: Tensor, changed: Tensor, attack: Attack, generator: torch.Generator) -> Tensor:
    """Images with random changes as large as those of the attack."""
    if not len(images):
        return images
    signs = (torch.rand(images.shape, generator=generator) < 0.5).to(images) * 2 - 1
    moves = (changed - images).abs()
    # if pixels change by far less on average, epsilon bounds another norm, such as L2
    if attack.epsilon is not None and bool((moves.square().mean() > (attack.epsilon / 4) ** 2).all()):
        change = signs * attack.epsilon
    else:
        order = torch.rand(len(images), images[0].numel(), generator=generator).argsort(1)
        moved = moves.flatten(1).gather(1, order.to(images.device))
        change = signs * moved.view_as(images)
    noisy: Tensor = (images + change).clamp(*attack.bounds)
    return noisy


def _together(batches: list[_Batch]) -> PathPairs:
    clean, adversarial, noise, misclassified, index, attacked, images = zip(*batches, strict=True)
    kept: Any = [torch.cat(kind) for kind in zip(*images, strict=True)]  # empty where no images are kept
    return PathPairs(
        Paths.merge(*clean), Paths.merge(*adversarial), Paths.merge(*noise), Paths.merge(*misclassified),
        torch.cat(index), sum(map(len, attacked)), sum(map(len, index)), *kept,
    )  # fmt: skip


def _first(pairs: PathPairs, count: int, batches: list[_Batch]) -> PathPairs:
    """The first pairs; ``tried`` and ``succeeded`` count only images up to that of the last pair."""
    last = pairs.index[count - 1]
    tried = sum(int((batch.attacked <= last).sum()) for batch in batches)
    return replace(pairs[:count], tried=tried, succeeded=count)


def _in_vain(pairs: PathPairs, attack: Attack) -> str:
    if not pairs.tried:
        return (
            "the network classifies none of these images right, so none was attacked; look at its labels and its images"
        )
    return f"{attack.name} fooled the network on none of {pairs.tried} images; raise epsilon or its steps"
