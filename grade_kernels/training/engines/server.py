"""A rollout function that asks a server over HTTP: `/v1/completions` as vLLM serves it, with tokens by their ids."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple

from grade_kernels.training.prompt_tokens import Prompt
from grade_kernels.training.rollout_func import RolloutRequest

if TYPE_CHECKING:
    from grade_kernels.training.trainer import GRADETrainer

__all__ = ["CompletionsServer", "EngineError", "SentWeights", "always_suppressed"]

_WORTH_ANOTHER_TRY = (408, 429, 500, 502, 503, 504)  # what a server answers that is starting, busy or behind a proxy


class EngineError(RuntimeError):
    """An engine gave no answer in as many tries as it has, or an answer that is none."""


class SentWeights:
    """Sends an engine the policy's weights wherever they may be others than those that it was sent last.

    Weights change with every optimizer step, with every call of `train()`, and where others are loaded, as those of the best
    checkpoint are at the end of a run. PyTorch counts what is written into a parameter, but not what a fused optimizer does.
    """

    def __init__(self) -> None:
        self._last: tuple[object, int, int] | None = (
            None  # the run's state, its step, and how often weights were written
        )

    def renew(self, trainer: GRADETrainer, send: Callable[[], object]) -> None:
        """Call `send` if the weights may be others. All processes of a run do so together, and go on together."""
        request = trainer.rollout_request
        step, written = request.step, sum(parameter._version for parameter in request.model.parameters())
        if self._last is not None and self._last[0] is trainer.state and self._last[1:] == (step, written):
            return
        send()
        trainer.accelerator.wait_for_everyone()
        self._last = (trainer.state, step, written)


def always_suppressed(request: RolloutRequest) -> list[int]:
    """Tokens that are never drawn; ValueError where others are not to be drawn at the beginning of a completion alone."""
    suppressed, first = request.suppressed
    if set(first) - set(suppressed):
        raise ValueError(
            "begin_suppress_tokens of the generation config can not be told to a server or to vLLM, which would draw them "
            "first, too"
        )
    return suppressed


class _Drawn(NamedTuple):
    ids: list[int]
    logprobs: list[float]


class CompletionsServer:
    """Draws completions from a server, one request for each, several at the same time.

    A request has the prompt's tokens, a seed, and all settings of sampling, whatever the server's defaults are. The seed is
    the completion's own: a server gives all completions of one request the same, and would draw each prompt's
    `num_generations` alike.

    The server must have the policy's weights. `sync` sends them, before the first request and wherever they have changed
    since; in a run of several processes each calls it, and all wait until it is done. Without it the server goes on with the
    weights that it has, and the importance correction is what holds the two together.

    At a `temperature` other than 1 its log-probabilities must be those after the temperature
    (`vllm serve --logprobs-mode processed_logprobs`).

    Args:
        url: of the server, such as `http://localhost:8000`.
        model: the name that the server knows the model by. Default: it is left out, which servers of one model take.
        sync: called with the trainer, to bring its weights to the server.
        timeout: seconds until an answer must be there.
        tries: how often a request is made before an error is raised.
        pause: seconds before the second try; every further pause is twice as long.
        concurrency: how many requests wait at the same time.
        headers: of every request, such as an `Authorization`.
        more: further fields of every request, beside those that it has of its own (see `body`).

    Raises:
        EngineError: a request that the server refuses, no answer in `tries` tries, or an answer without tokens.
        ValueError: numbers out of range, `more` with fields of the request's own, or tokens that are suppressed only at the
            beginning of completions.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        sync: Callable[[GRADETrainer], object] | None = None,
        timeout: float = 600.0,
        tries: int = 3,
        pause: float = 1.0,
        concurrency: int = 32,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("timeout", timeout), ("tries", tries), ("concurrency", concurrency)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.url, self.model, self.sync = url.rstrip("/"), model, sync
        self.timeout, self.tries, self.pause, self.concurrency = timeout, tries, pause, concurrency
        self.headers, self.more = dict(headers or {}), dict(more or {})
        self._sent = SentWeights()

    def __call__(self, prompts: list[Prompt], trainer: GRADETrainer) -> dict[str, Any]:
        """The completions of a batch, by the signature of rollout functions."""
        request = trainer.rollout_request
        sync = self.sync
        if sync is not None:
            self._sent.renew(trainer, lambda: sync(trainer))
        bodies = [self.body(request, place) for place in range(len(request.prompt_ids))]
        with ThreadPoolExecutor(max_workers=min(self.concurrency, len(bodies))) as pool:
            drawn = list(pool.map(self._completed, bodies))
        return {
            "prompt_ids": request.prompt_ids,
            "completion_ids": [one.ids for one in drawn],
            "logprobs": [one.logprobs for one in drawn],
            "temperature": request.temperature,
        }

    def body(self, request: RolloutRequest, place: int) -> dict[str, Any]:
        """The request for one completion. What it does not say, the server would choose itself."""
        body: dict[str, Any] = {
            "prompt": request.prompt_ids[place],
            "seed": request.seeds[place],
            "max_tokens": request.max_completion_length,
            "temperature": request.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "stream": False,
            # The drawn token's own comes in any case; llama.cpp gives none for 0.
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": list(request.eos_token_id),
        }
        if self.model is not None:
            body["model"] = self.model
        if suppressed := always_suppressed(request):
            # The lowest bias that the interface has: e^-100 of a token's probability. One that is drawn all the same is
            # found by the check of the answer.
            body["logit_bias"] = {str(token): -100 for token in suppressed}
        if taken := sorted(self.more.keys() & {*body, "model", "logit_bias"}):
            raise ValueError(
                f"more must not have {', '.join(taken)}: a request says that itself, so that completions are drawn as the "
                "trainer takes them to be (temperature is a setting of GRADEConfig)"
            )
        return body | self.more

    def _completed(self, body: dict[str, Any]) -> _Drawn:
        """The answer to one request."""
        return _read(self.post("/v1/completions", body), body["prompt"])

    def get(self, path: str) -> Any:
        """The JSON that stands at a path."""
        return self._asked(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the server answers to a request; None for an empty answer."""
        return self._asked(path, json.dumps(body).encode())

    def _asked(self, path: str, data: bytes | None) -> Any:
        """The answer to a request, which is made again where it may have been a matter of time."""
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            question = urllib.request.Request(
                self.url + path, data, {"Content-Type": "application/json", **self.headers}
            )
            try:
                with urllib.request.urlopen(question, timeout=self.timeout) as answer:
                    text = answer.read()
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:300]
                reason = f"HTTP {error.code} {said}"
                if error.code not in _WORTH_ANOTHER_TRY:
                    raise EngineError(f"{self.url}{path} refuses a request: {reason}") from error
                continue
            except (OSError, HTTPException) as error:  # no connection, one that broke off, or no answer in time
                reason = f"{type(error).__name__}: {error}"
                continue
            try:
                return json.loads(text) if text else None
            except ValueError as error:
                raise EngineError(f"{self.url}{path} must answer with JSON, got {text[:100]!r}") from error
        raise EngineError(
            f"{self.url}{path} gave no answer in {self.tries} tries of at most {self.timeout} seconds; the last: {reason}"
        )


def _read(answer: Any, prompt: list[int]) -> _Drawn:
    """Tokens and log-probabilities of an answer, EngineError where they are not there or the prompt is another."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise EngineError(f"the server must answer with one choice, got {str(answer)[:200]}")
    choice = choices[0]
    read = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
    if read is not None and read != prompt:
        raise EngineError(f"the server completed another prompt: it was asked for {prompt}, and read {read}")
    counted = (answer.get("usage") or {}).get("prompt_tokens")
    if counted is not None and counted != len(prompt):
        raise EngineError(
            f"the server read {counted} tokens of a prompt of {len(prompt)}: it must take tokens as they are, without "
            "adding a BOS or cutting any off"
        )
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        raise EngineError(f"the server must return logprobs, got {found!r}")
    if isinstance(found.get("content"), list):  # llama.cpp's, in the form of chats
        tokens = [entry.get("id", entry.get("token")) for entry in found["content"]]
        told = [entry.get("logprob") for entry in found["content"]]
    else:
        tokens, told = found.get("tokens") or [], found.get("token_logprobs") or []
    ids = choice.get("token_ids")
    if ids is None:
        ids = [_token(token) for token in tokens]
    if len(ids) != len(told):
        raise EngineError(f"the server returned {len(ids)} tokens and {len(told)} log-probabilities")
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) for value in told):
        raise EngineError("the server has no log-probability of a token that it drew")
    return _Drawn(list(ids), list(told))


def _token(token: object) -> int:
    """The id of a token that is named as an id."""
    if isinstance(token, int):
        return token
    name = str(token).removeprefix("token_id:")
    if not name.lstrip("-").isdigit():
        raise EngineError(
            f"the server must return token ids, got the token {token!r} (vLLM knows return_token_ids from 0.10.2 on)"
        )
    return int(name)
