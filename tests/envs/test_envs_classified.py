"""The workspace's errors, as a host renders them, are recognised by the trace classifier."""

from __future__ import annotations

import pytest

from composer_plugins.envs.tool_errors import NOT_RECORDED
from composer_plugins.traces.classify import classify_text
from composer_plugins.traces.schema import Status

A = "/home/dev/app/a.py"
CASES = [
    ("Read", {"file_path": "/no.py"}, "file_not_found"),
    ("Read", {"file_path": "/home/dev"}, "is_directory"),
    ("Read", {"file_path": 1}, "invalid_arguments"),
    ("Read", {}, "invalid_arguments"),
    ("Read", {"file_path": A, "lines": 3}, "invalid_arguments"),
    ("Write", {"file_path": "/home/dev/app/b.py", "content": ""}, "file_not_read"),
    ("Edit", {"file_path": "/home/dev/app/b.py", "old_string": "x", "new_string": "y"}, "file_not_read"),
    ("Edit", {"file_path": A, "old_string": "four" * 99, "new_string": "y"}, "edit_no_match"),
    ("Edit", {"file_path": A, "old_string": "t", "new_string": "y"}, "edit_ambiguous"),
    ("Edit", {"file_path": A, "old_string": "t", "new_string": "t"}, "edit_no_change"),
    ("Edit", {"file_path": "/no.py", "old_string": "t", "new_string": "y"}, "file_not_found"),
    ("Edit", {"file_path": A, "old_string": "", "new_string": "y"}, "already_exists"),
    ("Grep", {"pattern": "x", "path": "/nowhere"}, "file_not_found"),
    ("Grep", {"pattern": "x", "output_mode": "all"}, "invalid_arguments"),
    ("LS", {"path": "/nowhere"}, "file_not_found"),
    ("TodoWrite", {"todos": [{}]}, "invalid_arguments"),
    ("Bash", {"command": "cat no.txt"}, "file_not_found"),
]


@pytest.fixture
def workspace(session, cat_n):
    session.call("Read", cat_n("one\ntwo\nthree"), file_path=A)
    step = session.call("Bash", "use yarn", status=Status.HUMAN_REJECT, command="npm i")
    session.call("Read", cat_n("x"), file_path="/home/dev/app/b.py")
    return session.at(step, max_result_chars=160)


def rendered(workspace, tool, arguments) -> str:
    """What a host shows for a call: TRL puts an exception's text into {"error": ...} and calls str."""
    try:
        return str(getattr(workspace, tool)(**arguments))
    except Exception as error:
        return str({"error": str(error)})


@pytest.mark.parametrize(("tool", "arguments", "expected"), CASES)
def test_errors_are_recognised(workspace, tool, arguments, expected):
    status, error_class, _ = classify_text(rendered(workspace, tool, arguments), tool=tool)
    assert (status.failed, error_class) == (True, expected)


def test_a_refusal_is_recognised_as_a_humans(workspace):
    shown = rendered(workspace, "Bash", {"command": "npm i"})
    assert "use yarn" in shown
    assert classify_text(shown, tool="Bash")[:2] == (Status.HUMAN_REJECT, "user_feedback")


def test_successes_are_not_taken_for_errors(workspace):
    for tool, arguments in (("Read", {"file_path": A}), ("Bash", {"command": "ls"}), ("Grep", {"pattern": "none"})):
        assert classify_text(rendered(workspace, tool, arguments), tool=tool)[0] is Status.OK


def test_what_the_log_cannot_answer_is_an_error_with_its_own_beginning(workspace):
    shown = rendered(workspace, "Bash", {"command": "make everything"})
    assert shown.startswith(str({"error": NOT_RECORDED})[:-2])
    assert classify_text(shown, tool="Bash")[0].failed
