"""Task files for lm-evaluation-harness: accuracy by position of the answer, on prompts that we wrote to a file."""

from __future__ import annotations

from pathlib import Path


def lm_eval_tasks_path() -> str:
    """Returns the folder of the task files, for lm_eval's `--include_path` or `TaskManager(include_path=...)`."""
    return str(Path(__file__).parent)
