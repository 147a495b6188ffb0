"""The table of the error detector: which words, in which place, mean which error class.

Three kinds of rule. *Tied* ones (`\\A`) are the tools' own sentences at the start of a result. *Tail* ones look at the
last characters, where programs say how they ended. The others are searched in both ends of the result. Rules with
`infers` make an unflagged result an error; the rest only name the class of one that is known to be an error.

Sentences are those of the agents themselves: Claude Code's logs; SWE-agent `tools/` and `config/default.yaml`;
OpenHands' runtime and software-agent-sdk; openai/codex `codex-rs/core/src`; google-gemini/gemini-cli
`packages/core/src/tools`; cline `src/core/prompts/responses.ts`; mini-swe-agent's templates.
"""

from __future__ import annotations

import re

from composer_plugins.traces.classify_rule import SHARED_START as _E
from composer_plugins.traces.classify_rule import Rule
from composer_plugins.traces.schema import Status


def _rule(error_class: str, pattern: str, **options) -> Rule:
    return Rule(error_class, re.compile(pattern, re.MULTILINE), **options)


_INFERS = {"infers": True}
_OWN = {"infers": True, "quoted": True}
_END = {"infers": True, "tail": True}
_HUMAN = {"status": Status.HUMAN_REJECT, "infers": True, "quoted": True}
_STOP = {"status": Status.INTERRUPTED, "infers": True, "quoted": True}
_SHELL = r"^(?:\(eval\):\d+: |(?:/\S*/)?(?:ba|z|da|k)?sh: (?:line )?(?:\d+: )?)"

#: What the human did. First match wins, here and below.
HUMAN_RULES: tuple[Rule, ...] = (
    _rule("interrupted", r"\A\[Request interrupted by user", **_STOP),
    _rule("interrupted", r"\A(?:Error: )?Permission prompt was aborted", **_STOP),
    _rule("interrupted", r"\A(?:Error: )?(?:The operation was aborted|Interrupted by user|Command was aborted)", **_STOP),
    _rule("interrupted", r"\A\[Operation Cancelled\]|\A(?:Tool (?:call|execution) )?(?:was )?[Cc]ancelled by (?:the )?user\b|\A(?:command )?aborted by user\b", **_STOP),
    _rule("user_feedback", r"\AThe user doesn't want to (?:proceed|take this action)[\s\S]*?the user said:", **_HUMAN),
    _rule("user_feedback", r"\AThe user (?:denied|rejected) (?:this|the) \w+[\s\S]{0,80}?<feedback>", **_HUMAN),
    _rule("user_rejected", r"\A(?:Error: )?The user doesn't want to (?:proceed|take this action)", **_HUMAN),
    _rule("user_rejected", r"\A(?:Error: )?(?:User|The user) (?:rejected|declined|denied|refused)\b", **_HUMAN),
    _rule("user_rejected", r"\A(?:Error: )?(?:Action|Command|Tool call) (?:was )?rejected by (?:the )?user\b", **_HUMAN),
    _rule("user_rejected", r"\ACommands? not executed\. The user rejected", **_HUMAN),
    _rule("permission_denied", r"requested permissions? to .*but you haven't granted it", needs="haven't granted", **_HUMAN | {"quoted": False}),
    _rule("permission_denied", r"\A(?:Error: )?(?:This command|This Bash command .*) requires? approval", **_HUMAN),
    _rule("permission_denied", r"^(?:The following part|This command) requires approval", status=Status.HUMAN_REJECT),
    _rule("permission_denied", r"\A(?:Error: )?This Bash command contains multiple operations", **_HUMAN),
    _rule("permission_denied", r"\A(?:Error: )?Permission to use \S+ .*(?:has been )?denied", **_HUMAN),
)  # fmt: skip

#: The tools' own complaints.
TOOL_RULES: tuple[Rule, ...] = (
    _rule("syntax_error", r"\A\[?Your proposed edit has introduced new syntax error", **_OWN),
    _rule("syntax_error", r"\AYour bash command contained syntax errors", **_OWN),
    _rule("edit_no_match", _E + r"(?:String to replace not found in file|No exact match found in |No replacement was performed, old_str `[\s\S]{0,3000}?did not appear|No replacement was performed\. No match|Your edit was not applied[^\n]*not found in displayed|Failed to edit, could not find|The SEARCH block|apply_patch verification failed: Failed to find)", **_OWN),
    _rule("edit_no_match", r"No replacement was performed, old_str `[\s\S]{0,3000}?did not appear verbatim|does not match anything in the file|could not find the string to replace|String to replace not found in file|old_string (?:was )?not found|No match(?:es)? found for|Failed to find (?:expected lines|context)"),
    _rule("edit_ambiguous", _E + r"(?:No replacement was performed\. Multiple occurrences|Your edit was not applied[^\n]*Found more than one|Failed to edit, [Ee]xpected \d+ occurrences? but found [1-9])", **_OWN),
    _rule("edit_ambiguous", r"Found \d+ matches of the string to replace|old_string is not unique|Multiple occurrences of old_str"),
    _rule("edit_no_change", _E + r"(?:No changes to (?:make|apply)|No replacement was performed, old_str `[\s\S]{0,3000}?is the same as new_str|Your edit was not applied[^\n]*No changes made)", **_OWN),
    _rule("edit_no_change", r"No changes to make|old_string and new_string are (?:exactly the same|identical)"),
    _rule("file_not_read", r"File has not been read yet|must (?:first )?read the file"),
    _rule("file_modified", r"File has been (?:unexpectedly )?modified|modified since (?:it was )?(?:last )?read"),
    _rule("format_error", r"\A(?:Error: )?(?:Your (?:last )?output (?:was not formatted|did not use any tool)|Please always provide EXACTLY ONE action|\[ERROR\] You did not use a tool|Format error\b)", **_OWN),
    _rule("unknown_tool", _E + r"(?:No such tool(?: available)?\b|Tool ['\"`]?[\w.-]+['\"`]? not found\b|unsupported (?:custom tool )?call: )", **_OWN),
    _rule("invalid_arguments", _E + r"(?:Invalid [`'][\w-]+[`'](?: parameter)?[:.]|Parameter `\w+` is required|Path must be absolute|File path must be absolute|The path \S+ is not an absolute path|params must have required property|Missing value for required parameter|failed to parse function arguments|Error validating args)", **_OWN),
    _rule("invalid_arguments", r"InputValidationError|Invalid (?:tool )?(?:arguments|parameters|input)|required parameter|required property|is not valid JSON for|unexpected keyword argument|missing \d+ required (?:positional|keyword)"),
    _rule("unknown_tool", r"No such tool(?: available)?|(?:Unknown|unrecognized) tool\b|Tool \S+ (?:not found|does not exist)|is not a (?:known|valid) tool"),
    _rule("command_blocked", _E + r"(?:Cannot execute multiple commands at once|Operation '[^'\n]+' is not supported by this environment|Command substitution using |Command rejected because it could not be parsed)", **_OWN),
    _rule("path_blocked", _E + r"(?:File path must be within|Access to .{1,300} is blocked by)", **_OWN),
    _rule("path_blocked", _E + r".{1,300} was blocked\. For security", **_OWN),
    _rule("path_blocked", r"was blocked\. For security|outside (?:of )?the (?:allowed|working) director|only list files in the allowed"),
    _rule("too_large", r"exceeds? (?:the )?maximum allowed|Output too large|Prompt is too long|File too large"),
    _rule("is_directory", r"\bEISDIR\b|[Ii]s a directory(?:,| and only)|: Is a directory|illegal operation on a directory"),
    _rule("already_exists", _E + r"File already exists at: ", **_OWN),
    _rule("timeout", r"^[ \t]*(?:EXECUTION TIMED OUT|COMMAND TIMED OUT)\b", needs="TIMED OUT", **_END),
    _rule("timeout", r"\A(?:Error: )?(?:Command|command) timed out after|\AThe (?:last )?command[\s\S]{0,2000}?(?:timed out and has been killed|was cancelled because it took|timed out after)|\ACommand was automatically cancelled because it exceeded the timeout", **_OWN),
    _rule("timeout", r"^\[(?:The command has no new output after|(?:The )?[Cc]ommand timed out after) [^\n]*", needs="after", **_END),
    _rule("tool_error", r"\A<tool_use_error>(?![\s\S]*(?:does not exist|ENOENT))", vague=True, **_OWN),
    _rule("tool_error", r"\AERROR:\n", vague=True, **_OWN),
    _rule("tool_error", r"\AThe tool execution failed with the following error", vague=True, **_OWN),
)  # fmt: skip

#: How programs say at their end that tests failed, or that a check found errors.
TEST_SUMMARY = (
    r"^=+ [^\n]{0,80}?\b[1-9]\d* (?:failed|errors?)\b[^\n]{0,80} in [\d.:]+m?s[^\n]*=\s*\Z|^(?:Tests?|Test Files|Test Suites):?\s+(?:\d+ \w+ ?\| ?)*[1-9]\d* failed"
    r"|^FAILED \((?:failures|errors)=|^test result: FAILED\.|^--- FAIL: |^FAIL\t|^[ \t]+[1-9]\d* failing\b"
    r"|^FAILURES!$|^Tests run: \d+, Failures: (?:[1-9]|0, Errors: [1-9])"
    r"|^[1-9]\d* (?:tests? )?failed\b|^FAIL Required test coverage"
)  # fmt: skip
CHECK_SUMMARY = (
    r"^[1-9]\d* errors?, \d+ warnings?|^Found [1-9]\d* errors?(?:\.| in \d+ files?)|^✖ [1-9]\d* problems? \([1-9]\d* errors?"
    r"|^error(?:\[E\d{4}\])?: could not compile|^make(?:\[\d+\])?: \*\*\* |^\[?ERROR\]? *BUILD FAILURE|^BUILD FAILED|^Failed to compile\."
)  # fmt: skip

#: The environment.
PROGRAM_RULES: tuple[Rule, ...] = (
    _rule("test_failure", TEST_SUMMARY, needs="ail", **_END),
    _rule("test_failure", r"\b\d+ examples?, [1-9]\d* failures?", needs="ail", **_END),
    _rule("test_failure", r"^=+ (?:\d+ \w+, )*[1-9]\d* errors? in [\d.:]+m?s[^\n]*=\s*\Z", needs=" error", **_END),
    _rule("type_check", CHECK_SUMMARY, needs="rror", **_END),
    _rule("type_check", r"\berror TS\d+: ", needs="rror", **_END),
    _rule("type_check", r"^make(?:\[\d+\])?: \*\*\* |^BUILD FAILED|^Failed to compile\.", needs="ail", **_END),
    _rule("command_not_found", _SHELL + r".*(?:command )?not found(?:: .*)?$", needs="not found", **_INFERS),
    _rule("command_not_found", r"[Cc]ommand not found"),
    _rule("module_not_found", r"^(?:ModuleNotFoundError|ImportError): |Cannot find module '|ERR_MODULE_NOT_FOUND"),
    _rule("syntax_error", r"^(?:\S*(?:ba|z|da|k)?sh: )(?:-c: )?(?:(?:line )?\d+: )?(?:[Ss]yntax error|parse error|unexpected EOF while)", needs="sh: ", **_INFERS),
    _rule("syntax_error", r"^[ \t]*(?:SyntaxError|IndentationError|TabError)\b|syntax error near unexpected token|unexpected EOF while looking|^sed: -e expression|[Uu]nterminated "),
    _rule("timeout", r"[Tt]imed out|ETIMEDOUT|TimeoutError|TimeoutExpired|deadline exceeded"),
    _rule("http_error", r"\A(?:Error: )?Request failed with status code \d{3}\s*\Z", **_OWN),
    _rule("http_error", r"status code [45]\d\d|HTTP(?:/[\d.]+)? (?:Error )?[45]\d\d|\b[45]\d\d (?:Not Found|Forbidden|Unauthorized|Bad Request|Internal Server Error|Service Unavailable|Gateway)|^curl: \(22\)"),
    _rule("network_error", r"^curl: \((?:5|6|7|28|35|52|56)\) .*\s*\Z", needs="curl: (", **_END),
    _rule("network_error", r"ECONNREFUSED|ENOTFOUND|EAI_AGAIN|Could not resolve host|Connection refused|Network is unreachable|Temporary failure in name resolution"),
    _rule("git_error", r"^(?:fatal|error): (?:not a git repository|pathspec|your local changes|failed to push|unable to|could not|couldn't|bad revision|ambiguous argument|merge|A branch named|invalid reference)"),
    _rule("git_error", r"^fatal: [^\n]+\s*\Z", needs="fatal: ", **_END),
    _rule("merge_conflict", r"^CONFLICT \(|Automatic merge failed"),
    _rule("file_not_found", _E + r"(?:File|Directory|Path|Notebook|The path)(?: .*)? (?:does not exist|not found)", **_OWN),
    _rule("file_not_found", _E + r"(?:Ran into )?\[Errno 2\] No such file or directory: '[^'\n]*' while trying", **_OWN),
    _rule("file_not_found", r"^[\w./-]+: .*(?:: |\[Errno 2\] )No such file or directory\)?\s*\Z", needs="No such file", **_END),
    _rule("file_not_found", r"^(?:\S*zsh:\d+: |zsh: )no matches found: ", needs="no matches found", **_END),
    _rule("file_not_found", r"No such file or directory|\bENOENT\b|FileNotFoundError|does not exist"),
    _rule("path_blocked", r"\A(?:execution error: )?(?:failed in sandbox|sandbox denied)"),
    _rule("path_blocked", r"\A(?:execution error: )?(?:failed in sandbox|sandbox denied)", vague=True, **_OWN),
    _rule("os_permission", r"^\S+: (?:.*: )?Permission denied(?: \(os error 13\))?\s*\Z", needs="Permission denied", **_END),
    _rule("os_permission", r"[Pp]ermission denied|\bEACCES\b|\bEPERM\b|Operation not permitted|PermissionError"),
    _rule("already_exists", r"\bEEXIST\b|FileExistsError|already exists"),
    _rule("type_check", r"^Error: Job '.*' failed"),
    _rule("test_failure", r"^(?:FAILED|FAIL) |\b[1-9]\d* (?:tests? )?fail(?:ed|ures?|ing)\b|AssertionError"),
    _rule("type_check", r"\berror TS\d+:|:\d+:\d+ - error: |: error: .*\[[\w-]+\]$|reportUnknown|error\[E\d{4}\]|^Found \d+ errors?\.|Failed to build\b|[Bb]uild failed"),
    _rule("python_error", r"(?:^[ \t]+\S.*\n)(?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception|Interrupt|Exit|Expired|Timeout|Failure)\b(?::? .*|:)?\s*\Z", needs="Traceback (most", vague=True, infers=True),
    _rule("python_error", r"^Node\.js v\d[\d.]*\s*\Z|^panic: |^thread '.*' panicked at |^Exception in thread \"", vague=True, **_END),
    _rule("python_error", r"^Traceback \(most recent call last\):|^\w*(?:Error|Exception): "),
    _rule("nonzero_exit", r"^(?:[\w./-]+: line \d+: +\d+ )?(?:Segmentation fault|Bus error|Illegal instruction|Killed)(?: +\(core dumped\))?[^\n]{0,80}\s*\Z", vague=True, **_END),
    _rule("nonzero_exit", r"^(?:npm (?:ERR!|error) |error Command failed with exit code [1-9]|[\s\S]?ELIFECYCLE)", vague=True, **_END),
)  # fmt: skip

RULES: tuple[Rule, ...] = HUMAN_RULES + TOOL_RULES + PROGRAM_RULES
