"""Learning-rate schedules from YAML: each step's rate, as TensorBoard has it, against its closed form."""

import functools
import math

import pytest
import torch
from conftest import BASE, BRIEF, DATA, FIT, RUN, error_of, main
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.lr_scheduler import OneCycleLR

from mnist_cnn import CNN, LitClassifier, MNISTDataModule

NAME = "--model.lr_scheduler"
CYCLE = [f"{NAME}=OneCycleLR", f"{NAME}.max_lr=0.1"]
PLATEAU = [f"{NAME}=lightning.pytorch.cli.ReduceLROnPlateau", f"{NAME}.monitor=val/acc", f"{NAME}.mode=max"]
HALVED = ["--trainer.accumulate_grad_batches=2"]


def cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def one_cycle(step: int, steps: int) -> float:
    top = 0.3 * steps - 1  # torch's defaults: 30% up, from a 25th, down to a ten thousandth of that
    return cosine(0.004, 0.1, step / top) if step <= top else cosine(0.1, 4e-7, (step - top) / (steps - 1 - top))


def warmup_cosine(step: int, steps: int) -> float:
    up = round(steps / 4)
    return 0.1 * (step + 1) / (up + 1) if step < up else cosine(0.1, 0.01, (step - up) / (steps - up))


SCHEDULES = {
    "one cycle": (CYCLE, 16, one_cycle),
    "one cycle, accumulated gradients": ([*CYCLE, *HALVED], 8, one_cycle),
    "one cycle, more steps by hand": ([*CYCLE, f"{NAME}.total_steps=50"], 16, lambda step, _: one_cycle(step, 50)),
    "warm-up": ([f"{NAME}=WarmupCosineLR", f"{NAME}.warmup=0.25", f"{NAME}.final=0.1"], 16, warmup_cosine),
    "cyclic": (
        [f"{NAME}=CyclicLR", f"{NAME}.base_lr=0.02", f"{NAME}.max_lr=0.1", f"{NAME}.step_size_up=5"],
        16,
        lambda step, _: 0.02 + 0.08 * (1 - abs(step % 10 - 5) / 5),
    ),
    "step, accumulated gradients": (
        [f"{NAME}=StepLR", f"{NAME}.step_size=1", f"{NAME}.gamma=0.5", *HALVED],
        8,
        lambda step, steps: 0.1 * 0.5 ** (2 * step // steps),
    ),
    "plateau": (
        [*PLATEAU, f"{NAME}.patience=0", f"{NAME}.threshold=10", "--trainer.max_epochs=3"],  # nothing is good enough
        24,
        lambda step, _: 0.1 if step < 16 else 0.01,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_step_has_the_rate_of_the_closed_form(folder, name):
    settings, steps, form = SCHEDULES[name]
    monitored = ["--lr_monitor.logging_interval=step", "--trainer.log_every_n_steps=1", "--tensorboard={}"]
    main([*BRIEF, *monitored, "--histograms=null", "--evaluate_best=false", *settings])
    rates = {event.step: event.value for event in EventAccumulator(str(folder / RUN)).Reload().Scalars("lr-SGD")}
    assert rates == pytest.approx({step: form(step, steps) for step in range(steps)}, rel=1e-5)


def test_a_schedule_without_end_is_refused(folder, capfd):
    assert "max_epochs" in error_of(capfd, "fit", *BASE, "--wandb=null", "--trainer.max_epochs=-1", *CYCLE)
    assert list(folder.iterdir()) == []


def test_a_schedule_of_python_code_is_stepped_at_each_step():
    for schedule in (lambda o: OneCycleLR(o, 0.1, total_steps=9), functools.partial(OneCycleLR, max_lr=0.1)):
        model = LitClassifier(CNN(), functools.partial(torch.optim.SGD, lr=0.1), schedule)
        trainer = Trainer(max_steps=3, limit_val_batches=0, barebones=True)
        trainer.fit(model, datamodule=MNISTDataModule(str(DATA)))
        (config,) = trainer.lr_scheduler_configs
        assert (config.interval, config.scheduler.last_epoch) == ("step", 3)


@pytest.mark.parametrize("wrong", ["warmup=2", "total_steps=0", "final=-1"])
def test_wrong_settings_are_refused(folder, capfd, wrong):
    line = error_of(capfd, *BRIEF, "--model.lr_scheduler=WarmupCosineLR", f"--model.lr_scheduler.{wrong}")
    assert f"model.lr_scheduler.{wrong.partition('=')[0]}" in line
    assert list(folder.iterdir()) == []


def test_a_resumed_run_keeps_its_number_of_steps(folder, capfd):
    main([*BRIEF, *CYCLE])
    before = sorted(folder.rglob("*"))
    line = error_of(capfd, *BRIEF, *CYCLE, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert "16 steps" in line and "24" in line
    assert sorted(folder.rglob("*")) == before


def test_too_few_steps_written_by_hand_are_refused(folder, capfd):
    line = error_of(capfd, *FIT, "--wandb=null", *CYCLE, f"{NAME}.total_steps=39")
    assert "39" in line and "40" in line
    assert list(folder.iterdir()) == []
