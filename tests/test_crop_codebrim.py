"""crop_codebrim.py: reading of annotations good and bad, windows to the pixel, labels, splits, whole output, cost."""
import collections
import concurrent.futures
import contextlib
import csv
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import crop_codebrim as cc
import synthetic
from crop_codebrim import CropError, crops, read_annotations

FLAGS = ["Background", "Crack", "Spallation", "Efflorescence", "ExposedBars", "CorrosionStain"]


# ---- helpers --------------------------------------------------------------------------------------------------------

def place_photo(width, height, number=0):
    """Every pixel encodes its place: red = x & 255, green = y & 255, blue = x >> 8, y >> 8 and the photo's number."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x & 255, y & 255, (x >> 8) | (y >> 8) << 2 | number << 4], -1).astype(np.uint8)


def xml_of(boxes, size=(300, 200), filename="a.png"):
    """boxes: (xmin, ymin, xmax, ymax, class name, or a tuple of flags)."""
    out = f"<annotation><folder>images</folder><filename>{filename}</filename>"
    if size:
        out += f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    for xmin, ymin, xmax, ymax, label in boxes:
        flags = isinstance(label, (tuple, list))
        out += f"<object><name>{'defect' if flags else label}</name><difficult>0</difficult><bndbox>"
        out += f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"
        if flags:
            out += "<Defect>" + "".join(f"<{f}>{int(f in label)}</{f}>" for f in FLAGS) + "</Defect>"
        out += "</object>"
    return out + "</annotation>"


def add(root, name, boxes, size=(300, 200), number=0, suffix=".png", xml_size=True, image=None, **save):
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(place_photo(*size, number)) if image is None else image
    image.save(root / "images" / f"{name}{suffix}", **save)
    text = xml_of(boxes, size if xml_size else None, f"{name}{suffix}")
    (root / "annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    return root / "images" / f"{name}{suffix}"


def reasons(skipped):
    return collections.Counter(s.reason for s in skipped)


def cut_all(root, **choices):
    return list(crops(str(root), **choices))


def run(*args, code=0, script=cc.__file__, **kw):
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, **kw)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def call(capsys, *args, code=0):
    """As run(), in this process: (stdout, stderr)."""
    assert cc.main([str(a) for a in args]) == code
    return capsys.readouterr()


def tree(folder):
    """{relative name: bytes} of all files below folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def table(folder):
    with open(Path(folder) / "crops.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.fixture
def bridge(tmp_path):
    """Twelve photos of 300x200, the five classes, boxes of one to three flags, one with a short side."""
    root = tmp_path / "original_dataset"
    kinds = [("Crack",), ("Crack",), ("Spallation", "ExposedBars", "CorrosionStain"), ("Efflorescence",),
             ("CorrosionStain",), ("Spallation",)]
    for k in range(12):
        boxes = [(1, 1, 150, 120, kinds[k % 6]), (120, 80, 300, 200, kinds[(k + 1) % 6]),
                 (10, 150, 90, 180, kinds[k % 5])]
        add(root, f"image_{k + 1:07d}", boxes, number=k)
    return root


# ---- alone -----------------------------------------------------------------------------------------------------------
def test_import_is_cheap_and_brings_no_torch():
    code = ("import sys, crop_codebrim\n"
            "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'scipy', 'triton', 'synthetic')])")
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True,
                          cwd=Path(cc.__file__).parent)
    assert done.stdout.strip() == "[]"
    own = [line for line in done.stderr.splitlines() if line.endswith("| crop_codebrim")]
    assert int(own[0].split("|")[0].split(":")[1]) < 200_000           # microseconds, without NumPy's and Pillow's


def test_copied_alone_it_crops(tmp_path):
    (tmp_path / "copied").mkdir()
    script = shutil.copy(cc.__file__, tmp_path / "copied")
    add(tmp_path / "photos", "a", [(1, 1, 150, 120, "Crack"), (120, 80, 300, 200, ("Spallation", "ExposedBars"))])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run("../photos", "crops", "--n", 6, script=script, cwd=tmp_path / "copied", env=env)
    rows = table(tmp_path / "copied/crops")
    assert [r["class"] for r in rows] == ["Crack"] * 3 + ["ExposedBars"] * 3
    whole = place_photo(300, 200)
    for r in rows:
        x, y = int(r["x"]), int(r["y"])
        with Image.open(tmp_path / "copied/crops" / r["file"]) as crop:
            assert np.array_equal(np.asarray(crop), whole[y:y + 64, x:x + 64])
    assert {p.name for p in (tmp_path / "copied").iterdir()} - {"__pycache__"} == {"crop_codebrim.py", "crops"}


def test_rendering_has_left(tmp_path):
    for flags in (["--demo", tmp_path / "d"], [tmp_path, tmp_path / "c", "--photos", 3]):
        assert run(*flags, code=2).stderr.startswith("crop_codebrim.py: error: unrecognized arguments: --")
    assert "python synthetic.py original_dataset/" in run(code=2).stderr


# ---- reading --------------------------------------------------------------------------------------------------------

CODEBRIM = """<?xml version='1.0' encoding='UTF-8'?>
<annotation>
\t<folder>images</folder>
\t<filename>image_0000028.jpg</filename>
\t<size>\n\t\t<width>300</width>\n\t\t<height>200</height>\n\t\t<depth>3</depth>\n\t</size>
\t<object>
\t\t<name>defect</name>
\t\t<difficult>0</difficult>
\t\t<bndbox>\n\t\t\t<xmin>1</xmin>\n\t\t\t<ymin>1</ymin>\n\t\t\t<xmax>97</xmax>\n\t\t\t<ymax>103</ymax>\n\t\t</bndbox>
\t\t<Defect>\n<Background>0</Background><Crack>0</Crack><Spallation>0</Spallation><Efflorescence>1</Efflorescence>
<ExposedBars>0</ExposedBars><CorrosionStain>1</CorrosionStain></Defect>
\t</object>
</annotation>
"""


def test_reads_codebrim(tmp_path):
    add(tmp_path, "image_0000028", [], suffix=".jpg")
    (tmp_path / "annotations/image_0000028.xml").write_text(CODEBRIM)
    photos, skipped = read_annotations(tmp_path)
    assert skipped == [] and len(photos) == 1
    p = photos[0]
    assert (p.name, p.width, p.height) == ("images/image_0000028.jpg", 300, 200)
    assert p.boxes == (cc.Box(0, 0, 0, 97, 103, ("CorrosionStain", "Efflorescence")),)


def test_reads_by_tag_name_in_any_order(tmp_path):
    add(tmp_path, "a", [])
    (tmp_path / "annotations/a.xml").write_text(
        "<annotation verified='no'><path>C:\\x\\a.png</path><object>"
        "<Defect><CorrosionStain>0</CorrosionStain><Honeycombing>1</Honeycombing><Crack>1</Crack></Defect>"
        "<bndbox><ymax>90</ymax><xmax>80.4</xmax><occluded>0</occluded><ymin>20</ymin><xmin>9.5</xmin></bndbox>"
        "<pose/><name>defect</name></object>"
        "<size><depth>1</depth><height>200</height><width>300</width></size><filename>zzz</filename></annotation>")
    photos, _ = read_annotations(tmp_path)
    assert photos[0].boxes == (cc.Box(0, 9, 19, 80, 90, ("Crack", "Honeycombing")),)      # 9.5 -> 10, 80.4 -> 80


@pytest.mark.parametrize("box, reason", [
    ((90, 10, 80, 90, "Crack"), "box that ends before it begins"),
    ((10, 90, 80, 20, "Crack"), "box that ends before it begins"),
    ((10, 10, 80, 90, ()), "box without any flag set"),
    ((301, 10, 380, 90, "Crack"), "box outside its photo"),
    ((-50, 10, 0, 90, "Crack"), "box outside its photo"),
    (("", 10, 80, 90, "Crack"), "box whose coordinates cannot be read"),
    (("nan", 10, 80, 90, "Crack"), "box whose coordinates cannot be read"),
    (("1e5", 10, 80, 90, "Crack"), "box that ends before it begins"),
    (("1e999", 10, 80, 90, "Crack"), "box whose coordinates cannot be read"),
    (("1_0", 10, 80, 90, "Crack"), "box whose coordinates cannot be read"),
    ((".", 10, 80, 90, "Crack"), "box whose coordinates cannot be read"),
    (("9" * 5000, 10, 80, 90, "Crack"), "box whose coordinates cannot be read"),
    ((10, 10, 80, 90, ""), "box without a class"),
    ((10, 10, 80, 90, ("Background", "Crack")), "box that is Background and defect at once"),
    ((10, 10, 80, 90, ("Background",)), "box of Background (see --background)"),
])
def test_unusable_boxes_are_counted_and_skipped(tmp_path, box, reason):
    add(tmp_path, "a", [box, (10, 10, 100, 90, "Spallation")])
    photos, skipped = read_annotations(tmp_path)
    assert reasons(skipped) == {reason: 1} and skipped[0].where == "annotations/a.xml object 0"
    assert [b.index for b in photos[0].boxes] == [1]                   # the number of a box is its place in the XML
    assert len(cut_all(tmp_path, n=3)) == 3


def test_every_class_gets_a_folder(tmp_path):
    """The folder is safe on every system, crops.csv has the class as it was written."""
    names = ["../../evil", "/etc/x", "a\\b", "..", ".hidden", "CON", "nul.txt", "train", "test", "Val", "crops.csv",
             "x" * 200, "a:b", "a;b", "a_b", "end.", "=cmd()", "-1", "+x", "@y", "Crack"]
    for k, name in enumerate(names):
        add(tmp_path / "d", f"p{k}", [(1, 1, 90, 90, name)], size=(100, 100))
    assert cc.main([str(tmp_path / "d"), str(tmp_path / "c"), "--n", "42", "--balance"]) == 0
    rows = table(tmp_path / "c")
    folder = {r["class"].lstrip("'"): r["file"].split("/")[0] for r in rows}
    assert set(folder) == set(names) and len({f.lower() for f in folder.values()}) == len(names)
    assert folder["Crack"] == "Crack" and folder["test"] == "class_test" and folder["a:b"] != folder["a_b"]
    for f in folder.values():
        assert len(f) <= 100 and not f.startswith((".", "=", "+", "-", "@")) and not f.endswith((".", " "))
        assert f.lower().split(".")[0] not in ("con", "nul", "train", "val", "test")
    assert all((tmp_path / "c" / r["file"]).is_file() for r in rows)
    assert {p.name for p in tmp_path.iterdir()} == {"d", "c"}


BNDBOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>90</xmax><ymax>90</ymax></bndbox>"


@pytest.mark.parametrize("text, reason", [
    ("<object><name>Crack</name></object>", "box without coordinates"),
    (f"<object><name>Crack</name>{BNDBOX.replace('<ymin>', '<xmin>2</xmin><ymin>')}</object>", "<xmin> given twice"),
    (f"<object><name>Crack</name>{BNDBOX.replace('<ymax>90</ymax>', '')}</object>",
     "box whose coordinates cannot be read"),
    (f"<object><name>defect</name>{BNDBOX}<Defect><Crack>yes</Crack></Defect></object>",
     "box with a flag that is neither 0 nor 1"),
    (f"<object><name>defect</name>{BNDBOX}<Defect/></object>", "box without any flag set"),
])
def test_malformed_objects(tmp_path, text, reason):
    add(tmp_path, "a", [])
    (tmp_path / "annotations/a.xml").write_text(f"<annotation>{text}</annotation>")
    photos, skipped = read_annotations(tmp_path)
    assert photos == [] and reasons(skipped) == {reason: 1, "photo without a usable box": 1}


def test_boxes_are_clipped_to_the_photo(tmp_path):
    add(tmp_path, "a", [(-20, 0, 100, 999, "Crack"), (200, 101, 300, 200, "Crack")])
    boxes = read_annotations(tmp_path)[0][0].boxes
    assert boxes[0][1:5] == (0, 0, 100, 200) and boxes[1][1:5] == (199, 100, 300, 200)


def test_one_object_per_label_on_one_box_is_one_box(tmp_path):
    labels = [(90, "Crack"), (90, "Spallation"), (90, "Crack"), (91, "Crack")]
    add(tmp_path, "a", [(1, 1, xmax, 90, label) for xmax, label in labels])
    photos, skipped = read_annotations(tmp_path)
    assert [(b.index, b.flags) for b in photos[0].boxes] == [(0, ("Crack", "Spallation")), (3, ("Crack",))]
    assert reasons(skipped) == {"box given again (its labels joined to the first)": 2}
    assert all(r["Spallation"] == (r["box"] == 0) for r, _ in cut_all(tmp_path, n=4))


BODY = xml_of([(1, 1, 90, 90, "Riß")], filename="a.png")


@pytest.mark.parametrize("data", [
    b"\xef\xbb\xbf<?xml version='1.0' encoding='UTF-8'?>" + BODY.encode(),
    ("<?xml version='1.0' encoding='UTF-16'?>" + BODY).encode("utf-16"),
    b"\xfe\xff" + ("<?xml version='1.0' encoding='utf-16'?>" + BODY).encode("utf-16-be"),
    BODY.encode("utf-16-le"),
    ("<?xml version=\"1.0\" encoding=\"ISO-8859-1\"?>" + BODY).encode("latin-1"),
    ("<?xml version=\"1.0\" encoding=\"windows-1252\" standalone='yes'?>\n" + BODY).encode("cp1252"),
    ("<?xml version=\"1.0\" encoding=\"utf-16\"?>" + BODY).encode(),       # .NET strings saved as UTF-8
    ("\n\n <?xml version='1.0'?>" + BODY).encode(),
], ids=["utf8-bom", "utf16", "utf16be", "utf16le-no-bom", "latin1", "cp1252", "wrong-declaration", "leading-lines"])
def test_encodings(tmp_path, data):
    add(tmp_path, "a", [])
    (tmp_path / "annotations/a.xml").write_bytes(data)
    photos, skipped = read_annotations(tmp_path)
    assert skipped == [] and photos[0].boxes[0].flags == ("Riß",)


DOCTYPE = "<!DOCTYPE annotation [<!ENTITY a 'Crack'>]>"


@pytest.mark.parametrize("data, reason", [
    ((DOCTYPE + BODY).encode(), "XML with DOCTYPE or ENTITY"),
    ((DOCTYPE + BODY).encode("utf-16"), "XML with DOCTYPE or ENTITY"),
    ((DOCTYPE.lower() + BODY).encode(), "XML with DOCTYPE or ENTITY"),
    (("<?xml version='1.0'?>\n<!-- x --><! DOCTYPE x>" + BODY).encode(), "XML with DOCTYPE or ENTITY"),
    (b"<?xml version='1.0' encoding='utf-7'?>" + (DOCTYPE + BODY).encode("utf-7"), None),
    (b"\x4c\x6f\xa7\x94\x93" + (DOCTYPE + BODY).encode("cp037", "replace"), None),
    (b"", "empty XML"), (b"  \n", "empty XML"), (b"\0" * 900, None), (os.urandom(900), None),
    (BODY.encode()[:-20], "XML that cannot be parsed"),
    (b"<annotation>&a;</annotation>", "XML that cannot be parsed"),
    (b"<?xml version='1.0' encoding='no-such'?>" + BODY.encode(), "XML that cannot be parsed"),
    (b"<?xml version='1.0' encoding='hex'?>" + BODY.encode(), "XML that cannot be parsed"),
    (b"<html><body/></html>", "XML that is no VOC annotation"),
    (b"<annotation/>", None),
    (b"<annotation><filename>a.png</filename><Object>" + BNDBOX.encode() + b"</Object></annotation>", None),
    (b"<annotation>" + b"<a>" * 200_000 + b"</a>" * 200_000 + b"</annotation>", None),
], ids=["doctype", "doctype-utf16", "doctype-lower", "doctype-spaced", "doctype-utf7", "doctype-ebcdic", "empty",
        "blank", "zeros", "noise", "cut-off", "entity", "unknown-encoding", "codec", "html", "bare",
        "elsewhere", "deep"])
def test_bad_xml_is_skipped(tmp_path, data, reason):
    add(tmp_path, "good", [(1, 1, 90, 90, "Crack")])
    add(tmp_path, "a", [])
    (tmp_path / "annotations/a.xml").write_bytes(data)
    photos, skipped = read_annotations(tmp_path)
    assert [p.name for p in photos] == ["images/good.png"]
    assert [s.where for s in skipped] == ["annotations/a.xml", "images/a.png"]
    assert reason is None or skipped[0].reason == reason
    assert skipped[1].reason == "photo whose annotation cannot be used"


def test_doctype_never_reaches_the_parser(tmp_path, monkeypatch):
    monkeypatch.setattr(cc.ElementTree, "fromstring", lambda text: pytest.fail("parsed"))
    for encoding in ("utf-8", "utf-16", "utf-16-le"):
        (tmp_path / "a.xml").write_bytes((DOCTYPE + BODY).encode(encoding))
        with pytest.raises(cc.Unusable, match="DOCTYPE"):
            cc.parse_xml(tmp_path / "a.xml")


def test_a_photo_is_found_by_stem_then_by_filename(tmp_path):
    add(tmp_path, "ü ber 1", [(1, 1, 90, 90, "Crack")], suffix=".PNG")
    add(tmp_path, "by_name", [(1, 1, 90, 90, "Crack")])
    ann = tmp_path / "annotations"
    (ann / "by_name.xml").rename(ann / "other.xml")
    for k, filename in enumerate(["C:\\Users\\me\\n1.png", "/home/me/n2.png", "../../n3.png", "n4"]):
        add(tmp_path, f"n{k + 1}", [])
        (ann / f"n{k + 1}.xml").unlink()
        (ann / f"renamed{k}.xml").write_text(xml_of([(1, 1, 90, 90, "Crack")], filename=filename))
    (ann / "ü ber 1.xml").write_text(xml_of([(1, 1, 90, 90, "Crack")], filename="camera.png"), encoding="utf-8")
    (ann / "ü ber 1.xml").rename(ann / (unicodedata.normalize("NFD", "ü ber 1") + ".XML"))       # as macOS unpacks it
    photos, skipped = read_annotations(tmp_path)
    names = ("by_name.png", "n1.png", "n2.png", "n3.png", "n4.png", "ü ber 1.PNG")
    assert sorted(p.name for p in photos) == sorted(f"images/{n}" for n in names), skipped
    assert len(cut_all(tmp_path, n=12)) == 12


def test_names_never_leave_the_tree(tmp_path):
    root = tmp_path / "data"
    add(root, "good", [(1, 1, 90, 90, "Crack")])
    secret = tmp_path / "secret.png"
    Image.fromarray(place_photo(300, 200)).save(secret)
    for k, filename in enumerate(["../secret.png", "../../secret.png", str(secret), "..", "", "good.png\0.jpg"]):
        text = xml_of([(1, 1, 90, 90, "Crack")], filename=filename.replace("\0", "%00"))
        (root / "annotations" / f"x{k}.xml").write_text(text)
    photos, skipped = read_annotations(root)
    assert [p.name for p in photos] == ["images/good.png"]
    assert reasons(skipped) == {"annotation without a photo": 6}


def test_macos_forks_hidden_files_and_nested_folders(tmp_path):
    add(tmp_path, "a", [(1, 1, 90, 90, "Crack")])
    for fork in ("__MACOSX/annotations/a.xml", "annotations/._a.xml", "images/._a.png", ".trash/a.xml",
                 "__MACOSX/images/a.png"):
        (tmp_path / fork).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / fork).write_bytes(b"\0\5\x16\7")
    photos, skipped = read_annotations(tmp_path)
    assert len(photos) == 1 and skipped == []


def test_photos_of_one_stem(tmp_path):
    """The same name in two folders: each XML takes the photo of its own folder, or of images/ for annotations/."""
    for part, number in (("north", 1), ("south", 2)):
        add(tmp_path / part, "a", [(1, 1, 90, 90, "Crack")], number=number)
    photos, skipped = read_annotations(tmp_path)
    assert [p.name for p in photos] == ["north/images/a.png", "south/images/a.png"] and skipped == []
    rows = cut_all(tmp_path, n=20)
    assert len({r["file"].casefold() for r, _ in rows}) == 20          # two photos called a, no crop lost
    for r, image in rows:
        assert (image[0, 0, 2] >> 4) == (1 if r["photo"].startswith("north") else 2)
    add(tmp_path / "east", "b", [(1, 1, 90, 90, "Crack")], suffix=".jpg")
    add(tmp_path / "east", "b", [(1, 1, 90, 90, "Crack")], suffix=".png")     # <filename> tells b.png from b.jpg
    assert [p.name for p in read_annotations(tmp_path / "east")[0]] == ["images/b.png"]
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "north/annotations/a.xml", tmp_path / "elsewhere/a.xml")
    found = next(s for s in read_annotations(tmp_path)[1] if s.what == "annotation")
    assert found == ("annotation", "elsewhere/a.xml (north/images/a.png, south/images/a.png)",
                     "annotation that fits several photos")


def photo_at(root, name, number=0, size=(100, 80), image=None, **save):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(place_photo(*size, number)) if image is None else image).save(root / name, **save)


def text_at(root, name, text):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def voc_at(root, name, filename, *boxes, size=(100, 80)):
    text_at(root, name, xml_of(boxes or [(1, 1, 90, 70, "Crack")], size, filename))


def test_annotations_of_one_photo_are_joined(tmp_path):
    photo_at(tmp_path, "images/1.png", size=(300, 200))
    voc_at(tmp_path, "labels/defect/1.xml", "1.png", (1, 1, 90, 90, "Crack"), size=(300, 200))
    voc_at(tmp_path, "labels/insulator/1.xml", "1.png", (201, 1, 300, 200, "Insulator"), (1, 1, 90, 90, "Old"),
           size=(300, 200))
    photo, = read_annotations(tmp_path)[0]
    assert [(b.index, b.flags) for b in photo.boxes] == [(0, ("Crack", "Old")), (1, ("Insulator",))]
    for r, _ in cut_all(tmp_path, n=4, background=200):
        assert r["class"] != "Background" or r["x"] + 64 <= 200 and (r["x"] >= 90 or r["y"] >= 90)
    text_at(tmp_path, "labels/insulator/1.xml", "<annotation>")        # now its boxes lie nobody knows where
    photos, skipped = read_annotations(tmp_path)
    assert len(photos[0].boxes) == 1 and reasons(skipped) == {"XML that cannot be parsed": 1}
    with pytest.raises(CropError, match="1 windows without a defect wanted, 0 distinct ones exist"):
        cut_all(tmp_path, n=4, background=1)


TIE = "annotation that fits several photos"
OTHER = "annotation that names another photo than the one called like it"
AWAY = "annotation without a photo beside it (one of that name lies elsewhere)"


@pytest.mark.parametrize("pictures, xmls, wanted", [
    # {annotation: <filename>} and {annotation: its photo, or why it has none}
    (["JPEGImages/a.jpg", "AnnotationsVisualization/a.jpg", "SegmentationClassPNG/a.png"],
     {"Annotations/a.xml": "a.png"}, {"Annotations/a.xml": "JPEGImages/a.jpg"}),
    (["images/a.jpg", "annotations/trimaps/a.png"], {"annotations/xmls/a.xml": "a.jpg"},
     {"annotations/xmls/a.xml": "images/a.jpg"}),
    (["site1/JPEGImages/a.jpg", "site2/JPEGImages/a.jpg"],
     {"site1/Annotations/a.xml": "a.jpg", "site2/Annotations/a.xml": "a.jpg"},
     {"site1/Annotations/a.xml": "site1/JPEGImages/a.jpg", "site2/Annotations/a.xml": "site2/JPEGImages/a.jpg"}),
    (["images/a.jpg"], {"labels/a.xml": "a.jpg"}, {"labels/a.xml": "images/a.jpg"}),
    (["images/train/a.jpg", "images/val/a.jpg"], {"labels/train/a.xml": "a.jpg", "labels/val/a.xml": "a.jpg"},
     {"labels/train/a.xml": "images/train/a.jpg", "labels/val/a.xml": "images/val/a.jpg"}),
    (["crack/a.jpg", "wear/a.jpg"], {"Annotations/a.xml": "a.jpg"}, {"Annotations/a.xml": "crack/a.jpg"}),   # alike
    (["crack/a.jpg", "wear/a.jpg"], {"crack/a.xml": "a.jpg", "wear/a.xml": "a.jpg"},
     {"crack/a.xml": "crack/a.jpg", "wear/a.xml": "wear/a.jpg"}),
    (["raw/a.jpg", "thin/a.png"], {"boxes/a.xml": "a.jpg"}, {"boxes/a.xml": TIE}),
    (["raw/a.jpg"], {"marks/a.xml": "a.jpg"}, {"marks/a.xml": "raw/a.jpg"}),
    (["raw/deep/down/a.jpg"], {"a.xml": "x.jpg"}, {"a.xml": "raw/deep/down/a.jpg"}),
    (["images/a.jpg"], {"annotations/a.jpg.xml": "zzz.jpg"}, {"annotations/a.jpg.xml": "images/a.jpg"}),
    (["images/1.jpg", "images/crack_7.png"], {"annotations/1.xml": "crack_7.png"}, {"annotations/1.xml": OTHER}),
    (["images/1.jpg", "images/crack_7.png"], {"annotations/1.xml": "crack_7.jpg"}, {"annotations/1.xml": OTHER}),
    (["images/1.jpg", "images/crack_7.png"], {"annotations/1.xml": "crack_8.jpg"},
     {"annotations/1.xml": "images/1.jpg"}),
    (["s1/images/1.jpg"], {"s2/annotations/1.xml": "1.jpg"}, {"s2/annotations/1.xml": AWAY}),
    (["s1/images/1.jpg", "s2/images/2.jpg"], {"s1/annotations/1.xml": "1.jpg", "s2/annotations/1.xml": "1.jpg"},
     {"s1/annotations/1.xml": "s1/images/1.jpg", "s2/annotations/1.xml": AWAY}),
    (["train/1.jpg", "val/2.jpg"], {"train/1.xml": "1.jpg", "val/1.xml": "1.jpg"},
     {"train/1.xml": "train/1.jpg", "val/1.xml": AWAY}),
    (["train/crack/a.jpg"], {"xml_files/crack/a.xml": "a.jpg"}, {"xml_files/crack/a.xml": "train/crack/a.jpg"}),
    (["Original images/a.jpg", "thin/a.jpg"], {"labels-voc/a.xml": "a"}, {"labels-voc/a.xml": "Original images/a.jpg"}),
    (["masks/val/a.png"], {"labels/val/a.xml": "a.png"}, {"labels/val/a.xml": AWAY}),
    (["segmented/images/a.png"], {"segmented/xml/a.xml": ""}, {"segmented/xml/a.xml": "segmented/images/a.png"}),
    (["masks/a.png"], {"Annotations/a.xml": "a.jpg"}, {"Annotations/a.xml": AWAY}),
    (["images/a.jpg", "images/a.heic"], {"annotations/b.xml": "a.heic"},
     {"annotations/b.xml": "annotation of a photo of a type that is not read: heic"}),
    (["images/a.jpg", "images/a.heic"], {"annotations/a.xml": "a.heic"}, {"annotations/a.xml": "images/a.jpg"}),
    (["train/images/x/a.jpg"], {"train/annotations/a.xml": "a"}, {"train/annotations/a.xml": "train/images/x/a.jpg"}),
    (["1/a.jpg", "2/b.jpg"], {"lable/a.xml": "a.jpg"}, {"lable/a.xml": "1/a.jpg"}),
    (["images/a.jp2"], {"annotations/a.xml": "a.jp2"},
     {"annotations/a.xml": "annotation of a photo of a type that is not read: jp2"}),
    (["images/a.gif", "images/b.ppm"], {"annotations/a.xml": "a.gif", "annotations/b.xml": "b.ppm"},
     {"annotations/a.xml": "images/a.gif", "annotations/b.xml": "images/b.ppm"}),
])
def test_the_nearest_photo_is_found_and_none_is_guessed(tmp_path, pictures, xmls, wanted):
    for name in pictures:
        if name.endswith((".heic", ".jp2")):
            text_at(tmp_path, name, "?")
        else:
            alike = "crack/a.jpg" in pictures
            photo_at(tmp_path, name, 0 if alike else pictures.index(name))
    for k, (name, filename) in enumerate(xmls.items()):
        voc_at(tmp_path, name, filename, (1 + k, 1, 90, 70, "Crack"))
    photos, skipped = read_annotations(tmp_path)
    got = {s.where.split(" (")[0]: s.reason for s in skipped if s.what == "annotation"}
    for k, name in enumerate(xmls):
        got.update({name: p.name for p in photos for b in p.boxes if b.x0 == k})
    assert got == wanted
    assert sorted([p.name for p in photos] + [s.where for s in skipped if s.what == "photo"]) == sorted(pictures)
    for s in skipped:
        assert s.reason not in (TIE, OTHER) or all(name in s.where for name in pictures)        # a tie names both


def test_refused_annotations_leave_no_background(tmp_path):
    """Whoever might be meant by an annotation that is not read gives no background."""
    for name in ("1", "crack_7"):
        photo_at(tmp_path, f"images/{name}.png", size=(300, 200))
        voc_at(tmp_path, f"images/{name}.xml", "", (1, 1, 90, 90, "Crack"), size=(300, 200))
    voc_at(tmp_path, "annotations/1.xml", "crack_7.png", size=(300, 200))
    assert [p.certain for p in read_annotations(tmp_path)[0]] == [False, False]


def test_sizes_that_are_unknown_or_nearly_right(tmp_path):
    for k, (size, reason) in enumerate([((0, 0), None), ((101, 80), None), ((99, 81), None), (("", "?"), None),
                                        (("100.0", "80"), None), ((102, 80), 1), ((80, 100), 1), ((100, 78), 1)]):
        photo_at(tmp_path, f"images/{k}.png", k)
        voc_at(tmp_path, f"annotations/{k}.xml", "", size=size)
        photos, skipped = read_annotations(tmp_path)
        bad = [s.reason for s in skipped if s.where == f"images/{k}.png"]
        assert bad == ["photo whose size contradicts its annotation"] * bool(reason)


def upright(pixels, turn):
    """An array (h, w, ...) as EXIF's orientation shows it, in NumPy's words."""
    pixels = pixels.swapaxes(0, 1) if turn >= 5 else pixels
    across, down = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[turn]
    return pixels[::-1 if down else 1, ::-1 if across else 1]


@pytest.mark.parametrize("turn", range(1, 9))
def test_boxes_drawn_on_turned_photos_are_turned_back(tmp_path, turn):
    """A box drawn on the shown picture holds the same pixels in the stored one, for each of the eight orientations."""
    exif = Image.Exif()
    exif[0x0112] = turn
    whole = place_photo(300, 200)
    shown = upright(whole, turn)
    assert np.array_equal(shown, np.asarray(whole if turn == 1 else
                                            Image.fromarray(whole).transpose(cc.TURNS[turn])))
    height, width = shown.shape[:2]
    box = (21, 31, 124, 110, "Crack")
    inside = {tuple(v) for v in shown[30:110, 20:124].reshape(-1, 3).tolist()}
    for suffix in ("png", "jpg"):
        photo_at(tmp_path, f"images/a_{suffix}.{suffix}", image=Image.fromarray(whole), exif=exif)
        voc_at(tmp_path, f"annotations/a_{suffix}.xml", "", box, size=(width, height))
    photos = read_annotations(tmp_path, "turned")[0]
    for p in photos:
        b = p.boxes[0]
        assert {tuple(v) for v in whole[b.y0:b.y1, b.x0:b.x1].reshape(-1, 3).tolist()} == inside
    said = list(cc.frame_notes(read_annotations(tmp_path)[0]))
    assert [note.split()[0] for note in said] == ["2"] * (turn > 1)
    assert turn == 1 or ("turned back" in said[0]) == (turn >= 5)
    kept = read_annotations(tmp_path, "stored")[0][0].boxes[0]
    assert (kept == photos[0].boxes[0]) == (turn == 1 or turn >= 5)    # the size is proof for these


@pytest.mark.parametrize("turn", range(1, 9))
def test_boxes_of_a_tiff_lie_where_pillow_has_turned_them(tmp_path, turn):
    """Pillow loads a TIFF as it is shown: boxes drawn on shown pixels stay, boxes in stored ones are turned with it."""
    exif = Image.Exif()
    exif[0x0112] = turn
    whole = place_photo(300, 200)
    photo_at(tmp_path, "a.tif", image=Image.fromarray(whole), exif=exif)
    with Image.open(tmp_path / "a.tif") as image:
        loaded = np.asarray(image)
    for frame, drawn_on in (("stored", whole), ("turned", upright(whole, turn))):
        voc_at(tmp_path, "a.xml", "", (21, 31, 124, 110, "Crack"), size=drawn_on.shape[1::-1])
        inside = {tuple(v) for v in drawn_on[30:110, 20:124].reshape(-1, 3).tolist()}
        for said in (frame, None)[:1 + (turn >= 5)]:                   # the size is proof for these
            box = read_annotations(tmp_path, said)[0][0].boxes[0]
            found = loaded[box.y0:box.y1, box.x0:box.x1].reshape(-1, 3)
            assert {tuple(v) for v in found.tolist()} == inside, (frame, said)
        if frame == "stored":                                          # what is taken where nothing tells
            voc_at(tmp_path, "a.xml", "", (21, 31, 124, 110, "Crack"), size=None)
            photo = read_annotations(tmp_path)[0][0]
            box = photo.boxes[0]
            found = loaded[box.y0:box.y1, box.x0:box.x1].reshape(-1, 3)
            assert {tuple(v) for v in found.tolist()} == inside
            assert photo.frame == ("" if turn == 1 else "unclear")


def test_sizes_that_say_stored_beside_a_turn(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for k, (size, said) in enumerate([((100, 80), (100, 80)), ((100, 80), (99, 80)), ((100, 100), (100, 100)),
                                      ((100, 101), (101, 100)), ((100, 101), (100, 101)), ((100, 80), None)]):
        photo_at(tmp_path, f"images/{k}.png", size=size, exif=exif)
        voc_at(tmp_path, f"annotations/{k}.xml", "", (1, 1, 64, 70, "Crack"), size=said)
    photo_at(tmp_path, "images/free.png", exif=exif)
    text_at(tmp_path, "annotations/free.xml", xml_of([], None))        # no box, nothing to be turned
    assert [p.frame for p in read_annotations(tmp_path)[0]] == ["", "", "unclear", "turned", "", "unclear", ""]
    turned = [p.boxes[0].y1 - p.boxes[0].y0 for p in read_annotations(tmp_path, "turned")[0][:6]]
    assert turned == [70, 70, 64, 64, 70, 64]                          # 64 wide as shown


@pytest.mark.parametrize("text, place", [
    (BNDBOX.replace("<xmin>1<", "<xmin>2.8e-14<"), (0, 0, 90, 90)),
    (BNDBOX.replace("<xmin>1<", "<xmin>.5<").replace("<ymax>90<", "<ymax>+0.6E+02<"), (0, 0, 90, 60)),
    (BNDBOX.replace("<xmax>90<", "<xmax>1.5e+02<"), (0, 0, 150, 90)),
    ("<polygon><x1>11</x1><y1>21</y1><x2>90.2</x2><y2>30</y2><x3>40</x3><y3>99</y3></polygon>", (10, 20, 90, 99)),
    ("<polygon><pt><x>11</x><y>21</y></pt><pt><x>90</x><y>30</y></pt><pt><x>40</x><y>99</y></pt></polygon>",
     (10, 20, 90, 99)),
    ("<robndbox><cx>100</cx><cy>80</cy><w>60</w><h>20</h><angle>1.5707963</angle></robndbox>", (89, 49, 110, 110)),
    (BNDBOX + "<polygon><x1>200</x1><y1>10</y1></polygon>", (0, 0, 90, 90)),
    (BNDBOX + BNDBOX, "object with several <bndbox>"),
    ("<polygon/>", "box whose coordinates cannot be read"),
    ("<polygon><x1>5</x1></polygon>", "box whose coordinates cannot be read"),
    ("<polygon><x1>5</x1><y1>?</y1></polygon>", "box whose coordinates cannot be read"),
    ("<robndbox><cx>100</cx></robndbox>", "box whose coordinates cannot be read"),
])
def test_numbers_polygons_and_rotated_boxes(tmp_path, text, place):
    photo_at(tmp_path, "a.png", size=(300, 200))
    text_at(tmp_path, "a.xml", f"<x:annotation xmlns:x='urn:y' xmlns='urn:y'><object><name>Crack</name>{text}</object>"
                               "</x:annotation>")
    photos, skipped = read_annotations(tmp_path)
    assert [b[1:5] for p in photos for b in p.boxes] == [place] * (not isinstance(place, str))
    assert reasons(skipped) == ({place: 1, "photo without a usable box": 1} if isinstance(place, str) else {})


def test_placeholders_found_no_class(tmp_path):
    """Beside <Defect> flags a name counts only where it is one of them."""
    add(tmp_path, "a", [(1, 1, 90, 90, ("Crack",)), (101, 1, 190, 90, "defect"), (201, 1, 300, 90, "crack")])
    photos, skipped = read_annotations(tmp_path)
    assert [b.flags for b in photos[0].boxes] == [("Crack",), ("Crack",)] and "defect" not in photos[0].names
    assert reasons(skipped) == {"box without <Defect>, whose name is none of the set's flags": 1}
    assert len(photos[0].taken) == 3                                   # it may be a defect: no background there


def test_spellings_of_one_class(tmp_path):
    add(tmp_path, "a", [(1, 1, 90, 90, "crack"), (101, 1, 190, 90, "Crack"), (201, 1, 300, 90, "Crack")])
    assert {r["class"] for r, _ in cut_all(tmp_path, n=30)} == {"Crack"}


def test_boxes_called_background_are_none(tmp_path):
    add(tmp_path, "a", [(1, 1, 90, 90, "Crack"), (101, 1, 300, 200, "background")])
    photos, skipped = read_annotations(tmp_path)
    assert reasons(skipped) == {"box of Background (see --background)": 1} and len(photos[0].taken) == 1


@pytest.mark.parametrize("head, kind", [(b"\0\0\0\x18ftypheic", "heic"), (b"\0\0\0\x20ftypavif", "avif"),
                                        (b"\0\0\0\x0cjP  \r\n", "jp2")])
def test_photos_that_are_called_jpg_and_are_none(tmp_path, head, kind):
    add(tmp_path, "a", [(1, 1, 90, 90, "Crack")], suffix=".jpg").write_bytes(head + bytes(900))
    reason = f"photo of a type that is not read: {kind}, whatever its name says"
    assert reasons(read_annotations(tmp_path)[1]) == {reason: 1}


def test_photos_without_any_object_give_background(tmp_path):
    add(tmp_path, "a", [(1, 1, 300, 200, "Crack")])
    add(tmp_path, "free", [], number=3)
    add(tmp_path, "unsure", [(90, 1, 80, 80, "Crack")])                # a box that cannot be read is no clean photo
    rows = [r for r, _ in cut_all(tmp_path, n=10, background=50)]
    assert {r["photo"] for r in rows if r["class"] == "Background"} == {"images/free.png"}
    assert len(rows) == 60


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_loops_of_links_and_pipes(tmp_path):
    add(tmp_path, "a", [(1, 1, 90, 90, "Crack")])
    os.mkfifo(tmp_path / "annotations/pipe.xml")
    os.mkfifo(tmp_path / "images/pipe.jpg")
    os.symlink(tmp_path, tmp_path / "images" / "up")
    assert len(read_annotations(tmp_path)[0]) == 1


# ---- YOLO, COCO, CODEBRIM's classification set ----------------------------------------------------------------------

def yolo_line(number, x0, y0, x1, y1, size=(100, 80)):
    w, h = size
    return f"{number} {(x0 + x1) / 2 / w:.6f} {(y0 + y1) / 2 / h:.6f} {(x1 - x0) / w:.6f} {(y1 - y0) / h:.6f}\n"


@pytest.mark.parametrize("name, text", [
    ("data.yaml", "train: ../train\nnc: 3\nnames: ['Crack', 'Exposed bars', 'Rust']\n"),
    ("data.yaml", "names: [Crack, Exposed bars, Rust]   # three\nnc: 3\n"),
    ("data.yaml", "names: [\n  \"Crack\",  # first\n  'Exposed bars',\n  Rust,\n]\nnc: 3\n"),
    ("data.yaml", "names: {0: Crack, 1: 'Exposed bars', 2: Rust}\n"),
    ("data.yaml", "path: x\nnames:\n  0: Crack\n  1: Exposed bars # iron\n  2: 'Rust'\n\nnc: 3\n"),
    ("data.yaml", "names:\n  2: Rust\n  0: Crack\n  7: Wear\n  1: Exposed bars\n"),
    ("data.yaml", "names: {2: Rust, 0: Crack, 1: Exposed bars}\n"),
    ("data.yaml", "names:\n  '2': Rust\n  '0': Crack\n  \"1\": Exposed bars\n"),
    ("data.yaml", 'names: {"2": "Rust", "0":"Crack", "1": "Exposed bars"}\n'),
    ("data.yaml", "names:\n- Crack\n- Exposed bars\n- \"Rust\"\nroboflow:\n  license: MIT\n"),
    ("dataset.yml", "\ufeffnames:\r\n  - Crack\r\n  - Exposed bars\r\n  - Rust\r\n"),
    ("labels/classes.txt", "Crack\nExposed bars\nRust\n\n"),
    ("obj.names", "Crack\r\nExposed bars\r\nRust"),
    (None, None),
])
def test_yolo_and_its_class_lists(tmp_path, name, text):
    photo_at(tmp_path, "images/a.png", size=(300, 200))
    photo_at(tmp_path, "images/free.png", 1, size=(300, 200))
    lines = [yolo_line(0, 10, 20, 90, 110, (300, 200)), "\n", yolo_line(2, 100, 100, 300, 200, (300, 200)),
             "1 0.5 0.1 0.9 0.1 0.9 0.45\n"]
    text_at(tmp_path, "labels/a.txt", "".join(lines))
    text_at(tmp_path, "labels/free.txt", "")
    text_at(tmp_path, "README.txt", "This set was labelled\nby 3 people in 2 days")
    text_at(tmp_path, "train.txt", "images/a.png\n")
    if name:
        text_at(tmp_path, name, text)
    photos, skipped = read_annotations(tmp_path)
    names = ("Crack", "Rust", "Exposed bars") if name else ("0", "2", "1")
    places = [(10, 20, 90, 110), (100, 100, 300, 200), (150, 20, 270, 90)]
    assert skipped == [] and [p.name for p in photos] == ["images/a.png", "images/free.png"]
    assert photos[0].boxes == tuple(cc.Box(k, *places[k], (names[k],)) for k in range(3)) and photos[1].boxes == ()


@pytest.mark.parametrize("line, reason", [
    ("0 0.5 0.5 0.5", "line that is neither a box nor a polygon"),
    ("0 0.5 0.5 0.5 0.5 0.9", "line that is neither a box nor a polygon"),              # a detector's output
    ("0.5 0.5 0.5 0.5 0.5", "line that is neither a box nor a polygon"),
    ("crack 0.5 0.5 0.5 0.5", "line that is neither a box nor a polygon"),
    ("0 nan 0.5 0.5 0.5", "line that is neither a box nor a polygon"),
    ("0 150 100 80 90", "line whose numbers are no fractions of the photo"),
    ("0 0.5 0.5 0 0.5", "box that ends before it begins"),
    ("0 1.5 0.5 0.2 0.2", "box outside its photo"),
    ("7 0.5 0.5 0.2 0.2", "box whose class number has no name"),
])
def test_lines_of_yolo_that_are_left_out(tmp_path, line, reason):
    photo_at(tmp_path, "a.png")
    text_at(tmp_path, "a.txt", f"{line}\n0 0.5 0.5 0.9 0.9\n")
    text_at(tmp_path, "classes.txt", "Crack\n")
    photos, skipped = read_annotations(tmp_path)
    assert skipped == [("box", "a.txt line 1", reason)] and photos[0].boxes == (cc.Box(1, 5, 4, 95, 76, ("Crack",)),)
    placed = reason in ("box outside its photo", "box whose class number has no name")
    assert photos[0].certain == placed and len(photos[0].taken) == 1 + (reason.endswith("no name"))


@pytest.mark.parametrize("text, names", [
    ("names: [Crack's edge, \"Rust, red\", a b]", ["Crack's edge", "Rust, red", "a b"]),
    ("names: {0: 'a, b', 1: c}", ["a, b", "c"]), ("names : [a]\nnames_of_others: [b]", ["a"]), ("nc: 3", None),
    ("names:\n  0:\n    en: Crack\n", "x"), ("names: []", "x"), ("names:\nnc: 3", "x"), ("names: &a [b]", "x"),
    ("names: [a", "x"), ("names: ['', b]", "x"),
    ("names:\n- \"crack #1\"\n- 'crack #2' # b\n", ["crack #1", "crack #2"]),
    ("names:\n- a\n- long\n  name\n- b\n", "x"), ('names: ["Ri\\\\xDF", b]', "x"), ("names: ['it''s', b]", "x"),
    ("{names: [a, b], nc: 2}", "x"), ("'names': [a, b]", "x"), ("names:\n- name: a\n  id: 0\n", "x"),
    ("names: {0: a, b}", "x"), ("names: {0: a, 0: b}", "x"),
])
def test_names_of_a_yaml(text, names):
    if names == "x":
        with pytest.raises(CropError, match="data.yaml: its names cannot be read"):
            cc.yaml_names(text, "data.yaml")
    else:
        assert cc.yaml_names(text, "data.yaml") == (names and dict(enumerate(names)))


def test_key_points_are_not_taken_for_polygons(tmp_path):
    photo_at(tmp_path, "a.png")
    text_at(tmp_path, "a.txt", "0 .5 .5 .2 .2 .45 .45 2 .55 .55 2\n")
    text_at(tmp_path, "data.yaml", "kpt_shape: [2, 3]\nnames: [Crack]\n")
    with pytest.raises(CropError, match="data.yaml: its lines hold key points"):
        read_annotations(tmp_path)


def test_the_nearest_class_list_holds(tmp_path):
    for site, name in (("s1", "Crack"), ("s2", "Rust")):
        photo_at(tmp_path, f"{site}/images/train/1.png")
        text_at(tmp_path, f"{site}/labels/train/1.txt", "0 0.5 0.5 0.9 0.9\n")
        text_at(tmp_path, f"{site}/data.yaml", f"names: [{name}]")
    assert [p.names for p in read_annotations(tmp_path)[0]] == [("Crack",), ("Rust",)]
    photo_at(tmp_path, "s3/images/1.png")
    text_at(tmp_path, "s3/labels/1.txt", "0 0.5 0.5 0.001 0.001\n")     # a box of less than a pixel is one
    text_at(tmp_path, "data.yaml", "names: [Wear]")                    # above s3, and not in another site
    photo = read_annotations(tmp_path)[0][2]
    assert photo.boxes == (cc.Box(0, 50, 40, 51, 41, ("Wear",)),)
    text_at(tmp_path, "s1/classes.txt", "Wear\n")
    with pytest.raises(CropError, match="s1/classes.txt and s1/data.yaml give other names to the classes"):
        read_annotations(tmp_path)


def coco_of(images, annotations, categories=("Crack", "Rust")):
    return dict(images=[dict(id=k, file_name=name, **({"width": w, "height": h} if w else {}))
                        for k, (name, w, h) in enumerate(images)],
                annotations=[dict(dict(id=k, category_id=1), **a) for k, a in enumerate(annotations)],
                categories=[dict(id=k + 1, name=name) for k, name in enumerate(categories)])


def test_coco(tmp_path):
    for k, name in enumerate(["images/a.png", "images/b.png", "images/free.png"]):
        photo_at(tmp_path, name, k)
    crowd, rle = dict(iscrowd=1, segmentation={}), dict(segmentation=dict(counts=[1, 2], size=[80, 100]))
    text_at(tmp_path, "annotations/instances.json", json.dumps(coco_of(
        [("a.png", 100, 80), ("images/b.png", None, None), ("C:\\x\\free.png", 100, 80), ("gone.png", 9, 9)],
        [dict(image_id=0, bbox=[10, 0, 70.4, 79.6]), dict(image_id=0, bbox=[0, 0, 9, 9], **crowd),
         dict(image_id=1, category_id=2, segmentation=[[5, 6, 50, 6, 50, 70], [60, 6, 90, 6, 90, 77.2]]),
         dict(image_id=1, bbox=[1, 2, 30, 40], **rle), dict(image_id=1, bbox=[1, 2, 30]), dict(image_id=1, bbox=[]),
         dict(image_id=1, category_id=9, bbox=[1, 2, 30, 40]), dict(image_id=1, bbox=[1, 2, "3", 40]),
         dict(image_id=99, bbox=[1, 2, 30, 40])])))
    photos, skipped = read_annotations(tmp_path)
    assert [p.boxes for p in photos] == [(cc.Box(0, 10, 0, 80, 80, ("Crack",)),),
                                         (cc.Box(0, 5, 6, 90, 77, ("Rust",)),), ()]
    assert [p.certain for p in photos] == [True, False, True] and len(photos[0].taken) == 2
    assert reasons(skipped) == {
        "crowd of objects (iscrowd)": 1, "mask in run lengths (RLE)": 1, "box whose coordinates cannot be read": 2,
        "box without coordinates": 1, "box without a class": 1, "annotation without a photo": 1,
        "annotations of an image that is not listed": 1}
    assert ("box", "annotations/instances.json annotation 3", "mask in run lengths (RLE)") in skipped
    assert ("annotation", "annotations/instances.json image gone.png", "annotation without a photo") in skipped


def test_boxes_that_are_turned_deleted_or_fractions(tmp_path):
    """CVAT turns a box about its middle, LabelMe keeps what was deleted, and fractions are no pixels."""
    for name in ("turned.png", "fraction.png"):
        photo_at(tmp_path, name, size=(300, 200))
    text_at(tmp_path, "set.json", json.dumps(coco_of(
        [("turned.png", 300, 200), ("fraction.png", 300, 200)],
        [dict(image_id=0, bbox=[80, 20, 40, 120], attributes={"rotation": 90.0}),
         dict(image_id=1, bbox=[0.5, 0.5, 0.4, 0.4])])))
    photos, skipped = read_annotations(tmp_path)
    assert [p.boxes[0][1:5] for p in photos if p.boxes] == [(40, 60, 160, 100)]
    assert reasons(skipped) == {cc.FRACTIONS: 1, "photo without a usable box": 1}
    voc = tmp_path / "voc"
    add(voc, "a", [(81, 21, 120, 140, "Crack"), (1, 1, 60, 60, "Rust"), (0.1, 0.2, 0.5, 0.9, "Rust")])
    path = voc / "annotations/a.xml"
    first, second, *rest = path.read_text().split("</object>")
    turn = "<attributes><attribute><name>rotation</name><value>90</value></attribute></attributes>"
    path.write_text("</object>".join([first + turn, second + "<deleted>1</deleted>", *rest]))
    photos, skipped = read_annotations(voc)
    assert [b[1:] for b in photos[0].boxes] == [(40, 60, 160, 100, ("Crack",))]
    assert reasons(skipped) == {cc.FRACTIONS: 1} and len(photos[0].taken) == 1


def test_what_contradicts_itself_is_an_error(tmp_path):
    photo_at(tmp_path, "a.png")
    data = coco_of([("a.png", 100, 80)], [dict(image_id=0, bbox=[1, 1, 9, 9])])
    data["categories"][1]["id"] = 1
    text_at(tmp_path, "set.json", json.dumps(data))
    with pytest.raises(CropError, match="category 1 is given twice, as Crack and Rust"):
        read_annotations(tmp_path)
    (tmp_path / "set.json").unlink()
    text_at(tmp_path, "a.txt", "0 0.5 0.5 0.9 0.9\n")
    (tmp_path / "classes.txt").write_bytes("Crack\nRust\n".encode("utf-16"))
    with pytest.raises(CropError, match="UTF-16"):
        read_annotations(tmp_path)


def test_a_list_of_another_sets_classes_is_not_taken(tmp_path):
    for k, place in enumerate(("s1", "s2")):
        photo_at(tmp_path, f"{place}/images/{place}.png", k)
        text_at(tmp_path, f"{place}/labels/{place}.txt", "0 0.5 0.5 0.9 0.9\n")
    text_at(tmp_path, "s2/classes.txt", "Rust\n")
    assert [p.names for p in read_annotations(tmp_path)[0]] == [("0",), ("Rust",)]
    text_at(tmp_path, "meta/obj.names", "Crack\n")
    assert [p.names for p in read_annotations(tmp_path)[0]] == [("Crack",), ("Rust",)]


def test_no_part_stays_empty_while_there_are_photos(tmp_path):
    for k in range(5):
        add(tmp_path, f"p{k}", [(1, 1, 200, 150, "Crack")], number=k)
    rows = [r for r, _ in cut_all(tmp_path, n=10, split={"train": 0.8, "val": 0.1, "test": 0.1})]
    assert {part: len({r["photo"] for r in rows if r["split"] == part}) for part in ("train", "val", "test")} == {
        "train": 3, "val": 1, "test": 1}


def test_versions_of_one_photo_stay_in_one_part(tmp_path):
    """Roboflow's, which differ in every byte; of two that are the same byte for byte all versions do."""
    for k in range(6):
        for version in range(3):
            number = 99 if (k, version) in ((0, 2), (1, 0)) else 3 * k + version
            add(tmp_path, f"p{k}_jpg.rf.{version:032x}", [(1, 1, 200, 150, "Crack")], number=number)
    rows = [r for r, _ in cut_all(tmp_path, n=24, split={"train": 0.5, "test": 0.5})]
    split = {r["photo"].split("/")[1][:2]: r["split"] for r in rows}
    assert split.get("p0", split["p1"]) == split["p1"]
    parts = {part: {r["photo"].split(".rf.")[0] for r in rows if r["split"] == part} for part in ("train", "test")}
    assert parts["train"] and parts["test"] and not parts["train"] & parts["test"]


def test_a_sheet_and_a_target_that_cannot_be(tmp_path, capsys, monkeypatch):
    add(tmp_path / "src", "a", [(1, 1, 150, 120, "class"), (100, 60, 290, 190, "class_")])
    (tmp_path / "mine.png").write_text("my file")
    err = call(capsys, tmp_path / "src", tmp_path / "o", "--n", "4", "--sheet", tmp_path / "mine.png", code=2)[1]
    assert "not overwritten" in err and (tmp_path / "mine.png").read_text() == "my file"
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "o")
    assert "is a mount point" in call(capsys, tmp_path / "src", tmp_path / "o", "--n", "4", code=2)[1]
    monkeypatch.undo()
    assert "at most" in run(tmp_path / "src", tmp_path / "o", "--n", "9" * 400, code=2).stderr
    call(capsys, tmp_path / "src", tmp_path / "o", "--n", "4", "--sheet", tmp_path / "s.jpg")
    with open(tmp_path / "o/crops.csv") as f:
        table = list(csv.DictReader(f))
    assert {"class_", "class__"} <= table[0].keys()
    assert all(int(row["class_"]) + int(row["class__"]) == 1 for row in table)
    tall = Image.new("L", (2, 70000))
    cc.save_sheet(tall, tmp_path / "tall.jpg")
    assert not list(tmp_path.glob("*.partial")) and Image.open(tmp_path / "tall.jpg").height == 65500


def test_a_class_that_is_nowhere_the_rarest_is_told(tmp_path, capsys):
    add(tmp_path / "src", "a", [(1, 1, 150, 120, "A"), (1, 1, 150, 120, "B")])
    add(tmp_path / "src", "b", [(1, 1, 150, 120, "A"), (1, 1, 150, 120, "C")], number=1)
    out = call(capsys, tmp_path / "src", tmp_path / "o", "--n", "6")[0]
    assert "no crop is labelled A: see --n, --balance, --label and --small" in out


@pytest.mark.parametrize("data, reason", [
    (b"{", "JSON that cannot be parsed"), (b"[" * 100_000, "JSON that cannot be parsed"),
    (b"\xff\xfe{", "JSON that cannot be parsed"),
    (json.dumps(dict(images=[dict(id=0, file_name="b.png"), dict(id=0, file_name="a.png")],
                     annotations=[dict(image_id=0, bbox=[1, 1, 9, 9])])).encode(), "image whose id is given twice"),
    (json.dumps(dict(images=[3, None, dict(id=[0], file_name=7)], annotations=[None, 4, dict(image_id={})],
                     categories=5)).encode(), "annotation without a photo"),
    (json.dumps(dict(images=[dict(id=0, file_name="\ud800.png", width="9", height=1e999)],
                     annotations=[dict(image_id=0, bbox=[10 ** 400, 0, 1, 1])])).encode(),
     "annotation without a photo"),
])
def test_bad_json_is_skipped(tmp_path, data, reason):
    for name in ("a.png", "b.png", "good.png"):
        photo_at(tmp_path, name)
    good = coco_of([("good.png", 100, 80)], [dict(image_id=0, bbox=[1, 1, 70, 70])])
    text_at(tmp_path, "good.json", json.dumps(good))
    (tmp_path / "bad.json").write_bytes(data)
    cc.crop_folder(tmp_path, tmp_path.parent / "bad_json_crops", n=3)
    shutil.rmtree(tmp_path.parent / "bad_json_crops")
    photos, skipped = read_annotations(tmp_path)
    assert [p.name for p in photos] == ["good.png"] and reason in reasons(skipped)


def test_coco_finds_photos_of_equal_names(tmp_path):
    for k, part in enumerate(("train2017", "val2017")):
        photo_at(tmp_path, f"{part}/1.png", k)
        text_at(tmp_path, f"annotations/instances_{part}.json",
                json.dumps(coco_of([("1.png", 100, 80)], [dict(image_id=0, bbox=[k, 1, 70, 70])])))
    assert [(p.name, p.boxes[0].x0) for p in read_annotations(tmp_path)[0]] == [("train2017/1.png", 0),
                                                                              ("val2017/1.png", 1)]


def test_coco_that_names_folders_means_them(tmp_path):
    for k in range(2):
        photo_at(tmp_path, f"s{k}/1.png", k)
    images = [(name, 100, 80) for name in ("s0/1.png", "s1\\1.png", "s2/1.png")]
    text_at(tmp_path, "export of May/all.json", json.dumps(coco_of(images, [dict(image_id=k, bbox=[k, 1, 70, 70])
                                                                              for k in range(3)])))
    photos, skipped = read_annotations(tmp_path)
    assert [(p.name, p.boxes[0].x0) for p in photos] == [("s0/1.png", 0), ("s1/1.png", 1)]
    assert [s.reason for s in skipped] == [TIE] and "image s2/1.png (s0/1.png, s1/1.png)" in skipped[0].where


def test_each_format_gives_the_same_crops(tmp_path):
    boxes = [(10, 20, 90, 110, "Crack"), (100, 0, 300, 200, "Rust"), (10, 20, 90, 110, "Rust"),
             (0, 150, 7, 200, "Crack")]
    classes, size = ["Crack", "Rust"], (300, 200)
    for k in range(3):
        for kind in ("voc", "yolo", "coco"):
            photo_at(tmp_path, f"{kind}/images/{k}.png", k, size)
        voc_at(tmp_path, f"voc/labels/{k}.xml", f"{k}.png",
               *((x0 + 1, y0 + 1, x1, y1, c) for x0, y0, x1, y1, c in boxes[k:]), size=size)
        text_at(tmp_path, f"yolo/labels/{k}.txt", "".join(yolo_line(classes.index(c), *b, size) for *b, c in boxes[k:]))
    text_at(tmp_path, "yolo/data.yaml", f"names: {classes}")
    text_at(tmp_path, "coco/all.json", json.dumps(coco_of(
        [(f"{k}.png", *size) for k in range(3)],
        [dict(image_id=k, category_id=classes.index(c) + 1, bbox=[x0, y0, x1 - x0, y1 - y0])
         for k in range(3) for x0, y0, x1, y1, c in boxes[k:]])))
    for kind in ("voc", "yolo", "coco"):
        cc.crop_folder(tmp_path / kind, tmp_path / f"{kind}_crops", n=40, window="box", background=9)
    made = [tree(tmp_path / f"{kind}_crops") for kind in ("voc", "yolo", "coco")]
    skipped = [files.pop("skipped.csv") for files in made]
    assert made[0] == made[1] == made[2] and len(made[0]) == 50 and len(set(skipped)) == 3


def test_a_coco_file_of_100000_boxes(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(50):
        photo_at(tmp_path, f"{k}.png", k, (300, 200))
    corners = rng.integers(0, 100, (100_000, 4)) + [0, 0, 3, 3]
    boxes = [dict(image_id=k % 50, bbox=box) for k, box in enumerate(corners.tolist())]
    text_at(tmp_path, "all.json", json.dumps(coco_of([(f"{k}.png", 300, 200) for k in range(50)], boxes)))
    start = time.process_time()
    photos, skipped = read_annotations(tmp_path)
    assert time.process_time() - start < 10                            # about 1.5
    assert sum(len(p.boxes) for p in photos) + len(skipped) == 100_000


def test_several_formats_are_told_apart_or_refused(tmp_path):
    photo_at(tmp_path, "images/a.png")
    voc_at(tmp_path, "voc/a.xml", "a.png", (1, 1, 80, 70, "Voc"))
    text_at(tmp_path, "labels/a.txt", "0 0.5 0.5 0.9 0.9\n")
    text_at(tmp_path, "classes.txt", "Yolo\n")
    text_at(tmp_path, "coco.json", json.dumps(coco_of([("a.png", 0, 0)], [dict(image_id=0, bbox=[1, 1, 70, 70])])))
    with pytest.raises(CropError, match=r"voc \(1 photos\) and yolo \(1 photos\) and coco \(1 photos\): name a folder"):
        read_annotations(tmp_path)
    for kind, name in (("voc", "Voc"), ("yolo", "Yolo"), ("coco", "Crack")):
        assert read_annotations(tmp_path, boxes=kind)[0][0].names == (name,)


@pytest.mark.parametrize("files, said", [
    (["images/a.png", "masks/a.png"], r"only masks \(masks/a.png\)"),
    (["a.png", "a_mask.png"], r"only masks \(a_mask.png"),
    (["SegmentationClass/a.png"], "only masks"), (["a.jpg", "a.png"], "only masks"),
    (["a.png", "a.json"], r"its 1 .json are not COCO's"), (["crack/a.png", "wear/b.png"], "okd_train.py --data"),
    (["a.png"], "1 photos are there"), (["a.png", "readme.txt", "list.txt"], "1 photos are there"),
])
def test_a_folder_without_boxes_is_told_what_it_holds(tmp_path, files, said):
    for name in files:
        if name.endswith((".png", ".jpg")):
            photo_at(tmp_path, name)
        else:
            text_at(tmp_path, name, '{"shapes": []}')
    with pytest.raises(CropError, match=f"no .xml files, YOLO .txt or COCO .json in it; .*{said}"):
        read_annotations(tmp_path)


def flag_xml(entries):
    return "<?xml version='1.0'?>\n<Annotation>" + "".join(
        f'<Defect name="{name}">' + "".join(f"<{f}>{int(f in flags)}</{f}>" for f in FLAGS) + "</Defect>"
        for name, flags in entries.items()) + "</Annotation>"


@pytest.fixture
def classified(tmp_path):
    """An imitation of CODEBRIM's balanced classification set."""
    root, defects, free = tmp_path / "classification_dataset_balanced", {}, {}
    for k in range(12):
        name = f"image_{k:07d}_crop_0000001.png"
        part = ["train", "train", "val", "test"][k % 4]
        defects[name] = [("Crack",), ("Spallation", "ExposedBars")][k % 2]
        photo_at(root, f"{part}/defects/{name}", k, size=(90 + k, 70 + 5 * k))
        free[f"bg_{name}"] = ("Background",)
        photo_at(root, f"{part}/background/bg_{name}", k, size=(120, 90))
    text_at(root, "metadata/defects.xml", flag_xml({**defects, "gone.png": ("Crack",), "none.png": ()}))
    text_at(root, "metadata/background.xml", flag_xml(free))
    shutil.copy(root / "train/defects/image_0000000_crop_0000001.png",
                root / "train/defects/image_0000000_crop_0000001_-_1.png")
    photo_at(root, "train/defects/none.png")
    photo_at(root, "test/defects/unlisted.png")
    photo_at(root, "val/defects/small.png", size=(60, 200))
    text_at(root, "metadata/defects.xml", flag_xml({**defects, "gone.png": ("Crack",), "none.png": (),
                                                    "small.png": ("Crack",)}))
    return root


def test_the_classification_set_keeps_its_splits(classified, tmp_path, capsys):
    assert cc.main([str(classified), str(tmp_path / "c"), "--n", "40", "--background", "24", "--seed", "1"]) == 0
    rows = table(tmp_path / "c")
    assert collections.Counter(r["class"] for r in rows)["Background"] == 24 and len(rows) == 64
    for r in rows:
        part, kind, name = r["photo"].split("/")
        assert r["split"] == part and r["file"].startswith(f"{part}/{r['class']}/")
        k, x, y = int(name.split("_crop")[0][-7:]), int(r["x"]), int(r["y"])
        size = (90 + k, 70 + 5 * k) if kind == "defects" else (120, 90)
        assert 0 <= x <= size[0] - 64 and 0 <= y <= size[1] - 64
        with Image.open(tmp_path / "c" / r["file"]) as crop:
            assert np.array_equal(np.asarray(crop), place_photo(*size, k)[y:y + 64, x:x + 64])
        flags = {f for f in FLAGS if r[f] == "1"}
        assert flags == ({"Background"} if kind == "background" else
                         [{"Crack"}, {"Spallation", "ExposedBars"}][k % 2]) and r["class"] in flags
    assert {r["split"] for r in rows} == {"train", "val", "test"} and {r["side"] for r in rows} == {"64"}
    left = {row[1]: row[2] for row in csv_rows(tmp_path / "c/skipped.csv")[1:]}
    copy = "train/defects/image_0000000_crop_0000001_-_1.png"
    assert left == {copy: "photo without annotation of its own (a mask, a drawing or a copy?)",
                    "metadata/defects.xml crop train/defects/none.png": "box without any flag set",
                    "train/defects/none.png": "photo without a usable box",
                    "test/defects/unlisted.png": "photo without annotation",
                    "val/defects/small.png": "photo smaller than 64",
                    "metadata/defects.xml image defects/gone.png": "annotation without a photo"}
    assert cc.main([str(classified), str(tmp_path / "d"), "--split", "a=0.5,b=0.5"]) == 2
    assert "come in splits of their own" in capsys.readouterr().err
    shutil.copytree(classified, classified.parent / "both/one")
    shutil.copytree(classified, classified.parent / "both/two")
    with pytest.raises(CropError, match="one/metadata and two/metadata belong to several sets"):
        read_annotations(classified.parent / "both")


# ---- any tree -------------------------------------------------------------------------------------------------------

LAYOUTS = {                                                           # folders of photos and of annotations
    "voc": [("images", "annotations"), ("JPEGImages", "Annotations"), ("images", "annotations/xmls"), (".", "."),
            ("{part}/images", "{part}/annotations"), ("images/{part}", "labels/{part}"), ("{part}", "{part}"),
            ("{part}/raw", "{part}/marks")],
    "yolo": [("images", "labels"), (".", "."), ("{part}/images", "{part}/labels"), ("images/{part}", "labels/{part}")],
    "coco": [("images", "annotations"), (".", "."), ("{part}", "annotations"), ("{part}", "{part}"),
             ("{part}/images", "{part}")]}
CLASSES = ["Crack", "Rust", "Exposed bars"]


def random_tree(root, seed):
    """Photos with boxes in one format and layout, with much that is wrong or beside the point.
    Returns (format, exif, {photo: (turn, file of its annotation)})."""
    rng, known = random.Random(seed), {}
    kind = ["voc", "yolo", "coco"][seed % 3]
    photos_in, marks_in = rng.choice(LAYOUTS[kind])
    exif = rng.choice(["stored", "turned"])
    for part in ["train2017", "val2017"] if "{part}" in photos_in else ["."]:
        images, annotations = [], []
        for k in range(rng.randint(2, 5)):
            turn, (w, h) = rng.choice([1, 1, *range(1, 9)]), rng.choices(range(20, 90), k=2)
            name = Path(photos_in.format(part=part), f"p{k}{rng.choice(['.png', '.jpg', '.PNG'])}").as_posix()
            saved = Image.Exif()
            saved[0x0112] = turn
            photo_at(root, name, k, (w, h), exif=saved)
            known[name] = None
            if k and rng.random() < 0.2:
                continue                                               # nobody has looked at this one
            shown = (h, w) if turn >= 5 and exif == "turned" else (w, h)
            boxes = [random_box(rng, *shown) for _ in range(rng.choice([0, 1, 2, 2, 4]))]
            file = Path(marks_in.format(part=part), f"p{k}.{'txt' if kind == 'yolo' else 'xml'}").as_posix()
            if kind == "voc":
                text_at(root, file, xml_of([(x + 1, y + 1, x1, y1, c) for x, y, x1, y1, c in boxes],
                                           shown, rng.choice([Path(name).name, f"C:\\x\\p{k}.bmp", "camera.jpg"])))
            elif kind == "yolo":
                text_at(root, file, "".join(yolo_line(CLASSES.index(c), *box, shown) for *box, c in boxes))
            else:
                file = Path(marks_in.format(part=part), f"instances_{part}.json").as_posix()
                images.append((Path(name).name, *shown))
                annotations += [dict(rng.choice([dict(bbox=[x, y, x1 - x, y1 - y]),
                                                 dict(segmentation=[[x, y, x1, y, x1, y1]])]),
                                     image_id=len(images) - 1, category_id=CLASSES.index(c) + 1)
                                for x, y, x1, y1, c in boxes]
            known[name] = turn if exif == "turned" else 1, file
        if images:
            text_at(root, file, json.dumps(coco_of(images, annotations, CLASSES)))
        if rng.random() < 0.5 and photos_in != ".":                    # masks of the same names
            photo_at(root, Path(photos_in.format(part=part)).with_name("masks") / "p0.png", size=(30, 30))
            known[Path(photos_in.format(part=part)).with_name("masks").as_posix() + "/p0.png"] = None
    text_at(root, "classes.txt", "\n".join(CLASSES))
    text_at(root, "README.txt", "five photos")
    text_at(root, "new.heic", "?")
    return kind, exif, {**known, "new.heic": None}


def random_box(rng, w, h):
    x, y = rng.randint(0, w - 3), rng.randint(0, h - 3)
    return x, y, rng.randint(x + 2, w), rng.randint(y + 2, h), rng.choice(CLASSES)


def own_reading(root, photo, turn, file):
    """[(x0, y0, x1, y1, class)] of a photo in stored pixels, found without any line of the script."""
    with Image.open(root / photo) as image:
        w, h = image.size
    places = upright(np.arange(w * h).reshape(h, w), turn)             # where each pixel that is shown is stored
    height, width = places.shape
    boxes, text = [], (root / file).read_text()
    if file.endswith(".xml"):
        for o in ElementTree.fromstring(text).findall("object"):
            x0, y0, x1, y1 = (int(o.find(f"bndbox/{tag}").text) for tag in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append((x0 - 1, y0 - 1, x1, y1, o.find("name").text))
    elif file.endswith(".txt"):
        for line in text.splitlines():
            k, x, y, bw, bh = map(float, line.split())
            corners = (x - bw / 2) * width, (y - bh / 2) * height, (x + bw / 2) * width, (y + bh / 2) * height
            boxes.append((*map(round, corners), CLASSES[int(k)]))
    else:
        data = json.loads(text)
        k, = (i["id"] for i in data["images"] if i["file_name"] == Path(photo).name)
        for a in (a for a in data["annotations"] if a["image_id"] == k):
            x, y, bw, bh = a.get("bbox", (0, 0, 0, 0))
            xs, ys = (x, x + bw), (y, y + bh)
            if "segmentation" in a:
                xs, ys = a["segmentation"][0][::2], a["segmentation"][0][1::2]
            boxes.append((min(xs), min(ys), max(xs), max(ys), CLASSES[a["category_id"] - 1]))
    for x0, y0, x1, y1, label in boxes:
        at = places[y0:y1, x0:x1]
        yield (at % w).min(), (at // w).min(), (at % w).max() + 1, (at // w).max() + 1, label


@pytest.mark.parametrize("start", range(0, 60, 12))
def test_any_tree(tmp_path, start):
    """Each crop lies in a box of its class, or round one that is smaller; background touches none; photos used and
    photos left out are the photos found."""
    n_crops = collections.Counter()
    for seed in range(start, start + 12):
        root = tmp_path / str(seed)
        kind, exif, known = random_tree(root, seed)
        truth = {p: list(own_reading(root, p, *how)) for p, how in known.items() if how}
        photos, skipped = read_annotations(root, exif)
        assert {p.name for p in photos} == set(truth), (seed, skipped)
        assert sorted([*truth, *(s.where for s in skipped if s.what == "photo")]) == sorted(known)
        choices = dict(size=16, seed=seed, window=["native", "box"][seed % 2], label="random")
        n = 3 * sum(len(p.boxes) for p in photos)
        for part in (dict(n=n), dict(n=0, background=20)):
            with contextlib.suppress(cc.TooFew):
                for r, image in crops(photos, **part, **choices):
                    x, y, side = r["x"], r["y"], r["side"]
                    near = [(x0, y0, x1, y1) for x0, y0, x1, y1, c in truth[r["photo"]]
                            if r["class"] in (c, "Background")]
                    if r["class"] == "Background":
                        assert all(x + side <= x0 or x >= x1 or y + side <= y0 or y >= y1 for x0, y0, x1, y1 in near)
                    else:
                        within = lambda a, b, start: (a <= start and start + side <= b if b - a >= side else
                                                      start <= a and b <= start + side)
                        assert any(within(x0, x1, x) and within(y0, y1, y) for x0, y0, x1, y1 in near), (seed, r)
                    with Image.open(root / r["photo"]) as photo:
                        cut = photo.convert("RGB").crop((x, y, x + side, y + side))
                    assert side != 16 or np.array_equal(image, np.asarray(cut))
                    n_crops[kind, r["class"] == "Background"] += 1
    assert len(n_crops) == 6 and min(n_crops.values()) >= 10, n_crops


# ---- photos ---------------------------------------------------------------------------------------------------------

def broken_photos(root):
    """Adds photos that cannot be used; returns {name: reason}."""
    box = [(1, 1, 90, 90, "Crack")]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    for name, suffix in (("cut_jpg", ".jpg"), ("cut_png", ".png"), ("cut_tif", ".tif")):
        path = add(root, name, box, suffix=suffix, image=noise)
        path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    add(root, "empty", box, suffix=".jpg").write_bytes(b"")
    add(root, "text", box, suffix=".jpg").write_text("<html>404</html>")
    add(root, "eps", box, suffix=".jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 200\n")
    path = add(root, "flipped", box)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    add(root, "tiny", box, size=(300, 60))
    (root / "annotations/contradicts.xml").write_text(xml_of(box, size=(200, 300)))
    Image.fromarray(place_photo(300, 200)).save(root / "images/contradicts.png")
    (root / "annotations/taller.xml").write_text(xml_of(box, size=(300, 202)))
    Image.fromarray(place_photo(300, 200)).save(root / "images/taller.png")
    floats = np.random.default_rng(0).random((200, 300), dtype=np.float32)
    floats[7, 9] = np.nan
    add(root, "float", box, suffix=".tif", image=Image.fromarray(floats))
    add(root, "deep", box, suffix=".tif", image=Image.fromarray(np.full((200, 300), 10 ** 6, np.int32)))
    damaged, no_photo = "photo that is truncated or damaged", "photo that cannot be opened"
    contradicts = "photo whose size contradicts its annotation"
    return {"cut_jpg.jpg": damaged, "cut_png.png": damaged, "cut_tif.tif": damaged, "flipped.png": damaged,
            "empty.jpg": "empty photo", "text.jpg": no_photo, "eps.jpg": no_photo, "tiny.png": "photo smaller than 64",
            "contradicts.png": contradicts, "taller.png": contradicts,
            **dict.fromkeys(("float.tif", "deep.tif"), "photo whose numbers fit no usual range (see --range)")}


def test_broken_photos_are_skipped_and_named_and_n_stays_exact(tmp_path):
    expected = broken_photos(tmp_path)
    for k in range(3):
        add(tmp_path, f"good{k}", [(1, 1, 90, 90, "Crack")], number=k)
    skipped = []
    rows = cut_all(tmp_path, n=60, skipped=skipped)
    assert len(rows) == 60 and {r["photo"] for r, _ in rows} == {f"images/good{k}.png" for k in range(3)}
    assert {s.where.split("/")[1]: s.reason for s in skipped} == expected
    assert rows[0][1].shape == (64, 64, 3)
    with pytest.raises(CropError, match=r"3000 windows wanted, 2187 distinct ones exist \(6 damaged photos left out\)"):
        cut_all(tmp_path, n=3000)                                      # 27 x 27 starts in each of three boxes


def test_same_crops_as_if_broken_photos_had_other_workers(tmp_path):
    broken_photos(tmp_path)
    for k in range(3):
        add(tmp_path, f"good{k}", [(1, 1, 90, 90, "Crack")], number=k)
    one, four = cut_all(tmp_path, n=60, workers=1), cut_all(tmp_path, n=60, workers=4)
    assert [r for r, _ in one] == [r for r, _ in four]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(one, four))


def test_decompression_bomb(tmp_path, monkeypatch):
    add(tmp_path, "good", [(1, 1, 90, 90, "Crack")])
    for name, side in (("bomb", 10000), ("worse", 20000)):             # a PNG's head says how much it would unpack to
        path = add(tmp_path, name, [(1, 1, 90, 90, "Crack")], size=(side, side), image=Image.new("1", (1, 1)))
        head = b"IHDR" + side.to_bytes(4, "big") * 2 + b"\1\0\0\0\0"
        path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + zlib.crc32(head).to_bytes(4, "big")
                         + path.read_bytes()[33:])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    photos, skipped = read_annotations(tmp_path)
    assert [p.name for p in photos] == ["images/good.png"]
    assert reasons(skipped) == {"photo too large (decompression bomb?)": 2}


def test_modes(tmp_path):
    """Every photo shows the same ramp; every mode must give the same crop."""
    ramp = np.clip(np.add.outer(np.arange(200), np.arange(300)) // 2, 0, 255).astype(np.uint8)
    grey = Image.fromarray(ramp)
    box = [(101, 51, 164, 114, "Crack")]                               # one window: x 100, y 50
    wide = ramp.astype(np.uint16) * 257
    palette = Image.fromarray(ramp)
    palette = palette.convert("P")
    palette.putpalette([v for i in range(256) for v in (i, i, i)])
    palette.putdata(ramp.reshape(-1).tolist())
    colour = grey.convert("RGB")
    kinds = {"grey.png": grey, "grey.jpg": grey, "rgb.JPEG": colour, "rgba.png": grey.convert("RGBA"),
             "cmyk.jpg": colour.convert("CMYK"), "palette.png": palette, "wide.png": Image.fromarray(wide),
             "wide.tif": Image.fromarray(wide), "int.tiff": Image.fromarray(wide.astype(np.int32)),
             "la.png": grey.convert("LA"), "bmp.BMP": grey, "progressive.jpg": colour, "webp.webp": colour}
    for name, image in kinds.items():
        stem, suffix = os.path.splitext(name)
        options = {"progressive": dict(progressive=True), "webp": dict(lossless=True)}.get(stem, {})
        if suffix.lower().startswith(".jp"):
            options["quality"] = 100
        add(tmp_path, stem + suffix[1:], box, suffix=suffix, image=image, **options)
    alpha = grey.convert("RGBA")
    alpha.putalpha(Image.new("L", grey.size, 0))
    add(tmp_path, "transparent", box, image=alpha)
    skipped = []
    rows = cut_all(tmp_path, n=len(kinds) + 1, skipped=skipped)
    assert skipped == [] and len(rows) == len(kinds) + 1
    want = np.repeat(ramp[50:114, 100:164, None], 3, 2).astype(int)
    for row, image in rows:
        lossy = row["photo"].lower().endswith((".jpg", ".jpeg", ".webp"))
        assert np.abs(image.astype(int) - want).max() <= (6 if lossy else 0), row["photo"]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 300 * 200).reshape(200, 300).astype(np.uint16)
    add(tmp_path, "a", [(1, 1, 300, 200, "Crack")], image=Image.fromarray(values))
    for row, image in cut_all(tmp_path, n=20):
        want = values[row["y"]:row["y"] + 64, row["x"]:row["x"] + 64] >> 8         # as fid.py reads it
        assert np.array_equal(image, np.repeat(want[..., None], 3, 2))


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    for k, suffix in enumerate((".png", ".jpg")):
        add(tmp_path, f"turned{k}", [(11, 21, 90, 110, "Crack")], suffix=suffix, exif=exif)
    for row, image in cut_all(tmp_path, n=40):
        if row["photo"].endswith("png"):
            assert image[0, 0].tolist()[:2] == [row["x"], row["y"]]
        else:
            assert abs(image[:, 0, 0].astype(float).mean() - row["x"]) < 6
            assert abs(image[0, :, 1].astype(float).mean() - row["y"]) < 6


# ---- windows to the pixel -------------------------------------------------------------------------------------------

def test_every_pixel_is_where_its_row_says(tmp_path):
    rng = random.Random(1)
    boxes, size = {}, {}
    for k in range(8):
        w, h = rng.randint(64, 700), rng.randint(64, 600)
        size[k] = w, h
        boxes[k] = []
        for _ in range(rng.randint(1, 5)):
            x0, x1 = sorted(rng.sample(range(1, w + 1), 2))
            y0, y1 = sorted(rng.sample(range(1, h + 1), 2))
            boxes[k].append((x0, y0, x1, y1, rng.choice(["Crack", "Spallation"])))
        add(tmp_path, f"p{k}", boxes[k], size=(w, h), number=k)
    rows = cut_all(tmp_path, n=400)
    assert len({(r["photo"], r["x"], r["y"]) for r, _ in rows}) == 400
    for r, image in rows:
        k = int(r["photo"][8:-4])
        w, h = size[k]
        x, y = r["x"], r["y"]
        assert r["side"] == 64 and 0 <= x <= w - 64 and 0 <= y <= h - 64
        assert np.array_equal(image, place_photo(w, h, k)[y:y + 64, x:x + 64])         # no padding, no resampling
        x0, y0, x1, y1, label = boxes[k][r["box"]]
        assert r["class"] == label
        for start, first, last in ((x, x0 - 1, x1), (y, y0 - 1, y1)):                  # 1-based inclusive -> half-open
            if last - first >= 64:
                assert first <= start and start + 64 <= last
            else:
                assert start <= first and last <= start + 64


@pytest.mark.parametrize("box, xs, ys", [
    ((101, 51, 167, 116, "Crack"), range(100, 104), range(50, 53)),    # inside: 67 and 66 long
    ((101, 51, 164, 114, "Crack"), [100], [50]),                       # exactly 64
    ((101, 51, 162, 115, "Crack"), range(98, 101), [50, 51]),          # one short side, one long
    ((1, 1, 2, 3, "Crack"), [0], [0]),                                 # in the corner
    ((299, 199, 300, 200, "Crack"), [236], [136]),
    ((237, 136, 300, 199, "Crack"), [236], [135]),
])
def test_the_whole_range_is_reached_and_nothing_else(tmp_path, box, xs, ys):
    add(tmp_path, "a", [box])
    places = {(x, y) for x in xs for y in ys}
    rows = cut_all(tmp_path, n=len(places))
    assert {(r["x"], r["y"]) for r, _ in rows} == places
    with pytest.raises(CropError, match=f"{len(places) + 1} windows wanted, {len(places)} distinct ones exist"):
        cut_all(tmp_path, n=len(places) + 1)


def test_windows_are_spread_over_the_range(tmp_path):
    add(tmp_path, "a", [(1, 1, 300, 200, "Crack")])
    x = np.array([r["x"] for r, _ in cut_all(tmp_path, n=2000)])
    counts = np.histogram(x, 6, (0, 237))[0]                           # 237 starts in six bins of 39.5
    assert ((counts - 2000 / 6) ** 2 / (2000 / 6)).sum() < 20.5        # chi square, 5 degrees of freedom, p = 0.001


def test_window_box(tmp_path):
    boxes = [(11, 21, 210, 180, "Crack"), (151, 1, 270, 100, "Spallation"), (31, 100, 60, 190, "Efflorescence")]
    add(tmp_path, "a", boxes, number=3)
    rows = cut_all(tmp_path, n=300, window="box")
    sides = collections.defaultdict(set)
    for r, image in rows:
        x0, y0, x1, y1, _ = boxes[r["box"]]
        x, y, side = r["x"], r["y"], r["side"]
        sides[r["box"]].add(side)
        assert image.shape == (64, 64, 3)
        if r["box"] < 2:
            assert x0 - 1 <= x and x + side <= x1 and y0 - 1 <= y and y + side <= y1
            whole = Image.fromarray(place_photo(300, 200, 3)).crop((x, y, x + side, y + side))
            whole = whole.resize((64, 64), Image.Resampling.LANCZOS)
            assert np.array_equal(image, np.asarray(whole))
    assert min(sides[0]) >= 80 and max(sides[0]) <= 160 and min(sides[0]) < 85 and max(sides[0]) > 155
    assert min(sides[1]) >= 50 and max(sides[1]) <= 100
    assert sides[2] == {64}                                            # 30 wide: as in native mode


def test_window_box_is_antialiased(tmp_path):
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255                                              # finer than the crop's pixels: must become grey
    add(tmp_path, "a", [(1, 1, 512, 512, "Crack")], size=(512, 512), image=Image.fromarray(stripes))
    for _, image in cut_all(tmp_path, n=5, window="box"):
        assert 110 < image.min() and image.max() < 145


def test_size(tmp_path):
    add(tmp_path, "a", [(1, 1, 300, 200, "Crack")])
    for size in (16, 128):
        for r, image in cut_all(tmp_path, n=4, size=size):
            x, y = r["x"], r["y"]
            assert image.shape == (size, size, 3)
            assert np.array_equal(image, place_photo(300, 200)[y:y + size, x:x + size])


# ---- which windows, which labels ------------------------------------------------------------------------------------

def test_exactly_n_of_overlapping_boxes(tmp_path):
    add(tmp_path, "a", [(1, 1, 70, 70, "Crack"), (4, 4, 73, 73, "Spallation"), (1, 1, 30, 66, "Crack")])
    # starts: 7x7 at 0, 7x7 at 3 (4x4 shared), and (0, 0..2) that all lie in the first
    rows = cut_all(tmp_path, n=82)
    assert len({(r["x"], r["y"]) for r, _ in rows}) == 82
    with pytest.raises(CropError, match="83 windows wanted, 82 distinct ones exist"):
        cut_all(tmp_path, n=83)
    with pytest.raises(CropError, match="10000000000 windows wanted, 82 distinct"):
        cut_all(tmp_path, n=10 ** 10)                                  # at once, not after a long search


def test_every_box_once_before_any_twice(bridge):
    boxes = {(r["photo"], r["box"]) for r, _ in cut_all(bridge, n=36)}
    assert len(boxes) == 36
    counts = collections.Counter((r["photo"], r["box"]) for r, _ in cut_all(bridge, n=90))
    assert sorted(counts.values()) == [2] * 18 + [3] * 18


def test_label_rarest_single_random(tmp_path):
    triple = ("Spallation", "ExposedBars", "CorrosionStain")
    single, stain = ("Spallation",), ("CorrosionStain",)
    add(tmp_path, "a", [(1, 1, 90, 90, triple), (100, 1, 190, 90, single), (200, 1, 300, 90, stain)])
    add(tmp_path, "b", [(1, 1, 90, 90, single), (100, 1, 190, 90, ("CorrosionStain", "Spallation"))])
    flags = {"images/a.png": [triple, single, stain], "images/b.png": [single, ("CorrosionStain", "Spallation")]}
    by = collections.defaultdict(set)
    for r, _ in cut_all(tmp_path, n=50):
        by[r["photo"], r["box"]].add(r["class"])
        assert [f for f in FLAGS if r[f]] == sorted(flags[r["photo"]][r["box"]], key=FLAGS.index)
    assert by == {("images/a.png", 0): {"ExposedBars"}, ("images/a.png", 1): {"Spallation"},
                  ("images/a.png", 2): {"CorrosionStain"},
                  ("images/b.png", 0): {"Spallation"}, ("images/b.png", 1): {"CorrosionStain"}}
    skipped = []
    single = cut_all(tmp_path, n=50, label="single", skipped=skipped)
    assert {(r["photo"][7], r["box"]) for r, _ in single} == {("a", 1), ("a", 2), ("b", 0)}
    assert reasons(skipped) == {"box of several classes (--label single)": 2}
    many = [r for r, _ in cut_all(tmp_path, n=300, label="random")]
    drawn = collections.Counter(r["class"] for r in many if (r["photo"], r["box"]) == ("images/a.png", 0))
    assert set(drawn) == set(triple) and min(drawn.values()) >= 8      # 60 draws, 20 each


def test_balance(bridge):
    counts = collections.Counter(r["class"] for r, _ in cut_all(bridge, n=52, balance=True))
    assert sorted(counts.values()) == [10, 10, 10, 11, 11] and len(counts) == 5
    plain = collections.Counter(r["class"] for r, _ in cut_all(bridge, n=52))
    assert max(plain.values()) > 12
    mixed = cut_all(bridge, n=50, balance=True, label="random")
    assert set(collections.Counter(r["class"] for r, _ in mixed).values()) == {10}
    assert all(r[r["class"]] == 1 for r, _ in mixed)


def test_balance_says_what_is_missing(tmp_path):
    add(tmp_path, "a", [(1, 1, 200, 200, "Crack"), (210, 1, 274, 64, "Spallation")])
    assert len(cut_all(tmp_path, n=4, balance=True)) == 4
    with pytest.raises(CropError, match="3 windows of class Spallation wanted, 2 distinct ones exist"):
        cut_all(tmp_path, n=6, balance=True)


def test_balance_leaves_shared_windows_to_the_class_that_has_no_others(tmp_path):
    add(tmp_path, "a", [(1, 1, 66, 66, "Crack"), (1, 1, 65, 65, "Spallation")])      # 9 starts, 4 of them shared
    for seed in range(10):
        assert len(cut_all(tmp_path, n=8, balance=True, seed=seed)) == 8


def test_background_touches_no_box(tmp_path):
    taken = [(50, 40, 120, 90, ("Crack",)), (200, 100, 210, 110, ()), (280, 1, 300, 20, ("Background",)),
             (1, 150, 20, 170, ("Spallation",))]
    add(tmp_path, "a", taken)
    nowhere = (90, 1, 80, 80, ("Crack",))                              # a defect of which nobody knows the place
    add(tmp_path, "unsure", [(1, 1, 80, 80, ("Crack",)), nowhere], number=2)
    rows = cut_all(tmp_path, n=10, background=300)
    background = [(r, i) for r, i in rows if r["class"] == "Background"]
    assert len(rows) == 310 and len(background) == 300
    assert len({(r["photo"], r["x"], r["y"]) for r, _ in rows}) == 310
    for r, image in background:
        assert r["photo"] == "images/a.png" and r["box"] == "" and r["Background"] == 1 and r["Crack"] == 0
        x, y = r["x"], r["y"]
        assert np.array_equal(image, place_photo(300, 200)[y:y + 64, x:x + 64])
        for xmin, ymin, xmax, ymax, flags in taken:
            if flags != ("Background",):                               # which is no defect; without flags may be one
                assert x + 64 <= xmin - 1 or x >= xmax or y + 64 <= ymin - 1 or y >= ymax


def test_background_is_counted_exactly(tmp_path):
    boxes = [(1, 1, 300, 130, "Crack"), (1, 131, 300, 200, "Background")]
    add(tmp_path, "a", boxes)                                          # below the crack 70 rows: 7 x 237 starts
    assert len(cut_all(tmp_path, n=0, background=1659)) == 1659
    with pytest.raises(CropError, match="1660 windows without a defect wanted, 1659 distinct ones exist"):
        cut_all(tmp_path, n=0, background=1660)


def test_background_has_the_scale_of_the_defects(tmp_path):
    add(tmp_path, "a", [(1, 1, 200, 200, "Crack")], size=(900, 700))
    sides = [r["side"] for r, _ in cut_all(tmp_path, n=50, background=50, window="box") if r["class"] == "Background"]
    assert min(sides) >= 100 and max(sides) <= 200 and len(set(sides)) > 20
    assert {r["side"] for r, _ in cut_all(tmp_path, n=5, background=50)} == {64}


def test_small_skip(bridge):
    skipped = []
    rows = cut_all(bridge, n=60, small="skip", skipped=skipped)
    assert {r["box"] for r, _ in rows} == {0, 1} and reasons(skipped) == {"box with a side under 64 (--small skip)": 12}
    assert 2 in {r["box"] for r, _ in cut_all(bridge, n=60)}


def test_bad_arguments(bridge):
    for bad in (dict(window="x"), dict(label="x"), dict(small="x"), dict(n=-1), dict(size=0), dict(workers=0),
                dict(split={}), dict(split={"a": 0})):
        with pytest.raises(ValueError):
            cut_all(bridge, **bad)


# ---- splits ---------------------------------------------------------------------------------------------------------

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def test_no_photo_on_two_sides(tmp_path):
    for k in range(40):
        label = ["Crack", "Crack", "Spallation", "Efflorescence"][k % 4]
        add(tmp_path, f"p{k:02d}", [(1, 1, 150, 150, label)], size=(300 + k, 200))
    for seed in range(3):
        rows = [r for r, _ in cut_all(tmp_path, n=400, split=SHARES, background=20, seed=seed)]
        sides = collections.defaultdict(set)
        for r in rows:
            sides[r["photo"]].add(r["split"])
            assert r["file"].startswith(f"{r['split']}/{r['class']}/")
        assert all(len(s) == 1 for s in sides.values())
        parts = collections.Counter(r["split"] for r in rows if r["class"] != "Background")
        assert parts == {"train": 280, "val": 60, "test": 60}
        photos = collections.Counter(next(iter(s)) for s in sides.values())
        assert photos == {"train": 28, "val": 6, "test": 6}
        for part in SHARES:                                            # the rare classes are spread too
            assert {r["class"] for r in rows if r["split"] == part} >= {"Crack", "Spallation", "Efflorescence"}
    first = {r["photo"]: r["split"] for r, _ in cut_all(tmp_path, n=400, split=SHARES, seed=0)}
    assert first != {r["photo"]: r["split"] for r, _ in cut_all(tmp_path, n=400, split=SHARES, seed=1)}
    others = cut_all(tmp_path, n=400, split=SHARES, seed=0, window="box", balance=True)
    assert first == {r["photo"]: r["split"] for r, _ in others}        # one split for all choices


def test_equal_files_stay_together(tmp_path):
    for k in range(20):
        add(tmp_path, f"p{k:02d}", [(1, 1, 150, 150, "Crack")], number=k // 2)        # each photo twice under two names
    rows = cut_all(tmp_path, n=200, split={"train": 0.5, "test": 0.5})
    side = {r["photo"]: r["split"] for r, _ in rows}
    assert len(side) == 20
    assert all(side[f"images/p{k:02d}.png"] == side[f"images/p{k + 1:02d}.png"] for k in range(0, 20, 2))
    assert set(side.values()) == {"train", "test"}


def test_split_that_lacks_photos(tmp_path):
    add(tmp_path, "a", [(1, 1, 150, 150, "Crack")])
    with pytest.raises(CropError, match="windows in split test wanted, 0 distinct ones exist"):
        cut_all(tmp_path, n=20, split={"train": 0.5, "test": 0.5})


# ---- the command ----------------------------------------------------------------------------------------------------

def test_command_writes_what_it_says(bridge, tmp_path):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in bridge.rglob("*") if p.is_file()}
    (bridge / "annotations/late.xml").write_text("<html/>")
    sheet = tmp_path / "sheet.png"
    done = run(bridge, tmp_path / "crops", "--n", 50, "--background", 7, "--sheet", sheet, "--batch", code=2)
    assert done.stderr.count("\n") == 1 and not (tmp_path / "crops").exists()
    done = run(bridge, tmp_path / "crops", "--n=50", "--background", 7, "--sheet", sheet, "--workers", 2)
    rows = table(tmp_path / "crops")
    assert list(rows[0]) == ["file", "photo", "box", "x", "y", "side", "Background", "CorrosionStain", "Crack",
                             "Efflorescence", "ExposedBars", "Spallation", "class", "split"]
    files = {p.relative_to(tmp_path / "crops").as_posix() for p in (tmp_path / "crops").rglob("*.png")}
    assert files == {r["file"] for r in rows} and len(rows) == 57
    for r in rows:
        label, name = r["file"].split("/")
        stem = Path(r["photo"]).stem
        assert label == r["class"] and name == f"{stem}_{r['box'] or 'bg'}_{r['x']}_{r['y']}.png" and r["split"] == ""
        x, y = int(r["x"]), int(r["y"])
        with Image.open(bridge / r["photo"]) as photo, Image.open(tmp_path / "crops" / r["file"]) as crop:
            assert crop.mode == "RGB" and np.array_equal(np.asarray(crop), np.asarray(photo)[y:y + 64, x:x + 64])
    counts = collections.Counter(r["class"] for r in rows)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all([c, str(len({r["photo"] for r in rows if r["class"] == c})), str(n)] in lines for c, n in counts.items())
    assert ["all", "12", "57"] in lines
    assert "1  XML that is no VOC annotation: annotations/late.xml" in done.stdout
    with open(tmp_path / "crops/skipped.csv", newline="") as f:
        assert list(csv.reader(f)) == [["what", "where", "reason"],
                                       ["annotation", "annotations/late.xml", "XML that is no VOC annotation"]]
    with Image.open(sheet) as drawn:
        assert drawn.height == len(counts) * 66
    (bridge / "annotations/late.xml").unlink()
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in bridge.rglob("*") if p.is_file()}
    assert before == after                                             # the input is as it was


def test_sheet_has_a_row_per_class(bridge, tmp_path):
    cc.crop_folder(bridge, tmp_path / "c", tmp_path / "sheet.png", n=60)
    rows = table(tmp_path / "c")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for j, name in enumerate(sorted({r["class"] for r in rows})):
        images = [np.asarray(Image.open(tmp_path / "c" / r["file"])).tobytes() for r in rows if r["class"] == name]
        strip = sheet[j * 66:j * 66 + 64]
        for i in range(min(20, len(images))):
            assert strip[:, 130 + i * 66:194 + i * 66].tobytes() in images


def test_split_layout(bridge, tmp_path, capsys):
    call(capsys, bridge, tmp_path / "c", "--n", 60, "--split", "train=0.5,val=0.25,test=0.25")
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.is_dir()) == ["test", "train", "val"]
    assert len(list((tmp_path / "c/train").glob("*/*.png"))) == 30
    rows = table(tmp_path / "c")
    assert all(len({r["split"] for r in rows if r["photo"] == p}) == 1 for p in {r["photo"] for r in rows})


def test_same_bytes_for_any_workers_and_directory_order(bridge, tmp_path, monkeypatch):
    choices = dict(n=70, size=64, seed=3, window="box", label="random", balance=True, background=9,
                   split={"train": 0.5, "test": 0.5})
    copy = tmp_path / "copy"
    broken_photos(bridge)                                              # skipped.csv, too, must not depend on the order
    for k in range(4):
        shutil.copy(bridge / f"annotations/image_000000{k + 1}.xml", bridge / f"images/image_000000{k + 1}.xml")
    cc.crop_folder(bridge, tmp_path / "one", **choices, workers=1)
    cc.crop_folder(bridge, tmp_path / "five", **choices, workers=5)
    files = [p for p in bridge.rglob("*") if p.is_file()]
    for p in sorted(files, reverse=True):
        (copy / p.relative_to(bridge)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(p, copy / p.relative_to(bridge))
    walk = os.walk

    def backwards(*a, **k):
        for folder, folders, names in walk(*a, **k):
            folders.reverse()
            yield folder, folders, sorted(names, key=lambda n: hashlib.md5(n.encode()).digest())
    monkeypatch.setattr(os, "walk", backwards)
    cc.crop_folder(copy, tmp_path / "other", **choices, workers=3)
    one = tree(tmp_path / "one")
    assert len(one) == 81 and one == tree(tmp_path / "five") == tree(tmp_path / "other")
    cc.crop_folder(bridge, tmp_path / "seed", **{**choices, "seed": 4}, workers=1)
    assert one != tree(tmp_path / "seed")


def count_decodes(monkeypatch):
    counts, load = collections.Counter(), ImageFile.ImageFile.load

    def counted(self):
        if self.tile:                                                  # load() of a decoded picture does nothing
            counts[Path(self.filename).name] += 1
        return load(self)
    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return counts


def test_each_chosen_photo_is_decoded_once_and_no_other(bridge, monkeypatch):
    counts = count_decodes(monkeypatch)
    rows = cut_all(bridge, n=200, background=20, window="box")
    assert counts == {f"image_{k + 1:07d}.png": 1 for k in range(12)}
    counts.clear()
    rows = cut_all(bridge, n=4)
    assert counts == {Path(p).name: 1 for p in {r["photo"] for r, _ in rows}} and len(counts) <= 4


def test_replacing_a_broken_photo_prefers_photos_not_yet_decoded(tmp_path, monkeypatch):
    for k in range(12):
        boxes = [(1, 1, 150, 150, "Crack"), (51, 1, 200, 150, "Crack"), (101, 1, 250, 150, "Crack")]
        add(tmp_path, f"p{k:02d}", boxes, number=k)
    for k in range(4):
        path = tmp_path / f"images/p{k:02d}.png"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    counts = count_decodes(monkeypatch)
    for seed in range(8):
        counts.clear()
        assert len(cut_all(tmp_path, n=6, seed=seed)) == 6
        assert max(counts.values()) == 1


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_killed_half_way_nothing_has_the_final_name(bridge, tmp_path, how, code):
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(Path(cc.__file__)), bridge, out / "crops", "--n", "30000", "--workers", "1",
               "--sheet", out / "sheet.png"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # a shell ignores it
    until = time.monotonic() + 30
    while not list(out.rglob("*.png")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in stderr
    left = [p.name for p in out.iterdir()]
    assert "crops" not in left and "sheet.png" not in left
    assert how == signal.SIGKILL or left == []                         # who may still tidy up does
    run(bridge, out / "crops", "--n", 10)                              # a dead run is not in the way of the next
    assert len(table(out / "crops")) == 10


def test_a_failing_disk_leaves_nothing(bridge, tmp_path, monkeypatch):
    def full(self, path, *a, **k):
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(Image.Image, "save", full)
    assert cc.main([str(bridge), str(tmp_path / "crops"), "--n", "5"]) == 2
    assert not (tmp_path / "crops").exists() and [p.name for p in tmp_path.iterdir()] == ["original_dataset"]


def test_the_last_step_is_one_renaming(bridge, tmp_path, monkeypatch):
    seen = []

    def refuse(self, target):
        seen.append(len(tree(self)))
        assert not Path(target).exists()
        raise PermissionError(13, "Permission denied", str(target))
    monkeypatch.setattr(Path, "rename", refuse)
    assert cc.main([str(bridge), str(tmp_path / "crops"), "--n", "5"]) == 2
    assert seen == [7]                                                 # five crops and two tables were complete
    assert [p.name for p in tmp_path.iterdir()] == ["original_dataset"]


def test_all_broken_is_one_line(tmp_path, capsys):
    add(tmp_path / "d", "a", [(1, 1, 90, 90, "Crack")], suffix=".jpg").write_bytes(b"")
    err = call(capsys, tmp_path / "d", tmp_path / "crops", "--n", 5, code=2).err
    assert "0 exist" in err and err.count("\n") == 1 and not (tmp_path / "crops").exists()


def csv_rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
        return list(csv.reader(f))


@pytest.mark.parametrize("choices, said", [
    (["--n", "9"], "9 windows wanted, 0 exist"),
    (["--n", "9", "--size", "250"], "9 windows wanted, 0 exist"),
    (["--n", "0", "--background", "9"], "9 windows without a defect wanted, 0 distinct ones exist"),
    (["--n", "9", "--balance", "--small", "skip"], "9 windows wanted, 0 exist"),
])
def test_too_few_windows_come_with_the_reasons(tmp_path, capsys, choices, said):
    for k in range(3):
        add(tmp_path / "d", f"p{k}", [(1, 1, 90, 90, "")], number=k)
    text_at(tmp_path / "d", "annotations/=x.xml", "<annotation>")
    assert cc.main([str(tmp_path / "d"), str(tmp_path / "c"), *choices]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and said in err and "box without a class (3 of " in err, err
    assert "       3  box without a class: annotations/p0.xml object 0, ..." in out.splitlines()
    assert f"all in {tmp_path}/c.skipped.csv" in err
    rows = csv_rows(tmp_path / "c.skipped.csv")
    assert rows[0] == ["what", "where", "reason"] and len(rows) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.skipped.csv", "d"]


def test_broken_photos_that_leave_too_few_windows_are_listed_too(tmp_path, capsys):
    add(tmp_path / "d", "good", [(1, 1, 66, 66, "Crack")])
    path = add(tmp_path / "d", "cut", [(1, 1, 300, 200, "Crack")])
    path.write_bytes(path.read_bytes()[:200])
    assert cc.main([str(tmp_path / "d"), str(tmp_path / "c"), "--n", "30"]) == 2
    assert "9 distinct ones exist (1 damaged photos left out)" in capsys.readouterr().err
    left_out = csv_rows(tmp_path / "c.skipped.csv")[1:]
    assert left_out == [["photo", "images/cut.png", "photo that is truncated or damaged"]]


def test_no_spreadsheet_runs_a_name(tmp_path):
    for k, name in enumerate(["=cmd|'calc'!A0", "+1", "-1", "@sum", "plain"]):
        photo_at(tmp_path / "d", f"{name}.png", k)
        voc_at(tmp_path / "d", f"{name}.xml", "", (1, 1, 90, 70, name))
        photo_at(tmp_path / "d", f"{name}_alone.png", k)
    assert cc.main([str(tmp_path / "d"), str(tmp_path / "c"), "--n", "20"]) == 0
    cells = [cell for name in ("crops", "skipped") for row in csv_rows(tmp_path / f"c/{name}.csv") for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@")] and "'+1.png" in cells and "'-1" in cells
    folders = {r["file"].split("/")[0] for r in table(tmp_path / "c")}
    assert folders == {"_=cmd_'calc'!A0", "_+1", "_-1", "_@sum", "plain"}


def test_every_photo_is_counted(bridge, tmp_path, capsys):
    broken = broken_photos(bridge)
    photo_at(bridge, "images/alone.png")
    text_at(bridge, "images/new.heic", "?")
    cc.crop_folder(bridge, tmp_path / "c", n=5)
    out = capsys.readouterr().out.splitlines()
    n_cut = len({r["photo"] for r in table(tmp_path / "c")})
    n_out = sum(row[0] == "photo" for row in csv_rows(tmp_path / "c/skipped.csv"))
    found = 12 + len(broken) + 2
    assert out[-2] == f"{found} photos found: {n_cut} cropped, {found - n_cut - n_out} not needed, {n_out} left out"


def test_broken_photos_are_named_by_the_command(tmp_path, capsys):
    broken_photos(tmp_path / "d")
    add(tmp_path / "d", "good", [(1, 1, 90, 90, "Crack")])
    out, err = call(capsys, tmp_path / "d", tmp_path / "crops", "--n", 5)
    for name in ("cut_jpg.jpg", "cut_png.png", "empty.jpg", "text.jpg", "flipped.png"):
        assert f"images/{name}: " in err
    assert "4  photo that is truncated or damaged" in out


def test_underscores_and_an_empty_target(bridge, tmp_path, capsys):
    (tmp_path / "crops").mkdir()
    call(capsys, bridge, "--n", 5, tmp_path / "crops/", "--window=native")
    assert len(table(tmp_path / "crops")) == 5


def test_odd_names(tmp_path):
    root = tmp_path / "d ü 日本"
    names = ["with space", "日本", "a_1", "a", "x" * 200, "-dash", "50%", "quote'\"",
             "line\nbreak" if os.name == "posix" else "l"]
    for k, name in enumerate(names):
        add(root, name, [(1, 1, 90, 90, "Riß 日本")], number=k)
    done = run(root, tmp_path / "crops", "--n", 50, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    rows = table(tmp_path / "crops")
    assert {Path(r["photo"]).stem for r in rows} == set(names) and "50" in done.stdout
    assert all((tmp_path / "crops" / r["file"]).is_file() for r in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a file name be no text")
def test_a_file_name_that_is_no_text(tmp_path):
    add(tmp_path / "d", "a", [(1, 1, 90, 90, "Crack")])
    for suffix in (".png", ".xml"):
        folder = tmp_path / "d" / ("images" if suffix == ".png" else "annotations")
        os.rename(os.fsencode(folder / f"a{suffix}"), os.fsencode(folder) + b"/b\xff" + suffix.encode())
    run(tmp_path / "d", tmp_path / "crops", "--n", 5)
    assert len(list((tmp_path / "crops/Crack").iterdir())) == 5


def test_a_class_called_like_a_column(tmp_path, capsys):
    add(tmp_path / "d", "a", [(1, 1, 90, 90, "side")])
    call(capsys, tmp_path / "d", tmp_path / "crops", "--n", 3)
    assert all(r["side"] == "64" and r["side_"] == "1" and r["class"] == "side" for r in table(tmp_path / "crops"))


def test_progress(monkeypatch, capsys):
    clock = iter([0.0, 5.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = cc.Progress("photos, {} crops")
    for done in (1, 2, 3, 4):
        progress(done, 8, done * 3)
    assert capsys.readouterr().err.splitlines() == ["2/8 photos, 6 crops, 60 s left", "4/8 photos, 12 crops, 40 s left"]


# ---- real data, cost ------------------------------------------------------------------------------------------------

def test_real_voc_set(shared, tmp_path):
    """NEU-DET: 1800 photos of 200x200, 4189 boxes; 188 of another class than their file, 174 <filename>s cut."""
    neu = shared / "data/neu"
    photos, skipped = read_annotations(neu)
    assert len(photos) == 1800 and reasons(skipped) == {"box given again (its labels joined to the first)": 3}
    boxes = [b for p in photos for b in p.boxes]
    assert len(boxes) == 4186
    shorter = [min(b.x1 - b.x0, b.y1 - b.y0) for b in boxes]
    longer = [max(b.x1 - b.x0, b.y1 - b.y0) for b in boxes]
    assert sum(s >= 64 for s in shorter) == 1282                       # counted inclusively: xmax - xmin + 1
    assert sum(s < 64 < l for s, l in zip(shorter, longer)) == 1915    # 1916 with those given twice: no corner case
    by_name = {p.name: p for p in photos}
    rows = list(crops(photos, n=2642, workers=2))
    assert len({(r["photo"], r["x"], r["y"]) for r, _ in rows}) == 2642
    assert {r["class"] for r, _ in rows} == {"crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale",
                                             "scratches"}
    for r, image in rows:
        b = next(b for b in by_name[r["photo"]].boxes if b.index == r["box"])
        assert b.flags == (r["class"],) and 0 <= r["x"] <= 136 and 0 <= r["y"] <= 136
        for start, first, last in ((r["x"], b.x0, b.x1), (r["y"], b.y0, b.y1)):
            if last - first >= 64:
                assert first <= start and start + 64 <= last
            else:
                assert start <= first and last <= start + 64
    for r, image in rows[::97]:
        with Image.open(by_name[r["photo"]].path) as photo:
            assert np.array_equal(image, np.asarray(photo.convert("RGB"))[r["y"]:r["y"] + 64, r["x"]:r["x"] + 64])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Ten photos of CODEBRIM's commonest sizes, 16 to 24 megapixels, three boxes each."""
    root = tmp_path_factory.mktemp("big")
    tile = synthetic.finish(synthetic.concrete(cc.Dice(0), 700, 900, 420.0, (0.0, -1.0)), cc.Dice(1))
    for k, (w, h) in enumerate([(4608, 3456)] * 5 + [(6000, 3376)] * 3 + [(6000, 4000)] * 2):
        boxes = [(200 + 700 * j + 13 * k, 300 + 500 * j, 800 + 700 * j, 900 + 500 * j, "Crack") for j in range(3)]
        image = Image.fromarray(np.tile(np.roll(tile, 31 * k, 1), (-(-h // 700), -(-w // 900), 1))[:h, :w])
        add(root, f"image_{k + 1:07d}", boxes, size=(w, h), suffix=".jpg", image=image, quality=88)
    return root


def decode_only(root):
    def load():
        for path in sorted((root / "images").iterdir()):
            with Image.open(path) as image:
                image.load()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:             # a thread, as in crops(): glibc's heaps differ
        pool.submit(load).result()


def test_processor_time_is_that_of_decoding_once(big, tmp_path):
    """Reading, choosing, decoding, cutting and writing of 3 crops a photo against decoding the ten photos alone."""
    ratios = []
    for k in range(5):
        start = time.process_time()
        decode_only(big)
        middle = time.process_time()
        cc.crop_folder(big, tmp_path / f"c{k}", n=30)
        ratios.append((time.process_time() - middle) / (middle - start))
        if sum(ratio <= 1.15 for ratio in ratios) == 3:                # the median of five is
            return
    assert sorted(ratios)[2] <= 1.15, ratios


def spin(n):
    while n:
        n -= 1


def test_two_workers_halve_the_time(big, tmp_path):
    def pair(target, arguments):
        start = time.perf_counter()
        context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
        processes = [context.Process(target=target, args=a) for a in arguments]
        [p.start() for p in processes]
        [p.join() for p in processes]
        return time.perf_counter() - start
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    many = tmp_path / "many"                                           # thirty: one more on one side matters little
    for path in sorted(p for p in big.rglob("*") if p.is_file()):
        (many / path.parent.name).mkdir(parents=True, exist_ok=True)
        for k in "abc":
            os.link(path, many / path.parent.name / (k + path.name))
    best, free = {1: float("inf"), 2: float("inf")}, []
    for k in range(6):                                                 # other load only adds time: the best counts
        free.append(pair(spin, [(4_000_000,)] * 2) / pair(spin, [(4_000_000,)]))
        for workers in best:
            start = time.perf_counter()
            cc.crop_folder(many, tmp_path / f"c{k}_{workers}", n=90, workers=workers)
            best[workers] = min(best[workers], time.perf_counter() - start)
        if k >= 1 and best[2] <= 0.6 * best[1]:
            return
        if k >= 2 and sorted(free)[k // 2] > 1.15:
            pytest.skip(f"two processes take {sorted(free)[k // 2]:.2f} of one's time here: the second core is busy")
    assert best[2] <= 0.6 * best[1], best


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("workers", [1, 4])
def test_peak_memory(big, tmp_path, workers):
    # VmHWM, not ru_maxrss: that one keeps the size of the parent that forked
    script = ("import sys, crop_codebrim as c\n"
              "code = c.main(sys.argv[1:])\n"
              "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
              "sys.exit(code)")
    command = [sys.executable, "-c", script, big, tmp_path / "c", "--n", "90", "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True,
                          cwd=Path(cc.__file__).parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rsplit("peak", 1)[1]) / 1024 <= 300 + 80 * workers
