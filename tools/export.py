"""Write a trained model as ONNX graphs that run without PyTorch: `python -m tools.export`.

The folder holds the policy network, stem, blocks and head one by one, the whole as one graph, a
manifest, and runner.py: `python export/runner.py cat.png` takes numpy, onnxruntime and pillow.
docs/export.md explains it.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from pipeline.models import checkpoint
from pipeline.serving.onnx_export import RUNNER, export
from tools.command import Parser, command
from tools.predict import MODEL, folder_of


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=MODEL,
        help=f"as of tools.predict: a folder ({MODEL}), or models:/...",
    )
    parser.add_argument("--to", type=Path, default=Path("export"), help="a new folder (export)")
    parser.add_argument("--image-size", type=int, help="for a checkpoint that does not say it")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    with folder_of(arguments.model) as folder, tqdm(desc="export", unit="graph", disable=None) as bar:
        export(
            checkpoint.load(folder),
            arguments.to,
            image_size=arguments.image_size,
            tick=lambda name: bar.update(),
        )
    megabytes = sum(path.stat().st_size for path in arguments.to.iterdir()) / 1e6
    print(f"export: {arguments.to}, {megabytes:.1f} MB; python {arguments.to / RUNNER} IMAGE... runs it")


if __name__ == "__main__":
    main()
