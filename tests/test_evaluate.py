"""Proves that every number of evaluate.py is scikit-learn's, or one that a pencil gives.

    python -m pytest tests/test_evaluate.py
"""
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import data
import evaluate
import phantom
import text
from model import MeDSLIP, MeDSLIPConfig, build_backbone
from text import InputError

PATHOLOGIES = ["effusion", "pneumothorax", "consolidation", "nodule", "cardiomegaly", "fracture"]
ANATOMIES = ["left_pleural", "right_pleural", "heart_size", "left_upper_lung", "right_upper_lung",
             "rib"]


# ---------------------------------------------------------------------------------------- metrics

def test_classification_by_pencil():
    """Scores 4 3 2 1 of labels 1 0 1 0: three of four pairs in order; best F1 0.8 at 2."""
    s = evaluate.classification_scores([1, 0, 1, 0], [4, 3, 2, 1])
    assert s == {"auroc": 0.75, "ap": (1 + 2 / 3) / 2, "f1": pytest.approx(0.8), "acc": 0.75,
                 "threshold": 2.0, "n_pos": 2, "n": 4}
    s = evaluate.classification_scores([1, 0, 1, 0], [4, 3, 2, 1], threshold=3.5)
    assert (s["f1"], s["acc"]) == (pytest.approx(2 / 3), 0.75)


def test_classes_of_one_kind_are_null_and_left_out():
    labels = np.array([[1, 0, -1], [0, 0, 1], [1, 0, 1], [0, 0, 0]])
    scores = np.array([[.9, .5, .1], [.8, .5, .2], [.7, .5, .3], [.1, .5, .4]])
    s = evaluate.classification_scores(labels, scores, names=["a", "b", "c"])
    assert s["per_class"]["b"]["auroc"] is None and s["per_class"]["b"]["n_pos"] == 0
    assert s["per_class"]["c"]["n"] == 3 and s["per_class"]["c"]["auroc"] == 0
    assert s["auroc"] == (0.75 + 0) / 2
    assert evaluate.classification_scores([0, 0], [1, 2])["f1"] is None


def test_classification_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, scores = (rng.random((300, 3)) < 0.2).astype(int), np.round(rng.random((300, 3)), 2)
    s = evaluate.classification_scores(labels, scores, [0.3, 0.5, 0.9])
    assert s["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert s["ap"] == pytest.approx(average_precision_score(labels, scores))
    best = evaluate.best_f1_threshold(labels[:, 0], scores[:, 0])
    every = [f1_score(labels[:, 0], scores[:, 0] >= t) for t in np.unique(scores)]
    assert f1_score(labels[:, 0], scores[:, 0] >= best) == pytest.approx(max(every))


def test_bootstrap_auroc_is_roc_auc_score_of_each_resample():
    rng = np.random.default_rng(1)
    labels, scores = rng.integers(-1, 2, (60, 2)), np.round(rng.random((60, 2)), 1)  # many ties
    patients = rng.integers(0, 25, 60)
    fast = evaluate.bootstrap_auroc(labels, scores, n=20, seed=3, groups=patients)
    for counts, row in zip(evaluate.resample_counts(patients, 20, 3, 1), fast):
        for k in range(2):
            rows = np.repeat(np.arange(60), counts[0])
            rows = rows[labels[rows, k] >= 0]
            assert row[k] == pytest.approx(roc_auc_score(labels[rows, k], scores[rows, k]))


def test_resamples_redraw_patients_whole_and_do_not_depend_on_the_chunk():
    patients = np.array(["a", "b", "a", "c", "b"])
    one = np.concatenate(list(evaluate.resample_counts(patients, 30, 0, 1)))
    assert (one == np.concatenate(list(evaluate.resample_counts(patients, 30, 0, 7)))).all()
    assert (one[:, 0] == one[:, 2]).all() and (one[:, 1] == one[:, 4]).all()
    assert (one[:, [0, 1, 3]].sum(1) == 3).all()


def test_bootstrap_ci():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 80)
    scores = labels + rng.normal(0, 1, 80)
    slow = evaluate.bootstrap_ci(roc_auc_score, labels, scores, n=200)
    assert slow == pytest.approx(evaluate.bootstrap_ci("auroc", labels, scores, n=200))
    assert slow[0] < roc_auc_score(labels, scores) < slow[1]
    assert evaluate.bootstrap_ci("auroc", np.ones(5, int), np.arange(5)) == (None, None)


def test_intervals_by_pencil():
    """Row means 0 and 2, the third row unknown; 2.5 and 97.5 % of the way from 0 to 2."""
    rows = [[0, np.nan], [1, 3], [np.nan, np.nan]]
    assert evaluate.central(rows) == pytest.approx((0.05, 1.95))
    assert evaluate.central([0.0, 2.0]) == pytest.approx((0.05, 1.95))
    assert evaluate.central([]) == evaluate.central([[np.nan]]) == (None, None)


class FakeTable(SimpleNamespace):
    """Five images, the first two for validation."""
    dataset, ids, patients = "fake", list("abcde"), list("abcde")

    def rows(self, split):
        return np.array({"validate": [0, 1], "test": [2, 3, 4]}.get(split, []), int)

    def located(self, i):
        return sorted({box[0] for box in self.boxes[i]})


def test_thresholds_come_from_validation():
    """Validation puts the threshold at .9, which misses the .8 of the test; the best is .8. The
    second class has no positive there and takes 0.5, the third none in the test."""
    labels = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
    scores = np.array([[.9, .1, .9], [.6, .1, .1], [.8, .7, .1], [.2, .6, .1], [.95, .1, .1]])
    args = SimpleNamespace(split="test", bootstrap=10, seed=0)
    blocks, arrays, draw = evaluate.score_classes(
        args, FakeTable(), np.array([2, 3, 4]), {"known": ["x", "y"], "new": ["z"]},
        lambda rows: (labels[rows], scores[rows]))
    known = blocks["known"]
    assert known["threshold"] == {"x": 0.9, "y": 0.5} and known["thresholds_from"] == "validate"
    assert known["per_class"]["x"]["f1"] == pytest.approx(2 / 3) and known["auroc"] == 1
    assert known["f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert known["customary"]["f1"] == 1 and known["customary"]["threshold"]["x"] == 0.8
    assert blocks["new"]["auroc"] is None and list(arrays["ids"]) == list("cde")


def test_a_figure_of_any_interval(tmp_path):
    """Few resamples may all lie beside the estimate, or none of them have both kinds."""
    classes = {"x": {"auroc": 0.75, "auroc_ci95": (0.8, 0.9), "n_pos": 2},
               "y": {"auroc": 0.75, "auroc_ci95": (None, None), "n_pos": 2},
               "z": {"auroc": None, "auroc_ci95": (None, None), "n_pos": 0}}
    arrays = {"names": np.array(["x", "y", "z"]), "labels": np.array([[1, 1, 0], [0, 0, 0]] * 2),
              "scores": np.array([[4, 1, 0], [3, 2, 0], [2, 3, 0], [1, 4, 0]])}
    evaluate.draw_classes(tmp_path / "some.png", classes, arrays)
    evaluate.draw_classes(tmp_path / "none.png", {"z": classes["z"]}, arrays)
    assert (tmp_path / "none.png").exists()


def test_a_probe_finds_what_is_there():
    """The first label is a coordinate, the second has no negatives, the third none in one half."""
    x, fit = np.random.default_rng(4).normal(size=(80, 2)), np.arange(80) % 2 == 0
    y = np.stack([x[:, 0] > 0, np.ones(80), fit], axis=1).astype(int)
    assert evaluate.probe(x, y, fit) > 0.99
    assert evaluate.probe(x, y[:, 1:], fit) is None


# --------------------------------------------------------------------------------------- locating

def test_grounding_by_pencil():
    """A 2 x 2 mask, a map whose upper half of it and one pixel beside it exceed one half."""
    mask, heat = np.zeros((4, 4), bool), np.zeros((4, 4))
    mask[:2, :2] = True
    heat[0, :2], heat[0, 2], heat[3, 3] = (4, 3), 2.5, 1
    s = evaluate.grounding_scores([heat], [mask], 0.5)
    assert s == {"pointing_game": 1, "iou": 2 / 5, "dice": 4 / 7, "threshold": 0.5, "n": 1}
    # its own maximum scales each map, whatever else is in the batch; empty masks do not count
    both = evaluate.grounding_scores([heat, 100 * heat, heat], [mask, mask, mask & False], 0.5)
    assert (both["dice"], both["n"]) == (s["dice"], 2)
    assert evaluate.grounding_scores([heat], [~mask], 0.5)["pointing_game"] == 0
    assert evaluate.points_at(np.ones((4, 4)), mask) == 0.25  # equal maxima share the point


def test_overlap_is_the_plain_count_at_every_threshold():
    rng = np.random.default_rng(3)
    heat, mask = np.round(rng.random((9, 7)), 1), rng.random((9, 7)) < 0.3
    dice, iou = evaluate.overlap(heat, mask, evaluate.THRESHOLDS)
    for k, t in enumerate(evaluate.THRESHOLDS):
        region = heat > t
        both, either = (region & mask).sum(), (region | mask).sum()
        assert dice[k] == pytest.approx(2 * both / (region.sum() + mask.sum()))
        assert iou[k] == pytest.approx(both / either)


def test_boxes_and_fixed_answers_by_pencil():
    """Two boxes of 2 x 2 pixels and one of 2 x 1: their mean is highest in the upper row, and all
    four pixels (Dice 1, 1, 2/3) beat the upper row alone (2/3, 2/3, 1)."""
    boxes = [[("a", 0, 0, 0.5, 0.5)], [("a", 0, 0, 0.5, 0.5)], [("a", 0, 0, 0.5, 0.25)]]
    table = FakeTable(boxes=boxes, shape=np.full((3, 2), 4), mask=lambda i, label: None)
    assert np.argwhere(evaluate.mask_of(table, 2, "a", "mask")).tolist() == [[0, 0], [0, 1]]
    thin = FakeTable(boxes=[[("b", 0.29, 0, 0.28, 1)]], shape=np.array([[1, 100]]))
    found = np.argwhere(evaluate.mask_of(thin, 0, "b", "box"))[:, 1]
    assert found.tolist() == list(range(29, 57))  # although 0.29 * 100 is below 29
    answers = evaluate.fixed_answers(table, [0, 1, 2], ["a", "never seen"], "mask", size=4)
    mean, region = answers["a"]
    assert np.allclose(mean[:2, :2], [[1, 1], [2 / 3, 2 / 3]]) and mean.sum() == pytest.approx(10/3)
    assert region[:2, :2].all() and region.sum() == 4
    assert answers["never seen"][1].all()


def test_shrinking_takes_the_middle_of_each_cell():
    mask = np.arange(36).reshape(6, 6)
    assert evaluate.shrink(mask, 2).tolist() == [[7, 10], [25, 28]]


def test_upsampling_by_pencil():
    """Two cells at pixels 0 and 4 of 8: a straight line between them, then flat."""
    row = evaluate.upsample_map(np.array([[0.0, 4.0]]), 1, 8)
    assert np.allclose(row, [0, 1, 2, 3, 4, 4, 4, 4])
    row = evaluate.upsample_map(np.array([[0.0, 4.0]]), 1, 8, size=8, centres=(1.5, 4))
    assert np.allclose(row, [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4])
    # a picture of twice the input's size: input pixel 4 is the picture's 8.5
    wide = evaluate.upsample_map(np.array([[0.0, 4.0, 0.0, 0.0]]), 1, 32, size=16, centres=(0, 4))
    assert set(np.flatnonzero(wide[0] == wide.max())) <= {8, 9} and wide[0, 8] == wide[0, 9]


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50"])
def test_a_cell_is_drawn_where_its_gradient_lies(name):
    """An impulse at one cell, sent back to the image, is centred where `upsample_map` draws it.

    With equal positive weights, and a mean in place of the maximum in pooling, the gradient of a
    cell is its receptive field, whose centre of mass is its middle.
    """
    backbone, _, stride, centre = build_backbone(name)
    for k, module in enumerate(backbone):
        if isinstance(module, torch.nn.MaxPool2d):
            backbone[k] = torch.nn.AvgPool2d(3, 2, 1)
    for p in backbone.parameters():
        if p.dim() == 4:
            torch.nn.init.constant_(p, 1 / p[0].numel())
    size = 336 if name == "resnet50" else 256
    images = torch.ones(1, 3, size, size, requires_grad=True)
    cells = backbone.eval()(images)
    row, column = cells.shape[2] // 2, cells.shape[3] // 2 + 1
    cells[0, :, row, column].sum().backward()
    seen = images.grad.abs().sum((0, 1)).double().numpy()
    impulse = np.zeros(cells.shape[2:])
    impulse[row, column] = 1
    drawn = evaluate.upsample_map(impulse, size, size, size=size, centres=(centre, stride))
    for axis in (0, 1):
        at = [np.average(np.arange(size), weights=x.sum(axis)) for x in (seen, drawn)]
        assert at[0] == pytest.approx(at[1], abs=1e-3)


# ------------------------------------------------------------------------------------------ pairs

def test_relation_by_pencil():
    """Two images, two sides and the heart, one pathology."""
    places = ["left_pleural", "right_pleural", "heart_size"]
    truth = np.array([[1, 0, 0], [0, 1, 1]])[:, :, None]
    scores = np.array([[.9, .2, .3], [.6, .5, .1]])[:, :, None]
    s = evaluate.relation_scores(truth, scores, places)
    assert s["auroc"] == pytest.approx(roc_auc_score(truth.ravel(), scores.ravel()))
    # left .9 > .6, right .5 > .2, heart .1 < .3
    assert s["cell_auroc"] == pytest.approx((1 + 1 + 0) / 3)
    # .9 > .2, but .5 < .6; the heart has no side
    assert (s["side"], s["n_sided"]) == (0.5, 2)
    assert (s["top1"], s["n_findings"]) == (0.5, 2)
    unknown = np.where(truth == 0, -1, truth)
    assert evaluate.relation_scores(unknown, scores, places)["auroc"] is None
    both = np.ones((1, 3, 1), int)  # on both sides: no question
    assert evaluate.relation_scores(both, scores[:1], places)["side"] is None


def test_joint_maps_by_pencil():
    """An even pathology map, and the anatomy it is at lights up one cell: that cell, smoothed."""
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 0, 1, 2], maps[0, 1, 4, 4] = 16, 16
    out = SimpleNamespace(pathology_attention=torch.ones(1, 1, 5, 5), anatomy_attention=maps,
                          relation_logits=torch.tensor([[[40.0], [-40.0]]]))
    model = lambda *_, **__: out  # noqa: E731
    model.config, model.args = SimpleNamespace(streams="dual"), {}
    joint = evaluate.attention_maps(model, None, (None, None), "joint")[1][0, 0]
    assert torch.allclose(joint[:3, 1:4], torch.tensor([[1., 2, 1], [2, 4, 2], [1, 2, 1]]))
    assert joint.sum() == pytest.approx(16)
    out.anatomy_attention, out.pathology_attention = None, maps[:, :1]  # one stream: smoothed
    joint = evaluate.attention_maps(model, None, (None, None), "joint")[1][0, 0]
    assert joint[1, 2] == 4 and joint.sum() == pytest.approx(16)


def test_pairs_without_icl_by_pencil():
    """Existence one half, and a softmax of (log 3, 0) over two places: 3/8 and 1/8."""
    model = SimpleNamespace(config=SimpleNamespace(streams="dual"), args={"beta": 0})
    out = SimpleNamespace(pathology_logits=torch.zeros(1, 1),
                          pathology_z=torch.tensor([[[math.log(3), 0.0]]]))
    pairs = evaluate.relation_probability(model, out, (None, torch.eye(2)))
    assert pairs[0, :, 0].tolist() == pytest.approx([3 / 8, 1 / 8])


# --------------------------------------------------------------------------------- the whole thing

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 phantoms and an untrained model that is asked six pathologies and six anatomies."""
    folder = tmp_path_factory.mktemp("evaluate")
    phantom.write("mimic", str(folder / "synthetic"), 300, seed=1, workers=1)
    torch.manual_seed(0)
    config = MeDSLIPConfig(backbone="small", image_size=64, dim=16, layers=2, heads=2, dropout=0.0)
    model = MeDSLIP(config)
    for p in model.parameters():  # far enough from zero for maps and scores that differ
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    queries = {"encoder": "hashing"}
    for kind, names, prompts in (("pathology", PATHOLOGIES, text.pathology_prompts(PATHOLOGIES)),
                                 ("anatomy", ANATOMIES, text.anatomy_prompts(ANATOMIES))):
        queries[kind] = {"names": names, "prompts": prompts,
                         "text": text.encode_text(prompts, "hashing")}
    torch.save({"model": model.state_dict(), "config": asdict(config), "queries": queries,
                "args": {"beta": 1.0}}, folder / "ckpt.pt")
    return folder


def run(folder, task, *flags):
    return evaluate.main(evaluate.parse_args([
        "--task", task, "--root", str(folder / "synthetic"), "--workers", "1", "--bootstrap", "50",
        "--checkpoint", str(folder / "ckpt.pt"), "--out-dir", str(folder / "out"), *flags]))


def close(a, b):
    """Nested metrics equal to a thousandth."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return all(close(x, y) for x, y in zip(a, b))
    return a == (pytest.approx(b, abs=1e-3) if isinstance(a, float) else b)


KEYS = {"classification": "auroc f1 acc auroc_ci95 threshold per_class n customary unseen",
        "grounding": "pointing_game iou dice threshold n trivial per_class",
        "relation": "auroc ap cell_auroc side top1 n trivial",
        "anatomy": "auroc per_class truth", "embedding": "n"}


@pytest.mark.parametrize("task", KEYS)
def test_each_task_writes_its_results_whatever_the_batch_size(folder, task):
    flags = ["--attention", "joint", "--target", "box"] if task == "grounding" else []
    metrics = run(folder, task, "--split", "train", "--limit", "80", "--batch-size", "7", *flags) \
        if task == "embedding" else run(folder, task, "--batch-size", "7", *flags)
    stem = folder / "out/eval" / f"synthetic_{task}"
    written = json.loads(stem.with_suffix(".json").read_text())
    assert set(KEYS[task].split()) <= written.keys() and written["dataset"] == "synthetic"
    assert stem.with_suffix(".png").stat().st_size > 5000
    assert len(np.load(stem.with_suffix(".npz"))) > 0
    assert not list(stem.parent.glob("*.tmp"))
    if task != "embedding":
        assert close(metrics, run(folder, task, *flags))


def test_classification_asks_unseen_diseases_last(folder):
    """Seven drawn pathologies have no stored query: their definitions are asked, and apart."""
    metrics = run(folder, "classification")
    assert set(metrics["per_class"]) <= set(PATHOLOGIES)
    assert set(metrics["unseen"]["per_class"]) == set(metrics["not_trained_on"])
    assert "mass" in metrics["not_trained_on"] and metrics["thresholds_from"] == "validate"
    arrays = np.load(folder / "out/eval/synthetic_classification.npz")
    for name, c in metrics["per_class"].items():
        k = list(arrays["names"]).index(name)
        labels, scores = arrays["labels"][:, k], arrays["scores"][:, k]
        assert c["auroc"] == pytest.approx(roc_auc_score(labels, scores))
        assert c["f1"] == pytest.approx(f1_score(labels, scores >= c["threshold"]))


@pytest.mark.parametrize("kind", ["pathology", "joint", "mirror"])
def test_maps_leave_the_answers_as_they_are(folder, kind):
    args = evaluate.parse_args(["--task", "grounding", "--checkpoint", str(folder / "ckpt.pt")])
    model = evaluate.load_model(args)
    table = data.load("synthetic", str(folder / "synthetic"), workers=1)
    plain = next(evaluate.predict(args, model, table, table.rows()[:3]))[1]
    _, out, maps = next(evaluate.predict(args, model, table, table.rows()[:3], attention=kind))
    assert maps.shape == (3, 6, 16, 16) and (maps >= 0).all() and maps.max() > 0
    assert torch.allclose(plain.pathology_logits, out.pathology_logits, atol=1e-4)
    assert not out.pathology_logits.requires_grad


def test_a_mirror_image_gets_the_mirrored_map(folder):
    model = evaluate.load_model(evaluate.parse_args(
        ["--task", "grounding", "--checkpoint", str(folder / "ckpt.pt")]))
    images = torch.randn(2, 3, 64, 64)
    texts = [model.queries[kind]["text"] for kind in ("pathology", "anatomy")]
    one, two = (evaluate.attention_maps(model, x, texts, "mirror")[1]
                for x in (images, images.flip(-1)))
    assert torch.allclose(one, two.flip(-1), atol=1e-6)


@pytest.mark.parametrize("centres", [(1.5, 4), (0.0, 16)])
def test_mirrored_cells_are_drawn_where_they_look(centres):
    """Cell 5 of the mirror image looks at the pixel that many from the other edge."""
    size = 16 * centres[1]
    maps = torch.zeros(1, 16)
    maps[0, 5] = 1
    drawn = evaluate.upsample_map(evaluate.unmirror(maps, size, centres), 1, size, size, centres)[0]
    looks_at = size - 1 - (centres[0] + 5 * centres[1])
    assert np.average(np.arange(size), weights=drawn) == pytest.approx(looks_at)


def test_predict_takes_a_file_a_prompt_and_a_folder(folder, capsys):
    image = next((folder / "synthetic").rglob("*.jpg"))
    run(folder, "predict", "--image", str(image), "--prompt", "A broken wire.")
    printed = capsys.readouterr().out
    assert "A broken wire." in printed and "no medical device" in printed
    assert (folder / "out/eval/predict.png").stat().st_size > 5000
    (image.parent / "broken.png").write_bytes(b"no image")
    run(folder, "predict", "--image", str(image.parent))
    (image.parent / "broken.png").unlink()
    lines = (folder / "out/eval/predict.csv").read_text().splitlines()
    assert lines[0].startswith("image,finding,probability,place 1")
    assert len(lines) == 1 + len(PATHOLOGIES)


def test_a_mistake_is_one_line_and_status_2(folder):
    command = [sys.executable, "evaluate.py", "--task", "grounding", "--checkpoint", "no.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and "python train.py" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("evaluate.py: ")


def test_an_encoder_of_another_width_is_refused():
    args = evaluate.parse_args(["--task", "relation", "--text-encoder", "hashing"])
    model = SimpleNamespace(config=SimpleNamespace(text_dim=384), queries=None)
    with pytest.raises(InputError, match="width 768, the model takes 384"):
        evaluate.encode(args, model, ["A broken wire."])


def test_a_folder_of_broken_images(folder, tmp_path):
    for name in ("one.png", "two.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 2 images"):
        run(folder, "predict", "--image", str(tmp_path))


@pytest.mark.parametrize("task, flags, words", [
    ("predict", [], "--image"), ("predict", ["--image", "no.png"], "no radiograph at no.png"),
    ("relation", ["--bootstrap", "0"], "at least 1"), ("relation", ["--limit", "0"], "at least 1"),
    ("relation", ["--device", "abacus"], "--device abacus"),
    ("classification", ["--prompt", "A broken wire."], "7 have no stored query"),
    ("embedding", ["--limit", "2"], "too few")])
def test_each_flag_says_what_it_needs(folder, task, flags, words):
    with pytest.raises(InputError, match=words):
        run(folder, task, *flags)


def test_what_a_data_set_or_a_model_lacks_is_said(folder):
    table = data.load("synthetic", str(folder / "synthetic"), workers=1)
    args = evaluate.parse_args(["--task", "grounding", "--checkpoint", str(folder / "ckpt.pt")])
    model = evaluate.load_model(args)
    table.boxes, table._masks = [[] for _ in table.boxes], {}
    with pytest.raises(InputError, match="no boxes or masks"):
        evaluate.grounding(args, model, table, table.rows("test"))
    model.config.streams = "single"
    with pytest.raises(InputError, match="--streams dual"):
        evaluate.anatomy(args, model, table, table.rows("test"))
    table.truth, table.has_reports = lambda *_: None, False
    with pytest.raises(InputError, match="has no reports"):
        evaluate.relation(args, model, table, table.rows("test"))
