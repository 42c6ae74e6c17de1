"""The command `layerrope`: one file per command, each thin. `app` holds what they share."""

from . import evaluate, families, search, sensitivity, verify
from .app import app, run

__all__ = ["app", "evaluate", "families", "run", "search", "sensitivity", "verify"]
