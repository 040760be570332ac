"""What the runs of a sweep have in common before they begin: done once, in the process from which they are forked."""

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from mnist_cnn.callbacks import draw_confusion_matrix
from mnist_cnn.loggers import to_picture

# What a run imports late: Lightning and torch do for their loggers, W&B and jsonargparse for what they support.
LATE = """torch.utils.tensorboard tensorboard.plugins.hparams.api_pb2 tensorboard.plugins.hparams.metadata
    wandb.sdk.launch.inputs.internal pandas omegaconf fsspec.implementations.chained torch.utils.serialization"""


def fill_caches(main: Callable[[list[str]], Any], config: str) -> None:
    """Fills the caches that each run would fill: modules, jsonargparse's parsers of classes, Matplotlib's fonts.

    Starts no thread and touches no device, since a forked process could not use either.

    Args:
        main: The program.
        config: A config file like those that will be run.
    """
    for module in LATE.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    Image.preinit()  # PIL's file formats
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(["fit", f"--config={config}", "--print_config"])
    to_picture(draw_confusion_matrix(np.eye(2, dtype=int), ["0", "1"]))
