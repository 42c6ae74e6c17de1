"""Asks a running server which model it serves: the scaled one, or the one without factors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import adapted
from ..errors import LayerRopeError, one_line, shown
from ..files import to_json
from ..searcher.harm import read_windows
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import embedding_table

_TOKENS, _PROMPTS = 256, 4
_ECHOED = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
_MAX_ANSWER = 2**24  # bytes
_TIMEOUT = 600  # seconds, for a server that is busy
_NEARER = 0.2  # of the way between the two models; half precision moves log-probabilities too


@dataclass(frozen=True)
class ServerCheck:
    """Mean absolute differences of log-probabilities, in nats per token."""

    to_scaled: float  # between the server and the scaled model, as it is computed here
    to_unscaled: float
    apart: float  # between those two

    def raise_unless_scaled(self) -> None:
        """Raises LayerRopeError of a server that does not answer as the scaled model does, or where nothing tells that
        from the unscaled one.
        """
        if not self.apart > 0:
            raise LayerRopeError(
                f"prompts of {_TOKENS} tokens do not tell the scaled model from the unscaled one: their "
                "log-probabilities are the same, so no server could show which it is."
            )
        if self.to_scaled < _NEARER * self.apart and self.to_scaled < self.to_unscaled:
            return
        nearer = "answers as the unscaled model" if self.to_unscaled < _NEARER * self.apart else "answers as neither"
        raise LayerRopeError(
            f"the server {nearer}: its log-probabilities differ by {self.to_scaled:.4g} from the scaled model's and by "
            f"{self.to_unscaled:.4g} from the unscaled one's, which are {self.apart:.4g} apart."
        )


def probe_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Returns prompts of ordinary text, or of random tokens for a tokenizer that has no words for it."""
    vocabulary, generator = embedding_table(model).shape[0], torch.Generator().manual_seed(0)
    drawn = torch.randint(vocabulary // 2, vocabulary, (_PROMPTS, _TOKENS // 2), generator=generator).tolist()
    return read_windows(tokenizer, None, _TOKENS) or tuple(map(tuple, drawn))


def check_server(
    url: str, model: PreTrainedModel, config: LayerRopeConfig, prompts: Sequence[Sequence[int]]
) -> ServerCheck:
    """Compares a server's log-probabilities of prompts, as token ids, with those of the scaled and of the unscaled
    model. The server speaks as OpenAI's does; raises LayerRopeError of one that gives no log-probabilities.
    """
    served = np.concatenate(server_log_probs(url, prompts))
    unscaled = _log_probs(model, prompts)
    with adapted(model, config) as peft_model:
        scaled = _log_probs(peft_model, prompts)
    pairs = (served, scaled), (served, unscaled), (scaled, unscaled)
    return ServerCheck(*(float(np.abs(a - b).mean()) for a, b in pairs))


def server_log_probs(url: str, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Returns the log-probabilities of each prompt's tokens but the first, in nats, float64."""
    if not url.startswith(("http://", "https://")):
        raise LayerRopeError(f"{shown(url)} is no address of a server, expected http://HOST:PORT.")
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    try:
        name = _ask(f"{base}/models")["data"][0]["id"]
        found = []
        for ids in prompts:
            answer = _ask(f"{base}/completions", {"model": name, "prompt": list(ids), **_ECHOED})
            values = answer["choices"][0]["logprobs"]["token_logprobs"]
            found.append(np.array(values[1 : len(ids)], dtype=np.float64))
    except HTTPError as error:
        told = one_line(error.read(1000).decode(errors="replace"))
        raise LayerRopeError(f"{url} answers {error.code}: {told}") from error
    except (URLError, TimeoutError, ValueError, LookupError, TypeError) as error:
        raise LayerRopeError(f"{url} gives no log-probabilities of a prompt: {one_line(error)}.") from error
    if [len(values) + 1 for values in found] != [len(ids) for ids in prompts]:
        raise LayerRopeError(f"{url} gives log-probabilities of another number of tokens than were sent.")
    return found


def _ask(address: str, content: Any = None) -> Any:
    data = None if content is None else to_json(content).encode()
    with urlopen(Request(address, data, {"Content-Type": "application/json"}), timeout=_TIMEOUT) as answer:
        return json.loads(answer.read(_MAX_ANSWER))


@torch.no_grad()
def _log_probs(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        all_of_them = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        found.append(all_of_them.gather(1, ids[0, 1:, None])[:, 0].cpu().numpy())
    return np.concatenate(found)
