"""Is every fault of the first version still mended? Runs, for each input that showed one, the tests that pin it.

    python tests/benchmarks/faults_again.py             # all of them
    python tests/benchmarks/faults_again.py B1 C4       # those of some faults

Printed is a Markdown table: the fault, the smallest input, what happened then, and what its tests say now. The inputs
stand in `faults_again.tsv`, one a line, with the node ids of their tests: one without brackets stands for all cases.
Where what had the fault is no longer in the package, a remark names what took its place, and words of it are looked for
in the package. The exit status is 1 if a test fails, is skipped or is not found, or if such words are there again.
A1 to A5, which are about figures, have `real_doors.py`. On one CPU core all tests take about three minutes.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """A line of the table: an input that showed a fault.

    `tests` are node ids, joined by " + "; `remark` says what they do not; `gone` is a regular expression of words that
    are no longer in the package.
    """

    fault: str
    input: str
    before: str
    tests: str
    remark: str
    gone: str

    @property
    def node_ids(self) -> list[str]:
        return [node_id for node_id in self.tests.split(" + ") if node_id]


def read_faults() -> list[Fault]:
    with Path(__file__).with_suffix(".tsv").open(encoding="utf-8", newline="") as file:
        return [Fault(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def outcomes_of(node_ids: Sequence[str]) -> dict[str, Counter[str]]:
    """Runs tests in one process of pytest, and returns the outcomes by node id, with brackets and without."""
    outcomes: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *node_ids]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            tags = {part.tag for part in case}
            outcome = "FAILED" if tags & {"failure", "error"} else "SKIPPED" if "skipped" in tags else "passed"
            node_id = f"{case.get('file')}::{case.get('name')}"
            for name in {node_id, node_id.partition("[")[0]}:
                outcomes.setdefault(name, Counter())[outcome] += 1
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    return outcomes


def state_of(fault: Fault, outcomes: Mapping[str, Counter[str]]) -> tuple[str, bool]:
    """What the last column says of a fault, and whether it is mended."""
    counted: Counter[str] = Counter()
    for node_id in fault.node_ids:
        counted += outcomes.get(node_id, Counter({"NOT FOUND": 1}))
    files = (ROOT / "peft_layerrope").rglob("*.py") if fault.gone else ()
    there = [path.name for path in files if re.search(fault.gone, path.read_text(encoding="utf-8"), re.IGNORECASE)]
    said = [fault.remark, f"THERE AGAIN in {', '.join(there)}" if there else ""]
    said += [f"{count} {outcome}" for outcome, count in counted.items()]
    return "; ".join(filter(None, said)), not there and set(counted) <= {"passed"}


def main() -> int:
    faults = read_faults()
    known = list(dict.fromkeys(one.fault for one in faults))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(known)}; default: all")
    chosen = parser.parse_args().faults or known
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"there is no fault {unknown[0]!r}, expected some of {', '.join(known)}")
    faults = [one for one in faults if one.fault in chosen]
    node_ids = list(dict.fromkeys(node_id for one in faults for node_id in one.node_ids))
    outcomes = outcomes_of(node_ids) if node_ids else {}
    states = [state_of(one, outcomes) for one in faults]
    print("| fault | input | before | now |\n| --- | --- | --- | --- |")
    for one, (now, _) in zip(faults, states, strict=True):
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in (one.fault, one.input, one.before, now)) + " |")
    return int(not all(mended for _, mended in states))


if __name__ == "__main__":
    sys.exit(main())
