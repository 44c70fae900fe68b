"""Triplets, the existence matrix, query sets, prompts and their text vectors (Sec. II-A).

    python text.py --report report.txt
    echo "Small left pleural effusion. No pneumothorax." | python text.py --report -

A report becomes triplets (pathology, anatomy, existence): from RadGraph's JSON (this file) or by
rules (reports.py). The triplets of one report become its existence matrix y [n,m]: one row per
anatomy, one column per pathology; 1 present, 0 denied, -1 not mentioned.

Differs from the paper and the released code:
- The paper takes RadGraph's triplets only; our rules need neither a model nor credentials.
- Pathologies are defined in our words (vocabulary_pathologies.csv); --pathology-book takes the
  published ones. Anatomy prompts say "the left pleural space", the released ones "left_pleural";
  with released weights the released wording is used.
- A prompt is cut at the limit of the text encoder; the released code cuts at 128 tokens in
  training and at 64 in tests.
"""
import collections
import csv
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from cli import InputError, Parser, run

CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"  # E_T of the paper [30], T = 768

# existence: 1 present, 0 denied, -1 in doubt (in a matrix -1 is: not mentioned)
# sentence: where it was read, if the rules read it
Triplet = collections.namedtuple("Triplet", "pathology anatomy existence sentence", defaults=[""])


def vocabulary_rows(name):
    """The rows of vocabulary_<name>.csv as dicts. These tables are meant to be edited."""
    path = Path(__file__).with_name(f"vocabulary_{name}.csv")
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# In the published order: column j of a published matrix is PATHOLOGIES[j], row i ANATOMIES[i]. The
# last two pathologies are buckets: rare findings (tail_abnorm_obs), and words of change and size
# that name no disease (excluded_obs).
DEFINITIONS = {row["pathology"]: row["definition"] for row in vocabulary_rows("pathologies")}
PLACES = {row["anatomy"]: row["place"] for row in vocabulary_rows("anatomies")}
PATHOLOGIES = list(DEFINITIONS)  # m = 75
ANATOMIES = list(PLACES)         # n = 51, as released; Table II says 50
# labels of data sets that are no pathology of their own above
DEFINITIONS |= {row["label"]: row["definition"] for row in vocabulary_rows("labels")}
CONCEPT_OF = {row["word"]: row["concept"] for row in vocabulary_rows("lemmas")}
KNOWN = {*PATHOLOGIES, *CONCEPT_OF}
# {landmark: its row, each cell as a set: "base or lower" -> {"base", "lower"}}
LANDMARKS = {row["landmark"]: {key: set(cell.split(" or ")) - {""} for key, cell in row.items()}
             for row in vocabulary_rows("landmarks")}
ENDINGS = [("", ""), ("ies", "y"), ("ied", "y"), ("es", ""), ("s", ""), ("ed", ""), ("d", ""),
           ("ing", ""), ("ing", "e"), ("ring", ""), ("red", "")]  # of a word -> of its stem


def swap_sides(name):
    """The same place in a mirrored image: left_pleural <-> right_pleural; a name without a side
    stays. middle_right_lobe, right_atrium and right_ventricle have no mirror: data.can_mirror."""
    if "left" in name:  # no name of the vocabulary has both sides
        return name.replace("left", "right")
    return name.replace("right", "left")


@functools.lru_cache(2 ** 14)  # up to 40 us a call, and reports repeat the same few places
def landmark(anatomy):
    """The landmark of an anatomy in RadGraph's form: head word, then its modifiers, joined by |.

    "lobe|left|lower" -> lower_left_lobe. Of the rows of vocabulary_landmarks.csv the first that
    fits counts, as in the published table.
    """
    words = set(anatomy.split("|"))
    for name, row in LANDMARKS.items():
        needed = [row[key] for key in ("one_of", "and_one_of", "and_one_of_too") if row[key]]
        fits = not words & row["none_of"] and all(words & choice for choice in needed)
        if fits or anatomy in row["or_exactly"]:  # the order of the modifiers counts, as published
            return name
    return "unspecified" if anatomy == "unspecified" else "other"  # the last two of ANATOMIES


def stem(word, known):
    """The word without its ending, if that is in `known`: opacities -> opacity."""
    for ending, replacement in ENDINGS:
        shorter = word.removesuffix(ending) + replacement
        if word.endswith(ending) and shorter in known:  # "pu" is unknown: "pus" keeps its s
            return shorter
    return word


def lemma(words):
    """Concept of an observation's words: "opacities" -> opacity, "mild" -> excluded_obs. The
    published step took spaCy's lemmas, which change with its version."""
    word = stem(words.lower(), KNOWN)
    return CONCEPT_OF.get(word, word)


def bucket(concept):
    """The concept itself if it is one of the 75 pathologies, else the bucket of rare findings."""
    return concept if concept in PATHOLOGIES else "tail_abnorm_obs"


# --------------------------------------------------------------------------------------- RadGraph

RADGRAPH_LABELS = {  # of RadGraph 1.0 and RadGraph-XL; entities with other labels are dropped
    "ANAT-DP": "anatomy", "OBS-DP": 1, "OBS-DA": 0, "OBS-U": -1,
    "Anatomy::definitely present": "anatomy", "Observation::definitely present": 1,
    "Observation::definitely absent": 0, "Observation::uncertain": -1}
# kind: "anatomy", or the existence of an observation; relations: [(name, id of the target)]
Entity = collections.namedtuple("Entity", "kind words sentence relations")


def sentence_numbers(words):
    """The sentence number of each word. A full stop between digits ("2 . 5 cm") ends none."""
    numbers, sentence = [], 0
    for i, word in enumerate(words):
        numbers.append(sentence)
        between_digits = words[i - 1].isdigit() and i + 1 < len(words) and words[i + 1].isdigit()
        if word in (".", "?", "!") and not between_digits:
            sentence += 1
    return numbers


def read_entities(graph):
    """{id: Entity} of one report, in the order of their ids."""
    # RadGraph's test reports have two annotators; the first is taken
    raw = graph["entities"] if "entities" in graph else graph["labeler_1"]["entities"]
    kinds = {key: RADGRAPH_LABELS.get(entity["label"].replace("::measurement", ""))  # only in XL
             for key, entity in raw.items()}
    numbers, entities = sentence_numbers(graph["text"].split()), {}
    for key in sorted(raw, key=int):  # as strings "10" would come before "2"
        words, relations = raw[key]["tokens"].lower(), raw[key]["relations"]
        # an anatomy of XL holds several words; the landmark table wants them apart, unless the
        # whole of it is a landmark ("cavoatrial junction")
        if raw[key]["label"].startswith("Anatomy::") and landmark(words) == "other":
            words = words.replace(" ", "|")
        if kinds[key] is not None:
            relations = [(name, to) for name, to in relations if kinds.get(to) is not None]
            entities[key] = Entity(kinds[key], words, numbers[raw[key]["start_ix"]], relations)
    return entities


def places_of(entities, key):
    """The landmarks that anatomy `key` leads to.

    The head of an anatomy has no relations of its own. Its name is its word with those that modify
    it: lobe <- left, lower gives "lobe|left|lower". The modifiers lead to the same landmark.
    """
    near = {k: e for k, e in entities.items()
            if e.kind == "anatomy" and e.sentence == entities[key].sentence}
    names = []
    for head in [key] + [target for _, target in entities[key].relations]:
        if head in near and not near[head].relations:
            modifiers = [e.words for e in near.values()  # one step, as published
                         if head in [target for _, target in e.relations]]
            names.append(landmark("|".join([near[head].words, *modifiers])))
    return names


def radgraph_triplets(graph, buckets=True):
    """[Triplet] of one report's RadGraph JSON (1.0 or XL).

    An observation is placed at the anatomies of its own sentence that it is located_at; without
    any relation it is `unspecified`; with other relations only it is dropped, as published.
    Without buckets a rare concept keeps its word, and words of change and size are left out.
    """
    entities, triplets = read_entities(graph), []
    for entity in entities.values():
        concept = lemma(entity.words)
        if entity.kind == "anatomy" or (concept == "excluded_obs" and not buckets):
            continue
        names = [] if entity.relations else ["unspecified"]  # a row of the published matrix
        for relation, key in entity.relations:  # the others: modify, suggestive_of
            target = entities[key]
            if (relation == "located_at" and target.kind == "anatomy"
                    and target.sentence == entity.sentence):
                names += places_of(entities, key)
        concept = bucket(concept) if buckets else concept
        triplets += [Triplet(concept, name, entity.kind) for name in names]
    return triplets


def read_radgraph(path, chunk=1 << 22):
    """Yield (key, graph) of a RadGraph file, one report at a time.

    MIMIC-CXR_graphs.json is one object of 220,763 reports. Read in pieces of `chunk` characters it
    is never in memory as a whole.
    """
    decoder, text = json.JSONDecoder(), ""
    opening = re.compile(r'[\s,{]*("(?:[^"\\]|\\.)*")\s*:\s*')  # the key of the next report
    with open(path, encoding="utf-8") as file:
        while piece := file.read(chunk):
            text, position = text + piece, 0
            while key := opening.match(text, position):
                try:
                    graph, position = decoder.raw_decode(text, key.end())
                except ValueError:  # the piece ends within this report
                    break
                yield json.loads(key[1]), graph
            text = text[position:]  # only the report that is not whole yet is kept
    if text.strip() not in ("}", "{}"):
        raise InputError(f"{path} is not RadGraph's JSON, or is cut off near {text[:40]!r}")


# ----------------------------------------------------------------------- the matrix and the queries

def existence_matrix(triplets, pathologies, anatomies, blank=-1):
    """int8 [n,m] of one report: 1 present, 0 denied, `blank` not mentioned (Sec. II-A).

    Where triplets disagree 1 outranks 0, in any order. Doubt counts as not mentioned. A name
    outside the lists goes to tail_abnorm_obs or other, if the lists have these.
    """
    column = {name: j for j, name in enumerate(pathologies)}
    row = {name: i for i, name in enumerate(anatomies)}
    rare, elsewhere = column.get("tail_abnorm_obs"), row.get("other")
    matrix = np.full((len(anatomies), len(pathologies)), blank, np.int8)        # [n,m] y^{a,p}
    for t in triplets:
        i, j = row.get(t.anatomy, elsewhere), column.get(t.pathology, rare)
        if t.existence >= 0 and i is not None and j is not None:
            matrix[i, j] = max(matrix[i, j], t.existence)  # 1 outranks 0
    return matrix


def top_queries(triplets, m, n):
    """The m pathologies and n anatomies with most definite mentions, as lists (Sec. II-A)."""
    pathologies, anatomies = collections.Counter(), collections.Counter()
    for t in triplets:
        if t.existence >= 0:  # present or denied
            pathologies[t.pathology] += 1
            anatomies[t.anatomy] += 1

    def most_frequent(counts, k):  # ties by the alphabet, so the order of reports is no matter
        return sorted(counts, key=lambda name: (-counts[name], name))[:k]
    return most_frequent(pathologies, m), most_frequent(anatomies, n)


# ------------------------------------------------------------------------------ prompts and vectors

def read_pathology_book(path):
    """The published `observation explanation.json` as {name: sentence} over PATHOLOGIES."""
    try:
        sentences = json.loads(Path(path).read_text("utf-8")).values()
        return dict(zip(PATHOLOGIES, sentences, strict=True))  # by position: key 20 is "eumonia"
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not the published prompt book, a JSON object of "
                         f"{len(PATHOLOGIES)} name: sentence pairs ({error})") from None


def pathology_prompts(names, book=None):
    """One prompt per name: our definition, or that of `book`, a file; else by a template."""
    definitions = read_pathology_book(book) if book else DEFINITIONS
    template = "{} is seen on the radiograph."
    return [definitions.get(name, template.format(name.replace("_", " ").capitalize()))
            for name in names]


def anatomy_prompts(names, published=False):
    """One sentence per place. published=True is the released wording, for the released weights."""
    if published:
        return [f"It is located at {name}. " for name in names]  # the space at the end is released
    return [f"It is located at the {PLACES.get(name, name.replace('_', ' '))}." for name in names]


def encode_text(prompts, encoder):
    """float32 [k,T]: one frozen text vector per prompt, by E_T (Sec. II-A).

    encoder: "hashing" (scikit-learn; counts words and word pairs, needs no download), or the name
    or folder of a Hugging Face BERT, whose CLS vector is taken, as released.
    """
    if encoder == "hashing":
        from sklearn.feature_extraction.text import HashingVectorizer
        hasher = HashingVectorizer(n_features=768, ngram_range=(1, 2), norm="l2")  # T of BERT
        return torch.from_numpy(hasher.transform(prompts).toarray()).float()    # [k,768]
    tokenizer, model = load_bert(str(encoder))
    # some tokenizers know no limit of their own and give 1e30
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    vectors = []
    for prompt in prompts:  # one at a time: a vector must not depend on its neighbours' padding
        tokens = tokenizer(prompt, truncation=True, max_length=limit, return_tensors="pt")
        with torch.no_grad():  # E_T is frozen; the learned h_T is model.text_projection
            vectors.append(model(**tokens).last_hidden_state[0, 0].float())     # CLS, [T]
    return torch.stack(vectors)                                                 # [k,T]


def load_bert(name):
    """(tokenizer, model in eval mode) by transformers, from its cache, a folder or the hub."""
    from transformers import AutoModel, AutoTokenizer
    try:
        if not Path(name).is_dir():
            from huggingface_hub import model_info, try_to_load_from_cache
            if not isinstance(try_to_load_from_cache(name, "config.json"), str):
                model_info(name, timeout=10)  # fails at once where transformers tries for a minute
        return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except Exception as error:  # offline, unknown name, broken folder: each has its own class
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"text encoder {name!r} cannot be loaded ({reason}); give the folder of a "
                         "downloaded model, or --text-encoder hashing") from None


def parse_args(argv=None):
    parser = Parser(description="The triplets of a report, read by the rules of reports.py.")
    parser.add_argument("--report", required=True, help="a text file; - is standard input")
    return parser.parse_args(argv)


def main(args):
    from reports import extract_triplets  # not above: reports.py imports this file
    path = args.report
    try:
        report = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8", "replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    triplets = extract_triplets(report, buckets=False)  # rare findings are shown by their names
    if not triplets:
        raise InputError(f"{path}: no finding was recognised; findings are read from the sections "
                         "FINDINGS and IMPRESSION, or from plain sentences without any header")
    state = {1: "present", 0: "denied", -1: "in doubt"}
    for t in triplets:
        print(f"{state[t.existence]:9s} {t.pathology:18s} {t.anatomy:20s} {t.sentence}")


if __name__ == "__main__":
    run(main, parse_args)
