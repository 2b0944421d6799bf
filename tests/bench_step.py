"""How long one training step takes against the loop that one would write first, what each lever is worth, and how cost grows.

    python tests/bench_step.py                      # full size, three groups, batch 25: about five minutes on two cores
    python tests/bench_step.py --steps 50           # on a GPU, where a step takes milliseconds
    python tests/bench_step.py --levers             # ours against ours without one lever, or with one more: about fifteen minutes
    python tests/bench_step.py --growth             # groups, batch and image size, by okd_train.py --benchmark --json
    python tests/bench_step.py --ch 16 --batch-size 10 --steps 5

Every variant runs in a process of its own, in turns (A B C A B C ...), on the same networks, data and losses:
    obvious    a fresh generator forward for every use, fakes not detached for D and C, D and C not frozen while G learns,
               eager attention (kernels/reference.py), torch's convolutions, the default allocator
    detached   the same with fakes detached
    ours       okd_train's step, with the allocator setting that training uses
    levers     `ours` less one of them (-name), or with one that was not taken (+name); see LEVERS and GPU_LEVERS below
Prints median seconds per step, the ratio to ours (pair by pair, median) and the peak resident memory.
"""
import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LEVERS = {
    "-allocator": "freed memory goes back to the system after every use (glibc's default)",
    "-convolution": "torch's second derivative of a convolution (no kernels/convolution.py)",
    "-one pass": "D scores real and fake in two passes",
    "-freezing": "D and C not frozen while G learns; backward(inputs=...) leaves their weight gradients out all the same",
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
    "+all triton": "the critics' small attention by Triton, too",
    "-norms together": "spectral norms layer by layer, by torch",
    **{name: LEVERS[name] for name in ("-one pass", "-freezing", "-one forward", "-cached", "+in place", "+bf16")},
    "-fused adam": "torch's foreach Adam",
    "+channels last": "networks and images in channels_last",
    "+cudnn benchmark": "cuDNN tries its algorithms out and takes the fastest",
    "+fp32": "--precision fp32",
}


def obvious_step(t, detach):
    """The step as it is usually written, on okd_train's networks and optimisers. Groups update one after the other."""
    s = t.s
    t.given.put(t.inputs(t.step_count))
    d = t.given.plan[0]
    labels = (d["y"],) if t.conditional else ()
    f, extra = t.script, t.names
    out = (lambda x: x.detach()) if detach else (lambda x: x)
    nets = {g.i: {role: n.net for role, n in g.nets.items()} for g in t.groups}
    value = lambda loss: loss[0] if isinstance(loss, tuple) else loss
    for g in t.groups:
        own, following = nets[g.i], nets[g.i % s.groups + 1]
        real = t.data.batch(d["idx", g.i], None)
        y_real = (t.data.labels[d["idx", g.i]],) if t.conditional else ()
        fake = out(own["G"](d["z"], *labels))
        g.nets["D"].opt.zero_grad()
        eps = {"eps": d["D", g.i]} if t.takes_eps["D"] else {}
        value(f.discriminator_loss(own["D"], real, fake, *y_real, *labels, **extra["D"], **eps)).backward()
        g.nets["D"].opt.step()
        if "C" in own:
            fake, neighbour = out(own["G"](d["z"], *labels)), out(following["G"](d["z"], *labels))
            g.nets["C"].opt.zero_grad()
            eps = {"eps": d["C", g.i]} if t.takes_eps["C"] else {}
            value(f.connector_loss(own["C"], neighbour, fake, *labels, *labels, **extra["C"], **eps)).backward()
            g.nets["C"].opt.step()
        fake = own["G"](d["z"], *labels)
        g.nets["G"].opt.zero_grad()
        loss = value(f.generator_loss(own["D"], fake, *labels, **extra["G"]))
        if "C" in own:
            loss = loss + s.rho * value(f.generator_loss(own["C"], fake, *labels, **extra["G"]))
        loss.backward()
        g.nets["G"].opt.step()
        g.average(d["pace"])
    t.step_count += 1


def take(variant, t, module):
    """Change the trainer t (and the model script's module globals) by one lever; returns the step to time."""
    import okd_train
    import torch
    from kernels import reference
    own, cuda = module.get("self_attention"), t.device.type == "cuda"
    large = lambda f: lambda q, k, v: f(q, k, v) if q.shape[2] >= 1024 and not k.shape[1] > 16 else own(q, k, v)        # G's, never penalised
    if variant in ("obvious", "detached"):
        module["self_attention"] = reference.attention
        return lambda: obvious_step(t, variant == "detached")
    if variant == "-one pass":
        cat = torch.cat
        f = module["_critic_loss"]

        def two_passes(D, real, fake, *a, **k):
            class Apart:
                def __call__(self, x):
                    return cat([D(real), D(fake)]) if len(x) == 2 * len(real) else D(x)
            return f(Apart(), real, fake, *a, **k)
        module["_critic_loss"] = two_passes
    if variant == "-freezing":
        for g in t.groups:
            for role in "DC":
                g.nets[role].frozen = contextlib.nullcontext
    if variant == "-one forward":
        generate = t.generate
        t.generate = lambda g, d, n: [generate(g, d, n) for _ in range(3)][-1]
    if variant == "-cached":
        for n in (n for g in t.groups for n in g.nets.values()):
            n.normed = contextlib.nullcontext
    if variant == "-fused adam":
        for g in t.groups:
            for n in g.nets.values():
                n.opt.param_groups[0].update(dict(fused=False, foreach=True) if cuda else dict(fused=False, foreach=False, lr=float(n.opt.param_groups[0]["lr"])))
    if variant == "-lanes":
        class OneStream(okd_train.Lanes):
            def __call__(self, *name, after=()):
                return contextlib.nullcontext()
        t.lanes = OneStream()
    if variant == "+all triton":
        sys.modules["kernels.attention"].TRITON_FROM_N = 1
    if variant == "+cudnn benchmark":
        torch.backends.cudnn.benchmark = True
    if variant in ("-blocks", "-triton"):
        module["self_attention"] = reference.attention
    if variant == "-fused attention":
        reference.FUSED_FROM_N = float("inf")
    if variant == "+in place":
        for m in (m for g in t.groups for n in g.nets.values() for m in n.net.modules() if hasattr(m, "inplace")):
            m.inplace = True
    if variant == "+padded SDPA":
        def padded(q, k, v):
            q, k = (torch.nn.functional.pad(x.mT, (0, v.shape[1] - x.shape[1])).unsqueeze(1) for x in (q, k))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v.mT.unsqueeze(1), scale=1.0)[:, 0].mT
        module["self_attention"] = large(padded)
    return t.step


def child(variant, steps, argv):
    import torch
    import okd_train
    if variant not in ("obvious", "detached", "-allocator"):
        okd_train.keep_freed_memory()
    if variant in ("-channels last", "obvious", "detached"):
        okd_train.Script.layout = lambda script, device: torch.contiguous_format
    if variant == "+channels last":
        okd_train.Script.layout = lambda script, device: torch.channels_last
    if variant.endswith("norms together"):
        okd_train.NORMS_TOGETHER = {"cpu"} if variant[0] == "+" else set()
    if variant == "-convolution" or variant in ("obvious", "detached"):
        okd_train.fast_second_derivative = None
    s, script, named = okd_train.parse(argv + {"+bf16": ["--precision", "bf16"], "+fp32": ["--precision", "fp32"], "-graph": ["--cuda-graph", "off"]}.get(variant, []))
    okd_train.settle(s, script, named)
    images, labels, classes = okd_train.synthetic_images(s.image_size, script.conditional)
    s.n_classes = len(classes)
    device = okd_train.pick_device(s.device)
    okd_train.set_precision(s, device)
    t = okd_train.Trainer(script, s, okd_train.Data(images, labels, classes, s, device), device)
    step = take(variant, t, script.Generator.forward.__globals__)
    for _ in range(okd_train.WARM_UP + 2 if device.type == "cuda" else 1):
        step()
    print(statistics.median(okd_train.Clock(device).pace(step, steps)), torch.cuda.max_memory_allocated() / 1024 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def growth(rest, steps):
    """One setting at a time away from three groups, batch 25, 64x64."""
    print(f"{'groups':>6} {'batch':>6} {'size':>5} {'s/step':>9} {'img/s':>8} {'GFLOP':>8} {'peak GB':>8} {'of the floor':>12} {'per group and image, against the first row':>43}")
    first = None
    for groups, batch, size in [(3, 25, 64), (1, 25, 64), (2, 25, 64), (6, 25, 64), (3, 5, 64), (3, 64, 64), (3, 256, 64), (3, 25, 128)]:
        command = [sys.executable, str(ROOT / "okd_train.py"), "--benchmark", str(steps), "--json", "--groups", str(groups), "--batch-size", str(batch), "--image-size", str(size), *rest]
        r = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        each = r["step_seconds"] / groups / batch
        first = first or each
        print(f"{groups:6} {batch:6} {size:5} {r['step_seconds']:9.4f} {r['images_per_second']:8.1f} {r['flops_per_step'] / 1e9:8.0f} {r['peak_memory_bytes'] / 1e9:8.2f} {r['floor_share']:12.0%} {each / first:43.2f}", flush=True)
    print(f"{r['device']}, torch {r['torch']}, {r['precision']}, {r['date']}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--variants", default="obvious,detached,ours")
    p.add_argument("--levers", action="store_true", help="compare ours with ours without or with each of LEVERS")
    p.add_argument("--growth", action="store_true", help="the table of groups, batch and image size")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=2, help="timed steps per process, after one to warm up")
    p.add_argument("--child", help=argparse.SUPPRESS)
    a, rest = p.parse_known_args()
    if a.child:
        return child(a.child, a.steps, rest)
    import torch
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "?")
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}; {' '.join(rest) or 'sagan, 3 groups, batch 25, 64x64'}", flush=True)
    if a.growth:
        return growth(rest, a.steps)
    levers = GPU_LEVERS if torch.cuda.is_available() and "cpu" not in rest else LEVERS
    seen = {v: [] for v in (["ours", *levers] if a.levers else a.variants.split(","))}
    print(f"{'variant':15} {'s/step':>8} {'ours/it':>8} {'peak GB':>8}", flush=True)
    printed = set()
    for _ in range(a.rounds):
        for v in seen:
            out = subprocess.run([sys.executable, __file__, f"--child={v}", "--steps", str(a.steps), *rest], check=True, capture_output=True, text=True).stdout
            seen[v].append(tuple(map(float, out.split())))
            ready = [w for w, rows in seen.items() if len(rows) == a.rounds and w not in printed and len(seen.get("ours", rows)) == a.rounds]
            for w in ready:                                         # as soon as they can be, for who must stop early
                ratio = statistics.median(o[0] / r[0] for o, r in zip(seen["ours"], seen[w])) if "ours" in seen else float("nan")
                print(f"{w:15} {statistics.median(r[0] for r in seen[w]):8.3f} {ratio:8.3f} {max(r[1] for r in seen[w]) / 1e6:8.2f}  {levers.get(w, '')}", flush=True)
            printed.update(ready)


if __name__ == "__main__":
    main()
