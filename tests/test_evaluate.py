"""Proves that evaluate.py's commands run at toy size, answer the same whatever the batch size, take
their thresholds from validation and compare embeddings with an untrained network's.

    python -m pytest tests/test_evaluate.py
"""
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import evaluate
import phantom
import text
from cli import InputError
from formats import covidx
from model import MeDSLIP, MeDSLIPConfig

NAMES = {"pathology": ["effusion", "pneumothorax", "consolidation", "nodule", "opacity", "tube"],
         "anatomy": ["left_pleural", "right_pleural", "left_upper_lung", "right_upper_lung", "rib"]}


def save_model(path, streams="dual", **changes):
    """A checkpoint of an untrained network that is asked six pathologies and five anatomies."""
    torch.manual_seed(0)
    model = MeDSLIP(MeDSLIPConfig("small", 32, dim=16, layers=2, heads=2, existence="evidence",
                                  streams=streams))
    prompts = {"pathology": text.pathology_prompts(NAMES["pathology"]),
               "anatomy": text.anatomy_prompts(NAMES["anatomy"])}
    queries = {kind: {"names": NAMES[kind], "prompts": prompts[kind],
                      "text": text.encode_text(prompts[kind], "hashing")} for kind in NAMES}
    model.fit_to_data(torch.cat([queries[kind]["text"] for kind in NAMES]), 0.1, 0.1)
    torch.save({"model": model.state_dict(), "config": asdict(model.config), "args": {"beta": 1.0},
                "queries": {"encoder": "hashing", **queries}, **changes}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    save_model(folder / "ckpt.pt")
    return folder


def evaluate_it(root, folder, task, *flags, dataset="synthetic"):
    """(metrics as returned, arrays as written) of one command."""
    command = ["--task", task, "--dataset", dataset, "--root", str(root), "--workers", "1",
               "--bootstrap", "20", "--checkpoint", str(folder / "ckpt.pt"), "--out-dir",
               str(folder), *flags]
    metrics, path = evaluate.main(evaluate.parse_args(command)), folder / f"eval/{dataset}_{task}"
    if metrics is not None:  # None: predict
        assert json.loads(path.with_suffix(".json").read_text())["dataset"] == dataset
        assert path.with_suffix(".png").stat().st_size > 5000
        return metrics, dict(np.load(path.with_suffix(".npz")))


def numbers(metrics):
    """All numbers in nested metrics."""
    nested = [numbers(value) for value in metrics.values() if isinstance(value, dict)]
    return sum(nested, [value for value in metrics.values() if isinstance(value, (int, float))])


def test_classification_is_the_same_whatever_the_batch_size(phantoms, folder):
    """Unseen diseases are asked by their definition; --protocol published changes no number."""
    metrics, arrays = evaluate_it(phantoms, folder, "classification", "--split", "all")
    again, _ = evaluate_it(phantoms, folder, "classification", "--split", "all", "--batch-size",
                           "7", "--protocol", "published")
    keys = "auroc f1 acc auroc_ci95 threshold per_class n customary unseen trivial"
    assert set(keys.split()) <= metrics.keys() and len(arrays["ids"]) == 160
    assert numbers(again) == pytest.approx(numbers(metrics), abs=2e-3)
    assert set(metrics["per_class"]) <= set(NAMES["pathology"])
    assert set(metrics["unseen"]["per_class"]) == set(metrics["not_trained_on"])
    assert metrics["customary"]["f1"] > metrics["f1"]  # at the best thresholds on these very images
    k, scores = list(arrays["names"]).index("opacity"), metrics["per_class"]["opacity"]
    labels, answers = arrays["labels"][:, k], arrays["scores"][:, k]
    assert scores["f1"] == pytest.approx(f1_score(labels, answers >= scores["threshold"]))


def test_grounding_by_own_and_other_maps(phantoms, folder):
    metrics, arrays = evaluate_it(phantoms, folder, "grounding")
    again, _ = evaluate_it(phantoms, folder, "grounding", "--batch-size", "7", "--protocol",
                           "published")
    assert numbers(again) == pytest.approx(numbers(metrics), abs=2e-3)
    keys = "pointing_game iou dice threshold n worst released trivial per_class faithfulness"
    assert set(keys.split()) <= metrics.keys()
    assert metrics["dice"] == pytest.approx(arrays["dice"].mean())
    # a softmax is above 0 everywhere: the released threshold marks the whole film
    assert metrics["released"]["dice"] == metrics["trivial"]["random_point"]["dice"]
    other, _ = evaluate_it(phantoms, folder, "grounding", "--attention", "pathology")
    assert numbers(other) != numbers(metrics) and set(other["faithfulness"]) == {"4", "12", "32"}


def test_thresholds_are_the_best_of_the_validation_images(phantoms, folder):
    for task in ("classification", "grounding"):
        flags = phantoms, folder, task, "--limit", "10"  # of each split
        test = evaluate_it(*flags)[0]["threshold"]
        held = evaluate_it(*flags, "--split", "validate")[0]["threshold"]
        if task == "classification":  # 0.5 where validation has only one kind, None where test has
            held = {name: held[name] or 0.5 for name in test if test[name] is not None}
            test = {name: test[name] for name in held}
        assert test == pytest.approx(held)


def test_dicom_files_are_equalised_for_a_model_of_mimic(tmp_path):
    """A published checkpoint, which stores no flags, saw MIMIC's equalised images, too."""
    phantom.write("rsna", str(tmp_path / "rsna"), 12, size=32, workers=1)
    for saved, choice, expected in (({}, [], True), ({"data": "synthetic"}, [], False),
                                    ({"data": "mimic"}, ["--equalize", "off"], False)):
        save_model(tmp_path / "ckpt.pt", args=saved)
        metrics, _ = evaluate_it(tmp_path / "rsna", tmp_path, "classification", "--split", "all",
                                 *choice, dataset="rsna")
        assert metrics["equalized"] == expected


def test_deleting_the_cells_that_matter_takes_the_logit_down():
    """The model's logit is the brightness of a square in the corner, 4 x 4 of its 16 x 16 cells."""
    film, cells = np.zeros((64, 64), np.uint8), np.zeros((16, 16))
    film[:16, :16], cells[:4, :4] = 255, 1
    model = lambda x, *_: SimpleNamespace(pathology_logits=x[:, 0, :16, :16].mean((1, 2))[:, None])
    model.cell_centres = lambda: (1.5, 4)
    args = SimpleNamespace(seed=0, image_size=64, device="cpu")
    found = [evaluate.Finding(0, "square", film, film > 0, cells, None)]
    drops = evaluate.faithfulness(args, model, found, (), {"square": 0})
    assert drops["12"]["map"] == pytest.approx(drops["12"]["mask"])
    assert drops["12"]["map"] > 2 * drops["12"]["random"]


def test_embedding_compares_three_networks(phantoms, folder):
    films = "--split", "train", "--limit", "60"
    metrics, arrays = evaluate_it(phantoms, folder, "embedding", *films)
    classes, _ = evaluate_it(phantoms, folder, "classification", *films)
    classes = classes["per_class"] | classes["unseen"]["per_class"]
    auroc = [scores["auroc"] for scores in classes.values() if scores["auroc"] is not None]
    # labels without a stored query are asked last; their scores keep the labels' order
    assert metrics["trained"]["existence"]["pathology"]["auroc"] == pytest.approx(np.mean(auroc))
    tests = {"existence", "probes", "cka", "swap", "mask", "counterfactual"}
    for network in ("trained", "untrained", "M = 0.5"):
        assert set(metrics[network]) == tests
        swap = metrics[network]["swap"]["A and B"]
        assert swap["n"] > 0 and sum(swap.values()) - swap["n"] == pytest.approx(1)
    assert metrics["M = 0.5"]["mask"]["M"] == {"mean": 0.5, "deviation": 0, "near half": 1}
    assert metrics["trained"]["mask"]["M"]["deviation"] > 0.01
    assert metrics["M = 0.5"]["cka"]["features"]["cka"] == pytest.approx(1)
    assert numbers(metrics["trained"]) != numbers(metrics["untrained"])
    assert len(arrays["ids"]) == len(arrays["anatomy_tokens"]) == metrics["n"] == 60


def test_embedding_of_one_stream_without_reports(tmp_path, monkeypatch):
    """The first two axes stand for its t-SNE, which takes seconds."""
    monkeypatch.setattr(evaluate.figures, "flatten", lambda points: points[:, :2])
    phantom.write("nih", str(tmp_path / "nih"), 60, seed=1, size=32, workers=1)
    save_model(tmp_path / "ckpt.pt", streams="single")
    metrics, _ = evaluate_it(tmp_path / "nih", tmp_path, "embedding", "--split", "train",
                             dataset="nih")
    assert set(metrics["trained"]) == {"existence", "probes"}
    assert "anatomy_tokens" not in metrics["trained"]["probes"] and "M = 0.5" not in metrics
    assert set(metrics["trained"]["probes"]["raw_features"]) == {"pathology"}  # no places


def test_pairs_without_icl_by_pencil():
    """Existence one half, and a softmax of (log 3, 0) over two places: 3/8 and 1/8."""
    model = SimpleNamespace(config=SimpleNamespace(streams="dual"), args={"beta": 0})
    z = torch.tensor([[[3.0, 1.0]]]).log()
    out = SimpleNamespace(pathology_logits=torch.zeros(1, 1), pathology_z=z, relation_logits=z)
    pairs = evaluate.pairs_of(model, out, torch.eye(2))["pairs"]
    assert pairs[0, :, 0].tolist() == pytest.approx([3 / 8, 1 / 8])


def test_a_model_without_queries_or_of_larger_images(phantoms, tmp_path):
    """Images are stored as large as it takes them; once they were stored at 64 and scaled up."""
    save_model(tmp_path / "ckpt.pt", queries=None)
    evaluate_it(phantoms, tmp_path, "relation", "--text-encoder", "hashing", "--limit", "5",
                "--image-size", "96", "--cache-dir", str(tmp_path / "cache"))
    assert [path.name[:11] for path in (tmp_path / "cache").iterdir()] == ["prepared-96"]


def test_relation_is_the_same_whatever_the_batch_size(phantoms, folder):
    metrics, _ = evaluate_it(phantoms, folder, "relation")
    again, _ = evaluate_it(phantoms, folder, "relation", "--batch-size", "7")
    assert set("auroc ap cell_auroc side top1 n trivial place".split()) <= metrics.keys()
    assert numbers(again) == pytest.approx(numbers(metrics), abs=2e-3)


def test_predict_takes_a_file_and_a_prompt(phantoms, folder, capsys):
    film = sorted(phantoms.rglob("*.jpg"))[0]
    evaluate_it(phantoms, folder, "predict", "--image", str(film), "--prompt", "A broken wire.")
    assert "A broken wire." in capsys.readouterr().out
    assert (folder / "eval/predict.png").stat().st_size > 5000


def test_covidx_is_asked_by_the_papers_words():
    flags = ["--task", "classification", "--dataset", "covidx", "--protocol", "published"]
    assert evaluate.parse_args(flags).prompt == covidx.PAPER_PROMPT
    assert evaluate.parse_args(flags[:4]).prompt is None


@pytest.mark.parametrize("task, flags", [
    ("predict", []), ("predict", ["--image", __file__]), ("relation", ["--device", "abacus"]),
    ("classification", ["--prompt", "A broken wire."]), ("embedding", ["--limit", "2"])])
def test_what_a_task_lacks_is_an_input_error(phantoms, folder, task, flags):
    with pytest.raises(InputError):
        evaluate_it(phantoms, folder, task, *flags)
