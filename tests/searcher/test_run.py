"""A whole search on a tiny model: honest splits, reproducible, nothing left behind."""

from __future__ import annotations

import json
import math
import random
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, VOCAB, build_model, logits
from fakes import SMALL_SEARCH, token_task
from families import build_tiny
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
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
from peft_layerrope.searcher import run
from peft_layerrope.searcher.evaluator import ModelEvaluator
from peft_layerrope.searcher.harm import Harm
from peft_layerrope.searcher.plan import SearchProgress
from peft_layerrope.searcher.result import ResultTable, read_record
from peft_layerrope.searcher.space import FactorGrid, sample_curve
from peft_layerrope.tuner.sites import find_stack

SMALL = SMALL_SEARCH
ROWS = ["none", "uniform", "uniform_bounded", "first_and_rest", "decay", "per_layer"]


@pytest.fixture(scope="module")
def task():
    return token_task(groups=60)


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
        assert all(factor == round(factor, 2) for factor in row.factors)
        np.testing.assert_allclose(row.scores.log_prob, scores_of(row.factors, split).log_prob, rtol=1e-4)
    assert set(result.table["none"].factors) == {1.0}
    assert len(set(result.table["uniform"].factors)) == 1
    assert len(set(result.table["first_and_rest"].factors[1:])) == 1
    depth = np.diff(result.table["decay"].factors)
    assert (depth >= 0).all() or (depth <= 0).all()


def test_the_adapter_holds_what_was_chosen(result):
    assert result.config.layer_factors == list(result.table[result.chosen].factors)
    assert result.remarks()[0].startswith("result: ")


def test_a_control_that_beats_the_search_is_what_the_folder_holds(task, monkeypatch, tmp_path):
    """Where layers had better not differ, and 1.3 is best."""

    def worth(factors) -> float:
        logs = np.log(factors)
        return math.exp(-1 - 30 * logs.std() - 4 * abs(logs.mean() - math.log(1.3)))

    def scores(self, vectors, split, written=False):
        shape, contexts = (split.num_groups, len(split.positions)), np.arange(split.num_groups)[:, None]
        noise = [0.1 * np.sin(contexts * sum(vector)) for vector in vectors]  # contexts differ
        found = [np.broadcast_to(math.log(worth(vector)) + n, shape) for vector, n in zip(vectors, noise, strict=True)]
        return [PositionScores(split.positions, one > -1.5, one) for one in found]

    monkeypatch.setattr(ModelEvaluator, "scores", scores)
    found = search(build_model("llama"), task, **SMALL, max_harm=None)
    found.save_pretrained(tmp_path)
    own = worth(found.table["per_layer"].factors)
    best = max(worth(row.factors) for row in found.table)
    assert best > 2 * own
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["layer_factors"]
    assert worth(saved) == best
    gain = found.difference(found.chosen, "none")  # the first sentence says what it is worth held out
    assert "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * end for end in gain.to_list())) in found.remarks()[0]
    assert ("not told from 0" in found.remarks()[0]) == (gain.low <= 0 <= gain.high)
    chosen = json.loads((tmp_path / "search.json").read_text())["chosen"]
    assert chosen != "per_layer"
    assert saved == list(found.table[chosen].factors)
    assert found.table[chosen].label in (tmp_path / "README.md").read_text()


def test_harm_is_measured_against_the_unscaled_model(result):
    harm = result.table["none"].harm
    assert harm.divergence.value == pytest.approx(0, abs=1e-6)
    assert harm.loss_rise is None  # nobody's text has words of this task
    assert [interval.value for interval in harm.ends] == [0.0, 0.0]
    assert any(row.harm.divergence.value > 0 for row in result.table)


def test_splits_share_nothing(result):
    assert [split["name"] for split in result.splits] == ["search", "validation", "test"]
    assert result.splits[2]["groups"] == SMALL["test_groups"]
    assert len({split["fingerprint"] for split in result.splits}) == 3


@pytest.mark.parametrize("pair", [("search", "validation"), ("search", "test"), ("validation", "test")])
def test_overlapping_splits_are_refused(pair):
    class Leaky(TokenTask):
        def split(self, name: str, num_groups: int) -> Split:
            return super().split(pair[0] if name == pair[1] else name, num_groups)

    groups = token_task(groups=60)._groups.values()
    with pytest.raises(TaskError, match=r"share \d+ contexts"):
        search(
            build_model("llama"), Leaky([example for some in groups for group in some for example in group]), **SMALL
        )


def test_the_papers_search_is_a_curve_by_the_utilisation_of_right_answers(task):
    weights, grid = (1.0, 2.0, 3.0), FactorGrid(1.0, 2.0, 0.25)
    fields = {"algorithm": "paper", "weights": weights, "grid": grid, "population": 6, "search_groups": 4}
    found = search(build_model("llama"), task, **SMALL, **fields)
    curve = found.table["per_layer"]
    split = task.split("search", found.splits[0]["groups"])
    start = sum(found.timing["plan"]["rounds"])  # contexts of the race
    members = list(dict.fromkeys(e.group for e in split.examples))[start : start + 4]
    split = replace(split, examples=tuple(e for e in split.examples if e.group in members))
    correct = scores_of(curve.factors, split).correct
    first, middle, last = correct[:, 0].mean(), correct[:, 1:-1].mean(), correct[:, -1].mean()
    assert curve.fitness == pytest.approx((first + 2 * middle + 3 * last) / 6)
    assert set(curve.factors) <= {1.0, *grid.values}
    values = [generation["fitness"] for generation in found.history]
    assert values == sorted(values)  # of the fittest so far
    assert len(values) == SMALL["steps"]
    if found.chosen == "per_layer":
        scaled = found.scaled_layers
        assert [curve.factors[i] for i in scaled] == grid.snap(sample_curve(found.control_points, len(scaled)))


def test_search_is_reproducible_and_depends_on_its_seed(result, task):
    np.random.seed(99)
    state = random.getstate(), np.random.get_state()
    again = search(build_model("llama"), task, **SMALL, seed=1)
    other = search(build_model("llama"), task, **SMALL, seed=2)
    assert random.getstate() == state[0]
    np.testing.assert_equal(np.random.get_state(), state[1])
    assert again.to_dict() == result.to_dict()
    assert other.history != result.history


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_other_rope_types(rope_type):
    found = search(build_model("llama"), token_task(), **SMALL, rope_type=rope_type, factor=2.0)
    assert (found.config.rope_type, found.config.factor) == (rope_type, 2.0)
    assert found.config.original_max_position_embeddings == (64 if rope_type == "dynamic" else None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(ids, training, fails):
    model = build_model("llama").train(training)
    model.lm_head.weight.requires_grad_(False)
    before, structure = logits(model, ids), repr(model)

    class Stop(SearchProgress):
        def stage(self, name: str, total: int) -> None:
            if fails and name == "choice on the validation split":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        search(model, token_task(), **{**SMALL, "progress": Stop()})
    assert torch.equal(logits(model, ids), before)
    assert repr(model) == structure
    assert not hasattr(model, "peft_config")
    assert model.training is training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
    assert "forward" not in model.model.layers[0].__dict__


def test_saved_folder_is_complete_and_loads(result, ids, tmp_path):
    result.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "search.json",
        "timing.json",
        "accuracy_by_position.png",
        "factors_by_depth.png",
        "gain_over_harm.png",
    }
    expected = get_peft_model(build_model("llama"), result.settings.adapter_config(result.config.layer_factors))
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(expected, ids))
    for plot in tmp_path.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_a_saved_search_has_the_tables_of_the_one_that_ended(result, tmp_path, measure):
    shifts = np.random.default_rng(0).normal(0, 0.1, (8, 3))
    rows = []
    for i, row in enumerate(result.table):
        scores = PositionScores((0, 5, 10), shifts > 0.05 * i, np.minimum(shifts - 1 - 0.1 * i, 0), measure)
        harm = Harm(Interval(0.01 * i, 0.0, 0.02 * i), Interval(-0.01, -0.02, 0.03))
        rows.append(replace(row, scores=scores, harm=harm))
    ended = replace(result, table=ResultTable(tuple(rows)))
    ended.save_pretrained(tmp_path)
    saved = read_record(tmp_path)
    assert saved.held_out_table() == ended.held_out_table()
    assert saved.choice_table() == ended.choice_table()
    assert ended.held_out_table().to_markdown() in (tmp_path / "README.md").read_text()
    assert {"KL", "text loss", "vs none", "vs uniform"} <= set(ended.held_out_table().header)


def test_report_says_what_it_stands_on(result, tmp_path):
    result.save_pretrained(tmp_path)
    report = json.loads((tmp_path / "search.json").read_text())
    assert [row["name"] for row in report["table"]] == ROWS
    assert report["layer_factors"] == result.config.layer_factors
    assert report["chosen"] == result.chosen
    assert report["splits"] == result.splits
    assert json.loads((tmp_path / "timing.json").read_text()) == result.timing
    assert report["settings"]["seed"] == 1
    assert len(report["history"]) == SMALL["steps"]
    for row in report["table"]:
        assert row["ordinary_text"]["divergence"][0] == round(result.table[row["name"]].harm.divergence.value, 6)
    last = report["table"][-1]
    assert set(last["average_accuracy_minus"]) == set(ROWS) - {last["name"]}
    for gap, low, high in last["average_accuracy_minus"].values():
        assert low <= gap <= high


def test_card_is_valid_and_shows_the_import(result, tmp_path):
    result.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model_relation == "adapter"
    assert "layer-rope" in card.data.tags
    assert "import peft_layerrope" in card.text
    assert card.data.eval_results[0].metric_value == round(result.table[result.chosen].scores.average().value, 4)


def test_a_model_with_a_shared_kv_cache_is_searched_with_tied_factors(task):
    model = build_tiny("gemma3n_text")
    sources = find_stack(model).key_sources
    assert sources != tuple(range(len(sources)))
    found = search(model, task, **SMALL)
    assert [row.name for row in found.table] == ROWS
    for row in found.table:
        assert row.factors == tuple(row.factors[source] for source in sources)
    assert set(found.scaled_layers) <= set(sources)
    split = task.split("test", SMALL["test_groups"])
    fresh = get_peft_model(build_tiny("gemma3n_text"), LayerRopeConfig(layer_factors=found.config.layer_factors))
    plain = Scorer(fresh).score(split).log_prob
    np.testing.assert_allclose(found.table[found.chosen].scores.log_prob, plain, rtol=1e-4)


@pytest.mark.parametrize("own", ["dynamic", "longrope"])
def test_a_model_whose_own_rotation_depends_on_the_length(task, own):
    extra = {"factor": 2.0}
    if own == "longrope":
        extra = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
    rope = {"rope_type": own, "rope_theta": 10_000.0, **extra}
    model = build_model("llama", rope_parameters=rope, max_position_embeddings=16)
    assert [row.name for row in search(model, task, **SMALL).table] == ROWS


def test_a_model_that_names_no_window(task):
    model = build_tiny("recurrent_gemma")
    assert getattr(model.config, "max_position_embeddings", None) is None
    assert search(model, task, **SMALL).model_window is None


@pytest.mark.parametrize(("patience", "whole"), [(0.0, False), (1e9, True)])
def test_a_slow_model_is_not_run_on_its_longest_prompts_before_the_plan(monkeypatch, patience, whole):
    monkeypatch.setattr(run, "_PATIENCE", patience)
    model, lengths = build_model("llama", max_position_embeddings=8192), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    plan = run.plan_search(model, token_task(length=5000), test_groups=4)
    assert plan.prompt_tokens == 5003
    assert (max(lengths) >= 5000) == whole
    assert max(lengths) >= 2000


def test_errors_come_before_any_work():
    gpt2 = AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=VOCAB)
    with pytest.raises(UnsupportedModelError):
        search(AutoModelForCausalLM.from_config(gpt2), token_task(), **SMALL)
    with pytest.raises(SearchError, match=r"prompts of 260 tokens: with a window of 64, .* reaches 256 tokens"):
        search(build_model("llama"), token_task(length=257), **SMALL)
    with pytest.raises(SearchError, match="pass either settings or fields of it, got both: seed"):
        search(build_model("llama"), token_task(), SearchSettings(), seed=1)
    with pytest.raises(SearchError, match="distinct layer indices from 0 to 3"):
        search(build_model("llama"), token_task(), **SMALL, layers_to_transform=(NUM_LAYERS,))
    with pytest.raises(TaskError, match="outside the model's vocabulary"):
        search(build_model("llama"), token_task(vocab=10 * VOCAB), **SMALL)


@pytest.mark.parametrize(("lost", "kept"), [(0.1, False), (0.01, True), (-0.1, True)])
def test_what_clearly_loses_where_something_is_to_be_kept_is_not_the_result(task, monkeypatch, tmp_path, lost, kept):
    """Each candidate that would be the result loses so much probability of the right answers, more or less."""

    def scores(self, vectors, split, written=False):
        contexts = 0.01 * np.sin(np.arange(split.num_groups))[:, None]  # they differ
        found = []
        for vector in vectors:
            scaled = set(vector) != {1.0}
            value = 0.5 - lost * scaled if split.name == "kept" else 0.3 + 0.2 * scaled
            spread = np.broadcast_to(np.log(value + contexts * (1 + scaled)), (split.num_groups, len(split.positions)))
            found.append(PositionScores(split.positions, spread > -1, spread))
        return found

    monkeypatch.setattr(ModelEvaluator, "scores", scores)
    plain = search(build_model("llama"), task, **SMALL, max_harm=None)
    assert plain.chosen != "none"
    found = search(build_model("llama"), task, **SMALL, max_harm=None, keep=token_task(groups=60, length=40, seed=7))
    assert found.chosen == (plain.chosen if kept else "none")
    assert found.history == plain.history
    change = found.table[plain.chosen].harm.kept
    assert change.low < -lost < change.high
    assert change.value == pytest.approx(-lost, abs=0.005)
    assert found.table["none"].harm.kept is None
    assert [split["name"] for split in found.splits] == ["search", "validation", "test", "kept"]
    found.save_pretrained(tmp_path)
    assert read_record(tmp_path).choice_table() == found.choice_table()
    assert "kept" in found.choice_table().header
    assert "kept" not in plain.choice_table().header
    assert sum(line.startswith("kept: ") for line in found.remarks()) == 1


def test_a_task_without_answers_cannot_be_kept(task):
    class Loss(TokenTask):
        def split(self, name: str, num_groups: int) -> Split:
            return replace(super().split(name, num_groups), measure="loss")

    examples = [example for some in token_task()._groups.values() for group in some for example in group]
    with pytest.raises(TaskError, match="keep"):
        search(build_model("llama"), task, **SMALL, keep=Loss(examples))
