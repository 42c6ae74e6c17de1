"""What `layerrope search` says of itself before it begins, beside what it then takes: time, and memory.

    python tests/benchmarks/search_plan.py MODEL --task kv_retrieval --num-keys 100 --steps 1 --test-groups 2
    python tests/benchmarks/search_plan.py MODEL --length 8192 --dry-run          # memory and the first word only

All options go to the search. Printed are the seconds until it says its plan (goal: 30), the most memory that it holds
(GiB, of the process), and how long search and test took, from the start of the command, in times of what was planned.
Exit status 1 if the search took 1.5 times its plan or more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAYS_PLAN = "repeats this plan"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found"
        options = [*sys.argv[1:], "--output", str(output)]
        started, told = time.perf_counter(), None
        command = [sys.executable, "-m", "peft_layerrope", "search", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "400"}
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            if told is None and SAYS_PLAN in line:
                told = time.perf_counter() - started
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if told is None or process.returncode:
            print("the search failed")
            return 1
        print(f"plan said after {told:.1f} s; at most {usage.ru_maxrss / 2**20:.2f} GiB of memory")
        if "--dry-run" in options:
            return 0
        timing = json.loads((output / "timing.json").read_text())
    taken, planned = {"test": timing["seconds"]["held-out test"]}, timing["plan"]
    taken["search"] = time.perf_counter() - started - taken["test"]
    ratios = {"search": taken["search"] / planned["seconds"], "test": taken["test"] / planned["test_seconds"]}
    for name, ratio in ratios.items():
        print(f"{name}: {taken[name]:.0f} s, {ratio:.2f} of its plan")
    return int(ratios["search"] >= 1.5)


if __name__ == "__main__":
    sys.exit(main())
