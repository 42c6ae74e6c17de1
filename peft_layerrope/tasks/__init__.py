"""Tasks: where examples come from. One file each; `base` says what a task is."""

from .base import (
    MEASURES,
    SPLIT_NAMES,
    Example,
    Measure,
    Split,
    SplitName,
    Task,
    TokenTask,
    check_disjoint,
    spread_positions,
)
from .kv import KeyValueMix, KeyValueRetrieval, KeyValueWords
from .metrics import METRICS, best_subspan_em, contains_value
from .multi_doc_qa import MultiDocumentQA
from .perplexity import Perplexity
from .prompts import Prompt, PromptTask
from .specification import TaskSpecification, make_task

__all__ = [
    "MEASURES",
    "METRICS",
    "SPLIT_NAMES",
    "Example",
    "KeyValueMix",
    "KeyValueRetrieval",
    "KeyValueWords",
    "Measure",
    "MultiDocumentQA",
    "Perplexity",
    "Prompt",
    "PromptTask",
    "Split",
    "SplitName",
    "Task",
    "TaskSpecification",
    "TokenTask",
    "best_subspan_em",
    "check_disjoint",
    "contains_value",
    "make_task",
    "spread_positions",
]
