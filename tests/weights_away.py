"""A machine with an accelerator, as far as weights are concerned: those that were set aside are not numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from distrifusion.strategies import weights

# Where weights go that are set aside; no tensor of a test is there.
ELSEWHERE = torch.device("meta")


def pretend_accelerator(monkeypatch: pytest.MonkeyPatch) -> WeakTensorKeyDictionary:
    """Let the CPU be an accelerator; what is returned has the values of the weights that are aside."""
    values = WeakTensorKeyDictionary()

    def move(module: nn.Module, device: torch.device) -> None:
        for tensor in weights.weight_tensors([module]):
            if device == ELSEWHERE and tensor not in values:
                values[tensor] = tensor.data.clone()
                tensor.data.fill_(torch.nan)
            elif device != ELSEWHERE and tensor in values:
                tensor.data.copy_(values.pop(tensor))

    monkeypatch.setattr(weights, "HOST", ELSEWHERE)
    monkeypatch.setattr(weights, "_move", move)
    return values
