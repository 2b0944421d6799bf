"""What a setting is worth: a script trained for so much processor time of one thread, scored on photos it never saw.

    python tests/bench_recipe.py --test TEST --seconds 75 --features FILE.py --data TRAIN --groups 1 --quick
    python tests/bench_recipe.py --test TEST --seconds 300 --features FILE.py --model acgan --data TRAIN ... --seed 1

TEST holds the class folders of --data with other photos. Every flag of okd_train.py is taken. Prints a line per group:
steps, FD, KID x 1000, coverage, the variety (see okd_train.py --help) of the class that has least, and with classes the
share of labels that hold, beside that of the photos of TEST, and of photos that are named right after training on the
fakes. FAKES fakes, as many photos, classes in turn; loading and scoring are not counted as time.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fid
import labels
import okd_train

FAKES = 300


def trained(s, script, named, seconds):
    """A trainer after so many seconds of processor time; its averages have their own statistics."""
    device = torch.device("cpu")
    data = okd_train.shared_data(s, script, named, device, okd_train.Ranks(s.groups, s.batch_size, device), print)
    okd_train.settle_channels(s, script, named, {}, data)
    trainer = okd_train.Trainer(script, s, data, device)
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        trainer.step()
    for g in trainer.groups:
        okd_train.settle_norms(g.ema, s)
    return trainer


def in_turn(y):
    """Indices of FAKES images at most, equally many of each class."""
    return np.concatenate([np.flatnonzero(y == c)[:FAKES // len(np.unique(y))] for c in np.unique(y)])


def scores(trainer, g, model, train, test):
    """The numbers of one group; train, which may be None without classes, and test are (features, labels)."""
    n = -(-FAKES // okd_train.CHUNK)
    inputs = [okd_train.chunk_of_inputs(trainer.s, k, "fid") for k in range(n)]
    fakes = np.concatenate([okd_train.generate(g.ema, *x) for x in inputs])
    f, real = fid.features(fakes, model=model), test[0][in_turn(test[1])]
    numbers = {"steps": trainer.step_count, "fd": fid.frechet_distance(real, f),
               "kid": 1000 * np.ravel(fid.kernel_distance(real, f))[0], "coverage": fid.prdc(real, f)["coverage"],
               "least variety": np.nanmin(np.array(okd_train.variety(trainer, g)["pixels"], float))}
    if trainer.script.conditional:
        y = np.concatenate([x[1] for x in inputs])
        judge = labels.classifier(*train)
        numbers["labels"], numbers["photos"] = judge.shares(f, y).mean(), judge.shares(*test).mean()
        numbers["trained on fakes"] = labels.classifier(f, y).shares(*test).mean()
    return {k: round(float(v), 4) for k, v in numbers.items()}


def run(argv):
    p = okd_train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--test", required=True)
    p.add_argument("--seconds", type=float, default=75)
    p.add_argument("--features", required=True)
    own, argv = p.parse_known_args(argv)
    torch.set_num_threads(1)
    s, script, named = okd_train.parse(argv)
    okd_train.settle(s, script, named)
    s.device, s.cuda_graph = "cpu", "off"
    model = fid.network(own.features)
    trainer = trained(s, script, named, own.seconds)
    train = looked_at(s.data, s, model) if script.conditional else None
    test = looked_at(own.test, s, model)
    for g in trainer.groups:
        print(json.dumps({"group": g.i, "seed": s.seed, **scores(trainer, g, model, train, test)}), flush=True)


def looked_at(folder, s, model):
    """Class folders -> (features, labels)."""
    images, y, _ = okd_train.load_folder(folder, s.image_size, True, False, lambda text: None)
    return fid.features(images, model=model), y.numpy()


def main(argv=None):
    okd_train.guarded("bench_recipe.py", lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
