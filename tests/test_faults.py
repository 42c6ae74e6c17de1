"""What a fault leaves behind while a search or a comparison runs: a usable state, and a word on how to go on."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rich.console
import torch
from conftest import build_model
from fakes import journal_of, token_task
from test_cli import TINY_SEARCH
from test_cli import run as run_command

from peft_layerrope import LayerRopeConfig, SearchResult, search
from peft_layerrope.cli import experiments as experiments_command
from peft_layerrope.cli import search as search_command
from peft_layerrope.files import write_atomically
from peft_layerrope.runs import JOURNAL_NAME
from peft_layerrope.scoring import batching, scorer
from peft_layerrope.searcher import result as search_result
from peft_layerrope.searcher import run as search_run
from peft_layerrope.searcher.plan import SearchProgress

SMALL = {"steps": 2, "test_groups": 3, "batch_tokens": 400}
QUICK_SEARCH = TINY_SEARCH
RESULTS = ("adapter_config.json", "adapter_model.safetensors", "search.json", "README.md")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Audience(SearchProgress):
    """Does `then` at the step number `at` that it is told of."""

    def __init__(self, at: int | None = None, then: Callable[[], None] = lambda: None) -> None:
        self.steps, self.at, self.then = 0, at, then

    def advance(self) -> None:
        self.steps += 1
        if self.steps == self.at:
            self.then()


def run(folder: Path | None, progress: object = None, resume: bool = False, **fields: object) -> SearchResult:
    model, task = build_model("llama", num_hidden_layers=3), token_task(groups=40)
    progress = Audience() if progress is None else progress
    return search(model, task, **{**SMALL, **fields}, folder=folder, resume=resume, progress=progress)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed search: result, journal, steps."""
    folder, audience = tmp_path_factory.mktemp("whole"), Audience()
    result = run(folder, audience)
    return result, journal_of(folder), audience.steps


def assert_resumes(folder: Path, whole: tuple) -> None:
    """What is in `folder` can be read, and leads to the undisturbed search's result."""
    result, journal, _ = whole
    assert run(folder, resume=True).to_dict() == result.to_dict()
    assert journal_of(folder) == journal
    assert [path.name for path in folder.iterdir()] == [JOURNAL_NAME]


# --- killed between the files of the result


@pytest.fixture
def plain_plots(monkeypatch):
    for name in ("plot_by_position", "plot_factors_by_depth", "plot_gain_over_harm"):
        monkeypatch.setattr(search_result, name, lambda *args, **more: b"plot")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def killed_at(step: int, save: Callable[[], None]) -> bool:
    """Has another process `save`, and kills it with SIGKILL at the file operation number `step`; False if there are
    fewer of them.
    """
    child = os.fork()
    if child == 0:
        try:
            operations = itertools.count(1)

            def deadly(real: Callable) -> Callable:
                def operation(*args: object, **more: object) -> object:
                    if next(operations) == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **more)

                return operation

            for name in ("fsync", "replace", "unlink"):
                setattr(os, name, deadly(getattr(os, name)))
            save()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


@pytest.mark.parametrize("earlier", [False, True])
def test_a_result_that_is_saved_by_half_is_never_taken_for_one(whole, plain_plots, tmp_path, earlier):
    result, other = whole[0], run(None, seed=5)
    result.save_pretrained(tmp_path / "expected")
    expected = files(tmp_path / "expected")
    before = {}
    if earlier:
        other.save_pretrained(tmp_path / "before")
        before = files(tmp_path / "before")
        assert before["search.json"] != expected["search.json"]
    for step in itertools.count(1):
        folder = tmp_path / f"step-{step}"
        if earlier:
            shutil.copytree(tmp_path / "before", folder)
        if not killed_at(step, lambda folder=folder: result.save_pretrained(folder)):
            break
        if "adapter_config.json" in files(folder):  # then it is one result or the other, never something of both
            assert files(folder) in (before, expected)
        result.save_pretrained(folder)
        assert files(folder) == expected
        assert not any(path.is_dir() for path in folder.iterdir())
    assert step > 14


# --- Ctrl-C and SIGTERM


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "it"
    assert run_command("search", "--output", str(folder), *QUICK_SEARCH).exit_code == 0
    return {name: (folder / name).read_bytes() for name in RESULTS}


def assert_command_resumes(folder: Path, undisturbed: dict[str, bytes]) -> None:
    done = run_command("search", "--output", str(folder), "--resume")
    assert done.exit_code == 0
    assert {name: (folder / name).read_bytes() for name in RESULTS} == undisturbed


def _heed_signals() -> None:
    """A shell's background job, as these tests may be, ignores Ctrl-C, and so would its children."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_search_with_a_word_on_how_to_go_on(undisturbed, tmp_path, number, status):
    folder = tmp_path / "my adapter"  # whose name a shell has to be told of in quotes
    code = "from peft_layerrope.cli import run; run()"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "60"}
    command = [sys.executable, "-c", code, "search", "--output", str(folder), *QUICK_SEARCH]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=_heed_signals
    ) as process:
        try:
            lines = list(itertools.takewhile(lambda line: "text that the model writes" not in line, process.stderr))
            process.send_signal(number)
            if number == signal.SIGINT:  # the first one means that it is enough
                lines += itertools.takewhile(lambda line: "Enough" not in line, process.stderr)
                process.send_signal(number)
            rest = process.stderr.read()
            assert process.wait(60) == status, "".join(lines) + rest
        finally:
            process.kill()
    assert f"interrupted; nothing is lost. Go on with layerrope search --output '{folder}' --resume\n" in rest
    assert "Traceback" not in rest
    assert not (folder / "adapter_config.json").exists()
    assert_command_resumes(folder, undisturbed)


def interrupted(*args: object, **more: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_while_the_result_is_saved(undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "it"
    with monkeypatch.context() as patched:
        patched.setattr(search_result, "plot_factors_by_depth", interrupted)
        done = run_command("search", "--output", str(folder), *QUICK_SEARCH)
    assert done.exit_code == 130
    assert "nothing is lost. Go on with layerrope search" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["run", "search.yaml"]
    assert_command_resumes(folder, undisturbed)


def test_interrupted_before_there_is_anything_to_lose(tmp_path, monkeypatch):
    monkeypatch.setattr(search_command, "load", interrupted)
    done = run_command("search", "--output", str(tmp_path / "it"), *QUICK_SEARCH)
    assert done.exit_code == 130
    assert done.stderr.strip() == "interrupted."
    assert not (tmp_path / "it").exists()


def test_a_search_that_replaces_another_is_not_taken_for_it_when_it_is_interrupted(tmp_path, monkeypatch):
    for name in RESULTS:
        (tmp_path / name).write_text("of the earlier search")
    for function, left in (("_splits", list(RESULTS)), ("ModelEvaluator", ["README.md"])):  # before and after it began
        with monkeypatch.context() as patched:
            patched.setattr(search_run, function, interrupted)
            done = run_command("search", "--output", str(tmp_path), *QUICK_SEARCH, "--overwrite")
        assert done.exit_code == 130
        assert [name for name in RESULTS if (tmp_path / name).exists()] == left


def test_ray_does_not_take_the_signal_away(monkeypatch):
    ray = pytest.importorskip("ray")
    from peft_layerrope import RayWorkers

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    RayWorkers(1)._start_ray(1)
    assert signal.getsignal(signal.SIGTERM) == before


# --- a full disk


@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_journal_that_cannot_be_written_goes_on_afterwards(whole, tmp_path, monkeypatch, at):
    real, calls = os.fsync, itertools.count(1)

    def full(descriptor: int) -> None:
        if next(calls) >= at:
            raise FULL
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"cannot be written: No space left on device: .*{JOURNAL_NAME}"):
            run(tmp_path)
    assert_resumes(tmp_path, whole)


def test_a_failed_write_leaves_the_file_and_nothing_in_the_way(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(FULL))
        with pytest.raises(OSError, match=r"cannot be written: .*file\.txt"):
            write_atomically(path, "new")
    assert files(tmp_path) == {"file.txt": b"old"}


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 512 KiB; skips where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or not sys.platform.startswith("linux"):
        pytest.skip("no tmpfs here")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Leaves so many bytes."""
    with open(disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() // 4096 * 4096 - leave)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_a_disk_that_fills_up_during_the_search(whole, small_disk, share):
    run_folder = small_disk / "run"
    audience = Audience(max(1, round(share * (whole[2] - 1))), lambda: fill(small_disk))
    with pytest.raises(OSError, match=rf"cannot be written: No space left on device: .*({JOURNAL_NAME}|run)"):
        run(run_folder, audience)
    with pytest.raises(OSError, match="No space left on device"):
        run(run_folder, resume=True)
    (small_disk / "ballast").unlink()
    assert_resumes(run_folder, whole)


@pytest.mark.parametrize("leave", [0, 4096, 8192, 16384])
def test_a_disk_that_is_full_when_the_result_is_saved(whole, small_disk, leave):
    result, folder = whole[0], small_disk / "adapter"
    folder.mkdir()
    (folder / "README.md").write_text("# Mine\n")
    fill(small_disk, leave)
    with pytest.raises(OSError, match=f"cannot be written: .*No space left on device.*{folder}") as caught:
        result.save_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert files(folder) == {"README.md": b"# Mine\n"}
    (small_disk / "ballast").unlink()
    result.save_pretrained(folder)
    assert LayerRopeConfig.from_pretrained(folder).layer_factors == result.config.layer_factors
    assert (folder / "README.md").read_text().startswith("---")


@pytest.mark.parametrize("command", ["search", "evaluate"])
def test_a_full_disk_ends_a_command_in_one_line(small_disk, command):
    fill(small_disk)
    done = run_command(command, "--length", "128", "--positions", "3", "--output", str(small_disk / "it"))
    assert done.exit_code == 1
    assert done.stderr.count("error:") == 1
    assert "No space left on device" in done.stderr


def test_a_comparison_on_a_full_disk_goes_on_afterwards(tmp_path, monkeypatch):
    arguments = ("evaluate", "--length", "128", "--positions", "3", "--groups", "3", "--baseline", "none")
    arguments += ("--baseline", "uniform:1.5", "--output")
    assert run_command(*arguments, str(tmp_path / "whole")).exit_code == 0
    real, calls = os.fsync, itertools.count(1)

    def full(descriptor: int) -> None:
        if next(calls) == 4:
            raise FULL
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        done = run_command(*arguments, str(tmp_path / "it"))
    assert done.exit_code == 1
    assert (
        f"{JOURNAL_NAME}: cannot be written: No space left on device. Nothing that was measured is lost" in done.stderr
    )
    assert not (tmp_path / "it" / "evaluation.json").exists()
    assert run_command(*arguments, str(tmp_path / "it"), "--resume").exit_code == 0
    for name in ("evaluation.json", "evaluation.md"):
        assert (tmp_path / "it" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert journal_of(tmp_path / "it" / "run") == journal_of(tmp_path / "whole" / "run")


# --- a stdout or a file that cannot be written


def command(*arguments: str, stdout: int) -> subprocess.CompletedProcess:
    code = "from peft_layerrope.cli import run; run()"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "200", "TERM": "dumb"}
    arguments = [sys.executable, "-c", code, *arguments]
    return subprocess.run(arguments, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=300)


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The end of a pipe that is written into, when nobody reads from the other end any more."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


EVALUATE = ("evaluate", "--quiet", "--length", "128", "--positions", "3", "--groups", "1", "--output")


@pytest.mark.parametrize("arguments", [("prompts", "--limit", "400"), EVALUATE], ids=lambda arguments: arguments[0])
def test_a_reader_that_has_seen_enough_is_no_error(arguments, closed_pipe, tmp_path):
    if arguments is EVALUATE:
        arguments = (*EVALUATE, str(tmp_path / "it"))
    done = command(*arguments, stdout=closed_pipe)
    assert done.returncode == 1  # as that of other commands written in Python
    assert done.stderr.strip() == ""
    if "evaluate" in arguments:  # what was measured is there nevertheless
        written = {path.name for path in (tmp_path / "it").iterdir()}
        assert {"evaluation.json", "evaluation.md", "run"} <= written
        assert not any(name.endswith(".lock") for name in written)


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")


@needs_dev_full
def test_a_stdout_on_a_full_disk_is_told_in_one_line():
    with open("/dev/full", "w") as full:
        done = command("prompts", "--limit", "400", stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr.strip() == "error: the output cannot be written: No space left on device."


@needs_dev_full
@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "--adapter", str(Path(__file__).parents[1] / "hub_configs" / "demo-plain")),
        EVALUATE[:-1],
        ("sensitivity", "--length", "128", "--positions", "3", "--groups", "2", "--layers", "3", "--try", "1.5"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_json_file_that_cannot_be_written_is_told_in_one_line(arguments):
    done = run_command(*arguments, "--json", "/dev/full")
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines()[-1] == "error: /dev/full: cannot be written: No space left on device."


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [("verify",), EVALUATE[:-1], ("sensitivity",)],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_is_read_only_is_noticed_before_any_work(arguments, exists, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    if exists:
        path.write_text("{}")
    real, refused = os.access, path if exists else tmp_path
    monkeypatch.setattr(os, "access", lambda at, mode: not (at == refused and mode == os.W_OK) and real(at, mode))
    done = run_command(*arguments, "--json", str(path))
    assert done.exit_code == 2
    assert f"--json {path} cannot be written: no permission, or a read-only file system." in done.stderr


def test_a_report_on_a_full_disk_ends_in_one_line(small_disk, monkeypatch):
    monkeypatch.setattr(experiments_command, "load", lambda *_: build_model("llama", num_hidden_layers=6))
    adapter = Path(__file__).parents[1] / "hub_configs" / "demo-plain"
    fill(small_disk)
    done = run_command("report", str(adapter), "--length", "192", "--output", str(small_disk / "it.html"))
    assert done.exit_code == 1
    assert done.stderr.count("error:") == 1
    assert "No space left on device" in done.stderr
    assert "make room, then go on with the same command and --resume." in done.stderr


# --- memory and clocks


@pytest.mark.parametrize("at", [1, 6, 12])
def test_memory_that_runs_out_once_does_not_change_what_is_found(whole, monkeypatch, at):
    """Smaller batches may round differently, and that is all."""
    real, calls = batching.answer_logits, itertools.count(1)

    def scarce(*args):
        if next(calls) == at:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args)

    monkeypatch.setattr(scorer, "answer_logits", scarce)
    found, expected = run(None).to_dict(), whole[0].to_dict()
    assert next(calls) > 13
    assert found["layer_factors"] == expected["layer_factors"]
    assert found["evaluations"] == expected["evaluations"]
    for row, other in zip(found["table"], expected["table"], strict=True):
        assert row["layer_factors"] == other["layer_factors"]
        assert row["search_fitness"] == pytest.approx(other["search_fitness"], abs=1e-5)


def test_a_clock_that_goes_backwards_changes_nothing(whole, monkeypatch, tmp_path):
    ticks = itertools.count()

    def backwards() -> float:
        return 1e6 - 60.0 * next(ticks)

    with monkeypatch.context() as patched:
        for name in ("time", "perf_counter"):
            patched.setattr(time, name, backwards)
        patched.setattr(rich.console, "monotonic", backwards)
        plans = []
        model, task = build_model("llama", num_hidden_layers=3), token_task(groups=40)
        result = search(model, task, **SMALL, folder=tmp_path, progress=True, on_plan=plans.append)
    assert result.to_dict() == whole[0].to_dict()
    assert min(result.timing["seconds"].values()) >= 0
    assert plans[0].search_seconds >= 0
    assert next(ticks) > 50  # it was asked
    assert_resumes(tmp_path, whole)
