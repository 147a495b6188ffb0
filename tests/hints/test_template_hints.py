"""Template hints: one for every class, no leaked answer, bad files refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from composer_plugins.errors import ConfigError
from composer_plugins.hints import add_hints
from composer_plugins.hints.templates import BUILTIN, FIELDS, TemplateHints, read_templates, shorten
from composer_plugins.plugins import get_plugin_manager
from composer_plugins.traces.classify import ERROR_CLASSES
from composer_plugins.traces.claude_code import READER
from composer_plugins.traces.schema import Status
from composer_plugins.traces.states import build_states

SAMPLE = Path(__file__).parents[2] / "composer_plugins/data/samples/claude_code_session.jsonl"


@pytest.fixture(scope="module")
def states():
    return list(build_states(READER.read(SAMPLE, Counter())))


def test_every_error_class_has_a_template_of_its_own():
    templates = read_templates(BUILTIN)
    assert set(ERROR_CLASSES) <= set(templates)
    assert set(templates) - set(ERROR_CLASSES) == {"default"}
    assert len(set(templates.values())) == len(templates)


@pytest.mark.parametrize("error_class", [*ERROR_CLASSES, "a class of a plugin", None])
@pytest.mark.parametrize("tool", ["Edit", None])
def test_every_class_gives_a_whole_sentence(error_class, tool):
    hint = TemplateHints().generate_for(tool, "bad {thing} at /a/b.py", Status.ERROR, error_class)
    assert hint.text.endswith(".") and len(hint.text) > 40
    assert not any("{" + field + "}" in hint.text for field in FIELDS)
    assert (hint.status, hint.generator) == (Status.ERROR, "template")


@pytest.mark.parametrize("status", [s for s in Status if not s.failed])
def test_no_hint_without_a_failure(status):
    assert TemplateHints().generate_for("Edit", "text", status, None) is None


def test_the_sample_gets_a_hint_at_every_error_turn_and_nowhere_else(states):
    counts = Counter()
    hinted = list(add_hints(states, TemplateHints(), counts))
    assert [s.hint is not None for s in hinted] == [s.status.failed for s in hinted]
    assert (counts["failed"], counts["hinted"]) == (10, 10)
    assert {s.hint.error_class for s in hinted if s.hint} == {"user_feedback", "edit_no_match", "file_not_read"}


def test_a_hint_never_holds_the_answer(states):
    """Neither the failed action's own long arguments nor what the agent did next."""
    generator = TemplateHints()
    by_step = {s.step: s for s in states}
    checked = 0
    for state in states:
        hint = generator.generate(state)
        if hint is None:
            continue
        following = next((by_step[i] for i in range(state.step + 1, state.step + 9) if i in by_step), None)
        for action in (state.action, following.action if following else state.action):
            for call in action.tool_calls:
                for value in call.arguments.values():
                    if isinstance(value, str) and len(value) > 120:
                        checked += 1
                        assert value not in hint.text
                        assert value[:120] not in hint.text
    assert checked > 5


def test_the_error_is_shortened_and_the_path_is_the_calls_own(states):
    edit = next(s for s in states if s.results and s.results[0].error_class == "edit_no_match")
    hint = TemplateHints(max_error=40).generate(edit)
    assert edit.action.tool_calls[0].arguments["file_path"] in hint.text
    assert len(hint.evidence) <= 40
    assert shorten("a" * 100, 40).count("a") == 35


def test_the_worst_outcome_is_hinted_first(states):
    state = next(s for s in states if s.status is Status.HUMAN_REJECT)
    assert TemplateHints().generate(state).status is Status.HUMAN_REJECT


def test_templates_of_your_own_override_single_classes(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('[classes]\ntimeout = "Be quick with {tool}."\n')
    generator = TemplateHints(path=mine)
    assert generator.generate_for("Bash", "x", Status.ERROR, "timeout").text == "Be quick with Bash."
    assert "git status" in generator.generate_for("Bash", "x", Status.ERROR, "git_error").text


BAD = {
    "missing": (None, "no such file"),
    "no toml": ("[classes", "not valid TOML"),
    "no table": ("timeout = 'x'", r"\[classes\]"),
    "not text": ("[classes]\ntimeout = 3", "must be a text"),
    "unknown field": ("[classes]\ntimeout = '{answer}'", "answer"),
    "format": ("[classes]\ntimeout = '{tool!r}'", "format specification"),
    "brace": ("[classes]\ntimeout = '{tool'", "brace"),
    "attribute": ("[classes]\ntimeout = '{tool.__class__}'", "__class__"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_template_files_are_config_errors(tmp_path, kind):
    content, words = BAD[kind]
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        TemplateHints(path=path)


def test_unknown_options_are_config_errors():
    with pytest.raises(ConfigError, match="colour"):
        TemplateHints(colour="red")
    with pytest.raises(ConfigError, match="max_error"):
        TemplateHints(max_error=3)


def test_the_generator_is_registered():
    assert get_plugin_manager().hint_generators.get("template").load() is TemplateHints
