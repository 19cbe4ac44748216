"""Where a pipeline comes from, and what can be known of it before any weight is read."""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from distrifusion import demo
from distrifusion.errors import ConfigError
from distrifusion.in_place import check_class
from distrifusion.plan import Plan

_INDEX = "model_index.json"
# What DiffusionPipeline.from_pretrained takes by name out of its **kwargs.
_HUB_KEYWORDS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
_FROM_PRETRAINED = (
    *_HUB_KEYWORDS,
    *("torch_dtype", "dtype", "custom_pipeline", "custom_revision", "provider", "sess_options", "provider_options"),
    *("low_cpu_mem_usage", "variant", "use_safetensors", "use_onnx", "load_connected_pipeline"),
    *("quantization_config", "use_flashpack", "disable_mmap", "trust_remote_code"),
)
_PLACEMENT = ("device_map", "max_memory", "offload_folder", "offload_state_dict")


@dataclass(frozen=True)
class PipelineFacts:
    """What the caller's side knows of the pipeline.

    Attributes:
        cls: its class.
        vae_factor: pixels per latent row, None if it has no such number.
        scheduler: configuration of the one that it was saved with; empty where that is not known.
    """

    cls: type
    vae_factor: int | None
    scheduler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A pipeline that every rank can open: a folder, a hub id, or a factory; with keywords for `from_pretrained`.

    Attributes:
        facts: what is known before opening; None for a factory or a pipeline whose class comes with its own code.
    """

    origin: str | Callable[[], Any]
    keywords: Mapping[str, Any]
    facts: PipelineFacts | None

    def check_plan(self, plan: Plan) -> None:
        """Check whether a plan can divide such a pipeline, as far as its class says.

        Raises:
            PlanError, UnsupportedModel: if it cannot.
        """
        if self.facts is not None:
            check_class(self.facts.cls, plan)

    def open(self, device: torch.device | None = None) -> diffusers.DiffusionPipeline:
        """Read the weights and place the pipeline on `device`; None leaves it where it is, on the host if it was read.

        Raises:
            ConfigError: if a factory returns something else than a diffusers pipeline.
        """
        if isinstance(self.origin, str):
            pipe = diffusers.DiffusionPipeline.from_pretrained(self.origin, **self.keywords)
        else:
            pipe = self.origin()
        if not isinstance(pipe, diffusers.DiffusionPipeline):
            raise ConfigError(f"the factory returned a {type(pipe).__name__}; it must return a diffusers pipeline")
        return pipe if device is None else pipe.to(device)


def facts_of(pipe: diffusers.DiffusionPipeline) -> PipelineFacts:
    """Facts of an open pipeline."""
    return PipelineFacts(type(pipe), getattr(pipe, "vae_scale_factor", None))


def takes_step_callback(cls: type) -> bool:
    """True if pipelines of this class call back after every step."""
    return "callback_on_step_end" in inspect.signature(cls.__call__).parameters


def makes_video(cls: type) -> bool:
    """True if pipelines of this class give frames."""
    return "num_frames" in inspect.signature(cls.__call__).parameters


def find(source: object, keywords: Mapping[str, Any]) -> Source:
    """Find out what `source` is and check it and the `from_pretrained` keywords, without reading weights.

    Raises:
        ConfigError: if it is no folder of a pipeline, no hub id that answers, nor a factory, or a keyword is unknown.
    """
    if callable(source) and not isinstance(source, diffusers.DiffusionPipeline):
        return _from_factory(source, keywords)
    if not isinstance(source, str | os.PathLike):
        embedded = ", ".join(f"'{model}'" for model in demo.MODELS)
        raise ConfigError(
            f"a {type(source).__name__} cannot be loaded: give a hub id, a folder, {embedded}, or a function that "
            "returns the pipeline; to divide a pipeline that is open, see distrifusion.parallelize"
        )
    name = os.fspath(source)
    if name in demo.MODELS:
        folder = demo.path(name)
        if not folder.is_dir():
            raise ConfigError(f"the embedded model '{name}' is not in this installation: there is no folder '{folder}'")
        return _from_folder(folder, keywords)
    if Path(name).expanduser().exists():
        return _from_folder(Path(name).expanduser(), keywords)
    if isinstance(source, os.PathLike) or not _may_be_hub_id(name):
        near = demo.near(name)
        meant = f"; did you mean '{near}'?" if near else ""
        raise ConfigError(f"there is no folder '{name}', and a hub id has the form 'owner/name'{meant}")
    return _from_hub(name, keywords)


def _from_factory(factory: Callable[..., Any], keywords: Mapping[str, Any]) -> Source:
    if keywords:
        raise ConfigError(f"{', '.join(keywords)}: a factory takes no keywords from load; put them into the factory")
    if isinstance(factory, type):
        raise ConfigError(f"{factory.__name__} is a class: give its folder or hub id, or a function that opens it")
    return Source(factory, {}, None)


def _from_folder(folder: Path, keywords: Mapping[str, Any]) -> Source:
    if folder.is_file():
        raise ConfigError(f"'{folder}' is a file; load a folder, or give a function that calls from_single_file on it")
    if not folder.is_dir():
        raise ConfigError(f"there is no folder '{folder}'")
    if not (folder / _INDEX).is_file():
        raise ConfigError(f"'{folder}' is not a pipeline folder: it has no {_INDEX}; {_what_is_in(folder)}")
    index = _read_json(folder / _INDEX)
    files = (folder / "vae" / "config.json", folder / "scheduler" / "scheduler_config.json")
    vae, scheduler = (_read_json(file) if file.is_file() else {} for file in files)
    return _described(str(folder), keywords, index, vae, scheduler)


def _from_hub(name: str, keywords: Mapping[str, Any]) -> Source:
    hub = {key: keywords[key] for key in _HUB_KEYWORDS if key in keywords}
    try:
        index = diffusers.DiffusionPipeline.load_config(name, **hub)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"'{name}' is neither a folder here nor a pipeline the hub gives: {reason}") from error

    def config(component: str, reader: Any) -> Mapping[str, Any]:
        has = index.get(component, (None, None))[0] is not None
        return reader.load_config(name, subfolder=component, **hub) if has else {}

    vae, scheduler = config("vae", diffusers.AutoencoderKL), config("scheduler", diffusers.DDIMScheduler)
    return _described(name, keywords, index, vae, scheduler)


def _described(
    origin: str,
    keywords: Mapping[str, Any],
    index: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
) -> Source:
    cls = _pipeline_class(origin, index, keywords)
    check_keywords(cls, keywords)
    channels = vae.get("block_out_channels")
    facts = PipelineFacts(cls, 2 ** (len(channels) - 1) if channels else None, scheduler) if cls else None
    return Source(origin, {**_empty_places(cls, index), **keywords}, facts)


def _empty_places(cls: type | None, index: Mapping[str, Any]) -> dict[str, None]:
    """Components that were saved as none, which `from_pretrained` wants to hear for those it calls required."""
    optional = getattr(cls, "_optional_components", [])
    return {name: None for name, entry in index.items() if entry == [None, None] and name not in optional}


def _pipeline_class(origin: str, index: Mapping[str, Any], keywords: Mapping[str, Any]) -> type | None:
    name = index.get("_class_name")
    if "custom_pipeline" in keywords or isinstance(name, list | tuple):
        return None
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ConfigError(
            f"'{origin}' says its pipeline is {name!r}, which diffusers {diffusers.__version__} does not have; "
            "update diffusers, or give a function that builds the pipeline"
        )
    return cls


def check_keywords(cls: type | None, keywords: Mapping[str, Any]) -> None:
    """Check names of `from_pretrained` keywords; `cls` None leaves names open that a custom class may take.

    Raises:
        ConfigError: on an unknown name (the nearest is named) or one that places the pipeline.
    """
    for name in keywords:
        if name in _PLACEMENT:
            raise ConfigError(f"{name}= places the pipeline, and so does load; say where by devices=")
        if cls is None:
            continue
        components = list(inspect.signature(cls).parameters)
        ours = ["devices", "plan", "fidelity", "size", "backend", "threads", "step_timeout", "start_timeout"]
        ours += ["graphs"]
        known = [*ours, *_FROM_PRETRAINED, *components]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}=?" if near else f"its components are {', '.join(components)}"
            raise ConfigError(f"load has no keyword {name}=, nor has from_pretrained of {cls.__name__}; {hint}")


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not name.endswith("/")


def _what_is_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if "config.json" in names:
        return "its config.json is that of a single component; load the folder above it"
    if not names:
        return "it is empty"
    return f"it holds {', '.join(names[:6])}{' and more' if len(names) > 6 else ''}"


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{path}' is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' does not hold a JSON object")
    return content
