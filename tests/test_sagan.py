"""sagan.py: the networks have the reference's sizes, attention and losses have their exact values."""
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import sagan


def trainable(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_parameter_counts_of_the_reference():
    assert trainable(sagan.Generator()) == 3_832_885
    assert trainable(sagan.Discriminator()) == 3_175_299


@pytest.mark.parametrize("size", [32, 64, 128])
def test_sizes(size):
    x = sagan.Generator(image_size=size, ch=4)(torch.randn(3, 128))
    assert x.shape == (3, 3, size, size) and x.abs().max() <= 1
    assert sagan.Discriminator(image_size=size, ch=4)(x).shape == (3,)


def test_attention_sits_where_the_reference_has_it():
    places = lambda net: [m.qkv.in_channels for m in net.modules() if isinstance(m, sagan.SelfAttention)]
    assert places(sagan.Generator()) == [128, 64] and places(sagan.Discriminator()) == [256, 512]


@pytest.mark.parametrize("placement, g, d", [("both", 4, 4), ("g", 4, 0), ("d", 0, 4), ("none", 0, 0)])
def test_spectral_norm_placement(placement, g, d):
    count = lambda net: sum(parametrize.is_parametrized(m) for m in net.modules())
    assert count(sagan.Generator(spectral_norm=placement)) == g
    assert count(sagan.Discriminator(spectral_norm=placement)) == d


def test_spectral_norm_reaches_largest_singular_value_one():
    net = sagan.Discriminator(image_size=32, ch=8)
    for _ in range(50):
        net(torch.zeros(1, 3, 32, 32))
    layer = net.eval().net[0]
    assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("make", [lambda: sagan.Generator(image_size=48), lambda: sagan.Discriminator(image_size=16),
                                  lambda: sagan.Generator(spectral_norm="all")])
def test_bad_settings_are_named(make):
    with pytest.raises(ValueError, match="built for|is one of"):
        make()


# ---------------------------------------------------------------------------------------------- attention
def test_attention_is_the_identity_at_first_and_has_no_scale():
    torch.manual_seed(0)
    layer, x = sagan.SelfAttention(16), torch.randn(2, 16, 3, 5)
    assert torch.equal(layer(x), x)
    layer.gamma.data.fill_(0.7)
    whole = (layer.qkv.weight.flatten(1) @ x.flatten(2)) + layer.qkv.bias[:, None]
    q, k, v = whole[:, :2], whole[:, 2:4], whole[:, 4:]
    want = torch.zeros_like(v)
    for b in range(2):
        for j in range(15):                                         # o_j = sum_i beta_ij v_i, softmax over i
            beta = torch.softmax(torch.stack([q[b, :, j] @ k[b, :, i] for i in range(15)]), 0)
            want[b, :, j] = sum(beta[i] * v[b, :, i] for i in range(15))
    torch.testing.assert_close(layer(x), 0.7 * want.view_as(x) + x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.attention_map(x).sum(2), torch.ones(2, 15))
    torch.testing.assert_close(layer.attention_map(x)[1, 7], torch.softmax(q[1, :, 7] @ k[1], 0))


def test_constant_values_come_out_unchanged():
    q, k, v = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.full((2, 5, 7), 2.5)
    torch.testing.assert_close(sagan.self_attention(q, k, v), v)


# ---------------------------------------------------------------------------------------------- losses
class Linear(nn.Module):
    """D(x) = <w, x>: the norm of its gradient is |w| everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return (x * self.w).flatten(1).sum(1)


@pytest.mark.parametrize("norm, one_sided, want", [(3.0, False, 4.0), (0.25, False, 0.5625), (3.0, True, 4.0), (0.25, True, 0.0), (1.0, False, 0.0)])
def test_penalty_of_a_linear_critic(norm, one_sided, want):
    w = torch.randn(3, 8, 8, dtype=torch.float64)
    D = Linear(w / w.norm() * norm)
    a, b = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    penalty, seen = sagan.gradient_penalty(D, a, b, one_sided=one_sided)
    assert penalty.item() == pytest.approx(want, abs=1e-12) and seen.item() == pytest.approx(norm)
    grad, = torch.autograd.grad(penalty, D.w)
    slope = 2 * (norm - 1) if not (one_sided and norm < 1) else 0
    torch.testing.assert_close(grad, slope * D.w.detach() / norm, rtol=1e-9, atol=1e-12)


def test_penalty_has_a_finite_gradient_at_norm_zero():
    D = Linear(torch.zeros(3, 8, 8))
    penalty, _ = sagan.gradient_penalty(D, torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))
    grad, = torch.autograd.grad(penalty, D.w)
    assert penalty.item() == 1 and torch.isfinite(grad).all()


def test_penalty_looks_at_the_interpolates():
    class Quadratic(nn.Module):                                     # gradient at x is x itself
        def forward(self, x):
            return x.flatten(1).square().sum(1) / 2
    a, b, eps = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.rand(4, 1, 1, 1)
    norms = (eps * a + (1 - eps) * b).flatten(1).norm(dim=1)
    penalty, seen = sagan.gradient_penalty(Quadratic(), a, b, eps)
    assert penalty.item() == pytest.approx((norms - 1).square().mean().item(), rel=1e-5)
    assert seen.item() == pytest.approx(norms.mean().item(), rel=1e-5)


def test_wgan_gp_and_hinge_values():
    D = Linear(torch.ones(3, 2, 2) / 12)                            # the mean of the image; |w| = 1 / sqrt(12)
    real, fake = torch.full((4, 3, 2, 2), 0.5), torch.full((4, 3, 2, 2), -0.25)
    penalty = (12 ** -0.5 - 1) ** 2
    loss, logs = sagan.discriminator_loss(D, real, fake)
    assert loss.item() == pytest.approx(-0.75 + 10 * penalty, rel=1e-5)
    assert logs["w"].item() == pytest.approx(0.75) and logs["grad_norm"].item() == pytest.approx(12 ** -0.5)
    loss, logs = sagan.discriminator_loss(D, real, fake, loss="hinge")
    assert loss.item() == pytest.approx(0.5 + 0.75) and "grad_norm" not in logs
    assert sagan.connector_loss(D, real, fake, c_penalty="one-sided")[0].item() == pytest.approx(-0.75)
    assert sagan.connector_loss(D, real, fake)[0].item() == pytest.approx(-0.75 + 10 * penalty, rel=1e-5)
    assert sagan.generator_loss(D, fake).item() == pytest.approx(0.25)
    for bad in (dict(loss="lsgan"), dict(c_penalty="none")):
        with pytest.raises(ValueError):
            sagan.connector_loss(D, real, fake, **bad)


def test_a_penalised_critic_mixes_no_samples():
    D = sagan.Discriminator(image_size=32, ch=4).eval()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in D.modules())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(D(x)[1:2], D(x[1:2]))
