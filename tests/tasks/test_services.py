import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from tasks import services
from tasks.services import ServiceError, check, find_services, without_password


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server on loopback that answers everything with one status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_nothing_running_means_nothing_to_check() -> None:
    assert find_services({}) == {}
    assert find_services({"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}) == {}


def test_servers_are_found_by_the_tools_own_variables() -> None:
    found = find_services(
        {
            "MLFLOW_TRACKING_URI": "http://tracking:5000/",
            "AWS_ENDPOINT_URL": "http://other",
            "AWS_ENDPOINT_URL_S3": "http://store:8333",
        }
    )
    assert found == {"MLflow": "http://tracking:5000/health", "S3": "http://store:8333"}


@pytest.mark.parametrize("kind", ["postgresql", "postgresql+psycopg", "mysql+pymysql"])
def test_database_is_asked_whether_it_listens(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{kind}://mlflow:hun/ter2@127.0.0.1:{server.getsockname()[1]}/mlflow"
        assert find_services({"MLFLOW_TRACKING_URI": address}) == {"MLflow": address}
        check("MLflow", address)
    with pytest.raises(ServiceError, match=r"MLflow does not answer at 127.0.0.1:\d+: ") as refused:
        check("MLflow", address)
    assert "hun" not in str(refused.value)


@pytest.mark.parametrize("address", ["mysql:///db", "mysql://me@h:port/db", "file:///runs", "x://"])
def test_what_names_no_host_is_no_server(address: str) -> None:
    assert find_services({"MLFLOW_TRACKING_URI": address}) == {}


@pytest.mark.parametrize("status", [200, 403, 404])
def test_server_that_answers_will_do(status: int) -> None:
    with answering(status) as url:
        check("S3", url)


def test_server_in_trouble_is_named() -> None:
    with answering(503) as url, pytest.raises(ServiceError, match=f"MLflow at {url}.* 503"):
        check("MLflow", f"{url}/health")


def test_server_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ServiceError, match=f"S3 does not answer at {url}"):
        check("S3", url)


def test_server_that_accepts_and_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ServiceError, match="timed out"):
            check("MLflow", url)


@pytest.mark.parametrize("url", ["http://user:secret@127.0.0.1:1", "http://user:secret@[::"])
def test_password_in_an_address_is_not_shown(url: str) -> None:
    with pytest.raises(ServiceError) as refused:
        check("MLflow", url)
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(refused.value.__cause__)


@pytest.mark.parametrize("url", ["http://a..b:5000", "http://[::", f"http://{'a' * 64}.org"])
def test_an_address_that_is_none_is_said(url: str) -> None:
    with pytest.raises(ServiceError, match=r"^Prefect is set to an address that is none$"):
        check("Prefect", url)


@pytest.mark.parametrize("password", ["hunter2", "hun/ter2", "hun@ter2", "h:u@n/t@er2"])
def test_no_text_has_the_password_of_the_tracking_address(
    password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"postgresql://mlflow:{password}@db:5432/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert without_password(f"no {address}!") == "no postgresql://db:5432/mlflow!"
    assert (
        without_password("S3 at http://me:it@store:1/a and b@c") == "S3 at http://store:1/a and b@c"
    )
    address = f"postgresql://db/mlflow?user=mlflow&password={password}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert without_password(f"no {address}!") == "no postgresql://db/mlflow!"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////home/me@work/mlflow.db")
    assert without_password("at sqlite:////home/me@work/mlflow.db") == (
        "at sqlite:////home/me@work/mlflow.db"
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert without_password("http://me:it@store:1 or http://db") == "http://store:1 or http://db"
