"""Every picture that the scripts draw, each into the PNG file that it is given.

    python evaluate.py --task grounding      # draws out/eval/synthetic_grounding.png
    python walk.py                           # draws out/walk.png

Colours mean the same everywhere: cyan is the truth, yellow what is predicted, red to yellow heat
where the model looks. Examples are always the first ones of a split, never the best.
"""
import math

import matplotlib
import numpy as np
from sklearn.metrics import roc_curve

matplotlib.use("Agg")  # draws into files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402

BLUE, GRAY = "#2b6cb0", "#b8c2cc"
COLOURS = matplotlib.colormaps["tab20"]


def canvas(rows, columns, width, height):
    """(figure, axes [rows,columns]); width and height in inches."""
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False,
                        constrained_layout=True)


def gallery(count, columns=4):
    """(figure, axes [rows,columns]) for `count` films, without frames and ticks."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, axes = canvas(rows, columns, 3 * columns, 3.4 * rows)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def finish(figure, path):
    figure.savefig(path, dpi=130, format="png")  # the name of a draft does not end in .png
    plt.close(figure)


def show_film(axis, film, shape, title):
    """A film drawn to the pixels of a map or mask of `shape`."""
    height, width = shape
    axis.imshow(film, cmap="gray", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axis.set_title(title, fontsize=9)


def show_heat(axis, heat):
    """heat [H,W] in 0..1 over a film; where it is 0 the film shows."""
    axis.imshow(heat, cmap="autumn", alpha=0.6 * np.clip(heat, 0, 1), vmin=0, vmax=1)


def outline(axis, values, level, colour, shape):
    """The line where values [h,w] cross a level, over a picture of `shape` pixels."""
    if values.min() < level < values.max():  # else there is no such line
        axis.contour(values, [level], colors=colour, linewidths=1.2,
                     extent=(0, shape[1] - 1, 0, shape[0] - 1))


# -------------------------------------------------------------------------------------- evaluate.py

def draw_classes(path, per_class, names, labels, scores):
    """How far each AUROC is from chance, with its interval (Fig. 4), and the ROC curves.

    per_class {name: {"auroc", "auroc_ci95", "n_pos"}}; names [L], labels and scores [N,L].
    """
    shown = sorted((c["auroc"], name) for name, c in per_class.items() if c["auroc"] is not None)
    figure, axes = canvas(1, 2, 12, max(4.5, 0.24 * len(shown) + 1))
    bars, curves = axes[0]
    for k, (auroc, name) in enumerate(shown):
        bars.barh(k, auroc - 0.5, left=0.5, color=BLUE)
        interval = np.array(per_class[name]["auroc_ci95"], float)  # None, where unknown: no line
        bars.plot(interval, (k, k), color="black", marker="|")
        column = list(names).index(name)
        known = labels[:, column] >= 0
        x, y, _ = roc_curve(labels[known, column], scores[known, column])
        curves.plot(x, y, linewidth=1, label=name, color=COLOURS(k % 20))
    bars.set_yticks(range(len(shown)), [f"{name} ({per_class[name]['n_pos']})  {auroc:.3f}"
                                        for auroc, name in shown])
    bars.set(xlim=(None, 1.01), ylim=(-1, len(shown)),
             xlabel="AUROC and 95 % interval (number of positives)")
    curves.plot([0, 1], [0, 1], color=GRAY, linewidth=1)
    curves.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    if 0 < len(shown) <= 20:
        curves.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    finish(figure, path)


def draw_grounding(path, examples, threshold, title):
    """Film, mask, map, predicted region and highest point of each example (Fig. 7).

    examples: list of (film [S,S], mask bool [H,W], heat [H,W] with maximum 1, title).
    """
    figure, axes = gallery(len(examples))
    for axis, (film, mask, heat, name) in zip(axes.flat, examples):
        show_film(axis, film, mask.shape, name)
        show_heat(axis, heat)
        outline(axis, heat, threshold, "yellow", mask.shape)
        outline(axis, mask, 0.5, "cyan", mask.shape)
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        axis.plot(x, y, "x", color="lime" if mask[y, x] else "red", markersize=8)
    figure.suptitle(f"{title}; cyan: truth; yellow: above {threshold:.2f} of the maximum; "
                    "x: maximum, green if it hits", fontsize=9)
    finish(figure, path)


def draw_relation(path, truth, predicted, pathologies, anatomies, most=30):
    """How often each pair [n,m] is true and predicted, for the `most` commonest rows, columns."""
    rows = np.sort(np.argsort(-truth.max(1))[:most])
    columns = np.sort(np.argsort(-truth.max(0))[:most])
    if truth.any():  # else all are shown
        rows, columns = rows[truth[rows].any(1)], columns[truth[:, columns].any(0)]
    figure, axes = canvas(1, 2, 4 + 0.45 * len(columns), 2.5 + 0.22 * len(rows))
    pictures = ((truth, "true: share of films"), (predicted, "predicted: mean probability"))
    for axis, (matrix, title) in zip(axes[0], pictures):
        picture = axis.imshow(matrix[rows][:, columns], vmin=0, vmax=truth.max() or 1,
                              aspect="auto")
        axis.set_xticks(range(len(columns)), [pathologies[j] for j in columns], rotation=90,
                        fontsize=8)
        axis.set_yticks(range(len(rows)), [anatomies[i] for i in rows], fontsize=8)
        axis.set_title(title, fontsize=9)
    figure.colorbar(picture, ax=axes[0].tolist(), shrink=0.8)
    finish(figure, path)


def draw_embedding(path, clouds):
    """Pictures side by side, two a row (Figs. 6 and 8); clouds {title: (points [k,2], group [k],
    names of the groups)}."""
    rows = math.ceil(len(clouds) / 2)
    figure, axes = canvas(rows, 2, 12, 4.2 * rows)
    for axis, (title, (points, group, names)) in zip(axes.flat, clouds.items()):
        for k, name in enumerate(names):
            x, y = points[group == k].T
            axis.scatter(x, y, color=COLOURS(k % 20), s=8, linewidths=0, label=name)
        axis.legend(fontsize=7, frameon=False, loc="center right", bbox_to_anchor=(0, 0.5))
        axis.set(xticks=[], yticks=[], title=title)
    finish(figure, path)


def draw_prediction(path, film, heats):
    """One film [H,W] and where each question looks: heats list of (question, probability, heat)."""
    figure, axes = gallery(1 + len(heats), columns=5)
    show_film(axes[0, 0], film, film.shape, "as it is")
    for axis, (question, probability, heat) in zip(axes.flat[1:], heats):
        show_film(axis, film, heat.shape, f"{question[:28]}: {probability:.2f}")
        show_heat(axis, heat)
    figure.suptitle("where each question looks, and its probability; no medical device", fontsize=9)
    finish(figure, path)


# -------------------------------------------------------------------------------------- finetune.py

def draw_masks(path, examples, title):
    """examples: list of (film [S,S], mask bool [H,W], probability [h,w], title)."""
    figure, axes = gallery(len(examples))
    for axis, (film, mask, probability, name) in zip(axes.flat, examples):
        show_film(axis, film, mask.shape, name)
        outline(axis, mask, 0.5, "cyan", mask.shape)
        outline(axis, probability, 0.5, "yellow", mask.shape)
    figure.suptitle(f"{title}; cyan: truth; yellow: predicted", fontsize=9)
    finish(figure, path)


def draw_curves(path, curves, measure):
    """Loss and validation measure by epoch; curves: one list per seed of dicts with the keys
    epoch, loss, validation (None: not measured in that epoch)."""
    figure, axes = canvas(1, 2, 9, 3.4)
    for axis, key, name in zip(axes[0], ("loss", "validation"), ("loss", f"validation {measure}")):
        for curve in curves:
            epochs = [point["epoch"] for point in curve]
            axis.plot(epochs, np.array([point[key] for point in curve], float))
        axis.set(xlabel="epoch", ylabel=name)
    finish(figure, path)
