"""The same YAML gives the same numbers, to the last digit, in another process and after an interruption."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    BRIEF,
    CONSTANT,
    FIT,
    QUIET,
    RUN,
    RUNS,
    assert_same_run,
    assert_same_weights,
    error_of,
    main,
    metrics_of,
    printed_config,
    weights_of,
)

FOUR = [*BRIEF, CONSTANT, "--trainer.max_epochs=4", "--early_stopping.patience=10"]
DROPPING = "--model.net=probes.Dropping"


def test_saved_and_printed_config_give_the_same_run(fitted, folder, capfd):
    """stress/test_processes.py does it with a process of its own."""
    main(["fit", fitted.config])
    (folder / "printed.yaml").write_text(printed_config(capfd, *FIT))
    main(["fit", "--config=printed.yaml"])
    for version in ("version_0", "version_1"):
        assert_same_run(RUNS / version, fitted.run)
        config = yaml.safe_load((RUNS / version / "config.yaml").read_text())
        assert config == yaml.safe_load((fitted.run / "config.yaml").read_text())


def test_another_seed_gives_another_run(fitted, folder):
    main([*FIT, *QUIET, "--seed_everything=1"])
    assert not torch.equal(weights_of(RUN)["net.conv1.weight"], weights_of(fitted.run)["net.conv1.weight"])


def test_loggers_and_callbacks_do_not_change_the_numbers(folder):
    """Though the net draws random numbers."""
    main([*BRIEF, DROPPING, "--tensorboard={}", "--graph={}", "--test_pictures={}"])
    main([*BRIEF, DROPPING, "--histograms=null", "--lr_monitor=null", "--progress_bar=null"])
    assert_same_run(RUN, RUNS / "version_1")


AUGMENTED = ["--data.augment+=kornia.augmentation.RandomAffine", "--data.augment.degrees=15", "--data.augment.p=1"]
OTHER = ["--model.net=StackCNN", "--model.net.channels=[4, 8, 8]", "--model.channels_last=false"]
OTHER += ["--trainer.precision=bf16-mixed"]


@pytest.mark.parametrize(
    "settings", [[*AUGMENTED, DROPPING, "--model.label_smoothing=0.1"], OTHER], ids=["random", "other arithmetic"]
)
def test_a_run_with_other_settings_can_be_repeated_and_resumed(folder, settings):
    settings = [*settings, CONSTANT]
    main([*BRIEF, *settings])
    main(["fit", f"--config={RUN}/config.yaml"])
    main([*BRIEF, *settings, "--trainer.max_epochs=1"])
    main([*BRIEF, *settings, "--ckpt_path=last"])
    for other in ("version_1", "version_3"):
        assert_same_run(RUNS / other, RUN)


def test_a_resumed_run_ends_like_the_uninterrupted_one(folder):
    """The best epoch lies before the interruption, since the schedule makes the loss grow after it."""
    schedule = ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=2", "--model.lr_scheduler.gamma=100"]
    settings = [*FOUR, DROPPING, *schedule]
    main(settings)
    main([*settings, "--trainer.max_epochs=2"])
    (RUNS / "version_1").rename("moved")
    cli = main([*settings, "--ckpt_path=moved/checkpoints/last.ckpt"])
    assert cli.trainer.current_epoch == 4
    resumed = RUNS / "version_1"
    assert_same_run(resumed, RUN)
    best = metrics_of(resumed)["best_checkpoint"]
    assert (resumed / best).is_file() and int(best.partition("epoch")[2][:2]) < 2


def test_last_and_best_are_those_of_the_newest_run(folder):
    main([*FOUR, "--trainer.max_epochs=2"])
    main([*FOUR, "--ckpt_path=last"])
    resumed = RUNS / "version_1"
    # A resumed run's config stands alone, like any other.
    assert f"{RUN}/checkpoints/last.ckpt" in (resumed / "config.yaml").read_text().splitlines()[0]
    RUN.rename("elsewhere")
    main(["fit", f"--config={resumed}/config.yaml"])
    assert_same_run(RUNS / "version_2", resumed)
    found = main(["test", f"--config={resumed}/config.yaml"]).trainer.callback_metrics
    assert found["test/acc"].item() == metrics_of(resumed)["test/acc"]


def test_a_resumed_run_stops_early_where_the_uninterrupted_one_does(folder):
    settings = [*FOUR, "--trainer.max_epochs=12", "--early_stopping.patience=3", "--model.optimizer.lr=1e-4"]
    settings.append("--early_stopping.min_delta=0.01")
    main(settings)  # the loss hardly changes, so that none of the epochs is better by min_delta
    main([*settings, "--trainer.max_epochs=2"])
    main([*settings, "--ckpt_path=last"])
    assert metrics_of(RUN)["epochs"] == 4
    assert_same_run(RUNS / "version_2", RUN)


def test_a_resumed_run_keeps_the_models_settings_and_takes_the_others(folder, capfd):
    main([*BRIEF, CONSTANT])
    last = [*BRIEF, CONSTANT, "--ckpt_path=last"]
    for setting in ("model.optimizer.lr=0.01", "model.optimizer=Adam", "model.lr_scheduler=ConstantLR"):
        assert setting.partition("=")[0] in error_of(capfd, *last, f"--{setting}")
    assert os.listdir(RUNS) == ["version_0"]
    cli = main([*last, "--trainer.max_epochs=3", "--early_stopping.patience=17"])
    assert cli.trainer.early_stopping_callback.patience == 17 and cli.trainer.global_step == 24


def test_a_run_can_be_resumed_from_a_checkpoint_within_an_epoch(folder):
    (folder / "steps.yaml").write_text(
        "trainer: {callbacks: {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 5, save_top_k: -1,"
        " dirpath: steps}}}"
    )
    main([*BRIEF, DROPPING, "--config=steps.yaml"])
    main([*BRIEF, DROPPING, "--ckpt_path=steps/epoch=0-step=5.ckpt"])
    assert_same_weights(RUNS / "version_1", RUN)
    assert len(list(Path("steps").iterdir())) == 3
