"""kernels/cuda_graph.py: on a GPU by CUDA graphs, elsewhere by a recorder that freezes a step as a CUDA graph does.

Recorder notes every operation below autograd with the very tensors and numbers it was called with, and replays the list
in place. Whatever Python decided while recording stays decided, and every Python number stays what it was, so that a
step which would go stale in a CUDA graph goes stale here, too.
"""
import contextlib
import copy
import json
import subprocess
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import okd_train
from kernels import cuda_graph
from test_okd_train import ENV, OTHER, TINY, assert_same, checkpoint, differs, flat, refused, setup, train

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--recipe", "small", "--channels", "1", "--noise-from", "32"]

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def norms_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(okd_train, "NORMS_TOGETHER", {"cpu", "cuda"})


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        assert f is not torch.ops.aten._local_scalar_dense.default, "a captured step may not wait for a number"
        out = f(*args, **(kwargs or {}))
        self.calls.append((f, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for f, args, kwargs, out in self.calls:
            returns = f._schema.returns
            if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
                continue                                            # a view: it lies where it lay
            new = f(*args, **kwargs)
            for r, old, now in zip(returns, *((x,) if len(returns) < 2 else x for x in (out, new))):
                if r.alias_info is None:
                    for a, b in zip(old if isinstance(old, list) else [old], now if isinstance(now, list) else [now]):
                        if isinstance(a, torch.Tensor):
                            a.copy_(b)

    def pool(self):
        return None


def recording(trainers):
    """Stands for cuda_graph.record: nothing has moved after it, as after a capture."""
    def record(functions, pool, stream):
        kept = [(t, t.clone()) for trainer in trainers for t in trainer.moving()]
        with Recorder() as graph:
            for function in functions:
                function()
        for t, old in kept:
            t.data.copy_(old)       # unseen by autograd, which may be between two parts of a step
        return graph
    return record


@pytest.fixture
def recorded(monkeypatch):
    """A function like setup() whose trainer captures its step with the recorder."""
    trainers = []
    monkeypatch.setattr(cuda_graph, "record", recording(trainers))
    obstacle = okd_train.Trainer.obstacle
    monkeypatch.setattr(okd_train.Trainer, "obstacle", lambda t: but_for_the_cpu(obstacle(t)))

    def make(*argv):
        trainers.append(setup(*argv))
        return trainers[-1]
    return make


def but_for_the_cpu(why):
    return None if why == "the device is cpu" else why


def eager(*argv):
    return setup(*argv, "--cuda-graph", "off")


def values(out):
    return {f"{i}{role}{k}": v.clone() for i, losses in out.items() for role, (value, logs) in losses.items()
            for k, v in {"loss": value, **logs}.items()}


def run_both(a, b, steps):
    for _ in range(steps):
        assert_same(values(a.step()), values(b.step()))
    assert_same(a.state(), b.state())


@pytest.mark.parametrize("argv", [
    ["--groups", "3"], ["--groups", "1", "--n-critic", "2"], ["--groups", "2", "--n-critic", "2", "--flip"],
    ["--model", "acgan", "--groups", "2", "--flip"], ["--model", "acgan", "--groups", "2", "--loss", "wgan-gp"],
    ["--groups", "2", "--loss", "hinge", "--rho", "0"],
    ["--groups", "2", *SMALL], ["--model", "acgan", "--groups", "2", *SMALL]])
def test_twenty_steps_are_those_of_the_eager_loop(argv, recorded):
    a, b = recorded(*argv, *TINY), eager(*argv, *TINY)
    run_both(a, b, 20)
    assert a.graph_note == "Steps run as 1 CUDA graph, found equal to an eager step."
    assert len(a.graph.graphs) == 1 and len(a.graph.graphs[0].calls) > 100
    assert b.graph is None and b.graph_note is None


def test_nothing_of_a_step_is_baked_in(recorded):
    a, b, plain = recorded("--groups", "2", *TINY), eager("--groups", "2", *TINY), eager("--groups", "2", *TINY)
    run_both(a, b, 6)
    for t in (a, b):
        t.s.rho = 0.1
    run_both(a, b, 2)
    for t in (a, b):
        t.s.g_lr, t.s.d_lr, t.s.c_lr = 3e-3, 2e-3, 1e-3
    run_both(a, b, 2)
    for t in (a, b):
        t.data.images.copy_(255 - t.data.images)
    run_both(a, b, 2)
    for _ in range(12):
        plain.step()
    assert differs(a.state(), plain.state())
    graphs = a.graph.graphs
    for t in (a, b):
        t.s.rho = 0.0       # other kernels: the connector is not asked any more
    run_both(a, b, 2)
    assert a.graph.graphs and a.graph.graphs is not graphs
    for t in (a, b):
        t.s.rho = 0.5
    run_both(a, b, 2)


def test_the_recorder_would_show_a_number_that_is_baked_in(recorded, monkeypatch):
    learn = okd_train.Trainer.learn_generator

    def with_a_number(t, g, sub):
        place, t.given.plan[0]["rho"] = t.given.plan[0]["rho"], t.s.rho
        out = learn(t, g, sub)
        t.given.plan[0]["rho"] = place
        return out
    monkeypatch.setattr(okd_train.Trainer, "learn_generator", with_a_number)
    a, b = recorded("--groups", "2", *TINY), eager("--groups", "2", *TINY)
    run_both(a, b, 5)
    for t in (a, b):
        t.s.rho = 0.1
    with pytest.raises(AssertionError):
        run_both(a, b, 2)


def test_from_graph_to_eager_and_back(recorded):
    whole = eager("--groups", "2", *TINY)
    for _ in range(18):
        whole.step()
    t = recorded("--groups", "2", *TINY)
    for make in (eager, recorded, None):
        for _ in range(6):
            t.step()
        if make:
            state, t = copy.deepcopy(t.state()), make("--groups", "2", *TINY)
            t.load_state(dict(enumerate(state["groups"], 1)), state["step"])
    assert t.graph.graphs
    assert_same(whole.state(), t.state())


STILL = OTHER.replace("nn.Dropout(0.1)", "nn.Tanh()").replace("nn.Dropout(drop)", "nn.Dropout(0 * drop)")
OF_PYTHON, OF_NUMPY = (f"""{STILL}
import random
import numpy
def generator_loss(D, fake):
    return -D(fake).mean() * {call}
""" for call in ("random.random()", "float(numpy.random.rand())"))


@pytest.mark.parametrize("text", [OTHER, OF_PYTHON, OF_NUMPY])
def test_a_script_that_draws_is_not_captured(text, recorded, tmp_path):
    path = tmp_path / "other.py"
    path.write_text(text)
    a, b = recorded("--model", str(path), "--groups", "2"), eager("--model", str(path), "--groups", "2")
    run_both(a, b, 6)
    why = "other.py draws random numbers by itself"
    assert not a.graph.graphs and a.graph_note == f"Steps run eagerly, without a CUDA graph: {why}."


COUNTS = OTHER.replace("0.1", "0.0").replace("drop=0.3", "drop=0.0") + '''
calls = [0]
def generator_loss(D, fake):
    calls[0] += 1
    return -D(fake).mean() * (1 + 0.3 * (calls[0] % 5))
'''


def test_a_script_that_changes_its_mind_is_found_out(recorded, tmp_path):
    path = tmp_path / "counts.py"
    path.write_text(COUNTS)
    t = recorded("--model", str(path), "--groups", "2")
    for _ in range(5):
        t.step()
    assert not t.graph.graphs and "a replay differed from an eager step by" in t.graph_note
    t = recorded("--model", str(path), "--groups", "2")
    t.s.cuda_graph = "on"
    with pytest.raises(okd_train.UserError, match="--cuda-graph on: a replay differed"):
        for _ in range(5):
            t.step()


def test_a_failed_capture_leaves_an_eager_run(recorded, monkeypatch):
    """Small attention by Triton, too, is for replays alone."""
    def record(functions, pool, stream):
        assert attention.LAUNCHES_ARE_FREE
        raise RuntimeError("operation not permitted when stream is capturing")
    attention = okd_train.kernel("attention")
    monkeypatch.setattr(cuda_graph, "record", record)
    a, b = recorded("--groups", "2", *TINY), eager("--groups", "2", *TINY)
    run_both(a, b, 2)
    assert not attention.LAUNCHES_ARE_FREE                          # b was the last
    a.step()
    assert attention.LAUNCHES_ARE_FREE
    b.step()
    run_both(a, b, 3)
    a.step()
    assert not attention.LAUNCHES_ARE_FREE
    assert not a.graph.graphs and "capturing it failed: RuntimeError: operation not permitted" in a.graph_note


def test_what_is_put_back_after_the_proof_holds_no_graph(recorded, monkeypatch):
    """A clone of a parameter with its graph keeps the node in which its gradient gathers, and that node the default
    stream, for which a captured backward may not wait: no step was ever captured."""
    tried, seen = cuda_graph.StepGraph.tried, []

    def noting(graph, run, before):
        seen.extend(before)
        return tried(graph, run, before)
    monkeypatch.setattr(cuda_graph.StepGraph, "tried", noting)
    t = recorded("--groups", "2", *TINY)
    for _ in range(4):
        t.step()
    assert t.graph.graphs and len(seen) > 100 and not any(x.requires_grad for x in seen)


def test_a_failed_capture_gives_the_allocator_back(monkeypatch):
    """torch's end of a failed capture raises before it tells the allocator; one that failed in Python has told it."""
    told, stream = [], types.SimpleNamespace(device_index=3)

    @contextlib.contextmanager
    def graph(g, pool, stream, capture_error_mode):
        try:
            yield
        finally:
            if fails:
                raise RuntimeError("operation failed due to a previous error during capture")
            told.append(pool)

    def end(device, pool):
        if pool in told:
            raise RuntimeError("not currently recording to this pool")
        told.append((device, pool))
    fakes = dict(CUDAGraph=object, graph=graph, stream=lambda s: contextlib.nullcontext(),
                 graph_pool_handle=lambda: (0, 7))
    for name, f in fakes.items():
        monkeypatch.setattr(torch.cuda, name, f)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: told.append("released"), raising=False)
    for fails, expected in ((True, [(3, (0, 7)), "released"]), (False, [(0, 7)])):
        told.clear()
        with pytest.raises((ValueError, RuntimeError)) as e:
            cuda_graph.record([lambda: int("no number")], None, stream)
        assert told == expected and "no number" in str(e.value if not fails else e.value.__context__)


def test_a_failed_capture_is_explained_by_its_cause(recorded, monkeypatch):
    """torch.cuda.graph raises once more while it leaves, which hides what went wrong; CUDA adds where to read on."""
    def record(functions, pool, stream):
        try:
            raise RuntimeError("the cause\nSearch for `cudaErrorX' in https://docs")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    monkeypatch.setattr(cuda_graph, "record", record)
    t = recorded("--groups", "1", *TINY)
    for _ in range(4):
        t.step()
    assert t.graph_note.endswith("capturing it failed: RuntimeError: the cause.")


def test_a_state_loaded_into_a_captured_trainer_is_trained_on(recorded):
    a, b = recorded("--groups", "1", *TINY), eager("--groups", "1", *TINY)
    for t in (a, b):
        start = copy.deepcopy(t.state())
        for _ in range(5):
            t.step()
        t.load_state(dict(enumerate(start["groups"], 1)), start["step"])
    assert not a.graph.graphs
    run_both(a, b, 6)
    assert a.graph.graphs


@pytest.mark.parametrize("n_critic", [1, 2])
def test_lanes_fork_and_join_as_a_capture_demands(n_critic, monkeypatch):
    """A captured stream waits for no stream outside its capture, and all that was forked is joined when it ends.

    Streams that only note who waits for whom; the lanes are those of the warm-up, all of which exist before the first
    capture begins. With several processes a graph ends at each exchange, and another begins.
    """
    captured, away, current, forks = set(), set(), [], []

    class Stream:
        def wait_stream(self, other):
            assert other in captured or self not in captured, "a dependency crosses the boundary of the capture"
            if other in captured:
                captured.add(self)
            if self is lanes.main:
                away.discard(other)

    @contextlib.contextmanager
    def stream(new):
        forks.extend([new] * (new is not lanes.main))
        away.update({new} - {lanes.main})
        current.append(new)
        yield
        current.pop()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    argv = ["--groups", "3", "--n-critic", str(n_critic), *TINY]
    t, plain, lanes = setup(*argv), eager(*argv), cuda_graph.Lanes()
    t.graph.lanes = lanes
    current.append(Stream())
    lanes.run(t.eager)
    assert len(set(forks)) == 6 and not away
    begun = len(forks)
    with stream(lanes.main), lanes.forking():
        captured.add(lanes.main)
        for part, _ in t.parts():
            if part.func == t.exchange:
                assert not away
                captured.intersection_update({lanes.main})
            part()
        assert not away
    assert len(forks) == 2 * begun and len(set(forks)) == 6
    for _ in range(2):
        plain.eager()
    assert_same(t.state(), plain.state())


@pytest.mark.parametrize("n, w, why", [(3, 5, "several processes share a group's batch"), (3, 3, None)])
def test_all_ranks_agree_on_what_forbids_a_capture(n, w, why):
    """Five ranks on three groups: one has its group alone, and would otherwise capture, and wait for the others."""
    owners = [i for r in range(w) for i in [r * n // w]]
    for rank in range(w):
        ranks = types.SimpleNamespace(world=w, n_groups=n, rank=rank, replicas=owners.count(owners[rank]), staged=False)
        t = types.SimpleNamespace(ranks=ranks, drew=False, device=torch.device("cuda"))
        assert okd_train.Trainer.obstacle(t) == why


def test_a_loss_that_is_lost_is_named_with_its_step(recorded):
    t = recorded("--groups", "3", *TINY)
    for _ in range(6):
        t.step()
    assert t.graph.graphs and t.first_bad() is None
    with torch.no_grad():
        t.groups[1].nets["C"].params[0].fill_(float("nan"))
    for _ in range(3):                                              # looked at only afterwards
        t.step()
    assert t.first_bad() == (7, "connector of group 2")


def test_on_is_refused_without_a_gpu_and_auto_says_why(photos, tmp_path, capsys):
    if CUDA:
        pytest.skip("this machine has a CUDA device")
    common = ["--data", photos, *TINY, "--groups", "1"]
    for more, words in ((["--cuda-graph", "on"], "--cuda-graph on: the device is cpu"),
                        (["--precision", "tf32"], "tf32 is arithmetic of CUDA devices")):
        assert words in refused(capsys, *common, *more, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    out = tmp_path / "from a gpu"
    train(*common, "--steps", "1", "--out", out)
    args = json.loads((out / "args.json").read_text())
    assert args["settings"]["precision"] is None                    # the next device's own default
    args["settings"]["precision"] = "tf32"
    (out / "args.json").write_text(json.dumps(args))
    assert "use fp32 or bf16" in refused(capsys, "--out", out, "--resume", "--steps", "2")
    train("--out", out, "--resume", "--steps", "2", "--precision", "fp32")
    capsys.readouterr()
    for choice in ("auto", "off"):
        train(*common, "--steps", "5", "--cuda-graph", choice, "--out", tmp_path / choice)
        text = capsys.readouterr().out
        assert text.count("Steps run eagerly, without a CUDA graph: the device is cpu.") == (choice == "auto")


DRIVER = '''
import json, sys
sys.path[:0] = {paths!r}
import okd_train, test_cuda_graph
trainers = []
init, obstacle = okd_train.Trainer.__init__, okd_train.Trainer.obstacle
okd_train.Trainer.obstacle = lambda t: test_cuda_graph.but_for_the_cpu(obstacle(t))
okd_train.Trainer.__init__ = lambda t, *a: (trainers.append(t), init(t, *a))[1]
test_cuda_graph.cuda_graph.record = test_cuda_graph.recording(trainers)
okd_train.NORMS_TOGETHER = {{"cpu"}}
for n_graphs, argv in json.loads(sys.argv[1]):
    trainers.clear()
    okd_train.main(argv)
    t, = trainers
    assert t.graph.graphs and len(t.graph.graphs) == n_graphs, t.graph_note
'''


def test_two_processes_exchange_between_graphs(photos, tmp_path, root):
    """Graphs around every exchange; the checkpoint is that of one eager process."""
    (tmp_path / "driver.py").write_text(DRIVER.format(paths=[str(root), str(root / "tests")]))
    common = ["--groups", "3", *TINY, "--data", str(photos), "--steps", "8", "--n-critic"]
    jobs = [(n + 1, [*common, str(n), "--out", str(tmp_path / f"two{n}")]) for n in (1, 2)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    p = subprocess.run([sys.executable, *torchrun, tmp_path / "driver.py", json.dumps(jobs)], env=ENV,
                       capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stdout + p.stderr
    for n in (1, 2):
        assert p.stdout.count(f"Steps run as {n + 1} CUDA graphs, found equal to an eager step.") == 1, p.stdout
        train(*common, n, "--cuda-graph", "off", "--out", tmp_path / f"one{n}")
        assert_same(checkpoint(tmp_path / f"one{n}"), checkpoint(tmp_path / f"two{n}"))


# ---------------------------------------------------------------------------------------------- by itself
def test_inputs_keep_their_places():
    """Of any types and sizes; new values arrive where the old ones lay, in one block of memory."""
    def plan(k):
        return [{"z": torch.arange(3.0) + k, "rate": torch.tensor(0.5 * k, dtype=torch.float64)},
                {"idx": torch.arange(5) * k, "on": torch.tensor([True, k > 1]), "z": torch.full((2, 2), k / 3)}]
    inputs = cuda_graph.Inputs(plan(1), torch.device("cpu"))
    places = {name: t.data_ptr() for name, t in flat(inputs.plan).items()}
    start, end = inputs.packed.data_ptr(), inputs.packed.data_ptr() + len(inputs.packed)
    assert all(start <= place < end for place in places.values())
    for k in (1, 2, 3):
        inputs.put(plan(k))
        assert_same(inputs.plan, plan(k))
        assert {name: t.data_ptr() for name, t in flat(inputs.plan).items()} == places
        assert all(t.dtype == flat(plan(k))[name].dtype for name, t in flat(inputs.plan).items())


@pytest.mark.parametrize("plan", [
    [{"z": torch.zeros(3)}], [{"z": torch.zeros(3), "rates": torch.tensor(1.0)}],
    [{"z": torch.zeros(1), "rate": torch.tensor(1.0)}], [{"z": torch.zeros(3), "rate": torch.tensor(1)}], []])
def test_inputs_of_other_names_shapes_and_types_are_refused(plan):
    inputs = cuda_graph.Inputs([{"z": torch.ones(3), "rate": torch.tensor(0.5)}], torch.device("cpu"))
    with pytest.raises(ValueError):
        inputs.put(plan)


def test_a_step_of_host_parts_alone_is_decided_once():
    calls = []
    graph = cuda_graph.StepGraph([(lambda: calls.append(1), True)], list, list, cuda=False)
    for _ in range(20):
        graph.step()
    assert graph.why is None and len(calls) <= 20 + 3


def test_any_step_is_warmed_up_captured_and_replayed(monkeypatch):
    """The file knows nothing of GANs: a step of two parts around one on the host, and another key."""
    x, seen, done = torch.zeros(3), [], []
    parts = [(lambda: x.add_(1), False), (lambda: seen.append(x.clone()), True), (lambda: x.mul_(2), False)]
    monkeypatch.setattr(cuda_graph, "record", recording([types.SimpleNamespace(moving=lambda: [x])]))
    graph = cuda_graph.StepGraph(parts, lambda: [x], lambda: [x], refused=done.append, cuda=False)
    want = 0.0
    for step in range(8):
        graph.step(key=step > 5)
        want = 2 * (want + 1)
        assert torch.equal(x, torch.full((3,), want)) and torch.equal(seen[-1], x / 2)
        assert bool(graph.graphs) == (step >= cuda_graph.WARM_UP)
        if step == 5:
            first = graph.graphs
    assert len(graph.graphs) == 2 and graph.graphs is not first and done == [] and graph.why is None


def test_what_forbids_a_capture_is_said_once():
    told = []
    graph = cuda_graph.StepGraph([(lambda: None, False)], list, list, lambda: "no reason", told.append, cuda=False)
    for _ in range(6):
        graph.step()
    assert told == ["no reason"] and graph.why == "no reason" and graph.graphs is None


# ---------------------------------------------------------------------------------------------- precision
def test_bf16_keeps_the_penalty_and_the_spectral_norm_in_fp32(monkeypatch):
    t = eager("--groups", "2", "--precision", "bf16", *TINY)
    seen = {"scores": set(), "penalty": set()}
    D = t.groups[0].nets["D"].net
    conv = D.net[0]._conv_forward

    def noting(x, w, b):
        y = conv(x, w, b)
        seen["penalty" if x.requires_grad and x.is_leaf else "scores"].add(y.dtype)
        return y
    D.net[0]._conv_forward = noting
    sigmas = []
    for m in t.groups[0].nets["G"].parametrizations + t.groups[0].nets["D"].parametrizations:
        m.register_forward_hook(lambda m, i, o: sigmas.append((torch.is_autocast_enabled("cpu"), o.dtype)))
    out = t.step()
    assert seen == {"scores": {torch.bfloat16}, "penalty": {torch.float32}}
    assert set(sigmas) == {(False, torch.float32)}
    assert all(v.dtype == torch.float32 for v in (*values(out).values(), *D.parameters()))


def test_a_gpu_is_told_to_give_equal_bits(monkeypatch):
    """Without it two eager steps from one state differed by up to 5 % of a gradient, and no replay could be proven."""
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    for name in ("allow_tf32", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, False)
    s, _, _ = okd_train.parse([])
    assert okd_train.set_precision(s, torch.device("cuda")) == "tf32"
    assert torch.backends.cudnn.deterministic and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("argv", [["--groups", "2"], ["--model", "acgan", "--groups", "2"],
                                  ["--model", "acgan", "--groups", "2", "--loss", "wgan-gp"],
                                  ["--model", "acgan", "--groups", "2", *SMALL]])
def test_bf16_is_near_fp32(argv):
    a, b = eager(*argv, *TINY), eager(*argv, "--precision", "bf16", *TINY)
    x, y = values(a.step()), values(b.step())
    assert x.keys() == y.keys() and any(not torch.equal(x[k], y[k]) for k in x)
    for k in x:
        if not k.endswith("accuracy"):
            torch.testing.assert_close(x[k], y[k], rtol=0.05, atol=0.05)


def test_bf16_of_a_users_script_is_for_its_generator_alone(tmp_path):
    path = tmp_path / "other.py"
    path.write_text(OTHER)
    t = eager("--model", str(path), "--groups", "2", "--precision", "bf16")
    seen = {}
    for role, n in t.groups[0].nets.items():
        note = lambda m, i, o, role=role: seen.setdefault(role, set()).add(o.dtype)
        n.net.f[1 if role in "DC" else 0].register_forward_hook(note)
    fakes = []
    generate = t.generate
    t.generate = lambda *a: (fakes.append(generate(*a)), fakes[-1])[1]
    t.step()
    assert seen["G"] == {torch.bfloat16} and seen["D"] == {torch.float32} and fakes[0].dtype == torch.float32


# ---------------------------------------------------------------------------------------------- on a GPU
def on_gpu(*argv):
    s, script, named = okd_train.parse([*argv, "--device", "cuda"])
    okd_train.settle(s, script, named)
    device = okd_train.pick_device("cuda")
    okd_train.set_precision(s, device)
    images, labels, classes = okd_train.load_data(s, script.conditional, print)
    s.n_classes = len(classes)
    return okd_train.Trainer(script, s, okd_train.Data(images, labels, classes, s, device), device)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["sagan", "acgan"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_gpu_graph_equals_eager_over_twenty_steps(model, precision):
    argv = ["--model", model, "--groups", "3", "--batch-size", "8", "--precision", precision]
    a, b = on_gpu(*argv, "--cuda-graph", "on"), on_gpu(*argv, "--cuda-graph", "off")
    for _ in range(20):
        state = copy.deepcopy(a.state())
        b.load_state(dict(enumerate(state["groups"], 1)), state["step"])
        a.step(), b.step()
        for g, h in zip(a.groups, b.groups):
            for role, n in g.nets.items():
                states = (m.opt.state.values() for m in (n, h.nets[role]))
                x, y = (torch.cat([v["exp_avg"].flatten() for v in state]) for state in states)
                assert torch.equal(x, y), (role, g.i)
    assert a.graph.graphs


@pytest.mark.gpu
def test_gpu_two_runs_are_equal_bit_for_bit(tmp_path, photos):
    """Steps one by one, and as a graph."""
    common = ["--groups", "3", "--image-size", "64", "--batch-size", "8", "--data", photos, "--nproc", "1"]
    for choice in ("off", "on"):
        for k in range(2):
            train(*common, "--steps", "12", "--cuda-graph", choice, "--out", tmp_path / f"{choice}{k}")
        assert_same(*(checkpoint(tmp_path / f"{choice}{k}") for k in range(2)))


@pytest.mark.gpu
def test_gpu_changes_between_replays_arrive():
    a, b = (on_gpu("--groups", "2", "--batch-size", "4", "--cuda-graph", choice) for choice in ("on", "off"))

    def both(steps):
        for _ in range(steps):
            x, y = values(a.step()), values(b.step())
        for k in x:
            torch.testing.assert_close(x[k], y[k], rtol=1e-3, atol=1e-3)
    both(5)
    for t in (a, b):
        t.s.rho, t.s.g_lr = 0.05, 1e-3
        t.data.images.copy_(255 - t.data.images)
    both(2)
    for t in (a, b):
        t.s.rho = 0.0
    both(2)


@pytest.mark.gpu
def test_gpu_resume_from_graph_into_eager_and_back(tmp_path, photos):
    common = ["--groups", "2", *TINY, "--data", photos, "--nproc", "1", "--log-every", "1"]
    out = tmp_path / "run"
    train(*common, "--steps", "8", "--cuda-graph", "on", "--out", out)
    train("--resume", "--steps", "12", "--cuda-graph", "off", "--out", out)
    train("--resume", "--steps", "20", "--cuda-graph", "on", "--out", out)
    train(*common, "--steps", "20", "--cuda-graph", "off", "--out", tmp_path / "whole")
    a, b = (json.loads((tmp_path / d / "log.jsonl").read_text().splitlines()[-1]) for d in ("run", "whole"))
    for x, y in zip(a["groups"], b["groups"]):
        assert x["d_loss"] == pytest.approx(y["d_loss"], rel=0.05, abs=0.05)


@pytest.mark.gpu
def test_gpu_launches_before_capture():
    """At most 1300 launches a group and step; sagan at full size."""
    from torch.profiler import ProfilerActivity, profile
    t = on_gpu("--groups", "3", "--cuda-graph", "off")
    for _ in range(4):
        t.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        t.step()
        torch.cuda.synchronize()
    launches = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in p.events())
    assert 0 < launches <= 3 * 1300, launches
