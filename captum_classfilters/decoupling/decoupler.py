"""The network with its gates: `PathDecoupler` wraps a model; hooks stand on it only while a forward runs.

`run.py` has the hooks, `losses.py` the parts of the loss. N samples, C classes, L gated layers with K_l channels.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.errors import HardGatesWarning, LayerError, NonFiniteError, OptionError, ShapeError
from captum_classfilters.core.stream import check_labels, check_range
from captum_classfilters.decoupling import losses, saved
from captum_classfilters.decoupling.calls import Calls, calls_of
from captum_classfilters.decoupling.controller import MIXES, Controller
from captum_classfilters.decoupling.losses import DIRECTIONS, DecouplingLoss
from captum_classfilters.decoupling.run import Gates, Run, not_finite
from captum_classfilters.decoupling.units import Unit, find_units

if TYPE_CHECKING:
    from captum_classfilters.decoupling.macs import Costs
    from captum_classfilters.decoupling.paths import Paths
    from captum_classfilters.decoupling.skipping import SkippingNetwork

# gates that one decoupler's forwards are to take in this thread
_FROZEN: ContextVar["tuple[tuple[PathDecoupler, Gates], ...]"] = ContextVar("captum_classfilters_frozen", default=())
# decouplers whose hard gates pass gradients on in this thread
_STRAIGHT: ContextVar["tuple[PathDecoupler, ...]"] = ContextVar("captum_classfilters_straight", default=())


class PathDecoupler(nn.Module):
    """A model in which every image opens the channels it needs: its calculation path.

    A small controller before each gated convolution reads that convolution's input and opens or closes its channels;
    these are multiplied on the norm that follows the convolution, or on the convolution where none does. Train with
    `loss`, then read `paths`, skip work with `skipping`.

    Not for a model that recomputes parts of its forward in the backward pass (activation checkpointing): gates are not
    there then.

    Source: "Interpretable neural network decoupling", section 3. Differs: gates stand on the norm, since a mask before
    it would not close a channel; 1x1 convolutions of shortcuts and of squeeze-and-excitation are free by default.

    Args:
        model: The network, kept as ``.model`` and never changed: its modules, parameters and their order stay.
        layers: Names or modules of the convolutions to gate; None: all but the first and the last, as in the paper.
        reduction: gamma of eq. 2.
        mix: Which half of the gates is hard in training: ``"sample"``, ``"channel"`` or ``"element"``; see
            `controller.random_half`.
        num_classes: C, which `loss` needs; None: as many as the last linear layer gives.
        generator: Of all initial weights; None: torch's own. Noise in training is torch's own, as dropout's.
        example_input: One batch for a model that cannot be traced: its layers are found by running it.

    Attributes:
        model: What was given.
        units: The gated convolutions in order: ``Unit(conv, site)``, dotted names in ``model``.
        controllers: One `Controller` for each unit; its output is the gates: Captum's ``LayerActivation`` reads them.
        readers: For each unit, W_cla of eq. 9 as a linear layer; None where C is not known.

    Raises:
        LayerError: Nothing to gate, a layer that does not exist, is no convolution or cannot be followed; the model
            cannot be traced.
        OptionError: ``reduction`` or ``mix`` is out of range.

    Example:
        >>> from captum_classfilters.assets import load_demo_network, load_images
        >>> model, _ = load_demo_network()
        >>> decoupler = PathDecoupler(model).eval()
        >>> len(decoupler.units), decoupler.units[0]
        (17, Unit(conv='layer1.0.conv1', site='layer1.0.bn1'))
        >>> decoupler(load_images().images[:2].float() / 255).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module | str] | None = None,
        *,
        reduction: int = 4,
        mix: str = "sample",
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
        example_input: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or isinstance(unwrap(model), PathDecoupler):
            raise OptionError(f"the model must be an nn.Module without gates, got {type(model).__name__}")
        for name, value in (("reduction", reduction), ("num_classes", 1 if num_classes is None else num_classes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be an integer of at least 1, got {value!r}")
        if mix not in MIXES:
            raise OptionError(f"mix must be one of {list(MIXES)}, got {mix!r}")
        self.model = unwrap(model)
        calls = calls_of(self.model, example_input)
        self.units: tuple[Unit, ...] = find_units(self.model, layers, calls)
        self.controllers = nn.ModuleList(self._controller(unit, reduction, mix, generator) for unit in self.units)
        classes = num_classes or _classes(self.model, calls)
        readers = (self._reader(each, classes, generator) for each in self._controllers()) if classes else None
        self.readers = None if readers is None else nn.ModuleList(readers)
        # not self.train(): batch norms that were frozen by hand stay so
        self.training = self.model.training
        self.controllers.train(self.training)

    def _controller(self, unit: Unit, reduction: int, mix: str, generator: torch.Generator | None) -> Controller:
        conv: Any = self.model.get_submodule(unit.conv)
        controller = Controller(conv.in_channels, conv.out_channels, reduction, mix)
        controller.reset(generator)
        # in float32 though the model be in half precision: that is what gates are computed in
        return controller.to(conv.weight.device, torch.promote_types(conv.weight.dtype, torch.float32))

    def _reader(self, controller: Controller, num_classes: int, generator: torch.Generator | None) -> nn.Linear:
        like = controller.excite.weight
        reader = nn.Linear(controller.excite.out_features, num_classes, bias=False)
        if generator is not None:
            nn.init.kaiming_uniform_(reader.weight, 5**0.5, generator=generator)  # as nn.Linear begins
        return reader.to(like.device, like.dtype)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the gated convolutions, in order."""
        return tuple(unit.conv for unit in self.units)

    @property
    def channels(self) -> tuple[int, ...]:
        """How many channels each of them has."""
        return tuple(controller.excite.out_features for controller in self._controllers())

    def _controllers(self) -> Iterator[Controller]:
        return iter(self.controllers)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives, with its channels gated: logits ``(N, C)`` for a classifier."""
        return self._forward(self._run(), args, kwargs)

    def gates(self, *args: Any, **kwargs: Any) -> tuple[Any, Gates]:
        """One forward's ``(output, gates)``: gates ``(N, K_l)`` for each layer; with gradients where they are on."""
        run = self._run()
        output = self._forward(run, args, kwargs)
        return output, self._in_order(run.gates)

    def gate_logits(self, *args: Any, **kwargs: Any) -> tuple[Any, Gates]:
        """One forward's ``(output, g)``: g of eq. 2, ``(N, K_l)`` float32 for each layer; positive is open.

        Raises:
            OptionError: Gates are `frozen`, which have no g.
        """
        output, _, logits = self.gates_and_logits(*args, **kwargs)
        return output, logits

    def gates_and_logits(self, *args: Any, **kwargs: Any) -> tuple[Any, Gates, Gates]:
        """`gates` and `gate_logits` of one forward: ``(output, gates, g)``."""
        if self.is_frozen:
            raise OptionError("frozen gates are given, not computed, and have no logits; ask outside of frozen()")
        run = self._run(logits=True)
        output = self._forward(run, args, kwargs)
        return output, self._in_order(run.gates), self._in_order(run.logits or {})

    def loss(
        self,
        inputs: Any,
        labels: Tensor,
        *,
        information_weight: float = 1.0,
        divergence_weight: float = 1.0,
        sparsity_weight: float = 0.003,
        target_rate: float = 0.0,
        direction: str = "z_y",
    ) -> DecouplingLoss:
        """Run the network and give eq. 12; nothing of the forward stays behind.

        Source: "Interpretable neural network decoupling", section 3.2. The paper does not give its weights. Of those
        tried here, an information weight of .1 or less left the gates the same for every image.

        Args:
            inputs: What the model takes; a tuple for several.
            labels: ``(N,)`` int64.
            information_weight: lambda_m.
            divergence_weight: lambda_k.
            sparsity_weight: lambda_s.
            target_rate: R in [0, 1]; 0: as sparse as the other losses let it become.
            direction: See `losses.divergence_loss`.

        Raises:
            OptionError: A weight is negative, ``target_rate`` or ``direction`` is out of range.
            LabelError: Labels do not fit.
            NonFiniteError: Gates or logits are not finite.
        """
        weights = {
            "information_weight": information_weight,
            "divergence_weight": divergence_weight,
            "sparsity_weight": sparsity_weight,
        }
        for name, value in weights.items():
            if not isinstance(value, Real) or not value >= 0:
                raise OptionError(f"{name} must be a number of at least 0, got {value!r}")
        if not isinstance(target_rate, Real) or not 0 <= target_rate <= 1:
            raise OptionError(f"target_rate is a share of channels in [0, 1], got {target_rate!r}")
        if direction not in DIRECTIONS:
            raise OptionError(f"direction must be one of {list(DIRECTIONS)}, got {direction!r}")
        constant = not (self.controllers.training or self.is_frozen or self._is_straight)
        if torch.is_grad_enabled() and constant:
            message = "gates are hard in eval mode and have no gradient: nothing trains the controllers; call .train()"
            warnings.warn(message, HardGatesWarning, stacklevel=2)
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        run = self._run(pooled=True)
        logits = self._forward(run, args, {})
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeError(f"loss needs logits (N, C) from the model, got {found}; switch auxiliary outputs off")
        labels = check_labels(labels, len(logits)).to(logits.device)
        check_range(labels, logits.shape[1])
        rows = []
        for index, reader in enumerate(self._readers_for(logits.shape[1])):
            z = run.gates[index]
            response = run.pooled[index]
            rows.append(
                (
                    losses.mutual_information_loss(z, reader.weight, labels),
                    losses.divergence_loss(z, response, direction),
                    losses.sparsity_loss(z, target_rate),
                    (z.detach() > 0.5).to(z.dtype).mean(),
                )
            )
        total = losses.combine(F.cross_entropy(_at_least_float32(logits), labels), rows, **weights)
        if not torch.isfinite(total.total):
            raise NonFiniteError(self._what_is_not_finite(run, logits))
        return total

    def _readers_for(self, num_classes: int) -> nn.ModuleList:
        if self.readers is None:
            raise OptionError(
                f"the model does not end in a Linear layer, so the number of classes was not known in advance: make "
                f"the PathDecoupler with num_classes={num_classes}"
            )
        if (known := self.readers[0].out_features) != num_classes:
            raise ShapeError(f"the model gives {num_classes} classes, the readers of eq. 9 were made for {known}")
        return self.readers

    @property
    def is_frozen(self) -> bool:
        """Whether this is inside of `frozen`."""
        return self._frozen() is not None

    def _frozen(self) -> Gates | None:
        return next((gates for owner, gates in reversed(_FROZEN.get()) if owner is self), None)

    @contextmanager
    def frozen(self, gates: Gates) -> Iterator[None]:
        """Inside, forwards take these gates for their own: with one row for all samples, or a row for each.

        Hard gates have no meaningful derivative; on a frozen path the network is an ordinary one, and Integrated
        Gradients are complete. ``with decoupler.frozen(decoupler.gates(x)[1]): ...``. A method that makes several
        copies of each image gets these gates again for every block of N images, as Integrated Gradients and ablations
        lay them out; one that puts an image's copies side by side, as NoiseTunnel does, needs one image at a time.

        Holds in this thread: DataParallel's replicas run in others.

        Raises:
            ShapeError: Gates do not fit the layers.
        """
        expected = self.channels
        if len(gates) != len(expected):
            raise ShapeError(f"expected gates for {len(expected)} layers, got {len(gates)}; see decoupler.layers")
        for name, channels, gate in zip(self.layers, expected, gates, strict=True):
            if gate.dim() != 2 or gate.shape[1] != channels or not len(gate):
                raise ShapeError(f"gates of {name} must have shape (N, {channels}), got {tuple(gate.shape)}")
        token = _FROZEN.set((*_FROZEN.get(), (self, tuple(gate.detach() for gate in gates))))
        try:
            yield
        finally:
            _FROZEN.reset(token)

    @contextmanager
    def straight_through(self) -> Iterator[None]:
        """Inside, hard gates pass on the gradient that soft ones would have, as in training but without noise.

        For an attacker who knows of the gates: to `loss.backward` in eval mode they are constants. Outputs stay what
        they are. As in eq. 4 a gate far from its threshold (|g| > ln 11) has no gradient. Holds in this thread.
        """
        token = _STRAIGHT.set((*_STRAIGHT.get(), self))
        try:
            yield
        finally:
            _STRAIGHT.reset(token)

    def paths(self, loader: Iterable[Any] | Tensor, *, logits: bool = False, show_progress: bool = False) -> "Paths":
        """The calculation path of every image, packed to one bit for each channel.

        Args:
            loader: Batches of ``(inputs, labels)`` or of inputs alone; read once. A tensor is one batch.
            logits: Also keep g of eq. 2, as float32.
            show_progress: A tqdm bar.
        """
        from captum_classfilters.decoupling.reading import collect

        return collect(self, loader, logits=logits, show_progress=show_progress)

    def skipping(self, *example_input: Any, paths: "Paths | None" = None, measured: bool = True) -> "SkippingNetwork":
        """A copy that computes only what is open: the same outputs as this in eval mode, for inference.

        Norms are folded into convolutions; closed outputs are left out and so are the next convolution's inputs; images
        of a batch with the same path run together; filters that no input can open are pruned away. Each convolution is
        timed once here, and computes all its channels where that is faster. **MACs are not milliseconds:** measure.

        As tracing does, this reads ``x += y`` as a new ``x``, of which an older name of the same maps knows nothing;
        keeps arguments with a default as they are; and takes numbers that a forward draws at random for constants.

        Folding rounds differently in the last digits, so a gate that lies within them of zero may fall otherwise.

        Source: "Interpretable neural network decoupling", section 4.3, gives times without saying how; its published
        code multiplies by masks, which skips nothing.

        Args:
            example_input: One batch, as large as those to come.
            paths: Also prune the filters that were closed for all of these images. Other images may then differ.
            measured: False: always skip, without timing: for tests.

        Raises:
            LayerError: The model cannot be traced.
            MergeError: ``paths`` are of another network.
        """
        from captum_classfilters.decoupling.skipping import skipping

        return skipping(self, example_input, paths, measured)

    def costs(self, *args: Any) -> "Costs":
        """What the convolutions of this network cost, from one forward without gates of ``args``, one image."""
        from captum_classfilters.decoupling.reading import costs_of

        return costs_of(self, args)

    def controllers_state_dict(self) -> dict[str, Tensor]:
        """What was trained beside the model: controllers, and readers if there are any."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def load_controllers_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `controllers_state_dict` gave.

        Raises:
            ShapeError: It is of another network or other layers; nothing is changed then.
        """
        saved.load_controllers(self, state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the controllers to a file, with the names of their layers; the model is yours to save."""
        saved.save(self, path)

    def load(self, path: str | os.PathLike[str]) -> "PathDecoupler":
        """Read what `save` wrote into this decoupler, whose layers must be the same; returns itself."""
        return saved.load(self, path)

    def _run(self, **asked: bool) -> Run:
        return Run(self._frozen(), straight_through=self._is_straight, **asked)

    @property
    def _is_straight(self) -> bool:
        return any(owner is self for owner in _STRAIGHT.get())

    def _forward(self, run: Run, args: Any, kwargs: Any) -> Any:
        with borrowed(self.model, train=True), run.hooked(self.model, self.units, tuple(self._controllers())):
            output = self.model(*args, **kwargs)
        if missing := [unit.conv for index, unit in enumerate(self.units) if index not in run.masked]:
            raise LayerError(
                f"{missing[0]} did not run in this forward, as it did when the layers were found (in eval mode); "
                "make a PathDecoupler with layers= without it"
            )
        return output

    def _in_order(self, found: dict[int, Tensor]) -> Gates:
        return tuple(found[index] for index in range(len(self.units)))

    def _what_is_not_finite(self, run: Run, logits: Tensor) -> str:
        gates = self._in_order(run.gates)
        if not all(torch.isfinite(gate).all() for gate in gates):
            return f"{not_finite(self.layers, gates)}; or take a smaller learning rate, or clip gradients"
        what = "logits" if not torch.isfinite(logits).all() else "the loss"
        return f"{what} of this batch: NaN or infinity; look at inputs and learning rate"


def _classes(model: nn.Module, calls: Calls) -> int | None:
    """C, if the result is a linear layer's."""
    for call in calls.calls:
        if call.output in calls.returned and call.op == "linear" and call.module:
            return int(model.get_submodule(call.module).out_features)  # type: ignore[arg-type]
    return None


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
