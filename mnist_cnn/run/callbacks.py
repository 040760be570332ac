"""Callbacks of every experiment: graph, histograms, progress, predict's file, and checks of what is monitored."""

import csv
import io
import re
import sys
import time
from functools import partial
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from tqdm import tqdm

from mnist_cnn.run.errors import UserError
from mnist_cnn.run.files import write_atomically
from mnist_cnn.run.loggers import log_histograms


class ModelGraph(Callback):
    """Logs the graph of the net to TensorBoard, traced with the first item of what it is called with first."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._inputs: tuple[Any, ...] | None = None
        if trainer.current_epoch == batch_idx == 0 and trainer.is_global_zero:
            self._hook = getattr(pl_module, "net", pl_module).register_forward_pre_hook(self._keep_inputs)

    def _keep_inputs(self, net: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inputs = tuple(value[:1] if isinstance(value, Tensor) else value for value in inputs)
        self._hook.remove()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        for logger in trainer.loggers if self._inputs is not None else ():
            if isinstance(logger, TensorBoardLogger):
                try:
                    logger.experiment.add_graph(getattr(pl_module, "net", pl_module), self._inputs)
                except Exception as error:  # a net that cannot be traced can still be trained
                    print(f"no graph in TensorBoard: {error!r:.300}", file=sys.stderr)


class Histograms(Callback):
    """Logs histograms of parameters, gradients and layer outputs of a step, as param/NAME, grad/NAME and act/NAME.

    They need no extra pass: outputs are of the step's forward pass, gradients of its backward pass.

    Args:
        every_n_steps: Optimizer steps between two sets of histograms; the first is at step 0.
        bins: Number of bins of equal width between the lowest and the highest value; at most 512, W&B's limit.
    """

    def __init__(self, every_n_steps: PositiveInt = 250, bins: PositiveInt = 64) -> None:
        self.every_n_steps, self.bins = every_n_steps, bins
        self._outputs: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        is_due = trainer.global_step % self.every_n_steps == 0 and trainer.loggers and trainer.is_global_zero
        if is_due and not self._hooks:  # with accumulated gradients, the last batch of the step counts
            layers = [(name, layer) for name, layer in pl_module.named_modules() if not list(layer.children())]
            self._hooks = [layer.register_forward_hook(partial(self._keep_output, name)) for name, layer in layers]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Logs the step's values before the parameters change."""
        if self._hooks:
            values = self._outputs | {f"param/{name}": p for name, p in pl_module.named_parameters()}
            values |= {f"grad/{name}": p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            log_histograms(trainer, values, self.bins)
            for hook in self._hooks:
                hook.remove()
            self._hooks, self._outputs = [], {}

    def _keep_output(self, name: str, module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not isinstance(module, nn.Flatten):
            self._outputs[f"act/{name}"] = output.detach().clone()  # the next layer may work in place


class EpochProgressBar(callbacks.TQDMProgressBar):
    """A bar over the steps of training, in a terminal only, and a line for each finished epoch."""

    def __init__(self, refresh_rate: int = 50) -> None:
        super().__init__(refresh_rate if sys.stdout.isatty() else 0)

    def init_validation_tqdm(self) -> tqdm:
        return tqdm(disable=True)  # it takes half a second

    init_sanity_tqdm = init_test_tqdm = init_validation_tqdm

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.is_global_zero:
            logged, seconds = trainer.callback_metrics.items(), f"{time.monotonic() - self._start:.1f} s"
            metrics = [f"{name} {value:.4f}" for name, value in logged if not name.startswith("lr-")]
            tqdm.write("  ".join([f"epoch {trainer.current_epoch:2}", *metrics, seconds]))


class PredictionWriter(callbacks.BasePredictionWriter):
    """Writes predicted probabilities to a CSV file: file name or index, predicted class, a column for each class.

    A subclass writes another file by a `content` of its own.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        super().__init__("epoch")
        self.path = path

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise UserError("predictions are written by one process: give --trainer.devices=1")

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        predicted = torch.cat(predictions).cpu()
        content = self.content(predicted, getattr(trainer.datamodule, "predict_names", None))
        try:
            with write_atomically(self.path) as file:
                file.buffer.write(content)
        except OSError as error:
            raise UserError(f"{self.path} is not writable: {error.strerror}") from error
        print(f"{len(predicted)} predictions: {self.path}")
        if unreadable := getattr(trainer.datamodule, "unreadable", []):
            raise UserError(f"not predicted, because they are not readable images: {', '.join(unreadable)}")

    def content(self, predicted: Tensor, names: list[str] | None) -> bytes:
        """The file of predictions [N, ...], which belong to the files with these names, or to the test set."""
        if predicted.ndim != 2 or predicted.shape[1] < 2:
            raise UserError("predict_step must return probabilities [N, C]; for other outputs give --predictions=null")
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        classes = (f"p{index}" for index in range(predicted.shape[1]))
        writer.writerow(["file" if names else "index", "predicted", *classes])
        for name, row in zip(names or range(len(predicted)), predicted):
            writer.writerow([name, int(row.argmax()), *(f"{p:.6f}" for p in row.tolist())])
        return file.getvalue().encode(errors="surrogateescape")  # file names may be any bytes


class MonitoredMetrics(Callback):
    """Checks before the first step that validation logs what is monitored; clears old metrics at each epoch's start."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if logged := list(trainer.callback_metrics):
            self.check(trainer, logged)

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if not trainer.enable_validation or (trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)):
            self.check(trainer, [])  # there is no validation; it is not just unknown yet

    def check(self, trainer: Any, logged: list[str]) -> None:
        """Raises a UserError if a metric of validation that is in use is not one that it logs."""
        used = [("early_stopping.monitor", callback.monitor) for callback in trainer.early_stopping_callbacks]
        for callback in trainer.checkpoint_callbacks:
            used.append(("checkpoint.monitor", getattr(callback, "monitor", None)))
            name = getattr(callback, "filename", None) or ""
            used += [("checkpoint.filename", field) for field in re.findall(r"{([^:}]+)", name)]
        used += [("model.lr_scheduler.monitor", s.monitor) for s in trainer.lr_scheduler_configs if s.reduce_on_plateau]
        unknown = {key: metric for key, metric in used if re.match("val[/_i]", str(metric)) and metric not in logged}
        if unknown:
            metrics = ", ".join(dict.fromkeys(unknown.values()))
            options = " ".join(f"--{name}=null" for name in dict.fromkeys(key.rpartition(".")[0] for key in unknown))
            if not logged:
                needed = "validation batches, a val_dataloader and a validation_step"
                raise UserError(f"there is no validation, and no {metrics}: it needs {needed}, or give {options}")
            change = f"change {', '.join(unknown)}, or give {options}"
            raise UserError(f"validation logs {', '.join(logged)}, not {metrics}: {change}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.callback_metrics.clear()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Lets an epoch that max_steps cuts short end with a validation."""
        trainer.should_stop |= 0 < trainer.max_steps <= trainer.global_step


def check_callbacks(given: list[Callback], named: dict[str, Callback]) -> None:
    """Checks `trainer.callbacks` beside the named ones; a checkpoint cannot tell two with one state_key apart."""
    names = {callback.state_key: name for name, callback in named.items()}
    for callback in given:
        kind, name = type(callback).__name__, names.get(callback.state_key)
        if isinstance(callback, callbacks.BatchSizeFinder | callbacks.LearningRateFinder):
            raise UserError(f"{kind} changes a setting that config.yaml would not have: write what it finds into YAML")
        if name and isinstance(callback, callbacks.ModelCheckpoint | callbacks.EarlyStopping):
            raise UserError(f"trainer.callbacks has {kind} like {name}: change --{name}.*, or give --{name}=null")
