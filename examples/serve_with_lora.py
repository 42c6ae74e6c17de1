"""Generates with a LoRA and LAYER_ROPE adapters together, and switches each.

    python examples/train_lora.py --output demo-lora        # once
    python examples/serve_with_lora.py demo-lora

Load the LoRA on the base model first, and LAYER_ROPE over it: two PeftModels, one inside the other. Each has its own
`disable_adapter()` and its own adapters, and is saved to its own folder. Nothing was merged, so that the same base
model in memory serves every combination. A LoRA belongs to the scaling that it was trained on: the table shows what it
loses without one, or with another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_layerrope  # tells PEFT about the adapter type

CONFIGS = Path(__file__).parent.parent / "hub_configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", help="LoRA folder, or its id on the Hub")
    parser.add_argument("--adapter", default=str(CONFIGS / "demo-plain"), help="LAYER_ROPE folder or id")
    parser.add_argument("--second", default=str(CONFIGS / "demo-dynamic"), help="another one, to switch to")
    parser.add_argument("--prompts", type=int, default=40)
    args = parser.parse_args()

    path = peft_layerrope.demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)

    # Lists twice as long as the base model was trained on; the answer stands in the middle.
    task = peft_layerrope.KeyValueWords(tokenizer, length=512, num_positions=3, seed=1)
    middle = [example for example in task.split("test", args.prompts).examples if example.position == 1]
    prompts = torch.tensor([example.context_ids + example.query_ids for example in middle])
    gold = [tokenizer.decode(example.answer_ids) for example in middle]

    def show(setting: str, model: nn.Module) -> None:
        mask = torch.ones_like(prompts)
        output = model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=2, do_sample=False)
        answers = tokenizer.batch_decode(output[:, prompts.shape[1] :])
        right = sum(answer == wanted for answer, wanted in zip(answers, gold, strict=True))
        print(f"{setting:28}{f'{right} of {len(gold)}':12}{answers[0]}", flush=True)

    print(f"{'':28}{'right':12}{tokenizer.decode(middle[0].query_ids)}  (right: {gold[0]})")
    show("base", base)

    lora = PeftModel.from_pretrained(base, args.lora)
    model = PeftModel.from_pretrained(lora, args.adapter).eval()
    show("LoRA + LAYER_ROPE", model)
    with lora.disable_adapter():
        show("LAYER_ROPE alone", model)
    with model.disable_adapter():
        show("LoRA alone", model)

    model.load_adapter(args.second, "second")
    model.set_adapter("second")
    show("LoRA + second LAYER_ROPE", model)
    model.set_adapter("default")
    show("LoRA + LAYER_ROPE again", model)


if __name__ == "__main__":
    main()
