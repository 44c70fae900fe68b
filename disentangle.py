"""Do two streams keep apart what a film shows and where? Measures, and the task that prints them.

    python evaluate.py --task embedding             # prints all, draws some
    python -m pytest tests/test_disentangle.py      # each of them on cases that a pencil can check

The paper shows three pictures (Figs. 5, 6, 8). Here is what a picture cannot show: probes, CKA,
the swap test and counterfactual films. N films, L labels, n anatomies, m pathologies, P pairs.
"""
import copy

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score

import figures
from checkpoint import ask, has_icl, questions
from cli import InputError, print_table
from formats.chest import LUNG_ZONES, PATCHES, draw_film
from formats.chest import stream as random_numbers
from metrics import classification_scores, mean_or_none
from model import MeDSLIP


def stages_of(out):
    """{stage: [B,D], or [B,q,D] of the queries} of a model's output; features and tokens are means
    over the cells. A single stream has no stages of anatomy."""
    stages = {}
    for name in ("raw_features", "pathology_features", "anatomy_features", "pathology_tokens",
                 "anatomy_tokens", "pathology_queried", "anatomy_queried", "pathology_logits"):
        x = getattr(out, name)
        if x is not None:
            stages[name] = x.mean(1) if name.endswith(("features", "tokens")) else x
    return stages


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


def cka(x, y):
    """Linear CKA of x [N,D] and y [N,E] (Kornblith et al. 2019): 1 if one is the other but for a
    rotation and a scale, near 0 if no direction of one follows from the other. Few films give
    more than 0 by chance: compare with the films of y permuted."""
    x, y = x - x.mean(0), y - y.mean(0)
    shared = np.linalg.norm(x.T @ y) ** 2
    return float(shared / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def mask_values(raw, masked):
    """Mean and deviation of the mask M, and the share of it near 0.5, from I^raw and I^p =
    M * I^raw. Where I^raw is 0 a mask changes nothing and is left out."""
    mask = masked[np.abs(raw) > 1e-6] / raw[np.abs(raw) > 1e-6]
    return {"mean": float(mask.mean()), "deviation": float(mask.std()),
            "near half": float((np.abs(mask - 0.5) < 0.1).mean())}


def swap_pairs(truth, seed, most=2000):
    """Pairs of films A, B with one finding each, which differ in pathology and in place. The mixed
    findings (pathology of A at the place of B and the reverse) must occur in truth [N,n,m] too, as
    a model is right to refuse what never occurs. -> films, pathologies, places, each [P,2]."""
    present = truth == 1
    films = np.flatnonzero(present.sum((1, 2)) == 1)                            # [F]
    _, places, kinds = np.nonzero(present[films])                               # [F] each
    occurs = present.any(0)                                                     # [n,m]
    a, b = np.indices((len(films), len(films))).reshape(2, -1)                  # [F*F] each
    differ = (kinds[a] != kinds[b]) & (places[a] != places[b])
    possible = occurs[places[a], kinds[b]] & occurs[places[b], kinds[a]]
    pairs = np.stack([a, b], axis=1)[differ & possible]                         # [P,2]
    pairs = np.random.default_rng(seed).permutation(pairs)[:most]
    return films[pairs], kinds[pairs], places[pairs]


def swap_shares(relate, stages, truth, seed, device="cpu"):
    """Swap test: which of four cells is the likeliest by the pathology embeddings of film A [N,m,D]
    and the anatomy embeddings of film B [N,n,D], beside both embeddings of A? "A,B": pathology of
    A at the place of B, as the claim has it. relate: of a MeDSLIP on `device`."""
    films, kinds, places = swap_pairs(truth, seed)                              # [P,2] each
    pathology = torch.from_numpy(stages["pathology_queried"][films[:, :1], kinds]).to(device)
    shares = {}
    for name, other in (("both of A", films[:, :1]), ("A and B", films[:, 1:])):
        anatomy = torch.from_numpy(stages["anatomy_queried"][other, places]).to(device)  # [P,2,D]
        four = relate(pathology, anatomy).flatten(1)  # of (place, pathology) [P,4]
        best = four.argmax(1).cpu().numpy()
        shares[name] = {cell: mean_or_none(best == k)
                        for k, cell in enumerate(("A,A", "B,A", "A,B", "B,B"))}
        shares[name]["n"] = len(best)
    return shares


def counterfactual_films(size, count=100):
    """uint8 [3*count,size,size]: a film of the easy world with one lesion, the same film with
    another lesion at its place, the same film with the lesion elsewhere; the next film."""
    films = []
    for seed in range(count):
        rng = random_numbers("counterfactual", seed)
        what, other = rng.sample([*PATCHES, "nodule"], 2)
        where, elsewhere = rng.sample(LUNG_ZONES, 2)
        for finding in ((what, where), (other, where), (what, elsewhere)):
            films.append(draw_film(seed, [finding], size)[0])
    return np.stack(films)


def moved(x):
    """How far embeddings move if one thing in a film changes. x [3N,...]: of each film, of the same
    film with another pathology at its place (what), of the same with its finding elsewhere (where).
    In units of the distance between two films (root mean square)."""
    film, what, where = x.reshape(len(x) // 3, 3, -1).swapaxes(0, 1)            # [N,D] each
    unit = np.sqrt(2 * film.var(0).sum())
    what = float(np.linalg.norm(what - film, axis=1).mean() / unit)
    where = float(np.linalg.norm(where - film, axis=1).mean() / unit)
    return {"what": what, "where": where, "what / where": what / where if where else None}


def embedding(args, model, table, rows):
    """The task of evaluate.py: all measures of a model, of the same network untrained, and of the
    model with M = 0.5. Returns metrics, arrays of each film, a function that draws a file."""
    names = dict(zip(table.label_names, table.label_pathologies))
    if len(rows) < 20 or len(names) < 2:
        raise InputError(f"{args.dataset} has too few labels or images; two labels, 20 images")
    rows = np.random.default_rng(args.seed).permutation(rows)[:1000]  # t-SNE of more takes minutes
    labels, patients = table.labels[rows], table.patients[rows]       # [N,L], [N]
    texts, columns, _ = questions(model, names, args.prompt, args.text_encoder)
    asked = [columns[name] for name in names]                                   # [L]
    targets, pairs = {"pathology": labels}, None
    if table.has_report.any():
        queries = [model.queries[kind]["names"] for kind in ("pathology", "anatomy")]
        pairs, _ = table.pairs(rows, *queries)                                  # [N,n,m]
        targets["place"] = (pairs == 1).any(2).astype(int)                      # [N,n]
    torch.manual_seed(args.seed)  # of the untrained weights
    untrained = MeDSLIP(model.config).requires_grad_(False).to(args.device).eval()
    untrained.fit_to_data(torch.cat(texts), 0.1, 0.1)  # as a training begins
    networks = {"trained": model, "untrained": untrained}
    if hasattr(model, "mask"):  # and each stream given half of I^raw: what is apart without a mask
        networks["M = 0.5"] = copy.deepcopy(model)
        networks["M = 0.5"].disentangle = lambda x: (x / 2, x / 2)
    result, stages = {"n": len(rows)}, {}
    for title, network in networks.items():
        stages[title] = said = ask(args, network, table.images, rows, texts, stages_of)
        # the mean over queries is as wide as a token: both probes see D numbers, of features C
        means = {name: x.mean(1) if x.ndim == 3 else x for name, x in said.items()}
        auroc = classification_scores(labels, means.pop("pathology_logits")[:, asked], 0)["auroc"]
        tests = {"existence": {"pathology": {"auroc": auroc}},
                 "probes": {name: {what: probe(x, y, patients) for what, y in targets.items()}
                            for name, x in means.items()}}
        if model.config.streams == "dual":
            tests["cka"], rng = {}, np.random.default_rng(args.seed)
            for level in ("features", "tokens", "queried"):
                x, y = means[f"pathology_{level}"], means[f"anatomy_{level}"]   # [N,D] each
                tests["cka"][level] = {"cka": cka(x, y), "permuted": cka(x, rng.permutation(y))}
        if has_icl(model) and pairs is not None:
            tests["swap"] = swap_shares(network.relate, said, pairs, args.seed, args.device)
        if hasattr(model, "mask"):
            cells = ask(args, network, table.images, rows[:100], texts, lambda out: {
                "raw": out.raw_features, "masked": out.pathology_features})     # [100,h*w,C] each
            tests["mask"] = {"M": mask_values(**cells)}
        if args.dataset == "synthetic":
            films = counterfactual_films(table.size)
            drawn = ask(args, network, films, np.arange(len(films)), texts, stages_of)
            tests["counterfactual"] = {name: moved(x) for name, x in drawn.items()}
        result[title] = tests
    for test, lines in result["trained"].items():
        for title in networks:
            print_table(f"{test}, {title}", result[title][test], next(iter(lines.values())))
    arrays = {name: x for name, x in stages["trained"].items() if x.ndim == 2}  # [N,D]
    arrays["ids"] = table.ids[rows]
    return result, arrays, lambda path: figures.draw_embedding(path, stages, asked, list(names),
                                                               labels, result)
