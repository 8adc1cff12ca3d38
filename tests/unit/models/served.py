"""A small server with the routes of vLLM that a teacher needs, and with the faults of real ones. It runs a tiny model in this process.

It is for the failures of servers only: `tests/e2e/test_served.py` has the real server.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel

Reply = tuple[int, dict[str, str], bytes]
Fault = Callable[[int, str, dict, Reply], Reply | None]
"""Number of the POST request (from 0), its path, its body and the right reply to the reply that is sent. None breaks the connection."""


class Server:
    """`fault` changes the replies to POST requests. `asked` collects their paths and bodies, and `keys` the headers with API keys."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str):
        self.model, self.tokenizer, self.name, self.longest = model, tokenizer, name, 128
        self.fault: Fault = lambda number, path, body, reply: reply
        self.asked: list[tuple[str, dict]] = []
        self.keys: set[str | None] = set()
        self.lock, self.at = threading.Lock(), ""

    def post(self, path: str, body: dict) -> Reply:
        with self.lock:
            number = len(self.asked)
            self.asked.append((path, body))
        right = {"/pooling": self.pooled, "/v1/completions": self.completed, "/tokenize": self.tokenized}[path](body)
        return self.fault(number, path, body, right)

    @torch.no_grad()
    def pooled(self, body: dict) -> Reply:
        (ids,) = body["input"]
        states = self.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0].to(getattr(torch, body["embed_dtype"]))
        content = states.contiguous().view(torch.uint8).numpy().tobytes()
        place = {"index": 0, "start": 0, "end": len(content), "shape": list(states.shape), "embed_dtype": body["embed_dtype"]}
        return 200, {"metadata": json.dumps({"id": f"pooling-{body['request_id']}", "data": [place]})}, content

    @torch.no_grad()
    def completed(self, body: dict) -> Reply:
        (ids,) = body["prompt"]
        log_p = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        rows: list[dict | None] = [None]
        for token, row in zip(ids[1:], log_p[:-1], strict=True):
            found = [token, *(i for i in row.topk(body["prompt_logprobs"]).indices.tolist() if i != token)]
            rows.append({str(i): {"logprob": float(row[i])} for i in found})
        return as_json({"choices": [{"prompt_logprobs": rows}]})

    def tokenized(self, body: dict) -> Reply:
        return as_json({"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]})


def as_json(content: object, status: int = 200) -> Reply:
    return status, {"content-type": "application/json"}, json.dumps(content).encode()


def refusal(status: int, message: str) -> Reply:
    return as_json({"error": {"message": message}}, status)


@contextmanager
def serving(model: PreTrainedModel, tokenizer: Any, name: str) -> Iterator[Server]:
    here = Server(model, tokenizer, name)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            here.keys.add(self.headers["authorization"])
            self.send(as_json({"data": [{"id": here.name, "max_model_len": here.longest}]}))

        def do_POST(self):
            here.keys.add(self.headers["authorization"])
            self.send(here.post(self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))

        def send(self, reply: Reply | None):
            if reply is None:
                self.close_connection = True
                return
            status, headers, content = reply
            self.send_response(status)
            with suppress(ConnectionError):  # a client that timed out has hung up
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    here.at = f"http://127.0.0.1:{server.server_port}"
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
