"""The network that MODEL names: torchvision's, timm's, or what a function of the user's returns; and its weights.

Weights are read without running anything in their file, and put into the network whole or not at all.
"""

import argparse
import difflib
import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PosixPath, PurePosixPath, WindowsPath
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_classfilters.cli.data import Preprocessing
from captum_classfilters.core.errors import ClassFiltersError, FileFormatError, OptionError, ShapeError, brief, quoted

# Under which key training scripts keep the network, and what DataParallel and torch.compile put before its names
_INSIDE = ("state_dict", "model_state_dict", "model", "network", "net", "weights")
# A number of outputs that no other dimension of a network has
_PROBE = 1013


class Network(NamedTuple):
    """A network with its weights."""

    model: nn.Module  # on the CPU
    about: str
    recipe: list[str]  # lines of Python that make it, without weights
    preprocessing: Preprocessing | None  # of published weights
    guessed: bool = False  # that of the architecture's own weights; the file does not say which was used


def find_model(options: Any, data_classes: int) -> Network:
    """Make the network and load its weights.

    Args:
        options: ``model``, ``weights``, ``pretrained``, ``random_weights`` and ``num_classes`` of the command line.
        data_classes: Classes of the images, for a network whose number stands nowhere else.
    """
    # a wrong path is refused before anything slow
    weights = None if options.weights is None else read_weights(options.weights, options.checkpoint_key)
    state = None if weights is None else weights.tensors
    package, _, rest = options.model.partition(":")
    if rest and package not in _ZOOS:
        network = _from_callable(options)
        if state is not None:
            state, notes = aligned(state, network.model.state_dict())
            fill(network.model, state, options.weights, options.model)
    else:
        zoo, name = _zoo_of(options.model)
        if options.pretrained:
            return _published(zoo, name, options.num_classes)
        if state is None and not options.random_weights:
            raise OptionError(
                f"{name} without weights: channels of a random network work for no class; pass --weights FILE, or "
                "--pretrained for the published ones (--random-weights to try this out)"
            )
        extra: dict[str, Any] = zoo.extra(name, state)
        if state is not None:
            state, notes = aligned(state, _skeleton(lambda classes: zoo.make(name, classes, **extra)))
            extra = zoo.extra(name, state)
        classes = _classes(zoo, name, state, options, data_classes, extra)
        model = zoo.make(name, classes, **extra)
        usual, recipe = zoo.usual_preprocessing(name, model), zoo.recipe(name, classes, **extra)
        network = Network(model, f"{zoo.package}:{name}", recipe, usual, guessed=zoo is _ZOOS["torchvision"])
        if state is not None:
            fill(network.model, state, options.weights, network.about)
    if weights is None:
        return network._replace(about=network.about + ", random weights" * options.random_weights)
    said = "; ".join([*weights.notes, *notes])
    return network._replace(about=f"{network.about}, weights {options.weights}" + (f" ({said})" if said else ""))


def _classes(zoo: "Zoo", name: str, state: Any, options: Any, data_classes: int, extra: Mapping[str, Any]) -> int:
    """Outputs of the network to make: as requested, as in the file, or as in the data."""
    in_file = None if state is None else classes_in(state, lambda classes: zoo.make(name, classes, **extra))
    if in_file is not None and options.num_classes not in (None, in_file):
        raise OptionError(
            f"the head in {options.weights} has {in_file} classes, --num-classes says {options.num_classes}; leave it "
            f"out, or pass --num-classes {in_file}"
        )
    return int(options.num_classes or in_file or data_classes)


# -- torchvision and timm ----------------------------------------------------------------------------------------------


class Zoo(Protocol):
    """A package of networks."""

    package: str

    def names(self) -> Sequence[str]: ...  # noqa: D102
    def has(self, name: str) -> bool: ...  # noqa: D102
    def extra(self, name: str, state: Mapping[str, Tensor] | None) -> dict[str, Any]: ...  # noqa: D102
    def make(self, name: str, classes: int, **extra: Any) -> nn.Module: ...  # noqa: D102
    def recipe(self, name: str, classes: int, **extra: Any) -> list[str]: ...  # noqa: D102
    def usual_preprocessing(self, name: str, model: nn.Module) -> Preprocessing | None: ...  # noqa: D102
    def published(self, name: str) -> tuple[nn.Module, int, Preprocessing]: ...  # noqa: D102


class _Torchvision:
    package = "torchvision"

    def names(self) -> Sequence[str]:
        from torchvision import models

        names: list[str] = models.list_models(module=models)  # the classifiers
        return names

    def has(self, name: str) -> bool:
        return name in self.names()

    def make(self, name: str, classes: int, **extra: Any) -> nn.Module:
        from torchvision import models

        model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **extra)
        return model

    def recipe(self, name: str, classes: int, **extra: Any) -> list[str]:
        words = "".join(f", {key}={value}" for key, value in extra.items())
        return [
            "import torchvision",
            f'model = torchvision.models.get_model("{name}", weights=None, num_classes={classes}{words})',
        ]

    def usual_preprocessing(self, name: str, model: nn.Module) -> Preprocessing | None:
        from torchvision import models

        # the first weights of an architecture are those of its own training: others are tuned at other sizes
        first = next(iter(models.get_model_weights(name)), None)
        return None if first is None else self.preprocessing(first.transforms())

    def published(self, name: str) -> tuple[nn.Module, int, Preprocessing]:
        from torchvision import models

        weights = models.get_model_weights(name).DEFAULT
        model: nn.Module = models.get_model(name, weights=weights)
        return model, len(weights.meta["categories"]), self.preprocessing(weights.transforms())

    @staticmethod
    def preprocessing(theirs: Any) -> Preprocessing:
        mean, std = tuple(theirs.mean), tuple(theirs.std)
        return Preprocessing(
            len(mean), theirs.resize_size[0], theirs.crop_size[0], mean, std, theirs.interpolation.value
        )

    def extra(self, name: str, state: Mapping[str, Tensor] | None) -> dict[str, Any]:
        if name not in ("inception_v3", "googlenet"):
            return {}
        # these two warn unless told whether to draw weights, which takes seconds and a file will overwrite
        extra: dict[str, Any] = {"init_weights": False}
        if state is not None:
            # as torchvision's published ones, from which others are fine-tuned; no state dict tells it
            extra["transform_input"] = True
            if not any(part in ("AuxLogits", "aux1", "aux2") for key in state for part in key.split(".")):
                extra["aux_logits"] = False
        return extra


class _Timm:
    package = "timm"

    def names(self) -> Sequence[str]:
        names: list[str] = self._timm().list_models()
        return names

    def has(self, name: str) -> bool:
        # "resnet50.a1_in1k": the architecture, and which training
        return bool(self._timm().is_model(name))

    def extra(self, name: str, state: Mapping[str, Tensor] | None) -> dict[str, Any]:
        return {}

    def make(self, name: str, classes: int, **extra: Any) -> nn.Module:
        model: nn.Module = self._timm().create_model(name, pretrained=False, num_classes=classes, **extra)
        return model

    def usual_preprocessing(self, name: str, model: nn.Module) -> Preprocessing | None:
        return self.preprocessing(self._timm().data.resolve_model_data_config(model))

    def recipe(self, name: str, classes: int, **extra: Any) -> list[str]:
        return ["import timm", f'model = timm.create_model("{name}", num_classes={classes})']

    def published(self, name: str) -> tuple[nn.Module, int, Preprocessing]:
        timm = self._timm()
        model = timm.create_model(name, pretrained=True)
        return model, model.num_classes, self.preprocessing(timm.data.resolve_model_data_config(model))

    @staticmethod
    def preprocessing(theirs: dict[str, Any]) -> Preprocessing:
        size = theirs["input_size"]
        larger = math.floor(size[-1] / theirs["crop_pct"])
        return Preprocessing(
            size[0], larger, size[-1], tuple(theirs["mean"]), tuple(theirs["std"]), theirs["interpolation"]
        )

    @staticmethod
    def _timm() -> Any:
        return importlib.import_module("timm")


_ZOOS: dict[str, Zoo] = {"torchvision": _Torchvision(), "timm": _Timm()}


def _zoo_of(text: str) -> tuple[Zoo, str]:
    """The package that has the network, and its name there; a bare name is looked for in each that is installed."""
    package, colon, name = text.partition(":")
    if colon and not name:
        raise OptionError(f"{text!r} names no network; expected {package}:NAME, such as {package}:resnet50")
    asked = {package: _ZOOS[package]} if colon else _ZOOS
    all_names: list[str] = []
    looked: list[str] = []
    for zoo in asked.values():
        try:
            if zoo.has(name or text):
                return zoo, name or text
            all_names += zoo.names()
            looked.append(zoo.package)
        except ImportError:
            if colon:
                raise
    close = list(dict.fromkeys(difflib.get_close_matches(name or text, all_names, n=5)))
    hint = f"did you mean {', '.join(close)}?" if close else "expected such as resnet50"
    absent = "" if colon or len(looked) == len(asked) else "; timm is not installed: pip install timm"
    raise OptionError(
        f"no classifier is called {name or text!r} in {' or '.join(looked)}; {hint} Your own: package.module:callable"
        f"{absent}"
    )


def _published(zoo: Zoo, name: str, classes: int | None) -> Network:
    try:
        model, outputs, preprocessing = zoo.published(name)
    except ImportError:
        raise
    except Exception as error:  # two packages and their downloaders, each with errors of its own
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ClassFiltersError(
            f"the published weights of {zoo.package}:{name} could not be loaded ({first}); without a network pass "
            "--weights FILE"
        ) from error
    if classes not in (None, outputs):
        raise OptionError(
            f"the published {name} has {outputs} classes, --num-classes says {classes}; leave it out, or pass "
            "--weights of a network trained for those"
        )
    return Network(model, f"{zoo.package}:{name}, published weights", zoo.recipe(name, outputs), preprocessing)


# -- a function of the user's ------------------------------------------------------------------------------------------


def _from_callable(options: Any) -> Network:
    module_name, _, path = options.model.partition(":")
    if options.pretrained or options.random_weights or options.num_classes is not None:
        raise OptionError(
            f"{options.model} makes its network itself: --pretrained, --random-weights and --num-classes are for "
            "torchvision and timm; leave them out (--weights FILE may be given)"
        )
    make = _callable(module_name, path)
    try:
        model = make()
    except Exception as error:  # whatever the user's code raises
        raise ClassFiltersError(
            f"{options.model} was called without arguments and failed: {type(error).__name__}: {brief(error)}; pass "
            "--debug to see where"
        ) from error
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"{options.model} returned {type(model).__name__}; expected a torch.nn.Module: return the network alone"
        )
    first, *rest = path.split(".")
    recipe = [f"from {module_name} import {first}", f"model = {'.'.join([first, *rest])}()"]
    return Network(model.cpu(), options.model, recipe, None)


def _callable(module_name: str, path: str) -> Callable[[], Any]:
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise OptionError(f"{module_name}:{path} names no callable; expected package.module:callable")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m has it
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # the user's module was there, and imports another that is not: name that one
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise OptionError(
            f"there is no module {module_name!r} to import; MODEL is package.module:callable, seen from {here}"
        ) from error
    for name in path.split("."):
        if not hasattr(target, name):
            public = [key for key, value in vars(target).items() if callable(value) and not key.startswith("_")]
            close = difflib.get_close_matches(name, public, n=3) or public[:5]
            raise OptionError(f"{module_name} has no {path!r}; it has {', '.join(close) or 'nothing to call'}")
        target = getattr(target, name)
    if not callable(target):
        raise OptionError(
            f"{module_name}:{path} is {type(target).__name__}, nothing to call; name what makes the network"
        )
    return target  # type: ignore[no-any-return]


# -- weights from a file -----------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Tensors of a file, and what is to be said of the choice among them."""

    tensors: dict[str, Tensor]
    notes: list[str]


def read_weights(path: Path, key: str | None = None) -> Weights:
    """The tensors of a ``.safetensors`` file, or of a checkpoint that holds a state dict.

    Args:
        path: The file.
        key: Under which key the state dict is; None: one of the usual ones.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected .safetensors, or a checkpoint of tensors")
    content = _content(path)
    notes = []
    inside = [k for k, v in content.items() if _is_state(v)] if isinstance(content, Mapping) else []
    if key is not None and key not in inside:
        raise OptionError(f"{path} has no state dict under {key!r}; it has {quoted(inside) or 'none'}")
    usual = next((name for name in _INSIDE if name in inside), inside[0] if len(inside) == 1 else None)
    chosen = key or usual
    if chosen is not None:
        content = content[chosen]  # type: ignore[index]
        if others := [name for name in inside if name != chosen]:
            notes.append(f"those under {chosen!r}; others are under {quoted(others)}: --checkpoint-key takes them")
    if not _is_state(content):
        what = f"a dict of {quoted(content)}" if isinstance(content, Mapping) else type(content).__name__
        also = f"; pass --checkpoint-key with one of {quoted(inside)}" if inside else ""
        raise FileFormatError(
            f"{path} holds {what}; expected a state dict, plain or under {quoted(_INSIDE)}: save "
            f"model.state_dict(){also}"
        )
    return Weights({str(name): tensor for name, tensor in content.items()}, notes)  # type: ignore[attr-defined]


def _is_state(content: object) -> bool:
    """Whether this is a state dict of tensors as a plain network has them."""
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def aligned(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict under the network's names, and what was done for it.

    Wrappers put their name before the network's (``module.``, ``model.``, ``backbone.``, Lightning, AveragedModel), and
    keep tensors of their own beside it; a head in a Sequential (Dropout, Linear) has a number in its name.
    """
    notes: list[str] = []
    prefixes = {""} | {".".join(key.split(".")[:depth]) + "." for key in state for depth in range(1, 5)}
    fits = {p: sum(key.startswith(p) and key.removeprefix(p) in wanted for key in state) for p in prefixes}
    best = max(sorted(prefixes, key=lambda prefix: (len(prefix), prefix)), key=fits.__getitem__)
    if best and fits[best]:
        inside = {key.removeprefix(best): tensor for key, tensor in state.items() if key.startswith(best)}
        foreign = [key for key in state if not key.startswith(best)]
        if foreign:
            notes.append(f"{len(foreign)} tensors not under {best!r} are left out: {quoted(foreign, 3)}")
        state = inside
    for missing in [key for key in wanted if key not in state]:
        head, _, kind = missing.rpartition(".")
        numbered = [
            key
            for key in state
            if key not in wanted and re.fullmatch(rf"{re.escape(head)}\.\d+\.{re.escape(kind)}", key)
        ]
        if head and len(numbered) == 1:
            state = {missing if key == numbered[0] else key: tensor for key, tensor in state.items()}
            notes.append(f"{numbered[0]} is read as {missing}")
    return state, notes


def _content(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # what training scripts keep beside the weights, and nothing that runs code
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath, WindowsPath, PurePosixPath]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.filename is not None:
            raise
        raise FileFormatError(f"{path} is truncated ({brief(error)}); copy or save it again") from error
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file ({brief(error)}); copy or save it again"
        ) from error
    except Exception as error:  # torch.load raises what the content makes it
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {brief(foreign[1], 60)}" if foreign else type(error).__name__
        raise FileFormatError(
            f"{path} could not be read as a checkpoint of tensors alone ({reason}); save model.state_dict(), or "
            "convert it to .safetensors: whole models run code when they are loaded, which is not done here"
        ) from error


def _skeleton(make: Callable[[int], nn.Module]) -> dict[str, Tensor]:
    """The state dict of a network for a number of classes that nothing else in it has."""
    try:
        # on the meta device: shapes without memory
        with torch.device("meta"):
            return make(_PROBE).state_dict()
    except Exception:  # some networks read numbers while they are made, and there are none on meta
        return make(_PROBE).state_dict()


def classes_in(state: Mapping[str, Tensor], make: Callable[[int], nn.Module]) -> int | None:
    """How many classes the head in a file has; None where the file does not have it.

    Args:
        state: The file's tensors.
        make: Makes the network for a number of classes.
    """
    skeleton = _skeleton(make)
    heads = [name for name, tensor in skeleton.items() if tensor.dim() >= 2 and len(tensor) == _PROBE]
    sizes = {len(state[name]) for name in heads if name in state and state[name].dim() >= 2}
    return sizes.pop() if len(sizes) == 1 else None


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load a state dict, all of it.

    Raises:
        ShapeError: Names or shapes do not fit; says which.
    """
    wanted = model.state_dict()
    odd = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    loaded = None if odd else model.load_state_dict(dict(state), strict=False)
    missing = loaded.missing_keys if loaded else [key for key in wanted if key not in state]
    unexpected = loaded.unexpected_keys if loaded else [key for key in state if key not in wanted]
    if not (odd or missing or unexpected):
        return
    shapes = [f"{key}: file {tuple(state[key].shape)}, network {tuple(wanted[key].shape)}" for key in odd]
    parts = [
        f"{len(keys)} {what} ({'; '.join(keys[:3])}{'; ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    raise ShapeError(
        f"{path} does not fit {name}: {', '.join(parts)}; name the network that these weights were trained in"
    )


def find_device(name: str) -> torch.device:
    """The device that ``--device`` names, if it is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device must be auto, cpu, cuda, cuda:N, mps or xpu, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {name}, but torch sees {torch.cuda.device_count()} CUDA devices here; pass --device cpu"
        )
    try:
        torch.ones(1).to(device).cpu()
    except Exception as error:  # torch raises many kinds for a device that is not there
        raise OptionError(f"--device {name} does not work here ({_reason(error)}); pass --device cpu") from error
    return device


def _reason(error: Exception) -> str:
    return brief(" ".join(str(error).split()).partition(". ")[0].rstrip(".!"), 120)
