"""What runs in a Ray worker's process: one model, and the evaluator around it."""

from __future__ import annotations

import io
import os
import platform
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..base_model import ModelSource, load_base
from ..tuner.sites import find_stack
from .evaluator import ModelEvaluator
from .grid import Factors
from .measurement import HeatScores


@dataclass(frozen=True)
class Reply:
    """What a worker returns of one chunk."""

    values: dict[Factors, Any]
    batch_tokens: int
    layers_run: int
    layers_asked: int


class Actor:
    """Lives in a worker process. `__init__` does nothing, so that what goes wrong comes back as an ordinary error."""

    def __init__(self) -> None:
        self._evaluator: ModelEvaluator | None = None

    def start(self, spec: dict[str, Any], batch_tokens: int, check: bool) -> tuple[str, HeatScores | None]:
        """Loads the model; returns where this is, and with `check` the scores of the unscaled model on heat 0."""
        torch.set_num_threads(spec["threads"])
        if spec["source"] is None:
            model = torch.load(io.BytesIO(spec["model"]), map_location=spec["device"], weights_only=False)
        else:
            model = get_peft_model(_load(spec), spec["adapter"])
        self._model, self._make = model, spec["make"]
        self._evaluator = self._make(model, batch_tokens=batch_tokens)
        scores = self._evaluator.measure([unscaled(model)], 0)[0] if check else None
        return f"process {os.getpid()} on {platform.node()}", scores

    def run(self, method: str, vectors: list[Factors], heat: int, batch_tokens: int) -> Reply:
        """Scores vectors with batches of at most `batch_tokens`; fewer, and the reply says so, if memory runs out."""
        if self._evaluator.batch_tokens != batch_tokens:
            self._evaluator = self._make(self._model, batch_tokens=batch_tokens)
        evaluator = self._evaluator
        before = evaluator.layers_run, evaluator.layers_asked
        if method == "measure":
            values = dict(zip(vectors, evaluator.measure(vectors, heat), strict=True))
        else:
            values = evaluator.score(vectors, heat)
        run, asked = evaluator.layers_run - before[0], evaluator.layers_asked - before[1]
        return Reply(values, evaluator.batch_tokens, run, asked)


def _load(spec: dict[str, Any]) -> nn.Module:
    source = spec["source"]
    if isinstance(source, str):
        source = ModelSource(source, dtype=spec["dtype"])
    if isinstance(source, ModelSource):
        return load_base(source if source.device_map is not None else replace(source, device=spec["device"]))
    return spec["source"]().to(spec["device"])


def unscaled(model: nn.Module) -> Factors:
    """The vector that changes nothing."""
    return (1.0,) * len(find_stack(model.get_base_model()).layers)
