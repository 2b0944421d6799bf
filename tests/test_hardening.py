"""A hostile or failing world: full disks, two runs in one folder, changing data, harmful files, edited settings."""
import contextlib
import errno
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import crop_codebrim
import fid
import okd_train
import sample
from conftest import least_peak, noise
from test_bad_input import snapshot
from test_crop_codebrim import add
from test_okd_train import ENV, TINY, assert_same, checkpoint, logs, refused, start, train

ROOT = os.name == "posix" and os.geteuid() == 0


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("photos"), ("Crack", "Spallation"), 8)


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    okd_train.main(["--data", str(photos), *TINY, "--groups", "1", "--out", str(out), "--steps", "1"])
    return out


@pytest.fixture
def base(photos, tmp_path):
    return ["--data", str(photos), *TINY, "--groups", "1", "--out", str(tmp_path / "run")]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


# ---------------------------------------------------------------------------------------------- full disks
def fill(folder, leave):
    """Write zeros until `leave` bytes are free."""
    with open(folder / "ballast", "wb") as f:
        f.write(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - leave))


def test_a_full_disk_while_training_keeps_the_last_checkpoint(photos, tmp_path, capsys):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "none") as disk:
        out = disk / "run"
        every = ["--save-every", "2", "--log-every", "1"]
        argv = ["--data", photos, *TINY, "--groups", "2", *every, "--out"]
        train(*argv, out, "--steps", "2")
        kept = contents(out)
        fill(disk, 40000)                                           # a checkpoint is larger, a line of the log is not
        text = refused(capsys, *argv, out, "--resume", "--steps", "4")
        assert "cannot write" in text and "No space left" in text
        assert all((out / k).read_bytes() == v for k, v in kept.items() if k.endswith(".pt"))
        assert not [p for p in out.rglob("*") if ".tmp" in p.name or p.name == ".lock"]
        (disk / "ballast").unlink()
        train(*argv, out, "--resume", "--steps", "4")
        assert [x["step"] for x in logs(out)] == [1, 2, 3, 4]
        fill(disk, 0)
        assert "No space left" in refused(capsys, *argv, disk / "second", "--steps", "2")


def status(program, *argv):
    """The exit status of another program's main."""
    try:
        return program.main(list(map(str, argv)))
    except SystemExit as e:
        return e.code


def test_a_full_disk_while_scoring_and_cropping(photos, tmp_path, capsys):
    pair = [photos / "Crack", photos / "Spallation", "--features", "random"]
    add(tmp_path / "src", "a", [(1, 1, 150, 120, "Crack")])
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "none") as disk:
        assert status(fid, "--save", disk / "s.npz", photos / "Crack", "--weights", "x") == 2
        fill(disk, 8192)
        before = contents(disk)
        for program, argv in ((fid, [*pair, "--copies", disk / "c.png"]),
                              (crop_codebrim, [tmp_path / "src", disk / "crops", "--n", "40"])):
            capsys.readouterr()
            assert status(program, *argv) == 2
            text = capsys.readouterr().err
            assert "No space left" in text.splitlines()[-1] and "Traceback" not in text and contents(disk) == before


def test_a_folder_that_may_not_be_written_to(photos, tmp_path, capsys):
    argv = ["--data", photos, *TINY, "--groups", "1", "--out"]
    train(*argv, tmp_path / "disk/run", "--steps", "1")
    before = snapshot(tmp_path / "disk")
    with mounted(tmp_path / "disk", "--bind", str(tmp_path / "disk")) as disk:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
        assert "Read-only file system" in refused(capsys, *argv, disk / "run", "--resume", "--steps", "2")
        assert "Read-only file system" in refused(capsys, *argv, disk / "other", "--steps", "2")
        pair = [photos / "Crack", photos / "Spallation", "--features", "random"]
        assert status(fid, *pair, "--copies", disk / "c.png") == 2
        add(tmp_path / "src", "a", [(1, 1, 150, 120, "Crack")])
        assert status(crop_codebrim, tmp_path / "src", disk / "crops", "--n", "5") == 2
        assert "Traceback" not in capsys.readouterr().err and snapshot(disk) == before


@pytest.mark.parametrize("name", ["checkpoint.pt", "G1.pt", "args.json", "log.jsonl", "real.png", "step_000002.png"])
def test_any_file_that_cannot_be_written(name, base, finished, tmp_path, capsys, monkeypatch):
    """The same without the right to mount: one file after the other fails, in the middle of its content."""
    shutil.copytree(finished, tmp_path / "run")
    kept = contents(tmp_path / "run")
    real = open

    class Full(io.FileIO):
        def write(self, b):
            super().write(b[:7])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", *a, **k):
        if name in str(path) and mode not in ("r", "rb"):
            return Full(path, mode.replace("b", ""))
        return real(path, mode, *a, **k)
    monkeypatch.setattr("builtins.open", opened)
    text = refused(capsys, *base, "--resume", "--steps", "2")
    assert "No space left" in text and name in text
    monkeypatch.undo()
    now = contents(tmp_path / "run")
    whole = [k for k in kept if k.endswith(".pt") and name in (k, "checkpoint.pt")]
    assert all(now[k] == kept[k] for k in whole) and not [k for k in now if ".tmp" in k]
    train(*base, "--resume", "--steps", "2")
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_stdout_on_a_full_disk_or_closed(base, tmp_path, monkeypatch):
    monkeypatch.delitem(ENV, "PYTHONUNBUFFERED", raising=False)     # with it nothing is left for the end
    with open("/dev/full", "w") as full:
        ps = [start(*base[:-1], tmp_path / f"run{k}", "--steps", "1", stdout=out)
              for k, out in enumerate((full, subprocess.PIPE))]
    ps[1].stdout.close()
    for p, words in zip(ps, ("No space left", "Broken pipe")):
        text = p.stderr.read()
        assert p.wait(60) == 2 and text.count("\n") == 1 and words in text, text


# ---------------------------------------------------------------------------------------------- two runs in one folder
def wait_for(condition, *processes):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.02)


def test_a_second_training_is_refused_and_kill_9_leaves_nothing_in_the_way(base, tmp_path, capsys):
    out = tmp_path / "run"
    first = start(*base, "--steps", 100000, "--save-every", "3", "--log-every", "1", "--sample-every", 100000)
    wait_for((out / "checkpoint.pt").exists, first)
    for more in ([], ["--resume"]):
        text = refused(capsys, *base, *more)
        assert f"is being trained by process {first.pid} on {socket.gethostname()}" in text
    assert first.poll() is None
    first.kill()
    first.wait()
    assert (out / ".lock").exists()
    step = checkpoint(out)["step"]
    train(*base, "--resume", "--steps", step + 2)
    assert checkpoint(out)["step"] == step + 2 and not (out / ".lock").exists()


def test_of_starts_at_the_same_moment_one_trains(tmp_path, root):
    """Many processes at the lock at once, each looking for a run and beginning one as train() does."""
    code = ("import sys, time; from pathlib import Path; import okd_train\n"
            "out = Path(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
            "with okd_train.Lock(out) as lock:\n"
            "    try: lock.take(print)\n"
            "    except okd_train.UserError as e: print('refused', e); sys.exit()\n"
            "    if (out / 'args.json').exists(): print('there'); sys.exit()\n"
            "    time.sleep(0.01 * float(sys.argv[2])); (out / 'args.json').write_text('x'); print('trains')\n")
    ps = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "deep/run", str(k)], cwd=root, env=ENV, text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE) for k in range(3)]
    assert [p.stdout.readline() for p in ps] == ["ready\n"] * 3
    for p in ps:
        p.stdin.write("\n")
        p.stdin.flush()
    said = [p.communicate(timeout=60)[0] for p in ps]
    assert sum("trains" in x for x in said) == 1, said
    assert all(x.startswith(("trains", "refused", "there")) for x in said), said
    assert [p.name for p in (tmp_path / "deep/run").iterdir()] == ["args.json"]


def test_the_lock_under_threads_is_never_held_twice(tmp_path):
    """Take, look, remove, again: the file that is removed between another's open and lock must not count."""
    held, worst, taken = [], [], []

    def work():
        for _ in range(150):
            with contextlib.suppress(okd_train.UserError), okd_train.Lock(tmp_path / "run") as lock:
                lock.take(print)
                held.append(1)
                worst.append(len(held))
                time.sleep(0)
                held.pop()
                taken.append(1)
    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert max(worst) == 1 and len(taken) > 20


def test_a_lock_on_a_file_that_is_gone_does_not_count(tmp_path, monkeypatch):
    """Its last holder removes the file after our open and before our lock: a third would lock another of that name."""
    flock, calls = okd_train.fcntl.flock, []

    def late(fd, how):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(fd)
        return flock(fd, how)
    monkeypatch.setattr(okd_train.fcntl, "flock", late)
    with okd_train.Lock(tmp_path) as lock:
        lock.take(print)
        assert len(calls) == 2 and os.stat(tmp_path / ".lock").st_ino == os.fstat(lock.fd).st_ino


def test_where_locks_do_not_work(base, tmp_path, capsys, monkeypatch):
    def no_locks(*a):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(okd_train.fcntl, "flock", no_locks)
    okd_train.main([*base, "--steps", "1"])
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
    monkeypatch.setattr(okd_train, "fcntl", None)
    train(*base, "--steps", "2", "--resume")
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_a_refused_start_leaves_no_folder(base, tmp_path, capsys):
    with okd_train.Lock(tmp_path / "a" / "b") as lock:
        lock.take(print)
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not (tmp_path / "a").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")     # nobody is led to write elsewhere
    assert "cannot write" in refused(capsys, *base) and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["samples", "log.jsonl", "fid.jsonl"])
def test_a_link_leads_no_run_outside_its_folder(name, base, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    place, outside = tmp_path / "run" / name, tmp_path / "outside"
    (shutil.rmtree if place.is_dir() else Path.unlink)(place) if place.exists() else None
    outside.mkdir() if name == "samples" else outside.write_bytes(b"")
    place.symlink_to(outside)
    before = snapshot(tmp_path)
    assert f"{name} is a link" in refused(capsys, *base, "--resume", "--steps", "2")
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------------------------------- a folder that changes
def test_images_that_change_during_a_run(photos, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    argv = [*TINY, "--groups", "1", "--log-every", "1", "--steps", "4"]
    okd_train.main(["--data", str(photos), *argv, "--out", str(tmp_path / "calm")])
    step = okd_train.Trainer.step

    def disturb(self):
        if self.step_count == 1:                                    # deleted, edited, added: all is in memory
            (data / "Crack" / "0.png").unlink()
            (data / "Crack" / "1.png").write_bytes(b"")
            Image.new("RGB", (32, 32)).save(data / "Crack" / "new.png")
        return step(self)
    monkeypatch.setattr(okd_train.Trainer, "step", disturb)
    okd_train.main(["--data", str(data), *argv, "--out", str(tmp_path / "run")])
    assert_same(*(checkpoint(tmp_path / d) for d in ("calm", "run")))
    capsys.readouterr()
    assert "1.png" in refused(capsys, "--out", tmp_path / "run", "--resume", "--steps", "5")
    (data / "Crack" / "1.png").unlink()
    assert "are not those" in refused(capsys, "--out", tmp_path / "run", "--resume", "--steps", "5")


def test_an_image_that_vanishes_between_listing_and_decoding(photos, tmp_path, capsys, monkeypatch):
    shutil.copytree(photos, tmp_path / "data")
    found = fid.class_images

    def class_images(folder, say=None):
        files = found(folder, say)
        (tmp_path / "data" / "Crack" / "3.png").unlink(missing_ok=True)
        return files
    monkeypatch.setattr(fid, "class_images", class_images)
    text = refused(capsys, "--data", tmp_path / "data", *TINY, "--out", tmp_path / "run")
    assert "1 of 16 images cannot be read" in text and "3.png" in text and not (tmp_path / "run").exists()
    find = fid.find_images

    def find_images(folder, say=None):
        found = find(folder, say)
        for path in found[0][:1]:
            if tmp_path in path.parents:
                path.unlink()
        return found
    monkeypatch.setattr(fid, "find_images", find_images)
    assert status(fid, tmp_path / "data" / "Spallation", photos / "Crack", "--features", "random") == 2
    assert "0.png" in capsys.readouterr().err.splitlines()[-1]


def test_the_clock_does_not_matter(base, root, tmp_path, monkeypatch):
    """The wall clock runs backwards by a day at every look, and files come from the future."""
    train(*base, "--steps", "4", "--log-every", "1", "--out", tmp_path / "calm")
    now = [2e9]

    def backwards():
        now[0] -= 86400
        return now[0]
    monkeypatch.setattr(time, "time", backwards)
    okd_train.main([*base, "--steps", "2", "--log-every", "1"])
    for p in (tmp_path / "run").rglob("*"):
        os.utime(p, (4e9, 4e9))
    okd_train.main([*base, "--steps", "4", "--resume", "--max-seconds", "1000"])
    assert_same(*(checkpoint(tmp_path / d) for d in ("calm", "run")))
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert all(x["seconds"] >= 0 for x in lines) and logs(tmp_path / "run") == logs(tmp_path / "calm")
    for script in root.glob("*.py"):
        text = script.read_text()
        assert "time.time()" not in text and "datetime.now" not in text, script


# ---------------------------------------------------------------------------------------------- files made to harm
class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOOM"],)


def hostile_checkpoints(state):
    """(words of the complaint, a changed copy of a good checkpoint)."""
    def changed(**k):
        return {**state, **k}

    def group(**k):
        return changed(groups=[{**first, **k}])

    def net(**k):
        return group(G={**first["G"], "net": {**first["G"]["net"], **k}})

    def opt(**k):
        return group(D={**first["D"], "opt": {**first["D"]["opt"], 0: {**first["D"]["opt"][0], **k}}})
    first = state["groups"][0]
    name = next(k for k in first["G"]["net"] if k.endswith("bias"))
    w, moment = first["G"]["net"][name], first["D"]["opt"][0]["exp_avg"]
    return [
        ("cut short", changed(bomb=Bomb())),
        ("is not a checkpoint", [state]),
        ("is not a checkpoint", {k: v for k, v in state.items() if k != "step"}),
        ("make no sense", changed(step=-1)),
        ("make no sense", changed(step=10 ** 30)),
        ("make no sense", changed(step=float("nan"))),
        ("make no sense", changed(step="4")),
        ("make no sense", changed(groups=7)),
        ("holds 0 groups", changed(groups=[])),
        ("does not fit", changed(groups=[3])),
        ("does not fit", changed(groups=[{}])),
        ("is no float32 tensor", net(**{name: w[:-1]})),
        ("is no float32 tensor", net(**{name: w.double()})),
        ("is no float32 tensor", net(**{name: "w"})),
        (f"{name} is not finite", net(**{name: w * float("nan")})),
        ("has other names", net(more=w)),
        ("exp_avg is not finite", opt(exp_avg=moment / 0)),
        ("is no float32 tensor", opt(exp_avg_sq=torch.zeros(3))),
        ("does not fit", changed(groups=[{k: v for k, v in first.items() if k != "ema"}])),
        ("does not fit", group(D=None)),
        ("is no float32 tensor", net(**{name: w.to_sparse()})),
    ]


def test_hostile_checkpoints(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BOOM", str(tmp_path / "boom"))
    train(*base, "--steps", "2")
    out = tmp_path / "run"
    good = (out / "checkpoint.pt").read_bytes()
    for words, state in hostile_checkpoints(checkpoint(out)):
        torch.save(state, out / "checkpoint.pt")
        assert words in refused(capsys, *base, "--resume", "--steps", "4"), words
    with zipfile.ZipFile(io.BytesIO(good)) as old:
        with zipfile.ZipFile(out / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():                             # torch would unpack it, however large it becomes
                new.writestr(name, old.read(name))
    assert "cut short" in refused(capsys, *base, "--resume", "--steps", "4")
    assert not (tmp_path / "boom").exists()


def png(width, height, body=b""):
    """A PNG whose header promises width x height pixels."""
    import struct
    import zlib
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.fixture
def hostile_images(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    files = dict(
        huge=png(2 ** 31 - 1, 2 ** 31 - 1), large=png(12000, 12000, bytes(1000)), nothing=png(0, 0),
        short=png(64, 64, bytes(10)), html=b"<html>404</html>", pickle=b"\x80\x04cos\nsystem\n.", empty=b"",
        svg=b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>",
        eps=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(%pipe%touch boom) (w) file\n%%EOF\n")
    for name, data in files.items():
        (folder / f"{name}.png").write_bytes(data)
    Image.new("1", (11000, 11000)).save(folder / "bomb.png")        # 121 megapixels in 15 kB
    os.mkfifo(tmp_path / "pipe")
    (folder / "pipe.png").symlink_to(tmp_path / "pipe")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    return folder


def test_hostile_images(hostile_images, photos, tmp_path, capsys, monkeypatch):
    no_program = lambda *a, **k: pytest.fail("a program was started")   # Pillow's EPS reader starts Ghostscript
    monkeypatch.setattr(subprocess, "Popen", no_program)
    names = sorted(p.name for p in hostile_images.iterdir())
    text = refused(capsys, "--data", hostile_images, *TINY, "--out", tmp_path / "run")
    assert f"{len(names)} of {len(names)} images" in text and all(n in text for n in names)
    assert status(fid, hostile_images, photos / "Crack", "--features", "random", "--workers", "1") == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert f"{len(names)} of {len(names)} images" in text and all(n in text for n in names)
    add(tmp_path / "src", "good", [(1, 1, 150, 120, "Crack")])
    for name in names:
        (tmp_path / "src" / "images" / name).symlink_to(hostile_images / name)
        shutil.copy(tmp_path / "src/annotations/good.xml", tmp_path / f"src/annotations/{name[:-4]}.xml")
    assert status(crop_codebrim, tmp_path / "src", tmp_path / "crops", "--n", "5") in (0, None)
    assert {p.name.split("_")[0] for p in (tmp_path / "crops" / "Crack").iterdir()} == {"good"}


# ---------------------------------------------------------------------------------------------- edited by hand
@pytest.mark.parametrize("change, words", [
    (lambda a: a["settings"].update(batch_size="four"), "'batch_size' is \"four\"; it must be a int"),
    (lambda a: a["settings"].update(batch_size=4.5), "must be a int"),
    (lambda a: a["settings"].update(batch_size=True), "must be a int"),
    (lambda a: a["settings"].update(groups=None), "must be a int"),
    (lambda a: a["settings"].update(rho=[1]), "must be a float"),
    (lambda a: a["settings"].update(rho=float("nan")), "--rho is nan"),
    (lambda a: a["settings"].update(steps=-5), "--steps is -5"),
    (lambda a: a["settings"].update(seed=-1), "--seed is -1"),
    (lambda a: a["settings"].update(groups=10 ** 9), "it must be at most"),
    (lambda a: a["settings"].update(data=7), "must be a str"),
    (lambda a: a["settings"].update(data=""), "--data is empty"),
    (lambda a: a["settings"].update(flip="yes"), "must be a bool"),
    (lambda a: a["settings"].update(wdith=3), "'wdith', which sagan has no flag for"),
    (lambda a: a["settings"].pop("ch"), "lack 'ch'"),
    (lambda a: a["settings"].pop("groups"), "lack 'groups'"),
    (lambda a: a.pop("settings"), "settings is missing"),
    (lambda a: a.update(settings=[1]), "settings is missing or not a dict"),
    (lambda a: a.update(classes="Crack"), "classes is missing or not a list"),
    (lambda a: a.update(classes=["../../x"]), "no names of folders"),
    (lambda a: a.update(agents=5), "agents is not a list"),
    (lambda a: a.pop("data_digest"), "data_digest is missing"),
    (lambda a: a.update(model=3), "model is missing or not a str"),
    (lambda a: a.update(model="no/such.py", script="gone/such.py"), "no model script 'no/such.py'"),
    (lambda a: a.update(model="", script=""), "no model script"),
    (lambda a: a.update(images="many"), "images is missing or not a int"),
])
def test_args_json_edited_by_hand(change, words, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    args = json.loads((out / "args.json").read_text())
    change(args)
    (out / "args.json").write_text(json.dumps(args))
    before = snapshot(out)
    assert words in refused(capsys, "--out", out, "--resume")
    assert snapshot(out) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{}", b"\xff\xfe", b"[" * 100000, b"null"])
def test_args_json_of_garbage(content, tmp_path, capsys):
    (tmp_path / "args.json").write_bytes(content)
    assert "args.json cannot be read" in refused(capsys, "--out", tmp_path, "--resume")


GARBAGE = [b"\xff\xfe\x00", b"{", b"[1, 2]", b"null", b'"step"', b'{"step": "7"}', b'{"step": null, "G1": 1}',
           b'{"step": NaN, "G1": 2}', b'{"step": 1}', b'{"step": 1, "G1": "low"}', b"[" * 100000,
           b'{"step": 1e999, "G1": 3}']


def test_logs_with_garbage_lines(photos, tmp_path, capsys):
    scored = ["--fid-every", "1", "--fid-samples", "8", "--fid-features", "random"]
    argv = ["--data", photos, *TINY, "--groups", "1", *scored, "--log-every", "1"]
    train(*argv, "--steps", "3", "--out", tmp_path / "calm")
    train(*argv, "--steps", "2", "--out", tmp_path / "run")
    for name in ("log.jsonl", "fid.jsonl"):
        path = tmp_path / "run" / name
        path.write_bytes(b"\n".join([*GARBAGE, *path.read_bytes().splitlines(), *GARBAGE]))
    train(*argv, "--steps", "3", "--out", tmp_path / "run", "--resume")
    assert [x["step"] for x in okd_train.score_lines(tmp_path / "run")] == [1, 2, 3]
    assert logs(tmp_path / "run")[-1] == logs(tmp_path / "calm")[-1]


# ---------------------------------------------------------------------------------------------- who may read what
AS_NOBODY = """
import os, sys, tempfile
sys.path.insert(0, sys.argv[1])
import numpy.ma, okd_train, fid, crop_codebrim, sagan
okd_train.Image.init()
fid.random_networks("cpu")
with tempfile.TemporaryDirectory() as warm:     # all that is imported late is there before nobody may look for it
    data = ["--data", sys.argv[2] + "/data/Spallation", "--groups", "1"]
    okd_train.main([*data, *sys.argv[3:], "--out", warm + "/run", "--steps", "1"])
os.setgid(65534)
os.setuid(65534)
os.chdir(sys.argv[2])
for program, argv in (
        (okd_train, ["--data", "data", *sys.argv[3:], "--out", "/nonexistent/x"]),
        (fid, ["data/Crack", "data/Spallation", "--features", "random"]),
        (okd_train, ["--data", "locked", *sys.argv[3:]]),
        (fid, ["locked", "data/Crack", "--features", "random"]),
        (crop_codebrim, ["src", "crops", "--n", "3"]),
        (okd_train, ["--data", "data/Spallation", *sys.argv[3:], "--out", "other"]),
        (okd_train, ["--out", "run", "--resume"])):
    try:
        status = program.main(argv)
    except SystemExit as e:
        status = e.code
    print("status", status, file=sys.stderr)
"""


@pytest.mark.skipif(not ROOT, reason="needs root, to become nobody")
def test_what_may_not_be_read_is_named(photos, root):
    """As nobody: an image, a folder and args.json of another user, and a folder that may not be written to."""
    if not all(p.stat().st_mode & stat.S_IXOTH for p in (root, *root.parents)):
        pytest.skip("nobody may not look into the checkout")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        shutil.copytree(photos, place / "data")
        for p in (place / "data", *(place / "data").iterdir()):
            p.chmod(0o755)
        train("--data", photos, *TINY, "--groups", "1", "--out", place / "run", "--steps", "1")
        add(place / "src", "a", [(1, 1, 150, 120, "Crack")])
        add(place / "src", "b", [(1, 1, 150, 120, "Crack")])
        (place / "locked" / "sub").mkdir(parents=True)
        for name in ("data/Crack/2.png", "src/images/b.png", "locked/sub", "locked", "run/args.json"):
            (place / name).chmod(0)
        before = snapshot(place)
        p = subprocess.run([sys.executable, "-c", AS_NOBODY, root, place, *TINY], capture_output=True, text=True,
                           env=ENV, cwd="/", timeout=100)
        assert "Traceback" not in p.stderr and p.stderr.count("status 2\n") == 7, p.stderr
        lines = [x for x in p.stderr.splitlines() if not x.startswith(("status", "real", "fake"))]
        for line, words in zip(lines, (
                "1 of 16 images cannot be read: data/Crack/2.png", "1 of 8 images cannot be read: data/Crack/2.png",
                "locked: cannot be read (Permission denied)", "locked: cannot be read (Permission denied)",
                "Permission denied", "Permission denied", "args.json cannot be read"), strict=True):
            assert words in line, p.stderr
        assert snapshot(place) == before


# ---------------------------------------------------------------------------------------------- names and places
@pytest.mark.parametrize("name", ["-dash quote'\" $(touch x) `y` 50% {x} %s", "line\nbreak Bücke 日本 \u202e",
                                  os.fsdecode(b"no \xff text")])
def test_odd_names_for_data_out_and_model(name, photos, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, f"d {name}")
    script = f"m {name}.py"
    shutil.copy(root / "sagan.py", script)
    argv = [f"--data=d {name}", *TINY, "--groups", "1", f"--out={name}", "--log-every", "1"]
    okd_train.main([*argv, f"--model=./{script}", "--steps", "1"])
    okd_train.main([f"--out={name}", "--resume", "--steps", "2"])
    sample.main(["--", name, "2"])
    assert len(list((tmp_path / name / "fakes").rglob("*.png"))) == 2 and checkpoint(tmp_path / name)["step"] == 2
    left = [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"]
    assert sorted(left) == sorted([f"d {name}", name, script])


def test_nothing_is_written_outside_out(photos, tmp_path, root):
    """Training on two processes and scoring, from another folder, with an empty HOME: both are left as they were."""
    home, cwd, tmp = (tmp_path / d for d in ("home", "cwd", "tmp"))
    for d in (home, cwd, tmp):
        d.mkdir()
    tree = snapshot(root)
    env = dict(ENV, HOME=str(home), TMPDIR=str(tmp), XDG_CACHE_HOME="", TORCH_HOME="", XDG_CONFIG_HOME="")
    scored = ["--fid-every", "2", "--fid-samples", "8", "--fid-features", "random"]
    argv = ["--data", photos, *TINY, "--groups", "2", "--steps", "2", *scored, "--nproc", "2"]
    p = start(*argv, "--out", tmp_path / "run", cwd=cwd, env=env)
    text, errors = p.communicate(timeout=120)
    assert p.returncode == 0 and errors == "", errors
    assert (tmp_path / "run/fid.jsonl").exists() and "Starting 2 processes" in text
    left = [p.name for p in tmp.iterdir() if not p.name.startswith("torchinductor_")]   # torch makes it when imported
    assert not snapshot(home) and not snapshot(cwd) and not left and snapshot(root) == tree


# ---------------------------------------------------------------------------------------------- many images
def test_memory_per_image_is_that_of_its_pixels(tmp_path):
    """What loading takes beside the array stays below 1.5 kB an image; the digest copies nothing."""
    images = np.random.default_rng(0).integers(0, 256, (2000, 16, 16, 3), dtype=np.uint8)
    for k, a in enumerate(images):
        Image.fromarray(a).save(tmp_path / f"{k:05d}.png", compress_level=0)
    okd_train.load_folder(tmp_path, 16, False, False, print)        # Pillow's and the pool's own first use
    peak = least_peak(lambda k: okd_train.load_folder(tmp_path, 16, False, False, print))
    assert peak < images.nbytes + 2000 * 1500
    loaded, labels, _ = okd_train.load_folder(tmp_path, 16, False, False, print)
    s, script, named = okd_train.parse([])
    peak = least_peak(lambda k: okd_train.Data(loaded, labels, [], s, torch.device("cpu")))
    assert peak < images.nbytes / 2


@pytest.mark.skipif("OKD_SLOW" not in os.environ, reason="OKD_SLOW=1 runs it: 100,000 images, minutes")
def test_100000_images(tmp_path):
    """Prints time and memory of listings, of loading and of random features; the bound of the quick test holds."""
    import resource
    data = np.random.default_rng(0).integers(0, 256, (100000, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "d").mkdir()
    for k, a in enumerate(data):
        Image.fromarray(a).save(tmp_path / "d" / f"{k:06d}.png", compress_level=0)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    del data
    before, report = peak(), []
    for what, f in (("list", lambda: fid.class_images(tmp_path / "d")),
                    ("load", lambda: okd_train.load_folder(tmp_path / "d", 16, False, False, print)),
                    ("crop list", lambda: crop_codebrim.walk(tmp_path / "d")),
                    ("fid list", lambda: fid.find_images(tmp_path / "d")),
                    ("fid features", lambda: fid.features(tmp_path / "d", features="random", device="cpu"))):
        begin = time.monotonic()
        f()
        report.append(f"{what}: {time.monotonic() - begin:.1f} s, peak {peak():.0f} MB (before {before:.0f})")
        assert what != "load" or peak() < before + 100000 * (16 * 16 * 3 + 1500) / 2 ** 20
    print("\n".join(report))
