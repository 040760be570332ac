"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[TextIO]:
    """Opens a temporary file beside `path`, in UTF-8, which replaces `path` if the block raises no exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:  # file names may be any bytes
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step; Lightning overwrites it, so that a full disk or a kill leaves half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):  # not a local file
            return super().save_checkpoint(checkpoint, path, storage_options)
        with write_atomically(path) as file:
            torch.save(checkpoint, file.buffer)
