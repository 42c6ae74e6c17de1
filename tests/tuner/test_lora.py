"""LoRA and LAYER_ROPE on one model: every path works, or raises and names one that does."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, build_model, logits, needs_adapter_methods
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from reference import hand_patched
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_layerrope import LayerRopeConfig, LayerRopeError, restore_baked, verify
from peft_layerrope.tuner.artifacts import FACTORS_KEY
from peft_layerrope.tuner.rotary import LayerRopeLayer

FACTORS = [1.0, 1.4, 2.0, 1.2]


def rope_config(factors: list[float] | None = None) -> LayerRopeConfig:
    return LayerRopeConfig(layer_factors=factors or FACTORS, task_type="CAUSAL_LM")


def lora_config(**fields: object) -> LoraConfig:
    """Random weights from the start, so that it makes a difference."""
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **fields})


def close(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(actual, wanted, atol=1e-4, rtol=1e-4)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, and `lora` and `rope` as strangers would have published them for it."""
    root = tmp_path_factory.mktemp("published")
    build_model("llama").save_pretrained(root / "base")
    torch.manual_seed(3)
    get_peft_model(load_base(root), lora_config()).save_pretrained(root / "lora")
    get_peft_model(load_base(root), rope_config()).save_pretrained(root / "rope")
    return root


def load_base(root: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(root / "base").eval()


@pytest.fixture(scope="module")
def wanted(published: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits of the base, of each adapter, and of both: the rotation by hand, LoRA by PEFT on its own."""

    def lora() -> nn.Module:
        return PeftModel.from_pretrained(load_base(published), published / "lora").merge_and_unload()

    return {
        "base": logits(load_base(published), ids),
        "rope": logits(hand_patched(load_base(published), FACTORS), ids),
        "lora": logits(lora(), ids),
        "both": logits(hand_patched(lora(), FACTORS), ids),
    }


def test_the_four_references_differ(wanted):
    names = list(wanted)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert (wanted[first] - wanted[second]).abs().max() > 0.5


class Copies(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(0, VOCAB, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def train(model: nn.Module, folder: Path, **arguments: object) -> Trainer:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            **arguments,
        ),
        train_dataset=Copies(),
    )
    trainer.train()
    return trainer


# 1. Bake, then LoRA


def baked(root: Path) -> nn.Module:
    return PeftModel.from_pretrained(load_base(root), root / "rope").merge_and_unload()


def test_lora_on_a_baked_model(published, wanted, ids):
    model = get_peft_model(baked(published), lora_config(init_lora_weights=True))
    assert close(logits(model, ids), wanted["rope"])  # LoRA starts as the identity
    plain = get_peft_model(load_base(published), lora_config())
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert trainable(model) == {name for name, _ in model.named_parameters() if "lora_" in name}
    with model.disable_adapter():
        assert close(logits(model, ids), wanted["rope"])
    assert close(logits(model.merge_and_unload(), ids), wanted["rope"])


def test_training_on_a_baked_model_with_trainer(published, wanted, ids, tmp_path):
    model = get_peft_model(baked(published), lora_config(init_lora_weights=True))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = train(model, tmp_path / "run")
    trained = logits(model.eval(), ids)
    assert not close(trained, wanted["rope"])
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    with model.disable_adapter():  # the reference model of DPO
        assert close(logits(model, ids), wanted["rope"])
    trainer.save_model(tmp_path / "lora")
    assert tensors_of(tmp_path / "lora").keys() == tensors_of(published / "lora").keys()
    # The file is an ordinary LoRA: it loads on the plain base, and gives the trained model on the scaled one.
    on_base = PeftModel.from_pretrained(load_base(published), tmp_path / "lora")
    assert not close(logits(on_base, ids), trained)
    both = PeftModel.from_pretrained(on_base, published / "rope")
    assert close(logits(both, ids), trained)


def test_training_changes_what_it_would_on_a_model_scaled_by_hand(published, tmp_path):
    weights = []
    for base in (baked(published), hand_patched(load_base(published), FACTORS)):
        torch.manual_seed(0)
        model = get_peft_model(base, lora_config(init_lora_weights=True))
        train(model, tmp_path / "run", seed=0)
        weights.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_B" in n]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_training_over_a_frozen_bfloat16_base_with_checkpointing(use_reentrant, published, ids, tmp_path):
    """What QLoRA does: all of it but the quantisation, for which there is no library here."""
    base = baked(published).to(torch.bfloat16)
    scaled = logits(base, ids)
    base.requires_grad_(False)
    base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    base.enable_input_require_grads()
    model = get_peft_model(base, lora_config(init_lora_weights=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tmp_path)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= trainable(model)
    assert all(
        p.dtype == (torch.float32 if "lora_" in name else torch.bfloat16) for name, p in model.named_parameters()
    )
    with model.disable_adapter():
        assert torch.equal(logits(model.eval(), ids), scaled)


def test_pefts_own_preparation_for_quantised_bases(published, wanted, ids):
    base = baked(published)
    base.is_loaded_in_4bit = True  # as far as PEFT looks
    prepared = prepare_model_for_kbit_training(base)
    assert not trainable(prepared)
    model = get_peft_model(prepared, lora_config(init_lora_weights=True)).train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    with model.disable_adapter():
        assert close(logits(model.eval(), ids), wanted["rope"])


def test_a_trained_and_merged_model_is_restored_from_its_folder(published, ids, tmp_path):
    model = get_peft_model(baked(published), lora_config(init_lora_weights=True))
    train(model, tmp_path / "run")
    trained = logits(model.eval(), ids)
    merged = model.merge_and_unload()
    assert close(logits(merged, ids), trained)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not close(logits(loaded, ids), trained)
    assert close(logits(restore_baked(loaded), ids), trained)


# 2. Inject, then LoRA


@pytest.mark.parametrize("name", ["default", "layer_rope"])
def test_lora_on_an_injected_model(name, published, wanted, ids, tmp_path):
    base = inject_adapter_in_model(rope_config(), load_base(published), name)
    model = PeftModel.from_pretrained(base, published / "lora", is_trainable=True).eval()
    assert close(logits(model, ids), wanted["both"])
    assert trainable(model) == {n for n, _ in model.named_parameters() if "lora_" in n}
    with model.disable_adapter():  # PEFT turns every method's layers off: bake, or keep a LAYER_ROPE PeftModel
        assert torch.equal(logits(model, ids), wanted["base"])
    assert close(logits(model, ids), wanted["both"])
    model.save_pretrained(tmp_path / "saved")
    saved, original = tensors_of(tmp_path / "saved"), tensors_of(published / "lora")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in original)
    if name != "default":  # listed beside the LoRA, it is saved beside it
        assert list(tensors_of(tmp_path / "saved" / name)) == [FACTORS_KEY]
    merged = model.merge_and_unload()
    assert close(logits(merged, ids), wanted["both"])
    merged.save_pretrained(tmp_path / "merged")
    restored = restore_baked(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert close(logits(restored, ids), wanted["both"])


def test_unloading_a_lora_leaves_the_injected_rope(published, wanted, ids):
    base = inject_adapter_in_model(rope_config(), load_base(published), "layer_rope")
    assert close(logits(PeftModel.from_pretrained(base, published / "lora").unload(), ids), wanted["rope"])


# 3. LoRA, then the rope over it


@pytest.fixture
def stacked(published: Path) -> tuple[PeftModel, PeftModel]:
    lora = PeftModel.from_pretrained(load_base(published), published / "lora", is_trainable=True).eval()
    return lora, PeftModel.from_pretrained(lora, published / "rope").eval()


def test_rope_over_lora(stacked, wanted, ids):
    lora, both = stacked
    assert close(logits(both, ids), wanted["both"])
    prompt = {"input_ids": ids[:1], "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(both.generate(**prompt), lora.generate(**prompt))
    twin = copy.deepcopy(both)
    with both.disable_adapter():
        assert close(logits(both, ids), wanted["lora"])
    with lora.disable_adapter():
        assert close(logits(both, ids), wanted["rope"])
    with lora.disable_adapter():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT notices that some layers are off already
            with both.disable_adapter():
                assert torch.equal(logits(both, ids), wanted["base"])
        assert close(logits(both, ids), wanted["rope"])
    assert close(logits(both, ids), wanted["both"])
    assert close(logits(twin, ids), wanted["both"])


def test_rope_over_lora_is_verified(stacked):
    _, both = stacked
    result = verify(both)
    assert [check.expected for check in result.layers] == FACTORS
    assert [check.measured for check in result.layers] == pytest.approx(FACTORS, rel=1e-3)
    with both.disable_adapter():
        assert not verify(both).ok


def test_rope_over_lora_keeps_configurations_and_gradients_apart(stacked, ids):
    lora, both = stacked
    kinds = [{name: c.peft_type.value for name, c in model.peft_config.items()} for model in (lora, both)]
    assert kinds == [{"default": "LORA"}, {"default": "LAYER_ROPE"}]
    own = {name for name, _ in lora.named_parameters() if "lora_" in name}
    assert trainable(lora) == own
    both.add_adapter("second", rope_config([2.0] * 4))
    both.set_adapter("second")
    both.set_requires_grad("default", requires_grad=False)
    both.merge_adapter()
    both.delete_adapter("default")
    assert trainable(lora) == own
    assert list(lora.peft_config) == ["default"]
    assert not any(getattr(module, "merged", False) for module in lora.modules())
    assert lora.get_model_status().active_adapters == "irregular"  # "default" is LoRA's, "second" the rope's


def test_rope_over_lora_saves_each_to_its_own_folder(stacked, published, tmp_path):
    lora, both = stacked
    lora.save_pretrained(tmp_path / "lora")
    both.save_pretrained(tmp_path / "rope")
    for name in ("lora", "rope"):
        saved, original = tensors_of(tmp_path / name), tensors_of(published / name)
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[key], original[key]) for key in original)


@pytest.mark.parametrize("form", ["around the lora", "beside the lora"])
def test_a_lora_cannot_be_trained_where_checkpoints_would_not_hold_it(form, published, ids, tmp_path):
    if form == "around the lora":
        lora = PeftModel.from_pretrained(load_base(published), published / "lora", is_trainable=True)
        both = get_peft_model(lora, rope_config())
    else:
        both = get_peft_model(load_base(published), rope_config())
        lora = PeftModel.from_pretrained(both.get_base_model(), published / "lora", is_trainable=True)
    with pytest.raises(LayerRopeError, match="16 tensors of another adapter"):
        train(both, tmp_path / "outside")
    with pytest.raises(LayerRopeError, match="16 tensors of another adapter"):  # a loop that never says train()
        both.save_pretrained(tmp_path / "outside")
    train(lora, tmp_path / "inside").save_model(tmp_path / "inside")
    saved, before = tensors_of(tmp_path / "inside"), tensors_of(published / "lora")
    assert saved.keys() == before.keys()
    assert not any(torch.equal(saved[key], before[key]) for key in saved)
    with pytest.raises(LayerRopeError):
        both.eval().train()
    both.save_pretrained(tmp_path / "rope")
    assert list(tensors_of(tmp_path / "rope")) == [FACTORS_KEY]


@pytest.mark.parametrize("finish", ["unload", "merge_and_unload"])
def test_taking_the_rope_off_a_lora(stacked, wanted, ids, finish):
    lora, both = stacked
    own = trainable(lora)
    assert getattr(both, finish)() is lora
    assert trainable(lora) == own
    assert close(logits(lora, ids), wanted["lora" if finish == "unload" else "both"])
    rest = lora.merge_and_unload()  # and LoRA can be merged afterwards
    assert close(logits(rest, ids), wanted["lora" if finish == "unload" else "both"])


def test_merging_the_lora_under_the_rope(stacked, wanted, ids, tmp_path):
    lora, both = stacked
    merged = lora.merge_and_unload()
    assert close(logits(merged, ids), wanted["both"])
    assert close(logits(both, ids), wanted["both"])
    merged.save_pretrained(tmp_path / "scaled")  # a plain model by its looks; the factors are not lost
    assert close(logits(restore_baked(AutoModelForCausalLM.from_pretrained(tmp_path / "scaled")), ids), wanted["both"])
    with both.disable_adapter():
        merged.save_pretrained(tmp_path / "plain")
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), ids), wanted["lora"])
    assert both.unload().config.to_dict().get("layer_rope") is None


def test_modules_that_lora_trains_in_full_are_left_alone(ids):
    config = lora_config(modules_to_save=["lm_head"])
    lora = get_peft_model(build_model("llama"), config)
    own = trainable(lora)
    assert any("lm_head" in name for name in own)
    both = get_peft_model(lora, rope_config())
    both.add_adapter("second", rope_config())
    both.set_adapter("second")
    both.delete_adapter("default")
    assert trainable(lora) == own
    before = logits(lora, ids)
    lora.base_model.model.lm_head.modules_to_save["default"].weight.data.zero_()
    assert not torch.equal(logits(lora, ids), before)  # it is still there and active


# 4. LoRA over a rope PeftModel


@pytest.mark.parametrize(
    "attempt",
    [
        lambda model, root: get_peft_model(model, lora_config()),
        lambda model, root: PeftModel.from_pretrained(model, root / "lora"),
        lambda model, root: PeftModel.from_pretrained(model, root / "lora", adapter_name="other", is_trainable=True),
        lambda model, root: inject_adapter_in_model(lora_config(), model),
        lambda model, root: get_peft_model(model, lora_config(), mixed=True),
    ],
    ids=["get_peft_model", "from_pretrained", "named", "inject", "mixed"],
)
def test_lora_over_a_rope_model_is_refused_and_changes_nothing(attempt, published, wanted, ids):
    model = PeftModel.from_pretrained(load_base(published), published / "rope")
    structure = repr(model)
    with pytest.raises(LayerRopeError) as caught:
        attempt(model, published)
    assert str(caught.value) == (
        "a LORA adapter over a LAYER_ROPE PeftModel would have `base_model.model.` twice in its keys, which fit no "
        "plain base model and no published LORA. To train one, bake the factors in first: base = "
        "model.merge_and_unload(), then get_peft_model(base, config). To use a trained one, load it first, and "
        "LAYER_ROPE onto that PeftModel with PeftModel.from_pretrained. To train and switch both, put it onto "
        "model.get_base_model()."
    )
    assert repr(model) == structure
    assert {name: c.peft_type.value for name, c in model.peft_config.items()} == {"default": "LAYER_ROPE"}
    assert close(logits(model, ids), wanted["rope"])


def test_two_peft_models_on_one_base(published, wanted, ids, tmp_path):
    """The path for training with a rope that can still be switched."""
    base = load_base(published)
    rope = PeftModel.from_pretrained(base, published / "rope")
    lora = PeftModel.from_pretrained(rope.get_base_model(), published / "lora", is_trainable=True).eval()
    for model in (rope, lora):
        assert close(logits(model, ids), wanted["both"])
    with lora.disable_adapter():
        assert close(logits(lora, ids), wanted["rope"])
    with rope.disable_adapter():
        assert close(logits(lora, ids), wanted["lora"])
    own = trainable(lora)
    assert own == {name for name, _ in lora.named_parameters() if "lora_" in name}
    lora.save_pretrained(tmp_path)
    assert tensors_of(tmp_path).keys() == tensors_of(published / "lora").keys()
    rope.unload()  # which must not thaw the base model under the LoRA
    assert trainable(lora) == own
    assert close(logits(lora, ids), wanted["lora"])
    assert lora.peft_config["default"].peft_type.value == "LORA"


def test_a_rope_that_is_added_by_the_name_of_a_lora_beside_it_leaves_the_lora_its_files(published, tmp_path):
    rope = get_peft_model(load_base(published), rope_config(), adapter_name="first")
    lora = PeftModel.from_pretrained(rope.get_base_model(), published / "lora")
    rope.add_adapter("default", rope_config([2.0] * 4))  # "default" is the LoRA's name as well
    lora.save_pretrained(tmp_path)
    assert tensors_of(tmp_path).keys() == tensors_of(published / "lora").keys()
    rope.delete_adapter("default")
    assert lora.peft_config["default"].peft_type.value == "LORA"


# 5. transformers' own methods


@pytest.mark.parametrize("order", [("rope", "lora"), ("lora", "rope")])
def test_transformers_loads_both(order, published, wanted, ids):
    model = load_base(published)
    for name in order:
        model.load_adapter(str(published / name), adapter_name=name)
    assert {name: c.peft_type.value for name, c in model.peft_config.items()} == {
        "rope": "LAYER_ROPE",
        "lora": "LORA",
    }
    assert close(logits(model, ids), wanted["both"])


@needs_adapter_methods
@pytest.mark.parametrize("order", [("rope", "lora"), ("lora", "rope")])
def test_transformers_switches_and_deletes_both(order, published, wanted, ids):
    model = load_base(published)
    for name in order:
        model.load_adapter(str(published / name), adapter_name=name)
    model.set_adapter("rope")  # LoRA's layers take another name as "none of ours"
    assert close(logits(model, ids), wanted["rope"])
    model.set_adapter("lora")  # while the rope stays as it was
    assert close(logits(model, ids), wanted["both"])
    model.set_adapter(["lora", "rope"])
    assert close(logits(model, ids), wanted["both"])
    model.disable_adapters()
    assert torch.equal(logits(model, ids), wanted["base"])
    model.enable_adapters()
    assert close(logits(model, ids), wanted["both"])
    model.delete_adapter("rope")
    assert list(model.peft_config) == ["lora"]
    assert close(logits(model, ids), wanted["lora"])
    model.load_adapter(str(published / "rope"), adapter_name="again")
    model.delete_adapter("lora")
    assert list(model.peft_config) == ["again"]
    assert close(logits(model, ids), wanted["rope"])


@needs_adapter_methods
@pytest.mark.parametrize("order", [("rope", "lora"), ("lora", "rope")])
def test_transformers_adds_both(order, published, tmp_path):
    configs = {"rope": rope_config(), "lora": lora_config()}
    model = load_base(published)
    for name in order:
        model.add_adapter(configs[name], name)
    assert set(model.peft_config) == {"rope", "lora"}
    for name in order:
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        assert tensors_of(tmp_path / name).keys() == tensors_of(published / name).keys()
    with pytest.raises(ValueError, match="Adapter with name lora already exists"):
        model.add_adapter(rope_config(), "lora")


def test_a_trainable_lora_stays_trainable_when_a_rope_is_added(published):
    model = load_base(published)
    model.load_adapter(str(published / "lora"), adapter_name="lora", is_trainable=True)
    own = trainable(model)
    assert own
    model.load_adapter(str(published / "rope"), adapter_name="rope", is_trainable=True)
    assert trainable(model) == own
    inject_adapter_in_model(rope_config(), model, "third")
    assert trainable(model) == own


def test_a_name_that_lora_has_taken_is_refused(published, wanted, ids):
    model = load_base(published)
    model.load_adapter(str(published / "lora"))
    with pytest.raises(LayerRopeError, match="adapter name 'default' is taken by a LORA adapter of this model: pass"):
        PeftModel.from_pretrained(model, published / "rope")
    both = PeftModel.from_pretrained(model, published / "rope", adapter_name="rope")
    assert close(logits(both, ids), wanted["both"])
    assert list(both.peft_config) == ["rope"]
    assert set(model.peft_config) == {"default", "rope"}
    assert both.unload() is model
    assert set(model.peft_config) == {"default"}
    assert close(logits(model, ids), wanted["lora"])


# 6. What PEFT itself refuses


@pytest.mark.parametrize("kind", ["rope", "lora"])
def test_one_peft_model_holds_one_method(kind, published, wanted, ids):
    model = PeftModel.from_pretrained(load_base(published), published / kind)
    other = "lora" if kind == "rope" else "rope"
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(published / other, "other")
    assert list(model.peft_config) == ["default"]
    assert close(logits(model, ids), wanted[kind])


def test_mixed_models_are_for_other_methods(published, wanted, ids):
    base = load_base(published)
    with pytest.raises(ValueError, match="'LAYER_ROPE' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base, rope_config(), mixed=True)
    with pytest.raises(ValueError, match="LAYER_ROPE is not supported for mixed models"):
        PeftMixedModel.from_pretrained(base, published / "rope")
    assert torch.equal(logits(base, ids), wanted["base"])
    mixed = PeftMixedModel.from_pretrained(base, published / "lora")
    with pytest.raises(ValueError, match="'LAYER_ROPE' is not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("rope", rope_config())
    assert close(logits(mixed.eval(), ids), wanted["lora"])


# 7. Published adapters together, in every way


def _baked_first(root: Path) -> nn.Module:
    return PeftModel.from_pretrained(baked(root), root / "lora")


def _rope_over_lora(root: Path) -> nn.Module:
    return PeftModel.from_pretrained(PeftModel.from_pretrained(load_base(root), root / "lora"), root / "rope")


def _side_by_side(root: Path) -> nn.Module:
    rope = PeftModel.from_pretrained(load_base(root), root / "rope")
    return PeftModel.from_pretrained(rope.get_base_model(), root / "lora")


def _lora_merged_first(root: Path) -> nn.Module:
    merged = PeftModel.from_pretrained(load_base(root), root / "lora").merge_and_unload()
    return PeftModel.from_pretrained(merged, root / "rope")


def _both_merged(root: Path) -> nn.Module:
    return _rope_over_lora(root).merge_and_unload().merge_and_unload()


@pytest.mark.parametrize(
    "path",
    [_baked_first, _rope_over_lora, _side_by_side, _lora_merged_first, _both_merged],
    ids=lambda path: path.__name__,
)
def test_all_paths_give_the_same_logits(path, published, wanted, ids):
    model = path(published)
    assert close(logits(model.eval(), ids), wanted["both"])
    if path is _both_merged:
        assert not any(isinstance(module, LayerRopeLayer) for module in model.modules())
