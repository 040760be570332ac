"""Settings of libraries: messages that a user can do nothing about are hidden, and a step of a small net is faster."""

import contextlib
import logging
import warnings
from typing import Any

from lightning.pytorch.profilers import PassThroughProfiler

WARNINGS = (
    r"`torch.jit.\w+` is deprecated|`isinstance\(treespec, LeafSpec\)` is deprecated"  # within torch and Lightning
    r"|The '\w+' does not have many workers"  # the images are in memory
    r"|torch.distributed.nn.functional.all_gather is deprecated|Total length of `\w+` across ranks is zero"
    r"|You're using the WeightAveraging callback, but loading|\s*Unable to serialize instance"
    r"|The `srun` command is available|Be aware that when using `ckpt_path`|LightningCLI's args parameter"
)


def silence_libraries() -> None:
    """Hides those warnings, and Lightning's advice and progress."""
    warnings.filterwarnings("ignore", WARNINGS)
    for name in ("pytorch.utilities.rank_zero", "pytorch.trainer.connectors", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)


class NoProfiler(PassThroughProfiler):
    """Lightning's default without a new context for each of 80 actions a step: saves 5 % of an epoch of base.yaml."""

    context = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.context
