"""A whole search on a tiny model: honest splits, reproducible, nothing left behind."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import IS_OLDER, NUM_LAYERS, VOCAB, build_model, logits
from fakes import SMALL_SEARCH, TaskWithShortPrompts, token_task
from families import build_tiny
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM

from peft_layerrope import (
    LayerRopeConfig,
    PositionScores,
    SearchError,
    SearchSettings,
    Split,
    TaskError,
    TokenTask,
    UnsupportedModelError,
    search,
)
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.scoring.scores import Interval
from peft_layerrope.searcher import FactorGrid, Guards, ResultTable
from peft_layerrope.searcher.gradient import GradientSteps
from peft_layerrope.searcher.harm import Harm
from peft_layerrope.searcher.plan import SilentProgress
from peft_layerrope.searcher.result import read_record
from peft_layerrope.searcher.run import _Run
from peft_layerrope.searcher.space import sample_curve
from peft_layerrope.tuner.sites import find_stack

SMALL = {**SMALL_SEARCH, "share_mib": 8}
ROWS = ["none", "uniform", "first_layers_alone", "first_and_rest", "line", "random", "curve", "refined"]


@pytest.fixture(scope="module")
def task():
    return TaskWithShortPrompts()


@pytest.fixture(scope="module")
def result(task):
    return search(build_model("llama"), task, **SMALL, seed=1)


def scores_of(factors, split, **fields: object):
    """By plain scoring of a fresh model."""
    config = LayerRopeConfig(task_type="CAUSAL_LM", layer_factors=list(factors), **fields)
    return Scorer(get_peft_model(build_model("llama"), config)).score(split)


def test_table_has_every_method_on_the_same_test_split(result, task):
    assert [row.name for row in result.table] == ROWS
    split = task.split("test", SMALL["test_groups"])
    for row in result.table:
        np.testing.assert_allclose(row.scores.log_prob, scores_of(row.factors, split).log_prob, rtol=1e-5)


def test_search_fitness_is_the_utilisation_of_the_search_split(result, task):
    split = task.split("search", SMALL["search_groups"])
    for row in result.table:
        assert row.fitness == pytest.approx(scores_of(row.factors, split).log_prob_utilisation())
    for name in ("uniform", "first_layers_alone", "first_and_rest", "line", "curve"):  # which all had the unscaled one
        assert result.table[name].fitness >= result.table["none"].fitness
    for vector, values in list(result.measurements.items())[::15]:
        plain = scores_of(vector, split).utilisation_by_group("log_prob")
        np.testing.assert_allclose(values, plain[: len(values)], rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_validation_split_decides(task, seed):
    """The curve's best point is one of the candidates, so what is chosen is never worse there."""
    split = task.split("validation", SMALL["validation_groups"])
    found = search(build_model("llama"), task, **SMALL, seed=seed, controls=False, guards=Guards(None, None))
    refined, curve = (scores_of(found.table[name].factors, split) for name in ("refined", "curve"))
    assert refined.log_prob_utilisation() >= curve.log_prob_utilisation()


def test_splits_share_nothing(result, task):
    assert [split["name"] for split in result.splits] == ["search", "validation", "test", "search"]
    assert [split["groups"] for split in result.splits] == [4, 4, 6, 3]
    assert len({split["fingerprint"] for split in result.splits}) == 4
    assert result.splits[3]["max_tokens"] < result.splits[0]["max_tokens"] / 2 + 2
    assert result.guards["short_tokens"] == result.splits[3]["max_tokens"]


@pytest.mark.parametrize("pair", [("search", "validation"), ("search", "test"), ("validation", "test")])
def test_overlapping_splits_are_refused(task, pair):
    class Leaky(TaskWithShortPrompts):
        def split(self, name: str, num_groups: int) -> Split:
            return super().split(pair[0] if name == pair[1] else name, num_groups)

    with pytest.raises(TaskError, match=r"share \d+ contexts"):
        search(build_model("llama"), Leaky(groups=40), **SMALL)


def test_short_prompts_may_not_be_those_of_the_search():
    class Leaky(TaskWithShortPrompts):
        def shortened(self, length: int) -> TokenTask:
            return self

    with pytest.raises(TaskError, match="splits 'search' and 'search' share"):
        search(build_model("llama"), Leaky(), **SMALL)


@pytest.mark.parametrize("guards", [Guards(0.05, None), Guards(None, None)])
def test_without_the_guard_there_are_no_short_prompts(task, guards):
    found = search(build_model("llama"), task, **SMALL, guards=guards, controls=False, refine=False)
    assert [split["name"] for split in found.splits] == ["search", "validation", "test"]
    assert found.guards["short_loss"] == [None, None]


def short_split(task, groups: int) -> Split:
    return task.shortened(task.split("search", 1).max_tokens // 2).split("search", groups)


def has_lost(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the paired mean fell by more than its standard error."""
    drop = np.asarray(before, dtype=float) - after
    return drop.mean() - stats.sem(drop) > 1e-9


def has_spoilt_short_prompts(factors: Sequence[float], task, groups: int) -> bool:
    split = short_split(task, groups)
    return has_lost(*(scores_of(f, split).utilisation_by_group("log_prob") for f in ((1.0,) * NUM_LAYERS, factors)))


def test_the_papers_search_is_a_curve_by_the_utilisation_of_right_answers(task):
    weights = (1.0, 2.0, 3.0)
    found = search(build_model("llama"), task, **{**SMALL, "algorithm": "paper", "weights": weights})
    chosen = found.table[found.chosen]
    assert found.chosen == "curve"
    split = task.split("search", SMALL["search_groups"])
    correct = scores_of(chosen.factors, split).correct
    first, middle, last = correct[:, 0].mean(), correct[:, 1:-1].mean(), correct[:, -1].mean()
    assert chosen.fitness == pytest.approx((first + 2 * middle + 3 * last) / 6)
    scaled = found.config.scaled_layers
    curve = SMALL["grid"].snap(sample_curve(found.control_points, len(scaled)))
    assert [chosen.factors[layer] for layer in scaled] == curve
    assert found.evaluations["gradient_steps"] == found.evaluations["given_up_early"] == 0


@pytest.mark.parametrize(("algorithm", "seed"), [("genetic", 0), ("genetic", 1), ("random", 0)])
def test_what_is_chosen_keeps_to_the_guards(task, algorithm, seed):
    """Guards that hardly any vector keeps to."""
    sizes = {"search_groups": 8, "generations": 1, "validation_groups": 2, "test_groups": 2}
    fields = {**SMALL, **sizes, "algorithm": algorithm}
    guards = Guards(0.0, 0.0)
    found = search(build_model("llama"), task, **fields, controls=False, guards=guards, seed=seed)
    split, both = task.split("search", 8), ((1.0,) * NUM_LAYERS, found.config.layer_factors)
    tails = [scores_of(factors, split).correct[:, -1] for factors in both]
    losses = [-scores_of(factors, short_split(task, 3)).log_prob_utilisation() for factors in both]
    assert found.guards["tail_accuracy"] == pytest.approx([tail.mean() for tail in tails])
    assert found.guards["short_loss"] == pytest.approx(losses)
    assert not has_lost(*tails)
    assert not has_spoilt_short_prompts(both[1], task, 3)


@pytest.mark.parametrize("broken", ["guard", "race"])
def test_gradient_steps_offer_nothing_that_was_ruled_out(monkeypatch, broken):
    """A vector that breaks a guard, or was given up in a race, even if the validation split likes it best."""
    groups = 8 if broken == "guard" else 16  # without races, and with
    guards = Guards(None, 0.0 if broken == "guard" else None)
    fields = {**SMALL, "search_groups": groups, "generations": 0, "refine_evaluations": 0, "controls": False}
    task, rng = TaskWithShortPrompts(groups=40), random.Random(0)
    winner = search(build_model("llama"), task, **fields, guards=guards, refine=False).table["curve"].factors
    split = task.split("search", groups)

    def is_ruled_out(vector: tuple[float, ...]) -> bool:
        if broken == "guard":
            return has_spoilt_short_prompts(vector, task, fields["short_groups"])
        mine, best = (scores_of(v, split).utilisation_by_group("log_prob") for v in (vector, winner))
        return any(stats.ttest_rel(mine[:n], best[:n], alternative="less").pvalue < 0.05 for n in (4, 6, 8, 12))

    drawn = (tuple(rng.randrange(10, 21) / 10 for _ in range(NUM_LAYERS)) for _ in range(400))
    ruled_out = next(filter(is_ruled_out, drawn))
    liked = scores_of(ruled_out, task.split("validation", fields["validation_groups"])).log_prob
    monkeypatch.setattr(GradientSteps, "climb", lambda *args: [ruled_out])
    monkeypatch.setattr(_Run, "_utilisation", lambda self, scores: float(np.array_equal(scores.log_prob, liked)))
    found = search(build_model("llama"), task, **fields, guards=guards)
    assert ruled_out in found.measurements
    assert found.table["refined"].factors == winner


def test_without_memory_for_a_backward_pass_the_search_goes_on(monkeypatch, task):
    def climb(*args):
        raise TaskError("out of memory")

    expected = search(build_model("llama"), task, **{**SMALL, "gradient_steps": 0})
    monkeypatch.setattr(GradientSteps, "climb", climb)
    found = search(build_model("llama"), task, **SMALL)
    assert [row.factors for row in found.table] == [row.factors for row in expected.table]
    assert found.evaluations == expected.evaluations
    assert any("gradient steps were left out" in line for line in found.remarks())
    assert not any("gradient steps were left out" in line for line in expected.remarks())


def test_a_range_without_one_keeps_to_the_guards_or_leaves_the_model_alone(task):
    found = search(
        build_model("llama"),
        task,
        **{**SMALL, "grid": FactorGrid(2.0, 4.0, 0.5)},
        guards=Guards(0.0, 0.0),
        controls=False,
    )
    assert not has_spoilt_short_prompts(found.config.layer_factors, task, SMALL["short_groups"])


def test_controls_have_the_searchs_budget_or_exhaust_their_family(result):
    budget = result.evaluations["per_layer_search"]
    assert budget == result.table["refined"].evaluations
    assert result.table["random"].evaluations == budget
    for name in ("uniform", "first_layers_alone", "first_and_rest", "line"):
        assert result.table[name].exhaustive
    assert not result.table["random"].exhaustive  # of 5 ** 4


def test_the_adapter_holds_what_was_chosen(result):
    assert result.chosen == "refined"
    assert result.config.layer_factors == list(result.table["refined"].factors)
    assert result.table["curve"].fitness >= result.table["uniform"].fitness  # which it began with


@pytest.mark.parametrize("algorithm", ["genetic", "greedy", "random"])
def test_the_plan_is_an_upper_limit(task, algorithm):
    plans = []
    found = search(
        build_model("llama"),
        task,
        **{**SMALL, "algorithm": algorithm},
        controls=False,
        on_plan=plans.append,
        race=False,
    )
    (plan,) = plans
    searched = plan.num_evaluations - plan.evaluations["uniform factors"]
    assert found.evaluations["per_layer_search"] <= searched
    assert found.evaluations["all_methods"] <= plan.num_evaluations
    assert plan.tokens_per_evaluation > 0


class TestKeptApart:
    """Neither speed nor what else is searched changes what is found."""

    @pytest.mark.parametrize("fields", [{"share_mib": 0}, {"share_mib": 1}, {"controls": False}])
    def test_the_factors_are_the_same(self, result, task, fields):
        found = search(build_model("llama"), task, **{**SMALL, **fields}, seed=1)
        assert found.config.layer_factors == result.config.layer_factors
        names = [row.name for row in found.table]
        assert names == (ROWS if fields.get("controls", True) else ["none", "uniform", "curve", "refined"])
        for row in found.table:
            np.testing.assert_array_equal(row.scores.log_prob, result.table[row.name].scores.log_prob)


def test_search_is_reproducible_and_depends_on_its_seed(result, task):
    torch.manual_seed(99)
    state = torch.get_rng_state(), random.getstate()
    again = search(build_model("llama"), task, **SMALL, seed=1)
    other = search(build_model("llama"), task, **SMALL, seed=2, controls=False)
    assert random.getstate() == state[1]
    assert again.to_dict() == result.to_dict()
    assert other.history != result.history


def test_without_refinement_the_curve_is_chosen():
    found = search(build_model("llama"), token_task(), **SMALL, refine=False, controls=False)
    assert found.chosen == "curve"
    assert "refined" not in found.table


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
@pytest.mark.parametrize("objective", ["log_prob", "accuracy"])
def test_other_rope_types_and_objectives(rope_type, objective):
    found = search(
        build_model("llama"),
        token_task(),
        **SMALL,
        controls=False,
        rope_type=rope_type,
        factor=2.0,
        objective=objective,
    )
    assert (found.config.rope_type, found.config.factor) == (rope_type, 2.0)
    assert found.config.original_max_position_embeddings == (64 if rope_type == "dynamic" else None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(ids, training, fails):
    model = build_model("llama").train(training)
    model.lm_head.weight.requires_grad_(False)
    before, structure = logits(model, ids), repr(model)

    class Stop(SilentProgress):
        def stage(self, name: str, total: int) -> None:
            if fails and name == "coordinate steps":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        search(model, token_task(), **{**SMALL, "progress": Stop()}, controls=False)
    assert torch.equal(logits(model, ids), before)
    assert repr(model) == structure
    assert not hasattr(model, "peft_config")
    assert model.training is training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
    assert "forward" not in model.model.layers[0].__dict__


def test_saved_folder_is_complete_and_loads(result, ids, tmp_path):
    result.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "search.json",
        "timing.json",
        "accuracy_by_position.png",
        "factors_by_depth.png",
    }
    expected = get_peft_model(build_model("llama"), result.settings.adapter_config(result.config.layer_factors))
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(expected, ids))
    for plot in tmp_path.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_a_saved_search_has_the_tables_of_the_one_that_ended(result, tmp_path, measure, bounded):
    shifts = np.random.default_rng(0).normal(0, 0.1, (8, 3))
    rows = []
    for i, row in enumerate(result.table):
        scores = PositionScores((0, 5, 10), shifts > 0.05 * i, np.minimum(shifts - 1 - 0.1 * i, 0), measure)
        harm = Harm(Interval(0.01 * i, 0.0, 0.02 * i), Interval(-0.01, -0.02, 0.03)) if bounded else None
        name = "uniform_bounded" if bounded and row.name == "uniform" else row.name
        rows.append(replace(row, name=name, scores=scores, harm=harm))
    ended = replace(
        result,
        table=ResultTable(tuple(rows)),
        settings=replace(result.settings, algorithm="cma-es" if bounded else "genetic"),
        notes=("result", "harm", "cost"),
    )
    ended.save(tmp_path)
    saved = read_record(tmp_path)
    assert saved.held_out_table() == ended.held_out_table()
    assert saved.choice_table() == ended.choice_table()
    assert ended.held_out_table().to_markdown() in (tmp_path / "README.md").read_text()
    shown = [name in ended.held_out_table().header for name in ("KL", "vs none", "vs control")]
    assert shown == [bounded, bounded, not bounded]


def test_report_says_what_it_stands_on(result, tmp_path):
    result.save(tmp_path)
    report = json.loads((tmp_path / "search.json").read_text())
    assert [row["name"] for row in report["table"]] == ROWS
    assert report["layer_factors"] == result.config.layer_factors
    assert report["splits"] == result.splits
    assert json.loads((tmp_path / "timing.json").read_text()) == result.timing
    assert report["settings"]["seed"] == 1
    refined = report["table"][-1]
    assert set(refined["average_accuracy_minus"]) == set(ROWS) - {"refined"}
    for gap, low, high in refined["average_accuracy_minus"].values():
        assert low <= gap <= high


def test_card_is_valid_and_shows_the_import(result, tmp_path):
    result.save(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model_relation == "adapter"
    assert "layer-rope" in card.data.tags
    assert "import peft_layerrope" in card.text
    assert card.data.eval_results[0].metric_value == round(result.table["refined"].scores.average().value, 4)


def test_a_model_with_a_shared_kv_cache_is_searched_with_tied_factors(task):
    model = build_tiny("gemma3n_text")
    sources = find_stack(model).key_sources
    assert sources != tuple(range(len(sources)))
    found = search(model, task, **{**SMALL, "generations": 0, "grid": FactorGrid(1.0, 2.0, 0.5)})
    assert [row.name for row in found.table] == ROWS
    for vector in [*found.measurements, *(row.factors for row in found.table)]:
        assert vector == tuple(vector[source] for source in sources)
    assert set(found.config.scaled_layers) <= set(sources)
    assert found.timing["prefix_sharing"] is IS_OLDER  # transformers 5.0 shares keys through a cache only
    split = task.split("test", SMALL["test_groups"])
    fresh = get_peft_model(build_tiny("gemma3n_text"), LayerRopeConfig(layer_factors=found.config.layer_factors))
    plain = Scorer(fresh).score(split).log_prob
    np.testing.assert_allclose(found.table[found.chosen].scores.log_prob, plain, rtol=1e-5)


@pytest.mark.parametrize("own", ["dynamic", "longrope"])
def test_a_model_whose_own_rotation_depends_on_the_length(task, own):
    extra = {"factor": 2.0}
    if own == "longrope":
        extra = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
    rope = {"rope_type": own, "rope_theta": 10_000.0, **extra}
    model = build_model("llama", rope_parameters=rope, max_position_embeddings=16)
    assert search(model, task, **SMALL, controls=False).chosen == "refined"


def test_a_model_that_names_no_window(task):
    model = build_tiny("recurrent_gemma")
    assert getattr(model.config, "max_position_embeddings", None) is None
    assert search(model, task, **SMALL, controls=False, refine=False).model_window is None


def test_errors_come_before_any_work():
    gpt2 = AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=VOCAB)
    with pytest.raises(UnsupportedModelError):
        search(AutoModelForCausalLM.from_config(gpt2), token_task(), **SMALL)
    with pytest.raises(SearchError, match=r"prompts of 160 tokens: with a window of 64, .* reaches 128 tokens"):
        search(build_model("llama"), token_task(length=157), **SMALL)
    with pytest.raises(SearchError, match="pass either settings or fields of it, got both: seed"):
        search(build_model("llama"), token_task(), SearchSettings(), seed=1)
    with pytest.raises(TaskError, match="split 'search' has 8 groups, 50 were asked for"):
        search(build_model("llama"), token_task(), algorithm="genetic", search_groups=50)
    with pytest.raises(SearchError, match="distinct layer indices from 0 to 3"):
        search(build_model("llama"), token_task(), **SMALL, layers=(NUM_LAYERS,))
    with pytest.raises(TaskError, match="outside the model's vocabulary"):
        search(build_model("llama"), token_task(vocab=10 * VOCAB), **SMALL)
