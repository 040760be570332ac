"""The axes of a grid, and its points: all combinations of their values, or some of them that a seed draws."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mnist_cnn.run.errors import UserError, nearest
from mnist_cnn.run.folder import flatten

SEED = "seed_everything"
Point = tuple[str, ...]  # the JSON of each axis's value


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; integers if both are.

    Args:
        low: The lowest number.
        high: The highest number.
        step: The distance of two numbers; 0: any number.
        log: Uniform in the logarithm.
    """

    low: float
    high: float
    step: float = 0
    log: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether all numbers are integers."""
        return isinstance(self.low + self.high + self.step, int)

    def numbers(self) -> list[float]:
        """All numbers; [] if they are more than 10,000."""
        count = round((self.high - self.low) / self.step) + 1 if self.step else math.inf
        return [self.closest(self.low + self.step * index) for index in range(int(count))] if count <= 10_000 else []

    def draw(self, rng: random.Random) -> float:
        """A random number."""
        low, high = self.low - self.step / 2, self.high + self.step / 2  # so that each number has the same share
        number = rng.uniform(math.log(low), math.log(high)) if self.log else rng.uniform(low, high)
        return self.closest(math.exp(number) if self.log else number)

    def closest(self, number: float) -> float:
        """The closest number of the range; of six digits, for names and tables, if it has no steps."""
        number = self.low + self.step * round((number - self.low) / self.step) if self.step else float(f"{number:.6g}")
        number = int(number) if self.is_integer else float(f"{number:.12g}")  # no 0.30000000000000004
        return min(max(self.low, number), self.high)


Axes = dict[str, list[Any] | Range]
DEFAULTS: dict[str, Any] = {"low": None, "high": None, "step": 0, "log": False}  # of a range


def flat_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their whole keys: {"model": {"net.l1_chan": 4}} -> {"model.net.l1_chan": 4}."""
    flat = [(".".join(path).replace("/", "."), value) for path, value in flatten(settings).items() if path]
    names = [re.sub(r"\.(init_args|class_path)\b", "", name) for key, _ in flat for name in key.split(", ")]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{repeated[0]} is given twice")
    return dict(flat)


def read_axes(grid: dict[str, Any]) -> Axes:
    """The axes of a grid with flat keys: lists of values, and ranges."""
    if not grid:
        raise UserError("the grid is empty: give --config, --grid or --config_dir")
    axes: dict[str, Any] = {}
    for key, value in grid.items():
        axis, _, field = key.rpartition(".")
        if field in DEFAULTS and axis and not isinstance(value, list):
            axes.setdefault(axis, {})[field] = value
        else:
            axes[key] = value
    for key, axis in axes.items():
        if isinstance(axis, dict):
            axes[key] = read_range(f"grid: {key}", axis)
        elif not isinstance(axis, list) or not axis or len(set(map(json.dumps, axis))) < len(axis):
            raise UserError(f"grid: {key} must be a list of different values or a range, got {json.dumps(axis)}")
        count = len(key.split(", "))
        for value in axis if count > 1 else ():
            if not isinstance(value, list) or len(value) != count:
                raise UserError(f"grid: {key} must be lists of {count} values, one of them is {json.dumps(value)}")
    return axes


def read_range(name: str, content: dict[str, Any]) -> Range:
    """Checks a range. Its step is 1 if it has integers, and its high end a number that steps reach."""
    low, high, step, log = (content.get(key, default) for key, default in DEFAULTS.items())
    if not all(isinstance(number, int | float) for number in (low, high, step)) or not isinstance(log, bool):
        raise UserError(f"{name}: a range is {{low: 0.01, high: 0.2}}, with optional step and log, got {content}")
    if not low < high:
        raise UserError(f"{name}: low, {low}, must be below high, {high}")
    if step < 0 or ("step" in content and (log or not step)):
        raise UserError(f"{name}: step must be above 0, and omitted with log")
    if log and low <= 0:
        raise UserError(f"{name}: with log, low must be above 0, got {low}")
    step = step or int(isinstance(low + high, int))
    return Range(low, low + step * math.floor((high - low) / step + 1e-9) if step else high, step, log)


def swept_of(axes: Iterable[str], point: Point) -> dict[str, Any]:
    """The settings of a point: key -> value. An axis `a, b` varies two keys, its values are pairs."""
    swept: dict[str, Any] = {}
    for axis, code in zip(axes, point):
        keys, value = axis.split(", "), json.loads(code)
        swept |= zip(keys, value if len(keys) > 1 else [value])
    return swept


def items_of(settings: dict[str, Any]) -> set[tuple[str, str]]:
    """The settings, and those within them, as pairs of key and JSON."""
    return {(".".join(path), json.dumps(value)) for path, value in flatten(settings).items()}


def is_excluded(settings: dict[str, Any], exclude: list[dict[str, Any]]) -> bool:
    """Whether an item of `exclude` has only settings that these are."""
    items = items_of(settings)
    return any(items_of(part) <= items for part in exclude)


def points_of(axes: Axes, exclude: list[dict[str, Any]], sample: int | None = None, seed: int = 0) -> list[Point]:
    """The points that are not excluded: all of a grid, or a sample.

    Args:
        axes: Key -> list or range.
        exclude: Settings, key -> value.
        sample: How many points are drawn, each repeated with all values of seed_everything; None: all.
        seed: Decides which are drawn; the first ones are the same for every `sample`.
    """
    lists = {key: axis.numbers() if isinstance(axis, Range) else axis for key, axis in axes.items()}
    codes = {key: [*map(json.dumps, values)] for key, values in lists.items()}
    known = {item for key in codes for code in codes[key] for item in items_of(swept_of([key], (code,)))}
    for part in exclude:
        if not items_of(part) <= known:
            keys = [key for axis in axes for key in axis.split(", ")]
            similar = "".join(nearest(key, keys) for key in part if key not in keys)
            raise UserError(f"exclude: no point of the grid has {json.dumps(part)}{similar}")
    if sample:
        uniform = {key: lists[key] or axis for key, axis in axes.items() if not (isinstance(axis, Range) and axis.log)}
        points = draw(axes | uniform, exclude, sample, seed)
    elif endless := [key for key in codes if not codes[key]]:
        raise UserError(f"grid: {endless[0]} has too many values to list: set sample, or give the range a larger step")
    else:
        points = [*itertools.product(*codes.values())]
        if exclude:  # reading the settings of each point takes time
            points = [point for point in points if not is_excluded(swept_of(axes, point), exclude)]
    if not points:
        raise UserError("exclude leaves no point of the grid")
    return points


def draw(axes: Axes, exclude: list[dict[str, Any]], sample: int, seed: int) -> list[Point]:
    """Draws a sample, see points_of; uniform ranges are lists if they can be listed."""
    rng, tried, drawn, seeds = random.Random(seed), set[Point](), list[list[Point]](), axes.get(SEED, [None])
    total = math.prod(len(axis) if isinstance(axis, list) else math.inf for key, axis in axes.items() if key != SEED)
    for _ in range(1000 * sample):
        if len(drawn) == sample or len(tried) == total:
            break
        values = [axis.draw(rng) if isinstance(axis, Range) else rng.choice(axis) for axis in axes.values()]
        repeats = [[each if key == SEED else value for key, value in zip(axes, values)] for each in seeds]  # type: ignore
        points = [tuple(map(json.dumps, repeat)) for repeat in repeats]
        if points[0] not in tried:
            tried.add(points[0])
            kept = [point for point in points if not is_excluded(swept_of(axes, point), exclude)]
            drawn += [kept] if kept else []
    if 0 < len(drawn) < sample:
        print(f"sample: there are only {len(drawn)} points, all of them are taken")
    return [point for kept in drawn for point in kept]
