"""`linear`, `dynamic` and `yarn` against models that transformers itself builds with those rope parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import IS_OLDER, NUM_LAYERS, VOCAB, WINDOW, build_model, logits
from families import build_tiny, model_types, tiny_inputs
from peft import get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from peft_layerrope import LayerRopeConfig, LayerRopeError, TaskError, verify
from peft_layerrope.comparison.candidates import candidate_on, describe_scaling, parse_baseline
from peft_layerrope.tuner.frequencies import rope_type_reaches

FULL, SLIDING = "full_attention", "sliding_attention"
SCALED_TABLES = {
    "cohere_compass_text": [FULL],
    "deepseek_v4": ["compress"],
    "dots3_note_text": ["indexed_attention", SLIDING],
    "gemma3": [FULL],
    "gemma3_text": [FULL],
    "gemma3n_text": [FULL],
    "gemma4": [FULL],
    "gemma4_text": [FULL],
    "gemma4_unified_text": [FULL],
    "laguna": [FULL],
    "lfm3": [FULL],
    "mellum": [FULL],
    "mimo_v2_flash": [FULL],
    "modernbert-decoder": [FULL, SLIDING],
    "olmo3": [FULL],
    "shieldgemma2": [FULL],
    "step3p7": [FULL],
    "t5gemma2": [FULL],
    "zaya": ["hybrid"],
}
"""Every family with a table for each layer type: those that a scaling is of."""

SEVERAL_ROTARIES = ["granite_swa", "granitemoe_swa", "molmo2", "moshi"]

OWN = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": WINDOW // 4},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": WINDOW // 4,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": WINDOW // 4,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i / 4 for i in range(8)],
    },
}
GEMMA3 = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.2,
    "sliding_window": 32,
    "sliding_window_pattern": 2,
}
TOLERANCE = 2e-4  # of Dynamic-NTK, which transformers computes from the base and not from the frequencies


def gemma3(**rope_scaling: object) -> PreTrainedModel:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**GEMMA3, **({"rope_scaling": rope_scaling} if rope_scaling else {}))
    ).eval()


def rebuilt(model: PreTrainedModel, change) -> PreTrainedModel:
    """The same weights in a model that transformers builds from a changed configuration of the text decoder."""
    config = copy.deepcopy(model.config)
    change(config.get_text_config(decoder=True))
    twin = type(model)(config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def tiny(model_type: str) -> PreTrainedModel:
    """With a window that the inputs go beyond."""
    return rebuilt(build_tiny(model_type), lambda text: setattr(text, "max_position_embeddings", 8))


def with_rope_type(rope_type: str, factor: float, tables: list[str]):
    def change(text) -> None:
        for entries in [text.rope_parameters[table] for table in tables] if tables else [text.rope_parameters]:
            own = entries["rope_type"]  # "proportional" has a factor of its own
            entries |= {"rope_type": own if own == "proportional" else rope_type, "factor": factor}
            if text.model_type == "deepseek_v4" and rope_type == "yarn":
                entries["attention_factor"] = 1.0  # as its config class sets it
        text.standardize_rope_params()

    return change


def output(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return model(**inputs).logits


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("model_type", [*SCALED_TABLES, *SEVERAL_ROTARIES])
def test_families_with_several_tables(model_type, rope_type):
    if model_type not in model_types():
        pytest.skip(f"this version of transformers has no {model_type}")
    model = tiny(model_type)
    inputs = tiny_inputs(model)
    parameters = model.config.get_text_config(decoder=True).rope_parameters
    tables = [table for table in SCALED_TABLES.get(model_type, ()) if table in parameters]  # olmo3 once had one for all
    if rope_type != "linear" and tables and parameters[tables[0]]["rope_type"] == "proportional":
        with (
            pytest.raises(TaskError, match="cannot be put onto"),
            candidate_on(model, parse_baseline(f"{rope_type}:2")),
        ):
            pytest.fail("was put on")
        return
    expected = output(rebuilt(model, with_rope_type(rope_type, 2.0, tables)), inputs)
    assert not torch.allclose(expected, output(model, inputs), atol=1e-4)
    with candidate_on(model, parse_baseline(f"{rope_type}:2")) as scaled:
        assert torch.equal(output(scaled, inputs), expected)
    if rope_type == "yarn":
        return
    adapted = get_peft_model(model, LayerRopeConfig(rope_type=rope_type, factor=2.0))
    tolerance = TOLERANCE * float(expected.abs().max()) if rope_type == "dynamic" else 0.0
    torch.testing.assert_close(output(adapted, inputs), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("model_type", SCALED_TABLES)
def test_the_tables_are_those_that_the_familys_config_class_gives_a_rope_scaling(model_type):
    if model_type not in model_types():
        pytest.skip(f"this version of transformers has no {model_type}")
    text = build_tiny(model_type).config.get_text_config(decoder=True)
    types = [table for table, entries in text.rope_parameters.items() if isinstance(entries, dict)]
    assert [table for table in types if rope_type_reaches(text.model_type, table)] == [
        table for table in types if table in SCALED_TABLES[model_type]
    ]
    if text.model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers does not know {text.model_type} by its name")
    asked = CONFIG_MAPPING[text.model_type](rope_scaling={"rope_type": "linear", "factor": 2.0}).rope_parameters
    scaled = {name for name, entries in asked.items() if isinstance(entries, dict) and entries.get("factor") == 2.0}
    if scaled:  # a few classes ignore it
        assert {table for table in asked if rope_type_reaches(text.model_type, table)} == scaled


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("own", [None, *OWN])
@pytest.mark.parametrize("build", [gemma3, None], ids=["gemma3", "llama"])
def test_a_baseline_replaces_a_scaling_of_the_models_own(build, own, rope_type, long_ids):
    if IS_OLDER and build is not None and "yarn" in (own, rope_type):
        pytest.skip("transformers 5.0 builds no model with YaRN on one of two tables")

    def made(name: str | None, **settings: object) -> PreTrainedModel:
        entries = {"rope_type": name, **settings} if name else {}
        if build is not None:
            return build(**entries)
        return build_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **entries})

    for prompt in (long_ids, long_ids[:, :50]):
        expected = logits(made(rope_type, factor=2.0), prompt)
        model = made(own, **OWN.get(own, {}))
        with candidate_on(model, parse_baseline(f"{rope_type}:2")) as scaled:
            assert torch.equal(logits(scaled, prompt), expected)


@pytest.mark.parametrize("own", OWN)
def test_an_adapter_acts_on_top_of_it(own, long_ids):
    rope = {"rope_type": own, "rope_theta": 10000.0, **OWN[own]}
    halved = build_model("llama", rope_parameters=rope)
    rotary = halved.model.rotary_emb
    logits(halved, long_ids)  # has transformers make its frequencies for this length
    rotary.rope_type, rotary.inv_freq = "default", rotary.inv_freq / 2
    model = build_model("llama", rope_parameters=rope)
    adapted = get_peft_model(model, LayerRopeConfig(rope_type="linear", factor=2.0))
    assert torch.equal(logits(adapted, long_ids), logits(halved, long_ids))


def test_factors_concern_the_layers_that_the_rope_type_does_not():
    model = gemma3()
    ids = torch.arange(90)[None]
    adapted = get_peft_model(model, LayerRopeConfig(rope_type="linear", factor=2.0, layer_factors=[1.5, 1.0, 1.0, 3.0]))
    received = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda m, a, kwargs: received.append(kwargs["position_embeddings"]), with_kwargs=True
        )
    logits(adapted, ids)
    thetas, divisors = [10_000.0, 1_000_000.0] * 2, [1.5, 2.0, 1.0, 6.0]  # sliding, full, sliding, full
    for (cos, _), theta, divisor in zip(received, thetas, divisors, strict=True):
        frequencies = theta ** -(torch.arange(0, 16, 2).double() / 16) / divisor
        expected = (torch.arange(90).double()[:, None] * frequencies).cos()
        torch.testing.assert_close(cos[0, :, :8].double(), expected, atol=2e-5, rtol=0)
    found = verify(adapted)
    assert found.ok
    assert [check.expected for check in found.layers] == divisors


def test_what_the_name_does_not_say_is_said():
    assert describe_scaling(build_model("llama"), "linear", "in place of") == ""
    scaled = gemma3(rope_type="linear", factor=8.0)
    for said in (describe_scaling(scaled, "dynamic", relation) for relation in ("in place of", "on top of")):
        assert FULL in said
        assert SLIDING not in said
        assert "of the model's own linear" in said


@pytest.mark.skipif(IS_OLDER, reason="transformers 5.0 has no beam")
def test_a_scaling_that_reaches_no_layer_is_refused():
    model = build_tiny("beam")  # only its sliding layers rotate
    with pytest.raises(LayerRopeError), candidate_on(model, parse_baseline("linear:2")):
        pytest.fail("was put on")
    with pytest.raises(LayerRopeError):
        get_peft_model(model, LayerRopeConfig(rope_type="linear", factor=2.0))
    assert get_peft_model(model, LayerRopeConfig(layer_factors=[1.5] * NUM_LAYERS)) is not None
