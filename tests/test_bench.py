"""bench.py: what it says is what it measured and counted, and --check. Speed itself is never asserted."""
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import bench
import fid
import okd_train
from conftest import noise

TINY = ["--image-size", "32", "--ch", "4", "--batch-size", "4", "--z-dim", "8"]
ENV = dict(os.environ, OMP_NUM_THREADS="1")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("photos"), ("Crack", "Spallation"), 8)


def refused(capsys, *argv):
    """Runs in this process; the one line on stderr of a user error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        bench.main(list(map(str, argv)))
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.count("\n") == 1 and text.startswith("bench.py: error: "), text
    return text


# ---------------------------------------------------------------------------------------------- a step, measured
def test_json_holds_what_was_measured(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.main(["--timed", "3", "--json", "--groups", "2", *TINY, "--data", str(photos)])
    r = json.loads(capsys.readouterr().out)
    assert {"step_seconds", "images_per_second", "peak_memory_bytes", "launches_per_step", "flops_per_step",
            "floor_share"} <= r.keys() and r["steps"] == 3
    assert r["images_per_second"] == pytest.approx(2 * 4 / r["step_seconds"])
    assert r["seconds_for_50000_steps"] == pytest.approx(50000 * r["step_seconds"])
    rate = max(r["matmul_flops_per_second"], r["convolution_flops_per_second"])
    assert r["floor_share"] == pytest.approx(r["flops_per_step"] / rate / r["step_seconds"])
    assert r["step_seconds"] == (r["graph_seconds"] or r["eager_seconds"])[1]
    assert r["eager_seconds"] == sorted(r["eager_seconds"])
    assert {"inputs", "generators forward", "discriminators", "connectors", "generators learning", "Adam", "averages",
            "rest"} == r["phase_seconds"].keys()
    assert all(v[1] > 0 for v in r["phase_seconds"].values()) and 1e8 < r["peak_memory_bytes"] < 1e11
    assert list(tmp_path.iterdir()) == []                           # nothing is trained, nothing is left


def test_the_table_names_phases_and_the_papers_run(photos, capsys, monkeypatch):
    monkeypatch.setattr(bench, "resource", None)                    # a system that does not say how much was held
    bench.main(["--timed", "2", "--model", "acgan", "--groups", "1", *TINY, "--data", str(photos)])
    text = capsys.readouterr().out
    for words in ("acgan, groups 1, batch 4, 32x32", "discriminators", "step, eager", "Steps run eagerly",
                  "GFLOP a step", "The paper's 50,000 steps take"):
        assert words in text
    assert "connectors" not in text and "peak memory" not in text


def test_what_has_no_effect_is_refused(photos, capsys, monkeypatch):
    text = refused(capsys, "--steps", "3", "--out", "x")
    assert "--out, --steps: without effect when a step is timed; how many steps are timed is --timed" in text
    assert "--rounds: without effect when a step is timed\n" in refused(capsys, "--rounds", "3")
    assert "--json, --timed: without effect with --check" in refused(capsys, "--check", "--timed", "3", "--json")
    assert "--json: without effect with --obvious" in refused(capsys, "--obvious", "--json")
    assert "--obvious: that loop has one critic step" in refused(capsys, "--obvious", "--n-critic", "2")
    assert "--timed: '0' is no whole number from 1" in refused(capsys, "--timed", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "bench.py is one process: start it with python, not with torchrun" in refused(capsys)


def test_phases_count_for_themselves_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    class Work:
        def pause(self, seconds):
            now[0] += seconds

        def outer(self):
            self.pause(1)
            self.inner(2)
            self.pause(4)

        def inner(self, seconds):
            now[0] += seconds
    work, clock = Work(), bench.Clock(torch.device("cpu"))
    clock.watch(work, "outer", "outer")
    clock.watch(work, "inner", lambda seconds: f"inner {seconds}")

    def step():
        work.outer()
        work.inner(8)
        now[0] += 16
    assert clock.times(step, 2) == [31, 31]
    assert clock.rows == [{"inner 2": 2, "outer": 5, "inner 8": 8, "rest": 16}] * 2
    clock.unwatch()
    assert vars(work) == {} and work.inner.__func__ is Work.inner   # nothing that is captured after it waits


def test_work_grows_with_groups_and_batch_alone():
    s, script, _ = okd_train.parse(["--groups", "4", *TINY])
    okd_train.settle(s, script, set())
    flops, operations = bench.count_work(script, s)
    s.batch_size = 8
    assert bench.count_work(script, s) == (2 * flops, operations)
    s.groups = 6
    assert bench.count_work(script, s) == (3 * flops, operations * 6 // 4)
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with bench.Operations() as count:
        (a @ b).t().relu()
    assert (count.flops, count.n) == (2 * 3 * 4 * 5, 2)             # a product, an activation; a view is none
    x, conv = torch.randn(1, 2, 5, 5, requires_grad=True), torch.nn.Conv2d(2, 3, 3)
    with bench.Operations() as forward:
        y = conv(x)
    with bench.Operations() as backward:
        y.backward(torch.ones_like(y).detach())
    # A bias is added by itself; ones, and the gradients of image, weight and bias.
    assert (forward.n, backward.n) == (2, 1 + 3)


def test_a_gpu_is_not_waited_for_between_two_steps(monkeypatch):
    """A device that works 3 s on what takes the host 1 s: a step lasts 3 s, and the host has asked once before and once
    after all of them."""
    now, done, waits = [0.0], [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(now[0], done[0])

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    def step():
        now[0] += 1
        done[0] = max(now[0], done[0]) + 3
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(now.__setitem__(0, max(now[0], done[0]))))
    assert bench.Clock(torch.device("cuda")).pace(step, 4) == [4, 3, 3, 3] and len(waits) == 2


def test_a_graph_is_captured_without_phases_and_timed_last(photos, capsys, monkeypatch):
    """On a device that lets itself be captured: what a replay does is done eagerly here."""
    order = []

    def record_parts(graph):
        trainer = graph.parts[0][0].func.__self__
        assert "generate" not in vars(trainer) and trainer.step_count == bench.WARM_UP + 2 * 3
        assert okd_train.kernel("attention").LAUNCHES_ARE_FREE      # whatever trainers were made since
        graph.graphs, graph.replays = ["a graph"], [part for part, _ in graph.parts]
        order.append("captured")
    monkeypatch.setattr(okd_train.Trainer, "obstacle", lambda self: None)
    monkeypatch.setattr(okd_train.kernel("cuda_graph").StepGraph, "record_parts", record_parts)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: order.append("peak from here"))
    monkeypatch.setattr(bench, "gpu_trace", lambda step, n: (100, 0.5) if step.__name__ == "step" else None)
    bench.main(["--timed", "3", "--json", "--groups", "2", *TINY, "--data", str(photos)])
    r = json.loads(capsys.readouterr().out)
    assert order == ["peak from here", "captured"] and r["gpu_busy_share"] == 0.5
    assert r["graph_seconds"] == sorted(r["graph_seconds"]) and r["step_seconds"] == r["graph_seconds"][1]
    assert r["graph_note"].startswith("Steps run as 1 CUDA graph") and r["launches_per_step"] > 1000


def test_the_comparison_with_the_obvious_loop_runs(photos, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench.main(["--obvious", "--rounds", "1", "--timed", "1", *TINY, "--data", str(photos)])
    lines = capsys.readouterr().out.splitlines()[1:]
    rows = {line.split()[0]: list(map(float, line.split()[1:4])) for line in lines}
    assert rows.keys() == {"obvious", "ours"} and rows["ours"][1] == 1
    assert all(v > 0 for row in rows.values() for v in row)


def test_turns_are_compared_pair_by_pair(capsys, monkeypatch):
    """A machine that is twice as slow in its second turn."""
    seconds = iter((1, 4, 2, 8, 2, 12))
    calls = []

    def result(words):
        calls.append(words[-1])
        return {"seconds": next(seconds), "peak_memory_bytes": 2e9}
    monkeypatch.setattr(bench, "result", result)
    bench.compare(["b"], 3, ["bench.py"], {"b": "slow"})
    ours, b = capsys.readouterr().out.splitlines()[1:]
    assert calls == ["--variant=ours", "--variant=b"] * 3
    assert ours.split() == ["ours", "2.000", "1.000", "2.00"] and b.split() == ["b", "8.000", "0.250", "2.00", "slow"]


def test_a_failed_variant_says_why_in_one_line(photos, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = refused(capsys, "--obvious", *TINY, "--data", photos, "--batch-size", "17")
    assert "bench.py --variant=ours failed: bench.py: error: " in text and "fewer than one batch" in text


@pytest.mark.gpu
def test_gpu_benchmark_measures_the_graph(capsys):
    bench.main(["--timed", "20", "--json", "--groups", "2", "--batch-size", "8", "--cuda-graph", "on"])
    r = json.loads(capsys.readouterr().out)
    assert 0 < r["graph_seconds"][1] < r["eager_seconds"][1] and r["step_seconds"] == r["graph_seconds"][1]
    assert 0 < r["gpu_busy_share"] <= 1 and r["launches_per_step"] > 100 and 1e7 < r["peak_memory_bytes"] < 1e11


# ---------------------------------------------------------------------------------------------- tests/bench_*.py
def test_levers_growth_and_ranks_run(photos, capsys, monkeypatch):
    """The processes of a turn run in this one, those of bench_ranks.py are started."""
    levers, ranks = (importlib.import_module(f"tests.{name}") for name in ("bench_step", "bench_ranks"))
    tiny, data = [*TINY, "--groups", "1"], ["--data", str(photos)]

    def result(words):
        program = {"bench_step.py": levers, "bench.py": bench}[Path(words[0]).name]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            program.main(words[1:])
        return json.loads(printed.getvalue())
    monkeypatch.setattr(bench, "result", result)
    levers.main(["--variants", "ours,-cached", "--rounds", "1", "--timed", "1", *tiny, *data])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["variant", "ours", "-cached"]
    monkeypatch.setattr(levers, "GROWTH", ((2, 4, 32), (1, 4, 32)))
    levers.main(["--growth", "--timed", "1", "--ch", "4", "--z-dim", "8", *data])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[1:3]] == [["2", "4", "32"], ["1", "4", "32"]] and rows[1][-1] == "1.00"
    assert all(float(v.rstrip("%")) >= 0 for row in rows[1:3] for v in row)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks.main(["--processes", "1", "--rounds", "1", "--timed", "1", *tiny, *data])
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == "1" and float(row[2]) > 0 and row[3] == "1.000"
    with pytest.raises(SystemExit):
        levers.main(["--variants", "ours,-nothing", *tiny])
    assert "no '-nothing'; there are ours, obvious" in capsys.readouterr().err


def test_every_lever_changes_a_step_that_still_runs(photos, monkeypatch, capsys):
    levers = importlib.import_module("tests.bench_step")
    attention = okd_train.kernel("attention")
    changed = [(okd_train, name) for name in ("kernel", "NORMS_TOGETHER", "keep_freed_memory")]
    changed += [(attention, "FUSED_FROM_N"), (attention, "LAUNCHES_ARE_FREE"), (torch.backends.cudnn, "benchmark")]
    monkeypatch.setattr(okd_train, "keep_freed_memory", lambda: None)
    for name in {**levers.WHOLE, **levers.LEVERS, **levers.GPU_LEVERS}:
        s, script, named = okd_train.parse([*TINY, "--groups", "2", "--data", str(photos)])
        okd_train.settle(s, script, named)
        with monkeypatch.context() as m:
            for owner, attribute in changed:                        # put back after each lever
                m.setattr(owner, attribute, getattr(owner, attribute))
            levers.time_variant(name, s, script, 1)
        assert json.loads(capsys.readouterr().out)["seconds"] > 0, name


# ---------------------------------------------------------------------------------------------- --check
@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    okd_train.main(["--data", str(photos), *TINY, "--groups", "1", "--out", str(out), "--steps", "1"])
    return out


def checked(capsys, *argv):
    """(exit status, {what: (state, detail)}, last line)."""
    status = 0
    capsys.readouterr()
    try:
        bench.main(["--check", *map(str, argv)])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and lines[-2].startswith("Not checked: "), (out, err)
    assert all(x[:6] in ("ok    ", "note  ", "FAIL  ") for x in lines[:-2]), out
    table = {}
    for x in lines[:-2]:
        table.setdefault(x[6:20].strip(), []).append((x[:4].strip(), x[20:]))
    return status, table, lines[-1]


@pytest.fixture
def no_pair(monkeypatch):
    """The two processes are started in one test only: they take seconds."""
    monkeypatch.setattr(bench, "check_processes", lambda plan: [])


def test_check_on_a_machine_that_is_ready(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(photos.parent))      # torch's own, made if nothing made it before
    Image.new("RGB", (20, 32)).save(photos / "Crack" / "small.png")
    try:
        status, table, last = checked(capsys, "--model", "acgan", "--data", photos, *TINY, "--groups", "3",
                                      "--steps", "100", "--out", tmp_path / "a" / "run")
    finally:
        (photos / "Crack" / "small.png").unlink()
    assert (status, last) == (0, "ready") and not list(tmp_path.iterdir())
    assert {"python", "packages", "cpu", "device", "attention", "gloo", "FID weights", "data", "training", "resume",
            "sampling", "out"} <= table.keys()
    assert table["gloo"] == [("ok", "2 processes on this machine add up")]
    assert "bit for bit" in table["resume"][0][1] and table["resume"][0][0] == "ok"
    assert table["sampling"] == [("ok", "4 of 4 images drawn by the saved generators")]
    assert "17 images" in table["data"][0][1] and "2 classes" in table["data"][0][1]
    assert table["data"][1] == ("note", "1 images have a side below 32 and are enlarged")
    assert "2 of 3 groups" in table["training"][0][1] and "a step" in table["training"][0][1]


def test_check_counts_what_a_run_writes(photos, tmp_path, capsys, no_pair, monkeypatch):
    """A real run stays below the bound, and not by much; with less room the answer is no."""
    argv = ["--data", photos, *TINY, "--groups", "3", "--steps", "20", "--sample-every", "2", "--log-every", "2",
            "--out", tmp_path / "run"]
    okd_train.main([*map(str, argv)])
    written = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file())
    checkpoint = (tmp_path / "run" / "checkpoint.pt").stat().st_size
    shutil.rmtree(tmp_path / "run")
    room = lambda free: monkeypatch.setattr(bench.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=free))
    room(written)
    seen, check_out = [], bench.check_out
    monkeypatch.setattr(bench, "check_out", lambda plan: (seen.append(plan), list(check_out(plan)))[1])
    status, table, last = checked(capsys, *argv)
    assert status == 1 and last == "not ready: out"
    assert table["out"][0][0] == "FAIL" and "free some" in table["out"][0][1]
    assert seen[0].sizes["checkpoint"] * 3 == pytest.approx(checkpoint, rel=0.02)
    room(written + 0.9 * checkpoint)                                # the new checkpoint stands beside the old one
    assert list(check_out(seen[0]))[0][0] == "FAIL"
    room(written + 1.5 * checkpoint)
    assert list(check_out(seen[0]))[0][0] == "ok"


def break_data(case, photos, tmp_path, monkeypatch):
    """The folder to give as --data."""
    if case == "nowhere":
        return tmp_path / "nowhere"
    if case == "bad":
        shutil.copytree(photos, tmp_path / "data")
        (tmp_path / "data" / "Crack" / "0.png").write_bytes(b"")
        return tmp_path / "data"
    return photos / "Crack" if case == "loose" else photos


def break_code(case, monkeypatch):
    """What is wrong with the programs themselves, or with what is installed."""
    version, generate = importlib.metadata.version, okd_train.generate
    load = okd_train.Trainer.load_state

    def other_version(name):
        if case == "missing" and name == "pillow":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2" if case == "old" and name == "numpy" else version(name)

    def untrue_load(self, states, step):
        load(self, states, step)
        self.groups[0].nets["D"].params[0].data.add_(1e-6)

    def wrong_attention(q, k, v, **_):
        return (torch.softmax(q.transpose(1, 2) @ k, 1) @ v.transpose(1, 2)).transpose(1, 2)

    monkeypatch.setattr(importlib.metadata, "version", other_version)
    if case == "attention":
        monkeypatch.setattr(okd_train.kernel("attention"), "self_attention", wrong_attention)
    if case == "resume":
        monkeypatch.setattr(okd_train.Trainer, "load_state", untrue_load)
    if case == "sampling":
        monkeypatch.setattr(okd_train, "generate", lambda G, z, y=None: generate(G, z, y)[:1 if len(z) == 2 else None])


@pytest.mark.parametrize("case, what, words", [
    ("nowhere", "data", "no such folder"), ("bad", "data", "1 unreadable, such as"),
    ("few", "data", "are fewer than one batch"), ("loose", "data", "class folders"),
    ("device", "device", "--device cuda:99"), ("run", "out", "already holds a run"),
    ("file", "out", "no folder that can be written to"), ("attention", "attention", "the kernels are wrong"),
    ("resume", "resume", "not bit for bit"), ("old", "numpy", "is older than"),
    ("missing", "pillow", "not installed; needed"), ("sampling", "sampling", "1 of 2 images"),
    ("weights", "FID weights", "none.pth"), ("reals", "scores", "no such folder")])
def test_check_says_what_is_missing(case, what, words, photos, finished, tmp_path, capsys, no_pair, monkeypatch):
    if case not in ("resume", "sampling", "device"):                # the others are about what is outside of training
        monkeypatch.setattr(bench, "check_training", lambda plan: [])
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FID_WEIGHTS", str(tmp_path / "none.pth"))
    argv = {"few": ["--batch-size", "17"], "loose": ["--model", "acgan"], "device": ["--device", "cuda:99"],
            "run": ["--out", finished], "file": ["--out", tmp_path / "file" / "run"], "weights": ["--fid-every", "5"],
            "reals": ["--fid-every", "5", "--fid-features", "random", "--fid-data", tmp_path / "nowhere"]}
    data = break_data(case, photos, tmp_path, monkeypatch)
    break_code(case, monkeypatch)
    status, table, last = checked(capsys, "--data", data, *TINY, "--groups", "1", "--out", tmp_path / "run",
                                  *argv.get(case, []))
    assert status == 1 and last == f"not ready: {what}"
    assert any(state == "FAIL" and words in detail for state, detail in table[what]), table[what]
    assert not (tmp_path / "run").exists()


def test_check_opens_a_part_of_many_images(photos, monkeypatch):
    found = fid.class_images(photos) * 100
    monkeypatch.setattr(fid, "class_images", lambda folder, say=None: found)
    s, script, _ = okd_train.parse(["--data", str(photos), *TINY])
    plan = bench.Plan(s, script, torch.device("cpu"), None)
    (state, _, text), = bench.check_data(plan)
    assert state == "note" and text.startswith("1600 images") and text.endswith("; 800 of them were opened")
    assert plan.images == 1600


def test_check_names_a_pair_of_processes_that_fails(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "PAIR", "raise SystemExit('no network')")
    monkeypatch.setattr(bench, "check_training", lambda plan: [])
    for more, state in (([], "note"), (["--nproc", "2"], "FAIL")):
        argv = ["--data", photos, *TINY, "--groups", "1", "--out", tmp_path / "run", *more]
        status, table, last = checked(capsys, *argv)
        assert table["gloo"][0][0] == state and "no network" in table["gloo"][0][1] and status == (state == "FAIL")


def test_check_is_for_one_process_before_a_run(photos, capsys, monkeypatch):
    for more in (["--obvious"], ["--json"]):
        assert f"{more[0]}: without effect with --check" in refused(capsys, *TINY, "--data", photos, "--check", *more)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not with torchrun" in refused(capsys, *TINY, "--data", photos, "--check")


# ---------------------------------------------------------------------------------------------- beside other files
def test_alone_it_says_what_it_needs(root, tmp_path):
    """Also where another program's okd_train can be imported."""
    shutil.copy(root / "bench.py", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "okd_train.py").write_text("raise SystemExit('the wrong one')\n")
    env = dict(ENV, PYTHONPATH=str(tmp_path / "elsewhere"))
    run = lambda *argv: subprocess.run([sys.executable, "bench.py", *argv], cwd=tmp_path, env=env, capture_output=True,
                                       text=True, timeout=60)
    p = run("--check")
    assert p.returncode == 2 and p.stderr == "bench.py: error: timing a step needs okd_train.py beside bench.py\n"
    p = run("--help")
    assert p.returncode == 0 and "--timed K" in p.stdout and p.stderr == ""


def test_anothers_okd_train_does_not_fool_it(root, tmp_path):
    (tmp_path / "okd_train.py").write_text("raise SystemExit('the wrong one')\n")
    env = dict(ENV, PYTHONPATH=str(tmp_path))
    p = subprocess.run([sys.executable, "-P", root / "bench.py", "--timed", "0"], cwd=tmp_path, env=env,
                       capture_output=True, text=True, timeout=60)
    assert p.returncode == 2 and "no whole number" in p.stderr


# ---------------------------------------------------------------------------------------------- .ci/gpu
class Accepted(BaseException):
    """Raised in place of the work, once a parser has taken its arguments."""


def gpu_commands(root):
    """Every command that .ci/gpu starts, as words; $more, which is a flag or nothing, as the flag."""
    lines = re.findall(r"^ +(?:try \S+ \d+ )?((?:python|pytest) .*)$", (root / ".ci" / "gpu").read_text(), re.M)
    return [shlex.split(line.replace("$more", "--resume").replace("$2", "crops")) for line in lines]


def test_the_gpu_script_gives_flags_that_are_taken(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse_args = bench.argparse.ArgumentParser.parse_args

    def taken(parser, *args, **more):
        parse_args(parser, *args, **more)
        raise Accepted
    found = gpu_commands(root)
    assert len(found) >= 11
    for program, *argv in found:
        files = [a for a in argv if a.startswith("tests/")]
        assert all((root / file).is_file() for file in files), argv
        if program == "pytest":
            assert files
            continue
        name, argv = (argv[1], argv[2:]) if argv[0] == "-m" else (argv[0].removesuffix(".py"), argv[1:])
        if name == "bench":
            bench.arguments(argv)                                   # takes them, and finds none without effect
            continue
        module = importlib.import_module(name.replace("/", "."))
        with monkeypatch.context() as m, pytest.raises(Accepted):
            m.setattr(bench.argparse.ArgumentParser, "parse_args", taken)
            m.setattr(sys, "argv", [name, *argv])
            module.main()


def test_the_gpu_scripts_calls_stay_below_ten_minutes(root):
    text = (root / ".ci" / "gpu").read_text()
    step, rest = text.split('if [ "$1" = step ]; then')[1].split("else")
    for part in (step, rest):
        calls = re.findall(r"^ +try \S+ (\d+) (.*)", part, re.M)
        together = [int(seconds) for seconds, words in calls if " &" in words]
        assert 0 < sum(int(seconds) for seconds, words in calls if " &" not in words) + max(together, default=0) <= 570
    assert 0 < int(re.search(r"--max-seconds (\d+)", text)[1]) <= 570
