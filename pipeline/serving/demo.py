"""A page on this machine that classifies an image, and shows which blocks ran and what that saved.

A server of the standard library: one page, and a POST of an image file that answers with JSON.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from pipeline.infra.errors import DataError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.serving.predictor import PredictionError, Predictor
from pipeline.sources.image_folder import read_image

PAGE = Path(__file__).with_name("demo.html")
LARGEST = 20_000_000  # bytes of an image file
CALLS = 15  # of each network, in turn, for the time that is shown
UNSURE = 0.6  # confidence under which the page says so


class Demo:
    """A model as the page sees it.

    Args:
        checkpoint: a ResNet and its policy network.
        samples: a folder of PNG files to choose from; it may hold none.

    Raises:
        CheckpointError: the checkpoint holds no ResNet.
        UserError: it has no policy network.
    """

    def __init__(self, checkpoint: Checkpoint, samples: Path) -> None:
        self.predictor = Predictor(checkpoint)
        if checkpoint.policy_net is None:
            raise UserError(f"{checkpoint.path} has no policy network, so there is nothing to show")
        self.full = Predictor(replace(checkpoint, policy_net=None))
        self.stages = checkpoint.need_resnet().stages
        self.samples = {path.name: path for path in sorted(samples.glob("*.png"))}
        self.budgets: list[float] | None = None  # the least and the most that the slider may be set to
        self.trained_budget: float | None = None
        if (values := checkpoint.policy_net.path_values) is not None:
            gammas, flops = values.dial.double().cpu().numpy()  # [G] each
            shares = flops / self.predictor.cost.full
            self.budgets = [float(shares[0]), float(shares[-1])]
            self.trained_budget = float(np.interp(float(values.gamma), gammas, shares))

    def describe(self) -> dict[str, Any]:
        """What the page asks for once."""
        return {
            "classes": self.predictor.classes,
            "size": self.predictor.image_size,
            "stages": self.stages,
            "budgets": self.budgets,
            "budget": self.trained_budget,
            "policy_share": self.predictor.cost.policy_net / self.predictor.cost.full,
            "samples": list(self.samples),
        }

    def predict(self, content: bytes, budget: float | None) -> dict[str, Any]:
        """What an image file shows, its blocks, FLOPs, and milliseconds beside the full network's.

        Raises:
            DataError: it is no image.
            PredictionError: there is no such budget.
        """
        gamma = self.predictor.gamma_of(budget=budget)
        with tempfile.NamedTemporaryFile(prefix="image-") as file:
            file.write(content)
            file.flush()
            try:
                pixels = read_image(Path(file.name), self.predictor.image_size)[None]
            except DataError as error:
                raise DataError(str(error).replace(f"{file.name} ", "the file ", 1)) from None
        (prediction,) = self.predictor(pixels, gamma=gamma)
        dropping, full = _milliseconds(
            lambda: self.predictor(pixels, gamma=gamma), lambda: self.full(pixels)
        )
        unlike = self.predictor.unlike_training(pixels)
        order = prediction.probabilities.argsort()[::-1][:3]
        return {
            "class": prediction.name,
            "top": [[self.predictor.classes[i], float(prediction.probabilities[i])] for i in order],
            "kept": prediction.kept_blocks.tolist(),
            "flops": prediction.flops,
            "full_flops": self.predictor.cost.full,
            "milliseconds": dropping,
            "full_milliseconds": full,
            "unsure": prediction.confidence < UNSURE,
            "unlike": unlike is not None and bool(unlike[0]),
        }


def _milliseconds(*calls: Callable[[], object]) -> list[float]:
    """The median time of each call; they take turns, after one of each that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(CALLS + 1):
        for call, spent in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if number:
                spent.append(1000 * (time.perf_counter() - start))
    return [statistics.median(spent) for spent in times]


def make_server(demo: Demo, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens already; `serve_forever` answers.

    Raises:
        OSError: the address is taken, or none of this machine's.
    """

    class Handler(BaseHTTPRequestHandler):
        """GET / (the page), /model, /samples/NAME; POST /predict?budget=0.4 with an image file."""

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == "/":
                self._answer(PAGE.read_bytes(), "text/html; charset=utf-8")
            elif path == "/model":
                self._answer_json(demo.describe())
            elif (name := path.removeprefix("/samples/")) in demo.samples:
                self._answer(demo.samples[name].read_bytes(), "image/png")
            else:
                self._answer_json({"error": f"there is no {path}"}, HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            url = urlsplit(self.path)
            length = self.headers.get("Content-Length", "")
            if url.path != "/predict":
                self._answer_json({"error": f"there is no {url.path}"}, HTTPStatus.NOT_FOUND)
                return
            if not length.isdecimal() or int(length) > LARGEST:
                message = f"an image file of up to {LARGEST:,} bytes is expected"
                self._answer_json({"error": message}, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                self.close_connection = True  # what was sent is not read
                return
            content = self.rfile.read(int(length))
            try:
                budget = parse_qs(url.query).get("budget", [""])[0]
                self._answer_json(demo.predict(content, float(budget) if budget else None))
            except (DataError, PredictionError, ValueError) as error:
                self._answer_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)

        def _answer_json(self, content: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
            self._answer(json.dumps(content).encode(), "application/json", status)

        def _answer(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """No line for each request."""

    return ThreadingHTTPServer((host, port), Handler)
