"""Train N GANs together by online knowledge distillation: a ring of groups (generator, discriminator, connector).

    python okd_train.py --model sagan --groups 3 --quick              # a first look in minutes, no GPU, no data needed
    torchrun okd_train.py --model sagan --groups 3 --data crops/      # the real thing, on all GPUs; python okd_train.py ... works too
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 okd_train.py --groups 16 ...    # 2 x 8 GPUs
    python okd_train.py --model my_gan.py --groups 2 --data photos/   # any script with a Generator and a Discriminator
    python okd_train.py --model sagan --groups 3 --data crops/ --resume            # go on, bit for bit
    python okd_train.py --out runs/sagan-3 --sample 1000              # 1000 PNGs per group in runs/sagan-3/fakes/
    python okd_train.py --out runs/acgan-3 --per-class Crack=500 --group best --to cracks/        # 500 PNGs of one class, by the best generator
    python okd_train.py --out runs/sagan-3 --report                   # what was learnt, on one page: runs/sagan-3/report.html

Every group i has its own networks and its own order of the data. Its connector C_i is a second critic that scores the
images of the next group's generator as real and those of its own as fake; the generator answers to both:
    D_i: discriminator_loss(D_i, real_i, fake_i)
    C_i: connector_loss(C_i, fake_{i+1}, fake_i)                      # the last group looks at the first
    G_i: generator_loss(D_i, fake_i) + rho * generator_loss(C_i, fake_i)
All fakes of a step come from one z. Only images travel between groups, never a gradient.

What a model script must offer stands in the README; the short form: Generator(z) -> (B, 3, H, W) in [-1, 1] and
Discriminator(x) -> (B,), and optionally losses and a flat dict hparams, whose keys become flags.
"""
import argparse
import base64
import contextlib
import copy
import csv
import ctypes
import datetime
import functools
import hashlib
import html
import importlib.metadata
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
import uuid
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFont
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

try:
    from kernels import reference as attention
    from kernels.convolution import fast_second_derivative
    from kernels.spectral_norm import SpectralNorms
except ImportError:                                                 # this file was copied alone
    attention = fast_second_derivative = SpectralNorms = None

try:
    import fcntl
    import resource
except ImportError:             # Windows: runs are not locked there
    fcntl = resource = None

# ---------------------------------------------------------------------------------------------- settings
# What the trainer knows by itself. A model script's hparams may bring other defaults for these, and further keys.
TRAINER_HPARAMS = dict(
    image_size=64, z_dim=128,
    batch_size=25,              # per group and step
    g_lr=1e-4, d_lr=4e-4, c_lr=5e-5,
    beta1=0.0, beta2=0.9,       # Adam
    n_critic=1,                 # steps of D and C per step of G
    rho=0.5,                    # weight of the connector in the generator's loss
)
OWN_LOSS_HPARAMS = dict(lambda_gp=10.0)     # named by the losses below, for scripts that bring none

# --quick: small images, thin networks, faster rates. At this size a step costs the number of its operations, not their
# arithmetic, so a larger batch is nearly free. Only keys that the model script has are set.
QUICK = dict(image_size=32, ch=16, batch_size=16, g_lr=5e-4, d_lr=2e-3, c_lr=2.5e-4, steps=1500, max_seconds=270,
             sample_every=150, save_every=300)

EMA = 0.999                     # of the generators; everything that is looked at or scored comes from the average
IMAGE_TYPES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CHUNK = 50                      # images per forward when sampling: fixed, so that an image does not depend on how many are asked for
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")     # whatever a file's name says; none that starts other programs
FORMAT = "okd-gan 1"            # of checkpoint.pt
# Least and most of each number, as bounds against slips: beyond them a run would die of memory, or never end, without a word.
LIMITS = dict(groups=(1, 1000), steps=(1, 10 ** 12), batch_size=(1, 10 ** 6), n_critic=(1, 1000), image_size=(4, 4096), z_dim=(1, 10 ** 6),
              log_every=(1, None), sample_every=(1, None), save_every=(1, None), fid_every=(1, None), rho=(0, None), g_lr=(0, None), d_lr=(0, None),
              c_lr=(0, None), beta1=(0, 0.999999), beta2=(0, 0.999999), seed=(0, None), n_classes=(1, 10 ** 5), sample=(1, 10 ** 7), fid_samples=(4, 10 ** 7),
              nproc=(1, 1024), benchmark=(1, 10 ** 6), interpolate=(2, 1000), epochs=(1e-6, 1e12), max_seconds=(1e-6, 1e12))
NONE_BY_DEFAULT = dict(data=str, epochs=float, max_seconds=float, device=str, fid_every=int, fid_samples=int, fid_data=str,
                       precision=str)                                # flags without a default
MAY_CHANGE = {"steps", "epochs", "max_seconds", "save_every", "sample_every", "log_every", "fid_every", "device", "nproc", "cuda_graph",
              "precision"}      # on --resume
PICTURES = {"curves": "curves.png", "interpolate": "interpolate.png", "attention_maps": "attention.png", "report": "report.html"}   # flag: file
NORMS_TOGETHER = {"cuda"}       # devices on which the spectral norms of a network are made together: where a launch costs more than its work
WARM_UP = 3                     # steps before a capture: cuDNN, cuBLAS, Triton and Adam make what they need at their first call
PROOF = 1e-2                    # largest difference of a replay to an eager step, of each network's largest gradient: roundings stay far below, what went stale far above
OUTER = "OKD_TRAIN_AGENT"       # which torchrun started us, told to the processes that we start ourselves
TIMEOUT = datetime.timedelta(minutes=10)    # after which a rank that waits for another gives up


class UserError(Exception):
    """What the user can mend: one line on stderr and exit status 2."""


def one_line(text):
    """Line breaks, terminal commands and what is no text in a file's name, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def brief(error):
    """The message of an exception in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def flag(key):
    """g_lr -> --g-lr."""
    return "--" + key.replace("_", "-")


def digest(data, size=8):
    """Hash of bytes, an array, or a file's content, of `size` bytes in hexadecimal."""
    return hashlib.blake2b(data.read_bytes() if isinstance(data, Path) else data, digest_size=size).hexdigest()


# ---------------------------------------------------------------------------------------------- randomness
def draw(seed, step, group, purpose, kind, shape=()):
    """Random numbers as a function of (seed, step, group, purpose): the only source of chance of a run.

    kind "normal" -> float32 N(0, 1); "uniform" -> float32 in [0, 1); an int n -> int64 in [0, n); "permutation" -> int64
    permutation of range(shape). Returns a CPU tensor of `shape`. group 0 is what all groups share; groups count from 1.
    """
    r = np.random.Generator(np.random.Philox(key=_key(seed, step, group, purpose, 16)))
    if kind == "normal":
        a = r.standard_normal(shape, dtype=np.float32)
    elif kind == "uniform":
        a = r.random(shape, dtype=np.float32)
    elif kind == "permutation":
        a = r.permutation(shape)
    else:
        a = r.integers(kind, size=shape, dtype=np.int64)
    return torch.from_numpy(np.asarray(a))


def _key(seed, step, group, purpose, n_bytes):
    """A key of n_bytes for one purpose; keys of different purposes have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{group}/{purpose}".encode(errors="surrogateescape"), digest_size=n_bytes).digest(), "little")


def seed_torch(seed, step, group, purpose):
    """Seed torch before a call into a model script, which may draw by itself (dropout, its own penalty, initial weights)."""
    torch.manual_seed(_key(seed, step, group, purpose, 8) >> 1)


# ---------------------------------------------------------------------------------------------- losses for scripts without
def takes(f, name):
    """Whether `f` has a parameter of that name."""
    return name in inspect.signature(f).parameters


def _score(D, x, y):
    out = D(x, y) if takes(D.forward, "y") else D(x)
    return (out[0] if isinstance(out, tuple) else out).flatten()


def discriminator_loss(D, real, fake, y_real=None, y_fake=None, eps=None, lambda_gp=10.0):
    """WGAN-GP. real, fake (B, 3, H, W), fake detached; eps (B, 1, 1, 1) in [0, 1) -> (scalar, logs). See sagan.py."""
    s_real, s_fake = _score(D, real, y_real), _score(D, fake, y_fake)
    x = torch.lerp(fake, real, eps).requires_grad_()
    grad, = torch.autograd.grad(_score(D, x, y_real).sum(), x, create_graph=True)
    norm = torch.linalg.vector_norm(grad.flatten(1), dim=1)         # gradient 0 at 0, where sqrt of a sum has NaN
    loss = s_fake.mean() - s_real.mean() + lambda_gp * (norm - 1).square().mean()
    return loss, {"w": (s_real.mean() - s_fake.mean()).detach(), "grad_norm": norm.detach().mean()}


def generator_loss(D, fake, y=None):
    """fake (B, 3, H, W) with its graph -> scalar."""
    return -_score(D, fake, y).mean()


# ---------------------------------------------------------------------------------------------- the model script
class Script:
    """A loaded model script: its two classes, its losses (or ours) and its hyper-parameters."""

    def __init__(self, model):
        self.path = find_script(model)
        self.name = self.path.stem
        spec = importlib.util.spec_from_file_location(self.name, self.path)
        module = importlib.util.module_from_spec(spec)
        known = sys.modules.get(self.name)
        sys.modules[self.name] = module                             # dataclasses and pickle look their module up
        sys.path.insert(0, str(self.path.parent))
        try:
            spec.loader.exec_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as e:                                  # SystemExit, or what the script invents
            raise UserError(f"{self.path} cannot be loaded: {where(e, self.path)}") from e
        finally:
            sys.path.remove(str(self.path.parent))
            if known is not None:
                sys.modules[self.name] = known

        def must(holds, complaint):
            if not holds:
                raise UserError(f"{self.path}{complaint}")
        for name in ("Generator", "Discriminator"):
            must(inspect.isclass(getattr(module, name, None)), f" has no class {name}; a model script needs Generator and Discriminator")
            must(issubclass(getattr(module, name), torch.nn.Module), f": {name} is no torch.nn.Module")
        self.Generator, self.Discriminator = module.Generator, module.Discriminator
        self.discriminator_loss = getattr(module, "discriminator_loss", discriminator_loss)
        self.generator_loss = getattr(module, "generator_loss", generator_loss)
        self.connector_loss = getattr(module, "connector_loss", self.discriminator_loss)
        for name in ("discriminator_loss", "generator_loss", "connector_loss"):
            must(callable(f := getattr(self, name)), f": {name} is a {type(f).__name__}; it must be a function")
        own = getattr(module, "hparams", {})
        must(isinstance(own, dict), f": hparams is a {type(own).__name__}; it must be a flat dict")
        self.conditional = "n_classes" in own
        self.autocast = bool(getattr(module, "autocast", False))    # its losses are written for bf16 and keep the penalty out of it
        self.channels_last = bool(getattr(module, "channels_last", False))      # its layers take weights and images in either layout
        callables = self.Generator, self.Discriminator, self.discriminator_loss, self.generator_loss, self.connector_loss
        read = {name for f in callables for name in inspect.signature(f).parameters} | TRAINER_HPARAMS.keys() | {"n_classes"}
        self.hparams = {k: v for k, v in {**TRAINER_HPARAMS, **OWN_LOSS_HPARAMS}.items() if k in read}
        for key, value in own.items():
            entry = f": hparams[{key!r}] = {value!r}; "
            must(isinstance(key, str) and key.isidentifier() and isinstance(value, (bool, int, float, str)), entry + "keys are names, values bool, int, float or str")
            must(not isinstance(value, float) or math.isfinite(value), entry + "it must be finite")
            kind = type(TRAINER_HPARAMS.get(key, 0 if key == "n_classes" else value))
            must(kind not in (int, float) or type(value) in (int, kind), entry + f"it must be a {'whole ' if kind is int else ''}number")
            must(key in read, f": hparams has {key!r}, but no constructor and no loss of the script names it")
            self.hparams[key] = float(value) if kind is float else value

    def layout(self, device):
        """The memory format of weights and images on `device`: channels_last where it was measured to win."""
        return torch.channels_last if self.channels_last and device.type == "cpu" else torch.contiguous_format


def find_script(model):
    """sagan -> ./sagan.py, else sagan.py beside this file; a path to a .py file -> that file."""
    tried = [Path(model)] if model.endswith(".py") or os.sep in model else [
        Path(f"{model}.py"), Path(__file__).resolve().parent / f"{model}.py"]
    for path in tried:
        if path.suffix == ".py" and path.is_file():
            return path.resolve()
    raise UserError(f"no model script {model!r}: looked for {' and '.join(map(str, tried))}")


def where(error, path):
    """'file:line: Type: message' of the deepest frame of `error` inside the file `path`."""
    if isinstance(error, SyntaxError):
        return f"{f'line {error.lineno}: ' if error.lineno else ''}SyntaxError: {error.msg}"
    line, tb = None, error.__traceback__
    while tb:
        if tb.tb_frame.f_code.co_filename == str(path):
            line = tb.tb_lineno
        tb = tb.tb_next
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {' '.join(str(error).split())}"


def bind(f, settings):
    """The settings that `f` has parameters for, as a dict of keywords."""
    return {k: settings[k] for k in inspect.signature(f).parameters if k in settings}


@contextlib.contextmanager
def calling(script, what):
    """Turn an exception out of the model script into one line that says what was asked of it."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        text = where(e, script.path)
        if dist.is_initialized() and not text.startswith("line "):  # not the script's doing: another rank is gone
            raise
        raise UserError(f"{script.path}: {what} failed: {text}") from e


# ---------------------------------------------------------------------------------------------- data
def list_images(folder):
    """All image files below `folder`, sorted, as (path, class or None); class = first folder below `folder`. UserError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--data {folder}: " + (f"{folder} is a file; a folder is needed" if folder.is_file() else
                                                "this is no folder" if folder.exists() else "no such folder"))
    found = []

    def walk(place, above):
        real = os.path.realpath(place)
        if real in above:                                           # a link back up
            return
        try:
            entries = sorted(os.scandir(place), key=lambda e: e.name)
        except OSError as e:
            raise UserError(f"--data {folder}: {place} cannot be read: {e.strerror}") from e
        for e in entries:
            if e.name.startswith((".", "__MACOSX")):
                continue
            if e.is_dir():
                walk(e.path, above | {real})
            elif e.name.lower().endswith(IMAGE_TYPES) and (e.is_file() or e.is_symlink()):      # a dead link is named as unreadable
                path = Path(e.path)
                parts = path.relative_to(folder).parts
                found.append((path, parts[0] if len(parts) > 1 else None))
    walk(folder, frozenset())
    found.sort()
    if not found:
        raise UserError(f"--data {folder}: no images in it or below; accepted are {' '.join(t[1:] for t in IMAGE_TYPES)}")
    tops = {c or "." for _, c in found}
    if tops <= {"train", "val", "valid", "test"}:
        raise UserError(f"--data {folder} holds only {', '.join(sorted(tops))}; name one of them, such as --data {folder / sorted(tops)[0]}")
    return found


def decode(path, size):
    """Image file -> (uint8 (3, size, size), was it resized): RGB, centre square, antialiased; 16-bit is scaled to 8. Raises ValueError or what Pillow raises."""
    if not os.path.isfile(path) and os.path.exists(path):           # a pipe would block for ever, a device may have no end
        raise ValueError("no regular file")
    Image.init()
    with Image.open(path, formats=[f for f in IMAGE_FORMATS if f in Image.OPEN]) as im:
        if Image.MAX_IMAGE_PIXELS and im.width * im.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{im.width}x{im.height} pixels, a decompression bomb?")
        im.load()
        if im.mode.startswith("I") or im.mode == "F":               # 16 bits, or floats: in [0, 1] or [0, 255]
            a = np.asarray(im, np.float32)
            a = a / 257 if im.mode != "F" else a * 255 if a.max(initial=0) <= 1 else a
            im = Image.fromarray(np.clip(np.rint(a), 0, 255).astype(np.uint8))
        im = im.convert("RGB")
        w, h = im.size
        resized = (w, h) != (size, size)
        if resized:
            side = min(w, h)
            x, y = (w - side) // 2, (h - side) // 2
            im = im.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
        return np.asarray(im).transpose(2, 0, 1), resized


def load_images(folder, size, conditional, skip_bad, say):
    """Decode a folder once -> images uint8 (n, 3, size, size), labels int64 (n,), class names (sorted; [] if none are needed).

    say(text) is told what was resized or skipped. UserError names every bad file, or what is wrong with the classes.
    """
    files = list_images(folder)
    classes = sorted({c for _, c in files if c}) if conditional else []
    if conditional:
        loose = [p for p, c in files if c is None]
        if loose:
            raise UserError(f"--data {folder}: {len(loose)} images outside class folders, such as {loose[0]}; "
                            "a class-conditional model takes its labels from folders")
        if len(classes) < 2:
            raise UserError(f"--data {folder}: one class folder only ({classes[0]}); a class-conditional model needs two or more")

    try:
        images = np.empty((len(files), 3, size, size), np.uint8)
    except MemoryError:
        raise UserError(f"--data {folder}: {len(files)} images of {size}x{size} need {len(files) * 3 * size ** 2 / 2 ** 30:.0f} GB of memory; "
                        "a smaller --image-size needs less") from None

    def one(k):
        try:
            images[k], resized = decode(files[k][0], size)
            return resized
        except Exception as e:
            return f"{files[k][0]} ({brief(e) or type(e).__name__})"

    results = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:   # Pillow decodes outside the interpreter's lock
        for k in range(0, len(files), 1000):                        # the pool's queue costs 2 kB an entry
            results += pool.map(one, range(k, min(k + 1000, len(files))))
    bad = [r for r in results if isinstance(r, str)]
    labels = np.array([classes.index(c) if conditional else 0 for _, c in files], np.int64)
    if bad:
        if not skip_bad:
            raise UserError(f"{len(bad)} of {len(files)} images cannot be read: {'; '.join(bad)}. Mend or remove them, or pass --skip-bad")
        say(f"Skipped {len(bad)} unreadable images: {'; '.join(bad)}.")
        good = [k for k, r in enumerate(results) if not isinstance(r, str)]
        images, labels = images[good], labels[good]
    if (resized := sum(r is True for r in results)):
        say(f"{resized} of {len(images)} images were cut to their centre square and resized to {size}x{size}.")
    return torch.from_numpy(images), torch.from_numpy(labels), classes


def synthetic_images(size, conditional):
    """The embedded default: rendered concrete with five kinds of defects, as load_images returns it."""
    from crop_codebrim import synthetic
    images, labels, classes = synthetic(500, size, 0)
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return images, torch.from_numpy(np.asarray(labels, np.int64)), list(classes) if conditional else []


class Data:
    """The whole data set as uint8 on the training device, and the order in which each group sees it."""

    def __init__(self, images, labels, classes, s, device):
        self.images, self.labels, self.classes = images.to(device), labels.to(device), classes
        whole = hashlib.blake2b(images.numpy(), digest_size=16)     # no copy of what may be gigabytes
        whole.update(labels.numpy())
        self.digest = whole.hexdigest()
        self.s, self.orders = s, {}

    def indices(self, batch, group):
        """Indices (B,) of a group's batch number `batch`: without replacement through a new permutation every epoch."""
        n, size = len(self.images), self.s.batch_size
        places = np.arange(batch * size, (batch + 1) * size)
        epochs = range(places[0] // n, places[-1] // n + 1)
        return torch.cat([self.order(e, group)[torch.from_numpy(places[places // n == e] % n)] for e in epochs])

    def order(self, epoch, group):
        if (group, epoch) not in self.orders:
            self.orders = {k: v for k, v in self.orders.items() if k[0] != group or k[1] == epoch - 1}
            self.orders[group, epoch] = draw(self.s.seed, epoch, group, "order", "permutation", len(self.images))
        return self.orders[group, epoch]

    def batch(self, idx, flip):
        """idx (B,) -> float images (B, 3, H, W) in [-1, 1]; flip (B, 1, 1, 1) below 0.5 mirrors that image, None mirrors none."""
        x = self.images[idx].float().div_(127.5).sub_(1)
        return x if flip is None else torch.where(flip < 0.5, x.flip(3), x)


# ---------------------------------------------------------------------------------------------- ranks
class Ranks:
    """The processes of a run: which groups each serves, and what they tell one another. One process needs none of it.

    W <= N: each rank holds a contiguous block of groups, and only the block's edges send images. W > N: rank r serves group
    floor(r * N / W) together with the group's other ranks; each takes a share of the batch, sizes differing by one at most.
    """

    def __init__(self, n_groups, batch_size, device):
        env = lambda name, default: int(os.environ.get(name, default))
        self.rank, self.world = env("RANK", 0), env("WORLD_SIZE", 1)
        self.local_rank, self.local_world = env("LOCAL_RANK", 0), env("LOCAL_WORLD_SIZE", self.world)
        N, W = n_groups, self.world
        self.n_groups, self.batch_size, self.device, self.sent = N, batch_size, device, 0
        self.owners = {i: [(i - 1) * W // N] if W <= N else [r for r in range(W) if r * N // W == i - 1] for i in range(1, N + 1)}
        self.mine = [i for i, ranks in self.owners.items() if self.rank in ranks]
        most = max(len(r) for r in self.owners.values())
        if most > batch_size:
            raise UserError(f"{W} processes for {N} groups: {most} would share a batch of {batch_size}; use fewer, or a larger --batch-size")
        self.low, self.high = self.rows(self.mine[0], self.rank)
        self.replicas = len(self.owners[self.mine[0]])
        self.part = self.owners[self.mine[0]].index(self.rank)      # which share of the batch
        self.share = (self.high - self.low) / batch_size
        self.peers = self.node = None
        self.staged = False
        if W == 1:
            return
        nccl = device.type == "cuda" and self.local_world <= torch.cuda.device_count()
        self.staged = device.type == "cuda" and not nccl            # two ranks on one GPU: NCCL refuses, images go by the CPU
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        self.store = dist.PrefixStore(self.attempt(store), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=self.store, rank=rank, world_size=world, timeout=TIMEOUT)
        for ranks in self.owners.values():                          # every rank must take part in making every process group
            made = dist.new_group(ranks, timeout=TIMEOUT) if len(ranks) > 1 else None
            if self.rank in ranks:
                self.peers = made
        firsts = self.everyone(self.rank - self.local_rank)
        for first in sorted(set(firsts)):
            members = [r for r in range(W) if firsts[r] == first]
            made = dist.new_group(members, timeout=TIMEOUT, backend="gloo")
            if self.rank in members:
                self.node = made
        self.edges = [(src, dst, i, max(a[0], b[0]), min(a[1], b[1]))
                      for i in self.owners for dst in self.owners[i] for src in self.owners[i % N + 1]
                      for a, b in [(self.rows(i, dst), self.rows(i % N + 1, src))] if max(a[0], b[0]) < min(a[1], b[1])]

    def attempt(self, store):
        """A name that all ranks of this start share and no earlier start had.

        torchrun keeps one store over its restarts, so addresses of dead ranks stand in it. Each rank asks with a token of
        its own; rank 0 answers whatever is asked, stale or fresh, until every rank has thanked it under the new name.
        """
        token, end = uuid.uuid4().hex, time.monotonic() + TIMEOUT.total_seconds()
        if self.rank:
            store.set(f"okd/ask/{self.rank}", token)
            name = store.get(f"okd/answer/{token}").decode()
            store.set(f"okd/thanks/{name}/{self.rank}", "1")
            return name
        waiting = set(range(1, self.world))
        while waiting:
            for r in list(waiting):
                if store.check([f"okd/thanks/{token}/{r}"]):
                    waiting.remove(r)
                elif store.check([f"okd/ask/{r}"]):
                    store.set(f"okd/answer/{store.get(f'okd/ask/{r}').decode()}", token)
            if time.monotonic() > end:
                raise UserError(f"rank {', '.join(map(str, sorted(waiting)))} did not start within {span(TIMEOUT.total_seconds())}")
            time.sleep(0.005)
        return token

    def rows(self, i, rank):
        """The rows [low, high) of group i's batch that `rank` works on."""
        ranks, B = self.owners[i], self.batch_size
        k = ranks.index(rank)
        return k * B // len(ranks), (k + 1) * B // len(ranks)

    def exchange(self, images):
        """images {i: this rank's rows of group i's fakes} -> a function that returns {i: the same rows of the next group's}.

        Sends and receives run on until that function is called.
        """
        N = self.n_groups
        if self.world == 1:
            return lambda: {i: images[i % N + 1] for i in images}
        pieces, ops = {i: [] for i in images}, []
        for src, to, i, a, b in self.edges:
            if self.rank == src:
                low = self.rows(i % N + 1, src)[0]
                piece = images[i % N + 1][a - low:b - low].contiguous()
            if src == to == self.rank:
                pieces[i].append(piece)
            elif self.rank == src:
                piece = piece.cpu() if self.staged else piece
                ops.append(dist.P2POp(dist.isend, piece, to))
                self.sent += piece.nbytes
            elif self.rank == to:
                like = images[i]
                piece = torch.empty(b - a, *like.shape[1:], dtype=like.dtype, device="cpu" if self.staged else like.device)
                ops.append(dist.P2POp(dist.irecv, piece, src))
                pieces[i].append(piece)
        works = dist.batch_isend_irecv(ops) if ops else []

        def finish():
            for w in works:
                w.wait()
            return {i: torch.cat([p.to(self.device) for p in ps]) if len(ps) > 1 else ps[0].to(self.device) for i, ps in pieces.items()}
        return finish

    def sum_gradients(self, params):
        """Add the gradients of a group's ranks up, in one flat all-reduce."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat, group=self.peers)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)

    def agree(self, *numbers):
        """The largest of each number over all ranks."""
        if self.world == 1:
            return numbers
        t = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return t.tolist()

    def collect(self, mine):
        """{key: value} of every rank -> all of them in one dict on rank 0, None elsewhere."""
        if self.world == 1:
            return mine
        parts = [None] * self.world if self.rank == 0 else None
        dist.gather_object(mine, parts, dst=0)
        return {k: v for part in reversed(parts) for k, v in part.items()} if parts else None

    def everyone(self, value):
        """[value of rank 0, value of rank 1, ...] on every rank."""
        if self.world == 1:
            return [value]
        out = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def first(self, value):
        """The first value of all ranks that is not None, on every rank; None where there is none."""
        return next((v for v in self.everyone(value) if v is not None), None)

    def hand_out(self, whole):
        """One object per rank, given on rank 0 as a list -> this rank's."""
        if self.world == 1:
            return whole[0]
        out = [None]
        dist.scatter_object_list(out, whole if self.rank == 0 else None, src=0)
        return out[0]

    @contextlib.contextmanager
    def together(self):
        """If the body raises UserError or OSError on any rank, every rank raises the first one's, as UserError."""
        error = None
        try:
            yield
        except (UserError, OSError) as e:
            error = e
        text = self.first(error and f"{f'rank {self.rank}: ' if self.rank else ''}{error}")
        if text is not None:
            raise UserError(text)

    def compare(self, **what):
        """Refuse a rank that was started with something else: {name: value}, equal on all ranks or an error that names both."""
        seen = self.everyone(what)
        for r, other in enumerate(seen):
            wrong = [k for k in what if other[k] != seen[0][k]]
            if wrong:
                raise UserError(f"rank {r} was started with other {' and other '.join(wrong)} than rank 0: "
                                + "; ".join(f"{k}: {seen[0][k]} against {other[k]}" for k in wrong))

    def close(self):
        if self.world > 1 and dist.is_initialized():
            self.agree(0)                                           # nobody takes the group down while another still receives
            dist.destroy_process_group()
            self.peers = self.node = self.store = None              # their threads end here, not while the interpreter does


class SumOver(torch.autograd.Function):
    """Sum of a tensor over the ranks of a process group; differentiable as often as you like."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return SumOver.apply(grad, ctx.group), None


def whole_batch_norm(m, group, x):
    """The forward of a BatchNorm module `m` whose batch is spread over the ranks of `group` (SyncBatchNorm refuses the CPU)."""
    if not m.training:
        return torch.nn.functional.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)
    dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    count = torch.full((1,), x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
    total = SumOver.apply(torch.cat([x.sum(dims), count]), group)
    n, mean = total[-1].detach(), total[:-1] / total[-1].detach()
    centred = x - mean.view(shape)
    var = SumOver.apply(centred.square().sum(dims), group) / n
    if m.track_running_stats:
        with torch.no_grad():
            m.num_batches_tracked += 1
            rate = 1 / m.num_batches_tracked if m.momentum is None else m.momentum
            m.running_mean.lerp_(mean, rate)
            m.running_var.lerp_(var * n / (n - 1), rate)
    y = centred * (var + m.eps).rsqrt().view(shape)
    return y if m.weight is None else y * m.weight.view(shape) + m.bias.view(shape)


# ---------------------------------------------------------------------------------------------- groups and their step
class Network:
    """A network with its optimiser, and what must be held still while only its input gradient is wanted."""

    def __init__(self, net, lr, s, ranks=None):
        self.net, self.ranks = net, ranks if ranks and ranks.replicas > 1 else None
        self.params = [p for p in net.parameters() if p.requires_grad]
        self.opt = torch.optim.Adam(self.params, lr=lr, betas=(s.beta1, s.beta2), fused=True, capturable=self.params[0].is_cuda)
        self.opt._warned_capturable_if_run_uncaptured = True        # torch would say so on stderr, but the first steps must run uncaptured
        inside = [m for m in net.modules() if isinstance(m, parametrize.ParametrizationList)]
        self.parametrizations = [m for p in inside for m in p]
        self.parametrized = [(m, name) for m in net.modules() if parametrize.is_parametrized(m) for name in m.parametrizations]
        self.norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
        handled = {id(b) for m in self.parametrizations + self.norms for b in m.buffers()}
        if self.ranks:
            for m in self.norms:
                m.forward = functools.partial(whole_batch_norm, m, ranks.peers)
        self.others = [b for b in net.buffers() if id(b) not in handled] + [p for p in net.parameters() if not p.requires_grad]
        together = SpectralNorms and self.params[0].device.type in NORMS_TOGETHER
        self.normed = SpectralNorms(net) if together else parametrize.cached

    @contextlib.contextmanager
    def frozen(self):
        """Inside: no weight gradient, no power iteration, BatchNorm on batch statistics; no parameter or buffer moves."""
        def let_move(on):
            for p in self.params:
                p.requires_grad_(on)
            for m in self.parametrizations:
                m.training = on
            for m in self.norms:
                m.track_running_stats = on                          # without, torch uses the batch and leaves the buffers alone
        kept = [b.detach().clone() for b in self.others]            # e.g. the u of a spectral norm written by hand
        let_move(False)
        try:
            with self.normed():
                yield
        finally:
            let_move(True)
            with torch.no_grad():
                for b, old in zip(self.others, kept):
                    b.copy_(old)

    def step(self, loss):
        """loss: a function -> scalar, (scalar, logs). One joint backward, one optimiser step; returns (loss, logs) detached.

        normed(): every use of a spectrally normed weight in this update sees one power iteration, and it is left before
        the optimiser moves the weights.
        """
        with self.normed():
            out = loss()
            value, logs = out if isinstance(out, tuple) else (out, {})
            (value * self.ranks.share if self.ranks else value).backward(inputs=self.params)     # not into the penalty's images
        if self.ranks:                                              # means over shares add up to the mean over the batch
            self.ranks.sum_gradients(self.params)
        for p in self.params:                                       # fused Adam walks through memory and trusts that all is laid out alike
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)                        # a gradient is not needed between steps
        return value.detach(), {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in logs.items()}

    def refresh(self):
        """Make the parametrized weights of this update; under normed() every later use finds these."""
        for m, name in self.parametrized:
            getattr(m, name)


class Group:
    """Generator, discriminator and connector number i (from 1) with their optimisers, and the generator's average."""

    def __init__(self, i, script, s, device, ranks):
        self.i = i
        layout = script.layout(device)
        self.nets = {}
        for role, cls, lr in (("G", script.Generator, s.g_lr), ("D", script.Discriminator, s.d_lr), ("C", script.Discriminator, s.c_lr)):
            if role == "C" and s.groups == 1:
                continue                                            # one group has no neighbour
            seed_torch(s.seed, 0, i, f"init {role}")
            with calling(script, f"{cls.__name__}({', '.join(f'{k}={v!r}' for k, v in bind(cls, vars(s)).items())})"):
                net = cls(**bind(cls, vars(s))).to(device, memory_format=layout).train()
            if not any(p.requires_grad for p in net.parameters()):
                raise UserError(f"{script.path}: {cls.__name__} has no trainable parameter")
            if role != "G" and fast_second_derivative:
                fast_second_derivative(net)
            self.nets[role] = Network(net, lr, s, ranks)
        seed_torch(s.seed, 0, i, "init G")
        self.ema = script.Generator(**bind(script.Generator, vars(s))).to(device, memory_format=layout).eval().requires_grad_(False)
        self.ema.load_state_dict(self.nets["G"].net.state_dict())
        live = self.nets["G"].net
        self.averaged = list(self.ema.parameters()), list(live.parameters())
        self.copied = list(self.ema.buffers()), list(live.buffers())

    @torch.no_grad()
    def average(self, pace):
        """Move the average by the share `pace` (0-d tensor) of its distance towards the generator. Buffers are copied."""
        average, live = self.averaged
        torch._foreach_add_(average, torch._foreach_mul(torch._foreach_sub(live, average), pace))
        if self.copied[0]:
            torch._foreach_copy_(*self.copied)

    def gammas(self):
        """{role: [gamma of each attention layer]}: every one-element parameter that is called gamma."""
        return {role: g for role, n in self.nets.items()
                if (g := [p.detach().reshape(()) for k, p in n.net.named_parameters() if k.split(".")[-1] == "gamma" and p.numel() == 1])}


class Inputs:
    """What a step reads from outside, at fixed places on the device: a captured step finds new numbers where the old ones were.

    `plan` is a list of dicts of tensors on the device. put() packs their next values on the CPU and sends them in one copy,
    which the host does not wait for.
    """

    def __init__(self, plan, device):
        self.places, at = {}, 0
        for n, k in sorted(((n, k) for n, d in enumerate(plan) for k in d), key=lambda nk: -plan[nk[0]][nk[1]].element_size()):
            t = plan[n][k]                                          # eight-byte numbers first: every view is aligned
            self.places[n, k] = slice(at, at + t.nbytes), t.dtype, t.shape
            at += t.nbytes
        cuda = device.type == "cuda"
        self.device = torch.empty(at, dtype=torch.uint8, device=device)
        self.hosts = [torch.empty(at, dtype=torch.uint8, pin_memory=True) for _ in range(4)] if cuda else [self.device]
        self.sent = [torch.cuda.Event() for _ in self.hosts] if cuda else []
        self.plan, self.turn = self.views(self.device, len(plan)), 0
        self.staging = [self.views(host, len(plan)) for host in self.hosts]
        self.put(plan)

    def views(self, flat, n):
        plan = [{} for _ in range(n)]
        for (n, k), (place, dtype, shape) in self.places.items():
            plan[n][k] = flat[place].view(dtype).view(shape)
        return plan

    def put(self, plan):
        k = self.turn = (self.turn + 1) % len(self.hosts)
        if self.sent:
            self.sent[k].synchronize()                              # its last copy, four steps ago, still reads that memory
        for places, values in zip(self.staging[k], plan):
            for name, value in values.items():
                places[name].copy_(value)
        if self.sent:
            self.device.copy_(self.hosts[k], non_blocking=True)
            self.sent[k].record()


class Lanes:
    """Streams for networks that do not wait for one another: their small kernels then share the GPU. Each begins where the
    current stream stands; nothing made in one and used in another may be freed before join()."""

    def __init__(self):
        self.main, self.streams, self.open = torch.cuda.Stream(), {}, {}

    def __call__(self, *name, after=()):
        if name not in self.streams:                                # torch has 32 streams, and goes through them in turn
            self.streams[name] = torch.cuda.Stream()
        stream = self.open[name] = self.streams[name]
        stream.wait_stream(torch.cuda.current_stream())
        for other in after:
            stream.wait_stream(self.streams[other])
        return torch.cuda.stream(stream)

    def join(self):
        for stream in self.open.values():                           # one that was not begun in this capture may not be waited for
            torch.cuda.current_stream().wait_stream(stream)
        self.open.clear()

    def run(self, work):
        """work(self) on the main stream, where it will be captured: cuBLAS makes its workspaces per stream."""
        outside = torch.cuda.current_stream()
        self.main.wait_stream(outside)
        with torch.cuda.stream(self.main):
            out = work(self)
        outside.wait_stream(self.main)
        return out


class OneLane:
    """Lanes where there is nothing to overlap: one thing after the other."""

    main = None

    def __call__(self, *name, after=()):
        return contextlib.nullcontext()

    def join(self):
        pass

    def run(self, work):
        return work(self)


def record(work, pool, stream):
    """Capture what work() launches -> (graph, what work returned). Nothing runs until graph.replay()."""
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    # The outer context, because torch.cuda.graph leaves its stream the current one when a capture fails.
    # thread_local, because NCCL's watchdog asks for events in a thread of its own, which "global" forbids.
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = work()
    except BaseException:
        with contextlib.suppress(AttributeError, RuntimeError):     # torch leaves its allocator capturing, which then frees nothing any more
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
        raise
    return graph, result


class Trainer:
    """The groups of this process and the one training step."""

    def __init__(self, script, s, data, device, ranks=None):
        self.script, self.s, self.data, self.device = script, s, data, device
        self.ranks = ranks or Ranks(s.groups, s.batch_size, device)
        self.conditional = script.conditional
        losses = {"D": script.discriminator_loss, "C": script.connector_loss, "G": script.generator_loss}
        self.names = {role: bind(f, vars(s)) for role, f in losses.items()}         # the settings that each loss reads
        self.takes_eps = {role: takes(losses[role], "eps") for role in "DC"}
        self.groups = [Group(i, script, s, device, self.ranks) for i in self.ranks.mine]
        self.bf16 = s.precision == "bf16"
        self.step_count = 0
        self.given = Inputs(self.inputs(0), device)
        self.use_given_rates()
        self.bad = torch.zeros(len(self.groups), 3, dtype=torch.int64, device=device)   # the step at which D, C, G lost finiteness, or 0
        self.lanes = Lanes() if device.type == "cuda" else OneLane()
        self.drew, self.mark = False, None                          # whether the script draws by itself
        self.graphs, self.captured_for, self.graph_note, self.warm, self.capturing = None, None, None, 0, False
        if s.cuda_graph != "off" and (why := self.obstacle()):
            self.go_without(why)

    def use_given_rates(self):
        """Learning rates are read from the step's inputs, so that a captured step sees them change."""
        for g in self.groups:
            for role, n in g.nets.items():
                n.opt.param_groups[0]["lr"] = self.given.plan[0][f"{role.lower()}_lr"]

    def inputs(self, step):
        """All that one step reads besides its networks: for each of n_critic sub-steps a dict of CPU tensors.

        Keys: z, y, and per group i ("idx", i), ("flip", i), ("D", i), ("C", i), all drawn; the first dict also holds the step's
        scalars: step (its number, from 1), rho, g_lr, d_lr, c_lr, and pace, the share by which the averages move.
        """
        s, plan = self.s, []
        for sub in range(s.n_critic):
            number = step * s.n_critic + sub
            d = {"z": draw(s.seed, number, 0, "z", "normal", (s.batch_size, s.z_dim))}
            if self.conditional:
                d["y"] = draw(s.seed, number, 0, "y", s.n_classes, (s.batch_size,))
            for g in self.groups:
                d["idx", g.i] = self.data.indices(number, g.i)
                if s.flip:
                    d["flip", g.i] = draw(s.seed, number, g.i, "flip", "uniform", (s.batch_size, 1, 1, 1))
                for role in ("D", "C"):
                    if role in g.nets and self.takes_eps[role]:
                        d[role, g.i] = draw(s.seed, number, g.i, f"eps {role}", "uniform", (s.batch_size, 1, 1, 1))
            r = self.ranks
            plan.append(d if r.replicas == 1 else {k: v[r.low:r.high] for k, v in d.items()})
        rate = torch.float32 if self.device.type == "cuda" else torch.float64        # what fused Adam reads there
        plan[0].update(step=torch.tensor(step + 1), rho=torch.tensor(s.rho), pace=torch.tensor(1 - min(EMA, (1 + step) / (10 + step))),
                       **{k: torch.tensor(getattr(s, k), dtype=rate) for k in ("g_lr", "d_lr", "c_lr")})
        return plan

    def seed(self, number, g, purpose):
        """Each rank of a group seeds a stream of its own for what a script draws by itself.

        A captured step cannot do that, so the first steps watch whether the script draws at all.
        """
        if not self.capturing:
            self.watch()
            seed_torch(self.s.seed, number, g.i, f"call {purpose}" + (f" part {self.ranks.part}" if self.ranks.part else ""))
            self.mark = self.random_states() if self.warm < WARM_UP else None

    def watch(self):
        """Note whether the script has drawn since it was last seeded."""
        if self.mark is not None:
            self.drew |= not all(torch.equal(a, b) for a, b in zip(self.mark, self.random_states()))
            self.mark = None

    def random_states(self):
        return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])

    @contextlib.contextmanager
    def autocast(self, *networks, enabled=True):
        """bf16 inside, if the run wants it; normed weights are made before, in fp32."""
        if self.bf16 and enabled:
            for n in networks:
                n.refresh()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and enabled):
            yield

    def generate(self, g, d, number):
        """A group's fakes (B, 3, H, W) float32, with their graph where gradients are on."""
        self.seed(number, g, "G")
        n = g.nets["G"]
        with n.normed(), self.autocast(n):
            return (n.net(d["z"], d["y"]) if self.conditional else n.net(d["z"])).float()

    def critic_step(self, g, role, d, number, real, fake, y_real):
        """One update of a discriminator or a connector; real and fake carry no graph."""
        f = self.script.discriminator_loss if role == "D" else self.script.connector_loss
        extra = dict(self.names[role])
        if self.takes_eps[role]:
            extra["eps"] = d[role, g.i]
        labels = (y_real, d["y"]) if self.conditional else ()
        self.seed(number, g, role)
        n = g.nets[role]

        def loss():
            with self.autocast(n, enabled=self.script.autocast):
                return f(n.net, real, fake, *labels, **extra)
        return n.step(loss)

    def generator_step(self, g, d, number, fake, rho):
        """One update of a generator against its frozen critics; `fake` carries the generator's graph, rho is a 0-d tensor."""
        labels = (d["y"],) if self.conditional else ()
        critics, every = [role for role in "DC" if role in g.nets], {}

        def loss():
            total = 0
            for role in critics if self.s.rho else "D":             # a connector of weight 0 is not asked
                self.seed(number, g, f"G {role}")
                with self.autocast(g.nets[role], enabled=self.script.autocast):
                    out = self.script.generator_loss(g.nets[role].net, fake, *labels, **self.names["G"])
                value, logs = out if isinstance(out, tuple) else (out, {})
                total = value if role == "D" else total + rho * value
                every.update({k if role == "D" else f"c_{k}": v for k, v in logs.items()})
            return total, every
        with contextlib.ExitStack() as stack:
            for role in critics:
                stack.enter_context(g.nets[role].frozen())
            return g.nets["G"].step(loss)

    def compute(self, lanes):
        """The whole step on the device, reading self.given and nothing else that changes from step to step.

        A generator function: at every exchange it yields {i: fakes} and is sent a function -> {i: fakes of the next group}.
        Returns per group {"d": (loss, logs), "c": ..., "g": ...}, tensors on the device.
        """
        s, plan, layout = self.s, self.given.plan, self.script.layout(self.device)
        arrange = lambda images: images.contiguous(memory_format=layout)
        out = {g.i: {} for g in self.groups}
        for sub, d in enumerate(plan):
            number, last = self.step_count * s.n_critic + sub, sub == s.n_critic - 1
            fakes = {}
            for g in self.groups:
                with lanes(g.i), contextlib.nullcontext() if last else g.nets["G"].frozen(), torch.set_grad_enabled(last):
                    fakes[g.i] = self.generate(g, d, number)
            lanes.join()
            images = {i: arrange(x.detach()) for i, x in fakes.items()}
            neighbours = (yield images) if s.groups > 1 else None
            for g in self.groups:                                   # the images of other ranks travel meanwhile
                with lanes(g.i):
                    idx = d["idx", g.i]
                    real = arrange(self.data.batch(idx, d.get(("flip", g.i))))
                    y_real = self.data.labels[idx] if self.conditional else None
                    out[g.i]["d"] = self.critic_step(g, "D", d, number, real, images[g.i], y_real)
            neighbours = neighbours() if neighbours else {}
            for g in self.groups:
                if neighbours:
                    with lanes(g.i, "C"):
                        out[g.i]["c"] = self.critic_step(g, "C", d, number, arrange(neighbours[g.i]), images[g.i], d.get("y"))
                if last:
                    with lanes(g.i, after=[(g.i, "C")] if neighbours else []):
                        out[g.i]["g"] = self.generator_step(g, d, number, fakes.pop(g.i), plan[0]["rho"])
                        g.average(plan[0]["pace"])
            lanes.join()
        self.watch()
        zero = torch.zeros((), device=self.device)
        losses = torch.stack([out[g.i][role][0].float() if role in out[g.i] else zero for g in self.groups for role in "dcg"])
        self.bad.copy_(torch.where((self.bad == 0) & ~torch.isfinite(losses).view_as(self.bad), plan[0]["step"], self.bad))
        return out

    def eager(self, lanes):
        """compute(), whose exchanges are made by the ranks at once."""
        steps = self.compute(lanes)
        try:
            images = next(steps)
            while True:
                images = steps.send(self.ranks.exchange(images))
        except StopIteration as e:
            return e.value

    def step(self):
        """One step of every group. Returns per group {"d": (loss, logs), "c": ..., "g": ...}, tensors on the device, which the
        next step may overwrite."""
        self.given.put(self.inputs(self.step_count))
        undecided = self.s.cuda_graph != "off" and self.graph_note is None
        if undecided and self.warm >= WARM_UP or self.graphs and self.captured_for != bool(self.s.rho):
            self.capture()
        lanes = self.lanes if undecided and self.warm < WARM_UP else OneLane()       # the first steps as they will be captured
        out = self.replay() if self.graphs else lanes.run(self.eager)
        self.warm += 1
        self.step_count += 1
        return out

    # ------------------------------------------------------------------------------------------ CUDA graph
    def obstacle(self):
        """Why this step cannot be captured; None if it can be tried."""
        if self.ranks.world > self.ranks.n_groups:                  # though this rank may have its group alone: all answer alike
            return "several processes share a group's batch"
        if self.ranks.staged:
            return "two processes share a GPU"
        if self.drew:
            return f"{self.script.path.name} draws random numbers by itself"
        if self.device.type != "cuda":
            return f"the device is {self.device.type}"

    def capture(self):
        """Record the step, and keep the recording only if a replay does what an eager step does from the same state.

        With one process it is one graph; with several every exchange lies between two. All ranks capture or none, as a replay exchanges
        images with the replays of the others. Sets self.graph_note, one line; nothing else has moved afterwards.
        """
        self.graphs, self.captured_for = None, bool(self.s.rho)     # with rho 0 a step launches other kernels
        why = self.ranks.first(self.obstacle())
        if why is None:
            before = [t.detach().clone() for t in self.moving()]        # a clone with a graph would keep the default stream in every backward
            eager = self.tried(lambda: self.eager(OneLane()), before)       # first, so that its memory is free again for the graph
            try:
                self.capturing = True
                self.graphs = self.record_graphs()
            except Exception as e:
                e = e.__context__ or e                              # the end of a failed capture fails, too, and hides the reason
                why = f"capturing it failed: {where(e, self.script.path).partition(' Search for `cuda')[0][:200]}"
                for g in self.groups:
                    for n in g.nets.values():
                        n.opt.zero_grad(set_to_none=True)
            finally:
                self.capturing = False
            why = self.ranks.first(why)
        if why is None:
            shares = [((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in zip(eager, self.tried(self.replay, before))]
            worst = max(self.ranks.everyone(max(math.inf if math.isnan(x) else x for x in shares)))
            if worst > PROOF:
                why = f"a replay differed from an eager step by {worst:.1g} of the largest gradient"
        if why:
            self.graphs = None
            self.go_without(why)
        else:
            self.graph_note = f"Steps run as {len(self.graphs)} CUDA graph{'s' * (len(self.graphs) > 1)}, found equal to an eager step."

    def tried(self, run, before):
        """Every network's first moments of Adam (with beta1 = 0 the gradients) after run(); then all that moved is put back as in `before`."""
        run()
        moments = [torch.cat([state["exp_avg"].flatten() for state in n.opt.state.values()]) for g in self.groups for n in g.nets.values()]
        with torch.no_grad():
            for t, old in zip(self.moving(), before):
                t.copy_(old)
        return moments

    def go_without(self, why):
        if self.s.cuda_graph == "on":
            raise UserError(f"--cuda-graph on: {why}; auto falls back to eager steps")
        self.graph_note = f"Steps run eagerly, without a CUDA graph: {why}."

    def record_graphs(self):
        """-> list of (graph, its result, neighbours to fill before the next graph); the last one's result is the step's."""
        if self.ranks.world == 1:
            graph, out = record(lambda: self.eager(self.lanes), None, self.lanes.main)
            return [(graph, out, None)]
        graphs, steps, pool, received, done = [], self.compute(self.lanes), None, None, False

        def part():
            try:
                return steps.send(received and (lambda: received)), False
            except StopIteration as e:
                return e.value, True
        while not done:
            graph, (result, done) = record(part, pool, self.lanes.main)
            pool = graph.pool()                                     # what one graph leaves to the next stays where it is
            received = None if done else {i: torch.zeros_like(x) for i, x in result.items()}
            graphs.append((graph, result, received))
        return graphs

    def replay(self):
        """The recorded step -> what compute() returned when it was recorded, with this step's numbers in it."""
        for graph, result, received in self.graphs:
            graph.replay()
            if received is not None:
                for i, x in self.ranks.exchange(result)().items():
                    received[i].copy_(x)
        return result

    def moving(self):
        """Every tensor that a step changes."""
        tensors = [self.bad]
        for g in self.groups:
            for net in (g.ema, *(n.net for n in g.nets.values())):
                tensors += [*net.parameters(), *net.buffers()]
            for n in g.nets.values():
                tensors += [v for state in n.opt.state.values() for v in state.values()]
        return tensors

    def first_bad(self):
        """4096 * step + a number for name_bad: the first loss of this process that was not finite; 0 if all were. Waits for the device."""
        bad = self.bad.cpu()
        if not bad.any():
            return 0
        step = bad[bad > 0].min().item()
        k, role = (bad == step).nonzero()[0].tolist()
        return 4096 * step + 3 * self.groups[k].i + role

    # ------------------------------------------------------------------------------------------ state
    def states(self):
        """{i: all that moves in group i} of this rank's groups, as plain tensors and dicts on the CPU."""
        return on_cpu({g.i: {"ema": g.ema.state_dict(), **{role: {"net": n.net.state_dict(), "opt": n.opt.state_dict()["state"]}
                                                           for role, n in g.nets.items()}} for g in self.groups})

    def state(self):
        """The content of checkpoint.pt, on rank 0; None elsewhere."""
        groups = self.ranks.collect(self.states())
        return groups and {"format": FORMAT, "step": self.step_count, "groups": [groups[i] for i in sorted(groups)]}

    def load_state(self, states, step):
        """states {i: group state} as states() gives them."""
        for g in self.groups:
            saved = states[g.i]
            g.ema.load_state_dict(saved["ema"])
            for role, n in g.nets.items():
                n.net.load_state_dict(saved[role]["net"])
                n.opt.load_state_dict({"state": saved[role]["opt"], "param_groups": n.opt.state_dict()["param_groups"]})
                for p, moments in n.opt.state.items():              # the file may come from a device with another layout
                    for k in ("exp_avg", "exp_avg_sq"):
                        moments[k] = torch.empty_like(p).copy_(moments[k])
        self.use_given_rates()
        self.step_count, self.warm = step, 0
        if self.graphs:                                             # they still move the optimisers' old tensors
            self.graphs = self.graph_note = None


def on_cpu(state):
    """Nested dicts with their tensors on the CPU: from cuda:3 they would be sent to, and loaded on, cuda:3 wherever that is."""
    if isinstance(state, dict):
        new = copy.copy(state)                                      # with the versions that torch notes on a state_dict
        new.update((k, on_cpu(v)) for k, v in state.items())
        return new
    return state.cpu() if isinstance(state, torch.Tensor) else state


def name_bad(number):
    return f"{[*ROLES.values()][number % 3]} of group {number // 3}"


def lost(step, what, out):
    """The error of a run that has gone out of the numbers."""
    kept = out / "checkpoint.pt"
    return UserError(f"step {step}: {what} not finite; {f'the last good state is in {kept}' if kept.exists() else 'there is no checkpoint yet'}. "
                     "Lower rates (--g-lr, --d-lr, --c-lr) are the usual cure")


def probe(script, s, group):
    """Run one group's networks and losses on two samples and put everything back; say what is wrong with shapes or values."""
    dev = next(group.ema.parameters()).device
    z, y = torch.zeros(2, s.z_dim, device=dev), (torch.zeros(2, dtype=torch.long, device=dev),)
    labels = y if script.conditional else ()
    shape = lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    with torch.no_grad(), calling(script, f"Generator called with z (2, {s.z_dim}){' and y (2,)' if labels else ''}"):
        x = group.ema(z, *labels)
    want = (2, 3, s.image_size, s.image_size)
    if shape(x) != want:
        raise UserError(f"{script.path}: Generator returned {shape(x)} for z (2, {s.z_dim}); expected {want} (--image-size {s.image_size})")
    D = group.nets["D"].net
    before = {k: v.clone() for k, v in D.state_dict().items()}
    takes_y = takes(D.forward, "y")
    with torch.no_grad(), calling(script, f"Discriminator called with images {want}{' and y (2,)' if takes_y else ''}"):
        out = D(x, *(y if takes_y else ()))
    score = out[0] if isinstance(out, tuple) else out
    if shape(score) not in {(2,), (2, 1), (2, 1, 1, 1)}:
        raise UserError(f"{script.path}: Discriminator returned {shape(score)} for images {want}; "
                        "expected scores (2,), (2, 1) or (2, 1, 1, 1), or a tuple that begins with them")
    eps = {"eps": torch.full((2, 1, 1, 1), 0.5, device=dev)}
    for name, args in (("discriminator_loss", (x + 0.1, x, *labels * 2)), ("connector_loss", (x + 0.1, x, *labels * 2)), ("generator_loss", (x, *labels))):
        f = getattr(script, name)
        with calling(script, f"{name} on two samples"):
            value = f(D, *args, **bind(f, {**vars(s), **eps}))
        value, logs = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
        if shape(value) != () or not value.requires_grad or not isinstance(logs, dict):
            raise UserError(f"{script.path}: {name} returned {shape(value)}; expected a scalar with a gradient, or (scalar, dict)")
    D.load_state_dict(before)


# ---------------------------------------------------------------------------------------------- pictures
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")     # Okabe and Ito: told apart by colour-blind people too
DASHES = (0, 7, 3, 12)          # pixels on and off; 0 is solid


@functools.cache
def font(size):
    with contextlib.suppress(ImportError):
        return ImageFont.load_default(size)
    return ImageFont.load_default()                                 # Pillow without FreeType has one size


def legible(text):
    """Text in the letters that Pillow's own font has, which are ASCII's: accents go, any other letter becomes its code."""
    plain = unicodedata.normalize("NFKD", one_line(text))
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "backslashreplace").decode()


def to_uint8(x):
    """float (n, 3, H, W) in [-1, 1] -> uint8 (n, H, W, 3) on the CPU."""
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(blocks, columns, words=""):
    """blocks: list of (name, uint8 (n, H, W, 3)) -> one picture, every block in rows of `columns` with its name beside it, below `words`."""
    size = blocks[0][1].shape[1]
    size *= max(1, 64 // size)
    gap, margin = 2, 14 + math.ceil(max(font(11).getlength(legible(name)) for name, _ in blocks))
    rows = [math.ceil(len(a) / columns) for _, a in blocks]
    y = 16 * len(words.splitlines()) + gap
    sheet = Image.new("RGB", (margin + columns * (size + gap), y + sum(rows) * (size + gap) + (len(blocks) - 1) * 4 * gap), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 2), words, "#333333", font(12))
    for (name, images), n in zip(blocks, rows):
        pen.text((6, y + n * (size + gap) // 2), legible(name), "black", font(11), anchor="lm")
        for k, a in enumerate(images):
            place = (margin + k % columns * (size + gap), y + k // columns * (size + gap))
            sheet.paste(Image.fromarray(a).resize((size, size), Image.Resampling.NEAREST), place)
        y += n * (size + gap) + 4 * gap
    return sheet


def ticks(low, high, most=6):
    """At most `most` >= 2 round numbers in [low, high], multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / (most - 1)
    power = math.floor(math.log10(rough))
    step = next(m * 10.0 ** power for m in (1, 2, 5, 10) if m * 10.0 ** power >= rough * (1 - 1e-9))
    return [round(k * step, max(0, -power)) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_labels(values):
    """Numbers of one axis in one unit: 0, 10k, 20k."""
    most = max(map(abs, values), default=0)
    unit, name = (1e6, "M") if 1e6 <= most < 1e10 else (1e3, "k") if 1e4 <= most < 1e6 else (1, "")
    return [f"{v / unit:.7g}{name if v else ''}" for v in values]


def y_limits(lines):
    """(low, high) for lines [(values, smoothed values)]: an outlier, such as a spike at the start, does not flatten the rest.

    The middle 90 % and a margin of 0.4 times their reach, within all there is, and where every smoothed line ends.
    """
    v = np.concatenate([v[np.isfinite(v)] for v, _ in lines] or [[]])
    if not len(v):
        return 0.0, 1.0
    a, b = np.quantile(v, (0.05, 0.95))
    ends = [m[np.isfinite(m)][-1] for _, m in lines if np.isfinite(m).any()]
    low, high = min(max(v.min(), a - 0.4 * (b - a)), *ends, a), max(min(v.max(), b + 0.4 * (b - a)), *ends, b)
    if high - low <= 1e-6 * max(abs(low), abs(high)):               # a constant
        low, high = low - (0.1 * abs(low) or 0.5), high + (0.1 * abs(high) or 0.5)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def smooth(y, width):
    """Centred mean over `width` (odd) values; NaN is left out of it and stays NaN."""
    good, ones = np.isfinite(y), np.ones(min(width, len(y)))
    total, count = (np.convolve(a, ones, "same") for a in (np.where(good, y, 0), good.astype(float)))
    return np.where(good, total / np.maximum(count, 1), np.nan)


class Plot:
    """One panel: a frame with round numbers at its axes, into which lines are drawn. Twice the size, made smaller by `image`."""

    LEFT, TOP, RIGHT, BOTTOM = 54, 30, 12, 22

    def __init__(self, width, height, title, about, xlim, ylim):
        self.w, self.h, self.xlim, self.ylim = width - self.LEFT - self.RIGHT, height - self.TOP - self.BOTTOM, xlim, ylim
        self.sheet = Image.new("RGB", (2 * width, 2 * height), "white")
        self.inside = Image.new("RGB", (2 * self.w, 2 * self.h), "white")           # of its own: lines end at the frame
        self.pen, pen = ImageDraw.Draw(self.inside), ImageDraw.Draw(self.sheet)
        title = legible(title)
        pen.text((2 * self.LEFT, 16), title, "black", font(26))
        pen.text((2 * self.LEFT + pen.textlength(title, font(26)) + 16, 20), about, "#555555", font(21))
        at = ticks(*ylim)
        for v, text in zip(at, tick_labels(at)):
            y = self.y(v)
            self.pen.line([(0, y), (2 * self.w, y)], "#e6e6e6", 2)
            pen.text((2 * self.LEFT - 10, 2 * self.TOP + y), text, "#333333", font(21), anchor="rm")
        at = ticks(*xlim)
        for v, text in zip(at, tick_labels(at)):
            x = self.x(v)
            self.pen.line([(x, 0), (x, 2 * self.h)], "#f2f2f2", 2)
            pen.text((2 * self.LEFT + x, 2 * (height - self.BOTTOM) + 8), text, "#333333", font(21), anchor="mt" if x < 2 * self.w - 30 else "rt")

    def x(self, v):
        return np.clip((v - self.xlim[0]) / (self.xlim[1] - self.xlim[0]), -9, 9) * 2 * self.w

    def y(self, v):
        return np.clip((self.ylim[1] - v) / (self.ylim[1] - self.ylim[0]), -9, 9) * 2 * self.h

    def line(self, x, y, colour, width=2, dash=0, dots=False):
        """x, y (n,): a gap where y is NaN, a dot where a value stands alone; dash: pixels on and off."""
        good = np.flatnonzero(np.isfinite(y))
        for run in np.split(good, np.flatnonzero(np.diff(good) > 1) + 1):
            px, py = self.x(x[run]), self.y(y[run])
            for a, b in zip(px, py) if dots or len(run) == 1 else ():
                self.pen.ellipse([a - 2 * width - 1, b - 2 * width - 1, a + 2 * width + 1, b + 2 * width + 1], colour)
            if len(run) > 1 and dash:
                at = np.arange(px[0], px[-1] + 1)
                py = np.interp(at, px, py)
                for k in range(0, len(at), 4 * dash):
                    self.pen.line(list(zip(at[k:k + 2 * dash + 1], py[k:k + 2 * dash + 1])), colour, 2 * width)
            elif len(run) > 1:
                self.pen.line(list(zip(px, py)), colour, 2 * width)

    def faint(self, x, y, colour, pale=0.75):
        """The same, thin and pale (1: white); where lines cross their colours mix, so that the last does not hide the others."""
        layer = Image.new("RGB", self.inside.size, "white")
        self.pen = ImageDraw.Draw(layer)
        self.line(x, y, tuple(round(c + pale * (255 - c)) for c in ImageColor.getrgb(colour)), 1)
        self.inside.paste(ImageChops.multiply(self.inside, layer))
        self.pen = ImageDraw.Draw(self.inside)

    def image(self):
        self.sheet.paste(self.inside, (2 * self.LEFT, 2 * self.TOP))
        ImageDraw.Draw(self.sheet).rectangle([2 * self.LEFT - 1, 2 * self.TOP - 1, 2 * (self.LEFT + self.w), 2 * (self.TOP + self.h)], outline="#888888")
        return self.sheet.reduce(2)


@torch.inference_mode()
def generate(G, z, y=None, chunk=CHUNK):
    """Images of a generator in eval mode: z (n, z_dim), y (n,) or None -> uint8 (n, H, W, 3)."""
    dev = next(G.parameters()).device
    parts = []
    with parametrize.cached():
        for k in range(0, len(z), chunk):
            a = z[k:k + chunk].to(dev)
            parts.append(to_uint8(G(a) if y is None else G(a, y[k:k + chunk].to(dev))))
    return np.concatenate(parts)


def sample_grid(trainer, path):
    """Every group's averaged generator on the same fixed z: two rows of ten per group, or a row in each of the first ten classes."""
    s, names = trainer.s, trainer.data.classes[:10]
    z, y = draw(s.seed, 0, 0, "grid", "normal", (10 if names else 20, s.z_dim)), None
    if names:
        z, y = z.repeat(len(names), 1), torch.arange(len(names)).repeat_interleave(10)
    images = trainer.ranks.collect({g.i: generate(g.ema, z, y) for g in trainer.groups})
    if images is not None:
        parts = [(f"G{i}  {name}", images[i][10 * k:10 * k + 10]) for i in sorted(images) for k, name in enumerate(names)]
        save_image(grid(parts or [(f"G{i}", images[i]) for i in sorted(images)], 10), path)


def real_grid(trainer, path):
    """Real images in the layout of sample_grid."""
    data = trainer.data
    pick = draw(trainer.s.seed, 0, 0, "real grid", "permutation", len(data.images))
    labels = data.labels.cpu()[pick]
    rows = [(name, pick[labels == c][:10]) for c, name in enumerate(data.classes[:10])] or [("real", pick[:20])]
    save_image(grid([(name, to_hwc(data.images[k])) for name, k in rows if len(k)], 10), path)


def to_hwc(images):
    return images.permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------- the run folder
@contextlib.contextmanager
def writing(path):
    """Turn a failed write (disk full, read-only folder) into one line."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        raise UserError(f"cannot write {path}: {brief(e)}") from e


@contextlib.contextmanager
def replacing(path, sync=True):
    """Yields a temporary file beside `path`, open for writing; it takes the final name only when all went well.

    sync: its content is on the disk before the name is, whatever happens to the machine; thousands of small files would wait for that.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with writing(path):
            with open(tmp, "wb") as f:
                yield f
                f.flush()
                if sync:
                    os.fsync(f.fileno())
            os.replace(tmp, path)
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()


def save_image(image, path):
    with replacing(path) as f:
        image.save(f, "PNG")


def save_json(obj, path):
    with replacing(path) as f:
        f.write((json.dumps(obj, indent=1) + "\n").encode())


def save_checkpoint(trainer, out):
    """checkpoint.pt, and the averaged generators as G1.pt, G2.pt, ...; rank 0 writes what all ranks send. Raises UserError where numbers are lost.

    A gradient may overflow where the loss does not yet: the loss of the next step would tell, but the last good checkpoint would be gone.
    """
    state = trainer.state()
    if state is None:
        return
    for i, group in enumerate(state["groups"], 1):
        for role in group.keys() - {"ema"}:
            if not all(v.isfinite().all() for tensors in (group[role]["net"], *group[role]["opt"].values()) for v in tensors.values()):
                raise lost(trainer.step_count, f"weights or moments of the {ROLES[role.lower()]} of group {i} are", out)
    with replacing(out / "checkpoint.pt") as f:
        torch.save(state, f)
    for i, group in enumerate(state["groups"], 1):
        save_generator(trainer, i, group["ema"], out / f"G{i}.pt")


def save_generator(trainer, i, state_dict, path):
    script, s = trainer.script, trainer.s
    beside = Path(__file__).resolve().parent / script.path.name
    with replacing(path) as f:
        torch.save({"model": script.name if beside == script.path else str(script.path), "kwargs": bind(script.Generator, vars(s)),
                    "state_dict": state_dict, "step": trainer.step_count, "classes": trainer.data.classes, "z_dim": s.z_dim}, f)


def load_file(path):
    """torch.load of tensors and plain values only: nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as z:                            # torch.save packs nothing: what is packed may be a bomb
            if any(i.compress_type != zipfile.ZIP_STORED for i in z.infolist()):
                raise ValueError("compressed")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:
        raise UserError(f"{path} is cut short or was not written by okd_train.py ({type(e).__name__})") from e


def load_generator(path, device="cpu", model=None):
    """G1.pt -> the generator in eval mode on `device`; `model` names the script where it moved. Raises UserError.

    Call it with z (B, z_dim) ~ N(0, I), and y (B,) int64 if the file's `classes` is not empty -> (B, 3, H, W) in [-1, 1].
    """
    d = load_file(path)
    if not isinstance(d, dict) or not {"model", "kwargs", "state_dict", "step", "classes", "z_dim"} <= d.keys():
        raise UserError(f"{path} is not a generator written by okd_train.py")
    script = Script(str(model or d["model"]))
    try:
        G = script.Generator(**d["kwargs"])
        G.load_state_dict(d["state_dict"])
        if not all(v.isfinite().all() for v in d["state_dict"].values()):
            raise ValueError("its numbers are not finite")
    except Exception as e:                                          # a constructor may raise anything at arguments that are none
        raise UserError(f"{path} does not fit {model or d['model']}: {brief(e)}") from e
    return G.eval().requires_grad_(False).to(device)


def read_checkpoint(path, n_groups):
    """checkpoint.pt -> its dict; UserError if it is not one or not of so many groups."""
    state = load_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT or not {"step", "groups"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of okd_train.py ({FORMAT})")
    if type(state["step"]) is not int or not 0 < state["step"] <= LIMITS["steps"][1] or not isinstance(state["groups"], list):
        raise UserError(f"{path} is damaged: its step or groups make no sense")
    if len(state["groups"]) != n_groups:
        raise UserError(f"{path} holds {len(state['groups'])} groups, not {n_groups}")
    return state


def check_state(trainer, states):
    """Raise ValueError unless states {i: group state} hold exactly the tensors that these groups have, by name, shape and type, all finite.

    torch copies a float64 into a float32 and a NaN into anything, and looks at Adam's sums only in the next step.
    """
    def compare(place, saved, want):
        if saved.keys() != want.keys():
            raise ValueError(f"{place} has other names: {sorted(map(str, saved.keys() ^ want.keys()))[0]}")
        for k, w in want.items():
            if not isinstance(saved[k], torch.Tensor) or saved[k].shape != w.shape or saved[k].dtype != w.dtype or saved[k].layout != torch.strided:
                raise ValueError(f"{place} {k} is no {str(w.dtype).split('.')[-1]} tensor {tuple(w.shape)}")
            if w.is_floating_point() and not saved[k].isfinite().all():
                raise ValueError(f"{place} {k} is not finite")

    for g in trainer.groups:
        saved = states[g.i]
        compare(f"group {g.i} average", saved["ema"], g.ema.state_dict())
        for role, n in g.nets.items():
            compare(f"group {g.i} {role}", saved[role]["net"], n.net.state_dict())
            for k, sums in saved[role]["opt"].items():
                compare(f"group {g.i} {role} optimiser {k}", sums, dict(step=torch.zeros(()), exp_avg=n.params[k], exp_avg_sq=n.params[k]))


def cut_log(path, step, every):
    """Drop what an interrupted run wrote after its checkpoint at `step`, half lines, and a line at `step` that only its end had (no multiple of `every`)."""
    kept = [line for line in read_lines(path) if line["step"] < step + (step % every == 0)]
    if path.exists():
        with replacing(path) as f:
            f.write("".join(json.dumps(line) + "\n" for line in kept).encode())


def append_line(path, line):
    with writing(path), open(path, "ab") as f:
        f.write(json.dumps(line).encode() + b"\n")


def read_lines(path, numbers=(), most=math.inf):
    """Objects of a .jsonl file with a whole step and a number at each of `numbers`: at most about `most`, evenly thinned; [] without the file.

    What is none is passed over: half a line of a run that goes on, garbage. UserError where the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    kept = []
    for text in lines[::-1][::max(1, math.ceil(len(lines) / most))][::-1]:          # the last line is among them
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            line = json.loads(text)
            if type(line["step"]) is int and line["step"] >= 0 and all(isinstance(line[k], (int, float)) for k in numbers):
                kept.append(line)
    return kept


def score_lines(out, groups=1):
    """Lines of fid.jsonl that have a score of each group."""
    return read_lines(out / "fid.jsonl", [f"G{i}" for i in range(1, groups + 1)])


# ---------------------------------------------------------------------------------------------- one run, one trainer
class Lock:
    """Keeps a second training out of a run folder: flock on OUT/.lock, which the kernel frees however the process ends.

    take() makes the folder. Leaving the `with` removes the file, and the folder if nothing else came into it; what kill -9 leaves of the
    file holds nobody up. The file says who holds it. Where locks do not work (NFS without its service) take() says so and goes on.
    """

    def __init__(self, out):
        self.path, self.fd, self.made = Path(out) / ".lock", None, []

    def __enter__(self):
        return self

    def take(self, say):
        out = self.path.parent
        with writing(out):
            self.made = [p for p in (out, *out.parents) if not p.exists()]
            out.mkdir(parents=True, exist_ok=True)
        while fcntl and self.fd is None:
            with writing(self.path):
                self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self.fd, 200).decode(errors="replace").strip() or "another process"
                self.drop()
                raise UserError(f"{out} is being trained by {holder}: wait for it, stop it, or name another folder with --out") from None
            except OSError as e:
                self.drop()
                say(f"Note: {out} cannot be locked ({e.strerror}); see to it that no second run uses it.")
                return
            with contextlib.suppress(OSError):
                if os.stat(self.path).st_ino == os.fstat(self.fd).st_ino:
                    with writing(self.path):
                        os.ftruncate(self.fd, 0)
                        os.write(self.fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return
            self.drop()                                             # its last holder removed the file between our open and our lock

    def drop(self):
        os.close(self.fd)
        self.fd = None

    def __exit__(self, *exc):
        if self.fd is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.drop()
        for folder in self.made:
            with contextlib.suppress(OSError):
                folder.rmdir()


# ---------------------------------------------------------------------------------------------- scores during training
class Scores:
    """FID of every group's averaged generator against the real images (or rFD, its offline stand-in), with fid.py.

    Made before training starts, so that missing weights are not found out after a night. Real features are computed once and kept
    in the run folder; every rank computes features of what its groups draw, rank 0 does the rest.
    """

    def __init__(self, s, script, data, ranks, device):
        import fid
        self.fid, self.s, self.data, self.ranks, self.device = fid, s, data, ranks, device
        self.name = "FID" if s.fid_features == "inception" else "rFD"
        self.n = s.fid_samples or (10000 if device.type == "cuda" else 2000)
        self.images, self.of = data.images, data.digest
        if s.fid_data:
            self.images, _, _ = load_images(s.fid_data, s.image_size, False, s.skip_bad, lambda text: None)
            self.of = digest(self.images.numpy(), 16)
        try:
            self.model = fid.inception(device=device) if s.fid_features == "inception" else fid.random_networks(device)
        except fid.FidError as e:
            raise UserError(f"--fid-every: {e}; --fid-features random needs no weights") from e
        self.distance = fid.frechet_distance if s.fid_features == "inception" else fid.random_distance
        if min(len(self.images), self.n) < 4:
            raise UserError(f"--fid-every: {len(self.images)} real images and {self.n} fakes; scores need at least 4 of each")

    def features(self, images):
        return self.fid.features(images, model=self.model, batch_size=CHUNK)

    def real(self, out):
        """Features of the real images and the floor, from the run folder where they are those of these images and this network. Rank 0."""
        path, key = out / "real_features.npz", f"{self.of} {self.s.fid_features} {getattr(self.model, 'digest', '')}"
        if path.exists():
            with contextlib.suppress(Exception):                    # cut or foreign: computed anew
                with np.load(path, allow_pickle=False) as f:
                    if str(f["of"]) == key:
                        return f["features"], float(f["floor"])
        features = self.features(self.images)
        floor = float(self.distance(*self.fid.halves(features)))
        with replacing(path) as f:
            np.savez(f, features=features, floor=floor, of=key)
        return features, floor

    def __call__(self, trainer, out, progress):
        """Append a line to fid.jsonl, keep each group's best generator as G1.best.pt; the line, on rank 0."""
        s, ranks, classes, mine = self.s, self.ranks, self.data.classes, {}
        for g in trainer.groups:
            for c in range(ranks.part, math.ceil(self.n / CHUNK), ranks.replicas):
                z = draw(s.seed, c, 0, "fid", "normal", (CHUNK, s.z_dim))
                y = (torch.arange(CHUNK) + c * CHUNK) % len(classes) if classes else None
                mine[g.i, c] = self.features(generate(g.ema, z, y)[:self.n - c * CHUNK])
        parts, states = ranks.collect(mine), ranks.collect({g.i: on_cpu(g.ema.state_dict()) for g in trainer.groups})
        if parts is None:
            return None
        real, floor = self.real(out)
        fakes = {i: np.concatenate([parts[i, c] for c in range(math.ceil(self.n / CHUNK))]) for i in range(1, s.groups + 1)}
        score = {f"G{i}": float(self.distance(real, f)) for i, f in fakes.items()}
        line = {"step": trainer.step_count, "score": self.name, "samples": self.n, "reals": len(real), **score,
                "mean": sum(score.values()) / len(score), "union": float(self.distance(real, np.concatenate(list(fakes.values())))), "floor": floor}
        for i in fakes:
            if all(line[f"G{i}"] < old[f"G{i}"] for old in score_lines(out, s.groups)):
                save_generator(trainer, i, states[i], out / f"G{i}.best.pt")
        append_line(out / "fid.jsonl", line)
        progress.say(f"{self.name} at step {line['step']}: " + "  ".join(f"{k} {line[k]:.2f}" for k in (*score, "mean", "union", "floor")))
        return line


# ---------------------------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def trainer_flags(p):
    p.add_argument("--model", default="sagan", metavar="NAME|FILE.py", help="model script: NAME.py here or beside okd_train.py, or a path (default sagan)")
    p.add_argument("--groups", type=int, default=3, metavar="N", help="number of GANs in the ring (default 3; 1 is the plain baseline)")
    p.add_argument("--data", metavar="DIR", help="folder of images, searched recursively; class = first folder below (default: a small synthetic set)")
    p.add_argument("--out", metavar="DIR", help="run folder (default runs/MODEL-GROUPS)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out; settings not named come from it")
    p.add_argument("--steps", type=int, default=50000, help="training steps in all (default 50000, the paper's)")
    p.add_argument("--epochs", type=float, metavar="E", help="passes over the data in place of --steps")
    p.add_argument("--max-seconds", type=float, metavar="S", help="stop after S seconds, saved; --resume goes on")
    p.add_argument("--quick", action="store_true", help="a first look within five minutes on two cores: small images, thin networks, own rates")
    p.add_argument("--seed", type=int, default=0, help="all chance of a run comes from it (default 0)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    p.add_argument("--nproc", type=int, metavar="K", help="processes to start (default: one per GPU, at most one per group; 1 forbids)")
    p.add_argument("--cuda-graph", choices=("auto", "on", "off"), default="auto", help="capture the whole step and replay it (default auto: where it works; on: or stop)")
    p.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="of products; penalties stay at tf32 in bf16 (default tf32 on CUDA, else fp32)")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror real images at random (default no)")
    p.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and say how many")
    p.add_argument("--log-every", type=int, default=10, metavar="K", help="steps between lines of log.jsonl (default 10)")
    p.add_argument("--sample-every", type=int, default=500, metavar="K", help="steps between sample grids (default 500)")
    p.add_argument("--save-every", type=int, default=500, metavar="K", help="steps between checkpoints (default 500)")
    p.add_argument("--fid-every", type=int, metavar="K", help="score every group every K steps and at the end, into fid.jsonl (default never)")
    p.add_argument("--fid-samples", type=int, metavar="N", help="fakes per group and score (default 2000 on the CPU, 10000 on CUDA)")
    p.add_argument("--fid-data", metavar="DIR", help="held-out images to score against (default: the training images)")
    p.add_argument("--fid-features", choices=("inception", "random"), default="inception", help="random: rFD, needs no weights (default inception)")
    p.add_argument("--check", action="store_true", help="do not train: say within a minute whether this machine is ready for the run, and what is missing")
    p.add_argument("--benchmark", type=int, nargs="?", const=10, metavar="STEPS", help="do not train: time a step of these settings on this machine, by phase, and count it (default 10 steps)")
    p.add_argument("--json", action="store_true", help="with --benchmark: one JSON object in place of the table")
    p.add_argument("--sample", type=int, metavar="N", help="do not train: write N images per group of the run in --out, with manifest.csv; a stopped export "
                   "goes on when the same command is given")
    p.add_argument("--per-class", metavar="CLASS=N,...", help="in place of --sample N: exactly so many images of these classes per group, of a class-conditional run")
    p.add_argument("--group", default="all", metavar="all|best|1,3", help="whose images; best: the group and step with the lowest score of --fid-every (default all)")
    p.add_argument("--to", metavar="DIR", help="empty or new folder for the images (default OUT/fakes)")
    p.add_argument("--npz", action="store_true", help="a file G1.npz (arr_0, labels, classes, group) per group in place of PNGs")
    p.add_argument("--curves", action="store_true", help="do not train: draw losses, scores and all that the log has to OUT/curves.png")
    p.add_argument("--interpolate", type=int, nargs="?", const=10, metavar="K", help="do not train: K images from one z to another, to OUT/interpolate.png (default 10)")
    p.add_argument("--attention-maps", action="store_true", help="do not train: where three positions look, in every attention layer, to OUT/attention.png")
    p.add_argument("--report", action="store_true", help="do not train: all of these and more on one page, OUT/report.html")


def parse(argv):
    """argv -> (settings, script, names of the flags that were given)."""
    argv = [re.sub("^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in argv]
    first = Parser(add_help=False, allow_abbrev=False)
    for name in ("model", "out", "resume", "sample", "per_class", *PICTURES):
        first.add_argument(flag(name), **({} if name in ("model", "out") else dict(nargs="?", const=True)))
    early, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    saved = {}
    if early.model is None and early.out and (early.resume or exports(early) or asked(early)) and (Path(early.out) / "args.json").exists():
        saved = read_args(Path(early.out))
    model = early.model if early.model is not None else saved.get("model", "sagan")
    same = saved and Path(saved["script"]).is_file()                # `model` may be a name in another folder
    script = Script(saved["script"] if same else model)

    p = Parser(prog="okd_train.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainer_flags(p)
    own = {a.dest for a in p._actions}
    group = p.add_argument_group(f"settings of {script.name}")
    for key, value in script.hparams.items():
        if key in own:
            raise UserError(f"{script.path}: hparams has {key!r}, which clashes with the trainer's own flag {flag(key)}")
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(value, bool) else dict(type=type(value), metavar=type(value).__name__.upper())
        try:
            group.add_argument(flag(key), default=value, help=f"(default {value})".replace("%", "%%"), **kind)
        except argparse.ArgumentError as e:                         # x=True brings --no-x too
            raise UserError(f"{script.path}: hparams has {key!r}, whose flag {' '.join(e.message.split())}") from None
    s = p.parse_args(argv)
    for action in p._actions:                                       # a second pass without defaults tells what was named
        action.default = argparse.SUPPRESS
    named = set(vars(p.parse_args(argv)))
    s.model = model
    return s, script, named


def asked(s):
    """The pictures that the flags ask for."""
    return [name for name in PICTURES if getattr(s, name)]


def read_args(out):
    """args.json -> its dict with the settings beside the rest; UserError if it is not what save_args writes."""
    try:
        saved = json.loads((out / "args.json").read_text())
        for key, kind in dict(model=str, script=str, classes=list, images=int, data_digest=str, settings=dict).items():
            if type(saved.get(key)) is not kind:
                raise ValueError(f"{key} is missing or not a {kind.__name__}")
        if not all(isinstance(c, str) and c and c == Path(c).name and c != ".." for c in saved["classes"]):
            raise ValueError("classes are no names of folders")     # --sample makes folders of these names
        if not isinstance(saved.setdefault("agents", []), list):
            raise ValueError("agents is not a list")
        return {**saved["settings"], **saved}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{out} is not a run: it has no args.json") from None
    except (ValueError, AttributeError, RecursionError, OSError) as e:
        raise UserError(f"{out / 'args.json'} cannot be read: {e}") from e


def check_settings(saved, s, script, path):
    """Refuse settings of args.json that this program cannot have written: edited by hand, or by another version of the script."""
    for key in script.hparams.keys() | {"groups", "seed", "flip"}:
        if key not in saved["settings"]:
            raise UserError(f"{path}: settings lack {key!r}; put it back, or start another run with --out")
    for key, value in saved["settings"].items():
        if not hasattr(s, key):
            raise UserError(f"{path}: settings hold {key!r}, which {script.name} has no flag for; take it out, or start another run with --out")
        kind = NONE_BY_DEFAULT.get(key) or type(getattr(s, key))
        if not (type(value) is kind or kind is float and type(value) is int or value is None and key in NONE_BY_DEFAULT):
            raise UserError(f"{path}: {key!r} is {json.dumps(value)[:60]}; it must be a {kind.__name__}")
    if script.conditional and saved["n_classes"] != len(saved["classes"]):
        raise UserError(f"{path}: n_classes is {saved['n_classes']}, but {len(saved['classes'])} classes are named")


def settle(s, script, named):
    """Put presets and a resumed run's settings in, and check every value. Returns what --quick or --resume changed."""
    changed = {}
    if s.out is None:
        s.out = f"runs/{script.name}-{s.groups}"
    args, timed = Path(s.out) / "args.json", s.benchmark is not None
    for idle, why in (
            (named - {*PICTURES, "out", "model", "device"} if asked(s) else (),
             f"no use beside {', '.join(map(flag, asked(s)))}, which reads the run in --out and does not train; leave it out"),
            (named & (MAY_CHANGE - {"device", "nproc"} | {"resume"} if exports(s) else {"group", "to", "npz"}),
             f"without effect {'with' if exports(s) else 'without'} --sample or --per-class"),
            (named & (MAY_CHANGE - {"device", "cuda_graph", "precision"} | {"resume", "out", "nproc", "sample", "per_class"} if timed else {"json"}),
             f"without effect {'with' if timed else 'without'} --benchmark")):
        if idle:
            raise UserError(f"{', '.join(map(flag, sorted(idle)))}: {why}")
    if (s.resume or exports(s) or asked(s)) and args.exists():
        saved = read_args(Path(s.out))
        if "model" in named and Path(saved["script"]).stem != script.name:
            raise UserError(f"{s.out} was trained with {saved['model']}, not with {script.name}")
        check_settings(saved, s, script, args)
        clash = []
        for key, old in saved["settings"].items():
            same = getattr(s, key) == old or (key == "data" and s.data and old and Path(s.data).resolve() == Path(old).resolve())
            if key in named and not same and key not in MAY_CHANGE:
                clash.append(f"{flag(key)} is {old} there and {getattr(s, key)} here")
            elif key not in named and not (key == "device" and asked(s)):       # pictures are also drawn on another machine
                setattr(s, key, old)
        if "steps" in named and "epochs" not in named:
            s.epochs = None
        if clash:
            raise UserError(f"--resume of {s.out}: {'; '.join(clash)}")
    elif s.quick:
        for key, value in QUICK.items():
            if hasattr(s, key) and key not in named and (key != "steps" or "epochs" not in named):
                setattr(s, key, value)
                changed[key] = value
    if "steps" in named and "epochs" in named:
        raise UserError("--steps and --epochs both say how long; give one")
    for key, value in vars(s).items():
        low, high = LIMITS.get(key, (None, None)) if value is not None else (None, None)
        wrong = ("is empty" if value == "" else
                 "holds a null character" if isinstance(value, str) and "\0" in value else
                 f"is {value}; it must be finite" if isinstance(value, float) and not math.isfinite(value) else
                 f"is {value}; it must be {low} or more" if low is not None and value < low else
                 f"is {value}; it must be at most {high}" if high is not None and value > high else "")
        if wrong:
            raise UserError(f"{flag(key)} {wrong}")
    if s.nproc and s.nproc > s.groups * s.batch_size:
        raise UserError(f"--nproc is {s.nproc}: {s.groups} groups with batches of {s.batch_size} keep at most {s.groups * s.batch_size} processes busy; use fewer")
    return changed


def pick_device(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if device.index is None:                                # the second machine's rank 8 has local rank 0
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()                        # "meta" has no values
        return device
    except Exception as e:
        raise UserError(f"--device {name} cannot be used here: {brief(e)}") from e


def set_precision(s, device):
    """Tell torch in what products of fp32 numbers run, and return it: --precision or the device's default. bf16 comes by autocast."""
    precision = s.precision or ("tf32" if device.type == "cuda" else "fp32")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    elif precision == "tf32":
        raise UserError(f"--precision tf32 is arithmetic of CUDA devices, and the device is {device.type}; use fp32 or bf16")
    return precision


def span(seconds):
    """'45 s', '12 min', '3.2 h', '4.1 days'."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------------------------------------- training
class Progress:
    """One line that is rewritten in place on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, total, quiet=False):
        self.total, self.tty, self.quiet = total, sys.stdout.isatty(), quiet
        self.last, self.open = 0.0, False
        self.marks = []                                             # (time, step) of the last 30 s

    def __call__(self, step, s=None, out=None):
        now = time.monotonic()
        self.marks = [m for m in self.marks if m[0] > now - 30][-200:] + [(now, step)]
        if self.quiet or now - self.last < (0.2 if self.tty else 10):
            return
        self.last = now
        (t0, s0), (t1, s1) = self.marks[0], self.marks[-1]
        rate = (s1 - s0) / (t1 - t0) if t1 > t0 else 0
        left = span((self.total - step) / rate) if rate else "?"
        if s is None:                                               # an export: steps are images
            line = f"image {step}/{self.total}  {rate:.1f} img/s  {left} left"
        else:
            losses = "  ".join(f"{r} {sum(v[r][0].item() for v in out.values()) / len(out):+.3f}" for r in ("dcg" if s.groups > 1 else "dg"))
            line = f"step {step}/{self.total}  {losses}  {rate * s.batch_size * s.groups:.1f} img/s  {left} left"
        print(f"\r{line}\x1b[K" if self.tty else line, end="" if self.tty else "\n", flush=True)
        self.open = self.tty

    def say(self, text):
        if not self.quiet:
            print(("\n" if self.open else "") + text, flush=True)
        self.open = False


class Stop:
    """SIGTERM and Ctrl-C finish the step. A second one ends a lone process at once; a launcher repeats its signals, so there it does not."""

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self.old = {k: signal.signal(k, self) for k in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __call__(self, number, frame):
        self.signal = self.signal or int(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self.__exit__()

    def __exit__(self, *exc):
        for k, old in self.old.items():
            signal.signal(k, old)


def write_log(trainer, losses, out, seconds, rate):
    """Append one JSON object to log.jsonl; what a group's ranks saw of a batch is averaged by their shares."""
    ranks, mine = trainer.ranks, {}
    for g in trainer.groups:
        row = {}
        for role, (value, logs) in losses[g.i].items():
            row[f"{role}_loss"] = value.item()
            row.update({f"{role}_{k}": float(v) for k, v in logs.items()})
        row["gamma"] = {role: [v.item() for v in values] for role, values in g.gammas().items()}
        mine[g.i, ranks.part] = (ranks.share, row)
    rows = ranks.collect(mine)
    if rows is None:
        return
    groups = []
    for i in range(1, ranks.n_groups + 1):
        parts = [rows[i, k] for k in range(len(ranks.owners[i]))]
        groups.append({k: v if k == "gamma" else sum(share * row[k] for share, row in parts) for k, v in parts[0][1].items()})
    line = {"step": trainer.step_count, "seconds": round(seconds, 3), "images_per_second": round(rate, 2), "groups": groups}
    append_line(out / "log.jsonl", line)


def holds_run(out):
    return any((out / name).exists() for name in ("args.json", "checkpoint.pt", "log.jsonl"))


def open_run(s, data, out, agents):
    """Make the run folder, or read the checkpoint of the one that is there (None if it is new). Rank 0 only.

    Nothing that is there is overwritten.
    """
    checkpoint = out / "checkpoint.pt"                               # a run that our own torchrun began: it has restarted us
    restarted = (out / "args.json").exists() and not {a for a in agents if a}.isdisjoint(read_args(out).get("agents", []))
    if s.resume or (restarted and checkpoint.exists()):
        if not checkpoint.exists():
            raise UserError(f"--resume: no checkpoint in {out}")
        saved = read_args(out)
        if saved["data_digest"] != data.digest:
            raise UserError(f"--resume: the {len(data.images)} images of {s.data or 'the synthetic set'} are not those "
                            f"that {out} was trained on ({saved['images']} images); restore them, or start another run with --out")
        return read_checkpoint(checkpoint, s.groups)
    if not restarted and holds_run(out):
        hint = "go on with --resume" if checkpoint.exists() else "it has no checkpoint yet: delete it"
        raise UserError(f"{out} already holds a run: {hint}, or name another folder with --out")
    return None


def agent():
    """Which torchrun this process was started by, the same over its restarts; "" without one."""
    if OUTER in os.environ:
        return os.environ[OUTER]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} on {socket.gethostname()}, process {os.getppid()}"


def begin_run(s, script, trainer, out, agents):
    """Write what stands at the beginning of a run, or of its continuation. Rank 0 only."""
    with writing(out):
        (out / "samples").mkdir(parents=True, exist_ok=True)
        if trainer.step_count:
            saved = read_args(out)
            cut_log(out / "log.jsonl", trainer.step_count, saved["log_every"])
            cut_log(out / "fid.jsonl", trainer.step_count, saved.get("fid_every") or 1)
        else:
            (out / "log.jsonl").write_bytes(b"")
            (out / "fid.jsonl").unlink(missing_ok=True)             # of a run whose other files were deleted
    save_args(s, script, trainer.data, out, agents)
    real_grid(trainer, out / "samples" / "real.png")


def save_args(s, script, data, out, agents):
    """args.json: every setting, and what they were used on."""
    settings = {k: v for k, v in vars(s).items() if k not in ("resume", "sample", "check", "per_class", "group", "to", "npz", "benchmark", "json", "out", "model", "nproc", *PICTURES)}
    save_json({"model": s.model, "script": str(script.path), "classes": data.classes, "images": len(data.images), "data_digest": data.digest,
               "script_digest": digest(script.path, 16),
               "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
               "git": git_revision(), "agents": agents, "settings": settings}, out / "args.json")


def git_revision():
    """Commit of the checkout that this file lies in, or None; read from .git without running anything."""
    try:
        git = Path(__file__).resolve().parent / ".git"
        head = (git / "HEAD").read_text().strip()
        return head if not head.startswith("ref: ") else (git / head[5:]).read_text().strip()
    except OSError:
        return None


def train(s, script, named, changed, lock):
    """A run, or its continuation, from the data to the last step. named: flags that were given; changed: what --quick set."""
    keep_freed_memory()
    device = pick_device(s.device)
    precision = set_precision(s, device)
    if s.quick and device.type == "cpu":
        torch.set_num_threads(1)                                    # at this size a second one gains little, and much is lost where cores are shared
    ranks = Ranks(s.groups, s.batch_size, device)
    say = (lambda text: print(text, flush=True)) if ranks.rank == 0 else (lambda text: None)
    out = Path(s.out)
    data = shared_data(s, script, named, device, ranks, say)
    if s.epochs is not None:
        s.steps = max(1, math.ceil(s.epochs * len(data.images) / (s.batch_size * s.n_critic)))
    ranks.compare(settings=json.dumps({k: v for k, v in vars(s).items() if k not in ("out", "data", "device")}, sort_keys=True, default=str),
                  data=data.digest, code=digest(Path(__file__)) + digest(script.path))
    saved, agents = None, ranks.everyone(agent())
    with ranks.together():
        trainer = Trainer(script, s, data, device, ranks)
        probe(script, s, trainer.groups[0])
        if ranks.replicas > 1:
            check_split(script, s, trainer.groups[0])
        scores = Scores(s, script, data, ranks, device) if s.fid_every else None
        if ranks.rank == 0:
            if not s.resume or out.exists():                        # there is nothing to go on with
                lock.take(say)
            saved = open_run(s, data, out, agents)
    states = ranks.hand_out([saved and ({i: saved["groups"][i - 1] for i, owners in ranks.owners.items() if r in owners}, saved["step"])
                             for r in range(ranks.world)])
    with ranks.together():
        if states:
            try:
                check_state(trainer, states[0])
                trainer.load_state(*states)
            except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as e:
                raise UserError(f"{out / 'checkpoint.pt'} does not fit these networks: {brief(e)}") from e
    if trainer.step_count >= s.steps:
        say(f"Nothing to do: {out} is at step {trainer.step_count} of {s.steps}; raise --steps to train on.")
        return ranks.close()
    with ranks.together():
        if ranks.rank == 0:
            begin_run(s, script, trainer, out, agents)

    say(announcement(trainer, s, named, changed, precision))
    loop(trainer, s, out, scores)
    ranks.close()


def announcement(trainer, s, named, changed, precision):
    """What is trained on what, where its results go, and which of the flags that were given do nothing."""
    script, data, ranks, out = trainer.script, trainer.data, trainer.ranks, Path(s.out)
    count = lambda n: f"{sum(p.numel() for p in n.params) / 1e6:.2f} M"
    nets = trainer.groups[0].nets
    ring = f"{s.groups} {script.name} groups in a ring (rho {s.rho})" if s.groups > 1 else f"one {script.name} group, the baseline without connectors"
    source = f"{len(data.images)} images of {s.data}" if s.data else (
        f"{len(data.images)} SYNTHETIC images of concrete defects, drawn by crop_codebrim.py because no --data was given")
    text = (f"Training {ring}: generator {count(nets['G'])}, discriminator {count(nets['D'])} parameters"
            f"{', a connector like it' if s.groups > 1 else ''}, {s.image_size}x{s.image_size}, batch {s.batch_size}, on {source}"
            f"{f' in {len(data.classes)} classes' if data.classes else ''}. Device: {describe(trainer.device)}"
            f"{f', {ranks.world} processes' if ranks.world > 1 else ''}, {precision}. {trainer.graph_note + ' ' if trainer.graph_note else ''}Pictures every {s.sample_every} steps in "
            f"{out / 'samples'}/, log every {s.log_every} in {out / 'log.jsonl'}, checkpoint every {s.save_every}.")
    if changed:
        text += " --quick set " + ", ".join(f"{flag(k)} {v}" for k, v in changed.items()) + "."
    if trainer.step_count:
        text += f" Resumed at step {trainer.step_count}."
    for idle, why in (({"rho", "c_lr", "c_penalty", "c_aux"} if s.groups == 1 else set(), "one group has no connector"),
                      ({"fid_samples", "fid_data", "fid_features"} if not s.fid_every else set(), "scores are made with --fid-every K only")):
        if idle & named:
            text += f" Note: {', '.join(map(flag, sorted(idle & named)))} without effect, {why}."
    if s.groups > 1 and s.rho > 1:
        text += " Note: with rho above 1 it pays a generator to copy its neighbour rather than to follow the data."
    return text


def shared_data(s, script, named, device, ranks, say):
    """The data set on every rank: one rank of each machine decodes it, the others of that machine receive it."""
    loaded = None
    with ranks.together():
        if ranks.local_rank == 0:
            loaded = (load_images(s.data, s.image_size, script.conditional, s.skip_bad, say) if s.data
                      else synthetic_images(s.image_size, script.conditional))
            images, labels, classes = loaded
            source = s.data or "the synthetic set"
            if script.conditional and "n_classes" in named and s.n_classes != len(classes):
                raise UserError(f"--n-classes is {s.n_classes}, but {source} has {len(classes)} class folders: {', '.join(classes)}")
            if len(images) < s.batch_size:
                raise UserError(f"{source} has {len(images)} images, fewer than one batch (--batch-size {s.batch_size})")
    if ranks.world > 1:
        first = ranks.rank - ranks.local_rank
        head = [loaded and (tuple(loaded[0].shape), loaded[2])]
        dist.broadcast_object_list(head, src=first, group=ranks.node)
        shape, classes = head[0]
        images, labels = loaded[:2] if loaded else (torch.empty(shape, dtype=torch.uint8), torch.empty(shape[0], dtype=torch.int64))
        dist.broadcast(images, src=first, group=ranks.node)
        dist.broadcast(labels, src=first, group=ranks.node)
    if script.conditional:
        s.n_classes = len(classes)
    return Data(images, labels, classes, s, device)


def check_split(script, s, group):
    """Refuse to spread a batch over ranks where a layer mixes samples in its own way, or a loss is no mean over the batch."""
    dev = next(group.ema.parameters()).device
    z = draw(0, 0, 0, "split", "normal", (4, s.z_dim)).to(dev)
    y = (torch.arange(4, device=dev) % s.n_classes,) if script.conditional else ()
    real = draw(0, 0, 0, "split real", "uniform", (4, 3, s.image_size, s.image_size)).to(dev) * 2 - 1
    eps = {"eps": draw(0, 0, 0, "split eps", "uniform", (4, 1, 1, 1)).to(dev)}
    nets = {"Generator": group.nets["G"].net.eval(), "Discriminator": group.nets["D"].net.eval()}
    part = lambda a, k: tuple(v[k] for v in a)
    D = nets["Discriminator"]
    close = lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    for name, args in (("Generator", (z, *y)), ("Discriminator", (real, *y) if takes(D.forward, "y") else (real,))):
        seen, hooks = {}, []
        for k, m in nets[name].named_modules():
            hooks.append(m.register_forward_hook(lambda m, i, o, k=k: seen.setdefault(k, []).append(o)))
        with torch.no_grad():
            for rows in (slice(0, 4), slice(0, 2), slice(2, 4)):
                nets[name](*part(args, rows))
        for h in hooks:
            h.remove()
        for k, outs in seen.items():                                # in the order in which modules finish: the first culprit is innermost
            outs = [o[0] if isinstance(o, tuple) else o for o in outs]
            sizes = [o.shape[0] if isinstance(o, torch.Tensor) and o.dim() else 0 for o in outs]
            if sizes == [4, 2, 2] and not close(outs[0], torch.cat(outs[1:])):
                raise UserError(f"{script.path}: layer {k or name} ({type(nets[name].get_submodule(k)).__name__}) of {name} mixes the samples of a batch, "
                                f"so the batch cannot be spread over processes; use at most one process per group (--nproc {s.groups})")
    with torch.no_grad():
        fake = nets["Generator"](z, *y)
    for name, args in (("discriminator_loss", (real, fake, *y, *y)), ("connector_loss", (real, fake, *y, *y)), ("generator_loss", (fake, *y))):
        f, values = getattr(script, name), []
        for rows in (slice(0, 4), slice(0, 2), slice(2, 4)):
            value = f(D, *part(args, rows), **bind(f, {**vars(s), "eps": eps["eps"][rows]}))
            values.append((value[0] if isinstance(value, tuple) else value).detach())
        if (takes(f, "eps") or name == "generator_loss") and not close(values[0], (values[1] + values[2]) / 2):        # a penalty that draws cannot be compared
            raise UserError(f"{script.path}: {name} is not a mean over the batch, so the batch cannot be spread over processes; "
                            f"use at most one process per group (--nproc {s.groups})")
    for net in nets.values():
        net.train()


def keep_freed_memory():
    """Let glibc keep what is freed: the attention matrices of G (105 MB each at batch 25) else fault in page by page at every use."""
    with contextlib.suppress(OSError, AttributeError):              # another C library: nothing to set
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                              # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, 2 ** 31 - 1)                                    # M_TRIM_THRESHOLD: do not shrink the heap


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def loop(trainer, s, out, scores):
    """Steps, with logs, pictures, checkpoints, and a way out that saves."""
    ranks, begin, first = trainer.ranks, time.monotonic(), trainer.step_count
    progress = Progress(s.steps, quiet=ranks.rank > 0)
    told, steady, signalled, timeout, note = False, None, 0, 0, trainer.graph_note
    with Stop() as stop:
        while trainer.step_count < s.steps and not signalled and not timeout:
            with calling(trainer.script, f"step {trainer.step_count + 1}"):
                losses = trainer.step()
            step, now = trainer.step_count, time.monotonic()
            if trainer.graph_note != note:
                note = trainer.graph_note
                progress.say(note)
            due = {k: step == s.steps or step % getattr(s, f"{k}_every") == 0 for k in ("log", "sample", "save")}
            due["fid"] = scores is not None and (step == s.steps or step % s.fid_every == 0)
            look = trainer.device.type == "cpu" or any(due.values()) or step % 50 == 0      # elsewhere a look costs a wait
            over = s.max_seconds is not None and now - begin >= s.max_seconds
            signalled, timeout, bad = ranks.agree(stop.signal, over, look and trainer.first_bad() > 0)
            if signalled or timeout:
                due.update(log=True, sample=True, save=True)
            if (signalled or timeout or bad) and (bad := min(filter(None, ranks.everyone(trainer.first_bad())), default=0)):
                raise lost(bad // 4096, f"the loss of the {name_bad(bad % 4096)} is", out)
            if steady is None or trainer.warm <= WARM_UP + 1 and trainer.device.type == "cuda":
                steady = (step, now)                                # the first step also warms up, and others come before a graph
            elif not told and (now - steady[1] > 5 or step - steady[0] >= 20 or step == s.steps):
                told = True
                per_step, left = (now - steady[1]) / (step - steady[0]), s.steps - step
                text = f"One step takes {per_step:.3g} s here"
                if left:
                    text += f", so the {left} steps to go take {span(per_step * left)}"
                    if s.max_seconds and per_step * left > s.max_seconds:
                        text += f", of which --max-seconds allows {span(s.max_seconds)}"
                    text += "; Ctrl-C saves and --resume goes on"
                text += "."
                if not s.quick and trainer.device.type == "cpu":
                    text += " For a first look within minutes add --quick."
                progress.say(text)
            if due["log"]:
                write_log(trainer, losses, out, now - begin, (step - first) * s.batch_size * s.groups / (now - begin))
            if due["sample"]:
                sample_grid(trainer, out / "samples" / f"step_{step:06d}.png")
            if due["fid"]:
                scored = scores(trainer, out, progress)
            if due["save"]:
                save_checkpoint(trainer, out)
            progress(step, s, losses)
    step = trainer.step_count
    if signalled:
        progress.say(f"Stopped by {signal.Signals(signalled).name} at step {step}; saved in {out}. --resume goes on.")
        ranks.close()
        raise SystemExit(128 + signalled)
    if step < s.steps:
        progress.say(f"--max-seconds reached at step {step} of {s.steps}; saved in {out}. --resume goes on.")
    else:
        if scores and scored:
            best = min((line[f"G{i}"], i, line["step"]) for line in score_lines(out, s.groups) for i in range(1, s.groups + 1))
            progress.say(f"Best: group {best[1]} at step {best[2]} with {scores.name} {best[0]:.2f} (floor {scored['floor']:.2f}), in {out / f'G{best[1]}.best.pt'}.")
        progress.say(f"Done: {step} steps, {span(time.monotonic() - begin)}. Look at {out / 'samples'}/; "
                     f"python okd_train.py --out {out} --sample 1000 writes images, --report a page.")


# ---------------------------------------------------------------------------------------------- export
def exports(s):
    """Whether these settings ask for images rather than for training."""
    return s.sample is not None or s.per_class is not None


def natural(text):
    """'12' -> 12; None for anything but a plain number above 0."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 and int(text) else None


def generator_files(s, out):
    """--group -> {group number: file of its generator}."""
    if s.group == "all":
        return {i: out / f"G{i}.pt" for i in range(1, s.groups + 1)}
    if s.group == "best":
        scores = [(line[f"G{i}"], i) for line in score_lines(out, s.groups) for i in range(1, s.groups + 1) if abs(line[f"G{i}"]) < math.inf]
        if not scores:
            raise UserError(f"--group best: {out} has no scores; they come from training with --fid-every K. Or name a group, such as --group 1")
        return {(best := min(scores)[1]): out / f"G{best}.best.pt"}
    numbers = [natural(part) for part in s.group.split(",")]
    if not all(n and n <= s.groups for n in numbers) or len(set(numbers)) < len(numbers):
        raise UserError(f"--group {s.group}: say all, best, or numbers from 1 to {s.groups} with commas between, each once")
    return {i: out / f"G{i}.pt" for i in sorted(numbers)}


def class_counts(s, classes):
    """--sample and --per-class -> [(class name, its label, images of it per group), ...]; ("", None, N) without classes."""
    if s.per_class is None:
        if not classes:
            return [("", None, s.sample)]
        return [(name, c, n) for c, name in enumerate(classes) if (n := s.sample // len(classes) + (c < s.sample % len(classes)))]
    if not classes:
        raise UserError(f"--per-class: the run in {s.out} is not class-conditional; give --sample N")
    counts = {}
    for part in s.per_class.split(","):
        name, _, n = part.rpartition("=")
        wrong = ("is not CLASS=N" if not name else "names no class of this run" if name not in classes else
                 "names a class twice" if name in counts else "needs a number above 0" if not natural(n) else "")
        if wrong:
            raise UserError(f"--per-class: {part!r} {wrong}; say CLASS=N with commas between, the classes are {', '.join(map(repr, classes))}")
        counts[name] = natural(n)
    if s.sample not in (None, total := sum(counts.values())):
        raise UserError(f"--sample {s.sample} and --per-class, {total} in all, disagree; give one of them")
    return [(name, c, counts[name]) for c, name in enumerate(classes) if name in counts]


def draw_chunk(G, seed, chunk, purpose, label, z_dim):
    """One forward of an export -> uint8 (CHUNK, H, W, 3). Always whole: on the CPU too a row's last bits depend on the rows beside it."""
    z = draw(seed, chunk, 0, purpose, "normal", (CHUNK, z_dim))
    return generate(G, z, None if label is None else torch.full((CHUNK,), label))


def redraw(run, row, model=None, device="cpu"):
    """The image of one row of an export's manifest, drawn anew: uint8 (H, W, 3), from an export on the CPU bit for bit.

    run: the run folder; row: a dict as csv.DictReader gives it; model names the script where it moved. Bits want the same version of torch
    and number of threads. UserError where the row is none of ours, or its generator is not in the run (training went on).
    """
    try:
        seed, chunk, zero, purpose, k = row["z"].split("/")
        seed, chunk, k, group, wanted = int(seed), int(chunk), int(k), int(row["group"].removeprefix("G")), row["checkpoint"]
        if zero != "0" or purpose != f"sample {row['class']}" or min(seed, chunk) < 0 or not 0 <= k < CHUNK:
            raise ValueError
    except (KeyError, ValueError, AttributeError, TypeError) as e:
        raise UserError(f"{row} is not a row of a manifest of okd_train.py") from e
    paths = [Path(run) / f"G{group}.pt", Path(run) / f"G{group}.best.pt"]
    path = next((p for p in paths if p.is_file() and digest(p) == wanted), None)
    if path is None:
        raise UserError(f"{row.get('file')}: neither {paths[0]} nor {paths[1].name} is its generator, checkpoint {wanted}; training went on, or it is another run")
    return _redrawn(path, wanted, seed, chunk, row["class"], model, device)[k].copy()


@functools.lru_cache(maxsize=2)
def _redrawn(path, wanted, seed, chunk, name, model, device):
    """A whole chunk, kept because the next row of a manifest mostly lies in it."""
    G, d = load_generator(path, device, model), load_file(path)
    if (name not in d["classes"]) if d["classes"] else name:
        raise UserError(f"{path} knows no class {name!r}")
    return draw_chunk(G, seed, chunk, f"sample {name}", d["classes"].index(name) if name else None, d["z_dim"])


def save_whole(a, path):
    """uint8 (H, W, 3) -> .png, or (n, H, W, 3) -> .npy."""
    with replacing(path, sync=False) as f:
        Image.fromarray(a).save(f, "PNG", compress_level=1) if path.suffix == ".png" else np.save(f, a)


def pack(paths, counts, group, classes, target):
    """Chunks (.npy) -> one .npz of plain arrays, with one chunk in memory: arr_0 uint8 (n, H, W, 3), labels int64 (n,), classes, group."""
    shape = (sum(n for _, _, n in counts), *np.load(paths[0]).shape[1:])
    labels = np.repeat([c for _, c, _ in counts], [n for _, _, n in counts]) if classes else []
    with replacing(target) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as a:
            np.lib.format.write_array_header_1_0(a, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for path in paths:
                a.write(np.load(path).tobytes())
        for name, value in (("labels", np.array(labels, np.int64)), ("classes", np.array(classes, str)), ("group", np.array(group))):
            with archive.open(f"{name}.npy", "w") as a:
                np.lib.format.write_array(a, value, allow_pickle=False)


def open_export(target, partial, plan):
    """Make the hidden folder in which an export grows, or go on with the one that is there. Rank 0 only."""
    with writing(target):
        if os.path.lexists(target):
            if not target.is_dir() or any(target.iterdir()):
                raise UserError(f"{target} is not empty; move it away, or name another folder with --to")
            target.rmdir()                                          # now rather than at the end: it shows that it can be replaced
        if partial.exists() and all(p.name.startswith(".") for p in partial.iterdir()):
            shutil.rmtree(partial)                                  # killed before export.json stood
        if not partial.exists():
            partial.mkdir(parents=True)
            save_json(plan, partial / "export.json")
            return
    try:
        old = json.loads((partial / "export.json").read_text())
        other = ", ".join(k for k in plan if old[k] != plan[k])
    except (OSError, ValueError, KeyError, TypeError):
        other = "unreadable"
    if other:
        raise UserError(f"{partial} holds an unfinished export with other settings ({other}): give its own command to finish it, or delete that folder")


def sample(s, script):
    """N images per group from the averaged generators: OUT/fakes/G1/000000.png, in class folders if conditional, with manifest.csv.

    z of an image depends on the run's seed, its class and its number alone, so the first images of --sample 100 are those of --sample 1000.
    Everything is written to a hidden folder beside the target, which takes the target's name at the end; what it holds is not drawn again.
    """
    device = pick_device(s.device)
    ranks = Ranks(s.groups, CHUNK, device)
    out = Path(s.out)
    target = out / "fakes" if s.to is None else Path(s.to).resolve()
    partial = target.parent / f".{target.name}.partial"
    with ranks.together():
        classes = read_args(out)["classes"]
        counts, files = class_counts(s, classes), generator_files(s, out)
        before = {p.name: digest(p) for p in files.values() if p.is_file()}
        generators = {i: load_generator(path, device, str(script.path)) for i, path in files.items()}
        plan = {"seed": s.seed, "images": {name: n for name, _, n in counts}, "npz": s.npz, "device": device.type, "torch": torch.__version__,
                "script": digest(script.path),
                "groups": {f"G{i}": {"file": p.name, "step": load_file(p)["step"], "checkpoint": digest(p)} for i, p in files.items()}}
        if before != {g["file"]: g["checkpoint"] for g in plan["groups"].values()}:
            raise UserError(f"{', '.join(before)} in {out} changed while being read: a training is at work there; give the command again")
    ranks.compare(settings=json.dumps(plan))
    # A job is what one forward draws: group, class name, label, number of the first image, how many.
    jobs = [(i, name, c, k, min(CHUNK, n - k)) for i in files for name, c, n in counts for k in range(0, n, CHUNK)]
    whole = lambda path: path.is_file() and path.stat().st_size > 0
    todo, total, signalled, saves = None, sum(job[4] for job in jobs), 0, []

    def filled(job):
        """The files that a job fills."""
        i, name, _, k, n = job
        return [partial / f".G{i}" / name / f"{k:06d}.npy"] if s.npz else [partial / f"G{i}" / name / f"{j:06d}.png" for j in range(k, k + n)]

    with Stop() as stop, ThreadPoolExecutor(min(8, cores() + 1)) as pool:
        with ranks.together():
            if ranks.rank == 0:
                open_export(target, partial, plan)
                todo = [job for job in jobs if not (s.npz and whole(partial / f"G{job[0]}.npz") or all(map(whole, filled(job))))]
                with writing(partial):
                    for folder in {filled(job)[0].parent for job in todo}:
                        folder.mkdir(parents=True, exist_ok=True)
        todo = ranks.everyone(todo)[0]
        begin, progress, to_draw = time.monotonic(), Progress(total, quiet=ranks.rank > 0), sum(job[4] for job in todo)
        done = total - to_draw
        progress.last, progress.marks = begin, [(begin, done)]
        if done:
            progress.say(f"Going on: {done} of {total} images are in {partial} already.")
        for at in range(0, len(todo), ranks.world):                 # each rank draws a chunk, rank 0 writes them
            signalled, = ranks.agree(stop.signal)
            if signalled:
                break
            mine = {}
            with ranks.together():
                if at + ranks.rank < len(todo):
                    i, name, c, k, n = todo[at + ranks.rank]
                    with calling(script, f"the generator of group {i}"):
                        mine[at + ranks.rank] = draw_chunk(generators[i], s.seed, k // CHUNK, f"sample {name}", c, s.z_dim)[:n]
                with writing(partial):
                    for save in saves:                              # of the round before: no more than two rounds are in memory
                        save.result()
            saves = []
            for number, images in sorted((ranks.collect(mine) or {}).items()):
                saves += [pool.submit(save_whole, a, path) for a, path in zip([images] if s.npz else images, filled(todo[number])) if not whole(path)]
            done += sum(job[4] for job in todo[at:at + ranks.world])
            progress(done)
        with ranks.together(), writing(partial):
            for save in saves:
                save.result()
        if signalled:
            progress.say(f"Stopped by {signal.Signals(signalled).name}: {done} of {total} images are in {partial}; the same command goes on.")
            ranks.close()
            raise SystemExit(128 + signalled)
        with ranks.together(), writing(target):
            if ranks.rank == 0:
                for i in files if s.npz else ():
                    if not whole(partial / f"G{i}.npz"):
                        pack([path for job in jobs if job[0] == i for path in filled(job)], counts, f"G{i}", classes, partial / f"G{i}.npz")
                    shutil.rmtree(partial / f".G{i}", ignore_errors=True)
                write_manifest(s, plan, counts, partial / "manifest.csv")
                for left in partial.rglob(".*.tmp*"):               # of a killed attempt
                    left.unlink()
                os.replace(partial, target)
    seconds = time.monotonic() - begin
    best = "".join(f" of {g}, step {of['step']}," for g, of in plan["groups"].items() if s.group == "best")
    progress.say(f"{total} images{best} in {target}/ ({span(seconds)}{f', {to_draw / seconds:.0f} images/s' if to_draw else ''}).")
    ranks.close()


def write_manifest(s, plan, counts, path):
    """A row per image: file (PNG, or G1.npz#row of arr_0), group, class, z (the arguments of draw, then the row of what it returns), checkpoint."""
    with replacing(path) as f:
        text = io.TextIOWrapper(f, "utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("file", "group", "class", "z", "checkpoint"))
        for group, of in plan["groups"].items():
            for at, (name, j) in enumerate((name, j) for name, _, n in counts for j in range(n)):
                file = f"{group}.npz#{at}" if s.npz else f"{group}/{name}/{j:06d}.png".replace("//", "/")
                table.writerow((file, group, name, f"{s.seed}/{j // CHUNK}/0/sample {name}/{j % CHUNK}", of["checkpoint"]))
        text.flush()
        text.detach()


# ---------------------------------------------------------------------------------------------- pictures of a run
POINTS = ((0.3, 0.3), (0.45, 0.8), (0.8, 0.45))     # (down, right) as shares of the picture: the positions whose attention is shown
ABOUT = {"loss": "loss of the {}", "d_w": "mean D(real) - mean D(fake)", "c_w": "mean C(neighbour) - mean C(own)", "grad_norm": "mean gradient norm, aim 1",
         "accuracy": "share of images whose class is named right", "class_loss": "cross-entropy of classes", "gamma": "weight of attention, {}"}
ROLES = {"d": "discriminator", "c": "connector", "g": "generator"}


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


def curves(out, name):
    """Everything in log.jsonl and fid.jsonl over steps -> picture: a panel per quantity, networks side by side, one colour per group."""
    lines, scores, known, n_groups = read_lines(out / "log.jsonl", most=4000), score_lines(out), {}, 0      # known: {(quantity, role): lines of a group}
    for line in lines:                                              # whatever any line has
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            for n_here, group in enumerate(line["groups"], 1):
                n_groups = max(n_groups, n_here)
                known.update({(k[2:], k[0]): 1 for k in group if k[:1] in ROLES and k[1:2] == "_"})
                known.update({("gamma", role.lower()): len(layers) for role, layers in group.get("gamma", {}).items() if layers and role in "DCG"})
    if not known:
        raise UserError(f"{out / 'log.jsonl'} has no line yet: nothing to draw")
    quantities = sorted({q: None for q, _ in known}, key=lambda q: q == "gamma")    # in the log's order, gamma last
    roles = [r for r in ROLES if any(r == role for _, role in known)]
    groups, w, h, top = range(1, n_groups + 1), 430, 220, 54
    at = [column(x, lambda line: line["step"]) for x in (lines, scores)]
    mean_of = int(len(lines) ** 0.5) | 1 if len(lines) >= 16 else 1
    end = 1.02 * max(1, *at[0], *at[1])
    hue = lambda i: COLOURS[(i - 1) % len(COLOURS)]
    dash = lambda i, layer=0: DASHES[((i - 1) // len(COLOURS) + layer) % len(DASHES)]

    def panel(title, about, x, rows, width, limits=None):
        """rows: [(y, colour, dash)]; faint as they are and bold as means over `width` of them."""
        means = [smooth(y, width) for y, _, _ in rows]
        low, high = limits or y_limits([(y, mean) for (y, _, _), mean in zip(rows, means)])
        plot = Plot(w, h, title, about, (0, end), (low, high))
        if title.endswith("grad_norm"):
            plot.line(np.array([0, end]), np.array([1.0, 1.0]), "#888888", 1, 3)
        for y, colour, _ in rows if width > 1 else ():
            plot.faint(x, y, colour, 1 - 0.6 / max(n_groups, 2.4))
        for (_, colour, style), mean in zip(rows, means):
            plot.line(x, mean, colour, 2, style, dots=len(x) <= 20 and not style)
        values = np.concatenate([y[np.isfinite(y)] for y, _, _ in rows])
        if (values > high).any():
            plot.pen.text((2 * plot.w - 8, 4), f"max {values.max():.3g}", "#555555", font(20), anchor="rt")
        if (values < low).any():
            plot.pen.text((2 * plot.w - 8, 2 * plot.h - 4), f"min {values.min():.3g}", "#555555", font(20), anchor="rb")
        return plot.image()

    cells = {}                                                      # {(row, column): picture}
    for q, r in known:
        key, n = f"{r}_{q}", known[q, r]
        get = lambda group, layer: group["gamma"][r.upper()][layer] if q == "gamma" else group[key]
        rows = [(column(lines, lambda line: get(line["groups"][i - 1], layer)), hue(i), dash(i, layer)) for i in groups for layer in range(n)]
        about = ABOUT.get(key, ABOUT.get(q, "")).format(ROLES[r]) + (", dashes: layers 2 on" if n > 1 else "")
        title, limits = f"gamma {r.upper()}" if q == "gamma" else key, (-0.02, 1.02) if q == "accuracy" else None
        cells[quantities.index(q), roles.index(r)] = panel(title, about, at[0], rows, mean_of, limits)
    if scores:
        rows = [(column(scores, lambda line: line[k]), *style) for k, *style in
                (("floor", "#888888", 7), ("union", "#000000", 3), *((f"G{i}", hue(i), dash(i)) for i in groups))]
        free = next((row, k) for row in range(len(quantities) + 1) for k in range(len(roles)) if (row, k) not in cells)
        cells[free] = panel(str(scores[-1].get("score", "score")), "lower is better; dotted: union, dashed: floor", at[1], rows, 1)
    sheet = Image.new("RGB", (max(640, 12 + 52 * n_groups, (1 + max(k for _, k in cells)) * w + 8), top + (1 + max(row for row, _ in cells)) * h), "white")
    pen = ImageDraw.Draw(sheet)
    bold = f" Bold: mean over {mean_of} of the {len(lines)} points that are faint." if mean_of > 1 else ""
    pen.text((12, 8), legible(f"{name}, step {at[0][-1]:.0f}. Horizontal: steps.{bold}"), "black", font(14))
    for i in groups:
        left, d = 12 + 52 * (i - 1), dash(i) or 20
        for k in range(0, 20, 2 * d):
            pen.line([(left + k, 40), (left + min(k + d, 20), 40)], hue(i), 4)
        pen.text((left + 24, 40), f"G{i}", "black", font(13), anchor="lm")
    for (row, k), image in cells.items():
        sheet.paste(image, (k * w, top + row * h))
    return sheet


def between(a, b, k):
    """a, b (z_dim,) -> (k, z_dim) along the great circle from a to b, both ends exact.

    Not along the line: all z of the training have a length near sqrt(z_dim), and the middle of a line is shorter by a
    factor 0.7, where no generator was trained.
    """
    t = torch.linspace(0, 1, k, dtype=torch.float64)[:, None]
    p, q = a.double(), b.double()
    angle = torch.arccos((p @ q / (p.norm() * q.norm())).clamp(-1, 1))
    weights = ((1 - t) * angle, t * angle)
    low, high = (w.sin() / angle.sin() for w in weights) if angle.sin() > 1e-6 else (1 - t, t)      # parallel: no circle
    return (low * p + high * q).float()


def interpolation(s, script, generators, classes):
    """Rows of images from one z to the next, every generator on the same z: three paths, or one in every class -> picture.

    The classes of one path stand below one another, so that a column shows what the class alone changes.
    """
    k = s.interpolate or 10
    z = draw(s.seed, 0, 0, "grid", "normal", (6, s.z_dim))         # the first columns of the sample grids
    rows = [(f"z1 to z2, {name}", 0, c) for c, name in enumerate(classes[:10])] or [(f"z{j + 1} to z{j + 2}", j, None) for j in (0, 2, 4)]
    with calling(script, "Generator"):
        return grid([(f"{name}, G{i}", generate(G, between(z[j], z[j + 1], k), None if c is None else torch.full((k,), c)))
                     for name, j, c in rows for i, G in generators.items()], k)


@torch.inference_mode()
def look(net, *args):
    """Where POINTS look in every layer of `net` that offers attention_map(x), when it is called with args.

    -> [(name, gamma or None, maps (B, len(POINTS), H, W), each of which sums to 1)] in the order of the calls. UserError where a layer's
    map is not (B, H*W, H*W) for its input x (B, C, H, W).
    """
    seen, hooks = {}, []
    for name, m in net.named_modules():
        if callable(getattr(m, "attention_map", None)):
            hooks.append(m.register_forward_hook(lambda m, a, kw, o, name=name: seen.update({name: (m, [*a, *kw.values()][0].clone())}), with_kwargs=True))
    try:
        net(*args)
    finally:
        for h in hooks:
            h.remove()
    found = []
    for name, (m, x) in seen.items():
        p, (h, w) = m.attention_map(x), x.shape[2:] if x.dim() == 4 else (0, 0)
        if not h or p.shape != (len(x), h * w, h * w):
            raise UserError(f"attention_map of layer {name} returned {tuple(p.shape)} for x {tuple(x.shape)}; expected (B, H*W, H*W) for x (B, C, H, W)")
        gamma = getattr(m, "gamma", None)
        gamma = gamma.item() if isinstance(gamma, torch.Tensor) and gamma.numel() == 1 else None
        found.append((name, gamma, p[:, [int(a * h) * w + int(b * w) for a, b in POINTS]].reshape(len(x), -1, h, w).float().cpu()))
    return found


def tile(image, weights=None, size=96):
    """An image (H, W, 3) with POINTS numbered in it; weights (h, w): in grey, and over it where one of them looks."""
    picture = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    if weights is not None:
        grey = np.asarray(picture.convert("L"), np.float32)[..., None] * 0.6
        share = np.asarray(Image.fromarray(weights / max(weights.max(), 1e-30)).resize((size, size), Image.Resampling.NEAREST))
        colour = np.stack([np.interp(share, (0, 0.5, 1), c) for c in ((190, 250, 255), (0, 110, 240), (70, 20, 90))], 2)       # red, orange, yellow
        picture = Image.fromarray((grey + share[..., None] ** 0.7 * 0.85 * (colour - grey)).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for j, (down, right) in enumerate(POINTS):
        x, y = right * size, down * size
        pen.ellipse([x - 7, y - 7, x + 7, y + 7], "white", "black")
        pen.text((x, y), str(j + 1), "black", font(11), anchor="mm")
    if weights is not None:
        pen.text((size // 2, 3), f"peak  {weights.max() * weights.size:.3g}", "white", font(10), "mt", stroke_width=1, stroke_fill="black")
    return np.asarray(picture)


def attention_maps(s, script, out, generators):
    """Three images of every generator and where POINTS look in each, a row per attention layer of the generator and of its discriminator -> picture."""
    device, n, blocks = next(next(iter(generators.values())).parameters()).device, 3, []
    y = (torch.arange(n, device=device) % s.n_classes,) if script.conditional else ()
    z = draw(s.seed, 0, 0, "grid", "normal", (n, s.z_dim)).to(device)
    states = read_checkpoint(out / "checkpoint.pt", s.groups)["groups"] if (out / "checkpoint.pt").exists() else None
    for i, G in generators.items():
        with calling(script, "attention_map"), parametrize.cached():
            found = [("generator", *layer) for layer in look(G, z, *y)]
            with torch.inference_mode():
                x = G(z, *y)
            if states:
                D = script.Discriminator(**bind(script.Discriminator, vars(s)))
                D.load_state_dict(states[i - 1]["D"]["net"])
                found += [("discriminator", *layer) for layer in look(D.to(device).eval(), x, *y if "y" in inspect.signature(D.forward).parameters else ())]
        for net, name, gamma, maps in found:
            label = f"G{i}  {net}  {name if len(name) <= 20 else f'...{name[-17:]}'}  {maps.shape[2]}x{maps.shape[3]}" + ("" if gamma is None else f"  gamma {gamma:+.3f}")
            blocks.append((label, np.stack([tile(image, p) for image, looks in zip(to_uint8(x), maps.numpy()) for p in (None, *looks)])))
    if not blocks:
        raise UserError(f"no layer of {script.path.name} offers attention_map(x) (B, C, H, W) -> (B, H*W, H*W): no attention to draw")
    return grid(blocks, n * (1 + len(POINTS)), "Three images, and where the positions 1, 2, 3 look in each: from grey (nowhere) over red to yellow (most). peak: the most that one place gets,\n"
                "in units of an equal share for all. A layer returns gamma x attention + input: near gamma 0 its attention hardly matters yet.")


def closest(s, script, saved, out, generators, device):
    """-> (picture: the 10 fakes of every group that are closest to a training image, each above that image; table rows: per group the share of
    200 fakes that look copied and the smallest distance, and the same between two halves of the real images; kind of features)."""
    import fid
    images, labels, classes = (load_images(s.data, s.image_size, script.conditional, s.skip_bad, lambda text: None) if s.data
                               else synthetic_images(s.image_size, script.conditional))
    data = Data(images, labels, classes, s, device)
    if data.digest != saved["data_digest"]:
        raise UserError(f"the {len(images)} images of {s.data or 'the synthetic set'} are not those that the run was trained on")
    kind = s.fid_features if s.fid_every else "inception"
    if kind == "inception":
        try:
            fid.find_weights(download=False)
        except fid.FidError:
            kind = "random"
    scores = Scores(argparse.Namespace(**{**vars(s), "fid_data": None, "fid_features": kind, "fid_samples": None}), script, data, None, device)
    print(f"Comparing {len(generators)} x 200 fakes with the {len(images)} training images, {kind} features.", flush=True)
    rows, blocks = [], []
    try:
        real, _ = scores.real(out)
        for i, G in generators.items():
            z = draw(s.seed, 0, 0, "copies", "normal", (200, s.z_dim))
            fakes = generate(G, z, torch.arange(200) % len(classes) if classes else None)
            index, distance, share = fid.copies(real, scores.features(fakes))
            order = np.argsort(distance)[:10]
            blocks.append((f"G{i}, real", np.concatenate([fakes[order], to_hwc(data.images[torch.from_numpy(index[order])])])))
            rows.append((f"G{i}", share, float(distance.min())))
        _, distance, share = fid.copies(*fid.halves(real))
    except fid.FidError as e:
        raise UserError(str(e)) from e
    return grid(blocks, len(order)), [*rows, ("floor: one half of the real images against the other", share, float(distance.min()))], kind


def pictures(s, script):
    """Read the run in --out and draw what the flags ask for; nothing is trained."""
    out, device = Path(s.out), pick_device(s.device)
    saved = read_args(out)
    generators = functools.cache(lambda: {i: load_generator(out / f"G{i}.pt", device, str(script.path)) for i in range(1, s.groups + 1)})
    makers = {"curves": lambda: curves(out, f"{out.resolve().name}: {s.groups} x {script.name}"),
              "interpolate": lambda: interpolation(s, script, generators(), saved["classes"]),
              "attention_maps": lambda: attention_maps(s, script, out, generators()),
              "closest": lambda: closest(s, script, saved, out, generators(), device)}
    makers = {name: functools.cache(make) for name, make in makers.items()}         # the page shows what was drawn before it
    for flag in asked(s):
        path = out / PICTURES[flag]
        if flag == "report":
            page = report(s, script, saved, out, makers)
            with replacing(path) as f:
                f.write(page.encode("utf-8", "replace"))
        else:
            save_image(makers[flag](), path)
        print(f"Wrote {path}.", flush=True)


# ---------------------------------------------------------------------------------------------- report.html
STYLE = """:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #595959; --line: #ccc; --mark: #fff3cd }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; --faint: #a8a8a8; --line: #444; --mark: #4a3f14 } }
body { margin: 2rem auto; max-width: 84rem; padding: 0 1rem; color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; overflow-wrap: anywhere } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
p, figcaption, td { overflow-wrap: anywhere } figcaption, .faint { color: var(--faint); font-size: .9rem } figure { margin: 0 0 1rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px } table { border-collapse: collapse; margin: .8rem 0 } caption { text-align: left; color: var(--faint); font-size: .9rem }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
mark { background: var(--mark); color: inherit; padding: 0 .2rem } .beside, .many { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)) } .many { grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)) }"""


def picture(image, alt, kind="JPEG", width=4000):
    """An image, or the text that says why there is none, as HTML; the image travels inside the page, at most `width` pixels wide."""
    if not isinstance(image, Image.Image):
        return paragraph(f"{image}.")
    f, image = io.BytesIO(), image.convert("RGB")
    image.thumbnail((width, 20000))
    image.save(f, kind, **dict(quality=88, subsampling=0) if kind == "JPEG" else dict(optimize=True))
    return (f'<figure><img src="data:image/{kind.lower()};base64,{base64.b64encode(f.getvalue()).decode()}" width="{image.width}" height="{image.height}" '
            f'alt="{html.escape(alt)}"><figcaption>{html.escape(alt)}</figcaption></figure>')


def paragraph(text):
    return f'<p class="faint">{html.escape(text)}</p>'


def table(caption, head, rows, marked=()):
    """Rows of values as an HTML table: the first cell of a row is its header, rows that begin with one of `marked` are highlighted."""
    words = {True: "yes", False: "no", None: "none"}
    say = lambda v: html.escape(words[v] if v is None or isinstance(v, bool) else f"{v:.4g}" if isinstance(v, float) else str(v))
    aligned = [' class="n"' if all(type(row[k]) in (int, float) or row[k] == "" for row in rows) else "" for k in range(len(head))]
    lines = ["<thead><tr>" + "".join(f'<th scope="col"{c}>{say(h)}</th>' for c, h in zip(aligned, head)) + "</tr></thead><tbody>"]
    for row in rows:
        first = f"<mark>{say(row[0])}</mark>" if row[0] in marked else say(row[0])
        lines.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td{c}>{say(v)}</td>" for c, v in zip(aligned[1:], row[1:])) + "</tr>")
    return "\n".join([f"<table><caption>{say(caption)}</caption>", *lines, "</tbody></table>"])


def report(s, script, saved, out, makers):
    """One page (HTML text) about a run, complete in itself. makers {name: function -> image}; where one raises UserError, the page says its line."""
    def made(name):
        try:
            return makers[name]()
        except UserError as e:
            return str(e)

    def opened(path):
        try:
            with Image.open(path) as im:
                return im.convert("RGB")
        except Exception as e:                                      # Pillow raises a dozen types for a file that is no picture
            return f"{path} cannot be shown: {' '.join(str(e).split())}"

    classes, log, name = saved["classes"], read_lines(out / "log.jsonl", most=4000), out.resolve().name
    ring = f"One {script.name} generator" if s.groups == 1 else f"{s.groups} {script.name} generators in a ring (rho {s.rho:g})"
    source = (f"images of {s.data}" if s.data else "synthetic images of concrete defects") + (f" in {len(classes)} classes ({', '.join(classes)})" if classes else "")
    sentence = (f"{ring} learnt {s.image_size}x{s.image_size} images from {saved['images']} {source}, {s.batch_size} a step"
                f"{' and group' if s.groups > 1 else ''}: step {log[-1]['step'] if log else 0} of {s.steps}.")
    terms = ("A generator (G) turns a row of random numbers, z, into an image. A discriminator (D) learns to tell its images from real ones, and the generator "
             "learns to make images that D takes for real." + (" A connector (C) does for the images of the next group in the ring what D does for real ones: "
                                              "the groups learn from one another." if s.groups > 1 else ""))
    steps = sorted((out / "samples").glob("step_*.png"), key=lambda path: (len(path.name), path.name))        # step_1000000 comes after step_999500
    shown = [steps[k] for k in sorted(set(np.linspace(0, len(steps) - 1, min(6, len(steps))).round().astype(int)))]
    at = lambda path: f"step {path.stem[5:].lstrip('0') or '0'}"
    rows_are = "a row per group and class" if classes else "a block of rows per group"
    parts = [f"<h1>{html.escape(name)}</h1>", f"<p>{html.escape(sentence)}</p>", paragraph(terms), "<h2>Samples</h2><div class=beside>",
             picture(opened(shown[-1]), f"Generated images at {at(shown[-1])}: {rows_are}, the same z in each column (weights averaged over the steps).") if shown else
             paragraph("No sample grid yet."),
             picture(opened(out / "samples" / "real.png"), "Real images that were trained on."), "</div>"]
    if shown[:-1]:
        parts += ["<h3>On the way</h3><div class=many>", *(picture(opened(p), f"Generated images at {at(p)}.", width=800) for p in shown[:-1]), "</div>"]

    scores = score_lines(out)
    if scores:
        rows, last = [], scores[-1]
        for k in (*(f"G{i}" for i in range(1, s.groups + 1)), "mean", "union", "floor"):
            values = column(scores, lambda line: line[k])
            if np.isfinite(values).any():
                n = np.nanargmin(values)
                rows.append((k, float(values[-1]), *(("", "") if k == "floor" else (float(values[n]), scores[n]["step"]))))
        parts += ["<h2>Scores</h2>", paragraph(
            f"The distance between {last.get('samples', '?')} generated images per group and {last.get('reals', '?')} real ones, in the features of "
            f"{'networks with random weights (rFD: compare it with rFD alone)' if last.get('score') == 'rFD' else 'the Inception network'}; lower is better. "
            "union: all groups together. floor: one half of the real images against the other, about the best that can be expected."),
            table(f"{last.get('score', 'score')} at {len(scores)} steps", ("", f"last (step {last['step']})", "best", "at step"), rows)]
    parts += ["<h2>Curves</h2>", picture(made("curves"), "Losses, attention weights and scores over the steps, a panel per quantity, a colour per group.", kind="PNG"),
              "<h2>Between two z</h2>", picture(made("interpolate"), "Images on the way from one z to another (along the sphere), the same z for every group in a column."),
              "<h2>Attention</h2>", picture(made("attention_maps"), "Where three marked positions look in every attention layer of the generators and discriminators."),
              "<h2>Closest copies</h2>"]
    found = made("closest")
    if isinstance(found, str):
        parts += [paragraph(f"Not compared with the training images: {found}.")]
    else:
        sheet, rows, kind = found
        parts += [picture(sheet, "Of 200 generated images per group the ten that are closest to a training image, and below each that image."),
                  paragraph(f"Copied: nearer to its nearest real image than that one is to any other real image, in {kind} features. "
                            "Fresh images of the same kind count too: compare with the floor, not with 0."),
                  table("Copies", ("", "share copied", "smallest distance"), rows)]

    default, settings = vars(parse(["--model", str(script.path)])[0]), saved["settings"]
    changed = [k for k in settings if settings[k] != default.get(k)]
    parts += ["<h2>Settings</h2>", table("Other than the default", ("setting", "here", "default"), [(k, settings[k], default.get(k)) for k in changed], changed),
              "<details><summary>All other settings, at their defaults, and versions</summary>",
              table("At their defaults", ("setting", "value"), [(k, v) for k, v in settings.items() if k not in changed]),
              table("Made with", ("", ""), [("model script", saved["script"]), *saved.get("versions", {}).items(), ("git revision", saved.get("git"))]), "</details>"]
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">\n'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
            f"<title>{html.escape(name)}</title>\n<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n")


# ---------------------------------------------------------------------------------------------- benchmark
class Clock:
    """Times steps, and named phases of a step; one inside another counts for itself alone."""

    def __init__(self, device):
        self.device = device
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.rows, self.inner = [], []

    def watch(self, owner, method, phase):
        """Replace owner.method by one that is timed as `phase` (a name, or a function of the arguments)."""
        f = getattr(owner, method)

        def timed(*a, **k):
            self.wait()
            begin = time.perf_counter()
            self.inner.append(0.0)
            out = f(*a, **k)
            self.wait()
            took = time.perf_counter() - begin
            name = phase(*a) if callable(phase) else phase
            self.rows[-1][name] = self.rows[-1].get(name, 0.0) + took - self.inner.pop()
            if self.inner:
                self.inner[-1] += took
            return out
        setattr(owner, method, timed)

    def times(self, step, n):
        """Seconds of n steps, one by one; what no phase took is `rest`."""
        seconds = []
        for _ in range(n):
            self.rows.append({})
            self.wait()
            begin = time.perf_counter()
            step()
            self.wait()
            seconds.append(time.perf_counter() - begin)
            self.rows[-1]["rest"] = seconds[-1] - sum(self.rows[-1].values())
        return seconds

    def pace(self, step, n):
        """Seconds of n steps, one by one, as training makes them: the host goes ahead of a GPU and does not wait for it."""
        if self.device.type != "cuda":
            return self.times(step, n)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        self.wait()
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        self.wait()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])]


class Operations(TorchDispatchMode):
    """Counts what is asked of a GPU: operations that are no views, a convolution's bias and each of its gradients apart, and their
    arithmetic by torch's formulas. (torch's own FlopCounterMode fails on the derivative of a leaf, which a penalty takes.)"""

    IDLE = "empty", "_unsafe_view", "_record_function"              # beginnings of names

    def __init__(self):
        super().__init__()
        self.n = self.flops = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, packet = f(*args, **(kwargs or {})), f.overloadpacket
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in f._schema.returns)
        if not view and not packet.__name__.startswith(self.IDLE):
            name = packet.__name__
            self.n += sum(args[10]) if name == "convolution_backward" else 1 + (name == "convolution" and args[2] is not None)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def count_work(script, s):
    """(floating-point operations, operations launched) of one step, counted in a step at batch 2 on the CPU with eager attention and
    torch's default layout, as on a GPU.

    Arithmetic is proportional to the batch and to the groups.
    """
    few = argparse.Namespace(**{**vars(s), "batch_size": 2, "groups": min(s.groups, 2), "precision": "fp32", "cuda_graph": "off"})
    cpu, script = torch.device("cpu"), copy.copy(script)
    script.channels_last = False
    data = Data(torch.zeros(4, 3, s.image_size, s.image_size, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), [], few, cpu)
    trainer = Trainer(script, few, data, cpu)
    for g in trainer.groups if SpectralNorms else ():
        for n in g.nets.values():
            n.normed = SpectralNorms(n.net)
    trainer.step()
    fused = getattr(attention, "FUSED_FROM_N", None)
    try:
        if attention:
            attention.FUSED_FROM_N = math.inf
        with Operations() as count:
            trainer.step()
    finally:
        if attention:
            attention.FUSED_FROM_N = fused
    return count.flops * s.batch_size / 2 * s.groups / few.groups, count.n * s.groups // few.groups


def machine_rates(trainer, n):
    """Operations per second of this machine in this precision: (a square matrix product, the convolutions of G and D forward and backward)."""
    device = trainer.device
    clock, kind = Clock(device), torch.bfloat16 if trainer.bf16 else torch.float32
    make = lambda *shape: torch.randn(*shape, device=device, dtype=kind)
    size = 4096 if device.type == "cuda" else 1024
    a, b = make(size, size), make(size, size)
    clock.times(lambda: a @ b, 2)
    matmul = 2 * size ** 3 / min(clock.times(lambda: a @ b, n))
    layers, hooks = [], []
    for role in "GD":
        for m in trainer.groups[0].nets[role].net.modules():
            if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                hooks.append(m.register_forward_hook(lambda m, i, o: layers.append((m, i[0].shape, o.shape))))
    trainer.eager(OneLane())
    for h in hooks:
        h.remove()
    flops = seconds = 0
    for m, inp, out in layers:
        x, g, w = make(*inp), make(*out), m.weight.detach().to(kind)
        args = (m.stride, m.padding, m.dilation, isinstance(m, torch.nn.ConvTranspose2d), m.output_padding, m.groups)

        def both():
            torch.convolution(x, w, None, *args)
            torch.ops.aten.convolution_backward(g, x, w, None, *args, [True, True, False])
        with Operations() as count:
            both()
        flops, seconds = flops + count.flops, seconds + min(clock.times(both, 3))
    return matmul, flops / seconds if seconds else 0.0


def gpu_trace(step, n):
    """(GPU operations per step, share of the time in which the GPU did something) over n steps, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as p:
        begin = time.perf_counter()
        for _ in range(n):
            step()
        torch.cuda.synchronize()
        took = time.perf_counter() - begin
    spans = sorted((e.time_range.start, e.time_range.end) for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    busy, end = 0.0, 0.0
    for a, b in spans:                                              # microseconds; kernels of parallel streams overlap
        busy, end = busy + max(0.0, b - max(a, end)), max(end, b)
    return len(spans) / n, busy / 1e6 / took


def peak_memory(device):
    """Most bytes that were held so far, on the GPU or else by this process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_name():
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return "unknown CPU"


def benchmark(s, script):
    """Print how fast a step is on this machine with these settings, and against what: a table, or one JSON object."""
    keep_freed_memory()
    device = pick_device(s.device)
    precision = set_precision(s, device)
    ranks = Ranks(s.groups, s.batch_size, device)
    data = shared_data(s, script, set(), device, ranks, lambda text: None)
    trainer = Trainer(script, s, data, device, ranks)
    probe(script, s, trainer.groups[0])
    cuda, n, clock = device.type == "cuda", s.benchmark, Clock(device)
    percent = lambda values: [float(v) for v in np.percentile(values, (20, 50, 80))]
    for _ in range(WARM_UP):
        trainer.step()
    graph = busy = None
    if s.cuda_graph != "off" and trainer.graph_note is None:
        trainer.capture()
    if trainer.graphs:
        clock.pace(trainer.step, 2)
        graph = percent(clock.pace(trainer.step, n))
    peak = peak_memory(device)                                      # of the graph alone, where there is one
    graphs, trainer.graphs = trainer.graphs, None
    eager = percent(clock.pace(trainer.step, n))
    peak = peak if graphs else peak_memory(device)
    flops, operations = count_work(script, s)
    matmul, convolutions = machine_rates(trainer, 10)
    if cuda:
        operations, busy = gpu_trace(trainer.step, 5)
        if graphs:
            trainer.graphs = graphs
            busy, trainer.graphs = gpu_trace(trainer.step, 20)[1], None
    clock.watch(trainer, "inputs", "inputs")
    clock.watch(trainer.given, "put", "inputs")
    clock.watch(trainer, "generate", "generators forward")
    clock.watch(trainer, "critic_step", lambda g, role, *a: "discriminators" if role == "D" else "connectors")
    clock.watch(trainer, "generator_step", "generators learning")
    for g in trainer.groups:
        clock.watch(g, "average", "averages")
        for net in g.nets.values():
            clock.watch(net.opt, "step", "Adam")
    clock.rows.clear()
    whole = percent(clock.times(trainer.step, n))[1]                # on a GPU more than `eager`: it is waited for at every phase
    phases = {name: percent([row.get(name, 0.0) for row in clock.rows]) for name in dict.fromkeys(k for row in clock.rows for k in row)}
    seconds = (graph or eager)[1]
    result = {
        "model": script.name, "groups": s.groups, "batch_size": s.batch_size, "image_size": s.image_size, "precision": precision, "steps": n,
        "device": torch.cuda.get_device_name(device) if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "step_seconds": seconds, "eager_seconds": eager, "graph_seconds": graph, "phase_seconds": phases,
        "images_per_second": s.groups * s.batch_size / seconds, "peak_memory_bytes": peak, "launches_per_step": operations, "gpu_busy_share": busy,
        "flops_per_step": flops, "matmul_flops_per_second": matmul, "convolution_flops_per_second": convolutions,
        "floor_share": flops / max(matmul, convolutions) / seconds, "seconds_for_50000_steps": 50000 * seconds}
    if s.json:
        print(json.dumps(result))
        return
    line = lambda name, v: print(f"{name:22}{v[1] * 1e3:12.2f}{v[0] * 1e3:10.2f}{v[2] * 1e3:10.2f}{v[1] / whole:9.0%}")
    print(f"{script.name}, groups {s.groups}, batch {s.batch_size}, {s.image_size}x{s.image_size}, {precision}, on {result['device']}, torch {torch.__version__}, {result['date']}\n"
          f"{'milliseconds':22}{'median':>12}{'20 %':>10}{'80 %':>10}{'share':>9}")
    for name, values in phases.items():
        line(name, values)
    line("step, eager", eager)
    if graph:
        line("step, CUDA graph", graph)
    print(f"""{trainer.graph_note or 'Steps run eagerly: --cuda-graph off.'}
{result['images_per_second']:.1f} images/s made and learnt from, all groups{f'; peak memory {peak / 2 ** 30:.2f} GiB' if peak else ''}
{operations:.0f} {'GPU operations' if cuda else 'operations, on a GPU at least as many launches,'} in an eager step{f', GPU busy {busy:.0%} of the time' if cuda else ''}
{flops / 1e9:.1f} GFLOP a step; this machine: {matmul / 1e9:.0f} GFLOP/s in a matrix product, {convolutions / 1e9:.0f} in these convolutions
at the better of the two a step would take {flops / max(matmul, convolutions) * 1e3:.1f} ms: {result['floor_share']:.0%} of that rate is reached
The paper's 50,000 steps take {span(50000 * seconds)}.""")


# ---------------------------------------------------------------------------------------------- --check
# Each check yields (state, what, detail): ok, note (works, but know it) or FAIL (training as asked would stop).
PAIR = """
import sys, torch, torch.distributed as dist
dist.init_process_group(sys.argv[1])
x = torch.ones(1000, device=f"cuda:{dist.get_rank()}" if sys.argv[1] == "nccl" else "cpu")
dist.all_reduce(x)
assert x.sum().item() == 1000 * dist.get_world_size()
dist.destroy_process_group()
"""
MAY_MISS = {"scipy": "fid.py is slower without it", "pytest": "only the tests need it", "triton": "attention on a GPU is eager without it"}


def check_packages(s, script, device, folder):
    yield "ok", "python", sys.version.split()[0]
    numbers = lambda text: [int(k) for k in re.findall(r"\d+", text)[:3]]
    file, fine = Path(__file__).resolve().with_name("requirements.txt"), []
    if not file.exists():
        yield "note", "packages", f"torch {torch.__version__}, numpy {np.__version__}; requirements.txt is not beside okd_train.py, so versions were not compared"
        return
    for name, low, high, only in re.findall(r"^(\w+)>=([\d.]+)(?:,<([\d.]+))?(.*)", file.read_text(), re.M):
        if "Linux" in only and sys.platform != "linux":
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or numbers(found) < numbers(low):
            yield ("note" if name in MAY_MISS else "FAIL", name,
                   f"{f'{found} is older than {low}' if found else 'not installed'}; {MAY_MISS.get(name, 'needed')} (pip install -r requirements.txt)")
        elif high and numbers(found) >= numbers(high):
            yield "note", name, f"{found} is newer than what was tested, below {high}"
        else:
            fine.append(f"{name} {found}")
    yield "ok", "packages", ", ".join(fine)


def check_devices(s, script, device, folder):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    with contextlib.suppress(OSError, ValueError):                  # a container may allow less than the machine has
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    yield "ok", "cpu", f"cores {cores()}, threads {torch.get_num_threads()}" + (f", memory {memory / 2 ** 30:.1f} GB" if memory else "")
    for k in range(torch.cuda.device_count()):
        d = torch.cuda.get_device_properties(k)
        new = d.major >= 8
        yield "ok" if new else "note", f"cuda:{k}", (f"{d.name}, {d.total_memory / 2 ** 30:.1f} GB, compute capability {d.major}.{d.minor}"
                                                     + ("" if new else "; attention is eager below 8.0"))
    yield ("ok", "device", str(device)) if device.type == "cuda" else ("note", "device", f"{device}; at full size a step takes seconds there, --quick is for it")


def check_attention(s, script, device, folder):
    try:
        from kernels.attention import _refusal, self_attention
        from kernels.reference import attention
    except ImportError as e:
        yield "note", "attention", f"kernels/ cannot be imported ({e}); sagan.py takes its own two lines"
        return
    r = np.random.default_rng(0)
    qkv = [torch.from_numpy(r.standard_normal((2, c, 1024))) for c in (8, 8, 64)]

    def derivatives(f, device, dtype):
        x = [a.to(device, dtype).requires_grad_() for a in qkv]
        o = f(*x)
        first = torch.autograd.grad(o.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), x)
        return [a.detach().double().cpu() for a in (o, *first, *second)]
    why = _refusal(qkv[0].to(device, torch.float32)) if device.type == "cuda" else "no GPU is used"
    exact = derivatives(attention, "cpu", torch.float64)
    ours = derivatives(functools.partial(self_attention, impl="eager" if why else "triton"), device, torch.float32)
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, exact))
    bad = not error < 1e-3                                          # float32 has 1e-6 here; a wrong derivative is off by 1
    yield "FAIL" if bad else "note" if why and device.type == "cuda" else "ok", "attention", (
        f"{f'eager ({why})' if why else 'triton'}; forward, backward and double backward differ from float64 by {error:.1e}"
        + ("; the kernels are wrong on this device: delete kernels/ and sagan.py takes its own two lines" if bad else ""))


def check_processes(s, script, device, folder):
    for backend in ["gloo"] + ["nccl"] * (torch.cuda.device_count() > 1 and dist.is_nccl_available()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
        pair = [subprocess.Popen([sys.executable, "-c", PAIR, backend], env=dict(env, RANK=str(r)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                for r in range(2)]
        try:
            said = "".join(p.communicate(timeout=30)[1] for p in pair)
        except subprocess.TimeoutExpired:
            said = "no answer within 30 s"
        finally:
            for p in pair:
                p.kill()
                p.wait()
        if any(p.returncode for p in pair):
            yield "FAIL" if processes(s) > 1 else "note", backend, f"2 processes on this machine failed: {(said.strip() or '?').splitlines()[-1][:200]}; train with --nproc 1"
        else:
            yield "ok", backend, "2 processes on this machine add up"


def check_scores(s, script, device, folder):
    import fid
    try:
        yield "ok", "FID weights", str(fid.find_weights(download=False))
    except fid.FidError as e:
        yield "FAIL" if s.fid_every and s.fid_features == "inception" else "note", "FID weights", f"{e}; --fid-features random needs none"
    if s.fid_every and s.fid_data:
        yield "ok", "scores", f"against {len(list_images(s.fid_data))} images of {s.fid_data}"


def check_data(s, script, device, folder):
    """Opens at most 1000 images, evenly spread; leaves the number of all in s.images."""
    s.images = 500
    if not s.data:
        yield "note", "data", "no --data: 500 synthetic images, drawn by crop_codebrim.py; good for a first look only"
        return
    files = list_images(s.data)
    some, classes = files[::math.ceil(len(files) / 1000)], {c for _, c in files}
    if script.conditional and (len(classes) < 2 or None in classes):
        yield "FAIL", "data", f"{s.data}: {script.name} needs every image in one of two or more class folders; there are {len(classes - {None})}"

    def one(path):
        try:
            decode(path, s.image_size)
            with Image.open(path) as im:
                return min(im.size) < s.image_size
        except Exception:
            return path
    with ThreadPoolExecutor(min(8, cores())) as pool:
        found = list(pool.map(one, [path for path, _ in some]))
    bad = [path for path in found if isinstance(path, Path)]
    s.images = len(files) - len(bad) * s.skip_bad
    yield "ok" if some == files else "note", "data", (
        f"{len(files)} images of {s.data}" + (f" in {len(classes)} classes" if script.conditional else "")
        + f", {s.images * 3 * s.image_size ** 2 / 2 ** 20:.0f} MB at {s.image_size}x{s.image_size}" + ("" if some == files else f"; {len(some)} of them were opened"))
    if bad:
        yield "note" if s.skip_bad else "FAIL", "data", f"{len(bad)} unreadable, such as {', '.join(map(str, bad[:3]))}" + ("" if s.skip_bad else " (mend or remove them, or --skip-bad)")
    if True in found:
        yield "note", "data", f"{found.count(True)} images have a side below {s.image_size} and are enlarged"
    if s.images < s.batch_size:
        yield "FAIL", "data", f"{s.images} images are fewer than one batch (--batch-size {s.batch_size})"


def check_training(s, script, device, folder):
    """Train, save, resume and sample for real, with at most two groups and random images; the sizes of what was written go to s.sizes."""
    t = argparse.Namespace(**{**vars(s), "groups": min(s.groups, 2), "data": str(folder / "data"), "epochs": None, "max_seconds": None, "fid_every": None,
                              "nproc": None, "resume": False, "log_every": 1, "sample_every": 10 ** 9, "save_every": 10 ** 9, "device": str(device)})
    r = np.random.default_rng(0)
    for k in range(max(t.batch_size, 20)):
        place = folder / "data" / "ab"[k % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(r.integers(0, 256, (t.image_size, t.image_size, 3), dtype=np.uint8)).save(place / f"{k}.png", compress_level=0)

    def go(out, steps, resume=False):
        t.out, t.steps, t.resume = str(folder / out), steps, resume
        with contextlib.redirect_stdout(io.StringIO()), Lock(t.out) as lock:
            train(t, script, set(), {}, lock)
        return load_file(folder / out / "checkpoint.pt")
    go("timed", 2)
    lines = read_lines(folder / "timed" / "log.jsonl")
    step, peak = lines[1]["seconds"] - lines[0]["seconds"], peak_memory(device)      # the first step also warms up
    size = lambda name: (folder / "timed" / name).stat().st_size
    s.sizes = {"checkpoint": size("checkpoint.pt") / t.groups, "picture": size("samples/step_000002.png") / t.groups,
               "line": size("log.jsonl") / len(lines) / t.groups, "generator": size("G1.pt")}
    yield "ok", "training", (f"{script.name}, {t.groups} of {s.groups} groups: {step:.3g} s a step (batch {t.batch_size}, {t.image_size}x{t.image_size})"
                             + (f", peak memory {peak / 2 ** 30:.2f} GB" if peak else "")
                             + f"; {s.steps} steps of {s.groups} groups one after the other take {span(step / t.groups * s.groups * s.steps)}")
    t.batch_size = min(t.batch_size, 4)                             # for these six steps it need not be full
    whole = go("whole", 3)
    go("parts", 2)
    a, b = map(torch.utils._pytree.tree_flatten, (whole, go("parts", 3, resume=True)))
    if a[1] == b[1] and all(map(np.array_equal, a[0], b[0])):
        yield "ok", "resume", "saved after 2 steps, resumed to 3: bit for bit the checkpoint of 3 steps at one go"
    else:
        yield ("note" if device.type == "cuda" else "FAIL", "resume",
               "saved after 2 steps, resumed to 3: not bit for bit the checkpoint of 3 steps at one go (promised on the CPU only)")
    t.sample, t.out = 2, str(folder / "whole")
    with contextlib.redirect_stdout(io.StringIO()):
        sample(t, script)
    found = len(list((folder / "whole" / "fakes").rglob("*.png")))
    yield "ok" if found == 2 * t.groups else "FAIL", "sampling", f"{found} of {2 * t.groups} images written"


def check_out(s, script, device, folder):
    """Room in --out against what the whole run writes: sizes of check_training times the settings."""
    out = Path(s.out)
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield "FAIL", "out", f"{place} is no folder that can be written to; name another with --out"
        return
    if not s.resume and holds_run(out):
        yield "FAIL", "out", f"{out} already holds a run: go on with --resume, or name another folder with --out"
    if not hasattr(s, "sizes"):
        yield "note", "out", "room not checked, as training failed"
        return
    steps = s.steps if s.epochs is None else math.ceil(s.epochs * s.images / (s.batch_size * s.n_critic))
    z, free = s.sizes, shutil.disk_usage(place).free
    need = z["generator"] + s.groups * (z["generator"] + 2 * z["checkpoint"] + z["picture"] * (2 + steps // s.sample_every) + z["line"] * (1 + steps // s.log_every))
    if s.fid_every:
        need += z["generator"] * s.groups + s.images * 4 * 2048
    yield "FAIL" if free < need else "ok", "out", (
        f"{out}: {free / 2 ** 30:.2f} GB free; {steps} steps write {need / 2 ** 30:.2f} GB at most, of it the checkpoint "
        f"{z['checkpoint'] * s.groups / 2 ** 20:.0f} MB, twice while it is replaced"
        + ("; free some, or name another disk with --out" if free < need else ""))


def check(s, script):
    """Print a line for everything a run with these settings needs, then "ready" or "not ready: ..."; returns the exit status, 0 or 1."""
    if exports(s) or s.benchmark or asked(s):
        raise UserError("--check looks at a machine before a run: give it without --benchmark, --sample, --per-class or pictures")
    failed, device, level = {}, torch.device("cpu"), logging.root.manager.disable

    def tell(state, what, detail):
        print(f"{state:4}  {what:12}  {one_line(detail)}", flush=True)
        if state == "FAIL":
            failed[what] = True
    try:
        device = pick_device(s.device)
    except UserError as e:
        tell("FAIL", "device", e)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="okd_check_") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for look in (check_packages, check_devices, check_attention, check_processes, check_scores, check_data, check_training, check_out):
            try:
                for line in look(s, script, device, Path(folder)):
                    tell(*line)
            except (Exception, SystemExit) as e:
                if getattr(e, "code", None) in (130, 143):          # Ctrl-C while it trained
                    raise
                tell("FAIL", look.__name__[6:], e if isinstance(e, UserError) else f"{type(e).__name__} {e}")
    logging.disable(level)
    print(f"Not checked: {s.groups} groups at once in memory, other machines, and how fast {'several GPUs are' if device.type == 'cuda' else 'it is while other programs run'}.")
    print(f"not ready: {', '.join(failed)}" if failed else "ready")
    return int(bool(failed))


# ---------------------------------------------------------------------------------------------- launching
def processes(s):
    """How many processes to start from this one: 1 means none."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or OUTER in os.environ or asked(s):
        return 1
    if s.nproc is not None or s.benchmark:
        return s.nproc or 1
    if torch.cuda.is_available() and s.device in (None, "cuda"):
        return min(torch.cuda.device_count(), s.groups)
    return min(2, s.groups, cores()) if s.quick and not exports(s) and s.device in (None, "cpu") else 1


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(n, argv, device, hint):
    """Run this script in n processes on this machine; returns when all are done, with their exit status.

    device is a name that the processes will try: to try a GPU here as well would hold memory on it.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    os.environ[OUTER] = agent()
    for name in list(os.environ):                                   # an outer torchrun's, which would mislead the inner one
        if re.fullmatch("((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*", name):
            del os.environ[name]
    if device.split(":")[0] == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // n)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)        # its report would bury our one line
    config = dict(min_nodes=1, max_nodes=1, nproc_per_node=n, run_id=f"okd{os.getpid()}", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                  max_restarts=0, monitor_interval=0.1, start_method="spawn")
    try:
        with tempfile.TemporaryDirectory(prefix="okd_train_") as logs:               # its own folder of logs it would leave behind
            elastic_launch(LaunchConfig(**config, logs_specs=DefaultLogsSpecs(logs)), sys.executable)("-u", str(Path(__file__).resolve()), *argv)
    except SignalException as e:
        raise SystemExit(128 + e.sigval) from None
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode < 0:
            print(f"okd_train.py: error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}; {hint}", file=sys.stderr)
            raise SystemExit(1) from None
        raise SystemExit(failure.exitcode) from None


def check_launcher():
    """Refuse an environment that no launcher sets: sizes run from 1 to WORLD_SIZE, ranks from 0 to one less."""
    world = os.environ.get("WORLD_SIZE", "1")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        value, least = os.environ.get(name), int(name.endswith("SIZE"))
        if value is not None and not (re.fullmatch("[0-9]{1,9}", value) and least <= int(value) < int(world) + least):
            os.environ.pop("RANK", None)                            # main() reads from it who speaks of an error
            raise UserError(f"the environment has {name}={value!r} and WORLD_SIZE={world!r}; torchrun sets them to fit, without torchrun unset them")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")           # file names need not be text
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)       # decode() refuses what this warns of
    try:
        check_launcher()
        s, script, named = parse(argv)
        changed = settle(s, script, named)
        alone = [flag for flag in ("check", "benchmark", *PICTURES) if getattr(s, flag)]
        if alone and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"--{alone[0].replace('_', '-')} is done by one process: start it with python, not with torchrun")
        n = 1 if s.check else processes(s)
        if n > 1:
            why = f"--nproc {n}" if s.nproc is not None else "one per GPU" if torch.cuda.is_available() else "quicker than one at this size"
            print(f"Starting {n} processes on this machine: {why} (--nproc 1 forbids).", flush=True)
            launch(n, argv, s.device or ("cuda" if torch.cuda.is_available() else "cpu"), "the same command goes on" if exports(s) else "--resume goes on from the last checkpoint")
        elif s.check:
            if check(s, script):
                raise SystemExit(1)
        elif exports(s):
            sample(s, script)
        elif s.benchmark:
            benchmark(s, script)
        elif asked(s):
            pictures(s, script)
        else:
            with Lock(s.out) as lock:
                train(s, script, named, changed, lock)
    except (UserError, OSError) as e:                               # OSError: stdout on a full disk or closed, a name that is too long
        rank = int(os.environ.get("RANK", 0))
        if rank:                                                    # mostly rank 0 says the same, and the launcher ends us with it:
            time.sleep(5)                                           # who is left after that has met an error of its own
        print(f"okd_train.py: error: {f'rank {rank}: ' if rank else ''}{one_line(e)}", file=sys.stderr, flush=True)
        if isinstance(e, OSError):
            with contextlib.suppress(OSError):
                sys.stdout.flush()
        raise SystemExit(2) from None
    except RuntimeError as e:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        print(f"okd_train.py: rank {os.environ['RANK']} cannot go on: {' '.join(str(e).split())[:160]}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nokd_train.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
