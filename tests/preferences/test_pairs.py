"""Rules and filters of preference pairs, each on the smallest input that shows it."""

from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_plugins.errors import ConfigError
from composer_plugins.models.toolcalls import parse_action
from composer_plugins.preferences import PairOptions, PairStats, build_pairs
from composer_plugins.traces.schema import Hint, Message, Replay, SourceRef, State, Status, ToolCall, ToolResult

TOOLS = {"Read": {"name": "Read"}, "Bash": {"name": "Bash"}}
A, B, C = ("Read", {"file_path": "a.py"}), ("Bash", {"command": "ls -la"}), ("Bash", {"command": "git status"})


def act(*calls, content="") -> Message:
    made = [
        ToolCall(id=f"c{i}", name=name, raw_arguments=args) if isinstance(args, str)
        else ToolCall(id=f"c{i}", name=name, arguments=args)
        for i, (name, args) in enumerate(calls)
    ]  # fmt: skip
    return Message(role="assistant", content=content, tool_calls=made)


def state(number=0, recorded=A, status=Status.OK, **changes) -> State:
    calls = [recorded] if recorded and isinstance(recorded[0], str) else list(recorded)
    fields = {
        "id": f"s{number}",
        "trace_id": "t",
        "step": number,
        "messages": [Message(role="user", content="go")],
        "action": act(*calls),
        "source_ref": SourceRef(file="log.jsonl", line=7),
        "tools": TOOLS,
        "status": status,
        "results": [ToolResult(call_id="c0", content="", status=status)],
    }
    return State(**(fields | changes))


def said(teacher, action, *, weights=None, sample=0, state_id="s0", finish="stop", demo=False) -> Replay:
    message = action if isinstance(action, Message) else act(action)
    return Replay(
        state_id=state_id, teacher=teacher, model="m", weights_id=weights or teacher, action=message, sample=sample,
        finish_reason=finish, demonstration=demo,
    )  # fmt: skip


def make(states, replays, **options):
    stats = PairStats()
    states = states if isinstance(states, list) else [states]
    found = list(build_pairs(states, replays, PairOptions(**options), stats=stats))
    assert stats.read == stats.used + sum(stats.skipped.values()) == len(states)
    assert sum(stats.rules.values()) == len(found)
    return found, stats


def calls_of(message: Message) -> list:
    return [(c.name, c.arguments) for c in message.tool_calls]


def test_agreement_prefers_the_recorded_success_to_each_distinct_dissent():
    replays = [said("x", A), said("y", A), said("w", A), said("z", B), said("z", B, sample=1), said("v", C)]
    found, _ = make(state(hint=Hint(text="H", error_class="e", status=Status.OK, generator="g")), replays)
    assert [(calls_of(p.chosen), calls_of(p.rejected)) for p in found] == [([A], [C]), ([A], [B])]
    why = found[1].provenance
    assert (why.rule, why.chosen_by, why.rejected_by) == ("agreement", ["recorded", "w", "x", "y"], ["z"])
    assert (why.votes, why.voters, why.source_ref.line, why.demonstration) == (3, 5, 7, False)
    assert found[0].messages == [Message(role="user", content="go")], "no hint in a pair"
    assert found[0].tools == TOOLS and 0 < found[0].similarity < 1


def test_disagreement_overrules_only_what_failed():
    replays = [said("x", B), said("y", B), said("z", A)]
    assert make(state(), replays)[0] == []
    for status in (Status.ERROR, Status.INFERRED_ERROR, Status.HUMAN_REJECT):
        [pair], _ = make(state(status=status), replays)
        assert (calls_of(pair.chosen), calls_of(pair.rejected)) == ([B], [A])
        assert (pair.provenance.rule, pair.provenance.chosen_by) == ("disagreement", ["x", "y"])
        assert (pair.provenance.votes, pair.provenance.voters) == (2, 3)
    [pair], _ = make(state(), replays, overrule_success=True)
    assert pair.provenance.rule == "disagreement"
    assert make(state(status=Status.ERROR), [said("x", A), said("y", A), said("z", B)])[0] == [], "failed: no agreement"


@pytest.mark.parametrize("status", [Status.INTERRUPTED, Status.MISSING])
def test_an_unknown_outcome_teaches_nothing(status):
    _, stats = make(state(status=status), [said("x", B), said("y", B)], overrule_success=True)
    assert stats.skipped == {"recorded_outcome_unknown": 1}


def test_same_weights_are_one_vote():
    replays = [said("x", A, weights="w"), said("y", A, weights="w"), said("x", A, weights="w", sample=1), said("z", B)]
    found, stats = make(state(), replays)
    assert found == [] and stats.skipped == {"no_preference": 1}
    found, _ = make(state(), replays, count_samples_as_votes=True)
    assert [p.provenance.votes for p in found] == [3] and found[0].provenance.demonstration
    replays.append(said("v", A))
    [pair], _ = make(state(), replays)
    assert (pair.provenance.votes, pair.provenance.voters, pair.provenance.demonstration) == (2, 3, False)


def test_a_voter_that_ties_with_itself_or_says_no_call_votes_for_nothing_but_counts():
    torn = [said("x", A), said("x", B, sample=1)]
    assert make(state(), [*torn, said("y", A), said("z", B)])[0] == []  # A has 1 of 3
    words = [said("x", act(content="done")), said("v", act(content="done"))]
    assert make(state(), [*words, said("y", A), said("z", A)])[0] == []  # 2 of 4 is no majority
    assert make(state(), [*words, said("y", A), said("z", A), said("u", A), said("u", B, sample=1),
                          said("u", A, sample=2)])[0] != []  # fmt: skip


def test_invalid_calls_lose_without_a_vote_but_not_when_cut_off():
    broken, unknown = act(("Read", '{"file_path": ')), act(("Fly", {"to": "moon"}))
    replays = [said("x", broken), said("y", unknown), said("x", act(("Bash", "{")), sample=1, finish="length")]
    found, stats = make(state(), replays)
    assert [p.provenance.rule for p in found] == ["invalid_call"] * 2
    text, fly = (p.rejected for p in found)
    assert text.content == '<tool_call>\n{"name": "Read", "arguments": {"file_path": }\n</tool_call>'
    assert not text.tool_calls and calls_of(fly) == [("Fly", {"to": "moon"})]
    assert stats.answers == {"failed": 0, "unparsed": 1, "unknown_tool": 1, "cut_off": 1}
    assert make(state(status=Status.ERROR), replays)[0] == []
    assert len(make(state(tools={}), replays)[0]) == 1, "without a tool list no name is unknown"
    assert make(state(), replays, rules=("agreement",))[0] == []


@pytest.mark.parametrize(
    "written",
    ["Sure.\n<tool_call>\nls -la\n</tool_call>", '<tool_call>\n{"name": "Read", "arguments": [1]}\n</tool_call>'],
)
def test_an_unreadable_call_is_trained_against_as_it_was_written(written):
    [pair], _ = make(state(), [said("x", parse_action(written))])
    assert pair.rejected.to_chat() == {"role": "assistant", "content": written}


def test_recovered_error_is_off_by_default_and_wants_the_same_tool_soon():
    error = state(0, B, Status.ERROR)
    later = [state(1, A), state(2, C)]
    found, stats = make([error, *later], [])
    assert found == [] and stats.skipped == {"not_replayed": 3}
    rules = ("recovered_error",)
    [pair], _ = make([*later, error], [], rules=rules)
    assert (calls_of(pair.chosen), calls_of(pair.rejected)) == ([C], [B]) and pair.state_id == "s0"
    assert pair.provenance.rule == "recovered_error"
    assert make([error, *later], [], rules=rules, recovery_window=1)[0] == []
    assert make([error, state(1, A), state(2, C, Status.ERROR)], [], rules=rules)[0] == []
    assert make([error, state(2, C, trace_id="other")], [], rules=rules)[0] == []
    assert make([state(0, B, Status.HUMAN_REJECT), *later], [], rules=rules)[0] == []
    _, stats = make([error, state(1, B)], [], rules=rules)
    assert stats.filtered == {"identical": 1}


def test_filters_are_counted():
    close = ("Bash", {"command": "ls -l /some/long/path/to/a/folder/x"})
    closer = ("Bash", {"command": "ls -l /some/long/path/to/a/folder/y"})
    replays = [said("x", close), said("y", close), said("z", closer)]
    found, stats = make(state(recorded=close), replays)
    assert found == [] and stats.filtered == {"near_identical": 1} and stats.skipped == {"all_filtered": 1}
    assert len(make(state(recorded=close), replays, max_similarity=1.0)[0]) == 1
    skipped = {
        "untrainable": state(trainable=False),
        "recorded_empty": state(recorded=()),
        "recorded_has_no_call": state(action=act(content="done")),
        "recorded_unknown_tool": state(recorded=("Fly", {})),
        "recorded_unparsed": state(recorded=("Read", "{")),
    }
    for reason, one in skipped.items():
        assert make(one, replays)[1].skipped == {reason: 1}
    failed = [msgspec.structs.replace(r, action=None, error="timeout: x") for r in replays]
    assert make(state(), failed)[1].skipped == {"no_teacher_answered": 1}
    _, stats = make(state(), [said("x", A, state_id="elsewhere")])
    assert stats.orphans == 1 and stats.skipped == {"not_replayed": 1}


def test_long_actions_are_left_out_whole():
    stats = PairStats()
    options = PairOptions(max_action_tokens=5)
    count = lambda m: len(str(m.tool_calls[0].arguments).split())  # noqa: E731
    long = ("Bash", {"command": "one two three four five six seven"})
    replays = [said("x", A), said("y", A), said("w", A), said("z", B), said("v", long)]
    found = list(build_pairs([state()], replays, options, stats=stats, count_tokens=count))
    assert [calls_of(p.rejected) for p in found] == [[B]] and stats.filtered == {"action_too_long": 1}
    with pytest.raises(ConfigError, match="--model"):
        list(build_pairs([state()], replays, options))


def test_multi_call_actions_compare_as_ordered_lists():
    both, swapped = act(A, B), act(B, A)
    found, _ = make(state(recorded=(A, B)), [said("x", both), said("y", both), said("z", swapped)])
    assert [calls_of(p.rejected) for p in found] == [[B, A]]


def test_calls_only_takes_prose_off_both_sides():
    talk = act(B, content="Let me see.")
    [pair], _ = make(state(), [said("x", A), said("y", A), said("z", talk)], calls_only=True)
    assert pair.rejected.content == "" and calls_of(pair.rejected) == [B]


def test_demonstration_teachers_are_named_as_such():
    [pair], stats = make(state(), [said("x", act(("Fly", {})), demo=True)])
    assert pair.provenance.demonstration and stats.demonstration == 1


@pytest.mark.parametrize("options", [{"rules": ("coin_toss",)}, {"min_votes": 1}, {"max_similarity": 0.0}])
def test_bad_options(options):
    with pytest.raises(ConfigError):
        PairOptions(**options)


@given(st.lists(st.tuples(st.sampled_from("uvwxyz"), st.sampled_from([A, B, C, None])), max_size=12), st.randoms())
@settings(max_examples=200)
def test_votes_against_a_brute_force_count_and_order_independence(answers, random):
    numbered, replays = Counter(), []
    for teacher, choice in answers:
        message = act(content="words") if choice is None else act(choice)
        replays.append(said(teacher, message, sample=numbered[teacher]))
        numbered[teacher] += 1
    found, _ = make(state(status=Status.ERROR, recorded=A), replays)
    # Oracle: try every action; a voter is for it when it said it more often than anything else.
    voters = {teacher for teacher, _ in answers}
    winners = []
    for action in (A, B, C):
        votes = 0
        for voter in voters:
            mine = [str(c) for t, c in answers if t == voter]
            votes += (
                all(mine.count(str(action)) > mine.count(o) for o in set(mine) - {str(action)}) and str(action) in mine
            )
        if votes >= 2 and votes * 2 > len(voters):
            winners.append(action)
    assert [calls_of(p.chosen)[0] for p in found] == [w for w in winners if w != A]
    random.shuffle(replays)
    again, _ = make(state(status=Status.ERROR, recorded=A), replays)
    assert msgspec.json.encode(again) == msgspec.json.encode(found)


def test_ids_are_unique_over_rules_and_states():
    replays = [
        said(t, c, state_id=f"s{i}") for i in range(3) for t, c in itertools.chain([("x", A), ("y", A), ("w", A)],
        [("z", B), ("v", act(("Fly", {})))])
    ]  # fmt: skip
    found, _ = make([state(i) for i in range(3)], replays)
    assert len(found) == 6 and len({p.id for p in found}) == 6
    assert [p.state_id for p in found] == ["s0", "s0", "s1", "s1", "s2", "s2"]
