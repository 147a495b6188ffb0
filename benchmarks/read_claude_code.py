"""How fast Claude Code logs are read, and in how much memory, beside PyPI `agentpile` in the same run.

    python benchmarks/read_claude_code.py [--mb 100] [--repeat 3] [--folder DIR]

Without --folder the corpus is made from the sample session and the test logs, copied with fresh ids until it
has the wanted size (image data included, as in real logs). Each reader runs in a process of its own on one
core, `--repeat` times in turns with the others, and the best time counts. MB = 10^6 bytes. `ingest` is the whole stage:
reading, finding copies, hashing, writing, and with `scrub` the removal of secrets. `decoding alone` is the floor: the
parser (msgspec, typed, so that unused fields are skipped) and nothing else; `without classifying` leaves out how each
result ended, which agentpile does not say. The corpus repeats its texts, so nothing here may be remembered from file
to file but by the scrubber, whose figure is therefore that of `benchmarks/scrub.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    ROOT / "composer_plugins/data/samples/claude_code_session.jsonl",
    ROOT / "tests/traces/data/v1.0.24_thinking_errors.jsonl",
    *sorted((ROOT / "tests/traces/data/subagents_v2.1.114").rglob("*.jsonl")),
]
IDS = re.compile(rb'("(?:uuid|parentUuid|sessionId|id|tool_use_id)": ?")')


def make_corpus(folder: Path, megabytes: int) -> None:
    """Write copies of the logs, each with ids of its own, one file per copy."""
    texts = [path.read_bytes() for path in SOURCES]
    written, number = 0, 0
    while written < megabytes * 1_000_000:
        for text in texts:
            copy = IDS.sub(rb"\g<1>%d-" % number, text)
            (folder / f"{number:05}.jsonl").write_bytes(copy)
            written, number = written + len(copy), number + 1


def read_ours(folder: Path) -> int:
    """Read every file with our reader; return the number of steps."""
    from composer_plugins.traces.claude_code import READER

    steps = 0
    for path in sorted(folder.rglob("*.jsonl")):
        steps += sum(len(trace.steps) for trace in READER.read(path, Counter()))
    return steps


def read_unclassified(folder: Path) -> int:
    """Read every file without telling good results from bad ones."""
    from composer_plugins.traces import claude_code_build
    from composer_plugins.traces.schema import Status

    claude_code_build.classify_text = lambda *_, **__: (Status.OK, None, None)
    return read_ours(folder)


def decode_only(folder: Path) -> int:
    """Decode every line and build nothing; return 0 steps."""
    from composer_plugins.traces.claude_code_records import decode_batch
    from composer_plugins.traces.lines import iter_batches

    for path in sorted(folder.rglob("*.jsonl")):
        for _, lines in iter_batches(path):
            decode_batch(lines)
    return 0


def read_ingest(folder: Path) -> int:
    """Run the whole ingest stage; return the number of steps."""
    from composer_plugins.traces.ingest import ingest

    with tempfile.TemporaryDirectory() as scratch:
        return ingest([folder], Path(scratch) / "traces.jsonl").steps


def load(name: str) -> None:
    """Import what a reader needs, so that the start of a program is not measured."""
    if name == "agentpile":
        import agentpile  # noqa: F401
    else:
        import composer_plugins.traces.claude_code
        import composer_plugins.traces.ingest  # noqa: F401


def read_agentpile(folder: Path) -> int:
    """Read every file with agentpile; return the number of agent steps."""
    import agentpile

    steps = 0
    for path in sorted(folder.rglob("*.jsonl")):
        for run in agentpile.load(str(path)):
            steps += sum(step.get("source") == "agent" for step in run.record.get("steps", []))
    return steps


READERS = {
    "composer_plugins": read_ours,
    "composer_plugins without classifying": read_unclassified,
    "decoding alone": decode_only,
    "composer_plugins ingest": read_ingest,
    "agentpile": read_agentpile,
}


def worker(name: str, folder: Path) -> None:
    """Measure one reader in this process and print the numbers as JSON."""
    size = sum(path.stat().st_size for path in folder.rglob("*.jsonl"))
    load(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    steps = READERS[name](folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kilobyte = 1024 if sys.platform != "darwin" else 1
    found = {"seconds": seconds, "cpu": cpu, "steps": steps, "mb": size / 1e6}
    print(json.dumps(found | {"peak_mb": peak * kilobyte / 1e6, "grown_mb": (peak - before) * kilobyte / 1e6}))


def measure(name: str, folder: Path) -> dict | None:
    """Run a worker process; None when the reader is not installed."""
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if "No module named" in done.stderr:
            return None
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Print one line per reader and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--worker", choices=READERS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if arguments.folder is None:
            make_corpus(folder, arguments.mb)
        found: dict[str, dict] = {}
        for name in list(READERS) * arguments.repeat:
            numbers = measure(name, folder)
            if numbers is not None and numbers["cpu"] < found.get(name, numbers | {"cpu": float("inf")})["cpu"]:
                found[name] = numbers
        for name, numbers in found.items():
            print(
                f"{name}: {numbers['mb']:.0f} MB in {numbers['seconds']:.2f} s = "
                f"{numbers['mb'] / numbers['seconds']:.1f} MB/s ({numbers['mb'] / numbers['cpu']:.1f} MB per CPU second), "
                f"peak {numbers['peak_mb']:.0f} MB, {numbers['steps']} steps",
                flush=True,
            )
        if peer := found.pop("agentpile", None):
            for name, numbers in found.items():
                cpu, wall = peer["cpu"] / numbers["cpu"], peer["seconds"] / numbers["seconds"]
                print(f"{name}: {cpu:.1f} times as fast as agentpile by CPU time, {wall:.1f} by the clock")


if __name__ == "__main__":
    main()
