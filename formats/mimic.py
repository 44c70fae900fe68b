"""MIMIC-CXR-JPG 2.0.0 or 2.1.0, with the reports of MIMIC-CXR unpacked into the same folder.

    files/p10/p10000032/s50414267/02aa804e-....jpg      patient, study, image (dicom_id)
    files/p10/p10000032/s50414267.txt                   the report (or below mimic-cxr-reports/)
    mimic-cxr-2.0.0-split.csv.gz                        dicom_id,study_id,subject_id,split
    mimic-cxr-2.0.0-metadata.csv.gz                     dicom_id,...,ViewPosition,...
    mimic-cxr-2.0.0-chexpert.csv.gz  -negbio.csv.gz     subject_id,study_id, 14 labels
    mimic-cxr-2.1.0-test-set-labeled.csv                study_id, 14 labels of 687 test studies
    boxes.csv  masks/<dicom_id>.png                     where each finding is: phantoms only

--labels chexpert and negbio were read from the reports, manual are radiologists'. Release 2.1.0
keeps the old file names; its test set says Airspace Opacity.
"""
import collections
from pathlib import Path

import numpy as np

from cli import InputError
from formats import Item, Mask, csv_rows, find, skip_if_bad
from formats.chexpert import LABELS, label_values, said
from text import PATHOLOGIES

FILES = ("mimic-cxr-2.0.0-split.csv",)
GET = "https://physionet.org/content/mimic-cxr-jpg, its reports /content/mimic-cxr (credentialed)"
SHARES, VIEWS, SIZE = (0.8, 0.1), "all", 64   # the published run took all views
TABLES = {
    "boxes.csv": "dicom_id,finding,pathology,anatomy,x,y,width,height",
    "mimic-cxr-2.0.0-chexpert.csv.gz": "study_id," + ",".join(LABELS),
    "mimic-cxr-2.0.0-metadata.csv.gz": "dicom_id,ViewPosition,Rows,Columns",
    # the split file comes last: a folder without it was not finished
    "mimic-cxr-2.0.0-split.csv.gz": "dicom_id,study_id,subject_id,split"}


def read_labels(root, labels, problems):
    """{study: its 14 labels} of one label file."""
    kind, values = "test-set-labeled" if labels == "manual" else labels, {}
    table = f"mimic-cxr-2.?.0-{kind}.csv"
    if labels in ("negbio", "manual") and find(root, table) is None:
        raise InputError(f"{root} lacks {table}; leave --labels out")
    for row in csv_rows(root, table):
        if "Airspace Opacity" in row:
            row["Lung Opacity"] = row["Airspace Opacity"]
        with skip_if_bad(problems, f"labels of study {row['study_id']}"):
            values[row["study_id"]] = label_values(row)
    return values


def read(root, views, labels, problems):
    boxes = collections.defaultdict(list)
    for row in csv_rows(root, "boxes.csv"):
        boxes[row["dicom_id"]].append(row)
    view_of = {row["dicom_id"]: row["ViewPosition"]
               for row in csv_rows(root, "mimic-cxr-2.0.0-metadata.csv")}
    if not view_of:
        raise InputError(f"{root} lacks mimic-cxr-2.0.0-metadata.csv, which lies beside split.csv")
    values = read_labels(root, labels, problems)
    above = "mimic-cxr-reports/" if Path(root, "mimic-cxr-reports").is_dir() else ""
    for row in csv_rows(root, *FILES):
        name, study, patient = row["dicom_id"], row["study_id"], row["subject_id"]
        folder, bits = f"files/p{patient[:2]}/p{patient}/s{study}", f"masks/{name}.png"
        with skip_if_bad(problems, f"split.csv: {name}"):
            frontal = view_of[name] in ("PA", "AP")
            if not study or row["split"] not in ("train", "validate", "test"):
                raise ValueError(f"split {row['split']!r}")
            drawn = boxes.get(name, ())
            truth = tuple((box["pathology"], box["anatomy"]) for box in drawn)
            masks = [Mask(box["pathology"], "bit", bits, int(box["finding"])) for box in drawn]
            if views == "all" or frontal:
                yield Item(name, f"{folder}/{name}.jpg", patient, row["split"],
                           values.get(study, (-1,) * len(LABELS)), f"{above}{folder}.txt",
                           masks=tuple(masks), absent=PATHOLOGIES if boxes else (), truth=truth)


def write(root, f):
    patient = str(10_000_000 + f.patient * 7_654_321 % 9_999_991)  # in no visible order
    study = str(50_000_000 + f.index * 7_654_321 % 9_999_991)
    name = np.random.default_rng([2, f.index]).bytes(20).hex("-", 4)
    path = f"{root}/files/p{patient[:2]}/p{patient}/s{study}"
    f.draw(f"{path}/{name}.jpg", f"{path}.txt", f"{root}/masks/{name}.png")
    boxes = [("boxes.csv", name, k, found.pathology, found.anatomy, *found.box)
             for k, found in enumerate(f.findings)]
    return [*boxes, ("mimic-cxr-2.0.0-chexpert.csv.gz", study, *said(f.mentions).values()),
            ("mimic-cxr-2.0.0-metadata.csv.gz", name, f.view, f.size, f.size),
            ("mimic-cxr-2.0.0-split.csv.gz", name, study, patient, f.split)]
