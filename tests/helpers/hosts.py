"""Two hosts on one machine: network namespaces joined by a virtual cable, each with a folder of its own.

They share neither a loopback nor files; what one sends to the other goes through the cable, which can
be cut. Nothing is changed outside the namespaces, which end with their last process.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from sandbox import environment

TOOLS = ("ip", "unshare", "nsenter")
INTERFACE = "cable"
PORT = 29500
# a system repeats for 6 seconds what nobody acknowledges; by default (15) for a quarter of an hour
REPEAT = ("sh", "-c", "echo 4 > /proc/sys/net/ipv4/tcp_retries2")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A network namespace, which lasts as long as the process `holder`."""

    rank: int
    holder: subprocess.Popen
    folder: Path

    @property
    def address(self) -> str:
        return f"10.77.0.{self.rank + 1}"

    def command(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self.holder.pid), "--net", "--", *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.command(*command), check=False, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def torchrun(
        self, *program: str, master: "Host", variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """Start this host's part of a training, by the command of docs/distributed.md."""
        command = self.command(
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
            "--node-rank", str(self.rank), "--nproc-per-node", "1",
            "--master-addr", master.address, "--master-port", str(PORT), *program,
        )  # fmt: skip
        return subprocess.Popen(
            command, cwd=self.folder, env=environment() | (variables or {}), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Those that are on this host, without the holder."""
        namespace = _namespace(self.holder.pid)
        others = (p for p in psutil.process_iter() if p.pid != self.holder.pid)
        return [process for process in others if _namespace(process.pid) == namespace]

    def kill(self) -> None:
        """SIGKILL to every process on this host; the system closes their connections."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def cut_cable(self) -> None:
        """From now on nothing arrives, and neither end is told."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def mend_cable(self) -> None:
        self.run("ip", "link", "set", INTERFACE, "up")


def why_impossible() -> str | None:
    """Why this machine can't be two hosts; None where it can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"there is no command {' and no '.join(missing)}"
    if os.geteuid() != 0:
        return "takes root to make network namespaces"
    for command in (["ip", "link", "add", "type", "veth"], REPEAT):
        tried = subprocess.run(
            ["unshare", "--net", *command], check=False, capture_output=True, text=True
        )
        if tried.returncode != 0:
            return f"no network namespaces here: {tried.stderr.strip()}"
    return None


@contextmanager
def two_hosts(folders: tuple[Path, Path]) -> Iterator[tuple[Host, Host]]:
    """Two hosts as long as the context lasts; then all their processes are killed."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for rank, folder in enumerate(folders):
            # it ends with its standard input: also when the tests themselves are killed
            holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
            hosts.append(Host(rank=rank, holder=holder, folder=folder))
            stack.callback(_end, hosts[-1])
            deadline = time.monotonic() + 10
            while _namespace(holder.pid) == _namespace(os.getpid()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        peer = str(hosts[1].holder.pid)
        hosts[0].run(*f"ip link add {INTERFACE} type veth peer name {INTERFACE} netns {peer}".split())
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                host.run("ip", "link", "set", interface, "up")
            host.run(*REPEAT)
        yield hosts[0], hosts[1]


def _end(host: Host) -> None:
    host.kill()
    host.holder.send_signal(signal.SIGKILL)
    host.holder.communicate()


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")  # noqa: PTH115 - no path
    except OSError:  # it has ended
        return None
