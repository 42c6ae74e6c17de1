"""`search`: from a model and a task to an adapter and a held-out table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..base_model import adapted, describe_loading, library_versions, model_fingerprint, model_name
from ..errors import SearchError, TaskError, named
from ..files import DEMO_NAME, writing
from ..report import ACCURACY, Unit, times, unit_of
from ..runs import Journal, recorded_identity
from ..scoring.batching import check_vocabulary, tokens_run
from ..scoring.preflight import PREFLIGHT_NAME, Preflight, preflight, prepared, with_targets
from ..scoring.scorer import Scorer
from ..tasks.base import Split, Task, check_disjoint, check_task
from ..tasks.prompts import PromptTask
from ..tuner.sites import embedding_table, find_stack, trained_window
from .evaluator import (
    Evaluator,
    ModelEvaluator,
    available,
    contexts_to_ask,
    densely_asked,
    densely_scored,
    kept_part,
    probes,
    shortened,
    times_dearer,
)
from .harm import MAX_DROP, SAMPLE_NAME, Windows, read_windows, scored_positions, window_logits
from .plan import (
    CONTROLS,
    KEPT_CONTEXTS,
    PREFLIGHT,
    TEST,
    Plan,
    Rates,
    RichProgress,
    Schedule,
    SearchProgress,
    check_length,
    grown,
    schedule_for,
    since,
)
from .result import LABELS, NONE, PER_LAYER, UNIFORM, ResultTable, SearchResult, TableRow
from .settings import MIN_STEPS, SearchSettings
from .space import FactorSpace
from .stages import LOSSES, SIMPLEST_FIRST, UNIFORM_RANGE, Outcome, Stages, end_changes

_MIN_TEST_GROUPS = 20
_FIRST_TOKENS = 64  # of the pass that nobody times
_TIMED_TOKENS, _PATIENCE = 1024, 5.0  # beyond twice the former, what takes more seconds is timed on fewer tokens
_KEPT_LOOKED = 2  # contexts of a task that is to be kept, which show how its answers are written
_HARM = Unit("harm", "nats", "nats", 1, 4)

Distribute = Callable[[ModelEvaluator, Split], Evaluator]
"""Given the evaluator of this process and a part of the search split, returns one that has the work done elsewhere; see
`ray_workers`."""


def search(
    model: nn.Module,
    task: Task,
    settings: SearchSettings | None = None,
    *,
    keep: Task | None = None,
    progress: bool | SearchProgress = True,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_begin: Callable[[SearchSettings], None] | None = None,
    distribute: Distribute | None = None,
    enough: Callable[[], bool] | None = None,
    **overrides: Any,
) -> SearchResult:
    """Searches one RoPE factor per layer (arXiv 2503.04355) and compares it with simpler choices.

    Uniform factors race on a few contexts. Then CMA-ES searches two choices of two numbers and a factor for each layer,
    each generation on fresh contexts, with the change of ordinary text in the objective; a validation split chooses the
    simplest that none clearly beats. With `algorithm="paper"` a genetic algorithm over cubic Bézier curves, which
    maximizes the context utilisation of exact matches, takes the place of the factor for each layer.

    What each chose is then scored once on the held-out test split.

    Args:
        model: a transformers causal language model; left as it was found.
        task: where the examples come from; its splits must be disjoint.
        settings: see [`SearchSettings`].
        keep: another task, or the same with other prompts. What clearly makes right answers there less likely, by more
            than 3 points on a few contexts of its validation split, is not the result.
        progress: a progress bar (default), none (`False`), or your own.
        folder: where `journal.jsonl` keeps all that was measured; default: in memory only.
        resume: go on from what is in `folder`, if there is something; the result is the uninterrupted run's, bit for
            bit on as many threads.
        overwrite: begin anew in `folder`; what is there is replaced once all is checked and a few passes were timed.
        on_plan: told what the search is going to cost, as soon as that is known.
        on_begin: told the settings, with what the plan has settled, when all is checked and the journal has begun.
        distribute: has the scoring of vectors done elsewhere; see `ray_workers`.
        enough: asked after each generation; once it says so, what was found so far is measured and returned.
        **overrides: fields of `SearchSettings`, instead of `settings`.

    Returns:
        The result: `.config`, `.table`, `.save_pretrained(directory)`.

    Raises:
        SearchError: the settings do not work for this model, or the journal is not this search's.
        TaskError: the splits cannot be made, overlap, or do not fit the model.
        TaskError: the unscaled model answers nothing, or everything, and `anyway` is off.
        UnsupportedModelError: the model's rotation cannot be scaled per layer.
        BlockingIOError: another search is at work in `folder`.
        OSError: the journal cannot be written, as on a full disk; make room and resume.

    Example:
    ```py
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from peft_layerrope import KeyValueWords, demo_model_path, search

    >>> model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    >>> task = KeyValueWords(AutoTokenizer.from_pretrained(demo_model_path()), length=512)
    >>> result = search(model, task, steps=24, max_harm=None)
    >>> result.save_pretrained("my-adapter")
    ```
    """
    settings = _settings(settings, overrides)
    if resume and folder is not None and settings.steps is None:  # the clock decided on them then
        there = recorded_identity(Path(folder)).get("settings", {})
        settings = replace(settings, **{name: there[name] for name in ("steps", "test_groups") if name in there})
    if isinstance(progress, bool):
        progress = RichProgress() if progress else SearchProgress()
    elif not hasattr(progress, "stage"):
        raise SearchError(f"progress={named(progress)} must be True, False or a SearchProgress.")
    kept = Path(folder) if folder is not None else None
    with _prepared(model, task, settings, keep) as ready, progress as audience:
        plan = ready.plan
        settings = replace(settings, steps=plan.schedule.steps, test_groups=plan.test_groups)
        ready = replace(ready, settings=settings)
        if on_plan is not None:
            on_plan(plan)
        audience.expect(plan.seconds)
        found = _looked(ready, kept if resume else None, audience)
        search, *others = splits = _splits(ready, found, audience)
        ready.scorer.check(search)  # of prompts as long as these, before a candidate's factors are on the model
        identity = {
            "settings": {name: value for name, value in asdict(settings).items() if name != "minutes"},
            "task": task.describe(),
            "splits": [split.describe() for split in others],
            "model": model_fingerprint(model),
            "base": describe_loading(model),
            "versions": library_versions(),
            "device": embedding_table(model).device.type,
            "text": [_source(settings), len(ready.windows), plan.text_tokens],
        }
        with Journal(kept, identity, resume, overwrite) as journal:
            if kept is not None and found is not None:
                found.save(kept)
            elif kept is not None:  # what another search found there
                with writing(kept):
                    (kept / PREFLIGHT_NAME).unlink(missing_ok=True)
            if journal.get("plan", "") is None:
                journal.append("plan", "", plan.to_dict())
            if on_begin is not None:
                on_begin(settings)
            local = ModelEvaluator(ready.scorer)
            evaluator = distribute(local, search.part([0])) if distribute is not None else local
            stages = Stages(
                ready.scorer.model,
                settings,
                ready.space,
                ready.windows,
                plan.text_tokens,
                evaluator,
                journal,
                audience,
                enough or (lambda: False),
            )
            outcome = stages.run(plan.schedule, search, *others)
        return _result(ready, outcome, stages, found, splits)


def plan_search(
    model: nn.Module,
    task: Task,
    settings: SearchSettings | None = None,
    *,
    keep: Task | None = None,
    **overrides: Any,
) -> Plan:
    """Returns what [`search`] with these arguments would do, after a few timed passes. Writes nothing."""
    with _prepared(model, task, _settings(settings, overrides), keep) as ready:
        return ready.plan


def _settings(settings: SearchSettings | None, overrides: dict[str, Any]) -> SearchSettings:
    if settings is not None and overrides:
        raise SearchError(f"pass either settings or fields of it, got both: {', '.join(overrides)}.")
    if settings is None:
        return SearchSettings(**overrides)
    if not isinstance(settings, SearchSettings):
        raise SearchError(
            f"settings={named(settings)} must be a SearchSettings; or pass its fields by name, as in "
            "search(model, task, minutes=20)."
        )
    return settings


@dataclass(frozen=True)
class _Prepared:
    """A model with an adapter whose factors are all 1, and what is known of the search before the first look."""

    task: Task
    keep: Task | None  # on which the result is to lose nothing
    settings: SearchSettings  # with the plan's steps and contexts, once a search begins
    scorer: Scorer
    space: FactorSpace
    windows: Windows
    plan: Plan


@contextmanager
def _prepared(model: nn.Module, task: Task, settings: SearchSettings, keep: Task | None) -> Iterator[_Prepared]:
    """Checks what can be checked, injects the adapter, times a few passes, and plans the search by them."""
    started = time.perf_counter()
    check_task(task)
    if keep is not None:
        check_task(keep)
        if keep.split("validation", 1).measure == "loss":
            raise TaskError(f"keep: {keep.name} has no answers, which may be right or wrong.")
    space = settings.space(tuple(find_stack(model).key_sources))
    with adapted(model, settings.adapter_config([1.0] * space.num_layers)) as peft_model:
        scorer = Scorer(peft_model, batch_tokens=settings.batch_tokens)
        windows = _windows(scorer, task, settings)
        plan = _plan(scorer, task, keep, settings, space, windows, started)
        yield _Prepared(task, keep, settings, scorer, space, windows, plan)


def _source(settings: SearchSettings) -> str:
    return Path(settings.text).name if settings.text is not None else SAMPLE_NAME


def _windows(scorer: Scorer, task: Task, settings: SearchSettings) -> Windows:
    probe = task.split("search", 1)
    if probe.measure == "loss" and settings.algorithm == "paper":
        raise SearchError(
            f"algorithm='paper' with the task {task.name!r}, which measures a loss: nothing is right or wrong there. "
            "Use algorithm='cma-es'."
        )
    model = scorer.model.get_base_model()
    check_length(settings, probe.max_tokens, trained_window(model))
    scorer.check(shortened(probe, _TIMED_TOKENS))  # a model without finite scores cannot write text
    text = Path(settings.text) if settings.text is not None else None
    return read_windows(getattr(task, "tokenizer", None), text, _text_tokens(model, probe))


def _text_tokens(model: nn.Module, probe: Split) -> int:
    """Of a window: as many as a prompt has, but beyond the trained window the unscaled model is nothing to keep to."""
    return min(probe.max_tokens, trained_window(model) or probe.max_tokens)


def _plan(
    scorer: Scorer,
    task: Task,
    keep: Task | None,
    settings: SearchSettings,
    space: FactorSpace,
    windows: Windows,
    started: float,
) -> Plan:
    spent, (longest, typical, tested) = since(started), probes(task)
    tokens = len(windows[0]) if windows else _text_tokens(scorer.model, longest)
    text = max(longest.examples, key=lambda example: example.num_tokens)
    kept = kept_part(keep, 1) if keep is not None else None
    rates = measured_rates(scorer, typical, tested, (text.prompt_ids + text.answer_ids)[:tokens], kept)
    shortest = Schedule.of(settings, settings.steps or MIN_STEPS, len(space.scaled_layers))
    before = spent + settings.preflight_groups * rates.written
    schedule = shortest if settings.steps else schedule_for(60 * settings.minutes - before, rates, shortest)
    each_test = (len(SIMPLEST_FIRST) + 1) * rates.written * times_dearer(task, tested)
    groups = settings.test_groups
    if settings.steps is None:  # otherwise everything is settled
        groups = min(groups, max(_MIN_TEST_GROUPS, int(60 * settings.test_minutes / each_test)))
    groups = available(task, "test", groups)
    if groups < 2:
        raise TaskError(
            f"{task.name} has 1 context for the test split, expected at least 2: a difference has none to vary over."
        )
    seconds = {PREFLIGHT: before, **schedule.seconds(rates), TEST: groups * each_test}
    return Plan(schedule, seconds, groups, longest.max_tokens, tokens)


def _looked(ready: _Prepared, folder: Path | None, audience: SearchProgress) -> Preflight | None:
    """What the unscaled model writes; of a search that goes on in a folder, what it wrote then."""
    task, settings, schedule = ready.task, ready.settings, ready.plan.schedule
    if not isinstance(task, PromptTask):
        return None

    def tell(text: str) -> None:
        audience.advance()
        audience.note(text)

    wanted = {
        "search": contexts_to_ask(task, schedule.search_contexts),
        "validation": available(task, "validation", schedule.validation_contexts),
        "test": settings.test_groups,
    }
    audience.stage(PREFLIGHT, len(wanted))
    found = preflight(ready.scorer, task, num_groups=settings.preflight_groups, wanted=wanted, tell=tell, kept=folder)
    if not settings.anyway:
        found.check(task)
    return found


def _splits(ready: _Prepared, found: Preflight | None, audience: SearchProgress) -> tuple[Split, ...]:
    """The search, the validation and the test split, and what is to be kept, if anything is; they share no context."""
    task, schedule = ready.task, ready.plan.schedule
    searched = prepared(task, found) if found is not None else task
    made = (
        densely_asked(searched, "search", contexts_to_ask(searched, schedule.search_contexts)),
        densely_asked(task, "validation", available(task, "validation", schedule.validation_contexts)),
        task.split("test", ready.settings.test_groups),
    )
    made = (*(with_targets(split, found, task) for split in made), *_kept(ready, audience))
    check_disjoint(made)
    for split in made:
        check_vocabulary(ready.scorer.model, split.examples)
    return made


def _kept(ready: _Prepared, audience: SearchProgress) -> tuple[Split, ...]:
    """Contexts of the task that is to be kept, if there is one, asked for answers as the unscaled model writes them."""
    keep = ready.keep
    if keep is None:
        return ()
    split = kept_part(keep, KEPT_CONTEXTS)
    ready.scorer.check(split)
    if not isinstance(keep, PromptTask):
        return (split,)
    contexts = {"validation": split.num_groups}
    found = preflight(ready.scorer, keep, num_groups=_KEPT_LOOKED, wanted=contexts, tell=audience.note)
    if not ready.settings.anyway:
        found.check(keep, ceiling=math.inf)
    return (with_targets(split, found, keep),)


def _result(
    ready: _Prepared, outcome: Outcome, stages: Stages, found: Preflight | None, splits: Sequence[Split]
) -> SearchResult:
    plan, settings, base = ready.plan, ready.settings, ready.scorer.model.get_base_model()
    name = model_name(base)
    rows = [
        TableRow(key, f.factors, f.fitness, f.evaluations, outcome.test[key], outcome.harm[key])
        for key, f in ((name, outcome.found[name]) for name in LABELS)
    ]
    best = outcome.found[outcome.chosen]
    config = settings.adapter_config(list(best.factors))
    if config.rope_type == "dynamic" and config.original_max_position_embeddings is None:
        config.original_max_position_embeddings = trained_window(base)
    config.base_model_name_or_path = DEMO_NAME if name == DEMO_NAME else base.config._name_or_path
    generations = outcome.found[PER_LAYER].generations
    result = SearchResult(
        config=config,
        table=ResultTable(tuple(rows)),
        settings=settings,
        chosen=outcome.chosen,
        scaled_layers=ready.space.scaled_layers,
        control_points=best.control_points,
        model_name=name,
        base=describe_loading(base),
        model_window=trained_window(base),
        task=ready.task.describe(),
        splits=[split.describe() for split in splits],
        history=[{"generation": number, **generation} for number, generation in enumerate(generations)],
        bound={
            "max_harm": settings.max_harm,
            "text": _source(settings) if ready.windows else None,
            "windows": len(ready.windows),
            "tokens_per_window": plan.text_tokens,
            **({"kept": ready.keep.describe()} if ready.keep is not None else {}),
        },
        timing={
            "seconds": {k: round(v, 2) for k, v in stages.seconds.items()},
            "resumed": stages.journal.resumed,
            "plan": plan.to_dict(),
        },
        preflight=found,
    )
    verdict, *notes = _notes(ready, outcome, result.label(outcome.chosen))
    return replace(result, notes=(verdict, *_told_of_kept(outcome, splits[3:]), *notes))


def _told_of_kept(outcome: Outcome, kept: Sequence[Split]) -> Iterator[str]:
    """What was measured on the task that is to be kept, if there is one, in a sentence."""
    for split in kept:
        changes = {name: change for name in SIMPLEST_FIRST if (change := outcome.harm[name].kept) is not None}
        told = "; ".join(f'"{LABELS[name]}" {ACCURACY.change_in_words(change)}' for name, change in changes.items())
        yield (
            f"kept: change of the probability of right answers on {split.num_groups} contexts of up to "
            f"{split.max_tokens} tokens that are to be kept, each asked at {len(split.positions)} positions: "
            f"{told or 'nothing was measured'}. What clearly loses more than {ACCURACY.scale * MAX_DROP:g} points "
            "there is not the result."
        )


def _notes(ready: _Prepared, outcome: Outcome, label: str) -> tuple[str, ...]:
    """What came out, which is called `label`, its harm, and what it took, in sentences."""
    settings = ready.settings
    chosen, harm = outcome.chosen, outcome.harm[outcome.chosen]
    scores, before = outcome.test[chosen], outcome.test[NONE]
    bound = "with no bound" if settings.max_harm is None else f"under a bound of {settings.max_harm:g} nats"
    why = "the simplest choice that no other clearly beats, by an interval that excludes 0,"
    if chosen == PER_LAYER:
        why = "better than every simpler choice"
    verdict = f'result: "{label}". On the validation split it is {why} {bound} on ordinary text.'
    if chosen != NONE:
        unit, change = unit_of(scores.measure), scores.paired_difference(before)
        shown = ", not told from 0 by its interval" if change.low <= 0 <= change.high else ""
        verdict += f" Held out, it changes the {unit.name} by {unit.change_in_words(change)} against no scaling{shown}."
    text = f"harm: divergence on text that the unscaled model wrote {_HARM.mean(harm.divergence)} nats"
    if harm.loss_rise is not None:
        text += f", rise of the loss on people's text ({_source(settings)}) {_HARM.mean(harm.loss_rise)} nats"
    text += "."
    if chosen != NONE and scores.measure != "loss":
        first, last = map(ACCURACY.change_in_words, end_changes(scores, before))
        text += f" Held-out accuracy at the first position {first}, at the last {last}."
    schedule, taken = ready.plan.schedule, len(outcome.found[PER_LAYER].generations)
    ends = np.clip(UNIFORM_RANGE, *settings.factor_limits)
    early = ""
    if taken < schedule.steps:
        early = f" (ended early: {schedule.steps} were planned, and a repetition has them)"
    cost = (
        f"cost: {times(taken, 'generation')} of {schedule.population} candidates for a factor for each layer{early}, "
        f"{schedule.control_steps} for each of {len(CONTROLS)} choices of two numbers, "
        f"{outcome.found[UNIFORM].evaluations} uniform factors from {ends[0]:g} to {ends[1]:g}."
    )
    if (found := outcome.found[chosen]).unmerged is not None:
        cost += (
            f" {len(set(found.factors))} different factors were left of more: fitness {found.fitness:.3f} instead of "
            f"{found.unmerged:.3f}."
        )
    return verdict, text, cost


def measured_rates(scorer: Scorer, one: Split, tested: Split, text: Sequence[int], kept: Split | None = None) -> Rates:
    """Times the unscaled model on one context that is scored, on one that is tested, on a window of text, and on one of
    a task that is to be kept, after a short pass that makes everything ready. What would take long is told of shorter
    prompts.
    """
    lengths = _TIMED_TOKENS, 2 * _TIMED_TOKENS

    @torch.no_grad()
    def read(tokens: int) -> None:
        window_logits(scorer.model, text[:tokens], scored_positions(tokens, most=LOSSES))

    def score(split: Split) -> None:
        densely_scored(scorer, split)

    def seconds(run: Callable[[Any], object], given: Any) -> float:
        started = time.perf_counter()
        run(given)
        return max(1e-6, since(started))

    def told(run: Callable[[Split], object], split: Split, first: float | None = None) -> float:
        few, more = (shortened(split, tokens) for tokens in lengths)
        measured = (
            (tokens_run(few.examples), first or seconds(run, few)),
            (tokens_run(more.examples), seconds(run, more)),
        )
        return grown(tokens_run(split.examples), measured)

    def told_of_long(split: Split) -> float | None:
        """Of scoring a context that would take long; None where it does not."""
        few, more = (shortened(split, tokens) for tokens in lengths)
        if not few.max_tokens < more.max_tokens < split.max_tokens:
            return None
        first = seconds(score, few)
        if first * tokens_run(split.examples) <= _PATIENCE * tokens_run(few.examples):
            return None
        return told(score, split, first)

    read(min(_FIRST_TOKENS, len(text)))
    context = told_of_long(one)
    other = (told_of_long(kept) or seconds(score, kept)) if kept is not None else 0.0
    if context is None:
        scorer.check(one)  # outside of what is timed
        return Rates(seconds(score, one), seconds(read, len(text)), seconds(scorer.measure, tested), other)
    if len(text) <= lengths[-1]:
        window = seconds(read, len(text))
    else:
        window = grown(len(text), [(tokens, seconds(read, tokens)) for tokens in lengths])
    return Rates(context, window, told(scorer.measure, tested), other)
