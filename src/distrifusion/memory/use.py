"""What a process takes of memory while it draws, by counters of the system that cost nothing meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from distrifusion.memory.free import trim

_PROCESS = Path("/proc/self")
_FROM_HERE = "5"  # to `clear_refs`: the peak of the resident set counts from now on, see proc(5)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one rank in one call.

    Attributes:
        grown: the most that it held at once beyond what it held before. On CPU pages of files (libraries, weights that
            are mapped) are left out, pages that it had shared with other processes count once it has written to them,
            and memory through which ranks exchange counts for each of them. On CUDA what torch gave to tensors.
        peak: the most that it held at all. On CPU its resident set, in which pages that processes share count in full
            for each of them; on CUDA tensors, weights among them.
        own: pages that no other process has, right after the call; None on CUDA.
        missing: why nothing was measured; every number is None then.
    """

    grown: int | None = None
    peak: int | None = None
    own: int | None = None
    missing: str = ""


def weighing(device: torch.device) -> Callable[[], MemoryUse]:
    """Begin to weigh this process; what is returned tells what it has taken since, and costs milliseconds once.

    What it holds without using it is given back first, so that an earlier call hides nothing of this one.
    """
    gc.collect()
    if device.type == "cuda":
        return _tensors(device)
    trim()
    try:
        return _pages()
    except OSError as error:
        missing = f"{error.filename}: {error.strerror}"
        return lambda: MemoryUse(missing=missing)


def _tensors(device: torch.device) -> Callable[[], MemoryUse]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)

    def use() -> MemoryUse:
        peak = torch.cuda.max_memory_allocated(device)
        return MemoryUse(peak - before, peak)

    return use


def _pages() -> Callable[[], MemoryUse]:
    before = _Pages.now()
    (_PROCESS / "clear_refs").write_text(_FROM_HERE)
    sizes_before = _sizes()

    def use() -> MemoryUse:
        sizes, now = _sizes(), _Pages.now()
        # Pages of files are not given back within a call, so those at the peak were at most those of now.
        added = (sizes["VmHWM"] - now.files) - (sizes_before["VmRSS"] - before.files)
        # A page that was shared and is written to is a new one, and the resident set is as large as before.
        copied = (now.written - before.written) - (sizes["RssAnon"] - sizes_before["RssAnon"])
        return MemoryUse(max(0, added + max(0, copied)), sizes["VmHWM"], now.own)

    return use


def _sizes() -> dict[str, int]:
    """Bytes that Linux notes of this process, by name."""
    lines = (line.split() for line in (_PROCESS / "status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


@dataclass(frozen=True)
class _Pages:
    """Bytes of this process's pages.

    Attributes:
        files: that are read from files with a name.
        own: that no other process has.
        written: of the own ones, those that a fork would share until they are written to.
    """

    files: int
    own: int
    written: int

    @classmethod
    def now(cls) -> _Pages:
        """Summed over all mappings."""
        files = own = written = 0
        for name, sizes in _mappings():
            private = sizes["Private_Dirty"]
            own += sizes["Private_Clean"] + private
            written += min(private, sizes["Anonymous"])  # the others are a file's that is not on the disk yet
            files += sizes["Rss"] - sizes["Anonymous"] if name.startswith("/") and "(deleted)" not in name else 0
        return cls(files, own, written)


def _mappings() -> Iterator[tuple[str, dict[str, int]]]:
    """The name of what is mapped, and bytes by name, of every mapping."""
    name, sizes = "", dict[str, int]()
    with (_PROCESS / "smaps").open() as lines:  # by lines: all together are megabytes, which would be weighed too
        for line in lines:
            words = line.split(maxsplit=5)
            if words[0].endswith(":"):
                if words[-1] in ("kB", "kB\n"):
                    sizes[words[0][:-1]] = int(words[1]) * 1024
                continue
            if sizes:
                yield name, sizes
            name, sizes = words[5].rstrip("\n") if len(words) > 5 else "", {}
    if sizes:
        yield name, sizes
