"""Reports to triplets, triplets to the existence matrix, prompts to text vectors (Sec. II-A).

    python text.py --report note.txt                # or - for standard input
    echo "Small left pleural effusion. No pneumothorax." | python text.py --report -

Differs from the paper and the released code in:
- Triplets come from rules in this file, or from RadGraph files; both feed one matrix.
- The definitions are our own words; `read_pathology_book` takes the published prompt file instead.
"""
import argparse
import collections
import hashlib
import json
import os
import re
import sys
import typing
import warnings

import numpy as np

CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"


class InputError(ValueError):
    """A mistake of the user's: scripts print it as one line and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage dump: a wrong flag is one line on stderr and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


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
# Rules: from a report to triplets (first version)

_SIMPLE = [  # pattern, concept, place when none is named
    (r"effusions?", "effusion", "pleural"), (r"pneumothora\w+", "pneumothorax", ""),
    (r"opacit\w+|opacification", "opacity", ""), (r"(?:o?edema)", "edema", ""),
    (r"atelecta\w+", "atelectasis", ""), (r"consolidat\w+", "consolidation", ""),
    (r"pneumonia", "pneumonia", ""), (r"cardiomegaly|enlarged heart|heart is enlarged|"
     r"heart is (?:mildly|moderately|markedly) enlarged", "cardiomegaly", "heart"),
    (r"nodul\w+", "nodule", ""), (r"mass(?:es)?", "mass", ""), (r"emphysema\w*", "emphysema", ""),
    (r"fractures?", "fracture", "rib"), (r"hernia", "hernia", ""), (r"scar\w*", "scar", ""),
    (r"calcifi\w+", "calcification", ""), (r"infiltrat\w+", "infiltrate", ""),
    (r"congestion", "congestion", "pulmonary"), (r"tubes?", "tube", ""),
    (r"catheters?", "catheter", ""), (r"pacemaker", "pacemaker", ""), (r"blunt\w*", "blunt", ""),
    (r"collapsed?", "collapse", ""), (r"low lung volumes|lung volumes are low", "low", "volumes"),
    (r"hyperinflat\w+|hyperexpan\w+", "hyperinflate", "volumes"), (r"picc", "picc", ""),
    (r"thicken\w+", "thicken", "pleural"), (r"elevat\w+", "elevation", ""),
    (r"(?:lungs are|lungs) clear|clear lungs", "clear", "volumes"), (r"lesions?", "lesion", ""),
    (r"mass", "mass", ""), (r"tortuous", "tortuous", "aorta")]
_SIMPLE = [(re.compile(rf"\b(?:{pattern})\b"), name, place) for pattern, name, place in _SIMPLE]


def _simple_place(clause, default):
    side = next((s for s in ("left", "right") if s in clause), "")
    level = next((z for z, w in (("lower", r"lower|bas(?:e|al|ilar)"), ("upper", r"upper"),
                                 ("mid", r"mid|middle"), ("apical", r"apical|apex"))
                  if re.search(rf"\b(?:{w})\b", clause)), "")
    if "pleural" in clause or default == "pleural":
        return f"{side}_pleural" if side else "pleural_unspec"
    if default == "heart":
        return "heart_size"
    if default == "volumes":
        return "lung_volumes"
    if "costophrenic" in clause:
        return f"{side}_costophrenic" if side else "costophrenic_unspec"
    if "diaphragm" in clause:
        return f"{side}_diaphragm" if side else "diaphragm_unspec"
    for word in ("retrocardiac", "aorta", "spine", "clavicle", "rib", "trachea", "stomach"):
        if word in clause:
            return word
    if "hil" in clause and "perihil" not in clause and re.search(r"\bhil[aiu]", clause):
        return f"{side}_hilar" if side else "hilar_unspec"
    if "lobe" in clause and side and level in ("lower", "upper", "mid"):
        name = f"{'middle' if level == 'mid' else level}_{side}_lobe"
        return name if name in ANATOMIES else f"{side}_mid_lung"
    if side and level:
        return f"{side}_{level}_lung"
    if side:
        return f"{side}_lung_unspec"
    if re.search(r"bibasilar|bases|basilar", clause):
        return "lung_bases"
    if re.search(r"apices|biapical", clause):
        return "lung_apices"
    return default if default in ANATOMIES else "unspecified"


def extract_triplets(report, buckets=True):
    """Triplets of one report by rules: present 1, denied 0; each with the sentence it came from."""
    triplets = []
    for sentence in re.split(r"(?<=[.;])\s+|\n\s*\n", " ".join(report.split())):
        clause = sentence.lower()
        denied_from = min((m.start() for m in re.finditer(r"\b(no|without|negative for)\b", clause)),
                          default=len(clause))
        if re.search(r"heart(?: size)? (?:is |remains )?(?:within )?normal|normal heart", clause):
            triplets += [Triplet("normal", "heart_size", 1, sentence),
                         Triplet("cardiomegaly", "heart_size", 0, sentence)]
        for pattern, name, place in _SIMPLE:
            for match in pattern.finditer(clause):
                existence = 0 if match.start() > denied_from else 1
                triplets.append(Triplet(name, _simple_place(clause, place), existence, sentence))
    return list(dict.fromkeys(triplets))


# ------------------------------------------------------------------------------------------------
# Triplets to matrices and query sets

def existence_matrix(triplets, pathologies, anatomies):
    """int8 [n,m]: 1 present, 0 denied, -1 not mentioned; 1 outranks 0 outranks -1 in any order.

    A name outside the lists goes to tail_abnorm_obs / other where the lists have them; else the
    triplet is dropped.
    """
    columns = {name: i for i, name in enumerate(pathologies)}
    rows = {name: i for i, name in enumerate(anatomies)}
    matrix = np.full((len(rows), len(columns)), -1, np.int8)  # [n,m]
    for pathology, anatomy, existence, *_ in triplets:
        row = rows.get(anatomy, rows.get("other"))
        column = columns.get(pathology, columns.get("tail_abnorm_obs"))
        if row is not None and column is not None:
            matrix[row, column] = max(matrix[row, column], existence)
    return matrix


def top_queries(triplets, m, n):
    """The m pathologies and n anatomies with most definite mentions (present or denied), as lists.

    Ties go to the name that comes first in the alphabet, so the order of reports does not matter.
    """
    definite = [t for t in triplets if t[2] >= 0]

    def most(position, k):
        counts = collections.Counter(t[position] for t in definite)
        return sorted(counts, key=lambda name: (-counts[name], name))[:k]

    return most(0, m), most(1, n)


# ------------------------------------------------------------------------------------------------
# Prompts and their vectors

def read_pathology_book(path):
    """The published `observation explanation.json` as {name: sentence} over PATHOLOGIES.

    Read by position: key 20 of every published copy is a typo for pneumonia.
    """
    try:
        with open(path, encoding="utf-8") as file:
            sentences = list(json.load(file).values())
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a readable prompt book ({error}); it should be a JSON "
                         "object of 75 name: sentence pairs") from None
    if len(sentences) != len(PATHOLOGIES) or not all(isinstance(s, str) for s in sentences):
        raise InputError(f"{path} holds {len(sentences)} entries; the prompt book should hold "
                         f"{len(PATHOLOGIES)} sentences, one a pathology in the published order")
    return dict(zip(PATHOLOGIES, sentences))


def pathology_prompts(names, book=None):
    """One sentence a name: from `book` (default DEFINITIONS), else from a template, with a warning
    that lists the names without a definition."""
    book = DEFINITIONS if book is None else book
    unknown = [name for name in names if name not in book]
    if unknown:
        warnings.warn("no definition, so a template is used for: " + ", ".join(unknown))
    return [book.get(name, f"{name.replace('_', ' ').capitalize()} is seen on the radiograph.")
            for name in names]


_PLACES = {"hilar": "hilum", "pleural": "pleural space", "costophrenic": "costophrenic angle",
           "svc": "superior vena cava", "mediastinal": "mediastinum", "apical lung": "top of the lung",
           "parenchymal": "lung tissue", "cardiopulmonary": "heart and lungs",
           "pulmonary": "vessels of the lungs", "lung volumes": "both lungs",
           "unspecified": "place that is not stated", "other": "place without a name here"}


def anatomy_prompts(names, published=False):
    """One sentence a place. published=True keeps the released wording for the released weights."""
    if published:
        return [f"It is located at {name}. " for name in names]
    prompts = []
    for name in names:
        words = name.replace("_unspec", "").replace("_", " ")
        side = re.match(r"(left|right) ", words)
        place = words[side.end():] if side else words
        place = _PLACES.get(place, place)
        prompts.append(f"It is located at the {side[0] if side else ''}{place}"
                       f"{', side not stated' if name in _UNSIDED else ''}.")
    return prompts


_UNSIDED = {"hilar_unspec", "pleural_unspec", "diaphragm_unspec", "costophrenic_unspec"}


def encode_text(prompts, encoder, cache_dir=None):
    """float32 [k,T] tensor of frozen text vectors, one row a prompt.

    encoder: "hashing" (scikit-learn, T = 768, words and word pairs, no download) or the name or
    folder of a Hugging Face BERT, whose CLS vector is taken. With cache_dir the vectors are kept
    there in a file keyed by encoder and prompts. Raises InputError when the encoder cannot load.
    """
    import torch
    prompts = list(prompts)
    path = None
    if cache_dir is not None:
        # a folder can be filled anew under the same name, so its files' sizes and times count
        files = sorted(os.scandir(encoder), key=lambda f: f.name) if os.path.isdir(encoder) else []
        state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        key = json.dumps([encoder, state, prompts])
        path = os.path.join(cache_dir, f"text-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy")
        if os.path.exists(path):
            return torch.from_numpy(np.load(path, allow_pickle=False))
    if encoder == "hashing":
        from sklearn.feature_extraction.text import HashingVectorizer
        hasher = HashingVectorizer(n_features=768, ngram_range=(1, 2), norm="l2")
        vectors = hasher.transform(prompts).toarray().astype(np.float32)  # [k,768]
    else:
        vectors = _bert_vectors(prompts, encoder)
    if path is not None:
        os.makedirs(cache_dir, exist_ok=True)
        with open(f"{path}.{os.getpid()}", "wb") as file:
            np.save(file, vectors)
        os.replace(file.name, path)  # by rename: other ranks never see half a file
    return torch.from_numpy(vectors)


def _bert_vectors(prompts, encoder, batch=32):
    import torch
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise InputError(f"--text-encoder {encoder} needs the transformers package (pip install "
                         "transformers); --text-encoder hashing needs nothing") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModel.from_pretrained(encoder).eval()
    except Exception as error:  # offline, unknown name, broken folder: each its own exception class
        reason = str(error).strip().split("\n")[0][:120]
        raise InputError(f"text encoder {encoder!r} cannot be loaded ({reason}); give the folder of "
                         "a downloaded model, or --text-encoder hashing, which needs none") from None
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    cut = sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False)["input_ids"])
    if cut:
        warnings.warn(f"{cut} prompts are longer than the {limit} tokens of {encoder} and are cut")
    vectors = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch):
            tokens = tokenizer(prompts[start:start + batch], padding=True, truncation=True,
                               max_length=limit, return_tensors="pt")
            # the attention mask keeps padding out, so a vector does not depend on its neighbours
            vectors.append(model(**tokens).last_hidden_state[:, 0].float())  # CLS [b,T]
    return torch.cat(vectors).numpy()


# ------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = Parser(prog="text.py", description="triplets of a report")
    parser.add_argument("--report", required=True, help="a text file, or - for standard input")
    return parser.parse_args(argv)


def main(args):
    report = sys.stdin.read() if args.report == "-" else open(args.report, errors="replace").read()
    for t in extract_triplets(report):
        print(f"{t.existence:2d}  {t.pathology:16s} {t.anatomy:20s} {t.sentence}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        print(f"text.py: {error}", file=sys.stderr)
        sys.exit(2)
