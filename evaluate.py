"""Zero-shot evaluation: what, where, which pair, and one radiograph at a time (Sec. IV).

    python evaluate.py --task classification --dataset nih --root data/nih
    python evaluate.py --task predict --image chest.png --prompt "air where it should not be"
    python evaluate.py --task grounding --dataset synthetic     # after `python train.py`

Tasks: classification, grounding, relation, anatomy, embedding, predict. Each prints a table and
writes <out-dir>/eval/<dataset>_<task>.json (metrics), .npz (answers and labels of each image) and
.png; predict writes predict.png, or of a folder predict.csv. B images, n anatomies, m pathologies,
N images of a split, L labels, K thresholds.

Differs from the released code in:
- Thresholds come from the validation split ("honest"); the best ones on the test set, which this
  literature reports, stand beside them ("customary").
- Attention maps are scaled by their own maximum, not their batch's, and up-sampled so that each
  cell stands where the backbone looks, not half a stride beside it (`upsample_map`).
- A model is always asked its whole query set, because queries attend to each other; labels find
  their query by name, and a label without one is encoded from its prompt and asked last.
"""
import contextlib
import csv
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import text
from model import CheckpointError, MeDSLIP
from text import InputError

# for labels that the vocabulary lacks, or has only in a bucket of rare findings
PROMPTS = {
    "COVID-19": "Pneumonia caused by the coronavirus SARS-CoV-2. Hazy ground-glass patches in both "
                "lungs, mostly at the outer edges and in the lower zones, that may merge into "
                "denser white consolidation as the illness goes on.",
    "Fibrosis": "Scarred lung tissue. Coarse white lines and a net-like pattern, mostly at the "
                "bases and edges of lungs that have shrunk.",
}

# -------------------------------------------------------------------------------- metrics: what


def best_f1_threshold(labels, scores):
    """The t at which `scores >= t` has the highest F1; labels {0,1} [N], scores [N]."""
    from sklearn.metrics import precision_recall_curve
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[np.argmax(f1[:-1])])


def classification_scores(labels, scores, threshold=None, names=None):
    """AUROC, average precision, and F1 and accuracy of `scores >= threshold`.

    labels [N] or [N,L] in {1,0}, -1 = unknown and left out; scores of the same shape. threshold:
    one number or L of them; None takes the one of maximal F1 on these very labels. For [N,L] the
    values are means over the classes, `per_class` {name: {...}} holds each, and a class without
    positives or without negatives has None everywhere and no part in the means.
    """
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score
    labels, scores = np.asarray(labels), np.asarray(scores, float)
    if labels.ndim == 2:
        names = [str(k) for k in range(labels.shape[1])] if names is None else list(names)
        each = threshold if np.ndim(threshold) else [threshold] * len(names)
        per_class = {name: classification_scores(labels[:, k], scores[:, k], each[k])
                     for k, name in enumerate(names)}
        whole = [c for c in per_class.values() if c["auroc"] is not None]
        macro = {key: float(np.mean([c[key] for c in whole])) if whole else None
                 for key in ("auroc", "ap", "f1", "acc")}
        return macro | {"threshold": {name: c["threshold"] for name, c in per_class.items()},
                        "n": len(labels), "per_class": per_class}
    labels, scores = labels[labels >= 0], scores[labels >= 0]
    counts = {"n_pos": int(labels.sum()), "n": len(labels)}
    if counts["n_pos"] in (0, len(labels)):
        return dict.fromkeys(("auroc", "ap", "f1", "acc", "threshold")) | counts
    threshold = best_f1_threshold(labels, scores) if threshold is None else float(threshold)
    return {"auroc": float(roc_auc_score(labels, scores)),
            "ap": float(average_precision_score(labels, scores)),
            "f1": float(f1_score(labels, scores >= threshold, zero_division=0)),
            "acc": float(accuracy_score(labels, scores >= threshold)),
            "threshold": threshold} | counts


def resample_counts(groups, n, seed, at_once):
    """Yields int64 [at_once,N]: how often each image occurs when whole groups are redrawn."""
    _, group = np.unique(groups, return_inverse=True)
    size, rng = group.max() + 1, np.random.default_rng(seed)
    for start in range(0, n, at_once):
        draws = [np.bincount(rng.integers(size, size=size), minlength=size)
                 for _ in range(min(at_once, n - start))]
        yield np.stack(draws)[:, group]


def bootstrap_auroc(labels, scores, n=1000, seed=0, groups=None):
    """AUROC of each class on n resamples of images, or of whole groups (patients): [n,L].

    labels [N,L] in {1,0,-1}. A resample is how often each image was drawn, so one sort serves all:
    with w+ and w- the drawn positives and negatives at each distinct score,
    AUROC = sum w+ (w- below + w- / 2) / (P N); nan where a resample lacks either kind.
    """
    classes = []
    for label, score in zip(np.transpose(labels), np.transpose(scores)):
        order = np.argsort(score, kind="stable")
        first = np.flatnonzero(np.diff(score[order], prepend=-np.inf))          # of each tie
        classes.append((order, first, label[order] == 1, label[order] == 0))
    result, groups = [], np.arange(len(labels)) if groups is None else groups
    for counts in resample_counts(groups, n, seed, max(1, 2_000_000 // len(labels))):  # 16 MB
        columns = []
        for order, first, positive, negative in classes:
            drawn = counts[:, order]                                            # [at_once,N]
            w_pos = np.add.reduceat(drawn * positive, first, axis=1)
            w_neg = np.add.reduceat(drawn * negative, first, axis=1)
            below = np.cumsum(w_neg, axis=1) - w_neg
            pairs = (w_pos.sum(1) * w_neg.sum(1)).astype(float)
            pairs[pairs == 0] = np.nan
            columns.append((w_pos * (below + w_neg / 2)).sum(1) / pairs)
        result.append(np.stack(columns, axis=1))
    return np.concatenate(result)


def central(values):
    """(low, high): the central 95 % of values [n], or of the row means of [n,L]; nan is left out,
    and of nothing it is (None, None)."""
    values = np.ma.masked_invalid(values)
    values = (values.mean(1) if values.ndim == 2 else values).compressed()
    return tuple(np.percentile(values, [2.5, 97.5]).tolist()) if len(values) else (None, None)


def bootstrap_ci(metric, labels, scores, n=1000, seed=0, groups=None):
    """(low, high): the central 95 % of a metric over n resamples of images, or of whole groups.

    metric: "auroc" (fast; of [N,L] the mean over classes) or a function of (labels, scores).
    Resamples that lack a kind of (integer) label that the whole has are left out.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if metric == "auroc":
        return central(bootstrap_auroc(labels.reshape(len(labels), -1),
                                       scores.reshape(len(labels), -1), n, seed, groups))
    groups, kinds, values = np.arange(len(labels)) if groups is None else groups, {*labels.flat}, []
    for counts in resample_counts(groups, n, seed, 1):
        rows = np.repeat(np.arange(len(labels)), counts[0])
        if labels.dtype.kind == "f" or {*labels[rows].flat} == kinds:
            values.append(metric(labels[rows], scores[rows]))
    return central(values)


# ------------------------------------------------------------------------------- metrics: where


def upsample_map(attention, height, width, size=None, centres=(0.0, None)):
    """Maps [...,h,w] -> [...,height,width], bilinear between the points that the cells look at.

    size (pixels) and centres are the network's input and `model.cell_centres()`: cell i looks at
    input pixel offset + stride * i. Without them the grid spans the picture as a ResNet's does,
    cell i on pixel i * height / h. Outside the outermost centres their value is kept.
    """
    attention, (offset, stride) = np.asarray(attention), centres

    def weights(cells, length):                                                 # [length,cells]
        pixels = size or length
        at = (np.arange(length) + 0.5) * pixels / length - 0.5                  # in input pixels
        at = np.clip((at - offset) / (stride or pixels / cells), 0, cells - 1)  # in cells
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells)))

    h, w = attention.shape[-2:]
    return weights(h, height) @ attention @ weights(w, width).T


THRESHOLDS = np.linspace(0, 0.98, 50)  # shares of a map's maximum


def overlap(heat, mask, thresholds):
    """(Dice [K], IoU [K]) of the region `heat > t` with mask, both [H,W], for ascending t."""
    level = np.searchsorted(thresholds, heat, side="left")      # how many thresholds are below it
    inside, predicted = (np.bincount(x, minlength=len(thresholds) + 1)[::-1].cumsum()[-2::-1]
                         for x in (level[mask], level.ravel()))                 # pixels above t
    total = predicted + mask.sum()
    return 2 * inside / np.maximum(total, 1), inside / np.maximum(total - inside, 1)


def points_at(heat, mask):
    """Pointing game: 1 if the maximum of heat [H,W] lies in mask; equal maxima share the point."""
    return float(mask[heat == heat.max()].mean())


def grounding_scores(attention, masks, threshold):
    """Pointing game, IoU and Dice: means over maps [h,w] and their masks [H,W].

    A map of another size is up-sampled to its mask; each is divided by its own maximum, and what
    exceeds the threshold is the predicted region. Empty masks are left out: nothing to find.
    """
    rows = []
    for heat, mask in zip(attention, masks):
        heat, mask = np.asarray(heat, float), np.asarray(mask) > 0
        if mask.any():
            heat = heat if heat.shape == mask.shape else upsample_map(heat, *mask.shape)
            dice, iou = overlap(heat / max(heat.max(), 1e-12), mask, np.array([threshold]))
            rows.append((points_at(heat, mask), iou[0], dice[0]))
    means = np.mean(rows, axis=0).tolist() if rows else [None] * 3
    return dict(zip(("pointing_game", "iou", "dice"), means), threshold=threshold, n=len(rows))


def relation_scores(truth, scores, anatomies):
    """How scores [N,n,m] find the pairs in truth [N,n,m] (1, 0, -1 = unknown and left out).

    auroc, ap: all cells pooled. cell_auroc: mean over the cells that are both present and absent.
    side: of the present pairs whose mirror image is not, how many score above it. top1: of the
    findings (a pathology present in an image), how many have a true anatomy as their best. None
    where nothing counts.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score
    known, present, absent = truth >= 0, truth == 1, truth == 0
    flat = truth[known], scores[known]
    mixed = present.any() and absent.any()
    cells = [roc_auc_score(truth[known[:, i, j], i, j], scores[known[:, i, j], i, j])
             for i, j in np.argwhere(present.any(0) & absent.any(0))]
    index = {name: i for i, name in enumerate(anatomies)}
    mirror = np.array([index.get(text.swap_sides(name), i) for i, name in enumerate(anatomies)])
    sided = present & ~present[:, mirror] & (mirror != np.arange(len(mirror)))[:, None]
    side = (scores > scores[:, mirror])[sided]
    best = np.take_along_axis(present, scores.argmax(1)[:, None], axis=1)[:, 0]          # [N,m]
    top1 = best[present.any(1)]

    def mean(values):
        return float(np.mean(values)) if len(values) else None

    return {"auroc": float(roc_auc_score(*flat)) if mixed else None,
            "ap": float(average_precision_score(*flat)) if mixed else None,
            "cell_auroc": mean(cells), "side": mean(side), "top1": mean(top1), "n": len(truth),
            "n_cells": len(cells), "n_sided": len(side), "n_findings": len(top1)}


# ----------------------------------------------------------------------------- asking the model


def pick_device(name=None):
    """torch.device of --device; where that was left out cuda if there is one, else cpu."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name} is none that PyTorch can use here; "
                         "leave it out") from None
    return torch.device(name)


def encode(args, model, prompts):
    """Text vectors [k,T] of new prompts, by --text-encoder or the encoder of the stored queries."""
    encoder = args.text_encoder or (model.queries or {}).get("encoder", text.CLINICAL_BERT)
    vectors = text.encode_text(prompts, encoder, args.cache_dir)
    if vectors.shape[1] != model.config.text_dim:
        raise InputError(f"the text encoder gives vectors of width {vectors.shape[1]}, the model "
                         f"takes {model.config.text_dim}; use the one it was trained with")
    return vectors


def load_model(args):
    """The checkpoint in eval mode; one without stored queries is asked the published vocabulary."""
    model = MeDSLIP.from_pretrained(args.checkpoint, map_location=args.device).requires_grad_(False)
    if model.queries is None:
        book = text.read_pathology_book(args.pathology_book) if args.pathology_book else None
        p, a = text.PATHOLOGIES, text.ANATOMIES
        prompts = text.pathology_prompts(p, book), text.anatomy_prompts(a, published=True)
        vectors = [encode(args, model, some) for some in prompts]
        model.queries = {"pathology": {"names": list(p), "text": vectors[0]},
                         "anatomy": {"names": list(a), "text": vectors[1]}}
    return model


def query_names(model):
    return model.queries["pathology"]["names"], model.queries["anatomy"]["names"]


def queries_for(model, labels, args):
    """How to ask for labels {label: vocabulary name or None}.

    Returns ((pathology_text [m+k,T], anatomy_text [n,T]), {label: its column}, [the k labels that
    have no stored query]). Those are encoded from --prompt or their definition and asked last.
    """
    stored, anatomy_text = model.queries["pathology"], model.queries["anatomy"]["text"]
    place = {name: k for k, name in enumerate(stored["names"])}
    columns = {label: place[name] for label, name in labels.items() if name in place}
    unseen = [label for label in labels if label not in columns]
    if args.prompt:
        unseen = list(labels) if len(labels) == 1 else unseen
        if len(unseen) != 1:
            raise InputError(f"--prompt asks for one label, and {len(unseen)} have no stored query "
                             f"({', '.join(unseen) or 'none'}); leave it out")
    if not unseen:
        return (stored["text"], anatomy_text), columns, unseen
    prompts = [args.prompt or PROMPTS.get(label)
               or text.pathology_prompts([labels[label] or label])[0] for label in unseen]
    columns |= {label: len(stored["names"]) + k for k, label in enumerate(unseen)}
    extra = encode(args, model, prompts)
    return (torch.cat([stored["text"].cpu(), extra]), anatomy_text), columns, unseen


def predict(args, model, table, rows, texts=None, attention=None):
    """Yields (rows [B], output, maps [B,m,h,w] or None) batch by batch, on the CPU, nothing kept.

    texts (pathology_text [m,T], anatomy_text [n,T]) default to the stored queries; attention is a
    kind of `attention_maps`. In float32: under bf16 the numbers would depend on the batch size.
    """
    texts = texts or [model.queries[kind]["text"] for kind in ("pathology", "anatomy")]
    texts, size = [t.to(args.device) for t in texts], args.image_size or model.config.image_size
    for start in range(0, len(rows), args.batch_size):
        chunk = np.asarray(rows[start:start + args.batch_size])
        images = torch.from_numpy(np.ascontiguousarray(table.images[chunk])).to(args.device)
        with torch.no_grad():
            out, maps = attention_maps(model, data.to_input(images, size), texts, attention)
        out = type(out)(**{k: None if v is None else v.cpu() for k, v in vars(out).items()})
        yield chunk, out, None if maps is None else maps.cpu().numpy()


def attention_maps(model, images, texts, kind):
    """(output, a map a pathology [B,m,h,w]) for images [B,3,H,W] by kind:

    None       no maps
    pathology  cross-attention of the pathology query, mean over layers and heads (the paper's)
    joint      the same, times the anatomy maps weighted by where the pathology is thought to be,
               smoothed, since a cell sees its neighbours' pixels too (one stream: only smoothed)
    mirror     joint, of the image and of its mirror image together: twice the cost

    Attention times the gradient of the existence logit (Chefer et al. 2021) pointed no better than
    `pathology` on phantoms, and so is not here.
    """
    if kind == "mirror":
        out, maps = attention_maps(model, images, texts, "joint")
        other = attention_maps(model, images.flip(-1), texts, "joint")[1]
        return out, maps + unmirror(other, images.shape[-1], model.cell_centres())
    out = model(images, *texts, need_attention=kind is not None)
    maps = out.pathology_attention
    if kind == "joint":
        if out.anatomy_attention is not None:
            places = relation_probability(model, out, texts).to(maps)                    # [B,n,m]
            places = places / places.sum(1, keepdim=True)
            maps = maps * torch.einsum("bnm,bnhw->bmhw", places, out.anatomy_attention)
        maps = F.pad(maps, (1, 1, 1, 1), mode="replicate")
        maps = F.avg_pool2d(F.avg_pool2d(maps, 2, 1), 2, 1)         # weights 1 2 1 along each axis
    return out, maps


def unmirror(maps, size, centres):
    """Maps [...,h,w] of mirrored images, size pixels wide, as maps of the images.

    What cell i of the image looks at lies between two cells of the mirror image wherever the cells
    are not centred in the image, as in a ResNet; hence an interpolation and not a plain flip.
    """
    (offset, stride), cells = centres, torch.arange(maps.shape[-1], device=maps.device)
    at = ((size - 1 - 2 * offset) / stride - cells).clamp(0, maps.shape[-1] - 1)
    return maps @ (1 - (at[:, None] - cells).abs()).clamp(min=0).to(maps).T


def trained_icl(model):
    return model.config.streams == "dual" and model.args.get("beta", 1) > 0


def relation_probability(model, out, texts):
    """Probability of each pair [B,n,m]: ICL's where it was trained, else existence times place.

    Without ICL (--beta 0, or one stream) the place comes from ProtoCL: softmax over the anatomies
    of the pathology's embedding against their text vectors.
    """
    if trained_icl(model):
        return out.relation_logits.double().sigmoid()
    place = torch.einsum("nt,bmt->bnm", texts[1].to(out.pathology_z), out.pathology_z).double()
    return out.pathology_logits.double().sigmoid()[:, None] * place.softmax(1)


# ---------------------------------------------------------------------------------------- tasks
# Each takes (args, model, table, rows), prints its table and returns (metrics for the JSON,
# arrays for the .npz, a function that draws the figure into a path).


def print_table(header, rows):
    """Text, counts, numbers to three decimals and None as a dash, in columns under a header."""
    cells = [["-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
             for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print()
    for first, *others in cells:
        print(first.ljust(widths[0]), *(v.rjust(w) for v, w in zip(others, widths[1:])), sep="  ")


def label_names(table, rows):
    """{label: its name in the vocabulary or None}; of phantoms, the pathologies that were drawn."""
    if table.dataset != "synthetic":
        return dict(zip(table.label_names, table.label_pathologies))
    drawn = label_values(table, rows, text.PATHOLOGIES).any(0)
    return {name: name for name, there in zip(text.PATHOLOGIES, drawn) if there}


def label_values(table, rows, labels):
    """int8 [N,L] in {1,0,-1} of a data set's own labels, or of any pathologies of phantoms."""
    if table.dataset != "synthetic":
        return np.asarray(table.labels[rows])
    return table.truth(rows, list(labels), text.ANATOMIES).any(1).astype(np.int8)


def pair_labels(table, rows, names, cells="all"):
    """int8 [N,n,m] and what it is: pairs as drawn, or as the reports have them (-1 = not said)."""
    truth = table.truth(rows, *names)
    if truth is not None:
        return truth, "what was drawn"
    if not table.has_reports:
        raise InputError(f"{table.dataset} has no reports and so no matrix of pairs; this task "
                         "takes synthetic, mimic, openi or covid-chestxray")
    matrix = table.existence(rows, *names)
    if cells == "mentioned":
        return matrix, "the reports, pairs they mention"
    return np.maximum(matrix, 0), "the reports, not mentioned = absent"


def place_labels(table, rows, names):
    """int8 [N,n]: is there anything at each anatomy?"""
    return (pair_labels(table, rows, names)[0] == 1).any(2).astype(np.int8)


def score_classes(args, table, rows, parts, gather):
    """One block of metrics for each part {title: names}; gather(rows) -> labels, scores [N,L].

    Thresholds are the validation split's, and the best on these rows stand under "customary".
    """
    names = [name for part in parts.values() for name in part]
    labels, scores = gather(rows)
    best = classification_scores(labels, scores, names=names)["threshold"]
    held, honest, source = table.rows("validate"), best, args.split
    if source == "test" and len(held):
        honest, source = classification_scores(*gather(held), names=names)["threshold"], "validate"
        blind = [name for name in names if honest[name] is None and best[name] is not None]
        honest |= dict.fromkeys(blind, 0.5)
        if blind:
            print("threshold 0.5, as in validation all or none are positive:", ", ".join(blind))
    spread = bootstrap_auroc(labels, scores, args.bootstrap, args.seed,
                             np.array([table.patients[i] for i in rows]))                # [1000,L]
    blocks, per_class, lines = {}, {}, []
    for title, part in parts.items():
        k = [names.index(name) for name in part]
        result, customary = (
            classification_scores(labels[:, k], scores[:, k], [t[name] for name in part], part)
            for t in (honest, best))
        for c, column in zip((result, *result["per_class"].values()), (k, *k)):
            c["auroc_ci95"] = central(spread[:, column])
        blocks[title] = result | {"thresholds_from": source, "customary": {
            key: customary[key] for key in ("f1", "acc", "threshold", "per_class")}}
        per_class |= result["per_class"]
        for name, c in (*result["per_class"].items(), (f"mean, {title}", result)):
            other = customary["per_class"].get(name, customary)
            lines.append([name, c.get("n_pos", ""), c["auroc"], *c["auroc_ci95"], c["ap"], c["f1"],
                          c["acc"], other["f1"], other["acc"]])
    print_table(["", "n+", "AUROC", "95 %", "", "AP", "F1", "ACC", "F1*", "ACC*"], lines)
    alike = [f"{name} ({c['n_pos']} of {c['n']})" for name, c in per_class.items()
             if c["auroc"] is None]
    if alike:
        print("not in the mean, as all or none are positive:", ", ".join(alike))
    print(f"{len(rows)} images of {args.split}; F1 and ACC at thresholds from {source}, "
          f"with * at the best on {args.split} itself (customary, flattering)")
    arrays = dict(ids=np.array([table.ids[i] for i in rows]), names=np.array(names), labels=labels,
                  scores=scores)
    return blocks, arrays, lambda path: draw_classes(path, per_class, arrays)


def classification(args, model, table, rows):
    """Does an image show it? Each label of the data set by name or prompt (Table III, Fig. 4)."""
    labels = label_names(table, rows)
    if not labels:
        raise InputError(f"{table.dataset} has no labels of its own; try --task relation")
    texts, columns, unseen = queries_for(model, labels, args)
    parts = {"trained on": [name for name in labels if name not in unseen],
             "not trained on": unseen}
    parts = {title: names for title, names in parts.items() if names}
    order = sum(parts.values(), [])
    at = [list(labels).index(name) for name in order]

    def gather(some):
        logits = [out.pathology_logits[:, [columns[name] for name in order]]
                  for _, out, _ in predict(args, model, table, some, texts)]
        scores = torch.cat(logits).double().sigmoid().numpy()
        return label_values(table, some, labels)[:, at], scores

    blocks, arrays, draw = score_classes(args, table, rows, parts, gather)
    metrics = blocks.get("trained on", blocks.get("not trained on"))
    if len(blocks) == 2:
        metrics["unseen"] = blocks["not trained on"]
    return metrics | {"n": len(rows), "not_trained_on": unseen}, arrays, draw


def anatomy(args, model, table, rows):
    """Is there anything at each anatomy? Existence in the second stream."""
    if model.config.streams == "single":
        raise InputError("a single-stream model has no anatomies; train one with --streams dual")
    names = query_names(model)

    def gather(some):
        labels = place_labels(table, some, names)
        logits = [out.anatomy_logits for _, out, _ in predict(args, model, table, some)]
        return labels, torch.cat(logits).double().sigmoid().numpy()

    blocks, arrays, draw = score_classes(args, table, rows, {"anatomies": names[1]}, gather)
    return blocks["anatomies"] | {"truth": pair_labels(table, rows[:1], names)[1]}, arrays, draw


def mask_of(table, i, label, target):
    """What is to be found in image i: the label's drawn mask, or its boxes filled; bool [H,W]."""
    mask = table.mask(i, label) if target == "mask" else None
    if mask is None:
        height, width = (int(v) for v in table.shape[i])
        mask = np.zeros((height, width), bool)
        for x, y, w, h in (box[1:] for box in table.boxes[i] if box[0] == label):
            top, left = round(y * height), round(x * width)
            bottom, right = round((y + h) * height), round((x + w) * width)
            mask[top:max(bottom, top + 1), left:max(right, left + 1)] = True
    return mask


def shrink(mask, size):
    """[H,W] -> [size,size]: the pixel at the middle of each cell."""
    y, x = (((np.arange(size) + 0.5) * length / size).astype(int) for length in mask.shape)
    return mask[np.ix_(y, x)]


def fixed_answers(table, rows, labels, target, size=64, most=3000):
    """What one can say without a look: {label: region to point at, region to predict}, [size,size].

    The mean mask over rows: its highest point, and the part of it that has the best mean Dice.
    """
    masks, answers = defaultdict(list), {}
    for i in rows[:most]:
        for label in table.located(i):
            masks[label].append(shrink(mask_of(table, i, label, target), size))
    for label in labels:
        some = masks[label] or [np.ones((size, size), bool)]
        mean = np.mean(some, axis=0)
        mean /= max(mean.max(), 1e-12)  # small masks can vanish between the cells
        dice = np.mean([overlap(mean, mask, THRESHOLDS)[0] for mask in some], axis=0)
        answers[label] = mean, mean > THRESHOLDS[dice.argmax()]
    return answers


def heat_of(model, attention, shape, image_size):
    """One map [h,w] drawn to the size of its picture [H,W], its maximum 1."""
    heat = upsample_map(attention, *shape, size=image_size or model.config.image_size,
                        centres=model.cell_centres())
    return heat / max(heat.max(), 1e-12)


def locate(args, model, table, rows, texts, columns, thresholds):
    """Yields (row, label, mask, heat, Dice [K], IoU [K]) for each label located in an image."""
    for chunk, _, maps in predict(args, model, table, rows, texts, args.attention):
        for i, attention in zip(chunk, maps):
            for label in table.located(i):
                mask = mask_of(table, i, label, args.target)
                if mask.any():
                    heat = heat_of(model, attention[columns[label]], mask.shape, args.image_size)
                    yield i, label, mask, heat, *overlap(heat, mask, thresholds)


OURS = "pointing_game", "iou", "dice"
TRIVIAL = "random_point", "brightest_point", "fixed_point", "fixed_dice"


def grounding(args, model, table, rows):
    """Where is it? Maps of the present findings against masks or boxes (Table IV, Fig. 7)."""
    splits = {"train": table.rows("train"),
              "validate": table.rows("validate") if args.split == "test" else (),
              args.split: rows}
    splits = {split: [i for i in some if table.located(i)] for split, some in splits.items()}
    if not splits[args.split]:
        raise InputError(f"{table.dataset} has no boxes or masks in its {args.split} split; "
                         "grounding takes synthetic, rsna, nih or siim")
    vocabulary = dict(zip(table.label_names, table.label_pathologies))
    labels = {name: vocabulary.get(name, name)
              for some in splits.values() for i in some for name in table.located(i)}
    texts, columns, unseen = queries_for(model, labels, args)
    threshold, source = args.threshold, "--threshold"
    if threshold is None:
        source = "validate" if splits["validate"] else args.split
        found = locate(args, model, table, splits[source], texts, columns, THRESHOLDS)
        dice = np.mean([dice for *_, dice, _ in found], axis=0)
        threshold = float(THRESHOLDS[dice.argmax()])
    known = next(k for k in ("train", "validate", args.split) if splits[k])
    fixed = fixed_answers(table, splits[known], labels, args.target)
    found, values, examples = [], [], defaultdict(list)
    for i, name, mask, heat, dice, iou in locate(
            args, model, table, splits[args.split], texts, columns, np.array([threshold])):
        point, region = fixed[name]
        found.append((table.ids[i], table.patients[i], name))
        values.append((points_at(heat, mask), iou[0], dice[0], mask.mean(),
                       points_at(table.images[i], shrink(mask, table.size)),
                       points_at(point, shrink(mask, len(point))),
                       overlap(region, shrink(mask, len(region)), np.array([0.5]))[0][0]))
        if len(examples[name]) < 4:  # the first ones, not the best
            examples[name].append((i, name, mask, heat, dice[0]))
    values, (ids, patients, label) = np.array(values), (np.array(x) for x in zip(*found))

    def means(some):
        return dict(zip(OURS + TRIVIAL, some.mean(0).tolist())) | {"n": len(some)}

    whole = means(values)
    per_class = {name: means(values[label == name]) for name in columns if name in label}
    lines = sorted(per_class.items(), key=lambda item: item[1]["pointing_game"])
    print_table(["", "n", "pointing", "IoU", "Dice", "random", "brightest", "fixed", "fixed Dice"],
                [[name + " (not trained on)" * (name in unseen), c["n"],
                  *(c[key] for key in OURS + TRIVIAL)] for name, c in (*lines, ("all", whole))])
    against = "masks, or boxes where there are none" if args.target == "mask" else "boxes"
    print(f"{args.attention} attention against {against}; regions above {threshold:.2f} of the "
          f"maximum (from {source}); trivial answers from {known}")
    metrics = {key: whole[key] for key in (*OURS, "n")} | {
        "trivial": {key: whole[key] for key in TRIVIAL}, "per_class": per_class,
        "threshold": threshold, "threshold_from": source, "attention": args.attention,
        "target": args.target, "trivial_from": known, "not_trained_on": unseen}
    for k, key in ((0, "pointing_game"), (2, "dice")):
        metrics[f"{key}_ci95"] = bootstrap_ci(lambda _, v: v.mean(), values[:, k], values[:, k],
                                              args.bootstrap, args.seed, patients)
    arrays = dict(zip(OURS + TRIVIAL, values.T)) | {"ids": ids, "label": label}
    shown = [e for k in range(4) for some in examples.values() for e in some[k:k + 1]][:12]
    return metrics, arrays, lambda path: draw_heat(path, table, shown, threshold, args.attention)


def relation(args, model, table, rows):
    """What is where? The (anatomy, pathology) matrix against the drawn or the reported one."""
    names = query_names(model)
    truth, source = pair_labels(table, rows, names, args.cells)                          # [N,n,m]
    texts = [model.queries[kind]["text"] for kind in ("pathology", "anatomy")]
    scores = np.concatenate([relation_probability(model, out, texts).float().numpy()     # 4nm bytes
                             for _, out, _ in predict(args, model, table, rows)])
    train = table.rows("train")
    often = sum((table.existence(train[i:i + 1000], *names) == 1).sum(0)
                for i in range(0, len(train), 1000)) / max(len(train), 1)                # [n,m]
    often = np.broadcast_to(often, truth.shape)
    rivals = {key: relation_scores(truth, value, names[1]) for key, value in (
        ("model", scores), ("cell frequencies in train", often),
        ("true existence x frequency", often * (truth == 1).any(1, keepdims=True)))}
    keys = ("auroc", "ap", "cell_auroc", "side", "top1")
    print_table(["", *keys], [[key, *(s[k] for k in keys)] for key, s in rivals.items()])
    metrics = rivals.pop("model") | {
        "truth": source, "trivial": rivals,
        "score": "sigmoid(relation_logits)" if trained_icl(model) else
                 "existence x ProtoCL place, as no ICL was trained"}
    print(f"{len(rows)} images, {metrics['n_findings']} findings, {metrics['n_sided']} pairs on "
          f"one side; truth: {source}; score: {metrics['score']}")
    arrays = dict(ids=np.array([table.ids[i] for i in rows]), truth=truth, scores=scores,
                  pathologies=np.array(names[0]), anatomies=np.array(names[1]))
    return metrics, arrays, lambda path: draw_relation(
        path, (truth == 1).mean(0), scores.mean(0), *names)


def probe(x, y, fit):
    """Mean AUROC of logistic regressions of y [N,L] (1, 0, -1) on x [N,D], fitted on the rows
    where fit [N] and scored on the others; labels with fewer than 5 of a kind there are left out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    aurocs = []
    for label in y.T:
        a, b = fit & (label >= 0), ~fit & (label >= 0)
        if min((label[half] == v).sum() for half in (a, b) for v in (0, 1)) >= 5:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            guess = model.fit(x[a], label[a]).decision_function(x[b])
            aurocs.append(roc_auc_score(label[b], guess))
    return float(np.mean(aurocs)) if aurocs else None


def embedding(args, model, table, rows, most=1000):
    """What do the embeddings keep apart? Pictures (Figs. 5, 6, 8) and the numbers behind them."""
    from sklearn.metrics import silhouette_score
    if len(rows) < 4:
        raise InputError(f"{len(rows)} images are too few to embed; try another --split")
    rng = np.random.default_rng(args.seed)
    rows, names = np.sort(rng.permutation(rows)[:most]), query_names(model)
    labels = label_names(table, rows)
    if not labels:
        raise InputError(f"{table.dataset} has no labels of its own; try --task relation")
    texts, columns, _ = queries_for(model, labels, args)
    queried, streams = [], defaultdict(list)
    for _, out, _ in predict(args, model, table, rows, texts):
        queried.append(out.pathology_queried[:, [columns[name] for name in labels]].numpy())
        for stream in ("pathology", "anatomy"):
            tokens = getattr(out, f"{stream}_tokens")
            if tokens is not None:
                streams[stream].append(tokens.mean(1).numpy())
    queried = np.concatenate(queried)                                                    # [N,L,D]
    streams = {stream: np.concatenate(x) for stream, x in streams.items()}               # [N,D]
    targets = {"pathology": label_values(table, rows, labels)}                           # [N,L]
    if table.has_reports:
        targets["place"] = place_labels(table, rows, names)                              # [N,n]
    patients = np.unique([table.patients[i] for i in rows], return_inverse=True)[1]
    metrics = {"n": len(rows)} | {f"{target} from {stream} tokens": probe(x, y, patients % 2 == 0)
                                  for stream, x in streams.items()
                                  for target, y in targets.items()}
    some = rng.permutation(queried.shape[0] * queried.shape[1])[:2500]
    flat, disease = queried.reshape(-1, queried.shape[-1])[some], some % queried.shape[1]
    layout = {"diseases": flatten(flat, args.seed), "disease": disease,
              "values": targets["pathology"], "names": np.array(list(labels))}
    if len(labels) > 1:
        metrics["silhouette of diseases"] = float(silhouette_score(flat, disease))
    if len(streams) == 2:
        both, which = np.concatenate(list(streams.values())), np.repeat([0, 1], len(rows))
        metrics["silhouette of streams"] = float(silhouette_score(both, which))
        layout["streams"] = flatten(both, args.seed)
    for k, name in enumerate(list(labels)[:12]):
        layout[f"each {name}"] = flatten(queried[:, k], args.seed, umap=True)
    print_table(["", "value"], metrics.items())
    print("A from B: AUROC of logistic regression on mean tokens, fitted on half of the patients, "
          "scored on the other half; silhouette: 1 = clusters apart, 0 = mixed")
    return metrics, layout, lambda path: draw_embedding(path, layout)


def flatten(x, seed, umap=False):
    """[N,D] -> [N,2] by t-SNE; by UMAP where that is wanted (Fig. 5) and umap-learn installed."""
    with contextlib.suppress(ImportError):
        if umap:
            from umap import UMAP
            return UMAP(random_state=seed).fit_transform(x)
    from sklearn.manifold import TSNE
    tsne = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed)
    return tsne.fit_transform(x)


def predict_files(args, model):
    """What and where in one radiograph, printed and drawn, or in a folder of them, as a CSV."""
    path, endings = Path(args.image), (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
    files = [path] if path.is_file() else sorted(
        f for f in path.rglob("*") if f.suffix.lower() in endings)
    if not files:
        raise InputError(f"no radiograph at {path}; --image takes a PNG, JPEG or DICOM file, or a "
                         "folder of them")
    names, places = query_names(model)
    labels = {name: name for name in names} | ({args.prompt: None} if args.prompt else {})
    texts, columns, _ = queries_for(model, labels, args)
    texts, size = [t.to(args.device) for t in texts], args.image_size or model.config.image_size
    table = []
    for file in files:
        try:
            square = torch.from_numpy(data.read_image(str(file), size).copy())
        except InputError as error:
            if len(files) == 1:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            continue
        with torch.no_grad():
            image = data.to_input(square[None].to(args.device), size)
            out, maps = attention_maps(model, image, texts, args.attention)
            pairs = relation_probability(model, out, texts)[0].cpu().numpy()             # [n,m]
        chance = out.pathology_logits[0].double().sigmoid().cpu().numpy()                # [m]
        for name, k in sorted(columns.items(), key=lambda c: (c[0] != args.prompt, -chance[c[1]])):
            row = {"image": str(file), "finding": name, "probability": chance[k]}
            for rank, i in enumerate(np.argsort(-pairs[:, k])[:3], 1):
                row |= {f"place {rank}": places[i], f"probability {rank}": pairs[i, k]}
            table.append(row)
    if not table:
        raise InputError(f"none of the {len(files)} images in {path} can be read")
    folder = Path(args.out_dir) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        with replacing(folder / "predict.csv") as draft, open(draft, "w", newline="") as f:
            writer = csv.DictWriter(f, table[0])
            writer.writeheader()
            writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                             for row in table)
        print(f"{len(table) // len(columns)} of {len(files)} images, {len(columns)} questions each "
              f"-> {folder / 'predict.csv'}")
    else:
        print_table(list(table[0])[1:], [list(row.values())[1:] for row in table[:8]])
        picture = data.read_image(str(path))
        heats = [(row["finding"], row["probability"],
                  heat_of(model, maps[0, columns[row["finding"]]].cpu(), picture.shape, size))
                 for k, row in enumerate(table[:4]) if k == 0 or row["probability"] > 0.5]
        with replacing(folder / "predict.png") as draft:
            draw_answer(draft, picture, heats)
        print(f"heat maps: {folder / 'predict.png'}")
    print("For study and research: this is no medical device, and this no diagnosis.")


# -------------------------------------------------------------------------------------- figures

BLUE, RED, GRAY = "#2b6cb0", "#c53030", "#b8c2cc"


def canvas(rows, columns, width, height):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False,
                        constrained_layout=True)


def finish(figure, path):
    import matplotlib.pyplot as plt
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def draw_classes(path, per_class, arrays):
    """How far each AUROC is from chance, with its interval (Fig. 4), and the ROC curves."""
    import matplotlib
    from sklearn.metrics import roc_curve
    shown = sorted((c["auroc"], name) for name, c in per_class.items() if c["auroc"] is not None)
    figure, ((bars, curves),) = canvas(1, 2, 12, max(4.5, 0.24 * len(shown) + 1))
    for k, (auroc, name) in enumerate(shown):
        bars.barh(k, auroc - 0.5, left=0.5, color=BLUE)
        bars.plot(per_class[name]["auroc_ci95"], (k, k), color="black", marker="|")
        column = list(arrays["names"]).index(name)
        label, score = arrays["labels"][:, column], arrays["scores"][:, column]
        x, y, _ = roc_curve(label[label >= 0], score[label >= 0])
        curves.plot(x, y, linewidth=1, label=name, color=matplotlib.colormaps["tab20"](k % 20))
    bars.set_yticks(range(len(shown)), [f"{name} ({per_class[name]['n_pos']})  {auroc:.3f}"
                                        for auroc, name in shown])
    bars.set(xlim=(None, 1.01), ylim=(-1, len(shown)),
             xlabel="AUROC and 95 % interval (number of positives)")
    curves.plot([0, 1], [0, 1], color=GRAY, linewidth=1)
    curves.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    if 0 < len(shown) <= 20:
        curves.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    finish(figure, path)


def draw_map(axis, picture, heat, title):
    axis.imshow(picture, cmap="gray", extent=(-0.5, heat.shape[1] - 0.5, heat.shape[0] - 0.5, -0.5))
    axis.imshow(heat, cmap="autumn", alpha=0.6 * np.clip(heat, 0, 1), vmin=0, vmax=1)
    axis.axis("off")
    axis.set_title(title, fontsize=9)


def draw_heat(path, table, examples, threshold, attention):
    """The first examples of each finding: heat, its region, its maximum, and the truth (Fig. 7)."""
    columns = min(4, len(examples))
    rows = -(-len(examples) // columns)
    figure, axes = canvas(rows, columns, 3 * columns, 3.3 * rows)
    for axis in axes.flat[len(examples):]:
        axis.axis("off")
    for axis, (i, label, mask, heat, dice) in zip(axes.flat, examples):
        draw_map(axis, table.images[i], heat, f"{label}, Dice {dice:.2f}")
        axis.contour(heat, [threshold], colors="yellow", linewidths=1)
        axis.contour(mask, [0.5], colors="cyan", linewidths=1.2)
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        axis.plot(x, y, "x", color="lime" if mask[y, x] else "red", markersize=8)
    figure.suptitle(f"cyan: the truth; heat: {attention} attention; yellow: above {threshold:.2f}; "
                    "x: maximum, green if it hits", fontsize=9)
    finish(figure, path)


def draw_answer(path, picture, heats):
    figure, axes = canvas(1, 1 + len(heats), 3 * (1 + len(heats)), 3.6)
    draw_map(axes[0, 0], picture, np.zeros(picture.shape), "as it is")
    for axis, (name, chance, heat) in zip(axes[0, 1:], heats):
        draw_map(axis, picture, heat, f"{name[:28]}: {chance:.2f}")
    figure.suptitle("where each question looks, and its probability; no medical device", fontsize=9)
    finish(figure, path)


def draw_relation(path, truth, predicted, pathologies, anatomies, most=30):
    """How often each pair [n,m] is true and predicted, for the rows and columns that occur."""
    rows, columns = (np.sort([k for k in np.argsort(-x)[:most] if x[k] > 0]).astype(int)
                     for x in (truth.max(1), truth.max(0)))
    figure, axes = canvas(1, 2, 4 + 0.45 * len(columns), 2.5 + 0.22 * len(rows))
    for axis, matrix, title in ((axes[0, 0], truth, "true: share of images"),
                                (axes[0, 1], predicted, "predicted: mean probability")):
        picture = axis.imshow(matrix[np.ix_(rows, columns)], vmin=0, vmax=truth.max() or 1,
                              aspect="auto")
        axis.set_xticks(range(len(columns)), np.array(pathologies)[columns], rotation=90,
                        fontsize=8)
        axis.set_yticks(range(len(rows)), np.array(anatomies)[rows], fontsize=8)
        axis.set_title(title, fontsize=9)
    figure.colorbar(picture, ax=axes[0].tolist(), shrink=0.8)
    finish(figure, path)


def draw_embedding(path, layout):
    """Embeddings by disease (Fig. 6), streams (Fig. 8), and each disease's own picture (Fig. 5)."""
    import matplotlib
    each, names = [key for key in layout if key.startswith("each ")], layout["names"]
    rows, colours = 2 + -(-len(each) // 6), matplotlib.colormaps["tab20"]
    figure, axes = canvas(rows, 6, 15, 2.5 * rows)
    for axis in axes.flat:
        axis.axis("off")
    grid = axes[0, 0].get_gridspec()
    first, streams = (figure.add_subplot(grid[:2, k:k + 2], xticks=[], yticks=[]) for k in (0, 4))
    first.set_title("queried pathology embeddings, by disease", fontsize=10)
    first.scatter(*layout["diseases"].T, c=colours(layout["disease"] % 20), s=8, linewidths=0)
    for k, name in enumerate(names[:20]):
        first.plot([], [], "o", color=colours(k), label=name, markersize=4)
    legend = first.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    legend.set_in_layout(False)  # or the column under it would become wide
    streams.set_title("image embeddings (mean token), by stream", fontsize=10)
    if "streams" in layout:
        both = np.split(layout["streams"], 2)
        for name, colour, xy in zip(("pathology", "anatomy"), (BLUE, RED), both):
            streams.scatter(*xy.T, c=colour, s=8, linewidths=0, label=name)
        streams.legend(fontsize=8, markerscale=2, frameon=False)
    for axis, key, name, values in zip(axes[2:].flat, each, names, layout["values"].T):
        for value, colour in ((0, GRAY), (1, RED)):
            axis.scatter(*layout[key][values == value].T, c=colour, s=8, linewidths=0)
        axis.set_title(f"{name}: {(values == 1).sum()} red", fontsize=9)
    figure.suptitle("small: one disease each, red where it is present, gray where not", fontsize=9)
    finish(figure, path)


# ---------------------------------------------------------------------------------- the command


@contextlib.contextmanager
def replacing(path):
    """A draft beside path, which takes its place once it is whole."""
    draft = path.with_name(path.name + ".tmp")
    yield draft
    os.replace(draft, path)


TASKS = {"classification": classification, "grounding": grounding, "relation": relation,
         "anatomy": anatomy, "embedding": embedding}


def parse_args(argv=None):
    parser = text.Parser(prog="evaluate.py", description="zero-shot evaluation of a checkpoint")
    g = parser.add_argument_group("what")
    g.add_argument("--task", required=True, choices=[*TASKS, "predict"])
    g.add_argument("--dataset", default="synthetic", choices=data.DATASETS)
    g.add_argument("--split", default="test", choices=["train", "validate", "test"])
    g.add_argument("--image", metavar="FILE_OR_DIR", help="predict: a radiograph, or a folder")
    g.add_argument("--prompt", help="a disease in plain words: one more question in predict; "
                   "elsewhere for the only label, or the only one without a stored query")
    g = parser.add_argument_group("model")
    g.add_argument("--checkpoint", default="out/ckpt.pt", metavar="FILE_OR_HUB_ID")
    g.add_argument("--image-size", type=int, help="pixels (default: what the model was trained at)")
    g.add_argument("--text-encoder", metavar="NAME_OR_DIR", help="for new prompts; or `hashing` "
                   "(default: the checkpoint's; of the published one Bio_ClinicalBERT)")
    g.add_argument("--pathology-book", metavar="FILE", help="prompts for the published checkpoint")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--batch-size", type=int, default=64)
    g = parser.add_argument_group("protocol")
    g.add_argument("--attention", default="joint", choices=["pathology", "joint", "mirror"],
                   help="grounding, predict: which maps; the paper's are `pathology`")
    g.add_argument("--target", default="mask", choices=["mask", "box"],
                   help="grounding: drawn masks, and boxes where there are none; or boxes")
    g.add_argument("--threshold", type=float, help="grounding: share of a map's maximum, 0..1 "
                   "(default: the best Dice on validation)")
    g.add_argument("--cells", default="all", choices=["all", "mentioned"],
                   help="relation, by reports: a pair not mentioned is absent, or left out")
    g.add_argument("--bootstrap", type=int, default=1000, help="resamples of a 95 %% interval")
    g.add_argument("--seed", type=int, default=0, help="of resamples and t-SNE")
    g.add_argument("--limit", type=int, help="only the first N images of the split")
    g.add_argument("--out-dir", default="out")
    data.add_data_flags(parser)
    return parser.parse_args(argv)


def main(args):
    """Run one task; returns its metrics as written to the JSON (None for predict)."""
    if min(1 if v is None else v
           for v in (args.batch_size, args.bootstrap, args.limit, args.image_size)) < 1:
        raise InputError("--batch-size, --bootstrap, --limit, --image-size: at least 1")
    pick_device(args.device)
    if args.task == "predict":
        if not args.image:
            raise InputError("--task predict needs --image FILE_OR_DIR")
        return predict_files(args, load_model(args))
    model = load_model(args)
    table = data.load_from_args(args)
    rows = table.rows(args.split)[:args.limit]
    if not len(rows):
        raise InputError(f"{args.dataset} has no {args.split} split; name another by --split")
    metrics, arrays, draw = TASKS[args.task](args, model, table, rows)
    metrics = dict(task=args.task, dataset=args.dataset, split=args.split,
                   checkpoint=args.checkpoint) | metrics
    stem = Path(args.out_dir) / "eval" / f"{args.dataset}_{args.task}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    with replacing(stem.with_suffix(".json")) as draft:
        draft.write_text(json.dumps(metrics, indent=1) + "\n")
    with replacing(stem.with_suffix(".npz")) as draft, open(draft, "wb") as f:
        np.savez_compressed(f, **arrays)
    with replacing(stem.with_suffix(".png")) as draft:
        draw(draft)
    print(f"written: {stem}.json .npz .png")
    return metrics


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, CheckpointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
