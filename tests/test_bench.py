"""Proves that the benchmark's hand counts and its slow losses are right, and that it runs.

    python -m pytest tests/test_bench.py
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from model import MeDSLIP, MeDSLIPConfig

REPO = Path(bench.__file__).parent
CONFIGS = [MeDSLIPConfig(), MeDSLIPConfig(icl="dot"),
           MeDSLIPConfig(backbone="small", image_size=64, dim=96, layers=2, position=True),
           MeDSLIPConfig(backbone="resnet18", image_size=128, dim=64, heads=2, icl="bare")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.backbone}-{c.icl}")
def test_hand_counts_are_the_machines(config):
    """Parameters exactly; multiply-adds as PyTorch counts those of one image's forward pass, but
    for the text projection, which is done once a batch."""
    m, n = 75, 51
    rows = bench.costs(config, m, n)
    with torch.device("meta"):
        model = MeDSLIP(config).eval()
        images = torch.empty(1, 3, config.image_size, config.image_size)
        texts = torch.empty(m, 768), torch.empty(n, 768)
        with FlopCounterMode(display=False) as counter:
            model(images, *texts, need_attention=True)  # unfused: every product is seen
    assert sum(r[1] for r in rows) == sum(p.numel() for p in model.parameters())
    once = (m + n) * 768 * config.dim
    assert sum(r[2] for r in rows) == counter.get_total_flops() / 2 - once


def test_costs_by_pencil():
    rows = {name: (count, adds) for name, count, adds in bench.costs(MeDSLIPConfig(), 75, 51)}
    assert rows["mask"] == (1024 * 1024 + 1024, 196 * 1024 * 1024)
    assert rows["text projection"][0] == 768 * 256 + 256
    assert rows["relations"] == (2, 75 * 51 * 256)
    first, second = 7 * 7 * 3 * 64 * 112 * 112, (64 * 64 + 9 * 64 * 64 + 2 * 64 * 256) * 56 * 56
    assert rows["backbone"][1] > first + second  # the first convolution and the first block


def test_kept_bytes_grow_with_the_queries():
    small, large = (bench.kept_bytes(MeDSLIPConfig(), m, 51) for m in (75, 150))
    layer = 4 * (75 * 256 * 4)  # at least four tensors [75,256] of fp32 in each of four layers
    assert large - small > 4 * layer
    assert 50e6 < small < 200e6


def test_loops_and_matrices_agree():
    """The released algorithm in its loops and our few matrix products: values and gradients."""
    torch.manual_seed(0)
    B, n, m = 3, 9, 14
    existence = torch.randint(-1, 1, (B, n, m)).masked_fill(torch.rand(B, n, m) < 0.2, 1)
    existence[0] = -1          # an image that says nothing
    existence[1, 2, 8:] = 1    # many positives
    assert all((existence != 1).sum(dim).min() >= 3 for dim in (1, 2))
    texts = torch.randn(m, 24), torch.randn(n, 24)
    negatives = [bench.draw_negatives(y, 3) for y in (existence.transpose(1, 2), existence)]
    gradients, values = [], []
    for loss in (bench.our_losses, bench.published_losses):
        torch.manual_seed(1)
        inputs = [torch.randn(*shape, requires_grad=True)
                  for shape in ((B, m, 24), (B, n, 24), (B, n, m))]
        value = loss(*inputs, *texts, existence, *negatives)
        value.backward()
        values.append(value.item())
        gradients.append([x.grad for x in inputs])
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] > 1
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, atol=1e-6)


def bench_run(tmp_path, *more):
    return subprocess.run([sys.executable, str(REPO / "bench.py"), "--backbone=small", "--steps=1",
                           "--image-size=32", "--batch-size=2", "--threads=1",
                           f"--out-dir={tmp_path}", *more], capture_output=True, text=True)


def test_table_and_json(tmp_path):
    done = bench_run(tmp_path, "--cases=fp32,losses,data", "--pathologies=20", "--anatomies=12")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    cases = {r["case"]: r for r in report["results"]}
    assert list(cases) == ["fp32", "losses", "data"] and "machine" in report
    for r in cases.values():
        assert "error" not in r and r["seconds"] > 0 and 100 < r["peak_mb"] < 4000, r
        assert r["images_per_s"] == pytest.approx(2 / r["seconds"])
        assert bench.CASES[r["case"]] in done.stdout
    assert cases["fp32"]["of_matmul"] > 0


@pytest.mark.parametrize("case", ["floor", "nchw", "bf16", "inference", "loop", "jpeg"])
def test_each_case_runs(case, monkeypatch):
    monkeypatch.setattr(bench, "FILM", (320, 240))
    threads = torch.get_num_threads()
    args = bench.parse_args(["--case", case, "--backbone", "small", "--image-size", "32",
                             "--batch-size", "2", "--steps", "1", "--device", "cpu",
                             "--pathologies", "20", "--anatomies", "12", "--threads", "1"])
    result = bench.measure(args)
    torch.set_num_threads(threads)
    assert result["case"] == case and result["seconds"] > 0


def test_a_case_that_fails_leaves_the_others():
    args = bench.parse_args(["--device", "cpu", "--batch-size", "2", "--steps", "1"])
    result = bench.in_process(args, "fp32", image_size=-1)
    assert result["case"] == "fp32" and result["error"] and "\n" not in result["error"]
    bench.print_results([result], 1, torch.device("cpu"))


def test_figure(tmp_path, monkeypatch):
    seen = []

    def in_process(args, case, **changes):
        seen.append(changes)
        value = next(iter(changes.values()))
        if value == 1000:
            return {"case": case, "error": "killed, out of memory?"}
        return {"case": case, "seconds": value / 10, "peak_mb": 100 * value, "busy": 1.0}
    monkeypatch.setattr(bench, "in_process", in_process)
    bench.main(bench.parse_args(["--figure", str(tmp_path / "cost.png"), "--device", "cpu",
                                 "--out-dir", str(tmp_path), "--backbone", "small"]))
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert len(seen) == sum(map(len, bench.GROWTH.values()))
    assert json.loads((tmp_path / "bench.json").read_text())["growth"]["image_size"]


@pytest.mark.parametrize("flag", ["--cases=floor,flour", "--no-such", "--batch-size=many"])
def test_one_line_and_status_2(tmp_path, flag):
    done = bench_run(tmp_path, flag)
    assert done.returncode == 2 and done.stderr.startswith("bench.py: ")
    assert done.stderr.count("\n") == 1, done.stderr
