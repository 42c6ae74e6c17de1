"""Writes `hub_configs/README.md` from the folders beside it.

    python hub_configs/build_index.py

A folder with an `adapter_config.json` holds an adapter that was searched here, and its figures are read from its
`search.json`. One with a `base_model.json` holds a recipe: settings for a model that was not run here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_layerrope.files import DEMO_NAME
from peft_layerrope.searcher.settings import SearchSpecification, read_specification
from peft_layerrope.tasks.specification import TaskSpecification

FOLDER = Path(__file__).parent
INDEX = FOLDER / "README.md"

_TEXT = """# Adapters and recipes

Written by `python hub_configs/build_index.py` from the folders; a test fails if it is out of date.

## Adapters searched here

Each folder is shaped as on the Hub: in the clone, `PeftModel.from_pretrained(base, "hub_configs/<folder>")` loads it
after `import peft_layerrope`. It holds its card, plots, `search.json` with every figure and where it comes from, and
`search.yaml`, with which the command beside it repeats the search. Accuracy is held out, in %, at the mean over gold
positions, with its 95 % interval. MODEL stands for the folder that `python tests/real_models.py NAME` makes of the base
model's name: its weights are of four bits (Q4_K_M), in bfloat16.

| folder | base model | `rope_type` | no scaling | best uniform factor within the bound | adapter | command |
| --- | --- | --- | ---: | ---: | ---: | --- |
{adapters}

## Recipes, not run here

Settings for models that are too large for this repository's tests: no factors, and no claim that they help. Checked
is that a model of those layers, that window and that rotary embedding takes them; `base_model.json` says which they
are. `--dry-run` at the end of a command times a few passes on your machine, and prints the plan.

| folder | model | layers | window | prompts | command |
| --- | --- | ---: | ---: | --- | --- |
{recipes}

Prompts are key-value retrieval in the public format, with UUIDs, and put into the chat template where it says "chat":
vicuna's tokenizer has none, and Qwen3's would let the model think before it answers. A search takes `--minutes`, 60
there, and as long again for the held-out test.
"""


def adapter_folders() -> list[Path]:
    """Folders that hold an adapter."""
    return sorted(path.parent for path in FOLDER.glob("*/adapter_config.json"))


def recipe_folders() -> list[Path]:
    """Folders that hold a recipe."""
    return sorted(path.parent for path in FOLDER.glob("*/base_model.json"))


def read_recipe(folder: Path) -> tuple[SearchSpecification, dict[str, Any]]:
    """Returns a recipe's settings, checked, and the facts on its model."""
    path = folder / "search.yaml"
    return SearchSpecification.of(read_specification(path), str(path)), _json(folder / "base_model.json")


def index() -> str:
    """Returns the text of the index."""
    adapters = "\n".join(_adapter_row(folder) for folder in adapter_folders())
    return _TEXT.format(adapters=adapters, recipes="\n".join(_recipe_row(folder) for folder in recipe_folders()))


def _adapter_row(folder: Path) -> str:
    report = _json(folder / "search.json")
    rows = {row["name"]: row["test"] for row in report["table"]}
    accuracies = [_accuracy(rows[name]) for name in ("none", "uniform_bounded", report["chosen"])]
    rope_type = _json(folder / "adapter_config.json")["rope_type"]
    return _row(f"`{folder.name}`", f"`{report['model']}`", f"`{rope_type}`", *accuracies, _command(folder))


def _accuracy(test: dict[str, Any]) -> str:
    value, (low, high) = test["average_accuracy"], test["average_accuracy_interval"]
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _recipe_row(folder: Path) -> str:
    specification, facts = read_recipe(folder)
    task, config = specification.task, facts["config"]
    return _row(
        f"`{folder.name}`",
        f"`{facts['model']}`",
        f"{config['num_hidden_layers']}",
        f"{config['max_position_embeddings']:,}",
        f"{task.length:,} tokens, {task.num_positions} positions{_chat(task)}",
        _command(folder),
    )


def _chat(task: TaskSpecification) -> str:
    if not task.chat_template:
        return ""
    arguments = ", ".join(f"`{name}={json.dumps(value)}`" for name, value in (task.chat_template_args or {}).items())
    return f", chat with {arguments}" if arguments else ", chat"


def _command(folder: Path) -> str:
    recipe = (folder / "base_model.json").exists()
    model = "" if recipe or _json(folder / "search.json")["model"] == DEMO_NAME else "MODEL "
    return f"`layerrope search {model}--config hub_configs/{folder.name}/search.yaml --output my-adapter`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    INDEX.write_text(index(), encoding="utf-8")
    print(f"wrote {INDEX}")
