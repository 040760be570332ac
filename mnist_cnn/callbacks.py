"""What is logged beyond scalars, to TensorBoard and W&B alike, and what predict writes."""

import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from mnist_cnn.files import check_writable, write_atomically
from mnist_cnn.loggers import log_figure, log_histograms


class ModelGraph(Callback):
    """Logs the graph of the net to TensorBoard, traced with the first image of the first training batch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks for writers."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self._loggers = loggers if trainer.is_global_zero else []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Traces at the first step only."""
        while self._loggers:
            try:
                self._loggers.pop().experiment.add_graph(getattr(pl_module, "net", pl_module), batch[0][:1])
            except Exception as error:  # whatever a net does that can't be traced, it can be trained
                print(f"no graph in TensorBoard: {str(error).strip().splitlines()[0]}", file=sys.stderr)


class Histograms(Callback):
    """Logs histograms of all parameters, gradients and layers' outputs at every n-th step.

    All are those of the step itself: outputs from its forward pass, gradients from its backward pass, parameters as
    both used them. There is no extra pass. The names are param/..., grad/... and act/... with the module's path.

    Args:
        every_n_steps: Optimizer steps from one set of histograms to the next; the first is at step 0.
        bins: Number of bins, of equal width from the least to the greatest value; at most 512, W&B's limit.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, every_n_steps: int = 250, bins: int = 64) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if not 1 <= bins <= 512:
            raise ValueError(f"bins must be between 1 and 512, got {bins}")
        self.every_n_steps = every_n_steps
        self.bins = bins
        self._outputs: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hooks the layers at a step that will be logged."""
        self._unhook()  # where gradients are accumulated, the last batch of the step counts
        if trainer.global_step % self.every_n_steps == 0 and trainer.loggers and trainer.is_global_zero:
            for name, module in pl_module.named_modules():
                if not any(module.children()):
                    self._hooks.append(module.register_forward_hook(self._keep_output(name)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Logs what the step has seen, before the parameters change."""
        if not self._hooks:
            return
        values = {f"act/{name}": output for name, output in self._outputs.items()}
        for name, parameter in pl_module.named_parameters():
            values[f"param/{name}"] = parameter
            if parameter.grad is not None:
                values[f"grad/{name}"] = parameter.grad
        log_histograms(trainer, values, self.bins)
        self._unhook()

    def _keep_output(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs[name] = output.detach()

        return hook

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._outputs.clear()


class TestPictures(Callback):
    """Logs two pictures after a test: the confusion matrix, and the images with the greatest loss.

    Where test_step returns logits [N, C], and a batch is images [N, 1, H, W] and targets [N].

    Args:
        num_worst: How many of the worst-classified images are shown.

    Raises:
        ValueError: If it is below 1.
    """

    __test__ = False  # pytest: no test class

    def __init__(self, num_worst: int = 25) -> None:
        if num_worst < 1:
            raise ValueError(f"num_worst must be at least 1, got {num_worst}")
        self.num_worst = num_worst

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what an earlier test left."""
        self._confusion: MulticlassConfusionMatrix | None = None
        self._worst: dict[str, Tensor] = {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the batch and keeps its worst images."""
        if not (isinstance(outputs, Tensor) and outputs.ndim == 2):
            return  # another kind of model has no such pictures
        (images, targets), logits = batch, outputs
        if self._confusion is None:
            self._confusion = MulticlassConfusionMatrix(logits.shape[1], validate_args=False).to(logits.device)
        self._confusion.update(logits, targets)
        probabilities, predicted = logits.softmax(dim=1).max(dim=1)
        loss = F.cross_entropy(logits, targets, reduction="none")
        seen = {"loss": loss, "image": images, "target": targets, "predicted": predicted, "probability": probabilities}
        self._keep_worst(
            {key: torch.cat([self._worst[key], value]) for key, value in seen.items()} if self._worst else seen
        )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws and logs both pictures."""
        if self._confusion is None:
            return
        counts = self._confusion.compute().cpu().numpy()
        if trainer.world_size > 1:
            gathered: Any = pl_module.all_gather(self._worst)
            self._keep_worst({key: value.flatten(0, 1) for key, value in gathered.items()})
        if not trainer.is_global_zero or not trainer.loggers:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        classes = getattr(data, "classes", None) or [str(index) for index in range(len(counts))]
        log_figure(trainer, "test/confusion_matrix", draw_confusion_matrix(counts, classes))
        worst = {
            key: (value.float() if value.is_floating_point() else value).cpu().numpy()
            for key, value in self._worst.items()
        }
        log_figure(trainer, "test/worst_classified", draw_worst(worst, classes))

    def _keep_worst(self, seen: dict[str, Tensor]) -> None:
        worst = seen["loss"].topk(min(self.num_worst, len(seen["loss"]))).indices
        self._worst = {key: value[worst] for key, value in seen.items()}


class EpochProgressBar(TQDMProgressBar):
    """A bar over the steps of an epoch, in a terminal, and a line for each epoch that is over, anywhere.

    Args:
        refresh_rate: Steps from one drawing of the bar to the next.
    """

    def __init__(self, refresh_rate: int = 50) -> None:
        super().__init__(refresh_rate if sys.stdout.isatty() else 0)

    def init_train_tqdm(self) -> tqdm:
        """The bar of an epoch; it goes when training ends."""
        bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def init_validation_tqdm(self) -> tqdm:
        """No second bar for a pass of half a second."""
        return tqdm(disable=True)

    init_test_tqdm = init_validation_tqdm

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics logged with prog_bar=True, without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return dict(metrics)

    def on_train_start(self, *args: Any) -> None:
        """Starts the clock; in the middle of an epoch, if the run was resumed there."""
        super().on_train_start(*args)
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Starts the clock."""
        super().on_train_epoch_start(trainer, *args)
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the epoch's line."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.is_global_zero:
            stages: dict[str, str] = {}  # what is named stage/metric; 80 columns hold no more
            for name, value in trainer.callback_metrics.items():
                stage, _, metric = name.partition("/")
                if metric:
                    stages[stage] = stages.get(stage, stage) + f" {metric} {value:.4f}"
            seconds = time.monotonic() - self._start
            tqdm.write("  ".join([f"epoch {trainer.current_epoch:2}", *stages.values(), f"{seconds:.1f} s"]))


class PredictionWriter(BasePredictionWriter):
    """Writes predictions to a CSV file: file name or index, predicted class, probability of each class.

    Args:
        path: The file. An older one is replaced.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses several processes, each of which would see a part, and a file that can't be written.

        Raises:
            MisconfigurationException: If there are several.
            OSError: If it can't.
        """
        if trainer.world_size > 1:
            raise MisconfigurationException("predictions are written by one process: give --trainer.devices=1")
        check_writable(Path(self.path).parent)

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Writes the file, whole or not at all.

        Raises:
            MisconfigurationException: If files of predict_dir could not be read; the others are written all the same.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        probabilities = torch.cat(list(predictions))
        names = getattr(data, "predict_names", None) or [str(index) for index in range(len(probabilities))]
        unreadable = getattr(data, "unreadable", [])
        with write_atomically(self.path) as file:
            writer = csv.writer(file, lineterminator="\n")
            header = "file" if getattr(data, "predict_dir", None) else "index"
            writer.writerow([header, "predicted", *(f"p{index}" for index in range(probabilities.shape[1]))])
            for name, row in zip(names, probabilities.tolist()):
                writer.writerow([name, int(np.argmax(row)), *(f"{p:.6f}" for p in row)])
        print(f"{len(probabilities)} predictions: {self.path}")
        if unreadable:
            raise MisconfigurationException(f"not predicted, since no readable image: {', '.join(unreadable)}")


def draw_confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draws how often each class was taken for each.

    Args:
        counts: [C, C]; row: target, column: prediction.
        classes: C names.
    """
    figure = Figure(figsize=(7, 6.5), dpi=100)
    longest = max(map(len, classes))
    margin = 0.08 + 0.012 * min(longest, 20)  # a constrained layout would take longer than all the rest
    axes = figure.add_axes((margin, margin, 0.97 - margin, 0.92 - margin))
    errors = counts * (1 - np.eye(len(counts)))  # the colour shows errors; beside the diagonal they would all be pale
    axes.imshow(errors, cmap="Reds", vmax=max(1, 1.5 * errors.max()))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            weight = "bold" if row == column else "normal"
            axes.text(column, row, str(count), ha="center", va="center", weight=weight, fontsize=12)
    size = 12 if longest < 3 else 10
    axes.set_xticks(range(len(classes)), classes, rotation=0 if longest < 3 else 45, fontsize=size)
    axes.set_yticks(range(len(classes)), classes, fontsize=size)
    axes.set_xlabel("predicted", fontsize=12)
    axes.set_ylabel("target", fontsize=12)
    right, total = np.trace(counts), counts.sum()
    title = f"test: {total - right:,} errors among {total:,} images, accuracy {right / total:.4f}"
    greatest = errors.argsort(axis=None, stable=True)[:-4:-1]
    frequent = [np.unravel_index(index, errors.shape) for index in greatest if errors.flat[index]]
    pairs = [f"{classes[row]} → {classes[column]} ({counts[row, column]})" for row, column in frequent]
    axes.set_title(f"{title}\nmost often: {', '.join(pairs)}" if total > right else title, fontsize=12)
    return figure


def draw_worst(worst: dict[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Draws images in a grid, each titled with its target, its prediction and that one's probability.

    Args:
        worst: image [N, 1, H, W]; target, predicted, probability [N].
        classes: C names.
    """
    count, _, height, width = worst["image"].shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = int(np.ceil(count / columns))
    # One picture of all, since axes of their own for each would take longer than the test. A tile has room for a title.
    tile_height, tile_width = round(1.25 * height), round(1.1 * width)
    mosaic = np.full((rows * tile_height, columns * tile_width), np.nan)
    figure = Figure(figsize=(1.5 * columns, 1.7 * rows + 0.4), dpi=100)
    top = 1.7 * rows / (1.7 * rows + 0.4)
    size = 11 if max(map(len, classes)) < 4 else 7
    axes = figure.add_axes((0, 0, 1, top))
    figure.text(
        0.5, (1 + top) / 2, "greatest loss first: target → predicted (its probability)", ha="center", va="center"
    )
    for index in range(count):
        y, x = index // columns * tile_height, index % columns * tile_width
        left = x + (tile_width - width) // 2
        image = worst["image"][index, 0].astype(float)
        low, high = image.min(), image.max()
        mosaic[y + tile_height - height : y + tile_height, left : left + width] = (image - low) / (high - low or 1)
        target, predicted = (classes[worst[key][index]] for key in ("target", "predicted"))
        title = f"{target} → {predicted} ({worst['probability'][index]:.2f})"
        axes.text(x + tile_width / 2, y + tile_height - height - 1, title, ha="center", va="bottom", fontsize=size)
    axes.imshow(mosaic, cmap="gray", aspect="auto")
    axes.axis("off")
    return figure
