"""Images out of a run of okd_train.py: exact counts, a folder per class, and a manifest that brings each image back.

    python sample.py runs/sagan-3 1000                              # 1000 PNGs of each group, in runs/sagan-3/fakes/
    python sample.py runs/acgan-3 1000 --group 1,3 --to mixed/      # of two groups; classes evenly, a folder for each
    python sample.py runs/acgan-3 --per-class 40                    # 40 of every class
    python sample.py runs/acgan-3 --per-class Crack=500 --group best --to cracks/       # cracks/G2/Crack/000000.png ...
    python sample.py runs/acgan-3 1000 --npz --to arrays/           # arrays/G1.npz, ... in place of PNGs
    python sample.py runs/acgan-3 --scored --to scored/             # the very images of the last score in fid.jsonl
    torchrun --nproc-per-node 2 sample.py runs/sagan-3 1000         # two processes; python alone starts one per GPU

Counts are exact and hold for each group. --group best takes the group and step with the lowest score in the run's
fid.jsonl; a run without scores is scored then and there, against the images it was trained on. The folder must be empty
or new, and appears whole, when all is done. An export that was stopped, by Ctrl-C, kill -9 or a full disk, goes on when
the same command is given again: what it has written waits in a hidden folder beside (.cracks.partial, to be deleted if
you do not want it) and is not drawn twice.

--scored exports what fid.jsonl's score was made of, and says the command by which fid.py prints that score again (with
as many threads as in training, to the last digit).

manifest.csv has a row per image: file, group, class, z, checkpoint; an apostrophe stands before a class that a
spreadsheet would take for a formula (=1+1, -x, @x). z is a function of the run's seed, the class and the image's number
alone, so the first 100 images of 1000 are those of an export of 100: "0/3/0/sample Crack/17" is row 17 of
okd_train.draw(0, 3, 0, "sample Crack", "normal", (50, z_dim)). checkpoint is a digest of the generator's file, whose
name and step stand in export.json. From its row an image can be had again:

    import csv, sample
    rows = list(csv.DictReader(open("cracks/manifest.csv", newline="")))
    image = sample.redraw("runs/acgan-3", rows[17])         # uint8 (H, W, 3): the pixels of rows[17]["file"]

An .npz holds arr_0 uint8 (n, H, W, 3), which fid.py and other evaluators read, labels int64 (n,), classes (their names)
and group (of the file's name).
"""
import argparse
import contextlib
import csv
import functools
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while torch is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import numpy as np
import torch
from PIL import Image


def trainer():
    """The module okd_train from the folder of this file, whatever else is called so; None where it is missing."""
    path = Path(__file__).resolve().with_name("okd_train.py")
    for name in ("okd_train", "okd_gan.okd_train"):                 # the second where the user's own has the name
        module = sys.modules.get(name)
        if module is None:
            break
        if Path(getattr(module, "__file__", None) or "").resolve() == path:
            return module
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


okd_train = trainer()
if okd_train is None and __name__ != "__main__":
    raise ImportError("sample.py needs okd_train.py beside it")

MOST = 10 ** 7                  # images of a class and group: a bound against slips, far above what a disk should hold
FORMULA = ("=", "+", "-", "@", "\t", "\r")      # how a spreadsheet's formula may begin
WRITERS = 8                     # most threads that compress PNGs while the next are drawn; more would wait for these


# ---------------------------------------------------------------------------------------------- an export
def export(args, s, script, saved):
    """N images of each group's averaged generator, in a folder with manifest.csv and export.json. On every rank.

    args: of the command line; s, script, saved: of the run, as read_run gives them. SystemExit with 143 or 130 on
    SIGTERM or Ctrl-C.
    """
    device = okd_train.pick_device(s.device)
    ranks = okd_train.Ranks(s.groups, okd_train.CHUNK, device)
    e = Export(args, s, script, saved, ranks, device)
    with okd_train.Stop() as stop, okd_train.Lock(*e.lock) as lock:
        begin = time.monotonic()
        todo = e.open(lock)
        to_draw = images(todo)
        signalled, done = e.draw(todo, stop)
        if signalled:
            name = signal.Signals(signalled).name
            e.progress.say(f"Stopped by {name}: {done} of {e.total} images are in {e.partial}; "
                           "the same command goes on.")
            ranks.close()
            raise SystemExit(128 + signalled)
        e.finish()
    seconds = time.monotonic() - begin
    best = "".join(f" of {g}, step {of['step']}," for g, of in e.plan["groups"].items() if args.group == "best")
    rate = f", {to_draw / seconds:.0f} images/s" if to_draw else ""
    e.progress.say(f"{e.total} images{best} in {e.target}/ ({okd_train.span(seconds)}{rate}).")
    if e.classes:
        e.progress.say(label_note(s, e.plan["groups"], e.target))
    if e.scores:
        e.progress.say(how_to_repeat(s, e))
    ranks.close()


def label_note(s, groups, target):
    """How far the labels of these generators hold, by the run's scores up to their steps, or how that can be measured.

    groups: {"G1": what export.json says of it}.
    """
    lines, told = okd_train.score_lines(Path(s.out), s.groups)[::-1], {}
    for name, of in groups.items():
        i = name.removeprefix("G")
        line = next((x for x in lines if x["step"] <= of["step"] and okd_train.label_words(x, [i])), None)
        told.setdefault(line and line["step"], (line, []))[1].append(i)
    if None not in told:
        return "\n".join(okd_train.label_words(line, of) for line, of in told.values())
    real = shlex.quote(s.data) if s.data else "REAL"
    return ("Whether the labels hold was never measured in this run. Of an export as PNGs it is by: "
            f"python labels.py {real} {shlex.quote(str(target / min(groups)))}")


def how_to_repeat(s, e):
    """The scores of fid.jsonl that these images have, and the command that makes them again."""
    numbers = "  ".join(f"{g} {e.scores[g]:.4f}" for g in e.plan["groups"])
    real, sides = s.fid_data or s.data, [str(e.target / f"{g}{'.npz' * e.npz}") for g in e.plan["groups"]]
    words = ["python", "fid.py", real, *sides, "--size", str(s.image_size)]
    words += ["--features", s.fid_features] * (s.fid_features != "inception")
    words += ["--upright"] * s.upright + ["--skip-bad"] * s.skip_bad
    words += ["--range", *map(str, s.range)] if s.range else []
    command = shlex.join(words) if real else "the built-in images they were compared with lie in no folder"
    with contextlib.suppress(okd_train.UserError):                  # the photos may be gone: the images are there
        if real and {c is None for _, c in okd_train.class_files(real, False)[0]} == {True, False}:
            command += f" (which leaves out what lies in folders of {real}; the score does not)"
    return f"{e.scores['score']} at step {e.scores['step']}: {numbers}. Once more: {command}"


class Job(NamedTuple):
    """What one forward draws: images first, first + 1, ..., n of them, of one class by one group."""
    group: int
    name: str                   # of the class; "" without classes
    label: int | None
    first: int
    n: int


def images(jobs):
    """How many images these jobs draw."""
    return sum(job.n for job in jobs)


class Export:
    """One export: planned when it is made, then opened, drawn and finished, by all ranks together.

    Everything is written to `partial`, a hidden folder beside `target`, which takes the target's name at the end. What
    it holds is not drawn again, if the plan beside it, export.json, is still the same.
    """

    def __init__(self, args, s, script, saved, ranks, device):
        self.s, self.script, self.ranks, self.npz, self.classes = s, script, ranks, args.npz, saved["classes"]
        out = Path(s.out)
        self.target = Path(args.to or out / "fakes")
        if args.to or self.target.is_symlink():
            self.target = self.target.resolve()
        self.partial = self.target.parent / f".{self.target.name}.partial"
        self.lock = self.target.parent, f".{self.target.name}.lock", f"{self.target} is being written", "--to"
        with ranks.together():
            refuse_full(self.target)
            files = group_files(args.group, s.groups, out)
            self.scores = scores_of(files, s.groups, out) if args.scored else None
            self.counts = ([("", None, self.scores["samples"])] if self.scores else
                           class_counts(args.n, args.per_class, self.classes, out))
        files = files or score_now(s, script, saved, ranks, device)
        with ranks.together():
            self.generators, groups = read_generators(files, script, device, args.scored)
        self.plan = {"seed": s.seed, "images": {name: n for name, _, n in self.counts}, "npz": self.npz,
                     "device": device.type, "torch": torch.__version__, "script": okd_train.digest(script.path),
                     "groups": groups, **({"scored": True} if self.scores else {})}
        ranks.compare(settings=json.dumps(self.plan))
        self.jobs = [Job(i, name, label, k, min(okd_train.CHUNK, n - k))
                     for i in files for name, label, n in self.counts for k in range(0, n, okd_train.CHUNK)]
        self.total = images(self.jobs)
        self.progress = okd_train.Progress(self.total, quiet=ranks.rank > 0, unit="image")
        if len({of["step"] for of in groups.values()}) > 1:
            steps = ", ".join(f"{g} of step {of['step']}" for g, of in groups.items())
            self.progress.say(f"Note: these generators are of unequal steps: {steps}. A run that was killed while it "
                              f"saved is mended by python okd_train.py --out {shlex.quote(str(out))} --resume.")

    def files(self, job):
        """The files that a job fills: a chunk for the .npz to come, or the PNGs."""
        if self.npz:
            return [self.partial / f".G{job.group}" / job.name / f"{job.first:06d}.npy"]
        folder = self.partial / f"G{job.group}" / job.name
        return [folder / f"{k:06d}.png" for k in range(job.first, job.first + job.n)]

    def packed(self, i):
        """The .npz of group i."""
        return self.partial / f"G{i}.npz"

    def open(self, lock):
        """Make the hidden folder, or go on with the one that is there -> the jobs that are still to be done."""
        todo = None
        with self.ranks.together():
            if self.ranks.rank == 0:
                lock.take(self.progress.say)
                open_folder(self.target, self.partial, self.plan)
                todo = [job for job in self.jobs
                        if not (self.npz and whole(self.packed(job.group)) or all(map(whole, self.files(job))))]
                with okd_train.writing(self.partial):
                    for folder in {self.files(job)[0].parent for job in todo}:
                        folder.mkdir(parents=True, exist_ok=True)
        todo = self.ranks.everyone(todo)[0]
        if done := self.total - images(todo):
            self.progress.say(f"Going on: {done} of {self.total} images are in {self.partial} already.")
        return todo

    def draw(self, todo, stop):
        """Do jobs until all are done or `stop` has a signal: each rank draws a chunk, rank 0 writes them meanwhile.

        -> the signal, or 0; and how many images there are now, of all that were planned.
        """
        ranks, saves, signalled, done = self.ranks, [], 0, self.total - images(todo)
        self.progress.last, self.progress.marks = time.monotonic(), [(time.monotonic(), done)]
        with ThreadPoolExecutor(min(WRITERS, okd_train.cores() + 1)) as pool:
            for at in range(0, len(todo), ranks.world):
                signalled, = ranks.agree(stop.signal)
                if signalled:
                    break
                mine = {}
                with ranks.together():
                    own = at + ranks.rank
                    if own < len(todo):
                        mine[own] = self.draw_job(todo[own])
                    self.wait_for(saves)                            # so no more than two rounds are in memory
                saves = [pool.submit(save_whole, a, path)
                         for k, drawn in sorted((ranks.collect(mine) or {}).items())
                         for a, path in zip([drawn] if self.npz else drawn, self.files(todo[k])) if not whole(path)]
                done += images(todo[at:at + ranks.world])
                self.progress(done)
            with ranks.together():
                self.wait_for(saves)
        return signalled, done

    def draw_job(self, job):
        """uint8 (job.n, H, W, 3)."""
        G, chunk = self.generators[job.group], job.first // okd_train.CHUNK
        with okd_train.calling(self.script, f"the generator of group {job.group}"):
            if self.scores:
                return okd_train.generate(G, *okd_train.chunk_of_inputs(self.s, chunk, "fid"))[:job.n]
            return draw_chunk(G, self.s.seed, chunk, f"sample {job.name}", job.label, self.s.z_dim)[:job.n]

    def labels(self):
        """Class number of every image of a group, None without classes; scored ones have all classes in turn."""
        if self.scores and self.classes:
            return [k % len(self.classes) for k in range(self.scores["samples"])]
        return [label for _, label, n in self.counts for _ in range(n)]

    def wait_for(self, saves):
        """Until all of these are on the disk; UserError if one is not."""
        with okd_train.writing(self.partial):
            for save in saves:
                save.result()

    def finish(self):
        """Everything is drawn: rank 0 completes the folder and gives it its name, the others hear if that failed."""
        with self.ranks.together(), okd_train.writing(self.target):
            if self.ranks.rank == 0:
                self.complete_folder()
                os.replace(self.partial, self.target)

    def complete_folder(self):
        """Pack the chunks of an .npz, add the manifest, take out what killed attempts left."""
        for i in self.generators if self.npz else ():
            if not whole(self.packed(i)):
                chunks = [path for job in self.jobs if job.group == i for path in self.files(job)]
                pack(chunks, self.labels(), f"G{i}", self.classes, self.packed(i))
            shutil.rmtree(self.partial / f".G{i}", ignore_errors=True)
        write_manifest(self.plan, self.counts, self.labels(), self.classes, self.partial / "manifest.csv")
        for left in self.partial.rglob(".*.tmp*"):
            left.unlink()


# ---------------------------------------------------------------------------------------------- which images
def natural(text):
    """'12' -> 12; None for anything but a plain number from 1 to MOST."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 and 0 < int(text) <= MOST else None


def class_counts(n, per_class, classes, out):
    """N and --per-class -> [(class name, its label, images of it per group), ...]; ("", None, N) without classes."""
    if per_class is None:
        if not classes:
            return [("", None, n)]
        shares = [n // len(classes) + (c < n % len(classes)) for c in range(len(classes))]
        return [(name, c, k) for c, (name, k) in enumerate(zip(classes, shares)) if k]
    if not classes:
        raise okd_train.UserError(f"--per-class: the run in {out} is not class-conditional; give N, images per group")
    counts = dict.fromkeys(classes, natural(per_class)) if natural(per_class) else named_counts(per_class, classes)
    if n not in (None, total := sum(counts.values())):
        raise okd_train.UserError(f"N is {n} and --per-class, {total} in all, disagree; give one of them")
    return [(name, c, counts[name]) for c, name in enumerate(classes) if name in counts]


def named_counts(per_class, classes):
    """'Crack=500,Rust=20' -> {"Crack": 500, "Rust": 20}. UserError."""
    counts = {}
    names = "|".join(re.escape(c) for c in sorted(classes, key=len, reverse=True))      # some may hold a comma
    for part in re.findall(f"(?:^|,)((?:{names})=[^,]*|[^,]*)", per_class):
        name, _, n = part.rpartition("=")
        wrong = ("is not CLASS=N" if not name else
                 "names no class of this run" if name not in classes else
                 "names a class twice" if name in counts else
                 f"needs a number above 0, at most {MOST}" if not natural(n) else "")
        if wrong:
            raise okd_train.UserError(f"--per-class: {part!r} {wrong}; say N for every class, or CLASS=N with commas "
                                      f"between, the classes are {', '.join(map(repr, classes))}")
        counts[name] = natural(n)
    return counts


def group_files(group, n_groups, out):
    """--group -> {group number: file of its generator}; None for the best group of a run without scores. UserError."""
    if group == "all":
        return {i: out / f"G{i}.pt" for i in range(1, n_groups + 1)}
    if group == "best":
        found = {i: okd_train.best_score(out, i, n_groups) for i in range(1, n_groups + 1)}
        best = min(filter(found.get, found), key=lambda i: found[i][0], default=None)
        if best is None:
            return None
        path, step = out / f"G{best}.best.pt", found[best][1]
        if (held := okd_train.step_of(path)) not in (None, step):
            raise okd_train.UserError(f"{path} is of step {held}, but fid.jsonl has its lowest score at step {step}: a "
                                      "run that was killed is mended by its --resume; or name a group")
        return {best: path}
    numbers = [natural(part.removeprefix("G")) for part in group.split(",")]
    if not all(i and i <= n_groups for i in numbers) or len(set(numbers)) < len(numbers):
        raise okd_train.UserError(f"--group {group}: say all, best, or numbers from 1 to {n_groups} with commas "
                                  "between, each once")
    return {i: out / f"G{i}.pt" for i in sorted(numbers)}


def scores_of(files, n_groups, out):
    """The line of fid.jsonl that holds the scores of these generators ({i: path}, None where nothing is scored).

    UserError where there is none of their step: then no score is of their images.
    """
    lines = {line["step"]: line for line in okd_train.score_lines(out, n_groups)}
    steps = {path.name: okd_train.step_of(path) for path in (files or {}).values()}
    if not lines or not files:
        raise okd_train.UserError(f"--scored: {out} has no scores; train with --fid-every")
    for name, step in steps.items():
        if step not in lines:
            raise okd_train.UserError(f"--scored: {name} is of step {step}, of which fid.jsonl has no score (the last "
                                      f"is of step {max(lines)}); --group best takes the step with the lowest")
    if len(set(steps.values())) > 1:
        said = ", ".join(f"{name} of step {step}" for name, step in steps.items())
        raise okd_train.UserError(f"--scored: these generators are of unequal steps ({said}), a line of scores is of "
                                  "one; name a group")
    line = lines[max(steps.values())]
    if type(line.get("samples")) is not int:
        raise okd_train.UserError(f"--scored: fid.jsonl does not say how many images its scores of step {line['step']} "
                                  "are of")
    return line


def score_now(s, script, saved, ranks, device):
    """Score the groups of a run without scores on its images -> {best group: file of its generator}. On every rank.

    In the run folder nothing changes but real_features.npz, which keeps the features of the real images.
    """
    out, say = Path(s.out), print if ranks.rank == 0 else lambda text: None
    try:
        data = okd_train.shared_data(s, script, set(), device, ranks, say)
        if data.digest != saved["data_digest"]:
            raise okd_train.UserError("they are not what they were in training")
    except okd_train.UserError as e:
        raise okd_train.UserError(f"--group best: {out} has no scores, and its images are needed to make them: {e}; "
                                  "or name a group, such as --group 1") from e
    files, mine = {i: out / f"G{i}.pt" for i in range(1, s.groups + 1)}, {}
    with ranks.together():
        note = choose_features(s)
        scores = okd_train.Scores(s, data, device)
        say(f"Scoring {s.groups} groups, {scores.n} images of each, to find the best: {out} has no scores of its own.")
        for i in ranks.mine:
            G = okd_train.load_generator(files[i], device, str(script.path))
            own = range(ranks.part, scores.chunks(), ranks.replicas)
            with scores.fid.Progress(f"G{i}", len(own) * okd_train.CHUNK, short=False) as told:
                for k, chunk in enumerate(own, 1):
                    mine[i, chunk] = scores.fakes(G, chunk)
                    told(k * okd_train.CHUNK)
    parts, best = ranks.collect(mine), None
    with ranks.together():
        if ranks.rank == 0:
            features = {i: np.concatenate([parts[i, chunk] for chunk in range(scores.chunks())]) for i in files}
            line = scores.line(0, features, out)
            best = min(files, key=lambda i: line[f"G{i}"])
            each = "  ".join(f"G{i} {line[f'G{i}']:.2f}" for i in files)
            say(f"{out} has no scores; made now, {line['samples']} images of each group against {line['reals']} real "
                f"ones, {line['score']}{note}: {each}; best is G{best}.")
    best = ranks.first(best)
    return {best: files[best]}


def choose_features(s):
    """Set s.fid_features, which a run without --fid-every has never tried -> a note where they are not what was set."""
    fid = okd_train.beside("fid", "scoring")
    if s.fid_every is None and s.fid_features == "inception":
        try:
            fid.find_weights(download=False)
        except fid.FidError:
            s.fid_features = "random"
            return " (random features, as there are no Inception weights here)"
    return ""


def read_generators(files, script, device, as_scored=False):
    """{i: path} -> {i: G_i in eval mode}, and what export.json says of them. UserError if a file changes meanwhile."""
    before = {path.name: okd_train.digest(path) for path in files.values() if path.is_file()}
    generators = {i: okd_train.load_generator(path, device, str(script.path), as_scored) for i, path in files.items()}
    groups = {f"G{i}": {"file": path.name, "step": okd_train.load_file(path)["step"],
                        "checkpoint": okd_train.digest(path)} for i, path in files.items()}
    if before != {of["file"]: of["checkpoint"] for of in groups.values()}:
        raise okd_train.UserError(f"{', '.join(before)} changed while being read: a training is at work there; "
                                  "give the command again")
    return generators, groups


# ---------------------------------------------------------------------------------------------- an image
def draw_chunk(G, seed, chunk, purpose, label, z_dim):
    """One forward -> uint8 (CHUNK, H, W, 3); always whole, as a row's last bits depend on the rows beside it."""
    z = okd_train.draw(seed, chunk, 0, purpose, "normal", (okd_train.CHUNK, z_dim))
    return okd_train.generate(G, z, None if label is None else torch.full((okd_train.CHUNK,), label))


def redraw(run, row, model=None, device="cpu"):
    """The image of one row of an export's manifest, drawn anew: uint8 (H, W, 3), from an export on the CPU bit for bit.

    run: the run folder; row: a dict as csv.DictReader gives it; model names the script where it moved. Bits want the
    same version of torch and number of threads. okd_train.UserError where the row is none of ours, or its generator is
    not in the run (training went on).
    """
    try:
        seed, chunk, zero, purpose, k = row["z"].split("/")
        seed, chunk, k, group = int(seed), int(chunk), int(k), int(row["group"].removeprefix("G"))
        wanted, name = row["checkpoint"], name_in(row["class"])
        ours = purpose in ("fid", f"sample {name}")
        if zero != "0" or not ours or min(seed, chunk) < 0 or not 0 <= k < okd_train.CHUNK:
            raise ValueError
    except (KeyError, ValueError, AttributeError, TypeError) as e:
        raise okd_train.UserError(f"{row} is not a row of a manifest of sample.py") from e
    paths = [Path(run) / f"G{group}.pt", Path(run) / f"G{group}.best.pt"]
    path = next((p for p in paths if p.is_file() and okd_train.digest(p) == wanted), None)
    if path is None:
        raise okd_train.UserError(f"{row.get('file')}: neither {paths[0]} nor {paths[1].name} is its generator, "
                                  f"checkpoint {wanted}; training went on, or it is another run")
    return redrawn(path, wanted, seed, chunk, purpose, name, model, device)[k].copy()


@functools.lru_cache(maxsize=2)
def redrawn(path, wanted, seed, chunk, purpose, name, model, device):
    """The whole chunk of an image: kept, as the next row of a manifest mostly lies in it. wanted: the file's digest."""
    G, d = okd_train.load_generator(path, device, model, purpose == "fid"), okd_train.load_file(path)
    if (name not in d["classes"]) if d["classes"] else name:
        raise okd_train.UserError(f"{path} knows no class {name!r}")
    if purpose == "fid":
        of_classes = {"n_classes": len(d["classes"])} if d["classes"] else {}
        settings = argparse.Namespace(seed=seed, z_dim=d["z_dim"], **of_classes)
        return okd_train.generate(G, *okd_train.chunk_of_inputs(settings, chunk, "fid"))
    label = d["classes"].index(name) if name else None
    return draw_chunk(G, seed, chunk, f"sample {name}", label, d["z_dim"])


# ---------------------------------------------------------------------------------------------- the folder
def whole(path):
    """Whether a file is complete: only then it has its name, but a power cut may leave it empty."""
    return path.is_file() and path.stat().st_size > 0


def save_whole(a, path):
    """uint8 (H, W, 3) -> .png, or (n, H, W, 3) -> .npy."""
    with okd_train.replacing(path, sync=False) as f:
        if path.suffix == ".png":
            Image.fromarray(a).save(f, "PNG", compress_level=1)
        else:
            np.save(f, a)


def refuse_full(target):
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise okd_train.UserError(f"{target} is not empty; move it away, or name another folder with --to")


def open_folder(target, partial, plan):
    """Make the hidden folder in which an export grows, or refuse the one that is there if it has another plan."""
    with okd_train.writing(target):
        refuse_full(target)
        if os.path.lexists(target):
            target.rmdir()                                          # now: shows that it can be replaced at the end
        if partial.exists() and all(p.name.startswith(".") for p in partial.iterdir()):
            shutil.rmtree(partial)                                  # killed before export.json stood
        if not partial.exists():
            partial.mkdir(parents=True)
            okd_train.save_json(plan, partial / "export.json")
            return
    try:
        old = json.loads((partial / "export.json").read_text())
        other = ", ".join(k for k in sorted({*old, *plan}) if old.get(k) != plan.get(k))
    except (OSError, ValueError, AttributeError, TypeError):
        other = "unreadable"
    if other:
        raise okd_train.UserError(f"{partial} holds an unfinished export with other settings ({other}): "
                                  "give its own command to finish it, or delete that folder")


def pack(paths, labels, group, classes, target):
    """Chunks (.npy) -> .npz of arr_0 uint8 (n, H, W, 3), labels int64 (n,), classes, group; one chunk is in memory."""
    shape = (len(labels), *np.load(paths[0]).shape[1:])
    others = {"labels": np.array(labels if classes else [], np.int64), "classes": np.array(classes, str),
              "group": np.array(group)}
    with okd_train.replacing(target) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as a:
            np.lib.format.write_array_header_1_0(a, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for path in paths:
                a.write(np.load(path).tobytes())
        for name, value in others.items():
            with archive.open(f"{name}.npy", "w") as a:
                np.lib.format.write_array(a, value, allow_pickle=False)


def cell(name):
    """A class's name as a cell that no spreadsheet takes for a formula: an apostrophe stands before =1+1, -x, @x."""
    return f"'{name}" if name.lstrip("'").startswith(FORMULA) else name


def name_in(cell):
    """The name that cell() was given."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA) else cell


def write_manifest(plan, counts, labels, classes, path):
    """A row per image: file (PNG, or G1.npz#row of arr_0), group, class, z (of draw, then the row), checkpoint."""
    with okd_train.replacing(path) as f:
        text = io.TextIOWrapper(f, "utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("file", "group", "class", "z", "checkpoint"))
        for group, of in plan["groups"].items():
            for at, (place, k) in enumerate((name, k) for name, _, n in counts for k in range(n)):
                folder = f"{group}/{place}" if place else group
                file = f"{group}.npz#{at}" if plan["npz"] else f"{folder}/{k:06d}.png"
                chunk, row = divmod(k, okd_train.CHUNK)
                name = classes[labels[at]] if classes else ""
                purpose = "fid" if "scored" in plan else f"sample {name}"
                table.writerow((file, group, cell(name), f"{plan['seed']}/{chunk}/0/{purpose}/{row}", of["checkpoint"]))
        text.flush()
        text.detach()


# ---------------------------------------------------------------------------------------------- command line
def arguments(argv):
    """argv -> Namespace, its values checked as far as that needs no run. UserError."""
    def count(text):
        if natural(text) is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MOST}")
        return natural(text)

    Parser = okd_train.Parser if okd_train else argparse.ArgumentParser
    p = Parser("sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("run", metavar="RUN", help="run folder of okd_train.py")
    p.add_argument("n", metavar="N", nargs="?", type=count, help="images of each group, its classes evenly")
    p.add_argument("--per-class", metavar="N|CLASS=N,...",
                   help="in place of N: exactly so many images of every class, or of these classes, of each group")
    p.add_argument("--scored", action="store_true",
                   help="in place of N: the images that fid.jsonl's score of these generators was made of, all classes "
                        "in turn; fid.py then gives that score again")
    p.add_argument("--group", default="all", metavar="all|best|1,3",
                   help="whose images; best: the group and step with the lowest score (default all)")
    p.add_argument("--to", metavar="DIR", help="empty or new folder for the images (default RUN/fakes)")
    p.add_argument("--npz", action="store_true", help="a file G1.npz, ... of each group in place of PNGs")
    p.add_argument("--model", metavar="FILE.py", help="the model script, where it is not where it was in training")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: as in training)")
    p.add_argument("--nproc", type=count, metavar="K",
                   help="processes to start (default: one per GPU, at most one per group; 1 forbids)")
    argv = [re.sub("^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in argv]
    args = p.parse_intermixed_args(argv)                            # N may come after flags
    for name, value in vars(args).items():
        if value == "":
            raise okd_train.UserError(f"{'RUN' if name == 'run' else okd_train.flag(name)} is empty")
    if args.scored and (args.n is not None or args.per_class is not None):
        raise okd_train.UserError("--scored takes as many images as were scored: leave N and --per-class out")
    if args.n is None and args.per_class is None and not args.scored:
        raise okd_train.UserError("how many images? Give N after RUN, or --per-class (--help lists the flags)")
    return args


def run(argv):
    args = arguments(argv)
    s, script, saved = okd_train.read_run(args.run, args.model)
    s.device, s.nproc, s.quick = args.device or s.device, args.nproc, False
    okd_train.check_limits(s, script)
    n = okd_train.processes(s)
    if n > 1:
        print(f"Starting {n} processes on this machine (--nproc 1 forbids).", flush=True)
        device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
        okd_train.launch(n, __file__, argv, device, "the same command goes on")
    else:
        export(args, s, script, saved)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if okd_train is None:
        if {"-h", "--help"} & set(argv):
            arguments(argv)
        print("sample.py: error: drawing from a run needs okd_train.py beside sample.py", file=sys.stderr)
        raise SystemExit(2)
    okd_train.guarded("sample.py", lambda: run(argv))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    main() if okd_train is None else okd_train.as_program(main)
