"""A checkpoint comes back to the last bit, and a damaged, foreign or hostile file is refused in one
line that names the file. (The published files are loaded in test_model.py.)
"""
from dataclasses import asdict

import pytest
import torch

from checkpoint import load_model
from cli import InputError
from test_model import ask

TWO = torch.ones(2)


@pytest.fixture
def saved(tmp_path):
    """-> (path, what train.py would write there, a batch, the model's output)"""
    model, batch, out = ask()
    checkpoint = {"model": model.state_dict(), "config": asdict(model.config),
                  "args": {"beta": 0.5}, "queries": {"pathology": {"names": ["edema"]}}}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", checkpoint, batch, out


def refusal(path):
    with pytest.raises(InputError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_round_trip(saved):
    path, checkpoint, batch, out = saved
    weights = {name: value for name, value in checkpoint["model"].items()
               if "num_batches" not in name}  # this counter is not used, and may be absent
    del checkpoint["config"]["existence"]  # older than this field: it is the paper's form
    torch.save(checkpoint | {"model": weights}, path)
    model = load_model(path)
    assert model.config.existence == "embedding" and not model.training
    assert model.args == {"beta": 0.5} and model.queries["pathology"]["names"] == ["edema"]
    again = model(*batch, need_attention=True)
    for name, value in vars(out).items():
        assert value is None or torch.equal(getattr(again, name), value)


@pytest.mark.parametrize("name, value", [("anatomy.norm.bias", None), ("anatomy.extra", TWO),
                                         ("mask.bias", TWO), ("mask.weight", 0.5)])
def test_a_tensor_that_does_not_fit_is_named(saved, name, value):
    path, checkpoint, *_ = saved
    weights = checkpoint["model"] | {name: value}
    if value is None:
        del weights[name]
    torch.save(checkpoint | {"model": weights}, path)
    assert name in refusal(path)


def test_damaged_files(saved):
    path, *_ = saved
    whole = path.read_bytes()
    for content in (b"", whole[:9000], whole[:-100], b"\n<!DOCTYPE html>",
                    b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        refusal(path)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('the file was executed')",)


@pytest.mark.parametrize("content", [
    Hostile(), {"model": {"w": TWO}, "args": Hostile()}, [TWO], {}, {"model": 3}, {"w": TWO},
    {"model": {"w": TWO}, "config": {"backbone": "vgg"}},
    {"model": {"res_features.0.weight": TWO, "classifier.weight": 1.0}}], ids=str)
def test_foreign_and_hostile_files(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    refusal(tmp_path / "model.pth")


def test_no_such_file(tmp_path):
    for path in (tmp_path / "ckpt.pt", tmp_path, "out/none.pth"):
        refusal(path)
    refusal("owner/name")  # at once, because conftest.py switches the hub off
