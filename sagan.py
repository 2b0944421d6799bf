"""SAGAN: a self-attention GAN for 32x32, 64x64 and 128x128 RGB images. Networks and losses in one file.

Train one SAGAN (the baseline of the ring; every flag of okd_train.py works here too):
    python sagan.py --data crops/

Train three that teach each other:
    torchrun okd_train.py --model sagan --groups 3 --data crops/

Use the networks elsewhere: copy this file. Attention is fused where kernels/attention.py lies beside it, and else the
same in two lines of torch.

Sources: H. Zhang et al., Self-Attention Generative Adversarial Networks, 2019 (attention, hinge loss, rates);
I. Gulrajani et al., Improved Training of Wasserstein GANs, 2017 (gradient penalty); T. Miyato et al., Spectral
Normalization for GANs, 2018. The layer sizes at 64x64 are those of the public PyTorch Self-Attention-GAN that the
OKD-SAGAN paper builds on: G has 3,832,885 trainable parameters, D and the connector 3,175,299 each. One thing
differs: that code norms a transposed convolution's weight (in, out, 4, 4) as a matrix of `in` rows; here it has `out`
rows, as Miyato et al. define it and torch does it. Its checkpoints load: from_reference in tests/test_sagan.py.
"""
import importlib.util
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while torch is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

# ---------------------------------------------------------------------------------------------- settings
# Every key is a flag of the trainer: g_lr -> --g-lr.
hparams = dict(
    image_size=64,              # 32, 64 or 128
    z_dim=128,                  # z ~ N(0, I)
    ch=64,                      # width: channels of the widest feature map
    batch_size=25,
    g_lr=1e-4,                  # two time scales: the critics learn faster than the generator
    d_lr=4e-4,
    c_lr=5e-5,                  # connectors
    beta1=0.0,
    beta2=0.9,
    n_critic=1,                 # discriminator steps per generator step
    rho=0.5,                    # weight of the connector in the generator's loss; above 1 copying the neighbour pays
    loss="wgan-gp",             # wgan-gp | hinge (no penalty) | r1 (a penalty at the real images)
    lambda_gp=10.0,             # only with wgan-gp
    lambda_r1=0.1,              # only with r1
    c_penalty="two-sided",      # two-sided | one-sided (only with wgan-gp): leaves connectors alone where both agree
    spectral_norm="both",       # both | g | d | none; d means discriminators and connectors
    up="transposed",            # transposed | nearest: how G doubles its maps; nearest leaves less of a checkerboard
    attention_side=32,          # of the largest map in G with attention; fewer pixels cost less time
    noise_from=0,               # in G, noise inputs in images of so many pixels a side or more; 0: none
    channels=3,                 # 1: G makes one channel and shows it three times, for grey photos
)
# For a few thousand photos and little time; what each part is worth stands in tests/README.md.
recipes = dict(
    small=dict(ch=16, batch_size=16, g_lr=5e-4, d_lr=2e-3, c_lr=2.5e-4, flip=True, flip_vertical=True,
               loss="r1", spectral_norm="none", up="nearest", attention_side=16, noise_from=64),
)
channels_last = True            # the trainer may keep weights and images in this layout: no layer looks at memory
autocast = True                 # the losses may run under autocast (--precision bf16); the penalty leaves it


# ---------------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """z (B, z_dim) -> images (B, 3, image_size, image_size) in [-1, 1].

    At 64x64: 512 channels at 4x4, 256 at 8x8, 128 at 16x16 + attention, 64 at 32x32 + attention, 3 at 64x64. Attention
    follows the last two hidden blocks, but never works on more than 32x32 positions, or attention_side squared.
    """

    def __init__(self, image_size=64, z_dim=128, ch=64, spectral_norm="both", up="transposed", attention_side=32,
                 noise_from=0, channels=3):
        super().__init__()
        levels, sn = _levels(image_size), _normed("g", spectral_norm)
        width, size = ch * 2 ** levels, 4
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; it is 1 or 3")

        def behind(width, size):
            noise = [NoiseInput(width, size, z_dim)] if 0 < noise_from <= image_size and size > 4 else []
            return [*noise, nn.BatchNorm2d(width), nn.ReLU()]
        layers = [sn(nn.ConvTranspose2d(z_dim, width, 4)), *behind(width, size)]
        for _ in range(levels):
            width, size = width // 2, size * 2
            layers += [*_doubling(up, 2 * width, width, sn), *behind(width, size)]
            if size in {32: (8, 16)}.get(image_size, (16, 32)) and size <= attention_side:
                layers.append(SelfAttention(width))
        if up == "nearest":         # right behind a doubling, pixels come in a weave: one more layer at full size
            layers += [*_doubling(up, width, width, sn), *behind(width, 2 * size)]
            last = [nn.Conv2d(width, channels, 3, padding=1)]
        else:
            last = _doubling(up, width, channels)
        self.net = nn.Sequential(*layers, *last, nn.Tanh())

    def forward(self, z):
        x = z[:, :, None, None]
        for layer in self.net:
            x = layer(x, z) if isinstance(layer, NoiseInput) else layer(x)
        return x.expand(-1, 3, -1, -1)


class NoiseInput(nn.Module):
    """x (B, C, H, W), z (B, z_dim) -> x + noise (B, 1, H, W) times a learned gain of each channel.

    Grain, which is hard to make out of a map of 4x4. Unlike StyleGAN's (T. Karras et al., 2019) the noise is a fixed
    random product of z, about N(0, 1) at every pixel, so that one z is one image.
    """

    def __init__(self, channels, side, z_dim):
        super().__init__()
        self.register_buffer("rows", torch.randn(side, z_dim))
        self.register_buffer("columns", torch.randn(z_dim, side) / z_dim ** 0.5)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 0.3))

    def forward(self, x, z):
        noise = (z[:, None] * self.rows) @ self.columns             # (B, H, W)
        return torch.addcmul(x, self.gain, noise[:, None])


class Discriminator(nn.Module):
    """Images (B, 3, image_size, image_size) -> scores (B,), unbounded, high for real. Connectors are built from it too.

    At 64x64: 64 channels at 32x32, 128 at 16x16, 256 at 8x8 + attention, 512 at 4x4 + attention. No BatchNorm: a
    penalised critic must score each sample by itself.
    """

    def __init__(self, image_size=64, ch=64, spectral_norm="both"):
        super().__init__()
        levels, sn = _levels(image_size), _normed("d", spectral_norm)
        layers, inp, width = [], 3, ch
        for level in range(levels + 1):
            layers += [sn(nn.Conv2d(inp, width, 4, 2, 1)), nn.LeakyReLU(0.1)]
            if level >= levels - 1:
                layers.append(SelfAttention(width))
            inp, width = width, width * 2
        self.net = nn.Sequential(*layers, nn.Conv2d(inp, 1, 4))

    def forward(self, x):
        s = self.net(x)                                             # (B, 1, 1, 1)
        if s.shape[1:].numel() != 1:
            raise ValueError(f"this Discriminator was built for images of another size than {tuple(x.shape[2:])}")
        s = s.flatten()
        return s.to(torch.promote_types(s.dtype, torch.float32))    # autocast may have made it bf16


class SelfAttention(nn.Module):
    """x (B, C, H, W) -> gamma * attention(x) + x, every position looking at every other one.

    q and k have C // 8 channels, v has C; no scale 1 / sqrt(d), no pooling. gamma starts at 0, so the layer starts as
    the identity and earns its influence.
    """

    def __init__(self, channels):
        super().__init__()
        self.widths = max(1, channels // 8), max(1, channels // 8), channels
        self.qkv = nn.Conv2d(channels, sum(self.widths), 1)         # query, key, value in one launch
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        o = self_attention(*self.project(x))                        # (B, C, H*W)
        return x + self.gamma * o.view_as(x)                        # x first: the sum takes its memory layout

    def project(self, x):
        """x (B, C, H, W) -> q, k (B, C // 8, H*W), v (B, C, H*W)."""
        return [part.flatten(2) for part in self.qkv(x).split(self.widths, 1)]      # so that gradients keep x's layout

    def attention_map(self, x):
        """x (B, C, H, W) -> (B, H*W, H*W): row j holds where position j looks; rows sum to 1."""
        q, k, _ = self.project(x)
        return torch.softmax(q.transpose(1, 2) @ k, dim=-1)


def eager_attention(q, k, v):
    """q, k (B, Cq, N), v (B, C, N) -> (B, C, N): softmax over the keys, no scale."""
    p = torch.softmax(q.transpose(1, 2) @ k, dim=-1)                # (B, N queries, N keys)
    return (p @ v.transpose(1, 2)).transpose(1, 2)                  # p @ v^T: v @ p^T would copy p in its backward


def _best_attention():
    """That of kernels/attention.py beside this file, whatever else is called kernels; or else the above."""
    if "__file__" not in globals():                                 # pasted into a notebook
        return eager_attention
    path = Path(__file__).resolve().parent / "kernels" / "attention.py"
    if not path.is_file():
        return eager_attention
    kernels = sys.modules.get("kernels") or importlib.util.find_spec("kernels")                 # found, not run
    places = getattr(kernels, "__path__", None) or getattr(kernels, "submodule_search_locations", None) or ()
    if [Path(place).resolve() for place in places][:1] == [path.parent]:
        return getattr(importlib.import_module("kernels.attention"), "self_attention", eager_attention)
    name = "okd_gan.kernels.attention"                              # a foreign package keeps its own name
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return getattr(sys.modules[name], "self_attention", eager_attention)                       # it may be another's


self_attention = _best_attention()


def _levels(image_size):
    """Number of stride-2 blocks between 4x4 and half the image size: 2, 3 or 4."""
    if image_size not in (32, 64, 128):
        raise ValueError(f"image_size is {image_size}; sagan.py is built for 32, 64 and 128")
    return {32: 2, 64: 3, 128: 4}[image_size]


def _doubling(up, inp, out, sn=lambda layer: layer):
    """Layers from (B, inp, H, W) to (B, out, 2H, 2W), by a transposed convolution or nearest neighbours and a 3x3."""
    if up not in ("transposed", "nearest"):
        raise ValueError(f"up is {up!r}; it is transposed or nearest")
    if up == "transposed":
        return [sn(nn.ConvTranspose2d(inp, out, 4, 2, 1))]
    return [nn.Upsample(scale_factor=2), sn(nn.Conv2d(inp, out, 3, padding=1))]


def _normed(which, spectral_norm):
    """The wrapper for a layer of network `which` ("g" or "d") under the setting `spectral_norm`."""
    if spectral_norm not in ("both", "g", "d", "none"):
        raise ValueError(f"spectral_norm is {spectral_norm!r}; it is one of both, g, d, none")
    return torch_spectral_norm if spectral_norm in ("both", which) else lambda layer: layer


# ---------------------------------------------------------------------------------------------- losses
def discriminator_loss(D, real, fake, eps=None, lambda_gp=10.0, loss="wgan-gp", lambda_r1=0.1):
    """real, fake (B, 3, H, W), fake detached -> (scalar, what is logged).

    w: E D(real) - E D(fake). Of wgan-gp, grad_norm: mean |grad D| at the interpolates; of r1, real_grad: at the reals.
    """
    return _critic_loss(D, real, fake, eps, lambda_gp, loss, lambda_r1, one_sided=False)


def connector_loss(C, neighbour, own, eps=None, lambda_gp=10.0, loss="wgan-gp", lambda_r1=0.1, c_penalty="two-sided"):
    """The discriminator's loss with the neighbour's images as real and the group's own as fake; all detached.

    ValueError for a c_penalty that the loss has not, as for any unknown setting of a loss.
    """
    if c_penalty not in ("two-sided", "one-sided"):
        raise ValueError(f"c_penalty is {c_penalty!r}; it is two-sided or one-sided")
    if c_penalty == "one-sided" and loss != "wgan-gp":
        raise ValueError(f"c_penalty one-sided is a form of wgan-gp's penalty, and loss is {loss}")
    return _critic_loss(C, neighbour, own, eps, lambda_gp, loss, lambda_r1, c_penalty == "one-sided")


def generator_loss(D, fake, loss="wgan-gp"):
    """fake (B, 3, H, W) with its graph -> scalar. The same for wgan-gp and hinge; with r1 non-saturating."""
    _check_loss(loss)
    s = D(fake)
    return F.softplus(-s).mean() if loss == "r1" else -s.mean()


def _check_loss(loss):
    if loss not in ("wgan-gp", "hinge", "r1"):
        raise ValueError(f"loss is {loss!r}; it is wgan-gp, hinge or r1")


def _critic_loss(D, real, fake, eps, lambda_gp, loss, lambda_r1, one_sided):
    _check_loss(loss)
    if loss == "r1":
        return _r1_loss(D, real, fake, lambda_r1)
    s = D(torch.cat([real, fake]))                                  # one pass: no layer mixes samples
    s_real, s_fake = s.split(len(real))
    w = (s_real - s_fake).mean()
    logs = {"w": w.detach()}
    if loss == "hinge":
        return F.relu(1 - s_real).mean() + F.relu(1 + s_fake).mean(), logs
    penalty, logs["grad_norm"] = gradient_penalty(D, real, fake, eps, one_sided)
    return lambda_gp * penalty - w, logs


def _r1_loss(D, real, fake, lambda_r1):
    """Logistic loss + lambda_r1 / 2 |grad D(real)|^2 (L. Mescheder et al., Which Training Methods for GANs do actually
    Converge?, 2018). On few photos it lasts where hinge gets worse (tests/README.md, "An hour")."""
    if lambda_r1 < 0:
        raise ValueError(f"lambda_r1 is {lambda_r1}; it must be 0 or more")
    x = real.detach().requires_grad_()
    with torch.autocast(x.device.type, enabled=False):              # a second derivative wants more than 8 bits
        s_real = D(x)
        grad, = torch.autograd.grad(s_real.sum(), x, create_graph=True)
    s_fake, squares = D(fake), grad.flatten(1).square().sum(1)      # (B,), (B,)
    loss = F.softplus(-s_real).mean() + F.softplus(s_fake).mean() + lambda_r1 / 2 * squares.mean()
    return loss, {"w": (s_real - s_fake).mean().detach(), "real_grad": squares.detach().sqrt().mean()}


def gradient_penalty(D, a, b, eps=None, one_sided=False):
    """Mean over the batch of (|grad D(x)| - 1)^2 at x = eps * a + (1 - eps) * b, and the mean of |grad D(x)|.

    a, b (B, C, H, W); eps (B, 1, 1, 1) or (B,) in [0, 1), drawn here if None. The norm runs over C, H, W of each sample
    and has the gradient 0 where it is 0 (the square root of a sum of squares has NaN there). one_sided:
    max(0, |grad| - 1)^2.
    """
    eps = torch.rand(len(a), 1, 1, 1, device=a.device, dtype=a.dtype) if eps is None else eps
    x = torch.lerp(b, a, eps.view(-1, 1, 1, 1)).requires_grad_()
    with torch.autocast(x.device.type, enabled=False):              # a second derivative wants more than 8 bits
        grad, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    norm = torch.linalg.vector_norm(grad.flatten(1), dim=1)         # (B,)
    excess = norm - 1
    if one_sided:
        excess = excess.clamp(min=0)
    return excess.square().mean(), norm.detach().mean()


if __name__ == "__main__":
    here = Path(__file__).resolve()
    if not here.with_name("okd_train.py").is_file():
        print(f"{here.name}: error: training needs okd_train.py beside {here.name}", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(here.parent))
    import okd_train
    signal.signal(signal.SIGINT, on_ctrl_c)
    okd_train.as_program(lambda: okd_train.main(["--model", __file__, "--groups", "1", *sys.argv[1:]]))
