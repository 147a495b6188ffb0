"""A prime-rl run's saved rollouts, written by prime-rl's own monitor, read back as traces: nothing lost, nothing changed."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent / "plugins"))

from prime_fixtures import server, serving, smollm2, tokenizer_dir  # noqa: F401
from prime_wire_tools import CALL, MISSING, Wire, orchestrator_config, toy_env

from composer_plugins.traces.ingest import ingest
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.store import read_stage

pytestmark = [pytest.mark.prime_rl, pytest.mark.model]

POLICY = "tiny"
TASKS = [
    {"prompt": "Read a.txt", "results": [MISSING, "hello"], "score": 0.25},
    {"prompt": "Say hello", "results": [], "score": 1.0},
]


@pytest.fixture
def saved(server, tokenizer_dir, tmp_path, prime_tree):  # noqa: F811
    """(episodes, the file that prime-rl wrote), one failed episode among them."""
    from prime_rl.configs.monitors import FileMonitorConfig

    monitor_class = file_monitor()
    server.script.extend([CALL, CALL, "Done.", "Hello."])
    config = orchestrator_config(server, tokenizer_dir, [{"env": toy_env(TASKS)}], batch_size=2, output_dir=tmp_path)
    wire = Wire(config, server)
    asyncio.run(wire.roll_out())
    lost = vf.Episode(task=wire.episodes[0].task, errors=[vf.Error(type="EnvError", message="the box died")])

    async def save():
        monitor = monitor_class(FileMonitorConfig())
        await monitor.init(tmp_path)
        for episode in [*wire.episodes, lost]:  # as the orchestrator: one at a time, as they complete
            await monitor.log_episodes([episode], step=1, kind="train", subset="all")

    asyncio.run(save())
    return wire.episodes, tmp_path / "rollouts" / "step_1" / "train" / "all" / "traces.jsonl"


def file_monitor():
    """prime-rl's FileMonitor; its package also imports the Prime platform's client, which is not needed and not on PyPI."""
    sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))
    import prime_cpu

    with prime_cpu.stand_ins("prime_cli", "wandb_workspaces", "wandb_gql"):
        from prime_rl.monitors.file import FileMonitor
    return FileMonitor


def traces_of(path, out) -> list[Trace]:
    ingest([path], out)
    return list(read_stage(out, Trace))


def test_every_step_comes_back_with_its_state_action_and_reward(saved, tmp_path):
    episodes, path = saved
    assert len(path.read_text().splitlines()) == 3
    traces = traces_of(path, tmp_path / "traces.jsonl")
    assert len(traces) == 2  # the failed episode has no trace, and no step was made up for it
    for trace, episode in zip(traces, episodes, strict=True):
        (original,) = episode.traces
        assert trace.reward == original.reward and trace.session_id == episode.id
        sampled = [i for i, node in enumerate(original.nodes) if node.sampled]
        assert len(trace.steps) == len(sampled)
        for step, node in zip(trace.steps, sampled, strict=True):
            assert step.trainable and step.history_exact
            state = trace.messages[step.state_start : step.action]
            assert [m.role for m in state] == [n.message.role for n in original.nodes[:node]]
            assert [m.content for m in state] == [n.message.content or "" for n in original.nodes[:node]]
            action, message = trace.messages[step.action], original.nodes[node].message
            assert action.content == (message.content or "")
            expected = [(c.name, json.loads(c.arguments)) for c in message.tool_calls or []]
            assert [(c.name, c.arguments) for c in action.tool_calls] == expected


def test_the_failed_step_is_seen_as_failed(saved, tmp_path):
    traces = traces_of(saved[1], tmp_path / "traces.jsonl")
    first = traces[0].steps[0].results
    assert [r.status.failed for r in first] == [True] and first[0].content == MISSING
    assert [r.status.failed for s in traces[0].steps[1:] for r in s.results] == [False]


def test_nothing_that_prime_rl_wrote_is_dropped(saved, tmp_path):
    """No field of a row is unknown to the reader without a place: stamps, metrics, provenance are in `extra`."""
    episodes, path = saved
    row = json.loads(path.read_text().splitlines()[0])
    trace = traces_of(path, tmp_path / "traces.jsonl")[0]
    fields, episode = trace.extra["fields"], trace.extra["episode"]
    known = {"id", "nodes", "tools", "calls", "stop_condition"}
    assert set(row["traces"][0]) - known <= set(fields)
    assert set(row) - {"traces"} <= set(episode)
    assert fields["metrics"]["sdpo/scored_turns"] == 1 and fields["rewards"] == row["traces"][0]["rewards"]
    assert episode["run"]["work"]["step"] == 1 and episode["group"]["id"] == episodes[0].group.id
    node = row["traces"][0]["nodes"][1]
    assert node["reference_logprobs"] and node["loss_weights"]["ref_kl"]  # the stamps stay in the log
