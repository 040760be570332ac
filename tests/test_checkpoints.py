"""Which checkpoint a command uses, what is kept of a run that is resumed, and whose numbers metrics.json has."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, CONSTANT, LAST, RUN, RUNS, assert_same_run, error_of, main, metrics_of

FOUR = [*BRIEF, CONSTANT, "--trainer.max_epochs=4", "--early_stopping=null"]
OF_RUN = f"--config={RUN}/config.yaml"
LIMIT = "--trainer.limit_test_batches=1"


def evaluated(*args: str) -> dict[str, float]:
    """What an evaluation logs."""
    return {name: value.item() for name, value in main(list(args)).trainer.callback_metrics.items()}


# The run to which a config belongs


def test_a_runs_config_never_means_another_runs_checkpoint(folder, capfd):
    """Though there is a newer run, which a config that belongs to no run means."""
    main([*BRIEF, "--checkpoint.dirpath=best", "--last_checkpoint.dirpath=last"])
    main([*BRIEF, "--seed_everything=1"])
    (metrics := metrics_of(RUN)).pop("best_checkpoint")
    found = evaluated("test", OF_RUN)
    assert found == {name: metrics[name] for name in ("test/loss", "test/acc")}
    assert f"{RUN} has no last checkpoint" in error_of(capfd, "test", OF_RUN, "--ckpt_path=last")
    assert f"{RUN} has no last checkpoint" in error_of(capfd, "fit", OF_RUN, "--ckpt_path=last")
    (RUN / "metrics.json").unlink()  # as if it was killed
    assert f"{RUN} has no metrics.json" in error_of(capfd, "predict", OF_RUN)
    assert evaluated("test", *BRIEF[1:])["test/acc"] == metrics_of(RUNS / "version_1")["test/acc"]
    assert sorted(os.listdir(RUNS)) == ["version_0", "version_1"]


def test_a_checkpoint_that_another_run_has_overwritten(folder, capfd):
    shared = "--checkpoint={monitor: val/loss, dirpath: best, filename: best, enable_version_counter: false}"
    for seed in (1, 2):
        main([*BRIEF, shared, f"--seed_everything={seed}"])
    assert "best.ckpt has been overwritten" in error_of(capfd, "test", OF_RUN)


def test_a_run_without_checkpoints_or_whose_best_is_gone(folder, capfd):
    main([*BRIEF, "--trainer.enable_checkpointing=false"])
    assert f"{RUN} has no best checkpoint" in error_of(capfd, "test", OF_RUN)
    shutil.rmtree(RUN)
    main(BRIEF)
    (RUN / metrics_of(RUN)["best_checkpoint"]).unlink()
    assert f"{RUN} has no best checkpoint" in error_of(capfd, "test", OF_RUN, "--ckpt_path=best")


# Callbacks that change weights

EMA = ["EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
SWA = ["StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.05", "--trainer.callbacks.swa_epoch_start=1"]
OWN = """
import torch
from lightning.pytorch import Callback

class Shrink(Callback):
    factor = 1.0

    def on_train_end(self, *args):
        self.factor = 0.5

    def on_test_start(self, trainer, module):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(self.factor)

    on_validation_start = on_test_start
"""


@pytest.mark.parametrize("callback", [EMA, SWA, ["shrinking.Shrink"]], ids=["EMA", "SWA", "own"])
def test_metrics_are_those_that_a_later_evaluation_gives(folder, callback):
    (folder / "shrinking.py").write_text(OWN)
    name, *settings = callback
    main([*FOUR, f"--trainer.callbacks+={name}", *settings])
    metrics = metrics_of(RUN)
    found = evaluated("validate", OF_RUN) | evaluated("test", OF_RUN)
    assert found == {name: metrics[name] for name in ("val/loss", "val/acc", "test/loss", "test/acc")}
    main(["fit", OF_RUN])
    assert_same_run(RUNS / "version_1", RUN)


# Resuming

PLACES = {
    "elsewhere": ["--checkpoint.dirpath=best", "--last_checkpoint.dirpath=last"],
    "a slash in the name, mode max": [
        "--checkpoint={monitor: val/acc, mode: max, save_top_k: 2, filename: '{epoch}-{val/acc:.3f}'}"
    ],
}


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_ends_with_the_same_checkpoints(folder, place):
    """The first epochs are the best ones, since the schedule makes the loss grow after them."""
    schedule = ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=2", "--model.lr_scheduler.gamma=10"]
    settings = [*FOUR, *schedule, *PLACES[place]]
    main(settings)
    whole = kept()
    for path in ("logs", "best", "last"):
        shutil.rmtree(path, ignore_errors=True)
    main([*settings, "--trainer.max_epochs=2"])
    last = str(LAST if LAST.exists() else "last/last.ckpt")
    main([*settings, f"--ckpt_path={last}"])
    shutil.rmtree(RUN)
    assert kept() == whole
    assert evaluated("test", f"--config={RUNS}/version_1/config.yaml")["test/loss"] == whole[0]["test/loss"]


def kept() -> tuple[dict, list[str]]:
    """The newest run's metrics, and the names of all checkpoints."""
    metrics = metrics_of(max(RUNS.iterdir()))
    metrics["best_checkpoint"] = Path(metrics["best_checkpoint"]).name
    return metrics, sorted(str(path).rpartition("checkpoints/")[2] for path in Path().rglob("*.ckpt"))


PLATEAU = [f"--model.lr_scheduler{key}" for key in ("=lightning.pytorch.cli.ReduceLROnPlateau", ".monitor=val/loss")]
PLATEAU += ["--model.lr_scheduler.patience=0", "--model.lr_scheduler.threshold=0.5"]  # it acts after each epoch
ENDS = {
    "before the schedule acts": (PLATEAU, "--trainer.max_epochs=2"),
    "within an epoch": (["--trainer.max_steps=20"], "--trainer.max_steps=11"),
    "within the last epoch": (["--trainer.max_epochs=2"], "--trainer.max_steps=11"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_ended_sooner_is_resumed_like_a_whole_one(folder, end):
    settings, sooner = ENDS[end]
    main([*FOUR, *settings])
    main([*FOUR, *settings, sooner])
    main([*FOUR, *settings, "--ckpt_path=last"])
    assert_same_run(RUNS / "version_2", RUN)


def test_of_several_checkpoints_the_named_one_chooses_the_best(folder):
    newest = {"monitor": "step", "mode": "max", "filename": "newest"}
    options = [f"--trainer.callbacks.{key}={value}" for key, value in newest.items()]
    main([*BRIEF, "--trainer.callbacks+=ModelCheckpoint", *options])
    assert metrics_of(RUN)["best_checkpoint"].startswith("checkpoints/epoch0")


def test_nothing_is_left_to_train_in_a_finished_run(folder, capfd):
    last = [*BRIEF, CONSTANT, "--ckpt_path=last"]
    main([*BRIEF, CONSTANT])
    assert "nothing left to train" in error_of(capfd, *last)
    assert "max_steps=16" in error_of(capfd, *last, "--trainer.max_epochs=9", "--trainer.max_steps=16")
    (RUN / "metrics.json").unlink()
    assert "nothing left" in error_of(capfd, *last, "--evaluate_best=false")
    assert os.listdir(RUNS) == ["version_0"]
    main([*last, "--trainer.max_epochs=3"])
    assert "3 epochs (1 of them new) in " in capfd.readouterr().out
    patient = [*BRIEF, "--trainer.max_epochs=9", "--early_stopping.patience=1", "--early_stopping.min_delta=9"]
    main(patient)
    assert "early_stopping.patience=1" in error_of(capfd, *patient, "--ckpt_path=last")


# Numbers of their own epoch


@pytest.mark.parametrize("steps", [3, 11], ids=["before the first validation", "within the second epoch"])
def test_an_epoch_that_max_steps_cuts_short_is_validated(folder, capfd, steps):
    main([*FOUR, f"--trainer.max_steps={steps}", "--checkpoint.save_top_k=-1"])
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    files = {int(path.name[5:7]): path for path in RUN.glob("checkpoints/epoch*.ckpt")}
    assert len(lines) == len(files) == math.ceil(steps / 8)
    assert torch.load(files[len(files) - 1], weights_only=True)["global_step"] == steps
    for epoch, path in files.items():
        loss = evaluated("validate", OF_RUN, f"--ckpt_path={path}")["val/loss"]
        assert f"val/loss {loss:.4f}" in lines[epoch] and path.stem.endswith(f"val_loss{loss:.4f}")
    assert json.loads((RUN / "metrics.json").read_text())["epochs"] == len(files)


def test_an_epoch_without_validation_shows_no_validation(folder, capfd):
    plateau = ["--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss"]
    main([*FOUR, "--trainer.check_val_every_n_epoch=2", *plateau])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["val/loss" in line for line in lines] == [False, True, False, True]
