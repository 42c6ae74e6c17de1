"""The model card: what the Hub reads of it, that its snippets run, and that its owner's words stay."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, build_model, logits
from huggingface_hub import EvalResult, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from reference import hand_patched
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_layerrope
from peft_layerrope import InvalidConfigError, LayerRopeConfig, PositionScores, search
from peft_layerrope.cards import (
    ADAPTER_PLACEHOLDER,
    BEGIN,
    END,
    GENERATED,
    OWN_METRICS,
    HeldOut,
    has_own_text,
    merged,
    model_card,
    save_card,
)
from peft_layerrope.files import DEMO_NAME, demo_model_path, is_local_path, public_name
from peft_layerrope.scoring.scores import Interval
from peft_layerrope.tuner.artifacts import save_adapter

CONFIG = LayerRopeConfig(layer_factors=[1.0, 1.4, 2.0, 1.2], task_type="CAUSAL_LM")
DEMO_FACTORS = [1.5, 1.9, 1.6, 1.7, 1.4, 1.3]
EVERYTHING = {"accuracy_by_position.png", "factors_by_depth.png", "search.json", "search.yaml"}
TINY_SEARCH = {"steps": 1, "test_groups": 3, "progress": False}


def held_out(measure: str = "accuracy") -> HeldOut:
    rng = np.random.default_rng(0)
    scores = PositionScores((0, 5, 9), rng.random((40, 3)) < 0.7, -rng.random((40, 3)) - 1, measure)
    return HeldOut(
        scores,
        {"name": "some_task", "length": 512},
        "some_task, 512 tokens, 40 held-out contexts",
        "| method | accuracy |\n| --- | ---: |\n| no scaling | 12.3 |",
        ["cost: 12 evaluations."],
        {'"best uniform factor"': Interval(0.031, 0.012, 0.05)},
    )


def card(**arguments: object) -> ModelCard:
    return model_card(**{"base_model": "owner/base", "config": CONFIG, "held_out": held_out(), **arguments})


# what the Hub reads


def test_metadata():
    data = ModelCard(card().content).data  # as read back
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "owner/base", "text-generation")
    assert data["base_model_relation"] == "adapter"
    assert {"layer-rope", "long-context", "rope-scaling", "peft"} <= set(data.tags)
    assert data.license is None  # whose search it is, theirs is the choice
    assert card(base_model=DEMO_NAME).data.license == "apache-2.0"


def test_model_index_holds_the_scores():
    results = {result.metric_type: result for result in ModelCard(card().content).data.eval_results}
    scores = held_out().scores
    by_position = scores.correct.mean(axis=0)
    utilization = (0.8 * by_position[0] + by_position[1] + 1.2 * by_position[2]) / 3
    assert results["accuracy"].metric_value == pytest.approx(scores.correct.mean(), abs=1e-4)
    assert results["context_utilisation"].metric_value == pytest.approx(utilization, abs=1e-4)
    assert {result.dataset_type for result in results.values()} == {"some_task"}
    assert {result.dataset_split for result in results.values()} == {"test"}


def test_a_loss_is_reported_as_one():
    made = card(held_out=held_out("loss"), files=EVERYTHING)
    results = {result.metric_type: result.metric_value for result in made.data.eval_results}
    loss = -held_out("loss").scores.log_prob.mean()
    assert results == {"loss": pytest.approx(loss, abs=1e-4), "perplexity": pytest.approx(np.exp(loss), abs=1e-4)}
    assert f"**Loss {loss:.4f} nats per token**" in made.text
    assert '+0.0310 nats saved against "best uniform factor" (+0.0120 to +0.0500)' in made.text
    assert "loss by position" in made.text
    assert "Accuracy" not in made.text


def test_the_text_says_what_is_known():
    text = card(files=EVERYTHING).text
    interval = held_out().scores.average()
    for part in (
        f"**Accuracy {100 * interval.value:.1f} %** (95 % interval {100 * interval.low:.1f} to",
        '+3.1 points against "best uniform factor" (+1.2 to +5.0)',
        "| no scaling | 12.3 |",
        "- cost: 12 evaluations.",
        "![factor by depth](factors_by_depth.png)",
        "layerrope search --config search.yaml",
        "eprint = {2503.04355}",
        "eprint = {2606.27705}",
        "1 1.4 2 1.2",
    ):
        assert part in text
    bare = card(held_out=None).text
    for absent in (".png", "search.json", "search.yaml", "Held-out results"):
        assert absent not in bare


def test_a_dynamic_adapter_names_its_lengths():
    config = LayerRopeConfig(
        rope_type="dynamic", factor=2.0, layer_factors=[1.5, 1.5], original_max_position_embeddings=4096
    )
    text = card(config=config).text
    assert "4,096 tokens" in text
    assert "| `factor` | 2 |" in text
    assert "1.5 for every layer" in text
    assert "a KV cache keeps keys" in text


# snippets


@pytest.fixture(scope="module")
def demo_adapter(tmp_path_factory) -> Path:
    """An adapter of the demo model with its card, and a LoRA in `lora`."""
    folder = tmp_path_factory.mktemp("demo")
    base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    config = LayerRopeConfig(layer_factors=DEMO_FACTORS, task_type="CAUSAL_LM")
    config.base_model_name_or_path = DEMO_NAME
    save_adapter(config, folder)
    save_card(model_card(DEMO_NAME, config, adapter=str(folder)), folder)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "lora")
    return folder


def snippets(folder: Path) -> list[str]:
    text = (folder / "README.md").read_text()
    code = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    return [part.replace("path/or/hub-id/of/a/lora", str(folder / "lora")) for part in code]


LAST_LINES = ["(model, adapter)", "load_adapter(adapter)", "(model, adapter)", 'target_modules="all-linear"))']


@pytest.mark.parametrize("number", range(4))
def test_snippets_run(number, demo_adapter, ids):
    code = snippets(demo_adapter)
    assert [part.strip().endswith(line) for part, line in zip(code, LAST_LINES, strict=True)] == [True] * 4
    assert code[number].startswith("import peft_layerrope\n")
    names: dict = {}
    exec(compile(code[number], "snippet", "exec"), names)
    model = names["pipe"].model if "pipe" in names else names["model"]
    wanted = hand_patched(AutoModelForCausalLM.from_pretrained(demo_model_path()), DEMO_FACTORS)
    if number == 2:
        wanted = PeftModel.from_pretrained(wanted, demo_adapter / "lora")
    torch.testing.assert_close(logits(model.eval(), ids), logits(wanted.eval(), ids), atol=1e-4, rtol=1e-4)
    assert any("lora_A" in name for name, _ in model.named_parameters()) == (number >= 2)
    if "pipe" in names:
        assert names["pipe"]("baba dab fob , ? baba", max_new_tokens=2)[0]["generated_text"]


def test_a_card_for_another_place_has_other_names_and_the_same_results():
    outside = 'adapter = "mine"'
    first = card(files=EVERYTHING)
    first.text = f"{outside}\n{first.text}"
    for adapter, base in (("owner/one", "owner/base"), ("owner/two", "owner/other")):  # also when it moves
        first = merged(first, model_card(base, CONFIG, adapter=adapter, earlier=first))
        assert first.text.count(f'adapter = "{adapter}"') == first.text.count(f'base = "{base}"') == 4
        assert (first.data.base_model, first.data.model_name) == (base, f"per-layer RoPE scaling for {base}")
    assert ADAPTER_PLACEHOLDER not in first.text
    assert "owner/one" not in first.text
    assert first.text.startswith(outside)
    assert first.text.partition("## Held-out")[2] == card(files=EVERYTHING).text.partition("## Held-out")[2]
    assert [r.metric_value for r in first.data.eval_results] == [r.metric_value for r in card().data.eval_results]


@pytest.mark.parametrize(
    "name", ['x"\nimport os; os.system("id")', "<script>alert(1)</script>", "`a` | b", "a\x1b[31m"]
)
def test_a_base_models_name_is_no_code_and_no_markup(name):
    found = card(base_model=name, held_out=None)
    for letter in '"<>|\x1b\n`':
        assert letter not in found.data.base_model
    assert len(re.findall(r"^base = (.*)$", found.text, re.MULTILINE)) == 4
    assert all(
        ast.literal_eval(line) == found.data.base_model for line in re.findall(r"^base = (.*)$", found.text, re.M)
    )
    assert f"# Per-layer RoPE scaling for {found.data.base_model}\n" in found.text


# names


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("/some/where/my-model", "my-model"),
        ("/some/where/my-model/", "my-model"),
        ("~/my-model", "my-model"),
        ("./my-model", "my-model"),
        ("../my-model", "my-model"),
        ("models/sizes/my-model", "my-model"),
        (r"C:\models\my-model", "my-model"),
        ("/home/me/.cache/huggingface/hub/models--owner--name/snapshots/0123abcd", "owner/name"),
        ("/home/me/.cache/huggingface/hub/models--owner--two--dashes/snapshots/0123abcd", "owner/two--dashes"),
    ],
)
def test_public_names(name, public):
    assert public_name(name) == public
    assert is_local_path(name) == (name != public)


def test_a_folder_in_the_working_directory_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_local_path("owner/name")
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    assert public_name("owner/name") == "name"
    assert public_name(demo_model_path()) == DEMO_NAME


@pytest.fixture(scope="module")
def local_search(tmp_path_factory):
    """A search on a model that was loaded from a folder."""
    folder = tmp_path_factory.mktemp("somewhere") / "my-model"
    AutoModelForCausalLM.from_pretrained(demo_model_path()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    task = peft_layerrope.KeyValueWords(AutoTokenizer.from_pretrained(folder), 64, num_positions=3)
    return folder, search(model, task, **TINY_SEARCH)


def test_no_saved_file_names_the_folder_of_the_base_model(local_search, tmp_path):
    source, result = local_search
    result.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "my-model"
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "my-model"
    for path in tmp_path.rglob("*"):
        assert str(source.parent).encode() not in path.read_bytes(), path
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path)
    assert reloaded.peft_config["default"].layer_factors == result.config.layer_factors


def test_a_searchs_card_holds_its_scores_and_plots(local_search, tmp_path):
    result = local_search[1]
    result.save_pretrained(tmp_path)
    saved = ModelCard.load(tmp_path / "README.md")
    scores = result.table[result.chosen].scores
    assert saved.data.eval_results[0].metric_value == pytest.approx(scores.correct.mean(), abs=1e-4)
    for image in re.findall(r"!\[.*?\]\((.*?)\)", saved.text):
        assert (tmp_path / image).is_file()
    assert saved.text.count("![") == 3


# saving again

USERS_CARD = """---
license: mit
language:
- en
my_key:
  nested: [1, 2]
tags:
- my-tag
model-index:
- name: mine
  results:
  - task:
      type: text-generation
    dataset:
      name: Other data
      type: other/data
    metrics:
    - type: f1
      value: 0.5
---

# My adapter

Words of mine.
"""


def check_users_part(saved: ModelCard) -> None:
    assert "# My adapter\n\nWords of mine." in saved.text
    assert saved.data.license == "mit"
    assert saved.data.language == ["en"]
    assert saved.data["my_key"] == {"nested": [1, 2]}
    assert "my-tag" in saved.data.tags
    assert saved.data.model_name == "mine"
    others = [result for result in saved.data.eval_results if result.dataset_type == "other/data"]
    assert [(result.metric_type, result.metric_value) for result in others] == [("f1", 0.5)]


def test_a_users_card_is_kept_whole(tmp_path):
    (tmp_path / "README.md").write_text(USERS_CARD)
    save_card(card(), tmp_path)
    saved = ModelCard.load(tmp_path / "README.md")
    check_users_part(saved)
    assert saved.text.index("Words of mine.") < saved.text.index(BEGIN)
    assert saved.data.base_model == "owner/base"
    assert "layer-rope" in saved.data.tags
    assert {result.metric_name for result in saved.data.eval_results} > set(OWN_METRICS[:2])


def test_saving_again_changes_the_generated_part_only(tmp_path):
    (tmp_path / "README.md").write_text(USERS_CARD)
    save_card(card(), tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## More of mine\n")
    save_card(card(), tmp_path)
    once = path.read_text()
    save_card(card(), tmp_path)
    assert path.read_text() == once
    other = LayerRopeConfig(layer_factors=[3.0] * NUM_LAYERS)
    save_card(model_card("owner/other", other, held_out("loss")), tmp_path)
    saved = ModelCard.load(path)
    check_users_part(saved)
    assert saved.text.rstrip().endswith("## More of mine")
    assert saved.text.count(BEGIN) == saved.text.count(END) == 1
    assert saved.data.base_model == "owner/other"
    assert "1 1.4 2 1.2" not in saved.text
    # the earlier search's scores are not those of these factors
    kinds = {result.metric_type for result in saved.data.eval_results}
    assert kinds == {"loss", "perplexity", "f1"}


@pytest.mark.parametrize("stray", [BEGIN, END])
def test_a_stray_marker_swallows_nothing(stray, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n{stray}\nmine\n")
    for _ in range(2):
        save_card(card(), tmp_path)
    saved = ModelCard.load(tmp_path / "README.md")
    assert "mine" in saved.text
    assert len(GENERATED.findall(saved.text)) == 1


def test_windows_line_ends_stay(tmp_path):
    (tmp_path / "README.md").write_bytes(USERS_CARD.replace("\n", "\r\n").encode())
    save_card(card(), tmp_path)
    content = (tmp_path / "README.md").read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n")


@pytest.mark.parametrize("metadata", ["a: [", "- a list", "model-index: [{name: x}]"])
def test_a_card_that_cannot_be_read_is_left_alone(metadata, tmp_path):
    text = f"---\n{metadata}\n---\nmine\n"
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(InvalidConfigError, match=r"README\.md: its metadata cannot be read") as caught:
        save_card(card(), tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "README.md").read_text() == text


def test_results_on_our_task_by_others_stay():
    mine = EvalResult("text-generation", "some_task", "Some task", "f1", 0.1, metric_name="their own measure")
    existing = card()
    existing.data.eval_results.append(mine)
    again = merged(existing, card())
    assert sum(result.metric_name == "their own measure" for result in again.data.eval_results) == 1
    assert len(again.data.eval_results) == 3


# PEFT's own save


def test_peft_keeps_the_card_when_it_saves(tmp_path):
    """It puts its own tags in the place of ours; saving or pushing ours puts those back."""
    build_model("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CONFIG)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "README.md").write_text(USERS_CARD.replace("- my-tag", "- layer-rope"))
    save_card(card(), folder)
    before = ModelCard.load(folder / "README.md")
    model.save_pretrained(folder)
    after = ModelCard.load(folder / "README.md")
    assert before.text.strip() in after.text
    assert after.data.eval_results == before.data.eval_results
    assert after.data["my_key"] == {"nested": [1, 2]}
    save_card(card(), folder)
    last = ModelCard.load(folder / "README.md")
    assert "# My adapter\n\nWords of mine." in last.text
    assert len(GENERATED.findall(last.text)) == 1
    assert last.data.base_model == "owner/base"
    assert "layer-rope" in last.data.tags
    assert str(tmp_path) not in last.content  # which PEFT had written into base_model and tags


def test_pefts_empty_template_gives_way(tmp_path):
    get_peft_model(build_model("llama"), CONFIG).save_pretrained(tmp_path)
    assert "More Information Needed" in (tmp_path / "README.md").read_text()
    save_card(card(), tmp_path)
    saved = ModelCard.load(tmp_path / "README.md")
    assert "More Information Needed" not in saved.text
    assert not has_own_text(saved)
    assert saved.text.strip().startswith(BEGIN)


def test_a_template_that_somebody_filled_in_is_kept(tmp_path):
    get_peft_model(build_model("llama"), CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("[More Information Needed]", "Written by me.", 1))
    save_card(card(), tmp_path)
    text = path.read_text()
    assert text.index("Written by me.") < text.index(BEGIN)


def test_the_demo_models_name_is_no_path_even_where_a_folder_is_called_so(tmp_path, monkeypatch):
    """In a clone of this project, with the package installed transfer."""
    folder = tmp_path / "peft_layerrope" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert public_name("peft_layerrope/demo") == public_name(demo_model_path()) == "peft_layerrope/demo"
