"""ACGAN: a GAN that is told the class of the image it shall draw, and whose discriminator names the class it sees.

Classes are the sorted names of the folders below --data (Crack/, Efflorescence/, ...).

Train one (the baseline; every flag of okd_train.py works here too):
    python acgan.py --data crops/

Train three that teach each other:
    torchrun okd_train.py --model acgan --groups 3 --data crops/

Source: A. Odena et al., Conditional Image Synthesis with Auxiliary Classifier GANs, 2017, with networks for 64x64
in place of the toy sizes; at 64x64 G has 3.8 M parameters, D and the connector 2.8 M each.
"""
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":      # until main() has words for it: Ctrl-C while torch is imported
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: on_ctrl_c == signal.SIG_IGN or os._exit(130))

import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------- settings
hparams = dict(
    image_size=64,              # 32, 64 or 128
    z_dim=128,
    n_classes=5,                # the trainer puts the number of class folders here
    ch=64,
    batch_size=5,
    g_lr=1e-4,
    d_lr=4e-4,
    c_lr=5e-5,
    beta1=0.0,
    beta2=0.9,
    n_critic=1,
    rho=0.5,
    loss="bce",                 # bce | wgan-gp (then D has no BatchNorm)
    lambda_gp=10.0,             # only with wgan-gp
    c_aux=1.0,                  # weight of the class part in the connector's loss
    class_loss="both",          # both | real | adc: what D's class head learns from; see class_losses
    up="transposed",            # transposed | nearest: how G doubles its maps; nearest leaves less of a checkerboard
    class_gain=False,           # in G, a gain for each class and channel after every BatchNorm
    noise_from=0,               # in G, noise inputs in images of so many pixels a side or more; 0: none
    channels=3,                 # 1: G makes one channel and shows it three times, for grey photos
)
# For a few thousand photos and little time; what each part is worth stands in tests/README.md.
recipes = dict(
    small=dict(ch=16, batch_size=16, g_lr=5e-4, d_lr=2e-3, c_lr=2.5e-4, flip=True, flip_vertical=True,
               balance=True, class_loss="adc", up="nearest", class_gain=True, noise_from=64),
)
channels_last = True            # the trainer may keep weights and images in this layout: no layer looks at memory
autocast = True                 # the losses may run under autocast (--precision bf16); the penalty leaves it


# ---------------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """z (B, z_dim), y (B,) int64 in [0, n_classes) -> images (B, 3, image_size, image_size) in [-1, 1].

    The label enters as a learned vector that multiplies z, and with class_gain as factors of the maps, too. It never
    adds anything: on few photos that let G forget z, until all images of a class were one.
    """

    def __init__(self, image_size=64, z_dim=128, n_classes=5, ch=64, up="transposed", class_gain=False,
                 noise_from=0, channels=3):
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; it is 1 or 3")
        levels = _levels(image_size)
        width, size = ch * 2 ** levels, 4
        self.embed = nn.Embedding(n_classes, z_dim)

        def behind(width, size):
            noise = [NoiseInput(width, size, z_dim)] if 0 < noise_from <= image_size and size > 4 else []
            gain = [ClassGain(n_classes, width)] if class_gain else []
            return [*noise, nn.BatchNorm2d(width), *gain, nn.ReLU()]
        layers = [nn.ConvTranspose2d(z_dim, width, 4), *behind(width, size)]
        for _ in range(levels):
            width, size = width // 2, size * 2
            layers += [*_doubling(up, 2 * width, width), *behind(width, size)]
        if up == "nearest":         # right behind a doubling, pixels come in a weave: one more layer at full size
            layers += [*_doubling(up, width, width), *behind(width, 2 * size)]
            last = [nn.Conv2d(width, channels, 3, padding=1)]
        else:
            last = _doubling(up, width, channels)
        self.net = nn.Sequential(*layers, *last, nn.Tanh())

    def forward(self, z, y):
        x = (z * self.embed(y))[:, :, None, None]
        for layer in self.net:
            if isinstance(layer, NoiseInput):
                x = layer(x, z)
            elif isinstance(layer, ClassGain):
                x = layer(x, y)
            else:
                x = layer(x)
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


class ClassGain(nn.Module):
    """x (B, C, H, W), y (B,) -> x times a learned factor of its class and channel, which starts at 1."""

    def __init__(self, n_classes, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n_classes, channels))

    def forward(self, x, y):
        return x * self.gain[y][:, :, None, None]


class Discriminator(nn.Module):
    """Images (B, 3, image_size, image_size) -> (source logits (B,), class logits (B, n_classes)).

    With class_loss="adc" the class logits are (B, 2 * n_classes): real ones of each class, then fake ones of each.
    BatchNorm after the first block with loss="bce"; none with "wgan-gp", where the penalty is per sample.
    """

    def __init__(self, image_size=64, n_classes=5, ch=64, loss="bce", class_loss="both"):
        super().__init__()
        _check_losses(loss, class_loss)
        layers, inp, width = [], 3, ch
        for level in range(_levels(image_size) + 1):
            layers.append(nn.Conv2d(inp, width, 4, 2, 1))
            if level and loss == "bce":
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.LeakyReLU(0.2))
            inp, width = width, width * 2
        self.net = nn.Sequential(*layers, nn.Flatten())
        self.source = nn.Linear(inp * 4 * 4, 1)
        self.label = nn.Linear(inp * 4 * 4, n_classes * (2 if class_loss == "adc" else 1))

    def forward(self, x):
        h = self.net(x)
        kind = torch.promote_types(h.dtype, torch.float32)          # autocast may have made it bf16
        return self.source(h).flatten().to(kind), self.label(h).to(kind)


def _doubling(up, inp, out):
    """Layers from (B, inp, H, W) to (B, out, 2H, 2W), by a transposed convolution or nearest neighbours and a 3x3."""
    if up not in ("transposed", "nearest"):
        raise ValueError(f"up is {up!r}; it is transposed or nearest")
    if up == "transposed":
        return [nn.ConvTranspose2d(inp, out, 4, 2, 1)]
    return [nn.Upsample(scale_factor=2), nn.Conv2d(inp, out, 3, padding=1)]


def _levels(image_size):
    """Number of stride-2 blocks between 4x4 and half the image size: 2, 3 or 4."""
    if image_size not in (32, 64, 128):
        raise ValueError(f"image_size is {image_size}; acgan.py is built for 32, 64 and 128")
    return {32: 2, 64: 3, 128: 4}[image_size]


# ---------------------------------------------------------------------------------------------- losses
def discriminator_loss(D, real, fake, y_real, y_fake, eps=None, loss="bce", lambda_gp=10.0, class_loss="both"):
    """Source loss + class loss, 1:1, each summed over real and fake (L_S + L_C of the paper); means over the batch.

    real, fake (B, 3, H, W), fake detached; y_real, y_fake (B,) int64 -> (scalar, logs). eps (B, 1, 1, 1) or (B,):
    uniforms for the penalty of wgan-gp.
    """
    return _critic_loss(D, real, fake, y_real, y_fake, eps, loss, lambda_gp, class_loss, 1.0)


def connector_loss(C, neighbour, own, y_neighbour, y_own, eps=None, loss="bce", lambda_gp=10.0, class_loss="both",
                   c_aux=1.0):
    """The same with the neighbour's images as real; the labels are those that both generators were asked for."""
    return _critic_loss(C, neighbour, own, y_neighbour, y_own, eps, loss, lambda_gp, class_loss, c_aux)


def generator_loss(D, fake, y, loss="bce", class_loss="both"):
    """fake (B, 3, H, W) with its graph, y (B,): look real, and like the class that was asked for -> scalar."""
    _check_losses(loss, class_loss)
    source, label = D(fake)
    look_real = F.binary_cross_entropy_with_logits(source, torch.ones_like(source)) if loss == "bce" else -source.mean()
    look_like_y = F.cross_entropy(label, y)
    if class_loss == "adc":
        look_like_y = look_like_y - F.cross_entropy(label, y + label.shape[1] // 2)
    return look_real + look_like_y


def class_losses(c_real, c_fake, y_real, y_fake, class_loss):
    """What D's class head learns from, summed over real and fake: cross entropy of logits (B, n_classes) -> scalar.

    both: reals and fakes, as in the paper. On few photos G and D then agree on a code of their own, and the labels of
    the images do not hold. real: reals alone. adc: logits (B, 2 * n_classes) tell real and fake ones of each class
    apart, and G is to look like a real one and not like a fake one (L. Hou et al., Conditional GANs with Auxiliary
    Discriminative Classifier, 2022).
    """
    of_reals = F.cross_entropy(c_real, y_real)
    if class_loss == "real":
        return of_reals
    offset = c_fake.shape[1] // 2 if class_loss == "adc" else 0
    return of_reals + F.cross_entropy(c_fake, y_fake + offset)


def _check_losses(loss, class_loss):
    if loss not in ("bce", "wgan-gp"):
        raise ValueError(f"loss is {loss!r}; it is bce or wgan-gp")
    if class_loss not in ("both", "real", "adc"):
        raise ValueError(f"class_loss is {class_loss!r}; it is both, real or adc")


def _critic_loss(D, real, fake, y_real, y_fake, eps, loss, lambda_gp, class_loss, aux):
    _check_losses(loss, class_loss)
    if loss == "bce":
        (s_real, c_real), (s_fake, c_fake) = D(real), D(fake)       # two passes: BatchNorm sees real and fake apart
        source = (F.binary_cross_entropy_with_logits(s_real, torch.ones_like(s_real))
                  + F.binary_cross_entropy_with_logits(s_fake, torch.zeros_like(s_fake)))
    else:
        (s_real, s_fake), (c_real, c_fake) = (a.split(len(real)) for a in D(torch.cat([real, fake])))
        source = s_fake.mean() - s_real.mean()
    classes = class_losses(c_real, c_fake, y_real, y_fake, class_loss)
    logs = {"w": (s_real.mean() - s_fake.mean()).detach(), "class_loss": classes.detach(),
            "accuracy": (c_real.argmax(1) == y_real).float().mean()}
    if loss == "wgan-gp":
        eps = torch.rand(len(real), device=real.device, dtype=real.dtype) if eps is None else eps
        x = torch.lerp(fake, real, eps.view(-1, 1, 1, 1)).requires_grad_()
        with torch.autocast(x.device.type, enabled=False):          # a second derivative wants more than 8 bits
            grad, = torch.autograd.grad(D(x)[0].sum(), x, create_graph=True)       # never through the class head
        norm = torch.linalg.vector_norm(grad.flatten(1), dim=1)
        source = source + lambda_gp * (norm - 1).square().mean()
        logs["grad_norm"] = norm.detach().mean()
    return source + aux * classes, logs


if __name__ == "__main__":
    here = Path(__file__).resolve()
    if not here.with_name("okd_train.py").is_file():
        print(f"{here.name}: error: training needs okd_train.py beside {here.name}", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(here.parent))
    import okd_train
    signal.signal(signal.SIGINT, on_ctrl_c)
    okd_train.as_program(lambda: okd_train.main(["--model", __file__, "--groups", "1", *sys.argv[1:]]))
