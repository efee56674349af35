"""The states of a process under the driver's checkpoint calls: what follows each call, as data.

`follow` acts on these rows, for the driver and for a simulated card; docs/en/isolation.md shows them
(scripts/generate_docs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Literal, NamedTuple, TypeVar

from ..sentences import Sentence

State = Literal["running", "locked", "checkpointed", "failed", "gone"]
Operation = Literal["checkpoint", "restore"]
Call = Literal["lock", "checkpoint", "restore", "unlock"]
E = TypeVar("E", bound=Exception)


class Remedy(Enum):
    """The end of an operation that raises `CheckpointFailed`: the state of the process, and what its owner does."""

    KEEP = Sentence(
        "the process runs as before, and what it holds on the GPU stays there", "进程照常运行，其显存仍留在 GPU 上"
    )
    RETRY = Sentence(
        "the process is still checkpointed: restore it again, or end it",
        "进程仍处于检查点状态：可再次恢复，或结束该进程",
    )
    END = Sentence(
        "the process cannot go on: it is ended, and the next request loads the model anew",
        "进程无法继续：将结束该进程，下一个请求会重新加载模型",
    )
    GONE = Sentence(
        "the process has ended: the next request loads the model anew", "进程已结束：下一个请求会重新加载模型"
    )


class Row(NamedTuple):
    """What follows the outcome of a call.

    ``outcome`` is ``done``, or, after an error or no answer, the state that the driver reports then. ``then`` is the
    next call, a `Remedy` (the first error is raised with it), or None: the operation returns.
    """

    operation: Operation
    before: State
    call: Call
    outcome: Literal["done"] | State
    then: Call | Remedy | None

    @property
    def after(self) -> State:
        return AFTER[self.call] if self.outcome == "done" else self.outcome


FIRST: dict[Operation, tuple[State, Call]] = {"checkpoint": ("running", "lock"), "restore": ("checkpointed", "restore")}
"""The state that an operation expects, and its first call. In another state this call fails, and a row covers that."""

AFTER: dict[Call, State] = {"lock": "locked", "checkpoint": "checkpointed", "restore": "locked", "unlock": "running"}

ROWS = (
    Row("checkpoint", "running", "lock", "done", "checkpoint"),
    Row("checkpoint", "running", "lock", "running", Remedy.KEEP),
    Row("checkpoint", "running", "lock", "locked", "unlock"),
    Row("checkpoint", "running", "lock", "checkpointed", None),
    Row("checkpoint", "running", "lock", "failed", Remedy.END),
    Row("checkpoint", "running", "lock", "gone", Remedy.GONE),
    Row("checkpoint", "locked", "checkpoint", "done", None),
    Row("checkpoint", "locked", "checkpoint", "running", Remedy.KEEP),
    Row("checkpoint", "locked", "checkpoint", "locked", "unlock"),
    Row("checkpoint", "locked", "checkpoint", "checkpointed", None),
    Row("checkpoint", "locked", "checkpoint", "failed", Remedy.END),
    Row("checkpoint", "locked", "checkpoint", "gone", Remedy.GONE),
    Row("checkpoint", "locked", "unlock", "done", Remedy.KEEP),
    Row("checkpoint", "locked", "unlock", "running", Remedy.KEEP),
    Row("checkpoint", "locked", "unlock", "locked", Remedy.END),
    Row("checkpoint", "locked", "unlock", "checkpointed", None),
    Row("checkpoint", "locked", "unlock", "failed", Remedy.END),
    Row("checkpoint", "locked", "unlock", "gone", Remedy.GONE),
    Row("restore", "checkpointed", "restore", "done", "unlock"),
    Row("restore", "checkpointed", "restore", "running", None),
    Row("restore", "checkpointed", "restore", "locked", "unlock"),
    Row("restore", "checkpointed", "restore", "checkpointed", Remedy.RETRY),
    Row("restore", "checkpointed", "restore", "failed", Remedy.END),
    Row("restore", "checkpointed", "restore", "gone", Remedy.GONE),
    Row("restore", "locked", "unlock", "done", None),
    Row("restore", "locked", "unlock", "running", None),
    Row("restore", "locked", "unlock", "locked", Remedy.END),
    Row("restore", "locked", "unlock", "checkpointed", Remedy.RETRY),
    Row("restore", "locked", "unlock", "failed", Remedy.END),
    Row("restore", "locked", "unlock", "gone", Remedy.GONE),
)

TRANSITIONS = {(row.operation, row.call, row.outcome): row for row in ROWS}


def follow(
    operation: Operation, call: Callable[[Call], object], failed: type[E], state: Callable[[E], State]
) -> tuple[E, Remedy] | None:
    """Makes the calls of an operation. Returns None once it is done, else its first failure and the remedy.

    A ``call`` that does not succeed raises ``failed``; then ``state`` returns the state of the process.
    """
    first: E | None = None
    then: Call | Remedy | None = FIRST[operation][1]
    while then is not None and not isinstance(then, Remedy):
        outcome: Literal["done"] | State = "done"
        try:
            call(then)
        except failed as error:
            first, outcome = first or error, state(error)
        then = TRANSITIONS[operation, then, outcome].then
    return None if then is None or first is None else (first, then)
