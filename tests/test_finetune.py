"""Proves that fine-tuning takes the images it says, freezes what it says, moves image and mask
together, scores as a pencil would, and says in one line what it was given wrong.

    python -m pytest tests/test_finetune.py
"""
import json
import subprocess
import sys
import urllib.error
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import finetune
import phantom
from model import CheckpointError, MeDSLIP, MeDSLIPConfig, build_backbone
from text import InputError

REPO = Path(__file__).resolve().parent.parent
TINY = ["--prepared-size", "32", "--image-size", "32", "--epochs", "2", "--min-steps", "0",
        "--batch-size", "16", "--bootstrap", "20", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """120 phantoms of 64 pixels, prepared at 32."""
    root = tmp_path_factory.mktemp("phantoms") / "mimic"
    phantom.write("mimic", str(root), 120, seed=0, workers=1)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model as train.py would save it, batch-norm statistics off their start."""
    torch.manual_seed(3)
    model = MeDSLIP(MeDSLIPConfig(backbone="small", image_size=32, dim=16, layers=1, heads=2,
                                  text_dim=8))
    model.backbone.train()(torch.rand(4, 3, 32, 32))
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pt"
    torch.save({"model": model.state_dict(), "config": asdict(model.config)}, path)
    return path


def run(root, checkpoint, out_dir, *flags):
    return finetune.main(finetune.parse_args([
        "--root", str(root), "--checkpoint", str(checkpoint), "--out-dir", str(out_dir), *TINY,
        *flags]))


# --------------------------------------------------------------------------------------- the subset

def cohort(seed=0, patients=300, classes=4):
    """Patients with 1-4 images each, classes from common to rare."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
    rate = np.array([0.5, 0.2, 0.05, 0.01])[:classes]
    return patient.astype(str), rng.random((len(patient), classes)) < rate


@pytest.mark.parametrize("seed", range(3))
def test_subsets_are_nested_by_patient_and_stratified(seed):
    patients, present = cohort(seed)
    one, ten, whole = (finetune.nested_subset(patients, present, r, seed) for r in (0.01, 0.1, 1.0))
    assert set(one) < set(ten) < set(whole) and len(whole) == len(patients)
    for some, count in ((one, 3), (ten, 30)):
        rest = np.setdiff1d(np.arange(len(patients)), some)
        assert len(set(patients[some])) == count and not set(patients[some]) & set(patients[rest])
    # 10 % of 300 patients: each class within rounding of its share, the rarest not lost
    for k in range(4):
        carriers, held = (len({*patients[some][present[some, k]]}) for some in (whole, ten))
        assert held >= 1 and abs(held - carriers / 10) <= 1 + 0.3 * carriers / 10
    assert not np.array_equal(ten, finetune.nested_subset(patients, present, 0.1, seed + 1))
    assert np.array_equal(ten, finetune.nested_subset(patients, present, 0.1, seed))


def test_a_subset_is_never_empty():
    patients, present = cohort(patients=5)
    assert len(finetune.nested_subset(patients, present, 0.001, 0)) >= 1


# --------------------------------------------------------------------------- images and their masks

def test_image_and_mask_move_together_and_masks_stay_binary():
    """An image that is its own mask: after the map both still are, but for pixels on an edge."""
    mask = torch.zeros(16, 48, 48, dtype=torch.int8)
    mask[:, 8:30, 20:44] = 1                                                    # off centre
    images, moved = finetune.augment_pair(mask[:, None].float().expand(-1, 3, -1, -1), mask,
                                          torch.Generator().manual_seed(0))
    assert moved.shape == mask.shape and set(moved.unique().tolist()) == {0.0, 1.0}
    low, high = images.amin((1, 2, 3)), images.amax((1, 2, 3))
    again = images[:, 0] > ((low + high) / 2)[:, None, None]
    assert (again == moved.bool()).float().mean() > 0.995
    assert (moved != mask).any(1).any(1).all()                                  # all have moved
    centre = (moved * torch.arange(48.0)).sum((1, 2)) / moved.sum((1, 2))       # of columns
    assert (centre < 20).any() and (centre > 27).any()                          # some are mirrored


def test_augmentation_without_masks_is_the_same_map():
    x, masks = torch.rand(4, 3, 32, 32), torch.zeros(4, 32, 32)
    alone, none = finetune.augment_pair(x, None, torch.Generator().manual_seed(1))
    both, _ = finetune.augment_pair(x, masks, torch.Generator().manual_seed(1))
    assert none is None and torch.equal(alone, both)


class Drawn:
    """A table of 4 pictures of 8 x 8 with masks of their own sizes."""
    dataset = "drawn"

    def __init__(self, masks, shape=(8, 8)):
        self.masks, self.shape = masks, np.array([shape] * len(masks))
        self.ids = self.patients = [f"image-{k}" for k in range(len(masks))]

    def rows(self, split="all"):
        return np.arange(len(self.masks))

    def mask(self, i, label):
        return self.masks[i]


def square(size, a, b):
    mask = np.zeros((size, size), bool)
    mask[a:b, a:b] = True
    return mask


def test_masks_of_another_size_are_scaled_and_of_another_shape_refused(capsys):
    table = Drawn([square(8, 2, 6), square(32, 8, 24), None, np.zeros((8, 8), bool)])
    masks = finetune.read_masks(table, "lung", 4)
    assert list(masks) == [0, 1, 3] and not masks[3].any()
    assert np.array_equal(masks[0], square(4, 1, 3)) and np.array_equal(masks[1], square(4, 1, 3))
    assert "1 masks have more or fewer pixels than their image" in capsys.readouterr().out
    with pytest.raises(InputError, match="the mask of image-1 has 12 x 8 pixels, the image 8 x 8"):
        finetune.read_masks(Drawn([square(8, 2, 6), np.ones((8, 12), bool)]), "lung", 4)
    with pytest.raises(InputError, match="drawn has no masks of lung; .*covid-chestxray"):
        finetune.read_masks(Drawn([None, np.zeros((8, 8), bool)]), "lung", 4)


# ----------------------------------------------------------------------------------------- networks

@pytest.mark.parametrize("backbone, channels", [
    ("small", [1, 32, build_backbone("small")[1]]), ("resnet18", [1, 64, 64, 128, 256]),
    ("resnet50", [1, 64, 256, 512, 1024])])
def test_skip_connections_tap_every_resolution(backbone, channels):
    net = finetune.FineTuned("segmentation", ["lung"], backbone, 64, True).eval()
    with torch.no_grad():
        stages, image = net.features(torch.rand(2, 3, 48, 64)), torch.rand(2, 3, 48, 64)
        assert [f.shape[1] for f in stages] == channels
        assert [64 // f.shape[3] for f in stages] == [2 ** k for k in range(len(stages))]
        assert torch.equal(net.features(image)[-1], net.backbone(image))  # ReLUs in place
        assert net(image).shape == (2, 48, 64)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_is_frozen_to_the_last_bit(task, frozen):
    torch.manual_seed(0)
    net = finetune.FineTuned(task, ["a", "b"], "small", 32, frozen).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        logits = net(torch.rand(4, 3, 32, 32))
        finetune.loss_of(logits, (torch.rand_like(logits) > 0.5).to(torch.int8)).backward()
        optimizer.step()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    trunk = {k for k in before if k.startswith("backbone.")}
    assert changed & {"head.last.weight", "head.last.bias"}
    assert not changed & trunk if frozen else changed >= trunk  # weights, statistics and counters


def test_losses_by_pencil():
    """Dice over the batch: p = 1/2 on 8 pixels, 2 of them true: 1 - (2 * 1 + 1) / (4 + 2 + 1)."""
    masks = torch.zeros(2, 2, 2, dtype=torch.int8)
    masks[0, 0] = 1
    loss = finetune.loss_of(torch.zeros(2, 2, 2), masks)
    assert loss.item() == pytest.approx(np.log(2) + 1 - 3 / 7)
    labels = torch.tensor([[1, -1], [0, 1]], dtype=torch.int8)                  # -1: not known
    logits = torch.tensor([[0.0, 50.0], [0.0, np.log(3.0)]])
    by_hand = (2 * np.log(2) + np.log(4 / 3)) / 3
    assert finetune.loss_of(logits, labels).item() == pytest.approx(by_hand)


def test_masks_are_scored_by_pencil(monkeypatch):
    """A hit of half the pixels, an empty mask left empty, an empty one not left empty, a miss."""
    masks = [square(8, 0, 4), np.zeros((8, 8), bool), np.zeros((8, 8), bool), square(8, 0, 4)]
    p = torch.zeros(4, 8, 8)
    p[0, 0:4, 2:6] = p[2, 0, 0] = p[3, 6:8] = 0.9                               # 8 of 16 hit
    table, args = Drawn(masks), Namespace(bootstrap=10, seed=0)
    part = dict(rows=np.arange(4), targets=torch.from_numpy(np.stack(masks)).to(torch.int8))
    monkeypatch.setattr(finetune, "predict", lambda *_: p)
    metrics, arrays, _ = finetune.score_masks(None, table, "lung", part, part, args)
    assert arrays["dice"].tolist() == [0.5, 1, 0, 0] and arrays["iou"].tolist() == [1 / 3, 1, 0, 0]
    assert (metrics["dice"], metrics["n"]) == (0.25, 2) and metrics["dice_all"] == 0.375
    assert metrics["false_alarms"] == 0.5 and metrics["trivial"]["fixed_dice"] == 1.0


def test_the_mask_is_compared_at_its_own_resolution():
    """A 4 x 4 answer against an 8 x 12 mask: the edge of a half stays in the middle."""
    p = torch.zeros(4, 4)
    p[:, :2] = 1
    grown = finetune.scale_to(p, (8, 12))
    assert grown.shape == (8, 12) and grown[:, :6].all() and not grown[:, 6:].any()


# -------------------------------------------------------------------------------------- the command

def test_classification_from_command_to_checkpoint(root, checkpoint, tmp_path):
    """All that the interface promises of one run; the second seed only adds to it."""
    result = run(root, checkpoint, tmp_path, "--task", "classification", "--ratio", "0.5",
                 "--seeds", "2")
    saved = json.loads((tmp_path / "eval/synthetic_classification.json").read_text())
    assert {"auroc", "f1", "acc", "auroc_ci95", "threshold", "per_class", "n"} <= set(saved)
    assert len(saved["runs"]) == 2 and saved["auroc_std"] > 0
    assert saved["auroc_mean"] == pytest.approx(np.mean([one["auroc"] for one in saved["runs"]]))
    assert saved["auroc"] == saved["runs"][0]["auroc"] == result["auroc"]
    table = data.load("synthetic", str(root), size=32, workers=0)
    split = dict(zip(table.ids, table.splits))
    assert {split[i] for i in saved["train_ids"]} == {"train"}
    assert saved["runs"][0]["train_ids"] != saved["runs"][1]["train_ids"]
    for name in ("synthetic_classification.png", "synthetic_classification_curve.png"):
        assert (tmp_path / "eval" / name).stat().st_size > 5000

    net = finetune.load_finetuned(tmp_path / "finetune-synthetic-classification.pt")
    arrays = np.load(tmp_path / "eval/synthetic_classification.npz")
    rows = [table.ids.index(i) for i in arrays["ids"]]
    with torch.no_grad():
        again = net(data.to_input(torch.from_numpy(table.images[rows]), 32)).sigmoid()
    columns = [net.config["labels"].index(name) for name in arrays["names"]]
    assert np.allclose(again.numpy()[:, columns], arrays["scores"], atol=1e-5)
    trunk = MeDSLIP.from_pretrained(checkpoint).backbone.state_dict()
    assert all(torch.equal(net.backbone.state_dict()[k], v) for k, v in trunk.items())
    with pytest.raises(CheckpointError, match="neither this project's checkpoint"):
        MeDSLIP.from_pretrained(tmp_path / "finetune-synthetic-classification.pt")


def test_segmentation_from_command_to_checkpoint(root, checkpoint, tmp_path):
    result = run(root, checkpoint, tmp_path, "--task", "segmentation", "--label", "effusion",
                 "--epochs", "5")
    assert {"dice", "iou", "n", "dice_ci95", "dice_all", "iou_all", "trivial"} <= set(result)
    assert result["curve"][-1]["loss"] < result["curve"][0]["loss"]
    net = finetune.load_finetuned(str(tmp_path / "finetune-synthetic-segmentation.pt"))
    assert net.config["labels"] == ["effusion"] and not net.training
    arrays = np.load(tmp_path / "eval/synthetic_segmentation.npz")
    table = data.load("synthetic", str(root), size=32, workers=0)
    rows = [table.ids.index(i) for i in arrays["ids"]]
    with torch.no_grad():
        again = net(data.to_input(torch.from_numpy(table.images[rows]), 32)).sigmoid()
    assert np.abs(again.numpy() * 255 - arrays["probability"]).max() < 1.5
    assert (tmp_path / "eval/synthetic_segmentation.png").stat().st_size > 5000


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_same_seed_same_numbers_and_other_paths_run(root, checkpoint, tmp_path, task):
    flags = "--task", task, "--ratio", "0.4", "--epochs", "1"
    flags += ("--label", "effusion") if task == "segmentation" else ()
    a, b = (run(root, checkpoint, tmp_path / name, *flags) for name in "ab")
    key = "auroc" if task == "classification" else "dice"
    assert a[key] == b[key] and a["curve"] == b["curve"] and a["train_ids"] == b["train_ids"]
    augmented = run(root, checkpoint, tmp_path / "c", *flags, "--no-cache-features")
    assert augmented["train_ids"] == a["train_ids"] and augmented["curve"] != a["curve"]
    run(root, "nowhere.pt", tmp_path / "d", *flags, "--init", "random", "--unfreeze")
    trunk = finetune.load_finetuned(tmp_path / "d" / f"finetune-synthetic-{task}.pt").backbone
    assert trunk[1].num_batches_tracked > 0


def test_kept_features_say_what_the_images_say(root, checkpoint):
    """To the bit for pooled features, to half precision for maps."""
    table = data.load("synthetic", str(root), size=32, workers=0)
    rows, index = table.rows("train")[:20], np.array([3, 17])
    for task, tolerance in (("classification", 1e-6), ("segmentation", 2e-2)):
        args, model = finetune.resolve(finetune.parse_args(
            ["--task", task, "--checkpoint", str(checkpoint)]))
        net = finetune.build(args, ["a"], model).eval()
        part = dict(rows=rows, targets=torch.zeros(20, 1), features=None)
        kept = dict(part, features=finetune.encode(net, table, rows, args))
        with torch.no_grad():
            a, b = (finetune.logits_of(net, table, p, index, args)[0] for p in (part, kept))
        assert torch.allclose(a, b, atol=tolerance * max(1, a.abs().max().item()))


# ----------------------------------------------------------------------------- what users get wrong

def test_a_class_without_positives_is_named_and_left_out(root, checkpoint, tmp_path, capsys,
                                                         monkeypatch):
    table = data.load("synthetic", str(root), size=32, workers=0)
    rare = table.label_names[np.argmin((table.labels[table.rows("train")] == 1).sum(0))]
    k, original, blank = table.label_names.index(rare), data.load, ["train"]

    def without(*args, **kwargs):
        table = original(*args, **kwargs)
        table.labels = table.labels.copy()
        table.labels[table.rows(blank[0]), k] = 0
        return table
    monkeypatch.setattr(data, "load", without)
    result = run(root, checkpoint, tmp_path, "--task", "classification")
    said = capsys.readouterr().out
    assert f"{rare}: the " in said and "do not both show and lack it" in said
    assert result["not_learned"] == [rare] and rare not in result["per_class"]
    for blank[0] in ("train", "test"):
        with pytest.raises(InputError, match=f"the {blank[0]} split .* both show and lack {rare}"):
            run(root, checkpoint, tmp_path, "--task", "classification", "--label", rare)


@pytest.mark.parametrize("flags, words", [
    (["--task", "classification", "--ratio", "0.01"], "leaves . images for 1. classes"),
    (["--task", "classification", "--ratio", "2"], "--ratio 2 is not in 0..1"),
    (["--task", "classification", "--label", "gout"], "no label gout; its labels: .*effusion"),
    (["--task", "segmentation", "--label", "gout"], "no masks of gout; .*covid-chestxray .lung"),
    (["--task", "segmentation", "--seeds", "0"], "--seeds, --bootstrap, --image-size: at least 1"),
    (["--task", "segmentation", "--image-size", "100"], "100 is not a multiple of 16"),
    (["--task", "segmentation", "--unfreeze", "--cache-features"], "needs a frozen encoder"),
    (["--task", "classification", "--init", "imagenet"], "resnet18 or resnet50, not of small"),
    (["--task", "classification", "--backbone", "resnet50"], "a small; leave --backbone out")])
def test_wrong_input_is_one_line(root, checkpoint, tmp_path, flags, words):
    with pytest.raises(InputError, match=words) as caught:
        run(root, checkpoint, tmp_path, *flags)
    assert "\n" not in str(caught.value)


def test_imagenet_offline_is_one_line(monkeypatch):
    import torchvision
    resnet18 = torchvision.models.resnet18

    def offline(weights):
        if weights:
            raise urllib.error.URLError("no route to host")
        return resnet18(weights=None)
    monkeypatch.setattr(torchvision.models, "resnet18", offline)
    args = Namespace(seed=0, task="classification", backbone="resnet18", image_size=32,
                     unfreeze=False, init="imagenet", device="cpu")
    with pytest.raises(InputError, match="cannot be downloaded .*no route to host.*checkpoints"):
        finetune.build(args, ["a"], None)


def test_imagenet_weights_land_in_the_backbone(monkeypatch):
    import torchvision
    torch.manual_seed(5)
    plain = torchvision.models.resnet18
    given = plain(weights=None)
    monkeypatch.setattr(torchvision.models, "resnet18",
                        lambda weights: given if weights else plain(weights=None))
    args = Namespace(seed=0, task="classification", backbone="resnet18", image_size=32,
                     unfreeze=False, init="imagenet", device="cpu")
    net = finetune.build(args, ["a"], None)
    assert torch.equal(net.backbone[0].weight, given.conv1.weight)
    assert torch.equal(net.backbone[6][1].conv2.weight, given.layer3[1].conv2.weight)


@pytest.mark.parametrize("content, words", [
    (None, "cannot be opened"), (b"junk", "cannot be read"), ({"model": {}}, "was not written by"),
    ({"model": {}, "config": {"dim": 1}}, "was not written by this finetune.py")])
def test_a_foreign_checkpoint_is_refused(tmp_path, content, words):
    path = tmp_path / "ckpt.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=words) as caught:
        finetune.load_finetuned(path)
    assert "\n" not in str(caught.value)


def test_missing_checkpoint_exits_2_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, REPO / "finetune.py", "--task", "classification"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("finetune.py: no checkpoint at out/ckpt.pt; train one")
