"""From reference text to a KenLM model: normalise, count n-grams, store the model with how it was made."""

import hashlib
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

from megacpt import __version__
from megacpt.data.scores.kenlm_build import Programs, build_programs, find_programs, library_version, missing_for_build
from megacpt.data.scores.kenlm_model import ModelRecord, write_record
from megacpt.data.scores.kneser_ney import FALLBACK_DISCOUNTS, LARGEST_REFERENCE, estimate, read_corpus, write_arpa
from megacpt.data.scores.normalize import Normalization, normalizer
from megacpt.data.scores.overlap import NGRAM, Evaluation
from megacpt.data.text.filtering import iter_documents
from megacpt.data.text.inputs import find_inputs
from megacpt.data.text.provenance import Filters
from megacpt.errors import UserError
from megacpt.files import atomic_write, disk_errors, exclusive, json_beside, keep_apart, sha256_of

TRAINERS = ("auto", "lmplz", "python")
STRUCTURES = {"probing": ["probing"], "trie": ["trie"], "quantized_trie": ["-q", "8", "-b", "8", "trie"]}
DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class TrainJob:
    """A whole run.

    Attributes:
        pruning: n-grams seen this often or less are left out, one threshold an order (lmplz --prune); empty keeps all.
        structure: how build_binary lays the model out, one of STRUCTURES.
        eval_sets, eval_keys, ngram: evaluation sets to warn about, as in `overlap.Evaluation`.
        memory: lmplz's sorting memory, as GNU sort writes it.
    """

    inputs: tuple[str, ...]
    output: Path
    json_key: str = "text"
    order: int = 5
    normalization: Normalization = field(default_factory=Normalization)
    filters: Filters = field(default_factory=Filters)
    trainer: str = "auto"
    pruning: tuple[int, ...] = ()
    structure: str = "probing"
    eval_sets: tuple[Path, ...] = ()
    eval_keys: tuple[str, ...] = ()
    ngram: int = NGRAM
    memory: str = "1G"
    overwrite: bool = False


def train(job: TrainJob) -> ModelRecord:
    """Train a model; write `job.output` and its record.

    Raises:
        UserError: anything about the inputs, the programs or the output that the user can put right.
    """
    _check(job)
    paths = find_inputs(job.inputs)
    keep_apart([job.output, json_beside(job.output)], [*paths, *job.eval_sets])
    evaluation = Evaluation(job.eval_sets, job.ngram, job.eval_keys) if job.eval_sets else None
    with disk_errors(job.output), _scratch(job.output) as scratch:
        text = scratch / "text"
        reference = _write_normalized(job, paths, text, evaluation)
        programs = _programs(job, reference["words"])
        made, file, trainer = (
            _run_lmplz(job, programs, text) if programs else (_run_python(job, text), "arpa", _python_trainer())
        )
        record = ModelRecord(
            sha256=sha256_of(made),
            file=file,
            order=job.order,
            ngrams=_ngram_counts(text.with_suffix(".arpa")),
            normalization=job.normalization.as_dict(),
            trainer=trainer,
            reference=reference,
            overlap=[entry.as_dict() for entry in evaluation.report()] if evaluation else [],
            megacpt_version=__version__,
        )
        _put_in_place(made, job.output, record)
    return record


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """An empty folder beside the model, for this process alone; also what a killed run left of it goes in the end."""
    folder = output.with_name(f".{output.name}.work")
    with exclusive(output.with_name(f".{output.name}.lock"), str(output)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check(job: TrainJob) -> None:
    if not 2 <= job.order <= 6:
        raise UserError(f"--order {job.order}: KenLM takes n-grams of 2 to 6 words")
    if len(job.pruning) > job.order or list(job.pruning) != sorted(job.pruning) or min(job.pruning, default=0) < 0:
        raise UserError(
            f"--pruning {' '.join(map(str, job.pruning))}: give at most {job.order} thresholds that never fall, "
            "for instance 0 0 1"
        )
    if job.pruning and job.trainer == "python":
        raise UserError("--pruning needs lmplz: the trainer in Python keeps every n-gram; drop it or --trainer python")
    if not job.overwrite and (job.output.exists() or json_beside(job.output).exists()):
        raise UserError(f"{job.output}: exists already; pass --overwrite or choose another --output")


def _programs(job: TrainJob, words: int) -> Programs | None:
    """What to train with: lmplz where it is or can be built; None for the trainer in Python."""
    if job.trainer == "python":
        return None
    found = find_programs()
    lacking = missing_for_build()
    if found is not None or job.trainer == "lmplz" or not lacking or words > LARGEST_REFERENCE or job.pruning:
        return found or build_programs()
    print(
        f"lmplz is not here and {', '.join(lacking)} are missing to build it: {words:,} words are few enough for the "
        "trainer in Python",
        file=sys.stderr,
    )
    return None


def _write_normalized(
    job: TrainJob, paths: Sequence[Path], text: Path, evaluation: Evaluation | None
) -> dict[str, Any]:
    """Write the normalised sentences, one a line; return what the record says of the reference."""
    counts, skipped = Counter[str](), Counter[str]()
    digest = hashlib.sha256()
    normalize = normalizer(job.normalization)
    with open(text, "wb") as handle:
        for rows in batched(iter_documents(paths, [job.json_key], job.filters, skipped), DOCUMENTS_AT_ONCE):
            texts = [row for _, (row,) in rows]
            if evaluation is not None:
                for one in texts:
                    evaluation.look_in(one)
            documents = normalize(texts)
            lines = b"".join([line + b"\n" for document in documents for line in document.lines])
            handle.write(lines)
            digest.update(lines)
            counts["documents"] += len(texts)
            counts["sentences"] += sum(len(document.lines) for document in documents)
            counts["words"] += sum(document.words for document in documents)
    if not counts["words"]:
        raise UserError(f"the reference holds no word under {job.json_key!r}; check --input and --json-key")
    files = [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths]
    return {
        "inputs": files,
        "json_key": job.json_key,
        **counts,
        "dropped": dict(sorted(skipped.items())),
        "normalized_sha256": digest.hexdigest(),
    }


def _run_lmplz(job: TrainJob, programs: Programs, text: Path) -> tuple[Path, str, dict[str, Any]]:
    """Run lmplz and build_binary; the model's file, its kind, and what the record says of the trainer."""
    arpa, binary = text.with_suffix(".arpa"), text.with_suffix(".binary")
    options = ["--skip_symbols", "--discount_fallback", *map(str, FALLBACK_DISCOUNTS)]
    if job.pruning:
        options += ["--prune", *map(str, job.pruning)]
    place = ["--memory", job.memory, "--temp_prefix", f"{text.parent}/", "--text", str(text), "--arpa", str(arpa)]
    log = _run([str(programs.lmplz), "--order", str(job.order), *place, *options])
    fallback = [int(line.split("order ")[1].split(":")[0]) + 1 for line in log if "fallback discounts" in line]
    trainer = {
        "program": "lmplz",
        "version": programs.version,
        "options": options,
        "fallback_discounts_for_orders": fallback,
    }
    if programs.build_binary is None:
        return arpa, "arpa", trainer
    _run([str(programs.build_binary), *STRUCTURES[job.structure], str(arpa), str(binary)])
    return binary, job.structure, trainer


def _run(command: list[str]) -> list[str]:
    """Run one of KenLM's programs; its messages."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    messages = (done.stderr + done.stdout).splitlines()
    if done.returncode:
        name = Path(command[0]).name
        reason = next((line for line in messages if "rror" in line or "threw" in line or "space" in line), "no message")
        raise UserError(f"{name} failed ({reason.strip().rstrip('.')}); try --memory, --pruning or more disk")
    return messages


def _run_python(job: TrainJob, text: Path) -> Path:
    arpa = text.with_suffix(".arpa")
    corpus = read_corpus(_lines(text))
    with open(arpa, "wb") as handle:
        write_arpa(estimate(corpus, job.order), corpus.words, handle)
    return arpa


def _python_trainer() -> dict[str, Any]:
    return {"program": "megacpt.data.scores.kneser_ney", "version": __version__, "read_by": library_version()}


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as handle:
        yield from handle


def _ngram_counts(arpa: Path) -> list[int]:
    counts = []
    with open(arpa, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("ngram "):
                counts.append(int(line.partition("=")[2]))
            elif counts:
                break
    return counts


def _put_in_place(made: Path, output: Path, record: ModelRecord) -> None:
    """Model and record at their names, the model last: where it is, its record is."""
    output.unlink(missing_ok=True)
    with ExitStack() as undo:
        with atomic_write(output) as handle, open(made, "rb") as content:
            while chunk := content.read(1 << 22):
                handle.write(chunk)
            undo.callback(json_beside(output).unlink, missing_ok=True)
            write_record(output, record)
        undo.pop_all()
