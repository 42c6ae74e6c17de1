"""Per-layer RoPE scaling as a PEFT adapter. Importing this package registers `LAYER_ROPE` with PEFT."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .adapter_context import use_adapter
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
    from .comparison import Comparison, compare
    from .contenders import Contender, parse_baseline
    from .evaluation import evaluate
    from .hub import pull, push_to_hub
    from .loading import load_adapter
    from .scores import PositionScores
    from .searcher import Guards, SearchResult, SearchSettings, plan_search, search
    from .searcher.ray_workers import RayWorkers
    from .tasks import (
        Example,
        KeyValueRetrieval,
        KeyValueWords,
        MultiDocumentQA,
        Perplexity,
        Split,
        Task,
        TokenTask,
        best_subspan_em,
    )
    from .verification import LayerCheck, Verification, verify

register(LayerRopeConfig, LayerRopeModel)

# Loaded at first use, so that serving an adapter needs neither DEAP nor SciPy nor matplotlib.
_LAZY = {
    "Comparison": ".comparison",
    "Contender": ".contenders",
    "Example": ".tasks",
    "Guards": ".searcher",
    "KeyValueRetrieval": ".tasks",
    "KeyValueWords": ".tasks",
    "LayerCheck": ".verification",
    "MultiDocumentQA": ".tasks",
    "Perplexity": ".tasks",
    "PositionScores": ".scores",
    "RayWorkers": ".searcher.ray_workers",
    "SearchResult": ".searcher",
    "SearchSettings": ".searcher",
    "Split": ".tasks",
    "Task": ".tasks",
    "TokenTask": ".tasks",
    "Verification": ".verification",
    "best_subspan_em": ".tasks",
    "compare": ".comparison",
    "evaluate": ".evaluation",
    "load_adapter": ".loading",
    "parse_baseline": ".contenders",
    "plan_search": ".searcher",
    "pull": ".hub",
    "push_to_hub": ".hub",
    "search": ".searcher",
    "verify": ".verification",
}

__all__ = [
    "AdapterMismatchError",
    "Comparison",
    "Contender",
    "Example",
    "Guards",
    "InvalidConfigError",
    "KeyValueRetrieval",
    "KeyValueWords",
    "LayerCheck",
    "LayerRopeConfig",
    "LayerRopeError",
    "LayerRopeModel",
    "MultiDocumentQA",
    "Perplexity",
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
    "best_subspan_em",
    "compare",
    "demo_model_path",
    "evaluate",
    "load_adapter",
    "parse_baseline",
    "plan_search",
    "pull",
    "push_to_hub",
    "restore_baked",
    "search",
    "use_adapter",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value
