"""A search: Optuna suggests one point after another, and is told of each result.

Its study is optuna.log in the sweep's folder. The trial of a run has the run's number; it ends when the run has ended,
so that a stopped search goes on from its folder.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch.callbacks import Callback

from mnist_cnn.run.errors import Parser, UserError, nearest
from mnist_cnn.sweeps import ledger
from mnist_cnn.sweeps.axes import SEED, Point, Range, is_excluded, items_of, point_of, points_of, read_axes
from mnist_cnn.sweeps.grid import labels, parse, run_names

TRIAL = "SWEEP_TRIAL"  # the environment variable that names the folder of a run that Optuna may prune


class Pruned(Exception):
    """Optuna's pruner stops a run; the message says when."""


def build(kind: str, content: Any, seed: int = 0) -> Any:
    """Makes a sampler or pruner of its class path, or class with arguments; adds `seed` to the sampler's."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search needs Optuna: pip install '.[search]'") from error
    bases = {"sampler": optuna.samplers.BaseSampler, "pruner": optuna.pruners.BasePruner}
    defaults = {"sampler": "optuna.samplers.TPESampler", "pruner": "optuna.pruners.NopPruner"}
    (parser := Parser()).add_argument(f"--{kind}", type=bases[kind])
    config = parser.parse_object({kind: content or defaults[kind]})
    if (arguments := config[kind].get("init_args")) and "seed" in arguments:
        arguments.seed = (arguments.seed or 0) + seed
    return parser.instantiate(config)[kind]


def open_study(root: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The study of a sweep's folder, which is created if there is none, and its storage."""
    pruner = build("pruner", settings["pruner"])
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # This lock is released when its process is killed; those of Optuna are not.
    journal = JournalFileBackend(str(root / "optuna.log"), FileLock(root / ".locks/optuna.lock"))  # type: ignore
    storage = optuna.storages.JournalStorage(journal)
    options: dict[str, Any] = {"direction": f"{settings['mode']}imize", "load_if_exists": True}
    return optuna.create_study(study_name="sweep", storage=storage, pruner=pruner, **options), storage


class Search:
    """Suggests the points of a sweep one after another, and writes their configs."""

    def __init__(self, root: Path, settings: dict[str, Any], say: Callable[[str], None]) -> None:
        if not settings["sample"]:
            raise UserError("a search needs sample, the number of runs")
        for kind in ("sampler", "pruner"):
            build(kind, settings[kind])
        self.root, self.settings, self.say = root, settings, say
        self.wanted = settings["sample"]  # how many runs are to finish
        self.lock = FileLock(root / ".locks/sweep.lock")  # one process at a time asks and tells
        self.axes, exclude = read_axes(settings["grid"]), settings["exclude"]
        if SEED in self.axes:
            raise UserError(f"a search runs each point once: move {SEED} to fixed")
        points_of(self.axes, exclude, 1)  # checks exclude
        ends = {key: [axis.low, axis.high] if isinstance(axis, Range) else axis for key, axis in self.axes.items()}
        first = {key: values[0] for key, values in ends.items()}
        changed = (point_of(first | {key: value}) for key, values in ends.items() for value in values)
        for code in dict.fromkeys(map(json.dumps, changed)):
            if not is_excluded(point := json.loads(code), exclude):
                parse(settings, point)

    def open(self) -> list[str]:
        """Creates the sweep's folder and the study, or opens those that exist; returns the names of the runs."""
        with self.lock:
            ledger.write_sweep(self.root, self.settings, {})
            self.study, _ = open_study(self.root, self.settings)
            runs = self.tell()
            return [run.name for run in runs] or self.ask(runs)

    def total(self, runs: list[ledger.Run]) -> int:
        """How many runs the folder will have: those that fail are replaced."""
        return max(len(runs), self.wanted + sum(run.status == "failed" for run in runs))

    def open_runs(self) -> list[str]:
        """The runs that have not ended, else a new one, else those that other processes execute."""
        with self.lock:
            runs = self.tell()
            names = [run.name for run in runs if run.status in ("pending", "interrupted")]
            if not names and len(runs) < self.total(runs):
                names = self.ask(runs)
            return names or [run.name for run in runs if run.status == "running"]

    def tell(self) -> list[ledger.Run]:
        """Tells Optuna of the runs that have ended; returns all runs."""
        from optuna.trial import TrialState

        # TPE ignores trials with the state FAIL, and would suggest such points again.
        states = {"finished": None, "failed": TrialState.PRUNED, "pruned": TrialState.PRUNED}
        with self.lock:
            runs = ledger.read_runs(self.root, metric := self.settings["metric"])
            current = {trial.number for trial in self.study.get_trials(False, [TrialState.RUNNING])}
            for run in runs:
                number = int(ledger.run_number(run.name))
                if run.status in states and number in current:
                    self.study.tell(number, run.metrics.get(metric), states[run.status])
        return runs

    def ask(self, runs: list[ledger.Run]) -> list[str]:
        """Writes the config of a new point; returns the run's name, or [] if all points seem to have been tried."""
        from optuna.trial import TrialState

        tried, number = [items_of(run.swept) for run in runs], len(self.study.get_trials(False))
        for attempt in range(200):
            if attempt in (0, 20):  # after 20 suggestions of known points, random ones
                sampler = "optuna.samplers.RandomSampler" if attempt else self.settings["sampler"]
                # A new one, with another seed for each point: in a search that goes on it would begin again.
                self.study.sampler = build("sampler", sampler, self.settings["seed"] + number)
            point = self.suggest(trial := self.study.ask())
            if items_of(point) not in tried and not is_excluded(point, self.settings["exclude"]):
                name = f"{trial.number:03}-{run_names([], [point])[0].partition('-')[2]}"
                try:
                    config = parse(self.settings, point)
                except UserError as error:
                    self.say(f"left out: {error}")
                else:
                    ledger.write_sweep(self.root, self.settings, {name: ledger.to_yaml(config, point)})
                    return [name]
            self.study.tell(trial, state=TrialState.FAIL)
        self.say(f"search: all {len(runs)} points have been tried")
        self.wanted = 0
        return []

    def suggest(self, trial: Any) -> Point:
        """The point that Optuna suggests. Of a list, it knows the labels of the values."""
        values: dict[str, Any] = {}
        for key, axis in self.axes.items():
            if isinstance(axis, list):
                choices = dict(zip(labels(axis).values(), axis))
                values[key] = choices[trial.suggest_categorical(key, [*choices])]
            elif isinstance(axis.low + axis.high + axis.step, int):
                values[key] = trial.suggest_int(key, axis.low, axis.high, step=axis.step, log=axis.log)
            else:
                number = trial.suggest_float(key, axis.low, axis.high, step=axis.step or None, log=axis.log)
                values[key] = axis.closest(number)
        return point_of(values)


class Reporter(Callback):
    """Reports the metric of each validation to Optuna, whose pruner may stop the run; does nothing outside a search."""

    def on_fit_start(self, trainer: Any, *_: Any) -> None:
        if TRIAL not in os.environ or not trainer.is_global_zero:
            return
        from optuna.trial import Trial

        run = Path(os.environ[TRIAL])
        settings = ledger.read_settings(run.parent)
        self.metric, self.validations = settings["metric"], 0
        study, storage = open_study(run.parent, settings)
        study_id, number = storage.get_study_id_from_name("sweep"), int(ledger.run_number(run.name))
        self.trial = Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if TRIAL not in os.environ or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        prune = trainer.is_global_zero and self.prunes(trainer.callback_metrics)
        if trainer.strategy.broadcast(prune) and trainer.current_epoch + 1 != trainer.max_epochs:
            raise Pruned(f"after epoch {trainer.current_epoch + 1}")

    def prunes(self, metrics: dict[str, Any]) -> bool:
        """Reports the metric; whether the run is to end."""
        if self.metric not in metrics:
            similar = nearest(self.metric, metrics)
            raise UserError(f"a pruner needs {self.metric}, which validation does not log{similar}")
        self.trial.report(metrics[self.metric].item(), self.validations)
        self.validations += 1
        return self.trial.should_prune()
