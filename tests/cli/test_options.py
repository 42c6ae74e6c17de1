"""Options that are made of declared settings: what typer sees of them, and what a command gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Annotated, Any, Literal, get_type_hints

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from peft_layerrope import SearchError
from peft_layerrope.cli.options import Typed, options_of, parameters_of, takes_settings, with_parameters
from peft_layerrope.declaration import as_options, changed, declared, option

_looks = partial(option, panel="Looks")
_edges = partial(option, panel="Edges")


@declared(SearchError)
class Edge:
    """Settings in settings."""

    width: Annotated[int, _edges("Of the line.", ge=1, le=9)] = 2


@declared(SearchError)
class Shape:
    """Settings of every kind that there is."""

    colour: Annotated[Literal["red", "blue"] | None, _looks("Of the surface.")] = None
    edge: Edge = field(default_factory=Edge)
    corners: Annotated[int | None, _looks("How many.", "--num-corners", "--corners", ge=3)] = None
    filled: Annotated[bool, _looks("Not the outline alone.")] = True
    open: Annotated[bool, _looks("Not closed.", "--open")] = False
    scale: Annotated[float, _looks("How large.", gt=0)] = 1.0
    middle: Annotated[tuple[Annotated[float, Field(gt=0)], float], _looks("Where.")] = (0.5, 0.5)
    sides: Annotated[tuple[str, ...] | None, _looks("Which.")] = None
    hidden: Annotated[int, Field(description="No option.")] = 7
    pattern: Annotated[Literal["checkered", "striped", "dotted"], _looks("Of what is filled.")] = "dotted"


@takes_settings
def draw(
    *,
    first: Annotated[str, typer.Argument()] = "x",
    shape: Annotated[Typed, options_of(Shape)],
    times: Annotated[int, typer.Option(help="How often.")] = 1,
) -> tuple[str, Typed, int]:
    """Draws."""
    return first, shape, times


def called(command: Any, *arguments: str) -> Any:
    """Registers the command with typer, calls it, and returns what it returned."""
    app = typer.Typer()
    app.command()(command)
    return app(list(arguments), standalone_mode=False)


def run(command: Any, *arguments: str) -> Any:
    app = typer.Typer(rich_markup_mode="markdown")
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def refusal(command: Any, *arguments: str) -> str:
    """Returns the usage error of a call."""
    result = run(command, *arguments)
    assert result.exit_code == 2
    return result.stderr


def test_options_stand_where_their_parameter_stands():
    names = list(signature(draw).parameters)
    own = ["colour", "width", "corners", "filled", "open", "scale", "middle", "sides", "pattern"]
    assert names == ["context", "first", *own, "times", "verbose", "quiet"]


def test_signature_and_annotations_agree():
    """One version of typer reads the one, another the other."""
    shown = {name: parameter.annotation for name, parameter in signature(draw).parameters.items()}
    assert shown == get_type_hints(draw, include_extras=True)


def test_what_was_not_typed_is_absent():
    assert called(draw) == ("x", {}, 1)
    assert called(draw, "y", "--scale", "1.0", "--times", "4") == ("y", {"scale": 1.0}, 4)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--colour", "blue"], "colour", "blue"),
        (["--width", "3"], "width", 3),
        (["--num-corners", "4"], "corners", 4),
        (["--corners", "4"], "corners", 4),
        (["--no-filled"], "filled", False),
        (["--filled"], "filled", True),
        (["--open"], "open", True),
        (["--scale", "2"], "scale", 2.0),
        (["--middle", "0.1", "1"], "middle", (0.1, 1.0)),
        (["--sides", "a,b"], "sides", "a,b"),
    ],
)
def test_what_was_typed_has_its_fields_name_and_type(arguments, name, value):
    typed = called(draw, *arguments)[1]
    assert typed == {name: value}
    assert type(typed[name]) is type(value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--colour", "green"],
        ["--width", "0"],
        ["--width", "10"],
        ["--corners", "2"],
        ["--scale", "x"],
        ["--no-open"],
        ["--hidden", "3"],
    ],
)
def test_what_the_declaration_forbids_is_a_usage_error(arguments):
    assert arguments[0] in refusal(draw, *arguments)


def test_help_says_what_the_declaration_says():
    lines = run(draw, "--help").stdout.splitlines()

    def line(name: str) -> str:
        return next(i for i in lines if f"--{name} " in i or f"--{name}," in i)

    assert "Of the surface." in line("colour")
    assert "red|blue" in line("colour")
    assert "checkered, striped, dotted. Of what is filled." in line("pattern")
    assert "1<=x<=9" in line("width")
    panels = [text for text in lines if text.startswith("╭")]
    assert [name for name in ("Looks", "Edges") if any(f" {name} " in panel for panel in panels)] == ["Looks", "Edges"]
    text = " ".join(run(draw, "--help").stdout.split())
    for default in ("[default: 2]", "[default: 1.0]", "[default: 0.5, 0.5]", "[default: filled]"):
        assert default in text


def test_another_default_can_be_shown():
    @takes_settings
    def other(*, shape: Annotated[Typed, options_of(Shape, "width", "scale", default="the old one")]) -> Typed:
        """Draws."""
        return shape

    text = run(other, "--help").stdout
    assert text.count("the old one") == 2
    assert "--colour" not in text
    assert called(other) == {}
    assert called(other, "--width", "2") == {"width": 2}


def test_a_command_may_spell_an_option_in_a_further_way():
    @takes_settings
    def other(*, shape: Annotated[Typed, options_of(Shape, "scale", also={"scale": "--size"})]) -> Typed:
        return shape

    assert called(other, "--size", "3") == called(other, "--scale", "3") == {"scale": 3.0}


def test_a_command_gets_its_context():
    def plain(context: typer.Context, count: Annotated[int, typer.Option()] = 3) -> tuple[str, int]:
        return type(context).__name__, count

    assert called(takes_settings(plain), "--count", "4") == ("Context", 4)


def test_parameters_from_elsewhere_stand_in_their_order():
    def other(ignored: int, count: Annotated[int, typer.Option()] = 3) -> None: ...

    def command(*, edge: Annotated[Typed, options_of(Edge)], **rest: Any) -> tuple[Typed, dict[str, Any]]:
        return edge, rest

    further = parameters_of(other)
    del further["ignored"]
    combined = with_parameters(command, further | parameters_of(command))
    assert list(signature(combined).parameters) == ["context", "count", "width", "verbose", "quiet"]
    assert called(combined, "--width", "2") == ({"width": 2}, {"count": 3})


def test_two_options_of_one_name_are_refused():
    def twice(*, shape: Annotated[Typed, options_of(Shape)], width: Annotated[int, typer.Option()] = 1) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'width'"):
        takes_settings(twice)


def test_typed_values_go_over_settings_at_any_depth():
    before = Shape(edge=Edge(5), colour="red", hidden=8)
    after = changed(before, {"width": 3, "scale": 2})
    assert after == Shape(edge=Edge(3), colour="red", hidden=8, scale=2.0)
    assert before.edge.width == 5
    with pytest.raises(SearchError, match="width=0 must"):
        changed(before, {"width": 0})


def test_settings_as_options_name_what_differs_from_the_defaults():
    assert as_options(Edge()) == []
    assert as_options(Edge(3)) == [("--width", 3)]


def test_a_class_that_is_not_declared_has_no_options():
    @dataclass
    class Plain:
        width: int = 1

    assert options_of(Plain) == ()
