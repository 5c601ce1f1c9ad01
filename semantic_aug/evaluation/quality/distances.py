"""Distances between sets of images, over their features: FID, KID, neighbours, spread. Plain numpy, in float64.

Frechet distance of two Gaussians: Heusel et al. 2017, as FID. Unbiased squared MMD with a cubic kernel: Binkowski et al.
2018, as KID. Cosine distance is 1 - cos, in [0, 2].
"""

import numpy as np

KID_SUBSETS = 100
KID_SIZE = 1000
"""Most images of each set in one KID estimate."""
KID_POOL = 4000
"""Most images of each set that KID looks at in all: their kernel is held in memory."""
BLOCK = 1024
RESAMPLES = 200
"""Bootstrap resamples of an interval."""


def _root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``(D,)`` and a factor R with R'R the covariance, of at most D rows."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    factor = (features - mean) / np.sqrt(len(features) - 1)
    return mean, np.linalg.qr(factor, mode="r") if len(factor) > factor.shape[1] else factor


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of the Gaussians fitted to two sets (Heusel et al. 2017).

    With C = R'R, the singular values of R_a R_b' are the roots of the eigenvalues of C_a C_b, so their sum is the trace of
    the matrix root: no root of a nearly singular matrix is taken, and fewer images than dimensions do no harm to the
    arithmetic (the estimate is biased upwards then; see :func:`kernel_distance`).

    Args:
        a: features ``(N, D)``, N of 2 or more.
        b: features ``(M, D)``, likewise.

    Returns:
        The squared distance, 0 for equal sets; NaN with fewer than two images.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    (mean_a, root_a), (mean_b, root_b) = _root(a), _root(b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(max(0.0, ((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * cross))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, rng: np.random.Generator, subsets: int = KID_SUBSETS, size: int | None = None
) -> tuple[float, float]:
    """Unbiased squared MMD under the kernel (x.y/D + 1)^3, over random subsets (Binkowski et al. 2018).

    Its expectation is 0 for two samples of one distribution, however few images there are; single estimates fall below 0.

    Args:
        a: features ``(N, D)``.
        b: features ``(M, D)``.
        rng: draws the subsets, without replacement.
        subsets: how many estimates are made.
        size: images of each set in one estimate, 2 or more (None: half of the smaller set, at most 1000).

    Returns:
        Mean and standard deviation over the subsets; NaN with fewer than two images.
    """
    if min(len(a), len(b)) < 2:
        return float("nan"), float("nan")
    a, b = (_kernel_images(x, rng) for x in (a, b))
    size = min(len(a), len(b), size or max(2, min(KID_SIZE, min(len(a), len(b)) // 2)))
    kaa, kbb, kab = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    estimates = []
    for _ in range(subsets):
        i, j = rng.choice(len(a), size, replace=False), rng.choice(len(b), size, replace=False)
        within = sum(k[np.ix_(r, r)].sum() - k[r, r].sum() for k, r in ((kaa, i), (kbb, j)))
        estimates.append(within / (size * (size - 1)) - 2 * kab[np.ix_(i, j)].mean())
    return float(np.mean(estimates)), float(np.std(estimates))


def _kernel_images(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The images of a set that KID looks at, float64 of at most :data:`KID_POOL` rows."""
    drawn = features if len(features) <= KID_POOL else features[rng.choice(len(features), KID_POOL, replace=False)]
    return np.asarray(drawn, np.float64)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def unit(features: np.ndarray) -> np.ndarray:
    """Features ``(N, D)`` with rows of length one, float32; a row of zeros stays one."""
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine distance ``(N,)`` of the rows of two sets of features ``(N, D)``."""
    return 1 - np.einsum("nd,nd->n", unit(a), unit(b))


def neighbours(
    queries: np.ndarray, base: np.ndarray, count: int = 1, skip_self: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of a set to each query, by cosine distance.

    Args:
        queries: features ``(N, D)``.
        base: features ``(M, D)``.
        count: neighbours wanted, k; fewer come where the set is smaller.
        skip_self: queries and base are the same set, and an image is not its own neighbour.

    Returns:
        Distances ``(N, k)``, ascending, and rows of ``base`` ``(N, k)``.
    """
    count = min(count, len(base) - skip_self)
    queries, base = unit(queries), unit(base)
    nearest = [(np.empty((0, count), np.float32), np.empty((0, count), np.int64))]
    for start in range(0, len(queries), BLOCK):
        distance = 1 - queries[start : start + BLOCK] @ base.T
        if skip_self:
            rows = np.arange(len(distance))
            distance[rows, start + rows] = np.inf
        order = np.argsort(distance, axis=1, kind="stable")[:, :count]
        nearest.append((np.take_along_axis(distance, order, axis=1), order))
    return np.concatenate([d for d, _ in nearest]), np.concatenate([i for _, i in nearest])


def mean_pairwise(features: np.ndarray) -> float:
    """Mean cosine distance over all pairs of a set ``(N, D)``; NaN with fewer than two images.

    The pairs' cosines add up to (|sum of unit rows|^2 - N) / 2, so no pair is looked at.
    """
    n = len(features)
    if n < 2:
        return float("nan")
    total = unit(features).sum(0, dtype=np.float64)
    return float(1 - (total @ total - n) / (n * (n - 1)))


def resampled_pairwise(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """:func:`mean_pairwise` of bootstrap resamples of a set ``(N, D)``, over the pairs of different images; ``(R,)``.

    NaN with fewer than three images, of which no resample says anything.
    """
    n = len(features)
    if n < 3:
        return np.full(RESAMPLES, np.nan)
    weights = _weights(n, rng)
    sums = weights @ unit(features)
    return 1 - ((sums**2).sum(1) - (weights**2).sum(1)) / _pairs(weights)


def resampled_kernel(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """:func:`kernel_distance` of bootstrap resamples of both sets, over the pairs of different images; ``(R,)``."""
    if min(len(a), len(b)) < 3:
        return np.full(RESAMPLES, np.nan)
    a, b = (_kernel_images(x, rng) for x in (a, b))
    of_a, of_b = (_weights(len(x), rng) for x in (a, b))
    distance = -2 * np.einsum("rn,rn->r", of_a @ _kernel(a, b), of_b) / (len(a) * len(b))
    for x, weights in ((a, of_a), (b, of_b)):
        kernel = _kernel(x, x)
        within = np.einsum("rn,rn->r", weights @ kernel, weights) - weights**2 @ kernel.diagonal()
        distance += within / _pairs(weights)
    return distance


def _weights(n: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of N images is drawn in each resample, ``(R, N)``."""
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def _pairs(weights: np.ndarray) -> np.ndarray:
    """Ordered pairs of different images in each resample, ``(R,)``; NaN for one image drawn again and again."""
    pairs = weights.sum(1) ** 2 - (weights**2).sum(1)
    return np.where(pairs > 0, pairs, np.nan)
