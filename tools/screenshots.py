"""The README's pictures: pages of the MLflow UI in headless Chromium, and the report's figures.

`python -m tools.screenshots` after `make sync`. It takes Debian's package `chromium`, and a sweep to
compare: `dvc exp run --queue -S 'gamma=1,2,5,10'`, `dvc queue start -j 2`.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.resume import project_root
from pipeline.tracking import overview
from pipeline.tracking.store import HOST, store_uri

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
WAIT = 25_000  # milliseconds of the page's own time, in which it loads
START = 120  # seconds that the server may take
PAGES = {"all runs": "ui_runs", "this experiment": "ui_experiment", "its gammas compared": "ui_gammas"}
TALL_PAGES = ("its gammas compared", "this experiment")
TALL = 2000  # pixels: the tables under a comparison's plot are what tells
FIGURES = ("policy", "policies_by_class", "easy_and_hard", "trade_off", "learning_curves")


@contextmanager
def server() -> Iterator[str]:
    """The UI on a free port of this machine; its address."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = ["mlflow", "ui", "--backend-store-uri", store_uri(), "--host", HOST, "--port", str(port)]
    process = subprocess.Popen(command, cwd=project_root(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    address = f"http://{HOST}:{port}"
    try:
        _wait_for(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(
        f"error: the MLflow UI does not answer; try `mlflow ui --backend-store-uri {store_uri()}`"
    )


def photograph(browser: str, link: str, path: Path, *, width: int = 1600, height: int = 1000) -> None:
    """A page as a PNG."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}",
                   f"--virtual-time-budget={WAIT}", f"--screenshot={path}", link]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=180)


def main() -> None:
    """Write PNG files into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--like", metavar="NAME", help="the experiment to open (the newest)")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("error: no Chromium here; `apt-get install chromium` brings it")
    experiment_id, found = overview.experiments()
    named = [experiment for experiment in found if arguments.like in (None, experiment.name)]
    if not named:
        sys.exit("error: no such experiment has finished; `make repro`, then `make sync`")
    arguments.out.mkdir(exist_ok=True)
    with server() as address:
        for said, link in overview.links(experiment_id, found, named[0].run_id, address=address).items():
            path = arguments.out / f"{PAGES[said]}.png"
            photograph(browser, link, path, height=TALL if said in TALL_PAGES else 1000)
            print(f"{said}: {path}")
    for name in FIGURES:
        shutil.copyfile(Path("report") / f"{name}.png", arguments.out / f"{name}.png")
    print(f"figures of report/: {arguments.out}")


if __name__ == "__main__":
    main()
