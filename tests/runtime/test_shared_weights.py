"""Ranks on CPU share the weights of one pipeline until they write to them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from distrifusion import load
from distrifusion.errors import OutOfMemory, PoolTooLarge, RankFailed
from distrifusion.memory import check
from runtime.faulty import gone_within, hit

BALLAST = 192 << 20  # bytes, far above what a rank has of its own


def counted(folder: Path, calls: Path, change: Callable[[Any], object] = lambda pipe: None) -> Callable[[], Any]:
    """A factory that notes the process of each of its calls, and changes the pipeline that it gives."""

    def build() -> Any:
        with calls.open("a") as file:
            file.write(f"{os.getpid()}\n")
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
        change(pipe)
        return pipe

    return build


def opened_by(calls: Path) -> list[int]:
    return [int(line) for line in calls.read_text().splitlines()]


def with_ballast(pipe: Any) -> None:
    pipe.unet.ballast = torch.nn.Parameter(torch.ones(BALLAST // 4), requires_grad=False)
    # Methods that the caller reaches: one runs for its effect, the other for its answer.
    pipe.vae.enable_tiling = lambda: _triple(pipe.unet.ballast)
    pipe.vae.enable_slicing = lambda: pipe.unet.ballast.max().item()


def _triple(tensor: torch.Tensor) -> None:
    tensor.mul_(3.0)


def own_bytes(pid: int) -> int:
    """Bytes of a process that it shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


@pytest.mark.supports("feature", "CPU processes of one machine share the weights, which are read once")
def test_weights_are_read_once_and_shared_until_a_rank_writes(sdxl_folder: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    with load(counted(sdxl_folder, calls, with_ballast), devices=2) as pipe:
        pids = pipe.pids
        assert len(opened_by(calls)) == 1 and not set(opened_by(calls)) & set(pids)
        assert max(map(own_bytes, pids)) < BALLAST / 2
        pipe.vae.enable_tiling()
        assert min(map(own_bytes, pids)) > BALLAST
        # Had the ranks written to the same memory, it would have been multiplied twice.
        assert pipe.vae.enable_slicing() == 3.0
        hit(pids[1], "kill")
        assert gone_within(pids[1:], 10)
        assert pipe("a", num_inference_steps=1, output_type="latent").images.isfinite().all()
        assert not set(pids) & set(pipe.pids) and len(opened_by(calls)) == 1
        assert pipe.vae.enable_slicing() == 3.0


def test_a_source_that_leaves_threads_behind_is_opened_by_every_rank(sdxl_folder: Path, tmp_path: Path) -> None:
    def start_a_thread(_: Any) -> None:
        threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()

    calls = tmp_path / "calls"
    with load(counted(sdxl_folder, calls, start_a_thread), devices=2) as pipe:
        first, *ranks = opened_by(calls)
        assert first not in pipe.pids and sorted(ranks) == sorted(pipe.pids)
        # The process has begun anew: ranks are forked from it, and import nothing.
        assert all(b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ranks)
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a", num_inference_steps=1, output_type="latent").images.isfinite().all()


def _raise(_: Any) -> None:
    raise LookupError("no such weights")


def _ask_for_too_much(_: Any) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def _die(_: Any) -> None:
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (_raise, LookupError, "no such weights"),
        (_ask_for_too_much, OutOfMemory, "opening the pipeline ran out of memory"),
        (_die, RankFailed, "process that starts the ranks was ended by SIGKILL"),
    ],
)
def test_what_goes_wrong_while_opening_is_said(
    sdxl_folder: Path, tmp_path: Path, fault: Callable[[Any], object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        load(counted(sdxl_folder, tmp_path / "calls", fault), devices=2)


def test_a_pool_that_does_not_fit_ends_no_rank(sdxl_folder: Path, tmp_path: Path) -> None:
    def with_little_memory(_: Any) -> None:
        check.free_bytes = lambda device, wanted: 1000

    with load(counted(sdxl_folder, tmp_path / "calls", with_little_memory), devices=2, plan="patch2.displaced") as pipe:
        pids = pipe.pids
        with pytest.raises(PoolTooLarge, match="0 MiB are free there; 'patch2' fits") as caught:
            pipe("a", num_inference_steps=2)
        assert (caught.value.free, caught.value.fits) == (1000, "patch2") and pipe.pids == pids
