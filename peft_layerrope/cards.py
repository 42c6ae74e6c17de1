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
from jinja2 import Environment, PackageLoader, StrictUndefined

from .errors import InvalidConfigError
from .files import DEMO_NAME, is_machine_path, public_name, write_atomically
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
    templates = Environment(
        loader=PackageLoader("peft_layerrope", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"code": _code, "repr": repr}
    what = "loss" if held_out is not None and held_out.scores.measure == "loss" else "accuracy"
    plots = {ACCURACY_PLOT: f"{what} by position", FACTORS_PLOT: "factor by depth", HARM_PLOT: "gain over harm"}
    demo, quoted = "peft_layerrope.demo_model_path()", json.dumps(base_model, ensure_ascii=False)
    body = templates.get_template("card.md.j2").render(
        base_model=base_model,
        base=demo if base_model == DEMO_NAME else quoted,
        adapter=adapter,
        config=config,
        factors=format_factors(config.layer_factors),
        results=_RESULTS,
        found=held_out,
        verdict=_in_words(held_out) if held_out is not None else "",
        rest=rest,
        plots={name: caption for name, caption in plots.items() if name in files},
        recorded=REPORT_NAME in files,
        repeatable=SPECIFICATION_NAME in files,
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()  # of parts that are not there
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n\n{body}\n\n{END}\n")


def _of_earlier_search(card: ModelCard | None) -> tuple[str, list[EvalResult]]:
    """A card's generated text from the results on, and its model-index; nothing where no search wrote it."""
    found = GENERATED.search(card.text.replace("\r\n", "\n")) if card is not None else None
    if found is None or _RESULTS not in found[0]:
        return "", []
    text = found[0][found[0].index(_RESULTS) :].removesuffix(END).rstrip()
    return text, [result for result in card.data.eval_results or [] if result.metric_name in OWN_METRICS]


def _in_words(held_out: HeldOut) -> str:
    """The adapter's score, and its differences to others, in sentences."""
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
            f"{100 * average.high:.1f}), context utilisation U {100 * scores.utilization():.1f} %."
        )
    differences = []
    for label, gap in held_out.differences.items():
        value, low, high = (f"{scale * number:+z.{digits}f}" for number in (gap.value, gap.low, gap.high))
        differences.append(f"{value} {gained} against {label} ({low} to {high})")
    paired = f" Paired differences with 95 % intervals: {'; '.join(differences)}." if differences else ""
    return sentence + paired


def _eval_results(held_out: HeldOut) -> list[EvalResult]:
    """The scores as entries of the model-index."""
    scores = held_out.scores
    if scores.measure == "loss":
        loss = -scores.average().value
        kinds, names, values = ("loss", "perplexity"), LOSS, (loss, perplexity(loss))
    else:
        kinds = ("accuracy", "context_utilisation")
        names = EXACT_MATCH if scores.written is None else WRITTEN
        values = scores.average().value, scores.utilization()
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


def _code(value: Any) -> str:
    """A value inside backticks and a table's cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.replace("`", "'").replace("|", "/").split())
