"""What every script meets before and around its own work: Ctrl-C, streams, launchers, how python was started."""
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import bench
import compare
import crop_codebrim
import fid
import labels
import okd_train
import report
import sample
import synthetic
from conftest import ROOT
from test_crop_codebrim import add
from test_okd_train import TINY

SCRIPTS = {"okd_train": okd_train, "sample": sample, "report": report, "compare": compare, "bench": bench, "fid": fid,
           "labels": labels, "crop_codebrim": crop_codebrim, "synthetic": synthetic}
ARGV = {"fid": ["a", "b"], "labels": ["a", "b"], "synthetic": ["new"], "sample": ["run", "3"], "report": ["run"]}
INTERRUPTED = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nos._exit(7)\n"


def said(name, capsys, argv=None):
    """The one line on stderr of a script's main that ends with status 2."""
    capsys.readouterr()
    try:
        status = SCRIPTS[name].main(ARGV.get(name, []) if argv is None else argv)
    except SystemExit as e:
        status = e.code
    text = capsys.readouterr().err
    assert status == 2 and text.count("\n") == 1 and text.startswith(f"{name}.py: "), (name, status, text)
    return text


def test_ctrl_c_while_importing_has_no_traceback(tmp_path):
    """The first foreign module that a script imports sends it; where it is ignored, as in a job that a script of the
    shell starts beside others, it stays so."""
    for name in ("numpy", "torch"):
        (tmp_path / f"{name}.py").write_text(INTERRUPTED)
    env, scripts = {**os.environ, "PYTHONPATH": str(tmp_path)}, [f"{name}.py" for name in SCRIPTS]
    ignored = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    for before, status in ((None, 130), (ignored, 7)):
        ps = {name: subprocess.Popen([sys.executable, ROOT / name], env=env, preexec_fn=before, stderr=subprocess.PIPE)
              for name in (*scripts, "sagan.py", "acgan.py", "kernels/bench_attention.py")}
        assert {name: (p.communicate()[1], p.returncode) for name, p in ps.items()} == dict.fromkeys(ps, (b"", status))


# ---------------------------------------------------------------------------------------------- streams
def test_a_closed_stdout_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)                        # what python makes of >&-
    assert all("stdout is closed" in said(name, capsys) for name in SCRIPTS)


def test_a_closed_stderr_takes_what_it_is_given(tmp_path, photos, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert fid.main([str(photos / "Crack"), str(photos / "Spallation"), "--features", "random"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(SystemExit):
        okd_train.main(["--data", "none"])
    add(tmp_path / "src", "a", [(1, 1, 150, 120, "Crack")])
    assert crop_codebrim.main([str(tmp_path / "src"), str(tmp_path / "crops"), "--n", "1"]) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", ["okd_train", "fid", "labels", "crop_codebrim"])
def test_what_waits_in_the_buffer_of_stdout_is_one_line_too(name, capsys, monkeypatch):
    """Python writes it as it ends, and would name an exception that it ignored."""
    module = SCRIPTS[name]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        work = {"okd_train": "run", "fid": "_run", "labels": "run", "crop_codebrim": "crop_folder"}[name]
        monkeypatch.setattr(module, work, lambda *_, **__: print("done"))
        assert "No space left" in said(name, capsys, ["a", "b"])


# ---------------------------------------------------------------------------------------------- launchers
def test_a_cluster_that_sets_world_size_alone(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("okd_train", "sample", "report", "compare", "bench"):
        assert "RANK='' and WORLD_SIZE='2'; torchrun sets them" in said(name, capsys)


@pytest.mark.parametrize("rank, world", [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "two"), ("", "1")])
def test_ranks_that_no_launcher_sets(rank, world, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    for name in ("okd_train", "sample", "report", "compare", "bench", "fid"):
        monkeypatch.setenv("RANK", rank)
        text = said(name, capsys)
        assert "unset" in text and ("RANK=" in text or "WORLD_SIZE=" in text)


def test_processes_that_cannot_meet(photos, tmp_path, capsys, monkeypatch):
    for name, value in dict(WORLD_SIZE=2, RANK=0, MASTER_ADDR="localhost").items():
        monkeypatch.setenv(name, str(value))
    jobs = {"okd_train": ["--data", str(photos), *TINY, "--groups", "2", "--out", str(tmp_path / "run")],
            "fid": [str(photos / "Crack"), str(photos / "Spallation"), "--features", "random"]}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for port, words in (("abc", "'abc'"), ("99999", "99999"), (str(taken.getsockname()[1]), "address already in"),
                            (None, "MASTER_PORT expected")):
            monkeypatch.setenv("MASTER_PORT", port) if port else monkeypatch.delenv("MASTER_PORT")
            for name, argv in jobs.items():
                text = said(name, capsys, argv)
                assert "cannot meet" in text and words in text and "torchrun" in text, text
    assert not (tmp_path / "run").exists()


def test_an_error_closes_the_process_groups_and_tells_the_launcher(tmp_path, capsys, monkeypatch):
    """Their threads would meet the end of the interpreter, which may abort; torchrun reports what the file says."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    line = said("okd_train", capsys, ["--steps", "none"])
    assert not torch.distributed.is_initialized()
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert ChildFailedError("x", {0: failure}).format_msg().splitlines()[-2] == f"  traceback : {line.strip()}"
    assert abs(failure.timestamp - (tmp_path / "error.json").stat().st_mtime) < 2


# ---------------------------------------------------------------------------------------------- how python was started
def test_isolated_python_finds_what_lies_beside(monkeypatch):
    """python -I has no folder of the script on its path; one fid.py serves all, so that all know its errors."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(ROOT))])
    for name in ("fid", "labels", "synthetic", "crop_codebrim"):
        monkeypatch.delitem(sys.modules, name)
    modules = {name: okd_train.beside(name) for name in ("labels", "fid", "synthetic", "kernels.attention")}
    assert all(module.__name__ == name for name, module in modules.items())
    assert modules["labels"].fid is modules["fid"] and str(ROOT) not in sys.path


def test_a_c_library_that_cannot_be_asked(monkeypatch):
    def on_windows(name):
        raise TypeError("argument of type 'NoneType' is not iterable")
    monkeypatch.setattr(okd_train.ctypes, "CDLL", on_windows)
    okd_train.keep_freed_memory()


def test_names_that_the_locale_has_no_letters_for(tmp_path, capsys, monkeypatch):
    add(tmp_path / "src", "a", [(1, 1, 150, 120, ())])
    xml = tmp_path / "src/annotations/a.xml"
    text = xml.read_text().split("<Defect>")[0].replace("<name>defect", "<name>Bücke") + "</object></annotation>"
    xml.write_text(text, encoding="utf-8")
    p = subprocess.run([sys.executable, ROOT / "crop_codebrim.py", "src", "crops", "--n", "1"], cwd=tmp_path, text=True,
                       capture_output=True, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and r"B\xfccke" in p.stderr, p.stderr
    assert "LC_ALL=C.UTF-8" in p.stderr and [f.name for f in tmp_path.iterdir()] == ["src"]
    for name, work in (("okd_train", "run"), ("fid", "_run"), ("labels", "run")):
        monkeypatch.setattr(SCRIPTS[name], work, lambda *_: "Bücke".encode("ascii"))
        assert "the locale has no letters for 'Bücke'" in said(name, capsys, ["a", "b"])


def test_a_rank_ends_with_its_status_whatever_torchs_threads_do_at_the_end(root, tmp_path):
    """atexit stands for what runs in the interpreter's own end; stdout is a file, so that it is buffered."""
    code = ("import atexit, os, sys, okd_train\n"
            "atexit.register(os.abort)\n"
            "okd_train.as_program(lambda: (print('said'), sys.exit({status})) if {status} else print('said'))")
    for status in (0, 3):
        with open(tmp_path / "out", "w+") as out:
            p = subprocess.run([sys.executable, "-c", code.format(status=status)], stdout=out, cwd=root,
                               env={**os.environ, "WORLD_SIZE": "2", "RANK": "1"})
            out.seek(0)
            assert (p.returncode, out.read()) == (status, "said\n")
