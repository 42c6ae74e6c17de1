"""Per-layer RoPE scaling as a PEFT adapter. Importing this package registers `LAYER_ROPE` with PEFT."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .baking import restore_baked
from .config import LayerRopeConfig
from .demo import demo_model_path
from .errors import (
    AdapterMismatchError,
    InvalidConfigError,
    LayerRopeError,
    SearchError,
    TaskError,
    UnsupportedModelError,
)
from .model import LayerRopeModel
from .registration import register

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .scores import PositionScores
    from .searcher import Guards, SearchResult, SearchSettings, plan_search, search
    from .searcher.ray_workers import RayWorkers
    from .tasks import Example, KeyValueWords, Split, Task, TokenTask
    from .verification import LayerCheck, Verification, verify

register(LayerRopeConfig, LayerRopeModel)

# Loaded at first use, so that serving an adapter needs neither DEAP nor SciPy nor matplotlib.
_LAZY = {
    "Example": ".tasks",
    "Guards": ".searcher",
    "KeyValueWords": ".tasks",
    "LayerCheck": ".verification",
    "PositionScores": ".scores",
    "RayWorkers": ".searcher.ray_workers",
    "SearchResult": ".searcher",
    "SearchSettings": ".searcher",
    "Split": ".tasks",
    "Task": ".tasks",
    "TokenTask": ".tasks",
    "Verification": ".verification",
    "evaluate": ".evaluation",
    "plan_search": ".searcher",
    "search": ".searcher",
    "verify": ".verification",
}

__all__ = [
    "AdapterMismatchError",
    "Example",
    "Guards",
    "InvalidConfigError",
    "KeyValueWords",
    "LayerCheck",
    "LayerRopeConfig",
    "LayerRopeError",
    "LayerRopeModel",
    "PositionScores",
    "RayWorkers",
    "SearchError",
    "SearchResult",
    "SearchSettings",
    "Split",
    "Task",
    "TaskError",
    "TokenTask",
    "UnsupportedModelError",
    "Verification",
    "__version__",
    "demo_model_path",
    "evaluate",
    "plan_search",
    "restore_baked",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value
