"""Readers, preparation, batches and augmentation, on phantoms, damaged files and real label files."""
import csv
import gzip
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

import data
import phantom
import text
from text import ANATOMIES, PATHOLOGIES, InputError

HERE = pathlib.Path(__file__).resolve().parent.parent
REAL = HERE.parent / "shared" / "real"
real = pytest.mark.skipif(not REAL.exists(), reason="../shared/real is not here")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """24 phantoms of 32 pixels in MIMIC-CXR-JPG's layout; not to be changed."""
    root = tmp_path_factory.mktemp("drawn") / "mimic"
    phantom.write("mimic", str(root), 24, seed=3, size=32, workers=1)
    return root


@pytest.fixture
def root(drawn, tmp_path):
    """A copy of `drawn` to damage."""
    return pathlib.Path(shutil.copytree(drawn, tmp_path / "mimic",
                                        ignore=shutil.ignore_patterns("prepared-*")))


@pytest.fixture(scope="session")
def table(drawn):
    return data.load("synthetic", str(drawn), size=32, workers=1)


def images(root):
    return sorted(root.glob("files/*/*/*/*.jpg"))


def edit(path, change):
    """path's text (gzipped or not) through change(text)."""
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", newline="") as file:
        content = file.read()
    with opener(path, "wt", newline="") as file:
        file.write(change(content))


# ------------------------------------------------------------------------------------------------
# What a table holds

def test_table_agrees_with_what_was_drawn(table, drawn):
    assert len(table) == 24 and table.images.shape == (24, 32, 32) and table.images.dtype == np.uint8
    assert {s: len(table.rows(s)) for s in data.SPLITS[:3]} == table.receipt["splits"]
    i = table.ids.index(images(drawn)[0].stem)
    assert (table.images[i] == np.asarray(Image.open(images(drawn)[0]))).all()  # nothing resampled
    boxes = [r for r in csv.DictReader(open(drawn / "boxes.csv"))]
    assert sum(map(len, table.boxes)) == len(boxes)
    for row in boxes:
        i = table.ids.index(row["dicom_id"])
        label, x, y, w, h = table.boxes[i][int(row["finding"])]
        assert label == row["pathology"] and x * 32 == pytest.approx(float(row["x"]), abs=1e-4)
        inside = table.mask(i, label)
        assert inside.shape == (32, 32) and inside.any()
        truth = table.truth([i], PATHOLOGIES, ANATOMIES)[0]
        assert truth[ANATOMIES.index(row["anatomy"]), PATHOLOGIES.index(label)] == 1
        assert table.labels[i, table.label_names.index(label)] == 1
    assert (table.truth(range(24), PATHOLOGIES, ANATOMIES) == 1).sum() == len(
        {(r["dicom_id"], r["pathology"], r["anatomy"]) for r in boxes})


def test_masks_are_those_of_the_named_finding(table, drawn):
    row = next(r for r in csv.DictReader(open(drawn / "boxes.csv")) if r["finding"] == "1")
    i = table.ids.index(row["dicom_id"])
    bits = np.asarray(Image.open(drawn / "masks" / (row["dicom_id"] + ".png")))
    wanted = [k for k, box in enumerate(table.boxes[i]) if box[0] == row["pathology"]]
    assert (table.mask(i, row["pathology"]) == sum((bits >> k) & 1 for k in wanted).astype(bool)).all()
    assert (table.mask(i) == (bits > 0)).all()
    assert table.mask(i, "no such label") is None
    healthy = next(k for k in range(24) if not table.boxes[k])
    assert not table.mask(healthy).any()  # annotated, nothing there


def test_sparse_cells_give_text_py_s_matrix(table):
    for pathologies, anatomies in ((PATHOLOGIES, ANATOMIES), (["effusion", "nodule"], ["left_pleural"]),
                                   (["effusion", "tail_abnorm_obs"], ["other", "right_pleural"])):
        dense = table.existence(np.arange(24), pathologies, anatomies)
        for i in range(24):
            assert (dense[i] == text.existence_matrix(table.cells(i), pathologies, anatomies)).all()


def test_reports_become_cells(table, drawn):
    i = next(k for k in range(24) if table.cells(k))
    report = (drawn / table.paths[i]).parent.with_suffix(".txt").read_text()
    triplets = [t for t in text.extract_triplets(report, buckets=False) if t.existence >= 0]
    assert {(p, a) for p, a, _ in table.cells(i)} == {(t.pathology, t.anatomy) for t in triplets}


# ------------------------------------------------------------------------------------------------
# Preparation

def prepared_bytes(root):
    return {name: (root / "prepared-32" / name).read_bytes()
            for name in ("images.npy", "arrays.npz", "index.json", "split.csv")}


def test_same_bytes_whatever_the_workers(root, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 5)
    data.load("synthetic", str(root), size=32, workers=1)
    alone = prepared_bytes(root)
    shutil.rmtree(root / "prepared-32")
    table = data.load("synthetic", str(root), size=32, workers=3)
    assert prepared_bytes(root) == alone
    for i, path in enumerate(table.paths):  # every job wrote to its own place
        assert (table.images[i] == np.asarray(Image.open(root / path))).all()


def test_second_load_decodes_nothing_and_a_label_change_only_rereads_labels(root, monkeypatch):
    first = data.load("synthetic", str(root), size=32, workers=1).receipt
    monkeypatch.setattr(data, "decode", None)  # any decoding would fail now
    assert data.load("synthetic", str(root), size=32, workers=1).receipt == first
    edit(root / "boxes.csv", lambda t: t.replace(",effusion,", ",edema,"))
    second = data.load("synthetic", str(root), size=32, workers=1).receipt
    assert second["fingerprint"] != first["fingerprint"] and "effusion" not in second["labels"]
    third = data.load("synthetic", str(root), size=32, workers=1, labels="chexpert").receipt
    assert list(third["labels"]) == list(data.CHEXPERT)


def test_a_changed_or_repaired_image_is_decoded_again(root):
    path = images(root)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    table = data.load("synthetic", str(root), size=32, workers=1)
    i = table.ids.index(path.stem)
    assert table.receipt["skipped"] == {"corrupt": 1} and table.splits[i] == "skipped"
    assert i not in table.rows() and len(table.rows()) == 23 and not table.images[i].any()
    path.write_bytes(whole)
    table = data.load("synthetic", str(root), size=32, workers=1)
    assert table.receipt["skipped"] == {} and table.images[i].any()


def test_cache_can_live_elsewhere_and_move_with_its_root(root, tmp_path, monkeypatch):
    data.load("synthetic", str(root), size=32, workers=1, cache_dir=str(tmp_path / "cache"))
    assert (tmp_path / "cache/synthetic/prepared-32/receipt.json").exists()
    assert not (root / "prepared-32").exists()
    data.load("synthetic", str(root), size=32, workers=1)
    root.rename(tmp_path / "moved")
    monkeypatch.setattr(data, "decode", None)
    assert len(data.load("synthetic", str(tmp_path / "moved"), size=32, workers=1).rows()) == 24


def test_killed_preparation_goes_on(root, monkeypatch):
    """SIGKILL in the middle: the parts that were finished are not made again, the result is equal."""
    program = (f"import sys, time; sys.path.insert(0, {str(HERE)!r}); import data; data.CHUNK = 4\n"
               "old = data.prepare_chunk\n"
               "def slow(job):\n    time.sleep(0.1); return old(job)\n"
               f"data.prepare_chunk = slow; data.load('synthetic', {str(root)!r}, size=32, workers=1)")
    run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    parts = root / "prepared-32" / "parts"
    while len(list(parts.glob("*.cells.json"))) < 2 and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (root / "prepared-32" / "receipt.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert 4 <= len(kept) < 12
    monkeypatch.setattr(data, "CHUNK", 4)
    data.load("synthetic", str(root), size=32, workers=1)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    again = prepared_bytes(root)
    shutil.rmtree(root / "prepared-32")
    data.load("synthetic", str(root), size=32, workers=1)
    assert prepared_bytes(root) == again


@pytest.mark.parametrize("name", ["images.npy", "arrays.npz", "index.json", "receipt.json",
                                  "parts/000000.pixels.json"])
def test_damaged_cache_is_made_again(root, name):
    data.load("synthetic", str(root), size=32, workers=1)
    path = root / "prepared-32" / name
    before = prepared_bytes(root)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    if name.startswith("parts"):
        (root / "prepared-32" / "receipt.json").unlink()
    data.load("synthetic", str(root), size=32, workers=1)
    assert prepared_bytes(root) == before


def test_draws_synthetic_data_on_first_use(tmp_path, monkeypatch):
    def write(layout, root, count, seed, workers=None, draw=phantom.write):
        assert (layout, count, seed) == ("mimic", 12_500, 0)
        draw(layout, root, 8, seed, size=32, workers=1)
    monkeypatch.setattr(phantom, "write", write)
    (tmp_path / "new.part").mkdir()  # left by a run that was killed while it drew
    (tmp_path / "new.part" / "half").touch()
    table = data.load("synthetic", str(tmp_path / "new"), size=32, workers=1)
    assert len(table) == 8 and not (tmp_path / "new.part").exists()


# ------------------------------------------------------------------------------------------------
# Batches

def test_batches_are_a_function_of_the_step(table):
    rows = np.arange(24)
    batches = data.Batches(table, rows, 6, 1, PATHOLOGIES, ANATOMIES)
    usable = batches.row_numbers
    assert len(batches) == len(usable) // 6
    seen = np.concatenate([batches[s]["rows"].numpy() for s in range(len(batches))])
    assert len(set(seen)) == len(seen) and set(seen) <= set(usable)
    late = 3 * len(batches) + 1
    fresh = data.Batches(table, rows, 6, 1, PATHOLOGIES, ANATOMIES)[late]
    assert all((fresh[k] == batches[late][k]).all() for k in fresh)
    assert (batches[0]["rows"] != batches[len(batches)]["rows"]).any()  # epochs differ
    assert (fresh["images"].numpy() == table.images[fresh["rows"]]).all()
    assert (fresh["existence"].numpy() == table.existence(fresh["rows"], PATHOLOGIES, ANATOMIES)).all()


def test_ranks_share_a_batch(table):
    whole = data.Batches(table, np.arange(24), 6, 1, PATHOLOGIES, ANATOMIES)[5]
    parts = [data.Batches(table, np.arange(24), 6, 1, PATHOLOGIES, ANATOMIES, rank=r, world=3)[5]
             for r in range(3)]
    for key in whole:
        assert (torch.cat([part[key] for part in parts]) == whole[key]).all()
    with pytest.raises(InputError, match="not a multiple of 4"):
        data.Batches(table, np.arange(24), 6, 1, PATHOLOGIES, ANATOMIES, world=4)


def test_fewer_images_than_a_batch(table):
    batches = data.Batches(table, table.rows()[:5], 8, 0, PATHOLOGIES, ANATOMIES)
    assert len(batches) == 1 and len(batches[7]["rows"]) == 8


def test_batches_through_a_loader_with_workers(table):
    batches = data.Batches(table, np.arange(24), 4, 0, PATHOLOGIES, ANATOMIES)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(3, 6), num_workers=1)
    for step, batch in zip(range(3, 6), loader):
        assert (batch["rows"] == batches[step]["rows"]).all()


# ------------------------------------------------------------------------------------------------
# Augmentation

def batch(B=16, S=40, seed=0):
    """Smooth random images [B,S,S] and labels [B,n,m] of the full vocabulary."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 256, (B, 1, 5, 5), generator=g).float()
    x = torch.nn.functional.interpolate(low, (S, S), mode="bicubic")[:, 0].clamp(0, 255).to(torch.uint8)
    y = torch.randint(-1, 2, (B, len(ANATOMIES), len(PATHOLOGIES)), generator=g).to(torch.int8)
    return x, y, torch.Generator().manual_seed(seed)


SWAP = data.side_swap_index(ANATOMIES)
ALONE = (SWAP < 0).nonzero()[:, 0]


def test_without_augmentation_it_is_to_input():
    x, y, g = batch()
    out, same = data.augment(x, y, SWAP, g, 40, crop=(1, 1), flip="none", ops=0)
    assert out.shape == (16, 3, 40, 40) and (same == y).all()
    torch.testing.assert_close(out, data.to_input(x, 40), atol=1e-4, rtol=0)
    mean, std = torch.tensor(data.MEAN).view(3, 1, 1), torch.tensor(data.STD).view(3, 1, 1)
    torch.testing.assert_close(out[0], (x[0].float() / 255 - mean) / std, atol=1e-4, rtol=0)


def test_flip_mirrors_pixels_and_exchanges_sides():
    x, y, g = batch()
    y[:, ALONE] = -1
    out, new = data.augment(x, y, SWAP, g, 40, crop=(1, 1), ops=0)
    straight, mirror = data.to_input(x, 40), data.to_input(x.flip(2), 40)
    left, right = ANATOMIES.index("left_pleural"), ANATOMIES.index("right_pleural")
    flips = 0
    for k in range(16):
        flipped = (out[k] - mirror[k]).abs().max() < 1e-3
        assert flipped or (out[k] - straight[k]).abs().max() < 1e-3
        assert (new[k] == (y[k, SWAP.clamp(min=0)] if flipped else y[k])).all() or (
            flipped and (new[k, left] == y[k, right]).all())
        for a, name in enumerate(ANATOMIES):
            source = ANATOMIES.index(text.swap_sides(name)) if flipped and SWAP[a] >= 0 else a
            assert (new[k, a] == y[k, source]).all()
        flips += bool(flipped)
    assert 3 < flips < 13
    naive, same = data.augment(x, y, SWAP, torch.Generator().manual_seed(0), 40, crop=(1, 1), ops=0,
                               flip="naive")
    torch.testing.assert_close(naive, out)
    assert (same == y).all()


def test_images_that_cannot_be_mirrored_are_not():
    """right_atrium has no left partner: a mirrored image would lose its label."""
    x, y, g = batch()
    y[:] = -1
    y[::2, ANATOMIES.index("right_atrium"), 3] = 1
    out, new = data.augment(x, y, SWAP, g, 40, crop=(1, 1), ops=0)
    assert (new == y).all()
    assert (out[::2] - data.to_input(x, 40)[::2]).abs().max() < 1e-3
    assert (out[1::2] - data.to_input(x, 40)[1::2]).abs().max() > 0.1


def test_side_swap_index_of_a_short_list():
    assert data.side_swap_index(["left_hilar", "heart_size", "right_hilar", "left_pleural"]).tolist() \
        == [2, 1, 0, -1]


def test_crop_keeps_the_asked_area():
    ramp = torch.arange(64, dtype=torch.uint8).repeat(256, 64, 1) * 4  # brightness = 4 * column
    g = torch.Generator().manual_seed(0)
    out, _ = data.augment(ramp, None, None, g, 64, crop=(0.25, 0.25), flip="none", ops=0)
    column = (out[:, 0] * data.STD[0] + data.MEAN[0]) * 255 / 4
    width = (column[:, 32, -1] - column[:, 32, 0]) / 63  # share of the columns seen
    assert width.min() > 0.4 and width.max() < 0.6 and width.std() > 0.02  # 0.5 / ratio 3/4..4/3
    assert column[:, 32, 0].max() - column[:, 32, 0].min() > 25


def test_augment_is_deterministic_and_takes_other_sizes():
    x, y, g = batch(S=96)
    one, _ = data.augment(x, y, SWAP, torch.Generator().manual_seed(5), 32)
    two, _ = data.augment(x, y, SWAP, torch.Generator().manual_seed(5), 32)
    assert one.shape == (16, 3, 32, 32) and (one == two).all() and one.isfinite().all()
    assert data.augment(x, None, None, g, 48)[1] is None
    assert data.to_input(x, 32).shape == (16, 3, 32, 32)


@pytest.mark.parametrize("name", data.OPS[1:5])
def test_photometric_ops_are_pillow_s(name):
    x, _, _ = batch(B=4, S=48, seed=2)
    x = (x.float() * 0.6 + 30).to(torch.uint8)
    factor = torch.tensor([0.3, 0.79, 1.21, 1.8])
    ours = data.PHOTOMETRIC[name](x.float(), factor)
    for k in range(4):
        image = Image.fromarray(x[k].numpy())
        theirs = {"autocontrast": lambda: ImageOps.autocontrast(image),
                  "equalize": lambda: ImageOps.equalize(image),
                  "brightness": lambda: ImageEnhance.Brightness(image).enhance(float(factor[k])),
                  "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(float(factor[k]))}[name]()
        assert np.abs(ours[k].numpy() - np.asarray(theirs)).max() <= 2


def test_flat_images_survive_every_op():
    x = torch.full((64, 32, 32), 7, dtype=torch.uint8)
    for seed in range(3):
        out, _ = data.augment(x, None, None, torch.Generator().manual_seed(seed), 32)
        assert out.isfinite().all()


# ------------------------------------------------------------------------------------------------
# Pixels

@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16", "big jpeg"])
def test_every_kind_of_picture_is_read(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    image, path = Image.fromarray(grey), tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 200)
    elif mode == "big jpeg":
        path = tmp_path / "x.jpg"
        image = image.resize((1024, 512))
    else:
        image = image.convert(mode, dither=Image.Dither.NONE)
    image.save(path)
    read = data.read_image(str(path))
    assert read.dtype == np.uint8 and read.shape == ((512, 1024) if mode == "big jpeg" else (64, 64))
    small = data.read_image(str(path), 32)
    assert small.shape == (32, 32)
    wanted = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(small.astype(int) - wanted).max() <= (255 if mode == "1" else 6)
    assert small[:, -1].mean() > small[:, 0].mean() + 200


def write_dicom(path, pixels, photometric="MONOCHROME2", bits=16, **tags):
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns, file.SamplesPerPixel = *pixels.shape, 1
    file.PhotometricInterpretation, file.PixelRepresentation = photometric, 0
    file.BitsAllocated, file.BitsStored, file.HighBit = bits, bits, bits - 1
    for tag, value in tags.items():
        setattr(file, tag, value)
    file.PixelData = pixels.astype(np.uint16 if bits == 16 else np.uint8).tobytes()
    file.save_as(str(path), enforce_file_format=True)


def test_dicom_rescale_window_and_photometric(tmp_path):
    pytest.importorskip("pydicom")
    ramp = np.tile(np.arange(64), (64, 1)) * 60
    write_dicom(tmp_path / "a.dcm", ramp)
    plain = data.read_image(str(tmp_path / "a.dcm"))
    assert plain[0, 0] == 0 and plain[0, -1] == 255 and abs(int(plain[0, 32]) - 129) < 3
    write_dicom(tmp_path / "b.dcm", ramp, "MONOCHROME1")
    assert (data.read_image(str(tmp_path / "b.dcm")) == 255 - plain).all()
    write_dicom(tmp_path / "c.dcm", ramp, RescaleSlope="2", RescaleIntercept="-1000")
    assert np.abs(data.read_image(str(tmp_path / "c.dcm")).astype(int) - plain).max() <= 1
    write_dicom(tmp_path / "d.dcm", ramp, WindowCenter="600", WindowWidth="600")
    window = data.read_image(str(tmp_path / "d.dcm"))
    assert (window[0, :5] == 0).all() and (window[0, 16:] == 255).all() and 0 < window[0, 10] < 255
    write_dicom(tmp_path / "e.dcm", ramp // 60 + 100, bits=8)
    assert (data.read_image(str(tmp_path / "e.dcm")) == ramp // 60 + 100).all()  # 8 bits stay as stored


@real
def test_real_compressed_dicom_png_and_jpeg():
    pytest.importorskip("pydicom")
    one = data.read_image(str(REAL / "samples/1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"))
    inverted = data.read_image(str(REAL / "samples/Fake_MONOHR1.dcm"))
    assert one.shape == (1024, 1024) and (one == 255 - inverted).all()
    assert data.read_image(str(REAL / "samples/00000001_000.png"), 256).shape == (256, 256)
    assert data.read_image(str(REAL / "samples/16747_3_1.jpg")).shape == (885, 1036)


def test_rle_is_relative_and_column_major():
    mask = data.decode_rle("1 2 1022 2")
    assert mask.shape == (1024, 1024) and np.argwhere(mask).tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert not data.decode_rle("").any() and not data.decode_rle("-1").any()
