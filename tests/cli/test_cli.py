"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import build_model
from fakes import journal_of
from tiny_tokenizer import tiny_bpe
from typer.testing import CliRunner

import peft_layerrope
from peft_layerrope import InvalidConfigError, LayerRopeConfig, demo_model_path, pull
from peft_layerrope.cli import SUMMARIES, app
from peft_layerrope.cli.options import resolve_task
from peft_layerrope.tasks.specification import TaskSpecification
from peft_layerrope.tuner.artifacts import save_adapter

TINY_SEARCH = ["--length", "128", "--num-positions", "3", "--steps", "1", "--test-groups", "3"]


def run(*arguments: str):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_version():
    assert run("--version").stdout.strip() == peft_layerrope.__version__


@pytest.mark.parametrize("command", ["search", "evaluate"])
def test_help_teaches_with_an_example(command):
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help").stdout)
    assert f"layerrope {command}" in text
    assert "Example" in text
    assert "--length" in text


def test_search_then_evaluate(tmp_path, demo_model):
    folder = tmp_path / "adapter"
    done = run("search", "--output", str(folder), *TINY_SEARCH)
    assert done.exit_code == 0
    for text in ("Held out", "no scaling", "best uniform factor", "per layer", str(folder)):
        assert text in done.stdout
    report = json.loads((folder / "search.json").read_text())
    assert report["model"] == "peft_layerrope/demo"
    assert len(report["layer_factors"]) == demo_model.config.num_hidden_layers
    scores = tmp_path / "scores.json"
    arguments = ("--length", "128", "--positions", "3", "--groups", "3")
    shown = run("evaluate", "--adapter", str(folder), *arguments, "--json", str(scores))
    assert shown.exit_code == 0
    assert "context utilisation" in shown.stdout
    chosen = next(row for row in report["table"] if row["name"] == report["chosen"])
    found = json.loads(scores.read_text())["scores"]
    for label, row in (("adapter", chosen), ("no scaling", report["table"][0])):
        assert found[label].keys() == row["test"].keys()
        for name, value in row["test"].items():
            np.testing.assert_allclose(found[label][name], value, atol=1e-5)  # batches differ, and so does rounding


def test_search_refuses_a_folder_in_use_before_any_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run("search", "--output", str(tmp_path))
    assert done.exit_code == 2
    assert f"--output {tmp_path} is not empty; pass --resume to go on" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def contents(folder, *names):
    return [(folder / name).read_bytes() for name in names]


RESULTS = ("adapter_config.json", "adapter_model.safetensors", "search.json", "search.yaml", "README.md")


@pytest.mark.parametrize("more", [(), ("--keep-task", "kv_words:96")])
def test_a_search_is_repeated_by_its_file_and_resumed_by_its_folder(tmp_path, more):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("search", "--output", str(first), *TINY_SEARCH, "--seed", "4", *more).exit_code == 0
    splits = json.loads((first / "search.json").read_text())["splits"]
    assert [split["name"] for split in splits] == ["search", "validation", "test", *(["kept"] if more else [])]
    assert all((split["max_tokens"] <= 96) == (split["name"] == "kept") for split in splits)
    assert run("search", "--output", str(second), "--config", str(first / "search.yaml")).exit_code == 0
    assert contents(first, *RESULTS) == contents(second, *RESULTS)
    journal = journal_of(first / "run")
    (first / "search.json").unlink()
    resumed = run("search", "--output", str(first), "--resume")
    assert resumed.exit_code == 0
    assert contents(first, *RESULTS) == contents(second, *RESULTS)
    assert journal_of(first / "run") == journal  # nothing was evaluated again
    other = run("search", "--output", str(first), "--resume", "--seed", "5")
    assert other.exit_code == 2
    assert "is of another run: settings.seed was 4 there and is 5 now." in other.stderr


def test_overwriting_takes_nothing_before_all_is_checked_and_only_what_is_ours(tmp_path):
    folder = tmp_path / "it"
    assert run("search", "--output", str(folder), *TINY_SEARCH, "--seed", "4").exit_code == 0
    for path in (folder / "notes.txt", folder / "run" / "notes.txt", folder / "run" / "own" / "notes.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    call = ("search", "--output", str(folder), *TINY_SEARCH, "--overwrite")
    assert run(*call, "--layers", "40-41").exit_code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run(*call).exit_code == 0
    assert json.loads((folder / "search.json").read_text())["settings"]["seed"] == 0
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    changed = {path.name for path in before if after[path] != before[path]}
    assert {"search.json", "search.yaml", "journal.jsonl"} <= changed
    assert sum(content == b"mine" for content in after.values()) == 3


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    done = run("search", "--output", str(tmp_path / "out"), *TINY_SEARCH, "--dry-run")
    assert done.exit_code == 0
    for text in ("1 generation of 9 candidates", "tokens to choose by", "held-out test", "steps=1 "):
        assert text in " ".join(done.stdout.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "typed"),
    [(None, True), ("search: {minutes: 0.01}", False), ("search: {steps: 9, minutes: 20}", True)],
    ids=["typed", "in a file", "typed beside the steps of a file"],
)
def test_minutes_decide_the_steps_of_the_demo_too(content, typed, tmp_path):
    asked = ("--minutes", "0.01") if typed else ()
    if content is not None:
        (tmp_path / "search.yaml").write_text(content)
        asked += ("--config", str(tmp_path / "search.yaml"))
    # a dry run writes nothing, so that it is no matter what is in the folder
    done = run("search", "--output", str(tmp_path), "--length", "128", "--positions", "3", *asked, "--dry-run")
    assert done.exit_code == 0
    assert "steps=4 " in " ".join(done.stdout.split())
    assert "more than --minutes 0.01" in " ".join(done.stderr.split())


def test_an_option_beside_the_file_goes_first(tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text("task: {length: 128, num_positions: 3}\nsearch: {steps: 1, test_groups: 3}\n")
    done = run("search", "--output", str(tmp_path / "out"), "--config", str(file), "--max-factor", "0.2")
    message = "error: max_factor=0.2 must be greater than min_factor=0.25.\n"
    assert (done.exit_code, done.stderr) == (2, message)
    file.write_text("task: {lenght: 128}\n")
    done = run("search", "--output", str(tmp_path / "out"), "--config", str(file))
    assert (done.exit_code, done.stderr) == (
        2,
        f"error: {file}: task.lenght is unknown; did you mean task.length?\n",
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--population", "1"], 2, "'--population'"),
        (["--factor", "2"], 2, "factor=2.0 has no effect with rope_type='default'"),
        (["--algorithm", "paper", "--max-factor", "0.5"], 2, "max_factor=0.5 must be greater than min_factor=1.0"),
        (["--max-factor", "0.2"], 2, "max_factor=0.2 must be greater than min_factor=0.25"),
        (["--length", "16"], 2, "length=16 tokens holds 2 of 256 pairs"),
        (["--resume", "--overwrite"], 2, "--resume keeps what is there and --overwrite replaces it"),
        (["--layers", "0-9"], 2, "must be distinct layer indices from 0 to 5."),
        (["--length", "2048"], 2, "the largest scaling reaches 1024 tokens."),
        (["--step", "0"], 2, "step=0.0 must be"),
        (["--rope-type", "yarn"], 2, "'yarn' is not one of"),
    ],
)
def test_settings_that_cannot_work_are_one_line(arguments, status, message, tmp_path):
    done = run("search", "--output", str(tmp_path / "out"), *arguments)
    assert done.exit_code == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_rotary_fails_with_its_name(tmp_path, demo_tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=len(demo_tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    demo_tokenizer.save_pretrained(tmp_path / "gpt2")
    done = run("search", str(tmp_path / "gpt2"), "--task", "kv_words", "--output", str(tmp_path / "out"), *TINY_SEARCH)
    assert done.exit_code == 1
    assert "gpt2: no rotary embedding" in done.stderr


def test_a_missing_model_is_one_line(tmp_path):
    done = run("evaluate", str(tmp_path / "nowhere"))
    assert done.exit_code == 1
    assert "cannot load model" in done.stderr


def test_a_folder_that_is_no_adapter(tmp_path):
    done = run("evaluate", "--adapter", str(tmp_path))
    assert done.exit_code == 1
    assert "it has no adapter_config.json" in done.stderr


def test_an_adapter_for_another_model_names_both_depths(tmp_path, demo_model):
    layers = demo_model.config.num_hidden_layers
    save_adapter(LayerRopeConfig(layer_factors=[1.5] * (layers + 1)), tmp_path)
    done = run("evaluate", "--adapter", str(tmp_path), "--length", "128")
    assert done.exit_code == 1 or done.exit_code == 2
    assert f"layer_factors has {layers + 1} entries, but llama has {layers} decoder layers." in done.stderr


@pytest.mark.parametrize("command", [("verify", "--adapter"), ("export", "--format=remote-code", "--output={}/out")])
def test_an_adapter_of_another_model_is_not_taken_for_the_demos(command, tmp_path):
    config = LayerRopeConfig(layer_factors=[1.5] * 6, base_model_name_or_path="/home/me/six-layers")
    save_adapter(config, tmp_path / "six")
    done = run(*(part.format(tmp_path) for part in command), str(tmp_path / "six"))
    assert (done.exit_code, "the adapter is for 'six-layers'" in done.stderr) == (2, True)


def test_an_export_has_nothing_to_go_on_with(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    done = run("export", "adapter", "--format", "remote-code", "--output", str(tmp_path / "out"))
    assert (done.exit_code, "--resume" in done.stderr, "--overwrite" in done.stderr) == (2, False, True)


@pytest.mark.parametrize("option", ["--verbose", "-v", "--debug"])
def test_verbose_shows_the_traceback(option, tmp_path):
    with pytest.raises(peft_layerrope.LayerRopeError):
        run("evaluate", "--adapter", str(tmp_path), option)


def test_quiet_tells_results_and_errors_only(tmp_path):
    few = ("--teacher-forced", "--groups", "2", "--length", "300")
    loud, quiet = run("evaluate", *few), run("evaluate", *few, "-q")
    assert loud.stderr
    assert not quiet.stderr
    assert loud.stdout == quiet.stdout != ""
    failed = run("evaluate", "--adapter", str(tmp_path), "-q")
    assert failed.exit_code == 1
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("capability", "dtype", "is_told"),
    [
        ("AVX2", "bfloat16", True),
        ("AVX2", "float16", True),
        ("AVX2", "float32", False),
        ("AVX512", "bfloat16", False),
        ("DEFAULT", "bfloat16", False),  # of a processor that is no x86
    ],
)
def test_a_dtype_that_the_processor_lacks_is_told(monkeypatch, capability, dtype, is_told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    done = run("evaluate", "--teacher-forced", "--groups", "1", "--length", "100", "--dtype", dtype)
    assert done.exit_code == 0, done.stderr
    assert ("--dtype float32" in done.stderr) == is_told


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "my-modle"),
        ("evaluate", "./my-modle"),
        ("evaluate", "--adapter", "my-adaptr"),
        ("evaluate", "--adapter", "my-adapter", "--adapter", "./my-adaptr"),
        ("evaluate", "--task", "kv_retrieval", "--data", "paires.jsonl"),
        ("evaluate", "--task", "perplexity", "--data", "buok.txt"),
        ("search", "--config", "search.yml", "--output", "out"),
        ("search", "--text", "buok.txt", "--output", "out"),
        ("verify", "--adapter", "my-adaptr"),
        ("push", "my-adaptr", "me/it"),
    ],
)
def test_a_slip_in_a_name_is_answered_with_what_there_is(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(LayerRopeConfig(layer_factors=[1.1] * 6, base_model_name_or_path="peft_layerrope/demo"), "my-adapter")
    (tmp_path / "my-model").mkdir()
    for name in ("pairs.jsonl", "book.txt", "search.yaml"):
        (tmp_path / name).write_text("")
    done = run(*arguments)
    assert done.exit_code in (1, 2)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    meant = {"my-modle": "my-model", "my-adaptr": "my-adapter", "paires.jsonl": "pairs.jsonl", "buok.txt": "book.txt"}
    slips = [meant.get(word.removeprefix("./"), "search.yaml" * (word == "search.yml")) for word in arguments]
    assert line.endswith(f"Did you mean {next(filter(None, slips))}?")


def test_a_shell_completes_the_commands():
    asked = {"_LAYERROPE_COMPLETE": "complete_bash", "COMP_WORDS": "layerrope ", "COMP_CWORD": "1"}
    assert CliRunner().invoke(app, [], env=asked, prog_name="layerrope").stdout.split() == list(SUMMARIES)


def test_another_model_is_searched_inside_its_window_by_default(tmp_path, demo_tokenizer):
    build_model("llama", vocab_size=len(demo_tokenizer), max_position_embeddings=128).save_pretrained(tmp_path / "m")
    demo_tokenizer.save_pretrained(tmp_path / "m")
    arguments = ("--task", "kv_words", "--groups", "2", "--json", str(tmp_path / "s.json"))
    done = run("evaluate", str(tmp_path / "m"), *arguments)
    assert done.exit_code == 0
    assert json.loads((tmp_path / "s.json").read_text())["task"]["length"] == 128


def test_sensitivity_says_what_to_search(tmp_path):
    arguments = ("--length", "512", "--groups", "4", "--try", "1.5", "--layers", "0,1,5", "--plot")
    done = run("sensitivity", *arguments, str(tmp_path / "s.png"), "--json", str(tmp_path / "s.json"))
    assert done.exit_code == 0
    assert "search layers 0-1: " in done.stdout
    assert (tmp_path / "s.png").stat().st_size > 5000
    assert json.loads((tmp_path / "s.json").read_text())["layers"] == [0, 1, 5]


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_a_search_puts_no_adapter_into_a_models_folder(tmp_path, how):
    """transformers would load it with the model from then on, and the model's own card would be replaced."""
    shutil.copytree(demo_model_path(), tmp_path / "model")
    before = sorted((tmp_path / "model").iterdir())
    done = run("search", str(tmp_path / "model"), *TINY_SEARCH, "--output", str(tmp_path / "model"), how)
    assert done.exit_code == 2
    assert "holds a model" in done.stderr
    assert sorted((tmp_path / "model").iterdir()) == before
    with pytest.raises(InvalidConfigError, match="holds a model"):
        pull("someone/adapter", tmp_path / "model", overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["evaluate", ""], "model=''"),
        (["search", "", "--output", "new"], "model=''"),
        (["evaluate", "--tokenizer", ""], "tokenizer=''"),
    ],
)
def test_an_unset_variable_of_the_shell_is_not_the_default(arguments, named):
    """Of `evaluate "$MODEL"` nothing is left, which is not the demo model."""
    done = run(*arguments, "--task", "kv_words", "--length", "64")
    assert done.exit_code == 2
    assert named in done.stderr


@pytest.mark.parametrize(
    ("asked", "keys", "difficulty"),
    [
        ({}, "syllables", "auto"),
        ({"name": "kv_retrieval", "keys": "uuid"}, "uuid", "auto"),
        ({"name": "kv_mix"}, None, None),
        ({"num_keys": 30}, None, None),
        ({"name": "multi_doc_qa"}, None, None),
    ],
)
def test_what_is_asked_of_a_model_when_little_is_said(asked, keys, difficulty):
    sized = resolve_task(TaskSpecification(**asked), 32768, False, tiny_bpe(), to_run=True)
    assert (sized.keys, sized.difficulty) == (keys, difficulty)
    assert sized.length == (4096 if asked.get("name") in ("kv_retrieval", "kv_mix") or not asked else 32768)
