"""Scores for generated images: FID as papers quote it, KID, precision/recall/density/coverage, and what they are worth on small sets.

    python fid.py REAL FAKE                                 # folders of images (or .npz: statistics, or images arr_0); prints FID: 12.3456
    python fid.py REAL G1 G2 G3                             # one pass over REAL, a table with the mean and the union of all
    python fid.py REAL RUN/fakes/G* RUN2/fakes/G*           # a row per run: one group, or G1 G2 ..., their mean and their union
    python fid.py REAL FAKE --kid --prdc --floor            # and how good a perfect generator could look at these n
    python fid.py REAL FAKE --copies sheet.png              # the fakes closest to a real, side by side with it
    python fid.py REAL FAKE --features random               # no weights at hand: rFD, for relative comparison only
    python fid.py --save real.npz REAL                      # mu and sigma, as other FID programs read and write them
    torchrun --nproc_per_node 4 fid.py REAL FAKE            # the images are shared out over the ranks

Library:

    from fid import features, frechet_distance, kernel_distance, prdc
    real, fake = features("real/"), features(images)        # images: uint8 (n, H, W, 3) or (n, 3, H, W)
    frechet_distance(real, fake)

The number is that of pytorch-fid (same network, resize, pixel range and covariance), but exact where n < dims.
Compare only readings with the same n on both sides: FID falls when either side grows, see --floor.
References: Heusel et al. 1706.08500 (FID), Binkowski et al. 1801.01401 (KID), Kynkaanniemi et al. 1904.06991 (precision, recall),
Naeem et al. 2002.09797 (density, coverage; random networks as embeddings), Chong & Forsyth 1911.07023 (the bias of FID in n).
"""
import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

# torch, scipy and Pillow are imported where they are used: --help and every mistake in the arguments answer at once.

EXTENSIONS = ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp")
FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")     # whatever a file's name says; none that starts other programs
DIMS = (2048, 768, 192, 64)                    # width of the pooled layer, last to first
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d"                    # the file's sha256 begins so
SMALL = 2048                                   # below this many images FID is mostly bias
PIECE = 8                                      # images per pass on the CPU: activations stay in the caches, memory stays low


class FidError(ValueError):
    """What the user can mend; the message is one line that says what, where and how."""


# ---------------------------------------------------------------------------------------------------- distances

class _Moments:
    """Mean and covariance of rows that come in blocks, float64, in memory that does not depend on n (Chan et al. 1979)."""

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0

    def update(self, rows):
        for i in range(0, len(rows), 2048):
            x = rows[i:i + 2048].astype(np.float64)
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


def statistics(features):
    """Mean mu (d,) and covariance sigma (d, d), float64, ddof 1, of features (n, d) of any float type; n >= 2 or FidError."""
    m = _Moments()
    m.update(_rows(features, "features"))
    return m.result()


def _rows(f, what):
    f = np.asarray(f)
    if f.ndim != 2 or f.dtype.kind != "f":
        raise FidError(f"{what}: an array (n, d) of floats is needed, not {f.dtype} {f.shape}")
    return f


def _pair(features1, features2, what1="the first features", what2="the second features"):
    """Both as arrays (n1, d), (n2, d) of floats, or FidError."""
    a, b = _rows(features1, what1), _rows(features2, what2)
    if a.shape[1] != b.shape[1]:
        raise FidError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions cannot be compared")
    return a, b


def _factor(sigma):
    """R (rank, d) with R'R = sigma, by Cholesky with pivoting; what is below the rounding of sigma (d eps max) is dropped.

    Without the cut, rounding noise of size eps would enter the trace as sqrt(eps): 1e-5 of the distance at n << d.
    """
    d, diagonal = len(sigma), sigma.diagonal()
    tol = d * np.finfo(np.float64).eps * max(diagonal.max(), 0)
    if tol == 0:
        return np.zeros((0, d))
    try:
        from scipy.linalg.lapack import dpstrf
    except ImportError:
        w, v = np.linalg.eigh(sigma)
        if w[0] < -1e-6 * w[-1]:
            raise FidError("sigma is no covariance: it has negative eigenvalues")
        keep = w > tol
        return (v[:, keep] * np.sqrt(w[keep])).T
    c, pivots, rank, info = dpstrf(sigma, lower=1, tol=tol)
    if info < 0:
        raise FidError("sigma is no covariance: it is not finite")
    r = np.empty((rank, d))
    r[:, pivots - 1] = np.tril(c)[:, :rank].T
    if np.abs(diagonal - np.einsum("kd,kd->d", r, r)).max() > 1e-6 * diagonal.max():
        raise FidError("sigma is no covariance: it has negative eigenvalues")
    return r


def _mean_and_trace(side):
    if isinstance(side, tuple):
        return side[0], float(np.trace(side[1]))
    if len(side) < 2:
        raise FidError(f"a covariance needs at least 2 images, there is {len(side)}")
    mean = side.mean(0, dtype=np.float64)
    return mean, sum(float(((side[i:i + 2048] - mean) ** 2).sum()) for i in range(0, len(side), 2048)) / (len(side) - 1)


def _root(side, most_rows):
    """R (k, d) with R'R = the side's covariance: the centred features themselves, or a factor where they are more than most_rows."""
    if not isinstance(side, tuple):
        if len(side) <= most_rows:
            return (side - side.mean(0, dtype=np.float64)) / np.sqrt(len(side) - 1)
        side = statistics(side)
    return _factor(side[1])


def _frechet(a, b):
    """(distance, mean term, trace term) of two sides, each features (n, d) or a tuple (mu, sigma)."""
    (mu1, trace1), (mu2, trace2) = _mean_and_trace(a), _mean_and_trace(b)
    d = len(mu1)
    fewest = min([len(s) for s in (a, b) if not isinstance(s, tuple)], default=d + 1)
    most_rows = 2 * d if fewest <= d else d     # one small side: its n columns keep the cross-Gram matrix cheap
    # tr sqrt(S1 S2) is the sum of the singular values of R1 R2'; for features that is the centred cross-Gram matrix.
    cross = np.linalg.svd(_root(a, most_rows) @ _root(b, most_rows).T, compute_uv=False).sum()
    mean_term, trace_term = float(((mu1 - mu2) ** 2).sum()), trace1 + trace2 - 2 * float(cross)
    total = mean_term + trace_term
    if not np.isfinite(total):
        raise FidError("the distance is not finite: the features or statistics hold NaN or infinity")
    if total < -1e-6 * (trace1 + trace2):
        raise FidError(f"the distance came out as {total:g}: the statistics are no covariances")
    return max(total, 0.0), mean_term, trace_term


def frechet_distance(mu1, sigma1, mu2=None, sigma2=None):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), a float >= 0 (Heusel et al. 1706.08500, eq. 6).

    frechet_distance(mu1, sigma1, mu2, sigma2): means (d,), covariances (d, d).
    frechet_distance(features1, features2): arrays (n1, d), (n2, d). With n <= d this is exact (rank n - 1) and needs no covariance:
    it is both faster and more exact than going through statistics().
    Raises FidError for shapes that do not fit, values that are not finite, matrices that are no covariances.
    """
    if (mu2 is None) != (sigma2 is None):
        raise FidError("frechet_distance takes mu1, sigma1, mu2, sigma2 or two feature arrays")
    if mu2 is None:
        a, b = _pair(mu1, sigma1)
    else:
        a, b = (_check_statistics(m, s, "statistics") for m, s in ((mu1, sigma1), (mu2, sigma2)))
        if a[0].shape != b[0].shape:
            raise FidError(f"statistics of {len(a[0])} and of {len(b[0])} dimensions cannot be compared")
    return _frechet(a, b)[0]


def _check_statistics(mu, sigma, what):
    mu, sigma = np.asarray(mu), np.asarray(sigma)
    if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
        raise FidError(f"{what}: mu and sigma must be real numbers")
    mu, sigma = np.atleast_1d(mu).astype(np.float64), np.atleast_2d(sigma).astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise FidError(f"{what}: mu {mu.shape} and sigma {sigma.shape} do not fit together")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise FidError(f"{what}: mu or sigma is not finite")
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-6 * max(np.abs(sigma).max(), 1e-300)):
        raise FidError(f"{what}: sigma is not symmetric")
    return mu, sigma


def random_distance(features1, features2):
    """rFD: the mean over the five random networks of the Frechet distance in each one's own features, (n1, d), (n2, d)."""
    a, b = _rows(features1, "the first features"), _rows(features2, "the second features")
    width = len(RANDOM_SEEDS) * RANDOM_WIDTH
    if a.shape[1] != width or b.shape[1] != width:
        raise FidError(f"rFD needs features(..., features='random') on both sides, width {width}, not {a.shape[1]} and {b.shape[1]}")
    return _random_distance(a, b)


def _random_distance(a, b):
    """rFD of two sides, each features (n, 5 * 256) or a tuple (mu, sigma) over all networks, of which each network's own block counts."""
    part = lambda side, i: (side[0][i], side[1][i, i]) if isinstance(side, tuple) else side[:, i]
    networks = [slice(k * RANDOM_WIDTH, (k + 1) * RANDOM_WIDTH) for k in range(len(RANDOM_SEEDS))]
    return float(np.mean([_frechet(part(a, i), part(b, i))[0] for i in networks]))


def kernel_distance(features1, features2, subsets=100, subset_size=1000, seed=0):
    """KID: unbiased MMD^2 with the kernel (x.y / d + 1)^3, and its standard error (Binkowski et al. 1801.01401, section 4).

    The mean over `subsets` seeded draws without replacement of min(subset_size, n1, n2) rows from each side; where both sides are
    no larger than that, the one value over all rows. Values below 0 are normal near equality.
    The standard error is that of this mean under a new draw of images, by the delete-one jackknife over all images (the spread over
    overlapping subsets says nothing about it). Near distance 0 it errs on the large side, by up to sqrt(2).
    Returns (mean, standard error), floats. FidError for fewer than 3 rows or widths that differ.
    """
    a, b = _pair(features1, features2)
    m = min(subset_size, len(a), len(b))
    if m < 3:
        raise FidError(f"KID needs at least 3 images on each side, there are {len(a)} and {len(b)}")
    if m == len(a) == len(b):
        subsets = 1
    rng = np.random.RandomState(seed)
    total, shift_a, shift_b = 0.0, np.zeros(len(a)), np.zeros(len(b))
    for _ in range(subsets):
        ia = rng.permutation(len(a))[:m] if len(a) > m else np.arange(m)
        ib = rng.permutation(len(b))[:m] if len(b) > m else np.arange(m)
        x, y = a[ia].astype(np.float64), b[ib].astype(np.float64)
        kernel = lambda p, q: (p @ q.T / p.shape[1] + 1) ** 3
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        np.fill_diagonal(xx, 0)
        np.fill_diagonal(yy, 0)
        sxx, syy, sxy = xx.sum(), yy.sum(), xy.sum()
        value = (sxx + syy) / (m * (m - 1)) - 2 * sxy / m ** 2
        total += value
        less = (m - 1) * (m - 2)                # pairs that are left on a side without one row
        shift_a[ia] += (sxx - 2 * xx.sum(1)) / less + syy / (m * (m - 1)) - 2 * (sxy - xy.sum(1)) / (m * (m - 1)) - value
        shift_b[ib] += (syy - 2 * yy.sum(1)) / less + sxx / (m * (m - 1)) - 2 * (sxy - xy.sum(0)) / (m * (m - 1)) - value
    variance = sum(((s - s.mean()) ** 2).sum() for s in (shift_a / subsets, shift_b / subsets)) * (m - 1) / m
    return float(total / subsets), float(np.sqrt(variance))


def _squared_distances(a, b):
    """Yields (slice of a, squared distances (rows, len(b)) in float64, at most 128 MB); both are moved by b's mean, so that little cancels."""
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
        yield slice(i, i + len(x)), np.maximum(d2, 0, out=d2)


def _nearest(a, k):
    """Squared distance of every row of a (n, d) to its k-th nearest other row."""
    radius = np.empty(len(a))
    for rows, d2 in _squared_distances(a, a):
        d2[np.arange(len(d2)), np.arange(rows.start, rows.stop)] = np.inf
        d2.partition(k - 1, axis=1)
        radius[rows] = d2[:, k - 1]
    return radius


def prdc(real, fake, k=5):
    """Precision, recall (Kynkaanniemi et al. 1904.06991), density and coverage (Naeem et al. 2002.09797) as a dict of floats.

    real (n1, d), fake (n2, d). A ball reaches from each row to its k-th nearest other row of the same side; inside means strictly nearer.
    precision: share of fakes inside some real ball; recall: share of reals inside some fake ball; density: real balls that hold a fake,
    mean over fakes, divided by k (may exceed 1); coverage: share of real balls that hold a fake. FidError unless n1, n2 > k >= 1.
    """
    real, fake = _pair(real, fake, "real", "fake")
    if k < 1 or min(len(real), len(fake)) <= k:
        raise FidError(f"precision, recall, density and coverage with k = {k} need more than {k} images on each side, "
                       f"there are {len(real)} and {len(fake)}")
    # A neighbour at exactly the radius lies outside; the factor keeps that so when two blocks round differently.
    inside = 1 - 1e-10
    real_radius, fake_radius = _nearest(real, k) * inside, _nearest(fake, k) * inside
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


def copies(real, fake):
    """Every fake's nearest real: (index (n2,) into real, distance (n2,), share of fakes that look copied), features (n1, d), (n2, d).

    A fake counts when it is nearer to its nearest real than that real is to its own nearest other real, or has exactly its features. Fresh
    images of the same kind count too (0.1 to 0.7 of them, the fewer the more dimensions their spread has): compare the share with that
    between two halves of the real images, not with 0. FidError for fewer than 2 reals.
    """
    real, fake = _pair(real, fake, "real", "fake")
    if len(real) < 2:
        raise FidError(f"a copy check needs at least 2 real images, there is {len(real)}")
    index, distance, copied = _copies(real, fake, _nearest(real, 1))
    return index, distance, float(copied.mean())


def _copies(real, fake, own):
    """As copies(), but which fakes count (n2,) bool in place of their share; own (n1,): _nearest(real, 1), which serves any number of fakes."""
    index, d2_nearest = np.empty(len(fake), int), np.empty(len(fake))
    for rows, d2 in _squared_distances(fake, real):
        index[rows] = d2.argmin(1)
        # Again from the difference: equal features are 0 apart, not the rounding of two large numbers.
        d2_nearest[rows] = ((fake[rows].astype(np.float64) - real[index[rows]]) ** 2).sum(1)
    return index, np.sqrt(d2_nearest), (d2_nearest < own[index] * (1 - 1e-10)) | (d2_nearest == 0)


def halves(features, seed=0):
    """Two random halves of the rows, for the floor: the scores between two samples of the same images."""
    if len(features) < 4:
        raise FidError(f"a floor needs at least 4 real images, there are {len(features)}")
    order = np.random.RandomState(seed).permutation(len(features))
    half = len(order) // 2
    return features[np.sort(order[:half])], features[np.sort(order[half:2 * half])]


# ----------------------------------------------------------------------------------------------------- networks

def _graph(conv, x, dims):
    """The Inception network of the 2015-12-05 graph, (n, 3, 299, 299) -> (n, dims) by the mean over the last map's positions.

    conv(name, x, out_channels, kernel, stride, padding) is convolution, BatchNorm and ReLU. Differences from the published architecture
    (Szegedy et al. 1512.00567), kept because the weights were trained so: average pools do not count the padding, the last block's pool is a max pool.
    """
    import torch
    import torch.nn.functional as F
    average = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    shrink = lambda x: F.max_pool2d(x, 3, 2)

    def chain(x, block, *layers):
        for name, out, kernel, stride, padding in layers:
            x = conv(f"{block}.{name}", x, out, kernel, stride, padding)
        return x

    x = conv("Conv2d_1a_3x3", x, 32, (3, 3), 2, 0)                                  # 149
    x = conv("Conv2d_2a_3x3", x, 32, (3, 3), 1, 0)                                  # 147
    x = shrink(conv("Conv2d_2b_3x3", x, 64, (3, 3), 1, 1))                          # 73
    if dims == 64:
        return x.mean((2, 3))
    x = conv("Conv2d_3b_1x1", x, 80, (1, 1), 1, 0)
    x = shrink(conv("Conv2d_4a_3x3", x, 192, (3, 3), 1, 0))                         # 35
    if dims == 192:
        return x.mean((2, 3))
    for b, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = torch.cat([
            chain(x, b, ("branch1x1", 64, (1, 1), 1, 0)),
            chain(x, b, ("branch5x5_1", 48, (1, 1), 1, 0), ("branch5x5_2", 64, (5, 5), 1, 2)),
            chain(x, b, ("branch3x3dbl_1", 64, (1, 1), 1, 0), ("branch3x3dbl_2", 96, (3, 3), 1, 1), ("branch3x3dbl_3", 96, (3, 3), 1, 1)),
            chain(average(x), b, ("branch_pool", pooled, (1, 1), 1, 0))], 1)
    b = "Mixed_6a"
    x = torch.cat([
        chain(x, b, ("branch3x3", 384, (3, 3), 2, 0)),
        chain(x, b, ("branch3x3dbl_1", 64, (1, 1), 1, 0), ("branch3x3dbl_2", 96, (3, 3), 1, 1), ("branch3x3dbl_3", 96, (3, 3), 2, 0)),
        shrink(x)], 1)                                                              # 768 x 17 x 17
    for b, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = torch.cat([
            chain(x, b, ("branch1x1", 192, (1, 1), 1, 0)),
            chain(x, b, ("branch7x7_1", c, (1, 1), 1, 0), ("branch7x7_2", c, (1, 7), 1, (0, 3)), ("branch7x7_3", 192, (7, 1), 1, (3, 0))),
            chain(x, b, ("branch7x7dbl_1", c, (1, 1), 1, 0), ("branch7x7dbl_2", c, (7, 1), 1, (3, 0)), ("branch7x7dbl_3", c, (1, 7), 1, (0, 3)),
                  ("branch7x7dbl_4", c, (7, 1), 1, (3, 0)), ("branch7x7dbl_5", 192, (1, 7), 1, (0, 3))),
            chain(average(x), b, ("branch_pool", 192, (1, 1), 1, 0))], 1)
    if dims == 768:
        return x.mean((2, 3))
    b = "Mixed_7a"
    x = torch.cat([
        chain(x, b, ("branch3x3_1", 192, (1, 1), 1, 0), ("branch3x3_2", 320, (3, 3), 2, 0)),
        chain(x, b, ("branch7x7x3_1", 192, (1, 1), 1, 0), ("branch7x7x3_2", 192, (1, 7), 1, (0, 3)), ("branch7x7x3_3", 192, (7, 1), 1, (3, 0)),
              ("branch7x7x3_4", 192, (3, 3), 2, 0)),
        shrink(x)], 1)                                                              # 1280 x 8 x 8
    for b, pool in (("Mixed_7b", average), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        y = chain(x, b, ("branch3x3_1", 384, (1, 1), 1, 0))
        z = chain(x, b, ("branch3x3dbl_1", 448, (1, 1), 1, 0), ("branch3x3dbl_2", 384, (3, 3), 1, 1))
        x = torch.cat([
            chain(x, b, ("branch1x1", 320, (1, 1), 1, 0)),
            chain(y, b, ("branch3x3_2a", 384, (1, 3), 1, (0, 1))), chain(y, b, ("branch3x3_2b", 384, (3, 1), 1, (1, 0))),
            chain(z, b, ("branch3x3dbl_3a", 384, (1, 3), 1, (0, 1))), chain(z, b, ("branch3x3dbl_3b", 384, (3, 1), 1, (1, 0))),
            chain(pool(x), b, ("branch_pool", 192, (1, 1), 1, 0))], 1)              # 2048 x 8 x 8
    return x.mean((2, 3))


def find_weights(path=None, download=True):
    """Path of the Inception weights: `path`, else $FID_WEIGHTS, else torch.hub's checkpoints folder, else downloaded to there.

    Cheap: nothing is loaded; the standard file is checked by its sha256. FidError, one line, where there is none: call it before a long run.
    """
    for source, name in (("--weights", path), ("$FID_WEIGHTS", os.environ.get("FID_WEIGHTS"))):
        if name:
            file = Path(name).expanduser()
            if not file.is_file():
                raise FidError(f"{source}: no file {file}")
            break
    else:
        if "torch" in sys.modules:
            hub = sys.modules["torch"].hub.get_dir()
        else:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            hub = Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch").expanduser() / "hub"
        file = Path(hub) / "checkpoints" / WEIGHTS_URL.rsplit("/", 1)[1]
        if not file.is_file():
            if not download:
                raise FidError(f"no Inception weights: download {WEIGHTS_URL} to {file}, or name a file with --weights or FID_WEIGHTS")
            _download(file)
    if file.name == WEIGHTS_URL.rsplit("/", 1)[1] and not _digest(file).startswith(WEIGHTS_SHA256):
        raise FidError(f"{file} is cut or another file than its name says (sha256 does not begin with {WEIGHTS_SHA256}): delete it and fetch {WEIGHTS_URL}")
    return file


def _digest(file):
    h = hashlib.sha256()
    try:
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                h.update(block)
    except OSError as e:
        raise FidError(f"{file}: cannot be read ({e.strerror})") from None
    return h.hexdigest()


def _download(file):
    """Fetch the standard weights to `file`: checked, then renamed, so that a half-written file never has the final name."""
    import http.client
    import urllib.request
    part = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {WEIGHTS_URL}", file=sys.stderr)
        with urllib.request.urlopen(WEIGHTS_URL, timeout=30) as answer, \
                tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as out:
            part = Path(out.name)
            while block := answer.read(1 << 20):
                out.write(block)
        if not _digest(part).startswith(WEIGHTS_SHA256):
            raise OSError("what came is cut or another file")
        os.replace(part, file)
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", None) or getattr(e, "strerror", None) or e
        raise FidError(f"no Inception weights and no download ({reason}): bring {WEIGHTS_URL} to {file}, or name a file with --weights or FID_WEIGHTS") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def load_weights(path=None):
    """{layer: (weight (out, in, kh, kw), bias (out,))} in float32 with BatchNorm (eps 0.001) folded into the 94 convolutions.

    path: as find_weights(). Every name and shape of the file is checked, `num_batches_tracked` may be there or not; nothing in the file is
    executed. FidError says what is wrong with it.
    """
    import torch
    file = find_weights(path)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:                      # torch raises a dozen types for a cut or foreign file
        raise FidError(f"{file}: no weights file, or cut ({type(e).__name__})") from None
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}

    def record(name, x, out, kernel, stride, padding):
        shapes[f"{name}.conv.weight"] = (out, x.shape[1], *kernel)
        shapes.update({f"{name}.bn.{k}": (out,) for k in ("weight", "bias", "running_mean", "running_var")})
        return torch.nn.functional.conv2d(x, torch.empty(out, x.shape[1], *kernel, device="meta"), stride=stride, padding=padding)

    _graph(record, torch.empty(1, 3, 299, 299, device="meta"), 2048)
    if not isinstance(state, dict):
        raise FidError(f"{file}: a state dict is needed, not a {type(state).__name__}")
    state = {k: v for k, v in state.items() if not str(k).endswith(".bn.num_batches_tracked")}
    wrong = [f"{k} missing" for k in shapes if k not in state] + [f"{k} unexpected" for k in state if k not in shapes]
    if not wrong:
        wrong = [f"{k} is not a float tensor {s}" for k, s in shapes.items() if not isinstance(state[k], torch.Tensor)
                 or not state[k].is_floating_point() or tuple(state[k].shape) != s]
        wrong = wrong or [f"{k} is not finite" for k in shapes if not torch.isfinite(state[k]).all()]
    if wrong:
        raise FidError(f"{file}: not the weights of the FID Inception network: {', '.join(wrong[:3])}" + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    folded = {}
    for name in [k[:-len(".conv.weight")] for k in shapes if k.endswith(".conv.weight")]:
        gamma, beta, mean, var = (state[f"{name}.bn.{k}"].double() for k in ("weight", "bias", "running_mean", "running_var"))
        scale = gamma / torch.sqrt(var + 0.001)
        folded[name] = (state[f"{name}.conv.weight"].double() * scale.view(-1, 1, 1, 1)).float(), (beta - mean * scale).float()
    return folded


def _device(device):
    import torch
    if device in (None, "auto"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()    # "meta" has no values
    except Exception as e:                      # unknown name, no such card, build without CUDA: one type each
        raise FidError(f"--device {device}: not usable here ({str(e).splitlines()[0]})") from None
    return device


PRECISIONS = ("fp32", "tf32", "bf16")


def inception(dims=2048, weights=None, device=None, precision="fp32"):
    """The network as a torch module, (n, 3, 299, 299) float32 in [-1, 1] -> (n, dims) float32; keep it and pass it as features(..., model=it).

    dims: 2048, 768, 192 or 64. weights: a path as for find_weights(). device: None takes the GPU if there is one.
    precision: fp32, or tf32 / bf16 (CUDA; bf16 anywhere), which are faster and change FID a little.
    Attributes: dims, size 299, device, digest (sha256 of the weights file).
    """
    import torch
    if dims not in DIMS:
        raise FidError(f"dims must be one of {', '.join(map(str, DIMS))}, not {dims}")
    if precision not in PRECISIONS:
        raise FidError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision}")
    device = _device(device)
    if precision == "tf32" and device.type != "cuda":
        raise FidError(f"--precision tf32 needs a CUDA device, not {device}")
    file = find_weights(weights)
    folded = load_weights(file)

    class Inception(torch.nn.Module):
        size = 299

        def __init__(self):
            super().__init__()
            self.dims, self.device, self.digest = dims, device, _digest(file)
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            for name, (w, b) in folded.items():
                self.register_buffer(name.replace(".", "_") + "_w", w.to(device, dtype, memory_format=torch.channels_last))
                self.register_buffer(name.replace(".", "_") + "_b", b.to(device, dtype))

        def conv(self, name, x, out, kernel, stride, padding):
            name = name.replace(".", "_")
            return torch.relu_(torch.nn.functional.conv2d(x, self._buffers[name + "_w"], self._buffers[name + "_b"], stride, padding))

        @torch.inference_mode()
        def forward(self, x):
            x = x.to(self._buffers["Conv2d_1a_3x3_w"].dtype, memory_format=torch.channels_last)
            with _cudnn_precision(self.device, "tf32" if precision == "tf32" else "ieee"):
                return _graph(self.conv, x, dims).float()

    return Inception()


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


RANDOM_SEEDS = (0, 1, 2, 3, 4)
RANDOM_WIDTH = 256


def random_networks(device=None):
    """Five small VGG-like networks with fixed random weights: (n, 3, H, W) in [-1, 1] -> (n, 5 * 256); the stand-in where weights cannot be had.

    Distances in their features order sets of the same subject by how far they are from the real one; the values mean nothing by themselves
    and compare only at one image size (Naeem et al. 2002.09797, section 5, on random embeddings).
    Attributes: dims 1280, size None (the images' own), device, digest.
    """
    import torch
    import torch.nn.functional as F
    device = _device(device)

    class RandomNetworks(torch.nn.Module):
        size = None
        dims, digest = len(RANDOM_SEEDS) * RANDOM_WIDTH, f"random-{len(RANDOM_SEEDS)}x{RANDOM_WIDTH}"

        def __init__(self):
            super().__init__()
            self.device = device
            for seed in RANDOM_SEEDS:
                rng = np.random.RandomState(seed)
                for i, (cin, out) in enumerate(((3, 32), (32, 64), (64, 128), (128, RANDOM_WIDTH))):
                    w = rng.standard_normal((out, cin, 3, 3)) * (2 / (9 * cin)) ** 0.5          # He et al. 1502.01852
                    self.register_buffer(f"w{seed}_{i}", torch.from_numpy(w).float().to(device, memory_format=torch.channels_last))

        @torch.inference_mode()
        def forward(self, x):
            parts = []
            with _cudnn_precision(self.device, "ieee"):
                for seed in RANDOM_SEEDS:
                    h = x
                    for i in range(4):
                        h = torch.relu_(F.conv2d(h, self._buffers[f"w{seed}_{i}"], padding=1))
                        h = h if i == 3 else F.avg_pool2d(h, 2, ceil_mode=True)
                    parts.append(h.mean((2, 3)))
            return torch.cat(parts, 1)

    return RandomNetworks()


# ------------------------------------------------------------------------------------------------------- images

def find_images(folder):
    """Sorted paths of the images directly in `folder`; where there is none, of those below it (class folders).

    Returns (paths, number below that were left out, whether the search went below). FidError for a folder that is missing, unreadable or empty.
    """
    def listing(at, below):
        try:
            entries = sorted(os.scandir(at), key=lambda e: e.name)
        except OSError as e:
            raise FidError(f"{at}: cannot be read ({e.strerror})") from None
        for e in entries:
            if e.is_file():
                (images if e.name.rsplit(".", 1)[-1].lower() in EXTENSIONS and "." in e.name else others).append(Path(e.path))
        for e in entries if below else ():
            if e.is_dir() and os.path.realpath(e.path) not in seen:      # a link that points upwards is followed once
                seen.add(os.path.realpath(e.path))
                listing(e.path, True)

    images, others, seen = [], [], {os.path.realpath(folder)}
    listing(folder, False)
    direct = len(images)
    images, others = [], []
    listing(folder, True)
    if not images:
        raise FidError(f"{folder}: no images ({', '.join(EXTENSIONS)}; {len(others)} other files)")
    if direct:
        return [p for p in images if p.parent == Path(folder)], len(images) - direct, False
    return images, 0, True


class ArrayImage(str):
    """The name, arrays.npz#3, of an image in an array, with its pixels: a file among the others."""

    pixels = None                               # uint8 (H, W, 3)

    def __reduce__(self):                       # between ranks goes the name alone
        return str, (str(self),)


def load_array(path):
    """The images of an .npz file that has them as arr_0, uint8 (n, H, W, 3) or (n, 3, H, W), as a list of ArrayImage; None for other files.

    Such files are written by okd_train.py --sample N --npz and read by the evaluator of guided-diffusion. FidError for a bad one.
    """
    try:
        with zipfile.ZipFile(path) as z:
            sizes = {i.filename: (i.file_size, i.compress_size) for i in z.infolist()}
    except Exception:                           # load_statistics() says what it is
        return None
    if "arr_0.npy" not in sizes:
        return None
    whole, packed = sizes["arr_0.npy"]
    if whole > 1 << 30 and whole > 200 * packed:
        raise FidError(f"{path}: arr_0 is packed to burst: {packed} bytes that become {whole}")
    try:
        with np.load(path, allow_pickle=False) as f:
            images = f["arr_0"]
    except Exception as e:                      # zip, zlib and numpy raise a dozen types for a cut or hostile file
        raise FidError(f"{path}: arr_0 cannot be read ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'empty'})") from None
    try:
        images = _channels_last_array(images)
    except FidError as e:
        raise FidError(f"{path}: arr_0: {e}") from None
    found = []
    for k, pixels in enumerate(images):
        found.append(ArrayImage(f"{path}#{k}"))
        found[-1].pixels = np.ascontiguousarray(pixels)             # a view of an array that lies channels last
    return found


def read_image(path):
    """(uint8 array (H, W, 3) RGB, whether it was scaled down from 16 bits).

    Alpha is dropped and EXIF orientation ignored, as FID programs do; 16-bit pixels are scaled (v >> 8), where Pillow would clip them to white.
    FidError names the file and the reason.
    """
    if isinstance(path, ArrayImage):
        return path.pixels, False
    from PIL import Image
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise ValueError("no regular file")
        Image.init()
        with Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN]) as im:
            if Image.MAX_IMAGE_PIXELS and im.width * im.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{im.width}x{im.height} pixels, a decompression bomb?")
            if im.mode.startswith("I"):
                v = np.asarray(im)
                if v.min() < 0 or v.max() > 65535:
                    raise ValueError("32-bit pixels outside 0..65535; save it with 8 or 16 bits")
                return np.repeat((v >> 8).astype(np.uint8)[:, :, None], 3, 2), True
            if im.mode == "F":
                raise ValueError("float pixels have no agreed range; save it with 8 or 16 bits")
            return np.asarray(im.convert("RGB")), False
    except Exception as e:                      # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        reason = "not an image" if type(e).__name__ == "UnidentifiedImageError" else str(e).splitlines()[0] if str(e) else type(e).__name__
        raise FidError(f"{path} ({reason})") from None


def _clean_resize(image):
    """(299, 299, 3) float32: bicubic with antialias, each channel in float, clipped, not rounded, then (p - 128) / 128 (Parmar et al. 2104.11222)."""
    from PIL import Image
    channels = [np.asarray(Image.fromarray(image[:, :, c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)) for c in range(3)]
    return (np.stack(channels, 2).clip(0, 255) - 128) / 128


def _channels_last_array(images):
    """(n, H, W, 3) view of a uint8 array or tensor (n, H, W, 3) or (n, 3, H, W); FidError otherwise."""
    if images.ndim != 4 or str(images.dtype).rsplit(".", 1)[-1] != "uint8":
        raise FidError(f"images must be uint8 (n, H, W, 3) or (n, 3, H, W) in 0..255, not {images.dtype} {tuple(images.shape)}; from [-1, 1]: "
                       "((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)")
    last, first = images.shape[3] == 3, images.shape[1] == 3
    if last == first:
        raise FidError(f"images of shape {tuple(images.shape)}: " + ("both axes 1 and 3 have length 3, which one is colour cannot be told" if last else
                                                                     "neither axis 1 nor axis 3 has length 3"))
    if 0 in images.shape[1:]:
        raise FidError(f"images of shape {tuple(images.shape)} have no pixels")
    if last:
        return images
    return images.transpose(0, 2, 3, 1) if isinstance(images, np.ndarray) else images.permute(0, 2, 3, 1)


def _network_input(images, model, step):
    """Yields (k, 3, 299, 299) float32 for k <= step neighbours of equal size, at their own size if the network has none."""
    import torch
    import torch.nn.functional as F
    start = 0
    while start < len(images):
        shape, stop = images[start].shape, start + 1
        while stop < len(images) and images[stop].shape == shape and stop - start < step \
                and (stop - start + 1) * shape[0] * shape[1] <= 1 << 22:
            stop += 1                           # at most 4 Mpx at once as floats
        group = images[start:stop]
        if isinstance(group, list):
            group = torch.from_numpy(np.stack(group))
        x = group.to(model.device).permute(0, 3, 1, 2)
        if x.dtype == torch.uint8:
            x = x.float().div_(127.5).sub_(1)   # 2 p / 255 - 1; resizing is linear, so on the few pixels
            if model.size:
                x = F.interpolate(x, size=(model.size, model.size), mode="bilinear", align_corners=False, antialias=False)
        yield x.contiguous(memory_format=torch.channels_last)
        start = stop


def _forward(model, images, batch_size):
    """Features (len(images), d) float32, numpy, of uint8 (H, W, 3) images; on the CPU in pieces of at most PIECE."""
    import torch
    step = min(batch_size, PIECE) if model.device.type == "cpu" else batch_size
    out, waiting = [], []

    def run(x):
        for i in range(0, len(x), step):
            part = x[i:i + step]
            k = len(part)
            if model.device.type != "cpu" and k < step:     # one shape for every pass: cuDNN chooses by shape, and a sum's order with it
                part = torch.cat([part, part.new_zeros(step - k, *part.shape[1:])])
            out.append(model(part)[:k].float().cpu().numpy())

    with torch.inference_mode():
        for x in _network_input(images, model, step):
            waiting.append(x)
            if not model.size or sum(map(len, waiting)) >= step:
                run(waiting[0] if len(waiting) == 1 else torch.cat(waiting))
                waiting = []
        if waiting:
            run(waiting[0] if len(waiting) == 1 else torch.cat(waiting))
    return np.concatenate(out)


def _decoded(files, workers, resize, batch_size):
    """Yields (image, deep) or a FidError for every file, in order; threads decode ahead, at most 64 MB of it."""
    def read(file):
        try:
            image, deep = read_image(file)
            return (_clean_resize(image) if resize == "clean" else image), deep
        except FidError as e:
            return e

    if not workers:
        yield from map(read, files)
        return
    with ThreadPoolExecutor(workers) as pool:
        files, ahead, limit = iter(files), collections.deque(), workers
        try:
            ahead.extend(pool.submit(read, f) for f in itertools.islice(files, limit))
            while ahead:
                result = ahead.popleft().result()
                if not isinstance(result, FidError):
                    limit = max(workers, min(2 * batch_size, (64 << 20) // result[0].nbytes))
                ahead.extend(pool.submit(read, f) for f in itertools.islice(files, max(limit - len(ahead), 0)))
                yield result
        finally:
            for f in ahead:
                f.cancel()


class _Progress:
    """One line on stderr: images done, images/s, time left; rewritten on a terminal, every 20 s elsewhere, and once at the end."""

    def __init__(self, label, total):
        self.label, self.total, self.start = label, total, time.monotonic()
        self.last = self.start
        self.terminal = sys.stderr.isatty()

    def __call__(self, done):
        now = time.monotonic()
        if done < self.total and now - self.last < (0.5 if self.terminal else 20):
            return
        self.last, rate = now, done / max(now - self.start, 1e-9)
        left = f", {(self.total - done) / max(rate, 1e-9):.0f} s left" if done < self.total else ""
        print(f"{self.label}: {done}/{self.total} images, {rate:.1f} images/s{left}", file=sys.stderr,
              end=("\r" if done < self.total else "\033[K\n") if self.terminal else "\n", flush=True)


class _Extracted:
    """What one pass over a set leaves: features (n, d) float32, or moments where only sums are kept, and the files they belong to."""

    def __init__(self, n, dims, keep):
        self.features = np.empty((n, dims), np.float32) if keep else None
        self.moments = None if keep else _Moments()
        self.n, self.files, self.deep, self.bad = 0, [], 0, []
        self.sizes, self._buffer = set(), []

    def add(self, rows):
        if self.features is not None:
            self.features[self.n:self.n + len(rows)] = rows
        else:
            self._buffer.append(rows)
            if sum(map(len, self._buffer)) >= 2048:
                self.finish()
        self.n += len(rows)

    def finish(self):
        if self._buffer:
            self.moments.update(np.concatenate(self._buffer))
            self._buffer = []


def _extract(images, model, batch_size=50, workers=None, resize="torch", skip_bad=False, keep=True, progress=None, ranks=None):
    """One pass over a list of paths or an array of images; batch b goes to rank b % W, and every rank returns the same whole."""
    array = not isinstance(images, list)
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    rank, world = (ranks.get_rank(), ranks.get_world_size()) if ranks else (0, 1)
    result, starts, done = _Extracted(len(images), model.dims, keep), range(0, len(images), batch_size), 0
    if not array:
        mine = [f for b in starts[rank::world] for f in images[b:b + batch_size]]
        stream = _decoded(mine, workers, resize, batch_size)
    dead = False                                # a bad file was met: the rest is only decoded, so that all bad files are named
    for first in range(0, len(starts), world):
        part = {"rows": np.empty((0, model.dims), np.float32), "files": [], "bad": [], "deep": 0, "sizes": set(), "seen": 0, "error": None}
        if first + rank < len(starts):
            begin = starts[first + rank]
            batch = images[begin:begin + batch_size]
            part["seen"] = len(batch)
            try:
                if array:
                    good = list(range(begin, begin + len(batch)))
                    if resize == "clean":
                        batch = [_clean_resize(np.asarray(i.cpu() if hasattr(i, "cpu") else i)) for i in batch]
                    elif isinstance(batch, np.ndarray):
                        import torch
                        batch = torch.from_numpy(np.ascontiguousarray(batch))
                else:
                    pairs = list(zip(batch, itertools.islice(stream, len(batch))))
                    part["bad"] = [str(r) for _, r in pairs if isinstance(r, FidError)]
                    good = [f for f, r in pairs if not isinstance(r, FidError)]
                    part["deep"] = sum(r[1] for _, r in pairs if not isinstance(r, FidError))
                    batch = [r[0] for _, r in pairs if not isinstance(r, FidError)]
                part["sizes"] = {tuple(i.shape[:2]) for i in batch[:1]} if array else {i.shape[:2] for i in batch}
                dead |= bool(part["bad"]) and not skip_bad
                if good and not dead:
                    part["rows"], part["files"] = _forward(model, batch, batch_size), good
                    finite = np.isfinite(part["rows"]).all(1)
                    if not finite.all():
                        raise FidError(f"{'image ' if array else ''}{good[int(finite.argmin())]}: the network's features are not finite")
            except FidError as e:
                part["error"] = str(e)
            except Exception as e:
                if type(e).__name__ != "OutOfMemoryError":
                    raise
                part["error"] = f"{model.device}: out of memory at --batch-size {batch_size}; take a smaller one"
        parts = [part]
        if world > 1:
            parts = [None] * world
            ranks.all_gather_object(parts, part)
        for p in parts:
            if p["error"]:
                raise FidError(p["error"])
            result.bad += p["bad"]
            dead |= bool(p["bad"]) and not skip_bad
            result.deep += p["deep"]
            result.sizes |= p["sizes"]
            result.files += p["files"]
            result.add(p["rows"])
            done += p["seen"]
        if progress:
            progress(done)
    if dead:
        raise FidError(f"{len(result.bad)} of {len(images)} images cannot be read: {', '.join(result.bad)}; remove them or pass --skip-bad")
    result.finish()
    if keep:
        result.features = result.features[:result.n]
    return result


def features(images, weights=None, dims=2048, batch_size=50, workers=None, device=None, resize="torch", features="inception",
             precision="fp32", model=None, skip_bad=False):
    """Features (n, d) float32, a numpy array in the order of the images; they do not depend on batch_size, workers or neighbours.

    images: a folder, an .npz file with images (arr_0), a list of paths, or a uint8 array or tensor (n, H, W, 3) or (n, 3, H, W) in 0..255 (on any device).
    features: "inception" (d = dims: 2048, 768, 192, 64) or "random" (d = 1280; images at their own size, no weights needed).
    resize: "torch" (bilinear to 299 without antialias, as pytorch-fid) or "clean" (bicubic with antialias, as clean-fid).
    model: what inception() or random_networks() returned, to load it once; then weights, dims, device, features and precision are its own.
    workers: decoding threads, None for min(8, CPUs). Raises FidError (a ValueError) for what the user can mend; bad files are all named,
    or left out with a warning if skip_bad.
    """
    if resize not in ("torch", "clean"):
        raise FidError(f"resize must be torch or clean, not {resize}")
    if batch_size < 1:
        raise FidError(f"batch_size must be at least 1, not {batch_size}")
    if features not in ("inception", "random"):
        raise FidError(f"features must be inception or random, not {features}")
    if isinstance(images, (str, os.PathLike)):
        images = str(images).endswith(".npz") and load_array(images) or find_images(images)[0]
    elif hasattr(images, "shape"):
        images = _channels_last_array(images)
    else:
        images = [p if isinstance(p, ArrayImage) else Path(p) for p in images]
    if not len(images):
        raise FidError("no images")
    if model is None:
        model = inception(dims, weights, device, precision) if features == "inception" else random_networks(device)
    if model.size is None and resize != "torch":
        raise FidError("random networks take the images at their own size: resize does not apply")
    found = _extract(images, model, batch_size, workers, resize, skip_bad)
    if found.bad:
        warnings.warn(f"{len(found.bad)} of {len(images)} images cannot be read and are left out: {', '.join(found.bad)}", stacklevel=2)
    if found.deep:
        warnings.warn(f"{found.deep} images have 16 bits and were scaled to 8", stacklevel=2)
    return found.features


# --------------------------------------------------------------------------------------------------- statistics

def load_statistics(path):
    """{"mu": (d,), "sigma": (d, d)} float64 of an .npz file; also "n", "resize", "weights" where the file says them (None elsewhere).

    Files of pytorch-fid, clean-fid and TTUR hold mu and sigma only. Nothing in the file is executed. FidError for anything else.
    """
    try:
        with zipfile.ZipFile(path) as z:
            if any(i.file_size > 1 << 30 for i in z.infolist()):
                raise FidError(f"{path}: holds an array above 1 GB: no FID statistics")
        with np.load(path, allow_pickle=False) as f:
            if "mu" not in f.files or "sigma" not in f.files:
                raise FidError(f"{path}: no FID statistics: keys mu and sigma are needed, there are {', '.join(f.files) or 'none'}")
            mu, sigma = _check_statistics(f["mu"], f["sigma"], path)
            said = {k: f[k].item() if k in f.files and f[k].size == 1 else None for k in ("n", "resize", "weights")}
        for k, kind in (("n", int), ("resize", str), ("weights", str)):
            if said[k] is not None and not isinstance(said[k], kind) or k == "n" and said[k] is not None and said[k] < 2:
                raise FidError(f"{path}: {k} = {said[k]!r} makes no sense")
    except FidError:
        raise
    except Exception as e:                      # zip, zlib and numpy raise a dozen types for a cut or hostile file
        raise FidError(f"{path}: no readable .npz file ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'empty'})") from None
    return {"mu": mu, "sigma": sigma, **said}


def save_statistics(path, mu, sigma, **said):
    """Write mu and sigma (and what else is said: n, dims, resize, weights) to `path`, .npz appended if missing. FidError where it exists."""
    path = _npz_name(path)
    _write(path, lambda f: np.savez(f, mu=mu, sigma=sigma, **said))
    return path


def _write(path, save):
    """save(file) into a temporary file that is then renamed: nothing half-written, and nothing older, is ever under the final name."""
    part = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as f:
            part = Path(f.name)
            save(f)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)           # temporary files are made for their owner only
        _fresh(path)                            # once more: hours may have passed
        os.replace(part, path)
    except OSError as e:
        raise FidError(f"{path}: cannot be written ({e.strerror or e})") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _npz_name(path):
    return _fresh(path if str(path).endswith(".npz") else f"{path}.npz")


def _fresh(path):
    path = Path(path)
    try:
        os.lstat(path)
        raise FidError(f"{path} exists and is not overwritten: delete it or choose another name")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:                        # a name that is too long is found out before the work, not after it
        raise FidError(f"{path}: cannot be written ({e.strerror})") from None
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise FidError(f"{path}: there is no folder {path.parent} that can be written to")
    return path


def copy_sheet(path, pairs):
    """PNG of (fake file, real file, distance) pairs, fake left and real right, four pairs in a row. FidError where `path` exists."""
    from PIL import Image, ImageDraw
    path = _fresh(path)
    edge, gap, text, columns = 128, 16, 34, 4
    sheet = Image.new("RGB", (columns * (2 * edge + gap) + gap, -(-len(pairs) // columns) * (edge + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (fake, real, distance) in enumerate(pairs):
        x, y = gap + i % columns * (2 * edge + gap), gap + i // columns * (edge + text + gap)
        for file, left in ((fake, x), (real, x + edge)):
            image = Image.fromarray(read_image(file)[0])
            image = image.resize([max(1, round(side * (edge - 2) / max(image.size))) for side in image.size], Image.Resampling.BICUBIC)
            sheet.paste(image, (left, y))
        for line, (start, file) in enumerate(((f"{i + 1}. fake ", fake), (f"{distance:.4g} to real ", real))):
            tail = str(file).encode("ascii", "replace").decode()
            name = start + tail
            while draw.textlength(name) > 2 * edge:
                tail = tail[1:]
                name = f"{start}...{tail}"
            draw.text((x, y + edge + 15 * line), name, fill="black")
    _write(path, lambda f: sheet.save(f, "PNG"))


# ------------------------------------------------------------------------------------------------- command line

LABELS = {"fid": "FID", "rfd": "rFD", "kid": "KID", "kid_se": "KID standard error",
          **{k: f"{k} (k=5)" for k in ("precision", "recall", "density", "coverage")}, "copies": "copies"}
LABELS.update({"r" + k: "r" + v for k, v in LABELS.items() if k not in ("fid", "rfd")})
CLOSEST = 32                                   # pairs on the sheet of --copies
GROUP = re.compile(r"G[1-9][0-9]*")            # RUN/fakes/G1: the folder of one group


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise FidError(f"{message}; see --help")


def _arguments(argv):
    p = _Parser(prog="fid.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    count = lambda low, high: lambda s: int(s) if re.fullmatch("[0-9]{1,9}", s) and low <= int(s) <= high else (_ for _ in ()).throw(
        argparse.ArgumentTypeError(f"{s[:40]!r} is no whole number of at least {low} and at most {high}"))
    p.add_argument("real", metavar="REAL", help="folder of images, or an .npz file with images (arr_0) or with mu and sigma")
    p.add_argument("fakes", metavar="FAKE", nargs="*", help="likewise; several give a table")
    p.add_argument("--dims", type=int, choices=DIMS, help="layer of the network (default 2048); readings of different dims do not compare")
    p.add_argument("--batch-size", type=count(1, 10 ** 6), help="images per pass; on the CPU at most %d at once (default 50)" % PIECE)
    p.add_argument("--workers", type=count(0, 256), help="threads that decode images (default: min(8, CPUs))")
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    p.add_argument("--weights", help="Inception weights (default: $FID_WEIGHTS, torch.hub's folder, else downloaded)")
    p.add_argument("--precision", choices=PRECISIONS, help="arithmetic of the network (default fp32, the standard; others change FID a little)")
    p.add_argument("--resize", choices=("torch", "clean"), help="torch: as pytorch-fid (default); clean: antialiased bicubic, as clean-fid")
    p.add_argument("--kid", action="store_true", help="unbiased MMD^2, cubic kernel, seeded subsets of min(1000, n), with its standard error")
    p.add_argument("--prdc", action="store_true", help="precision, recall, density, coverage with k = 5 neighbours")
    p.add_argument("--floor", action="store_true", help="the same scores between two random halves of REAL: what a perfect generator would get")
    p.add_argument("--copies", metavar="PNG", help=f"picture of the {CLOSEST} fakes closest to a real beside it, and the share of fakes nearer to a real "
                   "than that real is to any other (not 0 for fresh images of the same kind either: compare with --floor)")
    p.add_argument("--features", choices=("inception", "random"), default="inception",
                   help="random: five fixed random networks, no weights needed; prints rFD, which only orders sets against the same REAL")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    p.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    p.add_argument("--save", metavar="NPZ", help="write mu and sigma of the one folder given; never overwrites")
    args = p.parse_intermixed_args([a.split("=")[0].replace("_", "-") + a[len(a.split("=")[0]):] if a.startswith("--") else a for a in argv])
    for flag in ("real", "fakes", "device", "weights", "copies", "save"):
        value = getattr(args, flag)
        if value == "" or flag == "fakes" and "" in value:
            raise FidError(f"{dict(real='REAL', fakes='FAKE').get(flag, '--' + flag)} is empty")
    if args.features == "random":
        for flag in ("dims", "weights", "resize", "precision", "save"):
            if getattr(args, flag) is not None:
                raise FidError(f"--{flag} has no meaning with --features random")
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
    """One set of images: path, n, files, sizes; features (n, d) or statistics (mu, sigma), whichever were kept; said, what an .npz says of itself."""
    path = n = files = sizes = features = statistics = said = None
    own = None                                  # of REAL: squared distance (n,) of every image to its nearest other, once for all FAKE
    nearest = None                              # of a FAKE: what _copies() returns

    def __init__(self, **known):
        self.__dict__.update(known)

    def sums(self):
        if self.statistics is None:
            self.statistics = statistics(self.features)
        return self.statistics

    def gauss(self):
        """What _frechet() takes: the features where they are few, else (mu, sigma)."""
        return self.features if self.features is not None and len(self.features) <= 2 * self.features.shape[1] else self.sums()


def _side(path):
    """The side that a folder or an .npz file is, its images found but not yet read."""
    side = _Side(path=Path(path))
    if side.path.is_dir():
        side.files, below, recursive = find_images(side.path)
        side.n = len(side.files)
        if recursive:
            _say(f"{path}: no image directly in it, {side.n} found in the folders below")
        elif below:
            _say(f"{path}: the {below} images in the folders below it are not read")
        if side.n < 2:
            raise FidError(f"{path}: a covariance needs at least 2 images, there is 1 ({side.files[0].name})")
    elif not os.path.lexists(side.path):
        raise FidError(f"{path}: no such folder or file")
    elif side.path.suffix == ".npz" and side.path.is_file() and (images := load_array(side.path)) is not None:
        side.files, side.n = images, len(images)
        if side.n < 2:
            raise FidError(f"{path}: a covariance needs at least 2 images, arr_0 holds {side.n}")
    elif side.path.suffix == ".npz" and side.path.is_file():
        side.said = load_statistics(side.path)
        side.statistics, side.n = (side.said["mu"], side.said["sigma"]), side.said["n"]
    else:
        raise FidError(f"{path}: neither a folder of images nor an .npz file")
    return side


def _one_line(text):
    """Line breaks, terminal commands and what is no text in a file's name, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _say(*lines):
    if int(os.environ.get("RANK", 0)) == 0:
        print(*map(_one_line, lines), sep="\n", file=sys.stderr, flush=True)


def _compare(real, fake, args):
    """Scores of one FAKE against REAL as a dict, in the order in which they are printed."""
    prefix = "r" if args.features == "random" else ""
    if prefix:
        out = {"rfd": _random_distance(real.gauss(), fake.gauss())}
    else:
        out = dict(zip(("fid", "mean_term", "trace_term"), _frechet(real.gauss(), fake.gauss())))
    if args.kid:
        out[prefix + "kid"], out[prefix + "kid_se"] = kernel_distance(real.features, fake.features)
    if args.prdc:
        out.update({prefix + k: v for k, v in prdc(real.features, fake.features).items()})
    if args.copies:
        if real.own is None:
            real.own = _nearest(real.features, 1)
        if fake.nearest is None:
            fake.nearest = _copies(real.features, fake.features, real.own)
        out[prefix + "copies"] = float(fake.nearest[2].mean())
    return out


def _union(fakes, args):
    """All FAKE sets as one; None where an .npz does not say its n."""
    if any(f.n is None for f in fakes):
        return None
    whole = _Side(n=sum(f.n for f in fakes))
    if args.copies:
        whole.nearest = [np.concatenate(parts) for parts in zip(*(f.nearest for f in fakes))]
    if all(f.features is not None for f in fakes) and (args.kid or args.prdc or whole.n <= 2 * fakes[0].features.shape[1]):
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
    whole = _union(fakes, args)
    return [("mean", None, {k: float(np.mean([s[k] for s in scores])) for k in scores[0]})] + \
        ([("union", whole.n, _compare(real, whole, args))] if whole else [])


def _names(paths):
    """The shortest tails of the paths that differ."""
    for depth in range(1, 1 + max(len(p.parts) for p in paths)):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}:{p}" for i, p in enumerate(paths)]


def _runs(fakes):
    """{run folder: {group number: position in fakes}} where there are several FAKE and all are RUN/fakes/G<number>, each once; {} otherwise."""
    runs = {}
    for at, fake in enumerate(fakes):
        path = Path(os.path.abspath(fake.path))
        groups = runs.setdefault(path.parent.parent, {})
        if path.parent.name != "fakes" or not GROUP.fullmatch(path.name) or int(path.name[1:]) in groups:
            return {}
        groups[int(path.name[1:])] = at
    return runs if len(fakes) > 1 else {}


def _number(key, value):
    return f"{value:.6f}" if "kid" in key else f"{value:.4f}"


def _label(key):
    return LABELS[key].replace("standard error", "s.e.")


def _aligned(cells):
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]) for row in cells]


def _table(rows):
    """Lines of a table of (name, n, scores): a column per score."""
    keys = [k for k in rows[0][2] if k in LABELS]
    return _aligned([["", "n"] + [_label(k) for k in keys]] + [[name, str(n or "")] + [_number(k, s[k]) for k in keys] for name, n, s in rows])


def _run_tables(runs, names, rows, summaries, floor):
    """Lines of the paper's Table 1, once per score: a row per run; columns one group, G1 G2 ..., mean and union of the groups.

    A run whose fakes/ holds one group is the baseline. rows: (name, n, scores) of every FAKE; summaries: _summary() by run; floor: such rows.
    """
    alone = {run for run in runs if sum(1 for e in os.scandir(run / "fakes") if GROUP.fullmatch(e.name)) == 1}
    numbers = sorted({k for run, groups in runs.items() if run not in alone for k in groups})
    columns = ["one group"] * bool(alone or floor) + [f"G{k}" for k in numbers] + ["mean", "union"] * bool(summaries)
    lines = []
    for key in [k for k in rows[0][2] if k in LABELS]:
        cells = [[_label(key), "n", *columns]]
        for (run, groups), name in zip(runs.items(), names):
            ns = sorted({rows[i][1] for i in groups.values()})
            values = {"one group" if run in alone else f"G{k}": rows[i][2][key] for k, i in groups.items()}
            values.update({what: scores[key] for what, _, scores in summaries.get(run, ())})
            cells.append([name, "-".join(map(str, ns[:1] + ns[1:][-1:]))] + [_number(key, values[c]) if c in values else "-" for c in columns])
        cells += [[name, str(n), _number(key, scores[key])] + ["-"] * (len(columns) - 1) for name, n, scores in floor]
        lines += [""] * bool(lines) + _aligned(cells)
    return lines


def _check(args, sides, folders, files):
    """(dims, resize) of this comparison; FidError for all that can be refused before a network is loaded."""
    real = sides[0]
    for s in files:
        for flag in ("kid", "prdc", "copies", "floor", "save"):
            if getattr(args, flag) and (s is real or flag != "floor"):
                raise FidError(f"{s.path}: --{flag} needs the images, this file holds their mean and covariance only")
        if args.features == "random":
            raise FidError(f"{s.path}: --features random needs the images")
    dims = args.dims or (2048 if folders else len(files[0].said["mu"]))
    resize = args.resize or next((s.said["resize"] for s in files if s.said["resize"] and not folders), "torch")
    for s in files:
        if len(s.said["mu"]) != dims:
            raise FidError(f"{s.path}: statistics of {len(s.said['mu'])} dims, the others have {dims}" + (" (see --dims)" if folders else ""))
        if s.said["resize"] not in (None, resize):
            raise FidError(f"{s.path}: made with resize {s.said['resize']}, the others with {resize}")
    for flag in ("weights", "device", "precision", "batch-size", "workers", "skip-bad"):
        if not folders and getattr(args, flag.replace("-", "_")) not in (None, False):
            raise FidError(f"--{flag} has no meaning where all sides are .npz files of statistics")
    if args.floor and real.n < 4:
        raise FidError(f"{real.path}: a floor needs at least 4 images, there are {real.n}")
    for s in sides:
        if args.prdc and s.n <= (11 if args.floor and s is real else 5):
            raise FidError(f"{s.path}: {s.n} images are too few for --prdc with k = 5")
        if args.kid and s.n < (6 if args.floor and s is real else 3):
            raise FidError(f"{s.path}: {s.n} images are too few for --kid")
    return dims, resize


def _same_weights(files, digest=None):
    """The digest of the weights that all .npz files and the network, if there is one, agree on; None where nobody says it."""
    for s in files:
        said = s.said["weights"]
        digest = digest or said
        if said and said != digest[:len(said)]:
            raise FidError(f"{s.path}: made with weights {said[:8]}, the others with {digest[:8]}")
    return digest


def _read(args, sides, files, dims, resize, world):
    """Load the network and measure every folder, on all ranks; the digest of the weights."""
    random, ranks = args.features == "random", None
    weights = None if random or world > 1 else find_weights(args.weights)       # before torch is imported: a mistake answers at once
    if world > 1:
        import torch.distributed as ranks
        ranks.init_process_group("gloo")        # what travels are features, already on the CPU
    try:
        if ranks and not random:
            weights = _together(ranks, args.weights)
        model = random_networks(args.device) if random else inception(dims, weights, args.device, args.precision or "fp32")
        digest = _same_weights(files, model.digest)
        for i, s in enumerate(sides):
            if s.files:
                _measure(s, "real" if not i else f"fake {i} of {len(sides) - 1}" if len(sides) > 2 else "fake", model, args, resize, ranks)
        if ranks:
            ranks.barrier()                     # nobody takes the group down while another still receives
    finally:
        if ranks and ranks.is_initialized():
            ranks.destroy_process_group()
    return digest


def _run(argv):
    args = _arguments(argv)
    begin = time.monotonic()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.save:
        _npz_name(args.save)
    if args.copies:
        _fresh(args.copies)
    real, *fakes = sides = [_side(p) for p in [args.real, *args.fakes]]
    folders, files = [s for s in sides if s.files], [s for s in sides if not s.files]
    dims, resize = _check(args, sides, folders, files)
    digest = _read(args, sides, files, dims, resize, world) if folders else _same_weights(files)
    if rank:
        return
    if args.features == "inception" and digest and not digest.startswith(WEIGHTS_SHA256):
        _say(f"weights {digest[:8]} are not the published ones ({WEIGHTS_SHA256}): the numbers compare only with others made with this file")
    if args.features == "random":
        _say("rFD: five fixed random networks; good for ordering sets of images of one size against the same REAL, not comparable with any FID")
        if len(set().union(*(s.sizes for s in sides))) > 1:
            _say("rFD: the images differ in size, which moves it as much as their content does; give all the same size")
    if args.save:
        mu, sigma = real.statistics or statistics(real.features)
        _say(f"wrote {save_statistics(args.save, mu, sigma, n=real.n, dims=dims, resize=resize, weights=digest)}")
        return
    name = "rFD" if args.features == "random" else "FID"
    small = [s.n for s in sides if s.n is not None and s.n < SMALL]
    if small:
        _say(f"{name} from {min(small)} images is biased upwards (below {SMALL} it is mostly bias): compare only at the same n, see --floor and --kid")
    names = _names([s.path for s in fakes]) if fakes else []
    rows = [(n, f.n, _compare(real, f, args)) for n, f in zip(names, fakes)]
    runs = _runs(fakes)
    run_names = _names(list(runs)) if runs else []
    if runs and len({f.n for f in fakes}) > 1:
        _say(f"the groups hold {min(f.n for f in fakes)} to {max(f.n for f in fakes)} images: compare only at the same n")
    pick = lambda members: _summary(real, [fakes[i] for i in members], [rows[i][2] for i in members], args)
    summaries = {run: pick(groups.values()) for run, groups in runs.items() if len(groups) > 1}
    extra, floor = [], []
    if len(fakes) > 1 and (args.json or not runs):
        extra = next(iter(summaries.values())) if len(runs) == 1 else pick(range(len(fakes)))
    if args.floor:
        sides = [_Side(n=len(f), features=f) for f in halves(real.features)]
        floor = [("floor", sides[0].n, _compare(*sides, args))]
        _say(f"floor: two random halves of REAL, {sides[0].n} against {sides[1].n} images")
    closest = []
    if args.copies:
        for f in fakes:
            index, distance, _ = f.nearest
            closest += [(f.files[i], real.files[index[i]], float(distance[i])) for i in distance.argsort(kind="stable")[:CLOSEST]]
        closest = sorted(closest, key=lambda pair: pair[2])[:CLOSEST]
        copy_sheet(args.copies, closest)
        _say(f"copies: the share of fakes nearer to a real than that real is to any other real; the {len(closest)} closest pairs are in {args.copies}")
    if args.json:
        out = {"real": str(real.path), "n_real": real.n, "features": args.features, "dims": dims if args.features == "inception" else None,
               "resize": resize if args.features == "inception" else None, "precision": (args.precision or "fp32") if folders else None,
               "weights": digest[:8] if digest and args.features == "inception" else None, "k": 5 if args.prdc else None}
        plain = lambda summary: {n: s if c is None else {"n": c, **s} for n, c, s in summary}
        entries = [{"fake": str(f.path), "name": n, "n_fake": f.n, **s} for (n, _, s), f in zip(rows, fakes)]
        out.update(entries[0] if len(entries) == 1 else {"fakes": entries} if entries else {})
        out.update(plain(extra + floor))
        if runs:
            out["runs"] = [{"name": n, "fakes": [names[i] for i in groups.values()], **plain(summaries.get(run, ()))}
                           for n, (run, groups) in zip(run_names, runs.items())]
        if closest:
            out["closest"] = [{"fake": str(f), "real": str(r), "distance": d} for f, r, d in closest]
        print(json.dumps({**out, "seconds": round(time.monotonic() - begin, 2)}))
    elif runs:
        print("\n".join(_run_tables(runs, run_names, rows, summaries, floor)))
    elif len(rows) > 1:
        print("\n".join(_table(rows + extra + floor)))
    else:
        for prefix, scores in [("", s) for _, _, s in rows] + [(n + " ", s) for n, _, s in floor]:
            for k, v in scores.items():
                if k in LABELS:
                    print(f"{prefix}{LABELS[k]}: {_number(k, v)}")


def _measure(side, label, model, args, resize, ranks):
    """One pass over a folder; the features are kept only where something needs them."""
    keep = args.kid or args.prdc or args.floor or args.copies or side.n <= 2 * model.dims
    progress = _Progress(label, side.n) if int(os.environ.get("RANK", 0)) == 0 else None
    found = _extract(side.files, model, args.batch_size or 50, args.workers, resize, args.skip_bad, keep, progress, ranks)
    if found.bad:
        _say(f"{side.path}: {len(found.bad)} of {side.n} images cannot be read and are left out: {', '.join(found.bad)}")
    if found.deep:
        _say(f"{side.path}: {found.deep} of {side.n} images have 16 bits and were scaled to 8 (others clip them to white)")
    if found.n < 2:
        raise FidError(f"{side.path}: a covariance needs at least 2 images, {found.n} could be read")
    known = dict(zip(side.files, side.files))
    side.n, side.files, side.features, side.sizes = found.n, [known.get(f, f) for f in found.files], found.features, found.sizes
    if not keep:
        side.statistics = found.moments.result()


def _together(ranks, path):
    """find_weights() on every node once, the others wait; all ranks fail with the same line."""
    error, file = None, None
    for turn in (True, False):
        if (int(os.environ.get("LOCAL_RANK", 0)) == 0) == turn:
            try:
                file = find_weights(path, download=turn)
            except FidError as e:
                error = str(e)
        errors = [None] * ranks.get_world_size()
        ranks.all_gather_object(errors, error)
        for e in errors:
            if e:
                raise FidError(e)
    return file


def main(argv=None):
    """Run the command line; returns the exit status. 2 with one line on stderr for what the user can mend."""
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {str(message).splitlines()[0]}")
    try:
        _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return 0
    except FidError as e:
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)                       # rank 0 speaks first; the launcher stops the others when it ends
        else:
            print(f"fid.py: {_one_line(e)}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as e:                        # stdout on a full disk, a folder that went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(f"fid.py: {_one_line(e)}", file=sys.stderr, flush=True)
        return 2
    finally:
        warnings.showwarning = shown


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # file names need not be text
    sys.exit(main())
