"""Proves that findings lie where their names say and trivial answers do not find them, that the
rules read each report as it was meant, and that every layout has its publisher's names and quirks.

Each test draws what it needs."""
import csv
import filecmp
import gzip
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

import phantom
import text
from phantom import LOOKS, draw
from text import InputError

HERE = pathlib.Path(__file__).resolve().parent.parent


def rng(*seed):
    return np.random.default_rng([7, *seed])


@pytest.fixture(scope="module")
def films():
    return [draw(rng(k)) for k in range(500)]


def lines(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as file:
        return list(csv.reader(file))


def write(layout, root, count=24, size=32, seed=2, **more):
    phantom.write(layout, str(root), count, seed, size, **{"workers": 1} | more)
    return root


# ------------------------------------------------------------------------------------------------
# Drawings

def test_names_are_the_vocabulary():
    assert set(LOOKS) < set(text.PATHOLOGIES) and len(LOOKS) >= 10
    places = {anatomy for _, anatomies, _ in LOOKS.values() for anatomy in anatomies}
    assert places < set(text.ANATOMIES) and len(places) >= 12


@pytest.mark.parametrize("size", [64, 100, 300])
def test_drawing(size):
    film = draw(rng(0), size, [("effusion", "left_pleural"), ("nodule", "right_upper_lung")])
    assert film["image"].shape == film["lungs"].shape == (size, size)
    assert film["image"].dtype == np.uint8 and film["lungs"].dtype == bool
    assert 0.1 < film["lungs"].mean() < 0.5
    for found in film["findings"]:
        x, y, w, h = found["box"]
        rows, columns = np.nonzero(found["mask"])
        assert 0 <= x <= columns.min() and columns.max() < x + w <= size
        assert 0 <= y <= rows.min() and rows.max() < y + h <= size
        assert min(w, h) >= 6 * size / 64 - 1e-6


def test_same_seed_same_film():
    one, two = draw(rng(1)), draw(rng(1))
    assert (one["image"] == two["image"]).all() and one["report"] == two["report"]
    assert (one["image"] != draw(rng(2))["image"]).any()


@pytest.mark.parametrize("pathology", [p for p in LOOKS if any("left" in a for a in LOOKS[p][1])])
def test_patients_left_is_on_the_images_right(pathology):
    for k in range(6):
        for anatomy in LOOKS[pathology][1]:
            if phantom.side_of(anatomy):
                (found,) = draw(rng(3, k), 64, [(pathology, anatomy)])["findings"]
                centre = np.nonzero(found["mask"])[1].mean()
                assert (centre > 32) == ("left" in anatomy), anatomy


def test_zones_are_in_order_from_top_to_bottom():
    for side in ("left", "right"):
        rows = [np.mean([np.nonzero(draw(rng(4, k), 64, [("nodule", f"{side}_{zone}_lung")])
                                    ["findings"][0]["mask"])[0].mean() for k in range(8)])
                for zone in ("upper", "mid", "lower")]
        assert rows[0] + 6 < rows[1] and rows[1] + 6 < rows[2]


@pytest.mark.parametrize("pathology, sign", [("consolidation", 1), ("opacity", 1), ("nodule", 1),
                                             ("mass", 1), ("effusion", 1), ("pneumothorax", -1),
                                             ("edema", 1), ("atelectasis", 1), ("elevation", 1)])
def test_a_finding_changes_the_brightness_of_its_mask(pathology, sign):
    anatomy, change = LOOKS[pathology][1][0], []
    for k in range(8):
        film = draw(rng(5, k), 64, [(pathology, anatomy)])
        mask = np.any([f["mask"] for f in film["findings"]], 0)
        mirror = np.fliplr(mask) if phantom.side_of(anatomy) else ~mask & film["lungs"]
        change.append(film["image"][mask].mean() - film["image"][mirror].mean())
    assert np.mean(change) * sign > 5


def test_share_of_films_and_classes(films):
    count = np.bincount([len({f["pathology"] for f in film["findings"]}) for film in films])
    assert len(count) == 4 and count.min() > 40
    drawn = [p for film in films for p in {f["pathology"] for f in film["findings"]}]
    assert set(drawn) == set(LOOKS) and min(drawn.count(p) for p in LOOKS) > 20


def test_trivial_answers_point_wrong(films):
    """The brightest pixel, and the best single point of each pathology, measured on other films."""
    boxes, bright = {p: [] for p in LOOKS}, []
    for film in films:
        brightest = np.unravel_index(film["image"].argmax(), (64, 64))
        covered = {}
        for f in film["findings"]:
            x, y, w, h = (round(v) for v in f["box"])
            here = covered.setdefault(f["pathology"], np.zeros((64, 64), bool))
            here[y:y + h, x:x + w] = True
        for pathology, here in covered.items():
            boxes[pathology].append(here)
            bright.append(here[brightest])
    fixed = []
    for found in boxes.values():
        point = np.mean(found[::2], 0).argmax()
        fixed.append(np.mean([here.flat[point] for here in found[1::2]]))
    print(f"brightest point {np.mean(bright):.3f}, one fixed point a class {np.mean(fixed):.3f}")
    assert np.mean(bright) < 0.3 and np.mean(fixed) < 0.5


# ------------------------------------------------------------------------------------------------
# Reports

def test_report_layout(films):
    for film in films[:60]:
        first, *rest = film["report"].split("\n")
        assert first.strip() == "FINAL REPORT" and first.startswith("    ")
        assert rest.pop() == ""
        assert all(line.startswith(" ") and len(line) <= 79 for line in rest)
        assert "\n\n" not in film["report"] and "\n \n" in film["report"]
        assert re.search(r"^ (FINDINGS|IMPRESSION):", film["report"], re.M)


def test_the_rules_read_what_was_drawn(films):
    """No present cell that was not drawn; every stated cell read; denials read as denials."""
    stated = read = denied = read_denied = 0
    for film in films:
        cells = {(f["pathology"], f["anatomy"]) for f in film["findings"]}
        triplets = text.extract_triplets(film["report"])
        present = {t[:2] for t in triplets if t.existence == 1 and t.pathology in LOOKS}
        assert present <= cells, film["report"]
        absent = {t.pathology for t in triplets if t.existence == 0}
        for pathology, value in film["mentions"].items():
            of_it = {cell for cell in cells if cell[0] == pathology}
            if value == 1:
                stated, read = stated + 1, read + bool(of_it & present)
            if value == 0:
                denied, read_denied = denied + 1, read_denied + (pathology in absent)
    assert read >= 0.98 * stated and read_denied >= 0.98 * denied
    drawn = sum(len({f["pathology"] for f in film["findings"]}) for film in films)
    assert 0.85 < stated / drawn < 0.97
    assert 0.25 < denied / (len(LOOKS) * len(films) - drawn) < 0.35


# ------------------------------------------------------------------------------------------------
# Layouts

def trees_equal(a, b):
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    return all(filecmp.cmp(a / f, b / f, shallow=False) for f in files)


def test_bytes_do_not_depend_on_the_workers(tmp_path):
    for workers in (1, 2):
        write("mimic", tmp_path / str(workers), 40, workers=workers)
    assert trees_equal(tmp_path / "1", tmp_path / "2")


def killed(film):
    assert multiprocessing.parent_process()           # never the process of the tests
    os._exit(1)


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "make", killed)
    with pytest.raises(InputError, match="worker was killed"):
        write("mimic", tmp_path / "m", 40, workers=2)


def test_mimic(tmp_path):
    root = write("mimic", tmp_path / "m", 60)
    header, *split = lines(root / "mimic-cxr-2.0.0-split.csv.gz")
    assert header == "dicom_id study_id subject_id split".split() and len(split) == 60
    assert {row[3] for row in split} == {"train", "validate", "test"}
    assert len({(row[2], row[3]) for row in split}) == len({row[2] for row in split})
    meta = lines(root / "mimic-cxr-2.0.0-metadata.csv.gz")
    assert meta[0][:3] == ["dicom_id", "subject_id", "study_id"] and len(meta[0]) == 12
    assert all(re.fullmatch(r"21\d{6}", row[7]) for row in meta[1:])
    labels = lines(root / "mimic-cxr-2.0.0-chexpert.csv.gz")
    assert labels[0][2:] == sorted(labels[0][2:]) and len(labels[0]) == 16
    assert {v for row in labels[1:] for v in row[2:]} <= {"1.0", "0.0", "-1.0", ""}
    found = {}
    for row in lines(root / "boxes.csv")[1:]:
        found.setdefault(row[0], []).append(row)
    for dicom, study, subject, _ in split:
        assert re.fullmatch(r"([0-9a-f]{8}-){4}[0-9a-f]{8}", dicom)
        folder = root / f"files/p{subject[:2]}/p{subject}"
        assert (folder / f"s{study}.txt").exists()
        with Image.open(folder / f"s{study}" / f"{dicom}.jpg") as image:
            assert image.size == (32, 32) and image.mode == "L"
        assert (root / f"masks/{dicom}.png").exists() == (dicom in found)
        for k, row in enumerate(found.get(dicom, [])):
            assert row[1] == str(k) and row[2] in LOOKS and row[3] in text.ANATOMIES
            bits = np.asarray(Image.open(root / f"masks/{dicom}.png")) >> k & 1
            x, y, w, h = map(float, row[4:])
            rows, columns = np.nonzero(bits)
            assert x <= columns.min() <= columns.max() < x + w
            assert y <= rows.min() <= rows.max() < y + h


@pytest.mark.parametrize("variant", ["flat", "folders"])
def test_nih(tmp_path, variant):
    root = write("nih", tmp_path / "n", 120, variant=variant)
    kaggle = variant == "folders"
    entry = root / ("Data_Entry_2017.csv" if kaggle else "Data_Entry_2017_v2020.csv")
    first = entry.read_text().split("\n")[0]
    assert first.endswith("OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],")
    rows = lines(entry)
    assert len(rows[0]) == 12 and all(len(row) == 11 for row in rows[1:])
    files = {p.name: p for p in root.rglob("*.png")}
    assert files.keys() == {row[0] for row in rows[1:]}
    assert {p.parent.parent.name.startswith("images_") for p in files.values()} == {kaggle}
    assert {Image.open(p).mode for p in files.values()} == {"L", "RGBA"}
    lists = [(root / n).read_text().split() for n in ("train_val_list.txt", "test_list.txt")]
    assert sorted(sum(lists, [])) == sorted(files)
    assert not {n[:8] for n in lists[0]} & {n[:8] for n in lists[1]}
    boxes = lines(root / "BBox_List_2017.csv")
    assert ",".join(boxes[0]) == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    labels = {row[0]: row[1].split("|") for row in rows[1:]}
    for name, label, x, y, w, h in boxes[1:]:
        assert name in lists[1] and label.replace("Infiltrate", "Infiltration") in labels[name]
        assert label != "Infiltration" and 0 <= float(x) < float(x) + float(w) <= 1024


@pytest.mark.parametrize("variant", ["kaggle", "site", "monochrome1"])
def test_rsna(tmp_path, variant):
    pydicom = pytest.importorskip("pydicom")
    root = write("rsna", tmp_path / "r", 60, variant=variant)
    header, *rows = lines(root / "stage_2_train_labels.csv")
    assert ",".join(header) == "patientId,x,y,width,height,Target"
    ids = {row[0] for row in rows}
    assert len(ids) == 60 < len(rows) + 1                         # a row a box
    assert all((row[1] == "") == (row[5] == "0") for row in rows)
    kinds = lines(root / "stage_2_detailed_class_info.csv")[1:]
    assert len(kinds) == len(rows) and {k for _, k in kinds} == {
        "Normal", "Lung Opacity", "No Lung Opacity / Not Normal"}
    paths = sorted(root.rglob("*.dcm"))
    if variant == "site":
        mapping = json.loads((root / "pneumonia-challenge-dataset-mappings_2018.json").read_text())
        assert {m["subset_img_id"] for m in mapping} == ids
        assert {m["SOPInstanceUID"] for m in mapping} == {p.stem for p in paths}
        test = lines(root / "rsna_test.csv")
        assert test[0] == ["ID", "img_path", "boxes", "classes"]
        assert all((root / row[1]).exists() and (row[2] == "nan") == (row[3] == "0")
                   for row in test[1:])
    else:
        assert {p.stem for p in paths} == ids
    file = pydicom.dcmread(paths[0])
    raw = variant == "monochrome1"
    assert file.PhotometricInterpretation == ("MONOCHROME1" if raw else "MONOCHROME2")
    assert file.file_meta.TransferSyntaxUID.is_compressed != raw and file.Rows == 32
    assert re.fullmatch(r"\d+", file.PatientAge) and file.PatientID in ids


@pytest.mark.parametrize("variant", ["stage1", "stage2", "png"])
def test_siim(tmp_path, variant):
    pytest.importorskip("pydicom")
    root = write("siim", tmp_path / "s", 60, size=64, variant=variant)
    if variant == "png":
        for part in ("train", "test"):
            for name, _, sick in lines(root / f"stage_1_{part}_images.csv")[1:]:
                mask = np.asarray(Image.open(root / "png_masks" / name))
                assert set(np.unique(mask)) == ({0, 255} if sick == "1" else {0})
                assert f"_{part}_{sick}_" in name and (root / "png_images" / name).exists()
        return
    stage1 = variant == "stage1"
    path = root / ("train-rle.csv" if stage1 else "stage_2_train.csv")
    header, *rows = path.read_text().rstrip("\n").split("\n")
    assert header == ("ImageId, EncodedPixels" if stage1 else "ImageId,EncodedPixels")
    masks = {}
    for row in rows:
        name, runs = row.split(",")
        assert runs.startswith(" ") == stage1
        runs = [int(v) for v in runs.split()]
        masks.setdefault(name, [])
        if runs != [-1]:
            flat, at = np.zeros(1024 * 1024, bool), 0
            for gap, run in zip(runs[::2], runs[1::2]):
                at += gap
                flat[at:at + run] = True
                at += run
            masks[name].append(flat.reshape(1024, 1024).T)
    assert masks.keys() == {p.stem for p in root.rglob("*.dcm")} and len(masks) == 60
    assert {len(m) for m in masks.values()} == {0, 1, 2}
    twice = next(m for m in masks.values() if len(m) == 2)
    assert (twice[0] & twice[1]).any()                            # so they must be OR-ed
    first = next(r for r in (row.split(",") for row in rows) if r[1].strip() != "-1")[0]
    k = int(first.split(".")[-3]) - 301
    generator = np.random.default_rng([2, 1, k])
    sure = "pneumothorax" if generator.uniform() < 0.2 else None
    drawn = draw(generator, 64, phantom.choose_findings(generator, None, sure))
    mask = np.any([f["mask"] for f in drawn["findings"] if f["pathology"] == "pneumothorax"], 0)
    assert (np.any(masks[first], 0)[8::16, 8::16] == mask).all()


@pytest.mark.parametrize("variant", ["cxr4", "v8"])
def test_covidx(tmp_path, variant):
    root, seen = write("covidx", tmp_path / "c", 60, variant=variant), []
    cxr4 = variant == "cxr4"
    for part in ("train", "val", "test") if cxr4 else ("train", "test"):
        rows = (root / (f"{part}.txt" if cxr4 else f"{part}_COVIDx8B.txt")).read_text().splitlines()
        for row in rows:
            person, name, said, source = row.rsplit(None, 3)
            assert (root / part / name).exists() and said in ("positive", "negative")
            seen.append((person, part, said, Image.open(root / part / name).mode))
    assert len(seen) == 60 and {s[2] for s in seen} == {"positive", "negative"}
    assert any(" " in s[0] for s in seen) != cxr4
    assert {s[3] for s in seen} == {"L", "RGB", "RGBA"}
    assert len({s[:2] for s in seen}) == len({s[0] for s in seen})


@pytest.mark.parametrize("variant", ["small", "full"])
def test_chexpert(tmp_path, variant):
    top = write("chexpert", tmp_path / "x", 60, variant=variant)
    release = "CheXpert-v1.0-small" if variant == "small" else "CheXpert-v1.0"
    for part in ("train", "valid"):
        header, *rows = lines(top / release / f"{part}.csv")
        assert header[:6] == ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding"]
        assert header[-1] == "Support Devices" and len(header) == 19
        values = {v for row in rows for v in row[5:]}
        assert values <= ({"1.0", "0.0"} if part == "valid" else {"1.0", "0.0", "-1.0", ""})
        for row in rows:
            shape = rf"{release}/{part}/patient\d{{5}}/study\d/view1_frontal.jpg"
            assert re.fullmatch(shape, row[0])
            assert Image.open(top / row[0]).size in ((32, 26), (26, 32))


def test_openi(tmp_path):
    root = write("openi", tmp_path / "xml", 30)
    terms = []
    for path in sorted(root.glob("ecgen-radiology/*.xml")):
        tree = xml.etree.ElementTree.parse(path)
        said = {t.get("Label"): t.text or "" for t in tree.iter("AbstractText")}
        assert list(said) == ["COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION"]
        assert "XXXX" in said["INDICATION"] and (said["FINDINGS"] or said["IMPRESSION"])
        terms += [t.text for t in tree.iter("major")]
        (image,) = [i.get("id") for i in tree.iter("parentImage")]
        assert (root / "NLMCXR_png" / f"{image}.png").exists()
    assert "normal" in terms and any(t.count("/") > 1 for t in terms)
    root = write("openi", tmp_path / "kaggle", 30, variant="kaggle")
    reports, views = lines(root / "indiana_reports.csv"), lines(root / "indiana_projections.csv")
    assert reports[0] == ["uid", "MeSH", "Problems", "image", "indication", "comparison",
                          "findings", "impression"]
    assert all((root / "images/images_normalized" / row[1]).exists() for row in views[1:])
    assert [row[0] for row in reports[1:]] == [row[0] for row in views[1:]]


def test_covid_chestxray(tmp_path):
    root = write("covid-chestxray", tmp_path / "c", 40)
    header, *rows = lines(root / "metadata.csv")
    assert len(header) == 29 and header[-1] == "" and all(len(row) == 29 for row in rows)
    column = {name: [row[k] for row in rows] for k, name in enumerate(header)}
    assert {"COVID-19", "Pneumonia", "No Finding"} <= set(column["finding"])
    assert all((root / "images" / name).exists() for name in column["filename"])
    assert len(list((root / "annotations/lungVAE-masks").glob("*_mask.png"))) == 20
    assert not any("Evaluate" in note for note in column["clinical_notes"])


# ------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("wrong, complaint", [
    (dict(layout="padchest"), "no layout 'padchest'; choose one of mimic, nih"),
    (dict(layout="nih", variant="tar"), "nih has no variant 'tar'; it has: flat, folders"),
    (dict(count=0), "count must be at least 1"), (dict(size=0), "size at least 32"),
    (dict(seed=-1), "seed at least 0")])
def test_wrong_arguments(tmp_path, wrong, complaint):
    with pytest.raises(InputError, match=complaint):
        phantom.write(**dict(layout="mimic", root=str(tmp_path / "m"), count=2) | wrong)


def test_a_root_in_use_and_a_root_that_cannot_be_made(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        phantom.write("mimic", str(tmp_path), 2)
    with pytest.raises(InputError, match="cannot write to"):
        phantom.write("mimic", str(tmp_path / "note" / "below"), 2)


def test_command_line(tmp_path):
    def run(*flags):
        return subprocess.run([sys.executable, HERE / "phantom.py", *flags], cwd=tmp_path,
                              env=os.environ | {"OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True)
    done = run("--layout", "mimic", "--count", "3", "--size", "32")
    assert done.returncode == 0 and done.stdout == "3 images in data/phantom-mimic\n"
    for flags in (["--layout", "mimic"], ["--layout", "atlas"], ["--count", "many"], ["--what"]):
        done = run(*flags)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("phantom.py: ") and done.stderr.count("\n") == 1
