"""CheXpert, full or small, and its test release.

    CheXpert-v1.0-small/  train.csv valid.csv        Path,Sex,Age,Frontal/Lateral,AP/PA, 14 labels
    (or CheXpert-v1.0/)   train/patient00001/study1/view1_frontal.jpg  view2_lateral.jpg  valid/...
    CheXpert/             val_labels.csv test_labels.csv  val/ test/      Path, 14 labels
                          or groundtruth.csv, a row per study             Study, 14 labels

In train a labeller read the reports: 1.0 present, 0.0 absent, -1.0 uncertain, blank not mentioned;
radiologists read valid and test. Without the test release valid is the test set, and the loader
takes validate from train. Traps: Path begins with the folder of the release; val_labels.csv says
valid/ where the folder is val/. Put the test release's files into the folder of train.csv: the
loader takes one folder.
"""
from pathlib import Path

from formats import BLANK, Item, csv_rows, find, skip_if_bad, write_csv

FILES = ("train.csv", "valid.csv", "val_labels.csv")
GET = "https://stanfordmlgroup.github.io/competitions/chexpert"
SHARES, VIEWS, SIZE = (0.9, 0.1), "frontal", 390
LABELS = {  # in the order of the csv: what phantom.py draws for each
    "No Finding": set(), "Enlarged Cardiomediastinum": set(), "Cardiomegaly": {"cardiomegaly"},
    "Lung Opacity": {"opacity"}, "Lung Lesion": {"nodule", "mass"}, "Edema": {"edema"},
    "Consolidation": {"consolidation"}, "Pneumonia": {"pneumonia"}, "Atelectasis": {"atelectasis"},
    "Pneumothorax": {"pneumothorax"}, "Pleural Effusion": {"effusion"}, "Pleural Other": set(),
    "Fracture": {"fracture"}, "Support Devices": {"tube"}}
TABLES = {"train.csv": "train", "valid.csv": "validate", "val_labels.csv": "validate",
          "test_labels.csv": "test", "groundtruth.csv": "test"}
VALUE = {"1.0": 1, "0.0": 0, "-1.0": -1, "1": 1, "0": 0, "-1": -1, "": BLANK}  # of a cell


def label_values(row):
    """The 14 labels of a csv row; KeyError where a cell holds something else."""
    return tuple(VALUE[row.get(label, "")] for label in LABELS)


def read(root, views, labels):
    items, problems = [], []
    for table, split in TABLES.items():
        for row in csv_rows(find(root, table)):
            path = row.get("Path") or row["Study"]
            if path.startswith("CheXpert"):
                path = path.partition("/")[2]
            if path.startswith("valid/") and Path(root, "val").is_dir():
                path = path.replace("valid", "val", 1)
            images = [path]
            if not path.endswith(".jpg"):  # a study
                images = sorted(f"{path}/{image.name}" for image in Path(root, path).glob("*.jpg"))
            with skip_if_bad(problems, f"{split}, {path!r}"):
                patient, values = path.split("/")[1], label_values(row)
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
        cells[label] = next((f"{value}.0" for value in (1, -1, 0) if value in values), "")
    if not {cells[label] for label in cells if label != "Support Devices"} & {"1.0", "-1.0"}:
        cells["No Finding"] = "1.0"
    return cells


def write(root, films, draw):
    rows = {"train": [], "valid": []}
    for f in films:
        part = "train" if f.split == "train" else "valid"
        f.person = f"CheXpert-v1.0-small/{part}/patient{f.patient + 1:05d}"
        f.image = f"{root}/{f.person}/study{f.visit + 1}/view1_frontal.jpg"
        f.shape = (f.size, round(0.82 * f.size))
    for f in draw(films):
        part, mentions = f.person.split("/")[1], f.mentions
        if part == "valid":  # a radiologist sees what is drawn
            mentions = {finding.pathology: 1 for finding in f.findings}
        rows[part].append((Path(f.image).relative_to(root), *said(mentions).values()))
    for part in rows:
        write_csv(f"{root}/CheXpert-v1.0-small/{part}.csv", "Path," + ",".join(LABELS), rows[part])
