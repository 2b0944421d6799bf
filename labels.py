"""Do the labels of generated images hold, and do the images help a classifier?

    python labels.py REAL FAKE                         # class folders: REAL/Crack/*.png ..., FAKE/Crack/*.png ...
    python labels.py photos/ made/G2                   # what sample.py --to made/ wrote of group 2
    python labels.py REAL FAKE --features FILE.py      # judged in features of your own, see fid.py --help
    python labels.py REAL FAKE --features random       # no weights at hand: a rough look
    python labels.py REAL FAKE --json                  # one JSON object

One classifier answers: ridge regression on the features of a network, in which every class weighs the same.

labels hold: it learns from REAL; the share of fakes whose label it names. The most to be expected is the share of reals
that it names by the other reals (reals held out), the least is chance.
trained on fakes: it learns from FAKE alone; the share of reals that it names.
does it help: it learns from k reals of every class, and from the same reals and all fakes; both are tested on the same
other reals, in five draws. all: from four fifths of the reals, tested on the last.

Shares are means over the classes. All images are brought to the fakes' size, as in training. Crops of one photo look
alike, so crops.csv of crop_codebrim.py, in REAL or in the folder above it, keeps them on one side.
References: Shmelkov et al. 1807.09499 (GAN-test and GAN-train), Ravuri & Vinyals 1905.10887.
"""
import argparse
import csv
import json
import os
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while numpy is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))           # ours, whatever else is called so on the path
import fid  # noqa: E402
sys.path.pop(0)

FOLDS = 5                       # parts of the reals that are held out in turn
LEAST = FOLDS                   # images of a class, so that it can be in every part
DRAWS = 5                       # of k reals per class
SHOTS = (20, 50, None)          # k; None: all
PENALTIES = (10, 3, 1, 0.3, 0.1, 0.03, 0.01)        # the strongest first: it wins a tie
CHUNK = 200                     # images in memory at once


# ---------------------------------------------------------------------------------------------- the three questions
def labels_hold(real, real_labels, fake, fake_labels, photos=None):
    """Shares per class, arrays (C,), in a dict: "labels", "held_out", "trained_on_fakes"; and "chance", a float.

    real (n, d), fake (m, d): features, floats; their labels (n,), (m,): whole numbers 0 .. C - 1. photos (n,): the
    photo that each real is a crop of. FidError for fewer than 2 classes, or 5 images of one.
    """
    judge, learner = classifier(real, real_labels, photos), classifier(fake, fake_labels)
    if judge.n_classes != learner.n_classes:
        raise fid.FidError(f"the reals have {judge.n_classes} classes, the fakes {learner.n_classes}")
    return {"labels": judge.shares(fake, fake_labels), "held_out": judge.held_out,
            "trained_on_fakes": learner.shares(real, real_labels), "chance": 1 / judge.n_classes}


def does_it_help(real, real_labels, fake, fake_labels, photos=None, k=None):
    """Mean share of reals named right after learning from k reals per class, alone and with all fakes, in a dict.

    k None: all of four fifths. Arguments else as of labels_hold(). Each draw gives a pair, which is tested on the same
    reals, no crops of a photo that was learnt from. low, high: 95 % interval of the mean difference (paired t);
    approximate, as draws share images. verdict: yes, no (they harm), or not shown. None where the reals are too few.
    """
    from scipy import stats
    real, y, fake, fake_labels = np.asarray(real), np.asarray(real_labels), np.asarray(fake), np.asarray(fake_labels)
    photos = np.arange(len(y)) if photos is None else np.asarray(photos)
    pairs = []
    for train, test in draws(y, photos, k):
        enough = np.bincount(y[train], minlength=y.max() + 1).min() >= (k or LEAST)
        if not enough or np.bincount(y[test], minlength=y.max() + 1).min() < 1:
            return None
        arms = [classifier(real[train], y[train], photos[train], more) for more in (None, (fake, fake_labels))]
        pairs.append([arm.shares(real[test], y[test]).mean() for arm in arms])
    alone, with_fakes = np.transpose(pairs)
    difference = with_fakes - alone
    mean, n = difference.mean(), len(difference)
    reach = stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / n ** 0.5
    return {"k": k, "alone": float(alone.mean()), "with_fakes": float(with_fakes.mean()), "difference": float(mean),
            "low": float(mean - reach), "high": float(mean + reach),
            "verdict": "yes" if mean > reach else "no" if mean < -reach else "not shown"}


def draws(labels, photos, k):
    """Yields (indices to learn from, indices to test on), which share no photo: k of a class, or None for folds."""
    if k is None:
        fold = folds(labels, photos)
        yield from ((np.flatnonzero(fold != j), np.flatnonzero(fold == j)) for j in range(FOLDS))
        return
    photos = np.unique(photos, return_inverse=True)[1]
    for j in range(DRAWS):
        turn = np.random.RandomState([k, j]).permutation(photos.max() + 1)
        order = np.argsort(turn[photos], kind="stable")             # photo by photo, so that few are touched
        train = np.concatenate([order[labels[order] == c][:k] for c in range(labels.max() + 1)])
        yield train, np.flatnonzero(~np.isin(photos, photos[train]))


# ---------------------------------------------------------------------------------------------- the classifier
class Classifier:
    """What classifier() returns: called with features (m, d), it names their classes (m,).

    n_classes; penalty: the one chosen; held_out (n_classes,): the share of each class that the other folds' fits name,
    as the best of the penalties has it.
    """

    def __init__(self, weights, bias, penalty, held_out):
        self.weights, self.bias, self.penalty, self.held_out = weights, bias, penalty, held_out
        self.n_classes = len(bias)

    def __call__(self, features):
        return (features @ self.weights + self.bias).argmax(1)

    def shares(self, features, labels):
        """(n_classes,): the share of each class that is named as labels (m,) say; NaN of a class without images."""
        return by_class(self(features), labels, self.n_classes)


def classifier(features, labels, photos=None, more=None):
    """Fit a Classifier to features (n, d), floats, and labels (n,), whole numbers 0 .. C - 1.

    Its penalty is that which names most held-out rows right, as a mean over the classes; photos (n,) are held out
    whole. more: (features, labels) that are learnt from too, but never held out. FidError for features that are not
    finite, fewer than 2 classes, fewer than 5 rows of a class.
    """
    x, y = np.asarray(features), np.asarray(labels)
    count = np.bincount(y) if len(y) else np.zeros(1)
    if len(count) < 2 or count.min() < LEAST or x.ndim != 2 or len(x) != len(y):
        raise fid.FidError(f"a classifier needs two classes or more and {LEAST} images of each, "
                           f"there are features {x.shape} and labels {y.shape}, of each {', '.join(map(str, count))}")
    if not np.isfinite(x).all():
        raise fid.FidError("features that are not finite tell no classes")
    fold = folds(y, photos)
    if more is not None:
        x, y, fold = (np.concatenate(pair) for pair in ((x, more[0]), (y, more[1]), (fold, np.full(len(more[1]), -1))))
    named = np.full((len(PENALTIES), len(y)), -1)
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        if train.any() and test.any():                              # where all is of one photo nothing is left
            for row, (weights, bias) in zip(named, ridge(x[train], y[train], len(count), PENALTIES)):
                row[test] = (x[test] @ weights + bias).argmax(1)
    shares = [by_class(row[fold >= 0], y[fold >= 0], len(count)) for row in named]
    best = int(np.argmax([share.mean() for share in shares]))
    fit, = ridge(x, y, len(count), PENALTIES[best:best + 1])
    return Classifier(*fit, PENALTIES[best], shares[best])


def ridge(x, y, n_classes, penalties):
    """[(weights (d, n_classes), bias (n_classes,)), ...] per penalty: least squares to 1 for a row's class, else to 0.

    On standardised features. Every class weighs the same, all together 1, to which the penalty relates.
    """
    from scipy import linalg
    count = np.bincount(y, minlength=n_classes)
    weight = 1 / count[y] / np.count_nonzero(count)
    mean = weight @ x
    spread = np.sqrt(weight @ (x - mean) ** 2)
    spread = np.maximum(spread, 1e-6 * spread.max() + 1e-30)        # what never varies tells nothing
    share = np.bincount(y, weight, n_classes)
    root = np.sqrt(weight)[:, None]
    a = ((x - mean) / spread * root).astype(x.dtype)
    target = (np.eye(n_classes)[y] - share) * root
    many = len(a) > a.shape[1]                                      # the smaller of the two equivalent systems
    square = (a.T @ a if many else a @ a.T).astype(np.float64)
    found = []
    for penalty in penalties:
        system = square + penalty * np.eye(len(square))
        weights = linalg.solve(system, a.T @ target if many else target, assume_a="pos")
        weights = (weights if many else a.T @ weights) / spread[:, None]
        found.append((weights, share - mean @ weights))
    return found


def folds(labels, photos=None):
    """The fold (n,), 0 .. FOLDS - 1, of every row: photos stay whole, the classes are spread as far as that allows."""
    rows = np.arange(len(labels))
    photos = rows if photos is None else np.unique(photos, return_inverse=True)[1]
    part = np.zeros((photos.max() + 1, labels.max() + 1))           # of each class, in each photo
    np.add.at(part, (photos, labels), 1 / np.bincount(labels)[labels])
    fold, held = np.zeros(len(part), int), np.zeros((FOLDS, part.shape[1]))
    for p in np.random.RandomState(0).permutation(len(part)):
        fold[p] = np.argmin(held @ part[p])
        held[fold[p]] += part[p]
    return fold[photos]


def by_class(named, labels, n_classes):
    """(n_classes,): the share of named == labels in each class; NaN of a class without rows."""
    total = np.bincount(labels, minlength=n_classes)
    right = np.bincount(labels[named == labels], minlength=n_classes)
    return np.where(total > 0, right / np.maximum(total, 1), np.nan)


# ---------------------------------------------------------------------------------------------- folders
def class_folder(folder):
    """(paths, labels (n,), class names) of a folder of class folders. FidError where it is none, or too small."""
    files = fid.class_images(folder, say)
    loose = [path for path, c in files if c is None]
    if loose:
        raise fid.FidError(f"{folder}: {len(loose)} images outside class folders, such as {loose[0]}; "
                           "labels are the names of folders")
    classes = sorted({c for _, c in files})
    labels = np.array([classes.index(c) for _, c in files])
    few = [f"{c} has {n}" for c, n in zip(classes, np.bincount(labels)) if n < LEAST]
    if len(classes) < 2 or few:
        what = ", ".join(few) if few else f"there is one class folder only ({classes[0]})"
        raise fid.FidError(f"{folder}: two classes or more are needed, each with {LEAST} images or more; {what}")
    return [path for path, _ in files], labels, classes


def photos_of(folder, paths, labels, classes):
    """(n,): the photo that each image was cut from by crops.csv, in `folder` or above; None without such a file."""
    folder = Path(os.path.abspath(folder))
    file = next((f for f in (folder / "crops.csv", folder.parent / "crops.csv") if f.is_file()), None)
    if file is None:
        return None
    try:
        with open(file, newline="", encoding="utf-8", errors="surrogateescape") as f:
            photo = {row["file"]: row["photo"] for row in csv.DictReader(f)}
    except (OSError, KeyError, csv.Error) as e:
        raise fid.FidError(f"{file}: no list of crops with the columns file and photo ({type(e).__name__})") from None
    names = [os.path.relpath(os.path.abspath(path), file.parent).replace(os.sep, "/") for path in paths]
    if not any(name in photo for name in names):
        return None
    photos = np.array([photo.get(name, name) for name in names])
    for c, name in enumerate(classes):
        if len(set(photos[labels == c])) < 2:
            raise fid.FidError(f"{folder}: all crops of {name} are of one photo, so none can be held out; crops of "
                               "a second photo are needed")
    return photos


def read(name, paths, size, model, rule):
    """(features (n, d), number of images that were resized) of files, each brought to (size, size). FidError."""
    def one(path):
        try:
            return fid.read_square(path, size, rule)
        except fid.FidError as e:
            return str(e)

    rows, bad, odds = [], [], []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, fid.Progress(name, len(paths)) as progress:
        for k in range(0, len(paths), CHUNK):
            found = list(pool.map(one, paths[k:k + CHUNK]))
            bad += [text for text in found if isinstance(text, str)]
            if not bad:                                             # else the rest is only read, to name all such
                odds += [odd for _, odd in found]
                images = np.stack([image for image, _ in found])
                rows.append(fid.features(images, model=model))
            progress(k + len(found))
    if bad:
        raise fid.FidError(f"{len(bad)} of {len(paths)} images cannot be read: {', '.join(bad)}; remove them")
    for note in fid.rule_notes(rule, odds):
        say(f"{name}: {note}")
    return np.concatenate(rows), sum("resized" in odd for odd in odds)


# ---------------------------------------------------------------------------------------------- command line
def run(argv):
    args, begin = arguments(argv), time.monotonic()
    paths, y, classes = class_folder(args.real)
    fake_paths, fake_y, others = class_folder(args.fake)
    if classes != others:
        raise fid.FidError(f"the classes differ: {args.real} has {', '.join(classes)}; {args.fake} has "
                           f"{', '.join(others)}")
    if os.path.samefile(args.real, args.fake):
        raise fid.FidError(f"{args.real} and {args.fake} are one folder: its labels would be compared with themselves")
    photos = photos_of(args.real, paths, y, classes)
    rules = [fid.rule_for(files, args.range, args.upright) for files in (paths, fake_paths)]
    size = min(fid.read_image(fake_paths[0], rules[1])[0].shape[:2])
    weights = fid.needed_weights() if args.features == "inception" else None
    model = fid.network(args.features, weights, device=args.device)
    (real, resized), (fake, _) = (read(name, files, size, model, rule)
                                  for name, files, rule in zip(("real", "fake"), (paths, fake_paths), rules))
    found = labels_hold(real, y, fake, fake_y, photos)
    helped = [does_it_help(real, y, fake, fake_y, photos, k) for k in SHOTS]
    if args.json:
        per_class = {key: dict(zip(classes, values.tolist())) for key, values in found.items() if key != "chance"}
        means = {key: float(np.mean(values)) for key, values in found.items()}
        print(json.dumps({"real": args.real, "fake": args.fake, "n_real": len(y), "n_fake": len(fake_y),
                          "features": model.name, "photos": photos is not None, **means, "classes": per_class,
                          "help": [row for row in helped if row], "seconds": round(time.monotonic() - begin, 2)}))
    else:
        print("\n".join([*class_table(classes, (y, fake_y), found), "", *help_table(helped)]))
    if resized:
        say(f"{resized} of {len(y)} reals were cut to their centre square and brought to the fakes' {size}x{size}")
    if args.features == "random":
        say("random networks tell classes apart less well than trained ones: a low share may be theirs, so compare it "
            "with the reals held out")
    if photos is None:
        say(f"no crops.csv tells which images of {args.real} show one photo; if some do, they stand on both sides, and "
            "the reals look better than they are")
    if any(helped):
        say("the draws share images: the intervals are approximate, rather too narrow; yes: above 0, no: below")


def class_table(classes, labels, found):
    """Lines: a row per class, and their mean."""
    shares = [found[k] for k in ("labels", "held_out", "trained_on_fakes")]
    rows = [["", "reals", "fakes", "labels hold", "reals held out", "trained on fakes", "chance"]]
    for c, name in enumerate(classes):
        rows.append([name, *(str((y == c).sum()) for y in labels), *(f"{s[c]:.3f}" for s in shares),
                     f"{found['chance']:.3f}"])
    rows.append(["all", *(str(len(y)) for y in labels), *(f"{s.mean():.3f}" for s in shares), f"{found['chance']:.3f}"])
    return fid.aligned([[fid.one_line(cell) for cell in row] for row in rows])


def help_table(helped):
    """Lines: a row per k."""
    rows = [["reals of a class", "alone", "with fakes", "difference", "95 % interval", "does it help"]]
    for k, row in zip(SHOTS, helped):
        cells = ["-"] * 4 + ["too few reals"]
        if row:
            cells = [f"{row['alone']:.3f}", f"{row['with_fakes']:.3f}", f"{row['difference']:+.3f}",
                     f"{row['low']:+.3f} to {row['high']:+.3f}", row["verdict"]]
        rows.append([str(k or "all"), *cells])
    return fid.aligned(rows)


def arguments(argv):
    p = fid.Parser(prog="labels.py", description=__doc__, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("real", metavar="REAL", help="folder of class folders with real images")
    add("fake", metavar="FAKE", help="likewise with generated images; the same classes")
    add("--features", default="inception", metavar="inception|random|FILE.py",
        help="what the classifier sees, as for fid.py")
    fid.reading_flags(add)
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = p.parse_intermixed_args(argv)
    args.range = fid.checked_range(args.range)
    for name, value in vars(args).items():
        if value == "":
            raise fid.FidError(f"{name.upper() if name in ('real', 'fake') else f'--{name}'} is empty")
    return args


def main(argv=None):
    """Run the command line; returns the exit status. 2 with one line on stderr for what the user can mend."""
    try:
        with warnings.catch_warnings(), fid.standard_streams():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            run(sys.argv[1:] if argv is None else argv)
        return 0
    except (fid.FidError, OSError) as e:
        say(f"labels.py: {e}")
        return 2
    except KeyboardInterrupt:
        return 130


def say(line):
    print(fid.one_line(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
