"""Reports to triplets, triplets to the existence matrix, prompts to text vectors (Sec. II-A).

    python text.py --dataset openi --root DIR       # frequencies, and scores against index terms
    python text.py --radgraph MIMIC-CXR_graphs.json # frequencies in a RadGraph file
    echo "Small left pleural effusion. No pneumothorax." | python text.py --report -

A triplet (pathology, anatomy, existence) comes from the rules in this file or from RadGraph's JSON;
both end in the same matrix. Differs from the paper and the released code in:
- The paper takes RadGraph's triplets only. Our rules need no model: macro F1 0.93 over 17 findings
  against the human index terms of 1,976 Open-i reports, side right in 0.93 (README).
- A bilateral finding is at the joint landmark, as published ("bibasilar" -> lung_bases), and at
  both sides too, so that left_pleural is not unmentioned when both effusions are reported.
- The definitions are our own words; `read_pathology_book` takes the published prompt file.
"""
import argparse
import bisect
import collections
import difflib
import functools
import glob
import hashlib
import html
import itertools
import json
import os
import re
import sys
import tarfile
import warnings
import zlib

import numpy as np

CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"


class InputError(ValueError):
    """A mistake of the user's: scripts print it as one line and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage dump: a wrong flag is one line on stderr and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


# existence: 1 present, 0 denied, -1 in doubt
Triplet = collections.namedtuple(
    "Triplet", "pathology anatomy existence sentence", defaults=("",))

# ------------------------------------------------------------------------------------------------
# Vocabulary: the published 75 + 51 names in their order, with our definitions

_DEFINITIONS = """
normal: Nothing is out of place; size, shape and brightness are as expected.
clear: The lung is evenly dark with fine branching vessels and no white patch in it.
sharp: An edge is seen as a crisp line, such as the lower outer corner of the lung.
sharply: An edge or corner is drawn sharply, with no white haze or fluid hiding it.
unremarkable: Nothing worth mention is seen; the part looks like that of a healthy person.
intact: A bone, wire or device is in one piece, with no break or gap in its line.
stable: The look is the same as on the earlier radiograph, neither larger nor smaller.
free: The space is empty of fluid, air or disease, or air lies free under the diaphragm.
effusion: Fluid in the pleural space around the lung. An even white layer at the base of the lung
  that hides the diaphragm, fills the corner and rises along the chest wall with a curved top edge.
opacity: A white or grey patch in the lung where it should be dark; its cause is left open.
pneumothorax: Air in the pleural space outside the lung. A dark band without vessels between the
  chest wall and a thin white line that is the edge of the partly collapsed lung, often at the top.
edema: Water in the lungs from back pressure of the heart. Hazy white in both lungs spreading from
  the center, with blurred vessels and fine lines.
atelectasis: Lung without air because it folded down. A white band, line or plate, often at the
  base of the lung, with loss of volume that pulls nearby edges toward it.
tube: A long hollow tube with two thin white edges, such as a breathing, feeding or chest tube.
consolidation: Lung filled with fluid or pus. A dense even white patch with soft edges that hides
  the vessels, often with dark branching airways inside.
process: Some active disease of heart or lung, named without saying which one.
abnormality: Something that does not look normal, without saying what it is.
enlarge: A part such as the heart, a vessel or the hilum is larger than it should be.
tip: The far end of a tube, line or catheter, seen as the place where its white line stops.
low: The lungs are small and short and the diaphragm is high because the breath was shallow.
pneumonia: Infection of the lung. A patchy white area with soft edges in one part of the lung,
  at times with dark branching airways inside.
line: A thin long white line crossing the image, most often a catheter in a vein.
congestion: Too much blood in the vessels of the lung. Wide, blurred vessels near the center and
  upper lung, before water leaks out.
catheter: A thin soft tube in a vessel, seen as a long narrow white line that runs to the heart.
cardiomegaly: The heart is too large. The white heart shadow is wider than half of the chest.
fracture: A broken bone. A dark line or a step in the white edge of a rib, clavicle or spine.
air: Gas where it matters, seen as a dark area, such as under the diaphragm or in soft tissue.
tortuous: A vessel, most often the aorta, bends and winds more than it should.
lead: A thin white wire with a small metal end that runs from a pacemaker to the heart.
disease: An illness of lung, heart or airways, named in general words.
calcification: Chalk in tissue. Very white small spots or lines with sharp edges, bright as bone.
prominence: A part such as a vessel, hilum or marking stands out more than usual.
device: A man-made object in or on the chest, very white with straight or sharp edges.
engorgement: Vessels swollen with blood, seen as wide white branches near the center.
picc: A long thin catheter from an arm vein. A narrow white line that ends above the heart.
clip: A tiny very white metal staple left by an operation.
elevation: One side of the diaphragm, or another part, stands higher than it should.
expand: The lungs are filled with air to their full size and reach down to a low diaphragm.
nodule: A small round white spot in the lung, less than three centimeters wide, with a clear edge.
wire: A thin very white metal thread, often loops that hold the breast bone after an operation.
fluid: Liquid where air should be, an even white area that hides the edges next to it.
degenerative: Wear of the spine or joints with age. White spurs and narrow gaps between bones.
pacemaker: A small metal box under the skin of the upper chest with wires that run to the heart.
thicken: A lining or wall, such as the pleural edge, is wider than a thin line.
marking: The fine branching lines of vessels and tissue in the lung, seen more strongly than usual.
scar: Old healed damage. A thin white line or band that does not change, often at the top or base.
hyperinflate: Too much air in the lungs. Large dark lungs with a low flat diaphragm.
blunt: The sharp lower corner of the lung is filled and rounded, mostly by a little fluid or scar.
loss: A lung or lobe has become smaller, so that nearby edges move toward it.
widen: A space or shadow, most often the middle of the chest, is wider than it should be.
collapse: A lung or lobe has lost all its air. A dense white wedge or a small lung at the center,
  and the middle of the chest pulled toward that side.
density: An area whiter than what lies around it; its cause is left open.
emphysema: Destroyed air sacs. Very dark large lungs with few vessels and a low flat diaphragm.
aerate: How well the lung is filled with air; well filled lung is dark.
mass: A large round or lumpy white area in the lung, more than three centimeters wide.
crowd: Vessels stand close together because the lung around them is small.
infiltrate: A patchy white area with unclear edges in the lung, as infection makes it.
obscure: An edge such as the diaphragm or heart cannot be seen because white lies against it.
deformity: A bone or part has an unusual shape, as after an old break.
hernia: Stomach or bowel pushed up through the diaphragm. A round shadow behind the heart, often
  with dark air and a level of fluid inside.
drainage: A tube that lets fluid or air out of the chest.
distention: A hollow part such as the stomach or bowel is stretched wide by dark air.
shift: The middle of the chest or the airway is moved toward one side.
stent: A small tube of metal mesh that holds a vessel or airway open.
pressure: Raised pressure in the vessels of the lung, seen as wide vessels and blurred edges.
lesion: A spot of diseased tissue in lung or bone, white or dark, of any cause.
finding: Something seen on the image, named without saying what it is.
borderline: Just at the limit between normal and too large, said mostly of the heart.
hardware: Metal plates, screws or rods in bone, very white with straight edges.
dilation: A hollow part such as a vessel or airway is wider than it should be.
chf: The heart pumps too weakly. A large heart, wide blurred vessels, hazy white lungs and fluid at
  both bases.
redistribution: Blood moves to the upper lung, so the upper vessels are wider than the lower ones.
aspiration: Food or fluid breathed into the lung. Patchy white in the lower lung, often the right.
tail_abnorm_obs: One of many rare abnormal findings that have no name of their own here.
excluded_obs: A word about change, size or earlier operations that names no disease.
"""
DEFINITIONS = {name: " ".join(words.split())
               for name, words in re.findall(r"^(\w+): (.+(?:\n  .+)*)", _DEFINITIONS, re.M)}
PATHOLOGIES = list(DEFINITIONS)
ANATOMIES = """trachea left_hilar right_hilar hilar_unspec left_pleural right_pleural pleural_unspec
heart_size heart_border left_diaphragm right_diaphragm diaphragm_unspec retrocardiac lower_left_lobe
upper_left_lobe lower_right_lobe middle_right_lobe upper_right_lobe left_lower_lung left_mid_lung
left_upper_lung left_apical_lung left_lung_unspec right_lower_lung right_mid_lung right_upper_lung
right_apical_lung right_lung_unspec lung_apices lung_bases left_costophrenic right_costophrenic
costophrenic_unspec cardiophrenic_sulcus mediastinal spine clavicle rib stomach right_atrium
right_ventricle aorta svc interstitium parenchymal cavoatrial_junction cardiopulmonary pulmonary
lung_volumes unspecified other""".split()


def swap_sides(name):
    """The name of the same place in a mirrored image: left_pleural <-> right_pleural.

    Unsided names come back unchanged. middle_right_lobe, right_atrium and right_ventricle have no
    left partner: the word is swapped all the same (middle_left_lobe), so the result is in no query
    list and the cell of a mirrored image is dropped; swapping twice always gives the name back.
    """
    return re.sub(r"left|right", lambda side: {"left": "right", "right": "left"}[side[0]], name)


# ------------------------------------------------------------------------------------------------
# Places: from words of anatomy to one of the 51 landmarks

# name: words of which one must occur [+ words of which one must too] [- words that must not]
# [= whole strings that match as they stand]. The first match wins; _ is the space in a span of two
# words. S is one side and O the other, so such an entry makes two rules: 49 in all, with the
# results of the published table.
_LANDMARKS = """
trachea: trachea tracheal carina
S_hilar: hilar hilum perihilar + S - O
hilar_unspec: hilar hilum hila perihilar - left right = hilar|left|right perihilar|left|right
S_pleural: pleural pleura + S - O
pleural_unspec: pleural pleura - left right = pleural|left|right
heart_size: heart cardiac - border borders
heart_border: border borders + heart cardiac left right
S_diaphragm: diaphragm hemidiaphragm + S - O
diaphragm_unspec: diaphragm diaphragms hemidiaphragm hemidiaphragms - left right
retrocardiac: retrocardiac
lower_left_lobe: lobe + lower + left
upper_left_lobe: lobe + upper + left = lingula lingular
lower_right_lobe: lobe + lower + right
middle_right_lobe: lobe + middle mid + right
upper_right_lobe: lobe + upper + right
S_lower_lung: lung + lower base + S = base|S basilar|S basal|S lung|S|bases
left_mid_lung: lung + mid middle + left = midlung|left
right_mid_lung: lung + mid middle + right
S_upper_lung: lung + upper + S
S_apical_lung: apical apex + S - O
S_lung_unspec: lung hemithorax + S - O = S S_side thorax|S|hemi
lung_apices: apices - left right = biapical lungs|upper
lung_bases: lung lungs + base bases - left right = bases basilar bibasilar lung|lower lobe|lower
S_costophrenic: costophrenic + S - O
costophrenic_unspec: costophrenic - left right
cardiophrenic_sulcus: cardiophrenic
mediastinal: mediastinal mediastinum cardiomediastinal; spine: spine spinal
clavicle: clavicle clavicles clavicular; rib: rib ribs; stomach: stomach gastric
right_atrium: atrium atrial + right - left; right_ventricle: ventricle ventricular + right - left
aorta: aorta aortic; svc: svc; interstitium: interstitial interstitium; parenchymal: parenchymal
cavoatrial_junction: cavoatrial_junction; cardiopulmonary: cardiopulmonary; pulmonary: pulmonary
lung_volumes: lung lungs volume volumes - left right upper lower mid middle base bases apical apex
"""


def _landmark_rules():
    def words(text):
        return {word.replace("_", " ") for word in text.split()}

    for entry in re.split(r"[;\n] *", _LANDMARKS.strip()):
        for side, other in (("left", "right"), ("right", "left"))[:2 if entry[0] == "S" else 1]:
            rule = re.sub(r"\bO\b", other, re.sub(r"(?<![A-Z])S(?=_|\b)", side, entry))
            name, rest, exact = re.fullmatch(r"(\w+): (.+?)(?: = (.+))?", rule).groups()
            needs, _, bars = rest.partition(" - ")
            yield (name, [words(need) for need in needs.split(" + ")], words(bars),
                   words(exact or ""))


_RULES = list(_landmark_rules())


@functools.lru_cache(2 ** 14)
def landmark(anatomy):
    """The landmark of an anatomy string in RadGraph's order: head word, then its modifiers, with |.

    "lobe|left|lower" -> lower_left_lobe; what fits no rule is "other".
    """
    words = set(anatomy.split("|"))
    for name, needs, bars, exact in _RULES:
        if anatomy in exact or not words & bars and all(words & need for need in needs):
            return name
    return "unspecified" if anatomy == "unspecified" else "other"


# ------------------------------------------------------------------------------------------------
# Sections and sentences of a report

_HEADER = re.compile(
    r"^[ \t]*([A-Z]{2}[A-Z0-9 ()/,&-]*|(?:Findings?|Impression|Conclusion|Indication|Comparison|"
    r"Technique|History|Exam(?:ination)?)):(?=\s|$)|\b(FINDINGS|IMPRESSION|INDICATION|COMPARISON)"
    r"[ \t]*:", re.M)
_BLANK_LINE = r"\n[ \t]*\n"


@functools.lru_cache(2 ** 12)
def _section_name(header):
    """A header in any of its spellings -> "findings", "impression", "" (no header) or itself."""
    name = " ".join(header.lower().split())
    if re.search(r"impression|conclusion", name):
        return "impression"
    if re.search(r"exam|reason|hist|indic|techni|compar|procedure|type|addend|notif|recomm", name):
        return name
    if re.search(r"heart|lung|mediast|pleura|bone|osseous|tube|line|cardi|device", name):
        return ""  # "HEART: Normal." is a line of a structured report
    # "CHEST, TWO VIEWS:" opens the findings of many notes; then typing errors: "IMPRESSON"
    if re.search(r"finding|\b(chest|views?|frontal|lateral|portable|radiographs?|ap|pa)\b", name):
        return "findings"
    return (difflib.get_close_matches(name, ["impression", "findings"], 1, 0.8) or [name])[0]


def sections(report):
    """{section: text} of one report; the last of several sections of one name counts.

    A report with headers but neither findings nor impression gets `last_paragraph`: what follows
    the first blank line of its last section, or of FINAL REPORT if that is the only header. Plain
    text without any header is all `findings`.
    """
    parts = re.split(r"^[ \t]*_{5,}[ \t]*$", report, flags=re.M)
    report = next((part for part in reversed(parts) if part.strip()), "")  # addenda stand on top
    marks = [m for m in _HEADER.finditer(report) if _section_name(m[1] or m[2])]
    if not marks:
        final = re.match(r"\s*FINAL REPORT[ \t]*\n", report)
        body = report[final.end():] if final else report
        later = re.split(_BLANK_LINE, body, maxsplit=1)[1:] if final else []
        return {"last_paragraph": later[0]} if later else {"findings": body}
    found = {}
    for mark, end in zip(marks, [m.start() for m in marks[1:]] + [len(report)]):
        if report[mark.end():end].strip():
            found[_section_name(mark[1] or mark[2])] = report[mark.end():end]
    if not {"findings", "impression"} & set(found):
        later = re.split(_BLANK_LINE, report[marks[-1].end():], maxsplit=1)[1:]
        found["last_paragraph"] = later[0] if later else ""
    return found


def sentences(report):
    """The sentences of findings and impression, else of the last paragraph, as a list."""
    parts = sections(report)
    text = "\n\n".join(parts[name] for name in ("findings", "impression") if name in parts)
    text = text or parts.get("last_paragraph", "")
    # MIMIC wraps lines, so only a blank line ends a sentence; "2) Small effusion" is numbered
    found = re.split(_BLANK_LINE + r"|(?<=[.;!?])\s+|(?<=[a-z]\.)(?=[A-Z])", text)
    return [re.sub(r"^\d{1,2}[.)] ", "", " ".join(s.split())) for s in found
            if re.search(r"[A-Za-z]{3}", s)]


# ------------------------------------------------------------------------------------------------
# Words: what they mean to the rules. In these tables ; ends an entry, name: other words for it

def _entries(table):
    """[(name, [its other words])]"""
    rows = [" ".join(entry.split()).partition(": ") for entry in table.split(";")]
    return [(name, words.split(", ") if words else []) for name, _, words in rows]


_EXCLUDED = set("""none unchanged change great similar large small moderate mild median decrease bad
more constant worsen new improve status position sternotomy cabg replacement postoperative
assessment patient""".split())
_LEMMAS = {word: name for name, words in _entries("""
enlarge: enlargement, increase; engorgement: engorge; opacity: opacification, opacity-;
calcification: calcify; atelectasis: atelectatic, atelectase; aerate: aeration;
distention: distend, distension; widen: wide; prominence: prominent; haziness: haze; mass: masse;
kyphosis: kyphotic; degenerative: degenerate; obscure: obscuration; fibrosis: fibrotic;
nodule: nodular, nodularity; ventilation: ventilate; tortuous: tortuosity; elongation: elongate;
elevation: elevate; drainage: drain; deviation: deviate; consolidation: consolidative, consolidate;
dilation: dilate, dilatation; pneumothorax: hydropneumothorax, pneumothoraces, pneumothorace;
improve: improvement; pacemaker: pacer; pneumonia: infection, infectious, infectious process
""") for word in words}
_LEMMAS.update({"effusion ;": "effusion", "atelectasis ;": "atelectasis"})  # tokens of RadGraph
_CONCEPTS = {*PATHOLOGIES, *_EXCLUDED, *_LEMMAS}


def _stem(word, known):
    """The word without an ending, if that is in `known`: opacities -> opacity, scarring -> scar."""
    for end, put in (("", ""), ("ies", "y"), ("ied", "y"), ("es", ""), ("s", ""), ("ed", ""),
                     ("d", ""), ("ing", ""), ("ing", "e"), ("ring", ""), ("red", "")):
        if word.endswith(end) and word[:len(word) - len(end)] + put in known:
            return word[:len(word) - len(end)] + put
    return word


@functools.lru_cache(2 ** 14)
def lemma(token):
    """Concept of a RadGraph observation token: "opacities" -> opacity, "increased" -> enlarge.

    The published step took spaCy's lemmas; here an ending comes off when a known word remains.
    """
    token = _stem(token.lower(), _CONCEPTS)
    return _LEMMAS.get(token, token)


def _bucket(concept):
    if concept in DEFINITIONS:
        return concept
    return "excluded_obs" if concept in _EXCLUDED else "tail_abnorm_obs"


# @home is where a finding is when the sentence gives no place; with ! it always is there, and the
# sentence adds the side of the pleura at most. ~ marks a finding that says nothing unless a place
# goes with it, - one that is never said by its own name alone.
_FINDINGS = """
~normal: within normal limits, within limits of normal, negative; ~clear; ~sharp; ~sharply;
~unremarkable; ~intact; ~stable: unchanged; ~finding; ~borderline; ~deformity; ~expand; ~widen;
~enlarge: enlargement, increased in size; ~prominence: increased, accentuated; ~obscure;
~distention; ~dilation; fluid; drainage; pressure; process; tip; line; lead; disease; picc; clip;
wire; marking; density; mass; lesion; hernia; stent; aspiration; bronchiectasis; atelectasis;
consolidation; fracture; nodule; scar; collapse; aerate; fibrosis; tube: tubing;
effusion @pleural!: pleural fluid, hemothorax, hydrothorax;
pneumothorax: pleural air collection; -air: free air, free intraperitoneal air,
  subdiaphragmatic air, pneumoperitoneum;
opacity: opacified; infiltrate: infiltration; haziness: hazy; calcification: calcific;
edema @pulmonary: oedema; engorgement @pulmonary; redistribution @pulmonary; crowd @pulmonary;
congestion @pulmonary: congestive change, pulmonary venous hypertension, cephalization;
chf @heart!: congestive heart failure, heart failure;
cardiomegaly @heart!: cardiac enlargement, large heart, heart is large, heart is mildly large,
  heart is moderately large, heart is slightly large, heart size remain slightly large;
-upper limit @heart!: upper limits of normal, upper limit of normal, upper limits normal;
pericardial effusion @heart!: pericardial fluid;
-low @volume!: low lung volume, low volume, decreased lung volume, reduced lung volume,
  volume are low, small lung volume, hypoinflation, hypoinflated, hypoventilation, hypoventilatory,
  hypoaeration, hypoexpanded, hypoexpansion, underinflated, poor inspiration, shallow inspiration;
hyperinflate @volume!: hyperinflation, hyperexpanded, hyperexpansion, hyperaerated, hyperaeration;
-loss: volume loss, loss of volume; emphysema: emphysematous;
copd @lung: chronic obstructive pulmonary disease; cavitation: cavitary, cavity;
pneumonia: bronchopneumonia, pneumonitis, infection, infectious process; granuloma: granulomata;
old infection: granulomatous infection, granulomatous disease, histoplasmosis;
adenopathy: lymphadenopathy; blunt @costophrenic; thicken @pleural: pleural cap, pleural capping;
elevation @diaphragm: eventration; shift @mediastinal: deviation, deviated;
tortuous @aorta: ectatic, ectasia, unfolding; atherosclerosis @aorta: atherosclerotic;
kyphosis @spine; scoliosis @spine: dextroscoliosis, levoscoliosis; osteopenia: demineralization;
degenerative @spine: degeneration, spondylosis, osteophyte, spurring; abnormality: abnormal;
device: generator, defibrillator, icd, aicd; catheter: port, portacath, mediport;
pacemaker: pacer; hardware: fusion; subcutaneous emphysema: soft tissue emphysema"""
_ANATOMY = {  # by the slot of a Place
    "side": "left; right; both: bilateral, bilaterally",
    "level": """upper; mid: middle, midlung; lower: base, basilar, basal; bases: bibasilar, bibasal;
        apical: apex; apices: biapical; lingula: lingular""",
    "organs": """lobe; lung: hemithorax; volume; pleural: pleura; costophrenic; cardiophrenic;
        diaphragm: hemidiaphragm; hilar: hilum, hila, suprahilar, infrahilar; perihilar;
        heart: cardiac; border; mediastinal: mediastinum, paratracheal; cardiomediastinal;
        trachea: tracheal, endotracheal, carina; retrocardiac; cardiopulmonary;
        spine: vertebra, vertebrae, vertebral, thoracolumbar; clavicle; rib; stomach: gastric;
        atrium: atrial; ventricle: ventricular; aorta: aortic; svc: superior vena cava;
        cavoatrial junction; interstitial: interstitium; parenchymal; artery;
        pulmonary: vascular, vascularity, vasculature, vessel, bronchovascular; thorax: chest;
        bone: bony, osseous, skeletal, shoulder, humerus, sternum; soft tissue; abdomen; breast;
        neck"""}
# What other words do to the findings around them. deny, doubt: to those that follow. denied,
# doubted: to those before, or to those that follow if there are none. keep: looks like a denial and
# is none. split: ends the clause. reset: a new statement begins. The rest tells what may stand
# between a finding and its place.
_TRIGGERS = """
deny: no, without, negative for, free of, clear of, absence of, lack of, resolution of, clearing of,
  rather than, nor, neither, removal of;
denied: not, none, no longer, resolved, cleared, absent, been removed, ruled out;
keep: increase, no change, no significant change, no interval change, without change, not well,
  no significant interval change, no appreciable change, no increase, no decrease, not changed,
  without significant change, not significantly changed, not only, not as well, not clearly, if any;
doubt: may, might, could, possible, possibly, potentially, possibility, questionable, question,
  suspicious, suspicion, suspect, concern, concerning, worrisome, suggest, suggesting, suggestive,
  differential, etiology, consider, consideration, whether, unclear, if, favored, rule out, exclude,
  cannot exclude, cannot rule out, not exclude, to exclude, evaluate, evaluation, correlate,
  correlation, recommend, recommended, history of, previously, clinical setting;
doubted: not excluded, excluded, not be excluded, cannot be excluded, cannot be ruled out,
  not be ruled out, difficult to exclude, suspected, questioned, is possible, are possible,
  also possible, is a possibility, another consideration, a consideration, may not be;
split: but, however, although, though, while, whereas, except, aside from, other than;
reset: there is, there are, there has, there have, which, who;
join: and, or, versus, vs, greater than, more than, larger than, worse than;
prep: in, at, of, within, involving, overlying, over, along, near, throughout, to, through, from,
  around, projecting, about, on, for, into, above, below, behind, across, under, beneath, with;
verb: is, are, was, were, be, been, has, have, appear, remain, seen, noted, identified, present,
  demonstrate, demonstrated, show, visualized, persist, represent, representing, reflect,
  reflecting, compatible, consistent, due, secondary, indicating;
glue: the, aspect, portion, side, sided, region, zone, field, lateral, medial, anterior, posterior,
  peripheral, inferior, superior, distal, proximal, angle, sulcus, sulci, recess, size, silhouette,
  contour, structure, shadow, based, limited, leading"""
# A comma or "and" before one of these ends a denial: "no effusion, mild cardiomegaly"
_FRESH = set("small tiny trace mild mildly minimal moderate moderately stable unchanged persistent "
             "chronic old healed again there low tortuous degenerative improved".split())
_HEALTHY = set(PATHOLOGIES[:8])
# places that say too little to stand beside a side, a level or another organ
_WEAK = {"pulmonary", "interstitial", "parenchymal", "thorax", "retrocardiac", "trachea"}
# before a second finding: it is on the same side as the first, in another organ
_NEXT_TO = {"adjacent", "associated", "underlying", "compressive", "overlying"}
# (concept, organ, existence) of what was read -> the triplet that it says in other words
_IMPLIED = {
    ("sharp", "costophrenic", 1): ("blunt", "costophrenic_unspec", 0),
    **{(word, organ, read): ("cardiomegaly", "heart_size", means)
       for organ in ("heart", "cardiomediastinal")
       for word, read, means in (("normal", 1, 0), ("unremarkable", 1, 0), ("enlarge", 0, 0),
                                 ("enlarge", 1, 1), ("borderline", 1, 1))},
    **{(word, "pulmonary", read): ("congestion", "pulmonary", read) for read in (0, 1)
       for word in ("engorgement", "prominence", "enlarge", "redistribution", "distention")}}


def _read_tables():
    """The lexicon {tuple of words: (kind, value)}, the homes of findings, and what ! and ~ mark."""
    lexicon, homes, fixed, needs_place = {}, {}, set(), set()

    def add(phrases, kind, value=""):
        lexicon.update((tuple(phrase.split()), (kind, value)) for phrase in phrases)

    add(",:()", "comma")
    add("/", "join")
    add(";", "split")
    for entry, words in _entries(_FINDINGS):
        mark, name, home, always = re.fullmatch(r"([~-]?)(.+?)(?: @(\w+)(!?))?", entry).groups()
        homes[name] = home or ""
        if always:
            fixed.add(name)
        if mark == "~":
            needs_place.add(name)
        add(words if mark == "-" else [name] + words, "find", name)
    for slot, table in _ANATOMY.items():
        for name, words in _entries(table):
            add([name] + words, "place", (slot, name))
    for kind, words in _entries(_TRIGGERS):
        add(words, kind)
    return lexicon, homes, fixed, needs_place


_LEXICON, _HOME, _FIXED, _NEEDS_PLACE = _read_tables()
_WORDS = {word for phrase in _LEXICON for word in phrase}
_STARTS = collections.defaultdict(list)  # first word -> its phrases, longest first
for _phrase in sorted(_LEXICON, key=len, reverse=True):
    _STARTS[_phrase[0]].append(_phrase)

# ------------------------------------------------------------------------------------------------
# Rules: from a sentence to triplets, in five steps. "No effusion, mild scarring in the left base."
#
#   _scan          deny, find effusion, comma, word mild, find scar, prep in, glue the, place left,
#                  place lower
#   _merge_places  the last two become one Place(left, lower)
#   _existence     effusion 0; the comma before "mild" ends the denial, so scar 1
#   _own_places    scar is at that place; effusion has none, so it stays at its home, the pleura
#   _landmarks     (effusion, pleural_unspec, 0) and (scar, left_lower_lung, 1)

Item = collections.namedtuple("Item", "kind value word")
Place = collections.namedtuple("Place", "side level organs", defaults=("", "", ()))


@functools.lru_cache(2 ** 14)
def _base(word):
    """The form that the tables know: lobes -> lobe, calcified -> calcification."""
    word = _stem(word, _WORDS)
    return word if word in _WORDS else lemma(word)


def _scan(sentence):
    """A sentence as Items: known phrases, longest first, and unknown words as kind "word"."""
    text = re.sub(r"(x-)?x{3,}|_{2,}", " ", sentence.lower())  # de-identified spans are no words
    words = [_base(word) for word in re.findall(r"[a-z]+|[,;:()/]", text)]
    items, i = [], 0
    while i < len(words):
        phrase = next((phrase for phrase in _STARTS.get(words[i], ())
                       if phrase == tuple(words[i:i + len(phrase)])), (words[i],))
        items.append(Item(*_LEXICON.get(phrase, ("word", "")), " ".join(phrase)))
        i += len(phrase)
    return items


def _merge_places(items):
    """Runs of anatomy words become one item: "base of the left lung" -> Place(left, lower, lung)"""
    merged, at = [], None  # at: where the place lies that the next anatomy word may add to
    for item in items:
        if item.kind == "place":
            slot, name = item.value
            place = Place() if at is None else merged[at].value
            if slot != "organs" and getattr(place, slot) not in ("", name):
                place, at = Place(), None  # a second side or level opens the next place
            if at is None:
                at = len(merged)
            new = place.organs + (name,) if slot == "organs" else name
            merged[at:] = [Item("place", place._replace(**{slot: new}), "")]
        else:
            if item.kind not in ("glue", "word") and item.word not in ("of", "on"):
                at = None
            merged.append(item)
    return merged


def _existence(items):
    """{index of a finding: 1 present, 0 denied, -1 in doubt} within one clause."""
    values, mode = {}, 1   # mode: what the last trigger says of the findings to come
    subject = []           # the findings that a later "has resolved" is about
    closed = False         # their verb has been seen, so "and" opens a new statement
    joined = False         # a comma or "and" came after the last trigger or finding
    for i, (kind, value, word) in enumerate(items):
        if kind == "find":
            if value in _HEALTHY and mode == 0 and joined:
                mode = 1    # "no effusion, heart size normal"
            if value == "normal" and closed and not joined and items[subject[-1]].value != "stable":
                values[subject[-1]] = 0  # "vascular engorgement is within normal limits"
            values[i] = mode
            subject.append(i)
            closed = joined = False
        elif kind in ("denied", "doubted") and subject and not (
                word == "not" and any(item.kind == "find" for item in items[i:])):
            # "[effusion] has resolved", but "nodule that is not calcified"
            values.update((f, 0 if kind == "denied" else -1) for f in subject)
            closed = True
        elif kind in ("deny", "denied", "doubt", "doubted"):
            mode, joined = 0 if kind in ("deny", "denied") else -1, False
        elif kind == "reset":
            mode, subject, closed = 1, [], False
        elif kind == "verb":
            closed = bool(subject)
        elif kind in ("comma", "join") or word == "with":
            joined = True
            after = next((item.word for item in items[i + 1:] if item.word in _FRESH or
                          item.kind in ("find", "verb", "comma", "join")), "")
            # "no edema, small effusion or mass" denies all three: the list ends at its "or"
            listed = mode == 0 and any(item.word in ("or", "nor") for item in items[i:])
            if not listed and (closed and word not in ("or", "with")
                               or mode == 0 and after in _FRESH):
                mode, subject, closed = 1, [], False
    return values


def _is_somewhere(place):
    return bool(place.side or place.level or set(place.organs) - _WEAK)


def _own_places(items, finds):
    """{finding: [Place]}: what stands right before it, else behind it, else the open subject."""
    free = {i for i, item in enumerate(items) if item.kind == "place"}
    own = {f: [] for f in finds}
    # a finding with a fixed home takes no place away from others, but for the side of the pleura
    finds = [f for f in finds if items[f].value not in _FIXED or _HOME[items[f].value] == "pleural"]

    def take(f, found):
        own[f] += [items[j].value for j in found]
        free.difference_update(found)

    for f in finds:  # "left basilar and right upper lobe patchy [opacity]"
        found = []
        for j in range(f - 1, -1, -1):
            if j in free:
                found.insert(0, j)
            elif items[j].kind not in (("comma", "join", "word") if found else ("word", "glue")):
                break
        take(f, found)
    for f in finds:  # "[opacity] in the left base and lingula"
        end = next((g for g in own if g > f), len(items))
        placed = any(_is_somewhere(p._replace(side="")) for p in own[f])
        if placed and any(p.side for p in own[f]):
            continue  # nothing to add
        found, link = [], set()  # link: kinds between the last place and this one
        for j in range(f + 1, end):
            if j not in free:
                link.add(items[j].kind)
                continue
            listed = link & {"comma", "join"}
            more = end < len(items) or any(item.kind == "verb" for item in items[j:])
            if "prep" not in link and (more if listed else "verb" in link):
                break  # the subject of what comes next: "[opacity] is seen, heart size ..."
            if found and not link <= {"comma", "join", "glue", "prep"}:
                break  # the list of places has ended
            if placed and (items[j].value[1:] != ("", ()) or "prep" not in link):
                break  # only a side can still be added: "basilar [opacity] on the left"
            found.append(j)
            link = set()
        if placed and found:
            own[f] = [p._replace(side=items[found[0]].value.side) for p in own[f]]
            free.difference_update(found)
        else:
            take(f, found)
    last = -1
    for f in finds:  # "The left lung base shows [opacity]", "Heart and mediastinum are [normal]"
        if not own[f]:
            take(f, [j for j in range(last + 1, f) if j in free])
        last = f
    return own


def _share_places(items, values, own):
    """Neighbours in a list share a place: "atelectasis or scar in the left base"."""
    concept = {f: items[f].value for f in own}

    def homeless(f):
        return (not _HOME[concept[f]] and concept[f] not in _NEEDS_PLACE
                and not any(map(_is_somewhere, own[f])))

    pairs = [(a, b, {item.kind for item in items[a + 1:b]}) for a, b in zip(own, list(own)[1:])]
    for a, b, kinds in reversed(pairs):  # "calcified [nodule in the left base]"
        listed = (kinds & {"join", "comma"} and values[a] == values[b]
                  and concept[b] not in _FIXED)
        if homeless(a) and own[b] and (listed or not kinds & {"verb", "comma", "prep", "join"}):
            own[a] = own[b]
    for a, b, kinds in pairs:
        if homeless(b) and own[a] and values[b]:  # what is denied is denied everywhere
            if _NEXT_TO & {item.word for item in items[a + 1:b]}:
                own[b] = [p._replace(organs=()) for p in own[a]]  # "left effusion, adjacent [...]"
            elif concept[a] not in _FIXED:
                own[b] = own[a]
        elif (not own[b] and {concept[a], concept[b]} <= _NEEDS_PLACE
              and kinds <= {"join", "comma", "word", "glue", "verb"}):
            own[b] = own[a]  # "The lungs are expanded and [clear]"


def _complete(places):
    """Fill what a list leaves out: "left and right lower lobes", "right middle and lower lobes"."""
    places = list(places)  # neighbours share the list
    for i in range(len(places) - 2, -1, -1):
        here, after = places[i], places[i + 1]
        if not here.organs and (not here.level or set(after.organs) <= {"lobe", "lung"}):
            places[i] = here._replace(organs=after.organs, level=here.level or after.level)
    for i in range(1, len(places)):
        if not places[i].side and places[i].level:
            places[i] = places[i]._replace(side=places[i - 1].side)
    if any(p.side or p.level for p in places):  # "interstitial opacity in the left base"
        places = [p for p in places if _is_somewhere(p)]
    return places


def _landmarks(place, home):
    """The landmarks of one Place; both sides are also the joint landmark, such as lung_bases."""
    side, level, organs = place
    if level == "lingula":
        return ["upper_left_lobe"]
    if level in ("bases", "apices"):
        side, level = side or "both", {"bases": "lower", "apices": "apical"}[level]
    if level or side and organs != ("retrocardiac",):  # "left retrocardiac": behind the heart
        organs = tuple(organ for organ in organs if organ not in _WEAK)
    if not organs:
        organs = (home,) if home and not level else ("lung",)
    if level == "mid" and side != "right":  # only the right lung has a middle lobe
        organs = tuple("lung" if organ == "lobe" else organ for organ in organs)
    words = organs + (level,) * bool(level)
    sides = {"": [], "both": ["left", "right"]}.get(side, [side])
    names = [landmark("|".join(words + (one,))) for one in sides]
    if len(sides) != 1:
        zone = {"apical": "biapical", "upper": "lungs|upper"}.get(level)
        joint = landmark(zone if zone and "lung" in organs else "|".join(words))
        # around both hila is one place, as published
        names = [joint] if joint == "hilar_unspec" else names + [joint]
    return [name for name in names if name != "other"] or ["other"]


def _read_clause(items):
    """Yield the (concept, landmark, existence) of the findings between two "but" or semicolons."""
    finds = [i for i, item in enumerate(items) if item.kind == "find"]
    values = _existence(items)
    own = _own_places(items, finds)
    _share_places(items, values, own)
    for f, after in zip(finds, finds[1:] + [None]):
        concept, value = items[f].value, values[f]
        if after and {item.kind for item in items[f + 1:after]} <= {"word", "glue", "place"}:
            # an adjective of another finding is none itself, as RadGraph's `modify` has it
            noun = items[after].value
            if (concept in _NEEDS_PLACE and noun not in _NEEDS_PLACE
                    or concept == "nodule" and noun in ("opacity", "density", "infiltrate")
                    or (concept, noun) == ("calcification", "granuloma")):
                continue
        if not own[f] and concept in _NEEDS_PLACE and (concept, value) != ("finding", 0):
            continue
        home = _HOME[concept]
        for place in _complete(own[f]) or [Place(organs=(home or "unspecified",))]:
            if concept in _FIXED:
                place = Place(place.side, "", (home,))
            for name in _landmarks(place, home):
                yield concept, name, value
            for organ in place.organs:
                if (concept, organ, value) in _IMPLIED and "artery" not in place.organs:
                    yield _IMPLIED[concept, organ, value]


@functools.lru_cache(2 ** 16)  # reports repeat themselves: "No pneumothorax." is read once
def _read_sentence(sentence):
    """((concept, landmark, existence), ...) of one sentence."""
    items, triplets = _merge_places(_scan(sentence)), []
    for split, clause in itertools.groupby(items, lambda item: item.kind == "split"):
        if not split:
            triplets += _read_clause(list(clause))
    return tuple(dict.fromkeys(triplets))


def extract_triplets(report, buckets=True):
    """[Triplet] of one report by rules: findings and impression, or the last paragraph.

    existence is 1 present, 0 denied, -1 in doubt ("may represent"). With buckets, a concept outside
    PATHOLOGIES is tail_abnorm_obs; without, it keeps its own name ("granuloma").
    """
    return [Triplet(_bucket(name) if buckets else name, anatomy, existence, sentence)
            for sentence in sentences(report)
            for name, anatomy, existence in _read_sentence(sentence)]


# ------------------------------------------------------------------------------------------------
# RadGraph: from its JSON to the same triplets

_RADGRAPH_LABELS = {  # of RadGraph 1.0 and of RadGraph-XL; other anatomy labels are dropped
    "ANAT-DP": "place", "OBS-DP": 1, "OBS-DA": 0, "OBS-U": -1,
    "Anatomy::definitely present": "place", "Observation::definitely present": 1,
    "Observation::definitely absent": 0, "Observation::uncertain": -1}


def radgraph_triplets(graph, buckets=True):
    """[Triplet] of one report's RadGraph JSON (1.0 or XL; with two annotators the first is read).

    An observation is placed at the anatomies of its own sentence that it is located_at; without
    any relation it is `unspecified`; with other relations only it is dropped, as published. OBS-U
    has existence -1. Without buckets rare concepts keep their lemma, and words of change and size
    (excluded_obs) are left out.
    """
    entities = graph["entities"] if "entities" in graph else graph["labeler_1"]["entities"]
    kinds = {key: _RADGRAPH_LABELS.get(entity["label"].replace("::measurement", ""))
             for key, entity in entities.items()}
    words = graph["text"].split()
    ends = [i for i, word in enumerate(words) if word in (".", "?", "!") and not
            (words[i - 1].isdigit() and words[i + 1:] and words[i + 1].isdigit())]  # 2 . 5 cm
    bounds = [0] + [end + 1 for end in ends] + [None]
    keys = sorted((key for key in entities if kinds[key] is not None), key=int)
    sentence = {key: bisect.bisect_left(ends, entities[key]["start_ix"]) for key in keys}
    relations = {key: [(name, target) for name, target in entities[key]["relations"]
                       if kinds.get(target) is not None] for key in keys}

    def token(key):
        text = entities[key]["tokens"].lower()
        # XL's spans hold several words; the rules want them apart unless they name a landmark
        xl = "::" in entities[key]["label"] and landmark(text) == "other"
        return text.replace(" ", "|") if xl else text

    landmarks = collections.defaultdict(list)  # (sentence, anatomy or its modifier) -> landmarks
    for key in keys:
        if kinds[key] == "place" and not relations[key]:
            parts = [key] + [k for k in keys if kinds[k] == "place" and sentence[k] == sentence[key]
                             and key in [target for _, target in relations[k]]]
            name = landmark("|".join(token(k) for k in parts))
            for k in parts:
                landmarks[sentence[key], k].append(name)
    triplets = []
    for key in keys:
        concept = lemma(entities[key]["tokens"])
        if kinds[key] == "place" or not buckets and concept in _EXCLUDED:
            continue
        s = sentence[key]
        names = [name for relation, target in relations[key] if relation == "located_at"
                 for name in landmarks[s, target]] if relations[key] else ["unspecified"]
        said = " ".join(words[bounds[s]:bounds[s + 1]])
        triplets += [Triplet(_bucket(concept) if buckets else concept, name, kinds[key], said)
                     for name in names]
    return triplets


def read_radgraph(path, chunk=1 << 22):
    """Yield (key, graph) of a RadGraph file, one report at a time.

    MIMIC-CXR_graphs.json is one object of 220,763 reports; read in pieces of `chunk` characters, it
    is never in memory as a whole. Raises InputError when it is missing, cut off or another file.
    """
    decoder, opening = json.JSONDecoder(), re.compile(r'[\s,{]*("(?:[^"\\]|\\.)*")\s*:\s*')
    try:
        with open(path, encoding="utf-8") as file:
            text, at = file.read(chunk), 0
            while True:
                try:
                    key = opening.match(text, at)
                    graph, at = decoder.raw_decode(text, key.end())
                except (AttributeError, ValueError):  # the piece ends inside a report, or no JSON
                    more = file.read(chunk)
                    text, at = text[at:] + more, 0
                    if not more:
                        break
                    continue
                if not isinstance(graph, dict) or not {"entities", "labeler_1"} & graph.keys():
                    raise InputError(f"{path} is not RadGraph's JSON: {key[1]} has no entities")
                yield json.loads(key[1]), graph
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the RadGraph file {path}: {error}") from None
    if text.strip() not in ("}", "{}"):
        raise InputError(f"{path} is not RadGraph's JSON, or is cut off near {text[:40]!r}")


def annotate(reports):
    """RadGraph-XL graphs of a list of reports, by the optional `radgraph` package."""
    try:
        from radgraph import RadGraph
    except ImportError:
        raise InputError("--extractor radgraph needs the radgraph package (pip install radgraph); "
                         "--extractor rules needs nothing") from None
    graphs = RadGraph(model_type="radgraph-xl")(["\n".join(sentences(r)) for r in reports])
    return [graphs[str(i)] for i in range(len(reports))]


# ------------------------------------------------------------------------------------------------
# Triplets to matrices and query sets

def existence_matrix(triplets, pathologies, anatomies, uncertain=-1):
    """int8 [n,m]: 1 present, 0 denied, -1 not mentioned; 1 outranks 0 outranks -1 in any order.

    `uncertain` is the value of triplets in doubt. A name outside the lists goes to
    tail_abnorm_obs / other where the lists have them; else the triplet is dropped.
    """
    columns = {name: i for i, name in enumerate(pathologies)}
    rows = {name: i for i, name in enumerate(anatomies)}
    matrix = np.full((len(rows), len(columns)), -1, np.int8)  # [n,m]
    for pathology, anatomy, existence, *_ in triplets:
        row = rows.get(anatomy, rows.get("other"))
        column = columns.get(pathology, columns.get("tail_abnorm_obs"))
        if row is not None and column is not None:
            value = uncertain if existence < 0 else existence
            matrix[row, column] = max(matrix[row, column], value)
    return matrix


def top_queries(triplets, m, n):
    """The m pathologies and n anatomies with most definite mentions (present or denied), as lists.

    Ties go to the name that comes first in the alphabet, so the order of reports does not matter.
    """
    def most(position, k):
        counts = collections.Counter(t[position] for t in triplets if t[2] >= 0)
        return sorted(counts, key=lambda name: (-counts[name], name))[:k]

    triplets = list(triplets)
    return most(0, m), most(1, n)


# ------------------------------------------------------------------------------------------------
# Prompts and their vectors

def read_pathology_book(path):
    """The published `observation explanation.json` as {name: sentence} over PATHOLOGIES.

    Read by position: key 20 of every published copy is a typo for pneumonia.
    """
    try:
        with open(path, encoding="utf-8") as file:
            book = list(json.load(file).values())
        if len(book) != len(PATHOLOGIES) or not all(isinstance(said, str) for said in book):
            raise ValueError(f"it holds {len(book)} entries")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a readable prompt book ({error}); it should be a JSON "
                         f"object of {len(PATHOLOGIES)} name: sentence pairs, in the published "
                         "order") from None
    return dict(zip(PATHOLOGIES, book))


def pathology_prompts(names, book=None):
    """One sentence a name from `book` (default DEFINITIONS); names without one get a template, and
    a warning lists them."""
    book = DEFINITIONS if book is None else book
    unknown = [name for name in names if name not in book]
    if unknown:
        warnings.warn("no definition, so a template is used for: " + ", ".join(unknown))
    return [book.get(name, f"{name.replace('_', ' ').capitalize()} is seen on the radiograph.")
            for name in names]


_PLACES = {"hilar": "hilum", "pleural": "pleural space", "costophrenic": "costophrenic angle",
           "svc": "superior vena cava", "mediastinal": "mediastinum", "heart size": "heart",
           "apical lung": "apical lung at the top", "parenchymal": "tissue of the lung",
           "pulmonary": "vessels of the lungs", "cardiopulmonary": "heart and lungs",
           "retrocardiac": "lung behind the heart", "interstitium": "interstitium of the lung",
           "lung volumes": "lungs on both sides", "unspecified": "chest, at no stated place",
           "other": "chest, at another place"}


def anatomy_prompts(names, published=False):
    """One sentence a place. published=True is the released wording, for the released weights."""
    if published:
        return [f"It is located at {name}. " for name in names]
    prompts = []
    for name in names:
        side, words = re.fullmatch("(left |right |)(.*)", name.replace("_", " ")).groups()
        place = words.removesuffix(" unspec")
        prompts.append(f"It is located at the {side}{_PLACES.get(place, place)}"
                       f"{', side not stated' if not side and place != words else ''}.")
    return prompts


def encode_text(prompts, encoder, cache_dir=None):
    """float32 [k,T] tensor of frozen text vectors, one row a prompt.

    encoder: "hashing" (scikit-learn, T = 768, words and word pairs, no download) or the name or
    folder of a Hugging Face BERT, whose CLS vector is taken. With cache_dir the vectors are kept
    there in a file keyed by encoder and prompts. Raises InputError when the encoder cannot load.
    """
    import torch
    prompts, path = list(prompts), None
    if cache_dir is not None:
        # a folder can be filled anew under the same name, so its files' sizes and times count
        files = sorted(os.scandir(encoder), key=lambda f: f.name) if os.path.isdir(encoder) else []
        state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        key = hashlib.sha256(json.dumps([str(encoder), state, prompts]).encode()).hexdigest()
        path = os.path.join(cache_dir, f"text-{key[:16]}.npy")
        if os.path.exists(path):
            return torch.from_numpy(np.load(path, allow_pickle=False))
    if encoder == "hashing":
        from sklearn.feature_extraction.text import HashingVectorizer
        hasher = HashingVectorizer(n_features=768, ngram_range=(1, 2), norm="l2")
        vectors = hasher.transform(prompts).toarray().astype(np.float32)  # [k,768]
    else:
        vectors = _bert_vectors(prompts, str(encoder))
    if path is not None:
        try:
            os.makedirs(cache_dir, exist_ok=True)
            with open(f"{path}.{os.getpid()}", "wb") as file:
                np.save(file, vectors)
            os.replace(file.name, path)  # by rename: other ranks never see half a file
        except OSError:  # a cache shared read-only, or full: the vectors are still at hand
            warnings.warn(f"text vectors cannot be kept in {cache_dir}; they are made each time")
    return torch.from_numpy(vectors)


def _bert_vectors(prompts, encoder, batch=32):
    import torch
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise InputError(f"--text-encoder {encoder} needs the transformers package (pip install "
                         "transformers); --text-encoder hashing needs nothing") from None
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
            model = AutoModel.from_pretrained(encoder, local_files_only=True)
        except OSError:
            if os.path.isdir(encoder):
                raise
            # one question first: from_pretrained repeats itself for a minute without network
            from huggingface_hub import model_info
            model_info(encoder, timeout=10)
            tokenizer = AutoTokenizer.from_pretrained(encoder)
            model = AutoModel.from_pretrained(encoder)
    except Exception as error:  # offline, unknown name, broken folder: each has its own class
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"text encoder {encoder!r} cannot be loaded ({reason}); give the folder "
                         "of a downloaded model, or --text-encoder hashing, which needs none"
                         ) from None
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    cut = sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False)["input_ids"])
    if cut:
        warnings.warn(f"{cut} prompts are longer than the {limit} tokens of {encoder} and are cut")
    vectors = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch):
            tokens = tokenizer(prompts[start:start + batch], padding=True, truncation=True,
                               max_length=limit, return_tensors="pt")
            # the attention mask keeps padding out, so a vector does not depend on its neighbours
            vectors.append(model.eval()(**tokens).last_hidden_state[:, 0].float())  # CLS [b,T]
    return torch.cat(vectors).numpy()


# ------------------------------------------------------------------------------------------------
# Open-i: reports with human index terms, and the rules scored against them

# finding: its headings among the index terms. The indexers leave out what is only suspected.
_OPENI = {
    "cardiomegaly": ["Cardiomegaly"], "effusion": ["Pleural Effusion"],
    "atelectasis": ["Pulmonary Atelectasis"], "opacity": ["Opacity"], "pneumonia": ["Pneumonia"],
    "nodule": ["Nodule"], "mass": ["Mass"], "calcification": ["Calcinosis"],
    "congestion": ["Pulmonary Congestion"], "edema": ["Pulmonary Edema"],
    "consolidation": ["Consolidation"], "infiltrate": ["Infiltrate"], "scar": ["Cicatrix"],
    "emphysema": ["Emphysema", "Pulmonary Emphysema", "Bullous Emphysema"],
    "pneumothorax": ["Pneumothorax", "Hydropneumothorax"], "fracture": ["Fractures, Bone"],
    "hernia": ["Hernia, Hiatal"]}
_SIDELESS = {"rib", "clavicle", "spine", "mediastinal", "retrocardiac", "other"}


def read_openi_xml(source):
    """One Open-i report: {"id", "report", "images" [file stems], "terms" [index terms]}.

    source: bytes or a binary file. Raises InputError when it is not such an XML file.
    """
    import xml.etree.ElementTree as ET
    try:
        root = ET.fromstring(source if isinstance(source, bytes) else source.read())
    except ET.ParseError as error:
        raise InputError(f"not an Open-i report: {error}") from None
    parts = [(e.get("Label", ""), html.unescape(e.text or "")) for e in root.iter("AbstractText")]
    return {"id": next((e.get("id") for e in root.iter("uId")), ""),
            "report": "\n\n".join(f"{label}: {said}" for label, said in parts if said.strip()),
            "images": [e.get("id", "") for e in root.iter("parentImage")],
            "terms": [(e.text or "").strip() for e in root.iter("major")]}


def read_openi(root):
    """Yield the reports under root: ecgen-radiology/*.xml, or NLMCXR_reports*.tgz as it came."""
    folders, bare, archives = (
        sorted(glob.glob(pattern, root_dir=root))
        for pattern in ("ecgen-radiology/*.xml", "*.xml", "NLMCXR_reports*.tgz"))
    names = folders or bare or archives
    if not names:
        raise InputError(f"no ecgen-radiology/*.xml and no NLMCXR_reports*.tgz in {root}; get the "
                         "reports at https://openi.nlm.nih.gov/faq")
    for path in (os.path.join(root, name) for name in names):
        try:
            with open(path, "rb") as file:
                if path.endswith(".xml"):
                    yield read_openi_xml(file)
                    continue
                with tarfile.open(fileobj=file) as tar:
                    yield from (read_openi_xml(tar.extractfile(member)) for member in tar
                                if member.name.endswith(".xml"))
        except (OSError, EOFError, zlib.error, tarfile.TarError, InputError) as error:
            raise InputError(f"cannot read {path}: {error}") from None


def _sides(names):
    """The sides that index terms or landmarks name; the joint landmarks are on both."""
    text = " ".join(names)
    both = re.search(r"bilateral|lung_bases|lung_apices", text)
    return {s for s in ("left", "right") if both or s in text or s == "left" and "lingula" in text}


def score_openi(records):
    """Rules against index terms: ({finding: [tp, fp, fn]}, [sides right, sides compared], errors).

    errors are (finding, kind, report id, sentence). A side is compared where both agree on the
    finding, the term names a side, and the place has sides in the vocabulary (a rib has none).
    """
    counts, sides, errors = {name: [0, 0, 0] for name in _OPENI}, [0, 0], []
    for record in records:
        triplets = extract_triplets(record["report"])
        for name, headings in _OPENI.items():
            terms = [t for t in record["terms"] if t.split("/")[0].strip() in headings]
            said = [t for t in triplets if t.pathology == name]
            found = [t for t in said if t.existence == 1]
            kind, example = "", ([t.sentence for t in found + said] + terms + [""])[0]
            if terms and found:
                counts[name][0] += 1
                places = {t.anatomy for t in found}
                want, got = _sides(terms), _sides(places)
                if want and places - _SIDELESS:
                    sides[0] += want == got
                    sides[1] += 1
                    if want != got:
                        kind = "another side than indexed" if got else "side indexed, none read"
            elif found:
                counts[name][1] += 1
                kind = "asserted, not indexed"
            elif terms:
                counts[name][2] += 1
                kind = ("indexed, text in doubt" if any(t.existence < 0 for t in said) else
                        "indexed, text denies" if said else "indexed, not recognised")
            if kind:
                errors.append((name, kind, record["id"], example))
    return counts, sides, errors


def _print_openi_scores(records):
    counts, sides, errors = score_openi(records)
    print(f"\n{'finding':14s} {'P':>5s} {'R':>5s} {'F1':>5s} {'indexed':>8s}")
    total = 0
    for name, (tp, fp, fn) in counts.items():
        f1 = 2 * tp / max(1, 2 * tp + fp + fn)
        total += f1
        print(f"{name:14s} {tp / max(1, tp + fp):5.2f} {tp / max(1, tp + fn):5.2f} {f1:5.2f} "
              f"{tp + fn:8d}")
    print(f"macro F1 {total / len(counts):.3f} over {len(counts)} findings; side exactly right in "
          f"{sides[0] / max(1, sides[1]):.3f} of {sides[1]}\ncommonest remaining errors:")
    for (name, kind), n in collections.Counter(e[:2] for e in errors).most_common(5):
        uid, said = next(e[2:] for e in errors if e[:2] == (name, kind))
        print(f"  {n:3d}  {name}: {kind}, e.g. {uid} {said[:60]!r}")


# ------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = Parser(prog="text.py", description="Triplets of reports, by rules or RadGraph.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--report", help="print the triplets of this text file; - is standard input")
    what.add_argument("--radgraph", metavar="FILE", help="frequencies in a RadGraph JSON file")
    what.add_argument("--dataset", choices=["openi"], help="frequencies, and index-term scores")
    parser.add_argument("--root", default="data/openi", help="folder of --dataset")
    parser.add_argument("--extractor", choices=["rules", "radgraph"], default="rules",
                        help="for --report: our rules, or the radgraph package if installed")
    parser.add_argument("--top", type=int, default=20, help="rows of the frequency tables")
    return parser.parse_args(argv)


def print_report(args):
    try:
        report = sys.stdin.read() if args.report == "-" else open(
            args.report, encoding="utf-8", errors="replace").read()
    except OSError as error:
        raise InputError(f"cannot read {args.report}: {error.strerror}") from None
    if not sentences(report):
        raise InputError(f"{args.report} has no findings, no impression and no closing paragraph; "
                         "plain sentences without any header are read too")
    triplets = (extract_triplets(report, buckets=False) if args.extractor == "rules" else
                radgraph_triplets(annotate([report])[0], buckets=False))
    print(f"{'':9s} {'pathology':18s} {'anatomy':20s} sentence")
    for pathology, anatomy, existence, sentence in triplets:
        state = {1: "present", 0: "denied", -1: "in doubt"}[existence]
        print(f"{state:9s} {pathology:18s} {anatomy:20s} {sentence}")


def main(args):
    if args.report:
        return print_report(args)
    from tqdm import tqdm
    records = list(read_openi(args.root)) if args.dataset else []
    found = ((radgraph_triplets(graph, buckets=False) for _, graph in read_radgraph(args.radgraph))
             if args.radgraph else (extract_triplets(r["report"], buckets=False) for r in records))
    reports, counts = 0, collections.Counter()
    for triplets in tqdm(found, unit=" reports", delay=0.5):
        reports += 1
        counts.update({(axis, t[axis], t.existence) for t in triplets for axis in (0, 1)})
    for axis, title in enumerate(("pathology", "anatomy")):
        names = sorted({name for a, name, _ in counts if a == axis},
                       key=lambda name: (-counts[axis, name, 1] - counts[axis, name, 0], name))
        print(f"\n{title:18s} {'present':>8s} {'denied':>8s} {'in doubt':>8s} of {reports} reports")
        for name in names[:args.top]:
            print(f"{name:18s} " + " ".join(f"{counts[axis, name, v]:8d}" for v in (1, 0, -1)))
    if args.dataset == "openi":
        _print_openi_scores(records)


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        print(f"text.py: {error}", file=sys.stderr)
        sys.exit(2)
