"""From text to tokens: special tokens, chat templates, the seam before the answer, and where the gold stands."""

from __future__ import annotations

import pytest
from tiny_tokenizer import tiny_bpe
from transformers import PreTrainedTokenizerBase

from peft_layerrope import TaskError
from peft_layerrope.tasks.prompts import PromptEncoder

TEXT = "Document [1] the value is word7 indeed.\nKey:"
GOLD = (TEXT.index("word7"), TEXT.index("word7") + len("word7"))


def test_ids_are_the_tokenizers_own_and_the_answer_goes_on_from_them():
    tokenizer = tiny_bpe()
    ids, answer, span = PromptEncoder(tokenizer).encode(TEXT, "word7 baba", GOLD)
    assert list(ids) == tokenizer(TEXT)["input_ids"]
    assert list(ids + answer) == tokenizer(TEXT + " word7 baba")["input_ids"]
    assert tokenizer.decode(ids[span[0] : span[1]]).strip() == "word7"


def test_an_end_token_that_the_tokenizer_adds_is_left_out():
    plain, ended = tiny_bpe(), tiny_bpe(end=True)
    assert ended(TEXT)["input_ids"][-1] == ended.eos_token_id
    assert PromptEncoder(ended).encode(TEXT, "word7", GOLD) == PromptEncoder(plain).encode(TEXT, "word7", GOLD)


def test_where_tokens_merge_across_the_seam_the_answer_is_tokenised_alone():
    tokenizer = tiny_bpe(across_words=True)
    alone, joined = tokenizer("word7 dab")["input_ids"], tokenizer("word7 dab fob")["input_ids"]
    assert joined[: len(alone)] != alone  # the case that is meant
    ids, answer, _ = PromptEncoder(tokenizer).encode("word7 dab", "fob", None)
    assert list(ids) == alone
    assert list(answer) == tokenizer(" fob", add_special_tokens=False)["input_ids"]


def test_chat_template_wraps_the_prompt_and_the_answer_has_no_space():
    tokenizer = tiny_bpe(chat=True)
    ids, answer, span = PromptEncoder(tokenizer, chat_template=True).encode(TEXT, "word7", GOLD)
    message = [{"role": "user", "content": TEXT}]
    assert list(ids) == tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == f"<|bos|><|user|>{TEXT}<|end|><|assistant|>"
    assert tokenizer.decode(answer) == "word7"
    assert tokenizer.decode(ids[span[0] : span[1]]).strip() == "word7"


def test_a_template_that_changes_the_text_leaves_the_gold_unknown():
    tokenizer = tiny_bpe(chat=True)
    shouting = tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    encoder = PromptEncoder(Changed(tokenizer, chat_template=shouting), chat_template=True)
    assert encoder.encode(TEXT, "word7", GOLD).gold_span is None


def test_slow_tokenizers_do_not_know_where_the_gold_stands():
    found = PromptEncoder(Changed(tiny_bpe(), is_fast=False)).encode(TEXT, "word7", GOLD)
    assert found == PromptEncoder(tiny_bpe()).encode(TEXT, "word7", GOLD)._replace(gold_span=None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template: leave it out"),
        ("{{ raise_exception('no users here') }}", "the tokenizer's chat template fails: no users here"),
    ],
)
def test_templates_that_cannot_work(template, message):
    with pytest.raises(TaskError, match=message):
        PromptEncoder(Changed(tiny_bpe(), chat_template=template), chat_template=True).encode(TEXT, "word7", None)


def test_an_answer_that_the_tokenizer_cannot_write_is_refused(demo_tokenizer):
    with pytest.raises(TaskError, match="the tokenizer cannot encode 'Röntgen'"):
        PromptEncoder(demo_tokenizer).encode("baba dab", "Röntgen", None)


class Changed:
    """A tokenizer with some attributes changed, and the shared one left as it is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **changes: object) -> None:
        self._tokenizer, self._changes = tokenizer, changes

    def __getattr__(self, name: str) -> object:
        return self._changes[name] if name in self._changes else getattr(self._tokenizer, name)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._tokenizer(*args, **kwargs)

    def get_chat_template(self) -> str:
        return self._changes["chat_template"]
