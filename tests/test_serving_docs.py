"""The examples of docs/serving.md, run as they stand, in their order and in one folder."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from daemon_process import BIN
from ports import free_ports
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"(?:`([\w.]+)`:\n\n)?```(\w+)\n(.*?)```", re.DOTALL)
PORTS = ("8000", "8001")
MARK = "-- the command's end:"


def examples(document):
    """(file name or "", language, text) of every fenced block."""
    return [match.groups(default="") for match in FENCE.finditer(document)]


def commands(block):
    """(command, what it prints) of a console block."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def as_shown(shown, printed):
    """Whether it prints what is shown; … stands for anything."""
    pattern = r".*".join(re.escape(part) for part in "".join(shown.split()).split("…"))
    return re.fullmatch(pattern, "".join(printed.split()), re.DOTALL) is not None


class Shell:
    """A shell that lives through all examples, in `folder`, with nothing of ours in its environment."""

    def __init__(self, folder):
        (folder / ".curlrc").write_text("silent\nshow-error\n")
        environment = {"HOME": str(folder), "PATH": f"{BIN}:{os.environ['PATH']}", "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(
            ["bash", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def run(self, command):
        """(exit code, all that it prints)."""
        self.process.stdin.write(f'{command}\nprintf "\\n{MARK} %s\\n" $?\n')
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            if line.startswith(MARK):
                return int(line.removeprefix(MARK)), "".join(lines).strip()
            lines.append(line)
        raise AssertionError(f"the shell ended: {''.join(lines)}")


@pytest.fixture
def home(tmp_path):
    """A folder as after the quick start of the README."""
    readme = examples((ROOT / "README.md").read_text())
    (tmp_path / "in").mkdir()
    make = next(text for name, _, text in readme if name == "make_batches.py")
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True)
    return tmp_path


def scrape(config, folder):
    """What Prometheus would get with this configuration."""
    (job,) = yaml.safe_load(config)["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    token = (folder / job["authorization"]["credentials_file"]).read_text().strip()
    path = job.get("metrics_path", "/metrics")
    answer = httpx.get(f"{job.get('scheme', 'http')}://{target}{path}", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 200
    return {family.name for family in text_string_to_metric_families(answer.text)}


def test_every_example_of_the_serving_document_does_what_it_shows(home):
    document = (ROOT / "docs/serving.md").read_text()
    for port, free in zip(PORTS, free_ports(len(PORTS)), strict=True):
        document = document.replace(f":{port}", f":{free}")
    with Shell(home) as shell:
        for number, (name, language, text) in enumerate(examples(document)):
            if name:
                (home / name).write_text(text)
            if language == "python":
                (home / f"example{number}.py").write_text(text)
                code, printed = shell.run(f"python example{number}.py")
                assert code == 0, f"{text}\n{printed}"
            elif language == "console":
                for command, shown in commands(text):
                    code, printed = shell.run(command)
                    assert code == 0, f"{command}\n{printed}\n{(home / 'log').read_text()}"
                    assert as_shown(shown, printed), f"{command}\n{printed}"
            elif language == "yaml":
                assert {"supsupd_tasks", "supsupd_http_requests"} <= scrape(text, home)
