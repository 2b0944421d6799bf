"""Does the ring help on your photos? Arms trained over seeds, scored on photos that none has seen, with intervals.

    python compare.py --data crops/ --out study/        # crops/train, val and test, as crop_codebrim.py --split makes
    python compare.py --data a/ --test b/ --recipe small --seeds 12 --steps 2000 --jobs 2 --out study/
    python compare.py ... --features FILE.py            # scored in features of your own, see fid.py --help
    python compare.py ... --arms ring:rho=0.1 ring:rho=1    # further arms
    python compare.py ... --seeds 6-11                  # on another machine; put the lines of both results.jsonl in one

For every seed it trains
    ring     N groups that learn from one another (rho 0.5);
    alone    the same N groups with rho 0: the same initial weights, z and order of the photos, so the seeds are pairs;
    single   one group, for as many steps as have the arithmetic of the whole ring, counted and printed.
A further arm is NAME:SETTING=VALUE,...: the ring, alone or single with other settings, which is compared with the arm
NAME and with alone. Other flags of okd_train.py are for all arms (--model, --groups, --steps, --recipe, ...), but for
those that the study sets (--seed, --quick, --max-seconds, --fid-every, ...); another --loss is another study, and so
are other photos or another way to read them (--image-size, --range, --upright).

Three parts of the photos that share none: --data is learnt from; by --val (or half of --test) four checkpoints of every
group are scored, and the best step of each group and the best group are chosen; on --test these are measured, once.
    mean     over the groups, each at its best step;      best     the group that was best by --val;
    union    as many images, an equal part of each group.
One run is one observation, as its groups are not independent: differences are paired by seed, with the 95 % interval of
a t-test, and the difference that so many seeds would show four times out of five. The questions are two, the mean of
the ring against that of alone and against single; of the many other comparisons one in twenty strays by chance.

--out (study/) holds results.jsonl (a line per finished run), study.html, study.png and the runs. Give the command
again at any time, after a crash too: what is finished is not repeated, what is not goes on; a run whose line was taken
out of results.jsonl is scored anew. One seed of every arm comes first.
"""
import argparse
import html
import itertools
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while torch is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))                                       # ours, whatever else is called so on the path
import bench  # noqa: E402
import fid  # noqa: E402
import labels  # noqa: E402
import okd_train  # noqa: E402
import report  # noqa: E402
import sample  # noqa: E402
sys.path.pop(0)

# ---------------------------------------------------------------------------------------------- settings
ARMS = {"ring": [], "alone": ["--rho", "0"], "single": ["--groups", "1"]}
CHECKPOINTS = 4                 # of a run that are scored on the validation part, evenly spaced
VAL_FAKES, TEST_FAKES = 150, 300    # images of each group: few, as a network for features takes most of the time
MEASURES = ("mean", "best", "union")
HEAD = ("mean over groups", "best by validation", "union")
QUESTIONS = ("ring", "alone"), ("ring", "single")                   # by the mean of the distance
BETTER = {"distance": "lower", "kid": "lower", "coverage": "higher", "labels": "higher"}
NAMES = {"kid": "KID", "labels": "labels that hold", "apart": "between groups"}
ABOUT = {"variety": "mean distance between two images of a class, over that between two photos",
         "apart": "KID between the images of two groups of a run",
         "c_w": "in training: how far a connector tells its own group from the next"}
# Flags of the trainer that the study sets by itself, or that would end a run before its last step.
TAKEN = {"seed", "resume", "epochs", "max_seconds", "quick", "nproc", "fid_every", "fid_samples", "fid_data",
         "fid_features"}
OWN = {"seeds", "arms", "test", "val", "features", "jobs"}          # flags that the trainer does not know
# Settings that change no result, or are known from elsewhere.
APART = {"out", "data", "model", "steps", "device", "cuda_graph", "log_every", "sample_every", "save_every", *TAKEN}
# Table 1 of the OKD-SAGAN paper: FID of 10,000 fakes against 2,642 crops of CODEBRIM; its best group is best by test.
PAPER = {"sagan": {"the paper's ring": (132.13, 118.23), "the paper's one group": (139.76,)},
         "acgan": {"the paper's ring": (172.13, 165.39), "the paper's one group": (178.92,)}}
# What a line of results.jsonl holds at least.
LINE = {"arm": str, "seed": int, "step": int, "settings": dict, "score": str, "photos": dict, "seconds": int,
        "device": str, "validation": list, "mean": dict, "best": dict, "union": dict}


@dataclass
class Arm:
    """One way to train. argv: its flags for okd_train.py; own: those that no other arm has; s: all of its settings;
    work: the floating-point operations of a step; judge: who scores it."""
    name: str
    base: str
    argv: list
    own: dict
    s: argparse.Namespace
    script: okd_train.Script
    work: float
    judge: "Judge"


def reading_of(s, script):
    """The settings that say how photos are read."""
    return s.image_size, script.conditional, s.upright, str(s.range)


def text_of(script):
    """A digest of the model script, as in args.json."""
    return okd_train.digest(script.path, 16)


def settings_of(s, script):
    """What a result must have been made with to count for an arm of these settings."""
    return {"model": script.name, **{k: v for k, v in vars(s).items() if k not in APART | OWN}}


# ---------------------------------------------------------------------------------------------- the study
class Study:
    """The runs of all arms and seeds in one folder: which are finished, which are under way."""

    def __init__(self, out, parts, features, devices):
        self.out, self.parts, self.features, self.device = out, parts, features, okd_train.pick_device(devices[0])
        self.arms, self.runs, self.results, self.judges = {}, [], {}, {}
        self.free = queue.SimpleQueue()                             # devices that no run is on
        for device in devices:
            self.free.put(device)
        self.lock, self.stopping, self.children = threading.Lock(), False, set()

    def plan(self, arms, seeds):
        self.arms, path = {arm.name: arm for arm in arms}, self.out / "results.jsonl"
        self.runs = [(arm.name, seed) for seed in seeds for arm in arms]            # one seed of every arm comes first
        for line in okd_train.read_lines(path):
            lost = [name for name, kind in LINE.items() if not isinstance(line.get(name), kind)]
            if lost:
                raise okd_train.UserError(f"{path}: a line of arm {line.get('arm')}, seed {line.get('seed')}, is not "
                                          f"whole ({', '.join(lost)}): take it out")
            if line["arm"] in self.arms:
                self.check(line)
                self.results[line["arm"], line["seed"]] = line

    def judge(self, s, script):
        """Who scores an arm. Made before the first run starts, so that what is amiss is not found out at its end."""
        key = reading_of(s, script)
        if key not in self.judges:
            self.judges[key] = Judge(self.parts, s, script, self.features, self.device, self.out)
        return self.judges[key]

    def check(self, line):
        """UserError where a result was made in another way than its arm is now."""
        arm = self.arms[line["arm"]]
        here = {"steps": arm.s.steps, **settings_of(arm.s, arm.script)}
        there = {"steps": line["step"], **line["settings"]}
        odd = [f"{okd_train.flag(k)} {there[k]}, not {here[k]}" for k in sorted(here.keys() & there.keys())
               if here[k] != there[k]]
        if line.get("script") not in (None, text_of(arm.script)):
            odd.append(f"another text of {arm.script.path.name}")
        if line["photos"] != arm.judge.photos or line["score"] != arm.judge.scores.name:
            odd.append("other photos or features")
        if odd:
            raise okd_train.UserError(f"{self.out}: {arm.name}, seed {line['seed']}, was made with {'; '.join(odd)}: "
                                      "name another folder with --out")

    def folder(self, name, seed):
        return self.out / "runs" / f"{re.sub('[^A-Za-z0-9.=_,-]', '_', name)}-seed{seed}"

    def go(self, jobs):
        """Train and score what is missing, `jobs` runs at once -> {run: why it failed}."""
        todo, failed, begin, patience = [run for run in self.runs if run not in self.results], {}, time.monotonic(), 30
        before = {run: self.share(run) for run in todo}
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(self.one, *run): run for run in todo}
            pending = set(futures)
            try:
                while pending:
                    done, pending = wait(pending, timeout=patience, return_when=FIRST_COMPLETED)
                    for future in done:
                        try:
                            future.result()
                        except (okd_train.UserError, fid.FidError) as e:            # the other runs go on
                            failed[futures[future]] = str(e)
                            print(f"{', seed '.join(map(str, futures[future]))} failed: {e}", flush=True)
                    print(self.forecast(before, failed, time.monotonic() - begin), flush=True)
                    patience = min(600, 2 * patience)
            except BaseException:                                   # Ctrl-C: the trainers save and leave
                self.stopping = True
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(self.children):
                    child.terminate()
                raise
        return failed

    def one(self, name, seed):
        """A run from its first step, or where it stopped, to its line in results.jsonl."""
        arm, out, device = self.arms[name], self.folder(name, seed), self.free.get()
        try:
            self.train(arm, seed, out, device)
        finally:
            self.free.put(device)
        with self.lock:                                             # one at a time: they share a network
            result = {"arm": name, "seed": seed, **score_run(out, arm.judge),
                      "device": okd_train.describe(self.device)}
            self.check(result)
            self.results[name, seed] = result
            write_results(self.out / "results.jsonl", self.results)
            write_page(self)
        (out / "checkpoint.pt").unlink(missing_ok=True)             # the largest file, of use to --resume alone
        marks = ", ".join(f"{measure} {result[measure]['distance']:.4g}" for measure in MEASURES)
        print(f"{name}, seed {seed}: {result['score']} {marks}", flush=True)

    def train(self, arm, seed, out, device):
        """okd_train.py on one run, in a process of its own."""
        self.wait_for_orphan(out)
        kept, argv = self.out / "val_features.npz", self.command(arm, seed, out, device)
        if any((out / file).exists() for file in ("checkpoint.pt", "G1.pt")):
            argv.append("--resume")
            begun = okd_train.read_args(out)
            steps = begun["steps"]
            if begun.get("script_digest") != text_of(arm.script):
                raise okd_train.UserError(f"{out} was begun with another text of {arm.script.path.name}: name another "
                                          "folder with --out")
            if steps != arm.s.steps:                                # its checkpoints would be at other steps
                raise okd_train.UserError(f"{out} was begun with --steps {steps}, not {arm.s.steps}: name another "
                                          "folder with --out")
            if not (out / "checkpoint.pt").exists():                # it was finished, and its line is gone
                return
        else:                                                       # new, or killed before its first checkpoint
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            if kept.exists():
                shutil.copyfile(kept, out / "real_features.npz")    # the trainer looks whether they are of these photos
        env = {**os.environ, **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})}
        child = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                 start_new_session=True)            # Ctrl-C reaches it once, through us
        self.children.add(child)
        if self.stopping:
            child.terminate()
        _, err = child.communicate()
        self.children.remove(child)
        if child.returncode:
            last = (err.strip().splitlines() or [f"ended with status {child.returncode}"])[-1]
            if child.returncode < 0:                                # what it wrote last was no error
                last = f"ended by {signal.Signals(-child.returncode).name}, which may be for want of memory"
            raise okd_train.UserError(f"{arm.name}, seed {seed}: {last}")
        with self.lock, okd_train.replacing(kept) as f:
            f.write((out / "real_features.npz").read_bytes())

    def wait_for_orphan(self, out, pause=2):
        """Until no process trains in `out`: the trainer of a compare.py that was killed works on, and may as well."""
        told = False
        while not self.stopping:
            with okd_train.Lock(out) as lock:
                try:
                    return lock.take(lambda text: None)
                except okd_train.UserError as e:
                    if "is being trained by" not in str(e):
                        raise
                    if not told:
                        print(f"Waiting: {e}", flush=True)
            told = True
            time.sleep(pause)
        raise okd_train.UserError("stopped")

    def command(self, arm, seed, out, device):
        more = {"data": self.parts["train"], "steps": arm.s.steps, "seed": seed, "out": out, "device": device,
                "nproc": 1, "fid_every": math.ceil(arm.s.steps / CHECKPOINTS), "fid_samples": VAL_FAKES,
                "fid_data": self.parts["val"], "fid_features": self.features}
        words = [word for name, value in more.items() for word in as_flag(name, value)]
        return [sys.executable, str(HERE / "okd_train.py"), "--model", str(arm.script.path), *arm.argv, *words]

    def share(self, run):
        """How much of a run is done, 0 to 1, by its log."""
        lines = okd_train.read_lines(self.folder(*run) / "log.jsonl")[-1:]
        return 1.0 if run in self.results else sum(line["step"] for line in lines) / self.arms[run[0]].s.steps

    def forecast(self, before, failed, seconds):
        """When all will be done. before: shares at the start of this session; every arm costs about the same."""
        now = {run: self.share(run) for run in before if run not in failed}
        done, left = sum(max(0, now[run] - before[run]) for run in now), sum(1 - share for share in now.values())
        words = f"{sum(run in self.results for run in self.runs)} of {len(self.runs)} runs are finished"
        if done and left:
            rest = seconds * left / done
            words += f"; all in {okd_train.span(rest)}"
        return words + (f"; see {self.out / 'study.html'}" if self.results else "")


def write_results(path, results):
    others = [line for line in okd_train.read_lines(path) if (line.get("arm"), line.get("seed")) not in results]
    with okd_train.replacing(path) as f:                            # whole or not at all
        f.write("".join(json.dumps(line) + "\n" for line in [*others, *results.values()]).encode())


# ---------------------------------------------------------------------------------------------- scoring one run
class Judge:
    """The photos of the three parts as one way to read them has them, and what fakes are measured by on the test part.

    train: the photos to learn from; data: those of the test part; photos: by what a result tells which it is of.
    """

    def __init__(self, parts, s, script, features, device, cache):
        *train, limits = read_part(parts, "train", s, script.conditional, s.range)
        val = read_part(parts, "val", s, False, limits)[0]
        images, y, classes, _ = read_part(parts, "test", s, script.conditional, limits)             # all by one rule
        if classes != train[2]:
            raise okd_train.UserError(f"{parts['train']} has the classes {', '.join(train[2])}, "
                                      f"{parts['test']} {', '.join(classes)}: they must be the same")
        if len(images) <= fid.K:
            raise okd_train.UserError(f"{parts['test']}: {len(images)} photos; scores need more than {fid.K}")
        self.range, self.device = limits and list(limits), device
        s = argparse.Namespace(**{**vars(s), "fid_features": features, "fid_samples": TEST_FAKES, "fid_data": None})
        self.train, self.data = okd_train.Data(*train, s, device), okd_train.Data(images, y, classes, s, device)
        self.spread = spread(okd_train.to_hwc(images), y.numpy())
        if not self.spread > 0:
            raise okd_train.UserError(f"{parts['test']}: all photos of a class are the same")
        try:
            self.scores = okd_train.Scores(s, self.data, device)
            self.real, self.floor = self.scores.real(cache)
            self.classifier = labels.classifier(self.real, y.numpy()) if classes else None
        except (okd_train.UserError, fid.FidError) as e:
            words = str(e).replace("--fid-every: ", "").replace("--fid-features", "--features")
            raise okd_train.UserError(f"{parts['test']}: {words}") from e
        self.photos = {"train": self.train.digest, "test": self.scores.of,
                       "val": f"{okd_train.digest(val.numpy(), 16)} {self.scores.network()}"}

    def fakes(self, s, path, script):
        """TEST_FAKES images of a generator, of a z of their own: (uint8 (n, H, W, 3), features (n, d), labels (n,))."""
        G = okd_train.load_generator(path, self.device, script)
        chunks = [okd_train.chunk_of_inputs(s, k, "test") for k in range(math.ceil(TEST_FAKES / okd_train.CHUNK))]
        images = np.concatenate([okd_train.generate(G, *chunk) for chunk in chunks])[:TEST_FAKES]
        return images, self.scores.features(images, path.name), np.arange(TEST_FAKES) % max(1, len(self.data.classes))

    def marks(self, images, features, y):
        """{score: float} of fakes."""
        found = {"distance": float(self.scores.distance(self.real, features)),
                 "kid": fid.kernel_distance(self.real, features)[0],
                 "coverage": fid.prdc(self.real, features)["coverage"],
                 "variety": spread(images, y) / self.spread}
        if self.classifier:
            found["labels"] = float(np.nanmean(self.classifier.shares(features, y)))
        return found


def read_part(parts, name, s, conditional, limits):
    """A part of the photos, by the trainer's own function -> images, labels, classes, range."""
    try:
        return okd_train.read_folder(parts[name], s.image_size, conditional, s.skip_bad, print, limits, s.upright)
    except okd_train.UserError as e:                                # it calls every folder --data
        raise okd_train.UserError(str(e).replace("--data", f"--{name}".replace("train", "data"), 1)) from e


def spread(images, y):
    """Mean distance between two of uint8 images (n, H, W, 3) of one class, averaged to 16x16 pixels."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, size=(16, 16), mode="area")
    return float(np.nanmean(okd_train.spreads(x, torch.from_numpy(y), y.max() + 1)))


def score_run(out, judge):
    """A finished run -> what results.jsonl says of it. What is measured on test was chosen on validation alone."""
    s, script, saved = okd_train.read_run(out)
    files = {i: out / f"G{i}.best.pt" for i in range(1, s.groups + 1)}              # each at its best step
    found = sample.group_files("best", s.groups, out)
    if not found:
        raise okd_train.UserError(f"{out} has lost its scores: delete this folder, and it is trained anew")
    best, = found
    fakes = {i: judge.fakes(s, path, str(script.path)) for i, path in files.items()}
    each = {i: judge.marks(*of) for i, of in fakes.items()}
    edges = np.linspace(0, TEST_FAKES, s.groups + 1).astype(int)
    parts = [[a[low:high] for a in of] for of, low, high in zip(fakes.values(), edges, edges[1:])]
    mean = {k: float(np.mean([marks[k] for marks in each.values()])) for k in each[best]}
    log = okd_train.read_lines(out / "log.jsonl")
    near = [group["c_w"] for line in log[-max(1, len(log) // 4):] for group in line["groups"] if "c_w" in group]
    if near:
        mean |= {"apart": apart([features for _, features, _ in fakes.values()]), "c_w": float(np.mean(near))}
    with np.load(out / "real_features.npz", allow_pickle=False) as f:
        photos = {"train": saved["data_digest"], "val": str(f["of"]), "test": judge.scores.of}
    keys = ["step", "mean", "union", *(f"G{i}" for i in files)]
    return {"step": s.steps, "settings": settings_of(s, script), "script": saved["script_digest"],
            "score": judge.scores.name, "photos": photos, "seconds": round(trained_for(log)),
            "versions": saved.get("versions"), "git": saved.get("git"),
            "validation": [{k: line[k] for k in keys} for line in okd_train.score_lines(out, s.groups)],
            "chosen": {"best": best, **{f"G{i}": okd_train.load_file(path)["step"] for i, path in files.items()}},
            "groups": list(each.values()), "mean": mean, "best": each[best],
            "union": judge.marks(*map(np.concatenate, zip(*parts)))}


def trained_for(log):
    """Seconds of training by the lines of a log.jsonl, which count anew whenever a run goes on."""
    seconds = [line["seconds"] for line in log]
    return sum(now for now, then in zip(seconds, [*seconds[1:], 0]) if then < now)


def apart(features):
    """Mean KID between two groups, from the features (n, d) of each: images of other z, half of each group's."""
    half = TEST_FAKES // 2
    pairs = itertools.permutations(features, 2)
    return float(np.mean([fid.kernel_distance(one[:half], other[half:])[0] for one, other in pairs]))


# ---------------------------------------------------------------------------------------------- statistics
def paired(a, b):
    """Scores a, b (n,) of two arms on the same n >= 2 seeds -> their difference a - b, as shares of the mean of b.

    {"n", "difference", "low", "high", "detectable", "lower"}: the 95 % interval of a paired t-test, the least true
    difference that such a test on n seeds with this spread would show in four studies out of five, and on how many
    seeds a is below b.
    """
    from scipy import optimize, stats
    a, b = np.asarray(a, float), np.asarray(b, float)
    n, difference, unit = len(a), (a - b).mean(), abs(b.mean())
    error, edge = (a - b).std(ddof=1) / n ** 0.5, stats.t.ppf(0.975, n - 1)
    shift = optimize.brentq(lambda shift: stats.nct.sf(edge, n - 1, shift) - 0.8, edge / 2, 2 * edge + 4)
    share = lambda v: float(v / unit) if unit else math.copysign(math.inf, v) if v else 0.0
    return {"n": n, "difference": share(difference), "low": share(difference - edge * error),
            "high": share(difference + edge * error), "detectable": share(shift * error), "lower": int((a < b).sum())}


def verdict(p, better, asked=True):
    """What a comparison by paired() shows, in plain words. better: "lower" or "higher"; asked: it is a question of the
    study, not one of many further comparisons."""
    up, down = p["low"] > 0, p["high"] < 0
    found = (f"at n = {p['n']}: {100 * p['difference']:+.1f} % (95 % interval {100 * p['low']:+.1f} to "
             f"{100 * p['high']:+.1f} %), lower on {p['lower']} seeds")
    if up or down:
        return f"{'shown' if asked else 'points to'} {'better' if down == (better == 'lower') else 'worse'} {found}"
    least = float(f"{100 * p['detectable']:.2g}")                   # two digits, no power of ten
    return f"not told apart {found}; differences under {least:g} % would not be seen"


def values(results, arm, measure, score):
    """{seed: value} of the finished runs of an arm."""
    found = {seed: line[measure].get(score) for (name, seed), line in results.items() if name == arm}
    return {seed: v for seed, v in found.items() if v is not None}


def comparison(results, one, other, measure, score):
    """paired() over the seeds that both arms have; None for fewer than two."""
    a, b = (values(results, arm, measure, score) for arm in (one, other))
    seeds = sorted(a.keys() & b.keys())
    return paired([a[k] for k in seeds], [b[k] for k in seeds]) if len(seeds) > 1 else None


# ---------------------------------------------------------------------------------------------- tables
def rows_of_arms(study, score):
    """[(arm, runs, mean, best, union)], each as mean and standard deviation over the seeds."""
    rows = []
    for arm in study.arms:
        found = [list(values(study.results, arm, measure, score).values()) for measure in MEASURES]
        if found[0]:
            rows.append((arm, len(found[0]), *map(mean_and_deviation, found)))
    return rows


def mean_and_deviation(v):
    if not v:
        return ""
    return f"{np.mean(v):.4g}" + (f" +- {np.std(v, ddof=1):.2g}" if len(v) > 1 else "")


def papers_rows(study):
    """The paper's Table 1 in the form of rows_of_arms(): FID on its own photos, best by test."""
    rows = PAPER.get(study.arms["ring"].script.name, {})
    return [(f"{name} (FID, CODEBRIM)", 1, *map(str, v), *[""] * (3 - len(v))) for name, v in rows.items()]


def pairs(arms):
    """Which arm is compared with which; a further one with the arm that it is named after, and with alone."""
    further = [(arm, other) for arm in arms if arm not in ARMS
               for other in dict.fromkeys((arm.partition(":")[0], "alone"))]
    return [*QUESTIONS, ("alone", "single"), *further]


def comparisons(study, scores):
    """[(arm, other, measure, score, paired(), words)]; other scores than the distance as means over groups alone."""
    rows = []
    for one, other in pairs(study.arms):
        for score in (score for score in scores if score in BETTER):
            for measure in MEASURES if score == "distance" else MEASURES[:1]:
                p = comparison(study.results, one, other, measure, score)
                if p:
                    asked = (one, other) in QUESTIONS and (measure, score) == ("mean", "distance")
                    rows.append((one, other, measure, score, p, verdict(p, BETTER[score], asked)))
    return rows


def scores_of(results):
    """{score: its name}, of the scores that any of these results has."""
    names = {"distance": next(iter(results.values()))["score"], **NAMES}
    return {score: names.get(score, score) for line in results.values() for score in line["mean"]}


def as_text(study):
    """Lines for a terminal: the table of the distance, and what the comparisons show."""
    head = [scores_of(study.results)["distance"], "runs", *HEAD]
    rows = [[str(cell) for cell in row] for row in rows_of_arms(study, "distance") + papers_rows(study)]
    return [*fid.aligned([head, *rows]), "", *findings(study)]


def findings(study):
    """A sentence per comparison of the distance, after one that says what is missing."""
    said = [f"{one} against {other}, {measure}: {words}."
            for one, other, measure, _, _, words in comparisons(study, ["distance"])]
    left = sum(run not in study.results for run in study.runs)
    first = [f"{left} of {len(study.runs)} runs are not finished: these may yet change."] if left and said else []
    return first + said or ["One seed says nothing of a difference: two at least."]


# ---------------------------------------------------------------------------------------------- the page
def write_page(study):
    """study.html and study.png out of the results there are."""
    image, names, name = picture(study), scores_of(study.results), study.out.resolve().name
    okd_train.save_image(image, study.out / "study.png")
    ring, single = study.arms["ring"], study.arms["single"]
    about = (f"{ring.s.groups} {ring.script.name} groups in a ring against the same groups alone, and against one "
             f"group for {single.s.steps} steps, which have the arithmetic of {ring.s.steps} of the ring. Steps and "
             "groups were chosen on other photos than those that these scores are from.")
    parts = [f"<h1>{html.escape(name)}: does the ring help?</h1>", report.paragraph(about),
             *(f"<p>{html.escape(words)}</p>" for words in findings(study))]
    pictured = report.picture(image, "A dot is a run, a grey line a seed; a dash beside the dots their mean.", "PNG")
    for score in names:
        about = f"{names[score]}{f' ({ABOUT[score]})' if score in ABOUT else ''}, mean +- deviation over the runs."
        if score in BETTER:
            about += f" {BETTER[score].capitalize()} is better."
        if score == "distance":
            about += f" {TEST_FAKES} images each. The paper's is FID on other photos: only its ratios compare."
        rows = rows_of_arms(study, score) + (papers_rows(study) if score == "distance" else [])
        parts += [report.table(about, ("", "runs", *HEAD), rows), pictured if score == "distance" else ""]
    parts += [differences(study, names), settings(study)]
    with okd_train.replacing(study.out / "study.html") as f:
        f.write(report.document(name, parts).encode())


def differences(study, names):
    about = ("Paired differences in % of the second arm's mean, with their 95 % interval, and the least difference "
             "that so many seeds would show. What is shown answers a question of the study; of the others one in "
             "twenty strays by chance, so they only point to something. Best and union can gain by the number of "
             "groups alone, in a ring or not.")
    head = ("", "against", "measure", "score", "difference", "from", "to", "least", "in words")
    keys = "difference", "low", "high", "detectable"
    rows = [(one, other, measure, names[score], *(round(100 * p[k], 1) for k in keys), words)
            for one, other, measure, score, p, words in comparisons(study, names)]
    return report.table(about, head, rows) if rows else ""


def settings(study):
    arms = [(arm.name, " ".join(arm.argv), arm.s.steps, arm.work / 1e9, arm.work * arm.s.steps / 1e12)
            for arm in study.arms.values()]
    made = [{"device": line["device"], **(line["versions"] or {}), "git": line.get("git")}
            for line in study.results.values()]
    made = {k: ", ".join(sorted({str(of.get(k)) for of in made})) for k in made[0]}
    seconds = np.median([line["seconds"] for line in study.results.values()])
    floors = [f"{of.scores.name} {of.floor[0]:.4g} +- {of.floor[1]:.2g}" for of in study.judges.values()]
    said = {"finished": f"{len(study.results)} runs, {len(study.runs)} asked for",
            "photos against as many others": ", ".join(floors),
            "a run trained for": okd_train.span(seconds), **study.parts, **made}
    return (report.table("Arms", ("", "flags", "steps", "GFLOP a step", "TFLOP a run"), arms)
            + report.table("The study", ("", ""), list(said.items())))


def picture(study):
    """Dots of every score, and the curves of the distance on validation -> picture."""
    names = scores_of(study.results)
    panels = [dots(study, score, name) for score, name in names.items()]
    panels.insert(1, validation_curves(study, names["distance"]))
    width, height = (max(panel.size[axis] for panel in panels) for axis in (0, 1))
    sheet = Image.new("RGB", (2 * width, height * math.ceil(len(panels) / 2)), "white")
    for k, panel in enumerate(panels):
        sheet.paste(panel, (k % 2 * width, k // 2 * height))
    return sheet


def dots(study, score, name):
    """A panel with a dot per run, arms side by side; a grey line joins the runs of a seed."""
    arms = list(study.arms)
    found = [values(study.results, arm, "mean", score) for arm in arms]
    seeds = sorted(set().union(*found))
    y = np.array([[of.get(seed, math.nan) for of in found] for seed in seeds])      # (seeds, arms)
    at, width = np.arange(len(arms)), max(report.PANEL[0], sum(40 + 7 * len(arm) for arm in arms))
    about = "in training" if score == "c_w" else "on test, mean over groups"
    about += f"; {BETTER[score]} is better" if score in BETTER else ""
    limits = report.y_limits([(y, y.ravel())])
    plot = report.Plot(width, report.PANEL[1], name, about, (-0.6, len(arms) - 0.4), limits, arms)
    for row in y:
        plot.line(at, row, "#cccccc", 1)
    for k in at:
        for v in y[:, k]:
            plot.line(at[k:k + 1], np.array([v]), report.hue(k + 1))
        if np.isfinite(y[:, k]).any():
            plot.line(k + np.array([0.12, 0.3]), np.full(2, np.nanmean(y[:, k])), report.hue(k + 1), 3)
    return plot.image()


def validation_curves(study, name):
    """A panel with the median over the runs of every arm, at equal shares of their steps."""
    medians = {}
    for k, arm in enumerate(study.arms, 1):
        runs = [[line["mean"] for line in of["validation"]] for (a, _), of in study.results.items() if a == arm]
        if runs:
            n = min(map(len, runs))
            medians[k] = np.median([run[:n] for run in runs], 0)
    about, steps = "on validation, median; steps of the ring", study.arms["ring"].s.steps
    limits = report.y_limits([(y, y) for y in medians.values()])
    plot = report.Plot(*report.PANEL, name, about, (0, 1.02 * steps), limits)
    for k, y in medians.items():
        plot.line(np.linspace(0, steps, len(y) + 1)[1:], y, report.hue(k), dots=True)
    return plot.image()


# ---------------------------------------------------------------------------------------------- photos and arms
def find_parts(args, out):
    """{"train", "val", "test": folder}; half of the test photos become the validation part where none is given."""
    train, val, test = Path(args.data), args.val, args.test
    if test is None and (train / "test").is_dir() and (train / "train").is_dir():
        train, test, val = train / "train", train / "test", val or next(
            (str(train / name) for name in ("val", "valid") if (train / name).is_dir()), None)
    if test is None:
        raise okd_train.UserError(f"--test DIR is missing: photos that are not in {train} "
                                  "(crop_codebrim.py --split makes such parts)")
    places = {name: Path(folder).resolve() for name, folder in
              {"--data": train, "--val": val, "--test": test}.items() if folder is not None}
    for one, other in itertools.permutations(places, 2):
        if places[one].is_relative_to(places[other]):
            raise okd_train.UserError(f"{one} {places[one]} lies in {other} {places[other]}: to train, to choose and "
                                      "to test takes three folders, none in another")
    inside = [name for name, place in places.items() if out.resolve().is_relative_to(place)]
    if inside:
        raise okd_train.UserError(f"--out {out} lies among the photos of {inside[0]}: name another folder")
    if val is None:
        val, test = halves_by_photo(Path(test), out)
    return {"train": str(train), "val": str(val), "test": str(test)}


def halves_by_photo(folder, out):
    """Copy the images of a folder to out/halves-.../val and test, half of each class; crops of one photo stay together.

    The name of that folder tells the images: those of another folder, or others in the same one, are halved anew.
    """
    files = fid.class_images(folder)
    classes = sorted({c or "" for _, c in files})
    y = np.array([classes.index(c or "") for _, c in files])
    photos = labels.photos_of(folder, [path for path, _ in files], y, classes)
    _, first, photo = np.unique(np.arange(len(y)) if photos is None else photos, return_index=True, return_inverse=True)
    turn = np.random.RandomState(0).permutation(len(first))
    order = np.lexsort((turn, y[first]))                            # photos class by class, in random order within
    part = np.empty(len(first), int)
    part[order] = np.arange(len(first)) % 2
    names = [path.relative_to(folder) for path, _ in files]
    said = "\n".join(f"{part[k]} {name} {okd_train.digest(path)}" for k, name, (path, _) in zip(photo, names, files))
    whole = out / f"halves-{okd_train.digest(os.fsencode(said))}"
    if not whole.is_dir():
        grows = out / f".{whole.name}"
        shutil.rmtree(grows, ignore_errors=True)                    # of a start that was killed
        for k, name, (path, _) in zip(photo, names, files):
            target = grows / ("val", "test")[part[k]] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        grows.rename(whole)
    return [whole / "val", whole / "test"]


def make_arms(s, script, named, judge):
    """The arms of a command, with the steps of `single` counted. judge(s, script) -> the Judge of such settings."""
    shared = [word for name in sorted(named - OWN - {"model", "out", "data", "device"})
              for word in as_flag(name, getattr(s, name))]
    arms = [make_arm(text, script, shared, judge) for text in dict.fromkeys([*ARMS, *s.arms])]
    ring = arms[0]
    for arm in arms:
        if any(getattr(arm.s, name) != getattr(ring.s, name) for name in ("image_size", "upright", "range")):
            raise okd_train.UserError(f"arm {arm.name}: it reads the photos in another way than the ring, and scores "
                                      "of other images do not compare")
        if arm.base == "single" and "steps" not in arm.own:
            arm.s.steps = max(1, round(ring.s.steps * ring.work / arm.work))
    return arms


def make_arm(text, script, shared, judge):
    """'ring:rho=0.1,flip' -> the Arm, with the operations of its step counted. UserError."""
    base, _, more = text.partition(":")
    if base not in ARMS:
        raise okd_train.UserError(f"arm {text}: it must begin with {', '.join(ARMS)}, and a colon")
    own = dict(item.partition("=")[::2] for item in filter(None, more.split(",")))
    words = [word for key, value in own.items() for word in [okd_train.flag(key), *([value] if value else [])]]
    argv = ["--model", str(script.path), *shared, *ARMS[base], *words]
    try:
        if {"h", "help"} & own.keys():
            raise okd_train.UserError("that is no setting")
        s, script, given = okd_train.parse(argv)
        if given & (TAKEN | {"data", "out", "device"}):
            raise okd_train.UserError("that is the same for all arms")
        changed, of = okd_train.settle(s, script, given), judge(s, script)
        s.range = of.range
        okd_train.check_data(s, script, given, "--data", of.train.images, of.train.classes)
        okd_train.settle_channels(s, script, given, changed, of.train)
        if script.conditional:
            s.n_classes = len(of.train.classes)
        work = bench.count_work(script, s)[0]
    except okd_train.UserError as e:
        raise okd_train.UserError(f"arm {text}: {e}") from None
    return Arm(text, base, argv[2:], own, s, script, work, of)


def as_flag(name, value):
    if isinstance(value, bool):
        return [okd_train.flag(name if value else f"no_{name}")]
    return [okd_train.flag(name), *map(str, value if isinstance(value, list) else [value])]


# ---------------------------------------------------------------------------------------------- command line
def own_flags(p):
    """What compare.py takes beside the flags of okd_train.py, and what is otherwise with those."""
    add, said = p.add_argument, {"data": "photos to learn from", "out": "folder of the study (default study/)"}
    for action in p._actions:
        action.help = argparse.SUPPRESS if action.dest in TAKEN else said.get(action.dest, action.help)
    add("--seeds", default="10", metavar="N|A-B",
        help="so many runs of every arm, or those of seeds A to B (default 10)")
    add("--arms", nargs="+", default=[], metavar="NAME:SETTING=VALUE,...", help="further arms, such as ring:rho=0.1")
    add("--test", metavar="DIR", help="photos that are scored against; not in --data (default: test/ in --data)")
    add("--val", metavar="DIR",
        help="photos that steps and groups are chosen by (default: val/ in --data, else half of those of --test)")
    add("--features", type=okd_train.features_name, default="inception", metavar="inception|random|FILE.py",
        help="what the distance is measured in, as for fid.py; random: no weights, a smoke test")
    add("--jobs", type=bench.natural, metavar="K",
        help="runs at once (default: one per GPU, else one per core, of one thread)")


def arguments(argv):
    """argv -> (settings, script, names of the flags that were given, seeds). UserError."""
    s, script, named = okd_train.parse(argv, "compare.py", __doc__, own_flags)
    taken = sorted(named & TAKEN)
    if taken:
        raise okd_train.UserError(f"{', '.join(map(okd_train.flag, taken))}: the study sets that by itself; how long "
                                  "is --steps, how often --seeds, and --recipe small is what --quick trains")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise okd_train.UserError("compare.py is one process: start it with python, not with torchrun")
    if s.data is None:
        raise okd_train.UserError("--data DIR is missing: the photos to learn from")
    okd_train.check_limits(s, script)
    if s.groups < 2 or s.rho == 0:
        raise okd_train.UserError(f"--groups is {s.groups} and --rho {s.rho:g}: a ring has two groups or more, and a "
                                  "weight above 0")
    seeds = re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", s.seeds)
    first, last = (int(seeds[1]), int(seeds[2])) if seeds and seeds[2] else (0, int(seeds[1]) - 1 if seeds else -1)
    if last < first:
        raise okd_train.UserError(f"--seeds {s.seeds}: say how many, such as 10, or from which to which, such as 5-9")
    return s, script, named, range(first, last + 1)


def run(argv):
    s, script, named, seeds = arguments(argv)
    gpus, out = torch.cuda.device_count() if s.device is None else 0, Path(s.out or "study")
    devices = [f"cuda:{k % gpus}" if gpus else s.device or "cpu" for k in range(s.jobs or gpus or okd_train.cores())]
    if devices[0] == "cpu":
        torch.set_num_threads(1)                                    # as the trainers beside it
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with okd_train.Lock(out) as lock:
        lock.take(print)
        study = Study(out, find_parts(s, out), s.features, devices)
        study.plan(make_arms(s, script, named, study.judge), seeds)
        ring, single = study.arms["ring"], study.arms["single"]
        print(f"A step of the ring is {ring.work / 1e9:.4g} GFLOP, of one group {single.work / 1e9:.4g}: one group "
              f"makes {single.s.steps} steps in {ring.s.steps} of the ring. {len(study.runs)} runs, {len(devices)} at "
              "once.", flush=True)
        failed = study.go(len(devices))
        if study.results:
            write_page(study)
            print("\n".join(as_text(study)))
        if failed:
            raise okd_train.UserError(f"{len(failed)} runs failed, the same command tries them again: "
                                      + "; ".join(failed.values()))


def main(argv=None):
    def work():
        try:
            run(sys.argv[1:] if argv is None else argv)
        except fid.FidError as e:
            raise okd_train.UserError(str(e)) from e
    okd_train.guarded("compare.py", work)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    main()
