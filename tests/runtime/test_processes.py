"""Plain scripts, torchrun, and that nobody is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import distrifusion
from distrifusion import load
from distrifusion.runtime.spawned import SpawnedPipeline
from runtime.faulty import gone_within, hit, is_alive, parent_of

SOURCE = Path(distrifusion.__file__).parents[1]

SCRIPT = """
import sys
import threading
import diffusers
from distrifusion import load

def build():
    return diffusers.DiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else FOLDER)

FOLDER = sys.argv[1]
pipe = load(build, devices=2)
image = pipe("a lake", num_inference_steps=2).images[0]
print("drawn", image.size, *pipe.pids, flush=True)

def draw():
    def tell(pipe, step, timestep, tensors):
        print("step", step, flush=True)
        return tensors

    pipe("a lake", num_inference_steps=1000, callback_on_step_end=tell)

match sys.stdin.readline():
    case "draw\\n":
        draw()
    case "draw in a thread\\n":
        threading.Thread(target=draw, daemon=True).start()
        sys.stdin.readline()
"""

RANK = """
import sys
import torch
from distrifusion import Cancelled, load

with load(sys.argv[1], plan="patch2.displaced.w1") as pipe:
    generator = torch.Generator().manual_seed(4)
    steps = []
    latents = pipe(
        "a lake", num_inference_steps=3, generator=generator, output_type="latent",
        callback_on_step_end=lambda p, i, t, k: (steps.append(i), k)[1],
    ).images
    assert steps == [0, 1, 2] and len(pipe.devices) == 2 and str(pipe.plan) == "patch2.displaced.w1"
    torch.save(latents, f"{sys.argv[2]}/{pipe.rank}.pt")

    def cancel(p, step, timestep, tensors):
        if pipe.rank == 1 and step == 2:
            pipe.cancel()
        return tensors

    try:
        pipe("a lake", num_inference_steps=50, callback_on_step_end=cancel)
    except Cancelled as cancelled:
        assert cancelled.step == 3, cancelled.step
    else:
        raise AssertionError("the call was not cancelled")
    pipe.cancel()
    generator.manual_seed(4)
    again = pipe("a lake", num_inference_steps=3, generator=generator, output_type="latent").images
    assert torch.equal(again, latents)
assert not torch.distributed.is_initialized()
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def start(tmp_path: Path, folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Run the script without a main guard; returns it and the processes it has started for its first picture."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("drawn (64, 64)"):
            ranks = [int(word) for word in line.split()[-2:]]
            return process, [parent_of(ranks[0]), *ranks]
    raise AssertionError(f"the script left with {process.wait()} and drew nothing")


def say(process: subprocess.Popen[str], word: str) -> None:
    """Let the script draw, and wait until it does."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()
    assert any(line == "step 3\n" for line in process.stdout)


def test_a_plain_script_that_just_ends_leaves_nobody(tmp_path: Path, sdxl_folder: Path) -> None:
    process, pids = start(tmp_path, sdxl_folder)
    process.communicate("end\n", timeout=60)
    assert process.returncode == 0
    assert not any(map(is_alive, pids))


def test_a_script_that_ends_while_a_thread_draws_leaves_nobody(tmp_path: Path, sdxl_folder: Path) -> None:
    process, pids = start(tmp_path, sdxl_folder)
    say(process, "draw in a thread")
    process.communicate("end\n", timeout=60)
    assert gone_within(pids, 10)


def test_a_killed_parent_leaves_nobody_not_even_a_stopped_rank(tmp_path: Path, sdxl_folder: Path) -> None:
    process, pids = start(tmp_path, sdxl_folder)
    say(process, "draw")
    hit(pids[-1], "stop")
    process.kill()
    process.communicate()
    assert gone_within(pids, 10)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_ranks_are_forked_from_one_process_that_imported_once(shared_two: SpawnedPipeline) -> None:
    shared_two("a", num_inference_steps=1)
    commands = {command_of(pid) for pid in shared_two.pids}
    assert len(commands) == 1 and "fork_server" in commands.pop()


def test_ranks_import_for_themselves_where_libraries_start_threads(
    tmp_path: Path, sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()\n"
    (tmp_path / "sitecustomize.py").write_text(thread)
    monkeypatch.syspath_prepend(tmp_path)
    with load(sdxl_folder, devices=2) as pipe:
        assert isinstance(pipe, SpawnedPipeline)
        pipe.set_progress_bar_config(disable=True)
        assert all("runtime.worker" in command_of(pid) for pid in pipe.pids)
        assert len(pipe("a", num_inference_steps=1).images) == 1
        pids = pipe.pids
    assert not any(map(is_alive, pids))


@pytest.mark.supports("feature", "cancel() under torchrun")
def test_torchrun_ranks_join_draw_and_cancel(tmp_path: Path, sdxl_folder: Path) -> None:
    import torch

    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, script, sdxl_folder, tmp_path], env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
