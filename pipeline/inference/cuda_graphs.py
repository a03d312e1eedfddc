"""Batch 1 on CUDA: a CUDA graph for each block, replayed if the image keeps the block.

At batch 1 launching kernels takes longer than running them, so a block is captured once as a CUDA graph
that works in place on a buffer of its stage. Then only the graphs of kept blocks are replayed. The host
waits for the device once, to read the policy, and then for the policy network alone.

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
    """Captures CUDA graphs that are replayed one at a time, in any order, and destroyed together.

    They share a memory pool. That is sound because what a graph allocates there is scratch: nothing
    that a graph leaves in the pool is read after the next replay of any of them.

    A capture watches its own thread alone ("thread_local"), so that others, such as a DataLoader's, may
    pin memory meanwhile.

    The graphs have a stream of their own, one of the 32 that PyTorch hands out in turn. PyTorch keeps
    cuBLAS's workspaces by stream and frees them with the first destroyed graph that was captured there,
    even if others are still replayed (pytorch/pytorch, issue 193402). The warm-up uses another stream,
    so that its workspaces are not part of the pool.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, work: Callable[[], object]) -> Replay:
        """Capture `work`, which must read and write the same memory every time; return its replay."""
        for _ in range(3):  # lazy initialisation must not be captured
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            work()
        return graph.replay


class PolicyReader:
    """Reads the policy on the host; waits for it, but for nothing that was queued after it."""

    def __init__(self, actions: Tensor) -> None:
        self.actions = actions  # [1, K] bool, the buffer to read
        self.on_host = torch.empty(actions.shape, dtype=torch.bool, pin_memory=actions.is_cuda)
        self.copied = torch.cuda.Event()

    def begin(self) -> None:
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
        self.policy_reader = PolicyReader(self.actions)
        self.capture = executor.captures()
        # A buffer for each shape of activations. Blocks that keep the shape work in place on it.
        self.buffers = [network.stem(self.inputs).clone()]  # [1, C, H, W]
        self.read = self.capture(lambda: self.inputs.copy_(networks.normalisation(self.images)))
        self.stem = self.capture(lambda: self.buffers[0].copy_(network.stem(self.inputs)))
        if executor.policy_net is not None:
            policy_net = executor.policy_net
            self.decide = self.capture(lambda: self.actions.copy_(policy_net.actions(self.inputs)))
        self.blocks = [self._block(block) for block in network.blocks]
        last = self.buffers[-1]
        self.head = self.capture(lambda: self.logits.copy_(network.head(last)))

    def _block(self, block: FusedBlock) -> tuple[Replay, Replay | None]:
        """The replay of a kept block, and that of a dropped one (None: nothing to do)."""
        x = self.buffers[-1]
        if block.shortcut is None:
            return self.capture(lambda: block.keep_(x, x)), None
        output = block.skip(x).clone()  # another shape: the next buffer
        self.buffers.append(output)
        kept = self.capture(lambda: output.copy_(block.keep_(x, block.skip(x))))
        return kept, self.capture(lambda: output.copy_(block.skip(x)))

    def run(self, actions: Tensor | None) -> Output:
        """Run on what `inputs` holds, under actions [1, K], or the policy network's (None)."""
        if actions is None:
            self.decide()
        else:
            self.actions.copy_(actions)
        self.policy_reader.begin()
        self.stem()  # the device runs it while the host reads the policy and queues the blocks
        for (kept, dropped), keep in zip(self.blocks, self.policy_reader.end(), strict=True):
            if keep:
                kept()
            elif dropped is not None:
                dropped()
        self.head()
        return Output(logits=self.logits.clone(), actions=self.actions.clone())


class CudaGraphs(Gather):
    """Single images by CUDA graphs; larger batches as `gather` runs them.

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
