"""A run's folder: how it is created, what is written into it, and how its checkpoints are found, checked and kept."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mnist_cnn.run.config import flatten
from mnist_cnn.run.errors import UserError
from mnist_cnn.run.files import write_atomically


class RunFolder:
    """The folder of one run, created with its config.yaml.

    Args:
        path: The folder, which must not hold a run yet.
        config: Content of config.yaml.
        is_parent: Whether the run gets the next free folder version_N in `path` instead.

    Raises:
        UserError: If there is a run already, or the folder is not writable.
    """

    def __init__(self, path: Path, config: str, is_parent: bool) -> None:
        self.path = path
        self._created = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._present: set[Path] = set()  # files that were there before, such as an output.log
        try:
            if is_parent:
                self.path = new_version(path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._present = set(self.path.iterdir())
            with open(self.path / "config.yaml", "x", encoding="utf-8") as file:  # only one of two processes succeeds
                file.write(config)
        except FileExistsError as error:
            raise UserError(f"{path} holds a run already: give the run another folder") from error
        except OSError as error:
            with contextlib.suppress(OSError):
                self.discard()
            raise UserError(f"{error.filename or path} is not writable: {error.strerror}") from error

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint from which the run is resumed."""
        return self.path / "checkpoints/last.ckpt"

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Writes metrics.json, which marks the run as finished."""
        with write_atomically(self.path / "metrics.json") as file:
            json.dump(metrics, file, indent=2)

    def discard(self) -> None:
        """Removes what the run has written, and the folders that it created, if they are empty."""
        for path in set(self.path.glob("*")) - self._present:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in (self.path, *self._created):
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def versions(root: Path) -> list[Path]:
    """The folders version_N of a folder, in the order of N."""
    found = [folder for folder in root.glob("version_*") if folder.name[8:].isdigit() and folder.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name[8:]))


def new_version(root: Path) -> Path:
    """Creates the next free version_N; two processes never get the same one."""
    root.mkdir(parents=True, exist_ok=True)
    number = int(versions(root)[-1].name[8:]) + 1 if versions(root) else 0
    while True:
        try:
            (folder := root / f"version_{number}").mkdir()
            return folder
        except FileExistsError:
            number += 1


def find_checkpoint(root: Path, config_files: list[Path], which: str) -> str:
    """The best or last checkpoint of the run whose config.yaml was given, or else of the newest run in `root`."""
    last = "checkpoints/last.ckpt" if which == "last" else "checkpoints"  # a killed run may have no last.ckpt
    runs = [run for run in (*versions(root), *(file.parent for file in config_files)) if (run / last).exists()]
    if not runs:
        raise UserError(f"there is no run with a checkpoint in {root}: run fit first, or give --ckpt_path=FILE")
    if which == "last":
        return str(runs[-1] / last)
    try:
        return str(runs[-1] / json.loads((runs[-1] / "metrics.json").read_text())["best_checkpoint"])
    except (FileNotFoundError, TypeError) as error:  # TypeError: its best_checkpoint is null
        raise UserError(f"{runs[-1]} did not finish: give --ckpt_path=last, or a file") from error


def check_checkpoint(path: str, model: LightningModule, weights_only: bool | None, resume: bool) -> None:
    """Loads a checkpoint's weights into the model.

    Args:
        path: The checkpoint.
        model: The model.
        weights_only: As in torch.load.
        resume: Whether training continues from it. Then the model's settings must be the same, since Lightning
            restores optimizer and schedule as they were.

    Raises:
        UserError: If it does not fit.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
        model.load_state_dict(checkpoint["state_dict"])
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except Exception as error:  # torch raises many kinds
        reason = str(error).partition("\n\t")[2] or str(error).partition(". ")[0]  # a list of parameters, or a sentence
        hint = "give --weights_only=false if you trust its author" if "weights_only" in str(error) else ""
        hint = hint or "use the config.yaml of its run"
        raise UserError(f"checkpoint {path} does not fit: {reason.splitlines()[0]}: {hint}") from error
    if resume and not checkpoint.get("optimizer_states"):
        raise UserError(f"checkpoint {path} has weights only: training cannot be resumed from it")
    saved, given = flatten(checkpoint.get("hyper_parameters", {})), flatten(dict(model.hparams))
    for key in {**saved, **given} if resume and saved else ():
        if saved.get(key) != given.get(key):
            name = ".".join(part for part in ("model", *key) if part not in ("init_args", "class_path"))
            change = f"{name}={saved.get(key)}, not {given.get(key)}"
            raise UserError(f"checkpoint {path} was made with {change}: a resumed run keeps the model's settings")


def keep_best_checkpoints(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Copies the best checkpoints of an interrupted run into the folder of the run that resumes it.

    Lightning forgets the scores of checkpoints that are in another folder.

    Args:
        trainer: The trainer of the new run.
        checkpoint: The checkpoint from which it resumes, whose state is adapted.
    """
    for early_stopping in trainer.early_stopping_callbacks:  # Lightning would restore the checkpoint's patience
        checkpoint["callbacks"].get(early_stopping.state_key, {})["patience"] = early_stopping.patience
    for callback in trainer.checkpoint_callbacks:
        state = checkpoint["callbacks"].get(callback.state_key)
        if not (isinstance(callback, ModelCheckpoint) and callback.dirpath and state):
            continue
        old, new = Path(str(trainer.ckpt_path)).parent, Path(callback.dirpath)
        if old.resolve() == new.resolve():
            continue
        kept = {*state["best_k_models"], state["best_model_path"], state["last_model_path"]}
        moved = {path: str(new / Path(path).name) for path in kept if (old / Path(path).name).is_file()}
        if trainer.is_global_zero:
            new.mkdir(parents=True, exist_ok=True)
            for path in moved.values():
                shutil.copyfile(old / Path(path).name, path)
        state["best_k_models"] = {moved[p]: score for p, score in state["best_k_models"].items() if p in moved}
        for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
            state[name] = moved.get(state[name], "")
        state["dirpath"] = str(new)
