"""Every picture that the scripts draw, each into the PNG file that it is given.

    python evaluate.py --task grounding      # draws out/eval/synthetic_grounding.png
    python walk.py                           # draws out/walk.png

In all pictures of answers cyan is the truth, yellow what is predicted, red to yellow heat where the
model looks. Examples are always the first ones of a split, never the best.
"""
import math

import matplotlib.pyplot as plt
import numpy as np
from sklearn.manifold import TSNE

plt.switch_backend("Agg")  # draws into files, also where there is no screen
plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 130,
                     "axes.titlesize": 9, "figure.titlesize": 9, "legend.fontsize": 8,
                     "legend.frameon": False, "xtick.labelsize": 8, "ytick.labelsize": 8})
BLUE, GRAY = "#2b6cb0", "#b8c2cc"
COLOURS = plt.get_cmap("tab20")


def finish(figure, path):
    figure.savefig(path, format="png")  # the name of a draft does not end in .png
    plt.close(figure)


def outline(axis, region, colour):
    """The edge of a region [h,w] > 0.5 over a film."""
    h, w = region.shape
    if region.min() < 0.5 < region.max():  # else there is no edge
        axis.contour(region, [0.5], colors=[colour], linewidths=1.2,
                     extent=(0.5 / w, 1 - 0.5 / w, 0.5 / h, 1 - 0.5 / h))


def show_film(axis, film, title, heat=None, mask=None, region=None):
    """film [H,W] with what is given of: heat [h,w] >= 0 and its maximum; mask bool [h,w]; region
    [h,w] > 0.5. The unit square holds all, as their grids differ."""
    frame = {"extent": (0, 1, 1, 0), "aspect": film.shape[0] / film.shape[1]}
    axis.imshow(film, cmap="gray", **frame)
    axis.set_title(title)
    axis.axis("off")
    if heat is not None:
        heat = heat / max(heat.max(), 1e-12)  # where it is 0 the film shows
        axis.imshow(heat, cmap="autumn", alpha=0.6 * heat, vmin=0, vmax=1, **frame)
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        axis.plot((x + 0.5) / heat.shape[1], (y + 0.5) / heat.shape[0], "x", color="lime")
    if region is not None:
        outline(axis, region, "yellow")
    if mask is not None:
        outline(axis, mask, "cyan")


def gallery(path, films, title):
    """Films, five a row; films: list of dicts of what `show_film` takes."""
    rows, columns = math.ceil(len(films) / 5), min(5, len(films))
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.4 * rows), squeeze=False)
    for axis, film in zip(axes.flat, films):
        show_film(axis, **film)
    plt.setp(axes.flat[len(films):], visible=False)
    figure.suptitle(title)
    finish(figure, path)


def show_matrix(axis, title, matrix, rows, columns, pathologies, anatomies, **style):
    """Some rows and columns of matrix [n,m] with their names; style as imshow takes it."""
    axis.set_title(title)
    axis.set_xticks(range(len(columns)), [pathologies[j] for j in columns], rotation=90)
    axis.set_yticks(range(len(rows)), [anatomies[i] for i in rows])
    return axis.imshow(matrix[rows][:, columns], aspect="auto", vmin=0, **style)


def draw_walk(path, film, findings, y, pathologies, anatomies):
    """A film [S,S], its findings (phantom.Finding), and the rows and columns of y [n,m] (1, 0, -1
    not mentioned) that its report mentions."""
    rows, columns = np.flatnonzero((y >= 0).any(1)), np.flatnonzero((y >= 0).any(0))
    figure, [plain, outlined, matrix] = plt.subplots(1, 3, figsize=(10 + 0.3 * len(columns), 4.5))
    show_film(plain, film, "film")
    show_film(outlined, film, "findings")
    for k, finding in enumerate(findings):
        outline(outlined, finding.mask, COLOURS(k))
        left, top = np.array(finding.box[:2]) / len(film)
        outlined.text(left, top, finding.pathology, color=COLOURS(k), fontsize=8)
    show_matrix(matrix, "report: red present (1), blue denied (0)", np.ma.masked_less(y, 0), rows,
                columns, pathologies, anatomies, vmax=1, cmap="coolwarm")  # masked cells are white
    finish(figure, path)


def draw_classes(path, per_class):
    """The AUROC of each class with its interval (Fig. 4)."""
    shown = sorted((c["auroc"], name) for name, c in per_class.items() if c["auroc"] is not None)
    figure, bars = plt.subplots(figsize=(7, max(4.5, 0.24 * len(shown) + 1)))
    for k, (auroc, name) in enumerate(shown):
        bars.barh(k, auroc - 0.5, left=0.5, color=BLUE)
        interval = np.array(per_class[name]["auroc_ci95"], float)  # None, where unknown: no line
        bars.plot(interval, (k, k), color="black", marker="|")
    ticks = [f"{name} ({per_class[name]['n_pos']})  {auroc:.3f}" for auroc, name in shown]
    bars.set_yticks(range(len(shown)), ticks)
    bars.set(xlim=(None, 1.01), ylim=(-1, len(shown)), xlabel="AUROC, 95 % interval (positives)")
    finish(figure, path)


def draw_relation(path, truth, predicted, pathologies, anatomies):
    """How often each pair [n,m] is true and predicted, for what occurs."""
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    size = 4 + 0.45 * len(columns), 2.5 + 0.22 * len(rows)  # in inches
    figure, axes = plt.subplots(1, 2, figsize=size)
    titles, most = ("true: share of films", "predicted: mean probability"), truth.max() or 1
    for axis, title, matrix in zip(axes, titles, (truth, predicted)):
        picture = show_matrix(axis, title, matrix, rows, columns, pathologies, anatomies, vmax=most)
    figure.colorbar(picture, ax=axes, shrink=0.8)
    finish(figure, path)


def flatten(points):
    """t-SNE: [k,D] -> [k,2]."""
    return TSNE(perplexity=min(30, len(points) / 4), random_state=0).fit_transform(points)


def show_cloud(axis, points, group, names, title):
    """Points [k,2] in the colours of their groups [k]; gray, below them, what is in none (-1)."""
    axis.scatter(*points[group < 0].T, color=GRAY, s=6, linewidths=0)
    for k, name in enumerate(names):
        axis.scatter(*points[group == k].T, color=COLOURS(k % 20), s=6, linewidths=0, label=name)
    axis.set(xticks=[], yticks=[], title=title)


def show_shares(axis, shares, keys, low, title):
    """A dot, from `low` on, for each key in each row of shares {row: {key: a share or None}}."""
    for k, key in enumerate(keys):
        dots = np.array([row[key] for row in shares.values()], float)  # None: no dot
        axis.plot(dots, list(shares), "o", color=COLOURS(k), label=key)
    # the first row at the top
    axis.set(xlim=(low - 0.02, 1.02), ylim=(len(shares) - 0.5, -0.5), title=title)
    axis.grid(axis="y")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def draw_embedding(path, stages, asked, names, labels, result):
    """t-SNE as in Figs. 6, 5 and 8, probes and swap test, trained above untrained. stages:
    {network: what disentangle.stages_of gives}; asked [L]: the queries of labels [N,L]; result: as
    it is written."""
    figure, axes = plt.subplots(2, 5, figsize=(27, 9))
    for row, title in zip(axes, ("trained", "untrained")):
        said = stages[title]
        queried = said["pathology_queried"][:, asked]                           # [N,L,D]
        points = flatten(queried.reshape(-1, queried.shape[2])[:2000])  # more would take minutes
        query = np.arange(len(points)) % len(asked)  # in the order of the points: film by film
        present = labels.ravel()[:len(points)] == 1
        show_cloud(row[0], points, query, names, f"Fig. 6, {title}: by query")
        show_cloud(row[1], points, np.where(present, query, -1), names,
                   f"Fig. 5, {title}: gray if the film does not show it")
        if "anatomy_features" in said:
            both = np.stack([said["pathology_features"][:500], said["anatomy_features"][:500]])
            stream = np.repeat([0, 1], both.shape[1])
            show_cloud(row[2], flatten(both.reshape(-1, both.shape[2])), stream, ("I^p", "I^a"),
                       f"Fig. 8, {title}: features by stream")
            row[2].legend()
        probes, swap = result[title]["probes"], result[title].get("swap")
        show_shares(row[3], probes, list(probes["raw_features"]), 0.5, f"{title}, probes: AUROC")
        if swap:
            show_shares(row[4], swap, ("A,A", "B,A", "A,B", "B,B"), 0,
                        f"swap test, {title}: film of the pathology, of the place")
    axes[0, 0].legend(loc="center right", bbox_to_anchor=(0, 0.5))
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
    finish(figure, path)
