"""How far a share can be trusted: intervals of 95%."""

import math
import random
import statistics
from collections.abc import Sequence

Interval = tuple[float, float]
Z = 1.959963984540054  # the normal distribution's 97.5% quantile
DRAWS = 2_000


def wilson(share: float, count: int) -> Interval:
    """Wilson's score interval (1927) of a share that was found among `count` independent cases; all of 0 to 1 where there is none."""
    if not count:
        return 0.0, 1.0
    z2 = Z * Z / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(groups: Sequence[tuple[int, int]], draws: int = DRAWS) -> Interval:
    """The percentile interval of sum(won) / sum(all) over groups (won, all), drawn again with replacement, always the same draws.

    With a video's votes as a group this allows for votes on one video being alike, which `wilson` does not.
    """
    groups = [group for group in groups if group[1]]
    if not groups:
        return 0.0, 1.0
    rng = random.Random(0)
    shares = []
    for _ in range(draws):
        drawn = [groups[int(rng.random() * len(groups))] for _ in groups]
        shares.append(sum(won for won, _ in drawn) / sum(count for _, count in drawn))
    shares.sort()
    return shares[int(0.025 * draws)], shares[math.ceil(0.975 * draws) - 1]


def mean_interval(values: Sequence[float | None], least: float = -math.inf, most: float = math.inf) -> Interval | None:
    """Student's interval of the mean of independent values, cut to what is possible; those that are None are left out.

    None where fewer than two are left.
    """
    from scipy.special import stdtrit

    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    half = float(stdtrit(len(known) - 1, 0.975)) * statistics.stdev(known) / math.sqrt(len(known))
    mean = statistics.fmean(known)
    return max(least, mean - half), min(most, mean + half)
