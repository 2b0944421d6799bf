"""For all tests: the scripts are importable, Triton is interpreted where no GPU is, GPU tests skip with a reason."""
import os
import signal
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"      # must stand before the first import of triton


# Under nohup, or in the background of a script, they are ignored, and so they would be in the scripts under test.
for name in ("SIGHUP", "SIGINT"):
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL if name == "SIGHUP" else signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped with a reason where there is none")
    config.addinivalue_line("markers", "sabotage: further random moments of kills; only with -m sabotage")


def pytest_collection_modifyitems(config, items):
    if "sabotage" not in config.option.markexpr:
        items[:] = [item for item in items if "sabotage" not in item.keywords or "[" not in item.name]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def root():
    """The folder of the scripts."""
    return ROOT


@pytest.fixture(scope="session")
def shared():
    """Folder of real data and fixtures beside the checkout; tests that need it skip without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no folder shared/ beside the checkout")
    return path


@pytest.fixture(scope="module")
def one_thread():
    """Bit-identity is promised at equal thread counts; one is also fastest at this size."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 small pictures in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    r = np.random.default_rng(0)
    for name, tone in (("Crack", 60), ("Spallation", 160)):
        (folder / name).mkdir()
        for k in range(12):
            a = np.clip(tone + 40 * r.standard_normal((8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(a).resize((32, 32), Image.Resampling.BICUBIC).save(folder / name / f"{k:02d}.png")
    return folder


def noise(folder, classes, n):
    """Make `folder` with n pictures of noise, 32x32, in a folder per class."""
    r = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k in range(n):
            Image.fromarray(r.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name / f"{k}.png")
    return folder


def least_peak(work):
    """The most bytes that Python held at once beyond what it held before work(k), for k = 0 and 1, the less of both.

    The less, because file names are interned, and as the interpreter's table of such strings grows it is copied once,
    whoever is at work then: megabytes that say nothing of the work.
    """
    peaks = []
    for k in range(2):
        tracemalloc.start()
        try:
            work(k)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)
