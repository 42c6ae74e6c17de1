"""Generates with a LoRA and LAYER_ROPE adapters together, and switches each.

    python examples/train_lora.py --output demo-lora        # once
    python examples/serve_with_lora.py demo-lora

The LoRA is loaded first, and LAYER_ROPE over it: two PeftModels, each with its own adapters and `disable_adapter()`,
and one base model in memory. A LoRA belongs to the scaling it was trained on: the table shows what it loses without.
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
    parser.add_argument("--prompts", type=int, default=40)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(peft_layerrope.demo_model_path())
    base = AutoModelForCausalLM.from_pretrained(peft_layerrope.demo_model_path())
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
        print(f"{setting:28}{right} of {len(gold)}", flush=True)

    show("base", base)
    lora = PeftModel.from_pretrained(base, args.lora)
    model = PeftModel.from_pretrained(lora, CONFIGS / "demo-plain").eval()
    show("LoRA + LAYER_ROPE", model)
    with lora.disable_adapter():
        show("LAYER_ROPE alone", model)
    with model.disable_adapter():
        show("LoRA alone", model)
    model.load_adapter(CONFIGS / "demo-dynamic", "second")
    model.set_adapter("second")
    show("LoRA + second LAYER_ROPE", model)


if __name__ == "__main__":
    main()
