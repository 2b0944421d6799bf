"""Runs that are killed, stopped and started anew: nothing is lost, nothing is stale, and nobody is left at work.

One seeded moment each; `pytest -m sabotage tests/test_sabotage.py` tries twenty.
"""
import json
import os
import random
import shutil
import signal
import tempfile
import time

import pytest
import torch.distributed as dist

import okd_train
import sample
from conftest import noise
from test_bad_input import snapshot
from test_okd_train import TINY, assert_same, checkpoint, logs, refused, start, train
from test_ranks import LONG, wait_for_steps

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]
moments = pytest.mark.parametrize("moment", [0, *(pytest.param(k, marks=pytest.mark.sabotage) for k in range(1, 20))])
SCORED = ["--fid-features", "random", "--fid-samples", "8"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("photos"), ("Crack", "Spallation"), 8)


@pytest.fixture(scope="module")
def calm(photos, tmp_path_factory):
    """A run of seven steps that nobody disturbs, and its command without --out."""
    every = ["--log-every", "1", "--save-every", "3", "--fid-every", "2", "--sample-every", "1000"]
    argv = ["--data", photos, *TINY, "--groups", "2", *every, *SCORED, "--steps", "7"]
    out = tmp_path_factory.mktemp("calm") / "run"
    train(*argv, "--out", out)
    return out, argv


def killed(n, *argv):
    """okd_train.py in a fork, killed as it writes a line or names a file for the n-th time -> exit status, -9 if so.

    A line is then half written, a file is whole under its other name.
    """
    pid = os.fork()
    if pid == 0:
        left, replace, append = [n], os.replace, okd_train.append_line

        def die(before=lambda: None):
            left[0] -= 1
            if not left[0]:
                before()
                os.kill(os.getpid(), signal.SIGKILL)

        def append_line(path, line):
            die(lambda: path.open("a").write(json.dumps(line)[:9]))
            append(path, line)
        os.replace = lambda *a: (die(), replace(*a))
        okd_train.append_line = append_line
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            train(*argv)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def step(path):
    return okd_train.load_file(path)["step"]


def assert_equal_runs(a, b):
    """The same numbers in every file, and no other files."""
    names = lambda out: sorted(p.name for p in (*out.iterdir(), *out.rglob("*.tmp*")))
    assert names(a) == names(b) and logs(a) == logs(b)
    assert okd_train.score_lines(a, 2) == okd_train.score_lines(b, 2)
    for path in a.glob("*.pt"):
        assert_same(okd_train.load_file(path), okd_train.load_file(b / path.name))


# ---------------------------------------------------------------------------------------------- one truth for scores
@moments
def test_killed_at_any_write_it_ends_like_an_undisturbed_run(moment, calm, tmp_path):
    r, out, (whole, argv) = random.Random(moment), tmp_path / "run", calm
    for attempt in range(9):
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        if killed(r.randint(2, 25) if attempt < 4 else 10 ** 9, *argv, "--out", out, *resume) == 0:
            break
    assert attempt >= 1
    assert_equal_runs(whole, out)


@pytest.fixture
def table(monkeypatch):
    """{step: score} that every group gets there in place of one that is measured."""
    scores = {}

    def line(self, step, features, out):
        return {"step": step, **dict.fromkeys(("G1", "G2", "mean", "union", "floor", "floor_spread"), scores[step])}
    monkeypatch.setattr(okd_train.Scores, "line", line)
    return scores


def scored_at(out):
    return [line["step"] for line in okd_train.score_lines(out, 2)]


def test_the_score_of_an_end_is_forgotten_when_the_run_goes_on(calm, table, tmp_path, capsys):
    """--steps that is no multiple, and --max-seconds: scored at their end, yet later as if they had never been."""
    table.update({1: 1.0, 2: 3.0, 3: 2.0, 4: 4.0, 6: 6.0, 7: 7.0})
    argv = calm[1]
    train(*argv, "--out", tmp_path / "whole")
    for at, end in ((1, ["--max-seconds", "0.001"]), (3, ["--resume", "--steps", "3", "--max-seconds", "1000"])):
        train(*argv, *end, "--out", tmp_path / "run")
        assert scored_at(tmp_path / "run")[-1] == step(tmp_path / "run/G1.best.pt") == at
        assert f"rFD at step {at}: G1" in capsys.readouterr().out
    train("--out", tmp_path / "run", "--resume", "--steps", "7")
    assert scored_at(tmp_path / "run") == [2, 4, 6, 7] and step(tmp_path / "run/G2.best.pt") == 2
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_another_fid_every_loses_no_score(calm, table, tmp_path):
    """Also where the run then dies before its next checkpoint: args.json tells another number than made the lines."""
    table.update({2: 3.0, 4: 2.0, 6: 6.0, 7: 7.0})
    out, argv = tmp_path / "run", calm[1]
    train(*argv, "--steps", "4", "--out", out)
    assert killed(2, *argv, "--fid-every", "6", "--resume", "--out", out) == -signal.SIGKILL
    assert scored_at(out) == [2, 4]
    train("--resume", "--out", out, "--steps", "7")
    assert scored_at(out) == [2, 4, 6, 7] and step(out / "G1.best.pt") == 4


def test_what_is_scored_is_saved_before(calm, table, tmp_path, capsys, monkeypatch):
    table.update({2: 3.0, 4: 2.0, 6: 6.0})
    out, step_of_trainer = tmp_path / "run", okd_train.Trainer.step

    def gone(t):
        if t.step_count == 5:
            raise okd_train.UserError("gone")
        return step_of_trainer(t)
    monkeypatch.setattr(okd_train.Trainer, "step", gone)
    refused(capsys, *calm[1], "--save-every", "100", "--out", out)
    assert checkpoint(out)["step"] == 4 and scored_at(out) == [2, 4] and step(out / "G1.best.pt") == 4


def test_a_best_generator_that_cannot_be_had_again_is_said(calm, table, tmp_path, capsys):
    table.update({2: 2.0, 4: 4.0, 6: 3.0, 7: 1.0})
    out, argv = tmp_path / "run", calm[1]
    train(*argv, "--steps", "4", "--out", out)
    shutil.copy(out / "G2.pt", out / "G2.best.pt")                  # of step 4: a user's mistake
    assert "is of step 4, but fid.jsonl has its lowest score at step 2" in refused_by(sample, capsys, out)
    train("--out", out, "--resume", "--steps", "7")
    text = capsys.readouterr().out
    assert f"{out / 'G2.best.pt'} is not of step 2, where group 2 had its lowest score so far, 2.00" in text
    assert text.count("lowest score") == 2 and step(out / "G2.best.pt") == 7


def test_a_new_run_neither_takes_nor_removes_best_generators_that_were_left(calm, table, tmp_path, capsys):
    table.update({2: 2.0, 4: 4.0})
    out, argv = tmp_path / "run", [*calm[1], "--steps", "4", "--out", tmp_path / "run"]
    train(*argv, "--seed", "5")
    for path in (out / "checkpoint.pt", out / "args.json", out / "log.jsonl", *out.glob("G?.pt")):
        path.unlink()
    old = (out / "G1.best.pt").read_bytes()
    assert "already holds a run: it has no checkpoint yet: delete it" in refused(capsys, *argv)
    assert (out / "G1.best.pt").read_bytes() == old


def refused_by(program, capsys, out):
    (out / "G1.best.pt").write_bytes((out / "G2.best.pt").read_bytes())
    with pytest.raises(SystemExit):
        program.main([str(out), "1", "--group", "best"])
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- half a save
def assert_generators_are_those_of_the_checkpoint(out):
    state = checkpoint(out)
    for i, group in enumerate(state["groups"], 1):
        d = okd_train.load_file(out / f"G{i}.pt")
        assert d["step"] == state["step"]
        assert_same(d["state_dict"], group["ema"])


@pytest.mark.parametrize("spoil", [
    lambda path: shutil.copy(path.with_name("G2.best.pt"), path), lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:100])], ids=["older", "missing", "cut"])
def test_generators_that_are_not_of_the_checkpoint_are_mended(spoil, calm, tmp_path, capsys):
    """Also where there is nothing to do."""
    out = tmp_path / "run"
    shutil.copytree(calm[0], out)
    spoil(out / "G2.pt")
    train("--out", out, "--resume")
    assert "Nothing to do" in capsys.readouterr().out
    assert_equal_runs(calm[0], out)
    assert_generators_are_those_of_the_checkpoint(out)


def test_a_disk_that_is_full_after_the_checkpoint(calm, tmp_path, capsys, monkeypatch):
    out, save = tmp_path / "run", okd_train.save_generator
    shutil.copytree(calm[0], out)

    def full(trainer, state, path):
        if path.name == "G2.pt":
            raise okd_train.UserError("cannot write it: No space left on device")
        save(trainer, state, path)
    monkeypatch.setattr(okd_train, "save_generator", full)
    refused(capsys, "--out", out, "--resume", "--steps", "8")
    assert [step(out / name) for name in ("checkpoint.pt", "G1.pt", "G2.pt")] == [8, 8, 7]
    monkeypatch.undo()
    train("--out", out, "--resume", "--steps", "8")
    assert_generators_are_those_of_the_checkpoint(out)
    assert scored_at(out) == [2, 4, 6, 8]


def test_an_export_of_unequal_steps_says_so(calm, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(calm[0], out)
    shutil.copy(out / "G1.best.pt", out / "G1.pt")
    older = step(out / "G1.pt")
    for k, (group, said) in enumerate((("all", True), ("1,2", True), ("2", False))):
        sample.main([str(out), "1", "--group", group, "--to", str(tmp_path / f"to{k}")])
        text = capsys.readouterr().out
        words = f"unequal steps: G1 of step {older}, G2 of step 7"
        assert older < 7 and (words in text and f"--out {out} --resume" in text) == said


# ---------------------------------------------------------------------------------------------- signals
def stopped(number, *argv):
    with pytest.raises(SystemExit) as e:
        train(*argv)
    assert e.value.code == 128 + number
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize("number, at, calls", [(signal.SIGTERM, 2, 1), (signal.SIGINT, 2, 2), (signal.SIGHUP, 7, 1)])
def test_a_signal_while_scoring_saves_and_leaves_at_once(number, at, calls, calm, tmp_path, capsys, monkeypatch):
    """Among the real images (the first call), the fakes, and after the last step; the score is made up for later."""
    (whole, argv), out = calm, tmp_path / "run"
    features, made, now = okd_train.Scores.features, [], [0]

    def once(self, images):
        made.append(now[0])
        if made.count(at) == calls:
            os.kill(os.getpid(), number)
        return features(self, images)
    scored = okd_train.Scores.__call__
    monkeypatch.setattr(okd_train.Scores, "features", once)
    monkeypatch.setattr(okd_train.Scores, "__call__",
                        lambda self, t, *a: (now.__setitem__(0, t.step_count), scored(self, t, *a))[1])
    stopped(number, *argv, "--out", out)
    text = capsys.readouterr().out
    assert f"Stopped by {number.name} at step {at}; saved in {out}. --resume goes on." in text
    assert made.count(at) <= calls + 1 and checkpoint(out)["step"] == at and at not in scored_at(out)
    assert not (out / ".lock").exists()
    monkeypatch.undo()
    train("--out", out, "--resume")
    assert_equal_runs(whole, out)


def test_nohup_is_heeded(calm, tmp_path, monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        step = okd_train.Trainer.step
        monkeypatch.setattr(okd_train.Trainer, "step", lambda t: (os.kill(os.getpid(), signal.SIGHUP), step(t))[1])
        train(*calm[1], "--steps", "2", "--out", tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, old)
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_a_signal_to_the_launcher_while_two_processes_score(calm, tmp_path):
    out = tmp_path / "run"
    p = start(*calm[1], "--fid-samples", "20000", "--out", out, "--nproc", "2")
    deadline = time.monotonic() + 60
    while not (out / "G2.pt").exists() and p.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)                                            # saved, and it scores now
    begin = time.monotonic()
    p.send_signal(signal.SIGHUP)
    text, errors = p.communicate(timeout=60)
    assert p.returncode == 129 and time.monotonic() - begin < 20 and "Traceback" not in errors, errors
    assert "Stopped by SIGHUP at step 2; saved" in text and checkpoint(out)["step"] == 2
    assert not (out / "fid.jsonl").exists() and not (out / ".lock").exists()


# ---------------------------------------------------------------------------------------------- restarts
def torchrun_at(monkeypatch):
    """An environment as a new torchrun makes it for its only process, with a store of its own; returns the store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port,
               TORCHELASTIC_RUN_ID="none", TORCHELASTIC_USE_AGENT_STORE=True)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    return store


def test_only_a_restart_goes_on_by_itself_and_with_its_own_settings(photos, tmp_path, monkeypatch, capsys):
    """Another start has the same run id and, as in a container, the same process numbers."""
    argv = ["--data", photos, *TINY, "--groups", "1", "--out", tmp_path / "run"]
    first = torchrun_at(monkeypatch)
    train(*argv, "--steps", "2")
    train(*argv, "--steps", "3")
    assert "Resumed at step 2" in capsys.readouterr().out
    kept = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.*")}
    text = refused(capsys, *argv, "--steps", "4", "--seed", "5", "--g-lr", "2e-4")
    assert "--seed is 0 there and 5 here" in text and "--g-lr is 0.0001 there and 0.0002 here" in text
    second = torchrun_at(monkeypatch)
    for more in ([], ["--seed", "5"]):
        assert "already holds a run: go on with --resume" in refused(capsys, *argv, "--steps", "4", *more)
    assert kept == {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.*")} and first.port != second.port


# ---------------------------------------------------------------------------------------------- who is left behind
def test_ranks_end_with_their_launcher(photos, tmp_path):
    """They save and free the run folder within a step."""
    out = tmp_path / "run"
    p = start(*LONG, "--data", photos, "--out", out, "--nproc", "2")
    wait_for_steps(out, 5, p)
    p.kill()
    text, errors = p.communicate(timeout=60)                        # until the ranks, who hold its ends, are gone
    assert "Stopped by SIGTERM" in text and "Traceback" not in errors, errors
    assert not (out / ".lock").exists() and checkpoint(out)["step"] == logs(out)[-1]["step"]


def test_without_a_launcher_a_parent_that_ends_does_not_matter(calm, tmp_path, monkeypatch):
    """As with nohup, or a shell that ends: the process gets another parent and goes on."""
    monkeypatch.setattr(okd_train, "PARENT", 12345)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    stop = okd_train.Stop()
    assert not stop.signal
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert stop.signal == signal.SIGTERM


def test_what_killed_saves_left_is_removed(calm, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(calm[0], out)
    left = [out / ".checkpoint.pt.tmp123", out / "samples/.real.png.tmp4"]
    mine = [out / ".mine.tmp", out / "x.tmp1", out / ".tmp.png"]
    for path in (*left, *mine):
        path.write_bytes(b"x")
    refused(capsys, *calm[1], "--out", out)                         # no start that trains here
    assert all(path.exists() for path in left)
    train("--out", out, "--resume")
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)


# ---------------------------------------------------------------------------------------------- what cannot be read
def test_a_class_of_which_nothing_can_be_read_is_refused(photos, tmp_path, capsys):
    """--skip-bad would train it, and exports would carry its label."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for path in (data / "Crack").iterdir():
        path.write_bytes(b"")
    argv = ["--data", data, *TINY, "--groups", "1", "--skip-bad", "--steps", "1", "--out", tmp_path / "run"]
    assert "no image of Crack can be read" in refused(capsys, *argv, "--model", "acgan")
    train(*argv)                                                    # without classes it does not matter
    assert "Skipped 8 unreadable images" in capsys.readouterr().out


@pytest.mark.parametrize("n, named", [(20, 20), (27, 20)])
def test_at_most_twenty_unreadable_files_are_named_on_the_line(n, named, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for k in range(n):
        (data / "Crack" / f"bad {k}\n.png").write_bytes(b"")
    argv = ["--data", data, *TINY, "--groups", "1", "--steps", "1", "--out", tmp_path / "run"]
    for skip in (False, True):
        text = train(*argv, "--skip-bad") or capsys.readouterr().out if skip else refused(capsys, *argv)
        assert text.count("Crack/bad") == named and f"{n} " in text
        found = list(tmp_path.glob("unreadable_*.txt"))
        assert len(found) == (n > 20)
        for path in found:
            assert f"all are in {path}" in text and len(path.read_text().splitlines()) == n
            path.unlink()


# ---------------------------------------------------------------------------------------------- another place
def edit_args(out, change):
    args = json.loads((out / "args.json").read_text())
    change(args)
    (out / "args.json").write_text(json.dumps(args))


def test_data_that_moved_is_known_by_its_pixels(photos, calm, tmp_path, capsys, monkeypatch):
    """--data and --fid-data; other pixels are refused, and nothing is touched."""
    out = tmp_path / "run"
    for name in ("old", "held"):
        shutil.copytree(photos, tmp_path / name)
    (tmp_path / "held/Crack/0.png").unlink()
    monkeypatch.chdir(tmp_path)
    argv = [*calm[1][2:], "--out", out]
    train("--data", "old", "--fid-data", "held", *argv, "--steps", "3")
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "held").rename(tmp_path / "kept")
    monkeypatch.chdir("/")
    before = snapshot(out)
    moved = ["--data", tmp_path / "new", "--fid-data", tmp_path / "kept"]
    assert "are not those that" in refused(capsys, *argv, *moved, "--data", tmp_path / "kept", "--resume")
    text = refused(capsys, *argv, *moved, "--fid-data", photos, "--resume")
    assert f"--fid-data: the images of {photos} are not those" in text and snapshot(out) == before
    train(*argv, *moved, "--resume", "--steps", "4")
    assert scored_at(out) == [2, 4]
    train("--out", out, "--resume", "--steps", "5")                 # the new places are kept
    assert scored_at(out) == [2, 4, 5]


def test_scores_may_be_switched_on_later_but_not_changed(photos, calm, tmp_path, capsys):
    out, argv = tmp_path / "run", calm[1]
    at = argv.index("--fid-every")
    plain = [*argv[:at], *argv[at + 2:argv.index("--fid-features")]]
    train(*plain, "--steps", "2", "--out", out)
    train(*argv, "--out", out, "--resume")
    assert okd_train.score_lines(out, 2) == okd_train.score_lines(calm[0], 2)
    train(*plain, "--steps", "2", "--out", tmp_path / "done")
    train("--out", tmp_path / "done", "--resume", "--fid-every", "5", *SCORED)      # also when all is trained
    assert scored_at(tmp_path / "done") == [2]
    text = refused(capsys, *argv, "--fid-samples", "9", "--out", out, "--resume", "--steps", "9")
    assert "--fid-samples is 8 there and 9 here" in text


def test_what_bits_depend_on_is_said(calm, tmp_path, capsys):
    out = tmp_path / "run"
    for change, words in ((lambda a: a.update(script_digest="x"), "other model script than in"),
                          (lambda a: a.update(threads=7, versions={}), "other threads and versions than in"),
                          (lambda a: a.pop("threads"), "")):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(calm[0], out)
        edit_args(out, change)
        for steps in ("8", "9"):
            train("--out", out, "--resume", "--steps", steps)
            text = capsys.readouterr().out
            said = bool(words) and steps == "8"
            assert ("no longer bit for bit" in text) == said and (not said or words in text)


def test_a_run_from_windows_goes_on(calm, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(calm[0], out)
    edit_args(out, lambda a: a.update(script=r"C:\gan\sagan.py", model=r"gan\sagan.py"))
    edit_args(out, lambda a: a["settings"].update(data=r"C:\photos"))
    assert r"--data C:\photos: no such folder" in refused(capsys, "--out", out, "--resume", "--steps", "8")
    train(*calm[1], "--model", "sagan", "--out", out, "--resume", "--steps", "8")
    edit_args(out, lambda a: a.update(script=r"C:\gan\gone.py", model=r"gan\gone.py"))
    assert "no model script 'gone'" in refused(capsys, "--out", out, "--resume", "--steps", "9")
