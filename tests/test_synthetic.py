"""synthetic.py: the renderer's bytes, the tree of photos with boxes, the command, and other files beside it."""
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import crop_codebrim
import synthetic
from test_crop_codebrim import FLAGS, reasons, run, table, tree

ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


# ---- small pictures -------------------------------------------------------------------------------------------------

def test_synthetic_contract():
    images, labels, classes = synthetic.synthetic(n=12, size=32, seed=5)
    assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == [k % 5 for k in range(12)] and labels.dtype == np.int64
    assert classes == ["CorrosionStain", "Crack", "Efflorescence", "ExposedBars", "Spallation"] == sorted(classes)
    for k in (16, 100, 256):
        assert synthetic.synthetic(5, k)[0].shape == (5, k, k, 3)
    assert synthetic.synthetic(0)[0].shape == (0, 64, 64, 3)
    for bad in (dict(size=4), dict(seed=-1), dict(n=-1)):
        with pytest.raises(ValueError, match="synthetic needs"):
            synthetic.synthetic(**bad)


@pytest.mark.parametrize("arguments, digest", [((40, 64, 0), "3c0b7c34c95853f9"), ((10, 16, 3), "0adcb16166ee3b63"),
                                               ((5, 256, 7), "4aa4e338656afaef")])
def test_synthetic_bytes_are_pinned(arguments, digest):
    """The same digest was computed with NumPy 1.26.0 and 2.4.6, with and without AVX2 and AVX-512."""
    images, labels, _ = synthetic.synthetic(*arguments)
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16] == digest


def test_synthetic_image_depends_on_its_own_number_and_seed_only():
    few, many = synthetic.synthetic(7, 32, 1)[0], synthetic.synthetic(15, 32, 1)[0]
    assert np.array_equal(few, many[:7])
    assert len({i.tobytes() for i in many}) == 15
    assert not np.array_equal(few, synthetic.synthetic(7, 32, 2)[0])


def test_synthetic_classes_can_be_told_apart():
    """Least squares on 4x4 means of the colours and of the edges, learnt on 400 pictures, sorts 200 others."""
    def features(images):
        x = images.astype(np.float64) / 255
        grey = x.mean(-1)
        maps = [x[..., 0] - x[..., 2], x[..., 0] - x[..., 1], grey, (grey - grey.mean((1, 2), keepdims=True)) ** 2,
                np.abs(np.gradient(grey, axis=1)), np.abs(np.gradient(grey, axis=2))]
        f = np.concatenate([m.reshape(len(x), 4, 16, 4, 16).mean((2, 4)).reshape(len(x), -1) for m in maps], 1)
        return np.concatenate([f, np.sort(grey.reshape(len(x), -1), 1)[:, ::256], np.ones((len(x), 1))], 1)
    train, y, _ = synthetic.synthetic(400, 64, 0)
    test, y_test, _ = synthetic.synthetic(200, 64, 1)
    f = features(train)
    w = np.linalg.solve(f.T @ f + 0.01 * np.eye(f.shape[1]), f.T @ np.eye(5)[y])
    accuracy = ((features(test) @ w).argmax(1) == y_test).mean()
    assert accuracy > 0.85, accuracy
    assert train.std((1, 2)).mean(1).min() > 3                         # nobody renders a flat field
    tones = train.mean((1, 2, 3))
    assert tones.std() > 15                                            # and the lighting varies


# ---- a tree of photos with boxes ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A folder with copies of the two scripts alone, and what they made there: tree/ (six photos) and crops/."""
    folder = tmp_path_factory.mktemp("copied")
    for script in (synthetic, crop_codebrim):
        shutil.copy(script.__file__, folder)
    done = run("tree", "--photos", 6, "--seed", 2, script="synthetic.py", cwd=folder, env=ALONE)
    assert done.stdout.startswith("6 photos with ")
    assert done.stdout.endswith("; next: python crop_codebrim.py tree crops\n")
    run("tree", "crops", "--n", 300, "--split", "train=0.5,test=0.5", script="crop_codebrim.py", cwd=folder, env=ALONE)
    return folder


def test_the_tree_is_a_codebrim(rendered):
    files = tree(rendered / "tree")
    assert sum(n.endswith(".jpg") for n in files) == 6
    assert sum(n.endswith(".xml") for n in files) == 5                 # one photo has no annotation, as in CODEBRIM
    sizes, orientation = set(), []
    for n in files:
        if n.endswith(".jpg"):
            with Image.open(rendered / "tree" / n) as photo:
                sizes.add(photo.size)
                orientation.append(photo.getexif().get(0x0112))
    assert min(w * h for w, h in sizes) >= 1280 * 960 and len(sizes) == 6 and 3 in orientation
    photos, skipped = crop_codebrim.read_annotations(rendered / "tree")
    assert reasons(skipped) == {"photo without annotation": 1}
    assert any(len(b.flags) == 3 for p in photos for b in p.boxes)
    assert {f for p in photos for b in p.boxes for f in b.flags} == set(FLAGS[1:])
    lines = [line.strip("\t") for line in files["annotations/image_0000001.xml"].decode().splitlines()[1:]]
    tags = [line[1:].split(">")[0] for line in lines if line.startswith("<") and not line.startswith("</")]
    assert tags[:10] == ["annotation", "folder", "filename", "size", "width", "height", "depth", "object", "name",
                         "difficult"]
    assert tags[10:21] == ["bndbox", "xmin", "ymin", "xmax", "ymax", "Defect", *FLAGS[:5]] and tags[21] == FLAGS[5]
    assert len({r["class"] for r in table(rendered / "crops")}) == 5


def test_same_bytes_for_any_workers(rendered, tmp_path):
    assert synthetic.render_tree(tmp_path / "two", 6, seed=2, workers=3) == sum(
        data.count(b"<object>") for data in tree(rendered / "tree").values())
    assert tree(rendered / "tree") == tree(tmp_path / "two")


def test_bytes_of_the_tree_are_pinned():
    """Pixels and boxes; a JPEG's bytes depend on the library that packs it."""
    pixels, boxes = synthetic.photo(3, 0)
    text = synthetic.annotation("image_0000004.jpg", pixels.shape[1], pixels.shape[0], boxes)
    assert hashlib.sha256(pixels.tobytes() + text.encode()).hexdigest()[:16] == "f5a93bb613746edf"


def test_defects_lie_in_their_boxes(monkeypatch):
    """The same photo rendered without defects differs from it inside the boxes and nowhere else."""
    with_defects, boxes = synthetic.photo(3, 0)
    for name in synthetic.PAINT:
        monkeypatch.setitem(synthetic.PAINT, name, lambda *a: None)
    without, same = synthetic.photo(3, 0)
    assert boxes == same and len(boxes) >= 3
    changed = (with_defects != without).any(-1)
    for xmin, ymin, xmax, ymax, _ in boxes:
        inside = changed[ymin - 1:ymax, xmin - 1:xmax]
        assert inside.mean() > 0.02
        changed[ymin - 1:ymax, xmin - 1:xmax] = False
    assert not changed.any()


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    ([], "required: DIR"),
    ([""], "the name is empty"),
    (["d", "e"], "unrecognized arguments: e"),
    (["d", "--photos", "0"], "--photos: must be at least 1"),
    (["d", "--photos", "many"], "--photos: invalid integer value: 'many'"),
    (["d", "--seed", "-1"], "--seed: must be at least 0"),
    (["d", "--workers", "257"], "must be at least 1 and at most 256"),
    (["d", "--window", "box"], "unrecognized arguments: --window"),
    (["full"], "exists already"),
    (["full/file"], "exists already"),
    (["full/file/d"], "File exists"),
    (["a\0b"], "null"),
])
def test_what_can_be_mended_is_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    try:
        code = synthetic.main(argv)
    except SystemExit as e:
        code = e.code
    text = capsys.readouterr()
    assert code == 2 and text.out == "" and text.err.count("\n") == 1, text
    assert text.err.startswith("synthetic.py: error: ") and words in text.err
    assert tree(tmp_path) == {"full/file": b"mine"}


def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(self, path, *a, **k):
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(synthetic, "photo", lambda k, seed: (np.zeros((8, 8, 3), np.uint8), []))
    monkeypatch.setattr(Image.Image, "save", full)
    assert synthetic.main([str(tmp_path / "d"), "--photos", "5"]) == 2
    assert "No space left" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_half_way_it_leaves_nothing(tmp_path, how, code):
    command = [sys.executable, synthetic.__file__, "d", "--photos", "500", "--workers", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # a shell ignores it
    until = time.monotonic() + 30
    while not list(tmp_path.rglob("*.jpg")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


# ---- beside other files ---------------------------------------------------------------------------------------------

def test_copied_alone_it_says_what_it_needs(tmp_path):
    shutil.copy(synthetic.__file__, tmp_path)
    for argv in (["d"], []):
        done = run(*argv, script="synthetic.py", cwd=tmp_path, env=ALONE, code=2)
        assert done.stderr.count("\n") == 1 and done.stdout == ""
        assert done.stderr.startswith("synthetic.py: error: rendering needs crop_codebrim.py beside synthetic.py")
    done = run("--help", script="synthetic.py", cwd=tmp_path, env=ALONE)
    assert "python synthetic.py original_dataset/" in done.stdout and "--photos" in done.stdout and done.stderr == ""
    code = ("try:\n    import synthetic\n"
            "except ImportError as e:\n    print(type(e).__name__, e)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ALONE, capture_output=True, text=True)
    assert done.stdout.startswith("MissingFile rendering needs crop_codebrim.py beside synthetic.py"), done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["synthetic.py"]


@pytest.fixture
def mine(tmp_path):
    """A folder with a user's own module called crop_codebrim."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/crop_codebrim.py").write_text("owner = 'user'\n")
    return tmp_path / "mine"


def test_a_module_of_that_name_elsewhere_is_not_taken(mine, root, tmp_path):
    env = dict(ALONE, PYTHONPATH=str(mine))
    run("d", "--photos", 1, script=root / "synthetic.py", cwd=mine, env=env)
    assert len(tree(mine / "d")) == 2
    code = ("import hashlib, sys\n"
            "{}\n"
            "sys.path.append(sys.argv[1])\n"
            "import synthetic, crop_codebrim\n"
            "assert crop_codebrim.owner == 'user'\n"                   # nor is ours put in its place
            "assert synthetic.crop_codebrim.__file__ == sys.argv[1] + '/crop_codebrim.py', synthetic.crop_codebrim\n"
            "assert sys.modules[synthetic.crop_codebrim.Dice.__module__] is synthetic.crop_codebrim\n"
            "print(hashlib.sha256(synthetic.synthetic(3, 16)[0].tobytes()).hexdigest())")
    wanted = hashlib.sha256(synthetic.synthetic(3, 16)[0].tobytes()).hexdigest()
    by_hand = "import types; sys.modules['crop_codebrim'] = types.SimpleNamespace(owner='user')"
    for before in ("", "import crop_codebrim", by_hand):
        done = subprocess.run([sys.executable, "-c", code.format(before), str(root)], cwd=tmp_path, env=env,
                              capture_output=True, text=True)
        assert done.stdout.strip() == wanted and not done.stderr, (before, done.stderr)


def test_a_module_of_that_name_is_not_even_run(mine, root, tmp_path):
    """A user's module that raises at import: neither the command nor the library from elsewhere notices it."""
    (mine / "crop_codebrim.py").write_text("raise RuntimeError('the module of the user was run')\n")
    env = dict(ALONE, PYTHONPATH=str(mine))
    run("d", "--photos", 1, script=root / "synthetic.py", cwd=tmp_path, env=env)
    assert len(tree(tmp_path / "d")) == 2
    code = ("import sys\n"
            "sys.path.append(sys.argv[1])\n"
            "import synthetic\n"
            "print(synthetic.crop_codebrim.__file__)")
    done = subprocess.run([sys.executable, "-c", code, str(root)], cwd=tmp_path, env=env, capture_output=True,
                          text=True)
    assert done.stdout.strip() == str(root / "crop_codebrim.py"), done.stderr


def test_ours_is_loaded_once(root):
    """Whoever catches crop_codebrim.CropError catches what synthetic.py raises."""
    assert synthetic.crop_codebrim is crop_codebrim
    code = ("import importlib.util, sys\n"                             # by its path, the folder not being on sys.path
            "spec = importlib.util.spec_from_file_location('synthetic', sys.argv[1])\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "import crop_codebrim\n"
            "print(module.crop_codebrim is crop_codebrim)")
    done = subprocess.run([sys.executable, "-c", code, str(root / "synthetic.py")], cwd="/", env=ALONE,
                          capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_import_is_cheap_and_brings_no_torch():
    code = "import sys, synthetic; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'scipy', 'triton')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ALONE,
                          cwd=Path(synthetic.__file__).parent)
    assert done.stdout.strip() == "[]"
