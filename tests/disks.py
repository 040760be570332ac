"""What the tests of disks share: a small one, which root can mount."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "8m"):
    """A working directory with little space."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    before = os.getcwd()
    os.chdir(disk)
    yield disk
    os.chdir(before)
    subprocess.run(["umount", "-l", disk], check=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
