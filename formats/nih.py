"""NIH ChestX-ray14, the twelve archives unpacked into one folder or each into its own.

    images/00000001_000.png                 patient, follow-up; or images_001/images/ (Kaggle)
    Data_Entry_2017_v2020.csv               Image Index,Finding Labels (joined by |),Patient ID,...
    or Data_Entry_2017.csv (Kaggle)
    BBox_List_2017.csv                      984 boxes on 880 test images, 1024 pixels a side
    train_val_list.txt  test_list.txt       the official split, a file name per line

Traps: the header "Bbox [x,y,w,h]" is four columns; the box file says Infiltrate for Infiltration.
The loader takes validate from the train_val_list, by patient.
"""
import collections

from formats import Item, box, csv_rows, find, paths_by_stem, skip_if_bad

FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # Box; Kaggle
GET = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
SHARES, VIEWS, SIZE = (0.7, 0.1), "all", 1024  # boxes are in pixels of this size
LABELS = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
          "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
          "Hernia"]
TABLES = {"Data_Entry_2017_v2020.csv": "Image Index,Finding Labels,Patient ID",
          "BBox_List_2017.csv": "Image Index,Finding Label,Bbox [x,y,w,h],,,", "test_list.txt": ""}


def read(root, views, labels, problems):
    paths, boxes = paths_by_stem(root), collections.defaultdict(list)
    test_list = find(root, "test_list.txt")
    tests = set(test_list.read_text().split()) if test_list else set()
    if not any(name.endswith(".png") for name in tests):
        problems.append(("no official split", "test_list.txt is missing or no list of names"))
    for row in csv_rows(root, "BBox_List_2017.csv"):
        with skip_if_bad(problems, f"box of {row['Image Index']}"):
            label = row["Finding Label"].replace("Infiltrate", "Infiltration")
            sides = row["Bbox [x"], row["y"], row["w"], row["h]"]
            boxes[row["Image Index"]].append(box(label, sides))
    for row in csv_rows(root, *FILES):
        name, found = row["Image Index"], set(row["Finding Labels"].split("|"))
        with skip_if_bad(problems, name):
            if not name or found - {"No Finding", *LABELS}:
                raise ValueError(row["Finding Labels"])
            path = paths.get(name.removesuffix(".png"), f"images/{name}")
            values = tuple(int(label in found) for label in LABELS)
            yield Item(name, path, row["Patient ID"], "test" if name in tests else "", values,
                       masks=tuple(boxes[name]))


def write(root, f):
    name, labels, rows = f"{f.patient + 1:08d}_{f.visit:03d}.png", set(), []
    f.draw(f"{root}/images/{name}")
    for finding in f.findings:
        label = finding.pathology.capitalize().replace("Opacity", "Infiltration")
        labels.add(label)
        if f.split == "test" and label in LABELS:
            sides = [side * SIZE / f.size for side in finding.box]
            label = label.replace("Infiltration", "Infiltrate")
            rows.append(("BBox_List_2017.csv", name, label, *sides))
    if f.split == "test":
        rows.append(("test_list.txt", name))
    found = "|".join(label for label in LABELS if label in labels) or "No Finding"
    return [*rows, ("Data_Entry_2017_v2020.csv", name, found, f.patient + 1)]
