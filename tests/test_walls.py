"""The walls between the folders hold, and the check that says so can fail."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("supsupd", "storage", "streams", "cli")
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "shelve", "marshal", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.jit.load", "os.system", "tempfile.mktemp", "time.sleep"}
# A client may wait between two questions.
ALLOWED = {("supsupd/client/http.py", "time.sleep")}


def check_walls(folder):
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=180)


@pytest.fixture
def checkout(tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_wall_stands():
    result = check_walls(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "statement", "wall"),
    [
        ("streams/batch.py", "import supsupd.config", "storage and streams know nothing of ours"),
        ("streams/batch.py", "import storage.packing", "storage and streams do not know each other"),
        ("storage/packing.py", "import streams.batch", "storage and streams do not know each other"),
        ("supsupd/paths.py", "import cli.output", "nothing imports the command lines"),
        ("supsupd/service.py", "import torch", "torch stays in supsupd.learning"),
        ("cli/output.py", "import sqlalchemy", "SQLAlchemy stays in storage"),
        ("storage/packing.py", "import rich", "typer and rich stay in cli"),
        ("supsupd/learning/labels.py", "import storage.db", "the learning engine does no I/O of the daemon"),
    ],
)
def test_a_breach_of_each_wall_is_found(checkout, module, statement, wall):
    with (checkout / module).open("a") as file:
        file.write(f"\n{statement}  # noqa\n")
    result = check_walls(checkout)
    assert result.returncode != 0
    assert f"{wall} BROKEN" in result.stdout


@pytest.mark.parametrize("module", ["cli.supsup_cli", "cli.supsupd", "streams.directory", "supsupd.client"])
def test_torch_is_not_imported_before_it_is_needed(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=180).returncode == 0


def forbidden_in(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            yield ast.unparse(node.func)


def test_nothing_loads_code_from_data_or_sleeps():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {(str(path.relative_to(ROOT)), name) for path in files for name in forbidden_in(path)}
    assert found == ALLOWED
