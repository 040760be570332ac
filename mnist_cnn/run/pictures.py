"""Pictures of a classifier's test: its confusion matrix, and the images with the highest loss."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.utils import make_grid

from mnist_cnn.run.loggers import log_figure


class TestPictures(Callback):
    """Logs two pictures after a test: the confusion matrix, and the images with the highest loss.

    It needs a test_step that returns logits [N, C], and batches of inputs and targets [N]; the second picture needs
    inputs that are images [N, 1 or 3, H, W].

    Args:
        num_worst: Number of images with the highest loss.
    """

    def __init__(self, num_worst: PositiveInt = 25) -> None:
        self.num_worst = num_worst

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._confusion: MulticlassConfusionMatrix | None = None
        self._worst: dict[str, Tensor] = {}

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        match outputs, batch:
            case Tensor(ndim=2) as logits, (images, Tensor(ndim=1, dtype=torch.int64) as targets):
                pass
            case _:
                return  # not a classifier
        if self._confusion is None:
            self._confusion = MulticlassConfusionMatrix(logits.shape[1], validate_args=False).to(logits.device)
        self._confusion.update(logits, targets)
        if not (isinstance(images, Tensor) and images.ndim == 4):
            return
        probability, predicted = logits.softmax(dim=1).max(dim=1)
        loss = F.cross_entropy(logits, targets, reduction="none")
        seen = {"loss": loss, "image": images, "target": targets, "predicted": predicted, "probability": probability}
        self._keep_worst({key: torch.cat([self._worst[key], seen[key]]) for key in seen} if self._worst else seen)

    def on_test_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if self._confusion is None or not trainer.loggers:
            return
        counts = self._confusion.compute()  # gathers those of all processes
        if trainer.world_size > 1 and self._worst:
            gathered: Any = pl_module.all_gather(self._worst)
            self._keep_worst({key: value.flatten(0, 1) for key, value in gathered.items()})
        right, total = int(counts.trace()), int(counts.sum())
        classes = getattr(trainer.datamodule, "classes", None) or [str(index) for index in range(len(counts))]
        figure = Figure((8, 8), dpi=80)
        axes = figure.add_axes((0.12, 0.12, 0.85, 0.82))
        axes.set_title(f"test: {total - right:,} errors among {total:,} images, accuracy {right / total:.4f}")
        self._confusion.plot(counts.cpu(), axes, labels=classes, cmap="Reds")
        log_figure(trainer, "test/confusion_matrix", figure)
        if self._worst:
            log_figure(trainer, "test/worst_classified", draw_worst(self._worst, classes))

    def _keep_worst(self, seen: dict[str, Tensor]) -> None:
        worst = seen["loss"].topk(min(self.num_worst, len(seen["loss"]))).indices
        self._worst = {key: value[worst] for key, value in seen.items()}


def draw_worst(worst: dict[str, Tensor], classes: Sequence[str]) -> Figure:
    """Draws the images [N, 1 or 3, H, W] in a grid, each with its target, its prediction and that one's probability."""
    images, gap = worst["image"].cpu().float(), 9  # pixels between two images, where the text goes
    columns = math.ceil(math.sqrt(len(images)))
    grid = make_grid(images, columns, padding=gap, normalize=True, scale_each=True, pad_value=1)
    figure = Figure((1.6 * columns, 1.6 * math.ceil(len(images) / columns)), dpi=80)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid.permute(1, 2, 0))
    axes.axis("off")
    height, width = images.shape[2:]
    labels = zip(*(worst[key].tolist() for key in ("target", "predicted", "probability")))
    for index, (target, predicted, probability) in enumerate(labels):
        row, column = divmod(index, columns)
        text = f"{classes[target]} → {classes[predicted]} ({probability:.2f})"
        place = (gap + column * (width + gap) + width / 2, (row + 1) * gap + row * height - 2)
        axes.text(*place, text, ha="center", va="bottom", fontsize=10 if max(map(len, classes)) < 4 else 6)
    return figure
