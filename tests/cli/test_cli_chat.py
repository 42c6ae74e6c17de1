"""Chat templates on the command line: a date that stays, and settings that results remember."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import build_model
from fakes import LEAST_OPTIONS
from test_chat import DATED, QWEN3, other_day, with_template  # noqa: F401 (a fixture)
from test_cli import run

TASK = ("--task", "kv_retrieval", "--keys", "words", "--num-keys", "4", "--positions", "3", "--length", "300")
FEW = (*LEAST_OPTIONS, "--max-new-tokens", "4")


@pytest.fixture
def model(tmp_path):
    def save(template: str) -> str:
        folder = tmp_path / "model"
        build_model("llama", vocab_size=600, max_position_embeddings=512).save_pretrained(folder)
        with_template(template).save_pretrained(folder)
        return str(folder)

    return save


def test_a_dated_search_is_resumed_and_repeated_on_another_day(model, tmp_path, other_day):  # noqa: F811
    folder, first, second = model(DATED), tmp_path / "first", tmp_path / "second"
    other_day("2024-07-26")
    done = run("search", folder, *TASK, *FEW, "--output", str(first))
    assert done.exit_code == 0, done.stderr
    report = (first / "search.json").read_bytes()
    assert json.loads(report)["task"]["chat_date"] == "2024-07-26"
    assert "2024-07-26" in (first / "README.md").read_text()
    other_day("2025-01-02")
    (first / "search.json").unlink()
    done = run("search", "--output", str(first), "--resume")
    assert done.exit_code == 0, done.stderr
    assert (first / "search.json").read_bytes() == report
    assert run("search", "--config", str(first / "search.yaml"), "--output", str(second)).exit_code == 0
    assert (second / "search.json").read_bytes() == report
    new = ("search", "--config", str(first / "search.yaml"), "--no-chat-template", "--output", str(tmp_path / "third"))
    assert run(*new).exit_code == 0
    assert yaml.safe_load((tmp_path / "third" / "search.yaml").read_text())["task"]["chat_date"] is None


@pytest.mark.parametrize("command", [("evaluate",), ("experiment", "sweep", "--try", "1", "--try", "1.5")])
def test_a_dated_measurement_is_resumed_on_another_day(command, model, tmp_path, other_day):  # noqa: F811
    words = (*command, model(DATED), *TASK, "--groups", "3", "--max-new-tokens", "4", "--output", str(tmp_path / "out"))
    other_day("2024-07-26")
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    results = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    assert results
    other_day("2025-01-02")
    for path in results:  # as after a kill before the end
        if path.name in ("evaluation.json", "sweep.json"):
            path.unlink()
    done = run(*words, "--resume")
    assert done.exit_code == 0, done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == results
    done = run(*words, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert "2025-01-02" in (tmp_path / "out" / "chat_date.txt").read_text()


def test_arguments_of_the_template_reach_prompts_and_results(model, tmp_path):
    chat = ("--chat-template-args", '{"enable_thinking": false}', "--system-prompt", "Be brief.")
    folder = model(QWEN3)
    done = run("prompts", folder, *TASK, *chat, "--limit", "1")
    prompt = json.loads(done.stdout)["prompt"]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    words = ("evaluate", folder, *TASK, *chat, "--groups", "2", "--teacher-forced", "--max-new-tokens", "4")
    done = run(*words, "--json", str(tmp_path / "e.json"))
    assert done.exit_code == 0, done.stderr
    task = json.loads((tmp_path / "e.json").read_text())["task"]
    assert (task["chat_template"], task["chat_template_args"]) == (True, {"enable_thinking": False})
    assert task["system_prompt"] == "Be brief."
    done = run("search", folder, *TASK, *FEW, *chat, "--output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    asked = yaml.safe_load((tmp_path / "out" / "search.yaml").read_text())["task"]
    assert (asked["chat_template_args"], asked["system_prompt"]) == ({"enable_thinking": False}, "Be brief.")
    assert '{"enable_thinking": false}' in (tmp_path / "out" / "README.md").read_text()
    words = ("report", str(tmp_path / "out"), "--model", folder, "--quick", "--groups", "2", "--format", "md")
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    assert "--chat-template-args '{\"enable_thinking\": false}'" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--chat-template-args", "{enable_thinking: false}"), "JSON"),
        (("--chat-template-args", '{"enable_thinkin": false}'), "enable_thinkin"),
        (("--no-chat-template", "--system-prompt", "x"), "chat_template"),
        (("--chat-date", "2024-07-26"), "chat_date"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(arguments, word, model, tmp_path):
    done = run("search", model(QWEN3), *TASK, *FEW, *arguments, "--output", str(tmp_path / "out"))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert word in done.stderr
    assert not (tmp_path / "out").exists()
