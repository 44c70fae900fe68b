"""covid-chestxray-dataset (ieee8023): radiographs with clinical notes, lung masks, finding masks.

    metadata.csv      patientid,...,finding,...,view,modality,...,filename,...,clinical_notes,...
    images/<filename>
    annotations/lungVAE-masks/<stem>_mask.png       lungs of 209 images, by a model
    covid-19-chest-xray-segmentations-dataset/   of GeneralBlockchain, here or beside the root:
        structure.csv        ...,Class,...,Filename,...,Mask,Resolution,Top,Left,Width,Height,...
        masks/<name>.png     findings, lungs and heart of 97 images, drawn by radiologists in colour

Traps: some rows are CT; structure.csv has the stem of a filename but not always its ending. The
masks are large, so a fixed box scores well: compare with the trivial answers.
"""
import collections
from pathlib import Path

from formats import Item, Mask, csv_rows, skip_if_bad

FILES = ("metadata.csv",)
GET = "git clone https://github.com/ieee8023/covid-chestxray-dataset"
TABLES = {"metadata.csv": "patientid,finding,view,modality,filename,clinical_notes"}
SHARES, VIEWS, SIZE = (0.6, 0.1), "frontal", 448
FRONTAL = ("PA", "AP", "AP Supine")
LABELS = ["COVID-19", "Pneumonia", "No Finding"]
MASKS = "covid-19-chest-xray-segmentations-dataset"  # the folder of the radiologists' masks
CLASSES = {  # class of such a mask: label
    "COVID-19 Ground Glass Opacities": "opacity", "COVID-19 Consolidation": "consolidation",
    # the radiologists left the lung behind the heart out, the lung masks do not
    "COVID-19 Left Lung": "aerated lung", "COVID-19 Right Lung": "aerated lung",
    "COVID-19 Cardiomediastinum": "heart"}


def radiologists_masks(root, problems):
    """{file stem: [Mask]} of every image that radiologists drew on."""
    masks = collections.defaultdict(list)
    folder = MASKS if Path(root, MASKS).is_dir() else f"../{MASKS}"
    for row in csv_rows(Path(root, folder), "structure.csv"):
        found, label = masks[Path(row["Filename"]).stem], CLASSES.get(row["Class"])
        with skip_if_bad(problems, f"structure.csv: {row['Filename']}"):
            width, height = map(int, row["Resolution"].split("x"))
            place = (int(row["Left"]) / width, int(row["Top"]) / height,
                     int(row["Width"]) / width, int(row["Height"]) / height)
            if label:  # of the path only the name counts: it must not lead out of the folder
                path = f"{folder}/masks/{Path(row['Mask']).name}"
                found.append(Mask(label, "crop", path, place))
    return masks


def read(root, views, labels, problems):
    drawn = radiologists_masks(root, problems)
    for row in csv_rows(root, *FILES):
        name, stem, finding = row["filename"], Path(row["filename"]).stem, row["finding"].lower()
        if row["modality"] != "X-ray" or views != "all" and row["view"] not in FRONTAL:
            continue
        with skip_if_bad(problems, name):
            if not name or finding in ("", "todo", "unknown"):
                raise ValueError(f"finding {finding!r}")
            # ARDS names a course of illness; every other entry of this collection is a pneumonia
            values = (int("covid-19" in finding), int(finding not in ("no finding", "ards")),
                      int(finding == "no finding"))
            masks, lungs = drawn.get(stem, []), f"annotations/lungVAE-masks/{stem}_mask.png"
            if Path(root, lungs).exists():
                masks = [*masks, Mask("lung", "file", lungs)]
            yield Item(name, f"images/{name}", row["patientid"], "", values,
                       note=row["clinical_notes"], masks=tuple(masks),
                       absent=("consolidation", "opacity") if stem in drawn else ())


def write(root, f):
    lungs = f"{root}/annotations/lungVAE-masks/{f.index}_mask.png" if f.index % 2 == 0 else ""
    # the sign of COVID-19 that phantoms have is an opacity
    f.draw(f"{root}/images/{f.index}.png", lungs=lungs, sure=("opacity", 0.6))
    disease = "Pneumonia" if f.findings else "No Finding"
    if "opacity" in f.pathologies:
        disease = "Pneumonia/Viral/COVID-19"
    said = f.sections.get("FINDINGS", "") + " " + f.sections.get("IMPRESSION", "")
    return [("metadata.csv", f.patient, disease, f.view, "X-ray", f"{f.index}.png", said)]
