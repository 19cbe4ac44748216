"""Where a plan's ranks live: this process, worker processes started by `load`, or processes started by torchrun."""
