"""Notes on what a reader leaves out or corrects in a user's data: a line on the log, and every case for ``check``."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

log = logging.getLogger(__name__)

SHOWN = 3
"""Cases that the line on the log names."""


@dataclass(frozen=True)
class Note:
    """Cases of one kind that were left out or corrected, or that the check found.

    Attributes:
        kind: what happened, and what to do about it.
        cases: names of the files, folders or lines.
        problem: whether it fails the check of a data set.
    """

    kind: str
    cases: tuple[str, ...]
    problem: bool = False

    def line(self) -> str:
        """The note in one line."""
        shown = ", ".join(f"'{case}'" for case in self.cases[:SHOWN])
        return " ".join(f"{self.kind}: {len(self.cases)} ({shown}{', ...' if len(self.cases) > SHOWN else ''})".split())


_notes: ContextVar[list[Note] | None] = ContextVar("notes", default=None)


def note(kind: str, cases: Iterable[str], problem: bool = False) -> None:
    """Adds a note on some cases, none without a case: on the log, or in the list of :func:`collected`."""
    note = Note(kind, tuple(cases), problem)
    if not note.cases:
        return
    notes = _notes.get()
    if notes is None:
        log.warning("%s", note.line())
    else:
        notes.append(note)


@contextmanager
def collected() -> Iterator[list[Note]]:
    """The notes taken inside the block, which do not go to the log."""
    notes: list[Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)
