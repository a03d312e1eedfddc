"""The full ResNet by other engines for CPUs, each as its documentation says that it is fastest.

Shapes: B images of H by W pixels, N classes.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.inference.base import Networks, UnavailableError
from pipeline.onnx_graph import INSTALL, to_onnx

Pixels = NDArray[np.uint8]  # [B, H, W, 3]
Logits = NDArray[np.float32]  # [B, N]


class _FromPixels(nn.Module):
    """Images [B, H, W, 3] uint8 to logits [B, N]; the engine may fuse the normalisation."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.resnet, self.normalisation = networks.resnet, networks.normalisation

    def forward(self, images: Tensor) -> Tensor:
        return self.resnet(self.normalisation(images))


@lru_cache(maxsize=1)  # all engines and batch sizes take the same
def _graph_of(networks: Networks, height: int, width: int) -> bytes:
    examples = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    return to_onnx(_FromPixels(networks), [examples], names=["images"], outputs=["logits"])


class Peer(ABC):
    """An engine with one compiled network for each shape of batch, made at its first call.

    Args:
        networks: on a CPU.
        precision: `fp32` or `bf16`.

    Raises:
        UnavailableError: a package is missing, or the engine has no such precision.
    """

    package: str

    def __init__(self, networks: Networks, precision: str) -> None:
        self.networks, self.precision = networks, precision
        try:
            self.engine: Any = importlib.import_module(self.package)
        except ImportError as error:
            raise UnavailableError(f"{error.name} is not installed; {INSTALL}") from None
        self.threads = torch.get_num_threads()
        self.compiled: dict[torch.Size, Callable[[Pixels], Logits]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, N] of images [B, H, W, 3] uint8."""
        shape = images.shape
        if shape not in self.compiled:
            graph = _graph_of(self.networks, shape[1], shape[2])
            self.compiled[shape] = self.compile(graph, shape)
        return torch.from_numpy(self.compiled[shape](images.numpy()))

    @abstractmethod
    def compile(self, graph: bytes, shape: torch.Size) -> Callable[[Pixels], Logits]:
        """The network of an ONNX file for images of that shape."""


class OnnxRuntime(Peer):
    """ONNX Runtime's provider for CPUs."""

    package = "onnxruntime"

    def __init__(self, networks: Networks, precision: str) -> None:
        if precision != "fp32":
            raise UnavailableError("ONNX Runtime has no convolution in this precision on CPUs")
        super().__init__(networks, precision)

    def compile(self, graph: bytes, shape: torch.Size) -> Callable[[Pixels], Logits]:
        options = self.engine.SessionOptions()
        options.intra_op_num_threads = self.threads
        # its threads spin while it runs, for speed, but not while others are timed
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = self.engine.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})[0]


class OpenVino(Peer):
    """OpenVINO in its form for latency: all threads work on one batch."""

    package = "openvino"
    streams = 1

    def compile(self, graph: bytes, shape: torch.Size) -> Callable[[Pixels], Logits]:
        streams = min(self.streams, shape[0])
        core = self.engine.Core()
        model = core.read_model(graph)
        bounds = [shape[0] * part // streams for part in range(1, streams)]  # of nearly equal parts
        sizes = {len(part) for part in np.split(np.arange(shape[0]), bounds)}
        if len(sizes) == 1:  # a shape that is known is faster
            model.reshape([sizes.pop(), *shape[1:]])
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": self.threads,
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[self.precision],
            },
        )
        requests = [compiled.create_infer_request() for _ in range(streams)]

        def run(images: Pixels) -> Logits:
            for request, part in zip(requests, np.split(images, bounds), strict=True):
                request.start_async([part], share_inputs=True)
            for request in requests:
                request.wait()
            return np.concatenate([request.get_output_tensor().data for request in requests])

        return run


class OpenVinoStreams(OpenVino):
    """OpenVINO in its form for throughput: each thread works on a part of the batch."""

    @property
    def streams(self) -> int:  # type: ignore[override]
        return self.threads


PEERS: dict[str, type[Peer]] = {
    "ONNX Runtime": OnnxRuntime,
    "OpenVINO": OpenVino,
    "OpenVINO, streams": OpenVinoStreams,
}
