"""Image and mask files: PNG, JPEG and DICOM to grey pixels, five kinds of masks to booleans."""
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

DICOM = (".dcm", ".dicom")


def read_image(path, size=None, equalize=False):
    """uint8 [H,W] of a PNG, JPEG or DICOM file, or [size,size] squashed. Bright is dense.
    equalize: a DICOM's histogram is made even, over the whole image, as in MIMIC-CXR-JPG."""
    if path.lower().endswith(DICOM):
        image = Image.fromarray(read_dicom(path))
        if equalize:
            image = ImageOps.equalize(image)
    else:
        image = Image.open(path)
        if size:  # a JPEG decodes straight to the smallest eighth that is still >= size
            image.draft("L", (size, size))
        if image.mode.startswith(("I", "F")):  # 16 bits or more
            image = Image.fromarray(to_bytes(np.asarray(image)))
    image = image.convert("L")
    if size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    return np.asarray(image)


def read_dicom(path):
    """uint8 [H,W] of a DICOM file: rescaled, windowed, inverted where it is MONOCHROME1."""
    from pydicom import dcmread, pixels as luts
    file = dcmread(path)
    pixels = luts.apply_voi_lut(luts.apply_modality_lut(file.pixel_array, file), file)
    if pixels.dtype != np.uint8:
        pixels = to_bytes(pixels)
    return 255 - pixels if file.PhotometricInterpretation == "MONOCHROME1" else pixels


def to_bytes(pixels):
    """Any range -> uint8 by minimum and maximum, as MIMIC-CXR-JPG was made from DICOM."""
    pixels = pixels.astype(np.float32)
    low, high = pixels.min(), pixels.max()
    return ((pixels - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)


def trouble(path):
    """Why a file cannot be used, in a word."""
    if not os.path.isfile(path):
        return "missing"
    if not os.access(path, os.R_OK):
        return "unreadable"
    head = Path(path).read_bytes()[:40]
    if head.startswith(b"version https://git-lfs"):
        return "git-lfs pointer"
    return "corrupt" if head else "empty"


def read_mask(root, mask, size=256):
    """bool [H,W] of a formats.Mask; a box is filled on a grid of size x size."""
    if mask.kind == "box":
        x, y, width, height = mask.place
        left, right = round(x * size), round((x + width) * size)
        top, bottom = round(y * size), round((y + height) * size)
        film = np.zeros((size, size), bool)
        # a thin box keeps one pixel: an empty mask would say that nothing is there
        film[top:max(bottom, top + 1), left:max(right, left + 1)] = True
        return film
    if mask.kind == "rle":
        return decode_rle(mask.source)
    path = os.path.join(root, mask.source)
    if mask.kind == "file":
        return read_image(path) > 127
    if mask.kind == "bit":
        return (read_image(path) >> mask.place) & 1 > 0
    # "crop": a part of the film, in any colour on black
    part = Image.fromarray(np.asarray(Image.open(path).convert("RGB")).max(-1) > 0)
    x, y, width, height = mask.place
    film = Image.new("1", (round(part.width / width), round(part.height / height)))
    film.paste(part, (round(x * film.width), round(y * film.height)))
    return np.asarray(film)


def decode_rle(rle, size=1024):
    """SIIM's text, pairs of a gap and the length of a run down the columns -> bool [1024,1024]."""
    edges = np.cumsum([int(number) for number in rle.split()])  # start, end, start, end, ...
    flat = np.zeros(size * size, bool)
    for start, end in edges.reshape(-1, 2):
        flat[start:end] = True
    return flat.reshape(size, size).T
