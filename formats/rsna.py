"""RSNA Pneumonia Detection Challenge, as on Kaggle (stage 2) or as on the RSNA's site.

    stage_2_train_images/<patientId>.dcm            Kaggle
    stage_2_train_labels.csv                        patientId,x,y,width,height,Target: row per box
    mdai_rsna_project.../<study>/<series>/<SOPInstanceUID>.dcm       the RSNA's site
    pneumonia-challenge-dataset-mappings_2018.json  the NIH image that each was taken from
    rsna_test.csv (any *rsna*test*.csv, test.csv)   ID,img_path,boxes,classes: MedKLIP's test images

MedKLIP's csv makes its 5,337 images the test set; without Kaggle's it gives their labels. Traps:
patientId is an image, only the mapping knows the patient; boxes says nan where classes is 0.
"""
import collections
import io
import json
from pathlib import Path

import numpy as np

from formats import Item, box, csv_rows, find, paths_by_stem, skip_if_bad

FILES = ("stage_2_train_labels.csv", "*rsna*test*.csv", "test.csv")
GET = "kaggle competitions download -c rsna-pneumonia-detection-challenge"
SHARES, VIEWS, SIZE = (0.7, 0.15), "all", 1024  # boxes and masks are of this size
LABELS = ["Pneumonia"]
TABLES = {"stage_2_train_labels.csv": "patientId,x,y,width,height,Target"}


def read(root, views, labels, problems):
    paths, boxes = paths_by_stem(root), collections.defaultdict(list)
    patients, stems, tests = {}, {}, set()  # NIH's patients and the site's file stems by patientId
    mapping = find(root, "pneumonia-challenge-dataset-mappings_2018.json")
    for row in json.loads(mapping.read_text("utf-8")) if mapping else []:
        patients[row["subset_img_id"]] = row["img_id"].split("_")[0]
        stems[row["subset_img_id"]] = row["SOPInstanceUID"]
    for row in csv_rows(root, "stage_2_train_labels.csv"):
        found = boxes[row["patientId"]]
        if row["Target"] != "0":
            found.append([row["x"], row["y"], row["width"], row["height"]])
    for row in csv_rows(root, "*rsna*test*.csv", "test.csv"):
        tests.add(row["ID"])
        stems.setdefault(row["ID"], Path(row["img_path"]).stem)
        found = row["boxes"].split("|") if row["classes"] == "1" else []
        boxes.setdefault(row["ID"], [sides.split(";") for sides in found])
    for name, found in boxes.items():
        path = paths.get(name) or paths.get(stems.get(name))
        with skip_if_bad(problems, f"box of {name}"):
            located = tuple(box(LABELS[0], sides) for sides in found)
            yield Item(name, path or f"stage_2_train_images/{name}.dcm", patients.get(name, name),
                       "test" if name in tests else "", (int(bool(found)),), masks=located)


def save_dicom(film, image):
    """A file like RSNA's and SIIM's: 8-bit MONOCHROME2 in lossy JPEG."""
    import pydicom
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    file = pydicom.Dataset()
    file.set_pixel_data(np.asarray(image), "MONOCHROME2", 8, generate_instance_uid=False)
    file.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    file.PixelData = pydicom.encaps.encapsulate([jpeg.getvalue()])
    file.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.SOPInstanceUID = f"1.2.276.0.7230010.3.1.4.{film.index}"
    file.save_as(film.path, enforce_file_format=True)


def write(root, f):
    name, table = f"{f.index:08x}-0000-4000-8000-{f.patient:012x}", "stage_2_train_labels.csv"
    f.draw(f"{root}/stage_2_train_images/{name}.dcm", sure=("pneumonia", 0.15))
    rows = [(table, name, *(side * SIZE / f.size for side in found.box), 1) for found in f.findings
            if found.pathology in ("pneumonia", "opacity", "consolidation")]
    return rows or [(table, name, "", "", "", "", 0)]
