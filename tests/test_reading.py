"""From files to pixels, one rule for all scripts: every odd file, ranges of sets, what is found and what is said."""
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import crop_codebrim
import fid
import okd_train
from test_crop_codebrim import add

S = 16                                                              # side of every picture here
R = np.random.default_rng(0)
GREY, RGB = R.integers(0, 256, (S, S)), R.integers(0, 256, (S, S, 3))
GREY[0, :2], RGB[0, :2] = (0, 255), [[0], [255]]
ALPHA = np.where(R.random((S, S)) < 0.5, 255, R.integers(0, 255, (S, S)))
SMOOTH = np.add.outer(np.arange(S) * 8, np.arange(S) * 7)           # survives JPEG
COLOURS = R.integers(0, 256, (16, 3))                               # of a palette


def grey(v):
    return np.repeat(np.asarray(v)[:, :, None], 3, 2)


def raw_png(v, kind, bits):
    """PNG bytes of a depth that Pillow does not write: kind 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    rows = v.reshape(len(v), -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        packed = [np.packbits((row[:, None] >> np.arange(bits)[::-1]) & 1).tobytes() for row in rows]
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", v.shape[1], v.shape[0], bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in packed))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def picture(v, kind=np.uint8):
    """The Pillow image of an array: L, LA, RGB, RGBA by its shape, 16 bits, int32 or floats by kind."""
    return Image.fromarray(np.asarray(v).astype(kind))


def palette(transparent):
    im = picture(GREY % 16)
    im = Image.frombytes("P", im.size, im.tobytes())
    im.putpalette(COLOURS.astype(np.uint8).tobytes())
    im.info.update({"transparency": 3} if transparent else {})
    return im


def frames(first, mode="RGB"):
    others = [Image.new("RGB", (S, S), c) for c in ("red", "blue")]
    return dict(save_all=True, append_images=[o.convert(mode) for o in others])


def exif(k):
    e = Image.Exif()
    e[0x0112] = k
    return e


def turned(a, k):
    """What a viewer shows of stored pixels with EXIF orientation k, from the standard's table."""
    a = a.transpose(1, 0, 2) if k in (5, 6, 7, 8) else a            # 5..8: rows and columns change places
    a = a[::-1] if k in (3, 4, 7, 8) else a
    return a[:, ::-1] if k in (2, 3, 6, 7) else a


def cmyk():
    c, m, y, k = (RGB[:, :, 0], RGB[:, :, 1], RGB[:, :, 2], GREY // 2)
    left = 255 - k
    want = np.stack([left - np.floor(ink * left / 255 + 0.5) for ink in (c, m, y)], 2)
    return Image.frombytes("CMYK", (S, S), np.stack([c, m, y, k], 2).astype(np.uint8).tobytes()), want


def bmp565():
    """(file of 16 bits a pixel, 5 or 6 a colour, its pixels)."""
    masks, lit = (0xF800, 0x07E0, 0x001F), RGB > 127
    pixels = (lit * np.array(masks)).sum(2)[::-1].astype("<u2").tobytes()            # the lowest row comes first
    header = struct.pack("<IiiHHIIiiII", 40, S, S, 1, 16, 3, len(pixels), 2835, 2835, 0, 0)
    start = b"BM" + struct.pack("<IHHI", 66 + len(pixels), 0, 0, 66)
    return start + header + struct.pack("<3I", *masks) + pixels, 255 * lit


def table():
    """(file name, what is written: bytes or (image, settings), expected pixels, tolerance, word that is said)."""
    wide, wide_rgb = GREY * 257, RGB * 257 + R.integers(-100, 100, RGB.shape).clip(-RGB, 255 - RGB)
    f = GREY / 255
    rgb, la = picture(RGB), np.stack([GREY, ALPHA], 2)
    rows = [
        ("1.png", (picture(GREY % 2 * 255).convert("1"), {}), grey(GREY % 2 * 255), ""),
        *((f"grey{b}.png", raw_png(GREY >> 8 - b, 0, b), grey((GREY >> 8 - b) * (255 // (2 ** b - 1))), "")
          for b in (1, 2, 4)),
        ("8.png", (picture(GREY), {}), grey(GREY), ""), ("8.pgm", (picture(GREY), {}), grey(GREY), ""),
        ("8.gif", (picture(GREY), {}), grey(GREY), ""),
        ("8.jpe", (picture(SMOOTH), {"quality": 100}), grey(SMOOTH), ""),
        ("8.jfif", (picture(grey(SMOOTH)), {"quality": 100, "subsampling": 0}), grey(SMOOTH), ""),
        *((f"{b}in16.png", (picture(GREY * 2 ** (b - 8) + GREY // 2 ** (16 - b), np.uint16), {}), grey(GREY),
           f"{2 ** b - 1} as white") for b in (8, 10, 12, 14, 16)),
        ("shifted.png", (picture(GREY << 8, np.uint16), {}), grey(GREY), "65535 as white"),
        ("12.tif", (picture(GREY * 16, np.uint16), {}), grey(GREY), "4095 as white"),
        ("12.pgm", b"P5\n16 16\n4095\n" + (GREY * 16 + 7).astype(">u2").tobytes(), grey(GREY), "65535 as white"),
        ("int8.tif", (picture(GREY, np.int32), {}), grey(GREY), "255 as white"),
        ("int16.tif", (picture(wide, np.int32), {}), grey(GREY), "65535 as white"),
        *((f"float{k}.tif", (picture(v, np.float32), {}), grey(GREY), f"{low} is read as black, {high} as white")
          for k, (v, low, high) in enumerate([(f, 0, 1), (f * 2 - 1, -1, 1), (f * 255, 0, 255), (f * 4095, 0, 4095)])),
        ("overshoot.tif", (picture(f * 1.1 - 0.05, np.float32), {}), grey(np.rint((f * 1.1 - 0.05).clip(0, 1) * 255)),
         "1 as white"),
        ("565.bmp", *bmp565(), ""),
        ("palette.png", (palette(False), {}), COLOURS[GREY % 16], ""),
        ("palette.gif", (palette(False), {}), COLOURS[GREY % 16], ""),
        ("hole.png", (palette(True), {"transparency": 3}), COLOURS[GREY % 16], "1 images have transparent pixels"),
        ("cmyk.tif", (cmyk()[0], {}), cmyk()[1], ""),
        ("la.png", (picture(la), {}), grey(GREY), "1 images have transparent pixels"),
        ("rgba.png", (picture(np.dstack([RGB, ALPHA])), {}), RGB, "transparent"),
        ("rgba.webp", (picture(np.dstack([RGB, ALPHA | 128])), {"lossless": True}), RGB,
         "transparent"),
        ("opaque.png", (rgb.convert("RGBA"), {}), RGB, ""),
        ("rgb16.png", raw_png(wide_rgb, 2, 16), wide_rgb >> 8, "1 images have 16 bits per colour"),
        ("rgba16.png", raw_png(np.dstack([wide_rgb, 65535 + 0 * GREY]), 6, 16), wide_rgb >> 8, "16 bits per colour"),
        ("la16.png", raw_png(np.dstack([wide, 65535 + 0 * GREY]), 4, 16), grey(GREY), "16 bits per colour"),
        ("dim16.png", raw_png(wide_rgb >> 4, 2, 16), wide_rgb >> 12, "reaches 5.88 % of white; save them with 8 bits"),
        ("moving.gif", (palette(False), frames("P")), COLOURS[GREY % 16], "1 images hold several pages or frames"),
        ("moving.webp", (rgb, {"lossless": True, **frames("RGB")}), RGB, "several"),
        ("moving.png", (rgb, frames("RGB")), RGB, "several"),
        ("pages.tiff", (rgb, frames("RGB")), RGB, "several"),
        ("mpo.jpg", (picture(grey(SMOOTH)), {"format": "MPO", "quality": 100, "subsampling": 0, **frames("RGB")}),
         grey(SMOOTH), ""),
        *((f"exif{k}.png", (rgb, {"exif": exif(k)}), RGB, "as they are stored" if k > 1 else "") for k in range(1, 9)),
        *((f"turned{k}.tif", (rgb, {"exif": exif(k)}), turned(RGB, k), "") for k in range(1, 9)),   # by Pillow itself
        ("exif6.jpg", (picture(grey(SMOOTH)), {"exif": exif(6), "quality": 100, "subsampling": 0}), grey(SMOOTH),
         "1 images are read as they are stored"),
        ("exif9.png", (rgb, {"exif": exif(9)}), RGB, ""),
        ("exif.png", (rgb, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"}), RGB, ""),      # cut
    ]
    return {name: (*rest, 3 if name.endswith(("jpg", "jpe", "jfif")) else 0) for name, *rest in rows}


TABLE = table()


def write(path, what):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        image, settings = what
        form = {".jfif": "JPEG", ".jpe": "JPEG"}.get(path.suffix)
        image.save(path, **{"format": form, **settings} if form else settings)
    return path


def all_three(folder, path, **how):
    """[(pixels, lines that were said)] by fid.py, okd_train.py and crop_codebrim.py, of a folder with one image."""
    rule = fid.rule_for([path], **how)
    pixels, odd = fid.read_image(path, rule)
    said, notes = [], []
    images, *_ = okd_train.load_folder(folder, S, False, False, said.append, **how)
    (row, crop), = crop_codebrim.crops(folder, n=1, size=S, notes=notes, **how)
    lines = list(fid.rule_notes(rule, [odd]))
    assert [line.removeprefix(f"{folder}: ").removesuffix(".") for line in said] == lines == notes
    return [(pixels, lines), (images[0].numpy().transpose(1, 2, 0), said), (crop, notes)]


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_every_script_gives_the_same_pixels_of_every_odd_file(tmp_path, name):
    what, want, words, near = TABLE[name]
    path = write(tmp_path / "images" / name, what)
    (tmp_path / "annotations").mkdir()
    box = (f"<annotation><object><name>Crack</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{S}</xmax><ymax>{S}</ymax>"
           "</bndbox></object></annotation>")
    (tmp_path / "annotations" / f"{path.stem}.xml").write_text(box)
    for pixels, lines in all_three(tmp_path, path):
        assert pixels.dtype == np.uint8 and pixels.shape == (S, S, 3)
        assert np.abs(pixels.astype(int) - want).max() <= near
        assert bool(lines) == bool(words) and words in " ".join(lines)
    if name.startswith("exif"):
        k = int(path.stem[4:] or 1)
        for pixels, lines in all_three(tmp_path, path, upright=True):
            assert np.abs(pixels.astype(int) - turned(want, k if k < 9 else 1)).max() <= near
            assert bool(lines) == bool(words) and (not words or "turned upright" in lines[0])


def test_the_rule_stands_twice_and_is_the_same():
    """Both files can be copied alone."""
    start, text = "# From here to the next line across", []
    for module in (fid, crop_codebrim):
        text.append(Path(module.__file__).read_text().split(start)[1].split("# ----")[0].rstrip())
    assert text[0] == text[1] and "def eight_bits" in text[0]


# ---------------------------------------------------------------------------------------------- one range for a set
def tiffs(folder, *arrays, kind=np.uint16):
    """A file for each array, spread over two class folders."""
    for k, v in enumerate(arrays):
        write(folder / "ab"[k % 2] / f"{k}.tif", (picture(v, kind), {}))
    return sorted(folder.rglob("*.tif"))


def read_all(folder, **how):
    """The grey pixels of a folder by okd_train.py, which are those of fid.py, and the lines that were said."""
    said, paths = [], [path for path, _ in fid.class_images(folder)]
    images, _, _ = okd_train.load_folder(folder, S, True, False, said.append, **how)
    rule = fid.rule_for(paths, **how)
    for image, path in zip(images, paths):
        assert np.array_equal(image.permute(1, 2, 0), fid.read_image(path, rule)[0])
    return images[:, 0].numpy(), " ".join(said)


def test_all_images_of_a_set_are_read_by_one_range(tmp_path):
    """Dark ones stay darker than others, whatever they hold, and a constant image gets its own tone."""
    pixels, said = read_all(tiffs(tmp_path / "bits", GREY * 16, GREY // 4, 0 * GREY + 2048)[0].parent.parent)
    assert np.array_equal(pixels, [GREY, 0 * GREY + 128, GREY // 64])           # 0.tif and 2.tif are in a/
    assert "3 images have 16 bits or floats: 0 is read as black, 4095 as white" in said and "warning" not in said
    tiffs(tmp_path / "floats", GREY, 0 * GREY + 1, kind=np.float32)             # 1.0 means white only by itself
    assert np.array_equal(read_all(tmp_path / "floats")[0], [GREY, 0 * GREY + 1])
    signed = GREY / 255 * 2 - 1
    tiffs(tmp_path / "signed", signed, np.abs(signed), kind=np.float32)
    assert np.array_equal(read_all(tmp_path / "signed")[0], [GREY, np.rint((np.abs(signed) + 1) * 127.5)])


def test_a_file_outside_the_range_of_its_set_is_named(tmp_path):
    tiffs(tmp_path, GREY * 257, GREY * 257, GREY * 275, kind=np.int32)
    with pytest.raises(okd_train.UserError, match="1 of 3 images cannot be read: .*2.tif .*from 0 to 70125, outside"):
        okd_train.load_folder(tmp_path, S, True, False, print)


def test_a_declared_range_is_taken_as_it_is(tmp_path):
    hounsfield = GREY * 16 - 1024                                               # of a CT: -1024..3056
    tiffs(tmp_path, hounsfield, hounsfield // 2, kind=np.int32)
    with pytest.raises(okd_train.UserError, match="2 of 2 images cannot be read.*--range LOW HIGH"):
        read_all(tmp_path)
    pixels, said = read_all(tmp_path, limits=(-1024, 3071))
    want = [(v + 1024) * 256 // 4095 for v in (hounsfield, hounsfield // 2)]
    assert np.array_equal(pixels, np.clip(want, 0, 255)) and "-1024 is read as black, 3071 as white" in said
    hounsfield[0, 0] = 2 ** 31 - 1
    tiffs(tmp_path, hounsfield, hounsfield, kind=np.int32)
    pixels, said = read_all(tmp_path, limits=(0, 1))                            # HIGH itself is white, and all above
    assert np.array_equal(pixels[0], 255 * (hounsfield > 0)) and "reaches 2.15e+11 % of white" in said
    write(tmp_path / "flat" / "a" / "x.png", (picture(GREY), {}))
    write(tmp_path / "flat" / "b" / "y.png", (picture(GREY), {}))
    pixels, said = read_all(tmp_path / "flat", limits=(0, 1))
    assert np.array_equal(pixels, [GREY, GREY]) and "--range has no effect" in said


@pytest.mark.parametrize("v,kind,percent", [(GREY % 2, np.uint16, "0.392"), (GREY * 65, np.int32, "25.3"),
                                            (GREY / 128, np.float32, "0.781"), (GREY * 0, np.uint16, "0")])
def test_sets_that_are_far_below_white_are_warned_of(tmp_path, v, kind, percent):
    tiffs(tmp_path, v, v, kind=kind)
    assert f"warning: the brightest pixel of them all reaches {percent} % of white; --range" in read_all(tmp_path)[1]


def test_integers_and_floats_in_one_set_are_refused(tmp_path):
    tiffs(tmp_path, GREY * 257)
    write(tmp_path / "b" / "f.tif", (picture(GREY / 255, np.float32), {}))
    for read in (lambda: read_all(tmp_path), lambda: fid.rule_for(sorted(tmp_path.rglob("*.tif")))):
        with pytest.raises((okd_train.UserError, fid.FidError), match="whole numbers and of floats in one set"):
            read()
    for k, v in enumerate((picture(GREY, np.uint16), picture(GREY / 255, np.float32))):
        add(tmp_path / "photos", f"{k}", [(1, 1, S, S, "Crack")], (S, S), suffix=".tif", image=v)
    with pytest.raises(crop_codebrim.CropError, match="whole numbers and of floats"):
        next(crop_codebrim.crops(tmp_path / "photos", n=1, size=S))


def test_crops_are_read_by_the_range_of_all_photos(tmp_path):
    for k, v in enumerate((GREY * 16, GREY // 4)):
        add(tmp_path, f"{k}", [(1, 1, S, S, "Crack")], (S, S), suffix=".tif", image=picture(v, np.uint16))
    got = {row["photo"]: image for row, image in crop_codebrim.crops(tmp_path, n=2, size=S)}
    assert np.array_equal(got["images/0.tif"], grey(GREY)) and np.array_equal(got["images/1.tif"], grey(GREY // 64))
    got = {row["photo"]: image for row, image in crop_codebrim.crops(tmp_path, n=2, size=S, limits=(0, 65535))}
    assert np.array_equal(got["images/0.tif"], grey(GREY // 16))


def test_sets_of_eight_bits_are_opened_and_decoded_once(tmp_path, monkeypatch):
    for k in range(6):
        write(tmp_path / "ab"[k % 2] / f"{k}.png", (picture(RGB), {}))
    loads, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (loads.append(self.tile) or load(self)))
    fid.rule_for(sorted(tmp_path.rglob("*.png")))
    assert not loads
    _, _, _, limits = okd_train.read_folder(tmp_path, S, True, False, print)
    assert sum(bool(tile) for tile in loads) == 6 and limits is None


def test_a_run_keeps_its_range(tmp_path, capsys):
    """The scores' own images, --resume and report.py read by the range of the training images, not by their own."""
    tiny = ["--steps", "1", "--groups", "1", "--batch-size", "4", "--image-size", "16", "--z-dim", "8"]
    script = tmp_path / "tiny.py"
    script.write_text("import torch\nfrom torch import nn\nhparams = dict(image_size=16, z_dim=8, batch_size=4)\n\n\n"
                      "class Generator(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
                      "        self.f = nn.Linear(8, 768)\n\n    def forward(self, z):\n"
                      "        return self.f(z).tanh().view(-1, 3, 16, 16)\n\n\n"
                      "class Discriminator(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
                      "        self.f = nn.Linear(768, 1)\n\n    def forward(self, x):\n"
                      "        return self.f(x.flatten(1))\n")
    tiffs(tmp_path / "d", *[GREY * 16 // (1 + k) for k in range(4)])
    tiffs(tmp_path / "test", *[GREY // 4] * 4)
    argv = ["--model", script, "--data", tmp_path / "d", "--out", tmp_path / "run", "--fid-every", "1", "--fid-data",
            tmp_path / "test", "--fid-features", "random", "--fid-samples", "4", *tiny]
    okd_train.main(list(map(str, argv)))
    assert "0 is read as black, 4095 as white" in capsys.readouterr().out
    saved = okd_train.read_args(tmp_path / "run")
    assert saved["settings"]["range"] == [0, 4095] and saved["settings"]["upright"] is False
    s, script, _ = okd_train.read_run(tmp_path / "run")
    data = okd_train.Data(*okd_train.load_data(s, False, print), s, "cpu")
    scores = okd_train.Scores(s, data, okd_train.pick_device("cpu"))
    assert np.array_equal(scores.images[0, 0], GREY // 64)
    okd_train.main(["--out", str(tmp_path / "run"), "--resume", "--steps", "2"])
    with pytest.raises(SystemExit):
        okd_train.main(["--out", str(tmp_path / "run"), "--resume", "--steps", "3", "--range", "0", "65535"])
    assert "--range is [0, 4095] there and [0.0, 65535.0] here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        okd_train.main(["--data", str(tmp_path / "d"), "--range", "5", "-5", "--out", str(tmp_path / "no")])
    assert "--range is [5.0, -5.0]; it must be two numbers, the first below the second" in capsys.readouterr().err


def test_fid_by_ranges(tmp_path, capsys):
    """Equal images of two depths are 0 apart, sides of two ranges are warned of, --range and --upright reach them."""
    for k in range(3):
        v = GREY // (1 + k)
        write(tmp_path / "flat" / f"{k}.png", (picture(v), {"exif": exif(6)}))
        write(tmp_path / "upright" / f"{k}.png", (picture(np.rot90(v, -1)), {}))
        write(tmp_path / "deep" / f"{k}.tif", (picture(v * 16, np.uint16), {}))
        write(tmp_path / "dark" / f"{k}.tif", (picture(v * 4, np.uint16), {}))

    def score(*argv):
        status = fid.main([*map(str, argv), "--features", "random", "--device", "cpu", "--json"])
        out = capsys.readouterr()
        assert status == 0
        return json.loads(out.out)["rfd"], out.err
    distance, said = score(tmp_path / "flat", tmp_path / "deep")
    assert distance < 1e-9 and "3 images have 16 bits or floats: 0 is read as black, 4095 as white" in said
    assert "flat: 3 images are read as they are stored, though their EXIF says turned (--upright" in said
    distance, said = score(tmp_path / "deep", tmp_path / "dark")
    assert distance < 1e-9 and "read by different ranges, (0, 1023) and (0, 4095)" in said
    distance, said = score(tmp_path / "deep", tmp_path / "dark", "--range", "0", "4095")
    assert distance > 1e-3 and "different ranges" not in said
    assert score(tmp_path / "flat", tmp_path / "upright")[0] > 1e-3
    distance, said = score(tmp_path / "flat", tmp_path / "upright", "--upright")
    assert distance < 1e-9 and "3 images are turned upright" in said
    assert fid.main([str(tmp_path / "flat"), str(tmp_path / "deep"), "--range", "1", "1"]) == 2
    assert "--range 1 1: the first number must be below the second" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what is found
def photos_in(folder, names, v=RGB):
    for name in names:
        write(folder / name, (picture(v), {}))
    return folder


def told(find, folder):
    said = []
    find(folder, said.append)
    return " ".join(said)


def test_types_that_are_not_read_are_counted_and_hidden_files_are_not(tmp_path):
    photos_in(tmp_path, ["a/1.png", "b/2.png"])
    (tmp_path / "annotations").mkdir()
    for name in ("a/1.heic", "a/2.HEIC", "b/x.svg", "b/notes.txt", "a/._3.heic", "__MACOSX/4.heic",
                 ".ipynb_checkpoints/5.heic", ".ipynb_checkpoints/1-checkpoint.png", "a/._1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    for find in (fid.class_images, fid.find_images):
        text = told(find, tmp_path)
        assert text.startswith(f"{tmp_path}: not read, as their type is not: 2 heic, 1 svg (accepted are bmp gif jfif")
    assert [p.name for p, _ in fid.class_images(tmp_path)] == ["1.png", "2.png"]
    (tmp_path / "annotations" / "1.xml").write_text("<annotation/>")
    _, skipped = crop_codebrim.read_annotations(tmp_path)
    assert sorted(x.reason for x in skipped if "type" in x.reason) == [
        "photo of a type that is not read: heic"] * 2 + ["photo of a type that is not read: svg"]
    with pytest.raises(fid.FidError, match="no images.*3 other files, of them images of types that .*: 2 heic"):
        (tmp_path / "only").mkdir()
        for name in ("1.heic", "2.heic", "notes.txt"):
            (tmp_path / "only" / name).write_bytes(b"?")
        fid.class_images(tmp_path / "only")


@pytest.mark.parametrize("folders", [("Train", "Test"), ("training", "validation", "testing"), ("VAL", "test set"),
                                     ("train", "masks", "valid"), ("train2017", "val2017"), ("Training",)])
def test_parts_of_a_data_set_are_no_classes(tmp_path, folders):
    photos_in(tmp_path, [f"{folder}/{k}.png" for folder in folders for k in range(2)])
    first = next((f for f in folders if f.lower().startswith("train")), folders[0])
    for conditional in (True, False):
        with pytest.raises(okd_train.UserError, match=f"name one of them, such as {tmp_path}/{first}"):
            okd_train.class_files(tmp_path, conditional)
    text = told(fid.find_images, tmp_path)                                      # a score of them all may be meant
    assert "are read as one set; name one of them" in text and all(f in text for f in folders if f != "masks")


@pytest.mark.parametrize("folders", [("bus", "car", "train"), ("invalid", "valid"), ("test1", "test2"),
                                     ("Crack", "Rust"), ("control", "test"), ("with_mask", "without_mask"),
                                     ("G1/Crack", "G1/Rust")])
def test_honest_classes_are_silent(tmp_path, folders):
    """Also where all class folders number their files from 0, as sample.py does."""
    photos_in(tmp_path, [f"{folder}/{k:06}.png" for folder in folders for k in range(3)])
    said = []
    okd_train.load_folder(tmp_path, S, False, False, said.append)
    assert said == [] and told(fid.find_images, tmp_path) == ""


@pytest.mark.parametrize("photos,masks", [
    (["images/1.png", "images/2.png"], ["masks/1.png", "masks/2.png"]),
    (["a/images/1.png", "b/images/1.png"], ["a/GT/x.png"]), (["JPEGImages/1.png"], ["SegmentationClass/1.png"]),
    (["Crack/1.png", "Rust/2.png"], ["label/1.png"]), (["images/7.png"], ["crack_masks/7_x.png"]),
    (["benign/1 (1).png", "malignant/2.png"], ["benign/1 (1)_mask.png", "benign/1 (1)_mask_1.png"]),
    (["x/1.png", "x/2.png"], ["x/1.bmp"]), (["left/1.png", "left/2.png"], ["right/1.png", "right/2.png"])])
def test_masks_beside_photos_are_counted(tmp_path, photos, masks):
    photos_in(tmp_path, photos)
    photos_in(tmp_path, masks, GREY % 2 * 255)
    said = []
    okd_train.load_folder(tmp_path, S, False, False, said.append)
    assert len(said) == 1 and f"warning: {len(masks)} of the images look like masks and no photos" in said[0]
    with pytest.warns(UserWarning, match=f"{len(masks)} of the images look like masks"):
        fid.features(tmp_path, features="random", device="cpu")
    for mask in masks:
        (tmp_path / mask).unlink()
    okd_train.load_folder(tmp_path, S, False, False, said.append)
    assert len(said) == 1


def test_flat_photos_and_folders_of_masks_alone_are_no_mixture(tmp_path):
    photos_in(tmp_path, ["masks/1.png", "masks/2.png", "masks/more/1.png"], GREY % 2 * 255)
    for folder in (tmp_path, tmp_path / "masks"):                               # also of stems that occur twice
        said = []
        okd_train.load_folder(folder, S, False, False, said.append)
        assert said == []


def test_real_photos_and_our_own_output_are_silent(tmp_path, shared):
    images = shared / "data" / "neu" / "images"
    for path in sorted(images.iterdir())[::60]:
        folder = tmp_path / "neu" / path.stem.rsplit("_", 1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(path)
    said = []
    okd_train.load_folder(tmp_path / "neu", 200, True, False, said.append)
    crop_codebrim.crop_folder(shared / "data" / "concrete", tmp_path / "crops", n=60)
    okd_train.load_folder(tmp_path / "crops", 64, True, False, said.append)
    assert said == []
