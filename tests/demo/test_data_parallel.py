"""Ranks of the training average what they computed."""

from pathlib import Path

import torch

from distrifusion.demo.processes import average_over_ranks, num_ranks, rank, run_in_processes


def _write_mean(folder: Path) -> None:
    tensors = [torch.full((3,), float(rank())), torch.full((2, 2), 10.0 * rank())]
    average_over_ranks(tensors)
    torch.save(tensors, folder / f"{rank()}of{num_ranks()}.pt")


def test_two_ranks_share_their_gradients(tmp_path: Path) -> None:
    run_in_processes(2, _write_mean, tmp_path)
    for i in range(2):
        three, four = torch.load(tmp_path / f"{i}of2.pt", weights_only=True)
        assert torch.equal(three, torch.full((3,), 0.5))
        assert torch.equal(four, torch.full((2, 2), 5.0))


def test_one_rank_is_this_process_and_its_own_mean(tmp_path: Path) -> None:
    run_in_processes(1, _write_mean, tmp_path)
    assert torch.load(tmp_path / "0of1.pt", weights_only=True)[0].sum() == 0
