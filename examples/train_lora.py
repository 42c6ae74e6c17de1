"""Trains a LoRA on a model whose RoPE is scaled per layer, with transformers' own Trainer.

    python examples/train_lora.py --output demo-lora        # about two minutes on two CPU cores
    python examples/train_lora.py --model Qwen/Qwen2.5-0.5B-Instruct --rope my-adapter --output my-lora

The factors are baked in first (`merge_and_unload()`). The LoRA's file then has the usual keys and goes with the plain
base model too, and its `disable_adapter()` keeps the scaling: the model is its own reference for DPO.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from peft_layerrope import KeyValueRetrieval, KeyValueWords, Task, demo_model_path, evaluate

ROPE = Path(__file__).parent.parent / "hub_configs" / "demo-plain"
LENGTH, PAIRS, QUESTIONS = 512, 100, 27  # a list and its questions, of four tokens each, fit into LENGTH


def training_rows(task: Task, count: int) -> list[dict[str, list[int]]]:
    """Lists with many questions after each, in any order; the loss is on the answers only."""
    examples, rows = task.split("search", count).examples, {}
    for example in random.Random(1).sample(examples, len(examples)):
        context, query, answer = (list(ids) for ids in (example.context_ids, example.query_ids, example.answer_ids))
        row = rows.setdefault(example.group, {"input_ids": context, "labels": [-100] * len(context)})
        row["input_ids"] += query + answer
        row["labels"] += [-100] * len(query) + answer
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model, with its adapter")
    parser.add_argument("--rope", help="LAYER_ROPE adapter of --model")
    parser.add_argument("--pairs", type=int, default=20, help="key-value pairs that --model is asked about")
    parser.add_argument("--output", default="demo-lora", help="folder for the LoRA")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--contexts", type=int, default=100, help="to evaluate on, each asked at every position")
    args = parser.parse_args()
    name, rope = (args.model, args.rope) if args.model else (demo_model_path(), ROPE)
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    make, lists, batch, rate = partial(KeyValueWords, tokenizer, LENGTH), {"num_pairs": PAIRS}, 8, 3e-3
    if args.model:  # its lists are not all of one length
        few = {"num_keys": args.pairs, "num_positions": min(5, args.pairs)}
        make, lists, batch, rate = partial(KeyValueRetrieval, tokenizer, **few), {}, 1, 2e-4
    if rope:
        model = PeftModel.from_pretrained(model, rope).merge_and_unload()  # the factors are part of the model now
    set_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    settings = {"max_steps": args.steps, "per_device_train_batch_size": batch, "learning_rate": rate}
    arguments = TrainingArguments(args.output, **settings, logging_steps=20, save_strategy="no", report_to=[])
    task = make(num_positions=min(QUESTIONS, args.pairs) if args.model else QUESTIONS, seed=1, **lists)
    trainer = Trainer(model, arguments, train_dataset=training_rows(task, args.steps * batch))
    trainer.train()
    trainer.save_model(args.output)
    held_out = make()  # its test split was seen by neither the LoRA nor the search
    print(f"with the LoRA:    {evaluate(model, held_out, num_groups=args.contexts).average().value:.1%} right")
    with model.disable_adapter():
        print(f"without the LoRA: {evaluate(model, held_out, num_groups=args.contexts).average().value:.1%} right")


if __name__ == "__main__":
    main()
