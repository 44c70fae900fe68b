"""Proves that the network is the published one, fed weights under the published names, and has the
properties that the paper and its users count on.

    python -m pytest tests/test_model.py

golden.npz holds what the published code returned for weights and inputs made by formula (seed 0,
dropout off). Other seeds are compared with `Published` below: the released architecture built from
PyTorch's own transformer layers, under the released names.
"""
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision

from losses import existence_loss, icl_loss, image_labels, medslip_loss, proto_loss
from model import Dropout, MeDSLIP, MeDSLIPConfig, position_embedding

SMALL = dict(backbone="small", image_size=32, dim=16, layers=2, heads=2, text_dim=24)


# -------------------------------------------------------------------- weights and inputs by formula

def rng(seed, name):
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)


def weight(seed, name, shape):
    r = rng(seed, name)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1)
    if name.endswith("running_var"):
        w = r.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
        w = r.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    else:  # the scale of a norm lies around 1; biases and running means around 0
        w = 0.1 * r.standard_normal(shape) + name.endswith("weight")
    return torch.from_numpy(np.asarray(w, np.float32))


def inputs(seed, B=2, m=75, n=51):
    """Images, both texts, existence, and the 7 negatives ProtoCL takes in either stream."""
    images = rng(seed, "images").standard_normal((B, 3, 224, 224)).astype(np.float32)
    texts = [(0.3 * rng(seed, k).standard_normal((q, 768))).astype(np.float32)
             for k, q in (("pathology_text", m), ("anatomy_text", n))]
    u = rng(seed, "existence").uniform(size=(B, n, m))
    y = np.where(u < 0.01, 1, np.where(u < 0.02, 0, -1))                        # [B,n,m]
    draws = []
    for name, rows in (("negative_anatomies", y.transpose(0, 2, 1)), ("negative_pathologies", y)):
        r = rng(seed, name)
        draws.append([[r.permutation(np.flatnonzero(q != 1))[:7] for q in image] for image in rows])
    return [torch.from_numpy(np.asarray(a)) for a in (images, *texts, y, *draws)]


# ------------------------------------------------------------------------ the released architecture

class Published(nn.Module):
    """suffixes "_anatomy", "_pathology": MeDSLIP; "" alone: MedKLIP."""

    def __init__(self, *suffixes):
        super().__init__()
        self.suffixes = suffixes
        self.res_features = nn.Sequential(*list(torchvision.models.resnet50().children())[:7])
        if len(suffixes) == 2:
            self.pathology_embedding_layer = nn.Linear(768, 256)
            self.mask_generator = nn.Linear(1024, 1024)
        else:
            self.disease_embedding_layer = nn.Linear(768, 256)
        norm = nn.LayerNorm(256)  # one for all decoders: loading leaves the last copy in it
        for s in suffixes:
            layer = nn.TransformerDecoderLayer(256, 4, 1024, batch_first=True, norm_first=True)
            self.add_module(f"res_l1{s}", nn.Linear(1024, 1024))
            self.add_module(f"res_l2{s}", nn.Linear(1024, 256))
            self.add_module(f"decoder{s}", nn.TransformerDecoder(layer, 4, norm))
            self.add_module(f"classifier{s}", nn.Linear(256, 2))
            self.add_module(f"cl_fc{s}", nn.Linear(256, 768))

    def forward(self, images, *texts):  # -> per stream (queried, probability, z)
        x = self.res_features(images).flatten(2).transpose(1, 2)
        if len(texts) == 1:
            parts, embed = [x], self.disease_embedding_layer
        else:
            mask = self.mask_generator(x)
            parts, embed = [(1 - mask) * x, mask * x], self.pathology_embedding_layer
        out = []
        for s, part, text in zip(self.suffixes, parts, texts):
            part = getattr(self, f"res_l2{s}")(getattr(self, f"res_l1{s}")(part).relu())
            queried = getattr(self, f"decoder{s}")(embed(text).expand(len(x), -1, -1), part)
            probability = getattr(self, f"classifier{s}")(queried).softmax(-1)[..., 1]
            out.append((queried, probability, getattr(self, f"cl_fc{s}")(queried)))
        return out


def published(seed, *suffixes):
    model = Published(*suffixes).eval()
    weights = {k: weight(seed, k, v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict(weights)
    return model, weights


@pytest.fixture(scope="module")
def released():
    return published(0, "_anatomy", "_pathology")


def load(weights, path):
    torch.save({"model": weights, "optimizer": {}, "lr_scheduler": {}, "config": {"d_model": 256},
                "epoch": 3}, path)
    return MeDSLIP.from_pretrained(path)


def close(ours, theirs, tolerance=1e-4):
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


# -------------------------------------------------------------------------------- published numbers

def test_published_names_and_shapes(released):
    rows = sorted(f"{k} {'x'.join(map(str, v.shape))}" for k, v in released[0].state_dict().items())
    assert len(rows) == 426
    assert zlib.crc32("\n".join(rows).encode()) == 3431960864  # of the released list


@pytest.mark.parametrize("spelling", [
    lambda k: k,
    lambda k: "module." + k,
    lambda k: k.replace("pathology_embedding_layer", "disease_embedding_layer"),
    lambda k: "module." + k.replace("pathology_embedding_layer", "disease_embedding_layer"),
], ids=["plain", "module", "disease", "module-disease"])
def test_published_weights_give_published_numbers(released, spelling, tmp_path):
    model = load({spelling(k): v for k, v in released[1].items()}, tmp_path / "p.pth")
    images, p_text, a_text, y, p_negatives, a_negatives = inputs(0)
    with torch.inference_mode():
        out = model(images, p_text, a_text, need_attention=True)
    gold = np.load(Path(__file__).parent / "golden.npz")
    close(out.pathology_tokens[:, ::14], gold["pathology_embedding"])
    close(out.anatomy_tokens[:, ::14], gold["anatomy_embedding"])
    close(out.pathology_queried[:, ::5], gold["pathology_queried"])
    close(out.anatomy_queried[:, ::5], gold["anatomy_queried"])
    close(out.pathology_logits.sigmoid(), gold["pathology_prob"])
    close(out.anatomy_logits.sigmoid(), gold["anatomy_prob"])
    close(out.pathology_attention.flatten(2)[:, ::5], gold["pathology_attention"])
    close(out.anatomy_attention.flatten(2)[:, ::5], gold["anatomy_attention"])
    close(out.relation_logits[:, ::5, ::5], gold["icl_logit"])
    p_labels, a_labels = image_labels(y)
    close(existence_loss(out.pathology_logits, p_labels), gold["existence_pathology"])
    close(existence_loss(out.anatomy_logits, a_labels), gold["existence_anatomy"])
    p_proto = proto_loss(out.pathology_z, a_text, y.transpose(1, 2), negative_index=p_negatives)
    a_proto = proto_loss(out.anatomy_z, p_text, y, negative_index=a_negatives)
    close(p_proto, gold["protocl_pathology"])
    close(a_proto, gold["protocl_anatomy"])
    close(icl_loss(out.relation_logits, y), gold["icl"])
    parts = medslip_loss(out, y, p_text, a_text, pathology_negatives=p_negatives,
                         anatomy_negatives=a_negatives)
    close(parts["loss"], gold["loss"])
    close(parts["protocl"], gold["protocl_pathology"] + gold["protocl_anatomy"])


def test_other_weights_against_pytorch_layers(tmp_path):
    theirs, weights = published(7, "_anatomy", "_pathology")
    images, p_text, a_text, *_ = inputs(7)
    ours = load(weights, tmp_path / "p.pth")
    with torch.inference_mode():
        out = ours(images, p_text, a_text)
        (a_queried, a_prob, a_z), (p_queried, p_prob, p_z) = theirs(images, a_text, p_text)
    close(out.anatomy_queried, a_queried)
    close(out.pathology_queried, p_queried)
    close(out.anatomy_logits.sigmoid(), a_prob)
    close(out.pathology_logits.sigmoid(), p_prob)
    close(out.anatomy_z, a_z)
    close(out.pathology_z, p_z)
    close(out.relation_logits, a_queried @ p_queried.transpose(1, 2))


def test_medklip(tmp_path):
    theirs, weights = published(3, "")
    images, p_text, a_text, *_ = inputs(3)
    ours = load({"module." + k: v for k, v in weights.items()}, tmp_path / "medklip.pth")
    assert ours.config.streams == "single"
    with torch.inference_mode():
        out = ours(images, p_text, a_text, need_attention=True)
        (queried, probability, z), = theirs(images, p_text)
    close(out.pathology_queried, queried)
    close(out.pathology_logits.sigmoid(), probability)
    close(out.pathology_z, z)
    close(out.relation_logits, (z @ a_text.T).transpose(1, 2))
    assert out.anatomy_logits is None and out.anatomy_attention is None
    assert out.pathology_attention.shape == (2, 75, 14, 14)


# --------------------------------------------------------------------------------------- properties

def ask(B=2, m=5, n=4, size=32, **changes):
    """A small model in eval mode, the inputs of a batch and its output."""
    torch.manual_seed(0)
    model = MeDSLIP(MeDSLIPConfig(**SMALL | changes)).eval()
    batch = torch.randn(B, 3, size, size), torch.randn(m, 24), torch.randn(n, 24)
    with torch.inference_mode():
        return model, batch, model(*batch, need_attention=True)


@pytest.mark.parametrize("changes", [{}, dict(icl="bare"), dict(icl="dot", mask="linear"),
                                     dict(position=True), dict(streams="single")],
                         ids=["default", "bare", "released", "position", "single"])
def test_shapes_and_attention(changes):
    model, batch, out = ask(**changes)
    B, m, n, D, T, grid = 2, 5, 4, 16, 24, (8, 8)
    streams = [("pathology", m), ("anatomy", n)][:1 if model.config.streams == "single" else 2]
    for stream, q in streams:
        assert getattr(out, f"{stream}_logits").shape == (B, q)
        assert getattr(out, f"{stream}_queried").shape == (B, q, D)
        assert getattr(out, f"{stream}_z").shape == (B, q, T)
        assert getattr(out, f"{stream}_tokens").shape == (B, 64, D)
        attention = getattr(out, f"{stream}_attention")
        assert attention.shape == (B, q, *grid)
        torch.testing.assert_close(attention.sum((-2, -1)), torch.ones(B, q))
    if len(streams) == 1:
        assert all(v is None for k, v in vars(out).items() if k.startswith("anatomy"))
    assert out.relation_logits.shape == (B, n, m)
    assert all(torch.isfinite(v).all() for v in vars(out).values() if v is not None)
    with torch.inference_mode():
        plain = model(*batch)
    assert plain.pathology_attention is None and plain.anatomy_attention is None
    for k, v in vars(plain).items():
        if v is not None:
            torch.testing.assert_close(v, getattr(out, k), atol=1e-5, rtol=1e-5)


def test_mask_splits_the_tokens():
    model, batch, _ = ask()
    seen = {}
    model.pathology.embed.register_forward_pre_hook(lambda _, x: seen.update(p=x[0]))
    model.anatomy.embed.register_forward_pre_hook(lambda _, x: seen.update(a=x[0]))
    with torch.inference_mode():
        model(*batch)
        raw = model.backbone(batch[0]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen["p"] + seen["a"], raw)
    share = (seen["p"] / raw)[raw.abs() > 1e-3]
    assert 0 <= share.min() < 0.45 and 0.55 < share.max() <= 1


def test_cosine_stays_within_its_scale():
    _, _, bare = ask(icl="bare")
    assert bare.relation_logits.abs().max() <= 1 + 1e-6
    model, _, out = ask()
    assert (model.icl_scale, model.icl_bias) == (10, -4)
    torch.testing.assert_close(out.relation_logits, 10 * bare.relation_logits - 4)


def test_order_of_the_questions_does_not_matter():
    model, (images, p_text, a_text), out = ask()
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.inference_mode():
        turned = model(images, p_text[order], a_text)
    torch.testing.assert_close(turned.pathology_logits, out.pathology_logits[:, order])
    torch.testing.assert_close(turned.relation_logits, out.relation_logits[:, :, order])
    torch.testing.assert_close(turned.anatomy_logits, out.anatomy_logits)


@pytest.mark.parametrize("backbone, size", [("small", 64), ("resnet18", 512), ("resnet50", 512)])
def test_cells_look_where_cell_centres_says(backbone, size):
    model = MeDSLIP(MeDSLIPConfig(**SMALL | dict(backbone=backbone))).eval()
    for name, layer in model.backbone.named_modules():
        # with equal positive taps and a mean for the maximum every path counts alike, so that the
        # gradient's centre of mass is the centre of the receptive field
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
        if isinstance(layer, nn.MaxPool2d):
            model.backbone[int(name)] = nn.AvgPool2d(3, stride=2, padding=1)
    image = torch.ones(1, 3, size, size, requires_grad=True)
    x = model.backbone(image)                                                   # [1,C,h,w]
    offset, stride = model.cell_centres()
    assert x.shape[2] == size // stride
    i, j = x.shape[2] // 2, x.shape[3] // 2 - 1
    pull, = torch.autograd.grad(x[0, :, i, j].sum(), image)
    pull = pull[0].sum(0)                                                       # [size,size]
    pixel = torch.arange(size, dtype=torch.float32)
    centre = [(pull.sum(k) * pixel).sum() / pull.sum() for k in (1, 0)]
    assert centre == pytest.approx([offset + stride * i, offset + stride * j], abs=0.05)


def test_position_embedding_tells_cells_apart():
    e = position_embedding(16, 12, 32)                                          # [192,32]
    assert e.shape == (192, 32) and e.abs().max() <= 1
    distance = torch.cdist(e, e) + 9 * torch.eye(len(e))
    assert distance.min() > 0.1
    e = e.unflatten(0, (16, 12))
    assert torch.equal(e[3, 0, :16], e[3, 7, :16]) and torch.equal(e[0, 5, 16:], e[9, 5, 16:])


@pytest.mark.parametrize("position", [False, True])
def test_position_alone_tells_the_order_of_tokens(position):
    model, batch, out = ask(position=position)
    order = torch.randperm(64)
    model.backbone.register_forward_hook(lambda _, x, y: y.flatten(2)[..., order].view_as(y))
    with torch.inference_mode():
        mixed = model(*batch)
    same = torch.allclose(mixed.pathology_logits, out.pathology_logits, atol=1e-5)
    assert same != position


@pytest.mark.parametrize("changes", [{}, dict(icl="dot"), dict(streams="single")],
                         ids=["default", "dot", "single"])
def test_every_parameter_learns_and_the_text_does_not(changes):
    model, (images, p_text, a_text), _ = ask(**changes)
    y = torch.full((2, 4, 5), -1)
    y[:, 0, 0], y[:, 1, 1] = 1, 0
    out = model.train()(images, p_text, a_text)
    medslip_loss(out, y, p_text, a_text)["loss"].backward()
    idle = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle
    assert not p_text.requires_grad and not a_text.requires_grad
    assert not any("text" in k and "projection" not in k for k, _ in model.named_parameters())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(p):
    """The share that is kept, also of pairs, for one draw of 64 bits decides of four neighbours;
    both within about four standard deviations."""
    torch.manual_seed(0)
    dropout, x = Dropout(p), torch.full((401, 997), 3.0, requires_grad=True)  # not a multiple of 4
    y = dropout(x)
    kept, number = y != 0, x.numel()
    assert torch.allclose(y[kept], torch.tensor(3 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / number) ** 0.5
    for shift in (1, 2, 3, 997):
        both = (kept.flatten()[shift:] & kept.flatten()[:-shift]).float().mean()
        assert abs(both - (1 - p) ** 2) < 4 * ((1 - p) ** 2 / number) ** 0.5
    y.sum().backward()
    assert torch.allclose(x.grad, kept / (1 - p))
    torch.manual_seed(0)
    assert (dropout(x) == y).all() and (dropout(x) != y).any()
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x
    assert dropout.train()(x[:0]).shape == (0, 997)


def test_dropout_saves_a_byte_an_element():
    saved, x = [], torch.ones(64, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t,
                                                  lambda t: t):
        Dropout(0.1)(x)
    assert sum(saved) == x.numel()


def test_start_from():
    model, (_, p_text, _), _ = ask(B=1)
    pathology, anatomy = torch.tensor([[1, 0, -1, -1, -1]]), torch.tensor([[1, 1, 0, 0]])
    model.start_from(9 * p_text, pathology, anatomy)
    assert (9 * p_text @ model.text_projection.weight.T).std().item() == pytest.approx(1)
    assert model.pathology.existence.bias.sigmoid().item() == pytest.approx(1 / 5)
    model.start_from(p_text, pathology, anatomy, ignore=True)
    assert model.pathology.existence.bias.sigmoid().item() == pytest.approx(1 / 2)
    assert model.anatomy.existence.bias.sigmoid().item() == pytest.approx(1 / 2)


def test_walk():
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "model.py"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(f"(Eq. {i})" in run.stdout for i in range(1, 7))
    parts = [float(line.split()[1]) for line in run.stdout.splitlines()[-4:]]
    assert sum(parts[:3]) == pytest.approx(parts[3], abs=2e-4)
