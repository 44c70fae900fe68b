"""Proves that every number of metrics.py is scikit-learn's, or one that a pencil gives.

    python -m pytest tests/test_metrics.py
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import metrics
from model import build_backbone


def test_classification_by_pencil():
    """Scores 4 3 2 1 of labels 1 0 1 0: three of four pairs in order; best F1 0.8 at 2."""
    s = metrics.classification_scores([1, 0, 1, 0], [4, 3, 2, 1])
    assert s == {"auroc": 0.75, "ap": (1 + 2 / 3) / 2, "f1": pytest.approx(0.8), "acc": 0.75,
                 "threshold": 2.0, "n_pos": 2, "n": 4}


def test_a_class_of_one_kind_is_none_and_not_in_the_mean():
    labels = np.array([[1, 0, -1], [0, 0, 1], [1, 0, 1], [0, 0, 0]])
    scores = np.array([[.9, .5, .1], [.8, .5, .2], [.7, .5, .3], [.1, .5, .4]])
    s = metrics.classification_scores(labels, scores, names="abc")
    assert s["per_class"]["b"]["auroc"] is None and s["auroc"] == (0.75 + 0) / 2
    s = metrics.scores_with_intervals(labels, scores, [0.5] * 3, "abc", n=20)
    assert s["per_class"]["b"]["auroc_ci95"] == (None, None) and None not in s["auroc_ci95"]


def test_customary_accuracy_counts_what_lies_above_the_threshold():
    """Scores 4 3 2 1 of labels 1 0 1 0: best F1 0.8 at 2; above 2 are a hit and a false one."""
    labels, scores = np.array([[1, 0, 1, 0, -1]]).T, np.array([[4, 3, 2, 1, 9]]).T
    s = metrics.customary_scores(np.hstack([labels, 0 * labels]), np.hstack([scores, scores]))
    assert (s["auroc"], s["f1"], s["acc"]) == (0.75, pytest.approx(0.8), 0.5)


def test_healthy_controls_by_pencil():
    """Label a: the healthy image scores 2, the other negatives 9; its positives 1 and 3."""
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1], [0, -1]])
    scores = np.array([[1, 1], [3, 1], [2, 5], [9, 6], [9, 1]])
    assert metrics.auroc_healthy(labels, scores, ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert metrics.auroc_healthy(labels[:, :1], scores[:, :1], ["a"]) == {}  # others unknown
    assert metrics.auroc_healthy(labels[:2], scores[:2], ["a", "b"]) == {}   # nobody healthy
    # with a label that says so, an image is healthy only where it is 1
    said, names, scores = np.zeros((5, 1)), ["a", "b", "No Finding"], scores[:, [0, 1, 0]]
    assert metrics.auroc_healthy(np.hstack([labels, said]), scores, names) == {}
    said[2] = 1
    healthy = metrics.auroc_healthy(np.hstack([labels, said]), scores, names)
    assert healthy == {"a": 0.5, "b": 0.5, "No Finding": None}


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, scores = (rng.random((300, 3)) < 0.2).astype(int), np.round(rng.random((300, 3)), 2)
    s = metrics.classification_scores(labels, scores)
    assert s["ap"] == pytest.approx(average_precision_score(labels, scores))
    assert s["auroc"] == pytest.approx(roc_auc_score(labels, scores))  # with many ties
    best = s["threshold"]["0"]
    every = [f1_score(labels[:, 0], scores[:, 0] >= t) for t in np.unique(scores)]
    assert f1_score(labels[:, 0], scores[:, 0] >= best) == pytest.approx(max(every))


def test_the_bootstrap_redraws_whole_patients():
    """Of two patients with two films each: the sum of 10 10 1 1 is 40, 22 or 4."""
    films, patients = np.array([10, 10, 1, 1]), ["a", "a", "b", "b"]
    one = lambda seed: metrics.bootstrap_ci(lambda _, v: v.sum(), films, films, 1, seed, patients)
    assert {one(seed) for seed in range(20)} == {(40, 40), (22, 22), (4, 4)}
    assert metrics.bootstrap_ci(metrics.auroc, np.ones(5, int), np.arange(5)) == (None, None)


def test_grounding_by_pencil():
    """2 x 2 cells of 4 x 4 pixels, cell i at pixel 4 i: the first row of the heat falls 4, 3.5, 3,
    2.5, 2, row r is 1 - r/4 of it. Above 0.6 of the maximum are 4 + 2 pixels, all in the mask."""
    cells, mask = np.array([[4.0, 2.0], [0.0, 0.0]]), np.zeros((8, 8), bool)
    mask[:4, :4] = True
    assert np.allclose(metrics.upsample_map(cells, 8, 8)[0], [4, 3.5, 3, 2.5, 2, 2, 2, 2])
    s = metrics.grounding_scores([cells, 100 * cells, cells], [mask, mask, ~mask & mask], 0.6)
    assert s == {"pointing_game": 1, "pointing_within_cell": 1, "pointing_released": 1, "n": 2,
                 "iou": pytest.approx(6 / 16), "dice": pytest.approx(12 / 22), "threshold": 0.6}


def test_three_pointing_rules_by_pencil():
    """A mask of one pixel at (0, 3), cells of 4 x 4 pixels: the point (0, 0) is in the mask's block
    and three pixels away; (0, 4) is next to the mask, in another block; (4, 4) is too far. Equal
    maxima share the point."""
    mask, heats = np.arange(64).reshape(8, 8) == 3, np.zeros((4, 8, 8))
    for heat, point in zip(heats, ((0, 3), (0, 0), (0, 4), (4, 4))):
        heat[point] = 1
    maps = [(heat, heat, 0.5) for heat in (*heats, np.ones((8, 8)))]
    scores = np.array(metrics.score_maps(maps, mask, 2, 2))[:, :3]
    assert scores[:4].tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert scores[4, 0] == 1 / 64 and scores[4, 2] == 1 / 4


def test_answers_stand_beside_the_map():
    """A mask of one block of four, as the training masks; the film is brightest elsewhere. Released
    regions are all blocks above 0, here the film: Dice 2/5."""
    cells, mask = np.array([[9.0, 1.0], [1.0, 1.0]]), np.zeros((8, 8), bool)
    mask[:4, :4] = True
    film = np.ones((8, 8))
    film[7, 7] = 2
    finding = SimpleNamespace(label="mass", film=film, mask=mask, cells=cells,
                              heat=metrics.nearest(cells, 8, 8))
    fixed = metrics.fixed_answers([(0, "mass", mask), (1, "tube", ~mask)])
    each = np.array([metrics.all_scores(finding, fixed, 0.6)])                  # [1,5,5]
    s = metrics.grounding_summary(np.array(["mass"]), each, np.array(["a"]), n=5)
    assert s["pointing_game"] == s["dice"] == 1 and s["pointing_game_ci95"] == (1, 1)
    assert s["released"]["pointing_released"] == 1
    assert s["trivial"]["fixed"]["pointing_game"] == s["trivial"]["fixed"]["dice"] == 1
    assert s["trivial"]["brightest_point"]["pointing_within_cell"] == 0
    assert s["trivial"]["random_point"]["pointing_game"] == 1 / 4
    assert s["released"]["dice"] == s["trivial"]["random_point"]["dice"] == pytest.approx(2 / 5)
    assert s["worst"] == "mass" and s["n"] == 1


def test_the_threshold_of_best_dice():
    """Masks a, a and b within a: the mean is 1 on b and 2/3 on the rest of a. Above 0.66 is a: Dice
    1, 1, 2/3; above 2/3 only b: 2/3, 2/3, 1."""
    a, b = (np.arange(16).reshape(4, 4) < size for size in (8, 4))
    mean = np.mean([a, a, b], axis=0)
    assert metrics.best_dice_threshold([mean] * 3, [a, a, b]) < 2 / 3
    assert metrics.best_dice_threshold([mean] * 3, [a, b, b]) > 2 / 3


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50"])
def test_a_cell_is_drawn_where_it_looks(name):
    """With equal weights, and means for maxima in pooling, the gradient of a cell is its receptive
    field. It is centred where `upsample_map` draws the cell."""
    backbone, _, stride, centre = build_backbone(name)
    if name != "small":
        backbone[3] = torch.nn.AvgPool2d(3, 2, 1)
    for p in backbone.parameters():
        if p.dim() == 4:
            torch.nn.init.constant_(p, 1 / p[0].numel())
    images, i = torch.ones(1, 3, 384, 384, requires_grad=True), 192 // stride
    cells = backbone.eval()(images)
    impulse = np.zeros(cells.shape[2:])
    impulse[i, i] = 1
    cells[0, :, i, i].sum().backward()
    seen = images.grad.abs().sum((0, 1)).double().numpy()                       # [384,384]
    drawn = metrics.upsample_map(impulse, 384, 384, 384, (centre, stride))
    looks, is_drawn = (np.average(np.arange(384), weights=x.sum(0)) for x in (seen, drawn))
    assert looks == pytest.approx(is_drawn, abs=0.05)


def test_relation_by_pencil():
    """Two films, one pathology; left, right, heart."""
    truth = np.array([[1, 0, 0], [0, 1, 1]])[:, :, None]
    scores = np.array([[.9, .2, .3], [.6, .5, .1]])[:, :, None]
    s = metrics.relation_scores(truth, scores, mirror=np.array([1, 0, 2]), least=1)
    assert s["auroc"] == pytest.approx(roc_auc_score(truth.ravel(), scores.ravel()))
    assert s["cell_auroc"] == pytest.approx((1 + 1 + 0) / 3)  # .9 > .6; .5 > .2; .1 < .3
    # .9 > .2, but .5 < .6; the heart has no side
    assert (s["side"], s["n_sided"], s["top1"]) == (0.5, 2, 0.5)


def test_places_by_pencil():
    """The second finding is at places 2 and 3, its highest are 1 and 2; place 4 never occurs."""
    truth = np.array([[1, 0, 0, 0], [0, 1, 1, 0]])[:, :, None]
    scores = np.array([[.9, .2, .3, 1], [.6, .5, .1, 1]])[:, :, None]
    places = metrics.place_scores(truth, scores)
    assert places == {"top1": 0.5, "recall": 0.5, "n": 2, "n_several": 1}


def test_held_out_cells_are_scored_apart():
    """Training films have it at the first place only; of four films one at the second, two none."""
    truth = np.array([[1, 0], [0, 1], [0, 0], [0, 0]])[:, :, None]
    places = np.array([[.9, .1], [.8, .1], [.1, .1], [.1, .2]])[:, :, None]
    existence, in_train = np.array([[.9], [.3], [.2], [.4]]), np.array([[True], [False]])
    s = metrics.scores_apart(truth, in_train, existence, places)
    assert s["held_out"] == {"auroc": 0.5, "place_top1": 0, "n": 1}
    assert s["seen"] == {"auroc": 1, "place_top1": 1, "n": 1}
