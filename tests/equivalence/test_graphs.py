"""Calls captured and replayed: bit for bit what the model's own code gives, with nothing of the first call baked in.

By a tape, as on CPU; CUDA graphs are tested where there is a GPU (marked `gpu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from division import EXACT
from torch import nn

from distrifusion import ConfigError, Plan, graphs
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.gathering import GatherBuffer
from distrifusion.exchange.transport import SingleTransport
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.nested import map_tensors
from distrifusion.runtime.counting import CountedTransport
from distrifusion.tape import TapeBackend
from models import moved, relative_error, run_request, sdxl_unet, share_weights, unet_inputs
from transformers_tiny import FAMILIES, flux, sd3, sd3_inputs, wan, wan_inputs

pytestmark = pytest.mark.usefixtures("unchecked")  # see test_token_memory.py

Inputs = dict[str, Any]
NUM_STEPS = 7


def steps_of(inputs: Inputs, num_steps: int = NUM_STEPS) -> list[Inputs]:
    """Latents and timesteps that differ in every step, timesteps by unequal amounts: forecasts have other weights."""
    times = [inputs["timestep"] * (1 - 2e-3 * i * i) for i in range(num_steps)]
    return [{**moved(inputs, 0.1 * i), "timestep": time} for i, time in enumerate(times)]


@dataclass(frozen=True)
class Ran:
    """One rank's request: its predictions, what it sent, and how many calls were captured and replayed."""

    outputs: list[torch.Tensor]
    sent: tuple[dict[str, int], int, int]
    counts: tuple[int, int]


def ran(model: nn.Module, plan: str, steps: Sequence[Inputs], captured: bool) -> list[Ran]:
    """A request of a plan, by rank; calls of one step follow each other where `steps` gives several."""

    def body(transport: Any) -> Ran:
        own = share_weights(model)
        denoiser = ParallelDenoiser(own, Plan.parse(plan), transport)
        denoiser.attach()
        if captured:
            denoiser.capture_by(TapeBackend())
        with torch.no_grad():
            outputs = run_request(own, denoiser, steps)
        exchange, found = denoiser.exchange, denoiser.graphs
        sent = dict(exchange.bytes_sent), exchange.num_posts, exchange.num_synchronous
        return Ran(outputs, sent, (found.num_captured, found.num_replayed) if found else (0, 0))

    return VirtualWorld(Plan.parse(plan).num_ranks, timeout=20).run(body)


def same(model: nn.Module, plan: str, steps: Sequence[Inputs]) -> tuple[bool, tuple[int, int]]:
    """Whether captured calls give the bits and send the bytes of plain ones; calls captured and replayed."""
    plain, found = (ran(model, plan, steps, captured) for captured in (False, True))
    assert [one.sent for one in found] == [one.sent for one in plain]
    pairs = [pair for ranks in zip(found, plain, strict=True) for pair in zip(*(r.outputs for r in ranks), strict=True)]
    return all(torch.equal(*pair) for pair in pairs), found[0].counts


@pytest.fixture(scope="module")
def unet() -> Any:
    return sdxl_unet()


@pytest.mark.supports("feature", "calls captured and replayed: a tape on CPU, CUDA graphs (not yet run on a GPU)")
@pytest.mark.parametrize(
    ("plan", "counts"),
    [
        ("patch1", (1, 5)),
        ("patch2", (1, 5)),
        ("patch3.columns", (1, 5)),
        ("cfg2.patch2", (1, 5)),
        ("patch2.displaced.w1", (1, 4)),
        ("patch2.displaced.fresh1.w0", (1, 4)),
        ("patch2.displaced.all.w0", (1, 4)),
        ("patch2.displaced.all.w1", (1, 4)),
        ("patch2.displaced.halo.w0", (1, 4)),
        ("patch2.displaced.forecast.w0", (2, 3)),  # two buffers take turns: a graph for each
        ("patch2.displaced.forecast.w1", (2, 3)),
        ("patch2.delta4.w1", (1, 3)),
        ("patch2.displaced.delta2.forecast.w0", (2, 3)),
        ("patch2.displaced.delta2.forecast.w1", (2, 3)),
        ("patch2.frozen.w1", (1, 4)),
        ("patch2.naive.alternating.w1", (2, 2)),
        ("tp2", (1, 5)),
        ("dp2", (1, 5)),
        ("async2.sync", (1, 5)),
    ],
)
def test_a_unet_replayed_gives_the_bits_of_its_own_code(unet: Any, plan: str, counts: tuple[int, int]) -> None:
    assert same(unet, plan, steps_of(unet_inputs(unet, 2, 20, 12))) == (True, counts)


@pytest.mark.parametrize(
    "plan", ["patch2", "ulysses2", "ring3", "tp2", "patch2.displaced.forecast.w0", "patch2.delta4.w0"]
)
@pytest.mark.parametrize("family", ["SD3.5 medium", "FLUX.1 dev"])
def test_a_transformer_replayed_gives_the_bits_of_its_own_code(family: str, plan: str) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(1, 6, 6)
    good, (_, replayed) = same(model, plan, steps_of(inputs))
    assert good and replayed >= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_captured(family: str) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(2, *FAMILIES[family].size)
    assert same(model, "cfg2", steps_of(inputs, 4)) == (True, (1, 2))


# What must not be baked in


def broken(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Make captured calls keep something of the call that was captured first."""
    if what == "which buffer is read":
        monkeypatch.setattr(graphs, "_buffers", lambda policy: ())
        return
    tensors = graphs._tensors
    first: list[list[torch.Tensor]] = []

    def kept(call: Any, policy: Any) -> list[torch.Tensor]:
        now = tensors(call, policy)
        first.append([tensor.clone() for tensor in now])
        return [*first[0][:-1], now[-1]] if what == "arguments" else [*now[:-1], first[0][-1]]

    monkeypatch.setattr(graphs, "_tensors", kept)


@pytest.mark.parametrize("what", ["arguments", "the weight of a forecast", "which buffer is read"])
def test_a_call_that_keeps_something_of_the_captured_one_is_found(
    unet: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, what)
    good, (_, replayed) = same(unet, "patch2.displaced.forecast.w0", steps_of(unet_inputs(unet, 1, 12, 12), 9))
    assert not good and replayed > 0


def test_numbers_that_change_are_never_captured_and_right() -> None:
    """Layers skipped in some steps only, and buffers that take turns: they are where the last call left them."""
    inputs = steps_of(sd3_inputs(1, 6, 6), 16)
    steps = [{**x, "skip_layers": [1] if i in (5, 8, 9) else None} for i, x in enumerate(inputs)]
    good, (captured, replayed) = same(sd3(), "patch2.displaced.forecast.w0", steps)
    assert good and captured and replayed


def test_a_text_of_another_length_is_another_graph() -> None:
    inputs = steps_of(wan_inputs(1, 6, 10), 8)
    longer = [{**x, "encoder_hidden_states": torch.cat([x["encoder_hidden_states"]] * 2, 1)} for x in inputs]
    steps = [x for pair in zip(inputs, longer, strict=True) for x in pair]
    assert same(wan(), "patch2", steps) == (True, (2, 12))


@pytest.mark.parametrize("looks", [True, False])
def test_a_call_that_makes_something_to_keep_is_not_replayed(
    unet: Any, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stale call puts small values together, unless that is done before."""
    monkeypatch.setattr(graphs.Graphs, "_finds_all_made", lambda self, policy: bool(policy.stale))
    if not looks:
        monkeypatch.setattr(graphs, "_kept", lambda policy: set())
    good, (captured, replayed) = same(unet, "patch2.displaced.all.w1", steps_of(unet_inputs(unet, 1, 12, 12)))
    assert (good, captured, replayed) == ((True, 2, 3) if looks else (False, 1, 4))


@pytest.mark.parametrize("looks", [True, False])
def test_a_call_that_forecasts_from_one_value_is_not_replayed(looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was skipped in the first call has sent once when the others have sent twice."""
    if not looks:
        monkeypatch.setattr(GatherBuffer, "is_steady", True)
    steps = [{**x, "skip_layers": None if i else [1]} for i, x in enumerate(steps_of(sd3_inputs(1, 6, 6)))]
    good, (_, replayed) = same(sd3(), "patch2.displaced.forecast.w1", steps)
    assert good == looks and replayed


@pytest.mark.parametrize("forgets", [True, False])
def test_a_request_sees_the_model_as_it_is_at_its_start(
    unet: Any, forgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python decides by (FreeU's factors, an adapter's scale) changes between requests; and so do kept values."""
    if not forgets:
        monkeypatch.setattr(graphs.Graphs, "forget", lambda self: None)
    steps = steps_of(unet_inputs(unet, 1, 12, 12), 4)

    @torch.no_grad()
    def body(transport: Any) -> bool:
        own = share_weights(unet)
        denoiser = ParallelDenoiser(own, Plan.parse("patch2"), transport)
        denoiser.attach()
        denoiser.capture_by(TapeBackend())
        good = True
        for factor in (1.0, 1.3):
            own.enable_freeu(s1=factor, s2=factor, b1=factor, b2=factor)
            denoiser.open(factor)
            for inputs in steps:
                denoiser.slot = 0
                found = own(**inputs).sample
                captured, denoiser.graphs = denoiser.graphs, None
                good &= torch.equal(found, own(**inputs).sample)
                denoiser.graphs = captured
            denoiser.close()
        return good

    assert VirtualWorld(2, timeout=20).run(body) == [forgets, forgets]


def test_two_calls_of_one_step_have_graphs_of_their_own() -> None:
    """With a prompt, and with what not to draw: same shapes, kept values of their own."""
    model, wanted = sd3(), steps_of(sd3_inputs(1, 6, 6), 6)
    unwanted = [moved(x, 0.5) for x in wanted]

    def body(captured: bool) -> Any:
        @torch.no_grad()
        def work(transport: Any) -> list[torch.Tensor]:
            own = share_weights(model)
            denoiser = ParallelDenoiser(own, Plan.parse("patch2.displaced.w0"), transport)
            denoiser.attach()
            if captured:
                denoiser.capture_by(TapeBackend())
            found = []
            denoiser.open("request")
            for pair in zip(wanted, unwanted, strict=True):
                denoiser.slot = 0
                found += [own(**inputs).sample for inputs in pair]
            denoiser.close()
            assert not captured or (denoiser.graphs and denoiser.graphs.num_replayed == 2 * 3)
            return found

        return VirtualWorld(2, timeout=20).run(work)

    for ours, theirs in zip(body(True), body(False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# What cannot be captured


class Looking(type(flux())):
    """A transformer that decides by a value of its latents."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.sum().item() > 1e9:
            hidden_states = hidden_states / 2
        return super().forward(hidden_states, *args, **kwargs)


def test_a_model_that_decides_by_values_is_refused() -> None:
    model = flux()
    model.__class__ = Looking
    with pytest.raises(ConfigError, match=r"cannot be captured; leave out graphs.*_local_scalar_dense"):
        ran(model, "patch1", steps_of(FAMILIES["FLUX.1 dev"].inputs(1, 3, 3), 3), captured=True)


def test_a_plan_that_decides_by_values_is_refused(unet: Any) -> None:
    with pytest.raises(ConfigError, match="leave out resync10 or graphs"):
        ran(unet, "patch2.displaced.resync10", [], captured=True)


@pytest.mark.parametrize("plan", ["async2", "pipe2.m4", "pipe2.sync"])
def test_a_plan_with_messages_between_two_calls_is_refused_before_anything_is_opened(plan: str) -> None:
    with pytest.raises(ConfigError, match=f"plan '{plan}.* has messages under way between two calls"):
        graphs.check_plan(Plan.parse(plan))


def test_outside_a_request_and_in_the_warm_up_nothing_is_captured(unet: Any) -> None:
    steps = steps_of(unet_inputs(unet, 1, 12, 12), 5)
    assert ran(unet, "patch2.displaced.w4", steps, captured=True)[0].counts == (0, 0)


def test_buffers_of_a_forecast_are_the_only_ones_that_turn(monkeypatch: pytest.MonkeyPatch, unet: Any) -> None:
    turns: list[str] = []
    turn = GatherBuffer.turn
    monkeypatch.setattr(GatherBuffer, "turn", lambda self: turns.append(self.name) or turn(self))
    ran(unet, "patch2.displaced.w0", steps_of(unet_inputs(unet, 1, 12, 12), 5), captured=True)
    assert not turns


# Where it can be had


def test_devices_that_have_no_graphs_are_refused() -> None:
    with pytest.raises(ConfigError, match="graphs takes CUDA devices or CPU, and these are mps; leave it out"):
        graphs.check_device(torch.device("mps"))


def test_messages_that_pass_through_the_host_are_refused_on_cuda() -> None:
    cuda = graphs.CudaBackend()
    virtual = VirtualTransport(VirtualWorld(2), 0)
    for transport in (virtual, CountedTransport(virtual, lambda: None)):
        with pytest.raises(ConfigError, match="backend 'nccl', or leave it out"):
            cuda.carrying(transport)
    for transport in (SingleTransport(), CountedTransport(SingleTransport(), lambda: None)):
        assert cuda.carrying(transport) is transport


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["U-Net", *FAMILIES])
def test_a_cuda_graph_gives_what_plain_calls_give(family: str) -> None:
    """On one GPU; what is compared may use other kernels in a graph, so not bit for bit."""
    model = sdxl_unet() if family == "U-Net" else FAMILIES[family].make()
    inputs = unet_inputs(model, 2, 20, 12) if family == "U-Net" else FAMILIES[family].inputs(2, *FAMILIES[family].size)
    steps = [map_tensors(x, lambda tensor: tensor.cuda()) for x in steps_of(inputs, 5)]
    denoiser = ParallelDenoiser(model.cuda(), Plan(), SingleTransport())
    with torch.no_grad():
        plain = [model(**x).sample for x in steps]
        denoiser.attach()
        denoiser.capture_by(graphs.CudaBackend())
        found = run_request(model, denoiser, steps)
    assert denoiser.graphs is not None and denoiser.graphs.num_replayed == 3
    assert max(relative_error(a, b) for a, b in zip(found, plain, strict=True)) <= EXACT
