"""What a history holds, checked, as arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

FORMAT, VERSION = "kd_balance.history", 1
_META = {"step", "meta_loss", "hypergradient_norm", "skipped"}
_MAKE = "give it a JSON file that WeightHistory.save('history.json') wrote."


@dataclass(frozen=True)
class Record:
    """The history of a run of R rows, C classes, K terms and M hypergradients."""

    step: np.ndarray  # [R] training calls of the criterion up to the end of the row
    count: np.ndarray  # [R, C] samples
    weights: dict[str, np.ndarray]  # [R, C] mean weights by the name of the term, or nan
    meta: dict[str, np.ndarray]  # [M] each
    class_counts: np.ndarray | None  # [C]
    settings: dict[str, str]
    versions: dict[str, str]
    warnings: list[str]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Record:
        """Takes what :meth:`WeightHistory.as_dict` returned.

        Raises:
            ValueError: it is no such thing, or its parts do not fit.
            RuntimeError: it is one of no call.
        """
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            raise ValueError(
                f"The record is a {type(record).__name__} without the format {FORMAT!r}, expected "
                f"a history: {_MAKE}"
            )
        if record.get("version") != VERSION:
            raise ValueError(
                f"The history has version {record.get('version')!r}, expected {VERSION}: read it "
                "by the version of kd-balance that wrote it."
            )
        try:
            made = cls._made(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"The history is damaged ({type(error).__name__}: {error}), expected it as it was "
                f"saved: {_MAKE}"
            ) from error
        if not len(made.step):
            raise RuntimeError(
                "Nothing was recorded, expected a training call of the criterion or more: make the "
                "WeightHistory before training and the report after it."
            )
        made._check_shapes()
        return made

    @classmethod
    def _made(cls, record: Mapping[str, Any]) -> Record:
        weights = {k: np.array(v, dtype=float) for k, v in record["weights"].items()}
        counts = record["class_counts"]
        return cls(
            step=weights.pop("step").astype(int),
            count=weights.pop("count").astype(int),
            weights=weights,
            meta={k: np.array(v, dtype=float) for k, v in record["meta"].items()},
            class_counts=None if counts is None else np.array(counts, dtype=float),
            settings={str(k): str(v) for k, v in record["settings"].items()},
            versions={str(k): str(v) for k, v in record["versions"].items()},
            warnings=[str(w) for w in record["warnings"]],
        )

    def _check_shapes(self) -> None:
        shape = self.count.shape
        if len(shape) != 2 or self.step.shape != shape[:1]:
            raise ValueError(
                f"The history has counts of shape {shape} and {len(self.step)} rows, expected "
                f"[rows, classes]: {_MAKE}"
            )
        for name, values in self.weights.items():
            if values.shape != shape:
                raise ValueError(
                    f"The history has {name} weights of shape {values.shape}, expected {shape}: "
                    f"{_MAKE}"
                )
        lengths = {name: len(values) for name, values in self.meta.items()}
        if len(set(lengths.values())) > 1 or not _META <= set(lengths):
            raise ValueError(
                f"The history has {lengths} numbers of its meta updates, expected as many of each "
                f"of {sorted(_META)}: {_MAKE}"
            )
        if self.class_counts is not None and self.class_counts.shape != shape[1:]:
            raise ValueError(
                f"class_counts has shape {self.class_counts.shape}, expected {shape[1:]}: give one "
                "number for each class."
            )

    @property
    def frequency(self) -> np.ndarray:
        """[C], samples of each class, or else how often it was seen."""
        return self.count.sum(0) if self.class_counts is None else self.class_counts


def read(path: str | PathLike[str]) -> dict[str, Any]:
    """Reads a history that :meth:`WeightHistory.save` wrote as JSON.

    Raises:
        ValueError: the file is none.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path} is no JSON file, expected a history: {_MAKE}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is JSON but no history, expected one: {_MAKE}")
    return record
