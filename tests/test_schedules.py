"""Learning-rate schedules from YAML: each step's rate, as TensorBoard has it, against its closed form."""

import functools
import math

import pytest
import torch
from conftest import BASE, FIT, QUIET, error_of, main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.lr_scheduler import OneCycleLR

from mnist_cnn import CNN, LitClassifier

NAME = "--model.lr_scheduler"


def cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def one_cycle(step: int, steps: int) -> float:
    top = 0.3 * steps - 1  # torch's defaults: 30% up, from a 25th, down to a ten thousandth of that
    return cosine(0.004, 0.1, step / top) if step <= top else cosine(0.1, 4e-7, (step - top) / (steps - 1 - top))


def warmup_cosine(step: int, steps: int) -> float:
    up = steps // 4
    return 0.1 * (step + 1) / (up + 1) if step < up else cosine(0.1, 0.01, (step - up) / (steps - up))


SCHEDULES = {
    "one cycle": (["=OneCycleLR", ".max_lr=0.1"], one_cycle),
    "one cycle, by hand": (
        ["=OneCycleLR", ".max_lr=0.1", ".total_steps=100"],
        lambda step, steps: one_cycle(step, 100),
    ),
    "warm-up": (["=WarmupCosineLR", ".warmup=0.25", ".final=0.1"], warmup_cosine),
    "warm-up, by hand": (
        ["=WarmupCosineLR", ".warmup=0.25", ".final=0.1", ".total_steps=48"],
        lambda step, _: warmup_cosine(step, 48),
    ),
    "cyclic": (
        ["=CyclicLR", ".base_lr=0.02", ".max_lr=0.1", ".step_size_up=10"],
        lambda step, steps: 0.02 + 0.08 * (1 - abs(step % 20 - 10) / 10),
    ),
    "step": (["=StepLR", ".step_size=1", ".gamma=0.5"], lambda step, steps: 0.1 * 0.5 ** (2 * step // steps)),
    "cosine": (["=CosineAnnealingLR", ".T_max=2"], lambda step, steps: cosine(0.1, 0, 2 * step // steps / 2)),
}


@pytest.mark.parametrize(("changes", "steps"), [([], 40), (["--trainer.accumulate_grad_batches=2"], 20)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_step_has_the_rate_of_the_closed_form(folder, name, changes, steps):
    settings, form = SCHEDULES[name]
    callbacks = ["--wandb=null", "--histograms=null", "--graph=null", "--evaluate_best=false"]
    monitored = ["--lr_monitor.logging_interval=step", "--trainer.log_every_n_steps=1"]
    main([*FIT, *callbacks, *changes, *monitored, *(f"{NAME}{setting}" for setting in settings)])
    accumulator = EventAccumulator(str(folder / "logs/mnist/version_0")).Reload()
    rates = {event.step: event.value for event in accumulator.Scalars("lr-SGD")}
    assert rates == pytest.approx({step: form(step, steps) for step in range(steps)}, rel=1e-5)


def test_a_schedule_with_a_number_of_steps_needs_an_end(folder, capfd):
    settings = ["--wandb=null", "--trainer.max_epochs=-1", f"{NAME}=OneCycleLR", f"{NAME}.max_lr=0.1"]
    assert "set max_epochs or max_steps" in error_of(capfd, "fit", *BASE, *settings)
    assert list(folder.iterdir()) == []


def test_a_schedule_of_python_code_is_stepped_at_each_step():
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    for schedule in (lambda o: OneCycleLR(o, 0.1, total_steps=9), functools.partial(OneCycleLR, max_lr=0.1)):
        _, ((config),) = LitClassifier(CNN(), optimizer, schedule).configure_optimizers()
        assert config["interval"] == "step"


@pytest.mark.parametrize("setting", ["warmup=2", "total_steps=0", "final=-1"])
def test_wrong_settings_are_refused(folder, capfd, setting):
    assert setting.partition("=")[0] in error_of(capfd, *FIT, f"{NAME}=WarmupCosineLR", f"{NAME}.{setting}")
    assert list(folder.iterdir()) == []


def test_a_resumed_run_keeps_its_number_of_steps(folder, capfd):
    settings = [f"{NAME}=OneCycleLR", f"{NAME}.max_lr=0.1"]
    main([*FIT, "--wandb=null", *settings])
    before = sorted(folder.rglob("*"))
    last = f"--ckpt_path={folder}/logs/mnist/version_0/checkpoints/last.ckpt"
    assert "40 steps" in error_of(capfd, *FIT, "--wandb=null", *settings, "--trainer.max_epochs=3", last)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("setting", ["total_steps=39", "epochs=1"])
def test_too_few_steps_written_by_hand_are_refused(folder, capfd, setting):
    settings = [f"{NAME}=OneCycleLR", f"{NAME}.max_lr=0.1", f"{NAME}.{setting}", f"{NAME}.steps_per_epoch=20"]
    assert "training makes 40" in error_of(capfd, *FIT, "--wandb=null", *settings)
    assert list(folder.iterdir()) == []


def test_more_steps_may_be_written_by_hand(folder):
    cli = main([*FIT, *QUIET, f"{NAME}=OneCycleLR", f"{NAME}.max_lr=0.1", f"{NAME}.total_steps=50"])
    assert cli.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 40
