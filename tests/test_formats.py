"""Proves that label files are read as their publishers mean them: `read` gives back what `write`
was given; the other published variants (a few lines each) and the real label files give what is
published; a row that cannot be used is counted and costs nothing else."""
import gzip
import json
import shutil
import tarfile
import zipfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from cli import InputError
from conftest import ROOT
from formats import (BLANK, PATHOLOGY, UNKNOWN, Mask, chexpert, covid_chestxray, covidx, csv_rows,
                     find, mimic, nih, openi, roco, rsna, siim, write_text)
from formats.images import decode_rle, read_mask
from text import PATHOLOGIES

REAL = ROOT.parent / "shared" / "real"
real = pytest.mark.skipif(not REAL.exists(), reason="../shared/real is not here")


def fill(root, files):
    """Write {name: text} below root."""
    for name, text in files.items():
        write_text(root / name, text)


def read(form, root, views="all", labels="chexpert"):
    """(label names, {id: item}, number of problems)"""
    names, items, problems = form.read(str(root), views, labels)
    assert {kind for kind, _ in problems} <= {"unreadable-label"}
    return names, {item.id: item for item in items}, len(problems)


def present(names, item):
    return {name for name, value in zip(names, item.labels, strict=True) if value == 1}


# ------------------------------------------------------------------------------ write, then read

LAYOUTS = {  # a finding and its label there; how films of train, validate and test are read
    mimic: ("effusion", "effusion", ["train", "validate", "test"]),
    nih: ("opacity", "Infiltration", ["train", "train", "test"]),
    rsna: ("opacity", "Pneumonia", ["", "", ""]),
    siim: ("pneumothorax", "Pneumothorax", ["", "", ""]),
    covidx: ("covid-19", "COVID-19", ["train", "validate", "test"]),
    chexpert: ("effusion", "Pleural Effusion", ["train", "test", "test"]),
    openi: ("effusion", "Effusion", ["", "", ""]),
    covid_chestxray: ("covid-19", "COVID-19", ["", "", ""]),
    roco: ("effusion", None, ["train", "validate", "test"])}


@pytest.mark.parametrize("form", LAYOUTS, ids=lambda form: form.__name__)
def test_what_is_written_is_read(form, tmp_path):
    pathology, label, splits = LAYOUTS[form]
    mask = np.zeros((32, 32), bool)
    mask[4:12, 8:24] = True
    finding = SimpleNamespace(pathology=pathology, anatomy="left_lower_lung", mask=mask,
                              box=(8.0, 4.0, 16.0, 8.0))
    films = [SimpleNamespace(
        index=i, patient=i // 2, visit=i % 2, split=["train", "validate", "test"][i // 4], age=40,
        sex="F", view="PA", size=32, mode="L", shape=None, lungs=None) for i in range(12)]

    def draw(films):  # every other film has the finding
        for f in films:
            f.findings, f.mentions = [finding][:f.index % 2], {pathology: f.index % 2}
            f.sections = {"FINDINGS": "Dense & wide.", "INDICATION": "Cough."}
            write_text(f.image, "")
            write_text(f.lungs or f.image, "")
        return films
    form.write(str(tmp_path), films, draw)
    root = tmp_path / "CheXpert-v1.0-small" if form is chexpert else tmp_path
    assert find(root, *form.FILES)
    names, items, problems = read(form, root, form.VIEWS, "drawn")
    assert len(items) == 12 and not problems
    item_of = {str(root / item.path): item for item in items.values()}
    for f in films:
        item, sick = item_of[f.image], bool(f.findings)
        assert item.split == splits[f.index // 4]
        assert (label in present(names, item)) == (sick and label is not None)
        if form in (mimic, rsna) or form is nih and f.split == "test":
            assert item.boxes == ((label, 0.25, 0.125, 0.5, 0.25),) * sick
        if form is mimic:
            assert f.report.endswith(item.report) and f.bits.endswith(f"masks/{item.id}.png")
            assert item.truth == ((pathology, "left_lower_lung"),) * sick
            assert item.masks == (Mask(label, "bit", f"masks/{item.id}.png", 0),) * sick
        if form is siim:
            masks = [decode_rle(found.source)[16::32, 16::32] for found in item.masks]
            assert (np.any(masks, axis=0) == mask).all() if sick else item.masks == ()
        if form is covid_chestxray:
            assert bool(item.masks) == bool(f.lungs)
        if form in (openi, covid_chestxray, roco):
            assert "Dense & wide." in item.note


# --------------------------------------------------------------------- published variants and traps

def test_csv_with_bom_crlf_spaces_missing_cells_zip_and_gzip(tmp_path):
    content = b"\xef\xbb\xbfid, split \r\n 1 , test\r\n\r\n2\r\n3,a,b\r\n"
    (tmp_path / "a.csv").write_bytes(content)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "c.csv.zip", "w") as archive:
        archive.writestr("c.csv", content)
    for name in ("a.csv", "b.csv", "c.csv"):
        assert list(csv_rows(find(tmp_path, name))) == [
            {"id": "1", "split": "test"}, {"id": "2", "split": ""}, {"id": "3", "split": "a"}]
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content)[:-9])  # cut off
    for name, column in (("b.csv", "id"), ("a.csv", "patient")):
        with pytest.raises(InputError):
            list(csv_rows(find(tmp_path, name), column))


def test_labels_have_names_in_the_vocabulary():
    labels = {*chexpert.LABELS, *nih.LABELS, *openi.LABELS, *rsna.LABELS, *siim.LABELS}
    assert {PATHOLOGY[label] for label in labels} <= set(PATHOLOGIES)
    assert PATHOLOGY["Fibrosis"] == "tail_abnorm_obs" and "COVID-19" not in PATHOLOGY


def test_mimic_label_files_views_and_bad_rows(tmp_path):
    fill(tmp_path, {
        "mimic-cxr-2.0.0-split.csv.gz": "dicom_id,study_id,subject_id,split\na,51,1012,train\n"
        "b,52,1012,train\nc,53,1012,trian\nd,54,1012,test\ne\n",
        "mimic-cxr-2.0.0-metadata.csv": "dicom_id,ViewPosition,Rows,Columns\na,PA,9,9\nb,LL,9,9\n"
        "c,AP,9,9\n",
        "mimic-cxr-2.0.0-negbio.csv": "study_id,Edema,Mass\n51,-1.0,1\n52,yes,\n",
        "mimic-cxr-2.1.0-test-set-labeled.csv": "study_id,Airspace Opacity\n51,1.0\n"})
    names, items, problems = read(mimic, tmp_path, labels="negbio")
    assert list(items) == ["a", "b"] and problems == 4  # a label, a split, no metadata, a cut row
    assert items["a"].path == "files/p10/p1012/s51/a.jpg" and items["a"].masks is None
    assert Counter(items["a"].labels) == {-1: 1, BLANK: 13} and set(items["b"].labels) == {UNKNOWN}
    names, items, _ = read(mimic, tmp_path, "frontal", "manual")
    assert list(items) == ["a"] and present(names, items["a"]) == {"Lung Opacity"}


def test_nih_of_2017_in_twelve_folders(tmp_path):
    fill(tmp_path, {
        "Data_Entry_2017.csv": "Image Index,Finding Labels,Patient ID,Original[Width,Height],\n"
        "1_000.png,Mass|Pleural_Thickening,1,9,9\n2_000.png,No Finding,2,9,9\n"
        "3_000.png,Massive,3,9,9\n",  # the header has a name more than a row has cells
        "BBox_List_2017.csv": "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "1_000.png,Infiltrate,256.0,512.0,128.0,64.0\n2_000.png,Mass,x,1,1,1\n",
        "test_list.txt": "2_000.png\n", "images_004/images/1_000.png": ""})
    names, items, problems = read(nih, tmp_path)
    one, two = items["1_000.png"], items["2_000.png"]
    assert present(names, one) == {"Mass", "Pleural_Thickening"} and not present(names, two)
    assert one.boxes == (("Infiltration", 0.25, 0.5, 0.125, 0.0625),) and two.boxes == ()
    assert (one.split, two.split, one.patient) == ("train", "test", "1") and problems == 2
    assert one.path == "images_004/images/1_000.png"


def test_rsna_from_either_tree_and_medklips_test_csv(tmp_path):
    fill(tmp_path, {"stage_2_train_labels.csv": "patientId,x,y,width,height,Target\na,,,,,0\n"
                    "b,256.0,128.0,512.0,64.0,1\nb,0.0,0.0,102.4,10.24,1\nc,,,,,2\nd,x,1,1,1,1\n"})
    _, items, problems = read(rsna, tmp_path)
    assert items["b"].boxes == (("Pneumonia", .25, .125, .5, .0625), ("Pneumonia", 0, 0, .1, .01))
    assert items["a"].path == "stage_2_train_images/a.dcm" and problems == 2
    fill(tmp_path, {"site/1.2/1.3/1.4.dcm": "", "site/1.2/1.3/1.5.dcm": "",
                    "pneumonia-challenge-dataset-mappings_2018.json": json.dumps([
                        {"img_id": "7_001.png", "subset_img_id": "b", "SOPInstanceUID": "1.5"}]),
                    "test.csv": "ID,img_path,boxes,classes\na,x/1.4.dcm,nan,0\n"})
    _, items, _ = read(rsna, tmp_path)
    assert items["a"].path == "site/1.2/1.3/1.4.dcm" and items["b"].path == "site/1.2/1.3/1.5.dcm"
    assert (items["a"].split, items["b"].split, items["b"].patient) == ("test", "train", "7")
    (tmp_path / "stage_2_train_labels.csv").unlink()
    fill(tmp_path, {"test.csv": "ID,img_path,boxes,classes\na,x/1.4.dcm,256;512;64;128|0;0;9;9,1\n"
                    "b,x/1.5.dcm,,0\nc,z.dcm,1;2,1\n"})
    _, items, problems = read(rsna, tmp_path)
    assert items["a"].boxes[0] == ("Pneumonia", .25, .5, .0625, .125) and problems == 1
    assert items["b"].labels == (0,) and {item.split for item in items.values()} == {"test"}


def test_siim_habits_of_both_stages_and_the_png_repack(tmp_path):
    header = "new_filename,ImageId,has_pneumo\n"
    fill(tmp_path, {"1/train-rle.csv": "ImageId, EncodedPixels\na, -1\nb, 1 2 1022 2\nb, 0 2\n"
                    "c,1 2 3\nd,1048570 9\ne,x\n", "1/dicom-images-test/1.2/1.3/b.dcm": "",
                    "2/stage_2_train.csv": "ImageId,EncodedPixels\na,-1\nb,1 2 1022 2\n",
                    "3/stage_1_train_images.csv": f"{header}0_train_1_.png,1.2,1\n",
                    "3/stage_1_test_images.csv": f"{header}0_test_0_.png,1.3,0\n"})
    _, items, problems = read(siim, tmp_path / "1")
    assert items["a"].labels == (0,) and items["a"].masks == () and problems == 3
    assert items["b"].path == "dicom-images-test/1.2/1.3/b.dcm" and len(items["b"].masks) == 2
    assert [item.labels for item in read(siim, tmp_path / "2")[1].values()] == [(0,), (1,)]
    _, items, _ = read(siim, tmp_path / "3")
    assert items["1.2"].masks == (Mask("Pneumothorax", "file", "png_masks/0_train_1_.png"),)
    assert (items["1.2"].split, items["1.3"].split, items["1.3"].masks) == ("train", "test", ())


def test_covidx_lines_of_all_versions(tmp_path):
    fill(tmp_path, {"test_COVIDx8B.txt": "COVID 1 COVID(1).png positive sirm\n\n7 x.png\n"
                    "old 3 old.png COVID-19\n", "train.txt": "9 y.jpeg pneumonia rsna\n"})
    _, items, problems = read(covidx, tmp_path)
    assert [(i.patient, i.path, i.split, i.labels) for i in items.values()] == [
        ("9", "train/y.jpeg", "train", (0,)), ("COVID 1", "test/COVID(1).png", "test", (1,)),
        ("old 3", "test/old.png", "test", (1,))] and problems == 1


def test_chexpert_paths_and_test_release(tmp_path):
    columns, blank, view = ",".join(chexpert.LABELS), "," * 13 + "\n", "patient1/study1/view"
    fill(tmp_path, {
        "train.csv": f"Path,{columns}\nCheXpert-v1.0/train/{view}1_frontal.jpg,1.0{blank}"
        f"CheXpert-v1.0/train/{view}2_lateral.jpg,-1.0{blank}"
        f"CheXpert-v1.0/train/{view}3_frontal.jpg,maybe{blank}CheXpert,1.0{blank}",
        "val_labels.csv": f"Path,{columns}\nCheXpert-v1.0/valid/{view}1_frontal.jpg,0.0{blank}",
        f"val/{view}1_frontal.jpg": "", f"test/{view}1_frontal.jpg": ""})
    _, items, problems = read(chexpert, tmp_path)
    assert {(i.path, i.split, i.labels[0]) for i in items.values()} == {
        (f"train/{view}1_frontal.jpg", "train", 1), (f"train/{view}2_lateral.jpg", "train", -1),
        (f"val/{view}1_frontal.jpg", "test", 0)} and problems == 2
    study = f"CheXpert-v1.0/test/patient1/study1,1{blank}"
    fill(tmp_path, {"groundtruth.csv": f"Study,{columns}\n{study}"})
    _, items, _ = read(chexpert, tmp_path, "frontal")
    assert {(i.path, i.split, i.labels[0]) for i in items.values()} == {
        (f"{folder}/{view}1_frontal.jpg", split, value) for folder, split, value in (
            ("train", "train", 1), ("val", "validate", 0), ("test", "test", 1))}


def test_openi_folder_archive_and_kaggle_repack(tmp_path):
    fill(tmp_path, {
        "nlm/ecgen-radiology/2.xml": "<r><uId id='CXR2'/><AbstractText Label='FINDINGS'>Dense."
        "</AbstractText><major>Pulmonary Atelectasis/base</major><major>Hydropneumothorax</major>"
        "<parentImage id='2_1001'/><parentImage id='2_2001'/></r>",
        "nlm/ecgen-radiology/3.xml": "<r><major>No Indexing</major><parentImage id='3_1'/></r>",
        "nlm/ecgen-radiology/4.xml": "<r><MeSH>",
        "nlm/nlmcxr_dicom_metadata.csv": "imageid,View Position\n2_1001,PA\n2_2001,LL\n",
        "k/indiana_reports.csv": "uid,MeSH,findings,impression\n1,Cardiomegaly/mild;Mass,Big.,\n",
        "k/indiana_projections.csv": "uid,filename,projection\n1,1_1.dcm.png,Frontal\n"
        "1,1_2.dcm.png,Lateral\n"})
    names, items, problems = read(openi, tmp_path / "nlm", "frontal")
    assert list(items) == ["2_1001", "3_1"] and set(items["3_1"].labels) == {UNKNOWN}
    assert present(names, items["2_1001"]) == {"Atelectasis", "Pneumothorax"} and problems == 1
    assert (items["2_1001"].patient, items["2_1001"].note) == ("2", "FINDINGS: Dense.")
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as archive:
        archive.add(tmp_path / "nlm/ecgen-radiology", "ecgen-radiology")
    assert list(read(openi, tmp_path)[1]) == ["2_1001", "2_2001", "3_1"]
    names, items, _ = read(openi, tmp_path / "k", "frontal")
    assert list(items) == ["1_1.dcm"] and "FINDINGS: Big." in items["1_1.dcm"].note
    assert present(names, items["1_1.dcm"]) == {"Cardiomegaly", "Mass"}


def test_covid_chestxray_rows_and_the_radiologists_masks_beside_it(tmp_path):
    row, folder = '"COVID-19 {}",a.jpg,masks/{}.png,200x100,10,20,100,50\n', covid_chestxray.MASKS
    fill(tmp_path, {
        "x/metadata.csv": "patientid,finding,view,modality,filename,clinical_notes\n"
        "1,COVID-19,PA,X-ray,a.PNG,\n1,Pneumonia/Viral/COVID-19,L,X-ray,b.jpg,\n"
        "2,ARDS,AP,X-ray,c.jpg,\n2,Pneumonia,Axial,CT,d.jpg,\n3,todo,AP,X-ray,e.jpg,\n",
        "x/annotations/lungVAE-masks/a_mask.png": "", "x/annotations/lungVAE-masks/c_mask.png": "",
        f"{folder}/structure.csv": "Class,Filename,Mask,Resolution,Top,Left,Width,Height\n" +
        row.format("Left Lung", 1) + row.format("Ground Glass Opacities", 2)})
    names, items, problems = read(covid_chestxray, tmp_path / "x")
    a, b, c = items.values()
    assert present(names, a) == present(names, b) == {"COVID-19", "Pneumonia"}
    assert not present(names, c) and problems == 1
    assert a.masks == tuple(Mask(label, "crop", f"../{folder}/masks/{k}.png", (0.1, 0.1, 0.5, 0.5))
                            for label, k in (("lung", 1), ("opacity", 2)))
    assert a.absent == ("consolidation",) and b.masks is None
    assert c.masks[0].kind == "file" and c.absent == ()
    assert list(read(covid_chestxray, tmp_path / "x", "frontal")[1]) == ["a.PNG", "c.jpg"]


def test_roco_keeps_chest_radiographs_by_concepts_or_captions(tmp_path):
    fill(tmp_path, {
        "train_captions.csv": "ID,Caption\na,A scan.\nb,Chest X-ray.\n,\n",
        "train_concepts.csv": "ID,CUIs\na,C1306645;C0817096\nb,C0040405;C0817096\n",
        "valid_captions.csv": "ID,Caption\nc,Chest radiograph on admission.\nd,Left hand X-ray.\n"
        "e,Chest X-ray and CT.\nf,PA CXR.\n", "valid/c.jpg": ""})
    _, items, problems = read(roco, tmp_path)
    assert [(i.path, i.split, i.labels) for i in items.values()] == [
        ("train/a.jpg", "train", ()), ("valid/c.jpg", "validate", ()),
        ("valid/f.jpg", "validate", ())] and problems == 1


# ----------------------------------------------------------------------------- the real label files

@real
def test_real_label_files_give_the_published_counts(tmp_path):
    for source in ("Data_Entry_2017_v2020.csv.gz", "BBox_List_2017.csv.gz", "test_list.txt",
                   "rsna_medslip_test.csv", "kaggle_stage_2_train_labels.csv.zip",
                   "siim-pneumothorax-train-rle.csv.gz", "chexpert_train.csv.gz"):
        name = source.removeprefix("kaggle_").removeprefix("chexpert_")
        shutil.copy(REAL / "labels" / source, tmp_path / name)

    names, items, problems = read(nih, tmp_path)
    items = list(items.values())
    assert len(items) == 112_120 and len({i.patient for i in items}) == 30_805 and not problems
    assert Counter(i.split for i in items) == {"train": 86_524, "test": 25_596}
    assert sum(len(i.boxes) for i in items) == 984
    assert sum("Infiltration" in present(names, i) for i in items) == 19_894

    _, items, problems = read(rsna, tmp_path)
    tests = {name: item for name, item in items.items() if item.split == "test"}
    assert len(items) == 26_684 and sum(i.labels[0] for i in items.values()) == 6_012
    assert sum(len(i.boxes) for i in items.values()) == 9_555 and not problems
    assert len(tests) == 5_337 and sum(i.labels[0] for i in tests.values()) == 1_218
    (tmp_path / "stage_2_train_labels.csv.zip").unlink()
    _, alone, _ = read(rsna, tmp_path)
    assert len(alone) == 5_337 and all(sorted(i.boxes) == sorted(tests[i.id].boxes)
                                       for i in alone.values())

    _, items, problems = read(siim, tmp_path)
    assert len(items) == 12_047 and sum(i.labels[0] for i in items.values()) == 2_669
    assert sum(len(i.masks) > 1 for i in items.values()) == 624 and not problems

    names, items, problems = read(chexpert, tmp_path)
    values = Counter(i.labels[names.index("Cardiomegaly")] for i in items.values())
    assert len(items) == 223_414 and not problems
    assert (values[1], values[0], values[-1]) == (27_000, 11_116, 8_087)


@real
def test_real_open_sets():
    _, items, _ = read(roco, REAL / "roco")
    assert Counter(i.split for i in items.values()) == {"train": 3_516, "test": 257}
    _, items, problems = read(openi, REAL / "openi")
    assert len({i.patient for i in items.values()}) > 1_900 and not problems
    _, items, _ = read(covid_chestxray, REAL / "covid-chestxray")
    masks = [mask for i in items.values() for mask in i.masks or () if mask.kind == "crop"]
    assert Counter(mask.label for mask in masks)["consolidation"] == 32
    assert read_mask(str(REAL / "covid-chestxray"), masks[0]).any()
