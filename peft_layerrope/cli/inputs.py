"""What a command works on: a model, or the demo model, with its tokenizer and its task."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import ModelSource, describe_loading, load_base, load_config
from ..demo import demo_model_path
from ..errors import TaskError
from ..public_names import public_name
from ..scoring.preflight import find_difficulty
from ..scoring.scorer import Scorer
from ..tasks import PromptTask, Task
from ..tasks.specification import DEFAULT_TASK, TaskSpecification, make_task, with_chat
from .app import err

DEMO_LENGTH_FACTOR = 2  # the demo is searched beyond its window, which is what it repairs


def display_name(model: str | None) -> str:
    """What tables call a model."""
    return "demo model" if model is None else model


def load(source: ModelSource) -> PreTrainedModel:
    """Loads a model, and says so where its fine-tune names another base."""
    model = load_base(source)
    trained_on = describe_loading(model).get("peft", {}).get("trained_on")
    name = public_name(source.model or demo_model_path())
    if trained_on not in (None, name):
        err.print(
            f"note: peft={source.peft} was trained on {trained_on}, and is put onto {name}.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return model


def resolve_task(
    task: TaskSpecification, window: int | None, is_demo: bool, tokenizer: PreTrainedTokenizerBase
) -> TaskSpecification:
    """Returns the specification with nothing left open; says so if its length is beyond the window.

    Args:
        task: what was asked for.
        window: the model's trained window; None if its config does not say.
        is_demo: whether the model is the demo model.
        tokenizer: the model's.

    Raises:
        TaskError: neither length nor window is known, a setting that the resolved task does not have, or a chat
            template that does not work.
    """
    task = with_defaults(task, window, is_demo, tokenizer)
    if window is not None and task.length > window:
        err.print(f"prompts of {task.length} tokens are {task.length / window:g}× the model's window of {window}.")
    return task


def with_defaults(
    task: TaskSpecification, window: int | None, is_demo: bool, tokenizer: PreTrainedTokenizerBase
) -> TaskSpecification:
    """Does [`resolve_task`]'s work without a word."""
    if window is None and task.length is None:
        raise TaskError("the model's config names no trained window (max_position_embeddings): pass --length.")
    length = task.length if task.length is not None else window * (DEMO_LENGTH_FACTOR if is_demo else 1)
    task = replace(task, name=task.name or ("kv_words" if is_demo else DEFAULT_TASK), length=length)
    return with_chat(task, tokenizer)


def window_of(source: ModelSource) -> int | None:
    """Returns a model's trained window from its config alone; None if that does not say.

    Raises:
        LayerRopeError: the config cannot be loaded.
    """
    config = load_config(source)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def with_difficulty(
    task: TaskSpecification, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, batch_tokens: int
) -> TaskSpecification:
    """Returns the specification with the number of items that `difficulty` finds for the unscaled model; says which.

    Raises:
        PreflightError: there is no such number; the message shows what was tried.
    """
    if task.difficulty is None:
        return task
    easy = build_task(replace(task, difficulty=None), tokenizer)
    if not isinstance(easy, PromptTask):
        raise TaskError(f"difficulty={task.difficulty!r} is no setting of {easy.name}.")

    def tell(count: int, accuracy: float) -> None:
        err.print(f"difficulty: {count} {easy.item}s, {100 * accuracy:.1f} % right answers", highlight=False)

    found, _ = find_difficulty(Scorer(model, batch_tokens=batch_tokens), easy, tell=tell)
    err.print(f"difficulty: {found.size_setting}={found.num_items} is chosen.", highlight=False)
    return replace(task, difficulty=None, **{found.size_setting: found.num_items})


def build_task(task: TaskSpecification, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Makes the task; its name and length must be resolved."""
    return make_task(task, tokenizer, task.length)
