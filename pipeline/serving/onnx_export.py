"""A ResNet and its policy network as ONNX graphs that run without PyTorch.

A folder with the policy network, stem, blocks and head as graphs of their own (a dropped block is not
called), the whole as one graph that runs every block and discards what an image drops, a manifest, and
onnx_runner.py, which runs either.

Shapes: B images of H by W pixels, K blocks, N classes, C channels.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.transforms import Normalisation
from pipeline.flops import measure
from pipeline.infra.errors import UserError
from pipeline.models.checkpoint import Checkpoint, CheckpointError
from pipeline.models.path_values import PathValues
from pipeline.models.policy_net import PolicyNet, average_down
from pipeline.models.resnet import Block, ResNet
from pipeline.onnx_graph import to_onnx
from pipeline.serving.predictor import image_size_of

FORMAT = 1  # of the manifest
MANIFEST = "manifest.json"
RUNNER = "runner.py"


class _Policy(nn.Module):
    """Images to what the policy network decides."""

    def __init__(self, policy_net: PolicyNet, normalisation: Normalisation) -> None:
        super().__init__()
        self.policy_net, self.normalisation = policy_net, normalisation

    def forward(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 to actions [B, K] bool."""
        return self.policy_net(self.normalisation(images)) >= 0


class _ValuePolicy(_Policy):
    """The same of a policy network that classifies and decides by the values of paths."""

    def forward(self, images: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Actions [B, K] bool, its own answer [B, N] (log probabilities), its class logits [B, N].

        Args:
            images: [B, H, W, 3] uint8.
            gamma: [], the penalty of a wrong prediction.
        """
        values = self.policy_net.path_values
        assert values is not None
        inputs = average_down(self.normalisation(images), self.policy_net.input_size)
        class_logits = self.policy_net.features(inputs)
        return values(class_logits, gamma) >= 0, values.average.log_probs(class_logits), class_logits


class _Stem(nn.Module):
    """Images [B, H, W, 3] uint8 to the first block's input [B, C, H, W]."""

    def __init__(self, resnet: ResNet, normalisation: Normalisation) -> None:
        super().__init__()
        self.resnet, self.normalisation = resnet, normalisation

    def forward(self, images: Tensor) -> Tensor:
        return self.resnet.stem(self.normalisation(images))


class _Head(nn.Module):
    """The last block's output [B, C, H, W] to logits [B, N]."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, x: Tensor) -> Tensor:
        return self.resnet.head(x)


class _Masked(nn.Module):
    """All of it in one graph, which runs every block on every image."""

    def __init__(self, policy: _Policy | None, stem: _Stem, head: _Head) -> None:
        super().__init__()
        self.policy, self.stem, self.head = policy, stem, head
        self.blocks = nn.ModuleList(stem.resnet.flat_blocks())

    def forward(self, images: Tensor, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B, N] and actions [B, K] bool of images [B, H, W, 3] uint8.

        Args:
            gamma: [], where the policy is a _ValuePolicy.
        """
        answer = class_logits = None
        if self.policy is None:
            actions = torch.ones(images.shape[0], len(self.blocks), dtype=torch.bool)
        elif gamma is None:
            actions = self.policy(images)
        else:
            actions, answer, class_logits = self.policy(images, gamma)
        x = self.stem(images)
        for block, keep in zip(self.blocks, actions.unbind(dim=1), strict=True):
            assert isinstance(block, Block)
            skipped = block.shortcut(x)
            x = torch.where(keep[:, None, None, None], F.relu(skipped + block.residual(x)), skipped)
        logits = self.head(x)
        if self.policy is None or answer is None:
            return logits, actions
        values = self.policy.policy_net.path_values
        assert values is not None
        logits = values.average(class_logits, logits)
        if values.answers:
            logits = torch.where(actions.any(dim=1, keepdim=True), logits, answer)
        return logits, actions


def export(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    image_size: int | None = None,
    tick: Callable[[str], object] = lambda _: None,
) -> None:
    """Write the checkpoint's networks into a new folder, whole or not at all.

    Args:
        image_size: side in pixels, for a checkpoint that does not hold it.
        tick: gets the name of each file before it is written.

    Raises:
        CheckpointError: the checkpoint holds no ResNet.
        UserError: the folder exists already, the image size is not known, or a package is missing.
    """
    if checkpoint.resnet is None:
        raise CheckpointError(
            f"{checkpoint.path} holds no ResNet; take models/finetune (both networks) or models/pretrain"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; remove it, or name another folder")
    size = image_size_of(checkpoint, image_size)
    unfinished = folder.with_name(folder.name + ".unfinished")
    if unfinished.exists():  # of an export that was killed
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        for name, graph in _graphs(checkpoint, size):
            tick(name)
            (unfinished / name).write_bytes(graph())
        (unfinished / MANIFEST).write_text(json.dumps(_manifest(checkpoint, size), indent=1) + "\n")
        shutil.copyfile(Path(__file__).with_name("onnx_runner.py"), unfinished / RUNNER)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _manifest(checkpoint: Checkpoint, image_size: int) -> dict[str, object]:
    """What the runner needs to know, and what a reader wants to."""
    resnet, policy_net = checkpoint.resnet, checkpoint.policy_net
    assert resnet is not None
    values = None if policy_net is None else policy_net.path_values
    return {
        "format": FORMAT,
        "image_size": image_size,
        "classes": checkpoint.classes,
        "blocks": resnet.num_blocks,
        "shortcuts": [k for k, block in enumerate(resnet.flat_blocks()) if _changes_shape(block)],
        "policy": policy_net is not None,
        "gamma": None if values is None else float(values.gamma),
        "dial": None if values is None else _dial(values),
        "answers": policy_net is not None and policy_net.answers,
        "flops": asdict(measure(resnet, policy_net, image_size)),
    }


def _dial(values: PathValues) -> dict[str, list[float]]:
    """Gammas, and the mean FLOPs of a validation image under each."""
    gammas, flops = values.dial.tolist()
    return {"gamma": gammas, "flops": flops}


def _changes_shape(block: Block) -> bool:
    return not isinstance(block.shortcut, nn.Identity)


@torch.no_grad()
def _graphs(checkpoint: Checkpoint, image_size: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The name of each file, and what makes its content."""
    resnet, policy_net = checkpoint.resnet, checkpoint.policy_net
    assert resnet is not None
    resnet.cpu().eval()
    images = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    gamma = torch.tensor(0.0)
    values = None if policy_net is None else policy_net.path_values
    stem, head = _Stem(resnet, checkpoint.normalisation), _Head(resnet)

    def graph(module: nn.Module, outputs: list[str], **inputs: Tensor) -> Callable[[], bytes]:
        return lambda: to_onnx(module, list(inputs.values()), names=list(inputs), outputs=outputs)

    policy: _Policy | None = None
    if policy_net is not None:
        policy_net.cpu().eval()
        outputs = ["actions"]
        if values is None:
            policy = _Policy(policy_net, checkpoint.normalisation)
            yield "policy.onnx", graph(policy, outputs, images=images)
        else:
            policy = _ValuePolicy(policy_net, checkpoint.normalisation)
            outputs += ["answer", "class_logits"]
            yield "policy.onnx", graph(policy, outputs, images=images, gamma=gamma)
            both = torch.zeros(2, resnet.num_classes)
            yield (
                "average.onnx",
                graph(values.average, ["logits"], class_logits=both, resnet_logits=both.clone()),
            )
    yield "stem.onnx", graph(stem, ["x"], images=images)
    x = stem(images)
    for index, block in enumerate(resnet.flat_blocks()):
        yield f"block_{index:03}.onnx", graph(block, ["y"], x=x)
        if _changes_shape(block):
            yield f"shortcut_{index:03}.onnx", graph(block.shortcut, ["y"], x=x)
        x = block.shortcut(x)
    yield "head.onnx", graph(head, ["logits"], x=x)
    masked = _Masked(policy, stem, head)
    decided = {} if values is None else {"gamma": gamma}
    yield "masked.onnx", graph(masked, ["logits", "actions"], images=images, **decided)
