"""The base model as people have it: arguments, GGUF files, a fine-tune under the adapter; each as loaded by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB, build_model, logits
from fakes import LEAST_OPTIONS, LEAST_SEARCH, token_task
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_candidates import trained_lora
from tiny_gguf import write_gguf
from tiny_tokenizer import tiny_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from peft_layerrope import (
    InvalidConfigError,
    LayerRopeConfig,
    LayerRopeError,
    compare,
    load_model,
    parse_baseline,
    search,
)
from peft_layerrope.base_model import (
    ModelSource,
    adapted,
    check_source,
    describe_loading,
    format_model_args,
    load_config,
    load_tokenizer,
    parse_model_args,
)
from peft_layerrope.cli import app
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tasks.kv import KeyValueRetrieval
from peft_layerrope.tuner.artifacts import save_adapter

FACTORS = [1.0, 1.5, 1.2, 2.0]
TASK = ("--task", "kv_retrieval", "--keys", "words", "--num-keys", "5", "--positions", "3", "--length", "300")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with weights and a tokenizer with a chat template."""
    path = tmp_path_factory.mktemp("base")
    build_model("llama", vocab_size=600, max_position_embeddings=512).save_pretrained(path)
    tiny_bpe(chat=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "lora"
    trained_lora(path, AutoModelForCausalLM.from_pretrained(folder))
    return path


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(0, 600, (2, 60), generator=torch.Generator().manual_seed(1))


def run(*arguments: str):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_model_and_its_tokenizer(folder, prompt):
    model, tokenizer = load_model(str(folder), device="cpu")
    assert torch.equal(logits(model, prompt), logits(AutoModelForCausalLM.from_pretrained(folder), prompt))
    assert not model.training
    assert tokenizer("word7 baba")["input_ids"] == AutoTokenizer.from_pretrained(folder)("word7 baba")["input_ids"]
    assert describe_loading(model) == {"dtype": "float32"}
    half, _ = load_model(str(folder), device="cpu", dtype="bfloat16", attn_implementation="eager")
    by_hand = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert torch.equal(logits(half, prompt), logits(by_hand, prompt))
    assert half.config._attn_implementation == "eager"
    assert describe_loading(half) == {"dtype": "bfloat16", "attn_implementation": "eager"}


def test_a_tokenizer_from_elsewhere(folder, tmp_path):
    build_model("llama", vocab_size=600).save_pretrained(tmp_path / "m")
    _, tokenizer = load_model(str(tmp_path / "m"), device="cpu", tokenizer=str(folder))
    assert tokenizer("word7 baba")["input_ids"] == tiny_bpe()("word7 baba")["input_ids"]
    with pytest.raises(LayerRopeError, match="tokenizer"):
        load_model(str(tmp_path / "m"), device="cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_fine_tune_is_the_one_that_peft_loads(family, tmp_path, ids):
    """Merged, and then scaled per layer as a model that has these weights from the start."""
    build_model(family).save_pretrained(tmp_path / "m")
    tiny_bpe().save_pretrained(tmp_path / "m")
    trained_lora(tmp_path / "lora", build_model(family))
    model, _ = load_model(str(tmp_path / "m"), device="cpu", peft=str(tmp_path / "lora"))
    active = PeftModel.from_pretrained(build_model(family), tmp_path / "lora")
    assert not torch.allclose(logits(model, ids), logits(build_model(family), ids), atol=1e-2)
    torch.testing.assert_close(logits(model, ids), logits(active, ids), atol=2e-4, rtol=0)
    merged = active.merge_and_unload()
    assert torch.equal(logits(model, ids), logits(merged, ids))
    config = LayerRopeConfig(layer_factors=FACTORS)
    twin = build_model(family)
    twin.load_state_dict(merged.state_dict())
    with adapted(model, config) as ours, adapted(twin, LayerRopeConfig(layer_factors=FACTORS)) as plain:
        assert torch.equal(logits(ours, ids), logits(plain, ids))


def test_an_adapter_of_another_name_for_its_base_goes_on_without_a_word(recwarn):
    config = LayerRopeConfig(layer_factors=FACTORS, base_model_name_or_path="somebody/base")
    with adapted(build_model("llama"), config) as ours:
        assert ours.peft_config["default"].layer_factors == FACTORS
    assert config.base_model_name_or_path == "somebody/base"
    assert not [one for one in recwarn if "base_model_name_or_path" in str(one.message)]


def test_what_was_loaded_is_known_by_its_content(folder, lora, tmp_path):
    model, _ = load_model(str(folder), device="cpu", peft=str(lora))
    known = describe_loading(model)["peft"]
    assert (known["kind"], known["name"], known["merged"]) == ("LORA", "lora", True)
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    for file in lora.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    same = describe_loading(load_model(str(folder), device="cpu", peft=str(elsewhere))[0])["peft"]
    assert {**same, "name": "lora"} == known
    weights = load_file(elsewhere / "adapter_model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, elsewhere / "adapter_model.safetensors")
    other = describe_loading(load_model(str(folder), device="cpu", peft=str(elsewhere))[0])["peft"]
    assert (other["config"] == known["config"], other["weights"] == known["weights"]) == (True, False)


def _other_bases(path: Path) -> dict[str, Path]:
    """Fine-tunes that do not belong to the tiny Llama, by what is the matter."""
    makers = {
        "fewer layers": lambda: trained_lora(path / "fewer layers", build_model("llama", num_hidden_layers=2)),
        "more layers": lambda: trained_lora(path / "more layers", build_model("llama", num_hidden_layers=6)),
        "wider": lambda: trained_lora(path / "wider", build_model("llama", hidden_size=96)),
        "other modules": lambda: get_peft_model(
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=VOCAB)),
            LoraConfig(target_modules=["c_attn"]),
        ).save_pretrained(str(path / "other modules")),
        "virtual tokens": lambda: get_peft_model(
            build_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ).save_pretrained(str(path / "virtual tokens")),
        "layer rope": lambda: _saved(path / "layer rope"),
        "no adapter": lambda: (path / "no adapter").mkdir(),
        "nowhere": lambda: None,
        "pickle": lambda: _pickled(path / "pickle"),
    }
    for make in makers.values():
        make()
    return {name: path / name for name in makers}


def _saved(path: Path) -> None:
    path.mkdir()
    save_adapter(LayerRopeConfig(layer_factors=FACTORS), path)


def _pickled(path: Path) -> None:
    trained_lora(path, build_model("llama"))
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()


@pytest.fixture(scope="module")
def other_bases(tmp_path_factory) -> dict[str, Path]:
    return _other_bases(tmp_path_factory.mktemp("others"))


KINDS = ["fewer layers", "more layers", "wider", "other modules", "virtual tokens", "layer rope"]
KINDS += ["no adapter", "nowhere", "pickle"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fine_tune_of_another_base_is_refused(kind, other_bases, folder, tmp_path):
    done = run(
        *("evaluate", str(folder), "--model-args", f"peft={other_bases[kind]}", *TASK),
        *("--groups", "2", "--teacher-forced", "--device", "cpu", "--output", str(tmp_path / "out")),
    )
    assert done.exit_code in (1, 2)
    assert done.stderr.count("\n") == 1, done.stderr
    assert kind in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("attn_implmentation=eager", "attn_implementation"),
        ("load_in_4_bit=true", "load_in_4bit"),
        ("peft", "key=value"),
        ("peft=", "key=value"),
        ("revision=a,revision=b", "twice"),
        ("load_in_4bit=true,load_in_8bit=true", "contradict"),
        ("load_in_4bit=yes", "load_in_4bit"),
        ("device_map=cpu", "device"),
        ("dtype=float64", "contradicts"),
        ("dtype=float23", "contradicts"),
        ("pretrained=somewhere", "contradicts"),
        ("bnb_4bit_quant_type=nf4", "load_in_4bit"),
        ("gguf_file=x.gguf", "x.gguf"),
        ("tokenizer=./nowhere", "nowhere"),
        ("subfolder=none", "none"),
        ("attn_implementation=none_such", "none_such"),
    ],
)
def test_arguments_that_cannot_work_are_one_line(arguments, words, folder, tmp_path):
    options = ("--device", "cpu", "--dtype", "float32", "--model-args", arguments, *TASK)
    few = ("--groups", "2", "--teacher-forced", "--output", str(tmp_path / "out"))
    done = run("evaluate", str(folder), *options, *few)
    assert done.exit_code in (1, 2)
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind", ["./nope", "adapter", "no tokenizer", "empty", "file", "not.gguf", "cut.gguf", "no.gguf"]
)
def test_what_is_no_model_is_told_in_one_line(kind, folder, lora, tmp_path):
    name = tmp_path / kind
    if kind == "adapter":
        name = lora
    elif kind == "no tokenizer":
        build_model("llama").save_pretrained(name)
    elif kind == "empty":
        name.mkdir()
    elif kind != "no.gguf" and kind != "./nope":
        name.write_bytes({"file": b"x", "not.gguf": b"hello", "cut.gguf": b"GGUF\x03\0\0\0"}[kind])
    given = kind if kind == "./nope" else str(name)
    done = run("search", given, "--length", "300", "--output", str(tmp_path / "out"))
    assert done.exit_code in (1, 2)
    assert done.stderr.count("\n") == 1, done.stderr
    assert given in done.stderr
    assert not done.stderr.rstrip().endswith(":")
    assert not (tmp_path / "out").exists()


def test_arguments_as_lm_eval_spells_them():
    text = "pretrained=some/model,load_in_4bit=True,revision=123,trust_remote_code=false,peft=a=b,,dtype=bfloat16"
    found = parse_model_args(text)
    assert found == {
        "model": "some/model",
        "load_in_4bit": True,
        "revision": "123",
        "trust_remote_code": False,
        "peft": "a=b",
        "dtype": "bfloat16",
    }
    source = ModelSource(**found)
    assert ModelSource("some/model", **parse_model_args(format_model_args(source))) == source
    assert format_model_args(ModelSource("x", device="cpu")) is None
    with pytest.raises(InvalidConfigError, match="did you mean device_map"):
        ModelSource(device_mop="auto")


CODE = "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    raise RuntimeError('this code ran')\n"


def test_code_of_a_model_runs_only_when_that_is_typed(folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in folder.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(CODE)
    for source in (ModelSource(str(base)), ModelSource(str(base), trust_remote_code=False)):
        with pytest.raises(LayerRopeError) as caught:
            load_config(source)
        assert "this code ran" not in str(caught.value)
    with pytest.raises(LayerRopeError, match="this code ran"):
        load_config(ModelSource(str(base), trust_remote_code=True))
    asked = tmp_path / "search.yaml"
    asked.write_text(f"model: {base}\ntrust_remote_code: true\n")
    done = run("search", "--config", str(asked), "--output", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "trust_remote_code" in done.stderr
    assert "this code ran" not in done.stderr
    done = run(
        *("search", "--config", str(asked), "--model-args", "trust_remote_code=true"), "--output", str(tmp_path / "out")
    )
    assert "this code ran" in done.stderr
    assert not (tmp_path / "out").exists()


FEW = (*LEAST_OPTIONS, "--max-new-tokens", "8")


def test_evaluate_and_search_on_a_fine_tune(folder, lora, tmp_path):
    """From the command line as with the model that PEFT merged, and repeated by the file that the search wrote."""
    own = ("--device", "cpu", "--model-args", f"peft={lora}")
    done = run("evaluate", str(folder), *own, *TASK, "--groups", "3", "--teacher-forced", "--json", str(tmp_path / "e"))
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "e").read_text())
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), lora).merge_and_unload().eval()
    task = KeyValueRetrieval(tiny_bpe(chat=True), keys="words", num_keys=5, num_positions=3, length=300)
    expected = Scorer(tuned).score(task.split("test", 3)).log_prob_by_position
    found = report["scores"]["no scaling"]["log_prob_by_position"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert report["base"]["peft"]["name"] == "lora"
    assert str(tmp_path) not in (tmp_path / "e").read_text()

    first, second = tmp_path / "first", tmp_path / "second"
    done = run("search", str(folder), *own, *TASK, *FEW, "--output", str(first))
    assert done.exit_code == 0, done.stderr
    by_hand = search(
        tuned,
        KeyValueRetrieval(tiny_bpe(chat=True), keys="words", num_keys=5, num_positions=3, length=300, max_new_tokens=8),
        **{**LEAST_SEARCH, "anyway": True, "preflight_groups": 2},
        progress=False,
    )
    saved = json.loads((first / "search.json").read_text())
    assert saved["layer_factors"] == by_hand.config.layer_factors
    assert saved["table"] == by_hand.to_dict()["table"]
    assert saved["base"]["peft"] == report["base"]["peft"]
    card = (first / "README.md").read_text()
    assert report["base"]["peft"]["weights"][:16] in card
    assert "load_model(" in card
    assert run("search", "--config", str(first / "search.yaml"), "--output", str(second)).exit_code == 0
    assert (first / "search.json").read_bytes() == (second / "search.json").read_bytes()
    (first / "search.json").unlink()
    assert run("search", "--output", str(first), "--resume").exit_code == 0
    assert (first / "search.json").read_bytes() == (second / "search.json").read_bytes()
    weights = load_file(lora / "adapter_model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, other / "adapter_model.safetensors")
    done = run("search", "--output", str(first), "--resume", "--model-args", f"peft={other}")
    assert done.exit_code == 2
    assert "of another run" in done.stderr


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A tiny Qwen2 in a GGUF file, written without transformers; with its twin, of the same weights, in `model`."""
    pytest.importorskip("accelerate")
    tokenizer = tiny_bpe(chat=True)
    model = build_model("qwen2", vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=False)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    model.save_pretrained(path.parent / "twin")
    tokenizer.save_pretrained(path.parent / "twin")
    return path


def test_a_gguf_file_is_the_model_whose_weights_it_has(gguf_file, prompt):
    twin = AutoModelForCausalLM.from_pretrained(gguf_file.parent / "twin")
    prompt = prompt % twin.config.vocab_size
    ways = [{"model": str(gguf_file)}, {"model": str(gguf_file.parent), "gguf_file": gguf_file.name}]
    for way in ways:
        source = ModelSource(**way, device="cpu")
        check_source(source)
        assert load_config(source).max_position_embeddings == 512
        model, tokenizer = load_model(**way, device="cpu", dtype="float32")
        torch.testing.assert_close(logits(model, prompt), logits(twin, prompt), atol=1e-5, rtol=0)
        assert tokenizer.chat_template == tiny_bpe(chat=True).chat_template
        assert load_tokenizer(source).chat_template
        assert describe_loading(model) == {"dtype": "float32", "gguf_file": "tiny.gguf"}
    with pytest.raises(InvalidConfigError, match="GGUF"):
        ModelSource(str(gguf_file), load_in_4bit=True)


def test_evaluate_on_a_gguf_file(gguf_file, tmp_path):
    own = ("--tokenizer", str(gguf_file.parent / "twin"), "--device", "cpu", "--dtype", "float32")
    scores = []
    for name in (str(gguf_file), str(gguf_file.parent / "twin")):
        done = run("evaluate", name, *own, *TASK, "--groups", "3", "--teacher-forced", "--json", str(tmp_path / "e"))
        assert done.exit_code == 0, done.stderr
        scores.append(json.loads((tmp_path / "e").read_text())["scores"]["no scaling"]["log_prob_by_position"])
    np.testing.assert_allclose(*scores, atol=1e-4)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_with_a_fine_tune_beside_them(bits, prompt, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder, lora = tmp_path / "base", tmp_path / "lora"
    # four bits go by blocks of 64
    base = build_model("qwen2", vocab_size=600, max_position_embeddings=512, intermediate_size=128).bfloat16()
    base.save_pretrained(folder)
    tiny_bpe(chat=True).save_pretrained(folder)
    trained_lora(lora, base)
    quantized = BitsAndBytesConfig(**{bits: True})
    by_hand = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, device_map="cpu").eval()
    asked = {name: (type(w), w.requires_grad, w.is_inference()) for name, w in by_hand.named_parameters()}
    # while it runs for the first time, bitsandbytes replaces parameters: a comparison leaves ones that can be trained
    compare(by_hand, token_task().split("test", 2), [parse_baseline("none"), parse_baseline("uniform:1.5")])
    assert {name: (type(w), w.requires_grad, w.is_inference()) for name, w in by_hand.named_parameters()} == asked
    model, _ = load_model(str(folder), device="cpu", **{bits: True})
    assert torch.equal(logits(model, prompt), logits(by_hand, prompt))
    tuned, _ = load_model(str(folder), device="cpu", peft=str(lora), **{bits: True})
    again = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, device_map="cpu").eval()
    assert torch.equal(logits(tuned, prompt), logits(PeftModel.from_pretrained(again, lora), prompt))
    assert describe_loading(tuned)["peft"]["merged"] is False
    assert describe_loading(tuned)[bits] is True
    before = logits(tuned, prompt)
    with adapted(tuned, LayerRopeConfig(layer_factors=FACTORS)) as scaled:
        assert not torch.equal(logits(scaled, prompt), before)
    assert torch.equal(logits(tuned, prompt), before)
    own = ("--device", "cpu", "--model-args", f"{bits}=true,peft={lora}")
    done = run("search", str(folder), *own, *TASK, *FEW, "--output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr


def test_quantising_needs_its_package(folder, monkeypatch):
    monkeypatch.setattr("peft_layerrope.base_model.find_spec", lambda name: None)
    with pytest.raises(InvalidConfigError, match="pip install bitsandbytes"):
        check_source(ModelSource(str(folder), load_in_8bit=True))
