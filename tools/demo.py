"""Try the shipped CIFAR-10 model in a browser, on this machine and without training: `make demo`.

Drop an image, or take a sample: the page shows its class, which blocks ran, and FLOPs and milliseconds
beside the full network. A slider sets the budget.
"""

import argparse
import contextlib
from pathlib import Path

from pipeline.device import choose_device
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.serving.demo import Demo, make_server
from tools.command import Parser, command
from tools.predict import folder_of

MODEL = "pretrained/finetune"
SAMPLES = Path("pretrained/samples")  # CIFAR-10's; each is named by its class
HOST = "127.0.0.1"
PORT = 7860


def add_options(parser: Parser) -> None:
    parser.add_argument("--model", default=MODEL, help=f"as of tools.predict ({MODEL})")
    parser.add_argument(
        "--samples",
        type=Path,
        help=f"a folder of PNG files ({SAMPLES}, if it shows the model's classes)",
    )
    parser.add_argument(
        "--host", default=HOST, help=f"({HOST}: this machine alone; there is no password)"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"({PORT})")


def samples_of(model: Checkpoint) -> Path:
    """The shipped samples; a folder without any for a model of other classes."""
    shown = {path.stem for path in SAMPLES.glob("*.png")}
    return SAMPLES if shown <= set(model.classes) else SAMPLES / "none"


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    with folder_of(arguments.model) as folder:
        loaded = checkpoint.load(folder)
    for network in (loaded.resnet, loaded.policy_net):
        if network is not None:
            network.to(choose_device())
    demo = Demo(loaded, arguments.samples or samples_of(loaded))
    try:
        server = make_server(demo, arguments.host, arguments.port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the page can't be served on {arguments.host}, port {arguments.port} ({reason}); "
            "`make demo PORT=7861` takes another port"
        ) from None
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"demo: http://{arguments.host}:{server.server_port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
