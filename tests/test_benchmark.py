"""okd_train.py --benchmark: what it says is what it measured and counted. Speed itself is never asserted."""
import json
import subprocess
import sys

import pytest
import torch

import okd_train
from test_okd_train import TINY, refused

pytestmark = pytest.mark.usefixtures("one_thread")


def test_json_holds_what_was_measured(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    okd_train.main(["--benchmark", "3", "--json", "--groups", "2", *TINY, "--data", str(photos)])
    r = json.loads(capsys.readouterr().out)
    assert {"step_seconds", "images_per_second", "peak_memory_bytes", "launches_per_step", "flops_per_step", "floor_share"} <= r.keys()
    assert r["images_per_second"] == pytest.approx(2 * 4 / r["step_seconds"]) and r["seconds_for_50000_steps"] == pytest.approx(50000 * r["step_seconds"])
    assert r["floor_share"] == pytest.approx(r["flops_per_step"] / max(r["matmul_flops_per_second"], r["convolution_flops_per_second"]) / r["step_seconds"])
    assert r["step_seconds"] == (r["graph_seconds"] or r["eager_seconds"])[1] and r["eager_seconds"] == sorted(r["eager_seconds"])
    assert {"inputs", "generators forward", "discriminators", "connectors", "generators learning", "Adam", "averages", "rest"} == r["phase_seconds"].keys()
    assert all(v[1] > 0 for v in r["phase_seconds"].values()) and 1e8 < r["peak_memory_bytes"] < 1e11
    assert list(tmp_path.iterdir()) == []                           # nothing is trained, nothing is left


def test_the_table_names_phases_and_the_papers_run(photos, capsys, monkeypatch):
    monkeypatch.setattr(okd_train, "resource", None)                # a system that does not say how much memory there was
    okd_train.main(["--benchmark", "2", "--model", "acgan", "--groups", "1", *TINY, "--data", str(photos)])
    text = capsys.readouterr().out
    for words in ("acgan, groups 1, batch 4, 32x32", "discriminators", "step, eager", "GFLOP a step", "The paper's 50,000 steps take"):
        assert words in text
    assert "connectors" not in text and "peak memory" not in text


def test_what_has_no_effect_beside_it_is_refused(photos, capsys, monkeypatch):
    assert "--json: without effect without --benchmark" in refused(capsys, "--json")
    assert "--out, --steps: without effect with --benchmark" in refused(capsys, "--benchmark", "--steps", "3", "--out", "x")
    assert "--benchmark is 0" in refused(capsys, "--benchmark", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--benchmark is done by one process" in refused(capsys, "--benchmark")


def test_phases_count_for_themselves_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(okd_train.time, "perf_counter", lambda: now[0])

    class Work:
        def pause(self, seconds):
            now[0] += seconds

        def outer(self):
            self.pause(1)
            self.inner(2)
            self.pause(4)

        def inner(self, seconds):
            now[0] += seconds
    work, clock = Work(), okd_train.Clock(torch.device("cpu"))
    clock.watch(work, "outer", "outer")
    clock.watch(work, "inner", lambda seconds: f"inner {seconds}")

    def step():
        work.outer()
        work.inner(8)
        now[0] += 16
    assert clock.times(step, 2) == [31, 31]
    assert clock.rows == [{"inner 2": 2, "outer": 5, "inner 8": 8, "rest": 16}] * 2


def test_work_grows_with_groups_and_batch_alone():
    s, script, _ = okd_train.parse(["--groups", "4", *TINY])
    okd_train.settle(s, script, set())
    flops, operations = okd_train.count_work(script, s)
    s.batch_size = 8
    assert okd_train.count_work(script, s) == (2 * flops, operations)
    s.groups = 6
    assert okd_train.count_work(script, s) == (3 * flops, operations * 6 // 4)
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with okd_train.Operations() as count:
        (a @ b).t().relu()
    assert (count.flops, count.n) == (2 * 3 * 4 * 5, 2)             # a product, an activation; a view is none
    x, conv = torch.randn(1, 2, 5, 5, requires_grad=True), torch.nn.Conv2d(2, 3, 3)
    with okd_train.Operations() as forward:
        y = conv(x)
    with okd_train.Operations() as backward:
        y.backward(torch.ones_like(y).detach())
    assert (forward.n, backward.n) == (2, 1 + 3)                    # a bias is added by itself; ones, and the gradients of image, weight and bias


def test_the_comparison_with_the_obvious_loop_runs(root):
    p = subprocess.run([sys.executable, root / "tests" / "bench_step.py", "--variants", "obvious,ours", "--rounds", "1", "--steps", "1", *TINY],
                       capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, p.stderr
    rows = {line.split()[0]: list(map(float, line.split()[1:4])) for line in p.stdout.splitlines()[2:]}
    assert rows.keys() == {"obvious", "ours"} and rows["ours"][1] == 1 and all(v > 0 for row in rows.values() for v in row)


def test_a_gpu_is_not_waited_for_between_two_steps(monkeypatch):
    """A device that works 3 s on what takes the host 1 s: a step lasts 3 s, and the host has asked once before and once after all of them."""
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
    assert okd_train.Clock(torch.device("cuda")).pace(step, 4) == [4, 3, 3, 3] and len(waits) == 2


@pytest.mark.gpu
def test_gpu_benchmark_measures_the_graph(capsys):
    okd_train.main(["--benchmark", "20", "--json", "--groups", "2", "--batch-size", "8", "--cuda-graph", "on"])
    r = json.loads(capsys.readouterr().out)
    assert 0 < r["graph_seconds"][1] < r["eager_seconds"][1] and r["step_seconds"] == r["graph_seconds"][1]
    assert 0 < r["gpu_busy_share"] <= 1 and r["launches_per_step"] > 100 and 1e7 < r["peak_memory_bytes"] < 1e11
