"""Chat templates: their arguments, the date that they write, and where the answer begins."""

from __future__ import annotations

import datetime
import math

import pytest
import torch
from conftest import build_model
from tiny_tokenizer import tiny_bpe
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from peft_layerrope import KeyValueRetrieval, TaskError
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tasks.prompts import PromptEncoder
from peft_layerrope.tasks.specification import TaskSpecification, with_chat

QWEN3 = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""
"""As Qwen3's own: the model opens `<think>` itself unless the block stands there, closed, already."""
DATED = """{%- if strftime_now is defined %}{%- set today = strftime_now("%d %b %Y") %}{%- endif %}
{{- 'Today: ' + today + ' ' + strftime_now('%Y-%m-%d') }}
{%- for message in messages %}{{ '<|user|>' + message.content }}{%- endfor %}<|assistant|>"""
NO_SYSTEM = "{%- for message in messages if message.role != 'system' %}{{ message.content }}{%- endfor %}"


def with_template(template: str | dict | None) -> PreTrainedTokenizerBase:
    tokenizer = tiny_bpe.__wrapped__()  # one of its own: the shared ones have none
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def other_day(monkeypatch):
    """Makes transformers' clock, which templates read, and Python's show the day after."""

    def set_day(day: str) -> None:
        shown = datetime.datetime.fromisoformat(day)
        kinds = {"now": classmethod(lambda cls, tz=None: shown), "today": classmethod(lambda cls: shown.date())}
        monkeypatch.setattr(chat_template_utils, "datetime", type("Clock", (), kinds))
        monkeypatch.setattr("peft_layerrope.tasks.prompts.date", _Days(shown.date()))

    return set_day


class _Days:
    def __init__(self, today: datetime.date) -> None:
        self._today = today

    def today(self) -> datetime.date:
        return self._today

    def fromisoformat(self, text: str) -> datetime.date:
        return datetime.date.fromisoformat(text)


def test_the_template_is_in_use_where_there_is_one():
    for chat, expected in ((tiny_bpe(chat=True), True), (tiny_bpe(), False)):
        task = KeyValueRetrieval(chat, num_keys=5, num_positions=3)
        assert task.describe()["chat_template"] is expected
        sent = task.as_sent(task.prompts("test", 1)[0])
        assert sent.startswith("<|bos|><|user|>Extract") is expected
        resolved = with_chat(TaskSpecification("kv_retrieval", 300), chat)
        assert (resolved.chat_template, resolved.chat_date) == (expected, None)
    off = KeyValueRetrieval(tiny_bpe(chat=True), num_keys=5, num_positions=3, chat_template=False)
    assert (
        off.split("test", 2).examples
        == KeyValueRetrieval(tiny_bpe(), num_keys=5, num_positions=3).split("test", 2).examples
    )


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({}, "<|im_start|>assistant\n"),
        ({"chat_template_args": {"enable_thinking": True}}, "<|im_start|>assistant\n"),
        ({"chat_template_args": {"enable_thinking": False}}, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_the_answer_begins_where_the_template_ends(settings, end):
    """With thinking turned off that is after the closed block; and there it is scored."""
    tokenizer = with_template(QWEN3)
    task = KeyValueRetrieval(
        tokenizer, keys="words", num_keys=5, num_positions=3, system_prompt="Be brief.", **settings
    )
    prompt, example = task.prompts("test", 1)[0], task.split("test", 1).examples[0]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt.text}]
    args = settings.get("chat_template_args", {})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **args)
    assert text.endswith(end)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(example.prompt_ids) == ids
    assert tokenizer.decode(example.answer_ids) == prompt.answers[0]
    assert prompt.answers[0] in tokenizer.decode(ids[example.gold_span[0] : example.gold_span[1]])
    model = build_model("qwen3", vocab_size=600, max_position_embeddings=512)
    scored = Scorer(model).score(task.split("test", 1)).log_prob[0, 0]
    whole = torch.tensor([ids + list(example.answer_ids)])
    with torch.no_grad():
        logs = model(whole).logits[0].log_softmax(-1)
    places = range(len(ids) - 1, whole.shape[1] - 1)
    # a token counts no worse than chance
    expected = sum(max(logs[place, whole[0, place + 1]].item(), -math.log(600)) for place in places)
    assert scored == pytest.approx(expected, abs=1e-3)


def test_the_same_task_is_made_from_its_own_settings():
    settings = {"chat_template_args": {"enable_thinking": False}, "system_prompt": "Be brief."}
    task = KeyValueRetrieval(with_template(QWEN3), num_keys=9, num_positions=3, **settings)
    assert task.resized(9).split("test", 2).examples == task.split("test", 2).examples
    assert {name: task.describe()[name] for name in settings} == settings


def test_the_date_is_that_of_the_first_day(other_day):
    tokenizer = with_template(DATED)
    other_day("2024-07-26")
    task = KeyValueRetrieval(tokenizer, num_keys=5, num_positions=3)
    resolved = with_chat(TaskSpecification("kv_retrieval", 300), tokenizer)
    today = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert today == "Today: 26 Jul 2024 2024-07-26<|user|>x<|assistant|>"
    assert PromptEncoder(tokenizer).in_template("x") == today
    assert resolved.chat_date == task.describe()["chat_date"] == "2024-07-26"
    first = task.split("test", 2).examples
    other_day("2025-01-02")
    assert "02 Jan 2025" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert task.split("test", 2).examples == first
    assert task.resized(5).split("test", 2).examples == first
    kept = KeyValueRetrieval(tokenizer, num_keys=5, num_positions=3, chat_date="2024-07-26")
    assert kept.split("test", 2).examples == first
    assert with_chat(resolved, tokenizer) == resolved
    assert KeyValueRetrieval(tokenizer, num_keys=5, num_positions=3).split("test", 2).examples != first


@pytest.mark.parametrize(
    ("template", "settings", "names"),
    [
        (QWEN3, {"chat_template_args": {"enable_thinkin": False}}, "enable_thinkin"),
        (QWEN3, {"chat_template_args": {"tokenize": True}}, "tokenize"),
        (QWEN3, {"chat_date": "2024-07-26"}, "chat_date"),
        (QWEN3, {"chat_template": False, "system_prompt": "x"}, "system_prompt"),
        (None, {"chat_template_args": {"enable_thinking": False}}, "chat_template_args"),
        (None, {"chat_template": True}, "chat_template"),
        (DATED, {"chat_date": "yesterday"}, "yesterday"),
        (DATED.replace('"%d %b %Y"', '"%d" + " %b"'), {}, "date"),
        (NO_SYSTEM, {"system_prompt": "Be brief."}, "Be brief."),
        ("{{ raise_exception('no\nusers here') }}", {}, "no"),
        ("{{ 1 + }}", {}, "fails"),
        ("hello", {}, "message"),
        ({"tool_use": QWEN3}, {}, "template"),
    ],
)
def test_what_cannot_work_is_one_line_when_the_task_is_made(template, settings, names):
    with pytest.raises(TaskError) as caught:
        KeyValueRetrieval(with_template(template), num_keys=5, num_positions=3, **settings)
    said = str(caught.value)
    assert names in said
    assert "\n" not in said
