"""COVIDx, any version.

    train/ val/ test/               images; versions before CXR-4 have no val/
    train.txt val.txt test.txt      or train_COVIDx8B.txt ...
        5 ARDSSevere.png negative cohen        patient, file, class, source, one space apart

Traps: older patient ids hold spaces (COVID 1), and the oldest lines have no source. The class is
positive or negative; in the lists with an A at the end normal, pneumonia or COVID-19. In the real
lists source and class go together, so a model can tell the hospital instead of the disease.
"""
import re

from formats import Item, find, text_lines, write_text

NAME = "COVIDx"
FILES = ("test*.txt",)
GET = "https://www.kaggle.com/datasets/andyczhao/covidx-cxr2"
SHARES, VIEWS, SIZE = (0.9, 0.1), "all", 256
LABELS = ["COVID-19"]
LINE = re.compile(r"(.+?)\s+(\S+)\s+(positive|negative|covid-19|pneumonia|normal)(\s+\S+)?", re.I)


def read(root, views, labels):
    items, problems = [], []
    for split, folder in (("train", "train"), ("validate", "val"), ("test", "test")):
        for line in text_lines(find(root, f"{folder}.txt", f"{folder}*.txt")):
            found = LINE.fullmatch(line)
            if found is None:
                problems.append(("unreadable-label", f"{folder}: {line[:60]}"))
                continue
            patient, name, kind, _ = found.groups()
            sick = kind.lower() in ("positive", "covid-19")
            items.append(Item(name, f"{folder}/{name}", patient, split, (int(sick),)))
    return LABELS, items, problems


def write(root, films, draw):
    """Here every source has both classes."""
    lists = {"train": "", "val": "", "test": ""}
    for f in films:
        f.sure = ("covid-19", 0.5)
        f.person = f"{419639 + f.patient}-{f.patient:06d}"
        ending, f.mode = (("png", "L"), ("jpg", "RGB"), ("jpeg", "L"), ("png", "RGBA"),
                          ("JPG", "L"))[f.index % 5]
        folder = f.split.replace("validate", "val")
        f.image = f"{root}/{folder}/{f.person}-{f.visit}.{ending}"
    for f in draw(films):
        folder, name = f.image.split("/")[-2:]
        sick = any(finding.pathology == "covid-19" for finding in f.findings)
        source = ("ricord", "rsna", "stonybrook", "sirm", "cohen")[f.patient % 5]
        lists[folder] += f"{f.person} {name} {'positive' if sick else 'negative'} {source}\n"
    for folder, lines in lists.items():
        write_text(f"{root}/{folder}.txt", lines)
