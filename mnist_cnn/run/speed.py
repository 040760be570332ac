"""Settings that make a step of a small net faster. The shares are of an epoch of base.yaml on one thread."""

import contextlib
from typing import Any

import torch
from lightning.pytorch.profilers import PassThroughProfiler, Profiler


class NoProfiler(PassThroughProfiler):
    """Lightning's default profiler without a new context for each of about 80 actions a step: saves 6 %."""

    context = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        """Measures nothing."""
        return self.context


def speed_up(profiler: Profiler | str | None) -> Profiler | str:
    """Returns the profiler to use, and stops torch from filling new tensors: saves 9 %.

    With trainer.deterministic, torch fills them in case an operation reads memory that it has not written.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return profiler or NoProfiler()
