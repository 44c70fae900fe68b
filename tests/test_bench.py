"""Proves that the benchmark runs, and that its slow loops compute what our losses compute."""
import torch

import bench
from losses import proto_loss


def test_loops_and_matrices_agree():
    torch.manual_seed(0)
    existence = torch.randint(-1, 1, (3, 14, 9)).masked_fill(torch.rand(3, 14, 9) < 0.2, 1)
    existence[0] = -1  # an image of which nothing is known
    z, text = torch.randn(3, 14, 24, requires_grad=True), torch.randn(9, 24)
    negatives = torch.rand(3, 14, 9).masked_fill(existence == 1, -1).topk(3).indices
    ours, loops = (loss(z, text, existence, negative_index=negatives)
                   for loss in (proto_loss, bench.loop_proto_loss))
    assert torch.allclose(ours, loops, atol=1e-5)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (ours, loops)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_each_case_is_measured(capsys):
    flags = ["--image-size=32", "--batch-size=2", "--steps=1", "--device=cpu"]
    bench.main(bench.parse_args([*flags, "--cases=floor"]))
    assert "floor" in capsys.readouterr().out
    for case in bench.CASES:  # here, as a process for each takes seconds to start
        assert bench.measure(case, bench.parse_args(flags))[0] > 0
