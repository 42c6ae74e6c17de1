"""Which experiments a report of a searched adapter consists of, and how each is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..comparison.contenders import Contender
from ..declaration import as_options
from ..errors import LayerRopeError
from ..fingerprint import model_fingerprint
from ..searcher.space import FactorGrid
from ..tasks import Task
from ..tasks.specification import TaskSpecification
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import trained_window
from . import attention, control_points, extrapolation, halves, layer_sensitivity, sweep, transfer, u_shape
from .measuring import MakeTask, Measuring, default_lengths, window_and_task
from .section import Section
from .storage import command_line, kept_section

QUICK_GROUPS = 12
_QUICK_SWEEP = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)


@dataclass(frozen=True)
class ReportRequest:
    """What a report is about.

    Attributes:
        model: without an adapter.
        model_option: the model as it was named on the command line; None: the demo model.
        model_args: how it is loaded, as `--model-args` takes it; None: as usual.
        adapter: its folder, as it was named.
        config: its configuration.
        grid: the factors that its search could choose from.
        specification: the task that it was searched on, resolved.
        make_task: makes tasks.
        others: further adapters.
        num_groups: contexts of every experiment; None: each has its own default.
        quick: fewer contexts and factors.
    """

    model: nn.Module
    model_option: str | None
    adapter: str
    config: LayerRopeConfig
    grid: FactorGrid
    specification: TaskSpecification
    make_task: MakeTask
    others: Sequence[str] = ()
    num_groups: int | None = None
    quick: bool = False
    model_args: str | None = None

    def groups(self, default: int) -> int:
        """Contexts of an experiment."""
        if self.num_groups is not None:
            return self.num_groups
        return min(QUICK_GROUPS, default) if self.quick else default

    def task(self) -> Task:
        """The task that was searched on."""
        return self.make_task(self.specification)


@dataclass(frozen=True)
class Step:
    """One experiment of a report.

    Attributes:
        name: of its section.
        run: measures; raises a LayerRopeError if it does not apply.
        options: beside model and task, for the command line that repeats it.
        groups: its contexts.
    """

    name: str
    run: Callable[[Measuring], Section]
    groups: int
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Ran:
    """What became of the steps."""

    sections: tuple[Section, ...]
    skipped: tuple[tuple[str, str], ...]


def report_steps(request: ReportRequest) -> tuple[list[Step], list[tuple[str, str]]]:
    """Returns the experiments that may apply, and those that do not from the start, with the reason."""
    model, config, skipped = request.model, request.config, []
    window = trained_window(model)
    adapter = (("--adapter", request.adapter),)
    factors = _QUICK_SWEEP if request.quick else sweep.DEFAULT_FACTORS
    groups = {name: request.groups(default) for name, default in _DEFAULT_GROUPS.items()}

    def scaled(module: Any, **settings: Any) -> Callable[[Measuring], Section]:
        run = getattr(module, "run_" + module.NAME.replace("-", "_"))
        return lambda measuring: run(
            model, request.task(), config, num_groups=groups[module.NAME], measuring=measuring, **settings
        )

    def u_shaped(measuring: Measuring) -> Section:
        return u_shape.run_u_shape(
            model,
            window_and_task(request.make_task, request.specification, window),
            num_groups=groups[u_shape.NAME],
            measuring=measuring,
        )

    steps = [
        Step(u_shape.NAME, u_shaped, groups[u_shape.NAME]),
        Step(
            sweep.NAME,
            scaled(sweep, factors=factors),
            groups[sweep.NAME],
            (*_rope(config), ("--try", list(factors) if request.quick else None)),
        ),
        Step(layer_sensitivity.NAME, scaled(layer_sensitivity), groups[layer_sensitivity.NAME], _rope(config)),
        Step(halves.NAME, scaled(halves), groups[halves.NAME], adapter),
        Step(control_points.NAME, scaled(control_points, grid=request.grid), groups[control_points.NAME], adapter),
        Step(attention.NAME, scaled(attention), groups[attention.NAME], adapter),
    ]
    everyone = [request.adapter, *request.others]
    contenders = [Contender.of_adapter(one) for one in everyone]
    if window is None:
        skipped.append((extrapolation.NAME, "the model's config names no trained window to extrapolate from."))
    else:
        tasks, refused = default_lengths(request.make_task, request.specification, window)
        skipped += [(f"{extrapolation.NAME} at {length} tokens", reason) for length, reason in refused.items()]
        if tasks:
            lines = [*extrapolation.matched_baselines(), *map(extrapolation.Line.fixed, contenders)]
            steps.append(
                Step(
                    extrapolation.NAME,
                    lambda measuring: extrapolation.run_extrapolation(
                        model, tasks, lines, num_groups=groups[extrapolation.NAME], measuring=measuring
                    ),
                    groups[extrapolation.NAME],
                    (("--adapter", everyone), ("--lengths", ",".join(map(str, tasks)))),
                )
            )
            if request.others:
                name = request.specification.name
                cells = {f"{name}:{length}": task for length, task in tasks.items()}
                steps.append(
                    Step(
                        transfer.NAME,
                        lambda measuring: transfer.run_transfer(
                            model, cells, contenders, num_groups=groups[transfer.NAME], measuring=measuring
                        ),
                        groups[transfer.NAME],
                        (("--adapter", everyone), ("--on", list(cells))),
                    )
                )
    if not request.others:
        skipped.append((transfer.NAME, "it compares adapters: pass another one with --also."))
    return steps, skipped


def run_steps(
    request: ReportRequest,
    folder: Path,
    *,
    batch_tokens: int,
    resume: bool,
    audience: Any,
) -> Ran:
    """Runs the experiments of a report, each kept in `folder` as soon as it is there.

    Args:
        request: what the report is about.
        folder: for finished sections and the parts of unfinished ones.
        batch_tokens: tokens per forward pass.
        resume: keep sections and parts in `folder` that answer the same request.
        audience: whom to tell how far it is.

    Raises:
        BlockingIOError: another run is at work in `folder`.
        OSError: a file cannot be written.
    """
    steps, skipped = report_steps(request)
    sections = []
    for step in steps:

        def make(work: Path, step: Step = step) -> Section:
            section = step.run(Measuring(batch_tokens, work, resume, audience))
            return replace(section, command=_command(request, step))

        asked = _asked(request, step)  # an adapter that cannot be read concerns all of them
        try:
            sections.append(kept_section(folder, step.name, asked, resume, make))
        except LayerRopeError as error:
            skipped.append((step.name, str(error)))
    return Ran(tuple(sections), tuple(skipped))


_DEFAULT_GROUPS = {
    u_shape.NAME: u_shape.DEFAULT_GROUPS,
    sweep.NAME: sweep.DEFAULT_GROUPS,
    layer_sensitivity.NAME: layer_sensitivity.DEFAULT_GROUPS,
    halves.NAME: halves.DEFAULT_GROUPS,
    control_points.NAME: control_points.DEFAULT_GROUPS,
    attention.NAME: attention.DEFAULT_GROUPS,
    extrapolation.NAME: extrapolation.DEFAULT_GROUPS,
    transfer.NAME: transfer.DEFAULT_GROUPS,
}


def _rope(config: LayerRopeConfig) -> tuple[tuple[str, Any], ...]:
    if config.rope_type == "default":
        return ()
    return (("--rope-type", config.rope_type), ("--factor", config.factor))


def _command(request: ReportRequest, step: Step) -> str:
    is_own = step.name == layer_sensitivity.NAME  # a command that is older than the experiments
    words = [step.name] if is_own else ["experiment", step.name]
    words += [request.model_option] if request.model_option is not None else []
    own = [("--model-args", request.model_args), *step.options]
    return command_line(words, [*own, *as_options(request.specification), ("--groups", step.groups)])


def _asked(request: ReportRequest, step: Step) -> dict[str, Any]:
    """What a step's section depends on."""
    return {
        "command": _command(request, step),
        "model": model_fingerprint(request.model),
        "adapters": [Contender.of_config("", request.config).identity()]
        + [Contender.of_adapter(other).identity() for other in request.others],
        "control_points": request.config.control_points,
        "scaled_layers": request.config.scaled_layers,
        "grid": list(request.grid.values),
    }
