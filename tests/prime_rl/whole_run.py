"""A whole prime-rl run with all three channels, and what it has to show. With GPUs, in prime-rl's folder and environment:

    uv run --no-sync python /path/to/composer-plugins/tests/prime_rl/whole_run.py --model Qwen/Qwen3-0.6B --out whole_run

It records the pairs' reference log-probs with prime-rl's own `inference`, runs prime-rl's own `rl` on the shipped
`composer_all.toml` with a toy environment (`plugins/composer_toy.py`: one shell tool, and the file is never there) and two
pairs, then prints the figures below and exits with 1 when one of them is out of place. `test_prime_whole_run.py` does the
same on a CPU, with a stand-in for the inference server.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes" / "prime_rl"
MISSING = "cat: a.txt: No such file or directory"

RUN = """
max_steps = {steps}
seq_len = 1024
output_dir = "{out}"
[model]
name = "{model}"
[orchestrator]
batch_size = 16
group_size = 2
{renderer_line}
[orchestrator.train.sampling]
max_completion_tokens = 256
[trainer.optim]
lr = {lr}
[monitors.file]
"""

SOURCES = """
[[orchestrator.train.source]]
name = "toy"
[orchestrator.train.source.env]
id = "composer-prime-rl"
agent = {{ runtime = {{ type = "subprocess" }} }}
composer = {{ sdpo = {{ weight = 0.5, teacher = {{ kind = "live" }} }} }}
[orchestrator.train.source.env.taskset]
id = "composer-toy"
tasks = [ {{ prompt = "What is in a.txt? If you cannot know, answer: Done.", results = ["{missing}"], score = 1.0, wanted = "Done." }} ]
[[orchestrator.train.source]]
name = "replay_dpo"
group_size = 1
[orchestrator.train.source.env.taskset]
id = "composer-prime-rl"
model = "{model}"
{renderer_line}
reference = "{reference}"
composer = {{ replay_dpo = {{ weight = 0.1, beta = 0.5, pairs = "{pairs}", max_length = 1024 }} }}
"""


def write_pairs(path: Path) -> Path:
    """Write two preference pairs as `composer-rl pairs` does."""
    from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef, ToolCall
    from composer_plugins.traces.store import Manifest, write_stage

    calls = [ToolCall(id="c", name="bash", arguments={"command": "ls"})]
    pairs = [
        Pair(
            id=f"pair-{i}", state_id=f"s{i}",
            messages=[Message(role="user", content=f"Question {i}: what is in the folder?")],
            chosen=Message(role="assistant", content=chosen, tool_calls=calls),
            rejected=Message(role="assistant", content=rejected),
            provenance=Provenance(
                rule="teachers", chosen_by=["t"], rejected_by=["u"], source_ref=SourceRef(file="made.jsonl", line=i)
            ),
        )
        for i, (chosen, rejected) in enumerate([("Let me look.", "I do not know."), ("I will list it.", "No.")])
    ]  # fmt: skip
    write_stage(path, pairs, Manifest(stage="pairs", record="Pair", written=len(pairs)))
    return path


def record_reference(folder: Path, model: str, base_url: str, renderer: dict | None = None) -> Path:
    """Score the pairs under the initial weights; return the folder for `taskset.reference`."""
    from composer_prime_rl import pair_reference

    section = {"weight": 0.1, "beta": 0.5, "pairs": str(write_pairs(folder / "pairs.jsonl")), "max_length": 1024}
    arguments = ["--replay-dpo", json.dumps(section), "--model", model, "--base-url", base_url]
    arguments += ["--renderer", json.dumps(renderer)] if renderer else []
    code = pair_reference.main([*arguments, "--out", str(folder / "reference")])
    if code:
        raise SystemExit(code)
    return folder / "reference"


def write_configs(
    folder: Path, model: str, *, steps: int, lr: float, renderer: dict | None = None, more: str = ""
) -> list[str]:
    """Write the two files around the shipped recipe; return the arguments of `rl`.

    Args:
        more: appended to the run's own file.
    """
    inline = "{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in (renderer or {}).items()) + " }"
    values = {
        "steps": steps, "lr": lr, "model": model, "out": folder / "out", "missing": MISSING,
        "renderer_line": f"renderer = {inline}" if renderer else "", "pairs": folder / "pairs.jsonl",
        "reference": folder / "reference",
    }  # fmt: skip
    (folder / "run.toml").write_text(RUN.format(**values) + more)
    (folder / "sources.toml").write_text(SOURCES.format(**values))
    files = (folder / "run.toml", RECIPES / "composer_all.toml", folder / "sources.toml")
    return [part for file in files for part in ("@", str(file))]


def figures(out: Path) -> dict[str, Any]:
    """What a run left in prime-rl's metrics and saved rollouts."""
    rows = [json.loads(line) for file in out.rglob("metrics.jsonl") for line in file.read_text().splitlines()]
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)) and "step" in row:
                series.setdefault(name, {})[int(row["step"])] = value
    traces = [
        trace
        for file in sorted(out.rglob("train/all/traces.jsonl"))
        for line in file.read_text().splitlines()
        for trace in json.loads(line)["traces"]
    ]
    metrics = [trace.get("metrics") or {} for trace in traces]
    return {
        "steps": sorted(series.get("loss/mean", {})),
        "series": series,
        "hinted_turns": sum(m.get("sdpo/hinted_turns", 0) for m in metrics),
        "scored_turns": sum(m.get("sdpo/scored_turns", 0) for m in metrics),
        "pairs": sum(m.get("replay_dpo/pairs", 0) for m in metrics),
        "margins": [m["replay_dpo/margin"] for m in metrics if "replay_dpo/margin" in m],
    }


def problems(found: dict[str, Any], steps: int) -> list[str]:
    """What is out of place: a channel without a token, a turn that was not scored, engine and trainer that disagree."""
    series, said = found["series"], []

    def some(name: str) -> bool:
        return any(value > 0 for value in series.get(name, {}).values())

    if found["steps"] != list(range(1, steps + 1)):
        said.append(f"expected steps 1 to {steps} in metrics.jsonl, found {found['steps']}")
    if not some("policy/active_tokens/max"):
        said.append("policy: no token with an advantage reached the loss in any step")
    if not found["scored_turns"]:
        said.append("sdpo: no hinted turn was scored")
    if found["scored_turns"] < found["hinted_turns"]:
        said.append(f"sdpo: {found['scored_turns']} of {found['hinted_turns']} hinted turns were scored")
    if not any(name.startswith("ref_kl/") for name in series):
        said.append("sdpo: prime-rl's ref_kl component reported nothing")
    if not found["pairs"]:
        said.append("replay_dpo: no pair was played")
    elif abs(found["margins"][0]) > 0.05:
        said.append(f"replay_dpo: the first margin is {found['margins'][0]:.3f}, expected about 0 (initial weights)")
    drift = series.get("mismatch_kl/all/mean", {}).get(1, float("nan"))
    if not drift < 0.05:  # in the first step both hold the same weights
        said.append(f"engine and trainer disagree in step 1: mismatch_kl {drift:.4f}, expected below 0.05")
    return said


def summary(found: dict[str, Any]) -> str:
    """The figures, one a line."""
    lines = [f"{name}: {found[name]}" for name in ("steps", "hinted_turns", "scored_turns", "pairs")]
    lines.append("margins: " + ", ".join(f"{m:+.4f}" for m in found["margins"]))
    wanted = ("loss/mean", "policy/tokens/mean", "policy/ratio/mean", "mismatch_kl/all/mean", "grad_norm")
    names = [n for n in found["series"] if n in wanted or n.endswith("grad_norm") or n.startswith("ref_kl/")]
    for name in sorted(names):
        lines.append(f"{name}: " + ", ".join(f"{v:.5g}" for _, v in sorted(found["series"][name].items())))
    return "\n".join(lines)


def initial_server(model: str, base_url: str, log: Path) -> subprocess.Popen:
    """Start prime-rl's `inference` and wait until it answers."""
    with open(log, "w") as file:
        server = subprocess.Popen(["inference", "--vllm.model", model], stdout=file, stderr=file)
    for _ in range(900):
        try:
            urllib.request.urlopen(f"{base_url.removesuffix('/v1')}/health", timeout=5).close()
            return server
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"prime-rl's inference server ended with {server.returncode}: see {log}") from None
            time.sleep(1)
    server.terminate()
    raise SystemExit(f"prime-rl's inference server did not answer in 15 minutes: see {log}")


def main() -> int:
    """Run it with GPUs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("whole_run"))
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="where prime-rl's inference server is")
    given = parser.parse_args()
    folder = given.out.absolute()
    folder.mkdir(parents=True)  # never over an older run
    server = initial_server(given.model, given.base_url, folder / "inference.log")
    try:
        record_reference(folder, given.model, given.base_url)
    finally:
        server.terminate()
        server.wait(120)
    arguments = write_configs(folder, given.model, steps=given.steps, lr=1e-6, more="[inference]\n")
    path = os.pathsep.join(filter(None, [str(HERE / "plugins"), os.environ.get("PYTHONPATH")]))
    code = subprocess.run(["rl", *arguments], env={**os.environ, "PYTHONPATH": path}).returncode
    if code:
        print(f"rl ended with exit code {code}; logs are under {folder / 'out'}", file=sys.stderr)
        return 1
    found = figures(folder / "out")
    print(summary(found))
    said = problems(found, given.steps)
    print("\n".join(f"OUT OF PLACE: {line}" for line in said) or "everything is in place")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
