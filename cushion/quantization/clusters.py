"""Static ranges that groups of channels share: RPTQ (arXiv 2304.01089, section 3.2).

## Clusters of channels

RPTQ (arXiv [2304.01089](https://arxiv.org/abs/2304.01089), section 3.2). With `activations.granularity=per_cluster`,
each channel j of a linear's input is a point (max X_j, min X_j), over all calibration tokens behind the row's prefix.
K-means puts the points into `activations.clusters` clusters (scikit-learn, 10 starts, raw values,
`activations.cluster_seed`), and a cluster's range holds all of its channels:

    min = min_j min X_j,  max = max_j max X_j,  j in the cluster

Scale and offset follow as for a tensor, and every channel is rounded with those of its cluster. One cluster is
`per_tensor`; `per_channel`, every channel its own, is the ceiling of static scales. Linears that read the same tensor
(query, key and value; gate and up) share clusters. With smoothing or rotations the points are those of what the
linear reads. Clusters differ between rows, because the prefix decides the ranges.

RPTQ reorders channels so that a cluster is a contiguous slice. That changes no sum but for its order, so nothing is
reordered here, and **nothing is said of speed**: a product of integers would need a partial sum for each cluster, and
one with a scale for each channel is no product of integers at all. `execution=int8` and the export refuse both.

`quantizer=rptq` is its W4A8. What differs from the public code:

| | RPTQ's code | here |
|---|---|---|
| where | R1, R4, R5: inputs of query, key and value, of fc1, of fc2, 32 clusters; R3: input of out_proj, 4 clusters in each head; R2 and R3: queries, keys and values, 4 in each head | inputs of all linears, 32 clusters over all channels (also before out_proj); queries as they are, keys and values with `quantizer.kv_cache`, static per head at the finest |
| range of a channel | running average of each text's extremes, weight 0.01 | extremes over all texts, as in the paper |
| statistics of a layer | behind layers that are already quantized | on the full-precision model, as for all ranges |
| grid | s = (max - min) / 2^N, whole zero point without bounds | s = (max - min) / (2^N - 1), whole zero point (`zero_point=integer`), the range of every cluster widened to contain 0 |
| weights | asymmetric, a range for each output and input cluster | symmetric, a range for each output, MSE, GPTQ: those of `w4a8_gptq` |
| 4 bits | outputs of norms and probabilities stay at 8 bits | `activations.bits=4` is 4 bits at every input |

The finer the scales, the more calibration text they need: the range of a single channel is exceeded by new text
sooner than that of many, and what exceeds it is clipped. So compare granularities at enough
`quantizer.calibration.samples`.

It runs on every family, also with gates and RMSNorm, of which the paper has none. L_q of the search and of the tuning
is as it always is, one range for each text or block: it does not know of clusters. The paper's tables are of OPT and
need the calibration mix of its code; this option does not reproduce them.
"""  # noqa: E501

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
