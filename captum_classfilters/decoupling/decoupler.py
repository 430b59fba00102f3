"""The network with its gates: `PathDecoupler` wraps a model; hooks stand on it only while a forward runs.

`units.py` has the hooks, `controller.py` gates and losses, `paths.py` what `path_reader.py` reads.
N samples, C classes, L gated layers with K_l channels, K in all.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_classfilters.core.batches import image_errors
from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.calls import Calls, calls_of
from captum_classfilters.core.check import integer, number, one_of
from captum_classfilters.core.errors import (
    FileFormatError,
    HardGatesWarning,
    LabelError,
    LayerError,
    MergeError,
    NonFiniteError,
    OptionError,
    ShapeError,
    brief,
)
from captum_classfilters.core.files import checked_tensor, contents, read, texts, write
from captum_classfilters.core.fingerprint import fingerprint
from captum_classfilters.core.labels import check_labels, check_range
from captum_classfilters.core.outputs import LogitReader, cross_entropy, two_logits
from captum_classfilters.core.stream import Placement, samples
from captum_classfilters.decoupling import controller as equations
from captum_classfilters.decoupling.controller import MIXES, Controller, DecouplingLoss
from captum_classfilters.decoupling.costs import Costs, count_costs
from captum_classfilters.decoupling.path_options import DecouplingOptions
from captum_classfilters.decoupling.path_reader import PathReader, logits_of
from captum_classfilters.decoupling.paths import Paths
from captum_classfilters.decoupling.units import Gates, Run, Unit, find_units, not_finite
from captum_classfilters.skipping.network import GatedConv, SkippingNetwork, skip_closed

_KIND, _VERSION = "PathDecoupler", 1
# Gates that one decoupler's forwards are to take in this thread
_FROZEN: ContextVar["tuple[tuple[PathDecoupler, Gates], ...]"] = ContextVar("captum_classfilters_frozen", default=())
# Decouplers whose hard gates pass gradients on in this thread
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
            `controller.random_hard`.
        num_classes: C, which `loss` needs; None: as many as the last linear layer gives.
        generator: Draws all initial weights; None: torch's own generator. Noise in training always comes from that one.
        example_input: One batch for a model that cannot be traced: its layers are found by running it.

    Attributes:
        model: The network.
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
        reduction, mix = integer(reduction, "reduction", 1), one_of(mix, "mix", MIXES)
        num_classes = None if num_classes is None else integer(num_classes, "num_classes", 1)
        self.model = unwrap(model)
        if example_input is not None:
            batch = example_input if isinstance(example_input, tuple) else (example_input,)
            example_input = tuple(Placement.of(self.model).move(value) for value in batch)
        calls = calls_of(self.model, example_input)
        self.units: tuple[Unit, ...] = find_units(self.model, layers, calls)
        with _other_randomness(generator):
            self.controllers = nn.ModuleList(self._controller(unit, reduction, mix, generator) for unit in self.units)
        classes = num_classes or _classes(self.model, calls)
        self.readers: nn.ModuleList | None = None
        if classes:
            with _other_randomness(generator):
                self.readers = nn.ModuleList(self._reader(item, classes, generator) for item in self._controllers())
        # not self.train(): batch norms that were frozen by hand stay so
        self.training = self.model.training
        self.controllers.train(self.training)

    def _controller(self, unit: Unit, reduction: int, mix: str, generator: torch.Generator | None) -> Controller:
        conv: Any = self.model.get_submodule(unit.conv)
        controller = Controller(conv.in_channels, conv.out_channels, reduction, mix)
        controller.reset(generator)
        # gates are computed in float32, also where the model is in half precision
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
            raise OptionError("frozen gates were passed in, not computed, and have no logits; ask outside of frozen()")
        run = self._run(logits=True)
        output = self._forward(run, args, kwargs)
        return output, self._in_order(run.gates), self._in_order(run.logits or {})

    def loss(
        self,
        inputs: Any,
        labels: Tensor,
        options: DecouplingOptions = DecouplingOptions(),
        *,
        teacher: Tensor | None = None,
    ) -> DecouplingLoss:
        """Run the network and compute what its training minimises; nothing of the forward stays behind.

        Source: "Interpretable neural network decoupling", section 3.2. Differs as `DecouplingOptions` says;
        ``DecouplingOptions.paper()`` is eq. 12.

        Args:
            inputs: What the model takes; a tuple for several.
            labels: ``(N,)`` int64.
            options: How the parts are weighed.
            teacher: Logits ``(N, C)`` of these inputs from the network without gates, to be learnt from.

        Raises:
            OptionError: ``options`` are none.
            LabelError: Labels do not fit.
            HeadError, ShapeError: The model gives no logits ``(N, C)``, or the teacher's have another shape.
            NonFiniteError: Gates or logits are not finite.
        """
        if not isinstance(options, DecouplingOptions):
            raise OptionError(f"options must be DecouplingOptions, got {type(options).__name__}")
        constant = not (self.controllers.training or self.is_frozen or self._is_straight)
        if torch.is_grad_enabled() and constant:
            message = "gates are hard in eval mode and have no gradient: nothing trains the controllers; call .train()"
            warnings.warn(message, HardGatesWarning, stacklevel=2)
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        run = self._run(pooled=True)
        with LogitReader() as reader:
            raw = logits_of(self._forward(run, args, {}), reader)
        logits = two_logits(raw)
        labels = check_labels(labels, len(logits)).to(logits.device)
        check_range(labels, logits.shape[1])
        rows, responses = [], run.pooled or {}
        for index, reader in enumerate(self._readers_for(logits.shape[1])):
            z, weight = run.gates[index], cast(Tensor, reader.weight)
            rows.append(
                (
                    equations.mutual_information_loss(z, weight, labels),
                    equations.divergence_loss(z, responses[index], options.direction),
                    equations.sparsity_loss(z, options.target_rate),
                    (z.detach() > 0.5).to(z.dtype).mean(),
                )
            )
        budget = equations.budget_loss(self._in_order(run.gates), options.target_rate)
        taught = None if teacher is None else _distilled(raw, teacher, options.temperature)
        total = options.combine(cross_entropy(raw, labels), taught, rows, budget)
        if not torch.isfinite(total.total):
            raise NonFiniteError(self._what_is_not_finite(run, logits))
        return total

    def anneal_(self, progress: float) -> None:
        """Let training end with the gates that the network will have: less noise and more hard gates than in the paper.

        Call it before each step. The noise fades linearly until .7 of the training; the share of hard gates rises from
        a half at .4 to all at .8. Not in the paper, where training ends with noisy gates, half of them soft.

        Args:
            progress: Share of the training that is done, in [0, 1].

        Raises:
            OptionError: ``progress`` is out of range.
        """
        progress = number(progress, "progress", 0, 1, meaning="a share of the training")
        for controller in self._controllers():
            controller.noise = max(0.0, 1 - progress / 0.7)
            controller.hard = 0.5 + 0.5 * min(1.0, max(0.0, (progress - 0.4) / 0.4))

    def _readers_for(self, num_classes: int) -> nn.ModuleList:
        if self.readers is None:
            raise OptionError(
                f"the model does not end in a Linear layer, so the number of classes was not known in advance: make "
                f"the PathDecoupler with num_classes={num_classes}"
            )
        if (made_for := self.readers[0].out_features) != num_classes:
            raise ShapeError(
                f"the model gives {num_classes} classes, the readers of eq. 9 were made for {made_for}; make the "
                f"PathDecoupler with num_classes={num_classes}"
            )
        return self.readers

    @property
    def is_frozen(self) -> bool:
        """Whether this is inside of `frozen`."""
        return self._frozen() is not None

    def _frozen(self) -> Gates | None:
        return next((gates for owner, gates in reversed(_FROZEN.get()) if owner is self), None)

    @contextmanager
    def frozen(self, gates: Gates) -> Iterator[None]:
        """Inside, forwards use these gates instead of the controllers': one row for all samples, or a row for each.

        Hard gates have no meaningful derivative; on a frozen path the network is an ordinary one, and Integrated
        Gradients are complete. ``with decoupler.frozen(decoupler.gates(x)[1]): ...``. A method that makes several
        copies of each image gets these gates again for every block of N images, as Integrated Gradients and ablations
        lay them out. One that puts an image's copies side by side, as NoiseTunnel does, needs one image at a time.

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

        It is meant for an attacker who knows of the gates: without it they are constants for ``backward`` in eval
        mode. Outputs do not change. As in eq. 4 a gate far from its threshold (|g| > ln 11) has no gradient. Holds in
        this thread.
        """
        token = _STRAIGHT.set((*_STRAIGHT.get(), self))
        try:
            yield
        finally:
            _STRAIGHT.reset(token)

    def paths(self, loader: Iterable[Any] | Tensor, *, logits: bool = False, show_progress: bool = False) -> Paths:
        """The calculation path of every image, packed to one bit for each channel.

        Args:
            loader: Batches of ``(inputs, labels)`` or of inputs alone; read once. A tensor is one batch. What is no
                class of each sample (file names, many labels, -1 throughout) is no label.
            logits: Also keep g of eq. 2, as float32.
            show_progress: Show a tqdm bar.

        Raises:
            OptionError: The loader cannot be iterated, or gates are `frozen`.
            EmptyLoaderError: It gave no image.
            LabelError: Labels do not fit, or only some batches have them.
            ShapeError: Images of different sizes; the model gives no logits.
            NonFiniteError: Gates or logits are not finite.
        """
        reader = PathReader(self, logits)
        # going through a tensor would give single images
        batches = [loader] if isinstance(loader, Tensor) else loader
        reading = samples(batches, need_labels=False, description="paths", show_progress=show_progress)
        with borrowed(self), reading as stream:
            parts = [reader.read(reader.place(batch.inputs), batch.labels, batch.place) for batch in stream]
        labelled = sum(part.labels is not None for part in parts)
        if labelled not in (0, len(parts)):
            raise LabelError(f"{labelled} of {len(parts)} batches have labels; give them for all or for none")
        return Paths.merge(*parts)

    def skipping(self, *example_input: Any, paths: Paths | None = None, measured: bool = True) -> SkippingNetwork:
        """A copy that computes only what is open: the same outputs as this network in eval mode, for inference.

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
            OptionError: There is no batch to time the layers with.
            LayerError: The model cannot be traced.
            MergeError: ``paths`` are of another network.
        """
        if measured and not example_input:
            raise OptionError(
                "skipping() needs one batch to time the layers with, got none; pass it, or measured=False"
            )
        if paths is not None and paths.fingerprint != self.fingerprint():
            raise MergeError("the paths are of another network's controllers; collect them with this decoupler")
        seen = paths.gates() if paths is not None else [None] * len(self.units)
        gated = [
            GatedConv(unit.conv, unit.site, controller, _never_open(controller, bits))
            for unit, controller, bits in zip(self.units, self._controllers(), seen, strict=True)
        ]
        if len(example_input) == 1 and isinstance(example_input[0], tuple):
            example_input = example_input[0]
        example_input = tuple(Placement.of(self.model).move(value) for value in example_input)
        return skip_closed(self.model, gated, example_input if measured else None)

    def costs(self, *args: Any) -> Costs:
        """What the convolutions of this network cost, from one forward without gates of ``args``, one image.

        Raises:
            OptionError: There is no image.
        """
        if not args:
            raise OptionError("costs depend on the size of images, got none; pass one image, costs(images[:1])")
        args = tuple(Placement.of(self.model).move(value) for value in args)
        try:
            calls = calls_of(self.model)
        except LayerError:
            calls = calls_of(self.model, args)
        work = sum(item.squeeze.weight.numel() + item.excite.weight.numel() for item in self._controllers())
        return count_costs(self.model, calls, self.units, args, work)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that two decouplers share if network, layers and controllers are the same.

        Weights are hashed once, and again after a change: a step of an optimizer, ``load_state_dict``, any operation in
        place, a move to another device or dtype. Torch does not count what is changed in place through a parameter's
        ``.data`` or a NumPy view of it; such a change is noticed with the next one that torch counts.
        """
        state = self.state_dict(keep_vars=True).items()
        # readers only read
        tensors = (value for name, value in state if not name.startswith("readers."))
        return fingerprint(self, (self.layers, self.channels), tensors)

    def controllers_state_dict(self) -> dict[str, Tensor]:
        """What was trained beside the model: controllers, and readers if there are any."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def load_controllers_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `controllers_state_dict` gave.

        Raises:
            ShapeError: It is of another network or other layers; nothing is changed then.
        """
        own = self.controllers_state_dict()
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ShapeError(
                f"expected what controllers_state_dict() gives, tensors by name, got {type(state).__name__}"
            )
        if missing := sorted(own.keys() - state.keys()):
            raise ShapeError(
                f"the state has no {missing[0]}; expected what controllers_state_dict() of such a network gives"
            )
        if unknown := sorted(state.keys() - own.keys()):
            raise ShapeError(
                f"the state holds {brief(unknown[0])}, which this decoupler has not; it is of other layers"
            )
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise ShapeError(
                    f"{name} must have shape {tuple(value.shape)}, got {tuple(state[name].shape)}; the state is of "
                    "another network, reduction= or number of classes"
                )
        self.load_state_dict(state, strict=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the controllers to a file, with the names of their layers; the model is yours to save."""
        meta = {"layers": list(self.layers), "channels": list(self.channels)}
        write(path, self.controllers_state_dict(), kind=_KIND, version=_VERSION, meta=meta)

    def load(self, path: str | os.PathLike[str]) -> "PathDecoupler":
        """Read what `save` wrote into this decoupler, whose layers must be the same; returns itself.

        Raises:
            FileNotFoundError, FileFormatError: There is no such file, or it is of other layers.
            ShapeError: It is of another network; nothing is changed then.
        """
        tensors, meta = read(path, kind=_KIND, version=_VERSION)
        with contents(path, "controllers"):
            layers = texts(meta["layers"], "layers")
            for name, value in tensors.items():
                checked_tensor(tensors, name, None, *value.shape)
        if layers != self.layers:
            raise FileFormatError(
                f"{path} holds controllers of {brief(_first_to_last(layers))}; this decoupler gates "
                f"{_first_to_last(self.layers)}: make it from the same kind of network, with the same layers="
            )
        self.load_controllers_state_dict(tensors)
        return self

    def _run(self, **keep: bool) -> Run:
        return Run(self._frozen(), straight_through=self._is_straight, **keep)

    @property
    def _is_straight(self) -> bool:
        return any(owner is self for owner in _STRAIGHT.get())

    def _forward(self, run: Run, args: Any, kwargs: Any) -> Any:
        placement = Placement.of(self.model)
        args = tuple(placement.move(value) for value in args)
        kwargs = {name: placement.move(value) for name, value in kwargs.items()}
        hooked = run.hooked(self.model, self.units, tuple(self._controllers()))
        with borrowed(self.model, train=True), hooked, image_errors(args, self.model):
            output = self.model(*args, **kwargs)
        if missing := [unit.conv for index, unit in enumerate(self.units) if index not in run.masked]:
            raise LayerError(
                f"{missing[0]} did not run in this forward, as it did when the layers were found (in eval mode); "
                "make a PathDecoupler with layers= without it"
            )
        return output

    def _in_order(self, by_index: dict[int, Tensor]) -> Gates:
        return tuple(by_index[index] for index in range(len(self.units)))

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
            # one logit is a network of two classes
            return max(2, int(model.get_submodule(call.module).out_features))  # type: ignore[arg-type]
    return None


@contextmanager
def _other_randomness(generator: torch.Generator | None) -> Iterator[None]:
    """With a generator, torch's own stays as it is: layers draw their first weights from it before they are reset."""
    with nullcontext() if generator is None else torch.random.fork_rng(devices=[]):
        yield


def _distilled(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if not isinstance(teacher, Tensor) or teacher.shape != logits.shape:
        found = tuple(teacher.shape) if isinstance(teacher, Tensor) else type(teacher).__name__
        raise ShapeError(
            f"teacher must be logits {tuple(logits.shape)}, as this network's, got {found}; give what the network "
            "without gates returns for these inputs"
        )
    # one logit is the difference of two
    share = 0.5 if logits.shape[1] == 1 else 1.0
    student, teacher = two_logits(logits * share), two_logits(teacher.to(logits.device) * share)
    return equations.distillation_loss(student, teacher, temperature)


def _never_open(controller: Controller, bits: Tensor | None) -> Tensor:
    """``(K,)`` bool: filters that stay closed whatever the input, by their weights, or that were so in all ``bits``."""
    excite = controller.excite
    # hidden units are never negative
    closed = (excite.weight <= 0).all(1) & (excite.bias <= 0)
    return closed if bits is None else closed | ~bits.any(0).to(closed.device)


def _first_to_last(layers: list[str] | tuple[str, ...]) -> str:
    return f"{len(layers)} layers from {layers[0]} to {layers[-1]}" if layers else "no layers"
