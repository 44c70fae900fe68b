"""Files of weights (ours, the published MeDSLIP's, MedKLIP's), and how to ask the loaded model.

    from checkpoint import give_queries, load_model, questions
    model = load_model("out/ckpt.pt")         # or the published file, MedKLIP's, pykale/MeDSLIP
    give_queries(model)                       # a published file stores none; ours do
    texts, columns, unseen = questions(model, {"Effusion": "effusion", "COVID-19": None})

A tensor that finds no place is named in the error. Nothing in a file is executed.
"""
import re
import warnings
from pathlib import Path

import torch

import text
from cli import InputError
from model import MeDSLIP, MeDSLIPConfig

# Tensors that are left out: step counters of batch norm (its momentum is fixed), position indices
# of older transformers, and a frozen text encoder that was saved along.
HARMLESS = re.compile(r"num_batches_tracked$|position_ids$|^(text_encoder|bert_model)\.")

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


def load_model(path_or_hub_id, map_location="cpu"):
    """A MeDSLIP in eval mode from this project's checkpoint or a published MeDSLIP or MedKLIP one.

    It has .queries (None of a published file, which stores none) and .args (the training flags).
    InputError if the file is missing, damaged or foreign, or if a tensor does not fit.
    """
    path = locate(path_or_hub_id)
    checkpoint = read_checkpoint(path, map_location)
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)): v
               for k, v in checkpoint.get("model", checkpoint).items()}
    weights = {k: v for k, v in weights.items() if not HARMLESS.search(k)}
    published = any(k.startswith("res_features.") for k in weights)
    if not published and not isinstance(checkpoint.get("config"), dict):
        raise InputError(f"{path} is neither this project's checkpoint (no model arguments under "
                         "'config') nor a published MeDSLIP or MedKLIP one (no res_features.*)")
    try:
        if published:
            weights, config = convert_published(weights)
        else:  # a field that is newer than the file takes its default
            config = MeDSLIPConfig(**checkpoint["config"])
        model = MeDSLIP(config).to(map_location)
        model.load_state_dict(weights)
    except Exception as error:  # arguments of the wrong value; torch names each tensor at fault
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not fit this project's model: {reason}"[:4000]) from None
    model.queries, model.args = checkpoint.get("queries"), checkpoint.get("args") or {}
    return model.eval()


def convert_published(weights):
    """Published MeDSLIP or MedKLIP weights -> (weights under our names, config)."""
    converted = {}
    for name, value in weights.items():
        for theirs, ours in PUBLISHED:
            name = re.sub(theirs, ours, name)
        if ".existence." in name and torch.is_tensor(value) and value.shape[:1] == (2,):
            value = value[1:] - value[:1]  # softmax over (absent, present) = sigmoid of this
        converted[name] = value
    streams = "dual" if "anatomy.norm.weight" in converted else "single"
    if streams == "dual":
        # The released decoders share one final LayerNorm; of the two copies in the file it takes
        # the one read last, pathology's. A file that the release saved holds two equal ones.
        for end in ("weight", "bias"):
            converted[f"anatomy.norm.{end}"] = converted.get(f"pathology.norm.{end}")
    return converted, MeDSLIPConfig(streams=streams, mask="linear", icl="dot")


def locate(path_or_hub_id):
    """A file as it is; otherwise a name of the form owner/name is asked of the hub."""
    name = str(path_or_hub_id)
    if Path(name).is_file():
        return name
    looks_like_file = Path(name).suffix in (".pt", ".pth", ".bin", ".ckpt")
    if looks_like_file or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"no checkpoint at {name}; train one with `python train.py`, or name one "
                         "by --checkpoint")
    from huggingface_hub import snapshot_download
    try:
        folder = snapshot_download(name, allow_patterns=["*.pt", "*.pth", "*.bin"])
    except Exception as error:  # the hub library raises a dozen kinds; each means: not now
        raise InputError(f"no file {name}, and the hub did not give it ({type(error).__name__}); "
                         "if you are offline, download the file elsewhere and give its path"
                         ) from None
    files = [str(p) for p in Path(folder).rglob("*") if p.is_file()]
    if len(files) != 1:
        raise InputError(f"{name} on the hub holds {', '.join(files) or 'no checkpoint'}; give "
                         "the path of the one you want")
    return files[0]


def copy_weights(path, model):
    """Give a model the weights of another checkpoint, of a network of the same sizes."""
    try:
        model.load_state_dict(load_model(path).state_dict())
    except RuntimeError as error:  # it names each tensor at fault
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} is a network of other sizes ({reason}); train one with the same "
                         "flags of the model") from None


def training_state(path):
    """The checkpoint that train.py --resume goes on from."""
    saved = read_checkpoint(path)
    if not {"model", "optimizer", "scaler", "step", "args", "queries", "best"} <= saved.keys():
        raise InputError(f"{path} holds no training state; --resume needs a checkpoint of train.py")
    return saved


def read_checkpoint(path, map_location="cpu"):
    """The dict in a file of weights; InputError for any other file."""
    try:
        with warnings.catch_warnings():  # torch warns of some files that it then refuses
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error})") from None
    except Exception as error:  # damage shows as anything from EOFError to UnicodeDecodeError
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run {wanted[1]}" if wanted else type(error).__name__
        raise InputError(f"{path} is damaged, or holds more than weights ({reason}); get the file "
                         "itself, neither its web page nor a git-lfs pointer, from a source you "
                         "trust") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model", {}), dict):
        raise InputError(f"{path} holds no dict of weights; give a checkpoint of train.py or a "
                         "published one")
    return checkpoint


# --------------------------------------------------------------------------------- asking a model

def encode_prompts(model, prompts, encoder=None):
    """Text vectors [k,T] by `encoder`, by default the one that the model was trained with."""
    encoder = encoder or (model.queries or {}).get("encoder", text.CLINICAL_BERT)
    vectors = text.encode_text(prompts, encoder)
    if vectors.shape[1] != model.config.text_dim:
        raise InputError(f"{encoder} gives text vectors of width {vectors.shape[1]}, the model "
                         f"takes {model.config.text_dim}; use the encoder it was trained with")
    return vectors.to(model.text_projection.weight.device)


def build_queries(table, args):
    """Both query sets, prompts and frozen text vectors: all that inference needs of text."""
    pathologies, anatomies = list(text.PATHOLOGIES), list(text.ANATOMIES)
    if "excluded_obs" not in table.names:  # only the published matrix has labels for it
        pathologies.remove("excluded_obs")
    if args.queries == "corpus":
        triplets = (t for i in table.rows("train") for t in table.triplets(i)
                    if t.pathology in text.PATHOLOGIES)
        pathologies, anatomies = text.top_queries(triplets, args.pathologies, args.anatomies)
    pathologies = [name for name in pathologies if name not in table.hidden]
    p_prompts = text.pathology_prompts(pathologies, args.pathology_book)
    a_prompts = text.anatomy_prompts(anatomies, published=args.place_words == "published")
    p_text, a_text = (text.encode_text(x, args.text_encoder) for x in (p_prompts, a_prompts))
    return {"encoder": args.text_encoder,
            "pathology": {"names": pathologies, "prompts": p_prompts, "text": p_text},
            "anatomy": {"names": anatomies, "prompts": a_prompts, "text": a_text}}


def give_queries(model, pathology_book=None, encoder=None):
    """The published vocabulary as queries of a model that stores none."""
    p_prompts = text.pathology_prompts(text.PATHOLOGIES, pathology_book)
    a_prompts = text.anatomy_prompts(text.ANATOMIES, published=True)
    p_text, a_text = (encode_prompts(model, x, encoder) for x in (p_prompts, a_prompts))
    model.queries = {"pathology": {"names": text.PATHOLOGIES, "text": p_text},
                     "anatomy": {"names": text.ANATOMIES, "text": a_text}}


def questions(model, labels, prompt=None, encoder=None):
    """How to ask for labels {label: its name in the vocabulary, or None}.

    -> ([pathology text [m+k,T], anatomy text [n,T]], {label: its column}, the labels without a
    stored query). All stored queries are asked, because queries attend to each other. Last come
    k new queries, of labels that have none, by their definition; `prompt` takes the place of the
    definition, and of the stored query where there is only one label.
    """
    names = model.queries["pathology"]["names"]
    device = model.text_projection.weight.device
    texts = [model.queries[kind]["text"].to(device) for kind in ("pathology", "anatomy")]
    columns = {label: names.index(name) for label, name in labels.items() if name in names}
    unseen = [label for label in labels if label not in columns]
    anew = list(labels) if prompt and len(labels) == 1 else unseen
    if prompt and len(anew) != 1:
        raise InputError(f"--prompt is for one label, not for {anew or 'none'}; leave it out")
    for label in anew:
        said = prompt or text.LABEL_DEFINITIONS.get(label)
        said = said or text.pathology_prompts([labels[label] or label])[0]
        columns[label] = len(texts[0])
        texts[0] = torch.cat([texts[0], encode_prompts(model, [said], encoder)])
    return texts, columns, unseen
