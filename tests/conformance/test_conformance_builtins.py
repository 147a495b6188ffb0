"""Our own readers and hint generators under the suites that third parties run."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_plugins.conformance.hints import HintGeneratorConformance
from composer_plugins.conformance.readers import TraceReaderConformance
from composer_plugins.plugins import get_plugin_manager

SAMPLES = Path(__file__).parents[2] / "composer_plugins/data/samples"
DATA = Path(__file__).parents[1] / "traces/data"


def logs_of(reader) -> list[Path]:
    """The repository's undamaged logs of a format that hold a step."""
    from composer_plugins.traces.ledger import Ledger

    found = []
    for path in sorted([*SAMPLES.iterdir(), *DATA.rglob("*")]):
        if not path.is_file() or path.name.endswith((".md", ".expected.json")) or path.stat().st_size > 400_000:
            continue
        if reader.sniff(path.read_bytes()[:65536]):
            ledger = Ledger(read=0, used=0)
            if any(trace.steps for trace in reader.read(path, ledger)):
                found.append(path)
    return found[:3]


READERS = {entry.name: entry for entry in get_plugin_manager().trace_readers}


def suite_of(name: str) -> type:
    reader = READERS[name].load()
    return type(
        f"Test_{name}",
        (TraceReaderConformance,),
        {"reader": lambda self: reader, "samples": lambda self: logs_of(reader), "mutations": 12},
    )


for _name in READERS:
    globals()[f"Test_{_name}"] = suite_of(_name)


class TestTemplateHints(HintGeneratorConformance):
    def generator(self):
        return get_plugin_manager().hint_generators.get("template").load()()


class TestFeedbackHints(HintGeneratorConformance):
    def generator(self):
        return get_plugin_manager().hint_generators.get("feedback").load()()


def test_every_reader_is_here():
    assert READERS and all(f"Test_{name}" in globals() for name in READERS)


@pytest.mark.parametrize("name", sorted(READERS))
def test_there_is_a_log_of_it(name):
    assert logs_of(READERS[name].load())
