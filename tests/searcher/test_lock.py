"""One search, comparison or experiment at a time in a folder, from Python and from the command line."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import journal_of, token_task
from test_cli import run as run_command
from test_resume import SMALL, small_model
from test_runs import held_by_another_process

from peft_layerrope import Comparison, compare, parse_baseline, search
from peft_layerrope.cli import evaluate as evaluate_command
from peft_layerrope.cli import experiments as experiments_command
from peft_layerrope.cli import search as search_command
from peft_layerrope.experiments import Measuring
from peft_layerrope.experiments import report as report_plan
from peft_layerrope.experiments.report import Step
from peft_layerrope.experiments.section import Section, kept_section
from peft_layerrope.runs import JOURNAL_NAME, LOCK_NAME
from peft_layerrope.searcher.run import plan_search

SEARCHED = Path(__file__).parents[2] / "hub_configs" / "demo-plain"


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_search_is_kept_out_before_it_writes(tmp_path, resume):
    with held_by_another_process(tmp_path) as pid:
        with pytest.raises(BlockingIOError, match=f"process {pid}"):
            search(small_model(), token_task(groups=40), **SMALL, folder=tmp_path, resume=resume, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
        assert plan_search(small_model(), token_task(groups=40), **SMALL).search_seconds > 0


def comparison(folder: Path, **settings: object) -> Comparison:
    candidates = [parse_baseline("none"), parse_baseline("uniform:1.5")]
    return compare(small_model(), token_task().split("test", 4), candidates, folder=folder, **settings)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_comparison_that_another_call_wants_to_join_ends_as_it_would_have_alone(tmp_path):
    """With the same folder, with and without going on; and an experiment that would begin it anew."""
    refused = []

    def join(label: str, done: int, total: int) -> None:
        if done == 3:
            for resume in (False, True):
                with pytest.raises(BlockingIOError, match=str(os.getpid())):
                    comparison(tmp_path / "joined", resume=resume)
            split = token_task().split("test", 4)
            with pytest.raises(BlockingIOError):
                Measuring(small_model(), 4, folder=tmp_path / "joined").scores(split, [parse_baseline("none")], "x")
            refused.append(label)

    found, alone = comparison(tmp_path / "joined", progress=join), comparison(tmp_path / "alone")
    assert refused
    assert found.to_dict() == alone.to_dict()
    assert journal_of(tmp_path / "joined") == journal_of(tmp_path / "alone")
    assert list(files(tmp_path / "joined")) == [JOURNAL_NAME]


def section() -> Section:
    return Section("halves", "A title", "A question?", "a task", ("A finding.",))


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_of_an_experiment_is_kept_out_of_its_folder(tmp_path, resume):
    asked = {"groups": 3}

    def joined(work: Path) -> Section:
        with pytest.raises(BlockingIOError, match=str(os.getpid())):
            kept_section(tmp_path, "halves", asked, resume, lambda work: pytest.fail("it was let in"))
        beside = replace(section(), name="sweep")
        assert kept_section(tmp_path, "sweep", asked, resume, lambda work: beside) == beside
        return section()

    assert kept_section(tmp_path, "halves", asked, resume, joined) == section()
    assert sorted(files(tmp_path)) == ["halves.json", "halves.md", "sweep.json", "sweep.md"]
    again = kept_section(tmp_path, "halves", asked, True, lambda work: pytest.fail("made again"))
    assert again == section()


EVALUATE = "evaluate --length 128 --positions 3 --groups 2 --output {folder}"
SEARCH = "search --length 128 --positions 3 --output {folder}"
SWEEP = "experiment sweep --try 1.5 --length 128 --positions 3 --groups 2 --output {folder}"
REPORT = "report {adapter} --output {folder}.html"


@pytest.mark.parametrize("how", ["", "--resume", "--overwrite"])
@pytest.mark.parametrize(("command", "folder"), [(SEARCH, "."), (EVALUATE, "."), (SWEEP, "run/sweep"), (REPORT, ".")])
def test_what_another_process_writes_is_left_alone(tmp_path, monkeypatch, command, folder, how):
    for module in (search_command, evaluate_command, experiments_command):
        monkeypatch.setattr(module, "load", lambda *_: small_model())  # so that it is no matter how late it is noticed
    where = tmp_path / "it"
    (where / folder).mkdir(parents=True, exist_ok=True)
    for name in (JOURNAL_NAME, "adapter_config.json", "sweep.json"):
        (where / folder / name).write_text("{}")
    before = files(where)
    with held_by_another_process(where / folder) as pid:
        done = run_command(*f"{command} {how}".format(folder=where, adapter=SEARCHED).split())
        assert f"in use by process {pid}" in done.stderr
        assert done.exit_code == 1
        assert done.stderr.count("error:") == 1
        lock_file = str((where / folder / LOCK_NAME).relative_to(where))
        assert files(where) == before | {lock_file: str(pid).encode()}


@pytest.mark.parametrize(("command", "result"), [(SEARCH, "adapter_config.json"), (EVALUATE, "evaluation.json")])
def test_overwriting_what_a_call_from_python_writes_is_refused(tmp_path, command, result):
    precious = [tmp_path / "run" / JOURNAL_NAME, tmp_path / result]
    (tmp_path / "run").mkdir()
    for path in precious:
        path.write_text("{}")
    with held_by_another_process(tmp_path / "run") as pid:
        done = run_command(*command.format(folder=tmp_path).split(), "--overwrite")
    assert done.exit_code == 1
    assert done.stderr.count("error:") == 1
    assert f"in use by process {pid}" in done.stderr
    assert all(path.read_text() == "{}" for path in precious)


@pytest.mark.parametrize(("command", "folder"), [(EVALUATE, "."), (SWEEP, "run/sweep")])
def test_a_lock_that_a_killed_process_left_is_in_nobodys_way(tmp_path, command, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / LOCK_NAME).write_text("99999999")
    assert run_command(*command.format(folder=tmp_path).split()).exit_code == 0
    assert not any(name.endswith(LOCK_NAME) for name in files(tmp_path))


@pytest.mark.parametrize("error", [BlockingIOError, PermissionError])
def test_a_report_skips_no_experiment_because_its_output_fails(tmp_path, monkeypatch, error):
    def fail(measuring: Measuring) -> Section:
        raise error("somebody else's")

    monkeypatch.setattr(report_plan, "report_steps", lambda request: ([Step("halves", fail)], []))
    request = SimpleNamespace(model=None, groups=lambda name: 2, asked=lambda step: {})
    with pytest.raises(error, match="somebody else's"):
        report_plan.run_steps(request, tmp_path, 1, False, None)


def test_a_dry_run_needs_no_lock(tmp_path):
    with held_by_another_process(tmp_path):
        arguments = ("--length", "128", "--positions", "3", "--test-groups", "2")
        done = run_command("search", *arguments, "--output", str(tmp_path), "--resume", "--dry-run")
    assert done.exit_code == 0
    assert "generations" in done.stdout
