"""A server of chat completions on localhost, with answers and failures that a test chooses."""

import collections
import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = str  # timeout, 429, 500, truncated, cut off, or an answer of its own after "say: "


def shown(body: dict) -> tuple[str, str, str]:
    """The reference and the two commentaries of a judge's question."""
    text = body["messages"][1]["content"]
    found = re.fullmatch(r"Reference transcript:\n(.*)\n\nCommentary A:\n(.*)\n\nCommentary B:\n(.*)", text, re.DOTALL)
    assert found, text
    return found[1], found[2], found[3]


def by_marks(body: dict) -> str:
    """Votes for the text with «strong», against the one with «weak», and for the first one of any other pair."""
    _, first, second = shown(body)
    if "strong" in second or "weak" in first:
        return "B"
    return "A"


class Server:
    """`requests` holds every body that arrived; `answered` counts whole answers by question."""

    def __init__(
        self,
        answer: Callable[[dict], str] = by_marks,
        fault: Callable[[dict, int], Fault | None] = lambda body, attempt: None,
        refuse: Callable[[dict], bool] = lambda body: False,
    ):
        self.answer, self.fault, self.refuse = answer, fault, refuse
        self.requests: list[dict] = []
        self.times: dict[str, list[float]] = collections.defaultdict(list)
        self.answered: collections.Counter[str] = collections.Counter()
        self.arrived: Callable[[int], None] = lambda count: None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @property
    def judge(self) -> str:
        return f"{self.url}#judge-1"

    @contextlib.contextmanager
    def serving(self) -> Iterator["Server"]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body["authorization"] = self.headers.get("Authorization")
                with contextlib.suppress(OSError):  # the client may be gone
                    server.serve(self, body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()
            thread.join()

    def serve(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        key = json.dumps(body["messages"])
        with self.lock:
            self.requests.append(body)
            self.times[key].append(time.monotonic())
            count, attempt = len(self.requests), len(self.times[key]) - 1
        assert handler.path == "/v1/chat/completions"
        self.arrived(count)
        fault = self.fault(body, attempt)
        if fault == "timeout":
            time.sleep(1.0)
        if fault in ("429", "500", "400"):
            headers = {"Retry-After": "0.2"} if fault == "429" else {}
            message = "temperature is not supported" if fault == "400" else "try again"
            self.send(handler, int(fault), {"error": {"message": message}}, headers)
            return
        text = fault.removeprefix("say: ") if fault and fault.startswith("say: ") else self.answer(body)
        message = (
            {"role": "assistant", "content": None, "refusal": "I will not."}
            if self.refuse(body)
            else {"role": "assistant", "content": text}
        )
        whole = json.dumps(
            {
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 1},
            }
        )
        if fault == "truncated":
            self.send(handler, 200, whole[: len(whole) // 2])
        elif fault == "cut off":  # less than was promised
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(whole)))
            handler.end_headers()
            handler.wfile.write(whole[:20].encode())
            handler.close_connection = True
        else:
            with self.lock:
                self.answered[key] += fault != "timeout"
            self.send(handler, 200, whole)

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, status: int, body, headers=()) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(status)
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
