"""Why did the wrong class win? The difference of two logits is split into channels and into positions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head_pass import position_map, single_batch
from captum_classfilters.core.targets import classes_of


@dataclass(frozen=True, eq=False)
class Confusion:
    """Result of `explain_confusion`.

    Attributes:
        table: One row for each sample and channel, the highest contribution first: ``sample``, ``channel`` (-1: the
            bias), ``feature``, ``weight_predicted``, ``weight_true``, ``contribution``. The contributions of a sample
            sum to ``difference``.
        difference: ``(N,)``, logit of the predicted class minus logit of the true one.
        predicted: ``(N,)`` int64.
        true: ``(N,)`` int64.
        won_by: ``(N, 1, h, w)``: what each position adds through the channels that speak for the predicted class. It is
            at least 0 if the features are. None where the features are not pooled from a map.
        lost_by: ``(N, 1, h, w)``: the same for the other channels. It is at most 0 if the features are at least 0.
        adds_up: Both maps, summed over positions, and the difference of the biases sum to ``difference``: where the
            features are the mean or the maximum of a map. False where the head reads a class token: the maps then show
            what it would read at the other tokens, in place of it, divided by their number.
    """

    table: pd.DataFrame
    difference: Tensor
    predicted: Tensor
    true: Tensor
    won_by: Tensor | None
    lost_by: Tensor | None
    adds_up: bool


def explain_confusion(
    model: Any,
    inputs: Any,
    true: Any,
    predicted: Any = None,
    *,
    layer: nn.Module | str | None = None,
    additional_forward_args: Any = None,
) -> Confusion:
    """Say by which channels one class won over another.

    The contribution of a channel is ``(w_predicted - w_true) * feature``. With the bias, the contributions sum exactly
    to the difference of the two logits.

    Args:
        model: The network; borrowed.
        inputs: Images, ``(N, ...)``, or a tuple of tensors.
        true: The class that lost, an int or N of them.
        predicted: The class that won, an int or N of them; None: the one the model predicts.
        layer: The head, if it cannot be found.
        additional_forward_args: Further arguments of the forward.

    Returns:
        A `Confusion`.

    Raises:
        HeadError: There is no head.
        LabelError: A class is out of range.
        OptionError: Both classes of a sample are the same.
    """

    batch = single_batch(model, inputs, layer=layer, additional_forward_args=additional_forward_args, need_maps=None)
    samples, device = len(batch.features), batch.features.device
    lost = classes_of(true, samples, batch.head.num_classes, device)
    won = (
        batch.logits.argmax(1) if predicted is None else classes_of(predicted, samples, batch.head.num_classes, device)
    )
    if bool((won == lost).any()):
        sample = int((won == lost).nonzero()[0, 0])
        raise OptionError(
            f"sample {sample} is of class {int(lost[sample])}, and the model predicts that class: nothing was "
            "confused; pass wrongly classified samples, or another class as predicted="
        )
    # in float64 the sum of thousands of products is exact to the last digit of the logits
    weight, bias = batch.head.weight.double(), batch.head.bias.double()
    difference = weight[won] - weight[lost]
    contribution = difference * batch.features.double()
    biases = bias[won] - bias[lost]
    sides = [difference * side for side in (contribution > 0, contribution <= 0)]
    won_by, lost_by = (position_map(batch, side) for side in sides)
    adds_up = won_by is not None and lost_by is not None
    if not adds_up:
        won_by, lost_by = (position_map(batch, side, exact=False) for side in sides)
    return Confusion(
        _table(batch.features.double(), weight[won], weight[lost], contribution, bias[won], bias[lost]),
        contribution.sum(1) + biases,
        won,
        lost,
        won_by,
        lost_by,
        adds_up,
    )


def _table(
    features: Tensor, won: Tensor, lost: Tensor, contribution: Tensor, bias_won: Tensor, bias_lost: Tensor
) -> pd.DataFrame:
    samples, channels = features.shape
    ones = torch.ones_like(bias_won)[:, None]
    columns = {
        "feature": torch.cat([features, ones], 1),
        "weight_predicted": torch.cat([won, bias_won[:, None]], 1),
        "weight_true": torch.cat([lost, bias_lost[:, None]], 1),
        "contribution": torch.cat([contribution, (bias_won - bias_lost)[:, None]], 1),
    }
    frame = pd.DataFrame(
        {
            "sample": np.repeat(np.arange(samples), channels + 1),
            "channel": np.tile(np.append(np.arange(channels), -1), samples),
            **{name: values.flatten().cpu().numpy() for name, values in columns.items()},
        }
    )
    return frame.sort_values(["sample", "contribution"], ascending=[True, False], ignore_index=True)
