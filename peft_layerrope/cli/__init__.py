"""The command `layerrope`: one file per command that is more than a few lines. `app` holds what they share."""

from . import evaluate, experiments, report, search, tools
from .app import app, run

__all__ = ["app", "evaluate", "experiments", "report", "run", "search", "tools"]
