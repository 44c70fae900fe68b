"""CheXpert, full or small, and its test set, which is a download of its own.

    CheXpert-v1.0-small/  train.csv valid.csv        Path,Sex,Age,Frontal/Lateral,AP/PA, 14 labels
    (or CheXpert-v1.0/)   train/patient00001/study1/view1_frontal.jpg  view2_lateral.jpg  valid/...
    put into the same:    test_labels.csv  test/...  Path, 14 labels

In train a labeller read the reports: 1.0 present, 0.0 absent, -1.0 uncertain, blank not mentioned;
radiologists read valid and test. Without test_labels.csv valid is the test set, and the loader
takes validate from train. Trap: Path begins with the folder of the release.
"""
from formats import Item, csv_rows, find, skip_if_bad
from text import vocabulary_rows

FILES = ("train.csv", "valid.csv", "test_labels.csv")
GET = "https://stanfordmlgroup.github.io/competitions/chexpert"
SHARES, VIEWS, SIZE = (0.9, 0.1), "frontal", 390
# {label: the pathologies that phantom.py draws for it}, in the order of the csv
LABELS = {row["label"]: row["drawn"].split(" or ") for row in vocabulary_rows("chexpert")}
VALUE = {"1.0": 1, "0.0": 0, "-1.0": -1, "1": 1, "0": 0, "-1": -1,  # of a cell
         "": 0}  # not mentioned counts as absent, as is customary
RELEASE = "CheXpert-v1.0-small"  # of the phantoms
TABLES = {f"{RELEASE}/{table}": "Path," + ",".join(LABELS) for table in FILES}


def label_values(row):
    """The 14 labels of a csv row, -1 without a column; KeyError at another value."""
    return tuple(VALUE[row[label]] if label in row else -1 for label in LABELS)


def read(root, views, labels, problems):
    splits = ("train", "validate", "test")
    if find(root, "test_labels.csv") is None:
        splits = ("train", "test", "test")
    for table, split in zip(FILES, splits):
        for row in csv_rows(root, table):
            path = row["Path"]
            if path.startswith("CheXpert"):
                path = path.partition("/")[2]
            with skip_if_bad(problems, f"{table}: {path}"):
                patient, values = path.split("/")[1], label_values(row)
                if views == "all" or "frontal" in path:
                    yield Item(path, path, patient, split, values)


def said(mentions):
    """A labeller's csv cells for a report, by label. mentions: {pathology: 1, 0 or -1}."""
    cells = {}
    for label, drawn in LABELS.items():
        values = [mentions.get(pathology) for pathology in drawn]
        cells[label] = next((f"{value}.0" for value in (1, -1, 0) if value in values), "")
    if not {cells[label] for label in cells if label != "Support Devices"} & {"1.0", "-1.0"}:
        cells["No Finding"] = "1.0"
    return cells


def write(root, f):
    folder = {"train": "train", "validate": "valid", "test": "test"}[f.split]
    study = f"{RELEASE}/{folder}/patient{f.patient + 1:05d}/study{f.visit + 1}"
    f.draw(f"{root}/{study}/view1_frontal.jpg")
    table = "test_labels.csv" if f.split == "test" else f"{folder}.csv"
    # a radiologist sees what is drawn
    seen = f.mentions if f.split == "train" else dict.fromkeys(f.pathologies, 1)
    return [(f"{RELEASE}/{table}", f"{study}/view1_frontal.jpg", *said(seen).values())]
