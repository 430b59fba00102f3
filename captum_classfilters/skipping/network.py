"""`skip_closed`: a copy of a gated network that computes only the open work.

The traced network is rewritten: norms are folded into their convolutions, these become `SkipConv`, and what lies
between them handles `Pieces`. Where a result goes into anything unknown, closed channels are filled with zeros first.
"""

import operator
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.calls import CONVS, calls_of, changes_in_place, keeps_zero
from captum_classfilters.core.copies import copied
from captum_classfilters.core.errors import LayerError, OptionError
from captum_classfilters.core.stream import Placement
from captum_classfilters.skipping import pieces
from captum_classfilters.skipping.skip_conv import SkipConv, measure, seconds

_SUMS = (operator.add, operator.iadd, torch.add)
_WITH_ACTIVATION = ("BatchNormAct2d",)  # timm's
_FOLDED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GatedConv(NamedTuple):
    """One gated convolution of a network, in the only form in which this room knows gates."""

    conv: str  # dotted name
    site: str  # dotted name of the module whose output is multiplied by the gates: its norm, or the convolution
    controller: Any  # a module: the convolution's input to gates (N, K), by its linear layers `squeeze` and `excite`
    closed: Tensor  # (K,) bool: filters that are never to open


class SkippingNetwork(nn.Module):
    """The result of `PathDecoupler.skipping`: the same outputs for less work, for inference only.

    Attributes:
        network: The rewritten graph.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the gated network in eval mode, without gradients."""
        placement = Placement.of(self.network)
        args = tuple(placement.move(value) for value in args)
        with torch.no_grad():
            return self.network(*args, **{name: placement.move(value) for name, value in kwargs.items()})

    def train(self, mode: bool = True) -> "SkippingNetwork":
        """Refuse train mode: norms are folded into convolutions."""
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


def skip_closed(
    model: nn.Module, gated: Iterable[GatedConv], example: tuple[Any, ...] | None = None
) -> SkippingNetwork:
    """A copy of ``model``, with its gates, that leaves out what they close; see `PathDecoupler.skipping`.

    Args:
        model: The network without gates.
        gated: Its gated convolutions.
        example: Arguments of one forward, to time each convolution with; None: always skip.

    Raises:
        LayerError: The model cannot be traced.
    """
    try:
        calls = calls_of(model)
    except LayerError as error:
        reason = str(error).split("; pass example_input=")[0]
        raise LayerError(f"{reason}; skipping() rewrites the traced network: it needs one without such code") from error
    gated = list(gated)
    copy = copied(model).eval()
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    network = fx.GraphModule(copy, deepcopy(cast("fx.Graph", calls.graph)))
    _name_what_is_changed_in_place(network)
    _fold(network)
    _Rewriter(network, gated).run()
    skipping_network = SkippingNetwork(network)
    if example is not None:
        _measure(skipping_network, example)
    return skipping_network


class _Gate(nn.Module):
    """The gates of a convolution whose norm cannot be folded: all channels are computed, and then closed."""

    def __init__(self, controller: nn.Module) -> None:
        super().__init__()
        self.controller = controller

    def forward(self, features: Tensor, output: Tensor) -> Tensor:
        """The convolution's input and the norm's output, to the masked output."""
        gates = self.controller(features)
        return output * pieces.factors(gates, output)


class _Rewriter:
    """Goes through the graph once; knows which nodes give pieces."""

    def __init__(self, network: fx.GraphModule, gated: Sequence[GatedConv]) -> None:
        self._network, self._graph = network, network.graph
        targets = {str(node.target) for node in self._graph.nodes}
        # a folded norm is no longer there: its convolution gives its output
        self._sites = {item.conv: item.site if item.site in targets else item.conv for item in gated}
        self._controllers = {item.conv: deepcopy(item.controller).eval() for item in gated}
        self._closed = {item.conv: item.closed for item in gated}
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
        plain = plain and not _has_hooks(conv)
        useful = gated or node.args[0] in self._gives_pieces
        return bool(plain and folded and useful and _times(self._network, node) == 1)

    def _skip(self, node: fx.Node, conv: nn.Module, name: str) -> None:
        controller = self._controllers.get(name)
        new_name = "skip_" + name.replace(".", "__")
        self._network.add_submodule(new_name, SkipConv(conv, controller, self._closed.get(name)))
        node.target = new_name
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
    """Let a node call one of the functions of `pieces`, also when the graph is traced anew, as unpickling does."""
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


def _name_what_is_changed_in_place(network: fx.GraphModule) -> None:
    """After an operation in place, use its result where the graph goes on naming what it changed."""
    order = {node: index for index, node in enumerate(network.graph.nodes)}
    for node in network.graph.nodes:
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        if getattr(module, "inplace", False) or node.kwargs.get("inplace") or changes_in_place(node):
            for user in list(node.args[0].users):
                if order[user] > order[node]:
                    user.replace_input_with(node.args[0], node)


def _fold(network: fx.GraphModule) -> None:
    """Batch norms into the convolutions before them; of timm's, the activation stays."""
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        norm: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        kind = type(norm)
        with_activation = kind.__name__ in _WITH_ACTIVATION and isinstance(norm, nn.BatchNorm2d)
        if not (kind in _FOLDED or with_activation) or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        conv: Any = modules.get(str(source.target))
        # not a subclass, which may do more with its weights than multiply
        if type(conv) not in CONVS or len(source.users) > 1 or norm.running_mean is None:
            continue
        if _has_hooks(conv) or _has_hooks(norm):
            continue
        if _times(network, source) > 1 or _times(network, node) > 1:
            continue
        _put(network, str(source.target), fuse_conv_bn_eval(conv, norm))
        if with_activation:
            # under a new name: at the norm's the gate would stand, and the norm is in the convolution now
            name = "act_of_" + str(node.target).replace(".", "__")
            network.add_submodule(name, nn.Sequential(norm.drop, norm.act) if _is_step(norm.drop) else norm.act)
            node.target = name
            continue
        node.replace_all_uses_with(source)
        network.graph.erase_node(node)
    network.recompile()


def _is_step(module: nn.Module) -> bool:
    """Whether it does anything in eval mode."""
    return not isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d)


def _has_hooks(module: nn.Module) -> bool:
    """Hooks of the user's, which a rewritten convolution would not call."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _times(network: fx.GraphModule, node: fx.Node) -> int:
    """How often the module of this node is called."""
    return sum(other.op == "call_module" and other.target == node.target for other in network.graph.nodes)


def _put(network: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)


def _measure(skipping_network: SkippingNetwork, example: Sequence[Any]) -> None:
    """Time the convolutions, and then the whole, in both memory formats; keep the faster."""
    layers = skipping_network.layers().values()
    if not layers:
        return
    device = next(iter(layers)).weight.device
    timed = []
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            _set_format(skipping_network, memory_format)
            for layer, value in _seen_by(skipping_network, example).items():
                layer.costs = measure(layer, pieces.full(value)[:1])
            # after all are timed: each one counts on those that follow it
            for layer, value in _seen_by(skipping_network, example).items():
                layer.look_at(value)
            state = {layer: (layer.costs, layer.by_product, layer.prefers_dense) for layer in layers}
            timed.append((seconds(lambda: skipping_network(*example), device), memory_format, state))
        _, memory_format, state = min(timed, key=lambda row: row[0])
        for layer, (layer.costs, layer.by_product, layer.prefers_dense) in state.items():
            layer.forget()
        _set_format(skipping_network, memory_format)


def _set_format(skipping_network: SkippingNetwork, memory_format: torch.memory_format) -> None:
    for module in skipping_network.network.modules():
        if isinstance(module, Format) and not module.leads_in:
            module.memory_format = memory_format
    for layer in skipping_network.layers().values():
        layer.set_format(memory_format)


def _seen_by(skipping_network: SkippingNetwork, example: Sequence[Any]) -> dict[SkipConv, Any]:
    """The input of each convolution."""
    values: dict[SkipConv, Any] = {}

    def seen(layer: SkipConv, args: Any) -> None:
        values[layer] = args[0]

    with borrowed(skipping_network.network) as borrow:
        for layer in skipping_network.layers().values():
            borrow.before(layer, seen)
        skipping_network(*example)
    return values
