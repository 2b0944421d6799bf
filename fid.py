"""Scores for generated images: FID as papers quote it, KID, precision, recall, density and coverage.

    python fid.py REAL FAKE                          # folders of images (or .npz: images arr_0, or mu and sigma)
    python fid.py REAL G1 G2 G3                      # one pass over REAL; a table with the mean and the union of all
    python fid.py REAL FAKE --kid --prdc --floor     # and what fresh photos would read at these n
    python fid.py REAL FAKE --size 64                # images as okd_train.py reads them: the centre square, resized
    python fid.py REAL FAKE --copies sheet.png       # the fakes closest to a real, side by side with it
    python fid.py REAL FAKE --features FILE.py       # FD in the features of your own network, class Features: network()
    python fid.py REAL FAKE --features random        # no weights at hand: rFD, a smoke test, it may rank sets wrongly
    python fid.py --save real.npz REAL               # mu and sigma, as other FID programs read and write them
    torchrun --nproc_per_node 4 fid.py REAL FAKE     # the images are shared out over the ranks

Scores go to stdout, everything else to stderr. A folder is read flat; one with no image directly in it is read
recursively (class folders). Of a file of several frames the first is read; of transparent pixels, the colour stored
beneath; of colours of 16 bits the upper 8, as Pillow gives no more. Weights (95 MB) come from --weights, $FID_WEIGHTS
or torch.hub's folder, else from the net.

Library:

    from fid import features, frechet_distance, kernel_distance, prdc
    real, fake = features("real/"), features(images)         # images: uint8 (n, H, W, 3) or (n, 3, H, W)
    frechet_distance(real, fake)

FID is that of pytorch-fid (same network, resize, pixel range and covariance), but exact where n < dims.
Compare only readings with the same n on both sides: FID falls when either side grows, see --floor.
References: Heusel et al. 1706.08500 (FID), Binkowski et al. 1801.01401 (KID), Kynkaanniemi et al. 1904.06991
(precision, recall), Naeem et al. 2002.09797 (density, coverage; random networks as embeddings), Chong & Forsyth
1911.07023 (the bias of FID in n).
"""
import argparse
import collections
import contextlib
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while numpy is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import numpy as np

# torch, scipy and Pillow are imported where they are used: --help and every mistake in the arguments answer at once.

DIMS = (2048, 768, 192, 64)     # width of the pooled layer, last to first
PRECISIONS = ("fp32", "tf32", "bf16")
WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS_NAME
WEIGHTS_SHA256 = "6726825d"     # the file's sha256 begins so
SILENCE = 30                    # seconds after which a server that says nothing is given up
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
RANDOM_SEEDS = (0, 1, 2, 3, 4)  # one random network each
RANDOM_WIDTH = 256              # features of each
SMALL = 2048                    # below this many images FID is mostly bias
PIECE = 8                       # images per pass on the CPU: activations stay in the caches, memory stays low
PIXELS = 1 << 22                # at once as floats, beside the network's own
BLOCK = 2048                    # rows that are brought to float64 at once
LOOK = 0.5                      # seconds from one look at the clock to the next, for lines on the way
CLOSEST = 32                    # pairs on the sheet of --copies
K = 5                           # neighbours of precision, recall, density, coverage
TWIN = 1e-9                     # two images are the same below this share of the variance, by their squared distance
_SCORES = {"kid": "KID", "kid_se": "KID standard error", "copies": "copies",
           **{k: f"{k} (k={K})" for k in ("precision", "recall", "density", "coverage")}}
LABELS = {"fid": "FID", "fd": "FD", "rfd": "rFD", **_SCORES, **{f"r{k}": f"r{label}" for k, label in _SCORES.items()}}


class FidError(ValueError):
    """What the user can mend; the message is one line that says what, where and how."""


# ---------------------------------------------------------------------------------------------- distances
def frechet_distance(mu1, sigma1, mu2=None, sigma2=None):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), a float >= 0 (Heusel et al. 1706.08500, eq. 6).

    frechet_distance(mu1, sigma1, mu2, sigma2): means (d,), covariances (d, d).
    frechet_distance(features1, features2): arrays (n1, d), (n2, d). With n <= d this is exact (rank n - 1) and needs no
    covariance: it is both faster and more exact than going through statistics().
    Raises FidError for shapes that do not fit, values that are not finite, matrices that are no covariances.
    """
    if (mu2 is None) != (sigma2 is None):
        raise FidError("frechet_distance takes mu1, sigma1, mu2, sigma2 or two feature arrays")
    if mu2 is None:
        a, b = _pair(mu1, sigma1)
    else:
        a, b = _check_statistics(mu1, sigma1, "statistics"), _check_statistics(mu2, sigma2, "statistics")
        if a[0].shape != b[0].shape:
            raise FidError(f"statistics of {len(a[0])} and of {len(b[0])} dimensions cannot be compared")
    return _frechet(a, b)[0]


def _frechet(a, b):
    """(distance, mean term, trace term) of two sides, each features (n, d) or a tuple (mu, sigma)."""
    (mu1, trace1), (mu2, trace2) = _mean_and_trace(a), _mean_and_trace(b)
    mean_term, d = float(((mu1 - mu2) ** 2).sum()), len(mu1)
    if not np.isfinite(mean_term + trace1 + trace2):
        raise FidError("the distance is not finite: features or statistics are too large to be squared")
    fewest = min([len(s) for s in (a, b) if not isinstance(s, tuple)], default=d + 1)
    most_rows = 2 * d if fewest <= d else d     # one small side: its n columns keep the cross-Gram matrix cheap
    # tr sqrt(S1 S2) is the sum of the singular values of R1 R2'; for features that is the centred cross-Gram matrix.
    cross = np.linalg.svd(_root(a, most_rows) @ _root(b, most_rows).T, compute_uv=False).sum()
    trace_term = trace1 + trace2 - 2 * float(cross)
    total = mean_term + trace_term
    if total < -1e-6 * (trace1 + trace2):
        raise FidError(f"the distance came out as {total:g}: the statistics are no covariances")
    return max(total, 0.0), mean_term, trace_term


def _mean_and_trace(side):
    if isinstance(side, tuple):
        return side[0], float(np.trace(side[1]))
    if len(side) < 2:
        raise FidError(f"a covariance needs at least 2 images, there is {len(side)}")
    mean = side.mean(0, dtype=np.float64)
    squares = (float(((side[i:i + BLOCK] - mean) ** 2).sum()) for i in range(0, len(side), BLOCK))
    return mean, sum(squares) / (len(side) - 1)


def _root(side, most_rows):
    """R (k, d) with R'R = the side's covariance: the centred features, or a factor where they are many."""
    if not isinstance(side, tuple):
        if len(side) <= most_rows:
            return (side - side.mean(0, dtype=np.float64)) / np.sqrt(len(side) - 1)
        side = statistics(side)
    return _factor(side[1])


def _factor(sigma):
    """R (rank, d) with R'R = sigma, by Cholesky with pivoting; what is below sigma's rounding (d eps max) is dropped.

    Without the cut, rounding noise of size eps would enter the trace as sqrt(eps): 1e-5 of the distance at n << d.
    """
    from scipy.linalg.lapack import dpstrf
    d, diagonal = len(sigma), sigma.diagonal()
    largest = np.abs(sigma).max()
    if diagonal.min() < -1e-6 * largest or diagonal.max() < largest * (1 - 1e-6):
        raise FidError("sigma is no covariance: it has negative eigenvalues")
    if largest == 0:
        return np.zeros((0, d))
    tol = d * np.finfo(np.float64).eps * diagonal.max()
    c, pivots, rank, _ = dpstrf(sigma, lower=1, tol=tol)
    r = np.empty((rank, d))
    r[:, pivots - 1] = np.tril(c)[:, :rank].T
    if np.abs(diagonal - np.einsum("kd,kd->d", r, r)).max() > 1e-6 * diagonal.max():
        raise FidError("sigma is no covariance: it has negative eigenvalues")
    return r


def random_distance(features1, features2):
    """rFD: the mean over the five random networks of the Frechet distance in each one's own features.

    features1 (n1, 1280), features2 (n2, 1280): of features(..., features="random"); or, in place of either, its
    (mu, sigma), of which each network's own block counts. FidError for other widths.
    """
    sides = [side if isinstance(side, tuple) else _rows(side, "rFD") for side in (features1, features2)]
    widths = [len(side[0]) if isinstance(side, tuple) else side.shape[1] for side in sides]
    if widths != [len(RANDOM_SEEDS) * RANDOM_WIDTH] * 2:
        raise FidError("rFD needs features(..., features='random') on both sides, "
                       f"width {len(RANDOM_SEEDS) * RANDOM_WIDTH}, not {widths[0]} and {widths[1]}")
    distances = []
    for k in range(len(RANDOM_SEEDS)):
        own = slice(k * RANDOM_WIDTH, (k + 1) * RANDOM_WIDTH)
        parts = [(side[0][own], side[1][own, own]) if isinstance(side, tuple) else side[:, own] for side in sides]
        distances.append(_frechet(*parts)[0])
    return float(np.mean(distances))


def kernel_distance(features1, features2, subsets=100, subset_size=1000, seed=0):
    """KID and its standard error: unbiased MMD^2, kernel (x.y / d + 1)^3 (Binkowski et al. 1801.01401, section 4).

    The mean over `subsets` seeded draws without replacement of min(subset_size, n1, n2) rows from each side; where both
    sides are no larger than that, the one value over all rows. Values below 0 are normal near equality.
    The standard error is that of this mean under a new draw of images, by the delete-one jackknife over all images (the
    spread over overlapping subsets says nothing about it). Near distance 0 it errs on the large side, by up to sqrt(2).
    Returns (mean, standard error), floats. FidError for fewer than 3 rows or widths that differ.
    """
    a, b = _pair(features1, features2)
    m = min(subset_size, len(a), len(b))
    if m < 3 or subsets < 1:
        raise FidError("KID needs at least 3 images on each side and in a subset, and at least one subset; there are "
                       f"{len(a)} and {len(b)} images, subset_size {subset_size}, subsets {subsets}")
    if m == len(a) == len(b):
        subsets = 1
    rng = np.random.RandomState(seed)
    total, shift_a, shift_b = 0.0, np.zeros(len(a)), np.zeros(len(b))
    pairs, less = m * (m - 1), (m - 1) * (m - 2)        # pairs within a side, and within a side without one row
    for _ in range(subsets):
        ia, ib = (rng.permutation(len(side))[:m] if len(side) > m else np.arange(m) for side in (a, b))
        x, y = a[ia].astype(np.float64), b[ib].astype(np.float64)
        xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        np.fill_diagonal(xx, 0)
        np.fill_diagonal(yy, 0)
        sxx, syy, sxy = xx.sum(), yy.sum(), xy.sum()
        value = (sxx + syy) / pairs - 2 * sxy / m ** 2
        total += value
        shift_a[ia] += (sxx - 2 * xx.sum(1)) / less + syy / pairs - 2 * (sxy - xy.sum(1)) / pairs - value
        shift_b[ib] += (syy - 2 * yy.sum(1)) / less + sxx / pairs - 2 * (sxy - xy.sum(0)) / pairs - value
    variance = sum(((s - s.mean()) ** 2).sum() for s in (shift_a / subsets, shift_b / subsets)) * (m - 1) / m
    if not np.isfinite(total + variance):
        raise FidError("KID is not finite: the features are too large to be cubed")
    return float(total / subsets), float(np.sqrt(variance))


def prdc(real, fake, k=K):
    """Precision, recall (Kynkaanniemi et al. 1904.06991), density and coverage (Naeem et al. 2002.09797), in a dict.

    real (n1, d), fake (n2, d). A ball reaches from each row to its k-th nearest other row of the same side; inside is
    strictly nearer. precision: share of fakes inside some real ball; recall: share of reals inside some fake ball;
    density: real balls that hold a fake, mean over fakes, divided by k (may exceed 1); coverage: share of real balls
    that hold a fake. Warns where rows repeat more than k times: nothing is strictly inside their balls, so that even a
    set against itself scores 0. FidError unless n1, n2 > k >= 1.
    """
    real, fake = _pair(real, fake, "real", "fake")
    if k < 1 or min(len(real), len(fake)) <= k:
        raise FidError(f"precision, recall, density and coverage with k = {k} need more than {k} images on each side, "
                       f"there are {len(real)} and {len(fake)}")
    # A neighbour at exactly the radius lies outside; the factor keeps that so when two blocks round differently.
    inside = 1 - 1e-10
    real_radius, fake_radius = _nearest(real, k) * inside, _nearest(fake, k) * inside
    empty = [int((radius <= TWIN * f.var(0, dtype=np.float64).sum()).sum())
             for radius, f in ((real_radius, real), (fake_radius, fake))]
    if any(empty):
        warnings.warn(f"{empty[0]} of {len(real)} real and {empty[1]} of {len(fake)} fake images repeat more than "
                      f"k = {k} times: nothing is nearer to them than their twins, so precision, recall, density and "
                      "coverage come out too low, 0 where all repeat", stacklevel=2)
    hits, precise = 0, 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, d2 in _squared_distances(fake, real):
        in_real = d2 < real_radius
        hits += in_real.sum()
        precise += in_real.any(1).sum()
        covered |= in_real.any(0)
        recalled |= (d2 < fake_radius[rows, None]).any(0)
    return {"precision": float(precise / len(fake)), "recall": float(recalled.mean()),
            "density": float(hits / (k * len(fake))), "coverage": float(covered.mean())}


def copies(real, fake, own=None):
    """Every fake's nearest real: (index (n2,) into real, distance (n2,), share of fakes that look copied).

    real (n1, d), fake (n2, d): features; own (n1,): the reals' squared distance as of nearest_other(), where it is
    known. A fake counts when it is nearer to its nearest real than that real is to its own nearest other real (its
    twins, if it is there more than once, do not count as others), or has exactly its features. Fresh images of the same
    kind count too (0.1 to 0.7 of them, the fewer the more dimensions their spread has): compare the share with that
    between two parts() of the real images, not with 0.
    FidError for fewer than 2 reals, or no fake.
    """
    real, fake = _pair(real, fake, "real", "fake")
    if len(real) < 2 or not len(fake):
        raise FidError(f"a copy check needs at least 2 real images and a fake, there are {len(real)} and {len(fake)}")
    own = nearest_other(real) if own is None else own
    index, d2_nearest = np.empty(len(fake), int), np.empty(len(fake))
    for rows, d2 in _squared_distances(fake, real):
        index[rows] = d2.argmin(1)
        # Again from the difference: equal features are 0 apart, not the rounding of two large numbers.
        d2_nearest[rows] = ((fake[rows].astype(np.float64) - real[index[rows]]) ** 2).sum(1)
    copied = (d2_nearest < own[index] * (1 - 1e-10)) | (d2_nearest == 0)
    return index, np.sqrt(d2_nearest), float(copied.mean())


def nearest_other(a):
    """Squared distance of every row of a (n, d) to the nearest that is no twin of it, 0 where all are; for copies()."""
    own = _nearest(a, 1, TWIN * a.var(0, dtype=np.float64).sum())
    return np.where(np.isfinite(own), own, 0)


def _nearest(a, k, beyond=-1.0):
    """Squared distance of every row of a (n, d) to its k-th nearest other row, of those further than `beyond`."""
    radius = np.empty(len(a))
    for rows, d2 in _squared_distances(a, a):
        d2[np.arange(len(d2)), np.arange(rows.start, rows.stop)] = np.inf
        if beyond >= 0:
            d2[d2 <= beyond] = np.inf
        d2.partition(k - 1, axis=1)
        radius[rows] = d2[:, k - 1]
    return radius


def _squared_distances(a, b):
    """Yields (slice of a, squared distances (rows, len(b)), float64, at most 128 MB).

    By a matrix product, which is many times faster than scipy's cdist; both sides are moved by b's mean, so that little
    cancels.
    """
    rows = min(1024, max(16, (1 << 24) // len(b)))
    shift = b.mean(0, dtype=np.float64)
    norms = np.concatenate([((b[j:j + rows] - shift) ** 2).sum(1) for j in range(0, len(b), rows)])
    for i in range(0, len(a), rows):
        x = a[i:i + rows] - shift
        d2 = np.empty((len(x), len(b)))
        for j in range(0, len(b), rows):
            np.matmul(x, (b[j:j + rows] - shift).T, out=d2[:, j:j + rows])
        d2 *= -2
        d2 += (x ** 2).sum(1)[:, None]
        d2 += norms
        if not np.isfinite(d2).all():
            raise FidError("distances are not finite: the features are too large to be squared")
        yield slice(i, i + len(x)), np.maximum(d2, 0, out=d2)


def floor(features, n_fake, distance=frechet_distance, draws=5, seed=0):
    """What `distance` would read between these rows and as many as n_fake fresh ones of the same kind: (mean, spread).

    features (n, d), n >= 4; spread: the standard deviation over draws. Fresh ones are not at hand: pairs of random
    halves and of quarters, without a row in common, show by which power of n (0 to 1) the distance falls, and it is
    carried on from the halves to the harmonic mean of n and n_fake. Mostly within 16 % of the truth on Gaussians and on
    photos; halves alone read 1.1 to 3 times the truth, draws with replacement (bootstrap) 0.4 to 0.97 of it, as they
    repeat images (tests/README.md, "The floor").
    """
    n = len(features)
    if n < 4:
        raise FidError(f"a floor needs at least 4 real images, there are {n}")
    half, quarter, rng, of_halves, of_quarters = n // 2, n // 4, np.random.RandomState(seed), [], []
    for _ in range(draws):
        a, b = np.split(rng.permutation(n)[:2 * half], 2)
        of_halves.append(distance(features[a], features[b]))
        if quarter > 1:
            of_quarters.append(distance(features[a[:quarter]], features[b[:quarter]]))
    mean, power = np.mean(of_halves), 0.0
    if quarter > 1 and mean > 0:
        power = np.clip(np.log(max(np.mean(of_quarters) / mean, 1)) / np.log(half / quarter), 0, 1)
    scale = (half / _harmonic(n, n_fake)) ** power
    return float(mean * scale), float(np.std(of_halves, ddof=1) * scale)


def parts(n, n_fake, least=2, draws=5, seed=0):
    """Yields `draws` times two arrays of row numbers in range(n), none in common: random parts of the real images.

    For the floor of scores that depend on the ratio of both sides more than on n: they are n to n_fake, as far as each
    part has `least` rows and a tenth of all. FidError for fewer than twice `least`.
    """
    rng, least = np.random.RandomState(seed), max(least, n // 10)
    if n < 2 * least:
        raise FidError(f"a floor needs at least {2 * least} real images, there are {n}")
    m = min(max(round(n * n_fake / (n + n_fake)), least), n - least)
    for _ in range(draws):
        rows = rng.permutation(n)
        yield rows[m:], rows[:m]


def _harmonic(n1, n2):
    return 2 * n1 * n2 / (n1 + n2)


def statistics(features):
    """Mean mu (d,) and covariance sigma (d, d) of features (n, d), float64, ddof 1. FidError for n < 2."""
    m = _Moments()
    m.update(_rows(features, "features"))
    return m.result()


class _Moments:
    """Mean and covariance of rows that come in blocks, in float64 and memory that is flat in n (Chan et al. 1979)."""

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0

    def update(self, rows):
        for i in range(0, len(rows), BLOCK):
            x = rows[i:i + BLOCK].astype(np.float64)
            mean = x.mean(0)
            x -= mean
            self.add(len(x), mean, x.T @ x)

    def add(self, n, mean, scatter):
        if not self.n:
            self.n, self.mean, self.scatter = n, mean, scatter.copy()
            return
        delta, total = mean - self.mean, self.n + n
        self.scatter += scatter
        self.scatter += np.outer(delta * (self.n * n / total), delta)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    def result(self):
        if self.n < 2:
            raise FidError(f"a covariance needs at least 2 images, there is {self.n}")
        return self.mean, self.scatter / (self.n - 1)


def _rows(f, what):
    f = np.asarray(f)
    if f.ndim != 2 or f.dtype.kind != "f" or not f.shape[1]:
        raise FidError(f"{what}: an array (n, d) of floats is needed, not {f.dtype} {f.shape}")
    finite = np.isfinite(f)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise FidError(f"{what}: row {row}, column {column} is {f[row, column]}, not finite; no score comes of it")
    return f


def _pair(features1, features2, what1="the first features", what2="the second features"):
    """Both as arrays (n1, d), (n2, d) of floats, or FidError."""
    a, b = _rows(features1, what1), _rows(features2, what2)
    if a.shape[1] != b.shape[1]:
        raise FidError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions cannot be compared")
    return a, b


def _check_statistics(mu, sigma, what):
    """mu (d,) and sigma (d, d) in float64, or FidError."""
    mu, sigma = np.asarray(mu), np.asarray(sigma)
    if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
        raise FidError(f"{what}: mu and sigma must be real numbers")
    mu, sigma = np.atleast_1d(mu).astype(np.float64), np.atleast_2d(sigma).astype(np.float64)
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise FidError(f"{what}: mu {mu.shape} and sigma {sigma.shape} do not fit together")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise FidError(f"{what}: mu or sigma is not finite")
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-6 * max(np.abs(sigma).max(), 1e-300)):
        raise FidError(f"{what}: sigma is not symmetric")
    return mu, sigma


# ---------------------------------------------------------------------------------------------- networks
def network(name="inception", weights=None, dims=2048, device=None, precision="fp32"):
    """The network that `name` says, for features(..., model=it): inception, random, or a file of your own, FILE.py.

    FILE.py has a class Features, a torch module (n, 3, size, size) float32 in [-1, 1] -> (n, dims) floats, each row a
    function of its image alone, with the attributes size (pixels), dims and digest: a word that names the features and
    changes when their values do. It is made as Features(device=...) if its constructor names device. weights, dims,
    precision: of inception().
    All three kinds have size, dims, device, digest; name: inception, random or the file's digest; score: what their
    Frechet distance is called, FID, rFD or FD (digest); distance(features1, features2), which is that distance.
    FidError, one line, for a file that does not do so.
    """
    name = str(name)
    if name == "inception":
        return inception(dims=dims, weights=weights, device=device, precision=precision)
    if name == "random":
        return random_networks(device)
    if not name.endswith(".py"):
        raise FidError(f"features must be inception, random or a file FILE.py, not {name!r}")
    return _OwnNetwork(Path(name), _device(device))


def inception(dims=2048, weights=None, device=None, precision="fp32"):
    """The network of FID, (n, 3, 299, 299) float32 in [-1, 1] -> (n, dims) float32, for features(..., model=it).

    dims: 2048, 768, 192 or 64. weights: a path as for find_weights(). device: None takes the GPU if there is one.
    precision: fp32, or tf32 / bf16 (CUDA; bf16 anywhere), which are faster and change FID a little.
    Attributes: dims, size 299, device, digest (sha256 of the weights file).
    """
    if dims not in DIMS:
        raise FidError(f"dims must be one of {', '.join(map(str, DIMS))}, not {dims}")
    if precision not in PRECISIONS:
        raise FidError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision}")
    device = _device(device)
    if precision == "tf32" and device.type != "cuda":
        raise FidError(f"--precision tf32 needs a CUDA device, not {device}")
    return _Inception(dims, find_weights(weights), device, precision)


def random_networks(device=None):
    """Five small VGG-like networks with fixed random weights, the stand-in where the trained weights cannot be had.

    (n, 3, H, W) float32 in [-1, 1] -> (n, 5 * 256) float32. Distances in their features are a smoke test: noise of 30
    grey levels and ten repeated images stand out, but a set without one class may read better than fresh photos. They
    compare only at one image size (Naeem et al. 2002.09797, section 5, on random embeddings).
    Attributes: dims 1280, size None (the images' own), device, digest.
    """
    return _RandomNetworks(_device(device))


class _OwnNetwork:
    """An instance of the class Features of a user's file, tried out once."""
    distance = staticmethod(frechet_distance)

    def __init__(self, file, device):
        import torch
        self.file, self.device = file, device
        try:
            self.net = _load_class(file, "Features", device)
            self.size, self.dims, self.digest = (getattr(self.net, k) for k in ("size", "dims", "digest"))
            self.net = self.net.to(device).eval().requires_grad_(False)
        except FidError:
            raise
        except (Exception, SystemExit) as e:    # it is the user's code
            raise FidError(f"{file}: no usable class Features ({_in_brief(e)})") from None
        for k in ("size", "dims"):
            if type(getattr(self, k)) is not int or getattr(self, k) < 1:
                raise FidError(f"{file}: Features.{k} is {getattr(self, k)!r}, it must be a whole number above 0")
        if not isinstance(self.digest, str) or not self.digest.strip() or not self.digest.isprintable():
            raise FidError(f"{file}: Features.digest is {self.digest!r}, it must be a word")
        self.name, self.score = self.digest, f"FD ({self.digest})"
        self.try_out()

    def try_out(self):
        """FidError where the features of an image are not its own: those of two are made together, again, and apart.

        So that neither --batch-size nor a second call moves a score.
        """
        import torch
        noise = torch.rand(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        x = noise.mul(2).sub(1).to(self.device)
        together, again = self(x).float().clone(), self(x).float().clone()
        apart = torch.cat([self(one[None]).float().clone() for one in x])
        far = 0.01 * together.abs().max().item()
        for other, why in ((again, "two calls differ (it draws random numbers?)"),
                           (apart, "those of an image depend on the others of its batch (BatchNorm of the batch?)")):
            if not torch.allclose(together, other, rtol=0, atol=far, equal_nan=True):
                raise FidError(f"{self.file}: Features are no function of the image: {why}")

    def __call__(self, x):
        import torch
        try:
            with (torch.inference_mode(), _cudnn_precision(self.device, "ieee"),
                  contextlib.redirect_stdout(sys.stderr)):          # stdout is for the scores
                y = self.net(x.contiguous())
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as e:
            raise FidError(f"{self.file}: Features fails on images {tuple(x.shape)} ({_in_brief(e)})") from None
        got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        if not isinstance(y, torch.Tensor) or not y.is_floating_point() or y.shape != (len(x), self.dims):
            raise FidError(f"{self.file}: Features makes {got} of {len(x)} images, not floats ({len(x)}, {self.dims})")
        return y


def _load_class(file, name, device):
    """An instance of class `name` of a Python file, which may import what lies beside it."""
    if not file.is_file():
        raise FidError(f"{file}: no such file of features")
    spec = importlib.util.spec_from_file_location(f"{name.lower()}_{file.stem}", file)
    module, folder = importlib.util.module_from_spec(spec), str(file.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module             # dataclasses look their module up
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
            cls = getattr(module, name)
            return cls(device=device) if "device" in inspect.signature(cls).parameters else cls()
    finally:
        sys.path.remove(folder)


class _Inception:
    size, name, score = 299, "inception", "FID"
    distance = staticmethod(frechet_distance)

    def __init__(self, dims, file, device, precision):
        import torch
        self.dims, self.device, self.digest = dims, device, _digest(file)
        self.tf32 = precision == "tf32"
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.layers = {name: (w.to(device, self.dtype, memory_format=torch.channels_last), b.to(device, self.dtype))
                       for name, (w, b) in load_weights(file).items()}

    def conv(self, name, x, out, kernel, stride, padding):
        import torch
        return torch.relu_(torch.nn.functional.conv2d(x, *self.layers[name], stride, padding))

    def __call__(self, x):
        import torch
        with torch.inference_mode(), _cudnn_precision(self.device, "tf32" if self.tf32 else "ieee"):
            x = x.to(self.dtype, memory_format=torch.channels_last)
            return _graph(self.conv, x, self.dims).float()


class _RandomNetworks:
    size, name, score = None, "random", "rFD"
    distance = staticmethod(random_distance)
    dims, digest = len(RANDOM_SEEDS) * RANDOM_WIDTH, f"random-{len(RANDOM_SEEDS)}x{RANDOM_WIDTH}"

    def __init__(self, device):
        import torch
        self.device, self.networks = device, []
        for seed in RANDOM_SEEDS:
            rng, layers = np.random.RandomState(seed), []           # a frozen stream, the same on every machine
            for c, out in ((3, 32), (32, 64), (64, 128), (128, RANDOM_WIDTH)):
                w = rng.standard_normal((out, c, 3, 3)) * (2 / (9 * c)) ** 0.5      # He et al. 1502.01852
                layers.append(torch.from_numpy(w).float().to(device, memory_format=torch.channels_last))
            self.networks.append(layers)

    def __call__(self, x):
        import torch
        import torch.nn.functional as F
        parts = []
        with torch.inference_mode(), _cudnn_precision(self.device, "ieee"):
            for layers in self.networks:
                h = x
                for i, w in enumerate(layers):
                    h = torch.relu_(F.conv2d(h, w, padding=1))
                    h = h if i == 3 else F.avg_pool2d(h, 2, ceil_mode=True)
                parts.append(h.mean((2, 3)))
            return torch.cat(parts, 1)


def _graph(conv, x, dims):
    """The Inception network of the 2015-12-05 graph, (n, 3, 299, 299) -> (n, dims): the mean over a map's positions.

    conv(name, x, out_channels, kernel, stride, padding) is convolution, BatchNorm and ReLU. Differences from the
    published architecture (Szegedy et al. 1512.00567), kept because the weights were trained so: average pools do not
    count the padding, the last block's pool is a max pool.
    """
    import torch

    def chain(x, block, *layers):
        """Convolutions in a row: (name, out, kernel) keeps the map's size, (name, out, kernel, 2) halves it."""
        for name, out, kernel, *stride in layers:
            padding = (0, 0) if stride else (kernel[0] // 2, kernel[1] // 2)
            x = conv(f"{block}.{name}", x, out, kernel, stride[0] if stride else 1, padding)
        return x

    x = conv("Conv2d_1a_3x3", x, 32, (3, 3), 2, 0)                              # 149 x 149
    x = conv("Conv2d_2a_3x3", x, 32, (3, 3), 1, 0)                              # 147 x 147
    x = _max_pool(conv("Conv2d_2b_3x3", x, 64, (3, 3), 1, 1))                   # 64 x 73 x 73
    if dims == 64:
        return x.mean((2, 3))
    x = conv("Conv2d_3b_1x1", x, 80, (1, 1), 1, 0)
    x = _max_pool(conv("Conv2d_4a_3x3", x, 192, (3, 3), 1, 0))                  # 192 x 35 x 35
    if dims == 192:
        return x.mean((2, 3))
    for block, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = torch.cat(_branches_5(chain, x, block, pooled), 1)                  # 256, 288, 288 x 35 x 35
    x = torch.cat(_branches_6a(chain, x), 1)                                    # 768 x 17 x 17
    for block, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = torch.cat(_branches_6(chain, x, block, width), 1)                   # 768 x 17 x 17
    if dims == 768:
        return x.mean((2, 3))
    x = torch.cat(_branches_7a(chain, x), 1)                                    # 1280 x 8 x 8
    x = torch.cat(_branches_7(chain, x, "Mixed_7b", _average_pool(x)), 1)       # 2048 x 8 x 8
    x = torch.cat(_branches_7(chain, x, "Mixed_7c", _max_pool(x, 1, 1)), 1)     # 2048 x 8 x 8
    return x.mean((2, 3))


def _branches_5(chain, x, b, pooled):
    return [chain(x, b, ("branch1x1", 64, (1, 1))),
            chain(x, b, ("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
            chain(x, b, ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))),
            chain(_average_pool(x), b, ("branch_pool", pooled, (1, 1)))]


def _branches_6a(chain, x):
    b = "Mixed_6a"
    return [chain(x, b, ("branch3x3", 384, (3, 3), 2)),
            chain(x, b, ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)),
                  ("branch3x3dbl_3", 96, (3, 3), 2)),
            _max_pool(x)]


def _branches_6(chain, x, b, c):
    return [chain(x, b, ("branch1x1", 192, (1, 1))),
            chain(x, b, ("branch7x7_1", c, (1, 1)), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))),
            chain(x, b, ("branch7x7dbl_1", c, (1, 1)), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
                  ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))),
            chain(_average_pool(x), b, ("branch_pool", 192, (1, 1)))]


def _branches_7a(chain, x):
    b = "Mixed_7a"
    return [chain(x, b, ("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3), 2)),
            chain(x, b, ("branch7x7x3_1", 192, (1, 1)), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                  ("branch7x7x3_4", 192, (3, 3), 2)),
            _max_pool(x)]


def _branches_7(chain, x, b, pooled):
    y = chain(x, b, ("branch3x3_1", 384, (1, 1)))
    z = chain(x, b, ("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3)))
    return [chain(x, b, ("branch1x1", 320, (1, 1))),
            chain(y, b, ("branch3x3_2a", 384, (1, 3))),
            chain(y, b, ("branch3x3_2b", 384, (3, 1))),
            chain(z, b, ("branch3x3dbl_3a", 384, (1, 3))),
            chain(z, b, ("branch3x3dbl_3b", 384, (3, 1))),
            chain(pooled, b, ("branch_pool", 192, (1, 1)))]


def _average_pool(x):
    import torch
    return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _max_pool(x, stride=2, padding=0):
    import torch
    return torch.nn.functional.max_pool2d(x, 3, stride, padding)


def load_weights(path=None):
    """{layer: (weight (out, in, kh, kw), bias (out,))}, float32, BatchNorm (eps 0.001) folded into the 94 convolutions.

    path: as find_weights(). Every name and shape of the file is checked, `num_batches_tracked` may be there or not;
    nothing in the file is executed. FidError says what is wrong with it.
    """
    import torch
    file = find_weights(path)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:                      # torch raises a dozen types for a cut or foreign file
        raise FidError(f"{file}: no weights file, or cut ({type(e).__name__})") from None
    if not isinstance(state, dict):
        raise FidError(f"{file}: a state dict is needed, not a {type(state).__name__}")
    state = {k: v for k, v in state.items() if not str(k).endswith(".bn.num_batches_tracked")}
    wrong = _wrong_weights(state)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FidError(f"{file}: not the weights of the FID Inception network: {', '.join(wrong[:3])}{more}")
    folded = {}
    for name in [k[:-len(".conv.weight")] for k in state if k.endswith(".conv.weight")]:
        gamma, beta, mean, var = (state[f"{name}.bn.{k}"].double() for k in BATCH_NORM)
        scale = gamma / torch.sqrt(var + 0.001)
        weight = state[f"{name}.conv.weight"].double() * scale.view(-1, 1, 1, 1)
        folded[name] = weight.float(), (beta - mean * scale).float()
    return folded


def _wrong_weights(state):
    """What is wrong with a state dict of the network, in words; the names and shapes come from a run without values."""
    import torch
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}

    def record(name, x, out, kernel, stride, padding):
        shapes[f"{name}.conv.weight"] = (out, x.shape[1], *kernel)
        shapes.update({f"{name}.bn.{k}": (out,) for k in BATCH_NORM})
        weight = torch.empty(out, x.shape[1], *kernel, device="meta")
        return torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)

    def fits(value, shape):
        return isinstance(value, torch.Tensor) and value.is_floating_point() and tuple(value.shape) == shape

    _graph(record, torch.empty(1, 3, 299, 299, device="meta"), 2048)
    return ([f"{k} missing" for k in shapes if k not in state] + [f"{k} unexpected" for k in state if k not in shapes]
            or [f"{k} is not a float tensor {shape}" for k, shape in shapes.items() if not fits(state[k], shape)]
            or [f"{k} is not finite" for k in shapes if not torch.isfinite(state[k]).all()])


def find_weights(path=None, download=True):
    """Path of the Inception weights: `path`, else $FID_WEIGHTS, else in torch.hub's folder, else downloaded to there.

    Cheap: nothing is loaded; the standard file is checked by its sha256. FidError, one line, where there is none: call
    it before a long run.
    """
    for source, name in (("--weights", path), ("$FID_WEIGHTS", os.environ.get("FID_WEIGHTS"))):
        if name:
            file = Path(name).expanduser()
            if not file.is_file():
                raise FidError(f"{source}: no file {file}")
            break
    else:
        import torch
        file = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
        if not file.is_file():
            if not download:
                raise FidError(f"no Inception weights: download {WEIGHTS_URL} to {file}, "
                               "or name a file with --weights or FID_WEIGHTS")
            _download(file)
    if file.name == WEIGHTS_NAME and not _digest(file).startswith(WEIGHTS_SHA256):
        raise FidError(f"{file} is cut or another file than its name says (sha256 does not begin with "
                       f"{WEIGHTS_SHA256}): delete it and fetch {WEIGHTS_URL}")
    return file


def _download(file):
    """Fetch the standard weights to `file`; torch checks and renames: nothing half-written has the final name."""
    import torch
    _say(f"downloading {WEIGHTS_URL}")
    usual = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(SILENCE)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS_URL, str(file), WEIGHTS_SHA256, progress=sys.stderr.isatty())
    except Exception as e:                      # no network, a full disk, an answer that breaks off: one type each
        wrong_hash = "what came is cut or another file" if isinstance(e, RuntimeError) else None
        reason = wrong_hash or getattr(e, "reason", None) or getattr(e, "strerror", None) or e
        raise FidError(f"no Inception weights and no download ({reason}): bring {WEIGHTS_URL} to {file}, "
                       "or name a file with --weights or FID_WEIGHTS") from None
    finally:
        socket.setdefaulttimeout(usual)


def needed_weights(path=None):
    """find_weights() for command lines, which have a way without."""
    try:
        return find_weights(path)
    except FidError as e:
        raise FidError(f"{e}; --features random needs no weights, for a rough look") from None


def _digest(file):
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as e:
        raise FidError(f"{file}: cannot be read ({e.strerror})") from None


def _device(device):
    import torch
    if device in (None, "auto"):
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", _environment("LOCAL_RANK", 0) % torch.cuda.device_count())
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()    # "meta" has no values
    except Exception as e:                      # unknown name, no such card, build without CUDA: one type each
        raise FidError(f"--device {device}: not usable here ({str(e).splitlines()[0]})") from None
    return device


@contextlib.contextmanager
def _cudnn_precision(device, value):
    """torch lets cuDNN convolutions use tf32 unless told otherwise; the setting is put back."""
    import torch
    if device.type != "cuda":
        yield
        return
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = value
    try:
        yield
    finally:
        conv.fp32_precision = before


# ---------------------------------------------------------------------------------------------- images
# The words that name parts of a data set, and those that name what is drawn over photos.
SPLIT = re.compile("(train(ing)?|val(id|idation)?|dev|test(ing)?)([ _-]?(set|data|images?|20[0-9][0-9]))?", re.I)
MASK = "masks?|labels?|gt|ground[ _-]?truths?"
MASK_FOLDER = re.compile(f".*[ _-]masks|{MASK}|annotations?|segmentation.*", re.I)
MASK_FILE = re.compile(f"(.+)[ _.-]({MASK}|seg|segmentation)([ _-]?[0-9]+)?", re.I)
FEW = 16                        # colours of a mask at most


def class_images(folder, say=None):
    """All images below `folder`, sorted, as [(path, class or None), ...]; class = the first folder below `folder`.

    Hidden files and folders (.name, __MACOSX) are not taken; a dead link is, so that reading names it. say(line) is
    told which types of images are not read. FidError for what is no folder or cannot be read, for no images, and where
    train, test, ... stand in the place of classes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FidError(f"{folder}: " + (f"{folder} is a file; a folder is needed" if folder.is_file() else
                                        "this is no folder" if folder.exists() else "no such folder"))
    found = []
    for path in sorted(_all_images(folder, say)):
        parts = path.relative_to(folder).parts
        found.append((path, parts[0] if len(parts) > 1 else None))
    tops = {c or "." for _, c in found}
    splits = _splits(tops)
    if splits:
        only = "only " if tops == set(splits) else ""
        raise FidError(f"{folder} holds {only}{', '.join(splits)}; name one of them, such as {folder / splits[0]}: "
                       "the parts of a data set are no classes, and are not to be mixed")
    return found


def find_images(folder, say=None):
    """Sorted paths of the images directly in `folder`; where there is none, of those below it (class folders).

    Returns (paths, number below that were left out, whether the search went below). Which files are taken, and say: as
    class_images(); parts of a data set are told, not refused: a score against all of them is one, too. FidError for a
    folder that is missing, unreadable or empty.
    """
    images = _all_images(folder, say)
    direct = [path for path in images if path.parent == Path(folder)]
    if direct:
        return direct, len(images) - len(direct), False
    splits = _splits({path.relative_to(folder).parts[0] for path in images})
    if splits and say:
        say(f"{folder}: {', '.join(splits)} in it are read as one set; name one of them to score against it alone")
    return images, 0, True


def _splits(tops):
    """Those of a set of folder names that are parts of a data set, train before others; none where one stands among
    classes: train is a vehicle, too."""
    found = sorted((name for name in tops if SPLIT.fullmatch(name)), key=lambda n: (n[:5].lower() != "train", n))
    return found if len(found) > 1 or len(found) == len(tops) else []


def _all_images(folder, say=None):
    """Paths of all images below `folder`, by name, those of a folder before those of the folders in it."""
    images, others = [], []

    def walk(place, above):
        real = os.path.realpath(place)
        if real in above:                       # a link that leads back up
            return
        try:
            entries = sorted(os.scandir(place), key=lambda e: e.name)
            entries = [(e, e.is_dir()) for e in entries if not e.name.startswith((".", "__MACOSX"))]
        except OSError as e:
            raise FidError(f"{e.filename or place}: cannot be read ({e.strerror})") from None
        for e, is_folder in entries:
            if not is_folder and (e.is_symlink() or e.is_file()):       # no pipe, no device
                (images if e.name.lower().endswith(IMAGE_TYPES) else others).append(Path(e.path))
        for e, is_folder in entries:
            if is_folder:
                walk(e.path, above | {real})

    walk(folder, frozenset())
    accepted = " ".join(t[1:] for t in IMAGE_TYPES)
    types = collections.Counter(path.suffix.lower()[1:] for path in others if path.name.lower().endswith(UNREAD_TYPES))
    unread = ", ".join(f"{n} {suffix}" for suffix, n in sorted(types.items()))
    if not images:
        raise FidError(f"{folder}: no images in it or below; accepted are {accepted}; {len(others)} other files"
                       f"{f', of them images of types that are not read: {unread}' if unread else ''}")
    if unread and say:
        say(f"{folder}: not read, as their type is not: {unread} (accepted are {accepted})")
    return images


class Rule(NamedTuple):
    """How the files of one set become pixels; made by rule_for()."""

    limits: tuple = None        # what is black and what is white in images of more than 8 bits; None: each file's own
    declared: bool = False      # by the user, not found
    upright: bool = False       # turn photos as their EXIF says
    masks: tuple = ()           # files that are masks, by their names
    twins: frozenset = frozenset()      # files that share their stem with another: one of them may be a mask


def rule_for(paths, limits=None, upright=False):
    """The one Rule for all files of a set, to be handed to read_image() or read_square().

    limits: (low, high), the numbers that are black and white in images of 16 bits, 32 bits or floats. None: found by a
    first pass over those, the least usual range (8, 10, 12, 14, 16 bits; floats also [0, 1] and [-1, 1]) that holds
    the numbers of all. Images of 8 bits are not decoded for that, and read as they are. FidError where the set holds
    integers and floats.
    """
    masks = _masks_by_name(paths)
    photos = set(paths).difference(masks)
    count = collections.Counter(map(_stem, photos))
    twins = frozenset(p for p in photos if count[_stem(p)] > 1)
    declared = limits is not None
    blocks = [paths[k:k + 50] for k in range(0, 0 if declared else len(paths), 50)]
    found = []
    with (ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
          Progress("range of 16 bits and floats", len(paths), short=False) as progress):
        for of_block in pool.map(lambda block: list(map(_extent, block)), blocks):
            found += of_block
            progress(len(found))
    extents = list(filter(None, found))
    try:
        return Rule(usual_range(extents) if extents else limits, declared, upright, masks, twins)
    except NoRange as e:
        raise FidError(str(e)) from None


def checked_range(limits):
    """--range as a tuple; None if it was not given. FidError unless the first number is below the second."""
    if limits and not (math.isfinite(sum(limits)) and limits[0] < limits[1]):
        raise FidError(f"--range {limits[0]:g} {limits[1]:g}: the first number must be below the second")
    return limits and tuple(limits)


def _stem(path):
    return os.path.splitext(os.path.basename(path))[0].casefold()


def _extent(path):
    """extent() of a file of more than 8 bits; None of others, and of files that reading will name as bad."""
    try:
        with open(path if os.path.isfile(path) else os.devnull, "rb") as f:
            head = f.read(25)                   # most need no second look: a PNG's depth is its byte 24
        if head[:2] in (b"", b"\xff\xd8", b"BM", b"GI", b"RI") or head[1:4] == b"PNG" and head[24] <= 8:
            return None
        with _opened(path) as im:
            if is_deep(im):
                found = extent(im)
                usual_range([found])
                return found
    except Exception:                           # as in _rgb()
        return None


def _masks_by_name(paths):
    """Those paths that lie in a folder called masks or so beside others, or are called a_mask beside a."""
    folders = {os.path.dirname(p): os.path.abspath(os.path.dirname(p)) for p in paths}
    root = os.path.commonpath(folders.values()) if folders else ""
    named = {f: any(map(MASK_FOLDER.fullmatch, os.path.relpath(full, root).split(os.sep)))
             for f, full in folders.items()}
    stems = {os.path.splitext(p)[0] for p in paths}

    def is_mask(path):
        match = MASK_FILE.fullmatch(os.path.splitext(os.path.basename(path))[0])
        return named[os.path.dirname(path)] or match and os.path.join(os.path.dirname(path), match[1]) in stems

    return tuple(filter(is_mask, paths))


def rule_notes(rule, odds):
    """Lines for the user on a set that was read: odds holds the second result of read_image() or read_square()."""
    together, twins = collections.defaultdict(list), collections.defaultdict(set)
    for odd in odds:
        for what, value in odd.items():
            together[what].append(value)
    for stem, few in together["twin"]:
        twins[stem].add(few)
    flat = sum(few and len(twins[stem]) == 2 for stem, few in together["twin"])
    yield from reading_notes(together, rule.limits, rule.declared, rule.upright)
    if rule.masks or flat:
        such = f", such as {rule.masks[0]}" if rule.masks else f" (at most {FEW} colours, and the name of a photo)"
        yield (f"warning: {len(rule.masks) + flat} of the images look like masks and no photos{such}; "
               "keep them out of the folder")


def read_square(path, size, rule=Rule()):
    """(uint8 array (3, size, size) RGB, what is odd about it): the centre square, antialiased. As read_image();
    odd also has "resized" where it was."""
    image, odd = _rgb(path, rule)
    square = centre_square(image, size)
    odd.update({} if square is image else {"resized": True})
    return np.asarray(square).transpose(2, 0, 1), odd


def centre_square(image, size):
    """The centre square of a Pillow image, resized with antialias to (size, size); the image itself if it is so."""
    from PIL import Image
    w, h = image.size
    if (w, h) == (size, size):
        return image
    side = min(w, h)
    x, y = (w - side) // 2, (h - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))


def read_image(path, rule=Rule()):
    """(uint8 array (H, W, 3) RGB, a dict of what is odd about the file: see examine() and rule_notes()).

    Alpha is dropped and the first of several frames taken, as FID programs do. FidError names the file and the reason.
    """
    image, odd = _rgb(path, rule)
    return np.asarray(image), odd


def _rgb(path, rule):
    """(Pillow image in mode RGB, what is odd about it): the one rule by which a file becomes pixels."""
    try:
        with _opened(path) as im:
            limits, odd = examine(im, rule.limits, rule.declared)
            image = to_rgb(im, limits, odd.get("turned") if rule.upright else None)
            if path in rule.twins:
                odd["twin"] = _stem(path), image.getcolors(FEW) is not None
            return image, odd
    except Exception as e:                      # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        foreign = type(e).__name__ == "UnidentifiedImageError"
        reason = "not an image" if foreign else " ".join(str(e).split())[:200] or type(e).__name__
        raise FidError(f"{path} ({reason})") from None


def _opened(path):
    from PIL import Image
    if not os.path.isfile(path) and os.path.exists(path):           # a pipe would block, a device may have no end
        raise ValueError("no regular file")
    Image.init()
    im = Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN])
    if Image.MAX_IMAGE_PIXELS and im.width * im.height > Image.MAX_IMAGE_PIXELS:
        im.close()
        raise ValueError(f"{im.width}x{im.height} pixels, a decompression bomb?")
    return im


# ---------------------------------------------------------------------------------------------- pixels
# From here to the next line across, fid.py and crop_codebrim.py are the same: each can be copied alone.
IMAGE_TYPES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
               ".tif", ".tiff", ".webp")
UNREAD_TYPES = (".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".j2k",
                ".jp2", ".jxl", ".nef", ".orf", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga")     # named, not read
FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")   # whatever a name says; none starts programs
RANGES = ((0, 1), (-1, 1), *((0, 2 ** bits - 1) for bits in (8, 10, 12, 14, 16)))    # the first two are for floats
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}                      # EXIF orientation: PIL's Image.Transpose
FAR = 50                                        # per cent of white that the brightest pixel of a set should reach


class NoRange(ValueError):
    """Numbers of which nobody can say what is black and what is white."""


def is_deep(im):
    return im.mode.startswith(("I", "F"))


def extent(im):
    """(least, most, whether floats) of the numbers of a Pillow image of more than 8 bits."""
    v = np.asarray(im)
    if not np.isfinite(v).all():
        raise NoRange("pixels that are not finite")
    return v.min().item(), v.max().item(), v.dtype.kind == "f"


def usual_range(extents):
    """The least of RANGES that holds all these extents; a little more is overshoot where they are floats."""
    least, most, floats = min(e[0] for e in extents), max(e[1] for e in extents), {e[2] for e in extents}
    if len(floats) > 1:
        raise NoRange("images of whole numbers and of floats in one set: convert some, or give --range LOW HIGH")
    for low, high in RANGES[0 if True in floats else 2:]:
        slack = min(high - low, 255) / 5 if True in floats else 0
        if low - slack <= least and most <= high + slack:
            return low, high
    raise NoRange(f"pixels from {least:g} to {most:g}, outside 0..65535; save it with 8 or 16 bits, or give "
                  "--range LOW HIGH")


def examine(im, limits=None, declared=False):
    """Load an opened file -> (limits to read it by, {what is odd about it: how bright it is, or how it is turned}).

    limits: what is black and white in its set, None for the file's own; declared: by the user. Raises NoRange, and what
    Pillow's decoders raise.
    """
    odd = {"several": 1} if im.format != "MPO" and getattr(im, "is_animated", False) else {}
    # Of colours with 16 bits Pillow keeps the upper 8, and no longer says so; a BMP's 16 are those of a whole pixel.
    wide = ";16" in str(im.tile) and im.format != "BMP"
    im.load()
    if is_deep(im):
        if im.format == "TIFF" and im.tag_v2.get(262) == 0:         # Pillow turns those of 8 bits alone
            raise NoRange("a TIFF whose 0 is white: save it with black at 0")
        own = extent(im)
        fitting = limits if declared else usual_range([own])
        limits = limits or fitting
        odd["deep"] = (own[1] - limits[0]) / (limits[1] - limits[0])
    elif wide:
        odd["wide"] = max(high for band, (_, high) in zip(im.getbands(), im.getextrema()) if band != "A") / 255
    if im.has_transparency_data and not is_deep(im):
        alpha = (im if "A" in im.getbands() else im.convert("RGBA")).getchannel("A")
        odd.update({"transparent": 1} if alpha.getextrema()[0] < 255 else {})
    with contextlib.suppress(Exception):        # EXIF that is damaged turns nothing
        odd.update({"turned": TURNS[k] for k in [im.getexif().get(0x0112)] if k in TURNS})
    return limits, odd


def to_rgb(im, limits=None, turn=None):
    """A loaded Pillow image, or a crop of it, in mode RGB: limits as of examine(), turn as of its "turned"."""
    from PIL import Image
    if is_deep(im):
        im = Image.fromarray(eight_bits(np.asarray(im), *limits))
    return im.convert("RGB") if turn is None else im.convert("RGB").transpose(turn)


def eight_bits(v, low, high):
    """Numbers -> uint8, low to 0 and high to 255; of whole numbers in 256 equal parts, so that v * 257 and v << 8, both
    ways in which 8 bits are made 16, come back as v."""
    if v.dtype.kind == "f":
        return np.rint((v - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    low, high = math.floor(low), math.ceil(high)
    v = v.astype(np.int32 if max(-low, high) < 2 ** 22 else np.int64).clip(low, high)
    return ((v - low) * 256 // (high - low)).clip(0, 255).astype(np.uint8)


def reading_notes(odd, limits, declared, upright):
    """Lines for the user: odd {what: a list with what examine() said of each image}, the rest as there."""
    texts = dict(deep="have 16 bits or floats", wide="have 16 bits per colour, of which Pillow reads the upper 8",
                 turned="are turned upright, as their EXIF says" if upright else
                        "are read as they are stored, though their EXIF says turned (--upright turns them)",
                 several="hold several pages or frames, of which the first is read",
                 transparent="have transparent pixels, which are read in the colour stored beneath")
    cure = dict(deep="--range LOW HIGH says what is black and white", wide="save them with 8 bits")
    if limits and odd.get("deep"):
        texts["deep"] += f": {limits[0]:g} is read as black, {limits[1]:g} as white (other programs clip them)"
    for what, text in texts.items():
        if odd.get(what):
            yield f"{len(odd[what])} images {text}"
            percent = 100 * max(odd[what])
            if what in cure and not FAR <= percent <= 125:
                yield f"warning: the brightest pixel of them all reaches {percent:.3g} % of white; {cure[what]}"
    if declared and not odd.get("deep"):
        yield "--range has no effect: no image has more than 8 bits"


# ---------------------------------------------------------------------------------------------- arrays
def load_array(path):
    """uint8 (n, H, W, 3): the images of an .npz file that has them as arr_0, in either layout; None of other files.

    Such files are written by sample.py --npz and read by the evaluator of guided-diffusion. FidError for a bad one.
    """
    sizes = _arrays(path)
    if "arr_0" not in sizes:
        return None
    whole, packed = sizes["arr_0"]
    if whole > 1 << 30 and whole > 200 * packed:
        raise FidError(f"{path}: arr_0 is packed to burst: {packed} bytes that become {whole}")
    try:
        with np.load(path, allow_pickle=False) as f:
            return _channels_last_array(f["arr_0"])
    except FidError as e:
        raise FidError(f"{path}: arr_0: {e}") from None
    except Exception as e:                      # zip, zlib and numpy raise a dozen types for a cut or hostile file
        raise FidError(f"{path}: arr_0 cannot be read ({_in_brief(e)})") from None


def _arrays(path):
    """{name: (bytes, bytes packed)} of the arrays of an .npz file; {} where it is none: load_statistics() says so."""
    try:
        with zipfile.ZipFile(path) as z:
            return {i.filename.removesuffix(".npy"): (i.file_size, i.compress_size) for i in z.infolist()}
    except Exception:                           # zipfile raises a dozen types for a cut or hostile file
        return {}


def _in_brief(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}"


def _channels_last_array(images):
    """(n, H, W, 3) view of a uint8 array or tensor (n, H, W, 3) or (n, 3, H, W); FidError otherwise."""
    shape = tuple(images.shape)
    if len(shape) != 4 or str(images.dtype).rsplit(".", 1)[-1] != "uint8":
        raise FidError(f"images must be uint8 (n, H, W, 3) or (n, 3, H, W) in 0..255, not {images.dtype} {shape}; "
                       "from [-1, 1]: ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)")
    last, first = shape[3] == 3, shape[1] == 3
    if last and first:
        raise FidError(f"images of shape {shape}: both axes 1 and 3 have length 3, which one is colour cannot be told")
    if not last and not first:
        raise FidError(f"images of shape {shape}: neither axis 1 nor axis 3 has length 3")
    if 0 in shape[1:]:
        raise FidError(f"images of shape {shape} have no pixels")
    if last:
        return images
    return images.transpose(0, 2, 3, 1) if isinstance(images, np.ndarray) else images.permute(0, 2, 3, 1)


# ---------------------------------------------------------------------------------------------- from images to features
def features(images, weights=None, dims=2048, batch_size=50, workers=None, device=None, resize="torch",
             features="inception", precision="fp32", model=None, skip_bad=False, limits=None, upright=False,
             label=None):
    """Features (n, d) float32, a numpy array in the order of the images; batch_size and workers do not matter to them
    (on a GPU in tf32: but for its rounding).

    images: a folder, an .npz file with images (arr_0), a list of paths, or a uint8 array or tensor (n, H, W, 3) or
    (n, 3, H, W) in 0..255 (on any device).
    features: "inception" (d = dims: 2048, 768, 192, 64), "random" (d = 1280; images at their own size, no weights) or a
    file of your own, see network().
    resize: "torch" (bilinear to 299, no antialias, as pytorch-fid) or "clean" (bicubic with antialias, as clean-fid).
    model: what network() returned, to load it once; then weights, dims, device, features and precision are its own;
    any callable with size, dims and device will do. workers: decoding threads, None for min(8, CPUs).
    limits, upright: of rule_for(), where files are read. label: of lines of Progress on stderr, None for none.
    Raises FidError (a ValueError) for what the user can mend; bad files are all named, or left out with a warning if
    skip_bad.
    """
    if resize not in ("torch", "clean"):
        raise FidError(f"resize must be torch or clean, not {resize}")
    if batch_size < 1:
        raise FidError(f"batch_size must be at least 1, not {batch_size}")
    if isinstance(images, (str, os.PathLike)):
        array = load_array(images) if str(images).endswith(".npz") else None
        images = find_images(images)[0] if array is None else array
    elif hasattr(images, "shape"):
        images = _channels_last_array(images)
    else:
        images = [Path(p) for p in images]
    if not len(images):
        raise FidError("no images")
    if model is None:
        model = network(features, weights, dims, device, precision)
    if resize != "torch" and model.size != _Inception.size:
        raise FidError("resize clean is a way to the 299 pixels of the Inception network: it does not apply")
    rule = rule_for(images, limits, upright) if isinstance(images, list) else Rule()
    with Progress(label, len(images), short=False) if label else contextlib.nullcontext() as progress:
        found = _extract(images, model, batch_size, workers, resize, skip_bad, progress=progress, rule=rule)
    for note in found.notes():
        warnings.warn(note, stacklevel=2)
    return found.features


def _extract(images, model, batch_size=50, workers=None, resize="torch", skip_bad=False, keep=True, progress=None,
             ranks=None, size=None, rule=Rule()):
    """One pass over a list of paths or an array of images: batch b on rank b % W, the whole result on every rank.

    size: of the centre square that is taken of each image before all else; None for the whole image as it is.
    """
    from PIL import Image
    array = not isinstance(images, list)
    items = range(len(images)) if array else images

    def read(item):
        try:
            image, odd = (images[item], {}) if array else read_image(item, rule)
            if size and image.shape[:2] != (size, size):
                image = np.asarray(centre_square(Image.fromarray(image), size))
            return (_clean_resize(image) if resize == "clean" else image), odd
        except FidError as e:
            return e

    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    rank, world = (ranks.get_rank(), ranks.get_world_size()) if ranks else (0, 1)
    starts = range(0, len(items), batch_size)
    batches = [items[start:start + batch_size] for start in starts[rank::world]]
    if array and resize != "clean" and not size:
        workers = 0                             # there is nothing to decode
    stream = _decoded(itertools.chain.from_iterable(batches), read, workers, batch_size)
    found, batches = _Extracted(len(items), model.dims, keep, rule), iter(batches)
    for _ in starts[::world]:
        batch = next(batches, [])
        part = _Part(batch, itertools.islice(stream, len(batch)))
        if skip_bad or not (found.bad or part.bad):         # after a bad file the rest is only read, to name all such
            part.run(model, batch_size, progress and (lambda k: progress(found.seen + k)))
        part.images = None                                  # pixels do not travel
        parts = [part]
        if world > 1:
            parts = [None] * world
            ranks.all_gather_object(parts, part)
        for p in parts:
            found.add(p)
        if progress:
            progress(found.seen)
    if found.bad and not skip_bad:
        raise FidError(f"{len(found.bad)} of {len(items)} images cannot be read: {', '.join(found.bad)}; "
                       "remove them or pass --skip-bad")
    found.finish()
    return found


class _Part:
    """One batch: its files, and what came of them; without its pixels it travels between the ranks."""

    def __init__(self, batch, results):
        pairs = list(zip(batch, results))
        good = [(item, *result) for item, result in pairs if not isinstance(result, FidError)]
        self.seen, self.bad = len(pairs), [str(result) for _, result in pairs if isinstance(result, FidError)]
        self.files, self.images = [item for item, _, _ in good], [image for _, image, _ in good]
        self.odd, self.sizes = [odd for *_, odd in good if odd], {tuple(image.shape[:2]) for _, image, _ in good}
        self.rows = self.error = None

    def run(self, model, batch_size, progress=None):
        """The features (n, d), or in words why there are none: only what travels can be raised on all ranks."""
        import torch
        if self.images:
            try:
                self.rows = _forward(model, self.images, batch_size, progress)
                finite = np.isfinite(self.rows).all(1)
                if not finite.all():
                    at = self.files[int(finite.argmin())]
                    self.error = f"{'image ' if isinstance(at, int) else ''}{at}: the network's features are not finite"
            except FidError as e:
                self.error = str(e)
            except torch.OutOfMemoryError:
                self.error = f"{model.device}: out of memory at --batch-size {batch_size}; take a smaller one"


class _Extracted:
    """What one pass leaves: features (n, d) float32, or moments where only sums are kept, and the files it read."""

    def __init__(self, total, dims, keep, rule):
        self.features = np.empty((total, dims), np.float32) if keep else None
        self.moments = None if keep else _Moments()
        self.n, self.total, self.seen, self.rule = 0, total, 0, rule
        self.files, self.bad, self.odd, self.sizes = [], [], [], set()
        self.waiting = []                       # small batches: the moments of 50 rows cost as much as those of 2048

    def add(self, part):
        if part.error:
            raise FidError(part.error)
        self.seen += part.seen
        self.bad += part.bad
        self.odd += part.odd
        self.sizes |= part.sizes
        if part.rows is None:
            return
        self.files += part.files
        if self.moments is None:
            self.features[self.n:self.n + len(part.rows)] = part.rows
        else:
            self.waiting.append(part.rows)
            if sum(map(len, self.waiting)) >= BLOCK:
                self.finish()
        self.n += len(part.rows)

    def finish(self):
        if self.waiting:
            self.moments.update(np.concatenate(self.waiting))
            self.waiting = []
        if self.moments is None:
            self.features = self.features[:self.n]

    def notes(self):
        """What the user should know of the images, in words."""
        if self.bad:
            yield f"{len(self.bad)} of {self.total} images cannot be read and are left out: {', '.join(self.bad)}"
        yield from rule_notes(self.rule, self.odd)


def _decoded(items, read, workers, batch_size):
    """Yields read(item) for every item, in order; threads read ahead, at most 64 MB of it."""
    if not workers:
        yield from map(read, items)
        return
    with ThreadPoolExecutor(workers) as pool:   # Pillow decodes outside the interpreter's lock
        ahead, limit = collections.deque(), workers
        try:
            ahead.extend(pool.submit(read, item) for item in itertools.islice(items, limit))
            while ahead:
                result = ahead.popleft().result()
                if not isinstance(result, FidError):
                    limit = max(workers, min(2 * batch_size, (64 << 20) // result[0].nbytes))
                ahead.extend(pool.submit(read, item) for item in itertools.islice(items, max(limit - len(ahead), 0)))
                yield result
        finally:
            for f in ahead:
                f.cancel()


def _forward(model, images, batch_size, progress=None):
    """Features (len(images), d) float32, numpy, of images (H, W, 3); on the CPU in pieces of at most PIECE."""
    import torch
    step, out = min(batch_size, PIECE) if model.device.type == "cpu" else batch_size, []
    with torch.inference_mode():
        for (h, w, _), group in itertools.groupby(_network_input(images, model, step), key=lambda x: x.shape):
            most = step if model.size else max(1, min(step, PIXELS // (h * w)))
            while piece := list(itertools.islice(group, most)):
                k = len(piece)
                if model.device.type != "cpu":  # one shape for all: cuDNN chooses by it, and a sum's order with it
                    piece += [torch.zeros_like(piece[0])] * (most - k)
                x = torch.stack(piece).permute(0, 3, 1, 2)          # (most, 3, H, W), channels last in memory
                y = model(x)[:k]
                if y.shape != (k, model.dims):
                    raise FidError(f"the network makes {tuple(y.shape)} of {k} images, not ({k}, {model.dims})")
                out.append(y.float().cpu().numpy().copy())          # a network may use its memory again
                if progress:
                    progress(sum(map(len, out)))
    return np.concatenate(out)


def _network_input(images, model, step):
    """Yields (299, 299, 3) float32 in [-1, 1] of every image (H, W, 3), at its own size if the network has none."""
    import torch
    for (h, w, _), group in itertools.groupby(images, key=lambda image: image.shape):
        while part := list(itertools.islice(group, max(1, min(step, PIXELS // (h * w))))):
            x = torch.stack(part) if isinstance(part[0], torch.Tensor) else torch.from_numpy(np.stack(part))
            x = x.to(model.device).permute(0, 3, 1, 2)
            if x.dtype == torch.uint8:          # else clean-fid's resize has been here
                x = x.float().div_(127.5).sub_(1)       # 2 p / 255 - 1; resizing is linear, so on the few pixels
                if model.size:
                    x = torch.nn.functional.interpolate(x, size=(model.size, model.size), mode="bilinear",
                                                        align_corners=False, antialias=False)
            yield from x.permute(0, 2, 3, 1)


def _clean_resize(image):
    """(299, 299, 3) float32 in [-1, 1], as clean-fid (Parmar et al. 2104.11222).

    Bicubic with antialias, each channel in float, clipped, not rounded, then (p - 128) / 128.
    """
    from PIL import Image
    image = np.asarray(image.cpu() if hasattr(image, "cpu") else image).astype(np.float32)
    channels = [Image.fromarray(image[:, :, c]).resize((299, 299), Image.Resampling.BICUBIC) for c in range(3)]
    return (np.stack([np.asarray(c) for c in channels], 2).clip(0, 255) - 128) / 128


# ---------------------------------------------------------------------------------------------- statistics in files
# What a file says beside mu and sigma.
SAID = {"n": int, "resize": str, "weights": str, "features": str, "size": int, "upright": bool, "low": (int, float),
        "high": (int, float)}


def load_statistics(path):
    """{"mu": (d,), "sigma": (d, d)} float64 of an .npz file; also, None where it is silent, "n", "resize", "weights",
    "features": the digest of a network of your own, None of Inception's, and how images were read: "size" (0: whole),
    "upright", "low" and "high" of the range.

    Files of pytorch-fid, clean-fid and TTUR hold mu and sigma only. Nothing in the file is executed. FidError for
    anything else.
    """
    try:
        if any(whole > 1 << 30 for name, (whole, _) in _arrays(path).items() if name != "arr_0"):
            raise FidError(f"{path}: holds an array above 1 GB: no FID statistics")
        with np.load(path, allow_pickle=False) as f:
            if "mu" not in f.files or "sigma" not in f.files:
                keys = ", ".join(f.files) or "none"
                raise FidError(f"{path}: no FID statistics: keys mu and sigma are needed, there are {keys}")
            mu, sigma = _check_statistics(f["mu"], f["sigma"], path)
            said = {k: f[k].item() if k in f.files and f[k].size == 1 else None
                    for k in SAID}
    except FidError:
        raise
    except Exception as e:                      # zip, zlib and numpy raise a dozen types for a cut or hostile file
        raise FidError(f"{path}: no readable .npz file ({_in_brief(e)})") from None
    for k, kind in SAID.items():
        if said[k] is not None and (not isinstance(said[k], kind) or k == "n" and said[k] < 2):
            raise FidError(f"{path}: {k} = {said[k]!r} makes no sense")
    return {"mu": mu, "sigma": sigma, **said}


def save_statistics(path, mu, sigma, **said):
    """Write mu, sigma and what else is said to `path`, .npz appended if missing; returned. FidError where it exists."""
    path = _npz_name(path)
    _write(path, lambda f: np.savez(f, mu=mu, sigma=sigma, **said))
    return path


def _write(path, save):
    """save(file) into a file that is then renamed: nothing half-written, and nothing older, is under the final name."""
    part = path.with_name(f".fid-{os.getpid()}.part")
    try:
        with open(part, "xb") as f:
            save(f)
        _fresh(path)                            # once more: hours may have passed
        os.replace(part, path)
    except OSError as e:
        raise FidError(f"{path}: cannot be written ({e.strerror or e})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _npz_name(path):
    return _fresh(path if str(path).endswith(".npz") else f"{path}.npz")


def _fresh(path):
    """The path, where a file can be made and there is none; FidError otherwise, before the work and not after it."""
    path = Path(path)
    try:
        os.lstat(path)
        raise FidError(f"{path} exists and is not overwritten: delete it or choose another name")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:                        # such as a name that is too long
        raise FidError(f"{path}: cannot be written ({e.strerror})") from None
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise FidError(f"{path}: there is no folder {path.parent} that can be written to")
    return path


# ---------------------------------------------------------------------------------------------- command line
def _run(argv, rank, world):
    args = _arguments(argv)
    begin = time.monotonic()
    if args.save:
        _npz_name(args.save)
    if args.copies:
        _fresh(args.copies)
        for folder in [args.real, *args.fakes]:
            if Path(args.copies).resolve().is_relative_to(Path(folder).resolve()):
                raise FidError(f"--copies {args.copies} lies in {folder}, whose images are scored: name another place")
    real, *fakes = sides = [_side(path, args.use) for path in [args.real, *args.fakes]]
    if not args.save:
        _same_size(args, sides)
    own = network(args.features, device=args.device) if args.features.endswith(".py") else None
    dims, resize = _check(args, sides, own)
    digest = _read(args, sides, dims, resize, world, own)
    if rank:
        return
    _say_what_it_is_worth(args, sides, digest)
    if args.save:
        mu, sigma = real.sums()
        said = dict(n=real.n, dims=dims, resize=resize, weights=digest, size=args.size or 0, upright=args.upright,
                    **({"features": digest} if own else {}))
        if real.rule.limits:
            said["low"], said["high"] = real.rule.limits
        _say(f"wrote {save_statistics(args.save, mu, sigma, **said)}")
        return
    names = _names([s.path for s in fakes]) if fakes else []
    rows = [(name, f.n, _compare(real, f, args)) for name, f in zip(names, fakes)]
    extra = _summary(real, fakes, [scores for _, _, scores in rows], args) if len(fakes) > 1 else []
    floor = _floors(real, fakes, args) if args.floor else []
    closest, no_sheet = [], None
    if args.copies:
        try:
            closest = _closest(real, fakes, args.copies)
        except FidError as e:                   # such as a disk that is full by now: the scores are told first
            no_sheet = e
    if args.json:
        settings = _settings(args, sides, dims, resize, digest)
        out = {**settings, **_as_json(fakes, rows, extra + floor, closest)}
        print(json.dumps({**out, "seconds": round(time.monotonic() - begin, 2)}))
    elif len(rows) > 1:
        print("\n".join(_table(rows + extra + floor, args.own)))
    else:
        print("\n".join(f"{prefix}{_label(key, args.own)}: {_number(key, value)}" for prefix, scores in
                        [("", s) for _, _, s in rows] + [(f"{name} ", s) for name, _, s in floor]
                        for key, value in scores.items() if key in LABELS))
    if no_sheet:
        raise no_sheet


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise FidError(f"{message}; see --help")


def _whole(low, high):
    """The type of a flag that takes whole numbers in low..high."""
    def parse(text):
        if re.fullmatch("[0-9]{1,9}", text) and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of at least {low} and at most {high}")
    return parse


def _features(name):
    """The type of --features."""
    if name in ("inception", "random") or name.endswith(".py"):
        return name
    raise argparse.ArgumentTypeError(f"invalid choice: {name[:40]!r} (say inception, random, or a file FILE.py)")


def _parser():
    p = Parser(prog="fid.py", description=__doc__, allow_abbrev=False,
                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("real", metavar="REAL", help="folder of images, or an .npz file with images (arr_0) or with mu and sigma")
    add("fakes", metavar="FAKE", nargs="*", help="likewise; several give a table")
    add("--kid", action="store_true",
        help="unbiased MMD^2, cubic kernel, seeded subsets of min(1000, n), with its standard error")
    add("--prdc", action="store_true", help=f"precision, recall, density, coverage with k = {K} neighbours")
    add("--floor", action="store_true",
        help="what as many fresh photos as FAKE has would read against REAL, and the spread, estimated from random "
             "parts of REAL; a perfect generator reads near it, below as often as above")
    add("--copies", metavar="PNG",
        help=f"picture of the {CLOSEST} fakes closest to a real beside it, and the share of fakes nearer to a real "
             "than that real is to any other (not 0 for fresh images of the same kind either: compare with --floor)")
    add("--features", type=_features, default="inception", metavar="inception|random|FILE.py",
        help="random: five fixed random networks, no weights; prints rFD, a smoke test. FILE.py: the class Features of "
             "it, a torch module (n, 3, size, size) in [-1, 1] -> (n, dims) with size, dims and digest; prints FD")
    add("--use", choices=("images", "statistics"),
        help="what counts of an .npz file that holds both, arr_0 and mu, sigma (default: images)")
    add("--size", type=_whole(1, 10 ** 4), metavar="N",
        help="take of every image the centre square, resized with antialias to NxN, as okd_train.py does before it "
             "trains and scores (default: whole images, as other FID programs; under --features random, FAKE's size)")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--save", metavar="NPZ", help="write mu and sigma of the one folder given; never overwrites")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    reading_flags(add)
    add("--weights", help="Inception weights (default: $FID_WEIGHTS, torch.hub's folder, else downloaded)")
    add("--dims", type=int, choices=DIMS,
        help="layer of the network (default 2048); readings of different dims do not compare")
    add("--resize", choices=("torch", "clean"),
        help="torch: as pytorch-fid (default); clean: antialiased bicubic, as clean-fid")
    add("--precision", choices=PRECISIONS,
        help="arithmetic of the network (default fp32, the standard; others change FID a little)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--batch-size", type=_whole(1, 10 ** 6), help=f"images per pass (default 50; the CPU takes {PIECE} at once)")
    add("--workers", type=_whole(0, 256), help="threads that decode images (default: min(8, CPUs))")
    return p


def reading_flags(add):
    """--range and --upright, which rule_for() takes, for a parser's add_argument."""
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="the numbers that are black and white in images of 16 bits, 32 bits or floats (default: per folder, the "
             "least usual range that holds all its numbers: 8, 10, 12, 14, 16 bits, floats also [0, 1] and [-1, 1])")
    add("--upright", action="store_true",
        help="turn photos as their EXIF says (default: as they are stored, as other FID programs read them; TIFF files "
             "Pillow turns by itself)")


def _arguments(argv):
    argv = [re.sub("^--[^=]*", lambda m: m[0].replace("_", "-"), a) for a in argv]
    args = _parser().parse_intermixed_args(argv)
    for name, value in [("REAL", args.real), *(("FAKE", f) for f in args.fakes), ("--device", args.device),
                        ("--weights", args.weights), ("--copies", args.copies), ("--save", args.save)]:
        if value == "":
            raise FidError(f"{name} is empty")
    args.range = checked_range(args.range)
    args.own = None                             # digest of the network, where it is a user's
    args.sizes = None                           # words on sides whose images differ in size
    if args.features != "inception":
        for flag in ("dims", "weights", "resize", "precision", *["save"] * (args.features == "random")):
            if getattr(args, flag) is not None:
                raise FidError(f"--{flag} has no meaning with --features {args.features}")
    if args.save and (args.fakes or args.kid or args.prdc or args.floor or args.copies or args.json):
        raise FidError("--save NPZ takes one folder and computes its statistics only; score in a second call")
    if not args.save and not args.fakes and not args.floor:
        raise FidError("a FAKE folder is needed beside REAL (or --floor, or --save NPZ)")
    if args.copies and not args.fakes:
        raise FidError("--copies compares REAL with a FAKE folder")
    if args.copies and not args.copies.lower().endswith(".png"):
        raise FidError(f"--copies {args.copies}: the picture is a .png file")
    return args


class _Side:
    """One set of images: path, n, sizes; features (n, d) or statistics (mu, sigma), whichever were kept."""
    path = n = sizes = features = statistics = None
    images = None                               # list of files, or array (n, H, W, 3)
    rule = Rule()                               # by which those files are read
    said = None                                 # what an .npz of statistics says of itself
    both = False                                # an .npz file that holds images and statistics
    own = None                                  # of REAL: squared distance (n,) of every image to its nearest other
    nearest = None                              # of a FAKE: what copies() returns

    def __init__(self, **known):
        self.__dict__.update(known)

    def name(self, k):
        return str(self.images[k]) if isinstance(self.images, list) else f"{self.path}#{k}"

    def pixels(self, k):
        return read_image(self.images[k], self.rule)[0] if isinstance(self.images, list) else self.images[k]

    def sums(self):
        if self.statistics is None:
            self.statistics = statistics(self.features)
        return self.statistics

    def gauss(self):
        """What _frechet() takes: the features where they are few, else (mu, sigma)."""
        few = self.features is not None and len(self.features) <= 2 * self.features.shape[1]
        return self.features if few else self.sums()


def _side(path, use=None):
    """The side that a folder or an .npz file is, its images found but not yet read. use: of what a file holds both."""
    side = _Side(path=Path(path))
    if side.path.is_dir():
        side.images, below, recursive = find_images(side.path, _say)
        if recursive:
            _say(f"{path}: no image directly in it, {len(side.images)} found in the folders below")
        elif below:
            _say(f"{path}: the {below} images in the folders below it are not read")
    elif not os.path.lexists(side.path):
        raise FidError(f"{path}: no such folder or file")
    elif side.path.suffix != ".npz" or not side.path.is_file():
        raise FidError(f"{path}: neither a folder of images nor an .npz file")
    else:
        side.both = {"arr_0", "mu", "sigma"} <= _arrays(side.path).keys()
        if side.both:
            hint = "" if use else "; --use statistics takes the others"
            _say(f"{path} holds images (arr_0) and statistics (mu, sigma): the {use or 'images'} are read{hint}")
        if not (side.both and use == "statistics"):
            side.images = load_array(side.path)
    if side.images is None:
        side.said = load_statistics(side.path)
        side.statistics, side.n = (side.said["mu"], side.said["sigma"]), side.said["n"]
        return side
    side.n = len(side.images)
    if side.n < 2:
        only = f" ({side.images[0].name})" if isinstance(side.images, list) else ""
        raise FidError(f"{path}: a covariance needs at least 2 images, there is {side.n}{only}")
    return side


def _same_size(args, sides):
    """Where REAL's first image has another size than every FAKE's, set args.size under --features random.

    args.sizes says so, or which --size to give. Random networks take the images as they are: a score across sizes would
    tell of the sizes alone.
    """
    rule = Rule(args.range, args.range is not None, args.upright)
    real, *fakes = [_first_size(s, rule) for s in sides]
    if args.size or not real or len(set(fakes)) != 1 or fakes[0] in (None, real) or fakes[0][0] != fakes[0][1]:
        return
    n = fakes[0][0]
    differ = f"REAL's images differ in size from FAKE's, {real[1]}x{real[0]} from {n}x{n}"
    if args.features == "random":
        args.size = n
        args.sizes = f"{differ}: all were read as okd_train.py reads them, the centre square, resized (--size {n})"
    else:
        args.sizes = (f"{differ}, which raises the score; --size {n} reads all as okd_train.py does, the centre "
                      "square, resized")


def _first_size(side, rule):
    """(height, width) of the first image of a side that can be read, of twenty; None of statistics."""
    for first in [] if side.images is None else side.images[:20]:
        with contextlib.suppress(FidError):
            return (read_image(first, rule)[0] if isinstance(side.images, list) else first).shape[:2]
    return None


def _check(args, sides, own=None):
    """(dims, resize) of this comparison; FidError for all that can be refused before Inception is loaded."""
    real, folders, files = sides[0], [s for s in sides if not s.said], [s for s in sides if s.said]
    for s in files:
        for flag in ("kid", "prdc", "copies", "floor", "save"):
            if getattr(args, flag) and (s is real or flag != "floor"):
                raise FidError(f"{s.path}: --{flag} needs the images, this file holds their mean and covariance only")
        if args.features == "random":
            raise FidError(f"{s.path}: --features random needs the images")
    args.own = own.digest if own else None if folders else files[0].said["features"]
    dims = own.dims if own else args.dims or (2048 if folders else len(files[0].said["mu"]))
    said = [s.said["resize"] for s in files if s.said["resize"] and not folders]
    resize = args.resize or (said[0] if said else "torch")
    for s in files:
        if len(s.said["mu"]) != dims:
            hint = " (see --dims)" if folders else ""
            raise FidError(f"{s.path}: statistics of {len(s.said['mu'])} dims, the others have {dims}{hint}")
        for k, here in (("size", args.size or 0), ("upright", args.upright)):
            here = here if folders else files[0].said[k]
            if None not in (s.said[k], here) and s.said[k] != here:
                raise FidError(f"{s.path}: made with --{k} {s.said[k] or 'off'}, the others with {here or 'off'}")
        if s.said["resize"] not in (None, resize):
            raise FidError(f"{s.path}: made with resize {s.said['resize']}, the others with {resize}")
        if s.said["features"] != args.own and (s.said["features"] or s.said["weights"] or not own):
            raise FidError(f"{s.path}: made with features {s.said['features'] or 'inception'}, "
                           f"the others with {args.own or 'inception'}")
    if args.use and not any(s.both for s in sides):
        raise FidError("--use has no meaning here: no .npz file holds both images (arr_0) and statistics (mu, sigma)")
    for flag in ("weights", "device", "precision", "batch-size", "workers", "skip-bad", "size", "range", "upright"):
        if not folders and not own and getattr(args, flag.replace("-", "_")) not in (None, False):
            raise FidError(f"--{flag} has no meaning where all sides are .npz files of statistics")
    if args.floor and real.n < 4:
        raise FidError(f"{real.path}: a floor needs at least 4 images, there are {real.n}")
    for s in sides:
        halved = args.floor and s is real       # into parts
        if args.prdc and s.n <= (2 * K + 1 if halved else K):
            raise FidError(f"{s.path}: {s.n} images are too few for --prdc with k = {K}")
        if args.kid and s.n < (6 if halved else 3):
            raise FidError(f"{s.path}: {s.n} images are too few for --kid")
    return dims, resize


def _same_weights(sides, digest=None):
    """The digest of the weights that all .npz files and the network agree on; None where nobody says it."""
    for s in sides:
        said = s.said and s.said["weights"]
        digest = digest or said
        if said and said != digest[:len(said)]:
            raise FidError(f"{s.path}: made with weights {said[:8]}, the others with {digest[:8]}")
    return digest


def _read(args, sides, dims, resize, world, own=None):
    """Load the network and measure every folder, on all ranks; the digest of the weights."""
    if all(s.said for s in sides):
        return _same_weights(sides)
    ranks = None
    weights = needed_weights(args.weights) if args.features == "inception" else None   # before all that takes time
    if world > 1:
        import torch.distributed as ranks
        try:
            ranks.init_process_group("gloo")    # what travels are features, already on the CPU
        except Exception as e:                  # a variable that only torchrun sets, a rank that never came
            raise FidError(f"the {world} ranks cannot meet ({_in_brief(e)}); start them with torchrun") from None
    try:
        model = own or network(args.features, weights, dims, args.device, args.precision or "fp32")
        digest = _same_weights(sides, model.digest)
        for i, s in enumerate(sides):
            if not s.said:
                label = "real" if not i else f"fake {i} of {len(sides) - 1}" if len(sides) > 2 else "fake"
                _measure(s, label, model, args, resize, ranks)
        ranges = [(s.said["low"], s.said["high"]) if s.said else s.rule.limits for s in sides]
        ranges = sorted({limits for limits in ranges if limits and None not in limits})
        if len(ranges) > 1:
            _say(f"warning: the sides are read by different ranges, {' and '.join(map(str, ranges))}: where their "
                 "numbers mean the same, give --range LOW HIGH")
        if ranks:
            ranks.barrier()                     # nobody takes the group down while another still receives
    finally:
        if ranks and ranks.is_initialized():
            ranks.destroy_process_group()
    return digest


def _measure(side, label, model, args, resize, ranks):
    """One pass over a folder; the features are kept only where something needs them."""
    keep = args.kid or args.prdc or args.floor or args.copies or side.n <= 2 * model.dims
    if isinstance(side.images, list):
        side.rule = rule_for(side.images, args.range, args.upright)
    with Progress(label, side.n) as progress:
        found = _extract(side.images, model, args.batch_size or 50, args.workers, resize, args.skip_bad, keep, progress,
                         ranks, args.size, side.rule)
    for note in found.notes():
        _say(f"{side.path}: {note}")
    if found.n < 2:
        raise FidError(f"{side.path}: a covariance needs at least 2 images, {found.n} could be read")
    if isinstance(side.images, list):
        side.images = found.files
    side.n, side.features, side.sizes = found.n, found.features, found.sizes
    if not keep:
        side.statistics = found.moments.result()


class Progress:
    """A line on stderr: images done, images/s, time left; rewritten on a terminal, else every ten seconds.

    Called with the number of images done. Inside `with` a thread looks at the clock, too: there is a line however long
    one image takes. short: a line at the end of what took less than ten seconds, as well. Rank 0 alone speaks.
    """

    def __init__(self, label, total, short=True):
        self.label, self.total, self.start, self.done = label, total, time.monotonic(), 0
        self.last, self.told, self.over, self.lock = self.start, short, threading.Event(), threading.Lock()
        self.terminal = bool(sys.stderr) and sys.stderr.isatty()
        self.ended = not sys.stderr or os.environ.get("RANK", "0") != "0"

    def __enter__(self):
        self.watch = threading.Thread(target=self.look_again, daemon=True)
        self.watch.start()
        return self

    def __exit__(self, *exc):
        self.over.set()
        self.watch.join()

    def look_again(self):
        with contextlib.suppress(OSError):      # of stderr: nobody can be told
            while not self.over.wait(LOOK):
                self.look()

    def __call__(self, done):
        self.done = done
        self.look()

    def look(self):
        with self.lock:
            now, done, end = time.monotonic(), self.done, self.done == self.total
            silent = not self.told if end else now - self.last < (0.5 if self.terminal else 10)
            if not (self.ended or silent):
                rate = done / max(now - self.start, 1e-9)
                left = f", {(self.total - done) / rate:.0f} s left" if done and not end else ""
                print(f"{self.label}: {done}/{self.total} images, {rate:.{1 if rate > 0.1 else 3}f} images/s{left}",
                      file=sys.stderr, flush=True,
                      end=("\033[K\n" if end else "\r") if self.terminal else "\n")
                self.told, self.last = True, now
            self.ended |= end


def _compare(real, fake, args):
    """Scores of one FAKE against REAL as a dict, in the order in which they are printed."""
    if args.features == "random":
        out = {"rfd": random_distance(real.gauss(), fake.gauss())}
    else:
        out = dict(zip((_distance(args), "mean_term", "trace_term"), _frechet(real.gauss(), fake.gauss())))
    return {**out, **_further(real, fake, args)}


def _distance(args):
    """The key of the Frechet distance in the scores."""
    return "rfd" if args.features == "random" else "fd" if args.own else "fid"


def _further(real, fake, args):
    """The scores beside the Frechet distance, from the features."""
    prefix, out = "r" if args.features == "random" else "", {}
    if args.kid:
        out[prefix + "kid"], out[prefix + "kid_se"] = kernel_distance(real.features, fake.features)
    if args.prdc:
        out.update({prefix + k: v for k, v in prdc(real.features, fake.features).items()})
    if args.copies:
        if real.own is None:
            real.own = nearest_other(real.features)
        if fake.nearest is None:
            fake.nearest = copies(real.features, fake.features, real.own)
        out[prefix + "copies"] = fake.nearest[2]
    return out


def _union(fakes, args):
    """All FAKE sets as one; None where an .npz does not say its n."""
    if any(f.n is None for f in fakes):
        return None
    whole = _Side(n=sum(f.n for f in fakes))
    if args.copies:
        whole.nearest = None, None, sum(round(f.nearest[2] * f.n) for f in fakes) / whole.n
    held = all(f.features is not None for f in fakes)
    if held and (args.kid or args.prdc or whole.n <= 2 * fakes[0].features.shape[1]):
        whole.features = np.concatenate([f.features for f in fakes])
        return whole
    moments = _Moments()
    for f in fakes:
        mu, sigma = f.sums()
        moments.add(f.n, mu, sigma * (f.n - 1))
    whole.statistics = moments.result()
    return whole


def _summary(real, fakes, scores, args):
    """[("mean", None, scores), ("union", n, scores)] of two or more FAKE; the union only where it can be told."""
    rows = [("mean", None, {k: float(np.mean([s[k] for s in scores])) for k in scores[0]})]
    whole = _union(fakes, args)
    return rows + [("union", whole.n, _compare(real, whole, args))] if whole else rows


def _floors(real, fakes, args):
    """[("floor", n, scores), ("floor spread", n, their standard deviations)] for every n of a FAKE."""
    sizes, lines = sorted({f.n for f in fakes if f.n}) or [real.n], []
    for n in sizes:
        name = "floor" if len(sizes) == 1 else f"floor {n}"
        mean, spread, found, shrink = {}, {}, {}, 1
        distance = random_distance if args.features == "random" else frechet_distance
        mean[_distance(args)], spread[_distance(args)] = floor(real.features, n, distance)
        least = K + 1 if args.prdc else 3 if args.kid else 2
        for rows in parts(real.n, n, least) if args.kid or args.prdc or args.copies else ():
            shrink = _harmonic(*map(len, rows)) / _harmonic(real.n, n)
            for k, v in _further(*(_Side(features=real.features[part]) for part in rows), args).items():
                found.setdefault(k, []).append(v)
        for k in [k for k in found if not k.endswith("_se")]:
            # KID's mean is 0 at every n, its spread falls as 1 / n; those of shares as 1 / sqrt(n).
            mean[k] = float(np.mean(found[k])) * (shrink if "kid" in k else 1)
            spread[k] = float(np.std(found[k], ddof=1)) * (shrink if "kid" in k else shrink ** 0.5)
        lines += [(name, n, mean), (f"{name} spread", n, spread)]
    _say(f"floor: what {' or '.join(map(str, sizes))} fresh photos would read against the {real.n} of REAL, estimated "
         "from random parts of REAL; a perfect generator reads near it, below as often as above")
    return lines


def _closest(real, fakes, path):
    """The closest pairs of all FAKE: (fake, its k, real, its j, distance), nearest first; pictured at `path`."""
    pairs = []
    for f in fakes:
        index, distance, _ = f.nearest
        nearest_first = distance.argsort(kind="stable")[:CLOSEST]
        pairs += [(f, k, real, index[k], float(distance[k])) for k in nearest_first]
    pairs = sorted(pairs, key=lambda pair: pair[-1])[:CLOSEST]
    _copy_sheet(path, pairs)
    _say("copies: the share of fakes nearer to a real than that real is to any other real; "
         f"the {len(pairs)} closest pairs are in {path}")
    return pairs


def _copy_sheet(path, pairs):
    """PNG of _closest()'s pairs, fake left and real right, four in a row. FidError where `path` exists."""
    from PIL import Image, ImageDraw
    path = _fresh(path)
    edge, gap, text, columns = 128, 16, 34, 4
    width, height = columns * (2 * edge + gap) + gap, -(-len(pairs) // columns) * (edge + text + gap) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for at, (fake, k, real, j, distance) in enumerate(pairs):
        x, y = gap + at % columns * (2 * edge + gap), gap + at // columns * (edge + text + gap)
        for pixels, left in ((fake.pixels(k), x), (real.pixels(j), x + edge)):
            image = Image.fromarray(pixels)
            shrunk = [max(1, round(side * (edge - 2) / max(image.size))) for side in image.size]
            sheet.paste(image.resize(shrunk, Image.Resampling.BICUBIC), (left, y))
        words = (f"{at + 1}. fake ", fake.name(k)), (f"{distance:.4g} to real ", real.name(j))
        for line, (start, file) in enumerate(words):
            tail = one_line(file).encode("ascii", "replace").decode()
            name = start + tail
            while draw.textlength(name) > 2 * edge:
                tail = tail[1:]
                name = f"{start}...{tail}"
            draw.text((x, y + edge + 15 * line), name, fill="black")
    _write(path, lambda f: sheet.save(f, "PNG"))


def _say_what_it_is_worth(args, sides, digest):
    random = args.features == "random"
    if args.sizes:
        _say(args.sizes)
    if digest and not random and not args.own and not digest.startswith(WEIGHTS_SHA256):
        _say(f"weights {digest[:8]} are not the published ones ({WEIGHTS_SHA256}): "
             "the numbers compare only with others made with this file")
    if random:
        _say("rFD: five fixed random networks; a smoke test, which may rank sets wrongly and is not comparable with "
             "any FID")
        if len(set().union(*(s.sizes for s in sides))) > 1:
            _say("rFD: the images differ in size, which moves it as much as their content does; give all the same size")
    small = [s.n for s in sides if s.n is not None and s.n < SMALL]
    if small and not args.save:
        name = "rFD" if random else _label("fd", args.own) if args.own else "FID"
        _say(f"{name} from {min(small)} images is biased upwards (below {SMALL} it is mostly bias): compare only at "
             "the same n, see --floor and --kid")


def _settings(args, sides, dims, resize, digest):
    """What the JSON object says of how its numbers were made."""
    random, read = args.features == "random", not all(s.said for s in sides)
    trained = not random and not args.own
    return {"real": str(sides[0].path), "n_real": sides[0].n, "features": args.own or args.features,
            "dims": None if random else dims, "resize": resize if trained else None,
            "arithmetic": (args.precision or "fp32") if read else None, "size": args.size,
            "weights": digest[:8] if digest and trained else None, "k": K if args.prdc else None}


def _as_json(fakes, rows, summary, closest):
    """The scores of the JSON object: those of one FAKE, or a list "fakes"; mean, union, floor; closest pairs."""
    entries = [{"fake": str(f.path), "name": name, "n_fake": n, **scores} for f, (name, n, scores) in zip(fakes, rows)]
    out = dict(entries[0]) if len(entries) == 1 else {"fakes": entries} if entries else {}
    for name, n, scores in summary:
        out[name.replace(" ", "_")] = scores if n is None else {"n": n, **scores}
    if closest:
        out["closest"] = [{"fake": fake.name(k), "real": real.name(j), "distance": distance}
                          for fake, k, real, j, distance in closest]
    return out


def _number(key, value):
    return "-" if value is None else f"{value:.6f}" if "kid" in key else f"{value:.4f}"


def _label(key, own):
    """What a score is called, with the digest of the network if it is a user's own: FID is Inception's alone."""
    return f"{LABELS[key]} ({own})" if own else LABELS[key]


def _names(paths):
    """The shortest tails of the paths that differ."""
    for depth in range(1, 1 + max(len(p.parts) for p in paths)):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}:{p}" for i, p in enumerate(paths)]


def aligned(cells):
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]) for row in cells]


def _table(rows, own=None):
    """Lines of a table of (name, n, scores): a column per score."""
    keys = [k for k in rows[0][2] if k in LABELS]
    lines = [[name, str(n or "")] + [_number(k, scores.get(k)) for k in keys] for name, n, scores in rows]
    return aligned([["", "n"] + [_label(k, own).replace("standard error", "s.e.") for k in keys]] + lines)


# ---------------------------------------------------------------------------------------------- main
def main(argv=None):
    """Run the command line; returns the exit status. 2 with one line on stderr for what the user can mend."""
    rank = 0
    try:
        rank, world = _ranks()
        with warnings.catch_warnings(), standard_streams():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {str(message).splitlines()[0]}")
            try:
                _run(sys.argv[1:] if argv is None else argv, rank, world)
            except (MemoryError, RuntimeError) as e:    # torch has its own, and for the CPU a plain RuntimeError
                if not isinstance(e, MemoryError) and "memory" not in str(e):
                    raise
                raise FidError(f"out of memory ({_in_brief(e)})") from None
        return 0
    except BrokenPipeError:
        return 141
    except (FidError, OSError) as e:            # OSError: stdout on a full disk, a folder that went away
        if rank:                                # mostly rank 0 says the same, and the launcher ends us with it:
            time.sleep(5)                       # who is left after that has met an error of its own
        line = f"fid.py: {f'rank {rank}: ' if rank else ''}{one_line(e)}"
        print(line, file=sys.stderr, flush=True)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):     # torchrun's own report then ends with our line
            with contextlib.suppress(OSError), open(report, "w") as f:
                made = {"timestamp": str(int(os.fstat(f.fileno()).st_mtime))}
                json.dump({"message": {"message": line, "extraInfo": made}}, f)
        return 2
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def standard_streams():
    """For a command line: FidError where stdout is closed; what cannot be written to it fails inside, not at the end.

    A closed stderr takes what it is given. Names that are no text are spelled out, and FidError says which the locale
    has no letters for.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.stdout is None:
        raise FidError("stdout is closed; send it to a file, or to /dev/null")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UnicodeEncodeError as e:
        raise FidError(f"the locale has no letters for {e.object!r}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8") from None
    finally:
        try:
            sys.stdout.flush()
        except OSError:                         # what is left in its buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise


def _ranks():
    """(this process's rank, number of ranks), as torchrun says; (0, 1) without it."""
    rank, world = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
    if rank >= world:
        raise FidError(f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit together; "
                       "unset both or use torchrun")
    return rank, world


def _environment(name, default):
    """A whole number that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise FidError(f"{name}={text!r} in the environment is no number; unset it or use torchrun")
    return int(text)


def _say(line):
    if _environment("RANK", 0) == 0:
        print(one_line(line), file=sys.stderr, flush=True)


def one_line(text):
    """Line breaks, terminal commands and what is no text in a file's name, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that no file is left half-written
    ended = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(ended)     # one rank of several: in the end of the interpreter, threads of torch may call abort()
    sys.exit(ended)
