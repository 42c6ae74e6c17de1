"""From a written prompt to token ids: special tokens or chat template, the answer, and where the gold stands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Any, NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..errors import TaskError
from ..messages import named, one_line, shown

_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
_TRIED = "Is this text in the prompt?"


class EncodedPrompt(NamedTuple):
    """A prompt and its answer as token ids; `gold_span` is the first token of the gold and the one after its last."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    gold_span: tuple[int, int] | None


class PromptEncoder:
    """Tokenises prompts as the model expects them.

    Args:
        tokenizer: any transformers tokenizer; the gold's tokens are known for fast ones only.
        chat_template: put the prompt into the tokenizer's chat template, as one message of the user; None: where it has
            one. Otherwise the tokenizer adds its special tokens; an end token is left out, since the answer goes on
            from there.
        chat_template_args: variables of the template, such as `{"enable_thinking": False}`.
        system_prompt: a message of the system before the user's.
        chat_date: `YYYY-MM-DD`, what the template writes as today's date; None: today, as it is when this is made.

    Raises:
        TaskError: no tokenizer; a chat template was asked for, or arguments of one, and there is none; the template
            fails, knows no such variable, or leaves out the system prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        chat_date: str | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat_template and not has_template:
            raise TaskError("chat_template=True, but the tokenizer has no chat template: leave it off for this model.")
        self.tokenizer = tokenizer
        self.uses_chat = has_template if chat_template is None else chat_template
        self._args = dict(chat_template_args or {})
        self._system = system_prompt
        self._template, self._date = "", None
        if self.uses_chat:
            self._template, self._date = self._dated_template(chat_date)
            self._check_template()
        else:
            asked = {"chat_template_args": self._args, "system_prompt": system_prompt, "chat_date": chat_date}
            name = next((name for name, value in asked.items() if value), None)
            if name is not None:
                reason = "chat_template is off" if has_template else "the tokenizer has no chat template"
                raise TaskError(f"{name}={named(asked[name])} is for a chat template, and {reason}.")
        mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self._num_end = 0 if self.uses_chat else next((i for i, special in enumerate(reversed(mask)) if not special), 0)

    def settings(self) -> dict[str, Any]:
        """Returns the arguments that make the same encoder for this tokenizer, on any day."""
        return {
            "chat_template": self.uses_chat,
            "chat_template_args": self._args or None,
            "system_prompt": self._system,
            "chat_date": self._date,
        }

    def describe(self) -> dict[str, Any]:
        """Returns [`settings`] for a report, without those that are not in use."""
        return {name: value for name, value in self.settings().items() if value is not None}

    def _dated_template(self, chat_date: str | None) -> tuple[str, str | None]:
        """The template with a date in place of calls of `strftime_now`; and the date, None where there are none.

        transformers gives templates the clock itself, and lets nobody pass another.
        """
        try:
            template = self.tokenizer.get_chat_template()
        except Exception as error:  # several templates, and none of them the default
            raise _failing(error) from error
        if "strftime_now(" not in template:
            if chat_date is not None:
                raise TaskError(
                    f"chat_date={shown(chat_date)}: the tokenizer's chat template does not ask for the date."
                )
            return template, None
        try:
            day = date.fromisoformat(chat_date) if chat_date is not None else date.today()
        except ValueError as error:
            raise TaskError(f"chat_date={shown(chat_date)} must be a date, YYYY-MM-DD.") from error
        fixed = _DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[1] or call[2] or "")), template)
        if "strftime_now(" in fixed:
            raise TaskError(
                "the tokenizer's chat template writes a date in a format that it computes, so its prompts would be "
                "others on another day: turn it off (chat_template=False)."
            )
        return fixed, day.isoformat()

    def _check_template(self) -> None:
        """Renders once: what cannot work is to be told before any long work."""
        unknown = next((n for n in self._args if not re.search(rf"\b{re.escape(n)}\b", self._template)), None)
        if unknown is not None:
            raise TaskError(
                f"chat_template_args: the tokenizer's chat template has no variable {shown(unknown)}, so it would do "
                "nothing."
            )
        text = self.in_template(_TRIED)
        if _TRIED.casefold() not in text.casefold():
            raise TaskError("the tokenizer's chat template leaves the user's message out: turn it off for this model.")
        if self._system is not None and self._system.strip() not in text:
            raise TaskError(f"the tokenizer's chat template leaves out system_prompt={named(self._system)}.")

    def encode(self, text: str, answer: str, gold: tuple[int, int] | None) -> EncodedPrompt:
        """Encodes a prompt with its answer.

        Args:
            text: the prompt.
            answer: what follows it.
            gold: the characters of `text` that the answer can be read from.

        Raises:
            TaskError: the tokenizer has no tokens for the answer, or its chat template fails.
        """
        full = self.in_template(text) if self.uses_chat else text
        start = full.find(text)  # a template may change the text, which then is not found
        encoded = self._tokenised(full)
        ids = self._ids(encoded)
        continuation = answer if self.uses_chat else " " + answer
        joined = self._ids(self._tokenised(full + continuation))
        if joined[: len(ids)] == ids and len(joined) > len(ids):
            answer_ids = joined[len(ids) :]
        else:  # the tokenizer merges across the seam, and the prompt has to stay what it is
            answer_ids = self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not answer_ids or self.tokenizer.unk_token_id in answer_ids:
            raise TaskError(f"the tokenizer cannot encode the answer {answer!r}.")
        span = None
        if gold is not None and self.tokenizer.is_fast and start >= 0:
            span = _tokens_of(encoded, start + gold[0], start + gold[1])
        return EncodedPrompt(tuple(ids), tuple(answer_ids), span)

    def _tokenised(self, text: str) -> BatchEncoding:
        return self.tokenizer(text, add_special_tokens=not self.uses_chat, verbose=False)

    def _ids(self, encoded: BatchEncoding) -> list[int]:
        ids = encoded["input_ids"]
        return ids[: len(ids) - self._num_end]

    def in_template(self, text: str) -> str:
        """Returns the prompt as the tokenizer's chat template writes it.

        Raises:
            TaskError: the template fails.
        """
        messages = [{"role": "system", "content": self._system}] if self._system is not None else []
        messages.append({"role": "user", "content": text})
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False, **self._args
            )
        except Exception as error:  # a template is a program of the tokenizer's author and raises what it likes
            raise _failing(error) from error


def _failing(error: Exception) -> TaskError:
    return TaskError(
        f"the tokenizer's chat template fails: {one_line(error).rstrip('.')}. Turn it off "
        "(chat_template=False, --no-chat-template)."
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises TaskError unless `tokenizer` is one; a processor only has one."""
    if not (callable(getattr(tokenizer, "encode", None)) and hasattr(tokenizer, "bos_token_id")):
        hint = ": pass its .tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        raise TaskError(f"tokenizer={named(tokenizer)} must be a transformers tokenizer{hint}.")


def _tokens_of(encoded: BatchEncoding, start: int, stop: int) -> tuple[int, int] | None:
    """The tokens that hold the characters from `start` to before `stop`; some tokenizers have none for white space."""
    tokens = [token for token in map(encoded.char_to_token, range(start, stop)) if token is not None]
    return (tokens[0], tokens[-1] + 1) if tokens else None
