"""`supsup-cli tasks`: the tasks that the daemon has found, and what an operator does to them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.connection import AsJson, asking
from cli.output import print_pairs, print_rows, printable

if TYPE_CHECKING:
    from supsupd.client import Client

TASK_FIELDS = (
    "task",
    "name",
    "key",
    "version",
    "batches",
    "samples",
    "accuracy",
    "entropy",
    "density",
    "bytes",
    "created",
    "last_seen",
)
RETIRED_FIELDS = ("retired", "merged_into")
HISTORY_FIELDS = ("version", "created", "made_by", "batch", "density", "bytes", "sha256", "served", "reason")
SHOWN_HASH = 12
DECISION_FIELDS = ("batch", "name", "decision", "task", "at", "reason")

tasks_app = typer.Typer(help="The tasks that the daemon has found.", rich_markup_mode=None, no_args_is_help=True)

TaskId = Annotated[str, typer.Argument(metavar="N", help="The task's key, name or id.")]
BatchId = Annotated[int, typer.Argument(metavar="BATCH", min=1, help="The batch's id in the ledger.")]


@tasks_app.command("list")
@asking
def list_tasks(
    client: "Client",
    retired: Annotated[bool, typer.Option("--all", help="Also the retired and the merged ones.")] = False,
    as_json: AsJson = False,
) -> None:
    """The tasks in use."""
    rows = client.tasks(retired)
    fields = TASK_FIELDS + RETIRED_FIELDS if retired else TASK_FIELDS
    damaged = any(row.get("problem") for row in rows)
    print_rows(rows, (*fields, "problem") if damaged else fields, as_json)


@tasks_app.command("show")
@asking
def show_task(client: "Client", task: TaskId, as_json: AsJson = False) -> None:
    """One task, with the decisions that led batches to it."""
    row = client.task(task)
    if as_json:
        print_rows([row], row, as_json)
        return
    shown = {key: value for key, value in row.items() if key != "decisions"}
    print_pairs(shown | {"merged": [other["task"] for other in row["merged"]]})
    typer.echo()
    print_rows(row["decisions"], DECISION_FIELDS, as_json)


@tasks_app.command("rename")
@asking
def rename_task(
    client: "Client",
    task: TaskId,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '_', '.' and '-'.")],
) -> None:
    """Give a task a name."""
    row = client.rename(task, name)
    typer.echo(f"task {row['task']} is now {printable(row['name'])}")


@tasks_app.command("retire")
@asking
def retire_task(client: "Client", task: TaskId, as_json: AsJson = False) -> None:
    """Serve, recognise and train a task no longer; nothing of it is lost."""
    row = client.retire(task)
    _print_done(row, f"task {row['task']} is retired", as_json)


@tasks_app.command("reopen")
@asking
def reopen_task(client: "Client", task: TaskId, as_json: AsJson = False) -> None:
    """Take a retired task into use again, as it was."""
    row = client.reopen(task)
    _print_done(row, f"task {row['task']} is in use again", as_json)


@tasks_app.command("merge")
@asking
def merge_tasks(
    client: "Client",
    task: Annotated[str, typer.Argument(metavar="A", help="The task that keeps its mask.")],
    other: Annotated[str, typer.Argument(metavar="B", help="The task that it answers for from now on.")],
    as_json: AsJson = False,
) -> None:
    """Let task A answer for task B too, which is retired."""
    row = client.merge(task, other)
    _print_done(row, f"task {row['task']} answers for {printable(other)} too: {row['batches']} batches", as_json)


@tasks_app.command("split")
@asking
def split_task(
    client: "Client",
    task: TaskId,
    batch: Annotated[int, typer.Option("--from", metavar="BATCH", min=1, help="The first batch that goes.")],
    as_json: AsJson = False,
) -> None:
    """Make a new task of a task's batches from one on; the old one is again as it was before it."""
    row = client.split(task, batch)
    _print_done(row, f"task {row['task']} has {row['batches']} batches from {batch} on", as_json)


@tasks_app.command("history")
@asking
def show_history(client: "Client", task: TaskId, as_json: AsJson = False) -> None:
    """Every version of a task's mask: when, by whom and why it was made, and which one is served."""
    rows = client.history(task)
    shown = rows if as_json else [{**row, "sha256": row["sha256"][:SHOWN_HASH]} for row in rows]
    print_rows(shown, HISTORY_FIELDS, as_json)


@tasks_app.command("rollback")
@asking
def roll_task_back(
    client: "Client",
    task: TaskId,
    version: Annotated[int, typer.Option("--to", metavar="V", min=1, help="A version of `tasks history`.")],
    as_json: AsJson = False,
) -> None:
    """Give a task, as a new version, the mask that it had at an earlier one."""
    row = client.rollback(task, version)
    _print_done(row, f"task {row['task']} is as it was at version {version}, in version {row['version']}", as_json)


@tasks_app.command("why")
@asking
def explain_batch(client: "Client", batch: BatchId, as_json: AsJson = False) -> None:
    """Why a batch went where it went: all decisions about it, in words."""
    story = client.why(batch)
    if as_json:
        print_rows([story], story, as_json)
        return
    for line in story["words"]:
        typer.echo(printable(line))


def _print_done(row: Mapping[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        print_rows([row], row, as_json)
    else:
        typer.echo(text)
