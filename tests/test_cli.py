"""The command line: named callbacks and loggers, class paths, and one line for each mistake."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BASE, BRIEF, FIT, QUIET, REPO, RUN, RUNS, SMALL, callback_of, error_of, main, printed_config
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ModelSummary, ProgressBar

DEV = ["fit", *BASE, *QUIET, "--trainer.max_epochs=0", "--evaluate_best=false"]


def callbacks_of(cli, kind):
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]


# The parts of a command


def test_options_without_a_subcommand_mean_fit(folder, capfd):
    assert printed_config(capfd, *BASE) == printed_config(capfd, "fit", *BASE)
    main(BRIEF[1:])
    assert (RUN / "metrics.json").exists()


def test_a_subcommand_behind_options_is_found(fitted, folder):
    cli = main([fitted.config, "test", "--trainer.limit_test_batches=1"])
    assert set(cli.trainer.callback_metrics) == {"test/loss", "test/acc"}


@pytest.mark.parametrize(("args", "part"), [(["fut"], "fit"), (["fit"], "model"), (["fit", "test", *BASE], "test")])
def test_incomplete_command(folder, capfd, args, part):
    assert part in error_of(capfd, *args)


def test_help_and_printed_config_write_nothing_else(folder, capfd):
    config = yaml.safe_load(printed_config(capfd, *FIT))
    assert config["model"]["init_args"]["net"]["class_path"] == "mnist_cnn.CNN"
    for args, text in [
        (["fit", "--help"], "--early_stopping"),
        (["fit", "--model.help=LitClassifier"], "label_smoothing"),
        (["fit", "--data.help=MNISTDataModule"], "val_size"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 0
        assert text in capfd.readouterr().out
    assert list(folder.iterdir()) == []


GRIDS = {"search.yaml", "sweep.yaml", "wandb_sweep.yaml"}  # of sweep.py and of W&B
CONFIGS = sorted({path.name for path in (REPO / "configs").glob("*.yaml")} - GRIDS - {"gpt_text.yaml"})


def leaves(node, key=""):
    """Each value of a config by its key; a class's is its name."""
    if not isinstance(node, dict | list):
        yield key, node
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from leaves(value, key if name in ("class_path", "init_args") else f"{key}.{name}")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_parses_and_wins_over_base(folder, name, capfd):
    path = REPO / "configs" / name
    printed = dict(leaves(yaml.safe_load(printed_config(capfd, "fit", *BASE, "--config", str(path)))))
    given = dict(leaves(yaml.safe_load(path.read_text())))
    assert len(given) >= 1
    for key, value in given.items():
        assert printed[key] == value or printed[key].endswith(f".{value}"), key  # classes have their modules' names


# Callbacks and loggers by name


def test_one_setting_of_one_callback(folder):
    cli = main([*DEV, "--early_stopping.patience=5", "--checkpoint.save_top_k=1", "--histograms=null"])
    (early_stopping,) = callbacks_of(cli, EarlyStopping)
    checkpoint, last = callbacks_of(cli, ModelCheckpoint)
    assert last.monitor is None
    assert (early_stopping.patience, early_stopping.monitor) == (5, "val/loss")
    assert (checkpoint.save_top_k, checkpoint.monitor) == (1, "val/loss")
    assert "Histograms" not in [type(callback).__name__ for callback in cli.trainer.callbacks]


def test_overlay_changes_what_it_names_and_no_more(folder):
    (folder / "overlay.yaml").write_text(
        "early_stopping: null\nhistograms: {every_n_steps: 7}\nwandb: {project: digits}\n"
        "model: {init_args: {net: {init_args: {l1_chan: 5}}, optimizer: {init_args: {lr: 0.5}}}}\n"
    )
    cli = main(["fit", *BASE, "--config", "overlay.yaml", "--trainer.fast_dev_run=true"])
    assert sorted(path.name for path in folder.iterdir()) == ["overlay.yaml"]  # fast_dev_run leaves nothing
    assert callbacks_of(cli, EarlyStopping) == []
    assert callback_of(cli, "Histograms").every_n_steps == 7
    assert cli.config_init.fit.wandb.name == "digits"  # Lightning calls the project its logger's name
    assert cli.model.net.conv1.out_channels == 5 and cli.model.net.conv2.out_channels == 24
    group = cli.trainer.optimizers[0].param_groups[0]
    assert (group["initial_lr"], group["momentum"]) == (0.5, 0.9)


def test_options_override_files_that_follow_them(folder, capfd):
    (folder / "overlay.yaml").write_text("num_threads: 3\nseed_everything: 7\n")
    for file in (["--config=overlay.yaml"], ["--config", "overlay.yaml"]):
        config = yaml.safe_load(printed_config(capfd, "fit", "--num_threads=5", *BASE, *file))
        assert (config["num_threads"], config["seed_everything"]) == (5, 7)


def test_none_and_the_home_folder(folder, capfd):
    (folder / "overlay.yaml").write_text("early_stopping: None\ndata: {init_args: {predict_dir: ~/digits}}\n")
    home, given = os.path.expanduser("~/digits"), ["--early_stopping=None", "--data.predict_dir=~/digits"]
    for args in (["--config=overlay.yaml"], given, [*given[:1], "--data.predict_dir", "~/digits"]):
        config = yaml.safe_load(printed_config(capfd, "fit", *BASE, *args))
        assert config["early_stopping"] is None and config["data"]["init_args"]["predict_dir"] == home


OWN = """
from lightning.pytorch import Callback

class Counting(Callback):
    steps = 0

    def on_train_batch_end(self, *args):
        self.steps += 1
"""


def test_callbacks_of_the_trainer_are_added_and_called(folder):
    (folder / "counting.py").write_text(OWN)
    (folder / "list.yaml").write_text(
        "trainer: {callbacks: [{class_path: ModelSummary}, {class_path: EarlyStopping, init_args: {monitor: val/acc}},"
        " {class_path: counting.Counting}], enable_model_summary: null}"
    )
    cli = main([*BRIEF, "--config", "list.yaml"])
    assert callback_of(cli, "Counting").steps == 16
    assert len(callbacks_of(cli, ModelSummary)) == 1
    assert [callback.monitor for callback in callbacks_of(cli, EarlyStopping)] == ["val/loss", "val/acc"]
    assert len(callbacks_of(cli, ModelCheckpoint)) == 2


@pytest.mark.parametrize("option", ["trainer.callbacks", "progress_bar"])
def test_another_progress_bar(folder, option):
    (used,) = callbacks_of(main([*DEV, f"--{option}=RichProgressBar"]), ProgressBar)
    assert type(used).__name__ == "RichProgressBar"


def test_null_switches_off_what_lightning_would_replace(folder):
    off = ["--checkpoint=null", "--last_checkpoint=null", "--progress_bar=null", "--trainer.logger=false"]
    cli = main([*BRIEF, *off])
    assert [callbacks_of(cli, kind) for kind in (ModelCheckpoint, ProgressBar, LearningRateMonitor)] == [[], [], []]
    assert list(folder.rglob("*.ckpt")) == []


# Settings and classes


def test_a_run_leaves_no_setting_to_the_next(folder):
    main([*DEV, "--seed_everything=7", "--num_threads=2"])
    assert os.environ["PL_GLOBAL_SEED"] == "7" and torch.get_num_threads() == 2
    main([*DEV, "--seed_everything=false"])
    assert "PL_GLOBAL_SEED" not in os.environ and torch.get_num_threads() == 1
    assert yaml.safe_load(Path("logs/mnist/version_1/config.yaml").read_text())["num_threads"] == 1


def test_another_precision(folder):
    cli = main([*BRIEF, "--trainer.precision=bf16-true"])
    assert cli.trainer.global_step == 16 and cli.model.net.conv1.weight.dtype == torch.bfloat16


OTHERS = """
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

class Others(BoringModel):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.lr = lr

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.step(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)
"""


def test_another_kind_of_model_and_data(folder):
    (folder / "others.py").write_text(OTHERS)
    (folder / "others.yaml").write_text("model: others.Others\ndata: others.BoringDataModule\ngraph: null\n")
    plain = [*BASE[:2], "--config", "others.yaml", "--trainer.max_epochs=2", "--wandb=null"]
    main(["fit", *plain])
    metrics = yaml.safe_load((RUN / "metrics.json").read_text())
    assert set(metrics) == {"val/loss", "test/loss", "epochs", "seconds", "best_checkpoint"}
    main(["predict", *plain])
    lines = (folder / "predictions.csv").read_text().splitlines()
    assert lines[0] == "index,predicted,p0,p1" and len(lines) == 65


def test_short_names_and_class_paths(folder):
    (folder / "mine.py").write_text(
        "from torch import nn\n\n"
        "class Mine(nn.Sequential):\n"
        '    """A net of the user\'s own."""\n\n'
        "    def __init__(self, width: int = 3):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, width), nn.Linear(width, 10))\n"
    )
    cli = main([*DEV, "--model.net=mine.Mine", "--model.net.width=4", "--model.optimizer=Adam"])
    assert cli.model.net[1].out_features == 4
    assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.1  # what both know is kept


def test_a_fault_within_a_users_class_keeps_its_traceback(folder):
    (folder / "faulty.py").write_text(
        "from torch import nn\n\nclass Building(nn.Module):\n    def __init__(self):\n        self.width = undefined\n"
        "class Running(nn.Linear):\n    def __init__(self):\n        super().__init__(784, 10)\n\n"
        "    def forward(self, images):\n        return super().forward(images.flatten(1, 5))\n"
    )
    with pytest.raises(NameError):
        main([*DEV, "--model.net=faulty.Building"])
    with pytest.raises(IndexError) as raised:
        main([*BRIEF, "--model.net=faulty.Running"])
    assert raised.traceback[-1].path.name == "faulty.py" or "faulty.py" in [t.path.name for t in raised.traceback]
    assert not Path("logs").exists()  # it ended before its first step


# Mistakes

MISTAKES = {
    # what is given: what the line must say
    "--modle.net=CNN": ["modle.net", "did you mean model"],
    "--trainer.max_epoch=3": ["trainer.max_epoch ", "did you mean trainer.max_epochs"],
    "--trainr.max_epochs=3": ["trainr.max_epochs", "did you mean trainer.max_epochs?"],
    "--early_stoping.patience=3": ["early_stoping.patience", "did you mean early_stopping.patience?"],
    "--model.nett.l1_chan=3": ["model.nett.l1_chan", "did you mean model.net.l1_chan?"],
    "--model.net.l1_chn=3": ["model.net.l1_chn", "did you mean model.net.l1_chan?"],
    "--early_stopping.patiense=3": ["early_stopping.patiense", "did you mean early_stopping.patience?"],
    "--model.lr_scheduler.step_size=2": ["model.lr_scheduler.step_size", "class must stand before it"],
    "--trainer.callbacks=[ModelCheckpoint]": ["last_checkpoint", "--last_checkpoint=null"],
    "--trainer.callbacks=BatchSizeFinder": ["BatchSizeFinder", "config.yaml"],
    "--trainer.callbacks=LearningRateFinder": ["LearningRateFinder", "config.yaml"],
    "--trainer.strategy=ddp_spawn": ["--trainer.strategy=ddp"],
    "--trainer.strategy=ddp_fork": ["--trainer.strategy=ddp"],
    "--config=twice.yaml": ["twice.yaml", "line 1", "trainer"],
    "--data=twice_within.yaml": ["line 1", "data_dir"],
    "--config=variable.yaml": ["variable.yaml", "${HOME}/data"],
    "--data.data_dir=${HOME}/data": ["${HOME}/data", "nothing replaces"],
    "--config=unknown_empty.yaml": ["unknown_empty.yaml", "histogrms", "did you mean histograms?"],
    "--config=unknown_null.yaml": ["unknown_null.yaml", "did you mean early_stopping?"],
    "--config=unknown.yaml": ["trainer.max_epoch", "did you mean trainer.max_epochs"],
    "--model.optimizer.lr=fast": ["model.optimizer.lr", "float", "fast"],
    "--trainer.max_epochs=a": ["trainer.max_epochs", "int", "'a'"],
    "--model.net=CNNN": ["model.net", "CNNN", "did you mean CNN"],  # CMN is as near to PyTorch Geometric's GCN
    "--model.optimizer=Adamm": ["model.optimizer", "Adamm", "did you mean Adam"],
    "--trainer.logger=TensorBordLogger": ["TensorBordLogger", "did you mean TensorBoardLogger"],
    "--model=nowhere.Model": ["model", "nowhere"],
    "--model=CNN": ["model", "CNN"],
    "--data.dataset=MNISTT": ["data.dataset", "FashionMNIST", "MNISTT"],
    "--config=nowhere.yaml": ["nowhere.yaml"],
    "--config=empty.yaml": ["empty.yaml"],
    "--config=list.yaml": ["list.yaml"],
    "--config=malformed.yaml": ["malformed.yaml", "line 2"],
    "--config=binary.yaml": ["binary.yaml"],
    "--config=tag.yaml": ["tag.yaml"],
    "--config=number.yaml": ["histograms", "3"],
    "--data.batch_size=0": ["data.batch_size", "v>0"],
    "--data.batch_size=54001": ["54001"],
    "--data.val_size=60001": ["val_size", "60001", "60000"],
    "--data.std=0": ["data.std", "v>0"],
    "--model.label_smoothing=1.1": ["label_smoothing", "1.1"],
    "--model.optimizer.lr=-0.1": ["learning rate", "-0.1"],
    "--histograms.every_n_steps=0": ["histograms.every_n_steps", "v>0"],
    "--model.net=null": ["net"],
    "--model.lr_scheduler=OneCycleLR": ["max_lr"],
    "--early_stopping=false": ["early_stopping", "null"],
    "--trainer.callbacks=[EarlyStopping]": ["trainer.callbacks", "monitor"],
    "--num_threads=0": ["num_threads", "0"],
    "--model.optimizer=os.system": ["model.optimizer", "os.system"],
    "--seed_everything=-1": ["-1 is not in bounds"],
    "--trainer.max_epochs=-3": ["max_epochs", "-3"],
    "--ckpt_path=nowhere.ckpt": ["nowhere.ckpt"],
    "--ckpt_path=last": ["checkpoint", "logs/mnist"],
    "--ckpt_path=truncated.ckpt": ["truncated.ckpt"],
    "--ckpt_path=other.ckpt": ["other.ckpt", "net.conv1.weight", "[8, 1, 3, 3]", "[4, 1, 3, 3]"],
    "--ckpt_path=list.ckpt": ["list.ckpt"],
    "--ckpt_path=weights.ckpt": ["weights.ckpt", "weights only"],
    "--ckpt_path=code.ckpt": ["code.ckpt", "--weights_only=false"],
}


class Unpickled:
    """Runs code when it is unpickled, as a malicious checkpoint would."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.fixture
def files(folder, request):
    """Files with a mistake each, as far as the test's parameter names them."""
    for name, content in {
        "empty": b"",
        "list": b"- model",
        "malformed": b"model: [",
        "binary": b"\xff\xfe\x00\x80",
        "tag": b"seed_everything: !!python/object/apply:os.mkdir [executed]",
        "number": b"histograms: 3",
        "unknown": b"trainer: {max_epoch: 3}",
        "unknown_empty": b"histogrms: {}",
        "unknown_null": b"early_stoping: null",
        "twice": b"trainer: {max_epochs: 3}\ntrainer: {max_steps: 3}",
        "twice_within": b"data_dir: a\ndata_dir: b",
        "variable": b"data: {init_args: {data_dir: '${HOME}/data'}}",
    }.items():
        (folder / f"{name}.yaml").write_bytes(content)
    if "ckpt" in request.node.name or "checkpoint" in request.node.name:
        good = request.getfixturevalue("fitted").run / "checkpoints/last.ckpt"
        (folder / "truncated.ckpt").write_bytes(good.read_bytes()[:-500])
        checkpoint = torch.load(good, weights_only=True)
        torch.save(checkpoint | {"state_dict": Unpickled()}, folder / "code.ckpt")
        torch.save([1, 2], folder / "list.ckpt")
        torch.save({"state_dict": checkpoint["state_dict"]}, folder / "weights.ckpt")
        checkpoint["state_dict"]["net.conv1.weight"] = torch.zeros(8, 1, 3, 3)
        torch.save(checkpoint, folder / "other.ckpt")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_leaves_nothing(files, capfd, mistake):
    before = sorted(files.iterdir())
    line = error_of(capfd, *FIT, *([] if "logger" in mistake else QUIET), mistake)
    for part in MISTAKES[mistake]:
        assert part in line, line
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("key", ["early_stopping.monitor", "checkpoint.monitor"])
def test_a_monitor_that_nobody_logs(folder, capfd, key):
    line = error_of(capfd, *BRIEF, "--trainer.log_every_n_steps=5", f"--{key}=val/los")
    change = f"change {key}, or give --{key.partition('.')[0]}=null"
    assert line == f"error: validation logs val/loss, val/acc, not val/los: {change}"


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_needs_a_checkpoint_that_is_data(files, capfd, stage):
    assert "logs/mnist" in error_of(capfd, stage, *BASE)
    assert "--weights_only=false" in error_of(capfd, stage, *BASE, "--ckpt_path=code.ckpt")
    assert not (files / "executed").exists()


# Run folders


def test_a_run_goes_where_it_is_told_and_its_rerun_does_not(folder, capfd):
    main([*BRIEF, "--run_dir=some/where"])
    assert {"config.yaml", "metrics.json", "checkpoints"} <= set(os.listdir("some/where"))
    assert not Path("logs").exists()
    before = {path: path.read_bytes() for path in Path("some").rglob("*") if path.is_file()}
    assert "some/where" in error_of(capfd, *BRIEF, "--run_dir=some/where", "--model.net.l1_chan=5")
    assert before == {path: path.read_bytes() for path in Path("some").rglob("*") if path.is_file()}
    main(["fit", "--config=some/where/config.yaml"])
    assert (RUN / "metrics.json").exists()


def test_a_failed_run_leaves_a_folder_that_was_there_as_it_was(folder, capfd):
    os.mkdir("found")
    Path("found/notes.txt").write_text("mine")
    for run_dir in ("found", "other/place"):
        error_of(capfd, *BRIEF, f"--run_dir={run_dir}", "--data.val_size=70000")
    assert sorted(map(str, Path().rglob("*"))) == ["found", "found/notes.txt"]


def test_a_file_in_place_of_the_runs_folder_is_named(folder, capfd):
    Path("logs").mkdir()
    RUNS.touch()
    assert "logs/mnist" in error_of(capfd, *BRIEF)
    assert "logs/mnist" in error_of(capfd, *BRIEF, "--run_dir=logs/mnist/mine")
    assert RUNS.read_bytes() == b""


def test_best_of_a_run_that_did_not_end(folder, capfd):
    main([*BRIEF, "--evaluate_best=false"])
    assert not (RUN / "metrics.json").exists() and (RUN / "config.yaml").exists()
    assert "--ckpt_path=last" in error_of(capfd, "test", *BASE, "--ckpt_path=best")
    cli = main(["test", *BASE, *SMALL, "--ckpt_path=last", "--trainer.limit_test_batches=1"])
    assert set(cli.trainer.callback_metrics) == {"test/loss", "test/acc"}
