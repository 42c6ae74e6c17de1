"""Scores that are not finite: a model without others is refused at once, a vector ranks last, all JSON is strict."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_model
from fakes import SMALL_SEARCH, token_task
from test_search_record import record_values
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peft_layerrope import LayerRopeConfig, PositionScores, TaskError, compare, demo_model_path, evaluate, search
from peft_layerrope.cli import app
from peft_layerrope.comparison import Comparison, comparison_markdown, summary_table
from peft_layerrope.comparison.candidates import Candidate, parse_baseline
from peft_layerrope.experiments import Measuring, utilization_difference
from peft_layerrope.experiments.by_position import sweep_findings
from peft_layerrope.experiments.layer_sensitivity import sensitivity
from peft_layerrope.experiments.report import held_out_section
from peft_layerrope.files import to_json
from peft_layerrope.report import fitness_remark
from peft_layerrope.scoring.batching import judge
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.scoring.scores import WrittenAnswers
from peft_layerrope.searcher import run
from peft_layerrope.searcher.evaluator import ModelEvaluator
from peft_layerrope.searcher.result import read_record

SMALL = SMALL_SEARCH
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
        lambda model: search(model, token_task(), **SMALL),
        lambda model: sensitivity(Measuring(model, 2), token_task(), LayerRopeConfig()),
    ],
    ids=["score", "write", "generate", "evaluate", "compare", "search", "sensitivity"],
)
def test_a_model_without_a_finite_score_is_refused(model, named, use):
    with pytest.raises(TaskError, match="finite") as raised:
        use(model())
    assert all(word in str(raised.value) for word in named)


def breaking_beyond(tokens: int) -> torch.nn.Module:
    """A model whose logits are no numbers in prompts of more tokens."""

    def spoil(module, args, kwargs, output):
        if kwargs["input_ids"].shape[1] > tokens:
            output.logits.fill_(math.nan)

    model = build_model("llama", max_position_embeddings=8192)
    model.register_forward_hook(spoil, with_kwargs=True)
    return model


def test_the_longest_prompt_of_a_split_is_looked_at():
    examples = token_task(length=60).split("search", 2).examples
    cut = tuple(replace(e, context_ids=e.context_ids[30:]) if e.group == 0 else e for e in examples)
    split = replace(SPLIT, examples=cut)
    Scorer(breaking_beyond(80)).check(split)
    with pytest.raises(TaskError, match="no finite score"):
        Scorer(breaking_beyond(50)).check(split)


def test_a_slow_model_is_checked_on_whole_prompts_before_a_search_begins(monkeypatch, tmp_path):
    """Its plan is made by shorter ones."""
    monkeypatch.setattr(run, "_PATIENCE", 0.0)
    with pytest.raises(TaskError, match="no finite score"):
        search(breaking_beyond(3000), token_task(length=5000), **SMALL, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
        assert f"stands in {WEIGHT};" in lines[0]  # by its name in the file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_token_without_a_number_is_not_right():
    logits = torch.tensor([[math.nan, math.nan], [0.0, 5.0]])
    hits, values = judge(logits, torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    assert hits.tolist() == [False, True]
    assert math.isnan(values[0])


@pytest.fixture
def half_broken(monkeypatch):
    """Vectors whose first factor is above 1.1 have no finite score, the best uniform ones among them."""
    scores = ModelEvaluator.scores

    def with_nan(self, vectors, *more):
        found = scores(self, vectors, *more)
        for vector, one in zip(vectors, found, strict=True):
            if vector[0] > 1.1:
                one.log_prob[:] = math.nan
        return found

    monkeypatch.setattr(ModelEvaluator, "scores", with_nan)


@pytest.mark.parametrize("algorithm", ["cma-es", "paper"])
def test_a_whole_search_with_vectors_that_break(tmp_path, half_broken, algorithm):
    task, fields = token_task(groups=60), {**SMALL, "algorithm": algorithm, "population": 4, "search_groups": 3}
    result = search(build_model("llama"), task, folder=tmp_path / "run", **fields)
    assert result.config.layer_factors[0] <= 1.1
    result.save_pretrained(tmp_path / "out")
    assert "nan" not in (tmp_path / "out" / "README.md").read_text().lower().split()
    for path in (*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl")):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict(text)
    again = search(build_model("llama"), task, folder=tmp_path / "run", resume=True, **fields)
    assert to_json(again.to_dict()) == to_json(result.to_dict())


def scores_with(log_prob: float, right: bool) -> PositionScores:
    shape = (8, 3)
    correct = np.full(shape, right)
    written = WrittenAnswers(correct, None, np.ones(shape, dtype=np.int64), np.zeros(shape, dtype=bool))
    return PositionScores((0, 1, 2), correct, np.full(shape, log_prob), "accuracy", written)


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_a_candidate_that_breaks_does_not_win_a_comparison_that_it_enters_first(measure):
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
    changes = {factor: utilization_difference(one, scores[1.0]) for factor, one in scores.items()}
    assert "factor 1.5" in sweep_findings(broken_first, changes)[0]


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


def test_candidates_are_not_taken_for_the_model(monkeypatch):
    """The model is checked as it is, once; what a candidate then gives is shown."""
    checked = []
    monkeypatch.setattr("peft_layerrope.scoring.scorer.check_finite", lambda model, *rest: checked.append(model))
    model = build_model("llama")
    compare(model, SPLIT, [parse_baseline("uniform:2"), Candidate("no scaling")])
    assert checked == [model]
