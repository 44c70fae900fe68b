"""Open-i: Indiana University's radiographs and reports.

    ecgen-radiology/<number>.xml, or NLMCXR_reports.tgz as it came
    NLMCXR_png/CXR<number>_IM-....png      nlmcxr_dicom_metadata.csv (the views), if at hand

Labels are the index terms that people gave each report, by the part before the first slash:
Opacity/lung/upper lobe/right. Trap: the XML does not tell the view, so without
nlmcxr_dicom_metadata.csv lateral views are read, too. There is no split.
"""
import html
import tarfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

from cli import InputError
from formats import Item, csv_rows, find, paths_by_stem, skip_if_bad, write_text
from text import vocabulary_rows

FILES = ("ecgen-radiology", "NLMCXR_reports*.tgz")
GET = "https://openi.nlm.nih.gov/faq (NLMCXR_reports.tgz, NLMCXR_png.tgz)"
SHARES, VIEWS, SIZE = (0.7, 0.1), "frontal", 512
# {label: the index terms that stand for it}
OPENI = {row["label"]: row["terms"].split(" or ") for row in vocabulary_rows("openi")}
LABELS, TABLES = list(OPENI), {}


def xml_files(root):
    """Yield the (name, content) of each XML file."""
    folder, archive = Path(root, "ecgen-radiology"), find(root, "NLMCXR_reports*.tgz")
    if folder.exists() or archive is None:
        for path in sorted(folder.glob("*.xml")):
            yield path.name, path.read_bytes()
        return
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.endswith(".xml"):
                    yield member.name, tar.extractfile(member).read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"{archive} is damaged ({error}); download it again") from None


def reports(root, problems):
    """Yield dict(id, report, images [file stems], terms) of each report."""
    for name, content in xml_files(root):
        with skip_if_bad(problems, name):
            tree = ElementTree.fromstring(content)
            parts = [f"{p.get('Label')}: {p.text}" for p in tree.iter("AbstractText") if p.text]
            yield {"id": "".join(element.get("id") for element in tree.iter("uId")),
                   "report": html.unescape("\n\n".join(parts)),
                   "images": [element.get("id") for element in tree.iter("parentImage")],
                   "terms": [element.text or "" for element in tree.iter("major")]}


def read(root, views, labels, problems):
    paths = paths_by_stem(root)
    view_of = {row["imageid"]: row["View Position"] or "PA"
               for row in csv_rows(root, "nlmcxr_dicom_metadata.csv")}
    for report in reports(root, problems):
        heads = {term.split("/")[0].strip() for term in report["terms"]} - {"", "No Indexing"}
        values = (-1,) * len(OPENI)
        if heads:
            values = tuple(int(bool(heads & set(terms))) for terms in OPENI.values())
        for name in report["images"]:
            if views == "all" or view_of.get(name, "PA") in ("PA", "AP"):
                yield Item(name, paths.get(name, f"{name}.png"), report["id"].removeprefix("CXR"),
                           "", values, note=report["report"])


def write(root, f):
    name = f"CXR{f.index + 1}_IM-{f.index + 1:04d}-1001"
    f.draw(f"{root}/NLMCXR_png/{name}.png")
    lines = [f'<eCitation><uId id="CXR{f.index + 1}"/>', f'<parentImage id="{name}"/>']
    for part in ("COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION"):
        said = html.escape(f.sections.get(part, "").replace("___", "XXXX"))
        lines.append(f'<AbstractText Label="{part}">{said}</AbstractText>')
    stated = [found for found in f.findings if f.mentions.get(found.pathology) == 1]
    for found in stated:
        term = OPENI.get(found.pathology.capitalize(), [found.pathology])[0]
        lines.append(f"<major>{term}/{found.anatomy.replace('_', ' ')}</major>")
    lines.append("</eCitation>" if stated else "<major>normal</major></eCitation>")
    write_text(f"{root}/ecgen-radiology/{f.index + 1}.xml", "\n".join(lines))
    return []
