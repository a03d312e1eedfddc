"""Open the MLflow UI, on this machine alone: `make ui`. Everything that DVC knows is logged first."""

import argparse
import contextlib
import os
import socket
import subprocess

from pipeline.infra.errors import UserError
from pipeline.infra.resume import project_root
from pipeline.tracking import overview
from pipeline.tracking.store import HOST, LEAN, PORT, store_uri
from tools.command import Parser, command
from tools.sync import sync, usable_store


def require_free(host: str, port: int) -> None:
    """Check before the sync that the UI can be served there.

    Raises:
        UserError: the port is taken, or the host is none of this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the UI can't be served on {host}, port {port} ({reason}); is it served already? else "
            "`make ui PORT=5051` takes another port, `--host` another address"
        ) from None


def add_options(parser: Parser) -> None:
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument(
        "--host",
        default=HOST,
        help=f"address to listen on ({HOST}: this machine alone); there is no password, so see "
        "docs/tracking.md before you name another",
    )


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Print the links that show the runs, then serve until Ctrl-C."""
    uri = store_uri()
    served_elsewhere = uri.startswith("http")
    if not served_elsewhere:
        require_free(arguments.host, arguments.port)
    with usable_store():
        run_id = sync(project_root()).run_id
        address = None if served_elsewhere else f"http://{arguments.host}:{arguments.port}"
        overview.say(run_id, address=address)
    if served_elsewhere:
        return
    server = ["mlflow", "ui", "--host", arguments.host, "--port", str(arguments.port)]
    server += [
        "--uvicorn-opts",
        "--log-level=warning",
    ]  # else a line for each request
    environment = LEAN | os.environ | {"MLFLOW_BACKEND_STORE_URI": uri}  # maybe a password: not for `ps`
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(server, check=True, cwd=project_root(), env=environment)


if __name__ == "__main__":
    main()
