"""The stages of a search: its parts against formulas, and the whole on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_model
from fakes import SMALL_SEARCH, space_of, token_task
from scipy.special import rel_entr, softmax
from tiny_tokenizer import tiny_bpe

from peft_layerrope import SearchSettings, TaskError, evaluate, search
from peft_layerrope.scoring.scores import Interval
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
from peft_layerrope.searcher.plan import Rates, Schedule, grown, schedule_for
from peft_layerrope.searcher.settings import MIN_STEPS
from peft_layerrope.searcher.space import (
    FactorGrid,
    allowed_share,
    between,
    decay_family,
    farthest,
    first_and_rest_family,
    harm_of,
    per_layer_family,
    steepest,
)
from peft_layerrope.searcher.stages import SIMPLEST_FIRST, Stages

SMALL = SMALL_SEARCH


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
def test_scored_positions_are_spread_over_a_window_but_for_its_last(length):
    positions = scored_positions(length)
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


@pytest.mark.parametrize(("tokenizer", "length"), [(None, 200), (tiny_bpe(), 100)])
def test_a_text_that_cannot_be_used_is_not_left_out_in_silence(tmp_path, tokenizer, length):
    path = tmp_path / "text.txt"
    path.write_text("word " * 9000)
    with pytest.raises(TaskError, match=r"text=.*text\.txt"):
        read_windows(tokenizer, path, length)
    assert read_windows(tokenizer, None, length) == ()


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
    model.generation_config.repetition_penalty = 3.0  # of the model's own answers, not of its distribution
    assert sample_windows(model, 3, 20, seed=5) == first
    assert model.generation_config.repetition_penalty == 3.0


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
        (first_and_rest_family, [0.1, 0.4], [0.1, 0.4, 0.4, 0.4]),
        (decay_family, [0.1, 0.3], [0.1, 0.2, 0.3, 0.4]),
        (per_layer_family, [1, 2, 3, 4], [1, 2, 3, 4]),
    ],
)
def test_families_make_the_vectors_that_they_are_named_after(family, parameters, expected):
    np.testing.assert_allclose(family(space_of(4)) @ parameters, expected)
    some = family(space_of(4, scaled=(0, 3), sources=(0, 1, 0, 3)))  # layer 2 borrows keys, layer 1 is not free
    vector = some @ np.linspace(0.2, 0.5, some.shape[1])
    assert vector[1] == 0.0
    assert vector[2] == vector[0] != 0.0


@pytest.mark.parametrize("family", [per_layer_family, decay_family, first_and_rest_family])
def test_no_direction_gains_more_for_its_harm_than_the_steepest(family):
    """Though a layer may bear a smaller factor much better than a larger one."""
    rng = np.random.default_rng(0)
    made, curvature = family(space_of(4)), np.exp(rng.normal(0, 1, (2, 4)))
    slope = rng.normal(size=made.shape[1])

    def gain(direction):
        return slope @ direction / np.sqrt(harm_of(made @ direction, curvature))

    found = steepest(made, slope, curvature)
    assert np.linalg.norm(found) == pytest.approx(1)
    assert gain(found) >= max(gain(direction) for direction in rng.normal(size=(2000, made.shape[1]))) - 1e-9
    below, above = (harm_of(np.array([far, 0, 0, 0]), curvature) for far in (-0.2, 0.2))
    assert (below, above) == pytest.approx((0.02 * curvature[0, 0], 0.02 * curvature[1, 0]))


@pytest.mark.parametrize(("linear", "square"), [(2e-3, 0.0), (0.0, 3e-7), (2e-3, 3e-7)])
def test_the_time_of_long_prompts_is_told_by_that_of_shorter_ones(linear, square):
    def seconds(tokens: int) -> float:
        return linear * tokens + square * tokens**2

    assert grown(8055, [(n, seconds(n)) for n in (967, 1973)]) == pytest.approx(seconds(8055))


@pytest.mark.parametrize(("second", "seconds"), [(2.0, 8.0), (9.0, 144.0)])
def test_no_part_of_that_time_is_below_zero(second, seconds):
    """Where twice the tokens took less than twice as long, and where they took more than four times as long."""
    assert grown(8000, [(1000, 1.0), (2000, second)]) == pytest.approx(seconds)


def test_a_schedule_fits_into_the_time_that_there_is():
    rates = Rates(2.7, 1.5, 3.2)
    for algorithm, each in (("cma-es", 13), ("paper", 16 * 16)):
        settings = SearchSettings(algorithm=algorithm)
        shortest = Schedule.of(settings, MIN_STEPS, 24)
        for seconds in (3600, 7200, 10800):
            steps = schedule_for(seconds, rates, shortest).steps
            least, more = (sum(Schedule.of(settings, n, 24).seconds(rates).values()) for n in (steps, steps + 1))
            assert least <= seconds < more
            assert steps * each * rates.context >= 0.4 * seconds
        assert schedule_for(1, rates, shortest) == shortest


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


@pytest.mark.parametrize(
    ("divergence", "rise", "share"),
    [
        (0.036, 0.0, 0.5),  # a parabola
        (0.036, 0.045, 0.2),  # a straight line
        (0.0, 0.018, 0.5),
        (0.0101, 0.0, math.sqrt(0.009 / 0.0101)),
        (0.0095, -0.1, 1.0),  # near enough
        (0.009 / 1.2**3, 0.0, 1.2),  # a cube
        (0.001, 0.009 / 1.2**3, 1.2),
        (0.0, 0.0, 1.25),
        (math.nan, 0.0, 1.0),
    ],
)
def test_log_factors_become_as_large_as_the_bound_lets_them(divergence, rise, share):
    assert allowed_share(divergence, rise, 0.01) == pytest.approx(share)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 4.7])
def test_between_two_sizes_the_harm_is_taken_for_a_power_of_the_size(power):
    inside, outside = ((size, 0.004 * size**power) for size in (1.1, 2.6))
    assert 0.004 * between(inside, outside, 0.01) ** power == pytest.approx(0.009)
    assert between((1.0, 0.0095), (1.2, 0.02), 0.01) == 1.0


@pytest.mark.parametrize("power", [2.0, 3.0, 4.7])
@pytest.mark.parametrize("first", [0.001, 0.0071, 0.0102, 0.0198, 0.3])
def test_the_bound_is_used_but_for_little_however_fast_harm_grows(monkeypatch, power, first):
    """Harm in nats of what was found, and the power of the size by which it grows."""
    stages, log_factors = object.__new__(Stages), np.array([0.2, -0.1])
    stages.settings = SearchSettings(max_harm=0.01)

    def harm(vector: np.ndarray) -> Harm:
        return harmless(first * (vector[0] / log_factors[0]) ** power)

    monkeypatch.setattr(stages, "_rounded", lambda vector: vector, raising=False)
    monkeypatch.setattr(stages, "_harm_on_text", harm, raising=False)
    found = stages._within_bound(log_factors)
    assert found[1] / found[0] == pytest.approx(-0.5)
    used = harm(found).divergence.value
    assert used <= 0.01
    grown = found[0] / log_factors[0]
    assert used > 0.0085 or grown > 1.25**3 - 1e-9


@pytest.mark.parametrize(("first", "size"), [(0.001, 1.0), (0.0099, 1.0), (0.02, 0.67), (0.3, 0.17)])
def test_a_uniform_factor_is_made_smaller_where_it_breaks_the_bound_and_never_larger(monkeypatch, first, size):
    stages = object.__new__(Stages)
    stages.settings = SearchSettings(max_harm=0.01)
    monkeypatch.setattr(stages, "_rounded", lambda vector: vector, raising=False)
    monkeypatch.setattr(stages, "_harm_on_text", lambda v: harmless(first * (v[0] / 0.2) ** 2), raising=False)
    found = stages._within_bound(np.array([0.2, 0.2]), grow=False)
    assert found[0] == found[1] == pytest.approx(0.2 * size, abs=0.003)
    assert first * (found[0] / 0.2) ** 2 <= 0.01


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


def test_minutes_become_a_plan_that_repeats_the_search(tmp_path):
    plans, fields = [], {**SMALL, "steps": None, "minutes": 0.02, "test_minutes": 0.02}
    first = search(build_model("llama"), token_task(length=14), **fields, on_plan=plans.append)
    settled = first.settings
    assert settled.steps == plans[0].schedule.steps >= MIN_STEPS
    assert plans[0].search_seconds > 0
    again = search(build_model("llama"), token_task(length=14), replace(settled, minutes=99.0), progress=False)
    assert again.to_dict()["table"] == first.to_dict()["table"]


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


def test_a_search_for_few_different_factors_merges_what_it_found(tmp_path):
    wide = {**SMALL, "max_harm": None}
    fields = {**wide, "max_distinct": 2, "folder": tmp_path}
    found = search(build_model("llama"), token_task(length=14), **fields)
    any_number = search(build_model("llama"), token_task(length=14), **wide)
    factors = {row.name: set(row.factors) for row in found.table}
    assert max(map(len, factors.values())) == len(factors["per_layer"]) == 2
    assert len(set(any_number.table["per_layer"].factors)) > 2
    assert found.to_dict()["history"] == any_number.to_dict()["history"]
    again = search(build_model("llama"), token_task(length=14), **fields, resume=True)
    assert again.to_dict() == found.to_dict()


def test_layers_that_are_not_searched_count_among_the_different_factors():
    fields = {**SMALL, "max_harm": None, "max_distinct": 2, "layers_to_transform": (1, 2, 3)}
    found = search(build_model("llama"), token_task(length=14), **fields)
    factors = found.table["per_layer"].factors
    assert factors[0] == 1.0
    assert len(set(factors)) == 2


def test_no_scaling_is_the_unscaled_model_where_the_range_does_not_hold_1():
    fields = {**SMALL, "max_harm": None, "test_groups": 4, "grid": FactorGrid(min_factor=1.2)}
    model, task = build_model("llama"), token_task(length=14)
    found = search(model, task, **fields).table
    assert set(found["none"].factors) == {1.0}
    assert min(found["per_layer"].factors) >= 1.2
    expected = evaluate(build_model("llama"), task, num_groups=4)
    np.testing.assert_allclose(found["none"].scores.log_prob, expected.log_prob, atol=1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_harm_that_is_no_number_keeps_to_no_bound(kept):
    """As it was measured, and as a journal has it, which knows no such numbers."""
    broken = Interval(math.nan, math.nan, math.nan)
    if kept:
        broken = Interval.from_list([None] * 3)
    nothing = Interval(0.0, 0.0, 0.0)
    assert Harm(broken, nothing).exceeds(0.01)
    assert Harm(nothing, broken).exceeds(0.01)
    assert not Harm(nothing, nothing).exceeds(0.01)


def test_what_breaks_in_a_context_is_not_chosen():
    nothing = Harm(Interval(0.0, 0.0, 0.0))
    fitness = {"none": [0.1, 0.1, 0.12], "simple": [math.nan, 0.2, 0.2], "best": [0.5, 0.6, 0.55]}
    assert choose(fitness, dict.fromkeys(fitness, nothing), tuple(fitness), 0.01) == "best"


@pytest.mark.parametrize("layer", [0, 2])
def test_a_search_of_one_layer(layer):
    found = search(build_model("llama"), token_task(), **SMALL, layers_to_transform=(layer,))
    for row in found.table:
        assert all(factor == 1.0 for other, factor in enumerate(row.factors) if other != layer)
