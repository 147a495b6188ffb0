"""The outer loop inside verl's real workers: two islands of FSDP2 processes on a CPU, without Ray.

OMP_NUM_THREADS=1 python -m pytest tests/verl/test_verl_outer.py              # workers in plain processes
OMP_NUM_THREADS=1 python -m pytest -m slow tests/verl/test_verl_outer.py      # two main_ppo with Ray, and LoRA: 5 minutes
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("verl", "torchft"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(
            f"{package} is not installed beside verl: pip install 'composer-plugins[verl,torchft]' in an environment of "
            "its own (docs/how-to/verl.md)",
            allow_module_level=True,
        )

import torch

HERE = Path(__file__).parent
CPU_HOST = HERE / "cpu_host"
RECIPES = HERE.parents[1] / "recipes" / "verl"
sys.path[:0] = [str(HERE.parent / "torchft"), str(CPU_HOST)]

from composer_torchft.doctor import LighthouseLimits
from composer_torchft.lighthouse import Lighthouse
from harness_torchft import reference

pytestmark = pytest.mark.timeout(600)
ENVIRONMENT = {
    "PYTHONPATH": str(CPU_HOST), "VERL_USE_EXTERNAL_MODULES": "composer_cpu_host", "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "RUST_LOG": "error",
}  # fmt: skip


def overrides(folder: Path, steps: int) -> list[str]:
    """Hydra overrides of a tiny run; in a process of its own, since it imports verl for the CPU."""
    code = (
        "import json, pathlib; from composer_cpu_host.overrides import cpu_overrides; "
        f"print('\\n' + json.dumps(cpu_overrides(pathlib.Path({str(folder)!r}), steps={steps})))"
    )
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Islands:
    """Starts islands of worker processes and reads what they wrote."""

    def __init__(self, folder: Path, address: str, steps: int, ranks: int) -> None:
        self.folder, self.address, self.ranks = folder, address, ranks
        self.overrides = overrides(folder, steps)
        self.processes: dict[str, list[subprocess.Popen]] = {}

    def start(self, index: int, *, name: str | None = None, outer: str = "", more: tuple = (), **settings) -> str:
        name = name or f"island{index}"
        ours = [f"composer.outer.{key}={value}" for key, value in {
            "lighthouse": self.address, "island": name, "sync_every": 4, "start_with": 2,
        }.items()]  # fmt: skip
        limits = "{quorum: 120, allreduce: 20, connect: 20}"
        settings = {
            "index": index, "folder": str(self.folder), "name": name, "recipe": str(RECIPES / "composer_diloco.yaml"),
            "overrides": [
                *self.overrides, *ours, f"composer.outer.timeouts={limits}",
                "actor_rollout_ref.rollout.name=receiver", "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", "actor_rollout_ref.rollout.n=1", *more,
            ],
            **settings,
        }  # fmt: skip
        address, self.processes[name] = port(), []
        for rank in range(self.ranks):
            environment = {
                **os.environ, **ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(address), "COMPOSER_OUTER": outer,
            }  # fmt: skip
            with (self.folder / f"{name}-{rank}.out").open("wb") as out:
                command = [sys.executable, str(HERE / "outer_worker_verl.py"), json.dumps(settings)]
                self.processes[name].append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
        return name

    def output(self, name: str, rank: int = 0) -> str:
        return (self.folder / f"{name}-{rank}.out").read_text(errors="replace")[-5000:]

    def wait(self, name: str, code: int = 0) -> list[dict]:
        for rank, process in enumerate(self.processes[name]):
            assert process.wait(240) == code, self.output(name, rank)
        return [torch.load(self.folder / f"{name}-{rank}.pt") for rank in range(self.ranks)] if code == 0 else []

    def stop(self) -> None:
        for process in (p for found in self.processes.values() for p in found):
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path):
    """Return a function that makes a lighthouse and `Islands` for it."""
    made = []

    def make(steps: int, *, ranks: int = 1, islands: int = 2) -> Islands:
        made.append(Lighthouse("127.0.0.1:0", LighthouseLimits(30.0, 5.0, islands)))
        made.append(Islands(tmp_path, made[-1].address, steps, ranks))
        return made[-1]

    yield make
    for one in made:
        one.stop() if isinstance(one, Islands) else one.close()


def test_two_sharded_islands_with_a_critic_beside_the_actor(start):
    """8 rounds of 4 optimizer steps = 2 training steps; each island is 2 FSDP2 processes."""
    run = start(16, ranks=2)
    names = [run.start(i, critic=True, steps=16) for i in range(2)]
    first, second = (run.wait(name) for name in names)
    for a, b in zip(first, second, strict=True):
        assert a["ours_only"] and b["ours_only"]
        assert [s[1:] for s in a["step"]] == [(n, 2) for n in range(1, 9)] == [s[1:] for s in b["step"]]
        assert [s[0] for s in a["step"]] == list(range(2, 17, 2))
        for (before_a, after_a), (before_b, after_b) in zip(a["hashes"], b["hashes"], strict=True):
            assert before_a != before_b and after_a == after_b
        expected = reference(torch.stack([a["local"], b["local"]], dim=1).numpy(), a["start"].numpy())
        assert abs(a["global"].numpy() - expected).max() <= 1e-6
        assert torch.equal(a["end"], a["global"][-1])
        # the critics saw other data and were left alone
        assert len(set(a["critic"])) == 16 and not set(a["critic"]) & set(b["critic"])
        assert a["metrics"]["outer/step"] == 8.0
        # among verl's own metrics: the round before each of the two optimizer steps of a training step
        assert a["reported"][:2] == [{}, {}]
        for step, said in enumerate(a["reported"][2:], 3):
            assert said["outer/step"] == [float((step - 1) // 2)] * 2
            assert said["outer/participants"] == [2.0] * 2 and said["outer/bytes"][0] > 0
    for name in names:
        assert [f"outer loop of island {name}" in run.output(name, rank) for rank in range(2)] == [True, False]
    # what the inference engine receives: each island's own between two syncs, theta_global right after one
    for (step, sent_a, values), (_, sent_b, _) in zip(first[0]["received"], second[0]["received"], strict=True):
        assert (sent_a == sent_b) == (step % 2 == 0), step
        if step % 2 == 0:
            whole = torch.cat([rank["global"][step // 2 - 1] for rank in first])
            assert values.sum().item() == pytest.approx(whole.sum().item(), rel=1e-9)
            assert sorted(values.tolist()) == sorted(whole.tolist())


def test_a_run_resumed_in_mid_round_from_verls_checkpoint_is_the_uninterrupted_one(start):
    """Saved after training step 3 = optimizer step 6, half-way between two syncs; verl's own files carry our state."""
    run = start(6)
    whole = [run.start(i, steps=6, save_at=3) for i in range(2)]
    for name in whole:
        run.wait(name)
        assert "2 inner steps after the last sync" in run.output(name)  # said when it was saved
    resumed = [
        run.start(i, steps=6, first=3, name=f"resumed{i}", resume=str(run.folder / f"island{i}.checkpoint"))
        for i in range(2)
    ]
    for name, again in zip(whole, resumed, strict=True):
        (a,), (b,) = (torch.load(run.folder / f"{name}-0.pt"),), run.wait(again)
        assert [s[:2] for s in a["step"]] == [(2, 1), (4, 2), (6, 3)] and [s[:2] for s in b["step"]] == [(4, 2), (6, 3)]
        assert torch.equal(a["local"][1:], b["local"]) and torch.equal(a["global"][1:], b["global"])
        assert a["rates"][3:] == b["rates"]
    # a checkpoint that lacks the outer state is refused, with the reason
    file = next((run.folder / "island0.checkpoint").rglob("optim_world_size_1_rank_0.pt"))
    state = torch.load(file, weights_only=False)
    del state["state"]["composer_outer"]
    torch.save(state, file)
    bare = run.start(0, steps=6, first=3, name="bare", resume=str(run.folder / "island0.checkpoint"))
    run.wait(bare, code=1)
    assert "its checkpoint has no outer state" in run.output(bare)


def test_a_late_island_takes_over_weights_and_schedule(start):
    """The third begins with other weights while two are in mid-run; the schedule falls with every training step."""
    warm = ("actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",)
    run = start(14, islands=2)
    names = [run.start(i, steps=14, wait_at=5, more=warm) for i in range(2)]
    late = run.start(2, steps=8, late=True, weights=0.5, more=warm, total=14)
    donor, _ = (run.wait(name)[0] for name in names)
    (joined,) = run.wait(late)
    assert joined["attached"] and not torch.equal(joined["start"], donor["start"])
    theta = {s[1]: g for s, g in zip(donor["step"], donor["global"], strict=True)}
    shared = [(s, g) for s, g in zip(joined["step"], joined["global"], strict=True) if s[2] == 3]
    assert len(shared) >= 2
    for (_, outer_step, _), values in shared:
        assert torch.equal(values, theta[outer_step])
    # its rates are the donor's, from the step on at which it joined
    where = donor["rates"].index(pytest.approx(joined["rates"][1], rel=1e-9))
    assert where >= 5 and joined["rates"][1:5] == pytest.approx(donor["rates"][where : where + 4], rel=1e-9)
    assert joined["rates"][0] == pytest.approx(donor["rates"][0], rel=1e-9)


def test_the_last_step_leaves_with_the_global_parameters(start):
    """7 training steps = 14 optimizer steps and a sync every 4: the last two are given up, before weights go out."""
    run = start(7)
    names = [run.start(i, steps=7) for i in range(2)]
    (first,), (second,) = (run.wait(name) for name in names)
    for found in (first, second):
        assert torch.equal(found["end"], found["global"][-1])
        sent = {step: digest for step, digest, _ in found["received"]}
        assert sent[7] == sent[6] != sent[5]
    for name in names:  # the table at the end
        said = run.output(name)
        assert said.count(f"outer loop of island {name}") == 1 and "(2 inner steps since the last sync" in said


def test_offload_is_refused_by_the_worker_with_the_reason(start):
    run = start(2)
    name = run.start(0, steps=2, more=("actor_rollout_ref.actor.fsdp_config.param_offload=true",))
    run.wait(name, code=1)
    assert "param_offload moves the parameters" in run.output(name)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["actor_rollout_ref.actor.strategy=fsdp"], "needs actor_rollout_ref.actor.strategy=fsdp2"),
        (["actor_rollout_ref.actor.fsdp_config.param_offload=true"], "param_offload moves the parameters"),
        (["actor_rollout_ref.actor.fsdp_config.offload_policy=true"], "offload_policy keeps the parameters on the CPU"),
        (
            [
                "trainer.save_freq=2",
                "actor_rollout_ref.actor.checkpoint.save_contents=[model]",
                "actor_rollout_ref.actor.checkpoint.load_contents=[model,optimizer]",
            ],
            "save_contents lacks",
        ),
        (["trainer.save_freq=2", "actor_rollout_ref.actor.checkpoint.load_contents=[model]"], "load_contents lacks"),
        ([], None),
        (["composer.outer.sync_every=0", "actor_rollout_ref.actor.strategy=fsdp"], None),
        (["~actor_rollout_ref.actor.policy_loss.composer"], "nothing reads it"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=vanilla"], "nothing reads it"),
    ],
)
def test_a_recipe_that_cannot_be_exchanged_is_refused_beforehand(overrides, said):
    """By `composer-rl validate` and our trainer, with the sentence that the worker would say."""
    from composer_verl.host import compose
    from composer_verl.preflight import check_config

    overrides = [*overrides, "composer.policy.objective=host"] if "nothing" in (said or "") else overrides
    for trainer in ("sync", "composer"):
        found = check_config(
            compose(RECIPES / "composer_diloco.yaml", [*overrides, f"trainer.v1.trainer_mode={trainer}"])
        )
        assert len(found) == (said is not None) and (said or "") in "".join(found), found


def test_a_worker_refuses_what_it_cannot_exchange():
    from types import SimpleNamespace

    from composer_verl.outer import _refuse

    from composer_plugins.errors import OuterLoopError

    fits = {"strategy": "fsdp2", "param_offload": False, "offload_policy": False}
    _refuse(SimpleNamespace(engine_config=SimpleNamespace(**fits)))
    for change, said in (
        ({"strategy": "megatron"}, "found 'megatron'"),
        ({"param_offload": True}, "optimizer_offload may stay"),
        ({"offload_policy": True}, "steps them there"),
    ):
        with pytest.raises(OuterLoopError, match=said):
            _refuse(SimpleNamespace(engine_config=SimpleNamespace(**{**fits, **change})))


def test_a_broken_environment_variable_stops_the_run_and_not_only_the_plugin(start):
    """verl swallows what a plugin raises while it is imported."""
    run = start(2)
    name = run.start(0, steps=2, outer="{sync_evry: 4}", more=("composer.outer.sync_every=0",))
    run.wait(name, code=1)
    assert "COMPOSER_OUTER" in run.output(name) and "sync_evry" in run.output(name)


@pytest.mark.slow
def test_of_a_lora_only_the_adapter_travels(start):
    """verl draws a fresh adapter unseeded, so islands that set `lora_rank` differ; one that all load does not."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run = start(4)
    path = next(o.partition("=")[2] for o in run.overrides if o.startswith("actor_rollout_ref.model.path="))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora)
    model.save_pretrained(run.folder / "adapter")
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    more = (
        f"actor_rollout_ref.model.lora_adapter_path={run.folder / 'adapter'}",
        "actor_rollout_ref.actor.optim.lr=1e-2",
    )
    names = [run.start(i, steps=4, more=more) for i in range(2)]
    (first,), (second,) = (run.wait(name) for name in names)
    assert len(first["start"]) == size and first["metrics"]["outer/bytes"] == 4.0 * size  # fp32
    for (before_a, after_a), (before_b, after_b) in zip(first["hashes"], second["hashes"], strict=True):
        assert before_a != before_b and after_a == after_b
    expected = reference(torch.stack([first["local"], second["local"]], dim=1).numpy(), first["start"].numpy())
    assert abs(first["global"].numpy() - expected).max() <= 1e-6


@pytest.mark.slow
def test_two_whole_runs_of_verl_with_a_ray_cluster_each(tmp_path):
    """`main_ppo` twice: verl's driver, Ray, rollouts and weight updates; 4 training steps, a sync every 2."""
    house = Lighthouse("127.0.0.1:0", LighthouseLimits(60.0, 10.0, 2))
    processes, outputs = [], []
    for i in range(2):
        folder = tmp_path / f"island{i}"
        folder.mkdir()
        outputs.append(folder / "output.log")
        environment = {
            **os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(CPU_HOST), str(HERE / "outer_host")]),
            "VERL_USE_EXTERNAL_MODULES": "composer_cpu_host,outer_recorder", "RAY_ADDRESS": "local",
            "OUTER_RECORD": str(folder / "sent.jsonl"), "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
            "RAY_DEDUP_LOGS": "0", "RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(RECIPES), "--config-name",
            "composer_diloco", *overrides(folder, 4), f"hydra.run.dir={folder / 'hydra'}",
            f"composer.outer.lighthouse={house.address}", f"composer.outer.island=island{i}",
            "composer.outer.sync_every=2", "composer.outer.timeouts={quorum: 300, allreduce: 30, connect: 60}",
            f"data.seed={i}", f"actor_rollout_ref.rollout.seed={i}",
        ]  # fmt: skip
        with outputs[-1].open("wb") as out:
            processes.append(
                subprocess.Popen(
                    command, env=environment, cwd=folder, stdout=out, stderr=out, start_new_session=True
                )
            )  # fmt: skip
    try:
        for process, output in zip(processes, outputs, strict=True):
            assert process.wait(540) == 0, output.read_text(errors="replace")[-5000:]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        house.close()
    sent = [dict(map(json.loads, (o.parent / "sent.jsonl").read_text().splitlines())) for o in outputs]
    assert [sent[0][step] == sent[1][step] for step in range(5)] == [True, False, True, False, True]
    for output in outputs:
        rounds = [json.loads(line) for line in (output.parent / "run" / "outer.jsonl").read_text().splitlines()]
        assert [(r["outer_step"], r["participants"], r["committed"]) for r in rounds] == [(1, 2, True), (2, 2, True)]
        metrics = [json.loads(line)["data"] for line in (output.parent / "metrics.jsonl").read_text().splitlines()]
        assert len(metrics) == 4 and all(m["actor/grad_norm"] > 0 for m in metrics)
        # one optimizer step each, so the round after the second step shows in the third
        assert [m.get("actor/outer/step") for m in metrics] == [None, None, 1.0, 1.0]
        assert metrics[-1]["actor/outer/participants"] == 2.0
