"""Is every figure true, through every door that a real model comes through? One pass over all, on the current code.

    python tests/benchmarks/real_doors.py --output doors.json     # rows that are in the file are not measured again
    python tests/benchmarks/real_doors.py lora bad_input --model smollm2-135m-instruct
    python tests/benchmarks/real_doors.py chat_template --contexts 20 --documents nq-open-oracle.jsonl.gz --folder kept

Each row compares what the package says with something independent: a model that transformers or PEFT loads by hand, a
formula in float64, or tests that do so. Printed is Markdown; the exit status is 1 if anything differs. Real models are
those of `python tests/real_models.py`; a row whose model, file or package is missing says so. On one CPU core rows
without one take about five minutes, each of gguf, four_bits and lora about five with SmolLM2, more with a larger model.
"""
# ruff: noqa: E402 (pytest finds the tests' own modules; a script has to be told where they are)

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parents[1]
sys.path[:0] = map(str, [TESTS, *(path for path in TESTS.iterdir() if path.is_dir()), TESTS.parent])

import numpy as np
import pytest
import torch
from conftest import build_model, length_dependent_ropes, logits, real_model
from fakes import token_task
from interval_coverage import ACCURACIES, CONTEXTS, differences, proportions, twins
from peft import PeftModel, get_peft_model
from real_models import models_folder
from test_base_model import _other_bases
from test_chat import QWEN3, with_template
from test_frequencies import tables_of
from test_rope_scaling import gemma3
from test_scorer import one_by_one
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from typer.testing import CliRunner

from peft_layerrope import (
    KeyValueRetrieval,
    LayerRopeConfig,
    Perplexity,
    compare,
    demo_model_path,
    parse_baseline,
    search,
    verify,
)
from peft_layerrope.cli import app
from peft_layerrope.comparison.candidates import candidate_on
from peft_layerrope.files import to_json
from peft_layerrope.scoring.preflight import preflight, with_targets
from peft_layerrope.scoring.scorer import Scorer

SAMPLE_TEXT = TESTS.parent / "peft_layerrope" / "searcher" / "sample_text.txt"
PAIRS = {"keys": "syllables", "num_keys": 8, "num_positions": 3, "length": 512, "max_new_tokens": 48}
FEW = {"test_groups": 2, "preflight_groups": 2, "layers_to_transform": "0-3"}
Options = argparse.Namespace


class Line(NamedTuple):
    """What was looked at, what came out, what was expected, and whether that is so; None: nothing was."""

    what: str
    found: str
    expected: str = ""
    holds: bool | None = None


def invoke(*words: object, **settings: object) -> Any:
    """The command line, in this process; settings are options."""
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    return CliRunner().invoke(app, [str(word) for word in (*words, *options)], env={"COLUMNS": "300", "TERM": "dumb"})


def layerrope(*words: object, **settings: object) -> None:
    """A command that has to work."""
    done = invoke(*words, **settings)
    if done.exit_code:
        raise RuntimeError(f"layerrope {' '.join(map(str, words))}: {done.stderr or done.exception}")


def refused(what: str, folder: Path, *words: object, says: str = "", **settings: object) -> Line:
    """`search` and `evaluate` of what cannot work: one line, an exit status, and nothing left behind."""
    empty, holds, found = folder / "empty", True, {}
    empty.mkdir(exist_ok=True)
    for command in ("search", "evaluate"):
        start = time.perf_counter()
        done = invoke(command, *words, **settings, output=empty / "out")
        seconds, said, left = time.perf_counter() - start, done.stdout + done.stderr, list(empty.iterdir())
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        holds &= isinstance(done.exception, SystemExit) and "Traceback" not in said and len(errors) == 1
        holds &= done.exit_code in (1, 2) and not left and says in said
        message = ("".join(errors) or said[-200:]).replace(f"{folder}/", "")
        found.setdefault(message, []).append(f"{command}: exit {done.exit_code}, {seconds:.1f} s, {len(left)} files")
    cell = "; ".join(f"{', '.join(how)}: {message}" for message, how in found.items())
    return Line(what, cell, "one line, exit 1 or 2, no files", holds)


def counted(what: str, *tests: str) -> Line:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()[-1].strip("= ")
    return Line(f"{what}: {' '.join(tests)}", said, "none fails", done.returncode == 0)


def equal(what: str, found: torch.Tensor, expected: torch.Tensor, atol: float = 0.0) -> Line:
    gap = float((found.double() - expected.double()).abs().max())
    return Line(what, f"differs by {gap:.2g} at most", f"≤ {atol:g}", gap <= atol)


def numbers(values: Any, digits: int = 4) -> str:
    return " ".join(f"{value:.{digits}f}" for value in np.ravel(values))


def save(folder: Path, template: str | None, family: str = "llama") -> None:
    """A tiny model, with a tokenizer if there is a chat template."""
    build_model(family, vocab_size=600, max_position_embeddings=512).save_pretrained(folder)
    if template:
        with_template(template).save_pretrained(folder)


def non_finite(options: Options) -> Iterator[Line]:
    """A1: a model whose scores are NaN is refused, and all JSON is strict."""
    broken, folder = AutoModelForCausalLM.from_pretrained(demo_model_path()), options.folder / "broken"
    with torch.no_grad():
        broken.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = math.nan
    broken.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(folder)
    yield refused(
        "the demo model with one weight of NaN", options.folder, folder, says="up_proj", task="kv_words", length=128
    )
    path, constants = options.folder / "one.json", []
    layerrope("evaluate", length=64, groups=1, json=path)
    json.loads(path.read_text(), parse_constant=constants.append)
    yield Line("evaluate --groups 1 --json", f"{len(constants)} NaN or Infinity", "0", not constants)
    yield counted("what else has no finite score, and files that say so", "tests/test_not_finite.py")
    model = real_model("gemma-3-270m")
    yield refused("gemma-3-270m in float16", options.folder, model, says="float16", dtype="float16", **PAIRS)


def two_ropes(options: Options) -> Iterator[Line]:
    """A2: `linear` and `dynamic` on families of several ropes, and on scaled bases, are those of transformers."""
    ids = torch.randint(0, 99, (1, 100), generator=torch.Generator().manual_seed(1))
    for name, atol in (("linear", 0.0), ("dynamic", 2e-4)):
        expected = logits(gemma3(rope_type=name, factor=2.0), ids)
        effect = float((expected - logits(gemma3(), ids)).abs().max())
        with candidate_on(gemma3(), parse_baseline(f"{name}:2")) as scaled:
            yield equal(f"{name}:2, tiny gemma3_text, logits; effect {effect:.2g}", logits(scaled, ids), expected)
        adapted = get_peft_model(gemma3(), LayerRopeConfig(rope_type=name, factor=2.0))
        yield equal(f"the same as an adapter of rope_type {name}", logits(adapted, ids), expected, atol)
    file = "tests/comparison/test_rope_scaling.py"
    yield counted("families × types", f"{file}::test_families_with_several_tables")
    own = "test_a_baseline_replaces_a_scaling_of_the_models_own", "test_an_adapter_acts_on_top_of_it"
    yield counted("base types, in place of and on top of them", *(f"{file}::{name}" for name in own))


def memory(options: Options) -> Iterator[Line]:
    """A3: scores on a base with transformers' `dynamic` rope do not depend on what was scored before."""
    rope = {"rope_theta": 10000.0, **length_dependent_ropes(16)["dynamic"]}
    model, *fresh = (build_model("llama", rope_parameters=rope, max_position_embeddings=16) for _ in range(13))
    split = token_task().split("test", 4)
    expected = np.mean([one_by_one(own, one)[1] for own, one in zip(fresh, split.examples, strict=True)])
    logits(model, torch.arange(90)[None])  # a long prompt, which transformers remembers
    for names in (("none", "uniform:1"), ("uniform:1", "none"), ("none", "uniform:1")):
        found = compare(model, split, [parse_baseline(name) for name in names]).scores.values()
        one, other = (scores.log_prob.mean() for scores in found)
        holds = one == other and abs(one - expected) < 1e-5
        yield Line(", then ".join(names), numbers([one, other], 6), f"{expected:.6f}: a fresh model for each", holds)


def intervals(options: Options) -> Iterator[Line]:
    """A4: 95 % intervals cover at least 93 %, near the edges too, and none has zero width. Of 1,000 draws each."""
    draws, wanted = 1000, 0.93
    chance = 3 * math.sqrt(wanted * (1 - wanted) / draws)  # of the least of so many simulations
    simulated = {of.__name__: list(of(draws)) for of in (proportions, differences, twins)}
    for p in ACCURACIES:
        cells = [c for c in simulated["proportions"] if c.setting[0] == p]
        least = [min(c.coverage for c in cells if c.setting[1:3] == (n, k)) for k in (3, 11) for n in CONTEXTS]
        what = f"accuracy {p}, {CONTEXTS} contexts of 3 positions, then of 11; least of three correlations"
        yield Line(what, numbers(np.multiply(100, least), 1) + " %", "≥ 93 %", min(least) >= wanted - chance)
    for name, cells in simulated.items():
        least, of_t, width = (min(getattr(c, of) for c in cells) for of in ("coverage", "t_coverage", "smallest"))
        found = f"least {100 * least:.1f} % (Student's t: {100 * of_t:.1f} %), smallest width {100 * width:.2f} points"
        yield Line(f"{name}, {len(cells)} settings", found, "≥ 93 %, > 0", least >= wanted - chance and width > 0)


def rounding(options: Options) -> Iterator[Line]:
    """A5: a model that is cast before it gets an adapter has frequencies of float32."""
    ids, config = torch.arange(90)[None], LayerRopeConfig(layer_factors=[1.002] * 4)
    angles = torch.arange(90).double()[:, None] * 10_000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    expected, eps = (angles / 1.002).cos(), torch.finfo(torch.bfloat16).eps
    model = get_peft_model(build_model("llama").to(torch.bfloat16), config)
    cos = tables_of(model, ids)[0][0]
    lost = f"(1.000: by {float((angles.cos() - expected).abs().max()):.2g})"
    yield equal(f"1.002 after .to(bfloat16): cosines against float64 {lost}", cos[0, :, :8], expected, eps)
    exact = tables_of(get_peft_model(build_model("llama"), config), ids)[0][0]
    yield equal("the same against the float32 model's, rounded once", cos, exact.to(torch.bfloat16))
    found = verify(model)
    yield Line("verify", numbers([check.measured for check in found.layers]), "1.002, by bfloat16's cosines", found.ok)
    yield counted("casts in any order, disabling; verify of rounded factors", "tests/tuner/test_frequencies.py")


def gemma(options: Options) -> Iterator[Line]:
    """Gemma 3 270M, two ropes in one model: losses on 700 tokens are those of transformers' own model."""
    path, report, names = real_model("gemma-3-270m"), options.folder / "it.json", ("none", "linear:2", "dynamic:2")
    text = {"task": "perplexity", "data": SAMPLE_TEXT, "length": 700, "groups": 1, "dtype": "float32"}
    layerrope("evaluate", path, *(f"--baseline={name}" for name in names), **text, json=report)
    task = Perplexity(SAMPLE_TEXT.read_text(), tokenizer=AutoTokenizer.from_pretrained(path), length=700)
    example = task.split("test", 1).examples[0]
    ids = torch.tensor([example.context_ids + example.query_ids + example.answer_ids])
    for name, found in zip(names, json.loads(report.read_text())["scores"].values(), strict=True):
        config = AutoConfig.from_pretrained(path)
        if name != "none":
            config.rope_parameters["full_attention"] |= {"rope_type": name.removesuffix(":2"), "factor": 2.0}
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()
        with torch.no_grad():
            expected, loss = float(model(ids, labels=ids).loss), found["average_loss"]
        holds = abs(loss - expected) < 2e-4
        yield Line(f"{name}, the text that is shipped, {ids.shape[1]} tokens", f"{loss:.4f}", f"{expected:.4f}", holds)


def door(options: Options, how: list[object], model: Any, tokenizer: Any) -> Iterator[Line]:
    """`evaluate` and `search` at the command line, and on the same model loaded without the package."""
    report, output, names = options.folder / "it.json", options.folder / "out", ("none", "uniform:1.2")
    groups, task = options.contexts, KeyValueRetrieval(tokenizer, **PAIRS)
    settings = {"task": "kv_retrieval", "device": "cpu", **PAIRS}
    layerrope("evaluate", *how, *(f"--baseline={n}" for n in names), **settings, groups=groups, json=report)
    found = preflight(Scorer(model), task, wanted={"test": groups})
    examples = with_targets(task.split("test", groups), found, task)
    expected = compare(model, examples, [parse_baseline(n) for n in names]).to_dict()["scores"]
    for (label, own), by_hand in zip(json.loads(report.read_text())["scores"].items(), expected.values(), strict=True):
        both = (own, json.loads(to_json(by_hand)))
        cells = (f"{numbers(v['accuracy_by_position'], 2)}; {numbers(v['log_prob_by_position'])}" for v in both)
        yield Line(f"evaluate, {label}, {groups} contexts: right; log-probability", *cells, both[0] == both[1])
    if not options.steps:
        return
    layerrope("search", *how, "--anyway", "--overwrite", **settings, **FEW, steps=options.steps, output=output)
    saved = json.loads((output / "search.json").read_text())
    result = search(model, task, steps=options.steps, anyway=True, progress=False, **FEW)
    factors, table = result.config.layer_factors, json.loads(to_json(result.to_dict()["table"]))
    cells = numbers(saved["layer_factors"], 3), numbers(factors, 3)
    yield Line(f"search, {options.steps} steps: factors", *cells, saved["layer_factors"] == factors)
    same = sum(one == other for one, other in zip(saved["table"], table, strict=True))
    yield Line("search: rows of the held-out table that are equal", str(same), str(len(table)), same == len(table))


def gguf(options: Options) -> Iterator[Line]:
    """A model straight from its GGUF file, in bfloat16."""
    file = options.gguf or models_folder() / f"{options.model}.gguf"
    if not file.exists():
        pytest.skip(f"there is no {file.name}: --gguf FILE")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    unpacked = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(**where, **unpacked).eval()
    how = [file.parent, "--gguf-file", file.name, "--dtype", "bfloat16"]
    yield from door(options, how, model, AutoTokenizer.from_pretrained(**where))


def four_bits(options: Options) -> Iterator[Line]:
    """A model whose weights bitsandbytes quantises while it is loaded."""
    pytest.importorskip("bitsandbytes")
    path = real_model(options.model)
    quantized = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **quantized).eval()
    how = [path, "--model-args", "load_in_4bit=True,dtype=bfloat16"]
    yield from door(options, how, model, AutoTokenizer.from_pretrained(path))


def lora(options: Options) -> Iterator[Line]:
    """A LoRA of one's own, which this repository's example trains in ten steps."""
    path, tuned = real_model(options.model), options.folder / "lora"
    if not (tuned / "adapter_config.json").exists():
        given = f"--model {path} --pairs 5 --steps 10 --contexts 2 --output {tuned}".split()
        subprocess.run([sys.executable, TESTS.parent / "examples" / "train_lora.py", *given], check=True)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, tuned).merge_and_unload(safe_merge=True).eval()  # rounded otherwise without
    how = [path, "--model-args", f"dtype=bfloat16,peft={tuned}"]
    yield from door(options, how, model, AutoTokenizer.from_pretrained(path))


def thinking(options: Options) -> Iterator[Line]:
    """A Qwen3 of a few layers, whose template leaves `<think>` to the model: scored at the answer, closed before it."""
    folder, report, tokenizer = options.folder / "qwen3", options.folder / "it.json", with_template(QWEN3)
    save(folder, QWEN3, "qwen3")
    model, pairs = AutoModelForCausalLM.from_pretrained(folder).eval(), {**PAIRS, "num_keys": 5}
    for variables in ({"enable_thinking": False}, {"enable_thinking": True}):
        given = {"chat_template_args": json.dumps(variables), "groups": 1, "json": report}
        layerrope("evaluate", folder, "--teacher-forced", task="kv_retrieval", **pairs, **given)
        (own,), expected, ends = json.loads(report.read_text())["scores"].values(), [], set()
        for prompt in KeyValueRetrieval(tokenizer, **pairs).prompts("test", 1):
            chat = {"add_generation_prompt": True, "tokenize": False, **variables}
            text = tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}], **chat)
            ids, gold = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, prompt.answers[0]))
            lines = logits(model, torch.tensor([ids + gold]))[0, len(ids) - 1 : -1].log_softmax(-1)
            expected.append(float(lines[range(len(gold)), gold].clamp(min=-math.log(600)).sum()))
            ends.add(f"token {len(ids)}, after {text[text.index('assistant') :]!r}")
        own = own["log_prob_by_position"]
        holds = bool(np.allclose(own, expected, atol=1e-3))
        yield Line(f"{variables}: answer from {' / '.join(sorted(ends))}", numbers(own), numbers(expected), holds)


def bad_input(options: Options) -> Iterator[Line]:
    """One clear line, before any long work, and no files left."""
    here, tuned = options.folder, options.folder / "fine-tunes"
    (here / "text.gguf").write_bytes(b"hello")
    (here / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    templates = {"raises": "{{ raise_exception('no users here') }}", "no Jinja": "{{ 1 + }}", "no message": "hello"}
    for name, template in {"good": QWEN3, "bare": None, **templates}.items():
        save(here / name, template)
    tuned.mkdir()
    bases, good = _other_bases(tuned), here / "good"
    models = ["text.gguf", "cut.gguf", "none.gguf", "nowhere", "bare", "fine-tunes/wider", *templates]
    cases = {f"model {name}": [here / name] for name in models}
    cases["quantise a GGUF"] = [here / "cut.gguf", "--model-args", "load_in_4bit=true"]
    wrong = ["attn_implmentation=eager", "peft", "revision=a,revision=b", "load_in_4bit=true,load_in_8bit=true"]
    wrong += ["load_in_4bit=yes", "bnb_4bit_quant_type=nf4", "device=cpu,device_map=cpu", "dtype=float23"]
    wrong += ["pretrained=elsewhere", "tokenizer=./nowhere", "attn_implementation=none_such", "gguf_file=x.gguf"]
    cases |= {f"--model-args {given}": [good, "--model-args", given] for given in wrong}
    cases |= {f"peft={kind}": [good, "--model-args", f"peft={path}"] for kind, path in bases.items()}
    for given in ("{enable_thinking: false}", '{"enable_thinkin": false}', '{"tokenize": true}'):
        cases[f"--chat-template-args {given}"] = [good, "--chat-template-args", given]
    cases["--system-prompt without a template"] = [good, "--no-chat-template", "--system-prompt", "x"]
    settings = {"task": "kv_retrieval", **PAIRS, "num_keys": 5}
    layerrope("evaluate", good, "--teacher-forced", **settings, groups=2)  # nothing else is wrong
    for what, words in cases.items():
        yield refused(what, here, *words, **settings)


def chat_template(options: Options) -> Iterator[Line]:
    """By position, raw against the chat template: 100 word pairs, and 10 documents."""
    path, words = real_model(options.model), {"num_keys": 100, "keys": "syllables"}
    documents = {"num_documents": 10, "data": options.documents}
    for task, settings in {"kv_retrieval": words, "multi_doc_qa": documents}.items():
        if task == "multi_doc_qa" and options.documents is None:
            pytest.skip("documents: --documents FILE, the public file of questions and oracle passages")
        for chat in ("--no-chat-template", "--chat-template"):
            kept = options.folder / f"{task}{chat}-{options.contexts}"
            given = {"task": task, **settings, "num_positions": 5, "groups": options.contexts, "output": kept}
            layerrope("evaluate", path, chat, "--resume", **given)
            (found,) = json.loads((kept / "evaluation.json").read_text())["scores"].values()
            percents = " / ".join(f"{100 * value:.0f}" for value in found["accuracy_by_position"])
            yield Line(f"{task} {chat}, {options.contexts} contexts", f"{percents} %")


_WITHOUT = (non_finite, two_ropes, memory, intervals, rounding, thinking, bad_input)
ROWS = {row.__name__: row for row in (*_WITHOUT, gemma, gguf, four_bits, lora, chat_template)}


def measured(row: Callable[[Options], Iterator[Line]], options: Options) -> dict[str, Any]:
    lines, start = [], time.perf_counter()
    try:
        for line in row(options):
            lines.append(line._replace(holds=line.holds if line.holds is None else bool(line.holds))._asdict())
    except pytest.skip.Exception as error:
        lines.append(Line("the rest is skipped", str(error))._asdict())
    return {"seconds": time.perf_counter() - start, "lines": lines}


def show(name: str, found: dict[str, Any]) -> None:
    verdicts = [line["holds"] for line in found["lines"] if line["holds"] is not None]
    said = f"{sum(verdicts)} of {len(verdicts)} as expected, {found['seconds']:.0f} s"
    print(f"\n**{name}**: {ROWS[name].__doc__} {said}.\n\n| what | found | expected | so |\n| --- | --- | --- | --- |")
    for line in found["lines"]:
        cells = [line["what"], line["found"], line["expected"], {True: "yes", False: "**NO**", None: ""}[line["holds"]]]
        print("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct", help="of tests/real_models.py")
    parser.add_argument("--gguf", type=Path, help="default: MODEL.gguf beside the models' folders")
    parser.add_argument("--contexts", type=int, default=2, help="of each evaluation of a real model")
    parser.add_argument("--steps", type=int, default=3, help="of each search of a real model; 0: evaluate only")
    parser.add_argument("--documents", type=Path, help="nq-open-oracle.jsonl.gz, for chat_template")
    parser.add_argument("--folder", type=Path, help="keeps the LoRA, and evaluations that go on; default: none")
    parser.add_argument("--output", type=Path, help="JSON file of all rows")
    options = parser.parse_args()
    if unknown := [row for row in options.rows if row not in ROWS]:
        parser.error(f"there is no row {unknown[0]!r}, expected some of {', '.join(ROWS)}")
    done = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own
    kept, names = options.folder, options.rows or list(ROWS)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            options.folder = kept / name if kept and name in ("lora", "chat_template") else Path(folder)
            options.folder.mkdir(parents=True, exist_ok=True)
            done[name] = done.get(name) or measured(ROWS[name], options)
        if options.output:
            options.output.write_text(to_json(done, indent=2) + "\n")
        show(name, done[name])
    return int(any(line["holds"] is False for name in names for line in done[name]["lines"]))


if __name__ == "__main__":
    sys.exit(main())
