"""`skipping`: a copy of a decoupled network that computes only the open work.

The traced network is rewritten: norms are folded into their convolutions, these become `SkipConv`, and what lies
between them handles `Pieces`. Where a result goes into anything unknown, closed channels are filled with zeros first.
"""

import operator
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import LayerError, MergeError, OptionError
from captum_classfilters.decoupling import pieces
from captum_classfilters.decoupling.calls import CONVS, calls_of
from captum_classfilters.decoupling.controller import Controller, mask
from captum_classfilters.decoupling.flow import keeps_zero
from captum_classfilters.decoupling.folding import fold, has_hooks, name_what_is_changed_in_place, times
from captum_classfilters.decoupling.saved import fingerprint
from captum_classfilters.decoupling.skip_conv import SkipConv
from captum_classfilters.decoupling.skip_cost import measure, seconds

if TYPE_CHECKING:
    from captum_classfilters.decoupling.decoupler import PathDecoupler
    from captum_classfilters.decoupling.paths import Paths

_SUMS = (operator.add, operator.iadd, torch.add)


class SkippingNetwork(nn.Module):
    """What `PathDecoupler.skipping` gives: the same outputs for less work, for inference only.

    Attributes:
        network: The rewritten graph.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the decoupler gives in eval mode, without gradients."""
        with torch.no_grad():
            return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> "SkippingNetwork":
        """Eval mode is all there is."""
        if mode:
            raise OptionError(
                "norms are folded into convolutions here; train the PathDecoupler and make skipping() anew"
            )
        return super().train(False)

    def layers(self) -> dict[str, SkipConv]:
        """The convolutions that can skip, by the name they have in the model."""
        return {
            name.removeprefix("skip_").replace("__", "."): module
            for name, module in self.network.named_children()
            if isinstance(module, SkipConv)
        }


def skipping(
    decoupler: "PathDecoupler", example: tuple[Any, ...], paths: "Paths | None", measured: bool
) -> SkippingNetwork:
    """See `PathDecoupler.skipping`."""
    if measured and not example:
        raise OptionError("skipping() needs one batch to time the layers with, got none; pass it, or measured=False")
    if len(example) == 1 and isinstance(example[0], tuple):
        example = example[0]
    try:
        calls = calls_of(decoupler.model)
    except LayerError as error:
        traced = str(error).split("; pass example_input=")[0]
        raise LayerError(f"{traced}; skipping() rewrites the traced network: it needs one without such code") from error
    model = deepcopy(decoupler.model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    network = fx.GraphModule(model, deepcopy(cast("fx.Graph", calls.graph)))
    name_what_is_changed_in_place(network)
    fold(network)
    controllers: dict[str, Any] = {
        name: deepcopy(each).eval() for name, each in zip(decoupler.layers, decoupler.controllers, strict=True)
    }
    closed = _never_open(decoupler, paths)
    _Rewriter(network, {unit.conv: unit.site for unit in decoupler.units}, controllers, closed).run()
    made = SkippingNetwork(network)
    if measured:
        _measure(made, example)
    return made


def _never_open(decoupler: "PathDecoupler", paths: "Paths | None") -> dict[str, Tensor]:
    """Filters that stay closed whatever the input, by their weights; and those that were closed in all ``paths``."""
    if paths is not None and paths.fingerprint != fingerprint(decoupler):
        raise MergeError("the paths are of another network's controllers; collect them with this decoupler")
    found = {}
    for index, (name, controller) in enumerate(zip(decoupler.layers, decoupler.controllers, strict=True)):
        # hidden units are never negative
        excite: Any = controller.excite
        found[name] = (excite.weight <= 0).all(1) & (excite.bias <= 0)
        if paths is not None:
            found[name] = found[name] | ~paths.bits(index).any(0).to(found[name].device)
    return found


class _Gate(nn.Module):
    """The gates of a unit whose norm cannot be folded: its channels are computed, and then closed."""

    def __init__(self, controller: Controller) -> None:
        super().__init__()
        self.controller = controller

    def forward(self, features: Tensor, output: Tensor) -> Tensor:
        """The convolution's input, and what the norm gave."""
        gates = self.controller(features)
        return mask(output, gates)


class _Rewriter:
    """Goes through the graph once; knows which nodes give pieces."""

    def __init__(
        self,
        network: fx.GraphModule,
        sites: dict[str, str],
        controllers: dict[str, Controller],
        closed: dict[str, Tensor],
    ) -> None:
        self._network, self._graph = network, network.graph
        left = {str(node.target) for node in self._graph.nodes}
        # where a norm was folded, its convolution gives what it gave
        self._sites = {conv: site if site in left else conv for conv, site in sites.items()}
        self._controllers, self._closed = controllers, closed
        self._gives_pieces: set[fx.Node] = set()

    def run(self) -> None:
        inputs = {}  # of convolutions whose gates are applied elsewhere
        sites = {site: conv for conv, site in self._sites.items()}
        for node in list(self._graph.nodes):
            name = str(node.target)
            module = self._network.get_submodule(name) if node.op == "call_module" else None
            if isinstance(module, CONVS) and self._can_skip(module, node, name):
                self._skip(node, module, name)
                continue
            if not self._through_pieces(node):
                self._fill(node)
            if name in self._controllers and module is not None:
                inputs[name] = node.args[0]
            if module is not None and name in sites and sites[name] in inputs:
                self._gate(node, sites[name], inputs[sites[name]])
        self._link()
        self._lead_in()
        self._graph.lint()
        self._network.recompile()
        self._network.delete_all_unused_submodules()

    def _link(self) -> None:
        """Tell each convolution which others get its open channels."""
        sources: dict[fx.Node, list[SkipConv]] = {}
        for node in self._graph.nodes:
            before = [conv for source in node.all_input_nodes for conv in sources.get(source, [])]
            module = self._network.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, SkipConv):
                for conv in before:
                    conv.next.append(module)
                before = [module]
            sources[node] = before if node in self._gives_pieces else []

    def _lead_in(self) -> None:
        """What comes before the first gate runs channels last, where pooling and few input channels are faster."""
        ahead: set[fx.Node] = set()
        for node in list(self._graph.nodes):
            if node.op == "placeholder" or (node.all_input_nodes and ahead.issuperset(node.all_input_nodes)):
                module = self._network.get_submodule(str(node.target)) if node.op == "call_module" else None
                if not isinstance(module, SkipConv):
                    ahead.add(node)
        for node in ahead:
            begins, ends = node.op == "placeholder", any(user not in ahead for user in node.users)
            if begins or ends:
                name = f"format_{node.name}"
                self._network.add_submodule(name, Format(leads_in=begins and not ends))
                with self._graph.inserting_after(node):
                    changed = self._graph.call_module(name, (node,))
                _put_after(node, changed)

    def _can_skip(self, conv: Any, node: fx.Node, name: str) -> bool:
        """Ungrouped or depthwise, padded with zeros, called once; a gate belongs on its own output."""
        gated = name in self._controllers
        folded = not gated or self._sites[name] == name
        depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1
        plain = (conv.groups == 1 or (depthwise and gated)) and conv.padding_mode == "zeros" and type(conv) in CONVS
        plain = plain and not has_hooks(conv)
        useful = gated or node.args[0] in self._gives_pieces
        return bool(plain and folded and useful and times(self._network, node) == 1)

    def _skip(self, node: fx.Node, conv: nn.Module, name: str) -> None:
        controller = self._controllers.get(name)
        own = "skip_" + name.replace(".", "__")
        self._network.add_submodule(own, SkipConv(conv, controller, self._closed.get(name)))
        node.target = own
        if controller is not None:
            self._gives_pieces.add(node)

    def _through_pieces(self, node: fx.Node) -> bool:
        """Let a node that works on each channel alone, a sum or a concatenation take pieces; whether it does."""
        sources = [source for source in node.all_input_nodes if source in self._gives_pieces]
        if not sources:
            return True
        if node.op == "call_function" and node.target in _SUMS and len(node.args) == 2 and not node.kwargs:
            if all(isinstance(source, fx.Node) for source in node.args):
                _call(node, pieces.plus)
                return True
            return False
        if node.op == "call_function" and node.target in (torch.cat, torch.concat) and _dim(node) == 1:
            values = node.args[0] if node.args else node.kwargs["tensors"]
            node.args, node.kwargs = (values,), {}
            _call(node, pieces.concatenated)
            self._gives_pieces.add(node)
            return True
        if len(node.all_input_nodes) == 1 and keeps_zero(node, self._network) and not self._knows_channels(node):
            self._each(node)
            self._gives_pieces.add(node)
            return True
        return False

    def _knows_channels(self, node: fx.Node) -> bool:
        """It has weights for each channel, as a PReLU may, or gives more than maps."""
        module: Any = self._network.get_submodule(str(node.target)) if node.op == "call_module" else None
        weighted = module is not None and any(weight.numel() > 1 for weight in module.parameters())
        return weighted or bool(getattr(module, "return_indices", node.kwargs.get("return_indices", False)))

    def _each(self, node: fx.Node) -> None:
        function: Any = node.target
        if node.op == "call_module":
            function = self._network.get_submodule(str(node.target))
        elif node.op == "call_method":
            function = _Method(str(node.target))
        # a module: the code of a graph cannot name a function among its arguments
        name = f"each_{node.name}"
        self._network.add_submodule(name, _Each(function))
        node.op, node.target = "call_module", name

    def _fill(self, node: fx.Node) -> None:
        """Zeros for closed channels, before a node that knows nothing of pieces."""
        for source in list(node.all_input_nodes):
            if source in self._gives_pieces:
                with self._graph.inserting_before(node):
                    filled = self._graph.call_function(pieces.full, (source,))
                _call(filled, pieces.full)
                node.replace_input_with(source, filled)

    def _gate(self, node: fx.Node, conv: str, features: Any) -> None:
        name = "gate_" + conv.replace(".", "__")
        self._network.add_submodule(name, _Gate(self._controllers[conv]))
        with self._graph.inserting_after(node):
            gated = self._graph.call_module(name, (features, node))
        _put_after(node, gated)


def _call(node: fx.Node, function: Any) -> None:
    """Let a node call one of the functions of `pieces`, also when the graph is traced anew: as on loading a pickle."""
    node.target = function
    node.meta["is_wrapped"] = True


def _put_after(node: fx.Node, new: fx.Node) -> None:
    """Let all others that take the result of ``node`` take that of ``new``."""
    for user in list(node.users):
        if user is not new:
            user.replace_input_with(node, new)


class _Each(nn.Module):
    """A module or function that works on each channel alone, for pieces."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Pieces in, pieces out."""
        return pieces.each(self.function, value, *args, **kwargs)


class Format(nn.Module):
    """The memory format in which maps go on: what leads in to the first gate always has its channels last."""

    def __init__(self, leads_in: bool) -> None:
        super().__init__()
        # not the format itself, which torch.save cannot write
        self.leads_in = self._channels_last = leads_in

    @property
    def memory_format(self) -> torch.memory_format:
        """Of what comes out."""
        return torch.channels_last if self._channels_last else torch.contiguous_format

    @memory_format.setter
    def memory_format(self, memory_format: torch.memory_format) -> None:
        self._channels_last = memory_format is torch.channels_last

    def forward(self, value: Any) -> Any:
        """A copy, unless it is so already."""
        if isinstance(value, Tensor) and value.dim() == 4:
            return value.contiguous(memory_format=self.memory_format)
        return value


class _Method:
    """A method of tensors, as a function: ``x.relu()``."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(value, self.__name__)(*args, **kwargs)  # type: ignore[no-any-return]


def _dim(node: fx.Node) -> Any:
    return node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)


def _measure(made: SkippingNetwork, example: Sequence[Any]) -> None:
    """Time the convolutions, and then the whole, in both memory formats; keep the faster."""
    layers = made.layers().values()
    if not layers:
        return
    device = next(iter(layers)).weight.device
    found = []
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            _set_format(made, memory_format)
            for layer, value in _seen_by(made, example).items():
                layer.costs = measure(layer, pieces.full(value)[:1])
            # when all are timed: each reckons with those that follow it
            for layer, value in _seen_by(made, example).items():
                layer.look_at(value)
            state = {layer: (layer.costs, layer.by_product, layer.prefers_dense) for layer in layers}
            found.append((seconds(lambda: made(*example), device), memory_format, state))
        _, memory_format, state = min(found, key=lambda each: each[0])
        for layer, (layer.costs, layer.by_product, layer.prefers_dense) in state.items():
            layer.forget()
        _set_format(made, memory_format)


def _set_format(made: SkippingNetwork, memory_format: torch.memory_format) -> None:
    for module in made.network.modules():
        if isinstance(module, Format) and not module.leads_in:
            module.memory_format = memory_format
    for layer in made.layers().values():
        layer.set_format(memory_format)


def _seen_by(made: SkippingNetwork, example: Sequence[Any]) -> dict[SkipConv, Any]:
    """What each convolution gets."""
    values: dict[SkipConv, Any] = {}

    def seen(layer: SkipConv, args: Any) -> None:
        values[layer] = args[0]

    with borrowed(made.network) as borrow:
        for layer in made.layers().values():
            borrow.before(layer, seen)
        made(*example)
    return values
