"""What a process asked of the system, in which order: traces of strace, and the order that durability rests on."""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

TRACED = "fsync,fdatasync,rename,renameat,renameat2,write,pwrite64,writev,sendto,sendmsg"
STRACE = ("strace", "-D", "-f", "-yy", "--seccomp-bpf", "-s", "9000", "-e", f"trace={TRACED}")
"""-D: what is traced stays our own child. -s: longer than a page of the database."""
_WRITES, _RENAMES = re.compile("writev?|pwrite64"), re.compile("rename(at2?)?")
_WHOLE = re.compile(r"(\d+) +(\w+)\((.*)\) += (.+)")
_BEGUN = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>")
_ENDED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)\) += (.+)")


def require_strace() -> None:
    """Skips the test where the system has no strace."""
    if shutil.which("strace") is None:
        pytest.skip("NO STRACE: the order of system calls was not looked at; install strace")


@dataclass(frozen=True)
class Call:
    """A call that succeeded; `begin` and `end` are lines of the trace."""

    begin: int
    end: int
    name: str
    arguments: str


def parse(lines: Iterable[str]) -> list[Call]:
    """The successful calls of `strace -f`, by their beginning; one that another thread's interrupted is one."""
    calls, begun = [], {}
    for number, line in enumerate(lines):
        if found := _WHOLE.match(line):
            process, name, arguments, result = found.groups()
            calls.append((result, Call(number, number, name, arguments)))
        elif found := _BEGUN.match(line):
            process, name, arguments = found.groups()
            begun[process] = (number, arguments)
        elif found := _ENDED.match(line):
            process, name, arguments, result = found.groups()
            start, before = begun.pop(process)
            calls.append((result, Call(start, number, name, before + arguments)))
    return sorted((call for result, call in calls if not result.startswith("-1")), key=lambda call: call.begin)


def order_violations(calls: Sequence[Call], spool: Path, batches: Mapping[str, str | None]) -> list[str]:
    """Where a batch was not: written, synced, renamed, its folder synced, its row logged, the log synced, acknowledged.

    spool: the folder of the payloads. batches: the SHA-256 of each, with a pattern of what acknowledges it on the wire,
    None where nobody is told. What was not seen at all is a violation too.
    """
    return [
        f"{sha256[:8]}…: {problem}"
        for sha256, ack in batches.items()
        for problem in _problems(calls, spool, sha256, ack)
    ]


def _problems(calls: Sequence[Call], spool: Path, sha256: str, ack: str | None) -> list[str]:
    row = _first(calls, "pwrite64", f"-wal>.*{sha256}")
    if row is None:
        return ["no row was logged"]
    problems = []
    renamed = _first(calls, "rename(at2?)?", f'{re.escape(str(spool))}/{sha256}"')
    if renamed is None or renamed.end >= row.begin:
        problems.append("its row was logged before its bytes had their name")
    else:
        problems += _moved(calls, renamed, spool, row)
    committed = _first(calls, "f(data)?sync", "-wal>", after=row.end)
    if committed is None:
        problems.append("its row was never synced")
    if ack is None or committed is None:
        return problems
    told = _first(calls, "sendto|sendmsg|write", f"<(TCP|UNIX).*{ack}")
    if told is None:
        problems.append("nobody was told")
    elif told.begin <= committed.end:
        problems.append("it was acknowledged before its row was durable")
    return problems


def _moved(calls: Sequence[Call], renamed: Call, folder: Path, before: Call | None = None) -> list[str]:
    """What is wrong with a file that was renamed into `folder`, durably `before` something else."""
    problems = []
    source = re.escape(re.findall(r'"([^"]*)"', renamed.arguments)[0])
    writes = [call for call in calls if _WRITES.fullmatch(call.name) and re.match(rf"\d+<{source}>", call.arguments)]
    last = max((call.end for call in writes if call.begin < renamed.begin), default=-1)
    synced = _first(calls, "f(data)?sync", f"<{source}>", after=last)
    if synced is None or synced.end >= renamed.begin:
        problems.append("it was renamed before its bytes were synced")
    named = _first(calls, "fsync", f"<{re.escape(str(folder))}>", after=renamed.end)
    if named is None or (before is not None and named.end >= before.begin):
        problems.append("its folder was not synced in time")
    return problems


def unsafe_moves(calls: Sequence[Call], folder: Path) -> tuple[int, list[str]]:
    """How many files were renamed into `folder`, and which of them not durably: bytes first, then the name."""
    moves = [
        call for call in calls if re.fullmatch("rename(at2?)?", call.name) and Path(_target(call)).parent == folder
    ]
    problems = [f"{Path(_target(call)).name}: {problem}" for call in moves for problem in _moved(calls, call, folder)]
    return len(moves), problems


def _target(call: Call) -> str:
    return re.findall(r'"([^"]*)"', call.arguments)[1]


def _first(calls: Sequence[Call], name: str, arguments: str, after: int = -1) -> Call | None:
    """The first call of this name, with such arguments, that begins after the line `after`."""
    names, wanted = re.compile(name), re.compile(arguments, re.DOTALL)
    fitting = (call for call in calls if call.begin > after and names.fullmatch(call.name))
    return next((call for call in fitting if wanted.search(call.arguments)), None)
