"""What PEFT and transformers can do with an adapter, each against a model that was patched by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import NUM_LAYERS, VOCAB, build_model, logits, needs_adapter_methods
from loopback_hub import serve
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.helpers import check_if_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from reference import hand_patched
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from peft_layerrope import (
    AdapterMismatchError,
    LayerRopeConfig,
    LayerRopeError,
    load_adapter,
    restore_baked,
    use_adapter,
    verify,
)
from peft_layerrope.base_model import ModelSource, load_base
from peft_layerrope.cli import app
from peft_layerrope.tuner.artifacts import FACTORS_KEY, save_adapter
from peft_layerrope.tuner.rotary import LayerRopeLayer

FACTORS = [1.0, 1.4, 2.0, 1.2]
OTHER = [1.5, 1.0, 1.0, 3.0]

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
ODD_FAMILIES = {
    "moshi": {},  # a rotary inside every attention module
    "gemma3_text": {  # tables per layer type, from one rotary
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def build(model_type: str) -> PreTrainedModel:
    if model_type == "llama":
        return build_model("llama")
    config = AutoConfig.for_model(model_type, **{**_SIZES, **ODD_FAMILIES[model_type]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def expected(model_type: str, factors: list[float], ids: torch.Tensor) -> torch.Tensor:
    model = build(model_type)
    if model_type == "moshi":
        for layer, factor in zip(model.model.layers, factors, strict=True):
            layer.self_attn.rotary_emb.inv_freq /= factor
        return logits(model, ids)
    return logits(hand_patched(model, factors), ids)


def close(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(actual, wanted, atol=1e-4, rtol=1e-4)


def config(factors: list[float] | None = None) -> LayerRopeConfig:
    return LayerRopeConfig(layer_factors=factors or FACTORS)


@pytest.fixture(scope="module")
def short() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["llama", *ODD_FAMILIES])
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def wanted(model_type: str, short: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "base": logits(build(model_type), short),
        "one": expected(model_type, FACTORS, short),
        "two": expected(model_type, OTHER, short),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, `two`: adapters; `base`: the llama they are for."""
    root = tmp_path_factory.mktemp("adapters")
    build("llama").save_pretrained(root / "base")
    for name, factors in (("one", FACTORS), ("two", OTHER)):
        (root / name).mkdir()
        base = {"base_model_name_or_path": str(root / "base"), "task_type": "CAUSAL_LM"}
        save_adapter(LayerRopeConfig(layer_factors=factors, **base), root / name)
    return root


def test_the_references_differ(wanted):
    """Else the tests below would prove nothing."""
    for first, second in (("base", "one"), ("base", "two"), ("one", "two")):
        assert (wanted[first] - wanted[second]).abs().max() > 0.05


# PeftModel


def test_switching_disabling_deleting_unloading(model_type, wanted, short):
    base = build(model_type)
    structure, trainable = repr(base), [p.requires_grad for p in base.parameters()]
    model = get_peft_model(base, config(), adapter_name="one")
    model.add_adapter("two", config(OTHER))
    assert close(logits(model, short), wanted["one"])
    for name in ("two", "one", "two"):
        model.set_adapter(name)
        assert model.active_adapter == name
        assert close(logits(model, short), wanted[name])
        with model.disable_adapter():
            assert torch.equal(logits(model, short), wanted["base"])
        assert close(logits(model, short), wanted[name])
    with pytest.warns(UserWarning, match="the active adapter 'two' was deleted; 'one' is active now"):
        model.delete_adapter("two")
    assert list(model.peft_config) == list(base.peft_config) == ["one"]
    assert close(logits(model, short), wanted["one"])
    assert model.unload() is base
    assert torch.equal(logits(base, short), wanted["base"])
    assert repr(base) == structure
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert not hasattr(base, "peft_config")
    with warnings.catch_warnings():  # and no trace is left for PEFT to warn about
        warnings.simplefilter("error", UserWarning)
        assert close(logits(get_peft_model(base, config(OTHER)), short), wanted["two"])


def test_deleting_the_last_adapter_leaves_the_base(model_type, wanted, short):
    model = get_peft_model(build(model_type), config())
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model, short), wanted["base"])
    with pytest.raises(ValueError, match=r"adapters \['default'\] do not exist; this model has \[\]"):
        model.base_model.set_adapter("default")


def test_baked_saved_and_restored(model_type, wanted, short, tmp_path):
    model = get_peft_model(build(model_type), config(), adapter_name="one")
    model.add_adapter("two", config(OTHER))
    baked = model.merge_and_unload(adapter_names=["two"])
    assert close(logits(baked, short), wanted["two"])
    assert not any(isinstance(module, LayerRopeLayer) for module in baked.modules())
    baked.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, short), wanted["base"])  # plain weights; the config remembers
    assert close(logits(restore_baked(loaded), short), wanted["two"])


def test_merging_in_place_keeps_the_output_and_refuses_another_adapter(short):
    model = get_peft_model(build("llama"), config(), adapter_name="one")
    model.add_adapter("two", config(OTHER))
    before = logits(model, short)
    model.merge_adapter()
    model.merge_adapter(["one"])
    model.unmerge_adapter()
    assert torch.equal(logits(model, short), before)
    with pytest.raises(ValueError, match=r"only the active adapter \['one'\] can be merged, got \['two'\]"):
        model.merge_adapter(["two"])


def test_nothing_to_train(model_type, capsys):
    model = get_peft_model(build(model_type), config())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 0 ||")
    model.set_requires_grad("default")
    assert model.get_nb_trainable_parameters()[0] == 0


def test_status(model_type):
    model = get_peft_model(build(model_type), config(), adapter_name="one")
    model.add_adapter("two", config(OTHER))
    layers = model.get_layer_status()
    assert len(layers) == (NUM_LAYERS if model_type == "moshi" else 1)
    for layer in layers:
        assert layer.name.endswith("rotary_emb")
        assert layer.module_type == "LayerRopeLayer"
        assert (layer.enabled, layer.active_adapters, layer.merged_adapters) == (True, ["one"], [])
        assert layer.available_adapters == ["one", "two"]
    status = model.get_model_status()
    assert status.peft_types == {"one": "LAYER_ROPE", "two": "LAYER_ROPE"}
    assert (status.trainable_params, status.num_adapter_layers) == (0, len(layers))
    assert (status.enabled, status.active_adapters) == (True, ["one"])
    assert get_model_status(model) == status
    assert get_layer_status(model.get_base_model())[0].active_adapters == ["one"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.set_adapter("two")
    assert model.get_model_status().active_adapters == ["two"]


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "mine"}])
def test_the_file_is_one_tensor_and_loads(model_type, wanted, short, options, tmp_path):
    get_peft_model(build(model_type), config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {FACTORS_KEY: (torch.float32, (NUM_LAYERS,))}
    assert check_if_peft_model(str(tmp_path))
    model = PeftModel.from_pretrained(build(model_type), tmp_path, **options)
    assert close(logits(model.eval(), short), wanted["one"])
    assert model.get_nb_trainable_parameters()[0] == 0
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_subfolder_and_load_adapter(folders, short):
    model = PeftModel.from_pretrained(build("llama"), folders, subfolder="one", adapter_name="first")
    model.load_adapter(folders, "second", subfolder="two")
    assert close(logits(model, short), expected("llama", FACTORS, short))
    model.set_adapter("second")
    assert close(logits(model, short), expected("llama", OTHER, short))


def test_auto_peft_model(folders, short):
    model = AutoPeftModelForCausalLM.from_pretrained(folders / "two")
    assert close(logits(model, short), expected("llama", OTHER, short))


def test_from_a_hub_with_revision_and_subfolder(folders, short, tmp_path):
    """The real client, in a process of its own because it reads its settings at import."""
    wanted_logits = {name: expected("llama", factors, short) for name, factors in (("one", FACTORS), ("two", OTHER))}
    torch.save({"ids": short, **wanted_logits}, tmp_path / "expected.pt")
    repos = {
        "someone/adapter": {"main": folders / "one", "v2": folders / "two"},
        "someone/several": {"main": folders},
    }
    code = """
import sys, torch, peft_layerrope
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
folder, base_folder = sys.argv[1:]
expected = torch.load(folder + "/expected.pt")

def check(model, name):
    with torch.no_grad():
        assert torch.allclose(model(expected["ids"]).logits, expected[name], atol=1e-4, rtol=1e-4), name

def base():
    return AutoModelForCausalLM.from_pretrained(base_folder)

for load in (PeftModel.from_pretrained, peft_layerrope.load_adapter):
    check(load(base(), "someone/adapter"), "one")
    check(load(base(), "someone/adapter", revision="v2"), "two")
    check(load(base(), "someone/several", subfolder="two", adapter_name="second"), "two")
check(AutoPeftModelForCausalLM.from_pretrained("someone/adapter", revision="v2"), "two")
plain = base()
plain.load_adapter("someone/adapter", adapter_kwargs={"revision": "v2"})
check(plain, "two")
try:
    PeftModel.from_pretrained(base(), "someone/adapter", revision="v3")
except Exception as error:
    assert "v3" in str(error) or "Can't find" in str(error), error
else:
    sys.exit("a missing revision did not raise")
try:
    peft_layerrope.load_adapter(base(), "someone/several", subfolder="three")
except peft_layerrope.LayerRopeError as error:
    assert "cannot load adapter 'someone/several'" in str(error), error
else:
    sys.exit("a missing folder did not raise")
"""
    with serve(repos) as endpoint:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", code, str(tmp_path), str(folders / "base")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_second_peft_model_over_one_is_refused(short):
    model = get_peft_model(build("llama"), config())
    before = logits(model, short)
    with pytest.raises(LayerRopeError, match="is a LAYER_ROPE PeftModel already: add another adapter with"):
        get_peft_model(model, config(OTHER))
    with pytest.raises(LayerRopeError, match="adapter name 'default' is taken by a LAYER_ROPE adapter"):
        get_peft_model(model.get_base_model(), config(OTHER))
    assert torch.equal(logits(model, short), before)


def test_adapters_per_row_are_refused(short):
    model = get_peft_model(build("llama"), config())
    with pytest.raises(LayerRopeError, match=r"adapter_names=\['default', '__base__'\]: .* shares one rotation"):
        model(short, adapter_names=["default", "__base__"])


# Injected into the model itself: PEFT's function, and transformers' methods


def test_inject_adapter_in_model(model_type, wanted, short):
    base = build(model_type)
    assert inject_adapter_in_model(config(), base, "one") is base
    assert close(logits(base, short), wanted["one"])
    inject_adapter_in_model(config(OTHER), base, "two")
    assert close(logits(base, short), wanted["two"])
    assert list(base.peft_config) == ["one", "two"]
    with pytest.raises(LayerRopeError, match="adapter name 'two' is taken by a LAYER_ROPE adapter of this model"):
        inject_adapter_in_model(config(), base, "two")


def test_state_dict_of_an_injected_adapter(short):
    base = inject_adapter_in_model(config(), build("llama"))
    saved = get_peft_model_state_dict(base)
    assert list(saved) == ["layer_factors"]
    for key in ("layer_factors", FACTORS_KEY):  # with and without the prefix, as for any method
        set_peft_model_state_dict(base, {key: saved["layer_factors"]})
        with pytest.raises(AdapterMismatchError, match="disagree on 4 of 4 layer_factors"):
            set_peft_model_state_dict(base, {key: torch.full((NUM_LAYERS,), 9.0)})


@pytest.mark.parametrize(
    "change",
    [
        {"layer_factors": OTHER},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0, "target_length": 512},
        {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda change: ", ".join(change),
)
def test_a_folder_under_a_name_in_use_takes_its_place(change, folders, long_ids, tmp_path):
    new = LayerRopeConfig(**{"layer_factors": FACTORS, **change})
    fresh = logits(get_peft_model(build("llama"), new), long_ids)
    save_adapter(new, tmp_path)
    model = PeftModel.from_pretrained(build("llama"), folders / "one")
    before = logits(model, long_ids)
    for _ in range(2):
        model.load_adapter(tmp_path, "default")
        assert torch.equal(logits(model, long_ids), fresh)
        assert not torch.equal(fresh, before)
    model.load_adapter(folders / "one", "default")
    assert torch.equal(logits(model, long_ids), before)
    made = get_peft_model(build("llama"), config())  # of which no folder is known
    made.load_adapter(folders / "one", "default")
    with pytest.raises(AdapterMismatchError, match="adapter 'default' was made from a configuration that rotates"):
        made.load_adapter(tmp_path, "default")
    assert torch.equal(logits(made, long_ids), before)


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "target_length": 512}


@pytest.mark.parametrize(
    "change", [{"rope_type": "linear", "target_length": None}, {"factor": 2.0}, {"target_length": 1024}]
)
def test_a_folder_that_differs_in_one_setting_takes_the_place_of_another(change, long_ids, tmp_path):
    fresh = []
    for name, settings in (("old", DYNAMIC), ("new", {**DYNAMIC, **change})):
        config = LayerRopeConfig(layer_factors=FACTORS, **settings)
        save_adapter(config, tmp_path / name)
        fresh.append(logits(get_peft_model(build("llama"), config), long_ids))
    model = PeftModel.from_pretrained(build("llama"), tmp_path / "old")
    assert torch.equal(logits(model, long_ids), fresh[0])
    model.load_adapter(tmp_path / "new", "default")
    assert torch.equal(logits(model, long_ids), fresh[1])
    assert not torch.equal(*fresh)


def test_a_configuration_that_is_given_with_a_folder_is_heeded(folders, long_ids):
    edited = LayerRopeConfig.from_pretrained(folders / "one")
    edited.rope_type, edited.factor = "linear", 2.0
    model = PeftModel.from_pretrained(build("llama"), folders / "one", config=edited)
    wanted = get_peft_model(build("llama"), LayerRopeConfig(rope_type="linear", factor=2.0, layer_factors=FACTORS))
    assert torch.equal(logits(model, long_ids), logits(wanted, long_ids))


def test_an_injected_model_saved_in_full_remembers_what_was_active(model_type, wanted, short, tmp_path):
    base = inject_adapter_in_model(config(), build(model_type), "one")
    inject_adapter_in_model(config(OTHER), base, "two")
    for module in base.modules():
        if isinstance(module, LayerRopeLayer):
            module.set_adapter("one")
    base.save_pretrained(tmp_path)
    assert close(logits(restore_baked(AutoModelForCausalLM.from_pretrained(tmp_path)), short), wanted["one"])
    for module in base.modules():
        if isinstance(module, LayerRopeLayer):
            module.enable_adapters(False)
    base.save_pretrained(tmp_path)
    assert "layer_rope" not in json.loads((tmp_path / "config.json").read_text())


@needs_adapter_methods
def test_transformers_adapter_methods(model_type, wanted, short):
    model = build(model_type)
    model.add_adapter(config(), "one")
    assert close(logits(model, short), wanted["one"])
    model.add_adapter(config(OTHER), "two")
    assert model.active_adapters() == ["two"]
    assert close(logits(model, short), wanted["two"])
    model.set_adapter("one")
    assert model.active_adapters() == ["one"]
    assert close(logits(model, short), wanted["one"])
    model.disable_adapters()
    assert torch.equal(logits(model, short), wanted["base"])
    model.enable_adapters()
    assert close(logits(model, short), wanted["one"])
    model.delete_adapter("one")
    assert list(model.peft_config) == ["two"]
    assert close(logits(model, short), wanted["two"])
    model.delete_adapter("two")
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model, short), wanted["base"])
    model.add_adapter(config(), "one")
    assert close(logits(model, short), wanted["one"])


def test_transformers_loads_adapters(folders, short):
    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    report = model.load_adapter(str(folders / "one"))
    # transformers asks for parameters only: it reports the file's tensor, and the factors come from the config
    assert [key.removeprefix("base_model.model.") for key in report.unexpected_keys] == ["layer_factors"]
    assert not report.missing_keys
    assert close(logits(model, short), expected("llama", FACTORS, short))


@needs_adapter_methods
def test_transformers_saves_adapters(folders, short, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    model.load_adapter(str(folders / "one"))
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == [FACTORS_KEY]
    for loaded in (
        PeftModel.from_pretrained(build("llama"), tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),  # transformers fetches the base by itself
    ):
        assert close(logits(loaded, short), expected("llama", FACTORS, short))


# With a PEFT that transformers' own adapter methods refuse


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed, transformers' adapter methods raise, as those of 5.24 do with PEFT 0.21."""

    def refuse(min_version: str) -> None:
        raise ValueError(f"refused: PEFT before {min_version}")

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse)
    with pytest.raises(ValueError, match="refused"):
        build("llama").add_adapter(config())


def _lends_and_switches(folders: Path, scratch: Path, short: torch.Tensor) -> nn.Module:
    model = load_adapter(load_base(ModelSource(str(folders / "base"), device="cpu")), folders / "two")
    model.load_adapter(folders / "one", "other")
    model.set_adapter("other")
    with model.disable_adapter(), use_adapter(model, "default"):
        assert close(logits(model, short), expected("llama", OTHER, short))
    model.delete_adapter("default")
    return model


def _saves_and_loads(folders: Path, scratch: Path, short: torch.Tensor) -> nn.Module:
    get_peft_model(build("llama"), config()).save_pretrained(scratch)
    return load_adapter(build("llama"), scratch)


def _bakes(folders: Path, scratch: Path, short: torch.Tensor) -> nn.Module:
    get_peft_model(build("llama"), config()).merge_and_unload().save_pretrained(scratch)
    return load_base(ModelSource(str(scratch), device="cpu"))


def _injects_and_saves_in_full(folders: Path, scratch: Path, short: torch.Tensor) -> nn.Module:
    inject_adapter_in_model(config(), build("llama")).save_pretrained(scratch)
    return restore_baked(AutoModelForCausalLM.from_pretrained(scratch))


def _through_transformers(folders: Path, scratch: Path, short: torch.Tensor) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folders / "one")


@pytest.mark.parametrize(
    "way", [_lends_and_switches, _saves_and_loads, _bakes, _injects_and_saves_in_full, _through_transformers]
)
def test_nothing_of_ours_needs_transformers_adapter_methods(way, refusing, folders, short, tmp_path):
    model = way(folders, tmp_path, short)
    assert close(logits(model.eval(), short), expected("llama", FACTORS, short))
    assert verify(model).ok


@pytest.mark.parametrize(
    "command",
    ["verify --adapter {adapter}", "evaluate --adapter {adapter} --length 128 --groups 1 --output {scratch}"],
)
def test_no_command_needs_transformers_adapter_methods(command, refusing, tmp_path):
    adapter = Path(__file__).parents[2] / "hub_configs" / "demo-plain"
    done = CliRunner().invoke(app, command.format(adapter=adapter, scratch=tmp_path).split())
    assert done.exit_code == 0, done.output


def test_attention_modules_stay_where_they_are(model_type):
    base = build(model_type)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    inject_adapter_in_model(config(), base)
    assert {name for name, module in base.named_modules() if isinstance(module, nn.Linear)} == linear


def test_changing_the_factors_of_an_unknown_adapter_is_refused():
    model = get_peft_model(build("llama"), config())
    with pytest.raises(ValueError, match=r"adapters \['other'\] do not exist; this model has \['default'\]"):
        model.base_model.set_layer_factors(OTHER, "other")
