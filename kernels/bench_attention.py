"""Times self-attention and its derivatives against everything else that computes them.

    python -m kernels.bench_attention                              # on a GPU: all shapes
    python -m kernels.bench_attention --shapes 8,64,1024 --batch-size 64 --precision tf32
    python -m kernels.bench_attention --device cpu --shapes 8,64,1024 --batch-size 4     # eager rows only

To be called in the folder that holds kernels/. Prints one markdown table per shape and appends every row to --csv with
machine and versions, so that runs can be compared. Phases: forward; forward+backward; penalty = forward, gradient with
create_graph, backward (what a gradient penalty does); second backward = that last part alone, replayed from a CUDA
graph. Rows that cannot run say why. Times are medians with 20 % and 80 % quantiles in microseconds; peak is the memory
above the inputs in MiB. "of floor" is the least time the arithmetic or the memory traffic needs (`floor_us`), divided
by the median: 100 % cannot be beaten.
"""
import argparse
import csv
import functools
import os
import platform
import signal
import sys
import time
from datetime import date
from pathlib import Path

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while torch is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import torch
from torch.autograd import Function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # python kernels/bench_attention.py works, too
from kernels import attention as A  # noqa: E402
sys.path.pop(0)

# ---------------------------------------------------------------------------------------------- settings
SHAPES = [(32, 256, 64), (64, 512, 16), (16, 128, 256), (8, 64, 1024), (8, 64, 4096), (32, 256, 4096)]      # Cq, C, N
BATCH_SIZES = [25, 64]
PHASES = ["forward", "forward+backward", "penalty", "second backward"]
ON_ANY_DEVICE = ["eager", "eager v P^T", "eager in blocks", "fused on the CPU", "sdpa math", "explicit formulas"]
ROWS = ["eager", "eager v P^T", "eager in blocks", "fused on the CPU", "compiled eager", "sdpa math", "sdpa efficient",
        "explicit formulas", "ours"]
FIELDS = ["date", "device", "torch", "triton", "Cq", "C", "N", "B", "precision", "phase", "graph", "impl",
          "median_us", "q20_us", "q80_us", "vs_eager", "of_floor", "peak_mib", "note"]
RESULTS = FIELDS[FIELDS.index("impl"):]
# Peaks of one H200 for the floor; other chips are scaled by nothing and say so in the table's head. FLOP/s and bytes/s.
PEAK = {"ieee": 67e12, "tf32": 395e12, "bf16": 790e12}
BYTES_PER_S = 4.3e12


# ---------------------------------------------------------------------------------------------- measuring
def measure(shape, B, phase, precision, graph, device="cuda", milliseconds=100, only=ROWS):
    """Rows of one table as dicts; median_us is None where a row cannot run and note says why.

    shape: (Cq, C, N). graph: replay a CUDA graph. milliseconds: the time given to each row. only: the rows to make.
    """
    Cq, C, N = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(B, c, N, generator=rng).to(device, dtype).requires_grad_() for c in (Cq, Cq, C, C)]
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        rows = [measure_row(name, tensors, phase, precision, graph, device, milliseconds)
                for name in only if name != "fused on the CPU" or device == "cpu"]
    finally:
        torch.set_float32_matmul_precision(old)
    eager = None
    for row in rows:
        if row["median_us"] is None:
            continue
        if row["impl"] == "eager":
            eager = row["median_us"]
        if eager:
            row["vs_eager"] = eager / row["median_us"]
        if device == "cuda":
            row["of_floor"] = floor_us(phase, Cq, C, N, B, precision) / row["median_us"]
    return rows


def measure_row(name, tensors, phase, precision, graph, device, milliseconds):
    row = {**dict.fromkeys(RESULTS), "impl": name, "note": ""}
    if device == "cpu" and name not in ON_ANY_DEVICE:
        return {**row, "note": "needs a GPU"}
    try:
        build = functools.partial(phase_call, phase, rival(name, precision), tensors)
        call = build()
        if device == "cuda":
            row["peak_mib"] = peak_mib(call)
        if graph:
            call = None         # what it keeps for its second backward would tie the inputs' gradients to its stream
            call = capture(build)
        row["q20_us"], row["median_us"], row["q80_us"] = quantiles(call, device, milliseconds)
    except Exception as error:      # whatever a rival raises is its row's result
        row["note"] = why_not(error)
        if device == "cuda":
            torch.cuda.empty_cache()
    return row


def phase_call(phase, attend, tensors):
    """A function without arguments that runs the phase once."""
    q, k, v, g = tensors

    def forward():
        with torch.no_grad():
            return attend(q, k, v)

    def both():
        return torch.autograd.grad(attend(q, k, v), (q, k, v), g)

    def penalty():
        first = torch.autograd.grad(attend(q, k, v), (q, k, v), g, create_graph=True)
        return torch.autograd.grad(first, (q, k, v, g), (q, k, v))      # cotangents of the right shapes, at hand

    if phase == "second backward":
        first = torch.autograd.grad(attend(q, k, v), (q, k, v), g, create_graph=True)
        cotangents = [t.detach().clone() for t in (q, k, v)]
        return lambda: torch.autograd.grad(first, (q, k, v, g), cotangents, retain_graph=True)
    return {"forward": forward, "forward+backward": both, "penalty": penalty}[phase]


def peak_mib(call):
    """Memory that a call takes above what is allocated before it; the first call, which allocates for good, apart."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def capture(build):
    """build() and its call on one stream, replayed from a CUDA graph: a backward runs on the stream of its forward."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = build()
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()
    return lambda: (graph.replay(), kept)       # the graph writes into what its call returned


def quantiles(call, device, milliseconds):
    """20, 50 and 80 % quantile in microseconds, after a warm-up; on a GPU the L2 cache is emptied before each run."""
    call()
    if device == "cuda":
        from triton.testing import do_bench
        warmup = max(5, milliseconds // 4)
        return [1e3 * t for t in do_bench(call, warmup=warmup, rep=milliseconds, quantiles=[0.2, 0.5, 0.8])]
    times, end = [], time.perf_counter() + milliseconds / 1e3
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return [sorted(times)[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8)]


def floor_us(phase, Cq, C, N, B, precision):
    """Least time on PEAK: multiply-adds of the fused method without recomputation, or each tensor moved once."""
    forward, backward, second = (Cq + C, 1), (3 * Cq + 3 * C, 3), (7 * Cq + 5 * C, 6)
    parts = {"forward": [forward], "forward+backward": [forward, backward], "penalty": [forward, backward, second],
             "second backward": [second]}[phase]
    tensors = (2 if precision == "bf16" else 4) * B * N * (2 * C + 2 * Cq)
    flops = 2 * B * N * N
    return 1e6 * sum(max(flops * macs / PEAK[precision], tensors * passes / BYTES_PER_S) for macs, passes in parts)


def why_not(error):
    """One short line of an exception."""
    said = str(error).strip().splitlines()
    return f"raises: {type(error).__name__}" + (f": {said[0][:90]}" if said else "")


# ---------------------------------------------------------------------------------------------- the rivals
def rival(name, precision):
    if name == "compiled eager":
        torch.compiler.reset()
        return torch.compile(A.attention, dynamic=False)
    ours = functools.partial(A.self_attention, impl="triton", precision=None if precision == "bf16" else precision)
    return {"eager": A.attention, "eager v P^T": usual, "eager in blocks": A.attention_blocked,
            "fused on the CPU": A.attention_fused, "ours": ours, "explicit formulas": Formulas.apply,
            "sdpa math": sdpa("MATH"), "sdpa efficient": sdpa("EFFICIENT_ATTENTION")}[name]


def usual(q, k, v):
    """The form most SAGAN code has; see attention.attention for what it costs."""
    return torch.bmm(v, torch.softmax(torch.bmm(q.transpose(1, 2), k), -1).transpose(1, 2))


def sdpa(backend):
    def attend(q, k, v):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        with sdpa_kernel(getattr(SDPBackend, backend)):
            q, k, v = (t.transpose(1, 2).unsqueeze(1).contiguous() for t in (q, k, v))          # (B, 1, N, channels)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1).transpose(1, 2)
    return attend


class Formulas(Function):
    """The same three nodes in plain torch: a rival that saves nothing N x N between the passes either."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return A.attention(q, k, v)

    @staticmethod
    def backward(ctx, g):
        return FormulasBackward.apply(*ctx.saved_tensors, g)


class FormulasBackward(Function):
    @staticmethod
    def forward(ctx, q, k, v, g):
        ctx.save_for_backward(q, k, v, g)
        return A.first_derivatives(q, k, v, g)

    @staticmethod
    def backward(ctx, a, b, e):
        return A.second_derivatives(*ctx.saved_tensors, a, b, e)


# ---------------------------------------------------------------------------------------------- the command
def print_row(row, phase, graph):
    times = row["note"]
    if row["median_us"] is not None:
        times = f"{row['median_us']:.1f} ({row['q20_us']:.1f}, {row['q80_us']:.1f})"
    cells = [times] + ["" if row[name] is None else format(row[name], form)
                       for name, form in (("vs_eager", ".2f"), ("of_floor", ".0%"), ("peak_mib", ".1f"))]
    print(f"| {phase} | {'yes' if graph else 'no'} | {row['impl']} | {' | '.join(cells)} |", flush=True)


def append(path, rows, common):
    new = not path.exists()
    with path.open("a", newline="") as f:
        out = csv.DictWriter(f, FIELDS)
        if new:
            out.writeheader()
        out.writerows({**common, **r} for r in rows)


def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--shapes", nargs="+", default=[",".join(map(str, s)) for s in SHAPES], metavar="Cq,C,N")
    p.add_argument("--batch-size", "--batch_size", nargs="+", type=int, default=BATCH_SIZES)
    p.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    p.add_argument("--precision", nargs="+", choices=list(PEAK), default=["tf32"], help="ieee, tf32 (float32) or bf16")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="default all; compiled eager takes longest")
    p.add_argument("--milliseconds", type=int, default=50, help="time given to each row")
    p.add_argument("--csv", type=Path, help="file to append to")
    args = p.parse_args()
    shapes = []
    for text in args.shapes:
        try:
            shape = tuple(int(n) for n in text.split(","))
            if len(shape) != 3 or min(shape) < 1:
                raise ValueError
        except ValueError:
            stop(f"--shapes: {text} is not Cq,C,N (three positive numbers, as 8,64,1024)")
        shapes.append(shape)
    args.shapes = shapes
    if min(args.batch_size) < 1 or args.milliseconds < 1:
        stop("--batch-size and --milliseconds start at 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: no CUDA device here; --device cpu times the eager rows")
    if args.csv and not args.csv.parent.is_dir():
        stop(f"--csv: the folder {args.csv.parent} does not exist")
    return args


def stop(message):
    print(f"bench_attention: {message}", file=sys.stderr)
    raise SystemExit(2)


def main():
    args = parse()
    cuda = args.device == "cuda"
    try:
        import triton
        version = triton.__version__
    except ImportError:
        version = "none"
    if cuda:
        device = torch.cuda.get_device_name()
        print(f"{device}, torch {torch.__version__}, triton {version}, {date.today()}; floor: H200 peaks")
    else:
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        print(f"{device}, torch {torch.__version__}, {date.today()}; on a CPU only the eager rows can run")
    for precision in args.precision:
        for Cq, C, N in args.shapes:
            for B in args.batch_size:
                print(f"\n(Cq, C, N) = {(Cq, C, N)}, B = {B}, {precision}\n")
                print("| phase | graph | row | us (20 %, 80 %) | vs eager | of floor | peak MiB |")
                print("| --- | --- | --- | --- | --- | --- | --- |")
                for phase in args.phases:
                    for graph in (False, True) if cuda else (False,):
                        rows = measure((Cq, C, N), B, phase, precision, graph, args.device, args.milliseconds,
                                       args.rows)
                        for row in rows:
                            print_row(row, phase, graph)
                        if args.csv:
                            common = dict(date=date.today(), device=device, torch=torch.__version__, triton=version,
                                          Cq=Cq, C=C, N=N, B=B, precision=precision, phase=phase, graph=graph)
                            append(args.csv, rows, common)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    main()
