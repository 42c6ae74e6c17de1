"""Adapters from strangers: what a folder holds is scaled as it says, or refused in one clear line. Never anything else.

Each case goes through `PeftModel.from_pretrained` on a live model, which is compared bit for bit afterwards.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fuzzing import (
    CONFIG,
    FACTORS,
    FIELDS,
    KEY,
    WINDOW,
    Bench,
    check_measured,
    check_message,
    deadline,
    factors_file,
    safetensors_bytes,
    tiny_model,
    write_adapter,
)
from huggingface_hub import constants, hf_api
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback_hub import loopback_hub
from peft import PeftModel
from typer.testing import CliRunner

import peft_layerrope
from peft_layerrope import LayerRopeError, SearchError, restore_baked, verify
from peft_layerrope.base_model import ModelSource, load_base
from peft_layerrope.cli import app
from peft_layerrope.files import parse_yaml
from peft_layerrope.loading import load_adapter, load_adapter_config
from peft_layerrope.searcher.settings import SearchSpecification, read_specification
from peft_layerrope.tuner.tables import LayerScaling

FEWEST_CASES = 5000
EXAMPLES = {"one_field": 1200, "several_fields": 600, "plausible": 1200, "headers": 700, "baked": 300, "yaml": 400}

fuzz = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

numbers = st.one_of(
    st.sampled_from([0, -0.0, -1, 1, 2, 0.5, 5e-324, 1e-310, -1e-310, 1e-30, 1e30, 1.8e308, 1e9, 10**9, 2**31, 2**63]),
    st.sampled_from([10**19, -(10**40), 10**400, float("nan"), float("inf"), -float("inf")]),
    st.floats(),
    st.integers(),
)
texts = st.one_of(
    st.sampled_from(["", "1.5", "NaN", "default", "LAYER_ROPE", "[/]", "\x1b[31m", "\ud800", "../..", "a" * 100_000]),
    st.text(max_size=20),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
junk = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that a second one only costs time
    yield Bench(tmp_path_factory.mktemp("good"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def test_one_field_of_the_config(bench, folder):
    """A field's value is replaced by anything; the message of a refusal names the field."""

    @settings(fuzz, max_examples=EXAMPLES["one_field"])
    @given(st.sampled_from(FIELDS), junk)
    def run(field: str, value: Any) -> None:
        if field == "peft_type" and value in ("LORA",):
            return
        config = {**CONFIG, field: value}
        weights = factors_file(value) if field == "layer_factors" and _floats(value) else None
        bench.try_adapter(write_adapter(folder, config, weights), field)

    run()


def _floats(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, float) for v in value)


def test_several_fields_of_the_config(bench, folder):
    """Fields are replaced, left out, and added."""

    @settings(fuzz, max_examples=EXAMPLES["several_fields"])
    @given(
        st.dictionaries(st.sampled_from(FIELDS[:8] + FIELDS[9:]), junk, max_size=4),
        st.sets(st.sampled_from(FIELDS), max_size=3),
        st.dictionaries(texts | st.sampled_from(["self", "cls", "kwargs", "runtime_config"]), junk, max_size=2),
    )
    def run(replaced: dict[str, Any], missing: set[str], added: dict[str, Any]) -> None:
        config = {name: v for name, v in {**added, **CONFIG, **replaced}.items() if name not in missing}
        bench.try_adapter(write_adapter(folder, config))

    run()


def test_plausible_configs(bench, folder):
    """Values of the right types, in and out of range; the tensor agrees, or just does not."""
    factor = st.floats(1e-3, 1e5) | st.floats(0.5, 4) | st.integers(1, 20)
    tokens = st.none() | st.integers(1, 10) | st.integers(1, 2**31) | st.integers(WINDOW - 2, 4 * WINDOW)

    @settings(fuzz, max_examples=EXAMPLES["plausible"])
    @given(
        st.sampled_from(["default", "linear", "dynamic"]),
        factor,
        st.none() | st.lists(factor, min_size=2, max_size=2) | st.lists(factor, max_size=4),
        tokens,
        tokens,
        st.sampled_from(
            ["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None]
        ),
        st.integers(0, 5),
    )
    def run(rope_type, factor, factors, window, length, task, off) -> None:
        config = {
            **CONFIG,
            "rope_type": rope_type,
            "factor": 1.0 if rope_type == "default" else factor,
            "layer_factors": factors,
            "original_max_position_embeddings": window,
            "target_length": length if rope_type == "dynamic" else None,
            "task_type": task if off < 2 else "CAUSAL_LM",
        }
        stored = list(factors or [1.0, 1.0])
        if off == 5:
            stored[0] *= 1.001
        bench.try_adapter(write_adapter(folder, config, factors_file(stored)))

    run()


def test_every_truncation_and_every_flipped_byte(bench, folder):
    """Both files, cut off after each byte, and with each byte changed in two ways."""
    good = {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": factors_file(FACTORS)}
    cases = 0
    for name, content in good.items():
        changed = [content[:length] for length in range(len(content))]
        for mask in (0x01, 0x80):
            changed += [content[:i] + bytes([byte ^ mask]) + content[i + 1 :] for i, byte in enumerate(content)]
        for bad in changed:
            bench.try_adapter(write_adapter(folder, **_as_arguments({**good, name: bad})))
        cases += len(changed)
    assert cases > 1200


def _as_arguments(files: dict[str, bytes]) -> dict[str, bytes]:
    return {"config": files["adapter_config.json"], "weights": files["adapter_model.safetensors"]}


def test_headers_of_the_weights_file(bench, folder):
    """Headers of the right form with other names, types, shapes and offsets; overlaps; lies about lengths."""
    dtypes = ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X", "", None, 1]
    small = st.integers(-1, 20) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30])
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(dtypes),
            "shape": st.just([2]) | st.lists(small, max_size=4) | junk,
            "data_offsets": st.just([0, 8]) | st.lists(small, min_size=2, max_size=2) | junk,
        },
    )
    right = st.just({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})
    names = st.sampled_from([KEY, "layer_factors", "__metadata__", KEY + ".weight"]) | texts
    header = st.dictionaries(names, right | entry | junk, max_size=3) | junk
    length = st.none() | st.sampled_from([0, 1, 7, 100_000_001, 2**31, 2**63, 2**64 - 1])

    @settings(fuzz, max_examples=EXAMPLES["headers"])
    @given(header, st.binary(max_size=24) | st.just(factors_file(FACTORS)[-8:]), length)
    def run(header: Any, data: bytes, length: int | None) -> None:
        bench.try_adapter(write_adapter(folder, weights=safetensors_bytes(header, data, length)))

    run()


def _repeated(field: str, value: str) -> bytes:
    text = json.dumps(CONFIG)
    return f'{text[:-1]}, "{field}": {value}}}'.encode()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = factors_file(FACTORS)[-8:]

CONFIGS = {  # outcome, content
    "empty": ("peft", b""),
    "not_utf8": ("peft", b"\xff\xfe" + json.dumps(CONFIG).encode()),
    "utf16": ("peft", json.dumps(CONFIG).encode("utf-16")),
    "zeros": ("peft", b"\0" * 1000),
    "pickle": ("peft", b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94."),
    "list": ("peft", b'[{"peft_type": "LAYER_ROPE"}]'),
    "string": ("peft", b'"LAYER_ROPE"'),
    "number": ("peft", b"1"),
    "null": ("peft", b"null"),
    "no_type": ("peft", b"{}"),
    "unknown_type": ("peft", b'{"peft_type": "LAYER_ROPES"}'),
    "list_as_type": ("peft", b'{"peft_type": ["LAYER_ROPE"]}'),
    "deep": ("peft", b'{"peft_type": "LAYER_ROPE", "layer_factors": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "many_digits": ("peft", b'{"peft_type": "LAYER_ROPE", "factor": ' + b"9" * 5000 + b"}"),
    "less_deep": ("refused", {**CONFIG, "auto_mapping": json.loads("[" * 500 + "]" * 500)}),
    "less_deep_and_unknown": ("loaded", {**CONFIG, "new": json.loads("[" * 500 + "]" * 500)}),
    "4000_digits": ("refused", {**CONFIG, "original_max_position_embeddings": 10**4000}),
    "four_thousand_digit_factor": ("refused", {**CONFIG, "layer_factors": [10**4000, 1]}),
    "twice_the_same": ("refused", _repeated("factor", "1.0")),
    "two_factor_lists": ("refused", _repeated("layer_factors", "[1.0, 1.0]")),
    "two_types": ("refused", _repeated("peft_type", '"LAYER_ROPE"')),
    "too_large": ("refused", {**CONFIG, "new": "x" * 2**20}),
    "many_factors": ("refused", {**CONFIG, "layer_factors": [1.0] * 100_000}),
    "too_many_factors": ("refused", {**CONFIG, "layer_factors": [1.0] * 4097}),
    "factors_for_another_model": ("refused", {**CONFIG, "layer_factors": [1.0] * 32}),
    "as_strings": ("refused", {**CONFIG, "layer_factors": ["1.5", "0.75"]}),
    "nested_factors": ("refused", {**CONFIG, "layer_factors": [[1.5], [0.75]]}),
    "true_as_factor": ("refused", {**CONFIG, "layer_factors": [True, 0.75]}),
    "newer": ("loaded", {**CONFIG, "from_the_future": {"a": [1]}, "self": 1, "cls": 2, "": 3, "\ud800": 4}),
    "newer_rope_type": ("refused", {**CONFIG, "rope_type": "yarn"}),
    "markup": ("refused", {**CONFIG, "rope_type": "[/] [bold]"}),
    "terminal": ("refused", {**CONFIG, "rope_type": "\x1b]0;owned\x07\r\nok"}),
    "surrogate": ("refused", {**CONFIG, "rope_type": "\ud800"}),
    "strange_base": ("loaded", {**CONFIG, "base_model_name_or_path": "../../etc/passwd"}),
    "base_as_url": ("loaded", {**CONFIG, "base_model_name_or_path": "file:///etc/passwd", "revision": "; rm -rf"}),
    "base_as_list": ("refused", {**CONFIG, "base_model_name_or_path": ["a"]}),
    "mapping_to_os": ("loaded", {**CONFIG, "auto_mapping": {"base_model_class": "system", "parent_library": "os"}}),
    "mapping_to_numbers": ("refused", {**CONFIG, "auto_mapping": {"parent_library": 1}}),
    "minimal": ("loaded", {"peft_type": "LAYER_ROPE", "layer_factors": FACTORS}),
    "runtime_config": ("loaded", {**CONFIG, "runtime_config": {"x": 1}}),
}
WEIGHTS = {
    "empty": b"",
    "one_byte": b"\0",
    "no_header": safetensors_bytes(b"", b""),
    "empty_header": safetensors_bytes({}, b""),
    "header_of_2**63": safetensors_bytes({KEY: ENTRY}, DATA, 2**63),
    "header_of_2**64-1": safetensors_bytes({KEY: ENTRY}, DATA, 2**64 - 1),
    "header_of_100_MB": safetensors_bytes({KEY: ENTRY}, DATA, 10**8),
    "header_one_short": safetensors_bytes({KEY: ENTRY}, DATA, len(json.dumps({KEY: ENTRY})) - 1),
    "header_not_utf8": safetensors_bytes(b"\xff" * 100, b""),
    "header_deep": safetensors_bytes(b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b""),
    "header_twice_the_key": safetensors_bytes(
        (json.dumps({KEY: ENTRY})[:-1] + f', "{KEY}": {json.dumps(ENTRY)}}}').encode(), DATA + DATA
    ),
    "more_data_than_said": safetensors_bytes({KEY: ENTRY}, DATA + b"\0"),
    "less_data_than_said": safetensors_bytes({KEY: ENTRY}, DATA[:-1]),
    "overlapping": safetensors_bytes({KEY: ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, DATA + DATA[:4]),
    "same_data_twice": safetensors_bytes({KEY: ENTRY, "b": ENTRY}, DATA),
    "hole": safetensors_bytes({KEY: {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 4 + DATA),
    "backwards": safetensors_bytes({KEY: {**ENTRY, "data_offsets": [8, 0]}}, DATA),
    "shape_overflows": safetensors_bytes({KEY: {**ENTRY, "shape": [2**32, 2**32, 2]}}, DATA),
    "shape_of_many_ones": safetensors_bytes({KEY: {**ENTRY, "shape": [1] * 100_000 + [2]}}, DATA),
    "shape_with_zero": safetensors_bytes({KEY: {**ENTRY, "shape": [0], "data_offsets": [0, 0]}}, b""),
    "scalar": safetensors_bytes({KEY: {**ENTRY, "shape": [], "data_offsets": [0, 4]}}, DATA[:4]),
    "two_dimensions": safetensors_bytes({KEY: {**ENTRY, "shape": [1, 2]}}, DATA),
    "extra_tensor": safetensors_bytes({KEY: ENTRY, "b": {**ENTRY, "data_offsets": [8, 16]}}, DATA + DATA),
    "a_lora": safetensors_bytes({"base_model.model.q_proj.lora_A.weight": ENTRY}, DATA),
    "long_name": safetensors_bytes({"n" * 500_000: ENTRY}, DATA),
    "terminal_name": safetensors_bytes({"\x1b]0;owned\x07\r\n": ENTRY}, DATA),
    "float16": safetensors_bytes({KEY: {**ENTRY, "dtype": "F16", "data_offsets": [0, 4]}}, DATA[:4]),
    "float4": safetensors_bytes({KEY: {**ENTRY, "dtype": "F4", "data_offsets": [0, 1]}}, DATA[:1]),
    "int32": safetensors_bytes({KEY: {**ENTRY, "dtype": "I32"}}, DATA),
    "big_endian": safetensors_bytes({KEY: ENTRY}, DATA[3::-1] + DATA[:3:-1]),
    "not_a_number": factors_file([float("nan"), 0.75]),
    "infinite": factors_file([1.5, float("inf")]),
    "one_bit_off": factors_file([1.5000001192092896, 0.75]),
    "other_order": factors_file(FACTORS[::-1]),
    "too_many": factors_file([*FACTORS, 1.0]),
    "ten_million": factors_file([1.0] * 10_000_000),
    "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "zip": b"PK\x03\x04" + b"\0" * 200,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_worth_a_name(name, bench, folder):
    outcome, config = CONFIGS[name]
    assert bench.try_adapter(write_adapter(folder, config)) == outcome


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_worth_a_name(name, bench, folder):
    assert bench.try_adapter(write_adapter(folder, weights=WEIGHTS[name]), "adapter_model.safetensors") == "refused"


def test_a_name_without_pefts_prefix_is_ours_too(bench, folder):
    assert bench.try_adapter(write_adapter(folder, weights=factors_file(FACTORS, "layer_factors"))) == "loaded"


def _link(path: Path, target: Path | str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "peft"),
        (lambda f: ((f / "adapter_config.json").unlink(), (f / "adapter_config.json").mkdir()), "peft"),
        (lambda f: _link(f / "adapter_config.json", f / "adapter_config.json"), "peft"),
        (lambda f: _link(f / "adapter_config.json", "/dev/zero"), "peft"),
        (lambda f: _link(f / "adapter_config.json", __file__), "peft"),
        (lambda f: ((f / "adapter_config.json").unlink(), os.mkfifo(f / "adapter_config.json")), "peft"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "refused"),
        (lambda f: ((f / "adapter_model.safetensors").unlink(), (f / "adapter_model.safetensors").mkdir()), "refused"),
        (lambda f: _link(f / "adapter_model.safetensors", f / "adapter_model.safetensors"), "refused"),
        (lambda f: _link(f / "adapter_model.safetensors", "/dev/zero"), "refused"),
        (lambda f: _link(f / "adapter_model.safetensors", "/proc/self/maps"), "refused"),
        (lambda f: ((f / "adapter_model.safetensors").unlink(), os.mkfifo(f / "adapter_model.safetensors")), "refused"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "refused"),
    ],
)
def test_what_stands_in_a_files_place(change, outcome, bench, tmp_path):
    change(write_adapter(tmp_path))
    assert bench.try_adapter(tmp_path) == outcome


def test_a_link_to_a_good_file_is_followed(bench, tmp_path):
    """The Hub's cache consists of such links."""
    for path in write_adapter(tmp_path / "blobs").iterdir():
        _link(tmp_path / path.name, path)
    assert bench.try_adapter(tmp_path) == "loaded"


class _Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["LAYER_ROPE_TRACE"],)


@pytest.mark.parametrize("kind", ["LAYER_ROPE", "LORA"])
def test_no_pickle_is_opened(kind, tmp_path, monkeypatch):
    """Not even with PEFT's fallback from a missing safetensors file to `adapter_model.bin`."""
    folder, trace = write_adapter(tmp_path / "adapter", {**CONFIG, "peft_type": kind}), tmp_path / "trace"
    monkeypatch.setenv("LAYER_ROPE_TRACE", str(trace))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": _Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(LayerRopeError, match=r"it has no adapter_model\.safetensors"):
        load_adapter(tiny_model(), str(folder))
    assert not trace.exists()


def test_a_second_adapter_that_fails_leaves_the_first(bench, tmp_path):
    """`load_adapter` on a PeftModel that serves another adapter."""
    model = PeftModel.from_pretrained(tiny_model(), bench.good)
    bad = write_adapter(tmp_path / "bad", weights=factors_file(FACTORS[::-1]))
    with pytest.raises(LayerRopeError, match="disagree"):
        model.load_adapter(bad, adapter_name="second")
    assert list(model.peft_config) == ["default"]
    check_measured(model, CONFIG)
    model.load_adapter(bench.good, adapter_name="second")
    model.set_adapter("second")
    check_measured(model, CONFIG)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"\0" * 2**21, r"adapter_model\.safetensors has 2097152 bytes, expected 1048576 at most"),
        (None, r"it has no adapter_model\.safetensors"),
        (factors_file(FACTORS)[:-1], "is not a safetensors file"),
        (factors_file(FACTORS[::-1]), "disagree"),
    ],
)
def test_from_the_hub(weights, message, bench, tmp_path, monkeypatch):
    """The weights are looked at before injection there too, and their size before they are fetched."""
    with loopback_hub() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        huggingface_hub.close_session()
        files = {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.bin": b"\x80\x04."}
        hub.create("someone/good").commit("main", {**files, "adapter_model.safetensors": factors_file(FACTORS)})
        hub.create("someone/bad").commit(
            "main", files if weights is None else {**files, "adapter_model.safetensors": weights}
        )
        for load in (PeftModel.from_pretrained, load_adapter):
            with pytest.raises(LayerRopeError, match=message):
                load(bench.model, "someone/bad")
            bench.check_untouched()
        loaded = PeftModel.from_pretrained(bench.model, "someone/good")
        check_measured(loaded, CONFIG)
        loaded.unload()
        bench.check_untouched()
    huggingface_hub.close_session()
    assert not any(path.stat().st_size > 2**20 for path in tmp_path.rglob("*"))
    assert not list(tmp_path.rglob("adapter_model.bin"))


def test_other_methods_garbage_is_one_clear_error(tmp_path):
    for config in ({"peft_type": "LORA", "r": "x"}, {"peft_type": "LORA", "r": -1}, {"peft_type": "IA3", "self": 1}):
        folder = write_adapter(tmp_path / "other", config)
        with pytest.raises(LayerRopeError, match="cannot load adapter"):
            load_adapter(tiny_model(), str(folder))
        with pytest.raises(LayerRopeError):
            load_adapter_config(str(folder))


HEAVY = """
import json, resource, sys, tracemalloc, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import fuzzing
from peft import PeftModel
from peft_layerrope import LayerRopeError
from peft_layerrope.loading import load_adapter
from peft_layerrope.searcher.settings import read_specification

model = fuzzing.tiny_model()
folder = Path(sys.argv[2])
fuzzing.check_measured(PeftModel.from_pretrained(model, fuzzing.write_adapter(folder / "good")), fuzzing.CONFIG)
model = fuzzing.tiny_model()
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100 * 2**20,) * 2)
tracemalloc.start()
peaks = {}
for path in sorted(folder.glob("heavy_*")):
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (PeftModel.from_pretrained, load_adapter)[path.name.endswith("own"):]:
        try:
            load(model, str(path))
        except LayerRopeError:
            pass
        else:
            raise AssertionError(path)
    peaks[path.name] = [
        tracemalloc.get_traced_memory()[1] - before,
        1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident),
    ]
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_nothing_large_is_allocated(tmp_path):
    """Large files, and small ones that ask for much, in a process that may take 100 MiB more than it has."""
    sizes = {"shape": [2**33], "data_offsets": [0, 2**35], "dtype": "F32"}
    heavy: dict[str, dict[str, bytes]] = {
        "shape": {"weights": safetensors_bytes({KEY: sizes}, DATA)},
        "header": {"weights": safetensors_bytes({KEY: ENTRY}, DATA, 90_000_000)},
        "names": {
            "weights": safetensors_bytes(
                {str(i): {**ENTRY, "shape": [0], "data_offsets": [0, 0]} for i in range(15_000)}, b""
            )
        },
        "factors": {"config": json.dumps({**CONFIG, "layer_factors": [1] * 300_000}).encode()},
        "unknown": {"config": json.dumps({**CONFIG, **{f"n{i}": [] for i in range(50_000)}}).encode()},
        "strings": {"config": json.dumps({**CONFIG, "rope_type": "x" * 1_000_000}).encode()},
        # PEFT reads the whole of it before it asks us; our own loader looks at the size first
        "text_own": {
            "config": json.dumps({**CONFIG, "new": "PLACEHOLDER"}).encode().replace(b"PLACEHOLDER", b"x" * 10**8)
        },
    }
    for name, files in heavy.items():
        write_adapter(tmp_path / f"heavy_{name}", **files)
    sparse = write_adapter(tmp_path / "heavy_sparse") / "adapter_model.safetensors"
    with sparse.open("r+b") as file:
        file.truncate(50 * 2**30)
    zeros = write_adapter(tmp_path / "heavy_zeros_own") / "adapter_config.json"
    with zeros.open("r+b") as file:
        file.truncate(50 * 2**30)
    if "unknown" in heavy:  # loads otherwise, as a newer version's file does
        (tmp_path / "heavy_unknown" / "adapter_model.safetensors").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert len(peaks) == len(heavy) + 2
    assert max(max(pair) for pair in peaks.values()) < 100 * 2**20, peaks


def _try_baked(record: Any) -> str:
    """Sets what a config.json would hold, and restores."""
    model = tiny_model()
    model.config.layer_rope = record
    before = [(name, id(module)) for name, module in model.named_modules()]
    try:
        restore_baked(model)
    except LayerRopeError as error:
        check_message(error, "layer_rope" if "decoder layers" not in str(error) else "layer_factors")
        assert [(name, id(module)) for name, module in model.named_modules()] == before
        return "refused"
    check_measured(model, record)
    return "loaded"


def test_the_record_of_baked_factors(bench):
    """`config.json` of a model that claims to have been saved after `merge_and_unload()`."""
    names = ("rope_type", "factor", "layer_factors", "original_max_position_embeddings", "target_length")
    right = {name: CONFIG[name] for name in names}
    outcomes: Counter[str] = Counter([_try_baked(right)])

    @settings(fuzz, max_examples=EXAMPLES["baked"])
    @given(junk | st.dictionaries(st.sampled_from(names) | texts, junk, max_size=3).map(lambda d: {**right, **d}))
    def run(record: Any) -> None:
        with deadline(30), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes[_try_baked(record)] += 1

    run()
    assert outcomes["loaded"] > 5
    assert outcomes["refused"] > 5


def test_a_baked_checkpoint_on_disk(tmp_path):
    """Through transformers' own reading of config.json."""
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for record in ([], "x", 1, {}, {"layer_factors": [1.0]}, {**CONFIG, "factor": 2}, {**CONFIG, "layer_factors": {}}):
        path.write_text(json.dumps({**values, "layer_rope": record}))
        with pytest.raises(LayerRopeError, match=r"layer_rope|layer_factors has"):
            load_base(ModelSource(str(tmp_path), device="cpu"))
    path.write_text(json.dumps({**values, "layer_rope": CONFIG}))
    check_measured(load_base(ModelSource(str(tmp_path), device="cpu")), CONFIG)


LETTERS = "abcdefghijklmno"
YAMLS = {
    "alias_bomb": "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}]\n" for p, c in pairwise(LETTERS)),
    "alias_bomb_as_model": "search: &a [x, x]\n" + "model: [" + "*a, " * 9 + "*a]\n",
    "merge_bomb": "a: &a {x: 1}\n"
    + "".join(f"{c}: &{c} {{<<: [{', '.join(['*' + p] * 9)}]}}\n" for p, c in pairwise(LETTERS)),
    "recursive": "model: &a [*a]\n",
    "deep_flow": "model: " + "[" * 100_000,
    "deep_block": "\n".join(" " * i + "a:" for i in range(900)),
    "object": "model: !!python/object/apply:os.system [true]\n",
    "name": "model: !!python/name:os.system\n",
    "unknown_tag": "model: !" + "x" * 100_000 + " 1\n",
    "bad_bool": "model: !!bool maybe\n",
    "bad_int": "model: !!int ''\n",
    "bad_time": "model: !!timestamp never\n",
    "bad_month": "model: 2001-99-99\n",
    "bad_binary": "model: !!binary é\n",
    "many_digits": "task: {length: " + "9" * 5000 + "}\n",
    "long_value": "model: [" + "x" * 900_000 + "]\n",
    "long_name": "x" * 900_000 + ": 1\n",
    "list_as_name": "? [a]\n: 1\n",
    "number_as_name": "1: 2\n",
    "not_utf8": b"model: \xff\n",
    "control": "model: \x07\n",
    "two_documents": "a: 1\n---\nb: 2\n",
    "empty": "",
    "list": "- model\n",
    "nan": "search: {factor: .nan}\n",
    "wrong_types": "search: [1]\ntask: x\n",
    "huge": b"#" * 2_000_000,
}


@pytest.mark.parametrize("name", YAMLS)
def test_search_yaml_worth_a_name(name, tmp_path):
    _check_yaml(tmp_path / "search.yaml", YAMLS[name], refused=True)


def test_a_number_in_base_60_is_text_and_takes_no_time():
    """As YAML 1.1 has it, 1 MB of them took minutes."""
    with deadline(30):
        read = parse_yaml(f"a: 1:30\nb: 1:30.5\nc: 90\nd: 1.5\ne: {'1:' * 400_000}1\n")
    assert (read["a"], read["b"], read["c"], read["d"]) == ("1:30", "1:30.5", 90, 1.5)
    assert isinstance(read["e"], str)


def test_search_yaml_folder_and_missing(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(SearchError, match="cannot be read"):
            read_specification(path)


def _check_yaml(path: Path, content: str | bytes, refused: bool = False) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        with deadline(30):
            SearchSpecification.of(read_specification(path), "search.yaml")
    except SearchError as error:
        message = str(error)
    else:
        assert not refused
        return
    assert len(message) < 1000, message[:1000]
    assert message.isprintable(), ascii(message)


def test_search_yaml(tmp_path):
    """Settings replaced by anything; and characters that mean something to YAML, in any order."""
    path = tmp_path / "search.yaml"
    SearchSpecification().save(path)
    right = read_specification(path)
    assert SearchSpecification.of(right, "search.yaml") == SearchSpecification()
    sections = {name: sorted(right[name]) for name in ("task", "search")}
    change = st.sampled_from(sorted(sections)).flatmap(
        lambda section: st.tuples(st.just(section), st.sampled_from(sections[section]), junk)
    )
    top = st.tuples(st.sampled_from(["model", "device", "dtype", "task", "search"]), junk)
    text = st.text(st.sampled_from("&*[]{}:,-? \n|>!%@`'\"#~<ab01.e"), max_size=40)

    @settings(fuzz, max_examples=EXAMPLES["yaml"])
    @given(change | top | text)
    def run(change: Any) -> None:
        if isinstance(change, str):
            _check_yaml(path, change)
        elif len(change) == 3:
            section, name, value = change
            _check_yaml(path, json.dumps({**right, section: {**right[section], name: value}}))
        else:
            _check_yaml(path, json.dumps({**right, change[0]: change[1]}))

    run()


BROKEN = {
    "empty_config": {"config": b""},
    "deep_config": {"config": b"[" * 100_000},
    "other_type": {"config": {**CONFIG, "peft_type": ["LAYER_ROPE"]}},
    "lora": {"config": {**CONFIG, "peft_type": "LORA", "r": "x"}},
    "bad_factor": {"config": {**CONFIG, "layer_factors": [0, 1]}},
    "markup": {"config": {**CONFIG, "rope_type": "[/] [bold]"}},
    "terminal": {"config": {**CONFIG, "rope_type": "\x1b]0;owned\x07\r\n"}},
    "surrogate": {"config": {**CONFIG, "rope_type": "\ud800"}},
    "wrong_depth": {},
    "cut_weights": {"weights": factors_file(FACTORS)[:20]},
    "other_weights": {"weights": WEIGHTS["a_lora"]},
}


@pytest.mark.parametrize("command", ["verify", "evaluate"])
@pytest.mark.parametrize("name", BROKEN)
def test_the_command_line_says_it_in_one_line(command, name, tmp_path):
    folder = write_adapter(tmp_path / "adapter", **BROKEN[name])
    done = CliRunner().invoke(app, [command, "--adapter", str(folder)], env={"COLUMNS": "200", "TERM": "dumb"})
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code in (1, 2)
    lines = [line for line in done.stderr.splitlines() if line and "× the model's window" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.output


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "unsafe_load",
    "full_load",
    "unsafe_load_all",
    "system",
    "popen",
}


def _plain(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant)


def _violations(source: str) -> Iterator[str]:
    """What could run code from a file; words in comments and docstrings do not count."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
        else:
            names = set()
        for name in names & FORBIDDEN_MODULES:
            yield f"{line}: import {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.split(".")[-1]
            owner = called.rpartition(".")[0]
            if (last in FORBIDDEN_CALLS and owner in ("", "os", "yaml", "builtins")) or called == "torch.load":
                yield f"{line}: {called}()"
            if called == "yaml.load" and ast.unparse(node.keywords[0].value) != "_PlainLoader":
                yield f"{line}: {ast.unparse(node)}"
        if isinstance(node, ast.keyword):
            value = ast.unparse(node.value)
            if (node.arg, value) in {("shell", "True"), ("allow_pickle", "True"), ("weights_only", "False")}:
                yield f"{node.value.lineno}: {node.arg}={value}"
            if node.arg == "trust_remote_code" and value != "False":
                yield f"{node.value.lineno}: {node.arg}={value}"
        if isinstance(node, ast.Dict) and "trust_remote_code" in [ast.literal_eval(k) for k in node.keys if _plain(k)]:
            yield f"{line}: 'trust_remote_code'"


# A search's own worker process unpacks the model that the search packed for it; no file is read.
ALLOWED = {
    "searcher/ray_workers.py: torch.load()",
    "searcher/ray_workers.py: weights_only=False",
    # off unless it is typed: see tests/test_base_model.py
    "base_model.py: trust_remote_code=source.trust_remote_code",
    "base_model.py: 'trust_remote_code'",
}


def test_the_package_runs_no_code_from_files():
    root = Path(peft_layerrope.__file__).parent
    found = {
        f"{path.relative_to(root).as_posix()}: {violation.split(': ', 1)[1]}"
        for path in root.rglob("*.py")
        for violation in _violations(path.read_text("utf-8"))
    }
    assert found - ALLOWED == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "load(trust_remote_code=True)",
        "load(**{'trust_remote_code': flag})",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import subprocess\nsubprocess.run(command, shell=True)",
    ],
)
def test_the_check_for_such_code_can_fail(source):
    assert len(list(_violations(source))) == 1
    assert list(_violations(f'"""Says: {source.splitlines()[-1]}"""\nmodel.eval()\nre.compile("x")')) == []


def test_verify_says_mismatch_of_a_layer_that_does_not_rotate(bench):
    """With nothing left to measure it once said that all was well."""
    model = PeftModel.from_pretrained(tiny_model(), bench.good)
    rotary = model.get_base_model().model.rotary_emb
    rotary.set_scaling("default", LayerScaling("default", 1.0, (FACTORS[0], 1e30), None))
    assert [check.status for check in verify(model).layers] == ["ok", "mismatch"]


def test_enough_was_tried(bench, request):
    """Counts what the tests above did, if all of them ran."""
    if request.session.testscollected < 100 or request.config.option.keyword:
        pytest.skip("only some of the tests were asked for")
    print(dict(bench.outcomes))
    assert bench.outcomes.total() >= FEWEST_CASES
    assert bench.outcomes["loaded"] >= 500
    assert bench.outcomes["refused"] >= 2500
