"""Model cards: what the generated part says, and how it takes its place in a card that is there already."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .errors import InvalidConfigError
from .files import write_atomically
from .messages import DEMO_NAME, is_machine_path, public_name
from .report import format_factors
from .scoring.scores import Interval, PositionScores, perplexity
from .tuner.config import LayerRopeConfig

CARD_NAME = "README.md"
_OURS = ("library_name", "base_model", "base_model_relation")  # facts, not choices of the card's owner
_PEFT_MODEL_TAG = "base_model:adapter:"
_TEMPLATE_TITLE = "# Model Card for Model ID"
_TRANSFORMERS_SENTENCE = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
_PEFT_FOOTER = re.compile(r"^### Framework versions\s*(?:^- PEFT .*\s*)*", re.MULTILINE)


def read_card(path: Path) -> ModelCard | None:
    """Reads a model card; None if there is no such file.

    Raises:
        InvalidConfigError: its metadata is no YAML, or not what the Hub knows.
    """
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidConfigError(
            f"{path}: its metadata cannot be read ({reason}); mend it or move the file away, nothing was changed."
        ) from error


def save_card(card: ModelCard, folder: Path, target: Path | None = None) -> None:
    """Writes a generated card as `README.md`, into the one that is there if there is one.

    Args:
        card: the generated one.
        folder: where the existing one is.
        target: folder to write into; default: `folder`.

    Raises:
        InvalidConfigError: the existing card cannot be read. It is left as it is.
    """
    existing = read_card(folder / CARD_NAME)
    write_atomically((target or folder) / CARD_NAME, str(card if existing is None else merged(existing, card)))


def merged(existing: ModelCard, new: ModelCard) -> ModelCard:
    """Returns `existing` with the generated part of `new` in the place of its own.

    What stands outside the markers stays, and so do metadata that are not ours to say, tags, and results on other data.
    A card without markers is kept whole, with the new part at its end; one that nobody wrote in, an empty template, is
    replaced.
    """
    card = ModelCard(existing.content)
    fresh = generated_part().search(new.text)
    part = fresh[0] if fresh is not None else new.text.strip()
    line_end = "\r\n" if "\r\n" in card.text else "\n"
    part = part.replace("\n", line_end)
    if generated_part().search(card.text):
        card.text = generated_part().sub(lambda _: part, card.text, count=1)
    elif _is_template(card.text):
        card.text = new.text
    else:
        card.text = line_end.join([card.text.rstrip(), "", part, ""])
    merge_data(card.data, new.data)
    kept = [result for result in card.data.eval_results or [] if result.metric_name not in OWN_METRICS]
    card.data.eval_results = (new.data.eval_results or []) + kept or None
    if card.data.eval_results is None and (card.data.model_name or "").startswith(MODEL_NAME_PREFIX):
        card.data.model_name = None  # which only names results
    return card


def merge_data(data: ModelCardData, new: ModelCardData) -> None:
    """Puts metadata of `new` into `data`, results aside: facts about the adapter replace, all else fills gaps."""
    for key, value in new.__dict__.items():
        if key not in ("tags", "eval_results") and (key in _OURS or data.get(key) is None):
            data[key] = value
    if (data.model_name or "").startswith(MODEL_NAME_PREFIX):
        data.model_name = f"{MODEL_NAME_PREFIX}{data.base_model}"
    # PEFT tags the base model's path, where that is what it was loaded from
    present = [tag for tag in data.tags or [] if not is_machine_path(tag.removeprefix(_PEFT_MODEL_TAG))]
    data.tags = list(dict.fromkeys([*(new.tags or []), *present]))


def has_own_text(card: ModelCard) -> bool:
    """Whether somebody wrote in a card, beside what is generated."""
    rest = generated_part().sub("", _PEFT_FOOTER.sub("", card.text))
    return bool(rest.strip()) and not _is_template(card.text)


def _is_template(text: str) -> bool:
    """Whether this is the empty template that PEFT's `save_pretrained` and `push_to_hub` write."""
    template = ModelCard.from_template(ModelCardData()).text
    known = {line.strip() for line in template.splitlines()}
    lines = {line.strip() for line in _PEFT_FOOTER.sub("", text).splitlines()}
    return _TEMPLATE_TITLE in lines and not any(_TRANSFORMERS_SENTENCE not in line for line in lines - known)


TAGS = ["layer-rope", "long-context", "rope-scaling", "peft", "transformers"]
BEGIN, END = "<!-- layerrope:begin -->", "<!-- layerrope:end -->"
"""What stands between them is written anew at each save; all the rest of a card is its owner's."""

ADAPTER_PLACEHOLDER = "path/or/hub-id/of/this/adapter"
MODEL_NAME_PREFIX = "per-layer RoPE scaling for "
ACCURACY_METRIC = "exact match, mean over gold positions"
UTILISATION_METRIC = "context utilisation U of exact match"
WRITTEN_METRIC = "right answers written, mean over gold positions"
WRITTEN_UTILISATION_METRIC = "context utilisation U of right answers written"
LOSS_METRIC = "loss in nats per token"
PERPLEXITY_METRIC = "perplexity"
OWN_METRICS = (
    ACCURACY_METRIC,
    UTILISATION_METRIC,
    WRITTEN_METRIC,
    WRITTEN_UTILISATION_METRIC,
    LOSS_METRIC,
    PERPLEXITY_METRIC,
)
DEMO_LICENSE = "apache-2.0"
"""Of adapters of the shipped demo model, as the package's own. What others search is theirs to license."""

ACCURACY_PLOT, FACTORS_PLOT = "accuracy_by_position.png", "factors_by_depth.png"
HARM_PLOT = "gain_over_harm.png"
REPORT_NAME, SPECIFICATION_NAME = "search.json", "search.yaml"
_PAPERS = ("2503.04355", "2606.27705")
_ADAPTER_LINE = re.compile(r'^adapter = ".*"$', re.MULTILINE)
_BASE_LINE = re.compile(r"^base = .*$", re.MULTILINE)
_BASE_ROW = re.compile(r"^\| base model \| `.*` \|$", re.MULTILINE)
_TITLE = re.compile(r"^# Per-layer RoPE scaling for .*$", re.MULTILINE)


@dataclass(frozen=True)
class HeldOut:
    """What a search found on its test split.

    Attributes:
        scores: of the adapter.
        task: the task's description.
        measured: what was measured, in a line.
        table: the comparison with simpler choices, in Markdown.
        remarks: sentences that belong to it: result, harm, cost, edges of the range.
        differences: the adapter's average minus that of others, by their label.
        base: how the base model was loaded, as `describe_loading` tells it.
    """

    scores: PositionScores
    task: Mapping[str, Any]
    measured: str
    table: str
    remarks: Sequence[str] = ()
    differences: Mapping[str, Interval] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    base_model: str,
    config: LayerRopeConfig,
    held_out: HeldOut | None = None,
    *,
    files: Collection[str] = (),
) -> ModelCard:
    """Returns the card of an adapter.

    Args:
        base_model: Hub id of the base model; of a path only the last component is written.
        config: the adapter, with its factors.
        held_out: what its search found; None for an adapter of unknown origin.
        files: names in the adapter's folder: plots among them are shown, `search.json` and `search.yaml` explained.
    """
    base_model = public_name(base_model)
    sections = [
        _head(base_model, config, held_out),
        _use(base_model, held_out.base if held_out is not None else {}),
        *([_results(held_out, files)] if held_out is not None else []),
        _plots(held_out, files),
        _limits(config, held_out),
        _reproduce(files),
        _citation(),
    ]
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        license=DEMO_LICENSE if base_model == DEMO_NAME else None,
        pipeline_tag="text-generation",
        tags=list(TAGS),
        model_name=MODEL_NAME_PREFIX + base_model if held_out is not None else None,
        eval_results=_eval_results(held_out) if held_out is not None else None,
        base_model_relation="adapter",
    )
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n\n{body}\n\n{END}\n")


def with_adapter_id(text: str, adapter: str) -> str:
    """Returns a card's text with `adapter`, an id of the Hub, in its generated snippets."""
    return generated_part().sub(lambda part: _ADAPTER_LINE.sub(f'adapter = "{adapter}"', part[0]), text)


def with_base_model(text: str, base_model: str) -> str:
    """Returns a card's text with another name of the base model in its generated part."""
    lines = {
        _TITLE: _title(base_model),
        _BASE_ROW: _base_row(base_model),
        _BASE_LINE: f"base = {_base_expression(base_model)}",
    }

    def renamed(part: re.Match[str]) -> str:
        text = part[0]
        for pattern, line in lines.items():
            text = pattern.sub(lambda _, line=line: line, text)
        return text

    return generated_part().sub(renamed, text)


def generated_part() -> re.Pattern[str]:
    """Returns a pattern that finds the generated part of a card; of a stray marker, the innermost pair."""
    begin, end = re.escape(BEGIN), re.escape(END)
    return re.compile(rf"{begin}(?:(?!{begin}).)*?{end}", re.DOTALL)


def _eval_results(held_out: HeldOut) -> list[EvalResult]:
    """The scores as entries of the model-index."""
    scores, name = held_out.scores, held_out.task["name"]
    if scores.measure == "loss":
        loss = -scores.average().value
        values = [("loss", LOSS_METRIC, loss), ("perplexity", PERPLEXITY_METRIC, perplexity(loss))]
    else:
        names = ACCURACY_METRIC, UTILISATION_METRIC
        if scores.written is not None:
            names = WRITTEN_METRIC, WRITTEN_UTILISATION_METRIC
        values = [("accuracy", names[0], scores.average().value)]
        values.append(("context_utilisation", names[1], scores.utilisation()))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=held_out.measured,
            dataset_split="test",
            metric_type=kind,
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for kind, metric, value in values
        if math.isfinite(value)
    ]


def _head(base_model: str, config: LayerRopeConfig, held_out: HeldOut | None) -> str:
    factors = config.layer_factors or []
    rows = {
        **(_searched_on(held_out.base, held_out.task) if held_out is not None else {}),
        "`rope_type`": f"`{config.rope_type}`: {_ROPE_TYPES[config.rope_type]}",
        "`factor`": f"{config.factor:g}" if config.rope_type != "default" else "",
        "`layer_factors`": format_factors(factors) + (" for every layer" if len(set(factors)) == 1 else ""),
        "trained window": _tokens(config.original_max_position_embeddings),
        "`target_length`": _tokens(config.target_length),
    }
    table = "\n".join([_base_row(base_model), *(f"| {name} | {value} |" for name, value in rows.items() if value)])
    return f"""{_title(base_model)}

A [PEFT](https://huggingface.co/docs/peft) adapter for long prompts. It divides the rotary positions that decoder layer
*l* sees by a factor *s_l* of that layer. It holds {len(factors)} numbers and no trained weights, so it can be put on,
switched and taken off at any time, also beside a LoRA.

| | |
| --- | --- |
{table}"""


def _searched_on(base: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, str]:
    """How the base was loaded and prompted when the factors were chosen: rows of the table."""
    tune = base.get("peft")
    rows = {"loaded as": ", ".join(f"`{name}={_code(value)}`" for name, value in base.items() if name != "peft")}
    if tune is not None:
        how = "merged" if tune["merged"] else "active beside quantised weights"
        rows["fine-tune"] = f"{tune['kind']} `{_code(tune['name'])}`, {how}, SHA-256 `{tune['weights'][:16]}`"
    if task.get("chat_template"):
        names = {"chat_template_args": "with", "system_prompt": "system prompt", "chat_date": "date"}
        parts = [f"{text} `{_code(task[name])}`" for name, text in names.items() if task.get(name)]
        rows["prompts"] = ", ".join(["chat template", *parts])
    return rows


def _code(value: Any) -> str:
    """A value inside backticks and a table's cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.replace("`", "'").replace("|", "/").split())


_ON_TOP = (
    "on top of the model's own rotary embedding; sliding layers that have a table of their own are scaled by their "
    "factors alone"
)
_ROPE_TYPES = {
    "default": "on top of the model's own rotary embedding",
    "linear": f"Position Interpolation {_ON_TOP}",
    "dynamic": f"Dynamic-NTK {_ON_TOP}",
}


def _title(base_model: str) -> str:
    return f"# Per-layer RoPE scaling for {base_model}"


def _base_row(base_model: str) -> str:
    return f"| base model | `{base_model}` |"


def _base_expression(base_model: str) -> str:
    return "peft_layerrope.demo_model_path()" if base_model == DEMO_NAME else f'"{base_model}"'


def _tokens(number: int | None) -> str:
    return "" if number is None else f"{number:,} tokens"


def _use(base_model: str, loaded: Mapping[str, Any]) -> str:
    base = _base_expression(base_model)
    given = {name: value["name"] if name == "peft" else value for name, value in loaded.items()}
    if set(given) <= {"dtype"}:
        note = ""
    else:
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        note = f"""

The factors were searched on `model, tokenizer = peft_layerrope.load_model({base}, {arguments})`: take that in place of
`AutoModelForCausalLM.from_pretrained(base)` below."""
    return f"""## Use

It needs the package `peft-layerrope`. `import peft_layerrope`, once per process, tells PEFT about this adapter
type.{note}

```py
import peft_layerrope
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = {base}
adapter = "{ADAPTER_PLACEHOLDER}"
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter)
```

In a pipeline:

```py
import peft_layerrope
from transformers import pipeline

base = {base}
adapter = "{ADAPTER_PLACEHOLDER}"
pipe = pipeline("text-generation", model=base)
pipe.model.load_adapter(adapter)
```

With a trained LoRA, each switched on its own: first the LoRA, then this adapter.

```py
import peft_layerrope
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = {base}
adapter = "{ADAPTER_PLACEHOLDER}"
lora = "path/or/hub-id/of/a/lora"
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, lora)
model = PeftModel.from_pretrained(model, adapter)
```

To train a LoRA on the scaled model, bake the factors in first:

```py
import peft_layerrope
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

base = {base}
adapter = "{ADAPTER_PLACEHOLDER}"
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
```"""


def _results(held_out: HeldOut, files: Collection[str]) -> str:
    scores = held_out.scores
    average = scores.average()
    if scores.measure == "loss":
        sentence = (
            f"**Loss {-average.value:.4f} nats per token** (95 % interval {-average.high:.4f} to {-average.low:.4f}), "
            f"perplexity {perplexity(-average.value):.3f}."
        )
        differences = [
            f"{_signed(gap.value, 4)} nats saved against {label} ({_signed(gap.low, 4)} to {_signed(gap.high, 4)})"
            for label, gap in held_out.differences.items()
        ]
    else:
        sentence = (
            f"**Accuracy {100 * average.value:.1f} %** (95 % interval {100 * average.low:.1f} to "
            f"{100 * average.high:.1f}), context utilisation U {100 * scores.utilisation():.1f} %."
        )
        differences = [
            f"{_signed(100 * gap.value)} points against {label} ({_signed(100 * gap.low)} to {_signed(100 * gap.high)})"
            for label, gap in held_out.differences.items()
        ]
    paired = f" Paired differences with 95 % intervals: {'; '.join(differences)}." if differences else ""
    remarks = "\n".join(f"- {remark}" for remark in held_out.remarks)
    cost = f"\n\n### Result, harm and cost of the search\n\n{remarks}" if remarks else ""
    return f"""## Held-out results

Task: {held_out.measured}. Every method chose its factors on a search split; these are the scores on a disjoint test
split.

{sentence}{paired}

{held_out.table}{cost}"""


def _signed(value: float, digits: int = 1) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # never -0.0


def _plots(held_out: HeldOut | None, files: Collection[str]) -> str:
    what = "loss" if held_out is not None and held_out.scores.measure == "loss" else "accuracy"
    plots = {ACCURACY_PLOT: f"{what} by position", FACTORS_PLOT: "factor by depth", HARM_PLOT: "gain over harm"}
    return "\n\n".join(f"![{caption}]({name})" for name, caption in plots.items() if name in files)


def _limits(config: LayerRopeConfig, held_out: HeldOut | None) -> str:
    lines = []
    if held_out is None:
        lines.append("No held-out results are recorded here: measure it on your own task with `layerrope evaluate`.")
    else:
        lines.append(
            "Chosen for one task and one length, those above; what it does to others was not measured, apart from "
            "ordinary text. `layerrope evaluate` measures it on yours."
        )
    lines.append(
        "For the base model named above; another model needs factors of its own. `layerrope verify` proves for each "
        "layer that its rotation is scaled as this adapter says."
    )
    if config.rope_type == "dynamic" and config.target_length is None:
        lines.append(
            "Dynamic-NTK frequencies follow the current length, while a KV cache keeps keys that were rotated at an "
            "earlier one, as in transformers itself; `target_length` in `adapter_config.json` fixes the length."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _reproduce(files: Collection[str]) -> str:
    if REPORT_NAME not in files:
        return ""
    record = "`search.json` holds splits, seeds, settings, every method's factors and the scores by position."
    if SPECIFICATION_NAME not in files:
        return f"## Reproduce\n\n{record}"
    return f"""## Reproduce

```bash
layerrope search --config search.yaml --output my-adapter
```

repeats the search with the `search.yaml` of this repository. {record}"""


def _citation() -> str:
    papers = " and ".join(f"arXiv [{number}](https://arxiv.org/abs/{number})" for number in _PAPERS)
    entries = "\n\n".join(
        f"@misc{{arxiv:{number},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n"
        f"  url = {{https://arxiv.org/abs/{number}}}\n}}"
        for number in _PAPERS
    )
    return f"""## Citation

The method, one RoPE scaling factor per layer found by a genetic search over Bézier curves, is from {papers}.

```bibtex
{entries}
```"""
