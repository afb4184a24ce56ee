"""Presets: published methods as options of a build and of its queries. An option that is given replaces the preset's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PresetName = Literal["trackstar", "less", "trak"]


@dataclass(frozen=True)
class Preset:
    """A published method.

    Attributes:
        paper: that describes it.
        build, query: its options, as in `BuildConfig` and `ScoreOptions`.
    """

    paper: str
    build: Mapping[str, Any]
    query: Mapping[str, Any]

    def settings(self, options: Mapping[str, Any]) -> str:
        """Write options in one line."""
        return ", ".join(f"{name} {_written(value)}" for name, value in options.items())


_ROW = {"components": ("blocks",), "projection": "random"}
PRESETS: dict[PresetName, Preset] = {
    "trackstar": Preset(
        paper="TrackStar, arXiv 2410.17413",
        build={**_ROW, "rank": 16, "curvature": "fisher", "labels": "data", "optimizer": "second-moments", "damping": 0.1},
        query={"mode": "cosine", "mix": "auto"},
    ),
    "less": Preset(
        paper="LESS, arXiv 2402.04333",
        build={**_ROW, "rank": 64, "curvature": "identity", "optimizer": "adam-step", "unit_length": True},
        query={},
    ),
    "trak": Preset(
        paper="TRAK, arXiv 2303.14186",
        build={**_ROW, "rank": 32, "curvature": "fisher", "labels": "margin", "damping": 0.1},
        query={},
    ),
}


def mixes(options: Mapping[str, Any]) -> bool:
    """Return True if options mix the queries' second moments in."""
    preset = options.get("preset")
    return options.get("mix") is not None or (preset in PRESETS and "mix" in PRESETS[preset].query)


def _written(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
