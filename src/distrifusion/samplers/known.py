"""What is known of a picture beforehand: the surroundings that inpainting puts back into every state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distrifusion.samplers.tableau import Tableau


@dataclass(frozen=True)
class Known:
    """A picture of which only a part is sampled; the rest of every state is the picture's, with the state's noise.

    Put back after each step, it makes a step another map from one state to the next, so steps can be solved together.
    Legend: B pictures.

    Attributes:
        picture: latents of the whole picture: [B, ...].
        noise: what its states are noised with, the same in all of them: [B, ...].
        mask: 1 where the picture is sampled, 0 where it is known: [B or 1, ...].
    """

    picture: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor

    def around(self, x: torch.Tensor, noised: torch.Tensor | None = None) -> torch.Tensor:
        """States x [..., B, ...] with what is known of the noised picture around them; None: of the picture itself."""
        surroundings = self.picture if noised is None else noised
        return (1 - self.mask) * surroundings + self.mask * x

    def stepped(self, scheduler: Any, timestep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The state x [B, ...] that a diffusers scheduler has stepped to, as diffusers' own loop makes it.

        Args:
            timestep: of the step that follows: [1]; [0] after the last one.
        """
        if not len(timestep):
            return self.around(x)
        if hasattr(scheduler, "scale_noise"):  # of flow matching
            return self.around(x, scheduler.scale_noise(self.picture, timestep, self.noise))
        return self.around(x, scheduler.add_noise(self.picture, self.noise, timestep))

    def states(self, steps: Tableau) -> torch.Tensor:
        """The noised picture as it is in every state of N steps: [N + 1, B, ...]; in the last it has no noise."""
        alpha, sigma = steps.alpha.clone(), steps.sigma.clone()
        alpha[-1], sigma[-1] = 1, 0
        column = (-1, *(1,) * self.picture.dim())
        return alpha.to(self.picture).view(column) * self.picture + sigma.to(self.noise).view(column) * self.noise

    def to(self, like: torch.Tensor) -> Known:
        """The same in the type and on the device of a tensor."""
        return Known(self.picture.to(like), self.noise.to(like), self.mask.to(like))
