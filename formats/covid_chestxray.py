"""covid-chestxray-dataset (ieee8023): radiographs with clinical notes, lung masks, finding masks.

    metadata.csv      patientid,...,finding,...,view,modality,...,filename,...,clinical_notes,...
    images/<filename>
    annotations/lungVAE-masks/<stem>_mask.png       lungs of 209 images, by a model
    covid-19-chest-xray-segmentations-dataset/      of GeneralBlockchain, here or beside the root:
        structure.csv        ...,Class,...,Filename,...,Mask,Resolution,Top,Left,Width,Height,...
        masks/<name>.png     findings, lungs and heart of 97 images, drawn by radiologists in colour

Traps: some rows are CT; findings are joined by commas, in later snapshots by slashes; structure.csv
has the stem of a filename but not always its ending; patients have several images. There is no
split. The masks are large, so a fixed box scores well: compare with the trivial answers.
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
COLUMNS = ("patientid", "finding", "view", "modality", "filename", "clinical_notes")


def radiologists_masks(root, problems):
    """{file stem: [Mask]} of every image that radiologists drew on."""
    masks = collections.defaultdict(list)
    folder = MASKS if Path(root, MASKS).is_dir() else f"../{MASKS}"
    for row in csv_rows(find(Path(root, folder), "structure.csv"), "Class", "Filename", "Mask",
                        "Resolution", "Top", "Left", "Width", "Height"):
        found, label = masks[Path(row["Filename"]).stem], CLASSES.get(row["Class"])
        try:
            width, height = map(int, row["Resolution"].split("x"))
            place = (int(row["Left"]) / width, int(row["Top"]) / height,
                     int(row["Width"]) / width, int(row["Height"]) / height)
        except (ValueError, ZeroDivisionError):
            problems.append(("unreadable-label", f"structure.csv: {row['Filename']}"))
            continue
        if label:
            found.append(Mask(label, "crop", f"{folder}/{row['Mask']}", place))
    return masks


def read(root, views, labels):
    items, problems = [], []
    lungs = {path.name for path in Path(root, "annotations/lungVAE-masks").glob("*_mask.png")}
    drawn = radiologists_masks(root, problems)
    for row in csv_rows(find(root, *FILES), *COLUMNS):
        name, stem, finding = row["filename"], Path(row["filename"]).stem, row["finding"].lower()
        frontal = row["view"] in ("PA", "AP", "AP Supine")
        if row["modality"] != "X-ray" or not (frontal or views == "all"):
            continue
        if not name or finding in ("", "todo", "unknown"):
            problems.append(("unreadable-label", f"{name}: finding {row['finding']!r}"))
            continue
        healthy = finding == "no finding"
        # ARDS names a course of illness; every other entry of this collection is a pneumonia
        values = int("covid-19" in finding), int(not healthy and finding != "ards"), int(healthy)
        item = Item(name, f"images/{name}", row["patientid"], "", values,
                    note=row["clinical_notes"])
        if stem in drawn:
            seen = {mask.label for mask in drawn[stem]}
            absent = tuple(label for label in ("consolidation", "opacity") if label not in seen)
            item = item._replace(masks=tuple(drawn[stem]), absent=absent)
        elif f"{stem}_mask.png" in lungs:  # nobody looked for anything else
            mask = Mask("lung", "file", f"annotations/lungVAE-masks/{stem}_mask.png")
            item = item._replace(masks=(mask,), absent=())
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
        drawn = {found.pathology for found in f.findings}
        finding = "Pneumonia" if drawn else "No Finding"
        if "covid-19" in drawn:
            finding = "COVID-19, ARDS" if f.patient % 9 == 0 else "COVID-19"
        said = [f.sections[part] for part in ("FINDINGS", "IMPRESSION") if part in f.sections]
        rows.append((f.patient + 1, finding, f.view, "X-ray", Path(f.image).name, " ".join(said)))
    write_csv(f"{root}/metadata.csv", ",".join(COLUMNS), rows)
