"""lm-evaluation-harness: the same accuracies as ours, and the way there from the command line."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
from peft import PeftModel
from typer.testing import CliRunner

import peft_layerrope
from peft_layerrope import KeyValueWords, Split, TaskError
from peft_layerrope.cli import app
from peft_layerrope.lm_eval_tasks import lm_eval_tasks_path
from peft_layerrope.scoring.scorer import Scorer

command = importlib.import_module("peft_layerrope.cli.tools")

ROOT = Path(__file__).parent.parent
ADAPTER = str(ROOT / "hub_configs" / "demo-plain")
OURS = ["--include_path", lm_eval_tasks_path()]
ROOM = 520  # the prompts' 510 tokens, and what is written after them


@pytest.fixture
def harness():
    return pytest.importorskip("lm_eval")


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def split(demo_tokenizer) -> Split:
    return KeyValueWords(demo_tokenizer, 512, num_positions=5).split("test", 4)


@pytest.fixture
def data(split, tmp_path) -> Path:
    """The split's prompts, as the command line writes them."""
    wanted = ["--length", "512", "--positions", "5", "--limit", str(len(split.examples))]
    done = CliRunner().invoke(app, ["prompts", *wanted])
    assert done.exit_code == 0, done.stderr
    path = tmp_path / "prompts.jsonl"
    path.write_text(done.stdout)
    return path


def manager(metadata: dict):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=lm_eval_tasks_path(), include_defaults=False, metadata=metadata)


def evaluate(lm, name: str, metadata: dict) -> dict:
    import lm_eval

    return lm_eval.simple_evaluate(lm, tasks=[name], task_manager=manager(metadata), bootstrap_iters=0)


def accuracies(results: dict) -> dict[str, float]:
    found = {key.split(",")[0]: value for key, value in results.items() if key.startswith("acc")}
    return {name: value for name, value in found.items() if not name.endswith("_stderr")}


def expected(scores) -> dict[str, float]:
    by_position = zip(scores.positions, scores.accuracy_by_position, strict=True)
    curve = {f"acc_position_{position:03}": pytest.approx(value) for position, value in by_position}
    return {"acc": pytest.approx(scores.average().value), **curve}


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_the_accuracies_are_those_of_our_own_evaluation(harness, adapter, split, data, demo_model, demo_tokenizer):
    from lm_eval.models.huggingface import HFLM

    model = demo_model if adapter is None else PeftModel.from_pretrained(demo_model, adapter)
    scores = Scorer(model).score(split)
    assert 0 < scores.average().value < 1  # else equal curves would say little
    lm = HFLM(pretrained=model, tokenizer=demo_tokenizer, max_length=ROOM, batch_size=4)
    output = evaluate(lm, "layerrope_kv_words", {"data": str(data)})
    assert accuracies(output["results"]["layerrope_kv_words"]) == expected(scores)
    assert output["higher_is_better"]["layerrope_kv_words"] == dict.fromkeys(expected(scores), True)
    samples = output["samples"]["layerrope_kv_words"]
    assert len(samples) == len(split.examples)
    for sample in samples:
        example = split.examples[sample["doc_id"]]
        ids, mask = lm.tok_batch_encode([sample["arguments"][0][0]])
        assert ids.tolist() == [list(example.context_ids + example.query_ids)]  # [BOS] and everything
        assert mask.all()
        assert sample["acc"] == scores.correct[example.group, example.position]


def test_a_baked_model_counts_as_the_adapter_it_was_made_from(harness, split, data, demo_model, demo_tokenizer):
    from lm_eval.models.huggingface import HFLM

    model = PeftModel.from_pretrained(demo_model, ADAPTER)
    wanted = expected(Scorer(model).score(split))
    lm = HFLM(pretrained=model.merge_and_unload(), tokenizer=demo_tokenizer, max_length=ROOM, batch_size=4)
    output = evaluate(lm, "layerrope_kv_words", {"data": str(data)})
    assert accuracies(output["results"]["layerrope_kv_words"]) == wanted


def canned(written: list[str]):
    """A model that writes these answers, each up to the task's first stop sequence in it."""
    from lm_eval.api.model import LM

    class Canned(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [_until(written[request.doc_id], request.args[1]["until"]) for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    return Canned()


def _until(text: str, stops: list[str]) -> str:
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


@pytest.mark.parametrize(
    ("name", "judged"),
    [
        # (position, accepted answers, written, right?)
        (
            "layerrope_kv",
            [
                (0, ["ab-1"], ' "AB-1"', True),
                (0, ["ab-1"], "It is:\n\nab-1.", True),
                (9, ["ab-1"], "ab 1", False),
            ],
        ),
        (
            "layerrope_multi_doc",
            [
                (0, ["Paris", "the Seine"], "paris!", True),
                (10, ["Paris", "the Seine"], "On a Seine\nLondon", True),
                (10, ["Paris"], "London\nParis", False),
                (4, ["Paris"], "", False),
            ],
        ),
        (
            "layerrope_kv_words",
            [
                (3, ["bab dab"], " bab  dab fob", False),  # one space, as the tokens have it
                (3, ["bab dab"], "bab dab fob", True),
                (3, ["bab dab"], "fob bab dab", False),
                (5, ["bab dab"], "bab", False),
            ],
        ),
    ],
)
def test_a_position_averages_its_own_prompts_only(harness, name, judged, tmp_path):
    rows = [{"prompt": f"{i}?\n", "answers": accepted, "position": p} for i, (p, accepted, _, _) in enumerate(judged)]
    data = write_lines(tmp_path / "prompts.jsonl", rows)
    output = evaluate(canned([written for _, _, written, _ in judged]), name, {name: str(data), "data": "another"})
    right: dict[str, list[bool]] = {"acc": []}
    for position, _, _, is_right in judged:
        width = len(str(max(p for p, *_ in judged)))
        for metric in ("acc", f"acc_position_{position:0{width}}"):
            right.setdefault(metric, []).append(is_right)
    assert accuracies(output["results"][name]) == {m: pytest.approx(sum(v) / len(v)) for m, v in right.items()}
    prompts = [sample["arguments"][0][0] for sample in output["samples"][name]]
    assert prompts == [row["prompt"] for row in rows]  # nothing added, nothing stripped
    settings = output["samples"][name][0]["arguments"][0][1]
    assert settings["do_sample"] is False
    assert not any(stop in answer for stop in settings["until"] for row in rows for answer in row["answers"])


GOOD = {"prompt": "a?", "answers": ["b"], "position": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("", "is empty, expected one JSON object a line with prompt, answers, position"),
        (json.dumps(GOOD) + "\n{", "line 2: Invalid JSON"),
        (json.dumps({"prompt": "a?", "answers": ["b"]}), "line 1: position is missing"),
        (json.dumps(GOOD | {"prompt": ""}), "line 1: prompt=''"),
        (json.dumps(GOOD | {"answers": "b"}), "line 1: answers='b' must be"),
        (json.dumps(GOOD | {"answers": []}), "line 1: answers=[]"),
        (json.dumps(GOOD | {"position": "0"}), "line 1: position='0' must be a valid integer"),
    ],
)
def test_a_data_file_that_cannot_be_used_is_named(harness, text, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TaskError, match=re.escape(message)) as caught:
        manager({"data": str(path)}).load(["layerrope_kv"])
    assert str(path) in str(caught.value)


def test_a_task_without_data_says_how_to_get_some(harness):
    with pytest.raises(TaskError, match=r"layerrope_kv needs a file of prompts.*--metadata data=prompts\.jsonl"):
        manager({}).load(["layerrope_kv"])


@pytest.mark.parametrize("missing", [None, 1, 0])
def test_prompts_that_lm_eval_would_cut_are_refused(harness, missing, data, split):
    longest = max(len(example.context_ids + example.query_ids) for example in split.examples)
    needed = longest + 8  # tokens that the task file has generated
    room = {} if missing is None else {"max_length": needed - missing}
    arguments = {"data": str(data), "pretrained": peft_layerrope.demo_model_path(), **room}
    if missing == 0:
        manager(arguments).load(["layerrope_kv_words"])
        return
    limit = room.get("max_length", 256)  # the demo model's window
    message = f"{longest} tokens, and with 8 to generate lm_eval would cut it to max_length={limit}."
    with pytest.raises(TaskError, match=re.escape(message)) as caught:
        manager(arguments).load(["layerrope_kv_words"])
    assert f"add max_length={needed} to --model_args" in str(caught.value)


@pytest.mark.parametrize("name", ["max_length", "max_model_len", "context_length"])
def test_what_cuts_prompts_goes_by_the_names_of_all_backends(harness, name):
    from peft_layerrope.lm_eval_tasks.position_curve import check_length

    arguments = {"pretrained": peft_layerrope.demo_model_path()}
    with pytest.raises(TaskError, match="max_length=20"):
        check_length(["word " * 30], {**arguments, name: 20}, 1)
    check_length(["word " * 300], {**arguments, name: 5000}, 1)


@pytest.mark.parametrize(
    ("settings", "gets_text"),
    [
        ({}, False),
        ({"tokenized_requests": False}, True),
        ({"tokenizer_backend": "None"}, True),
        ({"max_length": 99}, False),
    ],
)
def test_a_server_gets_whole_prompts_as_text(harness, settings, gets_text, data, split):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    served = {"model": "any", "base_url": "http://127.0.0.1:9/v1/completions", **settings}
    served["tokenizer"] = peft_layerrope.demo_model_path()
    if gets_text:
        manager({"data": str(data), **served}).load(["layerrope_kv_words"])
    else:
        with pytest.raises(TaskError, match="tokenized_requests=False"):
            manager({"data": str(data), **served}).load(["layerrope_kv_words"])
    lm, sent = LocalCompletionsAPI(**served, batch_size=1), []

    def answer(messages, **asked):
        sent.extend(messages)
        return {"choices": [{"text": "", "index": 0}]}

    lm.model_call = answer
    evaluate(lm, "layerrope_kv_words", {"data": str(data)})
    prompts = {json.loads(line)["prompt"] for line in data.open()}
    whole = {tuple(example.context_ids + example.query_ids) for example in split.examples}
    found = {text if isinstance(text, str) else tuple(text) for text in sent}
    assert found == prompts if gets_text else not found & whole


def test_the_command_runs_an_adapter(harness, split, data, demo_model, tmp_path):
    arguments = [
        *("--model", "hf", "--tasks", "layerrope_kv_words", "--batch_size", "4", "--device", "cpu"),
        *("--model_args", f"pretrained={peft_layerrope.demo_model_path()},peft={ADAPTER},max_length={ROOM}"),
        *("--metadata", json.dumps({"data": str(data)}), "--output_path", str(tmp_path / "results.json")),
    ]
    started = [sys.executable, "-c", "from peft_layerrope.cli import run; run()", "lm-eval", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(started, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "acc_position_000" in done.stdout
    (written,) = tmp_path.glob("results*.json")
    found = accuracies(json.loads(written.read_text())["results"]["layerrope_kv_words"])
    assert found == expected(Scorer(PeftModel.from_pretrained(demo_model, ADAPTER)).score(split))


def test_the_example_compares_with_and_without(harness, split, data, demo_model, monkeypatch, capsys):
    script = str(ROOT / "examples" / "evaluate_with_lm_eval.py")
    monkeypatch.setattr(sys, "argv", [script, str(data), ADAPTER])
    runpy.run_path(script, run_name="__main__")
    plain, scaled = Scorer(demo_model).score(split), Scorer(PeftModel.from_pretrained(demo_model, ADAPTER)).score(split)
    overall = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("acc "))
    assert overall == ["acc", f"{100 * plain.average().value:.1f}", f"{100 * scaled.average().value:.1f}"]


def invoke(*arguments: str):
    result = CliRunner().invoke(app, ["lm-eval", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_is_ours_and_names_the_other(arguments):
    shown = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", invoke(*arguments).stdout).split())
    for text in ("layerrope_multi_doc", "layerrope lm-eval run --help", "--print-include-path", "max_length"):
        assert text in shown


def test_the_printed_folder_holds_the_tasks():
    folder = Path(invoke("--print-include-path").stdout.strip())
    assert {path.stem for path in folder.glob("*.yaml")} == {
        "layerrope_kv",
        "layerrope_kv_words",
        "layerrope_multi_doc",
    }


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(peft_layerrope.LayerRopeError, match=re.escape('pip install "peft-layerrope[lm-eval]"')):
        command.run_lm_eval(["--tasks", "x"])
    done = invoke("--tasks", "x")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: lm_eval is not installed: pip install")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def lm_eval_is(monkeypatch):
    """Puts a function in the place of lm_eval's command."""

    def replace(cli_evaluate):
        fake = types.ModuleType("lm_eval.__main__")
        fake.cli_evaluate = cli_evaluate
        monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
        monkeypatch.setitem(sys.modules, "lm_eval.__main__", fake)
        monkeypatch.setattr(command, "find_spec", lambda name: name)

    return replace


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--model", "hf", "--tasks", "x"], [*OURS, "--model", "hf", "--tasks", "x"]),
        (["run", "--tasks", "x", "y"], ["run", *OURS, "--tasks", "x", "y"]),
        (["ls", "tasks"], ["ls", *OURS, "tasks"]),
        (["run", "--tasks", "x", "--help"], ["run", *OURS, "--tasks", "x", "--help"]),
        (["-L", "5", "--tasks", "x"], [*OURS, "-L", "5", "--tasks", "x"]),
        (["run"], ["run"]),
        (["--tasks", "x", "--include_path", "mine"], ["--tasks", "x", "--include_path", "mine"]),
        (["--include_path=mine", "--tasks", "x"], ["--include_path=mine", "--tasks", "x"]),
        (["run", "--config", "mine.yaml"], ["run", "--config", "mine.yaml"]),
        (["run", "-C", "mine.yaml"], ["run", "-C", "mine.yaml"]),
    ],
)
def test_what_lm_eval_is_given(given, passed, lm_eval_is):
    seen = []
    lm_eval_is(lambda: seen.append(list(sys.argv)))
    before = list(sys.argv)
    assert invoke(*given).exit_code == 0
    assert seen == [["lm-eval", *passed]]
    assert sys.argv == before


def test_a_task_error_inside_lm_eval_is_one_line(lm_eval_is):
    def broken():
        raise TaskError("prompts.jsonl is empty.")

    lm_eval_is(broken)
    done = invoke("--model", "hf", "--tasks", "layerrope_kv")
    assert (done.exit_code, done.stderr) == (2, "error: prompts.jsonl is empty.\n")
