"""Learning-rate schedules that torch lacks."""

import math

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosineLR(LambdaLR):
    """Rises linearly to the optimizer's learning rate (Goyal et al., 2017), then falls along half a cosine.

    The sources are "Accurate, Large Minibatch SGD" and Loshchilov and Hutter, "SGDR" (2017).

    Args:
        optimizer: The optimizer to schedule.
        total_steps: Steps of the whole training; null, which needs a trainer: as many as that will make.
        warmup: Share of the steps in which it rises, from 0 to 1.
        final: Learning rate at the end, as a share of the optimizer's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: PositiveInt | None = None,
        warmup: ClosedUnitInterval = 0.1,
        final: NonNegativeFloat = 0.0,
    ) -> None:
        if total_steps is None:
            raise ValueError("total_steps is needed without a trainer")
        # Plain numbers, so that a checkpoint has no classes of jsonargparse.
        self.total_steps, self.warmup_steps, self.final = int(total_steps), round(warmup * total_steps), float(final)
        super().__init__(optimizer, self.share)

    def share(self, step: int) -> float:
        """The learning rate at a step, from 0, as a share of the optimizer's."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        fallen = min(1, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * fallen)) / 2
