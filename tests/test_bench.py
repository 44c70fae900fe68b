"""Proves that the benchmark runs, and that its slow loops compute what our losses compute."""
import pytest
import torch

import bench


def test_loops_and_matrices_agree():
    torch.manual_seed(0)
    existence = torch.randint(-1, 1, (3, 9, 14)).masked_fill(torch.rand(3, 9, 14) < 0.2, 1)
    existence[0] = -1  # an image of which nothing is known
    streams = bench.random_streams(torch.randn(14, 24), torch.randn(9, 24), existence, count=3)
    relation = torch.randn(3, 9, 14, requires_grad=True)
    inputs, results = [relation, *(stream[0] for stream in streams)], []
    for loss in (bench.our_losses, bench.published_losses):
        value = loss(streams, relation, existence)
        results.append([value, *torch.autograd.grad(value, inputs)])
    for ours, theirs in zip(*results):  # the losses, then their gradients
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("case", ["floor", "bf16", "loop", "data"])
def test_each_case_is_measured(case):
    args = bench.parse_args(["--image-size=32", "--batch-size=2", "--steps=1"])
    seconds, peak = bench.measure(case, args)
    assert seconds > 0 and peak > 100
