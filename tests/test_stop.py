"""SIGTERM and Ctrl-C during fit: a checkpoint, a status that isn't 0, a run that can be resumed to the same end."""

import shlex
import signal
from pathlib import Path

import pytest
import torch
from conftest import BRIEF as SHORTER
from conftest import LAST, RESUME, RUN, RUNS, assert_same_run, main, resume

BRIEF = [*SHORTER, "--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=8"]
DROPOUT = [*BRIEF, "--model.net=probes.Dropping"]
UNDISTURBED = "--trainer.callbacks=null"


def at(hook: str, call: int = 0, **settings) -> list[str]:
    arguments = {"hook": hook, "call": call, **settings}
    return ["--trainer.callbacks+=probes.SignalAt", *(f"--trainer.callbacks.{k}={v}" for k, v in arguments.items())]


def stopped(capfd, *args: str, status: int = 143) -> list[str]:
    """What a run that is stopped says on standard error."""
    capfd.readouterr()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    return capfd.readouterr().err.splitlines()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(DROPOUT)
    return folder / RUN


MOMENTS = {
    "first step": ("on_train_batch_start", 0),
    "middle of an epoch": ("on_train_batch_start", 3),
    "last step of an epoch": ("on_train_batch_start", 7),
    "validation": ("on_validation_batch_start", 2),  # after the sanity check
    "second epoch": ("on_before_optimizer_step", 11),
    "last step of all": ("on_train_batch_start", 15),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_run_is_resumed_to_the_same_end(folder, undisturbed, capfd, moment):
    hook, call = MOMENTS[moment]
    number = signal.SIGINT if call % 2 else signal.SIGTERM
    *lines, last = stopped(capfd, *DROPOUT, *at(hook, call, number=int(number)), status=128 + number)
    assert len(lines) == 1 and "stopping" in lines[0]
    command = f"python main.py fit --config={RUN}/config.yaml --ckpt_path=last"
    assert last == f"error: stopped by {number.name}; {RESUME}{command}"
    assert not (RUN / "metrics.json").exists()
    assert_same_run(resume(last, UNDISTURBED), undisturbed)
    assert "warn" not in capfd.readouterr().err.lower()


CYCLE = ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=0.1"]
SETTINGS = {
    "accumulated gradients and a schedule": ["--trainer.accumulate_grad_batches=3", *CYCLE],
    "validations within an epoch": ["--trainer.val_check_interval=3"],
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_is_so_with_other_settings(folder, capfd, settings):
    main([*DROPOUT, *settings])
    *_, last = stopped(capfd, *DROPOUT, *settings, *at("on_train_batch_start", 3))
    assert_same_run(resume(last, UNDISTURBED), RUN)


def test_it_can_be_stopped_again_and_again(folder, undisturbed, capfd):
    *_, last = stopped(capfd, *DROPOUT, *at("on_train_batch_start", 3))
    for step in (8, 12):
        *_, last = stopped(capfd, *shlex.split(last.partition("main.py ")[2]))  # the moment is in its config.yaml
        assert torch.load(max(RUNS.iterdir()) / "checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    assert_same_run(resume(last, UNDISTURBED), undisturbed)


def test_a_second_signal_ends_at_once(folder, capfd):
    lines = stopped(capfd, *BRIEF, *at("on_validation_batch_start", 4, times=2))
    assert "stopping" in lines[0] and lines[-1].endswith("--ckpt_path=last")
    assert torch.load(LAST, weights_only=True)["global_step"] == 8  # that of the epoch before


def test_without_checkpoints_it_says_so(folder, capfd):
    off = ["--checkpoint=null", "--last_checkpoint=null"]
    last = stopped(capfd, *BRIEF, *off, *at("on_train_batch_start", 3))[-1]
    assert last.startswith("error: stopped by SIGTERM; ") and "no checkpoint" in last and RESUME not in last
    assert not LAST.parent.exists()


def test_an_ignored_signal_stays_ignored(folder):
    """As in a shell's background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # put back by a fixture
    main([*BRIEF, *at("on_train_batch_start", 3, number=int(signal.SIGINT))])
    assert (RUN / "metrics.json").exists()


def test_last_is_that_of_the_newest_run_that_has_one(folder, capfd):
    stopped(capfd, *BRIEF, *at("on_train_batch_start", 3))
    Path("logs/mnist/version_1/checkpoints").mkdir(parents=True)  # killed before it wrote any
    main([*BRIEF, "--ckpt_path=last"])
    assert f"{LAST}" in Path("logs/mnist/version_2/config.yaml").read_text().splitlines()[0]
