"""How large a table of an exchange must be: what the estimator says, how far it errs, what peels. Pure arithmetic.

    estimator ──estimate──> records ──upper──> records at most ──leaves_with──> items ──shape_for──> a table

Every number here is a bet between bytes and luck: a table too small costs a second one, a table too large costs its
cells in every run. The constants are measured; `benchmarks/bench_exchange.py` shows what comes of them.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final

from srengine import limits
from srengine._native import merkle
from srengine.sync.exchange_messages import Shape

LANE_BYTES: Final = 160
"""Bytes of the estimator that count all records; the rest counts one in SAMPLED_SHARE."""
SAMPLED_BYTES: Final = merkle.ESTIMATOR_BYTES - LANE_BYTES
SAMPLED_SHARE: Final = 64
LANES_RECORDS_MAX: Final = 150_000.0
"""Above it the bytes of the lanes begin to wrap around, and those that count a sample are asked alone."""
DEVIATIONS: Final = 1.75
"""How far above the estimate a table is sized, in standard deviations. With the table's own slack one in fifty is too
small."""
MANY_RECORDS: Final = 5000.0
MANY_DEVIATIONS: Final = 2.0
"""The same above so many records: a second table is nearly twice the bytes once more, the deviation a tenth."""
CELLS_MORE: Final = 14
CELLS_MIN: Final = 30
CELLS_MIN_ITEMS: Final = 17.0
"""Cells beyond the factor, and how many up to so many items: small tables are peeled by luck, and small estimates are
mostly too low."""
EXTENSION_SHARE: Final = 0.8
EXTENSION_CELLS_MIN: Final = 40
FIVE_WAYS_CELLS_MAX: Final = 55
FOUR_WAYS_CELLS_MAX: Final = 600
"""Up to so many cells five, then four subtables peel better; above it three need fewer cells."""

_FACTORS: Final[tuple[tuple[float, float], ...]] = (
    (0.0, 1.45),
    (200.0, 1.45),
    (1000.0, 1.33),
    (10_000.0, 1.27),
    (100_000.0, 1.245),
    (1e9, 1.24),
)
"""Cells for each item so that peeling ends in all but about 1 % of runs: measured, interpolated by the logarithm."""


_STEP_SQUARES: Final = [min(step, 256 - step) ** 2 for step in range(256)]
"""Of what two bytes differ by, modulo 256; a negative index counts from the end, which is the same."""


def estimate(here: bytes, there: bytes) -> float:
    """Return how many records differ, to about a tenth: from squares of what the buckets of two sides differ by.

    A lane counts half of all records, so four give twice the number; lanes and sample are weighed by how far each errs.
    """
    lanes = _squares(here[:LANE_BYTES], there[:LANE_BYTES]) / 2
    sampled = _squares(here[LANE_BYTES:], there[LANE_BYTES:]) * 2.0 * SAMPLED_SHARE
    if lanes > LANES_RECORDS_MAX:
        return max(sampled, LANES_RECORDS_MAX)
    one, other = _lanes_variance(max(lanes, 1.0)), _sampled_variance(max(lanes, 1.0))
    return (lanes * other + sampled * one) / (one + other)


def _squares(here: bytes, there: bytes) -> int:
    return sum([_STEP_SQUARES[one - other] for one, other in zip(here, there, strict=True)])


def _lanes_variance(records: float) -> float:
    """Return the variance of what the lanes say, relative to the square of the number."""
    return 2 / LANE_BYTES + 1 / (4 * records)


def _sampled_variance(records: float) -> float:
    return 2 / SAMPLED_BYTES + (2 * SAMPLED_SHARE - 1) / records


def upper(records: float) -> float:
    """Return a number of records that the truth is rarely above, for an estimate of ``records``."""
    records = max(records, 2.0)
    one, other = _lanes_variance(records), _sampled_variance(records)
    variance = other if records > LANES_RECORDS_MAX else one * other / (one + other)
    deviations = MANY_DEVIATIONS if records > MANY_RECORDS else DEVIATIONS
    return records * (1 + deviations * math.sqrt(variance))


def leaves_with(records: float, leaf_count: int) -> float:
    """Return how many of the leaves so many records touch, boundary keys that split leaves included."""
    return leaf_count * -math.expm1(-records / leaf_count) * 1.045


def cells_for(items: float) -> int:
    """Return how many cells hold so many items."""
    for (low, factor), (high, following) in pairwise(_FACTORS):
        if items <= high:
            share = math.log(max(items, 1) / max(low, 1)) / math.log(high / max(low, 1))
            share = min(max(share, 0.0), 1.0)
            cells = CELLS_MORE + math.ceil(items * (factor + (following - factor) * share))
            return cells if items > CELLS_MIN_ITEMS else CELLS_MIN
    raise AssertionError(items)


def ways_for(cells: int) -> int:
    """Return how many subtables a table of so many cells has."""
    return 5 if cells <= FIVE_WAYS_CELLS_MAX else 4 if cells <= FOUR_WAYS_CELLS_MAX else 3


def shape_for(items: float, seed: int, *, by_leaf: bool) -> Shape:
    """Return the shape of a table for so many items."""
    cells = min(cells_for(items), limits.EXCHANGE_CELLS_MAX - 4)
    ways = ways_for(cells)
    return Shape(by_leaf, ways, max(1, cells // ways), seed)


def extension_of(shape: Shape) -> Shape:
    """Return the second table that goes with one that was too small."""
    cells = min(max(int(shape.cells * EXTENSION_SHARE), EXTENSION_CELLS_MIN), limits.EXCHANGE_CELLS_MAX - 4)
    ways = ways_for(cells)
    return Shape(shape.by_leaf, ways, max(1, cells // ways), shape.seed ^ 0x5EED5EED5EED5EED)
