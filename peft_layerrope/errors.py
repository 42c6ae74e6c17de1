"""The errors this library raises on purpose.

Each one also derives from the built-in a caller would expect (`ValueError`, ...), so code that knows
nothing of this package still catches them.
"""


class LayerRopeError(Exception):
    """Base class: everything `peft_layerrope` raises deliberately."""


class InvalidConfigError(LayerRopeError, ValueError):
    """A value that cannot work: of a field of `LayerRopeConfig`, of an argument, or in a folder."""


class UnsupportedModelError(LayerRopeError, ValueError):
    """The model's rotary embedding cannot be scaled per layer; the message says why."""


class AdapterMismatchError(LayerRopeError, ValueError):
    """An adapter does not fit the model, or its two files disagree."""


class TaskError(LayerRopeError, ValueError):
    """A task cannot be built, or its prompts do not fit the model or the memory."""


class HubError(LayerRopeError):
    """The Hub did not do what was asked; the message says why, and what to do."""


class SearchError(LayerRopeError, ValueError):
    """A search was asked for with settings that cannot work."""
