"""A server of the chat API on a free port of this machine, whose judge is a function of the texts to be judged."""

import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_SECTION = re.compile(r"^BEGIN ([A-Z ]+) ([0-9a-f]{16})\n(.*?)\nEND \1 \2$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Response:
    """An HTTP response other than an answer: a string is sent as it is, anything else as JSON."""

    status: int = 200
    body: object = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class JudgeServer(ThreadingHTTPServer):
    """Serves POST /v1/chat/completions while its context is open.

    Args:
        judge: From the texts of a message by the name of their section, to the answer.

    Attributes:
        url: Base URL.
        bodies: Of the requests, as they came.
        keys: What the Authorization headers held.
        most_at_once: Most requests that were under way at the same time.
    """

    def __init__(self, judge: Callable[[dict[str, str]], str | Response]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.judge = judge
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        # Tests kill clients, and let them go away; anything else is a mistake of the judge's.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, body: dict, key: str | None) -> str | Response:
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self.judge(sections(body))
        finally:
            with self._lock:
                self._at_once -= 1


def sections(body: dict) -> dict[str, str]:
    """The texts in a request's message, by the name of their section."""
    (message,) = body["messages"]
    return {name: text for name, _, text in _SECTION.findall(message["content"])}


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            answer: str | Response = Response(404, {"detail": "Not Found"})
        else:
            answer = self.server.answer(body, self.headers["Authorization"])
        if isinstance(answer, str):
            answer = Response(body=completion(answer))
        text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def completion(answer: str | None, finish_reason: str = "stop") -> dict:
    """The JSON of an answer of one token to a message of 100."""
    message = {"role": "assistant", "content": answer}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
    }
