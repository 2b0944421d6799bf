"""Cut labelled training crops from photos with boxes: CODEBRIM, or your own photos labelled as VOC, YOLO or COCO.

    python crop_codebrim.py original_dataset/ crops/                    # 2642 crops of 64x64, a folder per class
    python crop_codebrim.py original_dataset/ crops/ --window box --label single --balance --sheet sheet.png
    python crop_codebrim.py original_dataset/ crops/ --split train=0.8,val=0.1,test=0.1       # by photo
    python synthetic.py original_dataset/                               # no data yet: render a small data set

The folder holds photos and, anywhere in it, what a labelling program exports, in one of these forms (--boxes):

    voc    NAME.xml for NAME.jpg; the classes are CODEBRIM's <Defect> flags where there are some, else <name>
    yolo   NAME.txt for NAME.jpg, boxes or polygons; names from data.yaml or classes.txt, else the numbers are the names
    coco   one .json for many photos, boxes or polygons
    CODEBRIM's classification set: its ready-made crops are cropped further, its own splits are kept

An annotation is of the nearest photo of its name: in its own folder, beside it (images/ and labels/, site1/JPEGImages/
and site1/Annotations/), else where the name is the only one. Several annotations of a photo are joined. Written are
crops/<class>/<photo>_<box>_<x>_<y>.png, crops.csv with the place and all labels of every crop, and skipped.csv with all
that could not be used. The folder appears whole or not at all; where too few windows exist, crops.skipped.csv appears
beside it. The photos are never written to, and the same seed gives the same bytes. okd_train.py trains on the folder.

Crops show stored pixels, as CODEBRIM's annotators saw them, unless --upright turns them after the cut. Boxes that were
drawn on the picture as its EXIF turns it are turned back where the size in the annotation tells; --exif says it where
nothing does. Files are read as fid.py and okd_train.py read them: of several frames the first, of transparent pixels
the colour stored beneath, of colours of 16 bits the upper 8, as Pillow gives no more. Left out, counted and named,
never guessed: boxes that end before they begin, lie outside the photo, have no class or flag; photos that are
truncated, empty, smaller than a crop, too large for Pillow's limit, of a type that is not read or of another size than
their annotation says; annotations that fit several photos; XML with a DOCTYPE; crowds and run-length masks. A run
killed with SIGKILL leaves a hidden folder .crops.*.partial beside the target; delete it.

With --split, train on one part and score against another that shares no photo with it (byte-identical copies, and
Roboflow's versions NAME.rf.HASH.jpg, count as one photo; a photo that was saved anew does not):

    python okd_train.py --model sagan --groups 3 --data crops/train --fid-data crops/test

As a library:

    from crop_codebrim import read_annotations, crops
    photos, skipped = read_annotations("original_dataset")
    for row, image in crops(photos, n=100):            # row: a dict, the line of crops.csv; image: uint8 (64, 64, 3)

CODEBRIM (doi 10.5281/zenodo.2620293) is for non-commercial research and education; crops of it must not be passed on.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while numpy is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import numpy as np
from PIL import Image, ImageDraw

BACKGROUND = "Background"
MAX_TEXT, MAX_JSON = 16 * 2 ** 20, 2 ** 30                      # bytes; CODEBRIM's largest annotation is about 30 kB
COLUMNS = ["file", "photo", "box", "x", "y", "side"]            # then one column per flag, then class and split
EFFECTS = ("photo whose annotation cannot be used", "photo without a usable box")      # reasons that follow from others
CHOICES = {"window": ("native", "box"), "label": ("rarest", "single", "random"), "small": ("around", "skip")}


class CropError(Exception):
    """What the user can mend; one line."""


class TooFew(CropError):
    """Fewer windows exist than are wanted."""


class Unusable(Exception):
    """Why a file or box is left out, and which photos it might have been of."""

    def __init__(self, reason, names=()):
        super().__init__(reason)
        self.names = names


class Photo(NamedTuple):
    path: Path
    name: str                   # its place in the tree: "images/a.jpg"
    width: int                  # stored pixels
    height: int
    boxes: tuple                # of the Boxes that can be used
    taken: tuple                # (x0, y0, x1, y1) of everything marked as defect, usable or not
    certain: bool               # every mark has a place that could be read
    names: tuple                # all classes that the flags of its boxes name, set or not
    split: str = ""             # part of the set that it comes in, where the set has its own
    frame: str = ""             # "turned": its boxes were drawn as EXIF shows it; "unclear": nobody can know


class Box(NamedTuple):
    """Pixels x0 <= x < x1, y0 <= y < y1 of the stored photo."""

    index: int                  # place among the marks of the photo, from 0: the <object>s of its XML
    x0: int
    y0: int
    x1: int
    y1: int
    flags: tuple                # of sorted class names


class Claim(NamedTuple):
    """What one file says of one photo, whatever its format: every reader gives these."""

    source: str                 # name of the file in the tree
    filename: str = None        # of the photo, as the file gives it
    size: tuple = None          # of the photo (width, height), likewise
    marks: tuple = ()           # of Marks; none: a photo without any defect
    unit: str = "object"        # what the file calls a mark
    reason: str = None          # why the file cannot be read
    many: bool = False          # the file speaks of many photos: its own name is none of theirs
    fractions: bool = False     # places are fractions of the photo's width and height
    split: str = ""

    def where(self):
        return f"{self.source} image {self.filename}" if self.many else self.source


class Mark(NamedTuple):
    index: int                  # place in its file
    place: tuple = None         # x0, y0, x1, y1, half-open, from 0, whole unless fractions; None: unknown
    flags: tuple = ()           # classes as written
    named: tuple = ()           # all flags, set or not, where there are flags
    reason: str = None          # why it gives no box


class Skip(NamedTuple):
    what: str                   # "annotation", "photo", "box" or "folder"
    where: str
    reason: str


class Window(NamedTuple):
    photo: Photo
    box: Box                    # None: background
    x: int                      # first pixel, from 0
    y: int
    side: int                   # pixels of the stored photo
    label: str
    bucket: object              # the Bucket that it fills


# ---- the run ---------------------------------------------------------------------------------------------------------

def crop_folder(source, target, sheet=None, exif=None, boxes=None, **choices):
    """Cut `source` into the new folder `target` and print the closing table; exif and boxes as for read_annotations(),
    choices as for crops()."""
    source, target = Path(source), Path(target)
    check_places(source, target, sheet)
    photos, skipped = read_annotations(source, exif, boxes)
    started = time.monotonic()
    n_photos = len(photos) + sum(s.what == "photo" for s in skipped)
    with whole_or_not(target) as work, explained(skipped, target):
        rows, made, notes = [], set(), []
        progress = Progress("photos, {} crops")
        for row, image in crops(photos, skipped=skipped, progress=progress, notes=notes, **choices):
            path = work / row["file"]
            if path.parent not in made:
                path.parent.mkdir(parents=True, exist_ok=True)
                made.add(path.parent)
            Image.fromarray(image).save(path, compress_level=3)        # as small as level 6 here, in 2/3 of the time
            rows.append(row)
        rows.sort(key=lambda r: r["file"])
        fields = [*COLUMNS, *columns(photos).values(), "class", "split"]
        write_csv(work / "crops.csv", fields, [[r[f] for f in fields] for r in rows])
        write_csv(work / "skipped.csv", Skip._fields, skipped)
        if sheet and rows:
            save_sheet(draw_sheet(work, rows, len(image)), Path(sheet))
    for note in [*notes, *frame_notes(photos)]:
        print(note)
    print_table(rows, choices.get("split") or sorted({r["split"] for r in rows} - {""}))
    print_left_out(skipped, target / "skipped.csv")
    for s in skipped:
        if s.what == "photo" and not s.reason.startswith(("photo without", "photo smaller", "photo of a type")):
            print(f"crop_codebrim.py: {s.where}: {s.reason}", file=sys.stderr)
    if lost := sorted({n for p in photos for n in p.names} - {r["class"] for r in rows}):
        print(f"no crop is labelled {', '.join(lost)}: see --n, --balance, --label and --small")
    n_cut, n_out = len({r["photo"] for r in rows}), sum(s.what == "photo" for s in skipped)
    print(f"{n_photos} photos found: {n_cut} cropped, {n_photos - n_cut - n_out} not needed, {n_out} left out")
    print(f"{len(rows)} crops in {target}, {time.monotonic() - started:.1f} s")


@contextlib.contextmanager
def explained(skipped, target):
    """Where too few windows exist, nothing is cut: then what was left out, and why, is the only thing to be seen. It is
    printed and written beside `target`, and the commonest reason is added to the error."""
    try:
        yield
    except TooFew as e:
        if not skipped:
            raise
        table = Path(f"{os.path.realpath(target)}.skipped.csv")
        print_left_out(skipped, table)
        write_csv(f"{table}.partial", Skip._fields, skipped)
        os.replace(f"{table}.partial", table)
        (reason, n), = collections.Counter(s.reason for s in skipped if s.reason not in EFFECTS).most_common(1)
        raise TooFew(f"{e}; most were left out for this: {reason} ({n} of {len(skipped)}, all in {table})")


def crops(photos, n=2642, size=64, seed=0, window="native", label="rarest", balance=False, background=0, small="around",
          split=None, workers=1, skipped=None, progress=None, limits=None, upright=False, notes=None):
    """Yield (row, image) for n crops of boxes and `background` windows that touch no box.

    photos: what read_annotations gave, or a folder. row: dict with file (name below the output folder), photo, box
    (index of the <object>, "" for background), x, y, side (pixels of the stored photo, x and y from 0), one 0/1 per
    flag, class, split. image: uint8 (size, size, 3).

    window: "native" (side = size) or "box" (side uniform from half the box's shorter side to all of it, antialiased
    to size; boxes with a side under size as in native). label: "rarest", "single", "random". small: "around", "skip".
    split: {name: share}, by photo; photos that come in splits of their own stay in them. All windows are distinct in
    (photo, x, y). The result depends on seed and data only, not on workers. skipped: a list that gets a Skip for
    everything left out. progress: called with (photos done, photos in all, crops done). limits: (low, high), the
    numbers that are black and white in photos of 16 bits, 32 bits or floats; None: the least usual range that holds
    those of all. upright: turn crops as the EXIF of their photo says. notes: a list that gets lines on what is odd
    about the photos. Raises CropError, possibly after the first crops if damaged photos leave too few windows, and
    ValueError for bad arguments.
    """
    for name, value in (("window", window), ("label", label), ("small", small)):
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    no_share = split is not None and (not split or min(split.values()) <= 0)
    if n < 0 or background < 0 or size < 1 or seed < 0 or workers < 1 or no_share:
        raise ValueError("n, background and seed must be >= 0, size and workers >= 1, the shares of split > 0")
    skipped = [] if skipped is None else skipped
    if isinstance(photos, (str, os.PathLike)):
        photos, left_out = read_annotations(photos)
        skipped += left_out
    buckets = plan_buckets(photos, n, size, seed, window, label, balance, background, small, split, skipped)
    stems, names, folders = safe_stems(photos), columns(photos), class_folders(photos)
    rows, used, broken, seen = [], collections.defaultdict(set), set(), set()
    done = total = n_crops = 0
    declared, odd = limits is not None, collections.defaultdict(list)
    # threads: Pillow decodes, and zlib packs, outside the interpreter's lock
    with kept_blocks(7 * workers), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        rule = limits if declared else common_range(pool, photos), declared, upright
        while True:                     # a round more for the windows of photos that turn out to be broken
            before = len(rows)
            for b in sorted(buckets, key=lambda b: -b.scarcity):
                b.check(b.fill(rows, used, broken, seen), broken)
            todo = collections.defaultdict(list)
            for r in rows[before:]:
                todo[r.photo.name].append(r)
            if not todo:
                if notes is not None:
                    notes += reading_notes(odd, *rule)
                return
            total += len(todo)
            for name, (images, found) in cut_photos(pool, todo, size, workers, rule):
                for what, value in found.items() if name not in seen else ():
                    odd[what].append(value)
                seen.add(name)
                if isinstance(images, Unusable):
                    skipped.append(Skip("photo", name, str(images)))
                    broken.add(name)
                    rows = [r for r in rows if r.photo.name != name]
                    images = []
                for r, image in zip(todo[name], images):
                    n_crops += 1
                    yield row_of(r, stems[name], names, folders[r.label]), image
                done += 1
                if progress:
                    progress(done, total, n_crops)


def cut_photos(pool, todo, size, workers, rule):
    """Yield (photo name, what cut() gave, or (why it is Unusable, {})) for todo {photo name: windows}; threads decode
    ahead."""
    pixels = {name: windows[0].photo.width * windows[0].photo.height for name, windows in todo.items()}
    order = sorted(todo, key=lambda name: (-pixels[name], name))       # largest first: no worker ends late
    running = collections.deque()
    try:
        for i, name in enumerate(order):
            while len(running) < 2 * workers + 2 and i + len(running) < len(order):
                ahead = order[i + len(running)]
                running.append(pool.submit(cut, todo[ahead][0].photo, todo[ahead], size, rule))
            try:
                images = running.popleft().result()
            except Unusable as e:
                images = e, {}
            yield name, images
    finally:
        for future in running:
            future.cancel()


def cut(photo, windows, size, rule):
    """Decode a photo once -> (its windows as uint8 (size, size, 3) arrays, what is odd about it). Raises Unusable."""
    limits, declared, upright = rule
    with open_photo(photo.path) as image:
        if image.size != (photo.width, photo.height):
            raise Unusable("photo that changed meanwhile")
        try:
            limits, odd = examine(image, limits, declared)
            turn = odd.get("turned") if upright else None
            return [cut_one(image, w, size, limits, turn) for w in windows], odd
        except NoRange:
            raise Unusable("photo whose numbers fit no usual range (see --range)")
        except MemoryError:
            raise Unusable("photo too large for the memory")
        except Exception:                                              # Pillow's decoders raise nearly everything
            raise Unusable("photo that is truncated or damaged")


def cut_one(image, w, size, limits, turn):
    crop = to_rgb(image.crop((w.x, w.y, w.x + w.side, w.y + w.side)), limits, turn)
    if w.side != size:
        crop = crop.resize((size, size), Image.Resampling.LANCZOS)     # Pillow's filters antialias
    return np.array(crop)


def common_range(pool, photos):
    """What is black and white in the photos of more than 8 bits; None where there are none."""
    def look(photo):
        try:
            with open_photo(photo.path) as image:
                if is_deep(image):
                    found = extent(image)
                    usual_range([found])
                    return found
        except Exception:                                              # said where it is cut
            return None
    extents = list(filter(None, pool.map(look, photos)))
    try:
        return usual_range(extents) if extents else None
    except NoRange as e:
        raise CropError(str(e))


@contextlib.contextmanager
def kept_blocks(blocks):
    """Let Pillow keep that many freed blocks of 16 MB for the next photo (24 megapixels take six): else the kernel
    hands out and clears the same memory anew for each photo, which costs 5 to 9 % of the processor time."""
    before = Image.core.get_blocks_max()
    Image.core.set_blocks_max(max(blocks, before))
    try:
        yield
    finally:
        Image.core.set_blocks_max(before)


def row_of(r, stem, names, folder):
    """The line of crops.csv of a window."""
    box, flags = (r.box.index, r.box.flags) if r.box else ("", (BACKGROUND,))
    file = f"{stem}_{'bg' if r.box is None else box}_{r.x}_{r.y}.png"
    file = "/".join(part for part in (r.bucket.split, folder, file) if part)
    row = dict(file=file, photo=r.photo.name, box=box, x=r.x, y=r.y, side=r.side)
    row.update((column, int(flag in flags)) for flag, column in names.items())
    row.update({"class": r.label, "split": r.bucket.split})
    return row


# ---- choosing windows ------------------------------------------------------------------------------------------------
# All choices are made here, in one thread, from numbers keyed by (seed, purpose): workers only decode and cut.

def plan_buckets(photos, n, size, seed, window, label, balance, background, small, split, skipped):
    """Buckets to be filled, each with windows enough; what the choices exclude is appended to skipped."""
    count = collections.Counter(f for p in photos for b in p.boxes for f in b.flags)
    rarity = {f: (count[f], f) for f in count}
    large, sources = list_sources(photos, size, window, label, small, rarity, skipped)
    if split and any(p.split for p in photos):
        raise CropError("these photos come in splits of their own, which are kept: leave --split away")
    parts = assign_splits(large, split, rarity, seed) if split else {p.name: p.split for p in large}
    wanted = split or collections.Counter(s.photo.split for s in sources) or {"": 1}
    classes = sorted({c for s in sources for c in s.labels}) if balance else [None]
    buckets = []
    for c, n_class in zip(classes, shares(n, [1] * len(classes))):
        for part, n_part in zip(wanted, shares(n_class, wanted.values())):
            pool = [s for s in sources if parts[s.photo.name] == part and (c is None or c in s.labels)]
            buckets.append(Bucket(part, c, n_part, pool, Dice(seed, key("boxes"), key(c or ""), key(part))))
    if n and not any(b.want and b.sources for b in buckets):
        raise TooFew(f"{n} windows wanted, 0 exist: no box is usable")
    if background:
        sides = [s.sides for s in sources] or [(size, size)]
        wanted = split or collections.Counter(p.split for p in large if p.certain) or {"": 1}
        for part, n_part in zip(wanted, shares(background, wanted.values())):
            pool = [Source(p, None, (BACKGROUND,), size, sides) for p in large if p.certain and parts[p.name] == part]
            buckets.append(Bucket(part, BACKGROUND, n_part, pool, Dice(seed, key("background"), key(part))))
    for b in buckets:
        b.check(b.exist)
    return buckets


def list_sources(photos, size, window, label, small, rarity, skipped):
    """(photos large enough for a crop, a Source for each of their boxes that the choices admit)."""
    large, sources = [], []
    for p in photos:
        if min(p.width, p.height) < size:
            skipped.append(Skip("photo", p.name, f"photo smaller than {size}"))
            continue
        large.append(p)
        for b in p.boxes:
            short = min(b.x1 - b.x0, b.y1 - b.y0)
            if small == "skip" and short < size:
                skipped.append(Skip("box", f"{p.name} box {b.index}", f"box with a side under {size} (--small skip)"))
            elif label == "single" and len(b.flags) > 1:
                skipped.append(Skip("box", f"{p.name} box {b.index}", "box of several classes (--label single)"))
            else:
                sides = ((short + 1) // 2, short) if window == "box" and short >= size else (size, size)
                labels = b.flags if label == "random" else (min(b.flags, key=rarity.get),)
                sources.append(Source(p, b, labels, size, sides))
    return large, sources


class Bucket:
    """Crops wanted of one split and, where the classes are asked for separately, one class."""

    def __init__(self, split, label, want, sources, dice):
        self.split, self.label, self.want, self.sources, self.dice = split, label, want, sources, dice
        self.queue = collections.deque(dice.shuffled(sources))
        self.exist = count_windows(sources)
        self.scarcity = want / max(1, self.exist)

    def check(self, have, broken=()):
        """Raise CropError unless `have` windows are enough."""
        if have >= self.want:
            return
        kind = f"windows of class {self.label}" if self.label else "windows"
        if self.label == BACKGROUND:
            kind = "windows without a defect"
        where = f" in split {self.split}" if self.split else ""
        lost = f" ({len(broken)} damaged photos left out)" if broken else ""
        raise TooFew(f"{self.want} {kind}{where} wanted, {have} distinct ones exist{lost}: "
                     "lower --n or --background, or change the choices")

    def fill(self, rows, used, broken, seen):
        """Append rows until the bucket is full or empty of windows: every source once before any gives its second.
        Returns how many rows are its own."""
        usable = [s for s in self.queue if s.photo.name not in broken]
        self.queue = collections.deque(sorted(usable, key=lambda s: s.photo.name in seen))     # not decoded yet: first
        have = sum(r.bucket is self for r in rows)
        while have < self.want and self.queue:
            source = self.queue.popleft()
            window = source.draw(self.dice, used[source.photo.name])
            if window is None:
                continue
            x, y, side = window
            used[source.photo.name].add((x, y))
            labels = [self.label] if self.label else source.labels
            label = labels[0] if len(labels) == 1 else self.dice.shuffled(labels)[0]
            rows.append(Window(source.photo, source.box, x, y, side, label, self))
            have += 1
            self.queue.append(source)
        return have


class Source:
    """Where crops come from: a box and the labels its crops may get, or (box None) what of a photo touches no defect.

    sides: (least, most) side of a window; for box None a list of them, the defects' own: another scale would give the
    class away.
    """

    def __init__(self, photo, box, labels, size, sides):
        self.photo, self.box, self.labels, self.size, self.sides = photo, box, labels, size, sides
        self.least = sides[0] if box else size
        self.left = None                # its unused windows of that side, listed when few are left

    def starts(self, side):
        """x_first, x_last, y_first, y_last of the windows of that side."""
        p, b = self.photo, self.box
        if b is None:
            return 0, p.width - side, 0, p.height - side
        return *span(b.x0, b.x1, side, p.width), *span(b.y0, b.y1, side, p.height)

    def blocked(self, side):
        """Rectangles of starts (x0, y0, x1, y1) whose window would touch a defect."""
        return [] if self.box else [(a - side + 1, b - side + 1, c, d) for a, b, c, d in self.photo.taken]

    def tries(self, dice):
        if self.box:
            for _ in range(40):
                yield dice.integer(*self.sides)
            return
        side = min(dice.integer(*self.sides[dice.integer(0, len(self.sides) - 1)]), self.photo.width, self.photo.height)
        while True:                                                    # a large window may find no place: halve it
            side = max(side, self.size)
            for _ in range(40):
                yield side
            if side == self.size:
                return
            side //= 2

    def draw(self, dice, used):
        """One (x, y, side) whose (x, y) is not in `used`; None when there is none left."""
        for side in self.tries(dice) if self.left is None else ():
            x0, x1, y0, y1 = self.starts(side)
            x, y = dice.integer(x0, x1), dice.integer(y0, y1)
            if (x, y) not in used and not any(a <= x < c and b <= y < d for a, b, c, d in self.blocked(side)):
                return x, y, side
        side = self.least                                              # nearly full: list what is left, once
        x0, x1, y0, y1 = self.starts(side)
        if self.left is None:
            free = np.ones((y1 - y0 + 1, x1 - x0 + 1), bool)
            for a, b, c, d in self.blocked(side):
                free[max(b - y0, 0):max(d - y0, 0), max(a - x0, 0):max(c - x0, 0)] = False
            for x, y in used:
                if x0 <= x <= x1 and y0 <= y <= y1:
                    free[y - y0, x - x0] = False
            self.left = dice.shuffled(np.flatnonzero(free))
        while self.left.size:
            y, x = divmod(int(self.left[-1]), x1 - x0 + 1)
            self.left = self.left[:-1]                                 # a view
            if (x + x0, y + y0) not in used:
                return x + x0, y + y0, side
        return None


def span(a, b, side, limit):
    """First and last start of a window of `side` on an axis of `limit` pixels: inside a..b where that is long enough,
    else covering it. Always inside the photo, side <= limit."""
    return (a, b - side) if b - a >= side else (max(0, b - side), min(a, limit - side))


def count_windows(sources):
    """Number of distinct (photo, x, y) that these sources can give."""
    by_photo = collections.defaultdict(list)
    for s in sources:
        by_photo[s.photo.name].append(s)
    total = 0
    for group in by_photo.values():
        rectangles = []
        for s in group:
            x0, x1, y0, y1 = s.starts(s.least)
            if s.box:
                rectangles.append((x0, y0, x1 + 1, y1 + 1))
            else:
                blocked = s.blocked(s.least)
                clipped = [(max(a, 0), max(b, 0), min(c, x1 + 1), min(d, y1 + 1)) for a, b, c, d in blocked]
                total += (x1 + 1) * (y1 + 1) - area(clipped)
        total += area(rectangles)
    return total


def area(rectangles):
    """Number of integer points in a union of half-open rectangles (x0, y0, x1, y1)."""
    rectangles = [r for r in rectangles if r[0] < r[2] and r[1] < r[3]]
    xs = sorted({v for r in rectangles for v in (r[0], r[2])})
    ys = sorted({v for r in rectangles for v in (r[1], r[3])})
    grid = np.zeros((len(ys), len(xs)), bool)
    for x0, y0, x1, y1 in rectangles:
        grid[ys.index(y0):ys.index(y1), xs.index(x0):xs.index(x1)] = True
    return sum((ys[j + 1] - ys[j]) * (xs[i + 1] - xs[i]) for j, i in np.argwhere(grid).tolist())


def assign_splits(photos, split, rarity, seed):
    """{photo name: split}. Photos go one by one to the split that lacks most, the rarest classes first, so that each
    split gets its share of every class as far as whole photos allow. Byte-identical photos stay together, and so do
    Roboflow's versions of one (NAME.rf.HASH.jpg)."""
    size = {p.name: os.path.getsize(p.path) for p in photos}
    alike = collections.Counter(size.values())
    leader, content, twins = {}, {}, collections.defaultdict(list)

    def first(mark):
        while leader.setdefault(mark, mark) != mark:
            mark = leader[mark]
        return mark
    for p in photos:                                                   # only files of one size are read
        alone, version = alike[size[p.name]] == 1, re.match(r"(.+)\.rf\.", p.name)
        content[p.name] = p.name if alone else hashlib.sha256(p.path.read_bytes()).hexdigest()
        leader[first(content[p.name])] = first(version[1] if version else content[p.name])
    for p in photos:
        twins[first(content[p.name])].append(p)
    groups = Dice(seed, key("split")).shuffled(list(twins.values()))
    rarest = lambda group: min((rarity[f] for p in group for b in p.boxes for f in b.flags), default=(math.inf, ""))
    groups.sort(key=rarest)
    have, whole, done, out = dict.fromkeys(split, 0), sum(split.values()), 0, {}
    for k, group in enumerate(groups):
        done += len(group)
        empty = [s for s in split if not have[s]]
        open_to = empty if len(groups) - k <= len(empty) else split    # no part goes without while there are photos
        target = max(open_to, key=lambda s: (split[s] / whole * done - have[s], split[s]))
        have[target] += len(group)
        out.update((p.name, target) for p in group)
    return out


def shares(n, weights):
    """n as integers in proportion to weights, by largest remainder (ties to the first)."""
    total = sum(weights)
    exact = [n * w / total for w in weights]
    out = [math.floor(e + 1e-9) for e in exact]
    for i in sorted(range(len(weights)), key=lambda i: out[i] - exact[i])[:n - sum(out)]:
        out[i] += 1
    return out


class Dice:
    """Uniform numbers from the raw 64-bit words of PCG64, keyed by non-negative integers. NumPy promises these words
    on every platform and in every version; it promises no such thing for Generator's distributions."""

    def __init__(self, *key):
        self.bits = np.random.PCG64(np.random.SeedSequence(key))

    def fork(self):
        """An independent Dice: however much is drawn from it, the draws of this one stay the same."""
        return Dice(int(self.bits.random_raw()))

    def array(self, *shape):
        """float32 of the given shape in [0, 1)."""
        words = self.bits.random_raw(math.prod(shape)) >> np.uint64(40)
        return (words.astype(np.float32) * np.float32(2.0 ** -24)).reshape(shape)

    def uniform(self, a=0.0, b=1.0):
        return a + (b - a) * ((int(self.bits.random_raw()) >> 11) * 2.0 ** -53)

    def integer(self, a, b):
        """An integer of a..b, both included."""
        return a + int(self.bits.random_raw()) % (b - a + 1)

    def chance(self, p):
        return self.uniform() < p

    def shuffled(self, items):
        """The items of an array or list in random order."""
        order = np.argsort(self.bits.random_raw(len(items)), kind="stable")
        return items[order] if isinstance(items, np.ndarray) else [items[i] for i in order]


def key(text):
    """A number for a name, the same in every process."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_annotations(root, exif=None, boxes=None):
    """Read all annotations below root: (photos, skipped).

    photos: list of Photo sorted by name, each with a usable box or annotated as free of any; skipped: list of Skip,
    one of them for every other photo. Photos are opened for their size, not decoded. exif: "stored" or "turned", the
    pixels in which boxes lie where neither EXIF nor the size in the annotation tells; None: stored, and frame_notes()
    says so. boxes: "voc", "yolo" or "coco"; None: what lies there. Raises CropError if root holds no annotation at all,
    or several kinds of them.
    """
    root = Path(root)
    if not root.is_dir():
        unpack = "; unpack it first (7-Zip reads CODEBRIM's archives where others fail)"
        raise CropError(f"{root}: no such folder{unpack if root.suffix.lower() == '.zip' else ''}")
    files, skipped = walk(root)
    pictures = Pictures(files)
    skipped += [Skip("photo", n, f"photo of a type that is not read: {t}") for n, t in pictures.unread.items()]
    claims = read_claims(root, files, pictures, boxes)
    owned, doubtful = pictures.share_out(claims, skipped)
    spelling = settle_classes(claims)
    stems = {folded(Path(name).stem) for name in owned}
    photos = []
    for name, path in pictures.paths.items():
        try:
            if name not in owned and name in doubtful:
                raise Unusable(EFFECTS[0])
            if name not in owned:
                known = folded(Path(name).stem.split("_-_")[0]) in stems        # NAME_-_1.png: CODEBRIM's copies
                raise Unusable("photo without annotation" + " of its own (a mask, a drawing or a copy?)" * known)
            photo, skips = read_photo(name, path, owned[name], exif, spelling, name not in doubtful)
            skipped += skips
            if not photo.boxes and any(claim.marks for claim in owned[name]):
                raise Unusable(EFFECTS[1])
            photos.append(photo)
        except Unusable as e:
            skipped.append(Skip("photo", name, str(e)))
    return photos, skipped


def read_claims(root, files, pictures, boxes):
    """The claims of the one format that lies below root."""
    readers = dict(classification=codebrim_claims, voc=voc_claims, yolo=yolo_claims, coco=coco_claims)
    found = {kind: list(reader(files, pictures)) for kind, reader in readers.items() if boxes in (None, kind)}
    found = {kind: claims for kind, claims in found.items() if claims}
    marked = [kind for kind, claims in found.items() if any(claim.marks for claim in claims)] or list(found)[:1]
    if len(marked) > 1:
        counts = " and ".join(f"{kind} ({len(found[kind])} photos)" for kind in marked)
        raise CropError(f"{root}: holds boxes as {counts}: name a folder of one kind, or --boxes voc, yolo or coco")
    if not marked:
        raise CropError(nothing_found(root, files, pictures, boxes))
    return found[marked[0]]


def nothing_found(root, files, pictures, boxes):
    """What the user is told where no annotation is: what lies there instead."""
    stem = lambda name: folded(Path(name).stem)
    count = collections.Counter(map(stem, pictures.paths))
    masks = [n for n in pictures.paths if MASK_FOLDER.search(folded(os.path.dirname(n)))
             or re.search("[_-](mask|gt|label|seg)s?$", stem(n))] or [n for n in pictures.paths if count[stem(n)] > 1]
    n_json = sum(path.suffix.lower() == ".json" for _, path in files)
    hint = f"expected NAME.xml or NAME.txt for NAME.jpg, or COCO's .json; {len(pictures.paths)} photos are there"
    if masks:
        hint = (f"only masks ({masks[0]}), from which no boxes are read: let the labelling program export boxes or "
                "polygons as VOC, YOLO or COCO")
    elif n_json:
        hint = f"its {n_json} .json are not COCO's: let the labelling program export VOC, YOLO or COCO"
    elif pictures.folders - {()}:
        hint += "; folders of classes need no boxes: okd_train.py --data takes them as they are"
    sought = dict(voc=".xml files", yolo="YOLO .txt", coco="COCO .json")
    return f"{root}: no {sought.get(boxes, '.xml files, YOLO .txt or COCO .json')} in it; {hint}"


def read_photo(name, path, claims, exif, spelling, certain):
    """(Photo, skips) from all that its annotations say; raises Unusable."""
    if all(claim.reason for claim in claims):
        raise Unusable(EFFECTS[0])
    with open_photo(path) as photo:
        width, height = photo.size
        turn = orientation(photo)
        other = photo.format == "TIFF" and turn != 1    # Pillow loads it turned: of its pixels the stored are turned
        if other:
            turn, exif = {6: 8, 8: 6}.get(turn, turn), {"stored": "turned", "turned": "stored"}.get(exif)
    boxes, taken, names, skips, frame, n = {}, [], set(), [], "", -1
    certain = certain and not any(claim.reason for claim in claims)    # else a defect lies nobody knows where
    for claim in claims:
        turned = is_turned(claim.size, (width, height), turn, exif)
        for mark in claim.marks:
            n += 1
            frame = {None: "unclear", not other: "turned"}.get(turned, frame)
            turned = other if turned is None else turned
            try:
                if mark.place is None:
                    certain = False
                    raise Unusable(mark.reason)
                w, h = (height, width) if turned and turn >= 5 else (width, height)
                x0, y0, x1, y1 = mark.place
                shown = pixels(x0 * w, y0 * h, x1 * w, y1 * h) if claim.fractions else mark.place
                x0, y0, x1, y1 = place = stored(shown, width, height, turn if turned else 1)
                if x1 <= x0 or y1 <= y0:
                    raise Unusable("box outside its photo")
                taken.append(place)                                    # even if nobody can say by which defect
                if mark.reason:
                    raise Unusable(mark.reason)
                flags = {spelling[flag] for flag in mark.flags}
                if None in flags:
                    raise Unusable("box without <Defect>, whose name is none of the set's flags")
                if flags == {BACKGROUND}:
                    taken.pop()
                    raise Unusable("box of Background (see --background)")
                names.update(spelling[flag] for flag in mark.named or mark.flags)
                if place in boxes:                                     # an object per label: one box of several labels
                    flags.update(boxes[place].flags)
                    boxes[place] = boxes[place]._replace(flags=tuple(sorted(flags)))
                    raise Unusable("box given again (its labels joined to the first)")
                boxes[place] = Box(n, *place, tuple(sorted(flags)))
            except Unusable as e:
                skips.append(Skip("box", f"{claim.source} {claim.unit} {mark.index}", str(e)))
    boxes, names = tuple(boxes.values()), tuple(sorted(names))
    return Photo(path, name, width, height, boxes, tuple(taken), certain, names, claims[0].split, frame), skips


def is_turned(said, size, turn, exif):
    """Whether the boxes of a photo of `size` lie in the pixels that EXIF's `turn` shows, None where nobody can know.
    said: the size in its annotation, or None. Raises Unusable if that is neither, give or take a pixel."""
    shown = size[::-1] if turn >= 5 else size
    fits = [said is None or max(abs(said[0] - w), abs(said[1] - h)) <= 1 for w, h in (size, shown)]
    if not any(fits):
        raise Unusable("photo whose size contradicts its annotation")
    if turn == 1:
        return False
    if shown != size and (said in (size, shown) or fits[0] != fits[1]):
        return said == shown or not fits[0]
    return {"stored": False, "turned": True}.get(exif)


def frame_notes(photos):
    """Lines for the user on boxes and EXIF."""
    n = collections.Counter(p.frame for p in photos)
    if n["turned"]:
        yield f"{n['turned']} photos have boxes in pixels of the picture as EXIF turns it; they were turned back"
    if n["unclear"]:
        yield (f"{n['unclear']} photos are turned by EXIF and nothing tells whether their boxes were drawn before or "
               "after that: read as before (--exif stored or --exif turned decides)")


def stored(place, width, height, turn):
    """x0, y0, x1, y1 of a box in stored pixels, clipped to the photo of width and height: empty if outside.
    turn: the EXIF orientation in whose shown pixels `place` lies, 1 for stored ones."""
    x0, y0, x1, y1 = place
    if turn >= 5:
        x0, y0, x1, y1 = y0, x0, y1, x1
    if turn in (2, 3, 7, 8):
        x0, x1 = width - x1, width - x0
    if turn in (3, 4, 6, 7):
        y0, y1 = height - y1, height - y0
    return max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)


def orientation(photo):
    """EXIF orientation of an opened photo, 1 where it says none; never decodes."""
    if photo.format == "PNG" and not {"exif", "Raw profile type exif"} & photo.info.keys():
        return 1                                                       # Pillow would decode all to look behind it
    try:
        turn = photo.getexif().get(0x0112)
    except Exception:                                                  # EXIF that is damaged turns nothing
        return 1
    return turn if turn in TURNS else 1


def settle_classes(claims):
    """{class as written: as used}: spellings that differ in case alone are one, the commonest. None where some objects
    have <Defect> flags and others a name that is none of them: a placeholder such as "defect"."""
    count, flags, best = collections.Counter(), set(), {folded(BACKGROUND): BACKGROUND}
    for mark in (mark for claim in claims for mark in claim.marks):
        count.update(mark.named or mark.flags)
        flags.update(map(folded, mark.named))
    for name in sorted(count, key=lambda name: (-count[name], name)):
        best.setdefault(folded(name), name)
    return {name: best[folded(name)] if not flags or folded(name) in flags else None for name in count}


def walk(root):
    """All files below root as (relative POSIX name, path), sorted, without __MACOSX, "._*" and other hidden names; then
    a Skip for each folder that may not be read."""
    found, skips, seen = [], [], set()

    def unreadable(error):
        place = Path(error.filename).relative_to(root).as_posix()
        skips.append(Skip("folder", place, "folder that may not be read"))

    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:                                               # a link that leads back up
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(d for d in folders if d != "__MACOSX" and not d.startswith("."))
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():            # a pipe would block for ever
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found), skips


# ---- which photo an annotation is of ---------------------------------------------------------------------------------

# Names of folders that say what lies in them, not where: the rest of a path is compared.
PICTURE_FOLDER = re.compile(r"((images?|imgs?|jpe?gs?|pngs?|photos?|fotos?|pictures?|pics?|rgb|originals?|files?)"
                            r"[ _-]*)+")
LABEL_FOLDER = re.compile(r"((labels?|annot(ation)?s?|annos?|anns?|xmls?|txts?|jsons?|voc|yolo|coco|bbox(es)?|boxes|"
                          r"metadata|files?)[ _-]*)+")
MASK_FOLDER = re.compile(r"mask|segment|visuali|trimap|overlay|preview|ground.?truth|(^|[^a-z])(gt|vis|seg)($|[^a-z])")


class Pictures:
    """The pictures of a tree, to be found by names; names are looked up, never opened."""

    def __init__(self, files):
        kinds = [(name, path, path.suffix.lower()) for name, path in files]
        self.paths = {name: path for name, path, kind in kinds if kind in IMAGE_TYPES}
        self.unread = {name: kind[1:] for name, _, kind in kinds if kind in UNREAD_TYPES}
        self.folders = {tuple(name.split("/")[:-1]) for name in self.paths}
        self.names, self.stems = collections.defaultdict(list), collections.defaultdict(list)
        for name in [*self.paths, *self.unread]:
            file = folded(name.rpartition("/")[2])
            self.names[file].append(name)
            self.stems[os.path.splitext(file)[0]].append(name)

    def share_out(self, claims, skipped):
        """({photo name: its claims}, names of photos that further annotations may be of); skipped gets the others."""
        owned, doubtful = collections.defaultdict(list), set()
        for claim in claims:
            try:
                if claim.reason:
                    skipped.append(Skip("annotation", claim.where(), claim.reason))
                owned[self.find(claim)].append(claim)
            except Unusable as e:
                doubtful.update(e.names)
                if not claim.reason:
                    between = f" ({', '.join(e.names)})" if e.names else ""
                    skipped.append(Skip("annotation", claim.where() + between, str(e)))
        return owned, doubtful

    def find(self, claim):
        """The name of the claim's photo: the nearest of those called as its file, else of those that it names."""
        folder, file = os.path.split(claim.source)
        stem = os.path.splitext(file)[0]
        path = (claim.filename or "").replace("\\", "/").strip().lstrip("./")
        said = path.rpartition("/")[2]
        mine, other = [] if claim.many else self.look(stem), self.look(said)
        exact = [name for name in other if f"/{folded(name)}".endswith(f"/{folded(path)}")]
        if claim.many and "/" in path and len(exact) == 1:             # an export that gives folders means them
            return exact[0]
        own, named = self.near(folder, mine), self.near(folder, other)
        alien = folded(Path(said).stem) not in (folded(stem), folded(Path(stem).stem))     # more than another suffix
        if own and named and alien and Path(said).suffix.lower() in IMAGE_TYPES and not set(own) & set(named):
            raise Unusable("annotation that names another photo than the one called like it", own + named)
        found = own or named
        for better in (lambda name: Path(name).stem == stem, lambda name: folded(Path(name).name) == folded(said)):
            if len({os.path.dirname(name) for name in found}) == 1 < len(found):
                found = [name for name in found if better(name)] or found
        if len(found) > 1 and claim.many:                              # instances_train.json: train/, not val/
            parts = {name: place_in(name) for name in found}
            found = [name for name in found if any(part in folded(stem) for part in parts[name])] or found
        if len(found) > 1 and self.alike(found):
            found = found[:1]
        if len(found) == 1 and found[0] in self.paths:
            return found[0]
        if len(found or mine or other) > 1:
            raise Unusable("annotation that fits several photos", found or mine or other)
        if found:
            raise Unusable(f"annotation of a photo of a type that is not read: {self.unread[found[0]]}")
        if mine or other:
            raise Unusable("annotation without a photo beside it (one of that name lies elsewhere)", mine or other)
        raise Unusable("annotation without a photo")

    def look(self, name):
        """All pictures of that file name, else of that stem; those that can be read, if there are any."""
        stem, kind = os.path.splitext(name)
        stem = stem if kind.lower() in IMAGE_TYPES + UNREAD_TYPES else name
        found = self.names.get(folded(name)) or self.stems.get(folded(stem)) or []
        return [name for name in found if name in self.paths] or found

    def near(self, folder, names):
        """Those of `names` that lie nearest to the annotations' folder; [] where all contradict it."""
        away = {name: self.distance(tuple(folder.split("/")) if folder else (), tuple(name.split("/")[:-1]))
                for name in names}
        least = min(away.values(), default=math.inf)
        return [name for name in names if away[name] == least < math.inf]

    def distance(self, here, there):
        """From a folder of annotations to one of pictures (tuples of parts): 0 the same, 1 beside it (site1/labels and
        site1/images), 2 in the same place of another tree (labels/train and images/train), 3 beside it under another
        name, 4 where one is named in less detail (labels and images/train), 9 more for pictures in a folder of labels;
        infinite for masks and for other places (s1/labels and s2/images)."""
        if here == there:
            return 0
        if any(MASK_FOLDER.search(folded(part)) for part in there if part not in here):
            return math.inf
        a, b = place_of(here), place_of(there)
        beside = bool(here and there) and here[:-1] == there[:-1]
        worse = 9 * bool(there and LABEL_FOLDER.fullmatch(folded(there[-1])))
        if a == b:
            return worse + (1 if beside else 2)
        if beside and here not in self.folders:
            return worse + 3
        return worse + 4 if set(a) <= set(b) or set(b) <= set(a) else math.inf

    def alike(self, names):
        """Whether these are byte-identical copies of one photo."""
        return len({hashlib.sha256(self.paths[n].read_bytes()).digest() if n in self.paths else n for n in names}) == 1


@functools.lru_cache
def place_of(folder):
    """The parts of a folder that say where, without those that say what: ("site1",) for site1/JPEGImages."""
    return tuple(p for p in map(folded, folder) if not PICTURE_FOLDER.fullmatch(p) and not LABEL_FOLDER.fullmatch(p))


def place_in(name):
    return place_of(tuple(name.split("/")[:-1]))


def folded(name):
    return unicodedata.normalize("NFC", name).casefold()              # macOS unpacks é as two characters


# ---- Pascal VOC, with CODEBRIM's <Defect> flags ----------------------------------------------------------------------

def voc_claims(files, pictures):
    """A Claim for every .xml."""
    for name, path in files:
        if path.suffix.lower() != ".xml":
            continue
        try:
            root = parse_xml(path)
            if root.tag != "annotation":
                raise Unusable("XML that is no VOC annotation")
            size, objects = root.find("size"), root.findall("object")
            known = any(root.find(tag) is not None for tag in ("filename", "folder", "path", "size"))
            if not objects and (not known or next(root.iter("bndbox"), None) is not None):
                raise Unusable("XML without objects that names no photo, or has boxes elsewhere")
            size = () if size is None else [value(child(size, tag)) or 0 for tag in ("width", "height")]
            left = [e for e in objects if child(e, "deleted") != "1"]  # LabelMe keeps what was deleted
            marks = tuple(voc_mark(i, element) for i, element in enumerate(left))
            yield Claim(name, child(root, "filename"), tuple(size) if size and min(size) > 0 else None, marks)
        except Unusable as e:
            yield Claim(name, reason=str(e))


def voc_mark(index, element):
    place = None
    try:
        xmin, ymin, xmax, ymax = map(rounded, voc_bounds(element))
        if xmax < xmin or ymax < ymin:
            raise Unusable("box that ends before it begins")
        place = xmin - 1, ymin - 1, xmax, ymax
        flags, named = read_flags(element)
        return Mark(index, place, flags, named)
    except Unusable as e:
        return Mark(index, place, reason=str(e))


def voc_bounds(element):
    """xmin, ymin, xmax, ymax of an <object>, 1-based and inclusive; of polygons and rotated boxes the outermost."""
    bounds = element.findall("bndbox")
    shape = next((found for found in map(element.find, ("polygon", "robndbox")) if found is not None), None)
    if len(bounds) > 1:
        raise Unusable("object with several <bndbox>")
    if bounds:
        numbers = [value(child(bounds[0], tag)) for tag in ("xmin", "ymin", "xmax", "ymax")]
    elif shape is None:
        raise Unusable("box without coordinates")
    elif shape.tag == "robndbox":
        numbers = [value(child(shape, tag)) for tag in ("cx", "cy", "w", "h", "angle")]
    else:                                                              # <pt><x/><y/></pt> or <x1/><y1/><x2/><y2/>
        numbers = [value(e.text) for e in shape.iter() if re.fullmatch(r"[xy]\d*", e.tag)]
    if None in numbers or not numbers or len(numbers) == 1:
        raise Unusable("box whose coordinates cannot be read")
    if are_fractions(numbers):
        raise Unusable(FRACTIONS)
    if bounds:
        said = [value(child(e, "value")) for e in element.iter("attribute") if child(e, "name") == "rotation"]
        return turned_bounds(*numbers, (said or [0])[0] or 0)
    if shape.tag == "robndbox":
        x, y, w, h, angle = numbers                                    # radians
        return turned_bounds(x - w / 2, y - h / 2, x + w / 2, y + h / 2, math.degrees(angle))
    return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])


def read_flags(element):
    """Sorted class names of an <object>: (the children of <Defect> that are 1, all its children), else (<name>, ())."""
    defects = element.findall("Defect")
    if len(defects) > 1:
        raise Unusable("<Defect> given twice")
    if defects:
        return flags_of(defects[0])
    name = child(element, "name") or ""
    if not name:
        raise Unusable("box without a class")
    return (name,), ()


def flags_of(defect):
    """(sorted tags of the children that are 1, all tags)"""
    values = [(flag.tag, (flag.text or "").strip()) for flag in defect]
    if any(text not in ("0", "1") for _, text in values):
        raise Unusable("box with a flag that is neither 0 nor 1")
    flags = {tag for tag, text in values if text == "1"}
    if not flags:
        raise Unusable("box without any flag set")
    if len(flags) > 1 and BACKGROUND in flags:
        raise Unusable("box that is Background and defect at once")
    return tuple(sorted(flags)), tuple(tag for tag, _ in values)


def value(text):
    """A number as annotations write it, None if it is none."""
    if text is None or not re.fullmatch(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*", text):
        return None
    found = float(text)
    return found if abs(found) < 1e9 else None


def rounded(number):
    return math.floor(number + 0.5)                                    # halves up


def pixels(x0, y0, x1, y1):
    """The whole pixels nearest to a box, one at least."""
    x, y = rounded(x0), rounded(y0)
    return x, y, max(rounded(x1), x + 1), max(rounded(y1), y + 1)


def turned_bounds(x0, y0, x1, y1, degrees):
    """What goes round a box that is turned about its middle, as CVAT's are."""
    if not degrees:
        return x0, y0, x1, y1
    wide, high = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    dx, dy = (w * wide + h * high) / 2, (w * high + h * wide) / 2
    return x - dx, y - dy, x + dx, y + dy


FRACTIONS = "box whose numbers are fractions of the photo"


def are_fractions(numbers):
    return all(0 <= v <= 1 for v in numbers) and any(v != int(v) for v in numbers)


def child(element, tag):
    """The text of the only child of that name; None where there is none."""
    found = element.findall(tag)
    if len(found) > 1:
        raise Unusable(f"<{tag}> given twice")
    return (found[0].text or "").strip() if found else None


def parse_xml(path):
    """Root element of an annotation. UTF-8, UTF-16 and declared 8-bit encodings; anything with a DOCTYPE or ENTITY is
    refused on the decoded text, before a parser sees it."""
    data = read_bytes(path, "XML", MAX_TEXT)
    if not data.strip():
        raise Unusable("empty XML")
    declared = re.match(rb"(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)", data[:300])
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif data[:2] in (b"<\0", b"\0<"):
        encoding = "utf-16-le" if data[0] else "utf-16-be"
    elif declared and not data.startswith(b"\xef\xbb\xbf") and not declared[1].lower().startswith((b"utf", b"ucs")):
        encoding = declared[1].decode()
    else:                                      # a declaration of UTF-16 that can be read byte by byte is not UTF-16
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding).lstrip("\ufeff \t\r\n")
        if re.search(r"<!\s*(DOCTYPE|ENTITY)", text, re.IGNORECASE):
            raise Unusable("XML with DOCTYPE or ENTITY")
        root = ElementTree.fromstring(re.sub(r"^<\?xml[^>]*\?>", "", text))
    except (ElementTree.ParseError, ValueError, LookupError):
        raise Unusable("XML that cannot be parsed")
    if "}" in root.tag:                        # a namespace
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
    return root


def read_bytes(path, what, most):
    try:
        with open(path, "rb") as f:
            data = f.read(most + 1)
    except OSError as e:
        raise Unusable(f"{what} cannot be read: {e.strerror}")
    if len(data) > most:
        raise Unusable(f"{what} larger than {most >> 20} MB")
    return data


# ---- CODEBRIM's classification set -----------------------------------------------------------------------------------
# {train,val,test}/{defects,background}/NAME.png and metadata/{defects,background}.xml, where each <Defect> has the file
# name as its only attribute and the flags as children; NAME_-_1.png is a copy of NAME.png. As the authors' loader reads
# it: github.com/MrtnMndt/meta-learning-CODEBRIM, MetaQNN/lib/Datasets/datasets.py.

def codebrim_claims(files, pictures):
    """A Claim for every ready-made crop: one box, the whole of it, or none where it shows background."""
    entries, sets = {}, {}
    for name, path in files:
        if re.search(r"(^|/)metadata/(defects|background)\.xml$", name):
            sets[os.path.dirname(name)] = None
            try:
                for element in parse_xml(path).iter("Defect"):
                    entries[f"{path.stem}/{next(iter(element.attrib.values()), '')}"] = name, element
            except Unusable as e:
                yield Claim(name, reason=str(e))
    if len(sets) > 1:
        raise CropError(f"{' and '.join(sets)} belong to several sets of crops: name the folder of one of them")
    used = set()
    for picture in pictures.paths:
        split, kind, file = ["", "", *picture.split("/")][-3:]
        copied = "_-_" in file and picture.split("_-_")[0] + Path(file).suffix in pictures.paths
        entry = f"{kind}/{file.split('_-_')[0] + Path(file).suffix if '_-_' in file else file}"
        if split not in ("train", "val", "test") or copied or entry not in entries:
            continue
        used.add(entry)
        source, element = entries[entry]
        try:
            mark = Mark(picture, (0, 0, 1, 1), *flags_of(element))
        except Unusable as e:
            mark = Mark(picture, (0, 0, 1, 1), reason=str(e))
        marks = () if mark.flags == (BACKGROUND,) else (mark,)
        yield Claim(source, picture, None, marks, "crop", many=True, fractions=True, split=split)
    for entry in sorted(entries.keys() - used):
        yield Claim(entries[entry][0], entry, reason="annotation without a photo", many=True)


# ---- YOLO ------------------------------------------------------------------------------------------------------------

def yolo_claims(files, pictures):
    """A Claim for every .txt with lines "class x y width height" or "class x1 y1 x2 y2 x3 y3 ...", as fractions."""
    lists = None
    for name, path in files:
        if path.suffix.lower() != ".txt" or class_list(path):
            continue
        try:
            text = read_bytes(path, "text", MAX_TEXT).decode("utf-8-sig", "replace")
            lines = [(k, line.split()) for k, line in enumerate(text.splitlines(), 1) if line.strip()]
            labels = any(len(words) >= 5 and None not in map(value, words) for _, words in lines)
            if not labels and not pictures.look(path.stem):
                continue                                               # a readme, a list of files
            if lines and not labels:
                raise Unusable("text that holds no YOLO labels")
        except Unusable as e:
            yield Claim(name, reason=str(e))
            continue
        if lists is None:
            lists = class_lists(files)
            places = {place_in(name) for name, path in files if path.suffix.lower() == ".txt" and not class_list(path)}
        names = nearest_list(lists, name, places)
        yield Claim(name, marks=tuple(yolo_mark(k, words, names) for k, words in lines), unit="line", fractions=True)


def yolo_mark(index, words, names):
    """names: {class number: name}, empty where no file gives them."""
    numbers = [value(word) for word in words]
    if None in numbers or len(numbers) < 5 or not len(numbers) % 2 or numbers[0] != int(numbers[0]):
        return Mark(index, reason="line that is neither a box nor a polygon")
    k, *rest = numbers
    if max(map(abs, rest)) > 2:
        return Mark(index, reason="line whose numbers are no fractions of the photo")
    x0, y0, x1, y1 = min(rest[::2]), min(rest[1::2]), max(rest[::2]), max(rest[1::2])
    if len(rest) == 4:
        x, y, w, h = rest
        x0, y0, x1, y1 = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    if x1 <= x0 or y1 <= y0:
        return Mark(index, reason="box that ends before it begins")
    name = names.get(int(k), "") if names else str(int(k))
    reason = None if name else "box whose class number has no name"
    return Mark(index, (x0, y0, x1, y1), (name,) if name else (), reason=reason)


def class_list(path):
    """What kind of list of class names a file may be, by its name."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return "yaml"
    return "lines" * (path.name.lower() in ("classes.txt", "predefined_classes.txt", "_darknet.labels")
                      or path.suffix.lower() == ".names")


def class_lists(files):
    """[(file, {class number: name})] of all lists of class names."""
    lists = []
    for name, path in files:
        kind = class_list(path)
        if not kind:
            continue
        try:
            text = read_bytes(path, "list of classes", MAX_TEXT).decode("utf-8-sig", "replace")
        except Unusable as e:
            raise CropError(f"{name}: {e}")
        if "\0" in text:
            raise CropError(f"{name}: this is not UTF-8 (UTF-16?); save it anew as UTF-8")
        if kind == "yaml" and re.search(r"^kpt_shape\s*:", text, re.M):
            raise CropError(f"{name}: its lines hold key points (kpt_shape), which are no polygons: export boxes")
        names = yaml_names(text, name) if kind == "yaml" else dict(enumerate(map(str.strip, text.splitlines())))
        if names is not None:
            lists.append((name, names))
    return lists


def nearest_list(lists, source, places):
    """The names that hold for a file of labels: of the list in its own folder, else in the nearest one above it or
    beside it. places: where labels lie; a list among those of another place is theirs."""
    lists = [(name, names) for name, names in lists
             if place_in(source)[:len(place_in(name))] == place_in(name) or place_in(name) not in places]

    def away(name):
        here, there = source.split("/")[:-1], name.split("/")[:-1]
        shared = len(os.path.commonprefix([here, there]))
        return -shared, len(there) - shared
    least = min((away(name) for name, _ in lists), default=None)
    best = [(name, names) for name, names in lists if away(name) == least]
    for name, names in best[1:]:
        if {k: v for k, v in names.items() if v} != {k: v for k, v in best[0][1].items() if v}:
            raise CropError(f"{best[0][0]} and {name} give other names to the classes: remove the wrong one")
    return best[0][1] if best else {}


def yaml_names(text, file):
    """{number: name} from the names of a data.yaml, a list or a mapping, inline or a block; None without names."""
    quoted, number = r"""\"[^"]*\"|'[^']*'""", r"""\d+\s*:\s|["']\d+["']\s*:"""
    unreadable = f"{file}: its names cannot be read; write them as names: [first, second]"
    comment = re.compile(rf"({quoted})|(?:^|\s)#.*")
    lines = [comment.sub(lambda m: m[1] or "", line).rstrip() for line in text.splitlines()]
    begin = next((i for i, line in enumerate(lines) if re.match(r"names\s*:", line)), None)
    if begin is None:
        if re.search(r"""^["']names["']\s*:|^\{.*\bnames["']?\s*:""", text, re.M):
            raise CropError(unreadable)
        return None
    first = lines[begin].partition(":")[2].strip()
    block = list(itertools.takewhile(lambda line: line[:1] in " \t-]}", lines[begin + 1:]))         # "" is in it, too
    flow = re.fullmatch(r"\[(.*)\]|\{(.*)\}", " ".join([first, *block]).strip())
    if flow:
        items = re.findall(rf"((?:\s*(?:{number}))?\s*(?:{quoted}|[^,]*)\s*)(?:,|$)", flow[1] or flow[2] or "")
    else:
        items = [] if first else [line.strip() for line in block if line]
        if all(item.startswith("- ") for item in items):
            items = [item.removeprefix("- ") for item in items]
        elif not all(re.match(number, item) for item in items):        # such as a name that goes on in the next line
            raise CropError(unreadable)
    found = [re.fullmatch(rf"({number})?(.*)", item).groups() for item in filter(None, map(str.strip, items))]
    names = {int(k.strip("'\": \t")) if k else i: name.strip().strip("'\"") for i, (k, name) in enumerate(found)}
    odd = any(not name or name.endswith(":") or re.search(r"\\|''|^\w+:\s", name) for name in names.values())
    if not names or odd or len(names) < len(found) or len({k is None for k, _ in found}) > 1:
        raise CropError(unreadable)
    return names


# ---- COCO ------------------------------------------------------------------------------------------------------------

def coco_claims(files, pictures):
    """A Claim for every image of every .json that is COCO's."""
    for name, path in files:
        if path.suffix.lower() != ".json":
            continue
        try:
            data = json.loads(read_bytes(path, "JSON", MAX_JSON))
        except Unusable as e:
            yield Claim(name, reason=str(e))
        except (ValueError, RecursionError):
            yield Claim(name, reason="JSON that cannot be parsed")
        else:
            if isinstance(data, dict) and all(isinstance(data.get(key), list) for key in ("images", "annotations")):
                yield from coco_images(name, data)


def coco_images(source, data):
    dicts = lambda key: [d for d in data[key] if isinstance(d, dict)] if isinstance(data.get(key), list) else []
    text = lambda v: str(v).encode("utf-8", "replace").decode() if isinstance(v, (str, int)) else ""   # half characters
    names = {}
    for c in dicts("categories"):
        name = text(c.get("name")).strip()
        if names.setdefault(str(c.get("id")), name) != name:
            raise CropError(f"{source}: category {c.get('id')} is given twice, as {names[str(c.get('id'))]} and {name}")
    images, marks = collections.defaultdict(list), collections.defaultdict(list)
    for image in dicts("images"):
        images[str(image.get("id"))].append(image)
    for i, a in enumerate(dicts("annotations")):
        marks[str(a.get("image_id"))].append(coco_mark(a.get("id", i), a, names.get(str(a.get("category_id")))))
    for k, (image, *more) in images.items():
        for again in more:
            yield Claim(source, text(again.get("file_name")), reason="image whose id is given twice", many=True)
        size = image.get("width"), image.get("height")
        size = size if all(map(is_number, size)) and min(size) > 0 else None
        reason = "image whose id is given twice" if more else None
        found = tuple(marks.pop(k, ()))
        yield Claim(source, text(image.get("file_name")), size, () if more else found, "annotation", reason, True)
    for k in marks:
        yield Claim(source, f"id {k}", reason="annotations of an image that is not listed", many=True)


def coco_mark(index, a, name):
    """a: an annotation; name: of its category, None without. The box, or what goes round all polygons."""
    box, outline, place = a.get("bbox"), a.get("segmentation"), None
    parts = outline if type(outline) is list else []
    polygons = [v for part in parts for v in (part if type(part) is list else [part])]
    numbers = ()
    if type(box) is list and len(box) == 4 and all(map(is_number, box)) and min(box[2:]) > 0:
        x, y, w, h = numbers = box
        more = a.get("attributes")
        turn = more.get("rotation") if isinstance(more, dict) else 0
        place = pixels(*turned_bounds(x, y, x + w, y + h, turn if is_number(turn) else 0))
    elif len(polygons) >= 6 and len(polygons) % 2 == 0 and all(map(is_number, polygons)):
        numbers = polygons
        place = pixels(min(polygons[::2]), min(polygons[1::2]), max(polygons[::2]), max(polygons[1::2]))
    reasons = {FRACTIONS: are_fractions(numbers), "crowd of objects (iscrowd)": a.get("iscrowd"),
               "mask in run lengths (RLE)": type(outline) is dict,
               "box without coordinates": place is None and not box and not polygons,
               "box whose coordinates cannot be read": place is None, "box without a class": not name}
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    return Mark(index, place, () if reason else (name,), reason=reason)


def is_number(v):
    return type(v) in (int, float) and abs(v) < 1e9


def open_photo(path):
    """Image.open for photos only; the pixels are not decoded yet. Raises Unusable."""
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                            # a bomb's warning: the limit below refuses it
            photo = Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError:
        raise Unusable("photo too large (decompression bomb?)")
    except Exception as e:                                             # Pillow's parsers raise nearly everything
        if path.is_file() and not path.stat().st_size:
            raise Unusable("empty photo")
        head = b""
        with contextlib.suppress(OSError), open(path, "rb") as f:
            head = f.read(12)
        kind = re.match(rb"....(?:ftyp(heic|heix|mif1|avif)|(jP)  )", head, re.DOTALL)
        if kind:                                                       # telephones call HEIC .jpg when they send it
            raise Unusable(f"photo of a type that is not read: {(kind[1] or b'jp2').decode()}, whatever its name says")
        raise Unusable("photo that cannot be opened" + ("" if isinstance(e, OSError) else f": {type(e).__name__}"))
    if Image.MAX_IMAGE_PIXELS and photo.width * photo.height > Image.MAX_IMAGE_PIXELS:
        photo.close()
        raise Unusable("photo too large (decompression bomb?)")
    return photo


# ---- pixels ----------------------------------------------------------------------------------------------------------
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


# ---- output ----------------------------------------------------------------------------------------------------------

def check_places(source, target, sheet):
    """Raise CropError unless target, and the sheet if any, may be written there."""
    photos, crops = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    for path in (target, sheet) if sheet else (target,):
        if Path(os.path.realpath(path)).is_relative_to(photos):
            raise CropError(f"{path}: lies inside the photos' folder {source}, which is never written to; "
                            "name another place")
    if not sheet:
        return
    place = Path(os.path.realpath(sheet))
    if os.path.lexists(sheet):
        raise CropError(f"{sheet} exists and is not overwritten: delete it or choose another name")
    if place.is_relative_to(crops):
        raise CropError(f"{sheet}: the sheet must lie outside {target}, whose pictures are trained on")
    if Path(sheet).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise CropError(f"{sheet}: the sheet's name must end in .png or .jpg")
    if not place.parent.is_dir():
        raise CropError(f"{sheet}: its folder does not exist")


@contextlib.contextmanager
def whole_or_not(target):
    """A new folder that gets the name `target` only if the block ends well. target must not exist, or be empty."""
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):
        raise CropError(f"{target} is a mount point, which cannot be renamed: name a folder in it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CropError(f"{target}: exists already; name a new folder or remove this one")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{os.urandom(4).hex()}.partial"
    work.mkdir()
    try:
        yield work
        if target.exists():
            target.rmdir()
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def safe_stems(photos):
    """{photo name: beginning of its crops' file names}: the stem, with the folders where two photos share it."""
    stem = {p.name: Path(p.name).stem for p in photos}
    for longer in (lambda name: "__".join(Path(name).with_suffix("").parts),
                   lambda name: name.replace("/", "__"),
                   lambda name: f"{key(name):08x}_{Path(name).stem}"):
        shared = collections.Counter(folded(s) for s in stem.values())
        stem = {n: longer(n) if shared[folded(s)] > 1 else s for n, s in stem.items()}
    return {n: s if len(os.fsencode(s)) <= 160 else f"{s[:40]}~{key(n):08x}" for n, s in stem.items()}


def class_folders(photos):
    """{class: its folder}: its own name, or one that every system takes as a folder, cannot leave its parent and is no
    part of a data set."""
    out, taken = {}, set()
    for name in sorted({n for p in photos for n in p.names} | {BACKGROUND}):
        safe = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]', "_", name).strip().strip(".")
        safe = "_" * safe.startswith(("=", "+", "-", "@")) + safe
        reserved = r"(|con|prn|aux|nul|com\d|lpt\d|train|val|test)(\..*)?|crops\.csv|skipped\.csv"
        safe = "class_" * bool(re.fullmatch(reserved, safe.lower())) + safe
        if len(safe.encode()) > 100 or folded(safe) in taken:
            safe = f"{safe[:20]}~{key(name):08x}"
        taken.add(folded(safe))
        out[name] = safe
    return out


def columns(photos):
    """{flag: its column of crops.csv}: every class in the annotations, and Background."""
    names = sorted({n for p in photos for n in p.names} | {BACKGROUND})
    taken, out = {*COLUMNS, "class", "split"}, {}
    for name in sorted(names, key=lambda n: n in taken):               # those that may keep their name first
        column = name
        while column in taken:
            column += "_"
        taken.add(column)
        out[name] = column
    return {name: out[name] for name in names}


def write_csv(path, fields, rows):
    """Names that a spreadsheet would run as a formula get an apostrophe in front."""
    safe = lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r")) else cell
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        csv.writer(f).writerows([safe(cell) for cell in row] for row in [fields, *rows])


def save_sheet(image, path):
    """Whole or not at all; a JPEG has no more than 65500 rows."""
    part, kind = Path(f"{path}.{os.getpid()}.partial"), "PNG" if path.suffix.lower() == ".png" else "JPEG"
    try:
        image.crop((0, 0, image.width, min(image.height, 65500))).save(part, format=kind)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def draw_sheet(folder, rows, size):
    """A contact sheet (PIL image): a row of up to 20 crops per class, spread evenly over the class's crops."""
    by_class = collections.defaultdict(list)
    for r in rows:
        by_class[r["class"]].append(r)
    tile, margin = size * max(1, 64 // size), 130
    per_row = min(20, max(map(len, by_class.values())))
    sheet = Image.new("RGB", (margin + per_row * (tile + 2), len(by_class) * (tile + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, (name, members) in enumerate(sorted(by_class.items())):
        top = j * (tile + 2)
        text = name.encode("ascii", "replace").decode()                # the built-in font knows no more
        pen.text((4, top + tile // 2 - 12), f"{text[:20]}\n{len(members)}", fill="black")
        n = min(per_row, len(members))
        for i in range(n):
            with Image.open(folder / members[i * len(members) // n]["file"]) as crop:
                sheet.paste(crop.resize((tile, tile), Image.Resampling.NEAREST), (margin + i * (tile + 2), top))
    return sheet


def print_table(rows, split):
    """The crops by class and split."""
    parts = list(split)
    classes = sorted({r["class"] for r in rows})
    wide = max(len(printable(name)) for name in ["class", "all", *classes])
    print(f"{'class':{wide}}  photos   crops" + "".join(f"{p:>8}" for p in parts))
    for name in [*classes, None]:
        mine = [r for r in rows if name in (r["class"], None)]
        n_photos, by_part = len({r["photo"] for r in mine}), collections.Counter(r["split"] for r in mine)
        print(f"{printable(name or 'all'):{wide}}{n_photos:8}{len(mine):8}" + "".join(f"{by_part[p]:8}" for p in parts))


def print_left_out(skipped, table):
    """What was left out and why, the commonest reason first; all of it is in the file `table`."""
    reasons = collections.defaultdict(list)
    for s in skipped:
        reasons[s.reason].append(s)
    if skipped:
        print(f"left out (all of them: {printable(table.name)})")
    for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(group):8}  {reason}: {printable(group[0].where)}" + (", ..." if len(group) > 1 else ""))


class Progress:
    """A line on stderr with the time left: rewritten on a terminal, else a new one every ten seconds."""

    def __init__(self, words):
        self.words = words
        self.start = self.last = time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, done, total, n):
        now = time.monotonic()
        if now - self.last > (0.2 if self.live else 10):
            self.last = now
            left = (now - self.start) / done * (total - done)
            line = f"{done}/{total} {self.words.format(n)}, {left:.0f} s left"
            print(line, end="   \r" if self.live else "\n", file=sys.stderr, flush=True)


# ---- command line ----------------------------------------------------------------------------------------------------

def arguments(argv):
    p = Parser(prog="crop_codebrim.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    add = p.add_argument
    add("source", nargs="?", help="folder with photos and their boxes, searched recursively; never written to")
    add("target", nargs="?", help="new folder for the crops")
    add("--n", type=at_least(0, 10 ** 100), default=2642,
        help="crops of boxes in all, over all splits (default 2642, as in the paper)")
    add("--size", type=at_least(8), default=64, help="side of a crop in pixels (default 64)")
    add("--seed", type=at_least(0), default=0, help="the same seed and data give the same files (default 0)")
    add("--workers", type=at_least(1, 256), default=min(cores(), 16),
        help="photos decoded at a time (default: the number of cores, at most 16)")
    add("--window", choices=CHOICES["window"], default="native",
        help="native: --size pixels of the photo at full scale (default); box: a square of 0.5 to 1 of the box's "
             "shorter side, antialiased to --size")
    add("--label", choices=CHOICES["label"], default="rarest",
        help="class of a crop whose box has several: the one rarest in the whole set (default); single: leave such "
             "boxes out; random: any of them")
    add("--balance", action="store_true", help="equally many crops per class (default: every box equally often)")
    add("--background", type=at_least(0, 10 ** 100), default=0, metavar="K",
        help="K further crops, class Background, of annotated photos, touching no box (default 0)")
    add("--small", choices=CHOICES["small"], default="around",
        help="boxes with a side under --size: the window covers that side (around, default), or skip them")
    add("--split", type=split_shares, metavar="train=0.8,val=0.1,test=0.1",
        help="assign photos to splits before cropping; writes TARGET/train/<class>/ ... (default: no split)")
    add("--range", dest="limits", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="the numbers that are black and white in photos of 16 bits, 32 bits or floats (default: the least usual "
             "range that holds those of all)")
    add("--upright", action="store_true",
        help="turn crops as the EXIF of their photo says (default: as they are stored); boxes and crops.csv keep to "
             "stored pixels")
    add("--boxes", choices=("voc", "yolo", "coco"),
        help="format of the boxes: Pascal VOC's .xml, YOLO's .txt or COCO's .json (default: the one that lies there)")
    add("--exif", choices=("stored", "turned"),
        help="where nothing tells: boxes lie in pixels of the photo as it is stored, or as its EXIF turns it (default: "
             "stored, with a count)")
    add("--sheet", type=some_path, metavar="sheet.png", help="also write a contact sheet, a row per class")
    hyphenated = [re.sub("^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in argv]
    return p.parse_intermixed_args(hyphenated)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(one_line(self.prog, f"{message} (--help lists the flags)"))


def at_least(least, most=math.inf):
    """A type for argparse: integers of these bounds."""
    def integer(text):
        value = int(text)
        if not least <= value <= most:
            bound = "" if most == math.inf else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be at least {least}{bound}, not {value}")
        return value
    return integer


def some_path(text):
    if not text:                                                       # as a path it would be the working folder
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def split_shares(text):
    """ "train=0.8,test=0.2" -> {"train": 0.8, "test": 0.2}"""
    out = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        name = name.strip()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name.lower() in map(str.lower, out):
            raise argparse.ArgumentTypeError(f"{text!r}: expected train=0.8,val=0.1,test=0.1, every name once")
        try:
            out[name] = float(share)
        except ValueError:
            out[name] = 0.0
        if not 0 < out[name] <= 1:
            raise argparse.ArgumentTypeError(f"{text!r}: the share of {name} must be a number above 0, at most 1")
    if abs(sum(out.values()) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text!r}: the shares add up to {sum(out.values()):g}, not 1")
    return out


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def guarded(program, work):
    """Run work() and return the exit status; what the user can mend becomes one line on stderr."""
    sys.stderr = sys.stderr or open(os.devnull, "w")                   # closed: nobody is to be told
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")              # names that are no text must not end the run
    try:
        if sys.stdout is None:
            raise CropError("stdout is closed; send it to a file, or to /dev/null")
        work()
        sys.stdout.flush()
        return 0
    except CropError as e:
        return one_line(program, e)
    except OSError as e:
        try:
            sys.stdout.flush()
        except OSError:                                                # what is left in its buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return one_line(program, f"{e.filename or 'stdout or a new file'}: {e.strerror or e}")
    except UnicodeEncodeError as e:
        return one_line(program, f"the locale has no letters for {e.object!r}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8")
    except ValueError as e:
        if "null" not in str(e):                                       # a null character in a path
            raise
        return one_line(program, e)
    except KeyboardInterrupt:
        return 130


def one_line(program, message):
    """Print what the user can mend, whatever a file's name holds, and return the exit status."""
    print(f"{program}: error: {printable(message)}", file=sys.stderr)
    return 2


def printable(text):
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def on_term(signum, frame):
    sys.exit(143)


def main(argv=None):
    a = arguments(sys.argv[1:] if argv is None else argv)

    def work():
        if not a.source or not a.target:
            raise CropError("two folders are needed: python crop_codebrim.py original_dataset/ crops/ "
                            "(no photos yet: python synthetic.py original_dataset/)")
        if a.limits and not (math.isfinite(sum(a.limits)) and a.limits[0] < a.limits[1]):
            raise CropError(f"--range {a.limits[0]:g} {a.limits[1]:g}: the first number must be below the second")
        if not a.n and not a.background:
            raise CropError("--n 0 without --background leaves nothing to crop")
        crop_folder(**vars(a))
    return guarded("crop_codebrim.py", work)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, on_term)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:             # else nohup's
        signal.signal(signal.SIGHUP, on_term)
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
