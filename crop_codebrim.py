"""Cut labelled training crops from photos with boxes: CODEBRIM, or your own photos labelled in Pascal VOC (labelImg).

    python crop_codebrim.py original_dataset/ crops/                                  # 2642 crops of 64x64, a folder per class
    python crop_codebrim.py original_dataset/ crops/ --window box --label single --balance --sheet sheet.png
    python crop_codebrim.py original_dataset/ crops/ --split train=0.8,val=0.1,test=0.1       # by photo
    python crop_codebrim.py --demo original_dataset/                                  # no data yet: render a small data set

The folder holds photos and, anywhere in it, XML files of the same stem (original_dataset/images/image_0000001.jpg,
original_dataset/annotations/image_0000001.xml). Written are crops/<class>/<photo>_<box>_<x>_<y>.png, crops.csv with the
place and all labels of every crop, and skipped.csv with all that could not be used. okd_train.py trains on the folder as
it is. Boxes are 1-based, inclusive, in stored pixels: EXIF orientation is ignored, as CODEBRIM's annotators did.

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

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ["CorrosionStain", "Crack", "Efflorescence", "ExposedBars", "Spallation"]     # sorted: label order
BACKGROUND = "Background"
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"}
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP")         # what the suffixes hold; no format that starts other programs
MAX_XML = 16 * 2 ** 20                                          # bytes; CODEBRIM's largest annotation is about 30 kB
COLUMNS = ["file", "photo", "box", "x", "y", "side"]            # then one column per flag, then class and split

Photo = collections.namedtuple("Photo", "path name width height boxes taken certain names")
Photo.__doc__ = """A photo with boxes. path: its file; name: its place in the tree ("images/a.jpg"); width, height: stored pixels;
boxes: usable Boxes; taken: (x0, y0, x1, y1) of everything marked as defect, usable or not; certain: every mark could be read;
names: all classes that its usable boxes' flags name, set or not."""
Box = collections.namedtuple("Box", "index x0 y0 x1 y1 flags")
Box.__doc__ = """Pixels x0 <= x < x1, y0 <= y < y1 of the stored photo. index: place among the XML's <object>s, from 0; flags: sorted class names."""
Skip = collections.namedtuple("Skip", "what where reason")


class CropError(Exception):
    """What the user can mend; one line."""


# ---- reading --------------------------------------------------------------------------------------------------------

class Unusable(Exception):
    """Why a file or box is left out, and which one if it is not the one being read."""

    def __init__(self, reason, what=None, where=None):
        super().__init__(reason)
        self.what, self.where = what, where


def walk(root):
    """All files below root as (relative POSIX name, path), sorted, without __MACOSX, "._*" and other hidden names."""
    found, unreadable, seen = [], [], set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=lambda e: unreadable.append(e.filename)):
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
    return sorted(found), [Skip("folder", Path(p).relative_to(root).as_posix(), "folder that may not be read") for p in unreadable]


def parse_xml(path):
    """Root element of an annotation. UTF-8, UTF-16 and declared 8-bit encodings; anything with a DOCTYPE or ENTITY is refused
    on the decoded text, before a parser sees it."""
    try:
        with open(path, "rb") as f:
            data = f.read(MAX_XML + 1)
    except OSError as e:
        raise Unusable(f"XML cannot be read: {e.strerror}")
    if len(data) > MAX_XML:
        raise Unusable("XML larger than 16 MB")
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
    if root.tag != "annotation":
        raise Unusable("XML that is no VOC annotation")
    return root


def child(element, tag):
    """The text of the only child of that name; None where there is none."""
    found = element.findall(tag)
    if len(found) > 1:
        raise Unusable(f"<{tag}> given twice")
    return (found[0].text or "").strip() if found else None


def number(text):
    """A coordinate as an integer; tools that write 12.5 are rounded to the nearest pixel, halves up."""
    if text is None or not re.fullmatch(r"[-+]?[0-9]{1,9}(\.[0-9]*)?", text):
        raise Unusable("box whose coordinates cannot be read")
    return math.floor(float(text) + 0.5)


def may_name_folder(name):
    """Whether a class name can be a folder on every system and cannot leave its parent."""
    return (bool(name) and len(name.encode("utf-8", "surrogatepass")) <= 100 and name == name.strip() and name[0] != "." and name[-1] != "."
            and not re.search(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]', name)
            and name.lower() not in ("train", "val", "test", "crops.csv", "skipped.csv")
            and not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name.lower()))


def read_flags(element):
    """Sorted class names of an <object>, the children of <Defect> that are 1, else <name>; then all names, set or not."""
    defects = element.findall("Defect")
    if len(defects) > 1:
        raise Unusable("<Defect> given twice")
    if not defects:
        flags = named = [child(element, "name") or ""]
        if flags == [""]:
            raise Unusable("box without a class")
    else:
        flags, named = [], [flag.tag for flag in defects[0]]
        for flag in defects[0]:
            value = (flag.text or "").strip()
            if value not in ("0", "1"):
                raise Unusable("box with a flag that is neither 0 nor 1")
            if value == "1":
                flags.append(flag.tag)
        if not flags:
            raise Unusable("box without any flag set")
    for name in named:
        if not may_name_folder(name):
            raise Unusable("box whose class cannot name a folder")
    if len(set(flags)) > 1 and BACKGROUND in flags:
        raise Unusable("box that is Background and defect at once")
    return tuple(sorted(set(flags))), named


def key_of(name):
    return unicodedata.normalize("NFC", name).casefold()              # macOS unpacks é as two characters


class PhotoIndex:
    """Finds a photo by the stem of its XML, then by the last part of <filename>; names are looked up, never opened."""

    def __init__(self, names):
        self.names, self.stems = collections.defaultdict(list), collections.defaultdict(list)
        for name, path in names:
            self.names[key_of(path.name)].append((name, path))
            self.stems[key_of(path.stem)].append((name, path))

    def find(self, xml_name, xml_path, filename):
        last = re.split(r"[/\\]", filename or "")[-1].strip()
        for found in (self.stems.get(key_of(xml_path.stem), []), self.names.get(key_of(last), []), self.stems.get(key_of(last), [])):
            if not found:
                continue
            folder = Path(xml_name).parent.parts
            mirror = tuple("images" if p.lower() == "annotations" else p for p in folder)
            for better in (lambda c: c[1].stem == xml_path.stem, lambda c: key_of(c[1].name) == key_of(last),
                           lambda c: Path(c[0]).parent.parts in (folder, mirror)):
                if len(found) > 1:
                    found = [c for c in found if better(c)] or found
            if len(found) > 1:
                raise Unusable("annotation that fits several photos")
            return found[0]
        raise Unusable("annotation without a photo")


def open_photo(path):
    """Image.open for photos only; the pixels are not decoded yet. Raises Unusable."""
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                            # Pillow's bomb warning: the limit below is a refusal
            photo = Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError:
        raise Unusable("photo too large (decompression bomb?)")
    except Exception as e:                                             # Pillow's parsers raise nearly everything on broken files
        raise Unusable("empty photo" if _empty(path) else "photo that cannot be opened" if isinstance(e, OSError) else f"photo that cannot be opened: {type(e).__name__}")
    if Image.MAX_IMAGE_PIXELS and photo.width * photo.height > Image.MAX_IMAGE_PIXELS:
        photo.close()
        raise Unusable("photo too large (decompression bomb?)")
    return photo


def _empty(path):
    try:
        return os.path.getsize(path) == 0
    except OSError:
        return False


def read_annotation(path, name, index):
    """(Photo, skips) of one XML; raises Unusable."""
    root = parse_xml(path)
    photo_name, photo_path = index.find(name, path, child(root, "filename"))
    objects = root.findall("object")
    if not objects:
        raise Unusable("annotation without objects")
    size = root.find("size")
    try:
        with open_photo(photo_path) as photo:
            width, height = photo.size
    except Unusable as e:
        raise Unusable(str(e), "photo", photo_name)
    if size is not None and (child(size, "width"), child(size, "height")) != (None, None):
        if [number_or_none(child(size, t)) for t in ("width", "height")] != [width, height]:
            raise Unusable("photo whose size contradicts its annotation", "photo", photo_name)
    skips, boxes, taken, certain, names, place = [], [], [], True, set(), {}
    for i, element in enumerate(objects):
        where = f"{name} object {i}"
        try:
            bounds = element.findall("bndbox")
            if len(bounds) != 1:
                certain = False
                raise Unusable("box without coordinates")
            try:
                xmin, ymin, xmax, ymax = (number(child(bounds[0], t)) for t in ("xmin", "ymin", "xmax", "ymax"))
                if xmax < xmin or ymax < ymin:
                    raise Unusable("box that ends before it begins")
            except Unusable:
                certain = False                                        # a defect lies somewhere, nobody knows where
                raise
            x0, y0, x1, y1 = max(xmin - 1, 0), max(ymin - 1, 0), min(xmax, width), min(ymax, height)
            if x1 <= x0 or y1 <= y0:
                raise Unusable("box outside its photo")
            try:
                flags, named = read_flags(element)
            except Unusable:
                taken.append((x0, y0, x1, y1))
                raise
            if flags == (BACKGROUND,):
                raise Unusable("box of Background (see --background)")
            taken.append((x0, y0, x1, y1))
            if (x0, y0, x1, y1) in place:                              # one object per label on one box: one box of several labels
                k = place[x0, y0, x1, y1]
                boxes[k] = boxes[k]._replace(flags=tuple(sorted({*boxes[k].flags, *flags})))
                raise Unusable("box given again (its labels joined to the first)")
            place[x0, y0, x1, y1] = len(boxes)
            boxes.append(Box(i, x0, y0, x1, y1, flags))
            names.update(named)
        except Unusable as e:
            skips.append(Skip("box", where, str(e)))
    return Photo(photo_path, photo_name, width, height, tuple(boxes), tuple(taken), certain, tuple(sorted(names))), skips


def number_or_none(text):
    try:
        return number(text)
    except Unusable:
        return None


def read_annotations(root):
    """Read all XML files below root: (photos, skipped).

    photos: list of Photo sorted by name, each with at least one usable box; skipped: list of Skip(what, where, reason) with what
    one of "annotation", "photo", "box", "folder". Photos are opened for their size, not decoded. Raises CropError if root holds
    no annotation at all.
    """
    root = Path(root)
    if not root.is_dir():
        hint = "; unpack it first (7-Zip reads CODEBRIM's archives where others fail)" if root.suffix.lower() == ".zip" else ""
        raise CropError(f"{root}: no such folder{hint}")
    files, skipped = walk(root)
    xmls = [(n, p) for n, p in files if p.suffix.lower() == ".xml"]
    pictures = [(n, p) for n, p in files if p.suffix.lower() in SUFFIXES]
    if not xmls:
        raise CropError(f"{root}: no .xml files in it; expected annotations/NAME.xml for images/NAME.jpg")
    index, photos, owner = PhotoIndex(pictures), [], set()
    for name, path in xmls:
        try:
            photo, skips = read_annotation(path, name, index)
            if photo.name in owner:
                raise Unusable("second annotation of a photo")
            owner.add(photo.name)
        except Unusable as e:
            skipped.append(Skip(e.what or "annotation", e.where or name, str(e)))
            continue
        skipped += skips
        if photo.boxes:
            photos.append(photo)
    stems = {key_of(p.stem) for _, p in xmls}
    skipped += [Skip("photo", n, "photo without annotation") for n, p in pictures if n not in owner and key_of(p.stem) not in stems]
    return sorted(photos, key=lambda p: p.name), skipped


# ---- choosing windows -----------------------------------------------------------------------------------------------
# All choices are made here, in one thread, from numbers keyed by (seed, purpose): workers only decode and cut.

class Dice:
    """Uniform numbers from the raw 64-bit words of PCG64, keyed by non-negative integers. NumPy promises these words on every
    platform and in every version; it promises no such thing for Generator's distributions."""

    def __init__(self, *key):
        self.bits = np.random.PCG64(np.random.SeedSequence(key))

    def fork(self):
        """An independent Dice: however much is drawn from it, the draws of this one stay the same."""
        return Dice(int(self.bits.random_raw()))

    def array(self, *shape):
        """float32 of the given shape in [0, 1)."""
        return ((self.bits.random_raw(math.prod(shape)) >> np.uint64(40)).astype(np.float32) * np.float32(2.0 ** -24)).reshape(shape)

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


def span(a, b, side, limit):
    """First and last start of a window of `side` on an axis of `limit` pixels: inside a..b where that is long enough, else covering
    it. Always inside the photo, side <= limit."""
    return (a, b - side) if b - a >= side else (max(0, b - side), min(a, limit - side))


class Source:
    """Where crops come from: a box and the labels its crops may get, or (box None) what of a photo touches no defect.

    sides: (least, most) side of a window; for box None a list of them, the defects' own: another scale would give the class away.
    """

    def __init__(self, photo, box, labels, size, sides):
        self.photo, self.box, self.labels, self.size, self.sides, self.left = photo, box, labels, size, sides, None
        self.least = sides[0] if box else size

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


def area(rectangles):
    """Number of integer points in a union of half-open rectangles (x0, y0, x1, y1)."""
    rectangles = [r for r in rectangles if r[0] < r[2] and r[1] < r[3]]
    xs, ys = sorted({v for r in rectangles for v in (r[0], r[2])}), sorted({v for r in rectangles for v in (r[1], r[3])})
    grid = np.zeros((len(ys), len(xs)), bool)
    for x0, y0, x1, y1 in rectangles:
        grid[ys.index(y0):ys.index(y1), xs.index(x0):xs.index(x1)] = True
    return sum((ys[j + 1] - ys[j]) * (xs[i + 1] - xs[i]) for j, i in np.argwhere(grid).tolist())


def count_windows(sources):
    """Number of distinct (photo, x, y) that these sources can give."""
    by_photo = collections.defaultdict(list)
    for s in sources:
        by_photo[s.photo.name].append(s)
    total = 0
    for group in by_photo.values():
        rectangles = []
        for s in group:
            side = s.least
            x0, x1, y0, y1 = s.starts(side)
            if s.box is None:
                clip = [(max(a, 0), max(b, 0), min(c, x1 + 1), min(d, y1 + 1)) for a, b, c, d in s.blocked(side)]
                total += (x1 + 1) * (y1 + 1) - area(clip)
            else:
                rectangles.append((x0, y0, x1 + 1, y1 + 1))
        total += area(rectangles)
    return total


def shares(n, weights):
    """n as integers in proportion to weights, by largest remainder (ties to the first)."""
    total = sum(weights)
    exact = [n * w / total for w in weights]
    out = [math.floor(e + 1e-9) for e in exact]
    for i in sorted(range(len(weights)), key=lambda i: out[i] - exact[i])[:n - sum(out)]:
        out[i] += 1
    return out


def assign_splits(photos, split, rarity, seed):
    """{photo name: split}. Photos go one by one to the split that lacks most, the rarest classes first, so that each split gets
    its share of every class as far as whole photos allow. Byte-identical photos stay together."""
    sizes = collections.defaultdict(list)
    for p in photos:
        sizes[os.path.getsize(p.path)].append(p)
    twins, groups = {}, collections.defaultdict(list)
    for same in sizes.values():
        for p in same:
            twins[p.name] = p.name if len(same) == 1 else hashlib.sha256(p.path.read_bytes()).hexdigest()
    for p in photos:
        groups[twins[p.name]].append(p)
    order = Dice(seed, key("split")).shuffled(list(groups.values()))
    rare = {id(g): min(rarity[f] for p in g for b in p.boxes for f in b.flags) for g in order}
    order.sort(key=lambda g: rare[id(g)])
    names, out = list(split), {}
    have, total = dict.fromkeys(names, 0), sum(split.values())
    done = 0
    for g in order:
        done += len(g)
        target = max(names, key=lambda s: (split[s] / total * done - have[s], split[s]))
        have[target] += len(g)
        out.update((p.name, target) for p in g)
    return out


Window = collections.namedtuple("Window", "photo box x y side label bucket")


class Bucket:
    """Crops wanted of one split and, where the classes are asked for separately, one class."""

    def __init__(self, split, label, want, sources, dice):
        self.split, self.label, self.want, self.sources, self.dice = split, label, want, sources, dice
        self.queue = collections.deque(dice.shuffled(sources))
        self.scarcity = want / max(1, self.exist())

    def exist(self, broken=()):
        return count_windows([s for s in self.sources if s.photo.name not in broken])

    def check(self, have, broken=()):
        """Raise CropError unless `have` windows are enough."""
        if have < self.want:
            kind = "windows without a defect" if self.label == BACKGROUND else f"windows of class {self.label}" if self.label else "windows"
            where = f" in split {self.split}" if self.split else ""
            lost = f" ({len(broken)} damaged photos left out)" if broken else ""
            raise CropError(f"{self.want} {kind}{where} wanted, {have} distinct ones exist{lost}: lower --n or --background, or change the choices")

    def fill(self, rows, used, broken, seen):
        """Append rows until the bucket is full or empty of windows: every source once before any gives its second."""
        self.queue = collections.deque(s for s in self.queue if s.photo.name not in broken)
        if seen:                                                       # in a second round, photos that were never decoded come first
            self.queue = collections.deque(sorted(self.queue, key=lambda s: s.photo.name in seen))
        have = sum(r.bucket is self for r in rows)
        while have < self.want and self.queue:
            source = self.queue.popleft()
            window = source.draw(self.dice, used[source.photo.name])
            if window is None:
                continue
            x, y, side = window
            used[source.photo.name].add((x, y))
            label = self.label or (source.labels[0] if len(source.labels) == 1 else self.dice.shuffled(source.labels)[0])
            rows.append(Window(source.photo, source.box, x, y, side, label, self))
            have += 1
            self.queue.append(source)
        return have


def plan_buckets(photos, n, size, seed, window, label, balance, background, small, split, skipped):
    """Buckets to be filled; what the choices exclude is appended to skipped."""
    count = collections.Counter(f for p in photos for b in p.boxes for f in b.flags)
    rarity = {f: (count[f], f) for f in count}
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
    parts = assign_splits(large, split, rarity, seed) if split else {p.name: "" for p in large}
    wanted = split or {"": 1}
    classes = sorted({c for s in sources for c in s.labels}) if balance else [None]
    buckets = []
    for c, n_class in zip(classes, shares(n, [1] * len(classes))):
        for part, n_part in zip(wanted, shares(n_class, wanted.values())):
            pool = [s for s in sources if parts[s.photo.name] == part and (c is None or c in s.labels)]
            buckets.append(Bucket(part, c, n_part, pool, Dice(seed, key("boxes"), key(c or ""), key(part))))
    if background:
        sides = [s.sides for s in sources] or [(size, size)]
        for part, n_part in zip(wanted, shares(background, wanted.values())):
            pool = [Source(p, None, (BACKGROUND,), size, sides) for p in large if p.certain and parts[p.name] == part]
            buckets.append(Bucket(part, BACKGROUND, n_part, pool, Dice(seed, key("background"), key(part))))
    return buckets


# ---- decoding and cutting -------------------------------------------------------------------------------------------

def cut(photo, windows, size):
    """Decode a photo once and return its windows as uint8 (size, size, 3) arrays. Raises Unusable."""
    with open_photo(photo.path) as image:
        if image.size != (photo.width, photo.height):
            raise Unusable("photo that changed meanwhile")
        try:
            image.load()
            wide = image.mode == "I" or image.mode.startswith("I;16")  # 16 bits; Pillow's own convert() clips them to white
            if image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] <= 65535:
                raise Unusable("photo of 32-bit values")
            out = []
            for w in windows:
                crop = image.crop((w.x, w.y, w.x + w.side, w.y + w.side))
                if wide:
                    crop = Image.fromarray(((np.asarray(crop).astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))
                elif crop.mode == "F":
                    raise Unusable("photo of float values")
                crop = crop.convert("RGB")
                if w.side != size:
                    crop = crop.resize((size, size), Image.Resampling.LANCZOS)       # Pillow's filters antialias
                out.append(np.array(crop))
            return out
        except Unusable:
            raise
        except MemoryError:
            raise Unusable("photo too large for the memory")
        except Exception:                                              # Pillow's decoders raise nearly everything on broken files
            raise Unusable("photo that is truncated or damaged")


@contextlib.contextmanager
def kept_blocks(blocks):
    """Let Pillow keep that many freed blocks of 16 MB for the next photo (24 megapixels take six): else the kernel hands out and
    clears the same memory anew for each photo, which costs 5 to 9 % of the processor time."""
    before = Image.core.get_blocks_max()
    Image.core.set_blocks_max(max(blocks, before))
    try:
        yield
    finally:
        Image.core.set_blocks_max(before)


def safe_stems(photos):
    """{photo name: beginning of its crops' file names}: the stem, with the folders where two photos share it."""
    stem = {p.name: Path(p.name).stem for p in photos}
    for longer in (lambda n: str(Path(n).with_suffix("")).replace(os.sep, "__"), lambda n: n.replace("/", "__"), lambda n: f"{key(n):08x}_{Path(n).stem}"):
        shared = collections.Counter(key_of(s) for s in stem.values())
        stem = {n: longer(n) if shared[key_of(s)] > 1 else s for n, s in stem.items()}
    return {n: s if len(os.fsencode(s)) <= 160 else f"{s[:40]}~{key(n):08x}" for n, s in stem.items()}


def columns(photos):
    """Columns of crops.csv: one for every class in the annotations, and Background."""
    names = sorted({n for p in photos for n in p.names} | {BACKGROUND})
    fixed = {*COLUMNS, "class", "split"}
    return {n: n + "_" if n in fixed else n for n in names}


def crops(photos, n=2642, size=64, seed=0, window="native", label="rarest", balance=False, background=0, small="around",
          split=None, workers=1, skipped=None, progress=None):
    """Yield (row, image) for n crops of boxes and `background` windows that touch no box.

    photos: what read_annotations gave, or a folder. row: dict with file (name below the output folder), photo, box (index of the
    <object>, "" for background), x, y, side (pixels of the stored photo, x and y from 0), one 0/1 per flag, class, split.
    image: uint8 (size, size, 3). window: "native" (side = size) or "box" (side uniform from half the box's shorter side to all of it,
    antialiased to size; boxes with a side under size as in native). label: "rarest", "single", "random". small: "around", "skip".
    split: {name: share}, by photo. All windows are distinct in (photo, x, y). The result depends on seed and data only, not on workers.
    skipped: a list that gets a Skip for everything left out. progress: called with (photos done, photos in all, crops done).
    Raises CropError, possibly after the first crops if damaged photos leave too few windows, and ValueError for bad arguments.
    """
    for name, value, allowed in (("window", window, ("native", "box")), ("label", label, ("rarest", "single", "random")), ("small", small, ("around", "skip"))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    if n < 0 or background < 0 or size < 1 or seed < 0 or workers < 1 or (split is not None and (not split or min(split.values()) <= 0)):
        raise ValueError("n, background and seed must be >= 0, size and workers >= 1, the shares of split > 0")
    skipped = [] if skipped is None else skipped
    if isinstance(photos, (str, os.PathLike)):
        photos, left_out = read_annotations(photos)
        skipped += left_out
    buckets = plan_buckets(photos, n, size, seed, window, label, balance, background, small, split, skipped)
    if n and not any(b.want and b.sources for b in buckets if b.label != BACKGROUND):
        raise CropError(f"{n} windows wanted, 0 exist: no box is usable")
    for b in buckets:
        b.check(b.exist())
    stems, names = safe_stems(photos), columns(photos)
    rows, used, broken, seen, done, total = [], collections.defaultdict(set), set(), set(), 0, 0
    n_crops = 0
    # threads: Pillow decodes, and zlib packs, outside the interpreter's lock
    with kept_blocks(7 * workers), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while True:
            before = len(rows)
            for b in sorted(buckets, key=lambda b: -b.scarcity):
                have = b.fill(rows, used, broken, seen)
                b.check(have, broken)
            if len(rows) == before:
                return
            todo = collections.defaultdict(list)
            for r in rows[before:]:
                todo[r.photo.name].append(r)
            pixels = {name: group[0].photo.width * group[0].photo.height for name, group in todo.items()}
            order, running = sorted(todo, key=lambda name: (-pixels[name], name)), collections.deque()      # largest first: no worker ends late
            total += len(order)
            try:
                for i, name in enumerate(order):
                    while len(running) < 2 * workers + 2 and i + len(running) < len(order):
                        ahead = order[i + len(running)]
                        running.append(pool.submit(cut, todo[ahead][0].photo, todo[ahead], size))
                    seen.add(name)
                    try:
                        images = running.popleft().result()
                    except Unusable as e:
                        skipped.append(Skip("photo", name, str(e)))
                        broken.add(name)
                        rows = [r for r in rows if r.photo.name != name]
                        images = []
                    done += 1
                    for r, image in zip(todo[name], images):
                        box = r.box.index if r.box else ""
                        flags = r.box.flags if r.box else (BACKGROUND,)
                        file = "/".join(p for p in (r.bucket.split, r.label, f"{stems[name]}_{'bg' if r.box is None else box}_{r.x}_{r.y}.png") if p)
                        n_crops += 1
                        yield dict(file=file, photo=name, box=box, x=r.x, y=r.y, side=r.side, **{names[f]: int(f in flags) for f in names},
                                   **{"class": r.label, "split": r.bucket.split}), image
                    if progress:
                        progress(done, total, n_crops)
            finally:
                for future in running:
                    future.cancel()


# ---- output ---------------------------------------------------------------------------------------------------------

def draw_sheet(folder, rows, size, columns=20):
    """A contact sheet (PIL image): a row of crops per class, spread evenly over the class's crops."""
    by_class = collections.defaultdict(list)
    for r in rows:
        by_class[r["class"]].append(r)
    tile, margin = size * max(1, 64 // size), 130
    per_row = min(columns, max(map(len, by_class.values())))
    sheet = Image.new("RGB", (margin + per_row * (tile + 2), len(by_class) * (tile + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, (name, members) in enumerate(sorted(by_class.items())):
        text = name.encode("ascii", "replace").decode()                # the built-in font knows no more
        pen.text((4, j * (tile + 2) + tile // 2 - 12), f"{text[:20]}\n{len(members)}", fill="black")
        k = min(per_row, len(members))
        for i in range(k):
            with Image.open(folder / members[i * len(members) // k]["file"]) as crop:
                sheet.paste(crop.resize((tile, tile), Image.Resampling.NEAREST), (margin + i * (tile + 2), j * (tile + 2)))
    return sheet


@contextlib.contextmanager
def whole_or_not(target):
    """A new folder that gets the name `target` only if the block ends well. target must not exist, or be empty."""
    target = Path(os.path.realpath(target))
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


def print_table(rows, skipped, split):
    parts = list(split or [])
    classes = sorted({r["class"] for r in rows})
    wide = max([len("class"), len("all"), *map(len, classes)])
    print(f"{'class':{wide}}  photos   crops" + "".join(f"{p:>8}" for p in parts))
    for name in [*classes, None]:
        mine = [r for r in rows if name in (r["class"], None)]
        print(f"{name or 'all':{wide}}{len({r['photo'] for r in mine}):8}{len(mine):8}" + "".join(f"{sum(r['split'] == p for r in mine):8}" for p in parts))
    reasons = collections.defaultdict(list)
    for s in skipped:
        reasons[s.reason].append(s)
    if skipped:
        print("left out (all of them: skipped.csv)")
    for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(group):8}  {reason}: {group[0].where}" + (", ..." if len(group) > 1 else ""))
    for s in skipped:
        if s.what == "photo" and not s.reason.startswith(("photo without", "photo smaller")):
            print(f"crop_codebrim.py: {s.where}: {s.reason}", file=sys.stderr)


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
            print(f"{done}/{total} {self.words.format(n)}, {left:.0f} s left", end="   \r" if self.live else "\n", file=sys.stderr, flush=True)


def write_csv(path, fields, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        writer = csv.writer(f)
        writer.writerow(fields)
        writer.writerows(rows)


def crop_folder(source, target, sheet=None, **choices):
    """Cut `source` into the new folder `target` and print the closing table; choices as for crops()."""
    source, target = Path(source), Path(target)
    inside = Path(os.path.realpath(source))
    for path in [target] + ([sheet] if sheet else []):
        if inside in [Path(os.path.realpath(path)), *Path(os.path.realpath(path)).parents]:
            raise CropError(f"{path}: lies inside the photos' folder {source}, which is never written to; name another place")
    if sheet and Path(os.path.realpath(target)) in Path(os.path.realpath(sheet)).parents:
        raise CropError(f"{sheet}: the sheet must lie outside {target}, whose pictures are trained on")
    if sheet and Path(sheet).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise CropError(f"{sheet}: the sheet's name must end in .png or .jpg")
    if sheet and not Path(sheet).resolve().parent.is_dir():
        raise CropError(f"{sheet}: its folder does not exist")
    photos, skipped = read_annotations(source)
    started = time.monotonic()
    with whole_or_not(target) as work:
        rows, made = [], set()
        for row, image in crops(photos, skipped=skipped, progress=Progress("photos, {} crops"), **choices):
            path = work / row["file"]
            if path.parent not in made:
                path.parent.mkdir(parents=True, exist_ok=True)
                made.add(path.parent)
            Image.fromarray(image).save(path, compress_level=3)        # as small as level 6 on 64x64 photographs, in two thirds of the time
            rows.append(row)
        rows.sort(key=lambda r: r["file"])
        fields = [*COLUMNS, *columns(photos).values(), "class", "split"]
        write_csv(work / "crops.csv", fields, [[r[f] for f in fields] for r in rows])
        write_csv(work / "skipped.csv", Skip._fields, skipped)
        if sheet and rows:
            picture = draw_sheet(work, rows, choices["size"])
            part = Path(f"{sheet}.{os.getpid()}.partial")
            picture.save(part, format="PNG" if Path(sheet).suffix.lower() == ".png" else "JPEG")
            os.replace(part, sheet)
    print_table(rows, skipped, choices["split"])
    print(f"{len(rows)} crops in {target}, {time.monotonic() - started:.1f} s")


# ---- synthetic concrete ---------------------------------------------------------------------------------------------
# Only + - * / sqrt, comparisons and Dice are used here, and no float32 scalar meets a Python float: so the bytes are the
# same on every platform and under NumPy 1.26 and 2.x. Nobody promises the last bit of sin or exp.

def smooth(a, b, x):
    """Smoothstep from 0 at a to 1 at b (falling where a > b)."""
    t = np.clip((x - a) * (1.0 / (b - a)), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


@functools.lru_cache(maxsize=256)
def _taps(n, cells):
    p = (np.arange(n) + 0.5) * (cells / n)
    i = np.floor(p)
    t = p - i
    s = 1 - t
    w = np.stack([s * s * s, (3 * t - 6) * t * t + 4, (3 * s - 6) * s * s + 4, t * t * t]) * (1 / 6)
    return i.astype(np.int64), w.astype(np.float32)


def noise(dice, h, w, cy, cx):
    """Cubic B-spline noise (h, w), about -1..1, on a lattice of cy x cx cells."""
    cy, cx = max(1, int(cy)), max(1, int(cx))
    grid = dice.array(cy + 3, cx + 3) * 4.0 - 2.0
    (iy, wy), (ix, wx) = _taps(h, cy), _taps(w, cx)
    rows = sum(grid[iy + k] * wy[k][:, None] for k in range(4))        # (h, cx + 3)
    return sum(rows[:, ix + k] * wx[k] for k in range(4))              # (h, w)


def fbm(dice, h, w, cells, stretch=1.0, gain=0.5, octaves=4, finest=2.5):
    """Octaves of noise (h, w) from `cells` waves along the shorter side down to `finest` pixels; `stretch` > 1 draws it
    out downwards."""
    dice, out, amp, short = dice.fork(), 0.0, 1.0, min(h, w)
    for _ in range(octaves):
        out = out + noise(dice, h, w, cells * h / short / stretch + 0.5, cells * w / short + 0.5) * amp
        cells, amp = cells * 2, amp * gain
        if cells * finest > short:
            break
    return out


def wave(dice, x, reach, cells, octaves=4):
    """A one-dimensional fractal curve, about -1..1, read at x (any shape, -reach..reach); its slope comes second."""
    n = 1024
    table = fbm(dice, 1, n, cells / n, octaves=octaves, finest=0)[0]
    slope = (table[1:] - table[:-1]) * (n / (2.0 * reach))
    p = np.clip((x + reach) * (n / (2.0 * reach)), 0, n - 1.001)
    i = p.astype(np.int64)
    i = np.minimum(i, n - 2)
    return table[i] + (table[i + 1] - table[i]) * (p - i), slope[i]


def blur(a):
    """(1, 2, 1)/4 along both axes, edges repeated."""
    for axis in (0, 1):
        a = np.moveaxis(a, axis, 0)
        a = np.moveaxis((np.concatenate([a[:1], a[:-1]]) + a * 2.0 + np.concatenate([a[1:], a[-1:]])) * 0.25, 0, axis)
    return a


def relief(height, light, px):
    """Brightness factor of a height field lit from the unit vector `light` = (x, y)."""
    dx = np.empty_like(height)
    dy = np.empty_like(height)
    dx[:, 1:-1], dx[:, 0], dx[:, -1] = height[:, 2:] - height[:, :-2], 0, 0
    dy[1:-1], dy[0], dy[-1] = height[2:] - height[:-2], 0, 0
    s = (dx * -light[0] + dy * -light[1]) * (-0.5 / px)
    return 1.0 + s / np.sqrt(1.0 + s * s * 2.5)                         # bounded: 0.37..1.63


def tint(rgb, mask, colour, strength=1.0):
    """Move rgb (h, w, 3) towards colour by mask (h, w)."""
    m = (mask * strength)[..., None]
    rgb *= 1.0 - m
    rgb += m * np.array(colour, np.float32)


class Frame:
    """Coordinates of a defect: x, y (h, w) from -ex..ex, -ey..ey over its box, the shorter side being -1..1."""

    def __init__(self, h, w, light, zoom=1.0, dx=0.0, dy=0.0):
        short = min(h, w)
        self.h, self.w, self.light = h, w, light
        self.px = 2.0 * zoom / short                                   # frame units per pixel
        self.ex, self.ey = w / short, h / short
        x = ((np.arange(w) + 0.5) * (2.0 / short) - self.ex) * zoom + dx
        y = ((np.arange(h) + 0.5) * (2.0 / short) - self.ey) * zoom + dy
        self.x = np.broadcast_to(x.astype(np.float32), (h, w))
        self.y = np.broadcast_to(y.astype(np.float32)[:, None], (h, w))

    def inside(self, dice, soft=0.12):
        """1 inside the box, falling to 0 before its border, so that what is painted ends in the box."""
        d = np.minimum(self.ex - np.abs(self.x), self.ey - np.abs(self.y)) + self.fbm(dice, 5, octaves=3) * (soft * 0.5)
        return smooth(0.05, 0.05 + soft, d)

    def fbm(self, dice, cells, **kw):
        return fbm(dice, self.h, self.w, cells, **kw)


def concrete(dice, h, w, unit, light):
    """A lit concrete surface (h, w, 3) float32, about 0..1; `unit` is the width in pixels of a typical 64-pixel view."""
    n = min(h, w) / unit                                               # views along the shorter side
    lum = 1.0 + fbm(dice, h, w, 1.5 * n, octaves=4) * dice.uniform(0.03, 0.11)
    lum += fbm(dice, h, w, 14 * n, octaves=3, gain=0.7) * dice.uniform(0.02, 0.055)
    x = ((np.arange(w) + 0.5) / unit).astype(np.float32)
    y = ((np.arange(h) + 0.5) / unit).astype(np.float32)
    if dice.chance(0.35):                                              # marks of the formwork's boards
        step, at, across = dice.uniform(0.3, 0.8), dice.uniform(0, 1), dice.chance(0.5)
        p = (y if across else x) * (1.0 / step) + at
        k = np.floor(p).astype(np.int64)
        shade = (dice.array(int(k[-1]) + 1) * 0.1 - 0.05)[k] - smooth(0.04, 0.0, np.minimum(p - k, 1 - (p - k))) * dice.uniform(0.04, 0.16)
        lum += shade[:, None] if across else shade[None]
    if dice.chance(0.4):                                               # dirt washed down
        lum -= np.clip(fbm(dice, h, w, 7 * n, stretch=7), 0, 1) * dice.uniform(0.05, 0.16)
    for _ in range(min(4000, int(dice.uniform(0, 9) * h * w / unit / unit + 0.5))):      # blow holes
        r = dice.uniform(0.006, 0.022) * unit
        cx, cy = dice.uniform(0, w), dice.uniform(0, h)
        x0, x1, y0, y1 = max(0, int(cx - 2 * r - 1)), int(cx + 2 * r + 2), max(0, int(cy - 2 * r - 1)), int(cy + 2 * r + 2)
        gx = np.arange(x0, min(w, x1)) + 0.5 - cx
        gy = (np.arange(y0, min(h, y1)) + 0.5 - cy)[:, None]
        d2 = (gx * gx + gy * gy) / (r * r)
        side = (gx * light[0] + gy * light[1]) / r                     # the wall away from the light is lit
        lum[y0:y1, x0:x1] += (smooth(1.3, 0.5, d2) * np.clip(-0.25 - side * 0.3, -0.5, 0.05)).astype(np.float32)
    tone, warm, green = dice.uniform(0.42, 0.78), dice.uniform(-0.02, 0.055), dice.uniform(-0.012, 0.012)
    patch = fbm(dice, h, w, 2.5 * n, octaves=3) * 0.012                # the hue wanders a little too
    rgb = np.empty((h, w, 3), np.float32)
    rgb[..., 0] = lum * (tone * (1 + warm)) + patch
    rgb[..., 1] = lum * (tone * (1 + green))
    rgb[..., 2] = lum * (tone * (1 - warm)) - patch
    return rgb


def paint_crack(rgb, f, dice):
    sx, sy = dice.uniform(0.15, 1) * f.ex, dice.uniform(0.15, 1) * f.ey * (1 if dice.chance(0.5) else -1)
    r = (sx * sx + sy * sy) ** 0.5
    dx, dy = sx / r, sy / r
    a, b = f.x * dx + f.y * dy, f.y * dx - f.x * dy
    reach = (f.ex * f.ex + f.ey * f.ey) ** 0.5 * 1.6
    off, slope = wave(dice, a, reach, dice.integer(4, 7), octaves=6)
    amp = dice.uniform(0.12, 0.28)
    shift = dice.uniform(-0.3, 0.3)
    half = max(dice.uniform(0.017, 0.05), 0.7 * f.px)
    width, _ = wave(dice, a, reach, 12, octaves=3)
    lines = [(np.abs(b - shift - off * amp) / np.sqrt(1.0 + slope * slope * (amp * amp)), half * np.clip(0.75 + 0.5 * width, 0.3, 2))]
    for _ in range(dice.integer(0, 3)):                                # branches leave the crack and thin out
        a0, way, k, long = dice.uniform(-0.8, 0.8), dice.integer(0, 1) * 2 - 1, dice.uniform(0.5, 1.6) * (dice.integer(0, 1) * 2 - 1), dice.uniform(0.4, 1.3)
        wob, slope2 = wave(dice, a, reach, 8, octaves=5)
        at0 = float(off.reshape(-1)[int(np.argmin(np.abs(a - a0)))])
        s = (a - a0) * way
        bend = at0 * amp + shift + s * k + (wob + off * 0.5) * np.clip(s * 4, 0, 1) * 0.16
        lines.append((np.abs(b - bend) / (1.0 + k * k) ** 0.5 + np.where(s < 0, -s, 0) * 2, half * 0.7 * smooth(long, 0.0, s) - np.where(s > long, 1, 0)))
    dark = 0.0
    for d, wd in lines:
        dark = np.maximum(dark, smooth(0.6, -0.6, (d - wd) * (1.0 / f.px)) * np.clip(wd * (1.0 / half) + 0.3, 0, 1))
    dark = dark * f.inside(dice)
    d = lines[0][0]
    halo = smooth(half * 5, half, d) * dice.uniform(-0.1, 0.06)        # dust or damp along the edges
    rgb *= 1.0 + (halo * f.inside(dice))[..., None]
    tint(rgb, dark, [v * dice.uniform(0.8, 1.2) for v in (0.11, 0.10, 0.09)], dice.uniform(0.8, 0.97))


def paint_rust(rgb, f, dice):
    field = f.fbm(dice, 2.5, stretch=1.5, octaves=5, gain=0.65)
    fine = f.fbm(dice, 9, stretch=3.5, octaves=4, gain=0.65)
    spots = 0.0
    for _ in range(dice.integer(1, 3)):
        cx, cy = dice.uniform(-0.6, 0.6) * f.ex, dice.uniform(-0.8, 0.1) * f.ey
        rx, ry = dice.uniform(0.15, 0.55), dice.uniform(0.12, 0.4)
        u, v = (f.x - cx) / rx, (f.y - cy) / ry
        spots = np.maximum(spots, smooth(1.9, -0.5, np.sqrt(u * u + v * v) + field * 0.55 + fine * 0.2))
        for _ in range(dice.integer(1, 5)):                            # streaks run down from the spot
            sx, wide, long = cx + dice.uniform(-0.9, 0.9) * rx, dice.uniform(0.05, 0.22), dice.uniform(0.5, 1.9) * f.ey
            wob, _ = wave(dice, f.y, 2 * f.ey + 1, 4)
            g = np.abs(f.x - sx - wob * 0.07) / wide
            fall = smooth(cy - 0.2, cy + 0.15, f.y) * smooth(cy + long, cy - 0.2, f.y)
            spots = np.maximum(spots, smooth(1.5, -0.2, g + fine * 0.35) * fall * dice.uniform(0.5, 1.0))
    m = np.clip(spots * (1.0 + 0.3 * fine) - 0.05, 0, 1) * f.inside(dice, 0.25)
    lum = np.clip(rgb[..., 1], 0.15, 1.0)[..., None]
    hue = dice.uniform(0, 1)
    thin = np.array([1.12, 0.85 - 0.04 * hue, 0.55 - 0.08 * hue], np.float32)       # a wash of rust lets the concrete through
    thick = np.array([0.80, 0.40 + 0.05 * hue, 0.18 + 0.05 * hue], np.float32)
    crust = np.array([0.36, 0.22, 0.14], np.float32)
    a = (smooth(0.0, 0.45, m))[..., None]
    b = (smooth(0.25, 0.8, m) * np.float32(dice.uniform(0.7, 1.0)))[..., None]
    c = (smooth(0.7, 1.0, m + fine * 0.12) * np.float32(dice.uniform(0.2, 0.8)))[..., None]
    rgb *= 1 - a
    rgb += a * ((thin * (1 - b) + thick * b) * (1 - c) + crust * c) * lum


def paint_bloom(rgb, f, dice):
    """Efflorescence: white salts, as a curtain below a joint and as crusts."""
    inside = f.inside(dice)
    rough = f.fbm(dice, 7, octaves=5, gain=0.65)
    fine = f.fbm(dice, 9, stretch=4, octaves=4, gain=0.6)
    wob, _ = wave(dice, f.x, 2 * f.ex + 1, 4)
    top = dice.uniform(-0.75, -0.1) * f.ey
    seam = top + wob * 0.12 + f.x * dice.uniform(-0.35, 0.35)
    long, _ = wave(dice, f.x, 2 * f.ex + 1, dice.integer(14, 30), octaves=3)
    long = np.clip(0.45 + 0.75 * long, 0.06, 3) * dice.uniform(0.5, 1.3) * f.ey
    below = f.y - seam
    m = smooth(-0.08, 0.04, below + rough * 0.04) * smooth(1.0, 0.35, below / long + fine * 0.25)
    for _ in range(dice.integer(0, 4)):
        cx, cy, r = dice.uniform(-0.8, 0.8) * f.ex, dice.uniform(-0.7, 0.7) * f.ey, dice.uniform(0.1, 0.35)
        u, v = (f.x - cx) / r, (f.y - cy) / r
        m = np.maximum(m, smooth(1.3, 0.5, u * u + v * v + rough * 0.8))
    damp = smooth(-0.25, 0.05, below) * smooth(2.2, 0.4, below / long + rough * 0.2)
    rgb *= 1.0 - (damp * inside * dice.uniform(0.1, 0.35))[..., None]
    m = np.clip(m * (1.0 + 0.45 * rough), 0, 1) * inside
    shade = relief(blur(blur(m)) * 0.035 + m * rough * 0.015, f.light, f.px)
    white = np.array([0.95, 0.945, 0.92 - dice.uniform(0, 0.06)], np.float32) * np.float32(dice.uniform(0.9, 1.0))
    veil = smooth(-0.12, 0.1, below) * smooth(1.5, 0.2, below / long + fine * 0.45) * np.clip(0.6 + rough * 0.5, 0, 1) * inside
    thick = smooth(0.1, dice.uniform(0.6, 1.3), m + fine * 0.12 * m) * dice.uniform(0.75, 0.96)
    a = np.maximum(veil * dice.uniform(0.2, 0.6), thick).astype(np.float32)[..., None]
    rgb *= 1 - a
    rgb += a * white * (shade * (1.0 + 0.06 * rough))[..., None]


def stones(dice, h, w, cells):
    """Jittered-grid Worley cells: distance to the nearest point (0 centre, about 1 border) and a random number per cell."""
    cy, cx = max(1, int(cells * h / min(h, w) + 0.5)), max(1, int(cells * w / min(h, w) + 0.5))
    jy, jx, tone = dice.array(cy + 2, cx + 2), dice.array(cy + 2, cx + 2), dice.array(cy + 2, cx + 2)
    y = ((np.arange(h) + 0.5) * (cy / h)).astype(np.float32)[:, None]
    x = ((np.arange(w) + 0.5) * (cx / w)).astype(np.float32)[None]
    iy, ix = y.astype(np.int64), x.astype(np.int64)
    best, pick = np.full((h, w), 9, np.float32), np.zeros((h, w), np.float32)
    for oy in (0, 1, 2):
        for ox in (0, 1, 2):
            ky, kx = iy + oy, ix + ox
            dy, dx = y - (ky - 1) - jy[ky, kx], x - (kx - 1) - jx[ky, kx]
            d = (dx * dx + dy * dy).astype(np.float32)
            closer = d < best
            best, pick = np.where(closer, d, best), np.where(closer, tone[ky, kx], pick)
    return np.sqrt(best), pick


def _broken(rgb, f, dice, mask, depth):
    """Turn the surface under mask (h, w) into a broken one: aggregate, a lit rim and a shaded one."""
    big, tone = stones(dice, f.h, f.w, dice.uniform(7, 12))
    rough = f.fbm(dice, 6, octaves=5, gain=0.7)
    stone = smooth(0.62, 0.42, big) * smooth(0.3, 0.4, tone)           # some cells hold a stone, the others mortar
    height = mask * (-depth + rough * 0.018 + stone * 0.022 + blur(blur(mask)) * (-depth * 0.5))
    shade = relief(blur(height), f.light, f.px)
    base = float(dice.uniform(0.75, 1.05))
    warm = dice.uniform(0.0, 0.1)
    face = (base + (tone - 0.5) * stone * 0.55 + rough * 0.10)[..., None] * np.array([1 + warm, 1.0, 1 - warm * 1.2], np.float32)
    level = float(rgb[..., 1].min()) * 0.3 + float(rgb[..., 1].max()) * 0.6
    m = mask[..., None]
    rgb *= 1 - m
    rgb += m * face * level
    rgb *= (1.0 + (shade - 1.0) * 0.8)[..., None]


def paint_spall(rgb, f, dice):
    cx, cy = dice.uniform(-0.15, 0.15) * f.ex, dice.uniform(-0.15, 0.15) * f.ey
    ax, ay = dice.uniform(0.6, 0.9) * f.ex, dice.uniform(0.6, 0.9) * f.ey
    u, v = (f.x - cx) / ax, (f.y - cy) / ay
    edge = f.fbm(dice, 2.5, octaves=5, gain=0.55)
    d = np.sqrt(u * u + v * v) + edge * 0.28
    mask = smooth(1.0 + f.px, 1.0 - f.px, d) * (f.inside(dice, 0.05) > 0.5).astype(np.float32)
    _broken(rgb, f, dice, blur(mask), dice.uniform(0.03, 0.09))
    away = f.light                                                     # the rim nearest to the light casts its shadow inwards
    k = max(1, int(dice.uniform(0.04, 0.10) / f.px + 0.5))
    shifted = move(mask, round_half(-away[0] * k), round_half(-away[1] * k))
    rgb *= 1.0 - (np.clip(mask - shifted, 0, 1) * dice.uniform(0.35, 0.6))[..., None]


def round_half(x):
    return int(x + 0.5) if x >= 0 else -int(0.5 - x)


def move(a, dx, dy):
    """a (h, w) moved by whole pixels, edges repeated."""
    h, w = a.shape
    return a[np.clip(np.arange(h) - dy, 0, h - 1)][:, np.clip(np.arange(w) - dx, 0, w - 1)]


def paint_bars(rgb, f, dice):
    """Exposed reinforcement: a long break with rusted ribbed bars lying in it."""
    upright = f.ey > 1.3 or (f.ex < 1.3 and dice.chance(0.5))
    a, b, la, lb = (f.y, f.x, f.ey, f.ex) if upright else (f.x, f.y, f.ex, f.ey)
    b = b + a * dice.uniform(-0.18, 0.18)                              # not quite along the axis
    count = dice.integer(1, 3)
    edge = f.fbm(dice, 3, octaves=5, gain=0.55)
    half = lb * dice.uniform(0.45, 0.75) if count == 1 else lb * dice.uniform(0.65, 0.9)
    u, v = a / (la * dice.uniform(0.85, 1.1)), b / half
    d = np.sqrt(u * u * u * u + v * v) + edge * 0.22
    mask = smooth(1.0 + f.px, 1.0 - f.px, d) * (f.inside(dice, 0.05) > 0.5).astype(np.float32)
    stain = smooth(1.5, 0.9, d + edge * 0.2) * f.inside(dice)
    rust = np.array([1.12, 0.86, 0.62], np.float32)
    rgb *= 1.0 + (stain * dice.uniform(0.2, 0.8))[..., None] * (rust - 1.0)
    _broken(rgb, f, dice, blur(mask), dice.uniform(0.04, 0.1))
    k = max(1, int(0.07 / f.px + 0.5))
    shifted = move(mask, round_half(-f.light[0] * k), round_half(-f.light[1] * k))
    rgb *= 1.0 - (np.clip(mask - shifted, 0, 1) * 0.5)[..., None]
    light_b = f.light[0] if upright else f.light[1]
    fine = f.fbm(dice, 10, octaves=4, gain=0.7)
    radius = dice.uniform(0.09, 0.15)
    pitch = radius * dice.uniform(0.7, 1.1)
    hue, lean = dice.uniform(0, 1), dice.uniform(-0.8, 0.8)
    bars = []
    if dice.chance(0.5):                                               # a stirrup crosses below the bars
        bars.append((b, a - dice.uniform(-0.5, 0.5) * la, radius * 0.65, f.light[1] if upright else f.light[0]))
    for i in range(count):
        c = ((i + 0.5) / count * 2 - 1) * half * 0.85 + dice.uniform(-0.08, 0.08)
        bars.append((a, b - c - wave(dice, a, 2 * la + 1, 3)[0] * 0.03, radius * dice.uniform(0.85, 1.1), light_b))
    for along, across, r, lit in bars:
        t = across / r
        shadow = smooth(2.2, 0.6, np.abs(t + lit * 0.9)) * mask
        rgb *= 1.0 - (shadow * 0.6)[..., None]
        p = along / pitch + t * lean
        rib = np.abs(p - np.floor(p) - 0.5) * 2                        # 0 in the rib's middle
        body = smooth(1.0 + f.px / r, 1.0 - f.px / r, np.abs(t)) * mask
        round_ = np.sqrt(np.clip(1.0 - t * t * 0.95, 0, 1))
        shade = (0.35 + 0.65 * round_) * (1.0 + t * lit * -0.45) * (1.12 - 0.3 * smooth(0.3, 0.7, rib)) * (1 + fine * 0.28)
        colour = np.array([0.45, 0.28 + 0.06 * hue, 0.18 + 0.1 * hue], np.float32)
        m = body[..., None]
        rgb *= 1 - m
        rgb += m * shade[..., None] * colour


PAINT = {"CorrosionStain": paint_rust, "Crack": paint_crack, "Efflorescence": paint_bloom, "ExposedBars": paint_bars, "Spallation": paint_spall}


def light_from(dice):
    """Direction (x, y) towards the light: from above, more or less aslant."""
    t = dice.uniform(-0.5, 0.5)
    return 2 * t / (1 + t * t), -(1 - t * t) / (1 + t * t)


def finish(rgb, dice):
    """Uneven light, exposure and sensor noise: float (h, w, 3) -> uint8."""
    h, w, _ = rgb.shape
    x = (((np.arange(w) + 0.5) / w) * 2 - 1).astype(np.float32)
    y = ((((np.arange(h) + 0.5) / h) * 2 - 1).astype(np.float32))[:, None]
    fall = 1.0 + x * dice.uniform(-0.14, 0.14) + y * dice.uniform(-0.14, 0.14) - (x * x + y * y) * dice.uniform(0, 0.08)
    fall = fall * dice.uniform(0.85, 1.12)
    grain, chroma = dice.uniform(0.008, 0.03), dice.uniform(0.003, 0.012)
    out = np.empty((h, w, 3), np.uint8)
    step = max(1, 2 ** 20 // w)
    for r in range(0, h, step):                                        # strips: the noise of a large photo need not be held at once
        part = rgb[r:r + step] * fall[r:r + step, :, None]
        n = part.shape[0]
        g = (dice.array(n, w) + dice.array(n, w) - 1.0) * (2 * grain)
        part += g[..., None]
        part += (dice.array(n, w, 3) - 0.5) * (3 * chroma)
        part *= 255.0
        out[r:r + step] = (np.clip(part, 0, 255) + 0.5).astype(np.uint8)
    return out


def render(kind, size, dice):
    """One photograph-like patch of a defect, (size, size, 3) uint8, drawn at double resolution."""
    n = 2 * size
    light = light_from(dice)
    rgb = concrete(dice.fork(), n, n, n, light)
    frame = Frame(n, n, light, zoom=dice.uniform(0.7, 0.95), dx=dice.uniform(-0.15, 0.15), dy=dice.uniform(-0.15, 0.15))
    PAINT[kind](rgb, frame, dice.fork())
    if dice.chance(0.3):                                               # slightly out of focus
        rgb = blur(rgb)
    rgb = (rgb[0::2, 0::2] + rgb[1::2, 0::2] + rgb[0::2, 1::2] + rgb[1::2, 1::2]) * np.float32(0.25)
    return finish(rgb, dice.fork())


def synthetic(n=500, size=64, seed=0):
    """Render concrete defects: (images uint8 (n, size, size, 3), labels int64 (n,), the five class names).

    Image k shows class k % 5 and depends on (k, size, seed) only, so a larger n continues a smaller one; the bytes are the
    same on every platform and NumPy. size >= 8, seed >= 0.
    """
    if size < 8 or seed < 0 or n < 0:
        raise ValueError(f"synthetic needs size >= 8, seed >= 0 and n >= 0, not size={size}, seed={seed}, n={n}")
    labels = np.arange(n, dtype=np.int64) % len(CLASSES)
    images = np.empty((n, size, size, 3), np.uint8)
    for k in range(n):
        images[k] = render(CLASSES[labels[k]], size, Dice(seed, k))
    return images, labels, list(CLASSES)


# ---- a data set without any download --------------------------------------------------------------------------------

DEMO_SIZES = [(1600, 1200), (2272, 1704), (1200, 1600), (1280, 960), (1752, 2632), (2816, 2112)]      # width, height; all occur in CODEBRIM
DEMO_DEFECTS = [                                                       # weight, painters in order, flags
    (34, ("Crack",), ("Crack",)),
    (15, ("ExposedBars",), ("Spallation", "ExposedBars", "CorrosionStain")),
    (9, ("ExposedBars",), ("Spallation", "ExposedBars")),
    (13, ("Efflorescence",), ("Efflorescence",)),
    (14, ("Spallation",), ("Spallation",)),
    (10, ("CorrosionStain",), ("CorrosionStain",)),
    (3, ("Spallation", "CorrosionStain"), ("Spallation", "CorrosionStain")),
    (2, ("Efflorescence", "Crack"), ("Crack", "Efflorescence")),
]
FLAGS = ["Background", "Crack", "Spallation", "Efflorescence", "ExposedBars", "CorrosionStain"]       # CODEBRIM's order in <Defect>


def demo_photo(k, seed):
    """Photo k of the demo: (uint8 (h, w, 3), boxes as (xmin, ymin, xmax, ymax, flags), 1-based inclusive). Every sixth has no defect."""
    dice = Dice(seed, key("demo"), k)
    w, h = DEMO_SIZES[k % len(DEMO_SIZES)]
    light = light_from(dice)
    rgb = concrete(dice.fork(), h, w, 420.0, light)
    boxes = []
    for _ in range(0 if k % 6 == 5 else dice.integer(4, 9)):
        pick = dice.integer(1, sum(d[0] for d in DEMO_DEFECTS))
        for weight, painters, flags in DEMO_DEFECTS:
            pick -= weight
            if pick <= 0:
                break
        for _ in range(20):                                            # a place that is free
            bw, bh = dice.integer(90, 330), dice.integer(90, 330)
            x, y = dice.integer(0, w - bw), dice.integer(0, h - bh)
            if all(x + bw + 20 < a or c + 20 < x or y + bh + 20 < b or d + 20 < y for a, b, c, d, _ in boxes):
                part = rgb[y:y + bh, x:x + bw]
                for name in painters:
                    PAINT[name](part, Frame(bh, bw, light), dice.fork())
                boxes.append((x + 1, y + 1, x + bw, y + bh, flags))
                break
    return finish(rgb, dice.fork()), boxes


def demo_xml(name, width, height, boxes):
    """The text of an annotation as CODEBRIM writes it."""
    lines = ["<?xml version='1.0' encoding='UTF-8'?>", "<annotation>", "\t<folder>images</folder>", f"\t<filename>{name}</filename>",
             "\t<size>", f"\t\t<width>{width}</width>", f"\t\t<height>{height}</height>", "\t\t<depth>3</depth>", "\t</size>"]
    for xmin, ymin, xmax, ymax, flags in boxes:
        lines += ["\t<object>", "\t\t<name>defect</name>", "\t\t<difficult>0</difficult>", "\t\t<bndbox>"]
        lines += [f"\t\t\t<{t}>{v}</{t}>" for t, v in zip(("xmin", "ymin", "xmax", "ymax"), (xmin, ymin, xmax, ymax))]
        lines += ["\t\t</bndbox>", "\t\t<Defect>"] + [f"\t\t\t<{f}>{int(f in flags)}</{f}>" for f in FLAGS] + ["\t\t</Defect>", "\t</object>"]
    return "\n".join([*lines, "</annotation>", ""])


def demo(target, n_photos=36, seed=0, workers=1):
    """Render an original_dataset of n_photos into the new folder `target`; returns the number of boxes."""
    with whole_or_not(target) as work:
        (work / "images").mkdir()
        (work / "annotations").mkdir()

        def make(k):
            pixels, boxes = demo_photo(k, seed)
            name = f"image_{k + 1:07d}"
            exif = Image.Exif()
            if k % 8 == 4:
                exif[0x0112] = 3                                       # as some of CODEBRIM's: shown turned, boxes in stored pixels
            Image.fromarray(pixels).save(work / "images" / f"{name}.jpg", quality=92, exif=exif)
            if boxes:
                text = demo_xml(f"{name}.jpg", pixels.shape[1], pixels.shape[0], boxes)
                (work / "annotations" / f"{name}.xml").write_text(text, encoding="utf-8", newline="\n")
            return len(boxes)

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures, progress, total = [pool.submit(make, k) for k in range(n_photos)], Progress("photos rendered, {} boxes"), 0
            try:
                for k, future in enumerate(futures):
                    total += future.result()
                    progress(k + 1, n_photos, total)
            finally:
                for future in futures:
                    future.cancel()
    return total


# ---- command line ---------------------------------------------------------------------------------------------------

def one_line(message):
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))     # a file's name may hold anything
    print(f"crop_codebrim.py: {text}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(one_line(f"{message} (--help lists the flags)"))


def at_least(least, most=None):
    def integer(text):
        value = int(text)
        if value < least or most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at least {least}{f' and at most {most}' if most else ''}, not {value}")
        return value
    return integer


def some_path(text):
    if not text:                                                       # as a path it would be the working folder
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def split_shares(text):
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


def main(argv=None):
    argv = [re.sub("_", "-", a.split("=")[0]) + a[len(a.split("=")[0]):] if a.startswith("--") else a for a in (sys.argv[1:] if argv is None else argv)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    p = Parser(prog="crop_codebrim.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("source", nargs="?", help="folder with photos and their VOC XML files, searched recursively; never written to")
    p.add_argument("target", nargs="?", help="new folder for the crops")
    p.add_argument("--n", type=at_least(0), default=2642, help="crops of boxes in all, over all splits (default 2642, as in the paper)")
    p.add_argument("--size", type=at_least(8), default=64, help="side of a crop in pixels (default 64)")
    p.add_argument("--seed", type=at_least(0), default=0, help="the same seed and data give the same files (default 0)")
    p.add_argument("--workers", type=at_least(1, 256), default=min(cores, 16), help="photos decoded at a time (default: the number of cores, at most 16)")
    p.add_argument("--window", choices=("native", "box"), default="native",
                   help="native: --size pixels of the photo at full scale (default); box: a square of 0.5 to 1 of the box's shorter side, antialiased to --size")
    p.add_argument("--label", choices=("rarest", "single", "random"), default="rarest",
                   help="class of a crop whose box has several: the one rarest in the whole set (default); single: leave such boxes out; random: any of them")
    p.add_argument("--balance", action="store_true", help="equally many crops per class (default: every box equally often)")
    p.add_argument("--background", type=at_least(0), default=0, metavar="K", help="K further crops, class Background, of annotated photos, touching no box (default 0)")
    p.add_argument("--small", choices=("around", "skip"), default="around", help="boxes with a side under --size: the window covers that side (around, default), or skip them")
    p.add_argument("--split", type=split_shares, metavar="train=0.8,val=0.1,test=0.1", help="assign photos to splits before cropping; writes TARGET/train/<class>/ ... (default: no split)")
    p.add_argument("--sheet", type=some_path, metavar="sheet.png", help="also write a contact sheet, a row per class")
    p.add_argument("--demo", type=some_path, metavar="DIR", help="render a synthetic original_dataset into the new folder DIR instead of cropping (reads --seed, --workers, --photos)")
    p.add_argument("--photos", type=at_least(1, 10 ** 6), default=None, metavar="K", help="photos of the demo (default 36)")
    a = p.parse_intermixed_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")              # file names that are no text must not end the run
    try:
        if a.demo:
            if a.source or a.target:
                return one_line("--demo renders a data set and crops nothing: leave out the two folders, then run again without --demo")
            unread = [k for k in vars(a) if k not in ("demo", "seed", "workers", "photos") and getattr(a, k) != p.get_default(k)]
            if unread:
                return one_line(f"--{unread[0]} has no meaning with --demo, which crops nothing: give it to the run that crops")
            started = time.monotonic()
            n_photos = a.photos or 36
            n_boxes = demo(a.demo, n_photos, a.seed, a.workers)
            print(f"{n_photos} photos with {n_boxes} boxes in {a.demo}, {time.monotonic() - started:.1f} s; next: python crop_codebrim.py {a.demo} crops")
            return 0
        if a.photos:
            return one_line("--photos belongs to --demo")
        if not a.source or not a.target:
            return one_line("two folders are needed: python crop_codebrim.py original_dataset/ crops/ (or --demo original_dataset/)")
        if not a.n and not a.background:
            return one_line("--n 0 without --background leaves nothing to crop")
        choices = {k: getattr(a, k) for k in ("n", "size", "seed", "workers", "window", "label", "balance", "background", "small", "split")}
        crop_folder(a.source, a.target, a.sheet, **choices)
        return 0
    except CropError as e:
        return one_line(e)
    except OSError as e:
        return one_line(f"{e.filename or ''}: {e.strerror or e}")
    except ValueError as e:                                            # a null character in a path
        if "null" not in str(e):
            raise
        return one_line(e)
    except KeyboardInterrupt:
        return 130


def on_term(signum, frame):
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, on_term)
    sys.exit(main())
