"""The shipped demo model: a small Llama trained by `examples/train_demo_model.py`."""

from __future__ import annotations

from pathlib import Path

DEMO_NAME = "peft_layerrope/demo"
"""How reports and adapters call the demo model: its path in the repository, whatever the machine."""


def demo_model_path() -> str:
    """Returns the folder of the demo model, for `AutoModelForCausalLM.from_pretrained`."""
    return str(Path(__file__).parent)
