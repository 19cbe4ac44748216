"""What the commands that draw have in common: from typed words to a loaded pipeline and the arguments of its call."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distrifusion.cli import options
from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from distrifusion.runtime.devices import DeviceSpec
    from distrifusion.runtime.source import PipelineFacts

_DEMO_SIZE = (512, 512)


@dataclass(frozen=True)
class Wish:
    """What the options say, as they were typed.

    Attributes:
        call: arguments of the pipeline's call that are taken as they are; None where nothing was typed.
    """

    model: str
    devices: str | None
    plan: str | None
    size: str | None
    scheduler: str | None
    dtype: str
    call: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, checked against its class before any weight is read.

        Raises:
            ConfigError: if one is unknown to the pipeline or cannot work.
        """
        from distrifusion.runtime import call_checks

        typed = options.size(self.size) if self.size else (_DEMO_SIZE if self.model == "demo" else (None, None))
        given = {**self.call, "width": typed[0], "height": typed[1]}
        arguments = {name: value for name, value in given.items() if value is not None}
        if self.makes_video():
            arguments["output_type"] = "pil"  # which is not the default of every video pipeline
        if self.facts is not None:
            call_checks.check(self.facts, call_checks.bind(self.facts, (), arguments))
        return arguments

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
    """Refuse a command that also draws on one device after all others.

    Raises:
        ConfigError: if torchrun started this process.
    """
    from distrifusion.runtime.in_process import TorchrunPlace

    if TorchrunPlace.of(os.environ) is not None:
        raise ConfigError(f"{what} draws on one device after all others, which torchrun's ranks cannot; leave it out")


def quiet_libraries() -> None:
    """Leave the terminal to the picture's own bar."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
