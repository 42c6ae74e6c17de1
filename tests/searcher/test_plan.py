"""What a search says while it runs: a line for each stage that is over, and in a terminal a bar with the time left."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from peft_layerrope.searcher import plan
from peft_layerrope.searcher.plan import RichProgress

STAGES = {"preflight": 10.0, "race": 30.0, "held-out test": 60.0}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when they are told to."""
    now = [0.0]
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now[0])
    return now


def told(clock: list[float], terminal: bool, expected: dict[str, float], pace: float = 1.0) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
    with RichProgress(console) as audience:
        if expected:
            audience.expect(expected)
        for name, seconds in STAGES.items():
            audience.stage(name, 4)
            for step in range(4):
                clock[0] += pace * seconds / 4
                audience.advance()
                audience.note(f"the note of step {step} is much longer than there is room for in a terminal")
                audience._bar.refresh()
    return file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("expected", [STAGES, {}])
def test_every_stage_leaves_a_line_that_fits(clock, terminal, expected):
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told(clock, terminal, expected)))
    assert max(map(len, lines)) <= 80
    for name, took in zip(STAGES, ("10 s", "30 s", "1 min"), strict=True):
        assert any(line.startswith(f"{name} ") and took in line and "the note of step 3" in line for line in lines)
    assert any("left" in line for line in lines) == terminal


@pytest.mark.parametrize(("pace", "least", "most"), [(1.0, 44, 46), (3.0, 60, 90), (0.0, 44, 46)])
def test_the_time_left_follows_the_pace(clock, pace, least, most):
    """Of stages that an earlier run did, which take no time, nothing is learnt of it."""
    number, unit = re.search(r"(\d+) (s|min) left held-out test", told(clock, True, STAGES, pace)).groups()
    assert least <= int(number) * (60 if unit == "min" else 1) <= most
