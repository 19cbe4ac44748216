"""The verbs alone, with plain tensors in the place of activations: what is fresh, what is stale, and whose it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from distrifusion import StepTimeout
from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.pool import CallState
from distrifusion.exchange.verbs import Exchange
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.plan import ALL_KINDS, SiteKind

NUM_RANKS = 3
TEAM = tuple(range(NUM_RANKS))
LENGTHS = (2, 0, 3)  # tokens of each rank; one has none

Call = Callable[[Exchange, int], Any]


def value(rank: int, call: int, site: str) -> torch.Tensor:
    """A tensor that says who made it, when and where: [1, L_own, 1]."""
    return torch.full((1, LENGTHS[rank], 1), 100.0 * rank + 10.0 * call + "abc".index(site[0]))


def small(rank: int, call: int, site: str) -> torch.Tensor:
    return torch.tensor([100.0 * rank + 10.0 * call + "abc".index(site[0])])


def run_calls(calls: Sequence[Call], stale: frozenset[SiteKind] = ALL_KINDS, warmup: int = 0) -> list[list[Any]]:
    """The results of a request's calls, by rank and call; those after the warm-up are stale."""

    def work(transport: VirtualTransport) -> list[Any]:
        exchange, state, rank = Exchange(transport), CallState(), transport.rank
        results = []
        for number, call in enumerate(calls):
            now = stale if number > warmup else frozenset()
            exchange.begin(CallPolicy(TEAM, rank, keep=stale, stale=now, state=state))
            results.append(call(exchange, number))
            exchange.end()
        return results

    return VirtualWorld(NUM_RANKS).run(work)


def share(exchange: Exchange, call: int, site: str) -> tuple[list[float], list[float] | None]:
    """What a norm at `site` gets: everybody's values, and the own one that the others still use."""
    everybody, previous = exchange.share(site, SiteKind.NORM, small(exchange.transport.rank, call, site)).wait()
    return torch.cat(everybody).tolist(), previous if previous is None else previous.tolist()


def gather(exchange: Exchange, call: int, site: str) -> list[float]:
    """What an attention at `site` reads, one number per token."""
    (piece,) = exchange.gather(site, SiteKind.KV, (value(exchange.transport.rank, call, site),), LENGTHS).wait()
    return piece.flatten().tolist()


def expected(rank: int, call: int, site: str, others: int) -> list[float]:
    """One number per rank: the own of this call, the others' of call `others`."""
    return [small(peer, call if peer == rank else others, site).item() for peer in TEAM]


def per_token(by_rank: list[float]) -> list[float]:
    return [number for number, length in zip(by_rank, LENGTHS, strict=True) for _ in range(length)]


def test_a_fresh_gather_is_concatenation_of_each_piece() -> None:
    def call(exchange: Exchange, _: int) -> list[torch.Tensor]:
        own = torch.randn(2, LENGTHS[exchange.transport.rank], 4, generator=torch.Generator().manual_seed(1))
        pieces = (own + exchange.transport.rank, own * 3)
        return [pieces, exchange.gather("a", None, pieces, LENGTHS).wait()]

    results = [calls[0] for calls in run_calls([call])]
    for _, gathered in results:
        for i in range(2):
            assert torch.equal(gathered[i], torch.cat([pieces[i] for pieces, _ in results], dim=1))


@pytest.mark.parametrize("warmup", [0, 2])
def test_values_are_fresh_in_the_warm_up_and_one_call_old_afterwards(warmup: int) -> None:
    def call(exchange: Exchange, number: int) -> tuple[Any, ...]:
        return share(exchange, number, "a"), gather(exchange, number, "b"), share(exchange, number, "c")

    num_calls = warmup + 4
    for rank, calls in enumerate(run_calls(num_calls * [call], warmup=warmup)):
        for number, ((a, previous), b, (c, _)) in enumerate(calls):
            others = number if number <= warmup else number - 1
            assert a == expected(rank, number, "a", others)
            assert b == per_token(expected(rank, number, "b", others))
            assert c == expected(rank, number, "c", others)
            assert previous == (None if number <= warmup else [small(rank, number - 1, "a").item()])


@pytest.mark.parametrize("stale", [frozenset({SiteKind.KV}), frozenset({SiteKind.NORM})], ids=str)
def test_a_kind_that_is_not_stale_is_always_fresh(stale: frozenset[SiteKind]) -> None:
    def call(exchange: Exchange, number: int) -> tuple[Any, ...]:
        return share(exchange, number, "a")[0], gather(exchange, number, "b")

    for rank, calls in enumerate(run_calls(3 * [call], stale=stale)):
        norm_age, kv_age = int(SiteKind.NORM in stale), int(SiteKind.KV in stale)
        assert calls[2] == (expected(rank, 2, "a", 2 - norm_age), per_token(expected(rank, 2, "b", 2 - kv_age)))


def test_a_site_used_twice_in_a_call_keeps_two_values() -> None:
    """A block that runs twice: each use gets the last call's value of the same use."""

    def call(exchange: Exchange, number: int) -> list[Any]:
        return [ask(exchange, 3 * number + use, "a") for use in (0, 1) for ask in (share, gather)]

    for rank, calls in enumerate(run_calls(3 * [call])):
        (first, previous), first_tokens, (second, _), second_tokens = calls[2]
        assert first == expected(rank, 6, "a", others=3)
        assert first_tokens == per_token(expected(rank, 6, "a", others=3))
        assert second == expected(rank, 7, "a", others=4)
        assert second_tokens == per_token(expected(rank, 7, "a", others=4))
        assert previous == [small(rank, 3, "a").item()]


def test_a_site_skipped_in_a_call_gives_its_older_value_afterwards() -> None:
    """A cached block: its sites are silent for a call, and nobody takes another site's value for theirs."""

    def call(exchange: Exchange, number: int) -> dict[str, Any]:
        sites = "ac" if number == 2 else "abc"
        return {site: (share(exchange, number, site)[0], gather(exchange, number, site)) for site in sites}

    for rank, calls in enumerate(run_calls(5 * [call])):
        for number, others in ((3, {"a": 2, "b": 1, "c": 2}), (4, {"a": 3, "b": 3, "c": 3})):
            for site, age in others.items():
                by_rank = expected(rank, number, site, age)
                assert calls[number][site] == (by_rank, per_token(by_rank))


def test_sites_that_run_in_another_order_keep_their_names() -> None:
    def call(exchange: Exchange, number: int) -> dict[str, list[float]]:
        order = "abc" if number % 2 else "cba"
        return {site: share(exchange, number, site)[0] for site in order}

    for rank, calls in enumerate(run_calls(4 * [call])):
        for number in (1, 2, 3):
            assert calls[number] == {site: expected(rank, number, site, number - 1) for site in "abc"}


def test_a_site_that_appears_in_a_stale_call_starts_fresh() -> None:
    def call(exchange: Exchange, number: int) -> dict[str, Any]:
        sites = "ab" if number == 0 else "abc"
        return {site: (share(exchange, number, site)[0], gather(exchange, number, site)) for site in sites}

    for rank, calls in enumerate(run_calls(3 * [call])):
        for number, others in ((1, 1), (2, 1)):
            by_rank = expected(rank, number, "c", others)
            assert calls[number]["c"] == (by_rank, per_token(by_rank))
        assert calls[2]["a"][0] == expected(rank, 2, "a", 1)


def test_collect_gives_the_others_tensors_and_is_never_stale() -> None:
    def call(exchange: Exchange, number: int) -> dict[int, float]:
        rank = exchange.transport.rank
        shapes = {peer: torch.Size([1]) for peer in TEAM if peer != rank}
        return {peer: t.item() for peer, t in exchange.collect("a", small(rank, number, "a"), shapes).wait().items()}

    for rank, calls in enumerate(run_calls(3 * [call])):
        assert calls[2] == {peer: small(peer, 2, "a").item() for peer in TEAM if peer != rank}


def test_many_small_values_of_a_displaced_call_travel_in_few_messages() -> None:
    sites = [f"a{i}" for i in range(40)]

    def call(exchange: Exchange, number: int) -> int:
        before = exchange.num_posts
        for site in sites:
            share(exchange, number, site)
        return exchange.num_posts - before

    for fresh, stale, _ in run_calls(3 * [call]):
        assert fresh == len(sites)
        assert 0 < stale <= len(sites) / 10


def test_one_rank_alone_gets_its_own_values() -> None:
    def work(transport: VirtualTransport) -> tuple[list[float], int]:
        exchange = Exchange(transport)
        exchange.begin(CallPolicy((0,), 0))
        (piece,) = exchange.gather("a", SiteKind.KV, (torch.ones(1, 2, 1),), (2,)).wait()
        everybody, previous = exchange.share("b", SiteKind.NORM, torch.ones(1)).wait()
        exchange.end()
        assert previous is None
        return [*piece.flatten().tolist(), *torch.cat(everybody).tolist()], sum(exchange.bytes_sent.values())

    assert VirtualWorld(1).run(work) == [([1.0, 1.0, 1.0], 0)]


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda exchange: exchange.share("a", SiteKind.NORM, torch.ones(1)).wait(), "norm of layer 'a'"),
        (lambda exchange: exchange.gather("b", SiteKind.KV, (torch.ones(1, 2, 1),), (2, 2)).wait(), "kv of layer 'b'"),
        (
            lambda exchange: exchange.collect("exit", torch.ones(1), {1: torch.Size([1])}).wait(),
            "values of layer 'exit'",
        ),
    ],
)
def test_a_wait_without_an_answer_says_what_it_was_for(ask: Callable[[Exchange], Any], named: str) -> None:
    def work(transport: VirtualTransport) -> None:
        exchange = Exchange(transport)
        exchange.begin(CallPolicy((0, 1), transport.rank))
        if transport.rank == 0:
            ask(exchange)

    with pytest.raises(StepTimeout, match=named) as caught:
        VirtualWorld(2, timeout=0.2).run(work)
    assert caught.value.exchange == named
