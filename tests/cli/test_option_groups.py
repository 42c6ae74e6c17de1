"""Groups of options: what typer sees of them, what a command gets, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from inspect import signature
from typing import Annotated, Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from peft_layerrope.cli.option_groups import grouped, parameters_of, with_parameters


class Colour(StrEnum):
    """Choices of --colour."""

    red = "red"
    blue = "blue"


@dataclass(frozen=True)
class Shape:
    """A group."""

    width: Annotated[int, typer.Option(help="From left to right.", min=1)] = 2
    colour: Annotated[Colour | None, typer.Option(help="Of the surface.")] = None
    filled: Annotated[bool, typer.Option("--filled", help="Not the outline alone.")] = False

    def area(self) -> int:
        """Of the square."""
        return self.width**2


@dataclass(frozen=True)
class NamedShape(Shape):
    """One option more, one with a second name, and one that nobody may give."""

    width: Annotated[int, typer.Option("--width", "--size", help="Of each side.")] = 5
    colour: None = field(default=None, init=False)
    label: Annotated[str, typer.Option(help="Beside it.")] = "shape"


@dataclass(frozen=True)
class Place:
    """Another group."""

    left: Annotated[float, typer.Option(help="From the left edge.")] = 0.0


@dataclass(frozen=True)
class Incomplete:
    """A group with an option that has no default."""

    depth: Annotated[int, typer.Option(help="Downwards.")]


def called(command: Any, *arguments: str) -> Any:
    """Registers the command with typer, calls it, and returns what it returned."""
    app = typer.Typer()
    app.command()(command)
    return app(list(arguments), standalone_mode=False)


def refusal(command: Any, *arguments: str) -> str:
    """Returns the usage error of a call."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    return result.stderr


@grouped
def draw(
    *,
    first: Annotated[str, typer.Argument()] = "x",
    shape: Shape,
    times: Annotated[int, typer.Option(help="How often.")] = 1,
    place: Place,
) -> tuple[str, Shape, int, Place]:
    """Draws.

    Example: `draw`
    """
    return first, shape, times, place


@grouped
def label(*, shape: NamedShape, last: Annotated[int, typer.Option()] = 0) -> NamedShape:
    """Labels."""
    return shape


def test_options_stand_where_their_group_stands():
    assert list(signature(draw).parameters) == ["first", "width", "colour", "filled", "times", "left"]
    assert draw.__name__ == "draw"
    assert draw.__doc__.startswith("Draws.")


def test_signature_and_annotations_agree():
    """One version of typer reads the one, another the other."""
    shown = signature(draw).parameters
    assert {name: parameter.annotation for name, parameter in shown.items()} == get_type_hints(
        draw, include_extras=True
    )
    assert {name: parameter.default for name, parameter in shown.items()} == {
        "first": "x",
        "width": 2,
        "colour": None,
        "filled": False,
        "times": 1,
        "left": 0.0,
    }


def test_a_command_gets_its_groups():
    assert called(draw) == ("x", Shape(), 1, Place())
    given = called(draw, "y", "--left", "1.5", "--width", "3", "--filled", "--colour", "blue", "--times", "4")
    assert given == ("y", Shape(3, Colour.blue, filled=True), 4, Place(1.5))
    assert isinstance(given[1].colour, Colour)
    assert given[1].area() == 9


def test_limits_and_choices_of_a_field_hold():
    assert "--width" in refusal(draw, "--width", "0")
    assert "--colour" in refusal(draw, "--colour", "green")


def test_a_subclass_changes_an_option_in_its_place():
    assert list(signature(label).parameters) == ["width", "filled", "label", "last"]
    assert called(label) == NamedShape()
    assert called(label, "--size", "7") == called(label, "--width", "7") == NamedShape(7)
    assert called(draw)[1].width == 2


def test_a_subclass_takes_an_option_away():
    assert called(label).colour is None
    assert "--colour" in refusal(label, "--colour", "red")


def test_a_command_without_groups_stays_as_it_is():
    def plain(context: typer.Context, count: Annotated[int, typer.Option()] = 3) -> tuple[str, int]:
        return type(context).__name__, count

    assert called(grouped(plain), "--count", "4") == ("Context", 4)


def test_parameters_from_elsewhere_stand_in_their_order():
    def other(ignored: int, count: Annotated[int, typer.Option()] = 3) -> None: ...

    def command(*, place: Place, **rest: Any) -> tuple[Place, dict[str, Any]]:
        return place, rest

    further = parameters_of(other)
    del further["ignored"]
    combined = with_parameters(command, further | parameters_of(command))
    assert list(signature(combined).parameters) == ["count", "left"]
    assert called(combined, "--left", "2") == (Place(2.0), {"count": 3})


def test_two_options_of_one_name_are_refused():
    def twice(*, shape: Shape, width: Annotated[int, typer.Option()] = 1) -> None: ...

    with pytest.raises(TypeError, match=r"^twice has two options named width\.$"):
        grouped(twice)


def test_two_groups_with_one_option_are_refused():
    def twice(*, shape: Shape, other: NamedShape) -> None: ...

    with pytest.raises(TypeError, match=r"^twice has two options named width\.$"):
        grouped(twice)


def test_a_field_without_a_default_is_refused():
    def deep(*, group: Incomplete) -> None: ...

    with pytest.raises(TypeError, match=r"^Incomplete\.depth needs a default"):
        grouped(deep)
