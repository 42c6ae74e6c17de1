"""The search under a bound: its parts against formulas, and the whole on a tiny model."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, build_model
from fakes import token_task
from scipy.special import rel_entr, softmax
from tiny_tokenizer import tiny_bpe

from peft_layerrope import InvalidConfigError, TaskError, search
from peft_layerrope.scoring.scores import Interval
from peft_layerrope.searcher.bounded import SIMPLEST_FIRST
from peft_layerrope.searcher.families import (
    decay_family,
    farthest,
    first_and_rest_family,
    per_layer_family,
    uniform_family,
)
from peft_layerrope.searcher.harm import (
    NUM_WINDOWS,
    Harm,
    choose,
    divergences,
    losses,
    read_windows,
    sample_windows,
    scored_positions,
    window_logits,
)
from peft_layerrope.searcher.plan import Rates, Schedule, SilentProgress, schedule_for
from peft_layerrope.searcher.settings import MIN_STEPS

LAYERS = range(NUM_LAYERS)
SMALL = {
    "steps": MIN_STEPS,
    "test_groups": 4,
    "rope_type": "default",
    "progress": False,
}


def test_divergences_and_losses_of_a_window_are_those_of_their_formulas():
    model, window = build_model("llama"), tuple(range(3, 43))
    positions = list(range(len(window) - 1))
    with torch.no_grad():
        logits = window_logits(model, window, positions)
        other = logits + torch.linspace(-1, 1, logits.shape[-1])
    before, after = (softmax(part.double().numpy(), -1) for part in (logits, other))
    np.testing.assert_allclose(divergences(logits, other), rel_entr(before, after).sum(-1), rtol=1e-4)
    expected = -np.log(before[positions, window[1:]])
    np.testing.assert_allclose(losses(logits, window, positions), expected, rtol=1e-4)


@pytest.mark.parametrize("length", [2, 7, 128, 129, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_scored_positions_are_spread_over_a_window_but_for_its_last(length, seed):
    positions = scored_positions(length, seed)
    assert positions == sorted(set(positions))
    assert positions[0] >= 0
    assert positions[-1] <= length - 2
    assert len(positions) == min(128, length - 1)


def test_windows_are_pieces_of_the_file(tmp_path):
    tokenizer, text = tiny_bpe(), tmp_path / "text.txt"
    text.write_text(" ".join(f"{n} squared is {n * n}." for n in range(600)), encoding="utf-8")
    windows = read_windows(tokenizer, text, 200)
    assert [len(window) for window in windows] == [200] * NUM_WINDOWS
    lines = [tokenizer.decode(window).split(".")[1:-1] for window in windows]
    numbers = [[int(line.split()[0]) for line in part] for part in lines]
    assert all(part == list(range(part[0], part[-1] + 1)) for part in numbers)
    assert [part[0] for part in numbers] == sorted({part[0] for part in numbers})


@pytest.mark.parametrize("content", [b"too short", b"\xff\xfe\x00bad", None])
def test_a_file_that_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TaskError, match=r"text\.txt"):
        read_windows(tiny_bpe(), path, 200)


def test_what_a_model_writes_is_drawn_by_the_seed_alone():
    model = build_model("llama")
    torch.manual_seed(1)
    first = sample_windows(model, 3, 20, seed=5)
    state = torch.get_rng_state()
    assert sample_windows(model, 3, 20, seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sample_windows(model, 3, 20, seed=6) != first
    assert [len(window) for window in first] == [20] * 3


def test_what_a_model_writes_goes_on_from_what_people_wrote():
    model, read = build_model("llama"), (tuple(range(3, 43)), tuple(range(50, 90)))
    windows = sample_windows(model, 4, 40, seed=5, read=read)
    assert [len(window) for window in windows] == [40] * 4
    texts = [",".join(map(str, window)) for window in read]
    assert len({window[:10] for window in windows}) == 4
    assert all(any(",".join(map(str, window[:10])) in text for text in texts) for window in windows)
    assert not any(",".join(map(str, window)) in text for text in texts for window in windows)
    assert sample_windows(model, 4, 40, seed=5, read=read) == windows


@pytest.mark.parametrize(
    ("family", "parameters", "expected"),
    [
        (uniform_family, [0.5], [0.5] * 4),
        (first_and_rest_family, [0.1, 0.4], [0.1, 0.4, 0.4, 0.4]),
        (decay_family, [0.1, 0.3], [0.1, 0.2, 0.3, 0.4]),
        (per_layer_family, [1, 2, 3, 4], [1, 2, 3, 4]),
    ],
)
def test_families_make_the_vectors_that_they_are_named_after(family, parameters, expected):
    made = family(LAYERS, LAYERS)
    found = made.log_factors(np.array(parameters))
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(made.nearest(found), parameters)
    some = family((0, 1, 0, 3), (0, 3))  # layer 2 borrows keys, layer 1 is not free
    parameters = np.linspace(0.2, 0.5, some.basis.shape[1])
    vector = some.log_factors(parameters)
    assert vector[1] == 0.0
    assert vector[2] == vector[0] != 0.0


def test_a_schedule_fits_into_the_time_that_there_is():
    rates = Rates(2.7, 1.5)
    for seconds in (1200, 2400, 3600):
        steps = schedule_for(seconds, rates, 24).steps
        least, more = (sum(Schedule(n, 24).seconds(rates).values()) for n in (steps, steps + 1))
        assert least <= seconds < more
        assert steps * 13 * rates.context >= 0.4 * seconds
    assert schedule_for(1, rates, 24).steps == MIN_STEPS


@pytest.mark.parametrize(
    ("curvature", "slope", "divergence", "expected"),
    [
        (0.0, 0.0, 0.02, 0.1 * math.sqrt(0.5)),  # the divergence alone
        (2.0, 0.0, 1e-6, math.sqrt(0.01 / 2.0)),
        (2.0, 0.1, 1e-6, (-0.1 + math.sqrt(0.01 + 0.08)) / 4),
        (0.0, 0.1, 1e-6, 0.1),
        (0.0, -0.1, 1e-12, 1.0),  # never: as far as is tried at all
        (-1.0, 0.02, 1e-12, 1.0),  # it rises, but never to the bound
    ],
)
def test_how_far_a_uniform_factor_may_go(curvature, slope, divergence, expected):
    """Against the roots of the parabola, and of the divergence's own."""
    rise, beyond = (curvature * x * x + slope * x for x in (0.1, -0.1))
    assert farthest(0.1, divergence, rise, beyond, 0.01) == pytest.approx(expected)


def harmless(value: float = 0.0) -> Harm:
    return Harm(Interval(value, value - 0.002, value + 0.002), Interval(0.0, -0.01, 0.01))


@pytest.mark.parametrize(
    ("divergence", "rise", "first", "last", "exceeds"),
    [
        ((0.009, 0.011), (-0.01, 0.02), (-0.1, 0.0), (-0.02, 0.02), False),
        ((0.011, 0.013), (-0.01, 0.02), (-0.1, 0.0), (-0.02, 0.02), True),
        ((0.009, 0.011), (0.011, 0.02), (-0.1, 0.0), (-0.02, 0.02), True),
        ((0.009, 0.011), None, (-0.1, -0.04), (-0.02, 0.02), True),
        ((0.009, 0.011), None, (-0.1, 0.0), (-0.06, -0.031), True),
        ((np.nan, np.nan), None, (0.0, 0.0), (0.0, 0.0), True),
        ((0.009, 0.011), None, None, None, False),
    ],
)
def test_a_bound_is_broken_where_an_interval_lies_beyond_it(divergence, rise, first, last, exceeds):
    def interval(ends):
        return Interval(sum(ends) / 2, *ends) if ends is not None else None

    ends = (interval(first), interval(last)) if first is not None else None
    harm = Harm(interval(divergence), interval(rise), ends)
    assert harm.exceeds(0.01) is exceeds
    assert not harm.exceeds(None)


@pytest.mark.parametrize(
    ("gains", "harms", "chosen"),
    [
        ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), "none"),
        ((0, 1, 1, 1, 1), (0, 0, 0, 0, 0), "uniform_bounded"),
        ((0, 1, 1, 1, 2), (0, 0, 0, 0, 0), "per_layer"),
        ((0, 1, 1, 1, 2), (0, 0, 0, 0, 0.02), "uniform_bounded"),
        ((0, 1, 1, 1, 2), (0, 0, 0, 0, 0.0115), "per_layer"),  # not beyond the bound for sure
        ((0, -1, -1, -1, np.nan), (0, 0, 0, 0, 0), "none"),
        ((0, 1, 2, 1, 2.01), (0, 0, 0, 0, 0), "first_and_rest"),
    ],
)
def test_the_result_is_the_simplest_that_none_under_the_bound_clearly_beats(gains, harms, chosen):
    noise = np.random.default_rng(0).normal(0, 0.3, (5, 24))
    fitness = {name: gain + noise[i] for i, (name, gain) in enumerate(zip(SIMPLEST_FIRST, gains, strict=True))}
    harm = {name: harmless(value) for name, value in zip(SIMPLEST_FIRST, harms, strict=True)}
    assert choose(fitness, harm, SIMPLEST_FIRST, 0.01) == chosen


class Killed(BaseException):
    """Nothing may catch it."""


class Bomb(SilentProgress):
    """Goes off when it is told that a step is done for the `at`th time."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls = at, 0

    def advance(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise Killed


def test_a_search_finds_measures_and_says_what_it_found(tmp_path):
    result = search(build_model("llama"), token_task(length=14), **SMALL)
    assert [row.name for row in result.table] == ["none", "uniform", *SIMPLEST_FIRST[1:]]
    assert result.config.layer_factors == list(result.table[result.chosen].factors)
    for row in result.table:
        assert all(factor == round(factor, 2) for factor in row.factors)
        assert row.scores.correct.shape[0] == SMALL["test_groups"]
    assert len(set(result.table["uniform"].factors)) == 1
    assert len(set(result.table["first_and_rest"].factors[1:])) == 1
    depth = np.diff(result.table["decay"].factors)
    assert (depth >= 0).all() or (depth <= 0).all()
    none = result.table["none"]
    assert set(none.factors) == {1.0}
    assert none.harm.divergence.value == pytest.approx(0, abs=1e-6)
    result.save(tmp_path / "adapter")
    assert none.harm.loss_rise is None  # nobody's text has words of this task
    assert [interval.value for interval in none.harm.ends] == [0.0, 0.0]
    report = json.loads((tmp_path / "adapter" / "search.json").read_text())
    assert report["chosen"] == result.chosen
    assert {row["name"]: row["ordinary_text"]["divergence"][0] for row in report["table"]} == {
        row.name: round(row.harm.divergence.value, 6) for row in result.table
    }
    assert len(report["history"]) == SMALL["steps"]


def test_the_model_is_given_back_as_it_was():
    model = build_model("llama")
    before = model(input_ids=torch.arange(3, 30)[None]).logits
    requires = [p.requires_grad for p in model.parameters()]
    search(model, token_task(length=14), **SMALL)
    assert torch.equal(model(input_ids=torch.arange(3, 30)[None]).logits, before)
    assert [p.requires_grad for p in model.parameters()] == requires


def test_a_search_that_is_killed_ends_as_if_nothing_had_happened(tmp_path):
    task, counted = token_task(length=14), Bomb()
    whole = search(build_model("llama"), task, **{**SMALL, "progress": counted})
    for at in np.linspace(1, counted.calls, 7).astype(int):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            search(build_model("llama"), task, **{**SMALL, "progress": Bomb(at)}, folder=folder)
        again = search(build_model("llama"), task, **SMALL, folder=folder, resume=True)
        assert again.to_dict() == whole.to_dict()


def test_minutes_become_a_plan_that_repeats_the_search(tmp_path):
    plans, fields = [], {**SMALL, "steps": None, "minutes": 0.02, "test_minutes": 0.02}
    first = search(build_model("llama"), token_task(length=14), **fields, on_plan=plans.append)
    settled = first.settings
    assert settled.steps == plans[0].schedule.steps >= MIN_STEPS
    again = search(build_model("llama"), token_task(length=14), replace(settled, minutes=99.0), progress=False)
    assert again.to_dict()["table"] == first.to_dict()["table"]


def test_a_search_that_goes_on_refuses_other_settings(tmp_path):
    search(build_model("llama"), token_task(length=14), **SMALL, folder=tmp_path)
    with pytest.raises(InvalidConfigError, match="max_harm"):
        search(build_model("llama"), token_task(length=14), **SMALL, max_harm=0.5, folder=tmp_path, resume=True)


def test_enough_ends_the_climbs_and_keeps_what_they_found(tmp_path):
    fields, asked = {**SMALL, "steps": 8}, []

    def enough():
        asked.append(None)
        return len(asked) > 4

    first = search(build_model("llama"), token_task(length=14), **fields, folder=tmp_path, enough=enough)
    taken = len(first.to_dict()["history"])
    assert 1 <= taken < 8
    assert any(f"{taken} generations" in line for line in first.remarks())
    again = search(build_model("llama"), token_task(length=14), **fields, folder=tmp_path, resume=True)
    assert again.to_dict() == first.to_dict()
