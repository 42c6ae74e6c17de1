"""Kills `layerrope search` with SIGKILL at random times, resumes it, and compares what it writes with an unkilled run.

    python tests/benchmarks/search_kills.py             # 20 searches, each killed one to four times, about ten minutes
    python tests/benchmarks/search_kills.py --times 2

One search runs undisturbed first; it gives the files to compare with and the time that the kills are drawn from. Each
other one is killed at a time drawn evenly from when its journal is first on disk to when it would be done, then
resumed, and with probability a half killed again, at a time from its start to when it would be done, up to three times.
`adapter_config.json`, `adapter_model.safetensors`, `search.json` and `README.md` have to be equal byte for byte,
`run/journal.jsonl` in the entries that a search goes on from. A search that is done before its first kill comes is not
counted, but drawn again. Exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SETTINGS = ["--steps", "16", "--test-groups", "20"]
FILES = ("adapter_config.json", "adapter_model.safetensors", "search.json", "README.md")
JOURNAL = "run/journal.jsonl"
EVENTS = ("plan",)  # what the clock has a say in
MAX_KILLS, POLL, TIMEOUT = 4, 0.01, 600
console = Console(width=110)


def start(folder: Path, settings: list[str], resume: bool) -> subprocess.Popen:
    """Starts a search, in a session of its own; what it prints goes into a file beside its folder."""
    command = [str(Path(sys.executable).with_name("layerrope")), "search", "--output", str(folder), *settings]
    with open(folder.with_suffix(".txt"), "a") as log:
        return subprocess.Popen(
            [*command, *(["--resume"] if resume else [])],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_journal(process: subprocess.Popen, folder: Path) -> None:
    """Returns once the journal is on disk."""
    deadline = time.monotonic() + TIMEOUT
    while not (folder / JOURNAL).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"no journal was written:\n{_tail(folder)}")
        time.sleep(POLL)


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Waits for a search to end well."""
    if process.wait(TIMEOUT) != 0:
        raise RuntimeError(f"the search ended with status {process.returncode}:\n{_tail(folder)}")


def kill_after(process: subprocess.Popen, folder: Path, seconds: float) -> bool:
    """Kills a search after `seconds`; returns whether it was still running."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.wait(TIMEOUT)
    if process.returncode == -signal.SIGKILL:
        return True
    finish(process, folder)
    return False


@dataclass(frozen=True)
class Reference:
    """The undisturbed run."""

    contents: dict[str, Any]
    starting: float  # seconds from the start of the process to the first entry of the journal
    searching: float  # from there to the end


def undisturbed(folder: Path, settings: list[str]) -> Reference:
    started = time.monotonic()
    process = start(folder, settings, resume=False)
    wait_for_journal(process, folder)
    begun_at = time.monotonic()
    finish(process, folder)
    return Reference(contents(folder), begun_at - started, time.monotonic() - begun_at)


def contents(folder: Path) -> dict[str, Any]:
    """What is compared, by file; None for a file that is not there."""
    found: dict[str, Any] = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in FILES}
    found[JOURNAL] = [(e["kind"], e["key"], e["value"]) for e in entries(folder) if e["kind"] not in EVENTS]
    return found


def entries(folder: Path) -> list[dict[str, Any]]:
    """The whole entries of the journal; a last one without a line end is not there yet."""
    _, *lines = (folder / JOURNAL).read_text(encoding="ascii").split("\n")[:-1]
    return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Outcome:
    """One search that was killed."""

    kills: tuple[str, ...]  # what was done when each came
    differing: tuple[str, ...]


def disturbed(folder: Path, settings: list[str], reference: Reference, rng: random.Random) -> Outcome | None:
    """Kills and resumes one search, and compares it; None if it was done before the first kill."""
    process = start(folder, settings, resume=False)
    wait_for_journal(process, folder)
    if not kill_after(process, folder, rng.uniform(0, reference.searching)):
        return None
    kills = [progress(folder)]
    while len(kills) < MAX_KILLS and rng.random() < 0.5:
        process = start(folder, settings, resume=True)
        if not kill_after(process, folder, rng.uniform(0, reference.starting + reference.searching)):
            break  # what is left took less time: it is done
        kills.append(progress(folder))
    finish(start(folder, settings, resume=True), folder)
    found = contents(folder)
    return Outcome(tuple(kills), tuple(name for name in found if found[name] != reference.contents[name]))


def progress(folder: Path) -> str:
    """How far the journal is; read as any reader would, which has to work at any time."""
    written = sum((folder / name).exists() for name in FILES)
    text = f"{len(entries(folder))} entries"
    return text + (f", {written} files" if written else "")


def _tail(folder: Path) -> str:
    return "\n".join(folder.with_suffix(".txt").read_text(errors="replace").splitlines()[-20:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("settings", nargs="*", help="of the search, after --; default: a short one on the demo")
    options = parser.parse_args()
    settings = options.settings or SETTINGS
    rng = random.Random(options.seed)
    table = Table("search", "killed at", "result")
    equal = kills = missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        reference = undisturbed(Path(temporary, "undisturbed"), settings)
        console.print(
            f"undisturbed: {reference.starting:.1f} s to the first entry, {reference.searching:.1f} s from there",
            highlight=False,
        )
        counts: Counter[str] = Counter()
        number = 0
        while number < options.times:
            outcome = disturbed(Path(temporary, f"run-{number}-{missed}"), settings, reference, rng)
            if outcome is None:
                missed += 1
                if missed > options.times:
                    raise RuntimeError("most searches are done before they are killed.")
                continue
            number += 1
            kills += len(outcome.kills)
            equal += not outcome.differing
            counts.update(outcome.differing)
            result = "equal" if not outcome.differing else "differs: " + ", ".join(outcome.differing)
            table.add_row(str(number), "; ".join(outcome.kills), result)
    console.print(table)
    console.print(f"{equal} of {options.times} as the undisturbed run, {kills} kills", highlight=False)
    if missed:
        console.print(f"{missed} more were done before their kill and drawn again", highlight=False)
    for name, count in counts.items():
        console.print(f"{name} differs in {count}", highlight=False)
    sys.exit(equal != options.times)


if __name__ == "__main__":
    main()
