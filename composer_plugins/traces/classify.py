"""How a tool call ended, read from its result: flagged, inferred, human, interrupted.

One table names the error classes; `composer_plugins/hints/templates.toml` has a template for each. Precision
comes before recall: a result that nobody flagged counts as an error only when its shape, and not merely a
word in it, says so. Reading a file that contains a traceback is not an error.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass

from composer_plugins.traces.schema import Status

#: How much of each end of a result is searched: errors stand at the ends, and megabytes must stay cheap.
WINDOW = 4000

#: Tools whose results quote other texts, so that only the tool's own error form counts without a flag.
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
        "read_file",
        "grep",
        "search",
    ]
)

#: Claude Code asks before these run and marks their own errors with a tag or a known sentence: any other
#: flagged text is what the human typed at the permission prompt.
ASKING_TOOLS = frozenset(["Edit", "MultiEdit", "Write", "NotebookEdit", "ExitPlanMode", "AskUserQuestion"])


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
        error_class: names the template in `hints/templates.toml`.
        pattern: searched in the result (multi-line).
        infers: the pattern alone makes an unflagged result an error; otherwise it only names the class.
        quoted: with `infers`, holds for `QUOTING_TOOLS` too (the tool's own error form, not quoted text).
        needs: with `infers`, a text that every match contains: a quick way out for the many good results.
        status: what the result becomes.
    """

    error_class: str
    pattern: re.Pattern[str]
    infers: bool = False
    quoted: bool = False
    needs: str = ""
    status: Status = Status.ERROR

    def found_in(self, text: str) -> bool:
        """True when the rule holds; a pattern tied to the start is tried at the start only."""
        if self.needs not in text:
            return False
        tied = self.pattern.pattern.startswith(r"\A")
        return (self.pattern.match(text) if tied else self.pattern.search(text)) is not None


def _rule(error_class: str, pattern: str, **options) -> Rule:
    return Rule(error_class, re.compile(pattern, re.MULTILINE), **options)


_HUMAN = {"status": Status.HUMAN_REJECT, "infers": True, "quoted": True}
_STOP = {"status": Status.INTERRUPTED, "infers": True, "quoted": True}
_SHELL = r"^(?:\(eval\):\d+: |(?:/\S*/)?(?:ba|z|da|k)?sh: (?:line )?(?:\d+: )?)"

#: First match wins. `\A` and `\Z` tie a pattern to the ends of the result.
RULES: tuple[Rule, ...] = (
    # What the human did.
    _rule("interrupted", r"\A\[Request interrupted by user", needs="[Request", **_STOP),
    _rule("interrupted", r"\A(?:Error: )?Permission prompt was aborted", needs="abort", **_STOP),
    _rule("interrupted", r"\A(?:Error: )?(?:The operation was aborted|Interrupted by user|Command was aborted)", **_STOP),
    _rule("user_feedback", r"\AThe user doesn't want to (?:proceed|take this action)[\s\S]*?the user said:", needs="doesn't want", **_HUMAN),
    _rule("user_rejected", r"\A(?:Error: )?The user doesn't want to (?:proceed|take this action)", needs="doesn't want", **_HUMAN),
    _rule("user_rejected", r"\A(?:Error: )?(?:User|The user) (?:rejected|declined|denied|refused)\b", **_HUMAN),
    _rule("permission_denied", r"requested permissions? to .*but you haven't granted it", needs="haven't granted", **_HUMAN | {"quoted": False}),
    _rule("permission_denied", r"\A(?:Error: )?(?:This command|This Bash command .*) requires? approval", needs="approval", **_HUMAN),
    _rule("permission_denied", r"^(?:The following part|This command) requires approval", status=Status.HUMAN_REJECT),
    _rule("permission_denied", r"\A(?:Error: )?This Bash command contains multiple operations", needs="multiple operations", **_HUMAN),
    _rule("permission_denied", r"\A(?:Error: )?Permission to use \S+ .*(?:has been )?denied", needs="denied", **_HUMAN),
    # The tool's own complaints.
    _rule("edit_no_match", r"String to replace not found in file|old_string (?:was )?not found|No match(?:es)? found for", ),
    _rule("edit_ambiguous", r"Found \d+ matches of the string to replace|old_string is not unique"),
    _rule("edit_no_change", r"No changes to make|old_string and new_string are (?:exactly the same|identical)"),
    _rule("file_not_read", r"File has not been read yet|must (?:first )?read the file"),
    _rule("file_modified", r"File has been (?:unexpectedly )?modified|modified since (?:it was )?(?:last )?read"),
    _rule("invalid_arguments", r"InputValidationError|Invalid (?:tool )?(?:arguments|parameters|input)|required parameter|is not valid JSON for|unexpected keyword argument|missing \d+ required (?:positional|keyword)"),
    _rule("unknown_tool", r"No such tool(?: available)?|(?:Unknown|unrecognized) tool\b|Tool \S+ (?:not found|does not exist)|is not a (?:known|valid) tool"),
    _rule("path_blocked", r"was blocked\. For security|outside (?:of )?the (?:allowed|working) director|only list files in the allowed"),
    _rule("too_large", r"exceeds? (?:the )?maximum allowed|Output too large|Prompt is too long|File too large"),
    _rule("is_directory", r"\bEISDIR\b|Is a directory|illegal operation on a directory"),
    _rule("tool_error", r"\A<tool_use_error>(?![\s\S]*(?:does not exist|ENOENT))", needs="<tool_use_error>", infers=True, quoted=True),
    # The environment.
    _rule("command_not_found", _SHELL + r".*(?:command )?not found(?:: .*)?$", needs="not found", infers=True),
    _rule("command_not_found", r"[Cc]ommand not found"),
    _rule("module_not_found", r"^(?:ModuleNotFoundError|ImportError): |Cannot find module '|ERR_MODULE_NOT_FOUND"),
    _rule("syntax_error", r"^\s*(?:SyntaxError|IndentationError|TabError)\b|syntax error near unexpected token"),
    _rule("timeout", r"\A(?:Error: )?Command timed out after", needs="timed out after", infers=True),
    _rule("timeout", r"[Tt]imed out|ETIMEDOUT|TimeoutError|deadline exceeded"),
    _rule("http_error", r"\A(?:Error: )?Request failed with status code \d{3}\s*\Z", needs="failed with status", infers=True, quoted=True),
    _rule("http_error", r"status code [45]\d\d|HTTP(?:/[\d.]+)? (?:Error )?[45]\d\d|\b[45]\d\d (?:Not Found|Forbidden|Unauthorized|Bad Request|Internal Server Error|Service Unavailable|Gateway)"),
    _rule("network_error", r"ECONNREFUSED|ENOTFOUND|EAI_AGAIN|Could not resolve host|Connection refused|Network is unreachable|Temporary failure in name resolution"),
    _rule("git_error", r"^(?:fatal|error): (?:not a git repository|pathspec|your local changes|failed to push|unable to|could not|couldn't|bad revision|ambiguous argument|merge|A branch named|invalid reference)"),
    _rule("merge_conflict", r"^CONFLICT \(|Automatic merge failed"),
    _rule("file_not_found", r"\A(?:<tool_use_error>)?(?:Error: )?(?:File|Directory|Path|Notebook)(?: .*)? (?:does not exist|not found)", infers=True, quoted=True),
    _rule("file_not_found", r"^[\w./-]+: .*: No such file or directory\s*\Z", needs="No such file", infers=True),
    _rule("file_not_found", r"No such file or directory|\bENOENT\b|FileNotFoundError|does not exist"),
    _rule("os_permission", r"[Pp]ermission denied|\bEACCES\b|\bEPERM\b|Operation not permitted|PermissionError"),
    _rule("already_exists", r"\bEEXIST\b|FileExistsError|already exists"),
    _rule("test_failure", r"^=+ .*\b\d+ (?:failed|errors?)\b.* in [\d.]+s.*=+\s*\Z", needs=" in ", infers=True),
    _rule("test_failure", r"^(?:FAILED|FAIL) |\b\d+ (?:tests? )?fail(?:ed|ures?|ing)\b|^Tests?:\s+\d+ failed|AssertionError|Job '.*' failed"),
    _rule("type_check", r"\berror TS\d+:|:\d+:\d+ - error: |: error: .*\[[\w-]+\]$|reportUnknown|error\[E\d{4}\]"),
    _rule("python_error", r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)+[\w.]+(?:Error|Exception|Interrupt|Exit)\b.*\s*\Z", needs="Traceback (most", infers=True),
    _rule("python_error", r"^Traceback \(most recent call last\):|^\w*(?:Error|Exception): "),
)  # fmt: skip

#: The rules that need no flag.
INFERRING: tuple[Rule, ...] = tuple(r for r in RULES if r.infers)

#: Class of a failed result that no rule names, and of a bare exit code.
DEFAULT_CLASS, EXIT_CLASS = "tool_error", "nonzero_exit"

#: Every class that `classify_text` can return: the hint templates must cover it (a test says so).
ERROR_CLASSES: tuple[str, ...] = tuple(dict.fromkeys([r.error_class for r in RULES] + [DEFAULT_CLASS, EXIT_CLASS]))

_EXIT = re.compile(
    r"\A(?:Error: )?(?:Exit code:? |\[?exit[_ ]code[:=] ?|<exit_code>|Process exited with code |<returncode>)(-?\d+)"
    r"|(?:^|\n)(?:\[exit code: ?|\[?Command finished with exit code |Process exited with code |exit code: )(-?\d+)[\].]?\s*\Z",
    re.IGNORECASE,
)
_TAG = re.compile(r"\A\s*<tool_use_error>([\s\S]*?)(?:</tool_use_error>)?\s*\Z")
#: A sentence: words first, no `program: message`, no word that programs use when they fail.
_PROSE = re.compile(
    r"\A(?![^\n]*(?i:\b(?:errors?|failed|failure|fatal|warning|denied|cannot|unable|invalid|usage|exception)\b))"
    r"(?!\S+: )[A-Za-z']+,?(?: \S+){3,}"
)


def classify_text(
    text: str, *, flagged: bool = False, tool: str | None = None
) -> tuple[Status, str | None, int | None]:
    """Classify one tool result, recorded or live.

    Args:
        text: the result as text. A whole result of the form `{"error": ...}` (JSON, or the Python form in
            which TRL renders a tool's exception) is an error.
        flagged: the log, or the host, marked it as an error.
        tool: name of the called tool; tools that quote other texts are inferred from less.

    Returns:
        (status, error class or None, exit code or None). The class is None exactly when the status is `ok`.
    """
    exit_code = _exit_code(text)
    wrapped = _error_object(text)
    if wrapped is not None:
        return _wrapped(wrapped, flagged, tool, exit_code)
    body, tagged = _untag(text)
    ends = _ends(body)
    if flagged or tagged:
        return *_flagged(ends, tagged, tool, exit_code, flagged), exit_code
    rule = next((r for r in INFERRING if _allowed(r, tool) and r.found_in(ends)), None)
    if rule is not None:
        return (Status.INFERRED_ERROR if rule.status is Status.ERROR else rule.status), rule.error_class, exit_code
    if exit_code and tool not in QUOTING_TOOLS:
        return Status.INFERRED_ERROR, _named(ends) or EXIT_CLASS, exit_code
    return Status.OK, None, exit_code


def _flagged(ends: str, tagged: bool, tool: str | None, exit_code: int | None, flagged: bool):
    rule = next((r for r in RULES if r.found_in(ends)), None)
    if rule is not None and rule.status is not Status.ERROR:
        return rule.status, rule.error_class
    named = None if rule is None else rule.error_class
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


def _allowed(rule: Rule, tool: str | None) -> bool:
    return rule.infers and (rule.quoted or tool not in QUOTING_TOOLS)


def _named(text: str) -> str | None:
    """Class of a text known to be an error, from the rules about errors only."""
    return next((r.error_class for r in RULES if r.status is Status.ERROR and r.found_in(text)), None)


def _ends(text: str) -> str:
    return text if len(text) <= 2 * WINDOW else text[:WINDOW] + "\n" + text[-WINDOW:]


def _untag(text: str) -> tuple[str, bool]:
    if "<tool_use_error>" not in text[:200]:
        return text, False
    found = _TAG.match(text)
    return (found.group(1), True) if found else (text, False)


def _exit_code(text: str) -> int | None:
    ends = (text[:200] + text[-200:]).lower()
    if "exit" not in ends and "returncode" not in ends:
        return None
    found = _EXIT.search(text[:200]) or _EXIT.search(text[-200:])
    if found is None or (found.group(1) is None and found.group(2) is None):
        return None
    return int(found.group(1) if found.group(1) is not None else found.group(2))


def _error_object(text: str) -> str | None:
    """The message of a result that is nothing but an error object, else None."""
    stripped = text.strip()
    if not (stripped.startswith("{") and stripped.endswith("}") and len(stripped) < 100_000):
        return None
    if not re.match(r"\{\s*['\"]error['\"]\s*:", stripped):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict) and value.get("error") and set(value) <= {"error", "message", "code", "type"}:
            return value["error"] if isinstance(value["error"], str) else json.dumps(value["error"], default=str)
        return None
    return None
