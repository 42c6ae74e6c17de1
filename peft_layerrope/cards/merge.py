"""Writing a card where one exists already: what its owner wrote in it stays."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..errors import LayerRopeError
from ..files.atomic import write_atomically
from ..public_names import is_machine_path
from .card import MODEL_NAME_PREFIX, OWN_METRICS, generated_part

CARD_NAME = "README.md"
_OURS = ("library_name", "base_model", "base_model_relation")  # facts, not choices of the card's owner
_PEFT_MODEL_TAG = "base_model:adapter:"
_TEMPLATE_TITLE = "# Model Card for Model ID"
_TRANSFORMERS_SENTENCE = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
_PEFT_FOOTER = re.compile(r"^### Framework versions\s*(?:^- PEFT .*\s*)*", re.MULTILINE)


class CardError(LayerRopeError, ValueError):
    """An existing model card cannot be read, so that it would be lost if a new one were written."""


def read_card(path: Path) -> ModelCard | None:
    """Reads a model card; None if there is no such file.

    Raises:
        CardError: its metadata is no YAML, or not what the Hub knows.
    """
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CardError(
            f"{path}: its metadata cannot be read ({reason}); mend it or move the file away, nothing was changed."
        ) from error


def save_card(card: ModelCard, folder: Path, target: Path | None = None) -> None:
    """Writes a generated card as `README.md`, into the one that is there if there is one.

    Args:
        card: the generated one.
        folder: where the existing one is.
        target: folder to write into; default: `folder`.

    Raises:
        CardError: the existing card cannot be read. It is left as it is.
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
