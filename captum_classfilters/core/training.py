"""The training loop of this package and its checkpoint: stops and resumes to the same bits.

`Training` is the loop. A `Task` says what is minimised. `heads/recover.py` and `gating/label_sensitive.py` hold tasks.
"""

import copy
import hashlib
import io
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from captum_classfilters.core.batches import Batches
from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import FileFormatError, OptionError, brief
from captum_classfilters.core.files import check_folder, replacing
from captum_classfilters.core.stream import Placement, Samples, refuse_iterator, samples

# 1: until 0.1, one format for `recover` and another for `LabelSensitiveTraining.fit`
_VERSION = 2
# So many numbers at either end of a tensor tell batches apart
_END = 4096

Schedule: TypeAlias = "torch.optim.lr_scheduler.LRScheduler"


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state, and how often it writes it.

    The state is written after every epoch and after every ``every`` steps. An older file stays whole until the new one
    is. If the file is there when a training starts, the training goes on from it.

    Attributes:
        path: The file.
        every: Steps between two writes.

    Raises:
        OptionError: ``every`` is not a positive integer.

    Example:
        >>> Checkpoint("run.pt", every=200)
        Checkpoint(path='run.pt', every=200)
    """

    path: str | os.PathLike[str]
    every: int = 1000

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", integer(self.every, "every", 1))

    @classmethod
    def of(cls, value: "str | os.PathLike[str] | Checkpoint | None") -> "Checkpoint | None":
        """A path as a checkpoint with the usual interval; a checkpoint and None as they are."""
        return value if value is None or isinstance(value, cls) else cls(value)  # type: ignore[arg-type]


class Task(ABC):
    """What a `Training` minimises, and what belongs to it besides network, optimisers and schedules.

    `loss` must be overridden. The other hooks do nothing by themselves.

    Attributes:
        name: Which task this is; a checkpoint of another one is refused.
    """

    name = "training"

    @abstractmethod
    def loss(self, inputs: tuple[Any, ...], labels: Tensor, epoch: int, place: int) -> Tensor:
        """A scalar to call ``backward`` on; ``epoch`` and ``place``, the batch's in the loader, are counted from 0."""

    def before_step(self) -> None:
        """Between ``backward`` and the step of the optimisers: clip or mask gradients here."""

    def after_step(self) -> None:
        """After the step of the optimisers."""

    def refuse_step(self) -> None:
        """`loss` or ``backward`` failed: undo what the forward pass changed."""

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        """Entries of the epoch's row in the history, besides ``epoch`` and the mean ``loss``."""
        return {}

    def between_epochs(self, epoch: int) -> bool:
        """Before the first epoch, between two and after the last one. True: something is new and has to be kept."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the task; rank 0's holds for all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def rank_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the task for each rank."""
        return {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Take back what `rank_state` gave."""


class Training:
    """A training in progress: epochs over a loader, and a checkpoint from which it goes on to the same bits.

    Args:
        network: What is trained, unwrapped, on its device. Batches follow its first floating parameter.
        task: What is minimised.
        optimizers: Those that step after every batch.
        schedules: Those that step after every epoch.
        checkpoint: Where the state is kept; None: nowhere.
        options: What a checkpoint must agree in.
        seed: Each epoch begins with a seed of its own, made from this one. None: torch's generator runs on.
        group: The process group of a distributed training; None: one process.

    Attributes:
        epoch: Epochs that are done.
        step: Batches of the present epoch that are done.
        history: One row for each epoch: ``epoch``, mean ``loss``, and what the task adds.

    Raises:
        FileNotFoundError, IsADirectoryError: The checkpoint cannot be written.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        optimizers: Sequence[Optimizer],
        *,
        schedules: Sequence[Schedule] = (),
        checkpoint: Checkpoint | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        group: Any = None,
    ) -> None:
        self._network, self._task = network, task
        self._optimizers, self._schedules = optimizers, schedules
        self._path = None if checkpoint is None else Path(checkpoint.path)
        self._every = None if checkpoint is None else checkpoint.every
        self._options = plain(dict(options or {}) | ({} if seed is None else {"seed": seed}))
        self._seed, self._group = seed, group
        self._rank = 0 if group is None else dist.get_rank(group)
        self._placement = Placement.of(network)
        self.epoch, self.step = 0, 0
        self.history: list[dict[str, Any]] = []
        # of the present epoch
        self._loss_sum, self._samples = 0.0, 0
        # the random state at the start of the present epoch, and after the last whole step
        self._start: dict[str, Any] | None = None
        self._latest: dict[str, Any] | None = None
        # False while a step changes the weights: no training can go on from a state in the middle of a step
        self._whole = True
        self._loader: dict[str, Any] = {}
        if self._path is not None:
            check_folder(self._path)
            # a run that is resumed goes on with plain numbers, so one that is not must do so, too
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group.update({key: plain(value) for key, value in group.items() if key != "params"})
            for schedule in schedules:
                _make_plain(schedule)
            self._check_state()

    def _check_state(self) -> None:
        """Refuse at once what could be written, but never be read again."""
        state, file = _skeleton(self._parts_state()), io.BytesIO()
        try:
            torch.save(state, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:  # torch and pickle raise many kinds
            raise OptionError(
                f"the state of the network, an optimiser or a scheduler holds what no checkpoint can keep "
                f"({brief(error)}); use plain numbers, lists and tensors there, or train without checkpoint="
            ) from error

    def run(self, loader: Iterable[Any], epochs: int, show_progress: bool = False) -> None:
        """Train until ``epochs`` are done, those of the checkpoint included.

        The network is trained in train mode; if it comes in train mode, its modules keep their own modes. Afterwards
        all modes are as before.

        Args:
            loader: Batches ``(inputs, labels)``, read once for each epoch.
            epochs: How many.
            show_progress: A tqdm bar for each epoch, on rank 0.

        Raises:
            EmptyLoaderError: The loader gave no sample, or can be read only once.
        """
        if epochs - self.epoch > 1:
            refuse_iterator(loader, "loader")
        self._loader = _loader_facts(loader) if self._path is not None else {}
        modes = [module.training for module in self._network.modules()]
        if not self._network.training:
            self._network.train()
        try:
            if self.step == 0:
                self._keep_random(loader)
            while True:
                if self.step == 0 and self._task.between_epochs(self.epoch):
                    self._keep_random(loader)
                    self.save()
                if self.epoch >= epochs:
                    break
                self._one_epoch(loader, epochs, show_progress)
                self.save()
        finally:
            for module, mode in zip(self._network.modules(), modes, strict=True):
                module.training = mode

    def _one_epoch(self, loader: Iterable[Any], epochs: int, show_progress: bool) -> None:
        for sampler in samplers(loader):
            if callable(shuffle := getattr(sampler, "set_epoch", None)):
                shuffle(self.epoch)
        if self.step == 0:
            if self._seed is not None:
                # the loader draws its order at its start, so a resumed epoch sees the same order
                torch.manual_seed(self._seed + self.epoch)
            self._start = None if self._path is None else get_random(self._placement.device, loader)

        def restore() -> None:
            # before the next batch is made: its augmentation may draw random numbers, too
            if self._latest is not None:
                set_random(self._latest, self._placement.device, loader)

        with samples(
            loader,
            placement=self._placement,
            description=f"epoch {self.epoch + 1}/{epochs}",
            show_progress=show_progress and self._rank == 0,
            skip=self.step,
            on_skipped=restore,
        ) as stream:
            for batch in stream:
                self._one_step(batch)
                self._keep_random(loader)
                if self._every is not None and self.step % self._every == 0:
                    self.save()
        row = {"epoch": self.epoch, "loss": self._loss_sum / self._samples, **self._task.after_epoch(self.epoch)}
        for schedule in self._schedules:
            schedule.step()
        self.history.append(row)
        self.epoch, self.step, self._loss_sum, self._samples = self.epoch + 1, 0, 0.0, 0
        self._keep_random(loader)

    def _one_step(self, batch: Samples) -> None:
        labels: Tensor = batch.labels  # type: ignore[assignment]
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        try:
            loss = self._task.loss(batch.inputs, labels, self.epoch, batch.place)
            loss.backward()  # type: ignore[no-untyped-call]
        except BaseException:
            self._task.refuse_step()
            raise
        self._task.before_step()
        self._whole = False
        for optimizer in self._optimizers:
            optimizer.step()
        self._task.after_step()
        self._loss_sum += float(loss.detach() * batch.size)
        self._samples += batch.size
        self.step = batch.place + 1
        self._whole = True

    def _keep_random(self, loader: Iterable[Any]) -> None:
        if self._path is not None:
            self._latest = get_random(self._placement.device, loader)

    # -- the checkpoint --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, unless a step is in progress; all ranks call this together."""
        if self._path is None or not self._whole:
            return
        mine = {
            "task": self._task.rank_state(), "history": self.history, "loss_sum": self._loss_sum,
            "samples": self._samples, "start": self._start, "latest": self._latest, "loader": self._loader,
        }  # fmt: skip
        ranks = self._all_ranks(mine)
        if self._rank == 0:
            state = {
                "kind": self._kind, "version": _VERSION, "options": self._options,
                "epoch": self.epoch, "step": self.step, "ranks": ranks, **self._parts_state(),
            }  # fmt: skip
            with replacing(self._path) as beside:
                torch.save(state, beside)
        if self._group is not None:
            # no rank goes on, or starts anew, from a file that is not there yet
            dist.barrier(self._group)

    def resume(self, loader: Iterable[Any]) -> None:
        """Go on from the checkpoint, if there is one; a checkpoint that does not fit changes nothing.

        Args:
            loader: What `run` will read. The states of its generators are put back.

        Raises:
            FileFormatError: The checkpoint is broken, or of another training or version.
        """
        if self._path is None:
            return
        path, present = self._path, self._all_ranks(self._path.is_file())
        if len(set(present)) > 1:
            raise FileFormatError(
                f"only ranks {[rank for rank, is_there in enumerate(present) if is_there]} of {len(present)} see "
                f"{path}; put it where all of them can read it, or delete it to start anew"
            )
        if not present[0]:
            return
        before = copy.deepcopy(self._parts_state()), copy.deepcopy(self._task.rank_state())
        random_before = get_random(self._placement.device, loader)

        def undo() -> None:
            self._load_parts(before[0])
            self._task.load_rank_state(before[1])
            set_random(random_before, self._placement.device, loader)

        try:
            state = torch.load(path, map_location=self._placement.device, weights_only=True)
            self._check_kind(state)
            self._load_parts(state)
            mine = state["ranks"][self._rank]
            _check_progress(state, mine)
            self._task.load_rank_state(mine["task"])
            self.epoch, self.step = state["epoch"], state["step"]
            self.history, self._loss_sum, self._samples = mine["history"], mine["loss_sum"], mine["samples"]
            self._start, self._latest = mine["start"], mine["latest"]
            begin = self._start if self.step else self._latest
            if begin is not None:
                set_random(begin, self._placement.device, loader)
            _check_loader(mine.get("loader", {}), _loader_facts(loader), self.step)
        except Exception as error:  # torch.load reports a broken file by many kinds of error
            undo()
            raise FileFormatError(
                f"{path} is not a whole checkpoint of this training ({brief(error, 600)}); delete it to start anew, or "
                "pass the model, the loader and the options it was made with"
            ) from error
        except BaseException:
            undo()
            raise

    @property
    def _kind(self) -> str:
        return f"captum_classfilters {self._task.name}"

    def _check_kind(self, state: Mapping[str, Any]) -> None:
        if state["version"] == 1:
            raise ValueError(
                "an older version of captum_classfilters wrote it, in format 1, which this version does not read; "
                "finish that training with the older version"
            )
        if (state["kind"], state["version"]) != (self._kind, _VERSION):
            raise ValueError(
                f"expected {self._kind!r} in format {_VERSION}, got {state['kind']!r} in format {state['version']}"
            )
        saved = state["options"]
        changed = {name: value for name, value in self._options.items() if saved.get(name) != value}
        if changed:
            pairs = [f"{name} was {saved.get(name)!r}, is {value!r}" for name, value in sorted(changed.items())]
            raise ValueError(f"it was made with other options: {', '.join(pairs)}")

    def _parts_state(self) -> dict[str, Any]:
        return {
            "task": plain(self._task.state_dict()),
            "network": self._network.state_dict(),
            "optimizers": [plain(optimizer.state_dict()) for optimizer in self._optimizers],
            "schedules": [plain(schedule.state_dict()) for schedule in self._schedules],
        }

    def _load_parts(self, state: Mapping[str, Any]) -> None:
        parts: list[Any] = [self._task, self._network, *self._optimizers, *self._schedules]
        states = [state["task"], state["network"], *state["optimizers"], *state["schedules"]]
        for part, saved in zip(parts, states, strict=True):
            part.load_state_dict(saved)

    def _all_ranks(self, mine: Any) -> list[Any]:
        if self._group is None:
            return [mine]
        gathered: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(gathered, mine, self._group)
        return gathered


def plain(value: Any) -> Any:
    """``value`` with Python's numbers in the place of numpy's, in dicts, lists and tuples: all that checkpoints keep.

    Example:
        >>> plain({"lr": np.float64(0.5), "betas": (np.float32(0.5), 1)})
        {'lr': 0.5, 'betas': (0.5, 1)}
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    return value


def _make_plain(schedule: Any) -> None:
    """Python's numbers in the place of numpy's in a schedule and those inside of it."""
    own = vars(schedule)
    for key, value in own.items():
        own[key] = plain(value)
        for inner in value if isinstance(value, list) else ():
            if isinstance(inner, torch.optim.lr_scheduler.LRScheduler):
                _make_plain(inner)


def _skeleton(value: Any) -> Any:
    """The same structure with empty tensors."""
    if isinstance(value, Tensor):
        return torch.empty(0)
    if isinstance(value, dict):
        return {key: _skeleton(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_skeleton(entry) for entry in value)
    return value


def _check_progress(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    counts = {"epoch": state["epoch"], "step": state["step"], "samples": mine["samples"]}
    if any(type(value) is not int or value < 0 for value in counts.values()):
        raise ValueError(f"epoch, step and samples must be integers of at least 0, got {counts}")
    history = mine["history"]
    if not isinstance(history, list) or len(history) != state["epoch"] or type(mine["loss_sum"]) is not float:
        raise ValueError("its history is not that of its epochs")


def _loader_facts(loader: Any) -> dict[str, Any]:
    """What must be the same of a loader with which a training goes on; it may lose or gain samples."""
    loader = loader.loader if isinstance(loader, Batches) else loader
    if isinstance(loader, list | tuple):
        return {"batches": [hashlib.sha256(b"".join(_contents(batch))).hexdigest()[:16] for batch in loader]}
    size = getattr(loader, "batch_size", None)
    return {"batch_size": size} if type(size) is int else {}


def _contents(value: Any) -> Iterator[bytes]:
    """What tells a list of batches from another: shapes, and both ends of every tensor."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        ends = torch.cat([flat[:_END], flat[-_END:]]).cpu()
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield (ends if ends.is_complex() else ends.double()).numpy().tobytes()
    elif isinstance(value, list | tuple | Mapping):
        yield f"{len(value)}".encode()
        for part in value.items() if isinstance(value, Mapping) else value:
            yield from _contents(part)
    elif isinstance(value, str | bytes | int | float | None):
        yield repr(value).encode()


def _check_loader(saved: Mapping[str, Any], facts: Mapping[str, Any], step: int) -> None:
    # a list of batches has no batch_size, a DataLoader no contents without reading them
    sizes = saved.get("batch_size"), facts.get("batch_size")
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(f"it was made with another loader: batch_size was {sizes[0]}, is {sizes[1]}")
    before, now = saved.get("batches"), facts.get("batches")
    if before is None or now is None:
        return
    if before[:step] != now[:step]:
        raise ValueError(f"it was made with another loader: batches before step {step} of the list are not the same")
    if not {*before} & {*now}:
        raise ValueError("it was made with another loader: batches of the list are others, all of them")


# -- random states -------------------------------------------------------------------------------------------------


def get_random(device: torch.device, loader: Any) -> dict[str, Any]:
    """The state of every generator a training may draw from: torch's, numpy's, Python's, the loader's own."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random(state: dict[str, Any], device: torch.device, loader: Any) -> None:
    """Put back what `get_random` gave.

    Raises:
        OptionError: The loader has more or fewer generators than the one whose states were kept.
    """
    generators = _generators(loader)
    if len(generators) != len(state["loader"]):
        raise OptionError(
            f"the loader has {len(generators)} generators, the one whose states were kept had {len(state['loader'])}; "
            "pass one that was made the same way"
        )
    for generator, saved in zip(generators, state["loader"], strict=True):
        generator.set_state(saved.cpu())
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def samplers(loader: Any) -> list[Any]:
    """The samplers of a DataLoader, the one inside of its batch sampler among them."""
    batches = getattr(loader, "batch_sampler", None)
    candidates = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return list({id(sampler): sampler for sampler in candidates if sampler is not None}.values())


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers were given; one that several share comes once."""
    candidates = [getattr(owner, "generator", None) for owner in (loader, *samplers(loader))]
    return list({id(g): g for g in candidates if isinstance(g, torch.Generator)}.values())
