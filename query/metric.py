"""Metric: how rows are compared with queries."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..store.errors import UsageError
from ..store.presets import PRESETS, PresetName
from ..store.shapes import Bool
from .mixing import read_mix
from .options import Mode, Options, ScoreOptions, check_options, option_fields
from .source import read_training

_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Metric:
    """A comparison of rows with queries; `ScoreOptions` describes its fields.

    Attributes:
        weights: by component ("head-2") or part ("head": that of every model).
        layers: globs over layer names, those of head and embeddings too, or over their ends.
    """

    mode: Mode = "influence"
    damping: float | None = None
    curvature: bool = True
    training: str | None = None
    mix: str | None = None
    preset: PresetName | None = None
    refine: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_options({"mode": self.mode, "damping": self.damping, "curvature": self.curvature, "refine": self.refine})
        if self.damping is not None and not self.curvature:
            raise UsageError("a damping means nothing without curvature; give one or the other")
        if self.training is not None:
            if self.damping is not None or not self.curvature:
                raise UsageError("a filter by the training's length takes the place of damping and needs the curvature; give one of them")
            read_training(self.training)
        if self.mix is not None:
            if self.changes_curvature or self.refine:
                raise UsageError("a mixed curvature takes the place of damping, training and refinement; give one of them")
            read_mix(self.mix)
        if self.refine and (self.mode == "cosine" or not self.curvature):
            raise UsageError("a refined query has no length, and needs the curvature; ask for influence, or leave `refine` out")
        for name, weight in self.weights.items():
            if not (weight == 0 or 1 / _LARGEST_WEIGHT <= weight <= _LARGEST_WEIGHT):
                raise UsageError(f"the weight of {name} is {weight}; it must be 0, or between 1e-6 and 1e6")

    @classmethod
    def of(cls, options: Options | ScoreOptions) -> "Metric":
        """Take the metric from options; None stands for a default.

        Raises:
            UsageError: an option is unknown or out of range.
        """
        check_options(options)
        given: dict[str, Any] = {name: options.get(name) for name in option_fields(ScoreOptions)}
        given["layers"] = tuple(given["layers"] or ())
        preset = {} if given["preset"] is None else PRESETS[given["preset"]].query
        return cls(**{**preset, **{name: value for name, value in given.items() if value is not None}})

    @classmethod
    def of_answer(cls, options: Options | ScoreOptions, mode: Mode) -> "Metric":
        """Take the metric of an answer or an explanation from options, in the index's mode where they name none.

        By FAISS, under a preset, and where rows or the curvature are changed for the query, the default stays influence.
        """
        names = ("mode", "preset", "training", "mix")
        is_plain = all(options.get(name) is None for name in names) and not options.get("refine") and options.get("engine") != "faiss"
        return cls.of({**options, "mode": mode}) if is_plain else cls.of(options)

    @property
    def changes_curvature(self) -> bool:
        """True if scores use another curvature or damping than the build's."""
        return self.damping is not None or not self.curvature or self.training is not None

    @property
    def row_settings(self) -> tuple[Any, ...]:
        """Settings on which rows of queries depend."""
        left_out = frozenset(name for name, weight in self.weights.items() if weight == 0)
        return (self.refine, self.training, self.damping, self.layers, left_out) if self.refine else (self.training,)

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and the mode, JSON-ready; without the damping, whose default is the build's."""
        settings: dict[str, Any] = {"mode": self.mode}
        settings |= {} if self.curvature else {"curvature": False}
        settings |= {"training": self.training} if self.training is not None else {}
        settings |= {"mix": self.mix} if self.mix is not None else {}
        settings |= {"preset": self.preset} if self.preset is not None else {}
        settings |= {"refine": self.refine} if self.refine else {}
        settings |= {"weights": dict(self.weights)} if self.weights else {}
        settings |= {"layers": list(self.layers)} if self.layers else {}
        return settings


def changes_rows(options: ScoreOptions) -> bool:
    """Return True if options may make other rows of queries than the plain ones (see `Metric.row_settings`)."""
    return bool(options.get("refine")) or options.get("training") is not None


def matched(names: Sequence[str], patterns: Sequence[str]) -> Bool[np.ndarray, " layers"]:
    """Return which layers match a pattern, in full or by their end (as `layers` of a build does); all without patterns."""
    if not patterns:
        return np.ones(len(names), bool)
    return np.array([any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(n, f"*.{p}") for p in patterns) for n in names])
