"""Channels overwritten in networks of many labels: what `interventions.py` counts, by average precision.

N samples, C classes, K channels.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.core.many_labels import ManyScores


def ablation_of_many(
    scores: ManyScores, filters: ClassFilters, sets: Tensor, writing: Mapping[str, Tensor | None]
) -> pd.DataFrame:
    """The frame of `class_ablation` where each class's logit is judged with that class's channels overwritten.

    Args:
        scores: What the pass kept.
        filters: Its class names.
        sets: Chosen channels, ``(S, C, K)`` bool: the influential ones, the rest, and each draw of the control.
        writing: The values to write by mode, ``(N, K)``; None: zeros.
    """
    head, weight = scores.head, scores.head.weight
    features = scores.features.to(weight.dtype)

    def logits(chosen: Tensor, values: Tensor | None) -> Tensor:
        chosen = chosen.to(weight.device)
        kept = F.linear(features, weight * ~chosen, head.bias)
        return kept if values is None else kept + F.linear(values, weight * chosen)

    whole = scores.columns(scores.logits)
    parts = [("intact", "none", False, whole)]
    for mode, values in writing.items():
        parts.append((mode, "influential", False, scores.columns(logits(sets[0], values))))
        parts.append((mode, "rest", False, scores.columns(logits(sets[1], values))))
        parts.append((mode, "random", True, scores.chance_columns(logits(chosen, values) for chosen in sets[2:])))
    frames = [
        pd.DataFrame(
            {
                "class_name": ["all", *filters.class_names],
                "mode": mode,
                "channels": channels,
                "control": is_control,
                **columns,
                "drop": whole["average_precision"] - columns["average_precision"],
                "samples": scores.samples,
            }
        )
        for mode, channels, is_control, columns in parts
    ]
    return pd.concat(frames, ignore_index=True)


def masking_of_many(scores: ManyScores, filters: ClassFilters, cases: Sequence[Tensor]) -> pd.DataFrame:
    """The frame of `class_masking` of many labels.

    Args:
        scores: What the pass kept.
        filters: Its class names are those of the cases.
        cases: The masked channels of each class, and below them those of each draw, ``(1 + draws, K)`` bool.
    """
    head, whole = scores.head, scores.columns(scores.logits)
    features = scores.features.to(head.weight.dtype)

    def masked(mask: Tensor) -> Tensor:
        return F.linear(features * ~mask.to(features.device), head.weight, head.bias)

    frames = []
    for name, masks in zip(filters.class_names, cases, strict=True):
        judged, chance = scores.columns(masked(masks[0])), scores.chance_columns(map(masked, masks[1:]))
        for is_control, columns in ((False, judged), (True, chance)):
            frames.append(
                pd.DataFrame(
                    {
                        "masked": name,
                        "control": is_control,
                        "channels": int(masks[0].sum()),
                        "class_name": ["all", *filters.class_names],
                        **columns,
                        "intact": whole["average_precision"],
                        "drop": whole["average_precision"] - columns["average_precision"],
                        "samples": scores.samples,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)
