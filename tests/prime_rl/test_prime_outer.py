"""The outer loop inside prime-rl's own trainer: two islands, each `prime_rl.trainer.rl.train` on a CPU.

    PRIME_RL=/path/to/prime-rl python -m pytest tests/prime_rl/test_prime_outer.py -m "slow or not slow"

The whole `train` function runs (see cpu_host/prime_cpu.py for what stands in for a GPU): its loader on the file system
transport, its forward pass, our loss, its optimizer, schedule, weight broadcast by file system, and checkpoints. Not run:
the orchestrator, whose batches are written beforehand by prime-rl's own sender, and the inference engine.
"""

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = os.environ.get("PRIME_RL", "no-prime-rl")  # conftest.py skips when there is none
if importlib.util.find_spec("torchft") is None:
    pytest.skip("torchft is not installed beside prime-rl (docs/how-to/diloco.md)", allow_module_level=True)

import torch

sys.path.insert(0, str(HERE.parent / "torchft"))

from composer_torchft.doctor import LighthouseLimits
from composer_torchft.lighthouse import Lighthouse
from harness_torchft import reference

pytestmark = [pytest.mark.prime_rl, pytest.mark.timeout(600)]
PACKAGES = [str(Path(SOURCE) / "src"), *map(str, sorted(Path(SOURCE).glob("packages/*/src")))]
VOCABULARY, LENGTH = 64, 24


def write_model(folder: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0").save_pretrained(folder)  # 0.8.1.dev53 reads one
    return folder


def write_batches(folder: Path, index: int, steps: range, ranks: int) -> None:
    """What the orchestrator sends, by prime-rl's own packing and sender: random, of this island's own."""
    sys.path[:0] = [p for p in PACKAGES if p not in sys.path]
    from prime_rl.trainer.batch import build_bin_cost, prepare_batch
    from prime_rl.transports.rollouts import FileSystemMicroBatchSender, TrainingSample

    for step in steps:
        draw = torch.Generator().manual_seed(10_000 * index + step)
        samples = []
        for _ in range(2 * ranks):
            ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=draw).tolist()
            half = LENGTH // 2
            advantage = float(torch.randn(1, generator=draw))
            samples.append(
                TrainingSample(
                    token_ids=ids, mask=[False] * half + [True] * half, logprobs=[0.0] * half + [-4.0] * half,
                    temperatures=[1.0] * LENGTH, env_name="test", advantages=[0.0] * half + [advantage] * half,
                )
            )  # fmt: skip
        grid = prepare_batch(
            rollouts=samples,
            seq_len=LENGTH,
            num_train_workers=ranks,
            bin_cost=build_bin_cost(None),
            pad_to_multiple_of=1,
        )
        asyncio.run(FileSystemMicroBatchSender(folder, ranks, step).send(grid))


class Islands:
    """Starts islands and reads what they recorded."""

    def __init__(self, folder: Path, address: str, ranks: int) -> None:
        self.folder, self.address, self.ranks = folder, address, ranks
        self.model = write_model(folder / "model")
        self.processes: dict[str, list[subprocess.Popen]] = {}

    def start(self, index: int, *, steps: int, name: str | None = None, first: int = 1, outer: str = "", toml: str = "", model: str = "",
              **environment: str) -> str:  # fmt: skip
        name = name or f"island{index}"
        run = self.folder / name
        write_batches(run, index, range(first, steps + 1), self.ranks)
        config = run / "trainer.toml"
        config.write_text(
            f'output_dir = "{run}"\nmax_steps = {steps}\ndist_timeout_seconds = 120\n'
            f'[model]\nname = "{self.model}"\nseq_len = {LENGTH}\nimpl = "hf"\nattn = "flash_attention_2"\n'
            'compile = "None"\nac = "None"\nac_offloading = "None"\nfused_lm_head_token_chunk_size = "disabled"\n'
            f"{model}"
            'reduce_dtype = "float32"\n'
            '[rollout_transport]\ntype = "filesystem"\n[optim]\nlr = 1e-3\n[log]\nlevel = "debug"\n[monitors.file]\n'
            '[loss]\ntype = "custom"\nimport_path = "composer_prime_rl.loss.composer_loss"\n'
            '[loss.kwargs.composer.policy]\nobjective = "cispo"\n' + toml
        )
        limits = "timeouts: {quorum: 120, allreduce: 20, connect: 20}"
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(PACKAGES), "OMP_NUM_THREADS": "1", "RUST_LOG": "error",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
            "TORCHFT_LIGHTHOUSE": self.address, "COMPOSER_ISLAND": name,
            "COMPOSER_OUTER": outer or f"{{sync_every: 2, start_with: 2, {limits}}}",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks), **environment,
        }  # fmt: skip
        self.processes[name] = []
        for rank in range(self.ranks):
            command = [
                sys.executable,
                str(HERE / "outer_worker_prime.py"),
                str(self.record(name, rank)),
                "@",
                str(config),
            ]
            with (self.folder / f"{name}-{rank}.out").open("wb") as out:
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes[name].append(subprocess.Popen(command, env=ranked, stdout=out, stderr=out))
        return name

    def record(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}-{rank}.pt"

    def output(self, name: str, rank: int = 0) -> str:
        return (self.folder / f"{name}-{rank}.out").read_text(errors="replace")

    def wait(self, name: str, code: int = 0) -> list[dict]:
        for rank, process in enumerate(self.processes[name]):
            assert process.wait(500) == code, self.output(name, rank)[-5000:]
        return [torch.load(self.record(name, rank)) for rank in range(self.ranks)] if code == 0 else []

    def wait_for_failure(self, name: str) -> None:
        for process in self.processes[name]:
            assert process.wait(300) != 0

    def steps(self, name: str) -> int:
        """Optimizer steps since the island attached."""
        file = self.record(name, 0).with_suffix(".progress")
        return int(file.read_text() or 0) if file.exists() else 0

    def wait_for_steps(self, name: str, count: int) -> None:
        deadline = time.time() + 240
        while self.steps(name) < count:
            assert time.time() < deadline and self.processes[name][0].poll() is None, self.output(name)[-5000:]
            time.sleep(0.1)

    def broadcast(self, name: str, step: int) -> dict[str, torch.Tensor]:
        """What prime-rl wrote for the inference engine after a step."""
        from safetensors.torch import load_file

        files = sorted((self.folder / name / "broadcasts" / f"step_{step}").glob("*.safetensors"))
        return {k: v for file in files for k, v in load_file(file).items()}

    def stop(self) -> None:
        for process in (p for found in self.processes.values() for p in found):
            process.kill()
            process.wait()


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Return a function that makes a lighthouse and `Islands` for it."""
    made = []

    def make(*, ranks: int = 1, islands: int = 2) -> Islands:
        made.append(Lighthouse("127.0.0.1:0", LighthouseLimits(30.0, 5.0, islands)))
        made.append(Islands(tmp_path, made[-1].address, ranks))
        return made[-1]

    yield make
    for one in made:
        one.stop() if isinstance(one, Islands) else one.close()


KEEP_ALL = "[ckpt]\ninterval = 1\n"


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and len(one) > 0 and all(torch.equal(one[k], other[k]) for k in one)


def test_two_islands_of_the_whole_trainer(start):
    """17 steps, a sync every 2: the last step is given up, and what is broadcast after it is the global model."""
    run = start()
    names = [run.start(i, steps=17, toml=KEEP_ALL) for i in range(2)]
    (first,), (second,) = (run.wait(name) for name in names)
    for found in (first, second):
        assert found["step"] == [(2 * n, n, 2) for n in range(1, 9)]
        assert found["left"] and torch.equal(found["start"], first["start"])
    for (before_a, after_a), (before_b, after_b) in zip(first["hashes"], second["hashes"], strict=True):
        assert before_a != before_b and after_a == after_b
    expected = reference(torch.stack([first["local"], second["local"]], dim=1).numpy(), first["start"].numpy())
    for found in (first, second):
        assert len(expected) == 8 and abs(found["global"].numpy() - expected).max() <= 1e-6
    for step in range(18):
        equal = same(*(run.broadcast(name, step) for name in names))
        assert equal == (step % 2 == 0 or step == 17), step
    assert same(run.broadcast(names[0], 16), run.broadcast(names[0], 17))  # the last step was given up
    for name in names:  # the table at the end
        said = run.output(name)
        assert said.count(f"outer loop of island {name}") == 1 and "(1 inner steps since the last sync" in said


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_resumed_in_mid_round_is_the_uninterrupted_one(start):
    """Sharded over two processes (FSDP2); saved after step 3, between two syncs, and after every other step."""
    run = start(ranks=2)
    whole = [run.start(i, steps=5, toml=KEEP_ALL) for i in range(2)]
    found = [run.wait(name) for name in whole]
    saved = run.folder / "island0" / "checkpoints" / "step_3"
    assert {f.name for f in (saved / "composer_outer").iterdir()} == {"rank_0.pt", "rank_1.pt"}
    assert "1 inner steps after the last sync" in run.output("island0")  # said when it was saved
    resume = '[resume]\ndir = "{}"\n'
    again = [
        run.start(
            i, steps=6, first=4, name=f"again{i}", toml=resume.format(run.folder / f"island{i}/checkpoints/step_3")
        )
        for i in range(2)
    ]
    for before, name in zip(found, again, strict=True):
        for one, two in zip(before, run.wait(name), strict=True):
            assert [s[:2] for s in one["step"]] == [(2, 1), (4, 2)] and [s[:2] for s in two["step"]] == [(1, 2), (3, 3)]
            assert torch.equal(one["local"][1], two["local"][0]) and torch.equal(one["global"][1], two["global"][0])
    # a checkpoint without the outer state is refused, with the reason
    (saved / "composer_outer" / "rank_0.pt").unlink()
    bare = run.start(0, steps=6, first=4, name="bare", toml=resume.format(saved))
    run.wait_for_failure(bare)
    assert "needs the outer state, expected at" in run.output(bare)


@pytest.mark.slow
def test_a_late_island_takes_over_weights_and_schedule(start):
    """With prime-rl's default, the optimizer's state kept on the CPU between steps."""
    run = start()
    falls = '[scheduler]\ntype = "linear"\nwarmup_steps = 2\ndecay_steps = 398\n'
    until = {"steps": 400, "toml": falls, "TEST_SLOW": "0.3", "TEST_UNTIL": str(run.folder / "stop")}
    names = [run.start(i, **until) for i in range(2)]
    run.wait_for_steps(names[0], 4)
    late = run.start(2, TEST_OTHER_WEIGHTS="0.5", **until)
    run.wait_for_steps(late, 6)
    (run.folder / "part").write_text(str(run.steps(names[0]) // 2 + 4))  # the outer step at which all stop
    (run.folder / "part").rename(run.folder / "stop")
    donor, _, joined = (run.wait(name)[0] for name in (*names, late))
    assert len(joined["attached"]) == 1 and not torch.equal(joined["start"], donor["start"])
    theta = {s[1]: g for s, g in zip(donor["step"], donor["global"], strict=True)}
    shared = [(s, g) for s, g in zip(joined["step"], joined["global"], strict=True) if s[2] == 3 and s[1] in theta]
    assert len(shared) >= 2
    for (_, outer_step, _), values in shared:
        assert torch.equal(values, theta[outer_step])
    at = 2 * joined["attached"][0]  # the donor's steps until then
    assert joined["rates"][1:6] == pytest.approx(donor["rates"][at : at + 5], rel=1e-9)
    assert joined["rates"][1] != pytest.approx(joined["rates"][0], rel=1e-3)


def test_what_cannot_be_exchanged_is_refused_with_the_reason(start):
    run = start()
    name = run.start(0, steps=2, model="fsdp_cpu_offload = true\noptim_cpu_offload = false\n")
    run.wait_for_failure(name)
    assert "does not go with trainer.model.fsdp_cpu_offload" in run.output(name)


@pytest.mark.parametrize(
    ("model", "runs", "said"),
    [
        ({}, 1, None),
        ({"optim_cpu_offload": True}, 1, None),
        ({"full_offload": True}, 1, r"trainer\.model\.full_offload, which steps copies"),
        ({"fsdp_cpu_offload": True}, 1, r"trainer\.model\.fsdp_cpu_offload, which keeps"),
        ({}, 2, "max_concurrent_runs above 1"),
    ],
)
def test_settings_that_are_refused(model, runs, said):
    """Of versions that have them: prime-rl's settings are looked at by name."""
    from types import SimpleNamespace

    from composer_prime_rl.outer import _refuse

    from composer_plugins.errors import OuterLoopError

    trainer = SimpleNamespace(model=SimpleNamespace(**model), max_concurrent_runs=runs)
    if said is None:
        _refuse(trainer)
    else:
        with pytest.raises(OuterLoopError, match=said):
            _refuse(trainer)


def test_a_broken_environment_variable_ends_the_run(start):
    run = start()
    name = run.start(0, steps=2, outer="{sync_evry: 2}")
    run.wait_for_failure(name)
    assert "COMPOSER_OUTER" in run.output(name) and "sync_evry" in run.output(name)
