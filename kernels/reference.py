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
    return torch.bmm(p, v.transpose(1, 2)).transpose(1, 2).contiguous()


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
