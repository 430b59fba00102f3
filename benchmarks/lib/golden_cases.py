"""The cases of `golden.py`: one function for each public call, on small but real subsets of what ships.

A key stays when code moves. Where a signature or a schema changes, the function here follows and the key stays; frames
are translated in `golden_schema.py`. Seeds are fixed, and each case has a network of its own.
"""

import contextlib
import functools
import inspect
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from captum.attr import LayerActivation, LayerGradCam, LayerGradientXActivation
from captum.robust import FGSM, PGD
from torch import Tensor, nn

from benchmarks.lib.golden import Exact, Frame, case, network_file
from captum_classfilters import (
    ALDSplitter,
    ALDTree,
    ClassFilters,
    DecomposedLinear,
    GatePenalty,
    GateSchedule,
    HeadMoments,
    HeadPass,
    InfluentialFeatures,
    LabelSensitiveGate,
    LabelSensitiveTraining,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    PathAttribution,
    PathDecoupler,
    PathDetector,
    PathOutlierDetector,
    PathPairs,
    Paths,
    adversarial_paths,
    aggregate,
    attacks,
    compare,
    decompose,
    detection,
    filter_ambiguity,
    metrics,
    recover,
)
from captum_classfilters.assets import (
    gate_file,
    load_demo_network,
    load_images,
    load_network,
    paths_file,
)
from captum_classfilters.assets.networks import SmallResNet
from captum_classfilters.comparison import method_overlap
from captum_classfilters.decoupling import DecouplingOptions
from captum_classfilters.decoupling.controller import divergence_loss, mutual_information_loss, sparsity_loss
from captum_classfilters.detection import conformal
from captum_classfilters.detection.pairs import stack_pairs
from captum_classfilters.gating.gate import density_penalty, gated, project
from captum_classfilters.heads.refits import least_squares, omp
from captum_classfilters.splitting.splits import split_weights

T = TypeVar("T")
SELECTORS = (
    "histogram",
    "mean_activation",
    "weight",
    "contribution",
    "weight_and_activation",
    "margin",
    "ablation",
    "random",
)
_LOSS = nn.CrossEntropyLoss(reduction="none")


# -- what cases share --------------------------------------------------------------------------------------------------


def fixture(make: Callable[[], T]) -> Callable[[], T]:
    """Made once, with random numbers of its own, so that no case depends on which one ran before."""

    @functools.cache
    def made() -> T:
        state = np.random.get_state()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            value = make()
        np.random.set_state(state)
        return value

    return made


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call with ``draws`` and ``seed``, or with ``control=Control(draws, seed)`` where a function takes that."""
    if "control" in inspect.signature(function).parameters:
        from captum_classfilters.core.control import Control

        asked = {name: kwargs.pop(name) for name in ("draws", "seed") if name in kwargs}
        default = inspect.signature(function).parameters["control"].default
        if asked:
            kwargs["control"] = replace(default, **asked) if is_dataclass(default) else Control(**asked)
    return function(*args, **kwargs)


def network(method: str = "std", seed: int = 0) -> Any:
    """One of the shipped networks, anew."""
    # code before this comparison drew first weights when it loaded a network; so that what is drawn next stays the same
    SmallResNet()
    return load_demo_network(seed, method)[0]


def decoupler() -> PathDecoupler:
    """The decoupled network with its controllers."""
    return PathDecoupler(network("decoupled")).load(paths_file())


@fixture
def train() -> list[tuple[Tensor, Tensor]]:
    """200 training images."""
    return load_images("train").batches(50)[:4]


@fixture
def test() -> list[tuple[Tensor, Tensor]]:
    """200 test images."""
    return load_images("test").batches(50)[:4]


@fixture
def names() -> tuple[str, ...]:
    """The ten classes."""
    return load_images("test").class_names


@fixture
def tables() -> dict[str, ClassFilters]:
    """A table of each selector."""
    found: dict[str, ClassFilters] = InfluentialFeatures(network()).attribute(
        train(), selector=list(SELECTORS), class_names=names()
    )
    return found


@fixture
def filters() -> ClassFilters:
    """The histogram's."""
    return tables()["histogram"]


@fixture
def moments() -> HeadMoments:
    """Of 500 training images."""
    return HeadMoments.collect(network(), load_images("train").batches(100)[:5])


@fixture
def gate() -> LabelSensitiveGate:
    """The shipped gate."""
    return LabelSensitiveGate.load(gate_file())


@fixture
def paths() -> Paths:
    """Of the 200 test images, with logits."""
    return decoupler().paths(test(), logits=True)


@fixture
def train_paths() -> Paths:
    """Of the 200 training images, with logits."""
    return decoupler().paths(train(), logits=True)


def attacked(watched: Any, loader: Any, attack: Any, budget: dict[str, Any], **options: Any) -> PathPairs:
    """`adversarial_paths` with the attack's budget in an object, or before there was one as keywords."""
    if hasattr(attacks, "Attack"):
        attack, budget = attacks.Attack(attack, **budget), {}
    pairs: PathPairs = adversarial_paths(watched, loader, attack, **budget, **options)
    return pairs


@fixture
def pairs() -> PathPairs:
    """Attacked test images."""
    watched = decoupler()
    attack = FGSM(watched, loss_func=_LOSS, lower_bound=0.0, upper_bound=1.0)
    found: PathPairs = attacked(watched, test()[:2], attack, {"epsilon": 0.03}, logits=True, keep_images=True)
    return found


def table(found: ClassFilters) -> dict[str, Any]:
    """A `ClassFilters`, bit for bit."""
    meta = {key: value for key, value in found.meta.items() if key != "merge"}
    merge = getattr(found, "merge_rule", None) or found.meta.get("merge", "sum")
    return {
        "scores": Exact(found.scores),
        "mass": Exact(found.mass),
        "counts": found.counts,
        "about": [found.method, found.layer, list(found.class_names), meta, merge],
    }


def several(found: Mapping[Any, ClassFilters]) -> dict[str, Any]:
    """Several tables by name."""
    return {f"{name} {what}": value for name, each in found.items() for what, value in table(each).items()}


def logits_of(model: Any, count: int = 100) -> Tensor:
    """What a network says of the first test images."""
    with torch.no_grad():
        answer: Tensor = model(torch.cat([images for images, _ in test()])[:count])
    return answer


def weights_of(model: nn.Module) -> dict[str, Any]:
    """All parameters and buffers."""
    return dict(model.state_dict())


def path_table(found: Paths) -> dict[str, Any]:
    """What `Paths` hold."""
    return {
        "codes": found.codes,
        "bits": found.bits(),
        "predictions": found.predictions,
        "labels": found.labels if found.labels is not None else None,
        "layers": [list(found.layers), list(found.channels), found.num_classes],
        **({} if found.logits is None else {"logits": found.logits}),
    }


def saved_and_loaded(value: Any, kind: Any, **options: Any) -> Any:
    """What a file gives back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        value.save(file)
        return kind.load(file, **options)


def frames(found: pd.DataFrame, metric: str) -> dict[str, Any]:
    """A frame under the name of its metric."""
    return {"frame": Frame(found, metric)}


# -- influential features and the shared answer ------------------------------------------------------------------------


@case("influential/selectors")
def _() -> Mapping[str, Any]:
    return several(InfluentialFeatures(network()).attribute(train(), selector=list(SELECTORS), class_names=names()))


@case("influential/selectors signed")
def _() -> Mapping[str, Any]:
    return several(
        InfluentialFeatures(network()).attribute(train(), selector=list(SELECTORS), importance="signed", seed=3)
    )


@case("influential/several k1")
def _() -> Mapping[str, Any]:
    attribution = InfluentialFeatures(network(), "fc")
    found = several(attribution.attribute(train(), k1=[1, 5, 20, 0.5, 0.9]))
    return found | several(attribution.attribute(train(), selector="weight_and_activation", k1=[3, 0.25]))


@case("influential/by prediction")
def _() -> Mapping[str, Any]:
    unlabelled = [images for images, _ in test()]
    chosen = ["histogram", "contribution", "ablation"]
    found = InfluentialFeatures(network()).attribute(unlabelled, label_source="prediction", selector=chosen)
    return several(found)


@case("influential/correct only")
def _() -> Mapping[str, Any]:
    attribution = InfluentialFeatures(network())
    found = several({"target": attribution.attribute(test(), correct_only=True, selector="margin", num_classes=10)})
    by_prediction = attribution.attribute(test(), correct_only=True, label_source="prediction", k1=4)
    return found | several({"prediction": by_prediction})


@case("influential/lsg and decoupled networks")
def _() -> Mapping[str, Any]:
    found = {method: InfluentialFeatures(network(method)).attribute(train()) for method in ("lsg", "decoupled")}
    found["gated"] = InfluentialFeatures(decoupler()).attribute(train())
    return several(found)


@case("influential/kanji", network="kanji_resnet14.safetensors")
def _() -> Mapping[str, Any]:
    from safetensors.torch import load_file

    model = load_network(network_file("kanji_resnet14.safetensors"))[0]
    sample = load_file(network_file("kanji_sample.safetensors"))
    images, labels = sample["train_images"][:100].float() / 255, sample["train_labels"][:100]
    found = InfluentialFeatures(model).attribute(list(zip(images.split(50), labels.split(50), strict=True)))
    return {**table(found), "top": found.top(5)}


@case("influential/unseen classes")
def _() -> Mapping[str, Any]:
    images, labels = train()[0]
    found = InfluentialFeatures(network()).attribute([(images[labels < 6], labels[labels < 6])], class_names=names())
    return {**table(found), "top": found.top(3), "mask": found.mask(3), "overlap": found.overlap(3), "seen": found.seen}


@case("influential/contributions")
def _() -> Mapping[str, Any]:
    images, labels = test()[0]
    attribution = InfluentialFeatures(network())
    return {
        "labels": attribution.attribute(images, labels),
        "one target": attribution.attribute(images[:8], 3),
        "list": attribution.attribute(images[:2], [1, 2]),
    }


@case("influential/explain")
def _() -> Mapping[str, Any]:
    images, labels = test()[0]
    attribution = InfluentialFeatures(network())
    return {
        "head": attribution.explain(images[:10], labels[:10], filters(), 5),
        "name": attribution.explain(images[:10], "shirt", filters(), 3),
        "ones": attribution.explain(images[:10], 2, filters(), 5, channel_weights="ones"),
    }


@case("class_filters/reading")
def _() -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for name, each in tables().items():
        found |= {f"{name} ranking": each.ranking(), f"{name} top": each.top(7), f"{name} mask": each.mask(7)}
        found |= {f"{name} overlap": Exact(each.overlap(7)), f"{name} contrast": each.contrast("shirt", "coat", 10)}
    return found | {"index": filters().index("bag"), "repr": repr(filters())}


@case("class_filters/merge")
def _() -> Mapping[str, Any]:
    attribution = InfluentialFeatures(network())
    chosen = ["histogram", "ablation", "weight", "random"]
    parts = [attribution.attribute([batch], selector=chosen, class_names=names()) for batch in train()]
    merged = {name: ClassFilters.merge(*(part[name] for part in parts)) for name in chosen}
    return several(merged) | {
        "as one pass": [bool(torch.equal(merged[name].scores, tables()[name].scores)) for name in chosen]
    }


@case("class_filters/save and load")
def _() -> Mapping[str, Any]:
    return table(saved_and_loaded(filters(), ClassFilters))


# -- heads -------------------------------------------------------------------------------------------------------------


@case("heads/moments")
def _() -> Mapping[str, Any]:
    found = moments()
    halves = [HeadMoments.collect(network(), part) for part in (train()[:2], train()[2:])]
    merged = HeadMoments.merge(*halves)
    again = saved_and_loaded(found, HeadMoments)
    return {
        "total": Exact(found.total),
        "second": Exact(found.second),
        "count": found.count,
        "layer": found.layer,
        "mean": found.mean,
        "covariance": found.covariance,
        "merged": merged.second,
        "loaded": Exact(again.second),
    }


def _decomposed(backend: str) -> Mapping[str, Any]:
    model, found = network(), {}
    for refit in (None, "least_squares", "omp"):
        chosen = None if refit == "omp" else filters()
        small = decompose(model, chosen, 5, refit=refit, moments=moments() if refit else None, backend=backend)
        found[f"{refit}"] = logits_of(small)
        found |= {f"{refit} {name}": value for name, value in weights_of(small).items() if name.startswith("fc")}
        found[f"{refit} head"] = type(small.fc).__name__
    return found


for _backend in ("auto", "dense", "csr", "bag", "gather"):
    case(f"heads/decompose {_backend}")(functools.partial(_decomposed, _backend))


@case("heads/decompose unseen")
def _() -> Mapping[str, Any]:
    images, labels = train()[0]
    partly = InfluentialFeatures(network()).attribute([(images[labels < 6], labels[labels < 6])])
    return {"logits": logits_of(decompose(network(), partly, 5, unseen="dense"))}


@case("heads/decompose k")
def _() -> Mapping[str, Any]:
    return {f"{k}": logits_of(decompose(network(), filters(), k)) for k in (1, 3, 10, 64)}


@case("heads/least_squares and omp")
def _() -> Mapping[str, Any]:
    head = network().fc
    found = {}
    for name, refit in {
        "least squares": least_squares(moments(), head.weight, head.bias, filters().top(6)),
        "omp": omp(moments(), head.weight, head.bias, 6),
    }.items():
        found |= {f"{name} {what}": value for what, value in refit._asdict().items()}
    return found


@case("heads/decomposed_linear")
def _() -> Mapping[str, Any]:
    linear, inputs = network().fc, torch.rand(20, 64)
    found: dict[str, Any] = {}
    for backend in ("auto", "csr", "bag", "gather"):
        small = DecomposedLinear.from_linear(linear, filters().mask(4), backend)
        with torch.no_grad():
            found[backend] = small(inputs)
        found[f"{backend} dense"] = small.to_dense().weight
    return found


@case("heads/recover", digest=False)
def _() -> Mapping[str, Any]:
    small = decompose(network(), filters(), 5, backend="dense")
    trained = recover(small, train()[:2], epochs=1)
    best = recover(small, train()[:2], epochs=1, lr=1e-3, validation=train()[2:3], seed=1)
    return {"logits": logits_of(trained), "zeros": trained.fc.weight == 0, "validated": logits_of(best)}


@case("heads/recover from a checkpoint", digest=False)
def _() -> Mapping[str, Any]:
    small = decompose(network(), filters(), 5, backend="dense")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint"
        recover(small, train()[:2], epochs=1, checkpoint=file)
        return {"logits": logits_of(recover(small, train()[:2], epochs=2, checkpoint=file))}


# -- gating ------------------------------------------------------------------------------------------------------------


@case("gating/gate")
def _() -> Mapping[str, Any]:
    shipped, features, labels = gate(), torch.rand(12, 64), torch.arange(12) % 10
    drawn = LabelSensitiveGate(10, 64, generator=torch.Generator().manual_seed(0))
    fixed = LabelSensitiveGate.fixed(10, 64)
    return {
        "weight": shipped.weight,
        "counts": shipped.counts,
        "density": [f"{shipped.density:.9f}"],
        "exclusive": shipped.exclusive(),
        "tightened": shipped.tighten().weight,
        "gated": shipped(features, labels),
        "function": gated(features, labels, shipped.weight),
        "maps": shipped(torch.rand(3, 64, 2, 2), labels[:3]),
        "plain": shipped(features),
        "penalty": torch.stack([shipped.penalty(), shipped.penalty(0.3, "hinge"), drawn.penalty(0.1)]),
        "drawn": drawn.weight,
        "fixed": fixed.weight,
        "loaded": saved_and_loaded(shipped, LabelSensitiveGate).weight,
        **table(shipped.class_filters(names())),
    }


@case("gating/penalty and projection")
def _() -> Mapping[str, Any]:
    previous, weight = gate().weight.detach(), torch.randn(10, 64)
    weight[:, 0], weight[:, 1] = -1.0, torch.nan
    return {
        "abs": density_penalty(previous, 0.1),
        "hinge": density_penalty(previous, 0.9, "hinge"),
        "projected": project(weight, previous),
    }


def _training(**options: Any) -> Mapping[str, Any]:
    model, fresh = network(), LabelSensitiveGate(10, 64, generator=torch.Generator().manual_seed(1))
    fit = {"lr": 0.01} | {name: options.pop(name) for name in ("max_norm", "lr") if name in options}
    training = LabelSensitiveTraining(model, fresh, **options)
    history = training.fit(train()[:2], 2, **fit)
    return {
        "gate": fresh.weight,
        "counts": fresh.counts,
        "logits": logits_of(model.eval()),
        "loss": torch.tensor([row["loss"] for row in history], dtype=torch.float64),
        "density": torch.tensor([row["density"] for row in history], dtype=torch.float64),
        "gated": [row["gated"] for row in history],
    }


@case("gating/fit", digest=False)
def _() -> Mapping[str, Any]:
    return _training(schedule=GateSchedule(period=2, phase=1, start="noise"))


@case("gating/fit joint", digest=False)
def _() -> Mapping[str, Any]:
    return _training(
        schedule=GateSchedule(scheme="joint", start="noise"), penalty=GatePenalty(0.3, kind="hinge"), weight=0.5,
        max_norm=1.0,
        lr=(0.01, 0.1),
    )  # fmt: skip


@case("gating/own loop", digest=False)
def _() -> Mapping[str, Any]:
    model, fresh = network(), LabelSensitiveGate(10, 64, generator=torch.Generator().manual_seed(1))
    training = LabelSensitiveTraining(
        model.train(), fresh, schedule=GateSchedule(start="noise"), penalty=GatePenalty(sparsity=0.01)
    )
    optimizer = torch.optim.SGD([{"params": model.parameters()}, fresh.parameter_group(lr=0.1)], lr=0.01, momentum=0.9)
    losses = []
    for epoch in range(3):
        training.before_epoch(epoch, train())
        optimizer.zero_grad()
        loss = training.loss(*train()[epoch], epoch)
        loss.backward()
        optimizer.step()
        training.after_step()
        losses.append(loss.detach())
    gates = [training.gates(epoch) for epoch in range(6)]
    return {"loss": torch.stack(losses), "gate": fresh.weight, "logits": logits_of(model.eval()), "gates": gates}


@case("gating/fit from a checkpoint", digest=False)
def _() -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint"
        for _ in range(2):
            model, fresh = network(), LabelSensitiveGate(10, 64, generator=torch.Generator().manual_seed(1))
            training = LabelSensitiveTraining(model, fresh, schedule=GateSchedule(start="noise"))
            training.fit(train()[:1], 2, lr=0.01, checkpoint=file)
        return {"gate": fresh.weight, "logits": logits_of(model.eval())}


@case("gating/filter_ambiguity", digest=False)
def _() -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for name, options in {"std": {}, "lsg": {"penalty": GatePenalty(0.2, kind="hinge"), "anneal": False}}.items():
        phi = filter_ambiguity(network(name), train(), steps=40, **options)
        found |= {
            f"{name} {each.name}": torch.tensor(getattr(phi, each.name), dtype=torch.float64)
            for each in fields(phi)
            if each.name not in ("gate", "samples")
        }
        found |= {f"{name} gate": phi.gate.weight, f"{name} samples": phi.samples}
    return found


# -- decoupling --------------------------------------------------------------------------------------------------------


@case("decoupling/paths")
def _() -> Mapping[str, Any]:
    found = paths()
    gathered, counts = found.profiles()
    return {
        **path_table(found),
        "array": np.asarray(found),
        "one layer": found.bits("layer3.1.conv1"),
        "gates": torch.cat(found.gates(), 1),
        "rates": torch.cat(found.rates()),
        "macs": found.macs(),
        "macs without controllers": found.macs(controllers=False),
        "distances": found.distances(),
        "distances to": found[:5].distances(found[5:12]),
        "profiles": Exact(gathered),
        "counts": counts,
        "states": Frame(found.states(), "states"),
        "length": len(found),
    }


@case("decoupling/path class_filters")
def _() -> Mapping[str, Any]:
    return several({f"{layer}": paths().class_filters(layer, names()) for layer in ("layer1.0.conv1", -1, 7)})


@case("decoupling/merge, save and load")
def _() -> Mapping[str, Any]:
    merged = Paths.merge(paths(), train_paths())
    return path_table(saved_and_loaded(merged, Paths))


@case("decoupling/embed", digest=False)
def _() -> Mapping[str, Any]:
    return {"shape": list(paths().embed(components=10, perplexity=10.0).shape)}


@case("decoupling/gates")
def _() -> Mapping[str, Any]:
    watched, images = decoupler().eval(), test()[0][0]
    with torch.no_grad():
        output, gates = watched.gates(images[:20])
        _, logits = watched.gate_logits(images[:20])
        with watched.frozen([gate[:1] for gate in gates]):
            frozen = watched(images[:20])
    with watched.straight_through():
        pixels = images[:4].clone().requires_grad_()
        gradient = torch.autograd.grad(torch.cat(watched.gates(pixels)[1], 1).sum(), pixels)[0]
    return {
        "output": output,
        "gates": torch.cat(tuple(gates), 1).bool(),
        "gate logits": torch.cat(tuple(logits), 1),
        "frozen": frozen,
        "straight through": gradient,
        "layers": [list(watched.layers), list(watched.channels)],
    }


@case("decoupling/losses", digest=False)
def _() -> Mapping[str, Any]:
    watched, (images, labels) = decoupler(), train()[0]
    watched.eval()
    found: dict[str, Any] = {}
    for name, options in {
        "plain": {},
        "other": {
            "information": 0.5,
            "divergence": 0.1,
            "sparsity": 0.01,
            "target_rate": 0.5,
            "direction": "y_z",
        },
    }.items():
        loss = watched.loss(images, labels, DecouplingOptions.paper(**options))
        found |= {f"{name} {what}": value for what, value in loss._asdict().items()}
        found[f"{name} mean information"] = loss.mean_mutual_information
    watched.train()
    loss = watched.loss(images, labels, DecouplingOptions.paper())
    loss.total.backward()
    found |= {f"train {what}": value for what, value in loss._asdict().items()}
    found |= {f"gradient {name}": value.grad for name, value in watched.controllers.named_parameters()}
    return found


@case("decoupling/loss equations")
def _() -> Mapping[str, Any]:
    gates, answers = torch.rand(9, 16), torch.rand(9, 16)
    return {
        "information": mutual_information_loss(gates, torch.randn(10, 16), torch.arange(9)),
        "divergence": divergence_loss(gates, answers),
        "divergence y_z": divergence_loss(gates, answers, "y_z"),
        "sparsity": sparsity_loss(gates, 0.5),
    }


@case("decoupling/fresh controllers", digest=False)
def _() -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for mix in ("sample", "channel", "element"):
        fresh = PathDecoupler(network(), mix=mix, reduction=8, generator=torch.Generator().manual_seed(0))
        found |= {f"{mix} {name}": value for name, value in list(fresh.controllers_state_dict().items())[:3]}
        fresh.train()
        found[f"{mix} loss"] = fresh.loss(*train()[0]).total
    return found


@case("decoupling/saved controllers")
def _() -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "controllers"
        decoupler().save(file)
        again = PathDecoupler(network("decoupled")).load(file)
    return dict(again.controllers_state_dict())


@case("decoupling/skipping")
def _() -> Mapping[str, Any]:
    watched, images = decoupler(), test()[0][0]
    small = watched.skipping(images, measured=False)
    pruned = watched.skipping(images, paths=train_paths(), measured=False)
    with torch.no_grad():
        return {
            "gated": watched.eval()(images),
            "skipping": small(images),
            "pruned": pruned(images),
            "layers": list(small.layers()),
        }


@case("decoupling/costs")
def _() -> Mapping[str, Any]:
    costs = decoupler().costs(test()[0][0][:1])
    found = costs.of([gates[:20] for gates in paths().gates()])
    convs = [
        [conv.name, conv.gate, conv.in_channels, conv.out_channels, conv.groups, conv.each] for conv in costs.convs
    ]
    return {"macs": found, "dense": costs.dense, "convs": convs, "other": [costs.other, costs.controllers]}


@case("decoupling/PathAttribution")
def _() -> Mapping[str, Any]:
    attribution, images = PathAttribution(decoupler()), test()[0][0][:20]
    return {
        "gates": torch.cat(attribution.attribute(images), 1).bool(),
        "logits": torch.cat(attribution.attribute(images, logits=True), 1),
    }


for _name in ("vgg", "inception"):

    def _other(name: str = _name) -> Mapping[str, Any]:
        watched = PathDecoupler(load_network(network_file(f"{name}_decoupled_s0.safetensors"))[0])
        watched.load(network_file(f"paths_{name}_decoupled_s0.safetensors"))
        found = watched.paths(test()[0][0][:20])
        small = watched.skipping(test()[0][0][:10], measured=False)
        with torch.no_grad():
            return {**path_table(found), "macs": found.macs(), "skipping": small(test()[0][0][:10])}

    case(f"decoupling/{_name}", network=f"{_name}_decoupled_s0.safetensors")(_other)


@case("metrics/path_information")
def _() -> Mapping[str, Any]:
    return frames(call(metrics.path_information, decoupler(), paths(), seed=1), "path_information")


@case("metrics/path_accuracy")
def _() -> Mapping[str, Any]:
    return frames(call(metrics.path_accuracy, decoupler(), test(), seed=1), "path_accuracy")


# -- detection ---------------------------------------------------------------------------------------------------------


@case("detection/adversarial_paths")
def _() -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("clean", "adversarial", "noise", "misclassified"):
        found |= {f"{kind} {what}": value for what, value in path_table(getattr(pairs(), kind)).items()}
    images = {name: getattr(pairs(), name) for name in ("images", "adversarial_images", "noise_images")}
    again = saved_and_loaded(pairs(), PathPairs)
    return {
        **found,
        **images,
        "index": pairs().index,
        "counts": [pairs().tried, pairs().succeeded, pairs().dropped],
        "loaded": again.adversarial.codes,
    }


@case("detection/adversarial_paths PGD")
def _() -> Mapping[str, Any]:
    watched = decoupler()
    attack = PGD(watched, loss_func=_LOSS, lower_bound=0.0, upper_bound=1.0)
    budget = {"epsilon": 0.02, "step_num": 3, "step_size": 0.01}
    found = attacked(watched, [test()[0]], attack, budget, max_pairs=8, seed=2)
    return {
        "clean": found.clean.codes,
        "adversarial": found.adversarial.codes,
        "noise": found.noise.codes,
        "index": found.index,
        "counts": [found.tried, found.succeeded],
    }


@case("detection/stack_pairs")
def _() -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for name, (stacked, labels, groups) in {
        "method": pairs().stack(),
        "without noise": pairs().stack(noise=False),
        "function": stack_pairs(pairs().clean, pairs().adversarial),
    }.items():
        found |= {f"{name} codes": stacked.codes, f"{name} y": labels, f"{name} groups": groups}
    return found


def _judged(detector: Any, alpha: float) -> dict[str, Any]:
    judged = Paths.merge(pairs().clean, pairs().adversarial)
    detector.calibrate(train_paths(), alpha=alpha)
    return {
        "predict": detector.predict(judged),
        "strangeness": detector.strangeness(judged),
        "p value": detector.p_value(judged),
        "alarm": detector.alarms(judged),
        "alarm at .3": detector.alarms(judged, 0.3),
    }


@case("detection/PathDetector")
def _() -> Mapping[str, Any]:
    profiles = detection.ClassProfiles(train_paths()[:100])
    stacked, labels, _ = pairs().stack()
    found: dict[str, Any] = {}
    for features in ("bits", "logits", "profiles", ("bits", "profiles")):
        needs = profiles if "profiles" in features else None
        detector = PathDetector(features=features, profiles=needs, random_state=0).fit(stacked, labels)
        found |= {f"{features} {what}": value for what, value in _judged(detector, 0.1).items()}
        found[f"{features} probability"] = detector.predict_proba(stacked)
    array = PathDetector(random_state=0).fit(np.asarray(stacked), labels)
    found["array"] = array.predict_proba(np.asarray(stacked))
    again = saved_and_loaded(array, PathDetector, trusted=["sklearn.tree._tree.Tree"])
    return found | {"loaded": again.predict_proba(np.asarray(stacked))}


@case("detection/PathOutlierDetector")
def _() -> Mapping[str, Any]:
    detector = PathOutlierDetector(contamination=0.1, smoothing=1.0).fit(train_paths())
    array = PathOutlierDetector().fit(np.asarray(train_paths()))
    again = saved_and_loaded(detector, PathOutlierDetector)
    return {
        **_judged(detector, 0.1),
        "score": detector.score_samples(pairs().adversarial),
        "decision": detector.decision_function(pairs().adversarial),
        "array": array.score_samples(np.asarray(paths())),
        "array predict": array.predict(np.asarray(paths())),
        "loaded": again.score_samples(pairs().adversarial),
    }


@case("detection/conformal")
def _() -> Mapping[str, Any]:
    return {
        "p": conformal.p_values(np.linspace(0, 1, 11), np.linspace(-1, 1, 40) ** 2),
        "interval": np.array(conformal.false_positive_interval(0.05, 200, 100)),
    }


@case("detection/ClassProfiles")
def _() -> Mapping[str, Any]:
    profiles = detection.ClassProfiles(train_paths(), smoothing=2.0)
    distances = profiles.distances(paths())
    return {
        "distances": distances,
        "among": profiles.distances(train_paths(), among=True),
        "whole": profiles.whole(distances),
        "features": profiles.features(paths()),
    }


@case("detection/PathMatching")
def _() -> Mapping[str, Any]:
    images, labels = test()[0]
    attack = detection.PathMatching(decoupler(), train_paths(), weight=5.0)
    return {"images": attack.perturb(images[:8], labels[:8], 0.03, 0.01, 3)}


@case("detection/AdaptivePGD and distil", digest=False)
def _() -> Mapping[str, Any]:
    images, labels = test()[0]
    stacked, y, _ = pairs().stack()
    detector = PathDetector(random_state=0).fit(stacked, y)
    surrogate = detection.distil(detector, stacked, hidden=8, epochs=3)
    found = {"surrogate": surrogate(paths().bits().float())}
    for name, options in {
        "alone": {},
        "one": {"surrogate": surrogate},
        "sum": {"surrogate": surrogate, "weight": 0.5},
    }.items():
        attack = detection.AdaptivePGD(decoupler(), **options)
        found[name] = attack.perturb(images[:6], labels[:6], 0.03, 0.01, 3)
    return found


# -- splitting ---------------------------------------------------------------------------------------------------------


def _split(found: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for branch in ("positive", "negative"):
        values |= {
            f"{branch} distances": found.distances(branch),
            f"{branch} depths": found.depths(branch),
            f"{branch} stages": found.stages(branch),
        }
    values |= {"deviations": found.deviations(), "first": found.first, "zeros": found.zeros}
    return values


@case("splitting/splits")
def _() -> Mapping[str, Any]:
    splitter, found = ALDSplitter(network()), {}
    for name, options in {
        "plain": {"min_size": 4},
        "mle": {"fit": "mle", "first_threshold": "mean", "min_size": 8},
    }.items():
        splits = splitter.splits(**options)
        found |= {f"{name} {what}": value for what, value in _split(splits).items()}
    laplace = splits.laplace
    found |= {f"laplace {what}": value for what, value in laplace._asdict().items()}
    found["likelihood"] = splits.likelihood
    return found


@case("splitting/trees")
def _() -> Mapping[str, Any]:
    trees = ALDSplitter(network()).split(min_size=4, fit="mle")
    found: dict[str, Any] = {"text": [str(tree) for tree in trees.values()]}
    for target, tree in trees.items():
        for branch in ("positive", "negative"):
            found |= {f"{target} {branch}": tree.terminal(branch), f"{target} {branch} depth": tree.depth(branch)}
        for name, node in tree.nodes.items():
            found[f"{target} {name}"] = tree.channels(name)
            numbers = [value for value in asdict(node).values() if not isinstance(value, str)]
            found[f"{target} {name} node"] = torch.tensor(numbers, dtype=torch.float64)
    again = saved_and_loaded(trees[3], ALDTree)
    one = ALDSplitter(network()).split(3, min_size=4, fit="mle")
    return found | {"loaded": str(again), "one": str(one)}


@case("splitting/split_weights")
def _() -> Mapping[str, Any]:
    weights = torch.randn(4, 40)
    weights[0, :5], weights[1] = 0.0, weights[1].abs()
    return _split(split_weights(weights, min_size=3, targets=(1, 4, 5, 9)))


@case("splitting/attribute")
def _() -> Mapping[str, Any]:
    splitter, (images, labels) = ALDSplitter(network()), test()[0]
    return {
        "positive": splitter.attribute(images[:10], labels[:10], min_size=4),
        "negative": splitter.attribute(images[:10], 2, branch="negative", stage=1, min_size=4, channel_weights="ones"),
    }


@case("splitting/class_filters")
def _() -> Mapping[str, Any]:
    splitter = ALDSplitter(network())
    return several(
        {branch: splitter.class_filters(branch, class_names=names(), min_size=4) for branch in ("positive", "negative")}
    )


@case("metrics/ald_evidence")
def _() -> Mapping[str, Any]:
    found = metrics.ald_evidence
    return {
        "frame": Frame(call(found, network(), targets=[0, 3, 7], bootstrap=20, class_names=names()), "ald_evidence"),
        "plain": Frame(call(found, network("lsg"), bootstrap=0, seed=2), "ald_evidence"),
    }


@case("metrics/pruning_curve")
def _() -> Mapping[str, Any]:
    return frames(call(metrics.pruning_curve, network(), test(), [0.2, 0.5, 0.9]), "pruning_curve")


# -- maps --------------------------------------------------------------------------------------------------------------


def _cam(attribution: Any, **options: Any) -> dict[str, Any]:
    images, labels = test()[0]
    pictures, targets = images[:6], labels[:6]
    run = functools.partial(attribution.attribute, pictures, targets, **options)
    return {
        "plain": run(),
        "relu": run(relu_attributions=True),
        "channels": run(channels=filters().top(5)[targets]),
        "each": run(attr_dim_summation=False),
        "against": run(against=True),
        "ones": run(channel_weights="ones", channels=filters().mask(4)[0]),
    }


@case("cam/GradCAM++")
def _() -> Mapping[str, Any]:
    model = network()
    found = _cam(LayerGradCamPlusPlus(model, "layer3"))
    images, labels = test()[0]
    found["head"] = LayerGradCamPlusPlus(model, "layer3").attribute(images[:6], labels[:6], channel_weights="head")
    found["earlier"] = LayerGradCamPlusPlus(model, model.layer2).attribute(images[:6], 4)
    return found


@case("cam/Smooth GradCAM++")
def _() -> Mapping[str, Any]:
    model = network()
    found = _cam(LayerSmoothGradCamPlusPlus(model, "layer3"), n_samples=2, stdevs=0.1)
    images, labels = test()[0]
    smooth = LayerSmoothGradCamPlusPlus(model, model.layer2)
    generator = torch.Generator().manual_seed(5)
    found["earlier"] = smooth.attribute(images[:4], labels[:4], n_samples=3, stdevs=0.2, generator=generator)
    return found


@case("metrics/explain_confusion")
def _() -> Mapping[str, Any]:
    images, labels = test()[0]
    found = {}
    for name, (true, predicted) in {"given": (3, 6), "predicted": ((labels[:6] + 1) % 10, None)}.items():
        each = metrics.explain_confusion(network(), images[:6], true, predicted)
        found[f"{name} table"] = Frame(each.table, "explain_confusion")
        for what in ("difference", "predicted", "true", "won_by", "lost_by"):
            found[f"{name} {what}"] = getattr(each, what)
    return found


# -- metrics -----------------------------------------------------------------------------------------------------------


@case("metrics/accuracy_curve")
def _() -> Mapping[str, Any]:
    chosen = {name: tables()[name] for name in ("histogram", "margin", "weight", "random")}
    found = call(metrics.accuracy_curve, network(), chosen, test(), [1, 3, 10], draws=6, seed=4)
    alone = call(metrics.accuracy_curve, network(), filters(), test(), [5, 2])
    return {"frame": Frame(found, "accuracy_curve"), "alone": Frame(alone, "accuracy_curve")}


@case("metrics/accuracy_curve refits")
def _() -> Mapping[str, Any]:
    judged = HeadPass(network(), test(), class_names=names())
    curve = functools.partial(metrics.accuracy_curve, judged, ks=[2, 5], moments=moments())
    squares = curve({"histogram": filters()}, refit="least_squares")
    pursued = curve(None, refit="omp")
    return {"squares": Frame(squares, "accuracy_curve"), "omp": Frame(pursued, "accuracy_curve")}


@case("metrics/class_ablation")
def _() -> Mapping[str, Any]:
    means = moments().mean
    found = call(metrics.class_ablation, network(), filters(), test(), 5, seed=1)
    zero = call(metrics.class_ablation, network(), filters(), test(), 8, modes=["mean", "zero"], means=means, draws=7)
    return {"frame": Frame(found, "class_ablation"), "means": Frame(zero, "class_ablation")}


@case("metrics/channel_deletion")
def _() -> Mapping[str, Any]:
    chosen = {name: tables()[name] for name in ("histogram", "contribution")}
    found = call(metrics.channel_deletion, network(), chosen, test(), 8, steps=4)
    sizes = torch.tensor([0, 3, 5, 8, 2, 7, 6, 4, 10, 1])
    uneven = call(metrics.channel_deletion, network(), filters(), test(), sizes, steps=3, draws=6, seed=2)
    return {"frame": Frame(found, "channel_deletion"), "sizes": Frame(uneven, "channel_deletion")}


@case("metrics/masked_confusion")
def _() -> Mapping[str, Any]:
    masked = functools.partial(call, metrics.masked_confusion)
    found = masked(network(), filters(), test(), ["coat", ("coat", "bag"), 3], k=6)
    shipped = replace(gate().class_filters(names()), layer="fc")
    by_gate = masked(network("lsg"), shipped, test(), [0, ("shirt", 9)], threshold=0.5, draws=6, seed=3)
    return {"frame": Frame(found, "masked_confusion"), "threshold": Frame(by_gate, "masked_confusion")}


@case("metrics/class_masking")
def _() -> Mapping[str, Any]:
    masked = functools.partial(call, metrics.class_masking)
    found = masked(network(), filters(), test(), k=6)
    shipped = replace(gate().class_filters(names()), layer="fc")
    by_gate = masked(network("lsg"), shipped, test(), threshold=0.5, draws=6, seed=3)
    return {"frame": Frame(found, "class_masking"), "threshold": Frame(by_gate, "class_masking")}


@case("metrics/filter_correlation")
def _() -> Mapping[str, Any]:
    found = {}
    for kind in ("weights", "activations"):
        frame = metrics.filter_correlation(network(), test(), kind=kind)
        found |= {kind: frame.to_numpy(), f"{kind} attrs": {str(key): str(value) for key, value in frame.attrs.items()}}
    other = metrics.filter_correlation(network(), test(), conv="layer3.2.conv1")
    return found | {"other": other.to_numpy()}


@case("metrics/correlated_share")
def _() -> Mapping[str, Any]:
    model = network()
    several_frames = {kind: metrics.filter_correlation(model, test(), kind=kind) for kind in ("weights", "activations")}
    return frames(metrics.correlated_share(several_frames, [0.0, 0.1, 0.3]), "correlated_share")


@case("metrics/inter_class_correlation")
def _() -> Mapping[str, Any]:
    found = call(metrics.inter_class_correlation, network(), test(), 6, draws=5)
    absolute = call(metrics.inter_class_correlation, network(), test(), 4, absolute=True, draws=6, seed=1)
    name = "inter_class_correlation"
    return {"frame": Frame(found, name), "absolute": Frame(absolute, name)}


@case("metrics/density")
def _() -> Mapping[str, Any]:
    chosen = {"gate": gate().class_filters(names()), "histogram": filters()}
    return {
        "frame": Frame(call(metrics.density, chosen, draws=6, seed=1), "density"),
        "alone": Frame(call(metrics.density, filters(), threshold=0.3), "density"),
    }


@case("metrics/gate_similarity")
def _() -> Mapping[str, Any]:
    shipped = replace(gate().class_filters(names()), layer="fc")
    return frames(call(metrics.gate_similarity, network("lsg"), shipped, test(), draws=6), "gate_similarity")


@case("metrics/feature_clusters")
def _() -> Mapping[str, Any]:
    shipped = replace(gate().class_filters(names()), layer="fc")
    found = call(metrics.feature_clusters, network("lsg"), shipped, test(), n_init=2, draws=6, seed=1)
    return frames(found, "feature_clusters")


@case("metrics/gate_leakage")
def _() -> Mapping[str, Any]:
    shipped = replace(gate().class_filters(names()), layer="fc")
    return {
        "frame": Frame(call(metrics.gate_leakage, network("lsg"), shipped, test(), draws=6, seed=1), "gate_leakage"),
        "histogram": Frame(call(metrics.gate_leakage, network(), filters(), test()), "gate_leakage"),
    }


@case("metrics/mutual_information")
def _() -> Mapping[str, Any]:
    head_pass = HeadPass(network(), test(), class_names=names())
    found = metrics.mutual_information(head_pass, max_samples=100, draws=2, seed=1)
    return frames(found, "mutual_information")


@case("metrics/localisation")
def _() -> Mapping[str, Any]:
    chosen = {name: tables()[name] for name in ("histogram", "contribution")}
    loader = test()[:2]
    found = call(metrics.localisation, network(), chosen, loader, 5)
    masks = [(images, labels, metrics.foreground(images, 0.2)) for images, labels in loader]
    by_mask = call(metrics.localisation, network(), filters(), masks, 5, silhouette="mask", channel_weights="ones")
    boxes = [
        (images, labels, torch.tensor([[4.0, 4.0, 20.0, 24.0]]).expand(len(images), 4)) for images, labels in loader
    ]
    by_box = call(metrics.localisation, network(), filters(), boxes, 5, silhouette="box", draws=6, seed=2)
    return {
        "frame": Frame(found, "localisation"),
        "mask": Frame(by_mask, "localisation"),
        "box": Frame(by_box, "localisation"),
        "foreground": metrics.foreground(loader[0][0]),
    }


@case("metrics/overlap")
def _() -> Mapping[str, Any]:
    chosen = {name: tables()[name] for name in ("histogram", "margin")}
    return {
        "frame": Frame(metrics.overlap(chosen, 5), "overlap"),
        "alone": Frame(metrics.overlap(filters(), 12), "overlap"),
    }


@case("metrics/stability")
def _() -> Mapping[str, Any]:
    found = call(metrics.stability, network(), train(), 5, selectors=["histogram", "margin"], draws=5, seed=1)
    judged = HeadPass(network(), train(), class_names=names())
    named = call(metrics.stability, judged, k=5, k1=0.5, importance="signed", draws=6)
    return {"frame": Frame(found, "stability"), "named": Frame(named, "stability")}


@case("metrics/intervals")
def _() -> Mapping[str, Any]:
    return {
        "wilson": np.stack(metrics.wilson(np.array([0, 3, 50, 100]), 100)),
        "mean": np.stack(metrics.mean_interval(np.arange(12.0).reshape(6, 2) ** 2)),
    }


# -- concepts ----------------------------------------------------------------------------------------------------------


def _concept_loader(count: int = 24) -> list[tuple[Tensor, list[dict[str, Tensor]]]]:
    """Images with masks: the object, its upper half, and for some classes a patch."""
    images, labels = test()[0]
    objects = metrics.foreground(images)
    upper = torch.zeros_like(objects)
    upper[:, :14] = True
    samples = []
    for index in range(count):
        masks = {"object": objects[index], "upper": objects[index] & upper[index]}
        if int(labels[index]) < 5:
            masks["patch"] = ~objects[index]
        samples.append((images[index], masks))
    return [metrics.collate_concepts(samples[start : start + 8]) for start in range(0, count, 8)]


_LAYERS = ["layer2.1.conv1", "layer3.1.conv1"]


@case("concepts/thresholds and fields")
def _() -> Mapping[str, Any]:
    images = [batch[0] for batch in test()[:2]]
    found = {
        f"plain {name}": value for name, value in metrics.activation_thresholds(network(), images, ["layer3"]).items()
    }
    gated_ones = metrics.activation_thresholds(decoupler(), images, _LAYERS, quantile=0.02)
    maps = torch.rand(3, 8, 7, 7)
    fields_of = metrics.receptive_fields(maps, torch.full((8,), 0.7), (28, 28))
    return {
        **found,
        **gated_ones,
        "fields": fields_of,
        "iou": metrics.field_iou(fields_of, torch.rand(3, 2, 28, 28) > 0.5),
    }


@case("concepts/concept_scores")
def _() -> Mapping[str, Any]:
    found = call(metrics.concept_scores, decoupler(), _concept_loader(), _LAYERS, thresholds=0.02)
    plain = call(metrics.concept_scores, network(), _concept_loader(), ["layer3"], iou=0.1, min_images=2)
    return {
        "decoupled": Frame(found, "concept_scores"),
        "plain": Frame(plain, "concept_scores"),
        "layers": Frame(metrics.layer_scores(found), "layer_scores"),
    }


@case("concepts/concept_representation")
def _() -> Mapping[str, Any]:
    found = call(metrics.concept_representation, decoupler(), _concept_loader(16), _LAYERS, thresholds=0.02, seed=1)
    plain = call(metrics.concept_representation, network(), _concept_loader(16), ["layer3"])
    name = "concept_representation"
    return {"decoupled": Frame(found, name), "plain": Frame(plain, name)}


@case("concepts/occlusion")
def _() -> Mapping[str, Any]:
    images = test()[0][0][:8]
    masks = metrics.foreground(images)
    masks[:, 14:] = False
    seen = call(metrics.occlusion, decoupler(), images, masks, _LAYERS, thresholds=0.02, value="black", draws=6, seed=1)
    return {
        "before": torch.cat(seen.before, 1),
        "after": torch.cat(seen.after, 1),
        "switched off": torch.cat(seen.switched_off, 1),
        "elsewhere": seen.elsewhere,
        "merged iou": seen.merged_iou,
        "random iou": seen.random_iou,
        "merged": seen.merged(),
        "merged of one": seen.merged(_LAYERS[:1]),
        "table": Frame(seen.table(), "occlusion_table"),
        "summary": Frame(seen.summary(), "occlusion_summary"),
        **{f"map {name}": value for name, value in zip(seen.layers, seen.maps, strict=True)},
    }


@case("concepts/occlude")
def _() -> Mapping[str, Any]:
    images = test()[0][0][:8]
    masks = metrics.foreground(images)
    return {f"{value}": metrics.occlude(images, masks, value) for value in ("mean", "black", 0.5)}


# -- comparison --------------------------------------------------------------------------------------------------------


@case("comparison/compare")
def _() -> Mapping[str, Any]:
    return frames(compare(HeadPass(network(), train(), class_names=names()), test_loader=test(), ks=[1, 5]), "compare")


@case("comparison/compare with a gate and an attribution")
def _() -> Mapping[str, Any]:
    model = network("lsg")
    given = {"gradient x activation": LayerGradientXActivation(model, model.layer3)}
    found = call(compare, model, train(), test(), [3, 10], gate=gate(), attributions=given, draws=6, seed=2)
    return frames(found, "compare")


@case("comparison/method_overlap")
def _() -> Mapping[str, Any]:
    chosen = {name: tables()[name] for name in ("histogram", "margin", "weight")}
    return frames(method_overlap(chosen, 5), "method_overlap")


@case("comparison/aggregate")
def _() -> Mapping[str, Any]:
    model = network()
    found = {
        "gradient x activation": aggregate(LayerGradientXActivation(model, model.layer3), train(), classes=names()),
        "abs": aggregate(LayerGradientXActivation(model, model.layer2), train(), importance="abs"),
        "no target": aggregate(LayerActivation(model, model.layer3), train()[:2]),
        "prediction": aggregate(
            LayerGradCam(model, model.layer3), train()[:2], label_source="prediction", attr_dim_summation=False
        ),
    }
    return several(found)


# -- attacks -----------------------------------------------------------------------------------------------------------


def _attacked(attack: Any, count: int = 2) -> dict[str, Any]:
    images, labels = test()[0]
    return {"images": attack.perturb(images[:count], labels[:count])}


@case("attacks/LocalSearch")
def _() -> Mapping[str, Any]:
    options = {"rounds": 4, "candidates": 30, "generator": torch.Generator().manual_seed(0)}
    return _attacked(attacks.LocalSearch(network(), **options), 4)


@case("attacks/Normalized")
def _() -> Mapping[str, Any]:
    return {"logits": logits_of(attacks.Normalized(network(), [0.1], [0.9]), 20)}


if find_spec("art"):

    @case("attacks/OnePixel")
    def _() -> Mapping[str, Any]:
        return _attacked(attacks.OnePixel(network(), max_iter=1, seed=1))

    @case("attacks/ARTAttack")
    def _() -> Mapping[str, Any]:
        from art.attacks.evasion import FastGradientMethod

        return _attacked(attacks.ARTAttack(network(), FastGradientMethod, num_classes=10, eps=0.05), 4)


if find_spec("foolbox"):

    @case("attacks/FoolboxAttack")
    def _() -> Mapping[str, Any]:
        import foolbox

        images, labels = test()[0]
        attack = attacks.FoolboxAttack(network(), foolbox.attacks.LinfFastGradientAttack())
        options = {"epsilon": 0.05} if "epsilon" in inspect.signature(attack.perturb).parameters else {}
        return {"images": attack.perturb(images[:4], labels[:4], **options)}


class _Darker:
    """An attack that needs no search: all pixels at half."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        changed = images.clone()
        changed[:, :, ::2] *= 0.5
        return changed


@case("metrics/attack_success")
def _() -> Mapping[str, Any]:
    models = {"std": network(), "lsg": network("lsg")}

    def local(model: nn.Module) -> Any:
        return attacks.LocalSearch(model, rounds=2, candidates=10, generator=torch.Generator().manual_seed(0))

    made = {"darker": _Darker, "LocalSearch": local}
    found = call(metrics.attack_success, models, test()[:1], made, max_images=20, draws=5, seed=1)
    return frames(found, "attack_success")


# -- the command line --------------------------------------------------------------------------------------------------


def cli_network() -> nn.Module:
    """What ``package.module:callable`` names in the cases below."""
    model: nn.Module = network()
    return model


def _cli(command: str, *words: str) -> dict[str, Any]:
    from PIL import Image

    from captum_classfilters.__main__ import main

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split in ("train", "test"):
            sample = load_images(split)
            for index, (image, label) in enumerate(zip(sample.images[:60], sample.labels[:60].tolist(), strict=True)):
                place = root / split / f"{label}"
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[0].numpy()).save(place / f"{index}.png")
        options = ["--judge", str(root / "test"), "--image-size", "28", "--resize", "28", "--out", str(root / "out")]
        given = [command, "benchmarks.lib.golden_cases:cli_network", str(root / "train"), *options, *words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            status = main([*given, "--quiet", "--device", "cpu"])
        if status:
            raise RuntimeError(f"exit status {status}: {errors.getvalue()}")
        return _read(root / "out")


def _read(folder: Path) -> dict[str, Any]:
    """The tables and networks that a command wrote."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {"files": sorted(file.name for file in folder.rglob("*") if file.is_file())}
    for file in sorted(folder.rglob("*.csv")):
        frame = pd.read_csv(file)
        curve = {"filters", "k", "class_name"} <= set(frame.columns)
        found[file.name] = Frame(frame, "accuracy_curve") if curve else json.loads(frame.to_json(orient="split"))
    for file in sorted(folder.rglob("*.safetensors")):
        for name, value in load_file(file).items():
            found[f"{file.name} {name}"] = Exact(value) if file.name.startswith("filters") else value
    return found


@case("cli/attribute")
def _() -> Mapping[str, Any]:
    return _cli("attribute", "--selector", "histogram,margin", "--k", "4")


@case("cli/decompose")
def _() -> Mapping[str, Any]:
    return _cli("decompose", "--k", "6", "--backend", "csr")


@case("cli/decompose refit")
def _() -> Mapping[str, Any]:
    return _cli("decompose", "--k", "6", "--refit", "omp", "--backend", "dense")
