"""From a written prompt to token ids: special tokens or chat template, the answer, and where the gold stands."""

from __future__ import annotations

from typing import NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..errors import TaskError
from ..messages import named


class EncodedPrompt(NamedTuple):
    """A prompt and its answer as token ids; `gold_span` is the first token of the gold and the one after its last."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    gold_span: tuple[int, int] | None


class PromptEncoder:
    """Tokenises prompts as the model expects them.

    Args:
        tokenizer: any transformers tokenizer; the gold's tokens are known for fast ones only.
        chat_template: put the prompt into the tokenizer's chat template, as one message of the user. Otherwise the
            tokenizer adds its special tokens; an end token is left out, since the answer goes on from there.

    Raises:
        TaskError: no tokenizer, or a chat template was asked for and it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool = False) -> None:
        check_tokenizer(tokenizer)
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise TaskError("chat_template=True, but the tokenizer has no chat template: leave it off for this model.")
        self._tokenizer = tokenizer
        self._chat = chat_template
        mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self._num_end = 0 if chat_template else next((i for i, special in enumerate(reversed(mask)) if not special), 0)

    def encode(self, text: str, answer: str, gold: tuple[int, int] | None) -> EncodedPrompt:
        """Encodes a prompt with its answer.

        Args:
            text: the prompt.
            answer: what follows it.
            gold: the characters of `text` that the answer can be read from.

        Raises:
            TaskError: the tokenizer has no tokens for the answer, or its chat template fails.
        """
        full = self.in_template(text) if self._chat else text
        start = full.find(text)  # a template may change the text, which then is not found
        encoded = self._tokenised(full)
        ids = self._ids(encoded)
        continuation = answer if self._chat else " " + answer
        joined = self._ids(self._tokenised(full + continuation))
        if joined[: len(ids)] == ids and len(joined) > len(ids):
            answer_ids = joined[len(ids) :]
        else:  # the tokenizer merges across the seam, and the prompt has to stay what it is
            answer_ids = self._tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not answer_ids or self._tokenizer.unk_token_id in answer_ids:
            raise TaskError(f"the tokenizer cannot encode the answer {answer!r}.")
        span = None
        if gold is not None and self._tokenizer.is_fast and start >= 0:
            span = _tokens_of(encoded, start + gold[0], start + gold[1])
        return EncodedPrompt(tuple(ids), tuple(answer_ids), span)

    def _tokenised(self, text: str) -> BatchEncoding:
        return self._tokenizer(text, add_special_tokens=not self._chat, verbose=False)

    def _ids(self, encoded: BatchEncoding) -> list[int]:
        ids = encoded["input_ids"]
        return ids[: len(ids) - self._num_end]

    def in_template(self, text: str) -> str:
        """Returns the prompt as the tokenizer's chat template writes it.

        Raises:
            TaskError: the template fails.
        """
        message = [{"role": "user", "content": text}]
        try:
            return self._tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of the tokenizer's author and raises what it likes
            raise TaskError(f"the tokenizer's chat template fails: {error}") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises TaskError unless `tokenizer` is one; a processor only has one."""
    if not (callable(getattr(tokenizer, "encode", None)) and hasattr(tokenizer, "bos_token_id")):
        hint = ": pass its .tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        raise TaskError(f"tokenizer={named(tokenizer)} must be a transformers tokenizer{hint}.")


def _tokens_of(encoded: BatchEncoding, start: int, stop: int) -> tuple[int, int] | None:
    """The tokens that hold the characters from `start` to before `stop`; some tokenizers have none for white space."""
    tokens = [token for token in map(encoded.char_to_token, range(start, stop)) if token is not None]
    return (tokens[0], tokens[-1] + 1) if tokens else None
