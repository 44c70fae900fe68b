"""Proves that each loss is its equation, written a second time below as a slow loop over the cells.

    python -m pytest tests/test_losses.py
"""
import math
from types import SimpleNamespace

import pytest
import torch

from losses import (existence_loss, icl_loss, image_labels, loss_counts, masked_mean, medslip_loss,
                    proto_loss)

B, m, n, T = 3, 6, 5, 8


def draw_existence(seed=0):
    """[B,n,m]: nothing is present in image 0, all in image 1, image 2 is mixed; 2 = uncertain."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(-1, 3, (B, n, m), generator=g)
    y[0][y[0] == 1] = 0
    y[1] = 1
    return y


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------- equations, slowly

def slow_labels(existence):  # [B,q,k] -> [B,q]
    def label(row):
        return 1 if 1 in row else 0 if 0 in row else -1
    return torch.tensor([[label(row) for row in image] for image in existence.tolist()])


def slow_bce(logits, labels):  # Eqs. 2 and 6
    terms = []
    for x, y in zip(logits.flatten().tolist(), labels.flatten().tolist()):
        p = 1 / (1 + math.exp(-x))
        if y in (0, 1):
            terms.append(-math.log(p) if y == 1 else -math.log(1 - p))
    return sum(terms) / len(terms) if terms else 0.0


def slow_proto(z, text, existence, index):  # Eqs. 3 and 4, the prototype in the denominator as well
    terms, z = [], z.detach()
    for b in range(len(z)):
        for q in range(z.shape[1]):
            positives = [text[k] for k in range(len(text)) if existence[b, q, k] == 1]
            if not positives:
                continue
            up = math.exp(z[b, q] @ (sum(positives) / len(positives)))
            down = up
            for k in index[b, q].tolist():
                if k >= 0 and existence[b, q, k] != 1:
                    down += math.exp(z[b, q] @ text[k])
            terms.append(-math.log(up / down))
    return sum(terms) / len(terms) if terms else 0.0


def slow_index(existence, negatives):
    """Distinct concepts that are not present, -1 where there are too few."""
    index = torch.full((*existence.shape[:2], negatives), -1)
    for b in range(len(existence)):
        for q in range(existence.shape[1]):
            order = torch.randperm(existence.shape[2]).tolist()
            free = [k for k in order if existence[b, q, k] != 1]
            for i, k in enumerate(free[:negatives]):
                index[b, q, i] = k
    return index


# --------------------------------------------------------------------------------------- the tests

def test_image_labels():
    y = draw_existence()
    pathology, anatomy = image_labels(y)
    assert torch.equal(pathology, slow_labels(y.transpose(1, 2)))
    assert torch.equal(anatomy, slow_labels(y))
    y = torch.tensor([[[-1, 2, 0, 0],
                       [-1, -1, 1, -1]]], dtype=torch.int8)
    pathology, anatomy = image_labels(y)
    assert pathology.tolist() == [[-1, -1, 1, 0]] and anatomy.tolist() == [[0, 1]]


@pytest.mark.parametrize("seed", range(3))
def test_existence_and_icl(seed):
    y = draw_existence(seed)
    pathology, anatomy = image_labels(y)
    for labels in (pathology, anatomy):
        logits = 3 * draw(*labels.shape, seed=seed)
        loss = existence_loss(logits, labels).item()
        assert loss == pytest.approx(slow_bce(logits, labels), rel=1e-5)
    logits = 3 * draw(B, n, m, seed=seed)
    assert icl_loss(logits, y).item() == pytest.approx(slow_bce(logits, y), rel=1e-5)
    assert existence_loss(logits, torch.full_like(y, -1)) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("negatives", [2, 7])  # 7: more than there ever are candidates here
def test_proto(seed, negatives):
    y, z, text = draw_existence(seed), draw(B, n, T, seed=seed), draw(m, T, seed=seed + 9)
    index = slow_index(y, negatives)
    slow = slow_proto(z, text, y, index)
    assert slow > 0
    assert proto_loss(z, text, y, negative_index=index).item() == pytest.approx(slow, rel=1e-5)
    if negatives == 7:  # all candidates are taken, so the loss's own draw has no choice
        assert proto_loss(z, text, y).item() == pytest.approx(slow, rel=1e-5)


def test_proto_takes_no_present_concept_as_negative():
    y = torch.tensor([[[1, 1, 0, -1]]])
    z, text = draw(1, 1, T), draw(4, T)
    given = proto_loss(z, text, y, negative_index=torch.tensor([[[0, 2, 1, 3]]]))
    assert given == proto_loss(z, text, y, negative_index=torch.tensor([[[-1, 2, -1, 3]]]))


def test_proto_draws_each_candidate_once_and_equally_often():
    """Text k lies along axis k, so that the loss tells which 3 of the 6 candidates were drawn."""
    y = torch.tensor([[[1, -1, 0, -1, 1, 2, 0, -1]]])
    z = torch.tensor([[[1.0, 1, 2, 4, 1, 8, 16, 32]]]).log()
    torch.manual_seed(0)
    seen = [round(math.exp(proto_loss(z, torch.eye(8), y, negatives=3)) - 1) for _ in range(200)]
    assert all(total.bit_count() == 3 for total in seen)  # the sum of three of 1, 2, 4, .. 32
    assert all(70 < sum(total >> k & 1 for total in seen) < 130 for k in range(6))


def test_proto_with_a_random_positive():
    """MedKLIP's: each positive in turn, hence on average the mean of their losses."""
    y, z, text = torch.tensor([[[1, 1, 0, -1]]]), draw(1, 1, T), draw(4, T)
    index = torch.tensor([[[2, 3]]])
    single = [proto_loss(z, text, torch.tensor([[positive]]), negative_index=index).item()
              for positive in ([1, 0, 0, 0], [0, 1, 0, 0])]
    torch.manual_seed(0)
    drawn = [proto_loss(z, text, y, negative_index=index, prototype=False).item()
             for _ in range(40)]
    near = [min(range(2), key=lambda i: abs(d - single[i])) for d in drawn]
    assert all(d == pytest.approx(single[i], rel=1e-6) for d, i in zip(drawn, near))
    assert 10 < sum(near) < 30


def random_output(y, streams=2, seed=0):
    B, n, m = y.shape
    fields = dict(pathology_logits=draw(B, m, seed=seed), anatomy_logits=draw(B, n, seed=seed + 1),
                  pathology_z=draw(B, m, T, seed=seed + 2), anatomy_z=draw(B, n, T, seed=seed + 3),
                  relation_logits=draw(B, n, m, seed=seed + 4))
    if streams == 1:
        fields |= dict(anatomy_logits=None, anatomy_z=None)
    return SimpleNamespace(**{k: v if v is None else v.requires_grad_() for k, v in fields.items()})


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("unmentioned", ["ignore", "negative"])
def test_total(streams, unmentioned):
    y = draw_existence()
    p_text, a_text, out = draw(m, T, seed=5), draw(n, T, seed=6), random_output(y, streams)
    p_index, a_index = slow_index(y.transpose(1, 2), 3), slow_index(y, 3)
    parts = medslip_loss(out, y, p_text, a_text, alpha=0.5, beta=2.0, unmentioned=unmentioned,
                         pathology_negatives=p_index, anatomy_negatives=a_index)
    if unmentioned == "negative":
        y = torch.where(y == -1, 0, y)
    exist = slow_bce(out.pathology_logits, slow_labels(y.transpose(1, 2)))
    proto = slow_proto(out.pathology_z, a_text, y.transpose(1, 2), p_index)
    if streams == 2:
        exist += slow_bce(out.anatomy_logits, slow_labels(y))
        proto += slow_proto(out.anatomy_z, p_text, y, a_index)
    icl = slow_bce(out.relation_logits, y)
    assert [parts[k].item() for k in ("existence", "protocl", "icl", "loss")] == pytest.approx(
        [exist, proto, icl, exist + 0.5 * proto + 2 * icl], rel=1e-5)
    parts["loss"].backward()
    for value in vars(out).values():
        assert value is None or value.grad.isfinite().all() and value.grad.any()


def test_contrast_none_and_beta_0_report_their_part_but_do_not_teach_it():
    y, p_text, a_text = draw_existence(), draw(m, T), draw(n, T)
    out = random_output(y)
    parts = medslip_loss(out, y, p_text, a_text, contrast="none", beta=0.0)
    assert parts["loss"] == parts["existence"] and parts["protocl"] > 0 and parts["icl"] > 0
    parts["loss"].backward()
    assert out.pathology_logits.grad.any()
    assert not out.pathology_z.grad.any() and not out.relation_logits.grad.any()


def test_nothing_stated_costs_nothing():
    y = torch.full((B, n, m), -1)
    out = random_output(y)
    parts = medslip_loss(out, y, draw(m, T), draw(n, T))
    assert all(v == 0 for v in parts.values())
    parts["loss"].backward()
    assert all(v.grad.isfinite().all() and not v.grad.any() for v in vars(out).values())


@pytest.mark.parametrize("unmentioned", ["ignore", "negative"])
def test_parts_of_a_batch_average_to_the_whole(unmentioned):
    """Unequal parts: image 0 has no positive, image 1 nothing else, so plain means would differ."""
    y, p_text, a_text = draw_existence(), draw(m, T, seed=5), draw(n, T, seed=6)
    p_index, a_index = slow_index(y.transpose(1, 2), 3), slow_index(y, 3)
    whole, out = random_output(y), random_output(y)

    def loss(out, s, **more):
        sliced = SimpleNamespace(**{k: v[s] for k, v in vars(out).items()})
        return medslip_loss(sliced, y[s], p_text, a_text, unmentioned=unmentioned,
                            pathology_negatives=p_index[s], anatomy_negatives=a_index[s], **more)

    expected = loss(whole, slice(None))
    expected["loss"].backward()
    slices = [slice(b, b + 1) for b in range(B)]
    counts = sum(loss_counts(y[s], unmentioned) for s in slices)
    torch.testing.assert_close(counts, loss_counts(y, unmentioned))
    parts = [loss(out, s, counts=counts / B) for s in slices]
    for k in expected:
        torch.testing.assert_close(sum(p[k] for p in parts) / B, expected[k])
    (sum(p["loss"] for p in parts) / B).backward()
    for k in vars(out):
        torch.testing.assert_close(getattr(out, k).grad, getattr(whole, k).grad)


def test_loss_counts_by_hand():
    y = torch.tensor([[[1, 0, -1],
                       [-1, -1, -1]]])
    # pathologies 1 0 -1, anatomies 1 -1; one pathology and one anatomy present; two stated cells
    assert loss_counts(y).tolist() == [2, 1, 1, 1, 2]
    assert loss_counts(y, "negative").tolist() == [3, 2, 1, 1, 6]


def test_masked_mean_ignores_what_it_leaves_out():
    values = torch.tensor([1.0, float("inf"), float("nan"), 3.0])
    keep = torch.tensor([True, False, False, True])
    assert masked_mean(values, keep) == 2 and masked_mean(values, ~keep & keep) == 0
    assert masked_mean(values, keep, count=torch.tensor(8.0)) == 0.5
