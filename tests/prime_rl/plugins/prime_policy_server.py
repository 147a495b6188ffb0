"""A local HTTP server that speaks the part of prime-rl's inference server that rollouts and scoring use.

`/inference/v1/generate` as vLLM answers it: sampled tokens with log-probs, and `prompt_logprobs`. The model is real; what
it "samples" is scripted, because a model of 135M parameters does not call tools. `faults` breaks the next scoring answers.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class PolicyServer:
    """Serves `model`; every generate request gets the next text of `script`, or its last one."""

    def __init__(self, model, tokenizer, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.script: deque[str] = deque()
        self.faults: deque[str] = deque()
        self.requests: list[dict] = []
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.reply(200, {"data": [{"id": owner.name, "max_model_len": 8192}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                if owner.admin(self.path.partition("?")[0], body):
                    return self.reply(200, {"status": "ok"})
                owner.requests.append({"path": self.path, "headers": dict(self.headers), **body})
                if self.path != "/inference/v1/generate":
                    return self.reply(404, {"error": self.path})
                if "prompt_logprobs" not in body["sampling_params"]:
                    return self.reply(200, owner.generate(body))
                return self.score(body)

            def score(self, body):
                fault = owner.faults.popleft() if owner.faults else None
                if fault == "hang":
                    time.sleep(3)
                elif fault == "drip":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    try:
                        for _ in range(30):
                            self.wfile.write(b" ")
                            self.wfile.flush()
                            time.sleep(0.1)
                    except OSError:
                        pass
                    return self.close()
                elif fault == "close":
                    return self.close()
                elif fault == "html":
                    return self.reply(200, b"<html>gateway</html>")
                elif fault and fault.isdigit():
                    return self.reply(int(fault), {"error": fault})
                answer = owner.prompt_logprobs(body["token_ids"])
                return self.reply(200, GARBAGE[fault](answer) if fault in GARBAGE else answer)

            def close(self):
                self.close_connection = True
                self.connection.close()

            def reply(self, status, payload):
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()
        self.base_url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def admin(self, path: str, body: dict) -> bool:
        """Whether a request was one of the administrator's, and done; none is here."""
        return False

    def logprobs(self, ids: list[int]) -> list[float]:
        """Log-prob of every token after the first, temperature 1."""
        with self.lock, torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0].float()
        rows = logits[:-1].log_softmax(-1)
        return rows.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    def prompt_logprobs(self, ids: list[int]) -> dict:
        entries = [None]
        for token, value in zip(ids[1:], self.logprobs(ids), strict=True):
            # as vLLM: the prompt's token and the most likely one; which comes first is not promised
            entries.append({"0": {"logprob": -0.5, "rank": 1}, str(token): {"logprob": value, "rank": 7}})
        return {"request_id": "x", "choices": [], "prompt_logprobs": entries}

    def text_for(self, body: dict) -> str:
        """What is "sampled" for a request."""
        with self.lock:
            return self.script.popleft() if len(self.script) > 1 else self.script[0]

    def generate(self, body: dict) -> dict:
        ids = self.tokenizer(self.text_for(body), add_special_tokens=False)["input_ids"]
        ids += self.tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
        prompt = body["token_ids"]
        logprobs = self.logprobs(prompt + ids)[len(prompt) - 1 :]
        content = [{"token": f"token_id:{t}", "logprob": v} for t, v in zip(ids, logprobs, strict=True)]
        choice = {"index": 0, "token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"}
        return {"request_id": "x", "choices": [choice]}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def _without_last(answer: dict) -> dict:
    return {**answer, "prompt_logprobs": answer["prompt_logprobs"][:-1]}


def _other_tokens(answer: dict) -> dict:
    return {**answer, "prompt_logprobs": [None] + [{"0": {"logprob": -0.5}}] * (len(answer["prompt_logprobs"]) - 1)}


def _with(value):
    def change(answer: dict) -> dict:
        entries = [e and {k: {"logprob": value} for k in e} for e in answer["prompt_logprobs"]]
        return {**answer, "prompt_logprobs": entries}

    return change


#: Answers that a server must not get away with.
GARBAGE = {
    "short": _without_last,
    "other_tokens": _other_tokens,
    "positive": _with(3.0),
    "not_a_number": _with("NaN"),
    "nan": _with(float("nan")),
    "sentinel": _with(-9999.0),
    "true": _with(True),
    "null": lambda answer: {**answer, "prompt_logprobs": None},
    "list": lambda answer: [answer],
    "empty": lambda answer: {},
}
