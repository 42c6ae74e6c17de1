"""README, docs/ and the other pages of the repository: links that lead somewhere, and commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from peft_layerrope import KeyValueRetrieval, MultiDocumentQA
from peft_layerrope.cli import app
from peft_layerrope.tasks.metrics import METRICS
from peft_layerrope.tasks.specification import TASK_NAMES

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, ROOT / "hub_configs" / "README.md"]
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
BLOCK = re.compile(r"(?:<!-- (command|not run): ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub and mkdocs name them in links."""
    headings = re.findall(r"^#+ +(.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def blocks() -> list[tuple[str, str, str, str]]:
    """Marker, its text, language and content of each fenced block that is a command or Python."""
    found = [block for page in (ROOT / "README.md", *DOCS) for block in BLOCK.findall(page.read_text())]
    return [block for block in found if block[2]]


def commands() -> list[str]:
    """Every `layerrope` command line of the README and the documentation."""
    lines = [
        line for _, _, language, text in blocks() if language == "bash" for line in text.replace("\\\n", "").split("\n")
    ]
    found = [re.search(r"layerrope .*", line) for line in lines]
    return [match[0] for match in found if match is not None]


@each_page
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(FENCED.sub("", page.read_text())):
        target = page.parent / path if path else page
        assert target.exists(), f"{path} is not there"
        assert not anchor or anchor in anchors(target), f"{path} has no #{anchor}"


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in config["nav"]]
    assert sorted(named) == [path.name for path in DOCS]
    index = (ROOT / "docs" / "index.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert all(f"]({name})" in index and f"](docs/{name})" in readme for name in named if name != "index.md")


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_block_is_run_or_says_why_not():
    found = blocks()
    assert all(marker for marker, *_ in found), [text for marker, _, _, text in found if not marker]
    names = [name for marker, name, *_ in found if marker == "command"]
    assert len(set(names)) == len(names)
    assert names[:2] == ["run", "test"]  # the commands that make the environment, and the first adapter


@pytest.mark.parametrize("line", commands())
def test_commands_have_options_that_exist(line):
    words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    group, name = typer.main.get_command(app), words[0]
    if name == "lm-eval":  # its options are the harness's
        return
    with group.make_context("layerrope", words) as context:
        command = group.resolve_command(context, words)[1]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


def test_the_documentation_names_no_metric_that_does_not_judge_the_task():
    judges = {KeyValueRetrieval.name: KeyValueRetrieval.metric, MultiDocumentQA.name: MultiDocumentQA.metric}
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "docs" / "evaluate.md").read_text(), re.MULTILINE)
    judged = {task: cell for task, cell in rows if task in TASK_NAMES}
    assert set(judged) == set(TASK_NAMES)
    for task, cell in judged.items():
        assert {name for name in METRICS if name in cell} <= {judges.get(task)}
