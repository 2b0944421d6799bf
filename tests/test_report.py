"""report.py: curves, interpolation, attention maps, nearest copies, report.html; exact where a picture can be exact."""
import base64
import html
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import okd_train
import report
import sample
from conftest import noise

TINY = ["--image-size", "32", "--ch", "4", "--batch-size", "4", "--z-dim", "8",
        "--log-every", "1", "--sample-every", "1", "--save-every", "2"]
FILES = {**report.PICTURES, "page": "report.html"}      # flag: file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """16 pictures in two class folders, one of them named as only an attacker would."""
    return noise(tmp_path_factory.mktemp("photos") / "a&b <i>", ("<b>Crack", "Rust"), 8)


@pytest.fixture(scope="module")
def sagan_run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sagan"
    okd_train.main(["--groups", "2", *TINY, "--steps", "4", "--data", str(photos), "--out", str(out),
                    "--fid-every", "2", "--fid-features", "random", "--fid-samples", "20"])
    return out


@pytest.fixture(scope="module")
def acgan_run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "acgan"
    argv = ["--model", "acgan", "--groups", "2", *TINY, "--steps", "2", "--data", str(photos), "--out", str(out)]
    okd_train.main(argv)
    return out


@pytest.fixture
def copied(sagan_run, tmp_path):
    """A run of its own, to be damaged."""
    shutil.copytree(sagan_run, tmp_path / "run", ignore=shutil.ignore_patterns(*FILES.values()))
    return tmp_path / "run"


def draw(out, *flags):
    report.main([str(out), *flags])


def train(out, *flags):
    okd_train.main(["--out", str(out), *flags])


def refused(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        report.main(list(map(str, argv)))
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.count("\n") == 1 and text.startswith("report.py: error: "), text
    return text


def near(pixel, colour, by=40):
    colour = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
    return max(abs(a - b) for a, b in zip(pixel, colour)) <= by


def write_log(out, values, **more):
    """log.jsonl of two groups: values (n, 2) of d_loss, steps 10, 20, ..."""
    groups = [[{"d_loss": v, **more} for v in pair] for pair in values]
    lines = [{"step": 10 * n, "seconds": 1, "groups": pair} for n, pair in enumerate(groups, 1)]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---------------------------------------------------------------------------------------------- drawing
def test_ticks_are_round_and_few():
    assert report.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert report.ticks(-3, 7) == [-2, 0, 2, 4, 6]
    assert report.ticks(0, 50000) == [0, 10000, 20000, 30000, 40000, 50000]
    assert report.ticks(0.31, 0.34) == [0.31, 0.32, 0.33, 0.34]
    assert report.ticks(-2.6e-5, 1e-6) == [-2e-5, -1e-5, 0]
    r = np.random.default_rng(0)
    for _ in range(300):
        low = r.normal() * 10.0 ** r.integers(-8, 9)
        high = low + abs(low) * 10.0 ** r.uniform(-3, 3)
        for most in (2, 4, 6):
            found = report.ticks(low, high, most)
            slack = 1e-9 * (high - low)
            assert len(found) <= most and all(low - slack <= v <= high + slack for v in found)
        assert len(found) >= 2


def test_tick_labels_share_a_unit():
    assert report.tick_labels([0, 0.2, 0.4]) == ["0", "0.2", "0.4"]
    assert report.tick_labels([0, 5000]) == ["0", "5000"]
    assert report.tick_labels([0, 10000, 20000]) == ["0", "10k", "20k"]
    assert report.tick_labels([-500000, 0, 500000, 1e6]) == ["-0.5M", "0", "0.5M", "1M"]
    assert report.tick_labels([1e-5, 2e-5]) == ["1e-05", "2e-05"] and report.tick_labels([1e12]) == ["1e+12"]
    assert report.tick_labels([]) == []


def test_a_spike_does_not_flatten_the_rest_but_the_end_is_always_in_sight():
    y = np.concatenate([[1e6], np.sin(np.arange(200))])
    low, high = report.y_limits([(y, y)])
    assert -1.2 < low <= -1 and 1 <= high < 1.9
    y[-1] = 50.0
    assert report.y_limits([(y, y)])[1] > 50
    y[-1] = -50.0
    assert report.y_limits([(y, y)])[0] < -50
    assert report.y_limits([(np.array([1.0, 2.0, 3.0]),) * 2]) == pytest.approx((0.92, 3.08))
    assert report.y_limits([(np.full(3, 5.0),) * 2]) == pytest.approx((4.46, 5.54))
    assert report.y_limits([(np.zeros(3),) * 2]) == pytest.approx((-0.54, 0.54))
    assert report.y_limits([(np.full(3, np.nan),) * 2]) == report.y_limits([]) == (0, 1)


def test_smooth_leaves_nan_out():
    y = np.array([0, 3, 6, np.nan, 12, 15])
    assert report.smooth(y, 3) == pytest.approx([1.5, 3, 4.5, np.nan, 13.5, 13.5], nan_ok=True)
    assert report.smooth(y, 1) == pytest.approx(y, nan_ok=True)


def test_a_line_lies_where_its_values_say():
    plot = report.Plot(430, 220, "title", "about", (0, 100), (0, 10))
    plot.line(np.array([0, 25, 50, 75, 100.0]), np.array([5, 5, np.nan, 5, 5]), "#ff0000")
    plot.line(np.array([75, 100.0]), np.array([20, 7.5]), "#ff0000")
    plot.line(np.array([60.0]), np.array([2.5]), "#0000ff")
    for _ in range(2):
        plot.faint(np.array([0.0, 100]), np.array([1.0, 1.0]), "#00ff00")
    image = plot.image()
    at = lambda x, y: image.getpixel((round(plot.LEFT + x / 100 * plot.w), round(plot.TOP + (10 - y) / 10 * plot.h)))
    assert image.size == (430, 220)
    assert near(at(10, 5), "#ff0000")
    assert near(at(99.5, 7.8), "#ff0000", 90)                       # 20 is above the frame, and the line ends there
    assert near(at(35, 5), "white", 45) and near(at(50, 5), "white", 45) and near(at(10, 5.6), "white")  # a gap at NaN
    assert near(at(20, 1), (143, 255, 143), 30) and near(at(20, 2.5), "white")  # 0.75 of white, twice
    assert near(at(60, 2.5), "#0000ff")                                             # alone: a dot
    above = np.asarray(image.crop((0, plot.TOP - 4, 430, plot.TOP - 2)).convert("RGB"))
    assert not ((above[..., 0] > 200) & (above[..., 1] < 100)).any()
    for v in (2, 4, 6, 8):  # ticks(0, 10): a line across, a number beside it
        y = round(plot.TOP + (10 - v) / 10 * plot.h)
        left, right = (plot.LEFT + plot.w * share // 100 for share in (64, 72))
        across = np.asarray(image.crop((left, y - 3, right, y + 4)).convert("L")).min(1) < 250
        assert across[2:5].any() and not across[[0, 1, 5, 6]].any()
        assert np.asarray(image.crop((plot.LEFT - 14, y - 5, plot.LEFT - 4, y + 5)).convert("L")).min() < 140
        assert np.asarray(image.crop((plot.LEFT - 14, y + 7, plot.LEFT - 4, y + 11)).convert("L")).min() > 200


def test_dashes():
    plot = report.Plot(430, 220, "", "", (0, 100), (0, 10))
    plot.line(np.array([0.0, 100]), np.array([5.0, 5]), "#ff0000", 2, 7)
    row = np.asarray(plot.image())[plot.TOP + plot.h // 2, plot.LEFT + 1:plot.LEFT + plot.w]
    red = (row[:, 0] > 200) & (row[:, 1] < 100)
    assert 0.4 < red.mean() < 0.6 and 20 < (red[1:] != red[:-1]).sum() < 70


def test_names_are_drawn_in_letters_that_the_font_has():
    assert okd_train.legible("\u00d6l, caf\u00e9 x\u00b2") == "Ol, cafe x2"
    assert okd_train.legible("a\nb \u65e5 \udce9") == "a\\nb \\u65e5 \\udce9"
    images = np.zeros((3, 32, 32, 3), np.uint8)
    draw = lambda name: np.asarray(okd_train.grid([(name, images)], 2))
    assert np.array_equal(draw("R\u00f6st"), draw("Rost")) and not np.array_equal(draw("Rost"), draw("Rast"))
    name = "CORROSIONSTAIN WW"                                      # wider than six pixels a letter
    margin = draw(name).shape[1] - 2 * 66
    assert (draw(name)[:, margin - 6:margin] == 255).all() and draw(name)[:, margin - 12:margin - 6].min() < 100


# ---------------------------------------------------------------------------------------------- curves
def test_a_column_is_numbers_or_nan():
    lines = [{"v": v} for v in (1, 2.5, 1e31, -1e300, math.inf, math.nan, None, "3", [4], 10 ** 400)] + [{}]
    assert report.column(lines, lambda line: line["v"]) == pytest.approx([1, 2.5] + [np.nan] * 9, nan_ok=True)


def test_curves_of_a_known_log(tmp_path):
    write_log(tmp_path, [(1.0, 3.0)] * 12, d_w=0.5)
    image = report.curves(tmp_path, "known")
    assert image.size == (640, 54 + 2 * 220)                                        # d_loss over d_w
    plot = report.Plot
    w, h = 430 - plot.LEFT - plot.RIGHT, 220 - plot.TOP - plot.BOTTOM
    low, high = 1 - 0.08, 3 + 0.08
    for value, colour in ((1.0, report.COLOURS[0]), (3.0, report.COLOURS[1])):
        y = 54 + plot.TOP + (high - value) / (high - low) * h
        assert near(image.getpixel((plot.LEFT + w // 2, round(y))), colour)
        before = plot.LEFT + round(w * 5 / 122.4)                   # it begins at step 10 of 120 * 1.02
        assert near(image.getpixel((before, round(y))), "white")


def test_curves_draw_what_the_log_has(sagan_run, acgan_run):
    draw(sagan_run, "--curves")
    size = (8 + 3 * 430, 54 + 4 * 220)
    assert Image.open(sagan_run / "curves.png").size == size      # loss, w, grad_norm, gamma; scores beside d_w, c_w
    draw(acgan_run, "--curves")
    assert Image.open(acgan_run / "curves.png").size == size        # loss, w, class_loss, accuracy


def test_accuracy_has_the_whole_range(tmp_path):
    lines = [json.dumps({"step": k, "groups": [{"d_accuracy": 0.75}]}) + "\n" for k in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    plot, image = report.Plot, report.curves(tmp_path, "accuracy")
    h = 220 - plot.TOP - plot.BOTTOM
    assert near(image.getpixel((plot.LEFT + 240, round(54 + plot.TOP + (1.02 - 0.75) / 1.04 * h))), report.COLOURS[0])


def judged(step, *shares):
    """A line of fid.jsonl with the share of labels that hold of each group."""
    groups = [f"G{i}" for i in range(1, 1 + len(shares))]
    return {"step": step, "score": "rFD", **dict.fromkeys((*groups, "mean", "union", "floor"), 2.0),
            "labels": {**dict(zip(groups, shares)), "reals": 0.9, "chance": 0.5}}


def test_labels_that_hold_have_a_panel(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": k, "groups": [{"d_loss": 1}]}) + "\n"
                                                for k in (1, 2, 3)))
    lines = [judged(k, 0.3) for k in (1, 2, 3)]
    (tmp_path / "fid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot, image = report.Plot, report.curves(tmp_path, "labels")
    assert image.size == (640, 54 + 3 * 220)                        # below the loss and the score
    h = 220 - plot.TOP - plot.BOTTOM
    row = lambda v: round(54 + 2 * 220 + plot.TOP + (1.02 - v) / 1.04 * h)
    assert near(image.getpixel((plot.LEFT + 240, row(0.3))), report.COLOURS[0])
    for v in (0.9, 0.5):                                            # the reals and chance, broken lines
        line = [image.getpixel((plot.LEFT + k, row(v))) for k in range(150, 300)]
        assert min(map(sum, line)) < 500 and max(map(sum, line)) > 700


def test_labels_that_hold_stand_in_the_table(copied):
    words = report.scores(report.Run(copied, "cpu"))
    assert "labels" not in words                                    # of a run without classes
    lines = [judged(2, 0.25, 0.75), judged(4, 0.31, 0.62), {**judged(6, 1, 1), "labels": "strange"}]
    (copied / "fid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = report.scores(report.Run(copied, "cpu"))
    assert "labels that hold (step 4)" in words and "Chance is 0.50." in words and "strange" not in words
    rows = re.findall('<tr><th scope="row">(.*?)</th>(.*?)</tr>', words)
    last = {name: re.findall("<td.*?>(.*?)</td>", cells)[-1] for name, cells in rows}
    assert last == {"G1": "0.31", "G2": "0.62", "mean": "", "union": "", "floor": "0.9"}


def test_colours_tell_groups_apart(tmp_path):
    lines = [json.dumps({"step": k, "groups": [{"g_loss": i} for i in range(9)]}) + "\n" for k in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    many = report.curves(tmp_path, "nine")
    row = np.asarray(many)[40, :12 + 52 * 9].reshape(-1, 3).astype(int)
    keys = [row[12 + 52 * i:12 + 52 * i + 20] for i in range(9)]
    assert len({tuple(k[1]) for k in keys[:7]}) == 7
    assert (keys[7][1] == keys[0][1]).all() and (keys[7] != keys[0]).any()          # the eighth is dashed
    assert (keys[0] == keys[0][0]).all()
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "groups": [{"g_loss": i} for i in range(30)]}) + "\n")
    left = 12 + 52 * 29
    thirty = np.asarray(report.curves(tmp_path, "thirty"))
    assert (thirty[40, left:left + 20] != 255).any(1).any()                         # the last group has its place, too


@pytest.mark.parametrize("text", [
    '{"step": 1, "groups": [{"d_loss": 1.0}]}\n',                                                    # one line
    '{"step": 1, "groups": [{"d_loss": NaN, "g_loss": 1}, {"g_loss": Infinity}]}\n'
    '{"step": 2, "groups": [{}, {"d_loss": null}]}\n',
    '{"step": 1, "groups": [{"d_loss": 1e300, "gamma": {"G": [0.1, 0.2], "D": []}}]}\n'
    '{"step": 2, "groups": [{"d_loss": -1e308, "gamma": {"G": [0.1]}}]}\n',
    '{"step": 1, "groups": [{"d_loss": 1.0}]}\n{"step": 2, "groups": [{"d_lo',      # still being written
    '{"step": 1, "groups": 5}\n{"step": 2, "groups": ["d", null, {"gamma": 3}, {"gamma": {"G": 1}}]}\n'
    '{"step": 3, "groups": [{"d_loss": 1}]}\n' + "[" * 100000 + '\n{"step": 1e999}\n',
    '[1]\n7\n{"step": "x"}\n{"step": NaN}\n{"step": 3, "groups": []}\n{"step": 4}\n'
    '{"step": 1, "groups": [{"mine": 1.0, "": 2, "g_mine": 3}]}\n',
])
def test_curves_of_odd_logs(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    (tmp_path / "fid.jsonl").write_text('{"step": 1, "score": "rFD", "G1": 2.0, "floor": NaN}\n{"step": 2, "sc')
    image = report.curves(tmp_path, "odd")
    assert image.width >= 640 and np.asarray(image).std() > 5


def test_no_line_yet_is_one_line(copied, capsys):
    for text in ("", '{"step": 1', '{"step": 1, "groups": []}\n', '{"step": 1, "groups": [{"mine": 1}]}'):
        (copied / "log.jsonl").write_text(text)
        assert "has no line yet" in refused(capsys, copied, "--curves")
    (copied / "log.jsonl").unlink()
    assert "has no line yet" in refused(capsys, copied, "--curves")


def test_a_long_log_takes_bounded_time(tmp_path):
    r = np.random.default_rng(0)
    group = ('{"d_loss": %.17g, "d_w": 9.032490730285645, "d_grad_norm": 1.0753095149993896, '
             '"g_loss": 11.59898853302002, "gamma": {"G": [-0.005953490734100342]}}')
    with open(tmp_path / "log.jsonl", "w") as f:
        for n, v in enumerate(r.normal(size=50000)):
            f.write(f'{{"step": {n + 1}, "groups": [{", ".join([group % v] * 3)}]}}\n')
    kept = okd_train.read_lines(tmp_path / "log.jsonl", most=4000)
    steps = [line["step"] for line in kept]
    assert 3500 < len(kept) <= 4000 and steps[-1] == 50000 and len(set(np.diff(steps))) == 1
    begin = time.process_time()
    report.curves(tmp_path, "long")
    assert time.process_time() - begin < 8


def test_read_lines_passes_over_what_is_no_line(tmp_path):
    path = tmp_path / "x.jsonl"
    assert okd_train.read_lines(path) == []
    path.write_text('{"step": 1, "G1": 2}\n{"step": 2}\n{"step": true, "G1": 1}\n{"step": -1, "G1": 1}\n'
                    '{"step": 3.0, "G1": 1}\n\n{"step": 4, "G1": "1"}\n{"step": 5, "G1": 0.5}\n'
                    '{"step": 6, "G1": 0.5, "x": ')
    assert [line["step"] for line in okd_train.read_lines(path)] == [1, 2, 4, 5]
    assert [line["step"] for line in okd_train.read_lines(path, ["G1"])] == [1, 5]
    assert okd_train.score_lines(tmp_path) == []
    path.unlink()
    path.mkdir()
    with pytest.raises(okd_train.UserError, match="x.jsonl cannot be read"):
        okd_train.read_lines(path)


# ---------------------------------------------------------------------------------------------- interpolation
def test_the_way_keeps_length_and_ends():
    a, b = okd_train.draw(0, 0, 0, "a", "normal", (2, 128))
    z = report.between(a, b, 7)
    assert torch.equal(z[0], a) and torch.equal(z[-1], b) and z.dtype == torch.float32
    assert min(a.norm(), b.norm()) - 0.5 < z.norm(dim=1).min()                      # the middle of a line: 0.7 of it
    unit = torch.nn.functional.normalize(z, dim=1)
    angles, whole = torch.arccos((unit[1:] * unit[:-1]).sum(1)), torch.arccos(a @ b / a.norm() / b.norm())
    assert angles.std() < 0.02 * angles.mean() * 5 and angles.sum() == pytest.approx(whole.item(), abs=1e-2)
    straight = report.between(torch.tensor([1.0]), torch.tensor([3.0]), 3)          # no circle in one dimension
    assert straight.flatten().tolist() == [1, 2, 3]
    assert report.between(torch.ones(4), torch.ones(4), 2).tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("which", ["sagan_run", "acgan_run"])
def test_the_ends_are_the_images_of_these_z(which, request):
    """Rows of interpolate.png against the averaged generators called here."""
    out, k = request.getfixturevalue(which), 5
    draw(out, "--interpolate", str(k))
    sheet = np.asarray(Image.open(out / "interpolate.png")).astype(int)
    z = okd_train.draw(0, 0, 0, "grid", "normal", (6, 8))
    paths = [(0, 0), (0, 1)] if which == "acgan_run" else [(0, None), (2, None), (4, None)]
    rows = [(j, i, c) for j, c in paths for i in (1, 2)]
    left = sheet.shape[1] - k * 66
    assert sheet.shape[0] == len(rows) * 66 + (len(rows) - 1) * 8 + 2
    for n, (j, i, c) in enumerate(rows):
        G = okd_train.load_generator(out / f"G{i}.pt")
        for column, number in ((0, j), (k - 1, j + 1)):
            with torch.no_grad():
                x = G(z[number:number + 1], *(() if c is None else (torch.tensor([c]),)))[0]
            want = x.add(1).mul(127.5).permute(1, 2, 0).numpy()
            top, at = 2 + n * 74, left + column * 66
            cell = sheet[top:top + 64:2, at:at + 64:2]                              # 32 pixels, shown twice as large
            assert np.abs(cell - want).max() < 1.1


def test_interpolation_shows_what_the_sample_grid_shows(sagan_run):
    draw(sagan_run, "--interpolate")
    paths = sagan_run / "interpolate.png", sagan_run / "samples" / "step_000004.png"
    sheet, last = (np.asarray(Image.open(path)).astype(int) for path in paths)
    left = [a.shape[1] - 10 * 66 for a in (sheet, last)]
    assert np.abs(sheet[2:66, left[0]:left[0] + 64] - last[2:66, left[1]:left[1] + 64]).max() <= 1


# ---------------------------------------------------------------------------------------------- attention
def test_look_is_the_layers_own_map(sagan_run):
    G = okd_train.load_generator(sagan_run / "G1.pt")
    z, inputs = torch.randn(3, 8), {}
    layers = {k: m for k, m in G.named_modules() if type(m).__name__ == "SelfAttention"}
    found = report.look(G, z)
    assert not any(m._forward_hooks for m in G.modules())
    for k, m in layers.items():
        m.register_forward_hook(lambda m, i, o, k=k: inputs.update({k: i[0]}))
    with torch.no_grad():
        m.gamma.fill_(0.25)
        G(z)
    assert [name for name, _, _ in found] == list(layers) and len(found) == 2
    assert found[0][2].shape[2:] == (8, 8) and found[1][2].shape[2:] == (16, 16)
    for name, gamma, maps in found:
        n = maps.shape[2]
        with torch.no_grad():
            want = layers[name].attention_map(inputs[name])  # gamma of the last layer does not reach any input
        for j, (down, right) in enumerate(report.POINTS):
            assert torch.allclose(maps[:, j].flatten(1), want[:, int(down * n) * n + int(right * n)], atol=1e-6)
        assert maps.shape == (3, 3, n, n) and torch.allclose(maps.sum((2, 3)), torch.ones(3, 3), atol=1e-5)
    assert report.look(G, z)[-1][1] == 0.25


ATTENTIVE = '''
import torch
from torch import nn
hparams = dict(image_size=32, z_dim=8, batch_size=4)

class Corner(nn.Module):
    """Everything looks at the last cell."""
    def forward(self, x):
        return x
    def attention_map(self, x):
        n = x.shape[2] * x.shape[3]
        p = torch.zeros(len(x), n, n)
        p[:, :, -1] = 1
        return p

class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.look = nn.ConvTranspose2d(8, 3, 8), Corner()
    def forward(self, z):
        x = self.up(z[:, :, None, None])
        return torch.tanh(nn.functional.interpolate(self.look(x=x) if KEYWORD else self.look(x), scale_factor=4))

class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3 * 32 * 32, 1)
    def forward(self, x):
        return self.net(x.flatten(1))
'''


@pytest.mark.parametrize("keyword", [False, True])
def test_maps_of_a_users_own_layer(photos, tmp_path, keyword, capsys):
    script, out = tmp_path / "own.py", tmp_path / "run"
    script.write_text(ATTENTIVE.replace("KEYWORD", str(keyword)))
    train(out, "--model", str(script), "--groups", "1", "--steps", "1", "--data", str(photos))
    draw(out, "--attention-maps")
    image = Image.open(out / "attention.png").convert("RGB")
    # One layer in G, none in D: a row of three images of 96 pixels and 8x8 cells, each with three maps.
    left, top = image.width - 12 * 98, image.height - 98
    ink = np.asarray(image.convert("L"))[:top]
    assert top == 34 and (ink[:, -4:] == 255).all()         # two lines that say what is seen, not cut
    assert ink[:16].min() < 100 and ink[18:].min() < 100
    for row in range(3):
        for j in range(3):
            x, y = left + (4 * row + 1 + j) * 98, top
            assert near(image.getpixel((x + 90, y + 90)), (255, 240, 90), 60)       # the last cell
            r, g, b = image.getpixel((x + 90, y + 78))  # the cell above it: the grey picture
            assert r == g == b
    script.write_text(ATTENTIVE.replace("KEYWORD", "False").replace("return p", "return p[:, 0]"))
    assert "attention_map of layer look returned (3, 64) for x (3, 3, 8, 8)" in refused(capsys, out, "--attention-maps")
    script.write_text(ATTENTIVE.replace("KEYWORD", "False").replace("return p", "return p / nothing"))
    assert "NameError" in refused(capsys, out, "--attention-maps")


def test_discriminator_from_the_checkpoint(copied, acgan_run, capsys):
    draw(copied, "--attention-maps")
    four = Image.open(copied / "attention.png").height
    (copied / "checkpoint.pt").unlink()
    draw(copied, "--attention-maps")
    assert four - Image.open(copied / "attention.png").height == 4 * (98 + 8)       # two layers less of each D
    assert "no layer of acgan.py offers attention_map" in refused(capsys, acgan_run, "--attention-maps")


# ---------------------------------------------------------------------------------------------- report.html
class Page(html.parser.HTMLParser):
    """Tags with attributes, text, and whether all that opens also closes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def images(self):
        for tag, attrs in self.tags:
            if tag == "img":
                assert attrs["alt"].strip() and re.match(r"data:image/(png|jpeg);base64,", attrs["src"])
                with Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",")[1]))) as im:
                    im.load()
                    assert im.size == (int(attrs["width"]), int(attrs["height"]))
                    yield im


def read_page(out):
    text = (out / "report.html").read_text("utf-8")
    page = Page(text)
    assert not page.open and text.startswith("<!DOCTYPE html>")
    for tag, attrs in page.tags:                                                    # nothing is fetched, nothing runs
        assert tag not in ("script", "link", "iframe", "object", "base") and not any(k.startswith("on") for k in attrs)
        assert all(v.startswith("data:") for k, v in attrs.items() if k in ("src", "href", "srcset"))
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme: dark" in text and 'lang="en"' in text
    return page, " ".join(" ".join(page.words).split())


def test_report_of_a_run(sagan_run):
    before = {p.name: p.read_bytes() for p in sagan_run.iterdir() if p.suffix in (".pt", ".json", ".jsonl", ".npz")}
    draw(sagan_run, "--page")
    page, words = read_page(sagan_run)
    # Strips of five of 16 real ones and twice 20 generated, 4 grids, curves, interpolation, attention, twice 10 copies
    assert len(list(page.images())) == 3 * 4 + 4 + 3 + 2 * 2
    assert "2 sagan groups in a ring (rho 0.5) learnt 32x32 images from 16 images of" in words
    assert "step 4 of 4" in words and "a&b <i>" in words
    headings = re.findall("<h2>(.*?)</h2>", (sagan_run / "report.html").read_text())
    assert headings == ["Real and generated", "On the way", "Scores", "Curves", "Between two z", "Attention",
                        "Closest copies", "Settings"]
    assert words.count("none in") == 0 and "floor: real images against other real ones" in words
    scores = [json.loads(line) for line in (sagan_run / "fid.jsonl").read_text().splitlines()]
    for k in ("G1", "G2", "mean", "union", "floor"):
        assert f"{k} {scores[-1][k]:.4g}" in words
    assert f"G1 {scores[-1]['G1']:.4g} {min(line['G1'] for line in scores):.4g}" in words
    marked = re.findall(r"<mark>(\w+)</mark>", (sagan_run / "report.html").read_text())
    assert {"groups", "ch", "image_size", "data", "fid_features"} <= set(marked)
    assert not {"seed", "rho", "g_lr", "curves"} & set(marked)
    for tag, attrs in page.tags:
        assert tag != "th" or attrs["scope"] in ("row", "col")
    assert (sagan_run / "report.html").stat().st_size < 3e6
    assert before == {p.name: p.read_bytes() for p in sagan_run.iterdir() if p.name in before}  # read, not changed


def test_report_escapes_what_comes_from_outside(acgan_run):
    draw(acgan_run, "--page")
    page, words = read_page(acgan_run)
    assert "2 classes (<b>Crack, Rust)" in words and not {"b", "i"} & {tag for tag, _ in page.tags}
    assert "ttention" not in words.split("Real and generated")[1]   # there is no such layer
    # In each class 8 real and twice 10 generated, 2 grids, curves, interpolation, twice 10 copies
    assert len(list(page.images())) == 2 * 3 * 2 + 2 + 2 + 2 * 2
    assert re.findall("<h3>(.*?)</h3>", (acgan_run / "report.html").read_text()) == ["&lt;b&gt;Crack", "Rust"]


def answers(out):
    """The verdict of report.html: {question: text with the commands}, and the page's own order."""
    text = (out / "report.html").read_text("utf-8")
    rows = re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text.split("</dl>")[0])
    assert text.index("<h1>") < text.index("<dl") < text.index("<h2>")
    return {question: html.unescape(re.sub("<[^>]*>", " ", text)) for question, text in rows}


def a_score(step, labels=None, **more):
    return {"step": step, "score": "FID", "G1": 50.0 + step, "G2": 40.0 + step, "floor": 9.5, **more,
            **({"labels": {"G1": 0.9, "G2": labels, "reals": 0.95, "chance": 0.5}} if labels else {})}


def pictures_of(*steps):
    """Lines of log.jsonl: [(step, G1's variety of two classes, G2's)]."""
    return [{"step": step, "every": 1, "groups": [{"variety": {"pixels": list(v)}} for v in groups]}
            for step, *groups in steps]


def tell(out, monkeypatch, shares, scores=(), log=()):
    """The verdict where the copies' shares of G1, G2 and the floor are these."""
    rows = [(name, share, 0.1) for name, share in zip(("G1", "G2", "floor"), shares)]
    monkeypatch.setattr(report, "closest", lambda run: ([], rows, "inception"))
    for name, lines in (("fid.jsonl", scores), ("log.jsonl", log)):
        (out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(out)
    return answers(out)


def test_the_verdict(acgan_run, tmp_path, monkeypatch):
    out = shutil.copytree(acgan_run, tmp_path / "my run")
    sound = pictures_of((1, (0.9, 1.1), (0.8, 0.7)), (2, (0.9, 1.1), (0.8, 0.75)))
    told = tell(out, monkeypatch, (0.3, 0.35, 0.4), [a_score(1, 0.92), a_score(2, 0.6)], sound)
    assert list(told) == ["Best group", "Labels", "Variety", "Copies", "Next"]
    assert "Group 2, as at step 1." in told["Best group"] and "FID was 41, lower" in told["Best group"]
    assert "about 9.5" in told["Best group"] and "rough" not in told["Best group"]
    assert "They hold." in told["Labels"] and "names 92% as labelled" in told["Labels"] and "95%" in told["Labels"]
    assert "Kept." in told["Variety"] and "group 2, Rust: two images differ by 75%" in told["Variety"]
    assert "No sign" in told["Copies"] and "35% of the images of group 2" in told["Copies"] and "40%" in told["Copies"]
    assert f"python sample.py '{out}' --per-class 200 --group best --to made/" in told["Next"]

    thin = pictures_of((1, (0.9, 0.4), (0.01, 0.8)), (2, (0.9, 0.4), (0.01, 0.8)))
    told = tell(out, monkeypatch, (0.3, 0.51, 0.4), [a_score(2, 0.52, score="rFD")], thin)
    assert "They do not hold." in told["Labels"] and "rough" in told["Best group"]
    assert "Lost: group 2's images of <b>Crack are nearly one picture." in told["Variety"]
    assert "Perhaps" in told["Copies"] and "51%" in told["Copies"]
    assert "Start anew" in told["Next"] and "--g-lr 5e-05 --d-lr 0.0002" in told["Next"]
    told = tell(out, monkeypatch, (0.3, 0.51, 0.4), [a_score(2, 0.52)], [thin[0], {"step": 2, "groups": [{}, {}]}])
    assert "Low in places." in told["Variety"] and "--recipe small" in told["Next"]
    args = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps({**args, "settings": {**args["settings"], "recipe": "small"}}))
    assert "--recipe small --g-lr" in tell(out, monkeypatch, (0, 0, 0), [], thin)["Next"]
    (out / "args.json").write_text(json.dumps(args))
    told = tell(out, monkeypatch, (0, 0, 0), [a_score(2, 0.75)], [{"step": 1, "groups": 5}, *sound[:1]])
    assert "They hold in part." in told["Labels"] and "Train on" in told["Next"] and "--resume" in told["Next"]


def test_what_was_never_measured_is_said_with_the_command(acgan_run, tmp_path, monkeypatch):
    out = shutil.copytree(acgan_run, tmp_path / "run")
    told = tell(out, monkeypatch, (0, 0, 0))
    assert [told[q].count("Not measured.") for q in ("Best group", "Labels", "Variety")] == [1, 1, 1]
    assert f"python sample.py {out} 200 --group best" in told["Best group"]
    assert f"python sample.py {out} --per-class 100 --group 1 --to {out / 'check'}" in told["Labels"]
    assert f"<i>' {out / 'check'}/G1" in told["Labels"] and "(--sample-every)" in told["Variety"]


def test_six_grids_are_spread_over_the_run(copied):
    for k in (*range(5, 39), 999999, 1000000):
        Image.new("RGB", (80, 80), (k % 256, 0, 0)).save(copied / "samples" / f"step_{k:06d}.png")
    draw(copied, "--page")
    page, words = read_page(copied)
    assert re.findall(r"Step (\d+)\.", words) == ["1", "9", "17", "24", "32", "1000000"]


def test_report_says_what_is_missing(copied, capsys):
    shutil.rmtree(copied / "samples")
    for name in ("log.jsonl", "fid.jsonl"):
        (copied / name).unlink()
    args = json.loads((copied / "args.json").read_text())
    args["settings"]["data"] = "gone/<u>"
    (copied / "args.json").write_text(json.dumps(args))
    draw(copied, "--page")
    page, words = read_page(copied)
    assert len(list(page.images())) == 2 * 4 + 2                    # generated ones, interpolation, attention
    for text in ("real.png cannot be shown", "log.jsonl has no line yet",
                 "--data gone/<u>: no such folder", "step 0 of 4"):
        assert text in words, text
    (copied / "G1.pt").unlink()
    (copied / "checkpoint.pt").write_bytes(b"cut")
    draw(copied, "--page")
    page, words = read_page(copied)
    assert not list(page.images()) and words.count("G1.pt: no such file") == 3 + 2
    assert "G1.pt: no such file" in refused(capsys, copied, "--interpolate")


def test_report_does_not_compare_with_other_images(copied, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "other")
    next((tmp_path / "other").rglob("3.png")).unlink()
    args = json.loads((copied / "args.json").read_text())
    args["settings"]["data"] = str(tmp_path / "other")
    (copied / "args.json").write_text(json.dumps(args))
    (copied / "samples" / "real.png").write_bytes(b"no picture")
    draw(copied, "--page")
    page, words = read_page(copied)
    assert "are not those that the run was trained on" in words and "real.png cannot be shown" in words
    assert len(list(page.images())) == 2 * 4 + 4 + 3


def test_a_copying_generator_is_found(copied, monkeypatch):
    """A generator that draws ten training images among noise: they come first, each above its own."""
    run = report.Run(copied)
    run.generators = {1: None}
    images, _, _ = okd_train.load_data(run.s, False, print)
    noisy = torch.randint(0, 256, (190, 3, 32, 32), dtype=torch.uint8)
    fakes = torch.cat([noisy, images[torch.randperm(16)[:10]]])
    monkeypatch.setattr(okd_train, "generate", lambda G, z, y=None: fakes.permute(0, 2, 3, 1).numpy())
    run.s.fid_data = "elsewhere/"                                   # the photos that scores are against, kept there
    (copied / "real_features.npz").write_bytes(b"of elsewhere/")
    ((_, *pair),), rows, kind = report.closest(run)
    assert (copied / "real_features.npz").read_bytes() == b"of elsewhere/"
    assert rows[0][0] == "G1" and rows[0][1] >= 0.05 and rows[0][2] < 1e-3 < rows[1][2] and kind == "random"
    assert pair[0].shape == (10, 32, 32, 3) and np.array_equal(*pair)               # each above its real image


# ---------------------------------------------------------------------------------------------- flags
def test_flags_combine(copied, capsys, monkeypatch):
    once, own = [], report.curves
    monkeypatch.setattr(report, "curves", lambda *a: (once.append(a), own(*a))[1])
    capsys.readouterr()
    draw(copied, "--curves", "--interpolate", "4", "--attention-maps", "--page")
    told = capsys.readouterr().out.splitlines()
    assert told == [f"Wrote {copied / name}." for name in ("curves.png", "interpolate.png", "attention.png")] + [
        "Comparing 2 x 200 fakes with the 16 training images, random features.", f"Wrote {copied / 'report.html'}."]
    assert len(once) == 1
    width = Image.open(copied / "interpolate.png").width
    assert width in [im.width for im in read_page(copied)[0].images()]  # the page shows the four that were asked for
    assert not list(copied.glob(".*"))


def test_a_run_of_a_script_given_by_a_relative_path_is_read_from_elsewhere(photos, tmp_path, monkeypatch):
    """Another script of that name may lie there, and --resume leaves args.json with what was given."""
    for name, text in (("here", ATTENTIVE.replace("KEYWORD", "True")), ("there", "raise SystemExit('another script')")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    okd_train.main(["--model", "own.py", "--groups", "1", "--steps", "1", "--data", str(photos), "--out", "run"])
    monkeypatch.chdir(tmp_path / "there")
    out = tmp_path / "here" / "run"
    draw(out, "--curves", "--page")
    sample.main([str(out), "2"])
    assert okd_train.load_generator(out / "G1.pt")(torch.randn(2, 8)).shape == (2, 3, 32, 32)
    train(out, "--resume", "--steps", "2")
    args = json.loads((out / "args.json").read_text())
    assert args["model"] == "own.py" and args["script"] == str((tmp_path / "here" / "own.py").resolve())
    (tmp_path / "here" / "own.py").rename(tmp_path / "there" / "own.py")            # moved: the name is looked for here
    train(out, "--resume", "--steps", "3")
    assert okd_train.read_lines(out / "log.jsonl")[-1]["step"] == 3


def test_pictures_do_not_train(sagan_run, tmp_path, capsys, monkeypatch):
    for flags in (["--curves", "--steps", "9"], ["--page", "--data", "x"], ["--interpolate", "--resume"],
                  ["--curves", "--sample", "3"], ["--attention-maps", "--seed", "1"], ["--curves", "--g-lr", "1"],
                  ["--curves", "--nproc", "2"]):
        text = refused(capsys, sagan_run, *flags)
        assert "unrecognized arguments: " in text and flags[-1 if flags[-1].startswith("--") else -2] in text
    assert "it must be 2 or more" in refused(capsys, sagan_run, "--interpolate", "1")
    assert "is not a run" in refused(capsys, tmp_path, "--page")
    assert "was trained with sagan" in refused(capsys, sagan_run, "--model", "acgan")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "not with torchrun" in refused(capsys, sagan_run, "--page")


def test_a_file_that_cannot_be_written_is_one_line_and_the_old_one_survives(copied, capsys, monkeypatch):
    draw(copied, "--page")
    old = (copied / "report.html").read_bytes()

    def full(*a):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    for flag, name in FILES.items():
        assert f"cannot write {copied / name}: " in refused(capsys, copied, "--" + flag.replace("_", "-"))
    assert (copied / "report.html").read_bytes() == old
    assert not (copied / "curves.png").exists() and not list(copied.glob(".*"))


def test_a_folder_that_may_not_be_written(copied, capsys):
    (copied / "curves.png").mkdir()
    assert "cannot write" in refused(capsys, copied, "--curves")
    if os.geteuid():
        copied.chmod(0o500)
        assert "cannot write" in refused(capsys, copied, "--page")
        copied.chmod(0o700)


def python(foreign, *argv):
    """Python in a folder whose modules, named like ours and first on the path, stop whoever imports them."""
    foreign.mkdir(exist_ok=True)
    for name in ("okd_train", "fid"):
        (foreign / f"{name}.py").write_text("raise SystemExit('not ours')")
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(foreign))
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=foreign, timeout=120)


def test_as_a_process_and_the_run_still_resumes(copied, tmp_path):
    folder = os.path.dirname(report.__file__)
    code = f"import sys; sys.path.append({folder!r}); import report; report.main(sys.argv[1:])"
    p = python(tmp_path / "foreign", "-c", code, copied, "--curves", "--page")
    assert p.returncode == 0 and not p.stderr and p.stdout.count("Wrote ") == 2, p.stdout + p.stderr
    assert "Comparing 2 x 200 fakes" in p.stdout
    assert not set(FILES) & json.loads((copied / "args.json").read_text())["settings"].keys()
    train(copied, "--resume", "--steps", "5")
    assert okd_train.read_lines(copied / "log.jsonl")[-1]["step"] == 5


def test_a_copied_report_says_what_it_needs(tmp_path):
    (tmp_path / "alone").mkdir()
    script = shutil.copy(report.__file__, tmp_path / "alone")
    p = python(tmp_path / "foreign", script, "runs/x", "--curves")
    assert p.returncode == 2 and not p.stdout
    assert p.stderr == "report.py: error: a report needs okd_train.py beside report.py\n"
    p = python(tmp_path / "foreign", script, "--help")
    assert p.returncode == 0 and not p.stderr
    for text in ("python report.py runs/sagan-3 --curves", "--interpolate [K]", "--attention-maps", "--device",
                 "--model FILE.py"):
        assert text in p.stdout
