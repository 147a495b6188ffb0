"""Outcome and error class of tool results: precision first."""

from __future__ import annotations

import json

import pytest

from composer_plugins.traces.classify import ERROR_CLASSES, RULES, classify_text
from composer_plugins.traces.schema import Status

TRACEBACK = """Traceback (most recent call last):
  File "/app/run.py", line 3, in <module>
    main()
ValueError: bad value
"""
FLAGGED = [
    ("<tool_use_error>File has not been read yet. Read it first before writing to it.</tool_use_error>", "Edit", "file_not_read"),
    ("<tool_use_error>String to replace not found in file.\nString: x</tool_use_error>", "Edit", "edit_no_match"),
    ("<tool_use_error>Found 3 matches of the string to replace, but replace_all is false.</tool_use_error>", "Edit", "edit_ambiguous"),
    ("<tool_use_error>File has been modified since read, either by the user or by a linter.</tool_use_error>", "Write", "file_modified"),
    ("<tool_use_error>InputValidationError: Read failed due to: required parameter `file_path` is missing</tool_use_error>", "Read", "invalid_arguments"),
    ("<tool_use_error>Error: No such tool available: Foo</tool_use_error>", "Foo", "unknown_tool"),
    ("<tool_use_error>File does not exist.</tool_use_error>", "Read", "file_not_found"),
    ("EISDIR: illegal operation on a directory, read", "Read", "is_directory"),
    ("Exit code 127\n/bin/bash: line 1: foo: command not found", "Bash", "command_not_found"),
    ("Exit code 1\nfatal: not a git repository (or any of the parent directories): .git", "Bash", "git_error"),
    ("Exit code 1\nls: cannot access 'x': No such file or directory", "Bash", "file_not_found"),
    ("Exit code 2\nsomething odd", "Bash", "nonzero_exit"),
    ("Command timed out after 2m 0.0s", "Bash", "timeout"),
    ("Request failed with status code 404", "WebFetch", "http_error"),
    ("src/a.ts(3,1): error TS2304: Cannot find name 'x'.", "Bash", "type_check"),
    ("Exit code 1\n" + TRACEBACK, "Bash", "python_error"),
    ("File content (30000 tokens) exceeds maximum allowed tokens (25000).", "Read", "too_large"),
    ("ls in '/etc' was blocked. For security, Claude Code may only list files in the allowed working directories", "Bash", "path_blocked"),
    ("something entirely new went wrong", "Frobnicate", "tool_error"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "tool", "error_class"), FLAGGED, ids=[c + str(i) for i, (_, _, c) in enumerate(FLAGGED)]
)
def test_flagged_results_get_a_class(text, tool, error_class):
    status, found, _ = classify_text(text, flagged=True, tool=tool)
    assert (status, found) == (Status.ERROR, error_class)


HUMAN = [
    ("The user doesn't want to proceed with this tool use. The tool use was rejected (eg. if it was a file edit, "
     "the new_string was NOT written to the file). STOP what you are doing.", "Edit", "user_rejected"),
    ("The user doesn't want to proceed with this tool use. The tool use was rejected. To tell you how to proceed, "
     "the user said:\nuse yarn", "Bash", "user_feedback"),
    ("please add transformer.js too first", "Bash", "user_feedback"),
    ("no, keep the old name", "Edit", "user_feedback"),
    ("Claude requested permissions to use WebSearch, but you haven't granted it yet.", "WebSearch", "permission_denied"),
    ("This command requires approval", "Bash", "permission_denied"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "tool", "error_class"), HUMAN)
def test_what_the_human_did_is_not_an_environment_error(text, tool, error_class):
    assert classify_text(text, flagged=True, tool=tool)[:2] == (Status.HUMAN_REJECT, error_class)


@pytest.mark.parametrize("text", ["[Request interrupted by user for tool use]", "Permission prompt was aborted."])
def test_interruptions(text):
    assert classify_text(text, flagged=True, tool="Bash")[:2] == (Status.INTERRUPTED, "interrupted")


INFERRED = [
    ("bash: foo: command not found", "Bash", "command_not_found", None),
    ("/bin/sh: 1: node: not found", "Bash", "command_not_found", None),
    ("zsh: command not found: pnpm", "Bash", "command_not_found", None),
    ("some output\n" + TRACEBACK, "Bash", "python_error", None),
    ("cat: x.txt: No such file or directory", "Bash", "file_not_found", None),
    ("Exit code 3\nboom", "Bash", "nonzero_exit", 3),
    ("output\n[exit code: 2]", "run", "nonzero_exit", 2),
    ("<tool_use_error>File has not been read yet.</tool_use_error>", "Edit", "file_not_read", None),
    ("===== 2 failed, 3 passed in 0.12s =====", "Bash", "test_failure", None),
    (str({"error": "Unknown tool frob"}), None, "unknown_tool", None),
    (str({"error": "run() got an unexpected keyword argument 'x'"}), "run", "invalid_arguments", None),
    (json.dumps({"error": "division by zero"}), "calc", "tool_error", None),
]


@pytest.mark.parametrize(("text", "tool", "error_class", "code"), INFERRED, ids=[f"{c}{i}" for i, (_, _, c, _) in enumerate(INFERRED)])  # fmt: skip
def test_unflagged_failures_are_inferred_from_their_shape(text, tool, error_class, code):
    assert classify_text(text, tool=tool) == (Status.INFERRED_ERROR, error_class, code)


GOOD = [
    ("", "Bash"),
    ("Exit code 0\nall fine", "Bash"),
    ("   1\tTraceback (most recent call last):\n   2\tValueError: x", "Read"),
    (TRACEBACK, "Read"),
    ("docs/faq.md:12: if you see 'bash: foo: command not found', install it", "Bash"),
    ("docs say: cat: x: No such file or directory\nand then go on\nwith more text", "Bash"),
    (TRACEBACK + "\nThe log ends here; the service has been restarted.\nAll good now.", "Bash"),
    ("The docs describe `exit code 1`\nas a failure", "WebFetch"),
    ("Error handling in Rust uses Result<T, E>. error: this is prose", "WebSearch"),
    ('{"error": null, "result": 3}', "api"),
    ('{"error": "x", "data": [1, 2]}', "api"),
    ("{'error': 0}", "api"),
    ("5 passed, 0 failed in 3s", "Bash"),
    ("Permission denied is the title of the page", "WebFetch"),
    ("please add transformer.js too first", "Bash"),
]


@pytest.mark.parametrize(("text", "tool"), GOOD)
def test_good_results_stay_good(text, tool):
    assert classify_text(text, tool=tool)[0] is Status.OK


def test_a_class_is_given_exactly_when_something_went_wrong():
    for text, tool, *_ in FLAGGED + HUMAN + INFERRED + GOOD:
        for flagged in (True, False):
            status, error_class, _ = classify_text(text, flagged=flagged, tool=tool)
            assert (status is Status.OK) == (error_class is None)
            assert error_class is None or error_class in ERROR_CLASSES
            assert not (flagged and status in (Status.OK, Status.INFERRED_ERROR))


def test_the_quick_way_out_never_changes_the_answer():
    for rule in RULES:
        if rule.needs:
            for text, *_ in FLAGGED + HUMAN + INFERRED:
                assert not rule.pattern.search(text) or rule.needs in text, rule


def test_huge_results_are_cheap():
    import time

    text = "x = 1\n" * 500_000
    start = time.perf_counter()
    assert classify_text(text, tool="Bash")[0] is Status.OK
    assert classify_text(text + "bash: foo: command not found", tool="Bash")[0] is Status.INFERRED_ERROR
    assert time.perf_counter() - start < 0.5
