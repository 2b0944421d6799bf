"""How long one training step takes against the loop that one would write first.

    python tests/bench_step.py                      # full size, three groups, batch 25: about five minutes on two cores
    python tests/bench_step.py --ch 16 --batch-size 10 --steps 5

Every variant runs in a process of its own, in turns (A B C A B C ...), on the same networks, data and losses:
    obvious    a fresh generator forward for every use, fakes not detached for D and C, D and C not frozen while G learns
    detached   the same with fakes detached
    ours       okd_train's step, with the allocator setting that training uses
    ours*      the same with the default allocator
Prints median seconds per step, the ratio to ours (pair by pair, median) and the peak resident memory.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def obvious_step(t, detach):
    """The step as it is usually written, on okd_train's networks and optimisers. Groups update one after the other."""
    s = t.s
    d = t.inputs(t.step_count)[0]
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
        g.average(t.step_count)
    t.step_count += 1


def child(variant, steps, argv):
    import torch
    import okd_train
    if variant == "ours":
        okd_train.keep_freed_memory()
    s, script, named = okd_train.parse(argv)
    okd_train.settle(s, script, named)
    images, labels, classes = okd_train.synthetic_images(s.image_size, script.conditional)
    s.n_classes = len(classes)
    device = okd_train.pick_device(s.device)
    t = okd_train.Trainer(script, s, okd_train.Data(images, labels, classes, s, device), device)
    if variant in ("obvious", "detached"):
        import kernels.reference
        for module in (sys.modules.get(type(t.groups[0].ema).__module__), sys.modules.get("sagan")):
            if hasattr(module, "self_attention"):
                module.self_attention = kernels.reference.attention
        t.script.Generator.forward.__globals__["self_attention"] = kernels.reference.attention
    step = t.step if variant.startswith("ours") else lambda: obvious_step(t, variant == "detached")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step()
    wait()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - begin)
    print(statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--variants", default="obvious,detached,ours,ours*")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=2, help="timed steps per process, after one to warm up")
    p.add_argument("--child", help=argparse.SUPPRESS)
    a, rest = p.parse_known_args()
    if a.child:
        return child(a.child, a.steps, rest)
    import torch
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "?")
    print(f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}; {' '.join(rest) or 'sagan, 3 groups, batch 25, 64x64'}")
    seen = {v: [] for v in a.variants.split(",")}
    for _ in range(a.rounds):
        for v in seen:
            out = subprocess.run([sys.executable, __file__, "--child", v, "--steps", str(a.steps), *rest], check=True, capture_output=True, text=True).stdout
            seen[v].append(tuple(map(float, out.split())))
    print(f"{'variant':10} {'s/step':>8} {'ours/it':>8} {'peak GB':>8}")
    for v, rows in seen.items():
        ratio = statistics.median(o[0] / r[0] for o, r in zip(seen["ours"], rows)) if "ours" in seen else float("nan")
        print(f"{v:10} {statistics.median(r[0] for r in rows):8.3f} {ratio:8.3f} {max(r[1] for r in rows) / 1e6:8.2f}")


if __name__ == "__main__":
    main()
