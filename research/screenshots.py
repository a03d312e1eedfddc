"""The README's pictures: pages of the MLflow UI in headless Chromium, and the report's figures.

`python -m tools.screenshots` after `make sync`. It takes Debian's package `chromium`, and a sweep to
compare: `dvc exp run --queue -S 'gamma=1,2,5,10'`, `dvc queue start -j 2`.
"""

import asyncio
import base64
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from pipeline.infra.resume import project_root
from pipeline.tracking import overview
from pipeline.tracking.store import HOST, shown_uri, store_uri
from tools.command import Parser, mendable

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
WIDTH = 1500
LOADING, SETTLING = 12.0, 3.0  # seconds that a page takes to load, and to redraw
DIFFERENCES_ONLY = "document.querySelectorAll('button[role=switch]').forEach(s => s.click())"
START = 120  # seconds that the server may take
PAGES = {"all runs": "ui_runs", "this experiment": "ui_experiment", "its gammas compared": "ui_gammas"}
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
        f"error: the MLflow UI does not answer; try `mlflow ui --backend-store-uri {shown_uri()}`"
    )


class Page:
    """A page in headless Chromium, driven by the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.sent = 0

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        """Have the browser do something and give its answer."""
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": params})
        async for message in self.socket:
            answer = message.json()
            if answer.get("id") == self.sent:
                return answer.get("result", {})
        raise RuntimeError(f"Chromium closed the connection at {method}")

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return found.get("result", {}).get("value")

    async def open(self, link: str, *, height: int) -> None:
        """Load a page and give its requests time."""
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await self.call("Page.navigate", url="about:blank")  # else only the part behind # changes
        await self.call("Page.navigate", url=link)
        await asyncio.sleep(LOADING)

    async def choose(self, box: int, text: str) -> None:
        """Add a choice to one of the page's selections."""
        spot = await self.run(
            f"(() => {{ const r = document.querySelectorAll('input[role=combobox]')[{box}]"
            ".getBoundingClientRect(); return [r.x + 5, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": spot[0], "y": spot[1], "button": "left", "clickCount": 1}
            await self.call("Input.dispatchMouseEvent", type=kind, **where)
        await self.call("Input.insertText", text=text)
        await asyncio.sleep(1)
        for key in ("Enter", "Escape"):
            code = {"Enter": 13, "Escape": 27}[key]
            for kind in ("rawKeyDown", "keyUp"):
                await self.call(
                    "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
                )

    async def photograph(self, path: Path) -> None:
        """The page as a PNG."""
        await asyncio.sleep(SETTLING)
        found = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@asynccontextmanager
async def browser(program: str) -> AsyncIterator[Page]:
    """A fresh Chromium with one page."""
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *QUIET, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _debugging_port(Path(profile) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{HOST}:{port}/json/list") as answer:
                    (target,) = [t for t in await answer.json() if t["type"] == "page"]
                address = target["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            process.terminate()
            process.wait(timeout=30)


async def _debugging_port(file: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and file.read_text().strip():
            return file.read_text().splitlines()[0]
        await asyncio.sleep(0.2)
    raise SystemExit("error: Chromium does not start; try it by hand: chromium --headless")


async def photograph(program: str, links: Mapping[str, str], out: Path) -> None:
    """All pages; in the comparison FLOPs are added, and only what differs is listed."""
    async with browser(program) as page:
        for said, link in links.items():
            compared = PAGES[said] == "ui_gammas"
            await page.open(link, height=1500 if compared else 1000)
            if compared:
                for metric in ("flops_mean", "blocks_mean"):
                    await page.choose(1, metric)
                await page.run(
                    "document.querySelectorAll('button[role=switch]').forEach(s => s.click())"
                )
            path = out / f"{PAGES[said]}.png"
            await page.photograph(path)
            print(f"{said}: {path}")


@mendable()
def main() -> None:
    """Write PNG files into a folder."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--like", metavar="NAME", help="the experiment to open (the newest)")
    arguments = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit("error: no Chromium here; `apt-get install chromium` brings it")
    experiment_id, found = overview.experiments()
    named = [experiment for experiment in found if arguments.like in (None, experiment.name)]
    if not named:
        sys.exit("error: no such experiment has finished; `make repro`, then `make sync`")
    arguments.out.mkdir(exist_ok=True)
    with server() as address:
        links = overview.links(experiment_id, found, named[0].run_id, address=address)
        asyncio.run(photograph(program, links, arguments.out))
    for name in FIGURES:
        shutil.copyfile(Path("report") / f"{name}.png", arguments.out / f"{name}.png")
    print(f"figures of report/: {arguments.out}")


if __name__ == "__main__":
    main()
