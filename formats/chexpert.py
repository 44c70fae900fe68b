"""CheXpert, full or small, and its test release.

    CheXpert-v1.0-small/  train.csv valid.csv        Path,Sex,Age,Frontal/Lateral,AP/PA, 14 labels
    (or CheXpert-v1.0/)   train/patient00001/study1/view1_frontal.jpg  view2_lateral.jpg ...
                          valid/patient64541/study1/view1_frontal.jpg ...
    CheXpert/             val_labels.csv test_labels.csv  val/ test/      Path, 14 labels
                          or groundtruth.csv, a row per study             Study, 14 labels

In train a labeller read the reports: 1.0 present, 0.0 absent, -1.0 uncertain, blank not mentioned.
Radiologists read valid and test; there are no blanks. Traps: Path begins with the folder of the
release; val_labels.csv says valid/ where the folder is val/. Without images of the test release
valid is the test set, and the loader takes validate from train.
"""
from pathlib import Path

from formats import BLANK, Item, csv_rows, find, write_csv

NAME = "CheXpert"
FILES = ("train.csv", "valid.csv", "val_labels.csv")
GET = "https://stanfordmlgroup.github.io/competitions/chexpert"
SHARES, VIEWS, SIZE = (0.9, 0.1), "frontal", 390

LABELS = {  # in the order of the csv: what phantom.py draws for each
    "No Finding": set(), "Enlarged Cardiomediastinum": set(), "Cardiomegaly": {"cardiomegaly"},
    "Lung Opacity": {"opacity", "consolidation", "pneumonia", "edema", "atelectasis"},
    "Lung Lesion": {"nodule", "mass"}, "Edema": {"edema"}, "Consolidation": {"consolidation"},
    "Pneumonia": {"pneumonia"}, "Atelectasis": {"atelectasis"}, "Pneumothorax": {"pneumothorax"},
    "Pleural Effusion": {"effusion"}, "Pleural Other": set(), "Fracture": {"fracture"},
    "Support Devices": {"tube"}}
VALUE = {"1.0": 1, "0.0": 0, "-1.0": -1, "1": 1, "0": 0, "-1": -1, "": BLANK}  # of a cell


def label_values(row):
    """The 14 labels of a csv row. KeyError where a cell holds something else."""
    return tuple(VALUE[row.get(label, "")] for label in LABELS)


def read(root, views, labels):
    items, problems = [], []
    for split, tables in [("train", ["train.csv"]), ("validate", ["valid.csv", "val_labels.csv"]),
                          ("test", ["test_labels.csv", "groundtruth.csv"])]:
        for row in csv_rows(find(root, *tables)):
            path = row.get("Path") or row.get("Study", "")
            if path.startswith("CheXpert"):
                path = path.partition("/")[2]
            if path.startswith("valid/") and Path(root, "val").is_dir():
                path = path.replace("valid", "val", 1)
            try:
                patient, values = path.split("/")[1], label_values(row)
            except (KeyError, IndexError) as error:
                problems.append(("unreadable-label", f"{split}, {path!r}: {error}"))
                continue
            images = [path]
            if not path.endswith(".jpg"):  # a study
                names = sorted(image.name for image in Path(root, path).glob("*.jpg"))
                images = [f"{path}/{name}" for name in names]
            for image in images:
                if views == "all" or "frontal" in image:
                    items.append(Item(image[:-4], image, patient, split, values))
    if not any(item.split == "test" for item in items):
        items = [item._replace(split=item.split.replace("validate", "test")) for item in items]
    return list(LABELS), items, problems


def said(mentions):
    """A labeller's csv cells for a report, by label. mentions: {pathology: 1, 0 or -1}."""
    cells = {}
    for label, looks in LABELS.items():
        values = {mentions[pathology] for pathology in looks & mentions.keys()}
        if label == "Lung Opacity" and 1 not in values:
            values = {mentions.get("opacity")}  # to deny or suspect pneumonia says nothing of it
        cells[label] = next((f"{value}.0" for value in (1, -1, 0) if value in values), "")
    if not {cells[label] for label in cells if label != "Support Devices"} & {"1.0", "-1.0"}:
        cells["No Finding"] = "1.0"
    return cells


def seen(findings):
    """A radiologist's csv cells for the film itself, by label."""
    drawn = {finding.pathology for finding in findings}
    cells = {label: str(float(bool(looks & drawn))) for label, looks in LABELS.items()}
    return cells | {"No Finding": str(float(drawn <= {"tube"}))}


def write(root, films, draw):
    rows = {"train": [], "valid": []}
    for f in films:
        part, first = ("train", 1) if f.split == "train" else ("valid", 64541)
        f.person = f"CheXpert-v1.0-small/{part}/patient{f.patient + first:05d}"
        f.image = f"{root}/{f.person}/study{f.visit + 1}/view1_frontal.jpg"
        f.shape = (f.size, round(0.82 * f.size))
    for f in draw(films):
        cells = said(f.mentions) if f.split == "train" else seen(f.findings)
        rows["train" if f.split == "train" else "valid"].append([
            f.image[len(f"{root}/"):], {"M": "Male", "F": "Female"}[f.sex], f.age, "Frontal",
            f.view, *cells.values()])
    for part in rows:
        write_csv(f"{root}/CheXpert-v1.0-small/{part}.csv",
                  "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(LABELS), rows[part])
