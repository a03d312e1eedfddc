"""Batch 1 on CUDA: a graph for each block, replayed if the image keeps it.

At batch 1 launching kernels takes longer than running them, so a block is captured once as a CUDA graph
that works in place on a buffer of its stage. Then only the kept blocks' graphs are replayed; the one
wait for the device is the look at the policy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.executors.base import Networks, Output, UnavailableError
from pipeline.executors.gather import Gather
from pipeline.executors.packed import PackedBlock

Replay = Callable[[], object]


def capture(work: Callable[[], object]) -> Replay:
    """`work` as a CUDA graph; it must read and write the same memory every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up lazily must not be captured
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class Session:
    """The graphs for one size of image, and the buffers that they work on."""

    def __init__(self, executor: "Graphed", height: int, width: int) -> None:
        networks, network = executor.networks, executor.network
        self.images = torch.zeros(1, height, width, 3, device=executor.device, dtype=torch.uint8)
        self.inputs = networks.normalisation(self.images).to(executor.dtype)  # channels_last
        self.actions = torch.ones(1, networks.num_blocks, device=executor.device, dtype=torch.bool)
        self.logits = torch.zeros(1, networks.resnet.num_classes, device=executor.device)
        stream = network.stem.relu(self.inputs).clone()
        self.streams = [stream]
        self.read = executor.capture(lambda: self.inputs.copy_(networks.normalisation(self.images)))
        self.stem = executor.capture(lambda: self.streams[0].copy_(network.stem.relu(self.inputs)))
        if executor.policy_net is not None:
            policy_net = executor.policy_net
            self.decide = executor.capture(lambda: self.actions.copy_(policy_net.actions(self.inputs)))
        self.blocks = [self._block(executor, block) for block in network.blocks]
        last = self.streams[-1]
        self.head = executor.capture(lambda: self.logits.copy_(network.head(last)))

    def _block(self, executor: "Graphed", block: PackedBlock) -> tuple[Replay, Replay | None]:
        """What to replay for a kept block, and for a dropped one (None: nothing)."""
        stream = self.streams[-1]
        if block.shortcut is None:
            return executor.capture(lambda: block.keep_(stream, stream)), None
        after = block.skip(stream).clone()
        self.streams.append(after)
        kept = executor.capture(lambda: after.copy_(block.keep_(stream, block.skip(stream))))
        return kept, executor.capture(lambda: after.copy_(block.skip(stream)))

    def run(self, actions: Tensor | None) -> Output:
        """From the inputs in their buffer on; actions [1, K], or None to ask the policy network."""
        if actions is None:
            self.decide()
        else:
            self.actions.copy_(actions)
        self.stem()  # while the device still works on it, the host waits for the actions
        for (kept, dropped), keep in zip(self.blocks, self.actions[0].tolist(), strict=True):
            if keep:
                kept()
            elif dropped is not None:
                dropped()
        self.head()
        return Output(logits=self.logits.clone(), actions=self.actions.clone())


class Graphed(Gather):
    """One image at a time by CUDA graphs; larger batches as `gather` does them.

    Raises:
        UnavailableError: the networks are not on CUDA.
    """

    name = "graphed"
    capture = staticmethod(capture)

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        if self.device.type != "cuda" and self.capture is capture:
            raise UnavailableError(f"CUDA graphs need CUDA, not {self.device.type}")
        self.sessions: dict[tuple[int, int], Session] = {}

    def _session(self, height: int, width: int) -> Session:
        if (height, width) not in self.sessions:
            self.sessions[height, width] = Session(self, height, width)
        return self.sessions[height, width]

    def _run(self, images: Tensor, actions: Tensor | None) -> Output:
        if len(images) != 1:
            return super()._run(images, actions)
        session = self._session(*images.shape[1:3])
        session.images.copy_(images)
        session.read()
        return session.run(actions)

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        if len(inputs) != 1:
            return super()._classify(inputs, actions)
        session = self._session(*inputs.shape[2:])
        session.inputs.copy_(inputs)
        return session.run(actions).logits
