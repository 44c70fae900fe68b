"""What data.py gives is what is on disk: every published layout and label file is read as its
publisher means it; a cache is the same bytes however it was made, and is made again when what it
rests on changes; damaged input is counted or named in one line; a batch is a function of its step;
a mirrored image has its sides exchanged; the photometric operations are Pillow's."""
import csv
import gzip
import json
import os
import pathlib
import pickle
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
    assert len(table) == 24
    assert table.images.shape == (24, 32, 32) and table.images.dtype == np.uint8
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
    mask = sum((bits >> k) & 1 for k in wanted).astype(bool)
    assert (table.mask(i, row["pathology"]) == mask).all()
    assert (table.mask(i) == (bits > 0)).all()
    assert table.located(i) == sorted({box[0] for box in table.boxes[i]})
    assert table.mask(i, "no such label") is None
    healthy = next(k for k in range(24) if not table.boxes[k])
    assert not table.mask(healthy).any() and table.located(healthy) == []  # annotated


def test_a_table_travels_without_its_images(table):
    travelling = pickle.dumps(table)
    assert len(travelling) < table.images.nbytes / 2
    assert (pickle.loads(travelling).images == table.images).all()


def test_a_missing_mask_file_is_one_line(root):
    table = data.load("synthetic", str(root), size=32, workers=1)
    i = next(k for k in range(24) if table.boxes[k])
    (root / "masks" / (table.ids[i] + ".png")).unlink()
    with pytest.raises(InputError, match="cannot be read as an image .missing"):
        table.mask(i)


def test_sparse_cells_give_text_py_s_matrix(table):
    for pathologies, anatomies in ((PATHOLOGIES, ANATOMIES),
                                   (["effusion", "nodule"], ["left_pleural"]),
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
    """SIGKILL in the middle: what was finished is not made again, the result is equal."""
    program = (f"import sys, time; sys.path.insert(0, {str(HERE)!r}); import data; data.CHUNK = 4\n"
               "old = data.prepare_chunk\n"
               "def slow(job):\n    time.sleep(0.1); return old(job)\n"
               "data.prepare_chunk = slow\n"
               f"data.load('synthetic', {str(root)!r}, size=32, workers=1)")
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


def test_a_preparation_that_dies_while_it_writes_leaves_no_receipt(root, monkeypatch):
    """The old receipt beside new labels of the same size would pass for a finished cache."""
    edit(root / LABELS, lambda t: t.replace(",1.0", ",-1.0"))
    options = dict(size=32, workers=1, labels="chexpert")
    before = data.load("synthetic", str(root), **options).labels
    with monkeypatch.context() as dying:
        dying.setattr(data, "write_split", None)
        with pytest.raises(TypeError):
            data.load("synthetic", str(root), uncertain="ones", **options)
    assert (before == -1).any()
    assert (data.load("synthetic", str(root), **options).labels == before).all()


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
    (tmp_path / "file").touch()  # nothing is drawn over a file
    with pytest.raises(InputError, match="no synthetic data at"):
        data.load("synthetic", str(tmp_path / "file"), size=32, workers=1)


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
    existence = table.existence(fresh["rows"], PATHOLOGIES, ANATOMIES)
    assert (fresh["existence"].numpy() == existence).all()


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
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(3, 6),
                                         num_workers=1)
    for step, batch in zip(range(3, 6), loader):
        assert (batch["rows"] == batches[step]["rows"]).all()


# ------------------------------------------------------------------------------------------------
# Augmentation

def batch(B=16, S=40, seed=0):
    """Smooth random images [B,S,S] and labels [B,n,m] of the full vocabulary."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 256, (B, 1, 5, 5), generator=g).float()
    x = torch.nn.functional.interpolate(low, (S, S), mode="bicubic")[:, 0]
    x = x.clamp(0, 255).to(torch.uint8)
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
    names = ["left_hilar", "heart_size", "right_hilar", "left_pleural"]
    assert data.side_swap_index(names).tolist() == [2, 1, 0, -1]


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


@pytest.mark.parametrize("name", data.PHOTOMETRIC)
def test_photometric_ops_are_pillow_s(name):
    x, _, _ = batch(B=4, S=48, seed=2)
    x = (x.float() * 0.6 + 30).to(torch.uint8)
    factors = [0.3, 0.79, 1.21, 1.8]
    pillow = {"autocontrast": lambda image, factor: ImageOps.autocontrast(image),
              "equalize": lambda image, factor: ImageOps.equalize(image),
              "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
              "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)}
    ours = data.PHOTOMETRIC[name](x.float(), torch.tensor(factors))
    for k in range(4):
        theirs = pillow[name](Image.fromarray(x[k].numpy()), factors[k])
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
    assert read.dtype == np.uint8
    assert read.shape == ((512, 1024) if mode == "big jpeg" else (64, 64))
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
    stored = data.read_image(str(tmp_path / "e.dcm"))
    assert (stored == ramp // 60 + 100).all()  # 8 bits stay as stored


@real
def test_real_compressed_dicom_png_and_jpeg():
    pytest.importorskip("pydicom")
    one = data.read_image(
        str(REAL / "samples/1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"))
    inverted = data.read_image(str(REAL / "samples/Fake_MONOHR1.dcm"))
    assert one.shape == (1024, 1024) and (one == 255 - inverted).all()
    assert data.read_image(str(REAL / "samples/00000001_000.png"), 256).shape == (256, 256)
    assert data.read_image(str(REAL / "samples/16747_3_1.jpg")).shape == (885, 1036)


def test_rle_is_relative_and_column_major():
    mask = data.decode_rle("1 2 1022 2")
    assert mask.shape == (1024, 1024)
    assert np.argwhere(mask).tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert not data.decode_rle("").any() and not data.decode_rle("-1").any()


# ------------------------------------------------------------------------------------------------
# Damaged and wrong input: one clear line, or a counted skip and nothing else lost

SPLIT, META, LABELS = (f"mimic-cxr-2.0.0-{n}.csv.gz" for n in ("split", "metadata", "chexpert"))


def first_report(root):
    return images(root)[0].parent.with_suffix(".txt")


def swap_ids(root, old, new):
    """`new` in place of the first image's `old` column in the split file."""
    row = next(r for r in csv.DictReader(gzip.open(root / SPLIT, "rt")))
    edit(root / SPLIT, lambda t: t.replace(row[old], new, 1))


SKIPPED = {  # what was done to the data: (damage, skipped in the receipt)
    "truncated jpeg": (lambda r: os.truncate(images(r)[0], 300), {"corrupt": 1}),
    "zero-size image": (lambda r: os.truncate(images(r)[0], 0), {"zero-size": 1}),
    "git-lfs pointer": (lambda r: images(r)[0].write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), {"git-lfs": 1}),
    "html page named .jpg": (lambda r: images(r)[0].write_text("<html>404</html>"), {"corrupt": 1}),
    "missing image": (lambda r: images(r)[0].unlink(), {"missing": 1}),
    "half of the images missing": (lambda r: [p.unlink() for p in images(r)[:12]], {"missing": 12}),
    "folder named .jpg": (lambda r: [(p.unlink(), p.mkdir()) for p in images(r)[:1]],
                          {"unreadable": 1}),
    "binary noise": (lambda r: images(r)[0].write_bytes(bytes(range(256)) * 9), {"corrupt": 1}),
    "unknown split": (lambda r: edit(r / SPLIT, lambda t: t.replace(",train", ",trian", 1)),
                      {"unreadable-label": 1}),
    "id without metadata": (lambda r: swap_ids(r, "dicom_id", "0-0-0-0-0"),
                            {"unreadable-label": 1}),
    "a row twice": (lambda r: edit(r / SPLIT, lambda t: t + t.splitlines()[1] + "\r\n"),
                    {"duplicate": 1}),
    "cut row": (lambda r: edit(r / SPLIT, lambda t: t + "12ab34cd\r\n"), {"unreadable-label": 1}),
    "path out of the root": (lambda r: swap_ids(r, "study_id", "/../../../../../etc"),
                             {"outside-root": 1}),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_bad_rows_and_files_are_skipped_and_counted(root, name):
    damage, skipped = SKIPPED[name]
    damage(root)
    table = data.load("synthetic", str(root), size=32, workers=1)
    assert table.receipt["skipped"] == skipped
    lost = sum(skipped.values()) if name != "a row twice" and name != "cut row" else 0
    assert len(table.rows()) == table.receipt["images"] == 24 - lost
    assert (table.images[table.rows()].reshape(24 - lost, -1).max(1) > 0).all()
    assert len(table.receipt["skipped_files"]) == sum(skipped.values())


REPORTS = {  # what was done to a report: (damage, how it is counted)
    "no report": (lambda p: p.unlink(), "no-report"),
    "empty report": (lambda p: p.write_text(""), "empty-report"),
    "blank report": (lambda p: p.write_text(" \n \n"), "empty-report"),
    "without usable sections": (lambda p: p.write_text(
        "                 FINAL REPORT\n EXAMINATION:  CHEST\n \n COMPARISON:  None.\n"),
        "empty-report"),
    "not text": (lambda p: p.write_bytes(bytes(range(256)) * 4), "empty-report"),
    "git-lfs pointer": (lambda p: p.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), "empty-report"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_bad_reports_are_counted_and_the_image_stays(root, name):
    before = data.load("synthetic", str(root), size=32, workers=1)
    damage, state = REPORTS[name]
    damage(first_report(root))
    table = data.load("synthetic", str(root), size=32, workers=1, split_file=str(
        root / "prepared-32/split.csv"))
    i = table.ids.index(images(root)[0].stem)
    assert table.receipt["reports"].get(state, 0) == before.receipt["reports"].get(state, 0) + 1
    assert table.cells(i) == [] and len(table.rows()) == 24 and not table.has_report[i]
    assert i not in data.Batches(table, np.arange(24), 2, 0, PATHOLOGIES, ANATOMIES).row_numbers


def gz_cut(path):
    path.write_bytes(path.read_bytes()[:100])


REFUSED = {  # what is wrong: (what was done to the data or None, arguments of load, the message)
    "unknown data set": (None, dict(dataset="mimc"),
                         "unknown data set 'mimc'; choose one of synthetic, mimic"),
    "no such root": (None, dict(root="nowhere", dataset="mimic"),
                     "looked for mimic-cxr-2.0.0-split.csv.*physionet.*phantom.py --layout mimic"
                     ".*--data synthetic"),
    "root is a file": (None, dict(root=__file__, dataset="nih"), "no NIH ChestX-ray14 data"),
    "another data set": (None, dict(dataset="rsna"), "no RSNA Pneumonia data at .*kaggle"),
    "no metadata": (lambda r: (r / META).unlink(), {}, "lacks mimic-cxr-2.0.0-metadata.csv"),
    "cut gzip": (lambda r: gz_cut(r / META), {}, "metadata.csv.gz is damaged"),
    "not gzip": (lambda r: (r / SPLIT).write_text("dicom_id\n"), {}, "split.csv.gz is damaged"),
    "missing column": (lambda r: edit(r / META, lambda t: t.replace("ViewPosition", "View")), {},
                       "no column 'ViewPosition'; it has dicom_id"),
    "html in place of csv": (lambda r: edit(r / SPLIT, lambda t: "<html>login</html>\n"), {},
                             "no column 'dicom_id'"),
    "header only": (lambda r: edit(r / SPLIT, lambda t: t.splitlines()[0] + "\n"), {},
                    "without one usable row"),
    "no split file": (None, dict(split_file="nowhere.csv"),
                      "--split-file nowhere.csv: no such file"),
    "split file of another kind": (lambda r: (r / "s.csv").write_text("a,b\n1,2\n"),
                                   dict(split_file="s.csv"), "needs columns id,split"),
    "split file with a wrong split": (lambda r: (r / "s.csv").write_text("id,split\n1,tset\n"),
                                      dict(split_file="s.csv"), "'tset' is no split"),
    "split file of another set": (lambda r: (r / "s.csv").write_text("id,split\n1,test\n"),
                                  dict(split_file="s.csv"), "none of its 1 ids"),
    "no triplets": (None, dict(triplets="nowhere"), "--triplets nowhere: no such file"),
    "published matrix missing": (lambda r: (r / "pub").mkdir(), dict(triplets="pub"),
                                 "cannot read the published labels"),
    "published matrix pickled": (lambda r: ((r / "pub").mkdir(), np.save(
        r / "pub/landmark_observation_adj_mtx.npy", np.array([{}]))), dict(triplets="pub"),
        "cannot read the published labels"),
    "published matrix of another shape": (lambda r: ((r / "pub").mkdir(), np.save(
        r / "pub/landmark_observation_adj_mtx.npy", np.zeros((2, 75, 51)))), dict(triplets="pub"),
        "needs a matrix of .reports, 51, 75., found .2, 75, 51"),
    "tiny images": (None, dict(size=8), "--prepared-size 8 is not in 16"),
    "cache is a file": (lambda r: (r / "prepared-32").write_text(""), {},
                        "cannot write the prepared"),
    "labels that are not there": (None, dict(labels="manual"),
                                  "lacks mimic-cxr-2.1.0-test-set-labeled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_one_line(root, name):
    damage, arguments, message = REFUSED[name]
    if damage:
        damage(root)
    arguments = {"dataset": "synthetic", "root": str(root), "size": 32, "workers": 1, **arguments}
    for key in ("split_file", "triplets"):
        if (root / str(arguments.get(key))).exists():
            arguments[key] = str(root / arguments[key])
    with pytest.raises(InputError, match=message) as error:
        data.load(**arguments)
    assert "\n" not in str(error.value)


def test_full_disk_is_seen_beforehand(root, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="needs 0.0 GB and the disk has 0.0 GB left; --cache-dir"):
        data.load("synthetic", str(root), size=32, workers=1)


def test_bad_label_cells_are_counted(root):
    edit(root / LABELS, lambda t: t.replace(",1.0", ",yes", 1))
    table = data.load("synthetic", str(root), size=32, workers=1, labels="chexpert")
    assert table.receipt["skipped"] == {"unreadable-label": 1} and len(table.rows()) == 24
    study = (table.labels == -1).all(1)
    assert study.sum() == 1  # that study's labels are unknown, not absent


def test_csv_with_bom_crlf_spaces_and_zip(tmp_path):
    import zipfile
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfid, split \r\n 1 , test\r\n\r\n2\r\n")
    wanted = [{"id": "1", "split": "test"}, {"id": "2", "split": ""}]
    assert list(data.csv_rows(str(tmp_path / "a.csv"))) == wanted
    with zipfile.ZipFile(tmp_path / "b.csv.zip", "w") as archive:
        archive.write(tmp_path / "a.csv", "b.csv")
    assert list(data.csv_rows(data.find(str(tmp_path), "b.csv"))) == wanted


def test_command_line_exits_2_with_one_line(tmp_path):
    run = subprocess.run([sys.executable, "data.py", "--dataset", "siim", "--root", str(tmp_path)],
                         cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert run.stderr.startswith("data.py: no SIIM-ACR Pneumothorax data at")


def test_fix_list_that_cannot_be_written(root):
    args = ["--root", str(root), "--workers", "1", "--fix-list", str(root / "nowhere" / "fix.csv")]
    with pytest.raises(InputError, match="--fix-list needs --check"):
        data.main(data.parse_args(args))
    with pytest.raises(InputError, match="fix.csv: No such file or directory"):
        data.main(data.parse_args([*args, "--check"]))


# ------------------------------------------------------------------------------------------------
# The doctor

def doctor(root, capsys):
    root, options = data.where_and_how("synthetic", str(root), None, None, "ignore", None, "rules")
    problems = data.check("synthetic", root, options, 1, str(pathlib.Path(root) / "fix.csv"))
    return problems, capsys.readouterr().out


def test_doctor_finds_a_clean_set_clean(root, capsys):
    empty = [p for p in root.glob("files/*/*/*.txt") if not data.unique_cells(
        text.extract_triplets(p.read_text(), buckets=False))]
    for path in empty:
        path.write_text(" FINDINGS:\n \n Left pleural effusion.\n")
    problems, out = doctor(root, capsys)
    assert problems == 0 and "24 usable" in out and out.endswith("clean\n")


def test_doctor_names_every_kind_and_its_fix_list_can_be_used(root, capsys):
    for path in root.glob("files/*/*/*.txt"):
        path.write_text(" FINDINGS:\n \n Left pleural effusion.\n")
    files = images(root)
    files[0].unlink()
    os.truncate(files[1], 300)
    os.truncate(files[2], 0)
    files[3].write_text("version https://git-lfs.github.com/spec/v1\n")
    shutil.copy(files[5], files[4])
    files[6].parent.with_suffix(".txt").write_text("")
    shutil.copy(files[5], root / "files" / "stray.jpg")
    rows = list(csv.DictReader(gzip.open(root / SPLIT, "rt")))
    twice = next(r for r in rows if [s["subject_id"] for s in rows].count(r["subject_id"]) > 1)
    other = next(s for s in data.SPLITS[:3] if s != twice["split"])
    edit(root / SPLIT, lambda t: "\n".join(
        line.rsplit(",", 1)[0] + "," + other if line.startswith(twice["dicom_id"]) else line
        for line in t.splitlines()) + "\nx,1,2,train\n")
    problems, out = doctor(root, capsys)
    for kind in ("missing", "corrupt", "zero-size", "git-lfs", "duplicate", "empty-report",
                 "patient-leak", "no-label", "unreadable-label"):
        assert f"\n{kind} " in out, kind
    assert problems >= 9 and "18 usable" in out
    table = data.load("synthetic", str(root), size=32, workers=1, split_file=str(root / "fix.csv"))
    assert len(table.rows()) == 18 and not {"corrupt", "missing"} & set(
        table.splits[table.rows()])


# ------------------------------------------------------------------------------------------------
# Labels, splits, triplets made elsewhere

def test_uncertain_labels():
    raw = np.array([[1, 0, -1, data.BLANK, data.UNKNOWN], [-1, -1, -1, -1, -1]], np.int8)
    names = ["Edema", "Cardiomegaly", "Fracture", "Atelectasis", "Pneumonia"]
    assert data.settle_labels(raw, names, "ignore").tolist() == [[1, 0, -1, 0, -1], [-1] * 5]
    assert data.settle_labels(raw, names, "zeros").tolist() == [[1, 0, 0, 0, -1], [0] * 5]
    assert data.settle_labels(raw, names, "ones").tolist() == [[1, 0, 1, 0, -1], [1] * 5]
    assert data.settle_labels(raw, names, "gloria").tolist() == [[1, 0, -1, 0, -1],
                                                                 [1, 0, -1, 1, -1]]


def test_labels_have_names_in_the_vocabulary():
    names = {data.label_pathology(n) for n in (*data.CHEXPERT, *data.NIH, *data.OPENI)}
    assert None not in names and names <= set(PATHOLOGIES)
    assert data.label_pathology("Fibrosis") == "tail_abnorm_obs"
    assert data.label_pathology("Pleural_Thickening") == "thicken"
    assert data.label_pathology("COVID-19") is None


def item(name, patient, split=""):
    return data.Item(name, name, patient, split, ())


def test_made_splits_go_by_patient_and_do_not_depend_on_the_rest():
    items = [item(str(i), str(i // 3)) for i in range(3000)]
    splits, source = data.settle_splits(items, (0.7, 0.15))
    shares = [splits.count(s) / 3000 for s in data.SPLITS[:3]]
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.04)
    assert "by patient 70:15:15" in source
    assert all(splits[i] == splits[i - i % 3] for i in range(3000))
    assert data.settle_splits(items[100:200][::-1], (0.7, 0.15))[0] == splits[100:200][::-1]
    official = [item(str(i), str(i), "test" if i % 5 == 0 else "train") for i in range(1000)]
    carved, source = data.settle_splits(official, (0.7, 0.1))
    assert carved.count("test") == 200 and 70 < carved.count("validate") < 130 and "12.5%" in source


def test_split_csv_can_be_read_back(root):
    one = data.load("synthetic", str(root), size=32, workers=1)
    rows = list(csv.reader(open(root / "prepared-32/split.csv")))[1:13]
    (root / "mine.csv").write_text("id,split\n" + "".join(
        f"{r[0]},{'val' if k else 'test'}\n" for k, r in enumerate(rows)))
    two = data.load("synthetic", str(root), size=32, workers=1, split_file=str(root / "mine.csv"))
    assert two.receipt["splits"] == {"train": 0, "validate": 11, "test": 1}
    assert len(one.rows()) == 24 and len(two.rows()) == 12
    # every line of the receipt is about those twelve
    assert two.receipt["boxes"] == sum(len(two.boxes[i]) for i in two.rows())
    assert two.receipt["triplets"]["present"] == sum(
        value for i in two.rows() for _, _, value in two.cells(i))
    assert "12 of its 12 ids" in two.receipt["split_source"]


def test_published_matrix_and_train_json(root):
    ids = [path.stem for path in images(root)]
    matrix = np.full((3, 51, 75), -1.0)
    # 2 does not occur in the published file, and is no label
    matrix[1, 5, 8], matrix[1, 6, 10], matrix[2, 0, 0] = 1, 0, 2
    folder = root / "published"
    folder.mkdir()
    np.save(folder / "landmark_observation_adj_mtx.npy", matrix)
    prefix = "/remote-home/share/medical/public/MIMIC-CXR-JPG/MIMIC-CXR/small/files/p1/s2/"
    (folder / "train.json").write_text(json.dumps(
        {f"{prefix}{ids[0]}.jpg": {"labels_id": 1}, f"{prefix}{ids[1]}.jpg": {"labels_id": 2},
         f"{prefix}{ids[2]}.jpg": {"labels_id": 99}}))
    table = data.load("mimic", str(root), size=32, workers=1, triplets=str(folder))
    assert sorted(table.cells(table.ids.index(ids[0]))) == [
        ("effusion", "right_pleural", 1), ("pneumothorax", "pleural_unspec", 0)]
    assert table.receipt["reports"] == {"read": 1, "empty-report": 2, "no-report": 21}


def test_radgraph_file(root):
    study = images(root)[0].parent
    graph = {"text": "left pleural effusion", "entities": {
        "1": {"tokens": "left", "label": "ANAT-DP", "start_ix": 0, "end_ix": 0,
              "relations": [["modify", "2"]]},
        "2": {"tokens": "pleural", "label": "ANAT-DP", "start_ix": 1, "end_ix": 1, "relations": []},
        "3": {"tokens": "effusion", "label": "OBS-DP", "start_ix": 2, "end_ix": 2,
              "relations": [["located_at", "2"]]}}}
    (root / "graphs.json").write_text(json.dumps(
        {f"p10/{study.parent.name}/{study.name}.txt": graph}))
    table = data.load("mimic", str(root), size=32, workers=1, triplets=str(root / "graphs.json"))
    assert table.cells(table.ids.index(images(root)[0].stem)) == [("effusion", "left_pleural", 1)]


# ------------------------------------------------------------------------------------------------
# Label files as published, by hand

def read(dataset, root, split_file=None, views="all"):
    """(label names, {id: item}, problems) of a data set without its images."""
    options = dict(views=views, split_file=split_file, labels="chexpert")
    names, items, problems = data.read_items(dataset, data.find_root(dataset, str(root)), options)
    return names, {item.id: item for item in items}, problems


def test_nih_labels_boxes_and_lists(tmp_path):
    (tmp_path / "Data_Entry_2017.csv").write_text(  # the original: 12 header fields, 11 in a row
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
        "1_000.png,Mass|Pleural_Thickening,0,1,57,M,PA,2682,2749,0.1,0.1\n"
        "2_000.png,No Finding,0,2,57,M,PA,2682,2749,0.1,0.1\n"
        "3_000.png,Massive,0,3,57,M,PA,1,1,0.1,0.1\n")
    (tmp_path / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "1_000.png,Infiltrate,256.0,512.0,128.0,64.0\n")
    (tmp_path / "test_list.txt").write_text("2_000.png\n")
    (tmp_path / "images_004" / "images").mkdir(parents=True)
    (tmp_path / "images_004" / "images" / "1_000.png").touch()
    names, items, problems = read("nih", tmp_path)
    one, two = items["1_000.png"], items["2_000.png"]
    assert [n for n, v in zip(names, one.labels) if v] == ["Mass", "Pleural_Thickening"]
    assert one.boxes == (("Infiltration", 0.25, 0.5, 0.125, 0.0625),) and not any(two.labels)
    assert (one.split, two.split, one.patient) == ("train", "test", "1")
    assert one.path == "images_004/images/1_000.png"
    assert problems == [("unreadable-label", "3_000.png: Massive")]


def test_rsna_boxes_site_paths_and_test_csv(tmp_path):
    (tmp_path / "stage_2_train_labels.csv").write_text(
        "patientId,x,y,width,height,Target\na,,,,,0\nb,256.0,128.0,512.0,64.0,1\n"
        "b,0.0,0.0,102.4,10.24,1\nc,,,,,2\nd,x,1,1,1,1\n")
    site = tmp_path / "mdai" / "1.2" / "1.3"
    site.mkdir(parents=True)
    (site / "1.4.dcm").touch()
    test = tmp_path / "rsna_test.csv"
    test.write_text("ID,img_path,boxes,classes\na,mdai/1.2/1.3/1.4.dcm,nan,0\n")
    names, items, problems = read("rsna", tmp_path, str(test))
    assert items["a"].labels == (0,) and items["b"].labels == (1,)
    assert items["b"].boxes == (("Pneumonia", 0.25, 0.125, 0.5, 0.0625),
                                ("Pneumonia", 0, 0, 0.1, 0.01))
    assert items["a"].path == "mdai/1.2/1.3/1.4.dcm" and len(problems) == 2
    splits, _ = data.settle_splits(list(items.values()), (0.7, 0.15), str(test))
    assert dict(zip(items, splits))["a"] == "test" and "test" not in splits[1:]
    (tmp_path / "stage_2_train_labels.csv").unlink()  # the test csv alone gives labels and boxes
    test.write_text("ID,img_path,boxes,classes\na,x/1.4.dcm,256;512;64;128|0;0;1024;1024,1\n"
                    "b,x/y.dcm,nan,0\nc,x/z.dcm,1;2;3,1\n")
    _, items, problems = read("rsna", tmp_path, str(test))
    assert problems == [("unreadable-label", "box of c")]
    assert items["a"].boxes[0] == ("Pneumonia", 0.25, 0.5, 0.0625, 0.125) and not items["b"].boxes


def test_siim_habits_of_both_files(tmp_path):
    (tmp_path / "train-rle.csv").write_text(
        "ImageId, EncodedPixels\na, -1\nb, 1 2 1022 2\nb, 0 2\nc,1 2 3\nd,1048570 9\ne,x\n")
    names, items, problems = read("siim", tmp_path)
    assert items["a"].labels == (0,) and items["a"].masks == () and items["b"].labels == (1,)
    union = np.any([data.decode_rle(m[2]) for m in items["b"].masks], 0)
    assert np.argwhere(union).tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 1]]  # OR, not a sum
    assert [kind for kind, _ in problems] == ["unreadable-label"] * 3


def test_covidx_lines(tmp_path):
    (tmp_path / "test.txt").write_text(
        "COVID 1 COVID(1).png positive sirm\n5 ARDSSevere.png negative cohen\n\n7 x.png\n"
        "old 3 old.png COVID-19\n")
    (tmp_path / "train.txt").write_text("9 y.jpeg pneumonia rsna\n")
    names, items, problems = read("covidx", tmp_path)
    assert items["COVID(1).png"].patient == "COVID 1" and items["COVID(1).png"].labels == (1,)
    assert items["ARDSSevere.png"].labels == (0,)
    assert items["ARDSSevere.png"].path == "test/ARDSSevere.png"
    assert items["old.png"].patient == "old 3" and items["old.png"].labels == (1,)
    assert items["y.jpeg"].split == "train" and len(problems) == 1


def test_chexpert_paths_values_and_test_release(tmp_path):
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(data.CHEXPERT) + "\n"
    blank, small = "," * 13 + "\n", "CheXpert-v1.0-small"
    (tmp_path / "train.csv").write_text(
        f"{header}{small}/train/patient00001/study1/view1_frontal.jpg,M,60,Frontal,AP,1.0{blank}"
        f"{small}/train/patient00001/study1/view2_lateral.jpg,M,60,Lateral,,1.0{blank}"
        f"{small}/train/patient00002/study1/view1_frontal.jpg,M,60,Frontal,AP,maybe{blank}"
        f"CheXpert,M,60,Frontal,AP,1.0{blank}")
    (tmp_path / "valid.csv").write_text(
        f"{header}{small}/valid/patient64541/study1/view1_frontal.jpg,M,60,Frontal,AP,0.0,1.0"
        f"{blank[1:]}")
    names, items, problems = read("chexpert", tmp_path, views="frontal")
    assert list(items) == ["train/patient00001/study1/view1_frontal",
                           "valid/patient64541/study1/view1_frontal"]
    assert items["valid/patient64541/study1/view1_frontal"].split == "test"  # no test release here
    assert len(read("chexpert", tmp_path)[1]) == 3
    assert [kind for kind, _ in problems] == ["unreadable-label"]  # "maybe"; no study is "CheXpert"
    study = tmp_path / "test" / "patient64741" / "study1"
    study.mkdir(parents=True)
    (study / "view1_frontal.jpg").touch()
    (tmp_path / "groundtruth.csv").write_text(
        "Study," + ",".join(data.CHEXPERT) + "\nCheXpert-v1.0/test/patient64741/study1,1"
        + ",0" * 13 + "\n")
    _, items, _ = read("chexpert", tmp_path)
    assert {i.split for i in items.values()} == {"train", "validate", "test"}
    assert items["test/patient64741/study1/view1_frontal"].labels[0] == 1


def test_openi_xml_and_kaggle_repack(tmp_path):
    folder = tmp_path / "nlm" / "ecgen-radiology"
    folder.mkdir(parents=True)
    (folder / "2.xml").write_text(
        "<r><AbstractText Label='FINDINGS'>Mild left base atelectasis.</AbstractText>"
        "<MeSH><major>Pulmonary Atelectasis/base/left/mild</major></MeSH>"
        "<parentImage id='CXR2_IM-0652-1001'/><parentImage id='CXR2_IM-0652-2001'/></r>")
    (folder / "3.xml").write_text(
        "<r><MeSH><major>No Indexing</major></MeSH><parentImage id='CXR3_1'/></r>")
    (folder / "4.xml").write_text("<r><MeSH>")
    (tmp_path / "nlm" / "nlmcxr_dicom_metadata.csv").write_text(
        "imageid,View Position\nCXR2_IM-0652-1001,PA\nCXR2_IM-0652-2001,LL\n")
    names, items, problems = read("openi", tmp_path / "nlm", views="frontal")
    assert list(items) == ["CXR2_IM-0652-1001", "CXR3_1"] and len(problems) == 1
    one = items["CXR2_IM-0652-1001"]
    assert [n for n, v in zip(names, one.labels) if v == 1] == ["Atelectasis"]
    assert ("atelectasis", 1) in {(p, e) for p, _, e, _ in text.extract_triplets(one.note)}
    assert set(items["CXR3_1"].labels) == {data.UNKNOWN}
    kaggle = tmp_path / "kaggle"
    kaggle.mkdir()
    (kaggle / "indiana_reports.csv").write_text(
        "uid,MeSH,Problems,image,indication,comparison,findings,impression\n"
        "1,Cardiomegaly/borderline;Opacity/lung,x,y,Cough,None,Large heart.,Opacity.\n")
    (kaggle / "indiana_projections.csv").write_text(
        "uid,filename,projection\n1,1_IM-1.dcm.png,Frontal\n1,1_IM-2.dcm.png,Lateral\n")
    _, items, _ = read("openi", kaggle, views="frontal")
    assert list(items) == ["1_IM-1.dcm"]
    assert sum(items["1_IM-1.dcm"].labels) == 2 and "FINDINGS" in items["1_IM-1.dcm"].note


# ------------------------------------------------------------------------------------------------
# Every layout that phantom.py writes, from files to table

LAYOUTS = [(layout, variant) for layout, (_, _, variants) in phantom.LAYOUTS.items()
           for variant in variants]


def one_split_each(patients, splits):
    """Whether no patient is in two splits."""
    return len(set(zip(patients, splits))) == len(set(patients))


@pytest.mark.parametrize("layout,variant", LAYOUTS)
def test_layout_is_read_and_found_clean(tmp_path, layout, variant, capsys):
    pytest.importorskip("pydicom")
    phantom.write(layout, str(tmp_path / "x"), 30, seed=1, size=64, workers=1, variant=variant)
    root, options = data.where_and_how(layout, str(tmp_path / "x"), None, None, "ignore", None,
                                       "rules")
    assert data.check(layout, root, options, 1) == 0, capsys.readouterr().out
    table = data.load(layout, root, size=32, workers=1)
    assert len(table.rows()) == 30 and table.receipt["skipped"] == {}
    assert table.images.reshape(30, -1).std(1).min() > 10
    assert set(np.unique(table.labels)) <= {-1, 0, 1} and (table.labels == 1).any()
    assert table.has_reports == (layout in ("mimic", "openi", "covid-chestxray"))
    assert len(table.rows("train")) > len(table.rows("test")) > 0
    assert one_split_each(table.patients, table.splits)
    for i in table.rows():
        for label, x, y, w, h in table.boxes[i]:
            assert 0 <= x < 1 and 0 <= y < 1 and w > 0 and h > 0
            if label in table.label_names:
                assert table.labels[i, table.label_names.index(label)] == 1
    if layout in ("rsna", "nih", "mimic"):
        assert any(table.boxes)
    if layout == "siim":
        assert all(table.mask(i).any() == table.labels[i, 0] for i in table.rows())


def test_layouts_of_one_data_set_hold_the_same(tmp_path):
    pytest.importorskip("pydicom")
    tables = []
    for variant in phantom.LAYOUTS["siim"][2]:
        phantom.write("siim", str(tmp_path / variant), 12, seed=2, size=64, workers=1,
                      variant=variant)
        tables.append(data.load("siim", str(tmp_path / variant), size=32, workers=1))
    for other in tables[1:]:
        for i, name in enumerate(tables[0].ids):
            k = other.ids.index(name)
            assert tables[0].labels[i] == other.labels[k]
            assert tables[0].mask(i).mean() == pytest.approx(other.mask(k).mean(), abs=2e-3)
            difference = tables[0].images[i].astype(int) - other.images[k]
            assert np.abs(difference).mean() < 4  # JPEG or not


# ------------------------------------------------------------------------------------------------
# The real label files

@real
def test_real_nih(tmp_path):
    for name in ("Data_Entry_2017_v2020.csv.gz", "BBox_List_2017.csv.gz", "test_list.txt"):
        shutil.copy(REAL / "labels" / name, tmp_path)
    names, items, problems = read("nih", tmp_path)
    items = list(items.values())
    assert len(items) == 112_120 and not problems and len({i.patient for i in items}) == 30_805
    assert sum(i.split == "test" for i in items) == 25_596
    assert sum(i.split == "train" for i in items) == 86_524
    assert sum(len(i.boxes) for i in items) == 984 and sum(bool(i.boxes) for i in items) == 880
    counts = dict(zip(names, np.sum([i.labels for i in items], 0)))
    assert counts["Infiltration"] == 19_894 and counts["Fibrosis"] == 1_686
    assert counts["Hernia"] == 227
    assert sum(not any(i.labels) for i in items) == 60_361
    assert all(i.labels[names.index(box[0])] for i in items for box in i.boxes)
    assert max(box[1] + box[3] for i in items for box in i.boxes) < 1
    splits, _ = data.settle_splits(items, data.SOURCES["nih"].made)
    assert one_split_each([i.patient for i in items], splits)
    assert splits.count("test") == 25_596


@real
def test_real_rsna(tmp_path):
    shutil.copy(REAL / "labels/kaggle_stage_2_train_labels.csv.zip",
                tmp_path / "stage_2_train_labels.csv.zip")
    test = str(REAL / "labels/rsna_medslip_test.csv")
    _, items, problems = read("rsna", tmp_path, test)
    assert len(items) == 26_684 and not problems
    assert sum(i.labels[0] for i in items.values()) == 6_012
    assert sum(len(i.boxes) for i in items.values()) == 9_555
    splits, _ = data.settle_splits(list(items.values()), (0.7, 0.15), test)
    chosen = [i for i, s in zip(items.values(), splits) if s == "test"]
    assert len(chosen) == 5_337 and sum(i.labels[0] for i in chosen) == 1_218
    shutil.copy(test, tmp_path / "rsna_test.csv")
    (tmp_path / "stage_2_train_labels.csv.zip").unlink()
    _, alone, _ = read("rsna", tmp_path)
    assert len(alone) == 5_337 and all(sorted(alone[i.id].boxes) == sorted(i.boxes) for i in chosen)


@real
def test_real_siim(tmp_path):
    shutil.copy(REAL / "labels/siim-pneumothorax-train-rle.csv.gz", tmp_path / "train-rle.csv.gz")
    _, items, problems = read("siim", tmp_path)
    items = list(items.values())
    assert len(items) == 12_047 and not problems and sum(i.labels[0] for i in items) == 2_669
    assert sum(len(i.masks) for i in items) == 3_576 and sum(len(i.masks) > 1 for i in items) == 624
    middle, sides = [], []
    for i in [i for i in items if i.masks][:150]:
        rows, columns = np.nonzero(np.any([data.decode_rle(m[2]) for m in i.masks], 0))
        middle.append((rows.mean(), columns.mean()))
        sides.append(columns.max() - columns.min())
    rows, columns = np.transpose(middle)
    # the masks lie in one lung or the other and high up: rows and columns are not exchanged
    assert np.median(rows) < 480 and ((columns < 440) | (columns > 584)).mean() > 0.8


@real
def test_real_chexpert(tmp_path):
    shutil.copy(REAL / "labels/chexpert_train.csv.gz", tmp_path / "train.csv.gz")
    names, items, problems = read("chexpert", tmp_path)
    raw = np.array([i.labels for i in items.values()], np.int8)
    assert len(raw) == 223_414 and not problems
    counts = {name: tuple(int((column == value).sum()) for value in (1, 0, -1))
              for name, column in zip(names, raw.T)}
    assert counts["No Finding"] == (22_381, 0, 0)
    assert counts["Cardiomegaly"] == (27_000, 11_116, 8_087)
    assert counts["Pleural Effusion"] == (86_187, 35_396, 11_628)
    assert counts["Fracture"] == (9_040, 2_512, 642)
    assert sum("frontal" in name for name in items) == 191_027


@real
def test_real_covid_chestxray(tmp_path):
    table = data.load("covid-chestxray", str(REAL / "covid-chestxray"), size=32, workers=1,
                      cache_dir=str(tmp_path))
    assert len(table.rows()) == 527 and table.receipt["skipped"] == {"duplicate": 4, "missing": 11}
    assert table.label_names[0] == "COVID-19" and table.label_pathologies[0] is None
    assert sum(table.receipt["splits"].values()) == 527 and table.has_reports
    assert one_split_each(np.array(table.patients)[table.rows()], table.splits[table.rows()])
    masked = [i for i in table.rows() if table.mask(i, "lung") is not None]
    assert len(masked) > 190
    assert 0.05 < np.mean([table.mask(i, "lung").mean() for i in masked[:20]]) < 0.6


@real
def test_real_openi_reports(tmp_path):
    import tarfile
    with tarfile.open(REAL / "openi/NLMCXR_reports_even.tgz") as archive:
        archive.extractall(tmp_path, filter="data")
    names, items, problems = read("openi", tmp_path)
    assert len({i.patient for i in items.values()}) > 1_900 and not problems
    counts = dict(zip(names, np.sum([np.array(i.labels) == 1 for i in items.values()], 0)))
    assert counts["Cardiomegaly"] > 300 and counts["Atelectasis"] > 250
