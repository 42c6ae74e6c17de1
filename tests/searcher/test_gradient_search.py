"""The search by gradients: its parts against formulas and finite differences, and the whole on a tiny model."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, build_model
from fakes import token_task
from peft import get_peft_model
from scipy.special import rel_entr, softmax
from tiny_tokenizer import tiny_bpe

from peft_layerrope import InvalidConfigError, LayerRopeConfig, TaskError, search
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.scoring.scores import Interval
from peft_layerrope.searcher.gradient import (
    FactorGradient,
    Slope,
    averaged,
    climb,
    decay_family,
    first_and_rest_family,
    per_layer_family,
    uniform_family,
)
from peft_layerrope.searcher.gradient_search import SIMPLEST_FIRST, farthest
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

LAYERS, LIMITS = range(NUM_LAYERS), (math.log(0.25), math.log(4))
START = np.log([1.2, 0.7, 1.5, 0.9])
SMALL = {
    "algorithm": "gradient",
    "steps": MIN_STEPS,
    "test_groups": 4,
    "rope_type": "default",
    "progress": False,
}


@pytest.fixture(params=["gradient", "cma-es"])
def small(request) -> dict[str, object]:
    """Settings of a search that is over in seconds."""
    return {**SMALL, "algorithm": request.param}


def with_adapter():
    model = build_model("llama")
    return get_peft_model(model, LayerRopeConfig(task_type="CAUSAL_LM", layer_factors=[1.0] * NUM_LAYERS))


def central(value, at: np.ndarray, h: float = 1e-4) -> np.ndarray:
    steps = np.eye(len(at)) * h
    return np.array([(value(at + step) - value(at - step)) / (2 * h) for step in steps])


def test_slopes_of_answers_are_those_of_their_mean_probability():
    model, split = with_adapter(), token_task(length=14).split("search", 3)
    gradient, scorer = FactorGradient(model), Scorer(model)

    def value(log_factors):
        model.base_model.set_layer_factors(np.exp(log_factors).tolist())
        return np.exp(scorer.score(split).log_prob).mean()

    expected = central(value, START)
    model.base_model.set_layer_factors([1.0] * NUM_LAYERS)
    found = gradient.of_answers(split, START)
    assert found.value == pytest.approx(value(START), rel=1e-4)
    assert np.abs(expected).max() > 1e-5
    np.testing.assert_allclose(found.gradient, expected, rtol=0.02, atol=np.abs(expected).max() / 50)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_what_activations_are_kept_is_given_up_where_memory_runs_out(error, monkeypatch):
    model, split, asked = with_adapter(), token_task(length=14).split("search", 2), []
    expected = FactorGradient(model).of_answers(split, START)

    @contextmanager
    def tight(layers, kept_bytes):
        asked.append(kept_bytes)
        if kept_bytes:
            raise error
        yield

    monkeypatch.setattr("peft_layerrope.searcher.gradient.recomputing", tight)
    found = FactorGradient(model).of_answers(split, START)
    assert asked[0] > 0
    assert set(asked[1:]) == {0}
    np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-5)


def test_slopes_of_the_divergence_are_those_of_its_formula():
    model, window = with_adapter(), tuple(range(3, 43))
    positions = scored_positions(len(window))
    gradient = FactorGradient(model)

    def distribution(log_factors):
        model.base_model.set_layer_factors(np.exp(log_factors).tolist())
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0, positions]
        return softmax(logits.double().numpy(), -1)

    def value(log_factors):
        return rel_entr(distribution(np.zeros(NUM_LAYERS)), distribution(log_factors)).sum(-1).mean()

    expected = central(value, START)
    model.base_model.set_layer_factors([1.3] * NUM_LAYERS)  # what is set says nothing
    found = gradient.of_divergence(window, positions, START)
    assert found.value == pytest.approx(value(START), rel=1e-3)
    np.testing.assert_allclose(found.gradient, expected, rtol=0.02, atol=3e-4)


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


def quadratic(target: np.ndarray, curvature: float = 0.5, noise: float = 0.0):
    """Fitness falls with the squared distance to a target, harm grows with that to the unscaled model."""
    rng = np.random.default_rng(0)

    def slopes(number, at):
        away = at - target
        noisy = -2 * away + rng.normal(0, noise, len(at))
        return Slope(-float(away @ away), noisy), Slope(curvature * float(at @ at), 2 * curvature * at)

    return slopes


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_without_a_bound_a_climb_gets_to_the_top(noise):
    target, family = np.array([0.3, -0.2, 0.1, -0.3]), per_layer_family(LAYERS, LAYERS)
    steps = list(climb(family, np.zeros(4), 60, quadratic(target, noise=noise), max_divergence=None, limits=LIMITS))
    np.testing.assert_allclose(averaged(steps), target, atol=0.03 + 0.3 * noise)


@pytest.mark.parametrize("bound", [0.01, 0.03])
def test_with_a_bound_it_stays_near_it_and_goes_the_right_way(bound):
    target, family = np.array([0.6, -0.4, 0.2, -0.6]), per_layer_family(LAYERS, LAYERS)
    steps = list(climb(family, np.zeros(4), 80, quadratic(target), max_divergence=bound, limits=LIMITS))
    found = averaged(steps)
    assert 0.5 * float(found @ found) == pytest.approx(bound, rel=0.3)
    assert found @ target / np.linalg.norm(found) / np.linalg.norm(target) > 0.98


def test_a_climb_ends_where_a_gradient_is_not_finite_and_stays_in_its_limits():
    def slopes(number, at):
        return Slope(0.0, np.full(4, 1.0 if number < 30 else np.nan)), Slope(0.0, np.zeros(4))

    limits = (-0.2, 0.3)
    steps = list(climb(per_layer_family(LAYERS, LAYERS), np.zeros(4), 50, slopes, max_divergence=None, limits=limits))
    assert len(steps) == 30
    np.testing.assert_allclose(steps[-1].log_factors, 0.3)


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
    rates = Rates(2.7, 7.0, 4.0)
    for seconds in (1200, 2400, 3600):
        for free, per_step in ((0, 2 * rates.context_gradient + rates.text_gradient), (24, 13 * rates.context)):
            schedule = schedule_for(seconds, rates, num_parameters=free)
            steps = schedule.steps
            least, more = (sum(Schedule(n, False, free).seconds(rates).values()) for n in (steps, steps + 1))
            assert least <= seconds < more
            assert steps * per_step >= 0.4 * seconds
    assert schedule_for(1, rates).steps == MIN_STEPS


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


def test_a_search_finds_measures_and_says_what_it_found(tmp_path, small):
    result = search(build_model("llama"), token_task(length=14), **small)
    assert [row.name for row in result.table] == ["none", "uniform", *SIMPLEST_FIRST[1:]]
    assert result.config.layer_factors == list(result.table[result.chosen].factors)
    for row in result.table:
        assert all(factor == round(factor, 2) for factor in row.factors)
        assert row.scores.correct.shape[0] == small["test_groups"]
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
    assert len(report["history"]) == small["steps"]


def test_the_model_is_given_back_as_it_was(small):
    model = build_model("llama")
    before = model(input_ids=torch.arange(3, 30)[None]).logits
    requires = [p.requires_grad for p in model.parameters()]
    search(model, token_task(length=14), **small)
    assert torch.equal(model(input_ids=torch.arange(3, 30)[None]).logits, before)
    assert [p.requires_grad for p in model.parameters()] == requires


def test_a_search_that_is_killed_ends_as_if_nothing_had_happened(tmp_path, small):
    task, counted = token_task(length=14), Bomb()
    whole = search(build_model("llama"), task, **{**small, "progress": counted})
    for at in np.linspace(1, counted.calls, 7).astype(int):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            search(build_model("llama"), task, **{**small, "progress": Bomb(at)}, folder=folder)
        again = search(build_model("llama"), task, **small, folder=folder, resume=True)
        assert again.to_dict() == whole.to_dict()


def test_minutes_become_a_plan_that_repeats_the_search(tmp_path, small):
    plans, fields = [], {**small, "steps": None, "minutes": 0.02, "test_minutes": 0.02}
    first = search(build_model("llama"), token_task(length=14), **fields, on_plan=plans.append)
    settled = first.settings
    assert settled.steps == plans[0].schedule.steps >= MIN_STEPS
    again = search(build_model("llama"), token_task(length=14), replace(settled, minutes=99.0), progress=False)
    assert again.to_dict()["table"] == first.to_dict()["table"]


def test_a_search_that_goes_on_refuses_other_settings(tmp_path, small):
    search(build_model("llama"), token_task(length=14), **small, folder=tmp_path)
    with pytest.raises(InvalidConfigError, match="max_harm"):
        search(build_model("llama"), token_task(length=14), **small, max_harm=0.5, folder=tmp_path, resume=True)


def test_enough_ends_the_climbs_and_keeps_what_they_found(tmp_path, small):
    fields, asked = {**small, "steps": 8}, []

    def enough():
        asked.append(None)
        return len(asked) > 4

    first = search(build_model("llama"), token_task(length=14), **fields, folder=tmp_path, enough=enough)
    taken = len(first.to_dict()["history"])
    assert 1 <= taken < 8
    what = {"gradient": f"{taken} gradient steps", "cma-es": f"{taken} generations"}[small["algorithm"]]
    assert any(what in line for line in first.remarks())
    again = search(build_model("llama"), token_task(length=14), **fields, folder=tmp_path, resume=True)
    assert again.to_dict() == first.to_dict()
