"""Zero-shot evaluation: what an image shows, where it is, and which pairs (Sec. IV).

    python evaluate.py --task classification --dataset nih --root data/nih
    python evaluate.py --task predict --image chest.png --prompt "air where it should not be"
    python evaluate.py --task grounding      # the phantoms, after `python train.py`; a minute

Each task prints a table and writes <out-dir>/eval/<dataset>_<task>.json (metrics), .npz (answers
and labels of each image) and .png; predict only a picture. N images, L labels, S stored pixels.

Differs from the released code:
- Thresholds come from the validation split. The best ones on the test set, which this literature
  reports, stand beside them (customary).
- Masks, boxes and maps are compared on the grid of the stored images (released: 224 x 224).
- A map is scaled by its own maximum and drawn where the backbone looks (see metrics.py).
- Embeddings stand beside an untrained network's: what both show, training did not make.
"""
import json
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler
from torchvision.transforms.v2.functional import gaussian_blur

import data
import figures
import text
from checkpoint import load_model
from cli import InputError, Parser, atomic, number, pick_device, run
from formats.images import read_image, trouble
from metrics import (SCORES, auroc, best_dice_threshold, bootstrap_ci, classification_scores,
                     dice_scores, grounding_scores, hit_regions, mean_or_none, nearest,
                     place_scores, points_at, relation_scores, scores_apart, scores_with_intervals,
                     upsample_map)
from model import MeDSLIP


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    g = p.add_argument_group("what")
    g.add_argument("--task", required=True, choices=[*TASKS, "predict"])
    g.add_argument("--dataset", default="synthetic", choices=data.DATASETS)
    g.add_argument("--split", default="test", choices=["train", "validate", "test"])
    g.add_argument("--limit", type=number(int, 1), help="only the first N images of each split")
    g.add_argument("--image", metavar="FILE", help="predict: a radiograph")
    g.add_argument("--prompt", help="a disease in plain words: one more question in predict; "
                   "elsewhere for the only label, or the only one without a stored query")
    g = p.add_argument_group("model")
    g.add_argument("--checkpoint", default="out/ckpt.pt", metavar="FILE_OR_HUB_ID")
    g.add_argument("--image-size", type=number(int, 16), help="pixels a side (the checkpoint's)")
    g.add_argument("--text-encoder", metavar="NAME", help="of new prompts (the checkpoint's)")
    g.add_argument("--pathology-book", metavar="FILE", help="prompts for a published checkpoint")
    g.add_argument("--device", help="cuda where there is one, else cpu")
    g.add_argument("--batch-size", type=number(int, 1), default=64)
    g = p.add_argument_group("protocol")
    g.add_argument("--attention", default="own", choices=["own", "pathology"], help="own: the "
                   "evidence map if the model has one; pathology: mean over heads and layers")
    g.add_argument("--threshold", type=number(float, 0, 1), help="share of a map's maximum "
                   "(default: the best Dice on validation)")
    g.add_argument("--bootstrap", type=number(int, 1), default=1000, help="resamples of patients")
    g.add_argument("--seed", type=number(int, 0), default=0)
    g.add_argument("--out-dir", default="out")
    data.add_data_flags(p)
    return p.parse_args(argv)


# ------------------------------------------------------------------- how a checkpoint is asked

PROMPTS = {  # of labels that the vocabulary lacks, or has only in a bucket of rare findings
    "COVID-19": "Pneumonia caused by the coronavirus SARS-CoV-2. Hazy ground-glass patches in both "
                "lungs, mostly at the outer edges and in the lower zones, that may merge into "
                "denser white consolidation as the illness goes on.",
    "Fibrosis": "Scarred lung tissue. Coarse white lines and a net-like pattern, mostly at the "
                "bases and edges of lungs that have shrunk."}


def encode_prompts(args, model, prompts):
    """Text vectors [k,T] by --text-encoder, or by the one that the model was trained with."""
    encoder = args.text_encoder or (model.queries or {}).get("encoder", text.CLINICAL_BERT)
    vectors = text.encode_text(prompts, encoder)
    if vectors.shape[1] != model.config.text_dim:
        raise InputError(f"{encoder} gives text vectors of width {vectors.shape[1]}, the model "
                         f"takes {model.config.text_dim}; use the one it was trained with")
    return vectors.to(args.device)


def read_model(args):
    """The checkpoint. A published one stores no queries and is asked the published vocabulary."""
    model = load_model(args.checkpoint, args.device).requires_grad_(False)
    args.image_size = args.image_size or model.config.image_size
    if model.queries is None:
        book = text.read_pathology_book(args.pathology_book) if args.pathology_book else None
        if book is None:
            print(f"{args.checkpoint} stores no prompts: pathologies are asked in our own words; "
                  "--pathology-book takes the published ones")
        p_prompts = text.pathology_prompts(text.PATHOLOGIES, book)
        a_prompts = text.anatomy_prompts(text.ANATOMIES, published=True)
        p_text, a_text = (encode_prompts(args, model, x) for x in (p_prompts, a_prompts))
        model.queries = {"pathology": {"names": text.PATHOLOGIES, "text": p_text},
                         "anatomy": {"names": text.ANATOMIES, "text": a_text}}
    return model


def questions(args, model, labels):
    """How to ask for labels {label: its name in the vocabulary, or None}.

    -> ([pathology text [m+k,T], anatomy text [n,T]], {label: its column}, the k labels without a
    stored query, which are asked last: by --prompt, PROMPTS or their definition). All queries are
    asked, because they attend to each other.
    """
    names, vectors = model.queries["pathology"]["names"], model.queries["pathology"]["text"]
    columns = {label: names.index(name) for label, name in labels.items() if name in names}
    unseen = [label for label in labels if label not in columns]
    if args.prompt and len(labels) == 1:
        unseen = list(labels)
    if args.prompt and len(unseen) != 1:
        raise InputError(f"--prompt asks for one label, and {len(unseen)} have no stored query "
                         f"({', '.join(unseen) or 'none'}); leave it out")
    texts = [vectors.to(args.device), model.queries["anatomy"]["text"].to(args.device)]
    if unseen:
        prompts = [args.prompt or PROMPTS.get(label)
                   or text.pathology_prompts([labels[label] or label])[0] for label in unseen]
        texts[0] = torch.cat([texts[0], encode_prompts(args, model, prompts)])  # [m+k,T]
        columns |= {label: len(names) + k for k, label in enumerate(unseen)}
    return texts, columns, unseen


def ask(args, model, images, rows, texts):
    """Yields (rows [B], output) of rows of images uint8 [N,S,S]. In fp32, because with bf16 the
    answers would depend on the batch size."""
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start:start + args.batch_size]
        x = data.to_input(torch.from_numpy(images[batch]).to(args.device), args.image_size)
        with torch.inference_mode():
            out = model(x, *texts, need_attention=True)  # x [B,3,H,W]
        yield batch, out


def array(tensor):
    return tensor.double().cpu().numpy()


def maps_of(args, out):
    """[B,m,h,w] by --attention."""
    own = args.attention == "own" and out.pathology_evidence is not None
    return array(out.pathology_evidence if own else out.pathology_attention)


def heat_of(args, model, cells, shape):
    """One map [h,w] drawn to a picture of `shape`, its maximum 1."""
    heat = upsample_map(cells, *shape, args.image_size, model.cell_centres())
    return heat / max(heat.max(), 1e-12)


def pairs_of(model, out, anatomy_text):
    """(existence [B,m]; places [B,n,m]: Z_2 . T, which ProtoCL trains; pairs [B,n,m]: ICL's answer,
    or existence times place where no ICL was trained)."""
    existence = expit(array(out.pathology_logits))
    places = array(out.pathology_z @ anatomy_text.T).transpose(0, 2, 1)
    if model.config.streams == "dual" and model.args.get("beta", 1) > 0:
        return existence, places, expit(array(out.relation_logits))
    return existence, places, existence[:, None] * softmax(places, axis=1)


def print_table(title, scores, keys):
    """{name: {key: value}} as a table: numbers to three decimals, a dash for None or nothing."""
    table = [[title, *keys]]
    for name, values in scores.items():
        row = [values.get(key) for key in keys]
        row = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
        table.append([name, *["-" if v == "None" else v for v in row]])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print(row[0].ljust(widths[0]), *cells, sep="  ")


# Each task takes (args, model, table, rows), prints a table and returns (metrics for the JSON,
# arrays for the .npz, a function that draws the figure into a path).
# ------------------------------------------------------------ is it there? (Table III, Fig. 4)

def classification(args, model, table, rows):
    """Does an image show it? Each label of the data set, by name or prompt."""
    labels = dict(zip(table.label_names, table.label_pathologies))  # its name, or None, in text.py
    if not labels:
        raise InputError(f"{table.dataset} has no labels of its own; try --task relation")
    texts, columns, unseen = questions(args, model, labels)

    def answers(rows):  # labels [N,L], probabilities [N,L]
        logits = [array(out.pathology_logits)
                  for _, out in ask(args, model, table.images, rows, texts)]
        asked = [columns[name] for name in labels]  # [L]
        return table.labels[rows], expit(np.concatenate(logits)[:, asked])

    truth, scores = answers(rows)
    names, held = np.array(table.label_names), table.rows("validate")[:args.limit]
    thresholds, source = np.full(len(names), None), args.split  # None: the best on these labels
    if args.split == "test" and len(held):
        best, source = classification_scores(*answers(held))["threshold"].values(), "validate"
        # where validation has no positives, or no negatives, there is no best one
        thresholds = np.array([0.5 if t is None else t for t in best])  # [L]
    patients, new = np.array(table.patients)[rows], np.isin(names, unseen)  # [N], bool [L]
    blocks, lines = {}, {}
    for title, part in (("trained on", ~new), ("not trained on", new)):
        if part.any():
            block = scores_with_intervals(truth[:, part], scores[:, part], thresholds[part],
                                          names[part], args.bootstrap, args.seed, patients)
            blocks[title], best = block, block["customary"]
            for name, c in [*block["per_class"].items(), (f"mean, {title}", block)]:
                b, (low, high) = best["per_class"].get(name, best), c["auroc_ci95"]
                lines[name] = {**c, "low": low, "high": high, "f1*": b["f1"], "acc*": b["acc"]}
    print_table("", lines, ("n_pos", "auroc", "low", "high", "ap", "f1", "acc", "f1*", "acc*"))
    print(f"{len(rows)} images of {args.split}; F1 and ACC at thresholds from {source}, with * at "
          f"the best on {args.split} itself (customary, flattering); a guess has AUROC 0.5")
    metrics = dict(blocks.get("trained on") or blocks["not trained on"], thresholds_from=source,
                   not_trained_on=unseen, trivial={"auroc": 0.5})
    if len(blocks) == 2:
        metrics["unseen"] = blocks["not trained on"]
    per_class = {**metrics["per_class"], **metrics.get("unseen", metrics)["per_class"]}
    arrays = {"names": names, "labels": truth, "scores": scores}
    return metrics, {"ids": [table.ids[i] for i in rows], **arrays}, lambda path: (
        figures.draw_classes(path, per_class, **arrays))


# ---------------------------------------------------------------- where is it? (Table IV, Fig. 7)

Finding = namedtuple("Finding", "row label mask cells")  # mask bool [S,S], cells: its map [h,w]


def masks_of(table, row):
    """{label: bool [S,S]}: what masks, or else boxes, locate in an image."""
    masks = {}
    for label in table.located(row):
        mask = table.mask(row, label)  # [H,W] or None
        if mask is not None and nearest(mask, table.size, table.size).any():
            masks[label] = nearest(mask, table.size, table.size)
    return masks


def locate(args, model, table, rows, texts, columns):
    """[Finding] of the rows."""
    rows, found = np.array([i for i in rows if table.located(i)], int), []
    for batch, out in ask(args, model, table.images, rows, texts):
        for row, maps in zip(batch, maps_of(args, out)):  # [m,h,w]
            for label, mask in masks_of(table, row).items():
                found.append(Finding(row, label, mask, maps[columns[label]]))
    return found


def grounding(args, model, table, rows):
    """Where are the present findings? Maps against masks or boxes, beside trivial answers."""
    held, labels = table.rows("validate")[:args.limit], {}
    known = dict(zip(table.label_names, table.label_pathologies))
    for row in (*held, *rows):
        labels |= {label: known.get(label, label) for label in table.located(row)}
    texts, columns, unseen = questions(args, model, labels)
    found = locate(args, model, table, rows, texts, columns)
    if not found:
        raise InputError(f"no mask or box locates anything in {table.dataset}'s {args.split} "
                         "split; grounding takes synthetic, rsna, nih or siim")
    threshold, source = args.threshold, "--threshold"
    if threshold is None:
        tuned, source = locate(args, model, table, held, texts, columns), "validate"
        if args.split != "test" or not tuned:
            tuned, source = found, args.split
        heats = [heat_of(args, model, f.cells, f.mask.shape) for f in tuned]  # [S,S] each
        threshold = best_dice_threshold(heats, [f.mask for f in tuned])
    each = compare(args, model, table, found, threshold)
    names = np.array([f.label for f in found])  # [findings]
    per_class = {name: means([e for e, n in zip(each, names) if n == name])
                 for name in np.unique(names).tolist()}
    reach = {name: scores["pointing_within_cell"] for name, scores in per_class.items()}
    order = sorted(reach, key=reach.get)  # the worst class first
    drops = faithfulness(args, model, table, found, texts, columns)
    metrics = {**means(each), "per_class": per_class,
               "worst": {"name": order[0], "pointing_within_cell": reach[order[0]]},
               "threshold": threshold, "threshold_from": source, "attention": args.attention,
               "not_trained_on": unseen, "faithfulness": drops}
    arrays = {"ids": [table.ids[f.row] for f in found], "label": names}
    patients = np.array(table.patients)[[f.row for f in found]]  # [findings]
    for key in SCORES:
        arrays[key] = values = np.array([e["model"][key] for e in each])  # [findings]
        metrics[f"{key}_ci95"] = bootstrap_ci(lambda _, v: v.mean(), values, values,
                                              args.bootstrap, args.seed, patients)
    lines = {**{name: per_class[name] for name in order}, "all": metrics, **metrics["trivial"]}
    print_table("", lines, ("n", *SCORES))
    print(f"{args.attention} map; regions above {threshold:.2f} of the maximum (from {source}); "
          f"worst class: {order[0]}\n")
    print_table("logit falls without", {f"{k} cells": d for k, d in drops.items()}, DELETED_BY)
    films = []
    for name in order:  # the first ones of each class, not the best
        for f in [f for f in found if f.label == name][:math.ceil(12 / len(order))]:
            heat = heat_of(args, model, f.cells, f.mask.shape)
            films.append({"film": table.images[f.row], "title": name, "mask": f.mask, "heat": heat,
                          "region": heat, "level": threshold})
    return metrics, arrays, lambda path: figures.gallery(
        path, films[:12], f"{args.attention} map; x: its maximum; yellow: above {threshold:.2f} of "
        "the maximum; cyan: truth")


def compare(args, model, table, found, threshold):
    """Of each finding {answer: {score: ...}} of the model and of trivial answers. The fixed ones are
    the mean training mask of the class: its highest point, and the region that has the best Dice."""
    drawn, everywhere, fixed = {}, np.ones((table.size, table.size), bool), {}
    for row in table.rows("train")[:2000]:  # enough for a mean
        for label, mask in masks_of(table, row).items():
            drawn.setdefault(label, []).append(mask)
    each = []
    for label in {f.label for f in found}:
        masks = drawn.get(label, [everywhere])
        mean = np.mean(masks, axis=0)  # [S,S]
        fixed[label] = mean, best_dice_threshold([mean] * len(masks), masks)
    for f in found:
        mean, level = fixed[f.label]
        regions = hit_regions(f.mask, *f.cells.shape)
        own = grounding_scores([f.cells], [f.mask], threshold, args.image_size,
                               model.cell_centres())  # of this one finding
        each.append({"model": {key: own[key] for key in SCORES},
                     "random_point": points_at(everywhere, regions),
                     "brightest_point": points_at(table.images[f.row], regions),
                     "fixed_point": points_at(mean, regions),
                     "fixed_region": {"dice": dice_scores(mean, f.mask, [level])[0]}})
    return each


def means(each):
    """Means of what `compare` gives: the model's, and the others' under trivial."""
    mean = {}
    for answer, scores in each[0].items():
        values = np.mean([list(e[answer].values()) for e in each], axis=0)
        mean[answer] = dict(zip(scores, values.tolist()))
    return {**mean.pop("model"), "n": len(each), "trivial": mean}


DELETED, DELETED_BY = (4, 12, 32), ("map", "random", "mask")  # so many cells, chosen in three ways


def faithfulness(args, model, table, found, texts, columns):
    """How far a finding's logit falls when k cells of its film are blurred: the highest of its map,
    random ones, those in or next to its mask. Means over findings, {"4": {"map": ...}}."""
    rng, size, n, drops = np.random.default_rng(args.seed), args.image_size, len(found[0].cells), []
    offset, stride = model.cell_centres()
    # the pixel that each cell looks at [n], and the cell that each pixel is deleted with [size]
    centres = np.clip(np.round(offset + stride * np.arange(n)), 0, size - 1).astype(int)
    cell_of = np.clip(np.round((np.arange(size) - offset) / stride), 0, n - 1).astype(int)
    for f in [found[i] for i in rng.permutation(len(found))[:200]]:  # ten images each
        away = distance_transform_edt(~nearest(f.mask, size, size))[centres][:, centres]  # [n,n]
        film = data.to_input(torch.from_numpy(table.images[[f.row]]), size)[0]  # [3,size,size]
        blurred = gaussian_blur(film, 2 * (size // 4) + 1, size / 8)  # so that no lesion is left
        films = [film]
        for k in DELETED:
            for order in (-f.cells, rng.random((n, n)), away):
                gone = np.zeros(n * n, bool)
                gone[np.argsort(order.ravel(), kind="stable")[:k]] = True
                gone = torch.from_numpy(gone.reshape(n, n)[cell_of][:, cell_of])  # [size,size]
                films.append(torch.where(gone, blurred, film))  # [3,size,size]
        logits = array(model(torch.stack(films).to(args.device), *texts).pathology_logits)
        logits = logits[:, columns[f.label]]  # [1 + 9]
        drops.append((logits[0] - logits[1:]).reshape(len(DELETED), len(DELETED_BY)))  # [3,3]
    mean = np.mean(drops, axis=0).tolist()
    return {str(k): dict(zip(DELETED_BY, drop)) for k, drop in zip(DELETED, mean)}


# ------------------------------------------------------------------------------------ which pair?

def pair_truth(table, rows, names):
    """int8 [N,n,m] and what it is: the pairs as drawn, or as the reports have them."""
    truth = table.truth(rows, *names)
    if truth is not None:
        return truth, "what was drawn"
    if not table.has_reports:
        raise InputError(f"{table.dataset} has no reports, so no pairs; try --dataset synthetic")
    return np.maximum(table.existence(rows, *names), 0), "the reports, not mentioned = absent"


def relation(args, model, table, rows):
    """Which (anatomy, pathology) pairs an image shows, against the drawn or the reported ones."""
    names = [model.queries[kind]["names"] for kind in ("pathology", "anatomy")]
    truth, source = pair_truth(table, rows, names)  # [N,n,m]
    texts, _, _ = questions(args, model, {})
    parts = [pairs_of(model, out, texts[1])
             for _, out in ask(args, model, table.images, rows, texts)]
    existence, places, pairs = (np.concatenate(part) for part in zip(*parts))  # [N,m], 2 x [N,n,m]
    train = table.rows("train")  # a trivial answer: how often each cell is positive in its reports
    often = sum(table.existence([i], *names)[0] == 1 for i in train) / max(len(train), 1)  # [n,m]
    often = np.broadcast_to(often, truth.shape)  # [N,n,m]
    partner = {name: i for i, name in enumerate(names[1])}
    mirror = np.array([partner.get(text.swap_sides(name), i) for name, i in partner.items()])  # [n]
    answers = {"model": pairs, "cell frequencies in train": often,
               "true existence x frequency": (truth == 1).any(1, keepdims=True) * often}
    scores = {name: relation_scores(truth, answer, mirror) for name, answer in answers.items()}
    # one read-out of places for every model, also for those that were trained without ICL
    place = {"model": place_scores(truth, places), "frequencies": place_scores(truth, often)}
    print_table("pairs", scores, ("auroc", "ap", "cell_auroc", "side", "top1"))
    print_table("places, Z2 . T", place, ("top1", "recall", "chance", "n_several"))
    metrics = {**scores.pop("model"), "trivial": scores, "place": place, "truth": source}
    drawn = table.truth(train, *names)  # [.,n,m] or None
    if drawn is not None:
        apart = scores_apart(truth, (drawn == 1).any(0), existence, pairs, places)
        metrics |= apart
        if apart:
            print_table("cells", apart, apart["seen"])
    print(f"{len(rows)} images of {args.split}; truth: {source}")
    arrays = {"ids": [table.ids[i] for i in rows], "truth": truth, "pathologies": names[0],
              "anatomies": names[1], "scores": pairs.astype(np.float32)}
    return metrics, arrays, lambda path: figures.draw_relation(
        path, (truth == 1).mean(0), pairs.mean(0), *names)


# ------------------------------------------------- what do embeddings keep apart? (Figs. 6, 8)

def probe(x, labels, fit):
    """Mean AUROC of logistic regressions of labels [N,L] on x [N,D], fitted where fit [N] is true
    and scored elsewhere; without labels that have fewer than 5 of a kind on either side."""
    x, scores = StandardScaler().fit(x[fit]).transform(x), []
    for label in labels.T:
        a, b = fit & (label >= 0), ~fit & (label >= 0)  # bool [N]
        kinds = [(label[side] == value).sum() for side in (a, b) for value in (0, 1)]
        if min(kinds) >= 5:
            classifier = LogisticRegression(C=0.1, max_iter=1000).fit(x[a], label[a])
            scores.append(auroc(label[b], classifier.decision_function(x[b])))
    return mean_or_none(scores)


def embedding(args, model, table, rows):
    """Probes of the streams, silhouettes and t-SNE of what the labels' queries gather."""
    labels = dict(zip(table.label_names, table.label_pathologies))
    if len(rows) < 20 or not labels:
        raise InputError(f"{table.dataset}: {len(rows)} images of {args.split} with {len(labels)} "
                         "labels are too few to embed; try another --split or data set")
    rng, clouds, scores = np.random.default_rng(args.seed), {}, {}
    rows = rng.permutation(rows)[:1000]
    texts, columns, _ = questions(args, model, labels)
    targets = {"pathology": table.labels[rows]}  # [N,L]
    if table.has_reports:
        names = [model.queries[kind]["names"] for kind in ("pathology", "anatomy")]
        targets["place"] = (pair_truth(table, rows, names)[0] == 1).any(2).astype(int)  # [N,n]
    _, patients = np.unique(np.array(table.patients)[rows], return_inverse=True)
    some = rng.permutation(len(rows) * len(labels))[:2500]  # t-SNE of all N*L points takes minutes
    torch.manual_seed(args.seed)
    untrained = MeDSLIP(model.config).to(args.device).eval()
    for title, network in (("trained", model), ("untrained", untrained)):
        outputs = [out for _, out in ask(args, network, table.images, rows, texts)]
        tokens = {"pathology": [array(out.pathology_tokens.mean(1)) for out in outputs]}  # [B,D]
        if model.config.streams == "dual":
            tokens["anatomy"] = [array(out.anatomy_tokens.mean(1)) for out in outputs]
        tokens = {stream: np.concatenate(x) for stream, x in tokens.items()}  # [N,D]
        scores[title] = {f"{target} from {stream} tokens": probe(x, values, patients % 2 == 0)
                         for stream, x in tokens.items() for target, values in targets.items()}
        queried = np.concatenate([array(out.pathology_queried) for out in outputs])  # [N,m,D]
        points = queried[:, list(columns.values())].reshape(-1, queried.shape[2])[some]
        if len(labels) > 1:
            scores[title]["silhouette, queried embeddings"] = float(
                silhouette_score(points, some % len(labels)))
        flatten = TSNE(perplexity=min(30, len(points) / 4), random_state=args.seed)
        clouds[title] = flatten.fit_transform(points), some % len(labels), list(columns)
    print(...)
