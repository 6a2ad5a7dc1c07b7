"""Errors of the vLLM engine, and its checks of versions, against an HTTP server that answers like vLLM's."""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

from flexpg.integrations.vllm import Engine, engine
from flexpg.sampling import SamplingParams

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4])]
PARAMS = SamplingParams(4, stop_tokens=[9])


class Handler(BaseHTTPRequestHandler):
    """vLLM's routes; the completions of a prompt that begins with token p are [p, 9] and [p, 1, 7, 8] in turn."""

    def do_GET(self):
        state = self.server.state
        self.answer({"/v1/models": {"data": [{"max_model_len": 16}]}, "/weight_info": state}[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path, body))
        if self.path == "/update_weight_version":
            self.server.state["weight_version"] = body["new_version"]
        elif self.path == self.server.failing:
            self.send_error(500, "no such weights")
        elif self.path == "/finish_weight_update":
            self.server.state["weight_version"] = body["weight_version"]
        if self.path == "/inference/v1/generate":
            span = {"version": self.server.sampled_from or self.server.state["weight_version"], "start": 0, "end": 2}
            self.answer({"choices": [self.choice(body, n) | {"weight_versions": [span]} for n in self.order(body)]})
        elif self.path == "/reset_prefix_cache":
            self.answer({"success": self.server.is_idle})
        elif self.path != self.server.failing:
            self.answer({})

    def order(self, body):
        return reversed(range(body["sampling_params"]["n"]))  # any order may come

    def choice(self, body, index):
        tokens = [body["token_ids"][0], index, 7, 8] if index % 2 else [body["token_ids"][0], 9]
        content = [{"token_id": token, "logprob": -0.5 * token} for token in tokens]
        return {"index": index, "token_ids": tokens, "logprobs": {"content": content}}

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.state, made.calls, made.failing, made.sampled_from = {"weight_version": "default"}, [], None, None
        made.is_idle = True
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def folder(tmp_path):
    save_file({"embed.weight": torch.zeros(10, 4), "layer.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    return tmp_path


def connect(server, folder, **options) -> Engine:
    return engine(str(folder), "server", f"http://127.0.0.1:{server.server_port}", **options)


def test_sample_server_returns_groups_in_order(server, folder):
    samples = connect(server, folder).sample(PROMPTS, 2, PARAMS, [5, 6])
    assert [tokens.tolist() for tokens in samples.completions] == [[1, 9], [1, 1, 7, 8], [4, 9], [4, 1, 7, 8]]
    assert samples.is_finished.tolist() == [True, False] * 2
    assert samples.logprobs[2].tolist() == [-2.0, -4.5, 0.0, 0.0]
    sent = [body for path, body in server.calls if path == "/inference/v1/generate"]
    assert sorted((body["token_ids"], body["sampling_params"]["seed"]) for body in sent) == [([1, 2, 3], 5), ([4], 6)]
    assert sent[0]["sampling_params"]["ignore_eos"] and sent[0]["sampling_params"]["stop_token_ids"] == [9]


def test_sample_greedy_asks_for_one_completion_per_prompt(server, folder):
    samples = connect(server, folder).sample(PROMPTS, 2, SamplingParams(4, temperature=0.0, stop_tokens=[9]), None)
    assert [tokens.tolist() for tokens in samples.completions] == [[1, 9], [1, 9], [4, 9], [4, 9]]
    assert [body["sampling_params"]["n"] for path, body in server.calls] == [1, 1]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (SamplingParams(4, top_k=5), "top_k must be None and top_p 1 with vLLM, .* got 5 and 1.0"),
        (SamplingParams(4, top_p=0.9), "top_k must be None and top_p 1 with vLLM, .* got None and 0.9"),
        (SamplingParams(4, temperature=0.001), "temperature must be 0 or at least"),
        (SamplingParams(14), "max_model_len must be at least 17"),
    ],
    ids=["top_k", "top_p", "temperature", "length"],
)
def test_sample_params_that_would_be_wrong_raise(server, folder, params, match):
    with pytest.raises(ValueError, match=match):
        connect(server, folder).sample(PROMPTS, 2, params, [5, 6])
    assert not server.calls


def test_engine_has_the_longest_sequence_of_its_server(server, folder):
    assert connect(server, folder).max_model_len == 16


def test_load_weights_sets_version_and_resets_prefix_cache(server, folder):
    made = connect(server, folder)
    assert made.version == 0
    server.is_idle = False
    with pytest.raises(RuntimeError, match="still samples, and keeps what it computed from the old weights"):
        made.load_weights(folder, 3)
    server.is_idle = True
    made.load_weights(folder, 3)
    assert made.version == 3
    assert ("/update_weights", {"update_info": {"folder": str(folder)}}) in server.calls
    assert len(made.sample(PROMPTS, 2, PARAMS, [5, 6]).completions) == 4


@pytest.mark.parametrize("route", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_load_weights_failure_leaves_engine_unusable(server, folder, route):
    made, server.failing = connect(server, folder), f"/{route}"
    with pytest.raises(RuntimeError, match=f"refused /{route}: 500 .*start it again with .*vllm serve {folder}"):
        made.load_weights(folder, 3)
    with pytest.raises(RuntimeError, match="has no complete weights"):
        made.sample(PROMPTS, 2, PARAMS, [5, 6])


@pytest.mark.parametrize(
    "weights", [{"embed.weight": torch.zeros(10, 5)}, {"other.weight": torch.zeros(1)}], ids=["shape", "name"]
)
def test_load_weights_of_another_checkpoint_raises_before_loading(server, folder, tmp_path_factory, weights):
    other = tmp_path_factory.mktemp("other")
    save_file(weights, other / "model.safetensors")
    with pytest.raises(ValueError, match="must have the shape of the checkpoint's"):
        connect(server, folder).load_weights(other, 1)
    with pytest.raises(ValueError, match="must be a folder with safetensors"):
        connect(server, folder).load_weights(other / "missing", 1)
    assert not server.calls


def test_sample_server_that_restarted_raises(server, folder):
    made = connect(server, folder)
    made.load_weights(folder, 3)
    server.state["weight_version"] = "default"
    with pytest.raises(RuntimeError, match="must have weights of version 3, got 0: it was started again"):
        made.sample(PROMPTS, 2, PARAMS, [5, 6])


def test_sample_server_of_another_run_raises(server, folder):
    made = connect(server, folder)
    server.state["weight_version"] = "2"
    with pytest.raises(RuntimeError, match=r"must have weights of version 0, got 2: .* another run uses it"):
        made.sample(PROMPTS, 2, PARAMS, [5, 6])


def test_sample_from_weights_that_change_meanwhile_raises(server, folder):
    made, server.sampled_from = connect(server, folder), "1"
    with pytest.raises(RuntimeError, match="must have weights of version 0, got 1"):
        made.sample(PROMPTS, 2, PARAMS, [5, 6])


def test_sample_on_other_rank_follows_versions_and_refuses_older(server, folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    made = connect(server, folder)
    server.state["weight_version"] = "2"
    made.sample(PROMPTS, 2, PARAMS, [5, 6])
    assert made.version == 2
    server.state["weight_version"] = "1"
    with pytest.raises(RuntimeError, match="must have weights of version 2, got 1"):
        made.sample(PROMPTS, 2, PARAMS, [5, 6])


def test_engine_gives_used_server_initial_weights_on_rank_0(server, folder, monkeypatch):
    server.state["weight_version"] = "7"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="has weights of version 7"):
        connect(server, folder, timeout_s=0.3)
    assert not server.calls
    monkeypatch.setenv("RANK", "0")
    assert connect(server, folder, timeout_s=5).version == 0
    assert ("/update_weights", {"update_info": {"folder": str(folder)}}) in server.calls
    server.calls.clear()
    connect(server, folder)
    assert not server.calls  # other ranks may sample already


def test_engine_dead_server_raises_with_command(server, folder):
    made = connect(server, folder)
    server.shutdown()
    server.server_close()
    for call in (lambda: made.sample(PROMPTS, 2, PARAMS, [5, 6]), lambda: made.load_weights(folder, 1)):
        with pytest.raises(
            RuntimeError, match=r"server at http://127.0.0.1:\d+ does not answer .*VLLM_SERVER_DEV_MODE=1"
        ):
            call()


def test_engine_silent_server_raises_after_timeout(folder):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=r"did not answer /v1/models within timeout_s=0.2"):
            engine(str(folder), "server", address, timeout_s=0.2)


def test_engine_unknown_mode_or_folder_raises(folder):
    with pytest.raises(ValueError, match="mode must be colocate or server, got serve"):
        engine(str(folder), "serve")
    with pytest.raises(ValueError, match="path must be a folder with safetensors, got Qwen/Qwen3-4B"):
        engine("Qwen/Qwen3-4B")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_engine_without_vllm_says_what_to_install(folder):
    with pytest.raises(ImportError, match="pip install vllm"):
        engine(str(folder))
