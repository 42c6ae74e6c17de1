"""`layerrope experiment` and `layerrope report` on the demo model, a few contexts each."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from test_rendering import Tags
from test_search_record import record_values
from typer.testing import CliRunner

from peft_layerrope import LayerRopeConfig
from peft_layerrope.cli import app
from peft_layerrope.experiments import by_position
from peft_layerrope.experiments import report as report_plan
from peft_layerrope.experiments.section import load_section
from peft_layerrope.tuner.artifacts import save_adapter

EXPERIMENTS = ("u-shape", "sweep", "halves", "control-points", "attention", "extrapolation", "transfer")
POINTS = [[0.0, 1.5], [0.5, 2.0], [0.1, 1.9], [1.0, 1.4]]
TINY = ("--length", "192", "--positions", "3", "--groups", "2")


def run(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_adapter(folder: Path, record: dict | None = None, points: list | None = POINTS, **changes) -> Path:
    folder.mkdir()
    save_adapter(LayerRopeConfig(**{"layer_factors": record_values()["layer_factors"]} | changes), folder)
    values = {**(record_values() if record is None else record), "control_points": points}
    (folder / "search.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write_adapter(tmp_path / "mine")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_teaches_with_an_example(name):
    text = re.sub(r"\x1b\[[0-9;]*m", "", run("experiment", name, "--help").stdout)
    assert f"Example: layerrope experiment {name}" in " ".join(text.split())
    assert "--groups" in text
    assert "--output" in text


def test_another_adapter_of_the_same_name_is_measured(tmp_path):
    """Their command has the last names of folders alone."""
    save_adapter(LayerRopeConfig(layer_factors=[1.0] * 5 + [1.1]), tmp_path / "a" / "mine")
    save_adapter(LayerRopeConfig(layer_factors=[3.0] * 6), tmp_path / "b" / "mine")
    found = []
    for folder in ("a", "b"):
        call = ("experiment", "halves", "--adapter", str(tmp_path / folder / "mine"), *TINY)
        assert run(*call, "--output", str(tmp_path / "out"), "--resume").exit_code == 0
        found.append(load_section(tmp_path / "out", "halves"))
    assert found[0].command == found[1].command
    assert found[0].tables != found[1].tables


def test_adapters_of_the_same_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        save_adapter(LayerRopeConfig(layer_factors=[1.2] * 6), tmp_path / folder / "mine")
    adapters = [word for folder in ("a", "b") for word in ("--adapter", str(tmp_path / folder / "mine"))]
    result = run("experiment", "transfer", *adapters, *TINY, "--output", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert {"a/mine", "b/mine"} <= {row[0] for row in load_section(tmp_path / "out", "transfer").tables[0].rows}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("u-shape", ()),
        ("sweep", ("--try", "1.5")),
        ("halves", ("--adapter",)),
        ("control-points", ("--adapter",)),
        ("attention", ("--adapter",)),
        ("extrapolation", ("--adapter", "--lengths", "192,256", "--baseline", "uniform:1.5")),
        ("transfer", ("--adapter", "--on", "kv_words:128", "--on", "kv_words:192")),
    ],
)
def test_each_command_measures_and_writes(tmp_path, adapter, name, options):
    if "--adapter" in options:
        options = ("--adapter", str(adapter), *options[1:])
    output = tmp_path / "out"
    result = run("experiment", name, *options, *TINY, "--output", str(output))
    assert result.exit_code == 0
    section = load_section(output, name)
    for finding in section.findings:
        assert finding in " ".join(result.stdout.split())
    assert (output / f"{name}.md").read_text().startswith(f"# {section.title}")
    assert all((output / section.figure_file(figure)).stat().st_size > 5000 for figure in section.figures)
    words = shlex.split(section.command)
    assert words[:3] == ["layerrope", "experiment", name]
    assert str(tmp_path) not in section.command
    assert json.loads((output / f"{name}.json").read_text())["data"]


def test_the_command_in_a_section_repeats_it(tmp_path, adapter, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run("experiment", "halves", "--adapter", "mine", *TINY, "--task-seed", "3", "--output", "a")
    section = load_section(tmp_path / "a", "halves")
    again = run(*shlex.split(section.command)[1:], "--output", "b")
    assert first.exit_code == again.exit_code == 0
    assert load_section(tmp_path / "b", "halves") == section
    assert section.data["split"]["seed"] == 3


def test_an_output_is_resumed_or_replaced_only_when_asked(tmp_path, monkeypatch):
    output = ("--output", str(tmp_path / "out"))
    call = ("experiment", "sweep", "--try", "1.5", *TINY, *output)
    assert run(*call).exit_code == 0
    refused = run(*call)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    assert run("experiment", "u-shape", *TINY, *output).exit_code == 0  # another experiment's files are no matter

    def not_again(*arguments, **settings):
        raise AssertionError("measured again")

    monkeypatch.setattr(by_position, "run_sweep", not_again)
    assert run(*call, "--resume").exit_code == 0
    with pytest.raises(AssertionError, match="measured again"):
        run(*call, "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("control-points", "--adapter", "{plain}"), "has no Bézier control points"),
        (("halves", "--adapter", "nowhere/at-all/x"), "cannot load adapter"),
        (("transfer", "--adapter", "{mine}", "--on", "riddles:5"), "expected one of kv_words"),
        (("transfer", "--adapter", "{mine}", "--on", "kv_words:0"), "expected one of kv_words"),
        (("extrapolation", "--adapter", "{mine}", "--lengths", "1,x"), "distinct numbers of tokens"),
        (("extrapolation", "--adapter", "{mine}", "--lengths", "9000"), "cannot fill 9000 tokens"),
        (("extrapolation", "--adapter", "{mine}", "--baseline", "magic:2"), "magic"),
        (("sweep", "--try", "-1"), "must be at least 0.01"),
        (("sweep", "--groups", "1"), "--groups"),
        (("sweep", "--resume"), "needs --output"),
    ],
)
def test_what_cannot_work_is_one_clear_line(tmp_path, adapter, arguments, message):
    plain = write_adapter(tmp_path / "plain", points=None)
    filled = [argument.format(mine=adapter, plain=plain) for argument in arguments]
    result = run("experiment", *filled)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def quick_report(monkeypatch):
    """Two contexts, and only what differs between experiments that the other tests have not run already."""
    monkeypatch.setattr(report_plan, "_QUICK_SWEEP", (1.0, 1.5))
    return ("--quick", "--groups", "2", "--length", "192")


def test_a_report_is_one_file_that_needs_nothing_else(adapter, quick_report):
    result = run("report", str(adapter), *quick_report)
    assert result.exit_code == 0
    tags = Tags((adapter / "report.html").read_text())
    headings = [attrs["id"] for tag, attrs in tags.found if tag == "section"]
    expected = ["u-shape", "sweep", "sensitivity", "halves", "control-points", "attention", "extrapolation"]
    assert headings == ["held-out", "factors", *expected, "not-run"]
    for _, attrs in tags.found:
        for name in ("src", "href"):
            assert attrs.get(name) is None or attrs[name].startswith(("data:image/png;base64,", "#"))
    assert not {tag for tag, _ in tags.found} & {"script", "link", "iframe"}
    assert "pass another one beside this" in tags.text
    assert str(adapter) not in tags.text
    for name in expected:
        command = load_section(adapter / "report", name).command
        assert command in tags.text
        assert command.startswith(f"layerrope {'' if name == 'sensitivity' else 'experiment '}{name} ")


def test_a_report_in_markdown_with_a_second_adapter(tmp_path, adapter, quick_report):
    other = write_adapter(tmp_path / "other", points=None, layer_factors=[1.2] * 6)
    output = tmp_path / "out" / "my report.md"
    arguments = ("--format", "md", "--output", str(output), "--also", str(other))
    assert run("report", str(adapter), *quick_report, *arguments).exit_code == 0
    text = output.read_text()
    assert "## Transfer between tasks and lengths" in text
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(pictures) > 9
    for picture in pictures:
        assert (output.parent / picture.replace("%20", " ")).stat().st_size > 5000


def test_a_resumed_report_measures_nothing_twice(adapter, quick_report, monkeypatch):
    call = ("report", str(adapter), *quick_report)
    assert run(*call).exit_code == 0
    page = (adapter / "report.html").read_text()
    refused = run(*call)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr

    measured = []
    for step in ("sweep", "halves", "attention"):
        module = report_plan.attention if step == "attention" else report_plan.by_position
        inner = getattr(module, f"run_{step}")

        def noted(*arguments, step=step, inner=inner, **settings):
            measured.append(step)
            return inner(*arguments, **settings)

        monkeypatch.setattr(module, f"run_{step}", noted)
    (adapter / "report" / "halves.json").unlink()
    assert run(*call, "--resume").exit_code == 0
    assert measured == ["halves"]
    assert (adapter / "report.html").read_text() == page
    assert run("report", str(adapter), *quick_report[:-1], "160", "--resume").exit_code == 0
    assert measured == ["halves", "sweep", "halves", "attention"]  # another length is another question


def test_a_hostile_search_json_stays_text(tmp_path, quick_report, monkeypatch):
    monkeypatch.setattr(report_plan, "report_steps", lambda request: ([], [("sweep", "<b>no</b>")]))
    hostile = '<script>alert(1)</script>"><img src=x onerror=y> $x$ \x1b[31m'
    record = record_values()
    record["table"][2]["label"] = record["searcher_version"] = record["better_control"] = hostile
    record["table"][1] |= {"name": hostile, "label": hostile}
    record["chosen"] = record["table"][2]["name"]
    adapter = write_adapter(tmp_path / "mine", record)
    for kind in ("html", "md"):
        path = tmp_path / f"report.{kind}"
        done = run("report", str(adapter), *quick_report, "--format", kind, "--output", str(path), "--overwrite")
        assert done.exit_code == 0
        text = path.read_text()
        assert "<script" not in text
        assert "<b>" not in text
        assert "\x1b" not in text
    tags = Tags((tmp_path / "report.html").read_text())
    assert not [attrs for _, attrs in tags.found if "onerror" in attrs]
    assert "alert(1)" in tags.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "search.json").unlink(), "has no search.json"),
        (lambda folder: (folder / "search.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "it has no adapter_config.json"),
        (lambda folder: (folder / "search.yaml").write_text("task: {name: riddles}"), "riddles"),
        (lambda folder: (folder / "search.yaml").write_text("task: {length: 999999}"), "more than 64×"),
        (lambda folder: save_adapter(LayerRopeConfig(layer_factors=[1.0] * 6), folder), "different layer_factors"),
    ],
)
def test_a_folder_that_cannot_be_reported_on(adapter, change, message):
    change(adapter)
    result = run("report", str(adapter))
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.split())


def test_a_file_that_a_search_read_is_not_opened_unasked(tmp_path, adapter):
    secret = tmp_path / "secret.txt"
    secret.write_text("something " * 5000)
    (adapter / "search.yaml").write_text(f"task: {{name: perplexity, length: 192, data: {secret}}}")
    result = run("report", str(adapter))
    assert result.exit_code == 2
    assert "--data" in result.stderr


def test_a_report_on_running_text_skips_what_needs_positions(tmp_path, quick_report):
    record = record_values()
    record["task"] = {"name": "perplexity", "length": 64, "seed": 0}
    for row in record["table"]:
        row["test"] = {"positions": [0], "average_loss": 2.0, "average_loss_interval": [1.9, 2.1]}
    adapter = write_adapter(tmp_path / "mine", record, points=None)
    text = tmp_path / "text.txt"
    text.write_text("baba dab fob , " * 3000)
    result = run("report", str(adapter), *quick_report[:-2], "--data", str(text))
    assert result.exit_code == 0
    for name in ("u-shape", "sweep", "attention", "control-points"):
        assert f"not run: {name}:" in result.stderr
    halves = load_section(adapter / "report", "halves")
    assert halves.tables[0].header[2] == "loss"
    assert "2.000 [1.900, 2.100]" in (adapter / "report.html").read_text()
