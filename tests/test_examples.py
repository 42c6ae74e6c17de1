"""Examples run as they stand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_layerrope
from peft_layerrope import LayerRopeConfig
from peft_layerrope.artifacts import save_adapter

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def training():
    spec = importlib.util.spec_from_file_location("train_demo_model", EXAMPLES / "train_demo_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_quick_start(tmp_path, demo_model):
    factors = [1.1] * demo_model.config.num_hidden_layers
    save_adapter(LayerRopeConfig(layer_factors=factors, base_model_name_or_path="peft_layerrope/demo"), tmp_path)
    lines = run("quick_start.py", str(tmp_path), "--prompts", "2").splitlines()
    assert lines[0].split() == ["question", "right", "answer", "without", "adapter", "with", "adapter"]
    assert len(lines) == 1 + 2


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("lora")
    output = run("train_lora.py", "--output", str(folder), "--steps", "2", "--batch", "1", "--contexts", "2")
    return folder, output.splitlines()


def test_train_lora(lora_run):
    folder, lines = lora_run
    accuracy = {line[:28].strip(): line[28:] for line in lines if " ± " in line}
    assert list(accuracy) == [
        "base",
        "base + LAYER_ROPE",
        "base + LAYER_ROPE + LoRA",
        "the same, LoRA disabled",
    ]
    assert accuracy["the same, LoRA disabled"] == accuracy["base + LAYER_ROPE"] != accuracy["base"]
    assert lines[-1] == f"saved the LoRA: {folder}"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:  # the keys of any LoRA for a Llama
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in file.keys()  # noqa: SIM118
        assert not any("base_layer" in key or "rotary" in key for key in file.keys())  # noqa: SIM118


def test_serve_with_lora(lora_run):
    folder, _ = lora_run
    lines = run("serve_with_lora.py", str(folder), "--prompts", "2").splitlines()
    assert [line[:28].strip() for line in lines[1:]] == [
        "base",
        "LoRA + LAYER_ROPE",
        "LAYER_ROPE alone",
        "LoRA alone",
        "LoRA + second LAYER_ROPE",
        "LoRA + LAYER_ROPE again",
    ]
    assert all(" of 2 " in line for line in lines[1:])
    assert lines[2][28:] == lines[-1][28:]


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
