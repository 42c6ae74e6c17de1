"""What the task files name: a task that reads `layerrope prompts`' JSON lines and reports accuracy by gold position.

Imports lm_eval, which is an extra; lm_eval itself loads this file when one of the tasks is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from datasets import Dataset
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import resolve_max_length
from pydantic import Field
from transformers import AutoConfig

from ..base_model import ModelSource, load_tokenizer
from ..errors import TaskError
from ..tasks import metrics
from ..tasks.prompts import Record, Text, read_records

SPLIT = "test"
_LENGTHS = ("max_length", "max_model_len", "context_length")  # as lm_eval's backends call it
_NO_BACKEND = ("None", "none")  # lm_eval's words for a server that gets text


class PromptLine(Record):
    """A line that `layerrope prompts` wrote: prompt, accepted answers, position of the gold item."""

    prompt: Text
    answers: Annotated[list[Text], Field(min_length=1)]
    position: Annotated[int, Field(ge=0)]


def check_length(prompts: Sequence[str], model_args: dict[str, Any], max_gen_toks: int) -> None:
    """Raises TaskError of a prompt that would be cut: lm_eval cuts the beginning off, where some of the answers stand.

    A server has to get text: as tokens, lm_eval sends it prompts that are cut to 2,048 and lack the token that text
    begins with. Nothing else is checked if `model_args` name no model, or one that comes with code.
    """
    sends_tokens = model_args.get("tokenized_requests", True) and model_args.get("tokenizer_backend") not in _NO_BACKEND
    if "base_url" in model_args and sends_tokens:
        raise TaskError(
            "lm_eval would send the server tokens, without the one that text begins with and cut to max_length: add "
            "tokenized_requests=False to --model_args."
        )
    name = model_args.get("pretrained")
    if not isinstance(name, str) or model_args.get("trust_remote_code"):
        return
    revision, own = model_args.get("revision"), model_args.get("tokenizer")
    tokenizer = load_tokenizer(ModelSource(own or name, revision=None if own else revision))
    config = AutoConfig.from_pretrained(name, revision=revision)
    given = (model_args.get(setting) for setting in _LENGTHS)
    limit = next(filter(None, given), None) or resolve_max_length(config, tokenizer)
    longest = max(map(len, tokenizer(list(prompts))["input_ids"]))
    if longest + max_gen_toks > limit:
        raise TaskError(
            f"the longest prompt has {longest} tokens, and with {max_gen_toks} to generate lm_eval would cut it to "
            f"max_length={limit}. If the model is meant to go beyond its window, add max_length="
            f"{longest + max_gen_toks} to --model_args; else make shorter prompts."
        )


class PositionCurve(ConfigurableTask):
    """A task of prompts from a file: `acc`, and `acc_position_<position>` for every position in the file.

    The file is the metadata's entry of the task's name, or `data`: `--metadata data=prompts.jsonl`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        # lm_eval leaves the key by which it found this class among the settings, and then knows no such setting
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Reads the data file: nothing is downloaded."""
        task, metadata = self.config.task, self.config.metadata or {}
        path = metadata.get(task, metadata.get("data"))
        if path is None:
            raise TaskError(
                f"{task} needs a file of prompts: write one with `layerrope prompts ... > prompts.jsonl` and pass "
                "--metadata data=prompts.jsonl."
            )
        rows = [line.model_dump() for line in read_records(str(path), PromptLine)]
        check_length([row["prompt"] for row in rows], metadata, self.config.generation_kwargs["max_gen_toks"])
        width = len(str(max(row["position"] for row in rows)))  # tables are sorted by name
        for row in rows:
            row["metric"] = f"acc_position_{row['position']:0{width}}"
        self.dataset = {SPLIT: Dataset.from_list(rows)}

    def aggregation(self) -> dict[str, Callable]:
        return {**super().aggregation(), **dict.fromkeys(self._position_metrics(), mean)}

    def higher_is_better(self) -> dict[str, bool]:
        return {**super().higher_is_better(), **dict.fromkeys(self._position_metrics(), True)}

    def _position_metrics(self) -> list[str]:
        return sorted(self.dataset[SPLIT].unique("metric"))


def contains_value(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm_eval's `process_results` with [`metrics.contains_value`]."""
    return _at_its_position(doc, metrics.contains_value(results[0], doc["answers"]))


def best_subspan_em(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm_eval's `process_results` with [`metrics.best_subspan_em`]."""
    return _at_its_position(doc, metrics.best_subspan_em(results[0], doc["answers"]))


def _at_its_position(doc: dict[str, Any], right: bool) -> dict[str, float]:
    """A prompt counts at its own position and nowhere else: other positions' means do not see it."""
    return {"acc": float(right), doc["metric"]: float(right)}
