"""What plans compute, send and wait for, for one model and size: each is rehearsed once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from distrifusion.layout.mesh import RankGrid
from distrifusion.nested import map_tensors
from distrifusion.plan import Plan, Split
from distrifusion.planner.blueprint import Blueprint
from distrifusion.planner.calls import Arguments
from distrifusion.planner.operations import Operations
from distrifusion.planner.outside import LeftOut, rehearse_decoding, rehearse_encoding
from distrifusion.planner.rehearsal import CallWork, Heard, Rehearsed, rehearse


class Costs:
    """What plans cost for one model, size and number of pictures; each is rehearsed once.

    Args:
        blueprint: the pipeline.
        arguments: of one denoiser call.
        latents: of the pictures [B, C, H, W] on the meta device; None: nothing outside the denoiser is known.
    """

    def __init__(self, blueprint: Blueprint, arguments: Arguments, latents: torch.Tensor | None = None) -> None:
        self.blueprint = blueprint
        self.arguments = arguments
        self._latents = latents
        self._encoding: tuple[list[Operations], tuple[LeftOut, ...]] | None = None
        self._decoding: dict[tuple[int, Split], CallWork | None] = {}
        self._known: dict[Plan, Rehearsed] = {}
        self._heard: Heard = {}
        self._wholes: dict[int, CallWork] = {}

    @classmethod
    def of_size(cls, blueprint: Blueprint, width: int, height: int, pictures: int = 1) -> Costs:
        """Those of pictures of a size in pixels; raises ConfigError and UnsupportedModel as `Blueprint.arguments`."""
        arguments = blueprint.arguments(width, height, pictures)
        return cls(blueprint, arguments, blueprint.latents(width, height, pictures))

    def decoding(self, plan: Plan) -> CallWork | None:
        """The VAE's decoding on the rank that gets the pictures; None where it is not known."""
        vae, key = self.blueprint.vae, (plan.num_ranks, plan.split)
        if self._latents is None or vae is None:
            return None
        if key not in self._decoding:
            self._decoding[key] = rehearse_decoding(vae, plan, self._latents)
        return self._decoding[key]

    def encoding(self) -> list[Operations]:
        """The text encoders', for the prompt and, with guidance, the negative one."""
        return self._encoded()[0]

    def left_out(self) -> tuple[LeftOut, ...]:
        """Parts of the pipeline outside the denoiser whose seconds are not known, and why."""
        unknown = tuple(LeftOut(*words) for words in self.blueprint.unknown.items())
        if self._latents is None:
            reason = "how many channels the latents have is not known"
            parts = (*self.blueprint.encoders, *(["vae"] if self.blueprint.vae is not None else []))
            return (*unknown, *(LeftOut(part, reason) for part in parts))
        kind = type(self.blueprint.vae).__name__
        whole = self.decoding(Plan()) is not None
        decoder = () if whole else (LeftOut("vae", f"a {kind}, and AutoencoderKL's decoding alone can be counted"),)
        return (*unknown, *self._encoded()[1], *decoder)

    def _encoded(self) -> tuple[list[Operations], tuple[LeftOut, ...]]:
        if self._encoding is None:
            known = self.blueprint.encoders if self._latents is not None else {}
            self._encoding = rehearse_encoding(known, 2 if self.blueprint.guided else 1)
        return self._encoding

    def put(self, plan: Plan, rehearsed: Rehearsed) -> None:
        """Take what was rehearsed before."""
        self._known[_key(plan)] = rehearsed

    @property
    def num_rows(self) -> int:
        """Rows of the batch of a call."""
        sample = self.arguments.get("sample", self.arguments.get("hidden_states"))
        assert sample is not None
        return sample.shape[0]

    def of(self, plan: Plan) -> Rehearsed:
        """The calls of a plan's busiest rank; raises PlanError where it cannot divide the model."""
        key = _key(plan)
        if key not in self._known:
            self._known[key] = rehearse(self.blueprint.denoiser, key, self.arguments, heard=self._heard)
        return self._known[key]

    def whole(self, plan: Plan) -> CallWork:
        """An undivided call of a plan's part of the batch."""
        rows = len(RankGrid(plan, 0).layout(self.num_rows).rows)
        if rows == self.num_rows:
            return self.of(Plan()).fresh
        if rows not in self._wholes:
            part = _first_rows(self.arguments, rows, self.num_rows)
            self._wholes[rows] = rehearse(self.blueprint.denoiser, Plan(), part).fresh
        return self._wholes[rows]


def _key(plan: Plan) -> Plan:
    """Plans that differ in this alone have the same calls."""
    return replace(plan, warmup=0, timed=False, resync=None)


def _first_rows(arguments: Arguments, rows: int, num_rows: int) -> Arguments:
    def cut(x: Any) -> Any:
        return x[:rows] if x.dim() and x.shape[0] == num_rows else x

    return map_tensors(arguments, cut)
