"""kernels/spectral_norm.py: torch's spectral norms, all layers of a network at once; it works alone."""
import contextlib
import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

import okd_train
import sagan
from kernels.spectral_norm import SpectralNorms
from test_convolution import trainer
from test_sagan import ROOT, python

pytestmark = pytest.mark.usefixtures("one_thread")


class Odd(nn.Module):
    """Normed layers of every kind and shape; the last two are none for SpectralNorms."""

    def __init__(self):
        super().__init__()
        self.a = spectral_norm(nn.Conv2d(3, 5, 4, 2, 1), eps=1e-10)
        self.b = spectral_norm(nn.ConvTranspose2d(5, 4, 3))
        self.c = spectral_norm(nn.Linear(4, 2), dim=1)
        self.d = spectral_norm(nn.Conv2d(2, 2, 1))
        self.e = spectral_norm(nn.Linear(2, 3), n_power_iterations=2)
        self.f = spectral_norm(nn.LayerNorm(3))                     # a vector: torch divides it by its length

    def forward(self, x):
        x = self.c(self.b(torch.tanh(self.a(x))).mean((2, 3)))
        return self.f(self.e(torch.tanh(self.d(x[:, :, None, None])).flatten(1)))


def odd(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Odd().to(dtype)


def assert_same(a, b):
    assert a.keys() == b.keys() and len(a) > 3
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def vectors(net):
    return {k: v.clone() for k, v in net.named_buffers() if k.endswith(("_u", "_v"))}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_those_of_torch(device, layout, training):
    a = odd().to(device, memory_format=layout).train(training)
    b, norms = copy.deepcopy(a), SpectralNorms(a)
    assert len(norms.norms) == 4
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device)
    for step in range(4):
        before = vectors(a)
        with norms():
            (a(x) * a(x + 1)).sum().backward()
        with parametrize.cached():
            (b(x) * b(x + 1)).sum().backward()
        for net in (a, b):
            for p in net.parameters():
                p.data -= 0.1 * p.grad
                assert p.grad.stride() == p.stride() or device == "cuda"        # cuDNN lays a gradient out as it likes
        u = "a.parametrizations.weight.0._u"
        assert (vectors(a)[u] - before[u]).abs().max() > 1e-4 or not training
        for (k, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12, msg=lambda text: f"step {step}, {k}: {text}")
        for p, q in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-12)
    assert torch.equal(a(x), copy.deepcopy(a)(x)) or training       # outside, torch's own code


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_with_respect_to_weights(training):
    """A penalty on the gradient of the weights themselves: sigma then moves with W a second time."""
    nets = [net := odd().train(training), copy.deepcopy(net)]
    x, found = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
    for net, context in zip(nets, (SpectralNorms(nets[0]), parametrize.cached)):
        weights = [m.original for m in net.modules() if isinstance(m, parametrize.ParametrizationList)]
        weights[1].requires_grad_(False)
        wanted = [w for w in weights if w.requires_grad]
        with context():
            first = torch.autograd.grad(net(x).sin().sum(), wanted, create_graph=True)
            found.append(first + torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_parameters_hook_runs_once():
    net = odd()
    seen = []
    net.d.parametrizations.weight.original.register_hook(seen.append)
    with SpectralNorms(net)():
        torch.autograd.grad(net(torch.randn(2, 3, 8, 8).double()).sum(), net.d.parametrizations.weight.original,
                            create_graph=True)
    assert len(seen) == 1


def test_a_first_look_without_gradients_takes_none_from_a_later_one():
    net, x = odd(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with SpectralNorms(net)():
        with torch.no_grad():
            net(x)
        net(x).square().sum().backward()
    assert all(m.parametrizations.weight.original.grad is not None for m in (net.a, net.b, net.c, net.d))


def test_largest_singular_values_become_one():
    net = odd()
    norms = SpectralNorms(net)
    for _ in range(200):
        with norms():
            weights = [net.a.weight, net.b.weight.transpose(0, 1), net.c.weight, net.d.weight]
    for w in weights:
        assert torch.linalg.matrix_norm(w.flatten(1), 2).item() == pytest.approx(1, rel=1e-9)


def test_one_power_iteration_per_context_and_only_where_one_is_asked_for():
    net = odd(torch.float32)
    norms, start = SpectralNorms(net), vectors(net)
    with norms():
        pass
    assert_same(start, vectors(net))                                # nobody asked for a weight
    with norms():
        w = net.a.weight
        moved = vectors(net)
        assert all(torch.equal(moved[k], start[k]) == k.startswith("e") for k in start)
        with norms():                                               # as inside `frozen`
            assert net.a.weight is w
        assert net.a.weight is w and net.b.weight is net.b.weight
        assert_same(moved, vectors(net))
    assert not any("forward" in vars(m) for m in norms.norms) and norms.made is None
    net.eval()
    with norms():
        assert not torch.equal(net.a.weight, w)                     # u and v moved, so sigma did
        torch.testing.assert_close(net.a.weight, w, rtol=0.2, atol=0)
    assert_same(moved, vectors(net))
    net.b.parametrizations.weight[0].train()                        # one layer alone
    with norms():
        net.a.weight, net.b.weight
    assert {k[0] for k in moved if not torch.equal(moved[k], vectors(net)[k])} == {"b"}


def test_two_objects_for_layers_of_one_network_may_overlap():
    """The weights of the first that is entered hold, with one power iteration; leaving is possible in any order."""
    for order in ("whole again part", "part whole"):
        net, twin = odd(), odd()
        whole, again, part = SpectralNorms(net), SpectralNorms(net), SpectralNorms(nn.ModuleList([net.a, net.b]))
        contexts = [{"whole": whole, "again": again, "part": part}[name] for name in order.split()]
        with SpectralNorms(twin)():
            want = [m.weight for m in (twin.a, twin.b, twin.c)]
        with contextlib.ExitStack() as stack:
            for norms in contexts:
                stack.enter_context(norms())
            for m, w in zip((net.a, net.b, net.c), want):
                torch.testing.assert_close(m.weight, w, rtol=1e-12, atol=0)     # sums over tables of another width
        for k, v in vectors(twin).items():
            torch.testing.assert_close(vectors(net)[k], v, rtol=1e-12, atol=0)
        assert not any("forward" in vars(m) for m in whole.norms)
    first, second = whole(), again()
    first.__enter__(), second.__enter__(), net.a.weight
    first.__exit__(None, None, None), second.__exit__(None, None, None)
    assert not any("forward" in vars(m) for m in whole.norms) and whole.made is again.made is None


def test_an_error_inside_leaves_torchs_own_code_in_place():
    net = odd()
    norms = SpectralNorms(net)
    with pytest.raises(KeyError):
        with norms():
            net.a.weight
            raise KeyError
    assert not any("forward" in vars(m) for m in norms.norms) and norms.made is None
    with norms():
        net.a.weight


def test_a_weight_of_zeros_and_a_network_without_norms():
    nets = [odd(torch.float32) for _ in range(2)]
    for net, context in zip(nets, (SpectralNorms(nets[0]), parametrize.cached)):
        nn.init.zeros_(net.a.parametrizations.weight.original)
        with context():
            assert net.a.weight.isnan().all()                       # 0 / 0
            assert all(m.weight.isfinite().all() for m in (net.b, net.c, net.d))
    for k, v in vectors(nets[0]).items():
        torch.testing.assert_close(v, vectors(nets[1])[k])
    plain = nn.Linear(2, 2)
    with SpectralNorms(plain)():
        plain(torch.zeros(1, 2))


def test_a_networks_layers_of_another_dtype_are_left_to_torch():
    net = odd()
    net.d.half()
    assert len(SpectralNorms(net).norms) == 3


class Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in f._schema.returns)
        self.n += not view and not f.overloadpacket.__name__.startswith(("empty", "_unsafe_view"))
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen, ours_at_most, theirs_at_least", [(False, 38, 90), (True, 12, 20)])
def test_launches(frozen, ours_at_most, theirs_at_least):
    """Of the four layers of a critic: forward and backward while it learns, forward while it is frozen."""
    def launches(context):
        with Launches() as seen, context():
            normed = torch._foreach_mul([m.weight for m in layers], 1.0)        # one launch, and one for its derivative
            if not frozen:
                torch.autograd.backward(normed, ones)
        return seen.n - 1 - (not frozen)
    D = sagan.Discriminator().requires_grad_(not frozen)
    for m in D.modules():
        m.training = not frozen
    layers = [m for m in D.modules() if parametrize.is_parametrized(m)]
    ones = [torch.ones_like(m.weight) for m in layers]
    ours, theirs = launches(SpectralNorms(D)), launches(parametrize.cached)
    assert len(layers) == 4 and 8 < ours <= ours_at_most and theirs >= theirs_at_least, (ours, theirs)


@pytest.mark.parametrize("argv", [
    ["--groups", "2"], ["--groups", "1", "--n-critic", "2"], ["--groups", "2", "--rho", "0"]])
def test_a_step_of_the_trainer_has_the_same_gradients(argv, monkeypatch):
    """Within 1e-5 of each network's largest."""
    plain = trainer(*argv)
    monkeypatch.setattr(okd_train, "NORMS_TOGETHER", {"cpu"})
    together = trainer(*argv)
    for step in range(3):
        states = {k + 1: v for k, v in enumerate(copy.deepcopy(plain.state()["groups"]))}
        together.load_state(states, step)
        assert_same(vectors(plain.groups[0].nets["G"].net), vectors(together.groups[0].nets["G"].net))
        plain.step(), together.step()
        for g, h in zip(plain.groups, together.groups):
            assert g.nets.keys() == h.nets.keys()
            for role in g.nets:
                mine, its = g.nets[role], h.nets[role]
                a, b = (torch.cat([m["exp_avg"].flatten() for m in n.opt.state.values()]) for n in (mine, its))
                assert isinstance(its.normed, SpectralNorms) and not isinstance(mine.normed, SpectralNorms)
                assert (a - b).abs().max() <= 1e-5 * a.abs().max(), (step, role)            # the gradients: beta1 is 0
                for (k, u), v in zip(vectors(mine.net).items(), vectors(its.net).values(), strict=True):
                    said = lambda text: f"{step} {role} {k}: {text}"            # noqa: E731
                    torch.testing.assert_close(u, v, rtol=1e-4, atol=1e-5, msg=said)


def test_copied_alone(tmp_path):
    """In an empty folder, on a network of one's own."""
    shutil.copy(ROOT / "kernels" / "spectral_norm.py", tmp_path)
    out = python(tmp_path, "-c", """
import copy, torch
from spectral_norm import SpectralNorms
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
torch.manual_seed(0)
a = torch.nn.Sequential(*(spectral_norm(torch.nn.Linear(5, 5)) for _ in range(2))).double()
b, x = copy.deepcopy(a), torch.randn(3, 5, dtype=torch.float64)
for net, context in ((a, SpectralNorms(a)), (b, parametrize.cached)):
    with context():
        net(x).square().sum().backward()
torch.testing.assert_close([p.grad for p in a.parameters()], [p.grad for p in b.parameters()], rtol=1e-10, atol=1e-12)
torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-10, atol=1e-12)
""")
    assert out.returncode == 0, out.stderr
