"""Searches factors for data of your own, from Python.

    python examples/search.py --output my-adapter

A task can be token ids: context, question and answer, and where the answer stands. A few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from peft_layerrope import Example, TokenTask, load_model, search
from peft_layerrope.searcher.plan import SearchProgress
from peft_layerrope.tasks.kv import key_words, value_words

PAIRS, POSITIONS = 100, (0, 25, 50, 75, 99)


class Stages(SearchProgress):
    """Prints what begins; `progress=True` draws bars instead."""

    def stage(self, name: str, total: int) -> None:
        print(f"{name}: at most {total} steps", flush=True)


def my_examples(tokenizer: PreTrainedTokenizerBase, contexts: int) -> Iterator[Example]:
    """Put your own data here: each context is a group, and is asked about every position."""
    rng = random.Random(0)
    for group in range(contexts):
        keys = rng.sample(key_words(), PAIRS)
        values = [" ".join(rng.sample(value_words(), 2)) for _ in keys]
        context = " ".join(f"{key} {value} ," for key, value in zip(keys, values, strict=True))
        for index, place in enumerate(POSITIONS):
            question = tokenizer(f"? {keys[place]}", add_special_tokens=False).input_ids
            answer = tokenizer(values[place], add_special_tokens=False).input_ids
            yield Example(*map(tuple, (tokenizer(context).input_ids, question, answer)), position=index, group=group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--model", help="Hub id, folder or GGUF file; default: the demo model")
    parser.add_argument("--minutes", type=float, default=2.0, help="for everything but the held-out test")
    parser.add_argument("--contexts", type=int, default=80, help="shared out to search, validation and test")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)  # also: dtype=, gguf_file=, load_in_4bit=True, peft="my-lora" ...
    task = TokenTask(list(my_examples(tokenizer, args.contexts)), POSITIONS, fractions=(0.2, 0.2, 0.6), name="my lists")
    result = search(model, task, minutes=args.minutes, progress=Stages(), test_groups=args.contexts * 3 // 5)
    for row in result.table:  # held out
        print(f"{row.label:22}{row.scores.average().value:7.1%}   {' '.join(f'{f:g}' for f in row.factors)}")
    result.save_pretrained(args.output)


if __name__ == "__main__":
    main()
