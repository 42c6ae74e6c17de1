"""Answers questions from retrieved documents: in the retriever's order, reordered, and each with an adapter as well.

    python examples/rag.py --model Qwen/Qwen2.5-0.5B-Instruct --adapter my-adapter --data nq-open-oracle.jsonl.gz

DATA is the public file of "Lost in the Middle" that has one passage a question; BM25 searches all its passages.
Reordered, the best documents stand at both ends and the worst in the middle.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
from collections import Counter

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_layerrope import best_subspan_em

ASK = "Write a short answer for the question, using only these search results.\n\n{}\n\nQuestion: {}\nAnswer:"
ORDERS = {"as retrieved": lambda found: found, "reordered": lambda found: found[::2] + found[1::2][::-1]}


class Retriever:
    """BM25, with the usual k1 = 1.5 and b = 0.75."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.counts = texts, [Counter(re.findall(r"\w+", text.lower())) for text in texts]
        self.mean = sum(map(Counter.total, self.counts)) / len(texts)
        found_in = Counter(word for count in self.counts for word in count)
        self.weights = {w: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for w, n in found_in.items()}

    def best(self, question: str, number: int) -> list[str]:
        asked = set(re.findall(r"\w+", question.lower())) & self.weights.keys()

        def score(index: int) -> float:
            count = self.counts[index]
            level = 1.5 * (0.25 + 0.75 * count.total() / self.mean)
            return sum(self.weights[word] * 2.5 * count[word] / (count[word] + level) for word in asked)

        return [self.texts[index] for index in sorted(range(len(self.texts)), key=score)[: -number - 1 : -1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in {"model": "an instruct model", "adapter": "of that model", "data": "the file"}.items():
        parser.add_argument(f"--{name}", required=True, help=what)
    parser.add_argument("--documents", type=int, default=10, help="for each question")
    parser.add_argument("--questions", type=int, default=40)
    args = parser.parse_args()
    with (gzip.open if args.data.endswith(".gz") else open)(args.data, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    retriever = Retriever([f"{one['title']}: {one['text']}" for record in records for one in record["ctxs"]])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), args.adapter).eval()

    def is_right(question: str, documents: list[str], answers: list[str]) -> bool:
        listed = "\n".join(f"Document [{i}] {text}" for i, text in enumerate(documents, start=1))
        chat = [{"role": "user", "content": ASK.format(listed, question)}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        return best_subspan_em(tokenizer.decode(written, skip_special_tokens=True), answers)

    right: Counter[str] = Counter()
    for number, record in enumerate(records[: args.questions], start=1):
        found = retriever.best(record["question"], args.documents)
        for name, order in ORDERS.items():
            asked = record["question"], order(found), record["answers"]
            right[f"{name}, with the adapter"] += is_right(*asked)
            with model.disable_adapter():
                right[name] += is_right(*asked)
        print(f"of {number}: " + "; ".join(f"{name} {count}" for name, count in right.items()), flush=True)


if __name__ == "__main__":
    main()
