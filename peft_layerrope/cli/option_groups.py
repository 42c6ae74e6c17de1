"""Groups of options: several commands take the same ones as one parameter, a dataclass whose fields are options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a command take groups of options.

    A group is a frozen dataclass; each of its fields is annotated as an option and has a default. A subclass may give a
    field another option, which stays in its place, or take it away with `field(default=..., init=False)`.

    Args:
        command: a function; each parameter is annotated as an option, an argument, or with a group.

    Returns:
        What typer is to register: all options one by one in its signature. It calls the command with the groups made.

    Raises:
        TypeError: two options of one name, or a field without a default.
    """
    return with_parameters(command, parameters_of(command))


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Returns a function's parameters as keywords, their annotations resolved; `**` is left out."""
    hints = get_type_hints(function, include_extras=True)
    return {
        name: parameter.replace(annotation=hints.get(name, Parameter.empty), kind=Parameter.KEYWORD_ONLY)
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is not Parameter.VAR_KEYWORD
    }


def with_parameters(command: Callable[..., Any], parameters: Mapping[str, Parameter]) -> Callable[..., Any]:
    """Does what [`grouped`] does, with parameters that are not read from the command.

    Args:
        command: called with the parameters by their names.
        parameters: as [`parameters_of`] returns them.

    Raises:
        TypeError: as for [`grouped`].
    """
    options: dict[str, Parameter] = {}
    for parameter in parameters.values():
        for option in _options(parameter):
            if option.name in options:
                raise TypeError(f"{command.__name__} has two options named {option.name}.")
            options[option.name] = option

    @wraps(command)
    def flat(**values: Any) -> Any:
        return command(**{name: _value(parameter, values) for name, parameter in parameters.items()})

    # typer reads a command's options from its signature
    flat.__signature__ = Signature(list(options.values()))
    flat.__annotations__ = {name: option.annotation for name, option in options.items()}
    return flat


def _is_group(parameter: Parameter) -> bool:
    return isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)


def _options(parameter: Parameter) -> list[Parameter]:
    """The options of a group; any other parameter is one itself."""
    if not _is_group(parameter):
        return [parameter]
    group = parameter.annotation
    hints = get_type_hints(group, include_extras=True)
    options = []
    for field in fields(group):
        if field.default is MISSING:
            raise TypeError(f"{group.__name__}.{field.name} needs a default, as every option of a group does.")
        if field.init:
            annotation = hints[field.name]
            options.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation))
    return options


def _value(parameter: Parameter, values: Mapping[str, Any]) -> Any:
    """What the command gets for one of its parameters."""
    if not _is_group(parameter):
        return values[parameter.name]
    return parameter.annotation(**{option.name: values[option.name] for option in _options(parameter)})
