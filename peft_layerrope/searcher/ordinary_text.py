"""Ordinary text, and what factors do to it.

The text is the model's own: sampled at temperature 1, so that it fits any model and any language. What factors do to
it is the Kullback-Leibler divergence of the unscaled model's next-token distribution from the scaled one's. It is the
loss that factors add on text that the model itself would write, and unlike a difference of two losses it is never
negative and needs few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from ..scoring.memory import with_halving
from ..tuner.sites import embedding_table

Windows = tuple[tuple[int, ...], ...]
"""Token ids of pieces of text, all of one length."""

_SAMPLED_TOKENS = 256  # tokens of one sample: a window holds several, one after the other
_SCORED = 128  # positions of a window at which distributions are compared


def sample_windows(model: nn.Module, num_windows: int, length: int, *, seed: int) -> Windows:
    """Has a model write text at temperature 1.

    Args:
        model: a transformers causal language model, unscaled.
        num_windows: pieces of text.
        length: tokens of each. A window is filled with samples of at most 256 tokens, one after the other.
        seed: of the draws.
    """
    per_window = -(-length // _SAMPLED_TOKENS)
    size = -(-length // per_window)
    start, ends = _special_tokens(model)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=size,
        max_new_tokens=size,
        eos_token_id=ends or None,  # none before the minimum, that is, never
        pad_token_id=start,
    )
    device = embedding_table(model).device

    def attempt(rows: int) -> list[list[int]]:
        samples: list[list[int]] = []
        with _seeded(seed, device):
            while len(samples) < num_windows * per_window:
                count = min(rows, num_windows * per_window - len(samples))
                ids = torch.full((count, 1), start, device=device)
                written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                samples += written[:, 1 : 1 + size].tolist()
        return samples

    with torch.inference_mode():
        samples, _ = with_halving(lambda tokens: attempt(max(1, tokens // size)), 16 * size)
    joined = [samples[i * per_window : (i + 1) * per_window] for i in range(num_windows)]
    return tuple(tuple(token for sample in window for token in sample)[:length] for window in joined)


def scored_positions(length: int, seed: int = 0) -> list[int]:
    """Returns at which positions of a window distributions are compared: spread evenly, from a random start."""
    count = min(_SCORED, length)
    offset = np.random.default_rng(seed).random()
    return sorted({int((i + offset) * length / count) for i in range(count)})


def window_logits(model: nn.Module, window: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Returns a window's logits at some positions: shape `(len(positions), vocabulary)`, in the model's dtype."""
    device = embedding_table(model).device
    ids, columns = torch.tensor([window], device=device), torch.tensor(positions, device=device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
    if logits.shape[1] != len(positions):  # a model that does not know `logits_to_keep` returns every column
        logits = logits[:, columns]
    return logits[0]


def divergence(unscaled: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """Returns the Kullback-Leibler divergence in nats, averaged over positions.

    Args:
        unscaled: logits of shape `(positions, vocabulary)`.
        scaled: logits of that shape; the result is differentiable in them.
    """
    expected = unscaled.float().log_softmax(-1)
    return (expected.exp() * (expected - scaled.float().log_softmax(-1))).sum(-1).mean()


def _special_tokens(model: nn.Module) -> tuple[int, list[int]]:
    """The token that text begins with, and those that it ends with."""
    settings, text = model.generation_config, model.config.get_text_config(decoder=True)
    ends = settings.eos_token_id if settings.eos_token_id is not None else text.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    begins = settings.bos_token_id if settings.bos_token_id is not None else text.bos_token_id
    return (begins if begins is not None else next(iter(ends), 0)), ends


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds PyTorch's generators, which `generate()` draws from, and gives them their state back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
