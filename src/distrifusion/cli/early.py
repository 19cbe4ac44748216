"""Starting the ranks' fork server before anything is imported, where a command's words say that it will be wanted."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext

from distrifusion.cli.drawing import Wish
from distrifusion.errors import PlanError
from distrifusion.plan import Plan


def early_server(wish: Wish) -> AbstractContextManager[None]:
    """Within, the fork server of the wished devices imports the libraries while this process does; see `_num_ranks`."""
    from distrifusion.runtime import server_process, surroundings

    num_ranks = _num_ranks(wish.devices, wish.plan)
    # On a single core two processes that import would take turns, and each be slower than one.
    if num_ranks < 2 or surroundings.num_cores() < 2 or surroundings.started_by_torchrun(os.environ):
        return nullcontext()
    # `quiet_libraries` says the same in this process.
    verbosity = dict.fromkeys(server_process.VERBOSITY, logging.ERROR)
    return server_process.started_early(surroundings.threads_of_each(num_ranks), verbosity)


def _num_ranks(devices: str | None, plan: str | None) -> int:
    """How many ranks the words ask for; 1 where that is to be found out, or a word is wrong, which others say.

    A plan that is chosen may take one device, and a machine that is being measured for it must not be busy.
    """
    if plan is not None:
        try:
            return Plan.parse(plan).num_ranks
        except PlanError:  # `auto` is no plan either
            return 1
    words = "" if devices is None else devices.strip()
    return int(words) if words.isdecimal() else len(words.split(","))
