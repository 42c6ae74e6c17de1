"""A comparison against candidates scored alone; interrupted anywhere it ends with the same result."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_model
from fakes import LimitedMemory, journal_of
from peft import get_peft_model
from test_candidates import state_of, trained_lora
from test_losses import windows
from test_scorer import random_split, with_greedy_answers

from peft_layerrope import (
    AdapterMismatchError,
    InvalidConfigError,
    LayerRopeConfig,
    LayerRopeError,
    PositionScores,
    TaskError,
)
from peft_layerrope.comparison import MAX_PARTS, Comparison, compare
from peft_layerrope.comparison.candidates import Candidate, parse_baseline
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.scoring.scores import difference_interval
from peft_layerrope.tasks.metrics import Judge

FACTORS = [1.0, 1.5, 2.0, 1.2]
GROUPS = 23  # no multiple of the number of parts


class Letters:
    """A tokenizer to which everything of three tokens is "x"."""

    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "x" if len(ids) == 3 else ""


JUDGE = Judge("contains_value", Letters(), 3)


def adapted(model):
    return get_peft_model(model, LayerRopeConfig(layer_factors=FACTORS))


@pytest.fixture
def model():
    return build_model("llama")


@pytest.fixture
def split(model):
    return with_greedy_answers(model, random_split(GROUPS))


@pytest.fixture
def candidates():
    return [
        parse_baseline("none"),
        Candidate.of_config("per layer", LayerRopeConfig(layer_factors=FACTORS)),
        parse_baseline("yarn:2"),
    ]


class KilledError(Exception):
    pass


def killed_at(step: int):
    """A progress that stops everything before a part."""

    def progress(label: str, done: int, total: int) -> None:
        if done == step:
            raise KilledError

    return progress


def as_json(comparison: Comparison) -> str:
    plain = {label: scores.to_plain() for label, scores in comparison.scores.items()}
    return json.dumps([comparison.to_dict(), plain])


def test_every_candidate_is_scored_on_the_same_examples(model, split, candidates):
    before = state_of(model)
    found = compare(model, split, candidates, task_description={"name": "random"})
    assert state_of(model) == before
    assert list(found.scores) == ["no scaling", "per layer", "yarn:2"]
    for label, alone in (("no scaling", model), ("per layer", adapted(build_model("llama")))):
        expected = Scorer(alone).score(split)
        np.testing.assert_array_equal(found.scores[label].correct, expected.correct)
        np.testing.assert_allclose(found.scores[label].log_prob, expected.log_prob, atol=2e-5)
    assert found.scores["no scaling"].correct.mean() > found.scores["per layer"].correct.mean()
    assert (found.baseline, found.measure) == ("no scaling", "accuracy")


def test_what_fits_into_memory_is_found_out_once_for_all_parts(model):
    memory, parts = LimitedMemory(model, 70), []
    baselines = [parse_baseline("none"), parse_baseline("uniform:1.5")]
    settings = {"batch_tokens": 1000, "progress": lambda label, done, total: parts.append(total)}
    found = compare(model, random_split(100), baselines, **settings)
    assert set(parts) == {20}
    assert len(memory.ran_out) == 2  # with 1,000 and 500 tokens at once, in the first part alone
    assert found.batch_tokens == 250


def test_differences_are_paired_by_context(model, split, candidates):
    found = compare(model, split, candidates)
    rows = {label: scores.correct.mean(axis=1) for label, scores in found.scores.items()}
    gap = found.difference("per layer", "no scaling")
    paired = difference_interval(rows["per layer"] - rows["no scaling"])
    assert (gap.low, gap.high) == pytest.approx((paired.low, paired.high))
    assert gap.value == pytest.approx(rows["per layer"].mean() - rows["no scaling"].mean())
    with pytest.raises(KeyError, match="best"):
        found.difference("best", "no scaling")


def test_the_report_says_all_of_it(model, split, candidates):
    found = compare(model, split, candidates, task_description={"name": "random", "seed": 0})
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["task"] == {"name": "random", "seed": 0}
    assert report["split"] == split.describe()
    assert report["judged"] == {"by": "teacher-forced"}
    assert report["candidates"]["per layer"]["layer_factors"] == FACTORS
    assert report["candidates"]["yarn:2"] == {"kind": "yarn", "numbers": [2.0]}
    assert report["scores"]["per layer"] == found.scores["per layer"].to_dict()
    gap = report["differences"]["per layer"]["no scaling"]
    assert report["differences"]["no scaling"]["per layer"] == pytest.approx(
        {"value": -gap["value"], "low": -gap["high"], "high": -gap["low"]}
    )
    assert sum(map(len, report["differences"].values())) == 6


def test_a_single_context_says_nothing(model, split, candidates):
    gap = compare(model, split.part([0]), candidates).to_dict()["differences"]["per layer"]["no scaling"]
    assert (gap["low"], gap["high"]) == (-1, 1)


@pytest.mark.parametrize("step", [0, 1, 9, 10, 17, 29])
def test_killed_anywhere_and_resumed_it_is_the_same(model, split, candidates, tmp_path, step):
    whole = compare(model, split, candidates, folder=tmp_path / "whole")
    with pytest.raises(KilledError):
        compare(model, split, candidates, folder=tmp_path / "killed", progress=killed_at(step))
    seen = []
    resumed = compare(
        model, split, candidates, folder=tmp_path / "killed", resume=True, progress=lambda *args: seen.append(args)
    )
    assert as_json(resumed) == as_json(whole) == as_json(compare(model, split, candidates))
    assert journal_of(tmp_path / "whole") == journal_of(tmp_path / "killed")
    total = MAX_PARTS * len(candidates)
    assert [done for _, done, _ in seen] == list(range(step, total + 1))
    assert {number for _, _, number in seen} == {total}
    assert seen[0][0] == candidates[step // MAX_PARTS].label


def test_resuming_a_finished_comparison_runs_nothing(model, split, candidates, tmp_path):
    whole = compare(model, split, candidates, folder=tmp_path)
    model.forward = None
    assert as_json(compare(model, split, candidates, folder=tmp_path, resume=True)) == as_json(whole)


def test_another_comparison_is_not_resumed(model, split, candidates, tmp_path):
    compare(model, split, candidates, folder=tmp_path)
    other = build_model("llama")
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    changed = Candidate.of_config("per layer", LayerRopeConfig(layer_factors=[1.0, 1.5, 2.0, 1.3]))
    answered = tuple(replace(example, answers=("x",)) for example in split.examples)
    rest = candidates[:1], candidates[2:]
    for message, attempt in (
        ("model was", (other, split, candidates)),
        ("dtype was", (build_model("llama").to(torch.bfloat16), split, candidates)),
        ("split.groups was 23 there and is 22 now", (model, split.part(range(22)), candidates)),
        (r"candidates.per layer.layer_factors was \[1.0,", (model, split, [*rest[0], changed, *rest[1]])),
        ("answers was", (model, replace(split, examples=answered), candidates)),
        ("candidates.yarn:2 was", (model, split, candidates[:2])),
    ):
        with pytest.raises(InvalidConfigError, match=message):
            compare(*attempt, folder=tmp_path, resume=True)
    forced = replace(split, examples=answered)
    compare(model, forced, candidates, folder=tmp_path / "forced")
    with pytest.raises(InvalidConfigError, match=r"judged\.by was"):
        compare(model, replace(forced, judge=JUDGE), candidates, folder=tmp_path / "forced", resume=True)


def test_folders_that_do_not_fit_are_refused(model, split, candidates, tmp_path):
    with pytest.raises(InvalidConfigError, match="needs the folder"):
        compare(model, split, candidates, resume=True)
    with pytest.raises(KilledError):
        compare(model, split, candidates, folder=tmp_path, progress=killed_at(3))
    with pytest.raises(InvalidConfigError, match="resume it"):
        compare(model, split, candidates, folder=tmp_path)
    file = tmp_path / "journal.jsonl"
    text = file.read_text()
    for damaged in ("[]\n", text.replace('"format": 1', '"format": 9'), text.replace('"accuracy"]', '"beauty"]')):
        file.write_text(damaged)
        with pytest.raises(InvalidConfigError, match=file.name):
            compare(model, split, candidates, folder=tmp_path, resume=True)


def test_overwriting_begins_anew_once_all_is_checked(model, split, candidates, tmp_path):
    whole = compare(model, split, candidates, folder=tmp_path / "whole")
    compare(model, split, candidates[1:], folder=tmp_path / "it")
    before = journal_of(tmp_path / "it")
    wrong = Candidate.of_config("wrong", LayerRopeConfig(layer_factors=[1.0] * 5))
    with pytest.raises(AdapterMismatchError):
        compare(model, split, [*candidates, wrong], folder=tmp_path / "it", overwrite=True)
    assert journal_of(tmp_path / "it") == before
    assert as_json(compare(model, split, candidates, folder=tmp_path / "it", overwrite=True)) == as_json(whole)
    assert journal_of(tmp_path / "it") == journal_of(tmp_path / "whole")


def test_everything_is_checked_before_anything_is_scored(model, split, candidates, tmp_path):
    trained_lora(tmp_path / "wide", build_model("llama", hidden_size=128))
    model.forward = None
    wrong = Candidate.of_config("wrong", LayerRopeConfig(layer_factors=[1.0] * 5))
    for added, error, message in (
        (wrong, AdapterMismatchError, "layer_factors has 5 entries, but llama has 4"),
        (Candidate.of_adapter(tmp_path / "wide"), LayerRopeError, "cannot load adapter"),
        (Candidate.of_adapter(tmp_path), LayerRopeError, "has no adapter_config.json"),
        (replace(candidates[1], label="yarn:2"), TaskError, "each of a label of its own"),
    ):
        with pytest.raises(error, match=message):
            compare(model, split, [*candidates, added], folder=tmp_path / "out")
    with pytest.raises(TaskError, match="must be at least one"):
        compare(model, split, [])
    with pytest.raises(TaskError, match="needs accepted answers"):
        compare(model, replace(split, judge=Judge("contains_value", Letters())), candidates, folder=tmp_path / "out")
    foreign = replace(split.examples[0], answer_ids=(1000,))
    with pytest.raises(TaskError, match="token id 1000 is outside"):
        compare(model, replace(split, examples=(foreign, *split.examples[1:])), candidates)
    assert not (tmp_path / "out").exists()


def test_a_split_with_a_judge_is_judged_by_what_is_written(model, split, candidates):
    """Of three tokens "x" is written, whatever the model writes."""
    model.generation_config.eos_token_id = None
    asked = replace(split, examples=tuple(replace(e, answers=("x",)) for e in split.examples), judge=JUDGE)
    found = compare(model, asked, candidates[:2])
    endless = build_model("llama")
    endless.generation_config.eos_token_id = None
    assert found.to_dict()["judged"] == {"by": "generate()", "metric": "contains_value", "max_new_tokens": 3}
    for label, alone in (("no scaling", model), ("per layer", adapted(endless))):
        expected = Scorer(alone).generate(asked)
        assert found.scores[label].correct.all()
        assert not expected.written.cut_off.any()
        for name in ("num_tokens", "cut_off", "strict"):
            np.testing.assert_array_equal(getattr(found.scores[label].written, name), getattr(expected.written, name))
    shorter = replace(asked, judge=Judge("contains_value", Letters(), 2))
    assert not compare(model, shorter, candidates[:1]).scores["no scaling"].correct.any()


def test_written_answers_are_kept_and_resumed(model, split, candidates, tmp_path):
    asked = replace(split, examples=tuple(replace(e, answers=("x",)) for e in split.examples), judge=JUDGE)
    whole = compare(model, asked, candidates, folder=tmp_path / "whole")
    with pytest.raises(KilledError):
        compare(model, asked, candidates, folder=tmp_path / "killed", progress=killed_at(13))
    assert as_json(compare(model, asked, candidates, folder=tmp_path / "killed", resume=True)) == as_json(whole)
    shorter = replace(asked, judge=Judge("contains_value", Letters(), 2))
    with pytest.raises(InvalidConfigError, match=r"judged\.max_new_tokens was 3 there and is 2 now"):
        compare(model, shorter, candidates, folder=tmp_path / "killed", resume=True)


def test_windows_of_text_are_compared_by_their_loss(model, candidates):
    split = windows(12)
    found = compare(model, split, candidates, num_buckets=4)
    assert found.measure == "loss"
    expected: PositionScores = Scorer(adapted(build_model("llama"))).bucket_losses(split, 4)
    assert found.scores["per layer"].positions == expected.positions
    np.testing.assert_allclose(found.scores["per layer"].log_prob, expected.log_prob, atol=2e-5)
    gap = found.difference("per layer", "no scaling").value
    losses = {label: report["average_loss"] for label, report in found.to_dict()["scores"].items()}
    assert gap == pytest.approx(losses["no scaling"] - losses["per layer"], abs=2e-6)
    assert found.to_dict()["difference_of"] == "minus the loss, in nats"
    with pytest.raises(TaskError, match="num_buckets=99 must be"):
        compare(model, split, candidates, num_buckets=99)


def test_overlapping_windows_have_the_same_buckets_in_every_part(model, candidates):
    late = windows(12, read=21)
    mixed = replace(late, examples=windows(1).examples + late.examples[1:])
    found, expected = (compare(model, split, candidates, num_buckets=2).scores["per layer"] for split in (mixed, late))
    assert found.positions == expected.positions == (21, 31)
    np.testing.assert_array_equal(found.log_prob, expected.log_prob)
