"""Learning-rate schedules that torch lacks."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosineLR(LambdaLR):
    """The learning rate rises in a line to the optimizer's, then falls along half a cosine; it is stepped at each step.

    Sources: Goyal et al., Accurate, Large Minibatch SGD, 2017 (warm-up); Loshchilov and Hutter, SGDR, 2017 (cosine).

    Args:
        optimizer: Whose learning rate it is.
        total_steps: Steps of the whole training; null: as many as the trainer will make.
        warmup: The share of them in which it rises, from 0 to 1.
        final: The learning rate at the end, as a share of the optimizer's.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int | None = None, warmup: float = 0.1, final: float = 0.0
    ) -> None:
        if total_steps is None or total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup must be between 0 and 1, got {warmup}")
        if final < 0:
            raise ValueError(f"final must be at least 0, got {final}")
        self.total_steps = total_steps
        self.warmup_steps = round(warmup * total_steps)
        self.final = final
        super().__init__(optimizer, self.share)

    def share(self, step: int) -> float:
        """The learning rate at a step, from 0, as a share of the optimizer's."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        fallen = min(1, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * fallen)) / 2
