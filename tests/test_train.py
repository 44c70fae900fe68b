"""Proves that training learns, repeats itself exactly however it is interrupted or split up, and
never spoils what it has saved.

    python -m pytest tests/test_train.py
    KILLS=20 python -m pytest tests/test_train.py -k killed     # 20 kills at random moments
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import train
from checkpoint import load_model
from cli import InputError
from conftest import ROOT

TINY = ["--image-size", "32", "--dim", "16", "--batch-size", "8", "--workers", "0", "--device",
        "cpu", "--amp", "off", "--log-every", "1"]


def run_here(root, out, *flags):
    """train.py's main with tiny settings -> its checkpoint."""
    train.main(train.parse_args(["--root", str(root), "--out-dir", str(out), *TINY, *flags]))
    return torch.load(out / "ckpt.pt", weights_only=True)


def run_there(root, out, *flags, **options):
    """The command in a process of its own."""
    command = [sys.executable, "train.py", "--root", str(root), "--out-dir", str(out), *TINY]
    return subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


# --------------------------------------------------------------------------------------- it learns

def test_loss_falls_and_files_are_complete(phantoms, tmp_path):
    checkpoint = run_here(phantoms, tmp_path, "--epochs", "3", "--lr", "3e-3")
    losses = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert {"model", "optimizer", "scaler", "config", "args", "epoch", "step", "rng", "best",
            "queries"} <= checkpoint.keys()
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    curve = [line["validation_auroc"] for line in log_of(tmp_path) if "validation_auroc" in line]
    assert len(curve) == 3 and best["best"]["auroc"] == max(curve)
    assert load_model(tmp_path / "best.pt").queries["encoder"] == "hashing"


def test_start_from_another_run(phantoms, tmp_path):
    """The first step starts from the other run's weights; a network of other sizes is refused."""
    first = run_here(phantoms, tmp_path / "first", "--max-steps", "3")
    flags = ["--start-from", str(tmp_path / "first" / "ckpt.pt"), "--max-steps", "1"]
    second = run_here(phantoms, tmp_path / "second", *flags, "--lr", "0", "--min-lr", "0")
    assert all(torch.equal(first["model"][k], second["model"][k]) for k in first["model"]
               if "running" not in k and "batches" not in k)  # those of batch norm move on
    with pytest.raises(InputError, match="does not fit"):
        run_here(phantoms, tmp_path / "third", *flags, "--dim", "32")


def test_learning_rate():
    rates = [train.learning_rate(step, 4, 8, 1.0, 0.2) for step in range(9)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])  # up in equal steps
    assert rates[6] == pytest.approx(0.6) and rates[8] == pytest.approx(0.2)  # half way, end


def test_released_rate():
    """Five steps of 100 iterations up to 1, then a cosine from epoch to epoch: 1 -> 0.2."""
    rates = [train.released_rate(step, 700, 10, 1.0, 0.2) for step in (0, 99, 100, 499, 699)]
    assert rates == pytest.approx([0.2, 0.2, 0.36, 0.84, 1.0])
    assert train.released_rate(5 * 700 + 699, 700, 10, 1.0, 0.2) == pytest.approx(0.6)


@pytest.mark.parametrize("flags", [
    "--recipe paper", "--recipe released", "--streams single --contrast random",
    "--contrast none --beta 0", "--mask none --icl bare", "--mask hard --existence embedding",
    "--flip none --unmentioned ignore", "--hold-out effusion --queries published",
    "--augment-ops 2 --amp bf16"])
def test_every_switch_trains(phantoms, tmp_path, flags):
    checkpoint = run_here(phantoms, tmp_path, "--max-steps", "2", *flags.split())
    assert checkpoint["step"] == 2
    assert "excluded_obs" not in checkpoint["queries"]["pathology"]["names"]  # has no labels
    if "--hold-out" in flags:
        assert "effusion" not in checkpoint["queries"]["pathology"]["names"]


def test_recipes_resolve():
    """One word sets every row of the table; a single flag overrides it."""
    for column, recipe in enumerate(("paper", "released", "ours")):
        args = train.resolve(train.parse_args(["--recipe", recipe]), {})
        for flag, row in train.RECIPES.items():
            expected = row[column] if row[column] != "preset" else train.SYNTHETIC[flag]
            assert getattr(args, flag) == expected, flag
    args = train.resolve(train.parse_args("--recipe released --icl cosine".split()), {})
    assert (args.icl, args.mask, args.beta) == ("cosine", "linear", 1.0)
    args = train.resolve(train.parse_args("--data mimic".split()), {})
    assert (args.epochs, args.batch_size, args.lr, args.backbone) == (100, 64, 1e-4, "resnet50")


@pytest.mark.parametrize("ratio, dtype", [(0.5, torch.bfloat16), (1.3, None)])
def test_amp_auto_measures(monkeypatch, ratio, dtype):
    """bf16 gains on some processors and loses on others: the faster matrix product decides."""
    seconds = iter([ratio, 1.0])
    monkeypatch.setattr(cli.timeit, "repeat", lambda *_, **__: [next(seconds)])
    assert cli.pick_amp("auto", torch.device("cpu"))[0] is dtype
    assert cli.pick_amp("bf16", torch.device("cpu"))[0] is torch.bfloat16


# -------------------------------------------------------------------------------- it repeats itself

def test_resume_repeats_the_uninterrupted_run(phantoms, tmp_path):
    """Same weights and same next losses, although the second half ran with other workers."""
    whole = run_here(phantoms, tmp_path / "whole", "--max-steps", "20", "--dropout", "0.1")
    run_here(phantoms, tmp_path / "parts", "--max-steps", "9", "--dropout", "0.1")
    parts = run_here(phantoms, tmp_path / "parts", "--max-steps", "20", "--resume",
                     "--workers", "2")
    assert same_weights(whole, parts)
    losses = [[line["loss"] for line in log_of(tmp_path / name) if "loss" in line]
              for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_killed_run_goes_on(phantoms, tmp_path):
    """SIGKILL at random moments, each time resumed: the weights of an undisturbed run."""
    flags = ["--max-steps", "30", "--save-every", "2"]
    whole = run_here(phantoms, tmp_path / "whole", *flags)
    out, rng = tmp_path / "killed", random.Random(0)
    for kill in range(int(os.environ.get("KILLS", 1)) + 1):
        resume = ["--resume"] if (out / "ckpt.pt").exists() else []
        process = run_there(phantoms, out, *flags, *resume)
        if kill < int(os.environ.get("KILLS", 1)):
            while not (out / "ckpt.pt").exists() and process.poll() is None:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 1.0) if kill == 0 else rng.uniform(3, 6))
            process.kill()
        process.communicate()
    assert process.returncode == 0
    assert same_weights(whole, torch.load(out / "ckpt.pt", weights_only=True))


def test_sigterm_saves_first(phantoms, tmp_path):
    process = run_there(phantoms, tmp_path, "--epochs", "500", "--save-every", "5")
    while not (tmp_path / "ckpt.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped at step" in out
    step = int(out.split("stopped at step ")[1].split(":")[0])
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == step


def test_two_processes_repeat_one(phantoms, tmp_path):
    """torchrun with two gloo processes = one process with --accumulate 2. Batch norm sees the same
    parts of the batch in both; sums of gradients are rounded differently."""
    flags = ["--max-steps", "4", "--dropout", "0.1"]
    one = run_here(phantoms, tmp_path / "one", *flags, "--accumulate", "2")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--standalone", "train.py", "--root", str(phantoms), "--out-dir",
               str(tmp_path / "two"), *TINY, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two" / "ckpt.pt", weights_only=True)
    for name, value in one["model"].items():
        # the running statistics of batch norm are those of the first process alone
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(two["model"][name], value, atol=2e-4, rtol=2e-3)


# ------------------------------------------------------------------------------- it spoils nothing

def test_a_loss_that_is_not_finite_ends_the_run(phantoms, tmp_path):
    """Exit 1, one line, and the checkpoint of before stays."""
    before = run_here(phantoms, tmp_path, "--max-steps", "3", "--clip", "inf")
    broken = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    broken["model"]["text_projection.bias"] += float("nan")
    torch.save(broken, tmp_path / "ckpt.pt")
    process = run_there(phantoms, tmp_path, "--resume", "--max-steps", "9", "--clip", "inf")
    _, error = process.communicate()
    assert process.returncode == 1 and "not finite" in error and "Traceback" not in error
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == before["step"]


def test_a_checkpoint_that_cannot_be_written(phantoms, tmp_path, monkeypatch):
    """A full disk: one line, and the file of before stays whole."""
    before = run_here(phantoms, tmp_path, "--max-steps", "2")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        run_here(phantoms, tmp_path, "--max-steps", "4", "--resume")
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == before["step"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("flags", [
    "--lr -1", "--batch-size 7 --accumulate 2", "--dim 18", "--data nowhere", "--resume",
    "--hold-out cold", "--device cuda:9", "--crop 0", "--epochs none",
    "--recipe paper --data mimic", "--text-encoder no/such-model", "--pathology-book none.json",
    "--triplets none.json", "--data nih"])
def test_wrong_flags_are_one_line(phantoms, tmp_path, flags):
    with pytest.raises((InputError, SystemExit)) as caught:
        run_here(phantoms, tmp_path, *flags.split())
    if caught.type is SystemExit:
        assert caught.value.code == 2
    else:
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.pt"))


def test_exit_status_of_the_command(tmp_path):
    process = run_there(tmp_path / "nothing", tmp_path / "out", "--data", "mimic")
    _, error = process.communicate()
    assert process.returncode == 2 and error.count("\n") == 1 and "no mimic data" in error


def test_resume_refuses_another_flag(phantoms, tmp_path):
    run_here(phantoms, tmp_path, "--max-steps", "1")
    with pytest.raises(InputError, match="cannot change --lr"):
        run_here(phantoms, tmp_path, "--resume", "--lr", "0.5")
