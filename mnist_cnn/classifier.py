"""LitClassifier: cross-entropy and accuracy around any net that maps images to logits."""

import torch
from jsonargparse.typing import ClosedUnitInterval
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_cnn.run.experiment import Experiment, LRSchedulerCallable

Batch = tuple[Tensor, Tensor]  # images [N, 1, H, W], float; targets [N], int64


class LitClassifier(Experiment):
    """Trains a net with cross-entropy; logs loss (nats) and accuracy (a fraction) of train, val and test.

    train/loss is computed on augmented images with label smoothing; val/loss and test/loss are not.

    Args:
        net: Maps images [N, 1, H, W] to logits [N, C].
        optimizer: Called with the parameters of the net.
        lr_scheduler: Called with the optimizer; see `Experiment`.
        label_smoothing: Share of each target that is spread over all classes, in training only (Szegedy et al.,
            Rethinking the Inception Architecture, 2016); from 0 to 1.
        channels_last: Stores a pixel's channels side by side: faster convolutions on many CPUs and GPUs; results
            differ in the last digits. Lazy layers need False.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: ClosedUnitInterval = 0.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C] of images [N, 1, H, W]."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Mean cross-entropy of the batch, in nats, and whether each prediction is right: bool [N]."""
        images, targets = batch
        logits = self(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return {"loss": loss, "acc": logits.argmax(dim=1) == targets}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Adds the batch to test/loss and test/acc; returns its logits [N, C] for the callbacks."""
        return self.evaluate(batch, "test")

    def evaluate(self, batch: Batch, stage: str) -> Tensor:
        """Logs loss and accuracy, which Lightning averages over batches and processes; returns logits [N, C]."""
        images, targets = batch
        logits = self(images)
        accuracy = (logits.argmax(dim=1) == targets).float().mean()
        self.log(f"{stage}/loss", F.cross_entropy(logits, targets), batch_size=len(targets), sync_dist=True)
        self.log(f"{stage}/acc", accuracy, batch_size=len(targets), sync_dist=True, prog_bar=True)
        return logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities [N, C] of the images."""
        return self(batch[0]).softmax(dim=1)
