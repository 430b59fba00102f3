"""One canonical form for every frame, so that frames of before and after a change of schema compare.

A canonical frame has a bool column ``control``. A random control that stands in columns of its own (``random``,
``random_low``, ``score_random``) becomes rows with ``control=True`` and the value columns of the rows that it judges.
Frames that have such rows already pass as they are. `RULES` says it for each metric; a change of schema is translated
there and nowhere else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

_INTERVAL = {"random_low": "low", "random_high": "high"}


@dataclass(frozen=True)
class Rule:
    """How the frame of one metric becomes canonical.

    Attributes:
        labels: The columns that say which row this is; with ``control`` they are unique.
        wide: Column of the control, such as ``random``, to the value column or columns that it is the control of.
        names: What control rows made from ``wide`` have in label columns, such as ``{"filters": "random"}``.
        row: ``(column, name)`` of the rows that are the control already.
        drop: Columns that are not compared, such as times.
        also: A last step, for what the rest cannot say.
    """

    labels: tuple[str, ...]
    wide: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    row: tuple[str, str] | None = None
    drop: tuple[str, ...] = ()
    also: Callable[[pd.DataFrame], pd.DataFrame] | None = None

    @property
    def judged(self) -> set[str]:
        """The value columns that control rows fill; none where the frame always had rows for its control."""
        targets = ((target,) if isinstance(target, str) else target for target in self.wide.values())
        return {name for each in targets for name in each}


def _plain_attack(frame: pd.DataFrame) -> pd.DataFrame:
    """``"random (LocalSearch)"`` is the control of ``"LocalSearch"``."""
    named = frame["attack"].str.startswith("random (")
    frame["control"] = frame["control"] | named
    frame["attack"] = frame["attack"].str.replace(r"^random \((.*)\)$", r"\1", regex=True)
    return frame


def _elsewhere(frame: pd.DataFrame) -> pd.DataFrame:
    """``low`` and ``high`` are those of the control; here they stand in the rows that it judges, as they once did."""
    control = frame["control"].to_numpy()
    # a stored frame has them there already
    if frame.loc[control, "low"].notna().any():
        frame.loc[~control, ["low", "high"]] = frame.loc[control, ["low", "high"]].to_numpy()
    return frame


def _three(name: str, value: str | None = None) -> dict[str, str]:
    value = value or name
    return {f"{name}_random": value, f"{name}_random_low": f"{value}_low", f"{name}_random_high": f"{value}_high"}


RULES: dict[str, Rule] = {
    # the control has rows of its own
    "accuracy_curve": Rule(("filters", "k", "class_name"), row=("filters", "random")),
    "channel_deletion": Rule(("filters", "kind", "share"), row=("filters", "random")),
    "class_ablation": Rule(("class_name", "mode", "channels"), row=("channels", "random")),
    "density": Rule(("filters", "class_name"), row=("filters", "random")),
    "gate_leakage": Rule(("features", "gate"), row=("gate", "random")),
    "localisation": Rule(("filters",), row=("filters", "random")),
    "masked_confusion": Rule(("masked", "class_name", "predicted")),
    "path_accuracy": Rule(("gates",), row=("gates", "random")),
    "pruning_curve": Rule(("criterion", "share"), row=("criterion", "random")),
    "attack_success": Rule(("model", "attack"), also=_plain_attack),
    # the control has columns of its own
    "ald_evidence": Rule(("class_name",), {"r2_normal": "r2_positive"}),
    "class_masking": Rule(("masked", "class_name"), {"random": "recall", **_INTERVAL}),
    "concept_scores": Rule(("layer", "filter"), {"random": "score"}),
    "concept_representation": Rule(
        ("layer", "concept"),
        {
            "single_max_random": "single_max",
            "single_mean_random": "single_mean",
            "multiple_mean_random": "multiple_mean",
            "elsewhere": "switched_off",
        },
    ),
    "correlated_share": Rule(("correlation", "threshold"), {"random": "share", **_INTERVAL}),
    "feature_clusters": Rule(
        ("cluster",),
        {"random": "cosine", "random_low": "cosine_low", "random_high": "cosine_high", "random_purity": "purity"},
    ),
    "gate_similarity": Rule(("outcome", "class_name", "gate_row"), {"random": "similarity", **_INTERVAL}),
    "inter_class_correlation": Rule(("kind", "m"), {"random": "c_ic", **_INTERVAL, "shared_random": "shared"}),
    "layer_scores": Rule(("layer",), {"random": "score", **_INTERVAL}),
    "mutual_information": Rule(("channel",), {"random": "mi", **_INTERVAL}),
    "occlusion_summary": Rule(("image", "layer"), {"elsewhere": "switched_off", "random_iou": "iou"}, also=_elsewhere),
    "overlap": Rule(
        ("filters", "class_a", "class_b"),
        {"random": "jaccard", **_INTERVAL},
        {"filters": "random", "class_a": "", "class_b": ""},
    ),
    "method_overlap": Rule(
        ("method_a", "method_b"), {"random": "jaccard", **_INTERVAL}, {"method_a": "random", "method_b": "random"}
    ),
    "path_information": Rule(("layer",), {"random": "cross_entropy"}),
    "stability": Rule(("filters", "class_name"), {"random": "jaccard"}, {"filters": "random", "class_name": "all"}),
    "compare": Rule(
        ("method", "k"),
        {
            **_three("keep"),
            **_three("drop_own"),
            **_three("drop_other"),
            "overlap_random": ("class_overlap", "agreement", "stability"),
        },
        {"method": "random"},
        drop=("passes",),
    ),
    # no control
    "explain_confusion": Rule(("sample", "channel")),
    "occlusion_table": Rule(("image", "layer", "filter")),
    "states": Rule(("layer",)),
    "to_frame": Rule(("class_name", "rank")),
}


def canonical(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The frame of a metric in its canonical form, rows sorted by their labels.

    Raises:
        ValueError: A column of a control that no rule translates, or labels that do not tell two rows apart.
    """
    rule = RULES[metric]
    # some frames have their labels in the index
    frame = frame.reset_index(drop=frame.index.names == [None])
    frame = frame.drop(columns=[name for name in rule.drop if name in frame.columns])
    if "control" not in frame.columns:
        frame["control"] = frame[rule.row[0]] == rule.row[1] if rule.row else False
    frame["control"] = frame["control"].astype(bool)
    if rule.also:
        frame = rule.also(frame)
    present = [name for name in rule.wide if name in frame.columns]
    if present:
        frame = _melted(frame, rule, present)
    if rule.judged:
        # also of rows that were stored before the rule had these names
        for name, text in rule.names.items():
            frame[name] = frame[name].astype(object).where(~frame["control"], text)
        # control rows are compared in what they judge; whatever else a schema puts there is no measurement
        others = [name for name in frame.columns if name not in {*rule.labels, *rule.judged, "control"}]
        for name in others:
            frame[name] = frame[name].astype(object).where(~frame["control"], np.nan)
    rows = frame["control"].to_numpy()
    frame = pd.concat([frame[~rows], frame[rows].drop_duplicates()], ignore_index=True)
    left = [str(name) for name in frame.columns if "random" in str(name)]
    if left:
        raise ValueError(f"{metric}: columns {left} belong to a control and no rule says to which; add them to RULES")
    key = [*rule.labels, "control"]
    if frame.duplicated(key).any():
        raise ValueError(f"{metric}: the columns {key} do not tell all rows apart; mend its rule")
    order = sorted(range(len(frame)), key=lambda row: tuple(_sortable(frame[name].iloc[row]) for name in key))
    return frame.iloc[order].reset_index(drop=True)


def _melted(frame: pd.DataFrame, rule: Rule, present: list[str]) -> pd.DataFrame:
    """Columns of the control as rows."""
    control = frame[list(rule.labels)].assign(control=True, **rule.names)
    for source in present:
        targets = rule.wide[source]
        for target in (targets,) if isinstance(targets, str) else targets:
            control[target] = frame[source]
    rows = frame.drop(columns=present)
    columns = [*rows.columns, *(name for name in control.columns if name not in rows.columns)]
    return pd.concat([rows.reindex(columns=columns), control.reindex(columns=columns)], ignore_index=True)


def _sortable(value: object) -> tuple[int, float, str]:
    # numbers as words too, for a column of both is stored as words
    try:
        return (0, float(value), "")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return (1, 0.0, str(value))


# Words that a change of the package replaced, as they stand in stored texts
WORDS = {'"never"': '"none"'}


def translated(text: str) -> str:
    """A stored text in the words of today."""
    for before, now in WORDS.items():
        text = text.replace(before, now)
    return text
