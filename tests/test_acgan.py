"""acgan.py: sizes, its losses on numbers worked out by hand; it works alone."""
import math
import shutil

import pytest
import torch
from torch import nn

import acgan
from test_sagan import ROOT, check_main, decoys, python  # noqa: F401 (a fixture)


def test_sizes():
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert 3.5e6 < count(acgan.Generator()) < 4.5e6 and count(acgan.Discriminator()) > 1.5e6


@pytest.mark.parametrize("size", [32, 64, 128])
def test_shapes(size):
    x = acgan.Generator(image_size=size, n_classes=3, ch=4)(torch.randn(4, 128), torch.tensor([0, 1, 2, 0]))
    source, label = acgan.Discriminator(image_size=size, n_classes=3, ch=4)(x)
    assert x.shape == (4, 3, size, size) and x.abs().max() <= 1 and source.shape == (4,) and label.shape == (4, 3)


def test_the_label_multiplies_z():
    G = acgan.Generator(image_size=32, ch=4, n_classes=2).eval()
    G.embed.weight.data[0] = 0
    x = G(torch.randn(5, 128), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(x, x[:1].expand_as(x))               # z times zero
    assert not torch.allclose(*G(torch.randn(2, 128), torch.ones(2, dtype=torch.long)))


@pytest.mark.parametrize("bad", [dict(image_size=20), dict(loss="wgan")])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match="built for|bce or wgan-gp"):
        acgan.Discriminator(**bad)


def test_batchnorm_only_where_nothing_is_penalised():
    has = lambda net: any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert has(acgan.Discriminator()) and not has(acgan.Discriminator(loss="wgan-gp"))


class Told(nn.Module):
    """Source logit = mean of channel 0; class logits = means of channels 1 and 2."""

    def forward(self, x):
        m = x.mean((2, 3))
        return m[:, 0], m[:, 1:]


def image(source, a, b):
    return torch.tensor([source, a, b]).view(1, 3, 1, 1).expand(1, 3, 4, 4).clone()


def test_losses_on_hand_numbers():
    real = torch.cat([image(2.0, 1.0, 0.0), image(0.0, 0.0, 0.0)])
    fake = torch.cat([image(-1.0, 0.0, 3.0), image(1.0, 0.0, 0.0)])
    y_real, y_fake = torch.tensor([0, 1]), torch.tensor([1, 0])
    softplus = lambda v: math.log1p(math.exp(v))
    source = (softplus(-2) + softplus(0)) / 2 + (softplus(-1) + softplus(1)) / 2
    classes = (softplus(-1) + math.log(2)) / 2 + (softplus(-3) + math.log(2)) / 2
    loss, logs = acgan.discriminator_loss(Told(), real, fake, y_real, y_fake)
    assert loss.item() == pytest.approx(source + classes, rel=1e-6)
    assert logs["w"].item() == pytest.approx(1.0) and logs["accuracy"].item() == 0.5
    assert logs["class_loss"].item() == pytest.approx(classes, rel=1e-6)
    loss, _ = acgan.connector_loss(Told(), real, fake, y_real, y_fake, c_aux=0.25)
    assert loss.item() == pytest.approx(source + classes / 4, rel=1e-6)
    want = (softplus(1) + softplus(-1)) / 2 + (softplus(-3) + math.log(2)) / 2
    assert acgan.generator_loss(Told(), fake, y_fake).item() == pytest.approx(want, rel=1e-6)


def test_wgan_gp_penalises_the_source_and_never_the_class_head():
    D, y = acgan.Discriminator(image_size=32, ch=4, n_classes=2, loss="wgan-gp"), torch.tensor([0, 1, 1])
    real, fake, eps = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32), torch.rand(3, 1, 1, 1)
    with_gp = acgan.discriminator_loss(D, real, fake, y, y, eps, loss="wgan-gp", lambda_gp=10.0)
    without = acgan.discriminator_loss(D, real, fake, y, y, eps, loss="wgan-gp", lambda_gp=0.0)
    grad = lambda loss: torch.autograd.grad(loss, [D.source.weight, D.label.weight], retain_graph=True)
    (a_source, a_label), (b_source, b_label) = grad(with_gp[0]), grad(without[0])
    assert not torch.allclose(a_source, b_source) and torch.allclose(a_label, b_label, atol=1e-7)
    x = (eps * real + (1 - eps) * fake).requires_grad_()
    norms = torch.autograd.grad(D(x)[0].sum(), x)[0].flatten(1).norm(dim=1)
    assert with_gp[0].item() - without[0].item() == pytest.approx(10 * (norms - 1).square().mean().item(), rel=1e-4)
    s_real, s_fake = D(real)[0].mean().item(), D(fake)[0].mean().item()
    assert with_gp[1]["w"].item() == pytest.approx(s_real - s_fake, abs=1e-6)
    assert acgan.generator_loss(D, fake, y, loss="wgan-gp").item() == pytest.approx(
        -s_fake + nn.functional.cross_entropy(D(fake)[1], y).item(), rel=1e-5)


def test_copied_alone(tmp_path, decoys):  # noqa: F811
    """Its networks run and learn; its command says that it needs the trainer."""
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(ROOT / "acgan.py", folder)
    out = python(folder, "-c", """
import torch, acgan
y = torch.tensor([0, 1, 2])
G, D = acgan.Generator(image_size=32, n_classes=3, ch=4), acgan.Discriminator(image_size=32, n_classes=3, ch=4)
fake = G(torch.randn(3, 128), y)
acgan.generator_loss(D, fake, y).backward()
loss, logs = acgan.discriminator_loss(D, torch.rand(3, 3, 32, 32), fake.detach(), y, y)
loss.backward()
assert all(p.grad.abs().sum() > 0 for p in (G.embed.weight, D.source.weight, D.label.weight)) and "accuracy" in logs
""", path=decoys)
    assert out.returncode == 0, out.stderr
    check_main(folder, "acgan.py", decoys)
