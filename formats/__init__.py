"""One file per data set: `read` takes what its publisher ships, `write` fills the same tree. Beside
them: items (which format reads a folder), images, prepare, triplets (of reports), chest (films).

    python phantom.py --layout nih --root /tmp/nih --count 20 --size 64    # write
    python data.py --dataset nih --root /tmp/nih --check                   # read, list the problems

Each has GET, where to get it; FILES, of which one lies at its root; SHARES of train and validate
where the publisher has no such split; VIEWS, the default; LABELS; SIZE of a phantom; TABLES, the
{name: header} of the csv files that phantom.py writes; and
    read(root, views, labels, problems)   yields Items, adds (kind, what) to the list `problems`
    write(root, film)                     has a film drawn, returns its rows: (table, cell, ...)
"""
import contextlib
import csv
import glob
import gzip
import io
from pathlib import Path
from typing import NamedTuple

import fsspec

from cli import InputError
from text import PATHOLOGIES

PATHOLOGY = {name.capitalize(): name for name in PATHOLOGIES} | {  # label: name in text.py
    "No Finding": "normal", "Enlarged Cardiomediastinum": "enlarge", "Lung Opacity": "opacity",
    "Lung Lesion": "lesion", "Pleural Effusion": "effusion", "Pleural Other": "abnormality",
    "Support Devices": "device", "Infiltration": "infiltrate", "Pleural_Thickening": "thicken",
    "Fibrosis": "tail_abnorm_obs"}  # a bucket of rare findings, so a weak query
PATHOLOGY |= {name: name for name in PATHOLOGIES}


class Mask(NamedTuple):  # where a label is
    label: str
    kind: str             # "file", "bit", "crop", "rle" or "box": see images.read_mask
    source: str = ""      # path of an image; "rle": SIIM's text
    place: object = None  # number of the bit; (x, y, width, height) of crop or box in fractions


class Item(NamedTuple):
    """One image. Paths are relative to the root."""
    id: str
    path: str
    patient: str
    split: str            # train, validate, test; "" where the publisher does not say
    labels: tuple         # 1, 0, or -1 unknown, one per label name
    report: str = ""      # path of a report
    note: str = ""        # or its text
    masks: tuple = ()     # of Mask
    absent: tuple = ()    # labels that somebody looked for: without a mask they are not there
    truth: tuple = ()     # of (pathology, anatomy) as drawn by phantom.py


@contextlib.contextmanager
def skip_if_bad(problems, where):
    """Around what is made of one row: a bad row is counted as a problem, the next one follows."""
    try:
        yield
    except (KeyError, ValueError, IndexError, ZeroDivisionError, SyntaxError) as error:  # of XML
        problems.append(("unreadable-label", f"{where} ({error})"))


def find(root, *names):
    """Path of the first of `names` (* allowed) in `root`, plain, .gz or .zip; else None."""
    for name in names:
        for ending in ("", ".gz", ".zip"):
            for path in sorted(Path(root).glob(name + ending)):
                return path
    return None


class Row(dict):
    """A row of a csv by its columns."""
    def __init__(self, path, cells):
        super().__init__(cells)
        self.path = path

    def __missing__(self, column):
        raise InputError(f"{self.path} lacks the column {column!r}; download it again")


def csv_rows(root, *names):
    """Yield the rows of a csv that `find` finds, names and cells stripped; else none."""
    path = find(root, *names)
    if path is None:
        return
    how = {"compression": "infer", "encoding": "utf-8-sig", "errors": "replace", "newline": ""}
    try:
        with fsspec.open(path, "rt", **how) as file:
            for row in csv.DictReader(file, restval=""):  # a row may be cut off
                yield Row(path, {name.strip(): cell.strip() for name, cell in row.items() if name})
    except Exception as error:  # gzip, zip and csv raise different ones on a damaged file
        raise InputError(f"{path} is damaged ({error}); download it again") from None


def paths_by_stem(root):
    """{file name without its ending: path relative to root} of all images below root."""
    found = {}
    for path in sorted(glob.glob("**/*.*", root_dir=root, recursive=True)):
        if path.lower().endswith((".jpg", ".jpeg", ".png", ".dcm")):
            found.setdefault(Path(path).stem, path)
    return found


def box(label, sides):
    """The Mask of a box (x, y, width, height) in pixels of 1024 a side."""
    x, y, width, height = (float(side) / 1024 for side in sides)
    if not (x >= 0 and y >= 0 and width > 0 and height > 0):  # or one is nan
        raise ValueError(f"no box: {sides}")
    return Mask(label, "box", place=(x, y, width, height))


def write_text(path, text):
    """Gzipped if the name ends so; without its time stamp the same text gives the same bytes."""
    path, data = Path(path), text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
