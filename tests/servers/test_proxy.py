"""MLflow's server with passwords, behind nginx with TLS and a certificate that nobody has signed."""

import base64
import sys
from collections.abc import Iterator
from pathlib import Path

import experiment_files
import mlflow
import pytest
import servers
import urllib3
from builders import enter_project
from mlflow import MlflowClient

from pipeline.tracking import dvc_results, experiment_runs, runs
from pipeline.tracking.runs import stage_run
from pipeline.tracking.units import readable
from tools import sync

pytestmark = pytest.mark.slow
HOST = "mlflow.example.org"
LOCATION = "proxy_pass {address}; proxy_set_header Host $host;"
LARGE = 3 * 2**20  # bytes, more than the one MiB that nginx takes unless it is told otherwise
AWAY = "MLflow can't be reached"
PASSWORD = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("proxy")


@pytest.fixture(scope="module")
def server(home) -> Iterator[servers.Server]:
    pytest.importorskip("flask_wtf", reason="mlflow[auth], of the group servers")
    installed = Path(mlflow.__file__).parent / "server/auth/basic_auth.ini"
    options = (
        "--app-name", "basic-auth", "--workers", "1", "--allowed-hosts", f"{HOST},localhost",
        "--cors-allowed-origins", f"https://{HOST}",
        "--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "./artifacts",
    )  # fmt: skip
    (home / "basic_auth.ini").write_text(f"{installed.read_text()}\nauth_cache_ttl_seconds = 60\n")
    variables = {
        "MLFLOW_AUTH_CONFIG_PATH": str(home / "basic_auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "long and random",
        "MLFLOW_AUTH_ADMIN_PASSWORD": servers.PASSWORD,
    }
    with servers.mlflow(home, *options, env=variables) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(home, server) -> Iterator[servers.Server]:
    """With names that the server allows, and with 127.0.0.1, which it does not."""
    servers.make_certificate(home, f"DNS:{HOST}", "DNS:localhost", "IP:127.0.0.1")
    location = LOCATION.format(address=server.address) + " client_max_body_size 0;"
    with servers.nginx(home, location) as proxy:
        yield proxy


@pytest.fixture
def login(home, proxy, tmp_path, monkeypatch) -> str:
    """The environment of someone who logs to the server by the proxy; its address."""
    enter_project(tmp_path, monkeypatch)
    monkeypatch.setattr(runs, "TIMEOUT", 100.0)  # the machine may be busy
    address = f"https://localhost:{proxy.port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", servers.PASSWORD)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(home / "cert.pem"))
    return address


def train(capsys) -> str:
    """What a stage says whose server can't be used; it trains nevertheless."""
    epochs = []
    with stage_run("pretrain", {"gamma": 2}) as run:
        for epoch in (1, 2):
            run.log_metrics({"loss": 1 / epoch}, step=epoch)
            epochs.append(epoch)
    assert epochs == [1, 2]
    message = capsys.readouterr().err
    assert message.count("\n") == message.count(AWAY) == 1
    return message


def test_runs_model_and_large_files_pass_the_proxy(login, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(bytes(LARGE))
    with stage_run("pretrain", {"gamma": 7}) as run:
        run.log_metrics({"loss": 0.5}, step=1)
        run.log_artifact(large)
    client = MlflowClient(login)
    assert client.get_run(run.run_id).data.metrics == {"loss": 0.5}
    (logged,) = client.list_artifacts(run.run_id)
    assert (logged.path, logged.file_size) == ("large", LARGE)
    files = dvc_results.work_tree(str(experiment_files.write(tmp_path)))
    record = dvc_results.read(files, name="proxied", baseline="abc", revision="r1")
    parent = client.get_run(experiment_runs.complete(record, finish=True))
    assert parent.data.metrics.items() >= readable(record.metrics).items()
    assert len(parent.outputs.model_outputs) == 1
    picture = client.download_artifacts(parent.info.run_id, "report/policy.png", str(tmp_path))
    assert Path(picture).read_bytes() == experiment_files.PNG


def test_proxy_that_limits_the_size_has_its_remedy(server, home, login, capsys, monkeypatch):
    large = Path("large")
    large.write_bytes(bytes(LARGE))
    with servers.nginx(home, LOCATION.format(address=server.address)) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://localhost:{proxy.port}")
        with stage_run("pretrain", {"gamma": 8}) as run:
            run.log_artifact(large)
    message = capsys.readouterr().err
    assert message.count("\n") == message.count(AWAY) == 1
    assert "client_max_body_size" in message


def test_wrong_password_is_said_in_a_line_and_the_training_goes_on(login, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another one")
    message = train(capsys)
    assert PASSWORD in message
    assert "another one" not in message
    monkeypatch.setattr(sys, "argv", ["sync"])
    with pytest.raises(SystemExit):
        sync.main()
    message = capsys.readouterr().err
    assert message.startswith("error:")
    assert PASSWORD in message


def test_certificate_that_nobody_signed_has_its_remedy(login, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in train(capsys)


def test_host_that_is_not_allowed_is_said(proxy, login, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://127.0.0.1:{proxy.port}")
    assert "--allowed-hosts" in train(capsys)


@pytest.mark.parametrize(
    ("host", "password", "status"),
    [(HOST, servers.PASSWORD, 200), ("localhost", servers.PASSWORD, 200), (HOST, "x", 401),
     (HOST, "", 401), ("other.example.org", servers.PASSWORD, 403),
     ("127.0.0.1", servers.PASSWORD, 403)],
)  # fmt: skip
def test_only_named_hosts_and_users_get_an_answer(home, proxy, host, password, status):
    token = base64.b64encode(f"admin:{password}".encode()).decode()
    headers = {"Host": host} | ({"Authorization": f"Basic {token}"} if password else {})
    assert ask(home, proxy, "GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", headers) == status


@pytest.mark.parametrize(("origin", "status"), [(HOST, 200), ("other.example.org", 403)])
def test_page_of_another_origin_gets_no_answer(home, proxy, origin, status):
    """MLflow's own pages name their origin too, so a server behind a proxy must know it."""
    token = base64.b64encode(f"admin:{servers.PASSWORD}".encode()).decode()
    headers = {"Host": HOST, "Authorization": f"Basic {token}", "Origin": f"https://{origin}"}
    headers |= {"Content-Type": "application/json"}
    path = "/ajax-api/2.0/mlflow/runs/search"
    assert ask(home, proxy, "POST", path, headers, body='{"experiment_ids": ["0"]}') == status


def ask(home: Path, proxy: servers.Server, method: str, path: str, headers: dict, **options) -> int:
    """The status that a browser gets, which finds the host by its DNS."""
    pool = urllib3.HTTPSConnectionPool(
        "127.0.0.1", proxy.port, ca_certs=str(home / "cert.pem"), server_hostname=HOST,
        assert_hostname=HOST,
    )  # fmt: skip
    with pool:
        return pool.request(method, path, headers=headers, **options).status
