"""`recover`: retrain a network for a short while, with the paper's settings.

`core/training.py` holds the loop and its checkpoint. N samples, C classes.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.core.batches import image_errors
from captum_classfilters.core.borrow import unwrap
from captum_classfilters.core.calls import CONVS
from captum_classfilters.core.check import integer, number
from captum_classfilters.core.copies import copied
from captum_classfilters.core.errors import EmptyLoaderError, HeadError, LayerError, NonFiniteError, OptionError
from captum_classfilters.core.labels import check_range
from captum_classfilters.core.outputs import LogitReader, cross_entropy
from captum_classfilters.core.stream import Placement, refuse_iterator, samples
from captum_classfilters.core.training import Checkpoint, Task, Training


def recover(
    model: nn.Module,
    loader: Iterable[Any],
    epochs: int = 1,
    *,
    lr: float = 1e-4,
    validation: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> nn.Module:
    """Retrain a copy of the network, all of it, on cross-entropy with Adam.

    Source: Badola et al. 2022, section 4.3: after one epoch a ResNet-20 of five features per class was back within .2 %
    of the full accuracy. Retrain the full network as a control: it gains from the epoch, too.

    Weights of linear and convolutional layers that are zero at the start stay zero, in layers that have some: a head
    with zeros keeps its few features. Random draws (dropout, the loader's order) come from ``seed``; the state of
    torch's own generators is left as it was. The forward pass follows a ``torch.autocast`` around this call.

    Args:
        model: The network, on its device; not changed. Its parameters with ``requires_grad=False`` are not trained.
            A model in eval mode is trained in train mode. A model in train mode keeps batch norms that are frozen.
        loader: Batches ``(inputs, labels)``, read once for each epoch; the paper's hold 64.
        epochs: How many.
        lr: Adam's learning rate.
        validation: Batches of training images held out from ``loader``: the state that classifies most of them right
            wins, the start included. None: the last state.
        checkpoint: A file, or a `Checkpoint` that says how often it is written. It is written on an error, too. If the
            file is there at the start, training goes on from it, to the same bits.
        seed: Seed of the random draws.
        show_progress: A tqdm bar for each epoch.

    Returns:
        The retrained copy, each module in the mode in which it was given.

    Raises:
        OptionError: ``epochs`` or ``lr`` is out of range, nothing can be trained, or the network has half precision.
        NonFiniteError: The loss is NaN or infinite; names epoch and step. The step is not taken.
        HeadError: The model returns no logits, or other than ``(N, C)``.
        EmptyLoaderError: A loader gave no sample, or can be read only once.
        FileFormatError: The checkpoint is broken, or of another network or version.

    Whatever ends the training early, KeyboardInterrupt included, carries the best network so far as
    ``error.partial_result``.
    """
    epochs, lr = integer(epochs, "epochs", 1), number(lr, "lr", 0, open_ends=True)
    if epochs > 1:
        refuse_iterator(loader, "loader")
    refuse_iterator(validation, "validation")
    original = unwrap(model)
    network = _trainable_copy(original, model)
    gradients = [parameter.grad for parameter in original.parameters()]
    task = _Recovery(network, validation)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr)
    training = Training(network, task, [optimizer], checkpoint=Checkpoint.of(checkpoint), seed=seed)
    with _private_randomness(next(network.parameters()).device):
        training.resume(loader)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            training.run(loader, epochs, show_progress)
        except BaseException as error:
            for parameter, gradient in zip(original.parameters(), gradients, strict=True):
                parameter.grad = gradient
            best = task.best_network(original)
            error.partial_result = best  # type: ignore[attr-defined]
            try:
                training.save()
            except Exception as other:  # the disk may be full: torch raises many kinds of error
                # the user must see the error that ended the training, also where warnings are errors
                with suppress(UserWarning):
                    warnings.warn(f"the checkpoint could not be written: {other}", stacklevel=2)
            except BaseException as second:
                second.partial_result = best  # type: ignore[attr-defined]
                raise
            raise
    return task.best_network(original)


class _Recovery(Task):
    """Cross-entropy; zeros stay zero; the state that classifies most of the held-out samples right is kept."""

    name = "recover"

    def __init__(self, network: nn.Module, validation: Iterable[Any] | None) -> None:
        self._network, self._validation = network, validation
        self._masks = dict(_partly_zero(network))
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._best: dict[str, Tensor] | None = None
        self._most_right, self._judged = -1, -1
        self._proved = False

    def loss(self, inputs: tuple[Any, ...], labels: Tensor, epoch: int, place: int) -> Tensor:
        """The cross-entropy of the batch."""
        self._buffers = [(buffer, buffer.clone()) for buffer in self._network.buffers()]
        with image_errors(inputs, self._network), LogitReader() as reader:
            logits = reader.logits(self._network(*inputs))
        if logits.dim() != 2:
            raise HeadError(
                f"expected a model that returns logits (N, C), got shape {tuple(logits.shape)}; wrap the model"
            )
        check_range(labels, max(2, logits.shape[1]), place)
        loss = cross_entropy(logits, labels)
        if not bool(torch.isfinite(loss.detach())):
            raise NonFiniteError(
                f"the loss is {float(loss.detach())} in epoch {epoch + 1}, step {place + 1}; this step was not taken: "
                "lower lr, or look at that batch"
            )
        return loss

    def refuse_step(self) -> None:
        """A step that is not taken leaves no trace in running statistics either."""
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)

    def before_step(self) -> None:
        """Proves that the copy is one; a zero has no gradient."""
        if not self._proved and all(parameter.grad is None for parameter in self._network.parameters()):
            raise LayerError(
                "a copy of the model still runs the original: its code uses a module by a global name, or keeps it in "
                "an object of its own; let it use its own submodules, self.<name>"
            )
        self._proved = True
        for weight, mask in self._masks.items():
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def after_step(self) -> None:
        """Autocast keeps low-precision copies of the weights until its outermost block ends, after all steps here."""
        torch.clear_autocast_cache()

    @torch.no_grad()
    def between_epochs(self, epoch: int) -> bool:
        """Keep the present state if it classifies more of the held-out samples right than any before."""
        if self._validation is None or self._judged >= epoch:
            return False
        modes = [module.training for module in self._network.modules()]
        self._network.eval()
        right = 0
        try:
            with samples(self._validation, placement=Placement.of(self._network)) as stream:
                for batch in stream:
                    labels: Tensor = batch.labels  # type: ignore[assignment]
                    with LogitReader() as reader:
                        answers = reader.class_logits(self._network(*batch.inputs)).argmax(1)
                    right += int((answers == labels).sum())
        except EmptyLoaderError as error:
            raise EmptyLoaderError(f"validation: {error}") from error
        finally:
            for module, mode in zip(self._network.modules(), modes, strict=True):
                module.training = mode
        if right > self._most_right:
            self._most_right = right
            self._best = {name: value.clone() for name, value in self._network.state_dict().items()}
        self._judged = epoch
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best state so far, how many it classified right, and the epoch that was judged last."""
        return {"best": self._best, "most_right": self._most_right, "judged": self._judged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._best, self._most_right, self._judged = state["best"], state["most_right"], state["judged"]

    def best_network(self, original: nn.Module) -> nn.Module:
        """A network of the best state, in the modes of the original."""
        network = copied(self._network)
        if self._best is not None:
            network.load_state_dict(self._best)
        for module, source in zip(network.modules(), original.modules(), strict=True):
            module.training = source.training
        network.zero_grad()
        return network


def _trainable_copy(original: Any, model: Any) -> nn.Module:
    if not isinstance(original, nn.Module):
        raise OptionError(f"the model must be an nn.Module, got {type(model).__name__}")
    Placement.of(original)  # refuses a model without weights
    trained = [p for p in original.parameters() if p.requires_grad]
    if not trained:
        raise OptionError("no parameter of the model requires gradients, so there is nothing to train")
    half = next((p.dtype for p in trained if torch.finfo(p.dtype).bits < 32), None)
    if half is not None:
        raise OptionError(
            f"parameters must be float32 or float64 to be trained, got {half}: small steps would be rounded away; "
            "retrain model.float(), under torch.autocast for speed, and convert the result"
        )
    return copied(original)


def _partly_zero(network: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Weights of which some are zero and some are not, each with the mask of those that are not.

    Batch norms may begin at zero; linear and convolutional layers do not.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, *CONVS)) and isinstance(module.weight, nn.Parameter):
            mask = module.weight.detach() != 0
            if bool(mask.any()) and not bool(mask.all()):
                yield module.weight, mask


@contextmanager
def _private_randomness(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        yield
