"""Guards against numbers that would be silently wrong: most of them refuse a setting before the first step."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint

from mnist_cnn.run.config import flatten
from mnist_cnn.run.errors import UserError
from mnist_cnn.run.folder import reopen_cut_epoch


def check_callbacks(given: list[Callback], named: dict[str, Callback]) -> None:
    """Checks the callbacks of `trainer.callbacks` beside those that have a name."""
    for callback in given:
        kind = type(callback).__name__
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise UserError(f"{kind} changes a setting that config.yaml would not have: write what it finds into YAML")
        for name, other in named.items():  # a checkpoint could not tell their states apart
            if isinstance(callback, ModelCheckpoint | EarlyStopping) and callback.state_key == other.state_key:
                raise UserError(f"trainer.callbacks has {kind} like {name}: change --{name}.*, or give --{name}=null")


def check_resume(path: str, checkpoint: dict[str, Any], trainer: Trainer, hparams: dict[str, Any]) -> int:
    """Checks that training can go on, with the model's settings, which Lightning would keep; returns epochs so far."""
    if not checkpoint.get("optimizer_states"):
        raise UserError(f"checkpoint {path} has weights only: training cannot be resumed from it")
    saved, given = flatten(checkpoint.get("hyper_parameters")), flatten(hparams)
    for key in {**saved, **given} if "hyper_parameters" in checkpoint else ():
        if key and key[0] in hparams and saved.get(key) != given.get(key):  # the user's class may have saved others
            name = ".".join(part for part in ("model", *key) if part not in ("init_args", "class_path"))
            raise UserError(f"{path} has {name}={saved.get(key)}, not {given.get(key)}: a resumed run keeps this")
    reopen_cut_epoch(checkpoint)
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    limits = [("max_epochs", trainer.max_epochs, epochs), ("max_steps", trainer.max_steps, checkpoint["global_step"])]
    for callback in trainer.early_stopping_callbacks:
        waited = checkpoint["callbacks"].get(callback.state_key, {}).get("wait_count", 0)
        limits.append(("early_stopping.patience", callback.patience, waited))
    finished = (Path(path).absolute().parents[1] / "metrics.json").exists()  # else the evaluation is left
    for name, limit, reached in limits if finished else ():
        if limit is not None and -1 < limit <= reached:
            raise UserError(f"nothing left to train: {path} has reached {name}={limit}, after {epochs} epochs")
    return epochs


class MonitoredMetrics(Callback):
    """Checks before the first step that validation logs what is monitored; clears old metrics at each epoch's start."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if logged := list(trainer.callback_metrics):
            self.check(trainer, logged)

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if not sum(trainer.num_val_batches) and (trainer.val_dataloaders is not None or not trainer.limit_val_batches):
            self.check(trainer, [])  # there is no validation; it is not just unknown yet

    def check(self, trainer: Any, logged: list[str]) -> None:
        """Raises a UserError if a metric of validation that is in use is not one that it logs."""
        used = [("early_stopping.monitor", callback.monitor) for callback in trainer.early_stopping_callbacks]
        for callback in trainer.checkpoint_callbacks:
            used.append(("checkpoint.monitor", getattr(callback, "monitor", None)))
            fields = re.findall(r"{([^:}]+)", getattr(callback, "filename", None) or "")
            used += [("checkpoint.filename", field) for field in fields]
        schedules = [schedule for schedule in trainer.lr_scheduler_configs if schedule.reduce_on_plateau]
        used += [("model.lr_scheduler.monitor", schedule.monitor) for schedule in schedules]
        unknown = {key: metric for key, metric in used if re.match("val[/_i]", str(metric)) and metric not in logged}
        if unknown:
            found, metrics = ", ".join(logged) or "nothing", ", ".join(dict.fromkeys(unknown.values()))
            options = " ".join(f"--{name}=null" for name in dict.fromkeys(key.rpartition(".")[0] for key in unknown))
            raise UserError(f"validation logs {found}, not {metrics}: change {', '.join(unknown)}, or give {options}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.callback_metrics.clear()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Lets an epoch that max_steps cuts short end with a validation."""
        trainer.should_stop |= 0 < trainer.max_steps <= trainer.global_step
