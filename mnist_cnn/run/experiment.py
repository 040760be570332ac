"""Experiment: the LightningModule that every experiment starts from."""

import copy
import inspect
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, ReduceLROnPlateau

from mnist_cnn.run.errors import UserError

LRSchedulerCallable = Callable[[Optimizer], LRScheduler]  # Lightning's is a union, and has no schema


class Experiment(LightningModule):
    """A LightningModule with an injected optimizer and schedule, reproducible epochs and a check for divergence.

    A subclass defines its net and its steps. `training_step` returns the loss, or a dict of `loss` and other tensors;
    their means over `log_every_n_steps` steps are logged as train/loss and so on.

    Args:
        optimizer: Called with what `parameter_groups` returns.
        lr_scheduler: Called with the optimizer. OneCycleLR, CyclicLR and WarmupCosineLR are stepped after each
            optimizer step, ReduceLROnPlateau after each epoch with a validation, others after each epoch. If its
            `total_steps` is not given, it is the number of optimizer steps that the trainer will make.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None = None) -> None:
        super().__init__()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self._outputs: list[tuple[int, dict[str, Tensor]]] = []  # of the batches not yet logged, each with its step

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies the module, for an average of its weights; not the injected callables, which hold the whole CLI."""
        copied = type(self).__new__(type(self))
        memo |= {id(self): copied, id(self.optimizer): self.optimizer, id(self.lr_scheduler): self.lr_scheduler}
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    @property
    def has_trainer(self) -> bool:
        """Whether there is a trainer; without one, Lightning's property `trainer` raises an error."""
        return self._trainer is not None

    def parameter_groups(self) -> Any:
        """What the optimizer gets: all parameters. A subclass may return groups with options of their own."""
        return self.parameters()

    def configure_optimizers(self) -> Any:
        """The injected optimizer, with the injected schedule if there is one."""
        optimizer = self.optimizer(self.parameter_groups())
        if self.lr_scheduler is None:
            return optimizer
        # jsonargparse binds all arguments as keywords; Python code may leave some to the signature's defaults.
        arguments = {name: p.default for name, p in inspect.signature(self.lr_scheduler).parameters.items()}
        arguments |= getattr(self.lr_scheduler, "keywords", {})
        total_steps: dict[str, int] = {}
        if arguments.get("total_steps", 0) is None and not arguments.get("steps_per_epoch"):
            # Before fit, any number serves to check the settings.
            steps = self.trainer.estimated_stepping_batches if self.has_trainer else 1_000
            if not 1 <= steps < math.inf:
                raise UserError("the schedule needs the number of steps: set trainer.max_epochs or trainer.max_steps")
            total_steps["total_steps"] = int(steps)
        scheduler = self.lr_scheduler(optimizer, **total_steps)
        per_step = "total_steps" in arguments or hasattr(scheduler, "total_steps") or isinstance(scheduler, CyclicLR)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step" if per_step else "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            settings["monitor"] = getattr(scheduler, "monitor", "val/loss")
            settings["frequency"] = 10**9  # on_train_epoch_end steps it; Lightning would after the checkpoint
        return [optimizer], [settings]

    def on_train_start(self) -> None:
        """Checks that the schedule lasts until the end of training."""
        for config in self.trainer.lr_scheduler_configs:
            planned = getattr(config.scheduler, "total_steps", None)  # a checkpoint may have restored it
            if planned and planned < self.trainer.estimated_stepping_batches < math.inf:
                steps = f"the schedule is for {planned} steps, training makes {self.trainer.estimated_stepping_batches}"
                remedy = "resume with the same number of epochs" if self.trainer.ckpt_path else "leave total_steps out"
                raise UserError(f"{steps}: {remedy}")

    def on_train_epoch_start(self) -> None:
        """Seeds dropout and the like by seed, epoch and process, so that a resumed run repeats an epoch exactly."""
        if (seed := os.environ.get("PL_GLOBAL_SEED")) is not None:
            torch.manual_seed((int(seed) * 10_000 + self.current_epoch) * 10_000 + self.global_rank)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps what training_step returned; logs the means when `log_every_n_steps` steps have been made.

        Reading the loss at every step would make a GPU wait; `self.log` would cost as much as a small net's backward.
        """
        trainer: Any = self.trainer
        if outputs and "loss" in outputs:
            self._outputs.append((self.global_step, {name: value.detach() for name, value in outputs.items()}))
        stepped = trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and self.global_step % max(1, trainer.log_every_n_steps) == 0 and self._outputs:
            self.check_losses()
            for name in self._outputs[-1][1]:
                mean = torch.cat([of_batch[name].flatten() for _, of_batch in self._outputs]).float().mean()
                divisor = trainer.accumulate_grad_batches if name == "loss" else 1  # of Lightning's
                self.log(f"train/{name}", mean * divisor)
            self._outputs.clear()

    def on_train_epoch_end(self) -> None:
        """Checks the remaining losses of the epoch, and those of its validation; steps ReduceLROnPlateau."""
        self.check_losses()
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau) and config.monitor in self.trainer.callback_metrics:
                config.scheduler.step(self.trainer.callback_metrics[config.monitor])
        for name, value in self.trainer.callback_metrics.items():
            if name.startswith("val") and name.endswith("loss") and not value.isfinite():
                raise FloatingPointError(f"{name} is {value:.0f} after epoch {self.current_epoch}: training diverged")

    def check_losses(self) -> None:
        """Raises a FloatingPointError if a training loss since the last logged step is not finite."""
        losses = [outputs["loss"] for _, outputs in self._outputs]
        finite = torch.stack(losses).isfinite().tolist() if losses else []  # a GPU is waited for once
        if not all(finite):
            place = f"step {self._outputs[finite.index(False)][0]} (epoch {self.current_epoch})"
            raise FloatingPointError(f"train/loss is not finite at {place}: it diverged; lower the learning rate")
