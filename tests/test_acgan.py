"""acgan.py: sizes, its losses on numbers worked out by hand; it works alone."""
import math
import shutil

import pytest
import torch
from torch import nn

import acgan
import sagan
from test_sagan import ROOT, check_main, decoys, python  # noqa: F401 (a fixture)


def test_sizes():
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert 3.5e6 < count(acgan.Generator()) < 4.5e6 and count(acgan.Discriminator()) > 1.5e6


@pytest.mark.parametrize("size", [32, 64, 128])
def test_shapes(size):
    x = acgan.Generator(image_size=size, n_classes=3, ch=4)(torch.randn(4, 128), torch.tensor([0, 1, 2, 0]))
    D = acgan.Discriminator(image_size=size, n_classes=3, ch=4)
    source, label = D(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(v.dtype == torch.float32 for v in D(x))
    assert all(v.dtype == torch.float64 for v in D.double()(x.double()))
    assert x.shape == (4, 3, size, size) and x.abs().max() <= 1 and source.shape == (4,) and label.shape == (4, 3)


def test_the_label_multiplies_z():
    G = acgan.Generator(image_size=32, ch=4, n_classes=2).eval()
    G.embed.weight.data[0] = 0
    x = G(torch.randn(5, 128), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(x, x[:1].expand_as(x))               # z times zero
    assert not torch.allclose(*G(torch.randn(2, 128), torch.ones(2, dtype=torch.long)))


@pytest.mark.parametrize("bad", [dict(image_size=20), dict(loss="wgan"), dict(class_loss="all")])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match="built for|bce or wgan-gp|both, real or adc"):
        acgan.Discriminator(**bad)


@pytest.mark.parametrize("bad", [dict(loss="hinge"), dict(class_loss="all")])
def test_losses_that_do_not_exist_are_named(bad):
    D, fake, y = acgan.Discriminator(image_size=32, ch=2, n_classes=2), torch.zeros(2, 3, 32, 32), torch.arange(2)
    for call in (lambda: acgan.generator_loss(D, fake, y, **bad),
                 lambda: acgan.discriminator_loss(D, fake, fake, y, y, **bad)):
        with pytest.raises(ValueError, match="it is b"):
            call()


def test_the_penalty_is_of_the_images_dtype():
    D = acgan.Discriminator(image_size=32, ch=2, n_classes=2, loss="wgan-gp").double()
    real, y = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.arange(2)
    loss, _ = acgan.discriminator_loss(D, real, 1 - real, y, y, loss="wgan-gp")
    assert loss.dtype == torch.float64 and loss.isfinite()


@pytest.mark.parametrize("bad", [dict(up="bilinear"), dict(channels=2)])
@pytest.mark.parametrize("network", [acgan.Generator, sagan.Generator])
def test_bad_settings_of_a_generator_are_named(network, bad):
    with pytest.raises(ValueError, match="transposed or nearest|1 or 3"):
        network(**bad)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_nearest_neighbours_and_one_channel(size):
    """Images of the same shape, grey; no transposed convolution but the first, which makes 4x4 from a point."""
    for G, labels in ((acgan.Generator(size, ch=4, up="nearest", channels=1), [torch.tensor([0, 1])]),
                      (sagan.Generator(size, ch=4, up="nearest", channels=1), [])):
        x = G(torch.randn(2, 128), *labels)
        assert x.shape == (2, 3, size, size) and torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
        assert sum(isinstance(m, nn.ConvTranspose2d) for m in G.modules()) == 1
        behind = (nn.Upsample, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Tanh)          # a layer at full size
        assert all(map(isinstance, list(G.net)[-6:], behind)), G.net


def test_gains_multiply_the_maps_of_their_class_alone():
    G = acgan.Generator(image_size=32, ch=4, n_classes=2, class_gain=True).eval()
    plain = acgan.Generator(image_size=32, ch=4, n_classes=2).eval()
    gains = [m for m in G.modules() if isinstance(m, acgan.ClassGain)]
    inner = [m for m in G.net if not isinstance(m, acgan.ClassGain)]
    for a, b in zip(plain.net, inner, strict=True):
        a.load_state_dict(b.state_dict())
    plain.embed.load_state_dict(G.embed.state_dict())
    z, y = torch.randn(2, 128), torch.tensor([0, 1])
    assert len(gains) == 3 and torch.equal(G(z, y), plain(z, y))    # all start at 1
    gains[0].gain.data[1] = 0
    assert torch.equal(G(z, y)[0], plain(z, y)[0])
    assert torch.equal(*G(torch.randn(2, 128), torch.tensor([1, 1])))       # times zero: nothing of z is left


@pytest.mark.parametrize("script", [acgan, sagan])
def test_noise_inputs_are_white_and_of_z_alone(script):
    """About N(0, 1), with nothing in common between pixels, images, maps and channels but z and the gain."""
    torch.manual_seed(0)
    noise, other = script.NoiseInput(2, 32, 128), script.NoiseInput(2, 32, 128)
    noise.gain.data = torch.tensor([1.0, -0.5]).view(2, 1, 1)
    z = torch.randn(200, 128)
    x = noise(torch.full((200, 2, 32, 32), 5.0), z) - 5
    torch.testing.assert_close(x[:, 1], -0.5 * x[:, 0], atol=1e-5, rtol=1e-4)
    assert torch.equal(x, noise(torch.full((200, 2, 32, 32), 5.0), z) - 5)
    pixels = x[:, 0].flatten(1)
    assert abs(pixels.mean()) < 0.05 and abs(pixels.std() - 1) < 0.05
    for a, b in ((pixels[:, :-1], pixels[:, 1:]), (pixels[:, :-32], pixels[:, 32:]), (pixels[:-1], pixels[1:])):
        assert abs((a * b).mean()) < 0.05                           # beside, below, in the next image
    assert abs((pixels * other(torch.zeros(200, 2, 32, 32), z)[:, 0].flatten(1)).mean()) < 0.05


@pytest.mark.parametrize("up", ["transposed", "nearest"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_noise_inputs_stand_in_every_map_behind_a_doubling(size, up):
    """Without gain they leave G as it is; their noise is kept with the weights."""
    for script, labels in ((acgan, [torch.tensor([0, 1])]), (sagan, [])):
        G = script.Generator(size, ch=4, up=up, noise_from=size).eval()
        plain, z = script.Generator(size, ch=4, up=up).eval(), torch.randn(2, 128)
        noise = [m for m in G.net if isinstance(m, script.NoiseInput)]
        sides = [8, 16, 32, 64, 128][:len(noise)]
        assert [len(m.rows) for m in noise] == sides and sides[-1] == (size if up == "nearest" else size // 2)
        for a, b in zip(plain.net, (m for m in G.net if not isinstance(m, script.NoiseInput)), strict=True):
            a.load_state_dict(b.state_dict())
        if labels:
            plain.embed.load_state_dict(G.embed.state_dict())
        again = script.Generator(size, ch=4, up=up, noise_from=size).eval()
        again.load_state_dict(G.state_dict())
        x = G(z, *labels)
        assert torch.equal(x, again(z, *labels)) and not torch.equal(x, plain(z, *labels))
        x.sum().backward()
        assert all(m.gain.grad.abs().sum() > 0 for m in noise)
        for m in noise:
            torch.nn.init.zeros_(m.gain)
        torch.testing.assert_close(G(z, *labels), plain(z, *labels))


@pytest.mark.parametrize("script", [acgan, sagan])
def test_noise_inputs_are_for_large_images(script):
    """At 32x32 the recipe is better without, at 64x64 with them (tests/README.md)."""
    def noisy(size, least):
        return any(isinstance(m, script.NoiseInput) for m in script.Generator(size, ch=4, noise_from=least).net)
    least = script.recipes["small"]["noise_from"]
    assert [noisy(size, least) for size in (32, 64, 128)] == [False, True, True]
    assert not noisy(128, script.hparams["noise_from"]) and noisy(32, 32) and not noisy(64, 65)


def test_nearest_neighbours_leave_no_checkerboard():
    """From one constant map the transposed convolution makes a pattern of two pixels, the other form a constant."""
    torch.manual_seed(0)
    flat = torch.ones(1, 4, 6, 6)
    inner = lambda up: nn.Sequential(*sagan._doubling(up, 4, 1))(flat)[0, 0, 2:-2, 2:-2]
    assert inner("nearest").std() < 1e-6 < 1e-3 < inner("transposed").std()


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


class ToldTwice(nn.Module):
    """Source logit 0; class logits (real 0, real 1, fake 0, fake 1) = means of channels 0, 1, 2 and 0."""

    def forward(self, x):
        m = x.mean((2, 3))
        return torch.zeros(len(x)), torch.cat([m, torch.zeros(len(x), 1)], 1)


def test_class_losses_on_hand_numbers():
    """real: the fakes say nothing. adc: a real of class 0 is class 0, a fake of it class 2; G wants one and not two."""
    real, fake, y = image(2.0, 1.0, 0.0), image(0.5, -1.0, 3.0), torch.tensor([0])
    log_sum = lambda *v: math.log(sum(map(math.exp, v)))
    source = 2 * math.log(2)
    loss, logs = acgan.discriminator_loss(ToldTwice(), real, fake, y, y, class_loss="adc")
    classes = log_sum(2, 1, 0, 0) - 2 + log_sum(0.5, -1, 3, 0) - 3
    assert loss.item() == pytest.approx(source + classes, rel=1e-6) and logs["accuracy"] == 1
    loss, _ = acgan.connector_loss(ToldTwice(), real, fake, y, y, class_loss="adc", c_aux=0.5)
    assert loss.item() == pytest.approx(source + classes / 2, rel=1e-6)
    loss = acgan.generator_loss(ToldTwice(), fake, y, class_loss="adc")
    assert loss.item() == pytest.approx(math.log(2) + 3 - 0.5, rel=1e-6)
    loss, logs = acgan.discriminator_loss(ToldTwice(), real, fake, y, y, class_loss="real")
    assert logs["class_loss"].item() == pytest.approx(log_sum(2, 1, 0, 0) - 2, rel=1e-6)
    assert loss.item() == pytest.approx(source + log_sum(2, 1, 0, 0) - 2, rel=1e-6)
    D = acgan.Discriminator(image_size=32, ch=4, n_classes=3, class_loss="adc")
    assert D(torch.zeros(2, 3, 32, 32))[1].shape == (2, 6)


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
