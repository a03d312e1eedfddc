"""Open the MLflow UI on this machine alone: `make ui`. Everything that DVC knows is logged first."""

import argparse
import contextlib
import subprocess

from pipeline.resume import project_root
from pipeline.tracking import overview
from pipeline.tracking.store import HOST, PORT, store_uri
from tools.sync import sync, usable_store


def main() -> None:
    """Print the links that show the runs, then serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=PORT)
    port = parser.parse_args().port
    uri = store_uri()
    with usable_store():
        own = sync(project_root()) or ""
        if uri.startswith("http"):
            overview.say(own)
            return
        overview.say(own, address=f"http://{HOST}:{port}")
    command = ["mlflow", "ui", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(command, check=True, cwd=project_root())


if __name__ == "__main__":
    main()
