"""The command `layerrope`: one file per command that is more than a few lines. `app` holds what they share."""

from .app import app, run

__all__ = ["app", "run"]
