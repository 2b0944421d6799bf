"""Self-attention in plain PyTorch, and its first and second derivatives written out: what the kernels must equal.

Positions stand last as in the kernels' interface: q, k (B, Cq, N), v, o, g (B, C, N). The derivation and the names
(P, X, D, Z; A, B, E; M, W, F, u) are in attention.py's docstring. Everything here makes N x N matrices.
"""
import torch

# Of one block of attention_blocked. Smaller blocks are a little faster still on idle cores (README.md), but where another
# process shares the cores every parallel region waits for its slowest thread, and small blocks have many regions.
BLOCK_BYTES = 16 << 20


def attention(q, k, v):
    """o (B, C, N) for q, k (B, Cq, N), v (B, C, N); any number of derivatives by autograd.

    P v^T rather than v P^T: the second makes the softmax's backward copy a transposed N x N matrix.
    """
    p = torch.softmax(torch.bmm(q.transpose(1, 2), k), -1)                              # (B, N, N)
    o = torch.bmm(p, v.transpose(1, 2)).transpose(1, 2)                                 # (B, C, N), laid out as (B, N, C)
    return o if v.stride(1) < v.stride(2) else o.contiguous()                           # as v is


def attention_blocked(q, k, v):
    """The same by blocks of images, or of rows where one image is larger, of at most BLOCK_BYTES (one row at least). For
    the CPU: a matrix of B x N x N leaves the cache, and the allocator hands its pages back after every use."""
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


def _softmax_map(p, x):
    """The softmax's differential, P * (X - <P*X>): its matrix is symmetric, so it serves both directions."""
    return p * (x - (p * x).sum(-1, keepdim=True))


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


# ---------------------------------------------------------------------------------------------- on the CPU
# torch multiplies float32 matrices on x86 by MKL, which on an AMD processor stays below AVX-512; oneDNN, which torch's
# convolutions use, does not, and was about twice as fast (bench_attention). torch.compile reaches it by this operation: x w^T of two matrices.
try:
    _linear = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
except AttributeError:
    _linear = None
FUSED_FROM_N = 256              # below, a matrix is so small that the calls cost more than the products


def _times(x, w):
    """x (M, K) @ w (N, K)^T -> (M, N)."""
    return _linear(x, w, None, "none", [], "")


def _dense(x):
    """x (B, M, N) itself or a copy: of matrices with gaps oneDNN multiplies number by number, hundreds of times slower."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _softmax_of_logits(q, k):
    return torch.softmax(_times(q, k), -1)


class _Fused(torch.autograd.Function):
    """Attention image by image, so that its N x N matrices stay in the cache and none is kept for the backward pass.

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
        if torch.is_grad_enabled():
            leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(attention_blocked(*leaves), leaves, g, create_graph=True)
        g = _dense(g)
        qt, kt, vt, gt = (x.mT.contiguous() for x in (q, k, v, g))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for b in range(len(q)):
            p = _softmax_of_logits(qt[b], kt[b])
            z = torch._softmax_backward_data(_times(gt[b], vt[b]), p, -1, p.dtype)
            dq[b], dk[b], dv[b] = _times(k[b], z), _times(q[b], z.t()), _times(g[b], p.t())
        return dq, dk, dv


def attention_cpu(q, k, v):
    """The quickest form on a CPU: fused in float32 from FUSED_FROM_N positions on, else blocked."""
    fused = _linear is not None and q.shape[2] >= FUSED_FROM_N and q.dtype == torch.float32 and not torch.compiler.is_compiling() \
        and not torch._C._are_functorch_transforms_active()
    return _Fused.apply(*map(_dense, (q, k, v))) if fused else attention_blocked(q, k, v)
