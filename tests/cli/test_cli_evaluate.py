"""`layerrope evaluate`: side by side, interrupted and resumed, refused."""

from __future__ import annotations

import builtins
import io
import json

import numpy as np
import pytest
from conftest import IS_OLDER, build_model
from fakes import journal_of
from test_candidates import trained_lora
from test_cli import run
from tiny_tokenizer import tiny_bpe

from peft_layerrope import KeyValueWords, LayerRopeConfig
from peft_layerrope.cli import evaluate as command
from peft_layerrope.comparison.candidates import Candidate
from peft_layerrope.scoring import preflight
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tuner.artifacts import save_adapter

TINY = ("--length", "300", "--positions", "3", "--groups", "3")
FACTORS = [1.0, 1.5, 1.5, 1.2, 2.0, 1.0]


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    save_adapter(LayerRopeConfig(layer_factors=FACTORS), folder)
    return folder


@pytest.fixture
def lora(tmp_path, demo_model):
    trained_lora(tmp_path / "lora", demo_model)
    return tmp_path / "lora"


@pytest.fixture
def text(tmp_path):
    """Running text in the demo model's words."""
    rng = np.random.default_rng(0)
    (tmp_path / "book.txt").write_text(" ".join(rng.choice(["baba", "dab", "fob", ",", "?"], 2000)))
    return tmp_path / "book.txt"


def loaded(path):
    return json.loads(path.read_text())


def test_a_model_alone_has_its_position_table(demo_model, demo_tokenizer, tmp_path):
    done = run("evaluate", *TINY, "--json", str(tmp_path / "e.json"), "--plot", str(tmp_path / "e.png"))
    assert done.exit_code == 0
    task = KeyValueWords(demo_tokenizer, 300, num_positions=3)
    expected = Scorer(demo_model).score(task.split("test", 3))
    report = loaded(tmp_path / "e.json")
    assert report["model"] == "peft_layerrope/demo"
    assert report["task"] == task.describe()
    assert report["scores"]["no scaling"]["accuracy_by_position"] == pytest.approx(
        expected.accuracy_by_position, abs=1e-6
    )
    assert "gold log-prob" in done.stdout
    assert "kv_words (length: 300;" in done.stdout
    assert "test split, 3 contexts" in done.stdout
    assert "teacher-forced exact match" in done.stdout
    assert "vs first" not in done.stdout
    assert (tmp_path / "e.png").stat().st_size > 5000


def test_adapters_and_baselines_side_by_side(adapter, lora, tmp_path):
    output = tmp_path / "out"
    done = run("evaluate", *TINY, "--adapter", str(adapter), "--adapter", str(lora), "--output", str(output))
    assert done.exit_code == 0
    report = loaded(output / "evaluation.json")
    assert list(report["scores"]) == ["no scaling", "mine", "lora"]
    assert report["candidates"]["mine"]["layer_factors"] == FACTORS
    assert report["candidates"]["lora"]["kind"] == "LORA"
    assert set(report["differences"]) == {"no scaling", "mine", "lora"}
    assert {file.name for file in output.iterdir()} == {
        "accuracy_by_position.png",
        "evaluation.json",
        "evaluation.md",
        "run",
    }
    for words in ("vs first", "no scaling", "mine", "lora", "By position", "kv_words (length: 300;", str(output)):
        assert words in done.stdout
    said = [line.split("  ")[0] for line in done.stderr.splitlines()]  # also where nobody sees a bar
    assert [line for line in said if line in report["scores"]] == ["no scaling", "mine", "lora"]
    assert str(tmp_path) not in (output / "evaluation.json").read_text() + (output / "evaluation.md").read_text()


def test_an_adapters_files_are_read_once(adapter, monkeypatch):
    opened, really = [], open

    def counting(file, *arguments, **settings):
        opened.append(str(file))
        return really(file, *arguments, **settings)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", counting)
    assert run("evaluate", *TINY, "--adapter", str(adapter)).exit_code == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert opened.count(str(adapter / name)) == 1


def test_baselines_choose_the_first(adapter, tmp_path):
    arguments = ("--baseline", "uniform:1.5", "--baseline", "yarn:2", "--adapter", str(adapter))
    assert run("evaluate", *TINY, *arguments, "--json", str(tmp_path / "e.json")).exit_code == 0
    report = loaded(tmp_path / "e.json")
    assert list(report["scores"]) == ["uniform:1.5", "yarn:2", "mine"]
    assert report["baseline"] == "uniform:1.5"


def test_adapters_of_one_name_have_that_of_their_folder_too(adapter, tmp_path):
    other = tmp_path / "other" / "mine"
    other.mkdir(parents=True)
    save_adapter(LayerRopeConfig(layer_factors=[1.2] * 6), other)
    arguments = ("--adapter", str(adapter), "--adapter", str(other))
    assert run("evaluate", *TINY, *arguments, "--json", str(tmp_path / "e.json")).exit_code == 0
    assert list(loaded(tmp_path / "e.json")["scores"]) == ["no scaling", f"{tmp_path.name}/mine", "other/mine"]


@pytest.mark.parametrize("names", [("a[v1]", "a[v2]"), ("[red]x", "[bold]x"), ("a\x1b[31mred", "b\u202e\x07")])
def test_names_are_neither_markup_nor_orders_to_a_terminal(names, tmp_path):
    arguments, output = [], tmp_path / "out"
    for name in names:
        save_adapter(LayerRopeConfig(layer_factors=FACTORS), tmp_path / name)
        arguments += ["--adapter", str(tmp_path / name)]
    done = run("evaluate", *TINY, *arguments, "--output", str(output))
    assert done.exit_code == 0, done.stderr
    said = done.stdout + done.stderr
    assert all(c.isprintable() or c == "\n" for c in said)
    assert all(c.isprintable() or c == "\n" for c in (output / "evaluation.md").read_text())
    for name in filter(str.isprintable, names):
        assert said.count(name) >= 2, said  # in both tables
    assert list(loaded(output / "evaluation.json")["scores"]) == ["no scaling", *names]


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A folder with a tiny model whose answers are nonsense, and its tokenizer."""
    folder = tmp_path_factory.mktemp("writer")
    build_model("llama", vocab_size=600, max_position_embeddings=512).save_pretrained(folder)
    tiny_bpe().save_pretrained(folder)
    return folder


ASKED = ("--task", "kv_retrieval", "--keys", "words", "--num-keys", "5", "--positions", "3", "--groups", "3")


def test_an_adapter_of_another_model_is_refused_before_any_prompt_is_answered(writer, tmp_path, monkeypatch):
    config = LayerRopeConfig(layer_factors=[1.5] * 9)
    save_adapter(config, tmp_path / "nine")
    monkeypatch.setattr(command, "preflight", None)  # to call it would be an error of another kind
    done = run("evaluate", str(writer), *ASKED, "--adapter", str(tmp_path / "nine"))
    assert (done.exit_code, "nine: layer_factors has 9 entries" in done.stderr) == (1, True)


def test_answers_are_written_unless_only_read_off(writer, tmp_path):
    shown, reports = {}, {}
    for name, options in (("written", ("--max-new-tokens", "7")), ("forced", ("--teacher-forced",))):
        done = run("evaluate", str(writer), *ASKED, *options, "--json", str(tmp_path / name))
        assert done.exit_code == 0
        shown[name], reports[name] = done.stdout, loaded(tmp_path / name)
    assert reports["written"]["judged"] == {"by": "generate()", "metric": "contains_value", "max_new_tokens": 7}
    assert reports["forced"]["judged"] == {"by": "teacher-forced"}
    assert "generate(), judged by contains_value, up to 7 new tokens" in shown["written"]
    assert "teacher-forced exact match" in shown["forced"]
    written, forced = (reports[name]["scores"]["no scaling"] for name in ("written", "forced"))
    assert written["log_prob_by_position"] == forced["log_prob_by_position"]
    assert 1 <= written["mean_answer_tokens"] <= 7
    assert "answers_cut_off" not in forced
    for name in ("written", "forced"):
        assert reports[name]["split"]["protocol"] == "one context, asked at every position"
        assert "preflight: the unscaled model answers" in shown[name]
        assert reports[name]["preflight"]["groups"] == 8


def test_a_task_without_a_public_metric_is_read_off(tmp_path):
    assert run("evaluate", *TINY, "--json", str(tmp_path / "e.json")).exit_code == 0
    report = loaded(tmp_path / "e.json")
    assert report["judged"] == {"by": "teacher-forced"}
    assert "preflight" not in report


def test_perplexity_by_bucket(adapter, text, tmp_path):
    arguments = ("--task", "perplexity", "--data", str(text), "--length", "100", "--groups", "4", "--buckets", "3")
    alone = run("evaluate", *arguments)
    assert alone.exit_code == 0
    for words in ("perplexity (data: book.txt;", "4 windows", "loss in nats", "perplexity", "all"):
        assert words in alone.stdout
    done = run("evaluate", *arguments, "--adapter", str(adapter), "--output", str(tmp_path / "out"))
    assert done.exit_code == 0
    report = loaded(tmp_path / "out" / "evaluation.json")
    assert len(report["scores"]["mine"]["loss_by_position"]) == 3
    assert (tmp_path / "out" / "loss_by_position.png").exists()
    assert "nats of loss saved" in " ".join(done.stdout.split())


def interrupted_at(step: int, monkeypatch) -> None:
    """Ctrl-C before a part."""
    compare = command.compare

    def interrupted(*arguments: object, progress: object, **settings: object) -> object:
        def stop(label: str, done: int, total: int) -> None:
            progress(label, done, total)
            if done == step:
                raise KeyboardInterrupt

        return compare(*arguments, progress=stop, **settings)

    monkeypatch.setattr(command, "compare", interrupted)


def test_interrupted_and_resumed_it_writes_the_same(adapter, tmp_path, monkeypatch):
    arguments = ("evaluate", *TINY, "--adapter", str(adapter), "--output")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*arguments, str(whole)).exit_code == 0
    with monkeypatch.context() as patched:
        interrupted_at(4, patched)
        done = run(*arguments, str(killed))
    assert done.exit_code == 130
    assert "Go on with the same command and --resume." in done.stderr
    assert not (killed / "evaluation.json").exists()
    assert run(*arguments, str(killed)).exit_code == 2
    assert run(*arguments, str(killed), "--resume").exit_code == 0
    for name in ("evaluation.json", "evaluation.md"):
        assert (killed / name).read_text() == (whole / name).read_text()
    assert journal_of(killed / "run") == journal_of(whole / "run")
    other = run(*arguments, str(killed), "--resume", "--task-seed", "1")
    assert other.exit_code == 2
    assert "is of another run: split." in other.stderr
    (killed / "notes.txt").write_text("mine")
    (killed / "run" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    wrong = Candidate.of_config("x", LayerRopeConfig(layer_factors=[2.0]))
    with monkeypatch.context() as patched:  # what is refused after the model was loaded
        patched.setattr(command, "_candidates", lambda *_: [wrong])
        assert run(*arguments, str(killed), "--overwrite").exit_code != 0
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before
    again = run(*arguments, str(killed), "--overwrite", "--task-seed", "1")
    assert again.exit_code == 0
    assert loaded(killed / "evaluation.json")["task"]["seed"] == 1
    assert (killed / "notes.txt").read_text() == (killed / "run" / "notes.txt").read_text() == "mine"


def test_what_the_unscaled_model_wrote_is_kept_for_resuming(tmp_path, monkeypatch):
    arguments = ("evaluate", *ASKED, "--output", str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        interrupted_at(1, patched)
        assert run(*arguments).exit_code == 130
    with monkeypatch.context() as patched:
        patched.setattr(preflight, "judge_written", lambda *_, **__: pytest.fail("asked again"))
        assert run(*arguments, "--resume").exit_code == 0
    assert loaded(tmp_path / "out" / "evaluation.json")["preflight"]


def test_resume_begins_where_there_is_nothing_yet(tmp_path):
    assert run("evaluate", *TINY, "--output", str(tmp_path / "out"), "--resume").exit_code == 0
    assert (tmp_path / "out" / "run" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "ntk:2"], "baseline 'ntk:2' is unknown, expected one like none, uniform:1.5"),
        (["--baseline", "none", "--baseline", "none"], "no scaling is given twice."),
        (["--task", "kv_words", "--max-new-tokens", "5"], "max_new_tokens=5 is no setting of kv_words"),
        (["--resume"], "--resume needs --output."),
        (["--overwrite"], "--overwrite needs --output."),
        (["--output", "{full}"], "is not empty; pass --resume to go on"),
        (["--output", "{full}/notes.txt"], "exists and is not a folder."),
        (["--output", "{full}/new", "--resume", "--overwrite"], "pass one of them"),
        (["--json", "{full}/nowhere/e.json"], "--json {full}/nowhere/e.json cannot be written: no such folder."),
        (["--plot", "{full}"], "--plot {full} cannot be written: a folder."),
        (["--plot", "{full}/e.svg"], "--plot {full}/e.svg must end in .png"),
        (["--buckets", "4"], "--buckets 4 is for perplexity; kv_words has gold positions."),
        (["--length", "16"], "too few for num_pairs or gold positions, 3 were asked for"),
        (["--task", "kv_words", "--stride", "3"], "stride=3 is no setting of kv_words"),
    ],
)
def test_bad_input_is_one_line_before_the_model_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "notes.txt").write_text("mine")
    arguments = [argument.format(full=tmp_path) for argument in arguments]
    done = run("evaluate", *TINY, *arguments)
    assert done.exit_code == 2
    assert message.format(full=tmp_path) in done.stderr
    assert done.stderr.count("\n") <= 2  # with the line about prompts beyond the window
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("given", ["--resume", "--overwrite"])
def test_a_search_s_folder_is_no_place_for_an_evaluation(given, tmp_path):
    save_adapter(LayerRopeConfig(layer_factors=[1.0] * 6), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run("evaluate", *TINY, "--output", str(tmp_path), given)
    assert done.exit_code == 2
    assert "holds an adapter" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_adapters_are_looked_at_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the model was loaded"))
    done = run("evaluate", *TINY, "--adapter", str(tmp_path))
    assert done.exit_code == 1
    assert "it has no adapter_config.json" in done.stderr


@pytest.mark.skipif(IS_OLDER, reason="transformers 5.0 has no proportional rope, which takes no YaRN")
def test_a_yarn_that_cannot_be_is_refused_before_anything_is_scored(tmp_path, demo_model, demo_tokenizer):
    demo_model.config.rope_parameters = {"rope_type": "proportional", "rope_theta": 10_000.0}
    demo_model.save_pretrained(tmp_path / "m")
    demo_tokenizer.save_pretrained(tmp_path / "m")
    done = run("evaluate", str(tmp_path / "m"), "--task", "kv_words", *TINY, "--baseline", "yarn:2")
    assert done.exit_code == 2
    assert "yarn:2" in done.stderr


def test_help_shows_every_use():
    text = " ".join(run("evaluate", "--help").stdout.split())
    for words in ("--baseline yarn:2", "--teacher-forced", "--task perplexity", "--resume", "paired by context"):
        assert words in text
