"""KenLM's own programs (lmplz, build_binary): where they are, and how to get them built."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megacpt.errors import UserError
from megacpt.files import lock, make_folder, sha256_of

VERSION = "0.3.0"
"""The release of the package `kenlm` whose sources are built."""
PROGRAMS = ("lmplz", "build_binary")
DEBIAN = {
    "boost/program_options.hpp": "libboost-program-options-dev",
    "boost/system/error_code.hpp": "libboost-system-dev",
    "boost/thread.hpp": "libboost-thread-dev",
}
INCLUDES = (Path("/usr/include"), Path("/usr/local/include"), Path("/opt/homebrew/include"))


@dataclass(frozen=True)
class Programs:
    """Paths of KenLM's programs; `build_binary` may be missing. `version` says which they are, as far as is known."""

    lmplz: Path
    build_binary: Path | None
    version: str


def cache_folder() -> Path:
    """Where programs that were built here are kept: XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "megacpt" / f"kenlm-{VERSION}"


def find_programs() -> Programs | None:
    """The programs in the folder that KENLM_BIN names, on PATH, or in the cache; None where there are none.

    Raises:
        UserError: KENLM_BIN is set to a folder that does not hold lmplz.
    """
    named = os.environ.get("KENLM_BIN")
    if named:
        if shutil.which("lmplz", path=named) is None:
            raise UserError(f"KENLM_BIN={named}: this folder holds no program lmplz; correct it or unset it")
        return _programs(named)
    for place in (os.environ.get("PATH", ""), str(cache_folder() / "bin")):
        if shutil.which("lmplz", path=place):
            return _programs(place)
    return None


def _programs(place: str) -> Programs:
    found = {name: shutil.which(name, path=place) for name in PROGRAMS}
    lmplz, binary = Path(found["lmplz"] or ""), found["build_binary"]
    built_here = lmplz.parent == cache_folder() / "bin"
    version = VERSION if built_here else f"unknown, lmplz with sha256 {sha256_of(lmplz)[:12]}"
    return Programs(lmplz, Path(binary) if binary else None, version)


def missing_for_build() -> list[str]:
    """What building needs and this machine lacks, as names of Debian packages."""
    lacking = [name for name in ("cmake", "make") if shutil.which(name) is None]
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        lacking.append("g++")
    folders = [*INCLUDES, *(Path(p) for p in os.environ.get("CPATH", "").split(os.pathsep) if p)]
    lacking += [name for header, name in DEBIAN.items() if not any((folder / header).is_file() for folder in folders)]
    return lacking


def build_programs(jobs: int | None = None) -> Programs:
    """Build the programs from the package's source distribution into the cache: a minute or two, once.

    Raises:
        UserError: something is missing (all of it is named), or a step fails.
    """
    lacking = missing_for_build()
    if lacking:
        raise UserError(
            f"KenLM's trainer lmplz is not here and cannot be built without {', '.join(lacking)}; install them "
            "(Debian's names), set KENLM_BIN to a folder that holds lmplz, or pass --trainer python"
        )
    folder = cache_folder()
    make_folder(folder)
    with lock(folder / ".lock", f"{folder} (a build of KenLM)"):
        if (found := find_programs()) is not None:
            return found
        print(f"building KenLM {VERSION} into {folder}: a minute or two, once", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _build(Path(scratch), folder / "bin", jobs or os.cpu_count() or 1)
    found = find_programs()
    assert found is not None
    return found


def _build(scratch: Path, destination: Path, jobs: int) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--no-build-isolation", "--no-binary", "kenlm", "--dest", str(scratch), f"kenlm=={VERSION}"]
    _step(pip, f"the source of the package kenlm {VERSION} cannot be fetched")
    archives = list(scratch.glob("*.tar.gz"))
    if len(archives) != 1:
        raise UserError(f"the package kenlm {VERSION} came without its source archive; set KENLM_BIN instead")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(scratch, filter="data")
    (source,) = scratch.glob("kenlm-*/CMakeLists.txt")
    # Only KenLM's own tests, which are not built, need Boost's test framework.
    source.write_text(source.read_text().replace("unit_test_framework", ""))
    build = scratch / "build"
    configure = ["cmake", "-S", str(source.parent), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    _step(configure, f"KenLM {VERSION} cannot be configured")
    compile_ = ["cmake", "--build", str(build), "--parallel", str(jobs), "--target", *PROGRAMS]
    _step(compile_, f"KenLM {VERSION} cannot be compiled")
    make_folder(destination)
    for name in reversed(PROGRAMS):  # lmplz last: where it is, all is
        shutil.copy2(build / "bin" / name, destination / f".{name}")
        os.replace(destination / f".{name}", destination / name)


def _step(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if "rror" in line]
        reason = (lines or done.stderr.splitlines() or ["no message"])[0].rstrip(".")
        raise UserError(f"{failure} ({reason}); set KENLM_BIN to a folder that holds lmplz, or pass --trainer python")


def import_kenlm() -> ModuleType:
    """The module `kenlm`, of either package that has it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("kenlm")
    except ImportError as error:
        raise UserError("the Python module kenlm is not installed; pip install ufal-kenlm (or kenlm)") from error


def library_version() -> str:
    """Name and version of the package that `import kenlm` is."""
    for name in ("ufal.kenlm", "kenlm"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "kenlm of an unknown version"
