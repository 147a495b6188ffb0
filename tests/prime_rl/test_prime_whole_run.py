"""prime-rl's whole `rl` command on a CPU (`cpu_host/`): launcher, environment servers, orchestrator and trainer.

The shipped overlay with all three channels, three steps. Everything is prime-rl's and verifiers' own but the inference
server, which is `plugins/prime_policy_server.py`: a real model that takes the trainer's weights, and scripted texts.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "plugins"), str(HERE / "cpu_host")]

import rl_cpu
import whole_run
from prime_fixtures import smollm2, tokenizer_dir  # noqa: F401
from prime_policy_server import PolicyServer
from prime_wire_tools import CALL, RENDERER

POLICY = "tiny"
STEPS = 3
pytestmark = [pytest.mark.prime_rl, pytest.mark.model]

ON_A_CPU = """
[orchestrator.model.client]
base_url = "{url}"
api_key_var = "UNSET_KEY"
[trainer.model]
impl = "hf"
attn = "flash_attention_2"
optim_cpu_offload = false
compile = "None"
ac = "None"
ac_offloading = "None"
fused_lm_head_token_chunk_size = "disabled"
[rollout_transport]
type = "filesystem"
[weight_broadcast]
type = "filesystem"
"""


class Serving(PolicyServer):
    """Takes prime-rl's weights as its vLLM server does, and samples one of two first turns."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.loaded: list[int] = []
        self.random = random.Random(0)

    def admin(self, path: str, body: dict) -> bool:
        if path == "/update_weights":
            self.load(Path(body["weight_dir"]))
        return path in ("/pause", "/resume", "/update_weights")

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        tensors = {k: v.float() for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        with self.lock:
            found = self.model.load_state_dict(tensors, strict=False)
            assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}, found
            self.loaded.append(int(folder.name.removeprefix("step_")))

    def text_for(self, body: dict) -> str:
        if whole_run.MISSING in self.tokenizer.decode(body["token_ids"]):
            return "Sorry."
        return self.random.choice([CALL, "Done."])


@pytest.mark.slow
def test_rl_trains_all_three_channels(smollm2, tokenizer_dir, tmp_path, prime_tree):  # noqa: F811
    smollm2[0].bfloat16().float().save_pretrained(tokenizer_dir)  # prime-rl sends its weights in bfloat16
    server = Serving(*smollm2, str(tokenizer_dir))
    whole_run.record_reference(tmp_path, str(tokenizer_dir), server.base_url, RENDERER)
    arguments = whole_run.write_configs(
        tmp_path, str(tokenizer_dir), steps=STEPS, lr=1e-3, renderer=RENDERER, more=ON_A_CPU.format(url=server.base_url)
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    environment = {**os.environ, **rl_cpu.programs(programs), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(HERE / "cpu_host" / "rl_cpu.py"), "rl", *arguments], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=560,
    )  # fmt: skip
    server.close()
    logs = "\n".join(f"== {f}\n{f.read_text()[-3000:]}" for f in sorted((tmp_path / "out").rglob("*.log")))
    assert done.returncode == 0, done.stdout[-3000:] + logs
    found = whole_run.figures(tmp_path / "out")
    print(whole_run.summary(found), server.loaded)
    assert whole_run.problems(found, STEPS) == []
    # one policy in trainer and server, then the trainer's new weights in the server: teacher and margins are live
    assert found["series"]["mismatch_kl/all/mean"][1] < 0.02 and abs(found["margins"][0]) < 1e-3
    assert server.loaded[:2] == [0, 1] and max(found["margins"]) > 0.1
