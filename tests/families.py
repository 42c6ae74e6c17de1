"""Model families of transformers: tiny ones of each, and a trial of whether an adapter scales them.

    python tests/families.py                        # all decoder families, about a minute
    python tests/families.py llama gemma3_text gpt2

Each is built from a shrunken configuration and has to pass four checks: all factors 1 change nothing, all factors 2
equal halved frequencies bit for bit, one layer's factor changes that layer's output and none before it, and only
differences of positions count. Nothing is downloaded. Exit status 1 if a scaling does not do what it claims.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from peft_layerrope.errors import LayerRopeError, UnsupportedModelError
from peft_layerrope.tuner.config import LayerRopeConfig
from peft_layerrope.tuner.frequencies import inv_freq_names
from peft_layerrope.tuner.sites import DecoderStack, find_stack

NUM_LAYERS = 4
_SIDE_LAYERS = 2
_VOCAB = 128
# Ids below the first word are padding, start and end; those from the first special token on image, audio, ... markers.
_FIRST_WORD = 10
_FIRST_SPECIAL_TOKEN = 100
_HIDDEN = 64
_HEADS = 4
_HEAD_DIM = 16
_PARTIAL = 0.5  # least share of a head that is rotated: 4 of 8 pairs
_SEQUENCE = 12

# transformers' tables of model classes, and what their members are called here.
_TABLES = {
    "CAUSAL_LM": "causal-lm",
    "IMAGE_TEXT_TO_TEXT": "vision-language",
    "MULTIMODAL_LM": "vision-language",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq-to-seq",
}

# Sub-configs that are not the text decoder: their depth has no bearing on the rotary tables, so they get fewer layers.
_SIDE_CONFIG = re.compile(r"vision|vit|audio|speech|encoder|vq|codec|code2wav|qformer|dit|bigvgan|projector|resampler")

# First match wins. None: leave the value as it is.
_RULES: list[tuple[str, int | None]] = [
    (r"type_vocab_size|pad_vocab_size_multiple", None),
    (r"(.*_)?vocab(_size)?(_.*)?", _VOCAB),
    (r"num_filters", 4),
    (r"num_codebooks", 2),
    (r".*(kernel|chunk|patch|image|crop|window|block|merge|grid|context|stride|tile)_?sizes?(_.*)?", None),
    (r".*(position|positions|length|sampling_rate|n_mel|mel_bins|in_channels|num_channels).*", None),
    (r"sliding_window(_size)?|attention_window_size|local_attention", 64),
    (r"index_topk", 64),
    (r"rotary_dim", _HEAD_DIM // 2),
    (r"qk_head_dim", 2 * _HEAD_DIM),
    (r"index_head_dim", 2 * _HEAD_DIM),
    (r"rope_head_dim|qk_(rope|nope)_head_dim|v_head_dim", _HEAD_DIM),
    (r".*lora_rank|adapter_rank", 32),
    (r"(.*_)?(n_groups|ngroups|n_group|num_expert_group|topk_group|num_nextn_predict_layers)", 1),
    (r"(.*_)?((num_)?(key_value|kv)_heads|n_head_kv|num_kv)(_.*)?|num_query_groups", 2),
    (r"(num|n)_?shared_experts|.*num_shared_experts", 1),
    (r"(.*_)?(num_experts_per_tok(en)?|moe_topk|top_?k|topk_experts|num_selected_experts|moe_k|experts_top_k)", 2),
    (r"(.*_)?((num|n)_((routed|local|moe)_)?experts|zero_expert_num)", 4),
    (r"(.*_)?((attention|num|n|mamba)_heads?|num_attention_heads_per_layer)", _HEADS),
    (r"(.*_)?(head_dim|headdim|d_head|head_size|attention_head_size|d_kv|kv_channels)", _HEAD_DIM),
    (r"(.*_)?(d_state|state_size|ssm_state_size|d_rel)", 16),
    (r"(mamba_)?expand", 1),
    (r".*(interval|period|frequency|pattern|every_n_layers|layer_freq|sparse_step)", 2),
    (r".*_offset|first_k_dense_replace|num_dense_layers|moe_layer_start_index|.*_start_layer", 1),
    (r"num_kv_shared_layers|max_window_layers", 2),
]
_SIZE = re.compile(
    r".*(_size|_sizes|_dim|_dims|_width|_rank|_channels|dim|_channel|d_ssm)(_.*)?"
    r"|d_(model|ff|inner|embed)|n_(embd|inner|embed)"
)
_LAYERS = re.compile(r"(.*_)?(num_hidden_layers|n_layers?|num_layers|layers|depth|num_blocks)")
_TOKEN = re.compile(
    r"(.*_)?token_(id|index|ids)(_.*)?|(im_(start|end|newline)|codec_.*|image_patch|lang|mask)_(id|index)"
)

# Optional fields that the default configuration leaves empty although the layers need them.
_WHEN_MISSING = {
    "head_dim": _HEAD_DIM,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": _HIDDEN,
    "image_token_id": _FIRST_SPECIAL_TOKEN,
    "video_token_index": _FIRST_SPECIAL_TOKEN + 1,
    "video_token_id": _FIRST_SPECIAL_TOKEN + 1,
    "image_token_index": _FIRST_SPECIAL_TOKEN,
}

# Fields that the rules above get wrong, by the model type of the (sub-)config that holds them,
# or by its class where it has none.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Attention, or its rotary embedding, exists in these only when asked for.
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "rope"},
    # Layers of two sorts, of which the defaults show only one or size only one.
    "diffusion_gemma_text": {"global_head_dim": 2 * _HEAD_DIM},
    "gemma4_text": {"global_head_dim": 2 * _HEAD_DIM},
    "gemma4_unified_text": {"global_head_dim": 2 * _HEAD_DIM},
    "granite_swa": {"layer_rope_theta": [10000.0, 1000000.0] * 2},
    "granitemoe_swa": {"layer_rope_theta": [10000.0, 1000000.0] * 2},
    # Fields without a default that works: the rest of this table, but for the comments in between.
    "chameleon": {"vocabulary_map": {"<image>": _FIRST_SPECIAL_TOKEN}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
        }
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    # The sliding layers have a set of sizes of their own, which the class takes only under these names.
    "dots3_note_text": {
        "swa_num_attention_heads": _HEADS,
        "swa_num_key_value_heads": _HEADS,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 2 * _HEAD_DIM,
        "swa_qk_nope_head_dim": _HEAD_DIM,
        "swa_v_head_dim": _HEAD_DIM,
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": _HIDDEN // 4},
    "glm5_next_text": {"num_key_value_heads": _HEADS},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "4/8"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mimi": {"upsample_groups": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": _HEAD_DIM,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [_HIDDEN // 2, _HIDDEN // 2]},
    "step3p5": {"sliding_window": 64},
    "xmod": {"default_language": "en_XX"},
    # The attention of these reads the hidden state and the embedding side by side.
    "zamba": {"attention_hidden_size": 2 * _HIDDEN, "attention_head_dim": 2 * _HEAD_DIM},
    "zamba2": {"use_mem_rope": True, "attention_hidden_size": 2 * _HIDDEN, "attention_head_dim": 2 * _HEAD_DIM},
}


# Families whose forward pass is not that of a language model.
_NO_LANGUAGE_MODEL = {
    "gemma4_assistant": "a drafting head that reads the keys and values of another model",
    "gemma4_unified_assistant": "a drafting head that reads the keys and values of another model",
    "pi0": "a robot policy: its forward pass denoises actions and returns no logits",
}


def model_types() -> dict[str, str]:
    """Returns every decoder family of the installed transformers with its kind, a value of `_TABLES`."""
    kinds: dict[str, str] = {}
    for table, kind in _TABLES.items():
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}):
            kinds.setdefault(model_type, kind)
    return dict(sorted(kinds.items()))


def build_tiny(model_type: str) -> PreTrainedModel:
    """Builds a family's model with random weights, the same at each call.

    Args:
        model_type: A key of `model_types()`.

    Raises:
        UnsupportedModelError: With the reason.
    """
    if model_type in _NO_LANGUAGE_MODEL:
        raise UnsupportedModelError(_NO_LANGUAGE_MODEL[model_type])
    with _quiet():
        try:
            model_class = _model_class(model_type)
            config = CONFIG_MAPPING[model_type]()
            if model_class.forward is torch.nn.Module.forward:
                # A thinking part bundled with a speaking one, and no forward pass through both.
                config = config.thinker_config
                model_class = _model_class(config.model_type)
            config = _matching_config(_shrink(config), model_class)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = model_class._from_config(config, dtype=torch.float32)
                _fill_empty_parameters(model)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a family's code raises, it is this family that is left out
            reason = " ".join(str(error).split()) or "no message"
            raise UnsupportedModelError(f"{type(error).__name__}: {reason[:300]}") from error
    return model.eval()


def tiny_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the keyword arguments for one text-only forward pass of a model of `build_tiny`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_FIRST_WORD, _FIRST_SPECIAL_TOKEN, (1, _SEQUENCE), generator=generator)
    config = model.config
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    parameters = inspect.signature(model.forward).parameters
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
        if config.model_type == "dia":  # a token for each channel
            channels = config.decoder_config.num_channels
            inputs["decoder_input_ids"] = inputs["decoder_input_ids"][..., None].expand(-1, -1, channels)
        if model.main_input_name != "input_ids":  # the encoder reads images: hand over what it would have made of one
            del inputs["input_ids"]
            inputs["encoder_outputs"] = BaseModelOutput(torch.randn(1, 4, _HIDDEN, generator=generator))
    codebooks = getattr(config, "num_codebooks", None)
    if "musicgen" in config.model_type:
        inputs["input_ids"] = ids.expand(codebooks, -1)
    elif codebooks and hasattr(config, "codebook_vocab_size"):
        inputs["input_ids"] = ids[..., None].expand(-1, -1, codebooks + 1)
    if "encoder_inputs_embeds" in parameters:  # speech that has as many frames as there are tokens
        audio = config.audio_config
        frames = _SEQUENCE * config.downsample_factor
        inputs["encoder_inputs_embeds"] = torch.randn(1, frames, audio.hidden_size, generator=generator)
    if "perceiver_embeddings" in parameters:
        shape = (1, 1, 4, config.vision_config.embed_dim)
        inputs["image_encoder_embeddings"] = torch.randn(shape, generator=generator)
        inputs["image_attention_mask"] = torch.ones(1, _SEQUENCE, 1, dtype=torch.long)
    if "image_embeds_position_mask" in parameters and "image_embeds" in parameters:
        inputs["image_embeds"] = torch.randn(1, 4, _HIDDEN, generator=generator)
        inputs["image_embeds_position_mask"] = (torch.arange(_SEQUENCE)[None] < 4).long()
    if "bbox" in parameters:
        inputs["bbox"] = torch.zeros(1, _SEQUENCE, 4)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in inputs and "kwargs" not in name:
            if name == "pixel_values":
                size = config.vision_config.image_size
                frames = (1,) if "video" in config.model_type else ()
                inputs[name] = torch.randn(1, *frames, 3, size, size, generator=generator)
            elif name == "qformer_input_ids":
                inputs[name] = ids
    return inputs


def _model_class(model_type: str) -> type[PreTrainedModel]:
    for table in _TABLES:
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).get(model_type)
        if names:
            name = names if isinstance(names, str) else names[0]
            return getattr(transformers, name)
    raise UnsupportedModelError(f"transformers has no decoder family {model_type!r}")


def _matching_config(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """Returns the part of a composite configuration that the class takes: `CAUSAL_LM` classes want the text part."""
    if isinstance(config, model_class.config_class):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
    return parts[0] if parts else config


def _shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns a new config of the same class with every size replaced by a small one."""
    return type(config)(**_small_fields(config))


def _small_fields(config: PreTrainedConfig, side: bool = False) -> dict[str, Any]:
    """Returns the arguments that make a small config of the same class.

    Sub-configs are dicts of their own arguments, as in a `config.json`: not every class takes them as objects.
    """
    tiny_depth = _SIDE_LAYERS if side else NUM_LAYERS
    depth = getattr(config, "num_hidden_layers", None)
    special = iter(range(_FIRST_SPECIAL_TOKEN, _VOCAB))
    # Only what differs from the defaults of the class is passed on, so that derived fields are derived anew.
    defaults = vars(type(config)())
    changed: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("id2label", "label2id", "transformers_version"):
            continue
        new = value
        if isinstance(value, PreTrainedConfig):
            new = _small_fields(value, side or bool(_SIDE_CONFIG.search(name)))
            if value.model_type:
                new["model_type"] = value.model_type
        elif isinstance(value, list | tuple):
            new = _shrink_list(name, value, depth, tiny_depth, special)
        elif isinstance(value, int) and not isinstance(value, bool):
            new = _shrink_number(name, value, side, special)
        elif value is None and not side:
            new = _WHEN_MISSING.get(name)
        elif name in ("initializer_range", "init_std"):
            new = 0.2
        elif name in ("partial_rotary_factor", "rotary_pct") and value:
            new = max(value, _PARTIAL)
        if isinstance(value, PreTrainedConfig) or new != defaults.get(name):
            changed[name] = new
    if getattr(config, "qk_rope_head_dim", None) and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = _HEADS  # latent attention has no grouped heads
        if getattr(config, "head_dim", 0) == getattr(config, "qk_head_dim", None):
            changed["head_dim"] = changed["qk_head_dim"]
    if isinstance(getattr(config, "rope_parameters", None), dict):
        changed["rope_parameters"] = _shrink_rope(config.rope_parameters, _uses_sections(config))
    if config.model_type and not hasattr(config, "pad_token_id"):
        changed["pad_token_id"] = None  # transformers 5.0 has models that read it where their config may lack it
    return changed | _EXCEPTIONS.get(config.model_type or type(config).__name__, {})


def _shrink_number(name: str, value: int, side: bool, special: Iterator[int]) -> int:
    if _TOKEN.fullmatch(name):
        if value < _FIRST_WORD:
            return value
        ordinary = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return ordinary[name] if name in ordinary else next(special)
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            return value if small is None else min(value, small)
    if _LAYERS.fullmatch(name):
        return _SIDE_LAYERS if side or "encoder" in name or "depth" in name else NUM_LAYERS
    if _SIZE.fullmatch(name):
        return min(value, _HIDDEN)
    return value


def _shrink_list(name: str, value: Any, depth: int | None, tiny_depth: int, special: Iterator[int]) -> Any:
    if not value or isinstance(value[0], list | tuple | dict):
        return value
    if len(value) == depth:
        distinct = list(dict.fromkeys(value))
        value = type(value)(distinct[i % len(distinct)] for i in range(tiny_depth))
    elif re.fullmatch(r".*(layers|indexes|indices|layer_ids|idxs|layers_indices)", name):
        return type(value)(range(1, tiny_depth, 2))
    elif name == "depths":
        return type(value)(1 for _ in value)
    if all(isinstance(v, int) and not isinstance(v, bool) for v in value) and not _LAYERS.fullmatch(name):
        return type(value)(_shrink_number(name, v, False, special) for v in value)
    return value


def _uses_sections(config: PreTrainedConfig) -> bool:
    """Whether the family's rotary embedding splits its pairs into time, height and width.

    The default of the split is written in the modelling code rather than in the configuration, so it is looked for
    there.
    """
    try:
        modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return False
    return "mrope_section" in inspect.getsource(modeling)


def _shrink_rope(rope: dict[str, Any], sections: bool) -> dict[str, Any]:
    """Makes a `rope_parameters` dict fit heads of `_HEAD_DIM`."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {key: _shrink_rope(value, sections) if isinstance(value, dict) else value for key, value in rope.items()}
    rope = dict(rope)
    factor = rope.get("partial_rotary_factor")
    if factor is not None:
        rope["partial_rotary_factor"] = factor = max(factor, _PARTIAL)
    pairs = int(_HEAD_DIM * (factor or 1.0)) // 2
    if sections:
        third = round(pairs / 3)
        rope["mrope_section"] = [third, third, pairs - 2 * third]
    for name in ("short_factor", "long_factor"):
        if rope.get(name):
            rope[name] = rope[name][:pairs]
    return rope


@torch.no_grad()
def _fill_empty_parameters(model: PreTrainedModel) -> None:
    """Gives random values to parameters that hold no usable number: zeros (closed gates), NaN, uninitialised memory."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (not parameter.isfinite().all() or not parameter.any()):
            parameter.normal_(0.0, 0.2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers: shrunken configs draw many remarks that tell the user nothing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


_SHIFT_TOLERANCE = 1e-3  # of the largest logit; rounding moves them by 1e-6, a wrong rotation by 0.1

SUPPORTED, REFUSED, NOT_BUILT, WRONG = "supported", "refused", "not built", "wrong"


@dataclass(frozen=True)
class Trial:
    """What became of one family."""

    model_type: str
    status: str  # SUPPORTED, REFUSED, NOT_BUILT or WRONG
    reason: str = ""
    unrotated_layers: list[int] = field(default_factory=list)  # of a supported one: layers without a rotation


class _WrongError(LayerRopeError):
    """A check failed: the scaling does not do what it claims."""


def try_family(model_type: str) -> Trial:
    """Builds the family's tiny model and runs the four checks on it. Never raises for a family's sake."""
    try:
        model = build_tiny(model_type)
        inputs = tiny_inputs(model)
    except UnsupportedModelError as error:
        return Trial(model_type, NOT_BUILT, str(error))
    return try_model(model, inputs, model_type)


def try_model(model: nn.Module, inputs: Mapping[str, Any], model_type: str) -> Trial:
    """Runs the four checks on `model`, which is left as it was.

    Args:
        model: a small model in `eval()` mode on the CPU.
        inputs: keyword arguments of a forward pass that returns `logits`.
        model_type: named in the result.
    """
    try:
        stack = find_stack(model)
        try:
            base = _run(model, inputs, stack.layers)
        except Exception as error:  # whatever a family's code raises, nothing is known of it without a forward pass
            return Trial(model_type, NOT_BUILT, f"no forward pass on text alone: {type(error).__name__}: {error}")
        peft_model = get_peft_model(model, LayerRopeConfig())
        try:
            unrotated = _Checks(peft_model, inputs, stack, base).all()
        finally:
            peft_model.unload()
    except UnsupportedModelError as error:
        return Trial(model_type, REFUSED, str(error).split(": ", 1)[-1])
    except _WrongError as error:
        return Trial(model_type, WRONG, str(error))
    if len(unrotated) == len(stack.layers):
        return Trial(model_type, WRONG, "c: no layer's output follows its factor")
    return Trial(model_type, SUPPORTED, unrotated_layers=unrotated)


class _Checks:
    """The four checks on one model with an adapter on it."""

    def __init__(self, peft_model: nn.Module, inputs: Mapping[str, Any], stack: DecoderStack, base: _Run) -> None:
        self.peft_model = peft_model
        self.inputs = inputs
        self.stack = stack
        self.base = base

    def all(self) -> list[int]:
        """Runs them; returns the layers without a rotation."""
        self.ones_change_nothing()
        self.twos_halve_the_frequencies()
        self.only_differences_of_positions_count()
        return [layer for layer in range(len(self.stack.layers)) if not self.layer_responds(layer)]

    def run(self, factors: list[float] | None = None, **inputs: Any) -> _Run:
        """One forward pass, with the factors if given."""
        if factors is not None:
            self.peft_model.base_model.set_layer_factors(factors)
        return _run(self.peft_model.get_base_model(), {**self.inputs, **inputs}, self.stack.layers)

    def factors(self, of_layer: Callable[[int], float]) -> list[float]:
        """A factor for each layer; layers that attend to another's keys get that layer's."""
        return [of_layer(source) for source in self.stack.key_sources]

    def ones_change_nothing(self) -> None:
        """Check a."""
        if not torch.equal(self.run(self.factors(lambda _: 1.0)).logits, self.base.logits):
            raise _WrongError("a: with all factors 1 the logits are not the base model's")

    def twos_halve_the_frequencies(self) -> None:
        """Check b."""
        with self.peft_model.disable_adapter(), _halved(self.stack):
            halved = self.run().logits
        if torch.equal(halved, self.base.logits):
            raise _WrongError("b: halving the model's own inv_freq does not change its logits: nothing can be shown")
        if not torch.equal(self.run(self.factors(lambda _: 2.0)).logits, halved):
            raise _WrongError("b: with all factors 2 the logits are not those of the model with its inv_freq halved")

    def layer_responds(self, layer: int) -> bool:
        """Check c for one layer: whether its output follows its factor (a sharing layer's: that of its source)."""
        base = self.base
        source = self.stack.key_sources[layer]
        run = self.run(self.factors(lambda i: 2.0 if i == source else 1.0))
        early = [i for i in base.layer_inputs if i <= source and _differ(run.layer_inputs, base.layer_inputs, i)]
        early += [i for i in base.layer_outputs if i < source and _differ(run.layer_outputs, base.layer_outputs, i)]
        if early:
            raise _WrongError(f"c: the factor of layer {source} changes hidden states of layers {sorted(set(early))}")
        if layer in base.layer_outputs and _differ(run.layer_outputs, base.layer_outputs, layer):
            return True
        if not torch.equal(run.logits, base.logits):
            raise _WrongError(f"c: the factor of layer {layer} changes the logits but not the layer's output")
        return False

    def only_differences_of_positions_count(self) -> None:
        """Check d, for families whose base model passes it and that take positions."""
        parameters = inspect.signature(self.peft_model.get_base_model().forward).parameters
        name = next((n for n in ("decoder_position_ids", "position_ids") if n in parameters), None)
        if name is None:
            return
        length = self.inputs.get("decoder_input_ids", self.inputs["input_ids"]).shape[1]

        def change_by_shift(factors: list[float]) -> float:
            here, there = (self.run(factors, **{name: torch.arange(length)[None] + shift}).logits for shift in (0, 5))
            return float((here - there).abs().max() / here.abs().max())

        if change_by_shift(self.factors(lambda _: 1.0)) < _SHIFT_TOLERANCE:
            change = change_by_shift(self.factors(lambda i: 1.0 + 0.5 * i))
            if change >= _SHIFT_TOLERANCE:
                raise _WrongError(f"d: with different factors, shifting all positions moves the logits by {change:.0%}")


@contextmanager
def _halved(stack: DecoderStack) -> Iterator[None]:
    """The model's own frequencies, halved in place (exact in floating point)."""
    buffers = {
        id(buffer): buffer  # once each: in some families the original is the same tensor
        for wrapper in stack.wrappers()
        for name in inv_freq_names(wrapper.base_layer)
        for buffer in (getattr(wrapper.base_layer, name), getattr(wrapper.base_layer, f"original_{name}", None))
        if buffer is not None
    }.values()
    for buffer in buffers:
        buffer.mul_(0.5)
    try:
        yield
    finally:
        for buffer in buffers:
            buffer.mul_(2.0)


@dataclass
class _Run:
    """One forward pass: the logits, and each layer's hidden states in and out."""

    logits: torch.Tensor
    layer_inputs: dict[int, torch.Tensor]  # without layers that text alone does not reach (mllama's)
    layer_outputs: dict[int, torch.Tensor]


def _differ(some: dict[int, torch.Tensor], others: dict[int, torch.Tensor], layer: int) -> bool:
    return not torch.equal(some[layer], others[layer])


def _run(model: nn.Module, inputs: Mapping[str, Any], layers: nn.ModuleList) -> _Run:
    run = _Run(torch.empty(0), {}, {})
    handles = []
    for index, layer in enumerate(layers):

        def record(_: nn.Module, args: tuple, kwargs: dict, output: Any, index: int = index) -> None:
            run.layer_inputs[index] = args[0] if args else kwargs["hidden_states"]
            run.layer_outputs[index] = output if isinstance(output, torch.Tensor) else output[0]

        handles.append(layer.register_forward_hook(record, with_kwargs=True))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)  # a family that draws random numbers in its forward pass draws the same ones
            run.logits = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    return run


def main() -> int:
    """Tries families, prints a line for each and their numbers by result; 1 if a scaling is wrong."""
    parser = argparse.ArgumentParser(description="Tries which model families of transformers can be scaled.")
    parser.add_argument("model_types", nargs="*", help="default: all", metavar="MODEL_TYPE")
    kinds = model_types()
    counts: Counter[str] = Counter()
    for name in parser.parse_args().model_types or kinds:
        trial = try_family(name)
        reason = f"layers {trial.unrotated_layers} have no rotation" if trial.unrotated_layers else trial.reason
        print(f"{name} ({kinds.get(name, 'unknown')}): {trial.status}{reason and ': '}{reason}", flush=True)
        counts[trial.status] += 1
    print(f"transformers {transformers.__version__}: {', '.join(f'{n} {status}' for status, n in counts.items())}")
    return 1 if counts[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
