"""Adapter files: round trips, the second process, disagreement, baked models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import NUM_LAYERS, build_model, logits
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_layerrope import AdapterMismatchError, LayerRopeConfig, LayerRopeError, restore_baked
from peft_layerrope.tuner.artifacts import FACTORS_KEY, save_adapter

FACTORS = [1.0, 1.1, 2.0, 1.3]
CONFIGS = {
    "default": {"layer_factors": FACTORS},
    "linear": {"layer_factors": FACTORS, "rope_type": "linear", "factor": 2.0},
    "dynamic": {"layer_factors": FACTORS, "rope_type": "dynamic", "factor": 1.5},
}


@pytest.fixture(params=list(CONFIGS))
def config(request) -> LayerRopeConfig:
    return LayerRopeConfig(task_type="CAUSAL_LM", **CONFIGS[request.param])


def test_round_trip_through_peft(family, config, long_ids, tmp_path):
    model = get_peft_model(build_model(family), config)
    expected = logits(model.eval(), long_ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build_model(family), tmp_path), long_ids), expected)


def test_the_file_holds_one_float32_tensor(config, tmp_path):
    get_peft_model(build_model("llama"), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert list(tensors) == [FACTORS_KEY]
    assert tensors[FACTORS_KEY].dtype == torch.float32
    assert torch.equal(tensors[FACTORS_KEY], torch.tensor(FACTORS))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layer_factors"] == FACTORS


def test_save_adapter_writes_what_peft_writes(config, tmp_path):
    for name in ("ours", "peft"):
        (tmp_path / name).mkdir()
    save_adapter(config, tmp_path / "ours")
    get_peft_model(build_model("llama"), config).save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    written = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    assert {**written[0], "inference_mode": True} == {**written[1], "inference_mode": True}


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "mine"}])
def test_loading_options(options, ids, tmp_path):
    model = get_peft_model(build_model("llama"), LayerRopeConfig(layer_factors=FACTORS))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path, **options)
    assert torch.equal(logits(loaded, ids), expected)
    assert loaded.get_nb_trainable_parameters()[0] == 0


def test_auto_peft_model_in_a_second_process(ids, tmp_path):
    base = build_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LayerRopeConfig(layer_factors=FACTORS, task_type="CAUSAL_LM"),
    )
    save_file({"ids": ids, "logits": logits(model, ids)}, tmp_path / "expected.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter") is not None
    code = (
        "import sys, torch, peft_layerrope\n"
        "from peft import PeftModel\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "base = AutoModelForCausalLM.from_pretrained(folder + '/base')\n"
        "model = PeftModel.from_pretrained(base, folder + '/adapter')\n"
        "expected = load_file(folder + '/expected.safetensors')\n"
        "with torch.no_grad():\n"
        "    sys.exit(0 if torch.equal(model(expected['ids']).logits, expected['logits']) else 'logits differ')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_resized_vocabulary_does_not_leak_into_the_file(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(110)
    get_peft_model(base, LayerRopeConfig(layer_factors=FACTORS)).save_pretrained(tmp_path / "adapter")
    assert list(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == [FACTORS_KEY]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {FACTORS_KEY: torch.tensor([1.0, 1.1, 2.0, 1.4])},
            "adapter_model.safetensors and adapter_config.json disagree on 1 of 4 layer_factors, first at layer 3: "
            "1.399999976158142 and 1.2999999523162842.",
        ),
        (
            {FACTORS_KEY: torch.ones(5)},
            f"adapter_model.safetensors: {FACTORS_KEY} is torch.float32 of shape (5,), expected torch.float32 of shape "
            "(4,) as in adapter_config.json.",
        ),
        (
            {FACTORS_KEY: torch.tensor(FACTORS, dtype=torch.float64)},
            f"adapter_model.safetensors: {FACTORS_KEY} is torch.float64 of shape (4,), expected torch.float32 of shape "
            "(4,) as in adapter_config.json.",
        ),
        (
            {FACTORS_KEY: torch.tensor(FACTORS), "base_model.model.extra": torch.ones(1)},
            f"adapter_model.safetensors holds base_model.model.extra, {FACTORS_KEY}; expected the one tensor "
            f"{FACTORS_KEY}.",
        ),
    ],
)
def test_files_that_disagree_are_refused(tensors, message, tmp_path):
    save_adapter(LayerRopeConfig(layer_factors=FACTORS), tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError) as caught:
        PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert str(caught.value) == message


def test_an_adapter_for_another_depth_is_refused(tmp_path):
    save_adapter(LayerRopeConfig(layer_factors=[1.5] * 32), tmp_path)
    with pytest.raises(AdapterMismatchError, match="layer_factors has 32 entries, but llama has 4 decoder layers"):
        PeftModel.from_pretrained(build_model("llama"), tmp_path)


def test_merge_and_unload_keeps_the_output(family, config, long_ids):
    model = get_peft_model(build_model(family), config)
    expected = logits(model, long_ids)
    baked = model.merge_and_unload()
    assert not hasattr(baked, "peft_config")
    assert torch.equal(logits(baked, long_ids), expected)
    assert all(p.requires_grad for p in baked.parameters())


def test_a_saved_baked_model_remembers_its_factors(config, long_ids, tmp_path):
    baked = get_peft_model(build_model("llama"), config).merge_and_unload()
    expected = logits(baked, long_ids)
    baked.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(LayerRopeError, match="restore_baked"):  # never silently unscaled under a new adapter
        get_peft_model(loaded, LayerRopeConfig(layer_factors=FACTORS))
    assert torch.equal(logits(restore_baked(loaded), long_ids), expected)
    with pytest.raises(LayerRopeError, match="applied to this model already"):
        restore_baked(loaded)


def test_restoring_a_plain_model_is_an_error():
    with pytest.raises(LayerRopeError, match="was not saved from a baked one"):
        restore_baked(build_model("llama"))


def test_merging_needs_exactly_one_existing_adapter():
    model = get_peft_model(build_model("llama"), LayerRopeConfig(layer_factors=[1.5] * NUM_LAYERS))
    with pytest.raises(ValueError, match=r"adapters \['other'\] do not exist; this model has \['default'\]"):
        model.merge_and_unload(adapter_names=["other"])
