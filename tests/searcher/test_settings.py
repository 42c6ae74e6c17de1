"""Settings that cannot work are refused by name, before any work."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from peft_layerrope import SearchError, SearchSettings
from peft_layerrope.searcher.plan import check_length
from peft_layerrope.searcher.space import FactorGrid

OWN = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"population": 3}, "population=3", "4"),
        ({"steps": 0}, "steps=0", "1"),
        ({"max_harm": 0}, "max_harm=0", "0"),
        ({"full_controls": 1}, "full_controls=1", "boolean"),
        ({"test_groups": 1}, "test_groups=1", "2"),
        ({"seed": 1.5}, "seed=1.5", "integer"),
        ({"seed": "1"}, "seed='1'", "integer"),
        ({"population": True}, "population=True", "integer"),
        ({"test_groups": None}, "test_groups=None", "integer"),
        ({"factor": "2"}, "factor='2'", "number"),
        ({"algorithm": "pso"}, "algorithm='pso'", "cma-es"),
        ({"rope_type": "yarn"}, "rope_type='yarn'", "linear"),
        ({"weights": (1, 2)}, "weights", "missing"),
        ({"weights": (1, 2, 3, 4)}, "weights=(1, 2, 3, 4)", "3"),
        ({"weights": (1, 0, 1)}, "weights[1]=0", "greater than 0"),
        ({"layers_to_transform": (0, 1.5)}, "layers_to_transform[1]=1.5", "integer"),
        ({"layers_to_transform": "3-1"}, "layers_to_transform='3-1'", "ends before it begins"),
        ({"grid": {"step": 0.5}}, "grid={'step': 0.5}", "FactorGrid"),
        ({"populaton": 4}, "populaton is unknown", "population"),
    ],
)
def test_settings_that_cannot_work(fields, name, expected):
    with pytest.raises(SearchError) as caught:
        SearchSettings(**fields)
    said = str(caught.value)
    assert name in said
    assert expected in said.replace(name, "")
    assert "\n" not in said


def test_numpys_numbers_are_numbers():
    settings = SearchSettings(
        population=np.int64(6),
        factor=np.float32(1),
        weights=np.array([1, 2, 3]),
        layers_to_transform=[np.int32(1), 2],
        seed=np.uint8(7),
    )
    assert settings == SearchSettings(population=6, weights=(1.0, 2.0, 3.0), layers_to_transform=(1, 2), seed=7)
    assert json.loads(json.dumps(asdict(settings)))["population"] == 6
    with pytest.raises(SearchError, match="population"):
        SearchSettings(population=np.float64(6))


@pytest.mark.parametrize("layers", ["0-2,5", [0, 1, 2, 5], (0, 1, 2, 5), np.array([0, 1, 2, 5])])
def test_layers_may_be_named_as_ranges(layers):
    assert SearchSettings(layers_to_transform=layers).layers_to_transform == (0, 1, 2, 5)


@pytest.mark.parametrize("layers", [(), (4,), (-1,), (1, 1)])
def test_layers_must_exist(layers):
    with pytest.raises(SearchError, match="must be distinct layer indices from 0 to 3"):
        SearchSettings(layers_to_transform=layers).space(OWN)


def test_layers_must_own_their_keys():
    assert SearchSettings().space((0, 1, 0, 1)).scaled_layers == (0, 1)
    with pytest.raises(SearchError, match=r"layers \[2\] attend to keys of layers \[0\] .* and take their factors"):
        SearchSettings(layers_to_transform=(1, 2)).space((0, 1, 0, 3))


@pytest.mark.parametrize(
    ("algorithm", "grid", "limits"),
    [
        ("cma-es", FactorGrid(), (0.25, 4.0)),
        ("cma-es", FactorGrid(max_factor=8.0), (0.25, 8.0)),  # one bound leaves the other as it was
        ("cma-es", FactorGrid(min_factor=1.0), (1.0, 4.0)),
        ("cma-es", FactorGrid(1.0, 2.0), (1.0, 2.0)),
        ("paper", FactorGrid(), (1.0, 2.0)),
        ("paper", FactorGrid(max_factor=3.04), (1.0, 3.0)),
    ],
)
def test_a_bound_that_is_not_given_is_the_algorithms(algorithm, grid, limits):
    assert SearchSettings(algorithm=algorithm, grid=grid).factor_limits == limits


@pytest.mark.parametrize(
    ("fields", "reach"),
    [
        ({"algorithm": "paper"}, 128),
        ({"algorithm": "paper", "rope_type": "linear", "factor": 3.0}, 384),
        ({"algorithm": "paper", "rope_type": "dynamic", "factor": 1.5}, 192),
        ({}, 256),
        ({"grid": FactorGrid(0.5, 3.0, 0.1)}, 192),
    ],
)
def test_prompts_beyond_the_largest_scaling_are_refused(fields, reach):
    settings = SearchSettings(**fields)
    check_length(settings, reach, 64)
    check_length(settings, 10**6, None)  # a model that does not say what it was trained on
    with pytest.raises(SearchError, match=f"prompts of {reach + 1} tokens: with a window of 64, .* {reach} tokens"):
        check_length(settings, reach + 1, 64)
