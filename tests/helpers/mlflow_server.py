"""MLflow's own server in a thread, which can be made to fail in many ways."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from werkzeug.serving import BaseWSGIServer, make_server

STATUS = {
    "401": "401 UNAUTHORIZED",
    "500": "500 INTERNAL SERVER ERROR",
    "503": "503 SERVICE UNAVAILABLE",
    "garbage": "200 OK",
    "lost": "500 INTERNAL SERVER ERROR",  # after it has done what it was asked to
}


class Server:
    """Passes calls to MLflow's application, or fails.

    Attributes:
        mode: "fine", "refuse", "hang", or a key of STATUS.
        calls: since the mode was set.
        failing_call: the number of a single call that fails: its work is done, its answer lost.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.mode = "fine"
        self.calls = 0
        self.failing_call = 0
        self.port = 0
        self._released = threading.Event()
        self._listener: BaseWSGIServer
        self._listen()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, mode: str) -> None:
        if self.mode == "refuse":
            self._listen()
        self.mode = mode
        self.calls = self.failing_call = 0
        self._released.clear() if mode == "hang" else self._released.set()
        if mode == "refuse":
            self._listener.shutdown()
            self._listener.server_close()

    def __call__(self, environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        self.calls += 1
        mode = "lost" if self.failing_call == self.calls else self.mode
        if mode == "hang":
            self._released.wait(60)
        if mode == "lost":
            list(self.application(environment, lambda *_, **__: None))
        if mode not in STATUS:
            return self.application(environment, start)
        start(STATUS[mode], [("Retry-After", "3600"), ("Content-Length", "4")])
        return [b"<ht>"]

    def _listen(self) -> None:
        self._listener = make_server("127.0.0.1", self.port, self, threaded=True)
        self.port = self._listener.server_port
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()


class Clock:
    """Stands in for the module `time`; it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.time = time.time

    def monotonic(self) -> float:
        return self.now
