import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVICES = {"prefect", "mlflow", "boto3", "botocore"}

LIST_MODULES = """
import importlib, pkgutil, sys
import gan
for module in pkgutil.walk_packages(gan.__path__, "gan."):
    importlib.import_module(module.name)
print(*sys.modules)
"""


def imports(path: Path) -> Iterator[str]:
    """The top-level packages that a file imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize(
    ("package", "above"), [("gan", SERVICES | {"tasks", "flows"}), ("tasks", {"flows"})]
)
def test_nothing_imports_from_a_floor_above(
    package: str, above: set[str], pytestconfig: pytest.Config
) -> None:
    files = sorted((pytestconfig.rootpath / package).rglob("*.py"))
    assert files
    for path in files:
        assert not set(imports(path)) & above, path


def loaded_by(program: str, root: Path) -> set[str]:
    """The modules that a fresh interpreter holds after a program that ends with printing them."""
    fresh = subprocess.run(
        [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True, check=True
    )
    return set(fresh.stdout.split())


def test_the_craft_runs_alone(pytestconfig: pytest.Config) -> None:
    loaded = loaded_by(LIST_MODULES, pytestconfig.rootpath)
    assert "gan.training" in loaded
    assert not loaded & (SERVICES | {"tasks", "flows"})
