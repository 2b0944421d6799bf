"""Spectral normalisation of all layers of a network at once, in less than half of the launches of torch's own.

    from kernels.spectral_norm import SpectralNorms
    norms = SpectralNorms(D)                # of the layers to which torch's parametrization spectral_norm was given
    with norms():                           # one power iteration, unless D is in eval mode; all see the same weights
        loss(D).backward()

A critic has four such layers. To learn once and to be looked at once while it is frozen costs it 115 operations by
torch's code and 50 by this one, and each moves so little that a GPU spends longer on starting it. Here the vectors of
all layers are the rows of one padded table; only the products with the weights stay apart, and the largest singular
value falls off as the length of the last one. The iteration is that of T. Miyato et al., Spectral Normalization for
GANs, 2018, algorithm 1, in torch's order; state_dict, buffers and, up to rounding, values and all derivatives are those
of torch.nn.utils.parametrizations.spectral_norm, whose own code runs outside.
"""
import contextlib
import functools

import torch
from torch.autograd import Function
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm


class SpectralNorms:
    """The spectrally normed weights of `net`, made together. net: any module.

    What is parametrized otherwise, or twice, or with several power iterations, is left to torch, whose results are then
    kept for the length of the context.
    """

    def __init__(self, net):
        self.owners, self.norms, self.made, self.mine = [], [], None, []
        for m in net.modules():
            if isinstance(m, parametrize.ParametrizationList) and len(m) == 1 and type(m[0]) is _SpectralNorm:
                w, first = m.original, self.owners[0].original if self.owners else m.original
                matrix = w.dim() > 1 and w.is_floating_point() and m[0].n_power_iterations == 1
                if matrix and (w.dtype, w.device) == (first.dtype, first.device):           # one table holds them all
                    self.owners.append(m)
                    self.norms.append(m[0])

    @contextlib.contextmanager
    def __call__(self):
        """Inside, layer.weight is one tensor, made with those of all layers when the first is asked for.

        A power iteration moves u and v before, if the parametrization is in training mode. Leave the context before the
        parameters change, or begin to require a gradient.
        """
        if self.made is not None:                                   # one inside another
            yield
            return
        self.made = {}                                              # another SpectralNorms may make some already
        self.mine = [k for k, norm in enumerate(self.norms) if "forward" not in vars(norm)]
        for k in self.mine:
            self.norms[k].forward = functools.partial(self.normed, k)
        try:
            with parametrize.cached():
                yield
        finally:
            self.made = None
            for k in self.mine:
                del self.norms[k].forward

    def normed(self, k, weight):
        if k not in self.made:
            alike = [j for j in self.mine if self.norms[j].training == self.norms[k].training]
            weights = [self.owners[j].original for j in alike]
            self.made.update(zip(alike, self.make([self.norms[j] for j in alike], weights)))
        return self.made[k]

    def make(self, norms, weights):
        """All in training mode or none -> W / sigma of each layer, differentiable in W."""
        kept, n = [p._u for p in norms] + [p._v for p in norms], len(norms)
        with torch.no_grad():
            matrices = [p._reshape_weight_to_matrix(w) for p, w in zip(norms, weights)]
            us, vs, products = weights[0].new_zeros(3, n, max(map(len, kept)))
            rows = [row[:len(t)] for row, t in zip((*us, *vs), kept)]
            if norms[0].training:
                eps = min(p.eps for p in norms)
                for w, v, row in zip(matrices, kept[n:], rows):
                    torch.mv(w, v, out=row)
                us /= torch.linalg.vector_norm(us, dim=1, keepdim=True).clamp_(min=eps)
                for w, u, row in zip(matrices, rows, rows[n:]):
                    torch.mv(w.t(), u, out=row)
                sigmas = torch.linalg.vector_norm(vs, dim=1)        # u^T W v, as v will be W^T u / |W^T u|
                vs /= sigmas[:, None].clamp(min=eps)
                torch._foreach_copy_(kept, rows)
            else:
                torch._foreach_copy_(rows, kept)
                for w, v, row in zip(matrices, kept[n:], products):
                    torch.mv(w, v, out=row[:len(w)])
                sigmas = (products * us).sum(1)
        with torch.enable_grad():                                   # the first use may want none, a later one may
            return _Normed.apply([p.dim for p in norms], us, vs, sigmas, *weights)


class _Normed(Function):
    """weights / sigmas, where sigma_l = u_l^T W_l v_l with u and v held fixed.

    us, vs: tables with a row per layer, filled up with zeros; dims: the dimension of each weight along which u runs.
    """

    @staticmethod
    def forward(ctx, dims, us, vs, sigmas, *weights):
        ctx.dims = dims
        ctx.save_for_backward(us, vs, sigmas, *weights)
        return tuple(w / s for w, s in zip(weights, sigmas.unbind()))

    @staticmethod
    def backward(ctx, *grads):
        us, vs, sigmas, *weights = ctx.saved_tensors
        out = []
        if torch.is_grad_enabled():                                 # to be differentiated, and sigma moves with W
            for g, w, dim, u, v in zip(grads, weights, ctx.dims, us, vs):
                if not w.requires_grad:
                    out.append(None)
                    continue
                u, v = _laid_out(w, dim, u, v)
                w = w.view_as(w)                                    # or else hooks of the parameter ran here, too
                out += torch.autograd.grad(w / (w * u * v).sum(), w, g, create_graph=True)
            return *[None] * 4, *out
        shares = torch.stack([_dot(g, w) for g, w in zip(grads, weights)]) / sigmas
        for g, w, dim, s, u, v in zip(grads, weights, ctx.dims, sigmas.unbind(), us * shares[:, None], vs):
            u, v = _laid_out(w, dim, u, v)
            out.append(torch.addcmul(g, u, v, value=-1).div_(s))    # (g - <g, W / sigma> u v^T) / sigma
        return *[None] * 4, *out


def _laid_out(w, dim, u, v):
    """u and v as views whose product has the shape of w and is u along dimension `dim`, v along all others."""
    u = u[:w.shape[dim]].view([-1 if k == dim else 1 for k in range(w.dim())])
    return u, v[:w.numel() // w.shape[dim]].view([1 if k == dim else n for k, n in enumerate(w.shape)])


def _dot(a, b):
    """Sum of a * b in one pass; both are read in the order in which b lies in memory."""
    order = sorted(range(b.dim()), key=b.stride, reverse=True)
    return torch.dot(a.permute(order).flatten(), b.permute(order).flatten())
