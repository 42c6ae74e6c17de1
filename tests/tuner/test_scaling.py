"""Inverse frequencies against float64 formulas and transformers' own RoPE initialisers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import build_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from peft_layerrope.tuner.scaling import merged_factors, scale_inv_freq

FACTORS = [1.0, 1.3, 1.7, 2.0]


def base_inv_freq(dim: int = 16, theta: float = 10000.0) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


@pytest.mark.parametrize(("rope_type", "factor"), [("default", 1.0), ("linear", 1.0), ("linear", 2.5)])
def test_division_matches_float64(rope_type, factor):
    inv_freq = base_inv_freq()
    scaled = scale_inv_freq(inv_freq, torch.tensor(FACTORS), rope_type=rope_type, factor=factor)
    expected = torch.stack([inv_freq.double() / (factor * s) for s in FACTORS])
    torch.testing.assert_close(scaled.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seq_len", [65, 128, 1000])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_dynamic_matches_float64(seq_len, factor):
    window, dim = 64, 16
    scaled = scale_inv_freq(
        base_inv_freq(dim),
        torch.tensor(FACTORS),
        rope_type="dynamic",
        factor=factor,
        seq_len=seq_len,
        original_max_position_embeddings=window,
    )
    i = torch.arange(dim // 2, dtype=torch.float64)
    for row, s in zip(scaled, FACTORS, strict=True):
        f = factor * s
        alpha = f * seq_len / window - (f - 1)
        theta = 10000.0 * alpha ** (dim / (dim - 2))  # the textbook form: a larger base
        torch.testing.assert_close(row.double(), theta ** (-2 * i / dim), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seq_len", [64, 100, 256])
def test_dynamic_matches_transformers(seq_len):
    model = build_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](model.config, seq_len=seq_len)
    scaled = scale_inv_freq(
        base_inv_freq(16),
        torch.ones(1),
        rope_type="dynamic",
        factor=2.0,
        seq_len=seq_len,
        original_max_position_embeddings=64,
    )
    torch.testing.assert_close(scaled[0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seq_len", [1, 63, 64])
def test_dynamic_leaves_the_window_bit_equal(seq_len):
    inv_freq = base_inv_freq()
    scaled = scale_inv_freq(
        inv_freq, torch.tensor(FACTORS), rope_type="dynamic", seq_len=seq_len, original_max_position_embeddings=64
    )
    assert all(torch.equal(row, inv_freq) for row in scaled)


def test_a_length_may_be_a_tensor():
    inv_freq, window = base_inv_freq(), {"rope_type": "dynamic", "original_max_position_embeddings": 64}
    scaled = scale_inv_freq(inv_freq, torch.tensor([1.0, 2.0]), seq_len=torch.tensor(128), **window)
    # the last pair's frequency is divided by alpha itself: 1 + f * (n - N) / N
    torch.testing.assert_close(inv_freq[-1] / scaled[:, -1], torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic"])
def test_gradient_in_the_factors_matches_finite_differences(rope_type):
    def f(factors: torch.Tensor) -> torch.Tensor:
        return scale_inv_freq(
            base_inv_freq().double(),
            factors,
            rope_type=rope_type,
            factor=1.5,
            seq_len=100,
            original_max_position_embeddings=64,
        )

    assert torch.autograd.gradcheck(f, torch.tensor(FACTORS, dtype=torch.float64, requires_grad=True))


def test_one_pair_of_dimensions_keeps_its_frequency():
    scaled = scale_inv_freq(
        torch.ones(1), torch.tensor([2.0]), rope_type="dynamic", seq_len=128, original_max_position_embeddings=64
    )
    assert scaled.tolist() == [[1.0]]


def test_errors_name_value_and_expectation():
    with pytest.raises(ValueError, match="rope_type='yarn' is unknown, expected one of default, linear, dynamic"):
        scale_inv_freq(base_inv_freq(), torch.ones(1), rope_type="yarn")
    with pytest.raises(ValueError, match="needs seq_len and original_max_position_embeddings"):
        scale_inv_freq(base_inv_freq(), torch.ones(1), rope_type="dynamic")


@pytest.mark.parametrize("most", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("seed", range(4))
def test_merged_factors_are_the_nearest_of_all_groupings(most, seed):
    rng = np.random.default_rng(seed)
    factors = rng.choice(np.linspace(0.25, 4, 9), 6) if seed % 2 else rng.uniform(0.25, 4, 6)
    weights = rng.uniform(0.1, 3, 6) if seed > 1 else np.ones(6)
    logs = np.log(factors)

    def moved(groups: tuple[int, ...]) -> float:
        labels = np.array(groups)
        means = {label: np.average(logs[labels == label], weights=weights[labels == label]) for label in groups}
        return sum(w * (value - means[label]) ** 2 for w, value, label in zip(weights, logs, groups, strict=True))

    least = min(map(moved, itertools.product(range(most), repeat=6)))
    merged = np.array(merged_factors(factors.tolist(), most, weights.tolist() if seed > 1 else None))
    assert len(set(merged)) <= most
    assert weights @ (np.log(merged) - logs) ** 2 == pytest.approx(least, abs=1e-12)


def test_few_different_factors_stay_as_they_are():
    assert merged_factors([1.1, 2.0, 1.1, 0.9], 3) == [1.1, 2.0, 1.1, 0.9]
