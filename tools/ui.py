"""Open the MLflow UI on this machine alone: `make ui`."""

import argparse
import os
import subprocess

from mlflow import MlflowClient

from pipeline.resume import project_root
from pipeline.tracking import EXPERIMENT, store_uri

HOST = "127.0.0.1"


def main() -> None:
    """Print the link that shows the runs, then serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=5000)
    port = parser.parse_args().port
    uri = store_uri()
    experiment = MlflowClient(tracking_uri=uri).get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        raise SystemExit("error: nothing was logged yet; run `make repro` first")
    # MLflow 3.17 opens experiments in its GenAI view, where training runs are out of sight
    page = f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    print(f"runs: http://{HOST}:{port}/{page}", flush=True)
    command = ["mlflow", "ui", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
    try:
        subprocess.run(command, check=True, cwd=project_root(), env=os.environ)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
