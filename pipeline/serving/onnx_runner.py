"""Run an exported BlockDrop model without PyTorch: `python runner.py cat.png dog.png`.

Takes numpy, onnxruntime and, for image files, pillow. From Python: `BlockDrop(folder)(images)`.
Shapes: B images of H by W pixels, K blocks, N classes.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class BlockDrop:
    """The networks of a folder; a block runs only on the images that keep it."""

    def __init__(self, folder: Path, threads: int = 0) -> None:  # 0: one for each core
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.manifest = json.loads((Path(folder) / "manifest.json").read_text())
        self.graphs = {
            path.stem: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in Path(folder).glob("*.onnx")
            if path.stem != "masked"  # the whole in one graph, for engines that have no use for parts
        }

    def run(self, name: str, *inputs: Any) -> list[Any]:
        """The outputs of a graph of the folder."""
        names = [value.name for value in self.graphs[name].get_inputs()]
        return self.graphs[name].run(None, dict(zip(names, inputs, strict=True)))

    def __call__(self, images: Any, gamma: float | None = None) -> tuple[Any, Any]:
        """Logits [B, N] and actions [B, K] bool of images [B, H, W, 3] uint8.

        Args:
            gamma: in place of the trained one, for a model whose manifest has a gamma.
        """
        manifest, answer, rows = self.manifest, None, np.arange(len(images))
        actions = np.ones((len(images), manifest["blocks"]), dtype=bool)
        if manifest["gamma"] is not None:
            gamma = manifest["gamma"] if gamma is None else gamma
            actions, answer, class_logits = self.run("policy", images, np.asarray(gamma, np.float32))
        elif manifest["policy"]:
            (actions,) = self.run("policy", images)
        if manifest["answers"]:  # without a block the policy network's own answer stands
            rows = np.flatnonzero(actions.any(axis=1))
            if len(rows) == 0:
                return answer, actions
        (x,) = self.run("stem", images[rows])
        for k, keep in enumerate(actions[rows].T):
            y = self.run(f"shortcut_{k:03}", x)[0] if k in manifest["shortcuts"] else x.copy()
            if keep.any():
                (y[keep],) = self.run(f"block_{k:03}", x[keep])
            x = y
        (logits,) = self.run("head", x)
        if answer is not None:
            (answer[rows],) = self.run("average", class_logits[rows], logits)
            logits = answer
        return logits, actions


def main(paths: Sequence[str]) -> None:
    """Print the class of each image file, and a `#` for every block that ran."""
    from PIL import Image, ImageOps

    model = BlockDrop(Path(__file__).parent)
    size = (model.manifest["image_size"],) * 2
    upright = (ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths)
    squares = [np.asarray(ImageOps.fit(image, size, Image.Resampling.BILINEAR)) for image in upright]
    for path, logits, kept in zip(paths, *model(np.stack(squares)), strict=True):
        blocks = "".join(".#"[int(keep)] for keep in kept)
        print(path, model.manifest["classes"][logits.argmax()], blocks)


if __name__ == "__main__":
    main(sys.argv[1:])
