"""Train N GANs together by online knowledge distillation: a ring of groups (generator, discriminator, connector).

    python okd_train.py --model sagan --groups 3 --quick              # a first look in minutes: no GPU, no data needed
    torchrun okd_train.py --model sagan --groups 3 --data crops/      # the paper's run; plain python works too
    python okd_train.py --model acgan --groups 3 --data crops/        # class-conditional: a class is a folder in crops/
    python okd_train.py --model my_gan.py --groups 2 --data photos/   # any script with a Generator and a Discriminator
    python okd_train.py --out runs/sagan-3 --resume                   # go on where it stopped, bit for bit
    torchrun --nproc-per-node 8 okd_train.py --groups 8 ...           # 8 GPUs, a group on each
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 okd_train.py --groups 16 ...
                                                                      # 2 machines: the same line on both

Every group i has its own networks and its own order of the data. Its connector C_i is a second critic that scores the
images of the next group's generator as real and those of its own as fake; the generator answers to both:
    D_i: discriminator_loss(D_i, real_i, fake_i)
    C_i: connector_loss(C_i, fake_{i+1}, fake_i)                      # the last group looks at the first
    G_i: generator_loss(D_i, fake_i) + rho * generator_loss(C_i, fake_i)
All fakes of a step come from one z. Only images travel between groups, never a gradient.

A model script must offer Generator(z) -> (B, 3, H, W) in [-1, 1] and Discriminator(x) -> (B,); it may offer losses and
a flat dict hparams, whose keys become flags. The README has the whole contract.

The file, from top to bottom: settings, the ring and its step, networks, randomness, the model script, data, processes,
pictures, variety, the run folder, scores, settings from the command line, the loop, starting processes.
"""
import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import math
import os
import random
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
import traceback
import unicodedata
import uuid
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while torch is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.utils import parametrize

try:
    import fcntl
except ImportError:             # Windows: runs are not locked there
    fcntl = None

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

# --quick: the recipe "small" at 32x32, as many steps as some minutes allow. At this size a step costs the number of its
# operations, not their arithmetic, so a larger batch is nearly free. A script of one size only keeps its own.
QUICK = dict(image_size=32, max_seconds=270, sample_every=250, save_every=500)
SMALL = dict(ch=16, batch_size=16, g_lr=5e-4, d_lr=2e-3, c_lr=2.5e-4)       # "small" of scripts that bring no recipe

EMA = 0.999                     # of the generators; all that is looked at or scored comes from the average
NORM_CHUNKS = 4                 # of CHUNK fakes, for the averages' BatchNorm statistics; ten times more were no better
CHUNK = 50                      # images per forward when sampling: fixed, so that an image does not depend on how many
                                # are asked for
NORMS_TOGETHER = {"cuda"}       # devices on which a launch costs more than its work: spectral norms are made together
TIMEOUT = datetime.timedelta(minutes=10)    # after which a rank that waits for another to start gives up
PATIENCE = datetime.timedelta(days=1)       # the same later: one rank alone reads or scores; one that died is noticed
LATE = 5                        # seconds after which another rank than the first tells of its error, if it still runs
on_log = None                   # a function that is given every line (a dict) of log.jsonl and fid.jsonl; on rank 0


# ---------------------------------------------------------------------------------------------- the ring
def neighbour(i, n_groups):
    """The group whose images connector C_i sees as real. Groups count from 1. Another topology is another line here."""
    return i % n_groups + 1


# The losses of scripts that bring none; sagan.py and acgan.py bring their own.
def discriminator_loss(D, real, fake, y_real=None, y_fake=None, eps=None, lambda_gp=10.0):
    """WGAN-GP. real, fake (B, 3, H, W), fake detached; eps (B, 1, 1, 1) in [0, 1) -> (scalar, logs). See sagan.py."""
    s_real, s_fake = score(D, real, y_real), score(D, fake, y_fake)
    x = torch.lerp(fake, real, eps).requires_grad_()
    grad, = torch.autograd.grad(score(D, x, y_real).sum(), x, create_graph=True)
    norm = torch.linalg.vector_norm(grad.flatten(1), dim=1)         # gradient 0 at 0, where sqrt of a sum has NaN
    loss = s_fake.mean() - s_real.mean() + lambda_gp * (norm - 1).square().mean()
    return loss, {"w": (s_real.mean() - s_fake.mean()).detach(), "grad_norm": norm.detach().mean()}


def generator_loss(D, fake, y=None):
    """fake (B, 3, H, W) with its graph -> scalar."""
    return -score(D, fake, y).mean()


def score(D, x, y):
    out = D(x, y) if takes(D.forward, "y") else D(x)
    return (out[0] if isinstance(out, tuple) else out).flatten()


def with_logs(out):
    """What a loss returned, a scalar or (scalar, logs) -> (scalar, logs)."""
    return out if isinstance(out, tuple) else (out, {})


class Group:
    """Generator, discriminator and connector number i (from 1) with their optimisers, and the generator's average."""

    def __init__(self, i, script, s, device, ranks):
        self.i = i
        self.nets = {"G": Network("G", i, script, s, s.g_lr, device, ranks),
                     "D": Network("D", i, script, s, s.d_lr, device, ranks)}
        if s.groups > 1:                                            # one group alone has no neighbour
            self.nets["C"] = Network("C", i, script, s, s.c_lr, device, ranks)
        live = self.nets["G"].net
        self.ema = script.build("G", i, s, device).eval().requires_grad_(False)
        self.ema.load_state_dict(live.state_dict())
        self.averaged = list(self.ema.parameters()), list(live.parameters())

    @torch.no_grad()
    def average(self, pace):
        """Move the average by the share `pace` (0-d tensor) of its distance to the generator. Buffers are copied."""
        average, live = self.averaged
        torch._foreach_add_(average, torch._foreach_mul(torch._foreach_sub(live, average), pace))
        kept, new = list(self.ema.buffers()), list(self.nets["G"].net.buffers())    # now: a script may assign new ones
        if kept:
            torch._foreach_copy_(kept, new)

    def gammas(self):
        """{role: [gamma of each attention layer]}: every one-element parameter that is called gamma."""
        found = {role: [p.item() for name, p in n.net.named_parameters()
                        if name.split(".")[-1] == "gamma" and p.numel() == 1] for role, n in self.nets.items()}
        return {role: values for role, values in found.items() if values}


class Trainer:
    """The groups of this process and the one training step.

    A step is, for each of n_critic sub-steps: make_fakes, exchange, learn. They read the inputs (`given`) and nothing
    else that changes from step to step, so that a GPU can replay them from a recording (kernels/cuda_graph.py).
    """

    def __init__(self, script, s, data, device, ranks=None):
        self.script, self.s, self.data, self.device = script, s, data, device
        self.ranks = ranks or Ranks(s.groups, s.batch_size, device)
        losses = {"D": script.discriminator_loss, "C": script.connector_loss, "G": script.generator_loss}
        self.settings = {role: bind(f, vars(s)) for role, f in losses.items()}      # those that each loss names
        self.takes_eps = {role: takes(losses[role], "eps") for role in "DC"}
        self.groups = [Group(i, script, s, device, self.ranks) for i in self.ranks.mine]
        self.step_count = 0
        self.drew = False                                           # whether the script draws random numbers by itself
        self.bad = torch.zeros(len(self.groups), 3, dtype=torch.int64, device=device)   # when D, C, G was lost, or 0
        self.fakes, self.neighbours, self.losses = {}, {}, {}       # of the step that runs, by group
        self.images = {}                                            # fakes without graph, by sub-step and group
        cuda_graph = kernel("cuda_graph")
        if s.cuda_graph == "on" and not cuda_graph:
            raise UserError("--cuda-graph on needs kernels/cuda_graph.py beside okd_train.py")
        self.given = (cuda_graph or sys.modules[__name__]).Inputs(self.next_inputs(), device)
        self.use_given_rates()
        self.graph = None
        if cuda_graph and s.cuda_graph != "off":
            self.graph = self.step_graph(cuda_graph)

    def step(self):
        """One step of every group -> {i: {"d": (loss, logs), "c": ..., "g": ...}}, tensors that the next overwrites."""
        self.launches_are_free(bool(self.graph) and not self.graph.why)
        self.given.put(self.next_inputs())
        if self.graph:
            self.graph.step(key=bool(self.s.rho))                   # with rho 0 a step launches other kernels
        else:
            self.eager()
        self.step_count += 1
        return self.losses

    def parts(self):
        """The step as [(part, whether it runs on the host, between two graphs)]."""
        parts = []
        for sub in range(self.s.n_critic):
            parts.append((functools.partial(self.make_fakes, sub), False))
            if self.s.groups > 1:
                parts.append((functools.partial(self.exchange, sub), self.ranks.world > 1))
            parts.append((functools.partial(self.learn, sub), False))
        return parts

    def eager(self):
        for part, _ in self.parts():
            part()

    def make_fakes(self, sub):
        """First half of a sub-step: every group's fakes from one z. The last sub-step keeps the generators' graph."""
        last = sub == self.s.n_critic - 1
        for g in self.groups:
            still = contextlib.nullcontext() if last else g.nets["G"].frozen()
            with self.lane(g.i), still, torch.set_grad_enabled(last):
                self.fakes[g.i] = self.generate(g, sub)
        self.join()
        self.images[sub] = {i: self.arrange(x.detach()) for i, x in self.fakes.items()}

    def exchange(self, sub):
        """neighbours[i] becomes the images that C_i sees as real. Between processes they travel between the halves."""
        received = self.ranks.exchange(self.images[sub])
        if self.ranks.world == 1:
            self.neighbours = received
            return
        for i, x in received.items():
            if i not in self.neighbours:
                self.neighbours[i] = torch.empty_like(self.images[sub][i])
            self.neighbours[i].copy_(x)                             # a fixed place, which a recording can read

    def learn(self, sub):
        """Second half of a sub-step: every D and C learns; in the last sub-step every G, and its average moves."""
        d, last = self.given.plan[sub], sub == self.s.n_critic - 1
        self.losses = {g.i: {} for g in self.groups}
        for g in self.groups:
            losses = self.losses[g.i]
            with self.lane(g.i):
                idx = d["idx", g.i]
                real = self.arrange(self.data.batch(idx, d.get(("flip", g.i)), d.get(("upend", g.i))))
                y_real = self.data.labels[idx] if self.script.conditional else None
                losses["d"] = self.learn_critic(g, "D", sub, real, self.images[sub][g.i], y_real)
            if "C" in g.nets:
                with self.lane((g.i, "C")):
                    neighbours = self.neighbours[g.i]
                    losses["c"] = self.learn_critic(g, "C", sub, neighbours, self.images[sub][g.i], d.get("y"))
            if last:
                with self.lane(g.i, after=[(g.i, "C")] if "C" in g.nets else []):
                    losses["g"] = self.learn_generator(g, sub)
                    g.average(self.given.plan[0]["pace"])
        self.join()
        if last:
            self.note_lost()

    def generate(self, g, sub):
        """A group's fakes (B, 3, H, W) float32, with their graph where gradients are on."""
        d, n = self.given.plan[sub], g.nets["G"]
        args = (d["z"], d["y"]) if self.script.conditional else (d["z"],)
        with self.seeded(g, sub, "G"), n.normed(), self.autocast(n):
            return n.net(*args).float()

    def learn_critic(self, g, role, sub, real, fake, y_real):
        """One update of a discriminator ("D") or a connector ("C"). real: what counts as real; both without a graph."""
        d, n = self.given.plan[sub], g.nets[role]
        f = self.script.discriminator_loss if role == "D" else self.script.connector_loss
        labels = (y_real, d["y"]) if self.script.conditional else ()
        eps = {"eps": d[role, g.i]} if self.takes_eps[role] else {}

        def loss():
            with self.autocast(n, enabled=self.script.autocast):
                return f(n.net, real, fake, *labels, **self.settings[role], **eps)
        with self.seeded(g, sub, role):
            return n.step(loss)

    def learn_generator(self, g, sub):
        """One update of a generator against its frozen critics, by D's judgement and rho times C's."""
        rho, fake = self.given.plan[0]["rho"], self.fakes.pop(g.i)
        labels = (self.given.plan[sub]["y"],) if self.script.conditional else ()
        critics = [g.nets[role] for role in "DC" if role in g.nets]

        def judged(role):
            with self.seeded(g, sub, f"G {role}"), self.autocast(g.nets[role], enabled=self.script.autocast):
                return with_logs(self.script.generator_loss(g.nets[role].net, fake, *labels, **self.settings["G"]))

        def loss():
            value, logs = judged("D")
            if "C" in g.nets and self.s.rho:                        # a connector of weight 0 is not asked
                c_value, c_logs = judged("C")
                value = value + rho * c_value
                logs = {**logs, **{f"c_{k}": v for k, v in c_logs.items()}}
            return value, logs
        with contextlib.ExitStack() as stack:
            for n in critics:
                stack.enter_context(n.frozen())
            return g.nets["G"].step(loss)

    # ------------------------------------------------------------------------------------------ what the step stands on
    def next_inputs(self):
        """All that the next step reads besides its networks: for each of n_critic sub-steps a dict of CPU tensors.

        Keys: z, y, and per group i ("idx", i), ("flip", i), ("upend", i), ("D", i), ("C", i), all drawn; the first dict
        also holds the step's scalars: step (its number, from 1), rho, g_lr, d_lr, c_lr, and pace, by which the averages
        move.
        """
        s, ranks, plan = self.s, self.ranks, []
        B = s.batch_size
        for sub in range(s.n_critic):
            number = self.step_count * s.n_critic + sub
            d = {"z": draw(s.seed, number, 0, "z", "normal", (B, s.z_dim))}         # one z for all groups
            if self.script.conditional:
                d["y"] = draw(s.seed, number, 0, "y", s.n_classes, (B,))
            for g in self.groups:
                d["idx", g.i] = self.data.indices(number, g.i)
                if s.flip:
                    d["flip", g.i] = draw(s.seed, number, g.i, "flip", "uniform", (B, 1, 1, 1))
                if s.flip_vertical:
                    d["upend", g.i] = draw(s.seed, number, g.i, "upend", "uniform", (B, 1, 1, 1))
                for role in "DC":
                    if role in g.nets and self.takes_eps[role]:
                        d[role, g.i] = draw(s.seed, number, g.i, f"eps {role}", "uniform", (B, 1, 1, 1))
            plan.append({k: v[ranks.low:ranks.high] for k, v in d.items()} if ranks.replicas > 1 else d)
        step = self.step_count
        kind = torch.float32 if self.device.type == "cuda" else torch.float64       # what fused Adam reads there
        for rate in ("g_lr", "d_lr", "c_lr"):
            plan[0][rate] = torch.tensor(getattr(s, rate), dtype=kind)              # a schedule multiplies here
        pace = 1 - min(EMA, (1 + step) / (10 + step))               # the average warms up
        plan[0].update(step=torch.tensor(step + 1), rho=torch.tensor(s.rho), pace=torch.tensor(pace))
        return plan

    def use_given_rates(self):
        """Let the optimisers read their rates at the inputs' fixed places: a recorded step then sees them change."""
        for g in self.groups:
            for role, n in g.nets.items():
                n.opt.param_groups[0]["lr"] = self.given.plan[0][f"{role.lower()}_lr"]

    def arrange(self, images):
        return images.contiguous(memory_format=self.script.layout(self.device))

    def lane(self, name, after=()):
        """Where the networks of one group run side by side with those of others; see kernels/cuda_graph.py."""
        return self.graph.lanes(name, after) if self.graph else contextlib.nullcontext()

    def join(self):
        if self.graph:
            self.graph.lanes.join()

    @contextlib.contextmanager
    def autocast(self, network, enabled=True):
        """bf16 inside, if the run wants it; normed weights are made before, in fp32."""
        enabled = enabled and self.s.precision == "bf16"
        if enabled:
            network.refresh()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            yield

    @contextlib.contextmanager
    def seeded(self, g, sub, purpose):
        """Inside, what a script draws by itself is a function of the step, and another one on each rank of a group.

        A recorded step cannot be seeded, so the first steps note whether the script draws at all.
        """
        if self.graph and self.graph.capturing:
            yield
            return
        part = f" part {self.ranks.part}" if self.ranks.part else ""
        seed_torch(self.s.seed, self.step_count * self.s.n_critic + sub, g.i, f"call {purpose}{part}")
        before = self.random_states() if self.graph and self.graph.warming else None
        yield
        self.drew |= before is not None and before != self.random_states()

    def random_states(self):
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        _, words, place, *_ = np.random.get_state()
        states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *on_gpu)]
        return states, random.getstate(), words.tobytes(), place

    def note_lost(self):
        """Keep in `bad` at which step each loss was first not finite, without waiting for the device."""
        zero = torch.zeros((), device=self.device)
        losses = [self.losses[g.i].get(role, (zero, {}))[0].float() for g in self.groups for role in "dcg"]
        lost = ~torch.isfinite(torch.stack(losses)).view_as(self.bad)
        self.bad.copy_(torch.where((self.bad == 0) & lost, self.given.plan[0]["step"], self.bad))

    def first_bad(self):
        """(step, network) of the first loss of this process that was not finite, or None. Waits for the device."""
        bad = self.bad.cpu()
        if not bad.any():
            return None
        step = bad[bad > 0].min().item()
        k, role = (bad == step).nonzero()[0].tolist()
        return step, f"{ROLES['dcg'[role]]} of group {self.groups[k].i}"

    def step_graph(self, cuda_graph):
        """The recorder of this step. All processes capture or none, as a replay exchanges images with theirs."""
        return cuda_graph.StepGraph(
            self.parts(), self.moving, self.moments, self.obstacle, self.stay_eager, first=self.ranks.first,
            largest=lambda number: max(self.ranks.everyone(number)),
            explain=lambda error: where(error, self.script.path), cuda=self.device.type == "cuda")

    def obstacle(self):
        """Why this step cannot be captured; None if it can be tried."""
        if self.ranks.world > self.ranks.n_groups:     # also on a rank that has its group alone
            return "several processes share a group's batch"
        if self.ranks.staged:
            return "two processes share a GPU"
        if self.drew:
            return f"{self.script.path.name} draws random numbers by itself"
        if self.device.type != "cuda":
            return f"the device is {self.device.type}"
        return None

    def launches_are_free(self, on):
        """Attention is by Triton at any size where a replay launches it; only large ones are where Python does."""
        if attention := kernel("attention"):
            attention.LAUNCHES_ARE_FREE = on

    def stay_eager(self, why):
        self.launches_are_free(False)
        if self.s.cuda_graph == "on":
            raise UserError(f"--cuda-graph on: {why}; auto falls back to eager steps")
        for g in self.groups:
            for n in g.nets.values():
                n.opt.zero_grad(set_to_none=True)                   # a failed capture may have left some

    @property
    def graph_note(self):
        """How steps run, in words, once it is decided; else None."""
        if self.graph and self.graph.why:
            return f"Steps run eagerly, without a CUDA graph: {self.graph.why}."
        if self.graph and self.graph.graphs:
            n = len(self.graph.graphs)
            return f"Steps run as {n} CUDA graph{'s' if n > 1 else ''}, found equal to an eager step."
        return None

    def moving(self):
        """Every tensor that a step changes."""
        tensors = [self.bad]
        for g in self.groups:
            for net in (g.ema, *(n.net for n in g.nets.values())):
                tensors += [*net.parameters(), *net.buffers()]
            for n in g.nets.values():
                tensors += [v for state in n.opt.state.values() for v in state.values()]
        return tensors

    def moments(self):
        """Adam's first moments of each network (with beta1 = 0 the gradients) in one vector."""
        return [torch.cat([state["exp_avg"].flatten() for state in n.opt.state.values()])
                for g in self.groups for n in g.nets.values()]

    def state(self):
        """The content of checkpoint.pt, plain tensors and dicts on the CPU, on rank 0; None elsewhere."""
        mine = {}
        for g in self.groups:
            nets = {role: {"net": n.net.state_dict(), "opt": n.opt.state_dict()["state"]} for role, n in g.nets.items()}
            mine[g.i] = {"ema": g.ema.state_dict(), **nets}
        groups = self.ranks.collect(on_cpu(mine))
        return groups and {"format": FORMAT, "step": self.step_count, "groups": [groups[i] for i in sorted(groups)]}

    def load_state(self, states, step):
        """states: {i: what state() has of group i}."""
        for g in self.groups:
            saved = states[g.i]
            g.ema.load_state_dict(saved["ema"])
            for role, n in g.nets.items():
                n.net.load_state_dict(saved[role]["net"])
                n.opt.load_state_dict({"state": saved[role]["opt"], "param_groups": n.opt.state_dict()["param_groups"]})
                for p, moments in n.opt.state.items():      # from a device with another layout perhaps
                    for k in ("exp_avg", "exp_avg_sq"):
                        moments[k] = torch.empty_like(p).copy_(moments[k])
        self.use_given_rates()
        self.step_count = step
        if self.graph:
            self.graph.drop()                                       # it moves the optimisers' old tensors


class Inputs:
    """The step's inputs where kernels/cuda_graph.py, whose class sends them in one copy, was not copied along."""

    def __init__(self, plan, device):
        self.plan = [{k: v.to(device, copy=True) for k, v in values.items()} for values in plan]

    def put(self, plan):
        for places, values in zip(self.plan, plan):
            for k, v in values.items():
                places[k].copy_(v)


# ---------------------------------------------------------------------------------------------- networks
class Network:
    """A network with its optimiser, and what must be held still while only its input gradient is wanted."""

    def __init__(self, role, i, script, s, lr, device, ranks):
        self.net = net = script.build(role, i, s, device).train()
        self.ranks = ranks if ranks.replicas > 1 else None
        self.params = [p for p in net.parameters() if p.requires_grad]
        if not self.params:
            raise UserError(f"{script.path}: {type(net).__name__} has no trainable parameter")
        if role != "G" and kernel("convolution"):
            kernel("convolution").fast_second_derivative(net)
        betas, cuda = (s.beta1, s.beta2), self.params[0].is_cuda
        self.opt = torch.optim.Adam(self.params, lr=lr, betas=betas, fused=True, capturable=cuda)
        self.opt._warned_capturable_if_run_uncaptured = True        # no warning: the first steps must run uncaptured
        self.parametrized = [(m, name) for m in net.modules() if parametrize.is_parametrized(m)
                             for name in m.parametrizations]
        self.parametrizations = [p for m, name in self.parametrized for p in m.parametrizations[name]]
        batch_norm = torch.nn.modules.batchnorm._BatchNorm
        self.norms = [m for m in net.modules() if isinstance(m, batch_norm) and m.track_running_stats]
        if self.ranks:
            for m in self.norms:
                m.forward = functools.partial(whole_batch_norm, m, ranks.peers)
        handled = {id(b) for m in self.parametrizations + self.norms for b in m.buffers()}
        self.others = [(m, name) for m in net.modules() for name, b in m.named_buffers(recurse=False)
                       if id(b) not in handled]
        self.still = [p for p in net.parameters() if not p.requires_grad]
        together = device.type in NORMS_TOGETHER and kernel("spectral_norm")
        self.normed = together.SpectralNorms(net) if together else parametrize.cached

    @contextlib.contextmanager
    def frozen(self):
        """Inside: no weight gradient, no power iteration, BatchNorm on batch statistics; nothing moves."""
        def let_move(on):
            for p in self.params:
                p.requires_grad_(on)
            for m in self.parametrizations:
                m.training = on
            for m in self.norms:
                m.track_running_stats = on      # without: the batch, and buffers stay
        others = [getattr(m, name) for m, name in self.others] + self.still
        kept = [b.detach().clone() for b in others]                 # e.g. the u of a spectral norm written by hand
        let_move(False)
        try:
            with self.normed():
                yield
        finally:
            let_move(True)
            with torch.no_grad():
                for b, old in zip(others, kept):
                    b.copy_(old)
                for (m, name), b in zip(self.others, others):
                    setattr(m, name, b)                             # of a script that assigns a new tensor

    def step(self, loss):
        """loss: a function -> scalar, (scalar, logs). One joint backward, one optimiser step -> (loss, logs), detached.

        normed(): every use of a spectrally normed weight in this update sees one power iteration, and it is left before
        the optimiser moves the weights.
        """
        with self.normed():
            value, logs = with_logs(loss())
            weighted = value * self.ranks.share if self.ranks else value    # shares' means add up to the batch's
            weighted.backward(inputs=self.params)                   # not into the penalty's images
        if self.ranks:
            self.ranks.sum_gradients(self.params)
        for p in self.params:                                       # fused Adam trusts that all is laid out alike
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)                        # a gradient is not needed between steps
        return value.detach(), {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in logs.items()}

    def refresh(self):
        """Make the parametrized weights of this update; under normed() every later use finds these."""
        for m, name in self.parametrized:
            getattr(m, name)


def on_cpu(state):
    """Nested dicts with their tensors on the CPU: from cuda:3 they would be loaded on cuda:3 wherever that is."""
    if isinstance(state, dict):
        new = copy.copy(state)                                      # with the versions that torch notes on a state_dict
        new.update((k, on_cpu(v)) for k, v in state.items())
        return new
    return state.cpu() if isinstance(state, torch.Tensor) else state


# ---------------------------------------------------------------------------------------------- randomness
def draw(seed, step, group, purpose, kind, shape=()):
    """Random numbers as a function of (seed, step, group, purpose): the only source of chance of a run.

    kind "normal" -> float32 N(0, 1); "uniform" -> float32 in [0, 1); an int n -> int64 in [0, n); "permutation" ->
    int64 permutation of range(shape). Returns a CPU tensor of `shape`. group 0 is what all groups share; groups count
    from 1.
    """
    r = np.random.Generator(np.random.Philox(key=key(seed, step, group, purpose, 16)))
    if kind == "normal":
        a = r.standard_normal(shape, dtype=np.float32)
    elif kind == "uniform":
        a = r.random(shape, dtype=np.float32)
    elif kind == "permutation":
        a = r.permutation(shape)
    else:
        a = r.integers(kind, size=shape, dtype=np.int64)
    return torch.from_numpy(np.asarray(a))


def key(seed, step, group, purpose, n_bytes):
    """A key of n_bytes for one purpose; keys of different purposes have nothing in common."""
    name = f"{seed}/{step}/{group}/{purpose}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=n_bytes).digest(), "little")


def seed_torch(seed, step, group, purpose):
    """Seed torch, random and numpy before a call into a script, which may draw by itself (dropout, initial weights)."""
    number = key(seed, step, group, purpose, 8) >> 1
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2 ** 32)


# ---------------------------------------------------------------------------------------------- the model script
class Script:
    """A loaded model script: its two classes, its losses (or ours) and its hyper-parameters.

    A setting reaches every constructor and loss that names it as a parameter. n_classes in hparams makes a script
    class-conditional. Losses see detached images, critics are frozen while the generator learns, and whatever a script
    draws by itself (dropout, random, numpy) is seeded, so that --resume stays exact. autocast = True: the losses may
    run under autocast with --precision bf16 and switch it off around a penalty; without it only the generator does.
    channels_last = True: layers take weights and images in that memory layout (no .view of them), which is quicker.
    """

    def __init__(self, model, named_by=None):
        self.path = find_script(model)
        self.name = self.path.stem
        foreign = named_by and self.path.parent != Path(__file__).resolve().parent
        if foreign and rank_here() == 0 and OUTER not in os.environ:
            print(f"Running the model script {one_line(self.path)}, which {one_line(named_by)} names.", flush=True)
        module = self.load()
        for name in ("Generator", "Discriminator"):
            cls = getattr(module, name, None)
            self.must(inspect.isclass(cls), f" has no class {name}; a model script needs Generator and Discriminator")
            self.must(issubclass(cls, torch.nn.Module), f": {name} is no torch.nn.Module")
        self.Generator, self.Discriminator = module.Generator, module.Discriminator
        self.discriminator_loss = getattr(module, "discriminator_loss", discriminator_loss)
        self.generator_loss = getattr(module, "generator_loss", generator_loss)
        self.connector_loss = getattr(module, "connector_loss", self.discriminator_loss)
        for name in ("discriminator_loss", "generator_loss", "connector_loss"):
            f = getattr(self, name)
            self.must(callable(f), f": {name} is a {type(f).__name__}; it must be a function")
        own = getattr(module, "hparams", {})
        self.must(isinstance(own, dict), f": hparams is a {type(own).__name__}; it must be a flat dict")
        self.conditional = "n_classes" in own
        self.autocast = bool(getattr(module, "autocast", False))    # its losses keep the penalty out of bf16
        self.channels_last = bool(getattr(module, "channels_last", False))      # its layers take either memory layout
        self.hparams = self.checked(own)
        self.recipes = self.checked_recipes(getattr(module, "recipes", {}), own)

    def load(self):
        name = f"{self.name} "                                      # the blank: it hides no module of that name
        spec = importlib.util.spec_from_file_location(name, self.path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module                                  # dataclasses and pickle look their module up
        sys.path.insert(0, str(self.path.parent))
        try:
            spec.loader.exec_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as e:                                  # SystemExit, or what the script invents
            raise UserError(f"{self.path} cannot be loaded: {where(e, self.path)}") from e
        finally:
            sys.path.remove(str(self.path.parent))
        return module

    def must(self, holds, complaint):
        if not holds:
            raise UserError(f"{self.path}{complaint}")

    def checked_recipes(self, recipes, own):
        """{name of a recipe: {hparam: value}}, checked like hparams."""
        plain = isinstance(recipes, dict) and all(isinstance(recipe, dict) for recipe in recipes.values())
        self.must(plain, ": recipes must be a dict of dicts: {name: {hparam: value}}")
        checked = {}
        for name, recipe in recipes.items():
            switches = recipe.keys() & {"flip", "flip_vertical", "balance"}
            strange = recipe.keys() - self.hparams.keys() - switches
            self.must(not strange, f": recipes[{name!r}] sets {', '.join(map(str, strange))}, no key of hparams")
            for k in switches:
                entry = f": recipes[{name!r}]: {k} is {recipe[k]!r}; "
                self.must(recipe[k] in (True, False), entry + "it must be True or False")
            rest = {k: v for k, v in recipe.items() if k not in switches}
            whole = self.checked({**own, **rest}, f"recipes[{name!r}]")
            checked[name] = {k: whole.get(k, recipe[k]) for k in recipe}
        return checked

    def checked(self, own, called="hparams"):
        """The script's hparams over the trainer's, in the trainer's types; UserError for what is no setting."""
        callables = (self.Generator, self.Discriminator,
                     self.discriminator_loss, self.generator_loss, self.connector_loss)
        read = {name for f in callables for name in inspect.signature(f).parameters}
        read |= TRAINER_HPARAMS.keys() | {"n_classes"}
        hparams = {k: v for k, v in {**TRAINER_HPARAMS, **OWN_LOSS_HPARAMS}.items() if k in read}
        for name, value in own.items():
            entry = f": {called}[{name!r}] = {value!r}; "
            plain = isinstance(name, str) and name.isidentifier() and isinstance(value, (bool, int, float, str))
            self.must(plain, entry + "keys are names, values bool, int, float or str")
            self.must(not isinstance(value, float) or math.isfinite(value), entry + "it must be finite")
            kind = type(TRAINER_HPARAMS.get(name, 0 if name == "n_classes" else value))
            fits = kind not in (int, float) or type(value) in (int, kind)
            self.must(fits, entry + f"it must be a {'whole ' if kind is int else ''}number")
            self.must(name != "eps", ": hparams has 'eps', by which name losses are given their uniforms")
            self.must(name in read, f": hparams has {name!r}, but no constructor and no loss of the script names it")
            hparams[name] = float(value) if isinstance(value, float) or kind is float else value
        return hparams

    def build(self, role, i, s, device):
        """A new network of group i, "G", "D" or "C", with the initial weights of this seed."""
        cls = self.Generator if role == "G" else self.Discriminator
        settings = bind(cls, vars(s))
        seed_torch(s.seed, 0, i, f"init {role}")
        with calling(self, f"{cls.__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"):
            return cls(**settings).to(device, memory_format=self.layout(device))

    def layout(self, device):
        """The memory format of weights and images on `device`: channels_last where it was measured to win."""
        wins = self.channels_last and device.type in ("cpu", "cuda")
        return torch.channels_last if wins else torch.contiguous_format


def find_script(model):
    """sagan -> ./sagan.py, else sagan.py beside this file; a path to a .py file -> that file."""
    tried = [Path(f"{model}.py"), Path(__file__).resolve().parent / f"{model}.py"]
    if model.endswith(".py") or os.sep in model:
        tried = [Path(model)]
    for path in tried:
        if path.suffix == ".py" and path.is_file():
            return path.resolve()
    raise UserError(f"no model script {model!r}: looked for {' and '.join(map(str, tried))}")


def takes(f, name):
    """Whether `f` has a parameter of that name."""
    return name in inspect.signature(f).parameters


def bind(f, settings):
    """The settings that `f` has parameters for, as a dict of keywords."""
    return {k: settings[k] for k in inspect.signature(f).parameters if k in settings}


def where(error, path):
    """'line N: Type: message' of the deepest frame of `error` inside the file `path`."""
    if isinstance(error, SyntaxError):
        return f"{f'line {error.lineno}: ' if error.lineno else ''}SyntaxError: {error.msg}"
    lines = [n for frame, n in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    return f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def calling(script, what):
    """Turn an exception out of the model script into one line that says what was asked of it."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        text = where(e, script.path)
        if dist.is_initialized() and isinstance(e, RuntimeError) and not text.startswith("line "):
            raise                                                   # not the script's doing: another rank is gone
        raise UserError(f"{script.path}: {what} failed: {text}") from e


def probe(script, s, group):
    """Run one group's networks and losses on two samples, put everything back, and say what has a wrong shape."""
    device = next(group.ema.parameters()).device
    z, y = torch.zeros(2, s.z_dim, device=device), (torch.zeros(2, dtype=torch.long, device=device),)
    labels = y if script.conditional else ()
    shape = lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    asked = f"z (2, {s.z_dim})"
    with torch.no_grad(), calling(script, f"Generator called with {asked}{' and y (2,)' if labels else ''}"):
        x = group.ema(z, *labels)
    size = (2, 3, s.image_size, s.image_size)
    script.must(shape(x) == size,
                f": Generator returned {shape(x)} for {asked}; expected {size} (--image-size {s.image_size})")
    D = group.nets["D"].net
    script.must(all(isinstance(v, torch.Tensor) for n in group.nets.values() for v in n.net.state_dict().values()),
                ": state_dict holds what is no tensor (get_extra_state); keep state in buffers")
    before = {k: v.clone() for k, v in D.state_dict().items()}
    takes_y = script.conditional and takes(D.forward, "y")
    with torch.no_grad(), calling(script, f"Discriminator called with images {size}{' and y (2,)' if takes_y else ''}"):
        out = D(x, *(y if takes_y else ()))
    out = out[0] if isinstance(out, tuple) and out else out
    script.must(shape(out) in {(2,), (2, 1), (2, 1, 1, 1)},
                f": Discriminator returned {shape(out)} for images {size}; "
                "expected scores (2,), (2, 1) or (2, 1, 1, 1), or a tuple that begins with them")
    settings = {**vars(s), "eps": torch.full((2, 1, 1, 1), 0.5, device=device)}
    of_critic = (x + 0.1, x, *labels * 2)
    for name in ("discriminator_loss", "connector_loss", "generator_loss"):
        f, args = getattr(script, name), (x, *labels) if name == "generator_loss" else of_critic
        with calling(script, f"{name} on two samples"):
            value = f(D, *args, **bind(f, settings))
        value, logs = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
        script.must(shape(value) == () and value.requires_grad and isinstance(logs, dict),
                    f": {name} returned {shape(value)}; expected a scalar with a gradient, or (scalar, dict)")
        for k, v in logs.items():
            number = isinstance(v, (int, float)) or isinstance(v, torch.Tensor) and v.numel() == 1
            script.must(number, f": {name} logs {k!r}, which is no number but {shape(v)}")
            script.must(k != "loss", f": {name} logs 'loss', a name that is taken by what it returns")
    made = ", ".join(D.state_dict().keys() - before.keys())
    script.must(not made, f": Discriminator made {made} when it was called; make it in __init__")
    D.load_state_dict(before)


# ---------------------------------------------------------------------------------------------- data
class Data:
    """The whole data set as uint8 on the training device, and the order in which each group sees it."""

    def __init__(self, images, labels, classes, s, device):
        self.images, self.labels, self.classes = images.to(device), labels.to(device), classes
        whole = hashlib.blake2b(images.numpy(), digest_size=16)     # no copy of what may be gigabytes
        whole.update(labels.numpy())
        self.digest = whole.hexdigest()
        self.s, self.order = s, functools.lru_cache(2 * s.groups)(self.drawn_order)     # this epoch's and the last
        own = [torch.nonzero(labels == c)[:, 0] for c in range(len(classes))] if s.balance else []
        own = [indices for indices in own if len(indices)]          # a class may have nothing but unreadable files
        self.of_class = own if len(set(map(len, own))) > 1 else []
        self.shown = len(own) * max(map(len, own)) if self.of_class else len(images)            # images in an epoch

    def batch(self, idx, flip=None, upend=None):
        """idx (B,) -> float images (B, 3, H, W) in [-1, 1]; flip, upend (B, 1, 1, 1) of uniforms, or None."""
        return augment(self.images[idx].float().div_(127.5).sub_(1), flip, upend)

    def indices(self, batch, group):
        """Indices (B,) of a group's batch number `batch`: one epoch after the other, each in an order of its own."""
        size = self.s.batch_size
        places = np.arange(batch * size, (batch + 1) * size)
        epochs = range(places[0] // self.shown, places[-1] // self.shown + 1)
        return torch.cat([self.order(e, group)[torch.from_numpy(places[places // self.shown == e] % self.shown)]
                          for e in epochs])

    def drawn_order(self, epoch, group):
        """Every image once; with --balance every class as often as the largest, so images of small ones repeatedly."""
        seed, whole = self.s.seed, torch.arange(len(self.images))
        if self.of_class:
            mixed = [own[draw(seed, epoch, group, f"order of class {c}", "permutation", len(own))]
                     for c, own in enumerate(self.of_class)]
            most = max(map(len, mixed))
            whole = torch.cat([own[torch.arange(most) % len(own)] for own in mixed])
        return whole[draw(seed, epoch, group, "order", "permutation", len(whole))]


def augment(x, flip, upend):
    """Real images (B, 3, H, W) in [-1, 1], mirrored left to right where the uniform in flip (B, 1, 1, 1) is below 0.5.

    upend: likewise, top to bottom. Both are None without their flag. Further random numbers come from
    Trainer.next_inputs.
    """
    for uniform, axis in ((flip, 3), (upend, 2)):
        if uniform is not None:
            x = torch.where(uniform < 0.5, x.flip(axis), x)
    return x


def load_data(s, conditional, say):
    """--data, or the built-in set -> images uint8 (n, 3, size, size), labels int64 (n,), classes (see load_folder)."""
    if s.data:
        *loaded, limits = read_folder(s.data, s.image_size, conditional, s.skip_bad, say, s.range, s.upright)
        s.range = limits and list(limits)               # kept with the run: scores and --resume read by the same rule
        return tuple(loaded)
    try:
        synthetic = beside("synthetic", "training without --data")
    except ImportError as e:                                        # it needs another file itself
        raise UserError(str(e)) from e
    images, labels, classes = synthetic.synthetic(500, s.image_size, 0)
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return images, torch.from_numpy(np.asarray(labels, np.int64)), list(classes) if conditional else []


def load_folder(*args, **kwargs):
    """What read_folder() does, without the range."""
    return read_folder(*args, **kwargs)[:3]


def read_folder(folder, size, conditional, skip_bad, say, limits=None, upright=False):
    """Decode a folder once -> images uint8 (n, 3, size, size), labels int64 (n,), class names, range.

    The names are sorted, and [] unless conditional. limits, the range and upright: as fid.rule_for(). say(text) is told
    what was resized or skipped, and what is odd. UserError names every bad file, or what is wrong with the classes.
    """
    fid = beside("fid", "reading images")
    files, classes = class_files(folder, conditional, say)
    try:
        rule = fid.rule_for([path for path, _ in files], limits and tuple(limits), upright)
    except fid.FidError as e:
        raise UserError(f"--data {folder}: {e}") from None
    try:
        images = np.empty((len(files), 3, size, size), np.uint8)
    except MemoryError:
        gigabytes = len(files) * 3 * size ** 2 / 2 ** 30
        raise UserError(f"--data {folder}: {len(files)} images of {size}x{size} need {gigabytes:.0f} GB of memory; "
                        "a smaller --image-size needs less") from None

    def one(k):
        try:
            images[k], odd = fid.read_square(files[k][0], size, rule)
            return odd
        except fid.FidError as e:
            return str(e)

    results = []
    with (ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # Pillow decodes outside the interpreter's lock
          fid.Progress(f"reading {folder}", len(files), short=False) as progress):
        for k in range(0, len(files), 1000):                        # the pool's queue costs 2 kB an entry
            for result in pool.map(one, range(k, min(k + 1000, len(files)))):
                results.append(result)
                progress(len(results))
    labels = np.array([classes.index(c) if conditional else 0 for _, c in files], np.int64)
    bad = [r for r in results if isinstance(r, str)]
    if bad:
        if not skip_bad:
            raise UserError(f"{len(bad)} of {len(files)} images cannot be read: {first_of(bad)}. "
                            "Mend or remove them, or pass --skip-bad")
        say(f"Skipped {len(bad)} unreadable images: {first_of(bad)}.")
        good = [k for k, r in enumerate(results) if not isinstance(r, str)]
        images, labels = images[good], labels[good]
        empty = [name for k, name in enumerate(classes) if k not in labels]
        if empty:
            raise UserError(f"--data {folder}: no image of {', '.join(empty)} can be read: mend them, or take the "
                            "class folder away")
    odds = [r for r in results if isinstance(r, dict)]
    resized = sum("resized" in odd for odd in odds)
    if resized:
        say(f"{resized} of {len(images)} images were cut to their centre square and resized to {size}x{size}.")
    for note in fid.rule_notes(rule, odds):
        say(f"{folder}: {note}.")
    return torch.from_numpy(images), torch.from_numpy(labels), classes, rule.limits


def first_of(complaints, most=20):
    """The first of these in one line, and the name of a new file with all of them where they are more."""
    if len(complaints) <= most:
        return "; ".join(complaints)
    with tempfile.NamedTemporaryFile("w", prefix="unreadable_", suffix=".txt", delete=False, encoding="utf-8") as f:
        f.write("".join(one_line(text) + "\n" for text in complaints))
    return f"{'; '.join(complaints[:most])}; and so on, all are in {f.name}"


def class_files(folder, conditional, say=None):
    """All images below `folder` as [(path, class or None)], and the sorted classes ([] if none are needed)."""
    fid = beside("fid", "reading images")
    try:
        files = fid.class_images(folder, say)
    except fid.FidError as e:
        raise UserError(f"--data {e}") from None
    if not conditional:
        return files, []
    classes, loose = sorted({c for _, c in files if c}), [path for path, c in files if c is None]
    if loose:
        raise UserError(f"--data {folder}: {len(loose)} images outside class folders, such as {loose[0]}; "
                        "a class-conditional model takes its labels from folders")
    if len(classes) < 2:
        raise UserError(f"--data {folder}: one class folder only ({classes[0]}); "
                        "a class-conditional model needs two or more")
    return files, classes


def shared_data(s, script, named, device, ranks, say):
    """The data set on every rank: one rank of each machine decodes it, the others of that machine receive it."""
    loaded = None
    with ranks.together():
        if ranks.local_rank == 0:
            loaded = load_data(s, script.conditional, say)
            images, labels, classes = loaded
            check_data(s, script, named, s.data or "the synthetic set", images, classes)
    if ranks.world > 1:
        images, labels, classes = ranks.spread(loaded)
        s.range = ranks.first(s.range)
    if script.conditional:
        s.n_classes = len(classes)
    return Data(images, labels, classes, s, device)


def check_data(s, script, named, source, images, classes):
    """UserError where these images are too few or of other classes than was said. source: what they are called."""
    if script.conditional and "n_classes" in named and s.n_classes != len(classes):
        raise UserError(f"--n-classes is {s.n_classes}, but {source} has {len(classes)} class folders: "
                        f"{', '.join(classes)}")
    if len(images) < s.batch_size:
        raise UserError(f"{source} has {len(images)} images, fewer than one batch (--batch-size {s.batch_size})")


# ---------------------------------------------------------------------------------------------- processes
class Ranks:
    """The processes of a run: which groups each serves, and what they tell one another. One process needs none of it.

    W <= N: each rank holds a contiguous block of groups, and only the block's edges send images. W > N: rank r serves
    group floor(r * N / W) together with the group's other ranks; each takes a share of the batch, as equal as can be.
    """

    def __init__(self, n_groups, batch_size, device):
        env = lambda name, default: int(os.environ.get(name, default))
        self.rank, self.world = env("RANK", 0), env("WORLD_SIZE", 1)
        self.local_rank, self.local_world = env("LOCAL_RANK", 0), env("LOCAL_WORLD_SIZE", self.world)
        self.n_groups, self.batch_size, self.device, self.sent = n_groups, batch_size, device, 0
        self.owners = self.place()
        self.mine = [i for i, ranks in self.owners.items() if self.rank in ranks]
        most = max(map(len, self.owners.values()))
        if most > batch_size:
            raise UserError(f"{self.world} processes for {n_groups} groups: {most} would share a batch of "
                            f"{batch_size}; use fewer, or a larger --batch-size")
        first = self.mine[0]
        self.low, self.high = self.rows(first, self.rank)
        self.replicas, self.part = len(self.owners[first]), self.owners[first].index(self.rank)
        self.share = (self.high - self.low) / batch_size
        self.peers = self.node = None
        self.staged = False
        if self.world > 1:
            self.connect()
            self.edges = self.find_edges()

    def place(self):
        """{group: its ranks}."""
        N, W = self.n_groups, self.world
        if W <= N:
            return {i: [(i - 1) * W // N] for i in range(1, N + 1)}
        return {i: [r for r in range(W) if r * N // W == i - 1] for i in range(1, N + 1)}

    def rows(self, i, rank):
        """The rows [low, high) of group i's batch that `rank` works on."""
        ranks, B = self.owners[i], self.batch_size
        k = ranks.index(rank)
        return k * B // len(ranks), (k + 1) * B // len(ranks)

    def find_edges(self):
        """What travels in an exchange: [(from rank, to rank, group i, low, high)], rows of neighbour(i)'s fakes."""
        edges = []
        for i, receivers in self.owners.items():
            j = neighbour(i, self.n_groups)
            for to in receivers:
                for source in self.owners[j]:
                    (a, b), (c, d) = self.rows(i, to), self.rows(j, source)
                    if max(a, c) < min(b, d):
                        edges.append((source, to, i, max(a, c), min(b, d)))
        return edges

    def exchange(self, images):
        """images {i: this rank's rows of group i's fakes} -> {i: the same rows of the fakes of neighbour(i)}."""
        other = lambda i: neighbour(i, self.n_groups)
        if self.world == 1:
            return {i: images[other(i)] for i in images}
        pieces, ops = {i: [] for i in images}, []
        for source, to, i, a, b in self.edges:
            if self.rank == source:
                low = self.rows(other(i), source)[0]
                piece = images[other(i)][a - low:b - low].contiguous()
                if to == source:
                    pieces[i].append(piece)
                    continue
                piece = piece.cpu() if self.staged else piece
                ops.append(dist.P2POp(dist.isend, piece, to))
                self.sent += piece.nbytes
            elif self.rank == to:
                like = images[i]
                place = "cpu" if self.staged else like.device
                piece = torch.empty(b - a, *like.shape[1:], dtype=like.dtype, device=place)
                ops.append(dist.P2POp(dist.irecv, piece, source))
                pieces[i].append(piece)
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        return {i: torch.cat([p.to(self.device) for p in parts]) for i, parts in pieces.items()}

    def connect(self):
        """Join the process group, and make one for the ranks of every group and of this machine."""
        nccl = self.device.type == "cuda" and self.local_world <= torch.cuda.device_count()
        self.staged = self.device.type == "cuda" and not nccl       # two ranks on one GPU: images go by the CPU
        store = meet()
        self.store = dist.PrefixStore(self.attempt(store), store)
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world, timeout=PATIENCE)
        for ranks in self.owners.values():      # every rank takes part in making every process group
            made = dist.new_group(ranks, timeout=PATIENCE) if len(ranks) > 1 else None
            if self.rank in ranks:
                self.peers = made
        firsts = self.everyone(self.rank - self.local_rank)
        for first in sorted(set(firsts)):
            members = [r for r in range(self.world) if firsts[r] == first]
            made = dist.new_group(members, timeout=PATIENCE, backend="gloo")
            if self.rank in members:
                self.node = made

    def attempt(self, store):
        """A name that all ranks of this start share and no earlier start had.

        torchrun keeps one store over its restarts, so addresses of dead ranks stand in it. Each rank asks with a token
        of its own; rank 0 answers whatever is asked, stale or fresh, until every rank has thanked it by the new name.
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
                late = ", ".join(map(str, sorted(waiting)))
                raise UserError(f"rank {late} did not start within {span(TIMEOUT.total_seconds())}")
            time.sleep(0.005)
        return token

    def spread(self, loaded):
        """(images, labels, classes) of the first rank of each machine -> the same on all ranks of that machine."""
        first = self.rank - self.local_rank
        head = [loaded and (tuple(loaded[0].shape), loaded[2])]
        dist.broadcast_object_list(head, src=first, group=self.node)
        shape, classes = head[0]
        if loaded:
            images, labels, _ = loaded
        else:
            images, labels = torch.empty(shape, dtype=torch.uint8), torch.empty(shape[0], dtype=torch.int64)
        dist.broadcast(images, src=first, group=self.node)
        dist.broadcast(labels, src=first, group=self.node)
        return images, labels, classes

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
        """Refuse a rank that was started with something else: UserError unless each value is equal on all."""
        seen = self.everyone(what)
        for r, other in enumerate(seen):
            wrong = [k for k in what if other[k] != seen[0][k]]
            if wrong:
                details = "; ".join(f"{k}: {seen[0][k]} against {other[k]}" for k in wrong)
                raise UserError(f"rank {r} was started with other {' and other '.join(wrong)} than rank 0: {details}")

    def close(self):
        if self.world > 1 and dist.is_initialized():
            self.agree(0)      # nobody takes the group down while another still receives
            dist.destroy_process_group()
            self.peers = self.node = self.store = None      # their threads end before the interpreter


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
    """BatchNorm `m` on a batch that is spread over the ranks of `group` (torch's SyncBatchNorm refuses the CPU)."""
    if not m.training:
        return torch.nn.functional.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)
    dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    kind, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))        # autocast may have made it bf16
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
    return (y if m.weight is None else y * m.weight.view(shape) + m.bias.view(shape)).to(kind)


def check_split(script, s, group):
    """Refuse to spread a batch over ranks where a layer mixes samples, or a loss is no mean over the batch."""
    device = next(group.ema.parameters()).device
    nets = {"Generator": group.nets["G"].net.eval(), "Discriminator": group.nets["D"].net.eval()}
    D = nets["Discriminator"]
    z = draw(0, 0, 0, "split", "normal", (4, s.z_dim)).to(device)
    y = (torch.arange(4, device=device) % s.n_classes,) if script.conditional else ()
    real = draw(0, 0, 0, "split real", "uniform", (4, 3, s.image_size, s.image_size)).to(device) * 2 - 1
    eps = draw(0, 0, 0, "split eps", "uniform", (4, 1, 1, 1)).to(device)
    hint = f"so the batch cannot be spread over processes; use at most one process per group (--nproc {s.groups})"
    inputs = {"Generator": (z, *y), "Discriminator": (real, *y) if takes(D.forward, "y") else (real,)}
    for name, args in inputs.items():
        layer = mixing_layer(nets[name], args)
        if layer is not None:
            kind = type(nets[name].get_submodule(layer)).__name__
            script.must(False, f": layer {layer or name} ({kind}) of {name} mixes the samples of a batch, {hint}")
    with torch.no_grad():
        fake = nets["Generator"](z, *y)
    of_critic = (real, fake, *y, *y)
    for name in ("discriminator_loss", "connector_loss", "generator_loss"):
        f, args = getattr(script, name), (fake, *y) if name == "generator_loss" else of_critic
        values = []
        for rows in (*HALVES, HALVES[0]):
            value, _ = with_logs(f(D, *(v[rows] for v in args), **bind(f, {**vars(s), "eps": eps[rows]})))
            values.append(value.detach())
        mean, draws = alike(values[0], (values[1] + values[2]) / 2), not torch.equal(values[0], values[3])
        if draws and not takes(f, "eps") and name != "generator_loss":              # a penalty that draws for itself
            continue
        why = "draws random numbers by itself, others in each process" if draws else "is not a mean over the batch"
        script.must(mean, f": {name} {why}, {hint}")
    for name, net in nets.items():
        net.train()
        network, moved = group.nets[name[0]], []
        for rows in HALVES[1:]:
            with torch.no_grad(), network.frozen():                 # after which all buffers are as before
                net(*(v[rows] for v in inputs[name]))
                moved.append([getattr(m, buffer).clone() for m, buffer in network.others])
        script.must(all(map(torch.equal, *moved)),
                    f": a buffer of {name} keeps statistics of the batch, others in each process, {hint}")


HALVES = slice(0, 4), slice(0, 2), slice(2, 4)      # a batch of four, whole and in its two halves


def alike(a, b):
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def mixing_layer(net, args):
    """The innermost layer whose output for four samples is not that for two and two; None if there is none."""
    seen, hooks = {}, []
    for name, m in net.named_modules():
        hooks.append(m.register_forward_hook(lambda m, i, out, name=name: seen.setdefault(name, []).append(out)))
    with torch.no_grad():
        for rows in HALVES:
            net(*(v[rows] for v in args))
    for h in hooks:
        h.remove()
    for name, outs in seen.items():     # in the order in which modules finish: innermost first
        outs = [out[0] if isinstance(out, tuple) else out for out in outs]
        sizes = [out.shape[0] if isinstance(out, torch.Tensor) and out.dim() else 0 for out in outs]
        if sizes == [4, 2, 2] and not alike(outs[0], torch.cat(outs[1:])):
            return name
    return None


# ---------------------------------------------------------------------------------------------- pictures
ROLES = {"d": "discriminator", "c": "connector", "g": "generator"}


def chunk_of_inputs(s, k, purpose):
    """Chunk number k of a generator's inputs, drawn for `purpose`: (z,), or (z, y) with the classes in turn."""
    z = draw(s.seed, k, 0, purpose, "normal", (CHUNK, s.z_dim))
    return (z, (torch.arange(CHUNK) + k * CHUNK) % s.n_classes) if "n_classes" in s else (z,)


@torch.no_grad()
def settle_norms(G, s):
    """Give an averaged generator BatchNorm statistics of its own; those of the live one do not fit its weights."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    norms = [m for m in G.modules() if isinstance(m, kind) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.train().momentum = None                                   # the plain mean of all passes
    seed_torch(s.seed, 0, 0, "norms")                               # for a script that draws by itself
    with parametrize.cached():
        for k in range(NORM_CHUNKS if norms else 0):
            G(*(a.to(norms[0].running_mean.device) for a in chunk_of_inputs(s, k, "norms")))
    for m, momentum in zip(norms, momenta):
        m.eval().momentum = momentum


@torch.inference_mode()
def generate(G, z, y=None):
    """Images of a generator in eval mode: z (n, z_dim), y (n,) or None -> uint8 (n, H, W, 3).

    One z, one image: torch, random and numpy are seeded by z, for a script that draws by itself.
    """
    device, parts = next(G.parameters()).device, []
    seed_torch(0, 0, 0, f"images {digest(z.detach().cpu().contiguous().numpy())}")
    with parametrize.cached():
        for k in range(0, len(z), CHUNK):
            a = z[k:k + CHUNK].to(device)
            parts.append(to_uint8(G(a) if y is None else G(a, y[k:k + CHUNK].to(device))))
    return np.concatenate(parts)


def to_uint8(x):
    """float (n, 3, H, W) in [-1, 1] -> uint8 (n, H, W, 3) on the CPU."""
    return to_hwc(x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))


def to_hwc(images):
    """(n, 3, H, W) tensor -> (n, H, W, 3) array."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def sample_grid(trainer, path):
    """Every group's averaged generator on one fixed z: two rows of ten per group, or a row in each of ten classes."""
    s, names = trainer.s, trainer.data.classes[:10]
    z, y = draw(s.seed, 0, 0, "grid", "normal", (10 if names else 20, s.z_dim)), None
    if names:
        z, y = z.repeat(len(names), 1), torch.arange(len(names)).repeat_interleave(10)
    images = trainer.ranks.collect({g.i: generate(g.ema, z, y) for g in trainer.groups})
    if images is None:
        return
    blocks = [(f"G{i}", images[i]) for i in sorted(images)]
    if names:
        blocks = [(f"{group}  {name}", a[10 * k:10 * k + 10]) for group, a in blocks for k, name in enumerate(names)]
    save_image(grid(blocks, 10), path)


def real_grid(trainer, path):
    """Real images in the layout of sample_grid."""
    data = trainer.data
    pick = draw(trainer.s.seed, 0, 0, "real grid", "permutation", len(data.images))
    labels = data.labels.cpu()[pick]
    rows = [(name, pick[labels == c][:10]) for c, name in enumerate(data.classes[:10])] or [("real", pick[:20])]
    save_image(grid([(name, to_hwc(data.images[k])) for name, k in rows if len(k)], 10), path)


def grid(blocks, columns, words=""):
    """[(name, uint8 (n, H, W, 3)), ...] -> a picture: blocks in rows of `columns`, names beside them, below `words`."""
    size = blocks[0][1].shape[1]
    size *= max(1, 64 // size)
    gap, margin = 2, 14 + math.ceil(max(font(11).getlength(legible(name)) for name, _ in blocks))
    rows = [math.ceil(len(a) / columns) for _, a in blocks]
    y = 16 * len(words.splitlines()) + gap
    height = y + sum(rows) * (size + gap) + (len(blocks) - 1) * 4 * gap
    sheet = Image.new("RGB", (margin + columns * (size + gap), height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 2), words, "#333333", font(12))
    for (name, images), n in zip(blocks, rows):
        pen.text((6, y + n * (size + gap) // 2), legible(name), "black", font(11), anchor="lm")
        for k, a in enumerate(images):
            place = (margin + k % columns * (size + gap), y + k // columns * (size + gap))
            sheet.paste(Image.fromarray(a).resize((size, size), Image.Resampling.NEAREST), place)
        y += n * (size + gap) + 4 * gap
    return sheet


@functools.cache
def font(size):
    with contextlib.suppress(ImportError):
        return ImageFont.load_default(size)
    return ImageFont.load_default()                                 # Pillow without FreeType has one size


def legible(text):
    """Text in the letters of Pillow's own font, which are ASCII's: accents go, any other letter becomes its code."""
    plain = unicodedata.normalize("NFKD", one_line(text))
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "backslashreplace").decode()


# ---------------------------------------------------------------------------------------------- variety
VARIETY = 128                   # images by which the variety of a generator is measured; 8 of a class at least
# Variety, as a share of that of real images, below which images are alike. Collapsed runs had 0.05, sound ones 0.3 to 2
# after some 200 steps; before, a class may have 0.2.
ALIKE = 0.2


def variety(trainer, g):
    """How much the averaged generator's images differ within a class: {"pixels": [a share per class], "features": ...}.

    The mean distance between two fakes over that between two reals, by pixels averaged to 16x16 and by what the last
    layer of D is given, for the first 64 classes; None where no two reals differ. Nothing of the training moves.
    """
    s, data, found = trainer.s, trainer.data, []
    n = min(max(1, len(data.classes)), 64)
    k = max(8, VARIETY // n)
    y = torch.arange(n * k) % n
    z = draw(s.seed, 0, 0, "variety", "normal", (n * k, s.z_dim))
    order = draw(s.seed, 0, 0, "variety reals", "permutation", len(data.images))
    own = data.labels.cpu()[order] if data.classes else torch.zeros_like(order)
    picks = torch.cat([torch.nonzero(own == c)[:k, 0] for c in range(n)])
    fakes = torch.from_numpy(generate(g.ema, z, y if data.classes else None)).permute(0, 3, 1, 2)
    for images, labels in ((fakes, y), (data.images[order[picks]], own[picks])):
        x, labels = images.to(trainer.device).float().div_(127.5).sub_(1), labels.to(trainer.device)
        seen = {"pixels": torch.nn.functional.interpolate(x, size=(16, 16), mode="area"),
                "features": last_input(g.nets["D"], trainer.arrange(x), labels if data.classes else None, s.batch_size)}
        found.append({name: spreads(v, labels, n) for name, v in seen.items() if v is not None})
    share = lambda fake, real: round(fake / real, 4) if real > 0 and fake < math.inf else None
    return {name: [share(*pair) for pair in zip(of_fakes, found[1][name])] for name, of_fakes in found[0].items()}


def spreads(x, y, n):
    """Mean distance between two rows of x (b, ...) of a class, for each class in range(n); NaN without two."""
    return [torch.pdist(x[y == c].flatten(1)).mean().item() for c in range(n)]


def last_input(critic, x, y, size):
    """What the last convolution or linear layer that a critic calls is given for images x (b, 3, H, W): (b, d) or None.

    In batches of `size`, as it is trained with; it is frozen and in eval mode, as batch statistics would hide collapse.
    """
    last, rows, net = {}, [], critic.net
    keep = lambda m, args, keywords: last.update(x=[*args, *keywords.values()][0])
    layers = [m for m in net.modules() if isinstance(m, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))]
    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in layers]
    with torch.no_grad(), critic.frozen():
        net.eval()
        for k in (torch.arange(len(x) + -len(x) % size) % len(x)).split(size):
            net(x[k], *(() if y is None or not takes(net.forward, "y") else (y[k],)))
            rows += [last["x"].flatten(1).float()] if last and len(last["x"]) == size else []
        net.train()
    for hook in hooks:
        hook.remove()
    return torch.cat(rows)[:len(x)] if rows else None


def collapsed(before, now):
    """{group: numbers of its collapsed classes} by two lines of log.jsonl that tell the variety.

    Below ALIKE in both, by pixels; and not on the way up, as it may be in the first steps of a sound run.
    """
    found = {}
    for i, groups in enumerate(zip(before["groups"], now["groups"]), 1):
        pairs = enumerate(zip(*(group["variety"]["pixels"] for group in groups)))
        alike = [c for c, (a, b) in pairs if None not in (a, b) and max(a, b) < ALIKE and b <= 1.1 * a]
        found.update({i: alike} if alike else {})
    return found


def classes_in_words(numbers, classes):
    """' of Crack, Rust', ' of every class', or '' without classes."""
    whole = len(numbers) == min(len(classes), 64)
    return f" of {'every class' if whole else ', '.join(classes[c] for c in numbers)}" if classes else ""


class Collapse:
    """Says of each group, once, that its images, or those of a class, have become alike."""

    def __init__(self, classes):
        self.classes, self.before, self.told = classes, None, set()

    def news(self, line):
        """line: what was written to log.jsonl, None on other ranks -> lines to be said."""
        if not line or "every" not in line:
            return []
        found, self.before = collapsed(self.before, line) if self.before else {}, line
        new = [i for i in found if i not in self.told]
        self.told.update(new)
        return [f"Group {i} has collapsed by step {line['step']}: its images{classes_in_words(found[i], self.classes)} "
                f"are nearly one picture, with less than {ALIKE} of the variety of real ones. It seldom mends itself: "
                "start anew (--out) with lower --g-lr and --d-lr, --recipe small or more photos. What was good before "
                f"is kept in G{i}.best.pt, if --fid-every made scores." for i in new]


# ---------------------------------------------------------------------------------------------- the run folder
FORMAT = "okd-gan 1"            # of checkpoint.pt


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

    sync: its content is on the disk before the name is, whatever happens to the machine; thousands of small files would
    wait for that.
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
    """checkpoint.pt, and the averaged generators as G1.pt, G2.pt, ...; rank 0 writes what all ranks send.

    Raises UserError where numbers are lost. A gradient may overflow where the loss does not yet: the loss of the next
    step would tell, but the last good checkpoint would be gone.
    """
    state = trainer.state()
    if state is None:
        return
    for i, group in enumerate(state["groups"], 1):
        for role in group.keys() - {"ema"}:
            n = trainer.groups[0].nets[role].net
            learnt = [group[role]["net"][name] for name, _ in n.named_parameters()]
            sums = [v for of_one in group[role]["opt"].values() for v in of_one.values()]
            whole = not any(v.isnan().any() for v in group[role]["net"].values())   # a mask of -inf may be a buffer
            if not whole or not all(v.isfinite().all() for v in (*learnt, *sums)):
                raise lost(trainer.step_count, f"weights or moments of the {ROLES[role.lower()]} of group {i} are", out)
    with replacing(out / "checkpoint.pt") as f:
        torch.save(state, f)
    for i, group in enumerate(state["groups"], 1):
        save_generator(trainer, group["ema"], out / f"G{i}.pt")


def lost(step, what, out):
    """The error of a run that has gone out of the numbers."""
    kept = out / "checkpoint.pt"
    good = f"the last good state is in {kept}" if kept.exists() else "there is no checkpoint yet"
    return UserError(f"step {step}: {what} not finite; {good}. "
                     "Lower rates (--g-lr, --d-lr, --c-lr) are the usual cure")


def save_generator(trainer, state_dict, path):
    script, s = trainer.script, trainer.s
    beside_us = Path(__file__).resolve().parent / script.path.name == script.path
    with replacing(path) as f:
        torch.save({"model": script.name if beside_us else str(script.path), "kwargs": bind(script.Generator, vars(s)),
                    "state_dict": state_dict, "step": trainer.step_count, "classes": trainer.data.classes,
                    "z_dim": s.z_dim}, f)


def step_of(path):
    """The step of a generator's file; None where there is none that can be read."""
    with contextlib.suppress(UserError, LookupError, TypeError):
        return load_file(path)["step"]


def best_score(out, i, groups):
    """(score, step, every) of group i's lowest score in fid.jsonl; None without one. The first of equals."""
    lines = [line for line in score_lines(out, groups) if math.isfinite(line[f"G{i}"])]
    best = min(lines, key=lambda line: line[f"G{i}"], default=None)
    return best and (best[f"G{i}"], best["step"], best.get("every", 1))


def keep_best(trainer, states, out, say=None):
    """Make G1.best.pt, ... the generators of the lowest scores in fid.jsonl. states: {i: average} of this step.

    A score that only an end had is forgotten when the run goes on. What was best before it waits in .G1.best.pt.
    """
    for i, state in states.items():
        path, before = out / f"G{i}.best.pt", out / f".G{i}.best.pt"
        score, step, every = best_score(out, i, trainer.s.groups) or (None, None, 1)
        held = step_of(path)
        if held == step:
            continue
        if step is None:
            if held == trainer.step_count:                          # of an end whose score is forgotten
                path.unlink()
        elif step == trainer.step_count:
            if step % every and path.exists():
                os.replace(path, before)
            save_generator(trainer, state, path)
        elif step == step_of(before):
            os.replace(before, path)
        elif say:
            say(f"Note: {path} is not of step {step}, where group {i} had its lowest score so far, {score:.2f}; "
                "that generator is lost, a lower score replaces the file.")


def load_generator(path, device="cpu", model=None, as_scored=False):
    """G1.pt -> the generator in eval mode on `device`; `model` names the script where it moved. Raises UserError.

    as_scored: in the memory layout of training, so that its images are those that were scored, bit for bit.
    Call it with z (B, z_dim) ~ N(0, I), and with y (B,) int64 if the file names classes -> (B, 3, H, W) in [-1, 1].
    """
    d = load_file(path)
    if not isinstance(d, dict) or not {"model", "kwargs", "state_dict", "step", "classes", "z_dim"} <= d.keys():
        raise UserError(f"{path} is not a generator written by okd_train.py")
    script = Script(str(model or d["model"]), named_by=None if model else path)
    try:
        G = script.Generator(**d["kwargs"])
        G.load_state_dict(d["state_dict"])
        if not all(v.isfinite().all() for v in G.parameters()) or any(v.isnan().any() for v in G.buffers()):
            raise ValueError("its numbers are not finite")
    except Exception as e:                                          # a constructor may raise anything at such arguments
        raise UserError(f"{path} does not fit {model or d['model']}: {brief(e)}") from e
    layout = script.layout(torch.device(device)) if as_scored else torch.preserve_format
    return G.eval().requires_grad_(False).to(device, memory_format=layout)


def load_file(path):
    """torch.load of tensors and plain values only: nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as z:         # torch.save packs nothing: what is packed may be a bomb
            if any(i.compress_type != zipfile.ZIP_STORED for i in z.infolist()):
                raise ValueError("compressed")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:
        raise UserError(f"{path} is cut short or was not written by okd_train.py ({type(e).__name__})") from e


def read_checkpoint(path, n_groups):
    """checkpoint.pt -> its dict; UserError if it is not one or not of so many groups."""
    state = load_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT or not {"step", "groups"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of okd_train.py ({FORMAT})")
    step, groups = state["step"], state["groups"]
    if type(step) is not int or not 0 < step <= LIMITS["steps"][1] or not isinstance(groups, list):
        raise UserError(f"{path} is damaged: its step or groups make no sense")
    if len(groups) != n_groups:
        raise UserError(f"{path} holds {len(groups)} groups, not {n_groups}")
    return state


def check_state(trainer, states):
    """Raise ValueError unless states {i: group state} hold exactly the tensors that these groups have, all finite.

    torch copies a float64 into a float32 and a NaN into anything, and looks at Adam's sums only in the next step.
    """
    def compare(place, saved, want):
        if saved.keys() != want.keys():
            raise ValueError(f"{place} has other names: {sorted(map(str, saved.keys() ^ want.keys()))[0]}")
        for name, w in want.items():
            v = saved[name]
            fits = isinstance(v, torch.Tensor) and (v.shape, v.dtype, v.layout) == (w.shape, w.dtype, torch.strided)
            if not fits:
                raise ValueError(f"{place} {name} is no {str(w.dtype).split('.')[-1]} tensor {tuple(w.shape)}")
            if w.is_floating_point() and w.isfinite().all() and not v.isfinite().all():
                raise ValueError(f"{place} {name} is not finite")

    for g in trainer.groups:
        saved = states[g.i]
        compare(f"group {g.i} average", saved["ema"], g.ema.state_dict())
        for role, n in g.nets.items():
            compare(f"group {g.i} {role}", saved[role]["net"], n.net.state_dict())
            for k, sums in saved[role]["opt"].items():
                want = {"step": torch.zeros(()), "exp_avg": n.params[k], "exp_avg_sq": n.params[k]}
                compare(f"group {g.i} {role} optimiser {k}", sums, want)


def append_line(path, line):
    """Add a dict to a .jsonl file, and show it to on_log."""
    with writing(path), open(path, "ab") as f:
        f.write(json.dumps(line).encode() + b"\n")
    if on_log:
        on_log(line)


def read_lines(path, numbers=(), most=math.inf):
    """Objects of a .jsonl file with a whole step and a number at each of `numbers`; [] without the file.

    About `most` of them at most, evenly thinned. What is none is passed over: half a line of a run that goes on,
    garbage. UserError where the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    stride = max(1, math.ceil(len(lines) / most))
    kept = []
    for text in lines[::-1][::stride][::-1]:                        # the last line is among them
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            line = json.loads(text)
            numbered = all(isinstance(line[k], (int, float)) for k in numbers)
            if type(line["step"]) is int and line["step"] >= 0 and numbered:
                kept.append(line)
    return kept


def score_lines(out, groups=1):
    """Lines of fid.jsonl that have a score of each group."""
    return read_lines(out / "fid.jsonl", [f"G{i}" for i in range(1, groups + 1)])


def label_words(line, groups):
    """What a line of fid.jsonl says of the labels of these groups, as a sentence; "" where it says nothing."""
    try:
        found = line["labels"]
        each = "  ".join(f"G{i} {found[f'G{i}']:.2f}" for i in groups)
        return (f"Labels that hold at step {line['step']}, by the features of {line['score']}: {each} "
                f"(reals held out {found['reals']:.2f}, chance {found['chance']:.2f})")
    except (KeyError, TypeError, ValueError):
        return ""


def cut_log(path, step, every):
    """Drop what an interrupted run wrote after its checkpoint at `step`, half lines, and a line at `step` that only its
    end had (no multiple of `every`, or of what the line says itself; every 0: it stays)."""
    ends = lambda line: every and step % line.get("every", every)
    kept = [line for line in read_lines(path) if line["step"] < step or line["step"] == step and not ends(line)]
    text = "".join(json.dumps(line) + "\n" for line in kept).encode()
    if path.exists() and path.read_bytes() != text:
        with replacing(path) as f:
            f.write(text)


class Lock:
    """Keeps a second training out of a run folder: flock on OUT/.lock, which the kernel frees however the process ends.

    take() makes the folder. Leaving the `with` removes the file, and the folder if nothing else came into it; what
    kill -9 leaves of the file holds nobody up. The file says who holds it. Where locks do not work (NFS without its
    service) take() says so and goes on. name, busy, flag: for other work, such as an export.
    """

    def __init__(self, out, name=".lock", busy=None, flag="--out"):
        self.path, self.fd, self.made = Path(out) / name, None, []
        self.busy, self.flag = busy or f"{out} is being trained", flag

    def __enter__(self):
        return self

    def take(self, say):
        out = self.path.parent
        with writing(out):
            self.made = [p for p in (out, *out.parents) if not p.exists()]
            out.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT
        while fcntl and self.fd is None:
            with writing(self.path):
                self.fd = os.open(self.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self.fd, 200).decode(errors="replace").strip() or "another process"
                self.drop()
                raise UserError(f"{self.busy} by {holder}: wait for it, stop it, or name another folder with "
                                f"{self.flag}") from None
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
            self.drop()     # its last holder removed it between our open and our lock

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
    """FID of every group's averaged generator against the real images (or rFD, or a user's own FD), with fid.py.

    Made before training starts, so that missing weights are not found out after a night. Real features are computed
    once and kept in the run folder; every rank computes features of what its groups draw, rank 0 does the rest.
    """

    def __init__(self, s, data, device):
        self.fid, self.s, self.data, self.stop = beside("fid", "scoring"), s, data, None
        self.n = s.fid_samples or (10000 if device.type == "cuda" else 2000)
        self.images, self.labels, self.of = data.images, data.labels, data.digest
        known = bool(data.classes)
        if s.fid_data:
            known = known and {c for _, c in class_files(s.fid_data, False)[0]} == set(data.classes)
            self.images, self.labels, _ = load_folder(s.fid_data, s.image_size, known, s.skip_bad, lambda text: None,
                                                      s.range, s.upright)
            self.of = digest(self.images.numpy(), 16)
        self.judge, self.judges = None, self.find_judges(known)
        try:
            self.model = self.fid.network(s.fid_features, device=device)
        except self.fid.FidError as e:
            way_out = "; --fid-features random needs no weights" if s.fid_features == "inception" else ""
            raise UserError(f"--fid-every: {e}{way_out}") from e
        self.name, self.distance = self.model.score, self.model.distance
        if min(len(self.images), self.n) < 4:
            raise UserError(f"--fid-every: {len(self.images)} real images and {self.n} fakes; "
                            "scores need at least 4 of each")

    def __call__(self, trainer, out, progress, stop):
        """Append a line to fid.jsonl, keep each group's best generator as G1.best.pt. The step is in checkpoint.pt.

        Returns the signal that `stop` of any rank has seen, on every rank, or 0. It ends the work, unless all is done.
        """
        ranks, mine, self.stop = trainer.ranks, {}, stop
        jobs = [(g, chunk) for g in trainer.groups for chunk in range(ranks.part, self.chunks(), ranks.replicas)]
        with self.fid.Progress(f"scores of step {trainer.step_count}", len(jobs) * CHUNK, short=False) as told:
            for k in range(*ranks.agree(len(jobs))):
                signalled, = ranks.agree(stop.signal)
                if signalled:
                    return signalled
                for g, chunk in jobs[k:k + 1]:
                    mine[g.i, chunk] = self.fakes(g.ema, chunk)
                    told((k + 1) * CHUNK)
        parts = ranks.collect(mine)
        states = ranks.collect({g.i: on_cpu(g.ema.state_dict()) for g in trainer.groups})
        if parts:
            with contextlib.suppress(InterruptedError):
                self.note(trainer, parts, states, out, progress)
        return ranks.agree(stop.signal)[0]

    def note(self, trainer, parts, states, out, progress):
        """What rank 0 does with the features of all: {(group, chunk): features}, and the averages {group: state}."""
        groups = range(1, self.s.groups + 1)
        features = {i: np.concatenate([parts[i, chunk] for chunk in range(self.chunks())]) for i in groups}
        line = {**self.line(trainer.step_count, features, out), "every": self.s.fid_every}
        append_line(out / "fid.jsonl", line)
        keep_best(trainer, states, out)
        shown = [f"G{i}" for i in groups] + ["mean", "union", "floor"]
        progress.say(f"{self.name} at step {line['step']}: " + "  ".join(f"{k} {line[k]:.2f}" for k in shown)
                     + f" +- {line['floor_spread']:.2f}")
        if words := label_words(line, groups):
            progress.say(words)

    def line(self, step, features, out):
        """{group: features of its fakes} -> the line of fid.jsonl. A further score is another entry here."""
        real, (floor, spread) = self.real(out)
        scores = {f"G{i}": float(self.distance(real, f)) for i, f in features.items()}
        union = float(self.distance(real, np.concatenate(list(features.values()))))
        return {"step": step, "score": self.name, "samples": self.n, "reals": len(real), **scores,
                "mean": sum(scores.values()) / len(scores), "union": union, "floor": floor, "floor_spread": spread,
                **self.labels_hold(real, features)}

    def find_judges(self, known):
        """The module labels, if it can be asked: it is there, the real images' classes are `known` and large enough."""
        with contextlib.suppress(UserError):
            labels, classes = beside("labels"), len(self.data.classes)
            enough = self.n >= classes and np.bincount(self.labels.cpu(), minlength=classes).min() >= labels.LEAST
            if known and enough:
                return labels
        return None

    def labels_hold(self, real, features):
        """{"labels": {"G1": share of its labels that hold, ..., "reals": of reals held out, "chance"}}, or {}."""
        if self.judges is None:
            return {}
        self.judge = self.judge or self.judges.classifier(real, self.labels.cpu().numpy())
        y = np.arange(self.n) % self.s.n_classes                    # as of chunk_of_inputs
        shares = {f"G{i}": float(self.judge.shares(f, y).mean()) for i, f in features.items()}
        return {"labels": {**shares, "reals": float(self.judge.held_out.mean()), "chance": 1 / self.s.n_classes}}

    def chunks(self):
        return math.ceil(self.n / CHUNK)

    def fakes(self, G, chunk):
        """Features of one chunk of the n fakes of a generator: chunk in range(chunks())."""
        return self.features(generate(G, *chunk_of_inputs(self.s, chunk, "fid"))[:self.n - chunk * CHUNK])

    def features(self, images, label=None):
        try:
            return self.fid.features(images, model=self.model, batch_size=CHUNK, label=label)
        except self.fid.FidError as e:                              # of a user's own network
            raise UserError(f"--fid-every: {e}") from e

    def network(self):
        """What kept features are told by, beside their images."""
        own = self.s.fid_features.endswith(".py")                   # then its text counts, not where it lies
        kind = digest(Path(self.s.fid_features), 16) if own else self.s.fid_features
        return f"{kind} {self.model.digest}"

    def real(self, out):
        """Features of the real images, and (floor, its spread) for n fakes; from the run folder, if they are kept."""
        path, kept, of = out / "real_features.npz", {}, f"{self.of} {self.network()}"
        if path.exists():
            with contextlib.suppress(Exception):                    # cut or foreign: computed anew
                with np.load(path, allow_pickle=False) as f:
                    if str(f["of"]) == of:
                        kept = dict(f)
        if kept.get("n") == self.n:
            return kept["features"], tuple(map(float, kept["floors"]))
        parts = [kept["features"]] if kept else []
        with self.fid.Progress("real images", len(self.images), short=False) as told:
            for images in () if kept else self.images.split(CHUNK):
                if self.stop and self.stop.signal:
                    raise InterruptedError
                parts.append(self.features(images))
                told(sum(map(len, parts)))
        features = np.concatenate(parts)
        floor = self.fid.floor(features, self.n, self.distance)
        with replacing(path) as f:
            np.savez(f, features=features, n=self.n, floors=floor, of=of)
        return features, floor


# ---------------------------------------------------------------------------------------------- settings of a run
# Least and most of each number, against slips: beyond them a run would die of memory, or never end, without a word.
LIMITS = dict(
    groups=(1, 1000), nproc=(1, 1024), steps=(1, 10 ** 12), epochs=(1e-6, 1e12), max_seconds=(1e-6, 1e12),
    seed=(0, None), batch_size=(1, 10 ** 6), n_critic=(1, 1000), image_size=(4, 4096), z_dim=(1, 10 ** 6),
    n_classes=(1, 10 ** 5), log_every=(1, None), sample_every=(1, None), save_every=(1, None), fid_every=(1, None),
    fid_samples=(4, 10 ** 7),
    rho=(0, None), g_lr=(0, None), d_lr=(0, None), c_lr=(0, None), beta1=(0, 0.999999), beta2=(0, 0.999999),
    lambda_gp=(0, None))
NONE_BY_DEFAULT = dict(data=str, recipe=str, epochs=float, max_seconds=float, device=str, precision=str,
                       fid_every=int, fid_samples=int, fid_data=str, range=list)
MAY_CHANGE = {"steps", "epochs", "max_seconds", "save_every", "sample_every", "log_every", "fid_every", "device",
              "nproc", "cuda_graph", "precision", "data", "fid_data"}       # on --resume; open_run looks at the pixels
NOT_KEPT = {"resume", "out", "model", "nproc"}                      # in args.json: they belong to one start


# What --help says below the flags.
MORE_HELP = """
processes:
  Groups are spread over the processes; with more processes than groups, the processes of a group share its batch
  (BatchNorm sees the whole of it). With one thread each, 1 to N processes give bit-identical checkpoints on the
  CPU, and a checkpoint from any number of processes resumes on any other. One process starts more by itself where
  it sees several GPUs (--nproc K forces a number, --nproc 1 forbids). torchrun --max-restarts 3 goes on from the
  last checkpoint after a crash. A process that was started with other data, code or settings is refused.

runs:
  A run that exists is never overwritten, and while one process trains in a folder a second is refused (.lock, which
  the kernel frees even after kill -9). Ctrl-C, SIGTERM or SIGHUP finishes the step, saves and leaves; --resume goes
  on, on the CPU with exactly the numbers of an undisturbed run, also after kill -9 (from the last checkpoint; the
  log is cut back to it). Settings that are not named on --resume come from the run; naming another value is an error,
  except for how long, how often, on what device, and where the same images lie. Images and checkpoints are read as
  data and never executed; a model script is a program, and args.json and G1.pt name the one to load (its path is
  said before): use only runs that you trust.

log.jsonl has a line of step, seconds, images_per_second (all groups) and, per group, d_loss, c_loss, g_loss and:
  d_w               E D(real) - E D(fake): rises fast, then falls slowly (with --loss r1 it stays); neither stuck near
                    0 nor growing for ever
  d_grad_norm       mean gradient norm of D at the interpolates: close to 1; with --loss r1 d_real_grad, at real images
  c_w, c_grad_norm  the same between neighbour and own fakes: c_w falls as the groups come together
  gamma             weight of each attention layer in G, D, C; starts at 0 and leaves it; its sign does not matter
  d_accuracy        acgan: share of real images whose class is named right, towards 1; d_class_loss: the class loss
  variety           every --sample-every steps: mean distance of two fakes of a class (the first 64) over that of two
                    reals, in pixels averaged to 16x16 and in D's last features; near 0 the class is one picture
"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def trainer_flags(p):
    add = p.add_argument
    add("--model", default="sagan", metavar="NAME|FILE.py",
        help="model script: NAME.py here or beside okd_train.py, or a path (default sagan)")
    add("--groups", type=int, default=3, metavar="N",
        help="number of GANs in the ring (default 3; 1 is the plain baseline)")
    add("--data", metavar="DIR",
        help="folder of images, searched recursively; class = first folder below (default: a small synthetic set). Any "
             "size, colour mode and depth: cut to the centre square, resized once; transparent pixels are read in the "
             "colour stored beneath, the first of several frames")
    add("--out", metavar="DIR", help="run folder (default runs/MODEL-GROUPS)")
    add("--resume", action="store_true", help="go on with the run in --out; settings not named come from it")
    add("--steps", type=int, default=50000, help="training steps in all (default 50000, the paper's)")
    add("--epochs", type=float, metavar="E", help="passes over the data in place of --steps")
    add("--max-seconds", type=float, metavar="S", help="stop after S seconds, saved; --resume goes on")
    add("--recipe", metavar="NAME",
        help="a set of the script's settings by its name, such as small: for a few thousand photos; flags win over it")
    add("--quick", action="store_true",
        help="a first look in five minutes: the recipe small at 32x32, --max-seconds 270")
    add("--seed", type=int, default=0, help="all chance of a run comes from it (default 0)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--nproc", type=int, metavar="K",
        help="processes to start (default: one per GPU, at most one per group; 1 forbids)")
    add("--cuda-graph", choices=("auto", "on", "off"), default="auto",
        help="capture the whole step and replay it (default auto: where it works; on: or stop)")
    add("--precision", choices=("fp32", "tf32", "bf16"),
        help="of products; penalties stay at tf32 in bf16 (default tf32 on CUDA, else fp32)")
    add("--flip", action=argparse.BooleanOptionalAction, default=False,
        help="mirror real images left to right at random (default no)")
    add("--flip-vertical", action=argparse.BooleanOptionalAction, default=False,
        help="and top to bottom: for surfaces, which have no up (default no)")
    add("--balance", action=argparse.BooleanOptionalAction, default=False,
        help="learn from every class equally often, as fakes of every class are made; for scripts with classes "
             "(default no)")
    add("--skip-bad", action="store_true", help="leave unreadable images out and say how many")
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="the numbers that are black and white in images of 16 bits, 32 bits or floats (default: the least usual "
             "range that holds those of all images; kept with the run)")
    add("--upright", action="store_true",
        help="turn photos as their EXIF says (default: as they are stored; TIFF files Pillow turns by itself)")
    add("--log-every", type=int, default=10, metavar="K", help="steps between lines of log.jsonl (default 10)")
    add("--sample-every", type=int, default=500, metavar="K", help="steps between sample grids (default 500)")
    add("--save-every", type=int, default=500, metavar="K", help="steps between checkpoints (default 500)")
    add("--fid-every", type=int, metavar="K",
        help="score every group every K steps and at the end, saved before, into fid.jsonl (default never)")
    add("--fid-samples", type=int, metavar="N",
        help="fakes per group and score (default 2000 on the CPU, 10000 on CUDA)")
    add("--fid-data", metavar="DIR",
        help="held-out images to score against, labels too if its class folders are those of --data (default: the "
             "training images)")
    add("--fid-features", type=features_name, default="inception", metavar="inception|random|FILE.py",
        help="random: rFD, a smoke test that needs no weights; FILE.py: see fid.py --help (default inception)")


def features_name(name):
    """The type of --fid-features."""
    if name in ("", "inception", "random") or name.endswith(".py"):     # "" is refused with all that is empty
        return name
    raise argparse.ArgumentTypeError(f"invalid choice: {name[:40]!r} (say inception, random, or a file FILE.py)")


def parse(argv, prog="okd_train.py", description=None, more=None):
    """argv -> (settings, script, names of the flags that were given). more(parser) adds another program's flags."""
    argv = [re.sub("^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in argv]
    script, model = named_script(argv)
    p = Parser(prog=prog, allow_abbrev=False, description=description or __doc__,
               epilog=None if description else MORE_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    p._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)     # argparse's knows no -1e-3
    trainer_flags(p)
    if more:
        more(p)
    own = {a.dest for a in p._actions}
    group = p.add_argument_group(f"settings of {script.name}")
    for name, value in script.hparams.items():
        script.must(name not in own, f": hparams has {name!r}, which clashes with the trainer's own flag {flag(name)}")
        kind = dict(type=type(value), metavar=type(value).__name__.upper())
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        try:
            group.add_argument(flag(name), default=value, help=f"(default {value})".replace("%", "%%"), **kind)
        except argparse.ArgumentError as e:                         # x=True brings --no-x too
            script.must(False, f": hparams has {name!r}, whose flag {' '.join(e.message.split())}")
    s = p.parse_args(argv)
    for action in p._actions:         # a second pass without defaults tells what was named
        action.default = argparse.SUPPRESS
    named = set(vars(p.parse_args(argv)))
    s.model = model
    return s, script, named


def named_script(argv):
    """The script that --model names, or that the run used which --resume names; and its name as it was given."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--model")
    first.add_argument("--out")
    first.add_argument("--resume", nargs="?", const=True)
    early, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if early.model is None and early.out and early.resume and (Path(early.out) / "args.json").exists():
        saved = read_args(Path(early.out))
        return run_script(saved, early.out), saved["model"]
    model = "sagan" if early.model is None else early.model
    return Script(model), model


def settle(s, script, named):
    """Put a recipe and a resumed run's settings in, and check every value. Returns what the recipe set."""
    changed = {}
    if s.out is None:
        s.out = f"runs/{script.name}-{s.groups}"
    if s.resume and (Path(s.out) / "args.json").exists():
        take_settings(s, script, named)
    else:
        for name, value in preset(s, script).items():
            if hasattr(s, name) and name not in named:
                setattr(s, name, value)
                changed[name] = value
    if "steps" in named and "epochs" in named:
        raise UserError("--steps and --epochs both say how long; give one")
    check_limits(s, script)
    return changed


def preset(s, script):
    """The settings that --recipe and --quick stand for."""
    if s.quick and s.recipe is None:
        s.recipe = "small"
    known = {"small": SMALL, **script.recipes} if s.quick else script.recipes
    if s.recipe is not None and s.recipe not in known:
        raise UserError(f"--recipe {s.recipe}: {script.name} has {', '.join(known) or 'no recipes'}")
    quick = {k: v for k, v in QUICK.items() if k != "image_size" or takes(script.Generator, k)} if s.quick else {}
    return {**known.get(s.recipe, {}), **quick}


def check_limits(s, script):
    for name, value in vars(s).items():
        wrong = fault(name, value)
        if wrong and not value == script.hparams.get(name) == "":   # "" may be a script's own default
            raise UserError(f"{flag(name)} {wrong}")
    most = s.groups * s.batch_size
    if s.nproc and s.nproc > most:
        raise UserError(f"--nproc is {s.nproc}: {s.groups} groups with batches of {s.batch_size} keep at most {most} "
                        "processes busy; use fewer")


def fault(name, value):
    """What is wrong with a setting, in words; "" if nothing is."""
    low, high = LIMITS.get(name, (None, None)) if value is not None else (None, None)
    if value == "":
        return "is empty"
    if isinstance(value, str) and "\0" in value:
        return "holds a null character"
    if name == "range" and value is not None:
        numbers = len(value) == 2 and all(type(v) in (int, float) for v in value)
        if not (numbers and -math.inf < value[0] < value[1] < math.inf):
            return f"is {value}; it must be two numbers, the first below the second"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; it must be finite"
    if low is not None and value < low:
        return f"is {value}; it must be {low} or more"
    if high is not None and value > high:
        return f"is {value}; it must be at most {high}"
    return ""


def take_settings(s, script, named):
    """Overlay s with the settings of the run in s.out, which those that were named must agree with."""
    saved = read_args(s.out)
    if "model" in named and PureWindowsPath(saved["script"]).stem != script.name:
        raise UserError(f"{s.out} was trained with {saved['model']}, not with {script.name}")
    check_settings(saved, s, script)
    clash, scored = [], saved["settings"].get("fid_every")
    for name, old in saved["settings"].items():
        new = getattr(s, name)
        if name not in named:
            setattr(s, name, old)
        elif new != old and name not in MAY_CHANGE and (scored or not name.startswith("fid_")):
            clash.append(f"{flag(name)} is {old} there and {new} here")
    if "steps" in named and "epochs" not in named:
        s.epochs = None
    if clash:
        raise UserError(f"{s.out} was begun with other settings: {'; '.join(clash)}")


def check_settings(saved, s, script):
    """Refuse settings of args.json that this program cannot have written: edited, or of another script version."""
    path = Path(s.out) / "args.json"
    for name in script.hparams.keys() | {"groups", "seed", "flip"}:
        if name not in saved["settings"] and PureWindowsPath(saved["script"]).stem != script.name:
            raise UserError(f"{s.out} was trained with {saved['model']}, not with {script.name}")
        if name not in saved["settings"]:
            raise UserError(f"{path}: settings lack {name!r}; put it back, or start another run with --out")
    for name, value in saved["settings"].items():
        if not hasattr(s, name):
            raise UserError(f"{path}: settings hold {name!r}, which {script.name} has no flag for; take it out, "
                            "or start another run with --out")
        kind = NONE_BY_DEFAULT.get(name) or type(getattr(s, name))
        fits = type(value) is kind or kind is float and type(value) is int or value is None and name in NONE_BY_DEFAULT
        if not fits:
            raise UserError(f"{path}: {name!r} is {json.dumps(value)[:60]}; it must be a {kind.__name__}")
    if script.conditional and saved["n_classes"] != len(saved["classes"]):
        raise UserError(f"{path}: n_classes is {saved['n_classes']}, but {len(saved['classes'])} classes are named")


def read_args(out):
    """args.json -> its dict with the settings beside the rest; UserError if it is not what save_args writes."""
    kinds = dict(model=str, script=str, classes=list, images=int, data_digest=str, settings=dict)
    try:
        saved = json.loads((Path(out) / "args.json").read_text())
        for name, kind in kinds.items():
            if type(saved.get(name)) is not kind:
                raise ValueError(f"{name} is missing or not a {kind.__name__}")
        if not all(isinstance(c, str) and c and c == Path(c).name and c != ".." for c in saved["classes"]):
            raise ValueError("classes are no names of folders")     # an export makes folders of these names
        if not isinstance(saved.setdefault("agents", []), list):
            raise ValueError("agents is not a list")
        return {**saved["settings"], **saved}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{out} is not a run: it has no args.json") from None
    except (ValueError, AttributeError, RecursionError, OSError) as e:
        raise UserError(f"{Path(out) / 'args.json'} cannot be read: {e}") from e


def run_script(saved, out):
    """The model script that a run was trained with; `model` may be a name in another folder, or a path on Windows."""
    model = PureWindowsPath(saved["model"]).stem if "\\" in saved["model"] else saved["model"]
    return Script(saved["script"] if Path(saved["script"]).is_file() else model, named_by=Path(out) / "args.json")


def read_run(out, model=None):
    """A run folder -> (all its settings, its script, the dict of args.json); model names the script where it moved.

    For programs that look at a run. Raises UserError where `out` is no run or does not fit its script.
    """
    saved = read_args(out)
    path = Script(model).path if model else run_script(saved, out).path
    s, script, _ = parse(["--model", str(path), "--out", str(out)])
    check_settings(saved, s, script)
    for name, value in saved["settings"].items():
        setattr(s, name, value)
    check_limits(s, script)                                         # it may have been edited
    return s, script, saved


def save_args(s, script, data, scores, out, agents):
    """args.json: every setting, and what they were used on."""
    settings = {name: value for name, value in vars(s).items() if name not in NOT_KEPT}
    save_json({"model": s.model, "script": str(script.path), "classes": data.classes, "images": len(data.images),
               "data_digest": data.digest, "fid_digest": scores and scores.of, **conditions(script),
               "git": git_revision(), "agents": agents, "settings": settings}, out / "args.json")


def conditions(script):
    """What the last bits of a run depend on beside its settings and its data."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    return {"script_digest": digest(script.path, 16), "threads": torch.get_num_threads(), "versions": versions}


def git_revision():
    """Commit of the checkout that this file lies in, or None; read from .git without running anything."""
    try:
        git = Path(__file__).resolve().parent / ".git"
        head = (git / "HEAD").read_text().strip()
        return head if not head.startswith("ref: ") else (git / head[5:]).read_text().strip()
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------- training
def train(s, script, named, changed, lock):
    """A run from the data to the last step. named: flags that were given; changed: what a recipe set."""
    keep_freed_memory()
    device = pick_device(s.device)
    precision = set_precision(s, device)
    if s.quick and device.type == "cpu":
        torch.set_num_threads(1)                                    # at this size a second one gains little
    ranks = Ranks(s.groups, s.batch_size, device)
    say = (lambda text: print(text, flush=True)) if ranks.rank == 0 else (lambda text: None)
    out = Path(s.out)
    data = shared_data(s, script, named, device, ranks, say)
    say_channels = settle_channels(s, script, named, changed, data)
    if s.epochs is not None:
        s.steps = max(1, math.ceil(s.epochs * data.shown / (s.batch_size * s.n_critic)))
    settings = {name: value for name, value in vars(s).items() if name not in ("out", "data", "device")}
    ranks.compare(settings=json.dumps(settings, sort_keys=True, default=str), data=data.digest,
                  code=digest(Path(__file__)) + digest(script.path))
    saved, agents = None, ranks.everyone(agent())
    with ranks.together():
        trainer = Trainer(script, s, data, device, ranks)
        probe(script, s, trainer.groups[0])
        if ranks.replicas > 1:
            check_split(script, s, trainer.groups[0])
        scores = Scores(s, data, device) if s.fid_every else None
        if ranks.rank == 0:
            if not s.resume or out.exists():                        # there is nothing to go on with
                lock.take(say)
            saved = open_run(s, script, data, scores, out, agents)
            for left in (*out.glob(".*.tmp[0-9]*"), *out.glob("samples/.*.tmp[0-9]*")):
                left.unlink(missing_ok=True)                        # of saves that were killed
    restore(trainer, saved, out)
    with ranks.together():
        owed = saved and mend_run(trainer, saved, out, say)         # on rank 0, others have none
    saved, owed = None, ranks.first(owed or None)
    if trainer.step_count >= s.steps and not owed:
        say(f"Nothing to do: {out} is at step {trainer.step_count} of {s.steps}; raise --steps to train on.")
        return ranks.close()
    with ranks.together():
        if ranks.rank == 0:
            begin_run(s, script, trainer, scores, out, agents)
    say(announcement(trainer, named, changed, precision) + say_channels)
    loop(trainer, s, out, scores, owed)
    ranks.close()


def settle_channels(s, script, named, changed, data):
    """One channel for grey images, under a recipe of a script that can make one; what there is to say about it."""
    if script.hparams.get("channels") not in (1, 3):                # of a script of one's own it may be its width
        return ""
    red, green, blue = data.images.unbind(1)
    grey = torch.equal(red, green) and torch.equal(red, blue)
    if s.channels == 1 and not grey:
        return " Note: --channels 1 makes grey images of these coloured ones."
    if s.channels == 1 or not grey or "channels" in named or s.resume:
        return ""
    if s.recipe is None:
        return " Every image is grey: with --channels 1 the generators would make grey images only, and learn faster."
    s.channels = changed["channels"] = 1
    return " Every image is grey: --channels 3 would make coloured ones all the same."


def loop(trainer, s, out, scores, owed=False):
    """Steps, with logs, pictures, scores, checkpoints, and a way out that saves. owed: score before the first step."""
    ranks, begin, first = trainer.ranks, time.monotonic(), trainer.step_count
    progress = Progress(s.steps, quiet=ranks.rank > 0, seconds=s.max_seconds)
    pace, collapse, per_step = Pace(), Collapse(trainer.data.classes), s.batch_size * s.groups
    with Stop() as stop:
        signalled = owed and scores(trainer, out, progress, stop)
        leaving = bool(signalled)
        while trainer.step_count < s.steps and not leaving:
            with calling(trainer.script, f"step {trainer.step_count + 1}"):
                losses = trainer.step()
            step, seconds = trainer.step_count, time.monotonic() - begin
            due = what_is_due(s, step)
            looked = trainer.device.type == "cpu" or due or step % 50 == 0      # elsewhere a look costs a wait
            late = s.max_seconds is not None and seconds >= s.max_seconds
            bad = bool(looked) and trainer.first_bad() is not None
            signalled, late, bad = ranks.agree(stop.signal, late, bad)
            leaving = bool(signalled or late)
            if leaving:
                due |= {"log", "sample", "save"} | ({"fid"} if scores and late else set())
            if leaving or bad:
                refuse_lost(trainer, out)
            for words in pace.news(trainer, s):
                progress.say(words)
            if due & {"sample", "fid", "save"}:
                for g in trainer.groups:
                    settle_norms(g.ema, s)
            if "log" in due:
                line = write_log(trainer, losses, out, seconds, (step - first) * per_step / seconds)
                for words in collapse.news(line):
                    progress.say(words)
            if "sample" in due:
                sample_grid(trainer, out / "samples" / f"step_{step:06d}.png")
            if "save" in due:
                save_checkpoint(trainer, out)
            if "fid" in due and not signalled:
                signalled = scores(trainer, out, progress, stop)
                leaving |= bool(signalled)
            progress(step, lambda: mean_losses(losses), per_step)
    say_goodbye(trainer, s, out, scores, progress, signalled, time.monotonic() - begin)


def what_is_due(s, step):
    """Which of log, sample, save and fid come after this step; all of them after the last. What is scored is saved."""
    every = {"log": s.log_every, "sample": s.sample_every, "save": s.save_every, "fid": s.fid_every}
    due = {what for what, k in every.items() if k and (step == s.steps or step % k == 0)}
    due |= {"save"} if "fid" in due else set()
    return due | {"log"} if "sample" in due else due                # the log tells the variety of the pictures


def refuse_lost(trainer, out):
    """Raise UserError if a loss of any rank was not finite, with the first such step."""
    bad = [found for found in trainer.ranks.everyone(trainer.first_bad()) if found]
    if bad:
        step, network = min(bad)
        raise lost(step, f"the loss of the {network} is", out)


def mean_losses(losses):
    """{i: {"d": (loss, logs), ...}} -> 'd +0.123  g -0.456', means over the groups."""
    roles = [role for role in "dcg" if role in next(iter(losses.values()))]
    means = {role: sum(of[role][0].item() for of in losses.values()) / len(losses) for role in roles}
    return "  ".join(f"{role} {mean:+.3f}" for role, mean in means.items())


def write_log(trainer, losses, out, seconds, rate):
    """Append one JSON object to log.jsonl and return it, on rank 0; what a group's ranks saw is averaged by shares.

    Every --sample-every steps it tells the variety, too; not where a run ends in between, which another run passes by.
    """
    ranks, mine, every = trainer.ranks, {}, trainer.s.sample_every
    with_variety = trainer.step_count % every == 0
    for g in trainer.groups:
        row = {}
        for role, (value, logs) in losses[g.i].items():
            row[f"{role}_loss"] = value.item()
            row.update({f"{role}_{name}": float(v) for name, v in logs.items()})
        row["gamma"] = g.gammas()
        row.update({"variety": variety(trainer, g)} if with_variety else {})
        mine[g.i, ranks.part] = (ranks.share, row)
    rows = ranks.collect(mine)
    if rows is None:
        return
    groups = []
    for i in range(1, ranks.n_groups + 1):
        parts = [rows[i, k] for k in range(len(ranks.owners[i]))]
        mean = lambda name: sum(share * row[name] for share, row in parts)
        groups.append({name: v if isinstance(v, dict) else mean(name) for name, v in parts[0][1].items()})
    line = {"step": trainer.step_count, "seconds": round(seconds, 3), "images_per_second": round(rate, 2),
            "groups": groups, **({"every": every} if with_variety else {})}
    append_line(out / "log.jsonl", line)
    return line


def say_goodbye(trainer, s, out, scores, progress, signalled, seconds):
    step = trainer.step_count
    if signalled:
        name = signal.Signals(signalled).name
        progress.say(f"Stopped by {name} at step {step}; saved in {out}. --resume goes on.")
        trainer.ranks.close()
        raise SystemExit(128 + signalled)
    lines = score_lines(out, s.groups) if scores else []
    if lines:
        best, i, at = min((line[f"G{i}"], i, line["step"]) for line in lines for i in range(1, s.groups + 1))
        floor, spread = (lines[-1][k] for k in ("floor", "floor_spread"))
        progress.say(f"Best: group {i} at step {at} with {scores.name} {best:.2f} (fresh images: about {floor:.2f} "
                     f"+- {spread:.2f}), in {out / f'G{i}.best.pt'}.")
    done = f"Done: {step} steps, {span(seconds)}."
    if step < s.steps:
        done = f"--max-seconds reached at step {step} of {s.steps}; --resume goes on."
    run = shlex.quote(str(out))
    progress.say(f"{done} Look at {out / 'samples'}/; python sample.py {run} 1000 writes images, "
                 f"python report.py {run} a page.")


def holds_run(out):
    """Whether a new run would meet files of another; a best generator would even pass for its own."""
    return any((out / name).exists() for name in ("args.json", "checkpoint.pt", "log.jsonl")) or any(
        out.glob("G*.best.pt"))


def open_run(s, script, data, scores, out, agents):
    """Read the checkpoint of the run that is to go on; None for a new one. Rank 0 only. No run is overwritten."""
    for name in ("samples", "log.jsonl", "fid.jsonl"):              # the other files take a link's place
        if (out / name).is_symlink():
            raise UserError(f"{out / name} is a link, and a run writes nothing outside its folder: remove it")
    checkpoint, known = out / "checkpoint.pt", set(filter(None, agents))
    earlier = read_args(out)["agents"] if (out / "args.json").exists() else []
    restarted = not known.isdisjoint(earlier)                       # by the torchrun that began this run
    if s.resume or (restarted and checkpoint.exists()):
        if not checkpoint.exists():
            raise UserError(f"--resume: no checkpoint in {out}")
        if not s.resume:
            take_settings(s, script, named=vars(s).keys())
        saved = read_args(out)
        source = s.data or "the synthetic set"
        if saved["data_digest"] != data.digest:
            raise UserError(f"--resume: the {len(data.images)} images of {source} are not those that {out} was trained "
                            f"on ({saved['images']} images); restore them, or start another run with --out")
        if scores and saved.get("fid_digest") not in (None, scores.of) and score_lines(out, s.groups):
            raise UserError(f"--fid-data: the images of {s.fid_data or source} are not those that the scores in "
                            f"{out / 'fid.jsonl'} compare with; restore them, or move that file away")
        return read_checkpoint(checkpoint, s.groups)
    if not restarted and holds_run(out):
        hint = "go on with --resume" if checkpoint.exists() else "it has no checkpoint yet: delete it"
        raise UserError(f"{out} already holds a run: {hint}, or name another folder with --out")
    return None


def restore(trainer, saved, out):
    """Hand the groups of a checkpoint, read on rank 0, to the ranks that serve them, and go on from there."""
    ranks, whole = trainer.ranks, [None] * trainer.ranks.world
    if saved:
        for r in range(ranks.world):
            whole[r] = ({i: saved["groups"][i - 1] for i, owners in ranks.owners.items() if r in owners}, saved["step"])
    mine = ranks.hand_out(whole)
    with ranks.together():
        if mine:
            try:
                check_state(trainer, mine[0])
                trainer.load_state(*mine)
            except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as e:
                raise UserError(f"{out / 'checkpoint.pt'} does not fit these networks: {brief(e)}") from e


def mend_run(trainer, state, out, say):
    """Bring all files to the step of the checkpoint `state` -> whether that is still to be scored. Rank 0 only."""
    s, step, averages = trainer.s, state["step"], {i: group["ema"] for i, group in enumerate(state["groups"], 1)}
    saved, goes_on = read_args(out), step < s.steps
    other = [what for what, value in conditions(trainer.script).items() if saved.get(what, value) != value]
    if goes_on and other:
        say(f"Note: other {' and '.join(other)} than in args.json: the run goes on, but its numbers are no longer bit "
            "for bit those of a run without a break.".replace("script_digest", "model script"))
    cut_log(out / "log.jsonl", step, goes_on and saved["log_every"])
    cut_log(out / "fid.jsonl", step, goes_on and (saved.get("fid_every") or 1))
    for i, average in averages.items():
        if step_of(out / f"G{i}.pt") != step:
            save_generator(trainer, average, out / f"G{i}.pt")
    keep_best(trainer, averages, out, say)
    return "fid" in what_is_due(s, step) and all(line["step"] != step for line in score_lines(out, s.groups))


def begin_run(s, script, trainer, scores, out, agents):
    """Write what stands at the beginning of a run, or of its continuation. Rank 0 only."""
    with writing(out):
        (out / "samples").mkdir(parents=True, exist_ok=True)
        if not trainer.step_count:
            (out / "log.jsonl").write_bytes(b"")
            (out / "fid.jsonl").unlink(missing_ok=True)             # of a run whose other files were deleted
    save_args(s, script, trainer.data, scores, out, agents)
    real_grid(trainer, out / "samples" / "real.png")


def announcement(trainer, named, changed, precision):
    """What is trained on what, where its results go, and which of the flags that were given do nothing."""
    s, script, data, ranks = trainer.s, trainer.script, trainer.data, trainer.ranks
    nets, out = trainer.groups[0].nets, Path(s.out)
    count = lambda role: f"{sum(p.numel() for p in nets[role].params) / 1e6:.2f} M"
    ring = f"one {script.name} group, the baseline without connectors"
    if s.groups > 1:
        ring = f"{s.groups} {script.name} groups in a ring (rho {s.rho})"
    source = f"{len(data.images)} images of {s.data}"
    if not s.data:
        source = (f"{len(data.images)} SYNTHETIC images of concrete defects, "
                  "drawn by synthetic.py because no --data was given")
    text = (f"Training {ring}: generator {count('G')}, discriminator {count('D')} parameters"
            f"{', a connector like it' if s.groups > 1 else ''}, {s.image_size}x{s.image_size}, batch {s.batch_size}, "
            f"on {source}{f' in {len(data.classes)} classes' if data.classes else ''}. "
            f"Device: {describe(trainer.device)}{f', {ranks.world} processes' if ranks.world > 1 else ''}, "
            f"{precision}. {trainer.graph_note + ' ' if trainer.graph_note else ''}"
            f"Pictures every {s.sample_every} steps in {out / 'samples'}/, log every {s.log_every} in "
            f"{out / 'log.jsonl'}, checkpoint every {s.save_every}.")
    if changed:
        text += f" The recipe {s.recipe} set {', '.join(f'{flag(k)} {v}' for k, v in changed.items())}."
    if trainer.step_count:
        text += f" Resumed at step {trainer.step_count}."
    for off, idle, why in (
            (s.groups == 1, {"rho", "c_lr", "c_penalty", "c_aux"}, "one group has no connector"),
            (not data.classes, {"balance"}, f"{script.name} has no classes"),
            (not s.data, {"range", "upright", "skip_bad"}, "no --data was given"),
            (not s.fid_every, {"fid_samples", "fid_data", "fid_features"}, "scores are made with --fid-every K only")):
        if off and idle & named:
            text += f" Note: {', '.join(map(flag, sorted(idle & named)))} without effect, {why}."
    if s.groups > 1 and s.rho > 1:
        text += " Note: with rho above 1 it pays a generator to copy its neighbour rather than to follow the data."
    return text


class Pace:
    """What there is to say about the speed of a run: whether its steps are captured, and once how long it will take."""

    def __init__(self):
        self.steady = None                                          # (step, time) from which on steps are alike
        self.undecided = self.told = False

    def news(self, trainer, s):
        """Lines to be said after this step."""
        lines, now, step = [], time.monotonic(), trainer.step_count
        undecided = trainer.graph is not None and trainer.graph_note is None
        captured = self.undecided and not undecided
        if captured:
            lines.append(trainer.graph_note)
        self.undecided = undecided
        if self.steady is None or undecided or captured:
            self.steady = step, now                                 # the steps until here also warmed up
        elif not self.told and (now - self.steady[1] > 5 or step - self.steady[0] >= 20 or step == s.steps):
            self.told = True
            lines.append(self.forecast(step, (now - self.steady[1]) / (step - self.steady[0]), trainer, s))
        return lines

    def forecast(self, step, per_step, trainer, s):
        text, left = f"One step takes {per_step:.3g} s here", s.steps - step
        if left and s.max_seconds and per_step * left > s.max_seconds:
            text += f", so some {s.max_seconds / per_step:.0f} are made in the {span(s.max_seconds)} of --max-seconds"
        elif left:
            text += f", so the {left} steps to go take {span(per_step * left)}"
        text += "; Ctrl-C saves and --resume goes on." if left else "."
        if not s.quick and trainer.device.type == "cpu":
            text += " For a first look within minutes add --quick."
        return text


class Progress:
    """One line that is rewritten in place on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, total, quiet=False, unit="step", seconds=None):
        """seconds: from now on, after which it ends even if total is not reached."""
        self.total, self.quiet, self.unit, self.tty = total, quiet, unit, sys.stdout.isatty()
        self.end = math.inf if seconds is None else time.monotonic() + seconds
        self.last, self.open = 0.0, False
        self.marks = []                                             # (time, done) of the last 30 s

    def __call__(self, done, details=lambda: "", images=1):
        """done of total; details() -> more words, made only if they are shown; images: per unit."""
        now = time.monotonic()
        self.marks = [m for m in self.marks if m[0] > now - 30][-200:] + [(now, done)]
        if self.quiet or now - self.last < (0.2 if self.tty else 10):
            return
        self.last = now
        (t0, d0), (t1, d1) = self.marks[0], self.marks[-1]
        rate = (d1 - d0) / (t1 - t0) if t1 > t0 else 0
        left = span(max(0, min((self.total - done) / rate, self.end - now))) if rate else "?"
        words = [f"{self.unit} {done}/{self.total}", details(), f"{rate * images:.1f} img/s", f"{left} left"]
        line = "  ".join(filter(None, words))
        print(f"\r{line}\x1b[K" if self.tty else line, end="" if self.tty else "\n", flush=True)
        self.open = self.tty

    def say(self, text):
        if not self.quiet:
            print(("\n" if self.open else "") + text, flush=True)
        self.open = False


class Stop:
    """SIGTERM, Ctrl-C and a terminal that closes finish the step. A second one ends a lone process at once; a launcher
    repeats its signals, so there it does not. A launcher that is gone counts as SIGTERM."""

    def __init__(self):
        self.caught = 0

    @property
    def signal(self):
        alone = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
        return self.caught or int(alone and signal.SIGTERM)

    def __enter__(self):
        self.old = {k: signal.signal(k, self) for k in ending_signals()}
        return self

    def __call__(self, number, frame):
        self.caught = self.caught or int(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self.__exit__()

    def __exit__(self, *exc):
        for k, old in self.old.items():
            signal.signal(k, old)


def ending_signals():
    """SIGTERM, SIGINT, and SIGHUP, which Windows does not have, unless nohup has it ignored."""
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
    return {signal.SIGTERM, signal.SIGINT, *({hangup} if signal.getsignal(hangup) != signal.SIG_IGN else ())}


# ---------------------------------------------------------------------------------------------- the machine
def pick_device(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:          # the second machine's rank 8 has local rank 0
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count()))
        torch.zeros(1, device=device).item()                        # "meta" has no values
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except Exception as e:
        raise UserError(f"--device {name} cannot be used here: {brief(e)}") from e


def set_precision(s, device):
    """Tell torch how to multiply fp32 numbers, and cuDNN to add them in one order, without which no replay of a step
    can be proven equal; returns --precision or the device's default. bf16 is by autocast."""
    precision = s.precision or ("tf32" if device.type == "cuda" else "fp32")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        torch.backends.cudnn.deterministic = True
    elif precision == "tf32":
        raise UserError(f"--precision tf32 is arithmetic of CUDA devices, and the device is {device.type}; "
                        "use fp32 or bf16")
    return precision


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def keep_freed_memory():
    """Let glibc keep what is freed: attention matrices (105 MB each at batch 25) else fault in page by page."""
    with contextlib.suppress(OSError, AttributeError, TypeError):   # another C library, or Windows: nothing to set
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                              # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, 2 ** 31 - 1)                                    # M_TRIM_THRESHOLD: do not shrink the heap


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------- starting processes
OUTER = "OKD_TRAIN_AGENT"       # which torchrun started us, told to the processes that we start ourselves
PARENT = os.getppid()           # who started us; another later where that process is gone


def processes(s):
    """How many processes to start from this one: 1 means none."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or OUTER in os.environ:
        return 1
    if on_log:                                                      # other processes would run this file without it
        if s.nproc not in (None, 1):
            raise UserError(f"--nproc {s.nproc} starts processes that know nothing of on_log; "
                            "start your script by torchrun")
        return 1
    if s.nproc is not None:
        return s.nproc
    if torch.cuda.is_available() and s.device in (None, "cuda"):
        return min(torch.cuda.device_count(), s.groups)
    return min(2, s.groups, cores()) if s.quick and s.device in (None, "cpu") else 1


def launch(n, file, argv, device, hint):
    """Run `file` in n processes on this machine; returns when all are done, or leaves with their exit status.

    device is a name that the processes will try: to try a GPU here as well would hold memory on it. hint: how the work
    goes on after one of them was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    os.environ[OUTER] = agent()
    outer = "((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
    for name in list(os.environ):       # an outer torchrun's would mislead the inner one
        if re.fullmatch(outer, name):
            del os.environ[name]
    if device.split(":")[0] == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // n)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)       # its report would bury our one line
    config = dict(min_nodes=1, max_nodes=1, nproc_per_node=n, run_id=f"okd{os.getpid()}", rdzv_backend="c10d",
                  rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1, start_method="spawn",
                  signals_to_handle=",".join(k.name for k in ending_signals()))
    try:
        with tempfile.TemporaryDirectory(prefix="okd_train_") as logs:    # its own it would leave
            started = elastic_launch(LaunchConfig(**config, logs_specs=DefaultLogsSpecs(logs)), sys.executable)
            started("-u", str(Path(file).resolve()), *argv)
    except SignalException as e:
        raise SystemExit(128 + e.sigval) from None
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"{Path(file).name}: error: rank {rank} was ended by {name}; {hint}", file=sys.stderr)
            raise SystemExit(1) from None
        raise SystemExit(failure.exitcode) from None


def agent():
    """A name for the torchrun that started this process, kept in its store over its restarts; "" without one."""
    if OUTER in os.environ:
        return os.environ[OUTER]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return meet().compare_set("okd/agent", "", uuid.uuid4().hex).decode()      # run ids return in containers


def meet():
    """The store of the launcher, or of rank 0, that all processes know by their environment."""
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        return store
    except (RuntimeError, ValueError) as e:
        at = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(f"the processes cannot meet at {at}: {brief(e)}; start them with torchrun") from e


def check_launcher():
    """Refuse an environment that no launcher sets: sizes run from 1 to WORLD_SIZE, ranks from 0 to one less."""
    world = os.environ.get("WORLD_SIZE", "1")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        value, least = os.environ.get(name, "" if name == "RANK" and world != "1" else None), int(name.endswith("SIZE"))
        if value is not None and not (re.fullmatch("[0-9]{1,9}", value) and least <= int(value) < int(world) + least):
            os.environ.pop("RANK", None)                            # guarded() reads from it who speaks of an error
            raise UserError(f"the environment has {name}={value!r} and WORLD_SIZE={world!r}; torchrun sets them to "
                            "fit, without torchrun unset them")


# ---------------------------------------------------------------------------------------------- errors, words, files
class UserError(Exception):
    """What the user can mend: one line on stderr and exit status 2."""


def one_line(text):
    """Line breaks, terminal commands and what is no text in a file's name, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def brief(error):
    """The message of an exception in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def flag(name):
    """g_lr -> --g-lr."""
    return "--" + name.replace("_", "-")


def span(seconds):
    """'45 s', '12 min', '3.2 h', '4.1 days'."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


def digest(data, size=8):
    """Hash of bytes, an array, or a file's content, of `size` bytes in hexadecimal."""
    return hashlib.blake2b(data.read_bytes() if isinstance(data, Path) else data, digest_size=size).hexdigest()


def beside(name, what="this"):
    """Our own module `name` ("fid", "kernels.attention") from the folder of this file, whatever else is called so.

    UserError, which says that `what` needs it, where it is missing.
    """
    folder = Path(__file__).resolve().parent
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    if not path.is_file():
        raise UserError(f"{what} needs {path.relative_to(folder)} beside {Path(__file__).name}; it is not in {folder}")
    top = name.partition(".")[0]
    with contextlib.suppress(ValueError):                           # a module made by hand, which has no spec
        sys.path.append(str(folder))                                # python -I and -P leave it out
        try:
            found = importlib.util.find_spec(top)                   # found, not run
            places = [found.origin, *(found.submodule_search_locations or [])]
            if any(Path(place).resolve() in (folder / top, folder / f"{top}.py") for place in places if place):
                return importlib.import_module(name)
        finally:
            sys.path.pop()
    name = f"okd_gan.{name}"                                        # another program's module has our name
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@functools.cache
def kernel(name):
    """The module kernels/NAME.py; None where this file was copied without: torch's code then does the same, slower."""
    there = Path(__file__).resolve().parent / "kernels" / f"{name}.py"
    return beside(f"kernels.{name}") if there.is_file() else None


def guarded(program, work):
    """Run work(); what the user can mend becomes a line on stderr and exit status 2, Ctrl-C 130."""
    sys.stderr = sys.stderr or open(os.devnull, "w")                # closed: nobody is to be told
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")           # file names need not be text
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)      # what it warns of is refused
    try:
        if sys.stdout is None:
            raise UserError("stdout is closed; send it to a file, or to /dev/null")
        check_launcher()
        try:
            return work()
        finally:
            flush_stdout()
    except KeyboardInterrupt:
        status, words, late = 130, "interrupted", False
    except (UserError, OSError, UnicodeEncodeError) as e:   # OSError: stdout on a full disk or gone, a long name
        rank = rank_here()
        if isinstance(e, UnicodeEncodeError):
            e = f"the locale has no letters for {e.object!r}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        status, words, late = 2, f"error: {f'rank {rank}: ' if rank else ''}{one_line(e)}", rank > 0
    except RuntimeError as e:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        status, words, late = 1, f"rank {rank_here()} cannot go on: {brief(e)}", True
    leave(program, status, words, late)


def leave(program, status, words, late):
    """End with a line on stderr. late: what this rank met is said only if the launcher does not end it meanwhile, as
    mostly rank 0 says the same, or what this one met is the end of another.

    Outside of any `except`: an error holds the process groups, whose threads are to end before the interpreter does.
    """
    if late:
        time.sleep(LATE)
    print(f"{'' if status != 130 else chr(10)}{program}: {words}", file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):         # with which torchrun's own report of the error ends
        with contextlib.suppress(OSError), open(report, "w") as f:
            made = {"timestamp": str(int(os.fstat(f.fileno()).st_mtime))}           # the earliest counts as the cause
            json.dump({"message": {"message": f"{program}: {words}", "extraInfo": made}}, f)
    if dist.is_initialized() and "nccl" not in str(dist.get_backend_config()):      # whose end might wait for others
        dist.destroy_process_group()
    raise SystemExit(status)


def flush_stdout():
    """Write what is in its buffer, or raise OSError; the interpreter, as it ends, finds nothing that it could not."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def rank_here():
    return int(os.environ.get("RANK", 0))


def run(argv):
    s, script, named = parse(argv)
    changed = settle(s, script, named)
    n = processes(s)
    if n > 1:
        gpus = torch.cuda.is_available()
        why = f"--nproc {n}" if s.nproc is not None else "one per GPU" if gpus else "quicker than one at this size"
        print(f"Starting {n} processes on this machine: {why} (--nproc 1 forbids).", flush=True)
        launch(n, __file__, argv, s.device or ("cuda" if gpus else "cpu"), "--resume goes on from the last checkpoint")
        return
    with Lock(s.out) as lock:
        train(s, script, named, changed, lock)


def main(argv=None):
    guarded("okd_train.py", lambda: run(sys.argv[1:] if argv is None else argv))


def as_program(main):
    """main() as the whole of a process. One rank of several ends without the interpreter's own end: threads of torch
    that are on their way out may call abort() in it."""
    status = 0
    try:
        main()
    except SystemExit as e:
        status = e.code or 0
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    as_program(main)
