"""Prompts in batches, and how they are judged: rows, masks, packed contexts, answers' logits, and too little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import TaskError, UnsupportedModelError
from ..tasks.base import Example, Split
from ..tuner.artifacts import KEY_PREFIX
from ..tuner.frequencies import is_length_dependent
from ..tuner.rotary import BakedLayerRope, LayerRopeLayer
from ..tuner.sites import embedding_table, model_type
from .scores import PositionScores

MIN_BATCH_TOKENS = 64
"""Memory that does not suffice for this many tokens is not worth halving on."""

T = TypeVar("T")

_MESSAGES = (
    "DefaultCPUAllocator: ",  # it says nothing else; "can't allocate memory", on Windows "not enough memory"
    "MPS backend out of memory",
    "Invalid buffer size: ",  # of MPS, which limits the single tensor too
    "CUDA error: out of memory",  # of CUDA itself, where PyTorch's allocator was not asked
    "HIP error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How errors begin to speak of it that are plain `RuntimeError`s."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: the error says that a device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def free_cached_memory() -> None:
    """Has the accelerator's allocator, if there is one, give back what nothing uses any more."""
    if torch.accelerator.is_available():
        empty_cache = getattr(torch.get_device_module(torch.accelerator.current_accelerator()), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()


def with_halving(attempt: Callable[[int], T], batch_tokens: int) -> tuple[T, int]:
    """Returns what `attempt(batch_tokens)` returns, called again with half as many tokens whenever memory runs out, and
    the number of tokens that worked.

    Raises:
        TaskError: memory does not suffice for a single row.
    """
    while True:
        try:
            return attempt(batch_tokens), batch_tokens
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch_tokens <= MIN_BATCH_TOKENS:
                raise TaskError(
                    f"out of memory even with --batch-tokens {batch_tokens}: use shorter prompts, a smaller dtype "
                    "or a larger device."
                ) from error
        batch_tokens = max(batch_tokens // 2, MIN_BATCH_TOKENS)  # outside `except`: its traceback holds the tensors
        free_cached_memory()


_PACKABLE_ATTENTION = ("eager", "sdpa")  # implementations that take a dense 4-D mask
_FULL, _SLIDING = "full_attention", "sliding_attention"
_TRIAL_TOLERANCE = 0.1  # of the logits' standard deviation: far above the rounding of bfloat16, far below another text


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass, and which of its logits are answers: `rows`, `kept`, `gold` and `owner` have the shape `(N,)`.

    `inputs` are `input_ids` and `position_ids`, `(B, S)` int64, and an `attention_mask`: `(B, S)` int64, or additive
    `(B, 1, S, S)` where a row packs several queries, by layer type where layers differ.
    """

    inputs: dict[str, Any]
    columns: torch.Tensor  # sorted: those whose logits are needed, for `logits_to_keep`
    rows: torch.Tensor  # the row of each answer token
    kept: torch.Tensor  # its place in `columns`
    gold: torch.Tensor  # its token id
    owner: torch.Tensor  # which of `examples` it belongs to, as an index into them
    examples: tuple[int, ...]  # indices into the split's examples


def make_batches(
    model: nn.Module, examples: Sequence[Example], batch_tokens: int, packed: bool | None = None
) -> list[Batch]:
    """Plans the forward passes that score some examples, in order of length, each of at most `batch_tokens` padded
    tokens; a longer row has one to itself. `packed`: the context that several queries share is run once; default: where
    the model allows it. Both ways give the same scores up to rounding.

    Raises:
        TaskError: a token id is outside the model's vocabulary.
    """
    check_vocabulary(model, examples)
    if packed is None:
        packed = can_pack(model)
    same_length = rotation_depends_on_length(model)
    rows = _packed_rows(examples, same_length) if packed else [[i] for i in range(len(examples))]
    alike: dict[int, list[list[int]]] = {}  # rows with the same last position, by which a whole batch may be rotated
    for row in rows:
        alike.setdefault(examples[row[0]].num_tokens if same_length else 0, []).append(row)
    embeddings, windows = embedding_table(model), _windows(model) or {}
    return [
        _batch(examples, group, embeddings.dtype, embeddings.device, windows)
        for _, some in sorted(alike.items())
        for group in batched_by_length(
            some, lambda row: row_length([examples[i] for i in row]), batch_tokens, same_length=same_length
        )
    ]


def batched_by_length(
    items: Sequence[T],
    length: Callable[[T], int],
    batch_tokens: int,
    *,
    rows: Callable[[T], int] = lambda item: 1,
    same_length: bool = False,
) -> Iterator[list[T]]:
    """Yields items in order of length, in batches of at most `batch_tokens` padded tokens (one item at least), given
    how long the rows of an item are and how many it has. `same_length`: rows of different lengths must not stand beside
    each other.
    """
    batch: list[T] = []
    for item in sorted(items, key=length):  # stable: ties keep their order
        too_long = (sum(map(rows, batch)) + rows(item)) * length(item) > batch_tokens
        if batch and (too_long or (same_length and length(item) != length(batch[0]))):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows of token ids as one tensor, padded on one side with 0, and its mask: both `(rows, width)`, int64."""
    ids, mask = (
        pad_sequence([torch.tensor(row, dtype=torch.long) for row in some], batch_first=True, padding_side=side)
        for some in (rows, [[1] * len(row) for row in rows])
    )
    return ids, mask


@torch.no_grad()
def agrees(model: nn.Module, ids: torch.Tensor, attempt: Callable[[], torch.Tensor]) -> bool:
    """Whether another way to run a few tokens, shape `(1, S)`, gives their logits, up to rounding: `attempt()` returns
    those of the last N tokens, shape `(N, vocabulary)`. Where it raises, they do not agree.
    """
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
    try:
        found = attempt().float()
    except Exception as error:  # whatever a family raises that cannot be run so
        if is_out_of_memory(error):
            raise
        return False
    gap = (found - expected[-len(found) :]).abs().max()
    return bool(gap <= _TRIAL_TOLERANCE * expected.std())  # False where they are not numbers


def check_vocabulary(model: nn.Module, examples: Sequence[Example]) -> None:
    """Raises TaskError if a token id of some examples is outside a model's vocabulary, and UnsupportedModelError if it
    is no transformers model.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError(f"{model_type(model)}: not a transformers model.")
    ids = [f(e.context_ids + e.asked_ids + e.answer_ids) for e in examples for f in (min, max)]
    vocabulary = embedding_table(model).shape[0]
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise TaskError(f"token id {token} is outside the model's vocabulary of {vocabulary}.")


def rotation_depends_on_length(model: nn.Module) -> bool:
    """Whether a token's rotation depends on how long its batch is (Dynamic-NTK, longrope)."""
    for module in model.modules():
        scaling = module.active_scaling() if isinstance(module, (LayerRopeLayer, BakedLayerRope)) else None
        if scaling is not None and scaling.depends_on_length:
            return True
        if is_length_dependent(module):
            return True
    return False


def attends_fully(model: nn.Module) -> bool:
    """Whether every token attends to all before it in every layer: no sliding window, no chunks, no recurrence."""
    return _windows(model) == {"": None}


def can_pack(model: nn.Module) -> bool:
    """Whether several queries may share one row: needs dense masks, one for each kind of layer."""
    windows = _windows(model)
    if windows is None or model.config.get_text_config(decoder=True)._attn_implementation not in _PACKABLE_ATTENTION:
        return False
    return set(windows) == {""} or _takes_masks_by_layer_type(model, windows)


def _windows(model: nn.Module) -> dict[str, int | None] | None:
    """How far the layers of each type attend, in tokens (None: to the beginning); under `""` where all are of one type
    and share one mask. None where a type is of another kind.
    """
    config = model.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not layer_types <= {_FULL, _SLIDING} or (_SLIDING in layer_types and window is None):
        return None
    if _SLIDING in layer_types:
        return {name: window if name == _SLIDING else None for name in sorted(layer_types)}
    return {"": window if not layer_types else None}


def _takes_masks_by_layer_type(model: nn.Module, windows: dict[str, int | None]) -> bool:
    """Whether a model takes a dict of masks, by a trial of a few tokens."""
    embeddings = embedding_table(model)
    ids = torch.arange(1, 6, device=embeddings.device)[None]
    places = torch.arange(ids.shape[1], device=embeddings.device)[None]

    def masked() -> torch.Tensor:
        masks = _masks(torch.ones_like(ids), places, embeddings.dtype, windows)
        return model(input_ids=ids, position_ids=places, attention_mask=masks, use_cache=False).logits[0]

    return agrees(model, ids, masked)


def _packed_rows(examples: Sequence[Example], same_length: bool) -> list[list[int]]:
    """Groups examples that share a context (and, for a length-dependent rotation, their length)."""
    rows: dict[tuple, list[int]] = {}
    for index, example in enumerate(examples):
        shared = example.context_ids or index  # nothing is nothing to share
        rows.setdefault((shared, example.num_tokens if same_length else 0), []).append(index)
    return list(rows.values())


def row_length(row: Sequence[Example]) -> int:
    """Returns the tokens of a row that packs examples of one context."""
    return len(row[0].context_ids) + sum(len(tokens) for tokens, _ in set(map(_after_context, row)))


def tokens_run(examples: Sequence[Example]) -> int:
    """Returns the tokens of the contexts of some examples, each run once, and of the questions to them."""
    return sum(row_length([examples[i] for i in row]) for row in _packed_rows(examples, same_length=False))


def _after_context(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that are run after an example's context, and those of its answer, the last of which is not run."""
    return example.asked_ids + example.answer_ids[:-1], example.answer_ids


def _batch(
    examples: Sequence[Example],
    rows: list[list[int]],
    dtype: torch.dtype,
    device: torch.device,
    windows: dict[str, int | None],
) -> Batch:
    """Builds one forward pass: each row is a context followed by the queries that share it.

    A query's tokens see the context and themselves, and their positions continue the context's, so each query
    gets what it would get alone. What several examples ask alike is run once. Rows with one query use an ordinary
    causal mask with padding on the right.
    """
    parts: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions; 1 for the context, 2.. for queries
    answers: list[tuple[int, int, int, int]] = []  # row, column, token id, owner
    members = [index for row in rows for index in row]
    owners = iter(range(len(members)))
    for r, row in enumerate(rows):
        context = examples[row[0]].context_ids
        ids, places, segments = list(context), list(range(len(context))), [1] * len(context)
        begin: dict[tuple, int] = {}  # of each query
        for index in row:
            query, owner = _after_context(examples[index]), next(owners)
            tokens, answer = query
            if query not in begin:
                begin[query] = len(ids)
                ids += tokens
                places += range(len(context), len(context) + len(tokens))
                segments += [len(begin) + 1] * len(tokens)
            first = begin[query] + len(tokens) - len(answer)
            answers += [(r, first + i, token, owner) for i, token in enumerate(answer)]
        parts.append((ids, places, segments))
    (input_ids, mask), (position_ids, _), (segment, _) = (
        tuple(tensor.to(device) for tensor in padded(part)) for part in zip(*parts, strict=True)
    )
    if any(len(row) > 1 for row in rows):
        mask = _masks(segment, position_ids, dtype, windows)
    answer_rows, columns, gold, owner = torch.tensor(answers, device=device).T
    wanted, kept = columns.unique(return_inverse=True)  # sorted
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}
    return Batch(inputs, wanted, answer_rows, kept, gold, owner, tuple(members))


def _masks(
    segment: torch.Tensor, places: torch.Tensor, dtype: torch.dtype, windows: dict[str, int | None]
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks `(B, 1, S, S)`, by layer type where there are several: causal, and a query is seen only by itself.

    Of each token, `(B, S)`, `segment` is 0 for padding, 1 for the context, 2 and more for queries, and `places` is the
    position by which a window counts; see [`_windows`].
    """
    width = segment.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segment.device).tril()
    own = segment[:, :, None] == segment[:, None, :]
    context = segment[:, None, :] == 1
    visible = causal & (own | context)
    masks = {}
    for name, window in windows.items():
        seen = visible if window is None else visible & (places[:, :, None] - places[:, None, :] < window)
        masks[name] = torch.zeros(seen.shape, dtype=dtype, device=segment.device)
        masks[name] = masks[name].masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    return masks.get("", masks)


_JUDGED_BYTES = 2**28  # of logits in float32 at once: a long text of a large vocabulary would fill the memory


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Runs one batch and returns the logits that its answer tokens are read from, in the model's dtype:
    `(N, vocabulary)`.
    """
    return logits_at(model, batch.columns, **batch.inputs)[batch.rows, batch.kept]


def logits_at(model: nn.Module, columns: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Runs a model and returns its logits at some columns, in its dtype: `(batch, len(columns), vocabulary)`."""
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    if logits.shape[1] != len(columns):  # a model that does not know `logits_to_keep` returns every column
        logits = logits[:, columns]
    return logits


@contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """Has the output layer get what it multiplies in one piece of memory.

    `generate()` gives it a slice of the prompt's rows. Where its weight is frozen, as PEFT freezes that of every model
    which it puts an adapter on, PyTorch then copies the weight for each row: seconds, for a vocabulary of 150,000.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(
        lambda _, args: (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def check_finite(model: nn.Module, split: Split, batch_tokens: int) -> None:
    """Runs the longest example of a split, whose scores must be numbers: no figure can be made of others.

    Raises:
        TaskError: no token of its answer has a finite log-probability. The message names the dtype, and the
            weights that are not finite if any are.
    """
    longest = max(split.examples, key=lambda example: example.num_tokens)
    with torch.no_grad():
        for batch in make_batches(model, [longest], batch_tokens, packed=False):
            if judge_tokens(answer_logits(model, batch), batch.gold)[0].isfinite().any():
                return
    dtype = str(embedding_table(model).dtype).removeprefix("torch.")
    # there is no isfinite() for one-byte floats, and nothing to look at on the meta device
    weights = {name: w for name, w in model.named_parameters() if w.dtype.itemsize > 1 and not w.is_meta}
    broken = [name.removeprefix(KEY_PREFIX) for name, values in weights.items() if not values.isfinite().all()]
    reason, advice = f"its numbers leave the range of {dtype}", "use"
    if broken:
        more = f" and {len(broken) - 1} more weights" if len(broken) > 1 else ""
        reason, advice = f"NaN or infinity stands in {broken[0]}{more}", "use another copy of the weights, or"
    other = " or ".join(name for name in ("bfloat16", "float32") if name != dtype)
    raise TaskError(f"the model gives no finite score in {dtype}: {reason}; {advice} --dtype {other}.")


def judge(
    logits: torch.Tensor, gold: torch.Tensor, owner: torch.Tensor, count: int, mean: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Judges `count` examples of a batch from their answer tokens' logits; see [`Batch`] and [`answer_logits`]. `mean`:
    average over an example's tokens, each as it is: the loss on text. Otherwise their sum is the answer's
    log-probability, in which a token counts no worse than chance.

    Returns:
        Shape `(count,)` each: whether every token is the most probable one; and the log-probability in nats.
        Differentiable in the logits.
    """
    values, right = judge_tokens(logits, gold)
    if not mean:
        values = values.clamp(min=-math.log(logits.shape[-1]))
    tokens = torch.bincount(owner, minlength=count)
    sums = values.new_zeros(count).index_add(0, owner, values)
    hits = torch.zeros_like(tokens).index_add(0, owner, right.long())
    return hits == tokens, sums / tokens if mean else sums


def judge_tokens(logits: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Judges single tokens: logits of shape `(N, vocabulary)` against token ids of shape `(N,)`.

    Returns:
        Shape `(N,)` each: log-probability of the gold token in nats, float32; and whether it is the most probable,
        which it never is where the log-probability is not a number.
    """
    log_probs, right = [], []
    rows = max(1, _JUDGED_BYTES // (4 * logits.shape[-1]))
    for part, ids in zip(logits.split(rows), gold.split(rows), strict=True):
        log_probs.append(part.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1))
        right.append((part.argmax(-1) == ids) & ~log_probs[-1].isnan())
    return torch.cat(log_probs), torch.cat(right)


class ScoreSheet:
    """Collects the scores of one split, batch by batch."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._cells = cells(split)
        shape = (split.num_groups, len(split.positions))
        self._correct, self._log_prob = np.zeros(shape, dtype=bool), np.zeros(shape)

    def add(
        self,
        examples: Sequence[int],
        logits: torch.Tensor,
        gold: torch.Tensor,
        owner: torch.Tensor,
        again: bool = False,
    ) -> None:
        """Enters some examples, given as indices into the split's, by their answer tokens; see [`judge`]. `again`:
        after another opening, which says whether they are right and leaves the log-probability as it is.
        """
        mean = self.split.measure == "loss"
        hits, values = (tensor.tolist() for tensor in judge(logits, gold, owner, len(examples), mean))
        for index, hit, value in zip(examples, hits, values, strict=True):
            self._correct[self._cells[index]] = hit
            if not again:
                self._log_prob[self._cells[index]] = value

    def mark_wrong(self, examples: Sequence[int]) -> None:
        """Enters some examples as not right, whatever their answer tokens say."""
        for index in examples:
            self._correct[self._cells[index]] = False

    def scores(self) -> PositionScores:
        """The scores, once every example is in."""
        return PositionScores(self.split.positions, self._correct, self._log_prob, self.split.measure)


def cells(split: Split) -> list[tuple[int, int]]:
    """Returns where each example stands in an array of shape `(groups, positions)`."""
    rows = {group: row for row, group in enumerate(dict.fromkeys(e.group for e in split.examples))}
    return [(rows[example.group], example.position) for example in split.examples]
