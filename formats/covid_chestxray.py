"""covid-chestxray-dataset (ieee8023): radiographs with clinical notes, lung masks, finding masks.

    metadata.csv      patientid,...,finding,...,view,modality,...,filename,...,clinical_notes,...
    images/<filename>
    annotations/lungVAE-masks/<stem>_mask.png       lungs, of 209 images, by a model
    covid-19-chest-xray-segmentations-dataset/      of GeneralBlockchain, here or beside the root:
        structure.csv                               Class,Filename,Mask,Resolution,Top,Left,Width,Height
        masks/<name>.png                            findings, lungs and heart of 97 images, drawn by
                                                    radiologists, in colours on black
Traps: some rows are CT; findings are joined by commas, in later snapshots by slashes; structure.csv
has the stem of a filename but not always its ending. Patients have several images, and there is no
split. Masks are large: a fixed box scores well, so compare with the trivial answers.
"""
import collections
from pathlib import Path

from formats import Item, Mask, csv_rows, find, write_csv

NAME = "covid-chestxray-dataset"
FILES = ("metadata.csv",)
GET = "git clone https://github.com/ieee8023/covid-chestxray-dataset"
SHARES, VIEWS, SIZE = (0.6, 0.1), "frontal", 448
LABELS = ["COVID-19", "Pneumonia", "No Finding"]
MASKS = "covid-19-chest-xray-segmentations-dataset"  # the folder of the radiologists' masks
CLASSES = {  # class of such a mask: label
    "COVID-19 Ground Glass Opacities": "opacity", "COVID-19 Consolidation": "consolidation",
    "COVID-19 Left Lung": "lung", "COVID-19 Right Lung": "lung",
    "COVID-19 Cardiomediastinum": "heart"}
HEADER = ("patientid,offset,sex,age,finding,survival,intubated,intubation_present,went_icu,in_icu,"
          "needed_supplemental_O2,extubated,temperature,pO2_saturation,leukocyte_count,"
          "neutrophil_count,lymphocyte_count,view,modality,date,location,folder,filename,doi,url,"
          "license,clinical_notes,other_notes,")


def radiologists_masks(root, problems):
    """{file stem: [Mask]} of the images that radiologists drew on, whatever they drew."""
    masks = collections.defaultdict(list)
    folder = MASKS if Path(root, MASKS).is_dir() else f"../{MASKS}"
    for row in csv_rows(find(Path(root, folder), "structure.csv"), "Class", "Filename", "Mask",
                        "Resolution", "Top", "Left", "Width", "Height"):
        drawn = masks[Path(row["Filename"]).stem]
        try:
            width, height = map(int, row["Resolution"].split("x"))
            place = (int(row["Left"]) / width, int(row["Top"]) / height,
                     int(row["Width"]) / width, int(row["Height"]) / height)
        except (ValueError, ZeroDivisionError):
            problems.append(("unreadable-label", f"structure.csv: {row['Filename']}"))
            continue
        if row["Class"] in CLASSES:
            drawn.append(Mask(CLASSES[row["Class"]], "crop", f"{folder}/{row['Mask']}", place))
    return masks


def read(root, views, labels):
    items, problems = [], []
    lungs = {path.name for path in Path(root, "annotations/lungVAE-masks").glob("*_mask.png")}
    masks = radiologists_masks(root, problems)
    for row in csv_rows(find(root, *FILES), "patientid", "finding", "view", "modality", "filename",
                        "clinical_notes"):
        name, finding = row["filename"], row["finding"].lower()
        frontal = row["view"] in ("PA", "AP", "AP Supine")
        if row["modality"] != "X-ray" or not (frontal or views == "all"):
            continue
        if not name or finding in ("", "todo", "unknown"):
            problems.append(("unreadable-label", f"{name}: finding {row['finding']!r}"))
            continue
        healthy = finding == "no finding"
        # ARDS names a course of illness; every other entry of this collection is a pneumonia
        values = int("covid-19" in finding), int(not healthy and finding != "ards"), int(healthy)
        stem = Path(name).stem
        item = Item(name, f"images/{name}", row["patientid"], "", values, note=row["clinical_notes"])
        if stem in masks:
            seen = {mask.label for mask in masks[stem]}
            absent = [label for label in ("opacity", "consolidation") if label not in seen]
            item = item._replace(masks=tuple(masks[stem]), absent=tuple(absent))
        elif f"{stem}_mask.png" in lungs:
            mask = Mask("lung", "file", f"annotations/lungVAE-masks/{stem}_mask.png")
            item = item._replace(masks=(mask,))
        items.append(item)
    return LABELS, items, problems


def write(root, films, draw):
    """The tree of June 2020, with lung masks of every other image."""
    for f in films:
        f.among, f.sure = ["pneumonia"], ("covid-19", 0.6)
        stem, ending = f"phantom-{f.patient}-{f.visit}", ("jpeg", "png", "jpg")[f.index % 3]
        f.image = f"{root}/images/{stem}.{ending}"
        if f.index % 2 == 0:
            f.lungs = f"{root}/annotations/lungVAE-masks/{stem}_mask.png"
    rows = []
    for f in draw(films):
        drawn = {finding.pathology for finding in f.findings}
        finding = "Pneumonia" if drawn else "No Finding"
        if "covid-19" in drawn:
            finding = "COVID-19, ARDS" if f.patient % 9 == 0 else "COVID-19"
        said = [f.sections[part] for part in ("FINDINGS", "IMPRESSION") if part in f.sections]
        known = {"patientid": f.patient + 1, "offset": 3 * f.visit, "sex": f.sex, "age": f.age,
                 "finding": finding, "view": "AP Supine" if f.index % 7 == 3 else f.view,
                 "modality": "X-ray", "folder": "images", "filename": Path(f.image).name,
                 "clinical_notes": " ".join(said)}
        rows.append([known.get(column, "") for column in HEADER.split(",")])
    write_csv(f"{root}/metadata.csv", HEADER, rows)
