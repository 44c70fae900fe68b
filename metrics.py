"""Scores as functions of arrays: is it there, where is it, which pair. Nothing here knows a model.

    from metrics import classification_scores, grounding_scores, relation_scores
    python -m pytest tests/test_metrics.py    # each of them on cases that a pencil can check

Labels are 1 present, 0 absent, -1 unknown and left out. N images, L labels, K thresholds.
Differs from the released code: a map is divided by its own maximum, there by that of its batch.
`released_scores` and `released_regions` follow the released rules.
"""
import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
from sklearn.model_selection import GroupKFold, cross_val_score


def mean_or_none(values):  # None: nothing counts for this score
    return float(np.mean(values)) if len(values) else None


def auroc(labels, scores):
    """AUROC of [N] from the ranks of the positives (Mann and Whitney); nan without both kinds.
    roc_auc_score gives the same in 3 to 14 times the time, and a bootstrap asks 10,000 times."""
    labels, scores = labels[labels >= 0], scores[labels >= 0]
    n_pos, n_neg = int((labels == 1).sum()), int((labels == 0).sum())
    rank_sum = rankdata(scores)[labels == 1].sum() - n_pos * (n_pos + 1) / 2
    return float(rank_sum / (n_pos * n_neg)) if n_pos and n_neg else np.nan


def classification_scores(labels, scores, threshold=None, names=None):
    """AUROC, average precision, and F1 and accuracy of `scores >= threshold` (one number, or one
    per label; None: the one of highest F1 on these very labels) of [N], or `per_class` of [N,L]
    with the means over the classes that some images show and some do not."""
    labels, scores = np.asarray(labels), np.asarray(scores, float)
    if labels.ndim == 2:
        names = range(labels.shape[1]) if names is None else names
        each = np.broadcast_to(threshold, len(names))
        per_class = {str(name): classification_scores(labels[:, k], scores[:, k], each[k])
                     for k, name in enumerate(names)}
        result = {"threshold": {name: c["threshold"] for name, c in per_class.items()},
                  "n": len(labels), "per_class": per_class}
        for key in ("auroc", "ap", "f1", "acc"):
            result[key] = mean_or_none([c[key] for c in per_class.values() if c[key] is not None])
        return result
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
        values.append(np.array(metric(labels[rows], scores[rows]), float))
    for column in np.reshape(values, (n, -1)).T:
        known = column[~np.isnan(column)]
        intervals.append(tuple(np.percentile(known, [2.5, 97.5])) if len(known) else (None, None))
    return intervals if values[0].ndim else intervals[0]


def released_scores(labels, scores):
    """Means over the classes of [N,L] as the released scripts compute them; "how" says how."""
    best, accuracies = classification_scores(labels, scores), []
    for column, score, one in zip(labels.T, scores.T, best["per_class"].values()):
        if one["threshold"] is not None:
            found, known = score > one["threshold"], column >= 0
            accuracies.append((found == column)[known].mean())
    return {"how": "mean of all labels, F1 at each one's best threshold on these very images, "
                   "ACC of what lies above that threshold, not at it",
            "auroc": best["auroc"], "f1": best["f1"], "acc": mean_or_none(accuracies)}


def best_thresholds(labels, scores):
    """[L]: of highest F1 on [N,L]; 0.5 for a class that no image shows, or every one."""
    best = classification_scores(labels, scores)["threshold"].values()
    return np.array([0.5 if threshold is None else threshold for threshold in best])


def auroc_healthy(labels, scores, names):
    """{label: AUROC of its images against healthy ones only (Fig. 4)}, of [N,L]; {} if there are
    none. Healthy: every label 0, but the label that says so 1. With labels of one disease nobody
    can tell, since its negatives may have another one."""
    says_so = np.isin(names, ("No Finding", "normal"))                          # [L]
    healthy = (labels[:, ~says_so] == 0).all(1) & (labels[:, says_so] == 1).all(1)
    if says_so.sum() > len(names) - 2 or not healthy.any():
        return {}
    result = {}
    for name, column, score in zip(names, labels.T, scores.T):
        against = np.where(column == 1, 1, np.where(healthy, 0, -1))            # [N]
        value = auroc(against, score)
        result[str(name)] = None if np.isnan(value) else value
    return result


def scores_with_intervals(labels, scores, thresholds, names, n=1000, seed=0, groups=None):
    """`classification_scores` of [N,L] with `auroc_ci95` of each class and of the mean; under
    `customary` the same at the thresholds that are best on these very labels."""
    def aurocs(labels, scores):  # of each class, and last their mean
        each = np.array([auroc(*pair) for pair in zip(labels.T, scores.T)])
        return [*each, mean_or_none(each[~np.isnan(each)])]
    result = classification_scores(labels, scores, thresholds, names)
    intervals = bootstrap_ci(aurocs, labels, scores, n, seed, groups)           # [L+1]
    for block, interval in zip([*result["per_class"].values(), result], intervals):
        block["auroc_ci95"] = interval
    return {**result, "customary": classification_scores(labels, scores, None, names)}


def scores_of_parts(labels, scores, thresholds, names, new, n=1000, seed=0, groups=None):
    """{part: `scores_with_intervals`} of the classes that the model was trained on, and of those
    that are new to it; new bool [L]."""
    parts = {}
    for title, part in (("trained on", ~new), ("not trained on", new)):
        if part.any():
            parts[title] = scores_with_intervals(labels[:, part], scores[:, part], thresholds[part],
                                                 names[part], n, seed, groups)
    return parts


POINTING = ("pointing_game", "pointing_within_cell", "pointing_released")
SCORES = (*POINTING, "iou", "dice")
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


def dice_scores(heat, mask, thresholds):
    """[K]: the Dice of mask [H,W], which is not empty, with the region heat / its maximum > t."""
    regions = [heat / max(heat.max(), 1e-12) > threshold for threshold in thresholds]
    return np.array([2 * (region & mask).sum() / (region.sum() + mask.sum()) for region in regions])


def best_dice_threshold(heats, masks):
    """The share of a map's maximum that has the best mean Dice over heats and masks [H,W]."""
    dice = [dice_scores(heat, mask, THRESHOLDS) for heat, mask in zip(heats, masks)]
    return float(THRESHOLDS[np.mean(dice, axis=0).argmax()])


def dice_of(regions, masks):
    """[N]: Dice of regions and masks, bool [N,H,W]; 1 where both are empty."""
    total = regions.sum((1, 2)) + masks.sum((1, 2))
    return 1 - (regions ^ masks).sum((1, 2)) / np.maximum(total, 1)


def mask_scores(regions, masks, fixed, groups, n=1000):
    """Scores of predicted regions against masks, bool [N,H,W]: means over the images with a mask,
    and over all. trivial: one region [H,W] for every image, and none at all."""
    dice, filled = dice_of(regions, masks), masks.any((1, 2))                   # [N]
    iou, false_positive = dice / (2 - dice), regions.any((1, 2)) & ~filled
    fixed_dice = dice_of(np.broadcast_to(fixed, masks.shape), masks)
    interval = [bootstrap_ci(lambda d, _: d.mean(), dice[rows], dice[rows], n, 0, groups[rows])
                for rows in (filled, np.ones_like(filled))]
    return {"n": int(filled.sum()), "threshold": 0.5, "dice": dice[filled].mean(),
            "dice_ci95": interval[0], "iou": iou[filled].mean(),
            "n_all": len(filled), "dice_all": dice.mean(), "dice_all_ci95": interval[1],
            "iou_all": iou.mean(), "false_alarms": false_positive.sum() / max(1, (~filled).sum()),
            "trivial": {"fixed_dice": fixed_dice[filled].mean(),
                        "empty_dice_all": (~filled).mean()}}


def hit_regions(mask, h, w):
    """{rule: bool [H,W]}: where a point is a hit on mask [H,W], of a map with h x w cells: in the
    mask; at most one cell from it; in a cell whose block has any pixel of the mask."""
    distance = distance_transform_edt(~mask, (h / mask.shape[0], w / mask.shape[1]))  # in cells
    number = nearest(np.arange(h * w).reshape(h, w), *mask.shape)  # the cell of each pixel
    return dict(zip(POINTING, (mask, distance <= 1, np.isin(number, number[mask]))))


def points_at(heat, regions):
    """{rule: 1 if the maximum of heat [H,W] is a hit}; equal maxima share the point."""
    return {rule: float(region[heat == heat.max()].mean()) for rule, region in regions.items()}


def map_scores(cells, heat, mask, threshold):
    """Pointing by three rules, IoU and Dice of a map: its cells [h,w], and on the grid of its mask
    [H,W] as `upsample_map` gives it."""
    regions = hit_regions(mask, *cells.shape)
    dice = float(dice_scores(heat, mask, [threshold])[0])
    # as released, the whole block of the highest cell points
    blocks = points_at(nearest(cells, *mask.shape), regions)
    return {**points_at(heat, regions), "pointing_released": blocks["pointing_released"],
            "iou": dice / (2 - dice), "dice": dice}


def grounding_scores(attention, masks, threshold, size=None, centres=(0.0, None)):
    """`map_scores` at `threshold` of each map's maximum: means over maps [h,w] and their masks
    [H,W], without the empty masks. The rest: `upsample_map`."""
    each = []
    for cells, mask in zip(attention, masks):
        cells, mask = np.asarray(cells, float), np.asarray(mask) > 0
        if mask.any():
            heat = upsample_map(cells, *mask.shape, size, centres)
            each.append(map_scores(cells, heat, mask, threshold))
    means = {key: mean_or_none([scores[key] for scores in each]) for key in SCORES}
    return {**means, "threshold": threshold, "n": len(each)}


def compare(found, fixed, threshold):
    """Of each finding {answer: {score: ...}}, also of trivial answers. found: what has .label and
    .film, .mask, .heat [S,S], .cells [h,w]; fixed: {label: (mean mask of other films [S,S], the
    level of its best Dice)}. A label that is not in `fixed` is answered by the whole film."""
    each = []
    for f in found:
        everywhere = np.ones(f.mask.shape, bool)
        mean, level = fixed.get(f.label, (everywhere, 0))
        regions = hit_regions(f.mask, *f.cells.shape)
        each.append({"model": map_scores(f.cells, f.heat, f.mask, threshold),
                     "random_point": points_at(everywhere, regions),
                     "brightest_point": points_at(f.film, regions),
                     "fixed_point": points_at(mean, regions),
                     "fixed_region": {"dice": float(dice_scores(mean, f.mask, [level])[0])}})
    return each


def released_regions(found):
    """Scores of findings, as `compare` takes them, as the released scripts draw regions: a cell
    fills its block, and counts if it exceeds a fixed share of the maximum of the batch. Here that
    is the maximum of a label's scored maps, so that the batch size does not matter."""
    highest, scores = {}, {
        "how": "blocks above 0 (MeDSLIP's released threshold: a softmax is never 0, so nearly the "
        "whole film), and above 0.008 of the maximum (MedKLIP's)"}
    for f in found:
        highest[f.label] = max(f.cells.max(), highest.get(f.label, 0))
    for name, share in (("released", 0.0), ("medklip", 0.008)):
        dice = []
        for f in found:
            region = nearest(f.cells, *f.mask.shape) > share * highest[f.label]
            dice.append(dice_of(region[None], f.mask[None])[0])
        dice = np.array(dice)                                                   # [findings]
        scores |= {f"dice_{name}": dice.mean(), f"iou_{name}": (dice / (2 - dice)).mean()}
    return scores


def fixed_answers(drawn):
    """{label: (mean mask [S,S], its level of best Dice)} of [(label, mask)] of training images: an
    answer that needs no look at the image."""
    masks, answers = {}, {}
    for label, mask in drawn:
        masks.setdefault(label, []).append(mask)
    for label, some in masks.items():
        mean = np.mean(some, axis=0)
        answers[label] = mean, best_dice_threshold([mean] * len(some), some)
    return answers


def deletions(cells, mask, size, centres, rng, counts):
    """Yields which pixels of an input [size,size] go with k cells, for each k of counts: those that
    are highest in the map cells [n,n], random ones, those in or next to mask [S,S]."""
    n, (offset, stride) = len(cells), centres
    # the pixel that each cell looks at [n], and the cell that each pixel is deleted with [size]
    looks = np.clip(np.round(offset + stride * np.arange(n)), 0, size - 1).astype(int)
    cell_of = np.clip(np.round((np.arange(size) - offset) / stride), 0, n - 1).astype(int)
    away = distance_transform_edt(~nearest(mask, size, size))[looks][:, looks]  # [n,n]
    for k in counts:
        for order in (-cells, rng.random((n, n)), away):
            rank = np.argsort(np.argsort(order.ravel(), kind="stable")).reshape(n, n)
            yield rank[cell_of][:, cell_of] < k                                 # [size,size]


def means(each):
    """Means of what `compare` gives: the model's, and the others' under trivial."""
    mean = {}
    for answer, scores in each[0].items():
        values = np.mean([list(e[answer].values()) for e in each], axis=0)
        mean[answer] = dict(zip(scores, values.tolist()))
    return {**mean.pop("model"), "n": len(each), "trivial": mean}


def grounding_summary(found, each, patients, n=1000, seed=0):
    """Of what `compare` gives for found: means over all and `per_class`, the class whose map points
    worst, and intervals over patients [findings]."""
    per_class = {}
    for name in sorted({f.label for f in found}):
        per_class[name] = means([e for e, f in zip(each, found) if f.label == name])
    reach = {name: scores["pointing_within_cell"] for name, scores in per_class.items()}
    worst = min(reach, key=reach.get)
    values = np.array([list(e["model"].values()) for e in each])                # [findings,scores]
    intervals = bootstrap_ci(lambda _, v: v.mean(0), values, values, n, seed, patients)
    return {**means(each), "per_class": per_class,
            "worst": {"name": worst, "pointing_within_cell": reach[worst]},
            **{f"{key}_ci95": interval for key, interval in zip(SCORES, intervals)}}


def place_scores(truth, scores, counted=True):
    """At which of the places that occur is a finding? truth, scores [N,n,m]; counted bool [N,m].
    top1: of the findings that count, the share with a true place as their best. recall: of the k
    places of a finding at several, the share among its k highest; chance: the same at random."""
    occurs = (truth == 1).any((0, 2))                                           # [n]
    places, scores = truth[:, occurs] == 1, scores[:, occurs]
    count = places.sum(1) * counted                                             # [N,m] k
    rank = scores.shape[1] - rankdata(scores, method="ordinal", axis=1)         # 0 is the best
    found = (places & (rank < count[:, None])).sum(1)                           # [N,m]
    top1, several = (places & (rank == 0)).any(1)[count > 0], count > 1
    return {"top1": mean_or_none(top1), "recall": mean_or_none(found[several] / count[several]),
            "chance": mean_or_none(count[several] / max(occurs.sum(), 1)),
            "n_findings": len(top1), "n_several": int(several.sum())}


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


def scores_apart(truth, in_train, existence, pairs, places):
    """Scores of findings at cells that no training film has (held_out), and at the other cells of
    the same pathologies (seen); {} without such cells. in_train bool [n,m]; existence [N,m]; the
    others [N,n,m]. auroc: of existence, against films without the pathology."""
    present, scores = truth == 1, {}
    held_out = present.any(0) & ~in_train                                       # [n,m]
    asked = held_out.any(0)                                                     # [m]
    for key, cells in (("held_out", held_out), ("seen", in_train & asked)):
        if asked.any():
            only = (present & cells).any(1) & ~(present & ~cells).any(1)        # [N,m]
            labels = np.where(only, 1, np.where(present.any(1), -1, 0))         # [N,m]
            films = classification_scores(labels[:, asked], existence[:, asked], 0.5)
            pair = classification_scores(truth[:, cells].ravel(), pairs[:, cells].ravel(), 0.5)
            scores[key] = {"auroc": films["auroc"], "relation_ap": pair["ap"], "n": int(only.sum()),
                           "place_top1": place_scores(truth, places, only)["top1"]}
    return scores


def probe(x, labels, patients):
    """Mean AUROC of logistic regressions of labels [N,L] on x [N,D], fitted on each half of the
    patients in turn and scored on the other; without labels that fewer than 10 images, or fewer
    than 4 patients, show or lack. None if no label is left."""
    scores, x = [], (x - x.mean(0)) / (x.std(0) + 1e-9)
    for label in labels.T:
        known = label >= 0
        people = [len(np.unique(patients[label == value])) for value in (0, 1)]
        if np.bincount(label[known], minlength=2).min() >= 10 and min(people) >= 4:
            scores += cross_val_score(LogisticRegression(C=0.1, max_iter=1000), x[known],
                                      label[known], groups=patients[known], cv=GroupKFold(2),
                                      scoring="roc_auc").tolist()
    return mean_or_none([score for score in scores if not np.isnan(score)])
