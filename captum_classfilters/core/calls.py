"""What a model calls in one forward, in order: its layers and functions, and which result goes where.

The calls are read by symbolic tracing or, where Python code depends on values, by running an example.
`decoupling/units.py` finds in them what can be gated, `skipping/network.py` rewrites the traced graph.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import LayerError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
# Names of functions and of other packages' modules begin so: torchvision's FrozenBatchNorm2d, timm's BatchNormAct2d
_NORM_WORDS = ("batchnorm", "groupnorm", "instancenorm", "layernorm", "frozenbatchnorm")
_SIZES = ("size", "dim", "numel", "stride", "iscontiguous")
_ARITHMETIC = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "eq")

# To a single position, over all of them
GLOBAL_POOL = "globalpool"


# Operations that give zeros for a channel of zeros, at the same place
KEEP_ZERO = frozenset((
    GLOBAL_POOL,
    "relu", "relu6", "silu", "swish", "hardswish", "gelu", "leakyrelu", "elu", "celu", "selu", "prelu", "mish",
    "tanh", "identity", "dropout", "dropout2d", "featuredropout", "alphadropout", "stochasticdepth", "droppath",
    "maxpool1d", "maxpool2d", "maxpool3d", "avgpool1d", "avgpool2d", "avgpool3d", "adaptiveavgpool1d",
    "adaptiveavgpool2d", "adaptiveavgpool3d", "adaptivemaxpool1d", "adaptivemaxpool2d", "adaptivemaxpool3d",
    "contiguous", "clone", "detach", "float", "half", "bfloat16", "interpolate", "upsample", "neg", "abs", "sqrt",
    "square",
))  # fmt: skip


class Call(NamedTuple):
    """One call; results are numbered, and the model's input comes from no call."""

    op: str  # "conv", "norm", or the name of a function or module class, in small letters and without underscores
    inputs: tuple[int, ...]
    output: int
    module: str = ""  # dotted name, where it is a module that is called
    dim: int | None = None  # of cat


class Calls(NamedTuple):
    """All calls of a forward, and the results that it returns."""

    calls: tuple[Call, ...]
    returned: frozenset[int]
    graph: fx.Graph | None  # None: found by running

    def users(self, result: int) -> list[Call]:
        """The calls that take this result; one that takes it twice comes once."""
        return [call for call in self.calls if result in call.inputs]


def is_norm(module: nn.Module) -> bool:
    """Batch, group, instance or layer normalisation, of torch or by its class's name."""
    return isinstance(module, _NORMS) or type(module).__name__.lower().startswith(_NORM_WORDS)


def calls_of(model: nn.Module, example: Any = None) -> Calls:
    """The calls of ``model`` in eval mode: traced, or recorded while ``example`` runs.

    Args:
        model: Any model; it is given back as it was.
        example: The arguments of one forward, for a model that cannot be traced; None: trace.

    Raises:
        LayerError: It cannot be traced and there is no example.
    """
    if example is not None:
        return _by_running(model, example if isinstance(example, tuple) else (example,))
    with borrowed(model, grad=torch.is_grad_enabled()):
        try:
            graph = _traced(model)
        except Exception as error:  # anything a forward may do to a symbol in the place of a tensor
            raise LayerError(
                f"{type(model).__name__} cannot be traced: {_first_line(error)}{_where(error)}; pass example_input= "
                "with one batch, and its layers are found by running it"
            ) from error
    return _from_graph(model, graph)


# torch.fx patches nn.Module while it traces: one trace at a time, or the second would restore the first one's patch
_TRACING = threading.Lock()


def _traced(model: nn.Module) -> fx.Graph:
    """The graph of a model, traced in a thread of its own.

    Only there the patches of torch.fx have an effect (`Tracer`), so other threads run their models meanwhile. Ctrl-C
    comes to the main thread, so it cannot leave the patches on.
    """
    outcome: list[Any] = []
    grad = torch.is_grad_enabled()

    def trace() -> None:
        with _TRACING, torch.set_grad_enabled(grad):
            try:
                outcome.append(Tracer().trace(model, concrete_args=_defaults(model)))
            except BaseException as error:
                outcome.append(error)

    thread = threading.Thread(target=trace, name="captum_classfilters tracing", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        thread.join()  # the patches must be gone before anything else runs
        raise
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    graph: fx.Graph = result
    return graph


class Tracer(fx.Tracer):
    """Looks into everything but torch's own layers, norms, and modules that hold no others.

    Modules that other threads call while it traces are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of a module; of another thread's: the call itself."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """An attribute of a module; of another thread's: the attribute itself."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of ``m`` stay one call."""
        return super().is_leaf_module(m, module_qualified_name) or is_norm(m) or next(m.children(), None) is None


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Arguments of the forward that have a default keep it: a flag may be asked for its value."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _where(error: Exception) -> str:
    """The line of the model's code at which tracing ended."""
    traced = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    frames = [frame for frame in traced if "/torch/" not in frame.filename and frame.filename != __file__]
    line = (frames[-1].code_context or [""])[0].strip() if frames else ""
    return f' (at "{line}")' if line else ""


def _from_graph(model: nn.Module, graph: fx.Graph) -> Calls:
    numbers = {node: index for index, node in enumerate(graph.nodes)}
    calls, returned, sizes = [], frozenset[int](), set[fx.Node]()
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source not in sizes]
        inputs = tuple(numbers[source] for source in sources)
        if _is_size(node, sources):
            sizes.add(node)
            continue
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            calls.append(Call(_op_of(module), inputs, numbers[node], str(node.target)))
        elif node.op in ("call_function", "call_method"):
            op = _function_op(node.target, node.args, node.kwargs)
            calls.append(Call(op, inputs, numbers[node], dim=_dim(op, node.args, node.kwargs)))
        elif node.op == "output":
            returned = frozenset(inputs)
    return Calls(tuple(calls), returned, graph)


def _is_size(node: fx.Node, sources: list[fx.Node]) -> bool:
    """It asks for a shape and for no value, or computes with shapes alone; running an example does not record these."""
    if node.op not in ("call_function", "call_method"):
        return False
    op = named(node.target)
    if op == "getattr":
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return op in _SIZES or (not sources and bool(node.all_input_nodes) and op in _ARITHMETIC)


def _op_of(module: nn.Module) -> str:
    if isinstance(module, CONVS):
        return "conv"
    if is_norm(module):
        return "norm"
    op = named(type(module))
    return GLOBAL_POOL if op.startswith("adaptive") and _is_one(getattr(module, "output_size", None)) else op


def _function_op(target: Any, args: Any, kwargs: Any) -> str:
    op = named(target)
    second = args[1] if len(args) > 1 else None
    if op.startswith("adaptive") and _is_one(kwargs.get("output_size", second)):
        return GLOBAL_POOL
    dims = kwargs.get("dim", second) if op == "mean" else None
    over_positions = isinstance(dims, list | tuple) and len(dims) > 1 and 0 not in dims and 1 not in dims
    return GLOBAL_POOL if over_positions else op


def _is_one(size: Any) -> bool:
    return bool(size) and all(side == 1 for side in (size if isinstance(size, list | tuple) else (size,)))


def named(target: Any) -> str:
    """The name of a function, method or class in small letters and without underscores."""
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.replace("_", "").lower()


def _dim(op: str, args: Any, kwargs: Any) -> int | None:
    if op not in ("cat", "concat", "concatenate"):
        return None
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return dim if isinstance(dim, int) else None


class _Recorder(TorchFunctionMode):
    """Records what runs, except inside a convolution, a norm or a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.inside = 0
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # while these tensors live, no other tensor has their id

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            return self.renumber(tensor)
        return self._numbers[id(tensor)]

    def renumber(self, tensor: Tensor) -> int:
        """A new number for the result of a call, also where it is the tensor that came in: an operation in place."""
        self._numbers[id(tensor)] = len(self._alive)
        self._alive.append(tensor)
        return self._numbers[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tuple(dict.fromkeys(self.number(tensor) for tensor in _tensors((args, kwargs))))
        result = func(*args, **kwargs)
        outputs = list(_tensors(result))
        if outputs and not self.inside:
            op = _function_op(func, args, kwargs)
            output = self.renumber(outputs[0])
            self.calls.append(Call(op, inputs, output, dim=_dim(op, args, kwargs)))
            for further in outputs[1:]:
                self.calls.append(Call(op, inputs, self.renumber(further)))
        return result


def _by_running(model: nn.Module, example: tuple[Any, ...]) -> Calls:
    recorder = _Recorder()
    names = {module: name for name, module in model.named_modules()}
    with borrowed(model) as borrow:
        for module in names:
            if isinstance(module, (*CONVS, nn.Linear)) or is_norm(module):
                borrow.before(module, _entering(recorder))
                borrow.after(module, _leaving(recorder, names))
        with recorder:
            result = model(*example)
    returned = frozenset(recorder.number(tensor) for tensor in _tensors(result))
    return Calls(tuple(recorder.calls), returned, None)


def _entering(recorder: _Recorder) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        recorder.inside += 1

    return hook


def _leaving(recorder: _Recorder, names: dict[nn.Module, str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        recorder.inside -= 1
        if not recorder.inside and isinstance(output, Tensor):
            inputs = tuple(dict.fromkeys(recorder.number(tensor) for tensor in _tensors(args)))
            recorder.calls.append(Call(_op_of(module), inputs, recorder.renumber(output), names[module]))

    return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "to_tuple"):
        with suppress(TypeError):
            yield from _tensors(value.to_tuple())


def keeps_zero(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node of a traced graph works on each channel alone and leaves zeros zero."""
    target: Any = type(model.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    return named(target) in KEEP_ZERO


def changes_in_place(node: fx.Node) -> bool:
    """``x.add_(y)``, ``F.relu_(x)``, ``x += y``."""
    target = node.target if node.op in ("call_function", "call_method") else ""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in ("iadd", "isub", "imul", "itruediv")
