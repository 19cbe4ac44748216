"""The training loop: resuming changes nothing, and the noise of a step is what the loss says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distrifusion.demo.denoiser import build_scheduler, velocity_loss
from distrifusion.demo.training import Schedule, TrainingLog, fit


def _train_line(folder: Path, name: str, steps: int, stop_at: int | None = None) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)

    def loss_of_step(step: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((8, 2), np.float32))
        return (model(x)[:, 0] - x.sum(dim=1)).square().mean(), 8

    schedule = Schedule(0.05, steps=steps, warmup=5, decay=0.2, log_every=10, checkpoint_seconds=0)
    fit("line", model, loss_of_step, schedule, folder / f"{name}.pt", TrainingLog(folder / "log.jsonl"))
    return model


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole = _train_line(tmp_path, "whole", steps=40)
    with pytest.raises(KeyboardInterrupt):
        _train_line(tmp_path, "parts", steps=40, stop_at=20)
    parts = _train_line(tmp_path, "parts", steps=40)
    assert torch.equal(parts.weight, whole.weight)


def test_training_converges_and_is_logged(tmp_path: Path) -> None:
    model = _train_line(tmp_path, "long", 400)
    assert torch.allclose(model.weight, torch.ones(1, 2), atol=0.05)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 40


def test_a_schedule_has_one_length() -> None:
    with pytest.raises(ValueError, match="steps or seconds"):
        Schedule(1e-3)
    with pytest.raises(ValueError, match="steps or seconds"):
        Schedule(1e-3, steps=1, seconds=1)


class _Oracle(nn.Module):
    """Knows the clean latents and answers with the true velocity."""

    def __init__(self, clean: Tensor, alphas: Tensor) -> None:
        super().__init__()
        self.clean, self.alphas = clean, alphas

    def forward(self, noisy: Tensor, t: Tensor, _tokens: Tensor, **_: object) -> tuple[Tensor]:
        a, s = self.alphas[t].sqrt()[:, None, None, None], (1 - self.alphas[t]).sqrt()[:, None, None, None]
        return (a * (noisy - a * self.clean) / s - s * self.clean,)


def test_the_velocity_of_the_truth_costs_nothing() -> None:
    alphas = build_scheduler().alphas_cumprod
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = (torch.zeros(4, 77, 256), torch.zeros(4, 128))
    rng = np.random.default_rng(0)
    assert velocity_loss(_Oracle(x, alphas), x, text, alphas, rng) < 1e-6
    assert velocity_loss(_Oracle(x + 1, alphas), x, text, alphas, rng) > 1e-3
