"""The house: lines and functions are short, imports run one way, nothing is written twice, the method comes first."""
import ast
import collections
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
OURS = {path.stem for path in ROOT.glob("*.py")} | {"kernels"}

# Who may import whom. okd_train.beside("fid") and okd_train.kernel("attention") are imports, too.
ARROWS = {
    "sagan": {"kernels"},                       # and okd_train where the file is run
    "acgan": set(),
    "okd_train": {"fid", "synthetic", "labels", "kernels"},
    "fid": set(),
    "labels": {"fid"},
    "crop_codebrim": set(),
    "synthetic": {"crop_codebrim"},
    "sample": {"okd_train", "fid", "kernels"},
    "bench": {"okd_train", "fid", "kernels"},
    "report": {"okd_train", "sample", "fid", "labels", "kernels"},
    "compare": {"okd_train", "sample", "fid", "labels", "bench", "report"},
    "kernels": {"kernels", "fid"},
}
RUN = {"sagan": {"okd_train"}, "acgan": {"okd_train"}}              # under `if __name__ == "__main__":` alone
COPYABLE = {"sagan.py", "acgan.py", "fid.py", "crop_codebrim.py", "attention.py"}   # each alone, so they may repeat


def parsed(path):
    return ast.parse(path.read_text(), str(path))


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


each_script = pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
each_file = pytest.mark.parametrize("path", SCRIPTS + TESTS, ids=names(SCRIPTS + TESTS))


def test_every_file_is_looked_at():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    present = {line for line in tracked.stdout.splitlines() if (ROOT / line).exists()}
    assert present <= set(names(SCRIPTS + TESTS))


# ---------------------------------------------------------------------------------------------- lines and functions
@each_file
def test_no_line_is_wider_than_120_columns(path):
    wide = [k for k, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert not wide


@each_file
def test_one_statement_a_line(path):
    """`x = 1; y = 2` and `if x: y` hide half of what they do."""
    def crowded(tree):
        for node in ast.walk(tree):
            for block in (getattr(node, name, []) for name in ("body", "orelse", "finalbody")):
                statements = block if isinstance(block, list) else []
                for a, b in zip([node, *statements], statements):
                    chained = isinstance(node, ast.If) and isinstance(b, ast.If) and block is node.orelse   # elif
                    if getattr(a, "lineno", 0) == b.lineno and not chained and not isinstance(node, ast.Module):
                        yield b.lineno
                for a, b in zip(statements, statements[1:]):
                    if a.end_lineno == b.lineno:
                        yield b.lineno
    assert not sorted(set(crowded(parsed(path))))


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@each_script
def test_no_function_is_longer_than_70_lines(path):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(parsed(path))}
    assert not {name: n for name, n in long.items() if n > 70}


# ---------------------------------------------------------------------------------------------- imports
def under_main(tree):
    """The nodes below `if __name__ == "__main__":`."""
    tests = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    return {node for test in tests for node in ast.walk(test)}


def imports(path):
    """{name of ours that a script imports: whether only where it is run}."""
    tree = parsed(path)
    run, found = under_main(tree), collections.defaultdict(list)
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "kernels"] if not node.level else ["kernels"]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("beside", "import_module", "__import__"):
                modules = [str(node.args[0].value)]
            elif called == "kernel":
                modules = ["kernels"]
        elif isinstance(node, ast.Constant) and node.value in {f"{name}.py" for name in OURS - {path.stem}}:
            modules = [node.value[:-3]]                             # loaded from its place
        for module in modules:
            if module.split(".")[0] in OURS:
                found[module.split(".")[0]].append(node in run)
    return {name: all(places) for name, places in found.items()}


def room(path):
    return "kernels" if path.parent.name == "kernels" else path.stem


@each_script
def test_imports_follow_the_arrows(path):
    for name, only_run in imports(path).items():
        assert name in ARROWS[room(path)] or only_run and name in RUN.get(room(path), set()), name


def test_no_import_leads_back():
    """Where a script is run, it may hand itself to the trainer, which imports it again: that is no circle."""
    ahead = collections.defaultdict(set)
    for path in SCRIPTS:
        ahead[room(path)] |= {name for name, only_run in imports(path).items() if not only_run} - {room(path)}
    assert ahead["sample"] | ahead["report"] | ahead["bench"] and "fid" in ahead["okd_train"]   # they are found at all
    while ahead:
        last = [name for name, others in ahead.items() if not others & ahead.keys()]
        assert last, dict(ahead)
        for name in last:
            del ahead[name]


@each_script
def test_what_begins_with_an_underscore_stays_at_home(path):
    tree = parsed(path)
    known = OURS | {p.stem for p in SCRIPTS}
    for node in ast.walk(tree):                                     # also under another name
        if isinstance(node, ast.Import):
            known |= {alias.asname for alias in node.names if alias.asname and alias.name.split(".")[0] in OURS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private, (node.lineno, private)
            known |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if ast.unparse(node.value.func).split(".")[-1] in ("beside", "kernel", "import_module"):
                known |= {ast.unparse(target).split(".")[-1] for target in node.targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            direct = ast.unparse(node.value.func).split(".")[-1] if isinstance(node.value, ast.Call) else ""
            assert owner.split(".")[-1] not in known and direct not in ("beside", "kernel"), (node.lineno, node.attr)


# ---------------------------------------------------------------------------------------------- nothing twice
def runs_of_lines(path, n=10):
    """{n non-blank lines in a row, without their outer blanks: number of the first}."""
    lines = [(k, line.strip()) for k, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    return {tuple(text for _, text in lines[k:k + n]): lines[k][0] for k in range(len(lines) - n + 1)}


def test_no_ten_lines_stand_in_two_scripts():
    seen, twice = {}, []
    for path in SCRIPTS:
        if path.name in COPYABLE:
            continue
        for text, k in runs_of_lines(path).items():
            if text in seen:
                twice.append(f"{path.name}:{k} and {seen[text]}: {text[0]}")
            seen.setdefault(text, f"{path.name}:{k}")
    assert not twice


# ---------------------------------------------------------------------------------------------- the trainer
def test_the_method_stands_on_the_first_pages():
    """Group, the topology, the default losses and the whole step end within 300 lines; the step reads top down."""
    tree = parsed(ROOT / "okd_train.py")
    defined = {node.name: node for node in tree.body if hasattr(node, "name")}
    for name in ("neighbour", "discriminator_loss", "generator_loss", "Group"):
        assert defined[name].end_lineno <= 300, name
    methods = [node for node in defined["Trainer"].body if isinstance(node, ast.FunctionDef)]
    step = ["step", "make_fakes", "exchange", "learn", "generate", "learn_critic", "learn_generator"]
    assert [m.name for m in methods if m.name in step] == step
    assert all(m.end_lineno <= 300 for m in methods if m.name in step)


def test_the_topology_is_known_in_one_place():
    """Nobody but the exchange asks neighbour(), and nobody counts round the ring by himself."""
    tree = parsed(ROOT / "okd_train.py")
    asking = {f.name for f in functions(tree) for node in ast.walk(f)
              if isinstance(node, ast.Call) and ast.unparse(node.func) == "neighbour"}
    assert asking == {"find_edges", "exchange"}
    for path in SCRIPTS:
        for node in (node for f in functions(parsed(path)) if f.name != "neighbour" for node in ast.walk(f)):
            remainder = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod)
            assert not (remainder and "groups" in ast.unparse(node)), f"{path.name}:{node.lineno}"


def test_the_trainer_knows_nothing_of_those_who_look_at_it():
    calls = [node for node in ast.walk(parsed(ROOT / "okd_train.py")) if isinstance(node, ast.Call) and node.args]
    flags = {node.args[0].value for node in calls if ast.unparse(node.func) == "add"}
    gone = {"--sample", "--per-class", "--group", "--to", "--npz", "--curves", "--interpolate", "--attention-maps",
            "--report", "--check", "--benchmark", "--demo"}
    assert "--groups" in flags and len(flags) > 20 and not gone & flags


def test_the_captured_step_knows_nothing_of_gans():
    text = (ROOT / "kernels/cuda_graph.py").read_text()
    words = r"okd_train|trainer|generator|discriminator|connector|critic|neighbour|fakes?|gans?"
    assert not re.search(rf"\b({words})\b", text, re.I)
