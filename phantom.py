"""Synthetic radiographs with findings, masks and reports, in the data sets' own folders.

    python phantom.py --root data/hard --world hard --count 7000     # the films of the ablations
    python phantom.py --layout nih --root /tmp/nih --count 1000      # rehearse a data set
    python phantom.py --root /tmp/phantoms --count 200               # MIMIC's folders, seconds

formats/chest.py draws a film. This file chooses its findings and dictates its report in the
sentences of vocabulary_phrases.csv; formats/NAME.py names its files and lists its labels. The
bytes depend on layout, count, seed, size, places and world alone.
"""
import collections
import itertools
import math
import os
import textwrap
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from cli import InputError, Parser, cores, number, run
from formats import write_csv, write_text
from formats.chest import LOOKS, LUNG_ZONES, PATCHES, WORLDS, draw_film, stream
from formats.items import FORMATS
from formats.prepare import in_workers
from formats.rsna import save_dicom
from text import swap_sides, vocabulary_rows


class Finding(NamedTuple):
    pathology: str
    anatomy: str
    mask: object             # bool [size,size]

    @property
    def box(self):
        """(x, y, width, height) in pixels, inside the film, no side below 6 of 64 pixels."""
        left, top, right, bottom = Image.fromarray(self.mask).getbbox()
        size, least = len(self.mask), math.ceil(len(self.mask) * 6 / 64)
        width, height = max(right - left, least), max(bottom - top, least)
        x, y = (left + right - width) // 2, (top + bottom - height) // 2
        return min(max(x, 0), size - width), min(max(y, 0), size - height), width, height


@dataclass
class Film:
    seed: tuple
    index: int
    patient: int
    visit: int
    split: str
    sex: str
    view: str
    size: int                # pixels a side
    places: float
    world: str
    path: str = ""           # of its file; this and the rest are set by draw()
    findings: list = None    # of Finding, sorted
    mentions: dict = None    # {pathology: 1 stated, 0 denied, -1 suspected}
    sections: dict = None    # {header: text} of the report

    @property
    def pathologies(self):
        return {finding.pathology for finding in self.findings}

    def draw(self, path, report="", bits="", lungs="", sure=(None, 0)):
        """Choose the findings, draw them, dictate; save the film as PNG, JPEG or DICOM at `path`.

        report, bits, lungs: paths of what else is saved; bit k of the PNG `bits` is the mask of
        finding k. sure: a pathology that comes first, at this rate.
        """
        chosen = choose_findings(self, *sure)
        image, masks, lung_mask = draw_film(self.seed, chosen, self.size, self.world)
        self.path, image = path, Image.fromarray(image)
        self.findings = [Finding(*finding, mask) for finding, mask in masks.items()]
        self.mentions, self.sections = dictate(self)
        for name in filter(None, (path, bits, lungs)):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        if path.endswith(".dcm"):
            save_dicom(self, image)
        else:
            image.save(path, quality=95, compress_level=1)  # of JPEG and of PNG
        if report:
            write_text(report, lay_out(self.sections))
        if bits and masks:
            packed = np.packbits(list(masks.values()), axis=0, bitorder="little")  # [1,size,size]
            Image.fromarray(packed[0]).save(bits, compress_level=1)
        if lungs:
            Image.fromarray(lung_mask).convert("L").save(lungs)


def plan(count, seed, size, places, world):
    """The films of a set: patients come one to three times, splits are by patient."""
    rng, films, patient = stream(seed, "plan"), [], 0
    while len(films) < count:
        if patient % 10 == 0:
            splits = rng.sample(("train", "validate", "test"), 10, counts=WORLDS[world].splits)
        rng.randint(18, 90)  # an age, of no use so far; without it all films would change
        sex = rng.choice("MF")
        for visit in range(min(rng.randint(1, 3), count - len(films))):
            index, view = len(films), rng.choice(("PA", "AP"))
            films.append(Film((seed, index), index, patient, visit, splits[patient % 10], sex, view,
                              size, places, world))
        patient += 1
    return films


# --------------------------------------------------------------------------------------- findings

# Findings that would hide each other share a spot, and a film has one finding per spot at most.
LEVEL = {"pleural": "lower", "diaphragm": "lower", "apical": "upper", "hilar": "mid"}
MOST = 8        # findings in a film: their masks are the bits of a byte
SEVERAL = 1.25  # makes up for pathologies with one place, and for spots that are taken


def spots(pathology, anatomy):
    side, _, place = anatomy.removesuffix("_lung").partition("_")
    if pathology == "tube":  # it hides nothing
        return {f"tube {anatomy}"}
    if pathology == "edema":
        return {"left mid", "right mid"}
    return {f"{side} {LEVEL.get(place, place)}"}


def choose_findings(film, first=None, rate=0):
    """[(pathology, anatomy)]: up to three pathologies, each at one to four places."""
    rng, findings, taken = stream(film.seed, "findings"), [], set()
    count = rng.choices((0, 1, 2, 3), (24, 33, 27, 16))[0]
    pathologies = rng.choices(list(LOOKS), [often for often, _, _ in LOOKS.values()], k=count)
    if rng.random() < rate:
        pathologies.insert(0, first)
    for pathology in dict.fromkeys(pathologies):
        wanted, places = 1, LOOKS[pathology][1]
        if rng.random() < film.places * SEVERAL:
            wanted = rng.choices((2, 3, 4), (75, 19, 6))[0]
        for anatomy in rng.sample(places, len(places)):
            finding = pathology, anatomy
            allowed = film.split == "test" or finding not in WORLDS[film.world].held_out
            if allowed and wanted and len(findings) < MOST and not taken & spots(*finding):
                findings.append(finding)
                taken |= spots(*finding)
                wanted -= 1
    return findings


# ---------------------------------------------------------------------------------------- reports

PHRASES = collections.defaultdict(list)  # finding or occasion: sentences to choose from
for row in vocabulary_rows("phrases"):
    PHRASES[row["finding"]].append(row["template"])


def listed(words, conjunction):
    """"a", "a or b", "a, b or c" """
    *others, last = words
    return f"{', '.join(others)} {conjunction} {last}" if others else last


def say(rng, key, found):
    """A sentence about findings of one pathology, from the rows `key` of the phrases."""
    first, names = found[0], sorted(f.anatomy.replace("_", " ") for f in found)
    where = listed(names, "and").replace("hilar", "hilum")
    side, _, zone = first.anatomy.removesuffix("_lung").partition("_")
    if side == "rib":  # its side is the drawn one
        side = "left" if first.box[0] + first.box[2] / 2 > len(first.mask) / 2 else "right"
    template = rng.choice(PHRASES[key])
    if len(found) > 1 and "hilum" not in where and rng.random() < 0.5:
        where = where.replace(" lung,", ",").replace(" lung and", " and")
    elif len(found) == 1 and first.anatomy in LUNG_ZONES:
        where = rng.choice(PHRASES["zone"]).format(side=side, zone=zone)
    text = template.format(name=first.pathology, side=side, zone=zone, where=where,
                           amount=rng.choice(PHRASES["amount"]))
    return text[0].upper() + text[1:]


def describe(rng, found):
    """Sentences about one pathology at all its places: both sides, a list, or one by one."""
    pathology, places = found[0].pathology, {f.anatomy for f in found}
    mirrored = len(places) == 2 and {swap_sides(place) for place in places} == places
    if mirrored and "left_hilar" not in places and rng.random() < 0.6:
        return [say(rng, f"{pathology} both", found)]
    if len(places) > 1 and f"{pathology} several" in PHRASES and rng.random() < 0.6:
        return [say(rng, f"{pathology} several", found)]
    return [say(rng, "trachea" if f.anatomy == "trachea" else pathology, [f]) for f in found]


def deny(rng, names):
    """Sentences that deny pathologies, one to three each."""
    sentences = []
    while names:
        count = rng.randint(1, 3)
        said = [PHRASES.get(f"no {name}", [name])[0] for name in names[:count]]
        sentences.append(rng.choice(PHRASES["denied"]).format(name=listed(said, "or")))
        names = names[count:]
    return sentences


def dictate(film):
    """What a radiologist says of film.findings -> (mentions, sections) of a Film.

    By the shares of the world pathologies are left out or only suspected; 30 % of what is absent
    is denied.
    """
    rng, world, mentions = stream(film.seed, "report"), WORLDS[film.world], {}
    seen, impression = [], []  # sentences of FINDINGS and of IMPRESSION
    for pathology, group in itertools.groupby(film.findings, lambda finding: finding.pathology):
        found, luck = list(group), rng.random()
        if luck < world.left_out:
            continue
        if luck < world.left_out + world.hedged and found[0].anatomy in LUNG_ZONES:
            mentions[pathology] = -1
            seen.append(say(rng, "suspected", found))
        else:
            mentions[pathology] = 1
            seen += describe(rng, found)
            impression += describe(rng, found)
    present = film.pathologies
    if present & PATCHES.keys():  # "no focal opacity" would deny a consolidation
        present |= PATCHES.keys()
    denied = [name for name in LOOKS if name not in present and rng.random() < 0.3]
    mentions |= dict.fromkeys(denied, 0)
    seen += deny(rng, denied)
    for name in ("cardiomegaly", "fracture"):
        if name not in present and rng.random() < 0.3:
            seen.append(rng.choice(PHRASES[f"without {name}"]))
    if not present:
        seen.append(rng.choice(PHRASES["normal lungs"]))
        impression.append(rng.choice(PHRASES["normal film"]))
    rng.shuffle(seen)
    sections = {"EXAMINATION": rng.choice(PHRASES[film.view]),
                "INDICATION": f"___{film.sex} {rng.choice(PHRASES['indication'])}"}
    if rng.random() < 0.5:
        sections["COMPARISON"] = rng.choice(PHRASES["comparison"])
    said = " ".join(seen) or "Single frontal view."
    form = rng.choice(("both", "both", "findings", "impression"))
    if form != "impression":
        sections["FINDINGS"] = said
    if form == "both":
        sections["IMPRESSION"] = " ".join(impression) or "As above."
    if form == "impression":
        sections["IMPRESSION"] = said
    return mentions, sections


def lay_out(sections):
    """MIMIC's page: FINAL REPORT, one leading space per line, " " for a blank line."""
    paragraphs = [textwrap.fill(f"{header}:  {text}", 79, initial_indent=" ", subsequent_indent=" ")
                  for header, text in sections.items()]
    return " " * 33 + "FINAL REPORT\n" + "\n \n".join(paragraphs) + "\n"


# -------------------------------------------------------------------------------------------- set

def write(layout, root, count, seed=0, size=None, places=0.27, world="easy", workers=cores()):
    """Draw `count` films into the folders of a data set at `root`, a new folder.

    size: pixels a side (default: that of the data set). places: the share of pathologies that are
    at two places or more of a film. InputError if the root holds files or cannot be written.
    """
    source = FORMATS[layout]
    films = plan(count, seed, size or source.SIZE, places, world)
    tables = {table: [header.split(",")] if header else []
              for table, header in source.TABLES.items()}
    try:
        if os.path.isdir(root) and os.listdir(root):
            raise InputError(f"{root} is not empty; give another --root or delete it first")
        for rows in in_workers(partial(source.write, root), films, workers, "films"):
            for table, *cells in rows:
                tables[table].append(cells)
        for table, rows in tables.items():
            write_csv(f"{root}/{table}", rows)
    except OSError as error:  # if it is from another process, its traceback comes before it
        raise InputError(f"cannot write to {root}: {str(error).strip().splitlines()[-1]}") from None


def parse_args(argv=None):
    p = Parser(description="Draw synthetic radiographs with reports.")
    p.add_argument("--layout", choices=FORMATS, default="mimic")
    p.add_argument("--root", metavar="DIR", help="a new folder (data/phantom-<layout>)")
    p.add_argument("--count", type=number(int, 1), default=200, metavar="N", help="films (200)")
    p.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    p.add_argument("--size", type=number(int, 32), metavar="PIXELS", help="a side (the data set's)")
    p.add_argument("--places", type=number(float, 0, 0.7), default=0.27, metavar="RATE",
                   help="share of pathologies at two places or more (0.27)")
    p.add_argument("--world", choices=WORLDS, default="easy", help="see formats/chest.py")
    return p.parse_args(argv)


def main(args):
    root = args.root or f"data/phantom-{args.layout}"
    write(args.layout, root, args.count, args.seed, args.size, args.places, args.world)
    print(f"{args.count} films in {root}")


if __name__ == "__main__":
    run(main, parse_args)
