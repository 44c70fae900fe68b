"""NIH ChestX-ray14, the twelve archives unpacked into one folder or each into its own.

    images/00000001_000.png                 patient, follow-up; or images_001/images/ (Kaggle)
    Data_Entry_2017_v2020.csv               Image Index,Finding Labels,Follow-up #,Patient ID,...
    or Data_Entry_2017.csv                  labels are joined by |
    BBox_List_2017.csv                      984 boxes on 880 test images, 1024 pixels a side
    train_val_list.txt  test_list.txt       the official split, a file name per line

Traps: the columns "OriginalImage[Width,Height]" and "Bbox [x,y,w,h]" are split at their commas;
the entry files may have one field more in the header than in the rows; the box file says
Infiltrate for Infiltration; a few hundred images are RGBA. What is not in test_list.txt is train,
and the loader takes validate from it, by patient.
"""
import collections

from formats import Item, box, csv_rows, find, paths_by_stem, text_lines, write_csv, write_text

NAME = "NIH ChestX-ray14"
FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
GET = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
SHARES, VIEWS, SIZE = (0.7, 0.1), "all", 1024
FRAME = 1024  # boxes are in its pixels

BOXED = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
         "Pneumothorax"]  # the labels that have boxes
LABELS = [*BOXED, "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]


def read_boxes(root, problems):
    """{file name: [box]}"""
    boxes = collections.defaultdict(list)
    for row in csv_rows(find(root, "BBox_List_2017.csv"), "Image Index", "Finding Label"):
        label = row["Finding Label"].replace("Infiltrate", "Infiltration")
        try:
            sides = row["Bbox [x"], row["y"], row["w"], row["h]"]
            boxes[row["Image Index"]].append(box(label, sides, FRAME, FRAME))
        except (KeyError, ValueError):
            problems.append(("unreadable-label", f"box of {row['Image Index']}"))
    return boxes


def read(root, views, labels):
    items, problems, paths = [], [], paths_by_stem(root)
    boxes, tests = read_boxes(root, problems), set(text_lines(find(root, "test_list.txt")))
    for row in csv_rows(find(root, *FILES), "Image Index", "Finding Labels", "Patient ID"):
        name, found = row["Image Index"], set(row["Finding Labels"].split("|"))
        if not name or found - {"No Finding", *LABELS}:
            problems.append(("unreadable-label", f"{name}: {row['Finding Labels']}"))
            continue
        split = ""
        if tests:
            split = "test" if name in tests else "train"
        items.append(Item(
            name, paths.get(name.removesuffix(".png"), f"images/{name}"), row["Patient ID"], split,
            tuple(int(label in found) for label in LABELS), boxes=tuple(boxes.get(name, ()))))
    return LABELS, items, problems


def label_of(pathology):
    """The label of a pathology that phantom.py draws; some have none."""
    return "Infiltration" if pathology == "opacity" else pathology.capitalize()


def write(root, films, draw):
    """One folder, with the entry file of 2020."""
    for f in films:
        f.person = f"{f.patient + 1}"
        f.image = f"{root}/images/{f.patient + 1:08d}_{f.visit:03d}.png"
        f.mode = "RGBA" if f.index % 40 == 7 else "L"
    entries, boxes, lists = [], [], {"train_val_list.txt": "", "test_list.txt": ""}
    for f in draw(films):
        name, tested = f.image.split("/")[-1], f.split == "test"
        found = {label_of(finding.pathology) for finding in f.findings}
        labels = [label for label in LABELS if label in found] or ["No Finding"]
        entries.append((name, "|".join(labels), f.visit, f.person, f.age, f.sex, f.view, 2500, 2048,
                        0.168, 0.168))
        for finding in f.findings:
            label = label_of(finding.pathology)
            if tested and label in BOXED:
                boxes.append((name, label.replace("Infiltration", "Infiltrate"),
                              *(side * FRAME / f.size for side in finding.box)))
        lists["test_list.txt" if tested else "train_val_list.txt"] += f"{name}\n"
    write_csv(f"{root}/Data_Entry_2017_v2020.csv",
              "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View "
              "Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],", entries)
    write_csv(f"{root}/BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,", boxes)
    for name, lines in lists.items():
        write_text(f"{root}/{name}", lines)
