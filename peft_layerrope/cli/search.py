"""`layerrope search`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from rich.console import Console

from ..base_model import check_source, load_tokenizer
from ..cards import ACCURACY_PLOT, FACTORS_PLOT, HARM_PLOT, REPORT_NAME, SPECIFICATION_NAME
from ..declaration import changed
from ..errors import SearchError
from ..runs import RUN_FOLDER, locked
from ..searcher.plan import Plan
from ..searcher.result import NONE, TIMING_NAME, SearchResult
from ..searcher.run import plan_search
from ..searcher.run import search as run_search
from ..searcher.settings import SearchSettings, SearchSpecification, read_specification
from ..tasks.specification import parse_place, task_elsewhere
from ..tuner.artifacts import check_no_model
from . import err, out, resumable, shell_word
from .options import (
    MODEL_ARGS,
    ModelArgument,
    Typed,
    build_task,
    check_output,
    command,
    load,
    model_settings,
    options_of,
    remove_results,
    resolve_task,
    run_option,
    window_of,
    with_difficulty,
)

_DEMO = {"steps": 64, "max_harm": None, "test_groups": 100}  # it is asked beyond its window, and knows no other text
_LATE = 1.1  # times the minutes that were asked for, from which on it is told
_RESULTS = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, REPORT_NAME, TIMING_NAME, ACCURACY_PLOT, FACTORS_PLOT, HARM_PLOT)


@command("search")
def search(
    *,
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the report, the plots and the journal.")],
    model: ModelArgument = None,
    typed: Annotated[Typed, options_of(SearchSpecification) + MODEL_ARGS],
    config: Annotated[
        Path | None, run_option(help="A search.yaml to repeat; options given beside it go first.")
    ] = None,
    dry_run: Annotated[bool, run_option("--dry-run", help="Print the plan with its cost, and stop.")] = False,
    resume: Annotated[
        bool,
        run_option("--resume", help="Go on with the search in --output, also after a kill; begin, if there is none."),
    ] = False,
    overwrite: Annotated[bool, run_option("--overwrite", help="Replace the files of an earlier search.")] = False,
    workers: Annotated[int, run_option(help="Ray workers; 0 searches in this process.", min=0)] = 0,
    ray_address: Annotated[str | None, run_option(help="A running Ray cluster, such as auto.")] = None,
) -> None:
    """Search per-layer factors and compare them, held out, with simpler choices.

    With a MODEL and nothing else, prompts have up to 4,096 tokens and as many key-value pairs of syllables as leave the
    unscaled model between 40 and 90 % right answers.

    Example: `layerrope search --output demo-adapter` searches the shipped demo model in two to three minutes.

    Example: `layerrope search meta-llama/Llama-3.1-8B-Instruct --length 8192 --output my-adapter --dry-run`

    Example: `layerrope search Qwen/Qwen2.5-0.5B-Instruct --num-keys 100 --minutes 20 --output my-adapter`

    Example: `layerrope search --output my-adapter --resume` goes on where a search was interrupted.

    The folder gets the adapter, its card with the held-out table, `search.json`, `search.yaml` (which repeats the
    search), three plots, and `run/journal.jsonl`, a line for all that was measured together.
    """
    typed = model_settings(model, typed)
    if typed.get("chat_template") is False:  # also of what a file says
        typed = {"chat_template_args": None, "system_prompt": None, "chat_date": None} | typed
    if config is not None and "minutes" in typed:  # they decide the steps, which each file has
        typed = {"steps": None} | typed
    specification = changed(_asked_before(output, config, resume, typed), typed)
    check_no_model(output)
    check_output(output, resume, overwrite, dry_run=dry_run)
    check_source(specification)
    pool = _workers(workers, ray_address, specification)
    tokenizer = load_tokenizer(specification)
    window = window_of(specification)
    task = resolve_task(specification.task, window, specification.model is None, tokenizer, to_run=True)
    specification = replace(specification, task=task)
    # what cannot work is refused before the model is loaded
    built, keep = build_task(replace(task, difficulty=None), tokenizer), None
    if specification.keep_task is not None:
        place = parse_place(specification.keep_task, "keep_task")
        keep = task_elsewhere(partial(build_task, tokenizer=tokenizer), replace(task, difficulty=None), *place)
    loaded = load(specification)
    if task.difficulty is not None:
        task = with_difficulty(task, tokenizer, loaded, specification.search.batch_tokens)
        specification, built = replace(specification, task=task), build_task(task, tokenizer)
    if dry_run:
        _tell(plan_search(loaded, built, specification.search, keep=keep), specification.search, out)
        return

    with ExitStack() as stack:

        def begun(settled: SearchSettings) -> None:
            if not resume:
                remove_results(output, _RESULTS)  # not the card: its owner may have written in it
            asked = replace(specification, search=settled)  # the clock decides nothing any more
            if not (resume and (output / SPECIFICATION_NAME).exists()):  # its owner may have written in it
                asked.save(output / SPECIFICATION_NAME)
            stack.enter_context(resumable(f"layerrope search --output {shell_word(output)} --resume"))

        stack.enter_context(locked(output))
        distribute = stack.enter_context(pool)
        result = run_search(
            loaded,
            built,
            specification.search,
            keep=keep,
            folder=output / RUN_FOLDER,
            resume=resume,
            overwrite=overwrite,
            on_plan=partial(_tell, settings=specification.search, console=err),
            on_begin=begun,
            distribute=distribute,
            enough=stack.enter_context(_first_interrupt()),
        )
        result.save_pretrained(output)
    _print_result(result, output)


def _tell(plan: Plan, settings: SearchSettings, console: Console) -> None:
    """Prints the plan, and on stderr that it takes longer than was asked for."""
    console.print(plan.sentence())
    if settings.steps is None and plan.search_seconds > _LATE * 60 * settings.minutes:
        err.print(
            f"That is more than --minutes {settings.minutes:g}: no search takes less here. Shorter prompts, by "
            "--length or --num-keys, make it quicker.",
        )


def _asked_before(output: Path, config: Path | None, resume: bool, typed: Typed) -> SearchSpecification:
    """What the file says, or the defaults. A file may be a stranger's, so it alone has no code run."""
    saved = output / SPECIFICATION_NAME
    if config is None and resume and saved.exists():
        config = saved
    given = typed.get("model") is not None
    if config is None:
        return SearchSpecification(search=SearchSettings(**({} if given else _of_the_demo(typed))))
    values = read_specification(config)
    asked = SearchSpecification.of(values, str(config))
    if not given and asked.model is None:
        own = values.get("search") or {}
        demo = {name: value for name, value in _of_the_demo(own | typed).items() if name not in own}
        asked = replace(asked, search=replace(asked.search, **demo))
    if asked.trust_remote_code and "trust_remote_code" not in typed:
        raise SearchError(
            f"{config} has trust_remote_code, by which code of {asked.model} would run: add --model-args "
            "trust_remote_code=true if you trust it, or trust_remote_code=false."
        )
    return asked


def _of_the_demo(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Its settings; a time that was asked for decides its steps."""
    return {name: value for name, value in _DEMO.items() if not (name == "steps" and "minutes" in asked)}


@contextmanager
def _first_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields what says whether Ctrl-C was pressed: once it means "enough", and a second time it stops."""
    pressed = []

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        err.print(
            "Enough: no other generation begins. What there is is compared, chosen from and tested, which takes "
            "minutes; once more stops at once, and --resume goes on with that."
        )

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _workers(count: int, address: str | None, specification: SearchSpecification) -> AbstractContextManager[Any]:
    """Ray workers that load the model themselves; nothing, where the search runs in this process."""
    if not count and address is None:
        return nullcontext()
    from ..searcher.ray_workers import RayWorkers

    return RayWorkers(
        max(count, 1),
        address=address,
        model_source=specification,
        device=specification.device,
    )


def _print_result(result: SearchResult, output: Path) -> None:
    verdict, *remarks = result.remarks()
    out.print()
    out.print(verdict)
    out.print(result.choice_table().to_rich())
    out.print(result.scores_table(f"Held out: {result.subtitle()}").to_rich())
    for line in remarks:
        out.print(line)
    out.print(f"adapter, report and plots: {output}")
    if result.chosen != NONE:
        out.print(
            "It is for prompts like these. On others, longer ones too, it may lose: measure it there first, with "
            f"layerrope evaluate MODEL --adapter {shell_word(output)} --baseline none and their task and length."
        )
