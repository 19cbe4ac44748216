"""Bytes of one call of a transformer, counted against the formula of each method."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from listening import traffic

from distrifusion import Plan
from distrifusion.layout.partition import split_evenly
from models import moved
from transformers_tiny import FAMILIES

pytestmark = pytest.mark.usefixtures("unchecked")  # see test_token_memory.py

BATCH, WORDS, TOKENS, CHANNELS, HEADS, OUT = 2, 7, 35, 24, 3, 16
NUM_SITES = 4  # two blocks of two streams, two of one
FP32 = 4


def own_tokens(num_ranks: int) -> list[int]:
    words, tokens = split_evenly(WORDS, num_ranks), split_evenly(TOKENS, num_ranks)
    return [len(a) + len(b) for a, b in zip(words, tokens, strict=True)]


def gathered(tokens: list[int], rank: int) -> int:
    """Own keys and values to everybody."""
    return (len(tokens) - 1) * 2 * tokens[rank] * CHANNELS


def traded(tokens: list[int], rank: int) -> int:
    """To each peer its heads of three own tensors, then its tokens of the own heads."""
    heads = [len(part) * CHANNELS // HEADS for part in split_evenly(HEADS, len(tokens))]
    peers = [peer for peer in range(len(tokens)) if peer != rank]
    return sum(3 * tokens[rank] * heads[peer] + tokens[peer] * heads[rank] for peer in peers)


def passed_on(tokens: list[int], rank: int) -> int:
    """Every block of keys and values but the one that the next rank began with."""
    return sum(2 * tokens[(rank - turn) % len(tokens)] * CHANNELS for turn in range(len(tokens) - 1))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize(
    ("word", "formula"),
    [
        ("patch{}", gathered),
        ("patch{}.displaced.w0", gathered),
        ("ulysses{}", traded),
        ("ring{}", passed_on),
    ],
)
def test_a_call_sends_what_the_shapes_say_and_nothing_twice(word: str, formula: Any, num_ranks: int) -> None:
    model, x = FAMILIES["FLUX.1 dev"].make(), FAMILIES["FLUX.1 dev"].inputs(BATCH, 7, 5)
    parts = [len(part) for part in split_evenly(TOKENS, num_ranks)]
    # The first call also tells how many tokens each rank has.
    by_rank = traffic(model, Plan.parse(word.format(num_ranks)), [x, moved(x)])
    for rank, sent in enumerate(by_rank):
        kv = NUM_SITES * BATCH * FP32 * formula(own_tokens(num_ranks), rank)
        exit = (num_ranks - 1) * BATCH * FP32 * parts[rank] * OUT
        assert Counter(sent.by_kind) == {"kv": kv, "exit": exit}
        assert sum(message.tensor.nbytes for message in sent.messages) == kv + exit


@pytest.mark.parametrize("pieces", [2, 5])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_what_flows_between_stages_is_the_tokens_once_however_deep_and_in_however_many_pieces(
    num_stages: int, pieces: int
) -> None:
    model, x = FAMILIES["FLUX.1 dev"].make(), FAMILIES["FLUX.1 dev"].inputs(BATCH, 7, 5)
    plan = Plan(stages=num_stages, pieces=pieces, late=True, warmup=0)
    by_rank = traffic(model, plan, [x, moved(x), moved(x)])
    for rank, sent in enumerate(by_rank):
        last = rank == num_stages - 1
        flow = 0 if last else BATCH * FP32 * (WORDS + TOKENS) * CHANNELS
        exit = (num_stages - 1) * BATCH * FP32 * TOKENS * OUT if last else 0
        assert {kind: num for kind, num in sent.by_kind.items() if num} == {
            kind: num for kind, num in (("flow", flow), ("exit", exit)) if num
        }


def test_teams_that_do_the_same_meet_in_every_call() -> None:
    """A cancelled run ends after the same step on every rank, because none can be a call ahead of another."""
    model, x = FAMILIES["FLUX.1 dev"].make(), FAMILIES["FLUX.1 dev"].inputs(1, 7, 5)
    for rank, sent in enumerate(traffic(model, Plan.parse("cfg2.pipe2.m3.w0"), [x, x, x])):
        assert (rank + 2) % 4 in {message.peer for message in sent.messages}


def test_the_first_call_tells_each_site_s_tokens_once() -> None:
    model, x = FAMILIES["FLUX.1 dev"].make(), FAMILIES["FLUX.1 dev"].inputs(BATCH, 7, 5)
    first, second = (traffic(model, Plan(ring=3), num * [x])[0] for num in (1, 2))
    int64, peers = 8, 2
    told = peers * int64 * (2 * NUM_SITES + 1)
    assert first.by_kind["exit"] - second.by_kind["exit"] == told


def test_branches_trade_whole_predictions_and_parts_of_tokens_stay_within_them() -> None:
    model, x = FAMILIES["FLUX.1 dev"].make(), FAMILIES["FLUX.1 dev"].inputs(BATCH, 7, 5)
    by_rank = traffic(model, Plan(cfg=2, ulysses=2), [x, x])
    parts = [len(part) for part in split_evenly(TOKENS, 2)]
    for rank, sent in enumerate(by_rank):
        other_branch = {message.peer for message in sent.messages if message.peer // 2 != rank // 2}
        assert other_branch == {(rank + 2) % 4}
        assert sent.by_kind["exit"] == FP32 * OUT * (parts[rank % 2] + TOKENS)
