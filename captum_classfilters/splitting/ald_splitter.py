"""`ALDSplitter`: splits a class's final-layer weights, and shows what the neurons of a node look at.

The fit is in `laplace.py`, the split in `splits.py`. N samples, K neurons (channels), C classes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters.class_filters import ClassFilters, names_of
from captum_classfilters.core.borrow import unwrap
from captum_classfilters.core.captum_compat import log_usage
from captum_classfilters.core.check import integer, one_of
from captum_classfilters.core.errors import HeadError, NonFiniteError, OptionError, quoted
from captum_classfilters.core.head import (
    AuxiliaryHead,
    Head,
    affine,
    channels_of,
    find_head,
    find_layer,
    is_quantised,
    last_layers,
)
from captum_classfilters.core.head_pass import class_map, probed_head, single_batch
from captum_classfilters.core.layers import find_module, named_modules
from captum_classfilters.core.targets import classes_of
from captum_classfilters.heads import DecomposedLinear
from captum_classfilters.splitting.ald_tree import ALDTree
from captum_classfilters.splitting.splits import Splits, split_weights


class ALDSplitter(LayerAttribution):
    """Which neurons of the final layer shout a class's name, and which confuse it; from the weights alone.

    A class's weights are taken to follow an asymmetric Laplace distribution. Both of its sides are split at their
    mean, the outer part again at its mean, and so on; the last node of the positive side holds the most discriminative
    neurons, that of the negative side the most confusing ones.

    Source: "An interpretation of the final fully connected layer", sections III and IV. Differs: exact zeros are
    dropped and counted; a fit by maximum likelihood beside the paper's line; all classes at once. How well the
    distribution fits is another question: `metrics.ald_evidence`.

    Args:
        forward_func: The model, an ``nn.Module``; compiled, DataParallel and DDP ones are unwrapped. A function also
            does, with ``layer``.
        layer: The head, as a module or a dotted name; None: it is looked for. A few images of noise are run to see
            which layer makes the logits. Where no noise fits the model, a layer that is named is believed, and of
            others the last one that has a matrix of weights, if no other could be meant.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> splitter = ALDSplitter(model)
        >>> tree = splitter.split(target=2)
        >>> sorted(tree.nodes)[:2], len(splitter.split())
        (['+1', '+2'], 3)
        >>> splitter.class_filters("negative")
        ClassFilters('ald_negative', 3 classes x 64 channels of '1', 3 samples)
    """

    def __init__(self, forward_func: Callable[..., Any], layer: nn.Module | str | None = None) -> None:
        super().__init__(forward_func, layer)
        # a wrong layer is refused here, before any work
        self._head: Head | None = None
        self._weights()

    @classmethod
    def of_head(cls, forward_func: Callable[..., Any], head: Head) -> "ALDSplitter":
        """Of a head that is known, as a `HeadPass` has found it."""
        splitter = cls.__new__(cls)
        LayerAttribution.__init__(splitter, forward_func, head.module)
        splitter._head = head
        return splitter

    @property
    def multiplies_by_inputs(self) -> bool:
        """The map is of activations, not of inputs."""
        return False

    @overload
    def split(self, target: int, **options: Any) -> ALDTree: ...
    @overload
    def split(self, target: Sequence[int] | None = ..., **options: Any) -> dict[int, ALDTree]: ...

    def split(self, target: Any = None, **options: Any) -> Any:
        """The tree of a class; of several or of all, a dict of trees by class.

        Args:
            target: An index in ``[0, C)``, several, or None for all.
            **options: ``fit`` (``"loglinear"`` or ``"mle"``), ``first_threshold`` (``"zero"`` or ``"mean"``) and
                ``min_size`` (20), as in `splits.split_weights`.

        Raises:
            LabelError: A class is out of range.
            OptionError: An option is out of range, or the head has fewer features than ``min_size``.
            NonFiniteError: NaN or infinity among the weights.

        Warns:
            DegenerateFitWarning: A class has no two different weights, and ``fit="mle"``.
        """
        several = target is None or (isinstance(target, Iterable) and not isinstance(target, str))
        one = getattr(target, "ndim", None) == 0 or not several
        splits = self._splits([target] if one else target, options)
        trees = {number: ALDTree(splits, row) for row, number in enumerate(splits.targets)}
        return trees[splits.targets[0]] if one else trees

    def splits(self, **options: Any) -> Splits:
        """The numbers behind `split`, as tables of all classes."""
        return self._splits(None, options)

    def class_filters(
        self, branch: str = "positive", *, class_names: Sequence[str] | None = None, **options: Any
    ) -> ClassFilters:
        """The answer every method gives: how deep in a branch each neuron lies.

        Args:
            branch: ``"positive"`` or ``"negative"``.
            class_names: C names; otherwise numbers.
            **options: As for `split`.

        Returns:
            ``scores``: a neuron's deepest node over the branch's last one, so 1 for terminal neurons and 0 outside;
            ``mass``: ``|weight|``, which breaks ties; ``counts``: 1, for no sample is looked at, and 0 for a class
            whose branch is empty. So the ranking is that of signed weights (of the negative branch: of their
            negatives), beyond the branch too; what the tree adds is how many belong to it. The terminal sets differ in
            size: ``filters.scores == 1`` has them.
        """
        splits = self.splits(**options)
        names = names_of(class_names, len(splits.weights))
        depths = splits.depths(branch)
        scores = splits.stages(branch).double() / depths.clamp(min=1)[:, None]
        mass = splits.weights.double().abs()
        about = {"branch": branch, **options}
        seen = (depths > 0).long()
        return ClassFilters(scores, mass, seen, f"ald_{branch}", splits.layer, names, about, merge_rule="none")

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any,
        additional_forward_args: Any = None,
        *,
        branch: str = "positive",
        stage: int | None = None,
        channel_weights: str = "head",
        **options: Any,
    ) -> Tensor:
        """What the neurons of a node look at: the feature map behind the head, summed over these neurons alone.

        Where the head's input is the map's average, the map of ``channel_weights="head"`` averages to what these
        neurons add to the class's logit: a class activation map (Zhou et al. 2016) of one node. The paper shows Smooth
        Grad-CAM++ of terminal nodes: `LayerSmoothGradCamPlusPlus` with ``channels=tree.terminal("positive")``.

        Args:
            inputs: Images, ``(N, ...)``, or a tuple of tensors.
            target: The class, an int, or N of them; each image gets the neurons of its own.
            additional_forward_args: Passed on to the forward pass.
            branch: ``"positive"`` or ``"negative"``.
            stage: 1 for the whole side, 2 for what lies beyond its mean, and so on. None: the last.
            channel_weights: ``"head"``: each channel times its weight for the class (below 0 on the negative branch);
                ``"ones"``: the plain sum, as in the published code.
            **options: As for `split`.

        Returns:
            ``(N, 1, h, w)``, signed; ready for ``LayerAttribution.interpolate`` and ``visualize_image_attr``.

        Raises:
            HeadError: The head is not the one whose weights were read, or there is no feature map behind it.
            OptionError: A class has no such stage, or no weights on that side.
            LabelError: A target out of range.
        """
        one_of(channel_weights, "channel_weights", ("head", "ones"))
        name, _ = self._weights()
        batch = single_batch(
            self.forward_func,
            inputs,
            layer=self.layer,
            additional_forward_args=additional_forward_args,
            need_maps=True,
        )
        if batch.head.name != name:
            raise HeadError(
                f"the last layer with a matrix is {name}, but the logits come from {batch.head.name}; pass "
                f"layer={batch.head.name!r}"
            )
        classes = classes_of(target, len(batch.features), batch.head.num_classes, batch.features.device)
        chosen = self._chosen(classes, branch, stage, options).to(batch.features.device)
        return class_map(batch, classes, chosen, channel_weights)

    def _chosen(self, classes: Tensor, branch: str, stage: int | None, options: dict[str, Any]) -> Tensor:
        """The neurons of each sample's class, ``(N, K)`` bool."""
        wanted, places = torch.unique(classes.cpu(), return_inverse=True)
        splits = self._splits(wanted.tolist(), options)
        depths = splits.depths(branch)
        if stage is None:
            least = depths
        else:
            least = torch.full_like(depths, integer(stage, "stage", 1, meaning="or None for the last"))
        short = [
            (number, depth) for number, depth, want in zip(wanted, depths, least, strict=True) if depth < max(want, 1)
        ]
        if short:
            number, depth = map(int, short[0])
            what = f"{depth} stages on the {branch} side, so no stage {stage}" if depth else f"no {branch} weights"
            raise OptionError(f"class {number} has {what}; see print(splitter.split({number}))")
        return (splits.stages(branch) >= least[:, None])[places]

    def _weights(self) -> tuple[str, Tensor]:
        name, weights, self._head = head_weights(self.forward_func, self.layer, self._head)
        return name, weights

    def _splits(self, targets: Iterable[Any] | None, options: dict[str, Any]) -> Splits:
        name, weights = self._weights()
        if targets is None:
            return split_weights(weights, layer=name, **options)
        wanted = list(targets)
        if not wanted:
            raise OptionError("target is empty; pass a class, several, or None for all")
        rows = tuple(dict.fromkeys(classes_of(wanted, len(wanted), len(weights), torch.device("cpu")).tolist()))
        return split_weights(weights[list(rows)], targets=rows, layer=name, **options)


# -- the head's weights, read without any data: dense, decomposed, sparse or quantised --------------------------------


def head_weights(
    model: Any, layer: nn.Module | str | None, head: Head | None = None
) -> tuple[str, Tensor, Head | None]:
    """Name of the head, its weights ``(C, K)`` on the CPU, float32 or float64, and itself if it is not decomposed.

    Args:
        model: The model, or a function, then with ``layer``.
        layer: The head; None: it is looked for.
        head: It, if it is known.

    Raises:
        HeadError: There is none, or it is no linear layer.
        NonFiniteError: NaN or infinity among its weights.
    """
    module = unwrap(model)
    network = module if isinstance(module, nn.Module) else None
    if network is None and not isinstance(layer, nn.Module):
        raise HeadError("a bare function does not show its layers: pass layer= with the nn.Linear that is its head")
    small = None if head is not None else _decomposed(network, layer)
    if small is not None:
        name, weight = small
    else:
        head = head if head is not None else _head(network, layer)
        name, weight = head.name, head.weight
        weight = weight if weight.layout == torch.strided else weight.to_dense()
    if weight.is_meta:
        raise OptionError(f"layer {name} has no weights yet, it is on the meta device; load them first")
    # numpy, which sorts them, knows no bfloat16
    weight = weight.cpu().to(torch.promote_types(weight.dtype, torch.float32))
    # a sum is not finite if a term is not: a tenth of the time of looking at each
    rows = [] if bool(torch.isfinite(weight.sum())) else (~torch.isfinite(weight).all(1)).nonzero().flatten().tolist()
    if rows:
        raise NonFiniteError(
            f"expected finite weights, got NaN or infinity in layer {name}, classes {quoted(rows)}; load a whole "
            "checkpoint"
        )
    return name, weight, head


def _head(model: nn.Module | None, layer: nn.Module | str | None) -> Head:
    if model is None:
        return find_head(layer, layer)  # type: ignore[arg-type]  # a module, above
    # errors that need no forward pass come first
    known = layer is not None and channels_of(find_layer(model, layer)) > 0
    named = find_head(model, layer) if known else None  # type: ignore[arg-type]
    if named is not None and isinstance(layer, AuxiliaryHead):
        return named
    if not any(is_quantised(module) for module in model.modules()):
        head = probed_head(model, layer)
        if head is not None:
            return head
    if layer is not None:
        return named if named is not None else find_head(model, layer)
    first, *others = last_layers(model)
    # where nothing can be run, a layer with as many outputs could as well be the head
    rivals = [module for module in others if len(affine(module)[0]) == len(affine(first)[0])]
    if rivals:
        names = named_modules(model)
        raise HeadError(
            f"several layers could be the head: {', '.join(names[module][0] for module in (first, *rivals)[:6])}; pass "
            "layer= with the name of the one that makes the logits"
        )
    return find_head(model, first)


def _decomposed(model: nn.Module | None, layer: nn.Module | str | None) -> tuple[str, Tensor] | None:
    """A head that `decompose` made smaller: what it left out is 0."""
    if layer is not None:
        chosen = find_module(model, layer, error=HeadError)
    else:
        # its weights are a list, not a matrix, so it is not found as the last one with a matrix
        small = [module for module in model.modules() if isinstance(module, DecomposedLinear)]  # type: ignore[union-attr]
        chosen = small[-1] if small else nn.Identity()
    if not isinstance(chosen, DecomposedLinear):
        return None
    names = {module: name for name, module in model.named_modules()} if model is not None else {}
    return names.get(chosen, type(chosen).__name__), chosen.to_dense().weight.detach()
