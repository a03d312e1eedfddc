"""Batch 1 on CUDA: a graph for each block, replayed if the image keeps it.

At batch 1 launching kernels takes longer than running them, so a block is captured once as a CUDA graph
that works in place on a buffer of its stage. Then only the kept blocks' graphs are replayed. The one
wait for the device is the look at the policy, and it is for the policy network alone.

Shapes: K blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.inference.base import Networks, Output, UnavailableError
from pipeline.inference.fused import FusedBlock
from pipeline.inference.gather import Gather

Replay = Callable[[], object]


class Captures:
    """Makes CUDA graphs that are replayed one at a time, in any order, and destroyed together.

    They share a memory pool. That is sound because what a graph allocates there is scratch: nothing
    that a graph leaves in the pool is read after the next replay of any of them.

    Threads that pin memory (a DataLoader's) may go on meanwhile: a capture minds its own thread alone.
    They have a stream of their own (one of the 32 that PyTorch hands out in turn): it keeps cuBLAS's
    workspaces by stream, and frees them with the first graph captured there that is destroyed, whoever
    still replays others (pytorch/pytorch, issue 193402). Not the one that warms up either: in the pool a
    workspace that is freed goes to nobody else.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, work: Callable[[], object]) -> Replay:
        """`work` as a CUDA graph; it must read and write the same memory every time."""
        for _ in range(3):  # what is set up lazily must not be captured
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            work()
        return graph.replay


class Look:
    """A look at the policy that waits for it, but for nothing that was queued after it.

    Args:
        actions: [1, K] bool, the buffer to look at.
    """

    def __init__(self, actions: Tensor) -> None:
        self.actions = actions
        self.on_host = torch.empty(actions.shape, dtype=torch.bool, pin_memory=actions.is_cuda)
        self.copied = torch.cuda.Event()

    def begin(self) -> None:
        """Queue the copy to the host."""
        self.on_host.copy_(self.actions, non_blocking=True)
        self.copied.record()

    def end(self) -> list[bool]:
        """The K actions, once the copy is done."""
        self.copied.synchronize()
        return self.on_host[0].tolist()


class Session:
    """The graphs for one size of image, and the buffers that they work on."""

    def __init__(self, executor: "CudaGraphs", height: int, width: int) -> None:
        networks, network = executor.networks, executor.network
        self.images = torch.zeros(1, height, width, 3, device=executor.device, dtype=torch.uint8)
        self.inputs = networks.normalisation(self.images).to(executor.dtype)  # channels_last
        self.actions = torch.ones(1, networks.num_blocks, device=executor.device, dtype=torch.bool)
        self.logits = torch.zeros(1, networks.resnet.num_classes, device=executor.device)
        self.look = Look(self.actions)
        self.capture = executor.captures()
        stream = network.stem.relu(self.inputs).clone()
        self.streams = [stream]
        self.read = self.capture(lambda: self.inputs.copy_(networks.normalisation(self.images)))
        self.stem = self.capture(lambda: self.streams[0].copy_(network.stem.relu(self.inputs)))
        if executor.policy_net is not None:
            policy_net = executor.policy_net
            self.decide = self.capture(lambda: self.actions.copy_(policy_net.actions(self.inputs)))
        self.blocks = [self._block(block) for block in network.blocks]
        last = self.streams[-1]
        self.head = self.capture(lambda: self.logits.copy_(network.head(last)))

    def _block(self, block: FusedBlock) -> tuple[Replay, Replay | None]:
        """What to replay for a kept block, and for a dropped one (None: nothing)."""
        stream = self.streams[-1]
        if block.shortcut is None:
            return self.capture(lambda: block.keep_(stream, stream)), None
        after = block.skip(stream).clone()
        self.streams.append(after)
        kept = self.capture(lambda: after.copy_(block.keep_(stream, block.skip(stream))))
        return kept, self.capture(lambda: after.copy_(block.skip(stream)))

    def run(self, actions: Tensor | None) -> Output:
        """From the inputs in their buffer on; actions [1, K], or None to ask the policy network."""
        if actions is None:
            self.decide()
        else:
            self.actions.copy_(actions)
        self.look.begin()
        self.stem()  # what the device does while the host waits, then queues the blocks
        for (kept, dropped), keep in zip(self.blocks, self.look.end(), strict=True):
            if keep:
                kept()
            elif dropped is not None:
                dropped()
        self.head()
        return Output(logits=self.logits.clone(), actions=self.actions.clone())


class CudaGraphs(Gather):
    """One image at a time by CUDA graphs; larger batches as `gather` does them.

    Raises:
        UnavailableError: the networks are not on CUDA.
    """

    name = "cuda_graphs"
    captures: type[Captures] = Captures

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        if self.device.type != "cuda" and self.captures is Captures:
            raise UnavailableError(f"CUDA graphs need CUDA, not {self.device.type}")
        self.sessions: dict[tuple[int, int], Session] = {}

    def free(self) -> None:
        """Drop the graphs and their buffers."""
        self.sessions.clear()

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
