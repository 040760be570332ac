"""The same YAML gives the same numbers, to the last digit, in fresh processes and after an interruption."""

import pytest
import torch
import yaml
from conftest import FIT, QUIET, assert_same_weights, error_of, in_new_process, main, metrics_of, weights_of

FOUR = [*FIT, *QUIET, "--trainer.max_epochs=4", "--early_stopping.patience=10"]


NET_WITH_DROPOUT = """
from torch import nn

class Dropping(nn.Sequential):
    def __init__(self, p: float = 0.5):
        super().__init__(nn.Flatten(), nn.Dropout(p), nn.Linear(784, 10))
"""


def test_config_printed_config_and_saved_config_give_the_same_run(folder):
    in_new_process(*FIT)
    runs = folder / "logs/mnist"
    printed = in_new_process(*FIT, "--print_config").stdout
    (folder / "printed.yaml").write_text(printed)
    in_new_process(*FIT)
    in_new_process("fit", "--config", "printed.yaml")
    in_new_process("fit", "--config", str(runs / "version_0/config.yaml"))
    for other in ("version_1", "version_2", "version_3"):
        assert metrics_of(runs / other) == metrics_of(runs / "version_0")
        assert_same_weights(runs / other, runs / "version_0")
        config = yaml.safe_load((runs / other / "config.yaml").read_text())
        assert config == yaml.safe_load((runs / "version_0/config.yaml").read_text())


AUGMENTED = ["--data.augment+=kornia.augmentation.RandomAffine", "--data.augment.degrees=15", "--data.augment.p=1"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([*AUGMENTED, "--model.label_smoothing=0.1"], id="augment"),
        pytest.param(["--model.net=StackCNN", "--model.channels_last=true"], id="channels_last"),
        pytest.param(["--trainer.precision=bf16-mixed"], id="precision"),
        pytest.param(["--num_threads=1"], id="threads"),
    ],
)
def test_run_with_other_settings_can_be_repeated_and_resumed(folder, settings):
    args = [*FIT, *QUIET, *settings]
    main(args)
    main(["fit", "--config=logs/mnist/version_0/config.yaml"])
    main([*args, "--trainer.max_epochs=1"])
    main([*args, "--ckpt_path=logs/mnist/version_2/checkpoints/last.ckpt"])
    main([*FIT, *QUIET])
    runs = [folder / f"logs/mnist/version_{n}" for n in range(5)]
    for other in (runs[1], runs[3]):
        assert_same_weights(other, runs[0])
    ours, plain = weights_of(runs[0]), weights_of(runs[4])
    assert ours.keys() != plain.keys() or not all(torch.equal(ours[name], plain[name]) for name in plain)


def test_checkpoint_of_a_class_with_fewer_settings_can_be_resumed(folder):
    main([*FIT, *QUIET, "--trainer.max_epochs=1"])
    last = folder / "logs/mnist/version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["hyper_parameters"]["channels_last"]
    torch.save(checkpoint, last)
    main([*FIT, *QUIET, f"--ckpt_path={last}"])
    assert metrics_of(folder / "logs/mnist/version_1")["epochs"] == 2


def test_another_seed_gives_another_run(folder):
    main([*FIT, *QUIET])
    main([*FIT, *QUIET, "--seed_everything=1"])
    ours, theirs = (weights_of(folder / f"logs/mnist/version_{n}") for n in (0, 1))
    assert not torch.equal(ours["net.conv1.weight"], theirs["net.conv1.weight"])


@pytest.mark.parametrize("net", ["CNN", "dropping.Dropping"])
def test_loggers_and_callbacks_do_not_change_the_numbers(folder, monkeypatch, net):
    (folder / "dropping.py").write_text(NET_WITH_DROPOUT)
    monkeypatch.syspath_prepend(folder)
    main([*FIT, f"--model.net={net}"])
    main(
        [
            *FIT,
            *QUIET,
            f"--model.net={net}",
            "--histograms=null",
            "--graph=null",
            "--lr_monitor=null",
            "--test_pictures=null",
        ]
    )
    ours, theirs = (folder / f"logs/mnist/version_{n}" for n in (0, 1))
    assert metrics_of(ours) == metrics_of(theirs)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("net", ["CNN", "dropping.Dropping"])
@pytest.mark.parametrize("where", ["same folder", "another folder"])
def test_resumed_run_ends_like_the_uninterrupted_one(folder, monkeypatch, net, where):
    """The best epoch lies before the interruption, since the learning rate makes the loss grow after it."""
    (folder / "dropping.py").write_text(NET_WITH_DROPOUT)
    monkeypatch.syspath_prepend(folder)
    settings = [*FOUR, f"--model.net={net}"]
    if where == "another folder":
        settings += ["--model.optimizer.lr=0.5"]  # the last epochs are worse, so that none of them is kept as best
    main(settings)
    runs = folder / "logs/mnist"
    main([*settings, "--trainer.max_epochs=2"])
    if where == "another folder":
        (runs / "version_1").rename(folder / "moved")
        checkpoint = "moved/checkpoints/last.ckpt"
        resumed = runs / "version_1"
    else:
        checkpoint = "logs/mnist/version_1/checkpoints/last.ckpt"
        resumed = runs / "version_2"
    cli = main([*settings, f"--ckpt_path={checkpoint}"])
    assert cli.trainer.current_epoch == 4
    assert metrics_of(resumed) == metrics_of(runs / "version_0")
    assert_same_weights(resumed, runs / "version_0")
    best = metrics_of(resumed)["best_checkpoint"]
    assert (resumed / best).is_file()


def test_last_and_best_are_those_of_the_newest_run(folder):
    main([*FOUR, "--trainer.max_epochs=2"])
    main([*FOUR, "--ckpt_path=last"])
    main(FOUR)
    runs = folder / "logs/mnist"
    assert_same_weights(runs / "version_1", runs / "version_2")
    # A resumed run's config stands alone, like any other.
    text = (runs / "version_1/config.yaml").read_text()
    assert text.startswith("# resumed from logs/mnist/version_0/checkpoints/last.ckpt")
    (runs / "version_0").rename(folder / "elsewhere")
    main(["fit", f"--config={runs / 'version_1/config.yaml'}"])
    assert metrics_of(runs / "version_3") == metrics_of(runs / "version_1")
    best = main(["test", f"--config={runs / 'version_1/config.yaml'}"]).trainer.callback_metrics
    assert best["test/acc"].item() == metrics_of(runs / "version_1")["test/acc"]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_run_stops_early_where_the_uninterrupted_one_does(folder, stop):
    settings = [*FOUR, "--trainer.max_epochs=20", "--early_stopping.patience=2", "--model.optimizer.lr=0.5"]
    main(settings)
    main([*settings, f"--trainer.max_epochs={stop}"])
    main([*settings, "--ckpt_path=last"])
    runs = folder / "logs/mnist"
    assert metrics_of(runs / "version_1")["epochs"] == stop < metrics_of(runs / "version_0")["epochs"] < 20
    assert metrics_of(runs / "version_2") == metrics_of(runs / "version_0")
    assert_same_weights(runs / "version_2", runs / "version_0")


@pytest.mark.parametrize(
    "setting", ["model.optimizer.lr=0.01", "model.optimizer=Adam", "model.lr_scheduler=ConstantLR"]
)
def test_resumed_run_refuses_other_settings_of_the_model(folder, capfd, setting):
    main([*FOUR, "--trainer.max_epochs=1"])
    line = error_of(capfd, *FOUR, "--ckpt_path=last", f"--{setting}")
    assert setting.partition("=")[0] in line and "was made with" in line
    assert sorted(path.name for path in (folder / "logs/mnist").iterdir()) == ["version_0"]


def test_resumed_run_takes_the_new_patience(folder):
    main([*FOUR, "--trainer.max_epochs=1"])
    cli = main([*FOUR, "--ckpt_path=last", "--early_stopping.patience=17"])
    assert cli.trainer.early_stopping_callback.patience == 17


def test_run_can_be_resumed_within_an_epoch(folder):
    (folder / "steps.yaml").write_text(
        "trainer: {callbacks: {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 7, save_top_k: -1,"
        " dirpath: steps}}}"
    )
    main([*FOUR, "--config=steps.yaml", "--trainer.max_epochs=1"])
    cli = main([*FOUR, "--ckpt_path=steps/epoch=0-step=7.ckpt"])
    assert cli.trainer.global_step == 80
