"""Which turns are hinted and what is written on them: corner cases, on traces of real rollouts that are then changed."""

import asyncio
import sys
from collections import Counter
from pathlib import Path

import pytest

vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "plugins")]

from composer_prime_rl.hinted_turns import TurnFinder
from composer_prime_rl.reference import CERTAIN
from composer_prime_rl.rendering import rendered_tokenizer
from composer_prime_rl.scoring import Endpoint, PrefillScorer, ScoringOptions
from composer_prime_rl.silent_rollouts import SilentRollouts
from composer_prime_rl.stamping import Stamper
from prime_fixtures import scoring_requests, server, serving, smollm2, tokenizer_dir  # noqa: F401
from prime_wire_tools import CALL, MISSING, RENDERER, SDPO, toy_env
from pydantic import TypeAdapter
from renderers import RendererConfig
from test_prime_env_rollout import configured, one_trace, play
from verifiers.v1.utils.loaders import load_environment

from composer_plugins.channels.silence import SilentChannelWarning
from composer_plugins.config import SDPOConfig
from composer_plugins.envs.tool_errors import NOT_RECORDED

pytestmark = pytest.mark.model

POLICY = "tiny"
TASK = {"prompt": "Read a.txt", "results": [MISSING]}


@pytest.fixture
def trace(server, tokenizer_dir):  # noqa: F811
    """user, call, MISSING, answer; not stamped yet."""
    server.script.extend([CALL, "Done."])
    found = one_trace(server, tokenizer_dir, toy_env([TASK], sdpo={"weight": 0.0}))
    assert [n.message.role for n in found.nodes] == ["user", "assistant", "tool", "assistant"]
    return found


@pytest.fixture
def finder(tokenizer_dir):  # noqa: F811
    renderer = TypeAdapter(RendererConfig).validate_python(RENDERER)
    return TurnFinder(SDPOConfig(**SDPO), rendered_tokenizer(str(tokenizer_dir), renderer))


def stamp(server, finder, *traces, route="ref_kl"):  # noqa: F811
    async def run():
        scorer = PrefillScorer(ScoringOptions(retries=0))
        try:
            stamper = Stamper(SDPOConfig(**SDPO), route, scorer, 60)
            return await stamper.stamp(list(traces), finder, Endpoint(server.base_url, "policy"))
        finally:
            await scorer.aclose()

    return asyncio.run(run())


def stamped(trace):
    return [i for i, node in enumerate(trace.nodes) if node.reference_logprobs is not None]


def test_a_teacher_that_is_certain_is_not_taken_for_none(server, finder, trace, monkeypatch):  # noqa: F811
    """prime-rl fills with 0.0 where there is no reference, so a log-prob of 0 is written just below it."""
    ask = server.prompt_logprobs

    def certain(ids):
        answer = ask(ids)
        answer["prompt_logprobs"][1:] = [{str(t): {"logprob": 0.0}} for t in ids[1:]]
        return answer

    monkeypatch.setattr(server, "prompt_logprobs", certain)
    stamp(server, finder, trace)
    assert set(trace.nodes[1].reference_logprobs) == {CERTAIN} and CERTAIN < 0


def test_active_tokens_are_those_that_the_hint_moved(server, finder, trace, monkeypatch):  # noqa: F811
    """A teacher that agrees with the policy but for one token, which it likes less by 0.5 nats."""
    node, ask = trace.nodes[1], server.prompt_logprobs
    taught = [node.logprobs[0] - 0.5, *node.logprobs[1:]]

    def agreeing(ids):
        answer = ask(ids)
        answer["prompt_logprobs"][-len(taught) :] = [
            {str(token): {"logprob": value}} for token, value in zip(ids[-len(taught) :], taught, strict=True)
        ]
        return answer

    monkeypatch.setattr(server, "prompt_logprobs", agreeing)
    stamp(server, finder, trace)
    assert trace.metrics["sdpo/tokens"] == len(taught) and trace.metrics["sdpo/active_tokens"] == 1
    assert trace.metrics["sdpo/divergence"] == pytest.approx(0.5 / len(taught))


def test_weights_that_the_environment_gave_stay(server, finder, trace):  # noqa: F811
    node = trace.nodes[1]
    node.loss_weights = {"ce": [0.25] * len(node.mask), "ref_kl": [9.0] * len(node.mask)}
    stamp(server, finder, trace)
    assert node.loss_weights["ce"] == [0.25] * len(node.mask)
    assert node.loss_weights["ref_kl"] == [0.5 if own else 0.0 for own in node.mask]


def test_what_a_recorded_workspace_cannot_answer_is_no_error(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL, "Done."])
    task = {"prompt": "x", "results": [f"Error executing tool bash: {NOT_RECORDED} cat a.txt"]}
    found = one_trace(server, tokenizer_dir, toy_env([task]))
    assert found.metrics["sdpo/tool_results"] == 1 and found.metrics["sdpo/error_turns"] == 0 and not stamped(found)


@pytest.mark.parametrize("prefixes", [["Nope:"], []])
def test_an_error_prefix_of_the_environment_is_an_error(server, tokenizer_dir, prefixes):  # noqa: F811
    server.script.extend([CALL, "Done."])
    env = toy_env([{"prompt": "x", "results": ["Nope: three apples"]}], error_prefixes=prefixes)
    assert one_trace(server, tokenizer_dir, env).metrics["sdpo/error_turns"] == len(prefixes)


def fork(trace, after: int, *messages):
    """Add a second branch: copies of later nodes with other texts."""
    parent = after
    for original, content in messages:
        node = trace.nodes[original].model_copy(deep=True)
        node.message.content = content
        node.parent = parent
        trace.nodes.append(node)
        parent = len(trace.nodes) - 1


def test_a_turn_that_branches_share_is_counted_and_hinted_once(server, finder, trace):  # noqa: F811
    fork(trace, 2, (3, "Another answer."))
    assert len(trace.branches) == 2
    counts = Counter()
    turns = finder.find(trace, counts)
    assert len(turns) == 1 and turns[0].nodes == [trace.nodes[1]]
    assert counts == Counter(turns=3, tool_results=1, error_turns=1)


def test_a_turn_that_failed_in_one_branch_only_is_hinted_there(server, finder, trace):  # noqa: F811
    trace.nodes[2].message.content = "hello"
    fork(trace, 1, (2, MISSING), (3, "Sorry."))
    counts = Counter()
    (turn,) = finder.find(trace, counts)
    assert turn.nodes == [trace.nodes[1]] and counts["tool_results"] == 2 and counts["error_turns"] == 1


def test_a_turn_without_token_ids_is_counted_and_left_alone(server, finder, trace):  # noqa: F811
    node = trace.nodes[1]
    node.token_ids, node.mask, node.logprobs = [], [], []
    stamp(server, finder, trace)
    assert not stamped(trace) and trace.metrics["sdpo/no_tokens"] == 1 and scoring_requests(server) == []


def test_a_context_that_does_not_end_in_the_generation_prompt_is_counted_and_left_alone(server, finder, trace):  # noqa: F811
    node = trace.nodes[1]
    first = node.mask.index(True)
    node.token_ids[:first] = [5] * first
    stamp(server, finder, trace)
    assert not stamped(trace) and trace.metrics["sdpo/unplaced"] == 1 and scoring_requests(server) == []


def replayed(server, tokenizer_dir, trace, monkeypatch, **ctx):  # noqa: F811
    """The wrapper on an environment that returns a finished episode with this trace."""
    episode = vf.Episode(env=vf.EnvInfo(id="toy"), task=trace.task, traces=[trace])
    episode.ok = True
    loaded = load_environment(configured(toy_env([TASK])))

    async def finished(*args, **kwargs):
        return episode

    monkeypatch.setattr(loaded.inner, "run_episode", finished)
    renderer = TypeAdapter(RendererConfig).validate_python(RENDERER)
    train = vf.TrainClientConfig(
        base_url=server.base_url, api_key_var="UNSET_KEY", renderer=renderer, renderer_model_name=str(tokenizer_dir)
    )
    values = {"client": train, "model": "policy", "sampling": vf.SamplingConfig(temperature=1.0), **ctx}

    async def run():
        async with loaded.serving():
            await loaded.run_episode(next(iter(loaded.taskset)), vf.ModelContext(**values))

    asyncio.run(run())


def test_evaluation_rollouts_are_left_alone(server, tokenizer_dir, trace, monkeypatch):  # noqa: F811
    client = vf.EvalClientConfig(base_url=server.base_url, api_key_var="UNSET_KEY")
    played_by = trace.agent.config
    trace.agent.config = played_by.model_copy(update={"client": client})
    replayed(server, tokenizer_dir, trace, monkeypatch, client=client)
    assert not stamped(trace) and scoring_requests(server) == []
    assert not any(name.startswith("sdpo/") for name in trace.metrics)  # not even a failure to stamp
    trace.agent.config = played_by
    replayed(server, tokenizer_dir, trace, monkeypatch)
    assert stamped(trace) == [1]


@pytest.mark.parametrize("change", [{"model": "a-judge"}, {"trainable": False}])
def test_a_role_that_is_not_the_policy_is_left_alone(server, tokenizer_dir, trace, monkeypatch, change):  # noqa: F811
    if "model" in change:
        trace.agent.config = trace.agent.config.model_copy(update=change)
    else:
        trace.agent.trainable = False
    replayed(server, tokenizer_dir, trace, monkeypatch)
    assert not stamped(trace) and scoring_requests(server) == []


def test_a_hint_that_moves_nothing_is_silence_with_its_reason():
    counts = Counter(turns=2, tool_results=1, error_turns=1, hinted_turns=1, scored_turns=1, tokens=5)
    with pytest.warns(SilentChannelWarning, match="the hint moved none of the 10 tokens of 2 turns"):
        assert [SilentRollouts(1).update(Counter(counts, active_tokens=1))] == [False]
        watching = SilentRollouts(2)
        assert [watching.update(counts) for _ in range(2)] == [False, True]


def test_scoring_is_asked_once_per_hinted_turn(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3)
    task = {"prompt": "x", "results": [MISSING, MISSING]}
    (episode,) = play(server, tokenizer_dir, toy_env([task]))
    assert stamped(episode.traces[0]) == [1, 3] and len(scoring_requests(server)) == 2
