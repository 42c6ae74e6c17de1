"""Files: written whole or not at all, strict JSON and plain YAML, adapters' files, and files from strangers; and what a
path or an id may be called in public.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError

from .errors import AdapterMismatchError, one_line, shown

DEMO_NAME = "peft_layerrope/demo"
"""How reports and adapters call the demo model: its path in the repository, whatever the machine."""
MAX_BYTES = 2**20
"""Upper limit of an adapter's files: a hundred times what 100 layers take."""


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """Reads a file of at most `limit` bytes; raises ValueError of others. Callers say what the file was for."""
    path = Path(path)
    if not path.is_file():
        raise ValueError("there is no such file")
    with path.open("rb") as file:
        content = file.read(limit + 1)  # and not as many as `stat` says: some files say 0
    if len(content) > limit:
        raise ValueError(f"is larger than {limit} bytes")
    return content


def read_json_object(path: str | Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON object in which no name occurs twice; raises ValueError of anything else, as [`read_bytes`] does."""
    content = read_bytes(path, limit)
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"must hold a JSON object, got {type(values).__name__}")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it has {shown(name)} twice")
        values[name] = value
    return values


def to_json(content: Any, *, indent: int | None = None) -> str:
    """Returns plain values as JSON, which knows no NaN and no infinity: such numbers become null. Without `indent` it
    is one line, in ASCII. Raises TypeError if there is anything but plain values.
    """
    return json.dumps(_finite(content), indent=indent, ensure_ascii=indent is None, allow_nan=False)


def to_float(value: float | None) -> float:
    """Returns a number that [`to_json`] wrote: what was not finite is null, and is no number again."""
    return math.nan if value is None else float(value)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content


_DEEPEST = 32


class _PlainLoader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # nine lines of aliases of aliases stand for a thousand million values
        if self.check_event(yaml.AliasEvent) or self._depth >= _DEEPEST:
            problem = f"aliases and more than {_DEEPEST} levels are not read: write the values out"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _without_base_60(tag: str) -> None:
    """Has `1:30` read as text. As the number in base 60 that it is in YAML 1.1 a long one takes quadratic time."""
    number = yaml.SafeLoader.yaml_constructors[tag]
    _PlainLoader.add_constructor(tag, lambda loader, node: node.value if ":" in node.value else number(loader, node))


_without_base_60("tag:yaml.org,2002:int")
_without_base_60("tag:yaml.org,2002:float")


def parse_yaml(text: str) -> Any:
    """Returns the plain values of a YAML document; raises yaml.YAMLError, also of aliases and of deep nesting."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # PyYAML's conversions of `!!bool x`, of the 99th of a month, of an integer of 5,000 digits
        raise yaml.YAMLError(f"a value cannot be converted: {type(error).__name__}") from error


_STAGING = "result.partial"
_UNWRITTEN = "cannot be written: "


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes of an `OSError` of a failed write one that says so and names the file, `path` if the system names none."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the writer of safetensors has no OSError
        known = error if isinstance(error, OSError) else OSError()
        reason = known.strerror or str(error)
        reason = reason if reason.startswith(_UNWRITTEN) else _UNWRITTEN + reason
        raise OSError(known.errno or errno.EIO, reason, str(known.filename or path)) from error


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: whoever reads it, after a crash or an OSError too, finds the old text or the new."""
    temporary = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # on a full disk it is in the way


@contextmanager
def replacing_files(folder: Path, last: str) -> Iterator[Path]:
    """Puts several files into a folder together, so that a half of them is never taken for the whole.

    They are written into an empty folder, which is yielded, and moved when all are there: until then, also after an
    `OSError`, `folder` is as it was. While they are moved, the file `last`, without which the others are nothing, is
    missing.
    """
    staging = folder / _STAGING
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if staging.exists():  # of a process that was killed here
            shutil.rmtree(staging)
        staging.mkdir()
        try:
            yield staging
            names = sorted((path.name for path in staging.iterdir()), key=lambda name: (name == last, name))
            for name in names:
                with open(staging / name, "rb+") as file:
                    os.fsync(file.fileno())
            (folder / last).unlink(missing_ok=True)
            for name in names:
                os.replace(staging / name, folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def digest(path: Path) -> str:
    """Returns a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder or repository, as PEFT was told of it."""

    location: str  # folder or Hub id
    subfolder: str | None = None  # of either
    download: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of `hf_hub_download`; may hold a token
    layer_factors: tuple[float, ...] | None = None  # as its `adapter_config.json` says

    def find(self, name: str, limit: int | None = MAX_BYTES) -> Path:
        """Returns the local path of a file, fetched from the Hub if need be and if it has at most `limit` bytes.

        Raises:
            AdapterMismatchError: there is no such file, or it is too large. The Hub client's own errors (no network,
                no such repository) come through.
        """
        folder = Path(self.location, self.subfolder or "")
        path, reason = folder / name, f"it has no {name}, expected that file and no other format"
        if path.is_file():
            return path
        if not folder.is_dir():
            where = {"repo_id": self.location, "filename": name, "subfolder": self.subfolder, **self.download}
            with suppress(RemoteEntryNotFoundError):
                size = hf_hub_download(**where, dry_run=True).file_size if limit is not None else 0
                if size <= (limit or 0):
                    return Path(hf_hub_download(**where))
                reason = f"{name} has {size} bytes, expected {limit} at most"
        raise AdapterMismatchError(f"cannot load adapter {self.location!r}: {reason}.")


def demo_model_path() -> str:
    """Returns the folder to load the demo model from, a small Llama trained by `examples/train_demo_model.py`."""
    return str(Path(__file__).with_name("demo"))


_CACHED_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")  # how the Hub's cache names a folder


def is_local_path(name: str) -> bool:
    """Whether a model's name is a path rather than an id of the Hub. `owner/name` counts as a path where it holds a
    model or an adapter, as it does for transformers and PEFT.
    """
    if name == DEMO_NAME:  # in this project's own folder it would look like a path
        return False
    folder = Path(name)
    is_folder = any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))
    return is_machine_path(name) or name.count("/") > 1 or "\\" in name or is_folder or name.endswith(".gguf")


def is_machine_path(text: str) -> bool:
    """Whether a text begins as a path does: `/`, `./`, `../`, `~`, `$HOME/`, `file:/`, or Windows' kinds."""
    is_absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    other = re.match(r"(~[\w.-]*|\.|\.\.|\$\w+|\$\{\w+\}|%\w+%|file:)([/\\]|$)", text, re.ASCII)
    return is_absolute or other is not None


def public_name(name: str) -> str:
    """Returns the name of a model without a path: the id, or the last component of a folder's path."""
    if not is_local_path(name):
        return name
    path = Path(os.path.expanduser(name))
    if path.is_dir() and path.resolve() == Path(demo_model_path()).resolve():
        return DEMO_NAME
    cached = _CACHED_SNAPSHOT.search(name)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    return last_component(name)


def last_component(path: str) -> str:
    """Returns the last component of a path of any system, `..` and `.` resolved."""
    if "\\" in path:
        return PureWindowsPath(path).name
    return Path(os.path.expanduser(path)).resolve().name  # of pathlib's an unknown `~user` is an error
