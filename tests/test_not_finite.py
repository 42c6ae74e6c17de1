"""Scores that are not finite: a model without others is refused at once, a vector ranks last, all JSON is strict."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_model
from fakes import NO_GUARDS, SMALL_SEARCH, Formula, TaskWithShortPrompts, minus_distance, space_of, token_task
from test_search_record import record_values
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peft_layerrope import PositionScores, SearchSettings, TaskError, compare, demo_model_path, evaluate, search
from peft_layerrope.cli import app
from peft_layerrope.comparison import Comparison, comparison_markdown, summary_table
from peft_layerrope.comparison.contenders import Contender, parse_baseline
from peft_layerrope.errors import SearchError
from peft_layerrope.experiments.measuring import utilisation_difference
from peft_layerrope.experiments.report import held_out_section
from peft_layerrope.experiments.sweep import sweep_findings
from peft_layerrope.files import to_json
from peft_layerrope.report import fitness_remark
from peft_layerrope.runs import JOURNAL_NAME
from peft_layerrope.scoring.batching import judge
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.scoring.scores import WrittenAnswers
from peft_layerrope.searcher import Guards
from peft_layerrope.searcher.algorithms import run_strategy
from peft_layerrope.searcher.common import SearchJournal
from peft_layerrope.searcher.evaluator import HeatScores, Measurement, ModelEvaluator, clearly_worse, plan_heats
from peft_layerrope.searcher.gradient import GradientSteps
from peft_layerrope.searcher.memo import BudgetView, Memo
from peft_layerrope.searcher.result import read_record
from peft_layerrope.searcher.run import bootstrap_choice
from peft_layerrope.searcher.sensitivity import sensitivity

SMALL = {**SMALL_SEARCH, "bootstrap": 20}
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def strict(text: str) -> object:
    return json.loads(text, parse_constant=pytest.fail)


def broken(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = build_model("llama")
    with torch.no_grad():
        model.get_parameter(WEIGHT)[0, 0] = math.nan
    return model.to(dtype)


def overflowing() -> torch.nn.Module:
    """Finite weights, whose products leave the range of float16."""
    model = build_model("llama").half()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.fill_(300.0)
            layer.mlp.down_proj.weight.fill_(300.0)
    return model


SPLIT = token_task().split("search", 3)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (broken, (WEIGHT, "float32")),
        (lambda: broken(torch.bfloat16), (WEIGHT, "bfloat16")),
        (overflowing, ("float16",)),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda model: Scorer(model).score(SPLIT),
        lambda model: Scorer(model).write(SPLIT),
        lambda model: Scorer(model).generate(SPLIT),
        lambda model: evaluate(model, token_task(), num_groups=3),
        lambda model: compare(model, SPLIT, [parse_baseline("none")]),
        lambda model: search(model, TaskWithShortPrompts(), **SMALL),
        lambda model: sensitivity(model, token_task(), num_groups=2, progress=False),
    ],
    ids=["score", "write", "generate", "evaluate", "compare", "search", "sensitivity"],
)
def test_a_model_without_a_finite_score_is_refused(model, named, use):
    with pytest.raises(TaskError, match="finite") as raised:
        use(model())
    assert all(word in str(raised.value) for word in named)


def test_refusal_at_the_command_line_leaves_no_file(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    with torch.no_grad():
        model.get_parameter(WEIGHT)[0, 0] = math.nan
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(folder)
    task = ("--task", "kv_words", "--length", "128")
    output = tmp_path / "output"
    for arguments in (
        ("evaluate", str(folder), *task, "--groups", "2", "--json", str(tmp_path / "x.json"), "--output", str(output)),
        ("search", str(folder), *task, "--output", str(output)),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        assert WEIGHT in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_token_without_a_number_is_not_right():
    logits = torch.tensor([[math.nan, math.nan], [0.0, 5.0]])
    hits, values = judge(logits, torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    assert hits.tolist() == [False, True]
    assert math.isnan(values[0])


NAN_AT = (2.0,) * 5
RISING = (1.1, 1.3, 1.5, 1.7, 1.9)


def nan_at_the_top(vector, group):
    """Not a number from a mean of 1.7 on, beyond the optimum of every curve."""
    return math.nan if sum(vector) >= 8.5 else minus_distance(RISING)(vector, group)


@pytest.mark.parametrize("race", [True, False])
@pytest.mark.parametrize(
    "fields", [{"algorithm": name} for name in ("genetic", "greedy", "random")], ids=lambda f: f["algorithm"]
)
@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_a_vector_without_a_finite_score_never_wins(fields, race, worst):
    plan = plan_heats(16, race=race, has_short=True)
    value = lambda vector, group: worst if math.isnan(nan_at_the_top(vector, group)) else nan_at_the_top(vector, group)  # noqa: E731
    view = BudgetView(Memo(Formula(value, plan), plan, NO_GUARDS), race)
    first = view.evaluate([NAN_AT])  # enters first
    assert first == [-math.inf]
    settings = SearchSettings(population=8, generations=4, **fields)
    found = run_strategy(settings, space_of(5), view, random.Random(0), seeds=[1.0, 2.0])
    assert math.isfinite(found.fitness)
    assert sum(found.factors) < 8.5
    assert found.fitness >= max(view.fitness.values())
    assert all(not math.isnan(value) for value in view.fitness.values())


def test_scores_of_short_prompts_that_are_not_finite_violate_the_guard():
    plan = plan_heats(4, race=False, has_short=True)
    short = lambda vector: math.nan if vector == NAN_AT else 0.0  # noqa: E731
    view = BudgetView(Memo(Formula(lambda v, g: sum(v), plan, short=short), plan, Guards(None, 0.5)))
    view.evaluate([NAN_AT, (1.5,) * 5])
    assert view.best()[0] == (1.5,) * 5
    assert view.fitness[NAN_AT] == -math.inf


def test_racing_gives_them_up_and_the_bootstrap_leaves_them_out():
    assert clearly_worse([math.nan], [0.0])
    assert not clearly_worse([0.0], [0.0])
    known = {NAN_AT: np.array([math.nan, 1.0, 1.0, 1.0]), RISING: np.zeros(4)}
    assert bootstrap_choice(known, RISING, 4, 10, 0)["chosen_wins"] == 1


@pytest.fixture
def half_broken(monkeypatch):
    """Vectors whose first factor is 2, the best uniform one among them, have no finite score on the search split."""
    score = ModelEvaluator.score

    def with_nan(self, vectors, heat):
        found = score(self, vectors, heat)
        for vector, scores in found.items():
            if vector[0] == 2.0:
                scores.log_prob[:] = math.nan
        return found

    monkeypatch.setattr(ModelEvaluator, "score", with_nan)


def test_a_whole_search_with_vectors_that_break(tmp_path, half_broken):
    task = TaskWithShortPrompts(groups=20)
    result = search(build_model("llama"), task, folder=tmp_path / "run", **SMALL)
    assert all(row.factors[0] != 2.0 and math.isfinite(row.fitness) for row in result.table)
    assert any(vector[0] == 2.0 for vector in result.measurements)
    result.save(tmp_path / "out")
    assert "nan" not in (tmp_path / "out" / "README.md").read_text().lower().split()
    for path in (*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl")):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict(text)
    again = search(build_model("llama"), task, folder=tmp_path / "run", resume=True, **SMALL)
    assert to_json(again.to_dict()) == to_json(result.to_dict())


def test_an_unscaled_model_that_breaks_on_some_contexts_cannot_be_searched(monkeypatch):
    score = ModelEvaluator.score

    def with_nan(self, vectors, heat):
        found = score(self, vectors, heat)
        for scores in found.values():
            scores.log_prob[0] = math.nan
        return found

    monkeypatch.setattr(ModelEvaluator, "score", with_nan)
    with pytest.raises(SearchError, match="finite"):
        search(build_model("llama"), TaskWithShortPrompts(), **SMALL)


@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_gradient_that_is_not_finite_ends_the_steps(monkeypatch, tmp_path, good_steps):
    gradient, taken = GradientSteps._gradient, []

    def breaks(self, values):
        taken.append(gradient(self, values))
        return taken[-1] if len(taken) <= good_steps else taken[-1] * math.nan

    monkeypatch.setattr(GradientSteps, "_gradient", breaks)
    result = search(build_model("llama"), TaskWithShortPrompts(), folder=tmp_path, **SMALL)
    assert len(taken) == good_steps + 1
    assert all(math.isfinite(factor) for factor in result.config.layer_factors)
    entries = [strict(line) for line in (tmp_path / JOURNAL_NAME).read_text().splitlines()]
    assert any("gradient" in entry["value"]["reason"] for entry in entries if entry.get("kind") == "ended")
    assert (result.evaluations["gradient_steps"] > 0) == (good_steps > 0)


def scores_with(log_prob: float, right: bool) -> PositionScores:
    shape = (8, 3)
    correct = np.full(shape, right)
    written = WrittenAnswers(correct, None, np.ones(shape, dtype=np.int64), np.zeros(shape, dtype=bool))
    return PositionScores((0, 1, 2), correct, np.full(shape, log_prob), "accuracy", written)


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_a_contender_that_breaks_does_not_win_a_comparison_that_it_enters_first(measure):
    scores = {"broken": scores_with(math.nan, False), "good": scores_with(-1.0, True), "bad": scores_with(-2.0, False)}
    if measure == "loss":
        scores = {label: PositionScores(s.positions, s.correct, s.log_prob, "loss") for label, s in scores.items()}
    judged = {"by": "loss"} if measure == "loss" else {"by": "generate()", "metric": "m", "max_new_tokens": 1}
    split = {"name": "test", "groups": 8, "max_tokens": 9}
    found = Comparison(scores, {label: {} for label in scores}, {"name": "made up"}, split, judged)
    strict(to_json(found.to_dict()))
    assert not found.difference("good", "broken").excludes_zero() or measure == "accuracy"
    assert "good" in comparison_markdown(found)
    assert len(summary_table(found, "title").rows) == 3


@pytest.mark.parametrize(
    ("scores", "named"),
    [
        ({"a": (-1.0, True), "b": (-2.0, False)}, ()),
        ({"a": (-1.0, False), "b": (-2.0, True)}, ("a", "b")),
        ({"a": (-1.0, True), "b": (-2.0, True)}, ()),  # both are right as often
        ({"broken": (math.nan, True), "a": (-1.0, False)}, ("a", "broken")),
        ({"broken": (math.nan, False), "a": (-2.0, False), "b": (-1.0, True)}, ()),
    ],
)
def test_the_likeliest_answers_that_are_not_the_best_are_named(scores, named):
    remarks = fitness_remark({name: scores_with(*values) for name, values in scores.items()})
    assert [re.findall('"(.*?)"', remark) for remark in remarks] == ([list(named)] if named else [])
    assert not fitness_remark({"none were written": PositionScores((0,), np.ones((2, 1), bool), np.zeros((2, 1)))})


def test_a_sweep_does_not_choose_what_breaks():
    scores = {1.0: scores_with(-1.0, False), 1.5: scores_with(-1.0, True), 2.0: scores_with(math.nan, False)}
    broken_first = {2.0: scores[2.0], **scores}
    changes = {factor: utilisation_difference(one, scores[1.0]) for factor, one in scores.items()}
    assert "factor 1.5" in sweep_findings(broken_first, changes)[0]


def test_a_journal_with_such_scores_is_read_back(tmp_path):
    with SearchJournal(tmp_path, {}) as journal:
        journal.add_measurements({NAN_AT: Measurement((HeatScores((math.nan, 1.0), (0.0, 1.0)),))})
        journal.add_scores("test", {NAN_AT: scores_with(-math.inf, False)})
    assert len([strict(line) for line in (tmp_path / JOURNAL_NAME).read_text().splitlines()]) == 3
    with SearchJournal(tmp_path, {}, resume=True) as again:
        np.testing.assert_array_equal(again.measurements[NAN_AT].heats[0].values, (math.nan, 1.0))
        assert np.isnan(again.scores["test", NAN_AT].log_prob).all()


@pytest.mark.parametrize(
    ("loss", "interval", "cell"), [(2.0, (None, None), "2.000 [-inf, inf]"), (None, (None, None), "nan [-inf, inf]")]
)
def test_a_record_with_nulls_is_reported(tmp_path, loss, interval, cell):
    values = record_values()
    for row in values["table"]:
        row["test"] = {"positions": [0], "average_loss": loss, "average_loss_interval": list(interval)}
    (tmp_path / "search.json").write_text(to_json(values))
    assert held_out_section(read_record(tmp_path)).tables[0].rows[0][1] == cell


def test_json_is_strict_wherever_a_number_stands():
    values = {"a": math.nan, "b": [1.5, -math.inf, (math.inf, "NaN")], "c": {"d": np.float64("nan"), "e": True}}
    assert strict(to_json(values)) == {"a": None, "b": [1.5, None, [None, "NaN"]], "c": {"d": None, "e": True}}


def test_nothing_else_in_the_package_writes_json():
    """Hashes and texts that are parsed at once are no files."""
    package = Path(__file__).parent.parent / "peft_layerrope"
    writers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.name != "files.py"
        for line in path.read_text().splitlines()
        if "json.dump" in line and ("write" in line or "echo" in line)
    }
    assert not writers


def test_one_context_is_strict_json_at_the_command_line(tmp_path):
    path = tmp_path / "one.json"
    assert CliRunner().invoke(app, ["evaluate", "--length", "64", "--groups", "1", "--json", str(path)]).exit_code == 0
    low, high = strict(path.read_text())["scores"]["no scaling"]["average_accuracy_interval"]
    assert (low, high) == (0, 1)


def test_contenders_are_not_taken_for_the_model(monkeypatch):
    """The model is checked as it is, once; what a contender then gives is shown."""
    checked = []
    monkeypatch.setattr("peft_layerrope.scoring.scorer.check_finite", lambda model, *rest: checked.append(model))
    model = build_model("llama")
    compare(model, SPLIT, [parse_baseline("uniform:2"), Contender("no scaling")])
    assert checked == [model]
