"""`verify` measures what the layers receive: right on good adapters, and not to be fooled by sabotaged ones."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import NUM_LAYERS, build_model, logits
from families import build_tiny, tiny_inputs
from peft import LoraConfig, get_peft_model
from torch import nn
from typer.testing import CliRunner

from peft_layerrope import LayerRopeConfig, LayerRopeError, demo_model_path, restore_baked, verify
from peft_layerrope.cli import app
from peft_layerrope.tuner.artifacts import save_adapter
from peft_layerrope.tuner.sites import find_stack
from peft_layerrope.tuner.tables import LayerScaling, LayerTableHook

FACTORS = [1.0, 1.4, 2.0, 1.2]
CONFIGS = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 1.5},
    "dynamic": {"rope_type": "dynamic", "factor": 1.5},
    "dynamic, fixed length": {"rope_type": "dynamic", "factor": 1.5, "target_length": 300},
}


def roped(model: nn.Module, **fields: object) -> nn.Module:
    return get_peft_model(model, LayerRopeConfig(layer_factors=FACTORS, **fields)).eval()


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("baked", [False, True], ids=["adapter", "baked"])
def test_measures_the_factors_of_every_rope_type(family, fields, dtype, baked):
    model = roped(build_model(family), **fields)
    model = (model.merge_and_unload() if baked else model).to(dtype)
    result = verify(model)
    assert result.ok, str(result)
    for check, factor in zip(result.layers, FACTORS, strict=True):
        expected = factor * fields.get("factor", 1.0)
        assert check.expected == pytest.approx(expected)
        assert check.measured == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("rope_type", ["yarn", "llama3", "longrope", "dynamic", "linear"])
def test_measures_on_top_of_the_models_own_rope_type(rope_type):
    rope: dict = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = 32
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    assert verify(roped(build_model("llama", rope_parameters=rope))).ok


@pytest.mark.parametrize(
    ("model_type", "without_rotation"),
    [
        ("smollm3", [1, 3]),
        ("gemma3_text", []),
        ("moshi", []),
        ("t5gemma", []),
        ("llama4_text", [1, 3]),
        ("qwen2_5_vl", []),
    ],
)
def test_families_of_every_mechanism(model_type, without_rotation):
    model = build_tiny(model_type)
    result = verify(roped(model), inputs=tiny_inputs(model))
    assert [check.layer for check in result.layers if check.status == "no rotation"] == without_rotation
    assert [check.layer for check in result.layers if check.status == "ok"] == [
        layer for layer in range(NUM_LAYERS) if layer not in without_rotation
    ]


def remove_a_hook(model: nn.Module) -> None:
    find_stack(model).layers[2]._forward_pre_hooks.clear()


def swap_two_hooks(model: nn.Module) -> None:
    first, second = (
        next(
            hook for hook in find_stack(model).layers[i]._forward_pre_hooks.values() if isinstance(hook, LayerTableHook)
        )
        for i in (1, 2)
    )
    first.layer_idx, second.layer_idx = second.layer_idx, first.layer_idx


def take_the_wrapper_out(model: nn.Module) -> None:
    for site in find_stack(model).sites:
        site.replace(site.rotary.base_layer)


def disable_it(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


def change_the_factors_behind_its_back(model: nn.Module) -> None:
    for wrapper in find_stack(model).wrappers():
        wrapper.set_scaling("default", LayerScaling("default", 1.0, (1.0, 1.4, 1.9, 1.2), 64))


def change_the_configuration(model: nn.Module) -> None:
    model.peft_config["default"].layer_factors = [1.0, 1.4, 2.0, 1.3]


def open_the_tables_early(model: nn.Module) -> None:
    """What a serving engine's patch might do: hand every layer the first one's table."""
    hook = LayerTableHook(1)
    for layer in find_stack(model).layers:
        layer._forward_pre_hooks.clear()
        layer.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    ("sabotage", "mismatched"),
    [
        (remove_a_hook, [2]),
        (swap_two_hooks, [1, 2]),
        (take_the_wrapper_out, [1, 2, 3]),
        (disable_it, [1, 2, 3]),
        (change_the_factors_behind_its_back, [2]),
        (change_the_configuration, [3]),
        (open_the_tables_early, [0, 2, 3]),
    ],
)
def test_sabotage_is_found_and_the_layers_named(sabotage, mismatched):
    model = roped(build_model("llama"))
    sabotage(model)
    result = verify(model)
    assert result.mismatched == mismatched
    with pytest.raises(LayerRopeError) as caught:
        result.raise_for_mismatch()
    assert str(caught.value) == (
        f"llama: the rotation of layers {mismatched} is not what the adapter says. "
        "`print(peft_layerrope.verify(model))` shows expected and measured factors."
    )


def test_the_printed_table():
    model = roped(build_model("llama"))
    remove_a_hook(model)
    assert str(verify(model)).splitlines() == [
        "layer  expected  measured  status",
        "    0     1.000     1.000  ok",
        "    1     1.400     1.400  ok",
        "    2     2.000         -  mismatch (its hook is missing: it was handed the tables of all layers unopened)",
        "    3     1.200     1.200  ok",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_of_the_grid_is_told_apart(dtype):
    model = get_peft_model(build_model("llama"), LayerRopeConfig(layer_factors=[2.0] * NUM_LAYERS)).to(dtype)
    assert verify(model, LayerRopeConfig(layer_factors=[2.0, 1.9, 2.0, 2.1])).mismatched == [1, 3]


def test_the_model_is_left_as_it_was(ids):
    model = roped(build_model("llama")).train()
    model.get_base_model().model.layers[1].eval()
    expected = logits(model, ids)
    modes = [module.training for module in model.modules()]
    hooks = [len(layer._forward_pre_hooks) for layer in find_stack(model).layers]
    structure = repr(model)
    verify(model)
    assert [module.training for module in model.modules()] == modes
    assert [len(layer._forward_pre_hooks) for layer in find_stack(model).layers] == hooks
    assert repr(model) == structure
    assert torch.equal(logits(model, ids), expected)


def test_a_base_model_against_a_configuration():
    assert verify(build_model("llama"), LayerRopeConfig()).ok
    assert verify(build_model("llama"), LayerRopeConfig(layer_factors=FACTORS)).mismatched == [1, 2, 3]


def test_a_baked_checkpoint_whose_factors_are_not_applied(tmp_path):
    roped(build_model("llama")).merge_and_unload().save_pretrained(tmp_path)
    loaded = type(build_model("llama")).from_pretrained(tmp_path)
    assert verify(loaded).mismatched == [1, 2, 3]
    assert verify(restore_baked(loaded)).ok


def test_with_a_lora_on_top():
    baked = roped(build_model("llama")).merge_and_unload()
    assert verify(get_peft_model(baked, LoraConfig(target_modules=["q_proj"]))).ok


def test_nothing_to_verify():
    with pytest.raises(LayerRopeError) as caught:
        verify(build_model("llama"))
    assert str(caught.value) == "this model has no LAYER_ROPE adapter and none baked in: there is nothing to verify."


def test_wrong_number_of_expected_factors():
    with pytest.raises(LayerRopeError, match="layer_factors has 3 entries, but llama has 4 decoder layers"):
        verify(build_model("llama"), LayerRopeConfig(layer_factors=[1.0] * 3))


# The command.


@pytest.fixture
def adapter(tmp_path):
    save_adapter(LayerRopeConfig(layer_factors=[1.0, 1.4, 2.0, 1.2, 1.1, 1.0]), tmp_path)
    return tmp_path


def command(*arguments: str):
    return CliRunner().invoke(app, ["verify", *arguments], env={"COLUMNS": "120", "TERM": "dumb"})


def test_the_command_on_a_good_adapter(adapter, tmp_path):
    done = command(demo_model_path(), "--adapter", str(adapter), "--json", str(tmp_path / "out.json"))
    assert done.exit_code == 0
    assert done.stdout.count("ok") == 6
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["ok"]
    assert [round(layer["measured"], 3) for layer in written["layers"]] == [1.0, 1.4, 2.0, 1.2, 1.1, 1.0]


def test_the_command_fails_on_a_sabotaged_one(adapter, monkeypatch):
    original = LayerTableHook.__init__
    monkeypatch.setattr(LayerTableHook, "__init__", lambda self, layer_idx: original(self, min(layer_idx, 2)))
    done = command("--adapter", str(adapter))
    assert done.exit_code == 1
    assert done.stdout.count("mismatch") == 3
    assert "the rotation of layers [3, 4, 5] is not what the adapter says" in done.stderr


def test_the_command_on_a_baked_model(tmp_path, demo_model):
    factors = [1.0, 1.4, 2.0, 1.2, 1.1, 1.0]
    baked = get_peft_model(demo_model, LayerRopeConfig(layer_factors=factors)).merge_and_unload()
    baked.save_pretrained(tmp_path / "baked")
    done = command(str(tmp_path / "baked"))
    assert done.exit_code == 0
    assert done.stdout.count("ok") == 6


def test_the_command_on_a_vision_language_model(tmp_path):
    build_tiny("qwen2_5_vl").save_pretrained(tmp_path / "model")
    save_adapter(LayerRopeConfig(layer_factors=FACTORS), tmp_path)
    done = command(str(tmp_path / "model"), "--adapter", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("ok") == 4
