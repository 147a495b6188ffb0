"""Placeholders, the salt, the user's rules, the report, the gates in front of the plugins, and the tables of fields."""

from __future__ import annotations

import os
import pickle
import re
import stat
import string
import subprocess
import sys
import time
import types
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_plugins.errors import ConfigError
from composer_plugins.scrub import Scrubber, UserRules, load_rules
from composer_plugins.scrub.detectors import detectors
from composer_plugins.scrub.placeholders import load_salt
from composer_plugins.scrub.records import FIELDS, KEPT
from composer_plugins.scrub.text import lower
from composer_plugins.traces import schema

SALT = b"a salt for tests only"
KEY = "ghp_" + "a1B2c3D4e5F6g7H8i9" * 2


def test_same_secret_same_placeholder_in_every_run_with_the_salt_only():
    one, two, other = Scrubber(salt=SALT), Scrubber(salt=SALT), Scrubber(salt=b"another salt, just as long")
    assert one.scrub_text(f"x {KEY}") == two.scrub_text(f"x {KEY}") != other.scrub_text(f"x {KEY}")
    assert one.scrub_text(f"x {KEY}").split(" ")[1] in two.scrub_text(f'export K="{KEY}"')
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.fingerprint != Scrubber(UserRules(allow=["x"]), salt=SALT).fingerprint


def test_one_person_one_name_in_every_form_of_path():
    text = "/Users/jane.doe/x /home/jane.doe C:\\Users\\jane.doe\\a %2FUsers%2Fjane.doe -Users-jane-doe-work-app"
    clean = Scrubber(salt=SALT).scrub_text(text)
    name = clean.split("/")[2]
    assert clean == f"/Users/{name}/x /home/{name} C:\\Users\\{name}\\a %2FUsers%2F{name} -Users-{name}-work-app"


@pytest.mark.parametrize("name", ["Jörg", "user1", "a", "van_den.Berg-2", "O.o"])
def test_names_of_all_sorts(name):
    clean = Scrubber(salt=SALT).scrub_text(f"cd /home/{name}/src && ls '/Users/{name}'")
    assert f"/{name}" not in clean and clean.startswith("cd /home/user") and clean.endswith("'")


def test_a_value_found_by_its_context_is_replaced_where_it_stands_alone():
    value = "qR8!vx20mmQ"
    trace = schema.Trace(
        id="t", format="f", steps=[],
        messages=[schema.Message(role="tool", content=f"try {value}"), schema.Message(role="user", content=f"PGPASSWORD={value}")],
    )  # fmt: skip
    clean = Scrubber(salt=SALT).scrub_trace(trace)
    assert value not in msgspec.json.encode(clean).decode()
    assert clean.messages[0].content.removeprefix("try ") == clean.messages[1].content.removeprefix("PGPASSWORD=")


def test_the_owner_in_a_listing_is_the_user_of_the_path():
    text = "/home/mirela/x\ndrwxr-xr-x  2 mirela mirela 4096 Jan 1 12:00 src\nmirela@box:~$ "
    trace = schema.Trace(id="t", format="f", steps=[], messages=[schema.Message(role="user", content=text)])
    assert "mirela" not in Scrubber(salt=SALT).scrub_trace(trace).messages[0].content


def test_texts_are_searched_together_and_do_not_run_into_each_other():
    scrubber, key = Scrubber(salt=SALT), "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"
    texts = ["an end without a stop", key, 'password="', "clean", "hf", "_" + key[3:]]
    rules = scrubber._text.prepare(texts).rules
    assert set(rules) == {key, 'password="', "_" + key[3:]}
    assert [token.prefix for token in rules[key][0].tokens] == ["hf_"]
    assert rules['password="'][0].anchors == ("pass",) and rules["_" + key[3:]][0].tokens == ()


@pytest.mark.parametrize(
    "text", ["Bearer /home/abc/x", "token=/home/ab", "password: jane@corp.dev", "secret='jane@corp.dev'"]
)
def test_a_pseudonym_does_not_become_a_secret(text):
    scrubber = Scrubber(salt=SALT)
    once = scrubber.scrub_text(text)
    assert "user" in once and scrubber.scrub_text(once) == once


# Salt


def test_the_salt_is_made_once_and_readable_by_the_user_only(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPOSER_SCRUB_SALT", raising=False)
    first = load_salt(tmp_path / "cache")
    assert first == load_salt(tmp_path / "cache") and len(first) == 64
    assert stat.S_IMODE((tmp_path / "cache" / "scrub.salt").stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "cache") == ["scrub.salt"]
    monkeypatch.setenv("COMPOSER_SCRUB_SALT", "sixteen or more characters")
    assert load_salt(tmp_path / "cache") == b"sixteen or more characters"
    monkeypatch.setenv("COMPOSER_SCRUB_SALT", "short")
    with pytest.raises(ConfigError, match="expected 16"):
        load_salt(tmp_path / "cache")


def test_processes_that_start_together_get_one_salt(tmp_path):
    code = "import sys, pathlib; from composer_plugins.scrub.placeholders import load_salt; print(load_salt(pathlib.Path(sys.argv[1])).decode())"
    environment = {k: v for k, v in os.environ.items() if k != "COMPOSER_SCRUB_SALT"}
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]  # fmt: skip
    assert len({run.communicate()[0] for run in runs}) == 1


def test_a_salt_that_cannot_be_kept_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPOSER_SCRUB_SALT", raising=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="COMPOSER_SCRUB_SALT"):
        load_salt(tmp_path / "file")


# The user's rules


RULES = """
allow = ["demo@corp.dev"]
allow_regex = ["^ghp_a1B2"]

[[rule]]
kind = "employee_id"
regex = 'EMP-(?P<secret>\\d{6})'
literals = ["EMP-"]
"""


def test_own_rules_and_exceptions(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    text = f"EMP-123456 demo@corp.dev jane@corp.dev {KEY}"
    clean = Scrubber(load_rules(path), salt=SALT).scrub_text(text)
    assert (
        clean.startswith("EMP-[SECRET:employee_id:")
        and "demo@corp.dev" in clean
        and KEY in clean
        and "jane" not in clean
    )
    other = tmp_path / "rules.yaml"
    other.write_text(
        "allow: [demo@corp.dev]\nallow_regex: ['^ghp_a1B2']\nrule:\n- {kind: employee_id, regex: 'EMP-(?P<secret>\\d{6})', literals: [EMP-]}\n"
    )
    assert Scrubber(load_rules(other), salt=SALT).scrub_text(text) == clean


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rule]]\nkind = 'x'\nregex = '('", "not a regular expression"),
        ("[[rule]]\nkind = 'x'\nregex = 'a*'", "matches the empty text"),
        ("[[rule]]\nkind = 'Has Space'\nregex = 'a'", "small letters"),
        ("alow = ['x']", "alow"),
        ("allow_regex = ['(']", "not a regular expression"),
        ("allow = ", "not valid TOML"),
    ],
)
def test_a_bad_rules_file_is_a_clear_error(text, message, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_rules(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_rules(tmp_path / "other.toml")


# Report


def test_the_report_counts_and_never_holds_a_value():
    result = schema.ToolResult(
        call_id="c", content=f"{KEY}\n{KEY}", source_ref=schema.SourceRef(file="/home/ines/a.jsonl", line=9)
    )
    step = schema.Step(
        index=0, action=0, source_ref=schema.SourceRef(file="/home/ines/a.jsonl", line=7), results=[result]
    )
    call = schema.Message(
        role="assistant", tool_calls=[schema.ToolCall(id="c", name="run", arguments={"command": "env"})]
    )
    answer = schema.Message(role="tool", content=result.content, tool_call_id="c")
    trace = schema.Trace(id="t", format="f", messages=[call, answer], steps=[step], source_file="/home/ines/a.jsonl")
    scrubber = Scrubber(salt=SALT)
    scrubber.scrub_trace(trace)
    report = scrubber.report
    assert report.kinds["github_token"] == 2 and report.records == report.changed == 1
    kind, count, different, place = next(row for row in report.rows() if row[0] == "github_token")
    assert (count, different) == (2, 1) and ", line 9, Message" in place
    assert KEY not in repr(report) and "ines" not in repr(report)
    assert sum(report.to_dict()["kinds"].values()) == sum(sum(f.values()) for f in report.to_dict()["files"].values())


# Gates and tables


@pytest.mark.parametrize("detector", detectors(), ids=lambda d: d.kind)
@pytest.mark.filterwarnings("ignore")
def test_no_gate_hides_what_a_plugin_would_find(detector):
    """Texts made from each plugin's own patterns pass the literals and lengths that stand in front of it."""
    from composer_plugins.scrub.detectors import LENGTHS, LONG, longest_word

    @settings(max_examples=20, deadline=None, database=None, derandomize=True)
    @given(st.data())
    def check(data):
        pattern = data.draw(st.sampled_from(list(detector.plugin.denylist)))
        text = data.draw(st.from_regex(pattern, alphabet=string.printable))
        if not any(detector._found(line) for line in text.split("\n")):
            return
        expected = {(m.start(), m.end()) for line in [text] for m in pattern.finditer(line)}
        values = set(detector.plugin.analyze_string(text))
        if "\n" in text or not values or not expected:
            return
        assert longest_word(text) >= detector.longest, text
        assert detector.gate is None or detector.gate.search(lower(text)), text
        words = re.findall("[A-Za-z0-9_.-]+", text)
        signs = {kind for kind, length in LENGTHS.items() if any(len(word) >= length for word in words)}
        signs |= {literal for literal in detector.literals if literal in lower(text)}
        assert detector.literals & signs, text
        assert list(detector.spans(text, lower(text))), text
        assert list(detector.spans(text, lower(text), [w for w in words if len(w) >= LONG])), text

    check()


def test_every_field_of_the_records_is_scrubbed_or_kept_on_purpose():
    """A new field with text must be put into one of the two tables."""
    for record, fields in FIELDS.items():
        names = {f.name for f in msgspec.structs.fields(record) if holds_text(f.type)}
        assert names == set(fields) | KEPT[record], record.__name__
        assert not set(fields) & KEPT[record]


def holds_text(kind) -> bool:
    if kind in (int, float, bool, type(None)):
        return False
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(holds_text(part) for part in typing.get_args(kind))
    return kind is not schema.Cut


PARTS = [*"abZ09 \n\t\\\"'=:@/.-_[](){}<>,;&%$é→😀", "password", "token", "/home/", "https://", KEY, "eyJ", "-Users-", "\\n", "[SECRET:", "Bearer ", "jane@corp.dev", "-----BEGIN RSA PRIVATE KEY-----", "Cookie: "]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=40).map("".join))
def test_any_text_can_be_scrubbed_and_twice_changes_nothing(text):
    scrubber = Scrubber(salt=SALT)
    once = scrubber.scrub_text(text)
    assert KEY not in once
    assert scrubber.scrub_text(once) == once
    once.encode("utf-8")


ROWS = "\n".join("MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj" for _ in range(1000))
HOSTILE = {
    "key without end": "-----BEGIN PRIVATE KEY-----\n" + ROWS,
    "rows before a false end": ROWS + "\n-----END PRIVATE KEX-----",
    "ends": (ROWS[:2000] + "\n-----END PRIVATE KEY-----\n") * 30,
    "line breaks": "-----BEGIN PRIVATE KEY-----" + '\n "+\n' * 10_000,
    "backslashes": "token" + "\\" * 60_000 + "home\\x",
    "quotes": 'password="' * 6_000,
    "ats": "x@" + "a." * 30_000,
    "cookies": "Cookie:" * 8_000,
    "prefixes": "xoxb-" * 12_000,
    "key ids": "AKIAABCDEFGHIJKLMNOP " * 2_000,
    "urls": "https://a:b" * 6_000 + "@x",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(30)
def test_no_text_takes_more_than_linear_time(name):
    """Each takes well below a second; what backtracks takes minutes."""
    start = time.process_time()
    Scrubber(salt=SALT).scrub_text(HOSTILE[name])
    assert time.process_time() - start < 10


# What is remembered from record to record


def one_message(*texts):
    messages = [schema.Message(role="user", content=text) for text in texts]
    return schema.Trace(id="t", format="f", steps=[], messages=messages)


def test_the_name_of_a_project_folder_depends_on_the_other_texts_of_the_record():
    scrubber, folder = Scrubber(salt=SALT), "see -Users-jane-doe-app/x"
    alone = scrubber.scrub_trace(one_message(folder)).messages[0].content
    assert alone.endswith("-doe-app/x")  # nothing says that the name goes on
    first, second = scrubber.scrub_trace(one_message(folder, "/Users/jane-doe/y")).messages
    assert first.content.endswith("-app/x") and "doe" not in first.content + second.content


@pytest.mark.parametrize("limit", [0, 50, 10**9])
def test_what_is_remembered_changes_no_result_and_no_count(limit, monkeypatch):
    monkeypatch.setattr("composer_plugins.scrub.text._REMEMBERED", limit)
    texts = [f"mail jane{n % 3}@corp.dev or PASSWORD=hunter{n % 3}hunter /home/jane/{n % 4}" for n in range(12)]
    together, apart, kinds = Scrubber(salt=SALT), [], types.SimpleNamespace(total=0)
    for end in range(1, len(texts)):
        trace = one_message(*texts[:end], KEY)
        fresh = Scrubber(salt=SALT)
        apart.append(fresh.scrub_trace(trace))
        assert together.scrub_trace(trace) == apart[-1]
        kinds.total += sum(fresh.report.kinds.values())
    assert sum(together.report.kinds.values()) == kinds.total > 50
    assert together.report.records == together.report.changed == len(apart)


def test_reports_of_copies_add_up_as_if_one_had_done_it_all():
    traces = [one_message(f"/home/jane/{n} PASSWORD=hunter{n % 2}hunter") for n in range(4)]
    one, sum_of, copy = Scrubber(salt=SALT), Scrubber(salt=SALT), pickle.loads(pickle.dumps(Scrubber(salt=SALT)))
    for trace in traces:
        assert one.scrub_trace(trace) == copy.scrub_trace(trace)
        sum_of.add_report(copy.take_report())
    assert sum_of.report == one.report and sum_of.report.rows() == one.report.rows()
    assert copy.fingerprint == one.fingerprint and copy.report.records == 0
