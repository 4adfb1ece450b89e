"""The wheel alone is enough: built, installed into a fresh environment, and run from `/`."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from digits import draw

import supsupd

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parent.parent
PACKAGES = ("cli", "storage", "streams", "supsupd")


@pytest.fixture(scope="module", autouse=True)
def no_other_packages():
    """As with whoever installs the wheel: no modules of the checkout's environment are in its way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        yield


def run(*command):
    result = subprocess.run([*map(str, command)], cwd="/", capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The bin/ of a fresh environment that holds the wheel; its dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    # Without the network the build needs its backend to be here.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder, CHECKOUT)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    programs = folder / "venv" / "bin"
    install = ["-m", "pip", "--python", programs / "python", "install", "--no-deps", "--no-index", "--quiet"]
    run(sys.executable, *install, "--disable-pip-version-check", wheel)
    # A line of a .pth only adds a path: the .pth files there, such as the checkout's own, are not read.
    paths = dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return programs


def test_the_packages_that_run_are_those_of_the_wheel(programs):
    names = ", ".join(PACKAGES)
    found = run(programs / "python", "-c", f"import {names}\nfor m in ({names}): print(m.__file__)").split()
    assert [Path(file).parent.name for file in found] == list(PACKAGES)
    assert all(Path(file).is_relative_to(programs.parent) for file in found)


def test_the_command_lines_run_from_anywhere(programs, tmp_path):
    assert run(programs / "supsupd", "--version") == f"supsupd {supsupd.__version__}\n"
    assert run(programs / "supsupd", "db", "upgrade", "--state", tmp_path / "state").startswith("upgraded: 0001")
    assert run(programs / "supsupd", "db", "verify", "--state", tmp_path / "state") == "ok\n"
    assert "predict" in run(programs / "supsup-cli", "--help")


def test_the_daemon_starts_learns_and_stops(programs, tmp_path):
    with DaemonProcess(tmp_path, programs=programs) as daemon:
        for turn in range(2):
            daemon.drop(f"{turn}", **draw(0, turn))
        daemon.start()
        assert daemon.cli("wait", "--timeout", "150").returncode == 0
        assert [row["task"] for row in daemon.listing("tasks", "list")] == [1]
        assert daemon.stop() == 0
