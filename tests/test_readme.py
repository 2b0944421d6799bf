"""The READMEs say nothing that does not work: their commands, flags, links and examples; the front page is short."""
import argparse
import http.server
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

import okd_train

PAGES = ("README.md", "tests/README.md", "kernels/README.md")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pages(root):
    return {page: (root / page).read_text() for page in PAGES}


@pytest.fixture(scope="module")
def front(pages):
    return pages["README.md"]


@pytest.fixture(scope="module")
def blocks(front):
    return re.findall(r"```python\n(.*?)```", front, re.S)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve photos in two of the front page's classes, drawn faster than the synthetic set."""
    folder = tmp_path_factory.mktemp("own") / "photos"
    for name in ("Crack", "Rust"):
        (folder / name).mkdir(parents=True)
        for k in range(6):
            tone = (20 * k, 90, 120 if name == "Crack" else 200)
            Image.new("RGB", (90, 70), tone).save(folder / name / f"{k}.jpg")
    return folder


# ---------------------------------------------------------------------------------------------- the front page
def test_the_front_page_is_short(front, blocks):
    assert len(front.splitlines()) <= 200 and len(front.encode()) <= 15_000
    assert max(map(len, front.splitlines())) <= 120
    gan = next(b for b in blocks if "# my_gan.py" in b)
    assert len(gan.splitlines()) <= 42


def test_the_commands_stand_at_the_top(front):
    lines = front.splitlines()
    top = "\n".join(lines[:35])
    assert "requirements.txt && torchrun okd_train.py --model sagan --groups 3 --quick\n" in top
    assert "python fid.py real/ fake/\n" in top and "requirements.txt && pytest\n" in top
    assert re.search(r"!\[.*\]\(tests/assets/\w+\.png\)", top)
    own = "\n".join(lines[:60])
    for what in ("--data photos/", "--quick", "14 hours", "sample.py", "--group best", "fid.py photos/ made/ --copies"):
        assert what in own, what


def test_every_script_stands_in_the_table(front, root):
    named = re.findall(r"^\| `([\w.]+)/?` \| .*`python (?:-m )?([\w.]+)", front, re.M)
    rooms = {p.name for p in root.glob("*.py")} | {"kernels"}
    assert {name for name, _ in named} == rooms
    for name, command in named:
        assert command == name or command == "kernels.bench_attention", name


def test_what_is_to_be_changed_is_there(front, root):
    rows = re.findall(r"^\| .* \| `([\w.]+)` in (\w+\.py)", front, re.M)
    assert len(rows) == 7
    for name, file in rows:
        text = (root / file).read_text()
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", text, re.M), name
    quoted, = re.findall(r'next_inputs` in okd_train.py: "(.*?)"', front)
    assert (root / "okd_train.py").read_text().count(quoted) == 1


def test_the_contract_is_the_trainers(front, root):
    names = [re.split(r"[`(]", row)[1] for row in re.findall(r"^\| (.*?) \| (?:yes|no) \|", front, re.M)]
    more = re.findall(r"^\| `autocast`, `(channels_last)` ", front, re.M)
    script = okd_train.Script(str(root / "sagan.py"))
    assert set(names + more) == {name for name in vars(script) if name not in ("path", "name", "conditional")}


def test_every_named_file_exists(pages, root):
    for page, text in pages.items():
        for path in re.findall(r"\]\(([\w/.-]+)\)", text):
            assert (root / page).parent.joinpath(path).is_file(), f"{page}: {path}"
            if path.endswith(".png"):
                assert Image.open(root / path).width > 300
        for path in re.findall(r"\b(?:tests|kernels)/\w+\.py\b", text):
            assert (root / path).is_file(), f"{page}: {path}"


def test_top_level_holds_only_the_rooms(root):
    rooms = {"sagan.py", "acgan.py", "okd_train.py", "fid.py", "crop_codebrim.py", "sample.py", "report.py",
             "bench.py", "compare.py", "labels.py", "synthetic.py", "kernels", "tests", "requirements.txt", "README.md",
             ".ci", ".gitignore"}
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in tracked.stdout.splitlines()} <= rooms


# ---------------------------------------------------------------------------------------------- measured numbers
DAY = r"20\d\d-\d\d-\d\d"
UNIT = r"\d (?:ms|s|min|images/s|img/s|MB|GB)\b|s/step|milliseconds"


def test_measured_tables_have_a_date_and_a_machine(pages):
    """Between a table of measured numbers and the heading above it stands a date; the page names the machine."""
    seen = 0
    for page, text in pages.items():
        for section in re.split(r"^#+ ", text, flags=re.M):
            tables = re.findall(r"(?:^\|.*\n)+", section, re.M)
            for table in tables:
                if re.search(UNIT, table):
                    assert re.search(DAY, section), f"{page}: {table}"
                    seen += 1
        assert not re.search(UNIT, text) or "AMD EPYC" in text, page
    assert seen >= 9


# ---------------------------------------------------------------------------------------------- commands
PROGRAM = r"(?:[A-Z_]+=\S+ )*(?:time )?(?:python|torchrun|pytest|\.ci/gpu)\b"


def parts(text):
    """A page -> its lines of code that are not Python or a script of sh, and all other text as one line."""
    code, prose, fence = [], [], None
    for line in text.splitlines():
        if line.startswith("```"):
            fence = line if fence is None else None
        elif fence == "```" or fence is None and line.startswith("    "):
            code.append(line.strip())
        elif fence is None:
            prose.append(line)
    return code, " ".join(prose)


def commands(text):
    """Every command of a page as a list of words, from blocks and from `inline code`."""
    code, prose = parts(text)
    lines = [re.sub(" +# .*", "", line) for line in code] + re.findall("`([^`]+)`", prose)
    lines = [part for line in lines for part in ([line] if " -c " in line else re.split(" && |; ", line))]
    return [words(line) for line in lines if re.match(PROGRAM, line)]


def words(line):
    """Without what is set in the environment, timed or piped in; a program that -c gives goes over several lines."""
    found = ["python", "-c"] if line.startswith("python -c") else shlex.split(line.split(" <<")[0])
    return [w for w in found if w != "time" and not re.match("[A-Z_]+=", w)]


class Accepted(BaseException):
    """Raised in place of the work, once a parser has taken its arguments."""


@pytest.fixture
def accepts(monkeypatch, root, tmp_path):
    """A function (words of a command) that fails where its script does not exist or refuses the arguments."""
    monkeypatch.chdir(tmp_path)

    inside = []                                                     # one method of a parser calls another

    def raising(method):
        def then(parser, *args, **more):
            if inside or not parser.add_help:                       # without: a first look for --model alone
                return method(parser, *args, **more)
            inside.append(parser)
            try:
                method(parser, *args, **more)
            finally:
                inside.pop()
            raise Accepted
        return then
    for name in ("parse_args", "parse_intermixed_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, raising(getattr(argparse.ArgumentParser, name)))

    def script(name, argv):
        assert (root / name).is_file(), name
        if name.startswith("tests/test_"):
            return
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        if not hasattr(module, "main"):                             # a model script hands itself to the trainer
            module, argv = okd_train, ["--model", str(root / name), *argv]
        monkeypatch.setattr(sys, "argv", [name, *(a for a in argv if a != "--help")])
        with pytest.raises(Accepted):
            module.main()

    def check(program, *argv):
        if program == "pytest":
            files = [root / a for a in argv if a.startswith("tests/")] or (root / "tests").glob("test_*.py")
            words = argv[argv.index("-k") + 1].split() if "-k" in argv else []
            text = "".join(f.read_text() for f in files)
            assert all(re.search(rf"def test_\w*{word}", text) for word in {*words} - {"not", "and", "or"}), argv
        elif program == ".ci/gpu":
            assert re.search(rf"\b{argv[0]}\b", (root / program).read_text()), argv
        elif program == "torchrun":
            at = next(i for i, a in enumerate(argv) if a.endswith(".py"))
            known = {x for action in get_args_parser()._actions for x in action.option_strings}
            assert {a for a in argv[:at] if a.startswith("-")} <= known, argv
            script(argv[at], argv[at + 1:])
        elif argv[0] == "-m":
            assert argv[1] == "pytorch_fid" or script(argv[1].replace(".", "/") + ".py", argv[2:]) is None
        elif argv[0] not in ("-", "-c", "..."):
            script(argv[0], argv[1:])
    return check


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_taken_by_its_script(page, pages, accepts):
    found = commands(pages[page])
    assert len(found) >= {"README.md": 20, "tests/README.md": 15, "kernels/README.md": 3}[page]
    for command in found:
        accepts(*command)


def test_every_command_of_the_gpu_script_is_taken(root, accepts):
    lines = re.findall(r"^ +(?:try \S+ \d+ )?((?:python|pytest) .*)", (root / ".ci" / "gpu").read_text(), re.M)
    assert len(lines) >= 8
    for line in lines:
        accepts(*shlex.split(line.replace("$more", "").split(" &")[0]))


def test_every_flag_exists(pages, root, capsys):
    """Also of those that stand alone in a sentence."""
    benches = ["kernels.bench_attention", "tests.bench_step", "tests.bench_ranks", "tests.bench_recipe"]
    for name in [p.stem for p in root.glob("*.py")] + benches:
        module = importlib.import_module(name)
        with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as m:
            m.setattr(sys, "argv", [name, "--help"])
            module.main() if hasattr(module, "main") else okd_train.main(["--model", module.__file__, "--help"])
    known = capsys.readouterr().out
    others = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--width", "--num-workers"}
    for page, text in pages.items():
        for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - others:
            assert re.search(rf"{flag}\b", known), f"{page}: {flag}"


# ---------------------------------------------------------------------------------------------- what runs, tiny
def python(*words, **more):
    p = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=ENV, timeout=120, **more)
    assert p.returncode == 0, p.stderr[-4000:]
    return p.stdout


def test_the_own_gan_trains_and_samples(blocks, photos, tmp_path):
    text = next(b for b in blocks if "# my_gan.py" in b)
    (tmp_path / "my_gan.py").write_text(text)
    command, = re.findall(r"# my_gan.py: python okd_train.py (--model .*) --width 64", text)
    tiny = ["--width", "4", "--steps", "3", "--batch-size", "4", "--data", str(photos)]
    python(okd_train.__file__, *command.split(), *tiny, cwd=tmp_path)
    out = tmp_path / "runs" / "my_gan-2"
    G = okd_train.load_generator(out / "G1.pt", model=str(tmp_path / "my_gan.py"))
    assert G(torch.randn(2, 64)).shape == (2, 3, 32, 32)
    assert okd_train.load_file(out / "G1.pt")["kwargs"] == {"z_dim": 64, "width": 4}


def test_the_four_lines_need_only_sagan(blocks, photos, root, tmp_path):
    text = next(b for b in blocks if "sagan.Generator" in b)
    assert len(text.splitlines()) == 4
    out = str(tmp_path / "runs" / "sagan-3")
    tiny = ["--ch", "4", "--batch-size", "2", "--steps", "1"]
    okd_train.main(["--groups", "3", *tiny, "--data", str(photos), "--out", out])
    shutil.copy(root / "sagan.py", tmp_path)
    code = "\nassert images.shape == (16, 3, 64, 64) and images.abs().max() <= 1"
    python("-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{text}{code}", cwd=tmp_path)


INSPECTOR = {                                   # what stands in the block for own photos: what runs here
    "--out runs/look --quick": "--out runs/look --quick --ch 4 --batch-size 4 --steps 2 --nproc 1",
    "--out runs/mine --recipe small": "--out runs/mine --recipe small --image-size 32 --ch 4 --batch-size 4 --steps 2 "
                                      "--fid-features random --fid-samples 8",
    "--per-class 200": "--per-class 4",
    "fid.py photos/ made/": "fid.py photos/ made/ --features random",
}


def test_the_way_from_own_photos_to_checked_images(front, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "photos")
    block = front[front.index("## Your own photos"):front.index("- **Time.**")]
    for there, here in INSPECTOR.items():
        assert block.count(there) == 1, there
        block = block.replace(there, here)
    lines = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (python .*)", block, re.M)]
    assert [line[0] for line in lines] == ["okd_train.py", "okd_train.py", "sample.py", "report.py", "fid.py"]
    for file, *argv in lines:
        importlib.import_module(file.removesuffix(".py")).main(argv)
    printed = capsys.readouterr()
    made = sorted(p.relative_to(tmp_path / "made") for p in (tmp_path / "made").rglob("*.png"))
    best, = {path.parts[0] for path in made}
    assert best in ("G1", "G2", "G3") and {path.parts[1] for path in made} == {"Crack", "Rust"} and len(made) == 8
    assert Path(best, "Crack", "000000.png") in made and (tmp_path / "made/manifest.csv").is_file()
    assert (tmp_path / "runs/mine/report.html").is_file() and Image.open("pairs.png").width > 100
    assert "cop" in printed.out and "floor" in printed.out


def test_the_log_goes_to_another_tool(blocks, photos, tmp_path, monkeypatch):
    """Each line of log.jsonl arrives at a server, as the front page has it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "photos")
    got = []

    class Tool(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass
    text = next(b for b in blocks if "on_log" in b)
    assert len(text.splitlines()) == 3
    with http.server.HTTPServer(("127.0.0.1", 0), Tool) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(okd_train, "on_log", None)
        text = text.replace("localhost:8000", f"127.0.0.1:{server.server_port}")
        tiny = '"--ch", "4", "--batch-size", "2", "--steps", "2", "--log-every", "1"])'
        exec(text.replace('"])', f'", {tiny}'), {})
        server.shutdown()
    lines = (tmp_path / "runs/sagan-3/log.jsonl").read_text().splitlines()
    assert got == [json.loads(line) for line in lines] and [line["step"] for line in got] == [1, 2]


TINY = {                                        # what stands in the recipe: what runs here; each stands there once
    "synthetic.py original_dataset/": "synthetic.py original_dataset/ --photos 9",
    "original_dataset/ crops/": "original_dataset/ crops/ --n 60 --size 32",
    "--seeds 10 --steps 50000": "--seeds 1 --steps 2 --image-size 32 --ch 4 --batch-size 4 --features colours.py",
}
COLOURS = """
import torch
class Features(torch.nn.Module):
    size, dims, digest = 32, 3, "colours"
    def forward(self, x):
        return x.mean((2, 3))
"""


def test_the_recipe_runs_from_photos_to_the_papers_table(pages, root, tmp_path):
    (script,) = re.findall(r"```sh\n(.*?)```", pages["tests/README.md"], re.S)
    for there, here in TINY.items():
        assert script.count(there) == 1, there
        script = script.replace(there, here)
    lines = [shlex.split(line, comments=True) for line in script.splitlines()]
    assert [line[1] for line in lines] == ["synthetic.py", "crop_codebrim.py", "compare.py"]
    (tmp_path / "colours.py").write_text(COLOURS)
    for _, file, *argv in lines:
        p = subprocess.run([sys.executable, str(root / file), *argv], cwd=tmp_path, env=ENV, capture_output=True,
                           text=True, timeout=300)
        assert p.returncode == 0, p.stderr[-4000:]
    table = [re.split("  +", line.strip()) for line in p.stdout.splitlines()[-8:]]
    head = ["FD (colours)", "runs", "mean over groups", "best by validation", "union"]
    assert table[0] == head and [row[0] for row in table[1:4]] == ["ring", "alone", "single"]
    assert [row[2:] for row in table[4:6]] == [["132.13", "118.23"], ["139.76"]]
    assert all(float(cell) > 0 for row in table[1:4] for cell in row[1:])
    assert (tmp_path / "study/study.html").is_file()
