"""Static ranges that groups of channels share: RPTQ (arXiv 2304.01089, section 3.2).

Each channel of a linear's input is a point (max, min) over the calibration text. K-means puts the points into clusters,
and the range of a cluster is the one that holds all of its channels. RPTQ reorders the channels so that a cluster is a
contiguous slice. The order changes no product, so nothing is reordered here.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

STARTS = 10
"""How often K-means starts anew; the outcome with the smallest squared distances counts, as in RPTQ's code."""


def cluster_ranges(low: Tensor, high: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """The ranges of channels, those of a cluster joined.

    Args:
        low, high: minimum and maximum of every channel, (channels,), finite.
        clusters: how many there are; with as many as channels that differ, or more, every channel keeps its own.
        seed: of K-means.

    Returns:
        Minimum and maximum of each channel's cluster, (channels,), of the dtype and device of `low` and `high`.

    """
    labels = cluster_channels(low, high, clusters, seed).to(low.device)
    lowest = torch.full_like(low, torch.inf).scatter_reduce(0, labels, low, "amin")
    highest = torch.full_like(high, -torch.inf).scatter_reduce(0, labels, high, "amax")
    return lowest[labels], highest[labels]


def cluster_channels(low: Tensor, high: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of each channel by K-means over the points (max, min): int64 on the CPU, (channels,).

    Arguments as those of `cluster_ranges`. Clusters are numbered from 0; none is empty.
    """
    points = torch.stack([high, low], dim=1).double().cpu().numpy()
    return torch.from_numpy(np.frombuffer(_clustered(points.tobytes(), clusters, seed), dtype=np.int64).copy())


@lru_cache(maxsize=1024)
def _clustered(points: bytes, clusters: int, seed: int) -> bytes:
    """Numbers of clusters, int64, of points, (channels, 2) float64: linears that read the same tensor ask for the same.

    K-means runs on one thread: sums that several of them share have an order, and with it last bits, of chance.
    """
    from sklearn.cluster import KMeans  # takes a second to import: only here
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    places = np.frombuffer(points, dtype=np.float64).reshape(-1, 2)
    distinct, own = np.unique(places, axis=0, return_inverse=True)
    if clusters >= len(distinct):
        return own.astype(np.int64).tobytes()
    if clusters == 1:
        return np.zeros(len(places), dtype=np.int64).tobytes()
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # points closer than double precision tells: fewer clusters
        found = KMeans(clusters, n_init=STARTS, random_state=seed).fit(places).labels_
    return np.unique(found, return_inverse=True)[1].astype(np.int64).tobytes()
