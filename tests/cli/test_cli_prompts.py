"""`layerrope prompts`, and the task options that it shares with the other commands."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import build_model
from tiny_tokenizer import tiny_bpe
from typer.testing import CliRunner

from peft_layerrope import KeyValueRetrieval
from peft_layerrope.cli import app
from peft_layerrope.cli.options import with_defaults
from peft_layerrope.tasks.specification import TaskSpecification


def run(*arguments: str):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def file(tmp_path) -> Path:
    pairs = [[[f"k{n}-{i}", f"vé{n}-{i}"] for i in range(6)] for n in range(10)]
    records = [{"ordered_kv_records": p, "key": p[1][0], "value": p[1][1]} for p in pairs]
    path = tmp_path / "kv.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with a tokenizer and a config, and no weights."""
    build_model("llama", vocab_size=600, max_position_embeddings=512).config.save_pretrained(tmp_path / "m")
    tiny_bpe(chat=True).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def lines_of(done) -> list[dict]:
    assert (done.exit_code, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_prompts_are_the_tasks_own_and_need_no_weights(model, file):
    arguments = ("prompts", str(model), "--task", "kv_retrieval", "--data", str(file))
    task = KeyValueRetrieval(tiny_bpe(chat=True), data=file)
    wanted = [
        {"prompt": task.as_sent(p), "answers": [*p.answers], "position": p.position} for p in task.prompts("test", 4)
    ]
    assert lines_of(run(*arguments, "--limit", "20")) == wanted
    assert lines_of(run(*arguments, "--limit", "7")) == wanted[:7]
    one = lines_of(run(*arguments, "--position", "3", "--limit", "4", "--split", "search", "--seed", "5"))
    other = KeyValueRetrieval(tiny_bpe(), data=file, seed=5).prompts("search", 4, [3])
    assert [(line["prompt"], line["position"]) for line in one] == [(task.as_sent(p), 3) for p in other]


def test_the_demo_models_task_needs_no_argument():
    line, *_ = lines_of(run("prompts", "--limit", "1"))
    key = line["prompt"].rsplit(" ? ", 1)[1]
    assert f"{key} {line['answers'][0]} ," in line["prompt"]
    assert line["position"] == 0


def test_the_chat_template_is_in_use_unless_it_is_turned_off(model, file):
    arguments = ("prompts", str(model), "--data", str(file), "--limit", "1")
    plain, chat = lines_of(run(*arguments, "--no-chat-template")), lines_of(run(*arguments))
    assert chat[0]["prompt"] == f"<|bos|><|user|>{plain[0]['prompt']}<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--position", "6"],
            "gold positions (6,) must be distinct, ascending and from 0 to 5",
        ),
        (["--limit", "21"], "the file has 4 contexts for it, 5 were asked for"),
        (["--length", "50"], "tokens with its answer, more than length=50."),
        (["--num-keys", "7"], "num_keys=7, but the records of"),
        (["--num-documents", "7"], "num_documents=7 is no setting of kv_retrieval"),
        (["--keys", "words"], "keys='words', expected nothing: data has keys of its own"),
        (["--task", "kv_words"], "is no setting of kv_words"),
        (["--task", "multi_doc_qa"], "line 1: question is missing"),
        (["--task", "perplexity"], "--task perplexity has no prompts"),
    ],
)
def test_what_cannot_work_is_one_line_and_nothing_on_stdout(model, file, arguments, message):
    done = run("prompts", str(model), "--data", str(file), *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_teaches_with_an_example():
    text = re.sub(r"\x1b\[[0-9;]*m", "", run("prompts", "--help").stdout)
    for part in ("layerrope prompts --task kv_retrieval", "--position", "--limit", "--data", "--chat-template"):
        assert part in text


@pytest.mark.parametrize(
    ("asked", "is_demo", "name", "length"),
    [
        (TaskSpecification(), True, "kv_words", 512),
        (TaskSpecification(), False, "kv_retrieval", 256),
        (TaskSpecification("kv_retrieval", length=100), True, "kv_retrieval", 100),
        (TaskSpecification("kv_words"), False, "kv_words", 256),
    ],
)
def test_default_task_and_length(asked, is_demo, name, length):
    found = with_defaults(asked, 256, is_demo, tiny_bpe())
    assert (found.name, found.length) == (name, length)


def test_a_search_records_its_task_and_is_repeated_by_it(model, file, tmp_path):
    build_model("llama", vocab_size=600, max_position_embeddings=512).save_pretrained(model)
    settings = ["--minutes", "0.01", "--test-groups", "2", "--test-minutes", "0.01"]
    settings += ["--preflight-groups", "2", "--anyway"]  # its answers are nonsense
    first, second = tmp_path / "first", tmp_path / "second"
    task = ["--data", str(file), "--num-keys", "4", "--positions", "3", "--task-seed", "3"]
    assert run("search", str(model), "--output", str(first), *task, *settings).exit_code == 0
    recorded = yaml.safe_load((first / "search.yaml").read_text())["task"]
    assert recorded == {
        "name": "kv_retrieval",
        "length": 512,
        "num_positions": 3,
        "task_seed": 3,
        "data": str(file),
        "num_keys": 4,
        "keys": None,
        "num_documents": None,
        "difficulty": None,
        "stride": None,
        "chat_template": True,
        "chat_template_args": None,
        "system_prompt": None,
        "chat_date": None,
        "max_new_tokens": None,
    }
    assert run("search", "--config", str(first / "search.yaml"), "--output", str(second)).exit_code == 0
    reports = [json.loads((folder / "search.json").read_text()) for folder in (first, second)]
    assert reports[0] == reports[1]
    assert reports[0]["task"]["data"] == "kv.jsonl.gz"


@pytest.mark.parametrize("command", ["search", "sensitivity"])
def test_a_prompt_beyond_the_window_is_refused_before_the_weights_are_read(command, file, tmp_path):
    build_model("llama", vocab_size=600, max_position_embeddings=40).config.save_pretrained(tmp_path / "m")
    tiny_bpe().save_pretrained(tmp_path / "m")
    output = ["--output", str(tmp_path / "out")] if command == "search" else []
    done = run(command, str(tmp_path / "m"), "--task", "kv_retrieval", "--stride", "4", *output)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "stride=4 is no setting of kv_retrieval" in done.stderr
    done = run(command, str(tmp_path / "m"), *output)
    assert done.exit_code == 2
    assert "length=40 tokens holds fewer than 2 pairs" in done.stderr
