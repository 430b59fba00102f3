"""A traced network made ready for rewriting: what is changed in place has one name, norms are in their convolutions."""

from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captum_classfilters.decoupling.calls import CONVS
from captum_classfilters.decoupling.flow import changes_in_place

_WITH_ACTIVATION = ("BatchNormAct2d",)  # timm's
_FOLDED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def name_what_is_changed_in_place(network: fx.GraphModule) -> None:
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


def fold(network: fx.GraphModule) -> None:
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
        if has_hooks(conv) or has_hooks(norm):
            continue
        if times(network, source) > 1 or times(network, node) > 1:
            continue
        _put(network, str(source.target), fuse_conv_bn_eval(conv, norm))
        if with_activation:
            # under a name of its own: the norm's is where the gate would stand, and it is in the convolution now
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


def has_hooks(module: nn.Module) -> bool:
    """Hooks of the user's, which a rewritten convolution would not call."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def times(network: fx.GraphModule, node: fx.Node) -> int:
    """How often the module of this node is called."""
    return sum(other.op == "call_module" and other.target == node.target for other in network.graph.nodes)


def _put(network: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
