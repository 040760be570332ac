"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[IO[str]]:
    """Opens a temporary file beside path, which takes path's place if the block ends well.

    Args:
        path: Text file to write; its folder is made if it isn't there.

    Yields:
        The open file, UTF-8, newlines as written; file names that are not UTF-8 keep their bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Removes a folder in which there is nothing."""
    if not any(folder.iterdir()):
        folder.rmdir()
