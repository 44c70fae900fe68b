"""ROCOv2: figures of open-access articles with their captions; the chest radiographs among them.

    train/ROCOv2_2023_train_000001.jpg ...     valid/ test/
    train_captions.csv   ID,Caption            valid_captions.csv test_captions.csv
    train_concepts.csv   ID,CUIs               optional: C1306645 plain X-ray, C0817096 chest

An image is kept if it has both concepts; without that file if its caption names a chest radiograph
and nothing else, or its id says cxr. Labels come from the captions (data.py). Traps: splits are by
figure, so figures of one article may lie in train and test; some images are lateral or have arrows.
"""
import re

from formats import Item, csv_rows, paths_by_stem, skip_if_bad

FILES = ("train_captions.csv", "test_captions.csv")
GET = "https://zenodo.org/records/10821435"
SHARES, VIEWS, SIZE = (0.9, 0.1), "all", 320
LABELS = []
FOLDERS = {"train": "train", "validate": "valid", "test": "test"}
TABLES = {f"{folder}_captions.csv": "ID,Caption" for folder in FOLDERS.values()}
PLAIN_XRAY, CHEST = "C1306645", "C0817096"
FILM = re.compile(r"\b(chest|thora\w+)\W+(\w+\W+){0,3}(x.?ray|radiogra|roentgen|film)|\bcxr|"
                  r"(x.?ray|radiogra\w+|roentgeno\w+|film)s?\W+(\w+\W+){0,3}(chest|thora)", re.I)
OTHER = re.compile(r"\b(CT|MRI|PET|barium|tomogra\w+|magnetic|ultraso\w+|echo\w*|angiogra\w+|"
                   r"fluoro\w+|mammogra\w+|scintigra\w+)\b", re.I)


def read(root, views, labels, problems):
    paths = paths_by_stem(root)
    for split, folder in FOLDERS.items():
        chosen = {row["ID"] for row in csv_rows(root, f"{folder}_concepts.csv")
                  if PLAIN_XRAY in row["CUIs"] and CHEST in row["CUIs"]}
        for row in csv_rows(root, f"{folder}_captions.csv"):
            name, caption = row["ID"], row["Caption"]
            keep = name in chosen
            if not chosen:
                keep = "cxr" in name.lower() or FILM.search(caption) and not OTHER.search(caption)
            with skip_if_bad(problems, f"{folder}_captions.csv: {name}"):
                if not name or not caption:
                    raise ValueError("an empty cell")
                if keep:
                    path = paths.get(name, f"{folder}/{name}.jpg")
                    yield Item(name, path, name, split, (), note=caption)


def write(root, f):
    folder = FOLDERS[f.split]
    name = f"ROCOv2_2023_{folder}_{f.index + 1:06d}"
    f.draw(f"{root}/{folder}/{name}.jpg")
    said = f.sections.get("IMPRESSION") or f.sections.get("FINDINGS", "")
    return [(f"{folder}_captions.csv", name, f"Chest X-ray. {said}")]
