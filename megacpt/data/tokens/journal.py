"""How far an unfinished run is, noted in a file of JSON lines that a kill can at most cut short.

The first line says whose work it is; each other one is a note: a position, and the input file in which or after which
it lies. A note holds as long as that file and those before it are as they were, so that a run goes on from the start
of the first file that has changed since.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacpt.data.text.documents import Place, Source
from megacpt.data.text.filtering import FILTERED
from megacpt.data.text.provenance import InputFile


@dataclass
class Position:
    """How far a run is.

    Attributes:
        tokens: written so far, of each key.
        inputs: input files (of this job's share) that are done.
        place: first row of the next file that is not done; None for where the share of that file begins.
        start, stop: [file, offset] of the share's first row, and of the row after its last file done, once known.
        counts: rows dropped so far, by kind.
        consumed, text: bytes of the input files, and of text, so far.
    """

    tokens: list[int]
    inputs: int = 0
    place: Place | None = None
    start: list[int] | None = None
    stop: list[int] | None = None
    documents: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    consumed: int = 0
    text: int = 0


@dataclass
class Journal:
    """What a run has noted.

    Attributes:
        job: what the work depends on, apart from the input files and `skip_invalid`.
        notes: those that a later run may need: all at ends of files, and the last.
        records: the input files that are done.
        finishing: all is encoded, and some datasets may have their names already.
        stale: the file holds the notes of another job.
    """

    job: dict[str, Any]
    position: Position
    notes: list[dict[str, Any]] = field(default_factory=list)
    records: list[InputFile] = field(default_factory=list)
    finishing: bool = False
    stale: bool = False


def note_of(position: Position, source: Source, done: InputFile | None) -> dict[str, Any]:
    """A note that the run is inside `source`, or that it is done with it."""
    found: dict[str, Any] = {"file": _stamp(source), "position": asdict(position)}
    return found if done is None else {**found, "sha256": done.sha256}


def read_journal(path: Path, job: dict[str, Any], keys: int, sources: Sequence[Source], skip_invalid: bool) -> Journal:
    """The notes in `path` that still hold for this job and these inputs; none if there are none or it is another's.

    Rows that were passed over with `skip_invalid` do not stand in the way of a run that is as tolerant.
    """
    journal = Journal(job, Position(tokens=[0] * keys))
    try:
        # What comes after the last end of line was cut short.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        header, *notes = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return journal
    if header != {"job": job}:
        journal.stale = True
        return journal
    for note in notes:
        if "finishing" in note:
            journal.finishing = len(journal.records) == len(sources)
        elif _holds(note, sources, skip_invalid):
            _take(journal, note, sources)
        else:
            break
    journal.stale = bool(notes) and not journal.notes
    return journal


def _holds(note: dict[str, Any], sources: Sequence[Source], skip_invalid: bool) -> bool:
    number = _number(note)
    bad_rows = note["position"]["counts"].keys() - FILTERED
    return number < len(sources) and note["file"] == _stamp(sources[number]) and (skip_invalid or not bad_rows)


def _take(journal: Journal, note: dict[str, Any], sources: Sequence[Source]) -> None:
    if "sha256" in note:
        source = sources[_number(note)]
        journal.records.append(InputFile(source.path.name, source.size, note["sha256"]))
    place = note["position"]["place"]
    journal.position = Position(**{**note["position"], "place": place and Place(**place)})
    journal.notes = [*(old for old in journal.notes if "sha256" in old), note]


def _number(note: dict[str, Any]) -> int:
    """Of the file that a note is about, within the share."""
    return note["position"]["inputs"] - ("sha256" in note)


def _stamp(source: Source) -> list[str | int]:
    return [source.path.name, source.size, source.mtime_ns]
