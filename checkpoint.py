"""Files of weights (ours, the published MeDSLIP's, MedKLIP's), and how to ask the loaded model.

    from checkpoint import encode_queries, load_model, questions
    model = load_model("out/ckpt.pt")         # or the published file, MedKLIP's, pykale/MeDSLIP
    model.queries = encode_queries("hashing")  # of a published file, which stores none
    texts, columns, unseen = questions(model, {"Effusion": "effusion", "COVID-19": None})

A tensor that finds no place is named in the error. Nothing in a file is executed.
"""
import re
from pathlib import Path

import numpy as np
import torch

import text
from cli import InputError
from data import to_input
from model import MeDSLIP, MeDSLIPConfig

# Published names -> ours, applied in this order. MedKLIP's names lack the stream, and the
# grounding sample of MeDSLIP has disease_embedding_layer for pathology_embedding_layer.
PUBLISHED = [
    (r"^res_features\.", "backbone."),
    (r"^(pathology|disease)_embedding_layer\.", "text_projection."),
    (r"^mask_generator\.", "mask."),
    (r"^(res_l1|res_l2|cl_fc|classifier|decoder)\.", r"\1_pathology."),
    (r"^res_l1_(pathology|anatomy)\.", r"\1.embed.0."),
    (r"^res_l2_(pathology|anatomy)\.", r"\1.embed.2."),
    (r"^cl_fc_(pathology|anatomy)\.", r"\1.to_z2."),
    (r"^classifier_(pathology|anatomy)\.", r"\1.existence."),
    (r"^decoder_(pathology|anatomy)\.", r"\1."),
    (r"\.in_proj_", ".in_proj."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.multihead_attn\.", ".cross_attention."),
    (r"\.linear1\.", ".ffn.0."),
    (r"\.linear2\.", ".ffn.3."),
]


def load_model(path_or_hub_id, map_location="cpu", model=None):
    """A MeDSLIP in eval mode; `model`: one that takes the weights instead of a new one.

    It has .queries (None of a published file, which stores none) and .args (the training flags).
    InputError if the file is missing, damaged or foreign, or if a tensor does not fit.
    """
    checkpoint = read_checkpoint(path_or_hub_id, map_location)
    try:
        weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value  # of DDP, torch.compile
                   for name, value in checkpoint.get("model", checkpoint).items()
                   if not re.search(r"(text_encoder|bert_model)\.", name)}  # E_T, saved along
        if any(name.startswith("res_features.") for name in weights):
            weights, config = convert_published(weights)
        else:  # a field that is newer than the file takes its default
            config = MeDSLIPConfig(**checkpoint["config"])
        model = model or MeDSLIP(config).to(map_location)
        model.load_state_dict(weights)
    except Exception as error:  # of a foreign file; torch names each tensor that does not fit
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:4000]
        raise InputError(f"{path_or_hub_id} does not fit: it is no checkpoint of train.py for this "
                         f"model, nor a published MeDSLIP or MedKLIP one: {reason}") from None
    model.queries, model.args = checkpoint.get("queries"), checkpoint.get("args") or {}
    return model.eval()


def convert_published(weights):
    """Published MeDSLIP or MedKLIP weights -> (weights under our names, config)."""
    converted = {}
    for name, value in weights.items():
        for theirs, ours in PUBLISHED:
            name = re.sub(theirs, ours, name)
        if ".existence." in name:  # softmax over (absent, present) = sigmoid of their difference
            value = value[1:] - value[:1]
        converted[name] = value
    streams = "dual" if "anatomy.norm.weight" in converted else "single"
    if streams == "dual":
        # The released decoders share one final LayerNorm; of the two copies in the file it takes
        # the one read last, pathology's. A file that the release saved holds two equal ones.
        for end in ("weight", "bias"):
            converted[f"anatomy.norm.{end}"] = converted[f"pathology.norm.{end}"]
    return converted, MeDSLIPConfig(streams=streams, mask="linear", icl="dot")


def read_checkpoint(path_or_hub_id, map_location="cpu"):
    """What is in a file of weights; nothing in it is executed. A name of the form owner/name that
    is no file is asked of the Hugging Face hub."""
    path, hub_says = Path(path_or_hub_id), ""
    if not path.is_file() and re.fullmatch(r"[\w.-]+/[\w-]+", str(path)):  # a file's has a dot
        from huggingface_hub import snapshot_download
        try:
            folder = snapshot_download(str(path), allow_patterns=["*.pt", "*.pth", "*.bin"])
            path, = [file for file in Path(folder).rglob("*") if file.is_file()]
        except Exception as error:  # the hub library raises a dozen kinds; each means: not now
            hub_says = f" or on the hub ({type(error).__name__})"
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}{hub_says}; train one with `python train.py`, or "
                         "name one by --checkpoint")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # damage shows as anything from EOFError to UnicodeDecodeError
        raise InputError(f"{path} cannot be read, or holds more than weights "
                         f"({type(error).__name__}); get the file itself, neither its web page nor "
                         "a git-lfs pointer, from a source you trust") from None


def training_state(path):
    """The checkpoint that train.py --resume goes on from."""
    saved = read_checkpoint(path)
    if not {"model", "optimizer", "scaler", "step", "args", "queries", "best"} <= set(saved):
        raise InputError(f"{path} holds no training state; --resume needs a checkpoint of train.py")
    return saved


# --------------------------------------------------------------------------------- asking a model

def encode_queries(encoder, book=None, published=True, pathologies=text.PATHOLOGIES,
                   anatomies=text.ANATOMIES):
    """Both query sets, prompts and frozen text vectors: all that inference needs of text."""
    queries = {"encoder": encoder,
               "pathology": {"names": pathologies,
                             "prompts": text.pathology_prompts(pathologies, book)},
               "anatomy": {"names": anatomies,
                           "prompts": text.anatomy_prompts(anatomies, published)}}
    for kind in ("pathology", "anatomy"):
        queries[kind]["text"] = text.encode_text(queries[kind]["prompts"], encoder)
    return queries


def build_queries(table, args):
    """The queries of a training run, by train.py's flags."""
    pathologies, anatomies = text.PATHOLOGIES, text.ANATOMIES
    if args.queries == "corpus":
        triplets = (t for i in table.rows("train") for t in table.triplets(i)
                    if t.pathology in text.PATHOLOGIES)
        pathologies, anatomies = text.top_queries(triplets, args.pathologies, args.anatomies)
    # only the published matrix has labels for excluded_obs
    left_out = table.hidden | ({"excluded_obs"} - table.known)
    pathologies = [name for name in pathologies if name not in left_out]
    return encode_queries(args.text_encoder, args.pathology_book, args.place_words == "published",
                          pathologies, anatomies)


def questions(model, labels, prompt=None, encoder=None):
    """How to ask for labels {label: its name in the vocabulary, or None}.

    -> ([pathology text [m+k,T], anatomy text [n,T]], {label: its column}, the labels without a
    stored query). All stored queries are asked, because queries attend to each other. Last come
    k new queries, of labels that have none, by their definition; `prompt` takes the place of the
    definition, and of the stored query where there is only one label.
    """
    names, encoder = model.queries["pathology"]["names"], encoder or model.queries["encoder"]
    columns = {label: names.index(name) for label, name in labels.items() if name in names}
    unseen = [label for label in labels if label not in columns]
    anew = list(labels) if prompt and len(labels) == 1 else unseen
    if prompt and len(anew) != 1:
        raise InputError(f"--prompt is for one label, not for {anew or 'none'}; leave it out")
    stored, new = [model.queries[kind]["text"] for kind in ("pathology", "anatomy")], []
    for label in anew:
        columns[label] = len(names) + len(new)
        name = label if label in text.DEFINITIONS else labels[label] or label
        new += [text.encode_text([prompt or text.pathology_prompts([name])[0]], encoder)]  # [1,T]
    if any(vectors.shape[1] != model.config.text_dim for vectors in stored + new):
        raise InputError(f"the text vectors of {encoder} do not have the width that the model "
                         f"takes, {model.config.text_dim}; use the encoder it was trained with")
    device = model.text_projection.weight.device
    return [torch.cat([stored[0], *new]).to(device), stored[1].to(device)], columns, unseen


def has_icl(model):
    """Whether a model was trained to relate pathologies with anatomies."""
    return model.config.streams == "dual" and model.args.get("beta", 1) > 0


def ask(args, model, images, rows, texts, pick):
    """{name: array} of what `pick` takes out of the model's output as {name: tensor}, for rows of
    images uint8 [N,S,S]. Only train.py asks in less than fp32: bf16 depends on the batch size."""
    parts = []
    for start in range(0, len(rows), args.batch_size):
        batch = torch.from_numpy(images[rows[start:start + args.batch_size]]).to(texts[0].device)
        with torch.inference_mode():
            x = to_input(batch, args.image_size)                           # [B,3,H,W]
            picked = pick(model(x, *texts, need_attention=True))
        # to the CPU at once: memory of one batch at a time
        parts.append({name: tensor.cpu().numpy() for name, tensor in picked.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
