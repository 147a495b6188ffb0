"""What several processes bring to `composer-rl ingest` on a folder of logs, scrubbing included.

    python benchmarks/ingest_jobs.py [--mb 200] [--jobs 1 2 4] [--folder DIR]

Without --folder the corpus is that of `read_claude_code.py`, with the number of the copy written into its texts as well,
so that the scrubber cannot remember them from file to file. The command runs in a process of its own; CPU seconds and
the peak are those of it and its children (the peak: of the largest one). The outputs must be the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from read_claude_code import IDS, ROOT, SOURCES

TEXTS = re.compile(rb'("(?:text|content|thinking|command|prompt|old_string|new_string)": ?")(?=.)')


def make_corpus(folder: Path, megabytes: int) -> None:
    """Write copies of the logs with ids and texts of their own, one file per copy."""
    texts = [path.read_bytes() for path in SOURCES]
    written, number = 0, 0
    while written < megabytes * 1_000_000:
        for text in texts:
            copy = TEXTS.sub(rb"\g<1>%d " % number, IDS.sub(rb"\g<1>%d-" % number, text))
            (folder / f"{number:05}.jsonl").write_bytes(copy)
            written, number = written + len(copy), number + 1


def run(folder: Path, output: Path, jobs: int) -> tuple[float, float, str]:
    """Run the command; return seconds, CPU seconds and the hash of what it wrote."""
    command = [sys.executable, "-m", "composer_plugins.cli", "ingest", str(folder), "-o", str(output), "-j", str(jobs)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, hashlib.sha256(output.read_bytes()).hexdigest()


def main() -> None:
    """Print one line per number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "logs"
        if arguments.folder is None:
            folder.mkdir()
            make_corpus(folder, arguments.mb)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        hashes = set()
        for jobs in arguments.jobs:
            seconds, cpu, digest = run(folder, Path(scratch) / "traces.jsonl", jobs)
            hashes.add(digest)
            print(
                f"{jobs} process(es): {size:.0f} MB in {seconds:.1f} s = {size / seconds:.1f} MB/s, {cpu:.1f} CPU s",
                flush=True,
            )
        kilobyte = 1024 if sys.platform != "darwin" else 1
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * kilobyte / 1e6
        print(f"the same bytes: {len(hashes) == 1}; the largest process had {peak:.0f} MB")


if __name__ == "__main__":
    main()
