"""Text from anywhere stays text: in HTML, in Markdown and in a terminal."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console
from test_section import PNG, section

from peft_layerrope.experiments.section import SectionFigure, code_markdown, to_html, to_markdown, to_rich
from peft_layerrope.report import Table, escape_markdown

HOSTILE = '<script>alert(1)</script> "><img src=x onerror=y> {{ 7*7 }} $x_ [a](http://h) | `c` & \x1b[31m\u202e'


def hostile():
    return section(
        title=HOSTILE,
        question=HOSTILE,
        measured=HOSTILE,
        findings=(HOSTILE,),
        command=HOSTILE,
        tables=(Table((HOSTILE, "b"), ((HOSTILE, HOSTILE),), HOSTILE, HOSTILE),),
        figures=(SectionFigure("one", HOSTILE, PNG),),
    )


class Tags(HTMLParser):
    """Collects the tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page() -> str:
    return to_html(HOSTILE, [(HOSTILE, HOSTILE)], [hostile(), hostile()], [(HOSTILE, HOSTILE)], HOSTILE)


def test_html_has_no_markup_from_outside():
    tags = Tags(page())
    names = {tag for tag, _ in tags.found}
    assert not names & {"script", "iframe", "object", "link", "base", "form", "svg"}
    attributes = {name for _, attrs in tags.found for name in attrs}
    assert not [name for name in attributes if name.startswith("on")]
    assert tags.text.count("alert(1)") >= 8
    assert "{{ 7*7 }}" in tags.text
    assert all(c.isprintable() or c == "\n" for c in page())


def test_html_asks_for_nothing_from_anywhere():
    tags = Tags(page())
    for tag, attrs in tags.found:
        for name in ("src", "href", "data", "poster", "srcset", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
    assert "url(" not in page()
    assert "@import" not in page()
    pictures = [attrs["src"].partition(",")[2] for tag, attrs in tags.found if tag == "img"]
    assert {base64.b64decode(picture) for picture in pictures} == {PNG}


@pytest.mark.parametrize("text", [HOSTILE, "# h", "- x", "3. x", "a\n\n# b"])
def test_escaped_markdown_is_one_line_without_markup(text):
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    assert "<" not in escaped
    assert not re.search(r"(?<!\\)[`*_\[\]|~$]", escaped)
    assert not re.match(r"[#>+=-]|\d+[.)]", escaped)


def test_a_command_cannot_end_its_block():
    block = code_markdown("a\n```\n# b")
    assert block.startswith("````sh\n")
    assert block.endswith("\n````")


def test_a_markdown_table_keeps_its_columns():
    lines = [line for line in to_markdown(hostile()).splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [3, 3, 3]


def test_a_terminal_gets_no_control_characters():
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(to_rich(hostile()))
    text = console.file.getvalue()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "alert(1)" in text


def test_narrow_terminals_break_between_words_and_lose_nothing():
    console = Console(width=80, file=io.StringIO())
    table = Table(("what it is", *"abcdefg"), (("scaling layers", *["12.3 ± 45.6"] * 7),))
    console.print(to_rich(section(tables=(table,))))
    text = console.file.getvalue()
    assert re.search(r"^\s+scaling ", text, re.MULTILINE)
    assert text.count("12.3") == 7
    assert text.count("45.6") == 7
    assert "…" not in text
