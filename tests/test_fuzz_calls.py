"""Sequences of PEFT calls end where they should, and the fuzzer that says so finds what was planted."""

from __future__ import annotations

import pytest
from conftest import IS_OLDER
from fuzzing_calls import Case, draw, fuzz, run_case

from peft_layerrope.tuner import injection
from peft_layerrope.tuner.rotary import LayerRopeLayer
from peft_layerrope.tuner.tables import LayerScaling, LayerTableHook

pytestmark = pytest.mark.skipif(IS_OLDER, reason="the reference remembers frequencies as transformers does from 5.23")


@pytest.mark.parametrize("part", range(4))  # for as many workers
def test_a_hundred_sequences_of_calls(part):
    summary = fuzz(0, range(25 * part, 25 * (part + 1)))
    assert not summary.findings, summary.findings[0][1]
    assert summary.comparisons > 50


def test_a_case_is_the_same_when_it_is_drawn_or_read_again():
    case = draw(3, 5)
    assert draw(3, 5) == case != draw(3, 6)
    assert Case.from_json(case.to_json()) == case


def plant_a_removed_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    register = injection.register_hooks

    def without_the_last(*args: object) -> list:
        handles = register(*args)
        handles.pop().remove()
        return handles

    monkeypatch.setattr(injection, "register_hooks", without_the_last)


def plant_shifted_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = LayerTableHook.__init__
    monkeypatch.setattr(LayerTableHook, "__init__", lambda self, layer: made(self, max(layer - 1, 0)))


def plant_a_stale_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of one adapter are kept for another, and for its own after they have changed."""
    monkeypatch.setattr(LayerScaling, "__eq__", lambda self, other: isinstance(other, LayerScaling))
    monkeypatch.setattr(LayerScaling, "__hash__", lambda self: 0)

    def set_scaling(self: LayerRopeLayer, adapter_name: str, scaling: LayerScaling) -> None:
        self.scalings[adapter_name] = scaling
        self._update_record()

    monkeypatch.setattr(LayerRopeLayer, "set_scaling", set_scaling)


@pytest.mark.parametrize("plant", [plant_a_removed_hook, plant_shifted_factors, plant_a_stale_cache])
def test_a_planted_fault_is_found_and_made_small(plant, monkeypatch):
    with monkeypatch.context() as planted:
        plant(planted)
        summary = fuzz(0, range(100))
        assert summary.findings, f"not found in {summary.sequences} sequences"
        index, text = summary.findings[0]
        assert f"--seed 0 --only {index}" in text
        smallest = Case.from_json(text.split("--case '")[1].rstrip("'"))
        assert len(smallest.calls) <= 4
        assert run_case(smallest).failed_at == len(smallest.calls) - 1
    assert run_case(smallest).failed_at is None
