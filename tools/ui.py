"""Open the MLflow UI on this machine alone: `make ui`."""

import argparse
import contextlib
import subprocess

from pipeline.resume import project_root
from pipeline.tracking.runs import experiment_id, store_uri

HOST = "127.0.0.1"


def main() -> None:
    """Print the link that shows the runs, then serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=5000)
    port = parser.parse_args().port
    uri = store_uri()
    if uri.startswith("http"):
        raise SystemExit(f"MLFLOW_TRACKING_URI names a server: open {uri} in a browser")
    # MLflow 3.17 opens experiments in its GenAI view, where training runs are out of sight
    page = f"#/experiments/{experiment_id()}/runs?workflowType=machine_learning"
    print(f"runs: http://{HOST}:{port}/{page}", flush=True)
    command = ["mlflow", "ui", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(command, check=True, cwd=project_root())


if __name__ == "__main__":
    main()
