"""What a run has drawn, how long it took, and how far it is from one device's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrifusion.cli.output import Output

if TYPE_CHECKING:
    from PIL.Image import Image

    from distrifusion.timeline import Timeline


@dataclass(frozen=True)
class Drawn:
    """Frames, one for a picture, and how they came out.

    Attributes:
        per_step, total: seconds.
        timeline: what the ranks did, if it was traced.
        calls: denoiser calls of a sampler that solves steps together, where a step is a call; None otherwise.
    """

    frames: list[Image]
    plan: str
    devices: str
    per_step: float
    total: float
    timeline: Timeline | None
    calls: int | None = None

    def __str__(self) -> str:
        step = "step" if self.calls is None else f"call, {self.calls} calls"
        return f"{self.plan} on {self.devices}: {self.per_step:.3g} s per {step}, {self.total:.3g} s in all"

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        return {
            "plan": self.plan,
            "devices": self.devices,
            "seconds_per_step": self.per_step,
            "seconds": self.total,
            **({} if self.calls is None else {"calls": self.calls}),
        }


@dataclass(frozen=True)
class Comparison:
    """What one device drew beside it.

    Attributes:
        speedup_per_step: None where a denoiser call is not a step.
    """

    alone: Drawn
    speedup_per_step: float | None
    speedup: float
    psnr: float
    ssim: float
    side_by_side: Path

    @classmethod
    def of(cls, drawn: Drawn, alone: Drawn, output: Output) -> Comparison:
        """Measure, and write both side by side beside what was drawn.

        Raises:
            ConfigError: if they cannot be compared.
        """
        from distrifusion.quality import videos

        path = output.write_beside(videos.all_side_by_side(alone.frames, drawn.frames, "1 device", drawn.plan))
        return cls(
            alone,
            alone.per_step / drawn.per_step if drawn.calls is None else None,
            alone.total / drawn.total,
            videos.psnr(drawn.frames, alone.frames),
            videos.ssim(drawn.frames, alone.frames),
            path,
        )

    def __str__(self) -> str:
        per_step = "" if self.speedup_per_step is None else f"{self.speedup_per_step:.2f}x per step, "
        return (
            f"against {self.alone.devices} ({self.alone.per_step:.3g} s per step): {per_step}"
            f"{self.speedup:.2f}x in all, PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}, "
            f"side by side in {self.side_by_side}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON; a PSNR of null is that of equal pictures."""
        return {
            "one_device": self.alone.as_dict(),
            "speedup_per_step": self.speedup_per_step,
            "speedup": self.speedup,
            "psnr_db": self.psnr if self.psnr < float("inf") else None,
            "ssim": self.ssim,
            "side_by_side": str(self.side_by_side),
        }
