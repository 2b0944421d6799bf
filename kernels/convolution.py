"""A convolution whose second derivative runs at the speed of its first, and a LeakyReLU without one.

    from kernels.convolution import fast_second_derivative
    fast_second_derivative(D)               # every nn.Conv2d and nn.LeakyReLU in D; values and state_dict stay

A gradient penalty differentiates the input gradient of a convolution with respect to its weight. That is once more an
ordinary weight gradient, for which every library has a tuned kernel, but PyTorch computes it as a forward convolution
of transposed tensors, with an output as large as a filter and a filter as large as an image. Here the input gradient is
written as the transposed convolution that it is, and autograd then finds the right kernels by itself, in any order of
derivative. The idea is that of Karras et al., Training Generative Adversarial Networks with Limited Data, 2020 (their
conv2d_gradfix). The second derivative of a LeakyReLU is zero; PyTorch makes a tensor of zeros and adds it.
"""
import functools

import torch
from torch import nn
from torch.nn import functional as F


def fast_second_derivative(net):
    """Let every nn.Conv2d and nn.LeakyReLU inside `net` compute as below; parameters, hooks and state_dict stay.

    Returns net, which may be copied and pickled. Left alone: padding by a word or in another mode than zeros, and
    subclasses with a _conv_forward of their own, or of LeakyReLU.
    """
    for m in net.modules():
        if type(m) is nn.LeakyReLU:
            m.forward = functools.partial(_leaky_relu, m)
        if getattr(type(m), "_conv_forward", None) is nn.Conv2d._conv_forward and _fits(m):
            m._conv_forward = functools.partial(_forward, m)
    return net


def _fits(m):
    pairs = all(isinstance(number, tuple) for number in (m.stride, m.padding, m.dilation))
    return m.padding_mode == "zeros" and pairs


def _forward(m, x, w, b):
    """What takes the place of m._conv_forward; by torch's own where the layer was changed since."""
    if not _fits(m):
        return nn.Conv2d._conv_forward(m, x, w, b)
    return conv2d(x, w, b, m.stride, m.padding, m.dilation, m.groups)


def conv2d(x, w, b=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """torch.nn.functional.conv2d for pairs of int, with quick second derivatives; any order of derivative is exact.

    x (B, Cin, H, W), w (Cout, Cin / groups, kh, kw), b (Cout,) or None -> (B, Cout, H', W'). It is torch's own without
    gradients, under autocast, torch.compile, torch.func, forward mode, of complex numbers and of one image (C, H, W).
    """
    if _left_to_torch(x):
        return F.conv2d(x, w, b, stride, padding, dilation, groups)
    # Other nodes, because the engine tells whether a gradient is wanted only of nodes that are no leaves. Not view_as,
    # which gives a dimension of size 1 another stride, and the memory layout is lost.
    x, w, b = (t if t is None else torch.ops.aten.alias(t) for t in (x, w, b))
    return _Conv2d.apply(x, w, b, stride, padding, dilation, groups)


def _left_to_torch(x):
    """Whether x is one that no second derivative is taken of, or that a Function cannot take."""
    if not torch.is_grad_enabled() or x.dim() != 4 or x.is_complex() or x.is_meta:
        return True
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return traced or forward_mode or torch.is_autocast_enabled(x.device.type)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, stride, padding, dilation, groups):
        ctx.save_for_backward(x, w)
        ctx.how = stride, padding, dilation, groups
        return F.conv2d(x, w, b, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        mask = [_wanted(node) for node, _ in ctx.next_functions] + [False]      # without b there are only two
        apart = mask[0] and torch.is_grad_enabled()             # dx will be differentiated: a convolution of its own
        dx = dw = db = None
        if mask[0] and not apart or mask[1] or mask[2]:
            mask = [mask[0] and not apart, *mask[1:3]]
            dx, dw, db = torch.ops.aten.convolution_backward(
                g, x, w, [len(w)], stride, padding, dilation, False, [0, 0], groups, mask)
        if apart:
            rest = []                                           # rows and columns at the end that a stride left out
            for k in (0, 1):
                reach = (g.shape[2 + k] - 1) * stride[k] + dilation[k] * (w.shape[2 + k] - 1) + 1 - 2 * padding[k]
                rest.append(x.shape[2 + k] - reach)
            with torch.autocast(g.device.type, enabled=False):  # as torch's own, which knows no autocast
                dx = F.conv_transpose2d(g, w, None, stride, padding, rest, groups, dilation)
        return dx, dw, db, None, None, None, None


def _leaky_relu(m, x):
    """What takes the place of m.forward: x as if it were a gradient, let through by its own sign, which is constant."""
    if m.inplace:
        return nn.LeakyReLU.forward(m, x)
    return torch.ops.aten.leaky_relu_backward(x, x.detach(), m.negative_slope, False)


def _wanted(node):
    """Whether the backward pass that is running needs the gradient that goes to `node`, which is no leaf's."""
    return node is not None and torch._C._will_engine_execute_node(node)
