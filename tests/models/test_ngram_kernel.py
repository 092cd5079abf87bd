"""N-gram ids from the slots' history against plain Python integers."""

from __future__ import annotations

import random

import pytest
import torch
from references.plain import ngram_ids as plain_ids

from fluentllm.kernels.ngram import NgramHash, ngram_ids


@pytest.mark.parametrize(
    ("vocab", "ratio", "neighbors", "splits", "stops"),
    [(50, 3.5, 4, 2, (2,)), (11, 7, 3, 1, (2, 5)), (131072, 78, 4, 4, (2,)), (20, 2, 2, 3, ())],
)
def test_ids_from_history(vocab: int, ratio: float, neighbors: int, splits: int, stops: tuple[int, ...]) -> None:
    chance = random.Random(torch.seed())
    hash_ = NgramHash(vocab, ratio, neighbors, splits, stops)
    lengths = [1, 2, 9, 30]
    history = torch.randint(vocab, (7, 40), dtype=torch.int32)
    slots = chance.sample(range(7), len(lengths))
    for slot in slots:
        for stop in stops:
            history[slot, chance.randrange(30)] = stop
    rows, expected = [], []
    for slot, length in zip(slots, lengths, strict=True):
        start = chance.randrange(length)
        ids = plain_ids(history[slot, :length].tolist(), vocab, ratio, neighbors, splits, stops)
        rows += [(slot, position) for position in range(start, length)]
        expected += ids[start:]
    slot, position = torch.tensor(rows).T
    ours = ngram_ids(
        history[slot, position].long(), position, slot, history, torch.tensor(stops).long(), hash_.factors(), hash_.moduli()
    )
    assert ours.tolist() == expected
    assert ours.shape[1] == hash_.tables
    assert (ours < torch.tensor([hash_.rows(i) for i in range(hash_.tables)])).all()


def test_no_rows() -> None:
    hash_ = NgramHash(50, 2, 3, 2, (1,))
    none = torch.empty(0, dtype=torch.int64)
    ids = ngram_ids(none, none, none, torch.zeros(2, 8, dtype=torch.int32), torch.tensor([1]), hash_.factors(), hash_.moduli())
    assert ids.shape == (0, 4)
