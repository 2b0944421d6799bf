"""Train N GANs together by online knowledge distillation: a ring of groups (generator, discriminator, connector).

    python okd_train.py --model sagan --groups 3 --quick              # a first look in minutes, no GPU, no data needed
    torchrun okd_train.py --model sagan --groups 3 --data crops/      # the real thing; python okd_train.py ... works too
    python okd_train.py --model my_gan.py --groups 2 --data photos/   # any script with a Generator and a Discriminator
    python okd_train.py --model sagan --groups 3 --data crops/ --resume            # go on, bit for bit
    python okd_train.py --out runs/sagan-3 --sample 1000              # 1000 PNGs per group in runs/sagan-3/fakes/

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
import contextlib
import ctypes
import hashlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn.utils import parametrize

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
FORMAT = "okd-gan 1"            # of checkpoint.pt
MAY_CHANGE = {"steps", "epochs", "max_seconds", "save_every", "sample_every", "log_every", "device"}    # on --resume


class UserError(Exception):
    """What the user can mend: one line on stderr and exit status 2."""


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
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{group}/{purpose}".encode(), digest_size=n_bytes).digest(), "little")


def seed_torch(seed, step, group, purpose):
    """Seed torch before a call into a model script, which may draw by itself (dropout, its own penalty, initial weights)."""
    torch.manual_seed(_key(seed, step, group, purpose, 8) >> 1)


# ---------------------------------------------------------------------------------------------- losses for scripts without
def _score(D, x, y):
    out = D(x, y) if "y" in inspect.signature(D.forward).parameters else D(x)
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
        except Exception as e:
            raise UserError(f"{self.path} cannot be loaded: {where(e, self.path)}") from e
        finally:
            sys.path.remove(str(self.path.parent))
            if known is not None:
                sys.modules[self.name] = known
        for name in ("Generator", "Discriminator"):
            if not inspect.isclass(getattr(module, name, None)):
                raise UserError(f"{self.path} has no class {name}; a model script needs Generator and Discriminator")
        self.Generator, self.Discriminator = module.Generator, module.Discriminator
        self.discriminator_loss = getattr(module, "discriminator_loss", discriminator_loss)
        self.generator_loss = getattr(module, "generator_loss", generator_loss)
        self.connector_loss = getattr(module, "connector_loss", self.discriminator_loss)
        own = getattr(module, "hparams", {})
        if not isinstance(own, dict):
            raise UserError(f"{self.path}: hparams is a {type(own).__name__}; it must be a flat dict")
        self.conditional = "n_classes" in own
        readers = [set(inspect.signature(f).parameters) for f in self.callables()]
        self.hparams = {k: v for k, v in {**TRAINER_HPARAMS, **OWN_LOSS_HPARAMS}.items()
                        if k in TRAINER_HPARAMS or any(k in r for r in readers)}
        for key, value in own.items():
            if not isinstance(key, str) or not key.isidentifier() or not isinstance(value, (bool, int, float, str)):
                raise UserError(f"{self.path}: hparams[{key!r}] = {value!r}; keys are names, values bool, int, float or str")
            if key not in TRAINER_HPARAMS and key != "n_classes" and not any(key in r for r in readers):
                raise UserError(f"{self.path}: hparams has {key!r}, but no constructor and no loss of the script names it")
            self.hparams[key] = float(value) if isinstance(TRAINER_HPARAMS.get(key), float) else value

    def callables(self):
        return (self.Generator, self.Discriminator, self.discriminator_loss, self.generator_loss, self.connector_loss)


def find_script(model):
    """sagan -> ./sagan.py, else sagan.py beside this file; a path to a .py file -> that file."""
    tried = [Path(model)] if model.endswith(".py") or os.sep in model else [
        Path(f"{model}.py"), Path(__file__).resolve().parent / f"{model}.py"]
    for path in tried:
        if path.is_file():
            return path.resolve()
    raise UserError(f"no model script {model!r}: looked for {' and '.join(map(str, tried))}")


def where(error, path):
    """'file:line: Type: message' of the deepest frame of `error` inside the file `path`."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: SyntaxError: {error.msg}"
    line, tb = None, error.__traceback__
    while tb:
        if tb.tb_frame.f_code.co_filename == str(path):
            line = tb.tb_lineno
        tb = tb.tb_next
    text = " ".join(str(error).split())
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {text}"


def bind(f, settings):
    """The settings that `f` names as parameters."""
    return {k: settings[k] for k in inspect.signature(f).parameters if k in settings}


@contextlib.contextmanager
def calling(script, what):
    """Turn an exception out of the model script into one line that says what was asked of it."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{script.path}: {what} failed: {where(e, script.path)}") from e


# ---------------------------------------------------------------------------------------------- data
def list_images(folder):
    """All image files below `folder`, sorted, as (path, class or None); class = first folder below `folder`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
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
            elif e.name.lower().endswith(IMAGE_TYPES):
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
    """Image file -> (uint8 (3, size, size), was it resized): RGB, centre square, antialiased; 16-bit is scaled to 8."""
    with Image.open(path) as im:
        im.load()
        if im.mode.startswith("I") or im.mode == "F":
            a = np.asarray(im, np.float32)
            a = a / 257 if im.mode.startswith("I;16") or a.max(initial=0) > 255 else a
            im = Image.fromarray(np.clip(np.rint(a), 0, 255).astype(np.uint8))
        im = im.convert("RGB")
        w, h = im.size
        if (w, h) != (size, size):
            side = min(w, h)
            x, y = (w - side) // 2, (h - side) // 2
            im2 = im.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
        else:
            im2 = im
        return np.asarray(im2).transpose(2, 0, 1), im2 is not im


def load_images(folder, size, conditional, skip_bad, say):
    """Decode a folder once -> images uint8 (n, 3, size, size), labels int64 (n,), class names (sorted; [] if none are needed)."""
    files = list_images(folder)
    classes = sorted({c for _, c in files if c}) if conditional else []
    if conditional:
        loose = [p for p, c in files if c is None]
        if loose:
            raise UserError(f"--data {folder}: {len(loose)} images outside class folders, such as {loose[0]}; "
                            "a class-conditional model takes its labels from folders")
        if len(classes) < 2:
            raise UserError(f"--data {folder}: one class folder only ({classes[0]}); a class-conditional model needs two or more")

    def one(path):
        try:
            return decode(path, size)
        except Exception as e:
            return f"{path} ({' '.join(str(e).split()) or type(e).__name__})"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:   # Pillow decodes outside the interpreter's lock
        decoded = list(pool.map(one, [p for p, _ in files]))
    bad = [d for d in decoded if isinstance(d, str)]
    if bad and not skip_bad:
        raise UserError(f"{len(bad)} of {len(files)} images cannot be read: {'; '.join(bad)}. Mend or remove them, or pass --skip-bad")
    if bad:
        say(f"Skipped {len(bad)} unreadable images: {'; '.join(bad)}.")
    good = [(d, c) for d, (_, c) in zip(decoded, files) if not isinstance(d, str)]
    resized = sum(d[1] for d, _ in good)
    if resized:
        say(f"{resized} of {len(good)} images were cut to their centre square and resized to {size}x{size}.")
    images = np.stack([d[0] for d, _ in good]) if good else np.zeros((0, 3, size, size), np.uint8)
    labels = np.array([classes.index(c) for _, c in good] if conditional else [0] * len(good), np.int64)
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
        self.digest = hashlib.blake2b(images.numpy().tobytes() + labels.numpy().tobytes(), digest_size=16).hexdigest()
        self.s, self.orders = s, {}

    def indices(self, batch, group):
        """Indices (B,) of a group's batch number `batch`: without replacement through a new permutation every epoch."""
        n, size = len(self.images), self.s.batch_size
        places = np.arange(batch * size, (batch + 1) * size)
        return torch.cat([self.order(int(e), group)[torch.from_numpy(places[places // n == e] % n)]
                          for e in np.unique(places // n)])

    def order(self, epoch, group):
        if (group, epoch) not in self.orders:
            self.orders = {k: v for k, v in self.orders.items() if k[0] != group or k[1] == epoch - 1}
            self.orders[group, epoch] = draw(self.s.seed, epoch, group, "order", "permutation", len(self.images))
        return self.orders[group, epoch]

    def batch(self, idx, flip):
        """idx (B,) -> float images (B, 3, H, W) in [-1, 1]; flip (B, 1, 1, 1) below 0.5 mirrors that image, None mirrors none."""
        x = self.images[idx].float().div_(127.5).sub_(1)
        return x if flip is None else torch.where(flip < 0.5, x.flip(3), x)


# ---------------------------------------------------------------------------------------------- groups and their step
class Network:
    """A network with its optimiser, and what must be held still while only its input gradient is wanted."""

    def __init__(self, net, lr, s):
        self.net = net
        self.params = [p for p in net.parameters() if p.requires_grad]
        self.opt = torch.optim.Adam(self.params, lr=lr, betas=(s.beta1, s.beta2), fused=True)
        inside = [m for m in net.modules() if isinstance(m, parametrize.ParametrizationList)]
        self.parametrizations = [m for p in inside for m in p]
        self.norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
        handled = {id(b) for m in self.parametrizations + self.norms for b in m.buffers()}
        self.others = [b for b in net.buffers() if id(b) not in handled] + [p for p in net.parameters() if not p.requires_grad]

    @contextlib.contextmanager
    def frozen(self):
        """Inside: no weight gradient, no power iteration, BatchNorm on batch statistics; no parameter or buffer moves."""
        kept = [b.detach().clone() for b in self.others]            # e.g. the u of a spectral norm written by hand
        for p in self.params:
            p.requires_grad_(False)
        for m in self.parametrizations:
            m.training = False
        for m in self.norms:
            m.track_running_stats = False                           # torch then uses the batch and leaves the buffers alone
        try:
            yield
        finally:
            for p in self.params:
                p.requires_grad_(True)
            for m in self.parametrizations:
                m.training = True
            for m in self.norms:
                m.track_running_stats = True
            with torch.no_grad():
                for b, old in zip(self.others, kept):
                    b.copy_(old)

    def step(self, loss):
        """loss: a function -> scalar, (scalar, logs). One joint backward, one optimiser step; returns (loss, logs) detached.

        cached(): every use of a spectrally normed weight in this update sees one power iteration, and it is left before
        the optimiser moves the weights.
        """
        self.opt.zero_grad(set_to_none=True)
        with parametrize.cached():
            out = loss()
            value, logs = out if isinstance(out, tuple) else (out, {})
            value.backward()
        self.opt.step()
        return value.detach(), logs


class Group:
    """Generator, discriminator and connector number i (from 1) with their optimisers, and the generator's average."""

    def __init__(self, i, script, s, device):
        self.i = i
        self.nets = {}
        for role, cls, lr in (("G", script.Generator, s.g_lr), ("D", script.Discriminator, s.d_lr), ("C", script.Discriminator, s.c_lr)):
            if role == "C" and s.groups == 1:
                continue                                            # one group has no neighbour
            seed_torch(s.seed, 0, i, f"init {role}")
            with calling(script, f"{cls.__name__}({', '.join(f'{k}={v!r}' for k, v in bind(cls, vars(s)).items())})"):
                net = cls(**bind(cls, vars(s))).to(device).train()
            if not any(p.requires_grad for p in net.parameters()):
                raise UserError(f"{script.path}: {cls.__name__} has no trainable parameter")
            self.nets[role] = Network(net, lr, s)
        seed_torch(s.seed, 0, i, "init G")
        self.ema = script.Generator(**bind(script.Generator, vars(s))).to(device).eval().requires_grad_(False)
        self.ema.load_state_dict(self.nets["G"].net.state_dict())
        live = self.nets["G"].net
        self.averaged = list(self.ema.parameters()), list(live.parameters())
        self.copied = list(self.ema.buffers()), list(live.buffers())

    @torch.no_grad()
    def average(self, step):
        """Move the average towards the generator; `step` updates were made before. Buffers are copied."""
        torch._foreach_lerp_(*self.averaged, 1 - min(EMA, (1 + step) / (10 + step)))
        if self.copied[0]:
            torch._foreach_copy_(*self.copied)

    def gammas(self):
        """{role: [gamma of each attention layer]}: every one-element parameter that is called gamma."""
        return {role: g for role, n in self.nets.items()
                if (g := [p.detach().reshape(()) for k, p in n.net.named_parameters() if k.split(".")[-1] == "gamma" and p.numel() == 1])}


class Trainer:
    """All groups and the one training step."""

    def __init__(self, script, s, data, device):
        self.script, self.s, self.data, self.device = script, s, data, device
        self.conditional = script.conditional
        self.names = {}
        for role, f in (("D", script.discriminator_loss), ("C", script.connector_loss), ("G", script.generator_loss)):
            self.names[role] = bind(f, vars(s))
        self.takes_eps = {role: "eps" in inspect.signature(f).parameters
                          for role, f in (("D", script.discriminator_loss), ("C", script.connector_loss))}
        self.groups = [Group(i, script, s, device) for i in range(1, s.groups + 1)]
        self.step_count = 0

    def inputs(self, step):
        """Everything random of one step: for each of n_critic sub-steps a dict of tensors on the device.

        Drawn on the CPU and sent in one copy. Keys: z, y, and per group i: ("idx", i), ("flip", i), ("D", i), ("C", i).
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
            plan.append(d)
        return to_device(plan, self.device)

    def generate(self, g, d, number):
        seed_torch(self.s.seed, number, g.i, "call G")
        return g.nets["G"].net(d["z"], d["y"]) if self.conditional else g.nets["G"].net(d["z"])

    def critic_step(self, g, role, d, number, real, fake, y_real):
        """One update of a discriminator or a connector; real and fake carry no graph."""
        f = self.script.discriminator_loss if role == "D" else self.script.connector_loss
        extra = dict(self.names[role])
        if self.takes_eps[role]:
            extra["eps"] = d[role, g.i]
        labels = (y_real, d["y"]) if self.conditional else ()
        seed_torch(self.s.seed, number, g.i, f"call {role}")
        n = g.nets[role]
        return n.step(lambda: f(n.net, real, fake, *labels, **extra))

    def generator_step(self, g, d, number, fake):
        """One update of a generator against its frozen critics; `fake` carries the generator's graph."""
        labels = (d["y"],) if self.conditional else ()

        def loss():
            total = 0
            for role, weight in (("D", 1), ("C", self.s.rho)):
                if role in g.nets and weight:
                    seed_torch(self.s.seed, number, g.i, f"call G {role}")
                    out = self.script.generator_loss(g.nets[role].net, fake, *labels, **self.names["G"])
                    value, logs = out if isinstance(out, tuple) else (out, {})
                    total = value if role == "D" else total + weight * value
                    every.update({k if role == "D" else f"c_{k}": v for k, v in logs.items()})
            return total, every

        every = {}
        with contextlib.ExitStack() as stack:
            for role in ("D", "C"):
                if role in g.nets:
                    stack.enter_context(g.nets[role].frozen())
            return g.nets["G"].step(loss)

    def step(self):
        """One step of every group. Returns per group {"d": (loss, logs), "c": ..., "g": ...}, tensors on the device."""
        s, t = self.s, self.step_count
        plan = self.inputs(t)
        out = {g.i: {} for g in self.groups}
        for sub, d in enumerate(plan):
            number, last = t * s.n_critic + sub, sub == s.n_critic - 1
            fakes = {}
            for g in self.groups:
                with contextlib.nullcontext() if last else g.nets["G"].frozen(), torch.set_grad_enabled(last):
                    fakes[g.i] = self.generate(g, d, number)
            images = {i: x.detach() for i, x in fakes.items()}
            for g in self.groups:
                idx = d["idx", g.i]
                real = self.data.batch(idx, d.get(("flip", g.i)))
                y_real = self.data.labels[idx] if self.conditional else None
                out[g.i]["d"] = self.critic_step(g, "D", d, number, real, images[g.i], y_real)
                if "C" in g.nets:
                    out[g.i]["c"] = self.critic_step(g, "C", d, number, images[g.i % s.groups + 1], images[g.i], d.get("y"))
                if last:
                    out[g.i]["g"] = self.generator_step(g, d, number, fakes.pop(g.i))
                    g.average(t)
        self.step_count += 1
        return out

    def first_bad(self, out):
        """'discriminator of group 2' for the first loss that is not finite, else None."""
        for i, losses in out.items():
            for role, (value, _) in losses.items():
                if not math.isfinite(value.item()):
                    return f"{dict(d='discriminator', c='connector', g='generator')[role]} of group {i}"

    # ------------------------------------------------------------------------------------------ state
    def state(self):
        """All that moves, as plain tensors and dicts."""
        return {"format": FORMAT, "step": self.step_count, "groups": [
            {"ema": g.ema.state_dict(), **{role: {"net": n.net.state_dict(), "opt": n.opt.state_dict()["state"]}
                                           for role, n in g.nets.items()}} for g in self.groups]}

    def load_state(self, state):
        for g, saved in zip(self.groups, state["groups"], strict=True):
            g.ema.load_state_dict(saved["ema"])
            for role, n in g.nets.items():
                n.net.load_state_dict(saved[role]["net"])
                n.opt.load_state_dict({"state": saved[role]["opt"], "param_groups": n.opt.state_dict()["param_groups"]})
        self.step_count = state["step"]


def to_device(plan, device):
    """A list of dicts of CPU tensors -> the same on `device`, through one copy."""
    if device.type == "cpu":
        return plan
    tensors = [t.contiguous() for d in plan for t in d.values()]
    tensors.sort(key=lambda t: -t.element_size())                   # int64 first: views stay aligned
    flat = torch.cat([t.flatten().view(torch.uint8) for t in tensors]).pin_memory().to(device, non_blocking=True)
    places, at = {}, 0
    for t in tensors:
        places[id(t)] = flat[at:at + t.nbytes].view(t.dtype).view(t.shape)
        at += t.nbytes
    return [{k: places[id(t)] for k, t in d.items()} for d in plan]


def probe(script, s, group):
    """Run one group's networks and losses on two samples and put everything back; say what is wrong with shapes or values."""
    dev = next(group.ema.parameters()).device
    z, y = torch.zeros(2, s.z_dim, device=dev), torch.zeros(2, dtype=torch.long, device=dev)
    labels = (y,) if script.conditional else ()
    shape = lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    with torch.no_grad(), calling(script, f"Generator called with z (2, {s.z_dim}){' and y (2,)' if labels else ''}"):
        x = group.ema(z, *labels)
    want = (2, 3, s.image_size, s.image_size)
    if shape(x) != want:
        raise UserError(f"{script.path}: Generator returned {shape(x)} for z (2, {s.z_dim}); expected {want} (--image-size {s.image_size})")
    D = group.nets["D"].net
    before = {k: v.clone() for k, v in D.state_dict().items()}
    takes_y = "y" in inspect.signature(D.forward).parameters
    with torch.no_grad(), calling(script, f"Discriminator called with images {want}{' and y (2,)' if takes_y else ''}"):
        out = D(x, y) if takes_y else D(x)
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
def to_uint8(x):
    """float (n, 3, H, W) in [-1, 1] -> uint8 (n, H, W, 3) on the CPU."""
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(blocks, columns):
    """blocks: list of (name, uint8 (n, H, W, 3)) -> one picture, every block in rows of `columns` with its name beside it."""
    size = blocks[0][1].shape[1]
    zoom = max(1, 64 // size)
    size *= zoom
    gap, margin = 2, 14 + 6 * max(len(name) for name, _ in blocks)
    rows = [math.ceil(len(a) / columns) for _, a in blocks]
    height = sum(rows) * (size + gap) + (len(blocks) - 1) * 4 * gap + gap
    sheet = Image.new("RGB", (margin + columns * (size + gap), height), "white")
    pen, y = ImageDraw.Draw(sheet), gap
    for (name, images), n in zip(blocks, rows):
        pen.text((6, y + n * (size + gap) // 2 - 6), name, fill="black")
        for k, a in enumerate(images):
            place = (margin + k % columns * (size + gap), y + k // columns * (size + gap))
            sheet.paste(Image.fromarray(a).resize((size, size), Image.Resampling.NEAREST), place)
        y += n * (size + gap) + 4 * gap
    return sheet


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
    """Every group's averaged generator on the same fixed z: a block of rows per group."""
    s, columns = trainer.s, 10
    rows = min(s.n_classes, 10) if trainer.conditional else 2
    z = draw(s.seed, 0, 0, "grid", "normal", (columns if trainer.conditional else columns * rows, s.z_dim))
    y = torch.arange(rows).repeat_interleave(columns) if trainer.conditional else None
    z = z.repeat(rows, 1) if trainer.conditional else z
    blocks = [(f"G{g.i}", generate(g.ema, z, y)) for g in trainer.groups]
    save_image(grid(split_rows(blocks, trainer.data.classes, columns), columns), path)


def split_rows(blocks, classes, columns):
    """Conditional pictures get a row per class, named beside it."""
    if not classes:
        return blocks
    return [(f"{name} {classes[k // columns]}", a[k:k + columns]) for name, a in blocks for k in range(0, len(a), columns)]


def real_grid(trainer, path):
    """Real images in the layout of sample_grid."""
    data, columns = trainer.data, 10
    pick = draw(trainer.s.seed, 0, 0, "real grid", "permutation", len(data.images))
    labels = data.labels.cpu()
    if data.classes:
        pick = torch.cat([pick[labels[pick] == c][:columns] for c in range(min(len(data.classes), 10))])
        blocks = [(data.classes[c], to_hwc(data.images[pick[labels[pick] == c]])) for c in range(min(len(data.classes), 10))
                  if (labels[pick] == c).any()]
    else:
        blocks = [("real", to_hwc(data.images[pick[:2 * columns]]))]
    save_image(grid(blocks, columns), path)


def to_hwc(images):
    return images.permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------- the run folder
@contextlib.contextmanager
def writing(path):
    """Turn a failed write (disk full, read-only folder) into one line."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        raise UserError(f"cannot write {path}: {' '.join(str(e).split())[:200]}") from e


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary file beside `path`, open for writing; it takes the final name only when all went well."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with writing(path):
            with open(tmp, "wb") as f:
                yield f
                f.flush()
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
    """checkpoint.pt, and the averaged generators as G1.pt, G2.pt, ..."""
    with replacing(out / "checkpoint.pt") as f:
        torch.save(trainer.state(), f)
    script = trainer.script
    for g in trainer.groups:
        with replacing(out / f"G{g.i}.pt") as f:
            torch.save({"model": script.name if Path(find_beside(script.name)) == script.path else str(script.path),
                        "kwargs": bind(script.Generator, vars(trainer.s)), "state_dict": g.ema.state_dict(),
                        "step": trainer.step_count, "classes": trainer.data.classes, "z_dim": trainer.s.z_dim}, f)


def find_beside(name):
    return Path(__file__).resolve().parent / f"{name}.py"


def load_file(path):
    """torch.load of tensors and plain values only: nothing in the file is executed."""
    try:
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
    if not isinstance(d, dict) or not {"model", "kwargs", "state_dict"} <= d.keys():
        raise UserError(f"{path} is not a generator written by okd_train.py")
    G = Script(model or d["model"]).Generator(**d["kwargs"])
    try:
        G.load_state_dict(d["state_dict"])
    except RuntimeError as e:
        raise UserError(f"{path} does not fit {model or d['model']}: {' '.join(str(e).split())[:200]}") from e
    return G.eval().requires_grad_(False).to(device)


def load_checkpoint(trainer, path):
    state = load_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of okd_train.py ({FORMAT})")
    try:
        trainer.load_state(state)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path} does not fit these networks: {' '.join(str(e).split())[:200]}") from e


def cut_log(path, step, log_every):
    """Drop what an interrupted run logged after its last checkpoint, half lines, and a line that only its end had."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            at = json.loads(line)["step"]
            if at <= step and at % log_every == 0:
                kept.append(line + b"\n")
    with replacing(path) as f:
        f.write(b"".join(kept))


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
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror real images at random (default no)")
    p.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and say how many")
    p.add_argument("--log-every", type=int, default=10, metavar="K", help="steps between lines of log.jsonl (default 10)")
    p.add_argument("--sample-every", type=int, default=500, metavar="K", help="steps between sample grids (default 500)")
    p.add_argument("--save-every", type=int, default=500, metavar="K", help="steps between checkpoints (default 500)")
    p.add_argument("--sample", type=int, metavar="N", help="do not train: write N images per group of the run in --out to OUT/fakes/")


def boolean(text):
    raise argparse.ArgumentTypeError("takes no value")


def parse(argv):
    """argv -> (settings, script, names of the flags that were given)."""
    argv = [("--" + a[2:].split("=")[0].replace("_", "-") + a[2 + len(a[2:].split("=")[0]):]) if a.startswith("--") else a for a in argv]
    first = Parser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--out"):
        first.add_argument(name)
    for name in ("--resume", "--sample"):
        first.add_argument(name, nargs="?", const=True)
    early, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    saved = {}
    if early.model is None and early.out and (early.resume or early.sample) and (Path(early.out) / "args.json").exists():
        saved = read_args(Path(early.out))
    script = Script(early.model or saved.get("model") or "sagan")

    p = Parser(prog="okd_train.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainer_flags(p)
    own = {a.dest for a in p._actions}
    group = p.add_argument_group(f"settings of {script.name}")
    for key, value in script.hparams.items():
        if key in own:
            raise UserError(f"{script.path}: hparams has {key!r}, which clashes with the trainer's own flag --{key.replace('_', '-')}")
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help=f"(default {value})")
        else:
            group.add_argument(flag, type=type(value), default=value, metavar=type(value).__name__.upper(), help=f"(default {value})")
    s = p.parse_args(argv)
    for action in p._actions:                                       # a second pass without defaults tells what was named
        action.default = argparse.SUPPRESS
    named = set(vars(p.parse_args(argv)))
    return s, script, named


def read_args(out):
    try:
        saved = json.loads((out / "args.json").read_text())
        return dict(saved, **saved["settings"])
    except FileNotFoundError:
        raise UserError(f"{out} is not a run: it has no args.json") from None
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise UserError(f"{out / 'args.json'} cannot be read: {e}") from e


def settle(s, script, named):
    """Put presets and a resumed run's settings in, and check every value. Returns what --quick or --resume changed."""
    changed = {}
    if s.out is None:
        s.out = f"runs/{script.name}-{s.groups}"
    if (s.resume or s.sample is not None) and (Path(s.out) / "args.json").exists():
        saved = read_args(Path(s.out))
        if "model" in named and Path(saved["script"]).stem != script.name:
            raise UserError(f"{s.out} was trained with {saved['model']}, not with {script.name}")
        clash = []
        for key, old in saved["settings"].items():
            if not hasattr(s, key):
                continue
            same = getattr(s, key) == old or (key == "data" and s.data and old and Path(s.data).resolve() == Path(old).resolve())
            if key in named and not same and key not in MAY_CHANGE:
                clash.append(f"--{key.replace('_', '-')} is {old} there and {getattr(s, key)} here")
            elif key not in named:
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
    for key, low in dict(groups=1, steps=1, batch_size=1, n_critic=1, image_size=4, z_dim=1, log_every=1, sample_every=1, save_every=1,
                         rho=0, g_lr=0, d_lr=0, c_lr=0, seed=0, n_classes=1, sample=1).items():
        value = getattr(s, key, None)
        if value is not None and not (value >= low and math.isfinite(value)):
            raise UserError(f"--{key.replace('_', '-')} is {value}; it must be {low} or more")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(s, key) < 1:
            raise UserError(f"--{key} is {getattr(s, key)}; it must be in [0, 1)")
    for key in ("epochs", "max_seconds"):
        value = getattr(s, key)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{key.replace('_', '-')} is {value}; it must be above 0")
    return changed


def pick_device(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except Exception as e:
        raise UserError(f"--device {name} cannot be used here: {' '.join(str(e).split())[:120]}") from e


def span(seconds):
    """'45 s', '12 min', '3.2 h', '4.1 days'."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------------------------------------- training
class Progress:
    """One line that is rewritten in place on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, total):
        self.total, self.tty = total, sys.stdout.isatty()
        self.last, self.open = 0.0, False
        self.marks = []                                             # (time, step) of the last 30 s

    def __call__(self, step, s, out):
        now = time.monotonic()
        self.marks = [m for m in self.marks if m[0] > now - 30][-200:] + [(now, step)]
        if now - self.last < (0.2 if self.tty else 10):
            return
        self.last = now
        (t0, s0), (t1, s1) = self.marks[0], self.marks[-1]
        rate = (s1 - s0) / (t1 - t0) if t1 > t0 else 0
        left = span((self.total - step) / rate) if rate else "?"
        mean = {r: sum(v[r][0].item() for v in out.values() if r in v) / len(out) for r in ("d", "c", "g")}
        losses = "  ".join(f"{r} {mean[r]:+.3f}" for r in ("d", "c", "g") if r != "c" or s.groups > 1)
        line = f"step {step}/{self.total}  {losses}  {rate * s.batch_size * s.groups:.1f} img/s  {left} left"
        print(f"\r{line}\x1b[K" if self.tty else line, end="" if self.tty else "\n", flush=True)
        self.open = self.tty

    def say(self, text):
        print(("\n" if self.open else "") + text, flush=True)
        self.open = False


class Stop:
    """SIGTERM and Ctrl-C finish the step; a second one ends at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.old = {k: signal.signal(k, self) for k in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __call__(self, number, frame):
        self.signal = number
        for k, old in self.old.items():
            signal.signal(k, old)

    def __exit__(self, *exc):
        for k, old in self.old.items():
            signal.signal(k, old)


def log_line(trainer, out, seconds, rate):
    """One JSON object of log.jsonl."""
    groups = []
    for g in trainer.groups:
        row = {}
        for role, (value, logs) in out[g.i].items():
            row[f"{role}_loss"] = value.item()
            row.update({f"{role}_{k}": float(v) for k, v in logs.items()})
        row["gamma"] = {role: [v.item() for v in values] for role, values in g.gammas().items()}
        groups.append(row)
    return {"step": trainer.step_count, "seconds": round(seconds, 3), "images_per_second": round(rate, 2), "groups": groups}


def open_run(s, trainer, out):
    """Make the run folder, or load the checkpoint of the one that is there. Nothing that is there is overwritten."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    checkpoint = out / "checkpoint.pt"
    if s.resume or (restarted and checkpoint.exists()):
        if not checkpoint.exists():
            raise UserError(f"--resume: no checkpoint in {out}")
        saved = read_args(out)
        if saved["data_digest"] != trainer.data.digest:
            raise UserError(f"--resume: the {len(trainer.data.images)} images of {s.data or 'the synthetic set'} are not those "
                            f"that {out} was trained on ({saved['images']} images); restore them, or start another run with --out")
        load_checkpoint(trainer, checkpoint)
        if trainer.step_count < s.steps:
            cut_log(out / "log.jsonl", trainer.step_count, saved["log_every"])
    elif not restarted and any((out / name).exists() for name in ("args.json", "checkpoint.pt", "log.jsonl")):
        hint = "go on with --resume" if checkpoint.exists() else "it has no checkpoint yet: delete it"
        raise UserError(f"{out} already holds a run: {hint}, or name another folder with --out")
    else:
        with writing(out):
            (out / "samples").mkdir(parents=True, exist_ok=True)
            (out / "log.jsonl").write_bytes(b"")


def save_args(s, script, data, out):
    """args.json: every setting, and what they were used on."""
    settings = {k: v for k, v in vars(s).items() if k not in ("resume", "sample", "out", "model")}
    save_json({"model": s.model, "script": str(script.path), "classes": data.classes, "images": len(data.images), "data_digest": data.digest,
               "script_digest": hashlib.blake2b(script.path.read_bytes(), digest_size=16).hexdigest(),
               "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
               "git": git_revision(), "settings": settings}, out / "args.json")


def git_revision():
    """Commit of the checkout that this file lies in, or None; read from .git without running anything."""
    try:
        git = Path(__file__).resolve().parent / ".git"
        head = (git / "HEAD").read_text().strip()
        return head if not head.startswith("ref: ") else (git / head[5:]).read_text().strip()
    except OSError:
        return None


def train(s, script, named, changed):
    keep_freed_memory()
    device = pick_device(s.device)
    say = lambda text: print(text, flush=True)
    out = Path(s.out)
    if s.data:
        images, labels, classes = load_images(s.data, s.image_size, script.conditional, s.skip_bad, say)
    else:
        images, labels, classes = synthetic_images(s.image_size, script.conditional)
    if script.conditional:
        if "n_classes" in named and s.n_classes != len(classes):
            raise UserError(f"--n-classes is {s.n_classes}, but {s.data or 'the synthetic set'} has {len(classes)} class folders: {', '.join(classes)}")
        s.n_classes = len(classes)
    if len(images) < s.batch_size:
        raise UserError(f"{s.data or 'the synthetic set'} has {len(images)} images, fewer than one batch (--batch-size {s.batch_size})")
    if s.epochs is not None:
        s.steps = max(1, math.ceil(s.epochs * len(images) / (s.batch_size * s.n_critic)))
    data = Data(images, labels, classes, s, device)
    trainer = Trainer(script, s, data, device)
    probe(script, s, trainer.groups[0])
    open_run(s, trainer, out)
    if trainer.step_count >= s.steps:
        say(f"Nothing to do: {out} is at step {trainer.step_count} of {s.steps}; raise --steps to train on.")
        return
    save_args(s, script, data, out)
    real_grid(trainer, out / "samples" / "real.png")

    count = lambda n: f"{sum(p.numel() for p in n.params) / 1e6:.2f} M"
    nets = trainer.groups[0].nets
    ring = f"{s.groups} {script.name} groups in a ring (rho {s.rho})" if s.groups > 1 else f"one {script.name} group, the baseline without connectors"
    source = f"{len(images)} images of {s.data}" if s.data else (
        f"{len(images)} SYNTHETIC images of concrete defects, drawn by crop_codebrim.py because no --data was given")
    text = (f"Training {ring}: generator {count(nets['G'])}, discriminator {count(nets['D'])} parameters"
            f"{', a connector like it' if s.groups > 1 else ''}, {s.image_size}x{s.image_size}, batch {s.batch_size}, on {source}"
            f"{f' in {len(classes)} classes' if classes else ''}. Device: {describe(device)}. Pictures every {s.sample_every} steps in "
            f"{out / 'samples'}/, log every {s.log_every} in {out / 'log.jsonl'}, checkpoint every {s.save_every}.")
    if changed:
        text += " --quick set " + ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in changed.items()) + "."
    if s.resume:
        text += f" Resumed at step {trainer.step_count}."
    if s.groups == 1:
        idle = sorted({"rho", "c_lr", "c_penalty", "c_aux"} & named)
        if idle:
            text += f" Note: {', '.join('--' + k.replace('_', '-') for k in idle)} without effect, one group has no connector."
    if s.groups > 1 and s.rho > 1:
        text += " Note: with rho above 1 it pays a generator to copy its neighbour rather than to follow the data."
    say(text)
    loop(trainer, s, out, say)


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


def loop(trainer, s, out, say):
    """Steps, with logs, pictures, checkpoints, and a way out that saves."""
    progress, begin, first = Progress(s.steps), time.monotonic(), trainer.step_count
    pending, told, steady = [], False, None
    with Stop() as stop, open(out / "log.jsonl", "ab") as log:
        while trainer.step_count < s.steps and not stop.signal:
            with calling(trainer.script, f"step {trainer.step_count + 1}"):
                losses = trainer.step()
            step, now = trainer.step_count, time.monotonic()
            timeout = s.max_seconds is not None and now - begin >= s.max_seconds
            last = step == s.steps or stop.signal or timeout
            due = {k: last or step % getattr(s, f"{k}_every") == 0 for k in ("log", "sample", "save")}
            pending.append((step, losses))
            if trainer.device.type == "cpu" or any(due.values()) or len(pending) >= 50:    # elsewhere a look costs a wait
                for at, values in pending:
                    bad = trainer.first_bad(values)
                    if bad:
                        kept = out / "checkpoint.pt"
                        raise UserError(f"step {at}: the loss of the {bad} is not finite; "
                                        f"{f'the last good state is in {kept}' if kept.exists() else 'there is no checkpoint yet'}. "
                                        "Lower rates (--g-lr, --d-lr, --c-lr) are the usual cure")
                pending = []
            if steady is None:
                steady = (step, now)                                # the first step also warms up
            elif not told and (now - steady[1] > 5 or step - steady[0] >= 20 or last):
                told = True
                per_step = (now - steady[1]) / (step - steady[0])
                text = f"One step takes {per_step:.3g} s here, so the {s.steps - step} steps to go take {span(per_step * (s.steps - step))}"
                if s.max_seconds and per_step * (s.steps - step) > s.max_seconds:
                    text += f", of which --max-seconds allows {span(s.max_seconds)}"
                text += "; Ctrl-C saves and --resume goes on."
                if not s.quick and trainer.device.type == "cpu":
                    text += " For a first look within minutes add --quick."
                progress.say(text)
            if due["log"]:
                rate = (step - first) * s.batch_size * s.groups / (now - begin)
                log.write(json.dumps(log_line(trainer, losses, now - begin, rate)).encode() + b"\n")
                log.flush()
            if due["sample"]:
                sample_grid(trainer, out / "samples" / f"step_{step:06d}.png")
            if due["save"]:
                save_checkpoint(trainer, out)
            progress(step, s, losses)
            if timeout:
                break
    step = trainer.step_count
    if stop.signal:
        progress.say(f"Stopped by {signal.Signals(stop.signal).name} at step {step}; saved in {out}. --resume goes on.")
        raise SystemExit(128 + stop.signal)
    if step < s.steps:
        progress.say(f"--max-seconds reached at step {step} of {s.steps}; saved in {out}. --resume goes on.")
    else:
        progress.say(f"Done: {step} steps in {span(time.monotonic() - begin)}. Look at {out / 'samples'}/; "
                     f"python okd_train.py --out {out} --sample 1000 writes images.")


# ---------------------------------------------------------------------------------------------- sampling
def sample(s, script):
    """N PNGs per group from the averaged generators: OUT/fakes/G1/000000.png, in class folders if conditional.

    z of an image depends on the run's seed, its class and its number alone, so the first images of --sample 100 are
    those of --sample 1000.
    """
    out = Path(s.out)
    saved = read_args(out)
    fakes, classes = out / "fakes", saved["classes"]
    if fakes.exists() and any(fakes.iterdir()):
        raise UserError(f"{fakes} is not empty; move it away first")
    device = pick_device(s.device)
    generators = [load_generator(out / f"G{i}.pt", device, str(script.path)) for i in range(1, s.groups + 1)]
    begin, rows = time.monotonic(), []
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:
        for i, G in enumerate(generators, 1):
            for c, name in enumerate(classes or [None]):
                n = s.sample // len(classes) + (c < s.sample % len(classes)) if classes else s.sample
                folder = fakes / f"G{i}" / (name or "")
                folder.mkdir(parents=True, exist_ok=True)
                jobs = []
                for k in range(0, n, CHUNK):
                    z = draw(s.seed, k // CHUNK, 0, f"sample {name or ''}", "normal", (CHUNK, s.z_dim))
                    images = generate(G, z, torch.full((CHUNK,), c) if classes else None)[:n - k]
                    for j, a in enumerate(images, k):
                        path = folder / f"{j:06d}.png"
                        jobs.append(pool.submit(Image.fromarray(a).save, path, compress_level=1))
                        rows.append((path.relative_to(fakes).as_posix(), f"G{i}", name or "", f"{s.seed}/{k // CHUNK}/{j % CHUNK}"))
                for job in jobs:
                    job.result()
    with replacing(fakes / "manifest.csv") as f:
        f.write(("file,group,class,z\n" + "".join(",".join(r) + "\n" for r in rows)).encode())
    print(f"{len(rows)} images in {fakes}/ ({span(time.monotonic() - begin)}).")


def main(argv=None):
    try:
        s, script, named = parse(sys.argv[1:] if argv is None else argv)
        changed = settle(s, script, named)
        if s.sample is not None:
            sample(s, script)
        else:
            train(s, script, named, changed)
    except UserError as e:
        print(f"okd_train.py: error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
