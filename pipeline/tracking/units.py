"""Metrics in units that people read: FLOPs in millions, and as a share of the full ResNet's.

Files of metrics hold counts, which DVC compares and the code computes with; MLflow's table shows numbers
as they are, so that 31519976.96 has to be read digit by digit.
"""

import re
from collections.abc import Mapping

COUNT = re.compile(r"(?<![a-z])flops(?=(_mean|_std)?$)")  # and not flops_saved, a fraction
MILLIONS = re.compile(r"(?<![a-z])mflops(?=(_mean|_std)?$)")
SHARE = "flops_share"


def readable(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """`mflops_mean` in place of `flops_mean` and so on, and `flops_share` where it can be computed."""
    renamed: dict[str, float | None] = {}
    for name, value in metrics.items():
        new = COUNT.sub("mflops", name)
        renamed[new] = value if value is None or new == name else value / 1e6
    mean, full = metrics.get("flops_mean"), metrics.get("full_flops")
    if mean is not None and full:
        renamed[SHARE] = mean / full
    return renamed


def counted(metrics: Mapping[str, float]) -> dict[str, float]:
    """What `readable` was made from: `flops_mean` in place of `mflops_mean` and so on."""
    counts = {}
    for name, value in metrics.items():
        old = MILLIONS.sub("flops", name)
        counts[old] = value if old == name else 1e6 * value
    return counts
