"""Image and mask files: PNG, JPEG and DICOM to grey pixels, four kinds of masks to booleans.

    from formats.images import read_image
    pixels = read_image("chest.dcm")          # uint8 [H,W], bright is dense
"""
import os

import numpy as np
from PIL import Image


def read_image(path, size=None):
    """uint8 [H,W] of a PNG, JPEG or DICOM file, or [size,size] squashed. Bright is dense."""
    if path.lower().endswith((".dcm", ".dicom")):
        image = Image.fromarray(read_dicom(path))
    else:
        with Image.open(path) as image:
            if size:  # a JPEG decodes straight to the smallest eighth that is still >= size
                image.draft("L", (size, size))
            image.load()
        if image.mode.startswith(("I", "F")):  # 16 bits or more
            image = Image.fromarray(to_bytes(np.asarray(image)))
        image = image.convert("L")
    if size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    return np.asarray(image)


def read_dicom(path):
    """uint8 [H,W] of a DICOM file: rescaled, windowed, inverted where it is MONOCHROME1."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    file = pydicom.dcmread(path)
    pixels = file.pixel_array
    if file.get("SamplesPerPixel", 1) == 3:
        pixels = pixels.mean(-1)
    elif pixels.ndim == 3:  # several frames
        pixels = pixels[0]
    pixels = apply_modality_lut(pixels, file)
    if "WindowCenter" in file or "VOILUTSequence" in file:
        pixels = apply_voi_lut(pixels, file)
    if pixels.dtype != np.uint8:
        pixels = to_bytes(pixels)
    return 255 - pixels if file.get("PhotometricInterpretation") == "MONOCHROME1" else pixels


def to_bytes(pixels):
    """Any range -> uint8 by minimum and maximum, as MIMIC-CXR-JPG was made from DICOM."""
    pixels = pixels.astype(np.float32)
    low, high = pixels.min(), pixels.max()
    return ((pixels - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)


def trouble(path):
    """In one word why a file cannot be used."""
    if not os.path.exists(path):
        return "missing"
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        return "unreadable"
    with open(path, "rb") as file:
        head = file.read(40)
    if not head:
        return "empty"
    return "git-lfs pointer" if head.startswith(b"version https://git-lfs") else "corrupt"


def read_mask(root, mask):
    """bool [H,W] of a formats.Mask."""
    if mask.kind == "rle":
        return decode_rle(mask.source)
    path = os.path.join(root, mask.source)
    if mask.kind == "file":
        return read_image(path) > 127
    if mask.kind == "bit":
        return (read_image(path) >> mask.place) & 1 > 0
    with Image.open(path) as image:  # "crop": a part of the film, drawn in any colour on black
        part = np.asarray(image.convert("RGB")).max(-1) > 0                     # [h,w]
    x, y, width, height = mask.place
    film = np.zeros((round(part.shape[0] / height), round(part.shape[1] / width)), bool)
    top, left = round(y * len(film)), round(x * film.shape[1])
    inside = film[top:top + part.shape[0], left:left + part.shape[1]]  # rounding may cut one pixel
    inside |= part[:inside.shape[0], :inside.shape[1]]
    return film


def decode_rle(rle, size=1024):
    """SIIM's text -> bool [1024,1024]: pairs (gap since the last run, length of this run), column
    by column from the top left."""
    numbers = [int(number) for number in rle.split()]
    flat, position = np.zeros(size * size, bool), 0
    for gap, length in zip(numbers[::2], numbers[1::2]):
        position += gap
        flat[position:position + length] = True
        position += length
    return flat.reshape(size, size).T
