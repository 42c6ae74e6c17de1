"""Tasks: where examples come from. One file each; `base` says what a task is."""

from .base import SPLIT_NAMES, Example, Split, SplitName, Task, check_disjoint, spread_positions
from .kv_retrieval import KeyValueRetrieval
from .token_task import TokenTask

__all__ = [
    "SPLIT_NAMES",
    "Example",
    "KeyValueRetrieval",
    "Split",
    "SplitName",
    "Task",
    "TokenTask",
    "check_disjoint",
    "spread_positions",
]
