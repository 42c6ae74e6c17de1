"""The command `layerrope`: one file per command, each thin. `app` holds what they share."""

from . import evaluate, experiment, families, hub, lm_eval, prompts, report, search, sensitivity, verify
from .app import app, run

__all__ = [
    "app",
    "evaluate",
    "experiment",
    "families",
    "hub",
    "lm_eval",
    "prompts",
    "report",
    "run",
    "search",
    "sensitivity",
    "verify",
]
