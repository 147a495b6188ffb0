"""The environment wrapper in verifiers' own rollout: what it stamps, what it leaves alone, and what it says."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
sys.path.insert(0, str(Path(__file__).parent / "plugins"))

from prime_fixtures import scoring_requests, server, serving, smollm2, tokenizer_dir  # noqa: F401
from prime_wire_tools import CALL, MISSING, RENDERER, SDPO, toy_env
from pydantic import TypeAdapter, ValidationError
from renderers import RendererConfig
from verifiers.v1.serve import env_config_data
from verifiers.v1.utils.loaders import env_config_type, load_environment

from composer_plugins.channels.silence import SilentChannelWarning

pytestmark = pytest.mark.model

POLICY = "tiny"
OK = "hello"
TASK = {"prompt": "Read a.txt", "results": [OK, MISSING, OK]}


def configured(env: dict):
    kind = env_config_type(env["taskset"]["id"], env.get("id", ""))
    return kind.model_validate(json.loads(json.dumps(env)))


def play(server, tokenizer_dir, env: dict, *, times=1, temperature=1.0, client="train"):  # noqa: F811
    """Return the episodes of the env's tasks."""

    async def run():
        loaded = load_environment(configured(env))
        renderer = TypeAdapter(RendererConfig).validate_python(RENDERER)
        train = vf.TrainClientConfig(
            base_url=server.base_url, api_key_var="UNSET_KEY", renderer=renderer, renderer_model_name=str(tokenizer_dir)
        )
        eval_client = vf.EvalClientConfig(base_url=server.base_url, api_key_var="UNSET_KEY")
        sampling = vf.SamplingConfig(temperature=temperature, extra_body={"cache_salt": "v3"})
        ctx = vf.ModelContext(client=train if client == "train" else eval_client, model="policy", sampling=sampling)
        episodes = []
        async with loaded.serving():
            for _ in range(times):
                for task in loaded.taskset:
                    (slot,) = loaded.slots(task)
                    episodes.append(await loaded.run_slot(slot, ctx))
        return episodes

    return asyncio.run(run())


def one_trace(*args, **kwargs):
    (episode,) = play(*args, **kwargs)
    assert episode.ok, episode.errors or [t.errors for t in episode.traces]
    (trace,) = episode.traces
    return trace


def test_only_the_error_turn_is_stamped_and_with_the_live_policys_log_probs(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    trace = one_trace(server, tokenizer_dir, toy_env([TASK]))
    assert [n.message.role for n in trace.nodes] == ["user", *["assistant", "tool"] * 3, "assistant"]
    stamped = [i for i, n in enumerate(trace.nodes) if n.reference_logprobs is not None or n.loss_weights is not None]
    assert stamped == [3]  # the second call: its result is the error
    node = trace.nodes[3]
    assert node.loss_weights == {"ref_kl": [0.5 if own else 0.0 for own in node.mask]}
    # an independent reading: the request's own ids, the hint in front of the turn, the same ids after it
    (request,) = scoring_requests(server)
    ids, own = request["token_ids"], node.token_ids[node.mask.index(True) :]
    assert ids[-len(own) :] == own and len(node.reference_logprobs) == sum(node.mask) == len(own)
    assert node.reference_logprobs == pytest.approx(server.logprobs(ids)[-len(own) :], abs=1e-6)
    before = [t for n in trace.nodes[:3] for t in n.token_ids] + node.token_ids[: node.mask.index(True)]
    prompt = server.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    context = ids[: -len(own)]
    assert before[-len(prompt) :] == prompt == context[-len(prompt) :]
    assert context[: len(before) - len(prompt)] == before[: -len(prompt)]  # nothing before the hint has changed
    hint = server.tokenizer.decode(context[len(before) - len(prompt) : -len(prompt)])
    assert hint.startswith("\n<|im_start|>user\n") or hint.startswith("<|im_start|>user\n")
    assert ".txt does not exist" in hint and hint.rstrip().endswith("<|im_end|>")
    assert request["cache_salt"] == "v3"


def test_the_counts_are_on_every_trace(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    trace = one_trace(server, tokenizer_dir, toy_env([TASK]))
    size = sum(trace.nodes[3].mask)
    moved = [a - b for a, b in zip(trace.nodes[3].logprobs, trace.nodes[3].reference_logprobs, strict=True)]
    expected = {
        "turns": 4, "tool_results": 3, "error_turns": 1, "hinted_turns": 1, "scored_turns": 1, "failed_turns": 0,
        "tokens": size, "active_tokens": sum(abs(m) > 1e-4 for m in moved),
    }  # fmt: skip
    assert {name: trace.metrics[f"sdpo/{name}"] for name in expected} == expected
    assert trace.metrics["sdpo/divergence"] == pytest.approx(sum(moved) / size)


def test_route_loss_stamps_no_weights_so_that_nothing_is_counted_twice(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    trace = one_trace(server, tokenizer_dir, toy_env([TASK], sdpo_route="loss"))
    assert trace.nodes[3].reference_logprobs and all(n.loss_weights is None for n in trace.nodes)


def test_weight_0_scores_nothing_and_is_the_wrapped_environment(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    trace = one_trace(server, tokenizer_dir, toy_env([TASK], sdpo={"weight": 0.0}))
    assert scoring_requests(server) == []
    assert all(n.reference_logprobs is None and n.loss_weights is None for n in trace.nodes)
    assert not any(name.startswith("sdpo/") for name in trace.metrics)


def test_leading_system_puts_the_hint_before_everything(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    sdpo = {**SDPO, "hint": {"sources": ["rollout"], "placement": "leading_system"}}
    trace = one_trace(server, tokenizer_dir, toy_env([TASK], sdpo=sdpo))
    (request,) = scoring_requests(server)
    stored = [t for n in trace.nodes[:4] for t in n.token_ids]
    assert request["token_ids"][-len(stored) :] == stored  # the whole branch up to the turn, verbatim
    assert server.tokenizer.decode(request["token_ids"][: -len(stored)]).startswith("<|im_start|>system\n")


def test_scope_completion_stamps_from_the_error_turn_to_the_end(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    trace = one_trace(server, tokenizer_dir, toy_env([TASK], sdpo={**SDPO, "scope": "completion"}))
    assert [i for i, n in enumerate(trace.nodes) if n.reference_logprobs] == [3, 5, 7]
    (request,) = scoring_requests(server)
    reference = server.logprobs(request["token_ids"])
    last = sum(trace.nodes[7].mask)
    assert trace.nodes[7].reference_logprobs == pytest.approx(reference[-last:], abs=1e-6)
    size = len(trace.nodes[7].token_ids) + len(trace.nodes[6].token_ids)
    own = trace.nodes[5].mask.index(True)
    assert trace.nodes[5].reference_logprobs == pytest.approx(
        reference[-size - len(trace.nodes[5].token_ids) + own : -size], abs=1e-6
    )


def test_a_recorded_hint_and_feedback(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL, "Done."])
    task = {"prompt": "Read a.txt", "results": [OK], "hint": "The file is in src/."}
    sdpo = {**SDPO, "hint": {"sources": ["recorded", "feedback"]}}
    trace = one_trace(server, tokenizer_dir, toy_env([task], sdpo=sdpo))
    (request,) = scoring_requests(server)
    assert "The file is in src/." in server.tokenizer.decode(request["token_ids"])
    assert [i for i, n in enumerate(trace.nodes) if n.reference_logprobs] == [1]


@pytest.mark.parametrize("fault", ["500", "close", "html", "short"])
def test_a_broken_scoring_server_costs_the_turn_its_hint_and_nothing_else(server, tokenizer_dir, fault):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    server.faults.extend([fault] * 3)
    env = toy_env([TASK], scoring={"retries": 2, "backoff": 0.0})
    trace = one_trace(server, tokenizer_dir, env)
    assert trace.ok and all(n.reference_logprobs is None for n in trace.nodes)
    assert trace.metrics["sdpo/failed_turns"] == 1 and trace.metrics["sdpo/scored_turns"] == 0
    reason = {"500": "server_error", "close": "unreachable"}.get(fault, "garbage")
    assert trace.metrics[f"sdpo/failed/{reason}"] == 1
    assert len(scoring_requests(server)) == 3  # asked, and asked twice again


def test_a_passing_fault_leaves_no_mark(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    server.faults.extend(["500", "html"])
    trace = one_trace(server, tokenizer_dir, toy_env([TASK], scoring={"backoff": 0.0}))
    assert trace.metrics["sdpo/scored_turns"] == 1 and trace.metrics["sdpo/failed_turns"] == 0


def test_the_deadline_bounds_what_scoring_adds_to_an_episode(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    server.faults.extend(["hang"] * 9)
    env = toy_env([TASK], scoring={"timeout": 30, "retries": 9, "deadline": 0.4})
    trace = one_trace(server, tokenizer_dir, env)
    assert trace.metrics["sdpo/failed/deadline"] == 1 and trace.metrics["sdpo/failed_turns"] == 1


def test_another_temperature_is_refused_and_said(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL] * 3 + ["Done."])
    with pytest.warns(SilentChannelWarning, match="temperature is not 1"):
        trace = one_trace(server, tokenizer_dir, toy_env([TASK], silent_after=1), temperature=0.7)
    assert scoring_requests(server) == [] and trace.metrics["sdpo/refused_temperature"] == 1


@pytest.mark.parametrize(
    ("task", "sdpo", "faults", "why"),
    [
        ({"prompt": "x", "results": []}, SDPO, [], "no tool result in any rollout"),
        ({"prompt": "x", "results": [OK]}, SDPO, [], "none of the 2 tool results was an error"),
        ({"prompt": "x", "results": [MISSING]}, SDPO, ["400"] * 2, "scored none of the 2 hinted turns"),
    ],
)
def test_a_wrapper_that_finds_nothing_says_why(server, tokenizer_dir, task, sdpo, faults, why):  # noqa: F811
    server.script.extend([CALL] * 9 if task["results"] else ["Done."])
    server.faults.extend(faults)
    with pytest.warns(SilentChannelWarning, match=why):
        play(server, tokenizer_dir, toy_env([task], sdpo=sdpo, silent_after=2), times=2)


def test_a_stamping_bug_does_not_cost_the_episode(server, tokenizer_dir, monkeypatch):  # noqa: F811
    from composer_prime_rl.hinted_turns import TurnFinder

    def broken(self, trace, counts):
        raise KeyError("gone")

    monkeypatch.setattr(TurnFinder, "find", broken)
    server.script.extend([CALL] * 3 + ["Done."])
    trace = one_trace(server, tokenizer_dir, toy_env([TASK]))
    assert trace.ok and trace.metrics["sdpo/failed/internal"] == 1


def test_it_wraps_an_environment_with_roles_of_its_own(server, tokenizer_dir):  # noqa: F811
    server.script.extend([CALL, "Done."] * 2)
    env = toy_env([{"prompt": "Read a.txt", "results": [MISSING]}])
    env["wraps"] = {"id": "best-of-n", "n": 2, "agent": env.pop("agent")}
    (episode,) = play(server, tokenizer_dir, env)
    assert episode.ok and len(episode.traces) == 2
    for trace in episode.traces:
        assert trace.metrics["best"] == 1.0  # the wrapped environment's own judgement
        assert trace.metrics["sdpo/scored_turns"] == 1


def test_the_config_survives_the_way_to_a_worker():
    config = configured(toy_env([TASK], sdpo_route="loss", scoring={"timeout": 5.0}))
    again = type(config).model_validate(json.loads(json.dumps(env_config_data(config))))
    assert again == config and again.section().sdpo.weight == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"composer": {"sdpo": {**SDPO, "hint": {"placement": "last_user"}}}}, "last_user"),
        ({"composer": {"sdpo": {**SDPO, "hint": {"sources": ["sibling"]}}}}, "sibling needs the whole group"),
        ({"composer": {"sdpo": {**SDPO, "temperature": 0.7}}}, "temperature"),
        ({"composer": {"sdpo": {**SDPO, "teacher": {"kind": "ema"}}}}, "teacher.kind: ema"),
        ({"composer": {"sdpo": {**SDPO, "alpha": 0.5}}}, "alpha"),
        ({"composer": {"spdo": {}}}, "spdo"),
        ({"sdpo_route": "both"}, "sdpo_route"),
    ],
)
def test_what_cannot_be_given_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        configured(toy_env([TASK], **change) if "composer" not in change else {**toy_env([TASK]), **change})
