"""Folders that can't be written: fit and sweep say so in one line, before any work."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import FIT, QUIET, error_of, main
from disks import small_disk
from sweeps import LOSS, grid, rows, settings

import sweep


@pytest.fixture
def disk(folder):
    with small_disk(folder, "64m") as disk:
        yield disk


@pytest.fixture
def read_only(disk):
    """Makes a folder of the disk one that can't be written."""
    bound = []

    def make(folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        bound.append(folder)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)

    yield make
    for folder in bound:
        subprocess.run(["umount", "-l", disk / folder], check=True)


def content(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("where", "loggers"),
    [
        ("logs", []),
        ("logs", QUIET),
        ("logs/mnist", []),
        ("logs/wandb", []),
        ("logs", ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]),
        ("elsewhere", ["--checkpoint.dirpath=elsewhere/checkpoints"]),
    ],
    ids=[
        "logs",
        "logs without loggers",
        "the runs' folder",
        "W&B's folder",
        "another logger's",
        "checkpoints elsewhere",
    ],
)
def test_fit_says_so_before_any_work(read_only, disk, capfd, where, loggers):
    read_only(where)
    before = content(disk)
    line = error_of(capfd, *FIT, "--num_threads=1", *loggers, "--evaluate_best=false")
    assert "can't be written: Read-only file system" in line and where in line
    assert content(disk).keys() == before.keys()


def test_no_permission_is_told_with_how_to_go_on(folder, capfd, monkeypatch):
    """Root, as which the tests may run, has all; so Linux's answer is given here."""
    monkeypatch.syspath_prepend(folder)
    Path("denied.py").write_text(
        "from lightning import Callback\n\n\nclass Denied(Callback):\n"
        "    def on_train_epoch_end(self, trainer, module):\n"
        "        if trainer.current_epoch:\n"
        "            raise PermissionError(13, 'Permission denied', 'some/file')\n"
    )
    line = error_of(capfd, *FIT, "--num_threads=1", *QUIET, "--trainer.callbacks+=denied.Denied")
    again = "python main.py fit --config=logs/mnist/version_0/config.yaml --ckpt_path=last"
    assert line == f"error: some/file: Permission denied; to go on: {again}"


def test_evaluations_need_no_write(read_only, disk):
    main([*FIT, "--num_threads=1", *QUIET])
    read_only("logs")
    for stage in ("validate", "test"):
        main([stage, "--config=logs/mnist/version_0/config.yaml"])
    main(["predict", "--config=logs/mnist/version_0/config.yaml"])
    assert Path("predictions.csv").exists()


def test_predict_says_so_before_any_work(read_only, disk, capfd):
    main([*FIT, "--num_threads=1", *QUIET])
    read_only("elsewhere")
    config = "--config=logs/mnist/version_0/config.yaml"
    line = error_of(capfd, "predict", config, "--predictions.path=elsewhere/predictions.csv")
    assert line == "error: elsewhere can't be written: Read-only file system"


@pytest.mark.parametrize("where", ["logs", "logs/sweeps"])
def test_a_sweep_says_so_before_any_work(read_only, disk, capfd, where):
    read_only(where)
    args = settings(disk)
    before = content(disk).keys()
    for more in ([], ["--dry_run"]):
        capfd.readouterr()
        assert sweep.main([*args, *more]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ") and "Read-only file system" in line and "logs/sweeps" in line
    assert content(disk).keys() == before


def test_a_sweep_that_became_read_only_says_so(read_only, foreign_disk, capfd):
    args = [*LOSS, "--name=tiny", "--base=[]", grid(model__lr=[0.1, 0.2])]
    assert sweep.main([*args, "--limit=1"]) == 0
    read_only("logs/sweeps/tiny")
    before = content(foreign_disk)
    capfd.readouterr()
    assert sweep.main(args) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "Read-only file system" in line and "logs/sweeps/tiny" in line
    assert content(foreign_disk) == before
    assert [row["status"] for row in rows()] == ["finished"]


@pytest.fixture
def foreign_disk(disk):
    import shutil

    from conftest import REPO

    shutil.copy(REPO / "tests/foreign.py", ".")
    return disk
