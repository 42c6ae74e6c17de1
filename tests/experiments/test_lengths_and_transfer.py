"""Extrapolation and transfer: every cell against a score by hand."""

from __future__ import annotations

import numpy as np
import pytest
from experiment_helpers import FACTORS, GROUPS, by_hand, short_task
from fakes import LimitedMemory
from transformers import AutoConfig, AutoModelForCausalLM

from peft_layerrope import LayerRopeConfig, demo_model_path
from peft_layerrope.comparison.candidates import NO_SCALING, Candidate
from peft_layerrope.errors import TaskError
from peft_layerrope.experiments import Measuring, default_lengths, window_and_task
from peft_layerrope.experiments.transfer import NTK, PI, run_extrapolation, run_transfer
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tasks.perplexity import Perplexity
from peft_layerrope.tasks.specification import TaskSpecification, make_task, task_of_length
from peft_layerrope.tuner.artifacts import save_adapter


@pytest.fixture
def adapter(tmp_path) -> str:
    folder = tmp_path / "mine"
    folder.mkdir()
    save_adapter(LayerRopeConfig(layer_factors=FACTORS), folder)
    return str(folder)


def test_extrapolation_scores_each_candidate_at_each_length(demo_model, demo_tokenizer, adapter):
    tasks = {length: short_task(demo_tokenizer, length) for length in (384, 192)}
    section = run_extrapolation(Measuring(demo_model, GROUPS), tasks, [Candidate.of_adapter(adapter)])
    assert list(section.data["scores"]) == ["192", "384"]
    for length, task in tasks.items():
        found = section.data["scores"][str(length)]
        plain = by_hand(demo_model, task)
        assert found[NO_SCALING] == plain.to_dict()
        assert found["mine"] == by_hand(demo_model, task, FACTORS).to_dict()
        if length <= 256:  # within the window there is nothing to match
            assert found[PI] == found[NTK] == plain.to_dict()
        else:
            for label, rope_type in ((PI, "linear"), (NTK, "dynamic")):
                config = AutoConfig.from_pretrained(demo_model_path())
                config.rope_parameters |= {"rope_type": rope_type, "factor": length / 256}
                matched = AutoModelForCausalLM.from_pretrained(demo_model_path(), config=config)
                assert found[label] == by_hand(matched, task).to_dict()
        gap = by_hand(demo_model, task, FACTORS).paired_difference(plain)
        gain = section.data["average_minus_baseline"][str(length)]["mine"]
        assert gain["value"] == pytest.approx(gap.value, abs=1e-6)
    assert section.findings[0].startswith("384 tokens (1.5×): mine ")


def test_extrapolation_of_a_loss(demo_model):
    ids = np.random.default_rng(0).integers(3, 500, 6000)
    tasks = {length: Perplexity(ids, length=length) for length in (64, 300)}
    section = run_extrapolation(Measuring(demo_model, 2), tasks, [])
    for length, task in tasks.items():
        expected = Scorer(demo_model).bucket_losses(task.split("test", 2)).to_dict()
        found = section.data["scores"][str(length)][NO_SCALING]
        for name in ("loss_by_position", "average_loss", "perplexity"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4)
    titles = [table.title for table in section.tables]
    assert titles == ["Loss (nats)", "Perplexity", "Difference to no scaling (nats)"]


def test_extrapolation_names_its_candidates_apart(demo_model, demo_tokenizer):
    with pytest.raises(TaskError, match="each of a label of its own"):
        run_extrapolation(Measuring(demo_model, 2), {192: short_task(demo_tokenizer, 192)}, [Candidate(NO_SCALING)])


def test_transfer_scores_each_adapter_in_each_cell(demo_model, demo_tokenizer, adapter):
    cells = {f"kv_words:{length}": short_task(demo_tokenizer, length) for length in (192, 320)}
    other = Candidate.of_config("other", LayerRopeConfig(layer_factors=[1.2] * 6))
    section = run_transfer(Measuring(demo_model, GROUPS), cells, [Candidate.of_adapter(adapter), other])
    for cell, task in cells.items():
        none, mine, second = (by_hand(demo_model, task, f) for f in (None, FACTORS, [1.2] * 6))
        expected = {NO_SCALING: none.to_dict(), "mine": mine.to_dict(), "other": second.to_dict()}
        assert section.data["scores"][cell] == expected
        gain = section.data["average_minus_none"]["mine"][cell]
        assert gain["value"] == pytest.approx(mine.paired_difference(none).value, abs=1e-6)
    assert [row[0] for row in section.tables[0].rows] == [NO_SCALING, "mine", "other"]
    assert len(section.findings) == 2


def test_transfer_of_accuracy_and_loss_in_one_matrix(demo_model, demo_tokenizer):
    text = Perplexity(np.random.default_rng(0).integers(3, 500, 3000), length=80)
    cells = {"words": short_task(demo_tokenizer, 192), "text": text}
    one = Candidate.of_config("one", LayerRopeConfig(layer_factors=[1.5] * 6))
    section = run_transfer(Measuring(demo_model, GROUPS), cells, [one])
    assert section.tables[0].header == ("adapter", "words (%)", "text (nats)")
    gain = section.data["average_minus_none"]["one"]["text"]["value"]
    shown = next(cell for cell in section.tables[1].rows[0][2:])
    assert float(shown.split(" ")[0]) == pytest.approx(-gain, abs=5e-4)  # shown as the change of the loss


def make(tokenizer):
    return lambda specification: make_task(specification, tokenizer, specification.length)


def test_a_task_that_cannot_fill_a_length_is_refused(demo_tokenizer):
    specification = TaskSpecification("kv_words", 512)
    assert task_of_length(make(demo_tokenizer), specification, 300).length == 300
    with pytest.raises(TaskError, match="cannot fill 5000 tokens: its prompts have"):
        task_of_length(make(demo_tokenizer), specification, 5000)
    with pytest.raises(TaskError, match="gold positions"):
        task_of_length(make(demo_tokenizer), specification, 20)


def test_default_lengths_say_what_they_leave_out(demo_tokenizer):
    tasks, refused = default_lengths(make(demo_tokenizer), TaskSpecification("kv_words", 512), 256, (0.05, 1, 2, 30))
    assert list(tasks) == [256, 512]
    assert list(refused) == [12, 7680]
    assert all(refused.values())


@pytest.mark.parametrize(("window", "lengths"), [(256, [256, 512]), (512, [512]), (None, [512]), (8, [512])])
def test_the_task_at_the_window_where_it_can_be(demo_tokenizer, window, lengths):
    tasks = window_and_task(make(demo_tokenizer), TaskSpecification("kv_words", 512), window)
    assert [task.length for task in tasks] == lengths


def test_a_model_without_a_window_has_nothing_to_extrapolate_from(monkeypatch, demo_model, demo_tokenizer):
    monkeypatch.setattr("peft_layerrope.experiments.trained_window", lambda model: None)
    with pytest.raises(TaskError, match="needs a length, and a trained window"):
        run_extrapolation(Measuring(demo_model, 2), {192: short_task(demo_tokenizer, 192)}, [])


def test_what_fits_into_memory_is_found_out_once(demo_model):
    memory = LimitedMemory(demo_model, 100)
    ids = np.random.default_rng(0).integers(3, 500, 12000)
    measuring = Measuring(demo_model, 40, 1000)
    run_extrapolation(measuring, {length: Perplexity(ids, length=length) for length in (64, 80, 96)}, [])
    assert len(memory.ran_out) == 3  # with 1,000, 500 and 250 tokens at once; the longer ones begin with 125
    assert measuring.batch_tokens == 125
