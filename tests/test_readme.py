"""README.md says nothing that does not work: its example GAN, its four lines, its flags, its files."""
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import crop_codebrim
import fid
import okd_train


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


@pytest.fixture(scope="module")
def blocks(readme):
    return re.findall(r"```python\n(.*?)```", readme, re.S)


def test_two_commands_stand_at_the_top(readme):
    top = "\n".join(readme.splitlines()[:35])
    assert "torchrun okd_train.py --model sagan --groups 3" in top and "requirements.txt && pytest" in top


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four images in two classes of the README, drawn faster than the synthetic set."""
    folder = tmp_path_factory.mktemp("photos")
    for k, name in enumerate(("Crack", "Crack", "Efflorescence", "Efflorescence")):
        (folder / name).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (60 * k, 90, 120)).save(folder / name / f"{k}.png")
    return str(folder)


def test_the_own_gan_trains_and_samples(blocks, photos, tmp_path):
    text = next(b for b in blocks if "# my_gan.py" in b)
    assert len(text.splitlines()) <= 50
    (tmp_path / "my_gan.py").write_text(text)
    command = [sys.executable, okd_train.__file__, "--model", "my_gan.py", "--groups", "2", "--width", "4", "--steps", "3", "--batch-size", "4", "--data", photos]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    out = tmp_path / "runs" / "my_gan-2"
    G = okd_train.load_generator(out / "G1.pt", model=str(tmp_path / "my_gan.py"))
    assert G(torch.randn(2, 64)).shape == (2, 3, 32, 32)
    assert okd_train.load_file(out / "G1.pt")["kwargs"] == {"z_dim": 64, "width": 4}


def test_the_four_lines_need_only_sagan(blocks, photos, root, tmp_path):
    text = next(b for b in blocks if "sagan.Generator" in b)
    assert len(text.splitlines()) == 4
    okd_train.main(["--groups", "3", "--ch", "4", "--batch-size", "2", "--steps", "1", "--data", photos, "--out", str(tmp_path / "runs" / "sagan-3")])
    (tmp_path / "sagan.py").write_text((root / "sagan.py").read_text())
    (tmp_path / "four.py").write_text(text + "\nassert images.shape == (16, 3, 64, 64) and images.abs().max() <= 1\n")
    subprocess.run([sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec(open('four.py').read())"],
                   cwd=tmp_path, check=True, timeout=120)


TINY = {                                        # what stands in the README's recipe: what runs here; each stands there once
    "--demo original_dataset/": "--demo original_dataset/ --photos 2",
    "original_dataset/ crops/": "original_dataset/ crops/ --n 24",
    "--steps 50000": "--steps 2 --ch 4 --batch-size 4",
    "--sample 10000": "--sample 12",
    "fid.py crops/": "fid.py crops/ --features random",
}


def test_the_recipe_runs_from_photos_to_the_papers_table(readme, root, tmp_path):
    (script,) = re.findall(r"```sh\n(.*?)```", readme, re.S)
    for there, here in TINY.items():
        assert script.count(there) == 1, there
        script = script.replace(there, here)
    for name in ("crop_codebrim.py", "okd_train.py", "fid.py"):
        (tmp_path / name).symlink_to(root / name)
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    p = subprocess.run(["sh", "-c", python + script], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-4000:]
    table = [line.split() for line in p.stdout.replace("one group", "one_group").splitlines()[-5:]]
    assert table[0] == ["rFD", "n", "one_group", "G1", "G2", "G3", "mean", "union"]
    assert [row[:2] for row in table[1:]] == [[f"{model}-{groups}-seed0", "12"] for model in ("acgan", "sagan") for groups in (1, 3)]
    for row in table[1:]:
        assert [cell == "-" for cell in row[2:]] == [row[0][6] != "1"] + [row[0][6] == "1"] * 5
        assert all(float(cell) > 0 for cell in row[2:] if cell != "-")
    assert float(table[2][6]) == pytest.approx(sum(map(float, table[2][3:6])) / 3, abs=2e-4)


def test_the_exports_and_the_row_that_is_redrawn(readme, blocks, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    okd_train.main(["--model", "acgan", "--groups", "3", "--image-size", "32", "--ch", "4", "--batch-size", "2", "--steps", "1", "--data", photos, "--fid-every", "1", "--fid-samples", "4", "--fid-features", "random"])
    commands = re.findall(r"^    python (okd_train.py --out runs/acgan-3 .*?) +#", readme, re.M)
    assert len(commands) == 4
    for command in commands:
        okd_train.main([*re.sub(r"00\b", "0", command).split()[1:], "--nproc", "1"])               # a tenth of the images
    assert len(list((tmp_path / "cracks").rglob("*.png"))) == 50 and len(list((tmp_path / "runs/acgan-3/fakes").rglob("*.png"))) == 210
    assert np.load("arrays/G3.npz", allow_pickle=False)["arr_0"].shape == (100, 32, 32, 3)
    names = {}
    exec(next(b for b in blocks if "okd_train.redraw" in b), names)
    assert np.array_equal(names["image"], np.asarray(Image.open(tmp_path / "cracks" / names["rows"][17]["file"])))


def test_every_flag_exists(readme, root, capsys):
    for main, argv in ((okd_train.main, []), (okd_train.main, ["--model", "acgan"]), (fid.main, []), (crop_codebrim.main, [])):
        with pytest.raises(SystemExit):
            main([*argv, "--help"])
    known = capsys.readouterr().out + "".join(
        subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, timeout=120, check=True, cwd=root).stdout
        for words in (["-m", "kernels.bench_attention"], ["tests/bench_step.py"]))
    others = {"--nnodes", "--nproc-per-node", "--standalone", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--max-restarts", "--node-rank",
              "--master-addr", "--help", "--width", "--num-workers"}                 # torchrun's, and the example's own
    gpu = re.sub(r"(?m)^( *try \S+ \d+ pytest|nvidia-smi).*", "", (root / ".ci" / "gpu").read_text())
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme + gpu)) - others:
        assert re.search(rf"{flag}\b", known), flag


def test_every_named_file_exists(readme, root):
    for path in re.findall(r"\]\(([\w/.-]+)\)", readme):
        assert (root / path).is_file(), path
        if path.endswith(".png"):
            assert Image.open(root / path).width > 300


def test_top_level_holds_only_the_rooms(root):
    rooms = {"sagan.py", "acgan.py", "okd_train.py", "fid.py", "crop_codebrim.py", "kernels", "tests", "requirements.txt", "README.md", ".ci", ".gitignore"}
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in tracked.stdout.splitlines()} <= rooms
