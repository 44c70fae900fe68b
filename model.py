"""MeDSLIP's network: two streams ask a radiograph what it shows and where (arXiv 2403.10635).

    from model import MeDSLIP
    model = MeDSLIP.from_pretrained("out/ckpt.pt")   # or the published one, MedKLIP's, a hub id
    python model.py    # one phantom walked from report to loss, shape by shape

One letter per axis, here and in every other file:
    B images   m pathologies   n anatomies   h, w token grid   C backbone channels
    D embedding width   T text vector width   q queries of a stream (m or n)   k concepts, prompts

Differs from the paper:
- Eq. 5 puts a bare cosine through a sigmoid, which confines every probability to 0.27..0.73 while
  on phantoms 0.4 % of the cells are positive; here the cosine has a learned scale and bias.
  `icl="bare"` is the printed form.
- Tokens may carry a fixed 2-D position embedding (`position`; on in the CPU preset, off at the
  paper's sizes).
Differs from the released code:
- The mask passes a sigmoid as the paper says; released: none (`mask="linear"`).
- ICL has the paper's projections Z1; released: the plain dot product of the queried embeddings
  (`icl="dot"`).
- One existence logit instead of a softmax over two: the same function, their difference.
- Linear weights start with a deviation of fan-in ** -0.5; released: 0.02, near it at width 1024,
  but at the CPU preset's widths the image would hardly reach the queries. See also `start_from`.
"""
import math
import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign or does not fit; the message says which."""


@dataclass
class MeDSLIPConfig:
    backbone: str = "resnet50"  # resnet50 | resnet18 (both up to layer3) | small (CPU preset)
    image_size: int = 224       # pixels it was trained at; the network itself takes any size
    dim: int = 256              # D
    layers: int = 4             # of each query network
    heads: int = 4
    text_dim: int = 768         # T
    dropout: float = 0.1
    position: bool = False      # 2-D position embedding on the tokens
    streams: str = "dual"       # dual | single (no mask, no anatomy stream: MedKLIP)
    mask: str = "sigmoid"       # sigmoid | linear
    icl: str = "cosine"         # cosine (learned scale, bias) | bare (as printed) | dot (released)


@dataclass
class MeDSLIPOutput:
    """What the network says of a batch. A single-stream model leaves the anatomy fields None."""
    pathology_logits: torch.Tensor             # [B,m]      sigmoid = probability of presence
    anatomy_logits: torch.Tensor | None        # [B,n]
    pathology_queried: torch.Tensor            # [B,m,D]    I_q^p
    anatomy_queried: torch.Tensor | None       # [B,n,D]    I_q^a
    pathology_z: torch.Tensor                  # [B,m,T]    Z_2^p, lives with the text vectors
    anatomy_z: torch.Tensor | None             # [B,n,T]    Z_2^a
    relation_logits: torch.Tensor              # [B,n,m]    sigmoid = probability of the pair; with
                                               #            one stream a score of the place
    pathology_tokens: torch.Tensor             # [B,h*w,D]
    anatomy_tokens: torch.Tensor | None        # [B,h*w,D]
    pathology_attention: torch.Tensor | None = None  # [B,m,h,w] mean over heads and layers
    anatomy_attention: torch.Tensor | None = None    # [B,n,h,w]


# -------------------------------------------------------------------------------- image encoder E_I

class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of a ResNet-18 at constant width."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(x + self.body(x))


def build_backbone(name):
    """-> (module: [B,3,H,W] -> [B,C,h,w], C, stride, centre of cell 0 in input pixels).

    Attention is drawn back onto the image through the last two. A convolution of stride 2 with an
    odd kernel centres output cell i on input pixel 2i; one with an even kernel on 2i + 0.5, the
    middle of a pair of pixels.
    """
    if name == "small":
        # Even kernels: cells tile the image evenly, centres 1.5, 5.5, 9.5, ... And few layers: a
        # cell sees 26 pixels. With 50 the network told a lesion from beside it, and pointed there.
        def down(c_in, c_out):
            return (nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False), nn.BatchNorm2d(c_out),
                    nn.ReLU(inplace=True))
        return nn.Sequential(*down(3, 32), *down(32, 96), Residual(96)), 96, 4, 1.5
    import torchvision
    resnet = getattr(torchvision.models, name)(weights=None)
    channels = {"resnet18": 256, "resnet50": 1024}[name]
    # conv1 bn1 relu maxpool layer1 layer2 layer3: published as res_features.0 .. res_features.6
    return nn.Sequential(*list(resnet.children())[:7]), channels, 16, 0.0


def position_embedding(h, w, channels, device=None):
    """[h*w,C]: sine, cosine of the row, then of the column, at periods from 2 to 1000 cells."""
    frequency = math.pi * torch.logspace(0, -2.7, channels // 4, device=device)  # [C/4]
    row, column = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device),
                                 indexing="ij")                                 # [h,w] each
    angles = [axis.reshape(-1, 1) * frequency for axis in (row, column)]        # 2 x [h*w,C/4]
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)


# ---------------------------------------------------------------------------------- query network Q

class Dropout(nn.Module):
    """nn.Dropout. On a CPU that one draws a whole random number for each element and keeps 4 bytes
    of it for the backward pass: here 16 bits decide and one byte is kept, in 0.4 of its time."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None)
        bits = bits.view(torch.int16)[:x.numel()].view(x.shape)                 # -32768..32767
        return (x * (bits >= round(self.p * 2**16) - 2**15)).mul_(1 / (1 - self.p))


class Attention(nn.Module):
    """Multi-head attention. nn.MultiheadAttention does the same, but projects k and v at once and
    splits them; on a CPU the backward of that split (whole zero tensors, filled and added) takes
    40 % of a step of the small preset."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.in_proj = nn.Linear(dim, 3 * dim)  # rows of q, of k, of v
        self.out_proj = nn.Linear(dim, dim)
        self.heads, self.dropout = heads, Dropout(dropout)

    def forward(self, queries, tokens, need_weights=False):  # [B,q,D], [B,t,D]
        weights, biases = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for x, w, b in zip((queries, tokens, tokens), weights, biases))
        # q [B,heads,q,D/heads]; k, v [B,heads,t,D/heads]
        p, weights = self.dropout.p if self.training else 0.0, None
        if need_weights or (p and q.device.type == "cpu"):  # no fused kernel there has dropout
            weights = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            weights = weights.softmax(-1)                                       # [B,heads,q,t]
            x = self.dropout(weights) @ v
        else:  # the fused kernel never writes the weights down
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.out_proj(x.transpose(1, 2).flatten(2)), weights             # [B,q,D]


class QueryLayer(nn.Module):
    """Pre-norm transformer decoder layer: queries look at each other, at the image, then think."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = Attention(dim, heads, dropout)
        self.cross_attention = Attention(dim, heads, dropout)
        # dropout before ReLU gives the same as after it, and lets ReLU work in place
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), Dropout(dropout),
                                 nn.ReLU(inplace=True), nn.Linear(4 * dim, dim))
        self.dropout = Dropout(dropout)

    def forward(self, queries, tokens, need_attention):  # [B,q,D], [B,h*w,D]
        x = self.norm1(queries)
        queries = queries + self.dropout(self.self_attention(x, x)[0])
        x, weights = self.cross_attention(self.norm2(queries), tokens, need_attention)
        queries = queries + self.dropout(x)
        return queries + self.dropout(self.ffn(self.norm3(queries))), weights


class Stream(nn.Module):
    """One stream, pathology or anatomy: tokens, query network, heads on the queried embeddings."""

    def __init__(self, config, channels):
        super().__init__()
        dim = config.dim
        self.embed = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(),
                                   nn.Linear(channels, dim))
        self.layers = nn.ModuleList(QueryLayer(dim, config.heads, config.dropout)
                                    for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.existence = nn.Linear(dim, 1)            # p, the existence predictor
        self.to_z2 = nn.Linear(dim, config.text_dim)  # Z_2: ProtoCL, against frozen text vectors
        has_z1 = config.icl in ("cosine", "bare") and config.streams == "dual"
        self.to_z1 = nn.Linear(dim, dim) if has_z1 else None  # Z_1: ICL
        self.dropout = Dropout(config.dropout)

    def forward(self, x, queries, need_attention):  # x [B,h*w,C], queries [q,D]
        tokens = self.embed(x)                                                  # [B,h*w,D]
        queried, maps = queries.expand(len(x), -1, -1), []                      # [B,q,D]
        for layer in self.layers:
            queried, attention = layer(queried, tokens, need_attention)
            maps.append(attention)
        queried = self.norm(queried)
        logits = self.existence(self.dropout(queried)).squeeze(-1)              # [B,q]
        return tokens, queried, logits, self.to_z2(queried), maps


# -------------------------------------------------------------------------------------- whole model

class MeDSLIP(nn.Module):
    queries = None  # from_pretrained: text encoder; names, prompts and text vectors of both sets
    args = {}       # from_pretrained: the training flags

    def __init__(self, config):
        super().__init__()
        self.config = config
        assert config.dim % config.heads == 0, \
            f"dim {config.dim} is not a multiple of heads {config.heads}"
        self.backbone, channels, self.stride, self.centre = build_backbone(config.backbone)
        self.text_projection = nn.Linear(config.text_dim, config.dim)  # h_T, shared by the streams
        self.pathology = Stream(config, channels)
        if config.streams == "dual":
            self.mask = nn.Linear(channels, channels)
            self.anatomy = Stream(config, channels)
            if config.icl == "cosine":
                # -4 starts an unrelated pair at 1.8 %: few cells hold a finding
                self.icl_scale = nn.Parameter(torch.tensor(10.0))
                self.icl_bias = nn.Parameter(torch.tensor(-4.0))
        for p in self.parameters():
            if p.dim() == 2:  # linear layers keep the variance of what enters them
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    @torch.no_grad()
    def start_from(self, text, pathology, anatomy, ignore=False):
        """Data-dependent start: queries of unit variance, existence biases at the base rate.

        text [k,T]: hashed vectors have norm 1, BERT's about 15; unscaled, the former would drown in
        the residual stream. Labels [N,m], [N,n] in {1,0,-1}; ignore leaves out the -1.
        """
        self.text_projection.weight.div_((text @ self.text_projection.weight.T).std())
        for stream, labels in (("pathology", pathology), ("anatomy", anatomy)):
            if hasattr(self, stream):
                known = labels >= 0 if ignore else torch.ones_like(labels, dtype=torch.bool)
                rate = (labels[known] == 1).float().mean().clamp(0.001, 0.999).nan_to_num(0.5)
                getattr(self, stream).existence.bias.fill_(torch.logit(rate))

    def forward(self, images, pathology_text, anatomy_text, need_attention=False):
        """Ask a batch every question of both query sets.

        images [B,3,H,W], ImageNet-normalised; pathology_text [m,T] and anatomy_text [n,T], the
        frozen text vectors. need_attention also returns the cross-attention maps, at the price of
        a slower, unfused attention.
        Returns a MeDSLIPOutput.
        """
        x = self.backbone(images)                                               # [B,C,h,w]
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)                                        # [B,h*w,C] I^raw
        if self.config.position:
            x = x + position_embedding(*grid, x.shape[-1], x.device).to(x.dtype)
        pathology_queries = self.text_projection(pathology_text)                # [m,D] T^p
        if self.config.streams == "single":
            tokens, queried, logits, z2, maps = self.pathology(
                x, pathology_queries, need_attention)
            # MedKLIP's way to ask for the place: z . T^a
            relation = torch.einsum("nt,bmt->bnm", anatomy_text.to(z2.dtype), z2)  # [B,n,m]
            return MeDSLIPOutput(logits, None, queried, None, z2, None, relation, tokens, None,
                                 mean_map(maps, grid))
        mask = self.mask(x)
        if self.config.mask == "sigmoid":
            mask = mask.sigmoid()                                               # M in 0..1
        x_p = mask * x                               # [B,h*w,C] Eq. 1: I^p = M * I^raw
        x_a = x - x_p                                # [B,h*w,C] Eq. 1: I^a = (1 - M) * I^raw
        p_tokens, p_queried, p_logits, p_z2, p_maps = self.pathology(
            x_p, pathology_queries, need_attention)
        a_tokens, a_queried, a_logits, a_z2, a_maps = self.anatomy(
            x_a, self.text_projection(anatomy_text), need_attention)
        return MeDSLIPOutput(
            p_logits, a_logits, p_queried, a_queried, p_z2, a_z2, self.relate(p_queried, a_queried),
            p_tokens, a_tokens, mean_map(p_maps, grid), mean_map(a_maps, grid))

    def relate(self, pathology_queried, anatomy_queried):
        """[B,m,D], [B,n,D] -> relation logits [B,n,m]: does pathology j exist at anatomy i?"""
        if self.config.icl == "dot":
            return anatomy_queried @ pathology_queried.transpose(1, 2)
        z1_p = F.normalize(self.pathology.to_z1(pathology_queried), dim=-1)     # [B,m,D] Z_1^p
        z1_a = F.normalize(self.anatomy.to_z1(anatomy_queried), dim=-1)         # [B,n,D] Z_1^a
        s = z1_a @ z1_p.transpose(1, 2)                                         # [B,n,m] Eq. 5
        return self.icl_scale * s + self.icl_bias if self.config.icl == "cosine" else s

    def cell_centres(self):
        """-> (offset, stride): along either axis cell i is centred on pixel offset + stride * i."""
        return self.centre, self.stride

    @classmethod
    def from_pretrained(cls, path_or_hub_id, map_location="cpu"):
        """A model in eval mode from this project's checkpoint, a published MeDSLIP or MedKLIP one.

        Every tensor must find its place: CheckpointError names those that do not (40 at most), but
        for HARMLESS ones. Nothing in the file is executed (`weights_only=True`). A hub id such as
        pykale/MeDSLIP is downloaded by huggingface_hub.
        """
        path = locate(path_or_hub_id)
        checkpoint = read_checkpoint(path, map_location)
        weights = checkpoint.get("model", checkpoint)
        if not isinstance(weights, dict) or not any(torch.is_tensor(v) for v in weights.values()):
            raise CheckpointError(f"{path} holds no weights under 'model'; "
                                  f"it is not a MeDSLIP checkpoint")
        weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)): v for k, v in weights.items()}
        if any(k.startswith("res_features.") for k in weights):
            weights, config, renames = convert_published(weights)
        else:
            known = {f.name for f in fields(MeDSLIPConfig)}
            saved, renames = checkpoint.get("config"), []
            if not isinstance(saved, dict) or not set(saved) <= known:
                raise CheckpointError(
                    f"{path} is neither this project's checkpoint (no model arguments under "
                    f"'config') nor a published MeDSLIP or MedKLIP one (no res_features.*)")
            config = MeDSLIPConfig(**saved)
        model = cls(config).to(map_location)
        own = {rename(k, renames): v for k, v in model.state_dict().items()}  # by the file's names
        trouble = [f"unknown {k}" for k in weights if k not in own and not HARMLESS.search(k)]
        trouble += [f"missing {k}" for k in own if k not in weights and not HARMLESS.search(k)]
        shapes = {k: list(getattr(v, "shape", "?")) for k, v in weights.items() if k in own}
        trouble += [f"{k} has shape {shape} instead of {list(own[k].shape)}"
                    for k, shape in shapes.items() if shape != list(own[k].shape)]
        if trouble:
            more = [f"and {len(trouble) - 40} more"] if len(trouble) > 40 else []
            raise CheckpointError(f"{path} does not fit: {'; '.join(trouble[:40] + more)}")
        with torch.no_grad():
            for k, v in own.items():  # state_dict's tensors share the model's memory
                v.copy_(weights.get(k, v))
        queries, args = checkpoint.get("queries"), checkpoint.get("args")
        model.queries = queries if isinstance(queries, dict) and "pathology" in queries else None
        model.args = args if isinstance(args, dict) and model.queries else {}
        return model.eval()


def mean_map(maps, grid):
    """layers x [B,heads,q,h*w] -> [B,q,h,w], mean of layers and heads; None stays None."""
    return None if maps[0] is None else torch.stack(maps).mean(dim=(0, 2)).unflatten(-1, grid)


# -------------------------------------------------------------------------------------- checkpoints

# Absent or extra without consequence: batch-norm step counters (momentum is fixed), the position
# indices that older transformers stored, and a frozen text encoder saved along.
HARMLESS = re.compile(r"num_batches_tracked$|position_ids$|^(text_encoder|bert_model)\.")

# Our names -> the published ones, rules applied in this order.
PUBLISHED = [
    (r"^backbone\.", "res_features."),
    (r"^text_projection\.", "pathology_embedding_layer."),
    (r"^mask\.", "mask_generator."),
    (r"^(pathology|anatomy)\.embed\.0\.", r"res_l1_\1."),
    (r"^(pathology|anatomy)\.embed\.2\.", r"res_l2_\1."),
    (r"^(pathology|anatomy)\.to_z2\.", r"cl_fc_\1."),
    (r"^(pathology|anatomy)\.existence\.", r"classifier_\1."),
    (r"^(pathology|anatomy)\.(layers|norm)\.", r"decoder_\1.\2."),
    (r"\.in_proj\.", ".in_proj_"),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".multihead_attn."),
    (r"\.ffn\.0\.", ".linear1."),
    (r"\.ffn\.3\.", ".linear2."),
]


def rename(key, rules):
    """A tensor's name after each (pattern, replacement) of `rules`."""
    for ours, theirs in rules:
        key = re.sub(ours, theirs, key)
    return key


def convert_published(weights):
    """Published MeDSLIP or MedKLIP weights -> (weights with one-logit heads, config, renames)."""
    dual = any(k.startswith("decoder_anatomy.") for k in weights)
    renames = PUBLISHED + ([] if dual else [(r"_pathology\.", ".")])  # MedKLIP: no suffixes
    if any(k.startswith("disease_embedding_layer.") for k in weights):
        renames = renames + [(r"^pathology_embedding_layer\.", "disease_embedding_layer.")]
    weights = dict(weights)
    for key, value in weights.items():
        if key.startswith("classifier") and getattr(value, "shape", ())[:1] == (2,):
            weights[key] = value[1:] - value[:1]  # softmax over (absent, present) = sigmoid of this
        if key.startswith("decoder_anatomy.norm."):
            # the released decoders hold one and the same final LayerNorm, and of the two copies in
            # the file it takes the one read last, pathology's
            weights[key] = weights.get(key.replace("anatomy", "pathology"), value)
    config = MeDSLIPConfig(streams="dual" if dual else "single", mask="linear", icl="dot")
    return weights, config, renames


def locate(path_or_hub_id):
    """A file as it is; otherwise something of the form owner/name is asked of the hub."""
    name = str(path_or_hub_id)
    if Path(name).is_file():
        return name
    is_path = Path(name).suffix in (".pt", ".pth", ".bin", ".ckpt")
    if is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"no checkpoint at {name}; train one with `python train.py`, "
                              f"or name one by --checkpoint")
    try:
        from huggingface_hub import snapshot_download
        folder = snapshot_download(name, allow_patterns=["*.pt", "*.pth", "*.bin"])
    except ImportError:
        raise CheckpointError(f"no file {name}, and the hub needs huggingface_hub "
                              f"(`pip install transformers`)") from None
    except Exception as error:  # the hub library raises a dozen kinds; each means: not now
        raise CheckpointError(
            f"no file {name}, and the hub did not give it ({type(error).__name__}); if you are "
            f"offline, download the checkpoint elsewhere and give its path") from None
    files = [str(p) for p in Path(folder).rglob("*") if p.suffix in (".pt", ".pth", ".bin")]
    if len(files) != 1:
        raise CheckpointError(f"{name} on the hub holds {', '.join(files) or 'no checkpoint'}; "
                              f"give the path of the one you want")
    return files[0]


def read_checkpoint(path, map_location="cpu"):
    """torch.load without pickle execution; every failure is a CheckpointError in one line."""
    try:
        with open(path, "rb") as f:
            head = f.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror})") from None
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not a checkpoint; download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git-LFS pointer, not the checkpoint; "
                              f"fetch it with `git lfs pull`")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # damage shows as anything from EOFError to UnicodeDecodeError
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise CheckpointError(f"{path} is refused: it wants to run {wanted[1]} on loading; "
                                  f"only tensors, numbers and strings are read") from None
        why = type(error).__name__  # but for RuntimeError, whose first sentence is worth reading
        if isinstance(error, RuntimeError):
            why = str(error).split(". ")[0].split("\n")[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint, it is truncated or of "
                              f"another kind ({why})") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


# ------------------------------------------------------------------------------------------- a walk

@torch.no_grad()
def walk():
    """Print every tensor of one phantom from report to loss: name, shape, equation.

    The network is the CPU preset's with random weights; the queries are the published 75 and 51.
    """
    import numpy as np
    import text
    from data import to_input
    from losses import image_labels, medslip_loss
    from phantom import draw

    def show(name, value, meaning):
        print(f"  {name:<10} {','.join(map(str, value.shape)):<12} {meaning}")

    film = draw(np.random.default_rng(0), size=64)
    print("report\n  " + " ".join(film["report"].split()))
    print("text (Sec. II-A)")
    triplets = text.extract_triplets(film["report"])
    for t in triplets:
        print(f"  triplet    ({t.pathology}, {t.anatomy}, {t.existence})")
    y = text.existence_matrix(triplets, text.PATHOLOGIES, text.ANATOMIES)
    y = torch.from_numpy(y)[None]
    p_prompts = text.pathology_prompts(text.PATHOLOGIES)
    a_prompts = text.anatomy_prompts(text.ANATOMIES)
    p_text, a_text = text.encode_text(p_prompts, "hashing"), text.encode_text(a_prompts, "hashing")
    show("y", y, f"B,n,m: {(y == 1).sum()} cells present (1), {(y == 0).sum()} denied (0), "
                 "the rest not mentioned (-1)")
    show("E_T(p)", p_text, f"m,T: a frozen vector a prompt; {p_prompts[8].split('.')[0]!r}, ...")
    show("E_T(a)", a_text, f"n,T: a frozen vector a prompt; {a_prompts[4]!r}, ...")

    torch.manual_seed(0)
    model = MeDSLIP(MeDSLIPConfig("small", image_size=64, dim=96, layers=2, position=True)).eval()
    image = to_input(torch.tensor(film["image"])[None], 64)
    features = model.backbone(image)
    raw = features.flatten(2).transpose(1, 2) + position_embedding(16, 16, features.shape[1])
    mask = model.mask(raw).sigmoid()
    first, stride = model.cell_centres()
    print("image (Sec. II-B.1)")
    show("image", image, "B,3,H,W: ImageNet's mean and deviation taken out")
    show("E_I(image)", features, f"B,C,h,w: a cell every {stride} pixels, the first at {first}")
    show("I^raw", raw, "B,h*w,C: a token a cell, its position embedding added")
    show("M", mask, "sigmoid(Linear(I^raw))")
    show("I^p", mask * raw, "M * I^raw (Eq. 1)")
    show("I^a", (1 - mask) * raw, "(1 - M) * I^raw (Eq. 1)")

    out = model(image, p_text, a_text, need_attention=True)
    for s, stream, vectors in (("p", "pathology", p_text), ("a", "anatomy", a_text)):
        print(f"{stream} stream (Sec. II-B.2)")
        show(f"T^{s}", model.text_projection(vectors), f"h_T(E_T({s})): the questions")
        for name, field, meaning in (
                ("tokens", "tokens", f"MLP(I^{s})"),
                (f"I_q^{s}", "queried", f"Q^{s}(I^{s}, T^{s}): an answer a question"),
                ("attention", "attention", "where each question looked, mean of heads and layers"),
                (f"y_hat^{s}", "logits", f"p^{s}(I_q^{s}), before the sigmoid"),
                (f"Z_2^{s}", "z", f"Linear(I_q^{s}), as wide as the text vectors")):
            show(name, getattr(out, f"{stream}_{field}"), meaning)

    print("losses (Eq. 2 and Sec. II-B.3; what the report does not mention counts as denied)")
    y = y.masked_fill(y == -1, 0)
    present = (y == 1).float()
    y_p, y_a = image_labels(y)
    places = present.transpose(1, 2) @ a_text / present.sum(1).clamp(min=1)[..., None]
    findings = present @ p_text / present.sum(2).clamp(min=1)[..., None]
    show("y^p", y_p, f"y over the anatomies: {(y_p == 1).sum()} present")
    show("y^a", y_a, f"y over the pathologies: {(y_a == 1).sum()} present")
    show("P^a", places, "mean of the E_T(a) where y holds the pathology (Eq. 3)")
    show("P^p", findings, "mean of the E_T(p) that y holds at the anatomy (Eq. 3)")
    show("S^a,p", out.relation_logits, "<Z_1^a, Z_1^p>, scaled and shifted (Eq. 5)")
    loss = medslip_loss(out, y, p_text, a_text)
    for name, key, meaning in (
            ("L_Exist", "existence", "BCE(y_hat^p, y^p) + BCE(y_hat^a, y^a) (Eq. 2)"),
            ("L_ProtoCL", "protocl", "-log softmax of Z_2 . P among 7 Z_2 . T^-, p and a (Eq. 4)"),
            ("L_ICL", "icl", "BCE(S^a,p, y) (Eq. 6)"),
            ("L", "loss", "L_Exist + L_ProtoCL + L_ICL (Eq. 7 at alpha = beta = 1)")):
        print(f"  {name:<10} {loss[key]:<12.4f} {meaning}")


if __name__ == "__main__":
    walk()
