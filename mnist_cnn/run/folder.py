"""A run's folder: how it is created, what is written into it, and how its checkpoints are found, checked and kept."""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mnist_cnn.run.errors import UserError
from mnist_cnn.run.files import write_atomically


def create_run(given: Path | None, root: Path, config: str) -> Path:
    """Creates the folder of a run with its config.yaml; it is the next free version_N in `root` if none is given."""
    run = given or root / f"version_{max(versions(root), default=-1) + 1}"
    try:
        run.mkdir(parents=True, exist_ok=given is not None)
        if contents(run):
            raise UserError(f"{run} holds a run already: give the run another folder")
        with open(run / "config.yaml", "x", encoding="utf-8") as file:  # only one of two processes succeeds
            file.write(config)
    except OSError as error:
        if given is None and isinstance(error, FileExistsError) and run.is_dir():  # another process was faster
            return create_run(given, root, config)
        if not isinstance(error, FileExistsError):  # that of another process
            discard(run)
        raise UserError(f"{error.filename or run} is not writable: {error.strerror}") from error
    return run


def contents(run: Path) -> list[Path]:
    """What a run has written into its folder before its first step; a sweep's output.log does not belong to it."""
    return [*run.glob("config.yaml"), *run.glob("events.*"), *run.glob("checkpoints/*")]


def discard(run: Path) -> None:
    """Removes what a run has written, and the folders that are empty then."""
    for path in contents(run):
        path.unlink()
    for folder in (run / "checkpoints", run, *run.parents):
        with contextlib.suppress(OSError):  # it is not empty, or does not exist
            folder.rmdir()


def versions(root: Path) -> dict[int, Path]:
    """N -> version_N: the numbered folders in `root`, in the order of N."""
    return dict(sorted((int(path.name[8:]), path) for path in root.glob("version_*") if path.name[8:].isdigit()))


def best_checkpoint(trainer: Trainer) -> str | None:
    """The best checkpoint of the first callback with a monitor; without one, the latest checkpoint, if there is any."""
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path]
    return min(saved, key=lambda callback: not callback.monitor).best_model_path if saved else None


def write_metrics(run_dir: Path, trainer: Trainer, metrics: dict[str, float], seconds: float, best: str | None) -> None:
    """Writes metrics.json, which marks a run as finished, with the metrics of its best checkpoint."""
    content = metrics | {"epochs": trainer.current_epoch, "seconds": seconds}
    with write_atomically(run_dir / "metrics.json") as file:
        json.dump(content | {"best_checkpoint": best and os.path.relpath(best, run_dir)}, file, indent=2)


def run_of(config: Path) -> Path | None:
    """The folder of the run to which a config file belongs: a run's config.yaml, or one that sweep.py has written."""
    content = config.read_text(encoding="utf-8")
    if config.name == "config.yaml" and "\nrun_dir:" in content and not content.startswith("# lightning"):  # printed
        return config.parent
    return config.parents[1] / config.stem if content.startswith("# swept: ") else None


def find_checkpoint(root: Path, config_files: list[Path], which: str) -> str:
    """The best or last checkpoint of the run whose config is given; if there is none, of the newest run in `root`."""
    last = "checkpoints/last.ckpt"
    marks = [last] if which == "last" else ["checkpoints", "metrics.json"]  # a killed run may have none
    given = [run for file in config_files if (run := run_of(file.resolve()))]
    if not (runs := given or [run for run in versions(root).values() if any((run / mark).exists() for mark in marks)]):
        raise UserError(f"there is no run with a checkpoint in {root}: run fit first, or give --ckpt_path=FILE")
    run = Path(os.path.relpath(runs[-1]))
    metrics = run / "metrics.json"
    if which == "best" and not metrics.exists():
        raise UserError(f"{run} has no metrics.json, it did not finish: give --ckpt_path=last, or a file")
    path = run / (last if which == "last" else json.loads(metrics.read_text())["best_checkpoint"] or "checkpoints")
    if not path.is_file():
        raise UserError(f"{run} has no {which} checkpoint ({path}): give --ckpt_path=FILE")
    if run.resolve() not in path.resolve().parents and path.stat().st_mtime > metrics.stat().st_mtime:
        raise UserError(f"{path} has been overwritten since {run} finished: give --ckpt_path=FILE")
    return os.path.relpath(path)


def read_checkpoint(path: str, model: LightningModule, weights_only: bool | None) -> dict[str, Any]:
    """Reads a checkpoint and checks that it fits the model."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
        model.on_load_checkpoint(checkpoint)  # as Lightning does, for layers that are created then
        model.load_state_dict(checkpoint["state_dict"])
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} may run code: give --weights_only=false if you trust its author") from error
    except Exception as error:  # torch raises many kinds, with up to a line for each parameter
        reason = " ".join(str(error).splitlines()[:2])
        raise UserError(f"checkpoint {path} cannot be loaded with this config: {reason}") from error
    return checkpoint


def reopen_cut_epoch(checkpoint: dict[str, Any]) -> None:
    """Takes back the end of an epoch that max_steps has cut short; Lightning would count it, and mix its batches up."""
    loop = checkpoint["loops"]["fit_loop"]
    if not loop["epoch_loop.batch_progress"]["is_last_batch"]:
        for progress in loop["epoch_progress"].values():  # current and total
            progress["processed"] = min(progress["processed"], progress["ready"] - 1)


def check_resume(path: str, checkpoint: dict[str, Any], trainer: Trainer, hparams: dict[str, Any], test: bool) -> int:
    """Checks that training or its test can go on, with the same model's settings; returns the epochs so far."""
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
    finished = not test or (Path(path).absolute().parents[1] / "metrics.json").exists()
    for name, limit, reached in limits if finished else ():
        if limit is not None and -1 < limit <= reached:
            raise UserError(f"nothing left to train: {path} has reached {name}={limit}, after {epochs} epochs")
    return epochs


def keep_best_checkpoints(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Copies a run's best checkpoints into the folder of the run that resumes it; Lightning forgets those elsewhere."""
    for early_stopping in trainer.early_stopping_callbacks:  # Lightning would restore the checkpoint's patience
        checkpoint["callbacks"].get(early_stopping.state_key, {})["patience"] = early_stopping.patience
    paths = ("best_model_path", "last_model_path", "kth_best_model_path")
    for callback in trainer.checkpoint_callbacks:
        state = checkpoint["callbacks"].get(callback.state_key)
        if not (isinstance(callback, ModelCheckpoint) and state):
            continue
        moved = {"": ""}
        for path in {*state["best_k_models"], *(state[name] for name in paths)} - {""}:
            name = os.path.relpath(path, state["dirpath"])  # the whole folder may have been moved
            old, new = Path(str(trainer.ckpt_path)).parent / name, Path(str(callback.dirpath), name)
            old = old if old.is_file() else Path(path)
            if old.is_file() and trainer.is_global_zero and old.resolve() != new.resolve():
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(old, new)
            if old.is_file():
                moved[path] = str(new)
        state["best_k_models"] = {moved[path]: score for path, score in state["best_k_models"].items() if path in moved}
        state |= {name: moved.get(state[name], "") for name in paths} | {"dirpath": str(callback.dirpath)}


def flatten(config: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a nested config: path of keys -> value. Lists and empty mappings are leaves."""
    if not isinstance(config, dict) or not config:
        return {path: config}
    return {leaf: value for key, inner in config.items() for leaf, value in flatten(inner, (*path, key)).items()}
