"""MeDSLIP's network: two streams ask a radiograph what it shows and where (arXiv 2403.10635).

    from model import MeDSLIP, MeDSLIPConfig
    out = MeDSLIP(MeDSLIPConfig())(images, pathology_text, anatomy_text)
    python walk.py    # one radiograph through this network, every tensor with its shape

One letter per axis, here and in every other file:
    B images   m pathologies   n anatomies   h, w token grid   C backbone channels
    D embedding width   T text vector width   q queries of a stream (m or n)   k concepts, prompts
    t tokens (h*w)      H, W pixels; evaluation has N images of S x S stored pixels, L labels

Differs from the paper:
- Eq. 6 puts the bare cosine of Eq. 5 through a sigmoid, which confines every probability to
  0.27..0.73, while few cells are positive. Here the cosine has a learned scale and bias
  (`icl="bare"` is the printed form).
- `existence="evidence"` takes the existence logit from the scores of the first layer over the
  image's cells, and the map is the derivative of the logit (see `Stream.evidence`). The paper
  has a linear layer on the queried embedding: `existence="embedding"`.
- A fixed 2-D position embedding may be added to I^raw (`position`, on for phantoms).
Differs from the released code:
- The mask passes a sigmoid as in the paper; released: no activation (`mask="linear"`).
- ICL has the paper's projections Z1; released: a plain dot product (`icl="dot"`).
- ProtoCL reads I_q before its dropout; released: after it (`proto_from="dropped"`).
- One existence logit instead of a softmax over two: the same function, their difference.
- Each stream trains a last LayerNorm of its own; the two released streams share one.
- Initial weights depend on the width of a layer, on the text vectors and on how often a label is
  positive (`initialise`, `fit_to_data`); released: a deviation of 0.02 in every linear layer.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock


@dataclass
class MeDSLIPConfig:
    backbone: str = "resnet50"  # resnet50 | resnet18 (both up to layer3) | small (phantoms)
    image_size: int = 224       # pixels it was trained at; the network itself takes any size
    dim: int = 256              # D
    layers: int = 4             # of each query network
    heads: int = 4
    text_dim: int = 768         # T
    dropout: float = 0.1
    position: bool = False      # 2-D position embedding added to I^raw
    streams: str = "dual"       # dual | single (no mask, no anatomy stream: MedKLIP)
    mask: str = "sigmoid"       # sigmoid | linear | none | hard (0 or 1, straight-through)
    icl: str = "cosine"         # cosine (learned scale, bias) | bare (as printed) | dot (released)
    existence: str = "embedding"  # embedding (paper; files without it) | evidence
    proto_from: str = "queried"   # ProtoCL reads I_q: queried | dropped (after dropout: released)


@dataclass
class MeDSLIPOutput:
    """What the network says of a batch. A single-stream model leaves the anatomy fields None; the
    maps and features are None unless need_attention."""
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
    pathology_evidence: torch.Tensor | None = None   # [B,m,h,w] where existence is "evidence"
    raw_features: torch.Tensor | None = None         # [B,h*w,C] I^raw
    pathology_features: torch.Tensor | None = None   # [B,h*w,C] I^p; I^raw with one stream
    anatomy_features: torch.Tensor | None = None     # [B,h*w,C] I^a


# -------------------------------------------------------------------------------- image encoder E_I

def halve(channels_in, channels_out):
    """A convolution of stride 2. Its even kernel centres output cell i between the pixels 2i and
    2i + 1, so that the cells tile the image evenly; an odd kernel would centre it on pixel 2i."""
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=False),
                         nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


def build_backbone(name):
    """-> (module: [B,3,H,W] -> [B,C,h,w], C, stride, centre of cell 0 in input pixels).

    Maps are drawn back onto the image through the last two numbers.
    """
    if name == "small":
        # A cell sees 26 pixels. With 50 a cell beside a lesion saw it too, and the maps pointed
        # there.
        return nn.Sequential(halve(3, 32), halve(32, 96), BasicBlock(96, 96)), 96, 4, 1.5
    resnet = getattr(torchvision.models, name)(weights=None)
    channels = {"resnet18": 256, "resnet50": 1024}[name]
    # conv1 bn1 relu maxpool layer1 layer2 layer3: published as res_features.0 .. res_features.6
    return nn.Sequential(*list(resnet.children())[:7]), channels, 16, 0.0


def position_embedding(h, w, channels, device=None):
    """[h*w,C]: sine, cosine of the row, then of the column, at periods from 2 to 1000 cells."""
    frequency = math.pi * torch.logspace(0, -2.7, channels // 4, device=device)  # [C/4]
    rows = torch.arange(h, device=device).repeat_interleave(w)                  # [h*w]
    columns = torch.arange(w, device=device).repeat(h)                          # [h*w]
    by_row, by_column = rows[:, None] * frequency, columns[:, None] * frequency  # [h*w,C/4]
    return torch.cat([by_row.sin(), by_row.cos(), by_column.sin(), by_column.cos()], dim=1)


# ---------------------------------------------------------------------------------- query network Q

class Attention(nn.Module):
    """Multi-head attention that also returns its scores.

    nn.MultiheadAttention computes the same, but projects keys and values at once and splits them;
    on a CPU the backward pass of that split took 40 % of a step of the small preset.
    """

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.in_proj = nn.Linear(dim, 3 * dim)  # rows of q, of k, of v, as published
        self.out_proj = nn.Linear(dim, dim)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, queries, tokens):  # [B,q,D], [B,t,D]
        w_q, w_k, w_v = self.in_proj.weight.chunk(3)
        b_q, b_k, b_v = self.in_proj.bias.chunk(3)
        q = self.split_heads(F.linear(queries, w_q, b_q))                  # [B,heads,q,D/heads]
        k = self.split_heads(F.linear(tokens, w_k, b_k))                   # [B,heads,t,D/heads]
        v = self.split_heads(F.linear(tokens, w_v, b_v))
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)             # [B,heads,q,t]
        x = self.dropout(scores.softmax(-1)) @ v                           # [B,heads,q,D/heads]
        return self.out_proj(x.transpose(1, 2).flatten(2)), scores              # [B,q,D]

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class QueryLayer(nn.Module):
    """Pre-norm transformer decoder layer: queries look at each other, at the image, then think."""

    def __init__(self, dim, heads, dropout, self_attention=True):
        super().__init__()
        self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        if self_attention:
            self.norm1 = nn.LayerNorm(dim)
            self.self_attention = Attention(dim, heads, dropout)
        else:
            self.self_attention = None
        self.cross_attention = Attention(dim, heads, dropout)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries, tokens):  # [B,q,D], [B,h*w,D]
        if self.self_attention is not None:
            x = self.norm1(queries)
            queries = queries + self.dropout(self.self_attention(x, x)[0])
        x, scores = self.cross_attention(self.norm2(queries), tokens)
        queries = queries + self.dropout(x)
        return queries + self.dropout(self.ffn(self.norm3(queries))), scores    # [B,heads,q,h*w]


class Stream(nn.Module):
    """One stream, pathology or anatomy: tokens, query network, heads."""

    def __init__(self, config, channels):
        super().__init__()
        dim = config.dim
        self.embed = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(),
                                   nn.Linear(channels, dim))
        self.layers = nn.ModuleList(QueryLayer(dim, config.heads, config.dropout)
                                    for _ in range(config.layers))
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(config.dropout)
        self.proto_from = config.proto_from
        if config.existence == "evidence":
            self.layers[0] = QueryLayer(dim, 1, config.dropout, self_attention=False)
            self.existence, self.existence_bias = None, nn.Parameter(torch.zeros(1))
        else:
            self.existence = nn.Linear(dim, 1)        # p, the existence predictor
        self.to_z2 = nn.Linear(dim, config.text_dim)  # Z_2: ProtoCL, against frozen text vectors
        has_z1 = config.icl != "dot" and config.streams == "dual"
        self.to_z1 = nn.Linear(dim, dim) if has_z1 else None  # Z_1: ICL

    def forward(self, x, queries):  # x [B,h*w,C], queries [q,D]
        tokens = self.embed(x)                                                  # [B,h*w,D]
        queried, scores = queries.expand(len(x), -1, -1), []                    # [B,q,D]
        for layer in self.layers:
            queried, layer_scores = layer(queried, tokens)
            scores.append(layer_scores)
        queried = self.norm(queried)                                            # [B,q,D] I_q
        dropped = self.dropout(queried)
        if self.existence is None:
            logits = self.evidence(scores[0])                                   # [B,q]
        else:
            logits = self.existence(dropped).squeeze(-1)                        # [B,q] p(I_q)
        z = self.to_z2(dropped if self.proto_from == "dropped" else queried)    # [B,q,T] Z_2
        return tokens, queried, logits, z, scores

    def evidence(self, scores):
        """The first layer's scores [B,1,q,t] -> existence logits [B,q].

        Read the score s of a cell as its log odds that the finding is seen there, and let the odds
        of the finding be the mean of the odds of the t cells:
            logit = log(1/t sum exp s) + bias = logsumexp(s) - log t + bias.
        Then d logit / d s = softmax(s), which is the attention of this very layer. The map is
        therefore no by-product: it says how much each cell moves the answer. The first layer has
        one head and no self-attention, so that a query is its own text and its evidence is not
        borrowed from other queries. In the last layer this failed in trials: earlier layers had
        already mixed the cells, and the map was flat.
        """
        scores = scores.squeeze(1).float()                                      # [B,q,t]
        return scores.logsumexp(-1) - math.log(scores.shape[-1]) + self.existence_bias


# -------------------------------------------------------------------------------------- whole model

class MeDSLIP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # load_model sets them: encoder, names, prompts and vectors of the queries; training flags
        self.queries, self.args = None, {}
        assert config.dim % config.heads == 0, f"dim {config.dim}, heads {config.heads}"
        self.backbone, channels, self.stride, self.centre = build_backbone(config.backbone)
        self.text_projection = nn.Linear(config.text_dim, config.dim)  # h_T, shared by the streams
        self.pathology = Stream(config, channels)
        if config.streams == "dual":
            self.anatomy = Stream(config, channels)
            if config.mask != "none":
                self.mask = nn.Linear(channels, channels)
            if config.icl == "cosine":
                # -4 starts an unrelated pair at 1.8 %: few cells hold a finding
                self.icl_scale = nn.Parameter(torch.tensor(10.0))
                self.icl_bias = nn.Parameter(torch.tensor(-4.0))
        self.initialise()

    def initialise(self, std=None):
        """Linear weights with deviation `std`, by default width ** -0.5, which keeps the variance
        of what enters them: 0.03 at width 1024, where the released code has 0.02; 0.1 at 96.
        """
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std or p.shape[1] ** -0.5)
        for module in self.modules():
            if std and isinstance(module, Attention):  # as nn.MultiheadAttention starts them
                nn.init.zeros_(module.in_proj.bias)
                nn.init.zeros_(module.out_proj.bias)
        return self

    @torch.no_grad()
    def fit_to_data(self, text, pathology_rate, anatomy_rate):
        """Data-dependent start from all text vectors [k,T] and the base rates of the labels.

        Queries get mean 0 and variance 1: hashed vectors have norm 1 and BERT's about 15, and
        BERT's share a large common part (left and right have a cosine of 0.99). The projection's
        bias takes that part away, so the class of functions is unchanged.
        """
        projected = text @ self.text_projection.weight.T                        # [k,D]
        scale = (projected - projected.mean(0)).std()
        self.text_projection.weight.div_(scale)
        self.text_projection.bias.copy_(-projected.mean(0) / scale)
        for stream, rate in (("pathology", pathology_rate), ("anatomy", anatomy_rate)):
            if hasattr(self, stream):
                head = getattr(self, stream)
                bias = head.existence_bias if head.existence is None else head.existence.bias
                bias.fill_(math.log(rate / (1 - rate)))

    def forward(self, images, pathology_text, anatomy_text, need_attention=False):
        """Ask a batch every question of both query sets.

        images [B,3,H,W], ImageNet-normalised; pathology_text [m,T] and anatomy_text [n,T], the
        frozen text vectors. Returns a MeDSLIPOutput, with maps and features if need_attention.
        """
        features = self.backbone(images)                                        # [B,C,h,w]
        h, w = features.shape[-2:]
        x = features.flatten(2).transpose(1, 2)                                 # [B,h*w,C] I^raw
        if self.config.position:
            x = x + position_embedding(h, w, x.shape[-1], x.device).to(x.dtype)
        queries = self.text_projection(pathology_text)                          # [m,D] T^p
        x_p, x_a = (x, None) if self.config.streams == "single" else self.disentangle(x)
        tokens, queried, logits, z, scores = self.pathology(x_p, queries)
        if self.config.streams == "single":
            # MedKLIP's way to ask for the place: Z . T^a
            relation = (z @ anatomy_text.to(z.dtype).T).transpose(1, 2)         # [B,n,m]
            out = MeDSLIPOutput(logits, None, queried, None, z, None, relation, tokens, None)
        else:
            a_tokens, a_queried, a_logits, a_z, a_scores = self.anatomy(
                x_a, self.text_projection(anatomy_text))                        # [n,D] T^a
            out = MeDSLIPOutput(logits, a_logits, queried, a_queried, z, a_z,
                                self.relate(queried, a_queried), tokens, a_tokens)
        if need_attention:
            out.raw_features, out.pathology_features, out.anatomy_features = x, x_p, x_a
            out.pathology_attention = mean_map(scores).unflatten(-1, (h, w))    # [B,m,h,w]
            if out.anatomy_logits is not None:
                out.anatomy_attention = mean_map(a_scores).unflatten(-1, (h, w))
            if self.config.existence == "evidence":
                out.pathology_evidence = mean_map(scores[:1]).unflatten(-1, (h, w))
        return out

    def disentangle(self, x):
        """Eq. 1: I^raw [B,h*w,C] -> I^p = M * I^raw and I^a = (1 - M) * I^raw, of the same shape;
        I^raw twice if the mask is "none"."""
        if self.config.mask == "none":
            return x, x
        mask = self.mask(x)                                                     # [B,h*w,C] M
        if self.config.mask != "linear":
            mask = mask.sigmoid()
        if self.config.mask == "hard":  # 0 or 1, with the gradient of the sigmoid
            mask = (mask > 0.5).to(mask.dtype) + (mask - mask.detach())
        return mask * x, (1 - mask) * x                                         # Eq. 1

    def relate(self, pathology_queried, anatomy_queried):
        """[B,m,D], [B,n,D] -> relation logits [B,n,m]: does pathology j exist at anatomy i?"""
        if self.config.icl == "dot":
            return anatomy_queried @ pathology_queried.transpose(1, 2)
        z1_p = F.normalize(self.pathology.to_z1(pathology_queried), dim=-1)     # [B,m,D] Z_1^p
        z1_a = F.normalize(self.anatomy.to_z1(anatomy_queried), dim=-1)         # [B,n,D] Z_1^a
        s = z1_a @ z1_p.transpose(1, 2)                                         # [B,n,m] Eq. 5
        return self.icl_scale * s + self.icl_bias if self.config.icl == "cosine" else s

    def swap(self, out):
        """Relation logits [B,n,m] of film b's pathologies with film b - 1's anatomies (film 0: the
        last film's): see losses.swap_loss."""
        return self.relate(out.pathology_queried, out.anatomy_queried.roll(1, 0))

    def cell_centres(self):
        """-> (offset, stride): along either axis cell i is centred on pixel offset + stride * i."""
        return self.centre, self.stride


def mean_map(scores):
    """List of [B,heads,q,h*w] -> [B,q,h*w]: attention, mean over heads and layers, as published."""
    return torch.stack([s.float().softmax(-1).mean(1) for s in scores]).mean(0)
