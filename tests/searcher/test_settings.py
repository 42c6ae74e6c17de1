"""Settings that cannot work are refused by name, before any work."""

from __future__ import annotations

import pytest

from peft_layerrope import SearchError, SearchSettings
from peft_layerrope.searcher import Guards
from peft_layerrope.searcher.plan import check_length

OWN = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"population": 3}, "population=3 must be an integer of at least 4."),
        ({"generations": -1}, "generations=-1 must be an integer of at least 0."),
        ({"test_groups": 1}, "test_groups=1 must be an integer of at least 2."),
        ({"seed": 1.5}, "seed=1.5 must be an integer of at least 0."),
        ({"share_mib": -1}, "share_mib=-1 must be an integer of at least 0."),
        ({"race": True, "population": True}, "population=True must be an integer of at least 4."),
        ({"objective": "f1"}, "objective='f1' is unknown, expected one of log_prob, accuracy."),
        ({"algorithm": "pso"}, "algorithm='pso' is unknown, expected one of genetic, cma-es, greedy, random."),
        ({"curve": "spline"}, "curve='spline' is unknown, expected one of bezier, linear, direct."),
        (
            {"algorithm": "greedy", "curve": "bezier"},
            "algorithm='greedy' moves single layers: curve='bezier' must be 'direct'.",
        ),
        ({"rope_type": "yarn"}, "rope_type='yarn' is unknown, expected one of default, linear, dynamic."),
        ({"weights": (1, 2)}, "weights=(1, 2) must be three positive numbers (first, middle, last)."),
    ],
)
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=r"must|expected") as caught:
        SearchSettings(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["max_tail_drop", "max_short_rise"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_limits_that_cannot_work(name, value):
    with pytest.raises(SearchError, match=f"{name}=.* must be a number of at least 0, or none"):
        Guards(**{name: value})


@pytest.mark.parametrize("layers", [(), (4,), (-1,), (1, 1)])
def test_scaled_layers_must_exist(layers):
    with pytest.raises(SearchError, match="must be distinct layer indices from 0 to 3"):
        SearchSettings(scaled_layers=layers).space(OWN)


def test_scaled_layers_must_own_their_keys():
    assert SearchSettings().space((0, 1, 0, 1)).scaled_layers == (0, 1)
    with pytest.raises(SearchError, match=r"layers \[2\] attend to keys of layers \[0\] .* and take their factors"):
        SearchSettings(scaled_layers=(1, 2)).space((0, 1, 0, 3))


@pytest.mark.parametrize(
    ("algorithm", "curve", "genome"),
    [("genetic", None, "bezier"), ("greedy", None, "direct"), ("cma-es", "linear", "linear")],
)
def test_which_genome_is_searched(algorithm, curve, genome):
    assert SearchSettings(algorithm=algorithm, curve=curve).genome == genome


@pytest.mark.parametrize(
    ("fields", "reach"),
    [({}, 128), ({"rope_type": "linear", "factor": 3.0}, 384), ({"rope_type": "dynamic", "factor": 1.5}, 192)],
)
def test_prompts_beyond_the_largest_scaling_are_refused(fields, reach):
    settings = SearchSettings(**fields)
    check_length(settings, reach, 64)
    check_length(settings, 10**6, None)  # a model that does not say what it was trained on
    with pytest.raises(SearchError, match=f"prompts of {reach + 1} tokens: with a window of 64, .* {reach} tokens"):
        check_length(settings, reach + 1, 64)
