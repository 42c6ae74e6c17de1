"""What callers get wrong in the arguments of a function, told in one line that names the value."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from .errors import LayerRopeError, TaskError
from .messages import named


def whole_number(
    name: str,
    value: Any,
    least: int | None = None,
    most: int | None = None,
    error: type[LayerRopeError] = TaskError,
) -> int:
    """Returns a whole number as an `int`.

    Args:
        name: of the setting, for the message.
        value: what was passed; also a NumPy integer, but no truth value.
        least: the smallest allowed; None: any.
        most: the largest allowed; None: any.
        error: what to raise.

    Raises:
        LayerRopeError: `error`, for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        limit = "" if least is None else f" of at least {least}"
        raise error(f"{name}={named(value)} must be a whole number{limit}.")
    if least is not None and value < least:
        raise error(f"{name}={value} must be at least {least}.")
    if most is not None and value > most:
        raise error(f"{name}={value} must be at most {most}.")
    return int(value)


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """Returns several whole numbers as a tuple; see [`whole_number`].

    Raises:
        TaskError: they are something else.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TaskError(f"{name}={named(values)} must be a list of whole numbers.")
    return tuple(whole_number(f"{name}[{index}]", value) for index, value in enumerate(values))


def check_callable(name: str, value: Any) -> None:
    """Raises TaskError unless `value` is None or can be called."""
    if value is not None and not callable(value):
        raise TaskError(f"{name}={named(value)} must be a function, or None.")


def is_number(value: Any) -> bool:
    """Whether a value is a real number, which a truth value is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether a value is a Python `int`, as JSON has them, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
