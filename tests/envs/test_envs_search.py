"""Grep and Glob: a linear-time engine compared with `re` and `fnmatch`."""

from __future__ import annotations

import fnmatch
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_plugins.envs import ToolError
from composer_plugins.envs.globs import Glob
from composer_plugins.envs.linear_regex import Budget, LinearPattern

ATOMS = st.sampled_from(
    ["a", "b", "A", " ", ".", "[ab]", "[^a]", r"\w", r"\W", r"\d", r"\s", "^", "$", r"\b", r"\B", r"\.", "[a-c_]", "x?"]
)
REPEATS = st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,3}", "{0,2}?", "*?", "+?"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, REPEATS).map(lambda p: f"({p[0]}){p[1]}"),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(PATTERNS, st.text("abABc_ .1\n", min_size=1, max_size=12), st.booleans(), st.booleans())  # re has no \B in ""
def test_agrees_with_re(pattern, text, ignore_case, dot_all):
    flags = re.MULTILINE | (re.IGNORECASE if ignore_case else 0) | (re.DOTALL if dot_all else 0)
    expected = re.search(pattern, text, flags) is not None
    assert LinearPattern(pattern, ignore_case=ignore_case, dot_all=dot_all).search(text) is expected


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*)*x", "a?" * 40 + "a" * 40, "(.*,){20}z"])
def test_pathological_patterns_end_quickly(pattern):
    started = time.perf_counter()
    assert LinearPattern(pattern).search("a" * 39 + ",!") is False
    assert LinearPattern(pattern).search("a," * 5000 + "!") in (True, False)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "unterminated"),
        ("(?=a)", "look-around"),
        (r"(a)\1", "backreferences"),
        ("(a{1000}){1000}", "too large"),
        ("((){60000}){60000}", "too large"),
        ("(" * 990, "regex parse error"),
        ("a" * 1001, "longer than"),
        ("a{99999999999}", "regex parse error"),
        ("(?>a)", "atomic"),
    ],
)
def test_refused_patterns_say_why(pattern, reason):
    started = time.perf_counter()
    with pytest.raises(ToolError, match=reason):
        LinearPattern(pattern)
    assert time.perf_counter() - started < 2


def test_a_budget_ends_what_is_left():
    with pytest.raises(ToolError, match="search was stopped"):
        LinearPattern("(a|b|ab)*c").search("ab" * 100, Budget(work=5))
    with pytest.raises(ToolError, match="search was stopped"):
        LinearPattern("z").search("ab" * 100, Budget(chars=10))


@settings(max_examples=300, deadline=None)
@given(st.text("ab*?.[]!^-", max_size=8), st.text("ab.-!^", max_size=6))
def test_globs_of_names_agree_with_fnmatch(pattern, name):
    if "**" in pattern or "[^" in pattern or re.search(r"\[!?\]", pattern) or "-" in pattern:
        return  # fnmatch reads these in its own way
    assert Glob(pattern).matches(name, Budget()) is fnmatch.fnmatchcase(name, pattern)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.py", "a.py", True),
        ("*.py", "src/a.py", False),
        ("**/*.py", "a.py", True),
        ("**/*.py", "x/y/a.py", True),
        ("src/**", "src/x/y", True),
        ("src/**/t.{js,ts}", "src/t.ts", True),
        ("src/**/t.{js,ts}", "src/a/t.md", False),
        ("[!a]b", "ab", False),
        ("a{b", "a{b", True),
    ],
)
def test_globs_of_paths(pattern, path, expected):
    assert Glob(pattern).matches(path, Budget()) is expected


A, B = "/home/dev/app/a.py", "/home/dev/app/src/b.ts"


@pytest.fixture
def workspace(session):
    workspace = session.at(session.call("Bash", "", command="true"))
    workspace.Write(A, "import os\n\ndef f():\n    return os\n")
    workspace.Write(B, "export const f = 1\n")
    return workspace


def test_grep_modes(workspace):
    assert workspace.Grep("f") == f"Found 2 files\n{A}\n{B}"
    assert workspace.Grep("f", type="py") == f"Found 1 file\n{A}"
    assert workspace.Grep("f", glob="*.ts", output_mode="content") == f"{B}:export const f = 1"
    assert workspace.Grep("os", A, output_mode="content", **{"-n": True}) == "1:import os\n4:    return os"
    assert workspace.Grep("OS", output_mode="count", **{"-i": True}).splitlines()[0] == f"{A}:2"
    assert workspace.Grep("os", A, output_mode="content", head_limit=1) == "import os"
    assert workspace.Grep("def", A, output_mode="content", **{"-A": 1, "-n": True}) == "3:def f():\n4-    return os"
    assert workspace.Grep("nowhere") == "No files found"
    assert workspace.Grep("nowhere", output_mode="content") == "No matches found"
    assert workspace.Grep(r"os\n\ndef", multiline=True) == f"Found 1 file\n{A}"


def test_wide_context_shows_each_line_once(workspace):
    workspace.Write("/big.txt", "x\n" * 20_000)
    started = time.perf_counter()
    shown = workspace.Grep("x", "/big.txt", output_mode="content", **{"-C": 10**9})
    assert shown.startswith("x\nx\n") and time.perf_counter() - started < 5


def test_a_recorded_search_is_answered_even_when_memory_cannot(session):
    step = session.call("Grep", "a\nb", pattern="a\nb", multiline=True, output_mode="content")
    assert session.at(step).Grep("a\nb", multiline=True, output_mode="content") == "a\nb"


def test_grep_errors(workspace):
    for arguments, message in (
        ({"path": "/no/where"}, "Path does not exist"),
        ({"output_mode": "lines"}, "must be one of"),
        ({"type": "cobol"}, "unrecognized file type"),
        ({"multiline": True, "output_mode": "content"}, "multiline search with another"),
        ({"pattern": "(?=f)"}, "look-around"),
        ({"glob": "a" * 2000}, "invalid glob"),
    ):
        with pytest.raises(ToolError, match=message):
            workspace.Grep(**{"pattern": "f", **arguments})


def test_glob_and_ls(workspace):
    assert workspace.Glob("**/*.ts") == B
    assert workspace.Glob("*.ts", path="/home/dev/app/src") == B
    assert workspace.Glob("/home/**/a.py") == A
    assert workspace.Glob("*.md") == "No files found"
    assert workspace.LS("/home/dev/app") == "- /home/dev/app/\n  - a.py\n  - src/"
    with pytest.raises(ToolError, match="Directory does not exist"):
        workspace.LS("/nope")
