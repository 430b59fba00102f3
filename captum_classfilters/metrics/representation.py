"""How well do filters outline a concept, one alone and those together that switch off when it is covered?

`concepts.py` has the loader's contract and the single filters, `occlusion.py` what is covered.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from captum_classfilters.core.borrow import unwrap
from captum_classfilters.decoupling import PathDecoupler
from captum_classfilters.metrics.concepts import Thresholds, concept_batches, surveyed, tallied
from captum_classfilters.metrics.fields import Layers, activation_thresholds
from captum_classfilters.metrics.occlusion import cover_and_compare


def concept_representation(
    model: Any,
    loader: Iterable[Any],
    layers: Layers = None,
    *,
    thresholds: Thresholds | None = None,
    quantile: float = 0.005,
    value: str | float | Sequence[float] = "mean",
    draws: int = 5,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """How well one filter, and how well those that switch off together, outline each concept.

    Source: "Interpretable neural network decoupling", section 4.2 and fig. 5. Single filter: max over images and
    filters of the IoU. Multiple: the concept is covered, and the fields of the filters that switch off are merged; mean
    over images of the IoU. Differs: a maximum over images and a mean over them do not compare, so both are given for
    both; and controls, without which many filters merged would look good for their number.

    Args:
        model: A `PathDecoupler`, or a plain network, then of single filters only; borrowed.
        loader: As for `concept_scores`; read up to four times.
        layers: As for `activation_thresholds`.
        thresholds: From `activation_thresholds`; None: of this loader.
        quantile: Share of responses above the threshold, where ``thresholds`` is None.
        value: What covers; see `occlude`.
        draws: Of each control, at least 5.
        seed: Of those of several filters.
        show_progress: A tqdm bar.

    Returns:
        One row for each layer and concept: ``images`` that have it; ``single_max`` (the paper's), ``single_mean`` (over
        images, of the best filter on each), ``single_max_random`` and ``single_mean_random`` by other images' masks, as
        for `concept_scores`. Of a decoupler also ``multiple_max``, ``multiple_mean`` (the paper's) with ``low`` and
        ``high`` (normal, over images), ``multiple_mean_random`` of as many random open filters; ``switched_off``, mean
        count of filters, and ``elsewhere``, that of an equal region elsewhere; ``none``, share of images on which none
        switches off and the IoU is 0.

    Raises:
        OptionError, LayerError, ShapeError, EmptyLoaderError, NonFiniteError: As for `concept_scores`.
    """
    survey = surveyed(loader, draws)
    if thresholds is None:
        thresholds = activation_thresholds(model, loader, layers, quantile=quantile, show_progress=show_progress)
    tallies = tallied(model, loader, layers, survey, thresholds, quantile, 0.0, show_progress)
    counts = np.array(list(survey.counts.values()))
    frames = []
    for layer, tally in tallies.items():
        highest, mean = tally.highest.cpu().numpy(), tally.total.cpu().numpy() / counts
        columns = {"single_max": highest[0], "single_mean": mean[0]}
        columns |= {"single_max_random": highest[1:].mean(0), "single_mean_random": mean[1:].mean(0)}
        frames.append(pd.DataFrame({"layer": layer, "concept": list(survey.counts), "images": counts, **columns}))
    single = pd.concat(frames, ignore_index=True)
    if not isinstance(unwrap(model), PathDecoupler):
        return single
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for batch in concept_batches(loader, survey, show_progress, "occlusion"):
        images, places = (batch.slots < len(survey.counts)).nonzero(as_tuple=True)
        # a batch's images have several masks each: as many at a time as it has images
        for start in range(0, len(images), len(batch.images)):
            image, place = (each[start : start + len(batch.images)] for each in (images, places))
            given = batch.images[image], batch.masks[image, place]
            found = cover_and_compare(model, *given, layers, value, thresholds, draws, generator).summary()
            slots = batch.slots[image, place].numpy()
            parts.append(found.assign(concept=np.array(list(survey.counts))[slots[found.image]]))
    return single.merge(_of_concepts(pd.concat(parts)), on=["layer", "concept"], validate="one_to_one")


def _of_concepts(rows: pd.DataFrame) -> pd.DataFrame:
    groups = rows.assign(none=rows.switched_off == 0).groupby(["layer", "concept"])
    mean = groups.iou.mean()
    half: Any = 1.96 * groups.iou.std() / np.sqrt(groups.iou.count())
    columns = {"multiple_max": groups.iou.max(), "multiple_mean": mean, "low": mean - half, "high": mean + half}
    columns |= {"multiple_mean_random": groups.random_iou.mean(), "switched_off": groups.switched_off.mean()}
    return pd.DataFrame(columns | {"elsewhere": groups.elsewhere.mean(), "none": groups.none.mean()}).reset_index()
