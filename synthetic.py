"""Rendered concrete with five kinds of defects: the set that okd_train.py trains on without --data, and a tree of
photos with boxes.

    python synthetic.py original_dataset/                       # 36 photos and their XML, in CODEBRIM's format
    python crop_codebrim.py original_dataset/ crops/ --window box

The photos have 1.2 to 6 megapixels; cracks, rust, efflorescence, spalls and exposed bars in boxes of one to three
classes; some are turned by EXIF, every sixth has no annotation. They exercise every step of the way from photos to a
report; what is learnt from them says nothing about bridges.

As a library:

    from synthetic import synthetic
    images, labels, classes = synthetic(500, size=64)           # uint8 (500, 64, 64, 3), int64 (500,), five names

Needs crop_codebrim.py beside it. Only + - * / sqrt, comparisons and crop_codebrim.Dice are used to render, and no
float32 scalar meets a Python float: so the bytes are the same on every platform and under NumPy 1.26 and 2.x. Nobody
promises the last bit of sin or exp.
"""
import argparse
import concurrent.futures
import functools
import importlib.util
import os
import shlex
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while numpy is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import numpy as np
from PIL import Image


class MissingFile(ImportError):
    """A file of ours is not beside this one; one line that says so."""


def beside(name):
    """Our own module `name` from the folder of this file, whatever else is called so. Raises MissingFile."""
    path = Path(__file__).resolve().with_name(f"{name}.py")
    if not path.is_file():
        raise MissingFile(f"rendering needs {path.name} beside {Path(__file__).name}; it is not in {path.parent}")
    try:
        found = importlib.util.find_spec(name)                         # found, not run
        free = found is None or Path(found.origin or "").resolve() == path
    except ValueError:                                                 # a module made by hand has the name
        free = False
    name = name if free else f"okd_gan.{name}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


try:
    crop_codebrim = beside("crop_codebrim")
except MissingFile as e:
    if __name__ != "__main__":
        raise
    crop_codebrim, missing = None, str(e)                              # --help still works

CLASSES = ["CorrosionStain", "Crack", "Efflorescence", "ExposedBars", "Spallation"]     # sorted: label order
FLAGS = ["Background", "Crack", "Spallation", "Efflorescence", "ExposedBars", "CorrosionStain"]    # CODEBRIM's order
SIZES = [(1600, 1200), (2272, 1704), (1200, 1600), (1280, 960), (1752, 2632), (2816, 2112)]    # all occur in CODEBRIM
DEFECTS = [                     # weight, painters in order, flags: about CODEBRIM's frequencies of flag sets
    (34, ("Crack",), ("Crack",)),
    (15, ("ExposedBars",), ("Spallation", "ExposedBars", "CorrosionStain")),
    (9, ("ExposedBars",), ("Spallation", "ExposedBars")),
    (13, ("Efflorescence",), ("Efflorescence",)),
    (14, ("Spallation",), ("Spallation",)),
    (10, ("CorrosionStain",), ("CorrosionStain",)),
    (3, ("Spallation", "CorrosionStain"), ("Spallation", "CorrosionStain")),
    (2, ("Efflorescence", "Crack"), ("Crack", "Efflorescence")),
]


# ---- small pictures --------------------------------------------------------------------------------------------------

def synthetic(n=500, size=64, seed=0):
    """Render concrete defects: (images uint8 (n, size, size, 3), labels int64 (n,), the five class names).

    Image k shows class k % 5 and depends on (k, size, seed) only, so a larger n continues a smaller one; the bytes are
    the same on every platform and NumPy. size >= 8, seed >= 0, n >= 0, else ValueError.
    """
    if size < 8 or seed < 0 or n < 0:
        raise ValueError(f"synthetic needs size >= 8, seed >= 0 and n >= 0, not size={size}, seed={seed}, n={n}")
    labels = np.arange(n, dtype=np.int64) % len(CLASSES)
    images = np.empty((n, size, size, 3), np.uint8)
    for k in range(n):
        images[k] = render(CLASSES[labels[k]], size, crop_codebrim.Dice(seed, k))
    return images, labels, list(CLASSES)


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


# ---- a tree of photos with boxes -------------------------------------------------------------------------------------

def render_tree(target, n_photos=36, seed=0, workers=1):
    """Render n_photos with their annotations into the new folder `target`; returns the number of boxes.

    Photo k depends on (k, seed) only. Raises crop_codebrim.CropError where target holds something already.
    """
    with crop_codebrim.whole_or_not(target) as work, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        (work / "images").mkdir()
        (work / "annotations").mkdir()
        futures = [pool.submit(write_photo, work, k, seed) for k in range(n_photos)]
        progress, total = crop_codebrim.Progress("photos rendered, {} boxes"), 0
        try:
            for k, future in enumerate(futures):
                total += future.result()
                progress(k + 1, n_photos, total)
        finally:
            for future in futures:
                future.cancel()
    return total


def write_photo(work, k, seed):
    """Photo k as images/*.jpg and, if it has boxes, annotations/*.xml below `work`; returns the number of boxes."""
    pixels, boxes = photo(k, seed)
    name = f"image_{k + 1:07d}"
    exif = Image.Exif()
    if k % 8 == 4:
        exif[0x0112] = 3                                               # as some of CODEBRIM's: shown turned
    Image.fromarray(pixels).save(work / "images" / f"{name}.jpg", quality=92, exif=exif)
    if boxes:
        text = annotation(f"{name}.jpg", pixels.shape[1], pixels.shape[0], boxes)
        (work / "annotations" / f"{name}.xml").write_text(text, encoding="utf-8", newline="\n")
    return len(boxes)


def photo(k, seed):
    """Photo k of the tree: (uint8 (h, w, 3), boxes as (xmin, ymin, xmax, ymax, flags), 1-based inclusive).

    Every sixth has no defect.
    """
    dice = crop_codebrim.Dice(seed, crop_codebrim.key("demo"), k)
    w, h = SIZES[k % len(SIZES)]
    light = light_from(dice)
    rgb = concrete(dice.fork(), h, w, 420.0, light)
    boxes = []
    for _ in range(0 if k % 6 == 5 else dice.integer(4, 9)):
        pick = dice.integer(1, sum(d[0] for d in DEFECTS))
        for weight, painters, flags in DEFECTS:
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


def annotation(name, width, height, boxes):
    """The text of an annotation as CODEBRIM writes it."""
    lines = ["<?xml version='1.0' encoding='UTF-8'?>", "<annotation>",
             "\t<folder>images</folder>", f"\t<filename>{name}</filename>",
             "\t<size>", f"\t\t<width>{width}</width>", f"\t\t<height>{height}</height>",
             "\t\t<depth>3</depth>", "\t</size>"]
    for xmin, ymin, xmax, ymax, flags in boxes:
        lines += ["\t<object>", "\t\t<name>defect</name>", "\t\t<difficult>0</difficult>",
                  "\t\t<bndbox>", f"\t\t\t<xmin>{xmin}</xmin>", f"\t\t\t<ymin>{ymin}</ymin>",
                  f"\t\t\t<xmax>{xmax}</xmax>", f"\t\t\t<ymax>{ymax}</ymax>", "\t\t</bndbox>",
                  "\t\t<Defect>", *[f"\t\t\t<{flag}>{int(flag in flags)}</{flag}>" for flag in FLAGS],
                  "\t\t</Defect>", "\t</object>"]
    return "\n".join([*lines, "</annotation>", ""])


# ---- the five defects ------------------------------------------------------------------------------------------------
# Each paints on rgb (h, w, 3) in place, within the box whose coordinates its Frame f holds.

def paint_crack(rgb, f, dice):
    """A crack across the box, with up to three branches."""
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
    middle = np.abs(b - shift - off * amp) / np.sqrt(1.0 + slope * slope * (amp * amp))
    lines = [(middle, half * np.clip(0.75 + 0.5 * width, 0.3, 2))]
    for _ in range(dice.integer(0, 3)):                                # branches leave the crack and thin out
        a0, way = dice.uniform(-0.8, 0.8), dice.integer(0, 1) * 2 - 1
        k, long = dice.uniform(0.5, 1.6) * (dice.integer(0, 1) * 2 - 1), dice.uniform(0.4, 1.3)
        wob, _ = wave(dice, a, reach, 8, octaves=5)
        at0 = float(off.reshape(-1)[int(np.argmin(np.abs(a - a0)))])
        s = (a - a0) * way
        bend = at0 * amp + shift + s * k + (wob + off * 0.5) * np.clip(s * 4, 0, 1) * 0.16
        branch = np.abs(b - bend) / (1.0 + k * k) ** 0.5 + np.where(s < 0, -s, 0) * 2
        lines.append((branch, half * 0.7 * smooth(long, 0.0, s) - np.where(s > long, 1, 0)))
    dark = 0.0
    for d, wd in lines:
        dark = np.maximum(dark, smooth(0.6, -0.6, (d - wd) * (1.0 / f.px)) * np.clip(wd * (1.0 / half) + 0.3, 0, 1))
    dark = dark * f.inside(dice)
    halo = smooth(half * 5, half, middle) * dice.uniform(-0.1, 0.06)   # dust or damp along the edges
    rgb *= 1.0 + (halo * f.inside(dice))[..., None]
    colour = np.array([v * dice.uniform(0.8, 1.2) for v in (0.11, 0.10, 0.09)], np.float32)
    m = (dark * dice.uniform(0.8, 0.97))[..., None]
    rgb *= 1.0 - m
    rgb += m * colour


def paint_rust(rgb, f, dice):
    """Corrosion stains: spots of rust, from which streaks run down."""
    field = f.fbm(dice, 2.5, stretch=1.5, octaves=5, gain=0.65)
    fine = f.fbm(dice, 9, stretch=3.5, octaves=4, gain=0.65)
    spots = 0.0
    for _ in range(dice.integer(1, 3)):
        cx, cy = dice.uniform(-0.6, 0.6) * f.ex, dice.uniform(-0.8, 0.1) * f.ey
        rx, ry = dice.uniform(0.15, 0.55), dice.uniform(0.12, 0.4)
        u, v = (f.x - cx) / rx, (f.y - cy) / ry
        spots = np.maximum(spots, smooth(1.9, -0.5, np.sqrt(u * u + v * v) + field * 0.55 + fine * 0.2))
        for _ in range(dice.integer(1, 5)):                            # streaks
            sx, wide, long = cx + dice.uniform(-0.9, 0.9) * rx, dice.uniform(0.05, 0.22), dice.uniform(0.5, 1.9) * f.ey
            wob, _ = wave(dice, f.y, 2 * f.ey + 1, 4)
            g = np.abs(f.x - sx - wob * 0.07) / wide
            fall = smooth(cy - 0.2, cy + 0.15, f.y) * smooth(cy + long, cy - 0.2, f.y)
            spots = np.maximum(spots, smooth(1.5, -0.2, g + fine * 0.35) * fall * dice.uniform(0.5, 1.0))
    m = np.clip(spots * (1.0 + 0.3 * fine) - 0.05, 0, 1) * f.inside(dice, 0.25)
    lum = np.clip(rgb[..., 1], 0.15, 1.0)[..., None]
    hue = dice.uniform(0, 1)
    thin = np.array([1.12, 0.85 - 0.04 * hue, 0.55 - 0.08 * hue], np.float32)      # a wash lets the concrete through
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
    veil = smooth(-0.12, 0.1, below) * smooth(1.5, 0.2, below / long + fine * 0.45)
    veil = veil * np.clip(0.6 + rough * 0.5, 0, 1) * inside
    thick = smooth(0.1, dice.uniform(0.6, 1.3), m + fine * 0.12 * m) * dice.uniform(0.75, 0.96)
    a = np.maximum(veil * dice.uniform(0.2, 0.6), thick).astype(np.float32)[..., None]
    rgb *= 1 - a
    rgb += a * white * (shade * (1.0 + 0.06 * rough))[..., None]


def paint_spall(rgb, f, dice):
    """Spallation: a shallow break in the surface."""
    cx, cy = dice.uniform(-0.15, 0.15) * f.ex, dice.uniform(-0.15, 0.15) * f.ey
    ax, ay = dice.uniform(0.6, 0.9) * f.ex, dice.uniform(0.6, 0.9) * f.ey
    u, v = (f.x - cx) / ax, (f.y - cy) / ay
    edge = f.fbm(dice, 2.5, octaves=5, gain=0.55)
    d = np.sqrt(u * u + v * v) + edge * 0.28
    mask = smooth(1.0 + f.px, 1.0 - f.px, d) * (f.inside(dice, 0.05) > 0.5).astype(np.float32)
    break_open(rgb, f, dice, blur(mask), dice.uniform(0.03, 0.09))
    rim_shadow(rgb, f, mask, dice.uniform(0.04, 0.10), dice.uniform(0.35, 0.6))


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
    break_open(rgb, f, dice, blur(mask), dice.uniform(0.04, 0.1))
    rim_shadow(rgb, f, mask, 0.07, 0.5)
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
        shade = (0.35 + 0.65 * round_) * (1.0 + t * lit * -0.45)
        shade = shade * (1.12 - 0.3 * smooth(0.3, 0.7, rib)) * (1 + fine * 0.28)
        colour = np.array([0.45, 0.28 + 0.06 * hue, 0.18 + 0.1 * hue], np.float32)
        m = body[..., None]
        rgb *= 1 - m
        rgb += m * shade[..., None] * colour


PAINT = {"CorrosionStain": paint_rust, "Crack": paint_crack, "Efflorescence": paint_bloom, "ExposedBars": paint_bars,
         "Spallation": paint_spall}


def break_open(rgb, f, dice, mask, depth):
    """Turn the surface under mask (h, w) into a broken one: aggregate, a lit rim and a shaded one."""
    big, tone = stones(dice, f.h, f.w, dice.uniform(7, 12))
    rough = f.fbm(dice, 6, octaves=5, gain=0.7)
    stone = smooth(0.62, 0.42, big) * smooth(0.3, 0.4, tone)           # some cells hold a stone, the others mortar
    height = mask * (-depth + rough * 0.018 + stone * 0.022 + blur(blur(mask)) * (-depth * 0.5))
    shade = relief(blur(height), f.light, f.px)
    base = float(dice.uniform(0.75, 1.05))
    warm = dice.uniform(0.0, 0.1)
    grey = base + (tone - 0.5) * stone * 0.55 + rough * 0.10
    face = grey[..., None] * np.array([1 + warm, 1.0, 1 - warm * 1.2], np.float32)
    level = float(rgb[..., 1].min()) * 0.3 + float(rgb[..., 1].max()) * 0.6
    m = mask[..., None]
    rgb *= 1 - m
    rgb += m * face * level
    rgb *= (1.0 + (shade - 1.0) * 0.8)[..., None]


def rim_shadow(rgb, f, mask, reach, strength):
    """The rim next to the light casts a shadow into the break under mask (h, w); reach in frame units."""
    k = max(1, int(reach / f.px + 0.5))
    shifted = move(mask, round_half(-f.light[0] * k), round_half(-f.light[1] * k))
    rgb *= 1.0 - (np.clip(mask - shifted, 0, 1) * strength)[..., None]


def stones(dice, h, w, cells):
    """Jittered-grid Worley cells: distance to the nearest point (about 1 at a border) and a random number per cell."""
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


def move(a, dx, dy):
    """a (h, w) moved by whole pixels, edges repeated."""
    h, w = a.shape
    return a[np.clip(np.arange(h) - dy, 0, h - 1)][:, np.clip(np.arange(w) - dx, 0, w - 1)]


def round_half(x):
    return int(x + 0.5) if x >= 0 else -int(0.5 - x)


# ---- surface, light and noise ----------------------------------------------------------------------------------------

def concrete(dice, h, w, unit, light):
    """A lit concrete surface (h, w, 3) float32, about 0..1; `unit`: pixels that a typical 64-pixel view is wide."""
    n = min(h, w) / unit                                               # views along the shorter side
    lum = 1.0 + fbm(dice, h, w, 1.5 * n, octaves=4) * dice.uniform(0.03, 0.11)
    lum += fbm(dice, h, w, 14 * n, octaves=3, gain=0.7) * dice.uniform(0.02, 0.055)
    x = ((np.arange(w) + 0.5) / unit).astype(np.float32)
    y = ((np.arange(h) + 0.5) / unit).astype(np.float32)
    if dice.chance(0.35):                                              # marks of the formwork's boards
        step, at, across = dice.uniform(0.3, 0.8), dice.uniform(0, 1), dice.chance(0.5)
        p = (y if across else x) * (1.0 / step) + at
        k = np.floor(p).astype(np.int64)
        shade = (dice.array(int(k[-1]) + 1) * 0.1 - 0.05)[k]
        shade = shade - smooth(0.04, 0.0, np.minimum(p - k, 1 - (p - k))) * dice.uniform(0.04, 0.16)
        lum += shade[:, None] if across else shade[None]
    if dice.chance(0.4):                                               # dirt washed down
        lum -= np.clip(fbm(dice, h, w, 7 * n, stretch=7), 0, 1) * dice.uniform(0.05, 0.16)
    for _ in range(min(4000, int(dice.uniform(0, 9) * h * w / unit / unit + 0.5))):      # blow holes
        r = dice.uniform(0.006, 0.022) * unit
        cx, cy = dice.uniform(0, w), dice.uniform(0, h)
        x0, x1 = max(0, int(cx - 2 * r - 1)), int(cx + 2 * r + 2)
        y0, y1 = max(0, int(cy - 2 * r - 1)), int(cy + 2 * r + 2)
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
    for r in range(0, h, step):                                        # strips: noise of a large photo takes memory
        part = rgb[r:r + step] * fall[r:r + step, :, None]
        n = part.shape[0]
        g = (dice.array(n, w) + dice.array(n, w) - 1.0) * (2 * grain)
        part += g[..., None]
        part += (dice.array(n, w, 3) - 0.5) * (3 * chroma)
        part *= 255.0
        out[r:r + step] = (np.clip(part, 0, 255) + 0.5).astype(np.uint8)
    return out


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


def relief(height, light, px):
    """Brightness factor of a height field lit from the unit vector `light` = (x, y)."""
    dx = np.empty_like(height)
    dy = np.empty_like(height)
    dx[:, 1:-1], dx[:, 0], dx[:, -1] = height[:, 2:] - height[:, :-2], 0, 0
    dy[1:-1], dy[0], dy[-1] = height[2:] - height[:-2], 0, 0
    s = (dx * -light[0] + dy * -light[1]) * (-0.5 / px)
    return 1.0 + s / np.sqrt(1.0 + s * s * 2.5)                         # bounded: 0.37..1.63


def blur(a):
    """(1, 2, 1)/4 along both axes, edges repeated."""
    for axis in (0, 1):
        a = np.moveaxis(a, axis, 0)
        a = np.moveaxis((np.concatenate([a[:1], a[:-1]]) + a * 2.0 + np.concatenate([a[1:], a[-1:]])) * 0.25, 0, axis)
    return a


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


def noise(dice, h, w, cy, cx):
    """Cubic B-spline noise (h, w), about -1..1, on a lattice of cy x cx cells."""
    cy, cx = max(1, int(cy)), max(1, int(cx))
    grid = dice.array(cy + 3, cx + 3) * 4.0 - 2.0
    (iy, wy), (ix, wx) = spline(h, cy), spline(w, cx)
    rows = sum(grid[iy + k] * wy[k][:, None] for k in range(4))        # (h, cx + 3)
    return sum(rows[:, ix + k] * wx[k] for k in range(4))              # (h, w)


@functools.lru_cache(maxsize=256)
def spline(n, cells):
    """Cubic B-splines at n pixels of a lattice of `cells`: the first of the four knots (n,), the weights (4, n)."""
    p = (np.arange(n) + 0.5) * (cells / n)
    i = np.floor(p)
    t = p - i
    s = 1 - t
    w = np.stack([s * s * s, (3 * t - 6) * t * t + 4, (3 * s - 6) * s * s + 4, t * t * t]) * (1 / 6)
    return i.astype(np.int64), w.astype(np.float32)


def wave(dice, x, reach, cells, octaves=4):
    """A one-dimensional fractal curve, about -1..1, read at x (any shape, -reach..reach); its slope comes second."""
    n = 1024
    table = fbm(dice, 1, n, cells / n, octaves=octaves, finest=0)[0]
    slope = (table[1:] - table[:-1]) * (n / (2.0 * reach))
    p = np.clip((x + reach) * (n / (2.0 * reach)), 0, n - 1.001)
    i = p.astype(np.int64)
    i = np.minimum(i, n - 2)
    return table[i] + (table[i + 1] - table[i]) * (p - i), slope[i]


def smooth(a, b, x):
    """Smoothstep from 0 at a to 1 at b (falling where a > b)."""
    t = np.clip((x - a) * (1.0 / (b - a)), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


# ---- command line ----------------------------------------------------------------------------------------------------

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if crop_codebrim is None and not {"-h", "--help"} & set(argv):
        print(f"synthetic.py: error: {missing}", file=sys.stderr)
        return 2
    # without crop_codebrim.py nothing but the help is asked for: it does not matter what the types are
    Parser = getattr(crop_codebrim, "Parser", argparse.ArgumentParser)
    at_least = getattr(crop_codebrim, "at_least", lambda *bounds: int)
    p = Parser(prog="synthetic.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("target", type=getattr(crop_codebrim, "some_path", Path), metavar="DIR",
                   help="new folder for the photos")
    p.add_argument("--photos", type=at_least(1, 10 ** 6), default=36, metavar="K", help="how many (default 36)")
    p.add_argument("--seed", type=at_least(0), default=0, help="the same seed gives the same files (default 0)")
    p.add_argument("--workers", type=at_least(1, 256), metavar="K",
                   help="photos rendered at a time (default: the number of cores, at most 16)")
    a = p.parse_args(argv)

    def work():
        started = time.monotonic()
        n_boxes = render_tree(a.target, a.photos, a.seed, a.workers or min(crop_codebrim.cores(), 16))
        print(f"{a.photos} photos with {n_boxes} boxes in {a.target}, {time.monotonic() - started:.1f} s; "
              f"next: python crop_codebrim.py {shlex.quote(str(a.target))} crops")
    return crop_codebrim.guarded("synthetic.py", work)


if __name__ == "__main__":
    if crop_codebrim is not None:
        signal.signal(signal.SIGTERM, crop_codebrim.on_term)
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
