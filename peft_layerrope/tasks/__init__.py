"""Tasks: where examples come from. One file each; `base` says what a task is."""

from .base import SPLIT_NAMES, Example, Split, SplitName, Task, check_disjoint, spread_positions
from .kv_words import KeyValueWords
from .token_task import TokenTask

__all__ = [
    "SPLIT_NAMES",
    "Example",
    "KeyValueWords",
    "Split",
    "SplitName",
    "Task",
    "TokenTask",
    "check_disjoint",
    "spread_positions",
]
