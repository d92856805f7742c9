import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tasks import services
from tasks.services import ServiceError, check, find_services, without_password


@contextmanager
def answering(
    status: int, context: ssl.SSLContext | None = None, heard: list[str | None] | None = None
) -> Iterator[str]:
    """A server on loopback that answers everything with one status, and notes the logins."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if heard is not None:
                heard.append(self.headers["Authorization"])
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
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


@pytest.mark.parametrize("address", ["mysql:///db", "profile://of:a", "file:///runs", "x://"])
def test_what_names_no_host_is_no_server(address: str) -> None:
    assert find_services({"MLFLOW_TRACKING_URI": address}) == {}


@pytest.mark.parametrize("port", ["", "port", "cr:et@127.0.0.1:1"])
def test_database_whose_port_is_no_number_is_said_without_it(port: str) -> None:
    address = f"postgresql+psycopg://me:se@h:{port}/db"
    with pytest.raises(ServiceError, match=r"^MLflow is set to an address that is none$"):
        find_services({"MLFLOW_TRACKING_URI": address})


@pytest.mark.parametrize("name", services.S3_KEYS)
def test_key_with_the_end_of_a_line_is_refused_and_not_repeated(name: str) -> None:
    """Sent as it is, it would come back in an error of the client, and so into the log."""
    with pytest.raises(ServiceError, match=f"^{name} has white space at an end") as refused:
        find_services({name: "hush\n"})
    assert "hush" not in str(refused.value)


def test_proxy_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "foo://x")
    with pytest.raises(ServiceError, match=r"MLflow does not answer at http://tracking:1: .*foo"):
        check("MLflow", "http://tracking:1")


@pytest.mark.parametrize("status", [200, 403, 404])
def test_server_that_answers_will_do(status: int) -> None:
    with answering(status) as url:
        check("S3", url)


def test_whose_certificate_it_is_is_left_to_the_clients(tmp_path: Path) -> None:
    """MLflow and boto3 have variables of their own for whom to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    ).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    kept = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    both = tmp_path / "key and certificate"
    both.write_bytes(key.private_bytes(pem, *kept) + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    with answering(200, context) as url:
        check("MLflow", url.replace("http:", "https:"))


def test_login_is_not_sent_to_whoever_answers() -> None:
    heard: list[str | None] = []
    with answering(200, heard=heard) as url:
        check("S3", url.replace("//", "//me:secret@"))
    assert heard == [None]


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


@pytest.mark.parametrize("password", ["hunter2", "hun/ter2", "hun@ter2", "h:u@n/t@er2", "hun?ter2"])
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
