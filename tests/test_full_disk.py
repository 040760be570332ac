"""A disk that becomes full: one line, nothing half-written, and with space again it goes on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from conftest import FIT, QUIET, REPO, assert_same_weights, error_of, main, metrics_of
from disks import files_of, small_disk
from moments import fill_disk
from sweeps import LOSS, grid, rows
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import sweep

RUN = Path("logs/mnist/version_0")
ONE = [*FIT, "--num_threads=1"]


@pytest.fixture
def disk(folder):
    with small_disk(folder) as disk:
        yield disk


def full(hook: str, call: int = 0) -> list[str]:
    return [
        "--trainer.callbacks+=moments.FillDisk",
        f"--trainer.callbacks.hook={hook}",
        f"--trainer.callbacks.call={call}",
    ]


def go_on(line: str) -> Path:
    """Makes space and does what an error says."""
    os.remove("ballast")
    return conftest.go_on(line, "--trainer.callbacks=null")


def test_from_the_beginning(disk, capfd):
    fill_disk()
    for loggers in ([], QUIET):
        line = error_of(capfd, *ONE, *loggers)
        assert "No space left on device" in line and "logs" in line
        assert [path.name for path in disk.rglob("*")] == ["ballast"]


@pytest.mark.parametrize("epoch", [0, 1])
def test_during_a_checkpoint(disk, capfd, epoch):
    line = error_of(capfd, *ONE, *QUIET, *full("on_validation_end", epoch))
    assert line.startswith(f"error: {disk}/logs/mnist/version_0/checkpoints/")
    assert "can't be written: No space left on device; " in line
    checkpoints = sorted(path.name for path in RUN.glob("checkpoints/*"))
    assert len(checkpoints) == (2 if epoch else 0) and not RUN.joinpath("metrics.json").exists()
    if not epoch:
        assert line.endswith("there is no checkpoint yet")
        return
    for name in checkpoints:
        assert torch.load(RUN / "checkpoints" / name, weights_only=True)["global_step"] == 20
    resumed = go_on(line)
    main([*ONE, *QUIET])
    assert metrics_of(resumed) == metrics_of(Path("logs/mnist/version_2"))
    assert_same_weights(resumed, Path("logs/mnist/version_2"))


def test_during_a_checkpoint_that_replaces_another(disk, capfd):
    """As last.ckpt does; the disk is so full that not even the temporary file has room."""
    line = error_of(capfd, *ONE, *QUIET, "--checkpoint=null", *full("on_train_epoch_start", 1))
    assert "/checkpoints/last.ckpt can't be written" in line
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 20
    assert os.listdir(RUN / "checkpoints") == ["last.ckpt"]
    assert metrics_of(go_on(line))["epochs"] == 2


def test_during_metrics_json(disk, capfd):
    line = error_of(capfd, *ONE, *QUIET, *full("on_test_end"))
    assert line.startswith(f"error: {RUN}/metrics.json can't be written: No space left on device; to go on: ")
    assert sorted(os.listdir(RUN)) == ["checkpoints", "config.yaml"]
    resumed = go_on(line)
    main([*ONE, *QUIET])
    assert metrics_of(resumed) == metrics_of(Path("logs/mnist/version_2"))


@pytest.mark.parametrize("moment", [("on_train_batch_start", 25), ("on_test_end", 0)], ids=["training", "at the end"])
def test_during_tensorboards_event_file(disk, capfd, moment):
    loggers = ["--wandb=null", "--tensorboard.max_queue=1", "--trainer.log_every_n_steps=1"]
    line = error_of(capfd, *ONE, *loggers, *full(*moment))
    assert line.startswith("error: ") and "can't be written: No space left on device; to go on: " in line
    (events,) = RUN.glob("events.*")
    assert max(event.step for event in EventFileLoader(str(events)).Load()) >= 20  # what was written can be read
    assert metrics_of(go_on(line))["epochs"] == 2


@pytest.mark.parametrize("moment", [("on_train_batch_start", 25), ("on_test_end", 0)], ids=["training", "at the end"])
def test_with_wandb_in_a_process_of_its_own(disk, moment):
    """What W&B can't write, it loses; the run is none the worse."""
    command = [sys.executable, str(REPO / "main.py"), *ONE, "--tensorboard=null", "--trainer.log_every_n_steps=1"]
    environment = os.environ | {"PYTHONPATH": str(REPO / "tests"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *full(*moment)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "can't be written: No space left on device; to go on: " in line
    assert metrics_of(go_on(line))["epochs"] == 2


def test_during_results_csv(disk, capfd):
    shutil.copy(REPO / "tests/foreign.py", ".")
    args = [*LOSS, "--name=tiny", "--base=[]", "--fixed.trainer.enable_checkpointing=false"]
    assert sweep.main([*args, grid(model__lr=[0.1])]) == 0
    before = files_of(Path("logs"))
    fill_disk()
    # The same command writes sweep.yaml anew, that of the folder only the results.
    folder = ["--program=foreign:main", "--metric=loss", "--run_dir=logs/sweeps/tiny/configs"]
    for command, file in (([*args, grid(model__lr=[0.1])], "sweep.yaml"), (folder, "results.csv")):
        capfd.readouterr()
        assert sweep.main(command) == 1
        told = capfd.readouterr().err
        assert told == f"error: [Errno 28] No space left on device: 'logs/sweeps/tiny/{file}'\n"
        assert files_of(Path("logs")) == before
    os.remove("ballast")
    assert sweep.main([*args, grid(model__lr=[0.1])]) == 0
    assert [row["status"] for row in rows()] == ["finished"]


def test_during_a_sweeps_run(disk, capfd):
    """It fails, since it can't write; the sweep says so and goes on as far as it can."""
    shutil.copy(REPO / "tests/foreign.py", ".")
    args = [*LOSS, "--name=tiny", "--base=[]", "--fixed.trainer.enable_checkpointing=false"]
    capfd.readouterr()
    assert sweep.main([*args, grid(model__fault=["x", "fill"])]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert [row["status"] for row in rows()] == ["finished", "pending"]
    shutil.rmtree("logs/sweeps/tiny/001-fault=fill")
    assert sweep.main([*args, grid(model__fault=["x", "fill", "y"]), "--limit=1"]) == 0
    assert [row["status"] for row in rows()] == ["finished", "pending"]
    assert json.loads(Path("logs/sweeps/tiny/000-fault=x/metrics.json").read_text())["epochs"] == 2
