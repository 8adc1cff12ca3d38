"""A small OpenAI-compatible endpoint on this machine, with the faults of real ones."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: str | None) -> Answer:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
    return as_json({"id": "1", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice], "usage": usage})


def as_json(content: object, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"content-type": "application/json", **named}, json.dumps(content).encode()


def error(status: int, message: str, **headers: str) -> Answer:
    return as_json({"error": {"message": message, "type": "fake"}}, status, **headers)


class Fake:
    """`reply(number, text)` answers the request with that number (from 0); `asked` collects the texts."""

    def __init__(self, reply: Callable[[int, str], Answer]):
        self.reply, self.asked, self.lock, self.models = reply, [], threading.Lock(), as_json({"object": "list", "data": []})
        self.bodies: list[dict] = []
        self.url = ""


@contextmanager
def serve(reply: Callable[[int, str], Answer]):
    fake = Fake(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(fake.models)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with fake.lock:
                number, text = len(fake.asked), body["messages"][0]["content"]
                fake.asked.append(text)
                fake.bodies.append(body)
            self.send(fake.reply(number, text))

        def send(self, answer: Answer):
            status, headers, content = answer
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # a client that timed out has hung up
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def slow(seconds: float) -> Answer:
    time.sleep(seconds)
    return completion("5 5")
