"""u-shape, sweep and halves against scores by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import build_model
from experiment_helpers import FACTORS, GROUPS, Audience, by_hand, scores_of, short_task

from peft_layerrope import Example, LayerRopeConfig, TokenTask
from peft_layerrope.errors import AdapterMismatchError, LayerRopeError, TaskError
from peft_layerrope.experiments import Measuring, utilization_difference
from peft_layerrope.experiments.by_position import (
    describe_shape,
    half_vectors,
    run_halves,
    run_sweep,
    run_u_shape,
    sweep_findings,
)
from peft_layerrope.experiments.layer_sensitivity import run_sensitivity, sensitivity
from peft_layerrope.scoring.scores import Interval, difference_interval

UP, DOWN, FLAT = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1), Interval(0.0, -0.1, 0.1)


def test_u_shape_compares_the_middle_with_both_ends(demo_model, demo_tokenizer):
    tasks = [short_task(demo_tokenizer, 256), short_task(demo_tokenizer)]
    section = run_u_shape(Measuring(demo_model, 8), tasks)
    assert len(section.findings) == len(section.data["scores"]) == 2
    for task, (label, found) in zip(tasks, section.data["scores"].items(), strict=True):
        scores = by_hand(demo_model, task, groups=8)
        assert found == scores.to_dict()
        gap = difference_interval(scores.correct[:, 1:-1].mean(axis=1) - scores.correct[:, 0])
        assert section.data["middle_minus_first"][label]["value"] == pytest.approx(gap.value, abs=1e-6)
        assert section.data["middle_minus_first"][label]["low"] == pytest.approx(gap.low, abs=1e-6)
        gap = difference_interval(scores.correct[:, 1:-1].mean(axis=1) - scores.correct[:, -1])
        assert section.data["middle_minus_last"][label]["value"] == pytest.approx(gap.value, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        (DOWN, DOWN, "a dip in the middle"),
        (UP, UP, "no dip; the middle is better than both"),
        (DOWN, UP, "worse than the first position only"),
        (FLAT, DOWN, "worse than the last position only"),
        (FLAT, UP, "better than the last position"),
        (FLAT, FLAT, "no dip beyond noise"),
    ],
)
def test_shapes_have_names(first, last, text):
    assert text in describe_shape(first, last)


def test_sweep_scales_all_layers_by_one_factor(demo_model, demo_tokenizer):
    task = short_task(demo_tokenizer)
    section = run_sweep(Measuring(demo_model, GROUPS), task, LayerRopeConfig(), [2, 1.4])
    assert list(section.data["scores"]) == ["1", "1.4", "2"]
    assert section.data["scores"]["1"] == by_hand(demo_model, task).to_dict()
    assert section.data["scores"]["1.4"] == by_hand(demo_model, task, [1.4] * 6).to_dict()
    assert section.data["scores"]["2"] == by_hand(demo_model, task, [2.0] * 6).to_dict()


def test_sweep_keeps_the_rope_type_in_force(demo_model, demo_tokenizer):
    task = short_task(demo_tokenizer)
    config = LayerRopeConfig(rope_type="dynamic", factor=2.0)
    section = run_sweep(Measuring(demo_model, GROUPS), task, config, [1.5])
    dynamic = by_hand(demo_model, task, [1.5] * 6, rope_type="dynamic", factor=2.0)
    assert section.data["scores"]["1.5"] == dynamic.to_dict()
    assert "dynamic, factor 2 stays in force" in section.measured


@pytest.mark.parametrize("factors", [[], [1.0], [-1.0], [float("nan")], [True]])
def test_sweep_refuses_factors_that_cannot_work(demo_model, demo_tokenizer, factors):
    with pytest.raises(LayerRopeError):
        run_sweep(Measuring(demo_model, GROUPS), short_task(demo_tokenizer), LayerRopeConfig(), factors)


@pytest.mark.parametrize(
    ("tail", "text"), [([0] * 8, "Lost in the tail from factor 1.5 to 2"), ([1] * 8, "No loss in the tail")]
)
def test_a_loss_in_the_tail_is_said_only_beyond_noise(tail, text):
    unscaled = scores_of([[0, 0, 0]] * 8)
    best = scores_of([[1, 1, 1]] * 7 + [[1, 1, 0]])
    largest = scores_of([[1, 0, hit] for hit in tail])
    scores = {1.0: unscaled, 1.5: best, 2.0: largest}
    changes = {factor: utilization_difference(s, unscaled) for factor, s in scores.items()}
    lines = sweep_findings(scores, changes)
    assert "Highest U at factor 1.5" in lines[0]
    assert text in lines[1]


def test_a_best_factor_at_the_edge_says_so():
    scores = {1.0: scores_of([[0, 0, 0]] * 4), 2.0: scores_of([[1, 1, 1]] * 4)}
    changes = {factor: utilization_difference(s, scores[1.0]) for factor, s in scores.items()}
    assert "largest factor tried" in sweep_findings(scores, changes)[1]


@pytest.mark.parametrize(
    ("factors", "first", "last"),
    [
        ([1.1, 1.2, 1.3, 1.4], [1.1, 1.2, 1.0, 1.0], [1.0, 1.0, 1.3, 1.4]),
        ([1.1, 1.2, 1.3], [1.1, 1.0, 1.0], [1.0, 1.2, 1.3]),
    ],
)
def test_half_vectors(factors, first, last):
    vectors = list(half_vectors(factors).values())
    assert vectors == [[1.0] * len(factors), first, last, factors]


def test_halves_are_scored_as_by_hand(demo_model, demo_tokenizer, tmp_path):
    task, audience = short_task(demo_tokenizer), Audience()
    measuring = Measuring(demo_model, GROUPS, folder=tmp_path, audience=audience)
    config = LayerRopeConfig(layer_factors=FACTORS)
    section = run_halves(measuring, task, config)
    expected = {
        "no scaling": None,
        "first half": FACTORS[:3] + [1.0] * 3,
        "last half": [1.0] * 3 + FACTORS[3:],
        "all layers": FACTORS,
    }
    scores = {label: by_hand(demo_model, task, factors) for label, factors in expected.items()}
    assert section.data["scores"] == {label: s.to_dict() for label, s in scores.items()}
    gain = scores["first half"].paired_difference(scores["no scaling"])
    assert section.data["average_minus_none"]["first half"]["value"] == pytest.approx(gain.value, abs=1e-6)
    assert audience.stages == [["halves", 4 * GROUPS, 4 * GROUPS]]

    demo_model.forward = None  # nothing is left to run
    resumed = run_halves(replace(measuring, resume=True, audience=Audience()), task, config)
    assert resumed.data == section.data


def test_an_adapter_for_another_model_is_refused_before_any_work(demo_model, demo_tokenizer):
    with pytest.raises(AdapterMismatchError, match="2 entries, but the model has 6 decoder layers"):
        run_halves(Measuring(demo_model, 2), short_task(demo_tokenizer), LayerRopeConfig(layer_factors=[1.0, 2.0]))


def test_a_shared_kv_cache_keeps_its_layers_together():
    from peft_layerrope.experiments import with_factors

    model = build_model("llama")
    model.config.kv_source_layers = [0, 1, 1, 3]
    assert with_factors(model, LayerRopeConfig(), [1.1, 1.2, 1.3, 1.4]).layer_factors == [1.1, 1.2, 1.2, 1.4]


def test_sensitivity_is_that_of_its_own_command(demo_model, demo_tokenizer):
    task, audience = short_task(demo_tokenizer), Audience()
    section = run_sensitivity(Measuring(demo_model, GROUPS, audience=audience), task, LayerRopeConfig())
    result = sensitivity(Measuring(demo_model, GROUPS), task, LayerRopeConfig())
    assert section.data == result.to_dict()
    assert [finding.lower() for finding in section.findings] == [line.lower() for line in result.advice()]
    effect = result.of_layer(1)[2]
    assert section.tables[0].rows[1][5] == f"{100 * effect.accuracy_utilization:.1f}"
    assert section.tables[0].rows[1][6].startswith(f"{effect.log_prob_change.value:+.3f}")
    assert audience.stages[0][1] == audience.stages[0][2]


def _loss_task() -> TokenTask:
    rng = np.random.default_rng(0)

    class Windows(TokenTask):
        def split(self, name, num_groups):
            return replace(super().split(name, num_groups), measure="loss")

    examples = [
        Example((1,), (2,), tuple(rng.integers(3, 90, 30).tolist()), position=0, group=group) for group in range(10)
    ]
    return Windows(examples)


def test_losses_have_halves_but_no_shape():
    model, task = build_model("llama"), _loss_task()
    measuring = Measuring(model, 3)
    section = run_halves(measuring, task, LayerRopeConfig(layer_factors=[1.0, 1.2, 1.5, 2.0]))
    assert section.tables[0].header[2:4] == ("loss", "perplexity")
    assert not section.figures
    for run in (lambda: run_u_shape(measuring, [task]), lambda: run_sweep(measuring, task, LayerRopeConfig())):
        with pytest.raises(TaskError, match="measures a loss"):
            run()
