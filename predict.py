"""How a checkpoint is asked: prompts to queries, images to answers and maps; then one radiograph.

    python evaluate.py --task predict --image chest.png     # what and where; out/eval/predict.png
    python evaluate.py --task predict --image folder/ --prompt "air where it should not be"

A model is always asked its whole query set, because queries attend to each other. A label finds its
query by name; one without a query is asked last, by its prompt.
"""
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit, softmax

import figures
import text
from checkpoint import load_model
from cli import InputError, atomic
from data import to_input
from formats.images import read_image, trouble
from metrics import upsample_map

PROMPTS = {  # of labels that the vocabulary lacks, or has only in a bucket of rare findings
    "COVID-19": "Pneumonia caused by the coronavirus SARS-CoV-2. Hazy ground-glass patches in both "
                "lungs, mostly at the outer edges and in the lower zones, that may merge into "
                "denser white consolidation as the illness goes on.",
    "Fibrosis": "Scarred lung tissue. Coarse white lines and a net-like pattern, mostly at the "
                "bases and edges of lungs that have shrunk."}


def encode_prompts(args, model, prompts):
    """Text vectors [k,T] by --text-encoder, or by the one that the model was trained with."""
    encoder = args.text_encoder or (model.queries or {}).get("encoder", text.CLINICAL_BERT)
    vectors = text.encode_text(prompts, encoder)
    if vectors.shape[1] != model.config.text_dim:
        raise InputError(f"{encoder} gives text vectors of width {vectors.shape[1]}, the model "
                         f"takes {model.config.text_dim}; use the one it was trained with")
    return vectors


def read_model(args):
    """The checkpoint. A published one stores no queries and is asked the published vocabulary."""
    model = load_model(args.checkpoint, args.device).requires_grad_(False)
    args.image_size = args.image_size or model.config.image_size
    if model.queries is None:
        book = text.read_pathology_book(args.pathology_book) if args.pathology_book else None
        if book is None:
            print(f"{args.checkpoint} stores no prompts: pathologies are asked in our own words; "
                  "--pathology-book takes the published ones")
        p_prompts = text.pathology_prompts(text.PATHOLOGIES, book)
        a_prompts = text.anatomy_prompts(text.ANATOMIES, published=True)
        p_text, a_text = (encode_prompts(args, model, x) for x in (p_prompts, a_prompts))
        model.queries = {"pathology": {"names": text.PATHOLOGIES, "text": p_text},
                         "anatomy": {"names": text.ANATOMIES, "text": a_text}}
    return model


def questions(args, model, labels):
    """How to ask for labels {label: its name in the vocabulary, or None}.

    -> ([pathology text [m+k,T], anatomy text [n,T]], {label: its column}, the k labels without a
    stored query, which are asked last: by --prompt, PROMPTS or their definition).
    """
    names, vectors = model.queries["pathology"]["names"], model.queries["pathology"]["text"]
    columns = {label: names.index(name) for label, name in labels.items() if name in names}
    unseen = [label for label in labels if label not in columns]
    if args.prompt and len(labels) == 1:
        unseen = list(labels)
    if args.prompt and len(unseen) != 1:
        raise InputError(f"--prompt asks for one label, and {len(unseen)} have no stored query "
                         f"({', '.join(unseen) or 'none'}); leave it out")
    if unseen:
        prompts = [args.prompt or PROMPTS.get(label)
                   or text.pathology_prompts([labels[label] or label])[0] for label in unseen]
        vectors = torch.cat([vectors.cpu(), encode_prompts(args, model, prompts)])  # [m+k,T]
        columns |= {label: len(names) + k for k, label in enumerate(unseen)}
    texts = [vectors.to(args.device), model.queries["anatomy"]["text"].to(args.device)]
    return texts, columns, unseen


def ask(args, model, images, rows, texts):
    """Yields (rows [B], output) of rows of images uint8 [N,S,S]. In fp32, because with bf16 the
    answers would depend on the batch size."""
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start:start + args.batch_size]
        x = to_input(torch.from_numpy(images[batch]).to(args.device), args.image_size)
        with torch.inference_mode():
            out = model(x, *texts, need_attention=True)                         # x [B,3,H,W]
        yield batch, out


def array(tensor):
    return tensor.double().cpu().numpy()


def maps_of(args, out):
    """[B,m,h,w] by --attention."""
    own = args.attention == "own" and out.pathology_evidence is not None
    return array(out.pathology_evidence if own else out.pathology_attention)


def heat_of(args, model, cells, shape):
    """One map [h,w] drawn to a picture of `shape`, its maximum 1."""
    heat = upsample_map(cells, *shape, args.image_size, model.cell_centres())
    return heat / max(heat.max(), 1e-12)


def pairs_of(model, out, anatomy_text):
    """(existence [B,m]; places [B,n,m]: Z_2 . T, which ProtoCL trains; pairs [B,n,m]: ICL's answer,
    or existence times place where no ICL was trained)."""
    existence = expit(array(out.pathology_logits))
    places = array(out.pathology_z @ anatomy_text.T).transpose(0, 2, 1)
    if model.config.streams == "dual" and model.args.get("beta", 1) > 0:
        return existence, places, expit(array(out.relation_logits))
    return existence, places, existence[:, None] * softmax(places, axis=1)


def print_table(title, scores, keys):
    """{name: {key: value}} as a table: numbers to three decimals, a dash for None or nothing."""
    table = [[title, *keys]]
    for name, values in scores.items():
        row = [values.get(key) for key in keys]
        row = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
        table.append([name, *["-" if v == "None" else v for v in row]])
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print(row[0].ljust(widths[0]), *cells, sep="  ")


def read_films(path, size):
    """Yields (file, film uint8 [size,size]) of a radiograph, or of all in a folder."""
    path, endings = Path(path), (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in endings)
    for file in [path] if path.is_file() else files:
        try:
            yield str(file), read_image(str(file), size)
        except Exception:  # whatever a decoder makes of a damaged file; the others are still read
            print(f"skipped: {file} is {trouble(str(file))}", file=sys.stderr)


def predict(args, model):
    """What and where in one radiograph, printed and drawn; of a folder of them, as a CSV."""
    names, places = (model.queries[kind]["names"] for kind in ("pathology", "anatomy"))
    labels = {name: name for name in names}
    if args.prompt:
        labels[args.prompt] = None
    texts, columns, _ = questions(args, model, labels)
    answers = []
    for file, film in read_films(args.image, args.image_size):
        _, out = next(ask(args, model, film[None], np.arange(1), texts))
        existence, _, pairs = (x[0] for x in pairs_of(model, out, texts[1]))    # [m], [n,m]
        # the user's own question first, then the likeliest
        for label in sorted(columns, key=lambda k: (k != args.prompt, -existence[columns[k]])):
            k = columns[label]
            row = {"image": file, "finding": label, "probability": round(float(existence[k]), 4)}
            for rank, i in enumerate(np.argsort(-pairs[:, k])[:3], 1):
                row[f"place {rank}"] = places[i]
                row[f"probability {rank}"] = round(float(pairs[i, k]), 4)
            answers.append(row)
    if not answers:
        raise InputError(f"no radiograph can be read at {args.image}; --image takes a PNG, JPEG or "
                         "DICOM file, or a folder of them")
    folder = Path(args.out_dir, "eval")
    if Path(args.image).is_dir():
        with atomic(folder / "predict.csv") as draft, open(draft, "w", newline="") as file:
            writer = csv.DictWriter(file, answers[0])
            writer.writeheader()
            writer.writerows(answers)
        print(f"{len(answers) // len(columns)} images, {len(columns)} questions each: "
              f"{folder / 'predict.csv'}")
    else:
        print_table("finding", {row["finding"]: row for row in answers[:8]}, list(answers[0])[2:])
        film, maps = read_image(args.image), maps_of(args, out)[0]              # [H,W], [m,h,w]
        heats = [(row["finding"], row["probability"],
                  heat_of(args, model, maps[columns[row["finding"]]], film.shape))
                 for row in answers[:4]]
        with atomic(folder / "predict.png") as draft:
            figures.draw_prediction(draft, film, heats)
        print(f"where the first four look: {folder / 'predict.png'}")
    print("For study and research: this is no medical device, and this no diagnosis.")
