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
REPORT_NAME, SPECIFICATION_NAME = "search.json", "search.yaml"
ACCURACY_PLOT, FACTORS_PLOT, HARM_PLOT = "accuracy_by_position.png", "factors_by_depth.png", "gain_over_harm.png"

BEGIN, END = "<!-- layerrope:begin -->", "<!-- layerrope:end -->"
"""What stands between them is written anew at each save; all the rest of a card is its owner's."""
GENERATED = re.compile(rf"{BEGIN}(?:(?!{BEGIN}).)*?{END}", re.DOTALL)
"""The generated part of a card; of a stray marker, the innermost pair."""

ADAPTER_PLACEHOLDER = "path/or/hub-id/of/this/adapter"
MODEL_NAME_PREFIX = "per-layer RoPE scaling for "
DEMO_LICENSE = "apache-2.0"
"""Of adapters of the shipped demo model, as the package's own. What others search is theirs to license."""

EXACT_MATCH = ("exact match, mean over gold positions", "context utilisation U of exact match")
WRITTEN = ("right answers written, mean over gold positions", "context utilisation U of right answers written")
LOSS = ("loss in nats per token", "perplexity")
OWN_METRICS = (*EXACT_MATCH, *WRITTEN, *LOSS)

_OURS = ("library_name", "base_model", "base_model_relation")  # facts, not choices of the card's owner
_PEFT_MODEL_TAG = "base_model:adapter:"
_TEMPLATE_TITLE = "# Model Card for Model ID"
_TRANSFORMERS_SENTENCE = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
_PEFT_FOOTER = re.compile(r"^### Framework versions\s*(?:^- PEFT .*\s*)*", re.MULTILINE)
_RESULTS = "## Held-out results"


def read_card(path: Path) -> ModelCard | None:
    """Reads a model card, if there is one; raises InvalidConfigError of metadata that cannot be read."""
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidConfigError(
            f"{path}: its metadata cannot be read ({reason}); mend it or move the file away, nothing was changed."
        ) from error


def save_card(card: ModelCard, folder: Path, target: Path | None = None) -> None:
    """Writes a generated card, merged into the one that is in `folder`, if any, to `target`, by default there too."""
    write_atomically((target or folder) / CARD_NAME, str(merged(read_card(folder / CARD_NAME), card)))


def merged(existing: ModelCard | None, new: ModelCard) -> ModelCard:
    """Returns `existing`, if there is one, with the generated part of `new` in the place of its own.

    What stands outside the markers stays, and so do metadata that are not ours to say, tags, and results on other data.
    A card without markers is kept whole, with the new part at its end; one that nobody wrote in, an empty template, is
    replaced.
    """
    if existing is None:
        return ModelCard(new.content)
    card = ModelCard(existing.content)
    line_end = "\r\n" if "\r\n" in card.text else "\n"
    part = GENERATED.search(new.text)[0].replace("\n", line_end)
    if GENERATED.search(card.text):
        card.text = GENERATED.sub(lambda _: part, card.text, count=1)
    elif _is_template(card.text):
        card.text = new.text
    else:
        card.text = line_end.join([card.text.rstrip(), "", part, ""])
    data = card.data
    for key, value in new.data.__dict__.items():  # facts about the adapter replace, all else fills gaps
        if key not in ("tags", "eval_results") and (key in _OURS or data.get(key) is None):
            data[key] = value
    # PEFT tags the base model's path, where that is what it was loaded from
    present = [tag for tag in data.tags or [] if not is_machine_path(tag.removeprefix(_PEFT_MODEL_TAG))]
    data.tags = list(dict.fromkeys([*(new.data.tags or []), *present]))
    kept = [result for result in data.eval_results or [] if result.metric_name not in OWN_METRICS]
    data.eval_results = (new.data.eval_results or []) + kept or None
    if (data.model_name or "").startswith(MODEL_NAME_PREFIX):  # which only names results
        data.model_name = f"{MODEL_NAME_PREFIX}{data.base_model}" if data.eval_results else None
    return card


def has_own_text(card: ModelCard | None) -> bool:
    """Whether somebody wrote in a card, beside what is generated."""
    if card is None or _is_template(card.text):
        return False
    return bool(GENERATED.sub("", _PEFT_FOOTER.sub("", card.text)).strip())


def _is_template(text: str) -> bool:
    """Whether this is the empty template that PEFT's `save_pretrained` and `push_to_hub` write."""
    known = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = {line.strip() for line in _PEFT_FOOTER.sub("", text).splitlines()}
    return _TEMPLATE_TITLE in lines and all(_TRANSFORMERS_SENTENCE in line for line in lines - known)


@dataclass(frozen=True)
class HeldOut:
    """What a search found on its test split."""

    scores: PositionScores  # of the adapter
    task: Mapping[str, Any]  # the task's description
    measured: str  # what was measured, in a line
    table: str  # the comparison with simpler choices, in Markdown
    remarks: Sequence[str] = ()  # sentences that belong to it: result, harm, cost, edges of the range
    differences: Mapping[str, Interval] = field(default_factory=dict)  # the adapter's average minus others', by label
    base: Mapping[str, Any] = field(default_factory=dict)  # how the model was loaded, as `describe_loading` tells it


def model_card(
    base_model: str,
    config: LayerRopeConfig,
    held_out: HeldOut | None = None,
    *,
    files: Collection[str] = (),
    adapter: str = ADAPTER_PLACEHOLDER,
    earlier: ModelCard | None = None,
) -> ModelCard:
    """Returns the card of an adapter, which its snippets load by the name `adapter`.

    What its search found is `held_out`, or stands in `earlier`, the card that the search wrote: its results are taken
    over, with all that comes after them. Of the `files` in the adapter's folder plots are shown, and `search.json` and
    `search.yaml` explained. If the base model is a path, only the last component is written.
    """
    # It may be a folder's name, or a stranger's, and stands in code, in HTML and in YAML.
    base_model = re.sub(r"[^\w ./+()-]", "_", public_name(base_model))
    rest, results = _of_earlier_search(earlier) if held_out is None else ("", _eval_results(held_out))
    if not rest:
        parts = _plots(held_out, files), _limits(config, held_out), _reproduce(files), _CITATION
        rest = _joined(_results(held_out), *parts)
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        license=DEMO_LICENSE if base_model == DEMO_NAME else None,
        pipeline_tag="text-generation",
        tags=["layer-rope", "long-context", "rope-scaling", "peft", "transformers"],
        model_name=MODEL_NAME_PREFIX + base_model if results else None,
        eval_results=results or None,
        base_model_relation="adapter",
    )
    body = _joined(_head(base_model, config), _use(base_model, adapter), rest)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n\n{body}\n\n{END}\n")


def _joined(*sections: str) -> str:
    return "\n\n".join(section for section in sections if section)


def _of_earlier_search(card: ModelCard | None) -> tuple[str, list[EvalResult]]:
    """A card's generated text from the results on, and its model-index; nothing where no search wrote it."""
    found = GENERATED.search(card.text.replace("\r\n", "\n")) if card is not None else None
    if found is None or _RESULTS not in found[0]:
        return "", []
    text = found[0][found[0].index(_RESULTS) :].removesuffix(END).rstrip()
    return text, [result for result in card.data.eval_results or [] if result.metric_name in OWN_METRICS]


def _eval_results(held_out: HeldOut) -> list[EvalResult]:
    """The scores as entries of the model-index."""
    scores = held_out.scores
    if scores.measure == "loss":
        loss = -scores.average().value
        kinds, names, values = ("loss", "perplexity"), LOSS, (loss, perplexity(loss))
    else:
        kinds = ("accuracy", "context_utilisation")
        names = EXACT_MATCH if scores.written is None else WRITTEN
        values = scores.average().value, scores.utilisation()
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=held_out.task["name"],
            dataset_name=held_out.measured,
            dataset_split="test",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for kind, name, value in zip(kinds, names, values, strict=True)
        if math.isfinite(value)
    ]


_ON_TOP = (
    "on top of the model's own rotary embedding; sliding layers that have a table of their own are scaled by their "
    "factors alone"
)
_ROPE_TYPES = {
    "default": "on top of the model's own rotary embedding",
    "linear": f"Position Interpolation {_ON_TOP}",
    "dynamic": f"Dynamic-NTK {_ON_TOP}",
}


def _head(base_model: str, config: LayerRopeConfig) -> str:
    factors = config.layer_factors or []
    table = _table(
        {
            "base model": f"`{base_model}`",
            "`rope_type`": f"`{config.rope_type}`: {_ROPE_TYPES[config.rope_type]}",
            "`factor`": f"{config.factor:g}" if config.rope_type != "default" else "",
            "`layer_factors`": format_factors(factors) + (" for every layer" if len(set(factors)) == 1 else ""),
            "trained window": _tokens(config.original_max_position_embeddings),
            "`target_length`": _tokens(config.target_length),
        }
    )
    return f"""# Per-layer RoPE scaling for {base_model}

A [PEFT](https://huggingface.co/docs/peft) adapter for long prompts. It divides the rotary positions that decoder layer
*l* sees by a factor *s_l* of that layer. It holds {len(factors)} numbers and no trained weights, so it can be put on,
switched and taken off at any time, also beside a LoRA.

{table}"""


def _table(rows: Mapping[str, str]) -> str:
    """What is known of names and their values; empty where that is nothing."""
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else ""


def _tokens(number: int | None) -> str:
    return "" if number is None else f"{number:,} tokens"


def _use(base_model: str, adapter: str) -> str:
    base = "peft_layerrope.demo_model_path()" if base_model == DEMO_NAME else json.dumps(base_model, ensure_ascii=False)

    def snippet(imports: Sequence[str], *lines: str) -> str:
        given = [f"base = {base}", f'adapter = "{adapter}"']
        return "\n".join(["```py", "import peft_layerrope", *imports, "", *given, *lines, "```"])

    auto, peft = "from transformers import AutoModelForCausalLM", "from peft import PeftModel"
    load_base = "model = AutoModelForCausalLM.from_pretrained(base)"
    load_adapter = "model = PeftModel.from_pretrained(model, adapter)"
    plain = snippet([peft, auto], load_base, load_adapter)
    pipe = 'pipe = pipeline("text-generation", model=base)'
    pipeline = snippet(["from transformers import pipeline"], pipe, "pipe.model.load_adapter(adapter)")
    load_lora = 'lora = "path/or/hub-id/of/a/lora"', load_base, "model = PeftModel.from_pretrained(model, lora)"
    beside_lora = snippet([peft, auto], *load_lora, load_adapter)
    train_lora = snippet(
        ["from peft import LoraConfig, PeftModel, get_peft_model", auto],
        load_base,
        f"{load_adapter}.merge_and_unload()",
        'model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))',
    )
    return f"""## Use

It needs the package `peft-layerrope`. `import peft_layerrope`, once per process, tells PEFT about this adapter
type.

{plain}

In a pipeline:

{pipeline}

With a trained LoRA, each switched on its own: first the LoRA, then this adapter.

{beside_lora}

To train a LoRA on the scaled model, bake the factors in first:

{train_lora}"""


def _results(held_out: HeldOut | None) -> str:
    if held_out is None:
        return ""
    scores, average = held_out.scores, held_out.scores.average()
    if scores.measure == "loss":
        scale, digits, gained = 1, 4, "nats saved"
        sentence = (
            f"**Loss {-average.value:.4f} nats per token** (95 % interval {-average.high:.4f} to {-average.low:.4f}), "
            f"perplexity {perplexity(-average.value):.3f}."
        )
    else:
        scale, digits, gained = 100, 1, "points"
        sentence = (
            f"**Accuracy {100 * average.value:.1f} %** (95 % interval {100 * average.low:.1f} to "
            f"{100 * average.high:.1f}), context utilisation U {100 * scores.utilisation():.1f} %."
        )
    differences = []
    for label, gap in held_out.differences.items():
        value, low, high = (f"{scale * number:+z.{digits}f}" for number in (gap.value, gap.low, gap.high))
        differences.append(f"{value} {gained} against {label} ({low} to {high})")
    paired = f" Paired differences with 95 % intervals: {'; '.join(differences)}." if differences else ""
    remarks = "\n".join(f"- {remark}" for remark in held_out.remarks)
    return _joined(
        f"{_RESULTS}\n\nTask: {held_out.measured}. Every method chose its factors on a search split; these are the "
        "scores on a disjoint test split.",
        _searched_on(held_out.base, held_out.task),
        sentence + paired,
        held_out.table,
        f"### Result, harm and cost of the search\n\n{remarks}" if remarks else "",
    )


def _searched_on(base: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """How the base was loaded and prompted when the factors were chosen."""
    tune = base.get("peft")
    rows = {"loaded as": ", ".join(f"`{name}={_code(value)}`" for name, value in base.items() if name != "peft")}
    if tune is not None:
        how = "merged" if tune["merged"] else "active beside quantised weights"
        rows["fine-tune"] = f"{tune['kind']} `{_code(tune['name'])}`, {how}, SHA-256 `{tune['weights'][:16]}`"
    if task.get("chat_template"):
        names = {"chat_template_args": "with", "system_prompt": "system prompt", "chat_date": "date"}
        parts = [f"{text} `{_code(task[name])}`" for name, text in names.items() if task.get(name)]
        rows["prompts"] = ", ".join(["chat template", *parts])
    note = ""
    if set(base) - {"dtype"}:
        given = {name: value["name"] if name == "peft" else value for name, value in base.items()}
        arguments = ", ".join(f"{name}={_code(repr(value))}" for name, value in given.items())
        note = f"""The factors were searched on `model, tokenizer = peft_layerrope.load_model(base, {arguments})`: take
that in place of `AutoModelForCausalLM.from_pretrained(base)` above."""
    return _joined(_table(rows), note)


def _code(value: Any) -> str:
    """A value inside backticks and a table's cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.replace("`", "'").replace("|", "/").split())


def _plots(held_out: HeldOut | None, files: Collection[str]) -> str:
    what = "loss" if held_out is not None and held_out.scores.measure == "loss" else "accuracy"
    plots = {ACCURACY_PLOT: f"{what} by position", FACTORS_PLOT: "factor by depth", HARM_PLOT: "gain over harm"}
    return "\n\n".join(f"![{caption}]({name})" for name, caption in plots.items() if name in files)


def _limits(config: LayerRopeConfig, held_out: HeldOut | None) -> str:
    lines = [
        "No held-out results are recorded here: measure it on your own task with `layerrope evaluate`."
        if held_out is None
        else "Chosen for one task and one length, those above; what it does to others was not measured, apart from "
        "ordinary text. `layerrope evaluate` measures it on yours.",
        "For the base model named above; another model needs factors of its own. `layerrope verify` proves for each "
        "layer that its rotation is scaled as this adapter says.",
    ]
    if config.rope_type == "dynamic" and config.target_length is None:
        lines.append(
            "Dynamic-NTK frequencies follow the current length, while a KV cache keeps keys that were rotated at an "
            "earlier one, as in transformers itself; `target_length` in `adapter_config.json` fixes the length."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _reproduce(files: Collection[str]) -> str:
    if REPORT_NAME not in files:
        return ""
    record = "`search.json` holds splits, seeds, settings, every candidate's factors and the scores by position."
    if SPECIFICATION_NAME not in files:
        return f"## Reproduce\n\n{record}"
    return f"""## Reproduce

```bash
layerrope search --config search.yaml --output my-adapter
```

repeats the search with the `search.yaml` of this repository. {record}"""


_CITATION = """## Citation

The idea, one RoPE scaling factor per layer, is from arXiv [2503.04355](https://arxiv.org/abs/2503.04355) and \
arXiv [2606.27705](https://arxiv.org/abs/2606.27705), which search for them by a genetic algorithm over Bézier curves.

```bibtex
@misc{arxiv:2503.04355,
  eprint = {2503.04355},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2503.04355}
}

@misc{arxiv:2606.27705,
  eprint = {2606.27705},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2606.27705}
}
```"""
