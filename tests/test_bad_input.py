"""What people get wrong: one plain line each, the right exit status, and nothing left behind."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import peft_layerrope
from peft_layerrope import (
    AdapterMismatchError,
    Candidate,
    Example,
    InvalidConfigError,
    KeyValueRetrieval,
    KeyValueWords,
    LayerRopeConfig,
    LayerRopeError,
    MultiDocumentQA,
    Perplexity,
    RayWorkers,
    SearchError,
    SearchSettings,
    Split,
    TaskError,
    TokenTask,
    UnsupportedModelError,
    best_subspan_em,
    compare,
    evaluate,
    parse_baseline,
    plan_search,
    pull,
    push_to_hub,
    restore_baked,
    search,
    verify,
)
from peft_layerrope.cli import app
from peft_layerrope.tasks.metrics import Judge
from peft_layerrope.tuner.artifacts import save_adapter

USAGE, FAILED = 2, 1
SEARCHED = Path(__file__).parents[1] / "hub_configs" / "demo-plain"
TINY_SEARCH = "--length 128 --num-positions 3 --steps 1 --test-groups 2"
PAIRS = [["a", "one"], ["b", "two"], ["c", "three"]]
RECORD = {"ordered_kv_records": PAIRS, "key": "b", "value": "two"}
DOCUMENTS = [{"title": "T", "text": "It is red.", "isgold": True}, {"title": "U", "text": "No.", "isgold": False}]
QUESTION = {"question": "which colour", "answers": ["red"], "ctxs": DOCUMENTS}


def _lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


DATA_FILES = {
    "empty.jsonl": "",
    "not_json.jsonl": "key: value\n",
    "list.jsonl": _lines([1, 2]),
    "fields.jsonl": _lines({"key": "b"}),
    "few.jsonl": _lines(RECORD),
    "pairs_of_three.jsonl": _lines(RECORD | {"ordered_kv_records": [["a", "b", "c"]]}),
    "one_pair.jsonl": _lines({"ordered_kv_records": [["a", "one"]], "key": "a", "value": "one"}),
    "no_such_key.jsonl": _lines(RECORD | {"key": "z"}),
    "other_value.jsonl": _lines(RECORD | {"value": "three"}),
    "twice.jsonl": _lines(RECORD | {"ordered_kv_records": [*PAIRS, ["b", "four"]]}),
    "ragged.jsonl": _lines(RECORD, RECORD | {"ordered_kv_records": PAIRS[:2]}),
    "kv.jsonl": _lines(*(RECORD | {"ordered_kv_records": [[f"k{i}{j}", f"v{j}"] for j in range(3)],
                                   "key": f"k{i}1", "value": "v1"} for i in range(10))),
    "long.jsonl": _lines(*(RECORD | {"ordered_kv_records": [[f"k{i}{j}", f"v{j}"] for j in range(99)],
                                     "key": f"k{i}1", "value": "v1"} for i in range(10))),
    "qa.jsonl": _lines(*(QUESTION | {"ctxs": [{**DOCUMENTS[0], "title": f"T{i}"}, DOCUMENTS[1]]} for i in range(10))),
    "no_answers.jsonl": _lines(QUESTION | {"answers": []}),
    "answers_text.jsonl": _lines(QUESTION | {"answers": "red"}),
    "no_gold.jsonl": _lines(QUESTION | {"ctxs": DOCUMENTS[1:]}),
    "two_gold.jsonl": _lines(QUESTION | {"ctxs": [DOCUMENTS[0]] * 2}),
    "untitled.jsonl": _lines(QUESTION | {"ctxs": [{"text": "red"}]}),
    "plain.jsonl.gz": _lines(RECORD),
    "texts.jsonl": _lines({"text": 3}),
    "empty.txt": "",
    "blank.txt": " \n\n ",
    "short.txt": "a few words",
    "words.json": '["a", "b"]',
    "object.json": "{",
    "not_numpy.npy": "text",
    "typo.yaml": "search: {populaton: 4}\n",
    "kind.yaml": "search: {batch_tokens: many}\n",
    "list.yaml": "- 1\n",
    "broken.yaml": "a: [1\n",
    "empty.yaml": "",
}  # fmt: skip


@pytest.fixture(scope="session")
def resources(tmp_path_factory, demo_tokenizer) -> Path:
    """Models, adapters and data files, most of them unfit."""
    folder = tmp_path_factory.mktemp("resources")
    for name, content in DATA_FILES.items():
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    zipped = gzip.compress(_lines(*[RECORD] * 50).encode())
    (folder / "cut.jsonl.gz").write_bytes(zipped[: len(zipped) // 2])
    (folder / "flipped.jsonl.gz").write_bytes(zipped[:12] + b"\xff\xff\xff" + zipped[15:])
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    _save(AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=len(demo_tokenizer)), folder / "gpt2")
    build_model("llama", vocab_size=len(demo_tokenizer)).save_pretrained(folder / "no_tokenizer")
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    AutoConfig.for_model("vit", **tiny).save_pretrained(folder / "vit")
    for name in ("gpt2", "vit", "no_weights", "cut_weights", "not_json_config", "unknown_type"):
        demo_tokenizer.save_pretrained(folder / name)
    demo = Path(peft_layerrope.demo_model_path())
    for name in ("no_weights", "cut_weights"):
        shutil.copy(demo / "config.json", folder / name)
    (folder / "cut_weights" / "model.safetensors").write_bytes((demo / "model.safetensors").read_bytes()[:5000])
    (folder / "not_json_config" / "config.json").write_text("{")
    (folder / "unknown_type" / "config.json").write_text('{"model_type": "nonesuch"}')
    save_adapter(LayerRopeConfig(layer_factors=[1.5] * 6), folder / "adapter")
    save_adapter(LayerRopeConfig(layer_factors=[1.5] * 9), folder / "nine_layers")
    for name in ("no_config", "no_tensors", "not_json", "other_method"):
        shutil.copytree(folder / "adapter", folder / name)
    (folder / "no_config" / "adapter_config.json").unlink()
    (folder / "no_tensors" / "adapter_model.safetensors").unlink()
    (folder / "not_json" / "adapter_config.json").write_text("{")
    (folder / "other_method" / "adapter_config.json").write_text('{"peft_type": "NONESUCH"}')
    for name in ("searched", "searched_other", "searched_broken"):
        shutil.copytree(SEARCHED, folder / name, ignore=shutil.ignore_patterns("run"))
        for file in ("search.json", "search.yaml"):
            path = folder / name / file
            path.write_text(path.read_text().replace("kv_retrieval", "kv_words"))
    shutil.copy(folder / "adapter" / "adapter_config.json", folder / "searched_other")
    points = [[0.0, 1.0], [0.3, 1.5], [0.7, 1.2], [1.0, 2.0]]
    save_adapter(LayerRopeConfig(layer_factors=[1.5] * 6), folder / "curve")
    record = json.loads((SEARCHED / "search.json").read_text()) | {"control_points": points}
    record["settings"]["algorithm"] = "paper"
    (folder / "curve" / "search.json").write_text(json.dumps(record))
    (folder / "searched_broken" / "search.json").write_text("{")
    return folder


def _save(config, folder: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


REMARKS = ("prompts of ", "left out ", "trying ", "one layer at a time ")
"""How lines begin that are no errors: what a prompt length means, and progress bars."""
NO_RESULTS = (".lock",)
"""What may stay of a command that failed."""


def check(command: str, status: int, message: str, resources: Path, folder: Path) -> None:
    """Runs a command that cannot work, in an empty folder."""
    before = _stamps(resources)
    arguments = [part.replace("{R}", str(resources)) for part in command.split()]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "300", "TERM": "dumb"})
    said = done.stderr.replace(str(resources) + "/", "")
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == status, said
    assert message in said
    if not said.startswith(("Usage: ", "╭─ Error")):
        errors = [line for line in said.splitlines() if line and not line.startswith(REMARKS)]
        assert len(errors) == 1, said
        assert errors[0].startswith("error: ")
    assert "Traceback" not in said
    assert [name for name in _stamps(folder) if not name.endswith(NO_RESULTS)] == []
    assert _stamps(resources) == before


# Of these, every command with a task takes all.
TASK_OPTIONS = [
    ("--task nonesuch", USAGE, "'nonesuch' is not one of"),
    ("--length 0", USAGE, "--length"),
    ("--length -5", USAGE, "--length"),
    ("--length 3", USAGE, "length=3"),
    ("--length 99999999", USAGE, "--length"),
    ("--length nan", USAGE, "--length"),
    ("--num-positions 0", USAGE, "--num-positions"),
    ("--positions 999", USAGE, "999"),
    ("--task-seed -1", USAGE, "--task-seed"),
    ("--keys words", USAGE, "keys='words' is no setting of kv_words"),
    ("--task kv_retrieval --num-keys 1 --length 512", USAGE, "--num-keys"),
    ("--task kv_retrieval --num-keys 999999999 --length 512", USAGE, "999999999"),
    ("--data {R}/kv.jsonl", USAGE, "is no setting of kv_words"),
    ("--task kv_retrieval --data {R}/nonesuch.jsonl", USAGE, "nonesuch.jsonl cannot be read"),
    ("--task multi_doc_qa", USAGE, "multi_doc_qa needs data"),
    ("--task multi_doc_qa --data {R}/kv.jsonl", USAGE, "line 1: question is missing"),
    ("--chat-template --task kv_retrieval --num-keys 2", USAGE, "chat template"),
    ("--nonesuch", USAGE, "--nonesuch"),
    ("{R}/nowhere", FAILED, "nowhere': there is no such folder"),
]
TASK_COMMANDS = (
    "search --output out",
    "evaluate",
    "sensitivity",
    "prompts",
    "experiment u-shape --output out",
)
MODELS = [
    ("{R}/vit --task kv_words --length 128", FAILED, "vit"),
    ("{R}/no_weights --task kv_words", FAILED, "no_weights"),
    ("{R}/cut_weights --task kv_words", FAILED, "cut_weights"),
    ("{R}/not_json_config --task kv_words", FAILED, "not_json_config"),
    ("{R}/unknown_type --task kv_words", FAILED, "unknown_type"),
    # an older transformers makes an empty tokenizer where there is none
    ("{R}/no_tokenizer --task kv_words", FAILED, "no_tokenizer"),
    ("{R}/full --task kv_words", FAILED, "full"),
    ("{R}/file --task kv_words", FAILED, "file"),
    ("nobody/nonesuch --task kv_words", FAILED, "nobody/nonesuch"),
    ("--device nonesuch", USAGE, "nonesuch"),
    ("--device cuda:99", USAGE, "cuda:99"),
    ("--dtype nonesuch", USAGE, "nonesuch"),
    ("--dtype int64", USAGE, "int64"),
    ("--batch-tokens 0", USAGE, "--batch-tokens"),
    ("--batch-tokens -1", USAGE, "--batch-tokens"),
    ("--batch-tokens nan", USAGE, "--batch-tokens"),
]
MODEL_COMMANDS = (
    f"search --output out {TINY_SEARCH}",
    "evaluate --groups 2",
    "sensitivity --groups 2",
    "experiment sweep --groups 2 --output out",
)
DATA = [
    ("kv_retrieval", "empty.jsonl", "empty.jsonl is empty, expected one JSON object a line"),
    ("kv_retrieval", "not_json.jsonl", "not_json.jsonl, line 1: Invalid JSON"),
    ("kv_retrieval", "list.jsonl", "line 1: Input should be an object"),
    ("kv_retrieval", "fields.jsonl", "line 1: ordered_kv_records is missing"),
    ("kv_retrieval", "few.jsonl", "too few"),
    ("kv_retrieval", "pairs_of_three.jsonl", "line 1: ordered_kv_records"),
    ("kv_retrieval", "one_pair.jsonl", "at least 2 items"),
    ("kv_retrieval", "no_such_key.jsonl", "hold key='z'"),
    ("kv_retrieval", "other_value.jsonl", "with value='three'"),
    ("kv_retrieval", "twice.jsonl", "must have distinct keys"),
    ("kv_retrieval", "ragged.jsonl", "line 2: a context of 2 items, expected 3"),
    ("kv_retrieval", "qa.jsonl", "ordered_kv_records is missing"),
    ("kv_retrieval", "kv.jsonl --positions 4", "4"),
    ("kv_retrieval", "kv.jsonl --num-keys 4", "num_keys=4"),
    ("kv_retrieval", "kv.jsonl --keys words", "keys='words'"),
    ("kv_retrieval", "long.jsonl --length 512", "512"),
    ("kv_retrieval", "plain.jsonl.gz", "plain.jsonl.gz cannot be read: Not a gzipped file"),
    ("kv_retrieval", "cut.jsonl.gz", "cut.jsonl.gz cannot be read"),
    ("kv_retrieval", "flipped.jsonl.gz", "flipped.jsonl.gz cannot be read"),
    ("kv_retrieval", "full", "full cannot be read: Is a directory"),
    ("kv_retrieval", "latin.txt", "latin.txt, line 1: Invalid JSON"),
    ("multi_doc_qa", "empty.jsonl", "empty.jsonl is empty"),
    ("multi_doc_qa", "no_answers.jsonl", "line 1: answers"),
    ("multi_doc_qa", "answers_text.jsonl", "answers='red' must be"),
    ("multi_doc_qa", "no_gold.jsonl", "0 of its 1 documents are gold"),
    ("multi_doc_qa", "two_gold.jsonl", "2 of its 2 documents are gold"),
    ("multi_doc_qa", "untitled.jsonl", "ctxs[0].title is missing"),
    ("multi_doc_qa", "qa.jsonl --num-documents 5", "num_documents=5"),
    ("multi_doc_qa", "qa.jsonl --num-documents 0", "--num-documents"),
    ("perplexity", "nonesuch.txt", "nonesuch.txt cannot be read"),
    ("perplexity", "empty.txt", "empty.txt must hold text"),
    ("perplexity", "blank.txt", "blank.txt must hold text"),
    ("perplexity", "short.txt", "hold 0 windows of 512"),
    ("perplexity", "latin.txt", "latin.txt cannot be read as UTF-8 text"),
    ("perplexity", "texts.jsonl", "line 1: text=3 must be a valid string"),
    ("perplexity", "kv.jsonl", "line 1: text is missing"),
    ("perplexity", "words.json", "must hold a flat list of token ids"),
    ("perplexity", "object.json", "object.json cannot be read as a JSON list of token ids"),
    ("perplexity", "not_numpy.npy", "not_numpy.npy cannot be read as a NumPy array of token ids"),
    ("perplexity", "short.txt --stride 0", "--stride"),
    ("perplexity", "short.txt --stride 9999", "stride=9999"),
    ("perplexity", "short.txt --length 1", "length=1 must be at least 2"),
    ("perplexity", "short.txt --positions 3", "num_positions=3 is no setting of perplexity"),
]  # fmt: skip
SEARCH = [
    *((f"--{name} {value}", USAGE, name.rpartition("-")[2]) for value in ("nan", "inf") for name in (
        "min-factor", "max-factor", "step", "max-harm", "minutes", "test-minutes", "factor",
    )),
    *((f"--{name} -1", USAGE, f"'--{name}'") for name in (
        "population", "steps", "search-groups", "test-groups", "seed", "workers", "min-factor", "max-factor", "factor",
    )),
    *((f"--{name} 0", USAGE, f"'--{name}'") for name in (
        "population", "steps", "search-groups", "test-groups", "min-factor", "factor",
    )),
    ("--max-harm 0", USAGE, "max_harm=0.0"),
    ("--minutes 0", USAGE, "minutes=0.0"),
    ("--step 0", USAGE, "step=0.0 must be"),
    ("--step -1", USAGE, "step=-1.0 must be"),
    ("--population 2.5", USAGE, "--population"),
    ("--min-factor 2 --max-factor 1.5", USAGE, "max_factor=1.5 must be greater than min_factor=2.0"),
    ("--min-factor 1 --max-factor 1", USAGE, "max_factor=1.0"),
    ("--max-factor 99999 --step 1000", USAGE, "--max-factor"),
    ("--step 5", USAGE, "step=5.0"),
    ("--step 1e-9", USAGE, "step=1e-09"),
    ("--weights 1 -1 1", USAGE, "weights[1]=-1.0"),
    ("--weights 0 0 0", USAGE, "weights[0]=0.0"),
    ("--weights nan 1 1", USAGE, "weights[0]=nan"),
    ("--weights 1 1", USAGE, "3 arguments"),
    ("--layers 0-9", USAGE, "distinct layer indices from 0 to 5"),
    ("--layers 3-1", USAGE, "ends before it begins"),
    ("--layers 1,1", USAGE, "named only once"),
    ("--layers x", USAGE, "'x' is no layer or range"),
    ("--layers 1,", USAGE, "'' is no layer or range"),
    ("--layers -1", USAGE, "is no layer or range"),
    ("--rope-type nonesuch", USAGE, "'nonesuch' is not one of"),
    ("--algorithm nonesuch", USAGE, "'nonesuch' is not one of"),
    ("--length 2048", USAGE, "the largest scaling reaches 1024 tokens"),
    ("--length 99999", USAGE, "the largest scaling reaches 1024 tokens"),
    ("{R}/gpt2 --task kv_words", FAILED, "no rotary embedding"),
    ("--resume --overwrite", USAGE, "--resume keeps what is there and --overwrite replaces it"),
    ("--config {R}/nonesuch.yaml", USAGE, "nonesuch.yaml cannot be read"),
    ("--config {R}/full", USAGE, "full cannot be read: Is a directory"),
    ("--config {R}/typo.yaml", USAGE, "search.populaton is unknown; did you mean search.population?"),
    ("--config {R}/kind.yaml", USAGE, "batch_tokens"),
    ("--config {R}/list.yaml", USAGE, "must hold names and values"),
    ("--config {R}/broken.yaml", USAGE, "broken.yaml is not YAML"),
    ("--config {R}/empty.yaml", USAGE, "must hold names and values"),
    ("--config {R}/latin.txt", USAGE, "latin.txt is not YAML"),
]  # fmt: skip
EVALUATE = [
    ("--baseline nonesuch", USAGE, "baseline 'nonesuch' is unknown"),
    ("--baseline uniform", USAGE, "baseline 'uniform' is unknown"),
    ("--baseline uniform:", USAGE, "baseline 'uniform:' is unknown"),
    ("--baseline uniform:0", USAGE, "baseline 'uniform:0' is unknown"),
    ("--baseline uniform:-1", USAGE, "baseline 'uniform:-1' is unknown"),
    ("--baseline uniform:nan", USAGE, "baseline 'uniform:nan' is unknown"),
    ("--baseline uniform:inf", USAGE, "baseline 'uniform:inf' is unknown"),
    ("--baseline uniform:1e9", USAGE, "must be at most 10000"),
    ("--baseline yarn:0.5", USAGE, "The factor of yarn must be above 1"),
    ("--baseline first_and_rest:2", USAGE, "baseline 'first_and_rest:2' is unknown"),
    ("--baseline none:1", USAGE, "baseline 'none:1' is unknown"),
    ("--baseline none --baseline none", USAGE, "no scaling is given twice"),
    ("--adapter {R}/nowhere", FAILED, "nowhere': there is no such folder"),
    ("--adapter {R}/file", FAILED, "file': it is a file"),
    ("--adapter {R}/no_config", FAILED, "no adapter_config.json"),
    ("--adapter {R}/no_tensors", FAILED, "adapter_model.safetensors"),
    ("--adapter {R}/not_json", FAILED, "adapter_config.json"),
    ("--adapter {R}/other_method", FAILED, "NONESUCH"),
    ("--adapter {R}/nine_layers --groups 2", FAILED, "layer_factors has 9 entries, but llama has 6 decoder layers"),
    ("--adapter nobody/nonesuch", FAILED, "cannot load adapter 'nobody/nonesuch'"),
    ("--adapter {R}/adapter --adapter {R}/adapter", USAGE, "adapter is given twice"),
    ("--groups 0", USAGE, "num_groups=0"),
    ("--groups -1", USAGE, "num_groups=-1"),
    ("--groups 99999999", USAGE, "num_groups=99999999 must be at most 1048576"),
    ("--buckets 4", USAGE, "--buckets 4 is for perplexity"),
    ("--task kv_words --max-new-tokens 4", USAGE, "max_new_tokens=4 is no setting of kv_words"),
    ("--max-new-tokens 0 --groups 1", USAGE, "--max-new-tokens"),
    ("--max-new-tokens -1 --groups 1", USAGE, "--max-new-tokens"),
    ("--generate", USAGE, "--generate"),
    ("--split nonesuch", USAGE, "'nonesuch' is not one of"),
    ("--output {R}/full", USAGE, "full is not empty"),
    ("--output {R}/file", USAGE, "file exists and is not a folder"),
    ("--output {R}/file/below", USAGE, "file"),
    ("{R}/gpt2 --task kv_words --baseline uniform:2 --groups 1", FAILED, "no rotary embedding"),
    ("--resume", USAGE, "--resume needs --output"),
    ("--overwrite", USAGE, "--overwrite needs --output"),
    ("--output out --resume --overwrite", USAGE, "pass one of them"),
    ("--json nowhere/a.json", USAGE, "--json nowhere/a.json cannot be written"),
    ("--json {R}/full", USAGE, "--json"),
    ("--json {R}/file/a.json", USAGE, "--json"),
    ("--plot nowhere/a.png", USAGE, "--plot nowhere/a.png cannot be written"),
    ("--plot a.nonesuch --groups 1", USAGE, "--plot a.nonesuch"),
    ("--task perplexity --data {R}/short.txt --length 4 --teacher-forced", USAGE, "short.txt"),
]
SENSITIVITY = [
    *((f"--try {value}", USAGE, value) for value in ("nan", "inf", "0", "-1", "1")),
    ("--try 1e9", USAGE, "must be at most 10000"),
    ("--try x", USAGE, "--try"),
    ("--layers 0-9", USAGE, "distinct layer indices from 0 to 5"),
    ("--layers x", USAGE, "'x' is no layer or range"),
    ("--groups 1", USAGE, "--groups"),
    ("--groups -1", USAGE, "--groups"),
    ("--factor 2", USAGE, "factor=2.0 has no effect"),
    ("--rope-type linear --factor nan", USAGE, "factor"),
    ("--json nowhere/a.json", USAGE, "--json nowhere/a.json cannot be written"),
    ("--json {R}/full", USAGE, "--json"),
    ("--plot nowhere/a.png", USAGE, "--plot nowhere/a.png cannot be written"),
    ("--plot a.nonesuch", USAGE, "--plot a.nonesuch"),
]
PROMPTS = [
    ("--position 999", USAGE, "999"),
    ("--position -1", USAGE, "--position"),
    ("--task kv_retrieval --data {R}/kv.jsonl --position 3", USAGE, "3"),
    ("--limit 0", USAGE, "--limit"),
    ("--task kv_retrieval --data {R}/kv.jsonl --positions 3 --limit 999", USAGE, "were asked for"),
    ("--task perplexity --data {R}/short.txt", USAGE, "--task perplexity has no prompts"),
]
VERIFY = [
    ("", FAILED, "nothing to verify"),
    ("{R}/gpt2 --adapter {R}/adapter", FAILED, "no rotary embedding"),
    ("{R}/nowhere", FAILED, "nowhere': there is no such folder"),
    ("--adapter {R}/nine_layers", FAILED, "layer_factors has 9 entries"),
    ("--adapter {R}/no_config", FAILED, "no adapter_config.json"),
    ("--adapter {R}/no_tensors", FAILED, "adapter_model.safetensors"),
    ("--adapter {R}/not_json", FAILED, "adapter_config.json"),
    ("--adapter {R}/nowhere", FAILED, "nowhere': there is no such folder"),
    ("--adapter {R}/adapter --json nowhere/a.json", USAGE, "--json nowhere/a.json cannot be written"),
    ("--adapter {R}/adapter --json {R}/full", USAGE, "--json"),
    ("--adapter {R}/adapter --device nonesuch", USAGE, "nonesuch"),
    ("--adapter {R}/adapter --dtype nonesuch", USAGE, "nonesuch"),
    ("--nonesuch", USAGE, "--nonesuch"),
]
OTHERS = [
    ("nonesuch", USAGE, "No such command 'nonesuch'"),
    ("push", USAGE, "Missing argument"),
    ("push {R}/nowhere me/name", FAILED, "nowhere"),
    ("push {R}/full me/name", FAILED, "full"),
    ("push {R}/no_config me/name", FAILED, "no_config"),
    ("push {R}/no_tensors me/name", FAILED, "no_tensors"),
    ("push {R}/not_json me/name", FAILED, "not_json"),
    ("push {R}/searched a/b/c", USAGE, "a/b/c"),
    ("push {R}/searched me/name --base-model a/b/c", USAGE, "a/b/c"),
    ("push {R}/searched me/name", FAILED, "hf auth login"),
    ("pull", USAGE, "Missing argument"),
    ("pull a/b/c out", USAGE, "a/b/c"),
    ("pull me/name out", FAILED, "me/name"),
]
EXPERIMENTS = [
    ("nonesuch", USAGE, "No such command 'nonesuch'"),
    ("u-shape --groups 0", USAGE, "--groups"),
    ("u-shape --output {R}/file", USAGE, "file exists and is not a folder"),
    ("u-shape --output {R}/file/below", USAGE, "file"),
    ("u-shape --resume", USAGE, "needs --output"),
    ("sweep --try nan", USAGE, "nan"),
    ("sweep --try 0", USAGE, "0"),
    ("sweep --try -1", USAGE, "-1"),
    ("sweep --factor 2", USAGE, "factor=2.0 has no effect"),
    ("sweep --groups -1", USAGE, "--groups"),
    ("halves", USAGE, "Missing option '--adapter'"),
    ("halves --adapter {R}/nine_layers", FAILED, "layer_factors has 9 entries, but the model has 6 decoder layers"),
    ("halves --adapter {R}/no_config", FAILED, "no adapter_config.json"),
    ("halves --adapter {R}/nowhere", FAILED, "nowhere': there is no such folder"),
    ("control-points --adapter {R}/adapter", FAILED, "it has no search.json"),
    ("control-points --adapter {R}/searched", USAGE, "no Bézier control points"),
    ("control-points --adapter {R}/curve --by nan", USAGE, "nan"),
    ("control-points --adapter {R}/curve --by 0", USAGE, "0"),
    ("control-points --adapter {R}/curve --step 0", USAGE, "step=0.0"),
    ("control-points --adapter {R}/curve --min-factor 3", USAGE, "min_factor=3.0"),
    (
        "attention --adapter {R}/nine_layers --groups 2",
        FAILED,
        "layer_factors has 9 entries, but the model has 6 decoder layers",
    ),
    ("attention --adapter {R}/adapter --groups 0", USAGE, "--groups"),
    ("extrapolation --adapter {R}/adapter --lengths x", USAGE, "--lengths 'x'"),
    ("extrapolation --adapter {R}/adapter --lengths 99999999", USAGE, "length=99999999 must be at most"),
    ("extrapolation --adapter {R}/adapter --lengths 0", USAGE, "--lengths '0'"),
    ("extrapolation --adapter {R}/adapter --lengths 128,128", USAGE, "--lengths '128,128'"),
    ("extrapolation --adapter {R}/adapter --baseline nonesuch", USAGE, "baseline 'nonesuch' is unknown"),
    ("transfer --adapter {R}/adapter --on nonesuch", USAGE, "--on 'nonesuch'"),
    ("transfer --adapter {R}/adapter --on kv_words:0", USAGE, "--on 'kv_words:0'"),
    ("transfer --adapter {R}/adapter --on kv_words:99999999", USAGE, "length=99999999 must be at most"),
    ("transfer --adapter {R}/adapter --on kv_words:3", USAGE, "length=3"),
]
REPORTS = [
    ("{R}/nowhere", USAGE, "nowhere"),
    ("{R}/full", USAGE, "search.json"),
    ("{R}/adapter", USAGE, "search.json"),
    ("{R}/searched_broken", USAGE, "search.json"),
    ("{R}/searched_other", USAGE, "different layer_factors"),
    ("{R}/searched --output out", USAGE, "must be a file such as report.html"),
    ("{R}/searched --output {R}/file/report.html", USAGE, "file"),
    ("{R}/searched --output r.html --groups 1", USAGE, "--groups"),
    ("{R}/searched --output r.html --format pdf", USAGE, "'pdf' is not one of"),
    ("{R}/searched --output r.html --resume --overwrite", USAGE, "pass one of them"),
    ("{R}/searched --output r.html --model {R}/nowhere", FAILED, "nowhere': there is no such folder"),
    ("{R}/searched --output r.html --model {R}/gpt2", FAILED, "no rotary embedding"),
    ("{R}/searched --output r.html --length 3", USAGE, "length=3"),
    ("{R}/searched --output r.html --length 99999999", USAGE, "--length"),
    ("{R}/searched --output r.html --also {R}/nowhere", FAILED, "nowhere': there is no such folder"),
    ("{R}/searched --output r.html --device nonesuch", USAGE, "nonesuch"),
    ("{R}/searched --output r.html --batch-tokens 0", USAGE, "--batch-tokens"),
]

ROWS = [
    *((f"{c} {o}", s, m) for c in TASK_COMMANDS for o, s, m in TASK_OPTIONS),
    *((f"{c} {o}", s, m) for c in MODEL_COMMANDS for o, s, m in MODELS),
    *((f"evaluate --groups 1 --length 512 --task {t} --data {{R}}/{d}".replace(
        "--length 512 ", "" if "--length" in d else "--length 512 "), USAGE, m) for t, d, m in DATA),
    *((f"search --output out {TINY_SEARCH if '--length' not in o else ''} {o}", s, m) for o, s, m in SEARCH),
    *((f"evaluate --length 128 {o}", s, m) for o, s, m in EVALUATE),
    *((f"sensitivity --length 128 {o}", s, m) for o, s, m in SENSITIVITY),
    *((f"prompts {o}", s, m) for o, s, m in PROMPTS),
    *((f"verify {o}", s, m) for o, s, m in VERIFY),
    *OTHERS,
    *((f"experiment {o}", s, m) for o, s, m in EXPERIMENTS),
    *((f"report {o}", s, m) for o, s, m in REPORTS),
]  # fmt: skip


@pytest.mark.parametrize(("command", "status", "message"), ROWS, ids=[row[0].replace("{R}/", "") for row in ROWS])
def test_a_command_that_cannot_work(command, status, message, resources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(command, status, message, resources, tmp_path)


LONG = "x" * 2**20
LONG_VALUES = {
    "no JSON": ("kv_retrieval", LONG),
    "a key": ("kv_retrieval", _lines(RECORD | {"key": LONG})),
    "a value": ("kv_retrieval", _lines(RECORD | {"value": LONG})),
    "pairs": ("kv_retrieval", _lines(RECORD | {"ordered_kv_records": LONG})),
    "answers": ("multi_doc_qa", _lines(QUESTION | {"answers": LONG})),
    "passages": ("multi_doc_qa", _lines(QUESTION | {"ctxs": [LONG]})),
    "text": ("perplexity", _lines({"text": [LONG]})),
    "a name": ("perplexity", _lines({LONG: 1})),
    "token ids": ("perplexity.json", json.dumps([LONG])),
}


@pytest.mark.parametrize("what", LONG_VALUES)
def test_a_message_quotes_little_of_a_long_value(what, tmp_path):
    (task, _, ending), content = LONG_VALUES[what][0].partition("."), LONG_VALUES[what][1]
    path = tmp_path / f"long.{ending or 'jsonl'}"
    path.write_text(content)
    words = ["evaluate", "--task", task, "--data", str(path), "--length", "128"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "300", "TERM": "dumb"})
    assert (done.exit_code, isinstance(done.exception, SystemExit)) == (USAGE, True)
    assert str(path) in done.stderr
    assert len(done.output) < 1000


@pytest.mark.parametrize("field", ["model", "chosen", "layer_factors"])
def test_a_message_quotes_little_of_a_long_value_in_a_report(field, resources, tmp_path):
    shutil.copytree(resources / "searched", tmp_path / "it")
    path = tmp_path / "it" / "search.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: [LONG]}))
    done = CliRunner().invoke(app, ["report", str(path.parent), "--output", str(tmp_path / "r.html")])
    assert done.exit_code in (USAGE, FAILED)
    assert "search.json" in done.stderr
    assert len(done.output) < 1000


@pytest.mark.parametrize(
    ("package", "command", "status"),
    [
        ("ray", f"search --output out {TINY_SEARCH} --workers 1", USAGE),
        ("lm_eval", "lm-eval --model hf --tasks layerrope_kv", FAILED),
        ("datasets", "evaluate --task perplexity --data datasets:nonesuch --length 64", USAGE),
    ],
)
def test_an_extra_that_is_not_installed(package, command, status, resources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    check(command, status, "pip install", resources, tmp_path)


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        ("evaluate --length 128 --groups 1 --positions 3 --output out", "--groups 2", "journal.jsonl"),
        ("evaluate --length 128 --groups 1 --positions 3 --output out", "--baseline linear:2", "journal.jsonl"),
        (f"search --output out {TINY_SEARCH}", "--seed 5", "seed was 0 there and is 5 now"),
    ],
)
def test_resuming_something_else_leaves_the_first_as_it_was(first, other, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, first.split()).exit_code == 0
    before = _results(tmp_path)
    done = CliRunner().invoke(app, [*first.split(), *other.split(), "--resume"])
    assert done.exit_code == USAGE
    assert message in done.stderr
    assert _results(tmp_path) == before


def _results(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(NO_RESULTS))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _examples(position: int = 0, context: tuple[int, ...] = (1,), query: tuple[int, ...] = (2,)) -> list[Example]:
    return [Example(context, query, (3,), position, group) for group in range(9)]


def _words(t, length: int = 128, **settings) -> KeyValueWords:
    return KeyValueWords(t, length, **{"num_positions": 3, **settings})


NAN = float("nan")
NINE = LayerRopeConfig(layer_factors=[1.5] * 9)
NONE = parse_baseline("none")
OTHER = torch.nn.Linear(2, 2)  # no transformers model
# The call, on the demo model and its tokenizer; the error; what its message says.
CALLS = {
    "evaluate: split": (lambda m, t: evaluate(m, _words(t), split="x"), TaskError, "split 'x' is unknown"),
    "evaluate: no groups": (lambda m, t: evaluate(m, _words(t), num_groups=0), TaskError, "num_groups=0"),
    "evaluate: half a group": (lambda m, t: evaluate(m, _words(t), num_groups=1.5), TaskError, "num_groups=1.5 must"),
    "evaluate: groups": (lambda m, t: evaluate(m, _words(t), num_groups=10**9), TaskError, "at most 1048576"),
    "evaluate: batch": (lambda m, t: evaluate(m, _words(t), batch_tokens=1.5), TaskError, "batch_tokens=1.5 must"),
    "evaluate: progress": (lambda m, t: evaluate(m, _words(t), progress=True), TaskError, "progress=True must be"),
    "evaluate: no model": (lambda m, t: evaluate(None, _words(t)), UnsupportedModelError, "NoneType: not a"),
    "evaluate: another model": (
        lambda m, t: evaluate(OTHER, _words(t)),
        UnsupportedModelError,
        "Linear",
    ),
    "evaluate: no task": (lambda m, t: evaluate(m, None), TaskError, "task=None must be a task such as"),
    "evaluate: a split": (lambda m, t: evaluate(m, _words(t).split("test", 1)), TaskError, "task=<Split> must be"),
    "evaluate: a class": (lambda m, t: evaluate(m, KeyValueWords), TaskError, "task=KeyValueWords must be"),
    "evaluate: no batch": (lambda m, t: evaluate(m, _words(t), num_groups=1, batch_tokens=0), TaskError, "tokens=0"),
    "evaluate: id too high": (
        lambda m, t: evaluate(m, TokenTask(_examples(context=(10**6,))), num_groups=1),
        TaskError,
        "1000000 is outside",
    ),
    "evaluate: id below 0": (
        lambda m, t: evaluate(m, TokenTask(_examples(context=(-1,))), num_groups=1),
        TaskError,
        "-1 is outside",
    ),
    "TokenTask: groups": (
        lambda m, t: TokenTask(_examples()).split("test", "3"),
        TaskError,
        "num_groups='3' must be a whole number",
    ),
    "TokenTask: nothing": (lambda m, t: TokenTask([]), TaskError, "0 records"),
    "TokenTask: too few": (lambda m, t: TokenTask(_examples()[:1]), TaskError, "1 records"),
    "TokenTask: incomplete": (
        lambda m, t: TokenTask(_examples() + _examples(1)[:4]).split("test", 4),
        TaskError,
        "one example for each",
    ),
    "TokenTask: no query": (lambda m, t: TokenTask(_examples(query=())).split("test", 1), TaskError, "empty query"),
    "TokenTask: position -1": (lambda m, t: TokenTask(_examples(-1)).split("test", 1), TaskError, "[-1]"),
    "TokenTask: positions": (
        lambda m, t: TokenTask(_examples(), positions=(1, 2)).split("test", 1),
        TaskError,
        "2 positions",
    ),
    "TokenTask: shares": (lambda m, t: TokenTask(_examples(), fractions=(0.5, 0.5, 0.5)), TaskError, "would be empty"),
    "TokenTask: too many": (lambda m, t: TokenTask(_examples()).split("test", 99), TaskError, "99 were asked for"),
    "Split: empty": (lambda m, t: Split("test", 0, (0,), ()), TaskError, "no examples"),
    "KeyValueWords: pairs": (lambda m, t: _words(t, num_pairs=999), TaskError, "999 were asked for"),
    "KeyValueWords: positions": (lambda m, t: _words(t, num_positions=2), TaskError, "2 gold positions"),
    "KeyValueWords: prompt": (lambda m, t: _words(t).prompts("test", 1, [999]), TaskError, "(999,) must be"),
    "KeyValueRetrieval: size": (lambda m, t: KeyValueRetrieval(t), TaskError, "num_keys or length"),
    "KeyValueRetrieval: text": (lambda m, t: KeyValueRetrieval(t, num_keys="5"), TaskError, "num_keys='5' must be"),
    "KeyValueRetrieval: endless": (lambda m, t: KeyValueRetrieval(t, num_keys=10**9), TaskError, "num_keys=1000000000"),
    "KeyValueRetrieval: length": (lambda m, t: KeyValueRetrieval(t, length=1e3), TaskError, "length=1000.0 must be"),
    "KeyValueRetrieval: keys": (lambda m, t: KeyValueRetrieval(t, num_keys=5, keys="x"), TaskError, "keys='x'"),
    "MultiDocumentQA: file": (lambda m, t: MultiDocumentQA(t, "nonesuch"), TaskError, "nonesuch cannot be read"),
    "Perplexity: mixed": (lambda m, t: Perplexity(["a", 3], tokenizer=t, length=4), TaskError, "nothing but text"),
    "Perplexity: no length": (lambda m, t: Perplexity([1, 2], length=None), TaskError, "length=None must be"),
    "Perplexity: half a stride": (lambda m, t: Perplexity([1, 2], length=4, stride=1.5), TaskError, "stride=1.5 must"),
    "Perplexity: fractions": (lambda m, t: Perplexity([1.5, 2], length=4), TaskError, "whole numbers"),
    "Perplexity: below 0": (lambda m, t: Perplexity([-1, 2], length=4), TaskError, "at least 0"),
    "Perplexity: tokenizer": (lambda m, t: Perplexity("text", length=4), TaskError, "text needs a tokenizer"),
    "Perplexity: length": (lambda m, t: Perplexity([1, 2], length=1), TaskError, "length=1"),
    "Perplexity: stride": (lambda m, t: Perplexity([1, 2], length=3, stride=3), TaskError, "stride=3"),
    "Perplexity: short": (lambda m, t: Perplexity([1, 2], length=3).split("test", 1), TaskError, "0 windows of 3"),
    "parse_baseline: name": (lambda m, t: parse_baseline("x:1"), TaskError, "'x:1' is unknown"),
    "best_subspan_em: one answer": (
        lambda m, t: best_subspan_em("x", "xyz"),
        TaskError,
        "answers='xyz' must be a list",
    ),
    "compare: no model": (
        lambda m, t: compare(None, _words(t).split("test", 1), [NONE]),
        UnsupportedModelError,
        "NoneType: not a",
    ),
    "compare: batch": (
        lambda m, t: compare(m, _words(t).split("test", 1), [NONE], batch_tokens="x", folder="out"),
        TaskError,
        "batch_tokens='x' must be",
    ),
    "judge: metric": (lambda m, t: Judge("x", t), TaskError, "metric='x' is unknown"),
    "judge: new tokens": (lambda m, t: Judge("contains_value", t, 1.5), TaskError, "max_new_tokens=1.5 must be"),
    "judge: endless": (
        lambda m, t: Judge("contains_value", t, 10**9),
        TaskError,
        "max_new_tokens=1000000000 must be at most",
    ),
    "compare: nothing": (lambda m, t: compare(m, _words(t).split("test", 1), []), TaskError, "must be at least one"),
    "compare: twice": (lambda m, t: compare(m, _words(t).split("test", 1), [NONE, NONE]), TaskError, "'no scaling'"),
    "compare: resume": (
        lambda m, t: compare(m, _words(t).split("test", 1), [NONE], resume=True),
        InvalidConfigError,
        "resume=True needs",
    ),
    "compare: resume without a folder": (
        lambda m, t: compare(m, _words(t).split("test", 1), [NONE], resume=True),
        InvalidConfigError,
        "folder",
    ),
    "compare: adapter": (
        lambda m, t: compare(m, _words(t).split("test", 1), [Candidate.of_adapter("/nonesuch")]),
        LayerRopeError,
        "'/nonesuch': there is no such folder",
    ),
    "compare: depth": (
        lambda m, t: compare(m, _words(t).split("test", 1), [Candidate.of_config("x", NINE)]),
        AdapterMismatchError,
        "9 entries",
    ),
    "verify: nothing": (lambda m, t: verify(m), LayerRopeError, "nothing to verify"),
    "verify: depth": (lambda m, t: verify(m, NINE), LayerRopeError, "9 entries, but llama has 6 decoder layers"),
    "verify: no model": (lambda m, t: verify(OTHER, NINE), UnsupportedModelError, "Linear"),
    "restore_baked": (lambda m, t: restore_baked(m), LayerRopeError, "not saved from a baked one"),
    "restore_baked: nothing": (lambda m, t: restore_baked(None), UnsupportedModelError, "NoneType: not a"),
    "restore_baked: another": (
        lambda m, t: restore_baked(OTHER),
        UnsupportedModelError,
        "Linear: not a",
    ),
    "search: a dict": (
        lambda m, t: search(m, _words(t), {"population": 4}),
        SearchError,
        "settings={'population': 4} must be a SearchSettings",
    ),
    "search: no task": (lambda m, t: search(m, None), TaskError, "task=None must be a task"),
    "search: progress": (lambda m, t: search(m, _words(t), progress=None), SearchError, "progress=None must be True"),
    "search: no model": (lambda m, t: search(None, _words(t)), UnsupportedModelError, "NoneType: not a"),
    "search: field": (lambda m, t: search(m, _words(t), nonesuch=1), SearchError, "nonesuch is unknown; did you"),
    "search: both": (lambda m, t: search(m, _words(t), SearchSettings(), seed=8), SearchError, "got both: seed"),
    "search: resume and overwrite": (
        lambda m, t: search(m, _words(t), resume=True, overwrite=True, folder="nonesuch", progress=False),
        InvalidConfigError,
        "overwrite",
    ),
    "plan_search: no model": (
        lambda m, t: plan_search(OTHER, _words(t)),
        UnsupportedModelError,
        "Linear",
    ),
    "plan_search: layers": (
        lambda m, t: plan_search(m, _words(t), layers_to_transform=(9,)),
        SearchError,
        "layers_to_transform=[9]",
    ),
    "search: population": (lambda m, t: search(m, _words(t), population=1), SearchError, "population=1 must be"),
    "SearchSettings: max_harm": (lambda m, t: SearchSettings(max_harm=-1.0), SearchError, "max_harm=-1.0 must be"),
    "SearchSettings: grid": (
        lambda m, t: SearchSettings(grid=(1, 2, 0.1)),
        SearchError,
        "grid=(1, 2, 0.1) must be",
    ),
    "SearchSettings: layers": (
        lambda m, t: SearchSettings(layers_to_transform={"0": 3}),
        SearchError,
        "layers_to_transform={'0': 3} must be",
    ),
    "SearchSettings: anyway": (lambda m, t: SearchSettings(anyway="no"), SearchError, "anyway='no' must be"),
    "SearchSettings: window": (
        lambda m, t: SearchSettings(rope_type="dynamic", original_max_position_embeddings=0),
        InvalidConfigError,
        "original_max_position_embeddings=0",
    ),
    "SearchSettings: nan": (lambda m, t: SearchSettings(max_harm=NAN), SearchError, "max_harm=nan"),
    "search: a test of one": (
        lambda m, t: search(m, TokenTask(_examples(), fractions=(0.4, 0.4, 0.15)), steps=4, progress=False),
        TaskError,
        "1 context for the test split",
    ),
    "RayWorkers: none": (lambda m, t: RayWorkers(0), SearchError, "num_workers=0"),
    "RayWorkers: nan": (lambda m, t: RayWorkers(1, start_timeout=NAN), SearchError, "start_timeout=nan"),
    "push_to_hub: missing": (lambda m, t: push_to_hub("/nonesuch", "me/x"), LayerRopeError, "/nonesuch"),
    "push_to_hub: id": (lambda m, t: push_to_hub("/nonesuch", "a/b/c"), LayerRopeError, "repo_id='a/b/c'"),
    "push_to_hub: other": (lambda m, t: push_to_hub(OTHER, "me/x"), LayerRopeError, "source=<Linear>"),
    "pull: id": (lambda m, t: pull("a b", "nonesuch"), LayerRopeError, "repo_id='a b'"),
    "LayerRopeConfig: text": (lambda m, t: LayerRopeConfig(layer_factors="1"), InvalidConfigError, "layer_factors='1'"),
    "LayerRopeConfig: nan": (lambda m, t: LayerRopeConfig(layer_factors=[NAN]), InvalidConfigError, "layer_factors[0]"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_cannot_work(name, demo_model, demo_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, error, message = CALLS[name]
    with pytest.raises(error) as caught:
        call(demo_model, demo_tokenizer)
    assert message in str(caught.value)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
