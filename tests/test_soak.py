"""Many requests in one process: nothing piles up and nothing drifts. The long form is `benchmarks/soak.py`."""

from __future__ import annotations

import pytest
import torch
from benchmarks.soak import Reading, read, soak, with_adapters
from conftest import build_model


@pytest.fixture(scope="module")
def readings() -> list[Reading]:
    return list(soak(with_adapters(build_model("llama")), calls=60, every=30))


def test_no_tensor_and_no_cache_entry_piles_up(readings):
    assert {reading.counts for reading in readings} == {readings[0].counts}


def test_the_logits_of_a_fixed_prompt_stay_as_they_were(readings):
    assert all(reading.same_logits for reading in readings)


def test_a_reading_sees_what_piles_up():
    model = with_adapters(build_model("llama"))
    before = read(model, 0, same_logits=True)
    model.left_behind = [torch.zeros(256)]
    model.base_model.model.model.rotary_emb._scaled["left", "behind", 0] = ()
    after = read(model, 1, same_logits=True)
    assert after.tensors == before.tensors + 1
    assert after.tensor_bytes == before.tensor_bytes + 1024
    assert after.cache_entries == before.cache_entries + 1
