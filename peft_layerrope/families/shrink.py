"""Tiny randomly initialised models for every decoder family of the installed transformers.

A family's default configuration is walked recursively and every number in it is replaced by a small one.
What a number means is read off its name (`*_token_id`, `num_*_layers`, `*_dim`, ...), because transformers
spells the same few ideas the same few ways in nearly every family; `_EXCEPTIONS` holds the ones it does not.
"""

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ..errors import LayerRopeError

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


class FamilyNotBuilt(LayerRopeError):  # noqa: N818
    """No tiny model of this family can be built here; the message is the reason in one line."""


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
        FamilyNotBuilt: With the reason.
    """
    if model_type in _NO_LANGUAGE_MODEL:
        raise FamilyNotBuilt(_NO_LANGUAGE_MODEL[model_type])
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
        except FamilyNotBuilt:
            raise
        except Exception as error:  # whatever a family's code raises, it is this family that is left out
            reason = " ".join(str(error).split()) or "no message"
            raise FamilyNotBuilt(f"{type(error).__name__}: {reason[:300]}") from error
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
    raise FamilyNotBuilt(f"transformers has no decoder family {model_type!r}")


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
        modelling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return False
    return "mrope_section" in inspect.getsource(modelling)


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
