"""A small server that speaks the part of vLLM's `/v1/completions` that training asks for, with a tiny model behind it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Answer = dict[str, Any]


class CompletionServer:
    """Draws tokens of a model, one forward pass a token, with the seed of the request.

    Attributes:
        requests: the bodies that came, in the order in which they came.
        wrong: changes an answer before it is sent; called with the body and the answer.
        fail: called with the number of the request; returns a status to fail with, "hang up", "late", or None.
        llama: whether log-probabilities have the form of llama.cpp's server, which names tokens there alone.
    """

    def __init__(self, model: Any, eos: int = 2) -> None:
        self.model, self.eos = model, eos
        self.requests: list[Answer] = []
        self.wrong: Callable[[Answer, Answer], Answer] | None = None
        self.fail: Callable[[int], int | str | None] = lambda number: None
        self.llama = False
        self.url = ""
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[CompletionServer]:
        """Serve on the loopback address, at a port that is free."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    number = len(owner.requests)
                    owner.requests.append(body)
                failure = owner.fail(number)
                if failure == "hang up":
                    self.connection.close()
                    return
                if failure == "late":
                    time.sleep(1.0)
                if isinstance(failure, int):
                    self.send_error(failure, "as asked for")
                    return
                with owner._lock:  # one model, many threads
                    answer = owner._complete(body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # clients hang up, too
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    @torch.no_grad()
    def _complete(self, body: Answer) -> Answer:
        generator = torch.Generator().manual_seed(body["seed"])
        prompt, ids, told = list(body["prompt"]), [], []
        while len(ids) < body["max_tokens"] and (not ids or ids[-1] not in body["stop_token_ids"]):
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1].double() / body["temperature"]
            for token, bias in body.get("logit_bias", {}).items():
                logits[int(token)] += bias
            logp = logits.log_softmax(-1)
            ids.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
            told.append(float(logp[ids[-1]]))
        choice: Answer = {"index": 0, "text": "", "finish_reason": "stop" if ids[-1] == self.eos else "length"}
        if self.llama:
            content = [{"id": token, "token": "", "logprob": value} for token, value in zip(ids, told, strict=True)]
            choice["logprobs"] = {"content": content}
        else:
            choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": told}
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        answer = {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}}
        return answer if self.wrong is None else self.wrong(body, answer)
