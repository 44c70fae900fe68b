"""Proves that training can be killed, resumed, split over processes and filled disks without
losing a bit, learns, and says in one line what it was given wrong.

    KILLS=20 python -m pytest tests/test_train.py -k sigkill     # the long version, 2 minutes
    python -m pytest tests/test_train.py
"""
import functools
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import data
import evaluate
import phantom
import train
from model import CheckpointError, MeDSLIP
from text import ANATOMIES, PATHOLOGIES, InputError

REPO = Path(__file__).resolve().parent.parent
TINY = ("--backbone small --dim 16 --layers 1 --heads 2 --image-size 32 --prepared-size 32 "
        "--batch-size 8 --epochs 3 --lr 2e-3 --dropout 0.1 --crop 0.5 --flip swap --augment-ops 2 "
        "--workers 0 --log-every 1 --device cpu --amp off").split()
TABLE_VI = ["--streams single --contrast random", "--contrast random --beta 0",
            "--streams single", "--beta 0", ""]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """60 phantoms of 64 pixels, prepared at 32."""
    root = tmp_path_factory.mktemp("phantoms") / "mimic"
    phantom.write("mimic", str(root), 60, seed=0, workers=1)
    return root


@pytest.fixture(scope="session")
def epoch(root):
    """Steps an epoch: 5 or 6, as the reports of 46 or of 48 images say something."""
    table = data.load("synthetic", str(root), size=32, workers=0)
    return len(train.Batches(table, table.rows("train"), 8, 0, PATHOLOGIES, ANATOMIES))


@pytest.fixture(autouse=True)
def alone():
    """One thread, as in the subprocesses; signal handlers and global switches put back."""
    threads, handlers = torch.get_num_threads(), [signal.getsignal(s) for s in (15, 2)]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    for number, handler in zip((15, 2), handlers):
        signal.signal(number, handler)


def flags(root, out, *more):
    return [*TINY, "--root", str(root), "--out-dir", str(out), *map(str, more)]


def run(root, out, *more):
    """A run in this process -> (checkpoint, log)."""
    train.main(train.parse_args(flags(root, out, *more)))
    return outcome(out)


def outcome(out):
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    lines = (out / "log.jsonl").read_text().splitlines()
    return checkpoint, [json.loads(line, parse_constant=pytest.fail) for line in lines]


def spawn(root, out, *more, **options):
    """A run in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "train.py", *flags(root, out, *more)], cwd=REPO,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def torchrun(root, out, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "train.py", *flags(root, out, *more)]
    return subprocess.run(command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)


def same(a, b):
    """Nested dicts and lists of tensors and numbers, equal to the last bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def losses(log):
    """{step: (loss, existence, protocl, icl)} of a log."""
    return {r["step"]: [r[k] for k in ("loss", "existence", "protocl", "icl")]
            for r in log if "loss" in r}


def at_step(monkeypatch, step, action):
    """Runs `action` when the training loop asks for the learning rate of a step, once."""
    original = train.learning_rate

    def learning_rate(now, *rest):
        if now == step:
            action()
        return original(now, *rest)
    monkeypatch.setattr(train, "learning_rate", learning_rate)


def spoil(monkeypatch, steps, how):
    """The losses of the given steps (counted from the first call on) pass through `how`."""
    original, calls = train.medslip_loss, []

    def medslip_loss(out, *rest, **options):
        calls.append(1)
        parts = original(out, *rest, **options)
        return parts | {"loss": how(parts["loss"], out)} if len(calls) in steps else parts
    monkeypatch.setattr(train, "medslip_loss", medslip_loss)


# ------------------------------------------------------------------------------------------ resume

def test_resume_is_exact(root, tmp_path):
    """9 steps straight = 4 and then 5, across an epoch's end, with dropout and drawn negatives."""
    straight, log = run(root, tmp_path / "a", "--max-steps", 9, "--accumulate", 2)
    run(root, tmp_path / "b", "--max-steps", 4, "--accumulate", 2)
    resumed, log2 = run(root, tmp_path / "b", "--max-steps", 9, "--accumulate", 2, "--resume")
    for key in ("model", "optimizer", "scaler", "config", "rng", "step", "epoch", "queries"):
        assert same(straight[key], resumed[key]), key
    assert losses(log) == losses(log2) and list(losses(log2)) == list(range(1, 10))


def test_resume_needs_no_flags_and_ends_where_the_run_would(root, epoch, tmp_path):
    straight, _ = run(root, tmp_path / "a")
    run(root, tmp_path / "b", "--max-steps", 7)
    train.main(train.parse_args(["--resume", "--out-dir", str(tmp_path / "b"), "--workers", "0"]))
    resumed, log = outcome(tmp_path / "b")
    assert straight["step"] == 3 * epoch and same(straight["model"], resumed["model"])
    train.main(train.parse_args(["--resume", "--out-dir", str(tmp_path / "b"), "--workers", "0"]))
    again, log2 = outcome(tmp_path / "b")  # a finished run has nothing left to do
    assert same(resumed["model"], again["model"]) and log == log2


def test_sigkill_at_any_moment(root, epoch, tmp_path):
    """Killed at random times while it trains and saves, the file on disk always loads, and the
    run ends with the very weights of one that nobody killed."""
    more = ["--epochs", 10, "--save-every", 1]  # about half the time goes into saving
    chance, out, kills, tries = random.Random(time.time_ns()), tmp_path / "b", 0, 0
    while kills < int(os.environ.get("KILLS", 2)) and tries < 100:
        tries += 1
        resume = ["--resume"] if (out / "ckpt.pt").exists() else []
        if resume and torch.load(out / "ckpt.pt", weights_only=True)["step"] == 10 * epoch:
            shutil.rmtree(out)  # done before enough kills: from the start
            resume = []
        before = (out / "ckpt.pt").stat().st_mtime_ns if resume else 0
        process = spawn(root, out, *more, *resume)
        while process.poll() is None and not ((out / "ckpt.pt").exists() and
                                              (out / "ckpt.pt").stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -9), errors
        kills += process.returncode == -9
        assert torch.load(out / "ckpt.pt", weights_only=True)["step"] > 0
        MeDSLIP.from_pretrained(out / "ckpt.pt")
    killed, log = run(root, out, *more, "--resume")
    straight, straight_log = run(root, tmp_path / "a", *more)
    assert kills and killed["step"] == straight["step"] == 10 * epoch
    assert same(killed["model"], straight["model"])
    assert same(killed["optimizer"], straight["optimizer"])
    assert losses(log) == losses(straight_log)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_return(root, tmp_path, monkeypatch, capsys, number):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    checkpoint, log = run(root, tmp_path / "b")
    assert checkpoint["step"] == 4 and "stopped at step 4" in capsys.readouterr().out
    monkeypatch.undo()
    resumed, log = run(root, tmp_path / "b", "--resume")
    straight, straight_log = run(root, tmp_path / "a")
    assert same(resumed["model"], straight["model"]) and log == [
        a | ({"images_per_s": b["images_per_s"]} if "loss" in a else {})
        for a, b in zip(straight_log, log)]


def test_sigterm_to_the_process_group(root, tmp_path):
    """What a cluster's scheduler sends reaches the loader's workers too; exit status 0."""
    process = spawn(root, tmp_path, "--epochs", 1000, "--workers", 2, start_new_session=True)
    while process.poll() is None and not (
            (tmp_path / "log.jsonl").exists() and (tmp_path / "log.jsonl").stat().st_size):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped at step" in out, errors
    assert 0 < torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] < 6000


def test_resume_refuses_by_name(root, tmp_path):
    run(root, tmp_path / "a", "--max-steps", 1, "--uncertain", "zeros")

    def refused(*more):
        with pytest.raises((InputError, CheckpointError)) as caught:
            train.main(train.parse_args(["--resume", "--out-dir", str(tmp_path / "a"), *more]))
        assert "\n" not in str(caught.value)
        return str(caught.value)
    message = refused("--lr", "1", "--dim", "32", "--save-every", "7", "--uncertain", "ones")
    assert all(part in message for part in ("--lr 1.0 (was 0.002)", "--dim 32 (was 16)",
                                            "--uncertain ones (was zeros)"))
    assert "save-every" not in message
    assert "--data mimic (was synthetic)" in refused("--data", "mimic")
    other = tmp_path / "other"
    phantom.write("mimic", str(other), 30, seed=1, size=32, workers=1)
    assert "has changed since the run began" in refused("--root", str(other), "--workers", "0")

    path = tmp_path / "a" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save({"model": checkpoint["model"], "optimizer": {}, "epoch": 3, "config": {}}, path)
    assert "no training state" in refused()  # what the published file holds
    path.write_bytes(b"<html>")
    assert "web page" in refused()
    path.unlink()
    assert "leave it out" in refused()


def test_a_moved_data_root_is_the_same_data(root, tmp_path):
    run(root, tmp_path / "a", "--max-steps", 1)
    shutil.copytree(root, tmp_path / "moved")
    assert run(tmp_path / "moved", tmp_path / "a", "--max-steps", 2, "--resume")[0]["step"] == 2


def test_log_loses_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    train.reopen_log(path, 2, True).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    train.reopen_log(path, 0, False).close()
    assert path.read_text() == "" and os.listdir(tmp_path) == ["log.jsonl"]


# -------------------------------------------------------------------------------- what goes wrong

def finite_loss_with_a_nan_gradient(loss, out):
    return loss + (0 * out.pathology_logits.sum()).sqrt()  # the slope of the root at 0 times 0


@pytest.mark.parametrize("how", [lambda loss, out: loss * float("nan"),
                                 lambda loss, out: loss + float("inf"),
                                 finite_loss_with_a_nan_gradient])
def test_a_bad_step_is_skipped_and_counted(root, tmp_path, monkeypatch, how):
    """Weights, moments and batch-norm statistics after it are those before it."""
    before, _ = run(root, tmp_path / "a", "--max-steps", 2)
    spoil(monkeypatch, {3}, how)
    after, log = run(root, tmp_path / "b", "--max-steps", 3)
    assert [r["skipped"] for r in log if "loss" in r] == [0, 0, 1]
    assert after["step"] == 3 and same(after["optimizer"]["state"], before["optimizer"]["state"])
    for key, value in before["model"].items():
        assert torch.equal(value, after["model"][key]) or key.endswith("num_batches_tracked"), key


def test_a_bad_forward_pass_leaves_batch_norm_alone(root, tmp_path, monkeypatch):
    original, calls = train.augment, []

    def augment(*rest):
        images, existence = original(*rest)
        calls.append(1)
        return (images * float("inf") if len(calls) == 2 else images), existence
    monkeypatch.setattr(train, "augment", augment)
    checkpoint, log = run(root, tmp_path, "--max-steps", 3)
    assert [r["skipped"] for r in log if "loss" in r] == [0, 1, 1]
    assert log[1]["loss"] is None  # JSON has no NaN
    assert all(v.isfinite().all() for v in checkpoint["model"].values())


def test_three_bad_steps_in_a_row_stop_the_run(root, tmp_path, monkeypatch):
    spoil(monkeypatch, {3, 4, 6, 7, 8}, lambda loss, out: loss * float("nan"))
    with pytest.raises(SystemExit) as caught:
        run(root, tmp_path, "--save-every", 2)
    message = caught.value.code  # a string: printed, exit status 1
    assert "at step 8" in message and str(tmp_path / "ckpt.pt") in message and "\n" not in message
    checkpoint, log = outcome(tmp_path)
    assert log[-1]["skipped"] == 5
    assert all(v.isfinite().all() for v in checkpoint["model"].values())
    monkeypatch.undo()
    assert run(root, tmp_path, "--resume", "--max-steps", 9)[0]["step"] == 9


def test_a_bad_first_step_names_no_file_of_another_run(root, tmp_path, monkeypatch):
    run(root, tmp_path, "--max-steps", 1)
    spoil(monkeypatch, {1, 2, 3}, lambda loss, out: loss * float("nan"))
    with pytest.raises(SystemExit) as caught:
        run(root, tmp_path)
    assert "nothing was saved" in caught.value.code


def test_a_full_disk_leaves_the_last_checkpoint(root, tmp_path):
    """A limit on the size of files stands in for the disk: writing fails half-way all the same."""
    run(root, tmp_path, "--max-steps", 2)
    before = (tmp_path / "ckpt.pt").read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(SystemExit) as caught:
            run(root, tmp_path, "--max-steps", 4, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "cannot write" in caught.value.code and "--resume" in caught.value.code
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "log.jsonl"]
    assert run(root, tmp_path, "--max-steps", 4, "--resume")[0]["step"] == 4


@pytest.mark.parametrize("more, words", [
    (["--data", "mimic", "--root", "/no/such/folder"], ["/no/such/folder"]),
    (["--data", "nonsense"], ["nonsense", "mimic"]),
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--mask", "relu"], ["relu", "sigmoid"]),
    (["--batch-size", "7", "--accumulate", "2"], ["--batch-size 7", "--accumulate 2"]),
    (["--batch-size", "0"], ["--batch-size 0"]),
    (["--log-every", "0"], ["--log-every 0"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--crop", "1.5"], ["--crop 1.5"]),
    (["--dropout", "1"], ["--dropout 1.0"]),
    (["--dim", "10", "--heads", "4"], ["--dim 10", "--heads 4"]),
    (["--streams", "single", "--beta", "1"], ["--beta"]),
    (["--hold-out", "dragon"], ["dragon", "effusion"]),
    (["--device", "abacus"], ["--device abacus"]),
    (["--pathology-book", "/no/book.json"], ["/no/book.json"]),
    (["--text-encoder", "/no/encoder"], ["/no/encoder"]),
    (["--resume"], ["--resume"]),
    (["--out-dir", "/dev/null/out"], ["/dev/null/out"]),
], ids=" ".join)
def test_one_line_and_status_2(root, tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(root, tmp_path), *more])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPO / "train.py"), run_name="__main__")
    error = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and error.startswith("train.py: ") and "\n" not in error, error
    assert all(word in error for word in words), error


def test_data_without_reports(root, tmp_path):
    shutil.copytree(root, tmp_path / "silent", ignore=shutil.ignore_patterns("*.txt", "prepared-*"))
    with pytest.raises(InputError, match="has no reports"):
        run(tmp_path / "silent", tmp_path)


# -------------------------------------------------------------------------------- several processes

def test_two_processes_are_one(root, epoch, tmp_path):
    """Two gloo processes repeat one process with two parts: same images, augmentation, dropout and
    negatives, and means over the global batch; losses agree to 1e-4 (the order of sums differs).
    One process without parts has its batch norm over 8 images instead of 4, so only the first
    step's losses come near: 5 %."""
    done = torchrun(root, tmp_path / "two", "--epochs", 2, "--min-lr", 1e-4)
    assert done.returncode == 0, done.stderr
    two, log = outcome(tmp_path / "two")
    parts, parts_log = run(root, tmp_path / "parts", "--epochs", 2, "--min-lr", 1e-4,
                           "--accumulate", 2)
    _, whole_log = run(root, tmp_path / "whole", "--max-steps", 1, "--min-lr", 1e-4,
                       "--dropout", 0, "--flip", "none", "--crop", 1, "--augment-ops", 0)
    assert list(losses(log)) == list(losses(parts_log)) == list(range(1, 2 * epoch + 1))
    for step, values in losses(log).items():
        assert values == pytest.approx(losses(parts_log)[step], rel=1e-4), step
    assert losses(whole_log)[1][0] == pytest.approx(losses(log)[1][0], rel=0.05)
    assert sorted(os.listdir(tmp_path / "two")) == ["ckpt.pt", "log.jsonl"]
    assert len(log) == len(parts_log) and done.stdout.count(f"done at step {2 * epoch};") == 1
    assert two["model"].keys() == parts["model"].keys()  # no "module."
    assert run(root, tmp_path / "two", "--resume", "--epochs", 2, "--min-lr", 1e-4)[1] == log


def test_means_are_over_the_global_batch(root, tmp_path, monkeypatch):
    """Without dropout, augmentation and batch statistics, 1, 2 and 8 parts have one loss although
    their parts differ in how many pathologies are present."""
    original = MeDSLIP.train
    monkeypatch.setattr(MeDSLIP, "train", lambda self, mode=True: original(self, False))
    monkeypatch.setattr(train, "side_swap_index", lambda names: torch.arange(len(names)))
    still = ["--flip", "none", "--crop", 1, "--augment-ops", 0, "--dropout", 0,
             "--contrast", "none", "--max-steps", 1]
    values = [losses(run(root, tmp_path / str(k), "--accumulate", k, *still)[1])[1]
              for k in (1, 2, 8)]
    for loss, existence, _, icl in values[1:]:  # ProtoCL draws its negatives part by part
        assert (existence, icl) == pytest.approx((values[0][1], values[0][3]), rel=1e-4)


def test_ranks_stop_together(root, tmp_path):
    """SIGTERM to one of two processes only: both leave after the same step, the file is saved."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "train.py", *flags(root, tmp_path, "--epochs", 1000)]
    process = subprocess.Popen(command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (
            (tmp_path / "log.jsonl").exists() and (tmp_path / "log.jsonl").stat().st_size):
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("no /proc to find the processes in")
    os.kill(int(children.read_text().split()[-1]), signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.count("stopped at step") == 1
    assert 0 < torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] < 6000


# ------------------------------------------------------------------------------------- what it does

def test_files(root, epoch, tmp_path):
    checkpoint, log = run(root, tmp_path, "--max-steps", epoch + 1)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "log.jsonl"]
    assert {"model", "optimizer", "scaler", "config", "args", "epoch", "step", "rng", "best",
            "queries"} <= checkpoint.keys()
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, epoch + 1)
    for kind in ("pathology", "anatomy"):
        q = checkpoint["queries"][kind]
        assert len(q["names"]) == len(q["prompts"]) == len(q["text"]) > 5
    assert checkpoint["args"]["batch_size"] == 8 and checkpoint["config"]["dim"] == 16
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, epoch + 2))
    assert {"step", "epoch", "lr", "loss", "existence", "protocl", "icl", "grad_norm", "skipped",
            "images_per_s"} == steps[0].keys()
    assert [r["step"] for r in log if "validation_auroc" in r] == [epoch, epoch + 1]
    for r in steps:
        assert r["loss"] == pytest.approx(r["existence"] + r["protocl"] + 10 * r["icl"], rel=1e-5)
    model = MeDSLIP.from_pretrained(tmp_path / "ckpt.pt")
    assert model.args["data"] == "synthetic" and same(model.state_dict(), checkpoint["model"])


@pytest.mark.parametrize("switches", TABLE_VI)
def test_table_vi(root, tmp_path, switches):
    """Two steps and a zero-shot evaluation of each of the paper's five experiments."""
    checkpoint, log = run(root, tmp_path, "--max-steps", 2, *switches.split())
    for r in log[:2]:
        beta = 0 if "beta" in switches or "single" in switches else 10
        whole = r["existence"] + r["protocl"] + beta * r["icl"]
        assert r["loss"] == pytest.approx(whole, rel=1e-5)
    assert any(k.startswith("anatomy.") for k in checkpoint["model"]) == ("single" not in switches)
    evaluate.main(evaluate.parse_args([
        "--task", "classification", "--root", str(root), "--prepared-size", "32",
        "--split", "train", "--checkpoint", str(tmp_path / "ckpt.pt"), "--out-dir", str(tmp_path),
        "--device", "cpu", "--bootstrap", "10", "--workers", "0"]))
    scores = json.loads((tmp_path / "eval" / "synthetic_classification.json").read_text())
    assert 0 <= scores["auroc"] <= 1


@pytest.mark.parametrize("switches", [
    "--mask linear --icl dot --unmentioned ignore --flip naive --queries published",  # as released
    "--icl bare", "--contrast none --alpha 0", "--position none --flip none", "--deterministic",
    "--pathology-book BOOK"])
def test_other_switches(root, tmp_path, switches):
    book = tmp_path / "book.json"
    book.write_text(json.dumps({name: f"{name} in plain words" for name in PATHOLOGIES}))
    _, log = run(root, tmp_path, "--max-steps", 2, *switches.replace("BOOK", str(book)).split())
    assert all(r["loss"] is not None for r in log if "loss" in r)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_takes_the_same_lines(root, tmp_path, amp):
    full, log = run(root, tmp_path / "a", "--max-steps", 2)
    half, half_log = run(root, tmp_path / "b", "--max-steps", 2, "--amp", amp)
    assert losses(half_log)[1] == pytest.approx(losses(log)[1], rel=0.02)
    assert all(v.dtype != torch.bfloat16 for v in half["model"].values())
    assert bool(half["scaler"]) == (amp == "fp16")


def test_compile(root, tmp_path, monkeypatch):
    """The lines around a compiled model, without its compiler; checkpoints keep the plain names."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled, log = run(root, tmp_path / "a", "--max-steps", 2, "--compile")
    plain, plain_log = run(root, tmp_path / "b", "--max-steps", 2)
    assert compiled["model"].keys() == plain["model"].keys()
    assert losses(log)[1] == pytest.approx(losses(plain_log)[1], rel=1e-4)


def test_same_seed_same_numbers(root, tmp_path):
    a = run(root, tmp_path / "a", "--max-steps", 3)
    b = run(root, tmp_path / "b", "--max-steps", 3, "--workers", 2)
    c = run(root, tmp_path / "c", "--max-steps", 3, "--seed", 1)
    assert same(a[0]["model"], b[0]["model"]) and losses(a[1]) == losses(b[1])
    assert not same(a[0]["model"], c[0]["model"])


def test_learns_a_handful_of_images(root, tmp_path):
    """Eight images by heart: in 80 steps the loss, existence and ICL fall far."""
    data.load("synthetic", str(root), size=32, workers=0)
    lines = (root / "prepared-32" / "split.csv").read_text().splitlines()
    few = tmp_path / "split.csv"
    few.write_text("\n".join([lines[0]] + [line for line in lines if "train" in line][:8]))
    _, log = run(root, tmp_path, "--split-file", few, "--cache-dir", tmp_path, "--epochs", 80,
                 "--lr", 5e-3, "--dropout", 0, "--flip", "none", "--crop", 1, "--augment-ops", 0,
                 "--dim", 32)
    values = losses(log)
    first, last = values[1], values[max(values)]
    assert last[0] < 0.1 * first[0] and last[1] < 0.25 * first[1] and last[3] < 0.2 * first[3], (
        first, last)


def test_learning_rate_by_pencil():
    args = Namespace(lr=1.0, min_lr=0.1, warmup_epochs=2.0, epochs=10)
    rate = [train.learning_rate(step, 5, args) for step in range(60)]
    assert rate[0] == 0.1 and rate[5] == pytest.approx(0.55) and rate[10] == 1.0
    assert rate[30] == pytest.approx(0.55)  # half-way down the cosine
    assert rate[20] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2 ** -0.5))  # cos(pi / 4)
    assert rate[50:] == pytest.approx([0.1] * 10)
    args.warmup_epochs = 0.0
    assert train.learning_rate(0, 5, args) == 1.0


def test_held_out_findings_are_in_no_query_and_no_label(root, tmp_path, monkeypatch):
    """Nor in the bucket of rare findings, which would teach the model that they are abnormal."""
    bucket, seen = PATHOLOGIES.index("tail_abnorm_obs"), []
    original = train.medslip_loss

    def medslip_loss(out, existence, *rest, **options):
        seen.append(existence)
        return original(out, existence, *rest, **options)
    monkeypatch.setattr(train, "medslip_loss", medslip_loss)
    whole, _ = run(root, tmp_path / "a", "--queries", "published", "--max-steps", 6)
    present = (torch.cat(seen) == 1).any(1).sum(0)                              # [75]
    names = [name for name, k in zip(PATHOLOGIES, present) if k > 2][:2]
    assert names and not present[bucket]
    seen.clear()
    held, _ = run(root, tmp_path / "b", "--queries", "published", "--max-steps", 6,
                  "--hold-out", ", ".join(names))
    kept = held["queries"]["pathology"]["names"]
    assert kept == [p for p in PATHOLOGIES if p not in names]
    assert len(held["queries"]["pathology"]["text"]) == 73 and seen[0].shape[-1] == 73
    assert not (torch.cat(seen)[..., kept.index("tail_abnorm_obs")] == 1).any()


def test_defaults():
    """Bare flags are the CPU preset; any real data set takes Table II."""
    synthetic = train.resolve(train.parse_args([]))
    mimic = train.resolve(train.parse_args(["--data", "mimic"]))
    assert (synthetic.data, synthetic.backbone, synthetic.text_encoder) == (
        "synthetic", "small", "hashing")
    assert (mimic.epochs, mimic.batch_size, mimic.lr, mimic.min_lr, mimic.warmup_epochs,
            mimic.weight_decay, mimic.backbone, mimic.image_size, mimic.dim, mimic.layers) == (
        100, 64, 1e-4, 1e-5, 5, 0.02, "resnet50", 224, 256, 4)
    assert (mimic.alpha, mimic.beta, mimic.streams, mimic.contrast) == (1, 1, "dual", "prototype")
    assert train.resolve(train.parse_args(["--streams", "single"])).beta == 0


def test_every_flag_parses(capsys):
    values = {
        "data": "mimic", "root": "r", "cache_dir": "c", "prepared_size": 256, "views": "all",
        "split_file": "s", "uncertain": "ones", "labels": "negbio", "triplets": "t", "workers": 3,
        "queries": "corpus", "pathology_book": "b", "hold_out": "a,b", "text_encoder": "hashing",
        "backbone": "resnet18", "image_size": 128, "dim": 64, "layers": 2, "heads": 8,
        "dropout": 0.2, "position": "sincos", "streams": "single", "contrast": "none",
        "alpha": 0.5, "beta": 0.25, "mask": "linear", "icl": "dot", "unmentioned": "ignore",
        "flip": "naive", "crop": 0.5, "augment_ops": 1, "epochs": 7, "max_steps": 9,
        "batch_size": 16, "accumulate": 4, "lr": 0.01, "min_lr": 0.001, "warmup_epochs": 0.5,
        "weight_decay": 0.1, "clip": 2.0, "out_dir": "o", "seed": 5, "device": "cpu",
        "amp": "bf16", "log_every": 3, "save_every": 11}
    switches = ["resume", "compile", "deterministic"]
    given = [f"--{k.replace('_', '-')}={v}" for k, v in values.items()]
    parsed = train.parse_args(given + [f"--{k}" for k in switches])
    assert vars(parsed) == values | dict.fromkeys(switches, True)
    with pytest.raises(SystemExit) as caught:
        train.parse_args(["--help"])
    page = capsys.readouterr().out
    assert caught.value.code == 0
    documented = {word.strip("[],;)") for word in page.split() if word.startswith(("--", "[--"))}
    assert documented - {"--help"} == {f"--{k.replace('_', '-')}" for k in [*values, *switches]}
