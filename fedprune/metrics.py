"""Expected hit rate and NDCG of one held-out item, exactly, over the order of ties and over draws of negatives."""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln

from fedprune.types import FloatArray, IntArray


def gains(k: int) -> dict[str, FloatArray]:
    """What each of the first k places is worth, float64 `[k]`: 1 for "hr", 1 / log2(place + 1) for "ndcg".

    With one relevant item the ideal list has a DCG of 1, so DCG is NDCG (Järvelin & Kekäläinen 2002, section 2.2, in
    the form with log2(place + 1) for every place).
    """
    return {"hr": np.ones(k), "ndcg": 1 / np.log2(np.arange(2, k + 2))}


def expected_gain(gain: FloatArray, better: IntArray, ties: IntArray, others: IntArray, drawn: IntArray) -> FloatArray:
    """Expected gain of a held-out item among `drawn` of its `others` competitors.

    Of n competitors b score higher and t the same; m are drawn without replacement, and ties stand in random order.
    Let u of the t ties stand before the item in a random order of all of them, u uniform on 0 .. t; a draw keeps that
    order, so x competitors are before it with the hypergeometric probability

        P(x | c) = C(c, x) C(n - c, m - x) / C(n, m),   c = b + u,

    and the expected gain is the mean over u of sum_x gain[x] P(x | c). The mean needs no loop over the ties. The
    product C(c, x) C(n - c, m - x) counts the (m + 1)-subsets of 0 .. n whose element number x (from 0) is c, so
    summing it over c < C counts those with more than x elements below C:

        sum_{c < C} P(x | c) = (n + 1) / (m + 1) * (1 - F_C(x)),

    F_C the distribution function of the hypergeometric law with n + 1 balls, C of them marked, m + 1 drawn. Hence
    mean P(x) = (n + 1) / ((m + 1)(t + 1)) * (F_b(x) - F_{b+t+1}(x)). Our derivation; checked against scipy.stats and
    by simulation in tests/oracles/test_evaluation.py.

    Args:
        gain: float64 `[k]`, of places 1 .. k.
        better: b, int64 `[users]`; ties, others and drawn likewise t, n and m <= n.
        ties: see `better`.
        others: see `better`.
        drawn: see `better`. Equal to `others` it gives the full ranking.

    Returns:
        float64 `[users]`.
    """
    total = np.concatenate([[0.0], np.cumsum(gain)])
    k = len(gain)
    # Everybody drawn: the place is uniform on b .. b + t, and prefix sums say it without rounding.
    value = (total[np.minimum(better + ties + 1, k)] - total[np.minimum(better, k)]) / (ties + 1)
    sampled, tied = drawn < others, ties > 0
    one = sampled & ~tied
    value[one] = _hypergeometric(better[one], others[one], drawn[one], k) @ gain
    many = sampled & tied
    b, t, n, m = (array[many] for array in (better, ties, others, drawn))
    low = np.cumsum(_hypergeometric(b, n + 1, m + 1, k), axis=1)
    high = np.cumsum(_hypergeometric(b + t + 1, n + 1, m + 1, k), axis=1)
    value[many] = ((low - high) @ gain) * ((n + 1) / ((m + 1) * (t + 1)))
    return value


def _hypergeometric(marked: IntArray, balls: IntArray, drawn: IntArray, k: int) -> FloatArray:
    """P(x marked among the drawn) for x = 0 .. k - 1; float64 `[users, k]`."""
    if not len(marked):
        return np.zeros((0, k))
    logarithm = gammaln(np.arange(int(balls.max()) + 1) + 1.0)  # log n!
    c, n, m, x = marked[:, None], balls[:, None], drawn[:, None], np.arange(k)[None, :]
    possible = (x <= c) & (x <= m) & (m - x <= n - c)
    x = np.where(possible, x, np.clip(m - (n - c), 0, None))  # any possible count, to stay in the table
    exponent = (
        (logarithm[c] - logarithm[x] - logarithm[c - x])
        + (logarithm[n - c] - logarithm[m - x] - logarithm[n - c - m + x])
        - (logarithm[n] - logarithm[m] - logarithm[n - m])
    )
    return np.where(possible, np.exp(exponent), 0.0)
