"""Is this machine ready for a run, and how fast is a training step on it?

    python bench.py --check --data crops/               # ok, note and FAIL lines, then "ready", or why not and status 1
    python bench.py --model sagan --groups 3            # a step of these settings by phase, its arithmetic counted
    python bench.py --groups 3 --timed 50 --json        # the same over 50 steps, as one JSON object
    python bench.py --obvious --rounds 2                # our step and the one that one would write first, in turns

Every flag of okd_train.py is taken, so that the step is that of your run. Nothing is trained, and nothing is left
behind. What single levers are worth and how the cost grows is measured by tests/bench_step.py.

Times are medians, with 20 % and 80 % quantiles. A phase is timed by waiting for the device before and after it, so on a
GPU the phases add up to more than a step. The floor is the counted arithmetic at the rate that this machine reaches, in
this precision, in one large matrix product or in the model's own convolutions. --check trains, resumes and samples with
two groups for a moment, in a temporary folder, and adds up what the whole run will write.
"""
import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while torch is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

try:
    import resource
except ImportError:             # Windows: how much memory was held is not known there
    resource = None

HERE = Path(__file__).resolve().parent
okd_train = None                # this file was copied alone: --help still works
if (HERE / "okd_train.py").is_file():
    sys.path.insert(0, str(HERE))
    import okd_train
    sys.path.remove(str(HERE))

# ---------------------------------------------------------------------------------------------- settings
WARM_UP = 3                     # steps before any that is timed: libraries, kernels and Adam make what they need
PAPERS_STEPS = 50000
MOST = 10 ** 6                  # timed steps or rounds: a bound against slips
# Of the trainer's flags those that change nothing about a step.
NOT_TIMED = {"out", "resume", "steps", "epochs", "max_seconds", "log_every", "sample_every", "save_every", "fid_every",
             "nproc"}
# Packages that a run can do without, and what then is not as it could be.
MAY_MISS = {"scipy": "fid.py needs it to score thousands of images", "pytest": "only the tests need it",
            "triton": "attention on a GPU is eager without it"}


# ---------------------------------------------------------------------------------------------- a step, measured
def measure(s, script, n):
    """How fast a step of these settings is on this machine over n steps, and against what: a dict of numbers."""
    okd_train.keep_freed_memory()
    device = okd_train.pick_device(s.device)
    precision = okd_train.set_precision(s, device)
    flops, operations = count_work(script, s)   # before, as another trainer's steps say how attention is launched
    trainer = make_trainer(s, script, device)
    okd_train.probe(script, s, trainer.groups[0])
    for _ in range(WARM_UP):
        trainer.step()
    step, clock, busy = functools.partial(step_eagerly, trainer), Clock(device), None
    eager = quantiles(clock.pace(step, n))
    peak = peak_memory(device)
    phases = time_phases(trainer, step, n)
    matmul, convolutions = machine_rates(trainer, 10)
    if device.type == "cuda":
        operations, busy = gpu_trace(step, 5)
    graph = time_graph(trainer, clock, n)       # last, as its steps have no phases
    if graph:
        peak, busy = peak_memory(device), gpu_trace(trainer.step, 20)[1]
    seconds = (graph or eager)[1]
    name = okd_train.describe(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    off = "--cuda-graph off" if s.cuda_graph == "off" else "kernels/cuda_graph.py is missing"
    return {
        "model": script.name, "groups": s.groups, "batch_size": s.batch_size, "image_size": s.image_size,
        "precision": precision, "steps": n, "device": name, "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "step_seconds": seconds, "eager_seconds": eager,
        "graph_seconds": graph, "graph_note": trainer.graph_note or f"Steps run eagerly: {off}.",
        "phase_seconds": phases, "images_per_second": s.groups * s.batch_size / seconds, "peak_memory_bytes": peak,
        "launches_per_step": operations, "gpu_busy_share": busy, "flops_per_step": flops,
        "matmul_flops_per_second": matmul, "convolution_flops_per_second": convolutions,
        "floor_share": flops / max(matmul, convolutions) / seconds, "seconds_for_50000_steps": PAPERS_STEPS * seconds}


def make_trainer(s, script, device):
    """The trainer of a run with these settings, in this process, on its data."""
    ranks = okd_train.Ranks(s.groups, s.batch_size, device)
    data = okd_train.shared_data(s, script, set(), device, ranks, lambda text: None)
    return okd_train.Trainer(script, s, data, device, ranks)


def step_eagerly(trainer):
    """Trainer.step() where it replays no graph."""
    trainer.given.put(trainer.next_inputs())
    trainer.eager()
    trainer.step_count += 1


def time_phases(trainer, step, n):
    """{phase: its quantiles in seconds}; "rest" is what no phase took."""
    clock = Clock(trainer.device)
    clock.watch(trainer, "next_inputs", "inputs")
    clock.watch(trainer.given, "put", "inputs")
    clock.watch(trainer, "generate", "generators forward")
    clock.watch(trainer, "learn_critic", lambda g, role, *more: "discriminators" if role == "D" else "connectors")
    clock.watch(trainer, "learn_generator", "generators learning")
    for g in trainer.groups:
        clock.watch(g, "average", "averages")
        for net in g.nets.values():
            clock.watch(net.opt, "step", "Adam")
    clock.times(step, n)
    clock.unwatch()
    names = dict.fromkeys(name for row in clock.rows for name in row)
    return {name: quantiles([row.get(name, 0.0) for row in clock.rows]) for name in names}


def time_graph(trainer, clock, n):
    """Quantiles of n steps as a CUDA graph, in seconds; None where steps stay eager. Peak memory counts from here."""
    graph = trainer.graph
    if graph is None or graph.why:
        return None
    torch.cuda.reset_peak_memory_stats(trainer.device)      # a graph takes its memory while it is captured
    graph.capture(key=bool(trainer.s.rho))
    if not graph.graphs:
        return None
    clock.pace(trainer.step, 2)
    return quantiles(clock.pace(trainer.step, n))


def quantiles(values):
    return [float(v) for v in np.percentile(values, (20, 50, 80))]


def print_table(r):
    """The numbers of measure() for people."""
    def line(name, values):
        low, middle, high = (1e3 * v for v in values)
        print(f"{name:22}{middle:12.2f}{low:10.2f}{high:10.2f}{values[1] / whole:9.0%}")

    gpu = r["gpu_busy_share"] is not None
    whole = sum(values[1] for values in r["phase_seconds"].values())     # more than a step where phases are waited for
    print(f"{r['model']}, groups {r['groups']}, batch {r['batch_size']}, {r['image_size']}x{r['image_size']}, "
          f"{r['precision']}, on {r['device']}, torch {r['torch']}, {r['date']}")
    print(f"{'milliseconds':22}{'median':>12}{'20 %':>10}{'80 %':>10}{'share':>9}")
    for name, values in r["phase_seconds"].items():
        line(name, values)
    line("step, eager", r["eager_seconds"])
    if r["graph_seconds"]:
        line("step, CUDA graph", r["graph_seconds"])
    print(r["graph_note"])
    peak = f"; peak memory {r['peak_memory_bytes'] / 2 ** 30:.2f} GiB" if r["peak_memory_bytes"] else ""
    print(f"{r['images_per_second']:.1f} images/s made and learnt from, all groups{peak}")
    what = "GPU operations" if gpu else "operations, on a GPU at least as many launches,"
    busy = f", GPU busy {r['gpu_busy_share']:.0%} of the time" if gpu else ""
    print(f"{r['launches_per_step']:.0f} {what} in an eager step{busy}")
    flops, matmul, convolutions = (r[k] for k in ("flops_per_step", "matmul_flops_per_second",
                                                  "convolution_flops_per_second"))
    print(f"{flops / 1e9:.1f} GFLOP a step; this machine: {matmul / 1e9:.0f} GFLOP/s in a matrix product, "
          f"{convolutions / 1e9:.0f} in these convolutions")
    print(f"at the better of the two a step would take {flops / max(matmul, convolutions) * 1e3:.1f} ms: "
          f"{r['floor_share']:.0%} of that rate is reached")
    print(f"The paper's {PAPERS_STEPS:,} steps take {okd_train.span(r['seconds_for_50000_steps'])}.")


# ---------------------------------------------------------------------------------------------- instruments
class Clock:
    """Times steps, and named phases of a step; one inside another counts for itself alone."""

    def __init__(self, device):
        self.device = device
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.rows, self.inner, self.watched = [], [], []

    def watch(self, owner, method, phase):
        """Replace owner.method by one that is timed as `phase` (a name, or a function of the arguments)."""
        f = getattr(owner, method)

        def timed(*args, **more):
            self.wait()
            begin = time.perf_counter()
            self.inner.append(0.0)
            out = f(*args, **more)
            self.wait()
            took = time.perf_counter() - begin
            name = phase(*args) if callable(phase) else phase
            self.rows[-1][name] = self.rows[-1].get(name, 0.0) + took - self.inner.pop()
            if self.inner:
                self.inner[-1] += took
            return out
        setattr(owner, method, timed)
        self.watched.append((owner, method))

    def unwatch(self):
        """Give every owner its class's method back: a CUDA graph must not be captured with waits inside."""
        for owner, method in self.watched:
            delattr(owner, method)
        self.watched.clear()

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
        """Seconds of n steps, one by one, as training makes them: the host goes ahead of a GPU and does not wait."""
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
    """Counts what is asked of a GPU: operations that are no views, a convolution's bias and each of its gradients
    apart, and their arithmetic by torch's formulas.

    (torch's own FlopCounterMode fails on the derivative of a leaf, which a penalty takes.)
    """

    IDLE = "empty", "_unsafe_view", "_record_function"              # beginnings of names

    def __init__(self):
        super().__init__()
        self.n = self.flops = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, packet = f(*args, **(kwargs or {})), f.overloadpacket
        name = packet.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in f._schema.returns)
        if name == "convolution_backward":
            self.n += sum(args[10])                                 # of image, weight and bias those that are wanted
        elif not view and not name.startswith(self.IDLE):
            self.n += 1 + (name == "convolution" and args[2] is not None)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def count_work(script, s):
    """(floating-point operations, operations launched) of one step, counted on the CPU but with eager attention, and
    norms of weights made together as on a GPU.

    Counted at batch 2 with two groups: arithmetic is proportional to the batch and to the groups. UserError.
    """
    less = {"batch_size": 2, "groups": min(s.groups, 2), "precision": "fp32", "cuda_graph": "off"}
    few, cpu = argparse.Namespace(**{**vars(s), **less}), torch.device("cpu")
    images = torch.zeros(4, 3, s.image_size, s.image_size, dtype=torch.uint8)
    data = okd_train.Data(images, torch.zeros(4, dtype=torch.int64), [], few, cpu)
    trainer = okd_train.Trainer(script, few, data, cpu)
    norms, attention = okd_train.kernel("spectral_norm"), okd_train.kernel("attention")
    for net in (net for g in trainer.groups if norms for net in g.nets.values()):
        net.normed = norms.SpectralNorms(net.net)
    okd_train.probe(script, few, trainer.groups[0])
    trainer.step()
    fused = attention and attention.FUSED_FROM_N
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
    """Operations per second of this machine in this precision: (in a square matrix product, the best of n; in the
    convolutions of G and D, forward and backward)."""
    clock, kind = Clock(trainer.device), torch.bfloat16 if trainer.s.precision == "bf16" else torch.float32
    make = functools.partial(torch.randn, device=trainer.device, dtype=kind)
    size = 4096 if trainer.device.type == "cuda" else 1024
    a, b = make(size, size), make(size, size)
    clock.times(lambda: a @ b, 2)
    matmul = 2 * size ** 3 / min(clock.times(lambda: a @ b, n))
    flops = seconds = 0
    for m, shape_in, shape_out in convolutions_of(trainer):
        x, grad, w = make(*shape_in), make(*shape_out), m.weight.detach().to(kind)
        transposed = isinstance(m, torch.nn.ConvTranspose2d)
        how = (m.stride, m.padding, m.dilation, transposed, m.output_padding, m.groups)

        def both():
            torch.convolution(x, w, None, *how)
            torch.ops.aten.convolution_backward(grad, x, w, None, *how, [True, True, False])
        with Operations() as count:
            both()
        flops, seconds = flops + count.flops, seconds + min(clock.times(both, 3))
    return matmul, flops / seconds if seconds else 0.0


def convolutions_of(trainer):
    """[(layer, shape of its input, shape of its output)] for each call of a convolution of G and D in a step."""
    calls, hooks = [], []
    for m in (m for role in "GD" for m in trainer.groups[0].nets[role].net.modules()):
        if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            hooks.append(m.register_forward_hook(lambda m, x, out: calls.append((m, x[0].shape, out.shape))))
    trainer.eager()
    for hook in hooks:
        hook.remove()
    return calls


def gpu_trace(step, n):
    """(GPU operations per step, share of the time in which the GPU did something) over n steps, from the profiler."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as p:
        begin = time.perf_counter()
        for _ in range(n):
            step()
        torch.cuda.synchronize()
        took = time.perf_counter() - begin
    cuda = torch.autograd.DeviceType.CUDA
    spans = sorted((e.time_range.start, e.time_range.end) for e in p.events() if e.device_type == cuda)
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


# ---------------------------------------------------------------------------------------------- the obvious loop
def obvious_step(t, detach=False):
    """The step as one would write it first, on the networks, optimisers and inputs of the trainer t.

    A fresh generator forward for every use, critics that are not frozen while G learns, groups one after the other;
    fakes go undetached to the critics unless `detach`. One critic step, no autocast.
    """
    t.given.put(t.next_inputs())
    d, f, settings = t.given.plan[0], t.script, t.settings
    labels = (d["y"],) if f.conditional else ()
    nets = {g.i: {role: n.net for role, n in g.nets.items()} for g in t.groups}

    def fakes(G):
        x = G(d["z"], *labels)
        return x.detach() if detach else x

    def update(g, role, loss):
        optimiser = g.nets[role].opt
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    for g in t.groups:
        own, eps = nets[g.i], {role: {"eps": d[role, g.i]} for role in "DC" if (role, g.i) in d}
        real = t.data.batch(d["idx", g.i], d.get(("flip", g.i)), d.get(("upend", g.i)))
        y_real = (t.data.labels[d["idx", g.i]],) if f.conditional else ()
        loss = f.discriminator_loss(own["D"], real, fakes(own["G"]), *y_real, *labels,
                                    **settings["D"], **eps.get("D", {}))
        update(g, "D", okd_train.with_logs(loss)[0])
        if "C" in own:
            neighbour = nets[okd_train.neighbour(g.i, t.s.groups)]
            loss = f.connector_loss(own["C"], fakes(neighbour["G"]), fakes(own["G"]), *labels, *labels,
                                    **settings["C"], **eps.get("C", {}))
            update(g, "C", okd_train.with_logs(loss)[0])
        fake = own["G"](d["z"], *labels)
        loss, _ = okd_train.with_logs(f.generator_loss(own["D"], fake, *labels, **settings["G"]))
        if "C" in own:
            judged, _ = okd_train.with_logs(f.generator_loss(own["C"], fake, *labels, **settings["G"]))
            loss = loss + d["rho"] * judged
        update(g, "G", loss)
        g.average(d["pace"])
    t.step_count += 1


def use_torch_alone(script):
    """Torch's own attention, convolutions and layout in the networks that are made from now on, for obvious_step."""
    if attention := okd_train.kernel("attention"):
        script.Generator.forward.__globals__["self_attention"] = attention.attention
    use_torch_convolutions()
    script.channels_last = False


def use_torch_convolutions():
    kernel = okd_train.kernel
    okd_train.kernel = lambda name: None if name == "convolution" else kernel(name)


def run_variant(name, s, script, n):
    """Time "ours" or "obvious", in a process of its own."""
    device = okd_train.pick_device(s.device)
    okd_train.set_precision(s, device)
    if name == "obvious":
        use_torch_alone(script)
    else:
        okd_train.keep_freed_memory()
    trainer = make_trainer(s, script, device)
    print_variant(device, trainer.step if name == "ours" else functools.partial(obvious_step, trainer), n)


def print_variant(device, step, n):
    """Print median seconds and most bytes held over n steps, after some to warm up: what compare() reads."""
    graph = okd_train.kernel("cuda_graph")      # a captured step begins after its own warm-up
    for _ in range((graph.WARM_UP if graph else WARM_UP) + 2 if device.type == "cuda" else 1):
        step()
    seconds = statistics.median(Clock(device).pace(step, n))
    print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak_memory(device) or math.nan}))


def compare(variants, rounds, command, about={}):
    """Run `command --variant NAME` for "ours" and each of `variants`, in turns (A B A B), and print a row for each.

    Rows: median seconds of a step, the ratio of ours to it (pair by pair, median), the most memory; about: {name:
    words}. A row is printed as soon as it is known, for who must stop early.
    """
    names = list(dict.fromkeys(["ours", *variants]))
    width = max(15, *map(len, names))
    seen = {name: [] for name in names}
    print(f"{'variant':{width}} {'s/step':>8} {'ours/it':>8} {'peak GB':>8}", flush=True)
    for k in range(rounds):
        for name in names:
            seen[name].append(result([*command, f"--variant={name}"]))
            if k < rounds - 1:
                continue
            seconds = [row["seconds"] for row in seen[name]]
            ratio = statistics.median(ours["seconds"] / own for ours, own in zip(seen["ours"], seconds))
            peak = max(row["peak_memory_bytes"] for row in seen[name]) / 1e9
            row = f"{name:{width}} {statistics.median(seconds):8.3f} {ratio:8.3f} {peak:8.2f}  {about.get(name, '')}"
            print(row.rstrip(), flush=True)


def result(command):
    """What a process printed, as JSON; UserError with its last words where it failed."""
    p = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if p.returncode:
        last = (p.stderr.strip().splitlines() or ["no word"])[-1]
        raise okd_train.UserError(f"{Path(command[0]).name} {command[-1]} failed: {last}")
    return json.loads(p.stdout)


# ---------------------------------------------------------------------------------------------- is this machine ready?
@dataclass
class Plan:
    """The run that is asked about, and what the checks find out for one another."""
    s: argparse.Namespace
    script: object
    device: torch.device
    folder: Path                                    # a temporary one
    images: int = 500                               # in --data; 500 is the synthetic set
    sizes: dict = field(default_factory=dict)       # bytes that a group, a line or a generator takes in the run folder


def check(s, script):
    """Print a line for everything a run with these settings needs, then "ready" or "not ready: ..."; returns the exit
    status, 0 or 1.

    Each check yields (state, what, detail): ok, note (works, but know it) or FAIL (training as asked would stop).
    """
    checks = (check_packages, check_devices, check_attention, check_processes, check_scores, check_data,
              check_training, check_resume, check_sampling, check_out)
    failed, device, level = {}, torch.device("cpu"), logging.root.manager.disable

    def tell(state, what, detail):
        print(f"{state:4}  {what:12}  {okd_train.one_line(detail)}", flush=True)
        if state == "FAIL":
            failed[what] = True

    try:
        device = okd_train.pick_device(s.device)
    except okd_train.UserError as e:
        tell("FAIL", "device", e)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="okd_check_") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = Plan(s, script, device, Path(folder))
        for look in checks:
            try:
                for line in look(plan):
                    tell(*line)
            except (Exception, SystemExit) as e:
                if getattr(e, "code", None) in (130, 143):          # Ctrl-C while it trained
                    raise
                words = e if isinstance(e, okd_train.UserError) else f"{type(e).__name__} {e}"
                tell("FAIL", look.__name__.removeprefix("check_"), words)
    logging.disable(level)
    busy = "several GPUs are" if device.type == "cuda" else "it is while other programs run"
    print(f"Not checked: {s.groups} groups at once in memory, other machines, and how fast {busy}.")
    print(f"not ready: {', '.join(failed)}" if failed else "ready")
    return int(bool(failed))


def check_packages(plan):
    yield "ok", "python", sys.version.split()[0]
    numbers = lambda text: [int(k) for k in re.findall(r"\d+", text)[:3]]
    file, fine = HERE / "requirements.txt", []
    if not file.exists():
        yield "note", "packages", (f"torch {torch.__version__}, numpy {np.__version__}; requirements.txt is not beside "
                                   "bench.py, so versions were not compared")
        return
    for name, low, high, only in re.findall(r"^(\w+)>=([\d.]+)(?:,<([\d.]+))?(.*)", file.read_text(), re.M):
        if "Linux" in only and sys.platform != "linux":
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or numbers(found) < numbers(low):
            wrong = f"{found} is older than {low}" if found else "not installed"
            yield ("note" if name in MAY_MISS else "FAIL", name,
                   f"{wrong}; {MAY_MISS.get(name, 'needed')} (pip install -r requirements.txt)")
        elif high and numbers(found) >= numbers(high):
            yield "note", name, f"{found} is newer than what was tested, below {high}"
        else:
            fine.append(f"{name} {found}")
    yield "ok", "packages", ", ".join(fine)


def check_devices(plan):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    with contextlib.suppress(OSError, ValueError):                  # a container may allow less than the machine has
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    memory = f", memory {memory / 2 ** 30:.1f} GB" if memory else ""
    yield "ok", "cpu", f"cores {okd_train.cores()}, threads {torch.get_num_threads()}{memory}"
    for k in range(torch.cuda.device_count()):
        d = torch.cuda.get_device_properties(k)
        new = d.major >= 8
        yield ("ok" if new else "note", f"cuda:{k}",
               f"{d.name}, {d.total_memory / 2 ** 30:.1f} GB, compute capability {d.major}.{d.minor}"
               + ("" if new else "; attention is eager below 8.0"))
    if plan.device.type == "cuda":
        yield "ok", "device", str(plan.device)
    else:
        yield "note", "device", f"{plan.device}; at full size a step takes seconds there, --quick is for it"


def check_attention(plan):
    """Attention and its first and second derivatives on this device, against float64."""
    try:
        kernel = okd_train.beside("kernels.attention", "fused attention")
    except (ImportError, okd_train.UserError) as e:
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

    cuda = plan.device.type == "cuda"
    why = kernel.refusal(qkv[0].to(plan.device, torch.float32)) if cuda else "no GPU is used"
    ours = functools.partial(kernel.self_attention, impl="eager" if why else "triton")
    exact = derivatives(kernel.attention, "cpu", torch.float64)
    found = derivatives(ours, plan.device, torch.float32)
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact))
    bad = not error < 1e-3                  # float32 has 1e-6 here; a wrong derivative is off by 1
    hint = "; the kernels are wrong on this device: delete kernels/ and sagan.py takes its own two lines" if bad else ""
    yield ("FAIL" if bad else "note" if why and cuda else "ok", "attention",
           f"{f'eager ({why})' if why else 'triton'}; forward, backward and double backward differ from float64 by "
           f"{error:.1e}{hint}")


PAIR = """
import sys, torch, torch.distributed as dist
dist.init_process_group(sys.argv[1])
x = torch.ones(1000, device=f"cuda:{dist.get_rank()}" if sys.argv[1] == "nccl" else "cpu")
dist.all_reduce(x)
assert x.sum().item() == 1000 * dist.get_world_size()
dist.destroy_process_group()
"""


def check_processes(plan):
    """Two processes that add something up, by each backend that a run here may use."""
    backends = ["gloo"] + ["nccl"] * (torch.cuda.device_count() > 1 and dist.is_nccl_available())
    for backend in backends:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
        start = functools.partial(subprocess.Popen, [sys.executable, "-c", PAIR, backend],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        pair = [start(env=dict(env, RANK=str(rank))) for rank in range(2)]
        try:
            said = "".join(p.communicate(timeout=30)[1] for p in pair)
        except subprocess.TimeoutExpired:
            said = "no answer within 30 s"
        finally:
            for p in pair:
                p.kill()
                p.wait()
        if any(p.returncode for p in pair):
            last = (said.strip() or "?").splitlines()[-1][:200]
            yield ("FAIL" if okd_train.processes(plan.s) > 1 else "note", backend,
                   f"2 processes on this machine failed: {last}; train with --nproc 1")
        else:
            yield "ok", backend, "2 processes on this machine add up"


def check_scores(plan):
    s = plan.s
    wanted = s.fid_every and s.fid_features == "inception"
    fid = okd_train.beside("fid", "reading images and scoring")
    try:
        yield "ok", "FID weights", str(fid.find_weights(download=False))
    except fid.FidError as e:
        yield "FAIL" if wanted else "note", "FID weights", f"{e}; --fid-features random needs none"
    if s.fid_every and s.fid_features.endswith(".py"):
        try:
            yield "ok", "features", fid.network(s.fid_features, device="cpu").score
        except fid.FidError as e:
            yield "FAIL", "features", str(e)
    if s.fid_every and s.fid_data:
        files, _ = okd_train.class_files(s.fid_data, False)
        yield "ok", "scores", f"against {len(files)} images of {s.fid_data}"


def check_data(plan):
    """Opens at most 1000 images, evenly spread; leaves the number of all in plan.images."""
    s, size, fid = plan.s, plan.s.image_size, okd_train.beside("fid", "reading images")
    if not s.data:
        yield "note", "data", "no --data: 500 synthetic images, drawn by synthetic.py; good for a first look only"
        return
    files, _ = okd_train.class_files(s.data, False)
    some, classes = files[::math.ceil(len(files) / 1000)], {c for _, c in files}
    if plan.script.conditional and (len(classes) < 2 or None in classes):
        yield "FAIL", "data", (f"{s.data}: {plan.script.name} needs every image in one of two or more class folders; "
                               f"there are {len(classes - {None})}")

    rule = fid.Rule(s.range and tuple(s.range), bool(s.range), s.upright)

    def small(path):
        try:
            fid.read_square(path, size, rule)
            with Image.open(path) as im:
                return min(im.size) < size
        except Exception:
            return path

    with ThreadPoolExecutor(min(8, okd_train.cores())) as pool:
        found = list(pool.map(small, [path for path, _ in some]))
    bad = [path for path in found if isinstance(path, Path)]
    plan.images = len(files) - len(bad) * s.skip_bad
    in_classes = f" in {len(classes)} classes" if plan.script.conditional else ""
    opened = "" if some == files else f"; {len(some)} of them were opened"
    yield "ok" if some == files else "note", "data", (
        f"{len(files)} images of {s.data}{in_classes}, {plan.images * 3 * size ** 2 / 2 ** 20:.0f} MB at "
        f"{size}x{size}{opened}")
    if bad:
        hint = "" if s.skip_bad else " (mend or remove them, or --skip-bad)"
        yield ("note" if s.skip_bad else "FAIL", "data",
               f"{len(bad)} unreadable, such as {', '.join(map(str, bad[:3]))}{hint}")
    if True in found:
        yield "note", "data", f"{found.count(True)} images have a side below {size} and are enlarged"
    if plan.images < s.batch_size:
        yield "FAIL", "data", f"{plan.images} images are fewer than one batch (--batch-size {s.batch_size})"


def short_run(plan, name, steps, **changed):
    """Train for real, with at most two groups on images of noise -> (settings, run folder)."""
    s, data = plan.s, plan.folder / "data"
    if not data.exists():
        r = np.random.default_rng(0)
        for k in range(max(s.batch_size, 20)):
            place = data / "ab"[k % 2]
            place.mkdir(parents=True, exist_ok=True)
            noise = r.integers(0, 256, (s.image_size, s.image_size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(place / f"{k}.png", compress_level=0)
    t = argparse.Namespace(**{**vars(s), "groups": min(s.groups, 2), "data": str(data), "out": str(plan.folder / name),
                              "steps": steps, "epochs": None, "max_seconds": None, "fid_every": None, "nproc": None,
                              "resume": False, "log_every": 1, "sample_every": 10 ** 9, "save_every": 10 ** 9,
                              "device": str(plan.device), **changed})
    with contextlib.redirect_stdout(io.StringIO()), okd_train.Lock(t.out) as lock:
        okd_train.train(t, plan.script, set(), {}, lock)
    return t, Path(t.out)


def check_training(plan):
    """Two steps; the sizes of what they wrote go to plan.sizes."""
    s = plan.s
    t, out = short_run(plan, "timed", 2)
    lines = okd_train.read_lines(out / "log.jsonl")
    per_step = lines[1]["seconds"] - lines[0]["seconds"]            # the first step also warms up
    size = lambda name: (out / name).stat().st_size
    plan.sizes = {"checkpoint": size("checkpoint.pt") / t.groups, "generator": size("G1.pt"),
                  "picture": size("samples/step_000002.png") / t.groups,
                  "line": size("log.jsonl") / len(lines) / t.groups}
    peak = peak_memory(plan.device)
    peak = f", peak memory {peak / 2 ** 30:.2f} GB" if peak else ""
    whole = okd_train.span(per_step / t.groups * s.groups * s.steps)
    yield "ok", "training", (
        f"{plan.script.name}, {t.groups} of {s.groups} groups: {per_step:.3g} s a step (batch {t.batch_size}, "
        f"{t.image_size}x{t.image_size}){peak}; {s.steps} steps of {s.groups} groups one after the other take {whole}")


def check_resume(plan):
    """Three steps at one go, and two with one more after a resume. Leaves the run in the folder "whole"."""
    if not plan.sizes:                                              # training failed, and has said so
        return
    few = min(plan.s.batch_size, 4)                                 # for six steps it need not be full
    _, whole = short_run(plan, "whole", 3, batch_size=few)
    short_run(plan, "parts", 2, batch_size=few)
    _, parts = short_run(plan, "parts", 3, batch_size=few, resume=True)
    states = (okd_train.load_file(out / "checkpoint.pt") for out in (whole, parts))
    (a, kind_a), (b, kind_b) = map(torch.utils._pytree.tree_flatten, states)
    if kind_a == kind_b and all(map(np.array_equal, a, b)):
        yield "ok", "resume", "saved after 2 steps, resumed to 3: bit for bit the checkpoint of 3 steps at one go"
    else:
        yield ("note" if plan.device.type == "cuda" else "FAIL", "resume",
               "saved after 2 steps, resumed to 3: not bit for bit the checkpoint of 3 steps at one go (promised on "
               "the CPU only)")


def check_sampling(plan):
    """Two images from each generator that check_resume has saved."""
    if not plan.sizes:
        return
    files = sorted((plan.folder / "whole").glob("G?.pt"))
    found, size = 0, plan.s.image_size
    for path in files:
        G = okd_train.load_generator(path, plan.device, str(plan.script.path))
        z = okd_train.draw(0, 0, 0, "check", "normal", (2, plan.s.z_dim))
        images = okd_train.generate(G, z, torch.zeros(2, dtype=torch.int64) if plan.script.conditional else None)
        found += sum(image.shape == (size, size, 3) for image in images)
    wanted = 2 * min(plan.s.groups, 2)
    yield "ok" if found == wanted else "FAIL", "sampling", f"{found} of {wanted} images drawn by the saved generators"


def check_out(plan):
    """Room in --out against what the whole run writes: the sizes of check_training times the settings."""
    s, sizes, out = plan.s, plan.sizes, Path(plan.s.out)
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield "FAIL", "out", f"{place} is no folder that can be written to; name another with --out"
        return
    if not s.resume and okd_train.holds_run(out):
        yield "FAIL", "out", f"{out} already holds a run: go on with --resume, or name another folder with --out"
        return
    if not sizes:
        yield "note", "out", "room not checked, as training failed"
        return
    steps = s.steps if s.epochs is None else math.ceil(s.epochs * plan.images / (s.batch_size * s.n_critic))
    per_group = sizes["generator"] + 2 * sizes["checkpoint"]
    per_group += sizes["picture"] * math.ceil(steps / s.sample_every) + sizes["line"] * (1 + steps // s.log_every)
    need = s.groups * per_group + sizes["generator"] + 2 * sizes["picture"]     # a G1.pt being replaced, and real.png
    if s.fid_every:
        need += sizes["generator"] * s.groups + plan.images * 4 * 2048
    free = shutil.disk_usage(place).free
    hint = "; free some, or name another disk with --out" if free < need else ""
    yield "FAIL" if free < need else "ok", "out", (
        f"{out}: {free / 2 ** 30:.2f} GB free; {steps} steps write {need / 2 ** 30:.2f} GB at most, of it the "
        f"checkpoint {sizes['checkpoint'] * s.groups / 2 ** 20:.0f} MB, twice while it is replaced{hint}")


# ---------------------------------------------------------------------------------------------- command line
def own_flags(p):
    """What bench.py takes beside the flags of okd_train.py."""
    p.add_argument("--check", action="store_true",
                   help="is this machine ready for a run with these settings? Exit status 0 or 1")
    p.add_argument("--timed", type=natural, default=10, metavar="K", help="steps that are timed (default 10)")
    p.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    p.add_argument("--obvious", action="store_true", help="time the obvious loop beside ours, in turns")
    p.add_argument("--rounds", type=natural, default=2, metavar="K", help="turns of --obvious (default 2)")
    p.add_argument("--variant", choices=("ours", "obvious"), help=argparse.SUPPRESS)     # one process of --obvious


OWN = "check", "timed", "json", "obvious", "rounds", "variant"
# What each kind of work reads of these; the first that is asked for is done.
READS = {"check": {"check"}, "variant": set(OWN), "obvious": {"obvious", "rounds", "timed"},
         "table": {"timed", "json"}}


def natural(text):
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= MOST):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MOST}")
    return int(text)


def arguments(argv):
    """argv -> (work, bench.py's own settings, those of the run, the run's script). UserError."""
    s, script, named = okd_train.parse(argv, "bench.py", __doc__, own_flags)
    own = argparse.Namespace(**{name: vars(s).pop(name) for name in OWN})
    work = next((name for name in READS if getattr(own, name, None)), "table")
    idle = named & (set(OWN) - READS[work])
    if work != "check":
        idle |= named & NOT_TIMED
    if idle:
        words = "when a step is timed" if work == "table" else f"with {okd_train.flag(work)}"
        hint = "; how many steps are timed is --timed" if "steps" in idle else ""
        raise okd_train.UserError(f"{', '.join(map(okd_train.flag, sorted(idle)))}: without effect {words}{hint}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise okd_train.UserError("bench.py is one process: start it with python, not with torchrun")
    okd_train.settle(s, script, named)
    if own.obvious and (s.n_critic > 1 or s.precision == "bf16"):
        raise okd_train.UserError("--obvious: that loop has one critic step and no autocast; leave out --n-critic and "
                                  "--precision bf16")
    return work, own, s, script


def run(argv):
    work, own, s, script = arguments(argv)
    if work == "check":
        if check(s, script):
            raise SystemExit(1)
    elif work == "variant":
        run_variant(own.variant, s, script, own.timed)
    elif work == "obvious":
        compare(["obvious"], own.rounds, [__file__, *argv], {"obvious": "as one would write it first"})
    else:
        r = measure(s, script, own.timed)
        print(json.dumps(r)) if own.json else print_table(r)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if okd_train:
        okd_train.guarded("bench.py", lambda: run(argv))
    elif {"-h", "--help"} & set(argv):
        p = argparse.ArgumentParser("bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
        own_flags(p)
        p.print_help()
    else:
        print("bench.py: error: timing a step needs okd_train.py beside bench.py", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    main()
