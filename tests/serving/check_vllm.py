"""vLLM beside transformers: tokens, log-probabilities, speed, LoRA, exports, other backends, and servers over HTTP.

    python tests/serving/check_vllm.py [MODEL_FOLDER] [STAGE...] [--prompts 50] [--length 24] [--tokens 12] [--rounds 9]
    python tests/serving/check_vllm.py MODEL_FOLDER curve --adapter FOLDER --contexts 20 --pairs 100

Needs vLLM, and `curve` lm-evaluation-harness; `tests/serving/run.sh` makes an environment with both. Each line says
what was compared and the figures; the exit status is 1 if one of them is not as promised.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # several engines in this process; servers have their own
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from real_models import real_model_path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import peft_layerrope
from peft_layerrope import AdapterMismatchError, LayerRopeConfig, LayerRopeError
from peft_layerrope.serving.check import check_server, server_log_probs
from peft_layerrope.serving.export import FORMATS, export
from peft_layerrope.tuner.artifacts import save_adapter
from peft_layerrope.tuner.sites import table_types

WINDOW = 512
ROOM = 128  # tokens that a served prompt has room for beside itself
CACHE = 256 * 2**20  # bytes of keys and values of each engine
TOLERANCE = 1e-3  # of log-probabilities in float32
failed: list[str] = []


def say(what: str, holds: bool, figures: str) -> None:
    print(f"{'ok  ' if holds else 'FAIL'} {what}: {figures}", flush=True)
    if not holds:
        failed.append(what)


def write_adapter(folder: Path, layer_factors: list[float], **settings: object) -> str:
    folder.mkdir()
    save_adapter(LayerRopeConfig(layer_factors=layer_factors, task_type="CAUSAL_LM", **settings), folder)
    return str(folder)


def drawn(num_layers: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [round(rng.uniform(1.0, 2.0), 2) for _ in range(num_layers)]


class Reference:
    """What transformers and PEFT answer, in float32, to prompts of one length."""

    def __init__(self, model: torch.nn.Module, prompts: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(prompts)
        asked = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            self.tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
            self.tokens = self.tokens[:, ids.shape[1] :].tolist()
            self.prompt_log_probs = []
            for row in ids.split(1):
                found = model(input_ids=row).logits[0, :-1].log_softmax(-1)
                self.prompt_log_probs.append(found.gather(1, row[0, 1:, None])[:, 0].numpy())


def engine(model: str, adapter: str | None, **settings: object):
    from vllm import LLM

    return LLM(
        model,
        dtype="float32",
        max_model_len=min(WINDOW, AutoConfig.from_pretrained(model).max_position_embeddings),
        kv_cache_memory_bytes=CACHE,
        disable_log_stats=True,
        additional_config={} if adapter is None else {"layer_rope": adapter},
        **{"enforce_eager": True, **settings},
    )


def answers(llm, prompts: list[list[int]], num_tokens: int, **request: object):
    """Greedy tokens, the log-probabilities that they were chosen by, and those of the prompts' tokens: none of an
    engine with LoRA, for which vLLM's CPU build has code for one row of a prompt only.
    """
    from vllm import SamplingParams

    of_prompt = None if llm.llm_engine.vllm_config.lora_config else 0
    wanted = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=2, prompt_logprobs=of_prompt
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], wanted, use_tqdm=False, **request)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    steps = [[{t: v.logprob for t, v in s.items()} for s in output.outputs[0].logprobs] for output in outputs]
    of_prompts = [
        np.array(
            [step[token].logprob for step, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)]
        )
        for o in outputs
        if o.prompt_logprobs is not None
    ]
    return tokens, steps, of_prompts


def compare(what: str, found, wanted: Reference) -> None:
    tokens, steps, of_prompts = found
    different = []
    for row, (got, expected) in enumerate(zip(tokens, wanted.tokens, strict=True)):
        first = next((i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]), None)
        if first is not None:
            step = steps[row][first]
            gap = step[got[first]] - step.get(expected[first], -np.inf)
            different.append(f"prompt {row}, token {first}, log-probabilities {gap:.2g} apart")
    figures = (
        f"equal on {len(tokens) - len(different)} of {len(tokens)} prompts; {'; '.join(different) or 'none differs'}"
    )
    say(f"{what}: greedy tokens", not different, figures)
    if of_prompts:
        worst = max(np.abs(a - b).max() for a, b in zip(of_prompts, wanted.prompt_log_probs, strict=True))
        say(f"{what}: log-probabilities of prompts", worst <= TOLERANCE, f"differ by {worst:.2g} at most")


def tokens(here: Setup) -> None:
    plain, scaled, ones = (here.answers(adapter) for adapter in (None, here.adapter, here.ones))
    same = ones[:2] == plain[:2] and all(map(np.array_equal, ones[2], plain[2]))
    say("factors of 1 against plain vLLM", same, "bit for bit" if same else "not equal")
    changed = sum(a != b for a, b in zip(here.scaled.tokens, here.unscaled.tokens, strict=True))
    say("the adapter changes tokens", changed >= len(here.prompts) // 2, f"on {changed} of {len(here.prompts)} prompts")
    compare("vLLM without factors", plain, here.unscaled)
    compare("vLLM with the adapter", scaled, here.scaled)


def throughput(here: Setup) -> None:
    from vllm import SamplingParams

    batch = [{"prompt_token_ids": prompt} for prompt in list(itertools.islice(itertools.cycle(here.prompts), 32))]
    wanted = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    engines, ratios = (here.engine(None), here.engine(here.adapter)), []
    for number in range(here.rounds + 2):
        seconds = {}
        for llm in engines if number % 2 else engines[::-1]:
            llm.reset_prefix_cache()
            started = time.perf_counter()
            llm.generate(batch, wanted, use_tqdm=False)
            seconds[llm] = time.perf_counter() - started
        ratios.append(seconds[engines[0]] / seconds[engines[1]])
    low, median, high = statistics.quantiles(ratios[2:], n=4)
    figures = f"{median:.3f}, quartiles {low:.3f} to {high:.3f}, {here.rounds} interleaved rounds of 32 prompts"
    say("throughput, adapter / none", median >= 0.99, figures)


def lora(here: Setup) -> None:
    from vllm.lora.request import LoRARequest

    folder = here.folder / "lora"
    torch.manual_seed(0)
    tuned = get_peft_model(here.load(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(folder)
    prompts = here.prompts[:10]
    llm = engine(here.model, here.adapter, enable_lora=True, max_lora_rank=8)
    found = answers(llm, prompts, here.num_tokens, lora_request=LoRARequest("tuned", 1, str(folder)))
    without = answers(llm, prompts, here.num_tokens)
    both = PeftModel.from_pretrained(tuned.merge_and_unload(), here.adapter).eval()
    compare("adapter and a LoRA request", found, Reference(both, prompts, here.num_tokens))
    compare("the same engine without that request", without, here.reference(here.adapter, prompts))


def backend(here: Setup) -> None:
    """The last stage: vLLM changes transformers' classes for good."""
    wanted = here.scaled
    llm = engine(here.model, here.adapter, model_impl="transformers")
    compare("vLLM with transformers' code", answers(llm, here.prompts, here.num_tokens), wanted)


def compiled(here: Setup) -> None:
    """Twice from one path with other factors: compiled code of the first must not serve the second."""
    path, prompts = here.folder / "changing", here.prompts[:10]
    for factors in ([1.0] * (here.num_layers - 1) + [1.5], drawn(here.num_layers, 1)):
        shutil.rmtree(path, ignore_errors=True)
        adapter = write_adapter(path, factors)
        found = answers(engine(here.model, adapter, enforce_eager=False), prompts, here.num_tokens)
        compare(f"compiled, {len(set(factors))} factors", found, here.reference(adapter, prompts))


def baked(here: Setup) -> None:
    folder = str(here.folder / "baked")
    PeftModel.from_pretrained(here.load(), here.adapter).merge_and_unload().save_pretrained(folder)
    here.tokenizer.save_pretrained(folder)
    compare("a baked checkpoint", answers(engine(folder, None), here.prompts, here.num_tokens), here.scaled)


def exports(here: Setup) -> None:
    """Checkpoints that need no library, opened by transformers; then vLLM, without factors of its own, on those that it
    knows.
    """
    kinds, drawn_ones = table_types(here.load(), here.num_layers), drawn(here.num_layers, 0)
    window = AutoConfig.from_pretrained(here.model).max_position_embeddings
    fixed = {"rope_type": "dynamic", "factor": 2.0, "target_length": 2 * window}
    by_type = {kind: 1.3 + 0.4 * number for number, kind in enumerate(dict.fromkeys(kinds))}
    asked = {
        "granite-swa": {"layer_factors": drawn_ones, **fixed},
        "mellum": {"layer_factors": [1.0 + layer % 2 for layer in range(here.num_layers)]},
        "layer-types": {"layer_factors": [by_type[kind] for kind in kinds]},
        "remote-code": {"layer_factors": drawn_ones},
    }
    for form in FORMATS:
        folder, adapter = here.folder / form, write_adapter(here.folder / f"{form}-adapter", **asked[form])
        try:
            difference = export(here.load(), here.tokenizer, LayerRopeConfig.from_pretrained(adapter), form, folder)
        except AdapterMismatchError as error:
            print(f"     {form}: {error}", flush=True)
            continue
        opened = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=form == "remote-code", attn_implementation="eager"
        )
        wanted = here.reference(adapter, here.prompts)
        found = Reference(opened.eval(), here.prompts, here.num_tokens)
        equal = sum(map(list.__eq__, found.tokens, wanted.tokens))
        figures = f"greedy tokens equal on {equal} of {len(here.prompts)} prompts, logits within {difference:.2g}"
        say(f"{form}, opened by transformers", equal == len(here.prompts), figures)
        if form == "layer-types":
            compare(f"{form}, in vLLM", answers(engine(str(folder), None), here.prompts, here.num_tokens), wanted)


def curve(here: Setup) -> None:
    """Accuracy by position through servers, asked by lm-evaluation-harness, against our own evaluation."""
    adapter, data = here.measured, here.folder / "prompts.jsonl"
    task = ["--task", "kv_retrieval", "--num-keys", str(here.pairs), "--keys", "syllables", "--no-chat-template"]
    task += ["--num-positions", "5"]
    run = partial(subprocess.run, check=True, text=True, stdout=subprocess.PIPE)
    layerrope = [sys.executable, "-m", "peft_layerrope"]
    data.write_text(run([*layerrope, "prompts", here.model, *task, "--limit", str(5 * here.contexts)]).stdout)
    longest = max(len(here.tokenizer(json.loads(line)["prompt"])["input_ids"]) for line in data.open())
    room = longest + ROOM
    served = []
    for number, of_server in enumerate((None, adapter)):
        results = here.folder / f"served{number}"
        with server(here.model, of_server, 8421 + number, length=room) as url:
            given = {"model": here.model, "tokenizer": here.model, "base_url": f"{url}/v1/completions"}
            given |= {"num_concurrent": 4, "tokenized_requests": False}
            arguments = ["--model_args", ",".join(f"{key}={value}" for key, value in given.items())]
            arguments += ["--metadata", json.dumps({"data": str(data)}), "--output_path", f"{results}/found.json"]
            run([*layerrope, "lm-eval", "--model", "local-completions", "--tasks", "layerrope_kv", *arguments])
        found = json.loads(next(results.glob("*.json")).read_text())["results"]["layerrope_kv"]
        served.append([v for k, v in sorted(found.items()) if k.startswith("acc_position") and "stderr" not in k])
    compared = ["--baseline", "none", "--adapter", adapter, "--groups", str(here.contexts), "--dtype", "float32"]
    own = here.folder / "own"
    run([*layerrope, "evaluate", here.model, *task, *compared, "--output", str(own)])
    scores = json.loads((own / "evaluation.json").read_text())["scores"].values()
    for what, through, score in zip(("without the adapter", "with the adapter"), served, scores, strict=True):
        by_hand = score["accuracy_by_position"]
        same = np.allclose(through, by_hand, atol=1e-5)
        shown = (" ".join(f"{100 * value:.0f}" for value in values) for values in (through, by_hand))
        say(f"accuracy by position, {what}", same, "{} through a server, {} by evaluate".format(*shown))


NATIVE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "phi3", "olmo2")
"""Families that vLLM has code of its own for."""


def families(here: Setup) -> None:
    """Tiny models with random weights, large enough for attention to look at where a token stands."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 6, "head_dim": 64, "max_position_embeddings": WINDOW, "initializer_range": 0.2}
    prompts = here.prompts[:10]
    for family in NATIVE:
        folder, ends = here.folder / family, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=len(here.tokenizer), **shape, **ends)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        here.tokenizer.save_pretrained(folder)
        adapter = write_adapter(here.folder / f"{family}-adapter", drawn(config.num_hidden_layers, 3))
        plain, adapted = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
            for _ in range(2)
        )
        wanted = Reference(PeftModel.from_pretrained(adapted, adapter).eval(), prompts, here.num_tokens)
        unscaled = Reference(plain, prompts, here.num_tokens)
        apart = max(
            np.abs(a - b).max() for a, b in zip(wanted.prompt_log_probs, unscaled.prompt_log_probs, strict=True)
        )
        say(f"{family}: the factors do something", apart > 100 * TOLERANCE, f"log-probabilities {apart:.2g} apart")
        compare(family, answers(engine(str(folder), adapter), prompts, here.num_tokens), wanted)


def http(here: Setup) -> None:
    other = write_adapter(here.folder / "other", [f + 0.5 for f in drawn(here.num_layers, 7)])
    wrong = write_adapter(here.folder / "wrong", [1.5] * (here.num_layers - 1))
    model, prompts = here.load(), here.prompts[:4]
    with server(here.model, here.adapter, 8411) as first, server(here.model, other, 8412) as second:
        for url, adapter, own in ((first, here.adapter, True), (second, other, True), (second, here.adapter, False)):
            found = check_server(url, model, LayerRopeConfig.from_pretrained(adapter), prompts)
            try:
                found.raise_unless_scaled()
                recognized = True
            except LayerRopeError:
                recognized = False
            say(f"serve-check of {url} with {Path(adapter).name}", recognized == own, str(found))
        worst = max(
            np.abs(a - b).max()
            for a, b in zip(server_log_probs(first, prompts), here.scaled.prompt_log_probs, strict=False)
        )
        say("log-probabilities over HTTP", worst <= TOLERANCE, f"differ by {worst:.2g} at most")
    done = subprocess.run(command(here.model, wrong, 8413), capture_output=True, text=True, timeout=600, check=False)
    told = [line for line in (done.stdout + done.stderr).splitlines() if "layer_factors has" in line]
    say("a server with too few factors", done.returncode != 0 and bool(told), (told or ["no word of it"])[-1][-160:])


def command(model: str, adapter: str | None, port: int, length: int = WINDOW) -> list[str]:
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(length), "--port", str(port)]
    options += ["--kv-cache-memory-bytes", str(CACHE)]
    options += [] if adapter is None else ["--additional-config", json.dumps({"layer_rope": adapter})]
    # what `vllm serve` starts; the command itself asks for the version of a package that the CPU build is not called by
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]


@contextmanager
def server(model: str, adapter: str | None, port: int, length: int = WINDOW, patience: float = 900) -> Iterator[str]:
    process = subprocess.Popen(command(model, adapter, port, length))
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + patience
    try:
        while True:
            try:
                urlopen(f"{url}/health", timeout=10).close()
                break
            except URLError:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"no server at {url}") from None
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


class Setup:
    """The model, its adapters and prompts, and what transformers answers."""

    def __init__(self, model: str, folder: Path, asked: argparse.Namespace) -> None:
        self.model, self.folder, self.num_tokens, self.rounds = model, folder, asked.tokens, asked.rounds
        self.contexts, self.pairs = asked.contexts, asked.pairs
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.num_layers = AutoConfig.from_pretrained(model).num_hidden_layers
        self.adapter = write_adapter(folder / "adapter", drawn(self.num_layers, 0))
        self.ones = write_adapter(folder / "ones", [1.0] * self.num_layers)
        text = (Path(peft_layerrope.__file__).parent / "searcher" / "sample_text.txt").read_text(encoding="utf-8")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(self.tokenizer.unk_token_id) > len(ids) / 10:  # the demo model has no words for it
            ids = torch.randint(20, len(self.tokenizer), (2000,), generator=torch.Generator().manual_seed(0)).tolist()
        starts = np.linspace(0, len(ids) - asked.length, asked.prompts).astype(int)
        self.prompts = [ids[start : start + asked.length] for start in starts]
        mild = [round(factor**0.1, 2) for factor in drawn(self.num_layers, 0)]
        self.measured = asked.adapter or write_adapter(folder / "mild", mild)
        self.engines: dict[str | None, object] = {}

    def load(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def reference(self, adapter: str, prompts: list[list[int]]) -> Reference:
        return Reference(PeftModel.from_pretrained(self.load(), adapter).eval(), prompts, self.num_tokens)

    @cached_property
    def unscaled(self) -> Reference:
        return Reference(self.load(), self.prompts, self.num_tokens)

    @cached_property
    def scaled(self) -> Reference:
        return self.reference(self.adapter, self.prompts)

    def engine(self, adapter: str | None):
        if adapter not in self.engines:
            self.engines[adapter] = engine(self.model, adapter)
        return self.engines[adapter]

    def answers(self, adapter: str | None):
        return answers(self.engine(adapter), self.prompts, self.num_tokens)


STAGES: dict[str, Callable[[Setup], None]] = {
    stage.__name__: stage
    for stage in (tokens, throughput, baked, compiled, lora, exports, families, http, curve, backend)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES])
    sizes = {"prompts": 50, "length": 24, "tokens": 12, "rounds": 9, "contexts": 10, "pairs": 20}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--adapter", help="whose curve is measured; default: one of factors near 1")
    arguments = parser.parse_args()
    model = arguments.model or str(real_model_path("smollm2-135m-instruct"))
    with tempfile.TemporaryDirectory() as folder:
        here = Setup(model, Path(folder), arguments)
        for name in arguments.stages or STAGES:
            STAGES[name](here)
            here.engines.clear()  # servers need the memory
            gc.collect()
    print(f"{len(failed)} of these are not as promised" if failed else "all as promised")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
