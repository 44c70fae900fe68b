"""ROCOv2: figures of open-access articles with their captions; the chest radiographs among them.

    train/ROCOv2_2023_train_000001.jpg ...     valid/ test/
    train_captions.csv   ID,Caption            valid_captions.csv test_captions.csv
    train_concepts.csv   ID,CUIs               optional: C1306645 plain X-ray, C0817096 chest

Where the concepts are, an image is kept if it has both; else its caption must name a chest
radiograph and nothing else, or its id say cxr. Labels come from the captions (data.py). Traps:
splits are by figure and no article is given, so figures of one article may lie in train and test;
captions tell a course of illness ("on admission"); a few images are lateral views, of children or
animals, or carry arrows.
"""
import re

from formats import Item, csv_rows, find, paths_by_stem, write_csv

NAME = "ROCOv2"
FILES = ("train_captions.csv", "test_captions.csv")
GET = "https://zenodo.org/records/10821435"
SHARES, VIEWS, SIZE = (0.9, 0.1), "all", 320
LABELS = []
PLAIN_XRAY, CHEST = "C1306645", "C0817096"
FILM = re.compile(r"\b(chest|thora\w+)\W+(\w+\W+){0,3}(x.?ray|radiogra|roentgen|film)|\bcxr|"
                  r"(x.?ray|radiogra\w+|roentgeno\w+|film)s?\W+(\w+\W+){0,3}(chest|thora)", re.I)
OTHER = re.compile(r"\b(CT|MRI|PET|barium|tomogra\w+|magnetic|ultraso\w+|echo\w*|angiogra\w+|"
                   r"fluoro\w+|mammogra\w+|scintigra\w+)\b", re.I)


def is_chest_film(name, caption):
    """Whether a caption says that the figure is a plain chest radiograph."""
    return "cxr" in name.lower() or bool(FILM.search(caption) and not OTHER.search(caption))


def read(root, views, labels):
    items, problems, paths = [], [], paths_by_stem(root)
    for split, folder in (("train", "train"), ("validate", "valid"), ("test", "test")):
        concepts = find(root, f"{folder}_concepts.csv")
        chosen = {row["ID"] for row in csv_rows(concepts, "ID", "CUIs")
                  if PLAIN_XRAY in row["CUIs"] and CHEST in row["CUIs"]}
        for row in csv_rows(find(root, f"{folder}_captions.csv"), "ID", "Caption"):
            name, caption = row["ID"], row["Caption"]
            keep = name in chosen if concepts else is_chest_film(name, caption)
            if not name or not caption:
                problems.append(("unreadable-label", f"{folder}_captions.csv: {name!r}"))
            elif keep:
                items.append(Item(name, paths.get(name, f"{folder}/{name}.jpg"), name, split, (),
                                  note=caption))
    return LABELS, items, problems


def write(root, films, draw):
    rows = {"train": [], "valid": [], "test": []}
    for f in films:
        folder = f.split.replace("validate", "valid")
        f.image, f.mode = f"{root}/{folder}/ROCOv2_2023_{folder}_{f.index + 1:06d}.jpg", "RGB"
    for f in draw(films):
        folder, name = f.image.split("/")[-2:]
        said = f.sections.get("IMPRESSION") or f.sections.get("FINDINGS", "")
        rows[folder].append((name.removesuffix(".jpg"), f"Chest X-ray. {said}"))
    for folder, captions in rows.items():
        write_csv(f"{root}/{folder}_captions.csv", "ID,Caption", captions)
        concepts = [(name, f"{PLAIN_XRAY};{CHEST}") for name, _ in captions]
        write_csv(f"{root}/{folder}_concepts.csv", "ID,CUIs", concepts)
