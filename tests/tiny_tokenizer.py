"""A small byte-level BPE tokenizer, trained on the spot: real merges, no download."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = [
    "Extract the value corresponding to the specified key in the JSON object below.",
    "Write a high-quality answer for the given question using only the provided search results.",
    'JSON data: {"key": "value", "a1b2-c3d4": "0f9e-8d7c"} Key: Corresponding value: Document [1](Title: ) Question:',
    *(f"{i:08x}-{i * 7919 % 65536:04x} word{i} baba{i % 9} dab fob" for i in range(300)),
]


@cache
def tiny_bpe(chat: bool = False, end: bool = False, across_words: bool = False) -> PreTrainedTokenizerFast:
    """Begins a text with `<|bos|>`; on request ends it with `<|end|>`, has a chat template, or merges across words."""
    special = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    numbers = [(token, tokenizer.token_to_id(token)) for token in special[:2]]
    single = "<|bos|> $A" + (" <|end|>" if end else "")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=numbers)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast
