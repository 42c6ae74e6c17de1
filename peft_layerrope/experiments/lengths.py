"""One task at several lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import TaskError
from ..tasks import Task
from ..tasks.specification import TaskSpecification

MakeTask = Callable[[TaskSpecification], Task]

_LEAST_FILL = 0.7  # prompts that are much shorter than asked for are not what the length says


def task_of_length(make: MakeTask, specification: TaskSpecification, length: int) -> Task:
    """Returns the task with prompts of up to `length` tokens: with as many items as fit.

    Raises:
        TaskError: the task cannot be made that long, or that short.
    """
    task = make(replace(specification, length=length, num_keys=None, num_documents=None))
    try:
        probe = task.split("search", 1)
    except TaskError:  # the contexts of its file are too long
        if not hasattr(task, "shortened"):
            raise
        task = task.shortened(length)
        probe = task.split("search", 1)
    if probe.max_tokens < _LEAST_FILL * length:
        raise TaskError(f"task {task.name} cannot fill {length} tokens: its prompts have {probe.max_tokens}.")
    return task


def default_lengths(
    make: MakeTask, specification: TaskSpecification, window: int, times: tuple[float, ...] = (1, 2, 4)
) -> tuple[dict[int, Task], dict[int, str]]:
    """Returns the task at multiples of the trained window, and why it is not there at others."""
    tasks, refused = {}, {}
    for length in dict.fromkeys(int(factor * window) for factor in times):
        try:
            tasks[length] = task_of_length(make, specification, length)
        except TaskError as error:
            refused[length] = str(error)
    return tasks, refused


def window_and_task(make: MakeTask, specification: TaskSpecification, window: int | None) -> list[Task]:
    """Returns the task at the trained window, where it can be made that long, and at its own length."""
    task = make(specification)
    if window is None or specification.length == window:
        return [task]
    try:
        return [task_of_length(make, specification, window), task]
    except TaskError:
        return [task]
