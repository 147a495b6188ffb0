"""Self-made tool-use episodes for the warm start: random projects, files, commands and failures.

Everything is drawn from the word lists below with a seeded generator, so the data has no licence but ours
and can be remade exactly. An episode is a user request and a chain of calls with their results; cutting it
after a random number of calls gives one training example (context, next action).
"""

from __future__ import annotations

import random
from typing import Any

from composer_plugins.traces.schema import Message, ToolCall

SYSTEM = [
    "",
    "You are a coding agent.",
    "You are a helpful coding assistant. Use the tools.",
    "You are an agent that works in a repository by calling tools.",
    "Solve the task with tool calls. One call at a time.",
]
NAMES = [
    "anna",
    "ben",
    "carla",
    "dmitri",
    "elif",
    "farid",
    "grace",
    "hiro",
    "ines",
    "jonas",
    "kemi",
    "lars",
    "mona",
    "nils",
    "olga",
    "priya",
]
WORDS = [
    "auth",
    "billing",
    "cache",
    "chart",
    "client",
    "config",
    "cursor",
    "data",
    "deploy",
    "editor",
    "events",
    "export",
    "feed",
    "filter",
    "forms",
    "gallery",
    "graph",
    "images",
    "index",
    "invoice",
    "jobs",
    "layout",
    "loader",
    "login",
    "mailer",
    "map",
    "metrics",
    "models",
    "notes",
    "orders",
    "parser",
    "player",
    "profile",
    "queue",
    "render",
    "report",
    "router",
    "schema",
    "search",
    "session",
    "shop",
    "signup",
    "sync",
    "table",
    "theme",
    "timer",
    "tokens",
    "upload",
    "users",
    "utils",
    "video",
    "views",
    "widget",
    "worker",
]
EXTENSIONS = ["py", "py", "py", "ts", "tsx", "js", "css", "html", "md", "json", "toml", "yml", "rs", "go", "sh"]
FOLDERS = [
    "src",
    "lib",
    "app",
    "public",
    "tests",
    "docs",
    "scripts",
    "components",
    "pages",
    "server",
    "api",
    "core",
    "tools",
]
COMMANDS = [
    ("git status", "Show working tree status", "On branch main\nnothing to commit, working tree clean"),
    ("git diff --stat", "Show changed files", " {f} | 4 +-\n 1 file changed, 2 insertions(+), 2 deletions(-)"),
    ("git log --oneline -5", "Show recent commits", "a1f09c2 Fix {w}\n77be013 Add {v}"),
    ("git push", "Push changes", "To github.com:{n}/{p}.git\n   3c1d2e4..9ab0f11  main -> main"),
    ("ls -la", "List files", "total 24\n-rw-r--r-- 1 {n} {n} 812 README.md\n-rw-r--r-- 1 {n} {n} 2210 {f}"),
    ("npm run build", "Build the project", "> {p}@1.2.0 build\n\n✓ Compiled successfully"),
    ("npm test", "Run the tests", "Tests: 1 failed, 12 passed\n  ● {w} › renders {v}"),
    ("pytest -q", "Run the tests", "F.....\nFAILED tests/test_{w}.py::test_{v} - AssertionError"),
    ("uv run ruff check", "Run the linter", "{f}:12:5: F841 Local variable `{v}` is assigned to but never used"),
    ("cargo test", "Run the tests", "test {w}::{v} ... ok\n\ntest result: ok. 8 passed; 0 failed"),
    ("wc -l {f}", "Count lines", "     214 {f}"),
    ("mkdir -p {d}", "Create the folder", ""),
    ("rm {f}", "Remove the file", ""),
    ("cp {f} {f}.bak", "Back up the file", ""),
    ("git add -A", "Stage all changes", ""),
    ('git commit -m "Fix {w} {v}"', "Commit the change", "[main 5be77d1] Fix {w} {v}\n 1 file changed"),
]
ASKS = {
    "read": ["Have a look at {f}.", "What does {f} do?", "Read {f} please", "Can you check {f}?", "open @{f}"],
    "edit": ["In {f} rename {w} to {v}.", "Change {w} to {v} in {f}", "{f} should use {v} instead of {w}, please fix"],
    "search": ["Where is {w} used?", "find all uses of {w}_{v}", "Which file defines {w}{V}?"],
    "files": ["Which .{x} files are there?", "list the {x} files under {d}", "Find the {w} file."],
    "run": ["Please run `{c}`.", "{c}", "can you do {c} for me?", "now {c}"],
    "write": ["Create {f} with a short note about {w}.", "add a {f} file"],
    "fix": ["The {w} {v} is broken, please fix it.", "Tests of {w} fail. Can you fix them?", "OK, go on with {w}."],
}
ERRORS = {
    "Read": "<tool_use_error>File does not exist.</tool_use_error>",
    "Edit": "<tool_use_error>String to replace not found in file.\nString: {w} = {v}</tool_use_error>",
    "Bash": "Exit code 1\nbash: cd: {d}: No such file or directory",
    "Write": "<tool_use_error>File has not been read yet. Read it first before writing to it.</tool_use_error>",
}
#: Tool vocabularies: logical name -> (name, {logical argument: (name, type, required)}).
CLAUDE = {
    "Bash": ("Bash", {"command": ("command", "string", True), "description": ("description", "string", False),
                      "timeout": ("timeout", "integer", False)}),
    "Read": ("Read", {"file": ("file_path", "string", True), "offset": ("offset", "integer", False),
                      "limit": ("limit", "integer", False)}),
    "Edit": ("Edit", {"file": ("file_path", "string", True), "old": ("old_string", "string", True),
                      "new": ("new_string", "string", True)}),
    "Write": ("Write", {"file": ("file_path", "string", True), "content": ("content", "string", True)}),
    "Glob": ("Glob", {"pattern": ("pattern", "string", True), "path": ("path", "string", False)}),
    "Grep": ("Grep", {"pattern": ("pattern", "string", True), "path": ("path", "string", False)}),
    "Todo": ("TodoWrite", {"todos": ("todos", "array", True)}),
}  # fmt: skip
OTHER = {
    "Bash": ("shell", {"command": ("command", "string", True), "timeout": ("timeout", "integer", False)}),
    "Read": ("read_file", {"file": ("path", "string", True)}),
    "Edit": ("edit_file", {"file": ("path", "string", True), "old": ("old", "string", True),
                           "new": ("new", "string", True)}),
    "Write": ("write_file", {"file": ("path", "string", True), "content": ("text", "string", True)}),
    "Glob": ("find_files", {"pattern": ("pattern", "string", True)}),
    "Grep": ("search", {"pattern": ("query", "string", True), "path": ("path", "string", False)}),
}  # fmt: skip
Call = tuple[str, dict[str, Any], str]


class Episode:
    """One random project; `build()` returns (messages, action, tools) with schemas as in `State.tools`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.vocabulary = CLAUDE if rng.random() < 0.8 else OTHER
        project = "-".join(rng.sample(WORDS, 2)) if rng.random() < 0.6 else rng.choice(WORDS)
        name = rng.choice(NAMES)
        root = rng.choice([f"/Users/{name}/workspace/{project}/", f"/home/{name}/{project}/", f"/repo/{project}/", ""])
        w, v = rng.sample(WORDS, 2)
        folder = rng.choice(FOLDERS)
        extension = rng.choice(EXTENSIONS)
        relative = rng.choice([f"{folder}/{w}.{extension}", f"{w}.{extension}", f"{folder}/{v}/{w}.{extension}"])
        self.words = {"n": name, "p": project, "w": w, "v": v, "V": v.title(), "x": extension}
        self.words |= {"f": root + relative, "d": root + folder, "r": relative}
        self.command = self.fill(rng.choice(COMMANDS)[0])
        self.words["c"] = self.command

    def fill(self, text: str) -> str:
        for key, value in self.words.items():
            text = text.replace("{" + key + "}", value)
        return text

    def bash(self, index: int | None = None) -> Call:
        command, description, output = COMMANDS[index] if index is not None else self.rng.choice(COMMANDS)
        arguments: dict[str, Any] = {"command": self.fill(command)}
        if self.rng.random() < 0.7:
            arguments["description"] = description
        if self.rng.random() < 0.05:
            arguments["timeout"] = self.rng.choice([30000, 60000, 120000])
        return "Bash", arguments, self.fill(output)

    def source(self) -> str:
        first = self.rng.randint(1, 300)
        lines = ["{w} = {v}", "import {v}", "def {w}({v}):", "  return {w}.{v}", "const {w} = '{v}'", "## {w}", "", "}"]
        picked = self.rng.choices(lines, k=self.rng.randint(2, 6))
        return "\n".join(f"{first + i:6}→{self.fill(line)}" for i, line in enumerate(picked))

    def read(self) -> Call:
        arguments: dict[str, Any] = {"file": self.words["f"]}
        if self.rng.random() < 0.2:
            arguments |= {"offset": self.rng.randrange(10, 400, 10), "limit": self.rng.choice([20, 30, 50, 100])}
        return "Read", arguments, self.source()

    def edit(self) -> Call:
        old, new = self.rng.choice([("{w} = {v}", "{w} = {v}s"), ("{w}", "{v}"), ("import {v}", "import {w}")])
        arguments = {"file": self.words["f"], "old": self.fill(old), "new": self.fill(new)}
        return "Edit", arguments, self.fill("The file {f} has been updated.\n") + self.source()

    def write(self) -> Call:
        return (
            "Write",
            {"file": self.words["f"], "content": self.fill("# {w}\n{v}\n")},
            self.fill("File created at: {f}"),
        )

    def grep(self) -> Call:
        arguments = {"pattern": self.fill(self.rng.choice(["{w}", "{w}_{v}", "{w}{V}", "def {w}"]))}
        if self.rng.random() < 0.4:
            arguments["path"] = self.words["d"]
        return "Grep", arguments, self.fill("Found 1 file\n{f}")

    def glob(self) -> Call:
        pattern = self.rng.choice(["**/*.{x}", "**/{w}*", "{w}.*", "*.{x}"])
        return "Glob", {"pattern": self.fill(pattern)}, self.fill(self.rng.choice(["{f}", "No files found"]))

    def todo(self) -> Call:
        todos = [{"content": self.fill("Fix {w}"), "status": self.rng.choice(["in_progress", "completed"])}]
        return "Todo", {"todos": todos}, "Todos have been modified successfully."

    def chain(self) -> tuple[str, list[Call]]:
        """Return the kind of request and the calls that answer it."""
        run = next(i for i, c in enumerate(COMMANDS) if self.fill(c[0]) == self.command)
        kinds = {
            "read": [self.read],
            "edit": [self.read, self.edit, self.bash],
            "search": [self.grep, self.read],
            "files": [self.glob, self.read],
            "run": [lambda: self.bash(run), self.bash],
            "write": [self.write, self.bash],
            "fix": [self.grep, self.read, self.edit, self.bash],
        }
        kind = self.rng.choices(list(kinds), weights=[2, 3, 2, 1, 3, 1, 3])[0]
        calls = [make() for make in kinds[kind]]
        if "Todo" in self.vocabulary and self.rng.random() < 0.12:
            calls.insert(0, self.todo())
        return kind, calls

    def break_one(self, calls: list[Call], at: int) -> list[Call]:
        """Make the call before the action fail, and the action its repair (look first, or look elsewhere)."""
        tool, arguments, _ = calls[at - 1]
        calls = calls[:at]
        calls[-1] = (tool, arguments, self.fill(ERRORS.get(tool, "Exit code 1\nerror: {w} failed")))
        repair = {"Read": self.glob, "Edit": self.read, "Write": self.read, "Bash": lambda: self.bash(4)}
        return [*calls, repair.get(tool, self.grep)()]

    def build(self) -> tuple[list[Message], Message, dict[str, dict[str, Any]]]:
        kind, calls = self.chain()
        at = self.rng.randrange(len(calls))
        if at > 0 and self.rng.random() < 0.3:
            calls = self.break_one(calls, at)
        tools = self.tools({calls[i][0] for i in range(at + 1)})
        system = self.rng.choice(SYSTEM)
        messages = [Message(role="system", content=system)] if system else []
        messages.append(Message(role="user", content=self.fill(self.rng.choice(ASKS[kind]))))
        for index, call in enumerate(calls[:at]):
            messages.append(self.message(call, index))
            messages.append(Message(role="tool", content=call[2], tool_call_id=f"call_{index}"))
        return messages, self.message(calls[at], at), tools

    def message(self, call: Call, index: int) -> Message:
        name, parameters = self.vocabulary[call[0]]
        arguments = {parameters[key][0]: value for key, value in call[1].items() if key in parameters}
        text = self.fill(self.rng.choice(["Let me look at that.", "Now {w}:", "I'll check {w}."]))
        content = text if self.rng.random() < 0.15 else ""
        return Message(
            role="assistant", content=content, tool_calls=[ToolCall(id=f"call_{index}", name=name, arguments=arguments)]
        )

    def tools(self, needed: set[str]) -> dict[str, dict[str, Any]]:
        """Return schemas of the needed tools and a random few others, some optional arguments left out."""
        others = [name for name in self.vocabulary if name not in needed]
        chosen = needed | set(self.rng.sample(others, self.rng.randint(0, len(others))))
        schemas = {}
        for logical in sorted(chosen, key=lambda key: self.vocabulary[key][0]):
            name, parameters = self.vocabulary[logical]
            schemas[name] = {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {p: {"type": kind} for p, kind, _ in parameters.values()},
                    "required": [p for p, _, required in parameters.values() if required],
                },
            }
        return schemas


def episodes(count: int, seed: int) -> list[tuple[list[Message], Message, dict[str, dict[str, Any]]]]:
    """Return `count` examples (context, next action, tools), the same for the same seed."""
    rng = random.Random(seed)
    return [Episode(rng).build() for _ in range(count)]
