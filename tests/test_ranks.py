"""okd_train.py on many processes: the same numbers for any placement and topology, replicas as one batch, deaths."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import okd_train
from conftest import noise
from test_okd_train import ENV, OTHER, TINY, assert_same, checkpoint, logs, run, start, train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("photos"), ("Crack", "Spallation"), 8)


def torchrun(n, *argv, script=okd_train.__file__, ok=True, flags=("--standalone",)):
    p = subprocess.run([*TORCHRUN, *flags, "--nproc-per-node", str(n), str(script), *map(str, argv)],
                       capture_output=True, text=True, env=ENV, timeout=120)
    assert (p.returncode == 0) == ok, p.stdout[-3000:] + p.stderr[-3000:]
    return p


def the_one_error(p):
    """The line of a mistake under torchrun, said once; with it torchrun's own report ends, and nobody aborts."""
    line, = [line for line in p.stderr.splitlines() if line.startswith("okd_train.py: ")]
    assert line.startswith("okd_train.py: error: ") and "SIGABRT" not in p.stderr and "terminate" not in p.stderr
    assert p.stderr.splitlines()[-2:-1] == [f"  traceback : {line}"] and "exitcode  : 2 " in p.stderr, p.stderr
    return line


# ---------------------------------------------------------------------------------------------- placement
RING = okd_train.neighbour
TOPOLOGIES = {"ring": RING, "reversed": lambda i, n: (i - 2) % n + 1, "star": lambda i, n: 1}
MODELS = ["sagan", "acgan", "script", "acgan small"]
PICTURES = ["--sample-every", "2"]                                  # with the variety of the images in the log

# Several trainings one after the other: starting processes takes longer than all of them.
DRIVER = """
import json, os, sys
sys.path[:0] = {paths!r}
import okd_train, test_ranks
noted = []
okd_train.on_log = lambda line: noted[-1]["lines"].append(line)
close = okd_train.Ranks.close
okd_train.Ranks.close = lambda ranks: (noted[-1].update(sent=ranks.sent), close(ranks))
okd_train.torch.set_num_threads(1)
for topology, *argv in json.loads(sys.argv[1]):
    noted.append(dict(out=argv[argv.index("--out") + 1], lines=[]))
    okd_train.neighbour = test_ranks.TOPOLOGIES[topology]
    okd_train.main(argv)
with open(sys.argv[2] + os.environ["RANK"], "w") as f:
    json.dump(noted, f)
"""


@pytest.fixture(scope="module")
def placed(photos, root, tmp_path_factory):
    """A folder of runs of four steps, and what their ranks noted: KIND/w1 was on one process, w2 and w3 on more.

    KIND is a model in a ring, or another topology. A ring on several processes was stopped after two steps and went on
    elsewhere: w2 on one process, w3 on two, w31 on one.
    """
    folder = tmp_path_factory.mktemp("placed")
    (folder / "other.py").write_text(OTHER)
    (folder / "driver.py").write_text(DRIVER.format(paths=[str(root), str(root / "tests")]))
    common = ["--data", str(photos), "--log-every", "2", "--seed", "3", "--n-critic", "2"]
    small = [*TINY, "--recipe", "small", "--channels", "1", "--noise-from", "32"]
    models = {"sagan": TINY, "acgan": [*TINY, "--model", "acgan", *PICTURES],
              "acgan small": [*small, "--model", "acgan"],
              "script": ["--model", str(folder / "other.py")]}

    def job(kind, where, steps, *more):
        topology = kind if kind in TOPOLOGIES else "ring"
        settings = [*common, *models.get(kind, TINY), "--steps", str(steps), "--out", str(folder / kind / where)]
        return [topology, *settings, *more]

    def together(w, name, jobs):
        torchrun(w, json.dumps(jobs), folder / f"{name}.", script=folder / "driver.py")

    def alone(topology, *argv):
        okd_train.neighbour = TOPOLOGIES[topology]
        okd_train.main(argv)

    others = ["reversed", "star"]
    together(3, "three", [*(job(kind, "w3", 2) for kind in MODELS), *(job(kind, "w3", 4) for kind in others)])
    for kind in MODELS:
        shutil.copytree(folder / kind / "w3", folder / kind / "w31")
    resumed = [job(kind, "w3", 4, "--resume") for kind in MODELS]
    together(2, "two", [*(job(kind, "w2", 2) for kind in MODELS), *(job(kind, "w2", 4) for kind in others), *resumed])
    try:
        for kind in MODELS:
            alone(*job(kind, "w1", 4))
            for where in ("w2", "w31"):
                alone(*job(kind, where, 4, "--resume"))
        for kind in others:
            alone(*job(kind, "w1", 4))
    finally:
        okd_train.neighbour = RING
    return folder


@pytest.mark.parametrize("kind", [*MODELS, "reversed", "star"])
def test_the_checkpoint_does_not_depend_on_the_number_of_processes(kind, placed):
    one, others = placed / kind / "w1", [f for f in (placed / kind).iterdir() if f.name != "w1"]
    assert len(others) == (3 if kind in MODELS else 2)
    picture = lambda run: (run / "samples/step_000004.png").read_bytes()
    for other in others:
        assert_same(checkpoint(one), checkpoint(other))
        assert_same(okd_train.load_file(one / "G3.pt"), okd_train.load_file(other / "G3.pt"))
        assert logs(one) == logs(other)
        assert sum("variety" in line["groups"][2] for line in logs(other)) == (2 if kind == "acgan" else 0)
        assert picture(one) == picture(other)


def test_processes_that_it_starts_itself(photos, placed, tmp_path):
    argv = ["--data", photos, "--log-every", "2", "--seed", "3", "--n-critic", "2", *TINY, "--steps", "4"]
    p = run(*argv, "--nproc", "2", "--out", tmp_path / "run")
    assert "Starting 2 processes on this machine: --nproc 2 (--nproc 1 forbids)." in p.stdout
    assert_same(checkpoint(placed / "sagan/w1"), checkpoint(tmp_path / "run"))


def test_neighbour_alone_is_the_topology(placed):
    """Each of three gives other connectors; which images they see is in test_okd_train.py."""
    three = [checkpoint(placed / kind / "w1")["groups"] for kind in ("sagan", "reversed", "star")]
    connectors = [group["C"]["net"]["net.0.bias"] for groups in three for group in groups]
    assert all(not torch.equal(a, b) for k, a in enumerate(connectors) for b in connectors[:k])
    assert [okd_train.neighbour(i, 3) for i in (1, 2, 3)] == [2, 3, 1] and okd_train.neighbour is RING


def test_images_sent(placed):
    """An exchange moves the batches that cross between processes, and no more than that."""
    batch = 4 * 3 * 32 * 32 * 4                                     # bytes
    crossing = {"two": {"sagan": 2, "reversed": 2, "star": 1}, "three": {"sagan": 3, "reversed": 3, "star": 2}}
    for name, where, w in (("two", "w2", 2), ("three", "w3", 3)):
        ranks = [json.loads((placed / f"{name}.{r}").read_text()) for r in range(w)]
        for kind, n in crossing[name].items():
            exchanges = 2 * (2 if kind == "sagan" else 4)           # sub-steps a step, steps
            sent = [job["sent"] for noted in ranks for job in noted if job["out"] == str(placed / kind / where)]
            assert len(sent) == w and sum(sent) == n * batch * exchanges, (kind, where, sent)
            assert kind == "star" or max(sent) == batch * exchanges, (kind, where, sent)


def test_on_log_is_shown_every_line_on_rank_0(placed):
    first, *others = [json.loads((placed / f"three.{r}").read_text()) for r in range(3)]
    for kind in MODELS:
        shown, = [job["lines"] for job in first if job["out"] == str(placed / kind / "w3")]
        assert len(shown) == 1 and shown == [json.loads((placed / kind / "w31/log.jsonl").read_text().splitlines()[0])]
    assert all(job["lines"] == [] for noted in others for job in noted)


def test_blocks_and_shares(monkeypatch):
    monkeypatch.setattr(okd_train.dist, "rendezvous", lambda *a, **k: iter([(None, 0, 1)]))
    monkeypatch.setattr(okd_train.dist, "PrefixStore", lambda *a: None)
    monkeypatch.setattr(okd_train.Ranks, "attempt", lambda self, store: "x")
    monkeypatch.setattr(okd_train.dist, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(okd_train.dist, "new_group", lambda *a, **k: "group")
    everywhere = lambda out, x: out.__setitem__(slice(None), [x] * len(out))
    monkeypatch.setattr(okd_train.dist, "all_gather_object", everywhere)
    for n in range(1, 7):
        for w in range(1, 13):
            seen = []
            for rank in range(w):
                monkeypatch.setenv("RANK", str(rank))
                monkeypatch.setenv("WORLD_SIZE", str(w))
                r = okd_train.Ranks(n, 25, torch.device("cpu"))
                assert r.mine == list(range(r.mine[0], r.mine[-1] + 1)) and (r.replicas == 1 or len(r.mine) == 1)
                seen += [(i, r.low, r.high) for i in r.mine]
                sent = sum((b - a) * 3 * 64 * 64 * 4 for src, to, _, a, b in r.edges if src != to) if w > 1 else 0
                assert sent <= n * 25 * 3 * 64 * 64 * 4 or w > n
            for i in range(1, n + 1):
                shares = sorted((a, b) for k, a, b in seen if k == i)
                assert shares[0][0] == 0 and shares[-1][1] == 25
                assert all(x[1] == y[0] for x, y in zip(shares, shares[1:]))
                sizes = [b - a for a, b in shares]
                assert max(sizes) - min(sizes) <= 1


WORKER = '''
import datetime, json, os, sys, time, torch
sys.path[:0] = {paths!r}
import okd_train, test_ranks
torch.set_num_threads(1)


def build(topology, *argv):
    okd_train.neighbour = test_ranks.TOPOLOGIES[topology]
    s, script, named = okd_train.parse(list(argv))
    okd_train.settle(s, script, named)
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (40, 3, s.image_size, s.image_size), generator=g, dtype=torch.uint8)
    s.n_classes = 2
    ranks = okd_train.Ranks(s.groups, s.batch_size, torch.device("cpu"))
    data = okd_train.Data(images, torch.arange(40) % 2, ["a", "b"], s, torch.device("cpu"))
    return okd_train.Trainer(script, s, data, torch.device("cpu"), ranks)


def measure(t):
    """Gradients and buffers of the first step, then five steps of SGD."""
    out = dict(grads=dict(), buffers=dict())

    def note_buffers(m, key):
        if m.training:
            out["buffers"].setdefault(key, {{k: b.clone() for k, b in m.named_buffers()}})

    def note_gradients(n, key):
        out["grads"].setdefault(key, [p.grad.clone() for p in n.params])
    for g in t.groups:
        okd_train.check_split(t.script, t.s, g)
        for role, n in g.nets.items():
            n.opt = torch.optim.SGD(n.params, lr=1e-3)
            n.opt.register_step_pre_hook(lambda opt, *a, n=n, key=(g.i, role): note_gradients(n, key))
            n.net.register_forward_hook(lambda m, *a, key=(g.i, role): note_buffers(m, key))
    for _ in range(5):
        t.step()
    out["nets"] = {{(g.i, role): n.net.state_dict() for g in t.groups for role, n in g.nets.items()}}
    t.ranks.close()
    return out


if __name__ == "__main__":
    first, *others = json.loads(sys.argv[1])
    found = [measure(build(*first))]
    okd_train.TIMEOUT = datetime.timedelta(seconds=4)
    trainer = build(*others.pop(0))
    time.sleep(5 * (trainer.ranks.rank == 0))                       # alone it may take longer than a start
    found += [measure(trainer), *(measure(build(*job)) for job in others)]
    torch.save(found, sys.argv[2] + os.environ["RANK"])
'''


def test_the_ranks_of_a_group_act_as_one_batch(root, tmp_path, monkeypatch):
    """Five ranks: groups of two and three of them, or of two, two and one."""
    monkeypatch.setattr(okd_train, "neighbour", RING)               # put back afterwards
    (tmp_path / "worker.py").write_text(WORKER.format(paths=[str(root), str(root / "tests")]))
    settings = ["--image-size", "32", "--ch", "4", "--z-dim", "8", "--batch-size", "7", "--rho", "0.5"]
    jobs = [(topology, "--model", model, "--groups", str(n), *settings)
            for topology, model, n in (("ring", "acgan", 2), ("ring", "sagan", 2), ("star", "sagan", 3))]
    jobs.append((*jobs[1], "--loss", "r1"))
    torchrun(5, json.dumps(jobs), tmp_path / "out.", script=tmp_path / "worker.py")
    space = {"__name__": "worker"}
    exec((tmp_path / "worker.py").read_text(), space)
    of_ranks = [torch.load(tmp_path / f"out.{r}", weights_only=False) for r in range(5)]
    for k, job in enumerate(jobs):
        check_parts(space["measure"](space["build"](*job)), [found[k] for found in of_ranks])


def test_a_spread_batch_norm_takes_bf16_and_counts_in_fp32(monkeypatch):
    monkeypatch.setattr(okd_train.SumOver, "apply", lambda x, group: x.clone())     # a group of one rank
    torch.manual_seed(0)
    m, x = torch.nn.BatchNorm2d(3), torch.randn(8, 3, 9, 9).bfloat16()
    usual = torch.nn.BatchNorm2d(3)
    want, y = usual(x), okd_train.whole_batch_norm(m, None, x)
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(m.state_dict(), usual.state_dict(), rtol=1e-5, atol=1e-6)


def check_parts(whole, parts):
    """Whether what each rank found is what one process finds, and the ranks of a group never drift apart."""
    same = {}
    for part in parts:
        for key, grads in part["grads"].items():
            largest = max(g.abs().max() for g in whole["grads"][key])
            assert largest > 0
            for a, b in zip(whole["grads"][key], grads):
                assert (a - b).abs().max() <= 1e-5 * largest, key
            for k, b in part["buffers"][key].items():
                torch.testing.assert_close(b, whole["buffers"][key][k], rtol=0, atol=1e-5)
            for k, b in part["nets"][key].items():
                torch.testing.assert_close(b, whole["nets"][key][k], rtol=0, atol=1e-4)
        for key, state in part["nets"].items():
            assert_same(same.setdefault(key, state), state)
    assert {key for part in parts for key in part["grads"]} == set(whole["grads"])


MIXING = OTHER.replace("return self.f(x)", "return self.f(x) - self.f(x).mean()")
DEVIATION = OTHER.replace("nn.Sequential(nn.Flatten(),", "nn.Sequential(Spread(), nn.Flatten(),") + '''
class Spread(nn.Module):
    def forward(self, x):
        return x + x.std(0)
'''
RELATIVE = OTHER + '''
def generator_loss(D, fake):
    return D(fake).mean() ** 2
'''


RELATIVISTIC = OTHER + '''
def discriminator_loss(D, real, fake):
    return (D(fake).mean() - D(real).mean()).exp()
'''
AUGMENTED = OTHER + '''
def generator_loss(D, fake):
    return -D(fake + torch.rand(len(fake), 1, 1, 1)).mean()
'''
NOISY = OTHER + '''
import numpy as np
def connector_loss(C, neighbour, own, eps):
    return C(own).mean() - C(neighbour + np.random.rand()).mean()
'''


KEEPING = OTHER.replace("return self.f(x)", "self.mean = self.mean + x.mean().detach(); return self.f(x)").replace(
    "        self.f = nn.Sequential(nn.Flatten()", '''        self.register_buffer("mean", torch.zeros(()))
        self.f = nn.Sequential(nn.Flatten()''')


@pytest.mark.parametrize("text, complaint", [
    (KEEPING, "a buffer of Discriminator keeps statistics of the batch"),
    (AUGMENTED, "generator_loss draws random numbers by itself"),
    (NOISY, "connector_loss draws random numbers by itself"),
    (RELATIVISTIC, "discriminator_loss is not a mean over the batch"),
    (MIXING, "layer Discriminator (Discriminator)"),
    (DEVIATION, "layer f.0 (Spread) of Discriminator mixes"),
    (RELATIVE, "generator_loss is not a mean over the batch")])
def test_what_cannot_be_split_is_refused_by_name(text, complaint, tmp_path):
    with pytest.raises(okd_train.UserError) as e:
        okd_train.check_split(*script_of(text, tmp_path))
    assert complaint in str(e.value) and "--nproc 1" in str(e.value)


def script_of(text, tmp_path):
    """What check_split is given for a model script of this text."""
    path = tmp_path / "mixing.py"
    path.write_text(text)
    s, script, named = okd_train.parse(["--model", str(path), "--groups", "1"])
    okd_train.settle(s, script, named)
    data = okd_train.Data(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.zeros(8), [], s, torch.device("cpu"))
    return script, s, okd_train.Trainer(script, s, data, torch.device("cpu")).groups[0]


def test_a_penalty_that_draws_for_itself_may_be_split(tmp_path):
    text = NOISY.replace("connector_loss", "discriminator_loss").replace(", eps)", ")")
    okd_train.check_split(*script_of(text, tmp_path))


def test_more_processes_than_groups_train_and_resume(photos, tmp_path):
    argv = ["--model", "acgan", "--groups", "1", *TINY, "--data", photos, "--out", tmp_path / "run", "--log-every", "1"]
    torchrun(2, *argv, "--steps", "2")
    train(*argv, "--resume", "--steps", "3")
    assert [x["step"] for x in logs(tmp_path / "run")] == [1, 2, 3]


def test_too_many_processes_for_a_batch(photos, tmp_path):
    p = torchrun(3, "--groups", "1", *TINY, "--batch-size", "2", "--data", photos, "--out", tmp_path / "r", ok=False)
    assert "would share a batch of 2" in the_one_error(p)
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------------------------------------- machines
def begin(*argv):
    """torchrun as a user starts it -> the process, its two streams in one pipe."""
    return subprocess.Popen([*TORCHRUN, *map(str, argv)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def test_two_agents_are_one_run(photos, tmp_path):
    argv = ["--model", "sagan", "--groups", "3", *TINY, "--data", str(photos), "--steps", "3", "--log-every", "1"]
    train(*argv, "--out", tmp_path / "one")
    import socket
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    meet = ["--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    agents = [begin("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(k), *meet, "--local-addr", "127.0.0.1",
                    okd_train.__file__, *argv, "--out", str(tmp_path / "two")) for k in range(2)]
    texts = [a.communicate(timeout=120)[0] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], texts
    assert_same(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"))
    assert logs(tmp_path / "one") == logs(tmp_path / "two")


ODD = '''
import os, sys
sys.path.insert(0, {root!r})
import okd_train
okd_train.LATE = 3
argv = sys.argv[2:]
if os.environ["RANK"] == "1":
    argv = argv + sys.argv[1].split()
okd_train.main(argv)
'''


@pytest.mark.parametrize("odd, complaint", [
    ("--rho 0.25", "rank 1 was started with other settings than rank 0"),
    ("--data OTHER", "other data"), ("--data NONE", "rank 1: --data")])
def test_a_rank_that_differs_is_refused(odd, complaint, photos, root, tmp_path):
    (tmp_path / "a").mkdir()
    for k in range(9):
        Image.new("RGB", (32, 32), (k, 9, 9)).save(tmp_path / "a" / f"{k}.png")
    script = tmp_path / "odd.py"
    text = ODD.format(root=str(root))
    if "data" in odd:       # each rank as a machine of its own, decoding for itself
        text = text.replace("argv = sys.argv[2:]", 'argv = sys.argv[2:]\nos.environ["LOCAL_RANK"] = "0"')
    script.write_text(text)
    odd = odd.replace("OTHER", str(tmp_path / "a")).replace("NONE", str(tmp_path / "none"))
    p = torchrun(2, odd, "--groups", "2", *TINY, "--data", photos, "--out", tmp_path / "run", script=script, ok=False)
    assert complaint in the_one_error(p) and not (tmp_path / "run").exists()


LONE = '''
import os, sys
sys.path.insert(0, {root!r})
import okd_train
okd_train.LATE = 3                  # 1 is too little for torchrun on a busy machine
rank, step = int(os.environ["RANK"]), okd_train.Trainer.step
def fail(t):
    if rank == 1 and t.step_count == 1:
        raise okd_train.UserError("no luck")
    return step(t)
def first_bad(t):
    if t.step_count == 4:
        return 4 - rank, f"connector of group {{2 - rank}}"
okd_train.Trainer.{patched} = {by}
okd_train.main(sys.argv[1:])
'''


@pytest.mark.parametrize("patched, by, words", [
    ("step", "fail", "okd_train.py: error: rank 1: no luck"),       # while rank 0 waits for its images
    ("first_bad", "first_bad", "step 3: the loss of the connector of group 1")])
def test_what_one_rank_meets_is_said(patched, by, words, photos, root, tmp_path):
    (tmp_path / "lone.py").write_text(LONE.format(root=str(root), patched=patched, by=by))
    p = torchrun(2, "--groups", "2", *TINY, "--data", photos, "--steps", "9", "--out", tmp_path / "run",
                 script=tmp_path / "lone.py", ok=False)
    assert words in the_one_error(p)


# ---------------------------------------------------------------------------------------------- deaths
def children(pid):
    """Process ids below `pid` whose command line holds okd_train.py, by rank of start."""
    out, todo = [], [pid]
    while todo:
        p = subprocess.run(["ps", "-o", "pid=", "--ppid", str(todo.pop())], capture_output=True, text=True)
        for line in p.stdout.split():
            todo.append(int(line))
            with open(f"/proc/{line}/environ", "rb") as f:
                env = dict(x.split(b"=", 1) for x in f.read().split(b"\0") if b"=" in x)
            if b"LOCAL_RANK" in env and b"okd_train.py" in open(f"/proc/{line}/cmdline", "rb").read():
                out.append((int(env[b"LOCAL_RANK"]), int(line)))
    return dict(out)


def wait_for_steps(out, n, p, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and p.poll() is None:
        lines = (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0
        if lines >= n and (out / "checkpoint.pt").exists():
            return
        time.sleep(0.01)


LONG = ["--groups", "2", *TINY, "--log-every", "1", "--save-every", "8", "--sample-every", "5000"]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the ranks through /proc")
@pytest.mark.parametrize("victims", [[0], pytest.param([1, 0], marks=pytest.mark.sabotage)])
def test_killed_ranks_are_restarted(victims, photos, tmp_path):
    """One, or first one and later the other: the run ends as one that nobody killed."""
    argv = [*LONG, "--steps", "40", "--data", photos]
    train(*argv, "--out", tmp_path / "calm")
    out = tmp_path / "run"
    p = begin("--standalone", "--nproc-per-node", "2", "--max-restarts", "2", okd_train.__file__, *argv, "--out", out)
    for victim, steps in zip(victims, (9, 24)):
        wait_for_steps(out, steps, p)
        os.kill(children(p.pid)[victim], signal.SIGKILL)
    text = p.communicate(timeout=120)[0]
    assert p.returncode == 0, text[-3000:]
    assert text.count("Resumed at step") == len(victims)
    assert_same(checkpoint(out), checkpoint(tmp_path / "calm"))
    assert [x["step"] for x in logs(out)] == list(range(1, 41))


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the ranks through /proc")
def test_a_killed_rank_ends_the_job(photos, tmp_path):
    out = tmp_path / "run"
    p = begin("--standalone", "--nproc-per-node", "2", okd_train.__file__, *LONG, "--data", photos, "--out", out)
    wait_for_steps(out, 6, p)
    os.kill(children(p.pid)[1], signal.SIGKILL)
    text = p.communicate(timeout=60)[0]
    assert p.returncode > 0
    assert re.search(r"local_rank: 1 |rank +: 1 ", text) and ("SIGKILL" in text.upper() or "-9" in text)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the ranks through /proc")
def test_self_launch_names_the_rank_that_died(photos, tmp_path):
    p = start(*LONG, "--data", photos, "--out", tmp_path / "run", "--nproc", "2")
    wait_for_steps(tmp_path / "run", 6, p)
    os.kill(children(p.pid)[1], signal.SIGKILL)
    text, errors = p.communicate(timeout=60)
    assert p.returncode == 1 and "rank 1 was ended by SIGKILL" in errors and "Traceback" not in errors
    assert "Starting 2 processes" in text


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_once(number, code, photos, tmp_path):
    out = tmp_path / "run"
    p = start(*LONG, "--data", photos, "--out", out, "--nproc", "2")
    wait_for_steps(out, 5, p)
    p.send_signal(number)
    text, errors = p.communicate(timeout=60)
    assert p.returncode == code and text.count("Stopped by") == 1, (p.returncode, text, errors)
    assert "Traceback" not in errors, errors
    assert checkpoint(out)["step"] == logs(out)[-1]["step"]


def test_a_user_error_never_touches_the_run_folder(photos, tmp_path):
    argv = ["--groups", "2", *TINY, "--data", photos, "--out", tmp_path / "run"]
    train(*argv, "--steps", "1")
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    p = torchrun(1, *argv, "--steps", "3", flags=("--standalone", "--max-restarts", "1"), ok=False)
    assert "already holds a run" in p.stderr
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == before
