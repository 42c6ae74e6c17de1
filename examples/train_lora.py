"""Trains a LoRA on a model whose RoPE is scaled per layer, with transformers' own Trainer.

    python examples/train_lora.py --output demo-lora
    python examples/serve_with_lora.py demo-lora

The way to train with a LAYER_ROPE adapter is to bake its factors in first (`merge_and_unload()`) and to put the LoRA
on the result. Then

- the LoRA's file has the usual keys: anyone can load it on the plain base model, beside the LAYER_ROPE adapter;
- `disable_adapter()` switches the LoRA off and keeps the scaling, which makes the model its own reference for DPO;
- a LoRA laid over the LAYER_ROPE PeftModel itself would get keys that fit nothing, and is refused.

The demo model was trained on 256 tokens. The LoRA learns to look words up in lists of 512, on top of scaled positions;
about two minutes on two CPU cores. Accuracy is measured on contexts that neither the LoRA nor the factors have seen.

What it shows is how the two go together, not that training needs the scaling: a LoRA that is trained at the full
length can learn this task on the unscaled model as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

from peft_layerrope import KeyValueWords, demo_model_path, evaluate

ROPE = Path(__file__).parent.parent / "hub_configs" / "demo-plain"
LENGTH = 512
PAIRS, QUESTIONS = 100, 27  # of four tokens each: the list and all its questions fit into LENGTH
NO_LOSS = -100


def training_rows(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[dict[str, list[int]]]:
    """Lists of pairs with many questions after each; the loss is on the answers only."""
    task = KeyValueWords(tokenizer, LENGTH, num_positions=QUESTIONS, num_pairs=PAIRS, seed=seed)
    shuffled = torch.Generator().manual_seed(seed)
    examples = task.split("search", count).examples
    rows = []
    for first in range(0, len(examples), QUESTIONS):  # one group: the same list, asked everywhere
        group = examples[first : first + QUESTIONS]
        ids = list(group[0].context_ids)
        labels = [NO_LOSS] * len(ids)
        for index in torch.randperm(QUESTIONS, generator=shuffled).tolist():
            query, answer = list(group[index].query_ids), list(group[index].answer_ids)
            ids += query + answer
            labels += [NO_LOSS] * len(query) + answer
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def train(model: nn.Module, rows: list[dict[str, list[int]]], folder: Path, args: argparse.Namespace) -> Trainer:
    """An ordinary Trainer run: it needs to know nothing about the scaling."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=args.steps // 20,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", default=str(ROPE), help="LAYER_ROPE folder, or its id on the Hub")
    parser.add_argument("--output", type=Path, default=Path("demo-lora"), help="folder for the LoRA")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="lists per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--contexts", type=int, default=100, help="held-out contexts, each asked at 11 positions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    task = KeyValueWords(tokenizer, LENGTH)

    def report(name: str, model: nn.Module) -> None:
        accuracy = evaluate(model, task, num_groups=args.contexts).average()
        print(f"{name:28}{100 * accuracy.value:5.1f} ± {100 * (accuracy.high - accuracy.value):.1f}", flush=True)

    print(f"held-out accuracy in %, {LENGTH} tokens")
    report("base", base)
    scaled = PeftModel.from_pretrained(base, args.adapter)
    report("base + LAYER_ROPE", scaled)

    baked = scaled.merge_and_unload()  # the factors are part of the model now
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(args.seed)
    model = get_peft_model(baked, config)
    rows = training_rows(tokenizer, args.steps * args.batch, args.seed + 1)
    trainer = train(model, rows, args.output, args)
    report("base + LAYER_ROPE + LoRA", model)
    with model.disable_adapter():  # what DPO takes for its reference: the scaled model, not the plain one
        report("the same, LoRA disabled", model)

    trainer.save_model(str(args.output))
    print(f"saved the LoRA: {args.output}")


if __name__ == "__main__":
    main()
