"""SIGTERM and Ctrl-C: the current step ends, a checkpoint is written, the run can be resumed."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mnist_cnn.run.folder import keep_best_checkpoints, reopen_cut_epoch


class StopBySignal(Checkpoint):
    """On the first signal, training stops after the current step; on a second one, or outside training, at once.

    A validation or end of the epoch that is due after that step is completed. Lightning runs Checkpoint callbacks last,
    so this checkpoint has the other callbacks' state. Several processes would have to agree on a step, so they stop
    without a new checkpoint. As a context manager, it installs the signal handlers.
    """

    path: Path | None = None  # of the checkpoint; None: write none
    received: signal.Signals | None = None
    trained = False  # whether this process has made a step
    _in_training = False
    _random_state: dict[str, torch.Tensor] | None = None

    def __enter__(self) -> "StopBySignal":
        self._process = os.getpid()
        # A signal that is ignored, as by nohup, stays ignored.
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:
            return  # a DataLoader's worker, which ends with this process
        first, self.received = self.received is None, signal.Signals(number)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an exception if Ctrl-C ends a worker, too
        if not (first and self._in_training):
            raise SystemExit(128 + number)
        os.write(2, b"\n" * os.isatty(2) + b"stopping after this step; press Ctrl-C again to quit now\n")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in self._before:
            signal.signal(number, self._receive)  # instead of Lightning's
        self._in_training = True
        if trainer.fit_loop.restarted_mid_epoch:  # Lightning omits this hook, in which callbacks set up an epoch
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_train_epoch_start(trainer, pl_module)
        if self._random_state and trainer.world_size == 1:
            torch.set_rng_state(self._random_state["cpu"].cpu())
            if "cuda" in self._random_state and torch.cuda.is_available():
                torch.cuda.set_rng_state(self._random_state["cuda"].cpu())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stops within an epoch, where no validation is due, not even a last one, and no gradients are left over."""
        self.trained = True
        done = args[-1] + 1  # batches of this epoch
        validates = trainer.is_last_batch or trainer.should_stop or done % (trainer.val_check_batch or math.inf) == 0
        if self.received and not validates and done % trainer.accumulate_grad_batches == 0:
            self.on_train_epoch_end(trainer)
            self._exit()

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves the state; training goes on until the epoch's metrics are logged."""
        if self.received and self.path is not None and trainer.world_size == 1:
            trainer.save_checkpoint(str(self.path))

    def on_train_end(self, *_: Any) -> None:
        self._in_training = False
        self._exit()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adapts the checkpoint to this run; an evaluation needs its weights only."""
        if not trainer.training or trainer.fast_dev_run:  # type: ignore[attr-defined]
            checkpoint["callbacks"] = {}
            pl_module.load_state_dict(checkpoint["state_dict"])  # WeightAveraging has loaded other weights
            return
        keep_best_checkpoints(trainer, checkpoint)
        reopen_cut_epoch(checkpoint)
        self._random_state = checkpoint["callbacks"].get(self.state_key)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state of the random numbers, with which dropout continues in the middle of an epoch."""
        cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
        return {"cpu": torch.get_rng_state(), **cuda}

    def _exit(self, *_: Any) -> None:
        if self.received:
            raise SystemExit(128 + self.received)

    on_train_epoch_start = _exit  # type: ignore[assignment]
