"""A search: Optuna suggests one point after another, and is told of each result.

Its study is optuna.log in the sweep's folder. The trial of a run has the run's number; it ends when the run has ended,
so that a stopped search goes on from its folder.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout
from lightning.pytorch.callbacks import Callback

from mnist_cnn.run.errors import Parser, UserError, nearest
from mnist_cnn.sweeps import ledger
from mnist_cnn.sweeps.axes import SEED, Range, items_of, no_point, read_axes, swept_of
from mnist_cnn.sweeps.grid import labels, parse, run_names

TRIAL = "SWEEP_TRIAL"  # the environment variable that names the folder of a run that Optuna may prune


class Pruned(Exception):
    """Optuna's pruner stops a run; the message says when."""


def build(kind: str, content: Any, seed: int = 0) -> Any:
    """Makes Optuna's sampler or pruner of a class path or a class with arguments; `seed` is added to a sampler's own.

    Raises:
        UserError: Optuna is not installed.
    """
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
    """The study of a sweep's folder, in which it is created if there is none, and its storage."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = JournalFileBackend(str(root / "optuna.log"))
    study = optuna.create_study(
        storage=(storage := optuna.storages.JournalStorage(journal)),
        pruner=build("pruner", settings["pruner"]),
        study_name="sweep",
        direction="maximize" if settings["mode"] == "max" else "minimize",
        load_if_exists=True,
    )
    return study, storage


class Search:
    """Suggests the points of a sweep one after another, and writes their configs.

    Raises:
        UserError: A setting is wrong, or Optuna is not installed.
    """

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        if not settings["sample"]:
            raise UserError("a search needs sample, the number of runs")
        for kind in ("sampler", "pruner"):
            build(kind, settings[kind])
        from optuna import distributions

        self.root, self.settings = root, settings
        axes = read_axes(settings["grid"])
        if SEED in axes:
            raise UserError(f"a search repeats no point: {SEED} belongs into fixed")
        grid = {key: [axis.low, axis.high] if isinstance(axis, Range) else axis for key, axis in axes.items()}
        alone = {tuple(place * (key == at) for at in grid) for key in grid for place in range(len(grid[key]))}
        known = set[tuple[str, str]]().union(*(items_of(swept_of(grid, point)) for point in alone))
        for part in settings["exclude"]:
            if not items_of(part) <= known:
                raise no_point(part, grid)
        for point in sorted(alone):  # each value, beside the first ones of the others
            parse(settings | {"grid": grid}, point)
        self.axes, self.values = axes, {key: dict(zip(labels(grid[key]).values(), grid[key])) for key in grid}
        self.space: dict[str, Any] = {}
        for key, axis in axes.items():
            if not isinstance(axis, Range):
                self.space[key] = distributions.CategoricalDistribution([*self.values[key]])
            elif axis.is_integer:
                low, high, step = int(axis.low), int(axis.high), int(axis.step or 1)
                self.space[key] = distributions.IntDistribution(low, high, axis.log, step)
            else:
                self.space[key] = distributions.FloatDistribution(axis.low, axis.high, axis.log, axis.step)

    def open(self) -> list[str]:
        """Creates the sweep's folder and the study, or opens those that exist; returns the names of the runs."""
        with ledger.lock(self.root, "sweep"):
            ledger.write_sweep(self.root, self.settings, {})
            self.study, _ = open_study(self.root, self.settings)
            runs = self.tell()
            return [run.name for run in runs] or list(filter(None, [self.ask(runs)]))

    def total(self, runs: list[ledger.Run]) -> int:
        """How many runs the folder will have: those that fail are replaced."""
        return max(len(runs), self.settings["sample"] + sum(run.status == "failed" for run in runs))

    def claim(self) -> Iterator[tuple[str, Any] | None]:
        """Acquires the locks of runs that have not ended, then of new ones; None: wait for those of other processes."""
        while True:
            claimed = None
            with ledger.lock(self.root, "sweep"):  # one process at a time
                runs = self.tell()
                names = [run.name for run in runs if run.status in ("pending", "interrupted")]
                if not names and len(runs) < self.total(runs) and (new := self.ask(runs)):
                    names = [new]
                for name in names:
                    with contextlib.suppress(Timeout):
                        claimed = claimed or (name, ledger.lock(self.root, name, timeout=0))
            if not names and not any(run.status == "running" for run in runs):
                return
            yield claimed

    def tell(self) -> list[ledger.Run]:
        """Tells Optuna of the runs that have ended; returns all runs."""
        from optuna.trial import TrialState

        states = {"finished": None, "failed": TrialState.FAIL, "pruned": TrialState.PRUNED}
        runs = ledger.read_runs(self.root, metric := self.settings["metric"])
        current = {trial.number for trial in self.study.get_trials(False, [TrialState.RUNNING])}
        for run in runs:
            number = int(ledger.run_number(run.name))
            if run.status in states and number in current:
                self.study.tell(number, run.metrics.get(metric), states[run.status])
        return runs

    def ask(self, runs: list[ledger.Run]) -> str | None:
        """Writes the config of a new point; returns the run's name, or None if all points seem to have been tried."""
        from optuna.trial import TrialState

        known, exclude = [items_of(run.swept) for run in runs], [items_of(part) for part in self.settings["exclude"]]
        for attempt in range(1000):
            # A new sampler, with another seed for each trial: in a search that goes on it would begin again.
            sampler = self.settings["sampler"] if attempt < 20 else "optuna.samplers.RandomSampler"
            seed = self.settings["seed"] + len(self.study.get_trials(False))
            self.study.sampler = build("sampler", sampler, seed)
            trial = self.study.ask(self.space)
            grid = {key: [self.value(key, suggested)] for key, suggested in trial.params.items()}
            point = (0,) * len(grid)
            swept, settings = swept_of(grid, point), self.settings | {"grid": grid}
            if (items := items_of(swept)) not in known and not any(part <= items for part in exclude):
                name = f"{trial.number:03}-{run_names([], grid, [point])[0].partition('-')[2]}"
                try:
                    ledger.write_sweep(self.root, self.settings, {name: ledger.to_yaml(parse(settings, point), swept)})
                    return name
                except UserError as error:
                    print(f"left out: {error}", flush=True)
            self.study.tell(trial, state=TrialState.FAIL)
        print(f"search: all {len(runs)} points have been tried", flush=True)
        return None

    def value(self, key: str, suggested: Any) -> Any:
        """The value that a suggestion means."""
        axis = self.axes[key]
        return axis.shorten(suggested) if isinstance(axis, Range) else self.values[key][suggested]


class Reporter(Callback):
    """Reports the metric of each epoch to Optuna, whose pruner may stop the run; outside of a search it is idle.

    Raises:
        UserError: Validation does not log the metric.
        Pruned: The pruner stops the run.
    """

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if TRIAL not in os.environ or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        prune = trainer.is_global_zero and self.report(trainer, Path(os.environ[TRIAL]))
        if trainer.strategy.broadcast(prune):
            raise Pruned(f"after epoch {trainer.current_epoch + 1}")

    def report(self, trainer: Any, run: Path) -> bool:
        """Reports the metric, unless it was before the run was interrupted; returns whether the run is to end."""
        import optuna

        metric, logged = (settings := ledger.read_settings(run.parent))["metric"], trainer.callback_metrics
        if metric not in logged:
            raise UserError(f"a pruner needs {metric}, which validation does not log{nearest(metric, logged)}")
        study, storage = open_study(run.parent, settings)
        of_study = storage.get_study_id_from_name(study.study_name)
        number = storage.get_trial_id_from_study_id_trial_number(of_study, int(ledger.run_number(run.name)))
        trial, last = optuna.trial.Trial(study, number), storage.get_trial(number).last_step
        if last is not None and last >= trainer.current_epoch:
            return False
        trial.report(logged[metric].item(), trainer.current_epoch)
        return trial.should_prune()
