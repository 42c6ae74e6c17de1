"""Evaluates a model with and without an adapter in lm-evaluation-harness, from Python.

    pip install "peft-layerrope[lm-eval]"
    layerrope prompts --task kv_words --length 512 --limit 220 > prompts.jsonl
    python examples/evaluate_with_lm_eval.py prompts.jsonl hub_configs/demo-plain

The harness takes a PeftModel for what it takes any model: `HFLM(pretrained=model)`. It cuts longer prompts than
`max_length` at their start, and means the model's window unless told otherwise. Leave `add_bos_token` alone: the
prompts are written so that the tokenizer's own way gives exactly the tokens of our evaluation.
"""

from __future__ import annotations

import argparse

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_layerrope  # tells PEFT about the adapter type
from peft_layerrope.lm_eval_tasks import lm_eval_tasks_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="what `layerrope prompts` wrote")
    parser.add_argument("adapter", help="adapter folder, or its id on the Hub")
    parser.add_argument("--model", default=peft_layerrope.demo_model_path(), help="default: the demo model")
    parser.add_argument("--task", default="layerrope_kv_words")
    parser.add_argument("--max-length", type=int, default=520)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), args.adapter)
    tasks = TaskManager(include_path=lm_eval_tasks_path(), include_defaults=False, metadata={"data": args.prompts})

    def accuracies() -> dict[str, float]:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=args.max_length, batch_size=16)
        results = simple_evaluate(harness, tasks=[args.task], task_manager=tasks)["results"][args.task]
        return {key.split(",")[0]: value for key, value in results.items() if key.startswith("acc")}

    scaled = accuracies()
    with model.disable_adapter():
        plain = accuracies()
    print(f"{'':20}{'without':>10}{'adapter':>10}")
    for name in sorted(name for name in scaled if "stderr" not in name):
        print(f"{name:20}{100 * plain[name]:10.1f}{100 * scaled[name]:10.1f}")


if __name__ == "__main__":
    main()
