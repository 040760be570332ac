"""SIGTERM and Ctrl-C: a step that has begun ends, a checkpoint is written, the run can go on."""

import contextlib
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class StopBySignal(Checkpoint):
    """Ends training after the step at which a signal comes, with a checkpoint; an evaluation after its batch.

    A step is all that belongs to it: an epoch's last one ends with the validation. A second signal ends that at once;
    what is no step or batch ends at once, too. With several processes, which would have to agree on a step, there is no
    new checkpoint: the first one ends after its step, and takes the others with it.

    It is a context, in which signals are taken, and a callback. As Lightning's Checkpoint, it comes behind the others,
    so that a checkpoint has what they note of the step. Lightning's own way with SIGTERM would break off a validation,
    take no notice of Ctrl-C, and end with status 0. An exception at once is kept to where little happens: between the
    lines of a queue, as TensorBoard's, it would leave a sleeper for whom the process waits at its end.
    """

    def __init__(self) -> None:
        self.path: Path | None = None  # the checkpoint; None: there is to be none
        self.received: signal.Signals | None = None
        self._trainer: Trainer | None = None  # while a step or batch ends first
        self._saved = False
        self._closing = False
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
        if hasattr(signal, "SIGCHLD"):  # a DataLoader's workers may end by the signal, too: torch would raise anywhere
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._closing and not first:
            os._exit(128 + number)
        if not (first and (self._trainer or self._closing)):
            raise SystemExit(128 + number)
        if self._closing or self._trainer.is_global_zero:  # type: ignore[union-attr]
            what = b"stopping after this step" if self._trainer else b"closing files"
            with contextlib.suppress(OSError):  # nobody reads it
                os.write(2, what + b"; once more: at once\n")  # no print, which may be at work already

    def close(self) -> None:
        """From here on, nothing is left but to close files: a first signal is waited out, a second ends it at once."""
        self._trainer, self._closing = None, True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes back the signals, which Lightning takes at the beginning of each of these; a step ends first."""
        self._take()
        self._trainer = trainer

    on_validation_start = on_test_start = on_train_start

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes back the signals, too; but nothing has begun that should end first."""
        self._take()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stops in the middle of an epoch, where nothing belongs to the step that is yet to come."""
        if self.received is None:
            return
        done = args[-1] + 1  # batches of this epoch
        validates = trainer.is_last_batch or done % (trainer.val_check_batch or math.inf) == 0
        if not self._saves(trainer) or (not validates and done % trainer.accumulate_grad_batches == 0):
            self._save(trainer)
            self._end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what the epoch ended with; it is yet to be logged."""
        if self.received:
            self._save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops between two epochs."""
        if self._saved:
            self._end(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stops a validation that belongs to no step."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._end(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stops a test."""
        self._end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops before what comes next, all of which can end at once."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.validating:
            self._trainer = None
            self._end(trainer)

    on_validation_end = on_test_end = on_train_end

    def on_exception(self, *_: Any) -> None:
        """Nothing is left that would end first."""
        self._trainer = None

    def _saves(self, trainer: Trainer) -> bool:
        return self.path is not None and trainer.world_size == 1

    def _save(self, trainer: Trainer) -> None:
        if self._saves(trainer):
            trainer.save_checkpoint(str(self.path))
            self._saved = True

    def _end(self, trainer: Trainer) -> None:
        if self.received and trainer.is_global_zero:
            raise SystemExit(128 + self.received)
