"""Tiny models of the supported families, built from configurations, and real ones that have been fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "300"  # rich asks once, at import: the width of whatever terminal the tests run in
if "PYTEST_XDIST_WORKER" in os.environ:  # each has a core, and more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from real_models import MODELS, MissingModelError, real_model_path
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version
from transformers.utils import logging as transformers_logging

import peft_layerrope

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

IS_OLDER = Version(transformers.__version__) < Version("5.23")
"""Whether transformers is one of those that `.ci/lowest` tests with, in which a few things fail or are not there."""


def _refusal() -> str:
    """Why transformers' own adapter methods refuse the installed PEFT; empty if they take it."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        return f"transformers {transformers.__version__} refuses PEFT {peft.__version__} in its own methods: {error}"
    return ""


needs_adapter_methods = pytest.mark.skipif(bool(_refusal()), reason=_refusal())
"""Of tests that call `add_adapter`, `set_adapter`, ... of a transformers model that is no PeftModel."""

NUM_LAYERS = 4
VOCAB = 99
WINDOW = 64


def length_dependent_ropes(window: int) -> dict[str, dict]:
    """`rope_parameters` of transformers' types whose frequencies follow the length, for a trained window in tokens."""
    scaled = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i / 4 for i in range(8)]}
    return {
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": window, **scaled},
    }


_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.2,  # large enough that positions matter to the logits
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

FAMILIES: dict[str, dict] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma2": {**_GROUPED, "head_dim": 16},
    "gpt_neox": {**_COMMON, "rotary_pct": 0.5},
}


def build_model(model_type: str, **overrides: object) -> PreTrainedModel:
    """A tiny randomly initialised model; the same weights at every call."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **{**FAMILIES[model_type], **overrides})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model: torch.nn.Module, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.fixture
def ids() -> torch.Tensor:
    """Two prompts of 40 tokens, inside the window."""
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def long_ids() -> torch.Tensor:
    """Two prompts of twice the window."""
    return torch.randint(0, VOCAB, (2, 2 * WINDOW), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(peft_layerrope.demo_model_path())


@pytest.fixture
def demo_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(peft_layerrope.demo_model_path()).eval()


def real_model(name: str) -> Path:
    """The folder of a model that `tests/real_models.py` fetches.

    Where it is missing, skips the test, or fails it if LAYERROPE_REQUIRE_MODELS=1.
    """
    try:
        return real_model_path(name)
    except MissingModelError as error:
        if os.environ.get("LAYERROPE_REQUIRE_MODELS") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return real_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def smollm2_model(smollm2) -> PreTrainedModel:
    """In float32; each test has its own, which it may change."""
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around all others, so that these lines are the last
def pytest_terminal_summary(terminalreporter) -> Iterator[None]:
    yield
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", ())]
    for name in MODELS:
        if skipped := reasons.count(f"Skipped: {MissingModelError(name)}"):
            terminalreporter.write_line(f"{MissingModelError(name)}; tests skipped for want of it: {skipped}")
