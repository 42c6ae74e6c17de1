"""transformers' own doors: `pipeline`, `from_pretrained`, `transformers serve` on an adapter's files; TRL's trainer."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import logits, needs_adapter_methods, real_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import import_utils

from peft_layerrope import LayerRopeConfig, demo_model_path, restore_baked, verify
from peft_layerrope.tuner.artifacts import save_adapter

NUM_TOKENS = 12


@pytest.fixture(params=["demo", "smollm2-135m-instruct"])
def base(request) -> Path:
    return Path(demo_model_path()) if request.param == "demo" else real_model(request.param)


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    number = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    factors = [1 + 2 * layer / (number - 1) for layer in range(number)]
    save_adapter(
        LayerRopeConfig(layer_factors=factors, base_model_name_or_path=str(base), task_type="CAUSAL_LM"),
        tmp_path / "adapter",
    )
    return tmp_path / "adapter"


@pytest.fixture
def beside(base, adapter, tmp_path) -> Path:
    """A folder with the files of a model and those of its adapter."""
    shutil.copytree(base, tmp_path / "beside")
    return shutil.copytree(adapter, tmp_path / "beside", dirs_exist_ok=True)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompt_of(base: Path) -> str:
    """Any words that the model has: the demo's are few."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    drawn = torch.randint(20, len(tokenizer), (200,), generator=torch.Generator().manual_seed(0))
    text = tokenizer.decode(drawn, skip_special_tokens=True)
    return tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)


def prompt_ids(base: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(base)(prompt_of(base), return_tensors="pt").input_ids


def written(model: torch.nn.Module, base: Path) -> str:
    """The greedy answer by a loop over the model, without `generate`."""
    ids = first = prompt_ids(base)
    for _ in range(NUM_TOKENS):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], -1)
    return AutoTokenizer.from_pretrained(base).decode(ids[0, first.shape[1] :], skip_special_tokens=True)


def scaled_and_plain(base: Path, adapter: Path) -> tuple[str, str]:
    plain = written(load(base), base)
    scaled = written(PeftModel.from_pretrained(load(base), adapter), base)
    assert scaled != plain  # else nothing below shows that the factors are in force
    return scaled, plain


@needs_adapter_methods
def test_a_pipeline_takes_the_adapter_s_folder(base, adapter):
    scaled, _ = scaled_and_plain(base, adapter)
    pipe = pipeline("text-generation", model=str(adapter), tokenizer=str(base), dtype=torch.float32)
    asked = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False, "return_full_text": False}
    found = pipe(prompt_of(base), **asked)[0]["generated_text"]
    assert found.strip() == scaled.strip()  # transformers 5.0's pipeline keeps the space before the first word


@needs_adapter_methods
def test_from_pretrained_takes_a_model_with_the_adapter_s_files_beside_it(base, adapter, beside):
    ids = prompt_ids(base)
    wanted = logits(PeftModel.from_pretrained(load(base), adapter), ids)
    torch.testing.assert_close(logits(load(beside), ids), wanted, atol=1e-4, rtol=0)
    assert (logits(load(base), ids) - wanted).abs().max() > 0.01


@contextmanager
def transformers_serve(folder: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the command, in a process that knows the adapter's type
    code = "import peft_layerrope; from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen([*command, "--device", "cpu"], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        until = time.monotonic() + 300
        while True:
            try:
                urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except URLError:
                assert process.poll() is None, "the server stopped"
                assert time.monotonic() < until, "the server does not answer"
        yield f"http://localhost:{port}/v1/completions"
    finally:
        process.terminate()
        process.wait()


@needs_adapter_methods
@pytest.mark.skipif(
    not getattr(import_utils, "is_serve_available", bool)(), reason="transformers' server has packages of its own"
)
def test_transformers_serve_answers_by_the_factors(base, adapter, beside):
    scaled, plain = scaled_and_plain(base, adapter)
    with transformers_serve(beside) as url:
        body = {"model": str(beside), "prompt": prompt_of(base), "max_tokens": NUM_TOKENS, "temperature": 0}
        asked = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(asked, timeout=300) as answer:
            found = json.load(answer)["choices"][0]["text"]
    assert found
    assert scaled.startswith(found)
    assert not plain.startswith(found)


def test_sft_trainer_trains_a_lora_on_a_baked_base(base, adapter, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    baked = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    baked.save_pretrained(tmp_path / "baked")
    reopened = restore_baked(load(tmp_path / "baked"))
    ids = prompt_ids(base)
    scaled = PeftModel.from_pretrained(load(base), adapter)
    loss = scaled(input_ids=ids, labels=ids).loss.item()  # of the first step, whose LoRA does nothing yet
    assert loss != pytest.approx(load(base)(input_ids=ids, labels=ids).loss.item(), rel=1e-3)

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    rows = datasets.Dataset.from_list([{"input_ids": ids[0].tolist()}] * 4)
    settings = {"max_steps": 3, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "loss_type": "nll"}
    trainer = trl.SFTTrainer(
        get_peft_model(reopened, lora),
        trl.SFTConfig(str(tmp_path / "lora"), **settings),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    told = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert told[0] == pytest.approx(loss, rel=1e-3)
    assert told[-1] < told[0]
    trainer.save_model()

    found = PeftModel.from_pretrained(restore_baked(load(tmp_path / "baked")), tmp_path / "lora")
    torch.testing.assert_close(logits(found, ids), logits(trainer.model.eval(), ids), atol=1e-4, rtol=0)
    assert verify(found.base_model.model).ok
    assert (logits(found, ids) - logits(scaled, ids)).abs().max() > 0.1  # the LoRA learned
