"""Every adapter folder in hub_configs/ loads and says what its report says; every recipe fits its model."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import real_model
from huggingface_hub import ModelCard
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from peft_layerrope import KeyValueWords, load_model, verify
from peft_layerrope.base_model import adapted
from peft_layerrope.cli import app
from peft_layerrope.files import DEMO_NAME
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.searcher.settings import SearchSpecification, read_specification
from peft_layerrope.tasks.specification import make_task
from peft_layerrope.tasks.targets import Targets
from peft_layerrope.tuner.sites import find_stack, trained_window

ROOT = Path(__file__).parent.parent


def _load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_index = _load_script(ROOT / "hub_configs" / "build_index.py")
each_adapter = pytest.mark.parametrize("folder", build_index.adapter_folders(), ids=lambda folder: folder.name)
of_the_demo = pytest.mark.parametrize(
    "folder", sorted((ROOT / "hub_configs").glob("demo-*")), ids=lambda folder: folder.name
)
of_real_models = pytest.mark.parametrize(
    "folder",
    [folder for folder in build_index.adapter_folders() if not folder.name.startswith("demo-")],
    ids=lambda folder: folder.name,
)
each_recipe = pytest.mark.parametrize("folder", build_index.recipe_folders(), ids=lambda folder: folder.name)


def test_the_index_is_what_the_generator_makes_now():
    wanted = build_index.index()
    assert build_index.INDEX.read_text() == wanted, "run: python hub_configs/build_index.py"
    folders = {path.name for path in build_index.FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"^\| `([^`]+)`", wanted, re.MULTILINE)) == folders


@each_adapter
def test_the_index_shows_the_held_out_figures(folder):
    row = next(line for line in build_index.index().splitlines() if line.startswith(f"| `{folder.name}`"))
    shown = [float(figure) for figure in re.findall(r"(\d+\.\d) \[", row)]
    table = {row["name"]: row for row in json.loads((folder / "search.json").read_text())["table"]}
    by_position = [table[name]["test"]["accuracy_by_position"] for name in ("none", "uniform_bounded")]
    wanted = [100 * sum(values) / len(values) for values in by_position]
    assert shown[:2] == pytest.approx(wanted, abs=0.051)
    card = ModelCard.load(folder / "README.md").data.eval_results[0].metric_value
    assert shown[2] == pytest.approx(100 * card, abs=0.051)


@of_the_demo
def test_adapter_loads_and_reproduces_its_report(folder, demo_model, demo_tokenizer):
    report = json.loads((folder / "search.json").read_text())
    assert report["model"] == DEMO_NAME
    task = KeyValueWords(demo_tokenizer, report["task"]["length"], seed=report["task"]["seed"])
    splits = {split["name"]: split for split in report["splits"]}
    test_split = splits["test"]
    assert task.split("test", test_split["groups"]).fingerprint() == test_split["fingerprint"]
    model = PeftModel.from_pretrained(demo_model, folder)
    assert model.peft_config["default"].layer_factors == report["layer_factors"]
    assert verify(model).ok
    chosen = next(row for row in report["table"] if row["name"] == report["chosen"])
    found = Scorer(model).measure(task.split("test", test_split["groups"])).correct.mean()
    assert found == pytest.approx(chosen["test"]["average_accuracy"], abs=1e-3)


@of_real_models
def test_adapter_of_a_real_model_is_of_the_contexts_that_its_report_names(folder):
    report = json.loads((folder / "search.json").read_text())
    path = real_model(report["model"])
    assert folder.name == report["model"]
    specification = SearchSpecification.of(read_specification(folder / "search.yaml"), folder.name)
    assert specification.model == report["model"]  # no folder of a machine
    model, tokenizer = load_model(str(path))
    task = make_task(specification.task, tokenizer, trained_window(model))
    split = next(split for split in report["splits"] if split["name"] == "test")
    opened = Targets(split["targets"]["opening"]).applied(task.split("test", split["groups"]), tokenizer)
    assert opened.fingerprint() == split["fingerprint"]
    tuned = PeftModel.from_pretrained(model, folder)
    assert tuned.peft_config["default"].layer_factors == report["layer_factors"]
    assert verify(tuned).ok


@each_adapter
def test_card_holds_the_held_out_figure_and_no_path_of_a_machine(folder):
    card = ModelCard.load(folder / "README.md")
    report = json.loads((folder / "search.json").read_text())
    chosen = next(row for row in report["table"] if row["name"] == report["chosen"])
    assert card.data.eval_results[0].metric_value == pytest.approx(chosen["test"]["average_accuracy"], abs=1e-4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == report["model"]
    for text in (card.content, json.dumps(report), json.dumps(config)):
        assert not re.search(r"/(home|root|Users|work|tmp)/", text)


@each_adapter
def test_the_verdict_names_no_bound_where_there_was_none(folder):
    verdict = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("- result: "))
    assert ("with no bound" in verdict) != ("within bound" in verdict or "under a bound" in verdict)


@each_adapter
def test_the_results_show_the_cards_own_table(folder):
    rows = [line for line in (folder / "README.md").read_text().splitlines() if " ± " in line and line.startswith("| ")]
    assert len(rows) == 6
    results = (ROOT / "docs" / "results.md").read_text()
    assert all(row in results for row in rows)


CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def byte_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte: more tokens for a UUID than any real tokenizer takes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    made.chat_template = chat_template
    return made


def shrunken(config: dict) -> torch.nn.Module:
    """The recipe's model with all its layers, its window and its rotary embedding, and little width."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **TINY, "vocab_size": 256})).eval()


@each_recipe
def test_a_recipe_is_settings_and_nothing_more(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["base_model.json", "search.yaml"]
    specification, facts = build_index.read_recipe(folder)
    assert specification.model == facts["model"]
    config = AutoConfig.for_model(**facts["config"])
    for name, value in facts["config"].items():  # the family takes them under these names, and changes none
        assert getattr(config, name) == value, name
    task, settings = specification.task, specification.search
    assert (task.name, task.keys, task.num_positions) == ("kv_retrieval", "uuid", 5)
    assert task.length == min(config.max_position_embeddings, 16384)
    assert settings.layers_to_transform is None


@each_recipe
def test_a_recipe_fits_its_models_layers_and_window(folder):
    specification, facts = build_index.read_recipe(folder)
    model = shrunken(facts["config"])
    layers = facts["config"]["num_hidden_layers"]
    assert trained_window(model) == facts["config"]["max_position_embeddings"]
    settings = specification.search
    assert settings.space(tuple(find_stack(model).key_sources)).scaled_layers == tuple(range(layers))
    tokenizer = byte_tokenizer(CHAT if specification.task.chat_template else None)
    split = make_task(specification.task, tokenizer, trained_window(model)).split("search", 1)
    assert 0.95 * specification.task.length < split.max_tokens <= specification.task.length
    factors = [1 + 0.01 * layer for layer in range(layers)]
    with adapted(model, settings.adapter_config(factors)) as peft_model:
        found = verify(peft_model)
    assert [check.measured for check in found.layers] == pytest.approx(factors, rel=1e-3)


@each_recipe
def test_the_dry_run_of_a_recipe(folder, tmp_path):
    specification, facts = build_index.read_recipe(folder)
    base = tmp_path / "base"
    shrunken(facts["config"]).save_pretrained(base)
    byte_tokenizer(CHAT if specification.task.chat_template else None).save_pretrained(base)
    fewer = ("--length", "700", "--test-groups", "2")
    arguments = ["search", str(base), "--config", str(folder / "search.yaml"), *fewer, "--device", "cpu", "--dry-run"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "generations of 14 candidates" in done.stdout or "generations of 13 candidates" in done.stdout
    assert not (tmp_path / "out").exists()


@each_recipe
def test_a_recipes_command_names_the_model_that_it_cannot_fetch(folder, tmp_path):
    arguments = ["search", "--config", str(folder / "search.yaml"), "--output", str(tmp_path / "out"), "--dry-run"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})  # offline, see conftest
    assert done.exit_code != 0
    assert build_index.read_recipe(folder)[0].model in done.stderr
