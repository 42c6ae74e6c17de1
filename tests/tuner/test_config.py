"""Values that cannot work, each named; JSON round trip."""

from __future__ import annotations

import json
import math

import numpy as np
import peft
import pytest
from peft import PeftConfig, PeftType, TaskType

from peft_layerrope import InvalidConfigError, LayerRopeConfig


def test_defaults():
    config = LayerRopeConfig()
    assert (config.rope_type, config.factor, config.layer_factors) == ("default", 1.0, None)
    assert config.peft_type is PeftType.LAYER_ROPE
    assert config.resolved_layer_factors(3) == [1.0, 1.0, 1.0]


def test_integers_become_floats():
    config = LayerRopeConfig(rope_type="linear", factor=2, layer_factors=(1, 2))
    assert config.layer_factors == [1.0, 2.0]
    assert all(type(value) is float for value in [config.factor, *config.layer_factors])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_type": "ntk"}, "rope_type='ntk'"),
        ({"rope_type": "linear", "factor": 0}, "factor=0"),
        ({"rope_type": "linear", "factor": math.inf}, "factor=inf"),
        ({"rope_type": "linear", "factor": "2"}, "factor='2'"),
        ({"rope_type": "linear", "factor": True}, "factor=True"),
        ({"rope_type": "linear", "factor": 200.0, "layer_factors": [1.0, 60.0]}, "factor * layer_factors[1]=12000"),
        ({"factor": 2.0}, "factor=2.0 has no effect with rope_type='default'"),
        ({"target_length": 99}, "target_length=99 has no effect with rope_type='default'"),
        ({"layer_factors": [1.0, -1.5]}, "layer_factors[1]=-1.5"),
        ({"layer_factors": [math.nan]}, "layer_factors[0]=nan"),
        ({"layer_factors": [None]}, "layer_factors[0]=None"),
        ({"layer_factors": []}, "layer_factors="),
        ({"layer_factors": [1.0] * 5000}, "layer_factors="),
        ({"layer_factors": "1.0"}, "layer_factors='1.0'"),
        ({"layer_factors": {"0": 1.0}}, "layer_factors={'0': 1.0}"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings=0"),
        ({"original_max_position_embeddings": 2.5}, "original_max_position_embeddings=2.5"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS'"),
    ],
)
def test_invalid_values(fields, named):
    with pytest.raises(InvalidConfigError) as caught:
        LayerRopeConfig(**fields)
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize("base", ["someone/model", ""])  # PEFT's name for a model without one
def test_json_round_trip(base, tmp_path):
    config = LayerRopeConfig(
        rope_type="dynamic",
        factor=2.0,
        layer_factors=[1.0, 1.3],
        original_max_position_embeddings=256,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LayerRopeConfig)
    assert loaded == config


def test_pefts_own_fields_are_left_to_it(tmp_path):
    config = LayerRopeConfig(
        layer_factors=[1], task_type=TaskType.CAUSAL_LM, target_length=np.int64(64), rope_type="dynamic"
    )
    assert config.task_type is TaskType.CAUSAL_LM
    assert (config.layer_factors, type(config.target_length)) == ([1.0], int)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == peft.__version__


def test_where_factors_came_from_stood_in_older_files(tmp_path, recwarn):
    LayerRopeConfig(layer_factors=[1.0, 1.3]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    former = {"control_points": [[0, 1], [0.2, 1], [0.7, 1], [1, 2]], "scaled_layers": [1], "searcher_version": "0.1.0"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **former}))
    assert LayerRopeConfig.from_pretrained(tmp_path).layer_factors == [1.0, 1.3]
    assert not [warning for warning in recwarn.list if "control_points" in str(warning.message)]
    assert PeftConfig.from_pretrained(tmp_path).layer_factors == [1.0, 1.3]  # of whose names PEFT itself warns


def test_unknown_field_of_a_newer_version_warns(tmp_path):
    LayerRopeConfig(layer_factors=[1.0]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).layer_factors == [1.0]
