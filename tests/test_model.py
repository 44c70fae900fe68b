"""With the released settings the network gives the released numbers, and in every setting it has
the properties that the paper and its users count on.

    python -m pytest tests/test_model.py

golden.npz holds what the published code returned for the weights and inputs that `weight` and
`inputs` make by formula for seed 0. Another seed is compared with PyTorch's own layers.
"""
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torchvision.models import resnet50

from checkpoint import load_model
from losses import medslip_loss
from model import MeDSLIP, MeDSLIPConfig

SMALL = dict(backbone="small", image_size=32, dim=16, layers=2, heads=2, text_dim=24)


def random_state(seed, name):
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)


def weight(seed, name, shape):
    random = random_state(seed, name)
    if name.endswith("running_var"):
        values = random.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
        values = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    else:  # the scale of a norm lies around 1; biases and running means around 0
        values = 0.1 * random.standard_normal(shape) + name.endswith("weight")
    return torch.from_numpy(np.asarray(values, np.float32))


def inputs(seed, size=224, B=2, m=75, n=51):
    """Images, both texts, y [B,n,m], negatives: anatomies [B,m,7] and pathologies [B,n,7]."""
    images = random_state(seed, "images").standard_normal((B, 3, size, size))
    p_text = 0.3 * random_state(seed, "pathology_text").standard_normal((m, 768))
    a_text = 0.3 * random_state(seed, "anatomy_text").standard_normal((n, 768))
    u = random_state(seed, "existence").uniform(size=(B, n, m))
    y = np.where(u < 0.01, 1, np.where(u < 0.02, 0, -1))
    negatives = []
    for name, rows in (("negative_anatomies", y.transpose(0, 2, 1)), ("negative_pathologies", y)):
        random = random_state(seed, name)
        draws = [random.permutation(np.flatnonzero(row != 1))[:7] for row in np.concatenate(rows)]
        negatives.append(torch.tensor(np.array(draws)).view(B, -1, 7))
    images, p_text, a_text = (torch.from_numpy(a).float() for a in (images, p_text, a_text))
    return images, p_text, a_text, torch.from_numpy(y), *negatives


def released(seed):
    """-> (the released layers under the released names, their state dict)"""
    layers = nn.ModuleDict({"res_features": nn.Sequential(*list(resnet50().children())[:7]),
                            "pathology_embedding_layer": nn.Linear(768, 256),
                            "mask_generator": nn.Linear(1024, 1024)})
    decoder_layer = nn.TransformerDecoderLayer(256, 4, 1024, batch_first=True, norm_first=True)
    norm = nn.LayerNorm(256)  # both decoders share it; a file has two copies, and the last counts
    for s in ("anatomy", "pathology"):
        layers.update({f"res_l1_{s}": nn.Linear(1024, 1024), f"res_l2_{s}": nn.Linear(1024, 256),
                       f"decoder_{s}": nn.TransformerDecoder(decoder_layer, 4, norm),
                       f"classifier_{s}": nn.Linear(256, 2), f"cl_fc_{s}": nn.Linear(256, 768)})
    weights = {name: weight(seed, name, v.shape) for name, v in layers.state_dict().items()}
    layers.load_state_dict(weights)
    return layers.eval(), weights


def load(weights, path):
    torch.save({"model": weights, "optimizer": {}, "config": {"d_model": 256}}, path)
    return load_model(path)


def assert_close(ours, theirs):
    theirs = torch.as_tensor(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


# --------------------------------------------------------------------------------- released numbers

def test_published_weights_give_published_numbers(tmp_path):
    images, p_text, a_text, y, p_negatives, a_negatives = inputs(0)
    model = load(released(0)[1], tmp_path / "published.pth")
    out = model(images, p_text, a_text, need_attention=True)
    parts = medslip_loss(out, y, p_text, a_text, unmentioned="ignore",
                         pathology_negatives=p_negatives, anatomy_negatives=a_negatives)
    golden = np.load(Path(__file__).with_name("golden.npz"))
    for s in ("pathology", "anatomy"):
        assert_close(getattr(out, f"{s}_tokens")[:, ::14], golden[f"{s}_embedding"])
        assert_close(getattr(out, f"{s}_queried")[:, ::5], golden[f"{s}_queried"])
        assert_close(getattr(out, f"{s}_logits").sigmoid(), golden[f"{s}_prob"])
        assert_close(getattr(out, f"{s}_attention").flatten(2)[:, ::5], golden[f"{s}_attention"])
    assert_close(out.relation_logits[:, ::5, ::5], golden["icl_logit"])
    assert_close(parts["existence"], golden["existence_pathology"] + golden["existence_anatomy"])
    assert_close(parts["protocl"], golden["protocl_pathology"] + golden["protocl_anatomy"])
    assert_close(parts["icl"], golden["icl"])
    assert_close(parts["loss"], golden["loss"])


def test_other_weights_against_pytorch_layers(tmp_path):
    """The file has another spelling of the names; MedKLIP is one stream of it without a mask."""
    layers, weights = released(7)
    weights = {"module." + name.replace("pathology_embedding", "disease_embedding"): value
               for name, value in weights.items()}
    medklip = {name.replace("_pathology", ""): value for name, value in weights.items()
               if "anatomy" not in name and "mask_generator" not in name}
    images, p_text, a_text, *_ = inputs(7, size=96)
    x = layers["res_features"](images).flatten(2).transpose(1, 2)               # [B,h*w,1024]
    mask = layers["mask_generator"](x)
    dual = load(weights, tmp_path / "medslip.pth")(images, p_text, a_text)
    single = load(medklip, tmp_path / "medklip.pth")(images, p_text, a_text)
    for out, s, share, text in ((dual, "pathology", mask * x, p_text),
                                (dual, "anatomy", (1 - mask) * x, a_text),
                                (single, "pathology", x, p_text)):
        tokens = layers[f"res_l2_{s}"](layers[f"res_l1_{s}"](share).relu())
        queries = layers["pathology_embedding_layer"](text).expand(2, -1, -1)
        queried = layers[f"decoder_{s}"](queries, tokens)
        probability = layers[f"classifier_{s}"](queried).softmax(-1)[..., 1]
        z = layers[f"cl_fc_{s}"](queried)
        assert_close(getattr(out, f"{s}_queried"), queried)
        assert_close(getattr(out, f"{s}_logits").sigmoid(), probability)
        assert_close(getattr(out, f"{s}_z"), z)
    assert_close(single.relation_logits, (z @ a_text.T).transpose(1, 2))


# --------------------------------------------------------------------------------------- properties

def ask(**settings):
    """-> (small model in eval mode; 3 images, 5 pathologies, 4 anatomies; what it says of them)"""
    torch.manual_seed(0)
    model = MeDSLIP(MeDSLIPConfig(**SMALL | settings)).eval()
    batch = torch.randn(3, 3, 32, 32), torch.randn(5, 24), torch.randn(4, 24)
    return model, batch, model(*batch, need_attention=True)


@pytest.mark.parametrize("settings", [
    {}, {"icl": "bare", "mask": "hard"}, {"icl": "dot", "mask": "linear"}, {"mask": "none"},
    {"existence": "evidence"}, {"streams": "single", "position": True}], ids=str)
def test_maps_sum_to_1_and_every_parameter_learns(settings):
    model, batch, out = ask(**settings)
    for weights in (out.pathology_attention, out.anatomy_attention, out.pathology_evidence):
        if weights is not None:                                                 # [B,q,h,w]
            assert_close(weights.sum((-2, -1)), torch.ones(weights.shape[:2]))
    plain = model.train()(*batch)
    assert plain.pathology_attention is None and plain.pathology_evidence is None
    medslip_loss(plain, torch.eye(4, 5).expand(3, 4, 5), *batch[1:])["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_evidence():
    """The map is the gradient of the answer, which does not depend on what else is asked."""
    model, (images, p_text, a_text), _ = ask(existence="evidence")
    kept = []
    model.pathology.layers[0].register_forward_hook(lambda layer, x, result: kept.append(result[1]))
    out = model(images, p_text, a_text, need_attention=True)
    gradient, = torch.autograd.grad(out.pathology_logits.sum(), kept)           # [B,1,m,h*w]
    assert_close(out.pathology_evidence.flatten(2), gradient.squeeze(1))
    assert_close(out.pathology_logits.exp(), kept[0].squeeze(1).exp().mean(-1))  # mean of the odds
    assert_close(model(images, p_text[:2], a_text).pathology_logits, out.pathology_logits[:, :2])


@pytest.mark.parametrize("mask", ["sigmoid", "linear", "hard", "none"])
def test_mask(mask):
    """The streams share I^raw among them (Eq. 1), or get all of it, and make their tokens of it."""
    model, _, out = ask(mask=mask)
    whole = out.raw_features * (2 if mask == "none" else 1)
    assert_close(out.pathology_features + out.anatomy_features, whole)
    assert_close(model.pathology.embed(out.pathology_features), out.pathology_tokens)
    assert_close(model.anatomy.embed(out.anatomy_features), out.anatomy_tokens)
    if mask == "hard":  # each feature goes to one stream
        x = torch.rand(2, 64, 96) + 1
        assert set((model.disentangle(x)[0] / x).unique().tolist()) == {0, 1}


def test_what_protocl_reads():
    """Z_2 in training is the projection of I_q, or of I_q with a part of it set to zero."""
    for proto_from in ("queried", "dropped"):
        config = MeDSLIPConfig(**SMALL, dropout=0.5, proto_from=proto_from)
        stream = MeDSLIP(config).pathology.train()
        _, queried, _, z, _ = stream(torch.rand(2, 64, 96), torch.rand(3, 16))
        assert torch.allclose(z, stream.to_z2(queried), atol=1e-5) == (proto_from == "queried")


def test_relation():
    model, _, out = ask()
    bare = ask(icl="bare")[2].relation_logits
    assert bare.abs().max() <= 1 + 1e-6
    assert_close(out.relation_logits, 10 * bare - 4)  # scale and bias at the start
    swapped = model.relate(out.pathology_queried[1:], out.anatomy_queried[:-1])
    assert_close(model.swap(out)[1:], swapped)  # film b's pathologies, film b - 1's anatomies


@pytest.mark.parametrize("existence, bias", [("embedding", "existence.bias"),
                                             ("evidence", "existence_bias")])
def test_fit_to_data(existence, bias):
    model, (_, p_text, a_text), _ = ask(existence=existence)
    text = 15 + torch.cat([p_text, a_text])  # a large common part, like BERT's
    model.fit_to_data(text, 0.2, 0.3)
    queries = model.text_projection(text)                                       # [k,D]
    assert queries.mean(0).abs().max() < 1e-4
    assert queries.std().item() == pytest.approx(1, abs=1e-4)
    rates = [model.get_parameter(f"{s}.{bias}").sigmoid() for s in ("pathology", "anatomy")]
    assert_close(torch.cat(rates), [0.2, 0.3])


def test_position_alone_tells_the_order_of_tokens():
    for position in (False, True):
        model, batch, out = ask(position=position)
        model.backbone.register_forward_hook(lambda module, x, features: features.flip(-1))
        same = torch.allclose(model(*batch).pathology_logits, out.pathology_logits, atol=1e-5)
        assert same != position


@pytest.mark.parametrize("backbone", ["small", "resnet18", "resnet50"])
def test_cells_look_where_cell_centres_says(backbone):
    """The centre of mass of the pixels that a cell sees is its centre. For this every convolution
    becomes a mean, and so does the maximum: all paths through the network then count alike."""
    model = ask(backbone=backbone)[0]
    for name, layer in model.backbone.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
        if isinstance(layer, nn.MaxPool2d):
            model.backbone[int(name)] = nn.AvgPool2d(3, stride=2, padding=1)
    image = torch.ones(1, 3, 384, 384, requires_grad=True)
    offset, stride = model.cell_centres()
    i = 384 // stride // 2
    seen, = torch.autograd.grad(model.backbone(image)[0, :, i, i].sum(), image)
    centre = np.average(np.arange(384), weights=seen.sum((0, 1, 2)))  # along the columns
    assert centre == pytest.approx(offset + stride * i, abs=0.05)
