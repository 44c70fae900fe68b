"""Scores as functions of arrays: is it there, where is it, which pair. Nothing here knows a model.

    from metrics import classification_scores, grounding_scores, relation_scores
    python -m pytest tests/test_metrics.py    # each of them on cases that a pencil can check

Labels are 1 present, 0 absent, -1 unknown and left out. N images, L labels; a map has h x w cells,
its mask and film H x W pixels. A mean over nothing is None.
Differs from the released code: a map is divided by its own maximum, there by that of its batch.
"""
import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve


def mean_or_none(values):
    """Mean of the values that are not None."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def auroc(labels, scores):
    """AUROC of [N] from the ranks of the positives (Mann and Whitney); None without both kinds.
    roc_auc_score gives the same in 3 to 14 times the time, and a bootstrap asks 10,000 times."""
    labels, scores = labels[labels >= 0], scores[labels >= 0]
    n_pos, n_neg = int((labels == 1).sum()), int((labels == 0).sum())
    rank_sum = rankdata(scores)[labels == 1].sum() - n_pos * (n_pos + 1) / 2
    return float(rank_sum / (n_pos * n_neg)) if n_pos and n_neg else None


def class_scores(labels, scores, threshold):
    """`classification_scores` of one class [N]."""
    labels, scores = labels[labels >= 0], scores[labels >= 0]
    counts = {"n_pos": int(labels.sum()), "n": len(labels)}
    if counts["n_pos"] in (0, len(labels)):
        return {"auroc": None, "ap": None, "f1": None, "acc": None, "threshold": None, **counts}
    if threshold is None:
        precision, recall, thresholds = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        threshold = thresholds[np.argmax(f1[:-1])]  # the last point has no threshold
    found = scores >= threshold
    return {"auroc": auroc(labels, scores), "ap": float(average_precision_score(labels, scores)),
            "f1": float(f1_score(labels, found, zero_division=0)),
            "acc": float((found == labels).mean()), "threshold": float(threshold), **counts}


def classification_scores(labels, scores, threshold=None, names=None):
    """AUROC, average precision, and F1 and accuracy of `scores >= threshold` (one number, or one
    per label; None: the one of highest F1 on these very labels) of [N], or `per_class` of [N,L]
    with the means over the classes that some images show and some do not."""
    labels, scores = np.asarray(labels), np.asarray(scores, float)
    if labels.ndim == 1:
        return class_scores(labels, scores, threshold)
    each = zip(labels.T, scores.T, np.broadcast_to(threshold, labels.shape[1]))
    names = range(labels.shape[1]) if names is None else names
    per_class = {str(name): class_scores(*columns) for name, columns in zip(names, each)}
    means = {key: mean_or_none([one[key] for one in per_class.values()])
             for key in ("auroc", "ap", "f1", "acc")}
    return {"threshold": {name: one["threshold"] for name, one in per_class.items()},
            "n": len(labels), "per_class": per_class, **means}


def best_thresholds(labels, scores):
    """[L]: of highest F1 on [N,L]; 0.5 for a class that no image shows, or every one."""
    best = classification_scores(labels, scores)["threshold"].values()
    return np.array([0.5 if threshold is None else threshold for threshold in best])


def customary_scores(labels, scores):
    """Means over the classes of [N,L] as released: F1 at each one's best threshold on these very
    labels, ACC of what lies above it, not at it."""
    best, thresholds = classification_scores(labels, scores), best_thresholds(labels, scores)
    above = classification_scores(labels, scores, np.nextafter(thresholds, np.inf))
    return {"auroc": best["auroc"], "ap": best["ap"], "f1": best["f1"], "acc": above["acc"]}


def bootstrap_ci(metric, labels, scores, n=1000, seed=0, groups=None):
    """(low, high): the central 95 % of metric(labels, scores) on n resamples, (None, None) without
    an answer; a list of them if the metric gives several numbers."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    # whole groups (patients) are redrawn, as two films of one patient are alike
    names, group = np.unique(range(len(labels)) if groups is None else groups, return_inverse=True)
    rng, values, intervals = np.random.default_rng(seed), [], []
    for _ in range(n):
        counts = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        rows = np.repeat(np.arange(len(labels)), counts[group])
        values.append(np.array(metric(labels[rows], scores[rows]), float))  # None becomes nan
    for column in np.reshape(values, (n, -1)).T:
        known = column[~np.isnan(column)]
        intervals.append(tuple(np.percentile(known, [2.5, 97.5])) if len(known) else (None, None))
    return intervals if values[0].ndim else intervals[0]


def scores_with_intervals(labels, scores, thresholds, names, n=1000, seed=0, groups=None):
    """`classification_scores` of [N,L] with `auroc_ci95` of each class and of the mean, and the
    `customary_scores`."""
    def aurocs(labels, scores):  # of each class, and last their mean
        each = [auroc(*pair) for pair in zip(labels.T, scores.T)]
        return [*each, mean_or_none(each)]

    result = classification_scores(labels, scores, thresholds, names)
    intervals = bootstrap_ci(aurocs, labels, scores, n, seed, groups)           # [L+1]
    for block, interval in zip([*result["per_class"].values(), result], intervals):
        block["auroc_ci95"] = interval
    return {**result, "customary": customary_scores(labels, scores)}


def auroc_healthy(labels, scores, names):
    """{label: AUROC of its images against healthy ones only (Fig. 4)}, of [N,L]; {} if there are
    none. Healthy: every label 0, but the label that says so 1. With labels of one disease nobody
    can tell, since its negatives may have another one."""
    says_so = np.isin(names, ("No Finding", "normal"))                          # [L]
    healthy = (labels[:, ~says_so] == 0).all(1) & (labels[:, says_so] == 1).all(1)
    if (~says_so).sum() < 2 or not healthy.any():
        return {}
    compared = healthy[:, None] | (labels == 1)                                 # [N,L]
    return {name: auroc(labels[rows, k], scores[rows, k])
            for k, (name, rows) in enumerate(zip(names, compared.T))}


SCORES = ("pointing_game", "pointing_within_cell", "pointing_released", "iou", "dice")
ANSWERS = ("model", "released", "random_point", "brightest_point", "fixed")  # see `all_scores`
THRESHOLDS = np.geomspace(1e-4, 0.98, 50)  # shares of a map's maximum; some maps are peaked


def nearest(array, height, width):
    """[h,w] -> [height,width]: each pixel takes the cell that its middle lies in."""
    rows = ((np.arange(height) + 0.5) * array.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * array.shape[1] / width).astype(int)
    return array[rows][:, columns]


def upsample_map(attention, height, width, size=None, centres=(0.0, None)):
    """A map [h,w] -> [height,width], bilinear between the points that its cells look at: `centres`
    (offset, stride) of an input of `size` pixels, else pixel i * height / h, as a ResNet's do."""
    at = []
    for cells, length in zip(attention.shape, (height, width)):
        pixels = size or length
        middles = (np.arange(length) + 0.5) * pixels / length - 0.5  # in input pixels
        at.append((middles - centres[0]) / (centres[1] or pixels / cells))  # in cells
    return map_coordinates(attention, np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")


def region(heat, threshold):
    """Where a map [H,W] is above a share of its maximum, bool [H,W]."""
    return heat / max(heat.max(), 1e-12) > threshold


def dice_of(regions, masks):
    """Dice of regions and masks, bool [...,H,W]; 1 where both are empty."""
    overlap = (regions & masks).sum((-2, -1))
    total = regions.sum((-2, -1)) + masks.sum((-2, -1))
    return np.where(total > 0, 2 * overlap / np.maximum(total, 1), 1.0)


def best_dice_threshold(heats, masks):
    """The share of a map's maximum that has the best mean Dice over heats and masks [H,W]."""
    dice = [[dice_of(region(heat, share), mask) for share in THRESHOLDS]
            for heat, mask in zip(heats, masks)]
    return float(THRESHOLDS[np.mean(dice, axis=0).argmax()])


def mask_scores(regions, masks, fixed, patients, n=1000):
    """Dice and IoU of predicted regions, bool [N,H,W]: means over the images with a mask; dice_all:
    over all. trivial: one fixed region [H,W] for every image, and none at all."""
    dice_all, filled = dice_of(regions, masks), masks.any((1, 2))               # [N]
    dice = dice_all[filled]
    interval = bootstrap_ci(lambda dice, _: dice.mean(), dice, dice, n, 0, patients[filled])
    return {"n": len(dice), "dice": dice.mean(), "dice_ci95": interval,
            "iou": (dice / (2 - dice)).mean(), "n_all": len(masks), "dice_all": dice_all.mean(),
            "trivial": {"fixed_dice": dice_of(fixed, masks[filled]).mean(),
                        "empty_dice_all": (~filled).mean()}}


def score_maps(maps, mask, h, w):
    """SCORES of maps on the grid of mask [H,W], a row of 5 for each. maps: (heat [H,W] as
    `upsample_map` gives it, blocks [H,W] as `nearest` does, threshold); h x w cells. A point is a
    hit in the mask; at most one cell from it; in a cell whose block has any pixel of it, as
    released. Equal maxima share the point."""
    near = distance_transform_edt(~mask, (h / mask.shape[0], w / mask.shape[1])) <= 1  # in cells
    number = nearest(np.arange(h * w).reshape(h, w), *mask.shape)  # the cell of each pixel
    in_block, scores = np.isin(number, number[mask]), []
    for heat, blocks, threshold in maps:
        point, block = heat == heat.max(), blocks == blocks.max()  # released: a whole block points
        dice = dice_of(region(heat, threshold), mask)
        scores.append([mask[point].mean(), near[point].mean(), in_block[block].mean(),
                       dice / (2 - dice), dice])
    return scores


def grounding_scores(attention, masks, threshold):
    """Means of `score_maps` over maps [h,w] and their masks [H,W], but for empty masks."""
    each = []
    for cells, mask in zip(attention, masks):
        cells, mask = np.asarray(cells, float), np.asarray(mask) > 0
        if mask.any():
            heat, blocks = upsample_map(cells, *mask.shape), nearest(cells, *mask.shape)
            each += score_maps([(heat, blocks, threshold)], mask, *cells.shape)
    means = [mean_or_none(values) for values in np.reshape(each, (-1, len(SCORES))).T]
    return {**dict(zip(SCORES, means)), "threshold": threshold, "n": len(each)}


def fixed_answers(marks):
    """{label: (mean mask [S,S], its level of best Dice)}: answers that need no look at the image.
    marks: (row, label, mask [S,S]) of training images."""
    answers = {}
    for label in {label for _, label, _ in marks}:
        masks = [mask for _, its_label, mask in marks if its_label == label]
        mean = np.mean(masks, axis=0)
        answers[label] = mean, best_dice_threshold([mean] * len(masks), masks)
    return answers


def all_scores(finding, fixed, threshold):
    """SCORES of the ANSWERS to an evaluate.Finding, [5,5]: the model's map; the same as released,
    where a cell fills its block and counts above 0; and trivial ones: a map that is the same
    everywhere, so a random point and the whole film; the film itself, at the same threshold; the
    mean mask of training films at its own level (`fixed_answers`)."""
    mask, film, cells = finding.mask, finding.film, finding.cells
    blocks, everywhere = nearest(cells, *mask.shape), np.ones(mask.shape)
    mean, level = fixed.get(finding.label, (everywhere, 0))  # nothing to go by: the whole film
    maps = [(finding.heat, blocks, threshold), (blocks, blocks, 0),
            (everywhere, everywhere, threshold), (film, film, threshold), (mean, mean, level)]
    return score_maps(maps, mask, *cells.shape)


def grounding_summary(labels, each, patients, n=1000, seed=0):
    """Means of `all_scores` each [n,5,5] over all findings, `per_class` by labels [n], the class
    whose map points worst, and intervals over patients [n]."""
    def means(rows):  # [k,5,5]
        scores = [dict(zip(SCORES, row)) for row in rows.mean(0).tolist()]
        answers = dict(zip(ANSWERS, scores))
        return {**answers.pop("model"), "n": len(rows), "released": answers.pop("released"),
                "trivial": answers}

    per_class = {str(name): means(each[labels == name]) for name in np.unique(labels)}
    worst = min(per_class, key=lambda name: per_class[name]["pointing_within_cell"])
    model = each[:, 0]                                                          # [n,5]
    intervals = bootstrap_ci(lambda _, x: x.mean(0), model, model, n, seed, patients)
    return {**means(each), "per_class": per_class, "worst": worst,
            **{f"{key}_ci95": interval for key, interval in zip(SCORES, intervals)}}


def deletions(cells, mask, size, centres, rng):
    """Yields which pixels of an input [size,size] go with k cells, for k = 4, 12, 32: those that
    are highest in the map cells [n,n], random ones, those in or next to mask [S,S]."""
    n, (offset, stride) = len(cells), centres
    # the pixel that each cell looks at [n], and the cell that each pixel is deleted with [size]
    looks = np.clip(np.round(offset + stride * np.arange(n)), 0, size - 1).astype(int)
    cell_of = np.clip(np.round((np.arange(size) - offset) / stride), 0, n - 1).astype(int)
    away = distance_transform_edt(~nearest(mask, size, size))[looks][:, looks]  # [n,n]
    for k in (4, 12, 32):
        for order in (-cells, rng.random((n, n)), away):
            gone = np.zeros(n * n, bool)
            gone[np.argsort(order.ravel(), kind="stable")[:k]] = True
            yield gone.reshape(n, n)[cell_of][:, cell_of]                       # [size,size]


def place_scores(truth, scores, counted=True):
    """At which of the places that occur is a finding? truth, scores [N,n,m]; counted bool [N,m].
    top1: of the findings that count, the share with a true place as their best. recall: of the k
    places of a finding at several, the share among its k highest."""
    occurs = (truth == 1).any((0, 2))                                           # [n]
    places, scores = truth[:, occurs] == 1, scores[:, occurs]
    count = places.sum(1) * counted                                             # [N,m] k
    rank = scores.shape[1] - rankdata(scores, method="ordinal", axis=1)         # 0 is the best
    found = (places & (rank < count[:, None])).sum(1)                           # [N,m]
    top1, several = (places & (rank == 0)).any(1)[count > 0], count > 1
    return {"top1": mean_or_none(top1), "recall": mean_or_none(found[several] / count[several]),
            "n": len(top1), "n_several": int(several.sum())}


def relation_scores(truth, scores, mirror, least=5):
    """How scores [N,n,m] find the pairs of truth [N,n,m]; mirror [n]: each anatomy's partner on the
    other side, or itself. auroc, ap: all cells pooled. cell_auroc: mean over cells with `least`
    films of either kind. side: share of the pairs that score above their absent mirror image."""
    present = truth == 1                                                        # [N,n,m]
    pooled = classification_scores(truth.ravel(), scores.ravel(), threshold=0.5)
    kinds = np.minimum(present.sum(0), (truth == 0).sum(0))                     # [n,m]
    cells = [auroc(truth[:, i, j], scores[:, i, j]) for i, j in np.argwhere(kinds >= least)]
    has_side = (mirror != np.arange(len(mirror)))[:, None]                      # [n,1]
    side = (scores > scores[:, mirror])[present & ~present[:, mirror] & has_side]
    return {"auroc": pooled["auroc"], "ap": pooled["ap"], "cell_auroc": mean_or_none(cells),
            "side": mean_or_none(side), "top1": place_scores(truth, scores)["top1"],
            "n": len(truth), "n_cells": len(cells), "n_sided": len(side)}


def scores_apart(truth, in_train, existence, places):
    """Scores of findings at cells that no training film has (held_out), and at the other cells of
    the same pathologies (seen); {} without such cells. truth, places [N,n,m]; in_train bool [n,m];
    existence [N,m]. auroc: of existence, against films without the pathology."""
    present, scores = truth == 1, {}
    held_out = present.any(0) & ~in_train                                       # [n,m]
    asked = held_out.any(0)                                                     # [m]
    if not asked.any():
        return {}
    for key, cells in (("held_out", held_out), ("seen", in_train & asked)):
        only = (present & cells).any(1) & ~(present & ~cells).any(1)            # [N,m]
        labels = np.where(present.any(1), -1, 0)                                # [N,m]
        labels[only] = 1
        films = classification_scores(labels[:, asked], existence[:, asked], 0.5)
        scores[key] = {"auroc": films["auroc"], "n": int(only.sum()),
                       "place_top1": place_scores(truth, places, only)["top1"]}
    return scores
