"""What users get wrong, carelessly or with intent: one line on stderr, exit status 2, no traceback, nothing written.

One table for training, scoring, cropping and rendering; sample.py, report.py and bench.py have theirs in their own
tests.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import crop_codebrim
import fid
import okd_train
import synthetic
from test_crop_codebrim import add
from test_okd_train import ENV, OTHER, TINY, train

SCRIPTS = {"okd": okd_train, "fid": fid, "crop": crop_codebrim, "synthetic": synthetic}
HUGE = str(10 ** 30)
LONG = "x" * 300                                                    # no file system takes such a name
NO_TEXT = os.fsdecode(b"\xff\xfe")

# Files of the scene's folder models/; what is wrong with each stands in OKD below.
MODELS = {
    "no_discriminator": "import torch\nclass Generator(torch.nn.Module): pass\n",
    "wrong_width": OTHER.replace("768", "700"),
    "wrong_images": OTHER.replace("3 * image_size ** 2", "3 * image_size"),
    "flat_images": OTHER.replace("view(-1, 3, self.size, self.size)", "view(-1, 3 * self.size, self.size)"),
    "two_scores": OTHER.replace("nn.Linear(8, 1))", "nn.Linear(8, 2))"),
    "typo": OTHER.replace("drop=0.3, sharp", "dorp=0.3, sharp", 1),
    "clash": OTHER.replace("width=8", "width=8, steps=3").replace("z_dim, width", "z_dim, width, steps"),
    "list_value": OTHER.replace("width=8", "width=[8]"),
    "raises": OTHER + "\n1 / 0\n",
    "syntax": OTHER + "\ndef f(:\n",
    "no_luck": OTHER.replace("        self.size = image_size", "        raise RuntimeError('no luck')"),
    "no_dict": OTHER + "\nhparams = 3\n",
    "flat_recipe": OTHER + "\nrecipes = dict(width=4)\n",
    "strange_recipe": OTHER + "\nrecipes = dict(small=dict(dorp=0.5))\n",
    "switch_recipe": OTHER + "\nrecipes = dict(small=dict(balance='often', flip=True))\n",
    "word_recipe": OTHER + "\nrecipes = dict(small=dict(g_lr='fast'))\n",
    "empty": "",
    "exits": "import sys\nsys.exit(0)\n",
    "exits_later": OTHER.replace("        self.size = image_size", "        raise SystemExit(0)"),
    "endless": "def f(): f()\nf()\n",
    "base_exception": "class Odd(BaseException): pass\nraise Odd('strange')\n",
    "word_rate": OTHER.replace("width=8", "width=8, g_lr='fast'"),
    "word_batch": OTHER.replace("batch_size=4", "batch_size='many'"),
    "half_batch": OTHER.replace("batch_size=4", "batch_size=2.5"),
    "nan_width": OTHER.replace("width=8", "width=float('nan')"),
    "no_no": OTHER.replace("sharp=True)", "sharp=True, no_sharp=1)", 1).replace("sharp=True):",
                                                                                "sharp=True, no_sharp=1):"),
    "no_flip": OTHER.replace("width=8", "width=8, no_flip=1").replace("z_dim, width", "z_dim, width, no_flip"),
    "not_a_loss": OTHER + "\ndiscriminator_loss = 3\n",
    "a_builtin": "class Generator(dict): pass\nclass Discriminator(dict): pass\n",
    "a_function": "def Generator(z): pass\nclass Discriminator: pass\n",
    "no_module": "class Generator:\n    pass\nclass Discriminator:\n    pass\n",
    "no_gradient": OTHER + "\ndef generator_loss(D, fake):\n    return 3.0\n",
}


# Folders whose boxes cannot be cropped: {file: text, None for a photo of 80x70}; what is said of each stands in CROP.
BOX = "<object><name>Crack</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>70</xmax><ymax>70</ymax></bndbox></object>"
XML = f"<annotation><filename>a.png</filename>{BOX}</annotation>"
COCO = dict(images=[dict(id=1, file_name="a.png")], categories=[dict(id=1, name="Crack")],
            annotations=[dict(id=1, image_id=1, bbox=[0, 0, 70, 70], category_id=1)])
CROWD = {**COCO, "annotations": [dict(COCO["annotations"][0], iscrowd=1)]}
SIZED = XML.replace("<object>", "<size><width>8</width><height>7</height></size><object>")
LABEL = "0 0.5 0.5 0.9 0.95\n"
READY = "<A><Defect name='a.png'><Background>0</Background><Crack>1</Crack></Defect></A>"
FOLDERS = {
    "masks": {"images/a.png": None, "masks/a.png": None},
    "suffixed": {"a.png": None, "a_mask.png": None},
    "labelme": {"a.png": None, "a.json": '{"shapes": [], "imagePath": "a.png"}'},
    "classes": {"Crack/a.png": None, "Rust/b.png": None},
    "alone": {"a.png": None, "readme.txt": "hello"},
    "two": {"a.png": None, "a.xml": XML, "a.txt": LABEL},
    "three": {"a.png": None, "a.xml": XML, "a.txt": LABEL, "a.json": json.dumps(COCO)},
    "tie": {"raw/a.png": None, "thin/a.png": "other", "boxes/a.xml": XML},
    "renamed": {"a.png": None, "crack_7.png": None, "a.xml": XML.replace("a.png", "crack_7.png")},
    "away": {"s1/images/a.png": None, "s2/annotations/a.xml": XML},
    "lost": {"b.png": None, "a.xml": XML},
    "heic": {"a.heic": "?", "a.xml": XML},
    "broken_photo": {"a.png": "no photo", "a.xml": XML},
    "broken_xml": {"a.png": None, "a.xml": XML[:-9]},
    "doctype": {"a.png": None, "a.xml": "<!DOCTYPE a>" + XML},
    "wrong_size": {"a.png": None, "a.xml": SIZED},
    "no_class": {"a.png": None, "a.xml": XML.replace("Crack", " ")},
    "reversed": {"a.png": None, "a.xml": XML.replace("<xmax>70", "<xmax>0")},
    "outside": {"a.png": None, "a.xml": XML.replace("<xmin>1<", "<xmin>99<").replace("<xmax>70", "<xmax>170")},
    "words": {"a.png": None, "a.xml": XML.replace("70", "seventy")},
    "several": {"a.png": None, "a.xml": XML.replace("</name>", "</name><bndbox/>")},
    "free": {"a.png": None, "a.xml": XML.replace(BOX, "")},
    "yolo_pixels": {"a.png": None, "a.txt": LABEL, "b.png": None, "b.txt": "0 40 35 70 60\n"},
    "yolo_words": {"a.png": None, "a.txt": "crack 0.5 0.5 0.9 0.95\n"},
    "yolo_number": {"a.png": None, "a.txt": "5" + LABEL[1:], "classes.txt": "Crack\n"},
    "yolo_lists": {"a.png": None, "a.txt": LABEL, "classes.txt": "Crack\n", "data.yaml": "names: [Rust]"},
    "yolo_yaml": {"a.png": None, "a.txt": LABEL, "data.yaml": "names: *anchor"},
    "yolo_empty": {"a.png": None, "a.txt": LABEL, "data.yaml": "names: []"},
    "yolo_lost": {"b.png": None, "a.txt": LABEL},
    "coco_cut": {"a.png": None, "a.json": json.dumps(COCO)[:-5]},
    "coco_crowd": {"a.png": None, "a.json": json.dumps(CROWD)},
    "coco_rle": {"a.png": None, "a.json": json.dumps({**COCO, "annotations": [dict(image_id=1, segmentation={})]})},
    "coco_nameless": {"a.png": None, "a.json": json.dumps({**COCO, "categories": []})},
    "coco_twice": {"a.png": None, "a.json": json.dumps({**COCO, "images": COCO["images"] * 2})},
    "coco_lost": {"b.png": None, "a.json": json.dumps(COCO)},
    "coco_text": {"a.png": None, "a.json": json.dumps(COCO).replace("70, 70", '"70", 70')},
    "ready": {"train/defects/a.png": None, "metadata/defects.xml": READY},
    "ready_lost": {"train/defects/a.png": None, "metadata/defects.xml": READY.replace("a.png", "b.png")},
    "ready_flags": {"val/defects/a.png": None, "metadata/defects.xml": READY.replace("1", "2")},
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """One folder in which every case runs: good and bad data for the three scripts, and a finished run."""
    root = tmp_path_factory.mktemp("scene")
    r = np.random.default_rng(0)
    for name in ("Crack", "Spallation"):
        (root / "DATA" / name).mkdir(parents=True)
        for k in range(12):
            Image.fromarray(r.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / "DATA" / name / f"{k:02d}.png")
    for name in ("EMPTY/sub", "SPLIT/train", "SPLIT/val", "ONE", "FULL", "models/folder.py", "BAD", NO_TEXT):
        (root / name).mkdir(parents=True)
    for link in ("SPLIT/train/c", "SPLIT/val/c", "ONE/c", "FLAT"):
        (root / link).symlink_to(root / "DATA" / "Crack")
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "EMPTY/readme.txt").write_text("x")
    (root / "FILE").write_text("x")
    (root / "FULL/x").write_text("mine")
    (root / "data.zip").write_bytes(b"PK")
    for name, text in MODELS.items():
        (root / "models" / f"{name}.py").write_text(text)
    (root / "models/binary.py").write_bytes(bytes(range(256)))
    (root / "models/script.txt").write_text(OTHER)
    for k in range(3):
        Image.new("RGB", (32, 32)).save(root / "BAD" / f"{k}.png")
    (root / "BAD" / os.fsdecode(b"line\nbreak \x1b[31m\xff.png")).write_bytes(b"")
    (root / NO_TEXT / "0.png").write_bytes(b"")
    train("--data", root / "DATA", *TINY, "--groups", "1", "--steps", "1", "--out", root / "RUN")
    for k in range(12):
        add(root / "SRC", f"image_{k:07d}", [(1, 1, 150, 120, "Crack"), (120, 80, 300, 200, "Spallation")], number=k)
    for name, n in (("REAL", 14), ("FIVE", 5), ("SINGLE", 1)):
        (root / name).mkdir()
        for k in range(n):
            Image.fromarray(r.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(root / name / f"{k:03d}.png")
    for name, files in FOLDERS.items():
        for file, text in files.items():
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".png") and text is None:
                Image.new("RGB", (80, 70)).save(root / name / file)
            else:
                (root / name / file).write_text(text)
    np.savez(root / "good.npz", mu=np.zeros(4), sigma=np.eye(4))
    return root


def model(name):
    return ["--model", f"models/{name}.py"]


def npz(*argv):
    return ["good.npz", "good.npz", *argv]


# What is added to a command that works (--data DATA, tiny networks, --out OUT), and words of the complaint.
OKD = [
    (["--data", "nowhere"], "no such folder"),
    (["--data", "EMPTY"], "accepted are bmp gif jfif jpe jpeg jpg pbm pgm png"),
    (["--data", "SPLIT"], "holds only train, val"),
    (["--data", "FILE"], "FILE is a file"),
    (["--data", ""], "--data is empty"),
    (["--data", LONG], "too long"),
    (["--data", "a\0b"], "null"),
    (["--data", "/dev/null"], "this is no folder"),
    (["--data", "BAD"], r"line\nbreak \x1b[31m\udcff.png"),
    (["--data", NO_TEXT], r"\udcff\udcfe"),
    (["--data"], "expected one argument"),
    (["--batch-size", "25"], "24 images, fewer than one batch"),
    (["--batch-size", "0"], "--batch-size is 0"),
    (["--batch-size", str(10 ** 12)], "--batch-size is 1000000000000; it must be at most"),
    (["--batch-size", "1e3"], "invalid int value"),
    (["--batch-size", "4.0"], "invalid int value"),
    (["--batch-size="], "invalid int value"),
    (["--batch-size", "9" * 5000], "invalid int value"),
    (["--model", "nosuch"], "no model script 'nosuch'"),
    (["--model", "gone/my.py"], "gone/my.py"),
    (["--model", ""], "no model script ''"),
    (["--model", "models/"], "no model script"),
    (["--model", "models/script.txt"], "no model script"),
    (["--model", "models/folder.py"], "no model script"),
    (["--model", LONG], "too long"),
    (["--model", "a\0b"], "no model script"),
    (["--model", NO_TEXT], r"\udcff\udcfe"),
    (model("binary"), "binary.py cannot be loaded: SyntaxError"),
    (model("no_discriminator"), "has no class Discriminator"),
    (model("wrong_width"), "Discriminator called with images (2, 3, 16, 16)"),
    (model("wrong_images"), "Generator called with z (2, 6)"),
    (model("flat_images"), "expected (2, 3, 16, 16)"),
    (model("two_scores"), "expected scores (2,), (2, 1) or (2, 1, 1, 1)"),
    (model("typo"), "hparams has 'dorp'"),
    (model("clash"), "clashes with the trainer's own flag --steps"),
    (model("list_value"), "hparams['width'] = [8]"),
    (model("raises"), f"line {OTHER.count(chr(10)) + 2}: ZeroDivisionError"),
    (model("syntax"), "SyntaxError"),
    (model("no_luck"), "RuntimeError: no luck"),
    (model("no_dict"), "hparams is a int; it must be a flat dict"),
    (model("flat_recipe"), "recipes must be a dict of dicts"),
    (model("strange_recipe"), "recipes['small'] sets dorp, no key of hparams"),
    (model("switch_recipe"), "recipes['small']: balance is 'often'; it must be True or False"),
    (model("word_recipe"), "recipes['small']['g_lr'] = 'fast'; it must be a number"),
    (model("empty"), "has no class Generator"),
    (model("exits"), "cannot be loaded: line 2: SystemExit"),
    (model("exits_later"), "SystemExit: 0"),
    (model("endless"), "RecursionError"),
    (model("base_exception"), "Odd: strange"),
    (model("word_rate"), "hparams['g_lr'] = 'fast'; it must be a number"),
    (model("word_batch"), "hparams['batch_size'] = 'many'; it must be a whole number"),
    (model("half_batch"), "hparams['batch_size'] = 2.5; it must be a whole number"),
    (model("nan_width"), "hparams['width'] = nan"),
    (model("no_no"), "--no-sharp"),
    (model("no_flip"), "--no-flip"),
    (model("not_a_loss"), "discriminator_loss"),
    (model("a_builtin"), "Generator is no torch.nn.Module"),
    (model("a_function"), "has no class Generator"),
    (model("no_module"), "Generator is no torch.nn.Module"),
    (model("no_gradient"), "expected a scalar with a gradient"),
    (["--wdith", "3"], "unrecognized arguments: --wdith"),
    (["--batch", "3"], "unrecognized arguments: --batch"),
    (["--n-classes", "2"], "unrecognized arguments: --n-classes"),
    (["extra"], "unrecognized arguments: extra"),
    (["-s", "3"], "unrecognized arguments: -s"),
    (["--resume=yes"], "ignored explicit argument 'yes'"),
    (["--flip=1"], "ignored explicit argument '1'"),
    (["--groups", "0"], "--groups is 0; it must be 1 or more"),
    (["--groups", "two"], "invalid int value"),
    (["--groups", HUGE], "it must be at most"),
    (["--groups", "-0"], "--groups is 0"),
    (["--rho", "-0.5"], "--rho is -0.5"),
    (["--steps", "1", "--lambda-gp", "-1"], "--lambda-gp is -1.0"),
    (["--steps", "1", "--loss", "r1", "--lambda-r1", "-1"], "lambda_r1 is -1.0; it must be 0 or more"),
    (["--rho", "nan"], "--rho is nan"),
    (["--rho", "1e999"], "--rho is inf"),
    (["--rho", "half"], "invalid float value"),
    (["--g-lr", "inf"], "--g-lr is inf"),
    (["--d-lr=-1e-3"], "--d-lr is -0.001"),
    (["--d-lr", "-1e-3"], "--d-lr is -0.001"),
    (["--lambda-gp", "nan"], "--lambda-gp is nan"),
    (["--beta1", "-0.1"], "--beta1 is -0.1"),
    (["--beta2", "1"], "--beta2 is 1.0"),
    (["--beta2", "nan"], "--beta2 is nan"),
    (["--n-critic", HUGE], "it must be at most"),
    (["--z-dim", str(10 ** 12)], "it must be at most"),
    (["--z-dim", "0"], "--z-dim is 0"),
    (["--ch", "0"], "Generator called with z (2, 8) failed"),
    (["--ch", "-4"], "ch=-4"),
    (["--ch", HUGE], "ch=1000"),
    (["--steps", "0"], "--steps is 0"),
    (["--steps", "-7"], "--steps is -7"),
    (["--steps", HUGE], "it must be at most"),
    (["--steps", "3", "--epochs", "2"], "give one"),
    (["--epochs", "0"], "--epochs is 0.0"),
    (["--epochs", "1e300"], "--epochs is 1e+300"),
    (["--epochs", "nan"], "--epochs is nan"),
    (["--max-seconds", "-1"], "--max-seconds is -1.0"),
    (["--max-seconds", "inf"], "--max-seconds is inf"),
    (["--seed", "-1"], "--seed is -1"),
    (["--seed", "0x10"], "invalid int value"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--sample-every", "-5"], "--sample-every is -5"),
    (["--save-every", "0"], "--save-every is 0"),
    (["--device", "cuda:99"], "--device cuda:99"),
    *([] if torch.cuda.is_available() else [(["--device", "cuda"], "CUDA"), (["--device", "cuda:0"], "CUDA")]),
    (["--device", "abacus"], "--device abacus"),
    (["--device", ""], "--device is empty"),
    (["--device", "meta"], "--device meta"),
    (["--device", "cpu:-1"], "--device cpu:-1"),
    (["--nproc", "0"], "--nproc is 0"),
    (["--nproc", str(10 ** 6)], "--nproc is 1000000; it must be at most"),
    (["--nproc", "100"], "use fewer"),
    (["--image-size", "48"], "built for 32, 64 and 128"),
    (["--image-size", "0"], "--image-size is 0"),
    (["--image-size", str(10 ** 6)], "--image-size is 1000000; it must be at most"),
    (["--loss", "lsgan"], "wgan-gp, hinge or r1"),
    (["--loss", ""], "--loss is empty"),
    (["--spectral-norm", "all"], "both, g, d, none"),
    (["--c-penalty", "none"], "two-sided or one-sided"),
    (["--c-penalty", "one-sided", "--steps", "1", "--loss", "hinge"], "a form of wgan-gp's penalty, and loss is hinge"),
    (["--fid-every", "0"], "--fid-every is 0"),
    (["--fid-every", "5", "--fid-features", "random", "--fid-data", "nowhere"], "no such folder"),
    (["--fid-every", "5", "--fid-features", "random", "--fid-data", ""], "--fid-data is empty"),
    (["--fid-samples", str(10 ** 12)], "it must be at most"),
    (["--fid-samples", "3"], "--fid-samples is 3"),
    (["--fid-features", "vgg"], "invalid choice"),
    (["--resume"], "no checkpoint in"),
    (["--out", ""], "--out is empty"),
    (["--out", "FILE"], "FILE"),
    (["--out", "FILE/below"], "FILE"),
    (["--out", LONG], "File name too long"),
    (["--out", "a\0b"], "null"),
    (["--out", "dangling"], "dangling"),
    (["--out", "/dev/null"], "/dev/null"),
    (["--out", "/proc/run"], "/proc/run"),
    (["--out", "RUN"], "already holds a run"),
    (["--out", "RUN", "--resume", "--rho", "0.1"], "--rho is 0.5 there and 0.1 here"),
    (["--sample", "4"], "unrecognized arguments: --sample 4"),
    (["--model", "acgan", "--n-classes", "3"], "has 2 class folders: Crack, Spallation"),
    (["--model", "acgan", "--n-classes", "0"], "--n-classes is 0"),
    (["--model", "acgan", "--data", "FLAT"], "outside class folders"),
    (["--model", "acgan", "--data", "ONE"], "one class folder only"),
    (["--model", "acgan", "--loss", "hinge"], "it is bce or wgan-gp"),
    (["--model", "acgan", "--spectral-norm", "both"], "unrecognized arguments: --spectral-norm"),
    (["--model", "acgan", "--c-aux", "inf"], "--c-aux is inf"),
]

RANDOM = ["--features", "random"]
FID = [
    (["nowhere", "REAL"], "nowhere: no such"),
    (["REAL", "nowhere"], "nowhere: no such"),
    (["REAL", "nowhere.npz"], "no such"),
    (["dangling", "REAL"], "dangling"),
    (["SINGLE/000.png", "REAL"], "000.png: neither"),
    (["EMPTY", "REAL"],
     "no images in it or below; accepted are bmp gif jfif jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp; 1 other"),
    (["SINGLE", "REAL"], "at least 2 images, there is 1 (000.png)"),
    (["REAL", "SINGLE"], "at least 2"),
    (["REAL"], "FAKE"),
    ([], "REAL"),
    (["", "REAL"], "REAL is empty"),
    (["REAL", ""], "FAKE is empty"),
    (["REAL", LONG], "too long"),
    (["REAL", "a\0b"], "no such"),
    (["/dev/null", "REAL"], "neither"),
    (["REAL", "BAD", *RANDOM], r"line\nbreak \x1b[31m\udcff.png"),
    (["REAL", NO_TEXT], "at least 2"),
    (["REAL", "FIVE", "--dims", "100"], "--dims"),
    (["REAL", "FIVE", "--dims", "²"], "--dims"),
    (["REAL", "FIVE", "--batch-size", "0"], "--batch-size"),
    (["REAL", "FIVE", "--batch-size", "x"], "--batch-size"),
    (["REAL", "FIVE", "--batch-size", "²"], "is no whole number of at least 1"),
    (["REAL", "FIVE", "--batch-size", HUGE], "--batch-size"),
    (["REAL", "FIVE", "--batch-size", "9" * 5000], "--batch-size"),
    (["REAL", "FIVE", "--workers", "-1"], "--workers"),
    (["REAL", "FIVE", "--workers", HUGE], "--workers"),
    (["REAL", "FIVE", "--workers="], "--workers"),
    (["REAL", "FIVE", "--resize", "nearest"], "--resize"),
    (["REAL", "FIVE", "--nonsense"], "--nonsense"),
    (["REAL", "FIVE", "--feat", "random"], "--feat"),
    (["REAL", "FIVE", "--kid=1"], "ignored explicit argument"),
    (["REAL", "FIVE", "--device", "abacus", *RANDOM], "abacus"),
    (["REAL", "FIVE", "--device", "", *RANDOM], "--device is empty"),
    (["REAL", "FIVE", "--device", "meta", *RANDOM], "--device meta"),
    (["REAL", "FIVE", "--weights", "nowhere"], "--weights"),
    (["REAL", "FIVE", "--weights", "EMPTY"], "--weights"),
    (["REAL", "FIVE", "--weights", ""], "--weights is empty"),
    (["REAL", "FIVE", "--weights", "FILE"], "no weights file"),
    (["REAL", "FIVE", "--device", "abacus", "--weights", "nowhere"], "--weights"),
    (["REAL", "FIVE", "--precision", "tf32", "--weights", "FILE", "--device", "cpu"], "tf32"),
    (["REAL", "FIVE", "--precision", "fp8"], "invalid choice"),
    (["REAL", "FIVE", *RANDOM, "--dims", "64"], "--dims"),
    (["REAL", "FIVE", *RANDOM, "--resize", "clean"], "--resize"),
    (["REAL", "FIVE", *RANDOM, "--save", "s.npz"], "--save"),
    (["REAL", "FIVE", "--save", "s.npz"], "--save"),
    (["REAL", "--save", ""], "--save is empty"),
    (["REAL", "--save", "nowhere/s.npz", "--weights", "FILE"], "nowhere"),
    (["REAL", "--save", "good.npz", "--weights", "FILE"], "not overwritten"),
    (["REAL", "--save", LONG, "--weights", "FILE"], "File name too long"),
    (["REAL", "--kid"], "FAKE"),
    (["REAL", "--copies", "c.png", "--floor"], "--copies"),
    (["REAL", "FIVE", "--copies", "", *RANDOM], "--copies is empty"),
    (["REAL", "FIVE", "--copies", "c.jpg", *RANDOM], ".png"),
    (["REAL", "FIVE", "--copies", "FIVE/000.png", *RANDOM], "not overwritten"),
    (["REAL", "FIVE", "--copies", "FILE/c.png", *RANDOM], "FILE"),
    (["FIVE", "REAL", "--prdc", *RANDOM], "FIVE: 5 images are too few for --prdc"),
    (["REAL", "FIVE", "--prdc", *RANDOM], "FIVE"),
    (["FIVE", "REAL", "--prdc", "--floor", *RANDOM], "FIVE"),
    (["FIVE", "REAL", "--kid", "--floor", *RANDOM], "FIVE"),
    (npz("--batch-size=5"), "--batch-size"),
    (npz("--kid"), "--kid needs the images"),
    (npz("--json=1"), "ignored explicit argument"),
    (["FILE", "good.npz"], "neither"),
]

CROP = [
    (["SRC"], "two folders are needed"),
    ([], "two folders are needed"),
    (["nowhere", "OUT"], "no such folder"),
    (["data.zip", "OUT"], "unpack it first"),
    (["FILE", "OUT"], "no such folder"),
    (["EMPTY", "OUT"], "no .xml files"),
    (["", "OUT"], "two folders are needed"),
    (["SRC", ""], "two folders are needed"),
    (["SRC", "OUT", "extra"], "unrecognized arguments: extra"),
    (["SRC", "a\0b"], "null"),
    (["SRC", LONG], "File name too long"),
    (["SRC", "FULL"], "exists already"),
    (["SRC", "FILE"], "exists already"),
    (["SRC", "FILE/crops"], "FILE"),
    (["SRC", "/dev/null"], "exists already"),
    (["SRC", "SRC/crops"], "never written to"),
    (["SRC", "SRC"], "never written to"),
    (["SRC", "OUT", "--sheet", "SRC/sheet.png"], "never written to"),
    (["SRC", "OUT", "--sheet", "OUT/sheet.png"], "must lie outside"),
    (["SRC", "OUT", "--sheet", "sheet.xyz"], "must end in"),
    (["SRC", "OUT", "--sheet", "no/such/sheet.png"], "does not exist"),
    (["SRC", "OUT", "--sheet", ""], "the name is empty"),
    (["SRC", "OUT", "--n", "100000000"], "distinct ones exist"),
    (["SRC", "OUT", "--n", HUGE], "distinct ones exist"),
    (["SRC", "OUT", "--background", HUGE], "distinct ones exist"),
    (["SRC", "OUT", "--n", "-1"], "at least 0"),
    (["SRC", "OUT", "--n", "many"], "invalid"),
    (["SRC", "OUT", "--n", "nan"], "invalid"),
    (["SRC", "OUT", "--n", "9" * 5000], "invalid"),
    (["SRC", "OUT", "--n", "0"], "leaves nothing"),
    (["SRC", "OUT", "--size", "2"], "at least 8"),
    (["SRC", "OUT", "--size", "250"], "0 exist"),
    (["SRC", "OUT", "--size", HUGE], "0 exist"),
    (["SRC", "OUT", "--seed", "-1"], "at least 0"),
    (["SRC", "OUT", "--workers", "0"], "at least 1"),
    (["SRC", "OUT", "--workers", HUGE], "at most"),
    (["SRC", "OUT", "--window", "whole"], "invalid choice"),
    (["SRC", "OUT", "--split", "train=0.8,test=0.1"], "add up to 0.9"),
    (["SRC", "OUT", "--split", "train=0.8,train=0.2"], "every name once"),
    (["SRC", "OUT", "--split", "../x=1"], "expected train"),
    (["SRC", "OUT", "--split", "train=x"], "must be a number"),
    (["SRC", "OUT", "--split", "train=nan"], "must be a number"),
    (["SRC", "OUT", "--split", "train=1e999"], "must be a number"),
    (["SRC", "OUT", "--split", ""], "expected train"),
    (["SRC", "OUT", "--photos", "3"], "unrecognized arguments: --photos"),
    (["SRC", "OUT", "--demo", "d"], "unrecognized arguments: --demo"),
    (["SRC", "OUT", "--wind", "box"], "unrecognized"),
    (["SRC", "OUT", "--balance=1"], "ignored explicit argument"),
    (["masks", "OUT"], "only masks (masks/a.png), from which no boxes are read: let the labelling program export"),
    (["suffixed", "OUT"], "only masks (a_mask.png)"),
    (["labelme", "OUT"], "its 1 .json are not COCO's"),
    (["classes", "OUT"], "okd_train.py --data takes them as they are"),
    (["alone", "OUT"], "1 photos are there"),
    (["two", "OUT"], "voc (1 photos) and yolo (1 photos): name a folder of one kind, or --boxes"),
    (["three", "OUT"], "voc (1 photos) and yolo (1 photos) and coco (1 photos)"),
    (["SRC", "OUT", "--boxes", "yolo"], "no YOLO .txt in it"),
    (["SRC", "OUT", "--boxes", "coco"], "no COCO .json in it"),
    (["alone", "OUT", "--boxes", "voc"], "no .xml files in it"),
    (["SRC", "OUT", "--boxes", "labelme"], "invalid choice"),
    (["SRC", "OUT", "--boxes"], "expected one argument"),
    (["SRC", "OUT", "--exif", "upright"], "invalid choice"),
    (["tie", "OUT"], "annotation that fits several photos (1 of"),
    (["renamed", "OUT"], "annotation that names another photo than the one called like it (1 of 3"),
    (["away", "OUT"], "annotation without a photo beside it (one of that name lies elsewhere) (1 of 2"),
    (["lost", "OUT"], "annotation without a photo (1 of 2"),
    (["heic", "OUT"], "photo of a type that is not read: heic"),
    (["broken_photo", "OUT"], "0 exist: no box is usable; most were left out for this: photo that cannot be opened"),
    (["broken_xml", "OUT"], "XML that cannot be parsed (1 of 2"),
    (["doctype", "OUT"], "XML with DOCTYPE or ENTITY (1 of 2"),
    (["wrong_size", "OUT"], "photo whose size contradicts its annotation"),
    (["no_class", "OUT"], "box without a class"),
    (["reversed", "OUT"], "box that ends before it begins"),
    (["outside", "OUT"], "box outside its photo"),
    (["words", "OUT"], "box whose coordinates cannot be read"),
    (["several", "OUT"], "object with several <bndbox>"),
    (["free", "OUT"], "0 exist: no box is usable"),
    (["free", "OUT", "--n", "0", "--background", "999"], "119 distinct ones exist"),
    (["yolo_pixels", "OUT"], "line whose numbers are no fractions of the photo"),
    (["yolo_words", "OUT"], "text that holds no YOLO labels"),
    (["yolo_number", "OUT"], "box whose class number has no name"),
    (["yolo_lists", "OUT"], "classes.txt and data.yaml give other names to the classes"),
    (["yolo_yaml", "OUT"], "data.yaml: its names cannot be read; write them as names: [first, second]"),
    (["yolo_empty", "OUT"], "data.yaml: its names cannot be read"),
    (["yolo_lost", "OUT"], "annotation without a photo"),
    (["coco_cut", "OUT"], "JSON that cannot be parsed"),
    (["coco_crowd", "OUT"], "crowd of objects (iscrowd)"),
    (["coco_rle", "OUT"], "mask in run lengths (RLE)"),
    (["coco_nameless", "OUT"], "box without a class"),
    (["coco_twice", "OUT"], "image whose id is given twice"),
    (["coco_lost", "OUT"], "annotation without a photo"),
    (["coco_text", "OUT"], "box whose coordinates cannot be read"),
    (["ready", "OUT", "--split", "train=0.5,test=0.5"], "come in splits of their own, which are kept"),
    (["ready", "OUT", "--n", "999"], "in split train wanted, 119 distinct ones exist"),
    (["ready_lost", "OUT"], "0 exist"),
    (["ready_flags", "OUT"], "box with a flag that is neither 0 nor 1"),
]
SYNTHETIC = [
    ([], "required: DIR"),
    (["FULL"], "exists already"),
    (["d", "--sheet", "s.png"], "unrecognized arguments: --sheet"),
    ([""], "the name is empty"),
    (["d", "--photos", HUGE], "at most"),
    (["d", "--photos", "0"], "at least 1"),
    (["d", "--seed", "-1"], "at least 0"),
    (["FILE/d", "--photos", "1"], "FILE"),
]


def trained(argv):
    """A command of okd_train.py that would work, without what argv adds."""
    own = "--model" in argv and argv[1] != "acgan"
    return ["--data", "DATA", *(["--groups", "2"] if own else TINY), "--out", "OUT", *argv]


CASES = [*(("okd", trained(argv), words) for argv, words in OKD), *(("fid", argv, words) for argv, words in FID),
         *(("crop", argv, words) for argv, words in CROP),
         *(("synthetic", argv, words) for argv, words in SYNTHETIC)]


def snapshot(root):
    """{name below root: (size, time of change) of a file or link, None of a folder}."""
    described = lambda p: (p.lstat().st_size, p.lstat().st_mtime_ns) if p.is_symlink() or not p.is_dir() else None
    return {p.relative_to(root): described(p) for p in root.rglob("*") if "__pycache__" not in p.parts}


def call(script, argv):
    try:
        return SCRIPTS[script].main(argv)
    except SystemExit as e:
        return e.code


NAMES = [f"{k}-{script}-{' '.join(argv[-2:])[:24]!a}" for k, (script, argv, _) in enumerate(CASES)]


@pytest.mark.parametrize("script, argv, words", CASES, ids=NAMES)
def test_one_line_exit_2_and_nothing_written(script, argv, words, scene, monkeypatch, capfd):
    monkeypatch.chdir(scene)
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    before = snapshot(scene)
    status = call(script, argv)
    text = capfd.readouterr().err
    text = re.sub(r"(?m)^(real|fake): \d+/\d+ images, .*\n", "", text)        # fid.py's progress
    begin = f"{Path(SCRIPTS[script].__file__).name}: "
    assert status == 2 and text.startswith(begin) and text.count("\n") == 1 and text.endswith("\n"), (status, text)
    assert words in text and not re.search(r"Traceback|[\x00-\x09\x0b-\x1f\x7f]", text), text
    if f"all in {scene / 'OUT.skipped.csv'}" in text:               # why too few crops exist: the one file that is left
        (scene / "OUT.skipped.csv").unlink()
    assert snapshot(scene) == before


@pytest.mark.parametrize("env, words", [
    (dict(WORLD_SIZE="two"), "WORLD_SIZE='two'"), (dict(WORLD_SIZE="0"), "WORLD_SIZE='0'"),
    (dict(RANK="5"), "RANK='5'"), (dict(WORLD_SIZE="2", RANK="x"), "RANK='x'"),
    (dict(WORLD_SIZE="-1"), "WORLD_SIZE='-1'"), (dict(LOCAL_RANK=""), "LOCAL_RANK=''"),
    (dict(WORLD_SIZE="2", RANK="2"), "RANK='2'")])
def test_an_environment_that_no_launcher_sets(env, words, scene, monkeypatch, capsys):
    before = snapshot(scene)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as e:
        okd_train.main([*TINY, "--steps", "1", "--out", str(scene / "OUT")])
    text = capsys.readouterr()
    assert e.value.code == 2 and text.out == "" and text.err.count("\n") == 1 and words in text.err, text.err
    assert snapshot(scene) == before


@pytest.mark.parametrize("script, argv, words", [
    ("sagan.py", ["--data", "DATA", *TINY, "--loss", "lsgan", "--out", "OUT"], "wgan-gp, hinge or r1"),
    ("acgan.py", ["--data", "DATA/Crack", "--out", "OUT"], "outside class folders"),
    ("fid.py", ["REAL", NO_TEXT, "--features", "random"], "at least 2"),
    ("crop_codebrim.py", [NO_TEXT, "OUT"], "no .xml files"),
    ("synthetic.py", ["FULL"], "exists already"),
])
def test_the_real_commands(script, argv, words, scene, root):
    before = snapshot(scene)
    p = subprocess.run([sys.executable, root / script, *argv], cwd=scene, capture_output=True, text=True, timeout=100,
                       env=dict(ENV, PYTHONIOENCODING="ascii"))
    assert p.returncode == 2 and p.stdout == "" and p.stderr.count("\n") == 1 and words in p.stderr, p.stderr
    assert snapshot(scene) == before


def test_an_empty_word_may_be_a_scripts_own_default(tmp_path):
    text = OTHER.replace("width=8", "width=8, tag=''").replace("z_dim, width", "z_dim, width, tag")
    (tmp_path / "tagged.py").write_text(text)
    for argv, tag in (([], ""), (["--tag", ""], ""), (["--tag", "x"], "x")):
        s, script, named = okd_train.parse(["--model", str(tmp_path / "tagged.py"), *argv])
        okd_train.settle(s, script, named)
        assert s.tag == tag
    (tmp_path / "named.py").write_text(text.replace("tag=''", "tag='a'"))
    s, script, named = okd_train.parse(["--model", str(tmp_path / "named.py"), "--tag", ""])
    with pytest.raises(okd_train.UserError, match="--tag is empty"):
        okd_train.settle(s, script, named)
