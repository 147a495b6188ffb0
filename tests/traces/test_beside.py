"""Files beside a log: read whole or not at all, and nothing that is no file is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from composer_plugins.traces.beside import read_beside


def test_a_file_is_read_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert [read_beside(path, limit) for limit in (4, 5, 6)] == [None, b"12345", b"12345"]
    (tmp_path / "link").symlink_to(path)
    assert read_beside(tmp_path / "link", 5) == b"12345"


def test_so_many_bytes_of_its_start(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert [read_beside(path, 5, first=n) for n in (-1, 0, 3, 5, 6)] == [None, b"", b"123", b"12345", None]
    assert (read_beside(path, 3, first=3), read_beside(path, 3, first=4)) == (b"123", None)


def test_what_is_no_file(tmp_path):
    """The pipe has no writer: opening it in the ordinary way would wait for ever."""
    assert [read_beside(place, 10) for place in (tmp_path, tmp_path / "gone", Path("a\0b"))] == [None] * 3
    if Path("/dev/zero").exists():
        assert read_beside(Path("/dev/zero"), 10) is None and read_beside(Path("/dev/zero"), 10, first=3) is None
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe")
    assert read_beside(tmp_path / "pipe", 10) is None
