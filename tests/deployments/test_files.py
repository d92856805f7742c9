"""What a cluster takes, as far as it can be checked without one: every name in it exists."""

import importlib
import json
import re
import shlex
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml
from prefect import Flow

from deployments.stack import PROCFILE, ROOT

PREFECT_YAML = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {
    f"{deployment['entrypoint'].rpartition('.')[2]}/{deployment['name']}": deployment
    for deployment in PREFECT_YAML["deployments"]
}
DOCKERFILE = (ROOT / "deployments" / "Dockerfile").read_text()
POOL = json.loads((ROOT / "deployments" / "kubernetes-pool.json").read_text())


def load_flow(entrypoint: str) -> Flow[..., Any]:
    module, _, name = entrypoint.rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    assert isinstance(flow, Flow)
    return flow


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_deployment_names_a_flow_and_parameters_that_it_takes(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    flow = load_flow(deployment["entrypoint"])
    given = deployment.get("parameters", {})
    assert set(given) <= set(flow.parameters.properties)
    required = {word: value for word, value in example_values(flow).items() if word not in given}
    flow.validate_parameters(given | required)


def example_values(flow: Flow[..., Any]) -> dict[str, object]:
    """Something for each parameter that has no default."""
    return dict.fromkeys(flow.parameters.required or [], 1)


def test_flow_parameters_are_described_for_the_form() -> None:
    for deployment in DEPLOYMENTS.values():
        for name, schema in load_flow(deployment["entrypoint"]).parameters.properties.items():
            assert schema.get("description"), name


def dockerfile_steps() -> list[tuple[str, str]]:
    """Instruction and arguments, in order."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line]


def test_everything_that_the_image_copies_exists_and_is_not_ignored() -> None:
    copied = [args.split()[0] for step, args in dockerfile_steps() if step == "COPY"]
    assert {"gan", "tasks", "flows", "sweep.yaml", "requirements.lock"} <= set(copied)
    ignore = (ROOT / "deployments" / "Dockerfile.dockerignore").read_text().splitlines()
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignore


def test_image_starts_where_the_pull_step_looks() -> None:
    steps = dockerfile_steps()
    (workdir,) = [args for step, args in steps if step == "WORKDIR"]
    variables = dict(
        word.split("=", 1) for step, args in steps if step == "ENV" for word in shlex.split(args)
    )
    (pull,) = PREFECT_YAML["pull"]
    (arguments,) = pull.values()
    (wanted,) = re.findall(r"\$(\w+)", arguments["directory"])
    assert variables[wanted] == variables["PYTHONPATH"] == workdir
    (command,) = [json.loads(args) for step, args in steps if step == "CMD"]
    assert command == ["prefect", "flow-run", "execute"]


def test_image_has_a_python_that_the_project_allows() -> None:
    (base,) = [args for step, args in dockerfile_steps() if step == "FROM"]
    major, minor = re.match(r"python:(\d+)\.(\d+)", base).groups()  # type: ignore[union-attr]
    assert (int(major), int(minor)) >= (3, 11)


def placeholders(value: object) -> set[str]:
    return set(re.findall(r"{{ (\w+) }}", json.dumps(value)))


def test_kubernetes_pool_fills_every_placeholder_and_uses_every_variable() -> None:
    assert placeholders(POOL["job_configuration"]) == set(POOL["variables"]["properties"])


def paths(value: object, above: tuple[object, ...] = ()) -> set[tuple[object, ...]]:
    """Where anything stands in nested JSON."""
    if isinstance(value, dict):
        items: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {above}
    return {above}.union(*(paths(below, (*above, key)) for key, below in items))


def test_kubernetes_pool_keeps_what_prefects_own_has() -> None:
    folder = Path(prefect.__file__).parent / "server" / "api" / "collections_data" / "views"
    metadata = json.loads((folder / "aggregate-worker-metadata.json").read_text())[
        "prefect-kubernetes"
    ]["kubernetes"]
    theirs = metadata["default_base_job_configuration"]
    # Its worker refuses a job manifest that lacks what its own has.
    assert paths(POOL["job_configuration"]) >= paths(theirs["job_configuration"])
    assert set(POOL["variables"]["properties"]) >= set(theirs["variables"]["properties"])


def test_kubernetes_job_asks_for_a_gpu_and_a_secret_environment() -> None:
    manifest = POOL["job_configuration"]["job_manifest"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    pod = manifest["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    assert POOL["variables"]["properties"]["gpus"]["default"] == 1
    assert "secretRef" in container["envFrom"][0]


def test_procfile_names_programs_that_are_installed() -> None:
    scripts = {script.name for script in entry_points(group="console_scripts")} | {"weed", "python"}
    for line in PROCFILE.read_text().splitlines():
        name, command = re.split(r": (?:cd \S+ && )?exec ", line)
        program, *rest = command.split()
        assert name
        assert program in scripts
        if program == "python":
            assert rest[0] == "-m"
            assert importlib.util.find_spec(rest[1])
