"""A disk that becomes full, and folders that are not writable: the cause is reported, nothing is half-written."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import FIT, LAST, QUIET, RUN, RUNS, assert_same_run, error_of, main
from probes import fill_disk

FULL = "No space left on device"


@pytest.fixture
def disk(folder, monkeypatch):
    """A working directory with little space."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    monkeypatch.chdir(disk)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


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


def full(hook: str, call: int = 0) -> list[str]:
    fills = "--trainer.callbacks+=probes.FillDisk"
    return [fills, f"--trainer.callbacks.hook={hook}", f"--trainer.callbacks.call={call}"]


def test_full_from_the_beginning(disk, capfd):
    fill_disk()
    line = error_of(capfd, *FIT)
    assert FULL in line and "logs" in line
    assert os.listdir() == ["ballast"]


@pytest.mark.parametrize(
    "more",
    [full("on_validation_end", 2), [*full("on_train_epoch_start", 1), "--checkpoint=null"], full("on_test_end")],
    ids=["a new checkpoint", "last.ckpt, which is replaced", "metrics.json"],
)
def test_full_during_a_fit(disk, more):
    with pytest.raises(OSError, match=FULL):
        main([*FIT, *QUIET, *more])
    assert not (RUN / "metrics.json").exists()
    checkpoints = [torch.load(path, weights_only=True) for path in LAST.parent.iterdir()]  # each whole
    assert {checkpoint["global_step"] for checkpoint in checkpoints} <= {20, 40}
    os.remove("ballast")
    main(["fit", f"--config={RUN}/config.yaml", "--ckpt_path=last", "--trainer.callbacks=null"])
    main([*FIT, *QUIET, *more[3:]])
    assert_same_run(RUNS / "version_1", RUNS / "version_2")


def test_full_while_tensorboard_writes(disk):
    options = ["--wandb=null", "--tensorboard.max_queue=1", "--trainer.log_every_n_steps=1"]
    with pytest.raises(OSError, match=FULL):
        main([*FIT, *options, *full("on_train_batch_start", 25)])
    os.remove("ballast")
    main(["fit", f"--config={RUN}/config.yaml", "--ckpt_path=last", "--trainer.callbacks=null"])
    assert (RUNS / "version_1/metrics.json").exists()


@pytest.mark.parametrize(("where", "loggers"), [("logs", QUIET), ("logs/mnist", [])])
def test_a_fit_in_a_folder_that_cannot_be_written(read_only, disk, capfd, where, loggers):
    read_only(where)
    before = sorted(disk.rglob("*"))
    line = error_of(capfd, *FIT, *loggers)
    assert "Read-only file system" in line and where in line
    assert sorted(disk.rglob("*")) == before


def test_evaluations_need_no_write_and_predict_says_what_it_needs(read_only, disk, capfd):
    main([*FIT, *QUIET])
    read_only("logs")
    read_only("elsewhere")
    config = f"--config={RUN}/config.yaml"
    for stage in ("validate", "test", "predict"):
        main([stage, config])
    assert Path("predictions.csv").exists()
    line = error_of(capfd, "predict", config, "--predictions.path=elsewhere/predictions.csv")
    assert "elsewhere" in line and "Read-only file system" in line
