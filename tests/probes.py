"""Callbacks that watch a run, or make something happen to it at a certain moment."""

import os
import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn


class Dropping(nn.Sequential):
    """A net that draws random numbers in training."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(nn.Flatten(), nn.Dropout(p), nn.Linear(784, 10))


class Record(Callback):
    """Keeps the batches as the model gets them, by stage and epoch."""

    def __init__(self) -> None:
        self.batches: dict[tuple[str, int], list] = {}

    def keep(self, stage: str, trainer: Trainer, batch: Any) -> None:
        self.batches.setdefault((stage, trainer.current_epoch), []).append([tensor.clone() for tensor in batch])

    def on_train_batch_start(self, trainer: Trainer, _: Any, batch: Any, *__: Any) -> None:
        self.keep("train", trainer, batch)

    def on_validation_batch_start(self, trainer: Trainer, _: Any, batch: Any, *__: Any) -> None:
        if trainer.state.fn == "fit":
            self.keep("val", trainer, batch)

    def on_test_batch_start(self, trainer: Trainer, _: Any, batch: Any, *__: Any) -> None:
        self.keep("test", trainer, batch)


class SignalAt(Callback):
    """Sends signals to its own process.

    Args:
        hook: The moment: a method of Callback.
        call: How many times it comes before; counted from 0.
        number: Of the signal.
        times: How often it is sent.
    """

    def __init__(self, hook: str, call: int = 0, number: int = 15, times: int = 1) -> None:
        def send(*_: Any, **__: Any) -> None:
            nonlocal call
            call -= 1
            for _ in range(times if call == -1 else 0):
                os.kill(os.getpid(), number)

        setattr(self, hook, send)


class WaitWhile(Callback):
    """Waits in each run's second step while a file exists.

    Args:
        path: Of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        while trainer.global_step == 1 and os.path.exists(self.path):
            time.sleep(0.05)


class FillDisk(Callback):
    """Fills the disk of the working directory.

    Args:
        hook: The moment, as above.
        call: Likewise.
    """

    def __init__(self, hook: str, call: int = 0) -> None:
        def fill(*_: Any, **__: Any) -> None:
            nonlocal call
            call -= 1
            if call == -1:
                fill_disk()

        setattr(self, hook, fill)


def fill_disk() -> None:
    """Writes a file until there is no space."""
    with open("ballast", "ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
