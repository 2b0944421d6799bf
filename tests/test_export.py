"""Images of a trained run: exact counts, rows that bring their pixels back, exports that are killed and go on."""
import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import okd_train
from conftest import noise
from test_okd_train import TINY, refused
from test_ranks import torchrun

CLASSES = ["Crack", os.fsdecode(b'Rust, "r\xe9d" \xc3\xbc'), "Spallation"]       # a comma, quotes, a byte that is no text


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{"acgan": three groups with scores, "sagan": two groups without classes or scores}."""
    folder = tmp_path_factory.mktemp("runs")
    base = [*TINY, "--data", str(noise(folder / "photos", CLASSES, 4)), "--steps", "2", "--seed", "5"]
    okd_train.main(["--model", "acgan", "--groups", "3", *base, "--out", str(folder / "acgan"),
                    "--fid-every", "1", "--fid-features", "random", "--fid-samples", "8"])
    okd_train.main(["--model", "sagan", "--groups", "2", *base, "--out", str(folder / "sagan")])
    return folder


def export(run, to, *argv):
    okd_train.main(["--out", str(run), "--to", str(to), *map(str, argv)])


def manifest(folder):
    with open(folder / "manifest.csv", encoding="utf-8", errors="surrogateescape", newline="") as f:
        return list(csv.DictReader(f))


def tree(folder):
    """{path below folder: bytes}, hidden files too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pixels(folder, row):
    if "#" not in row["file"]:
        return np.asarray(Image.open(folder / row["file"]))
    file, at = row["file"].split("#")
    with np.load(folder / file, allow_pickle=False) as f:
        return f["arr_0"][int(at)]


class Killed(BaseException):
    pass


def killed_after(n, what, monkeypatch):
    """The n-th file that is written raises `what`, half of it being on the disk under its temporary name."""
    real, left = okd_train.save_whole, [n]

    def save(a, path):
        left[0] -= 1
        if left[0] < 0:
            path.with_name(f".{path.stem}.tmp9{path.suffix}").write_bytes(b"half")
            raise what
        real(a, path)
    monkeypatch.setattr(okd_train, "save_whole", save)


# ---------------------------------------------------------------------------------------------- what an export holds
def test_any_export_holds_what_was_asked_for(runs, tmp_path, monkeypatch, capsys):
    rng, seen = random.Random(0), {}
    for draw in range(15):
        name = rng.choice(["acgan", "acgan", "sagan"])
        run, n_groups, to = runs / name, {"acgan": 3, "sagan": 2}[name], tmp_path / f"to{draw}"
        groups = rng.choice(["all", "best"] if name == "acgan" else ["all"]) if rng.random() < 0.5 else rng.sample(range(1, n_groups + 1), rng.randint(1, 2))
        argv = ["--group", groups if isinstance(groups, str) else ",".join(map(str, groups))] + ["--npz"] * (draw % 3 == 1)
        if name == "acgan" and rng.random() < 0.6:
            counts = {c: rng.randint(1, 70) for c in rng.sample(["Crack", "Spallation"], rng.randint(1, 2))}
            argv += ["--per-class", ",".join(f"{c}={n}" for c, n in counts.items())] + ["--sample", sum(counts.values())] * (rng.random() < 0.3)
        else:
            n = rng.randint(1, 130)
            counts = {c: n // 3 + (k < n % 3) for k, c in enumerate(CLASSES)} if name == "acgan" else {"": n}
            argv += ["--sample", n]
        counts = {c: n for c, n in counts.items() if n}
        if draw % 2:                                                # killed at a random file; a full disk is one line
            with monkeypatch.context() as m:
                first = rng.randint(0, sum(counts.values()) - 1) if "--npz" not in argv else 0
                killed_after(first, Killed() if draw % 4 == 1 else OSError(errno.ENOSPC, "No space left on device"), m)
                with pytest.raises(Killed if draw % 4 == 1 else SystemExit):
                    export(run, to, *argv)
            assert not to.exists() and ("No space left" in capsys.readouterr().err) == (draw % 4 == 3)
            export(run, tmp_path / f"calm{draw}", *argv)
        export(run, to, *argv)
        if draw % 2:
            assert tree(to) == tree(tmp_path / f"calm{draw}")
        assert not list(tmp_path.glob(".*"))

        rows, lines = manifest(to), okd_train.score_lines(run)
        if groups == "best":
            _, best = min((line[f"G{i}"], i) for line in lines for i in range(1, 4))
            assert {r["checkpoint"] for r in rows} == {okd_train.digest(run / f"G{best}.best.pt")}
        want = [best] if groups == "best" else range(1, n_groups + 1) if groups == "all" else sorted(groups)
        assert [(r["group"], r["class"]) for r in rows] == [(f"G{i}", c) for i in want for c in sorted(counts) for _ in range(counts[c])]
        files = [r["file"] for r in rows]
        if "--npz" in argv:
            assert sorted(tree(to)) == sorted(["export.json", "manifest.csv", *(f"G{i}.npz" for i in want)])
            assert files == [f"G{i}.npz#{k}" for i in want for k in range(sum(counts.values()))]
            for i in want:
                with np.load(to / f"G{i}.npz", allow_pickle=False) as f:
                    assert set(f) == {"arr_0", "labels", "classes", "group"} and str(f["group"]) == f"G{i}"
                    assert f["arr_0"].dtype == np.uint8 and f["arr_0"].shape == (sum(counts.values()), 32, 32, 3)
                    assert f["classes"].tolist() == (CLASSES if name == "acgan" else [])
                    assert [CLASSES[k] for k in f["labels"]] == [r["class"] for r in rows if r["group"] == f"G{i}" and r["class"]]
        else:
            assert sorted(tree(to)) == sorted(["export.json", "manifest.csv", *files]) and len(set(files)) == len(files)
            assert all(a < b for a, b in zip(files, files[1:]) if os.path.dirname(a) == os.path.dirname(b))
        for row in rows:
            a = pixels(to, row)
            assert np.array_equal(a, okd_train.redraw(run, row))
            key = (row["checkpoint"], row["class"], row["z"])       # the same number of a class is the same image in every export
            assert seen.setdefault(key, a.tobytes()) == a.tobytes()
    assert len(seen) > 300 and len(set(seen.values())) == len(seen)


def test_the_key_in_a_row_is_what_draw_takes(runs, tmp_path):
    export(runs / "acgan", tmp_path / "to", "--per-class", "Spallation=52", "--group", "2")
    row = manifest(tmp_path / "to")[51]
    assert row["z"] == "5/1/0/sample Spallation/1" and row["file"] == "G2/Spallation/000051.png"
    z = okd_train.draw(5, 1, 0, "sample Spallation", "normal", (50, 8))
    G = okd_train.load_generator(runs / "acgan" / "G2.pt")
    assert np.array_equal(pixels(tmp_path / "to", row), okd_train.generate(G, z, torch.full((50,), 2))[1])


def test_npz_holds_the_pixels_of_the_pngs(runs, tmp_path):
    for name in ("acgan", "sagan"):
        export(runs / name, tmp_path / f"{name} png", "--sample", 61)
        export(runs / name, tmp_path / f"{name} npz", "--sample", 61, "--npz")
        a, b = manifest(tmp_path / f"{name} png"), manifest(tmp_path / f"{name} npz")
        assert [{**r, "file": ""} for r in a] == [{**r, "file": ""} for r in b]
        assert all(np.array_equal(pixels(tmp_path / f"{name} png", x), pixels(tmp_path / f"{name} npz", y)) for x, y in zip(a, b))


@pytest.mark.parametrize("npz", [False, True])
def test_memory_does_not_grow_with_the_number_of_images(npz, runs, tmp_path):
    tracemalloc.start()
    try:
        export(runs / "sagan", tmp_path / "to", "--sample", 1500, "--group", "1", *["--npz"] * npz)
        assert tracemalloc.get_traced_memory()[1] < 3e6             # the images are 4.6 MB
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------- redraw
def test_redraw_refuses_what_it_cannot_give(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "acgan", run)
    export(run, tmp_path / "to", "--sample", 3, "--group", "1")
    row = manifest(tmp_path / "to")[0]
    for wrong in ({"z": "5/0/0"}, {"z": "5/0/0/sample Crack/50"}, {"z": "5/0/1/sample Crack/0"}, {"z": "5/-1/0/sample Crack/0"}, {"z": None},
                  {"class": "Spallation"}, {"group": "../G1"}):
        with pytest.raises(okd_train.UserError, match="not a row"):
            okd_train.redraw(run, {**row, **wrong})
    with pytest.raises(okd_train.UserError, match="knows no class 'Soot'"):
        okd_train.redraw(run, {**row, "class": "Soot", "z": "5/0/0/sample Soot/0"})
    shutil.copy(run / "G2.pt", run / "G1.pt")                       # as if training had gone on
    (run / "G1.best.pt").unlink()
    with pytest.raises(okd_train.UserError, match="training went on"):
        okd_train.redraw(run, row)


# ---------------------------------------------------------------------------------------------- stopped and gone on
@pytest.mark.parametrize("npz", [False, True])
def test_nothing_whole_is_drawn_again(npz, runs, tmp_path, monkeypatch, capsys):
    argv = ["--sample", 170, "--group", "1", *["--npz"] * npz]
    drawn, real = [], okd_train.draw_chunk
    monkeypatch.setattr(okd_train, "draw_chunk", lambda G, seed, chunk, *a: drawn.append(chunk) or real(G, seed, chunk, *a))
    with monkeypatch.context() as m:
        killed_after(2 if npz else 120, Killed(), m)
        with pytest.raises(Killed):
            export(runs / "sagan", tmp_path / "to", *argv)
    if not npz:
        empty = tmp_path / ".to.partial" / "G1" / "000100.png"      # what a power cut leaves
        empty.write_bytes(b"")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / ".to.partial").rglob("[!.]*.[np]*") if p.stat().st_size}
    (tmp_path / ".to.partial" / ".G1.npz.tmp123").write_bytes(b"of a killed attempt")
    drawn.clear()
    capsys.readouterr()
    export(runs / "sagan", tmp_path / "to", *argv)
    assert drawn == [2, 3] and f"Going on: {100} of 170" in capsys.readouterr().out
    if not npz:
        assert len(before) == 119
        assert all((tmp_path / "to" / p.relative_to(tmp_path / ".to.partial")).stat().st_mtime_ns == t for p, t in before.items())
    export(runs / "sagan", tmp_path / "calm", *argv)
    assert tree(tmp_path / "to") == tree(tmp_path / "calm")


@pytest.mark.parametrize("name", ["a.png", "a.npy"])
def test_what_is_half_written_never_has_its_name(name, tmp_path, monkeypatch):
    def half(first, second, *_, **__):                              # Image.save(image, file) and np.save(file, array)
        (second if name == "a.png" else first).write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(*(Image.Image, "save") if name == "a.png" else (np, "save"), half)
        with pytest.raises(okd_train.UserError, match=f"cannot write .*{name}.*No space left"):
            okd_train.save_whole(np.zeros((4, 4, 3), np.uint8), tmp_path / name)
    assert not tree(tmp_path)
    okd_train.save_whole(np.zeros((4, 4, 3), np.uint8), tmp_path / name)
    assert list(tree(tmp_path)) == [name] and len(tree(tmp_path)[name]) > 4


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_and_the_command_goes_on(number, code, runs, tmp_path, monkeypatch, capsys):
    real = okd_train.draw_chunk

    def draw_chunk(G, seed, chunk, *a):
        if chunk == 1:
            os.kill(os.getpid(), number)
        return real(G, seed, chunk, *a)
    with monkeypatch.context() as m:
        m.setattr(okd_train, "draw_chunk", draw_chunk)
        with pytest.raises(SystemExit) as e:
            export(runs / "sagan", tmp_path / "to", "--sample", 170)
    text = capsys.readouterr()
    assert e.value.code == code and text.err == "" and text.out.count("\n") == 1 and f"Stopped by {number.name}: 100 of 340 images" in text.out
    assert not (tmp_path / "to").exists() and len(list((tmp_path / ".to.partial").rglob("[!.]*.png"))) == 100
    export(runs / "sagan", tmp_path / "to", "--sample", 170)
    export(runs / "sagan", tmp_path / "calm", "--sample", 170)
    assert tree(tmp_path / "to") == tree(tmp_path / "calm")


def test_kill_9_and_the_same_command_on_two_processes(runs, tmp_path):
    argv = ["--out", runs / "acgan", "--to", tmp_path / "to", "--sample", 600]
    p = subprocess.Popen([sys.executable, okd_train.__file__, *map(str, argv)], env=dict(os.environ, OMP_NUM_THREADS="1"),
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    partial, end = tmp_path / ".to.partial", time.monotonic() + 60
    while p.poll() is None and time.monotonic() < end and not (partial / "G1" / "Crack" / "000099.png").exists():
        time.sleep(0.002)
    p.kill()
    assert p.wait() == -signal.SIGKILL, p.stderr.read()
    p.stderr.close()
    left = [f for f in partial.rglob("[!.]*.png")]
    assert not (tmp_path / "to").exists() and 50 <= len(left) < 1800
    assert all(np.asarray(Image.open(f)).shape == (32, 32, 3) for f in left)               # whole, every one
    before = {f.relative_to(partial): f.stat().st_mtime_ns for f in left}
    torchrun(2, *argv)
    assert all((tmp_path / "to" / f).stat().st_mtime_ns == t for f, t in before.items())
    export(runs / "acgan", tmp_path / "calm", "--sample", 600)
    assert tree(tmp_path / "to") == tree(tmp_path / "calm") and not partial.exists()


def test_an_unfinished_export_is_not_mixed_with_another(runs, tmp_path, monkeypatch, capsys):
    run, to = tmp_path / "run", tmp_path / "to"
    shutil.copytree(runs / "sagan", run)
    with monkeypatch.context() as m:
        killed_after(20, Killed(), m)
        with pytest.raises(Killed):
            export(run, to, "--sample", 60)
    capsys.readouterr()
    before = tree(tmp_path / ".to.partial")
    for argv, what in ((["--sample", 61], "images"), (["--sample", 60, "--group", "1"], "groups"), (["--sample", 60, "--npz"], "npz")):
        text = refused(capsys, "--out", run, "--to", to, *argv)
        assert f"other settings ({what})" in text and "delete that folder" in text and ".to.partial" in text
    kept = (run / "G1.pt").read_bytes()
    shutil.copy(run / "G2.pt", run / "G1.pt")                       # training went on
    assert "other settings (groups)" in refused(capsys, "--out", run, "--to", to, "--sample", 60)
    (run / "G1.pt").write_bytes(kept)
    assert tree(tmp_path / ".to.partial") == before
    export(run, to, "--sample", 60)
    assert len(manifest(to)) == 120
    for junk in (".export.json.tmp9",):                             # killed before its settings stood: nothing of worth is in it
        (tmp_path / ".two.partial").mkdir()
        (tmp_path / ".two.partial" / junk).write_bytes(b"{")
    export(run, tmp_path / "two", "--sample", 1)
    assert sorted(tree(tmp_path / "two")) == ["G1/000000.png", "G2/000000.png", "export.json", "manifest.csv"]


# ---------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("run, argv, want", [
    ("acgan", ["--sample", "5", "--group", "0"], "numbers from 1 to 3"),
    ("acgan", ["--sample", "5", "--group", "9"], "numbers from 1 to 3"),
    ("acgan", ["--sample", "5", "--group", "1,1"], "each once"),
    ("acgan", ["--sample", "5", "--group", "1,,2"], "--group 1,,2"),
    ("acgan", ["--sample", "5", "--group", "1e9"], "--group 1e9"),
    ("acgan", ["--sample", "5", "--group", "²"], "numbers from 1 to 3"),
    ("acgan", ["--sample", "5", "--group", "9" * 5000], "numbers from 1 to 3"),
    ("acgan", ["--sample", "5", "--group", ""], "--group is empty"),
    ("sagan", ["--sample", "5", "--group", "best"], "--fid-every K"),
    ("sagan", ["--per-class", "Crack=5"], "not class-conditional; give --sample N"),
    ("acgan", ["--per-class", "Soot=5"], "names no class of this run; say CLASS=N with commas between, the classes are 'Crack', "),
    ("acgan", ["--per-class", "crack=5"], "names no class"),
    ("acgan", ["--per-class", "Crack=5,Crack=6"], "twice"),
    ("acgan", ["--per-class", "Crack=0"], "number above 0"),
    ("acgan", ["--per-class", "Crack=-3"], "number above 0"),
    ("acgan", ["--per-class", "Crack=1.5"], "number above 0"),
    ("acgan", ["--per-class", "Crack=5,"], "is not CLASS=N"),
    ("acgan", ["--per-class", "Crack"], "is not CLASS=N"),
    ("acgan", ["--per-class", ""], "--per-class is empty"),
    ("acgan", ["--sample", "6", "--per-class", "Crack=5"], "--sample 6 and --per-class, 5 in all, disagree"),
    ("acgan", ["--sample", "0"], "--sample is 0"),
    ("acgan", ["--group", "1", "--npz"], "--group, --npz: without effect without --sample or --per-class"),
    ("acgan", ["--to", "x"], "--to: without effect"),
    ("acgan", ["--sample", "5", "--steps", "9", "--resume"], "--resume, --steps: without effect with --sample"),
    ("acgan", ["--sample", "5", "--to", "{full}"], "is not empty; move it away, or name another folder with --to"),
    ("acgan", ["--sample", "5", "--to", "{full}/a.txt"], "a.txt is not empty"),
    ("acgan", ["--sample", "5", "--to", "{full}/a.txt/b"], "cannot write"),
    ("acgan", ["--sample", "5", "--to", ""], "--to is empty"),
])
def test_mistakes_are_one_line_and_write_nothing(run, argv, want, runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert want in refused(capsys, "--out", runs / run, *(a.replace("{full}", str(tmp_path)) for a in argv))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and not list(runs.glob("*/.fakes*")) and not list(runs.glob("*/fakes"))


def test_a_generator_that_changes_while_it_is_read(runs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs / "sagan", run)
    real = okd_train.load_generator

    def load_generator(path, *a):
        G = real(path, *a)
        shutil.copy(run / "G2.pt", path)                            # a training saves
        return G
    monkeypatch.setattr(okd_train, "load_generator", load_generator)
    assert "changed while being read" in refused(capsys, "--out", run, "--sample", 3, "--group", "1")
    assert not list(run.glob(".fakes*"))


def test_best_is_the_lowest_finite_score(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "acgan", run)
    lines = [{"step": 1, "G1": float("nan"), "G2": 4.0, "G3": 5.0}, {"step": 2, "G1": 4.5, "G2": 9.0, "G3": 4.25}]
    (run / "fid.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    export(run, tmp_path / "to", "--sample", 1, "--group", "best")
    assert f"1 images of G2, step {okd_train.load_file(run / 'G2.best.pt')['step']}," in capsys.readouterr().out
    assert json.loads((tmp_path / "to" / "export.json").read_text())["groups"]["G2"]["file"] == "G2.best.pt"
    for text in ('{"step": 1, "G1": 3.0}\n', '{"step": 1, "G1": 3.0, "G2": 2.0, "G3": 1', ""):        # of a run of one group; half a line; nothing
        (run / "fid.jsonl").write_text(text)
        assert "--fid-every K" in refused(capsys, "--out", run, "--sample", 1, "--group", "best")
    (run / "G3.pt").unlink()
    assert "G3.pt: no such file" in refused(capsys, "--out", run, "--sample", 1)


def test_an_empty_folder_is_taken_and_fakes_is_the_default(runs, tmp_path, monkeypatch):
    (tmp_path / "to").mkdir()
    with monkeypatch.context() as m:
        killed_after(1, Killed(), m)
        with pytest.raises(Killed):
            export(runs / "sagan", tmp_path / "to", "--sample", 1)
    assert not (tmp_path / "to").exists()                           # whole or not at all
    export(runs / "sagan", tmp_path / "to", "--sample", 1)
    run = tmp_path / "run"
    shutil.copytree(runs / "sagan", run)
    okd_train.main(["--out", str(run), "--sample", "1"])
    assert tree(run / "fakes") == tree(tmp_path / "to") and not (run / ".fakes.partial").exists()


def test_the_settings_of_an_export_do_not_enter_the_run(runs):
    assert not {"sample", "per_class", "group", "to", "npz"} & json.loads((runs / "acgan" / "args.json").read_text())["settings"].keys()
