"""compare.py: statistics on hand-made numbers, a whole tiny study, what chooses in it, how it goes on, mistakes."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import bench
import compare
import fid
import okd_train
from conftest import noise

TINY = ["--model", "acgan", "--image-size", "32", "--ch", "4", "--batch-size", "4", "--steps", "4", "--log-every", "1",
        "--save-every", "1"]
BLOCKS = """
import torch
class Features(torch.nn.Module):
    size, dims, digest = 8, 12, "blocks"
    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 4).flatten(1)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photos/train, val and test of noise in two classes, and a file of features."""
    folder = tmp_path_factory.mktemp("compare")
    for part, n in (("train", 8), ("val", 6), ("test", 7)):
        noise(folder / "photos" / part, ("Crack", "Rust"), n)
    (folder / "blocks.py").write_text(BLOCKS)
    return folder


def command(place, out, *more):
    features = ["--features", str(place / "blocks.py")]
    return [*TINY, "--data", str(place / "photos"), *features, "--jobs", "1", "--out", str(out), "--seeds", "2", *more]


class InThread:
    """In place of a process of its own: the trainer in this one, which is there already."""
    returncode = 0

    def __init__(self, argv, **settings):
        self.argv = argv[2:]

    def communicate(self):
        okd_train.run(self.argv)
        return "", ""


def in_threads(patch):
    patch.setattr(subprocess, "Popen", InThread)
    patch.setattr(okd_train, "ending_signals", list)                # a thread cannot hear signals


@pytest.fixture(scope="module")
def study(place):
    """A whole study of two seeds. That real processes give the same is seen where one is killed."""
    with pytest.MonkeyPatch.context() as patch:
        in_threads(patch)
        compare.main(command(place, place / "study"))
    return place / "study"


def results(study):
    lines = map(json.loads, (study / "results.jsonl").read_text().splitlines())
    return {(line["arm"], line["seed"]): line for line in lines}


def refused(capsys, argv):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as e:
        compare.main(argv)
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(err) == 1 and err[0].startswith("compare.py: error: ")
    return err[0]


# ---------------------------------------------------------------------------------------------- statistics
def test_the_interval_is_the_paired_t_tests():
    r = np.random.default_rng(0)
    for n in (2, 3, 10, 40):
        a, b = 90 + r.standard_normal(n), 100 + r.standard_normal(n)
        p, t = compare.paired(a, b), stats.ttest_rel(a, b)
        assert np.allclose([p["low"], p["high"]], np.array(t.confidence_interval(0.95)) / b.mean())
        assert p["n"] == n and p["difference"] == pytest.approx((a.mean() - b.mean()) / b.mean())
    assert compare.paired(a, b) == pytest.approx(compare.paired(1000 * a, 1000 * b))
    against_nothing = compare.paired([0.30, 0.31, 0.32], [0.0, 0.0, 0.0])
    assert compare.verdict(against_nothing, "higher").startswith("shown better at n = 3: +inf %")


def test_no_difference_is_a_false_alarm_once_in_twenty():
    """Runs of a seed have much in common, and the run is the unit."""
    r = np.random.default_rng(1)
    for n in (6, 12):
        seeds = 130 + 20 * r.standard_normal((500, 1, n))
        found = [compare.paired(*pair) for pair in seeds + 5 * r.standard_normal((500, 2, n))]
        assert 0.025 <= np.mean([p["low"] > 0 or p["high"] < 0 for p in found]) <= 0.075


@pytest.mark.parametrize("n", [2, 5, 10])
def test_the_least_difference_is_found_four_times_out_of_five(n):
    a = np.linspace(-1, 1, n)
    least = compare.paired(100 + a / a.std(ddof=1), np.full(n, 100.0))["detectable"] * 100       # deviation 1
    r = np.random.default_rng(2)
    found = stats.ttest_1samp(least + r.standard_normal((4000, n)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)


def test_verdicts_in_plain_words():
    lower = {"n": 10, "difference": -0.12, "low": -0.2, "high": -0.04, "detectable": 0.1, "lower": 9}
    higher = {**lower, "difference": 0.12, "low": 0.04, "high": 0.2}
    words = "at n = 10: -12.0 % (95 % interval -20.0 to -4.0 %), lower on 9 seeds"
    assert compare.verdict(lower, "lower") == f"shown better {words}"
    assert compare.verdict(lower, "lower", asked=False) == f"points to better {words}"
    assert compare.verdict(higher, "higher").startswith("shown better at n = 10: +12.0 %")
    assert compare.verdict(lower, "higher").startswith("shown worse") and "worse" in compare.verdict(higher, "lower")
    even = {**lower, "high": 0.01, "detectable": 0.0612}
    words = words.replace("-4.0", "+1.0") + "; differences under 6.1 % would not be seen"
    assert compare.verdict(even, "lower") == compare.verdict(even, "higher") == f"not told apart {words}"
    assert "under 120 %" in compare.verdict({**even, "detectable": 1.23}, "lower")


def test_two_questions_are_asked():
    """A further arm is compared with its own kind and with alone, and only points to something."""
    r = np.random.default_rng(3)
    study = type("Study", (), {"arms": dict.fromkeys([*compare.ARMS, "ring:rho=0.1", "alone:ch=8"]), "results": {}})
    for k, arm in enumerate(study.arms):
        for seed in range(5):
            study.results[arm, seed] = {part: {"distance": 100 + k + 0.1 * r.standard_normal(), "kid": 5.0 - k,
                                               "variety": 1.0 + k}
                                        for part in compare.MEASURES}
    rows = compare.comparisons(study, ["distance", "kid", "variety"])
    assert {row[3] for row in rows} == {"distance", "kid"}          # more variety than the photos' is not better
    asked = {row[:4] for row in rows if row[5].startswith("shown better")}
    assert asked == {("ring", other, "mean", "distance") for other in ("alone", "single")}
    assert all("points to" in row[5] for row in rows if row[:4] not in asked)
    further = {row[:2] for row in rows} - {("alone", "single"), *compare.QUESTIONS}
    assert further == {("ring:rho=0.1", "ring"), ("ring:rho=0.1", "alone"), ("alone:ch=8", "alone")}


def test_seeds_are_the_pairs():
    line = lambda v: {"mean": {"distance": v}}
    found = {("ring", k): line(10 * k + 9) for k in (1, 2, 3, 4)}
    found.update({("alone", k): line(10 * k + 10) for k in (4, 3, 2, 5)})
    p = compare.comparison(found, "ring", "alone", "mean", "distance")
    assert p["n"] == p["lower"] == 3 and p["difference"] == p["low"] == p["high"] == -1 / 40
    assert compare.comparison(found, "ring", "single", "mean", "distance") is None


def test_the_time_of_a_run_that_was_stopped_is_that_of_all_its_parts():
    log = [{"seconds": s} for s in (1.0, 2.5, 4.0, 0.5, 3.0, 0.25)]
    assert compare.trained_for(log) == 4.0 + 3.0 + 0.25 and compare.trained_for(log[:3]) == 4.0


def test_published_tables_are_those_of_the_results(root):
    """The rows of tests/README.md on a study, and its answers to the two questions, come out of tests/results/."""
    page, files = " ".join((root / "tests/README.md").read_text().split()), sorted(root.glob("tests/results/*.jsonl"))
    assert files
    for file in files:
        lines = okd_train.read_lines(file)
        results = {(line["arm"], line["seed"]): line for line in lines}
        assert len(results) == len(lines) and f"`{file.relative_to(root)}`" in page
        found = SimpleNamespace(arms=dict.fromkeys(arm for arm, _ in results), results=results, runs=list(results))
        labels = ["labels"] * ("labels" in lines[0]["mean"])
        for row in compare.rows_of_arms(found, "distance"):
            further = [compare.mean_and_deviation(list(compare.values(results, row[0], "mean", score).values()))
                       for score in ("kid", "coverage", "variety", *labels, "apart")]
            assert " ".join(f"| {' | '.join(map(str, [*row, *further]))} |".split()) in page, file
        answers = [line for line in compare.findings(found) if re.match("ring against (alone|single), mean: ", line)]
        assert len(answers) == 2 and all(answer in page for answer in answers), answers


# ---------------------------------------------------------------------------------------------- a whole study
def test_arms_are_paired_and_single_has_the_rings_arithmetic(study):
    """In the first step nothing but rho differs, and a group alone is the first of the groups alone, bit for bit."""
    for seed in (0, 1):
        ring, alone, single = (okd_train.read_lines(study / f"runs/{arm}-seed{seed}/log.jsonl") for arm in compare.ARMS)
        for a, b in zip(ring[0]["groups"], alone[0]["groups"]):
            assert a["d_loss"] == b["d_loss"] and a["c_loss"] == b["c_loss"] and a["g_loss"] != b["g_loss"]
        assert ring[2]["groups"][0]["d_loss"] != alone[2]["groups"][0]["d_loss"]
        for a, b in zip(alone, single):
            assert a["groups"][0]["d_loss"] == b["groups"][0]["d_loss"] and a["step"] == b["step"]
    assert len(single) > 15 and ring[0] != okd_train.read_lines(study / "runs/ring-seed0/log.jsonl")[0]


def test_steps_of_equal_arithmetic_are_counted(place, study):
    """Against a count of real steps at the arms' own batch and groups."""
    s, script, named, seeds = compare.arguments(command(place, study))
    judge = lambda s, script: type("Judge", (), {"range": None, "train": okd_train.Data(*okd_train.load_folder(
        place / "photos/train", 32, script.conditional, False, print), s, torch.device("cpu"))})
    s.arms = ["single:batch_size=2", "single:steps=7", "ring:ch=8"]
    arms = {arm.name: arm for arm in compare.make_arms(s, script, named, judge)}
    counts = {}
    for name, arm in arms.items():
        arm.s.cuda_graph = "off"
        trainer = okd_train.Trainer(arm.script, arm.s, arm.judge.train, torch.device("cpu"))
        trainer.step()
        with bench.Operations() as count:
            trainer.step()
        counts[name] = count.flops
        assert arm.work == pytest.approx(count.flops, rel=1e-3)
    for name in ("single", "single:batch_size=2"):
        assert arms[name].s.steps == round(4 * counts["ring"] / counts[name])
    assert arms["single:steps=7"].s.steps == 7 and arms["ring:ch=8"].s.steps == 4
    assert arms["single"].s.steps == results(study)["single", 0]["step"] > 15
    assert arms["ring:ch=8"].s.ch == 8 and arms["ring:ch=8"].s.rho == 0.5 and arms["alone"].s.rho == 0


def test_what_a_study_leaves(study, capsys, place):
    lines = results(study)
    assert list(lines) == [(arm, seed) for seed in (0, 1) for arm in ("ring", "alone", "single")]   # a seed at a time
    for (arm, seed), line in lines.items():
        groups = 1 if arm == "single" else 3
        assert len(line["groups"]) == groups and len(line["validation"]) == 4
        assert [v["step"] for v in line["validation"]][-1] == line["step"]
        best = min((v[f"G{i}"], i) for v in line["validation"] for i in range(1, groups + 1))[1]
        assert line["chosen"]["best"] == best and line["best"] == line["groups"][best - 1]
        for i in range(1, groups + 1):
            assert line["chosen"][f"G{i}"] == min((v[f"G{i}"], v["step"]) for v in line["validation"])[1]
        scores = ["distance", "kid", "coverage", "variety", "labels"]
        assert list(line["best"]) == list(line["union"]) == scores and line["score"] == "FD (blocks)"
        for score in scores:
            assert line["mean"][score] == pytest.approx(np.mean([of[score] for of in line["groups"]]))
        assert ("c_w" in line["mean"]) == ("apart" in line["mean"]) == (arm != "single")
        assert 0 <= line["best"]["labels"] <= 1
        assert line["mean"] == line["best"] == line["union"] or arm != "single"
        folder = study / f"runs/{arm}-seed{seed}"
        assert not (folder / "checkpoint.pt").exists() and "photos/test" not in (folder / "args.json").read_text()
        assert line["git"] == okd_train.git_revision() and line["seconds"] == round(
            okd_train.read_lines(folder / "log.jsonl")[-1]["seconds"])
    page = (study / "study.html").read_text()
    assert "ring against alone, mean: " in page and "TFLOP" in page and "178.92" in page and "data:image/png" in page
    assert "photos against as many others" in page and "FD (blocks)" in page
    assert Image.open(study / "study.png").width > 800
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*.pt")}
    compare.main(command(place, study))                             # given again: the tables, and nothing is trained
    out = capsys.readouterr().out
    assert "ring against single, best: " in out and "the paper's one group" in out and "172.13" in out
    assert before == {path: path.stat().st_mtime_ns for path in study.rglob("*.pt")}
    assert lines == results(study)


def test_scores_are_those_of_the_generators_files(place, study):
    """FD and labels of the best group's and of all groups' images, drawn and scored here by other means."""
    line, run = results(study)["ring", 1], study / "runs/ring-seed1"
    net = fid.network(str(place / "blocks.py"))
    real = fid.features(str(place / "photos/test"), model=net)
    features = []
    for i in (1, 2, 3):
        G = okd_train.load_generator(run / f"G{i}.best.pt")
        z = torch.cat([okd_train.draw(1, k, 0, "test", "normal", (50, 128)) for k in range(6)])
        images = okd_train.generate(G, z, torch.arange(300) % 2)
        features.append(fid.features(images, model=net))
        assert line["groups"][i - 1]["distance"] == pytest.approx(fid.frechet_distance(real, features[-1]), rel=1e-5)
    union = np.concatenate([f[100 * k:100 * k + 100] for k, f in enumerate(features)])
    assert line["union"]["distance"] == pytest.approx(fid.frechet_distance(real, union), rel=1e-5)
    assert line["union"]["kid"] == pytest.approx(fid.kernel_distance(real, union)[0], rel=1e-3)
    apart = [fid.kernel_distance(features[i][:150], features[j][150:])[0] for i in range(3) for j in range(3) if i != j]
    assert line["mean"]["apart"] == pytest.approx(np.mean(apart), rel=1e-3)


def test_a_trap_in_the_test_part_changes_no_choice(place, study, tmp_path):
    """The test photos are images of a generator that was not chosen: it wins there, and is not chosen all the same."""
    run, line = study / "runs/alone-seed0", results(study)["alone", 0]
    other = line["chosen"]["best"] % 3 + 1
    G = okd_train.load_generator(run / f"G{other}.best.pt")
    z = okd_train.draw(0, 0, 0, "trap", "normal", (80, 128))
    images = okd_train.generate(G, z, torch.arange(80) % 2)
    for k, image in enumerate(images):
        path = tmp_path / "trap" / ("Crack", "Rust")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    s, script, _ = okd_train.read_run(run)
    parts = {**{part: str(place / "photos" / part) for part in ("train", "val")}, "test": str(tmp_path / "trap")}
    judge = compare.Judge(parts, s, script, str(place / "blocks.py"), torch.device("cpu"), tmp_path)
    found = compare.score_run(run, judge)
    distances = [of["distance"] for of in found["groups"]]
    assert found["chosen"] == line["chosen"] and found["best"]["distance"] == distances[line["chosen"]["best"] - 1]
    assert distances[other - 1] == min(distances) < 0.5 * found["best"]["distance"]
    assert found["groups"][other - 1]["variety"] == pytest.approx(1, abs=0.15)


# ---------------------------------------------------------------------------------------------- going on
def test_a_killed_study_goes_on_and_ends_the_same(place, study, tmp_path, monkeypatch, capsys):
    """compare.py and its trainer are killed in a run; the next start finishes that run from its checkpoint."""
    out, run = tmp_path / "study", tmp_path / "study/runs/single-seed1"
    shutil.copytree(study, out)
    whole = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(whole[:-1]) + whole[-1][:40])        # the last was being written
    shutil.rmtree(run)
    p = subprocess.Popen([sys.executable, compare.__file__, *command(place, out)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    trainer = int((run / ".lock").read_text().split()[1])
    for pid in (p.pid, trainer):
        os.kill(pid, signal.SIGKILL)
    p.wait()
    assert okd_train.load_file(run / "checkpoint.pt")["step"] < results(study)["single", 1]["step"]
    ring = (out / "runs/ring-seed0/G1.best.pt").stat().st_mtime_ns
    in_threads(monkeypatch)
    compare.main(command(place, out))
    ends = [{**of["single", 1], "seconds": 0} for of in (results(out), results(study))]
    assert "Resumed at step" in capsys.readouterr().out
    assert ends[0] == ends[1] and len(results(out)) == 6
    assert ring == (out / "runs/ring-seed0/G1.best.pt").stat().st_mtime_ns


def test_a_trainer_that_was_left_behind_is_waited_for(tmp_path, capsys):
    study = compare.Study(tmp_path, {}, "random", ["cpu"])
    with okd_train.Lock(tmp_path / "run") as lock:
        lock.take(print)
        waiting = threading.Thread(target=study.wait_for_orphan, args=(tmp_path / "run", 0.05))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
    waiting.join(20)
    assert not waiting.is_alive() and capsys.readouterr().out.count("is being trained by process") == 1
    study.stopping = True                                           # Ctrl-C: the trainer works on, we leave
    with pytest.raises(okd_train.UserError, match="stopped"):
        study.wait_for_orphan(tmp_path / "run")


def test_lines_of_two_machines_are_one_study(place, study, tmp_path, capsys):
    """The runs themselves need not be there, and further arms' lines stay."""
    out = tmp_path / "both"
    out.mkdir()
    lines = (study / "results.jsonl").read_text().splitlines(keepends=True)
    foreign = json.dumps({**json.loads(lines[0]), "arm": "ring:rho=0.1"}) + "\n"
    (out / "results.jsonl").write_text("".join(lines[3:] + [foreign] + lines[:3]))
    argv = command(place, out)
    compare.main([*argv, "--seeds", "1"])
    assert "n = 2" in capsys.readouterr().out and not (out / "runs").exists()
    assert len(results(out)) == 7 and "6 runs, 3 asked for" in (out / "study.html").read_text()
    (tmp_path / "other.py").write_text(BLOCKS.replace("blocks", "other"))
    parts = {part: str(place / "photos" / part) for part in ("train", "val", "test")}
    swapped = ["--data", parts["train"], "--val", parts["test"], "--test", parts["val"]]
    for more, words in ((["--batch-size", "5"], "--batch-size 4, not 5"), (["--steps", "3"], "--steps 4, not 3"),
                        (["--features", str(tmp_path / "other.py")], "other photos or features"),
                        (swapped, "other photos or features")):
        assert words in refused(capsys, [*argv, *more])
    line = json.loads(lines[0])
    line.update(arm="ring:rho=0.1", settings={**line["settings"], "rho": 0.1})
    photos = {**line["photos"], "val": "others"}                    # a further arm is a pair of the first ones
    (out / "results.jsonl").write_text("".join(lines) + json.dumps({**line, "photos": photos}) + "\n")
    assert "ring:rho=0.1, seed 0, was made with other photos" in refused(capsys, [*argv, "--arms", "ring:rho=0.1"])


def test_runs_whose_lines_are_gone_are_scored_anew(place, study, tmp_path, capsys, monkeypatch):
    """They are not trained again, and what they were made with is read from the runs themselves."""
    out = tmp_path / "study"
    shutil.copytree(study, out)
    whole = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(whole[1:-1]))
    args = out / "runs/ring-seed0/args.json"
    args.write_text(args.read_text().replace('"flip": false', '"flip": true'))
    monkeypatch.setattr(subprocess, "Popen", None)
    words = refused(capsys, command(place, out))
    assert "1 runs failed" in words and "ring, seed 0, was made with --flip True, not False" in words
    page = (out / "study.html").read_text()
    assert "1 of 6 runs are not finished: these may yet change." in page and "not finished" not in (
        study / "study.html").read_text()
    found, before = results(out), results(study)
    assert {**found["single", 1], "seconds": 0} == {**before["single", 1], "seconds": 0} and len(found) == 5
    (out / "results.jsonl").unlink()
    assert "begun with --steps 4, not 3" in refused(capsys, command(place, out, "--steps", "3", "--seeds", "1-1"))


def test_photos_that_are_read_otherwise_are_another_test(place, tmp_path):
    parts = {part: str(place / "photos" / part) for part in ("train", "val", "test")}
    study = compare.Study(tmp_path, parts, str(place / "blocks.py"), ["cpu"])
    judges = []
    for more in ([], ["--upright"], ["--range", "0", "255"], ["--image-size", "64"], ["--batch-size", "3"]):
        s, script, _ = okd_train.parse(["--model", "sagan", "--image-size", "32", *more])
        judges.append(study.judge(s, script))
    assert len(set(map(id, judges))) == 4 and judges[0] is judges[4]


def test_a_study_is_of_the_photos_features_and_script_it_was_begun_with(place, study, tmp_path, capsys, monkeypatch):
    """Each is looked at before a run starts, also those whose earlier runs are not there."""
    monkeypatch.setattr(subprocess, "Popen", None)
    out = tmp_path / "study"
    out.mkdir()
    shutil.copyfile(study / "results.jsonl", out / "results.jsonl")
    parts = {part: str(place / "photos" / part) for part in ("train", "val", "test")}
    for part, flag in (("train", "--data"), ("val", "--val")):
        other = tmp_path / part
        shutil.copytree(parts[part], other)
        Image.new("RGB", (32, 32)).save(next(other.rglob("*.png")))
        argv = [*command(place, out), "--data", parts["train"], "--val", parts["val"], "--test", parts["test"]]
        assert "other photos or features" in refused(capsys, [*argv, flag, str(other)])
    (tmp_path / "blocks.py").write_text(BLOCKS.replace("avg_pool", "max_pool"))
    assert "other photos or features" in refused(capsys, [*command(place, out), "--features",
                                                          str(tmp_path / "blocks.py")])
    shutil.copytree(study / "runs", out / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(compare, "text_of", lambda script: "edited since")
        assert "another text of acgan.py" in refused(capsys, command(place, out))
        (out / "results.jsonl").unlink()
        assert "begun with another text of acgan.py" in refused(capsys, command(place, out))
    compare.main(command(place, out))                               # as it was


def test_lines_that_are_not_whole_and_scores_that_are_gone(place, study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    out = tmp_path / "study"
    shutil.copytree(study, out)
    whole = (out / "results.jsonl").read_text().splitlines(keepends=True)
    for line in ({"step": 4, "arm": "ring", "seed": 7}, {"step": 4, "arm": ["ring"], "seed": 7}):
        (out / "results.jsonl").write_text("".join(whole) + json.dumps(line) + "\n")
        assert "seed 7, is not whole" in refused(capsys, command(place, out))
    (out / "results.jsonl").write_text("".join(whole[1:]))
    (out / "runs/ring-seed0/fid.jsonl").unlink()
    assert "has lost its scores" in refused(capsys, command(place, out))


def test_photos_of_16_bit_and_grey_ones_are_read_as_in_training(tmp_path, place, monkeypatch):
    """Their range, and whether all to learn from are grey, is that of --data, whatever the others are."""
    for part, low in (("train", 0), ("val", 5000), ("test", 9000)):
        for k in range(12):
            path = tmp_path / part / "ab"[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(k).integers(low, 60000 - low, (32, 32)).astype(np.uint16)
            Image.fromarray(pixels).save(path)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "test/a/colour.png")
    in_threads(monkeypatch)
    out = tmp_path / "study"
    argv = command(place, out, "--recipe", "small", "--seeds", "1", "--data", str(tmp_path))
    compare.main(argv)
    assert len(results(out)) == 3 and results(out)["ring", 0]["settings"]["channels"] == 1
    compare.main(argv)


def test_a_run_that_fails_holds_up_no_other(place, tmp_path, capsys, monkeypatch):
    out = tmp_path / "study"
    study = compare.Study(out, {"test": str(place / "photos/test")}, str(place / "blocks.py"), ["cpu"])
    study.arms = dict.fromkeys(("a", "b"))
    study.runs = [("a", 0), ("b", 0)]
    monkeypatch.setattr(study, "share", lambda run: 0.5)
    done = []

    def one(name, seed):
        if name == "a":
            raise okd_train.UserError("a, seed 0: the loss is not finite")
        done.append(name)
    monkeypatch.setattr(study, "one", one)
    assert study.go(1) == {("a", 0): "a, seed 0: the loss is not finite"} and done == ["b"]
    assert "a, seed 0 failed: a, seed 0: the loss" in capsys.readouterr().out       # at once


def test_a_trainer_that_is_killed_is_no_last_line_of_progress(tmp_path, monkeypatch):
    class Killed(InThread):
        returncode = -signal.SIGKILL

        def communicate(self):
            return "", "scores of step 2: 50/150 images"
    study = compare.Study(tmp_path, {}, "random", ["cpu"])
    monkeypatch.setattr(subprocess, "Popen", Killed)
    monkeypatch.setattr(study, "command", lambda *_: ["python", "okd_train.py"])
    with pytest.raises(okd_train.UserError, match="ring, seed 3: ended by SIGKILL"):
        study.train(SimpleNamespace(name="ring"), 3, tmp_path / "run", "cpu")


def test_when_it_will_be_done(tmp_path):
    study = compare.Study(tmp_path, {}, "random", ["cpu"])
    study.arms = {"ring": type("Arm", (), {"s": type("S", (), {"steps": 100})})}
    study.runs, study.results = [("ring", k) for k in range(4)], {("ring", 0): None}
    study.folder("ring", 1).mkdir(parents=True)
    (study.folder("ring", 1) / "log.jsonl").write_text('{"step": 30}\n{"step": 50}\n{"st')
    before = {("ring", 0): 0.0, ("ring", 1): 0.0, ("ring", 2): 0.0, ("ring", 3): 0.0}
    words = study.forecast(before, {("ring", 3): "it failed"}, 3600)        # 1.5 runs an hour, 1.5 to go
    assert words == "1 of 4 runs are finished; all in 60 min; see " + str(tmp_path / "study.html")


# ---------------------------------------------------------------------------------------------- photos and mistakes
def test_half_of_the_test_photos_choose(tmp_path):
    """Crops of one photo stay together, each class is halved, and a second start finds the same halves."""
    folder, r = noise(tmp_path / "crops/test", ("Crack", "Rust"), 20), np.random.default_rng(0)
    with open(tmp_path / "crops/crops.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(("file", "photo"))
        photo_of = {path: f"{path.parent.name}{r.integers(6)}.jpg" for path in sorted(folder.rglob("*.png"))}
        table.writerows((path.relative_to(tmp_path / "crops"), photo) for path, photo in photo_of.items())
    val, test = compare.halves_by_photo(folder, tmp_path / "study")
    parts = [{path.relative_to(whole) for path in whole.rglob("*.png")} for whole in (val, test)]
    assert parts[0] | parts[1] == {path.relative_to(folder) for path in photo_of} and not parts[0] & parts[1]
    photos = [{photo_of[folder / path] for path in part} for part in parts]
    assert not photos[0] & photos[1]
    for name in ("Crack", "Rust"):
        counts = [sum(photo.startswith(name) for photo in of) for of in photos]
        assert sum(counts) >= 5 and abs(counts[0] - counts[1]) <= 1
    before = {path: path.stat().st_mtime_ns for path in val.rglob("*")}
    assert compare.halves_by_photo(folder, tmp_path / "study") == [val, test]
    assert before == {path: path.stat().st_mtime_ns for path in val.rglob("*")}
    shutil.copyfile(next(folder.rglob("*.png")), folder / "Crack/more.png")         # other photos: other halves
    assert compare.halves_by_photo(folder, tmp_path / "study") != [val, test]
    assert before == {path: path.stat().st_mtime_ns for path in val.rglob("*")}


def test_small_numbers_are_no_flags():
    words = compare.as_flag("range", [-0.00001, 1.0])
    assert okd_train.parse(["--model", "sagan", *words])[0].range == [-0.00001, 1.0]


def test_parts_are_found_beside_one_another(place, tmp_path):
    parts = lambda *argv: compare.find_parts(compare.arguments(["--data", *map(str, argv)])[0], tmp_path / "study")
    photos = place / "photos"
    assert parts(photos) == {name: str(photos / name) for name in ("train", "val", "test")}
    found = parts(photos / "train", "--test", photos / "test")
    halves, = tmp_path.glob("study/halves-*")
    assert found == {"train": str(photos / "train"), **{k: str(halves / k) for k in ("val", "test")}}
    assert [len(list(Path(found[part]).rglob("*.png"))) for part in ("val", "test")] == [7, 7]


@pytest.mark.parametrize("more,words", [
    (["--seeds", "0"], "--seeds 0: say how many"), (["--seeds", "5-3"], "--seeds 5-3"), (["--seeds", "x"], "--seeds x"),
    (["--quick"], "--quick: the study"), (["--seed", "1"], "--seed: the study"), (["--epochs", "1"], "--steps"),
    (["--groups", "1"], "two groups or more"), (["--rho", "0"], "a weight above 0"), (["--data", ""], "--data"),
    (["--jobs", "0"], "--jobs"),
    (["--features", "none"], "--features"), (["--features", "gone.py"], "gone.py: no such file"),
    (["--test", "nowhere"], "no such folder"), (["--arms", "ring:beta7=1"], "arm ring:beta7=1: "),
    (["--arms", "ring:rho=x"], "arm ring:rho=x: "), (["--arms", "ring:seed=3"], "the same for all arms"),
    (["--arms", "odd:ch=8"], "arm odd:ch=8: it must begin with ring, alone, single"),
    (["--model", "sagan", "--arms", "ring:loss=no"], "arm ring:loss=no: "),
    (["--model", "sagan", "--arms", "ring:loss=no"], "loss is 'no'; it is wgan-gp"),
    (["--arms", "ring:help"], "no setting"), (["--arms", "ring:image_size=64"], "in another way than the ring"),
    (["--out", ""], "--out is empty"), (["--test", ""], "--test is empty"), (["--n-classes", "3"], "--n-classes is 3"),
    (["--batch-size", "100"], "fewer than one batch"), (["--val", "nowhere"], "--val nowhere: no such folder"),
    (["--batch-size", "0"], "--batch-size"), (["--loss", "no"], "loss")])
def test_mistakes(place, tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, [*command(place, "study"), *more])
    assert not Path("study/runs").exists() and not Path("study/results.jsonl").exists()


def test_classes_of_all_parts_are_the_same(place, tmp_path, capsys):
    test = noise(tmp_path / "test", ("Crack", "Stain"), 6)
    argv = [*command(place, tmp_path / "study"), "--data", str(place / "photos/train"), "--test", str(test)]
    assert "test Crack, Stain: they must be the same" in refused(capsys, [*argv, "--val", str(place / "photos/val")])


def test_no_part_lies_in_another_and_no_study_among_its_photos(place, tmp_path, capsys):
    photos = tmp_path / "crops"
    shutil.copytree(place / "photos", photos)
    argv = command(place, tmp_path / "study")
    inner = ["--data", str(photos), "--val", str(place / "photos/val"), "--test", str(photos / "train/Crack")]
    assert "none in another" in refused(capsys, [*argv, *inner])
    assert "lies among the photos of --data" in refused(
        capsys, [*argv, "--data", str(photos), "--out", str(photos / "train/study")])
    shutil.rmtree(photos / "val")
    (photos / "test/notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    found = compare.find_parts(compare.arguments(["--data", str(photos)])[0], photos)           # --out beside them
    assert {path: path.read_bytes() for path in before} == before and not Path(found["test"]).samefile(photos / "test")


def test_photos_that_no_score_can_be_made_of(place, tmp_path, capsys):
    few, alike = noise(tmp_path / "few", ("Crack", "Rust"), 2), noise(tmp_path / "alike", ("Crack", "Rust"), 4)
    for path in alike.rglob("*.png"):
        Image.new("RGB", (32, 32), path.parent.name == "Rust" and "red" or "blue").save(path)
    argv = [*command(place, tmp_path / "study"), "--data", str(place / "photos/train"), "--val"]
    argv = [*argv, str(place / "photos/val"), "--test"]
    assert "4 photos; scores need more than 5" in refused(capsys, [*argv, str(few)])
    assert "all photos of a class are the same" in refused(capsys, [*argv, str(alike)])


def test_help_tells_what_is_so_here(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default study/)" in text and "--max-seconds S" not in text and "small synthetic set" not in text


def test_parts_that_are_missing_or_the_same(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = str(place / "photos/train")
    assert "--test DIR is missing" in refused(capsys, ["--data", train])
    assert "--data DIR is missing" in refused(capsys, [])
    argv = ["--data", train, "--val", str(place / "photos/val"), "--test"]
    assert "takes three folders" in refused(capsys, [*argv, f"{train}/../train"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "one process" in refused(capsys, [*argv, train])
