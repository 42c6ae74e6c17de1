"""Trains a LoRA on a model whose RoPE is scaled per layer, with transformers' own Trainer.

    python examples/train_lora.py --output demo-lora        # about two minutes on two CPU cores

The factors are baked in first (`merge_and_unload()`). The LoRA's file then has the usual keys and goes with the plain
base model too, and its `disable_adapter()` keeps the scaling: the model is its own reference for DPO.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from peft_layerrope import KeyValueWords, demo_model_path, evaluate

ROPE = Path(__file__).parent.parent / "hub_configs" / "demo-plain"
LENGTH, PAIRS, QUESTIONS, BATCH = 512, 100, 27, 8  # a list and its questions, of four tokens each, fit into LENGTH


def training_rows(task: KeyValueWords, count: int) -> list[dict[str, list[int]]]:
    """Lists with many questions after each, in any order; the loss is on the answers only."""
    examples, rows = task.split("search", count).examples, {}
    for example in random.Random(task.seed).sample(examples, len(examples)):
        context, query, answer = (list(ids) for ids in (example.context_ids, example.query_ids, example.answer_ids))
        row = rows.setdefault(example.group, {"input_ids": context, "labels": [-100] * len(context)})
        row["input_ids"] += query + answer
        row["labels"] += [-100] * len(query) + answer
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo-lora", help="folder for the LoRA")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--contexts", type=int, default=100, help="to evaluate on, each asked at 11 positions")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    baked = PeftModel.from_pretrained(base, ROPE).merge_and_unload()  # the factors are part of the model now
    set_seed(0)
    model = get_peft_model(baked, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    settings = {"max_steps": args.steps, "per_device_train_batch_size": BATCH, "learning_rate": 3e-3}
    arguments = TrainingArguments(args.output, **settings, logging_steps=20, save_strategy="no", report_to=[])
    lists = KeyValueWords(tokenizer, LENGTH, num_positions=QUESTIONS, num_pairs=PAIRS, seed=1)
    trainer = Trainer(model, arguments, train_dataset=training_rows(lists, args.steps * BATCH))
    trainer.train()
    trainer.save_model(args.output)
    held_out = KeyValueWords(tokenizer, LENGTH)  # its test split was seen by neither the LoRA nor the search
    print(f"LAYER_ROPE + LoRA: {evaluate(model, held_out, num_groups=args.contexts).average().value:.1%} right")
    with model.disable_adapter():
        print(f"LAYER_ROPE alone:  {evaluate(model, held_out, num_groups=args.contexts).average().value:.1%} right")


if __name__ == "__main__":
    main()
