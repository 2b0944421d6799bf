"""kernels/convolution.py: torch's values and derivatives, by the kernels that it is there for; it works alone."""
import copy
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import okd_train
import sagan
from kernels.convolution import conv2d, fast_second_derivative
from test_sagan import ROOT, python

SHAPES = [  # Cin, Cout, size, kernel, stride, padding, dilation, groups
    (3, 4, (8, 8), 4, 2, 1, 1, 1), (4, 2, (7, 9), 3, 1, 1, 1, 2), (2, 3, (9, 8), 3, 2, 0, 1, 1),
    (4, 4, (9, 9), 3, 2, 2, 2, 4), (2, 5, (4, 4), 4, 1, 0, 1, 1), (3, 2, (5, 6), 1, 1, 0, 1, 1)]


@pytest.mark.parametrize("cin, cout, size, k, stride, padding, dilation, groups", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_derivatives_in_float64(cin, cout, size, k, stride, padding, dilation, groups, bias, device):
    torch.manual_seed(0)
    kind = dict(dtype=torch.float64, device=device, requires_grad=True)
    x, w = torch.randn(2, cin, *size, **kind), torch.randn(cout, cin // groups, k, k, **kind)
    b = torch.randn(cout, **kind) if bias else None
    how = [(n, n) for n in (stride, padding, dilation)]

    def derivatives(conv):
        """Of a function that is curved in everything: value, first and second derivatives, all of them."""
        y = conv(x, w, b, *how, groups)
        leaves = [t for t in (x, w, b) if t is not None]
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum((g * g.cos()).sum() for g in first), leaves, allow_unused=True)]
    for ours, theirs in zip(derivatives(conv2d), derivatives(F.conv2d)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    double = lambda *a: conv2d(*a, None if b is None else b.detach(), *how, groups)
    assert torch.autograd.gradgradcheck(double, (x, w), nondet_tol=1e-12 if device == "cuda" else 0.0)


class Count(TorchDispatchMode):
    """Counts convolutions, each requested gradient of one apart."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        if name == "convolution":
            self.seen.append(("transposed" if args[6] else "forward", tuple(args[1].shape[2:])))
        if name == "convolution_backward":
            self.seen += [(what, tuple(args[2].shape[2:])) for what, on in zip(("dx", "dw"), args[10]) if on]
        return f(*args, **(kwargs or {}))


def test_the_penalty_uses_weight_gradients_and_no_convolution_with_filters_of_image_size():
    def run(net):
        a, b = torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)
        with Count() as count:
            penalty, _ = sagan.gradient_penalty(net, a, b, torch.rand(2, 1, 1, 1))
            penalty.backward(inputs=list(net.parameters()))
        return count.seen
    D = sagan.Discriminator(image_size=32, ch=4, spectral_norm="none")
    seen, usual = run(fast_second_derivative(copy.deepcopy(D))), run(D)
    assert max(k for _, k in seen) == (4, 4) and max(k for _, k in usual) > (4, 4)
    weights, usual_weights = ([what for what, _ in each].count("dw") for each in (seen, usual))
    assert len(seen) <= len(usual) and weights > usual_weights


@pytest.mark.parametrize("wanted", ["x", "w"])
def test_only_what_is_asked_for_is_computed(wanted):
    x, w = torch.randn(1, 2, 6, 6, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    for create in (False, True):
        y = conv2d(x, w).sum()
        with Count() as count:
            torch.autograd.grad(y, x if wanted == "x" else w, create_graph=create)
        assert [what for what, _ in count.seen] == [("transposed" if create else "dx") if wanted == "x" else "dw"]


def test_first_derivatives_are_torchs_bit_for_bit():
    torch.manual_seed(1)
    D = sagan.Discriminator(image_size=32, ch=8)
    ours, x, results = fast_second_derivative(copy.deepcopy(D)), torch.randn(4, 3, 32, 32), []
    for net in (D, ours):
        score = net(x).square().sum()
        results.append([score, *torch.autograd.grad(score, list(net.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results)) and ours.state_dict().keys() == D.state_dict().keys()


def test_a_leaky_relu_makes_no_zeros_in_a_penalty_and_the_same_bits():
    class Zeros(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            self.made += f.overloadpacket.__name__ == "zeros_like"
            return f(*args, **(kwargs or {}))

    def run(net):
        with Zeros() as zeros:
            sagan.gradient_penalty(net, a, b, eps)[0].backward()
        return zeros.made, [p.grad for p in net.parameters()]
    torch.manual_seed(2)
    a, b, eps = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.rand(2, 1, 1, 1)
    D = fast_second_derivative(sagan.Discriminator(image_size=32, ch=4, spectral_norm="none"))
    for m in D.modules():
        if isinstance(m, sagan.SelfAttention):
            nn.init.ones_(m.gamma)      # is curved: gradients come down from it
    usual = copy.deepcopy(D)
    for m in usual.modules():
        if isinstance(m, nn.LeakyReLU):
            del m.forward
    (made, grads), (made_usual, grads_usual) = run(D), run(usual)
    assert made == 0 and made_usual == sum(isinstance(m, nn.LeakyReLU) for m in D.modules()) > 0
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(grads, grads_usual, strict=True))
    x = torch.tensor([float("nan"), -float("inf"), -2, -0.0, 0.0, 3, float("inf")])
    torch.testing.assert_close(D.net[1](x), nn.LeakyReLU(0.1)(x), rtol=0, atol=0, equal_nan=True)


def test_what_is_replaced_and_what_is_left_alone():
    class Own(nn.Conv2d):
        def _conv_forward(self, x, w, b):
            return super()._conv_forward(x, 2 * w, b)
    net = fast_second_derivative(nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), Own(2, 2, 1)))
    assert ["_conv_forward" in vars(m) for m in net] == [True, False, False, False]
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    assert type(net[0](x).grad_fn).__name__ == "_Conv2dBackward"
    with torch.no_grad():
        assert net[0](x).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        assert net[0](x).dtype == torch.bfloat16
    leaky, own = fast_second_derivative(nn.Sequential(nn.LeakyReLU(), type("Own", (nn.LeakyReLU,), {})()))
    assert "forward" in vars(leaky) and "forward" not in vars(own)
    leaky.inplace, y = True, torch.tensor([-1.0, 1.0])              # after it was prepared
    assert leaky(y) is y and y[0] == -leaky.negative_slope


def layers(prepared, **kind):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, **kind), nn.LeakyReLU(0.1), nn.Conv2d(4, 2, 3, **kind))
    return fast_second_derivative(net) if prepared else net


def forward_mode(net, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(x, x.cos()))).tangent


def integer_stride(net, x):
    net[0].stride = 2
    return torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])


def backward_under_autocast(net, x):
    y = net(x).square().sum()
    with torch.autocast("cpu"):
        return torch.autograd.grad(y, x, create_graph=True)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("use", [
    lambda net, x: torch.autograd.grad(net(x[0]).square().sum(), [x, *net.parameters()], create_graph=True),
    lambda net, x: torch.func.vmap(lambda one: net(one[None])[0])(x),
    lambda net, x: torch.func.vmap(torch.func.grad(lambda one: net(one[None]).square().sum()))(x),
    lambda net, x: torch.jit.trace(net, x)(x),
    lambda net, x: torch.compile(net, backend="eager", fullgraph=True)(x),
    lambda net, x: torch.zeros(net.to("meta")(x.to("meta")).shape),
    forward_mode, integer_stride, backward_under_autocast])
def test_what_a_plain_layer_can_a_prepared_one_can(use):
    results = []
    for prepared in (False, True):
        torch.manual_seed(4)
        results.append(use(layers(prepared), torch.randn(2, 2, 11, 11, requires_grad=True)))
    torch.testing.assert_close(*results)


def test_complex_numbers_have_torchs_gradient():
    results = []
    for prepared in (False, True):
        net = layers(prepared, dtype=torch.complex64)[0]
        x = torch.linspace(-1, 1, 50, dtype=torch.complex64).view(1, 2, 5, 5).requires_grad_()
        results.append([torch.autograd.grad(net(x).abs().sum(), x, create_graph=on)[0] for on in (False, True)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cin, cout, batch", [(1, 8, 3), (4, 1, 3), (4, 8, 1)])
def test_dimensions_of_size_one_keep_the_memory_layout_and_torchs_bits(cin, cout, batch):
    results = []
    for prepared in (False, True):
        torch.manual_seed(5)
        net = nn.Conv2d(cin, cout, 3, padding=1).to(memory_format=torch.channels_last)
        net = fast_second_derivative(net) if prepared else net
        x = torch.randn(batch, cin, 6, 7).to(memory_format=torch.channels_last).requires_grad_()
        y = net(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, net.weight, net.bias])])
    for plain, ours in zip(*results):
        assert torch.equal(plain, ours) and plain.stride() == ours.stride()
    net.double()(x.detach().double().requires_grad_()).sum().backward()


def test_a_prepared_network_can_be_copied_pickled_and_changed():
    net = fast_second_derivative(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3)))
    x, (other, loaded) = torch.randn(1, 2, 6, 6), (copy.deepcopy(net), pickle.loads(pickle.dumps(net)))
    for twin in (other, loaded):
        assert torch.equal(twin(x), net(x)) and type(twin[0](x).grad_fn).__name__ == "_Conv2dBackward"
        nn.init.zeros_(twin[0].weight)
        twin[0].stride, twin[1].padding_mode, twin[1].padding = (2, 2), "circular", (1, 1)
        twin[1]._reversed_padding_repeated_twice = [1, 1, 1, 1]
        plain = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
        plain.load_state_dict(twin[1].state_dict())
        assert twin(x).shape == (1, 2, 3, 3) and torch.equal(twin[1](x), plain(x))
    assert net[0].weight.any() and net(x).shape == (1, 2, 4, 4)
    net[0].padding = "same"                                         # a word, after it was prepared
    assert net(x).shape == (1, 2, 4, 4)


def trainer(*argv):
    """A small one on 20 random images; argv: words of the command line."""
    tiny = ["--image-size", "32", "--ch", "4", "--batch-size", "4", "--z-dim", "8"]
    s, script, named = okd_train.parse([*argv, *tiny])
    okd_train.settle(s, script, named)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = okd_train.Data(images, torch.zeros(20, dtype=torch.long), [], s, torch.device("cpu"))
    return okd_train.Trainer(script, s, data, torch.device("cpu"))


def test_the_trainer_uses_it_in_critics_and_only_rounding_differs(monkeypatch):
    kernel, fast = okd_train.kernel, trainer("--groups", "2")
    assert all("_conv_forward" in vars(fast.groups[0].nets[r].net.net[0]) for r in "DC")
    monkeypatch.setattr(okd_train, "kernel", lambda name: None if name == "convolution" else kernel(name))
    slow = trainer("--groups", "2")
    assert not any("_conv_forward" in vars(slow.groups[0].nets[r].net.net[0]) for r in "DC")
    a, b = fast.step(), slow.step()
    for i in (1, 2):
        for role in "dcg":
            torch.testing.assert_close(a[i][role][0], b[i][role][0], rtol=1e-4, atol=1e-5)
    adams = [t.groups[0].nets["D"].opt.state.values() for t in (fast, slow)]
    for m, n in zip(*adams, strict=True):
        torch.testing.assert_close(m["exp_avg"], n["exp_avg"], rtol=1e-3, atol=1e-5)


def test_copied_alone(tmp_path):
    """In an empty folder, on a network of one's own."""
    shutil.copy(ROOT / "kernels" / "convolution.py", tmp_path)
    out = python(tmp_path, "-c", """
import copy, torch
from convolution import fast_second_derivative
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, 2, 1), torch.nn.Tanh(), torch.nn.Conv2d(4, 1, 4)).double()
x, found = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True), []
for D in (fast_second_derivative(copy.deepcopy(net)), net):
    slope, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    found.append([slope, *torch.autograd.grad(slope.square().sum(), list(D.parameters()), allow_unused=True)])
torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
assert "Conv2dBackward" in type(fast_second_derivative(net)[0](x).grad_fn).__name__
""")
    assert out.returncode == 0, out.stderr
