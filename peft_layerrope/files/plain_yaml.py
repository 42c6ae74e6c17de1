"""YAML from strangers: PyYAML's safe loader, without what lets a small file grow large in memory."""

from __future__ import annotations

from typing import Any

import yaml

_DEEPEST = 32


class _PlainLoader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # nine lines of aliases of aliases stand for a thousand million values
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not read: write the value out", mark)
        if self._depth >= _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "nested too deep", self.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def parse_yaml(text: str) -> Any:
    """Returns the values of a YAML document: plain ones, no objects.

    Raises:
        yaml.YAMLError: it is not YAML, or holds aliases or deep nesting.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # PyYAML's conversions of `!!bool x`, of the 99th of a month, of an integer of 5,000 digits
        raise yaml.YAMLError(f"a value cannot be converted: {type(error).__name__}") from error
