"""What the plan says of an optimizer's moments is what the optimizer has."""

from __future__ import annotations

import pytest
import torch

from drawplate.layout.moments import MOMENTS, moment_blocks, moments_bytes
from drawplate.recipe import TrainSection
from drawplate.train.loop import make_optimizer


@pytest.mark.parametrize("count", [100, 4095, 4096, 10_000])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_moments_have_the_bytes_that_are_planned(optim: str, count: int) -> None:
    parameter = torch.nn.Parameter(torch.ones(count))
    optimizer = make_optimizer([parameter], TrainSection(optim=optim))
    parameter.grad = torch.ones(count)
    optimizer.step()
    state = optimizer.state[parameter]
    names = {"adamw_torch": ("exp_avg", "exp_avg_sq"), "adamw_8bit": ("state1", "absmax1", "state2", "absmax2")}[optim]
    held = [state[name].numel() * state[name].element_size() for name in names if state.get(name) is not None]
    assert sorted(held) == sorted(moment_blocks(optim, count) * MOMENTS)
    assert count < 4096 or moments_bytes(optim, count) == sum(held)
