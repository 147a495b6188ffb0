"""How a tool call ended, read from its result: flagged, inferred, human, interrupted.

Readers and live rollouts call one function:

    classify_text(text, *, flagged=False, tool=None, exit_code=None) -> (status, error class or None, exit code or None)

`flagged` is what the format itself says, `exit_code` what it records beside the text; nothing else of a format needs
mapping, because the agents' own sentences and wrappings are known here (`classify_rules`, `classify_shape`). One table
names the error classes; `composer_plugins/hints/templates.toml` has a template for each. Precision comes before
recall: a result that nobody flagged counts as an error only when its shape, and not merely a word in it, says so.
Reading a file that contains a traceback is not an error. How well it does: docs/reference/hints.md.
"""

from __future__ import annotations

import re

from composer_plugins.traces.classify_rule import Rule, RuleSet
from composer_plugins.traces.classify_rules import HUMAN_RULES, RULES
from composer_plugins.traces.classify_shape import error_object, plain, split_exit, untag
from composer_plugins.traces.schema import Status

#: How much of each end of a result is searched: errors stand at the ends, and megabytes must stay cheap.
WINDOW = 4000

#: Tools whose results quote other texts (files, pages, listings, the edited lines), so that only the tool's own error
#: form counts without a flag. By agent: Claude Code, our sandbox, Gemini CLI, Cline, SWE-agent, OpenHands.
QUOTING_TOOLS = frozenset(
    [
        "Read",
        "Grep",
        "Glob",
        "LS",
        "NotebookRead",
        "WebFetch",
        "WebSearch",
        "Task",
        "Agent",
        "TaskOutput",
        "BashOutput",
        "TodoWrite",
        "TodoRead",
        "ToolSearch",
        "Edit",
        "MultiEdit",
        "Write",
        "NotebookEdit",
        "ExitPlanMode",
        "AskUserQuestion",
        "SendMessage",
        "read_file",
        "grep",
        "search",
        "glob",
        "list_directory",
        "read_many_files",
        "search_file_content",
        "google_web_search",
        "web_fetch",
        "save_memory",
        "replace",
        "write_file",
        "list_files",
        "search_files",
        "list_code_definition_names",
        "replace_in_file",
        "write_to_file",
        "read_files",
        "open",
        "goto",
        "scroll_up",
        "scroll_down",
        "search_dir",
        "search_file",
        "find_file",
        "edit",
        "create",
        "insert",
        "str_replace_editor",
        "file_editor",
        "apply_patch",
        "view_image",
        "update_plan",
        "think",
        "finish",
        "submit",
    ]
)

#: Claude Code asks before these run and marks their own errors with a tag or a known sentence: any other
#: flagged text is what the human typed at the permission prompt.
ASKING_TOOLS = frozenset(["Edit", "MultiEdit", "Write", "NotebookEdit", "ExitPlanMode", "AskUserQuestion"])

#: The rules that need no flag: those about the start of a result, and those that are searched.
INFERRING: tuple[Rule, ...] = tuple(r for r in RULES if r.infers)
_TIED = RuleSet(r for r in INFERRING if r.tied)
_SEARCHED = RuleSet(r for r in INFERRING if not r.tied)
_HUMAN = RuleSet(HUMAN_RULES)
_NAMING = RuleSet(r for r in RULES if r not in HUMAN_RULES)

#: Class of a failed result that no rule names, and of a bare exit code.
DEFAULT_CLASS, EXIT_CLASS = "tool_error", "nonzero_exit"

#: Every class that `classify_text` can return: the hint templates must cover it (a test says so).
ERROR_CLASSES: tuple[str, ...] = tuple(dict.fromkeys([r.error_class for r in RULES] + [DEFAULT_CLASS, EXIT_CLASS]))

#: A sentence: words first, no `program: message`, no word that programs use when they fail.
_PROSE = re.compile(
    r"\A(?![^\n]*(?i:\b(?:errors?|failed|failure|fatal|warning|denied|cannot|unable|invalid|usage|exception)\b))"
    r"(?!\S+: )[A-Za-z']+,?(?: \S+){3,}"
)
_EXIT_LINE = re.compile(r"\A(?:Error: )?Exit code:? -?\d+[ \t]*\n?|\A<returncode>-?\d+</returncode>\n?(?:<output>\n?)?")
_LAST_LINE = re.compile(r"([^\n]*)\s*\Z")


def classify_text(
    text: str, *, flagged: bool = False, tool: str | None = None, exit_code: int | None = None
) -> tuple[Status, str | None, int | None]:
    """Classify one tool result, recorded or live.

    Args:
        text: the result as text, with or without its format's wrapping (exit code lines, Codex's JSON, Gemini
            CLI's labelled lines, `<returncode>`). A whole result of the form `{"error": ...}` (JSON, or the
            Python form in which TRL renders a tool's exception), or an object that says of itself
            `"success": false`, is an error.
        flagged: the log, or the host, marked it as an error.
        tool: name of the called tool; tools that quote other texts are inferred from less.
        exit_code: the exit code that the format records beside the text; it comes before one in the text. A code
            of 1 with no output at all is how grep, diff and test say "no": not an error unless flagged.

    Returns:
        (status, error class or None, exit code or None). The class is None exactly when the status is `ok`.
    """
    body, written = split_exit(text)
    code = exit_code if exit_code is not None else written
    wrapped = error_object(body)
    if wrapped is not None and (
        flagged or tool not in QUOTING_TOOLS or body.lstrip()[1:9].strip("'\" ").startswith("error")
    ):
        return _wrapped(wrapped, flagged, tool, code)
    body, tagged = untag(body)
    ends = plain(_ends(body))
    if flagged or tagged:
        return *_flagged(ends, tagged, tool, code, flagged), code
    rule = _inferred(ends, tool)
    if rule is not None:
        status = Status.INFERRED_ERROR if rule.status is Status.ERROR else rule.status
        return status, _refined(rule, ends), code
    if code and tool not in QUOTING_TOOLS:
        printed = _EXIT_LINE.sub("", ends).strip()
        if printed or code != 1:
            return Status.INFERRED_ERROR, _named(ends) or EXIT_CLASS, code
    return Status.OK, None, code


def _inferred(ends: str, tool: str | None) -> Rule | None:
    """The first rule that makes an unflagged result an error."""
    quoting = tool in QUOTING_TOOLS
    if _TIED.may_start(ends):
        rule = next((r for r in _TIED.rules if (r.quoted or not quoting) and r.found_in(ends)), None)
        if rule is not None:
            return rule
    return None if quoting else next(_SEARCHED.holding(ends), None)


def _flagged(ends: str, tagged: bool, tool: str | None, exit_code: int | None, flagged: bool) -> tuple[Status, str]:
    human = next(_HUMAN.one_by_one(ends), None)
    if human is not None:
        return human.status, human.error_class
    named = _named(ends)
    if named is None and not tagged and exit_code is None and _typed_by_human(ends, tool):
        return Status.HUMAN_REJECT, "user_feedback"
    return (
        Status.ERROR if flagged else Status.INFERRED_ERROR,
        named or (EXIT_CLASS if exit_code else DEFAULT_CLASS),
    )


def _typed_by_human(text: str, tool: str | None) -> bool:
    """True for a flagged text that no tool writes: what was typed at the permission prompt."""
    if tool in ASKING_TOOLS:
        return True
    return tool == "Bash" and len(text) < 1000 and text.count("\n") < 4 and _PROSE.match(text) is not None


def _wrapped(inner: str, flagged: bool, tool: str | None, exit_code: int | None):
    status, error_class, inner_code = classify_text(inner, flagged=True, tool=tool) if inner else (None, None, None)
    if status in (Status.HUMAN_REJECT, Status.INTERRUPTED) and tool not in ASKING_TOOLS:
        return status, error_class, inner_code
    known = error_class if status is Status.ERROR else DEFAULT_CLASS
    return (
        (Status.ERROR if flagged else Status.INFERRED_ERROR),
        known,
        exit_code if exit_code is not None else inner_code,
    )


def _refined(rule: Rule, ends: str) -> str:
    """Class of an inferred failure: the rule's own, unless that is a last resort and the text says more."""
    return (_named(ends) or rule.error_class) if rule.vague else rule.error_class


def _named(text: str) -> str | None:
    """Class of a text known to be an error, from the rules about errors only.

    A traceback is named by its last line, where the exception stands; the lines above quote code.
    """
    text = _ends(text, WINDOW // 2)
    if "Traceback (most" in text:
        last = _LAST_LINE.search(text[-2000:]).group(1).strip()
        named = _first(last)
        if named not in (None, "python_error"):
            return named
    return _first(text)


def _first(text: str) -> str | None:
    """Class of the first rule that holds; a vague one only when no other does."""
    vague = None
    for rule in _NAMING.one_by_one(text):
        if not rule.vague:
            return rule.error_class
        vague = vague or rule.error_class
    return vague


def _ends(text: str, window: int = WINDOW) -> str:
    return text if len(text) <= 2 * window else text[:window] + "\n" + text[-window:]
