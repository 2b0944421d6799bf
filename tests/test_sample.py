"""sample.py: exact counts, rows that bring their pixels back, exports that are killed and go on, the best group."""
import contextlib
import csv
import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import okd_train
import report
import sample
from conftest import least_peak, noise

CLASSES = ["Crack", os.fsdecode(b'Rust, "r\xe9d" \xc3\xbc'), "Spallation"]     # a comma, quotes, a byte that is no text
TINY = ["--image-size", "32", "--ch", "4", "--batch-size", "4", "--z-dim", "8"]
ENV = dict(os.environ, OMP_NUM_THREADS="1")
ROOT = os.name == "posix" and os.geteuid() == 0

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{"acgan": three groups with scores, "sagan": two groups without classes or scores}."""
    folder = tmp_path_factory.mktemp("runs")
    base = [*TINY, "--data", str(noise(folder / "photos", CLASSES, 4)), "--steps", "2", "--seed", "5"]
    scored = ["--fid-every", "1", "--fid-features", "random", "--fid-samples", "60"]
    okd_train.main(["--model", "acgan", "--groups", "3", *base, *scored, "--out", str(folder / "acgan")])
    okd_train.main(["--model", "sagan", "--groups", "2", *base, "--out", str(folder / "sagan")])
    return folder


def export(run, to, *argv):
    sample.main([str(run), "--to", str(to), *map(str, argv)])


def refused(capsys, *argv):
    """Runs in this process; the one line on stderr of a user error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        sample.main(list(map(str, argv)))
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.count("\n") == 1 and text.startswith("sample.py: error: "), text
    return text


def command(*argv, launcher=(), code=0, cwd=None, env=ENV):
    """sample.py as a user runs it."""
    p = subprocess.run([sys.executable, *launcher, sample.__file__, *map(str, argv)], capture_output=True, text=True,
                       cwd=cwd, env=env, timeout=120)
    assert p.returncode == code, p.stdout[-3000:] + p.stderr[-3000:]
    return p


def torchrun(n, *argv, code=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return command(*argv, launcher=launcher, code=code)


def manifest(folder):
    with open(folder / "manifest.csv", encoding="utf-8", errors="surrogateescape", newline="") as f:
        return list(csv.DictReader(f))


def tree(folder):
    """{path below folder: bytes}, hidden files too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def snapshot(folder):
    """{name below folder: (size, time of change) of a file, None of a folder}."""
    return {p.relative_to(folder): None if p.is_dir() else (p.stat().st_size, p.stat().st_mtime_ns)
            for p in folder.rglob("*") if "__pycache__" not in p.parts}


def pixels(folder, row):
    if "#" not in row["file"]:
        return np.asarray(Image.open(folder / row["file"]))
    file, at = row["file"].split("#")
    with np.load(folder / file, allow_pickle=False) as f:
        return f["arr_0"][int(at)]


@pytest.mark.parametrize("model,npz", [("sagan", False), ("acgan", True)])
def test_a_score_of_training_is_got_again_from_folders_to_the_last_digit(model, npz, tmp_path, capsys, monkeypatch):
    """By the line that sample.py prints; photos of many sizes, more fakes than a chunk, the best step and the last."""
    monkeypatch.chdir(tmp_path)
    r, photos = np.random.default_rng(0), tmp_path / "my photos"
    for name in CLASSES[::2]:
        (photos / name).mkdir(parents=True)
        for k in range(13):
            low = r.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            size = tuple(map(int, r.integers(34, 60, 2)))
            Image.fromarray(low).resize(size).save(photos / name / f"{k}.{'png' if k % 2 else 'jpg'}")
    scored = ["--fid-every", "2", "--fid-features", "random", "--fid-samples", "61"]
    argv = ["--model", model, "--groups", "2", *TINY, "--data", photos.name, "--steps", "5", *scored, "--out", "run"]
    okd_train.main(argv)
    last = okd_train.score_lines(tmp_path / "run")[-1]
    for what, group in (("all", []), ("best", ["--group", "best"])):
        capsys.readouterr()
        export("run", what, "--scored", *group, *["--npz"] * npz)
        said = capsys.readouterr().out.strip().splitlines()[-1]
        numbers, line = said.split(". Once more: ")
        rows = manifest(tmp_path / what)
        assert len(rows) == 61 * (1 if group else 2)
        assert [row["class"] for row in rows[:4]] == (CLASSES[::2] * 2 if model == "acgan" else [""] * 4)
        assert all(np.array_equal(sample.redraw("run", row), pixels(tmp_path / what, row)) for row in rows[::30])
        assert shlex.split(line)[:2] == ["python", "fid.py"]
        assert fid.main([*shlex.split(line)[2:], "--json", "--floor"]) == 0
        got = json.loads(capsys.readouterr().out)
        if group:
            best = min(x[g] for x in okd_train.score_lines(tmp_path / "run") for g in ("G1", "G2"))
            assert got["rfd"] == best and f"{best:.4f}" in numbers
        else:
            wanted = [last["G1"], last["G2"], last["union"], last["floor"], last["floor_spread"]]
            assert [x["rfd"] for x in (*got["fakes"], got["union"], got["floor"], got["floor_spread"])] == wanted
            assert f"rFD at step 5: G1 {last['G1']:.4f}  G2 {last['G2']:.4f}" in numbers
    if npz:
        with np.load(tmp_path / "all/G2.npz") as f:
            assert f["labels"].tolist() == [k % 2 for k in range(61)] and len(f["arr_0"]) == 61


def test_the_printed_command_reads_the_photos_as_the_run_did(tmp_path, capsys, monkeypatch):
    """Turned by EXIF, of 16 bits by a range of one's own, one unreadable; loose ones and folders are told."""
    monkeypatch.chdir(tmp_path)
    photos, r = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for k in range(9):
        exif = Image.Exif()
        exif[0x112] = 6
        image = Image.fromarray(r.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(photos / f"{k}.png", exif=exif)
        Image.fromarray(r.integers(0, 20000, (32, 32)).astype(np.uint16)).save(photos / f"deep{k}.png")
    (photos / "bad.png").write_bytes(b"no image")
    scored = ["--fid-every", "1", "--fid-features", "random", "--fid-samples", "20", "--upright", "--skip-bad"]
    okd_train.main(["--groups", "1", *TINY, "--data", "photos", "--steps", "1", *scored, "--range", "0", "30000",
                    "--out", "run"])
    export("run", "made", "--scored")
    line = capsys.readouterr().out.strip().splitlines()[-1].split(". Once more: ")[1]
    assert fid.main([*shlex.split(line)[2:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rfd"] == okd_train.score_lines(tmp_path / "run")[-1]["G1"]
    (photos / "more").mkdir()
    shutil.copyfile(photos / "0.png", photos / "more/0.png")
    export("run", "again", "--scored")
    assert "leaves out what lies in folders" in capsys.readouterr().out
    shutil.rmtree(photos)
    export("run", "without", "--scored")                            # needs no photos
    assert len(manifest(tmp_path / "without")) == 20 and "Once more: " in capsys.readouterr().out


def test_scored_images_that_there_are_not(runs, tmp_path, capsys):
    assert "train with --fid-every" in refused(capsys, runs / "sagan", "--scored", "--to", tmp_path / "x")
    assert "train with --fid-every" in refused(capsys, runs / "sagan", "--scored", "--group", "best")
    for more in (["5"], ["--per-class", "5"]):
        assert "leave N and --per-class out" in refused(capsys, runs / "acgan", "--scored", *more)
    shutil.copytree(runs / "acgan", tmp_path / "run")
    log = tmp_path / "run/fid.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    text = refused(capsys, tmp_path / "run", "--scored", "--group", "2", "--to", tmp_path / "x")
    assert "G2.pt is of step 2, of which fid.jsonl has no score (the last is of step 1)" in text
    shutil.copyfile(runs / "acgan/fid.jsonl", log)
    d = okd_train.load_file(tmp_path / "run/G1.pt")
    torch.save({**d, "step": 1}, tmp_path / "run/G1.pt")
    assert "unequal steps (G1.pt of step 1, G2.pt of step 2, " in refused(capsys, tmp_path / "run", "--scored")
    log.write_text(log.read_text().replace('"samples": ', '"samples_": '))
    assert "does not say how many images" in refused(capsys, tmp_path / "run", "--scored", "--group", "2")
    torch.save([1], tmp_path / "run/G2.pt")
    assert "G2.pt is of step None" in refused(capsys, tmp_path / "run", "--scored", "--group", "2")
    assert not (tmp_path / "x").exists()


class Killed(BaseException):
    pass


def killed_after(n, what, monkeypatch):
    """The n-th file that is written raises `what`, half of it being on the disk under its temporary name."""
    real, left = sample.save_whole, [n]

    def save(a, path):
        left[0] -= 1
        if left[0] < 0:
            path.with_name(f".{path.stem}.tmp9{path.suffix}").write_bytes(b"half")
            raise what
        real(a, path)
    monkeypatch.setattr(sample, "save_whole", save)


# ---------------------------------------------------------------------------------------------- what an export holds
def test_any_export_holds_what_was_asked_for(runs, tmp_path, monkeypatch, capsys):
    rng, seen = random.Random(0), {}
    for draw in range(15):
        name = rng.choice(["acgan", "acgan", "sagan"])
        run, n_groups, to = runs / name, {"acgan": 3, "sagan": 2}[name], tmp_path / f"to{draw}"
        groups = (rng.choice(["all", "best"] if name == "acgan" else ["all"]) if rng.random() < 0.5 else
                  rng.sample(range(1, n_groups + 1), rng.randint(1, 2)))
        argv = ["--group", groups if isinstance(groups, str) else ",".join(map(str, groups))]
        argv += ["--npz"] * (draw % 3 == 1)
        if name == "acgan" and rng.random() < 0.6:
            counts = {c: rng.randint(1, 70) for c in rng.sample(CLASSES, rng.randint(1, 2))}
            argv += ["--per-class", ",".join(f"{c}={n}" for c, n in counts.items())]
            argv += [sum(counts.values())] * (rng.random() < 0.3)
        else:
            n = rng.randint(1, 130)
            counts = {c: n // 3 + (k < n % 3) for k, c in enumerate(CLASSES)} if name == "acgan" else {"": n}
            argv += [n]
        counts = {c: n for c, n in counts.items() if n}
        if draw % 2:                                                # killed at a random file; a full disk is one line
            with monkeypatch.context() as m:
                first = rng.randint(0, sum(counts.values()) - 1) if "--npz" not in argv else 0
                full = OSError(errno.ENOSPC, "No space left on device")
                killed_after(first, Killed() if draw % 4 == 1 else full, m)
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
        in_order = [(f"G{i}", c) for i in want for c in sorted(counts) for _ in range(counts[c])]
        assert [(r["group"], r["class"]) for r in rows] == in_order
        files = [r["file"] for r in rows]
        if "--npz" in argv:
            assert sorted(tree(to)) == sorted(["export.json", "manifest.csv", *(f"G{i}.npz" for i in want)])
            assert files == [f"G{i}.npz#{k}" for i in want for k in range(sum(counts.values()))]
            for i in want:
                with np.load(to / f"G{i}.npz", allow_pickle=False) as f:
                    assert set(f) == {"arr_0", "labels", "classes", "group"} and str(f["group"]) == f"G{i}"
                    assert f["arr_0"].dtype == np.uint8 and f["arr_0"].shape == (sum(counts.values()), 32, 32, 3)
                    assert f["classes"].tolist() == (CLASSES if name == "acgan" else [])
                    labels = [r["class"] for r in rows if r["group"] == f"G{i}" and r["class"]]
                    assert [CLASSES[k] for k in f["labels"]] == labels
        else:
            assert sorted(tree(to)) == sorted(["export.json", "manifest.csv", *files]) and len(set(files)) == len(files)
            assert all(a < b for a, b in zip(files, files[1:]) if os.path.dirname(a) == os.path.dirname(b))
        for row in rows:
            a = pixels(to, row)
            assert np.array_equal(a, sample.redraw(run, row))
            key = (row["checkpoint"], row["class"], row["z"])       # a class's number is the same image in every export
            assert seen.setdefault(key, a.tobytes()) == a.tobytes()
    assert len(seen) > 300 and len(set(seen.values())) == len(seen)


def test_one_number_is_for_every_class(runs, tmp_path, capsys):
    export(runs / "acgan", tmp_path / "to", "--per-class", "4", "--group", "3,1")
    want = [(g, c) for g in ("G1", "G3") for c in CLASSES for _ in range(4)]
    assert [(r["group"], r["class"]) for r in manifest(tmp_path / "to")] == want
    export(runs / "acgan", tmp_path / "twelve", 12, "--per-class", "4", "--group", "1,3")
    assert tree(tmp_path / "to") == tree(tmp_path / "twelve")
    assert "N is 4 and --per-class, 12 in all, disagree" in refused(capsys, runs / "acgan", 4, "--per-class", "4")


def test_classes_that_a_spreadsheet_would_run(tmp_path):
    """And one whose name holds what stands between the counts; names of rows find their classes again."""
    names = ["'@x", "+1,=2", "-x", "=1+1", "plain"]
    data = noise(tmp_path / "photos", names, 2)
    okd_train.main(["--model", "acgan", "--groups", "1", *TINY, "--data", str(data), "--steps", "1", "--out",
                    str(tmp_path / "run")])
    export(tmp_path / "run", tmp_path / "to", "--per-class", "+1,=2=1,=1+1=2,-x=1,'@x=1,plain=1")
    rows = manifest(tmp_path / "to")
    assert [row["class"] for row in rows] == ["''@x", "'+1,=2", "'-x", "'=1+1", "'=1+1", "plain"]
    assert not any(cell[0] in "=+-@" for row in rows for cell in row.values())
    for row in rows:
        assert sample.name_in(row["class"]) == row["file"].split("/")[1]
        assert np.array_equal(sample.redraw(tmp_path / "run", row), pixels(tmp_path / "to", row))
    odd = ["'", "''", "'a", "'=", "''=", "=", "", "\tx", "a=b", "-"]
    assert [sample.name_in(sample.cell(name)) for name in odd] == odd and len({*map(sample.cell, odd)}) == len(odd)


def test_the_key_in_a_row_is_what_draw_takes(runs, tmp_path):
    export(runs / "acgan", tmp_path / "to", "--per-class", "Spallation=52", "--group", "2")
    row = manifest(tmp_path / "to")[51]
    assert row["z"] == "5/1/0/sample Spallation/1" and row["file"] == "G2/Spallation/000051.png"
    z = okd_train.draw(5, 1, 0, "sample Spallation", "normal", (50, 8))
    G = okd_train.load_generator(runs / "acgan" / "G2.pt")
    assert np.array_equal(pixels(tmp_path / "to", row), okd_train.generate(G, z, torch.full((50,), 2))[1])


def test_npz_holds_the_pixels_of_the_pngs(runs, tmp_path):
    for name in ("acgan", "sagan"):
        export(runs / name, tmp_path / f"{name} png", 61)
        export(runs / name, tmp_path / f"{name} npz", 61, "--npz")
        a, b = manifest(tmp_path / f"{name} png"), manifest(tmp_path / f"{name} npz")
        assert [{**r, "file": ""} for r in a] == [{**r, "file": ""} for r in b]
        assert all(np.array_equal(pixels(tmp_path / f"{name} png", x), pixels(tmp_path / f"{name} npz", y))
                   for x, y in zip(a, b))


@pytest.mark.parametrize("npz", [False, True])
def test_memory_does_not_grow_with_the_number_of_images(npz, runs, tmp_path):
    peak = least_peak(lambda k: export(runs / "sagan", tmp_path / str(k), 1500, "--group", "1", *["--npz"] * npz))
    assert peak < 3e6                                               # the images are 4.6 MB


def test_the_real_command(runs, tmp_path):
    """Whole folders by the real program, as the run-book says; the first images do not depend on how many there are."""
    run = tmp_path / "run ü"
    shutil.copytree(runs / "acgan", run)
    command(run, 7, "--group", "1,2", "--nproc", "1")
    files = sorted(os.fsencode(p.relative_to(run / "fakes").as_posix()) for p in (run / "fakes").rglob("*.png"))
    assert files == [os.fsencode(f"{g}/{c}/{k:06d}.png") for g in ("G1", "G2") for c, n in zip(CLASSES, (3, 2, 2))
                     for k in range(n)]
    first = (run / "fakes" / "manifest.csv").read_bytes().splitlines()[1].decode()
    assert first == f"G1/Crack/000000.png,G1,Crack,5/0/0/sample Crack/0,{okd_train.digest(run / 'G1.pt')}"
    G = okd_train.load_generator(run / "G1.pt")
    z = okd_train.draw(5, 0, 0, "sample Crack", "normal", (50, 8))
    a = np.asarray(Image.open(run / "fakes/G1/Crack/000000.png"))
    assert np.array_equal(a, okd_train.generate(G, z, torch.zeros(50, dtype=torch.long))[0])
    assert "not empty" in command(run, 2, code=2).stderr
    (run / "fakes").rename(tmp_path / "seven")
    sample.main([str(run), "120"])
    for file in map(os.fsdecode, files):
        assert (run / "fakes" / file).read_bytes() == (tmp_path / "seven" / file).read_bytes()


def test_a_model_script_that_moved(runs, root, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "sagan", run)
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**args, "model": "gone", "script": str(tmp_path / "gone.py")}))
    assert "gone" in refused(capsys, run, 3)
    shutil.copy(root / "sagan.py", tmp_path / "moved.py")
    export(run, tmp_path / "to", 3, "--model", tmp_path / "moved.py")
    export(runs / "sagan", tmp_path / "calm", 3)
    assert tree(tmp_path / "to") == tree(tmp_path / "calm")
    row = manifest(tmp_path / "to")[0]
    assert np.array_equal(sample.redraw(run, row, model=str(tmp_path / "moved.py")), pixels(tmp_path / "to", row))


@pytest.mark.parametrize("program, argv", [
    (sample, ["3"]), (report, ["--curves"]), (okd_train, ["--resume"])])
def test_a_script_that_a_run_names_is_said_before_it_runs(program, argv, runs, tmp_path, capsys):
    """A run folder of others: what it names may be any program."""
    run, script = tmp_path / "run", tmp_path / "odd\nname.py"
    shutil.copytree(runs / "sagan", run)
    script.write_text("print('it runs')\nraise ValueError")
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**args, "model": str(script), "script": str(script)}))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        program.main([*(["--out"] if program is okd_train else []), str(run), *argv])
    words = f"Running the model script {tmp_path}/odd\\nname.py, which {run}/args.json names.\nit runs\n"
    assert capsys.readouterr().out == words
    state = okd_train.load_file(run / "G1.pt")
    torch.save({**state, "model": str(script)}, run / "G1.pt")
    with pytest.raises(okd_train.UserError):
        okd_train.load_generator(run / "G1.pt")
    assert capsys.readouterr().out == words.replace("args.json", "G1.pt")


def test_more_processes_than_groups(runs, tmp_path):
    torchrun(3, runs / "sagan", 60, "--to", tmp_path / "three")
    export(runs / "sagan", tmp_path / "one", 60)
    assert len(list((tmp_path / "one").rglob("*.png"))) == 120 and tree(tmp_path / "one") == tree(tmp_path / "three")


def test_processes_that_it_starts_itself(runs, tmp_path, capsys):
    command(runs / "sagan", 60, "--to", tmp_path / "two", "--nproc", "2")
    export(runs / "sagan", tmp_path / "one", 60, "--nproc", "1")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert "at most 8 processes busy" in refused(capsys, runs / "sagan", 5, "--nproc", "101")


# ---------------------------------------------------------------------------------------------- redraw
def test_redraw_refuses_what_it_cannot_give(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "acgan", run)
    export(run, tmp_path / "to", 3, "--group", "1")
    row = manifest(tmp_path / "to")[0]
    for wrong in ({"z": "5/0/0"}, {"z": "5/0/0/sample Crack/50"}, {"z": "5/0/1/sample Crack/0"},
                  {"z": "5/-1/0/sample Crack/0"}, {"z": None}, {"class": "Spallation"}, {"group": "../G1"}):
        with pytest.raises(okd_train.UserError, match="not a row"):
            sample.redraw(run, {**row, **wrong})
    with pytest.raises(okd_train.UserError, match="knows no class 'Soot'"):
        sample.redraw(run, {**row, "class": "Soot", "z": "5/0/0/sample Soot/0"})
    shutil.copy(run / "G2.pt", run / "G1.pt")                       # as if training had gone on
    (run / "G1.best.pt").unlink()
    with pytest.raises(okd_train.UserError, match="training went on"):
        sample.redraw(run, row)


# ---------------------------------------------------------------------------------------------- stopped and gone on
@pytest.mark.parametrize("npz", [False, True])
def test_nothing_whole_is_drawn_again(npz, runs, tmp_path, monkeypatch, capsys):
    argv = [170, "--group", "1", *["--npz"] * npz]
    drawn, real = [], sample.draw_chunk
    monkeypatch.setattr(sample, "draw_chunk", lambda G, seed, k, *a: drawn.append(k) or real(G, seed, k, *a))
    with monkeypatch.context() as m:
        killed_after(2 if npz else 120, Killed(), m)
        with pytest.raises(Killed):
            export(runs / "sagan", tmp_path / "to", *argv)
    partial = tmp_path / ".to.partial"
    if not npz:
        (partial / "G1" / "000100.png").write_bytes(b"")            # what a power cut leaves
    before = {p: p.stat().st_mtime_ns for p in partial.rglob("[!.]*.[np]*") if p.stat().st_size}
    (partial / ".G1.npz.tmp123").write_bytes(b"of a killed attempt")
    drawn.clear()
    capsys.readouterr()
    export(runs / "sagan", tmp_path / "to", *argv)
    assert drawn == [2, 3] and f"Going on: {100} of 170" in capsys.readouterr().out
    if not npz:
        assert len(before) == 119
        assert all((tmp_path / "to" / p.relative_to(partial)).stat().st_mtime_ns == t for p, t in before.items())
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
            sample.save_whole(np.zeros((4, 4, 3), np.uint8), tmp_path / name)
    assert not tree(tmp_path)
    sample.save_whole(np.zeros((4, 4, 3), np.uint8), tmp_path / name)
    assert list(tree(tmp_path)) == [name] and len(tree(tmp_path)[name]) > 4


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_and_the_command_goes_on(number, code, runs, tmp_path, monkeypatch, capsys):
    real = sample.draw_chunk

    def draw_chunk(G, seed, chunk, *a):
        if chunk == 1:
            os.kill(os.getpid(), number)
        return real(G, seed, chunk, *a)
    with monkeypatch.context() as m:
        m.setattr(sample, "draw_chunk", draw_chunk)
        with pytest.raises(SystemExit) as e:
            export(runs / "sagan", tmp_path / "to", 170)
    text = capsys.readouterr()
    assert e.value.code == code and text.err == "" and text.out.count("\n") == 1
    assert f"Stopped by {number.name}: 100 of 340 images" in text.out
    assert not (tmp_path / "to").exists() and len(list((tmp_path / ".to.partial").rglob("[!.]*.png"))) == 100
    export(runs / "sagan", tmp_path / "to", 170)
    export(runs / "sagan", tmp_path / "calm", 170)
    assert tree(tmp_path / "to") == tree(tmp_path / "calm")


def test_kill_9_and_the_same_command_on_two_processes(runs, tmp_path):
    argv = [runs / "acgan", 600, "--to", tmp_path / "to"]
    p = subprocess.Popen([sys.executable, sample.__file__, *map(str, argv)], env=ENV, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
    partial, end = tmp_path / ".to.partial", time.monotonic() + 60
    while p.poll() is None and time.monotonic() < end and not (partial / "G1" / "Crack" / "000099.png").exists():
        time.sleep(0.002)
    p.kill()
    assert p.wait() == -signal.SIGKILL, p.stderr.read()
    p.stderr.close()
    left = [f for f in partial.rglob("[!.]*.png")]
    assert not (tmp_path / "to").exists() and 50 <= len(left) < 1800
    assert all(np.asarray(Image.open(f)).shape == (32, 32, 3) for f in left)       # whole, every one
    before = {f.relative_to(partial): f.stat().st_mtime_ns for f in left}
    torchrun(2, *argv)
    assert all((tmp_path / "to" / f).stat().st_mtime_ns == t for f, t in before.items())
    export(runs / "acgan", tmp_path / "calm", 600)
    assert tree(tmp_path / "to") == tree(tmp_path / "calm") and not partial.exists()


def test_an_unfinished_export_is_not_mixed_with_another(runs, tmp_path, monkeypatch, capsys):
    run, to = tmp_path / "run", tmp_path / "to"
    shutil.copytree(runs / "sagan", run)
    with monkeypatch.context() as m:
        killed_after(20, Killed(), m)
        with pytest.raises(Killed):
            export(run, to, 60)
    before = tree(tmp_path / ".to.partial")
    for argv, what in (([61], "images"), ([60, "--group", "1"], "groups"), ([60, "--npz"], "npz")):
        text = refused(capsys, run, "--to", to, *argv)
        assert f"other settings ({what})" in text and "delete that folder" in text and ".to.partial" in text
    kept = (run / "G1.pt").read_bytes()
    shutil.copy(run / "G2.pt", run / "G1.pt")                       # training went on
    assert "other settings (groups)" in refused(capsys, run, "--to", to, 60)
    (run / "G1.pt").write_bytes(kept)
    assert tree(tmp_path / ".to.partial") == before
    export(run, to, 60)
    assert len(manifest(to)) == 120
    scores = run / "fid.jsonl"                                      # the images of a score are others
    line = {"step": 2, "score": "FID", "samples": 60, "G1": 1.0, "G2": 2.0, "mean": 1.5}
    scores.write_text(json.dumps(line) + "\n")
    for first, second in (([60], ["--scored"]), (["--scored"], [60])):
        mixed = tmp_path / f"mixed{first[0]}"
        with monkeypatch.context() as m:
            killed_after(20, Killed(), m)
            with pytest.raises(Killed):
                export(run, mixed, *first)
        assert "other settings (" in refused(capsys, run, "--to", mixed, *second)
    (tmp_path / ".two.partial").mkdir()                             # killed before its settings stood
    (tmp_path / ".two.partial" / ".export.json.tmp9").write_bytes(b"{")
    export(run, tmp_path / "two", 1)
    assert sorted(tree(tmp_path / "two")) == ["G1/000000.png", "G2/000000.png", "export.json", "manifest.csv"]


def test_an_empty_folder_is_taken_and_fakes_is_the_default(runs, tmp_path, monkeypatch):
    (tmp_path / "to").mkdir()
    with monkeypatch.context() as m:
        killed_after(1, Killed(), m)
        with pytest.raises(Killed):
            export(runs / "sagan", tmp_path / "to", 1)
    assert not (tmp_path / "to").exists()                           # whole or not at all
    export(runs / "sagan", tmp_path / "to", 1)
    run = tmp_path / "run"
    shutil.copytree(runs / "sagan", run)
    sample.main([str(run), "1"])
    assert tree(run / "fakes") == tree(tmp_path / "to") and not (run / ".fakes.partial").exists()
    shutil.rmtree(run / "fakes")
    for place in ("empty", "new"):                                  # a link is followed, and stays
        (run / "fakes").unlink(missing_ok=True)
        (run / "fakes").symlink_to(tmp_path / place)
        (tmp_path / "empty").mkdir(exist_ok=True)
        sample.main([str(run), "1"])
        assert tree(tmp_path / place) == tree(tmp_path / "to") and (run / "fakes").is_symlink()


def test_a_second_export_into_one_folder_is_refused(runs, tmp_path, monkeypatch, capsys):
    """In the midst of the first: both would write the same files."""
    real, texts = sample.Export.draw, []

    def draw(self, *args):
        if not texts:
            texts.append(refused(capsys, runs / "sagan", 9, "--to", tmp_path / "to"))
        return real(self, *args)
    monkeypatch.setattr(sample.Export, "draw", draw)
    export(runs / "sagan", tmp_path / "to", 9)
    assert f"{tmp_path / 'to'} is being written by process {os.getpid()} on " in texts[0]
    assert texts[0].endswith("or name another folder with --to\n")
    assert len(manifest(tmp_path / "to")) == 18 and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------- the best group
def test_best_is_the_lowest_finite_score(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "acgan", run)
    lines = [{"step": 1, "G1": float("nan"), "G2": 4.0, "G3": 5.0}, {"step": 2, "G1": 4.5, "G2": 9.0, "G3": 4.25}]
    (run / "fid.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    best = okd_train.load_file(run / "G2.best.pt")
    torch.save({**best, "step": 1}, run / "G2.best.pt")
    export(run, tmp_path / "to", 1, "--group", "best")
    assert "1 images of G2, step 1," in capsys.readouterr().out
    assert json.loads((tmp_path / "to" / "export.json").read_text())["groups"]["G2"]["file"] == "G2.best.pt"
    (run / "G3.pt").unlink()
    assert "G3.pt: no such file" in refused(capsys, run, 1)


def test_how_far_the_labels_hold_is_said(runs, tmp_path, capsys):
    """By the last score that the generator's step allows, each group's; else the command that measures it."""
    run = tmp_path / "run"
    shutil.copytree(runs / "acgan", run)
    export(run, tmp_path / "to", 1, "--group", "3,2")
    command = shlex.split(capsys.readouterr().out.split("Of an export as PNGs it is by: ")[1])
    assert command == ["python", "labels.py", str(runs / "photos"), str(tmp_path / "to/G2")]
    lines = [{"step": k, "score": "rFD", "G1": 1, "G2": 2, "G3": 3,
              "labels": {"G1": k / 10, "G2": k / 20, "G3": 0.5, "reals": 0.9, "chance": 1 / 3}} for k in (1, 2, 3)]
    del lines[1]["labels"]["G2"]
    (run / "fid.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    export(run, tmp_path / "more", 1)                               # generators of step 2
    said = [line for line in capsys.readouterr().out.splitlines() if "Labels" in line]
    assert said == [f"Labels that hold at step {k}, by the features of rFD: {each} (reals held out 0.90, chance 0.33)"
                    for k, each in ((2, "G1 0.20  G3 0.50"), (1, "G2 0.05"))]
    export(runs / "sagan", tmp_path / "none", 1)
    assert "abels" not in capsys.readouterr().out.replace(str(tmp_path), "")


@pytest.fixture
def unscored(runs, tmp_path):
    """A copy of the acgan run as it would be without --fid-every."""
    run = tmp_path / "unscored"
    shutil.copytree(runs / "acgan", run)
    for path in (run / "fid.jsonl", run / "real_features.npz", *run.glob("*.best.pt")):
        path.unlink()
    args = json.loads((run / "args.json").read_text())
    args["settings"]["fid_every"] = None
    (run / "args.json").write_text(json.dumps(args))
    return run


def scored(text):
    """What an export said of scoring -> the line, {1: score of G1, ...} and the number of the best group."""
    line, = [line for line in text.splitlines() if "has no scores; made now" in line]
    head, tail = line.rstrip(".").split("; best is G")
    parts = [part[1:].split() for part in head.rsplit(": ", 1)[1].split("  ")]
    return line, {int(i): float(score) for i, score in parts}, int(tail)


@pytest.mark.parametrize("lines", [None, "", '{"step": 1, "G1": 3.0}\n', '{"step": 1, "G1": 3.0, "G2": 2.0, "G3": 1',
                                   '{"step": 1, "G1": NaN, "G2": NaN, "G3": NaN}\n'])
def test_best_of_a_run_without_scores_is_made_then_and_there(lines, runs, unscored, tmp_path, capsys):
    if lines is not None:                                           # of a run of one group; half a line; no number
        (unscored / "fid.jsonl").write_text(lines)
    before = snapshot(unscored)
    export(unscored, tmp_path / "to", 3, "--group", "best")
    line, scores, best = scored(capsys.readouterr().out)
    training = okd_train.score_lines(runs / "acgan", 3)[-1]         # of the last step, whose generators are G1.pt, ...
    assert scores == {i: float(f"{training[f'G{i}']:.2f}") for i in (1, 2, 3)}
    assert best == min((training[f"G{i}"], i) for i in (1, 2, 3))[1]
    assert "60 images of each group against 12 real ones, rFD" in line
    assert {r["checkpoint"] for r in manifest(tmp_path / "to")} == {okd_train.digest(unscored / f"G{best}.pt")}
    assert json.loads((tmp_path / "to" / "export.json").read_text())["groups"][f"G{best}"]["file"] == f"G{best}.pt"
    after = snapshot(unscored)
    assert {k: v for k, v in after.items() if k.name != "real_features.npz"} == before and len(after) == len(before) + 1


def test_a_full_folder_is_refused_before_anything_is_scored(unscored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "score_now", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    text = refused(capsys, unscored, 1, "--group", "best", "--to", tmp_path / "full")
    assert "is not empty" in text


def test_features_of_a_first_scoring(unscored, tmp_path, capsys, monkeypatch):
    """Inception's where its weights are, else random networks, which is said; those asked for in training, if any."""
    args = json.loads((unscored / "args.json").read_text())
    args["settings"]["fid_features"] = "inception"
    (unscored / "args.json").write_text(json.dumps(args))
    monkeypatch.setenv("FID_WEIGHTS", str(tmp_path / "nowhere"))
    export(unscored, tmp_path / "one", 1, "--group", "best")
    assert "rFD (random features, as there are no Inception weights here): G1" in scored(capsys.readouterr().out)[0]
    monkeypatch.setattr(fid, "find_weights", lambda download: tmp_path)

    def inception(**k):
        model = fid.random_networks(k["device"])
        model.score = "FID"
        return model
    monkeypatch.setattr(fid, "inception", inception)
    export(unscored, tmp_path / "two", 1, "--group", "best")
    assert "real ones, FID: G1" in scored(capsys.readouterr().out)[0]
    monkeypatch.undo()
    args["settings"]["fid_every"] = 5                               # asked for in training: not quietly another
    (unscored / "args.json").write_text(json.dumps(args))
    monkeypatch.setenv("FID_WEIGHTS", str(tmp_path / "nowhere"))
    assert "$FID_WEIGHTS: no file" in refused(capsys, unscored, 1, "--group", "best")


def test_scores_need_the_images_of_the_training(unscored, tmp_path, capsys):
    args = json.loads((unscored / "args.json").read_text())
    for data, words in ((tmp_path / "gone", "no such folder"),
                        (noise(tmp_path / "others", CLASSES, 5), "they are not what they were in training")):
        args["settings"]["data"] = str(data)
        (unscored / "args.json").write_text(json.dumps(args))
        text = refused(capsys, unscored, 1, "--group", "best")
        assert words in text and "has no scores" in text and "name a group, such as --group 1" in text
    assert not (unscored / "fakes").exists()


def test_four_processes_score_three_groups_alike(unscored, tmp_path, capsys):
    argv = [unscored, 60, "--group", "best", "--to"]
    p = torchrun(4, *argv, tmp_path / "four")
    (unscored / "real_features.npz").unlink()
    sample.main(list(map(str, [*argv, tmp_path / "one"])))
    assert scored(p.stdout) == scored(capsys.readouterr().out) and tree(tmp_path / "one") == tree(tmp_path / "four")


# ---------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("run, argv, want", [
    ("acgan", ["5", "--group", "0"], "numbers from 1 to 3"),
    ("acgan", ["5", "--group", "9"], "numbers from 1 to 3"),
    ("acgan", ["5", "--group", "1,1"], "each once"),
    ("acgan", ["5", "--group", "1,,2"], "--group 1,,2"),
    ("acgan", ["5", "--group", "1e9"], "--group 1e9"),
    ("acgan", ["5", "--group", "²"], "numbers from 1 to 3"),
    ("acgan", ["5", "--group", "9" * 5000], "numbers from 1 to 3"),
    ("acgan", ["5", "--group", ""], "--group is empty"),
    ("sagan", ["--per-class", "Crack=5"], "not class-conditional; give N"),
    ("sagan", ["--per-class", "5"], "not class-conditional; give N"),
    ("acgan", ["--per-class", "Soot=5"],
     "names no class of this run; say N for every class, or CLASS=N with commas between, the classes are 'Crack', "),
    ("acgan", ["--per-class", "crack=5"], "names no class"),
    ("acgan", ["--per-class", "Crack=5,Crack=6"], "twice"),
    ("acgan", ["--per-class", "Crack=0"], "number above 0"),
    ("acgan", ["--per-class", "Crack=-3"], "number above 0"),
    ("acgan", ["--per-class", "Crack=1.5"], "number above 0"),
    ("acgan", ["--per-class", f"Crack={10 ** 9}"], "at most 10000000"),
    ("acgan", ["--per-class", "Crack=5,"], "is not CLASS=N"),
    ("acgan", ["--per-class", "Crack"], "is not CLASS=N"),
    ("acgan", ["--per-class", "0"], "is not CLASS=N"),
    ("acgan", ["--per-class", ""], "--per-class is empty"),
    ("acgan", ["6", "--per-class", "Crack=5"], "N is 6 and --per-class, 5 in all, disagree"),
    ("acgan", ["0"], "'0' is no whole number from 1 to"),
    ("acgan", ["-3"], "'-3' is no whole number from 1 to"),
    ("acgan", ["many"], "'many' is no whole number from 1 to"),
    ("acgan", [str(10 ** 12)], "no whole number from 1 to 10000000"),
    ("acgan", ["5", "6"], "unrecognized arguments: 6"),
    ("acgan", [], "how many images?"),
    ("acgan", ["--group", "1", "--npz"], "how many images?"),
    ("acgan", ["--to", "x"], "how many images?"),
    ("acgan", ["5", "--steps", "9", "--resume"], "unrecognized arguments: --steps"),
    ("acgan", ["5", "--nproc", "0"], "'0' is no whole number"),
    ("acgan", ["5", "--model", "nowhere.py"], "nowhere.py"),
    ("acgan", ["5", "--device", "abacus"], "--device abacus cannot be used here"),
    ("acgan", ["5", "--to", "{full}"], "is not empty; move it away, or name another folder with --to"),
    ("acgan", ["5", "--to", "{full}/a.txt"], "a.txt is not empty"),
    ("acgan", ["5", "--to", "{full}/a.txt/b"], "cannot write"),
    ("acgan", ["5", "--to", ""], "--to is empty"),
    ("photos", ["4"], "no args.json"),
    ("nowhere", ["4"], "no args.json"),
    ("acgan/args.json", ["4"], "no args.json"),
])
def test_mistakes_are_one_line_and_write_nothing(run, argv, want, runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = snapshot(runs)
    assert want in refused(capsys, runs / run, *(a.replace("{full}", str(tmp_path)) for a in argv))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and snapshot(runs) == before


def test_a_run_is_needed(capsys):
    assert "RUN is empty" in refused(capsys, "", "4")
    assert "required: RUN" in refused(capsys)


def test_n_may_stand_anywhere_and_flags_take_underscores(runs, tmp_path, capsys):
    sample.main(["--npz", str(runs / "sagan"), "--group", "1", "7", f"--to={tmp_path / 'a_b'}"])
    sample.main([str(runs / "acgan"), "--per_class", "Crack=2", "--to", str(tmp_path / "c_d")])
    assert len(manifest(tmp_path / "a_b")) == 7 and len(manifest(tmp_path / "c_d")) == 6


def test_a_generator_that_changes_while_it_is_read(runs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs / "sagan", run)
    real = okd_train.load_generator

    def load_generator(path, *a):
        G = real(path, *a)
        shutil.copy(run / "G2.pt", path)                            # a training saves
        return G
    monkeypatch.setattr(okd_train, "load_generator", load_generator)
    assert "changed while being read" in refused(capsys, run, 3, "--group", "1")
    assert not list(run.glob(".fakes*"))


class Bomb:
    """What a generator's file must not be able to do to whoever loads it."""

    def __reduce__(self):
        return os.mkdir, (os.environ["BOOM"],)


def test_generators_made_to_harm(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BOOM", str(tmp_path / "boom"))
    run = tmp_path / "run"
    shutil.copytree(runs / "sagan", run)
    G = okd_train.load_file(run / "G1.pt")
    key = next(iter(G["state_dict"]))
    for words, d in (("is cut short", {**G, "bomb": Bomb()}), ("not a generator", [1]),
                     ("not a generator", {"model": "sagan"}),
                     ("not a generator", {k: v for k, v in G.items() if k != "step"}),
                     ("does not fit", {**G, "kwargs": 3}), ("does not fit", {**G, "kwargs": {"ch": "wide"}}),
                     ("does not fit", {**G, "state_dict": None}),
                     ("not finite", {**G, "state_dict": {**G["state_dict"], key: G["state_dict"][key] / 0}})):
        torch.save(d, run / "G1.pt")
        assert words in refused(capsys, run, 2), words
    assert not (tmp_path / "boom").exists() and not (run / "fakes").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{}", b"\xff\xfe", b"[" * 100000, b"null"])
def test_args_json_of_garbage(content, tmp_path, capsys):
    (tmp_path / "args.json").write_bytes(content)
    assert "args.json cannot be read" in refused(capsys, tmp_path, 3)


def test_numbers_of_args_json_have_limits(runs, tmp_path, capsys):
    shutil.copytree(runs / "sagan", tmp_path / "run")
    args = json.loads((tmp_path / "run/args.json").read_text())
    for name, value, words in (("groups", 10 ** 9, "--groups is 1000000000; it must be at most 1000"),
                               ("seed", -1, "--seed is -1"), ("device", "", "--device is empty"),
                               ("groups", "2", "'groups' is \"2\"; it must be a int")):
        changed = {**args, "settings": {**args["settings"], name: value}}
        (tmp_path / "run/args.json").write_text(json.dumps(changed))
        assert words in refused(capsys, tmp_path / "run", 3)


# ---------------------------------------------------------------------------------------------- disks, names, places
@contextlib.contextmanager
def mounted(place, *options):
    """A small tmpfs, or the folder itself read-only; skips where mounting is not allowed."""
    place.mkdir(exist_ok=True)
    if not ROOT or subprocess.run(["mount", *options, str(place)], capture_output=True).returncode:
        pytest.skip("needs root and the right to mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(runs, tmp_path, capsys):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "none") as disk:
        shutil.copytree(runs / "sagan", disk / "run", ignore=shutil.ignore_patterns("checkpoint.pt", "samples"))
        (disk / "ballast").write_bytes(bytes(max(0, os.statvfs(disk).f_bavail * 4096 - 100000)))
        assert "No space left" in refused(capsys, disk / "run", 200)
        assert not (disk / "run/fakes").exists()
        for path in (disk / "run/.fakes.partial").rglob("0*.png"):  # what has its name is whole
            Image.open(path).load()
        (disk / "ballast").unlink()
        sample.main([str(disk / "run"), "200"])
        assert len(manifest(disk / "run/fakes")) == 400


def test_a_folder_that_may_not_be_written_to(runs, tmp_path, capsys):
    shutil.copytree(runs / "sagan", tmp_path / "disk/run")
    before = snapshot(tmp_path / "disk")
    with mounted(tmp_path / "disk", "--bind", str(tmp_path / "disk")) as disk:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
        assert "Read-only file system" in refused(capsys, disk / "run", 2)
        assert snapshot(disk) == before


@pytest.mark.parametrize("name", ["-dash quote'\" $(touch x) `y` 50% {x} %s", "line\nbreak Bücke 日本 \u202e",
                                  os.fsdecode(b"no \xff text")])
def test_odd_names(name, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "sagan", name)
    sample.main([name, "2"])
    assert len(manifest(tmp_path / name / "fakes")) == 4 and [p.name for p in tmp_path.iterdir()] == [name]
    sample.main([f"--to=to {name}", "--", name, "2"])
    assert tree(tmp_path / f"to {name}") == tree(tmp_path / name / "fakes")
    refused(capsys, name, "2")


def test_nothing_is_written_elsewhere(runs, unscored, tmp_path, root):
    """From another folder and with an empty HOME, scoring too: both are left as they were."""
    home, cwd, tmp = (tmp_path / d for d in ("home", "cwd", "tmp"))
    for d in (home, cwd, tmp):
        d.mkdir()
    before = snapshot(root)
    env = dict(ENV, HOME=str(home), TMPDIR=str(tmp), XDG_CACHE_HOME="", TORCH_HOME="", XDG_CONFIG_HOME="")
    p = command(unscored, 3, "--group", "best", "--nproc", "2", cwd=cwd, env=env)
    assert p.stderr == "" and len(list((unscored / "fakes").rglob("*.png"))) == 3
    left = [p.name for p in tmp.iterdir() if not p.name.startswith("torchinductor_")]   # torch makes it when imported
    assert not snapshot(home) and not snapshot(cwd) and not left and snapshot(root) == before


def test_the_settings_of_an_export_do_not_enter_the_run(runs):
    settings = json.loads((runs / "acgan" / "args.json").read_text())["settings"]
    assert not {"sample", "per_class", "group", "to", "npz"} & settings.keys()


# ---------------------------------------------------------------------------------------------- the file by itself
def test_alone_it_says_what_it_needs(root, tmp_path):
    shutil.copy(root / "sample.py", tmp_path)
    def python(*argv):
        return subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    for argv in (["run", "3"], []):
        p = python("sample.py", *argv)
        assert p.returncode == 2 and p.stdout == "" and p.stderr.count("\n") == 1, p.stderr
        assert p.stderr.startswith("sample.py: error: ") and "needs okd_train.py beside sample.py" in p.stderr
    p = python("sample.py", "--help")
    assert p.returncode == 0 and p.stderr == "" and "--per-class" in p.stdout and "torchrun" in p.stdout
    p = python("-c", "import sample")
    assert p.returncode and p.stderr.splitlines()[-1] == "ImportError: sample.py needs okd_train.py beside it"


@pytest.mark.parametrize("first", ["", "import okd_train; "])
def test_another_okd_train_does_not_fool_it(first, runs, root, tmp_path):
    """A module of the user's own that is called okd_train stands earlier on sys.path, or is imported already."""
    (tmp_path / "okd_train.py").write_text("name = 'mine'")
    export(runs / "sagan", tmp_path / "to", 1, "--group", "1")
    code = (f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; {first}import csv, sample\n"
            f"row, = csv.DictReader(open({str(tmp_path / 'to/manifest.csv')!r}))\n"
            f"print(sample.redraw({str(runs / 'sagan')!r}, row).tobytes().hex())\n"
            + ("import okd_train as again; assert again is okd_train and again.name == 'mine'" if first else ""))
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=60)
    assert p.returncode == 0, p.stderr
    assert p.stdout.strip() == pixels(tmp_path / "to", {"file": "G1/000000.png"}).tobytes().hex()


def test_the_run_book(runs, tmp_path, monkeypatch):
    """Its commands, a hundredth of the images, and its lines of Python."""
    monkeypatch.chdir(tmp_path)
    for name in ("acgan", "sagan"):
        shutil.copytree(runs / name, tmp_path / f"runs/{name}-3")
    commands = re.findall(r"^    python sample.py (.*?)  +#", sample.__doc__, re.M)
    assert len(commands) == 6
    for line in commands:
        shutil.rmtree(tmp_path / "runs/acgan-3/fakes", ignore_errors=True)
        sample.main(re.sub(r"00\b", "", line).split())
    torch_line, = re.findall(r"^    torchrun (.*?)  +#", sample.__doc__, re.M)
    assert torch_line == "--nproc-per-node 2 sample.py runs/sagan-3 1000"
    assert len(list((tmp_path / "cracks").rglob("*.png"))) == 5 and len(manifest(tmp_path / "mixed")) == 20
    code, = re.findall(r"^    (import csv.*?)\n\n", sample.__doc__, re.M | re.S)
    names = {}
    exec(code.replace("    ", "").replace("17", "4"), names)
    assert np.array_equal(names["image"], pixels(tmp_path / "cracks", names["rows"][4]))
