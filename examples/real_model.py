"""A real model's lost middle, and its repair, step by step. Jupyter and VS Code run the `# %%` cells one by one.

python examples/real_model.py --model Qwen/Qwen2.5-0.5B-Instruct --output my-adapter     # an hour on two CPU cores
"""

# %% What to do: a notebook takes the defaults.
import argparse

from peft import PeftModel

from peft_layerrope import KeyValueRetrieval, evaluate, load_model, search
from peft_layerrope.plots import plot_by_position

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--pairs", type=int, default=100, help="more are harder")
parser.add_argument("--contexts", type=int, default=20, help="to test on, each asked at five positions")
parser.add_argument("--minutes", type=float, default=20.0, help="for the search")
parser.add_argument("--steps", type=int, help="instead of --minutes, to repeat a search")
parser.add_argument("--output", default="my-adapter", help="folder for the adapter")
args = parser.parse_known_args()[0]

# %% A list of pairs of short words, and a question about one of them: at the start, in the middle or at the end?
model, tokenizer = load_model(args.model)
task = KeyValueRetrieval(tokenizer, num_keys=args.pairs, keys="syllables", num_positions=5, chat_template=False)
print(task.prompts("test", 1)[0].text[:300], "...")

# %% The lost middle: right answers by position, from contexts that the search does not see.
before = evaluate(model, task, num_groups=args.contexts)
print("as it is:        ", *(f"{share:4.0%}" for share in before.accuracy_by_position))

# %% The repair. Ctrl-C stops it and keeps nothing; `layerrope search` then finishes with what it has.
budget = {"minutes": args.minutes} if args.steps is None else {"steps": args.steps}
result = search(model, task, **budget, test_groups=2)
result.save_pretrained(args.output)
print(*result.notes, sep="\n")

# %% The same questions with the adapter, as anybody loads it who has the folder.
after = evaluate(PeftModel.from_pretrained(model, args.output), task, num_groups=args.contexts)
print("with the adapter:", *(f"{share:4.0%}" for share in after.accuracy_by_position))
gain = after.paired_difference(before)
print(f"gain: {100 * gain.value:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]")

# %% The picture.
subtitle = f"{args.pairs} pairs, {args.contexts} held-out contexts"
with open(f"{args.output}/before_and_after.png", "wb") as file:
    file.write(plot_by_position({"no scaling": before, "with the adapter": after}, subtitle))
