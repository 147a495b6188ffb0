"""What scrubbing costs beside reading: MB of log a second, and CPU seconds of both, on one core.

    python benchmarks/scrub.py [--mb 20] [--folder DIR]

Without --folder the logs are the sample session and the test logs of this repository, read again and again until the
wanted size is reached (each reading makes new traces and has a new scrubber; nothing is kept between them). The best
round counts. `states` are the states of all steps of these traces, each with its whole history: what `composer-rl
scrub` has to do on a states file. MB = 10^6 bytes of log. CPU
seconds are compared, not wall-clock, so that a busy machine disturbs the ratio less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec

from composer_plugins.scrub import Scrubber
from composer_plugins.traces.claude_code import READER
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.states import build_states

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    ROOT / "composer_plugins/data/samples/claude_code_session.jsonl",
    ROOT / "tests/traces/data/v1.0.24_thinking_errors.jsonl",
    *sorted((ROOT / "tests/traces/data/subagents_v2.1.114").rglob("*.jsonl")),
]


def timed(function, *arguments):
    """Return (CPU seconds, result)."""
    start = time.process_time()
    result = function(*arguments)
    return time.process_time() - start, result


def read(files: list[Path]) -> list[Trace]:
    """All traces of the files."""
    return [trace for path in files for trace in READER.read(path, Counter())]


def main() -> None:
    """Print one line per stage, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    files = SOURCES if options.folder is None else sorted(options.folder.rglob("*.jsonl"))
    size = sum(path.stat().st_size for path in files) / 1e6
    if not size:
        sys.exit("no .jsonl files found")
    rounds = max(1, round(options.mb / size))
    encoder, best = msgspec.json.Encoder(), {}
    for _ in range(rounds):
        scrubber, again = (Scrubber(salt=b"a salt for benchmarks") for _ in range(2))
        seconds = {}
        seconds["read"], traces = timed(read, files)
        seconds["scrub"], clean = timed(lambda t=traces, s=scrubber: [s.scrub_trace(trace) for trace in t])
        seconds["encode"], lines = timed(lambda c=clean: [encoder.encode(trace) for trace in c])
        states = list(build_states(traces))
        seconds["scrub states"], _ = timed(lambda s=states, again=again: [again.scrub_state(state) for state in s])
        best = {stage: min(used, best.get(stage, used)) for stage, used in seconds.items()}
    text = sum(map(len, lines)) / 1e6
    history = sum(len(encoder.encode(state)) for state in states) / 1e6
    print(f"{size:.2f} MB of logs, {text:.2f} MB of traces, {history:.0f} MB of states; the best of {rounds} round(s)")
    for stage, used in best.items():
        print(f"{stage}: {used:.3f} CPU seconds, {(history if 'states' in stage else size) / used:.1f} MB a second")
    print(f"scrubbing takes {best['scrub'] / best['read']:.1f} times the reading")
    print("replaced: " + ", ".join(f"{count} {kind}" for kind, count in scrubber.report.kinds.most_common()))


if __name__ == "__main__":
    main()
