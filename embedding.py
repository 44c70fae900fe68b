"""What do the embeddings keep apart? Beside an untrained network of the same shape (Figs. 6, 8).

    python evaluate.py --task embedding                     # the phantoms, after `python train.py`
    python evaluate.py --task embedding --dataset nih

Differs from the paper, which shows the pictures of the trained network only: whatever the untrained
one shows too, training did not make.
"""
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler

import figures
from cli import InputError
from metrics import auroc, mean_or_none
from model import MeDSLIP
from predict import array, ask, print_table, questions


def probe(x, labels, fit):
    """Mean AUROC of logistic regressions of labels [N,L] on x [N,D], fitted where fit [N] is true
    and scored elsewhere; without labels that have fewer than 5 of a kind on either side."""
    x, scores = StandardScaler().fit(x[fit]).transform(x), []                   # [N,D]
    for label in labels.T:
        a, b = fit & (label >= 0), ~fit & (label >= 0)                          # bool [N]
        if min((label[side] == value).sum() for side in (a, b) for value in (0, 1)) >= 5:
            model = LogisticRegression(C=0.1, max_iter=1000).fit(x[a], label[a])
            scores.append(auroc(label[b], model.decision_function(x[b])))
    return mean_or_none(scores)


def embed(args, model, table, rows, texts):
    """({stream: mean token [N,D]}, queried pathology embeddings [N,m,D])."""
    streams, queried = {"pathology": [], "anatomy": []}, []
    for _, out in ask(args, model, table.images, rows, texts):
        queried.append(array(out.pathology_queried))                            # [B,m,D]
        streams["pathology"].append(array(out.pathology_tokens.mean(1)))        # [B,D]
        if out.anatomy_tokens is not None:  # None: a single-stream model
            streams["anatomy"].append(array(out.anatomy_tokens.mean(1)))
    streams = {name: np.concatenate(x) for name, x in streams.items() if x}
    return streams, np.concatenate(queried)


def embedding(args, model, table, rows):
    """Probes, silhouettes and pictures of the trained and of an untrained network; as every task
    (args, model, table, rows) -> (metrics, arrays, a function that draws the figure)."""
    labels = dict(zip(table.label_names, table.label_pathologies))
    if len(rows) < 20 or not labels:
        raise InputError(f"{table.dataset}: {len(rows)} images of {args.split} with {len(labels)} "
                         "labels are too few to embed; try another --split or data set")
    rng = np.random.default_rng(args.seed)
    rows = np.sort(rng.permutation(rows)[:1000])  # t-SNE of more takes minutes
    texts, columns, _ = questions(args, model, labels)
    targets = {"pathology": table.labels[rows]}                                 # [N,L]
    if table.has_reports:
        names = [model.queries[kind]["names"] for kind in ("pathology", "anatomy")]
        pairs = table.truth(rows, *names)                                       # [N,n,m]
        if pairs is None:  # not drawn by us
            pairs = table.existence(rows, *names)
        targets["place"] = (pairs == 1).any(2).astype(int)                      # [N,n]
    fit = np.unique(np.array(table.patients)[rows], return_inverse=True)[1] % 2 == 0  # bool [N]
    torch.manual_seed(args.seed)
    untrained, scores, clouds = MeDSLIP(model.config).to(args.device).eval(), {}, {}
    some = rng.permutation(len(rows) * len(labels))[:2500]                      # of N*L points
    for title, network in (("trained", model), ("untrained", untrained)):
        streams, queried = embed(args, network, table, rows, texts)
        queried = queried[:, list(columns.values())].reshape(-1, queried.shape[2])  # [N*L,D]
        scores[title] = {f"{target} from {stream} tokens": probe(x, values, fit)
                         for stream, x in streams.items() for target, values in targets.items()}
        for kind, points, group, names in (
                ("queried embeddings", queried[some], some % len(labels), list(columns)),
                ("mean tokens", np.concatenate(list(streams.values())),
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
