"""`serve-check` against a server of this process, which answers for the scaled model, the unscaled one, or another."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import VOCAB, build_model, logits
from peft import get_peft_model

from peft_layerrope import LayerRopeConfig, LayerRopeError
from peft_layerrope.serving.check import check_server, server_log_probs

CONFIG = {"layer_factors": [1.5, 1.2, 2.0, 1.7]}
PROMPTS = torch.randint(VOCAB, (2, 50), generator=torch.Generator().manual_seed(0)).tolist()


def log_probs(model, prompt: list[int]) -> list[float]:
    found = logits(model, torch.tensor([prompt]))[0].log_softmax(-1)
    return [found[place, token].item() for place, token in enumerate(prompt[1:])]


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({"data": [{"id": "tiny"}]})

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert asked["model"] == "tiny"
                self.reply(answer(asked["prompt"]))

            def reply(self, content):
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def of_model(model, noise: float = 0.0):
    """As OpenAI's completions answer an echoed prompt: nothing for the first token, one more at the end."""
    rng = np.random.default_rng(0)

    def answer(prompt):
        values = [None, *(np.array(log_probs(model, prompt)) + rng.normal(0, noise, len(prompt) - 1)), -0.5]
        return {"choices": [{"logprobs": {"token_logprobs": values}}]}

    return answer


def scaled():
    return get_peft_model(build_model("llama"), LayerRopeConfig(**CONFIG)).eval()


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_scaled_model_is_recognised_also_in_half_precision(serve, noise):
    found = check_server(serve(of_model(scaled(), noise)), build_model("llama"), LayerRopeConfig(**CONFIG), PROMPTS)
    assert found.to_scaled == pytest.approx(noise * (2 / np.pi) ** 0.5, rel=0.2, abs=1e-6)
    assert found.to_unscaled > found.apart / 2
    found.raise_unless_scaled()


@pytest.mark.parametrize("other", [None, [1.0, 1.0, 3.0, 1.0]], ids=["unscaled", "another adapter"])
def test_any_other_model_is_refused(serve, other):
    model = build_model("llama")
    served = (
        model if other is None else get_peft_model(build_model("llama"), LayerRopeConfig(layer_factors=other)).eval()
    )
    found = check_server(serve(of_model(served)), model, LayerRopeConfig(**CONFIG), PROMPTS)
    with pytest.raises(LayerRopeError):
        found.raise_unless_scaled()
    assert (found.to_unscaled < 1e-6) == (other is None)


def test_factors_of_one_cannot_be_told_from_none(serve):
    config = LayerRopeConfig(layer_factors=[1.0] * 4)
    found = check_server(serve(of_model(build_model("llama"))), build_model("llama"), config, PROMPTS)
    with pytest.raises(LayerRopeError):
        found.raise_unless_scaled()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"token_logprobs": [None, -1.0]}}]},
    ],
)
def test_servers_without_log_probabilities_are_refused(serve, answer):
    with pytest.raises(LayerRopeError):
        server_log_probs(serve(lambda _: answer), PROMPTS)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000", "http://127.0.0.1:9"])
def test_what_is_no_server_is_refused(url):
    with pytest.raises(LayerRopeError):
        server_log_probs(url, PROMPTS)
