"""Proves that fine-tuning learns from the images and chooses by the split that the protocol says,
freezes what it says, moves an image and its mask together, and scores as a pencil would, with both
Dice beside the trivial answers.

    python -m pytest tests/test_finetune.py
"""
import json
from argparse import Namespace

import numpy as np
import pytest
import torch

import data
import finetune
import phantom
from cli import InputError
from metrics import dice_of, mask_scores
from test_evaluate import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NIH's and SIIM's folders with phantoms, and an untrained model as train.py saves it."""
    folder = tmp_path_factory.mktemp("finetune")
    for layout in ("nih", "siim"):
        phantom.write(layout, str(folder / layout), 120, size=64, workers=1)
    save_model(folder / "ckpt.pt")
    return folder


def run(folder, dataset, task, out_dir, *flags):
    finetune.main(finetune.parse_args([
        "--dataset", dataset, "--task", task, "--root", str(folder / dataset), "--out-dir",
        str(out_dir), "--checkpoint", str(folder / "ckpt.pt"), "--epochs", "2", "--batch-size",
        "16", "--amp", "off", "--bootstrap", "20", *flags]))
    stem = out_dir / "eval" / f"{dataset}_finetune-{task}"
    assert stem.with_suffix(".png").exists()
    return (json.loads(stem.with_suffix(".json").read_text()), np.load(f"{stem}.npz"),
            torch.load(f"{stem}.pt"))


def test_shares():
    """Ten patients with two films each: two show A, four only B, four nothing. Half of them is half
    of each kind; a fifth is one A and one B, the rarer ones of those that come first."""
    patients, kinds = np.repeat(list("abcdefghij"), 2), np.repeat(list("AABBBB----"), 2)
    present = np.stack([kinds == "A", (kinds == "B") | (patients == "a")], 1)
    fifth, half, whole = (finetune.subset(patients, present, r, 0, "honest") for r in (0.2, 0.5, 1))
    assert sorted(kinds[fifth]) == list("AABB") and set(fifth) < set(half) < set(whole)
    assert sorted(kinds[half]) == list("----AABBBB") and len(set(patients[half])) == 5
    assert set(half) != set(finetune.subset(patients, present, 0.5, 2, "honest"))
    # published: films at random, so of about half the patients one film of the two
    patients = np.repeat(np.arange(500), 2)
    films = patients[finetune.subset(patients, None, 0.5, 0, "published")]
    assert len(films) == 500 and 200 < (np.bincount(films, minlength=500) == 1).sum() < 300


def square(first, last):
    mask = np.zeros((8, 8), bool)
    mask[first:last, first:last] = True
    return mask


def test_masks_are_scored_by_pencil():
    """Half of a square found, an empty mask left empty, an empty one not left empty, a miss."""
    masks = np.stack([square(0, 4), square(0, 0), square(0, 0), square(0, 4)])
    regions = np.stack([np.roll(square(0, 4), 2, axis=1), square(0, 0), square(0, 1), square(6, 8)])
    assert dice_of(regions, masks).tolist() == [0.5, 1, 0, 0]
    scores = mask_scores(regions, masks, square(0, 4), np.arange(4), 10)
    assert (scores["n"], scores["dice"], scores["iou"]) == (2, 0.25, pytest.approx(1 / 6))
    assert (scores["n_all"], scores["dice_all"]) == (4, 0.375)
    assert scores["trivial"] == {"fixed_dice": 1, "empty_dice_all": 0.5}


def test_losses_by_pencil():
    """Labels: an unknown one is left out. Masks: p = 1/2 on 8 pixels, of which 2 are true."""
    loss = finetune.loss_of(torch.tensor([[0.0, 50.0]]), torch.tensor([[1, -1]]))
    assert loss.item() == pytest.approx(np.log(2))
    masks = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    loss = finetune.loss_of(torch.zeros(2, 2, 2), masks)
    assert loss.item() == pytest.approx(np.log(2) + 1 - (2 * 1 + 1) / (4 + 2 + 1))


def test_an_image_and_its_mask_move_together():
    """An image that is its own mask still is it afterwards, but for pixels on the edge."""
    masks = np.zeros((16, 48, 48), np.uint8)
    masks[1:, 8:30, 20:44] = 1
    table = Namespace(images=255 * masks, patients=np.full(16, "p"), splits=["train"] * 16,
                      mask=lambda row, label: masks[row])
    args = Namespace(task="segmentation", image_size=48)
    images = finetune.Images(args, table, ["train"], ["lung"])
    images.augment = True
    pairs = [images[k] for k in range(1, 16)]
    assert len({mask.numpy().tobytes() for _, mask in pairs}) > 10  # they do move
    for image, mask in pairs:
        assert ((image[0] > 0) == (mask == 1)).float().mean() > 0.99  # 0: middle grey


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_is_frozen_to_the_last_bit(task, frozen):
    net = finetune.FineTuned(task, 2, "small", frozen).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    logits = net(torch.rand(4, 3, 32, 32))
    finetune.loss_of(logits, (torch.rand_like(logits) > 0.5).float()).backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    encoder = {name for name in before if name.startswith("backbone.")}
    assert any(name.startswith("head.") for name in changed)
    assert not changed & encoder if frozen else changed >= encoder  # weights, statistics, counters


@pytest.mark.parametrize("protocol", ["honest", "published"])
def test_who_is_learned_from_and_who_chooses(folder, tmp_path, protocol):
    """published: all of NIH's train_val list, and the epoch of the lowest loss on the test."""
    result, arrays, saved = run(folder, "nih", "classification", tmp_path, "--protocol", protocol)
    assert {"auroc", "f1", "acc", "auroc_ci95", "threshold", "per_class", "n"} <= set(result)
    table = data.load("nih", str(folder / "nih"), workers=0)
    count, held = len(table.rows("train")), len(table.rows("validate"))
    assert result["n_train"] == count + (held if protocol == "published" else 0) and held > 0
    rows = [list(table.ids).index(name) for name in arrays["ids"]]
    net = finetune.FineTuned("classification", len(result["labels"]), "small", True).eval()
    net.load_state_dict(saved)
    with torch.no_grad():  # the saved network is the one that was scored
        again = net(data.to_input(torch.from_numpy(table.images[rows]), 32)).sigmoid()
    assert np.allclose(again, arrays["scores"], atol=1e-5) and set(table.splits[rows]) == {"test"}
    p = torch.from_numpy(arrays["scores"])
    test_loss = finetune.loss_of(torch.logit(p), torch.from_numpy(arrays["labels"])).item()
    chosen = min(epoch["validation"] for epoch in result["curve"])
    assert (chosen == pytest.approx(test_loss, rel=1e-4)) == (protocol == "published")


@pytest.mark.parametrize("dataset, task, flags", [
    ("siim", "segmentation", ["--ratio", "0.5", "--protocol", "published"]),
    ("nih", "classification", ["--init", "random", "--unfreeze", "--backbone", "resnet18",
                               "--image-size", "32"])])  # the supervised rival
def test_a_run_repeats(folder, tmp_path, dataset, task, flags):
    one, first, _ = run(folder, dataset, task, tmp_path / "one", *flags)
    two, second, _ = run(folder, dataset, task, tmp_path / "two", *flags)
    assert one["curve"] == two["curve"] and np.array_equal(first["scores"], second["scores"])
    if task == "segmentation":  # an empty mask left empty counts 1
        masks = first["labels"] == 1
        assert one["dice_all"] == dice_of(first["scores"] > 0.5, masks).mean()
        assert one["trivial"]["empty_dice_all"] == pytest.approx(1 - masks.any((1, 2)).mean())


@pytest.mark.parametrize("task, flags", [
    ("classification", ["--label", "gout"]), ("segmentation", ["--label", "gout"]),
    ("classification", ["--backbone", "resnet50"]), ("segmentation", ["--image-size", "100"])])
def test_wrong_input_is_an_input_error(folder, tmp_path, task, flags):
    with pytest.raises(InputError):
        run(folder, "nih", task, tmp_path, *flags)
