"""Each loss is its equation, which is written a second time below as a slow loop over the cells.

    python -m pytest tests/test_losses.py
"""
import math
from types import SimpleNamespace

import pytest
import torch

from losses import existence_loss, medslip_loss, proto_loss

B, m, n, T = 3, 6, 5, 8


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_existence():
    """[B,n,m]: nothing is present in image 0, all in image 1, image 2 is mixed; 2 = uncertain."""
    y = torch.randint(-1, 3, (B, n, m), generator=torch.Generator().manual_seed(0))
    y[0][y[0] == 1] = 0
    y[1] = 1
    return y


# --------------------------------------------------------------------------- the equations, slowly

def slow_labels(existence):  # [B,q,k] -> [B,q]
    labels = []
    for row in existence.flatten(0, 1).tolist():
        labels.append(max([value for value in row if value in (0, 1)], default=-1))
    return torch.tensor(labels).view(existence.shape[:2])


def slow_bce(logits, labels):  # Eqs. 2 and 6
    terms = []
    for logit, label in zip(logits.flatten().tolist(), labels.flatten().tolist()):
        p = 1 / (1 + math.exp(-logit))
        if label == 1:
            terms.append(-math.log(p))
        if label == 0:
            terms.append(-math.log(1 - p))
    return sum(terms) / max(len(terms), 1)


def slow_proto(z, text, existence, index):  # Eqs. 3 and 4, the prototype in the denominator as well
    terms = []
    for b in range(len(z)):
        for q in range(z.shape[1]):
            positives = [text[k] for k in range(len(text)) if existence[b, q, k] == 1]
            if not positives:
                continue
            numerator = math.exp(z[b, q] @ (sum(positives) / len(positives)))
            denominator = numerator
            for k in index[b, q].tolist():
                if k >= 0 and existence[b, q, k] != 1:
                    denominator += math.exp(z[b, q] @ text[k])
            terms.append(-math.log(numerator / denominator))
    return sum(terms) / max(len(terms), 1)


def slow_swap(logits, existence):
    """A pair is present where film b shows the pathology and film b - 1 something at the place."""
    what, where = slow_labels(existence.transpose(1, 2)), slow_labels(existence)  # [B,m], [B,n]
    pairs = torch.full(existence.shape, -1)
    for b in range(B):
        for i in range(n):
            for j in range(m):
                if where[b - 1, i] >= 0 and what[b, j] >= 0:
                    pairs[b, i, j] = where[b - 1, i] * what[b, j]
    return slow_bce(logits, pairs)


# --------------------------------------------------------------------------------------- the tests

def test_no_loss_where_nothing_is_known():
    assert existence_loss(draw(B, m), torch.full((B, m), -1)) == 0


def test_proto_draws_each_candidate_once_and_equally_often():
    """exp(Z . T_k) is 1 for the positives and 1, 2, 4 .. 32 for the six candidates. Therefore
    exp(loss) - 1 is the sum of three of these, and its bits tell which ones were drawn."""
    y = torch.tensor([[[1, -1, 0, -1, 1, 2, 0, -1]]])
    z = torch.tensor([[[1.0, 1, 2, 4, 1, 8, 16, 32]]]).log()
    torch.manual_seed(0)
    sums = [round(math.exp(proto_loss(z, torch.eye(8), y, negatives=3)) - 1) for _ in range(200)]
    assert all(total.bit_count() == 3 for total in sums)
    for candidate in (1, 2, 4, 8, 16, 32):
        assert 70 < sum(total & candidate > 0 for total in sums) < 130


def test_proto_with_a_random_positive():
    """Without prototypes each loss is that of one positive alone, and each positive is drawn."""
    z, text, index = draw(1, 1, T), draw(4, T), torch.tensor([[[2, 3]]])

    def loss(*existence, prototype):
        y = torch.tensor([[existence]])
        return round(proto_loss(z, text, y, 7, index, prototype).item(), 4)

    torch.manual_seed(0)
    drawn = {loss(1, 1, 0, -1, prototype=False) for _ in range(20)}
    assert drawn == {loss(1, 0, 0, -1, prototype=True), loss(0, 1, 0, -1, prototype=True)}


def random_output():
    """What medslip_loss reads of a model's output."""
    return SimpleNamespace(pathology_logits=draw(B, m), pathology_z=draw(B, m, T, seed=2),
                           anatomy_logits=draw(B, n, seed=3), anatomy_z=draw(B, n, T, seed=4),
                           relation_logits=draw(B, n, m, seed=5))


@pytest.mark.parametrize("streams", ["single", "dual"])
@pytest.mark.parametrize("choice", [{}, {"unmentioned": "ignore"}], ids=["default", "ignore"])
def test_total(streams, choice):
    torch.manual_seed(0)
    y, p_text, a_text, out = draw_existence(), draw(m, T), draw(n, T), random_output()
    p_index, a_index = torch.randint(-1, n, (B, m, 3)), torch.randint(-1, m, (B, n, 3))
    if streams == "single":
        out.anatomy_logits = out.anatomy_z = None
    swapped = draw(B, n, m, seed=6)
    parts = medslip_loss(out, y, p_text, a_text, alpha=0.5, beta=2.0, separate=3.0, **choice,
                         swapped_logits=swapped, pathology_negatives=p_index,
                         anatomy_negatives=a_index)
    if not choice:  # by default unmentioned is negative, as in the paper
        y = torch.where(y == -1, 0, y)
    by_pathology = y.transpose(1, 2)                                            # [B,m,n]
    exist = slow_bce(out.pathology_logits, slow_labels(by_pathology))
    proto = slow_proto(out.pathology_z, a_text, by_pathology, p_index)
    if streams == "dual":
        exist += slow_bce(out.anatomy_logits, slow_labels(y))
        proto += slow_proto(out.anatomy_z, p_text, y, a_index)
    icl = slow_bce(out.relation_logits, y)
    total = exist + 0.5 * proto + 2 * icl + 3 * slow_swap(swapped, y)
    expected = dict(existence=exist, protocl=proto, icl=icl, loss=total)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, rel=1e-5)


def test_a_part_that_is_switched_off_is_still_reported():
    y, p_text, a_text = draw_existence(), draw(m, T), draw(n, T)
    parts = medslip_loss(random_output(), y, p_text, a_text, contrast="none", beta=0.0)
    assert parts["loss"] == parts["existence"] and parts["protocl"] > 0 and parts["icl"] > 0
