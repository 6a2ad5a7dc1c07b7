"""vLLM as a server, `vllm serve`, over HTTP: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as HTTPRequest
from urllib.request import urlopen

from flexpg.integrations.vllm.requests import Output, Request

MAX_CONNECTIONS = 256
COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve {path} --enable-scale-out --logprobs-mode processed_logprobs "
    '--weight-transfer-config \'{{"backend": "flexpg"}}\''
)


class Server:
    """A running server, which ranks share.

    Args:
        base_url: Its address.
        path: The checkpoint that it was started with.
        timeout_s: Seconds that a request may take.

    Raises:
        RuntimeError: If it does not respond or refuses a request; all methods.
    """

    is_shared = True

    def __init__(self, base_url: str, path: Path, timeout_s: float) -> None:
        self.base_url = base_url.rstrip("/")
        self.name = f"the vLLM server at {self.base_url}"
        self.remedy = f"start it again with {COMMAND.format(path=path)}"
        self.timeout_s = timeout_s
        self.max_model_len: int = self._request("/v1/models")["data"][0]["max_model_len"]

    def version(self) -> str:
        """Return the label of the weights."""
        label: str = self._request("/weight_info")["weight_version"]
        return label

    def set_version(self, label: str) -> None:
        """Set the label of the weights."""
        self._request("/update_weight_version", {"new_version": label})

    def load(self, folder: Path, label: str) -> None:
        """Load weights from a folder, label them, and drop cached keys and values."""
        self._request("/start_weight_update", {})
        self._request("/update_weights", {"update_info": {"folder": str(folder.absolute())}})
        if not self._request("/reset_prefix_cache", {})["success"]:
            raise RuntimeError(f"{self.name} still samples, and keeps what it computed from the old weights")
        self._request("/finish_weight_update", {"weight_version": label})

    def generate(self, requests: Sequence[Request]) -> list[list[Output]]:
        """Return the completions of each request."""
        pool = ThreadPoolExecutor(min(len(requests), MAX_CONNECTIONS))
        try:
            return list(pool.map(self._generate, requests))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error, what has not begun is left out

    def close(self) -> None:
        """Leave the server running."""

    def _generate(self, request: Request) -> list[Output]:
        body = {"token_ids": request.prompt, "sampling_params": request.sampling_params()}
        choices = self._request("/inference/v1/generate", body)["choices"]
        return [_output(choice) for choice in sorted(choices, key=lambda choice: choice["index"])]

    def _request(self, route: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON that the server answers to a POST, or to a GET if there is no body."""
        data = None if body is None else json.dumps(body).encode()
        request = HTTPRequest(self.base_url + route, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=self.timeout_s) as response:
                text = response.read()
        except HTTPError as error:
            answer = " ".join(error.read().decode(errors="replace").split())[:2000]
            raise RuntimeError(f"{self.name} refused {route}: {error.code} {answer}; {self.remedy}") from error
        except TimeoutError as error:
            raise RuntimeError(
                f"{self.name} did not answer {route} within timeout_s={self.timeout_s:g}; {self.remedy}"
            ) from error
        except (OSError, HTTPException) as error:  # refused, reset, closed without an answer
            raise RuntimeError(f"{self.name} does not answer {route}: {error}; {self.remedy}") from error
        return json.loads(text) if text else None


def _output(choice: dict[str, Any]) -> Output:
    content = choice["logprobs"]["content"]
    versions = {span["version"] for span in choice["weight_versions"]}
    return Output(choice["token_ids"], [token["logprob"] for token in content], versions)
