"""TensorBoard in the run's folder, W&B with or without an account, and the same figures and histograms in both."""

import os
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
from torchvision.utils import make_grid

from mnist_cnn.run.errors import UserError
from mnist_cnn.run.folder import flatten


class RunFolderTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger, writing into the run's folder, one event file for fit and its test.

    It writes after max_queue events, and every flush_secs seconds.
    """

    log_dir: str = ""  # type: ignore[assignment]  # the run's folder, once there is one

    def __init__(self, max_queue: int = 10, flush_secs: int = 10) -> None:
        super().__init__("", name="", version="", default_hp_metric=False, max_queue=max_queue, flush_secs=flush_secs)

    def start(self, run_dir: Path) -> None:
        """Opens the event file, and adds charts with training and validation together to Custom Scalars."""
        self.log_dir = str(run_dir)
        charts = {name: ["Multiline", [f"(train|val)/{name}"]] for name in ("loss", "acc")}
        self.experiment.add_custom_scalars({"train and val": charts})

    def finalize(self, status: str) -> None:
        """Writes what is logged; the file stays open, since a test follows fit."""
        self.experiment.flush()

    def save(self) -> None:
        """Writes no hparams.yaml: config.yaml has all settings."""


def log_result(trainer: Trainer, settings: dict[str, Any], metrics: dict[str, float]) -> None:
    """Logs the best checkpoint's metrics in W&B's summary and, with settings by short names, in the HParams tab."""
    row: dict[str, int | float | str] = {}
    for path, value in flatten({name: settings[name] for name in ("seed_everything", "model", "data")}).items():
        value = value.rpartition(".")[2] if path[-1] == "class_path" else value
        name = ".".join(key for key in path if key not in ("class_path", "init_args"))
        row[name] = value if type(value) in (int, float, str) else str(value)  # true would be shown as 1.0
    of_best = {f"best/{name}": value for name, value in metrics.items() if name.startswith("val")}  # not in the curves
    for logger in trainer.loggers:
        if isinstance(logger, RunFolderTensorBoard):
            for summary in hparams(row, {})[1:]:  # without a list of columns, the tab begins with what differs
                logger.experiment.file_writer.add_summary(summary)  # SummaryWriter.add_hparams starts another run
            logger.log_metrics(of_best, trainer.global_step)
            logger.finalize("success")
        elif isinstance(logger, WandbLogger):
            logger.experiment.summary.update(metrics)


def log_histograms(trainer: Trainer, values: dict[str, Tensor], bins: int) -> None:
    """Logs a histogram of each tensor's finite values to each TensorBoardLogger and WandbLogger."""
    # On the CPU, since CUDA's histograms are not deterministic.
    arrays = {tag: value.detach().float().cpu().numpy() for tag, value in values.items()}
    finite = {tag: kept for tag, array in arrays.items() if (kept := array[np.isfinite(array)]).size}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for tag, array in finite.items():
                logger.experiment.add_histogram(tag, array, trainer.global_step, bins)
        elif isinstance(logger, WandbLogger):
            histograms: Any = {tag: wandb.Histogram(array, num_bins=bins) for tag, array in finite.items()}
            logger.log_metrics(histograms, trainer.global_step)


def log_figure(trainer: Trainer, tag: str, figure: Figure) -> None:
    """Logs a Matplotlib figure, drawn once, as an image to each TensorBoardLogger and WandbLogger."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    log_image(trainer, tag, np.asarray(canvas.buffer_rgba())[..., :3])


def log_images(trainer: Trainer, tag: str, images: Tensor, columns: int) -> None:
    """Logs images [N, 1 or 3, H, W] in [0, 1] as one, row by row."""
    grid = make_grid(images.cpu().float(), columns).permute(1, 2, 0)
    log_image(trainer, tag, (255 * grid).byte().numpy())


def log_image(trainer: Trainer, tag: str, image: np.ndarray) -> None:
    """Logs an image, uint8 [H, W, 3], to each TensorBoardLogger and WandbLogger."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, image, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [image], trainer.global_step)


def log_text(trainer: Trainer, tag: str, text: str) -> None:
    """Logs a text, with its line breaks, to each TensorBoardLogger and WandbLogger."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, f"```\n{text}\n```", trainer.global_step)  # Markdown
        elif isinstance(logger, WandbLogger):
            logger.log_text(tag, ["text"], [[text]], step=trainer.global_step)


def start_wandb(logger: WandbLogger) -> None:
    """Starts a W&B run: online with an API key; offline without one, or if W&B fails. WANDB_MODE overrides both."""
    Path(logger.save_dir or ".").mkdir(parents=True, exist_ok=True)  # W&B would use a temporary folder instead
    try:
        wandb.setup(wandb.Settings(silent=True, init_timeout=5, finish_timeout=10))  # seconds
        if not wandb.login(prompt=False, verify=False) and "WANDB_MODE" not in os.environ:
            wandb.setup(wandb.Settings(mode="offline"))
        run = logger.experiment
        if not run.offline and run.url:
            print(f"W&B: {run.url}")
    except wandb.Error as error:
        print(f"W&B: {str(error).partition(chr(10))[0]}; the run is logged offline", file=sys.stderr)
        wandb.setup(wandb.Settings(mode="offline"))  # logger.experiment starts the run when it is next used
    except ValueError as error:
        raise UserError(f"WANDB_MODE={os.environ.get('WANDB_MODE')} is not one of W&B's modes") from error


def finish_wandb(status: int, keep: bool) -> None:
    """Finishes the W&B run, if there is one. An offline run is kept for `wandb sync`, or its folder is removed."""
    if not (run := wandb.run):
        return
    folder = os.path.relpath(run.settings.sync_dir)
    run.finish(exit_code=status)
    wandb.teardown()  # so that the next run in this process starts with its own settings
    if run.offline and keep:
        print(f"W&B: view the run with `wandb leet {folder}`, upload it with `wandb sync {folder}`")
    elif run.offline:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(Path(folder).parent.glob("*run-*/")):
            shutil.rmtree(Path(folder).parent)  # W&B's debug logs
