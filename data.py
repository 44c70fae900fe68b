"""Radiographs, labels and reports of nine data sets: read as downloaded, prepared once, batched.

    python data.py --dataset nih --root data/nih --check    # read every file, say what is wrong
    python data.py --dataset mimic --root data/mimic        # prepare, print the receipt
    python data.py --dataset synthetic                      # draws its data first; half a minute

In order: labels, one reader a data set, the data sets, splits, pixels, triplets, preparation, the
doctor (--check), the Table that load() returns, Batches, augmentation, flags. B images, S pixels a
side, n anatomies, m pathologies. The cache is <root>/prepared-<S>/ (or below --cache-dir):
images.npy uint8 [N,S,S], arrays.npz, index.json, split.csv, receipt.json and parts/, what each job
did. No pickle.

Differs from the released code in:
- Images are decoded and squashed to S x S once, and a step reads memory. The released loader
  decodes and transforms the full-size file every epoch, about 50 times the work.
- Crop, flip and the affine half of RandAugment are one bilinear sampling of the stored image, not
  up to four resamplings with a bicubic one first (2.4 times the cost). Going from 256 to 224 pixels
  nothing is reduced by more than 1.14, so antialiasing hardly matters; from twice the size on, the
  image is averaged down first. Photometric ops come after all affine ones.
- A mirrored image has left and right exchanged in its labels; the released code mirrors only the
  pixels. Images that mention a place without a mirror partner (right_atrium, middle_right_lobe)
  are not mirrored.
"""
import collections
import concurrent.futures
import csv
import glob
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import time
import typing
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import phantom
import text
from text import InputError, Parser

FORMAT = 1            # raise it when the meaning of anything in a cache changes
CHUNK = 256           # images a job; fixed, so that the cache does not depend on the workers
SPLITS = ("train", "validate", "test", "skipped")
csv.field_size_limit(1 << 27)

# ------------------------------------------------------------------------------------------------
# Labels

CHEXPERT = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity",
            "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
            "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices")
NIH = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
       "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
       "Hernia")
OPENI = {  # label: index terms that stand for it (the part before the first slash)
    "Cardiomegaly": ["Cardiomegaly"], "Effusion": ["Pleural Effusion"],
    "Atelectasis": ["Pulmonary Atelectasis"], "Opacity": ["Opacity"], "Pneumonia": ["Pneumonia"],
    "Nodule": ["Nodule"], "Mass": ["Mass"], "Calcification": ["Calcinosis"],
    "Congestion": ["Pulmonary Congestion"], "Edema": ["Pulmonary Edema"],
    "Consolidation": ["Consolidation"], "Infiltrate": ["Infiltrate"], "Scar": ["Cicatrix"],
    "Emphysema": ["Emphysema", "Pulmonary Emphysema"], "Pneumothorax": ["Pneumothorax"],
    "Fracture": ["Fractures, Bone"], "Hernia": ["Hernia, Hiatal"]}
PATHOLOGY = {  # the vocabulary's name of a label, where it is not just the label in lower case
    "No Finding": "normal", "Enlarged Cardiomediastinum": "enlarge", "Lung Opacity": "opacity",
    "Lung Lesion": "lesion", "Pleural Effusion": "effusion", "Pleural Other": "abnormality",
    "Support Devices": "device", "Infiltration": "infiltrate", "Pleural_Thickening": "thicken",
    "Fibrosis": "tail_abnorm_obs"}  # a bucket of rare findings, so a weak query
GLORIA = {"Atelectasis": 1, "Edema": 1, "Pleural Effusion": 1, "Cardiomegaly": 0,
          "Consolidation": 0}  # what GLoRIA and MGCA make of an uncertain label
BLANK, UNKNOWN = -2, -3  # beside 1 present, 0 absent, -1 uncertain: not mentioned; never labelled
VALUE = {"1.0": 1, "0.0": 0, "-1.0": -1, "1": 1, "0": 0, "-1": -1, "": BLANK}  # of a csv's cell


def label_pathology(label):
    """The vocabulary's name of a data set's label, or None (COVID-19 and the lungs have none)."""
    name = PATHOLOGY.get(label, label.lower())
    return name if name in text.PATHOLOGIES else None


def settle_labels(raw, names, uncertain):
    """int8 [N,L] as read -> {1, 0, -1 unknown}; blank counts as absent, as is customary."""
    labels = np.where(raw == BLANK, 0, np.maximum(raw, -1)).astype(np.int8)
    for column, name in enumerate(names):
        value = {"ignore": -1, "zeros": 0, "ones": 1, "gloria": GLORIA.get(name, -1)}[uncertain]
        labels[raw[:, column] == -1, column] = value
    return labels


# ------------------------------------------------------------------------------------------------
# Label files

def find(root, *names, need=False):
    """Path of the first of `names` (* allowed) in `root`, plain, .gz or .zip; None, or InputError
    if it is needed."""
    for name in names:
        for end in ("", ".gz", ".zip"):
            hits = sorted(glob.glob(os.path.join(glob.escape(root), name + end)))
            if hits:
                return hits[0]
    if need:
        raise InputError(f"{root} lacks {' or '.join(names)} (plain, .gz or .zip)")
    return None


def csv_rows(path, *needed):
    """Rows of a csv (plain, .gz, .zip of one) as dicts, header and cells stripped; a missing cell
    is "". No rows if path is None. InputError if a needed column is missing or the file damaged.
    """
    if path is None:
        return
    try:
        if path.endswith(".zip"):
            archive = zipfile.ZipFile(path)
            raw = archive.open(archive.namelist()[0])
        else:
            raw = gzip.open(path) if path.endswith(".gz") else open(path, "rb")
        with io.TextIOWrapper(raw, "utf-8-sig", "replace", newline="") as file:
            reader = csv.DictReader(file, restval="")
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for name in needed:
                if name not in reader.fieldnames:
                    raise InputError(f"{path} has no column {name!r}; it has "
                                     f"{', '.join(reader.fieldnames)}")
            for row in reader:
                row.pop(None, None)  # cells beyond the header
                yield {name: cell.strip() for name, cell in row.items()}
    except (OSError, EOFError, IndexError, zlib.error, zipfile.BadZipFile, csv.Error) as error:
        raise InputError(f"{path} is damaged ({error}); download it again")


def text_lines(path):
    """The non-empty lines of a text file, stripped; none if path is None."""
    if path is None:
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [line.strip() for line in file if line.strip()]


def image_paths(root):
    """Every image file below `root`, relative to it, in order; caches and masks left out."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(d for d in below if not d.startswith("prepared-")
                          and d not in ("masks", "png_masks", "annotations"))
        for name in sorted(names):
            if name.lower().endswith((".jpg", ".jpeg", ".png", ".dcm")):
                yield os.path.relpath(os.path.join(folder, name), root)


def paths_by_stem(root):
    """{file name without its ending: path relative to root}; of two the first in order."""
    found = {}
    for path in image_paths(root):
        found.setdefault(os.path.splitext(os.path.basename(path))[0], path)
    return found


class Item(typing.NamedTuple):
    """One image as its data set describes it; paths are relative to the root."""
    id: str
    path: str
    patient: str
    split: str            # train, validate, test; "" where the publisher gives none
    labels: tuple         # 1, 0, -1, BLANK or UNKNOWN
    report: str = ""      # path of a report
    note: str = ""        # or its text
    boxes: tuple = ()     # (label, x, y, width, height) in fractions of the image
    masks: tuple = None   # (label, "rle" | "png", RLE or path, bit or -1); None: not annotated
    truth: tuple = ()     # (pathology, anatomy) as drawn by phantom.py


# Every reader takes (root, options, problems), returns (label names, items) and opens no image.
# What it cannot use goes to `problems` as (kind, what).

def read_mimic(root, options, problems):
    """MIMIC-CXR-JPG with the reports unpacked over it; phantom.py adds boxes.csv and masks/."""
    metadata = {r["dicom_id"]: (r["ViewPosition"], r["Rows"], r["Columns"]) for r in csv_rows(
        find(root, "mimic-cxr-2.0.0-metadata.csv", need=True),
        "dicom_id", "ViewPosition", "Rows", "Columns")}
    boxes_csv, drawn = find(root, "boxes.csv"), collections.defaultdict(list)
    for r in csv_rows(boxes_csv, "dicom_id", "pathology", "anatomy", "x", "y", "width", "height"):
        drawn[r["dicom_id"]].append(r)

    names, labels, labels_csv = CHEXPERT, {}, None
    if options["labels"] == "drawn":
        names = sorted({r["pathology"] for found in drawn.values() for r in found},
                       key=text.PATHOLOGIES.index)
    elif options["labels"] == "manual":  # radiologists' labels of 687 test studies, release 2.1.0
        labels_csv = find(root, "mimic-cxr-2.1.0-test-set-labeled.csv", need=True)
    else:
        labels_csv = find(root, f"mimic-cxr-2.0.0-{options['labels']}.csv")
    for r in csv_rows(labels_csv, "study_id"):
        r.setdefault("Lung Opacity", r.get("Airspace Opacity", ""))  # the name in release 2.1.0
        try:
            labels[r["study_id"]] = tuple(VALUE[r.get(name, "")] for name in names)
        except KeyError as error:
            problems.append(("unreadable-label", f"study {r['study_id']}: {error}"))

    # the reports' archive has the same files/ folder; some keep it in a folder of its own
    reports = "mimic-cxr-reports/" if os.path.isdir(os.path.join(root, "mimic-cxr-reports")) else ""
    items = []
    for r in csv_rows(find(root, "mimic-cxr-2.0.0-split.csv", need=True),
                      "dicom_id", "study_id", "subject_id", "split"):
        name, study, subject = r["dicom_id"], r["study_id"], r["subject_id"]
        if name not in metadata or r["split"] not in SPLITS[:3] or not (study and subject):
            problems.append(("unreadable-label", f"split.csv: {name}"))
            continue
        view, height, width = metadata[name]
        if options["views"] == "frontal" and view not in ("PA", "AP"):
            continue
        found = drawn.get(name, ())
        present = {f["pathology"] for f in found}
        folder = f"files/p{subject[:2]}/p{subject}/s{study}"
        items.append(Item(
            name, f"{folder}/{name}.jpg", subject, r["split"],
            tuple(int(n in present) for n in names) if options["labels"] == "drawn"
            else labels.get(study, (UNKNOWN,) * len(names)),
            report=f"{reports}{folder}.txt",
            boxes=tuple((f["pathology"], float(f["x"]) / float(width),
                         float(f["y"]) / float(height), float(f["width"]) / float(width),
                         float(f["height"]) / float(height)) for f in found),
            masks=tuple((f["pathology"], "png", f"masks/{name}.png", int(f["finding"]))
                        for f in found) if boxes_csv else None,
            truth=tuple((f["pathology"], f["anatomy"]) for f in found)))
    return names, items


def read_nih(root, options, problems):
    """ChestX-ray14, one flat folder or one per tarball; the 2017 or the 2020 entry file."""
    paths = paths_by_stem(root)
    test = set(text_lines(find(root, "test_list.txt")))  # what is not in it is train_val
    boxes = collections.defaultdict(list)  # header `Bbox [x,y,w,h],,,`: its commas split the name
    for r in csv_rows(find(root, "BBox_List_2017.csv"), "Image Index", "Finding Label"):
        label = r["Finding Label"].replace("Infiltrate", "Infiltration")
        try:
            boxes[r["Image Index"]].append(
                (label, *(float(r[side]) / 1024 for side in ("Bbox [x", "y", "w", "h]"))))
        except ValueError:
            problems.append(("unreadable-label", f"box of {r['Image Index']}"))
    items = []
    for r in csv_rows(find(root, *SOURCES["nih"].files, need=True),
                      "Image Index", "Finding Labels", "Patient ID"):
        name, said = r["Image Index"], set(r["Finding Labels"].split("|")) - {"No Finding"}
        if said - set(NIH) or not name:
            problems.append(("unreadable-label", f"{name}: {r['Finding Labels']}"))
            continue
        items.append(Item(name, paths.get(name[:-4], f"images/{name}"), r["Patient ID"],
                          "test" if name in test else "train" if test else "",
                          tuple(int(label in said) for label in NIH), boxes=tuple(boxes[name])))
    return NIH, items


def read_rsna(root, options, problems):
    """Kaggle's stage_2 folders, or the RSNA site's <study>/<series>/<image>.dcm tree; labels from
    Kaggle's csv (a row per box) or from MedKLIP's test csv alone."""
    paths, where, patients, boxes = paths_by_stem(root), {}, {}, {}
    mappings = find(root, "pneumonia-challenge-dataset-mappings_2018.json")
    if mappings:  # the NIH file each image was taken from, hence the patient
        with open(mappings) as file:
            for r in json.load(file):
                patients[r["subset_img_id"]] = r["img_id"].split("_")[0]
                where[r["subset_img_id"]] = paths.get(r.get("SOPInstanceUID"))
    kaggle = find(root, "stage_2_train_labels.csv")
    for r in csv_rows(options["split_file"] or find(root, "*rsna*test*.csv")):
        if "img_path" in r:
            where[r["ID"]] = where.get(r["ID"]) or paths.get(os.path.basename(r["img_path"])[:-4])
            if not kaggle:  # boxes is "nan" where classes is 0
                found = r["boxes"].split("|") if r["classes"] == "1" else []
                boxes[r["ID"]] = [box.split(";") for box in found]
    for r in csv_rows(kaggle, "patientId", "x", "y", "width", "height", "Target"):
        if r["Target"] not in ("0", "1"):
            problems.append(("unreadable-label", f"{r['patientId']}: Target {r['Target']!r}"))
            continue
        boxes.setdefault(r["patientId"], [])
        if r["Target"] == "1":
            boxes[r["patientId"]].append([r[side] for side in ("x", "y", "width", "height")])
    items = []
    for name, found in boxes.items():
        try:
            found = tuple(("Pneumonia", *(float(side) / 1024 for side in (x, y, w, h)))
                          for x, y, w, h in found)
        except ValueError:
            problems.append(("unreadable-label", f"box of {name}"))
            continue
        path = paths.get(name) or where.get(name) or f"stage_2_train_images/{name}.dcm"
        items.append(Item(name, path, patients.get(name) or name, "", (int(bool(found)),),
                          boxes=found))
    return ("Pneumonia",), items


def read_siim(root, options, problems):
    """Kaggle's DICOM trees with either RLE file, or the PNG re-pack that MeDSLIP used."""
    items, label = [], "Pneumothorax"
    for part in ("train", "test"):
        for r in csv_rows(find(root, f"stage_1_{part}_images.csv"),
                          "new_filename", "ImageId", "has_pneumo"):
            name, sick = r["new_filename"], r["has_pneumo"] == "1"
            items.append(Item(r["ImageId"], f"png_images/{name}", r["ImageId"], part, (int(sick),),
                              masks=((label, "png", f"png_masks/{name}", -1),) if sick else ()))
    if items:
        return (label,), items
    paths, runs = paths_by_stem(root), collections.defaultdict(list)
    for r in csv_rows(find(root, *SOURCES["siim"].files, need=True), "ImageId", "EncodedPixels"):
        runs[r["ImageId"]].append(r["EncodedPixels"])  # several masks an image: OR, they overlap
    for name, found in runs.items():
        found = [rle for rle in found if rle != "-1"]
        try:
            numbers = [[int(number) for number in rle.split()] for rle in found]
            if any(len(n) % 2 or not n or min(n) < 0 or sum(n) > 1024 ** 2 for n in numbers):
                raise ValueError
        except ValueError:
            problems.append(("unreadable-label", f"mask of {name}"))
            continue
        items.append(Item(name, paths.get(name, f"dicom-images-train/{name}.dcm"), name, "",
                          (int(bool(found)),),
                          masks=tuple((label, "rle", rle, -1) for rle in found)))
    return (label,), items


def read_covidx(root, options, problems):
    """COVIDx, any version: lines of patient (older ids hold spaces), file, class and source (the
    oldest lines have none)."""
    form = re.compile(r"(.+?)\s+(\S+)\s+(positive|negative|covid-19|pneumonia|normal)(\s+\S+)?",
                      re.IGNORECASE)
    items = []
    for split in SPLITS[:3]:
        path = find(root, f"{split[:3]}.txt", f"{split}.txt", f"{split[:3]}*.txt")
        for line in text_lines(path):
            found = form.fullmatch(line)
            if not found:
                problems.append(("unreadable-label", f"{os.path.basename(path)}: {line[:60]}"))
                continue
            patient, name, said, _ = found.groups()
            folder = "val" if split == "validate" else split
            items.append(Item(name, f"{folder}/{name}", patient, split,
                              (int(said.lower() in ("positive", "covid-19")),)))
    return ("COVID-19",), items


def read_chexpert(root, options, problems):
    """CheXpert full or small, with the test release if there; without it valid is the test."""
    items = []
    for split, *names in (("train", "train.csv"), ("validate", "valid.csv", "val_labels.csv"),
                          ("test", "test_labels.csv", "groundtruth.csv")):
        for r in csv_rows(find(root, *names)):
            where = r.get("Path") or r.get("Study", "")  # the release folder comes first in it
            try:
                values = tuple(VALUE[r.get(label, "")] for label in CHEXPERT)
            except KeyError as error:
                problems.append(("unreadable-label", f"{where}: {error}"))
                continue
            where = where.split("/", 1)[-1] if where.startswith("CheXpert") else where
            if split == "validate" and os.path.isdir(os.path.join(root, "val")):
                where = where.replace("valid/", "val/", 1)  # the csv keeps the old name
            paths = [where] if where.lower().endswith(".jpg") else glob.glob(  # or it is a study
                os.path.join(glob.escape(where), "*.jpg"), root_dir=root)
            for found in sorted(paths):
                patient = next((p for p in found.split("/") if p.startswith("patient")), "")
                if not patient:
                    problems.append(("unreadable-label", f"{split}: {found!r}"))
                elif options["views"] == "all" or "frontal" in os.path.basename(found):
                    items.append(Item(found[:-4], found, patient, split, values))
    if "test" not in {item.split for item in items}:
        items = [i._replace(split="test") if i.split == "validate" else i for i in items]
    return CHEXPERT, items


def read_openi(root, options, problems):
    """Open-i: XML reports and PNGs as from the NLM, or Kaggle's re-pack. Labels are the human
    index terms; views come from the re-pack's projections or the DICOM headers, if there."""
    paths, view, images = paths_by_stem(root), {}, collections.defaultdict(list)
    for r in csv_rows(find(root, "indiana_projections.csv"), "uid", "filename", "projection"):
        stem = os.path.splitext(r["filename"])[0]
        view[stem] = r["projection"]
        images[r["uid"]].append(stem)
    for r in csv_rows(find(root, "nlmcxr_dicom_metadata.csv"), "imageid", "View Position"):
        lateral = r["View Position"] not in ("PA", "AP", "")
        view[r["imageid"]] = "Lateral" if lateral else "Frontal"
    reports, kaggle = [], find(root, "indiana_reports.csv")  # (uid, note, index terms, images)
    for r in csv_rows(kaggle, "uid", "MeSH", "findings", "impression"):
        note = [f"{part.upper()}: {r[part]}" for part in ("findings", "impression") if r[part]]
        reports.append((r["uid"], "\n\n".join(note), r["MeSH"].split(";"), images[r["uid"]]))
    for name in [] if kaggle else sorted(glob.glob("ecgen-radiology/*.xml", root_dir=root)):
        try:
            with open(os.path.join(root, name), "rb") as file:
                report = text.read_openi_xml(file)
        except (OSError, InputError) as error:
            problems.append(("unreadable-label", f"{name}: {error}"))
            continue
        reports.append((name[len("ecgen-radiology/"):-4], report["report"], report["terms"],
                        report["images"]))
    items = []
    for uid, note, terms, names in reports:
        heads = {term.split("/")[0].strip() for term in terms} - {"", "No Indexing"}
        labels = tuple(int(bool(heads & set(meant))) if heads else UNKNOWN
                       for meant in OPENI.values())
        items += [Item(name, paths.get(name, f"images/{name}.png"), uid, "", labels, note=note)
                  for name in names if options["views"] == "all" or view.get(name) != "Lateral"]
    return tuple(OPENI), items


def read_covid_chestxray(root, options, problems):
    """ieee8023's collection: its X-rays, clinical notes as reports, lung masks where they exist."""
    names, items = ("COVID-19", "Pneumonia", "No Finding"), []
    masks = set(glob.glob("annotations/lungVAE-masks/*_mask.png", root_dir=root))
    for r in csv_rows(find(root, "metadata.csv", need=True), "patientid", "finding", "view",
                      "modality", "filename", "clinical_notes"):
        frontal = r["view"] in ("PA", "AP", "AP Supine")
        if r["modality"] != "X-ray" or not (frontal or options["views"] == "all"):
            continue
        if not r["filename"] or not r["finding"] or r["finding"].lower() in ("todo", "unknown"):
            problems.append(("unreadable-label", f"{r['filename']}: finding {r['finding']!r}"))
            continue
        said = r["finding"].lower()
        healthy = said == "no finding"
        # ARDS names a course, not a germ; every other entry of this collection is a pneumonia
        labels = (int("covid-19" in said), int(not healthy and said != "ards"), int(healthy))
        mask = f"annotations/lungVAE-masks/{r['filename'].rsplit('.', 1)[0]}_mask.png"
        items.append(Item(r["filename"], f"images/{r['filename']}", r["patientid"], "", labels,
                          note=r["clinical_notes"],
                          masks=(("lung", "png", mask, -1),) if mask in masks else None))
    return names, items


# ------------------------------------------------------------------------------------------------
# The data sets

class Source(typing.NamedTuple):
    read: typing.Callable
    name: str             # as people call it
    files: tuple          # one of these lies at its root (plain, .gz or .zip)
    get: str              # where to get it
    made: tuple           # shares of train and validate where the publisher has no such split
    views: str = "all"    # --views unless told: the published run took all of MIMIC's


SOURCES = {
    "synthetic": Source(read_mimic, "synthetic", ("mimic-cxr-2.0.0-split.csv",),
                        "a new --root is filled on first use", (0.8, 0.1)),
    "mimic": Source(read_mimic, "MIMIC-CXR-JPG", ("mimic-cxr-2.0.0-split.csv",),
                    "https://physionet.org/content/mimic-cxr-jpg and, for the reports, "
                    "/content/mimic-cxr (credentialed)", (0.8, 0.1)),
    "nih": Source(read_nih, "NIH ChestX-ray14",
                  ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"),
                  "https://nihcc.app.box.com/v/ChestXray-NIHCC", (0.7, 0.1)),
    "rsna": Source(read_rsna, "RSNA Pneumonia", ("stage_2_train_labels.csv", "*rsna*test*.csv"),
                   "kaggle competitions download -c rsna-pneumonia-detection-challenge",
                   (0.7, 0.15)),
    "siim": Source(read_siim, "SIIM-ACR Pneumothorax",
                   ("stage_2_train.csv", "*train-rle.csv", "stage_1_train_images.csv"),
                   "https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation", (0.7, 0.15)),
    "covidx": Source(read_covidx, "COVIDx", ("test*.txt",),
                     "https://www.kaggle.com/datasets/andyczhao/covidx-cxr2", (0.9, 0.1)),
    "chexpert": Source(read_chexpert, "CheXpert", ("train.csv", "valid.csv", "val_labels.csv"),
                       "https://stanfordmlgroup.github.io/competitions/chexpert", (0.9, 0.1),
                       "frontal"),
    "openi": Source(read_openi, "Open-i", ("ecgen-radiology", "indiana_reports.csv"),
                    "https://openi.nlm.nih.gov/faq (NLMCXR_reports.tgz, NLMCXR_png.tgz)",
                    (0.7, 0.1), "frontal"),
    "covid-chestxray": Source(
        read_covid_chestxray, "covid-chestxray-dataset", ("metadata.csv",),
        "git clone https://github.com/ieee8023/covid-chestxray-dataset", (0.6, 0.1), "frontal"),
}
DATASETS = tuple(SOURCES)


def find_root(dataset, root):
    """`root`, or the one folder in it that an archive unpacked into, by the label file it holds."""
    source = SOURCES[dataset]
    below = sorted(e.path for e in os.scandir(root) if e.is_dir()) if os.path.isdir(root) else []
    for folder in [root] + below:
        if find(folder, *source.files):
            return folder
    layout = "mimic" if dataset == "synthetic" else dataset
    raise InputError(f"no {source.name} data at {root}: looked for {' or '.join(source.files)} "
                     f"there and one folder down. Get it: {source.get}; or rehearse: python "
                     f"phantom.py --layout {layout} --root {root} --count 200; or take the "
                     "synthetic data: python train.py --data synthetic")


def read_items(dataset, root, options):
    """(label names, items, problems) of a data set as downloaded; no image is opened here."""
    problems, kept, seen = [], [], set()
    try:
        names, items = SOURCES[dataset].read(root, options, problems)
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{root}: a label file holds what it should not ({error!r}); download it "
                         "again")
    for item in items:
        # ids and paths come from csv files of strangers: none may lead out of the data root
        paths = [item.path, item.report] + [m[2] for m in item.masks or () if m[1] == "png"]
        if any(os.path.isabs(p) or ".." in p.replace("\\", "/").split("/") for p in paths):
            problems.append(("outside-root", item.path))
        elif item.id in seen:
            problems.append(("duplicate", item.id))
        else:
            seen.add(item.id)
            kept.append(item)
    if not kept:
        first = f"; {len(problems)} problems, the first: {problems[0]}" if problems else ""
        raise InputError(f"{root}: label files without one usable row{first}")
    if any(item.path.lower().endswith((".dcm", ".dicom")) for item in kept):
        try:
            import pydicom  # noqa: F401
        except ImportError:
            raise InputError(f"{SOURCES[dataset].name} comes as DICOM files: pip install "
                             "'pydicom>=3'")
    return list(names), kept, problems


# ------------------------------------------------------------------------------------------------
# Splits

def draw_split(patient, made):
    """train, validate or test for a patient, from a hash of the id alone: everybody gets the same,
    whatever part of the data set they have and in whatever order."""
    digest = hashlib.sha256(f"0/{patient}".encode()).digest()  # seed 0
    u = int.from_bytes(digest[:8], "big") / 2**64
    return SPLITS[0] if u < made[0] else SPLITS[1] if u < made[0] + made[1] else SPLITS[2]


def settle_splits(items, made, split_file=None):
    """(split of each item, where they come from): the file's, else the publisher's, else made."""
    carve = (made[0] / sum(made), 1)  # train and validate when only the test is official
    if split_file:
        return read_split_file(items, carve, split_file)
    splits = [item.split for item in items]
    if not any(splits):
        shares = ":".join(f"{100 * share:.0f}" for share in (*made, 1 - sum(made)))
        return [draw_split(i.patient, made) for i in items], f"made by patient {shares}, seed 0"
    if "validate" not in splits:
        splits = [draw_split(i.patient, carve) if s == "train" else s
                  for i, s in zip(items, splits)]
        return splits, f"official; validate is {1 - carve[0]:.1%} of the train patients, seed 0"
    return splits, "official"


def read_split_file(items, carve, path):
    """A split.csv of ours (`id`, `split`; ids not in it are not used) or MedKLIP's RSNA test csv
    (`ID`, `classes`; ids not in it become train and validate)."""
    rows = list(csv_rows(path))
    header = set(rows[0]) if rows else set()
    if {"id", "split"} <= header:
        alias = {"val": "validate", "valid": "validate", "validation": "validate"}
        given = {r["id"]: alias.get(r["split"], r["split"]) for r in rows}
        wrong = set(given.values()) - set(SPLITS)
        if wrong:
            raise InputError(f"--split-file {path}: {wrong.pop()!r} is no split; use train, "
                             "validate or test")
        splits = [given.get(item.id, "skipped") for item in items]
    elif {"ID", "classes"} <= header:
        given = {r["ID"]: "test" for r in rows}
        splits = [given.get(i.id) or draw_split(i.patient, carve) for i in items]
    else:
        raise InputError(f"--split-file {path}: needs columns id,split (our split.csv) or "
                         "ID,img_path,boxes,classes (MedKLIP's RSNA test csv)")
    known = len(given.keys() & {item.id for item in items})
    if not known:
        raise InputError(f"--split-file {path}: none of its {len(given)} ids is in this data set")
    return splits, f"{os.path.basename(path)}, {known} of its {len(given)} ids are here"


# ------------------------------------------------------------------------------------------------
# Pixels

def read_image(path, size=None):
    """uint8 [H,W] of a PNG, JPEG or DICOM file, or [size,size] squashed; else InputError."""
    try:
        return decode(path, size)[0]
    except Exception as error:  # whatever a decoder makes of a damaged file
        raise InputError(f"{path} cannot be read as an image ({trouble(path)}: {error})")


def decode(path, size=None):
    """(uint8 [H,W] or [size,size], (height, width) of the file)."""
    if path.lower().endswith((".dcm", ".dicom")):
        image = Image.fromarray(decode_dicom(path))
        shape = image.height, image.width
    else:
        with Image.open(path) as image:
            shape = image.height, image.width
            if size:  # a JPEG decodes straight to the smallest eighth that is still >= size
                image.draft("L", (size, size))
            image.load()
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit PNG
                image = Image.fromarray(stretch(np.asarray(image)))
            else:
                image = image.convert("L")
    if size and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    return np.asarray(image), shape


def stretch(pixels):
    """Any range -> uint8 0..255 by minimum and maximum, as MIMIC-CXR-JPG was made from DICOM."""
    low, high = float(pixels.min()), float(pixels.max())
    return ((pixels - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)


def decode_dicom(path):
    """uint8 [H,W]: rescaled, windowed, bright = dense whatever the photometric interpretation."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    file = pydicom.dcmread(path)
    stored = file.pixel_array                     # compressed files go through Pillow
    if stored.ndim == 3:                          # frames, or colours
        stored = stored.mean(-1) if file.get("SamplesPerPixel", 1) == 3 else stored[0]
    pixels = apply_modality_lut(stored, file)
    if "WindowCenter" in file or "VOILUTSequence" in file:
        pixels = apply_voi_lut(pixels, file)
    if pixels.dtype != np.uint8:
        pixels = stretch(np.asarray(pixels, np.float32))
    return 255 - pixels if file.get("PhotometricInterpretation") == "MONOCHROME1" else pixels


def trouble(path):
    """In one word why a file cannot be read."""
    if not os.path.exists(path):
        return "missing"
    if os.path.getsize(path) == 0:
        return "zero-size"
    if not os.access(path, os.R_OK) or not os.path.isfile(path):
        return "unreadable"
    with open(path, "rb") as file:
        return "git-lfs" if file.read(40).startswith(b"version https://git-lfs") else "corrupt"


def decode_rle(rle):
    """SIIM's mask, bool [1024,1024]: pairs (gap since the last run, length), column by column."""
    numbers = np.array(rle.split(), np.int64)
    flat = np.zeros(1024 * 1024, bool)
    ends = numbers.cumsum()[1::2]
    for start, end in zip(ends - numbers[1::2], ends):
        flat[start:end] = True
    return flat.reshape(1024, 1024).T


# ------------------------------------------------------------------------------------------------
# Triplets of reports: by text.py's rules, or made elsewhere (--triplets)

def report_cells(root, item):
    """([(pathology, anatomy, 1 or 0)], state) of an image's report by text.py's rules."""
    note = item.note
    if item.report:
        try:
            with open(os.path.join(root, item.report), encoding="utf-8", errors="replace") as file:
                note = file.read()
        except OSError:
            return [], "no-report"
    cells = unique_cells(text.extract_triplets(note, buckets=False)) if note.strip() else []
    return cells, "read" if cells else "empty-report" if note or item.report else "no-report"


def unique_cells(triplets):
    """One value a (pathology, anatomy): 1 outranks 0; uncertain ones count as not mentioned."""
    cells = {}
    for pathology, anatomy, existence, *_ in triplets:
        if existence >= 0:
            cells[pathology, anatomy] = max(existence, cells.get((pathology, anatomy), 0))
    return [(*key, value) for key, value in cells.items()]


def read_triplets(source):
    """A function Item -> (cells, state) from a RadGraph .json, or from the folder of the published
    matrix and its train.json; None for the rules."""
    if source == "rules":
        return None
    if not os.path.exists(source):
        raise InputError(f"--triplets {source}: no such file or folder")
    if os.path.isdir(source):
        by_name, cells_of = read_published(source)
    else:
        cells_of = list
        by_name = {os.path.basename(key).split(".")[0]:
                   unique_cells(text.radgraph_triplets(graph, buckets=False))
                   for key, graph in text.read_radgraph(source)}

    def triplets(item):
        study = os.path.basename(item.report).split(".")[0]
        found = by_name.get(item.id, by_name.get(study))
        if found is None:
            return [], "no-report"
        cells = cells_of(found)
        return cells, "read" if cells else "empty-report"
    return triplets


def read_published(folder):
    """({image: row of the matrix}, row -> cells) of landmark_observation_adj_mtx.npy, 6.75 GB and
    therefore mapped. The json keys are paths on the authors' disks: only the file name counts."""
    rows = {}
    try:
        matrix = np.load(os.path.join(folder, "landmark_observation_adj_mtx.npy"), mmap_mode="r")
        for name in glob.glob(os.path.join(glob.escape(folder), "*.json")):
            with open(name) as file:
                rows.update((os.path.basename(key).split(".")[0], int(value["labels_id"]))
                            for key, value in json.load(file).items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--triplets {folder}: cannot read the published labels ({error})")
    if matrix.shape[1:] != (len(text.ANATOMIES), len(text.PATHOLOGIES)) or not rows:
        raise InputError(f"--triplets {folder}: needs a matrix of (reports, 51, 75), found "
                         f"{matrix.shape}, and train.json")

    def cells_of(row):
        if not 0 <= row < len(matrix):
            return []
        return [(text.PATHOLOGIES[p], text.ANATOMIES[a], int(matrix[row, a, p]))
                for a, p in np.argwhere((matrix[row] == 0) | (matrix[row] == 1))]
    return rows, cells_of


def pack(lists):
    """[(pathology, anatomy, value), ...] of each image as names, counts and flat numbers: MIMIC's
    four million cells would take a gigabyte as tuples."""
    names = sorted({name for cells in lists for cell in cells for name in cell[:2]})
    number = {name: k for k, name in enumerate(names)}
    return dict(names=names, counts=[len(cells) for cells in lists],
                flat=[n for cells in lists for p, a, v in cells for n in (number[p], number[a], v)])


def join(parts):
    """(names, where each image's cells start, cells int16 [., 3]) of all packed parts: CSR."""
    names = sorted(set().union(*(part["names"] for part in parts)))
    number, cells = {name: k for k, name in enumerate(names)}, []
    for part in parts:
        flat = np.array(part["flat"], np.int16).reshape(-1, 3)
        flat[:, :2] = np.array([number[name] for name in part["names"]], np.int16)[flat[:, :2]]
        cells.append(flat)
    counts = [count for part in parts for count in part["counts"]]
    return names, np.cumsum([0] + counts), np.concatenate(cells)


# ------------------------------------------------------------------------------------------------
# Preparation: jobs of CHUNK images, each leaving part files that say what they were made from

def stamp(root, names):
    """What a cheap look tells of some files: names, sizes, times. A hex digest."""
    digest = hashlib.sha256()
    for name in names:
        try:
            status = os.stat(os.path.join(root, name))
            digest.update(f"{name}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        except (OSError, ValueError):
            digest.update(f"{name}|-\n".encode())
    return digest.hexdigest()


def rules():
    """A digest of text.py: when its rules change the reports are read again, the images are not."""
    with open(text.__file__, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def read_part(path, made_from):
    """The JSON at `path` if it was made from the same files and options, else None."""
    try:
        with open(path) as file:
            part = json.load(file)
        return part if part["made_from"] == made_from else None
    except (OSError, ValueError, KeyError):
        return None


def write_json(path, value):
    with open(path + ".new", "w") as file:
        json.dump(value, file)
    os.replace(path + ".new", path)  # whole or not at all


def write_split(path, items, splits):
    """split.csv: `id,patient,split` of the usable images, the file that --split-file reads."""
    with open(path + ".new", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "patient", "split"))
        writer.writerows((i.id, i.patient, s) for i, s in zip(items, splits) if s != "skipped")
    os.replace(path + ".new", path)


def run_jobs(function, jobs, workers, title):
    """function(job) of every job, in order, in `workers` processes, under a progress bar; the last
    entry of a job is its items."""
    from tqdm import tqdm
    pool, run = None, map
    if workers > 1 and len(jobs) > 1:
        # fork: a spawned worker would spend two seconds on importing torch
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context(method))
        run = pool.map
    total = sum(len(job[-1]) for job in jobs)
    try:
        with tqdm(total=total, unit=" images", desc=title, mininterval=0.5) as bar:
            for job, result in zip(jobs, run(function, jobs)):
                yield result
                bar.update(len(job[-1]))
    except concurrent.futures.BrokenExecutor:
        raise InputError("a worker was killed, perhaps for want of memory; what was finished is "
                         "kept: run again with fewer --workers")
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def prepare_chunk(job):
    """One job: pixels of its images into images.npy, triplets of their reports. What an earlier
    run did with the same files stays. Returns (pixels part, cells part)."""
    root, folder, start, size, kind, given, items = job
    name = os.path.join(folder, "parts", f"{start // CHUNK:06d}")
    images = os.path.join(folder, "images.npy")
    stored = np.load(images, mmap_mode="r")
    block = stored[start:start + len(items)]
    made_from = f"{FORMAT} {size} {stamp(root, [item.path for item in items])}"
    pixels = read_part(name + ".pixels.json", made_from)
    if pixels is None or pixels["crc"] != zlib.crc32(block):
        fresh, shapes, errors = np.zeros(block.shape, np.uint8), [], []
        for k, item in enumerate(items):
            path, shape = os.path.join(root, item.path), (0, 0)
            try:
                fresh[k], shape = decode(path, size)
            except Exception as error:  # one bad file of 377,110 must not end the run
                why = trouble(path)
                errors.append((start + k, why, "" if why == "missing" else f"{error}"[:200]))
            shapes.append(shape)
        if fresh.any() or block.any():         # what was never downloaded takes no space
            with open(images, "r+b") as file:  # not through the map: a full disk would be a SIGBUS
                file.seek(stored.offset + start * size * size)
                file.write(fresh)
        pixels = dict(made_from=made_from, crc=zlib.crc32(fresh), shapes=shapes, errors=errors)
        write_json(name + ".pixels.json", pixels)

    notes = hashlib.sha256(json.dumps([given, [item.note for item in items]]).encode()).hexdigest()
    made_from = f"{FORMAT} {kind} {stamp(root, [item.report for item in items])} {notes}"
    cells = read_part(name + ".cells.json", made_from)
    if cells is None:
        found = given or [report_cells(root, item) for item in items]
        cells = dict(made_from=made_from, state=[f[1] for f in found],
                     **pack([f[0] for f in found]))
        write_json(name + ".cells.json", cells)
    return pixels, cells


def prepare(dataset, root, folder, size, workers, options, made_from):
    """Reads the labels, runs the jobs, writes the cache and at last its receipt; returns that."""
    began = time.time()
    names, items, problems = read_items(dataset, root, options)
    splits, split_source = settle_splits(items, SOURCES[dataset].made, options["split_file"])
    images, shape = os.path.join(folder, "images.npy"), (len(items), size, size)
    try:
        fits = np.load(images, mmap_mode="r").shape == shape
    except (OSError, ValueError, EOFError):
        fits = False
    if not fits:
        free = shutil.disk_usage(folder).free
        if free < math.prod(shape):
            raise InputError(f"{folder} needs {math.prod(shape) / 1e9:.1f} GB and the disk has "
                             f"{free / 1e9:.1f} GB left; --cache-dir DIR puts it elsewhere")
        # a new file, since others may have the old one mapped; takes no space until written
        np.lib.format.open_memmap(images + ".new", "w+", np.uint8, shape)
        os.replace(images + ".new", images)

    given = read_triplets(options["triplets"])
    jobs = [(root, folder, start, size, options["triplets"] if given else rules(),
             given and [given(item) for item in items[start:start + CHUNK]],
             items[start:start + CHUNK]) for start in range(0, len(items), CHUNK)]
    pixels, reports = zip(*run_jobs(prepare_chunk, jobs, workers, "preparing"))
    errors = [error for part in pixels for error in part["errors"]]
    state = [s for part in reports for s in part["state"]]
    for row, _, _ in errors:
        splits[row] = "skipped"

    raw = np.array([item.labels for item in items], np.int8).reshape(len(items), len(names))
    cell_names, cells_start, cells = join(reports)
    truth_names, truth_start, truth = join([pack([[(*t, 1) for t in i.truth] for i in items])])
    arrays = dict(shape=np.array([s for part in pixels for s in part["shapes"]], np.int32),
                  splits=np.array([SPLITS.index(s) for s in splits], np.int8),
                  has_report=np.array([s == "read" for s in state], bool),
                  labels=settle_labels(raw, names, options["uncertain"]), cells_start=cells_start,
                  cells=cells, truth_start=truth_start, truth=truth)
    index = dict(label_names=names, cell_names=cell_names, truth_names=truth_names,
                 ids=[i.id for i in items], paths=[i.path for i in items],
                 patients=[i.patient for i in items],
                 boxes={k: item.boxes for k, item in enumerate(items) if item.boxes},
                 masks={k: item.masks for k, item in enumerate(items) if item.masks is not None})
    write_json(os.path.join(folder, "receipt.json"), {})  # void until the rest is written
    with open(os.path.join(folder, "arrays.npz.new"), "wb") as file:
        np.savez(file, **arrays)
    os.replace(os.path.join(folder, "arrays.npz.new"), os.path.join(folder, "arrays.npz"))
    write_json(os.path.join(folder, "index.json"), index)
    write_split(os.path.join(folder, "split.csv"), items, splits)

    digest = hashlib.sha256(json.dumps([index, [part["crc"] for part in pixels]]).encode())
    for key in sorted(arrays):
        digest.update(arrays[key].tobytes())
    used = np.array(splits) != "skipped"
    usable = [item for item, u in zip(items, used) if u]
    values = cells[np.repeat(used, np.diff(cells_start)), 2]
    skipped = collections.Counter([kind for kind, _ in problems] + [kind for _, kind, _ in errors])
    unusable = sorted({items[row].path for row, _, _ in errors})
    unusable = unusable[::1 + len(unusable) // 1000]  # a sample: half a download is 100,000 files
    seconds = time.time() - began
    receipt = dict(
        dataset=dataset, root=root, folder=folder, size=size, views=options["views"],
        rows=len(items), images=len(usable), skipped=dict(sorted(skipped.items())),
        skipped_files=problems[:500] + [(kind, f"{items[row].path}: {why}")
                                        for row, kind, why in errors[:500]],
        patients=len({i.patient for i in usable}),
        splits={name: splits.count(name) for name in SPLITS[:3]}, split_source=split_source,
        reports=dict(collections.Counter(s for s, u in zip(state, used) if u)),
        triplets=dict(source=options["triplets"], present=int((values == 1).sum()),
                      denied=int((values == 0).sum())),
        boxes=sum(len(i.boxes) for i in usable), masks=sum(bool(i.masks) for i in usable),
        uncertain=options["uncertain"],
        labels={name: dict(present=column.count(1), absent=column.count(0),
                           uncertain=column.count(-1), blank=column.count(BLANK))
                for name, column in zip(names, raw[used].T.tolist())},
        seconds=round(seconds, 2), images_per_second=round(len(items) / max(seconds, 1e-9), 1),
        workers=workers, fingerprint=digest.hexdigest()[:16], made_from=made_from,
        files=sizes(folder), unusable=unusable, unusable_stamp=stamp(root, unusable))
    write_json(os.path.join(folder, "receipt.json"), receipt)
    return receipt


def sizes(folder):
    """Bytes of the cache's files; a truncated one shows."""
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)
            if entry.name in ("images.npy", "arrays.npz", "index.json")}


def read_receipt(folder, root, made_from):
    """The receipt of a finished cache that is up to date, else None."""
    receipt = read_part(os.path.join(folder, "receipt.json"), made_from)
    if receipt is None or receipt["files"] != sizes(folder):
        return None
    # what was missing or damaged may have been repaired since
    return receipt if stamp(root, receipt["unusable"]) == receipt["unusable_stamp"] else None


def load(dataset, root=None, *, size=None, views=None, cache_dir=None, workers=None,
         split_file=None, uncertain="ignore", labels=None, triplets="rules"):
    """A data set as a Table; the first call prepares it, later ones map the cache into memory.

    size: pixels a side (default 64 for synthetic, else 256). views: "frontal" or "all". labels:
    for mimic "chexpert", "negbio" or "manual". The rest: see add_data_flags. InputError when
    there is no such data, or it cannot be used.
    """
    root, options = where_and_how(dataset, root, views, split_file, uncertain, labels, triplets)
    size = size or (64 if dataset == "synthetic" else 256)
    workers = cores() if workers is None else workers
    if not 16 <= size <= 4096:
        raise InputError(f"--prepared-size {size} is not in 16..4096")
    if dataset == "synthetic" and (not os.path.exists(root)
                                   or os.path.isdir(root) and not os.listdir(root)):
        draw_synthetic(root, workers)
    root = find_root(dataset, root)
    other_views = "" if options["views"] == SOURCES[dataset].views else "-" + options["views"]
    folder = os.path.join(cache_dir or root, dataset if cache_dir else "",
                          f"prepared-{size}{other_views}")
    made_from = inputs(root, bool(cache_dir), dataset, size, options)
    receipt = read_receipt(folder, root, made_from)
    if receipt is None:
        try:
            os.makedirs(os.path.join(folder, "parts"), exist_ok=True)
            with open(os.path.join(folder, "lock"), "w") as lock:
                hold(lock)  # a second process waits here, then finds the work done
                receipt = read_receipt(folder, root, made_from) or prepare(
                    dataset, root, folder, size, workers, options, made_from)
        except OSError as error:
            raise InputError(f"cannot write the prepared images to {folder} ({error}); "
                             "--cache-dir DIR puts them elsewhere")
    return Table(folder, root, receipt)


def where_and_how(dataset, root, views, split_file, uncertain, labels, triplets):
    """(absolute root, options that every reader gets), after a look at what was asked for."""
    if dataset not in SOURCES:
        raise InputError(f"unknown data set {dataset!r}; choose one of {', '.join(DATASETS)}")
    if split_file and not os.path.isfile(split_file):
        raise InputError(f"--split-file {split_file}: no such file")
    labels = labels or ("drawn" if dataset == "synthetic" else "chexpert")
    return os.path.abspath(root or os.path.join("data", dataset)), dict(
        views=views or SOURCES[dataset].views, split_file=split_file, uncertain=uncertain,
        labels=labels, triplets=triplets)


def inputs(root, elsewhere, dataset, size, options):
    """What the cache depends on, as far as a look from outside tells: label files and folders."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.name.endswith(
        (".csv", ".gz", ".zip", ".txt", ".json"))
        or entry.is_dir() and not entry.name.startswith("prepared-"))
    files = [os.path.abspath(options["split_file"])] if options["split_file"] else []
    if options["triplets"] != "rules":
        files += [os.path.abspath(options["triplets"])]
    return (f"{FORMAT} {root if elsewhere else ''} {dataset} {size} {json.dumps(options)} "
            f"{rules()} {stamp(root, names + files)}")


def cores():
    """The cores this process may use; a container's are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def draw_synthetic(root, workers, count=12_500):
    """12,500 phantoms of 64 pixels, 10,000 of them for training; --root takes any other set."""
    print(f"drawing {count:,} synthetic radiographs into {root} (once)", file=sys.stderr)
    shutil.rmtree(root + ".part", ignore_errors=True)
    phantom.write("mimic", root + ".part", count, 0, workers=workers)
    if os.path.isdir(root):
        os.rmdir(root)
    os.rename(root + ".part", root)  # so that a half-drawn set is never taken for a whole one


def hold(lock):
    """Waits for the only right to prepare; the system frees it however the process ends."""
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass


# ------------------------------------------------------------------------------------------------
# The doctor

def check_chunk(job):
    """([(row, kind, what)] of a job's unusable images and reports, [(hash, row)] of its files)."""
    root, start, items = job
    found, hashes = [], []
    for row, item in enumerate(items, start):
        path = os.path.join(root, item.path)
        try:
            decode(path, 64)
            with open(path, "rb") as file:
                hashes.append((hashlib.sha256(file.read()).hexdigest(), row))
        except Exception as error:
            kind = trouble(path)
            found.append((row, kind, item.path if kind == "missing"
                          else f"{item.path}: {error}"[:200]))
        if item.report or item.note:
            state = report_cells(root, item)[1]
            if state != "read":
                found.append((row, "empty-report", f"{item.report or item.id}: {state}"))
    return found, hashes


def check(dataset, root, options, workers, fix_list=None):
    """Reads every file, prints what is wrong and how often; returns the number of problems."""
    root = find_root(dataset, root)
    _, items, problems = read_items(dataset, root, options)
    known = {os.path.normpath(item.path) for item in
             read_items(dataset, root, dict(options, views="all"))[1]}
    splits, split_source = settle_splits(items, SOURCES[dataset].made, options["split_file"])
    jobs = [(root, start, items[start:start + CHUNK]) for start in range(0, len(items), CHUNK)]
    bad, first, where = set(), {}, {}
    for found, hashes in run_jobs(check_chunk, jobs, workers, "checking"):
        for row, kind, what in found:
            problems.append((kind, what))
            bad.add(row)
        for digest, row in hashes:
            if first.setdefault(digest, row) != row:
                problems.append(("duplicate", f"{items[row].path} = {items[first[digest]].path}"))
                bad.add(row)
    for item, split in zip(items, splits):
        if where.setdefault(item.patient, split) != split:
            problems.append(("patient-leak", f"{item.patient}: {where[item.patient]}, {split}"))
    problems += [("no-label", path) for path in image_paths(root) if path not in known]

    print(f"{dataset} at {root}: {len(items)} images, {len(items) - len(bad)} usable")
    print(f"split: {split_source}")
    for kind, count in collections.Counter(kind for kind, _ in problems).most_common():
        print(f"{kind:<18}{count:>8}   e.g. "
              + "; ".join(str(what) for k, what in problems if k == kind)[:160])
    if fix_list:
        splits = ["skipped" if k in bad else split for k, split in enumerate(splits)]
        try:
            write_split(fix_list, items, splits)
        except OSError as error:
            raise InputError(f"--fix-list {fix_list}: {error.strerror}")
        print(f"wrote the usable images to {fix_list}; --split-file {fix_list} uses only them")
    print("clean" if not problems else f"{len(problems)} problems")
    return len(problems)


# ------------------------------------------------------------------------------------------------
# The prepared data set

class Table:
    """N images of one data set, memory-mapped, with what is known about each.

    images uint8 [N,S,S]; ids, paths, patients [N]; splits [N]; labels int8 [N,L] (1, 0, -1
    unknown) of `label_names`, each with its name in our vocabulary or None in `label_pathologies`;
    shape int32 [N,2] height and width of the files; has_report bool [N], whether a report gave
    any cell; boxes [N] lists of (label, x, y, width, height) in fractions of the image. A row
    whose file was unusable stays, black and in no split: row numbers are stable.
    """

    def __init__(self, folder, root, receipt):
        with open(os.path.join(folder, "index.json")) as file:
            index = json.load(file)
        arrays = np.load(os.path.join(folder, "arrays.npz"))
        self.dataset, self.receipt = receipt["dataset"], receipt
        self.root, self.folder = root, folder
        self.images = np.load(os.path.join(folder, "images.npy"), mmap_mode="r")  # [N,S,S]
        self.size = self.images.shape[1]
        self.ids, self.paths, self.patients = index["ids"], index["paths"], index["patients"]
        self.splits = np.array(SPLITS)[arrays["splits"]]
        self.shape, self.labels = arrays["shape"], arrays["labels"]
        self.label_names = index["label_names"]
        self.label_pathologies = [label_pathology(name) for name in self.label_names]
        self.has_report = arrays["has_report"]
        self.has_reports = bool(self.has_report.any())
        self.boxes = [index["boxes"].get(str(i), []) for i in range(len(self.ids))]
        self._masks = {int(i): masks for i, masks in index["masks"].items()}
        self._masked = {mask[0] for masks in self._masks.values() for mask in masks}
        self._cells = index["cell_names"], arrays["cells_start"], arrays["cells"]
        self._truth = index["truth_names"], arrays["truth_start"], arrays["truth"]
        self._places = {}

    def __len__(self):
        return len(self.ids)

    def __reduce__(self):
        """To another process goes where the images lie, not the images (25 GB of MIMIC)."""
        return Table, (self.folder, self.root, self.receipt)

    def rows(self, split="all"):
        """Row numbers of a split, or of all usable images."""
        return np.flatnonzero(self.splits != "skipped" if split == "all" else self.splits == split)

    def cells(self, i):
        """[(pathology, anatomy, 1 present or 0 denied)] of image i's report, by their own names."""
        names, start, cells = self._cells
        return [(names[p], names[a], int(v)) for p, a, v in cells[start[i]:start[i + 1]]]

    def existence(self, index, pathologies, anatomies):
        """int8 [B,n,m] of the images in `index`: 1 present, 0 denied, -1 not mentioned."""
        return self._dense(self._cells, index, pathologies, anatomies, -1)

    def truth(self, index, pathologies, anatomies):
        """int8 [B,n,m] of what phantom.py drew (1) and did not (0); None for real data."""
        if self.dataset != "synthetic":
            return None
        return self._dense(self._truth, index, pathologies, anatomies, 0)

    def _dense(self, store, index, pathologies, anatomies, blank):
        names, start, cells = store
        key = blank, tuple(pathologies), tuple(anatomies)
        if key not in self._places:
            self._places[key] = (place(names, key[1], "tail_abnorm_obs"),
                                 place(names, key[2], "other"))
        columns, rows = self._places[key]
        index = np.asarray(index, np.int64).reshape(-1)
        count = start[index + 1] - start[index]
        image = np.repeat(np.arange(len(index)), count)
        within = np.arange(len(image)) - np.repeat(count.cumsum() - count, count)
        p, a, value = cells[np.repeat(start[index], count) + within].T
        row, column = rows[a], columns[p]
        dense = np.full((len(index), len(key[2]), len(key[1])), blank, np.int8)  # [B,n,m]
        for now in (0, 1):  # several names may share a place ("other"): presence is written last
            hit = (value == now) & (row >= 0) & (column >= 0)
            dense[image[hit], row[hit], column[hit]] = now
        return dense

    def located(self, i):
        """The labels that boxes or masks locate in image i."""
        return sorted({mark[0] for mark in (*self.boxes[i], *self._masks.get(int(i), ()))})

    def mask(self, i, label=None):
        """bool [H,W], the union of image i's masks (of one label); None where nobody drew any."""
        if i not in self._masks or label is not None and label not in self._masked:
            return None
        parts = []
        for name, kind, source, bit in self._masks[i]:
            if label not in (None, name):
                continue
            if kind == "rle":
                parts.append(decode_rle(source))
            else:
                part = read_image(os.path.join(self.root, source))
                parts.append(part > 127 if bit < 0 else part >> bit & 1 > 0)
        return np.any(parts, 0) if parts else np.zeros(self.shape[i], bool)


def place(names, queries, bucket):
    """int64 [len(names)]: position of each name in `queries`, else of the bucket, else -1."""
    position = {name: k for k, name in enumerate(queries)}
    return np.array([position.get(name, position.get(bucket, -1)) for name in names], np.int64)


# ------------------------------------------------------------------------------------------------
# Batches

class Batches(torch.utils.data.Dataset):
    """Training batches by global step number: step s is the same batch whenever it is asked for.

    batch_size is the global one; of its images rank r of `world` gets the r-th part. Each epoch
    is a permutation seeded by (seed, epoch), without its last images that fill no batch. Images
    without a usable report teach nothing and are left out. Item: {"images" uint8 [B,S,S],
    "existence" int8 [B,n,m], "rows" int64 [B]}. Use with DataLoader(batches, batch_size=None,
    sampler=range(first_step, last_step)).
    """

    def __init__(self, table, rows, batch_size, seed, pathologies, anatomies, rank=0, world=1):
        if batch_size % world:
            raise InputError(f"--batch-size {batch_size} is not a multiple of {world} processes")
        rows = np.asarray(rows)
        self.row_numbers = rows[table.has_report[rows]]
        if not len(self.row_numbers):
            raise InputError(f"{table.root}: no training image has a report with a usable triplet")
        self.table, self.batch_size, self.seed = table, batch_size, seed
        self.pathologies, self.anatomies = tuple(pathologies), tuple(anatomies)
        part = batch_size // world
        self.part = slice(rank * part, (rank + 1) * part)
        self.steps = max(1, len(self.row_numbers) // batch_size)
        self.epoch, self.order = None, None

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        epoch, step = divmod(int(step), self.steps)
        if epoch != self.epoch:
            shuffle = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, shuffle.permutation(self.row_numbers)
        batch = self.order[step * self.batch_size:(step + 1) * self.batch_size]
        batch = np.resize(batch, self.batch_size)[self.part]  # fewer images than one batch: repeat
        return {"images": torch.from_numpy(self.table.images[batch]),          # [B,S,S]
                "existence": torch.from_numpy(
                    self.table.existence(batch, self.pathologies, self.anatomies)),  # [B,n,m]
                "rows": torch.from_numpy(batch)}


# ------------------------------------------------------------------------------------------------
# Augmentation, on whatever device the images are

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def normalise(images):
    """float [B,S,S] in 0..255 -> float [B,3,S,S], grey in all channels, ImageNet mean and std."""
    scale = torch.tensor([1 / (255 * s) for s in STD]).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD)]).view(1, 3, 1, 1)
    scale, shift = (t.to(images.device, non_blocking=True) for t in (scale, shift))
    return torch.addcmul(shift, images[:, None], scale)


def to_input(images, size):
    """uint8 [B,S,S] -> float [B,3,size,size], not augmented."""
    x = images.float()
    if x.shape[-1] != size:
        x = F.interpolate(x[:, None], (size, size), mode="bilinear", antialias=True)[:, 0]
    return normalise(x)


def side_swap_index(anatomies):
    """int64 [n]: the row that holds each anatomy's mirror partner (its own for unsided ones); -1
    where the partner is not in the list."""
    position = {name: i for i, name in enumerate(anatomies)}
    return torch.tensor([position.get(text.swap_sides(name), -1) for name in anatomies])


# Photometric operations: x float [b,S,S] in 0..255, factor [b] around 1; the same as Pillow's

def autocontrast(x, factor):
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return torch.where(high > low, (x - low) * (255 / (high - low).clamp(min=1e-6)), x)


def equalize(x, factor):
    """The table is the running histogram in steps of (pixels - brightest bin) / 255."""
    level = x.round().long().flatten(1)                                        # [b,S*S]
    # whole numbers: on CUDA a cumulative sum of floats is not deterministic
    histogram = level.new_zeros(len(x), 256).scatter_add_(1, level, torch.ones_like(level))
    brightest = histogram.gather(1, level.amax(1, keepdim=True))
    step = (level.shape[1] - brightest) // 255                                 # [b,1]
    table = (histogram.cumsum(1) - histogram + step // 2) // step.clamp(min=1)
    table = table.clamp(0, 255).to(x.dtype)
    return torch.where(step[:, :, None] > 0, table.gather(1, level).view_as(x), x)


def brightness(x, factor):
    return (x * factor[:, None, None]).clamp(0, 255)


def sharpness(x, factor):
    """Away from (factor > 1) or towards the mean of a 3x3 with weight 5 on the centre."""
    total = F.avg_pool2d(x[:, None], 3, stride=1)[:, 0] * 9
    inner = x[:, 1:-1, 1:-1]
    smooth = (total + 4 * inner) / 13
    x = x.clone()
    x[:, 1:-1, 1:-1] = (smooth + (inner - smooth) * factor[:, None, None]).clamp(0, 255)
    return x


PHOTOMETRIC = dict(autocontrast=autocontrast, equalize=equalize, brightness=brightness,
                   sharpness=sharpness)
OPS = ("identity", *PHOTOMETRIC, "shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def augment(images, existence, swap, generator, size, crop=(0.2, 1.0), flip="swap", ops=2,
            magnitude=7):
    """Random resized crop, flip, RandAugment and normalisation of a batch.

    images uint8 [B,S,S]; existence [B,n,m] or None; swap: side_swap_index(anatomies); crop: range
    of the area kept; flip: "swap" exchanges left and right in existence, "naive" does not (the
    published code), "none" never flips; magnitude: of 30, as in torchvision. Returns
    (float [B,3,size,size], existence). The random numbers come from `generator` on the CPU, the
    work is done where the images are, without waiting for the device.
    """
    B, S, device = len(images), images.shape[-1], images.device

    def draw(*shape):
        return torch.rand(*shape, generator=generator)

    def there(tensor):
        return tensor.to(device, non_blocking=True)

    # crop: area in `crop`, aspect ratio in 3/4..4/3 as far as it fits into the square
    area = crop[0] + (crop[1] - crop[0]) * draw(B)
    shape = (draw(B) * 2 - 1) * (-area.log()).clamp(max=math.log(4 / 3)) / 2
    wide, high = area.sqrt() * shape.exp(), area.sqrt() * (-shape).exp()
    x0, y0 = (draw(B) * 2 - 1) * (1 - wide), (draw(B) * 2 - 1) * (1 - high)  # centre, -1..1
    mirrored = there((draw(B) < 0.5) & (flip != "none"))

    choice = (draw(B, ops) * len(OPS)).long()
    share = torch.where(draw(B, ops) < 0.5, -1.0, 1.0) * magnitude / 30  # of each op's range
    # A maps the output to the crop, in coordinates -1..1; torchvision's ranges
    A = torch.eye(3).repeat(B, 1, 1)                                           # [B,3,3]
    for k in range(ops):
        op = {name: choice[:, k] == i for i, name in enumerate(OPS)}
        angle = torch.where(op["rotate"], share[:, k] * math.radians(30), 0.0)
        one = torch.eye(3).repeat(B, 1, 1)
        one[:, 0, 0] = one[:, 1, 1] = angle.cos()
        one[:, 0, 1] = torch.where(op["shear_x"], share[:, k] * 0.3, -angle.sin())
        one[:, 1, 0] = torch.where(op["shear_y"], share[:, k] * 0.3, angle.sin())
        one[:, 0, 2] = torch.where(op["translate_x"], share[:, k] * 2 * 150 / 331, 0.0)
        one[:, 1, 2] = torch.where(op["translate_y"], share[:, k] * 2 * 150 / 331, 0.0)
        A = A @ one

    if flip == "swap" and existence is not None:
        swap = there(torch.as_tensor(swap))
        alone = (swap < 0)[None, :, None]
        mirrored = mirrored & ~((existence >= 0) & alone).flatten(1).any(1)
        partner = torch.where(swap < 0, torch.arange(len(swap), device=device), swap)
        existence = torch.where(mirrored[:, None, None], existence[:, partner], existence)
    A, x0, y0, wide, high = map(there, (A, x0, y0, wide, high))
    wide = torch.where(mirrored, -wide, wide)
    theta = torch.stack([A[:, 0] * wide[:, None], A[:, 1] * high[:, None]], 1)  # [B,2,3]
    theta[:, 0, 2] += x0
    theta[:, 1, 2] += y0
    x = images[:, None].float()                                                # [B,1,S,S]
    if S >= 2 * size:  # sampling every other pixel would alias
        x = F.avg_pool2d(x, S // size)
    # black outside the image, but its outer half pixels are not mixed with black
    S = x.shape[-1]
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    # what F.affine_grid gives, at half its cost
    line = ((torch.arange(size, device=device) * 2 + 1) / size - 1)[:, None]   # pixel centres
    across, down, offset = (theta * (S / (S + 2)))[:, None].unbind(3)          # [B,1,2] each
    grid = (across * line)[:, None] + (down * line + offset)[:, :, None]       # [B,size,size,2]
    x = F.grid_sample(x, grid, mode="bilinear", align_corners=False)[:, 0]     # [B,size,size]

    for k in range(ops):
        for name, change in PHOTOMETRIC.items():
            chosen = (choice[:, k] == OPS.index(name)).nonzero()[:, 0]  # known on the CPU: no wait
            if len(chosen):
                factor = there(1 + 0.9 * share[chosen, k])
                chosen = there(chosen)
                x[chosen] = change(x[chosen], factor)
    return normalise(x), existence


# ------------------------------------------------------------------------------------------------
# Command line

def add_data_flags(parser):
    """The flags that every script shares; `load_from_args` reads them."""
    group = parser.add_argument_group("data")
    group.add_argument("--root", help="the data as downloaded (default data/<dataset>)")
    group.add_argument("--cache-dir", help="where prepared images go (default: inside the root)")
    group.add_argument("--prepared-size", type=int, help="pixels a side of the stored images "
                       "(default 256, synthetic 64; at least the image size)")
    group.add_argument("--views", choices=("frontal", "all"), help="default: frontal for chexpert, "
                       "openi and covid-chestxray, else all")
    group.add_argument("--split-file", help="split.csv of ours or MedKLIP's RSNA test csv")
    group.add_argument("--uncertain", default="ignore",
                       choices=("ignore", "zeros", "ones", "gloria"),
                       help="what -1 labels count as; gloria: its choice for each label")
    group.add_argument("--labels", choices=("chexpert", "negbio", "manual"),
                       help="label file of mimic (default chexpert)")
    group.add_argument("--triplets", default="rules", help="rules, a RadGraph .json, or a folder "
                       "with landmark_observation_adj_mtx.npy and train.json")
    group.add_argument("--workers", type=int, help="processes (default: one a core)")


def load_from_args(args):
    """load() with a script's flags; the data set is args.dataset or args.data."""
    dataset = getattr(args, "dataset", None) or args.data
    size = args.prepared_size or max(64 if dataset == "synthetic" else 256,
                                     getattr(args, "image_size", None) or 0)
    return load(dataset, args.root, size=size, views=args.views, cache_dir=args.cache_dir,
                workers=args.workers, split_file=args.split_file, uncertain=args.uncertain,
                labels=args.labels, triplets=args.triplets)


def print_receipt(receipt):
    for key, value in receipt.items():
        if key in ("made_from", "unusable", "unusable_stamp", "skipped_files", "labels", "files"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
        print(f"{key.replace('_', ' '):<18} {value}")
    print(f"\n{'label':<28}{'present':>9}{'absent':>9}{'uncertain':>11}{'blank':>9}")
    for name, count in receipt["labels"].items():
        print(f"{name:<28}{count['present']:>9}{count['absent']:>9}{count['uncertain']:>11}"
              f"{count['blank']:>9}")
    for kind, what in receipt["skipped_files"][:5]:
        print(f"skipped, {kind}: {what}"[:100])


def parse_args(argv=None):
    parser = Parser(prog="data.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="synthetic", choices=DATASETS)
    add_data_flags(parser)
    parser.add_argument("--check", action="store_true",
                        help="read every file; exit status 0 only if all is well")
    parser.add_argument("--fix-list", help="with --check: write the usable images to this file, "
                        "for --split-file; an image with an empty report counts as unusable")
    return parser.parse_args(argv)


def main(args):
    if args.fix_list and not args.check:
        raise InputError("--fix-list needs --check, which finds what to leave out")
    if not args.check:
        return print_receipt(load_from_args(args).receipt)
    root, options = where_and_how(args.dataset, args.root, args.views, args.split_file,
                                  args.uncertain, args.labels, args.triplets)
    workers = cores() if args.workers is None else args.workers
    sys.exit(1 if check(args.dataset, root, options, workers, args.fix_list) else 0)


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
