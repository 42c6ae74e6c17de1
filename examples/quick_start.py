"""Loads the searched adapter onto the demo model, and asks both for values at the start, in the middle and at the end
of long lists.

    layerrope search --output demo-adapter      # once
    python examples/quick_start.py demo-adapter
"""

from __future__ import annotations

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_layerrope  # tells PEFT about the adapter type

PLACES = ("first", "middle", "last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="adapter folder, or its id on the Hub")
    parser.add_argument("--lists", type=int, default=40, help="each asked at three places")
    args = parser.parse_args()

    path = peft_layerrope.demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)
    model = PeftModel.from_pretrained(base, args.adapter)

    # Lists twice as long as the model was trained on.
    task = peft_layerrope.KeyValueWords(tokenizer, length=512, num_positions=len(PLACES), seed=1)
    examples = task.split("test", args.lists).examples

    def answers() -> list[str]:
        """What the model writes after each list and its question."""
        texts = []
        for example in examples:
            ids = torch.tensor([example.context_ids + example.query_ids])
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
            texts.append(tokenizer.decode(written[0, ids.shape[1] :]))
        return texts

    gold = [tokenizer.decode(example.answer_ids) for example in examples]
    with model.disable_adapter():
        before = answers()
    after = answers()

    print(f"{'answer stands':16}{'without adapter':>16}{'with adapter':>16}")
    for index, place in enumerate(PLACES):
        asked = [number for number, example in enumerate(examples) if example.position == index]
        right = [sum(texts[number] == gold[number] for number in asked) for texts in (before, after)]
        print(f"{place:16}" + "".join(f"{f'{count} of {len(asked)}':>16}" for count in right))

    print(f"\n{'question':14}{'right answer':16}{'without adapter':18}with adapter")
    for number, example in [pair for pair in enumerate(examples) if pair[1].position == 1][:5]:
        print(f"{tokenizer.decode(example.query_ids):14}{gold[number]:16}{before[number]:18}{after[number]}")


if __name__ == "__main__":
    main()
