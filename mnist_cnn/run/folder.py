"""A run's folder: how it is created, what is written into it, and how its checkpoints are found, checked and kept."""

import contextlib
import json
import os
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
    """The folder of one run, created with its config.yaml. A folder that holds a run already is refused.

    Args:
        path: The folder.
        config: Content of config.yaml.
        is_parent: Whether the run gets the next free folder version_N in `path` instead.
    """

    def __init__(self, path: Path, config: str, is_parent: bool) -> None:
        self.path = path
        self._present = set(path.glob("*"))  # files that were there before, such as an output.log
        self._created = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            if is_parent:
                self.path = new_version(path)
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / "config.yaml", "x", encoding="utf-8") as file:  # only one of two processes succeeds
                file.write(config)
        except FileExistsError as error:
            raise UserError(f"{path} holds a run already: give the run another folder") from error
        except OSError as error:
            self.discard()
            raise UserError(f"{error.filename or path} is not writable: {error.strerror}") from error

    def discard(self) -> None:
        """Removes what the run has written, and the folders that it created, if they are empty."""
        with contextlib.suppress(OSError):  # a folder is not empty, or not writable
            for path in set(self.path.glob("*")) - self._present:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in dict.fromkeys((self.path, *self._created)):
                folder.rmdir()


def versions(root: Path) -> list[Path]:
    """The folders version_N of a folder, in the order of N."""
    found = [folder for folder in root.glob("version_*") if folder.name[8:].isdigit() and folder.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name[8:]))


def new_version(root: Path) -> Path:
    """Creates the next free version_N; two processes never get the same one."""
    number = int(versions(root)[-1].name[8:]) + 1 if versions(root) else 0
    while True:
        try:
            (folder := root / f"version_{number}").mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def best_checkpoint(trainer: Trainer) -> str | None:
    """The best checkpoint of the first callback with a monitor; without one, the latest checkpoint, if there is any."""
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path]
    return min(saved, key=lambda callback: not callback.monitor).best_model_path if saved else None


def write_metrics(run_dir: Path, trainer: Trainer, metrics: dict[str, float], seconds: float) -> None:
    """Writes metrics.json, which marks a run as finished."""
    best = best_checkpoint(trainer)
    path = best and os.path.relpath(best, run_dir)
    with write_atomically(run_dir / "metrics.json") as file:
        content = metrics | {"epochs": trainer.current_epoch, "seconds": seconds, "best_checkpoint": path}
        json.dump(content, file, indent=2)


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
    """Checks that a checkpoint fits the model and, to resume, has the model's settings, which Lightning would keep."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
        model.load_state_dict(checkpoint["state_dict"])
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except Exception as error:  # torch raises many kinds
        reason = str(error).partition("\n\t")[2] or str(error).partition(". ")[0]  # a list of parameters, or a sentence
        hint = "use the config.yaml of its run"
        if "weights_only" in str(error):
            hint = "give --weights_only=false if you trust its author"
        raise UserError(f"checkpoint {path} does not fit: {reason.splitlines()[0]}: {hint}") from error
    if not resume:
        return
    if not checkpoint.get("optimizer_states"):
        raise UserError(f"checkpoint {path} has weights only: training cannot be resumed from it")
    saved, given = flatten(checkpoint.get("hyper_parameters", {})), flatten(dict(model.hparams))
    for key in {**saved, **given} if saved else ():
        if saved.get(key) != given.get(key):
            name = ".".join(part for part in ("model", *key) if part not in ("init_args", "class_path"))
            change = f"{name}={saved.get(key)}, not {given.get(key)}"
            raise UserError(f"checkpoint {path} was made with {change}: a resumed run keeps the model's settings")


def keep_best_checkpoints(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Copies the best checkpoints of an interrupted run into the folder of the run that resumes it.

    Lightning forgets the scores of checkpoints that are in another folder, so the loaded checkpoint's state is changed.
    """
    for early_stopping in trainer.early_stopping_callbacks:  # Lightning would restore the checkpoint's patience
        checkpoint["callbacks"].get(early_stopping.state_key, {})["patience"] = early_stopping.patience
    paths = ("best_model_path", "last_model_path", "kth_best_model_path")
    for callback in trainer.checkpoint_callbacks:
        state = checkpoint["callbacks"].get(callback.state_key)
        if not (isinstance(callback, ModelCheckpoint) and callback.dirpath and state):
            continue
        old, new, scores = Path(str(trainer.ckpt_path)).parent, Path(callback.dirpath), state["best_k_models"]
        kept = {*scores, *(state[name] for name in paths)}
        moved = {path: str(new / Path(path).name) for path in kept if (old / Path(path).name).is_file()}
        if trainer.is_global_zero and old.resolve() != new.resolve():
            new.mkdir(parents=True, exist_ok=True)
            for path in moved.values():
                shutil.copyfile(old / Path(path).name, path)
        state["best_k_models"] = {moved[path]: score for path, score in scores.items() if path in moved}
        state |= {name: moved.get(state[name], "") for name in paths} | {"dirpath": str(new)}
