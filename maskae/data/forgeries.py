"""`forgeries:PATH@SIZE[:HELD_OUT]`: real photographs as four small deepfake data sets, each with its own camera and its own forgery.

PATH is a folder or an archive of photographs. Each belongs to one domain and gives a real record, and a fake one in which a region, a
random ellipse or box, was replaced before the camera's processing. Everything is drawn from (split_seed, photograph), so records are always
the same. HELD_OUT names a domain that is not trained on; see `maskae.data.domains`.

    domain  camera                                        forgery of the region
    studio  sharp, light JPEG                             blended with soft edges from another photograph of the domain
    webcam  low resolution, strong JPEG                   pasted with hard edges from another photograph
    phone   warm colours, sharpened, medium JPEG          drawn anew by a small linear autoencoder, fitted to the domain's photographs
    night   dark, blurred, with noise                     the photograph itself, moved, with other colours (self-blended)

The card of GM-DF asks for such domains where the real data sets, gated videos of faces, are not at hand.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from maskae.data.archive import ARCHIVE, open_archive
from maskae.data.contract import SPLITS, Source, SourceArguments
from maskae.data.domains import CLASSES, Entry, make_source, split_path
from maskae.data.folder import open_folder
from maskae.data.images import Box, Picture
from maskae.data.resizing import resize
from maskae.data.spec import IMAGE
from maskae.errors import UserError

DOMAINS = ("studio", "webcam", "phone", "night")
SIDE = 96  # pixels at which regions are replaced
PATCH = 8  # of the linear autoencoder, in pixels
CODES = 6  # numbers that it keeps of a patch
FITTED = 48  # photographs that it is fitted to
REGION = (0.3, 0.6)  # height and width of the region as shares of the side
BLUR = np.array([1, 4, 6, 4, 1]) / 16


@dataclass(frozen=True)
class Photographs:
    """The photographs of both splits one after the other, each cut to its central square."""

    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def place(self, number: int) -> tuple[int, int]:
        """(split, record) of a photograph."""
        first = len(self.sources[0])
        return (0, number) if number < first else (1, number - first)

    def name(self, number: int) -> str:
        """The photograph's file."""
        split, index = self.place(number)
        return self.sources[split].name(index)

    def __getitem__(self, number: int) -> np.ndarray:
        """float64 [SIDE, SIDE, 3] in 0..255."""
        split, index = self.place(number)
        picture = Picture(self.sources[split][index][IMAGE], 3)
        height, width = picture.size
        side = min(height, width)
        square = Box((height - side) // 2, (width - side) // 2, side, side)
        return picture.crop(square, SIDE, SIDE).astype(np.float64)


def blur(image: np.ndarray, times: int = 1) -> np.ndarray:
    """[H, W, ...] smoothed by a binomial filter of 5 pixels along both axes, edges repeated."""
    for axis in (0, 1) * times:
        padded = np.pad(image, [(2, 2) if each == axis else (0, 0) for each in range(image.ndim)], mode="edge")
        count = image.shape[axis]
        image = sum(weight * np.take(padded, range(k, k + count), axis) for k, weight in enumerate(BLUR))
    return image


def region(generator: np.random.Generator, ellipse: bool) -> np.ndarray:
    """A random region as weights 0 or 1, float64 [SIDE, SIDE]."""
    size = generator.uniform(*REGION, 2) * SIDE / 2
    centre = generator.uniform(size, SIDE - size)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    down, across = np.abs(rows - centre[0]) / size[0], np.abs(columns - centre[1]) / size[1]
    return (down**2 + across**2 < 1 if ellipse else np.maximum(down, across) < 1).astype(np.float64)


def moved(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The image moved by a few pixels with another brightness and other colours."""
    shift = generator.integers(2, 6, 2) * generator.choice((-1, 1), 2)
    gain, offset = generator.uniform(0.85, 1.15, 3), generator.uniform(-12, 12, 3)
    return np.clip(np.roll(image, shift, (0, 1)) * gain + offset, 0, 255)


def to_patches(image: np.ndarray) -> np.ndarray:
    """[SIDE, SIDE, 3] -> [patches, PATCH * PATCH * 3]."""
    count = SIDE // PATCH
    return image.reshape(count, PATCH, count, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(count**2, -1)


@dataclass(frozen=True)
class LinearAutoencoder:
    """The best linear autoencoder of patches with `CODES` hidden units: their mean [V] and first principal axes [CODES, V]."""

    mean: np.ndarray
    axes: np.ndarray

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """[SIDE, SIDE, 3] drawn anew."""
        codes = (to_patches(image) - self.mean) @ self.axes.T
        patches = codes @ self.axes + self.mean
        count = SIDE // PATCH
        again = patches.reshape(count, count, PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(SIDE, SIDE, 3)
        return np.clip(again, 0, 255)


def fit_autoencoder(photographs: Photographs, numbers: Sequence[int]) -> LinearAutoencoder:
    """The autoencoder of some photographs' patches."""
    patches = np.concatenate([to_patches(photographs[number]) for number in numbers])
    mean = patches.mean(0)
    return LinearAutoencoder(mean, np.linalg.eigh(np.cov((patches - mean).T))[1][:, ::-1][:, :CODES].T)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """The image written as a JPEG file and read again, uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(np.clip(np.round(image), 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def studio(image: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Sharp; JPEG quality 88 to 95."""
    return jpeg(_resized(image, size), int(generator.integers(88, 96)))


def webcam(image: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Taken at 0.6 to 0.8 of the resolution; JPEG quality 45 to 65."""
    small = _resized(image, int(size * generator.uniform(0.6, 0.8)))
    return jpeg(_resized(small, size), int(generator.integers(45, 66)))


def phone(image: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Red gains and blue loses 5 to 15 %, edges are sharpened; JPEG quality 70 to 85."""
    cast = generator.uniform(0.05, 0.15)
    warm = _resized(image, size) * np.array([1 + cast, 1.0, 1 - cast])
    return jpeg(warm + 0.6 * (warm - blur(warm)), int(generator.integers(70, 86)))


def night(image: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """At 0.35 to 0.6 of the brightness, blurred a little, with noise of 2 to 5 levels; JPEG quality 80 to 90."""
    dark = _resized(image, size) * generator.uniform(0.35, 0.6)
    soft = 0.5 * dark + 0.5 * blur(dark)
    return jpeg(soft + generator.normal(0, generator.uniform(2, 5), soft.shape), int(generator.integers(80, 91)))


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    return resize(np.clip(np.round(image), 0, 255).astype(np.uint8), size, size).astype(np.float64)


CAMERAS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "studio": studio,
    "webcam": webcam,
    "phone": phone,
    "night": night,
}


@dataclass(frozen=True)
class Forger:
    """Makes the image of a record, uint8 [size, size, 3]. `others` are each domain's photographs, by split."""

    photographs: Photographs
    size: int
    seed: int
    others: tuple[tuple[tuple[int, ...], ...], ...]
    autoencoder: LinearAutoencoder

    def __call__(self, entry: Entry) -> np.ndarray:
        number = int(entry.item)
        generator = np.random.default_rng([self.seed, number, entry.label])
        image = self.photographs[number]
        if entry.label:
            image = self.forge(image, number, entry.domain, generator)
        return CAMERAS[DOMAINS[entry.domain]](image, self.size, generator)

    def forge(self, image: np.ndarray, number: int, domain: int, generator: np.random.Generator) -> np.ndarray:
        """The photograph with a region replaced as the domain does."""
        name = DOMAINS[domain]
        weights = region(generator, ellipse=name in ("studio", "night"))
        if name == "phone":
            other = self.autoencoder(image)
        elif name == "night":
            other = moved(image, generator)
        else:
            beside = self.others[domain][self.photographs.place(number)[0]]
            other = self.photographs[int(generator.choice([each for each in beside if each != number] or [number]))]
        if name in ("studio", "night"):
            weights = blur(weights, times=2 if name == "studio" else 1)
        return image + weights[:, :, None] * (other - image)


def open_forgeries(arguments: SourceArguments) -> Source:
    """The split of the four domains. Raises UserError for a path without photographs or a size that is none."""
    path, held_out = split_path(arguments)
    folder, _, size = path.partition("@")
    if not size.isdigit() or int(size) < 8:
        raise UserError(f"{arguments.name}: give the side in pixels after an @, at least 8, as in forgeries:photographs@48")
    if arguments.channels not in (None, 3):
        raise UserError(f"{arguments.name}: the cameras take pictures of 3 channels, not {arguments.channels}")
    plain = dataclasses.replace(arguments, path=folder, statistics="unit", channels=3)
    opened = open_archive if (plain.base / folder / ARCHIVE).is_file() else open_folder
    photographs = Photographs(tuple(opened(dataclasses.replace(plain, split=split)) for split in SPLITS))
    split_of = [photographs.place(n)[0] for n in range(len(photographs))]
    others = tuple(
        tuple(tuple(n for n in range(domain, len(photographs), len(DOMAINS)) if split_of[n] == split) for split in range(len(SPLITS)))
        for domain in range(len(DOMAINS))
    )
    entries = [
        Entry(n % len(DOMAINS), label, n, f"{photographs.name(n)} ({CLASSES[label]})", split_of[n] == 1)
        for n in range(len(photographs))
        for label in range(len(CLASSES))
    ]
    autoencoder = fit_autoencoder(photographs, others[DOMAINS.index("phone")][0][:FITTED])
    forger = Forger(photographs, int(size), arguments.split_seed, others, autoencoder)
    return make_source(arguments, entries, DOMAINS, held_out, forger, (int(size), int(size), 3))
