"""labels.py: the classifier, the three questions on features whose answer is known, folders and mistakes."""
import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import fid
import labels

HALVES = """
import torch
class Features(torch.nn.Module):
    size, dims, digest = 8, 2, "halves"
    def forward(self, x):
        return torch.stack([x[:, :, :4].mean((1, 2, 3)), x[:, :, 4:].mean((1, 2, 3))], 1)
"""


def clouds(counts, d=10, far=4.0, seed=0):
    """Features (n, d) and labels: one cloud per class, `far` apart."""
    r = np.random.RandomState(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    centres = np.random.RandomState(99).standard_normal((len(counts), d)) * far / (2 * d) ** 0.5
    return (centres[y] + r.standard_normal((len(y), d))).astype(np.float32), y


def shuffled(y, share, seed=0):
    """y, of which `share` in every class are moved on to the next class."""
    moved = y.copy()
    for c in range(y.max() + 1):
        rows = np.flatnonzero(y == c)
        moved[rows[:round(share * len(rows))]] = (c + 1) % (y.max() + 1)
    return moved


# ---------------------------------------------------------------------------------------------- the classifier
@pytest.mark.parametrize("d", [3, 60])                  # fewer features than images, and more
def test_ridge_is_the_least_squares_solution(d):
    x, y = clouds([8, 20, 12], d)
    x = x.astype(np.float64) * np.linspace(1, 50, d) + 7
    weight = 1 / np.bincount(y)[y] / 3
    z = (x - np.average(x, 0, weight)) / np.average((x - np.average(x, 0, weight)) ** 2, 0, weight) ** 0.5
    for penalty, (weights, bias) in zip((0.3, 2.0), labels.ridge(x, y, 3, (0.3, 2.0))):
        root = weight[:, None] ** 0.5
        a = np.block([[root * z, root], [penalty ** 0.5 * np.eye(d), np.zeros((d, 1))]])    # the last column: the bias
        b = np.concatenate([root * np.eye(3)[y], np.zeros((d, 3))])
        solution = np.linalg.lstsq(a, b, rcond=None)[0]
        assert np.allclose(x @ weights + bias, z @ solution[:-1] + solution[-1], atol=1e-8)


def test_what_never_varies_tells_nothing():
    x, y = clouds([30, 30], 5)
    flat = np.hstack([x, np.full((60, 1), 0.1, np.float32), np.zeros((60, 1), np.float32)])
    one, other = labels.classifier(x, y), labels.classifier(flat, y)
    moved = flat + np.float32([0, 0, 0, 0, 0, 1e-6, 0])
    assert (one(x) == other(moved)).all() and np.allclose(one.held_out, other.held_out)
    same = labels.classifier(np.zeros((20, 3), np.float32), np.arange(20) % 2)
    assert same.held_out.mean() == 0.5


def test_every_class_weighs_the_same():
    """Where the features say nothing, the largest class is not named more often than the others."""
    r = np.random.RandomState(0)
    y = np.repeat([0, 1, 2], [400, 100, 40])
    judge = labels.classifier(r.standard_normal((540, 4)), y)
    named = np.bincount(judge(r.standard_normal((3000, 4))), minlength=3) / 3000
    assert (named > 0.2).all() and abs(judge.held_out.mean() - 1 / 3) < 0.1


def test_held_out_is_what_others_say():
    """With as many features as images any labels can be learnt; only held-out images tell."""
    r = np.random.RandomState(1)
    x, y = r.standard_normal((60, 80)), np.arange(60) % 2
    judge = labels.classifier(x, y)
    assert judge.shares(x, y).mean() > 0.8 and abs(judge.held_out.mean() - 0.5) < 0.2
    judge = labels.classifier(*clouds([40, 40, 40], 80))
    assert judge.held_out.mean() > 0.8 and judge.penalty in labels.PENALTIES and judge.n_classes == 3
    again = labels.classifier(*clouds([40, 40, 40], 80))
    assert (again.weights == judge.weights).all() and (again.held_out == judge.held_out).all()


def test_folds_keep_photos_whole_and_spread_the_classes():
    y = np.repeat([0, 1, 2], [50, 20, 7])
    fold = labels.folds(y)
    assert [np.bincount(fold[y == c], minlength=5).tolist() for c in range(3)] == [[10] * 5, [4] * 5, [2, 2, 1, 1, 1]]
    photos = np.array([f"p{k // 4}" for k in range(77)])
    fold = labels.folds(y, photos)
    assert all(len(set(fold[photos == p])) == 1 for p in photos)
    assert all(len(set(fold[y == c])) >= min(5, len(set(photos[y == c]))) - 1 for c in range(3))
    assert np.bincount(fold).min() >= 8


def test_crops_of_one_photo_stand_on_one_side():
    """Every photo has a look of its own and one class: by the look alone a crop of a known photo is named right."""
    r = np.random.RandomState(0)
    photos = np.repeat(np.arange(20), 10)
    x, y = r.standard_normal((20, 30))[photos] + 0.1 * r.standard_normal((200, 30)), photos % 2
    assert labels.classifier(x, y).held_out.mean() > 0.95
    assert labels.classifier(x, y, photos).held_out.mean() < 0.75
    for k in (17, None):
        pairs = list(labels.draws(y, photos, k))
        assert len(pairs) == 5 and len({tuple(train) for train, _ in pairs}) == 5
        for train, test in pairs:
            assert not set(photos[train]) & set(photos[test]) and len(test) >= 20
            assert k is None or np.bincount(y[train]).tolist() == [17, 17]
    assert sorted(np.concatenate([test for _, test in pairs])) == list(range(200))


# ---------------------------------------------------------------------------------------------- the three questions
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_labels_that_are_wrong_do_not_hold(wrong):
    real, y = clouds([80, 40, 60], far=8)
    fake, fake_y = clouds([50, 50, 50], far=8, seed=1)
    found = labels.labels_hold(real, y, fake, shuffled(fake_y, wrong))
    assert found["chance"] == pytest.approx(1 / 3) and found["held_out"].min() > 0.95
    assert np.allclose(found["labels"], 1 - wrong, atol=0.05)
    assert found["trained_on_fakes"].mean() == pytest.approx(1 if wrong < 0.5 else 0, abs=0.1)


def test_one_class_alone_may_be_wrong():
    real, y = clouds([80, 80, 80], far=8)
    fake, fake_y = clouds([50, 50, 50], far=8, seed=1)
    fake[fake_y == 2] = clouds([50, 50, 50], far=8, seed=2)[0][fake_y == 0]         # class 2 shows class 0
    found = labels.labels_hold(real, y, fake, fake_y)
    assert np.allclose(found["labels"], [1, 1, 0], atol=0.05)


def test_whether_fakes_help():
    real, y = clouds([60, 60, 60], d=40, far=3)
    fake, fake_y = clouds([300, 300, 300], d=40, far=3, seed=1)
    good = labels.does_it_help(real, y, fake, fake_y, k=20)
    assert good["verdict"] == "yes" and good["low"] > 0 and good["with_fakes"] > good["alone"] + 0.05
    bad = labels.does_it_help(real, y, fake, shuffled(fake_y, 1), k=20)
    assert bad["verdict"] == "no" and bad["high"] < 0 and bad["alone"] == good["alone"]
    few = labels.does_it_help(real, y, fake[::90], fake_y[::90], k=50)              # ten fakes change little
    assert few["verdict"] == "not shown" and few["low"] <= 0 <= few["high"]
    assert labels.does_it_help(real, y, fake, fake_y, k=60) is None                 # none is left to test on
    whole = labels.does_it_help(real, y, fake, fake_y)
    assert whole["k"] is None and whole["alone"] > good["alone"]


def test_the_interval_is_that_of_paired_t():
    real, y = clouds([40, 40], d=20, far=2)
    fake, fake_y = clouds([40, 40], d=20, far=2, seed=1)
    pairs = []
    for train, test in labels.draws(y, np.arange(80), 20):
        alone = labels.classifier(real[train], y[train], train)
        both = labels.classifier(real[train], y[train], train, (fake, fake_y))
        pairs.append([arm.shares(real[test], y[test]).mean() for arm in (alone, both)])
    alone, both = np.transpose(pairs)
    found = labels.does_it_help(real, y, fake, fake_y, k=20)
    interval = stats.ttest_rel(both, alone).confidence_interval(0.95)
    assert [found[k] for k in ("low", "high", "difference")] == pytest.approx([*interval, (both - alone).mean()])


@pytest.mark.parametrize("change, words", [
    (lambda x, y: (x, np.zeros_like(y)), "two classes or more"),
    (lambda x, y: (x[:24], y[:24]), "5 images of each"),
    (lambda x, y: (x[:0], y[:0]), "two classes"),
    (lambda x, y: (x[:-1], y), "labels (40,)"),
    (lambda x, y: (np.where(x == x[3, 1], np.nan, x), y), "not finite"),
])
def test_what_is_no_training_set(change, words):
    with pytest.raises(fid.FidError, match=words.replace("(", r"\(").replace(")", r"\)")):
        labels.classifier(*change(*clouds([20, 20])))


def test_classes_that_differ():
    with pytest.raises(fid.FidError, match="the reals have 2 classes, the fakes 3"):
        labels.labels_hold(*clouds([20, 20]), *clouds([20, 20, 20]))


# ---------------------------------------------------------------------------------------------- folders
def pictures(folder, counts, seed=0, size=8, swap=False):
    """Class folders of noise: dark above in one, below in the other; swap: under each other's name."""
    r = np.random.default_rng(seed)
    for c, (name, n) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            a = r.integers(120, 256, (size, size, 3), dtype=np.uint8)
            half = slice(size // 2) if (c + swap) % 2 else slice(size // 2, None)
            a[half] //= 2
            Image.fromarray(a).save(folder / name / f"{k:03d}.png")
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    root = tmp_path_factory.mktemp("labels")
    (root / "halves.py").write_text(HALVES)
    pictures(root / "real", {"Crack": 30, "Rust": 40}, size=16)
    pictures(root / "good", {"Crack": 12, "Rust": 12}, seed=1)
    pictures(root / "bad", {"Crack": 12, "Rust": 12}, seed=1, swap=True)
    pictures(root / "other", {"Crack": 12, "Spallation": 12})
    pictures(root / "few", {"Crack": 12, "Rust": 4})
    pictures(root / "one", {"Crack": 12})
    shutil.copytree(root / "good", root / "loose")
    shutil.copy(root / "good/Rust/000.png", root / "loose")
    shutil.copytree(root / "good", root / "broken")
    for k in (3, 7):
        (root / f"broken/Rust/{k:03d}.png").write_bytes(b"\x89PNG")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def call(scene, monkeypatch, capsys):
    """A function (words) -> (exit status, stdout, stderr without progress), in the folder of the scene."""
    monkeypatch.chdir(scene)
    monkeypatch.delenv("FID_WEIGHTS", raising=False)

    def run(*argv):
        status = labels.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return status, out, "".join(line + "\n" for line in err.splitlines() if " images/s" not in line)
    return run


def test_the_table(call):
    status, out, err = call("real", "good", "--features", "halves.py")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == "reals fakes labels hold reals held out trained on fakes chance".split()
    assert rows[1] == ["Crack", "30", "12", "1.000", "1.000", "1.000", "0.500"]
    assert rows[3][:4] == ["all", "70", "24", "1.000"] and rows[4] == []
    assert [row[0] for row in rows[6:]] == ["20", "50", "all"] and rows[7][-3:] == ["too", "few", "reals"]
    assert rows[6][1:4] == ["1.000", "1.000", "+0.000"] and rows[6][-2:] == ["not", "shown"]
    assert "70 of 70 reals were cut to their centre square and brought to the fakes' 8x8" in err
    assert "no crops.csv tells which images of real show one photo" in err and "approximate" in err
    assert "random" not in err


def test_json_says_what_the_library_says(call, scene):
    status, out, _ = call("--json", "real", "bad", "--features", "halves.py")
    found = json.loads(out)
    assert status == 0 and found["features"] == "halves" and found["photos"] is False
    files, y, classes = labels.class_folder(scene / "real")
    others, fake_y, _ = labels.class_folder(scene / "bad")
    images = np.stack([fid.read_square(p, 8)[0] for p in files])
    real, fake = (fid.features(x, features=str(scene / "halves.py"), device="cpu") for x in (images, others))
    want = labels.labels_hold(real, y, fake, fake_y)
    assert found["classes"]["labels"] == dict(zip(classes, want["labels"])) == {"Crack": 0, "Rust": 0}
    assert found["held_out"] == want["held_out"].mean() == 1 and found["chance"] == 0.5
    assert found["trained_on_fakes"] == 0 and found["n_real"] == 70 and found["n_fake"] == 24
    want = [labels.does_it_help(real, y, fake, fake_y, k=k) for k in (20, None)]
    assert found["help"] == want and want[0]["k"] == 20


def test_random_features_say_what_they_are_worth(call):
    status, out, err = call("real", "good", "--features", "random")
    assert status == 0 and "random networks tell classes apart less well" in err and "held out" in err
    assert out.splitlines()[3].startswith("all")


@pytest.mark.parametrize("above", [False, True])
def test_photos_of_crops_are_read(call, scene, tmp_path, above):
    """With crops.csv of crop_codebrim.py; with --split the file lies above REAL."""
    real = tmp_path / "crops" / "train" if above else tmp_path / "crops"
    shutil.copytree(scene / "real", real)
    table, part = tmp_path / "crops" / "crops.csv", "train/" if above else ""

    def write(photo):
        with open(table, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["file", "photo", "box"])
            writer.writerows([f"{part}{p.parent.name}/{p.name}", photo(int(p.stem), p.parent.name), 0]
                             for p in real.rglob("*.png"))
    write(lambda k, name: f"images/{k // 3}.jpg")
    files, y, classes = labels.class_folder(real)
    photos = labels.photos_of(real, files, y, classes)
    assert [photos[0], photos[29], photos[30]] == ["images/0.jpg", "images/9.jpg", "images/0.jpg"]
    status, out, err = call(real, "good", "--features", "halves.py", "--json")
    assert status == 0 and json.loads(out)["photos"] is True and "crops.csv" not in err
    write(lambda k, name: name if name == "Rust" else f"images/{k}.jpg")
    status, _, err = call(real, "good", "--features", "halves.py")
    assert status == 2 and "all crops of Rust are of one photo" in err and err.count("\n") == 1
    table.write_text("file,class\nx,y\n")
    status, _, err = call(real, "good", "--features", "halves.py")
    assert status == 2 and "columns file and photo" in err and err.count("\n") == 1
    table.write_text("file,photo\nx,y\n")                           # of other crops
    assert labels.photos_of(real, files, y, classes) is None


@pytest.mark.parametrize("argv, words", [
    (["real"], "FAKE"),
    (["real", ""], "FAKE is empty"),
    (["real", "nowhere"], "nowhere: no such folder"),
    (["empty", "good"], "empty: no images in it or below"),
    (["real", "other"], "real has Crack, Rust; other has Crack, Spallation"),
    (["one", "one"], "one class folder only (Crack)"),
    (["real", "few"], "few: two classes or more are needed, each with 5 images or more; Rust has 4"),
    (["few", "good"], "Rust has 4"),
    (["real", "./real"], "one folder"),
    (["loose", "good"], "1 images outside class folders, such as loose/000.png"),
    (["broken", "good", "--features", "random"], "2 of 24 images cannot be read: broken/Rust/003.png"),
    (["real", "good", "--features", "dinosaur"], "inception, random or a file"),
    (["real", "good", "--features", "none.py"], "none.py: no such file"),
    (["real", "good", "--features", ""], "--features is empty"),
    (["real", "good", "--features", "random", "--device", "toaster"], "toaster"),
    (["real", "good", "--floor"], "see --help"),
])
def test_mistakes_are_one_line(call, argv, words):
    status, out, err = call(*argv)
    assert status == 2 and out == "" and err.startswith("labels.py: ") and err.count("\n") == 1, err
    assert words in err, err


def test_without_weights_it_names_the_way_out(call, monkeypatch):
    monkeypatch.setenv("FID_WEIGHTS", "none.pth")
    status, _, err = call("real", "good")
    assert status == 2 and "none.pth" in err and "--features random needs no weights" in err and err.count("\n") == 1
