"""Zero-shot evaluation: what, where, which pair, and what the embeddings keep apart (Sec. IV).

    python evaluate.py --task classification --dataset nih --root data/nih
    python evaluate.py --task predict --image chest.png --prompt "air where it should not be"
    python evaluate.py --task grounding      # the phantoms, after `python train.py`; a minute

Each task prints a table and writes <out-dir>/eval/<dataset>_<task>.json (metrics), .npz (answers
and labels of each image) and .png. How a checkpoint is asked stands in predict.py, how a score is
computed in metrics.py. N images, L labels, n anatomies, m pathologies, S stored pixels a side.

Differs from the released code:
- Thresholds come from the validation split. The best ones on the test set, which this literature
  reports, stand beside them (customary).
- Masks, boxes and maps are compared on the grid of the stored images (released: 224 x 224).
- A map is scaled by its own maximum and drawn where the backbone looks (see metrics.py).
"""
import json
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler
from torchvision.transforms.v2.functional import gaussian_blur

import data
import figures
from cli import InputError, Parser, atomic, number, pick_device, run
from metrics import (POINTING, auroc, best_dice_threshold, bootstrap_ci,
                     classification_scores, dice_scores, fixed_answer, grounding_scores,
                     hit_regions, mean_or_none, nearest, place_scores, points_at, relation_scores,
                     scores_apart, scores_with_intervals)
from model import MeDSLIP
from predict import (array, ask, heat_of, maps_of, pairs_of, predict, print_table, questions,
                     read_model)
from text import swap_sides


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    g = p.add_argument_group("what")
    g.add_argument("--task", required=True, choices=[*TASKS, "predict"])
    g.add_argument("--dataset", default="synthetic", choices=data.DATASETS)
    g.add_argument("--split", default="test", choices=["train", "validate", "test"])
    g.add_argument("--limit", type=number(int, 1), help="only the first N images of each split")
    g.add_argument("--image", metavar="FILE_OR_DIR", help="predict: a radiograph, or a folder")
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
    g.add_argument("--target", default="mask", choices=["mask", "box"], help="of grounding; mask: "
                   "boxes where there are no masks")
    g.add_argument("--threshold", type=number(float, 0, 1), help="share of a map's maximum "
                   "(default: the best Dice on validation)")
    g.add_argument("--faithful", type=number(int, 0), default=200, help="maps to test by deletion")
    g.add_argument("--bootstrap", type=number(int, 1), default=1000, help="resamples of patients "
                   "for 95 %% intervals; 40 s for NIH's 25,596 images")
    g.add_argument("--seed", type=number(int, 0), default=0)
    g.add_argument("--out-dir", default="out")
    data.add_data_flags(p)
    return p.parse_args(argv)


# Each task takes (args, model, table, rows), prints a table and returns (metrics for the JSON,
# arrays for the .npz, a function that draws the figure into a path).
# ------------------------------------------------------------ is it there? (Table III, Fig. 4)

def classification(args, model, table, rows):
    """Does an image show it? Each label of the data set, by name or prompt."""
    labels = dict(zip(table.label_names, table.label_pathologies))
    if not labels:
        raise InputError(f"{table.dataset} has no labels of its own; try --task relation")
    texts, columns, unseen = questions(args, model, labels)

    def answers(rows):
        logits = [array(out.pathology_logits)
                  for _, out in ask(args, model, table.images, rows, texts)]
        asked = [columns[name] for name in labels]
        return table.labels[rows], expit(np.concatenate(logits)[:, asked])      # [N,L], [N,L]

    truth, scores = answers(rows)
    names, held = np.array(table.label_names), table.rows("validate")[:args.limit]
    thresholds, source = np.full(len(names), None), args.split  # None: the best on these labels
    if args.split == "test" and len(held):
        best, source = classification_scores(*answers(held))["threshold"].values(), "validate"
        # without positives, or without negatives, in validation there is no best one
        thresholds = np.array([0.5 if t is None else t for t in best])          # [L]
    new, blocks, lines = np.isin(names, unseen), {}, {}                         # new: bool [L]
    for title, part in (("trained on", ~new), ("not trained on", new)):
        if part.any():
            block = scores_with_intervals(truth[:, part], scores[:, part], thresholds[part],
                                          names[part], args.bootstrap, args.seed,
                                          np.array(table.patients)[rows])
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
    return metrics, arrays, lambda path: figures.draw_classes(path, per_class, **arrays)


# ---------------------------------------------------------------- where is it? (Table IV, Fig. 7)

SCORES = (*POINTING, "iou", "dice")
Finding = namedtuple("Finding", "row label mask cells")  # mask bool [S,S], cells: its map [h,w]


def masks_of(args, table, row):
    """{label: bool [S,S]}: what masks or boxes locate in an image, by --target."""
    masks = {}
    for label in table.located(row):
        mask = table.mask(row, label, boxes_only=args.target == "box")          # [H,W] or None
        if mask is not None and mask.any():
            masks[label] = nearest(mask, table.size, table.size)
    return masks


def locate(args, model, table, rows, texts, columns):
    """[Finding] of the rows."""
    rows, found = np.array([i for i in rows if table.located(i)], int), []
    for batch, out in ask(args, model, table.images, rows, texts):
        for row, maps in zip(batch, maps_of(args, out)):                        # [m,h,w]
            found += [Finding(row, label, mask, maps[columns[label]])
                      for label, mask in masks_of(args, table, row).items()]
    return found


def grounding(args, model, table, rows):
    """Where are the present findings? Maps against masks or boxes, beside trivial answers."""
    held = table.rows("validate")[:args.limit]
    located = {label for some in (held, rows) for i in some for label in table.located(i)}
    known = dict(zip(table.label_names, table.label_pathologies))
    labels = {label: known.get(label, label) for label in sorted(located)}
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
        heats = [heat_of(args, model, f.cells, f.mask.shape) for f in tuned]    # [S,S] each
        threshold = best_dice_threshold(heats, [f.mask for f in tuned])
    each = compare(args, model, table, found, threshold)
    names = np.array([f.label for f in found])
    metrics, per_class = means(each), {}
    for name in np.unique(names).tolist():
        per_class[name] = means([each[k] for k in np.flatnonzero(names == name)])
    reach = {name: c["pointing_within_cell"] for name, c in per_class.items()}
    order = sorted(reach, key=reach.get)  # the worst class first
    patients = np.array(table.patients)[[f.row for f in found]]
    values = {key: np.array([e["model"][key] for e in each]) for key in SCORES}
    for key, value in values.items():
        metrics[f"{key}_ci95"] = bootstrap_ci(lambda _, v: v.mean(), value, value, args.bootstrap,
                                              args.seed, patients)
    drops = faithfulness(args, model, table, found, texts, columns)
    metrics |= {"per_class": per_class, "threshold": threshold, "threshold_from": source, "attention": args.attention,
                "worst": {"name": order[0], "pointing_within_cell": reach[order[0]]},
                "target": args.target, "not_trained_on": unseen, "faithfulness": drops}
    lines = {**{name: per_class[name] for name in order}, "all": metrics, **metrics["trivial"]}
    print_table("", lines, ("n", *SCORES))
    print(f"{args.attention} map; regions above {threshold:.2f} of the maximum (from {source}); "
          f"worst class: {order[0]}\n")
    print_table("logit falls without", {f"{k} cells": d for k, d in drops.items()}, DELETED_BY)
    count, shown = math.ceil(12 / len(order)), []
    for name in order:  # the first ones of each class, not the best
        shown += [found[k] for k in np.flatnonzero(names == name)[:count]]
    examples = [(table.images[f.row], f.mask, heat_of(args, model, f.cells, f.mask.shape), f.label)
                for f in shown[:12]]
    arrays = {"ids": [table.ids[f.row] for f in found], "label": names, **values}
    return metrics, arrays, lambda path: figures.draw_grounding(
        path, examples, threshold, f"{args.attention} map")


def compare(args, model, table, found, threshold):
    """[{answer: {score: value}}]: of each finding the model's scores and those of trivial answers.
    The fixed ones are the mean training mask of the class: its highest point, its best part."""
    drawn = {}
    for row in table.rows("train")[:2000]:  # enough for a mean
        for label, mask in masks_of(args, table, row).items():
            drawn.setdefault(label, []).append(mask)
    everywhere, each = np.ones((table.size, table.size), bool), []
    fixed = {label: fixed_answer(drawn.get(label, [everywhere])) for label in {f.label for f in found}}
    for f in found:
        mean, level = fixed[f.label]                                            # [S,S], a share
        regions = hit_regions(f.mask, *f.cells.shape)
        own = grounding_scores([f.cells], [f.mask], threshold, args.image_size,
                               model.cell_centres())
        each.append({"model": {key: own[key] for key in SCORES}, "random_point": points_at(everywhere, regions),
                     "brightest_point": points_at(table.images[f.row], regions),
                     "fixed_point": points_at(mean, regions),
                     "fixed_region": {"dice": dice_scores(mean, f.mask, [level])[0]}})
    return each


def means(each):
    """Output of `compare` -> the model's mean scores, with those of the others under trivial."""
    mean = {answer: {key: float(np.mean([e[answer][key] for e in each])) for key in scores}
            for answer, scores in each[0].items()}
    return {**mean.pop("model"), "n": len(each), "trivial": mean}


DELETED, DELETED_BY = (4, 12, 32), ("map", "random", "mask")  # so many cells, chosen in three ways


def faithfulness(args, model, table, found, texts, columns):
    """How far a finding's logit falls when k cells of its film are blurred: the highest of its map,
    random ones, those in or next to its mask. Means over findings, {k: {"map": ...}}."""
    rng, size, drops = np.random.default_rng(args.seed), args.image_size, []
    for f in [found[i] for i in rng.permutation(len(found))[:args.faithful]]:
        n, (offset, stride) = len(f.cells), model.cell_centres()
        centres = np.clip(np.round(offset + stride * np.arange(n)), 0, size - 1).astype(int)  # [n]
        cell_of = np.clip(np.round((np.arange(size) - offset) / stride), 0, n - 1).astype(int)
        away = distance_transform_edt(~nearest(f.mask, size, size))[centres][:, centres]  # [n,n]
        film = data.to_input(torch.from_numpy(table.images[[f.row]]), size)[0]  # [3,size,size]
        blurred, films = gaussian_blur(film, 2 * (size // 4) + 1, size / 8), [film]
        for k in DELETED:
            for order in (-f.cells, rng.random((n, n)), away):
                gone = np.zeros(n * n, bool)
                gone[np.argsort(order.ravel(), kind="stable")[:k]] = True
                gone = torch.from_numpy(gone.reshape(n, n)[cell_of][:, cell_of])  # [size,size]
                films.append(torch.where(gone, blurred, film))
        logits = array(model(torch.stack(films).to(args.device), *texts).pathology_logits)
        logits = logits[:, columns[f.label]]                                    # [1 + 9]
        drops.append((logits[0] - logits[1:]).reshape(len(DELETED), len(DELETED_BY)))
    mean = np.mean(drops, axis=0).tolist() if drops else []
    return {k: dict(zip(DELETED_BY, drop)) for k, drop in zip(DELETED, mean)}


# ------------------------------------------------------------------------------------ which pair?

def pair_truth(table, rows, names):
    """int8 [N,n,m] and what it is: the pairs as drawn, or as the reports have them."""
    truth = table.truth(rows, *names)
    if truth is not None:
        return truth, "what was drawn"
    if not table.has_reports:
        raise InputError(f"{table.dataset} has no reports and so no matrix of pairs; relation "
                         "takes synthetic, mimic, openi, roco or covid-chestxray")
    return np.maximum(table.existence(rows, *names), 0), "the reports, not mentioned = absent"


def relation(args, model, table, rows):
    """Which (anatomy, pathology) pairs an image shows, against the drawn or the reported ones."""
    names = [model.queries[kind]["names"] for kind in ("pathology", "anatomy")]
    truth, source = pair_truth(table, rows, names)                              # [N,n,m]
    texts, _, _ = questions(args, model, {})
    parts = [pairs_of(model, out, texts[1])
             for _, out in ask(args, model, table.images, rows, texts)]
    existence, places, pairs = (np.concatenate(part) for part in zip(*parts))   # [N,m], [N,n,m] x 2
    train = table.rows("train")
    often = sum(table.existence([i], *names)[0] == 1 for i in train) / max(len(train), 1)  # [n,m]
    often = np.broadcast_to(often, truth.shape)                                 # [N,n,m]
    present = (truth == 1).any(1, keepdims=True)                                # [N,1,m]
    partner = {name: i for i, name in enumerate(names[1])}
    mirror = np.array([partner.get(swap_sides(name), i) for name, i in partner.items()])  # [n]
    answers = {"model": pairs, "cell frequencies in train": often,
               "true existence x frequency": present * often}
    scores = {name: relation_scores(truth, answer, mirror) for name, answer in answers.items()}
    # one read-out of places for every model, also for those that were trained without ICL
    place = {"model": place_scores(truth, places), "frequencies": place_scores(truth, often)}
    print_table("pairs", scores, ("auroc", "ap", "cell_auroc", "side", "top1"))
    print_table("places, Z2 . T", place, ("top1", "recall", "chance", "n_several"))
    metrics = {**scores.pop("model"), "trivial": scores, "place": place, "truth": source}
    drawn = table.truth(train, *names)
    if drawn is not None:
        apart = scores_apart(truth, (drawn == 1).any(0), existence, pairs, places)
        print_table("cells", apart, apart["seen"]) if apart else None
    print(f"{len(rows)} images of {args.split}; truth: {source}")
    arrays = {"ids": [table.ids[i] for i in rows], "truth": truth, "pathologies": names[0],
              "anatomies": names[1], "scores": pairs.astype(np.float32)}
    return metrics, arrays, lambda path: figures.draw_relation(
        path, (truth == 1).mean(0), pairs.mean(0), *names)


# --------------------------------------------------------------- what is kept apart? (Figs. 6, 8)

def probe(x, labels, fit):
    """Mean AUROC of logistic regressions of labels [N,L] on x [N,D], fitted where fit [N] is true
    and scored elsewhere; without labels that have fewer than 5 of a kind on either side."""
    x, scores = StandardScaler().fit(x[fit]).transform(x), []
    for label in labels.T:
        a, b = fit & (label >= 0), ~fit & (label >= 0)                          # bool [N]
        if min((label[side] == value).sum() for side in (a, b) for value in (0, 1)) >= 5:
            line = LogisticRegression(C=0.1, max_iter=1000).fit(x[a], label[a])
            scores.append(auroc(label[b], line.decision_function(x[b])))
    return mean_or_none(scores)


def embed(args, model, table, rows, texts):
    """({stream: mean token [N,D]}, queried pathology embeddings [N,m,D])."""
    streams, queried = {"pathology": [], "anatomy": []}, []
    for _, out in ask(args, model, table.images, rows, texts):
        queried.append(array(out.pathology_queried))
        streams["pathology"].append(array(out.pathology_tokens.mean(1)))
        if out.anatomy_tokens is not None:
            streams["anatomy"].append(array(out.anatomy_tokens.mean(1)))
    streams = {name: np.concatenate(x) for name, x in streams.items() if x}
    return streams, np.concatenate(queried)


def embedding(args, model, table, rows):
    """Probes, silhouettes and pictures, each beside an untrained network of the same shape: what
    that shows too, training did not make."""
    labels = dict(zip(table.label_names, table.label_pathologies))
    if len(rows) < 20 or not labels:
        raise InputError(f"{table.dataset}: {len(rows)} images of {args.split} with {len(labels)} "
                         "labels are too few to embed; try another --split or data set")
    rng = np.random.default_rng(args.seed)
    rows = np.sort(rng.permutation(rows)[:1000])
    texts, columns, _ = questions(args, model, labels)
    targets = {"pathology": table.labels[rows]}                                 # [N,L]
    if table.has_reports:
        names = [model.queries[kind]["names"] for kind in ("pathology", "anatomy")]
        places = (pair_truth(table, rows, names)[0] == 1).any(2)                # [N,n]
        targets["place"] = places.astype(int)
    fit = np.unique(np.array(table.patients)[rows], return_inverse=True)[1] % 2 == 0  # bool [N]
    torch.manual_seed(args.seed)
    untrained, scores, clouds = MeDSLIP(model.config).to(args.device).eval(), {}, {}
    some = rng.permutation(len(rows) * len(labels))[:2500]
    for title, network in (("trained", model), ("untrained", untrained)):
        streams, queried = embed(args, network, table, rows, texts)
        queried = queried[:, list(columns.values())].reshape(-1, queried.shape[2])  # [N*L,D]
        scores[title] = {f"{target} from {stream} tokens": probe(x, values, fit)
                         for stream, x in streams.items() for target, values in targets.items()}
        for kind, points, group, names in (
                ("queried", queried[some], some % len(labels), list(columns)),
                ("mean token", np.concatenate(list(streams.values())),
                 np.repeat(range(len(streams)), len(rows)), list(streams))):
            if group.max() > 0:
                scores[title][f"silhouette, {kind}"] = float(silhouette_score(points, group))
            flatten = TSNE(perplexity=min(30, len(points) / 4), random_state=args.seed)
            clouds[f"{title}: {kind}"] = flatten.fit_transform(points), group, names
    keys = list(scores["trained"])
    print_table("", {key: {title: scores[title][key] for title in scores} for key in keys}, scores)
    print("A from B: AUROC of logistic regression, fitted on half of the patients; silhouette: "
          "1 = clusters apart, 0 = mixed")
    arrays = {title: points for title, (points, _, _) in clouds.items()}
    return {"n": len(rows), **scores}, arrays, lambda path: figures.draw_embedding(path, clouds)


# ------------------------------------------------------------------------------------ the command

TASKS = {"classification": classification, "grounding": grounding, "relation": relation,
         "embedding": embedding}


def main(args):
    """Run one task; returns its metrics as written to the JSON (None for predict)."""
    args.device = pick_device(args.device)
    if args.task == "predict" and not args.image:
        raise InputError("--task predict needs --image FILE_OR_DIR")
    model = read_model(args)
    if args.task == "predict":
        return predict(args, model)
    table = data.load_from_args(args, args.image_size)
    rows = table.rows(args.split)[:args.limit]
    if not len(rows):
        raise InputError(f"{args.dataset} has no {args.split} split; name another by --split")
    metrics, arrays, draw = TASKS[args.task](args, model, table, rows)
    metrics = {"task": args.task, "dataset": args.dataset, "split": args.split,
               "checkpoint": args.checkpoint, **metrics}
    stem = Path(args.out_dir, "eval", f"{args.dataset}_{args.task}")
    with atomic(stem.with_suffix(".json")) as draft:
        draft.write_text(json.dumps(metrics, indent=1) + "\n")
    with atomic(stem.with_suffix(".npz")) as draft, open(draft, "wb") as file:
        np.savez_compressed(file, **arrays)
    with atomic(stem.with_suffix(".png")) as draft:
        draw(draft)
    print(f"written: {stem}.json .npz .png")
    return metrics


if __name__ == "__main__":
    run(main, parse_args)
