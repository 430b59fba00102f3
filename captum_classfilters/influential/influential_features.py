"""`InfluentialFeatures`: a Captum layer attribution whose loader form finds the features that decide each class.

Tensors in: what each feature adds to the logit. A loader in: a `ClassFilters` table from one pass. What a batch adds to
the table is in `selectors.py`, the sums are in `running_sums.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters.class_filters import (
    ClassFilters,
    check_k,
    check_table,
    merge_ranks,
    names_of,
    one_table,
    warn_unseen,
)
from captum_classfilters.core.captum_compat import log_usage
from captum_classfilters.core.check import one_of
from captum_classfilters.core.errors import EmptyLoaderError, LabelError, OptionError
from captum_classfilters.core.head_pass import Batch, HeadPass, class_map, single_batch
from captum_classfilters.core.outputs import check_output, gives_many_labels
from captum_classfilters.core.ranks import Ranks, group_of
from captum_classfilters.core.targets import classes_of
from captum_classfilters.influential.running_sums import K1, Options, Tables
from captum_classfilters.influential.selectors import RECORDS


class InfluentialFeatures(LayerAttribution):
    """Which features of the classifier head decide each class.

    Source: Badola et al. 2022, "Decomposing the Deep: Finding Class Specific Filters in Deep CNNs", Algorithm 1.
    Differs from the paper: zeros do not vote, ties are settled by accumulated ``|feature|`` and then by lower index,
    and other selectors stand beside the histogram.

    Args:
        forward_func: The model, an ``nn.Module``; compiled, DataParallel and DDP ones are unwrapped. A function also
            does, with ``layer``; nobody can then switch it to eval mode for you.
        layer: The head, an ``nn.Linear`` or a 1x1 convolution, as a module or a dotted name. None: found in the first
            batch, as the layer whose output is the model's output.
        device_ids: CUDA devices on which the model is expected; checked, never moved.
        output: Takes what the model returns, gives the logits ``(N, C)``. None: a tensor, ``.logits``, ``["logits"]``,
            or the first of a tuple. Calls without ``output=`` take ``WithOutput(model, output)`` as the model.

    Example:
        >>> import torch
        >>> from captum_classfilters import InfluentialFeatures
        >>> nn = torch.nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> loader = [(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)]
        >>> filters = InfluentialFeatures(model).attribute(loader, class_names=("cat", "dog"))
        >>> filters
        ClassFilters('histogram', 2 classes x 3 channels of '3', 8 samples)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | None = None,
        device_ids: list[int] | None = None,
        *,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self.output = check_output(output)

    @overload
    def attribute(
        self, inputs: Tensor | tuple[Tensor, ...], target: Any = ..., *args: Any, **kwargs: Any
    ) -> Tensor: ...
    @overload
    def attribute(
        self, inputs: Iterable[Any], target: None = ..., *args: Any, k1: Sequence[int | float], **kwargs: Any
    ) -> dict[int | float, ClassFilters]: ...
    @overload
    def attribute(
        self,
        inputs: Iterable[Any],
        target: None = ...,
        *args: Any,
        selector: list[str] | tuple[str, ...],
        **kwargs: Any,
    ) -> dict[str, ClassFilters]: ...
    @overload
    def attribute(self, inputs: Iterable[Any], target: None = ..., *args: Any, **kwargs: Any) -> ClassFilters: ...

    @log_usage()
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = True,
        *,
        k1: K1 | Sequence[K1] | None = None,
        selector: str | Sequence[str] = "histogram",
        importance: str = "abs",
        label_source: str = "target",
        correct_only: bool = False,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        distributed: Ranks = None,
        show_progress: bool = False,
    ) -> Any:
        """Attribute a tensor's logits to features, or find each class's features over a loader.

        Args:
            inputs: A tensor ``(N, ...)`` or a tuple of tensors (the arguments of one forward pass): *tensor form*. A
                DataLoader or any iterable of batches ``(inputs, labels)``, also of mappings: *loader form*; read once,
                moved to the model's device batch by batch, never kept.
            target: Tensor form only: the class, an int or N of them.
            additional_forward_args: Passed on to every forward pass.
            attribute_to_layer_input: Must be True: it is the head's input that has features.
            k1: Loader form, for the selectors that vote: how many features each sample votes for. None:
                ``round(sqrt(K))``; a float in (0, 1): as many as cover that share of the sample's total
                ``|feature|``; several: a dict with one table for each, from the same pass.
            selector: ``"histogram"`` (the paper), ``"mean_activation"``, ``"weight"``, ``"contribution"``,
                ``"weight_and_activation"``, ``"margin"``, ``"ablation"``, ``"correlation"`` (of the feature with the
                class indicator; needs labels), or ``"random"``, the control. Several: a dict with one table for each,
                from the same pass.
            importance: ``"abs"`` (the paper's l1 norm) or ``"signed"`` (the published code); they differ where features
                can be negative (SiLU, GELU, LayerNorm).
            label_source: ``"target"``: a sample counts for its label, or for each of its labels where they are rows of
                0 and 1, ``(N, C)``; ``"prediction"``: for the class the model predicts, and labels are not needed.
                Where they are such rows, or the model's config says "multi_label_classification", it counts for each
                class whose logit is above 0.
            correct_only: Only samples that the model classifies right; of many labels those that the model gives.
            num_classes: Checked against the head.
            class_names: C names; otherwise those of ``loader.dataset.classes`` or ``model.config.id2label``, otherwise
                numbers.
            seed: Seed of the ``"random"`` selector.
            distributed: Loader form: None: where torch.distributed runs, all ranks pass over their shards, each calls
                this, and each gets the table of all (`ClassFilters.merge`, by all-reduce; a shard may be empty). A
                process group: its ranks alone. False: this process alone.
            show_progress: A tqdm bar.

        Returns:
            Tensor form: ``W[target] * features``, shape ``(N, K)``, the model's dtype; with the head's bias a row
            sums to the logit. Loader form: `ClassFilters`; a dict of them where ``k1`` or ``selector`` is a list.

        Raises:
            HeadError: No head, or not one (names the candidates).
            LabelError: Labels missing, out of range, fractions or texts.
            OptionError: An option is unknown, out of range, or does not fit the others.
            ShapeError: Inputs are not tensors, or in no form that is read.
            DeviceError: The model is not on ``device_ids``.
            EmptyLoaderError: The loader gave no sample.
            NonFiniteError: NaN or infinity among the features; names layer and batch.
            MergeError: Another rank failed; at the latest after the process group's timeout.

        Whatever ends the pass early, KeyboardInterrupt included, carries the table of the batches before it as
        ``error.partial_result``; `ClassFilters.merge` adds the rest.
        """
        if not attribute_to_layer_input:
            raise OptionError(
                "attribute_to_layer_input must be True: contributions are those of the head's input features"
            )
        if isinstance(inputs, Tensor) or (
            isinstance(inputs, tuple) and inputs and all(isinstance(i, Tensor) for i in inputs)
        ):
            return self._contributions(inputs, target, additional_forward_args)
        if target is not None:
            raise OptionError("target belongs to tensors; over a loader the labels, or label_source, say the class")
        if isinstance(k1, Iterable) and not isinstance(selector, str):
            raise OptionError("either k1 or selector may be a list, not both; call once for each selector")
        k1s: list[Any] = list(k1) if isinstance(k1, Iterable) else [k1]
        names = [selector] if isinstance(selector, str) else list(selector)
        if not k1s or not names:
            raise OptionError("the list of k1 or selectors is empty; pass at least one")
        options = Options.checked(names, k1s, importance, label_source, seed)
        group = group_of(distributed)
        head_pass = HeadPass(
            self.forward_func,
            inputs,
            layer=self.layer,
            additional_forward_args=additional_forward_args,
            device=self._device(),
            show_progress=show_progress,
            output=self.output,
        )
        # with several k1, the one selector votes: another has been refused together with k1
        key = 0 if not isinstance(selector, str) else 1 if isinstance(k1, Iterable) else None
        with head_pass.batches(
            need_labels=True if label_source == "target" or correct_only else None,
            many_labels=True,
            num_classes=num_classes,
            description="InfluentialFeatures",
        ) as stream:
            run = _Pass(options, correct_only, class_names, inputs, key, self.forward_func)
            result = run.over(stream, group)
        # past Captum's wrapper around `attribute`, to the caller
        warn_unseen(
            result if isinstance(result, ClassFilters) else next(iter(result.values())), stacklevel=4, result=result
        )
        return result

    def explain(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any,
        filters: ClassFilters,
        k: int,
        *,
        channel_weights: str = "head",
        additional_forward_args: Any = None,
    ) -> Tensor:
        """What a class's k filters look at: the feature map behind the head, summed over those channels alone.

        Where the head's input is the map's average, the map of ``channel_weights="head"`` averages to what these
        channels add to the class's logit: a class activation map (Zhou et al. 2016) of k channels.

        Args:
            inputs: Images, ``(N, ...)``, or a tuple of tensors.
            target: The class, by name or index, or N indices.
            filters: Whose channels.
            k: How many of them, in ``[1, K]``.
            channel_weights: ``"head"``: each channel times its weight for the class; ``"ones"``: the plain sum.
            additional_forward_args: Passed on to the forward pass.

        Returns:
            Shape ``(N, 1, h, w)``, signed; ready for ``LayerAttribution.interpolate`` and ``visualize_image_attr``.

        Raises:
            HeadError: No head, or no feature map behind it.
            ShapeError, OptionError, LabelError: The table is another network's, or k or target is out of range.
        """
        one_of(channel_weights, "channel_weights", ("head", "ones"))
        one_table(filters)
        if isinstance(target, str):
            target = filters.index(target)
        batch = self._single(inputs, additional_forward_args, need_maps=True)
        check_table(filters, batch.head)
        check_k(k, filters.num_channels, "k")
        classes = _targets(target, batch)
        chosen = filters.mask(k).to(classes.device)[classes]
        if not bool(chosen.any(1).all()):
            unseen = sorted(
                {
                    filters.class_names[c]
                    for c, has_channels in zip(classes.tolist(), chosen.any(1).tolist(), strict=True)
                    if not has_channels
                }
            )
            raise OptionError(
                f"classes {unseen} have no samples in the table, so no filters to show; choose another target"
            )
        return class_map(batch, classes, chosen, channel_weights)

    # -- one batch -------------------------------------------------------------------------------------------------

    def _contributions(self, inputs: Any, target: Any, forward_args: Any) -> Tensor:
        if target is None:
            raise OptionError(
                "tensors need target=, the class whose logit is explained: an int, or one for each sample; for one "
                "batch of images and labels pass a loader, [(images, labels)]. A tuple of tensors is one pass's "
                "arguments: for several batches pass a list"
            )
        batch = self._single(inputs, forward_args, need_maps=False)
        contributions = batch.head.weight[_targets(target, batch)] * batch.features
        return contributions.to(batch.head.device)

    def _single(self, inputs: Any, forward_args: Any, need_maps: bool) -> Batch:
        return single_batch(
            self.forward_func,
            inputs,
            layer=self.layer,
            additional_forward_args=forward_args,
            need_maps=need_maps,
            device=self._device(),
            output=self.output,
        )

    def _device(self) -> str | None:
        return f"cuda:{self.device_ids[0]}" if self.device_ids else None


class _Pass:
    """One pass over the stream; its sums survive whatever ends it."""

    def __init__(
        self,
        options: Options,
        correct_only: bool,
        class_names: Sequence[str] | None,
        loader: Any,
        key: int | None,
        model: Any,
    ) -> None:
        self._options, self._correct_only = options, correct_only
        self._by_prediction = options.label_source == "prediction"
        self._meta: dict[str, Any] = {"label_source": options.label_source, "correct_only": correct_only}
        self._class_names, self._loader, self._key, self._model = class_names, loader, key, model
        self._tables: Tables | None = None
        self._names: tuple[str, ...] = ()
        # rows of 0 and 1 or class indices; rows that are all one-hot are one label for each sample
        self._many: bool | None = None
        self._alone: Tables | None = None

    def over(self, stream: Iterable[Batch], group: Any) -> Any:
        try:
            for batch in stream:
                self._add(batch)
            tables = self._so_far() if group is None else merge_ranks(group, self._so_far(), self._model)
        except EmptyLoaderError:
            if group is None:
                raise
            tables = merge_ranks(group, None, self._model)
        except BaseException as error:
            if self._tables is not None:
                error.partial_result = self._named(self._so_far())  # type: ignore[attr-defined]
            raise
        return self._named(tables)

    def _add(self, batch: Batch) -> None:
        if self._tables is None:
            # names first: a wrong list is refused before anything is counted
            self._names = names_of(self._class_names, batch.head.num_classes, self._loader, self._model)
            self._meta |= batch.head.about()
            self._tables, self._alone = Tables(batch.head, self._options), Tables(batch.head, self._options)
        features, logits = batch.features, batch.logits
        labels = batch.labels
        if labels is None and self._by_prediction and gives_many_labels(self._model):
            labels, self._alone = torch.zeros_like(logits, dtype=torch.bool), None
        if labels is None or labels.dim() == 1:
            self._check_form(False)
            self._add_one(self._tables, labels, features, logits)
            return
        self._check_form(True)
        if self._alone is not None and bool((labels.sum(1) == 1).all()):
            self._add_one(self._alone, labels.long().argmax(1), features, logits)
        else:
            self._alone = None
            if needing := [name for name in self._options.names if RECORDS[name].needs_labels]:
                raise OptionError(
                    f"selectors {needing} tell classes apart by one label for each sample, and these samples have "
                    "many; leave them out"
                )
        self._add_many(labels, features, logits)

    def _add_one(self, tables: Tables, labels: Tensor | None, features: Tensor, logits: Tensor) -> None:
        predicted = logits.argmax(1)
        classes = predicted if self._by_prediction or labels is None else labels
        if self._correct_only:
            right = predicted == labels
            features, logits, classes = features[right], logits[right], classes[right]
        if len(classes):
            tables.add(features, logits, classes)

    def _add_many(self, labels: Tensor, features: Tensor, logits: Tensor) -> None:
        """Each sample counts for each of its classes."""
        positive = logits > 0
        own = positive if self._by_prediction else labels
        rows, classes = (own & positive & labels if self._correct_only else own).nonzero(as_tuple=True)
        if len(rows):
            self._tables.add(features[rows], logits[rows], classes, own[rows])  # type: ignore[union-attr]

    def _check_form(self, many: bool) -> None:
        if self._many not in (None, many):
            raise LabelError(
                "some batches have class indices, others rows of 0 and 1; give the labels of all in one form"
            )
        self._many = many

    def _so_far(self) -> dict[Any, ClassFilters]:
        if self._many and self._alone is not None:
            return self._alone.filters(self._names, self._meta)
        many = {"labels": "many"} if self._many else {}
        return self._tables.filters(self._names, {**self._meta, **many})  # type: ignore[union-attr]

    def _named(self, tables: dict[Any, ClassFilters]) -> Any:
        """The only table, or tables by selector (key 0) or k1 (key 1)."""
        if self._key is None:
            return next(iter(tables.values()))
        return {key[self._key]: table for key, table in tables.items()}


def _targets(target: Any, batch: Batch) -> Tensor:
    count, classes = batch.logits.shape
    return classes_of(target, count, classes, batch.logits.device)
