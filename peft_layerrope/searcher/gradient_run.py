"""`search` with `algorithm="gradient"`: checks, schedule, the search itself, the held-out test, and the result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..adapted import adapted
from ..base_model import describe_loading
from ..files.atomic import write_atomically
from ..files.strict_json import to_json
from ..fingerprint import library_versions, model_fingerprint
from ..runs import Journal
from ..scoring.batching import check_vocabulary
from ..scoring.preflight import PREFLIGHT_NAME, Preflight, preflight, with_targets
from ..scoring.scorer import Scorer
from ..scoring.scores import PositionScores
from ..tasks import PromptTask, Split, Task, check_disjoint
from ..tasks.base import check_task
from ..tuner.sites import embedding_table, find_stack, trained_window
from .config_of import adapter_config, model_name
from .gradient_search import SIMPLEST_FIRST, GradientSearch, Outcome, available, contexts_to_ask, densely_asked
from .ordinary_text import Windows, ordinary_windows
from .plan import check_length
from .progress import SearchProgress, audience_of
from .result import LABELS, PER_LAYER, UNIFORM, ResultTable, SearchResult, TableRow
from .schedule import Rates, Schedule, schedule_for
from .settings import SearchSettings

_PREFLIGHT_COST = 2.5  # of a context whose questions are answered in writing, in times of scoring it
_WRITING_COST = 2.0  # the same of the held-out test
_MIN_TEST_GROUPS = 20


@dataclass(frozen=True)
class GradientPlan:
    """What a search by gradients is going to do.

    Attributes:
        schedule: of the search.
        seconds: that it takes, the preflight included.
        test_groups: contexts of the held-out test.
        test_seconds: that those take.
        prompt_tokens: tokens of a prompt, and of a window of text.
        text_tokens: tokens of a window of text.
    """

    schedule: Schedule
    seconds: float
    test_groups: int
    test_seconds: float
    prompt_tokens: int
    text_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        names = ("seconds", "test_groups", "test_seconds", "prompt_tokens", "text_tokens")
        return {**self.schedule.to_dict(), **{name: getattr(self, name) for name in names}}

    def sentence(self) -> str:
        """Says it to people."""
        schedule = self.schedule
        return (
            f"{schedule.steps} gradient steps on a factor for each layer, {schedule.control_steps} on each of two "
            f"simpler choices, {schedule.validation_contexts} contexts of {self.prompt_tokens:,} tokens to choose by: "
            f"about {_minutes(self.seconds)}. The held-out test on {self.test_groups} contexts: about "
            f"{_minutes(self.test_seconds)} more. --steps {schedule.steps} repeats this plan on any machine."
        )


def search_by_gradients(
    model: nn.Module,
    task: Task,
    settings: SearchSettings,
    *,
    progress: bool | SearchProgress,
    folder: Path | None,
    resume: bool,
    overwrite: bool,
    on_plan: Callable[[GradientPlan], Any] | None,
    on_begin: Callable[[SearchSettings], Any] | None = None,
    enough: Callable[[], bool] | None = None,
) -> SearchResult:
    """See [`search`]."""
    started = time.perf_counter()
    check_task(task)
    space = settings.space(tuple(find_stack(model).key_sources))
    windows, source = _windows(model, task, settings)
    with adapted(model, settings.adapter_config([1.0] * space.num_layers)) as peft_model:
        scorer = Scorer(peft_model, batch_tokens=settings.batch_tokens)
        with audience_of(progress) as audience:
            kept = _Later()
            asked = enough or (lambda: False)
            engine = GradientSearch(peft_model, task, settings, space, windows, scorer, kept, audience, asked)
            plan = _plan(engine, task, settings, windows, time.perf_counter() - started)
            settings = replace(settings, steps=plan.schedule.steps, test_groups=plan.test_groups)
            if on_plan is not None:
                on_plan(plan)
            found = _looked(scorer, task, settings, plan.schedule, folder if resume else None, audience)
            splits = _splits(model, task, settings, plan.schedule, found)
            identity = {
                "settings": {name: value for name, value in settings.to_dict().items() if name != "minutes"},
                "task": task.describe(),
                "splits": [split.describe() for split in splits],
                "text": [source, len(windows), len(windows[0])],
                "model": model_fingerprint(model),
                "base": describe_loading(model),
                "versions": library_versions(),
                "device": embedding_table(model).device.type,
            }
            with Journal(folder, identity, resume, overwrite) as journal:
                kept.journal = journal
                if found is not None and folder is not None:
                    write_atomically(folder / PREFLIGHT_NAME, to_json(found.to_plain()) + "\n")
                if journal.get("plan", "") is None:
                    journal.append("plan", "", plan.to_dict())
                if on_begin is not None:
                    on_begin(settings)
                outcome = engine.run(found, plan.schedule, splits[0])
                table = _held_out(peft_model, scorer, outcome, splits[1], journal, audience)
        return _result(peft_model, task, settings, plan, outcome, table, engine, found, splits, source, windows)


def plan_by_gradients(model: nn.Module, task: Task, settings: SearchSettings) -> GradientPlan:
    """Returns what [`search_by_gradients`] would do."""
    started = time.perf_counter()
    check_task(task)
    space = settings.space(tuple(find_stack(model).key_sources))
    windows, _ = _windows(model, task, settings)
    with adapted(model, settings.adapter_config([1.0] * space.num_layers)) as peft_model:
        scorer = Scorer(peft_model, batch_tokens=settings.batch_tokens)
        engine = GradientSearch(peft_model, task, settings, space, windows, scorer, _Later(), audience_of(False))
        return _plan(engine, task, settings, windows, time.perf_counter() - started)


class _Later:
    """A record that a journal is given to once everything is checked."""

    journal: Journal | None = None

    def get(self, kind: str, key: str) -> Any:
        return self.journal.get(kind, key)

    def append(self, kind: str, key: str, value: Any) -> None:
        self.journal.append(kind, key, value)


def _windows(model: nn.Module, task: Task, settings: SearchSettings) -> tuple[Windows, str]:
    probe = task.split("search", 1)
    check_length(settings, probe.max_tokens, trained_window(model))
    Scorer(model, batch_tokens=settings.batch_tokens).check(probe)  # a model without finite scores cannot write text
    text = Path(settings.text) if settings.text is not None else None
    tokenizer = getattr(task, "tokenizer", None)
    # beyond the trained window the unscaled model is nothing to keep to
    length = min(probe.max_tokens, trained_window(model) or probe.max_tokens)
    return ordinary_windows(model, tokenizer, text, length, seed=settings.seed)


def _plan(engine: GradientSearch, task: Task, settings: SearchSettings, windows: Windows, spent: float) -> GradientPlan:
    probe = densely_asked(task, 1)
    rates = engine.rates(probe)
    before = spent + settings.preflight_groups * rates.context * _PREFLIGHT_COST
    if settings.steps is None:
        schedule = schedule_for(60 * settings.minutes - before, rates, settings.full_controls)
    else:
        schedule = Schedule(settings.steps, settings.full_controls)
    test_groups, seconds = _test_size(task, settings, rates)
    return GradientPlan(
        schedule, before + schedule.seconds(rates), test_groups, seconds, probe.max_tokens, len(windows[0])
    )


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
    if folder is not None and (folder / PREFLIGHT_NAME).exists():
        return Preflight.load(folder / PREFLIGHT_NAME)
    validation = available(task, "validation", schedule.validation_contexts)
    wanted = {
        "search": contexts_to_ask(task, schedule.search_contexts),
        "validation": validation,
        "test": settings.test_groups,
    }
    audience.stage("preflight", len(wanted))

    def tell(text: str) -> None:
        audience.advance()
        audience.note(text.removeprefix("preflight: "))

    found = preflight(scorer, task, num_groups=settings.preflight_groups, wanted=wanted, tell=tell)
    if not settings.anyway:
        found.check()
    return found


def _splits(
    model: nn.Module, task: Task, settings: SearchSettings, schedule: Schedule, found: Preflight | None
) -> tuple[Split, Split]:
    """The validation and the test split; that of the search shares no context with them."""
    validation = available(task, "validation", schedule.validation_contexts)
    made = [task.split("validation", validation), task.split("test", settings.test_groups)]
    check_disjoint([task.split("search", contexts_to_ask(task, schedule.search_contexts)), *made])
    for split in made:
        check_vocabulary(model, split)
    first, second = (with_targets(split, found, task) if found is not None else split for split in made)
    return first, second


def _held_out(
    model: PeftModel, scorer: Scorer, outcome: Outcome, test: Split, journal: Journal, audience: SearchProgress
) -> ResultTable:
    """Every method's vector on the test split, by the answers that the model writes with it."""
    audience.stage("held-out test", len(outcome.found))
    rows = []
    for name, found in outcome.found.items():
        kept = journal.get("test", list(found.factors))
        if kept is None:
            model.base_model.set_layer_factors(found.factors)
            kept = scorer.measure(test).to_plain()
            journal.append("test", list(found.factors), kept)
        audience.advance()
        scores = PositionScores.from_plain(kept)
        row = TableRow(name, found.factors, found.fitness, found.evaluations, False, scores, outcome.harm[name])
        rows.append(row)
    return ResultTable(tuple(rows))


def _result(
    model: PeftModel,
    task: Task,
    settings: SearchSettings,
    plan: GradientPlan,
    outcome: Outcome,
    table: ResultTable,
    engine: GradientSearch,
    found: Preflight | None,
    splits: tuple[Split, Split],
    source: str,
    windows: Windows,
) -> SearchResult:
    name = model_name(model.get_base_model())
    best = outcome.found[outcome.chosen].factors
    low, high = settings.factor_limits
    history = [
        {"step": i, "fitness": s.fitness, "divergence": s.divergence, "price": s.price}
        for i, s in enumerate(outcome.found[PER_LAYER].steps)
    ]
    return SearchResult(
        config=adapter_config(model, settings, best, name, scaled_layers=list(engine.scaled_layers)),
        table=table,
        settings=settings,
        chosen=outcome.chosen,
        control_points=None,
        model_name=name,
        base=describe_loading(model.get_base_model()),
        model_window=trained_window(model),
        task=task.describe(),
        splits=[engine.search_split.describe(), *(split.describe() for split in splits)],
        history=history,
        evaluations={
            "per_layer_search": plan.schedule.steps,
            "all_methods": sum(f.evaluations for f in outcome.found.values()),
            "gradient_steps": plan.schedule.steps + 2 * plan.schedule.control_steps,
        },
        guards={
            "max_harm": settings.max_harm,
            "text": source,
            "windows": len(windows),
            "tokens_per_window": len(windows[0]),
        },
        timing={"seconds": {k: round(v, 2) for k, v in engine.seconds.items()}, "plan": plan.to_dict()},
        edge_layers=[i for i in engine.scaled_layers if not low < best[i] < high],
        measurements={},
        bootstrap=None,
        preflight=found,
        notes=_notes(settings, plan, outcome, table, source, windows),
    )


def _notes(
    settings: SearchSettings,
    plan: GradientPlan,
    outcome: Outcome,
    table: ResultTable,
    source: str,
    windows: Windows,
) -> tuple[str, ...]:
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
    half, loss = len(windows) // 2, harm.loss_rise
    text = (
        f"ordinary text ({source}, {half} windows of {len(windows[0])} tokens that no gradient was taken on): "
        f"divergence {harm.divergence.value:.4f} [{harm.divergence.low:.4f}, {harm.divergence.high:.4f}] nats, loss "
        f"{loss.value:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}] nats."
    )
    schedule, taken = plan.schedule, len(outcome.found[PER_LAYER].steps)
    early = f" (ended early: {schedule.steps} were planned)" if taken < schedule.steps else ""
    cost = (
        f"cost: {taken} gradient steps for a factor for each layer{early}, {schedule.control_steps} for each "
        f"simpler choice of two numbers, {outcome.found[UNIFORM].evaluations} uniform factors from 0.4 to 2.5."
    )
    return verdict, text, cost


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
