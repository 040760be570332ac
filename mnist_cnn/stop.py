"""SIGTERM and Ctrl-C: a step that has begun ends, a checkpoint is written, the run can go on."""

import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class StopBySignal(Checkpoint):
    """Ends training after the step at which a signal comes, with a checkpoint; anything else at once.

    A step is all that belongs to it: an epoch's last one ends with the validation. A second signal ends that at once,
    too. With several processes, which would have to agree on a step, training ends at once as well.

    It is a context, in which signals are taken, and a callback. As Lightning's Checkpoint, it comes behind the others,
    so that a checkpoint has what they note of the step. Lightning's own way with SIGTERM would break off a validation,
    take no notice of Ctrl-C, and end with status 0.
    """

    def __init__(self) -> None:
        self.path: Path | None = None  # the checkpoint; None: there is to be none
        self.received: signal.Signals | None = None
        self._trainer: Trainer | None = None  # while a step ends first
        self._saved = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopBySignal":
        if threading.current_thread() is threading.main_thread():
            # Not where they are ignored (nohup, a shell's background), or another program has its own way with them.
            self._before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) in DEFAULT}
        self._process = os.getpid()
        self._take()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self) -> None:
        for number in self._before:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:
            return  # a worker of a DataLoader, which ends with this process
        first, self.received = self.received is None, signal.Signals(number)
        if not (first and self._trainer):
            raise SystemExit(128 + number)
        os.write(2, b"stopping after this step; once more: at once\n")  # print may be at work already

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes back the signals, which Lightning takes at the beginning of each of these."""
        self._take()

    on_sanity_check_start = on_test_start = on_predict_start = on_validation_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, a step ends first."""
        self._take()
        self._trainer = trainer if self.path and trainer.world_size == 1 else None

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stops in the middle of an epoch, where nothing belongs to the step that is yet to come."""
        if self.received is None:
            return
        done = args[-1] + 1  # batches of this epoch
        validates = trainer.is_last_batch or done % (trainer.val_check_batch or math.inf) == 0
        if not validates and done % trainer.accumulate_grad_batches == 0:
            self._save(trainer)
            raise SystemExit(128 + self.received)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what the epoch ended with; it is yet to be logged."""
        if self.received:
            self._save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops between two epochs."""
        if self.received and self._saved:
            raise SystemExit(128 + self.received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops before the evaluation; what is left to do can end at once."""
        self._trainer = None
        if self.received:
            raise SystemExit(128 + self.received)

    def on_exception(self, *_: Any) -> None:
        """Nothing is left that would end first."""
        self._trainer = None

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(str(self.path))
        self._saved = True
