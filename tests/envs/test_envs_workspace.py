"""The tools on small sessions: semantics, error texts, isolation, results' length."""

from __future__ import annotations

import inspect

import pytest

from composer_plugins.envs import RecordedWorkspace, Recordings, ToolError, environment_factory, tool_schemas
from composer_plugins.errors import ConfigError, TraceError
from composer_plugins.traces.schema import Status

CWD = "/home/dev/app"
A, B = f"{CWD}/a.py", f"{CWD}/src/b.py"


@pytest.fixture
def end(session, cat_n):
    """A workspace that has read a.py (three lines) and lines 10-12 of b.py."""
    session.call("Read", cat_n("one\ntwo\nthree"), file_path=A)
    session.call("Read", cat_n("ten\neleven\ntwelve", 10), file_path=B, offset=10, limit=3)
    return session.at(session.call("Bash", "hello", command="echo   hello"))


def fails(message, tool, *args, **kwargs):
    with pytest.raises(ToolError) as caught:
        tool(*args, **kwargs)
    assert message in str(caught.value)


def test_only_what_came_before_the_step_has_been_read(session, cat_n):
    step = session.call("Read", cat_n("x = 1"), file_path=A)
    before, after = session.at(step), session.at(session.call("Bash", "", command="true"))
    assert A in before.files and not before.files_read
    assert after.files_read == {A}
    fails("has not been read yet", before.Edit, A, "x", "y")
    fails("has not been read yet", before.Write, A, "y")


def test_edit_errors_and_success(end):
    fails("String to replace not found in file.\nString: four", end.Edit, A, "four", "5")
    fails("Found 2 matches of the string to replace, but replace_all is false.", end.Edit, A, "t", "T")
    fails("exactly the same", end.Edit, A, "one", "one")
    fails("File does not exist.", end.Edit, f"{CWD}/no.py", "a", "b")
    fails("file already exists", end.Edit, A, "", "b")
    fails("EISDIR", end.Read, CWD)
    assert "     2→TWO" in end.Edit(A, "two", "TWO")
    assert "All occurrences" in end.Edit(A, "T", "t", replace_all=True)
    assert end.files[A] == "one\ntWO\nthree"


def test_deleting_a_line_leaves_no_empty_line(end):
    end.Edit(A, "two", "")
    assert end.files[A] == "one\nthree"


def test_edits_in_a_partly_known_file_shift_the_gaps(end):
    fails("not recorded in this session: these lines of b.py", end.Read, B, offset=1, limit=3)
    end.Edit(B, "eleven", "eleven\nand a half")
    assert end.Read(B, offset=10, limit=4).splitlines()[-1].endswith("13→twelve")
    assert "[9 lines not recorded]" in end.Read(B)
    assert end.Read(B).endswith("[1 or more lines not recorded]")


def test_a_gap_is_never_matched_and_never_half_overwritten(end):
    gap, rest = end.files[B].split("\n")[0], end.files[B].split("\n")[-1]
    for old in (gap, rest, f"{gap}\nten", f"twelve\n{rest}"):
        fails("String to replace not found", end.Edit, B, old, "x")
    assert end.Grep(".", B, output_mode="count").startswith(f"{B}:3")
    end.Edit(B, "eleven\ntwelve\n", "x")
    end.Edit(B, "\nten", "")
    assert end.files[B].split("\n") == [gap] * 8 + [rest]  # the line break of the line goes with it


def test_write_creates_then_overwrites(end):
    new = f"{CWD}/new/file.txt"
    assert end.Write(new, "1\n") == f"File created successfully at: {new}"
    assert "has been updated" in end.Write(new, "2\n")
    assert end.Read(new) == "     1→2\n     2→"
    assert end.Bash(f"cat {new}") == "2\n"


def test_relative_paths(end):
    assert end.Read("a.py") == end.Read(A)
    assert "ten" in end.Read("b.py")
    end.Write(f"{CWD}/lib/b.py", "")
    fails("could be 2 files", end.Read, "b.py")


def test_bash_answers_only_what_it_knows(end):
    assert end.Bash(" echo hello ", description="again") == "hello"
    assert end.Bash("pwd") == CWD
    assert end.Bash("ls") == "a.py\nsrc"
    assert end.Bash(f"cat {A}") == "one\ntwo\nthree"
    assert end.Bash("head -n 1 a.py") == end.Bash("head -1 a.py") == "one"
    assert end.Bash("wc -l a.py").split() == ["2", "a.py"]
    fails("No such file or directory", end.Bash, "cat missing.txt")
    for command in ("rm -rf /", "cat b.py", "cat a.py; pwd", "ls $(pwd)", "head -n -1 a.py", 'echo "', "", "ls -la"):
        fails("not recorded in this session", end.Bash, command)


def test_recorded_failures_fail_and_rejections_name_the_user(session):
    step = session.call("Bash", "boom", status=Status.ERROR, exit_code=2, command="make")
    session.call("Bash", "FAILED 3 tests", status=Status.INFERRED_ERROR, command="pytest")
    session.call("Bash", "use yarn", status=Status.HUMAN_REJECT, command="npm i")
    session.call("Write", "no", status=Status.HUMAN_REJECT, file_path=A, content="x")
    workspace = session.at(step)
    fails("Exit code 2\nboom", workspace.Bash, "make")
    fails("FAILED 3 tests", workspace.Bash, "pytest")
    fails("use yarn", workspace.Bash, "npm i")
    fails("The user doesn't want to proceed", workspace.Bash, "npm i")
    fails("The user doesn't want to proceed", session.at(3).Write, A, "x")
    assert session.at(3).Write(A, "something else").startswith("File created")


def test_the_nearest_recorded_run_is_taken(session):
    session.call("Bash", "first", command="git status")
    session.call("Write", f"File created successfully at: {A}", file_path=A, content="x")
    session.call("Bash", "second", command="git status")
    last = session.call("Write", f"File created successfully at: {B}", file_path=B, content="x")
    assert [session.at(s).Bash("git status") for s in (0, 1, 2, last)] == ["first", "first", "second", "second"]


def test_the_next_run_comes_before_the_last(session):
    for shown in ("first", "second", "third"):
        session.call("Bash", shown, command="git status")
    assert [session.at(s).Bash("git status") for s in (0, 1, 2)] == ["first", "second", "third"]


def test_after_a_change_searches_are_made_in_memory(session):
    step = session.call("Grep", "No files found", pattern="needle")
    session.call("Bash", "", command=f"cat {A}")
    workspace = session.at(step)
    assert workspace.Grep("needle") == "No files found"
    workspace.Write(A, "needle")
    assert workspace.Grep("needle") == f"Found 1 file\n{A}"


def test_recorded_shell_effects(session, cat_n):
    session.call("Read", cat_n("x"), file_path=A)
    session.call("Bash", "", command=f"cp {A} {B} && cd {CWD} && git rm -f a.py")
    end = session.at(session.call("Bash", "", command="true"))
    assert end.files == {B: "x"}
    fails("has not been read yet", end.Edit, B, "x", "y")


def test_a_restarted_session_forgets_what_it_had_read(session, cat_n):
    session.call("Read", cat_n("x"), file_path=A)
    kept = session.call("Bash", "", command="true")
    session.user("go on")
    error = "<tool_use_error>File has not been read yet. Read it first before writing to it.</tool_use_error>"
    step = session.call("Edit", error, status=Status.ERROR, file_path=A, old_string="x", new_string="y")
    assert session.at(kept).files_read == {A}
    fails("has not been read yet", session.at(step).Write, A, "another edit")


def test_an_edit_that_succeeded_had_been_allowed(session, cat_n):
    session.call("Read", cat_n("x"), file_path=A)
    session.call("Read", cat_n("x"), file_path=B)
    session.user("go on")
    error = "<tool_use_error>File has not been read yet. Read it first before writing to it.</tool_use_error>"
    session.call("Edit", error, status=Status.ERROR, file_path=A, old_string="x", new_string="y")
    step = session.call("Edit", f"The file {B} has been updated.", file_path=B, old_string="x", new_string="y")
    assert session.at(step).files_read == {B}


def test_the_listing_after_an_edit_is_the_truth(session, cat_n):
    result = f"The file {A} has been updated. Here's the result of running `cat -n` on a snippet of the edited file:\n"
    session.call("Read", cat_n("a = 1\nb = 2"), file_path=A)
    session.call("Edit", result + "     1→a = 'formatted'\n     2→b = 2", file_path=A, old_string="1", new_string="3")
    assert session.at(session.call("Bash", "", command="true")).files[A] == "a = 'formatted'\nb = 2"


def test_a_change_made_outside_is_seen_after_the_user_had_the_turn(session, cat_n):
    session.call("Read", cat_n("old"), file_path=A)
    before = session.call("Bash", "", command="true")
    session.user("I changed a.py")
    step = session.call("Bash", "", command="date")
    session.call("Read", cat_n("new\nlines"), file_path=A)
    assert session.at(before).files[A] == "old"
    assert session.at(step).files[A] == "new\nlines"


def test_the_future_never_shows_through_a_change(session, cat_n):
    step = session.call("Bash", "", command="true")
    session.call("Bash", "", command=f"python make.py > {A}")
    session.call("Write", f"The file {B} has been updated. Here's ...", file_path=B, content="new")
    session.call("Read", cat_n("made"), file_path=A)
    session.call("Read", cat_n("new"), file_path=B)
    workspace = session.at(step)
    assert A not in workspace.files
    fails("not recorded", workspace.Read, B)
    fails("has not been read yet", workspace.Write, B, "x")


def test_an_edit_in_a_gap_is_placed_by_its_result(session, cat_n):
    result = f"The file {A} has been updated. Here's the result of running `cat -n` on a snippet of the edited file:\n"
    session.call("Read", cat_n("tail", 9), file_path=A, offset=9, limit=1)
    arguments = {"file_path": A, "old_string": "b", "new_string": "B1\nB2"}
    step = session.call("Edit", result + "     3→a\n     4→B1\n     5→B2\n     6→c", **arguments)
    after = session.call("Bash", "", command="true")
    assert session.at(step).Read(A, 3, 3) == "     3→a\n     4→b\n     5→c"
    assert session.at(step).Edit(**arguments)
    assert session.at(after).Read(A, 10, 1) == "    10→tail"


def test_todos(end):
    done = {"content": "x", "status": "completed", "activeForm": "Doing x"}
    assert end.TodoWrite([done]).startswith("Todos have been modified successfully")
    assert end.todos == [done]
    fails("InputValidationError", end.TodoWrite, [{"content": "x", "status": "maybe"}])
    fails("InputValidationError", end.TodoWrite, "x")


@pytest.mark.parametrize(
    ("tool", "arguments", "type_name"),
    [
        ("Read", {"file_path": 3}, "number"),
        ("Read", {"file_path": A, "offset": "1"}, "string"),
        ("Read", {"file_path": A, "limit": True}, "boolean"),
        ("Edit", {"file_path": A, "old_string": None, "new_string": ""}, "null"),
        ("Grep", {"pattern": ["x"]}, "array"),
        ("Grep", {"pattern": "x", "-n": 1}, "number"),
        ("Bash", {"command": {}}, "object"),
    ],
)
def test_wrong_types_are_named(end, tool, arguments, type_name):
    fails(f"but provided as `{type_name}`", getattr(end, tool), **arguments)


def test_missing_and_unknown_argument_names_raise_type_errors(end):
    for arguments in ({}, {"path": A}, {"file_path": A, "nope": 1}, {"_flags": {}}):
        with pytest.raises(TypeError, match="argument"):
            end.Read(**arguments)


def test_results_and_errors_are_shortened(session, cat_n):
    session.call("Read", cat_n("long line\n" * 100), file_path=A)
    workspace = session.at(session.call("Bash", "", command="true"), max_result_chars=160)
    shown = workspace.Read(A)
    assert len(shown) == 160 and shown.startswith("     1→long line") and "characters]" in shown
    with pytest.raises(ToolError) as caught:
        workspace.Edit(A, "y" * 500, "")
    assert len(str(caught.value)) == 160
    with pytest.raises(ConfigError, match="at least 40"):
        RecordedWorkspace([], max_result_chars=10)


def test_instances_and_resets_are_isolated(session, other_session, cat_n):
    session.call("Read", cat_n("x"), file_path=A)
    step = session.call("Bash", "", command="true")
    other_session.call("Bash", "other", command="whoami")
    make = environment_factory([session.trace, other_session.trace])
    first, second = make(), make()
    for workspace in (first, second):
        assert workspace.reset(trace_id="t", step=step, prompt=[], unused=1) is None
    first.Edit(A, "x", "y")
    first.TodoWrite([{"content": "c", "status": "pending"}])
    assert second.files == {A: "x"} and second.todos == []
    first.reset(trace_id="t", step=step)
    assert first.files == {A: "x"} and first.todos == []
    first.reset(trace_id="other", step=0)
    assert first.files == {} and first.Bash("whoami") == "other"


def test_bad_rows_are_data_errors(session):
    session.call("Bash", "", command="true")
    workspace = RecordedWorkspace([session.trace])
    for row in ({}, {"trace_id": "nope", "step": 0}, {"trace_id": "t", "step": 7}, {"trace_id": "t", "step": "0"}):
        with pytest.raises(TraceError, match="same traces file"):
            workspace.reset(**row)
    with pytest.raises(TraceError, match="unique"):
        Recordings([session.trace, session.trace])


def test_schemas_equal_those_of_transformers():
    get_json_schema = pytest.importorskip("transformers.utils").get_json_schema
    schemas = tool_schemas(RecordedWorkspace)
    assert sorted(schemas) == ["Bash", "Edit", "Glob", "Grep", "LS", "Read", "TodoWrite", "Write"]
    for name, schema in schemas.items():
        assert get_json_schema(getattr(RecordedWorkspace([]), name))["function"] == schema


def test_fewer_tools_are_fewer_functions(session):
    session.call("Bash", "", command="true")
    workspace = environment_factory([session.trace], tools=["Read", "Bash"])()
    public = [n for n, _ in inspect.getmembers(type(workspace), inspect.isfunction) if not n.startswith("_")]
    assert public == ["Bash", "Read", "reset"]
    assert sorted(tool_schemas(type(workspace))) == ["Bash", "Read"]
    with pytest.raises(ConfigError, match="expected some of Bash"):
        environment_factory([], tools=["Reed"])
