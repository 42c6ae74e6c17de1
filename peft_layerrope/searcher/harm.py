"""What factors do to ordinary text, and which of the vectors under a bound on it is the result.

On text that the unscaled model wrote at temperature 1 the expected rise of the loss is the Kullback-Leibler divergence
of its next-token distributions from the scaled model's: never negative, and known from few tokens. On people's text the
rise of the loss itself is measured, which may have either sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..errors import TaskError, one_line
from ..scoring.batching import judge_tokens, logits_at, whole_rows, with_halving
from ..scoring.generation import generating_by, writing_model
from ..scoring.scores import Interval, mean_interval, rank_key
from ..tasks.perplexity import beginning, tokenized
from ..tuner.sites import embedding_table

Windows = tuple[tuple[int, ...], ...]
"""Token ids of pieces of text, all of one length."""

NUM_WINDOWS, NUM_WRITTEN = 4, 2
"""Of people's text, and of what the model writes."""
MAX_DROP = 0.03
"""Accuracy that may be lost where the answer stands first, and where it stands last; and of the probability of right
answers on a task that is to be kept."""
SAMPLE_NAME = "sample_text.txt"
_MAX_UNKNOWN = 0.1  # share of unknown tokens from which on a text is none to the model
_CHARACTERS_PER_TOKEN = 40  # read of a file at most, for each token that is wanted
_BEGUN_TOKENS = 16  # of people's text, from which a sample goes on
_SAMPLED_TOKENS = 256  # tokens of one sample: a window holds several, one after the other
_SCORED = 128  # positions of a window at which distributions are compared at a time


def read_windows(tokenizer: PreTrainedTokenizerBase | None, text: Path | None, length: int) -> Windows:
    """Returns windows of people's text, of a file in UTF-8 or of the shipped sample, with at most `length` tokens; none
    without a tokenizer, or where it does not know the words of the sample.

    Raises:
        TaskError: the file cannot be read or is too short, there is no tokenizer for it, or windows are too short.
    """
    if text is not None and (tokenizer is None or length < _SCORED):
        why = "the task has no tokenizer to read it with" if tokenizer is None else f"prompts have {length} tokens"
        raise TaskError(f"text={text} cannot be used: {why}. Windows of it have those of a prompt, at least {_SCORED}.")
    if tokenizer is None:
        return ()
    ids = tokenized([_read(text, length)], tokenizer, str(text)).tolist()
    unknown = ids.count(tokenizer.unk_token_id) / max(len(ids), 1) if tokenizer.unk_token_id is not None else 0
    size = min(length, len(ids) // NUM_WINDOWS)
    if unknown <= _MAX_UNKNOWN and size >= _SCORED:
        # of a document, only the first window would begin as texts do
        begin = beginning(tokenizer)
        starts = [i * (len(ids) // NUM_WINDOWS) for i in range(NUM_WINDOWS)]
        return tuple(tuple([*begin, *ids[start : start + size - len(begin)]]) for start in starts)
    if text is None:
        return ()
    raise TaskError(
        f"{text} has {len(ids)} tokens, {unknown:.0%} of them unknown to the tokenizer: expected at least "
        f"{NUM_WINDOWS * _SCORED}, {_MAX_UNKNOWN:.0%} of them unknown at most."
    )


def _read(text: Path | None, length: int) -> str:
    if text is None:
        return resources.files(__package__).joinpath(SAMPLE_NAME).read_text(encoding="utf-8")
    try:
        with text.open(encoding="utf-8-sig") as file:
            return file.read(NUM_WINDOWS * length * _CHARACTERS_PER_TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{text} cannot be read as text: {one_line(error)}.") from error


def sample_windows(model: nn.Module, num_windows: int, length: int, *, seed: int, read: Windows = ()) -> Windows:
    """Has an unscaled model write windows of text at temperature 1, each filled with samples of at most 256 tokens.

    A sample goes on from a few tokens of `read`, people's text: out of nothing an instruct model writes what nobody
    reads. Where there is none, it begins at the token that text begins with.
    """
    per_window = -(-length // _SAMPLED_TOKENS)
    size = -(-length // per_window)
    start, ends = _special_tokens(model)
    count = num_windows * per_window
    begins, more = [[start]] * count, size
    if read:
        begun = max(1, min(_BEGUN_TOKENS, size // 4))
        pieces = [window[i : i + begun] for i in range(0, len(read[0]) - begun, begun) for window in read]
        begins = [list(pieces[i * len(pieces) // count]) for i in range(count)]
        more = size - begun
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=more,
        max_new_tokens=more,
        eos_token_id=ends or None,  # none before the minimum, that is, never
        pad_token_id=start,
    )
    device = embedding_table(model).device
    model = writing_model(model)

    def attempt(rows: int) -> list[list[int]]:
        samples: list[list[int]] = []
        # `generate()` draws from PyTorch's own generators, which get their state back
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            while len(samples) < count:
                ids = torch.tensor(begins[len(samples) : len(samples) + rows], device=device)
                written = model.generate(ids, attention_mask=torch.ones_like(ids))
                samples += written[:, 0 if read else 1 :].tolist()
        return samples

    with torch.no_grad(), whole_rows(model), generating_by(model, settings):
        samples, _ = with_halving(lambda tokens: attempt(max(1, tokens // size)), 16 * size)
    joined = [samples[i * per_window : (i + 1) * per_window] for i in range(num_windows)]
    return tuple(tuple(token for sample in window for token in sample)[:length] for window in joined)


def scored_positions(length: int, most: int = _SCORED) -> list[int]:
    """Returns at which positions of a window, but its last, distributions are compared: spread evenly, from a random
    start.
    """
    count = min(most, length - 1)
    offset = np.random.default_rng(0).random()
    return sorted({int((i + offset) * (length - 1) / count) for i in range(count)})


def window_logits(model: nn.Module, window: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Returns a window's logits at some positions: shape `(len(positions), vocabulary)`, in the model's dtype."""
    device = embedding_table(model).device
    ids, columns = torch.tensor([window], device=device), torch.tensor(positions, device=device)
    return logits_at(model, columns, input_ids=ids)[0]


def divergences(unscaled: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """Returns the Kullback-Leibler divergence in nats at each position: shape `(positions,)`, float32; the logits have
    the shape `(positions, vocabulary)`. Rounding may leave it a little below 0.
    """
    parts = []
    for before, after in zip(unscaled.split(_SCORED), scaled.split(_SCORED), strict=True):  # rows in float32 are large
        expected = before.float().log_softmax(-1)
        parts.append((expected.exp() * (expected - after.float().log_softmax(-1))).sum(-1))
    return torch.cat(parts)


def losses(logits: torch.Tensor, window: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Returns the loss of the token after each position: shape `(positions,)`, float32."""
    after = torch.tensor([window[position + 1] for position in positions], device=logits.device)
    return -judge_tokens(logits, after)[0]


def _special_tokens(model: nn.Module) -> tuple[int, list[int]]:
    """The token that text begins with, and those that it ends with."""
    settings, text = model.generation_config, model.config.get_text_config(decoder=True)
    ends = settings.eos_token_id if settings.eos_token_id is not None else text.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    begins = settings.bos_token_id if settings.bos_token_id is not None else text.bos_token_id
    return (begins if begins is not None else next(iter(ends), 0)), ends


@dataclass(frozen=True)
class Harm:
    """What a vector costs where the unscaled model does well. Each has its 95 % interval."""

    # of the unscaled model's next-token distributions from the scaled one's, on text that the former wrote, in nats:
    # the expected rise of the loss there
    divergence: Interval
    loss_rise: Interval | None = None  # on people's text, in nats; None where there is none
    # change of the accuracy at the first and at the last position; None where no answers are asked for
    ends: tuple[Interval, Interval] | None = None
    # change of the probability of right answers on a task that is to be kept; None where that was not measured
    kept: Interval | None = None

    @property
    def on_text(self) -> Interval:
        """The worse of the two on ordinary text, in nats."""
        return max(self._on_text, key=lambda interval: -rank_key(-interval.value))

    @property
    def _on_text(self) -> tuple[Interval, ...]:
        return (self.divergence, self.loss_rise) if self.loss_rise is not None else (self.divergence,)

    def to_dict(self) -> dict[str, list[float]]:
        """Returns plain values: each with its interval."""
        named = {"divergence": self.divergence, "loss_rise": self.loss_rise}
        if self.ends is not None:
            named |= {"first_position": self.ends[0], "last_position": self.ends[1]}
        named["kept_task"] = self.kept
        return {name: interval.to_list() for name, interval in named.items() if interval is not None}

    def exceeds(self, bound: float | None) -> bool:
        """Whether a bound is broken for sure: that on text, in nats, or [`MAX_DROP`]. No bound, none of them but that
        of a task to be kept.
        """
        drops = [self.kept] if self.kept is not None else []
        kept = True
        if bound is not None:
            drops += self.ends or ()
            # nothing that is not a number keeps to it
            kept = all(np.isfinite(interval.value) and interval.low <= bound for interval in self._on_text)
        return not (kept and all(interval.high >= -MAX_DROP for interval in drops))


def choose(
    fitness: Mapping[str, Sequence[float]], harm: Mapping[str, Harm], names: Sequence[str], bound: float | None
) -> str:
    """Chooses among what several methods found, by their fitness in each context of the validation split; `names` go
    from the unscaled model to the most elaborate choice, and the bound is in nats.

    Returns:
        The name of the best that keeps to the bound, or of a simpler one that it is not better than by an interval
        that excludes 0. What breaks in a context is neither.
    """
    unscaled, *others = (name for name in names if not harm[name].exceeds(bound))
    allowed = [unscaled, *(name for name in others if np.isfinite(fitness[name]).all())]
    best = max(allowed, key=lambda name: rank_key(np.mean(fitness[name])))
    for name in allowed[: allowed.index(best)]:
        gain = mean_interval(np.subtract(fitness[best], fitness[name]))
        if not gain.low > 0:
            return name
    return best
