"""Proves that label files are read as their publishers mean them: what `write` was given comes
back; the other published variants (a few lines each) and the real label files give what is
published; a row that cannot be used is counted and costs nothing else."""
import gzip
import json
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import phantom
from cli import InputError
from conftest import ROOT
from formats import PATHOLOGY, Mask, covid_chestxray, csv_rows, write_text
from formats.images import decode_rle, read_mask
from formats.items import FORMATS, find_root, read_items, settle_splits
from phantom import lay_out, plan
from text import PATHOLOGIES

REAL = ROOT.parent / "shared/real/labels"


def fill(root, files):
    """Write {name: text} below root."""
    for name, text in files.items():
        write_text(root / name, text)


def read(dataset, root, views="all", labels="chexpert"):
    """(label names, {id: item}, number of problems)"""
    items, problems = read_items(dataset, str(root), views, labels)
    assert {kind for kind, _ in problems} <= {"unreadable-label"}
    return list(FORMATS[dataset].LABELS), {item.id: item for item in items}, len(problems)


def present(names, item):
    return {name for name, value in zip(names, item.labels, strict=True) if value == 1}


LAYOUTS = {  # a label of the data set, and the findings that it stands for
    "synthetic": ("Pleural Effusion", {"effusion"}), "nih": ("Infiltration", {"opacity"}),
    "rsna": ("Pneumonia", {"pneumonia", "opacity", "consolidation"}),
    "siim": ("Pneumothorax", {"pneumothorax"}), "covidx": ("COVID-19", {"opacity"}),
    "chexpert": ("Pleural Effusion", {"effusion"}), "openi": ("Effusion", {"effusion"}),
    "covid-chestxray": ("COVID-19", {"opacity"}), "roco": (None, {None})}


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_what_is_written_is_read(dataset, tmp_path, monkeypatch):
    films = plan(30, 0, 64, 0.27, "easy")
    monkeypatch.setattr(phantom, "plan", lambda *_: films)
    phantom.write(dataset, str(tmp_path), 30, workers=0)
    root = find_root(dataset, tmp_path)
    names, items, problems = read(dataset, root, FORMATS[dataset].VIEWS)
    item_of = {f"{root}/{item.path}": item for item in items.values()}
    assert len(items) == 30 and not problems
    label, findings = LAYOUTS[dataset]
    for f in films:
        item, drawn = item_of[f.path], f.pathologies
        by_report = dataset in ("synthetic", "openi")
        if by_report or dataset == "chexpert" and f.split == "train":
            drawn = {pathology for pathology, value in f.mentions.items() if value == 1}
        assert (label in present(names, item)) == bool(drawn & findings)
        if dataset in ("synthetic", "covidx", "chexpert", "roco"):
            assert item.split == f.split
        if dataset == "nih":
            boxes = [[side / 64 for side in found.box] for found in f.findings]
            assert all(list(mask.place) in boxes for mask in item.masks)
        if dataset == "synthetic":
            assert Path(root, item.report).read_text() == lay_out(f.sections)
            assert item.truth == tuple((found.pathology, found.anatomy) for found in f.findings)
            masks = [read_mask(root, mask) for mask in item.masks]
            assert np.array_equal(masks, [found.mask for found in f.findings])
        if dataset == "siim":
            found = [found.mask for found in f.findings if found.pathology == "pneumothorax"]
            masks = [decode_rle(mask.source)[8::16, 8::16] for mask in item.masks]
            assert np.array_equal(masks, found)
        if dataset in ("openi", "covid-chestxray", "roco"):
            assert f.sections.get("IMPRESSION", "") in item.note


def test_csv_with_bom_crlf_spaces_missing_cells_zip_and_gzip(tmp_path):
    content = b"\xef\xbb\xbfid, split \r\n 1 , test\r\n\r\n2\r\n3,a,b\r\n"
    (tmp_path / "a.csv").write_bytes(content)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "c.csv.zip", "w") as archive:
        archive.writestr("c.csv", content)
    for name in ("a.csv", "b.csv", "c.csv"):
        assert list(csv_rows(tmp_path, name)) == [
            {"id": "1", "split": "test"}, {"id": "2", "split": ""}, {"id": "3", "split": "a"}]
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content)[:-9])  # cut off
    (tmp_path / "c.csv.zip").write_bytes(b"PK")
    for name in ("b.csv", "c.csv"):
        with pytest.raises(InputError, match=name):
            list(csv_rows(tmp_path, name))


def test_labels_have_names_in_the_vocabulary():
    labels = {label for form in FORMATS.values() for label in form.LABELS} - {"COVID-19"}
    assert {PATHOLOGY[label] for label in labels} <= set(PATHOLOGIES)
    assert PATHOLOGY["Fibrosis"] == "tail_abnorm_obs" and "COVID-19" not in PATHOLOGY


def test_a_missing_column_is_named_with_its_file(tmp_path):
    fill(tmp_path, {"Data_Entry_2017.csv": "Image Index,Patient ID\na.png,1\n"})
    with pytest.raises(InputError, match="Data_Entry_2017.csv lacks the column 'Finding Labels'"):
        read("nih", tmp_path)


def test_mimic_label_files_views_and_bad_rows(tmp_path):
    fill(tmp_path, {
        "mimic-cxr-2.0.0-split.csv.gz": "dicom_id,study_id,subject_id,split\na,51,1012,train\n"
        "b,52,1012,train\nc,53,1012,trian\nd,54,1012,test\ne\n",
        "mimic-cxr-2.0.0-metadata.csv": "dicom_id,ViewPosition\na,PA\nb,LL\nc,AP\n",
        "mimic-cxr-2.0.0-negbio.csv": "study_id,Edema,Pneumonia\n51,-1.0,1\n52,yes,\n",
        "mimic-cxr-2.1.0-test-set-labeled.csv": "study_id,Airspace Opacity\n51,1.0\n"})
    _, items, problems = read("mimic", tmp_path, labels="negbio")
    assert list(items) == ["a", "b"] and problems == 4  # a label, a split, no metadata, a cut row
    assert Counter(items["a"].labels) == {-1: 13, 1: 1} and set(items["b"].labels) == {-1}
    names, items, _ = read("mimic", tmp_path, "frontal", "manual")
    assert list(items) == ["a"] and present(names, items["a"]) == {"Lung Opacity"}


def test_nih_in_twelve_folders(tmp_path):
    fill(tmp_path, {
        "Data_Entry_2017_v2020.csv":
        "Image Index,Finding Labels,Patient ID,Original[Width,Height],\n"
        "1_000.png,Mass|Pleural_Thickening,1,9,9\n2_000.png,No Finding,2,9,9\n"
        "3_000.png,Massive,3,9,9\n",  # the header has a name more than a row has cells
        "BBox_List_2017.csv": "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "1_000.png,Infiltrate,256.0,512.0,128.0,64.0\n2_000.png,Mass,x,1,1,1\n",
        "test_list.txt": "2_000.png\n", "images_004/images/1_000.png": ""})
    names, items, problems = read("nih", tmp_path)
    one, two = items.values()
    assert present(names, one) == {"Mass", "Pleural_Thickening"} and not present(names, two)
    assert one.masks == (Mask("Infiltration", "box", "", (.25, .5, .125, .0625)),)
    assert (one.split, two.split, one.patient) == ("", "test", "1") and problems == 2
    assert two.masks == ()
    assert one.path == "images_004/images/1_000.png"


@pytest.mark.parametrize("layout", ["kaggle", "site", "csv alone"])
def test_rsna_published_test_images_are_the_test_split_in_every_layout(tmp_path, layout):
    fill(tmp_path, {"my_rsna_test.csv": "ID,img_path,boxes,classes\n"
                    "a,x/1.4.dcm,256;512;64;128,1\nb,x/1.5.dcm,nan,0\n"})
    if layout == "site":
        mapping = {"img_id": "7_001.png", "subset_img_id": "b", "SOPInstanceUID": "1.5"}
        fill(tmp_path, {"pneumonia-challenge-dataset-mappings_2018.json": json.dumps([mapping]),
                        "mdai/1.2/1.4.dcm": "", "mdai/1.3/1.5.dcm": ""})
    if layout == "kaggle":
        rows = ["a,256,512,64,128,1", "a,0,0,102.4,10.24,1", "b,,,,,0", "c,,,,,2", "d,x,1,1,1,1"]
        rows += [f"{k},,,,,0" for k in range(40)]
        fill(tmp_path, {"stage_2_train_labels.csv":
                        "\n".join(["patientId,x,y,width,height,Target", *rows])})
    _, items, problems = read("rsna", tmp_path)
    splits, source = settle_splits(list(items.values()), FORMATS["rsna"].SHARES)
    assert [name for name, split in zip(items, splits) if split == "test"] == ["a", "b"]
    assert "the publisher's" in source and items["b"].labels == (0,)
    assert items["a"].masks[0] == Mask("Pneumonia", "box", "", (.25, .5, .0625, .125))
    if layout == "kaggle":  # the other images are for training and thresholds
        assert len(items) == 42 and "validate" in splits and problems == 2
        assert items["a"].masks[1].place == (0, 0, .1, .01)
    if layout == "site":
        assert (items["a"].path, items["b"].patient) == ("mdai/1.2/1.4.dcm", "7")


def test_siim_two_stages_and_the_repack(tmp_path):
    """a and b are in the re-pack, too, g in the re-pack alone; its split holds for all."""
    fill(tmp_path, {
        "train-rle.csv": "ImageId, EncodedPixels\na, 1 2 1022 2\na, 0 2\nb, -1\nc, -1\nd,1 2 3\n"
        "e,1048570 9\nf,x\n", "dicom-images-test/1.2/1.3/a.dcm": "",
        "stage_1_train_images.csv": "new_filename,ImageId,has_pneumo\n0_train.png,b,0\n",
        "stage_1_test_images.csv": "new_filename,ImageId,has_pneumo\n0_test.png,a,1\n"
        "1_test.png,g,1\n"})
    _, items, problems = read("siim", tmp_path)
    assert [(i.path, i.split, i.labels, len(i.masks)) for i in items.values()] == [
        ("dicom-images-test/1.2/1.3/a.dcm", "test", (1,), 2),
        ("png_images/0_train.png", "train", (0,), 0), ("c.dcm", "", (0,), 0),
        ("png_images/1_test.png", "test", (1,), 1)]
    assert items["a"].masks[1] == Mask("Pneumothorax", "rle", "0 2") and problems == 3
    assert items["g"].masks == (Mask("Pneumothorax", "file", "png_masks/1_test.png"),)


def test_covidx_lines(tmp_path):
    fill(tmp_path, {"test_COVIDx8B.txt": "COVID 1 COVID(1).png positive sirm\n\n7 x.png\n",
                    "train.txt": "9 y.jpeg negative rsna\n8 z.png well rsna\n"})
    _, items, problems = read("covidx", tmp_path)
    assert [(i.patient, i.path, i.labels) for i in items.values()] == [
        ("9", "train/y.jpeg", (0,)), ("COVID 1", "test/COVID(1).png", (1,))] and problems == 2


def test_chexpert_paths_and_test_set(tmp_path):
    view, header = "patient1/study1/view", "Path," + ",".join(FORMATS["chexpert"].LABELS)
    fill(tmp_path, {
        "train.csv": f"{header}\nCheXpert-v1.0/train/{view}2_lateral.jpg,-1.0\n"
        f"CheXpert-v1.0/train/{view}3_frontal.jpg,maybe\nCheXpert,1.0\n",
        "valid.csv": f"{header}\nCheXpert-v1.0/valid/{view}1_frontal.jpg,0.0\n"})
    _, items, problems = read("chexpert", tmp_path)
    assert [(i.path, i.split, i.labels[0]) for i in items.values()] == [
        (f"train/{view}2_lateral.jpg", "train", -1), (f"valid/{view}1_frontal.jpg", "test", 0)]
    fill(tmp_path, {"test_labels.csv": f"{header}\ntest/{view}1_frontal.jpg,1\n"})
    _, items, _ = read("chexpert", tmp_path, "frontal")
    assert [(i.path, i.split, i.labels[0]) for i in items.values()] == [
        (f"valid/{view}1_frontal.jpg", "validate", 0), (f"test/{view}1_frontal.jpg", "test", 1)]
    assert problems == 2


def test_openi_archive_and_views(tmp_path):
    fill(tmp_path, {
        "nlm/2.xml": "<r><uId id='CXR2'/><AbstractText Label='FINDINGS'>Dense.</AbstractText>"
        "<major>Pulmonary Atelectasis/base</major><major>Hydropneumothorax</major>"
        "<parentImage id='2_1001'/><parentImage id='2_2001'/></r>",
        "nlm/3.xml": "<r><major>No Indexing</major><parentImage id='3_1'/></r>",
        "nlm/4.xml": "<r><MeSH>",
        "nlmcxr_dicom_metadata.csv": "imageid,View Position\n2_1001,PA\n2_2001,LL\n"})
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as archive:
        archive.add(tmp_path / "nlm", "ecgen-radiology")
    names, items, problems = read("openi", tmp_path, "frontal")
    assert set(items) == {"2_1001", "3_1"} and set(items["3_1"].labels) == {-1}
    assert present(names, items["2_1001"]) == {"Atelectasis", "Pneumothorax"} and problems == 1
    assert (items["2_1001"].patient, items["2_1001"].note) == ("2", "FINDINGS: Dense.")


def test_covid_chestxray_rows_and_the_radiologists_masks_beside_it(tmp_path):
    row, folder = '"COVID-19 {}",a.jpg,masks/{}.png,200x100,10,20,100,50\n', covid_chestxray.MASKS
    fill(tmp_path, {
        "x/metadata.csv": "patientid,finding,view,modality,filename,clinical_notes\n"
        "1,COVID-19,PA,X-ray,a.PNG,\n1,Pneumonia/Viral/COVID-19,L,X-ray,b.jpg,\n"
        "2,ARDS,AP,X-ray,c.jpg,\n2,Pneumonia,Axial,CT,d.jpg,\n3,todo,AP,X-ray,e.jpg,\n",
        "x/annotations/lungVAE-masks/a_mask.png": "", "x/annotations/lungVAE-masks/c_mask.png": "",
        f"x/{folder}/structure.csv": "Class,Filename,Mask,Resolution,Top,Left,Width,Height\n" +
        row.format("Left Lung", 1) + row.format("Ground Glass Opacities", 2)})
    names, items, problems = read("covid-chestxray", tmp_path / "x")
    a, b, c = items.values()
    assert present(names, a) == present(names, b) == {"COVID-19", "Pneumonia"}
    assert not present(names, c) and problems == 1
    assert [mask.label for mask in a.masks] == ["aerated lung", "opacity", "lung"]
    assert a.masks[1] == Mask("opacity", "crop", f"{folder}/masks/2.png", (0.1, 0.1, 0.5, 0.5))
    assert "consolidation" in a.absent and b.masks == ()
    assert c.masks[0].kind == "file" and c.absent == ()


def test_roco_keeps_chest_radiographs_by_concepts_or_captions(tmp_path):
    fill(tmp_path, {
        "train_captions.csv": "ID,Caption\na,A scan.\nb,Chest X-ray.\n,\n",
        "train_concepts.csv": "ID,CUIs\na,C1306645;C0817096\nb,C0040405;C0817096\n",
        "valid_captions.csv": "ID,Caption\nc,Chest radiograph on admission.\nd,Left hand X-ray.\n"
        "e,Chest X-ray and CT.\nf,PA CXR.\n"})
    _, items, problems = read("roco", tmp_path)
    assert [(i.path, i.split) for i in items.values()] == [
        ("train/a.jpg", "train"), ("valid/c.jpg", "validate"), ("valid/f.jpg", "validate")]
    assert problems == 1


@pytest.mark.skipif(not REAL.exists(), reason="../shared/real is not here")
def test_real_label_files_give_the_published_counts(tmp_path):
    for source in REAL.iterdir():
        name = source.name.removeprefix("kaggle_").removeprefix("chexpert_")
        shutil.copy(source, tmp_path / name)

    _, items, problems = read("nih", tmp_path)
    assert len(items) == 112_120 and len({i.patient for i in items.values()}) == 30_805
    assert Counter(i.split for i in items.values())["test"] == 25_596 and not problems
    assert sum(len(i.masks) for i in items.values()) == 984
    _, items, problems = read("rsna", tmp_path)
    tests = [item for item in items.values() if item.split == "test"]
    assert len(items) == 26_684 and sum(i.labels[0] for i in items.values()) == 6_012
    assert sum(len(i.masks) for i in items.values()) == 9_555 and not problems
    assert len(tests) == 5_337 and sum(item.labels[0] for item in tests) == 1_218
    _, items, problems = read("siim", tmp_path)
    assert len(items) == 12_047 and sum(i.labels[0] for i in items.values()) == 2_669
    assert sum(len(i.masks) > 1 for i in items.values()) == 624 and not problems
    names, items, problems = read("chexpert", tmp_path)
    values = Counter(i.labels[names.index("Cardiomegaly")] for i in items.values())
    assert len(items) == 223_414 and not problems
    assert (values[1], values[-1]) == (27_000, 8_087)  # 0: 11,116, and the blank ones
