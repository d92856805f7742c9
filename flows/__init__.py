"""What happens, in order."""

import gc
import os
import ssl
import sys
from urllib.parse import unquote

from flows.explanation import say_where_imports_end

_DEFAULTS = {
    # The tools' telemetry is off unless the user asks for it.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server takes a run that says nothing for three of these for dead.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    # MLflow draws a bar for every few files that it fetches.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Without git on the machine, MLflow's library for it would print a page of warnings a run.
    "GIT_PYTHON_REFRESH": "quiet",
    # Threads that wait spin a thousand times before they sleep. If they slept at once, waking them
    # would take an eighth to a third of a training; spinning much longer, they hold up whoever
    # wants the cores as well (docs/performance.md, "Threads that wait").
    "OMP_WAIT_POLICY": "active",
    "GOMP_SPINCOUNT": "1000",
}

# The libraries read these as they are imported, so they are set before any of them is; what the
# user has set stands.
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)

# Whoever reaches pip's index through a proxy has servers on this machine all the same. Libraries
# read one spelling or the other, the small one first.
_spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
if _spared != "*" and "127.0.0.1" not in _spared.split(","):
    _spared = f"{_spared},127.0.0.1".lstrip(",")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = _spared

# MLflow repeats its address in errors and in the log; its own variables for a login are read alone.
_scheme, _, _rest = os.environ.get("MLFLOW_TRACKING_URI", "").partition("://")
_login, _at, _host = _rest.partition("/")[0].rpartition("@")
if _scheme in ("http", "https") and _at:
    _user, _, _password = _login.partition(":")
    os.environ["MLFLOW_TRACKING_URI"] = f"{_scheme}://{_rest.removeprefix(f'{_login}@')}"
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(_user))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(_password))

# Libraries fail without saying this name, Prefect in the middle of its import.
if _certificates := os.environ.get("SSL_CERT_FILE"):
    try:
        ssl.create_default_context(cafile=_certificates)
    except OSError as error:
        sys.exit(f"error: SSL_CERT_FILE={_certificates}: {error.strerror}")

sys.excepthook = say_where_imports_end

# Imports make half a million objects that stay; by default, every 700 bring a search for garbage.
gc.set_threshold(100_000)
