"""Look at a run of okd_train.py: a verdict, samples, scores, curves, attention and nearest copies on one HTML page.

    python report.py runs/sagan-3                       # runs/sagan-3/report.html: everything, in one file
    python report.py runs/sagan-3 --curves              # curves.png alone: losses, gammas and scores over the steps
    python report.py runs/sagan-3 --interpolate 12      # interpolate.png alone: 12 images from one z to the next
    python report.py runs/sagan-3 --attention-maps      # attention.png alone: where three positions look
    python report.py runs/sagan-3 --curves --page       # flags combine: curves.png and the page
    python report.py runs/sagan-3 --device cpu          # beside a training that fills the GPU
    python report.py runs/mine-2 --model gans/mine.py   # the model script has moved

Nothing is trained, and a run may be looked at while it goes on. Pictures come from the averaged generators (G1.pt, ...)
and from checkpoint.pt (attention of the discriminators). The page fetches nothing: it may be mailed, or kept for years.
What cannot be shown (no scores yet, the training images are gone) is said in its place.

To change the order of the page or to add a section, see the list in page().
"""
import argparse
import base64
import contextlib
import functools
import html
import io
import itertools
import math
import os
import shlex
import signal
import sys
from pathlib import Path

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while torch is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import numpy as np
import torch
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageOps
from torch.nn.utils import parametrize

HERE = Path(__file__).resolve().parent
okd_train = None                # this file was copied alone: --help still works
if (HERE / "okd_train.py").is_file():
    sys.path.insert(0, str(HERE))                                   # ours, whatever else is called so on the path
    import okd_train
    sys.path.remove(str(HERE))

# ---------------------------------------------------------------------------------------------- settings
PICTURES = {"curves": "curves.png", "interpolate": "interpolate.png", "attention_maps": "attention.png"}
POINTS = ((0.3, 0.3), (0.45, 0.8), (0.8, 0.45))     # (down, right) in shares of the picture: whose attention is shown
COPIES = 200                    # fakes per group that are compared with the training images
COPIED = 0.1                    # share of near copies above the photos' own from which on they are worth a look: about
                                # two standard errors of such a share of COPIES
# Okabe and Ito's: told apart by colour-blind people too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = (0, 7, 3, 12)          # pixels on and off; 0 is solid
PANEL = (430, 220)              # pixels
ABOUT = {                       # what a logged quantity is, under its panel's title
    "loss": "loss of the {}", "d_w": "mean D(real) - mean D(fake)", "c_w": "mean C(neighbour) - mean C(own)",
    "grad_norm": "mean gradient norm, aim 1", "real_grad": "mean gradient norm at real images",
    "accuracy": "share of images whose class is named right", "class_loss": "cross-entropy of classes",
    "gamma": "weight of attention, {}",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #595959; --line: #ccc; --mark: #fff3cd }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --faint: #a8a8a8; --line: #444; --mark: #4a3f14 } }
body { margin: 2rem auto; max-width: 84rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
p, figcaption, td { overflow-wrap: anywhere }
figcaption, caption, .faint { color: var(--faint); font-size: .9rem }
figure { margin: 0 0 1rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
table { border-collapse: collapse; margin: .8rem 0 }
caption { text-align: left }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
mark { background: var(--mark); color: inherit; padding: 0 .2rem }
.verdict { display: grid; grid-template-columns: max-content 1fr; gap: .6rem 1.5rem; padding: 1rem;
  border: 1px solid var(--line); border-radius: 6px }
.verdict dt { color: var(--faint) }
.verdict dd { margin: 0 }
code { display: block; overflow-wrap: anywhere; font-size: .85rem }
.strip { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem; margin: 0 0 .25rem; padding-left: 5.25rem;
  max-width: 49rem }
.strip figcaption { flex: 0 0 5rem; margin-left: -5.25rem }
.strip img { flex: 0 1 24rem; min-width: 0 }
.many { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)) }
@media (max-width: 40rem) {
  .verdict { display: block } .verdict dd { margin-bottom: .8rem }
  .strip { padding: 0 } .strip figcaption, .strip img { flex-basis: 100%; margin: 0 }
  .drawn { overflow-x: auto } .drawn img { max-width: none } }
"""


class Run:
    """A run folder to be looked at. What is costly is made at its first use and kept: the page shows what was drawn."""

    def __init__(self, out, device=None, model=None, k=10):
        self.out, self.device, self.k = Path(out), okd_train.pick_device(device), k
        self.s, self.script, self.saved = okd_train.read_run(self.out, model)
        self.name, self.classes = self.out.resolve().name, self.saved["classes"]

    @functools.cached_property
    def generators(self):
        """{group: averaged generator, in eval mode}."""
        files = {i: self.out / f"G{i}.pt" for i in range(1, self.s.groups + 1)}
        return {i: okd_train.load_generator(path, self.device, str(self.script.path)) for i, path in files.items()}

    @functools.cached_property
    def data(self):
        """The images of the training. UserError where they cannot be had."""
        images, labels, classes = okd_train.load_data(self.s, self.script.conditional, lambda text: None)
        data = okd_train.Data(images, labels, classes, self.s, self.device)
        if data.digest != self.saved["data_digest"]:
            source = self.s.data or "the synthetic set"
            raise okd_train.UserError(f"the {len(images)} images of {source} are not those that the run was trained on")
        return data

    @functools.cached_property
    def best(self):
        """(score, step, group): the lowest score of all; None without scores."""
        found = [(i, okd_train.best_score(self.out, i, self.s.groups)) for i in range(1, self.s.groups + 1)]
        return min(((score[0], score[1], i) for i, score in found if score), default=None)

    copies = functools.cached_property(lambda run: closest(run))
    curves = functools.cached_property(lambda run: curves(run.out, f"{run.name}: {run.s.groups} x {run.script.name}"))
    interpolate = functools.cached_property(lambda run: interpolation(run))
    attention_maps = functools.cached_property(lambda run: attention_maps(run))


# ---------------------------------------------------------------------------------------------- the page
def page(run):
    """report.html, complete in itself, as text."""
    sections = [                # in this order; each a function (run -> HTML), left out where it returns nothing
        ("", verdict),
        ("Real and generated", side_by_side),
        ("On the way", on_the_way),
        ("Scores", scores),
        ("Curves", training_curves),
        ("Between two z", between_two_z),
        ("Attention", attention),
        ("Closest copies", closest_copies),
        ("Settings", settings),
    ]
    parts = []
    for heading, section in sections:
        body = section(run)
        if body and heading:
            parts.append(f"<h2>{heading}</h2>")
        parts.append(body)
    return document(run.name, parts)


def document(title, parts):
    """A whole page, as text, of its parts in HTML."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>", *parts, "</body></html>\n"])


def verdict(run):
    """What is asked of generated images first, answered in plain words, and what to do next."""
    s, log = run.s, okd_train.read_lines(run.out / "log.jsonl")
    step = log[-1]["step"] if log else 0
    answers = {"Best group": best_group(run), "Labels": labels(run), "Variety": variety(run, log)}
    answers["Copies"] = copies(run)
    answers["Next"] = what_next(run, step, {question: short for question, (short, *_) in answers.items()})
    rows = []
    for question, (short, text, *commands) in answers.items():
        lines = "".join(f"<code>{html.escape(command)}</code>" for command in commands)
        if short:
            rows.append(f"<dt>{question}</dt><dd><strong>{html.escape(short)}</strong> {html.escape(text)}{lines}</dd>")
    ring = f"{s.groups} {run.script.name} groups in a ring (rho {s.rho:g})" if s.groups > 1 else run.script.name
    source = f"images of {s.data}" if s.data else "synthetic images of concrete defects"
    if run.classes:
        source += f" in {len(run.classes)} classes ({', '.join(run.classes)})"
    batch = f"{s.batch_size} a step" + (" and group" if s.groups > 1 else "")
    sentence = (f"{ring} learnt {s.image_size}x{s.image_size} images from {run.saved['images']} {source}, {batch}: "
                f"step {step} of {s.steps}. A group's generator (G) draws the images; its discriminator (D) tells them "
                "from real ones, its connector (C) from those of the next group.")
    return "\n".join([f"<h1>{html.escape(run.name)}</h1>", '<dl class="verdict">', *rows, "</dl>", paragraph(sentence)])


def best_group(run):
    """-> (answer in brief, why, commands ...), as all that follow."""
    if not run.best:
        command = f"python sample.py {shlex.quote(str(run.out))} 200 --group best"
        return "Not measured.", "Which group draws best is found by:", command
    score, step, i = run.best
    line = next(line for line in okd_train.score_lines(run.out, run.s.groups) if line["step"] == step)
    name = line.get("score", "score")
    floor, = column([line], lambda line: line["floor"])
    floor = f"; fresh photos would read about {floor:.3g}" if np.isfinite(floor) else ""
    rough = " This measure is rough and may rank wrongly." if name == "rFD" else ""
    return f"Group {i}, as at step {step}.", f"Its {name} was {score:.3g}, lower is better{floor}.{rough}"


def labels(run):
    if not run.classes:
        return "", ""
    _, step, i = run.best or (0, 0, 1)
    lines = [line for line in okd_train.score_lines(run.out, run.s.groups) if okd_train.label_words(line, [i])]
    if not lines:
        real, out, to = (shlex.quote(str(path)) for path in (run.s.data or "REAL", run.out, run.out / "check"))
        commands = f"python sample.py {out} --per-class 100 --group {i} --to {to}", f"python labels.py {real} {to}/G{i}"
        return "Not measured.", "Whether the images show what their labels say:", *commands
    line = next((line for line in lines if line["step"] == step), lines[-1])
    share, most, chance = (line["labels"][k] for k in (f"G{i}", "reals", "chance"))
    kept = (share - chance) / max(most - chance, 1e-9)
    short = "They hold." if kept >= 0.9 else "They hold in part." if kept >= 0.5 else "They do not hold."
    short = "Not told by these features." if most < (1 + chance) / 2 else short
    return short, (f"Of group {i}'s images at step {line['step']} a classifier names {share:.0%} as labelled, of real "
                   f"ones that it had not seen {most:.0%}; chance is {chance:.0%}.")


def variety(run, log):
    lines = []
    for line in log:
        with contextlib.suppress(KeyError, TypeError):
            values = [v for group in line["groups"] for v in group["variety"]["pixels"]]
            lines += [line] if values and all(v is None or 0 <= v < math.inf for v in values) else []
    if not lines:
        return "Not measured.", f"Training measures it every {run.s.sample_every} steps (--sample-every)."
    lost = okd_train.collapsed(*lines[-2:]) if len(lines) > 1 else {}
    words = [f"group {i}'s images{okd_train.classes_in_words(numbers, run.classes)}" for i, numbers in lost.items()]
    each = [(v, i, c) for i, group in enumerate(lines[-1]["groups"], 1)
            for c, v in enumerate(group["variety"]["pixels"]) if v is not None]
    low, i, c = min(each, default=(1, 1, 0))
    short = f"Lost: {'; '.join(words)} are nearly one picture." if lost else "Kept." if low >= 0.5 else "Low in places."
    where = f"group {i}, {run.classes[c]}" if run.classes else f"group {i}"
    return short, (f"It is least in {where}: two images differ by {low:.0%} of what two real ones do "
                   f"(step {lines[-1]['step']}).")


def copies(run):
    try:
        _, (*groups, floor), features = run.copies
    except okd_train.UserError as e:
        return "Not measured.", f"{e}."
    name, share, _ = max(groups, key=lambda row: row[1])
    short = "Perhaps: look at Closest copies below." if share > floor[1] + COPIED else "No sign of any."
    rough = ", by rough features" if features == "random" else ""
    return short, (f"{share:.0%} of the images of group {name[1:]} are nearer to a photo than that is to any other; "
                   f"among photos themselves it is {floor[1]:.0%}{rough}.")


def what_next(run, step, short):
    """short: {question: answer in brief}."""
    s, out = run.s, shlex.quote(str(run.out))
    data = f" --data {shlex.quote(s.data)}" if s.data else ""
    anew = f"python okd_train.py --model {shlex.quote(run.saved['model'])} --groups {s.groups}{data} --out {out}-2"
    anew += " --quick" if s.quick else f" --recipe {s.recipe}" if s.recipe else ""
    if short["Variety"].startswith("Lost"):
        rates = f"--g-lr {s.g_lr / 2:g} --d-lr {s.d_lr / 2:g}"
        return "Start anew", "at half the rates, or with more photos:", f"{anew} {rates}"
    if step < s.steps:
        return "Train on:", f"it is at step {step} of {s.steps}.", f"python okd_train.py --out {out} --resume"
    if short["Labels"].startswith("They do not") and s.recipe is None and "small" in run.script.recipes:
        return "Start anew", "with the recipe for a few thousand photos:", f"{anew} --recipe small"
    count = "--per-class 200" if run.classes else "1000"
    take = f"python sample.py {out} {count} --group best --to made/"
    return "Look", "at the rows below: are the images what they should be? Then take more of them:", take


def side_by_side(run):
    """Rows of real images, and below them of each group's, class by class; the same z in every row."""
    try:
        generators = run.generators
    except okd_train.UserError as e:
        return paragraph(f"{e}.")
    s, real, parts = run.s, None, []
    try:
        real = run.data
        order = okd_train.draw(s.seed, 0, 0, "real grid", "permutation", len(real.images))          # as in real.png
    except okd_train.UserError as e:
        parts += [paragraph(f"{e}."), stored(run.out / "samples" / "real.png", "Real images that were trained on.")]
    step = okd_train.step_of(run.out / "G1.pt")
    parts.append(paragraph(f"Generated images at step {step}, weights averaged over the steps, beside real images."))
    z = okd_train.draw(s.seed, 0, 0, "grid", "normal", (10 if run.classes else 20, s.z_dim))        # as in the grids
    for c, name in enumerate(run.classes[:10] or [None]):
        parts += [f"<h3>{html.escape(name)}</h3>"] if name else []
        if real:
            mine = order[real.labels.cpu()[order] == c] if name else order
            parts.append(strip("real", okd_train.to_hwc(real.images[mine[:len(z)]])))
        y = torch.full((len(z),), c) if name else None
        parts += [strip(f"G{i}", okd_train.generate(G, z, y)) for i, G in generators.items()]
    return "\n".join(parts)


def on_the_way(run):
    """Up to six of the sample grids that were saved."""
    grids = (run.out / "samples").glob("step_*.png")
    grids = sorted(grids, key=lambda path: (len(path.name), path.name))                 # 1000000 after 999500
    picks = sorted(set(np.linspace(0, len(grids) - 1, min(6, len(grids))).round().astype(int)))
    step = lambda path: path.stem[5:].lstrip("0") or "0"
    shown = [stored(grids[k], f"Step {step(grids[k])}.", width=800) for k in picks]
    return f'<div class="many">{"".join(shown)}</div>' if shown else ""


def scores(run):
    """The last and the best score of every group, of all together, and the floor."""
    lines = okd_train.score_lines(run.out)
    if not lines:
        return ""
    last, rows, judged = lines[-1], [], [line for line in lines if okd_train.label_words(line, [1])]
    for key in (*(f"G{i}" for i in range(1, run.s.groups + 1)), "mean", "union", "floor"):
        values = column(lines, lambda line: line[key])
        if np.isfinite(values).any():
            n = np.nanargmin(values)
            best = ("", "") if key == "floor" else (float(values[n]), lines[n]["step"])
            share = column(judged[-1:], lambda line: line["labels"]["reals" if key == "floor" else key])
            rows.append((key, float(values[-1]), *best, *(float(v) if np.isfinite(v) else "" for v in share)))
    name = last.get("score", "score")
    random = "networks with random weights (rFD: a smoke test; compare it with rFD alone)"
    features = {"rFD": random, "FID": "the Inception network"}.get(name, f"a network of your own: {name}")
    spread = f" (+- {last['floor_spread']:.2g})" if "floor_spread" in last else ""
    counts = f"{last.get('samples', '?')} generated images per group and {last.get('reals', '?')} real ones"
    about = (f"The distance between {counts}, in the features of {features}; lower is better. "
             "union: all groups together. floor: what as many fresh photos would read, estimated from parts of the "
             f"real images{spread}; a perfect generator reads near it, below as often as above.")
    head = ["", f"last (step {last['step']})", "best", "at step"]
    if judged:
        head.append(f"labels that hold (step {judged[-1]['step']})")
        about += (" labels that hold: the share of images whose class is named by a classifier that learnt from the "
                  "real ones, in these features; in the line of the floor, of real images that were held out. "
                  f"Chance is {judged[-1]['labels']['chance']:.2f}.")
    return paragraph(about) + table(f"{name} at {len(lines)} steps", head, rows)


def training_curves(run):
    about = "What the log and the scores have, over the steps: a panel per quantity, a colour per group."
    return drawn(run, "curves", about, "PNG")


def between_two_z(run):
    about = "Images on the way from one z to another (along the sphere), the same z for every group in a column."
    return drawn(run, "interpolate", about)


def attention(run):
    about = "Where three marked positions look in every attention layer of the generators and discriminators."
    return drawn(run, "attention_maps", about)


def closest_copies(run):
    try:
        blocks, rows, features = run.copies
    except okd_train.UserError as e:
        return paragraph(f"Not compared with the training images: {e}.")
    about = (f"Of {COPIES} generated images per group the ten that are closest to a training image, "
             "and below each that image.")
    copied = ("Copied: nearer to its nearest real image than that one is to any other real image, "
              f"in {features} features. Fresh images of the same kind count too: compare with the floor, not with 0.")
    head = ("", "share copied", "smallest distance")
    strips = [strip(f"{name}, real", *pair) for name, *pair in blocks]
    return "\n".join([paragraph(about), *strips, paragraph(copied), table("Copies", head, rows)])


def settings(run):
    saved, here = run.saved, run.saved["settings"]
    default = vars(okd_train.parse(["--model", str(run.script.path)])[0])
    changed = [(key, value, default.get(key)) for key, value in here.items() if value != default.get(key)]
    kept = [(key, value) for key, value in here.items() if value == default.get(key)]
    made_with = {"model script": saved["script"], **saved.get("versions", {}), "git revision": saved.get("git")}
    return "\n".join([
        table("Other than the default", ("setting", "here", "default"), changed, mark=True),
        "<details><summary>All other settings, at their defaults, and versions</summary>",
        table("At their defaults", ("setting", "value"), kept),
        table("Made with", ("", ""), list(made_with.items())), "</details>"])


# ---------------------------------------------------------------------------------------------- HTML
def drawn(run, name, about, kind="JPEG"):
    """A picture of the run as HTML, "" where there is nothing to draw, or the line that says why there is none."""
    try:
        image = getattr(run, name)                                  # a phone scrolls it sideways
        return f'<div class="drawn">{picture(image, about, kind)}</div>' if image else ""
    except okd_train.UserError as e:
        return paragraph(f"{e}.")


def stored(path, about, width=4000):
    """The picture in a file as HTML, or the line that says why there is none."""
    try:
        with Image.open(path) as im:
            image = im.convert("RGB")
    except Exception as e:                                          # Pillow raises a dozen types for what is no picture
        return paragraph(f"{path} cannot be shown: {okd_train.brief(e)}.")
    return picture(image, about, width=width)


def strip(name, *rows):
    """Rows of images, uint8 (n, H, W, 3) each, above one another as HTML: five to a picture, so that they fold."""
    columns, zoom, parts = 5, max(1, 64 // rows[0].shape[1]), []
    for k in range(0, len(rows[0]), columns):
        tiles = [row[k:k + columns].repeat(zoom, 1).repeat(zoom, 2) for row in rows]
        tiles = [np.pad(a, ((0, columns - len(a)), (1, 1), (1, 1), (0, 0)), constant_values=255) for a in tiles]
        sheet = np.concatenate([np.concatenate(a, axis=1) for a in tiles])
        parts.append(tag(Image.fromarray(sheet), f"{name}, {k + 1} to {min(k + columns, len(rows[0]))}", width=800))
    return f'<figure class="strip"><figcaption>{html.escape(name)}</figcaption>{"".join(parts)}</figure>'


def picture(image, about, kind="JPEG", width=4000):
    """An image with words below it as HTML."""
    return f"<figure>{tag(image, about, kind, width)}<figcaption>{html.escape(about)}</figcaption></figure>"


def tag(image, about, kind="JPEG", width=4000):
    """An image as HTML: it travels inside the page, at most `width` pixels wide."""
    f, image = io.BytesIO(), image.convert("RGB")
    image.thumbnail((width, 20000))
    image.save(f, kind, **(dict(quality=88, subsampling=0) if kind == "JPEG" else dict(optimize=True)))
    data = base64.b64encode(f.getvalue()).decode()
    return (f'<img src="data:image/{kind.lower()};base64,{data}" width="{image.width}" height="{image.height}" '
            f'alt="{html.escape(about)}">')


def paragraph(text):
    return f'<p class="faint">{html.escape(text)}</p>'


def table(caption, head, rows, mark=False):
    """Rows of values as an HTML table: the first cell of a row is its header, highlighted with `mark`."""
    def say(v):
        words = {True: "yes", False: "no", None: "none"}
        if v is None or isinstance(v, bool):
            return words[v]
        return f"{v:.4g}" if isinstance(v, float) else html.escape(str(v))
    numbers = [all(type(row[k]) in (int, float) or row[k] == "" for row in rows) for k in range(len(head))]
    aligned = [' class="n"' if n else "" for n in numbers]
    titles = "".join(f'<th scope="col"{kind}>{say(h)}</th>' for kind, h in zip(aligned, head))
    lines = [f"<table><caption>{say(caption)}</caption>", f"<thead><tr>{titles}</tr></thead><tbody>"]
    for first, *rest in rows:
        first = f"<mark>{say(first)}</mark>" if mark else say(first)
        cells = "".join(f"<td{kind}>{say(v)}</td>" for kind, v in zip(aligned[1:], rest))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table>"])


# ---------------------------------------------------------------------------------------------- curves
def curves(out, name):
    """log.jsonl and fid.jsonl over steps -> picture: a panel per quantity, networks side by side, groups in colours."""
    lines, scored = okd_train.read_lines(out / "log.jsonl", most=4000), okd_train.score_lines(out)
    layers, n_groups = logged(lines)
    if not layers:
        raise okd_train.UserError(f"{out / 'log.jsonl'} has no line yet: nothing to draw")
    quantities = sorted({q: None for q, _ in layers}, key=lambda q: q == "gamma")   # in the log's order, gamma last
    roles = [r for r in okd_train.ROLES if any(r == role for _, role in layers)]
    steps, scored_at = (column(x, lambda line: line["step"]) for x in (lines, scored))
    mean_of = int(len(lines) ** 0.5) | 1 if len(lines) >= 16 else 1
    end = 1.02 * max(1, *steps, *scored_at)

    groups, cells = range(1, n_groups + 1), {}                      # cells: {(row, column): picture}
    for (quantity, role), n_layers in layers.items():
        key = f"{role}_{quantity}"
        title = f"gamma {role.upper()}" if quantity == "gamma" else key
        about = ABOUT.get(key, ABOUT.get(quantity, "")).format(okd_train.ROLES[role])
        about += ", dashes: layers 2 on" if n_layers > 1 else ""
        rows = [(column(lines, lambda line: logged_value(line, i, quantity, role, layer)), hue(i), dash(i, layer))
                for i in groups for layer in range(n_layers)]
        limits = (-0.02, 1.02) if quantity == "accuracy" else None
        cells[quantities.index(quantity), roles.index(role)] = panel(title, about, steps, rows, end, mean_of, limits)
    if scored:
        styles = {"floor": ("#888888", 7), "union": ("#000000", 3), **{f"G{i}": (hue(i), dash(i)) for i in groups}}
        rows = [(column(scored, lambda line: line[k]), *style) for k, style in styles.items()]
        about = "lower is better; dotted: union, dashed: floor"
        cells[free_cell(cells, roles)] = panel(str(scored[-1].get("score", "score")), about, scored_at, rows, end)
    judged = [line for line in scored if okd_train.label_words(line, groups)]
    if judged:
        styles = {"reals": ("#888888", 7), "chance": ("#000000", 3), **{f"G{i}": (hue(i), dash(i)) for i in groups}}
        rows = [(column(judged, lambda line: line["labels"][k]), *style) for k, style in styles.items()]
        at = column(judged, lambda line: line["step"])
        about = "dashed: reals held out; dotted: chance"
        cells[free_cell(cells, roles)] = panel("labels that hold", about, at, rows, end, limits=(-0.02, 1.02))
    bold = f" Bold: mean over {mean_of} of the {len(lines)} points that are faint." if mean_of > 1 else ""
    return contact_sheet(f"{name}, step {steps[-1]:.0f}. Horizontal: steps.{bold}", cells, n_groups)


def free_cell(cells, roles):
    """The first (row, column) without a panel, as many columns as roles."""
    return next(place for place in (divmod(k, len(roles)) for k in itertools.count()) if place not in cells)


def logged(lines):
    """-> ({(quantity, role): curves of a group}, number of groups), of whatever any line has: ("loss", "d"): 1."""
    found, n_groups = {}, 0
    for line in lines:
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            for i, group in enumerate(line["groups"], 1):
                n_groups = max(n_groups, i)
                found.update({(key[2:], key[0]): 1 for key in group if key[:1] in okd_train.ROLES and key[1:2] == "_"})
                gammas = {role: layers for role, layers in group.get("gamma", {}).items() if layers and role in "DCG"}
                found.update({("gamma", role.lower()): len(layers) for role, layers in gammas.items()})
    return found, n_groups


def logged_value(line, i, quantity, role, layer):
    group = line["groups"][i - 1]
    return group["gamma"][role.upper()][layer] if quantity == "gamma" else group[f"{role}_{quantity}"]


def column(lines, get):
    """get(line) of every line as floats (n,); NaN where it is absent, no number, or beyond 1e30."""
    values = []
    for line in lines:
        try:
            v = get(line)
            values.append(float(v) if abs(v) < 1e30 else math.nan)
        except (KeyError, IndexError, TypeError):
            values.append(math.nan)
    return np.array(values)


def hue(i):
    return COLOURS[(i - 1) % len(COLOURS)]


def dash(i, layer=0):
    return DASHES[((i - 1) // len(COLOURS) + layer) % len(DASHES)]


def contact_sheet(words, cells, n_groups):
    """{(row, column): picture of a panel} below `words` and the key to the groups -> picture."""
    (w, h), top = PANEL, 54
    columns, rows = (1 + max(place[axis] for place in cells) for axis in (1, 0))
    sheet = Image.new("RGB", (max(640, 12 + 52 * n_groups, columns * w + 8), top + rows * h), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((12, 8), okd_train.legible(words), "black", okd_train.font(14))
    for i in range(1, n_groups + 1):
        left, d = 12 + 52 * (i - 1), dash(i) or 20
        for k in range(0, 20, 2 * d):
            pen.line([(left + k, 40), (left + min(k + d, 20), 40)], hue(i), 4)
        pen.text((left + 24, 40), f"G{i}", "black", okd_train.font(13), anchor="lm")
    for (row, k), image in cells.items():
        sheet.paste(image, (k * w, top + row * h))
    return sheet


def panel(title, about, steps, rows, end, mean_of=1, limits=None):
    """rows [(values (n,), colour, dash)] over steps (n,) -> picture; faint as they are, bold as means of `mean_of`."""
    means = [smooth(y, mean_of) for y, _, _ in rows]
    low, high = limits or y_limits([(y, mean) for (y, _, _), mean in zip(rows, means)])
    plot = Plot(*PANEL, title, about, (0, end), (low, high))
    if title.endswith("grad_norm"):
        plot.line(np.array([0, end]), np.array([1.0, 1.0]), "#888888", 1, 3)
    if mean_of > 1:
        pale = 1 - 0.6 / max(len({colour for _, colour, _ in rows}), 2.4)
        for y, colour, _ in rows:
            plot.faint(steps, y, colour, pale)
    for (_, colour, style), mean in zip(rows, means):
        plot.line(steps, mean, colour, 2, style, dots=len(steps) <= 20 and not style)
    values = np.concatenate([y[np.isfinite(y)] for y, _, _ in rows])
    if (values > high).any():
        plot.note(f"max {values.max():.3g}", top=True)
    if (values < low).any():
        plot.note(f"min {values.min():.3g}", top=False)
    return plot.image()


def smooth(y, width):
    """Centred mean over `width` (odd) values; NaN is left out of it and stays NaN."""
    good, ones = np.isfinite(y), np.ones(min(width, len(y)))
    total, count = (np.convolve(a, ones, "same") for a in (np.where(good, y, 0), good.astype(float)))
    return np.where(good, total / np.maximum(count, 1), np.nan)


def y_limits(lines):
    """(low, high) for lines [(values, smoothed values)]: an outlier, such as a first spike, does not flatten the rest.

    The middle 90 % and a margin of 0.4 times their reach, within all there is, and where every smoothed line ends.
    """
    v = np.concatenate([v[np.isfinite(v)] for v, _ in lines] or [[]])
    if not len(v):
        return 0.0, 1.0
    a, b = np.quantile(v, (0.05, 0.95))
    ends = [m[np.isfinite(m)][-1] for _, m in lines if np.isfinite(m).any()]
    low = min(max(v.min(), a - 0.4 * (b - a)), *ends, a)
    high = max(min(v.max(), b + 0.4 * (b - a)), *ends, b)
    if high - low <= 1e-6 * max(abs(low), abs(high)):               # a constant
        low, high = low - (0.1 * abs(low) or 0.5), high + (0.1 * abs(high) or 0.5)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


class Plot:
    """One panel: a frame with round numbers at its axes, and lines in it; at twice the size until image() halves it."""

    LEFT, TOP, RIGHT, BOTTOM = 54, 30, 12, 22

    def __init__(self, width, height, title, about, xlim, ylim, names=None):
        self.w, self.h = width - self.LEFT - self.RIGHT, height - self.TOP - self.BOTTOM
        self.xlim, self.ylim = xlim, ylim
        self.sheet = Image.new("RGB", (2 * width, 2 * height), "white")
        self.inside = Image.new("RGB", (2 * self.w, 2 * self.h), "white")           # of its own: lines end at the frame
        self.pen = ImageDraw.Draw(self.inside)
        outside, title = ImageDraw.Draw(self.sheet), okd_train.legible(title)
        large, small = okd_train.font(26), okd_train.font(21)
        left, top, bottom = 2 * self.LEFT, 2 * self.TOP, 2 * (height - self.BOTTOM)
        outside.text((left, 16), title, "black", large)
        outside.text((left + outside.textlength(title, large) + 16, 20), about, "#555555", small)
        at = ticks(*ylim)
        for y, text in zip(map(self.y, at), tick_labels(at)):
            self.pen.line([(0, y), (2 * self.w, y)], "#e6e6e6", 2)
            outside.text((left - 10, top + y), text, "#333333", small, anchor="rm")
        at = ticks(*xlim) if names is None else np.arange(len(names))       # names stand at 0, 1, ...
        for x, text in zip(map(self.x, at), names or tick_labels(at)):
            self.pen.line([(x, 0), (x, 2 * self.h)], "#f2f2f2", 2)
            outside.text((left + x, bottom + 8), text, "#333333", small, anchor="mt" if x < 2 * self.w - 30 else "rt")

    def x(self, v):
        return np.clip((v - self.xlim[0]) / (self.xlim[1] - self.xlim[0]), -9, 9) * 2 * self.w

    def y(self, v):
        return np.clip((self.ylim[1] - v) / (self.ylim[1] - self.ylim[0]), -9, 9) * 2 * self.h

    def line(self, x, y, colour, width=2, dash=0, dots=False):
        """x, y (n,): a gap where y is NaN, a dot where a value stands alone; dash: pixels on and off."""
        good = np.flatnonzero(np.isfinite(y))
        for run in np.split(good, np.flatnonzero(np.diff(good) > 1) + 1):
            px, py = self.x(x[run]), self.y(y[run])
            r = 2 * width + 1
            for a, b in zip(px, py) if dots or len(run) == 1 else ():
                self.pen.ellipse([a - r, b - r, a + r, b + r], colour)
            if len(run) > 1 and dash:
                at = np.arange(px[0], px[-1] + 1)
                py = np.interp(at, px, py)
                for k in range(0, len(at), 4 * dash):
                    self.pen.line(list(zip(at[k:k + 2 * dash + 1], py[k:k + 2 * dash + 1])), colour, 2 * width)
            elif len(run) > 1:
                self.pen.line(list(zip(px, py)), colour, 2 * width)

    def faint(self, x, y, colour, pale=0.75):
        """The same, thin and pale (1: white); where lines cross their colours mix, so that the last hides no other."""
        layer = Image.new("RGB", self.inside.size, "white")
        self.pen = ImageDraw.Draw(layer)
        self.line(x, y, tuple(round(c + pale * (255 - c)) for c in ImageColor.getrgb(colour)), 1)
        self.inside.paste(ImageChops.multiply(self.inside, layer))
        self.pen = ImageDraw.Draw(self.inside)

    def note(self, text, top):
        """A few words in the upper or lower right corner."""
        y, anchor = (4, "rt") if top else (2 * self.h - 4, "rb")
        self.pen.text((2 * self.w - 8, y), text, "#555555", okd_train.font(20), anchor=anchor)

    def image(self):
        left, top = 2 * self.LEFT, 2 * self.TOP
        self.sheet.paste(self.inside, (left, top))
        frame = [left - 1, top - 1, left + 2 * self.w, top + 2 * self.h]
        ImageDraw.Draw(self.sheet).rectangle(frame, outline="#888888")
        return self.sheet.reduce(2)


def ticks(low, high, most=6):
    """At most `most` >= 2 round numbers in [low, high], multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / (most - 1)
    power = math.floor(math.log10(rough))
    step = next(m * 10.0 ** power for m in (1, 2, 5, 10) if m * 10.0 ** power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, max(0, -power)) for k in range(first, last + 1)]


def tick_labels(values):
    """Numbers of one axis in one unit: 0, 10k, 20k."""
    most = max(map(abs, values), default=0)
    unit, name = (1e6, "M") if 1e6 <= most < 1e10 else (1e3, "k") if 1e4 <= most < 1e6 else (1, "")
    return [f"{v / unit:.7g}{name if v else ''}" for v in values]


# ---------------------------------------------------------------------------------------------- interpolation
def interpolation(run):
    """Rows of run.k images from one z to the next, the same z for all groups: three paths, or one per class -> picture.

    The classes of one path stand below one another, so that a column shows what the class alone changes.
    """
    z = okd_train.draw(run.s.seed, 0, 0, "grid", "normal", (6, run.s.z_dim))        # as in the sample grids
    paths = [(f"z1 to z2, {name}", 0, c) for c, name in enumerate(run.classes[:10])]
    paths = paths or [(f"z{j + 1} to z{j + 2}", j, None) for j in (0, 2, 4)]
    rows = []
    with okd_train.calling(run.script, "Generator"):
        for name, j, c in paths:
            y = None if c is None else torch.full((run.k,), c)
            for i, G in run.generators.items():
                rows.append((f"{name}, G{i}", okd_train.generate(G, between(z[j], z[j + 1], run.k), y)))
        return okd_train.grid(rows, run.k)


def between(a, b, k):
    """a, b (z_dim,) -> (k, z_dim) along the great circle from a to b, both ends exact.

    Not along the line: all z of the training have a length near sqrt(z_dim), and the middle of a line is shorter by a
    factor 0.7, where no generator was trained.
    """
    t = torch.linspace(0, 1, k, dtype=torch.float64)[:, None]
    p, q = a.double(), b.double()
    angle = torch.arccos((p @ q / (p.norm() * q.norm())).clamp(-1, 1))
    if angle.sin() <= 1e-6:                                         # parallel: no circle
        return torch.lerp(p, q, t).float()
    return ((((1 - t) * angle).sin() * p + (t * angle).sin() * q) / angle.sin()).float()


# ---------------------------------------------------------------------------------------------- attention
def attention_maps(run):
    """Three images of every G and where POINTS look in each, a row per attention layer of G and its D -> picture.

    None without such layers.
    """
    s, script, generators, n, blocks = run.s, run.script, run.generators, 3, []
    z = okd_train.draw(s.seed, 0, 0, "grid", "normal", (n, s.z_dim)).to(run.device)
    y = (torch.arange(n, device=run.device) % s.n_classes,) if script.conditional else ()
    path = run.out / "checkpoint.pt"
    states = okd_train.read_checkpoint(path, s.groups)["groups"] if path.exists() else None
    for i, G in generators.items():
        with okd_train.calling(script, "attention_map"), parametrize.cached():
            found = [("generator", *layer) for layer in look(G, z, *y)]
            with torch.inference_mode():
                x = G(z, *y)
            if states:
                D = script.Discriminator(**okd_train.bind(script.Discriminator, vars(s)))
                D.load_state_dict(states[i - 1]["D"]["net"])
                also_y = y if okd_train.takes(D.forward, "y") else ()
                found += [("discriminator", *layer) for layer in look(D.to(run.device).eval(), x, *also_y)]
        images = okd_train.to_uint8(x)
        for net, name, gamma, maps in found:
            name = name if len(name) <= 20 else f"...{name[-17:]}"
            weight = "" if gamma is None else f"  gamma {gamma:+.3f}"
            tiles = [tile(image, p) for image, looks in zip(images, maps.numpy()) for p in (None, *looks)]
            blocks.append((f"G{i}  {net}  {name}  {maps.shape[2]}x{maps.shape[3]}{weight}", np.stack(tiles)))
    if not blocks:
        return None
    words = ("Three images, and where the positions 1, 2, 3 look in each: from grey (nowhere) over red to yellow "
             "(most). peak: the most that one place gets,\nin units of an equal share for all. "
             "A layer returns gamma x attention + input: near gamma 0 its attention hardly matters yet.")
    return okd_train.grid(blocks, n * (1 + len(POINTS)), words)


@torch.inference_mode()
def look(net, *args):
    """Where POINTS look in every layer of `net` that offers attention_map(x), when it is called with args.

    -> [(name, gamma or None, maps (B, len(POINTS), H, W), each of which sums to 1)] in the order of the calls.
    UserError where a layer's map is not (B, H*W, H*W) for its input x (B, C, H, W).
    """
    seen, hooks = {}, []

    def keep(name, m, inputs, keywords, output):
        seen[name] = (m, [*inputs, *keywords.values()][0].clone())
    for name, m in net.named_modules():
        if callable(getattr(m, "attention_map", None)):
            hooks.append(m.register_forward_hook(functools.partial(keep, name), with_kwargs=True))
    try:
        net(*args)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, (m, x) in seen.items():
        p, (h, w) = m.attention_map(x), x.shape[2:] if x.dim() == 4 else (0, 0)
        if not h or p.shape != (len(x), h * w, h * w):
            shapes = f"returned {tuple(p.shape)} for x {tuple(x.shape)}; expected (B, H*W, H*W) for x (B, C, H, W)"
            raise okd_train.UserError(f"attention_map of layer {name} {shapes}")
        gamma = getattr(m, "gamma", None)
        gamma = gamma.item() if isinstance(gamma, torch.Tensor) and gamma.numel() == 1 else None
        rows = [int(down * h) * w + int(right * w) for down, right in POINTS]
        found.append((name, gamma, p[:, rows].reshape(len(x), -1, h, w).float().cpu()))
    return found


def tile(image, weights=None, size=96):
    """uint8 (H, W, 3) -> uint8 (size, size, 3), POINTS numbered in it; weights (h, w): where one looks, over grey."""
    sheet = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    if weights is not None:
        share = Image.fromarray(np.rint(255 * weights / max(weights.max(), 1e-30)).astype(np.uint8))
        share = share.resize((size, size), Image.Resampling.NEAREST)
        heat = ImageOps.colorize(share, (190, 0, 70), (255, 240, 90), mid=(250, 110, 20))   # red, orange, yellow
        grey = sheet.convert("L").point(lambda v: 0.6 * v).convert("RGB")
        sheet = Image.composite(heat, grey, share.point(lambda v: 0.85 * 255 * (v / 255) ** 0.7))
    pen = ImageDraw.Draw(sheet)
    for j, (down, right) in enumerate(POINTS, 1):
        x, y = right * size, down * size
        pen.ellipse([x - 7, y - 7, x + 7, y + 7], "white", "black")
        pen.text((x, y), str(j), "black", okd_train.font(11), anchor="mm")
    if weights is not None:
        peak = f"peak  {weights.max() * weights.size:.3g}"
        pen.text((size // 2, 3), peak, "white", okd_train.font(10), "mt", stroke_width=1, stroke_fill="black")
    return np.asarray(sheet)


# ---------------------------------------------------------------------------------------------- nearest copies
def closest(run):
    """The 10 fakes of every group that are closest to a training image, each above that image.

    -> ([(group, fakes, reals), uint8 (10, H, W, 3) each], [(group, share of COPIES fakes that look copied, smallest
    distance)], kind of features); the last share and distance are of real images, a part against the others. UserError
    where the images of the training cannot be had.
    """
    s, generators = run.s, run.generators
    fid = okd_train.beside("fid", "the comparison with the training images")
    data, classes = run.data, run.classes
    kind = s.fid_features if s.fid_every else "inception"
    if kind == "inception":
        try:
            fid.find_weights(download=False)
        except fid.FidError:
            kind = "random"
    ours = argparse.Namespace(**{**vars(s), "fid_data": None, "fid_features": kind})
    scorer = okd_train.Scores(ours, data, run.device)
    fakes, kind = f"{len(generators)} x {COPIES} fakes", scorer.model.name
    print(f"Comparing {fakes} with the {len(data.images)} training images, {kind} features.", flush=True)
    rows, blocks = [], []
    try:
        real = scorer.real(run.out)[0] if s.fid_data is None else scorer.features(data.images, "real images")
        z = okd_train.draw(s.seed, 0, 0, "copies", "normal", (COPIES, s.z_dim))
        y = torch.arange(COPIES) % len(classes) if classes else None
        for i, G in generators.items():
            fakes = okd_train.generate(G, z, y)
            index, distance, share = fid.copies(real, scorer.features(fakes, f"G{i}"))
            order = np.argsort(distance)[:10]
            nearest = okd_train.to_hwc(data.images[torch.from_numpy(index[order])])
            blocks.append((f"G{i}", fakes[order], nearest))
            rows.append((f"G{i}", share, float(distance.min())))
        found = [fid.copies(real[a], real[b]) for a, b in fid.parts(len(real), COPIES)]
    except fid.FidError as e:
        raise okd_train.UserError(str(e)) from e
    share, nearest = np.mean([(share, distance.min()) for _, distance, share in found], axis=0)
    rows.append(("floor: real images against other real ones", float(share), float(nearest)))
    return blocks, rows, kind


# ---------------------------------------------------------------------------------------------- command line
def parser():
    kind = okd_train.Parser if okd_train else argparse.ArgumentParser
    layout = argparse.RawDescriptionHelpFormatter
    p = kind(prog="report.py", allow_abbrev=False, description=__doc__, formatter_class=layout)
    p.add_argument("run", metavar="RUN", help="folder of a run, such as runs/sagan-3")
    p.add_argument("--curves", action="store_true", help="losses, scores and all that the log has, to RUN/curves.png")
    p.add_argument("--interpolate", type=int, nargs="?", const=10, metavar="K",
                   help="K images from one z to the next (default 10), to RUN/interpolate.png; RUN stands before it")
    p.add_argument("--attention-maps", "--attention_maps", action="store_true",
                   help="where three positions look, in every attention layer, to RUN/attention.png")
    p.add_argument("--page", action="store_true", help="all of these and more, to RUN/report.html (the default)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    p.add_argument("--model", metavar="FILE.py", help="the run's model script, where it has moved")
    return p


def draw(argv):
    """Write the pictures that the flags ask for."""
    a = parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise okd_train.UserError("a report is made by one process: start it with python, not with torchrun")
    if a.interpolate is not None and not 2 <= a.interpolate <= 1000:
        raise okd_train.UserError(f"--interpolate is {a.interpolate}; it must be 2 or more, and at most 1000")
    run = Run(a.run, a.device, a.model, a.interpolate or 10)
    wanted = [name for name in PICTURES if getattr(a, name)]
    for name in wanted:
        path, image = run.out / PICTURES[name], getattr(run, name)
        if image is None:
            wanted = "attention_map(x) (B, C, H, W) -> (B, H*W, H*W)"
            raise okd_train.UserError(f"no layer of {run.script.path.name} offers {wanted}: no attention to draw")
        okd_train.save_image(image, path)
        print(f"Wrote {path}.", flush=True)
    if a.page or not wanted:
        path, text = run.out / "report.html", page(run)
        with okd_train.replacing(path) as f:
            f.write(text.encode("utf-8", "replace"))
        print(f"Wrote {path}.", flush=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if okd_train:
        okd_train.guarded("report.py", lambda: draw(argv))
    elif {"-h", "--help"} & set(argv):
        parser().parse_args(argv)
    else:
        print("report.py: error: a report needs okd_train.py beside report.py", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    main()
