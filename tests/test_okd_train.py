"""okd_train.py: the step's mathematics, the properties of a run, and the real script as a subprocess."""
import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize

import bench
import fid
import labels
import okd_train
import report
import sagan
from conftest import noise
from kernels.convolution import fast_second_derivative

TINY = ["--image-size", "32", "--ch", "4", "--batch-size", "4", "--z-dim", "8"]
ENV = dict(os.environ, OMP_NUM_THREADS="1")

pytestmark = pytest.mark.usefixtures("one_thread")


def setup(*argv, size=40):
    """A trainer made as the command line makes it, on `size` random images."""
    s, script, named = okd_train.parse(list(argv))
    okd_train.settle(s, script, named)
    r = np.random.default_rng(1)
    images = torch.from_numpy(r.integers(0, 256, (size, 3, s.image_size, s.image_size), dtype=np.uint8))
    labels, classes = torch.arange(size) % 2, ["Crack", "Spallation"]
    if script.conditional:
        s.n_classes = 2
    data = okd_train.Data(images, labels, classes if script.conditional else [], s, torch.device("cpu"))
    return okd_train.Trainer(script, s, data, torch.device("cpu"))


def flat(state, prefix=""):
    """A nested state -> {path: tensor or value}."""
    if isinstance(state, dict):
        return {k: v for key, sub in state.items() for k, v in flat(sub, f"{prefix}/{key}").items()}
    if isinstance(state, list):
        return {k: v for key, sub in enumerate(state) for k, v in flat(sub, f"{prefix}/{key}").items()}
    return {prefix: state}


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys() and len(a) > 3
    for k in a:
        assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k


def differs(a, b):
    a, b = flat(a), flat(b)
    return any(not torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


def train(*argv):
    """okd_train.py in this process."""
    okd_train.main(list(map(str, argv)))


def run(*argv, script=okd_train.__file__, env=ENV):
    """okd_train.py as a user runs it, from the beginning to a good end."""
    p = subprocess.run([sys.executable, script, *map(str, argv)], capture_output=True, text=True, env=env, timeout=120)
    assert p.returncode == 0, p.stdout + p.stderr
    return p


def start(*argv, **kw):
    """okd_train.py as a user starts it -> the process, with pipes."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, okd_train.__file__, *map(str, argv)], **{"env": ENV, **pipes, **kw})


def checkpoint(folder):
    return okd_train.load_file(folder / "checkpoint.pt")


def refused(capsys, *argv):
    """Runs in this process; the one line on stderr of a user error."""
    with pytest.raises(SystemExit) as e:
        okd_train.main(list(map(str, argv)))
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.count("\n") == 1 and text.startswith("okd_train.py: error: "), text
    return text


# ---------------------------------------------------------------------------------------------- randomness
def test_draw_is_a_function_of_its_key():
    one = okd_train.draw(3, 5, 1, "z", "normal", (4, 6))
    assert torch.equal(one, okd_train.draw(3, 5, 1, "z", "normal", (4, 6))) and one.dtype == torch.float32
    for other in ((4, 5, 1, "z"), (3, 6, 1, "z"), (3, 5, 2, "z"), (3, 5, 1, "eps")):
        assert not torch.equal(one, okd_train.draw(*other, "normal", (4, 6)))
    many = okd_train.draw(0, 0, 0, "z", "normal", (200_000,))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    u = okd_train.draw(0, 0, 0, "e", "uniform", (100_000,))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01
    y = okd_train.draw(0, 0, 0, "y", 5, (10_000,))
    assert y.dtype == torch.int64 and sorted(set(y.tolist())) == [0, 1, 2, 3, 4]
    assert okd_train.draw(0, 0, 0, "p", "permutation", 50).sort()[0].tolist() == list(range(50))


def test_every_image_once_an_epoch_in_an_order_of_its_own_per_group():
    t = setup("--groups", "2", *TINY, size=22)                      # batches of 4: epochs begin within batches
    seen = torch.cat([t.data.indices(k, 1) for k in range(11)])
    assert seen[:22].sort()[0].tolist() == list(range(22)) and seen[22:].sort()[0].tolist() == list(range(22))
    assert seen[:22].tolist() != seen[22:].tolist()
    assert seen[:22].tolist() != torch.cat([t.data.indices(k, 2) for k in range(6)])[:22].tolist()
    assert torch.equal(t.data.indices(3, 1), seen[12:16])           # whatever was asked for before


def test_balance_shows_every_class_as_often_as_the_largest():
    t = setup("--model", "acgan", "--groups", "2", "--balance", *TINY, size=23)
    s, images = t.s, t.data.images
    y = torch.tensor([0] * 3 + [1] * 13 + [2] * 7)                  # 13 of each in an epoch of 39, 9.75 batches
    data = okd_train.Data(images, y, ["Crack", "Rust", "Spall"], s, torch.device("cpu"))
    seen = torch.cat([data.indices(k, 1) for k in range(39)]).view(4, 39)
    for epoch in seen:
        times = epoch.bincount(minlength=23)
        assert [times[y == c].sum() for c in range(3)] == [13, 13, 13]
        assert times[:3].sort()[0].tolist() == [4, 4, 5] and times[3:16].eq(1).all() and times[16:].max() == 2
    assert len({tuple(epoch.bincount().tolist()) for epoch in seen}) > 1            # not always the same ones twice
    assert seen[0].tolist() != torch.cat([data.indices(k, 2) for k in range(10)])[:39].tolist()
    even = torch.tensor([0, 1] * 10 + [2, 2, 2])
    for labels, names in ((even % 2, ["Crack", "Rust"]), (even, ["Crack", "Rust"])):
        settings = (SimpleNamespace(**{**vars(s), "balance": on}) for on in (False, True))
        plain, balanced = (okd_train.Data(images[:20], labels[:20], names, of, torch.device("cpu")) for of in settings)
        assert torch.equal(plain.indices(5, 1), balanced.indices(5, 1))             # equal already: nothing changes
    lacking = okd_train.Data(images, y.clamp(max=1), ["Crack", "Rust", "Spall"], s, torch.device("cpu"))
    assert lacking.shown == 40 and lacking.indices(9, 1).max() < 23


def test_balance_is_of_the_run_and_says_where_it_does_nothing(tmp_path, capsys):
    noise(tmp_path / "photos", ("Crack", "Rust"), 4)
    for k in (0, 1):
        (tmp_path / f"photos/Rust/{k}.png").unlink()
    argv = ["--data", str(tmp_path / "photos"), "--groups", "1", "--epochs", "1", "--balance", *TINY]
    argv += ["--batch-size", "2"]
    okd_train.main([*argv, "--model", "acgan", "--out", str(tmp_path / "a")])
    assert "without effect" not in capsys.readouterr().out
    settings = json.loads((tmp_path / "a/args.json").read_text())["settings"]
    assert settings["balance"] is True and settings["steps"] == 4   # four of each class, not the six that there are
    okd_train.main([*argv, "--model", "sagan", "--out", str(tmp_path / "b")])
    assert "--balance without effect, sagan has no classes" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- mathematics of the step
def test_one_group_equals_a_plain_loop():
    """Five steps of the trainer against a loop of sagan's classes and losses, torch's Adam and draw, bit for bit."""
    t = setup("--groups", "1", *TINY, "--seed", "7")
    for _ in range(5):
        t.step()

    torch.manual_seed(okd_train.key(7, 0, 1, "init G", 8) >> 1)
    G = sagan.Generator(image_size=32, z_dim=8, ch=4)
    torch.manual_seed(okd_train.key(7, 0, 1, "init D", 8) >> 1)
    D = fast_second_derivative(sagan.Discriminator(image_size=32, ch=4))
    for net in (G, D):
        net.to(memory_format=torch.channels_last)
    opt_g = torch.optim.Adam(G.parameters(), lr=1e-4, betas=(0.0, 0.9), fused=True)
    opt_d = torch.optim.Adam(D.parameters(), lr=4e-4, betas=(0.0, 0.9), fused=True)
    order = okd_train.draw(7, 0, 1, "order", "permutation", 40)
    for step in range(5):
        fake = G(okd_train.draw(7, step, 0, "z", "normal", (4, 8)))
        real = t.data.images[order[4 * step:4 * step + 4]].float() / 127.5 - 1
        real = real.contiguous(memory_format=torch.channels_last)
        eps = okd_train.draw(7, step, 1, "eps D", "uniform", (4, 1, 1, 1))
        opt_d.zero_grad()
        with parametrize.cached():                                  # one power iteration for both uses of D
            sagan.discriminator_loss(D, real, fake.detach(), eps)[0].backward()
        opt_d.step()
        for m in D.modules():                                       # D stands still while G learns
            m.training = not isinstance(m, torch.nn.utils.parametrizations._SpectralNorm)
        opt_g.zero_grad()
        sagan.generator_loss(D, fake).backward()
        opt_g.step()
        D.train()
    assert_same(t.groups[0].nets["G"].net.state_dict(), G.state_dict())
    assert_same(t.groups[0].nets["D"].net.state_dict(), D.state_dict())


def record(t):
    """Wrap the script's losses of a trainer: every call is noted as (which, network, first images, second images)."""
    calls = []

    def noting(which, f):
        def loss(D, first, *more, **k):
            calls.append((which, D, first, more[0] if more else None))
            return f(D, first, *more, **k)
        return loss
    for name in ("discriminator_loss", "connector_loss", "generator_loss"):
        setattr(t.script, name, noting(name[0], getattr(t.script, name)))
    return calls


@pytest.mark.parametrize("topology, sees", [
    (None, {1: 2, 2: 3, 3: 1}),
    (lambda i, n: (i - 2) % n + 1, {1: 3, 2: 1, 3: 2}),
    (lambda i, n: 1, {1: 1, 2: 1, 3: 1})], ids=["ring", "reversed", "star"])
def test_whose_images_a_connector_sees_as_real(topology, sees, monkeypatch):
    if topology:
        monkeypatch.setattr(okd_train, "neighbour", topology)
    t = setup("--groups", "3", *TINY)
    calls = record(t)
    fakes = {}
    generate = t.generate
    t.generate = lambda g, *a: fakes.setdefault(g.i, generate(g, *a))
    t.step()
    seen = {id(n.net): (g.i, role) for g in t.groups for role, n in g.nets.items()}
    connectors = [c for c in calls if c[0] == "c"]
    assert [seen[id(c[1])] for c in connectors] == [(1, "C"), (2, "C"), (3, "C")]
    for (_, C, neighbour, own), (i, j) in zip(connectors, sees.items()):
        assert torch.equal(own, fakes[i]) and torch.equal(neighbour, fakes[j])
        assert not own.requires_grad and not neighbour.requires_grad
    assert [seen[id(c[1])] for c in calls if c[0] == "g"] == [(i, role) for i in (1, 2, 3) for role in "DC"]
    for kind, D, real, fake in calls:
        if kind == "d":
            i = seen[id(D)][0]
            assert torch.equal(fake, fakes[i]) and not fake.requires_grad
            want = t.data.images[t.data.indices(0, i)].float() / 127.5 - 1
            assert torch.equal(real, want)


class Watch(nn.Module):
    """A layer that other layers' traps are mirrored in: dropout-free, but with a buffer that moves in every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def test_only_the_network_whose_turn_it_is_moves():
    t = setup("--model", "acgan", "--groups", "2", *TINY)           # BatchNorm in D and C: buffers that would move
    build = t.script.build

    def watched(*a):
        net = build(*a)
        net.net.append(Watch())
        return net
    t.script.build = watched
    t.groups[0].nets["D"] = okd_train.Network("D", 1, t.script, t.s, 4e-4, torch.device("cpu"), t.ranks)
    d = t.given.plan[0]
    fakes = {g.i: t.generate(g, 0) for g in t.groups}
    real = t.data.batch(d["idx", 1], None)
    before = copy.deepcopy(t.state())
    t.learn_critic(t.groups[0], "D", 0, real, fakes[1].detach(), t.data.labels[d["idx", 1]])
    t.learn_critic(t.groups[0], "C", 0, fakes[2].detach(), fakes[1].detach(), d["y"])
    assert all(p.grad is None for g in t.groups for p in g.nets["G"].net.parameters())
    after = t.state()
    assert_same(before["groups"][1], after["groups"][1])
    assert_same(before["groups"][0]["G"], after["groups"][0]["G"])
    assert differs(before["groups"][0]["D"], after["groups"][0]["D"])
    assert differs(before["groups"][0]["C"], after["groups"][0]["C"])

    before = copy.deepcopy(t.state())
    for role in ("D", "C"):
        t.groups[0].nets[role].opt.zero_grad()
    t.fakes = fakes
    t.learn_generator(t.groups[0], 0)
    for role in ("D", "C"):
        assert_same(before["groups"][0][role], t.state()["groups"][0][role])
        assert all(p.grad is None and p.requires_grad for p in t.groups[0].nets[role].net.parameters())
        assert t.groups[0].nets[role].net.training
    assert differs(before["groups"][0]["G"], t.state()["groups"][0]["G"])
    assert_same(before["groups"][1], t.state()["groups"][1])


@pytest.mark.parametrize("model", ["sagan", "acgan"])
def test_spectral_norm_moves_once_per_update_and_batchnorm_once_per_step(model):
    t = setup("--model", model, "--groups", "2", *TINY)
    g, moves = t.groups[0], {}
    for role, n in g.nets.items():
        for m in n.parametrizations:
            def count(matrix, n_iterations, role=role, old=m._power_method):
                moves[role] = moves.get(role, 0) + 1
                return old(matrix, n_iterations)
            m._power_method = count
    t.step()
    if model == "sagan":
        assert moves == {"G": 3, "D": 3, "C": 3}                    # three normed layers at 32x32, each once
    for role, times in (("G", 1), ("D", 2), ("C", 2)):              # a critic sees real and fake apart
        norms = [m for m in g.nets[role].net.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.num_batches_tracked.item() == times for m in norms)


def test_one_generator_forward_and_no_critic_weight_gradient_in_the_generator_step():
    t = setup("--groups", "3", *TINY)
    forwards, weight_grads = [], []
    for g in t.groups:
        g.nets["G"].net.register_forward_hook(lambda *a, i=g.i: forwards.append(i))
        for role in ("D", "C"):
            for p in g.nets[role].params:
                p.register_hook(lambda grad: weight_grads.append(now[0]))
    now, learn = ["critics"], t.learn_generator

    def learn_generator(*a):
        now[0] = "generator"
        out = learn(*a)
        now[0] = "critics"
        return out
    t.learn_generator = learn_generator
    t.step()
    assert sorted(forwards) == [1, 2, 3]
    assert "critics" in weight_grads and "generator" not in weight_grads


def test_arithmetic_of_a_full_step(monkeypatch):
    """At most 192 GFLOP per group at 64x64, width 64, batch 25; counted at batch 5, as all of it is per sample."""
    import kernels.attention
    from torch.utils.flop_counter import FlopCounterMode
    monkeypatch.setattr(kernels.attention, "FUSED_FROM_N", 10 ** 9)  # the counter knows no formula of oneDNN's product
    t = setup("--groups", "2", "--batch-size", "5")
    for name in ("discriminator_loss", "connector_loss"):           # the counter loses the second derivative of a leaf
        f = getattr(t.script, name)
        setattr(t.script, name, lambda D, *a, f=f, **k: f(lambda x: D(x + 0), *a, **k))
    with FlopCounterMode(display=False) as count:
        t.step()
    gflop = count.get_total_flops() / 1e9 * 5 / 2
    assert 170 < gflop <= 192, gflop
    t.s.batch_size = 25
    flops, operations = bench.count_work(okd_train.Script("sagan"), t.s)
    assert flops / 2e9 == pytest.approx(gflop, rel=2e-3) and 900 < operations / 2 <= 1000, (flops / 2e9, operations / 2)


def test_result_is_independent_of_the_visiting_order():
    a, b = setup("--groups", "3", *TINY), setup("--groups", "3", *TINY)
    b.groups = [b.groups[2], b.groups[0], b.groups[1]]
    for t in (a, b):
        t.step(), t.step()
    b.groups.sort(key=lambda g: g.i)
    assert_same(a.state(), b.state())


@pytest.mark.parametrize("model", ["sagan", "acgan"])
def test_group_1_without_coupling_is_the_baseline(model):
    ring = setup("--model", model, "--groups", "3", "--rho", "0", *TINY)
    alone = setup("--model", model, "--groups", "1", *TINY)
    coupled = setup("--model", model, "--groups", "3", *TINY)
    for t in (ring, alone, coupled):
        for _ in range(3):
            t.step()
    ours, theirs = ring.state()["groups"][0], alone.state()["groups"][0]
    assert_same({k: ours[k] for k in ("G", "D", "ema")}, theirs)
    assert differs({k: coupled.state()["groups"][0][k] for k in ("G", "D", "ema")}, theirs)


def test_critics_see_images_without_a_graph(monkeypatch):
    t, seen = setup("--groups", "2", *TINY), []
    for name in ("discriminator_loss", "connector_loss"):
        f = getattr(t.script, name)
        monkeypatch.setattr(t.script, name, lambda D, a, b, f=f, **k: (seen.extend((a, b)), f(D, a, b, **k))[1])
    t.step()
    assert len(seen) == 8 and not any(x.requires_grad for x in seen)


def test_groups_start_apart_and_share_z():
    t = setup("--groups", "3", *TINY)
    first = lambda roles: [g.nets[role].net.net[0].bias for g in t.groups for role in roles]
    for group in (first("G"), first("DC")):
        assert all(not torch.equal(a, b) for k, a in enumerate(group) for b in group[:k])
    drawn = {"z", *((k, i) for k in ("idx", "D", "C") for i in (1, 2, 3))}
    assert t.next_inputs()[0].keys() == drawn | {"step", "rho", "pace", "g_lr", "d_lr", "c_lr"}


def test_n_critic_takes_fresh_z_and_reals_and_moves_g_once():
    t = setup("--groups", "2", "--n-critic", "3", *TINY)
    calls = record(t)
    power = []
    for m in t.groups[0].nets["G"].parametrizations:
        m._power_method = lambda *a, old=m._power_method: (power.append(1), old(*a))[1]
    t.step()
    reals = [c[2] for c in calls if c[0] == "d"]
    assert len(reals) == 6 and not torch.equal(reals[0], reals[2])
    assert len([c for c in calls if c[0] == "g"]) == 4 and len(power) == 3
    G = t.groups[0].nets["G"]
    assert next(iter(G.opt.state.values()))["step"].item() == 1
    assert next(iter(t.groups[0].nets["C"].opt.state.values()))["step"].item() == 3
    assert all(m.num_batches_tracked.item() == 1 for m in G.net.modules() if isinstance(m, nn.BatchNorm2d))


def test_average_of_the_generator():
    t = setup("--groups", "1", *TINY)
    want = [p.detach().clone() for p in t.groups[0].nets["G"].net.parameters()]
    for step in range(4):
        t.step()
        decay = min(0.999, (1 + step) / (10 + step))
        want = [decay * w + (1 - decay) * p.detach() for w, p in zip(want, t.groups[0].nets["G"].net.parameters())]
    for w, p in zip(want, t.groups[0].ema.parameters()):
        torch.testing.assert_close(p, w, rtol=1e-5, atol=1e-7)
    for a, b in zip(t.groups[0].ema.buffers(), t.groups[0].nets["G"].net.buffers()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model", ["sagan", "acgan"])
def test_the_average_has_batchnorm_statistics_of_its_own(model):
    """Those that its own maps have over keyed fakes; spectral norm and training stay as they are."""
    t, other = (setup("--groups", "1", "--model", model, *TINY) for _ in range(2))
    for _ in range(3):
        t.step(), other.step()
    g = t.groups[0]
    stale = g.ema.net[1].running_mean.clone()
    others = {k: v.clone() for k, v in g.ema.state_dict().items() if not k.endswith(("_mean", "_var", "_tracked"))}
    okd_train.settle_norms(g.ema, t.s)
    inputs = [okd_train.chunk_of_inputs(t.s, k, "norms") for k in range(okd_train.NORM_CHUNKS)]
    with torch.no_grad():
        z = torch.cat([g.ema.embed(x[1]) * x[0] if len(x) > 1 else x[0] for x in inputs])
        maps = g.ema.net[0](z[:, :, None, None])
    torch.testing.assert_close(g.ema.net[1].running_mean, maps.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(g.ema.net[1].running_var, maps.var((0, 2, 3)), rtol=2e-2, atol=1e-6)
    assert not torch.allclose(stale, g.ema.net[1].running_mean, rtol=1e-2) and not g.ema.training
    assert g.ema.net[1].momentum == 0.1 and not g.ema.net[1].training
    assert all(torch.equal(v, g.ema.state_dict()[k]) for k, v in others.items())
    t.step(), other.step()
    assert_same(t.state(), other.state())                           # the next step's buffers are the live ones again


def test_sampling_uses_running_statistics_and_leaves_no_trace():
    t = setup("--groups", "1", *TINY)
    t.step()
    before = copy.deepcopy(t.state())
    z = okd_train.draw(0, 0, 0, "x", "normal", (60, 8))
    alone, among = okd_train.generate(t.groups[0].ema, z[:1]), okd_train.generate(t.groups[0].ema, z)
    assert abs(alone[0].astype(int) - among[0]).max() <= 1          # in train mode the batch would matter
    assert not t.groups[0].ema.training
    assert_same(before, t.state())


def test_a_checkpoint_in_another_layout_goes_on_alike():
    """Adam's fused kernel walks through memory: moments that lie otherwise than their weight would be mixed up."""
    a, b = setup("--groups", "2", *TINY), setup("--groups", "2", *TINY)
    for _ in range(2):
        a.step()
    state = copy.deepcopy(a.state())
    for group in state["groups"]:
        for role in "GDC":
            for moments in group[role]["opt"].values():
                moments.update({name: v.contiguous() for name, v in moments.items()})
            group[role]["net"] = {k: v.contiguous() for k, v in group[role]["net"].items()}
    w = a.groups[0].nets["D"].params[1]
    assert w.dim() == 4 and not w.is_contiguous()
    b.load_state(dict(enumerate(state["groups"], 1)), 2)
    a.step(), b.step()
    assert_same(a.state(), b.state())


def test_gradients_in_another_layout_reach_the_right_weights():
    """As those that ranks add up: in torch's default layout, whatever that of the weights is."""
    a, b = setup("--groups", "2", *TINY), setup("--groups", "2", *TINY)
    for g in b.groups:
        for n in g.nets.values():
            for p in n.params:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.contiguous()))
    for _ in range(2):
        a.step(), b.step()
    assert_same(a.state(), b.state())


def test_flip_mirrors_half_of_the_reals():
    t = setup("--groups", "1", "--flip", *TINY)
    idx = torch.arange(4)
    plain = t.data.batch(idx, None)
    flipped = t.data.batch(idx, torch.tensor([0.2, 0.7, 0.49, 0.5]).view(4, 1, 1, 1))
    for k, mirrored in enumerate((True, False, True, False)):
        assert torch.equal(flipped[k], plain[k].flip(2) if mirrored else plain[k])
    assert ("flip", 1) in t.next_inputs()[0]
    upended = t.data.batch(idx, None, torch.tensor([0.2, 0.7, 0.49, 0.5]).view(4, 1, 1, 1))
    for k, mirrored in enumerate((True, False, True, False)):
        assert torch.equal(upended[k], plain[k].flip(1) if mirrored else plain[k])
    d = setup("--groups", "1", "--flip", "--flip-vertical", *TINY).next_inputs()[0]
    assert not torch.equal(d["flip", 1], d["upend", 1])             # one does not follow from the other


def test_own_losses_equal_sagans():
    D = sagan.Discriminator(image_size=32, ch=4).eval()
    real, fake, eps = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.rand(4, 1, 1, 1)
    ours, a = okd_train.discriminator_loss(D, real, fake, eps=eps)
    theirs, b = sagan.discriminator_loss(D, real, fake, eps)
    torch.testing.assert_close(ours, theirs)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k]) for k in a)
    torch.testing.assert_close(okd_train.generator_loss(D, fake), sagan.generator_loss(D, fake))
    defaults = {**okd_train.TRAINER_HPARAMS, **okd_train.OWN_LOSS_HPARAMS}
    assert {k: sagan.hparams[k] for k in defaults} == defaults


# ---------------------------------------------------------------------------------------------- any model script
OTHER = '''
import torch
from torch import nn
hparams = dict(image_size=16, z_dim=6, batch_size=4, width=8, drop=0.3, sharp=True)
class Generator(nn.Module):
    def __init__(self, z_dim, width, image_size):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(z_dim, width), nn.ReLU(), nn.Dropout(0.1),
                               nn.Linear(width, 3 * image_size ** 2), nn.Tanh())
        self.size = image_size
    def forward(self, z):
        return self.f(z).view(-1, 3, self.size, self.size)
class Discriminator(nn.Module):
    def __init__(self, drop=0.3, sharp=True):
        super().__init__()
        self.f = nn.Sequential(nn.Flatten(), nn.LazyLinear(8) if False else nn.Linear(768, 8),
                               nn.Tanh() if sharp else nn.ReLU(), nn.Dropout(drop), nn.Linear(8, 1))
    def forward(self, x):
        return self.f(x)
'''
BARE = '''
import torch
class Generator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.f = torch.nn.utils.spectral_norm(torch.nn.Linear(128, 3 * 64 * 64))
    def forward(self, z):
        return self.f(z).view(-1, 3, 64, 64).tanh()
class Discriminator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.f = torch.nn.Conv2d(3, 1, 64)
    def forward(self, x):
        return self.f(x)
'''


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "elsewhere" / "my other gan.py"
    path.parent.mkdir()
    path.write_text(OTHER)
    return path


def test_a_script_elsewhere_trains_and_resumes(other, photos, tmp_path):
    """It has dropout, which torch draws by itself: in another process with another history the same."""
    settings = ["--width", "12", "--no-sharp", "--drop", "0.5", "--log-every", "1"]
    common = ["--model", other, "--groups", "2", "--data", photos, *settings]
    run(*common, "--steps", "2", "--out", tmp_path / "parts")
    train(*common, "--steps", "4", "--out", tmp_path / "whole")
    torch.randn(3)
    train(*common, "--steps", "4", "--out", tmp_path / "parts", "--resume")
    state = checkpoint(tmp_path / "whole")
    assert_same(state, checkpoint(tmp_path / "parts"))
    assert state["groups"][0]["G"]["net"]["f.0.weight"].shape == (12, 6)
    G = okd_train.load_generator(tmp_path / "whole" / "G2.pt")
    assert G(torch.zeros(3, 6)).shape == (3, 3, 16, 16) and not G.training
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert {"d_loss", "d_w", "d_grad_norm", "c_loss", "c_w", "g_loss"} <= line["groups"][1].keys()


def test_two_classes_are_enough(tmp_path):
    path = tmp_path / "bare.py"
    path.write_text(BARE)
    t = setup("--model", str(path), "--groups", "2", "--batch-size", "2")
    before = copy.deepcopy(t.state())
    t.step()
    assert differs(before, t.state()) and t.s.lambda_gp == 10.0


def test_loading_a_script_leaves_the_path_as_it_was(other):
    before = list(sys.path)
    assert okd_train.Script(str(other)).name == "my other gan" and sys.path == before


PLAIN = '''
import random
import numpy as np
import torch
from torch import nn
hparams = dict(image_size=16, z_dim=6, batch_size=4)
class Generator(nn.Module):
    def __init__(self, z_dim):
        super().__init__()
        self.f = nn.Linear(z_dim, 768)
        self.register_buffer("kept", torch.zeros(6))
    def forward(self, z):
        pass  # forward of G
        return self.f(z).view(-1, 3, 16, 16).tanh()
class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Conv2d(3, 1, 16)
        self.register_buffer("seen", torch.zeros(()))
    def forward(self, x):
        pass  # forward of D
        return self.f(x)
def generator_loss(D, fake):
    return -D(fake).mean()
def discriminator_loss(D, real, fake):
    logs = {}
    return D(fake).mean() - D(real).mean() + D(real).square().mean(), logs
'''


def plain(folder, old="", new="", name="gan.py"):
    """A whole script in which `old` is `new`."""
    assert old in PLAIN
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(PLAIN.replace(old, new))
    return folder / name


IN_G, IN_D = "pass  # forward of G", "pass  # forward of D"


@pytest.mark.parametrize("old, new", [
    (IN_G, "self.kept = 0.9 * self.kept + z.mean(0).detach() if self.training else self.kept"),
    ("logs = {}", "logs = {}; fake = fake * random.random() * float(np.random.uniform(0.5, 1))"),
    ("logs = {}", "logs = {}; fake = fake + torch.randn_like(fake)")])
def test_what_a_script_keeps_and_draws_by_itself_resumes(old, new, photos, tmp_path):
    """A buffer that it assigns anew; numbers of random, numpy and torch."""
    common = ["--model", plain(tmp_path / "script", old, new), "--groups", "2", "--data", photos]
    train(*common, "--steps", "4", "--out", tmp_path / "whole")
    train(*common, "--steps", "2", "--out", tmp_path / "parts")
    random.random()
    np.random.random()
    train(*common, "--steps", "4", "--out", tmp_path / "parts", "--resume")
    state = checkpoint(tmp_path / "whole")
    assert_same(state, checkpoint(tmp_path / "parts"))
    for group in state["groups"]:
        assert torch.equal(group["ema"]["kept"], group["G"]["net"]["kept"])
        assert group["ema"]["kept"].any() == (old == IN_G)


def test_a_frozen_critic_keeps_a_buffer_that_is_assigned_anew(photos, tmp_path):
    counts = []
    for k, line in enumerate(("self.seen = self.seen + 1", "self.seen += 1")):
        out = tmp_path / f"run{k}"
        train("--model", plain(tmp_path / "script", IN_D, line), "--groups", "1", "--data", photos, "--steps", "2",
              "--out", out)
        counts.append(checkpoint(out)["groups"][0]["D"]["net"]["seen"].item())
    assert counts == [6, 6]                                         # three calls of each D's step, none of G's


def test_a_generator_that_draws_when_it_is_looked_at_makes_the_same_images(tmp_path):
    script = plain(tmp_path, IN_G, "z = z + torch.randn_like(z)")
    t = setup("--model", str(script), "--groups", "1")
    z = torch.zeros(60, 6)
    assert np.array_equal(okd_train.generate(t.groups[0].ema, z), okd_train.generate(t.groups[0].ema, z))


def test_a_mask_of_infinities_is_no_lost_weight(photos, tmp_path):
    script = plain(tmp_path / "script", "torch.zeros(6)", "torch.full((6,), -torch.inf)")
    common = ["--model", script, "--groups", "1", "--data", photos, "--out", tmp_path / "run"]
    train(*common, "--steps", "1")
    train(*common, "--steps", "2", "--resume")
    assert okd_train.load_generator(tmp_path / "run/G1.pt").kept.isinf().all()


@pytest.mark.parametrize("old, new", [
    ("return self.f(x)", "return self.f(x), x, x"), ("return self.f(x)", "return self.f(x),"),
    ("def forward(self, x):\n        pass  # forward of D", "def forward(self, x, y=None):\n        assert y is None")])
def test_scores_may_begin_a_tuple_of_any_length_and_y_may_be_left_out(old, new, tmp_path):
    script = plain(tmp_path, old, new)
    script.write_text(script.read_text().split("def generator_loss")[0])            # with the trainer's own losses
    t = setup("--model", str(script), "--groups", "2")
    okd_train.probe(t.script, t.s, t.groups[0])
    t.step()
    okd_train.variety(t, t.groups[0])


@pytest.mark.parametrize("old, new, words", [
    ("logs = {}", 'logs = {"scores": D(real).detach().flatten()}', "logs 'scores', which is no number but (2,)"),
    ("logs = {}", 'logs = {"phase": "warm"}', "logs 'phase', which is no number but str"),
    ("logs = {}", 'logs = {"loss": 1.0}', "logs 'loss', a name that is taken"),
    (IN_D, 'self.register_buffer("grid", x[0])', "made grid when it was called"),
    ("def generator_loss", "Discriminator.get_extra_state = lambda self: 1\ndef generator_loss", "get_extra_state"),
    ("batch_size=4", "batch_size=4, eps=0.1", "by which name losses are given their uniforms")])
def test_what_a_script_may_not_is_said_before_a_folder_is_made(old, new, words, photos, tmp_path, capsys):
    argv = ["--model", plain(tmp_path / "script", old, new), "--data", photos, "--steps", "1"]
    argv += ["--out", tmp_path / "run"]
    assert words in refused(capsys, *argv) and not (tmp_path / "run").exists()


def test_a_script_hides_no_module_of_its_name(photos, tmp_path):
    script = plain(tmp_path / "script", name="fractions.py")
    known = sys.modules.pop("fractions", None)
    try:
        assert okd_train.Script(str(script)).name == "fractions"
        from fractions import Fraction
        assert Fraction(1, 2) == 0.5
    finally:
        sys.modules["fractions"] = known


def test_channels_of_ones_own_are_left_alone(tmp_path):
    script = plain(tmp_path, "def __init__(self, z_dim)", "def __init__(self, z_dim, channels=64)")
    script.write_text(script.read_text().replace("z_dim=6,", "z_dim=6, channels=64,"))
    s, script, named = okd_train.parse(["--model", str(script), "--quick"])
    changed = okd_train.settle(s, script, named)
    grey = SimpleNamespace(images=torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert okd_train.settle_channels(s, script, named, changed, grey) == "" and s.channels == 64


def test_numbers_with_exponents_and_of_numpy_are_numbers(photos, tmp_path):
    assert okd_train.parse(["--range", "-1e3", "1e3"])[0].range == [-1000.0, 1000.0]
    script = plain(tmp_path / "script", "batch_size=4", "batch_size=4, slope=np.float64(0.5)")
    script.write_text(script.read_text().replace("def __init__(self, z_dim)", "def __init__(self, z_dim, slope=0.1)"))
    common = ["--model", script, "--groups", "1", "--data", photos, "--out", tmp_path / "run", "--slope", "-1e-3"]
    train(*common, "--steps", "1")
    train(*common, "--steps", "2", "--resume")
    assert okd_train.read_args(tmp_path / "run")["slope"] == -0.001


def test_a_graph_that_is_asked_for_needs_its_file(monkeypatch):
    monkeypatch.setattr(okd_train, "kernel", lambda name: None)
    with pytest.raises(okd_train.UserError, match="needs kernels/cuda_graph.py"):
        setup(*TINY, "--groups", "1", "--cuda-graph", "on")


# ---------------------------------------------------------------------------------------------- a run and its folder
def test_a_run_leaves_what_the_readme_says(photos, tmp_path):
    out = tmp_path / "run ü"
    every = ["--log-every", "2", "--sample-every", "3", "--save-every", "4"]
    p = run("--model", "acgan", "--groups", "2", *TINY, "--data", photos, "--steps", "5", *every, "--out", out,
            "--n-classes", "2")
    assert "2 acgan groups in a ring" in p.stdout and "24 images" in p.stdout and "One step takes" in p.stdout
    assert "--quick" in p.stdout
    files = ["G1.pt", "G2.pt", "args.json", "checkpoint.pt", "log.jsonl", "samples"]
    assert sorted(f.name for f in out.iterdir()) == files
    assert sorted(f.name for f in (out / "samples").iterdir()) == ["real.png", "step_000003.png", "step_000005.png"]
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [2, 3, 4, 5]               # with pictures, too; the last step always does all
    assert {"d_loss", "c_loss", "g_loss", "d_w", "d_accuracy", "gamma"} <= lines[0]["groups"][0].keys()
    assert len(lines[0]["groups"]) == 2
    args = json.loads((out / "args.json").read_text())
    assert args["classes"] == ["Crack", "Spallation"] and args["settings"]["n_classes"] == 2
    assert args["versions"]["torch"] == torch.__version__
    saved = okd_train.load_file(out / "G1.pt")
    assert saved["classes"] == args["classes"] and saved["step"] == 5 and saved["model"] == "acgan"
    picture = Image.open(out / "samples" / "step_000005.png")
    assert picture.height > 4 * 64 and picture.width > 640          # a row per class and group


@pytest.mark.parametrize("model", ["sagan", "acgan"])
def test_resume_is_exact(model, photos, tmp_path):
    settings = ["--log-every", "2", "--flip", "--seed", "5"]
    common = ["--model", model, "--groups", "2", *TINY, "--data", photos, *settings]
    train(*common, "--steps", "6", "--out", tmp_path / "whole")
    train(*common, "--steps", "3", "--out", tmp_path / "parts")
    torch.randn(3)                                                  # a resumed process has another stream behind it
    train("--out", tmp_path / "parts", "--resume", "--steps", "6", "--model", model)
    assert_same(*(checkpoint(tmp_path / d) for d in ("whole", "parts")))
    assert_same(*(okd_train.load_file(tmp_path / d / "G2.pt") for d in ("whole", "parts")))
    assert logs(tmp_path / "whole") == logs(tmp_path / "parts") and len(logs(tmp_path / "whole")) == 3
    whole, parts = ((tmp_path / d / "samples/step_000006.png").read_bytes() for d in ("whole", "parts"))
    assert whole == parts


def logs(run):
    """Parsed log.jsonl without its time fields."""
    lines = [json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("seconds", "images_per_second")} for x in lines]


def test_on_log_is_shown_every_line(photos, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(okd_train, "on_log", shown.append)
    scored = ["--fid-every", "2", "--fid-features", "random", "--fid-samples", "8"]
    argv = ["--groups", "2", *TINY, "--data", photos, "--steps", "5", "--log-every", "2", *scored]
    train(*argv, "--out", tmp_path / "a")
    written = {name: (tmp_path / "a" / name).read_text().splitlines() for name in ("log.jsonl", "fid.jsonl")}
    assert {name: len(lines) for name, lines in written.items()} == {"log.jsonl": 3, "fid.jsonl": 3}
    assert [line for line in shown if "groups" in line] == list(map(json.loads, written["log.jsonl"]))
    assert [line for line in shown if "G1" in line] == list(map(json.loads, written["fid.jsonl"]))
    assert len(shown) == 6 and [line["step"] for line in shown] == [2, 2, 4, 4, 5, 5]


def test_on_log_keeps_the_run_in_this_process(monkeypatch):
    """Others, started with this file, would know nothing of it."""
    def count(*argv):
        s, script, named = okd_train.parse(list(argv))
        okd_train.settle(s, script, named)
        return okd_train.processes(s)
    monkeypatch.setattr(okd_train, "cores", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for on_log, quick, gpus in ((None, 2, 3), (print, 1, 1)):
        monkeypatch.setattr(okd_train, "on_log", on_log)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert count("--quick") == quick and count() == 1
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert count() == gpus and count("--nproc", "1") == 1
    with pytest.raises(okd_train.UserError, match="know nothing of on_log"):
        count("--nproc", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count() == 1


def test_kill_9_at_a_random_moment(photos, tmp_path):
    """A real process; tests/test_sabotage.py strikes at every kind of write, again and again."""
    every = ["--log-every", "1", "--save-every", "8", "--sample-every", "1000"]
    common = ["--model", "sagan", "--groups", "2", *TINY, "--data", photos, "--steps", "24", *every]
    train(*common, "--out", tmp_path / "whole")
    parts, r, kills = tmp_path / "parts", random.Random(4), 0
    for attempt in range(3):
        resume = ["--resume"] if (parts / "checkpoint.pt").exists() else []
        p = start(*common, "--out", parts, *resume, stderr=subprocess.STDOUT)
        size = (parts / "log.jsonl").stat().st_size if resume else 0
        deadline = time.monotonic() + 60
        while attempt < 1 and p.poll() is None and time.monotonic() < deadline:
            lines = (parts / "log.jsonl").read_text().count("\n") if (parts / "log.jsonl").exists() else 0
            if (parts / "checkpoint.pt").exists() and lines > 0 and (parts / "log.jsonl").stat().st_size > size:
                time.sleep(r.random() * 0.25)
                p.kill()
                kills += p.wait() == -signal.SIGKILL
        if p.wait(60) == 0:
            break
    assert kills == 1 and p.returncode == 0
    assert_same(*(checkpoint(tmp_path / d) for d in ("whole", "parts")))
    assert logs(tmp_path / "whole") == logs(parts) and [x["step"] for x in logs(parts)] == list(range(1, 25))


def test_a_state_on_the_cpu_is_a_copy_that_keeps_what_torch_notes_on_it():
    t = setup("--groups", "1", *TINY)
    t.step()
    n = t.groups[0].nets["G"]
    state = {"net": n.net.state_dict(), "opt": n.opt.state_dict()["state"], "step": 3}
    new = okd_train.on_cpu(state)
    assert_same(state, new)
    assert new["net"]._metadata == state["net"]._metadata and new["net"] is not state["net"]
    assert new["opt"][0] is not n.opt.state[n.params[0]]


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": k}) + "\n" for k in (2, 4, 5, 6, 8)) + '{"step": 1')
    # 5 stays in front of 6: --log-every was another then
    for step, every, kept in ((6, 2, [2, 4, 5, 6]), (5, 2, [2, 4]), (5, 1, [2, 4])):
        okd_train.cut_log(log, step, every)
        assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == kept


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(number, code, photos, tmp_path):
    p = start("--groups", "1", *TINY, "--data", photos, "--out", tmp_path / "run", "--log-every", "1")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((log := tmp_path / "run" / "log.jsonl").exists() and log.stat().st_size):
        time.sleep(0.05)
    p.send_signal(number)
    out, err = p.communicate(timeout=60)
    assert p.returncode == code and "--resume goes on" in out and err == ""
    saved, lines = checkpoint(tmp_path / "run"), logs(tmp_path / "run")
    assert saved["step"] == lines[-1]["step"] >= 1


def test_max_seconds_and_epochs(photos, tmp_path, capsys, monkeypatch):
    common, ends, made = ["--groups", "1", *TINY, "--data", photos], [], okd_train.Progress
    monkeypatch.setattr(okd_train, "Progress", lambda *a, seconds=None, **k: ends.append(seconds) or made(*a, **k))
    train(*common, "--max-seconds", "0.001", "--out", tmp_path / "a")
    assert ends == [0.001]
    assert checkpoint(tmp_path / "a")["step"] == 1 and "--max-seconds reached" in capsys.readouterr().out
    train(*common, "--epochs", "0.5", "--out", tmp_path / "b")
    assert checkpoint(tmp_path / "b")["step"] == 3                  # 12 of 24 images in batches of 4


def test_a_loss_that_is_not_finite_stops_the_run(photos, tmp_path, capsys):
    path = tmp_path / "blowup.py"
    path.write_text(BARE.replace("64", "16") + '''
hparams = dict(image_size=16, batch_size=2)
calls = [0]
def generator_loss(D, fake):
    calls[0] += 1
    return D(fake).mean() * (float("nan") if calls[0] > 13 else 1)     # groups x critics = 4 calls a step
''')
    argv = ["--model", path, "--groups", "2", "--data", photos, "--save-every", "2"]
    text = refused(capsys, *argv, "--out", tmp_path / "run")
    assert "step 4" in text and "generator of group 1" in text and "checkpoint.pt" in text
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 2
    assert all(torch.isfinite(v).all() for v in flat(state).values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("spoil", ["weights", "moments"])
def test_lost_weights_do_not_replace_a_good_checkpoint(spoil, photos, tmp_path, capsys, monkeypatch):
    """A gradient that overflows in the very step that is saved, while its loss is finite yet."""
    step = okd_train.Trainer.step

    def overflow(t):
        out = step(t)
        n = t.groups[1].nets["C"]
        numbers = n.params[0].data if spoil == "weights" else n.opt.state[n.params[0]]["exp_avg_sq"]
        numbers.view(-1)[0] = float("inf" if t.step_count == 4 else 0.5)
        return out
    monkeypatch.setattr(okd_train.Trainer, "step", overflow)
    argv = ["--groups", "2", *TINY, "--data", photos, "--steps", "6", "--save-every", "2"]
    text = refused(capsys, *argv, "--out", tmp_path / "run")
    assert "step 4: weights or moments of the connector of group 2 are not finite; the last good state is in" in text
    assert checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("steps, seconds, words", [
    (1000, None, "so the 900 steps to go take 3 min; Ctrl-C"), (1000, 300, "so the 900 steps to go take 3 min; Ctrl-C"),
    (1000, 50, "so some 250 are made in the 50 s of --max-seconds; Ctrl-C"), (100, 50, "One step takes 0.2 s here.")])
def test_the_forecast_names_the_end_that_comes_first(steps, seconds, words):
    s, cpu = SimpleNamespace(steps=steps, max_seconds=seconds, quick=True), SimpleNamespace(device=torch.device("cpu"))
    assert words in okd_train.Pace().forecast(100, 0.2, cpu, s)


def test_progress_tells_the_time_that_is_left(monkeypatch, capsys):
    """Of two ends, the last step and --max-seconds, the one that comes first."""
    now = [0.0]
    monkeypatch.setattr(okd_train.time, "monotonic", lambda: now[0])
    by_steps, by_time = okd_train.Progress(100), okd_train.Progress(100, seconds=60)
    for now[0] in (0.0, 20.0):
        by_steps(now[0])
        by_time(now[0])
    assert [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()] == ["80 s left", "40 s left"]


def test_progress_is_rewritten_on_a_terminal(photos, tmp_path):
    import pty
    main, sub = pty.openpty()
    argv = ["--groups", "1", *TINY, "--data", photos, "--steps", "3", "--out", tmp_path / "r"]
    p = start(*argv, stdout=sub, stderr=sub)
    os.close(sub)
    text = b""
    with contextlib.suppress(OSError):                              # the terminal closes with the process
        while part := os.read(main, 4096):
            text += part
    assert p.wait(60) == 0 and b"\rstep 1/3" in text and b"img/s" in text and b"left\x1b[K" in text


def test_python_sagan_py_is_the_one_group_baseline(photos, tmp_path, root):
    common = [*TINY, "--data", photos, "--steps", "2"]
    run(*common, "--out", tmp_path / "a", script=root / "sagan.py")
    train("--groups", "1", *common, "--out", tmp_path / "b")
    assert_same(*(checkpoint(tmp_path / d) for d in "ab"))


def test_torchrun_with_one_process(photos, tmp_path):
    argv = ["--groups", "2", *TINY, "--data", photos, "--steps", "2", "--batch_size=3", "--out", tmp_path / "r"]
    run("torch.distributed.run", "--standalone", okd_train.__file__, "--model", "sagan", *argv, script="-m")
    assert json.loads((tmp_path / "r" / "args.json").read_text())["settings"]["batch_size"] == 3


# ---------------------------------------------------------------------------------------------- recipes
RECIPES = """
from torch import nn
hparams = dict(ch=8, g_lr=1e-3)
recipes = dict(small=dict(ch=4, batch_size=6, flip=True), large=dict(ch=16))
class Generator(nn.Module):
    def __init__(self, ch=8, image_size=64):
        super().__init__()
class Discriminator(nn.Module):
    pass
"""


def test_a_recipe_is_a_named_set_of_settings_and_flags_win(tmp_path):
    (tmp_path / "own.py").write_text(RECIPES)

    def settled(*argv):
        s, script, named = okd_train.parse(["--model", str(tmp_path / "own.py"), *argv])
        changed = okd_train.settle(s, script, named)
        assert all(getattr(s, k) == v for k, v in changed.items()) and not named & changed.keys()
        return s
    plain, small = settled(), settled("--recipe", "small")
    assert (plain.ch, plain.batch_size, plain.recipe) == (8, 25, None)
    assert (small.ch, small.batch_size, small.image_size, small.steps) == (4, 6, 64, 50000)
    assert settled("--recipe", "large").ch == 16 and small.flip and not plain.flip
    assert not settled("--recipe", "small", "--no-flip").flip
    named = settled("--recipe", "small", "--ch", "9")
    assert (named.ch, named.batch_size) == (9, 6)
    quick = settled("--quick", "--batch-size", "7")
    assert (quick.ch, quick.batch_size, quick.image_size, quick.recipe) == (4, 7, 32, "small")
    assert (quick.steps, quick.max_seconds) == (50000, 270)         # the minutes end it, however fast its steps are
    assert settled("--quick", "--recipe", "large").ch == 16
    with pytest.raises(okd_train.UserError, match="--recipe tiny: own has small, large"):
        settled("--recipe", "tiny")


def test_quick_leaves_the_size_of_a_script_that_has_one_only(tmp_path):
    (tmp_path / "own.py").write_text(RECIPES.replace(", image_size=64", ""))
    s, script, named = okd_train.parse(["--model", str(tmp_path / "own.py"), "--quick"])
    okd_train.settle(s, script, named)
    assert (s.ch, s.image_size) == (4, 64)


def test_quick_of_a_script_without_recipes_takes_the_trainers(tmp_path):
    (tmp_path / "own.py").write_text(RECIPES.replace("recipes", "others"))
    s, script, named = okd_train.parse(["--model", str(tmp_path / "own.py"), "--quick"])
    okd_train.settle(s, script, named)
    assert s.ch == okd_train.SMALL["ch"] and s.d_lr == okd_train.SMALL["d_lr"]
    s, script, named = okd_train.parse(["--model", str(tmp_path / "own.py"), "--recipe", "small"])
    with pytest.raises(okd_train.UserError, match="own has no recipes"):
        okd_train.settle(s, script, named)


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Photos with R = G = B, one of them stored as colour."""
    folder, rng = tmp_path_factory.mktemp("steel"), np.random.default_rng(0)
    for k in range(8):
        image = Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8))
        (image.convert("RGB") if k == 3 else image).save(folder / f"{k}.png")
    return folder


@pytest.mark.parametrize("how, channels, says", [
    ([], 3, "Every image is grey: with --channels 1"),
    (["--recipe", "small"], 1, "--channels 1. Every image is grey: --channels 3"),
    (["--recipe", "small", "--channels", "3"], 3, ""), (["--channels", "1"], 1, "")])
def test_grey_photos_under_a_recipe_make_one_channel(grey, tmp_path, capsys, how, channels, says):
    out = tmp_path / "r"
    train("--groups", "1", *TINY, "--data", grey, "--steps", "1", "--out", out, *how)
    said = capsys.readouterr().out
    assert (says in said) if says else "is grey" not in said
    G = okd_train.load_generator(out / "G1.pt")
    x = G(torch.randn(2, 8))
    assert x.shape == (2, 3, 32, 32) and okd_train.read_args(out)["channels"] == channels
    assert torch.equal(x[:, 0], x[:, 1]) == (channels == 1)
    train("--resume", "--out", out, "--steps", "2")                 # keeps its channel, and says nothing anew
    assert "is grey" not in capsys.readouterr().out and okd_train.read_args(out)["channels"] == channels


def test_colour_photos_keep_their_channels(photos, tmp_path, capsys):
    train("--groups", "1", *TINY, "--data", photos, "--steps", "1", "--out", tmp_path / "a", "--recipe", "small")
    assert okd_train.read_args(tmp_path / "a")["channels"] == 3 and "is grey" not in capsys.readouterr().out
    train("--groups", "1", *TINY, "--data", photos, "--steps", "1", "--out", tmp_path / "b", "--channels", "1")
    assert "--channels 1 makes grey images of these coloured ones" in capsys.readouterr().out


@pytest.fixture(scope="module")
def synthetic():
    """The default data at 32x32: images, labels, classes."""
    return load_synthetic()


def load_synthetic():
    s, _, _ = okd_train.parse(["--image-size", "32"])
    return okd_train.load_data(s, True, print)


def test_the_synthetic_default_is_deterministic(synthetic):
    a, b = synthetic, load_synthetic()
    assert torch.equal(a[0], b[0]) and len(a[0]) >= 300 and len(a[2]) == 5 and set(a[1].tolist()) == set(range(5))


def test_quick_learns(synthetic):
    """The preset, shortened: the distance of simple statistics between samples and data falls far below an eighth."""
    s, script, named = okd_train.parse(["--groups", "2", "--quick"])
    okd_train.settle(s, script, named)
    images, labels, _ = synthetic
    data = okd_train.Data(images, labels, [], s, torch.device("cpu"))
    t = okd_train.Trainer(script, s, data, torch.device("cpu"))

    def statistics(x):                                              # tone, contrast, roughness at four scales
        x = torch.as_tensor(x).float() / 255
        rows = [x.mean((2, 3)), x.std((2, 3))]
        x = x.mean(1, keepdim=True)
        for _ in range(4):
            rows += [(x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))[:, None].add(1e-3).log()]
            x = nn.functional.avg_pool2d(x, 2)
        return torch.cat(rows, 1)
    real, z = statistics(images), okd_train.draw(1, 0, 0, "test", "normal", (200, s.z_dim))

    def distance(g):                                                # of two Gaussians with independent features
        fake = statistics(okd_train.generate(g.ema, z).transpose(0, 3, 1, 2))
        return (((fake.mean(0) - real.mean(0)) ** 2 + (fake.std(0) - real.std(0)) ** 2) / real.var(0)).mean().item()
    before = [distance(g) for g in t.groups]
    for _ in range(40):
        t.step()
    after = [distance(g) for g in t.groups]
    assert all(a < b / 8 for a, b in zip(after, before)), (before, after)


def test_scores_during_training(photos, tmp_path, capsys):
    scored = ["--fid-features", "random", "--fid-samples", "60", "--fid-every", "2"]
    argv = ["--model", "acgan", "--groups", "2", *TINY, "--data", photos, *scored]
    train(*argv, "--steps", "5", "--out", tmp_path / "a")
    text = capsys.readouterr().out
    out = tmp_path / "a"
    lines = okd_train.score_lines(out)
    assert [x["step"] for x in lines] == [2, 4, 5] and lines[0]["score"] == "rFD"
    assert {"G1", "G2", "mean", "union", "floor"} <= lines[0].keys()
    assert lines[0]["mean"] == pytest.approx((lines[0]["G1"] + lines[0]["G2"]) / 2)
    assert len({x["floor"] for x in lines}) == 1
    best = {i: min(lines, key=lambda x: x[f"G{i}"]) for i in (1, 2)}
    assert all(okd_train.load_file(out / f"G{i}.best.pt")["step"] == best[i]["step"] for i in best)
    winner = min(best, key=lambda i: best[i][f"G{i}"])
    assert f"Best: group {winner} at step {best[winner]['step']}" in text
    G = okd_train.load_generator(out / "G2.pt")                     # the number can be had by hand
    z = torch.cat([okd_train.draw(0, c, 0, "fid", "normal", (50, 8)) for c in range(2)])
    fakes = okd_train.generate(G, z, torch.arange(100) % 2)[:60]
    real, _, _ = okd_train.load_folder(photos, 32, True, False, print)
    features = [fid.features(x, features="random", device="cpu") for x in (real, fakes)]
    assert fid.random_distance(*features) == pytest.approx(lines[-1]["G2"], rel=1e-4)
    floor = [lines[-1][k] for k in ("floor", "floor_spread")]       # of 60 fresh images, as 60 fakes are scored
    assert floor == pytest.approx(fid.floor(features[0], 60, fid.random_distance), rel=1e-4)
    assert f"floor {floor[0]:.2f} +- {floor[1]:.2f}" in text
    judge = labels.classifier(features[0], np.arange(24) // 12)     # and so can the share of labels that hold
    share = [np.mean(judge(features[1])[c::2] == c) for c in (0, 1)]
    found = lines[-1]["labels"]
    assert found["G2"] == pytest.approx(np.mean(share), abs=0.02) and 0 <= found["G1"] <= 1
    assert found["reals"] == judge.held_out.mean() > 0.9 and found["chance"] == 0.5
    assert f"Labels that hold at step 5, by the features of rFD: G1 {found['G1']:.2f}  G2 {found['G2']:.2f} " in text
    train(*argv, "--steps", "3", "--out", tmp_path / "b")
    assert [x["step"] for x in okd_train.score_lines(tmp_path / "b")] == [2, 3]
    stamp = (tmp_path / "b" / "real_features.npz").stat().st_mtime_ns
    train("--model", "acgan", "--steps", "5", "--out", tmp_path / "b", "--resume")
    assert okd_train.score_lines(tmp_path / "b") == lines
    assert (tmp_path / "b" / "real_features.npz").stat().st_mtime_ns == stamp


OWN_FEATURES = """
import torch
class Features(torch.nn.Module):
    size, dims, digest = 8, 4, "pooled-4"
    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.std((1, 2, 3), keepdim=True)[..., 0, 0]], 1)
"""


def test_scores_in_features_of_ones_own(photos, tmp_path, capsys):
    """In log, files and report by their digest; made anew where the file's text is another, not where it moved."""
    own = tmp_path / "pooled.py"
    own.write_text(OWN_FEATURES)
    scored = ["--fid-every", "1", "--fid-samples", "20", "--fid-features", own]
    train("--groups", "2", *TINY, "--data", photos, *scored, "--steps", "1", "--out", tmp_path / "run")
    assert "FD (pooled-4) at step 1: G1 " in capsys.readouterr().out
    line, = okd_train.score_lines(tmp_path / "run")
    G = okd_train.load_generator(tmp_path / "run/G2.pt")
    fakes = okd_train.generate(G, okd_train.draw(0, 0, 0, "fid", "normal", (50, 8)))[:20]
    real, _, _ = okd_train.load_folder(photos, 32, False, False, print)
    features = [fid.features(x, features=own, device="cpu") for x in (real, fakes)]
    assert line["score"] == "FD (pooled-4)" and line["G2"] == pytest.approx(fid.frechet_distance(*features), rel=1e-4)
    sheet, rows, name = report.closest(report.Run(tmp_path / "run", "cpu"))
    words = report.scores(report.Run(tmp_path / "run", "cpu"))
    assert name == "pooled-4" and len(rows) == 3 and "FD (pooled-4) at 1 steps" in words and "Inception" not in words
    s, script, _ = okd_train.read_run(tmp_path / "run")
    s.fid_samples = 31                                              # another number of fakes has another floor
    data = okd_train.Data(*okd_train.load_data(s, False, print), s, torch.device("cpu"))
    scored, floor = okd_train.Scores(s, data, torch.device("cpu")).real(tmp_path / "run")
    assert floor == pytest.approx(fid.floor(scored, 31)) != (line["floor"], line["floor_spread"])
    cached = np.load(tmp_path / "run/real_features.npz")["features"]
    own.write_text(OWN_FEATURES.replace("x.mean((2, 3))", "2 * x.mean((2, 3))"))
    report.closest(report.Run(tmp_path / "run", "cpu"))
    assert not np.array_equal(cached, np.load(tmp_path / "run/real_features.npz")["features"])
    for text, words in (("import nothing_there", "nothing_there"), (OWN_FEATURES.replace("8, 4,", "8, 5,"), "(2, 5)")):
        (tmp_path / f"bad{len(text)}.py").write_text(text)
        said = refused(capsys, "--groups", "1", *TINY, "--data", photos, "--fid-every", "1", "--fid-features",
                       tmp_path / f"bad{len(text)}.py", "--out", tmp_path / "none")
        assert words in said and "random" not in said and not (tmp_path / "none").exists()


def test_labels_are_judged_where_that_can_be(photos, tmp_path, monkeypatch):
    """By held-out images whose classes are those of the training; not without labels.py, nor by too few images."""
    setting = okd_train.parse(["--model", "acgan", "--groups", "1", *TINY, "--data", str(photos), "--fid-every", "1",
                               "--fid-features", "random", "--fid-samples", "8"])[0]
    images, y, classes = okd_train.load_folder(photos, 32, True, False, print)

    def judged(fid_data=None, n=24, names=classes):
        setting.fid_data, setting.n_classes = fid_data and str(fid_data), 2
        data = okd_train.Data(images[:n], y[:n], names, setting, torch.device("cpu"))
        scores = okd_train.Scores(setting, data, torch.device("cpu"))
        return scores.labels_hold(np.eye(24)[:, :20], {1: np.eye(8, 20), 2: np.eye(8, 20)})
    found = judged()["labels"]
    assert found.keys() == {"G1", "G2", "reals", "chance"} and found["G1"] == found["G2"]
    assert judged(names=[]) == {} and judged(n=16) == {}            # four of the second class
    assert judged(photos).keys() == {"labels"} and judged(photos / "Crack") == {}
    for name in classes:
        (tmp_path / name).symlink_to(photos / name)
    (tmp_path / "more.png").symlink_to(photos / "Crack" / "00.png")
    assert judged(tmp_path) == {}
    (tmp_path / "more.png").unlink()
    assert judged(tmp_path).keys() == {"labels"}
    there = okd_train.beside
    def beside(name, what="this"):
        return there("labels_gone" if name == "labels" else name, what)
    monkeypatch.setattr(okd_train, "beside", beside)
    assert judged() == {}


def test_missing_weights_are_found_before_training(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FID_WEIGHTS", str(tmp_path / "none.pth"))
    argv = ["--data", photos, *TINY, "--groups", "1", "--fid-every", "5", "--out", tmp_path / "run"]
    text = refused(capsys, *argv)
    assert "none.pth" in text and "--fid-features random" in text and not (tmp_path / "run").exists()
    text = refused(capsys, *argv, "--fid-features", "random", "--fid-data", tmp_path / "x")
    assert "no such folder" in text


def test_scores_against_held_out_images_with_inception(photos, shared, tmp_path):
    weights = tmp_path / "weights.pth"
    run(weights, script=shared / "fixtures" / "fid" / "make_inception_weights.py")
    scored = ["--fid-data", photos / "Crack", "--fid-samples", "6", "--fid-every", "1"]
    argv = ["--groups", "2", *TINY, "--data", photos, *scored, "--steps", "1", "--nproc", "1"]
    p = run(*argv, "--out", tmp_path / "run", env=dict(ENV, FID_WEIGHTS=str(weights)))
    line, = okd_train.score_lines(tmp_path / "run")
    assert line["score"] == "FID" and line["reals"] == 12 and line["samples"] == 6 and line["G1"] != line["G2"]
    assert "FID at step 1" in p.stdout


# ---------------------------------------------------------------------------------------------- data
def test_every_kind_of_image_becomes_rgb_of_the_asked_size(tmp_path):
    ramp = np.linspace(0, 255, 40 * 40).reshape(40, 40).astype(np.uint8)
    rgb = Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], 2))
    Image.fromarray(ramp).save(tmp_path / "grey.PNG")
    rgb.quantize(64).save(tmp_path / "palette.png")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    rgb.resize((80, 40)).save(tmp_path / "wide.bmp")
    said = []
    images, labels, classes = okd_train.load_folder(tmp_path, 20, False, False, said.append)
    assert images.shape == (6, 3, 20, 20) and images.dtype == torch.uint8 and classes == []
    assert labels.tolist() == [0] * 6
    assert len(said) == 2 and "6 of 6 images" in said[0]
    assert said[1] == f"{tmp_path}: 1 images have 16 bits or floats: 0 is read as black, 65535 as white " \
                      "(other programs clip them)."
    by_name = dict(zip(sorted(p.name for p in tmp_path.iterdir()), images))
    assert torch.equal(by_name["deep.png"], by_name["grey.PNG"])    # scaled, not clipped
    assert abs(by_name["alpha.png"].int() - by_name["palette.png"].int()).float().mean() < 8
    small = np.asarray(rgb.crop((0, 0, 40, 40)).resize((20, 20), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(by_name["alpha.png"].numpy(), small)


def test_images_of_the_right_size_are_taken_as_they_are_and_classes_are_sorted(photos):
    said = []
    images, labels, classes = okd_train.load_folder(photos, 32, True, False, said.append)
    assert classes == ["Crack", "Spallation"] and labels.tolist() == [0] * 12 + [1] * 12 and said == []
    assert np.array_equal(images[13].numpy(),
                          np.asarray(Image.open(photos / "Spallation" / "01.png")).transpose(2, 0, 1))


def test_links_hidden_files_and_loops(photos, tmp_path):
    (tmp_path / "a").symlink_to(photos / "Crack")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "up").symlink_to(tmp_path)                    # a loop
    (tmp_path / "b" / "._x.png").write_bytes(b"resource fork")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "y.png").write_bytes(b"")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    assert len(fid.class_images(tmp_path)) == 12
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(okd_train.UserError, match="gone.png"):
        okd_train.load_folder(tmp_path, 8, False, False, print)


# ---------------------------------------------------------------------------------------------- bad input
def broken_photos(photos, folder):
    shutil.copytree(photos, folder)
    (folder / "Crack" / "cut.png").write_bytes((photos / "Crack" / "00.png").read_bytes()[:300])
    (folder / "Spallation" / "text.jpg").write_text("not an image")
    return folder


def test_bad_images_are_all_named_or_skipped(photos, tmp_path, capsys):
    folder = broken_photos(photos, tmp_path / "photos")
    text = refused(capsys, "--data", folder, *TINY, "--out", tmp_path / "run")
    assert "2 of 26 images" in text and "cut.png" in text and "text.jpg" in text and "--skip-bad" in text
    train("--data", folder, *TINY, "--groups", "1", "--steps", "1", "--skip-bad", "--out", tmp_path / "run")
    text = capsys.readouterr().out
    assert "Skipped 2 unreadable images" in text and "24 images" in text


def test_runs_are_not_overwritten_and_resume_is_checked(photos, tmp_path, capsys):
    out = tmp_path / "run"
    base = ["--data", photos, *TINY, "--groups", "2", "--out", out]
    train(*base, "--steps", "2", "--rho", "0.25")
    capsys.readouterr()
    kept = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert "go on with --resume" in refused(capsys, *base)
    text = refused(capsys, *base, "--resume", "--rho", "0.5", "--seed", "3", "--steps", "4")
    assert "--rho is 0.25 there and 0.5 here" in text and "--seed is 0 there and 3 here" in text and "steps" not in text
    assert "was trained with sagan" in refused(capsys, "--model", "acgan", "--out", out, "--resume")
    (tmp_path / "other").mkdir()
    for k in range(9):
        Image.new("RGB", (32, 32), (k, k, k)).save(tmp_path / "other" / f"{k}.png")
    (tmp_path / "moved").symlink_to(photos)
    train("--data", tmp_path / "moved", "--out", out, "--resume")   # the same folder by another name
    assert "Nothing to do" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == kept
    (photos / "Crack" / "more.png").write_bytes((photos / "Crack" / "00.png").read_bytes())
    try:
        assert "are not those" in refused(capsys, *base, "--resume", "--steps", "4")
    finally:
        (photos / "Crack" / "more.png").unlink()
    for content, complaint in ((kept["checkpoint.pt"][:5000], "cut short"), (b"", "cut short"), (b"hello", "cut short"),
                               (kept["G1.pt"], "is not a checkpoint of okd_train.py")):
        (out / "checkpoint.pt").write_bytes(content)
        assert complaint in refused(capsys, *base, "--resume", "--steps", "4")
    (out / "checkpoint.pt").unlink()
    assert "no checkpoint" in refused(capsys, *base, "--resume", "--steps", "4")
    assert "delete it" in refused(capsys, *base)
    (out / "args.json").write_text("{")
    assert "cannot be read" in refused(capsys, "--out", out, "--resume")


def test_a_hostile_checkpoint_executes_nothing(photos, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)
    out = tmp_path / "run"
    base = ["--data", photos, *TINY, "--groups", "1", "--out", out]
    train(*base, "--steps", "1")
    torch.save({"format": okd_train.FORMAT, "x": Bomb()}, out / "checkpoint.pt")
    torch.save(Bomb(), out / "G1.pt")
    capsys.readouterr()
    refused(capsys, *base, "--resume", "--steps", "3")
    with pytest.raises(okd_train.UserError, match="cut short"):
        okd_train.load_generator(out / "G1.pt")
    assert not (tmp_path / "boom").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    with pytest.raises(okd_train.UserError, match="cannot write"):
        with okd_train.replacing(path) as f:
            f.write(b"new, but")
            raise OSError("No space left on device")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_help_names_the_flags_of_the_script(capsys):
    with pytest.raises(SystemExit) as e:
        okd_train.main(["--model", "acgan", "--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and "--c-aux" in text and "--groups" in text and "--spectral-norm" not in text


def test_notes_on_settings_without_effect(photos, tmp_path, capsys):
    common = ["--data", photos, *TINY, "--steps", "1"]
    train(*common, "--groups", "1", "--rho", "0.3", "--out", tmp_path / "a")
    assert "--rho without effect" in capsys.readouterr().out
    train(*common, "--groups", "2", "--rho", "1.5", "--fid-samples", "9", "--out", tmp_path / "b")
    train(*TINY, "--steps", "1", "--groups", "1", "--upright", "--out", tmp_path / "c")
    text = capsys.readouterr().out
    assert "--upright without effect, no --data was given" in text
    assert "copy its neighbour" in text and "--fid-samples without effect" in text
    assert "--rho without effect" not in text


# ---------------------------------------------------------------------------------------------- copied alone
DECOY = "raise SystemExit('a decoy was imported')"


@pytest.fixture
def copied(root, tmp_path):
    """A folder with okd_train.py and the README's my_gan.py, and beside it one with a user's own fid and kernels."""
    gan, = (block for block in re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S)
            if block.startswith("# my_gan.py"))
    folder, decoys = tmp_path / "copied", tmp_path / "decoys"
    folder.mkdir()
    shutil.copy(root / "okd_train.py", folder)
    (folder / "my_gan.py").write_text(gan)
    (decoys / "kernels").mkdir(parents=True)
    for name in ("fid.py", "synthetic.py", "crop_codebrim.py", "kernels/__init__.py", "kernels/convolution.py"):
        (decoys / name).write_text(DECOY)
    return folder


def together(folder, *commands, **env):
    """Copies of okd_train.py as a user starts them in `folder`, side by side -> [(exit status, stdout, stderr)]."""
    env = dict(ENV, PYTHONPATH=str(folder.parent / "decoys"), **env)
    started = [subprocess.Popen([sys.executable, "okd_train.py", *map(str, argv)], cwd=folder, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for argv in commands]
    said = [p.communicate(timeout=120) for p in started]
    return [(p.returncode, *streams) for p, streams in zip(started, said)]


SMALL = ["--model", "my_gan.py", "--groups", "2", "--width", "4", "--batch-size", "4", "--nproc", "1"]


def test_copied_alone_it_says_what_it_needs(copied, photos):
    asked, no_data, data = together(copied, ["--help", "--model", "my_gan.py"], SMALL, [*SMALL, "--data", photos])
    assert asked[0] == 0 and asked[2] == "" and "--groups" in asked[1] and "--smooth FLOAT" in asked[1]
    for found, needs in ((no_data, "training without --data needs synthetic.py"),
                         (data, "reading images needs fid.py")):
        line = f"okd_train.py: error: {needs} beside okd_train.py; it is not in {copied}\n"
        assert found == (2, "", line)
    shutil.copy(okd_train.__file__.replace("okd_train.py", "synthetic.py"), copied)
    (status, _, line), = together(copied, SMALL)
    (copied / "synthetic.py").unlink()
    assert status == 2 and line.count("\n") == 1
    assert line.startswith("okd_train.py: error: rendering needs crop_codebrim.py")
    assert not (copied / "runs").exists()


def near(a, b, start):
    """Whether two checkpoints moved alike from where they began: Adam makes a step of the sign of a rounding, too."""
    kinds = [(i, role) for i, group in enumerate(start["groups"]) for role in group if role != "ema"]
    for i, role in kinds:
        x, y, z = (torch.cat([v.flatten().double() for v in state["groups"][i][role]["net"].values()])
                   for state in (a, b, start))
        assert (x - z).norm() > 0 and (x - y).norm() <= 1e-3 * (x - z).norm(), (i, role, (x - y).norm(), (x - z).norm())


@pytest.mark.parametrize("kernels", [False, True])
def test_copied_with_fid_it_trains_and_scores(kernels, copied, root, photos, tmp_path):
    """With and without kernels/ to the same result; a user's own modules of these names do not get in the way.

    PYTHONSAFEPATH: the folder of the script is not on the path, so the user's own come first.
    """
    shutil.copy(root / "fid.py", copied)
    shutil.copy(root / "sagan.py", copied)
    if kernels:
        shutil.copytree(root / "kernels", copied / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    scored = ["--fid-every", "2", "--fid-features", "random", "--fid-samples", "8"]
    common = ["--data", photos, "--seed", "3", "--steps", "4", "--log-every", "2"]
    jobs = {"my_gan": [*SMALL, *scored, *common], "sagan": ["--groups", "2", *TINY, *common]}
    commands = [[*argv, "--out", copied / name] for name, argv in jobs.items()]
    for status, text, errors in together(copied, *commands, **({"PYTHONSAFEPATH": "1"} if kernels else {})):
        assert status == 0 and errors == "" and "Done: 4 steps" in text, errors
    assert [line["step"] for line in okd_train.score_lines(copied / "my_gan", 2)] == [2, 4]
    for name, argv in jobs.items():
        argv = [str(copied / "my_gan.py") if x == "my_gan.py" else x for x in argv]
        train(*argv, "--out", tmp_path / name)
        ours, theirs = checkpoint(tmp_path / name), checkpoint(copied / name)
        if kernels:
            assert_same(ours, theirs)
        else:
            near(ours, theirs, setup(*map(str, argv)).state())
            assert [x["step"] for x in logs(copied / name)] == [2, 4]
