"""The axes of a grid, and its points: all combinations of their values, or some of them that a seed draws."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from mnist_cnn.run.errors import UserError, nearest
from mnist_cnn.run.folder import flatten

SEED = "seed_everything"
Point = tuple[int, ...]  # the index of each axis's value


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; integers if both are.

    Args:
        low: The lowest number.
        high: The highest number.
        step: The distance of two numbers; None: 1 of integers, otherwise any number.
        log: Uniform in the logarithm.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether all numbers are integers."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    def numbers(self) -> list[float]:
        """All numbers; [] if they cannot be listed."""
        step = self.step or (1 if self.is_integer and not self.log else math.inf)
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        listed = [self.low + step * index for index in range(count)] if step < math.inf else []
        return listed if self.is_integer else [float(f"{number:.12g}") for number in listed]

    def draw(self, rng: random.Random) -> float:
        """A random number of a range that cannot be listed."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        number = rng.uniform(low, high)
        return self.shorten(math.exp(number) if self.log else number)

    def shorten(self, number: float) -> float:
        """The number with four digits, for names and tables."""
        return min(max(self.low, round(number) if self.is_integer else float(f"{number:.4g}")), self.high)


Axes = dict[str, list[Any] | Range]


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
    names = [field.name for field in fields(Range)]
    for key, value in grid.items():
        of, _, name = key.rpartition(".")
        if name in names and of and not isinstance(value, list):
            axes.setdefault(of, {})[name] = value
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
    """Checks a range."""
    if any(not isinstance(content.get(key, of), int | float) for key, of in (("low", ""), ("high", ""), ("step", 1))):
        raise UserError(f"{name}: a range is {{low: 0.01, high: 0.2}}, perhaps with step or log, got {content}")
    found = Range(**content)
    if not found.low < found.high:
        raise UserError(f"{name}: low, {found.low}, must be below high, {found.high}")
    if found.log and (found.low <= 0 or found.step):
        raise UserError(f"{name}: a logarithmic range is above 0, and has no step")
    if found.step is not None and found.step <= 0:
        raise UserError(f"{name}: step must be above 0, got {found.step}")
    return found


def swept_of(grid: dict[str, list[Any]], point: Point) -> dict[str, Any]:
    """The settings of a point of a grid: key -> value. An axis `a, b` varies two keys, its values are pairs."""
    axes = [(key.split(", "), values[index]) for (key, values), index in zip(grid.items(), point)]
    return {key: one for keys, value in axes for key, one in zip(keys, value if len(keys) > 1 else [value])}


def items_of(settings: dict[str, Any]) -> set[tuple[str, str]]:
    """The settings, and those within them, as pairs of key and JSON."""
    return {(".".join(path), json.dumps(value)) for path, value in flatten(settings).items()}


def points_of(
    axes: Axes, exclude: list[dict[str, Any]], sample: int | None = None, seed: int = 0
) -> tuple[dict[str, list[Any]], list[Point]]:
    """The lists of values of a grid, and its points, without those that have all settings of an item of `exclude`.

    Args:
        axes: Key -> list or range.
        exclude: Settings, key -> value.
        sample: How many points are drawn, each repeated with all values of seed_everything; None: all.
        seed: Decides which are drawn; the first ones are the same for every `sample`.
    """
    axes = {key: axis.numbers() or axis if isinstance(axis, Range) else axis for key, axis in axes.items()}
    if (endless := [key for key, axis in axes.items() if isinstance(axis, Range)]) and not sample:
        raise UserError(f"grid: {endless[0]} has endlessly many values: give sample, or the range a step")
    if sample:
        grid, points = draw(axes, 20 * sample, seed)
    else:
        grid = {key: axis for key, axis in axes.items() if isinstance(axis, list)}  # all of them
        points = list(itertools.product(*(range(len(values)) for values in grid.values())))
    allowed = without(grid, points, exclude)[:sample]
    if sample and len(allowed) < sample:
        print(f"sample: there are only {len(allowed)} points, all of them are taken")
    if sample and SEED in grid:
        at = [*grid].index(SEED)
        allowed = [(*point[:at], each, *point[at + 1 :]) for point in allowed for each in range(len(grid[SEED]))]
    return grid, allowed


def draw(axes: Axes, count: int, seed: int) -> tuple[dict[str, list[Any]], list[Point]]:
    """Draws points, all with the first value of seed_everything; fewer than `count` if some are drawn repeatedly."""
    rng, points = random.Random(seed), []
    drawn: dict[str, dict[float, int]] = {key: {} for key, axis in axes.items() if isinstance(axis, Range)}
    for _ in range(count):
        point = []
        for key, axis in axes.items():
            if isinstance(axis, Range):
                point.append(drawn[key].setdefault(axis.draw(rng), len(drawn[key])))
            else:
                point.append(0 if key == SEED else rng.randrange(len(axis)))
        points.append(tuple(point))
    grid = {key: list(drawn[key]) if isinstance(axis, Range) else axis for key, axis in axes.items()}
    return grid, list(dict.fromkeys(points))


def without(grid: dict[str, list[Any]], points: list[Point], exclude: list[dict[str, Any]]) -> list[Point]:
    """The points that have not all settings of an item of `exclude`."""
    settings = {point: items_of(swept_of(grid, point)) for point in points} if exclude else {}
    excluded: set[Point] = set()
    for part in exclude:
        excluded |= (found := {point for point in points if items_of(part) <= settings[point]})
        if not found:
            raise no_point(part, grid)
    if len(excluded) == len(points):
        raise UserError("exclude leaves no point of the grid")
    return [point for point in points if point not in excluded]


def no_point(part: dict[str, Any], grid: Iterable[str]) -> UserError:
    """The error about an item of `exclude` that excludes nothing."""
    keys = [key for axis in grid for key in axis.split(", ")]
    similar = "".join(nearest(key, keys) for key in part if key not in keys)
    return UserError(f"exclude: no point of the grid has {json.dumps(part)}{similar}")
