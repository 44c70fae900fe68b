"""MeDSLIP's three losses, the swap loss and their sum as functions of tensors (Eqs. 2-4, 6, 7).

    from losses import medslip_loss
    python -m pytest tests/test_losses.py     # each against a slow loop version of its equation

y (`existence`) is [B,n,m]: 1 present, 0 denied, -1 not mentioned. By unmentioned="negative" a -1
becomes 0 first; by "ignore" it is left out of Eqs. 2 and 6, where an image label is -1 only if all
its cells are. In both cases ProtoCL may draw it as a negative: it draws from everything that is not
present.

Differs from the paper:
- ProtoCL compares Z_2 with the frozen text vectors themselves (as released); the paper's T have
  passed the linear layer h_T.
- ProtoCL's prototype stands in the denominator of Eq. 4 as well (as released): as printed the loss
  has no lower bound.
Differs from the released code:
- unmentioned="negative", as in the paper: what a report does not state as present is negative.
  The released code scores only what a report states (unmentioned="ignore").
- The released prototypes come from a loop over batch x queries on tensors [B,n,m,T]. A dot product
  with a mean is the mean of dot products, so one matrix [B,q,k] does the same here.
"""
import torch
import torch.nn.functional as F


def image_labels(existence):
    """[B,n,m] -> (pathology [B,m], anatomy [B,n]): 1 if present anywhere, else 0 if
    denied anywhere, else -1."""
    def over(dim):
        present, denied = (existence == 1).any(dim), (existence == 0).any(dim)
        return torch.where(present, 1, torch.where(denied, 0, -1))
    return over(1), over(2)


def masked_mean(values, keep):
    """Mean of `values` where `keep`; 0 where nothing is kept."""
    return torch.where(keep, values, 0).sum() / keep.sum().clamp(min=1)


def existence_loss(logits, labels):
    """Binary cross-entropy of logits with labels of the same shape in {1,0,-1}, -1 left out: Eq. 2
    of [B,q], Eq. 6 of [B,n,m]."""
    bce = F.binary_cross_entropy_with_logits(
        logits.float(), (labels == 1).float(), reduction="none")                # [B,q] Eq. 2
    return masked_mean(bce, (labels == 0) | (labels == 1))


def proto_loss(z, text, existence, negatives=7, negative_index=None, prototype=True):
    """Eqs. 3-4: one stream's queried embedding finds the other stream's concepts it occurs with.

    z [B,q,T] projected queried embeddings; text [k,T] frozen vectors of the other stream's
    concepts; existence [B,q,k]. Queries without a positive carry no loss. `negatives` are drawn
    without replacement among concepts that are not present, unmentioned ones included; fewer are
    used where there are fewer. negative_index [B,q,negatives] fixes the draw (-1 = no candidate).
    prototype=False takes one positive at random instead of their mean (MedKLIP).
    """
    z, text = z.float(), text.float()
    present = existence == 1                                                    # [B,q,k]
    similarity = z @ text.T                                                     # [B,q,k] Z_2 . T
    if prototype:  # Z . P of a mean P is the mean of the Z . T
        positive = torch.where(present, similarity, 0).sum(-1)
        positive = positive / present.sum(-1).clamp(min=1)           # [B,q] Z_2 . P (Eq. 3)
    else:
        draw = torch.rand_like(similarity).masked_fill(~present, -1).argmax(-1, keepdim=True)
        positive = similarity.gather(-1, draw).squeeze(-1)                      # [B,q]
    if negative_index is None:  # the largest of uniform numbers are a draw without replacement
        noise = torch.rand_like(similarity).masked_fill(present, -1)
        negative_index = noise.topk(min(negatives, len(text)), dim=-1).indices  # [B,q,negatives]
    chosen = negative_index.clamp(min=0)
    usable = (negative_index >= 0) & ~present.gather(-1, chosen)
    negative = similarity.gather(-1, chosen).masked_fill(~usable, float("-inf"))
    logits = torch.cat([positive.unsqueeze(-1), negative], dim=-1)              # [B,q,1+negatives]
    return masked_mean(logits.logsumexp(-1) - positive, present.any(-1))        # Eq. 4


def icl_loss(relation_logits, existence):
    """Eq. 6: binary cross-entropy of pair logits [B,n,m] where existence [B,n,m] is 0 or 1."""
    return existence_loss(relation_logits, existence)                           # Eq. 6


def swap_loss(swapped_logits, existence):
    """ICL once more, with the streams of two films: not in the paper (`train.py --separate`).

    swapped_logits [B,n,m] relate film b's pathology embeddings to the anatomy embeddings of film
    b - 1 (at least two films); existence [B,n,m] of the films themselves. A pair is present where
    the pathology is anywhere in film b and something is at the anatomy in film b - 1. So a
    pathology embedding gains nothing by also telling the place.
    """
    pathology, anatomy = image_labels(existence)                                # [B,m], [B,n]
    anatomy = anatomy.roll(1, 0)
    pair = (anatomy == 1)[:, :, None] & (pathology == 1)[:, None, :]            # [B,n,m]
    known = (anatomy >= 0)[:, :, None] & (pathology >= 0)[:, None, :]
    return existence_loss(swapped_logits, torch.where(known, pair.long(), -1))


def medslip_loss(out, existence, pathology_text, anatomy_text, alpha=1.0, beta=1.0,
                 contrast="prototype", unmentioned="negative", swapped_logits=None, separate=0.0,
                 negatives=7, pathology_negatives=None, anatomy_negatives=None):
    """Eq. 7: existence + alpha ProtoCL + beta ICL, each but ICL summed over the streams.

    out: the model's output; existence [B,n,m]; texts [m,T], [n,T]. contrast: prototype | random |
    none. swapped_logits [B,n,m] add the swap loss with weight `separate`. pathology_negatives
    [B,m,negatives] index anatomies, anatomy_negatives [B,n,negatives] pathologies. Returns {"loss",
    "existence", "protocl", "icl"}, of which the first holds the swap loss too; an alpha or beta of
    0 still reports its part (icl of a single stream means nothing).
    """
    if unmentioned == "negative":
        existence = existence.masked_fill(existence == -1, 0)
    pathology, anatomy = image_labels(existence)                                # [B,m], [B,n]
    prototype, by_pathology = contrast != "random", existence.transpose(1, 2)   # [B,m,n]
    exist = existence_loss(out.pathology_logits, pathology)
    proto = proto_loss(out.pathology_z, anatomy_text, by_pathology, negatives,
                       pathology_negatives, prototype)
    if out.anatomy_logits is not None:
        exist = exist + existence_loss(out.anatomy_logits, anatomy)
        proto = proto + proto_loss(out.anatomy_z, pathology_text, existence, negatives,
                                   anatomy_negatives, prototype)
    icl = icl_loss(out.relation_logits, existence)
    alpha = 0.0 if contrast == "none" else alpha
    loss = exist + alpha * proto + beta * icl                                   # Eq. 7
    if swapped_logits is not None:
        loss = loss + separate * swap_loss(swapped_logits, existence)
    return {"loss": loss, "existence": exist, "protocl": proto, "icl": icl}
