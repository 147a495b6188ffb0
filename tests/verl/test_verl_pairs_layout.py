"""Where pair rows lie among the rollouts: verl's own cutting must never tear a pair apart, nor move a rollout."""

import importlib.util

import pytest
from composer_verl.pair_layout import FILLER, FILLER_TOKENS, lay_out
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )


def slots(layout):
    return [layout.rows[i : i + layout.slot_rows] for i in range(0, len(layout.rows), layout.slot_rows)]


def tensordict(layout, lengths, pair_tokens):
    """The rows as verl's micro-batching sees them: token ids, and which row is which."""
    import torch
    from tensordict import TensorDict

    tokens = [
        lengths[row.rollout] if row.rollout is not None else pair_tokens if row.pair is not None else FILLER_TOKENS
        for row in layout.rows
    ]
    ids = torch.nested.as_nested_tensor([torch.ones(n, dtype=torch.long) for n in tokens], layout=torch.jagged)
    return TensorDict({"input_ids": ids, "row": torch.arange(len(tokens))}, batch_size=len(tokens))


def micro_batches(layout, lengths, *, ranks, mini_batches, pair_tokens=10, budget=None, micro=2):
    """Cut as verl does: dispatch, mini-batches, micro-batches. Yields lists of rows, in the order of slots."""
    from verl.protocol import BatchData
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.utils import prepare_micro_batches

    for part in BatchData(tensordict(layout, lengths, pair_tokens)).chunk(ranks):
        for mini in tu.make_iterator(
            part, mini_batch_size=layout.slot_rows, epochs=1, seed=1, dataloader_kwargs={"shuffle": False}
        ):
            tu.assign_non_tensor(
                mini, use_dynamic_bsz=budget is not None, max_token_len_per_gpu=budget,
                micro_batch_size_per_gpu=max(1, micro // 2), force_group_size=2,
            )  # fmt: skip
            cut, _ = prepare_micro_batches(mini)
            yield [([layout.rows[i] for i in m["row"].tolist()], int(m["input_ids"].offsets()[-1])) for m in cut]


shapes = st.tuples(
    st.integers(1, 4),  # ranks
    st.integers(1, 3),  # mini-batches
    st.integers(1, 5),  # rollouts of a slot
    st.integers(1, 7),  # pairs of a mini-batch
    st.integers(1, 6),  # rows of a micro-batch
    st.randoms(use_true_random=False),
)


@settings(deadline=None, max_examples=60)
@given(shapes, st.booleans())
def test_verls_own_cutting_keeps_pairs_whole_and_rollouts_where_they_were(shape, dynamic):
    ranks, mini_batches, per_slot, count, micro, random = shape
    lengths = [random.randint(2, 40) for _ in range(ranks * mini_batches * per_slot)]
    pairs = [[random.randint(0, 9) for _ in range(count)] for _ in range(mini_batches)]
    budget = max(max(lengths) + FILLER_TOKENS, 2 * 10) if dynamic else None
    layout = lay_out(lengths, pairs, ranks=ranks, token_budget=budget, groups_per_micro=max(1, micro // 2))
    cut = list(micro_batches(layout, lengths, ranks=ranks, mini_batches=mini_batches, budget=budget, micro=micro))

    assert len(cut) == ranks * mini_batches
    for number, slot in enumerate(cut):
        rows = [row for micro_batch, _ in slot for row in micro_batch]
        expected = range(number * per_slot, (number + 1) * per_slot)  # verl's own cutting without pairs
        assert sorted(row.rollout for row in rows if row.rollout is not None) == list(expected)
        for micro_batch, tokens in slot:
            assert budget is None or tokens <= budget
            for place, row in enumerate(micro_batch):
                if row.pair is not None and row.side == 0:
                    partner = micro_batch[place + 1]
                    assert (partner.pair, partner.side, partner.mini_batch) == (row.pair, 1, row.mini_batch)
    for number in range(mini_batches):  # each pair of a mini-batch once, on one rank
        drawn = [
            row.pair
            for rank in range(ranks)
            for micro_batch, _ in cut[rank * mini_batches + number]
            for row in micro_batch
            if row.pair is not None and row.side == 0
        ]
        assert sorted(drawn) == sorted(pairs[number])


def test_rollouts_keep_their_order_when_they_fit():
    layout = lay_out([5, 4, 3, 2], [[7], [8]], ranks=1)
    found = [[(row.rollout, row.pair) for row in slot] for slot in slots(layout)]
    assert found == [
        [(0, None), (1, None), (None, 7), (None, 7)],
        [(2, None), (3, None), (None, 8), (None, 8)],
    ]


def test_two_long_rollouts_are_not_put_into_one_group():
    layout = lay_out([9, 9, 2, 9], [[0]], ranks=1, token_budget=11)
    groups = [layout.rows[i : i + 2] for i in range(0, len(layout.rows), 2)]
    for first, second in groups:
        lengths = [9 if row.rollout in (0, 1, 3) else 2 for row in (first, second) if row.rollout is not None]
        assert sum(lengths) <= 11
    assert FILLER in layout.rows


def test_an_unequal_batch_is_an_error():
    with pytest.raises(ValueError, match="5 rollouts cannot be cut into 2 mini-batches on 2 ranks"):
        lay_out([1] * 5, [[0], [1]], ranks=2)
