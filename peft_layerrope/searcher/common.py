"""What a search begins and ends with: the look at the unscaled model, what it depends on, the adapter's config."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from .. import __version__
from ..base_model import describe_loading, library_versions, model_fingerprint
from ..files import to_json, write_atomically, writing
from ..messages import DEMO_NAME, public_name
from ..scoring.preflight import PREFLIGHT_NAME, Preflight, preflight
from ..scoring.scorer import Scorer
from ..tasks import PromptTask, Split, SplitName, Task
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import embedding_table, trained_window
from .plan import PREFLIGHT, SearchProgress
from .settings import SearchSettings
from .space import Factors


def look(
    scorer: Scorer,
    task: PromptTask,
    settings: SearchSettings,
    wanted: Mapping[SplitName, int],
    folder: Path | None,
    audience: SearchProgress,
) -> Preflight:
    """Returns what the unscaled model writes; of a search that goes on in `folder`, what it wrote then."""
    path = folder / PREFLIGHT_NAME if folder is not None else None
    if path is not None and path.exists():
        return Preflight.load(path)
    audience.stage(PREFLIGHT, len(wanted))

    def tell(text: str) -> None:
        audience.advance()
        audience.note(text.removeprefix("preflight: "))

    return preflight(scorer, task, num_groups=settings.preflight_groups, wanted=wanted, tell=tell)


def keep_look(folder: Path | None, found: Preflight | None) -> None:
    """Writes what the unscaled model wrote into the folder of a search, in place of what another one found there."""
    if folder is None:
        return
    path = folder / PREFLIGHT_NAME
    if found is not None:
        write_atomically(path, to_json(found.to_plain()) + "\n")
    else:
        with writing(path):
            path.unlink(missing_ok=True)


def identity_of(model: nn.Module, task: Task, settings: Mapping[str, Any], splits: Sequence[Split]) -> dict[str, Any]:
    """Returns what a search depends on, as JSON values."""
    return {
        "settings": dict(settings),
        "task": task.describe(),
        "splits": [split.describe() for split in splits],
        "model": model_fingerprint(model),
        "base": describe_loading(model),
        "versions": library_versions(),
        "device": embedding_table(model).device.type,
    }


def model_name(model: nn.Module) -> str:
    """Returns the model's Hub id, or a name without the path for one loaded from a folder."""
    return public_name(model.config._name_or_path or type(model).__name__)


def adapter_config(
    model: PeftModel, settings: SearchSettings, factors: Factors, name: str, **provenance: Any
) -> LayerRopeConfig:
    """Returns the config of an adapter with these factors, for the base model called `name`."""
    config = settings.adapter_config(list(factors), searcher_version=__version__, **provenance)
    if config.rope_type == "dynamic" and config.original_max_position_embeddings is None:
        config.original_max_position_embeddings = trained_window(model)
    config.base_model_name_or_path = DEMO_NAME if name == DEMO_NAME else model.config._name_or_path
    return config


def since(started: float) -> float:
    """Seconds since a reading of `time.perf_counter()`, which no step of the clock makes negative."""
    return max(0.0, time.perf_counter() - started)
