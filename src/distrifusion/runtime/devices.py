"""What `devices=` may say, and the devices it means on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from distrifusion.errors import ConfigError, PlanError
from distrifusion.plan import Plan
from distrifusion.runtime.surroundings import threads_of_each

DeviceSpec = int | str | torch.device | Sequence[int | str | torch.device] | None

_NAME = re.compile(r"cpu|cuda(:\d+)?")


def resolve(spec: DeviceSpec, plan: Plan | None) -> tuple[tuple[torch.device, ...], Plan]:
    """The devices and the plan for what the caller asked; see `distrifusion.load` for the forms of `spec`.

    Raises:
        ConfigError: if a device is not here or the form is none of these.
        PlanError: if the plan does not occupy exactly these devices.
    """
    devices = _devices(spec, plan.num_ranks if plan else None)
    if plan is None:
        return devices, Plan.default(len(devices))
    plan.check_devices(len(devices))
    return devices, plan


def parse(text: str) -> DeviceSpec:
    """Read the command line's form: `2`, `cpu`, `cuda`, `cuda:1`, `cpu,cpu` or `0,1`.

    Raises:
        ConfigError: if a part is none of these.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) == 1 and re.fullmatch(r"[+-]?\d+", words[0]):
        return int(words[0])
    parts: list[int | str | torch.device] = [int(word) if word.isdecimal() else word for word in words]
    for part in parts:
        if isinstance(part, str) and not _NAME.fullmatch(part):
            raise _unknown(text)
    return parts if len(parts) > 1 else str(parts[0])


def threads_per_rank(devices: Sequence[torch.device]) -> int:
    """CPU threads for one of these ranks."""
    return threads_of_each(len(devices))


def _devices(spec: DeviceSpec, num_ranks: int | None) -> tuple[torch.device, ...]:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if spec is None:
        return _count(num_ranks or num_gpus or 1, num_gpus, f"the plan needs {num_ranks} devices")
    if isinstance(spec, bool):
        raise _unknown(spec)
    if isinstance(spec, int):
        return _count(spec, num_gpus, f"devices={spec}")
    if isinstance(spec, torch.device):
        return _checked([spec], num_gpus)
    if isinstance(spec, str):
        return _named(spec, num_ranks, num_gpus)
    if isinstance(spec, Sequence):
        return _checked(list(spec), num_gpus)
    raise _unknown(spec)


def _count(count: int, num_gpus: int, asked: str) -> tuple[torch.device, ...]:
    if count < 1:
        raise ConfigError(f"{asked}: at least one device is needed; devices=1 draws in this process")
    if not num_gpus:
        return (torch.device("cpu"),) * count
    if count > num_gpus:
        raise ConfigError(
            f"{asked}, and this machine has {num_gpus} GPU{'s' * (num_gpus > 1)}; "
            f"ask for at most {num_gpus}, or name CPU processes: devices={['cpu'] * min(count, 2)}, "
            "on the command line cpu,cpu"
        )
    return tuple(torch.device("cuda", index) for index in range(count))


def _named(name: str, num_ranks: int | None, num_gpus: int) -> tuple[torch.device, ...]:
    if name == "cpu":
        return (torch.device("cpu"),) * (num_ranks or 1)
    if name == "cuda" and num_gpus:
        return _count(num_ranks or num_gpus, num_gpus, f"the plan needs {num_ranks} devices")
    return _checked([name], num_gpus)


def _checked(parts: Sequence[int | str | torch.device], num_gpus: int) -> tuple[torch.device, ...]:
    if not parts:
        raise ConfigError("devices=[]: at least one device is needed; devices=1 draws in this process")
    devices = tuple(_one(part, num_gpus) for part in parts)
    if len({device.type for device in devices}) > 1:
        raise ConfigError(f"devices={[str(d) for d in devices]} mixes CPU and GPU; name devices of one kind")
    if devices[0].type == "cuda" and len(set(devices)) < len(devices):
        raise ConfigError(f"devices={[str(d) for d in devices]} names a GPU twice; every rank needs its own")
    return devices


def _one(part: int | str | torch.device, num_gpus: int) -> torch.device:
    if isinstance(part, bool) or not isinstance(part, int | str | torch.device):
        raise _unknown(part)
    name = f"cuda:{part}" if isinstance(part, int) else str(part)
    if not _NAME.fullmatch(name):
        raise _unknown(part)
    if name == "cpu":
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if not num_gpus:
        raise ConfigError(f"device '{name}' was asked for and there is no CUDA here; use 'cpu'")
    if index >= num_gpus:
        raise ConfigError(f"device '{name}' was asked for and the GPUs here are cuda:0 to cuda:{num_gpus - 1}")
    return torch.device("cuda", index)


def _unknown(part: object) -> ConfigError:
    return ConfigError(
        f"devices={part!r} is none of: a count such as 2, 'cpu', 'cuda', 'cuda:1', or a list such as "
        "['cuda:0', 'cuda:1'], [0, 1] or ['cpu', 'cpu']"
    )


def check_world(spec: DeviceSpec, plan: Plan | None, world_size: int) -> Plan:
    """The plan for ranks that torchrun started; `spec` may be None, a kind, or their number.

    Raises:
        ConfigError: if `spec` names devices: under torchrun every rank takes the one of its LOCAL_RANK.
        PlanError: if the plan does not occupy exactly these ranks.
    """
    if isinstance(spec, bool) or not (spec is None or isinstance(spec, int) or spec in ("cpu", "cuda")):
        raise ConfigError(f"devices={spec!r}: under torchrun every rank takes its own; leave it out, or say 'cpu'")
    if isinstance(spec, int) and spec != world_size:
        raise ConfigError(f"devices={spec} and torchrun started {world_size} ranks; leave devices out")
    if plan is not None and plan.num_ranks != world_size:
        raise PlanError(
            f"plan '{plan}' needs {plan.num_ranks} ranks and torchrun started {world_size}; "
            f"the nearest plan for {world_size} is '{plan.nearest(world_size)}'"
        )
    return plan or Plan.default(world_size)
