"""The model card of an adapter, by `huggingface_hub`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .config import LayerRopeConfig
from .demo import DEMO_NAME
from .report import format_factors
from .scores import PositionScores

TAGS = ["layer-rope", "long-context", "rope-scaling", "peft"]

_BODY = """---
{front_matter}
---

# Per-layer RoPE scaling for {base_model}

A [PEFT](https://huggingface.co/docs/peft) adapter that scales the rotary embedding of each decoder layer by a factor
of that layer. It holds {num_layers} numbers and no trained weights.

| | |
| --- | --- |
| `rope_type` | `{rope_type}` |
| `factor` | {factor:g} |
| `layer_factors` | {factors} |

## Use

`import peft_layerrope` is needed once per process: it tells PEFT about this adapter type.

```py
import peft_layerrope
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base_expression})
model = PeftModel.from_pretrained(base, "path/or/hub-id/of/this/adapter")
```

## Held-out results

Task: `{task}`. Factors of every method were chosen on a search split; the table is from a disjoint test split.

{table}

{remarks}

![accuracy by position of the answer](accuracy_by_position.png)

![factor by depth](factors_by_depth.png)

`search.json` holds splits, seeds, settings, every method's factors and the scores by position; `layerrope search
--config search.yaml --output FOLDER` repeats the search.

## Method

One RoPE scaling factor per layer, found by a genetic algorithm over cubic Bézier curves, gradient steps and
coordinate steps: arXiv [2503.04355](https://arxiv.org/abs/2503.04355), arXiv [2606.27705](https://arxiv.org/abs/2606.27705).
"""


def model_card(
    base_model: str,
    config: LayerRopeConfig,
    scores: PositionScores,
    task: dict[str, Any],
    table: str,
    remarks: Sequence[str] = (),
) -> ModelCard:
    """Returns the card of a searched adapter.

    Args:
        base_model: Hub id or path-free name of the base model.
        config: the adapter, with its factors.
        scores: its held-out scores.
        task: the task's description.
        table: the held-out comparison in Markdown.
        remarks: sentences that belong to it.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=f"per-layer RoPE scaling for {base_model}",
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=task["name"],
                dataset_name=f"{task['name']} (generated, test split)",
                metric_type="accuracy",
                metric_name="exact match, mean over gold positions",
                metric_value=round(scores.average().value, 4),
            )
        ],
        base_model_relation="adapter",
    )
    return ModelCard(
        _BODY.format(
            front_matter=data.to_yaml(),
            base_model=base_model,
            base_expression="peft_layerrope.demo_model_path()" if base_model == DEMO_NAME else f'"{base_model}"',
            num_layers=len(config.layer_factors),
            rope_type=config.rope_type,
            factor=config.factor,
            factors=format_factors(config.layer_factors),
            task=task["name"],
            table=table,
            remarks="\n".join(f"- {remark}" for remark in remarks),
        )
    )
