"""The axes of a grid, and its points: all combinations of their values, or some of them that a seed draws.

A point is its settings, key -> value. An axis `a, b` varies two of them.
"""

import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from typing import Any

from mnist_cnn.run.errors import UserError, nearest
from mnist_cnn.run.folder import flatten

SEED = "seed_everything"
Point = dict[str, Any]  # its settings: key -> value


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; integers if both are."""

    low: float
    high: float
    step: float = 0  # the distance of two numbers; 0: any number
    log: bool = False  # uniform in the logarithm

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
        if self.step:
            number = self.low + self.step * round((number - self.low) / self.step)
        if not isinstance(number, int):
            number = float(f"{number:.{12 if self.step else 6}g}")  # no 0.30000000000000004
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


def point_of(values: dict[str, Any]) -> Point:
    """The settings of a point with these values of the axes."""
    point: Point = {}
    for axis, value in values.items():
        keys = axis.split(", ")
        point |= zip(keys, value if len(keys) > 1 else [value])
    return point


def items_of(settings: dict[str, Any]) -> set[tuple[str, str]]:
    """The settings, and those within them, as pairs of key and JSON."""
    return {(".".join(path), json.dumps(value)) for path, value in flatten(settings).items()}


def is_excluded(point: Point, exclude: list[Point]) -> bool:
    """Whether a point has all settings of an item of `exclude`."""
    items = items_of(point) if exclude else set()
    return any(items_of(part) <= items for part in exclude)


def points_of(axes: Axes, exclude: list[Point], sample: int | None = None, seed: int = 0) -> list[Point]:
    """The points that are not excluded: all of a grid, or a sample of them, each with all values of seed_everything."""
    lists = {key: axis.numbers() if isinstance(axis, Range) else axis for key, axis in axes.items()}
    known = {item for key, values in lists.items() for value in values for item in items_of(point_of({key: value}))}
    for part in exclude:
        if not items_of(part) <= known:
            keys = [key for axis in axes for key in axis.split(", ")]
            similar = "".join(nearest(key, keys) for key in part if key not in keys)
            raise UserError(f"exclude: no point of the grid has {json.dumps(part)}{similar}")
    if sample:
        uniform = {key: lists[key] or axis for key, axis in axes.items() if not (isinstance(axis, Range) and axis.log)}
        points = draw(axes | uniform, exclude, sample, seed)
    elif endless := [key for key, values in lists.items() if not values]:
        raise UserError(f"grid: {endless[0]} has too many values to list: set sample, or give the range a larger step")
    else:
        points = [point_of(dict(zip(lists, values))) for values in itertools.product(*lists.values())]
        points = [point for point in points if not is_excluded(point, exclude)]
    if not points:
        raise UserError("exclude leaves no point of the grid")
    return points


def draw(axes: Axes, exclude: list[Point], sample: int, seed: int) -> list[Point]:
    """Draws a sample, see points_of; a smaller one is its beginning. Uniform ranges are lists if they can be listed."""
    rng, tried, drawn, seeds = random.Random(seed), set[str](), list[list[Point]](), axes.get(SEED, [])
    total = math.prod(len(axis) if isinstance(axis, list) else math.inf for key, axis in axes.items() if key != SEED)
    for _ in range(1000 * sample):
        if len(drawn) == sample or len(tried) == total:
            break
        values = {key: axis.draw(rng) if isinstance(axis, Range) else rng.choice(axis) for key, axis in axes.items()}
        point = point_of(values)
        repeats = [point | {SEED: each} for each in seeds] or [point]  # type: ignore[union-attr]
        if (code := json.dumps(repeats[0])) not in tried:
            tried.add(code)
            kept = [repeat for repeat in repeats if not is_excluded(repeat, exclude)]
            drawn += [kept] if kept else []
    if 0 < len(drawn) < sample:
        print(f"sample: there are only {len(drawn)} points, all of them are taken")
    return [point for kept in drawn for point in kept]
