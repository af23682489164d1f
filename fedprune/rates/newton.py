"""Which retention takes a given time? Newton's interpolation through what was measured."""

from __future__ import annotations

import numpy as np

from fedprune.types import FloatArray


def newton(times: FloatArray, values: FloatArray, at: FloatArray) -> FloatArray:
    """The polynomial through the points, in Newton's form.

    g(t) = g_0 + g[t_0,t_1] (t - t_0) + g[t_0,t_1,t_2] (t - t_0)(t - t_1) + ...,
    g[t_i..t_j] = (g[t_i+1..t_j] - g[t_i..t_j-1]) / (t_j - t_i)

    Args:
        times: `[curves, points]`, different within a row.
        values: `[curves, points]`.
        at: `[curves]`.
    """
    divided, result, product = values, values[:, 0].copy(), np.ones(len(at))
    for order in range(1, times.shape[1]):
        divided = (divided[:, 1:] - divided[:, :-1]) / (times[:, order:] - times[:, :-order])
        product = product * (at - times[:, order - 1])
        result += divided[:, 0] * product
    return result


def retention(times: FloatArray, rates: FloatArray, target: float, degree: int) -> FloatArray:
    """The rate that takes `target`, through the `degree` + 1 measured points nearest to it.

    Args:
        times, rates: `[clients, points]`, NaN where there is none.

    Returns:
        `[clients]`, NaN where there are fewer than two points, or a larger rate took no longer.
    """
    result = np.full(len(times), np.nan)
    nearest = np.argsort(np.abs(times - target), axis=1, kind="stable")[:, : degree + 1]  # NaN last
    t, g = np.take_along_axis(times, nearest, 1), np.take_along_axis(rates, nearest, 1)
    points = (~np.isnan(t)).sum(1)
    for count in range(2, degree + 2):
        rows = np.flatnonzero(points == count)
        if not len(rows):
            continue
        order = np.argsort(t[rows, :count], axis=1)
        ts, gs = np.take_along_axis(t[rows, :count], order, 1), np.take_along_axis(g[rows, :count], order, 1)
        rising = ((np.diff(ts, axis=1) > 0) & (np.diff(gs, axis=1) > 0)).all(1)
        rows, ts, gs = rows[rising], ts[rising], gs[rising]
        result[rows] = newton(ts, gs, np.full(len(rows), target))
    return result
