"""Proves that a checkpoint comes back to the last bit, and that a damaged, foreign or hostile one
is refused in one line that names the trouble.

    python -m pytest tests/test_checkpoint.py
"""
import os
from dataclasses import asdict

import pytest
import torch

from model import CheckpointError, MeDSLIP, MeDSLIPConfig
from test_model import SMALL, ask, published

QUERIES = {"encoder": "hashing"} | {
    kind: {"names": names, "prompts": names, "text": torch.ones(len(names), 24)}
    for kind, names in (("pathology", list("abcde")), ("anatomy", list("wxyz")))}


@pytest.fixture
def saved(tmp_path):
    """(path, what train.py would write, batch, output of the model that was saved)."""
    model, batch, out = ask()
    checkpoint = {"model": model.state_dict(), "config": asdict(model.config), "epoch": 1,
                  "args": {"beta": 0.5}, "queries": QUERIES, "rng": torch.get_rng_state()}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", checkpoint, batch, out


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        MeDSLIP.from_pretrained(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_round_trip(saved, wrapper):
    path, checkpoint, batch, out = saved
    weights = {wrapper + k: v for k, v in checkpoint["model"].items()}
    torch.save(checkpoint | {"model": weights}, path)
    model = MeDSLIP.from_pretrained(str(path))
    assert not model.training and model.config == MeDSLIPConfig(**SMALL)
    assert model.args == {"beta": 0.5} and model.queries["pathology"]["names"] == list("abcde")
    with torch.inference_mode():
        again = model(*batch, need_attention=True)
    for name, value in vars(out).items():
        assert torch.equal(getattr(again, name), value), name


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("anatomy.layers.1.ffn.3.bias"), ["missing anatomy.layers.1.ffn.3.bias"]),
    (lambda w: w.update({"anatomy.extra": torch.ones(3)}), ["unknown anatomy.extra"]),
    (lambda w: w.update({"mask.bias": torch.ones(9)}), ["mask.bias has shape [9] instead of [96]"]),
    (lambda w: w.update({"mask.weight": 0.5}), ["mask.weight"]),
    (lambda w: [w.pop(k) for k in list(w) if k.startswith("anatomy.")], ["missing", "more"])])
def test_tensors_that_do_not_fit(saved, change, words):
    path, checkpoint, *_ = saved
    weights = dict(checkpoint["model"])
    change(weights)
    torch.save(checkpoint | {"model": weights}, path)
    message = refusal(path)
    assert all(word in message for word in words) and len(message) < 3000


def test_released_tensors_that_do_not_fit(tmp_path):
    """Messages use the names that the file uses."""
    _, weights = published(0, "_anatomy", "_pathology")
    path = tmp_path / "released.pth"
    gone = "decoder_anatomy.layers.2.multihead_attn.in_proj_bias"
    weights["module.extra.bias"] = weights.pop(gone)
    weights["classifier_pathology.weight"] = torch.ones(3, 256)
    torch.save({"model": weights}, path)
    message = refusal(path)
    assert "unknown extra.bias" in message
    assert f"missing {gone}" in message
    assert "classifier_pathology.weight has shape [3, 256]" in message
    assert message.count(";") == 2


def test_harmless_differences(saved):
    path, checkpoint, batch, out = saved
    weights = {k: v for k, v in checkpoint["model"].items() if "num_batches" not in k}
    weights["text_encoder.embeddings.position_ids"] = torch.arange(4)
    torch.save(checkpoint | {"model": weights}, path)
    with torch.inference_mode():
        again = MeDSLIP.from_pretrained(path)(*batch, need_attention=True)
    assert torch.equal(again.relation_logits, out.relation_logits)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_truncated(saved, share):
    path, *_ = saved
    data = path.read_bytes()
    path.write_bytes(data[:int(share * len(data))])
    assert "truncated" in refusal(path)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("content, word", [
    (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 85000000\n", "Git-LFS"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "another kind"),
    (Hostile(), "wants to run"),
    ({"model": {"mask.weight": torch.ones(2)}, "args": Hostile()}, "wants to run"),
    ([torch.ones(2)], "holds a list"),
    (torch.ones(2), "holds a Tensor"),
    ({}, "no weights"),
    ({"model": {}}, "no weights"),
    ({"model": 3}, "no weights"),
    ({"model": {"fc.weight": torch.ones(2)}}, "neither this project's"),
    ({"model": {0: torch.ones(2)}, "config": {"surprise": 1}}, "neither this project's"),
    ({"fc.weight": torch.ones(2)}, "neither this project's"),
], ids=str)
def test_foreign_files(tmp_path, monkeypatch, content, word):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert word in refusal(path)
    assert not os.path.exists("owned")


def test_no_such_file(tmp_path, monkeypatch):
    assert "train.py" in refusal(tmp_path / "ckpt.pt")
    assert "train.py" in refusal(tmp_path)  # a folder
    assert "no checkpoint" in refusal("out/none.pth")


def test_hub_without_a_network(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("pykale/MeDSLIP")
    assert "offline" in message and "give its path" in message
