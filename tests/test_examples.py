"""Examples run as they stand."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, build_model
from loopback_hub import loopback_hub
from peft import PeftModel
from safetensors import safe_open
from test_chat import QWEN3, with_template
from tiny_tokenizer import tiny_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_layerrope
from peft_layerrope import KeyValueWords, LayerRopeConfig, evaluate, verify
from peft_layerrope.tuner.artifacts import save_adapter

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(script: str) -> ModuleType:
    """The script as a module, under a name that shadows no other."""
    spec = importlib.util.spec_from_file_location(f"example_{script.removesuffix('.py')}", EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return load("train_demo_model.py")


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_are_short_and_say_how_to_run_them(script):
    text = (EXAMPLES / script).read_text()
    assert script == "train_demo_model.py" or len(text.splitlines()) < 80
    assert f"python examples/{script}" in text


def test_quick_start(tmp_path, demo_model):
    factors = [1.1] * demo_model.config.num_hidden_layers
    save_adapter(LayerRopeConfig(layer_factors=factors, base_model_name_or_path="peft_layerrope/demo"), tmp_path)
    lines = run("quick_start.py", str(tmp_path), "--lists", "2").splitlines()
    assert lines[0].split() == ["answer", "stands", "without", "adapter", "with", "adapter"]
    right = {line.split()[0]: re.findall("([0-2]) of 2", line) for line in lines[1:4]}
    assert list(right) == ["first", "middle", "last"]
    assert lines[5].split() == ["question", "right", "answer", "without", "adapter", "with", "adapter"]
    middle = [re.split(r"  +", line) for line in lines[6:]]
    assert len(middle) == 2
    assert right["middle"] == [str(sum(row[1] == row[column] for row in middle)) for column in (2, 3)]


def test_real_model(tmp_path, monkeypatch, capsys):
    """All but the search, which would take minutes, on a model that answers nothing."""
    build_model("llama", vocab_size=600, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    with_template(QWEN3).save_pretrained(tmp_path / "model")

    def search(model, task, *, steps, test_groups):
        def save(folder):
            save_adapter(LayerRopeConfig(layer_factors=[1.1] * NUM_LAYERS), Path(folder))

        assert (task.num_items, task.positions, steps) == (9, (0, 2, 4, 6, 8), 3)
        return SimpleNamespace(notes=["found"], save_pretrained=save)

    monkeypatch.setattr(peft_layerrope, "search", search)
    output = tmp_path / "adapter"
    given = f"--model {tmp_path / 'model'} --output {output} --pairs 9 --steps 3 --contexts 2".split()
    monkeypatch.setattr(sys, "argv", ["real_model.py", *given])
    load("real_model.py")
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("0%") for line in lines[-4:]] == [5, 0, 5, 0]
    assert lines[-1].startswith("gain: +0.0 points [-")
    assert (output / "before_and_after.png").read_bytes().startswith(b"\x89PNG")


def test_rag(tmp_path):
    """Every question's passage is about its own number, which the retriever has to find and the model never answers."""
    tokenizer = with_template(QWEN3)
    build_model("llama", vocab_size=600, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_adapter(LayerRopeConfig(layer_factors=[1.1] * NUM_LAYERS), tmp_path / "adapter")
    passages = [{"title": f"t{i}", "text": f"The number {i} is a number.", "isgold": True} for i in range(12)]
    records = [
        {"question": f"What is number {i}?", "answers": ["none such"], "ctxs": [passage]}
        for i, passage in enumerate(passages)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    given = {"model": "model", "adapter": "adapter", "data": "data.jsonl"}
    paths = [word for name, file in given.items() for word in (f"--{name}", str(tmp_path / file))]
    lines = run("rag.py", *paths, "--questions", "2", "--documents", "3").splitlines()
    names = ["as retrieved, with the adapter", "as retrieved", "reordered, with the adapter", "reordered"]
    assert lines[-1] == "of 2: " + "; ".join(f"{name} 0" for name in names)
    rag = load("rag.py")
    texts = [f"{passage['title']}: {passage['text']}" for passage in passages]
    assert all(rag.Retriever(texts).best(f"number {i}?", 2)[0] == texts[i] for i in range(12))
    assert rag.ORDERS["reordered"](list("abcdefg")) == list("acegfdb")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("lora")
    output = run("train_lora.py", "--output", str(folder), "--steps", "2", "--contexts", "2")
    return folder, output.splitlines()


def test_train_lora(lora_run, demo_model):
    folder, lines = lora_run
    shown = dict(re.findall(r"^(with.*?): +(\d+\.\d%) right$", "\n".join(lines), re.MULTILINE))
    assert list(shown) == ["with the LoRA", "without the LoRA"]
    scaled = PeftModel.from_pretrained(demo_model, EXAMPLES.parent / "hub_configs" / "demo-plain")
    task = KeyValueWords(AutoTokenizer.from_pretrained(peft_layerrope.demo_model_path()), 512)
    assert shown["without the LoRA"] == f"{evaluate(scaled, task, num_groups=2).average().value:.1%}"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:  # the keys of any LoRA for a Llama
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in file.keys()  # noqa: SIM118
        assert not any("base_layer" in key or "rotary" in key for key in file.keys())  # noqa: SIM118


def test_train_lora_on_fewer_pairs_than_positions_are_usual(tmp_path):
    build_model("llama", vocab_size=600, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tiny_bpe().save_pretrained(tmp_path / "model")
    given = ("--model", str(tmp_path / "model"), "--pairs", "3", "--steps", "1", "--contexts", "1")
    assert "without the LoRA" in run("train_lora.py", *given, "--output", str(tmp_path / "lora"))


def test_lora_rows_have_their_loss_on_the_right_answers():
    script = load("train_lora.py")
    tokenizer = AutoTokenizer.from_pretrained(peft_layerrope.demo_model_path())
    task = KeyValueWords(tokenizer, script.LENGTH, num_positions=script.QUESTIONS, num_pairs=script.PAIRS, seed=1)
    rows = script.training_rows(task, 3)
    assert len(rows) == 3
    orders = set()
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) <= script.LENGTH
        listing = {ids[i]: ids[i + 1 : i + 3] for i in range(1, 1 + 4 * script.PAIRS, 4)}
        asked = [i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("?")]
        assert len(asked) == script.QUESTIONS
        for i in asked:
            assert ids[i + 2 : i + 4] == labels[i + 2 : i + 4] == listing[ids[i + 1]]
        assert sum(label != -100 for label in labels) == 2 * script.QUESTIONS
        orders.add(tuple(list(listing).index(ids[i + 1]) for i in asked))
    assert len(orders) == 3  # asked in order, the next answer would be the next pair's
    assert all(list(order) != sorted(order) for order in orders)


def test_serve_with_lora(lora_run):
    folder, _ = lora_run
    lines = run("serve_with_lora.py", str(folder), "--prompts", "2").splitlines()
    assert [line[:28].strip() for line in lines] == [
        "base",
        "LoRA + LAYER_ROPE",
        "LAYER_ROPE alone",
        "LoRA alone",
        "LoRA + second LAYER_ROPE",
    ]
    assert all(re.fullmatch(r"[0-2] of 2", line[28:]) for line in lines)


@pytest.mark.slow
def test_search(tmp_path, demo_model):
    lines = run("search.py", "--output", str(tmp_path), "--contexts", "10", "--minutes", "0.05").splitlines()
    assert any(line.startswith("steps: per layer") for line in lines)  # its own progress
    report = json.loads((tmp_path / "search.json").read_text())
    shown = [line.split("   ") for line in lines[-len(report["table"]) :]]
    assert [factors for *_, factors in shown] == [
        " ".join(f"{factor:g}" for factor in row["layer_factors"]) for row in report["table"]
    ]
    assert report["task"]["name"] == "my lists"
    assert verify(PeftModel.from_pretrained(demo_model, tmp_path)).ok


def test_the_search_examples_lists_are_what_the_demo_model_reads():
    script = load("search.py")
    tokenizer = AutoTokenizer.from_pretrained(peft_layerrope.demo_model_path())
    for example in script.my_examples(tokenizer, 2):
        text = tokenizer.decode(example.context_ids)
        key = tokenizer.decode(example.query_ids).removeprefix("? ")
        pairs = [pair.split() for pair in text.removeprefix("[BOS] ").rstrip(" ,").split(" , ")]
        place = script.POSITIONS[example.position]
        assert (len(pairs), pairs[place]) == (script.PAIRS, [key, *tokenizer.decode(example.answer_ids).split()])


def test_share_on_the_hub(tmp_path):
    folder = EXAMPLES.parent / "hub_configs" / "demo-plain"
    with loopback_hub(alice="hf_alice") as hub:
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path),  # another cache, and no token but this one
            "HF_TOKEN": "hf_alice",
            "HF_HUB_OFFLINE": "0",
        }
        lines = run("share_on_the_hub.py", str(folder), "alice/demo-plain", "--private", **environment).splitlines()
        repo = hub.repos["alice/demo-plain"]
    assert repo.private
    assert repo.files()["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert lines[0].startswith(f"uploaded: {hub.endpoint}/alice/demo-plain/commit/")
    factors = json.loads((folder / "adapter_config.json").read_text())["layer_factors"]
    measured = [line.split()[2:4] for line in lines[3:]]
    assert measured == [[f"{factor:.3f}", "ok"] for factor in factors]


@pytest.mark.slow
def test_cluster(tmp_path):
    pytest.importorskip("ray")
    few = ("--workers", "1", "--steps", "1", "--contexts", "2")
    lines = run("cluster.py", *few, "--output", str(tmp_path)).splitlines()
    assert lines[0] == f"factors: {json.loads((tmp_path / 'search.json').read_text())['layer_factors']}"
    assert re.fullmatch(r"over the best uniform factor: \S+ points \[\S+, \S+\]", lines[1])


@pytest.mark.slow
def test_training_script_writes_a_model_that_loads(tmp_path):
    output = run("train_demo_model.py", "--output", str(tmp_path), "--scale", "0.002", "--device", "cpu")
    assert "accuracy inside the window" in output
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    shipped = AutoModelForCausalLM.from_pretrained(peft_layerrope.demo_model_path())
    assert model.config.to_diff_dict() == shipped.config.to_diff_dict()
    words = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert words == AutoTokenizer.from_pretrained(peft_layerrope.demo_model_path()).get_vocab()


def test_training_batches_ask_what_the_list_says(training):
    ids, labels = training.retrieval_batch(np.random.default_rng(0), rows=3, pairs=7, queries=9)
    assert ids.shape == labels.shape == (3, 1 + 4 * 7 + 4 * 9)
    for row, marks in zip(ids.tolist(), labels.tolist(), strict=True):
        listing = {row[i]: row[i + 1 : i + 3] for i in range(1, 1 + 28, 4)}
        assert len(listing) == 7
        for i in range(29, len(row), 4):
            question, key, *values = row[i : i + 4]
            assert question == training.QUESTION
            assert listing[key] == values == marks[i + 2 : i + 4]
            assert marks[i : i + 2] == [training.IGNORE] * 2
        assert set(marks[:29]) == {training.IGNORE}


def test_copying_batches_repeat_with_their_period(training):
    ids, labels = training.copying_batch(np.random.default_rng(0), rows=4)
    for row, marks in zip(ids, labels, strict=True):
        first = int(np.argmax(marks != training.IGNORE))
        period = first - 2  # [BOS], one period, and one token that says which period it is
        np.testing.assert_array_equal(row[1 + period :], row[1:-period])
        np.testing.assert_array_equal(marks[first:], row[first:])


def test_training_is_seeded(training):
    def weights(seed: int) -> torch.Tensor:
        model = training.build_model(training.LAYERS, seed)
        training.train(model, seed, "cpu", scale=0.0005)
        return model.model.layers[0].self_attn.q_proj.weight.detach()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_shipped_model_is_small_and_safe():
    folder = Path(peft_layerrope.demo_model_path())
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    assert sum(files.values()) <= 8 * 2**20
