import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from botocore.exceptions import NoCredentialsError
from httpx import ConnectError
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from prefect.testing.utilities import prefect_test_harness
from requests import RequestException

from flows import command_line
from flows.explanation import explain
from flows.train_gan import train_gan as train_gan_flow
from tasks.tracking import MODEL_NAME
from tests.deployments.local_stack import wait_for
from tests.flows.conftest import TINY, Command, end_in_the_middle
from tests.registry import register_two
from tests.tasks.test_services import answering


def refusal(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> str:
    """What the command says when it is refused; nothing may be left behind by it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train_gan", *options])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(train_gan_flow)
    assert not list(folder.iterdir())
    assert isinstance(stopped.value.code, str), "an exit status of 1, with a sentence"
    return stopped.value.code


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--epochs", "0"), "epochs: Input should be greater than or equal to 1"),
        (("--epochs", "many"), "epochs: Input should be a valid integer"),
        (("--recipe", "nope"), "recipe: Input should be 'quick', 'best' or 'vanilla'"),
        (("--batch-size", "60001"), "batch_size: Input should be less than or equal to 60000"),
        (("--batch-size", "1"), "batch_size: Input should be greater than or equal to 2"),
        (("--learning-rate", "nan"), "learning_rate: Input should be"),
        (("--learning-rate", "-1"), "learning_rate: Input should be greater than 0"),
        (("--seed", "-1"), "seed: Input should be greater than or equal to 0"),
        (("--device", "tpu"), "device: Input should be 'auto', 'cuda', 'mps' or 'cpu'"),
        (("--devices", "0"), "devices: Input should be greater than or equal to 1"),
        (("--num-samples", "10"), "num_samples: Input should be greater than or equal to 100"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(
    options: tuple[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = refusal(monkeypatch, tmp_path, *options)
    assert said.startswith(f"error: {sentence}")
    assert "\n" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = refusal(monkeypatch, tmp_path, "--device", "cuda")
    assert said == "error: device: device cuda is not on this machine; it has: cpu"


def test_several_faults_are_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = refusal(monkeypatch, tmp_path, "--epochs", "0", "--seed", "x")
    assert "epochs: " in said
    assert "seed: " in said


def test_prefect_server_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}/api"
    with temporary_settings({PREFECT_API_URL: nobody}):
        said = refusal(monkeypatch, tmp_path)
    assert said.startswith(f"error: Prefect does not answer at {nobody}/health: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("PREFECT_API_REQUEST_TIMEOUT", "abc", "request_timeout: Input should be a valid number"),
        ("PREFECT_LOGGING_LEVEL", "loud", "level: Input should be 'DEBUG', "),
        ("PREFECT_API_URL", "http://[::1", "Invalid IPv6 URL"),
    ],
)
def test_setting_that_prefect_refuses_is_said_in_a_sentence(
    variable: str, value: str, sentence: str, train_gan: Command, tmp_path: Path
) -> None:
    done = train_gan(tmp_path, *TINY, **{variable: value})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: Prefect refuses its settings, PREFECT_*: {sentence}")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"none", "[X509: NO_CERTIFICATE_OR_CRL_FOUND]")],
)
def test_certificates_that_cannot_be_read_are_said_in_a_sentence(
    content: bytes | None, reason: str, train_gan: Command, tmp_path: Path
) -> None:
    if content:
        (tmp_path / "ours.pem").write_bytes(content)
    done = train_gan(tmp_path, *TINY, SSL_CERT_FILE="ours.pem")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: SSL_CERT_FILE=ours.pem: {reason}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [("-m", "flows.train_gan"), ("-c", "from flows.gan_command import main; main()", "versions")],
    ids=["flow", "gan"],
)
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("prefect.toml", b"a = = 1", "Invalid value (at line 1, column 5)"),
        (".env", b"PREFECT_LOGGING_LEVEL=\xff", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_file_of_settings_that_is_broken_is_said_in_a_sentence(
    command: tuple[str, ...],
    name: str,
    content: bytes,
    said: str,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "mlflow.db").touch()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: a file of settings is broken: ")
    assert said in last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "said"), [(200, "Failed to reach API at "), (401, "Client error '401 Unauthorized'")]
)
def test_server_that_is_none_of_prefects_or_refuses_is_said_in_a_sentence(
    status: int, said: str, train_gan: Command, tmp_path: Path
) -> None:
    with answering(status) as url:
        done = train_gan(tmp_path, *TINY, PREFECT_API_URL=url)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: Prefect at {url}: {said}")
    assert last.endswith("; is that the address of its API, with /api?")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_run_by_hand_ends_where_it_is_cancelled_on_a_server(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """A deployed run has its worker for that."""
    options = ("--recipe", "vanilla", "--epochs", "10000")
    with (
        prefect_test_harness(server_startup_timeout=command_line.PATIENCE_S),
        get_client(sync_client=True) as client,
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "flows.train_gan", *options],
            cwd=tmp_path,
            env=environment | {"PREFECT_API_URL": str(client.api_url)},
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            wait_for(
                lambda: list(tmp_path.glob("runs/*/samples/epoch-0001.png")) or None,
                seconds=120,
                what=lambda: f"an epoch; {(tmp_path / 'log').read_text()}",
            )
            (run,) = client.read_flow_runs()
            client.set_flow_run_state(run.id, Cancelling())
            assert process.wait(60) != 0
        finally:
            process.kill()
        assert client.read_flow_run(run.id).state_name == "Cancelled"
    mlflow_client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (tracked,) = mlflow_client.search_runs(["1"])
    assert tracked.info.status == "KILLED"
    assert list(tmp_path.glob(f"runs/{run.id}/checkpoints/step-*"))
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_ctrl_c_while_it_imports_is_no_traceback(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "flows.train_gan"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as command:
        time.sleep(0.7)
        command.send_signal(signal.SIGINT)
        said, _ = command.communicate()
    assert command.returncode != 0
    assert said.strip() == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("flows.promote_generator", "--version", "2"),
        ("flows.publish_generator", "--publish-to", "s3://mirrors/models"),
        ("flows.sweep_gan", "--workers", "1"),
    ],
    ids=lambda command: command[0],
)
def test_signal_in_the_first_steps_of_a_flow_cancels_it(
    command: tuple[str, ...], environment: dict[str, str], tmp_path: Path
) -> None:
    """Publishing asks a store that does not answer; of a training, the chaos suite tells."""
    register_two(tmp_path)
    (tmp_path / "sweep.yaml").write_text("beta2: [0.9, 0.99]")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_store = {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        said = end_in_the_middle(
            command,
            environment | silent_store,
            tmp_path,
            signal.SIGTERM,
            lambda: list(tmp_path.glob("runs/*/.tmp")),
        )
    assert "Finished in state Cancelled" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/.tmp"))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert int(client.get_model_version_by_alias(MODEL_NAME, "champion").version) == 1
    assert not client.get_model_version(MODEL_NAME, "2").tags.get("promotion")


@pytest.mark.slow
def test_login_in_the_tracking_address_is_moved_where_nothing_repeats_it(tmp_path: Path) -> None:
    script = (
        "import os, flows\n"
        "print(*(os.environ.get(f'MLFLOW_TRACKING_{n}') for n in ('URI', 'USERNAME', 'PASSWORD')))"
    )
    for address, expected in {
        "https://me:hunter%402@host:1/a@b": "https://host:1/a@b me hunter@2",
        "http://host/a@b": "http://host/a@b None None",
        "postgresql://me:it@db/a": "postgresql://me:it@db/a None None",
        "": " None None",
    }.items():
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING_")}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=kept
            | {"MLFLOW_TRACKING_URI": address, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.rstrip("\n") == expected


@pytest.mark.parametrize(
    ("given", "spared"),
    [
        ({}, "127.0.0.1"),
        ({"NO_PROXY": ".corp"}, ".corp,127.0.0.1"),
        ({"NO_PROXY": ".large", "no_proxy": "localhost,.corp"}, "localhost,.corp,127.0.0.1"),
        ({"no_proxy": "127.0.0.1,.corp"}, "127.0.0.1,.corp"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_no_proxy_is_asked_for_what_runs_here(
    given: dict[str, str], spared: str, environment: dict[str, str], tmp_path: Path
) -> None:
    plain = {k: v for k, v in environment.items() if k.lower() != "no_proxy"}
    script = "import os, flows; print(os.environ['no_proxy'], os.environ['NO_PROXY'])"
    assert said_by(script, plain | given, tmp_path) == [spared] * 2


@pytest.mark.slow
def test_flow_without_a_server_runs_also_behind_a_proxy(
    environment: dict[str, str], tmp_path: Path
) -> None:
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "flows.reconcile_runs"],
        cwd=tmp_path,
        env={k: v for k, v in environment.items() if k.lower() != "no_proxy"} | proxies,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_mlflow_store_that_is_none_is_refused_in_a_sentence(
    train_gan: Command, tmp_path: Path
) -> None:
    done = train_gan(tmp_path, *TINY, MLFLOW_TRACKING_URI="nonsense://")
    assert done.returncode == 1
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "MLflow" in last
    assert "unsupported URI 'nonsense://'" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("said", ["", "no answer\nfrom it", "http://user:secret@there is none"])
def test_what_mlflow_refuses_names_its_store_and_no_password(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@store/?key=secret")
    sentence = explain(RequestException(said))
    assert sentence is not None
    assert sentence.startswith("MLflow at http://store/:")
    assert "secret" not in sentence
    assert "\n" not in sentence


def test_temporary_server_that_goes_away_is_not_said_to_have_an_odd_address() -> None:
    with temporary_settings({PREFECT_API_URL: None}):
        assert explain(ConnectError("refused")) == "Prefect at its temporary server: refused"


def test_what_a_store_of_mlflows_files_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking")
    assert explain(NoCredentialsError()) == (
        "MLflow at http://tracking: Unable to locate credentials"
    )


@pytest.mark.slow
def test_what_mlflow_cannot_do_with_its_variables_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql://me:it@db/mlflow")
    assert explain(ModuleNotFoundError("No module named 'MySQLdb'")) == (
        "No module named 'MySQLdb', which MLflow wants for mysql://: install it"
    )
    assert explain(ValueError("Failed to convert 'x' for MLFLOW_POOL: y")) is not None
    assert explain(ValueError("x")) is None


@pytest.mark.slow
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_memory_that_is_full_is_said_wherever_it_happens(error: Exception) -> None:
    assert (
        explain(error)
        == "the memory of this machine or of its GPU is full; free some, or ask for less"
    )


def test_temporary_server_that_takes_too_long_is_said_in_a_sentence(
    train_gan: Command, tmp_path: Path
) -> None:
    done = train_gan(tmp_path, *TINY, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="1")
    assert done.returncode == 1
    assert "error: Prefect's temporary server did not start in time" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def said_by(program: str, environment: dict[str, str], folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


SETTINGS = """
from flows import train_gan

from mlflow.environment_variables import (
    MLFLOW_DISABLE_TELEMETRY,
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
)
from prefect.settings import get_current_settings

settings = get_current_settings()
print(settings.server.analytics_enabled)
print(settings.flows.heartbeat_frequency)
print(MLFLOW_DISABLE_TELEMETRY.get())
print(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.get())
"""


@pytest.mark.parametrize(
    ("own", "expected", "spins"),
    [
        ({}, ["False", "30", "True", "False"], 1000),
        (
            {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60", "GOMP_SPINCOUNT": "5"},
            ["False", "60", "True", "False"],
            5,
        ),
    ],
    ids=["none", "own"],
)
def test_a_flow_has_the_projects_settings_where_the_user_has_none(
    own: dict[str, str],
    expected: list[str],
    spins: int,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "DO_NOT_TRACK")  # `make test` has them
    plain = {name: value for name, value in environment.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS],
        cwd=tmp_path,
        env=plain | own | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert done.stdout.split() == expected
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


IDLING = '''
import http.client
import time
from urllib.parse import urlsplit

from prefect import flow, get_client

from flows import command_line


@flow
def idle():
    """Ask twice over one connection."""
    with get_client(sync_client=True) as client:
        address = urlsplit(str(client.api_url))
    connection = http.client.HTTPConnection(address.hostname, address.port)
    for pause_s in (6, 0):
        connection.request("GET", "/api/health")
        print(connection.getresponse().read())
        time.sleep(pause_s)


command_line.run(idle)
'''


@pytest.mark.slow
def test_temporary_server_keeps_a_connection_that_is_idle_for_a_while(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert said_by(IDLING, environment, tmp_path) == ["b'true'"] * 2


COMPILING = """
import sys
import time

from prefect import flow

from flows import command_line


@flow
def idle():
    deadline = time.monotonic() + 60
    while "torch._dynamo" not in sys.modules and time.monotonic() < deadline:
        time.sleep(0.1)
    print("torch._dynamo" in sys.modules)


print("torch._dynamo" in sys.modules)
command_line.run(idle)
"""


@pytest.mark.slow
def test_torchs_compiler_is_imported_while_the_temporary_server_starts(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert said_by(COMPILING, environment, tmp_path) == ["False", "True"]


def test_unknown_option_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gan", "--epoch", "3"])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(train_gan_flow)
    assert stopped.value.code == 2
    assert "unrecognized arguments: --epoch 3" in capsys.readouterr().err


def test_help_describes_every_parameter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gan", "--help"])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(train_gan_flow)
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: python -m flows.train_gan")
    for name, schema in train_gan_flow.parameters.properties.items():
        assert f"--{name.replace('_', '-')}" in text
        assert " ".join(schema["description"].split()) in text
