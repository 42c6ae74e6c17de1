"""What the last token of a prompt attends to in every layer, without holding the attention maps of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..scoring.batching import rotation_depends_on_length
from ..tuner.frequencies import without_memory
from ..tuner.sites import find_stack, model_type, text_config

EAGER = "eager"
_TRIAL = (0, 1, 2, 3)  # ids that every vocabulary has


class AttentionReader:
    """Reads the attention of a prompt's last token.

    The prompt runs with the model's own attention and fills a cache; its last token alone then runs with the eager
    implementation, which gives its weights: `(heads, 1, S)` instead of `(heads, S, S)`. Where the rotation depends on
    the length (Dynamic-NTK), keys in a cache would be those of a shorter prompt: then the whole prompt runs eagerly,
    one layer's map at a time.

    Args:
        model: a transformers model, with or without an adapter.

    Attributes:
        whole: whether the whole prompt runs eagerly.

    Raises:
        UnsupportedModelError: the model's attention cannot be read.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval()
        self._stack = find_stack(model)
        self.whole = rotation_depends_on_length(model)

    def layers(self) -> list[int]:
        """Returns the layers that have attention weights, after a trial.

        Raises:
            UnsupportedModelError: none has.
        """
        found = [layer for layer, row in enumerate(self._rows(_TRIAL)) if row is not None]
        if not found:
            raise UnsupportedModelError(f"{model_type(self._model)}: its layers return no attention weights.")
        return found

    def read(self, prompt: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
        """Returns the last token's attention: float32 of shape `(layers, heads, S)` on the CPU."""
        rows = self._rows(prompt)
        return torch.stack([rows[layer] for layer in layers])

    @torch.no_grad()
    def _rows(self, prompt: Sequence[int]) -> list[torch.Tensor | None]:
        device = self._model.get_input_embeddings().weight.device
        ids = torch.tensor([list(prompt)], device=device)
        cache = None
        if not self.whole:
            cache = self._model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
            ids = ids[:, -1:]
        with _eager(self._model), without_memory(self._model), _recorded(self._stack.layers) as rows:
            self._model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        return [None if row is None else _as_long_as(row, len(prompt)) for row in rows]


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

    def hook_of(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.ndim == 4 and rows[number] is None:
                rows[number] = weights[0, :, -1].float().cpu()

        return hook

    handles = [
        module.register_forward_hook(hook_of(number))
        for number, layer in enumerate(layers)
        for module in layer.modules()
        if module is not layer
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _as_long_as(row: torch.Tensor, length: int) -> torch.Tensor:
    """A cache with a sliding window has forgotten the first keys, which get no attention."""
    return nn.functional.pad(row, (length - row.shape[-1], 0))


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
