"""Files that are there whole or not at all."""

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


@contextmanager
def write_atomically(path: str | os.PathLike, binary: bool = False) -> Iterator[IO[Any]]:
    """Opens a temporary file beside path, which takes path's place if the block ends well.

    Args:
        path: File to write; its folder is made if it isn't there.
        binary: Whether bytes are written, or else text.

    Yields:
        The open file. Text is UTF-8, newlines as written; file names that are not UTF-8 keep their bytes.

    Raises:
        OSError: If it can't be written; names path.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text: dict[str, Any] = {} if binary else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb" if binary else "w", **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A full disk has no name, and the temporary file no meaning.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_writable(folder: Path) -> None:
    """Sees to it that a file can be written into a folder, there or yet to be made.

    Raises:
        OSError: If it can't be; names the folder.
    """
    there = next(some for some in (folder.absolute(), *folder.absolute().parents) if some.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        error.filename = str(folder)
        raise


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writes a checkpoint elsewhere and copies it over an older one, which a full disk cuts off."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves a checkpoint beside its place; what is not on this machine's disks, as Lightning does."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        content = io.BytesIO()  # torch's own writer tells of a full disk as of a fault in torch
        torch.save(checkpoint, content)
        with write_atomically(path, binary=True) as file:
            file.write(content.getbuffer())


def remove(path: Path) -> None:
    """Removes a file, or a folder with what is in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_if_empty(folder: Path) -> None:
    """Removes a folder in which there is nothing."""
    with suppress(OSError):
        folder.rmdir()


class Patient(io.FileIO):
    """A stream that goes on when nobody reads it any more."""

    def write(self, data: Any, /) -> int:
        """Writes, or from now on to nowhere."""
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def keep_streams() -> None:
    """Sees to it that a run goes on where its output is closed, or its reader ends first, as `| head` does."""
    while (hole := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(hole, True)  # or else the next file to be opened would be standard output
    os.close(hole)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        raw = io.BufferedWriter(Patient(number, "w", closefd=False))
        encoding, errors = (old.encoding, old.errors) if old else ("utf-8", "backslashreplace")
        setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=True))
