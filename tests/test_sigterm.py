"""SIGTERM and Ctrl-C during fit: a checkpoint, a status that isn't 0, a run that can go on to the same end."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FIT, QUIET, REPO, assert_same_weights, go_on, main, metrics_of, start, wait_for
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

TWO = [*FIT, "--num_threads=1", "--trainer.log_every_n_steps=20"]
DROPPING = """
from torch import nn

class Dropping(nn.Sequential):
    def __init__(self, p: float = 0.5):
        super().__init__(nn.Flatten(), nn.Dropout(p), nn.Linear(784, 10))
"""
LAST = Path("logs/mnist/version_0/checkpoints/last.ckpt")


@pytest.fixture
def workplace(folder, monkeypatch):
    """A working directory with a net that needs random numbers, and with moments."""
    (folder / "dropping.py").write_text(DROPPING)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(REPO / "tests")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [folder, REPO / "tests"])))
    return folder


def at(hook: str, call: int = 0, **settings) -> list[str]:
    arguments = {"hook": hook, "call": call, **settings}
    callback = "--trainer.callbacks+=moments.SignalAt"
    return [callback, *(f"--trainer.callbacks.{key}={value}" for key, value in arguments.items())]


def stopped(capfd, *args: str, status: int = 143) -> list[str]:
    """What a run that is stopped says on standard error."""
    capfd.readouterr()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    return capfd.readouterr().err.splitlines()


MOMENTS = {
    "in a step": ("on_train_batch_start", 7),
    "in a step of the second epoch": ("on_before_optimizer_step", 33),
    "in the first step": ("on_train_batch_start", 0),
    "in an epoch's last step": ("on_train_batch_start", 19),
    "in an epoch's last but one step": ("on_train_batch_start", 18),
    "in a validation": ("on_validation_batch_start", 0),
    "at the end of a validation": ("on_validation_end", 0),
    "in the last step of all": ("on_train_batch_start", 39),
    "in the last validation": ("on_validation_batch_start", 1),
    "in the evaluation of the best": ("on_test_batch_start", 0),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "dropping.py").write_text(DROPPING)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        main(DROPOUT)
    return folder / "logs/mnist/version_0"


DROPOUT = [*TWO, *QUIET, "--model.net=dropping.Dropping", "--trainer.limit_val_batches=2"]


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_a_stopped_run_goes_on_to_the_same_end(workplace, undisturbed, capfd, moment):
    number = signal.SIGINT if moment[1] % 2 else signal.SIGTERM
    *told, line = stopped(capfd, *DROPOUT, *at(*moment, number=int(number)), status=128 + number)
    assert told == ["stopping after this step; once more: at once"]
    assert line.startswith(f"error: stopped by {number.name}; to go on: ")
    assert not Path("logs/mnist/version_0/metrics.json").exists()
    resumed = go_on(line, "--trainer.callbacks=null")
    assert metrics_of(resumed) == metrics_of(undisturbed)
    assert_same_weights(resumed, undisturbed)
    assert "warn" not in capfd.readouterr().err.lower()


@pytest.mark.parametrize(
    "settings",
    [
        ["--trainer.accumulate_grad_batches=3"],
        ["--trainer.val_check_interval=8"],
        ["--data.num_workers=1"],
        ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=0.1"],
    ],
    ids=["accumulated gradients", "validations within the epoch", "a worker", "a schedule"],
)
def test_it_does_so_with_other_settings(workplace, capfd, settings):
    settings = [*TWO, *QUIET, "--model.net=dropping.Dropping", *settings]
    *_, line = stopped(capfd, *settings, *at("on_train_batch_start", 7))
    resumed = go_on(line, "--trainer.callbacks=null")
    main(settings)
    assert metrics_of(resumed) == metrics_of(Path("logs/mnist/version_2"))
    assert_same_weights(resumed, Path("logs/mnist/version_2"))


def test_it_can_be_stopped_again_and_again(workplace, capfd):
    *_, line = stopped(capfd, *TWO, *QUIET, *at("on_train_batch_start", 5))
    for _ in range(3):
        *_, line = stopped(capfd, *shlex.split(line.partition("main.py ")[2]))  # the moment is in its config.yaml
    assert torch.load("logs/mnist/version_3/checkpoints/last.ckpt", weights_only=True)["global_step"] == 24
    resumed = go_on(line, "--trainer.callbacks=null")
    main([*TWO, *QUIET])
    assert_same_weights(resumed, Path("logs/mnist/version_5"))


def test_before_the_first_step_nothing_is_left(workplace, capfd):
    for hook in ("setup", "on_fit_start", "on_train_start"):
        assert stopped(capfd, *TWO, *at(hook)) == ["error: stopped by SIGTERM"]
        assert not Path("logs").exists()


def test_a_second_signal_ends_at_once(workplace, capfd):
    lines = stopped(capfd, *TWO, *QUIET, *at("on_validation_batch_start", 1, times=2))
    assert lines[0] == "stopping after this step; once more: at once"
    assert torch.load(LAST, weights_only=True)["global_step"] == 20  # the epoch before
    assert lines[-1].endswith("to go on: python main.py fit --config=logs/mnist/version_0/config.yaml --ckpt_path=last")
    assert len(list(LAST.parent.iterdir())) == 2


@pytest.mark.parametrize("off", ["--trainer.enable_checkpointing=false", "--checkpoint=null --last_checkpoint=null"])
def test_without_checkpoints_it_says_so(workplace, capfd, off):
    assert stopped(capfd, *TWO, *QUIET, *off.split(), *at("on_train_batch_start", 5)) == [
        "stopping after this step; once more: at once",
        "error: stopped by SIGTERM; there is no checkpoint yet",
    ]
    assert not LAST.parent.exists()


def test_an_evaluation_ends_at_once(workplace, capfd):
    main([*TWO, *QUIET])
    config = "--config=logs/mnist/version_0/config.yaml"
    before = sorted(workplace.rglob("*"))
    for stage in ("validate", "test", "predict"):
        hook = {"validate": "on_validation_start", "test": "on_test_start", "predict": "on_predict_batch_start"}[stage]
        assert stopped(capfd, stage, config, *at(hook)) == ["error: stopped by SIGTERM"]
    assert sorted(workplace.rglob("*")) == before


# Real processes, stopped from outside.


def begin(*args: str, **options) -> subprocess.Popen:
    return start("main.py", *args, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


ENDLESS = [*TWO, "--trainer.max_epochs=1000", "--early_stopping=null"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_closes_its_files(workplace, number):
    process = begin(*ENDLESS, "--data.num_workers=1")
    wait_for(LAST.exists, process)
    os.killpg(process.pid, number)  # a terminal's Ctrl-C is for its workers and W&B's process too
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [errors.splitlines()[-1]], errors
    assert not re.search("Traceback|weights_only", errors) and "wandb sync logs/wandb/offline-run-" in printed
    (events,) = Path("logs/mnist/version_0").glob("events.*")
    step = torch.load(LAST, weights_only=True)["global_step"]
    logged = [event.step for event in EventFileLoader(str(events)).Load()]  # checks each record's sum
    assert step - 20 <= max(logged) <= step
    (offline,) = Path("logs/wandb").glob("offline-run-*")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--summary", str(offline)]
    summary = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    assert '"exit_code":1' in summary.replace(" ", "")


def test_an_ignored_signal_stays_ignored(workplace):
    ignore = lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]  # noqa: E731
    process = begin(*TWO, *QUIET, *at("on_train_batch_start", 3), preexec_fn=ignore)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_a_step_ends_though_nobody_reads(workplace):
    """As in `main.py ... 2>&1 | tee log`, where Ctrl-C ends tee as well."""
    process = begin(*TWO, *QUIET, *at("on_train_batch_start", 7))
    process.stderr.close()
    assert process.wait(120) == 143
    assert torch.load(LAST, weights_only=True)["global_step"] == 8


def test_ctrl_c_while_all_is_imported(workplace):
    process = begin(*TWO)
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and printed == ("", "")


CLOSING = """
import os, sys
from mnist_cnn import cli
from main import main

def finish(run, status, keep):
    for _ in range(int(sys.argv[1])):
        os.kill(os.getpid(), 2)
    print("finished", status)

cli.finish_wandb = finish
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("times", "status"), [(1, 0), (2, 130)])
def test_a_signal_while_files_are_closed(workplace, times, status):
    """They are closed; a second one ends the process."""
    command = [sys.executable, "-c", CLOSING, str(times), *TWO, "--tensorboard=null"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] == "closing files; once more: at once"
    assert ("finished 0" in done.stdout) == (times == 1) and metrics_of(LAST.parents[1])


def test_last_is_that_of_the_newest_run_that_has_one(workplace, capfd):
    stopped(capfd, *TWO, *QUIET, *at("on_train_batch_start", 7))
    Path("logs/mnist/version_1/checkpoints").mkdir(parents=True)  # killed before it wrote any
    main([*TWO, *QUIET, "--ckpt_path=last"])
    assert "resumed from logs/mnist/version_0/" in Path("logs/mnist/version_2/config.yaml").read_text()


def alive(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(group) and line.split()[1][0] != "Z"]


TWO_PROCESSES = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--wandb=null"]


@pytest.mark.parametrize(
    "settings",
    [
        at("on_test_batch_start"),
        at("on_validation_batch_start", 2),
        [*at("on_train_batch_end", 5), *TWO_PROCESSES],
    ],
    ids=["a test", "a validation", "a step of two processes"],
)
def test_no_exception_comes_between_the_lines_of_anything(workplace, settings):
    """It may be those of TensorBoard's queue, whose end would then be waited for."""
    process = begin(*TWO, *QUIET, *settings)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "went on" in printed and "stopping after this step" in errors


@pytest.mark.parametrize("whole_group", [False, True], ids=["the first process", "both"])
def test_two_processes_end_without_a_hang(workplace, whole_group):
    process = begin(*ENDLESS, *TWO_PROCESSES)
    wait_for(LAST.exists, process)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert "error: stopped by SIGTERM; to go on: " in errors and "Traceback" not in errors
    wait_for(lambda: not alive(process.pid), seconds=10)
