"""LitClassifier: loss, accuracy, optimizer and schedule around any net that maps images to logits."""

import inspect
import math
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]  # images [N, 1, H, W], float; targets [N], int64


class LitClassifier(LightningModule):
    """Trains a net with cross-entropy; logs loss (nats) and accuracy (a fraction) of train, val and test.

    train/loss is that of the images as they were augmented, with the label smoothing; val/loss and test/loss are plain.

    Args:
        net: Maps images [N, 1, H, W] to logits [N, num_classes].
        optimizer: Called with the parameters of the net.
        lr_scheduler: Called with the optimizer, and stepped as it is meant: OneCycleLR, CyclicLR and WarmupCosineLR at
            each step, ReduceLROnPlateau with val/loss, the others once an epoch. A total_steps that is not given is the
            number of steps that the trainer will make.
        num_classes: Number of classes.
        label_smoothing: The share of each target that is spread over all classes, in training only (Szegedy et al.,
            Rethinking the Inception Architecture, 2016); from 0 to 1.
        channels_last: Whether convolutions keep the channels of a pixel side by side in memory: the same mathematics,
            other last digits, on many a CPU and GPU faster.

    Raises:
        ValueError: If a setting is out of range, or the optimizer refuses its own (a negative learning rate, say).
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        # The YAML's settings go into the checkpoint, so that load_from_checkpoint needs the file alone. Objects, which
        # is what Python code gives, don't: weights_only loading refuses them. Nothing goes to the loggers: the CLI
        # gives them the whole config, once.
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters(logger=False)
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.label_smoothing = label_smoothing
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.total_steps: float | None = None  # if the schedule got it from the trainer
        self._since_log: list[tuple[int, Tensor, Tensor, Tensor]] = []  # step, loss, logits, targets of each batch
        self.val_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.configure_optimizers()  # thrown away: a wrong setting fails here, before anything is written

    def __setattr__(self, name: str, value: Any) -> None:
        """As ever, but without torch's search for parameters where Lightning notes its hook, 30 times a step."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 1, H, W]."""
        return self.net(images)

    def on_train_start(self) -> None:
        """Refuses a schedule that a checkpoint brings along for another number of steps, and one that would run out.

        Raises:
            MisconfigurationException: If it is such a one.
        """
        for config in self.trainer.lr_scheduler_configs:
            steps: Any = getattr(config.scheduler, "total_steps", self.total_steps)
            if self.total_steps and steps != self.total_steps:
                raise MisconfigurationException(
                    f"the checkpoint's schedule is for {steps} steps, not {self.total_steps}: a resumed run keeps that"
                )
            if not isinstance(config.scheduler, OneCycleLR):
                continue
            # Where gradients are accumulated over a changing number of batches, the trainer can't know the steps.
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            known = not any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
            if known and steps < (needed := self.trainer.estimated_stepping_batches) < math.inf:
                raise MisconfigurationException(
                    f"the schedule is for {steps} steps, training makes {needed}: where it is not told their number, it"
                    " comes from the trainer"
                )

    def on_train_epoch_start(self) -> None:
        """Makes dropout and the like depend on seed, epoch and process alone, so that a resumed run can repeat it."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is not None:
            torch.manual_seed((int(seed) * 10_000 + self.current_epoch) * 10_000 + self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch, in nats; what is logged are means since the last logging.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        images, targets = batch
        logits = self(images)
        loss = self._loss(logits, targets, "train")
        # Only where the trainer passes it on: self.log at every step costs as much as the step's backward pass.
        if interval := self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            if self._since_log and self._since_log[0][0] // interval != self.global_step // interval:
                self._since_log.clear()
            self._since_log.append((self.global_step, loss.detach(), logits.detach(), targets))
            if (self.global_step + 1) % interval == 0:
                _, losses, all_logits, all_targets = zip(*self._since_log)
                accuracy = (torch.cat(all_logits).argmax(dim=1) == torch.cat(all_targets)).float().mean()
                self.log_dict({"train/loss": torch.stack(losses).mean(), "train/acc": accuracy})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to val/loss and val/acc."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Adds the batch to test/loss and test/acc; returns its logits [N, num_classes] for the callbacks."""
        return self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, targets = batch
        logits = self(images)
        accuracy.update(logits, targets)
        # Lightning weights the mean by batch_size, over the processes too.
        self.log(f"{stage}/loss", self._loss(logits, targets, stage), batch_size=len(targets), sync_dist=True)
        self.log(f"{stage}/acc", accuracy, batch_size=len(targets), prog_bar=True)
        return logits

    def _loss(self, logits: Tensor, targets: Tensor, stage: str) -> Tensor:
        smoothing = self.label_smoothing if stage == "train" else 0.0
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if not math.isfinite(value := loss.item()):  # faster than loss.isfinite()
            raise FloatingPointError(
                f"{stage}/loss became {value} at step {self.global_step} (epoch {self.current_epoch}): training"
                " diverged; a lower learning rate may help"
            )
        return loss

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Probabilities [N, num_classes] of a batch whose first item is images [N, 1, H, W]."""
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self) -> Any:
        """The injected optimizer, with the injected schedule if there is one.

        Raises:
            MisconfigurationException: If the schedule needs the number of steps, and training has no end.
        """
        optimizer = self.optimizer(self.net.parameters())
        if self.lr_scheduler is None:
            return optimizer
        # jsonargparse's callables hold all settings as keywords, those of Python code may leave some out.
        given = getattr(self.lr_scheduler, "keywords", {})
        settings = {key: p.default for key, p in inspect.signature(self.lr_scheduler).parameters.items()} | given
        counts = "total_steps" in settings
        if counts and settings["total_steps"] is None and settings.get("steps_per_epoch") is None:
            self.total_steps = self.trainer.estimated_stepping_batches if self._trainer else 1_000
            if not 1 <= self.total_steps < math.inf:
                raise MisconfigurationException("the schedule needs the number of steps: set max_epochs or max_steps")
            scheduler = self.lr_scheduler(optimizer, total_steps=int(self.total_steps))  # type: ignore[call-arg]
        else:
            scheduler = self.lr_scheduler(optimizer)
        # Only ReduceLROnPlateau reads a metric; Lightning's version of it says which.
        monitor = getattr(scheduler, "monitor", "val/loss")
        counts = counts or hasattr(scheduler, "total_steps")  # Python code may hide it in a function
        interval = "step" if counts or isinstance(scheduler, CyclicLR) else "epoch"
        return [optimizer], [{"scheduler": scheduler, "monitor": monitor, "interval": interval}]
