"""Real processes of main.py: stopped from outside, killed, two at once, two that share a run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    BRIEF,
    FIT,
    LAST,
    ONE_THREAD,
    QUIET,
    REPO,
    RESUME,
    RUN,
    RUNS,
    assert_same_run,
    in_new_process,
    main,
    metrics_of,
    start,
    wait_for,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

DROPOUT = [*BRIEF, "--model.net=probes.Dropping"]
ENDLESS = [*FIT, "--trainer.max_epochs=1000", "--early_stopping=null", "--trainer.log_every_n_steps=20"]
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--wandb=null"]


def begin(*args: str, **options) -> subprocess.Popen:
    return start("main.py", *args, env=ONE_THREAD, **options)


def test_a_saved_config_gives_the_same_run_in_a_process_of_its_own(fitted, folder):
    done = in_new_process("fit", fitted.config)
    assert done.stderr.count("\n") <= 2 and "Traceback" not in done.stderr, done.stderr
    assert_same_run(RUN, fitted.run)


def at(hook: str, call: int = 0) -> list[str]:
    signal_at = "--trainer.callbacks+=probes.SignalAt"
    return [signal_at, f"--trainer.callbacks.hook={hook}", f"--trainer.callbacks.call={call}"]


def wandb_summary(folder: Path) -> dict:
    """The one offline run, as W&B's own reader gives its summary."""
    (run,) = folder.glob("logs/wandb/*run-*")
    assert run.name.startswith("offline-run-")
    read = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", "--summary", str(run)]
    return json.loads(subprocess.run(read, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_closes_its_files(folder, number):
    process = begin(*ENDLESS, "--data.num_workers=1")
    wait_for(LAST.exists, process)
    os.killpg(process.pid, number)  # a terminal's Ctrl-C is for its workers and W&B's process too
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [errors.splitlines()[-1]], errors
    assert "Traceback" not in errors and RESUME in errors and "wandb sync logs/wandb/offline-run-" in printed
    (events,) = RUN.glob("events.*")
    step = torch.load(LAST, weights_only=True)["global_step"]
    logged = [event.step for event in EventFileLoader(str(events)).Load()]  # checks each record's sum
    assert step - 20 <= max(logged) <= step
    assert wandb_summary(folder)["exit_code"] == 1


def test_an_evaluation_ends_at_once(folder, fitted):
    process = begin("predict", fitted.config, "--trainer.limit_predict_batches=2", *at("on_predict_batch_start"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (143, -15) and "Traceback" not in errors, errors
    assert os.listdir() == []


def test_a_stopped_evaluation_of_the_best_can_be_repeated(folder):
    main(DROPOUT)
    process = begin(*DROPOUT, *at("on_test_batch_start"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (143, -15) and "Traceback" not in errors, errors
    assert not (RUNS / "version_1/metrics.json").exists()
    main(["fit", f"--config={RUNS}/version_1/config.yaml", "--ckpt_path=last", "--trainer.callbacks=null"])
    assert_same_run(RUNS / "version_2", RUN)


def test_before_the_first_step_nothing_is_left(folder):
    process = begin(*BRIEF, *at("on_fit_start"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "error: stopped by SIGTERM" in errors, errors
    assert os.listdir() == []


def test_a_killed_run_is_resumed_from_its_last_epoch(folder):
    """Twice, at whatever it was doing."""
    args = [*DROPOUT, "--trainer.max_epochs=60", "--early_stopping=null", "--trainer.limit_train_batches=60"]
    main(args)
    for version, epoch in ((1, 8), (2, 25)):
        last = RUNS / f"version_{version}/checkpoints/last.ckpt"
        process = begin(*args, *["--ckpt_path=last"] * (version > 1))
        wait_for(lambda last=last: last.exists(), process)
        wait_for(lambda last=last, epoch=epoch: torch.load(last, weights_only=True)["epoch"] >= epoch, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (RUNS / f"version_{version}/metrics.json").exists()
    main([*args, "--ckpt_path=last"])
    assert_same_run(RUNS / "version_3", RUN)


def test_two_fits_that_begin_together_get_a_folder_each(folder):
    both = [begin(*FIT) for _ in range(2)]
    assert [process.communicate(timeout=200) and process.returncode for process in both] == [0, 0]
    assert sorted(os.listdir(RUNS)) == ["version_0", "version_1"]
    assert_same_run(RUN, RUNS / "version_1")
    for run in RUNS.iterdir():
        assert len(list(run.glob("checkpoints/*.ckpt"))) == 3 and len(list(run.glob("events.*"))) == 1
        assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert len(list(folder.glob("logs/wandb/offline-run-*/*.wandb"))) == 2


# Two processes that share a run, over gloo


def test_two_devices_make_one_run_and_count_each_image_once(folder):
    whole = ["--trainer.limit_val_batches=1.0", "--trainer.limit_test_batches=1.0", "--data.eval_batch_size=333"]
    in_new_process(*FIT, *DDP, *whole, "--trainer.max_epochs=1")
    assert os.listdir(RUNS) == ["version_0"]
    assert len(list(RUN.glob("events.*"))) == 1
    tags = EventAccumulator(str(RUN)).Reload().Tags()
    assert set(tags["images"]) == {"test/confusion_matrix", "test/worst_classified"}
    assert "act/net.conv1" in tags["histograms"]
    metrics, one = metrics_of(RUN), ["--trainer.devices=1", "--trainer.strategy=auto"]
    for stage, prefix in (("validate", "val"), ("test", "test")):
        found = main([stage, f"--config={RUN}/config.yaml", *one]).trainer.callback_metrics
        assert found[f"{prefix}/acc"].item() == metrics[f"{prefix}/acc"]
        assert found[f"{prefix}/loss"].item() == pytest.approx(metrics[f"{prefix}/loss"], rel=1e-5)


def alive(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(group) and line.split()[1][0] != "Z"]


def test_two_processes_end_without_a_hang(folder):
    process = begin(*ENDLESS, *DDP)
    wait_for(LAST.exists, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert f"error: stopped by SIGTERM; {RESUME}" in errors and "Traceback" not in errors
    wait_for(lambda: not alive(process.pid), seconds=10)


# Odd environments

SMALL = [*FIT, "--trainer.max_epochs=1"]
ODD = {
    # what a shell does with the command, and the variables it has
    "no UTF-8, no HOME, umask 077": (
        'umask 077; unset HOME USER LOGNAME; exec "$@"',
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ),
    "no docstrings, odd clock, nobody to type": (
        'exec "$@" < /dev/null',
        {"PYTHONOPTIMIZE": "2", "TZ": "Pacific/Kiritimati", "COLUMNS": "1", "TERM": "dumb", "PYTHONHASHSEED": "1"},
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_fit_is_the_same_in_any_environment(folder, name):
    shell, variables = ODD[name]
    command = ["bash", "-c", shell, "bash", sys.executable, str(REPO / "main.py"), *SMALL]
    done = subprocess.run(command, env=ONE_THREAD | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not re.search("Traceback|Warning", done.stderr), done.stderr
    main([*SMALL, *QUIET])
    assert_same_run(RUN, RUNS / "version_1")
    assert list(RUN.glob("events.*")) and list(folder.glob("logs/wandb/*/*.wandb"))
    if "umask" in name:
        assert [path for path in RUN.rglob("*") if path.stat().st_mode & 0o077] == []


def test_a_clone_may_lie_anywhere(folder):
    """Clone, working directory and logs have odd names; data_dir is relative to the working directory."""
    clone = folder / "one's own, ü 日本 $HOME #1"
    clone.mkdir()
    for name in ("main.py", "mnist_cnn", "configs"):
        (clone / name).symlink_to(REPO / name)
    Path("the data").symlink_to(REPO / "data")
    odd = ["--data.data_dir=the data", "--trainer.default_root_dir=lögs/a b"]
    config = f"--config={clone}/configs/base.yaml"
    for args in (["fit", config, *FIT[4:], *QUIET, *odd], ["test", "--config=lögs/a b/version_0/config.yaml"]):
        command = [sys.executable, str(clone / "main.py"), *args]
        done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    main([*FIT, *QUIET])
    assert_same_run(Path("lögs/a b/version_0"), RUN)
    assert f"{metrics_of(RUN)['test/loss']:.6f}"[:7] in done.stdout
