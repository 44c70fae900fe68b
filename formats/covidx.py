"""COVIDx, from V8 to CXR-4.

    train/ val/ test/               images; versions before CXR-4 have no val/
    train.txt val.txt test.txt      or train_COVIDx8B.txt ...
        5 ARDSSevere.png negative cohen        patient, file, class, source, one space apart

Traps: patient ids of V8 hold spaces (COVID 1); source and class go together, so a model can tell
the hospital instead of the disease.
"""
from formats import Item, find, skip_if_bad
from text import DEFINITIONS

FILES = ("test*.txt",)
TABLES = {"train.txt": "", "val.txt": "", "test.txt": ""}  # without a header
GET = "https://www.kaggle.com/datasets/andyczhao/covidx-cxr2"
SHARES, VIEWS, SIZE = (0.9, 0.1), "all", 256
LABELS = ["COVID-19"]
PAPER_PROMPT = DEFINITIONS["COVID-19 in the paper"]  # of the published run (Sec. IV-A)
CLASSES = {"positive": 1, "negative": 0}
FOLDERS = {"train": "train", "validate": "val", "test": "test"}


def read(root, views, labels, problems):
    for split, folder in FOLDERS.items():
        path = find(root, f"{folder}*.txt")
        text = path.read_text("utf-8", "replace") if path else ""
        for line in filter(str.strip, text.splitlines()):
            with skip_if_bad(problems, f"{folder}: {line[:60]}"):
                patient, name, kind, _ = line.rsplit(None, 3)
                yield Item(name, f"{folder}/{name}", patient, split, (CLASSES[kind],))


def write(root, f):
    folder, name = FOLDERS[f.split], f"{f.patient}-{f.visit}.png"
    f.draw(f"{root}/{folder}/{name}", sure=("opacity", 0.5))
    kind = "positive" if "opacity" in f.pathologies else "negative"
    return [(f"{folder}.txt", f"{f.patient} {name} {kind} ricord")]
