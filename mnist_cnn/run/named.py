"""The callbacks and loggers that have names in YAML: `early_stopping: {patience: 3}`, `histograms: null`."""

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger

from mnist_cnn.run.callbacks import Histograms, ModelGraph, PredictionWriter
from mnist_cnn.run.loggers import RunFolderTensorBoard
from mnist_cnn.run.pictures import TestPictures

CALLBACKS: dict[str, type[Callback]] = {
    "checkpoint": ModelCheckpoint,
    "last_checkpoint": ModelCheckpoint,
    "early_stopping": EarlyStopping,
    "lr_monitor": LearningRateMonitor,
    "graph": ModelGraph,
    "histograms": Histograms,
    "test_pictures": TestPictures,
    "predictions": PredictionWriter,
    "progress_bar": ProgressBar,
}
LOGGERS: dict[str, type[Logger]] = {"tensorboard": RunFolderTensorBoard, "wandb": WandbLogger}


def all_callbacks(config: Any, has_loggers: bool) -> list[Callback]:
    """The trainer's own callbacks, and the named ones that are not disabled and that Lightning would not refuse."""
    callbacks = as_list(config.trainer.callbacks)
    refused: list[type[Callback]] = [] if has_loggers else [LearningRateMonitor]
    if config.trainer.enable_checkpointing is False:
        refused.append(ModelCheckpoint)
    if config.trainer.enable_progress_bar is False or any(isinstance(callback, ProgressBar) for callback in callbacks):
        refused.append(ProgressBar)  # there can be only one
    named = [config[name] for name in CALLBACKS if config[name]]
    return callbacks + [callback for callback in named if not isinstance(callback, tuple(refused))]


def as_list(value: Any) -> list[Any]:
    """A value of the trainer that may be a list, a single object, or null."""
    return list(value) if isinstance(value, list) else [value] if value else []
