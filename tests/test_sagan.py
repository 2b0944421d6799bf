"""sagan.py: the networks have the reference's sizes, attention and losses have their exact values; it works alone."""
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
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
    D = sagan.Discriminator(image_size=size, ch=4)
    assert D(x).shape == (3,) and D(x).dtype == torch.float32
    assert D.double()(x.double()).dtype == torch.float64 and D.bfloat16()(x.bfloat16()).dtype == torch.float32


def test_attention_sits_where_the_reference_has_it():
    places = lambda net: [m.qkv.in_channels for m in net.modules() if isinstance(m, sagan.SelfAttention)]
    assert places(sagan.Generator()) == [128, 64] and places(sagan.Discriminator()) == [256, 512]


@pytest.mark.parametrize("size, side, kept", [(64, 16, [8]), (64, 15, []), (32, 16, [8, 4]), (128, 16, [16])])
def test_attention_of_g_can_be_kept_to_small_maps(size, side, kept):
    G = sagan.Generator(size, ch=4, attention_side=side)
    assert [m.qkv.in_channels for m in G.modules() if isinstance(m, sagan.SelfAttention)] == kept
    assert G(torch.randn(2, 128)).shape == (2, 3, size, size)


@pytest.mark.parametrize("placement, g, d", [("both", 4, 4), ("g", 4, 0), ("d", 0, 4), ("none", 0, 0)])
def test_spectral_norm_placement(placement, g, d):
    count = lambda net: sum(parametrize.is_parametrized(m) for m in net.modules())
    assert count(sagan.Generator(spectral_norm=placement)) == g
    assert count(sagan.Discriminator(spectral_norm=placement)) == d


def test_spectral_norm_reaches_largest_singular_value_one():
    torch.manual_seed(0)
    net = sagan.Discriminator(image_size=32, ch=8)
    for _ in range(500):                                            # fifty are too few where the two largest are close
        net(torch.zeros(1, 3, 32, 32))
    layer = net.eval().net[0]
    assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("make", [lambda: sagan.Generator(image_size=48), lambda: sagan.Discriminator(image_size=16),
                                  lambda: sagan.Generator(spectral_norm="all")])
def test_bad_settings_are_named(make):
    with pytest.raises(ValueError, match="built for|is one of"):
        make()


def test_settings_that_do_not_exist_and_images_of_another_size():
    fake = torch.zeros(2, 3, 32, 32)
    D = sagan.Discriminator(image_size=32, ch=4)
    for call in (lambda: sagan.generator_loss(D, fake, loss="lsgan"),
                 lambda: sagan.discriminator_loss(D, fake, fake, loss="lsgan")):
        with pytest.raises(ValueError, match="'lsgan'; it is wgan-gp, hinge or r1"):
            call()
    with pytest.raises(ValueError, match="another size"):
        D(torch.zeros(2, 3, 64, 64))


def test_uniforms_may_be_a_vector():
    """Of as many as the image is wide, which broadcasting would take for one a column."""
    D, r = sagan.Discriminator(image_size=32, ch=2).eval(), torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 32, 3, 32, 32, generator=r)
    eps = torch.rand(32, generator=r)
    found = [sagan.gradient_penalty(D, a, b, of)[0] for of in (eps, eps.view(-1, 1, 1, 1))]
    assert torch.equal(*found)


# ---------------------------------------------------------------------------------------------- the reference's weights
G_PLACES = {"l1.0": 0, "l1.1": 1, "l2.0": 3, "l2.1": 4, "l3.0": 6, "l3.1": 7, "attn1": 9, "l4.0": 10, "l4.1": 11,
            "attn2": 13, "last.0": 14}
D_PLACES = {"l1.0": 0, "l2.0": 2, "l3.0": 4, "attn1": 6, "l4.0": 7, "attn2": 9, "last.0": 10}


def from_reference(state, places, normed):
    """A state_dict of the public Self-Attention-GAN at 64x64 -> ours. normed: keep spectral norm, or divide by it."""
    ours = {}
    for name, i in places.items():
        part = {k.replace("module.", "")[len(name) + 1:]: v for k, v in state.items() if k.startswith(name + ".")}
        if "weight_bar" in part:
            w, u, v = (part.pop(f"weight_{x}") for x in ("bar", "u", "v"))
            kept = {"original": w, "0._u": u, "0._v": v}
            folded = {"weight": w / (u @ w.flatten(1) @ v)}
            part |= {f"parametrizations.weight.{x}": y for x, y in kept.items()} if normed else folded
        if name.startswith("attn"):
            for x in ("weight", "bias"):
                part[f"qkv.{x}"] = torch.cat([part.pop(f"{y}_conv.{x}") for y in ("query", "key", "value")])
        ours |= {f"net.{i}.{k}": v for k, v in part.items()}
    return ours


def reference_state(layers, places, last):
    """Random weights under the names and in the shapes of that code; u and v are the exact singular vectors."""
    state = {}
    for name, i in places.items():
        for k, v in layers[i].state_dict().items():
            state[f"{name}.{k}"] = torch.randn_like(v) * 0.05 if v.ndim > 1 else torch.rand_like(v.float()) + 0.1
        if name.startswith("attn"):
            split = layers[i].widths
            for x in ("weight", "bias"):
                parts = state.pop(f"{name}.qkv.{x}").split(split)
                state.update(zip([f"{name}.{y}_conv.{x}" for y in ("query", "key", "value")], parts))
        elif name.endswith(".0") and name != last:
            w = state.pop(f"{name}.weight")
            u, _, v = torch.linalg.svd(w.flatten(1), full_matrices=False)
            state |= {f"{name}.module.weight_{x}": y for x, y in zip(("bar", "u", "v"), (w, u[:, 0], v[0]))}
            state[f"{name}.module.bias"] = state.pop(f"{name}.bias")
    return state


def reference_layer(state, name, x):
    """One layer of that code in eval mode."""
    get = lambda key: state[f"{name}.{key}"]
    if name.startswith("attn"):
        project = lambda y: F.conv2d(x, get(f"{y}_conv.weight"), get(f"{y}_conv.bias")).flatten(2)
        q, k, v = map(project, ("query", "key", "value"))
        p = torch.softmax(torch.bmm(q.mT, k), -1)
        return get("gamma") * torch.bmm(v, p.mT).view_as(x) + x
    if name.endswith(".1"):
        return F.relu(F.batch_norm(x, get("running_mean"), get("running_var"), get("weight"), get("bias")))
    normed = f"{name}.module.weight_bar" in state
    w, bias = (get("module.weight_bar"), get("module.bias")) if normed else (get("weight"), get("bias"))
    if normed:
        w = w / torch.linalg.matrix_norm(w.flatten(1), 2)           # rows: weight.shape[0], also of a transposed one
    stride, padding = (1, 0) if x.shape[-1] in (1, 4) and len(bias) in (1, 512) else (2, 1)
    if "l1.1.weight" in state:
        return F.conv_transpose2d(x, w, bias, stride, padding)
    x = F.conv2d(x, w, bias, stride, padding)
    return F.leaky_relu(x, 0.1) if normed else x


@pytest.mark.parametrize("network", ["G", "D"])
def test_weights_of_the_reference_give_its_numbers(network):
    """D keeps its spectral norm; of G, which that code norms along another dimension, the normed weights are taken."""
    torch.manual_seed(0)
    G = network == "G"
    cls, places = (sagan.Generator, G_PLACES) if G else (sagan.Discriminator, D_PLACES)
    state = reference_state(cls(spectral_norm="none").net, places, "last.0")
    x = torch.randn(2, 128) if G else torch.randn(2, 3, 64, 64)
    want = x[:, :, None, None] if G else x
    for name in places:
        want = reference_layer(state, name, want)
    want = torch.tanh(want) if G else want.flatten()

    def ours(**how):
        net = cls(spectral_norm=how.pop("placement")).eval()
        net.load_state_dict(from_reference(state, places, **how))
        with torch.no_grad():
            return net(x)
    torch.testing.assert_close(ours(placement="none", normed=False), want, rtol=1e-4, atol=1e-5)
    if not G:
        torch.testing.assert_close(ours(placement="both", normed=True), want, rtol=1e-4, atol=1e-5)


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


def test_attention_keeps_the_memory_layout():
    """Otherwise all that follows converts it, in every step."""
    layer, x = sagan.SelfAttention(16), torch.randn(2, 16, 16, 16)
    for layout in (torch.channels_last, torch.contiguous_format):
        assert layer(x.contiguous(memory_format=layout)).is_contiguous(memory_format=layout)


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


@pytest.mark.parametrize("norm, one_sided, want", [
    (3.0, False, 4.0), (0.25, False, 0.5625), (3.0, True, 4.0), (0.25, True, 0.0), (1.0, False, 0.0)])
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


class Quadratic(nn.Module):
    """A critic whose gradient at x is x itself."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.flatten(1).square().sum(1) / 2


def test_r1_looks_at_the_real_images_and_trains_by_it():
    """The penalty, lambda / 2 times the mean of |x|^2 at scale 1, has twice itself as its derivative by the scale."""
    real, fake = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    squares = real.flatten(1).square().sum(1).mean()
    slopes, values = [], []
    for lambda_r1 in (0.0, 0.6):
        D = Quadratic()
        loss, logs = sagan.discriminator_loss(D, real, fake, loss="r1", lambda_r1=lambda_r1)
        loss.backward()
        values.append(loss.item())
        slopes.append(D.scale.grad.item())
    assert values[1] - values[0] == pytest.approx(0.3 * squares.item(), rel=1e-5)
    assert slopes[1] - slopes[0] == pytest.approx(0.6 * squares.item(), rel=1e-5)
    assert logs["real_grad"].item() == pytest.approx(real.flatten(1).norm(dim=1).mean().item(), rel=1e-5)


def test_penalty_looks_at_the_interpolates():
    a, b, eps = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.rand(4, 1, 1, 1)
    norms = (eps * a + (1 - eps) * b).flatten(1).norm(dim=1)
    penalty, seen = sagan.gradient_penalty(Quadratic(), a, b, eps)
    assert penalty.item() == pytest.approx((norms - 1).square().mean().item(), rel=1e-5)
    assert seen.item() == pytest.approx(norms.mean().item(), rel=1e-5)


def test_values_of_the_losses():
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
    softplus = lambda v: math.log1p(math.exp(v))
    loss, logs = sagan.discriminator_loss(D, real, fake, loss="r1", lambda_r1=3.0)
    assert loss.item() == pytest.approx(softplus(-0.5) + softplus(-0.25) + 3 / 2 / 12, rel=1e-5)
    assert logs["w"].item() == pytest.approx(0.75) and logs["real_grad"].item() == pytest.approx(12 ** -0.5)
    assert sagan.generator_loss(D, fake, loss="r1").item() == pytest.approx(softplus(0.25), rel=1e-5)
    for bad in (dict(loss="lsgan"), dict(c_penalty="none"), dict(loss="hinge", c_penalty="one-sided")):
        with pytest.raises(ValueError):
            sagan.connector_loss(D, real, fake, **bad)


def test_a_penalised_critic_mixes_no_samples():
    D = sagan.Discriminator(image_size=32, ch=4).eval()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in D.modules())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(D(x)[1:2], D(x[1:2]))


# ---------------------------------------------------------------------------------------------- copies
ROOT = Path(__file__).resolve().parent.parent
DECOY = "raise SystemExit('a decoy was imported')"


def python(folder, *argv, path=""):
    """Run python in `folder`, with other code in the folder `path` -> the finished process."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def decoys(tmp_path):
    """A folder of a user's own code with our names."""
    folder = tmp_path / "decoys"
    (folder / "kernels").mkdir(parents=True)
    for name in ("okd_train.py", "kernels/__init__.py", "kernels/attention.py"):
        (folder / name).write_text(DECOY)
    return folder


@pytest.fixture
def copy(tmp_path):
    """A folder with nothing but sagan.py."""
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(ROOT / "sagan.py", folder)
    return folder


NETWORKS = """
import sys
before = sys.modules.get("kernels"), sys.modules.get("kernels.attention")
import torch, sagan
torch.manual_seed(0)
G, D = sagan.Generator(image_size=32, ch=8), sagan.Discriminator(image_size=32, ch=8)
for layer in (*G.modules(), *D.modules()):
    if isinstance(layer, sagan.SelfAttention):
        layer.gamma.data.fill_(0.5)
ours, found = sagan.self_attention, []
for sagan.self_attention in (sagan.eager_attention, ours):
    torch.manual_seed(1)
    x = G.eval()(torch.randn(2, 128))
    loss, _ = sagan.discriminator_loss(D.eval(), torch.rand(2, 3, 32, 32), x.detach())
    found.append(torch.cat([t.flatten() for t in (x, loss, *torch.autograd.grad(loss, list(D.parameters())))]))
torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
"""


def test_copied_alone(copy, decoys):
    """Whatever else is called kernels: the two lines of its own."""
    script = NETWORKS + "assert sagan.self_attention is sagan.eager_attention and 'kernels' not in sys.modules"
    out = python(copy, "-c", script, path=decoys)
    assert out.returncode == 0, out.stderr


def beside(copy):
    """Give it kernels/attention.py, and nothing else of kernels/."""
    (copy / "kernels").mkdir()
    return shutil.copy(ROOT / "kernels" / "attention.py", copy / "kernels")


def test_beside_the_fused_attention(copy):
    file = beside(copy)
    out = python(copy, "-c", NETWORKS + """
assert sagan.self_attention.__code__.co_filename == sys.argv[1], sagan.self_attention
import kernels.attention
assert kernels.attention.self_attention is sagan.self_attention
""", file)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("loaded", [False, True])
def test_a_foreign_package_of_that_name_is_not_taken(loaded, copy, decoys):
    """One elsewhere on the path, and one that the program uses already: which then keeps its name."""
    file = beside(copy)
    start = "import sys, types\nfor n in ('kernels', 'kernels.attention'): sys.modules[n] = types.ModuleType(n)\n"
    out = python(copy, "-c", start * loaded + NETWORKS + """
assert sagan.self_attention.__code__.co_filename == sys.argv[1], sagan.self_attention
assert before == (sys.modules.get("kernels"), sys.modules.get("kernels.attention"))
""", file, path=decoys)
    assert out.returncode == 0, out.stderr


def test_beside_a_foreign_file_of_that_name_and_pasted_into_a_notebook(copy, decoys):
    (copy / "kernels").mkdir()
    (copy / "kernels/attention.py").write_text("class Attention: pass")
    alone = "assert sagan.self_attention is sagan.eager_attention"
    for start in (NETWORKS, "import types\nsagan = types.ModuleType('cell')\n"
                  "exec(open('sagan.py').read(), vars(sagan))\n"):
        out = python(copy, "-c", start + alone)
        assert out.returncode == 0, out.stderr


def check_main(folder, name, decoys):
    """`python NAME` alone says what it needs; beside okd_train.py it hands itself over."""
    for argv in (["--help"], ["--data", "crops/"]):
        out = python(folder, name, *argv, path=decoys)
        said = f"{name}: error: training needs okd_train.py beside {name}\n"
        assert (out.returncode, out.stdout, out.stderr) == (2, "", said)
    (folder / "okd_train.py").write_text("def main(argv): print(argv)\ndef as_program(main): main()")
    out = python(folder.parent, folder / name, "--steps", "3", path=decoys)
    assert out.stdout.strip() == repr(["--model", str(folder / name), "--groups", "1", "--steps", "3"]), out.stderr


def test_the_command_needs_the_trainer_beside_it(copy, decoys):
    check_main(copy, "sagan.py", decoys)
