"""Rules that read the triplets of a report, (pathology, anatomy, existence), without a model.

    python reports.py --root data/openi        # the score of the rules against human index terms
    echo "No effusion, mild scarring in the left base." | python text.py --report -

How that sentence is read:
    read_items      deny "no", finding effusion, comma, start "mild", finding scar, preposition
                    "in", Place(left, lower)
    read_existence  effusion is denied; the comma before "mild" ends the denial: scar is present
    find_places     the place belongs to scar, behind which it stands
    share_places    effusion has no part in it: what is denied is denied everywhere
    landmarks       (effusion, pleural_unspec, 0), its home; (scar, left_lower_lung, 1)

The words are rows of vocabulary_words.csv. Their kinds: deny and doubt act on the findings that
follow, denied and doubted on those before; start opens a statement after a comma; split ends a
clause. _findings.csv has the home of a finding, its place where none is stated, _implied.csv what
a finding also says, _sections.csv the headers.

Differs from the paper, which takes RadGraph's triplets: a bilateral finding is at both sides and at
the joint landmark (lung_bases), not at that alone; else left_pleural would count as not mentioned.
"""
import ast
import collections
import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from cli import InputError, Parser, run
from text import Triplet, bucket, landmark, stem, vocabulary_rows

# --------------------------------------------------------------- sections and sentences of a report

HEADER = re.compile(r"([A-Z]{2}[A-Z0-9 ()/,&-]*|Findings?|Impression|Conclusion|Indication|"
                    r"Comparison|Technique|History|Exam(?:ination)?):(?=\s|$)")
SECTIONS = {row["header_word"]: row["section"] for row in vocabulary_rows("sections")}


def section_name(header):
    """A header in any spelling -> findings, impression or other; "" if it heads no section."""
    words = [stem(word, SECTIONS) for word in re.findall("[a-z]+", header.lower())]
    known = [section for word, section in SECTIONS.items() if word in words]
    return known[0] if known else "other"


def text_to_read(report):
    """Findings and impression of a report; of two sections with one name the last counts, as
    addenda stand on top.

    Without these two it is the last paragraph: all behind the first blank line of the last section,
    as in MIMIC's own parser. A report without any header is read whole.
    """
    # in some data sets a report is one line
    headers = r"\b((FINDINGS AND )?IMPRESSION|FINDINGS|INDICATION|COMPARISON)[ \t]*:"
    body = re.sub(headers, r"\n\1:", report.rstrip())
    name, texts = "", {"": ""}  # what stands before the first header has no name
    for line in body.split("\n"):
        header = HEADER.match(line.strip())
        if header and section_name(header[1]):
            name, line = section_name(header[1]), line.strip()[header.end():]
            texts[name] = ""
        texts[name] += "\n" + line.strip()
    if name == "" and "FINAL REPORT" not in body:
        return body
    found = "\n\n".join(texts.get(section, "") for section in ("findings", "impression"))
    return found if found.strip() else texts[name].lstrip("\n").partition("\n\n")[2]


def sentences(report):
    """The sentences of what is read of a report, as a list."""
    # MIMIC wraps its lines, so a line may end within a sentence, but a blank line ends one
    found = re.split(r"\n\s*\n|(?<=[.;!?])\s+|(?<=[a-z]\.)(?=[A-Z])", text_to_read(report))
    return [" ".join(sentence.split()) for sentence in found if re.search(r"[A-Za-z]{3}", sentence)]


# -------------------------------------------------------------------------------- words and places

PHRASES = {row["word"]: row for row in vocabulary_rows("words")}
WORDS = {word for phrase in PHRASES for word in phrase.split()}
LONGEST = max(len(phrase.split()) for phrase in PHRASES)
CLAUSE_ENDS = "|".join(rf"(?<!\w){row['word']}(?!\w)" for row in PHRASES.values()
                       if row["kind"] == "split")
FINDINGS = {row["finding"]: row for row in vocabulary_rows("findings")}
IMPLIED = {(row["said"], row["organ"], int(row["existence"])):
           (row["means"], row["anatomy"], int(row["its_existence"]))
           for row in vocabulary_rows("implied")}

# side: left, right or both; level: upper, mid, lower or apical; organ: several are joined by |;
# vague: an organ that says too little beside a side or a level ("pulmonary")
Place = collections.namedtuple("Place", "side level organ vague", defaults=("", "", "", ""))


@dataclass
class Item:
    kind: str                   # as in vocabulary_words.csv, or "place"
    name: str
    place: Place = Place()      # of kind place
    existence: int = 1          # of kind finding
    places: list = field(default_factory=list)


def read_items(text):
    """The Items of a clause: the longest phrases that the table knows; other words are left out.

    Words of one place become one item: "base of the left lung" -> Place(left, lower, lung).
    """
    found = re.findall(r"(?<![a-z0-9])[a-z]+|[,:()/]", text.lower())
    words, items = [stem(word, WORDS) for word in found], []
    current = None  # the place that the next word of a place adds to
    while words:
        for length in range(LONGEST, 0, -1):
            row = PHRASES.get(" ".join(words[:length]))
            if row:
                break
        words = words[length:]
        if row is None or row["kind"] == "filler":
            continue
        kind, name = row["kind"], row["name"]
        if kind == "short for":
            words = name.split() + words  # bibasilar: both base
        elif kind in Place._fields:
            known = getattr(current.place, kind) if current else ""
            if current is None or (kind in ("side", "level") and known not in ("", name)):
                current, known = Item("place", ""), ""
                items.append(current)
            joined = name if known in ("", name) else f"{known}|{name}"
            current.place = current.place._replace(**{kind: joined})
        else:
            items.append(Item(kind, name or row["word"]))
            if row["word"] not in ("of", "on"):
                current = None
    return items


def kinds(items, start, end):
    return {item.kind for item in items[start:end]}


def touch(items, i, j):
    """Whether nothing but places and words such as "small" is between items i and j."""
    return kinds(items, i + 1, j) <= {"start", "place"}


# ------------------------------------------------------------------- from a clause to its triplets

# "likely" and "may represent" are both doubt: who is sure says neither. "probable" is present, as
# for those who index Open-i: macro F1 there 0.929; with "probable" as doubt 0.916.
MEANING = {"deny": 0, "doubt": -1, "denied": 0, "doubted": -1}


def read_existence(items):
    """Set the existence of the findings of a clause, from left to right."""
    existence, subject, behind = 1, [], 0  # subject: what "has resolved" is about; where it ends
    for i, item in enumerate(items):
        since = kinds(items, behind, i) if subject else set()
        coming = [other for other in items[i + 1:] if other.kind != "place"]
        following = coming[0] if coming else item
        if item.kind == "finding":
            if item.name == "normal" and "verb" in since and not since & {"comma", "join"}:
                subject[-1].existence = 0  # "engorgement is within normal limits"
            item.existence = existence
            subject.append(item)
            behind = i + 1
        elif item.kind in ("denied", "doubted") and subject and following.kind != "finding":
            for finding in subject:  # "effusion has resolved", but "no longer any effusion"
                finding.existence = MEANING[item.kind]
        elif item.kind in MEANING:
            existence = MEANING[item.kind]
        elif item.kind in ("comma", "join") and item.name != "or":
            # "no effusion, [mild scarring]"; "no effusion is seen, [scarring in the left base]"
            normal = following.name in ("normal", "clear", "unremarkable", "stable")
            starts = following.kind == "start" or normal
            if (starts and existence == 0) or "verb" in since:
                existence, subject = 1, []


def find_places(items, positions):
    """Give every place of a clause to the finding before it or to the one after it."""
    last = -1  # number of the finding or place before an item
    for i, item in enumerate(items):
        if item.kind == "place" and positions:
            before = [p for p in positions if p < i]
            after = [p for p in positions if p > i]
            # "[opacity] in the left base", but "the left base shows [opacity]"
            since = kinds(items, last + 1, i)
            linked = "preposition" in since or not since & {"comma", "join", "verb"}
            if after and touch(items, i, after[0]):
                linked = False  # "left basilar [opacity]"
            owner = before[-1] if before and (linked or not after) else after[0]
            add_place(items[owner].places, item.place)
        if item.kind in ("finding", "place"):
            last = i


def add_place(places, place):
    """Add one of several places of a finding, completing the list."""
    if places and not places[-1].side and place == Place(place.side):
        place = places.pop()._replace(side=place.side)  # "basilar [opacity] on the left"
    elif places and place.level:
        place = place._replace(side=place.side or places[-1].side)
        if places[-1].level and not places[-1].organ and place.organ == "lobe":
            places[-1] = places[-1]._replace(organ="lobe")  # "right middle and lower lobes"
    places.append(place)


def share_places(findings):
    """A finding without a place is where the one before it is, else where the next one is."""
    pairs = list(zip(findings, findings[1:]))
    for giver, taker in pairs + [(b, a) for a, b in reversed(pairs)]:
        row, other = FINDINGS[taker.name], FINDINGS[giver.name]
        # what is denied is denied everywhere; what is normal is not where the effusion is
        if (giver.places and not taker.places and not row["home"] and taker.existence
                and (other["needs_place"] or not row["needs_place"])):
            taker.places = giver.places
            if other["always_home"]:  # beside the left pleura, not in it
                taker.places = [Place(place.side) for place in giver.places if place.side]


def landmarks(place, home):
    """The landmarks of one Place; a place on both sides is also the joint one, as lung_bases."""
    vague = "" if place.side or place.level else place.vague
    words = f"{place.organ}|{vague}".strip("|") or ("lung" if place.level else home)
    if place.level:
        words += f"|{place.level}"
    joint = "lung_apices" if words in ("lung|upper", "lung|apical") else landmark(words)
    if place.side == "both" and place.organ == "perihilar":
        return [joint]  # around both hila is one place
    names = [landmark(f"{words}|{side}") for side in ("left", "right")
             if place.side in (side, "both")]
    if place.side not in ("left", "right"):
        names.append(joint)
    return [name for name in names if name != "other"] or [joint]


@lru_cache(2 ** 16)  # reports repeat themselves: "No pneumothorax." is read once
def read_clause(text):
    """((concept, landmark, existence), ...) of what stands between two "but" or semicolons."""
    items = read_items(text)
    positions = [i for i, item in enumerate(items) if item.kind == "finding"]
    read_existence(items)
    find_places(items, positions)
    share_places([items[i] for i in positions])
    triplets = []
    for i, after in zip(positions, positions[1:] + [None]):
        finding, row = items[i], FINDINGS[items[i].name]
        if (after and items[after].name in row["adjective_of"].split(" or ")
                and touch(items, i, after)):
            continue  # "nodular opacity" is no nodule
        if row["needs_place"] and finding.existence and not finding.places:
            continue
        for place in finding.places or [Place(organ=row["home"] or "unspecified")]:
            if row["always_home"]:
                place = Place(place.side, organ=row["home"])
            for name in landmarks(place, row["home"] or "lung"):
                triplets.append((finding.name, name, finding.existence))
            said = (finding.name, place.organ or place.vague, finding.existence)
            if said in IMPLIED:
                triplets.append(IMPLIED[said])
    return tuple(dict.fromkeys(triplets))


def extract_triplets(report, buckets=True):
    """[Triplet] of the findings and the impression of a report, else of its last paragraph.

    With buckets a concept outside PATHOLOGIES is tail_abnorm_obs; without, it keeps its name.
    """
    return [Triplet(bucket(concept) if buckets else concept, anatomy, existence, sentence)
            for sentence in sentences(report)
            for clause in re.split(CLAUSE_ENDS, sentence.lower())
            for concept, anatomy, existence in read_clause(clause)]


def rules_key(folder=Path(__file__).parent):
    """A digest of rules, docstrings and tables, not of comments. Caches are keyed by it."""
    programs = [ast.dump(ast.parse((folder / name).read_text("utf-8"))).encode()
                for name in ("text.py", "reports.py")]
    tables = [table.read_bytes() for table in sorted(folder.glob("vocabulary_*.csv"))]
    return hashlib.sha256(b"".join(programs + tables)).hexdigest()


# ------------------------------------------------------------- the score against human index terms

def sides(names):
    """The sides that index terms or landmarks name; the joint landmarks are on both."""
    text = " ".join(names).replace("lingula", "left")
    text = re.sub("bilateral|lung_bases|lung_apices", "left right", text)
    return {side for side in ("left", "right") if side in text}


def parse_args(argv=None):
    parser = Parser(description="Score the rules against the index terms of Open-i.")
    parser.add_argument("--root", default="data/openi", help="folder of the reports")
    return parser.parse_args(argv)


def main(args):
    from sklearn.metrics import classification_report
    from formats.openi import OPENI, reports
    sideless = {"rib", "clavicle", "spine", "mediastinal", "retrocardiac", "other"}
    indexed, asserted, same_side, problems = [], [], [], []
    for record in reports(args.root, problems):
        present = [t for t in extract_triplets(record["report"]) if t.existence == 1]
        for label, headings in OPENI.items():
            terms = [term for term in record["terms"] if term.split("/")[0] in headings]
            places = {t.anatomy for t in present if t.pathology == label.lower()}
            indexed.append(bool(terms))
            asserted.append(bool(places))
            if terms and places - sideless and sides(terms):
                same_side.append(sides(terms) == sides(places))
    if not indexed:
        raise InputError(f"no Open-i report in {args.root}: it should hold ecgen-radiology/*.xml "
                         "or NLMCXR_reports.tgz")
    shape = (-1, len(OPENI))                                        # [N,L]
    print(classification_report(np.reshape(indexed, shape), np.reshape(asserted, shape),
                                target_names=list(OPENI), digits=3, zero_division=0))
    print(f"side right in {np.mean(same_side):.3f} of {len(same_side)}")
    for kind, what in problems:
        print(f"{kind}: {what}")


if __name__ == "__main__":
    run(main, parse_args)
