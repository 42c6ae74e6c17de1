"""Tasks: where examples come from. One file each; `base` says what a task is."""

from .base import MEASURES, SPLIT_NAMES, Example, Measure, Split, SplitName, Task, check_disjoint, spread_positions
from .kv_words import KeyValueWords
from .token_task import TokenTask

__all__ = [
    "MEASURES",
    "SPLIT_NAMES",
    "Example",
    "KeyValueWords",
    "Measure",
    "Split",
    "SplitName",
    "Task",
    "TokenTask",
    "check_disjoint",
    "spread_positions",
]
