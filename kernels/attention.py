"""Self-attention over positions, fused, with two derivatives (Triton), and its plain PyTorch form.

    from kernels.attention import self_attention
    o = self_attention(q, k, v)          # q, k (B, Cq, N); v (B, C, N) -> o (B, C, N)

    python -m kernels.bench_attention    # times it; kernels/README.md holds the tables

This file can be copied alone. It needs PyTorch; without Triton, or without a suitable GPU, the same call is plain
PyTorch.

Why it exists. A gradient penalty differentiates the critic's input gradient once more, so every layer of
the critic is differentiated twice. Fused attention has no second derivative anywhere else: it raises there,
or hands back a gradient that is cut off from the graph without a word. Here the backward pass is itself a
differentiable function, and so nothing of size N x N is ever stored.

Derivation. One image, positions as rows: Q, K (N, Cq), V, O (N, C); i counts queries, j keys; * is
elementwise, products without a sign are matrix products, and <X>_i = sum_j X_ij.

    S = Q K^T      P = softmax over j      O = P V

The softmax's differential is dP_ij = P_ij (dS_ij - <P*dS>_i). Its matrix is symmetric, so the same map carries
gradients back. With G = dL/dO, which makes X = G V^T the gradient of P:

    D = <P*X> = rowsum(G*O)     Z = P*(X - D)                               (Z is the gradient of S)
    dQ = Z K       dK = Z^T Q       dV = P^T G

Now let A, B, E be the gradients of a second loss with respect to dQ, dK, dV. That loss varies with Z at rate
M = A K^T + Q B^T, and Z is linear in X and quadratic in P:

    through X:   W = P*(M - m), m = <P*M>                                   (the softmax map, applied to M)
                 gV = W^T G,    gG = W V + P E
    through P:   dZ = dP*(X - D) - P*<dP*X>, so P gets T = M*(X - D) - m X, and from dV its share F = G E^T.
                 Mapped back to S:  gS = P*((M - m)*(X - D) + F - u), u = <Z*M + P*F>
                 (constants of a row vanish under the map, which is where -m X became -m (X - D))
    K and Q also stand beside Z in dQ and dK, and A, B in M:
                 gQ = gS K + Z B,   gK = gS^T Q + Z^T A

A row needs only its logsumexp, D, m and u from outside its block, so P is recomputed block by block and memory
stays O(N). (The logsumexp is kept as largest logit and 1 / sum: rounded as one number it would cost digits of P.)
Two families: `small` (N <= 64, see SMALL) holds a whole image's P in one program, one launch per derivative; `tiled`
(any N) sweeps rows for dQ, gQ, gG and columns for dK, dV, gK, gV. No two programs write one address and nothing is
summed in an order that varies: equal input gives equal bits.

The mean of K over the positions shifts every S_ij of a row alike, and so does that of B in M; and in Z K and
gS K it meets rows that sum to zero. Taking it off first changes nothing on paper and keeps tf32 and bf16 from
cancelling digits (gQ off by 0.9 against 1e-3 at a mean of 30). bf16 and fp16 take it off in the products only.
"""
from __future__ import annotations

import functools
import math
import threading

import torch
from torch.autograd import Function

# ---------------------------------------------------------------------------------------------- settings
# From so many logits (B N N) on "auto" takes Triton, where tensor cores multiply: below, to launch it can take longer
# than to run it (kernels/README.md).
TRITON_FROM = 2 ** 26
LAUNCHES_ARE_FREE = False       # to be set by a program that replays its steps from CUDA graphs: then whatever the size
MAX_CQ = 64             # wider queries would need a loop over Cq too
# On the CPU: below 256 positions a matrix is so small that the calls cost more than the products. Without AVX-512 the
# fused form's backward pass lost at every shape (kernels/README.md), so there it is never used.
FUSED_FROM_N = 256 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else math.inf
# Of one block of attention_blocked. Smaller blocks are a little faster still on idle cores, but where another process
# shares the cores every parallel region waits for its slowest thread, and small blocks have many regions.
BLOCK_BYTES = 16 << 20

# Launch tables: kernel -> arithmetic -> (rows a program owns, positions per inner step, channels per step, warps,
# stages); WIDE replaces a row where Cq > 32. Fixed, not tuned at run time: the same numbers on every run, no stall at
# the first call, safe under CUDA graph capture. Chosen by compiling for sm_80 and sm_90 with Triton 3.6 and 3.9, and
# held by tests/test_attention.py to at most 256 bytes of spills and SHARED_KIB of shared memory. "half" is bf16 and
# fp16. "ieee" has no tensor cores: its products unroll into registers, hence the small blocks.
COLUMNS = "tf32", "half", "ieee", "double"
TABLE = {kernel: dict(zip(COLUMNS, row)) for kernel, row in {
    "small_forward":         ((0, 0, 64, 4, 1), (0, 0, 64, 4, 1), (0, 0, 32, 8, 1), (0, 0, 16, 8, 1)),
    "small_backward":        ((0, 0, 32, 8, 1), (0, 0, 64, 8, 1), (0, 0, 32, 8, 1), (0, 0, 16, 8, 1)),
    "small_double_backward": ((0, 0, 32, 8, 1), (0, 0, 32, 8, 1), (0, 0, 16, 8, 1), (0, 0, 16, 8, 1)),
    "tiled_forward":         ((64, 64, 64, 4, 2), (64, 64, 128, 4, 2), (32, 32, 32, 8, 1), (32, 32, 32, 4, 1)),
    "tiled_rows":            ((64, 64, 64, 4, 2), (64, 64, 128, 4, 2), (32, 32, 32, 8, 1), (32, 32, 32, 8, 1)),
    "tiled_columns":         ((64, 64, 64, 4, 2), (64, 64, 128, 4, 2), (32, 32, 32, 8, 1), (32, 32, 32, 8, 1)),
    "tiled_double_q":        ((64, 32, 64, 4, 2), (64, 32, 64, 4, 2), (32, 16, 32, 8, 1), (16, 16, 16, 8, 1)),
    "tiled_double_g":        ((64, 32, 64, 4, 2), (64, 64, 64, 4, 2), (32, 32, 32, 8, 1), (32, 32, 32, 8, 1)),
    "tiled_double_columns":  ((64, 32, 64, 4, 1), (64, 32, 64, 4, 2), (32, 32, 32, 8, 1), (16, 16, 16, 8, 1)),
}.items()}
WIDE = {
    "tiled_rows":            {"tf32": (64, 32, 64, 8, 1)},
    "tiled_double_q":        {"tf32": (32, 32, 32, 8, 1), "half": (32, 32, 64, 8, 1), "ieee": (16, 16, 16, 8, 1)},
    "tiled_double_g":        {"tf32": (64, 32, 64, 8, 1), "ieee": (32, 16, 32, 8, 1), "double": (32, 16, 16, 8, 1)},
    "tiled_double_columns":  {"tf32": (32, 32, 32, 8, 1), "half": (64, 32, 64, 8, 1), "ieee": (32, 16, 32, 8, 1)},
}
# In tf32 on Hopper, the tiled ones where Cq <= 16: chosen by time on an H100, at (8, 64, 4096), (16, 128, 256),
# (32, 256, 64) and (64, 512, 16).
HOPPER = {
    "small_backward":        (0, 0, 128, 4, 1),
    "small_double_backward": (0, 0, 128, 4, 1),
    "tiled_forward":         (128, 32, 128, 8, 3),
    "tiled_rows":            (128, 32, 128, 8, 1),
    "tiled_columns":         (64, 32, 128, 4, 1),
    "tiled_double_q":        (64, 32, 128, 4, 1),
    "tiled_double_g":        (128, 32, 64, 8, 3),
}
SHARED_KIB = 99         # what the smallest chips from Ampere on offer one program
# Largest N, and largest N x Cq (both as padded powers of two), whose double backward the small family does without
# spilling.
SMALL = {"tf32": (64, 2048), "half": (64, 4096), "ieee": (32, 1024), "double": (32, 1024)}


# ---------------------------------------------------------------------------------------------- the public function
def self_attention(q, k, v, *, precision=None, impl="auto"):
    """o_i = sum_j softmax_j(q_i . k_j) v_j over all positions, without a scale; twice differentiable.

    q, k: (B, Cq, N), v: (B, C, N), of one floating dtype and device, any strides; Cq <= 64 for Triton; B and C may be
    0. Returns o: (B, C, N) in that dtype. SAGAN (arXiv 1805.08318), eq. 1-2, with the softmax over the keys.

    impl: "triton": fused kernels, O(B N (Cq + C)) memory, on a CUDA device of capability >= 8.0; bit-deterministic,
            no synchronisation, may be captured in a CUDA graph after one call with the same shapes.
            Gradients, and gradients through gradients, of q, k, v and of o's own gradient; a third derivative raises.
            Keys count from their mean over the positions: some of 1e4 times the others' size, as of a mask made of
            numbers, take digits from all, down to none at 1e9. Not so "eager".
          "eager": plain PyTorch with ordinary autograd, O(B N N) memory; any device, any order of derivative.
          "auto": Triton where it is quicker and the chip has room for its kernels: on CUDA in tf32, bfloat16 or
            float16, from TRITON_FROM logits (B N N) on, or wherever LAUNCHES_ARE_FREE; else eager.
          While torch.compile traces, every impl is eager; under torch.func, torch.jit.trace and in forward mode "auto".
    precision: of the Triton kernels' products in float32: "ieee" (no tensor cores), "tf32", or None, which follows
          torch.get_float32_matmul_precision(). The other dtypes ignore it, and so does eager, which obeys torch's own
          setting. Half-precision inputs are multiplied as they are; sums and softmax are in float32.

    Raises ValueError for shapes, dtypes, devices or options that do not fit, RuntimeError if impl="triton" cannot run
    here. Not supported by "triton": torch.func transforms, batched gradients, forward mode, autocast (it computes in
    the inputs' dtype).
    """
    _check(q, k, v, precision, impl)
    if torch.compiler.is_compiling() or not v.numel() or impl == "auto" and (_transformed() or not _pays(q, precision)):
        impl = "eager"
    if impl != "eager":
        arith = _arithmetic(q, precision)
        if (why := refusal(q)) is None:
            q, k, v = _small_offsets(q), _small_offsets(k), _small_offsets(v)
            return Attention.apply(q, k, v, _is_small(*q.shape[1:], arith), arith)
        if impl == "triton":
            raise RuntimeError(f"self_attention: impl='triton' cannot run: {why}")
    return attention(q, k, v) if q.is_cuda else attention_cpu(q, k, v)


def _transformed():
    """Whether a trace, which would freeze a loop over the batch, or a transform without rules for a Function runs."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def refusal(q):
    """Why the Triton kernels cannot run inputs like q (B, Cq, N) on its device: words; None if they can."""
    if not _have_triton():
        return "the package triton is not installed, or older than 3.4"
    if q.shape[1] > MAX_CQ:
        return f"Cq = {q.shape[1]} is above {MAX_CQ}"
    if q.is_cuda:
        if (have := _shared_kib(q.device)) < SHARED_KIB:
            return (f"it needs a GPU of compute capability 8.0 or newer with {SHARED_KIB} KiB of shared memory, "
                    f"and this one offers {have}")
    else:
        import triton
        if not triton.knobs.runtime.interpret:
            return f"it needs a CUDA device (or TRITON_INTERPRET=1), not {q.device}"


@functools.cache
def _have_triton():
    try:
        import triton
    except ImportError:
        return False
    return hasattr(triton, "knobs")     # of 3.4


@functools.cache
def _shared_kib(device):
    """Shared memory that one program may use on this chip; 0 where Triton's kernels cannot run at all."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


def _check(q, k, v, precision, impl):
    def said():
        dtypes = [str(t.dtype).removeprefix("torch.") for t in (q, k, v)]
        return ", ".join(f"{n} {tuple(t.shape)} {d} {t.device}" for n, t, d in zip("qkv", (q, k, v), dtypes))
    if not (q.dim() == k.dim() == v.dim() == 3 and q.shape == k.shape and q.shape[::2] == v.shape[::2]
            and q.shape[1] and q.shape[2]):
        raise ValueError(f"self_attention: wanted q, k (B, Cq, N) and v (B, C, N) with Cq, N >= 1; got {said()}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"self_attention: q, k, v must share dtype and device; got {said()}")
    if q.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"self_attention: wanted float32, float64, float16 or bfloat16; got {said()}")
    if precision not in (None, "ieee", "tf32"):
        raise ValueError(f"self_attention: precision is 'ieee', 'tf32' or None, not {precision!r}")
    if impl not in ("auto", "triton", "eager"):
        raise ValueError(f"self_attention: impl is 'auto', 'triton' or 'eager', not {impl!r}")


def _pays(q, precision):
    """Whether Triton is quicker than eager for inputs like q."""
    large = LAUNCHES_ARE_FREE or q.shape[0] * q.shape[2] ** 2 >= TRITON_FROM
    return q.is_cuda and large and _arithmetic(q, precision) in ("tf32", "half")


def _arithmetic(q, precision):
    """Column of TABLE for q's dtype."""
    if q.dtype == torch.float64:
        return "double"
    if q.dtype != torch.float32:
        return "half"
    if precision is None:
        try:
            tf32 = torch.get_float32_matmul_precision() != "highest"
        except RuntimeError:        # raised once the newer per-backend setting was used; then only that one is readable
            tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "tf32" if tf32 else "ieee"
    return precision


# ---------------------------------------------------------------------------------------------- in plain PyTorch
# What the kernels must equal: attention, and its first and second derivatives written out. All make N x N matrices.

def attention(q, k, v):
    """o (B, C, N) for q, k (B, Cq, N), v (B, C, N); any number of derivatives by autograd.

    P v^T rather than v P^T: the second makes the softmax's backward copy a transposed N x N matrix.
    """
    p = torch.softmax(torch.bmm(q.transpose(1, 2), k), -1)                      # (B, N, N)
    o = torch.bmm(p, v.transpose(1, 2)).transpose(1, 2)                         # (B, C, N), laid out as (B, N, C)
    return o if v.stride(1) < v.stride(2) else o.contiguous()                   # as v is


def first_derivatives(q, k, v, g):
    """(dq, dk, dv) of sum(o * g); shapes of q, k, v."""
    p = torch.softmax(q.mT @ k, -1)
    z = _softmax_map(p, g.mT @ v)
    return k @ z.mT, q @ z, g @ p


def second_derivatives(q, k, v, g, a, b, e):
    """(gq, gk, gv, gg): derivatives of sum(dq * a) + sum(dk * b) + sum(dv * e) with respect to q, k, v, g."""
    p = torch.softmax(q.mT @ k, -1)
    x = g.mT @ v
    d = (p * x).sum(-1, keepdim=True)
    z = p * (x - d)
    m = a.mT @ k + q.mT @ b
    m = m - (p * m).sum(-1, keepdim=True)
    w = p * m
    s = _softmax_map(p, m * (x - d) + g.mT @ e)
    return k @ s.mT + b @ z.mT, q @ s + a @ z, g @ w, v @ w.mT + e @ p.mT


def _softmax_map(p, x):
    """The softmax's differential, P * (X - <P*X>): its matrix is symmetric, so it serves both directions."""
    return p * (x - (p * x).sum(-1, keepdim=True))


# ---------------------------------------------------------------------------------------------- on the CPU
# torch multiplies float32 matrices on x86 by MKL, which on an AMD processor stays below AVX-512; oneDNN, which torch's
# convolutions use, does not, and was about twice as fast (bench_attention). torch.compile reaches it by this operation:
# x w^T of two matrices.
try:
    _linear = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
except AttributeError:
    _linear = None


def attention_cpu(q, k, v):
    """The quickest form on a CPU: fused in float32 from FUSED_FROM_N positions on, else blocked."""
    if _transformed() or not v.numel():
        return attention(q, k, v)
    if _linear is None or q.dtype != torch.float32 or q.shape[2] < FUSED_FROM_N:
        return attention_blocked(q, k, v)
    return attention_fused(q, k, v)


def attention_fused(q, k, v):
    """attention image by image, for float32 on the CPU with oneDNN; its backward pass keeps no N x N matrix."""
    return _Fused.apply(*map(_dense, (q, k, v)))


def attention_blocked(q, k, v):
    """attention by blocks of images, or of rows where one image is larger, of at most BLOCK_BYTES (one row at least).

    For the CPU: a matrix of B x N x N leaves the cache, and the allocator hands its pages back after every use.
    """
    B, _, N = q.shape
    row = N * q.element_size()
    images, rows = BLOCK_BYTES // (N * row), max(1, BLOCK_BYTES // row)
    if B <= images:
        return attention(q, k, v)
    if images:
        return torch.cat([attention(*block) for block in zip(q.split(images), k.split(images), v.split(images))])
    return torch.stack([
        torch.cat([torch.softmax(x.t() @ b, -1) @ c.t() for x in a.split(rows, 1)]).t()
        for a, b, c in zip(q.unbind(), k.unbind(), v.unbind())])


class _Fused(Function):
    """Attention image by image: only the N x N matrices of one are there, and none is kept for the backward pass.

    A second derivative is autograd's, of the blocked form.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        qt, kt, o = q.mT.contiguous(), k.mT.contiguous(), torch.empty_like(v)
        for b in range(len(q)):
            o[b] = _times(_softmax_of_logits(qt[b], kt[b]), v[b]).t()
        return o

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        if torch._C._functorch.is_legacy_batchedtensor(g) or torch._C._functorch.is_batchedtensor(g):
            return first_derivatives(q, k, v, g)
        if torch.is_grad_enabled():
            # Views: where k is q, or made of q, a gradient asked at q itself would take in the way through k.
            views = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(attention_blocked(*views), views, g, create_graph=True)
        g = _dense(g)
        qt, kt, vt, gt = (x.mT.contiguous() for x in (q, k, v, g))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for b in range(len(q)):
            p = _softmax_of_logits(qt[b], kt[b])
            z = torch._softmax_backward_data(_times(gt[b], vt[b]), p, -1, p.dtype)
            dq[b], dk[b], dv[b] = _times(k[b], z), _times(q[b], z.t()), _times(g[b], p.t())
        return dq, dk, dv


def _softmax_of_logits(q, k):
    return torch.softmax(_times(q, k), -1)


def _times(x, w):
    """x (M, K) @ w (N, K)^T -> (M, N)."""
    return _linear(x, w, None, "none", [], "")


def _dense(x):
    """x (B, M, N) itself or a copy: oneDNN multiplies matrices with gaps number by number, hundreds of times slower."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


# ---------------------------------------------------------------------------------------------- autograd
class Attention(Function):
    """First of three chained nodes. Its backward is the forward of the second, so autograd can go on from there."""

    @staticmethod
    def forward(ctx, q, k, v, small, arith):
        B, Cq, N = q.shape
        last = v.stride(1) < v.stride(2)        # then all that is made lies in memory as v does, channels last
        sizes = B, Cq, v.shape[1], N, last
        o = _new(v, last)
        if small:
            _launch("small_forward", arith, (q, k, v, o, *_strides(q, k, v)), *sizes)
            ctx.save_for_backward(q, k, v)
        else:
            k0, kp = _centre(k, arith)
            top, inv = _row(q, arith), _row(q, arith)
            _launch("tiled_forward", arith, (q, k0, v, o, top, inv, *_strides(q, v)), *sizes)
            ctx.save_for_backward(q, k, v, o, k0, kp, top, inv)
        ctx.arith, ctx.last = arith, last
        return o

    @staticmethod
    def backward(ctx, g):
        q, k, v, *kept = ctx.saved_tensors
        if kept:
            kept[0] = kept[0].detach()      # o carries this node, which the engine would otherwise run once more
        return *AttentionBackward.apply(q, k, v, g, ctx.arith, ctx.last, *kept), None, None


class AttentionBackward(Function):
    """Second node: (q, k, v, g) -> (dq, dk, dv)."""

    @staticmethod
    def forward(ctx, q, k, v, g, arith, last, *kept):
        B, Cq, N = q.shape
        sizes = B, Cq, v.shape[1], N, last
        g = _small_offsets(g)
        dq, dk, dv = _new(q, last), _new(q, last), _new(v, last)
        if kept:
            o, k0, kp, top, inv = kept
            d = _row(q, arith)
            strides = _strides(q, v, g)
            _launch("tiled_rows", arith, (q, k0, kp, v, g, o, top, inv, d, dq, *strides), *sizes)
            _launch("tiled_columns", arith, (q, k0, v, g, top, inv, d, dk, dv, *strides), *sizes)
            ctx.save_for_backward(q, k, v, g, k0, kp, top, inv, d)
        else:
            _launch("small_backward", arith, (q, k, v, g, dq, dk, dv, *_strides(q, k, v, g)), *sizes)
            ctx.save_for_backward(q, k, v, g)
        ctx.arith, ctx.last, ctx.extra = arith, last, 2 + len(kept)
        return dq, dk, dv

    @staticmethod
    def backward(ctx, a, b, e):
        return *AttentionDoubleBackward.apply(a, b, e, ctx.arith, ctx.last, *ctx.saved_tensors), *[None] * ctx.extra


class AttentionDoubleBackward(Function):
    """Third node: gradients of (dq, dk, dv) -> gradients of (q, k, v, g). There is no fourth."""

    @staticmethod
    def forward(ctx, a, b, e, arith, last, q, k, v, g, *kept):
        B, Cq, N = q.shape
        sizes = B, Cq, v.shape[1], N, last
        a, b, e = (t.resolve_neg().contiguous() for t in (a, b, e))
        gq, gk, gv, gg = (_new(t, last) for t in (q, q, v, v))
        if kept:
            k0, kp, top, inv, d = kept
            m, u = _row(q, arith), _row(q, arith)
            b, bp = _centre(b, arith)
            strides = _strides(q, v, g)
            _launch("tiled_double_q", arith, (q, k0, kp, v, g, a, b, bp, e, top, inv, d, m, u, gq, *strides), *sizes)
            _launch("tiled_double_g", arith, (q, k0, v, a, b, e, top, inv, m, gg, *_strides(q, v)), *sizes)
            args = q, k0, v, g, a, b, e, top, inv, d, m, u, gk, gv, *strides
            _launch("tiled_double_columns", arith, args, *sizes)
        else:
            args = q, k, v, g, a, b, e, gq, gk, gv, gg, *_strides(q, k, v, g)
            _launch("small_double_backward", arith, args, *sizes)
        return gq, gk, gv, gg

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("kernels.attention: a third derivative is not implemented; impl='eager' has it")


# ---------------------------------------------------------------------------------------------- launching
def _launch(name, arith, args, B, Cq, C, N, last):
    """Starts kernel `name` with its row of TABLE. args: its tensors, then strides, without the sizes. last: of _new."""
    _load()
    rows, step, chunk, warps, stages = _row_of_table(name, arith, Cq, args[0].device)
    chunk = min(chunk, _power_of_two(C))
    chunks = -(-C // chunk)
    small, queries = name.startswith("small"), _power_of_two(Cq)
    meta = dict(BN=_power_of_two(N), BI=rows, BJ=step, BQ=queries, BC=chunk, ONE=chunks == 1, LAST=last,
                PART=min(32, queries) if arith == "double" else queries, RAW=arith == "half",
                LOG2E=1.0 if arith in ("ieee", "double") else 1.4426950408889634,
                PREC="tf32" if arith == "tf32" else "ieee", UP=arith == "half" and bool(triton.knobs.runtime.interpret),
                ACC=tl.float64 if arith == "double" else tl.float32)
    meta = {key: value for key, value in meta.items() if key in globals()[name].arg_names}
    meta.update(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    grid = (B if small else B * -(-N // rows),)
    if name in ("small_forward", "tiled_forward", "tiled_double_g"):
        grid += (chunks,)
    elif small or chunks > 1 and name in ("tiled_columns", "tiled_double_columns"):
        grid += (1 + chunks,)
    _start(name, grid, (*args, Cq, C, N), meta)


def _row_of_table(name, arith, Cq, device):
    if arith == "tf32" and name in HOPPER and (Cq <= 16 or name.startswith("small")) and _is_hopper(device):
        return HOPPER[name]
    return (Cq > 32 and WIDE.get(name, {}).get(arith)) or TABLE[name][arith]


@functools.cache
def _is_hopper(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _start(name, grid, args, meta):
    with torch.cuda.device_of(args[0]):
        globals()[name][grid](*args, **meta)


def _centre(x, arith):
    """x for the logits and x for the products with Z, both contiguous; see _centred."""
    _load()
    B, Cq, N = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    meta = dict(BN=1024, PREC="tf32" if arith == "tf32" else "ieee",
                ACC=tl.float64 if arith == "double" else tl.float32, num_warps=4, enable_fp_fusion=True)
    _start("tiled_centre", (B, Cq), (x, y, *x.stride(), Cq, N), meta)
    return x.contiguous() if arith == "half" else y, y


def _strides(*tensors):
    return [s for t in tensors for s in t.stride()]


def _small_offsets(t):
    """t itself, or a copy where offsets inside one image would overflow the kernels' 32-bit index arithmetic."""
    t = t.resolve_neg()                 # a tensor may be the negative of what lies in memory
    reach = (t.shape[1] - 1) * t.stride(1) + (t.shape[2] - 1) * t.stride(2)
    return t if reach < 2**31 else t.contiguous()


def _is_small(Cq, N, arith):
    n, area = SMALL[arith]
    return N <= n and _power_of_two(N) * _power_of_two(Cq) <= area


def _power_of_two(n):
    return max(16, 1 << (n - 1).bit_length())       # 16: tl.dot's least width for bf16


def _new(t, last):
    """An empty tensor like t (B, C, N), in memory (B, N, C) if `last` and else (B, C, N)."""
    B, C, N = t.shape
    return t.new_empty(B, N, C).mT if last else t.new_empty(B, C, N)


def _row(q, arith):
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.float64 if arith == "double" else torch.float32)


# ---------------------------------------------------------------------------------------------- kernels
# They are jitted by _load() at the first launch: importing this file imports no Triton.
_KERNELS = []
_LOADING = threading.Lock()


def _jit(fn):
    _KERNELS.append(fn.__name__)
    return fn


def _load():
    """Imports Triton and jits the functions below in place (helpers too: kernels look them up as globals)."""
    global triton, tl
    import triton
    import triton.language as tl
    with _LOADING:                      # threads of nn.DataParallel come together
        while _KERNELS:
            name = _KERNELS.pop(0)
            globals()[name] = triton.jit(globals()[name])


@_jit
def small_forward(q, k, v, o, qb, qc, qn, kb, kc, kn, vb, vc, vn, Cq, C, N, BN: tl.constexpr, BQ: tl.constexpr,
                  BC: tl.constexpr, RAW: tl.constexpr, LAST: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
                  ACC: tl.constexpr):
    """One chunk of C (axis 1) of one image's o. Each chunk makes P anew, which is quicker than one after the other."""
    b = tl.program_id(0).to(tl.int64)
    n, cq = tl.arange(0, BN), tl.arange(0, BQ)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    Q, K, KC, P = _small_p(q + b * qb, k + b * kb, n, cq, qc, qn, kc, kn, Cq, N, RAW, PREC, UP, ACC)
    VT = _tile(v + b * vb, n, N, vn, c, C, vc)                                               # (j, c)
    _put(o + b * C * N, _dot(_operand(P, Q, PREC), VT, PREC, UP), n, N, c, C, LAST)


@_jit
def small_backward(q, k, v, g, dq, dk, dv, qb, qc, qn, kb, kc, kn, vb, vc, vn, gb, gc, gn, Cq, C, N, BN: tl.constexpr,
                   BQ: tl.constexpr, BC: tl.constexpr, RAW: tl.constexpr, LAST: tl.constexpr, PREC: tl.constexpr,
                   UP: tl.constexpr, ACC: tl.constexpr):
    """dq and dk of one image (program 0 of axis 1), and dv by chunks of C (programs 1 + n)."""
    b = tl.program_id(0).to(tl.int64)
    n, cq = tl.arange(0, BN), tl.arange(0, BQ)
    Q, K, KC, P = _small_p(q + b * qb, k + b * kb, n, cq, qc, qn, kc, kn, Cq, N, RAW, PREC, UP, ACC)
    if tl.program_id(1) == 0:
        X = tl.zeros((BN, BN), ACC)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            GT = _tile(g + b * gb, n, N, gn, c, C, gc)                                       # (i, c)
            V = _tile(v + b * vb, c, C, vc, n, N, vn)                                        # (c, j)
            X += _dot(GT, V, PREC, UP)
        Z = _operand(P * (X - tl.sum(P * X, 1)[:, None]), Q, PREC)
        _put(dq + b * Cq * N, _dot(Z, tl.trans(KC), PREC, UP), n, N, cq, Cq, LAST)
        _put(dk + b * Cq * N, _dot(tl.trans(Z), Q, PREC, UP), n, N, cq, Cq, LAST)
    else:
        c = (tl.program_id(1) - 1) * BC + tl.arange(0, BC)
        GT = _tile(g + b * gb, n, N, gn, c, C, gc)
        _put(dv + b * C * N, _dot(tl.trans(_operand(P, Q, PREC)), GT, PREC, UP), n, N, c, C, LAST)


@_jit
def small_double_backward(q, k, v, g, a, b_, e, gq, gk, gv, gg, qb, qc, qn, kb, kc, kn, vb, vc, vn, gb, gc, gn, Cq, C,
                          N, BN: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, RAW: tl.constexpr,
                          LAST: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr):
    """gq and gk of one image (program 0 of axis 1), and gv and gg by chunks of C (programs 1 + n)."""
    b = tl.program_id(0).to(tl.int64)
    n, cq = tl.arange(0, BN), tl.arange(0, BQ)
    Q, K, KC, P = _small_p(q + b * qb, k + b * kb, n, cq, qc, qn, kc, kn, Cq, N, RAW, PREC, UP, ACC)
    AT = _tile(a + b * Cq * N, n, N, 1, cq, Cq, N)                                           # (i, c)
    B, BP = _centred(_tile(b_ + b * Cq * N, cq, Cq, N, n, N, 1), n, N, RAW, PREC, ACC)      # (c, j)
    M = _dot(AT, K, PREC, UP) + _dot(Q, B, PREC, UP)
    M -= tl.sum(P * M, 1)[:, None]
    if tl.program_id(1) == 0:
        X = tl.zeros((BN, BN), ACC)
        F = tl.zeros((BN, BN), ACC)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            GT = _tile(g + b * gb, n, N, gn, c, C, gc)
            X += _dot(GT, _tile(v + b * vb, c, C, vc, n, N, vn), PREC, UP)
            F += _dot(GT, _tile(e + b * C * N, c, C, N, n, N, 1), PREC, UP)
        Z = P * (X - tl.sum(P * X, 1)[:, None])
        gS = Z * M + P * F
        gS = _operand(gS - P * tl.sum(gS, 1)[:, None], Q, PREC)
        Z = _operand(Z, Q, PREC)
        _put(gq + b * Cq * N, _dot(gS, tl.trans(KC), PREC, UP) + _dot(Z, tl.trans(BP), PREC, UP), n, N, cq, Cq, LAST)
        _put(gk + b * Cq * N, _dot(tl.trans(gS), Q, PREC, UP) + _dot(tl.trans(Z), AT, PREC, UP), n, N, cq, Cq, LAST)
    else:
        c = (tl.program_id(1) - 1) * BC + tl.arange(0, BC)
        W = _operand(P * M, Q, PREC)
        VT = _tile(v + b * vb, n, N, vn, c, C, vc)
        ET = _tile(e + b * C * N, n, N, 1, c, C, N)
        O = _dot(W, VT, PREC, UP) + _dot(_operand(P, Q, PREC), ET, PREC, UP)
        _put(gg + b * C * N, O, n, N, c, C, LAST)
        GT = _tile(g + b * gb, n, N, gn, c, C, gc)
        _put(gv + b * C * N, _dot(tl.trans(W), GT, PREC, UP), n, N, c, C, LAST)


@_jit
def _small_p(q, k, n, cq, qc, qn, kc, kn, Cq, N, RAW: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
             ACC: tl.constexpr):
    """One image's Q (i, c), K (c, j) for the logits, K centred for the products with Z, and P (i, j)."""
    Q = _tile(q, n, N, qn, cq, Cq, qc)
    K, KC = _centred(_tile(k, cq, Cq, kc, n, N, kn), n, N, RAW, PREC, ACC)
    S = tl.where(n[None, :] < N, _dot(Q, K, PREC, UP).to(ACC), float("-inf"))
    P = tl.exp(S - tl.max(S, 1)[:, None])
    return Q, K, KC, P / tl.sum(P, 1)[:, None]


@_jit
def _centred(x, n, N, RAW: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr):
    """x (c, n) as the logits take it, and less its mean over n. In half precision (RAW) the logits take it as it is:
    their products are exact, while the difference would be rounded once more."""
    y = x.to(ACC)
    y = _operand(tl.where(n[None, :] < N, y - (tl.sum(y, 1) / N)[:, None], 0), x, PREC)
    if RAW:
        return x, y
    else:
        return y, y


@_jit
def tiled_centre(x, y, xb, xc, xn, Cq, N, BN: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr):
    """y (B, Cq, N) = x less its mean over the positions."""
    b = tl.program_id(0).to(tl.int64)
    x += b * xb + tl.program_id(1) * xc
    y += (b * Cq + tl.program_id(1)) * N
    total = tl.zeros((BN,), ACC)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        total += tl.load(x + n * xn, mask=n < N, other=0).to(ACC)
    mean = tl.sum(total, 0) / N
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        old = tl.load(x + n * xn, mask=n < N, other=0)
        tl.store(y + n, _operand(old.to(ACC) - mean, old, PREC), mask=n < N)


@_jit
def tiled_forward(q, k, v, o, largest, inv, qb, qc, qn, vb, vc, vn, Cq, C, N, LOG2E: tl.constexpr, BI: tl.constexpr,
                  BJ: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr, PREC: tl.constexpr,
                  UP: tl.constexpr, ACC: tl.constexpr):
    blocks = tl.cdiv(N, BI)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    cq = tl.arange(0, BQ)
    q, k, v, o = q + b * qb, k + b * Cq * N, v + b * vb, o + b * C * N
    Q = _tile(q, i, N, qn, cq, Cq, qc)
    top = tl.full((BI,), float("-inf"), ACC)
    total = tl.zeros((BI,), ACC)
    O = tl.zeros((BI, BC), ACC)
    for j0 in range(0, N, BJ):
        j = j0 + tl.arange(0, BJ)
        S = _dot(Q, _tile(k, cq, Cq, N, j, N, 1), PREC, UP) * LOG2E
        S = tl.where(j[None, :] < N, S, float("-inf"))
        new = tl.maximum(top, tl.max(S, 1))
        P = _exp(S - new[:, None], LOG2E)
        scale = _exp(top - new, LOG2E)
        total = total * scale + tl.sum(P, 1)
        O = O * scale[:, None] + _dot(_operand(P, Q, PREC), _tile(v, j, N, vn, c, C, vc), PREC, UP)
        top = new
    _put(o, O / total[:, None], i, N, c, C, LAST)
    if tl.program_id(1) == 0:
        tl.store(largest + b * N + i, top, mask=i < N)
        tl.store(inv + b * N + i, 1 / total, mask=i < N)


@_jit
def tiled_rows(q, k, kp, v, g, o, top, inv, d, dq, qb, qc, qn, vb, vc, vn, gb, gc, gn, Cq, C, N, LOG2E: tl.constexpr,
               BI: tl.constexpr, BJ: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, ONE: tl.constexpr,
               RAW: tl.constexpr, LAST: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr):
    """D and dQ of BI rows. D = rowsum(G*O) is rounded apart from X; what is left of <P*(X - D)> at the end is
    taken off, or it would weigh as much as eager's whole error."""
    blocks = tl.cdiv(N, BI)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    cq = tl.arange(0, BQ)
    q, k, kp, v, g, o = q + b * qb, k + b * Cq * N, kp + b * Cq * N, v + b * vb, g + b * gb, o + b * C * N
    Q = _tile(q, i, N, qn, cq, Cq, qc)
    L = tl.load(top + b * N + i, mask=i < N, other=0)
    I = tl.load(inv + b * N + i, mask=i < N, other=1)
    D = tl.zeros((BI,), ACC)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        GT = _tile(g, i, N, gn, c, C, gc)                       # with one chunk (ONE) it stays for the sweep
        D += tl.sum(GT.to(ACC) * _tile(o, i, N, C if LAST else 1, c, C, 1 if LAST else N).to(ACC), 1)
    GT = _tile(g, i, N, gn, tl.arange(0, BC), C, gc)
    dQ = tl.zeros((BI, BQ), ACC)
    PK = tl.zeros((BI, BQ), ACC)
    rest = tl.zeros((BI,), ACC)
    sum_p = tl.zeros((BI,), ACC)
    for j0 in range(0, N, BJ):
        j = j0 + tl.arange(0, BJ)
        K = _tile(k, cq, Cq, N, j, N, 1)
        P = tl.where(j[None, :] < N, _exp(_dot(Q, K, PREC, UP) * LOG2E - L[:, None], LOG2E) * I[:, None], 0)
        if ONE:
            X = _dot(GT, _tile(v, tl.arange(0, BC), C, vc, j, N, vn), PREC, UP)
        else:
            X = tl.zeros((BI, BJ), ACC)
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                X += _dot(_tile(g, i, N, gn, c, C, gc), _tile(v, c, C, vc, j, N, vn), PREC, UP)
        if RAW:
            K = _tile(kp, cq, Cq, N, j, N, 1)
        Z = P * (X - D[:, None])
        rest += tl.sum(Z, 1)
        sum_p += tl.sum(P, 1)
        KT = tl.trans(K)
        dQ += _dot(_operand(Z, Q, PREC), KT, PREC, UP)
        PK += _dot(_operand(P, Q, PREC), KT, PREC, UP)
    rest /= sum_p
    _put(dq + b * Cq * N, dQ - rest[:, None] * PK, i, N, cq, Cq, LAST)
    tl.store(d + b * N + i, D + rest, mask=i < N)


@_jit
def tiled_columns(q, k, v, g, top, inv, d, dk, dv, qb, qc, qn, vb, vc, vn, gb, gc, gn, Cq, C, N, LOG2E: tl.constexpr,
                  BI: tl.constexpr, BJ: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, ONE: tl.constexpr,
                  LAST: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr):
    """dK and dV of BI columns; tiles are transposed, (j, i). With several chunks of C, program 0 of axis 1
    makes dK and program 1 + n makes chunk n of dV, so that no accumulator is wider than a chunk."""
    blocks = tl.cdiv(N, BI)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    cq = tl.arange(0, BQ)
    q, k, v, g = q + b * qb, k + b * Cq * N, v + b * vb, g + b * gb
    top, inv, d = top + b * N, inv + b * N, d + b * N
    KT = _tile(k, j, N, 1, cq, Cq, N)
    if ONE:
        c = tl.arange(0, BC)
        VT = _tile(v, j, N, vn, c, C, vc)
        dK = tl.zeros((BI, BQ), ACC)
        dV = tl.zeros((BI, BC), ACC)
        for i0 in range(0, N, BJ):
            i = i0 + tl.arange(0, BJ)
            Q = _tile(q, cq, Cq, qc, i, N, qn)
            G = _tile(g, c, C, gc, i, N, gn)
            L = tl.load(top + i, mask=i < N, other=0)
            I = tl.load(inv + i, mask=i < N, other=0)
            D = tl.load(d + i, mask=i < N, other=0)
            P = _exp(_dot(KT, Q, PREC, UP) * LOG2E - L[None, :], LOG2E) * I[None, :]
            dV += _dot(_operand(P, KT, PREC), tl.trans(G), PREC, UP)
            X = _dot(VT, G, PREC, UP)
            dK += _dot(_operand(P * (X - D[None, :]), KT, PREC), tl.trans(Q), PREC, UP)
        _put(dk + b * Cq * N, dK, j, N, cq, Cq, LAST)
        _put(dv + b * C * N, dV, j, N, c, C, LAST)
    elif tl.program_id(1) == 0:
        dK = tl.zeros((BI, BQ), ACC)
        for i0 in range(0, N, BJ):
            i = i0 + tl.arange(0, BJ)
            Q = _tile(q, cq, Cq, qc, i, N, qn)
            L = tl.load(top + i, mask=i < N, other=0)
            I = tl.load(inv + i, mask=i < N, other=0)
            D = tl.load(d + i, mask=i < N, other=0)
            P = _exp(_dot(KT, Q, PREC, UP) * LOG2E - L[None, :], LOG2E) * I[None, :]
            X = tl.zeros((BI, BJ), ACC)
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                X += _dot(_tile(v, j, N, vn, c, C, vc), _tile(g, c, C, gc, i, N, gn), PREC, UP)
            dK += _dot(_operand(P * (X - D[None, :]), KT, PREC), tl.trans(Q), PREC, UP)
        _put(dk + b * Cq * N, dK, j, N, cq, Cq, LAST)
    else:
        c = (tl.program_id(1) - 1) * BC + tl.arange(0, BC)
        dV = tl.zeros((BI, BC), ACC)
        for i0 in range(0, N, BJ):
            i = i0 + tl.arange(0, BJ)
            L = tl.load(top + i, mask=i < N, other=0)
            I = tl.load(inv + i, mask=i < N, other=0)
            P = _exp(_dot(KT, _tile(q, cq, Cq, qc, i, N, qn), PREC, UP) * LOG2E - L[None, :], LOG2E) * I[None, :]
            dV += _dot(_operand(P, KT, PREC), _tile(g, i, N, gn, c, C, gc), PREC, UP)
        _put(dv + b * C * N, dV, j, N, c, C, LAST)


@_jit
def tiled_double_q(q, k, kp, v, g, a, b_, bp, e, top, inv, d, m, u, gq, qb, qc, qn, vb, vc, vn, gb, gc, gn, Cq, C, N,
                   LOG2E: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
                   PART: tl.constexpr, ONE: tl.constexpr, RAW: tl.constexpr, LAST: tl.constexpr, PREC: tl.constexpr,
                   UP: tl.constexpr, ACC: tl.constexpr):
    """m, u and gQ of BI rows in one sweep: m and u are known only at its end, so what they multiply,
    dQ and P K, is summed beside them and taken off there. Dividing by <P>, 1 but for rounding, makes W's rows sum to
    zero as closely as if P had been normalised by its own sum."""
    blocks = tl.cdiv(N, BI)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    cq = tl.arange(0, BQ)
    q, k, kp, v, g = q + b * qb, k + b * Cq * N, kp + b * Cq * N, v + b * vb, g + b * gb
    a, b_, bp, e = a + b * Cq * N, b_ + b * Cq * N, bp + b * Cq * N, e + b * C * N
    Q = _tile(q, i, N, qn, cq, Cq, qc)
    AT = _tile(a, i, N, 1, cq, Cq, N)
    L = tl.load(top + b * N + i, mask=i < N, other=0)
    I = tl.load(inv + b * N + i, mask=i < N, other=1)
    D = tl.load(d + b * N + i, mask=i < N, other=0)
    GT = _tile(g, i, N, gn, tl.arange(0, BC), C, gc)
    sum_m = tl.zeros((BI,), ACC)
    sum_u = tl.zeros((BI,), ACC)
    sum_p = tl.zeros((BI,), ACC)
    dQ = tl.zeros((BI, BQ), ACC)
    PK = tl.zeros((BI, BQ), ACC)
    R = tl.zeros((BI, BQ), ACC)
    for j0 in range(0, N, BJ):
        j = j0 + tl.arange(0, BJ)
        K = _tile(k, cq, Cq, N, j, N, 1)
        B = _tile(b_, cq, Cq, N, j, N, 1)
        if PART == BQ:
            S = _dot(Q, K, PREC, UP)
            M = _dot(AT, K, PREC, UP) + _dot(Q, B, PREC, UP)
        else:
            S, M = _in_parts(q, k, a, b_, i, j, qc, qn, Cq, N, BI, BJ, BQ, PART, PREC, UP, ACC)
        P = tl.where(j[None, :] < N, _exp(S * LOG2E - L[:, None], LOG2E) * I[:, None], 0)
        if ONE:
            c = tl.arange(0, BC)
            X = _dot(GT, _tile(v, c, C, vc, j, N, vn), PREC, UP)
            F = _dot(GT, _tile(e, c, C, N, j, N, 1), PREC, UP)
        else:
            X = tl.zeros((BI, BJ), ACC)
            F = tl.zeros((BI, BJ), ACC)
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                GC = _tile(g, i, N, gn, c, C, gc)
                X += _dot(GC, _tile(v, c, C, vc, j, N, vn), PREC, UP)
                F += _dot(GC, _tile(e, c, C, N, j, N, 1), PREC, UP)
        Z = P * (X - D[:, None])
        Y = Z * M + P * F
        sum_m += tl.sum(P * M, 1)
        sum_u += tl.sum(Y, 1)
        sum_p += tl.sum(P, 1)
        if RAW:
            K = _tile(kp, cq, Cq, N, j, N, 1)
            B = _tile(bp, cq, Cq, N, j, N, 1)
        KT = tl.trans(K)
        Z = _operand(Z, Q, PREC)
        dQ += _dot(Z, KT, PREC, UP)
        PK += _dot(_operand(P, Q, PREC), KT, PREC, UP)
        R += _dot(_operand(Y, Q, PREC), KT, PREC, UP) + _dot(Z, tl.trans(B), PREC, UP)
    sum_m /= sum_p
    sum_u /= sum_p
    _put(gq + b * Cq * N, R - sum_m[:, None] * dQ - sum_u[:, None] * PK, i, N, cq, Cq, LAST)
    tl.store(m + b * N + i, sum_m, mask=i < N)
    tl.store(u + b * N + i, sum_u, mask=i < N)


@_jit
def tiled_double_g(q, k, v, a, b_, e, top, inv, m, gg, qb, qc, qn, vb, vc, vn, Cq, C, N, LOG2E: tl.constexpr,
                   BI: tl.constexpr, BJ: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr,
                   PREC: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr):
    """gG of BI rows and one chunk of C."""
    blocks = tl.cdiv(N, BI)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    cq = tl.arange(0, BQ)
    q, k, v = q + b * qb, k + b * Cq * N, v + b * vb
    a, b_, e = a + b * Cq * N, b_ + b * Cq * N, e + b * C * N
    Q = _tile(q, i, N, qn, cq, Cq, qc)
    AT = _tile(a, i, N, 1, cq, Cq, N)
    L = tl.load(top + b * N + i, mask=i < N, other=0)
    I = tl.load(inv + b * N + i, mask=i < N, other=0)
    mi = tl.load(m + b * N + i, mask=i < N, other=0)
    R = tl.zeros((BI, BC), ACC)
    for j0 in range(0, N, BJ):
        j = j0 + tl.arange(0, BJ)
        K = _tile(k, cq, Cq, N, j, N, 1)
        P = tl.where(j[None, :] < N, _exp(_dot(Q, K, PREC, UP) * LOG2E - L[:, None], LOG2E) * I[:, None], 0)
        M = _dot(AT, K, PREC, UP) + _dot(Q, _tile(b_, cq, Cq, N, j, N, 1), PREC, UP)
        R += _dot(_operand(P * (M - mi[:, None]), Q, PREC), _tile(v, j, N, vn, c, C, vc), PREC, UP)
        R += _dot(_operand(P, Q, PREC), _tile(e, j, N, 1, c, C, N), PREC, UP)
    _put(gg + b * C * N, R, i, N, c, C, LAST)


@_jit
def tiled_double_columns(q, k, v, g, a, b_, e, top, inv, d, m, u, gk, gv, qb, qc, qn, vb, vc, vn, gb, gc, gn, Cq, C, N,
                         LOG2E: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
                         ONE: tl.constexpr, LAST: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
                         ACC: tl.constexpr):
    """gK and gV of BI columns; tiles are (j, i). With several chunks of C, program 0 of axis 1 makes gK and program
    1 + n chunk n of gV, so that no accumulator is wider than a chunk."""
    blocks = tl.cdiv(N, BI)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    cq = tl.arange(0, BQ)
    q, k, v, g = q + b * qb, k + b * Cq * N, v + b * vb, g + b * gb
    a, b_, e = a + b * Cq * N, b_ + b * Cq * N, e + b * C * N
    top, inv, d, m, u = top + b * N, inv + b * N, d + b * N, m + b * N, u + b * N
    KT = _tile(k, j, N, 1, cq, Cq, N)
    BT = _tile(b_, j, N, 1, cq, Cq, N)
    if ONE:
        c = tl.arange(0, BC)
        gK = tl.zeros((BI, BQ), ACC)
        gV = tl.zeros((BI, BC), ACC)
        for i0 in range(0, N, BJ):
            i = i0 + tl.arange(0, BJ)
            Q = _tile(q, cq, Cq, qc, i, N, qn)
            A = _tile(a, cq, Cq, N, i, N, 1)
            G = _tile(g, c, C, gc, i, N, gn)
            L, I, D, mi, ui = _of_rows(top, inv, d, m, u, i, N)
            P = _exp(_dot(KT, Q, PREC, UP) * LOG2E - L[None, :], LOG2E) * I[None, :]
            M = _dot(KT, A, PREC, UP) + _dot(BT, Q, PREC, UP) - mi[None, :]
            gV += _dot(_operand(P * M, KT, PREC), tl.trans(G), PREC, UP)
            Z = P * (_dot(_tile(v, j, N, vn, c, C, vc), G, PREC, UP) - D[None, :])
            gK += _dot(_operand(Z, KT, PREC), tl.trans(A), PREC, UP)
            F = _dot(_tile(e, j, N, 1, c, C, N), G, PREC, UP)
            gK += _dot(_operand(Z * M + P * (F - ui[None, :]), KT, PREC), tl.trans(Q), PREC, UP)
        _put(gk + b * Cq * N, gK, j, N, cq, Cq, LAST)
        _put(gv + b * C * N, gV, j, N, c, C, LAST)
    elif tl.program_id(1) == 0:
        gK = tl.zeros((BI, BQ), ACC)
        for i0 in range(0, N, BJ):
            i = i0 + tl.arange(0, BJ)
            Q = _tile(q, cq, Cq, qc, i, N, qn)
            A = _tile(a, cq, Cq, N, i, N, 1)
            L, I, D, mi, ui = _of_rows(top, inv, d, m, u, i, N)
            X = tl.zeros((BI, BJ), ACC)
            F = tl.zeros((BI, BJ), ACC)
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                G = _tile(g, c, C, gc, i, N, gn)
                X += _dot(_tile(v, j, N, vn, c, C, vc), G, PREC, UP)
                F += _dot(_tile(e, j, N, 1, c, C, N), G, PREC, UP)
            P = _exp(_dot(KT, Q, PREC, UP) * LOG2E - L[None, :], LOG2E) * I[None, :]
            M = _dot(KT, A, PREC, UP) + _dot(BT, Q, PREC, UP) - mi[None, :]
            Z = P * (X - D[None, :])
            gS = Z * M + P * (F - ui[None, :])
            gK += _dot(_operand(gS, KT, PREC), tl.trans(Q), PREC, UP)
            gK += _dot(_operand(Z, KT, PREC), tl.trans(A), PREC, UP)
        _put(gk + b * Cq * N, gK, j, N, cq, Cq, LAST)
    else:
        c = (tl.program_id(1) - 1) * BC + tl.arange(0, BC)
        gV = tl.zeros((BI, BC), ACC)
        for i0 in range(0, N, BJ):
            i = i0 + tl.arange(0, BJ)
            Q = _tile(q, cq, Cq, qc, i, N, qn)
            A = _tile(a, cq, Cq, N, i, N, 1)
            L = tl.load(top + i, mask=i < N, other=0)
            I = tl.load(inv + i, mask=i < N, other=0)
            mi = tl.load(m + i, mask=i < N, other=0)
            P = _exp(_dot(KT, Q, PREC, UP) * LOG2E - L[None, :], LOG2E) * I[None, :]
            W = P * (_dot(KT, A, PREC, UP) + _dot(BT, Q, PREC, UP) - mi[None, :])
            gV += _dot(_operand(W, KT, PREC), _tile(g, i, N, gn, c, C, gc), PREC, UP)
        _put(gv + b * C * N, gV, j, N, c, C, LAST)


@_jit
def _of_rows(top, inv, d, m, u, i, N):
    """All that the rows i need from outside their block."""
    L = tl.load(top + i, mask=i < N, other=0)
    I = tl.load(inv + i, mask=i < N, other=0)
    D = tl.load(d + i, mask=i < N, other=0)
    M = tl.load(m + i, mask=i < N, other=0)
    U = tl.load(u + i, mask=i < N, other=0)
    return L, I, D, M, U


@_jit
def _in_parts(q, k, a, b_, i, j, qc, qn, Cq, N, BI: tl.constexpr, BJ: tl.constexpr, BQ: tl.constexpr,
              PART: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr):
    """S and M (i, j) by PART of the BQ channels: without tensor cores a thread holds whole rows of a product."""
    S = tl.zeros((BI, BJ), ACC)
    M = tl.zeros((BI, BJ), ACC)
    for c0 in range(0, BQ, PART):
        c = c0 + tl.arange(0, PART)
        q_part, k_part = _tile(q, i, N, qn, c, Cq, qc), _tile(k, c, Cq, N, j, N, 1)
        S += _dot(q_part, k_part, PREC, UP)
        M += _dot(_tile(a, i, N, 1, c, Cq, N), k_part, PREC, UP)
        M += _dot(q_part, _tile(b_, c, Cq, N, j, N, 1), PREC, UP)
    return S, M


@_jit
def _dot(a, b, PREC: tl.constexpr, UP: tl.constexpr):
    if UP:      # Triton's interpreter multiplies the raw bits of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PREC)


@_jit
def _operand(x, like, PREC: tl.constexpr):
    """x as a product takes it, in like's type; for tf32 rounded to its 10 bits, because tensor cores cut the others off
    and that is twice the error. What is loaded is cut: to round it would take it out of the asynchronous copies."""
    if PREC == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)                       # NaN would overflow to 0
    else:
        return x.to(like.dtype)


@_jit
def _exp(x, LOG2E: tl.constexpr):
    """e to the x / LOG2E: 2^x, where the factor costs nothing beside the tensor cores' rounding, or e^x (LOG2E = 1)."""
    if LOG2E == 1:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@_jit
def _tile(p, r, R, sr, c, C, sc):
    """p[r, c] as a (len(r), len(c)) tile, 0 outside R x C."""
    return tl.load(p + r[:, None] * sr + c[None, :] * sc, mask=(r[:, None] < R) & (c[None, :] < C), other=0)


@_jit
def _put(p, x, n, N, c, C, LAST: tl.constexpr):
    """x (len(n), len(c)) into an image of C channels and N positions, in memory (N, C) if LAST and else (C, N)."""
    place = n[:, None] * C + c[None, :] if LAST else n[:, None] + c[None, :] * N
    tl.store(p + place, x.to(p.dtype.element_ty), mask=(n[:, None] < N) & (c[None, :] < C))
