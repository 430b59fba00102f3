"""Which channels raise an alarm, and where in the image: `explain_alarm`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from captum_classfilters.core.head_pass import position_map, single_batch
from captum_classfilters.detection.familiarity import FamiliarityDetector, HeadValues
from captum_classfilters.detection.features import Array
from captum_classfilters.detection.gaussians import Terms


@dataclass(frozen=True, eq=False)
class Alarm:
    """Result of `explain_alarm`.

    Attributes:
        table: One row for each sample and channel, the highest contribution first: ``sample``, ``channel`` (-1: what
            belongs to no channel), ``feature``, ``usual`` (the feature of the class mean or neighbour that it is
            compared with; NaN where there is none), ``contribution``. The contributions of a sample sum to
            ``strangeness``.
        strangeness: ``(N,)``, the detector's score.
        compared_with: ``(N,)`` int64, the class that the sample was compared with; for the nearest neighbours the place
            of the neighbour among the kept training images.
        map: ``(N, 1, h, w)``, what each position adds to the score; None where the features are not the average of a
            map. It sums to the score less what belongs to no channel.
    """

    table: pd.DataFrame
    strangeness: Tensor
    compared_with: Tensor
    map: Tensor | None


def explain_alarm(
    detector: FamiliarityDetector,
    model: Any,
    inputs: Any,
    *,
    layer: nn.Module | str | None = None,
    additional_forward_args: Any = None,
) -> Alarm:
    """Say which channels make images unfamiliar, and where they look.

    The score is split exactly: a squared distance ``sum_k d_k (P d)_k`` gives channel k its summand. A summand can be
    negative: the channel is nearer to its usual value than the others let expect.

    Args:
        detector: Fitted on this network; its method must be a sum over channels, as distances and ``"max_logit"`` are.
        model: The network; borrowed.
        inputs: Images, ``(N, ...)``, or a tuple of tensors.
        layer: The head, if it cannot be found.
        additional_forward_args: Further arguments of the forward.

    Returns:
        An `Alarm`.

    Raises:
        OptionError: The detector's score is no sum over channels.
        MergeError: The detector was fitted on another network.
        HeadError: There is no head.

    Example:
        >>> from captum_classfilters import HeadPass
        >>> from captum_classfilters.assets import load_demo_network, load_images
        >>> model, images = load_demo_network()[0], load_images("train")
        >>> detector = FamiliarityDetector().fit(HeadPass(model, images.batches()))
        >>> alarm = explain_alarm(detector, model, torch.rand(1, 1, 28, 28))
        >>> bool(abs(alarm.table.contribution.sum() - float(alarm.strangeness[0])) < 1e-6)
        True
    """

    def run(need_maps: bool) -> Any:
        return single_batch(
            model, inputs, layer=layer, additional_forward_args=additional_forward_args, need_maps=need_maps
        )

    batch = run(False)
    detector.check_network(batch.head)
    values = HeadValues.of(batch)
    terms, compared_with = detector.terms(values)
    if batch.head.feature_map is not None:
        batch = run(True)
    slope, offset = (torch.from_numpy(part).to(batch.features.device) for part in (terms.slope, terms.offset))
    contribution = terms.slope * values.features + terms.offset
    return Alarm(
        _table(values.features, terms, contribution),
        torch.from_numpy(contribution.sum(1) + terms.constant),
        torch.from_numpy(np.asarray(compared_with, np.int64)),
        position_map(batch, slope, offset),
    )


def _table(features: Array, terms: Terms, contribution: Array) -> pd.DataFrame:
    samples, channels = features.shape
    usual = np.full_like(features, np.nan) if terms.usual is None else terms.usual
    rest = np.full((samples, 1), np.nan)
    frame = pd.DataFrame(
        {
            "sample": np.repeat(np.arange(samples), channels + 1),
            "channel": np.tile(np.append(np.arange(channels), -1), samples),
            "feature": np.hstack([features, rest]).ravel(),
            "usual": np.hstack([usual, rest]).ravel(),
            "contribution": np.hstack([contribution, terms.constant[:, None]]).ravel(),
        }
    )
    return frame.sort_values(["sample", "contribution"], ascending=[True, False], ignore_index=True)
