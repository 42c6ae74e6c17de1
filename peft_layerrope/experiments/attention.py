"""Where the model looks for the answer: attention on the gold span and its entropy, with and without the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from ..base_model import keeping_modes
from ..comparison.candidates import NO_SCALING, Candidate, candidate_on
from ..errors import TaskError, UnsupportedModelError
from ..plots import COLORS, GRAY, draw_line, new_figure, to_png
from ..report import Table, Unit
from ..scoring.batching import rotation_depends_on_length, whole_rows
from ..scoring.preflight import preflight, with_targets
from ..scoring.scorer import Scorer
from ..scoring.scores import mean_interval
from ..searcher.space import format_layers
from ..tasks.base import Split, Task
from ..tasks.prompts import PromptTask
from ..tuner.config import LayerRopeConfig
from ..tuner.frequencies import without_memory
from ..tuner.sites import find_stack, model_type, text_config
from . import Measuring, factor_vector, json_data
from .section import Section, SectionFigure

EAGER = "eager"
_TRIAL = (0, 1, 2, 3)  # ids that every vocabulary has


class AttentionReader:
    """Reads the attention of a prompt's last token.

    The prompt runs with the model's own attention and fills a cache; its last token alone then runs with the eager
    implementation, which gives its weights: `(heads, 1, S)` instead of `(heads, S, S)`. Where the rotation depends on
    the length (Dynamic-NTK), keys in a cache would be those of a shorter prompt: then the whole prompt runs eagerly,
    one layer's map at a time.

    Raises:
        UnsupportedModelError: the model's attention cannot be read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.whole = rotation_depends_on_length(model)  # whether the whole prompt runs eagerly
        # those that have attention weights
        self.layers = [layer for layer, row in enumerate(self._rows(_TRIAL)) if row is not None]
        if not self.layers:
            raise UnsupportedModelError(f"{model_type(model)}: its layers return no attention weights.")

    def read(self, prompt: Sequence[int]) -> torch.Tensor:
        """Returns the last token's attention: float32 of shape `(layers, heads, S)` on the CPU."""
        rows = self._rows(prompt)
        return torch.stack([rows[layer] for layer in self.layers])

    @torch.no_grad()
    def _rows(self, prompt: Sequence[int]) -> list[torch.Tensor | None]:
        ids = torch.tensor([list(prompt)], device=self.model.get_input_embeddings().weight.device)
        cache = None
        if not self.whole:
            with whole_rows(self.model):
                cache = self.model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
            ids = ids[:, -1:]
        with _eager(self.model), without_memory(self.model), _recorded(find_stack(self.model).layers) as rows:
            self.model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        # a cache with a sliding window has forgotten the first keys, which get no attention
        return [None if row is None else nn.functional.pad(row, (len(prompt) - row.shape[-1], 0)) for row in rows]


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Switches the text decoder to eager attention, and back."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    if not hasattr(decoder, "set_attn_implementation"):
        decoder = base
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(EAGER)
    try:
        if decoder.config._attn_implementation != EAGER:
            raise UnsupportedModelError(f"{model_type(model)}: its attention cannot be switched to {EAGER!r}.")
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list[torch.Tensor | None]]:
    """Yields a list that gets each layer's last row of attention, `(heads, keys)`; None for a layer without any."""
    rows: list[torch.Tensor | None] = [None] * len(layers)

    def hook(number: int, module: nn.Module, inputs: tuple, output: object) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, torch.Tensor) and weights.ndim == 4 and rows[number] is None:
            rows[number] = weights[0, :, -1].float().cpu()

    handles = [
        module.register_forward_hook(partial(hook, number))
        for number, layer in enumerate(layers)
        for module in layer.modules()
        if module is not layer
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def visible_tokens(model: nn.Module, layer: int, length: int) -> int:
    """Returns how many tokens the last of `length` can attend to in a layer."""
    config = text_config(model)
    types = getattr(config, "layer_types", None)
    kind = types[layer] if types else "sliding_attention"  # without types, a window holds for all layers
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kind == "sliding_attention" and window is not None:
        return min(length, window)
    chunk = getattr(config, "attention_chunk_size", None)
    if kind == "chunked_attention" and chunk is not None:
        return (length - 1) % chunk + 1
    return length


NAME = "attention"
ADAPTER = "with the adapter"
PLACES = ("first", "middle", "last")
MASS = Unit("attention on the gold", "%", "points", 100, 1)
ENTROPY = Unit("entropy", "of log n", "", 1, 3)
_KINDS = {"mass": (MASS, "Attention on the gold"), "entropy": (ENTROPY, "Entropy of attention")}

_LEGEND = (
    "Mean over heads, from the token that predicts the answer's first. Without → with the adapter; *: the paired 95 % "
    "interval of the difference excludes 0, as it does for 1 in 20 by chance."
)


def run_attention(measuring: Measuring, task: Task, config: LayerRopeConfig) -> Section:
    """Reads the attention of the token before the answer, as the unscaled model opens one, with the gold first, in the
    middle and last. One prompt runs at a time, and nothing is kept.
    """
    factor_vector(measuring.model, config)
    split = measuring.split_by_position(task, NAME)
    if any(example.gold_span is None for example in split.examples):
        raise TaskError(f"{NAME} needs to know where the gold stands in the prompt; task {task.name} does not say.")
    scorer = Scorer(measuring.model, batch_tokens=measuring.batch_tokens)
    scorer.check(split)
    if isinstance(task, PromptTask):
        with keeping_modes(measuring.model):
            split = with_targets(split, preflight(scorer, task, wanted={split.name: split.num_groups}), task)
    candidates = [Candidate(NO_SCALING), Candidate.of_config(ADAPTER, config)]
    measuring.audience.stage(NAME, len(candidates) * len(PLACES) * split.num_groups)
    found, whole = [], False
    for candidate in candidates:
        with candidate_on(measuring.model, candidate) as subject:
            reader = AttentionReader(subject)
            layers, whole = reader.layers, whole or reader.whole
            found.append(_read(reader, split, measuring))
    before, after = found
    measured = measuring.described(task, split)
    way = "the whole prompt run eagerly, since the rotation depends on its length" if whole else "last token, by cache"
    data = {}
    for kind in _KINDS:
        read = {"without": before[kind], "with": after[kind], "difference": after[kind] - before[kind]}
        data[kind] = {
            place: {name: list(map(mean_interval, values[index].T)) for name, values in read.items()}
            for index, place in enumerate(PLACES)
        }
    return Section(
        name=NAME,
        title="Attention on the gold",
        question="Does the adapter move attention towards the answer, and in which layers?",
        measured=f"{measured}; {way}",
        findings=tuple(_findings(layers, before, after)),
        tables=tuple(_table(kind, layers, before[kind], after[kind]) for kind in _KINDS),
        figures=tuple(_figure(kind, layers, before[kind], after[kind], measured) for kind in _KINDS),
        data=json_data(task=task, split=split, layers=layers, whole_prompt=whole, **data),
    )


def _read(reader: AttentionReader, split: Split, measuring: Measuring) -> dict[str, np.ndarray]:
    """Mass and entropy: float64 of shape `(places, groups, layers)` each."""
    found = {kind: np.empty((len(PLACES), split.num_groups, len(reader.layers))) for kind in _KINDS}
    for place, position in enumerate((0, len(split.positions) // 2, len(split.positions) - 1)):
        examples = [example for example in split.examples if example.position == position]
        for group, example in enumerate(examples):
            prompt = example.context_ids + example.asked_ids
            rows = reader.read(prompt)
            visible = [visible_tokens(reader.model, layer, len(prompt)) for layer in reader.layers]
            found["mass"][place, group] = gold_mass(rows, example.gold_span)
            found["entropy"][place, group] = relative_entropy(rows, visible)
            measuring.audience.advance()
    return found


def gold_mass(rows: torch.Tensor, gold_span: tuple[int, int]) -> np.ndarray:
    """Returns the share of the attention on a span, mean over heads: shape `(layers,)`, of `(layers, heads, S)`."""
    start, end = gold_span
    return rows[..., start:end].sum(-1).mean(-1).double().numpy()


def relative_entropy(rows: torch.Tensor, visible: Sequence[int]) -> np.ndarray:
    """Returns the entropy of the attention over that of an even spread, mean over heads: 0 on one token, 1 spread
    evenly over all that are visible in a layer. Shape `(layers,)`, of `(layers, heads, S)`.
    """
    nats = torch.special.entr(rows.double()).sum(-1).mean(-1).numpy()
    return nats / np.array([math.log(max(count, 2)) for count in visible])


def _findings(layers: list[int], before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> list[str]:
    lines = []
    for place, old, change in zip(PLACES, before["mass"], after["mass"] - before["mass"], strict=True):
        overall = mean_interval(change.mean(axis=1))
        moved = "more attention on it" if overall.value > 0 else "less attention on it"
        verdict = f"{moved} with the adapter" if overall.excludes_zero() else "no difference beyond noise"
        by_layer = dict(zip(layers, map(mean_interval, change.T), strict=True))
        up = [layer for layer, interval in by_layer.items() if interval.low > 0]
        down = [layer for layer, interval in by_layer.items() if interval.high < 0]
        where = [
            f"{word} in layer{'s' if len(found) > 1 else ''} {format_layers(found)}"
            for word, found in (("up", up), ("down", down))
            if found
        ]
        lines.append(
            f"Gold {place}: {verdict} over all layers, {MASS.value(old.mean())} % without it and "
            f"{MASS.change_in_words(overall)} with it{'; ' * bool(where)}{' and '.join(where)}."
        )
    entropy = mean_interval((after["entropy"] - before["entropy"]).mean(axis=(0, 2)))
    kind = "unchanged beyond noise" if not entropy.excludes_zero() else "sharper" if entropy.value < 0 else "flatter"
    text = f"{entropy.value:+.3f} [{entropy.low:+.3f}, {entropy.high:+.3f}]"
    return [*lines, f"Attention over all layers is {kind}: relative entropy {text}."]


def _table(kind: str, layers: list[int], old: np.ndarray, new: np.ndarray) -> Table:
    unit, title = _KINDS[kind]
    rows = []
    for column, layer in enumerate(layers):
        cells = []
        for before, after in zip(old[..., column], new[..., column], strict=True):
            star = "*" if mean_interval(after - before).excludes_zero() else ""
            cells.append(f"{unit.value(before.mean())} → {unit.value(after.mean())}{star}")
        rows.append((str(layer), *cells))
    header = ("layer", *(f"gold {place}" for place in PLACES))
    return Table(header, tuple(rows), f"{title} ({unit.symbol})", _LEGEND, ())


def _figure(kind: str, layers: list[int], old: np.ndarray, new: np.ndarray, measured: str) -> SectionFigure:
    unit, title = _KINDS[kind]
    figure, panels = new_figure(height=3.6, columns=len(PLACES), sharey=True)
    for index, (axes, place) in enumerate(zip(panels, PLACES, strict=True)):
        for values, label, color, shift in ((old, NO_SCALING, GRAY, -0.08), (new, ADAPTER, COLORS[0], 0.08)):
            draw_line(axes, layers, map(mean_interval, values[index].T), unit, label, color, shift)
        axes.set_title(f"gold {place}", fontsize=9)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(f"{unit.name} ({unit.symbol})")
    panels[0].set_ylim(0, min(panels[0].get_ylim()[1], 1.03 * unit.scale))  # no share is above 1
    caption = f"{title} by layer, with the gold first, in the middle and last; bars: 95 % intervals over contexts."
    return SectionFigure(kind, caption, to_png(figure, title, measured))
