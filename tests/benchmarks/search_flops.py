"""What a search on a 7B model takes, reckoned from its floating-point operations and not measured.

    python tests/benchmarks/search_flops.py --tflops 150

The shape is Llama 2's of 7B: 32 layers, of which 30 are searched, hidden size 4,096. A context is counted with its 42
questions about UUIDs, each of 75 tokens, in one row. Counted are the two operations for each weight and token, and
those of attention over the whole row, for no kernel spares the masked half of a row with many questions. Left out are
the answers that a model writes, in the preflight and in the held-out test: writing is bound by memory.
"""

from __future__ import annotations

import argparse

from peft_layerrope import SearchSettings
from peft_layerrope.searcher.plan import Rates, Schedule, schedule_for
from peft_layerrope.searcher.settings import MIN_STEPS

HIDDEN, LAYERS, SEARCHED = 4096, 32, 30
WEIGHTS = 6.48e9  # without embeddings and output layer
QUESTIONS, QUESTION_TOKENS = 42, 75


def operations(tokens: int) -> float:
    """Of one forward pass over a row of so many tokens."""
    return 2 * WEIGHTS * tokens + 4 * LAYERS * HIDDEN * tokens**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=150.0, help="10^12 operations that the device does in a second")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the search")
    args = parser.parse_args()
    print("| tokens of a context | PFLOP a context | s a generation | generations in the time | PFLOP a search |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for length in (4096, 16384):
        row = length + QUESTIONS * QUESTION_TOKENS
        context, window = (operations(tokens) / (1e12 * args.tflops) for tokens in (row, length))
        rates = Rates(context, window, written=context)
        shortest = Schedule.of(SearchSettings(), MIN_STEPS, SEARCHED)
        schedule = schedule_for(60 * args.minutes, rates, shortest)
        generation = schedule.population * rates.context + rates.window
        total = sum(schedule.seconds(rates).values()) * args.tflops / 1e3
        print(f"| {length:,} | {operations(row) / 1e15:.2f} | {generation:.1f} | {schedule.steps} | {total:,.0f} |")


if __name__ == "__main__":
    main()
