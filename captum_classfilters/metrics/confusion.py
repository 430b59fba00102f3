"""Why did the wrong class win? The difference of two logits, channel by channel and place by place."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head_pass import Batch, single_batch
from captum_classfilters.core.targets import classes_of


@dataclass(frozen=True, eq=False)
class Confusion:
    """What `explain_confusion` found.

    Attributes:
        table: One row for each sample and channel, those first by which the predicted class won: ``sample``,
            ``channel`` (-1: the bias), ``feature``, ``weight_predicted``, ``weight_true``, ``contribution``. The
            contributions of a sample sum to ``difference``.
        difference: ``(N,)``, logit of the predicted class minus logit of the true one.
        predicted: ``(N,)`` int64.
        true: ``(N,)`` int64.
        won_by: ``(N, 1, h, w)``: where the channels that speak for the predicted class are, not below 0 for features
            that are not. None where the features are not the average of a map.
        lost_by: ``(N, 1, h, w)``: where those that speak for the true class are, not above 0. The sums of both maps
            over positions, and the bias, make ``difference``.
    """

    table: pd.DataFrame
    difference: Tensor
    predicted: Tensor
    true: Tensor
    won_by: Tensor | None
    lost_by: Tensor | None


def explain_confusion(
    model: Any,
    inputs: Any,
    true: Any,
    predicted: Any = None,
    *,
    layer: nn.Module | str | None = None,
    additional_forward_args: Any = None,
) -> Confusion:
    """By which channels one class won over another, exactly: ``(w_predicted - w_true) * feature``, which sum to the
    difference of the two logits.

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
        LabelError: A class out of range.
        OptionError: Both classes are the same for a sample: there is no confusion to explain.
    """

    def run(need_maps: bool) -> Batch:
        return single_batch(
            model, inputs, layer=layer, additional_forward_args=additional_forward_args, need_maps=need_maps
        )

    batch = run(False)
    samples, device = len(batch.features), batch.features.device
    lost = classes_of(true, samples, batch.head.num_classes, device)
    won = (
        batch.logits.argmax(1) if predicted is None else classes_of(predicted, samples, batch.head.num_classes, device)
    )
    if bool((won == lost).any()):
        sample = int((won == lost).nonzero()[0, 0])
        raise OptionError(
            f"sample {sample} is of class {int(lost[sample])}, which is also the predicted one: nothing was confused; "
            "pass wrongly classified samples, or predicted= with a rival"
        )
    # float64: a sum of thousands of products is then exact to the last digit of the logits
    weight, bias = batch.head.weight.double(), batch.head.bias.double()
    difference = weight[won] - weight[lost]
    contribution = difference * batch.features.double()
    biases = bias[won] - bias[lost]
    won_by, lost_by = _maps(run(True) if batch.head.feature_map is not None else batch, difference, contribution)
    return Confusion(
        _table(batch.features.double(), weight[won], weight[lost], contribution, bias[won], bias[lost]),
        contribution.sum(1) + biases,
        won,
        lost,
        won_by,
        lost_by,
    )


def _maps(batch: Batch, difference: Tensor, contribution: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What each position adds, ``(N, 1, h, w)``: by channels that speak for the predicted class, and by the others."""
    if batch.maps is None:
        return None, None
    maps, features = batch.maps.double(), batch.features.double()
    scale = float(features.abs().max()) + 1e-12
    # a maximum, or a norm between map and head: then positions do not add up to the feature
    half = min(torch.finfo(batch.maps.dtype).bits, torch.finfo(batch.features.dtype).bits) < 32
    if float((maps.mean((2, 3)) - features).abs().max()) > (3e-2 if half else 1e-3) * scale:
        return None, None
    each = difference / maps[0, 0].numel()
    sides = [each * (contribution > 0), each * (contribution <= 0)]
    won_by, lost_by = (torch.einsum("nkhw,nk->nhw", maps, side).unsqueeze(1).float() for side in sides)
    return won_by, lost_by


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
