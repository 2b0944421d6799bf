"""okd_train.py on many processes: the same numbers for any placement, replicas that act as one batch, deaths and restarts."""
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from PIL import Image

import okd_train
from conftest import noise
from test_okd_train import OTHER, TINY, assert_same, logs

ENV = dict(os.environ, OMP_NUM_THREADS="1")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("photos"), ("Crack", "Spallation"), 8)


def torchrun(n, *argv, script=okd_train.__file__, ok=True, flags=("--standalone",), timeout=120, cwd=None):
    p = subprocess.run([*TORCHRUN, *flags, "--nproc-per-node", str(n), str(script), *map(str, argv)], capture_output=True, text=True,
                       env=ENV, timeout=timeout, cwd=cwd)
    assert (p.returncode == 0) == ok, p.stdout[-3000:] + p.stderr[-3000:]
    return p


def checkpoint(folder):
    return okd_train.load_file(folder / "checkpoint.pt")


# ---------------------------------------------------------------------------------------------- placement
@pytest.mark.parametrize("model", ["sagan", "acgan", "script"])
def test_the_checkpoint_does_not_depend_on_the_number_of_processes(model, photos, tmp_path):
    if model == "script":
        model = tmp_path / "other.py"
        model.write_text(OTHER)
    argv = ["--model", model, "--data", photos, "--log-every", "2", "--seed", "3", "--n-critic", "2", *(TINY if isinstance(model, str) else [])]
    okd_train.main([*map(str, argv), "--steps", "4", "--out", str(tmp_path / "w1")])
    torchrun(3, *argv, "--steps", "2", "--out", tmp_path / "w3")
    shutil.copytree(tmp_path / "w3", tmp_path / "w31")
    torchrun(2, *argv, "--steps", "4", "--out", tmp_path / "w3", "--resume")             # saved on three, goes on on two
    okd_train.main([*map(str, argv), "--steps", "4", "--out", str(tmp_path / "w31"), "--resume"])    # and on one
    subprocess.run([sys.executable, okd_train.__file__, *map(str, argv), "--steps", "2", "--nproc", "2", "--out", str(tmp_path / "w2")],
                   env=ENV, check=True, timeout=120, capture_output=True)
    okd_train.main([*map(str, argv), "--steps", "4", "--out", str(tmp_path / "w2"), "--resume"])     # saved on two, goes on on one
    for other in ("w2", "w3", "w31"):
        assert_same(checkpoint(tmp_path / "w1"), checkpoint(tmp_path / other))
        assert_same(okd_train.load_file(tmp_path / "w1" / "G3.pt"), okd_train.load_file(tmp_path / other / "G3.pt"))
        assert logs(tmp_path / "w1") == logs(tmp_path / other)
        assert (tmp_path / "w1/samples/step_000004.png").read_bytes() == (tmp_path / other / "samples/step_000004.png").read_bytes()


def test_blocks_and_shares(monkeypatch):
    monkeypatch.setattr(okd_train.dist, "rendezvous", lambda *a, **k: iter([(None, 0, 1)]))
    monkeypatch.setattr(okd_train.dist, "PrefixStore", lambda *a: None)
    monkeypatch.setattr(okd_train.Ranks, "attempt", lambda self, store: "x")
    monkeypatch.setattr(okd_train.dist, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(okd_train.dist, "new_group", lambda *a, **k: "group")
    monkeypatch.setattr(okd_train.dist, "all_gather_object", lambda out, x: out.__setitem__(slice(None), [x] * len(out)))
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
                assert shares[0][0] == 0 and shares[-1][1] == 25 and all(x[1] == y[0] for x, y in zip(shares, shares[1:]))
                sizes = [b - a for a, b in shares]
                assert max(sizes) - min(sizes) <= 1


WORKER = '''
import os, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import okd_train
torch.set_num_threads(1)
def build(argv, seed=1):
    s, script, named = okd_train.parse(argv)
    okd_train.settle(s, script, named)
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (40, 3, s.image_size, s.image_size), generator=g, dtype=torch.uint8)
    s.n_classes = 2
    ranks = okd_train.Ranks(s.groups, s.batch_size, torch.device("cpu"))
    data = okd_train.Data(images, torch.arange(40) % 2, ["a", "b"], s, torch.device("cpu"))
    return okd_train.Trainer(script, s, data, torch.device("cpu"), ranks)
def measure(t):
    """Gradients and buffers of the first step, then five steps of SGD."""
    out = dict(grads=dict(), buffers=dict())
    def note(m, key):
        if m.training:
            out["buffers"].setdefault(key, {{k: b.clone() for k, b in m.named_buffers()}})
    for g in t.groups:
        okd_train.check_split(t.script, t.s, g)
        for role, n in g.nets.items():
            n.opt = torch.optim.SGD(n.params, lr=1e-3)
            n.opt.register_step_pre_hook(lambda opt, *a, key=(g.i, role), n=n: out["grads"].setdefault(key, [p.grad.clone() for p in n.params]) and None)
            n.net.register_forward_hook(lambda m, *a, key=(g.i, role): note(m, key))
    for _ in range(5):
        t.step()
    out["nets"] = {{(g.i, role): n.net.state_dict() for g in t.groups for role, n in g.nets.items()}}
    return out
if __name__ == "__main__":
    t = build(sys.argv[2:])
    torch.save(measure(t), sys.argv[1] + "." + os.environ["RANK"])
    t.ranks.close()
'''


@pytest.mark.parametrize("model, w, n", [("sagan", 2, 1), ("acgan", 4, 2), ("sagan", 5, 2)])
def test_the_ranks_of_a_group_act_as_one_batch(model, w, n, root, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(root=str(root), tests=str(root / "tests")))
    argv = ["--model", model, "--groups", n, "--image-size", "32", "--ch", "4", "--z-dim", "8", "--batch-size", "7", "--rho", "0.5"]
    torchrun(w, tmp_path / "out", *argv, script=worker)
    space = {"__name__": "worker"}
    exec(worker.read_text(), space)
    whole = space["measure"](space["build"]([str(a) for a in argv]))
    parts = [torch.load(tmp_path / f"out.{r}", weights_only=False) for r in range(w)]
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
    assert {key for part in parts for key in part["grads"]} == set(whole["grads"])
    same = {}
    for part in parts:                                              # and the ranks of a group never drift apart
        for key, state in part["nets"].items():
            assert_same(same.setdefault(key, state), state)


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


@pytest.mark.parametrize("text, complaint", [(MIXING, "layer Discriminator (Discriminator)"), (DEVIATION, "layer f.0 (Spread) of Discriminator mixes"),
                                             (RELATIVE, "generator_loss is not a mean over the batch")])
def test_what_cannot_be_split_is_refused_by_name(text, complaint, tmp_path):
    path = tmp_path / "mixing.py"
    path.write_text(text)
    s, script, named = okd_train.parse(["--model", str(path), "--groups", "1"])
    okd_train.settle(s, script, named)
    data = okd_train.Data(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.zeros(8), [], s, torch.device("cpu"))
    t = okd_train.Trainer(script, s, data, torch.device("cpu"))
    with pytest.raises(okd_train.UserError) as e:
        okd_train.check_split(script, s, t.groups[0])
    assert complaint in str(e.value) and "--nproc 1" in str(e.value)


def test_more_processes_than_groups_train_sample_and_resume(photos, tmp_path):
    argv = ["--model", "acgan", "--groups", "1", *TINY, "--data", photos, "--out", tmp_path / "run", "--log-every", "1"]
    torchrun(2, *argv, "--steps", "2")
    torchrun(2, "--out", tmp_path / "run", "--sample", "60")
    assert len(list((tmp_path / "run" / "fakes").rglob("*.png"))) == 60
    (tmp_path / "run" / "fakes").rename(tmp_path / "two")
    okd_train.main(["--out", str(tmp_path / "run"), "--sample", "60"])
    for f in (tmp_path / "two").rglob("*.*"):
        assert f.read_bytes() == (tmp_path / "run" / "fakes" / f.relative_to(tmp_path / "two")).read_bytes()
    okd_train.main([*map(str, argv), "--resume", "--steps", "3"])
    assert [x["step"] for x in logs(tmp_path / "run")] == [1, 2, 3]


def test_too_many_processes_for_a_batch(photos, tmp_path):
    p = torchrun(3, "--groups", "1", *TINY, "--batch-size", "2", "--data", photos, "--out", tmp_path / "r", ok=False)
    assert p.stderr.count("okd_train.py: error:") == 1 and "would share a batch of 2" in p.stderr and not (tmp_path / "r").exists()


# ---------------------------------------------------------------------------------------------- machines
def test_two_agents_are_one_run(photos, tmp_path):
    argv = ["--model", "sagan", "--groups", "3", *TINY, "--data", str(photos), "--steps", "3", "--log-every", "1"]
    okd_train.main([*argv, "--out", str(tmp_path / "one")])
    import socket
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    agents = [subprocess.Popen([*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(k), "--rdzv-backend", "c10d", "--rdzv-id", "x",
                                "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", okd_train.__file__, *argv,
                                "--out", str(tmp_path / "two")], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for k in range(2)]
    texts = [a.communicate(timeout=120)[0] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], texts
    assert_same(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"))
    assert logs(tmp_path / "one") == logs(tmp_path / "two")


ODD = '''
import os, sys
sys.path.insert(0, {root!r})
import okd_train
argv = sys.argv[2:]
if os.environ["RANK"] == "1":
    argv = argv + sys.argv[1].split()
okd_train.main(argv)
'''


@pytest.mark.parametrize("odd, complaint", [("--rho 0.25", "rank 1 was started with other settings than rank 0"), ("--data OTHER", "other data"),
                                            ("--data NONE", "rank 1: --data")])
def test_a_rank_that_differs_is_refused(odd, complaint, photos, root, tmp_path):
    (tmp_path / "a").mkdir()
    for k in range(9):
        Image.new("RGB", (32, 32), (k, 9, 9)).save(tmp_path / "a" / f"{k}.png")
    script = tmp_path / "odd.py"
    text = ODD.format(root=str(root))
    if "data" in odd:                                               # each rank as a machine of its own, decoding for itself
        text = text.replace("argv = sys.argv[2:]", 'argv = sys.argv[2:]\nos.environ["LOCAL_RANK"] = "0"')
    script.write_text(text)
    odd = odd.replace("OTHER", str(tmp_path / "a")).replace("NONE", str(tmp_path / "none"))
    p = torchrun(2, odd, "--groups", "2", *TINY, "--data", photos, "--out", tmp_path / "run", script=script, ok=False)
    assert complaint in p.stderr and p.stderr.count("okd_train.py: error:") == 1 and not (tmp_path / "run").exists()


LONE = '''
import os, sys
sys.path.insert(0, {root!r})
import okd_train
rank, step = int(os.environ["RANK"]), okd_train.Trainer.step
def fail(t):
    if rank == 1 and t.step_count == 1:
        raise okd_train.UserError("no luck")
    return step(t)
{patch}
okd_train.main(sys.argv[1:])
'''


@pytest.mark.parametrize("patch, words", [
    ("okd_train.Trainer.step = fail", "okd_train.py: error: rank 1: no luck"),          # while rank 0 waits for its images
    ("okd_train.Trainer.first_bad = lambda t: 4096 * (4 - rank) + 3 + rank if t.step_count == 4 else 0", "step 3: the loss of the connector of group 1")])
def test_what_one_rank_meets_is_said(patch, words, photos, root, tmp_path):
    (tmp_path / "lone.py").write_text(LONE.format(root=str(root), patch=patch))
    p = torchrun(2, "--groups", "2", *TINY, "--data", photos, "--steps", "9", "--out", tmp_path / "run", script=tmp_path / "lone.py", ok=False)
    assert words in p.stderr and p.stderr.count("okd_train.py: error:") == 1


def test_images_sent_per_step(root, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(root=str(root), tests=str(root / "tests")).split("if __name__")[0] + textwrap.dedent('''
        t = build(sys.argv[2:])
        t.step()
        assert t.ranks.sent <= 4 * 3 * 32 * 32 * 4, t.ranks.sent
        total = torch.tensor(t.ranks.sent)
        okd_train.dist.all_reduce(total)
        if os.environ["RANK"] == "0":
            print("SENT", total.item())
        t.ranks.close()'''))
    p = torchrun(2, "x", "--groups", "3", *TINY, script=worker)
    assert int(re.search(r"SENT (\d+)", p.stdout)[1]) == 2 * 4 * 3 * 32 * 32 * 4         # two edges of a ring of three on two ranks


# ---------------------------------------------------------------------------------------------- deaths
def children(pid):
    """Process ids below `pid` whose command line holds okd_train.py, by rank of start."""
    out, todo = [], [pid]
    while todo:
        for line in subprocess.run(["ps", "-o", "pid=", "--ppid", str(todo.pop())], capture_output=True, text=True).stdout.split():
            todo.append(int(line))
            with open(f"/proc/{line}/environ", "rb") as f:
                env = dict(x.split(b"=", 1) for x in f.read().split(b"\0") if b"=" in x)
            if b"LOCAL_RANK" in env and b"okd_train.py" in open(f"/proc/{line}/cmdline", "rb").read():
                out.append((int(env[b"LOCAL_RANK"]), int(line)))
    return dict(out)


def wait_for_steps(out, n, p, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and p.poll() is None:
        if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= n and (out / "checkpoint.pt").exists():
            return
        time.sleep(0.01)


LONG = ["--model", "sagan", "--groups", "2", *TINY, "--steps", "60", "--log-every", "1", "--save-every", "4", "--sample-every", "1000"]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the ranks through /proc")
def test_a_killed_rank_ends_the_job_or_is_restarted(photos, tmp_path):
    okd_train.main([*LONG, "--data", str(photos), "--out", str(tmp_path / "calm")])
    for moment, (restarts, victim) in enumerate([(1, 1), (1, 0), (0, 1)]):
        out = tmp_path / f"run{moment}"
        p = subprocess.Popen([*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), okd_train.__file__, *LONG,
                              "--data", str(photos), "--out", str(out)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for_steps(out, 9 + 5 * moment, p)
        os.kill(children(p.pid)[victim], signal.SIGKILL)
        begin = time.monotonic()
        text = p.communicate(timeout=120)[0]
        if restarts:
            assert p.returncode == 0, text[-3000:]
            assert_same(checkpoint(out), checkpoint(tmp_path / "calm"))
            assert [x["step"] for x in logs(out)] == list(range(1, 61))
        else:
            assert p.returncode != 0 and time.monotonic() - begin < 60
            assert re.search(r"local_rank: 1 |rank +: 1 ", text) and "SIGKILL" in text.upper() or "-9" in text


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the ranks through /proc")
def test_self_launch_names_the_rank_that_died(photos, tmp_path):
    out = tmp_path / "run"
    p = subprocess.Popen([sys.executable, okd_train.__file__, *LONG, "--data", str(photos), "--out", str(out), "--nproc", "2"], env=ENV,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(out, 6, p)
    os.kill(children(p.pid)[1], signal.SIGKILL)
    text, errors = p.communicate(timeout=60)
    assert p.returncode == 1 and "rank 1 was ended by SIGKILL" in errors and "Traceback" not in errors
    assert "Starting 2 processes" in text


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_once(number, code, photos, tmp_path):
    out = tmp_path / "run"
    p = subprocess.Popen([sys.executable, okd_train.__file__, *LONG[:-6], "--steps", "5000", "--log-every", "1", "--save-every", "4", "--sample-every", "5000",
                          "--data", str(photos), "--out", str(out), "--nproc", "2"], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(out, 5, p)
    p.send_signal(number)
    text, errors = p.communicate(timeout=60)
    assert p.returncode == code and text.count("Stopped by") == 1 and "Traceback" not in errors, (p.returncode, text, errors)
    assert checkpoint(out)["step"] == logs(out)[-1]["step"]


def test_a_user_error_never_touches_the_run_folder(photos, tmp_path):
    okd_train.main(["--groups", "2", *TINY, "--data", str(photos), "--steps", "1", "--out", str(tmp_path / "run")])
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    p = torchrun(2, "--groups", "2", *TINY, "--data", photos, "--steps", "3", "--out", tmp_path / "run", flags=("--standalone", "--max-restarts", "1"), ok=False)
    assert "already holds a run" in p.stderr
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == before
