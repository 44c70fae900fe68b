"""Zero-shot evaluation: what an image shows, where it is, and which pairs (Sec. IV).

    python evaluate.py --task classification --dataset nih --root data/nih
    python evaluate.py --task predict --image chest.png --prompt "air where it should not be"
    python evaluate.py --task grounding      # the phantoms, after `python train.py`; a minute

Each task prints a table and writes <out-dir>/eval/<dataset>_<task>.json (metrics), .npz (answers
and labels of each image) and .png. predict.py has how a checkpoint is asked, metrics.py how a
score is computed, embedding.py that task. N images, L labels, S stored pixels a side.

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
from torchvision.transforms.v2.functional import gaussian_blur

import data
import figures
from cli import InputError, Parser, atomic, number, pick_device, run
from embedding import embedding
from metrics import (POINTING, best_dice_threshold, bootstrap_ci, classification_scores,
                     dice_scores, fixed_answer, grounding_scores, hit_regions, nearest,
                     place_scores, points_at, relation_scores, scores_apart, scores_with_intervals)
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
    g.add_argument("--target", default="mask", choices=["mask", "box"], help="what to point at; "
                   "mask: also boxes where there are no masks")
    g.add_argument("--threshold", type=number(float, 0, 1), help="share of a map's maximum "
                   "(default: the best Dice on validation)")
    g.add_argument("--faithful", type=number(int, 0), default=200, help="maps to test by deletion")
    g.add_argument("--bootstrap", type=number(int, 1), default=1000, help="resamples for 95 %% "
                   "intervals over patients; for NIH's 25,596 images a minute")
    g.add_argument("--seed", type=number(int, 0), default=0)
    g.add_argument("--out-dir", default="out")
    data.add_data_flags(p)
    return p.parse_args(argv)


# Each task takes (args, model, table, rows), prints a table and returns (metrics for the JSON,
# arrays for the .npz, a function that draws the figure into a path).
# ------------------------------------------------------------ is it there? (Table III, Fig. 4)

def classification(args, model, table, rows):
    """Does an image show it? Each label of the data set, by name or prompt."""
    labels = dict(zip(table.label_names, table.label_pathologies))  # its name, or None, in text.py
    if not labels:
        raise InputError(f"{table.dataset} has no labels of its own; try --task relation")
    texts, columns, unseen = questions(args, model, labels)

    def answers(rows):
        logits = [array(out.pathology_logits)
                  for _, out in ask(args, model, table.images, rows, texts)]
        asked = [columns[name] for name in labels]                              # [L]
        return table.labels[rows], expit(np.concatenate(logits)[:, asked])

    truth, scores = answers(rows)                                               # [N,L], [N,L]
    names, held = np.array(table.label_names), table.rows("validate")[:args.limit]
    thresholds, source = np.full(len(names), None), args.split  # None: the best on these labels
    if args.split == "test" and len(held):
        best, source = classification_scores(*answers(held))["threshold"].values(), "validate"
        # where validation has no positives, or no negatives, there is no best one
        thresholds = np.array([0.5 if t is None else t for t in best])          # [L]
    patients, new = np.array(table.patients)[rows], np.isin(names, unseen)      # [N], bool [L]
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

SCORES = (*POINTING, "iou", "dice")
Finding = namedtuple("Finding", "row label mask cells")  # mask bool [S,S], cells: its map [h,w]


def masks_of(args, table, row):
    """{label: bool [S,S]}: what masks or boxes locate in an image, by --target."""
    masks = {}
    for label in table.located(row):
        mask = table.mask(row, label, boxes_only=args.target == "box")          # [H,W] or None
        if mask is not None and nearest(mask, table.size, table.size).any():
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
    answers = compare(args, model, table, found, threshold)
    names = np.array([f.label for f in found])                                  # [findings]
    per_class = {name: means(answers, names == name) for name in np.unique(names).tolist()}
    reach = {name: scores["pointing_within_cell"] for name, scores in per_class.items()}
    order = sorted(reach, key=reach.get)  # the worst class first
    drops = faithfulness(args, model, table, found, texts, columns)
    metrics = {**means(answers, np.ones(len(found), bool)), "per_class": per_class,
               "worst": {"name": order[0], "pointing_within_cell": reach[order[0]]},
               "threshold": threshold, "threshold_from": source, "attention": args.attention,
               "target": args.target, "not_trained_on": unseen, "faithfulness": drops}
    patients = np.array(table.patients)[[f.row for f in found]]                 # [findings]
    for key, values in answers["model"].items():
        metrics[f"{key}_ci95"] = bootstrap_ci(lambda _, v: v.mean(), values, values,
                                              args.bootstrap, args.seed, patients)
    lines = {**{name: per_class[name] for name in order}, "all": metrics, **metrics["trivial"]}
    print_table("", lines, ("n", *SCORES))
    print(f"{args.attention} map; regions above {threshold:.2f} of the maximum (from {source}); "
          f"worst class: {order[0]}\n")
    print_table("logit falls without", {f"{k} cells": d for k, d in drops.items()}, DELETED_BY)
    shown = []
    for name in order:  # the first ones of each class, not the best
        shown += [f for f in found if f.label == name][:math.ceil(12 / len(order))]
    examples = [(table.images[f.row], f.mask, heat_of(args, model, f.cells, f.mask.shape), f.label)
                for f in shown[:12]]
    arrays = {"ids": [table.ids[f.row] for f in found], "label": names, **answers["model"]}
    return metrics, arrays, lambda path: figures.draw_grounding(
        path, examples, threshold, f"{args.attention} map")


def compare(args, model, table, found, threshold):
    """{answer: {score: [findings]}} of the model and of trivial answers. The fixed ones are the
    mean training mask of the class: its highest point, and the region that has the best Dice."""
    drawn, everywhere = {}, np.ones((table.size, table.size), bool)
    for row in table.rows("train")[:2000]:  # enough for a mean
        for label, mask in masks_of(args, table, row).items():
            drawn.setdefault(label, []).append(mask)
    labels, each = {f.label for f in found}, []
    fixed = {label: fixed_answer(drawn.get(label, [everywhere])) for label in labels}
    for f in found:
        mean, level = fixed[f.label]                                            # [S,S], a share
        regions = hit_regions(f.mask, *f.cells.shape)
        own = grounding_scores([f.cells], [f.mask], threshold, args.image_size,
                               model.cell_centres())  # of this one finding
        each.append({"model": {key: own[key] for key in SCORES},
                     "random_point": points_at(everywhere, regions),
                     "brightest_point": points_at(table.images[f.row], regions),
                     "fixed_point": points_at(mean, regions),
                     "fixed_region": {"dice": dice_scores(mean, f.mask, [level])[0]}})
    return {answer: {key: np.array([e[answer][key] for e in each]) for key in scores}
            for answer, scores in each[0].items()}


def means(answers, chosen):
    """Means over the findings of bool [findings]: the model's, and the others' under trivial."""
    mean = {answer: {key: float(values[chosen].mean()) for key, values in scores.items()}
            for answer, scores in answers.items()}
    return {**mean.pop("model"), "n": int(chosen.sum()), "trivial": mean}


DELETED, DELETED_BY = (4, 12, 32), ("map", "random", "mask")  # so many cells, chosen in three ways


def faithfulness(args, model, table, found, texts, columns):
    """How far a finding's logit falls when k cells of its film are blurred: the highest of its map,
    random ones, those in or next to its mask. Means over findings, {"4": {"map": ...}}."""
    rng, size, drops = np.random.default_rng(args.seed), args.image_size, []
    for f in [found[i] for i in rng.permutation(len(found))[:args.faithful]]:
        n, (offset, stride) = len(f.cells), model.cell_centres()
        # the pixel that each cell looks at [n], and the cell that each pixel is deleted with [size]
        centres = np.clip(np.round(offset + stride * np.arange(n)), 0, size - 1).astype(int)
        cell_of = np.clip(np.round((np.arange(size) - offset) / stride), 0, n - 1).astype(int)
        away = distance_transform_edt(~nearest(f.mask, size, size))[centres][:, centres]  # [n,n]
        film = data.to_input(torch.from_numpy(table.images[[f.row]]), size)[0]  # [3,size,size]
        blurred = gaussian_blur(film, 2 * (size // 4) + 1, size / 8)  # so that no lesion is left
        films = [film]
        for k in DELETED:
            for order in (-f.cells, rng.random((n, n)), away):
                gone = np.zeros(n * n, bool)
                gone[np.argsort(order.ravel(), kind="stable")[:k]] = True
                gone = torch.from_numpy(gone.reshape(n, n)[cell_of][:, cell_of])  # [size,size]
                films.append(torch.where(gone, blurred, film))                  # [3,size,size]
        logits = array(model(torch.stack(films).to(args.device), *texts).pathology_logits)
        logits = logits[:, columns[f.label]]                                    # [1 + 9]
        drops.append((logits[0] - logits[1:]).reshape(len(DELETED), len(DELETED_BY)))  # [3,3]
    mean = np.mean(drops, axis=0).tolist() if drops else []
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
    truth, source = pair_truth(table, rows, names)                              # [N,n,m]
    texts, _, _ = questions(args, model, {})
    parts = [pairs_of(model, out, texts[1])
             for _, out in ask(args, model, table.images, rows, texts)]
    existence, places, pairs = (np.concatenate(part) for part in zip(*parts))   # [N,m], [N,n,m] x 2
    train = table.rows("train")  # a trivial answer: how often each cell is positive in its reports
    often = sum(table.existence([i], *names)[0] == 1 for i in train) / max(len(train), 1)  # [n,m]
    often = np.broadcast_to(often, truth.shape)                                 # [N,n,m]
    partner = {name: i for i, name in enumerate(names[1])}
    mirror = np.array([partner.get(swap_sides(name), i) for name, i in partner.items()])  # [n]
    answers = {"model": pairs, "cell frequencies in train": often,
               "true existence x frequency": (truth == 1).any(1, keepdims=True) * often}
    scores = {name: relation_scores(truth, answer, mirror) for name, answer in answers.items()}
    # one read-out of places for every model, also for those that were trained without ICL
    place = {"model": place_scores(truth, places), "frequencies": place_scores(truth, often)}
    print_table("pairs", scores, ("auroc", "ap", "cell_auroc", "side", "top1"))
    print_table("places, Z2 . T", place, ("top1", "recall", "chance", "n_several"))
    metrics = {**scores.pop("model"), "trivial": scores, "place": place, "truth": source}
    drawn = table.truth(train, *names)                                          # [.,n,m] or None
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
