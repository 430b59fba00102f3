"""`recover`: retrain a network for a short while, with the paper's settings.

Stops and resumes without loss. N samples, C classes.
"""

import copy
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from captum_classfilters.core.borrow import unwrap
from captum_classfilters.core.errors import EmptyLoaderError, FileFormatError, HeadError, NonFiniteError, OptionError
from captum_classfilters.core.files import check_folder, replacing
from captum_classfilters.core.stream import check_range
from captum_classfilters.core.training import refuse_iterators, to_model

_KIND, _VERSION = "captum_classfilters recover", 1


def recover(
    model: nn.Module,
    loader: Iterable[Any],
    epochs: int = 1,
    *,
    lr: float = 1e-4,
    validation: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> nn.Module:
    """Retrain a copy of the network, all of it, on cross-entropy with Adam.

    Source: Badola et al. 2022, section 4.3: after one epoch a ResNet-20 of five features per class was back within .2 %
    of the full accuracy. Retrain the full network as a control: it gains from the epoch, too.

    Weights of linear and convolutional layers that are zero at the start stay zero, in layers that have some: a head
    with zeros keeps its few features. Random draws (dropout, the loader's order) come from ``seed``; the state of
    torch's own generators is left as it was. Under ``torch.autocast`` the forward pass follows it.

    Args:
        model: The network, on its device; not changed. Its parameters with ``requires_grad=False`` are not trained.
            Given in eval mode, all of it goes into train mode; given in train mode, batch norms frozen by hand stay so.
        loader: Batches ``(inputs, labels)``, read once for each epoch; the paper's hold 64.
        epochs: How many.
        lr: Adam's learning rate.
        validation: Batches of training images held out from ``loader``: the state that classifies most of them right
            wins, the start included. None: the last state.
        checkpoint: A file: written every so many steps, after every epoch and on an error; if it is there at the start,
            training goes on from it. A loader that shuffles by torch's generator comes again in the same order.
        checkpoint_every: Steps between two checkpoints.
        seed: Of all random draws.
        show_progress: A tqdm bar for each epoch.

    Returns:
        The retrained copy, each module in the mode in which it was given.

    Raises:
        OptionError: Epochs, lr or checkpoint_every out of range; nothing to train; a half-precision network.
        NonFiniteError: The loss is NaN or infinite; names epoch and step. The step is not taken.
        LabelError, ShapeError, EmptyLoaderError: As their messages say.
        FileFormatError: The checkpoint is broken or another network's.

    Whatever ends the training early, KeyboardInterrupt included, carries the best network so far as
    ``error.partial_result``.
    """
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise OptionError(f"epochs must be an integer of at least 1, got {epochs!r}")
    if not isinstance(lr, int | float) or not lr > 0:
        raise OptionError(f"lr must be above 0, got {lr!r}")
    if not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise OptionError(f"checkpoint_every must be an integer of at least 1, got {checkpoint_every!r}")
    if epochs > 1:
        refuse_iterators(loader, "loader")
    refuse_iterators(validation, "validation")
    run = _Run(model, lr, None if checkpoint is None else Path(checkpoint), seed, show_progress)
    with _own_randomness(run.device):
        try:
            run.resume()
            while True:
                if validation is not None and run.step == 0 and run.judged < run.epoch:
                    run.judge(validation)
                    run.save()
                if run.epoch >= epochs:
                    break
                run.one_epoch(loader, checkpoint_every, f"epoch {run.epoch + 1}/{epochs}")
                run.save()
        except FileFormatError:
            raise
        except BaseException as error:
            error.partial_result = run.result()  # type: ignore[attr-defined]
            try:
                run.save()
            except OSError as other:
                # what ended the training is what its owner must hear of
                warnings.warn(f"the checkpoint could not be written: {other}", stacklevel=2)
            raise
    return run.result()


class _Run:
    """A training in progress: where it is, and the best state so far."""

    def __init__(self, model: nn.Module, lr: float, checkpoint: Path | None, seed: int, show_progress: bool) -> None:
        self._given = unwrap(model)
        if not isinstance(self._given, nn.Module):
            raise OptionError(f"the model must be an nn.Module, got {type(model).__name__}")
        self.network: nn.Module = copy.deepcopy(self._given)
        if not self._given.training:
            self.network.train()
        self._modes = [module.training for module in self.network.modules()]
        trained = [p for p in self.network.parameters() if p.requires_grad]
        if not trained:
            raise OptionError("no parameter of the model requires gradients, so there is nothing to train")
        half = next((p.dtype for p in trained if torch.finfo(p.dtype).bits < 32), None)
        if half is not None:
            raise OptionError(
                f"parameters must be float32 or float64 to be trained, got {half}: small steps would be rounded away; "
                "retrain model.float(), under torch.autocast for speed, and convert the result"
            )
        self.device, self.dtype = trained[0].device, trained[0].dtype
        self.optimizer = torch.optim.Adam(trained, lr=lr)
        self.kept = dict(_partly_zero(self.network))
        self.epoch, self.step = 0, 0
        self.best: dict[str, Tensor] | None = None
        self.score, self.judged = -1, -1
        self._checkpoint, self._seed, self._lr, self._show = checkpoint, seed, lr, show_progress
        # torch's random state after the last whole step; None between epochs, each begins with its own seed
        self._random: list[Tensor] | None = None
        # False while a step changes the weights: what is then interrupted is no state to go on from
        self._whole = True
        if checkpoint is not None:
            check_folder(checkpoint)

    def one_epoch(self, loader: Iterable[Any], every: int, description: str) -> None:
        """Train on the loader's batches, after those that an earlier call already took."""
        # the order of the loader is drawn at its start, so that a resumed epoch sees the same
        torch.manual_seed(self._seed + self.epoch)
        taken, empty = self.step, True
        # iter: of a loader tqdm.auto makes two iterators, each with its workers
        with tqdm(iter(loader), desc=description, disable=not self._show, total=length_hint(loader) or None) as bar:
            for index, raw in enumerate(bar):
                empty = False
                if index < taken:
                    if index == taken - 1:
                        # before the next batch is made: its augmentation may draw, too
                        self._set_random()
                    continue
                self._train_on(raw, index)
                if self.step % every == 0:
                    self.save()
        if empty:
            raise EmptyLoaderError(
                f"the loader gave no batch in epoch {self.epoch + 1}; expected at least one. An iterator can be read "
                "only once: pass the DataLoader itself"
            )
        self.epoch, self.step, self._random = self.epoch + 1, 0, None

    def _train_on(self, raw: Any, index: int) -> None:
        inputs, labels = to_model(raw, index, self.device, self.dtype)
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        try:
            logits = self.network(*inputs)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                raise HeadError(
                    f"expected a model that returns logits (N, C) in train mode, got {type(logits).__name__}; switch "
                    "auxiliary outputs off, or wrap the model"
                )
            check_range(labels, logits.shape[1], index)
            loss = F.cross_entropy(logits.float(), labels)
            if not bool(torch.isfinite(loss.detach())):
                raise NonFiniteError(
                    f"the loss is {float(loss.detach())} in epoch {self.epoch + 1}, step {index + 1}; this step was "
                    "not taken: lower lr, or look at that batch"
                )
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        except BaseException:
            # a step that is not taken leaves no trace in running statistics either
            for buffer, before in buffers:
                buffer.copy_(before)
            raise
        for weight, kept in self.kept.items():
            if weight.grad is not None:
                weight.grad.mul_(kept)
        self._whole = False
        self.optimizer.step()
        # autocast keeps its low-precision copies of the weights until its outermost block ends, after all steps here
        torch.clear_autocast_cache()
        self.step, self._random = index + 1, self._get_random()
        self._whole = True

    @torch.no_grad()
    def judge(self, loader: Iterable[Any]) -> None:
        """Keep the present state if it classifies more of these samples right than any before."""
        self.network.eval()
        right, empty = 0, True
        for index, raw in enumerate(loader):
            inputs, labels = to_model(raw, index, self.device, self.dtype)
            right += int((self.network(*inputs).argmax(1) == labels).sum())
            empty = False
        for module, mode in zip(self.network.modules(), self._modes, strict=True):
            module.training = mode
        if empty:
            raise EmptyLoaderError(
                "the validation loader gave no batch; expected at least one: pass the DataLoader itself"
            )
        if right > self.score:
            self.score = right
            self.best = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.judged = self.epoch

    def result(self) -> nn.Module:
        """A network of the best state, in the modes in which it was given."""
        found = copy.deepcopy(self.network)
        if self.best is not None:
            found.load_state_dict(self.best)
        for module, given in zip(found.modules(), self._given.modules(), strict=True):
            module.training = given.training
        found.zero_grad()
        return found

    def _get_random(self) -> list[Tensor]:
        on_cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_cuda]

    def _set_random(self) -> None:
        if self._random is not None:
            torch.set_rng_state(self._random[0])
            for state in self._random[1:] if self.device.type == "cuda" else []:
                torch.cuda.set_rng_state(state, self.device)

    # -- the checkpoint --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write all that `resume` needs; an older file stays whole until the new one is."""
        if self._checkpoint is None or not self._whole:
            return
        state = {
            "kind": _KIND, "version": _VERSION, "epoch": self.epoch, "step": self.step, "score": self.score,
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best,
            "judged": self.judged, "random": self._random, "seed": self._seed,
        }  # fmt: skip
        with replacing(self._checkpoint) as beside:
            torch.save(state, beside)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self._checkpoint is None or not self._checkpoint.is_file():
            return
        try:
            state = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
            if (state["kind"], state["version"], state["seed"]) != (_KIND, _VERSION, self._seed):
                raise ValueError(f"kind, version and seed are {state['kind']}, {state['version']}, {state['seed']}")
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr
            self.epoch, self.step, self.score = state["epoch"], state["step"], state["score"]
            self.best, self.judged = state["best"], state["judged"]
            self._random = None if state["random"] is None else [found.cpu() for found in state["random"]]
        except Exception as error:  # torch.load tells a broken file by many kinds of error
            raise FileFormatError(
                f"{self._checkpoint} is not a whole checkpoint of this training ({error}); delete it to start anew, or "
                "pass the model and seed it was made with"
            ) from error


def _partly_zero(network: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Weights of which some are zero, and which are not: batch norms may begin at zero, these do not."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and isinstance(module.weight, nn.Parameter):
            kept = module.weight.detach() != 0
            if bool(kept.any()) and not bool(kept.all()):
                yield module.weight, kept


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        yield
