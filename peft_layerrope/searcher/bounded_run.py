"""`search` under a bound: checks, schedule, the search itself, the held-out test, and the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..base_model import adapted, describe_loading
from ..report import ACCURACY, Unit, duration
from ..runs import Journal
from ..scoring.batching import check_vocabulary
from ..scoring.preflight import Preflight, prepared, with_targets
from ..scoring.scorer import Scorer
from ..tasks import PromptTask, Split, Task, check_disjoint
from ..tasks.base import check_task
from ..tuner.sites import find_stack, trained_window
from .algorithms import population_of
from .bounded import (
    SIMPLEST_FIRST,
    BoundedSearch,
    Outcome,
    available,
    contexts_to_ask,
    densely_asked,
    end_changes,
    measured_rates,
)
from .common import adapter_config, identity_of, keep_look, look, model_name, since
from .harm import SAMPLE_NAME, Windows, read_windows
from .plan import CONTROLS, PREFLIGHT, TEST, Rates, Schedule, SearchProgress, audience_of, check_length, schedule_for
from .result import LABELS, NONE, PER_LAYER, UNIFORM, ResultTable, SearchResult, TableRow
from .settings import SearchSettings
from .space import FactorSpace

_PREFLIGHT_COST = 2.5  # of a context whose questions are answered in writing, in times of scoring it
_WRITING_COST = 2.0  # the same of the held-out test
_MIN_TEST_GROUPS = 20
_HARM = Unit("harm", "nats", "nats", 1, 4)


@dataclass(frozen=True)
class BoundedPlan:
    """What a search under a bound is going to do.

    Attributes:
        schedule: of the search.
        seconds: that each stage takes, by name, the held-out test included.
        test_groups: contexts of the held-out test.
        prompt_tokens: tokens of a prompt with its questions.
        text_tokens: tokens of a window of text.
    """

    schedule: Schedule
    seconds: dict[str, float]
    test_groups: int
    prompt_tokens: int
    text_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        names = ("test_groups", "prompt_tokens", "text_tokens")
        seconds = {"seconds": self.search_seconds, "test_seconds": self.seconds[TEST]}
        return {**self.schedule.to_dict(), **seconds, **{name: getattr(self, name) for name in names}}

    @property
    def search_seconds(self) -> float:
        """Everything but the held-out test."""
        return sum(self.seconds.values()) - self.seconds[TEST]

    def sentence(self) -> str:
        """Says it to people."""
        schedule = self.schedule
        return (
            f"{_steps(schedule)} for a factor for each layer, {_controls(schedule)}, "
            f"{schedule.validation_contexts} contexts of {self.prompt_tokens:,} tokens to choose by: "
            f"about {duration(self.search_seconds)}. The held-out test on {self.test_groups} contexts: about "
            f"{duration(self.seconds[TEST])} more. --steps {schedule.steps} repeats this plan on any machine."
        )


def _steps(schedule: Schedule, taken: int | None = None) -> str:
    """What the search for a factor for each layer consists of, or of so many steps."""
    count = schedule.steps if taken is None else taken
    return f"{count} generations of {population_of(schedule.num_parameters)} vectors"


def _controls(schedule: Schedule) -> str:
    """What choices of two numbers are searched by."""
    return f"{schedule.control_steps} for each of {len(CONTROLS)} choices of two numbers"


@dataclass(frozen=True)
class _Prepared:
    """A model with an adapter whose factors are all 1, and what is known of the search before the first look."""

    model: PeftModel
    scorer: Scorer
    space: FactorSpace
    windows: Windows
    plan: BoundedPlan


@contextmanager
def _prepared(model: nn.Module, task: Task, settings: SearchSettings) -> Iterator[_Prepared]:
    """Checks what can be checked, injects the adapter, times a few passes, and plans the search by them."""
    started = time.perf_counter()
    check_task(task)
    space = settings.space(tuple(find_stack(model).key_sources))
    windows = _windows(model, task, settings)
    with adapted(model, settings.adapter_config([1.0] * space.num_layers)) as peft_model:
        scorer = Scorer(peft_model, batch_tokens=settings.batch_tokens)
        plan = _plan(peft_model, scorer, task, settings, space, windows, started)
        yield _Prepared(peft_model, scorer, space, windows, plan)


def search_under_bound(
    model: nn.Module,
    task: Task,
    settings: SearchSettings,
    *,
    progress: bool | SearchProgress,
    folder: Path | None,
    resume: bool,
    overwrite: bool,
    on_plan: Callable[[BoundedPlan], Any] | None,
    on_begin: Callable[[SearchSettings], Any] | None,
    enough: Callable[[], bool] | None,
) -> SearchResult:
    """See [`search`]."""
    with _prepared(model, task, settings) as ready, audience_of(progress) as audience:
        plan, schedule = ready.plan, ready.plan.schedule
        settings = replace(settings, steps=schedule.steps, test_groups=plan.test_groups)
        if on_plan is not None:
            on_plan(plan)
        audience.expect(plan.seconds)
        found = _looked(ready.scorer, task, settings, schedule, folder if resume else None, audience)
        search, *others = splits = _splits(model, task, settings, schedule, found)
        told = {name: value for name, value in settings.to_dict().items() if name != "minutes"}
        identity = identity_of(model, task, told, others)
        identity["text"] = [_source(settings), len(ready.windows), plan.text_tokens]
        with Journal(folder, identity, resume, overwrite) as journal:
            keep_look(folder, found)
            if journal.get("plan", "") is None:
                journal.append("plan", "", plan.to_dict())
            if on_begin is not None:
                on_begin(settings)
            text = ready.windows, plan.text_tokens
            engine = BoundedSearch(ready.model, settings, ready.space, *text, ready.scorer, journal, audience, enough)
            outcome = engine.run(schedule, search, *others)
        return _result(ready, task, settings, outcome, engine.seconds, found, splits)


def plan_under_bound(model: nn.Module, task: Task, settings: SearchSettings) -> BoundedPlan:
    """Returns what [`search_under_bound`] would do."""
    with _prepared(model, task, settings) as ready:
        return ready.plan


def _source(settings: SearchSettings) -> str:
    return Path(settings.text).name if settings.text is not None else SAMPLE_NAME


def _windows(model: nn.Module, task: Task, settings: SearchSettings) -> Windows:
    probe = task.split("search", 1)
    check_length(settings, probe.max_tokens, trained_window(model))
    Scorer(model, batch_tokens=settings.batch_tokens).check(probe)  # a model without finite scores cannot write text
    text = Path(settings.text) if settings.text is not None else None
    return read_windows(getattr(task, "tokenizer", None), text, _text_tokens(model, probe))


def _text_tokens(model: nn.Module, probe: Split) -> int:
    """Of a window: as many as a prompt has, but beyond the trained window the unscaled model is nothing to keep to."""
    return min(probe.max_tokens, trained_window(model) or probe.max_tokens)


def _plan(
    model: PeftModel,
    scorer: Scorer,
    task: Task,
    settings: SearchSettings,
    space: FactorSpace,
    windows: Windows,
    started: float,
) -> BoundedPlan:
    spent, probe = since(started), densely_asked(task, "search", 1)
    tokens = len(windows[0]) if windows else _text_tokens(model, probe)
    rates = measured_rates(model, scorer, probe, tokens)
    free = len(space.scaled_layers)
    before = spent + settings.preflight_groups * rates.context * _PREFLIGHT_COST
    if settings.steps is None:
        schedule = schedule_for(60 * settings.minutes - before, rates, free, settings.full_controls)
    else:
        schedule = Schedule(settings.steps, free, settings.full_controls)
    test_groups, test_seconds = _test_size(task, settings, rates)
    seconds = {PREFLIGHT: before, **schedule.seconds(rates), TEST: test_seconds}
    return BoundedPlan(schedule, seconds, test_groups, probe.max_tokens, tokens)


def _test_size(task: Task, settings: SearchSettings, rates: Rates) -> tuple[int, float]:
    """How many contexts the held-out test has, and how long it takes."""
    each = (len(SIMPLEST_FIRST) + 1) * rates.context * _WRITING_COST
    groups = settings.test_groups
    if settings.steps is None:  # otherwise everything is settled
        groups = min(groups, max(_MIN_TEST_GROUPS, int(60 * settings.test_minutes / each)))
    groups = available(task, "test", groups)
    return groups, groups * each


def _looked(
    scorer: Scorer,
    task: Task,
    settings: SearchSettings,
    schedule: Schedule,
    folder: Path | None,
    audience: SearchProgress,
) -> Preflight | None:
    """What the unscaled model writes; of a search that goes on, what it wrote then."""
    if not isinstance(task, PromptTask):
        return None
    wanted = {
        "search": contexts_to_ask(task, schedule.search_contexts),
        "validation": available(task, "validation", schedule.validation_contexts),
        "test": settings.test_groups,
    }
    found = look(scorer, task, settings, wanted, folder, audience)
    if not settings.anyway:
        found.check()
    return found


def _splits(
    model: nn.Module, task: Task, settings: SearchSettings, schedule: Schedule, found: Preflight | None
) -> tuple[Split, Split, Split]:
    """The search, the validation and the test split, which share no context."""
    searched = prepared(task, found) if isinstance(task, PromptTask) and found is not None else task
    made = (
        densely_asked(searched, "search", contexts_to_ask(searched, schedule.search_contexts)),
        densely_asked(task, "validation", available(task, "validation", schedule.validation_contexts)),
        task.split("test", settings.test_groups),
    )
    check_disjoint(made)
    for split in made:
        check_vocabulary(model, split.examples)
    search, validation, test = (with_targets(split, found, task) if found is not None else split for split in made)
    return search, validation, test


def _result(
    ready: _Prepared,
    task: Task,
    settings: SearchSettings,
    outcome: Outcome,
    seconds: Mapping[str, float],
    found: Preflight | None,
    splits: Sequence[Split],
) -> SearchResult:
    model, plan, scaled_layers = ready.model, ready.plan, ready.space.scaled_layers
    base = model.get_base_model()
    name = model_name(base)
    rows = [
        TableRow(key, f.factors, f.fitness, f.evaluations, False, outcome.test[key], outcome.harm[key])
        for key, f in outcome.found.items()
    ]
    best = outcome.found[outcome.chosen].factors
    low, high = settings.factor_limits
    history = [
        {"generation": number, **asdict(generation)}
        for number, generation in enumerate(outcome.found[PER_LAYER].generations)
    ]
    return SearchResult(
        config=adapter_config(model, settings, best, name, scaled_layers=list(scaled_layers)),
        table=ResultTable(tuple(rows)),
        settings=settings,
        chosen=outcome.chosen,
        control_points=None,
        model_name=name,
        base=describe_loading(base),
        model_window=trained_window(model),
        task=task.describe(),
        splits=[split.describe() for split in splits],
        history=history,
        evaluations={
            "per_layer_search": outcome.found[PER_LAYER].evaluations,
            "all_methods": sum(f.evaluations for f in outcome.found.values()),
        },
        guards={
            "max_harm": settings.max_harm,
            "text": _source(settings) if ready.windows else None,
            "windows": len(ready.windows),
            "tokens_per_window": plan.text_tokens,
        },
        timing={"seconds": {k: round(v, 2) for k, v in seconds.items()}, "plan": plan.to_dict()},
        edge_layers=[i for i in scaled_layers if not low < best[i] < high],
        measurements={},
        bootstrap=None,
        preflight=found,
        notes=_notes(ready, settings, outcome),
    )


def _notes(ready: _Prepared, settings: SearchSettings, outcome: Outcome) -> tuple[str, ...]:
    """What came out, its harm, and what it took, in sentences."""
    chosen, harm = outcome.chosen, outcome.harm[outcome.chosen]
    bound = "no bound" if settings.max_harm is None else f"a bound of {settings.max_harm:g} nats"
    label = LABELS[chosen]
    if chosen == PER_LAYER:
        verdict = (
            f'result: "{label}". On the validation split it is better than every simpler choice under {bound} on '
            "ordinary text."
        )
    else:
        verdict = (
            f'result: "{label}". On the validation split no more elaborate choice under {bound} on ordinary text is '
            "better than it by an interval that excludes 0."
        )
    text = f"harm: divergence on text that the unscaled model wrote {_HARM.mean(harm.divergence)} nats"
    if harm.loss_rise is not None:
        text += f", rise of the loss on people's text ({_source(settings)}) {_HARM.mean(harm.loss_rise)} nats"
    text += "."
    if chosen != NONE and outcome.test[chosen].measure != "loss":
        ends = end_changes(outcome.test[chosen], outcome.test[NONE])
        first, last = map(ACCURACY.change_in_words, ends)
        text += f" Held-out accuracy at the first position {first}, at the last {last}."
    schedule, taken = ready.plan.schedule, len(outcome.found[PER_LAYER].generations)
    early = f" (ended early: {schedule.steps} were planned)" if taken < schedule.steps else ""
    cost = (
        f"cost: {_steps(schedule, taken)} for a factor for each layer{early}, {_controls(schedule)}, "
        f"{outcome.found[UNIFORM].evaluations} uniform factors from 0.4 to 2.5."
    )
    return verdict, text, cost
