"""Options that are made of declared settings, and those that several commands have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, replace
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import (
    ModelSource,
    check_source,
    describe_loading,
    is_emulated,
    load_base,
    load_config,
    parse_model_args,
)
from ..declaration import changed, declarations, declared, option, spellings
from ..errors import InvalidConfigError, SearchError, TaskError, shown
from ..files import demo_model_path, public_name, to_json, write_atomically, writing
from ..runs import LOCK_NAME, check_free
from ..scoring.preflight import AUTO_HIGH, AUTO_LOW, find_difficulty
from ..scoring.scorer import DEFAULT_BATCH_TOKENS, Scorer
from ..searcher.settings import BatchTokens
from ..tasks.base import Task
from ..tasks.specification import DEFAULT_TASK, TaskSpecification, make_task, with_chat
from . import app, err, plain_errors

_USUAL_LENGTH = 4096  # tokens: the middle is lost far inside the window, and a longer prompt takes longer
_SIZES = ("length", "num_keys", "difficulty", "data")


def check_output(output: Path | None, resume: bool | None, overwrite: bool, dry_run: bool = False) -> None:
    """Refuses a folder that cannot be used for results; of no folder, what needs one. `resume` is None where nobody can
    go on with what is in it. With `dry_run` anything may be there, for nothing is going to be written.
    """
    if resume and overwrite:
        raise TaskError("--resume keeps what is there and --overwrite replaces it: pass one of them.")
    if output is None:
        if resume or overwrite:
            raise TaskError(f"{'--resume' if resume else '--overwrite'} needs --output.")
        return
    if not dry_run:
        check_free(output)
    existing = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    problem = None
    if output.exists() and not output.is_dir():
        problem = "exists and is not a folder"
    elif not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "is not writable"
    elif (
        existing == output
        and not (resume or overwrite or dry_run)
        and any(path.name != LOCK_NAME for path in output.iterdir())
    ):
        on = "" if resume is None else "--resume to go on with what is in it, "
        problem = f"is not empty; pass {on}--overwrite to replace it"
    if problem is not None:
        raise TaskError(f"--output {output} {problem}.")


def remove_results(folder: Path, names: Iterable[str]) -> None:
    """Removes the result of an earlier run, which nobody is to take for the new one's."""
    with writing(folder):
        for name in names:
            (folder / name).unlink(missing_ok=True)


def check_plot(path: Path | None) -> None:
    """Raises TaskError if a plot, where one is wanted, could not be written."""
    check_file(path, "--plot")
    if path is not None and path.suffix.lower() != ".png":
        raise TaskError(f"--plot {path} must end in .png, the format that is written.")


def check_file(path: Path | None, option: str) -> None:
    """Raises TaskError if a file, where one is wanted, could not be written."""
    if path is None:
        return
    folder, problem = path.absolute().parent, None
    if path.is_dir() or not folder.is_dir():
        problem = "a folder" if path.is_dir() else "no such folder"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = "no permission, or a read-only file system"
    if problem is not None:
        raise TaskError(f"{option} {path} cannot be written: {problem}.")


def write_json(path: Path, content: Any) -> None:
    """Writes a result for `--json`."""
    with writing(path):
        path.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")


DATE_NAME = "chat_date.txt"
_LONGEST = 100  # bytes


def with_kept_date(task: TaskSpecification, folder: Path | None, resume: bool) -> TaskSpecification:
    """Returns a task with the date of the run that is resumed in a folder, if it has one and no other is asked for."""
    wanted = resume and task.chat_date is None and task.chat_template is not False
    if not wanted or not (folder / DATE_NAME).is_file():
        return task
    with (folder / DATE_NAME).open("rb") as file:
        text = file.read(_LONGEST).decode(errors="replace").strip()
    return replace(task, chat_date=text)


def keep_date(task: TaskSpecification, folder: Path) -> None:
    """Writes down the date of a resolved task, where its chat template writes one."""
    path = folder / DATE_NAME
    with writing(path):
        if task.chat_date is None:
            path.unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, task.chat_date + "\n")


def load(source: ModelSource) -> PreTrainedModel:
    """Loads a model, and says so where its fine-tune names another base, or its dtype makes it slow."""
    model = load_base(source)
    loading = describe_loading(model)
    if is_emulated(model):
        err.print(
            f"note: this CPU has no instructions for {loading['dtype']}: --dtype float32 takes a fraction of the time, "
            "and twice the memory.",
            soft_wrap=True,
        )
    trained_on = loading.get("peft", {}).get("trained_on")
    name = public_name(source.model or demo_model_path())
    if trained_on not in (None, name):
        err.print(f"note: peft={source.peft} was trained on {trained_on}, and is put onto {name}.", soft_wrap=True)
    return model


def resolve_task(
    task: TaskSpecification,
    window: int | None,
    is_demo: bool,
    tokenizer: PreTrainedTokenizerBase,
    *,
    to_run: bool = False,
) -> TaskSpecification:
    """Does what [`with_defaults`] does, and says so if the task's length is beyond the model's trained window. If the
    model is `to_run` on it, and it is not the demo, a task without any size gets one that takes minutes.
    """
    if to_run and not is_demo:
        task = _sized(task, window)
    task = with_defaults(task, window, is_demo, tokenizer)
    if window is not None and task.length > window:
        err.print(f"prompts of up to {task.length} tokens, {task.length / window:g}× the model's window of {window}.")
    return task


def _sized(task: TaskSpecification, window: int | None) -> TaskSpecification:
    if task.name not in (None, "kv_retrieval", "kv_mix") or any(getattr(task, name) is not None for name in _SIZES):
        return task
    task = replace(task, length=min(_USUAL_LENGTH, window or _USUAL_LENGTH))
    if task.name == "kv_mix":
        return task
    # as hard with a third of the tokens that UUIDs take, and with answers of a few tokens
    return replace(task, difficulty="auto", keys=task.keys or "syllables")


def with_defaults(
    task: TaskSpecification, window: int | None, is_demo: bool, tokenizer: PreTrainedTokenizerBase
) -> TaskSpecification:
    """Returns the specification with nothing left open that is known; `window` is None if the model's config does not
    say.
    """
    length = task.length
    if length is None and window is not None:
        length = window * (2 if is_demo else 1)  # the demo is searched beyond its window, which is what it repairs
    task = replace(task, name=task.name or ("kv_words" if is_demo else DEFAULT_TASK), length=length)
    return with_chat(task, tokenizer)


def window_of(source: ModelSource) -> int | None:
    """Returns a model's trained window from its config alone; None if that does not say."""
    config = load_config(source)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def with_difficulty(
    task: TaskSpecification, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, batch_tokens: int
) -> TaskSpecification:
    """Returns the specification with the number of items that `difficulty` finds for the unscaled model; says which."""
    easy = build_task(replace(task, difficulty=None), tokenizer)

    err.print(
        f"difficulty: looking for a number of {easy.item}s at which the unscaled model gives {AUTO_LOW:.0%} to "
        f"{AUTO_HIGH:.0%} right answers."
    )

    def tell(count: int, accuracy: float) -> None:
        err.print(f"difficulty: {count} {easy.item}s, {100 * accuracy:.1f} % right answers")

    found = find_difficulty(Scorer(model, batch_tokens=batch_tokens), easy, tell=tell)
    err.print(f"difficulty: {found.size_setting}={found.num_items} is chosen.")
    return replace(task, difficulty=None, **{found.size_setting: found.num_items})


def build_task(task: TaskSpecification, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Makes the task; its name and length must be resolved."""
    return make_task(task, tokenizer, task.length)


_CHOICES_WIDTH = 16  # characters

Typed = dict[str, Any]
"""What was typed of a command's options, by the names of the fields that they are made of."""


def options_of(
    kind: type, *names: str, default: str | None = None, also: Mapping[str, str] = {}
) -> tuple[Parameter, ...]:
    """Makes options of the fields of a class that [`declared`] made, also of settings in settings; they stand in the
    annotation of a command's parameter, `Annotated[Typed, options_of(...)]`.

    Args:
        kind: the class.
        names: of these fields only. Default: all.
        default: what to show as the default of every option, where it is not the field's.
        also: by field, a further spelling of its option.
    """
    options: list[Parameter] = []
    hints = get_type_hints(kind)
    for name, info in declarations(kind).items():
        if declarations(info.annotation):
            options += options_of(info.annotation, *names, default=default, also=also)
        elif info.json_schema_extra is not None and (not names or name in names):
            limits = {
                end: getattr(one, limit)
                for one in info.metadata
                for end, limit in (("min", "ge"), ("max", "le"))
                if hasattr(one, limit)
            }
            # nothing where it is the field's name: typer then gives a flag its `--no-` as well
            spelled = info.json_schema_extra["spellings"]
            if name in also:
                spelled = (*spellings(kind, name), also[name])
            choices = _choices(hints[name])
            many = len("|".join(choices)) > _CHOICES_WIDTH  # in their own column they would be broken anywhere
            shown = typer.Option(
                *spelled,
                help=f"{', '.join(choices)}. {info.description}" if many else info.description,
                metavar="<name>" if many else None,
                rich_help_panel=info.json_schema_extra["panel"],
                show_default=default or True,
                **limits,
            )
            annotation = Annotated[_typed_as(hints[name]), shown]
            value = None if default else info.default
            options.append(Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=annotation))
    return tuple(options)


def _choices(annotation: Any) -> tuple[str, ...]:
    """The names that an option takes, if it takes some only."""
    parts = get_args(annotation)
    return parts if get_origin(annotation) is Literal else tuple(name for part in parts for name in _choices(part))


def _typed_as(annotation: Any) -> Any:
    """A tuple of any length, and a mapping, are typed as one text, which their field reads."""
    parts = get_args(annotation)
    if get_origin(annotation) is dict or (get_origin(annotation) is tuple and parts[-1] is Ellipsis):
        return str
    return _typed_as(parts[0]) | None if type(None) in parts else annotation


TELLING = {
    "verbose": Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", "--debug", help="Show what transformers tells too, and the traceback of an error."
        ),
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no notes.")],
}
"""Options of every command."""


def takes_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what typer is to register of a command whose parameters are annotated as an option, an argument, or as
    what was typed of several options, `Annotated[Typed, options_of(...)]`: all options one by one in its signature, and
    those that say more or less than usual. It calls the command with what was typed; an option that was not given is
    absent.
    """
    return with_parameters(command, parameters_of(command))


def command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function that takes settings a command of this name."""
    return lambda function: app.command(name)(takes_settings(function))


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Returns a function's parameters as keywords, their annotations resolved; `**` is left out."""
    hints = get_type_hints(function, include_extras=True)
    return {
        name: parameter.replace(annotation=hints.get(name, Parameter.empty), kind=Parameter.KEYWORD_ONLY)
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is not Parameter.VAR_KEYWORD
    }


def with_parameters(command: Callable[..., Any], parameters: Mapping[str, Parameter]) -> Callable[..., Any]:
    """Does what [`takes_settings`] does, with parameters as [`parameters_of`] returns them."""
    groups = {
        name: made
        for name, parameter in parameters.items()
        for made in getattr(parameter.annotation, "__metadata__", ())
        if isinstance(made, tuple)  # what [`options_of`] returned
    }
    options = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, parameter in parameters.items():
        options += groups.get(name, (parameter,) if name != "context" else ())
    kind = Parameter.KEYWORD_ONLY
    options += [Parameter(name, kind, default=False, annotation=option) for name, option in TELLING.items()]

    @wraps(command)
    def flat(context: typer.Context, **values: Any) -> Any:
        # typer may bring a click of its own: its sources are compared by their names
        given = {n: v for n, v in values.items() if context.get_parameter_source(n).name != "DEFAULT"}
        typed = {name: {o.name: given[o.name] for o in made if o.name in given} for name, made in groups.items()}
        everything = {"context": context, **values, **typed}
        with plain_errors(*(everything[name] for name in TELLING), given.values()):
            return command(**{name: everything[name] for name in parameters})

    # typer reads a command's options from its signature
    flat.__signature__ = Signature(options)
    flat.__annotations__ = {option.name: option.annotation for option in options}
    return flat


task_option = partial(typer.Option, rich_help_panel="Task")
run_option = partial(typer.Option, rich_help_panel="Running")

ModelArgument = Annotated[str | None, typer.Argument(help=declarations(ModelSource)["model"].description)]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]


@declared(SearchError)
class Compute:
    """How a model is loaded and run."""

    batch_tokens: BatchTokens = DEFAULT_BATCH_TOKENS
    source: Annotated[ModelSource, Field(description="The model.")] = field(default_factory=ModelSource)

    @classmethod
    def of(cls, model: str | None, typed: Typed, before: Mapping[str, Any] = {}) -> Compute:
        """Makes them of what was typed, and of what was known before it; looks whether the model can be loaded."""
        made = changed(cls(), {**before, **model_settings(model, typed)})
        check_source(made.source)
        return made


@declared(InvalidConfigError)
class _ModelArgs:
    """All settings of a model in one text."""

    model_args: Annotated[
        str | None,
        option(
            "How the model is loaded, key=value,key=value as lm-eval spells it: "
            f"{', '.join(name for name in declarations(ModelSource) if name != 'model')}. peft is a fine-tune of "
            "yours, put onto the base before anything else.",
            panel="Model",
        ),
    ] = None


MODEL_ARGS = options_of(_ModelArgs)


def model_settings(model: str | None, typed: Typed) -> Typed:
    """Returns what was typed with the model, and with the arguments of `--model-args` by their names."""
    given = dict(typed) if model is None else typed | {"model": model}
    arguments = parse_model_args(given.pop("model_args", None) or "")
    ModelSource(**arguments)
    for name, value in arguments.items():
        if given.get(name, value) != value:
            raise InvalidConfigError(
                f"model_args: {name}={shown(value)} contradicts {shown(given[name])}, given beside."
            )
        given[name] = value
    return given


TaskOptions = Annotated[Typed, options_of(TaskSpecification)]
ComputeOptions = Annotated[Typed, options_of(Compute) + MODEL_ARGS]
LoadOptions = Annotated[Typed, options_of(ModelSource) + MODEL_ARGS]
