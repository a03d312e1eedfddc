"""The pictures in docs/: MLflow's pages, the report and the demo in headless Chromium, and figures.

`python -m research.screenshots` after `make sync`. It needs pyproject.toml's dependency group `docs`
(`pip install playwright`), a Chromium (`apt-get install chromium` or `playwright install chromium`), and
a sweep to compare: `dvc exp run --queue -S 'gamma=1,2,5,10'`, `dvc queue start -j 2`.
"""

import argparse
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.infra.errors import UserError
from pipeline.infra.resume import project_root
from pipeline.models import checkpoint
from pipeline.serving.demo import Demo, make_server
from pipeline.tracking import overview
from pipeline.tracking.store import HOST, LEAN, shown_uri, store_uri
from tools.command import Parser, command
from tools.demo import MODEL, SAMPLES

WIDTH = 1500
SETTLING = 3000  # milliseconds that a page takes to redraw
START = 120  # seconds that the server and each page may take
PAGES = {"all runs": "ui_runs", "this experiment": "ui_experiment", "its gammas compared": "ui_gammas"}
# MLflow opens its Assistant beside the first page that a browser asks for
NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
NO_BUTTON = "[data-assistant-ui] { display: none !important }"  # nor the button that opens it
# of the report and the demo: width in pixels and colours
VIEWS = {"": (1400, "light"), "_narrow": (400, "dark")}
HEIGHT = 1000
SHOWN = "bird"  # a sample that takes blocks
FIGURES = ("policy", "policies_by_class", "easy_and_hard", "trade_off", "learning_curves")


@contextmanager
def server() -> Iterator[str]:
    """The UI on a free port of this machine; yields its address."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    start = ["mlflow", "ui", "--backend-store-uri", store_uri(), "--host", HOST, "--port", str(port)]
    process = subprocess.Popen(
        [*start, "--workers", "1"],
        cwd=project_root(),
        env=LEAN | os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://{HOST}:{port}"
    try:
        wait_for(address, process)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"the MLflow UI does not answer; try `mlflow ui --backend-store-uri {shown_uri()}`")


@contextmanager
def browser() -> Iterator[Any]:
    """Playwright's context of a headless Chromium, whose pages show no Assistant.

    Raises:
        UserError: Playwright is not installed.
    """
    try:
        from playwright.sync_api import sync_playwright  # in the dependency group docs alone
    except ImportError:
        raise UserError("Playwright is not installed; `pip install playwright` brings it") from None
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        context = chromium.new_context(viewport={"width": WIDTH, "height": 1000})
        context.set_default_timeout(1000 * START)
        context.add_init_script(NO_ASSISTANT)
        yield context
        chromium.close()


def photograph(links: Mapping[str, str], name: str, out: Path) -> None:
    """Save all pages, each once it shows the experiment's name.

    The comparison adds MFLOPs and blocks, and lists only what differs.
    """
    with browser() as context:
        for title, link in links.items():
            compares = PAGES[title] == "ui_gammas"
            page = context.new_page()
            if compares:
                page.set_viewport_size({"width": WIDTH, "height": 1500})
            page.goto(link)
            page.add_style_tag(content=NO_BUTTON)
            page.get_by_text(name).locator("visible=true").first.wait_for()
            page.wait_for_timeout(SETTLING)
            if compares:
                metrics = page.get_by_role("combobox").nth(1)
                metrics.focus()  # before, nothing can be written there
                for metric in ("mflops_mean", "blocks_mean"):
                    metrics.fill(metric)
                    metrics.press("Enter")
                    metrics.press("Escape")
                for switch in page.get_by_role("switch").all():  # "show differences only"
                    switch.click()
                page.get_by_role("heading").first.scroll_into_view_if_needed()
            page.wait_for_timeout(SETTLING)
            page.screenshot(path=out / f"{PAGES[title]}.png")
            print(f"{title}: {out / PAGES[title]}.png")
            page.close()


def photograph_own(report: Path, out: Path) -> None:
    """Save the first screen of the report, and the demo page, wide and narrow."""
    demo = Demo(checkpoint.load(Path(MODEL)), SAMPLES)
    with browser() as context, make_server(demo, HOST, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        addresses = {
            "report": (report.resolve().as_uri(), "h1"),
            "demo": (f"http://{HOST}:{server.server_port}", "#result:not([hidden])"),
        }
        for name, (address, shown) in addresses.items():
            for suffix, (width, colours) in VIEWS.items():
                page = context.new_page()
                page.set_viewport_size({"width": width, "height": HEIGHT})
                page.emulate_media(color_scheme=colours)
                page.goto(address)
                page.wait_for_selector(shown)
                if name == "demo":
                    page.get_by_alt_text(SHOWN).click()
                    page.wait_for_selector("#blocks b.kept")
                page.screenshot(path=out / f"{name}{suffix}.png")
                page.close()
        server.shutdown()
    print(f"report and demo: {out}")


def add_options(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--like", metavar="NAME", help="the experiment to open (the newest)")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Write PNG files into a folder."""
    experiment_id, experiments = overview.experiments()
    named = [experiment for experiment in experiments if arguments.like in (None, experiment.name)]
    if not named:
        raise UserError("no such experiment has finished; `make repro`, then `make sync`")
    arguments.out.mkdir(exist_ok=True)
    with server() as address:
        links = overview.links(experiment_id, experiments, named[0].run_id, address=address)
        photograph(links, named[0].name, arguments.out)
    photograph_own(Path("report/report.html"), arguments.out)
    for name in FIGURES:
        shutil.copyfile(Path("report") / f"{name}.png", arguments.out / f"{name}.png")
    print(f"figures of report/: {arguments.out}")


if __name__ == "__main__":
    main()
