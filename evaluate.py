"""Zero-shot evaluation: what an image shows, where it is, and which pairs (Sec. IV).

    python evaluate.py --task classification --dataset nih --root data/nih
    python evaluate.py --task predict --image chest.png --prompt "air where it should not be"
    python evaluate.py --task grounding      # the phantoms, after `python train.py`; a minute

A task prints tables and writes <out-dir>/eval/<dataset>_<task>.json (metrics), .npz (answers and
labels of each image) and .png; predict writes a picture only. N images, L labels, S stored pixels.
Differs from the released code:
- Thresholds come from validation where it has labels. Scores by the released rules stand beside
  (customary, released), on our forward pass: the released grounding script leaves out the mask.
  --protocol published says how they are made, and asks covidx in the paper's words.
- Maps and masks are compared on the grid of the stored images (released: 224 x 224), each map
  scaled by its own maximum and drawn where the backbone looks (`upsample_map`).
"""
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2.functional import gaussian_blur

import data
import figures
import metrics
from checkpoint import ask, encode_queries, has_icl, load_model, questions
from cli import InputError, Parser, atomic, number, pick_device, print_table, run
from disentangle import embedding
from formats import covidx
from formats.images import read_image, trouble
from text import CLINICAL_BERT, swap_sides


def add_flags(p):
    """The flags of evaluate.py and finetune.py."""
    p.add_argument("--dataset", default="synthetic", choices=data.DATASETS)
    p.add_argument("--checkpoint", default="out/ckpt.pt", metavar="FILE_OR_HUB_ID")
    p.add_argument("--image-size", type=number(int, 16), help="pixels a side")
    p.add_argument("--batch-size", type=number(int, 1))
    p.add_argument("--bootstrap", type=number(int, 1), default=1000, help="resamples of patients")
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--device", help="cuda where there is one, else cpu")
    p.add_argument("--out-dir", default="out")
    data.add_data_flags(p)


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("--task", required=True, choices=[*TASKS, "predict"])
    p.add_argument("--split", default="test", choices=["train", "validate", "test", "all"],
                   help="all: Table VI's full data set")
    p.add_argument("--protocol", default="honest", choices=["honest", "published"],
                   help="published: says which scores are the paper's, and uses its covidx prompt")
    p.add_argument("--limit", type=number(int, 1), help="only the first N images of a split")
    p.add_argument("--image", default="", metavar="FILE", help="a radiograph, for predict")
    p.add_argument("--prompt", help="your words for the only label (or the only new one)")
    p.add_argument("--text-encoder", metavar="NAME", help="of new prompts (the checkpoint's)")
    p.add_argument("--pathology-book", metavar="FILE", help="prompts for a published checkpoint")
    p.add_argument("--attention", default="own", choices=["own", "pathology"],
                   help="own: the evidence, if the model has it; pathology: the "
                   "paper's map, attention over heads and layers")
    add_flags(p)
    p.set_defaults(batch_size=64)
    args = p.parse_args(argv)
    if args.protocol == "published" and args.task == "classification" and args.dataset == "covidx":
        args.prompt = args.prompt or covidx.PAPER_PROMPT
    return args


def maps_of(args, out):
    """[B,m,h,w] by --attention: the evidence, or the paper's mean over heads and layers."""
    if args.attention == "own" and out.pathology_evidence is not None:
        return out.pathology_evidence.double()
    return out.pathology_attention.double()


def pairs_of(model, out, anatomy_text):
    """existence [B,m]; places [B,n,m]: Z_2 . T, which ProtoCL trains; pairs [B,n,m]: ICL's answer,
    or existence times place where no ICL was trained. Double, so that near 1 no two are equal."""
    existence = out.pathology_logits.double().sigmoid()
    places = (out.pathology_z @ anatomy_text.T).transpose(1, 2).double()
    pairs = out.relation_logits.double().sigmoid()
    if not has_icl(model):
        pairs = existence[:, None] * places.softmax(1)
    return {"existence": existence, "places": places, "pairs": pairs}


# A task returns what `main` writes: metrics, arrays of each image, a function that draws a file.

def classification(args, model, table, rows):
    """Does an image show it (Table III, Fig. 4)? Each label of the data set."""
    names = np.array(table.label_names)                                         # [L]
    if not len(names):
        raise InputError(f"{table.dataset} has no labels (of captions, ten test images must show "
                         "one); try --task relation")
    labels = dict(zip(table.label_names, table.label_pathologies))  # of text.py, or None
    texts, columns, unseen = questions(model, labels, args.prompt, args.text_encoder)
    # every stored query is asked, as queries look at each other; these columns are read
    asked = [columns[name] for name in labels]                                  # [L]
    pick = lambda out: {"scores": out.pathology_logits[:, asked].double().sigmoid()}
    truth = table.labels[rows]                                                  # [N,L]
    scores = ask(args, model, table.images, rows, texts, pick)["scores"]        # [N,L]
    held = table.rows("validate")[:args.limit]
    held = held[(table.labels[held] >= 0).any(1)]  # the others tell nothing of a threshold
    thresholds, source = np.full(len(names), None), args.split  # None: the best on what is scored
    if len(held):
        held_scores = ask(args, model, table.images, held, texts, pick)["scores"]
        thresholds, source = metrics.best_thresholds(table.labels[held], held_scores), "validate"
    patients, new = table.patients[rows], np.isin(names, unseen)      # [N], [L]
    blocks, lines = [], {}
    # an unseen disease does not count in the mean that training is judged by
    for title, part in (("trained on", ~new), ("not trained on", new)):
        if part.any():
            block = metrics.scores_with_intervals(truth[:, part], scores[:, part], thresholds[part],
                                                  names[part], args.bootstrap, args.seed, patients)
            blocks.append(block)
            lines |= {**block["per_class"], f"mean, {title}": block,
                      f"customary, {title}": block["customary"]}
    for name, value in metrics.auroc_healthy(truth, scores, names).items():
        lines[name]["auroc_healthy"] = value
    print_table("", lines, ("n_pos", "auroc", "auroc_ci95", "auroc_healthy", "ap", "f1", "acc"))
    print(f"{len(rows)} images of {args.split}; F1 and ACC at thresholds from {source}; customary: "
          "at the best on these very images, which flatters; a guess has AUROC 0.5")
    result = {**blocks[0], "thresholds_from": source, "not_trained_on": unseen,
              "trivial": {"auroc": 0.5}}
    if len(blocks) == 2:
        result["unseen"] = blocks[1]
    arrays = {"ids": table.ids[rows], "names": names, "labels": truth, "scores": scores}
    per_class = {name: lines[name] for name in names}
    return result, arrays, lambda path: figures.draw_classes(path, per_class)


# film, mask, heat [S,S]; cells [h,w]: the map before it is enlarged to heat
Finding = namedtuple("Finding", "row label film mask cells heat")


def marks_of(table, rows):
    """[(row, label, bool [S,S])]: what masks and boxes locate in rows."""
    marks = []
    for row in rows:
        for label in table.located(row):
            mask = metrics.nearest(table.mask(row, label), table.size, table.size)  # [H,W] -> [S,S]
            if mask.any():  # a thin one may fall between the stored pixels
                marks.append((row, label, mask))
    return marks


def locate(args, model, table, rows, texts, columns):
    """[Finding] of all that masks or boxes locate in rows. columns: {label: its query}."""
    marks, found = marks_of(table, rows), []
    rows = sorted({row for row, _, _ in marks})
    if rows:
        pick = lambda out: {"maps": maps_of(args, out)[:, list(columns.values())]}
        maps = ask(args, model, table.images, rows, texts, pick)["maps"]        # [N,L,h,w]
    for row, label, mask in marks:
        cells = maps[rows.index(row), list(columns).index(label)]               # [h,w]
        heat = metrics.upsample_map(cells, *mask.shape, args.image_size, model.cell_centres())
        found.append(Finding(row, label, table.images[row], mask, cells, heat))
    return found


def grounding(args, model, table, rows):
    """Where are the present findings (Table IV, Fig. 7)?"""
    held = table.rows("validate")[:args.limit]
    known = dict(zip(table.label_names, table.label_pathologies))
    # {label: its name in the vocabulary}, also of labels that only validation has
    labels = {label: known.get(label, label)
              for row in (*held, *rows) for label in table.located(row)}
    texts, columns, unseen = questions(model, labels, args.prompt, args.text_encoder)
    found = locate(args, model, table, rows, texts, columns)
    if not found:
        raise InputError(f"nothing is located in the {args.split} split of {args.dataset}")
    # where validation locates nothing, the threshold is tuned on what is scored
    tuned = locate(args, model, table, held, texts, columns) or found
    source = args.split if tuned is found else "validate"
    threshold = metrics.best_dice_threshold([f.heat for f in tuned], [f.mask for f in tuned])
    # the trivial answer: where a label mostly lies; 2,000 images are enough for a mean
    fixed = metrics.fixed_answers(marks_of(table, table.rows("train")[:2000]))
    each = np.array([metrics.all_scores(f, fixed, threshold) for f in found])   # [findings,5,5]
    patients = table.patients[[f.row for f in found]]                 # [findings]
    names = np.array([f.label for f in found])                                  # [findings]
    result = metrics.grounding_summary(names, each, patients, args.bootstrap, args.seed)
    drops = faithfulness(args, model, found, texts, columns)  # is the map what the answer uses?
    lines = {"all": result, "released": result["released"], **result["trivial"]}
    print_table("", {**result["per_class"], **lines}, ("n", *metrics.SCORES))
    print(f"regions above {threshold:.2g} of the maximum (from {source}); worst class: "
          f"{result['worst']}\n")
    print_table("logit falls without", {f"{k} cells": d for k, d in drops.items()},
                ("map", "random", "mask"))
    result |= {"faithfulness": drops, "threshold": threshold, "threshold_from": source,
               "attention": args.attention, "not_trained_on": unseen}
    arrays = {"ids": [table.ids[f.row] for f in found], "label": names,
              **dict(zip(metrics.SCORES, each[:, 0].T))}
    films = [{"film": f.film, "title": f.label, "mask": f.mask, "heat": f.heat,
              "region": metrics.region(f.heat, threshold)} for f in found[:15]]  # not the best ones
    title = f"{args.attention} map, x its maximum; cyan: truth; yellow: above {threshold:.2g} of it"
    return result, arrays, lambda path: figures.gallery(path, films, title)


def faithfulness(args, model, found, texts, columns):
    """How far a finding's logit falls when the k cells of `metrics.deletions` are blurred. Means
    over findings, {"4": {"map": ...}}."""
    rng, size, drops = np.random.default_rng(args.seed), args.image_size, []
    for f in [found[i] for i in rng.permutation(len(found))[:200]]:  # ten images each
        film = data.to_input(torch.tensor(f.film)[None], size)[0]               # [3,size,size]
        blurred = gaussian_blur(film, 2 * (size // 4) + 1, size / 8)  # so that no lesion is left
        films = [film]  # the whole film first
        for gone in metrics.deletions(f.cells, f.mask, size, model.cell_centres(), rng):
            films.append(torch.where(torch.from_numpy(gone), blurred, film))
        logits = model(torch.stack(films).to(args.device), *texts).pathology_logits
        logits = logits[:, columns[f.label]].double().cpu().numpy()             # [1 + 9]
        drops.append((logits[0] - logits[1:]).reshape(3, 3))  # cells by ways
    means = dict(zip(("4", "12", "32"), np.mean(drops, axis=0).tolist()))
    return {k: dict(zip(("map", "random", "mask"), mean)) for k, mean in means.items()}


def relation(args, model, table, rows):
    """Which (anatomy, pathology) pairs does an image show, as drawn or as its report has them?"""
    names = [model.queries[kind]["names"] for kind in ("pathology", "anatomy")]
    truth, source = table.pairs(rows, *names)                                   # [N,n,m]
    texts, _, _ = questions(model, {}, args.prompt, args.text_encoder)
    said = ask(args, model, table.images, rows, texts, lambda out: pairs_of(model, out, texts[1]))
    train = table.rows("train")  # a trivial answer: how often each cell is positive in its reports
    positive = sum(table.existence([i], *names)[0] == 1 for i in train)         # [n,m]
    often = np.broadcast_to(positive / max(len(train), 1), truth.shape)         # [N,n,m]
    partner = {name: i for i, name in enumerate(names[1])}  # {anatomy: its row}
    # [n]: the anatomy on the other side, or the same one where there is none
    mirror = np.array([partner.get(swap_sides(name), i) for name, i in partner.items()])
    # the second trivial answer knows what a film shows, but not where
    answers = {"model": said["pairs"], "cell frequencies in train": often,
               "true existence x frequency": (truth == 1).any(1, keepdims=True) * often}
    scores = {name: metrics.relation_scores(truth, x, mirror) for name, x in answers.items()}
    print_table("pairs", scores, ("auroc", "ap", "cell_auroc", "side", "top1"))
    # one read-out of places for every model, also for those that were trained without ICL
    place = {"model": metrics.place_scores(truth, said["places"]),
             "frequencies": metrics.place_scores(truth, often)}
    print_table("places, Z2 . T", place, ("top1", "recall", "n", "n_several"))
    drawn, apart = table.truth(train, *names), {}                               # [.,n,m] or None
    if drawn is not None:  # the hard world keeps some pairs out of its training films
        apart = metrics.scores_apart(truth, (drawn == 1).any(0), said["existence"],
                                     said["places"])
        print_table("cells", apart, ("auroc", "place_top1", "n"))
    print(f"{len(rows)} images of {args.split}; truth: {source}")
    result = {**scores.pop("model"), "trivial": scores, "place": place, "truth": source, **apart}
    arrays = {"ids": table.ids[rows], "truth": truth, "pathologies": names[0],
              "anatomies": names[1], "scores": said["pairs"].astype(np.float32)}
    return result, arrays, lambda path: figures.draw_relation(
        path, (truth == 1).mean(0), said["pairs"].mean(0), *names)


def predict(args, model):
    """What and where in one radiograph: a table, and a picture of where four questions look."""
    names, places = (model.queries[kind]["names"] for kind in ("pathology", "anatomy"))
    labels = dict(zip(names, names))
    if args.prompt:
        labels[args.prompt] = None  # no name in the vocabulary: asked in these words
    texts, columns, _ = questions(model, labels, args.prompt, args.text_encoder)
    try:
        equalize = data.equalizes(args, model)
        film = read_image(args.image, equalize=equalize)                        # [H,W]
        squashed = read_image(args.image, args.image_size, equalize)            # [S,S]
    except Exception:  # whatever a decoder makes of a damaged file
        raise InputError(f"--image {args.image or 'FILE'} is {trouble(args.image)}; name another"
                         ) from None
    said = ask(args, model, squashed[None], [0], texts, lambda out: {
        **pairs_of(model, out, texts[1]), "maps": maps_of(args, out)})
    existence, pairs, maps = said["existence"][0], said["pairs"][0], said["maps"][0]
    films = [{"film": film, "title": "as it is"}]  # beside the four answers
    # the user's own question first, then the likeliest
    for label in sorted(columns, key=lambda k: (k != args.prompt, -existence[columns[k]]))[:8]:
        k = columns[label]
        best = [f"{places[i]} {pairs[i, k]:.3f}" for i in np.argsort(-pairs[:, k])[:3]]
        print(f"{existence[k]:.3f}  {label:<24}", *best, sep="  ")
        heat = metrics.upsample_map(maps[k], *film.shape, args.image_size, model.cell_centres())
        films.append({"film": film, "title": f"{label[:28]}: {existence[k]:.2f}", "heat": heat})
    path = Path(args.out_dir, "eval", "predict.png")
    with atomic(path) as draft:
        figures.gallery(draft, films[:5], "where each question looks; no medical device")
    print(f"where the first four look: {path}\nFor study: no medical device, no diagnosis.")


TASKS = {"classification": classification, "grounding": grounding, "relation": relation,
         "embedding": embedding}


def write_results(stem, result, arrays, draw):
    """result into <stem>.json, arrays into .npz, and what draw(path) draws into .png."""
    with atomic(f"{stem}.json") as draft:
        draft.write_text(json.dumps(result, indent=1, default=str) + "\n")  # str of a device
    with atomic(f"{stem}.npz") as draft, open(draft, "wb") as file:
        np.savez_compressed(file, **arrays)
    with atomic(f"{stem}.png") as draft:
        draw(draft)
    print(f"written: {stem}.json .npz .png")


def main(args):
    """Run one task; returns its metrics as written to the JSON (None for predict)."""
    args.device = pick_device(args.device)
    model = load_model(args.checkpoint, args.device).requires_grad_(False)
    args.image_size = args.image_size or model.config.image_size  # pixels that it was trained at
    if model.queries is None:  # a published checkpoint is asked the published vocabulary
        if not args.pathology_book:
            print("asked in our own words; --pathology-book takes the published ones")
        model.queries = encode_queries(args.text_encoder or CLINICAL_BERT, args.pathology_book)
    if args.task == "predict":
        return predict(args, model)
    table = data.load_from_args(args, args.image_size, model=model)
    table.hidden = set(filter(None, model.args.get("hold_out", "").split(",")))  # of train.py
    if table.equalized:
        print("DICOM files are histogram-equalised, as MIMIC-CXR-JPG's were (--equalize off: not)")
    rows = table.rows(args.split)[:args.limit]  # numbers of the images
    if not len(rows):
        raise InputError(f"{args.dataset} has no {args.split} split; name another by --split")
    result, arrays, draw = TASKS[args.task](args, model, table, rows)
    if args.protocol == "published":
        print("The paper's scores: customary, F1 at a label's best threshold on these very images, "
              "ACC of what lies above it; released, all blocks above 0 are the region.")
    flags = ("task", "dataset", "split", "checkpoint", "protocol", "prompt")
    result |= {flag: getattr(args, flag) for flag in flags} | {"equalized": table.equalized}
    write_results(Path(args.out_dir, "eval", f"{args.dataset}_{args.task}"), result, arrays, draw)
    return result


if __name__ == "__main__":
    run(main, parse_args)
