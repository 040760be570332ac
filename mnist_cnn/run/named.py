"""The callbacks and loggers that have names in YAML: `early_stopping: {patience: 3}`, `histograms: null`."""

from typing import Any, Optional

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
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
EVALUATION_CALLBACKS = ("test_pictures", "predictions", "progress_bar")
LOGGERS: dict[str, type[Logger]] = {"tensorboard": RunFolderTensorBoard, "wandb": WandbLogger}


def add_named_arguments(parser: LightningArgumentParser) -> None:
    """Adds an option for each name; its value is a class of that kind with its arguments, or null."""
    for name, kind in {**CALLBACKS, **LOGGERS}.items():
        others = "trainer.logger" if name in LOGGERS else "trainer.callbacks"
        text = f"A {kind.__name__}, in addition to {others}; null disables it."
        parser.add_argument(f"--{name}", type=Optional[kind], default=None, help=text)  # noqa: UP045


def named_loggers(config: Any) -> list[Logger]:
    """The loggers of an instantiated config that are not disabled."""
    return [config[name] for name in LOGGERS if config[name]]


def named_callbacks(config: Any, others: list[Callback], is_fit: bool, has_loggers: bool) -> list[Callback]:
    """The callbacks of an instantiated config that are not disabled and have something to do beside the others."""
    off = {"predictions"} if is_fit else CALLBACKS.keys() - EVALUATION_CALLBACKS
    if config.trainer.enable_checkpointing is False or config.trainer.fast_dev_run:
        off |= {"checkpoint", "last_checkpoint"}
    if config.trainer.enable_progress_bar is False or any(isinstance(callback, ProgressBar) for callback in others):
        off |= {"progress_bar"}  # there can be only one
    if not has_loggers:
        off |= {"lr_monitor"}
    return [config[name] for name in CALLBACKS if config[name] and name not in off]


def as_list(value: Any) -> list[Any]:
    """A value of the trainer that may be a list, a single object, or null."""
    return list(value) if isinstance(value, list) else [value] if value else []
