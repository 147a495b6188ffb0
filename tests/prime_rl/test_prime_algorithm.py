"""The algorithm `composer`: registered at run time, started by a launcher of its own, scored in the orchestrator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
HERE = Path(__file__).parent

pytestmark = pytest.mark.prime_rl


def python(code: str, *arguments: str) -> str:
    """Run code in a process of its own (registration is once per process); return what it printed."""
    path = os.pathsep.join([str(HERE / "plugins"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CONFIG = """
from composer_prime_rl.algorithm import register, register_runtime
kind = register()
assert register() is kind  # a second call does nothing
from prime_rl.configs.orchestrator import OrchestratorConfig
algo = {"type": "composer", "composer": {"sdpo": {"weight": 0.5, "teacher": {"kind": "live"}}}}
config = OrchestratorConfig.model_validate({"algo": algo, "batch_size": 4, "train": {"source": [
    {"env": {"taskset": {"id": "composer-toy"}}}, {"env": {"taskset": {"id": "composer-toy"}}, "name": "b", "algo": {"type": "opsd"}}]}})
assert type(config.algo) is kind and type(config.train.source[0].algo) is kind
assert config.train.source[1].algo.type == "opsd"  # prime-rl's own are still there
again = OrchestratorConfig.model_validate(config.model_dump(mode="json"))
assert again.algo == config.algo
from prime_rl.orchestrator.algo import ALGORITHM_CLASSES, build_algorithm
before = dict(ALGORITHM_CLASSES)
register_runtime()
register_runtime()
assert {k: ALGORITHM_CLASSES[k] for k in before} == before and len(ALGORITHM_CLASSES) == len(before) + 1
print(type(build_algorithm(config.algo, None)).__name__)
"""


def test_prime_rl_parses_the_name_and_builds_the_runtime(prime_tree):
    assert python(CONFIG).splitlines()[-1] == "ComposerAlgorithm"


def test_the_rl_config_of_the_launcher_takes_it_too(prime_tree):
    code = "from composer_prime_rl.algorithm import register; register(); from prime_rl.configs.rl import RLConfig; "
    code += "print('composer' in str(RLConfig.model_json_schema()))"
    assert python(code).splitlines()[-1] == "True"


def test_too_late_is_said_and_not_half_done(prime_tree):
    code = "import prime_rl.configs.orchestrator\nfrom composer_prime_rl.algorithm import register\n"
    code += "try: register()\nexcept ValueError as e: print(e)"
    assert "must run before prime_rl.configs.orchestrator is imported" in python(code)


def launch(*arguments, **env):
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-m", "composer_prime_rl.launcher", *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, **env},
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [[], ["sft"], ["--help"]])
def test_a_wrong_call_shows_the_usage(arguments):
    done = launch(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage:") and "Traceback" not in done.stderr


def test_the_orchestrator_behind_the_launcher_reads_the_algorithm(prime_tree, tmp_path):
    """prime-rl's own orchestrator command, reached through the program that the launcher puts on the PATH."""
    from composer_prime_rl.launcher import orchestrator_program

    bad = tmp_path / "bad.toml"
    bad.write_text('batch_size = 4\n[algo]\ntype = "composer"\nno_such_key = 1\n')
    done = subprocess.run(
        [str(orchestrator_program(tmp_path)), "@", str(bad)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "--algo.composer.no-such-key" in said, (
        said
    )  # the algorithm's own class read the table


SCORED = """
import asyncio, json, sys
from composer_prime_rl.algorithm import register, register_runtime
register(); register_runtime()
from composer_plugins.models import install_tool_template, load_model
from prime_policy_server import PolicyServer
from prime_wire_tools import *
folder = sys.argv[1]
model, tokenizer = load_model("smollm2-135m-instruct")
install_tool_template(tokenizer)
tokenizer.save_pretrained(folder)
model.config.save_pretrained(folder)
server = PolicyServer(model, tokenizer, "policy")
server.script.extend([CALL, "Done."] * 2)
env = {"taskset": {"id": "composer-toy", "tasks": [{"prompt": "Read a.txt", "results": [MISSING]}]},
       "agent": {"runtime": {"type": "subprocess"}}}
algo = {"type": "composer", "composer": {"sdpo": SDPO}}
config = orchestrator_config(server, folder, [{"env": env, "group_size": 2}], batch_size=2, output_dir=folder, group_size=2, algo=algo)
wire = Wire(config, server)
batch = asyncio.run(wire.roll_out())
nodes = [n for e in wire.episodes for t in e.traces for n in t.nodes]
print(json.dumps({
    "stamped": [i for i, n in enumerate(nodes) if n.reference_logprobs], "turn": [sum(n.mask) for n in nodes],
    "weights": [sum(w != 0 for w in s.ref_kl_weights) for s in batch.samples],
    "pruned": [sum(s.rl_weights) for s in batch.samples], "asked": sum("prompt_logprobs" in r["sampling_params"] for r in server.requests),
}))
"""


@pytest.mark.model
def test_it_stamps_in_the_orchestrator_what_the_environment_would_have_stamped(prime_tree, tmp_path):
    found = json.loads(python(SCORED, str(tmp_path)).splitlines()[-1])
    assert found["stamped"] == [1, 5] and found["asked"] == 2  # the error turn of each of the two rollouts
    assert found["weights"] == [found["turn"][1]] * 2 and found["pruned"] == [0.0, 0.0]
