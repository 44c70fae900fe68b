"""RSNA Pneumonia Detection Challenge, as on Kaggle (stage 2) or as on the RSNA's site.

    stage_2_train_images/<patientId>.dcm            Kaggle
    stage_2_train_labels.csv                        patientId,x,y,width,height,Target: row per box
    mdai_rsna_project.../<study>/<series>/<SOPInstanceUID>.dcm       the RSNA's site
    pneumonia-challenge-dataset-mappings_2018.json  the NIH image that each was taken from
    rsna_test.csv (any *rsna*test*.csv, test.csv)   ID,img_path,boxes,classes: MedKLIP's test images

MedKLIP's csv in the root makes its 5,337 images the test set and all others train; without
Kaggle's csv it gives the labels of its own images. Traps: patientId is an image, only the mapping
knows the patient; boxes says nan or nothing where classes is 0.
"""
import collections
import io
import json
from pathlib import Path

from formats import Item, box, csv_rows, find, paths_by_stem, write_csv

NAME = "RSNA Pneumonia"
FILES = ("stage_2_train_labels.csv", "*rsna*test*.csv", "test.csv")
GET = "kaggle competitions download -c rsna-pneumonia-detection-challenge"
SHARES, VIEWS, SIZE = (0.7, 0.15), "all", 1024
FRAME = 1024  # boxes are in its pixels
LABELS = ["Pneumonia"]


def read(root, views, labels):
    items, problems, paths = [], [], paths_by_stem(root)
    sources = {}  # patientId: (NIH patient, file stem)
    mapping = find(root, "pneumonia-challenge-dataset-mappings_2018.json")
    for row in json.loads(mapping.read_text("utf-8")) if mapping else []:
        sources[row["subset_img_id"]] = row["img_id"].split("_")[0], row.get("SOPInstanceUID")
    boxes, tests = collections.defaultdict(list), {}  # patientId: its boxes; its file stem
    kaggle = find(root, "stage_2_train_labels.csv")
    for row in csv_rows(find(root, "*rsna*test*.csv", "test.csv")):
        if {"ID", "img_path", "boxes", "classes"} <= row.keys():
            tests[row["ID"]] = Path(row["img_path"]).stem
            if kaggle is None:
                found = row["boxes"].split("|") if row["classes"] == "1" else []
                boxes[row["ID"]] = [sides.split(";") for sides in found]
    for row in csv_rows(kaggle, "patientId", "x", "y", "width", "height", "Target"):
        found = boxes[row["patientId"]]
        if row["Target"] != "0":
            found.append([row["x"], row["y"], row["width"], row["height"]])
    for name, found in boxes.items():
        patient, stem = sources.get(name, (name, None))
        path = paths.get(name) or paths.get(stem) or paths.get(tests.get(name))
        split = ""
        if tests:
            split = "test" if name in tests else "train"
        try:
            items.append(Item(name, path or f"stage_2_train_images/{name}.dcm", patient, split,
                              (int(bool(found)),),
                              boxes=tuple(box(LABELS[0], sides, FRAME, FRAME) for sides in found)))
        except ValueError:
            problems.append(("unreadable-label", f"box of {name}"))
    return LABELS, items, problems


def name_films(films):
    """Persons, and study, series and image UIDs, in the manner of RSNA and SIIM."""
    for f in films:
        f.person = f"{f.index:08x}-0000-4000-8000-{f.patient:012x}"
        f.uids = [f"1.2.276.0.7230010.3.1.{level}.8323329.{f.index + 301}.1517875217.{f.index}"
                  for level in (2, 3, 4)]


def save_dicom(film, image):
    """A file like RSNA's and SIIM's: 8-bit MONOCHROME2 in lossy JPEG, and an age without a unit."""
    import pydicom
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    file.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.StudyInstanceUID, file.SeriesInstanceUID, file.SOPInstanceUID = film.uids
    file.PatientName, file.PatientID, file.PatientSex = film.person, film.person, film.sex
    file.Modality, file.ViewPosition, file.LossyImageCompression = "CR", film.view, "01"
    file.Rows, file.Columns = image.height, image.width
    file.PhotometricInterpretation, file.SamplesPerPixel = "MONOCHROME2", 1
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
    file.PixelData = pydicom.encaps.encapsulate([jpeg.getvalue()])
    file["PixelData"].VR = "OB"
    with pydicom.config.disable_value_validation():  # it would want the age as 058Y
        file.PatientAge = str(film.age)
        file.save_as(film.image, enforce_file_format=True)


def write(root, films, draw):
    """Kaggle's tree."""
    name_films(films)
    for f in films:
        f.image = f"{root}/stage_2_train_images/{f.person}.dcm"
        f.sure = ("pneumonia", 0.15)
    rows = []
    for f in draw(films):
        boxes = [[float(round(side * FRAME / f.size)) for side in finding.box]
                 for finding in f.findings
                 if finding.pathology in ("pneumonia", "opacity", "consolidation")]
        rows += [(f.person, *sides, 1) for sides in boxes] or [(f.person, "", "", "", "", 0)]
    write_csv(f"{root}/stage_2_train_labels.csv", "patientId,x,y,width,height,Target", rows)
