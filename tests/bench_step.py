"""What each lever of the training step is worth, and how its cost grows: tables of tests/README.md.

    python tests/bench_step.py --rounds 1 --timed 3     # ours less one lever, or with one more: about fifteen minutes
    python tests/bench_step.py --timed 30               # on a GPU, where a step takes milliseconds: other levers
    python tests/bench_step.py --variants "ours,-cached,+in place" --rounds 3
    python tests/bench_step.py --variants obvious,detached      # the loop that one would write first
    python tests/bench_step.py --growth --timed 1       # groups, batch and image size, by bench.py --json

Every variant runs in a process of its own, in turns with ours, on the same networks, data and losses; all flags of
okd_train.py are taken. bench.py has the instruments, and says what the columns mean.
"""
import argparse
import contextlib
import functools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import okd_train

WHOLE = {
    "obvious": "a fresh generator forward for every use, fakes not detached, critics not frozen, torch alone",
    "detached": "the same with fakes detached",
}
LEVERS = {
    "-allocator": "freed memory goes back to the system after every use (glibc's default)",
    "-convolution": "torch's second derivative of a convolution (no kernels/convolution.py)",
    "-one pass": "D scores real and fake in two passes",
    "-freezing": "D and C not frozen while G learns; backward(inputs=...) still leaves their weight gradients out",
    "-one forward": "three generator passes a group and step in place of one",
    "-cached": "a power iteration of the spectral norm at every use of a weight",
    "-fused adam": "torch's default Adam on the CPU, a loop over tensors",
    "-fused attention": "attention of G by autograd in blocks of four images (MKL's products, P kept)",
    "-blocks": "attention of G by autograd in one piece of 105 MB",
    "-channels last": "networks and images in torch's default layout",
    "+norms together": "all spectral norms of a network in one go (kernels/spectral_norm.py)",
    "+in place": "activations in place",
    "+padded SDPA": "attention of G by scaled_dot_product_attention, q and k padded to v's channels",
    "+bf16": "--precision bf16",
}
GPU_LEVERS = {
    "-graph": "--cuda-graph off",
    "-lanes": "the graph captured on one stream",
    "-triton": "attention eager, in N x N matrices",
    "-channels last": LEVERS["-channels last"],
    "-norms together": "spectral norms layer by layer, by torch",
    **{name: LEVERS[name] for name in ("-one pass", "-freezing", "-one forward", "-cached", "+in place", "+bf16")},
    "-fused adam": "torch's foreach Adam",
    "+cudnn benchmark": "cuDNN tries its algorithms out and takes the fastest",
    "+fp32": "--precision fp32",
}
# One setting at a time away from the first row: groups, batch, image size.
GROWTH = ((3, 25, 64), (1, 25, 64), (2, 25, 64), (6, 25, 64), (3, 5, 64), (3, 64, 64), (3, 256, 64), (3, 25, 128))


def time_variant(name, s, script, n):
    """Time "ours" with one lever changed, or one of WHOLE, in a process of its own."""
    s.precision = {"+bf16": "bf16", "+fp32": "fp32"}.get(name, s.precision)
    s.cuda_graph = {"-graph": "off"}.get(name, s.cuda_graph)
    device = okd_train.pick_device(s.device)
    okd_train.set_precision(s, device)
    if name in WHOLE:
        bench.use_torch_alone(script)
    elif name != "-allocator":
        okd_train.keep_freed_memory()
    before_networks(name, script)
    trainer = bench.make_trainer(s, script, device)
    if name in WHOLE:
        step = functools.partial(bench.obvious_step, trainer, detach=name == "detached")
    else:
        change_networks(name, trainer)
        change_calls(name, trainer, script.Generator.forward.__globals__)
        step = trainer.step
    bench.print_variant(device, step, n)


def before_networks(name, script):
    """Levers that act while networks are made."""
    if name == "-convolution":
        bench.use_torch_convolutions()
    if name == "-channels last":
        script.channels_last = False
    if name.endswith("norms together"):
        okd_train.NORMS_TOGETHER = {"cpu"} if name[0] == "+" else set()
    if name == "+cudnn benchmark":
        torch.backends.cudnn.benchmark = True


def change_networks(name, t):
    """Levers that act on the networks of the trainer t."""
    for n in (n for g in t.groups for n in g.nets.values()):
        if name == "-cached":
            n.normed = contextlib.nullcontext
        if name == "-fused adam":
            rate = n.opt.param_groups[0]["lr"]
            own = {"foreach": True} if t.device.type == "cuda" else {"foreach": False, "lr": float(rate)}
            n.opt.param_groups[0].update(fused=False, **own)
        for m in n.net.modules() if name == "+in place" else ():
            if hasattr(m, "inplace"):
                m.inplace = True
    for n in (g.nets[role] for g in t.groups for role in "DC" if role in g.nets):
        if name == "-freezing":
            n.frozen = contextlib.nullcontext


def change_calls(name, t, module):
    """Levers that act on what the step calls; module: the globals of the model script."""
    attention = okd_train.kernel("attention")
    if name == "-one pass":
        module["_critic_loss"] = functools.partial(in_two_passes, module["_critic_loss"])
    if name == "-one forward":
        generate = t.generate
        t.generate = lambda g, sub: [generate(g, sub) for _ in range(3)][-1]
    if name == "-lanes":
        t.graph.lanes = one_stream(t.device.type == "cuda")
    if name in ("-blocks", "-triton"):
        module["self_attention"] = attention.attention
    if name == "-fused attention":
        attention.FUSED_FROM_N = math.inf
    if name == "+padded SDPA":
        module["self_attention"] = functools.partial(padded_sdpa, module["self_attention"])


def in_two_passes(loss, D, real, fake, *args, **more):
    """A loss that scores torch.cat([real, fake]), with a pass for each."""
    def apart(x):
        return torch.cat([D(half) for half in x.split(len(real))]) if len(x) == 2 * len(real) else D(x)
    return loss(apart, real, fake, *args, **more)


def padded_sdpa(own, q, k, v):
    """The generator's attention, which is never penalised, by torch's; any other by `own`."""
    if q.shape[2] < 1024 or k.shape[1] > 16:
        return own(q, k, v)
    missing = v.shape[1] - q.shape[1]
    q, k = (torch.nn.functional.pad(x.mT, (0, missing)).unsqueeze(1) for x in (q, k))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v.mT.unsqueeze(1), scale=1.0)[:, 0].mT


def one_stream(cuda):
    class OneStream(okd_train.kernel("cuda_graph").Lanes):
        def __call__(self, name, after=()):
            return contextlib.nullcontext()
    return OneStream(cuda)


def growth(argv):
    """Print a row for each of GROWTH, measured in a process of its own."""
    head = ("groups", "batch", "size", "s/step", "img/s", "GFLOP", "peak GB", "of the floor", "per group and image")
    widths = (6, 6, 5, 9, 8, 8, 8, 12, 20)
    print(" ".join(f"{word:>{width}}" for word, width in zip(head, widths)), flush=True)
    first = None
    for groups, batch, size in GROWTH:
        sizes = ["--groups", str(groups), "--batch-size", str(batch), "--image-size", str(size)]
        r = bench.result([bench.__file__, *argv, "--json", *sizes])
        each = r["step_seconds"] / groups / batch
        first = first or each
        values = (groups, batch, size, f"{r['step_seconds']:.4f}", f"{r['images_per_second']:.1f}",
                  f"{r['flops_per_step'] / 1e9:.0f}", f"{(r['peak_memory_bytes'] or math.nan) / 1e9:.2f}",
                  f"{r['floor_share']:.0%}", f"{each / first:.2f}")
        print(" ".join(f"{value:>{width}}" for value, width in zip(values, widths)), flush=True)
    print(f"Last column: seconds per group and image against the first row. {r['device']}, torch {r['torch']}, "
          f"{r['precision']}, {r['date']}")


def own_flags(p):
    p.add_argument("--variants", metavar="A,B", help="some of the levers (default all of this device)")
    p.add_argument("--growth", action="store_true", help="the table of groups, batch and image sizes")
    p.add_argument("--rounds", type=bench.natural, default=2, metavar="K", help="turns (default 2)")
    p.add_argument("--timed", type=bench.natural, default=10, metavar="K", help="timed steps a turn (default 10)")
    p.add_argument("--variant", help=argparse.SUPPRESS)             # one process of a turn


def run(argv):
    s, script, named = okd_train.parse(argv, "bench_step.py", __doc__, own_flags)
    okd_train.settle(s, script, named)
    levers = GPU_LEVERS if torch.cuda.is_available() and s.device != "cpu" else LEVERS
    names = s.variants.split(",") if s.variants else list(levers)
    about = {"ours": "", **WHOLE, **levers}
    if unknown := [name for name in names if name not in about]:
        raise okd_train.UserError(f"--variants: no {', '.join(map(repr, unknown))}; there are {', '.join(about)}")
    if s.variant:
        time_variant(s.variant, s, script, s.timed)
    elif s.growth:
        growth([a for a in argv if a != "--growth"])
    else:
        bench.compare(names, s.rounds, [__file__, *argv], about)


def main(argv=None):
    okd_train.guarded("bench_step.py", lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
