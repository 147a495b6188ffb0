"""Any JSON arguments whatever: only `ToolError` or a `TypeError` about argument names, and quickly."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_plugins.envs import RecordedWorkspace, ToolError, tool_schemas
from composer_plugins.traces.schema import Status

NAMES = sorted(tool_schemas(RecordedWorkspace))
ARGUMENTS = sorted(
    {p for schema in tool_schemas(RecordedWorkspace).values() for p in schema["parameters"]["properties"]}
    | {"-i", "-n", "-A", "-B", "-C", "ignore", "run_in_background", "_flags", "self", "wrong"}
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["/home/dev/app/a.py", "a.py", "/", "..", "~", "", "pwd", "cat a.py", "ls ..", "head -n x a.py"]),
    st.text("ab*?.[]{}()|^$+\\,!-/", max_size=30),
    st.sampled_from(["content", "count", "files_with_matches", "py", "one", "\n", "\ufdd0", "\ufdd1", "\ud800", "\0"]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
PLAUSIBLE = st.one_of(TEXTS, TEXTS, JSON)


@st.composite
def calls(draw):
    name = draw(st.sampled_from(NAMES))
    parameters = tool_schemas(RecordedWorkspace)[name]["parameters"]
    arguments = {key: draw(PLAUSIBLE) for key in parameters["required"] if draw(st.integers(0, 9))}
    for key in draw(st.lists(st.sampled_from([*parameters["properties"], *ARGUMENTS]), max_size=3)):
        arguments[key] = draw(JSON)
    return name, arguments


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(calls(), min_size=1, max_size=4))
def test_only_tool_errors_and_argument_name_errors(session, cat_n, sequence):
    if not session.trace.steps:
        session.call("Read", cat_n("one\ntwo"), file_path="/home/dev/app/a.py")
        session.call("Bash", "", status=Status.ERROR, command="pwd")
    workspace = session.at(1, max_result_chars=160)
    for name, arguments in sequence:
        started = time.perf_counter()
        try:
            shown = getattr(workspace, name)(**arguments)
        except ToolError as error:
            shown = str(error)
        except TypeError as error:
            assert "argument" in str(error)  # Python's own words about names, not a crash inside
            continue
        assert isinstance(shown, str) and len(shown) <= 160
        assert time.perf_counter() - started < 5


def test_a_huge_edit_is_refused_quickly(session):
    workspace = session.at(session.call("Bash", "", command="true"))
    workspace.Write("/x", "a" * 100_000)
    with pytest.raises(ToolError, match="too large"):
        workspace.Edit("/x", "a", "b" * 1000, replace_all=True)
    with pytest.raises(ToolError, match="longer than"):
        workspace.Write("/x", "a" * 3_000_000)
