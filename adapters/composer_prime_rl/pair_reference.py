"""Records the reference's log-probs of every pair, once, before a run: `python -m composer_prime_rl.pair_reference`.

Ask the server that holds the initial weights (the run's own inference server before its first step will do).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from composer_plugins.channels.pair_stream import PairStream
from composer_plugins.config import parse_section
from composer_plugins.errors import ComposerError, ModelError
from composer_prime_rl.scoring import Endpoint, PrefillScorer, ScoringError, ScoringOptions


async def record_reference(stream: PairStream, endpoint: Endpoint, options: ScoringOptions) -> None:
    """Fill `stream.reference` for every pair.

    Args:
        stream: the pairs.
        endpoint: a server with the reference's weights.
        options: patience.

    Raises:
        ModelError: the server cannot score; nothing is recorded by halves.
    """
    scorer = PrefillScorer(options)

    async def both(index: int) -> tuple[list[float], list[float]]:
        pair = stream.pairs[index]
        start = len(pair.context)
        actions = (pair.chosen, pair.rejected)
        scores = await asyncio.gather(*(scorer.score(endpoint, pair.context + ids, start) for ids in actions))
        return scores[0], scores[1]

    try:
        scores = await asyncio.gather(*(both(index) for index in range(len(stream.pairs))))
    except ScoringError as error:
        raise ModelError(
            f"The reference server cannot score ({error.reason}): {error}. Nothing was recorded."
        ) from error
    finally:
        await scorer.aclose()
    stream.reference = dict(enumerate(scores))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m composer_prime_rl.pair_reference", description=__doc__)
    parser.add_argument("--replay-dpo", required=True, help="the replay_dpo section as JSON, or its pairs file alone")
    parser.add_argument("--model", required=True, help="tokenizer of the policy: name or directory")
    parser.add_argument("--renderer", help="orchestrator.renderer as JSON; default: found by the model's name")
    parser.add_argument("--base-url", required=True, help="server with the initial weights")
    parser.add_argument("--served-name", help="default: the model")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument("--out", required=True, type=Path, help="folder; goes into env.taskset.reference")
    parser.add_argument("--timeout", type=float, default=ScoringOptions().timeout, help="seconds for one answer")
    given = parser.parse_args(argv)
    try:
        stream = _open(given)
        endpoint = Endpoint(given.base_url, given.served_name or given.model, given.api_key)
        asyncio.run(record_reference(stream, endpoint, ScoringOptions(timeout=given.timeout)))
    except ComposerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    given.out.mkdir(parents=True, exist_ok=True)
    stream.save(given.out)
    print(f"{len(stream.pairs)} pairs recorded in {given.out}; left out: {dict(stream.skipped) or 'none'}")
    return 0


def _open(given: argparse.Namespace) -> PairStream:
    from composer_prime_rl.pair_taskset import open_pairs

    text = given.replay_dpo
    section = _json(text, "--replay-dpo") if text.lstrip().startswith("{") else {"pairs": text}
    section.setdefault("weight", 1.0)  # recorded for a run that uses it
    return open_pairs(parse_section({"replay_dpo": section}).replay_dpo, given.model, _renderer(given.renderer))


def _renderer(text: str | None):
    if text is None:
        return None
    from pydantic import TypeAdapter, ValidationError
    from renderers import RendererConfig

    from composer_plugins.errors import ConfigError

    try:
        return TypeAdapter(RendererConfig).validate_python(_json(text, "--renderer"))
    except ValidationError as error:
        raise ConfigError(f"--renderer: {error}") from error


def _json(text: str, option: str) -> dict:
    from composer_plugins.errors import ConfigError

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option} is not JSON: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
