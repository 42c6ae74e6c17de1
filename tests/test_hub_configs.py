"""Every adapter folder in hub_configs/ loads, and says what its report says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel

from peft_layerrope import KeyValueWords
from peft_layerrope.demo import DEMO_NAME
from peft_layerrope.evaluation import score

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "hub_configs").glob("*/adapter_config.json"))


def test_the_index_names_every_folder():
    named = set(re.findall(r"^\| `([^`]+)`", (ROOT / "hub_configs" / "README.md").read_text(), re.MULTILINE))
    assert named == {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_adapter_loads_and_reproduces_its_report(folder, demo_model, demo_tokenizer):
    report = json.loads((folder / "search.json").read_text())
    assert report["model"] == DEMO_NAME
    task = KeyValueWords(demo_tokenizer, report["task"]["length"], seed=report["task"]["seed"])
    splits = {split["name"]: split for split in reversed(report["splits"])}  # the first of a name: not short prompts
    test_split = splits["test"]
    assert task.split("test", test_split["groups"]).fingerprint() == test_split["fingerprint"]
    model = PeftModel.from_pretrained(demo_model, folder)
    assert model.peft_config["default"].layer_factors == report["layer_factors"]
    groups = splits["search"]["groups"]
    fitness = score(model, task.split("search", groups)).log_prob_utilisation(report["settings"]["weights"])
    chosen = next(row for row in report["table"] if row["name"] == report["chosen"])
    assert fitness == pytest.approx(chosen["search_fitness"], abs=1e-3)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_card_holds_the_held_out_figure_and_no_path_of_a_machine(folder):
    card = ModelCard.load(folder / "README.md")
    report = json.loads((folder / "search.json").read_text())
    chosen = next(row for row in report["table"] if row["name"] == report["chosen"])
    assert card.data.eval_results[0].metric_value == pytest.approx(chosen["test"]["average_accuracy"], abs=1e-4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == DEMO_NAME
    for text in (card.content, json.dumps(report), json.dumps(config)):
        assert not re.search(r"/(home|root|Users|work|tmp)/", text)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_readme_shows_the_cards_own_table(folder):
    rows = [line for line in (folder / "README.md").read_text().splitlines() if " ± " in line and line.startswith("| ")]
    assert len(rows) == 8
    readme = (ROOT / "README.md").read_text()
    assert all(row in readme for row in rows)
