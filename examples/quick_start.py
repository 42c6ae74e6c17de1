"""Loads the searched adapter onto the demo model and asks both for a value in the middle of a long list.

layerrope search --output demo-adapter      # once
python examples/quick_start.py demo-adapter
"""

from __future__ import annotations

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_layerrope  # tells PEFT about the adapter type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="adapter folder, or its id on the Hub")
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()

    path = peft_layerrope.demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)
    model = PeftModel.from_pretrained(base, args.adapter)

    # Lists twice as long as the model was trained on; the answer stands in the middle.
    task = peft_layerrope.KeyValueWords(tokenizer, length=512, num_positions=3, seed=1)
    middle = [example for example in task.split("test", args.prompts).examples if example.position == 1]

    def answer(ids: torch.Tensor) -> str:
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        return tokenizer.decode(output[0, ids.shape[1] :])

    print(f"{'question':12}{'right answer':16}{'without adapter':18}with adapter")
    for example in middle:
        ids = torch.tensor([example.context_ids + example.query_ids])
        with model.disable_adapter():
            before = answer(ids)
        question, gold = tokenizer.decode(example.query_ids), tokenizer.decode(example.answer_ids)
        print(f"{question:12}{gold:16}{before:18}{answer(ids)}")


if __name__ == "__main__":
    main()
