"""A problem as the files and the tokenizer that a host wants: token 17 is the word `t17`, a message is its words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from composer_plugins.conformance.problem import Problem
from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef
from composer_plugins.traces.store import Manifest, write_stage

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def words(ids: Sequence[int]) -> str:
    """The text whose token ids are `ids`."""
    return " ".join(f"t{i}" for i in ids)


def table_tokenizer(size: int):
    """Return a transformers tokenizer of `size` words, with a chat template that adds no token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="t0", eos_token="t0")
    tokenizer.chat_template, tokenizer.padding_side = TEMPLATE, "left"
    return tokenizer


def write_pairs(problem: Problem, path: Path) -> Path:
    """Write the problem's pairs as a pairs file, in order."""
    records = [
        Pair(
            id=str(number),
            state_id=str(number),
            messages=[Message(role="user", content=words(pair.context))],
            chosen=Message(role="assistant", content=words(pair.chosen)),
            rejected=Message(role="assistant", content=words(pair.rejected)),
            provenance=Provenance(
                rule="conformance", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="problem", line=number + 1)
            ),
            weight=pair.weight,
        )
        for number, pair in enumerate(problem.pairs)
    ]
    write_stage(path, records, Manifest(stage="pairs", record="Pair", written=0))
    return path
