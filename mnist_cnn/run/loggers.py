"""TensorBoard in the run's folder, W&B with or without an account, and the same figures and histograms in both."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from mnist_cnn.run.config import flatten
from mnist_cnn.run.errors import UserError


class RunFolderTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger, writing into the run's folder, one event file for fit, validation and test.

    Args:
        max_queue: Number of events that are kept before they are written.
        flush_secs: Seconds after which they are written.
    """

    run_dir = ""  # the run's folder, once there is one

    def __init__(self, max_queue: int = 10, flush_secs: int = 10) -> None:
        super().__init__("", name="", version="", default_hp_metric=False, max_queue=max_queue, flush_secs=flush_secs)

    def start(self, run_dir: Path) -> None:
        """Opens the event file, and adds charts with training and validation together to Custom Scalars."""
        self.run_dir = str(run_dir)
        charts = {name: ["Multiline", [f"(train|val)/{name}"]] for name in ("loss", "acc")}
        self.experiment.add_custom_scalars({"train and val": charts})

    @property
    def log_dir(self) -> str:
        return self.run_dir

    def finalize(self, status: str) -> None:
        """Leaves the file open, since validation and test follow fit."""

    def save(self) -> None:
        """Writes no hparams.yaml: config.yaml has all settings."""

    def close(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """Adds the run's row to the HParams tab, and closes the file.

        TensorBoard shows the settings that differ between runs first, unless a run lists the columns, as Lightning's
        log_hyperparams would. It colours and sorts by the first metric, so losses go last.
        """
        metrics = dict(sorted(metrics.items(), key=lambda item: "loss" in item[0]))
        for summary in hparams(short_settings(settings), metrics)[1:] if metrics else ():
            self.experiment._get_file_writer().add_summary(summary)  # SummaryWriter.add_hparams starts another run
        self.experiment.close()


def short_settings(config: dict[str, Any]) -> dict[str, int | float | str]:
    """Settings by short names, `{"model.net": "CNN", "model.net.l1_chan": 4, ...}`, without null ones."""
    short: dict[str, int | float | str] = {}
    for path, value in flatten(config).items():
        if path[-1] == "class_path":
            path, value = path[:-1], value.rpartition(".")[2]
        if value is not None:
            plain = isinstance(value, int | float | str) and not isinstance(value, bool)  # true would be shown as 1.0
            short[".".join(key for key in path if key != "init_args")] = value if plain else json.dumps(value)
    return short


def log_histograms(trainer: Trainer, values: dict[str, Tensor], bins: int) -> None:
    """Logs a histogram of each tensor's finite values to each TensorBoardLogger and WandbLogger."""
    arrays: dict[str, Any] = {}
    for tag, value in values.items():
        value = value.detach().float().cpu()  # histograms on CUDA are not deterministic
        if value.isfinite().any():
            arrays[tag] = value[value.isfinite()].numpy()
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for tag, array in arrays.items():
                logger.experiment.add_histogram(tag, array, trainer.global_step, bins)
        elif isinstance(logger, WandbLogger):
            histograms: Any = {tag: wandb.Histogram(array, num_bins=bins) for tag, array in arrays.items()}
            logger.log_metrics(histograms, trainer.global_step)


def log_figure(trainer: Trainer, tag: str, figure: Figure) -> None:
    """Logs a Matplotlib figure as an image to each TensorBoardLogger and WandbLogger."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3]  # uint8 [H, W, 3]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, image, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [image], trainer.global_step)


def start_wandb(logger: WandbLogger) -> Any:
    """Starts a W&B run: online with an API key; offline without one, or if W&B fails. WANDB_MODE overrides both."""
    settings: dict[str, Any] = {"silent": True, "init_timeout": 5, "finish_timeout": 10}  # seconds
    folder = Path(logger.save_dir or ".")
    folder.mkdir(parents=True, exist_ok=True)  # W&B would use a temporary folder instead
    present = set(folder.glob("wandb/run-*"))
    try:
        wandb.setup(wandb.Settings(**settings))
        if not wandb.login(prompt=False, verify=False) and "WANDB_MODE" not in os.environ:
            wandb.setup(wandb.Settings(mode="offline"))
        run = logger.experiment
    except wandb.Error as error:
        print(f"W&B: {str(error).partition(chr(10))[0]}; the run is logged offline", file=sys.stderr)
        wandb.teardown()
        for failed in set(folder.glob("wandb/run-*")) - present:
            shutil.rmtree(failed)
        wandb.setup(wandb.Settings(mode="offline", **settings))
        run = logger.experiment
    except ValueError as error:
        raise UserError(f"WANDB_MODE={os.environ.get('WANDB_MODE')} is not one of W&B's modes") from error
    if not run.offline and run.url:
        print(f"W&B: {run.url}")
    return run


def finish_wandb(run: Any, status: int, keep: bool) -> None:
    """Finishes a W&B run; keeps the folder of an offline run and says how to upload it, or removes the folder."""
    offline, folder = run.offline, os.path.relpath(run.settings.sync_dir)
    run.finish(exit_code=status)
    wandb.teardown()  # so that the next run in this process starts with its own settings
    if offline and keep:
        folder = shlex.quote(folder)
        print(f"W&B: view the run with `wandb leet {folder}`, upload it with `wandb sync {folder}`")
    elif offline:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(Path(folder).parent.glob("*run-*/")):
            shutil.rmtree(Path(folder).parent)  # W&B's debug logs
