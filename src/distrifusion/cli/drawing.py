"""What the commands that draw have in common: from typed words to a loaded pipeline and the arguments of its call."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distrifusion import demo
from distrifusion.cli import options
from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from distrifusion.plan import Plan
    from distrifusion.runtime.devices import DeviceSpec
    from distrifusion.runtime.pipeline import LoadedPipeline
    from distrifusion.runtime.source import PipelineFacts


@dataclass(frozen=True)
class Wish:
    """What the options say, as they were typed.

    Attributes:
        call: arguments of the pipeline's call that are taken as they are; None where nothing was typed.
        fidelity: what a plan that is chosen may be; None where nothing was typed.
    """

    model: str
    devices: str | None
    plan: str | None
    size: str | None
    scheduler: str | None
    dtype: str
    call: dict[str, Any]
    fidelity: str | None = None

    @property
    def automatic(self) -> bool:
        """Whether the plan is to be chosen.

        Raises:
            ConfigError: if a fidelity was typed for a plan that is not.
        """
        automatic = self.plan is not None and self.plan.strip().lower() == "auto"
        if self.fidelity is not None and not automatic:
            raise ConfigError("--fidelity says what --plan auto may take; a plan that is named has its own")
        return automatic

    def choose(self, arguments: dict[str, Any]) -> tuple[str, DeviceSpec]:
        """The plan for a call, and as many of the devices as it takes; says why.

        Args:
            arguments: of the pipeline's call.

        Raises:
            ConfigError: if nothing can be known of the model before it is opened.
        """
        import typer

        from distrifusion.planner import auto
        from distrifusion.runtime import devices

        refuse_torchrun("--plan auto")
        where, _ = devices.resolve(self.device_spec(), None)
        size = (arguments["width"], arguments["height"]) if arguments.keys() >= {"width", "height"} else None
        guidance = arguments.get("guidance_scale")
        ranking = auto.choose(
            self.model,
            where,
            wish=self.fidelity or "exact",
            size=size,
            steps=arguments["num_inference_steps"],
            guided=guidance is None or guidance > 1,
            keywords=dtype_keyword(self.dtype),
            say=lambda text: typer.echo(text, err=True),
        )
        typer.echo(ranking.reason, err=True)
        plan = ranking.chosen.plan
        return str(plan), list(where[: plan.num_ranks])

    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, checked against its class before any weight is read.

        Raises:
            ConfigError: if one is unknown to the pipeline or cannot work.
        """
        from distrifusion.runtime import call_checks

        embedded = demo.find(self.model)
        own = (None, None) if embedded is None else embedded.size
        width, height = options.size(self.size) if self.size else own
        given = {**self.call, "width": width, "height": height}
        arguments = {name: value for name, value in given.items() if value is not None}
        if self.makes_video():
            arguments["output_type"] = "pil"  # which is not the default of every video pipeline
        if self.facts is not None:
            call_checks.check(self.facts, call_checks.bind(self.facts, (), arguments), self._wanted_plan())
        return arguments

    def _wanted_plan(self) -> Plan | None:
        from distrifusion.plan import Plan

        return None if self.plan is None or self.automatic else Plan.parse(self.plan)

    def check_sampler(self, arguments: dict[str, Any]) -> None:
        """Check that the scheduler, typed or the model's own, and the steps can serve the typed sampler.

        Args:
            arguments: of the pipeline's call.

        Raises:
            ConfigError, PlanError: if they cannot.
        """
        from distrifusion.engine import words

        if self.facts is not None:
            words.check(self.facts.cls, self._wanted_plan(), self._scheduler(self.facts), arguments)

    def _scheduler(self, facts: PipelineFacts) -> Any:
        """The scheduler of the call; None where it is not known before the pipeline is open."""
        import diffusers

        config = facts.scheduler
        cls = getattr(diffusers, self.scheduler_class() or str(config.get("_class_name")), None)
        return cls.from_config(config) if cls is not None and config else None

    def makes_video(self) -> bool:
        """Whether the pipeline gives frames. One whose class comes with its own code is taken to draw pictures."""
        from distrifusion.runtime.source import makes_video

        return self.facts is not None and makes_video(self.facts.cls)

    @cached_property
    def facts(self) -> PipelineFacts | None:
        """What is known of the pipeline before it is open.

        Raises:
            ConfigError: if the model is none that can be found.
        """
        from distrifusion.runtime.source import find

        return find(self.model, {}).facts

    def device_spec(self) -> DeviceSpec:
        """What `load` takes as devices.

        Raises:
            ConfigError: if a part of the text is no device.
        """
        from distrifusion.runtime import devices

        return None if self.devices is None else devices.parse(self.devices)

    def scheduler_class(self) -> str | None:
        """Name of the diffusers class; None for the model's own.

        Raises:
            ConfigError: if the typed name is not known.
        """
        return options.scheduler_class(self.scheduler)

    def put_scheduler(self, pipe: LoadedPipeline) -> None:
        """Give the pipeline the typed scheduler, with the numbers of its own."""
        import diffusers

        name = self.scheduler_class()
        if name is not None:
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)


def dtype_keyword(name: str) -> dict[str, Any]:
    """The keyword of from_pretrained for a dtype, which diffusers has renamed; none for what it takes by itself.

    Raises:
        ConfigError: if the dtype is not one of those served.
    """
    import diffusers
    import torch
    from packaging.version import Version

    word = options.one_of(name, options.DTYPES, "dtype")
    if word == "float32":
        return {}
    keyword = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    return {keyword: getattr(torch, word)}


def refuse_torchrun(what: str) -> None:
    """Refuse what has to do with one device alone.

    Raises:
        ConfigError: if torchrun started this process.
    """
    from distrifusion.runtime.in_process import TorchrunPlace

    if TorchrunPlace.of(os.environ) is not None:
        raise ConfigError(f"{what} may draw on one device alone, which torchrun's ranks cannot; leave it out")


def quiet_libraries() -> None:
    """Leave the terminal to the picture's own bar."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
