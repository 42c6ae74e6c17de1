"""Per-layer RoPE scaling as a PEFT adapter. Importing this package registers `LAYER_ROPE` with PEFT."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__version__ = "0.1.0"

from . import errors as errors  # which the others need

# Loaded at first use, so that serving an adapter needs neither DEAP nor SciPy nor matplotlib. For type checkers the
# same names stand in `__init__.pyi`.
_LAZY = {
    ".base_model": ("load_model",),
    ".comparison": ("Comparison", "compare"),
    ".comparison.candidates": ("Candidate", "parse_baseline"),
    ".errors": (
        *("AdapterMismatchError", "InvalidConfigError", "LayerRopeError", "SearchError", "TaskError"),
        "UnsupportedModelError",
    ),
    ".files": ("demo_model_path",),
    ".hub": ("pull", "push_to_hub"),
    ".loading": ("load_adapter",),
    ".scoring.scorer": ("evaluate",),
    ".scoring.scores": ("PositionScores",),
    ".searcher.ray_workers": ("RayWorkers",),
    ".searcher.result": ("SearchResult",),
    ".searcher.run": ("plan_search", "search"),
    ".searcher.settings": ("SearchSettings",),
    ".tasks.base": ("Example", "Split", "Task", "TokenTask"),
    ".tasks.kv": ("KeyValueRetrieval", "KeyValueWords"),
    ".tasks.metrics": ("best_subspan_em",),
    ".tasks.multi_doc_qa": ("MultiDocumentQA",),
    ".tasks.perplexity": ("Perplexity",),
    ".tuner": ("LayerRopeConfig", "LayerRopeModel"),
    ".tuner.injection": ("restore_baked",),
    ".tuner.rotary": ("use_adapter",),
    ".verification": ("LayerCheck", "Verification", "verify"),
}

__all__ = sorted(["__version__", *chain(*_LAZY.values())])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _LAZY.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(module, __name__), name)
    return value


class _AfterPeft(MetaPathFinder):
    """Registers `LAYER_ROPE` once PEFT is imported. So this package itself imports neither PEFT nor torch, for which
    `layerrope --help` would wait for seconds.
    """

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                import_module(".tuner", __name__)

            spec.loader.exec_module = execute_and_register
        return spec


if "peft" in sys.modules:
    import_module(".tuner", __name__)
else:
    sys.meta_path.insert(0, _AfterPeft())
