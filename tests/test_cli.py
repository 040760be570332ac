"""The command line: named callbacks and loggers, class paths, and one line for each mistake."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BASE, FIT, QUIET, REPO, error_of, main, metrics_of
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ModelSummary, ProgressBar
from torch import nn

from mnist_cnn import CNN, Histograms, LitClassifier
from mnist_cnn.errors import fail_unless_own

DEV = ["fit", *BASE, *QUIET, "--trainer.max_epochs=0", "--evaluate_best=false"]


def callbacks_of(cli, kind):
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]


def test_one_setting_of_one_callback(folder):
    cli = main([*DEV, "--early_stopping.patience=5", "--checkpoint.save_top_k=1", "--histograms=null"])
    (early_stopping,) = callbacks_of(cli, EarlyStopping)
    checkpoint, last = callbacks_of(cli, ModelCheckpoint)
    assert last.monitor is None
    assert (early_stopping.patience, early_stopping.monitor) == (5, "val/loss")
    assert (checkpoint.save_top_k, checkpoint.monitor) == (1, "val/loss")
    assert callbacks_of(cli, Histograms) == []


def test_overlay_changes_what_it_names_and_no_more(folder):
    (folder / "overlay.yaml").write_text(
        "early_stopping: null\nhistograms: {every_n_steps: 7}\nwandb: {project: digits}\n"
        "model: {init_args: {net: {init_args: {l1_chan: 5}}, optimizer: {init_args: {lr: 0.5}}}}\n"
    )
    cli = main(["fit", *BASE, "--config", "overlay.yaml", "--trainer.fast_dev_run=true"])
    assert callbacks_of(cli, EarlyStopping) == []
    assert callbacks_of(cli, Histograms)[0].every_n_steps == 7
    assert cli.config_init.fit.wandb.name == "digits"  # Lightning calls the project its logger's name
    assert cli.model.net.conv1.out_channels == 5 and cli.model.net.conv2.out_channels == 8
    group = cli.trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)


def test_trainer_callbacks_are_added(folder):
    (folder / "list.yaml").write_text(
        "trainer: {callbacks: [{class_path: ModelSummary}, {class_path: EarlyStopping, init_args: {monitor: val/acc}}],"
        " enable_model_summary: null}"
    )
    cli = main([*DEV, "--config", "list.yaml"])
    assert len(callbacks_of(cli, ModelSummary)) == 1
    assert [callback.monitor for callback in callbacks_of(cli, EarlyStopping)] == ["val/acc", "val/loss"]
    assert len(callbacks_of(cli, ModelCheckpoint)) == 2


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_another_progress_bar(folder, bar):
    for option in ("trainer.callbacks", "progress_bar"):
        (used,) = callbacks_of(main([*DEV, f"--{option}={bar}"]), ProgressBar)
        assert type(used).__name__ == bar


def test_null_switches_off_what_lightning_would_replace(folder):
    cli = main([*FIT, *QUIET, "--checkpoint=null", "--last_checkpoint=null", "--progress_bar=null"])
    assert callbacks_of(cli, ModelCheckpoint) == callbacks_of(cli, ProgressBar) == []
    assert list(folder.rglob("*.ckpt")) == []


def test_a_run_goes_where_it_is_told_and_its_rerun_does_not(folder, capfd):
    main([*FIT, *QUIET, "--run_dir=some/where"])
    assert {"config.yaml", "metrics.json", "checkpoints"} <= set(os.listdir("some/where"))
    assert not Path("logs").exists()
    assert "some/where holds a run already" in error_of(capfd, *FIT, *QUIET, "--run_dir=some/where")
    main(["fit", "--config=some/where/config.yaml"])
    assert Path("logs/mnist/version_0/metrics.json").exists()
    error_of(capfd, *FIT, *QUIET, "--run_dir=other/place", "--data.batch_size=60000")
    assert not Path("other").exists()


def test_a_run_leaves_no_setting_to_the_next(folder):
    main([*DEV, "--seed_everything=7", "--num_threads=1"])
    assert os.environ["PL_GLOBAL_SEED"] == "7" and torch.get_num_threads() == 1
    cli = main([*DEV, "--seed_everything=false"])
    assert "PL_GLOBAL_SEED" not in os.environ and torch.get_num_threads() == 2  # as base.yaml says
    saved = yaml.safe_load((cli.run_dir / "config.yaml").read_text())
    assert saved["num_threads"] == 2


def test_barebones_and_other_precisions(folder):
    cli = main(["fit", *BASE, "--trainer.barebones=true", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"])
    assert cli.trainer.global_step == 3
    for precision in ("64-true", "bf16-true"):
        assert main([*FIT, f"--trainer.precision={precision}"]).trainer.global_step == 40


FOREIGN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Regression(LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.lr = lr
    def step(self, batch, name):
        loss = nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        self.log(name, loss)
        return loss
    def training_step(self, batch, batch_idx): return self.step(batch, "train/loss")
    def validation_step(self, batch, batch_idx): self.step(batch, "val/loss")
    def test_step(self, batch, batch_idx): return self.step(batch, "test/loss")
    def predict_step(self, batch, batch_idx): return self.layer(batch[0])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), self.lr)

class Points(LightningDataModule):
    def loader(self):
        x = torch.linspace(0, 1, 90).reshape(30, 3)
        return DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=10)
    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader
"""


def test_another_kind_of_model_and_data(folder, monkeypatch):
    (folder / "foreign.py").write_text(FOREIGN)
    (folder / "foreign.yaml").write_text("model: foreign.Regression\ndata: foreign.Points\ngraph: null\n")
    monkeypatch.syspath_prepend(folder)
    plain = ["--config", str(REPO / "configs/base.yaml"), "--config", "foreign.yaml", "--trainer.max_epochs=2"]
    cli = main(["fit", *plain])
    metrics = metrics_of(cli.run_dir)
    assert set(metrics) == {"val/loss", "test/loss", "epochs", "best_checkpoint"}
    main(["predict", *plain])
    lines = (folder / "predictions.csv").read_text().splitlines()
    assert lines[0] == "index,predicted,p0" and len(lines) == 31


def test_no_logger_no_learning_rate_monitor(folder):
    assert callbacks_of(main([*DEV, "--trainer.logger=false"]), LearningRateMonitor) == []


def test_short_names_and_class_paths(folder, monkeypatch):
    (folder / "mine.py").write_text(
        "from torch import nn\n\n"
        "class Mine(nn.Sequential):\n"
        '    """A net of the user\'s own."""\n\n'
        "    def __init__(self, width: int = 3):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, width), nn.Linear(width, 10))\n"
    )
    monkeypatch.syspath_prepend(folder)
    cli = main([*DEV, "--model.net=mine.Mine", "--model.net.width=4", "--model.optimizer=Adam"])
    assert cli.model.net[1].out_features == 4
    assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.1  # what both know is kept
    cli = main([*DEV, "--model.optimizer=torch.optim.AdamW", "--data.batch_size=128", "--data.val_size=100"])
    assert cli.datamodule.train_dataloader().batch_size == 128
    assert isinstance(cli.model.net, nn.Module)


def test_fault_within_a_class_keeps_its_traceback(folder, monkeypatch):
    (folder / "faulty.py").write_text(
        "from torch import nn\n\nclass Faulty(nn.Module):\n    def __init__(self):\n        self.width = undefined\n"
    )
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ValueError) as raised:
        main([*DEV, "--model.net=faulty.Faulty"])
    assert isinstance(raised.value.__cause__ or raised.value.__context__, NameError)


def test_help_and_printed_config_write_nothing_else(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*FIT, "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["net"]["class_path"] == "mnist_cnn.CNN"
    for args, text in [
        (["fit", "--help"], "--early_stopping"),
        (["fit", "--model.help=LitClassifier"], "cross-entropy"),
        (["fit", "--data.help=MNISTDataModule"], "held out"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 0
        assert text in capsys.readouterr().out
    assert list(folder.iterdir()) == []


GRIDS = {"sweep.yaml", "wandb_sweep.yaml"}  # of sweep.py and of W&B
CONFIGS = sorted({path.name for path in (REPO / "configs").glob("*.yaml")} - GRIDS)


@pytest.mark.parametrize("overlay", CONFIGS)
def test_every_config_parses(folder, overlay, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *BASE, "--config", str(REPO / "configs" / overlay), "--print_config"])
    assert ended.value.code == 0


MISTAKES = {
    # what is given: what the line must say
    "--modle.net=CNN": ["modle.net", "did you mean model"],
    "--trainer.max_epoch=3": ["trainer.max_epoch ", "did you mean trainer.max_epochs"],
    "--model.nett.l1_chan=3": ["model.nett.l1_chan", "did you mean net?"],
    "--model.net.l1_chn=3": ["model.net.l1_chn", "did you mean l1_chan"],
    "--model.optimizer.lrr=3": ["model.optimizer.lrr", "did you mean lr?"],
    "--early_stopping.patiense=3": ["early_stopping.patiense", "did you mean patience"],
    "--early_stoping=null": ["early_stoping", "did you mean early_stopping"],
    "--data.batch_size=many": ["data.batch_size", "int", "'many'"],
    "--model.net.l1_chan=4.5": ["model.net.l1_chan", "int", "'4.5'"],
    "--model.optimizer.lr=fast": ["model.optimizer.lr", "float", "'fast'"],
    "--trainer.max_epochs=many": ["trainer.max_epochs", "int", "'many'"],
    "--trainer.max_epochs=a": ["trainer.max_epochs: expected int, got 'a'"],
    "--model.net=CMN": ["model.net", "no class CMN", "did you mean CNN"],
    "--model.optimizer=Adamm": ["model.optimizer", "no class Adamm", "did you mean Adam"],
    "--model=nowhere.Model": ["model", "no module nowhere; is it installed?"],
    "--data.augment+=nowhere.Flip": ["data.augment", "no module nowhere; is it installed?"],
    "--data=MNISTData": ["data", "no class MNISTData", "did you mean MNISTDataModule"],
    "--data.dataset=MNISTT": ["data.dataset", "FashionMNIST", "'MNISTT'"],
    "--config=nowhere.yaml": ["no config file", "nowhere.yaml"],
    "--config=empty.yaml": ["empty.yaml", "is empty"],
    "--config=list.yaml": ["list.yaml", "holds no settings"],
    "--config=malformed.yaml": ["malformed.yaml", "not valid YAML"],
    "--config=binary.yaml": ["binary.yaml", "not valid YAML"],
    "--config=unknown.yaml": ["trainer.max_epoch", "did you mean trainer.max_epochs"],
    "--data.batch_size=0": ["batch_size must be at least 1, got 0"],
    "--data.batch_size=54001": ["less than one batch of 54001"],
    "--data.val_size=60001": ["val_size=60001", "60000"],
    "--data.val_size=1.5": ["val_size", "got 1.5"],
    "--data.val_size=-1": ["val_size", "got -1"],
    "--data.std=0": ["std must be above 0"],
    "--model.optimizer.lr=-0.1": ["Invalid learning rate: -0.1"],
    "--histograms.every_n_steps=0": ["every_n_steps must be at least 1"],
    "--model=CNN": ["model: CNN is a class of another kind"],
    "--model.net=null": ["model", "required: net"],
    "--model.net.l1_chan=0": ["widths must be at least 1, got 0"],
    "--model.lr_scheduler=OneCycleLR": ["max_lr"],
    "--early_stopping=false": ["early_stopping", "null switches it off"],
    "--early_stopping.mode=least": ["mode", "least"],
    "--trainer.logger=TensorBordLogger": ["no class TensorBordLogger", "did you mean TensorBoardLogger"],
    "--trainer.callbacks=[EarlyStopping]": ["trainer.callbacks", "monitor"],
    "--trainer.devices=abc": ["devices"],
    "--num_threads=0": ["num_threads", "v>0"],
    "--num_threads=1000000000000000000000": ["num_threads", "v<=1024"],
    "--model.optimizer=os.system": ["model.optimizer: os.system is nothing that a config may name"],
    "--trainer.callbacks=[builtins.exec]": ["trainer.callbacks: builtins.exec is nothing that a config may name"],
    "--model.optimizer=[1]": ["model.optimizer", "import path", "[1]"],
    "--model.net=torch.nn.Identity": ["optimizer got an empty parameter list"],
    "--config=number.yaml": ["histograms: Not a valid subclass of Histograms, got '3'"],
    "--config=null.yaml": ["MNISTDataModule: ", "NoneType"],
    "--seed_everything=-1": ["seed_everything", "-1"],
    "--test_pictures.num_worst=0": ["num_worst must be at least 1"],
    "--trainer.accelerator=tpu": ["torch_xla"],
    "--trainer.max_epochs=-3": ["max_epochs", "-3"],
    "--ckpt_path=nowhere.ckpt": ["no checkpoint nowhere.ckpt"],
    "--ckpt_path=last": ["there is no run with a checkpoint in logs/mnist"],
    "--ckpt_path=truncated.ckpt": ["checkpoint truncated.ckpt", "can't be read"],
    "--ckpt_path=other.ckpt": [
        "checkpoint other.ckpt is of another net",
        "net.conv1.weight",
        "(8, 1, 3, 3)",
        "(4, 1, 3, 3)",
    ],
    "--ckpt_path=list.ckpt": ["list.ckpt is no checkpoint"],
    "--ckpt_path=weights.ckpt": ["checkpoint weights.ckpt holds weights only"],
    "--ckpt_path=code.ckpt": ["checkpoint code.ckpt", "more than tensors"],
    "--data.data_dir=damaged": ["train-images-idx3-ubyte.gz is damaged"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_leaves_nothing(folder, capfd, mistake):
    (folder / "empty.yaml").write_text("")
    (folder / "list.yaml").write_text("- model")
    (folder / "malformed.yaml").write_text("model: [")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (folder / "number.yaml").write_text("histograms: 3")
    (folder / "null.yaml").write_text("data: {init_args: {batch_size: null}}")
    (folder / "unknown.yaml").write_text("trainer: {max_epoch: 3}")
    if "ckpt" in mistake:
        main([*FIT, *QUIET, "--model.net.l1_chan=8", "--trainer.default_root_dir=other"])
        good = folder / "other/version_0/checkpoints/last.ckpt"
        good.rename(folder / "other.ckpt")
        (folder / "truncated.ckpt").write_bytes((folder / "other.ckpt").read_bytes()[:-500])
        torch.save({"state_dict": Unpickled()}, folder / "code.ckpt")
        torch.save([1, 2], folder / "list.ckpt")
        torch.save({"state_dict": LitClassifier(CNN(), torch.optim.SGD).state_dict()}, folder / "weights.ckpt")
    if mistake == "--data.data_dir=damaged":
        raw = folder / "damaged/MNIST/raw"
        raw.mkdir(parents=True)
        (raw / "train-images-idx3-ubyte.gz").write_bytes(b"no archive")
    line = error_of(capfd, *FIT, mistake)
    for part in MISTAKES[mistake]:
        assert part in line, line
    assert not (folder / "logs").exists()
    assert not (folder / "executed").exists()


class Unpickled:
    """Runs code when it is unpickled, as a malicious checkpoint would."""

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path("executed"),)


@pytest.mark.parametrize("args", [[], ["fut"], ["fit"]])
def test_incomplete_command(folder, capfd, args):
    assert "fit" in error_of(capfd, *args)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_needs_a_run(folder, capfd, stage):
    assert "there is no run with a checkpoint in logs/mnist" in error_of(capfd, stage, *BASE)


def test_best_of_a_run_that_did_not_end(folder, capfd):
    main([*FIT, *QUIET, "--evaluate_best=false"])
    assert "--ckpt_path=last" in error_of(capfd, "test", *BASE, "--ckpt_path=best")
    cli = main(["test", *BASE, "--ckpt_path=last", "--trainer.limit_test_batches=1"])
    assert set(cli.trainer.callback_metrics) == {"test/loss", "test/acc"}


def test_folder_that_holds_a_run_is_left_alone(folder, capfd):
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.version=mine"]
    main([*FIT, *logger])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "holds a run already" in error_of(capfd, *FIT, *logger, "--model.net.l1_chan=5")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("key", ["early_stopping.monitor", "checkpoint.monitor"])
def test_monitor_that_nobody_logs(folder, capfd, key):
    line = error_of(capfd, *FIT, f"--{key}=val/los")
    assert ("val/los" in line and "`val/loss`" in line) or "'val/loss'" in line


OF_EACH_STEP = """
from lightning.pytorch import Callback

class Counting(Callback):
    steps = 0

    def on_train_batch_end(self, *args):
        self.steps += 1

class Inheriting(Counting):
    pass

class Assigning(Callback):
    def __init__(self):
        self.steps = 0
        self.on_train_batch_end = self.count

    def count(self, *args):
        self.steps += 1
"""


def test_hooks_that_do_something_are_called_at_each_step(folder, monkeypatch):
    (folder / "counting.py").write_text(OF_EACH_STEP)
    monkeypatch.syspath_prepend(folder)
    own = [f"--trainer.callbacks+=counting.{name}" for name in ("Counting", "Inheriting", "Assigning")]
    cli = main([*FIT, *QUIET, *own])
    counting = [callback for callback in cli.trainer.callbacks if hasattr(callback, "steps")]
    assert [callback.steps for callback in counting] == [40, 40, 40]
    assert [callback.on_before_zero_grad for callback in counting] == 3 * [None]  # nothing to call


def test_a_circle_of_exceptions_is_told(capfd):
    """As they come from code that raises the same exception once more."""
    one, other = OSError("one"), OSError("other")
    one.__cause__, other.__context__ = other, one
    with pytest.raises(SystemExit):
        fail_unless_own(one)
    assert capfd.readouterr().err == "error: OSError: one (JSONARGPARSE_DEBUG=1 shows the traceback)\n"
