"""okd_train.py: how much a generator's images vary, exactly; collapse is said once; looking moves nothing."""
import json

import numpy as np
import pytest
import torch

import okd_train
from test_okd_train import BARE, OTHER, TINY, assert_same, checkpoint, logs, setup, train

pytestmark = pytest.mark.usefixtures("one_thread")

TORN = '''
import torch
from torch import nn
hparams = dict(image_size=16, z_dim=8, batch_size=4, n_classes=2, g_lr=0.0)

class Generator(nn.Module):
    """All that differs between its images of class 0 is the label; those of class 1 are noise."""
    def __init__(self, n_classes=2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3 * 16 * 16))
        self.tone = nn.Parameter(torch.zeros(n_classes))
    def forward(self, z, y):
        x = torch.tanh(z @ self.weight * y[:, None] + self.tone[y][:, None])
        return x.view(-1, 3, 16, 16)

class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.ReLU(), nn.Linear(4, 1))
    def forward(self, x):
        return self.net(x)
'''


def hwc(images):
    return images.permute(0, 2, 3, 1).numpy()


def test_the_mean_distance_between_two_of_a_class():
    x, y = torch.tensor([[0.0, 0], [1, 1], [3, 4], [6, 8], [9, 9]]), torch.tensor([0, 1, 0, 0, 2])
    found = okd_train.spreads(x.view(5, 1, 2), y, 3)
    assert found[0] == pytest.approx((5 + 10 + 5) / 3) and np.isnan(found[1:]).all()


def made_of(t, monkeypatch, change):
    """t.variety where the fakes are change(reals, class) of the reals that they are compared with."""
    def generate(G, z, y=None):
        images, labels = t.data.images, t.data.labels
        out = torch.empty(len(z), *images.shape[1:], dtype=torch.uint8)
        for c in range(2) if y is not None else [None]:
            mine = images if c is None else images[labels == c]
            out[slice(None) if c is None else y == c] = change(mine, c)
        return hwc(out)
    monkeypatch.setattr(okd_train, "generate", generate)
    return okd_train.variety(t, t.groups[0])


@pytest.mark.parametrize("model", ["sagan", "acgan"])
def test_one_picture_has_none_and_the_reals_have_their_own(model, monkeypatch):
    t = setup("--model", model, "--groups", "1", *TINY, size=128)
    n = 2 if model == "acgan" else 1
    whole = {"pixels": [1.0] * n, "features": [1.0] * n}
    assert made_of(t, monkeypatch, lambda x, c: x) == whole
    nothing = made_of(t, monkeypatch, lambda x, c: x[:1].expand_as(x))
    assert nothing == {"pixels": [0.0] * n, "features": [0.0] * n}
    if n == 2:
        torn = made_of(t, monkeypatch, lambda x, c: x if c else x[:1].expand_as(x))
        assert torn == {"pixels": [0.0, 1.0], "features": [0.0, 1.0]}


def test_half_as_far_apart_is_a_half_and_what_16_pixels_do_not_see_is_nothing(monkeypatch):
    t = setup("--groups", "1", *TINY, size=128)
    tones = torch.randint(0, 60, (128, 1, 1, 1)) * 4
    t.data.images = tones.to(torch.uint8).expand(-1, 3, 32, 32).clone()
    half = made_of(t, monkeypatch, lambda x, c: x // 2)
    assert half["pixels"] == [0.5] and 0.2 < half["features"][0] < 0.9
    board = torch.zeros(32, 32, dtype=torch.uint8)
    board[::2, ::2] = 100
    shifted = torch.stack([board.roll((k % 2, k // 2 % 2), (0, 1)) for k in range(128)])
    fine = made_of(t, monkeypatch, lambda x, c: shifted[:, None].expand(-1, 3, -1, -1))
    assert fine["pixels"] == [0.0] and fine["features"][0] > 0
    t.data.images = torch.full((128, 3, 32, 32), 7, dtype=torch.uint8)
    assert made_of(t, monkeypatch, lambda x, c: shifted[:, None].expand_as(x)) == {"pixels": [None], "features": [None]}


def test_the_last_layers_input():
    """Also of a D that takes labels; in batches of the training's size, none of which is short."""
    seen = []

    class D(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = torch.nn.Conv2d(3, 5, 4, 4), torch.nn.Linear(20, 1), torch.nn.BatchNorm1d(20)
            self.never = torch.nn.Linear(7, 7)

        def forward(self, x, y):
            seen.append((len(x), len(y)))
            return self.b(input=self.norm(self.a(x).flatten(1)) + y[:, None]).flatten()

    t = setup("--groups", "1", *TINY)
    net = t.groups[0].nets["D"]
    net.net = D().train()
    before = {k: v.clone() for k, v in net.net.state_dict().items()}
    x, y = torch.rand(10, 3, 8, 8), torch.arange(10)
    found = okd_train.last_input(net, x, y, 4)
    assert seen == [(4, 4)] * 3 and net.net.training and not net.net.b._forward_pre_hooks
    want = net.net.eval().norm(net.net.a(x).flatten(1)) + y[:, None]
    assert torch.allclose(found, want, atol=1e-6) and found.shape == (10, 20)
    assert_same(before, net.net.state_dict())


def test_a_critic_without_layers_is_looked_at_by_pixels_alone(tmp_path):
    text = BARE.replace("torch.nn.Conv2d(3, 1, 64)", "torch.nn.Parameter(torch.ones(3))")
    (tmp_path / "bare.py").write_text(text.replace("return self.f(x)\n", "return x.mean((2, 3)) @ self.f\n"))
    t = setup("--model", str(tmp_path / "bare.py"), "--groups", "1", "--batch-size", "2", size=9)
    assert list(okd_train.variety(t, t.groups[0])) == ["pixels"]


# ---------------------------------------------------------------------------------------------- what is said
def line(*values):
    return {"step": 1, "every": 1, "groups": [{"variety": {"pixels": list(v)}} for v in values]}


def test_low_twice_and_not_rising():
    def found(*pairs):
        return okd_train.collapsed(*(line(*values) for values in pairs))
    low = okd_train.ALIKE / 2
    assert found([[low]], [[low]]) == {1: [0]} and found([[0.0]], [[0.0]]) == {1: [0]}
    assert found([[1.0]], [[low]]) == found([[low]], [[1.0]]) == {}
    assert found([[low]], [[1.2 * low]]) == {}                      # it has just begun
    assert found([[low]], [[1.05 * low]]) == {1: [0]}
    assert found([[None, low, 1]], [[None, low, 1]]) == {1: [1]}
    assert found([[1, 1], [low, 1], [low, low]], [[1, 1], [low, 1], [low, low]]) == {2: [0], 3: [0, 1]}


def test_collapse_in_words():
    words = okd_train.classes_in_words
    assert words([0], []) == "" and words([0, 1], ["Crack", "Rust"]) == " of every class"
    assert words([1], ["Crack", "Rust"]) == " of Rust" and words([0, 2], list("abc")) == " of a, c"
    collapse = okd_train.Collapse([])
    assert collapse.news(None) == collapse.news({"step": 1, "groups": [{}]}) == collapse.news(line([0.0])) == []
    said, = collapse.news(line([0.0]))
    assert "Group 1 has collapsed by step 1: its images are nearly one" in said and collapse.news(line([0.0])) == []


def test_collapse_of_a_class_is_said_once(photos, tmp_path, capsys):
    """Of each group, at the second picture; not of the sound class, and not at a picture that only an end had."""
    (tmp_path / "torn.py").write_text(TORN)
    every = ["--sample-every", "3", "--log-every", "2"]
    common = ["--model", tmp_path / "torn.py", "--groups", "2", "--data", photos, *every]
    train(*common, "--steps", "11", "--out", tmp_path / "run")
    said = capsys.readouterr().out
    for i in (1, 2):
        sentence = f"Group {i} has collapsed by step 6: its images of Crack are nearly one picture, with less than"
        assert said.count(sentence) == said.count(f"Group {i} has collapsed") == 1
    assert "lower --g-lr and --d-lr" in said and "G2.best.pt" in said
    lines = logs(tmp_path / "run")
    assert [x["step"] for x in lines] == [2, 3, 4, 6, 8, 9, 10, 11]
    assert [x["step"] for x in lines if "variety" in x["groups"][1]] == [3, 6, 9]
    values = lines[3]["groups"][0]["variety"]
    assert values["pixels"][0] == values["features"][0] == 0 and min(values["pixels"][1], values["features"][1]) > 0.5
    for stop in (5, 6, 7):
        out = tmp_path / f"parts{stop}"
        train(*common, "--steps", stop, "--out", out)
        train("--out", out, "--resume", "--steps", "11")
        assert logs(out) == lines


@pytest.mark.parametrize("model", ["sagan", "acgan", "other"])
def test_to_look_moves_nothing(model, photos, tmp_path):
    """Spectral norm, BatchNorm, dropout: the same networks, whether their variety was looked at or not."""
    (tmp_path / "other.py").write_text(OTHER)
    which = ["--model", tmp_path / "other.py"] if model == "other" else ["--model", model, *TINY]
    common = [*which, "--groups", "2", "--data", photos, "--steps", "3"]
    for name, every in (("with", 1), ("without", 100)):
        train(*common, "--sample-every", every, "--out", tmp_path / name)
    assert_same(checkpoint(tmp_path / "with"), checkpoint(tmp_path / "without"))
    assert [len(logs(tmp_path / name)) for name in ("with", "without")] == [3, 1]
    by_groups = [group["variety"]["features"] for group in logs(tmp_path / "with")[-1]["groups"]]
    assert by_groups[0] != by_groups[1]
