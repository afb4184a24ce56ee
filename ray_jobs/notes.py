"""Facts that a reader of answers should know: the share of a model that rows measure, rows that are zeros, silent components."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..indexer import models
from ..store.arrays import ArrayFile
from ..store.documents import Documents
from ..store.kinds import open_rows
from ..store.manifest import Component, Tracked
from ..store.shard import Shard, documents_path, rows_path
from .progress import Reporter

_LITTLE = 0.5  # a share of the parameters below which a note names the rest
_NAMED = 20


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a loaded model.

    Attributes:
        parameters: for each, the modules that own it, its name there, and its size.
        trained: the modules that training changed; None where this is not known, and all of the model counts as trained.
        notes: sentences for readers of answers.
        cost: a sentence on what the model's placement costs a build, if it does.
    """

    parameters: tuple[tuple[tuple[str, ...], str, int], ...]
    trained: frozenset[str] | None
    notes: tuple[str, ...]
    cost: str | None

    @classmethod
    def of(cls, model: nn.Module) -> "ModelFacts":
        """Collect the facts of a model."""
        owners: dict[int, list[str]] = {}
        parameters: dict[int, tuple[str, int]] = {}
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(module_name)
                parameters[id(parameter)] = name, parameter.numel()
        loaded = models.loaded(model)
        sizes = tuple((tuple(owners[key]), *parameters[key]) for key in parameters)
        return cls(sizes, loaded.trained, loaded.notes, models.cost_of_placement(model))


def model_notes(facts: Sequence[ModelFacts], components: Sequence[Component]) -> tuple[str, ...]:
    """Sentences about the models: their own, and one for each of which the rows measure little."""
    notes: list[str] = []
    for number, model in enumerate(facts):
        notes += model.notes
        share = tracked(model, components, number)
        if share.share < _LITTLE:
            names = ", ".join(share.left_out[:4]) + (" ..." if len(share.left_out) > 4 else "")
            parameters = "the parameters that training changed" if model.trained is not None else "the model's parameters"
            notes.append(f"the rows measure {share.share:.1%} of {parameters}; they do not measure {names}")
    return tuple(notes)


def costs(facts: Sequence[ModelFacts]) -> list[str]:
    """Sentences on what the models' placements cost a build."""
    return [model.cost for model in facts if model.cost is not None]


def tracked(model: ModelFacts, components: Sequence[Component], number: int) -> Tracked:
    """Count a model's parameters whose gradients are in the rows, of those that training changed."""
    layers = {name for component in components if component.model == number for name in component.layer_names}
    counted = 0
    total = 0
    left_out = Counter[str]()
    for owners, name, size in model.parameters:
        if model.trained is not None and not model.trained & set(owners):
            continue
        total += size
        if name == "weight" and layers & set(owners):
            counted += size
        else:
            left_out[re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{owners[0]}.{name}".removesuffix(".weight"))] += size
    return Tracked(parameters=counted, of=total, left_out=tuple(name for name, _ in left_out.most_common(_NAMED)))


def not_finite(out: Path, shards: Sequence[Shard]) -> dict[str, Any]:
    """Count the rows that are stored as zeros, since the model's loss or gradient of them is not finite; with the first of their ids."""
    count = 0
    ids: list[str] = []
    for shard in shards:
        losses = ArrayFile(rows_path(out, shard.id)).array("losses", (shard.rows,), "float32")
        rows = np.flatnonzero(~np.isfinite(losses))
        count += len(rows)
        if len(rows) and len(ids) < _NAMED:
            documents = Documents(documents_path(out, shard.id), shard.rows)
            ids += [documents[int(row)].id for row in rows[: _NAMED - len(ids)]]
    return {"not_finite": count, "not_finite_first": tuple(ids)}


def report_not_finite(count: int, ids: Sequence[str], reporter: Reporter) -> None:
    """Report rows that are stored as zeros."""
    if count:
        names = ", ".join(map(repr, ids[:3])) + (" ..." if count > min(3, len(ids)) else "")
        reporter.note(f"{count:,} rows are stored as zeros, since the model's loss or gradient of them is not finite: {names}")


def silent_components(out: Path, shard: Shard, components: Sequence[Component]) -> tuple[str, ...]:
    """Sentences about components whose gradients (in one shard) are all zero."""
    file = ArrayFile(rows_path(out, shard.id))
    silent = [component.name for component in components if not open_rows(file, component, shard.rows).norms.any()]
    reason = "are zero (or too small for float32) for every example: they add nothing to scores"
    return tuple(f"the gradients of {name} {reason}" for name in silent)
