"""The edges of a cutout: alpha at the photo's own size, and the persons' colours where they mix with the background.

Both are estimated on the network's square and applied to every pixel of the photo, so they cost little at any size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from cutting.photos import Photo
from loading.letterbox import resize, restore, unpadded

# Radii and sigmas are in pixels of the square.
GUIDE_RADIUS = 2  # of the guided filter's window: an edge of the photo is found this far from the network's
GUIDE_EPSILON = 1e-4  # variance of colours in [0, 1] below which they explain nothing: 2.5 steps of 8 bits
FLAT = 1e-6  # variance of alpha below which there is no edge
ALPHA_MARGIN = 0.05  # probabilities this close to 0 or 1 become 0 or 1
ANTIALIAS_KERNEL = np.array([0.25, 0.5, 0.25], np.float32)  # along each axis: then a linear enlargement shows no steps
CUT_SMOOTHING = 0.25  # sigma of the blur of alpha before a threshold cuts it
COLOUR_RADII = (6, 2)  # of the means that estimate the colours on both sides of an edge, the wide one first
NO_SECOND_MAP: Any = None  # of coordinates, for cv2.remap, whose type hints do not know that the first may have both
NO_WEIGHT = 1e-3  # mean of weights in [0, 1] below which there is nothing to average

dot = functools.partial(np.einsum, "hwc,hwc->hw")  # of the two vectors at each pixel


def refine_alpha(probabilities: np.ndarray, square: np.ndarray, metadata: dict, rgb: np.ndarray) -> np.ndarray:
    """Returns alpha at the photo's size, float32 (H, W) in [0, 1], following the photo's edges if it is enlarged.

    The fast guided filter (He and Sun 2015): a linear model of alpha by colour is fitted on the square and evaluated
    on the photo. Nothing is stretched: where the network sees nobody, alpha stays 0.

    Args:
        probabilities: of a person, float32 (S, S).
        square, metadata: what `letterbox` returned for the photo, uint8 (S, S, 3) and a dictionary.
        rgb: the photo, uint8 (H, W, 3).
    """
    if metadata["scale"] >= 1:
        return restore(probabilities, metadata)
    padding = metadata["padding"]
    factors, constant, near_edge = fit_linear_model(unpadded(square, padding), unpadded(probabilities, padding))
    alpha = resize(constant, rgb.shape[1::-1])
    affected = enlarge_mask(cv2.dilate(near_edge, np.ones((3, 3), np.uint8)), alpha.shape)  # linear: one pixel further
    for rows, columns, local_factors in enlarge_at(affected, factors, alpha.shape):
        alpha[rows, columns] += np.einsum("nc,nc->n", local_factors, rgb[rows, columns])
    return np.clip(alpha, 0, 1, out=alpha)


def fit_linear_model(guide: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fits alpha, float32 (h, w), as a linear function of the colours around each pixel of the guide, uint8 (h, w, 3).

    The guided filter of He et al. 2013 for a colour guide, equations 19 to 21, with one addition: where the colours do
    not explain alpha, such as at an edge between equal ones, alpha stays as the network drew it, anti-aliased. Returns
    the colours' factors, float32 (h, w, 3), the constant (h, w), and where factors may differ from 0, uint8 (h, w).
    """
    colours = guide.astype(np.float32) / 255
    mean, mean_alpha = local_mean(colours), local_mean(alpha)
    covariance = local_mean(colours * alpha[..., None]) - mean * mean_alpha[..., None]
    variance = local_mean(alpha * alpha) - mean_alpha**2
    edges = variance > FLAT  # elsewhere the mean of alpha is the whole model
    factors = np.zeros_like(colours)
    factors[edges] = np.linalg.solve(colour_covariances(colours, mean, edges), covariance[edges][..., None])[..., 0]
    constant = local_mean(mean_alpha - dot(factors, mean))
    explained = np.clip(dot(factors, covariance) / np.maximum(variance, FLAT), 0, 1)
    factors = local_mean(factors)
    unexplained = local_mean(1 - explained)
    antialiased = cv2.sepFilter2D(alpha, -1, ANTIALIAS_KERNEL, ANTIALIAS_KERNEL, borderType=cv2.BORDER_REFLECT)
    drawn = alpha + unexplained * (antialiased - alpha)
    constant += unexplained * (drawn - dot(factors, colours) - constant)
    near_edge = cv2.dilate(edges.astype(np.uint8), np.ones((2 * GUIDE_RADIUS + 1,) * 2, np.uint8))
    return factors / 255, constant, near_edge


def colour_covariances(colours: np.ndarray, mean: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Returns the covariance of the colours around each selected pixel, float32 (n, 3, 3), never singular."""
    products = np.einsum("hwi,hwj->hwij", colours, colours).reshape(*colours.shape[:2], 9)
    mean_products = np.einsum("ni,nj->nij", mean[selected], mean[selected])
    ridge = GUIDE_EPSILON * np.eye(3, dtype=np.float32)
    return local_mean(products)[selected].reshape(-1, 3, 3) - mean_products + ridge


def local_mean(values: np.ndarray, radius: int = GUIDE_RADIUS) -> np.ndarray:
    """Returns the mean of values (h, w) or (h, w, c) in the square window around each pixel."""
    return cv2.blur(values, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT)


def enlarge_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resizes a uint8 mask to (height, width), each pixel to the nearest."""
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST)


def enlarge_at(mask: np.ndarray, picture: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple]:
    """Yields rows, columns and values (n, 3) of a float32 picture (h, w, 3) resized linearly to (height, width).

    Only of the pixels of the mask (height, width), up to 16,384 at a time.
    """
    scale = np.divide(picture.shape[1::-1], shape[::-1]).astype(np.float32)
    for top in range(0, shape[0], 32):  # a strip's coordinates take little memory
        pixels = cv2.findNonZero(mask[top : top + 32])  # x and y; None if there is none
        points = np.empty((0, 1, 2), np.int32) if pixels is None else pixels.reshape(-1, 1, 2) + (0, top)
        for start in range(0, len(points), 2**14):  # remap takes fewer than 2**15
            chunk = points[start : start + 2**14]
            coordinates = ((chunk + 0.5) * scale - 0.5).astype(np.float32)
            values = cv2.remap(picture, coordinates, NO_SECOND_MAP, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            yield chunk[:, 0, 1], chunk[:, 0, 0], values.reshape(-1, 3)


def to_opacity(
    alpha: np.ndarray, photo_alpha: np.ndarray | None, threshold: float | None = None, scale: float = 1.0
) -> np.ndarray:
    """Returns alpha as uint8 (H, W): soft, or with a threshold as `hard_edge` draws it.

    The soft one has a margin: a network is never quite sure, and a thin haze of the background would stay.

    Args:
        alpha: float32 (H, W) in [0, 1]; with a threshold it is modified in place.
        photo_alpha: the photo's own, uint8 (H, W), if it has one; the smaller of the two counts.
        threshold: the probability above which a pixel is opaque, or None.
        scale: pixels of the network's square for one of the photo.
    """
    if threshold is None:
        slope = 255 / (1 - 2 * ALPHA_MARGIN)
        clipped = np.clip(alpha, ALPHA_MARGIN, 1 - ALPHA_MARGIN)
        opacity = cv2.convertScaleAbs(clipped, alpha=slope, beta=-slope * ALPHA_MARGIN)
    else:
        opacity = hard_edge(alpha, threshold, scale)
    # Not their product: it would shrink the person's edge each time that a cutout is cut out again.
    return opacity if photo_alpha is None else np.minimum(opacity, photo_alpha)


def hard_edge(alpha: np.ndarray, threshold: float, scale: float) -> np.ndarray:
    """Returns alpha cut at a threshold, uint8 (H, W): 128 or more exactly where the smoothed alpha exceeds it.

    The edge is one pixel soft: the part of that pixel which lies inside a straight contour.
    """
    if scale < 1:  # on a photo larger than the square alpha follows the texture, which would tear the cut
        cv2.GaussianBlur(alpha, (0, 0), CUT_SMOOTHING / scale, dst=alpha)  # a copy would be the peak of memory
        np.minimum(alpha, 1, out=alpha)  # a sum of weights, rounded, may exceed 1
    opacity = (alpha > threshold).astype(np.uint8) * np.uint8(255)
    edge = cv2.morphologyEx(opacity, cv2.MORPH_GRADIENT, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    rows, columns = np.nonzero(edge)
    distance = (alpha[rows, columns] - threshold) / np.maximum(gradient_length(alpha, rows, columns), NO_WEIGHT)
    coverage = 255 * np.clip(0.5 + distance, 0, 1)
    opacity[rows, columns] = np.where(opacity[rows, columns] > 0, np.maximum(coverage, 128), coverage)
    return opacity


def gradient_length(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns the length of the gradient of values (H, W), per pixel, at some pixels: (n,)."""
    below, right = np.minimum(rows + 1, values.shape[0] - 1), np.minimum(columns + 1, values.shape[1] - 1)
    above, left = np.maximum(rows - 1, 0), np.maximum(columns - 1, 0)
    down = (values[below, columns] - values[above, columns]) / np.maximum(below - above, 1)  # 1 at the border, else 2
    across = (values[rows, right] - values[rows, left]) / np.maximum(right - left, 1)
    return np.hypot(down, across)


def estimate_foreground(
    photo: Photo, opacity: np.ndarray, square: np.ndarray, metadata: dict, hide_background: bool = False
) -> np.ndarray:
    """Returns the persons' own colours, uint8 (H, W, 3): at soft edges without what the background adds to them.

    Wherever opacity is 255, and where it is 0 unless the background is hidden, they are the photo's pixels. Where the
    photo's own alpha is below 255, its colours are taken for pure already.

    If the background is to be hidden, pixels of opacity 0 turn black, except a band around the persons that continues
    their colours: whoever scales a cutout mixes in what lies beside its edge.
    """
    content = unpadded(square, metadata["padding"])
    coarse = resize(opacity, content.shape[1::-1])
    window = np.ones((2 * COLOUR_RADII[0] + 1,) * 2, np.uint8)
    near_persons, near_background = (cv2.dilate(cv2.inRange(coarse, *side), window) for side in ((230, 255), (0, 25)))
    near_both = enlarge_mask(cv2.bitwise_and(near_persons, near_background), opacity.shape)
    mixed = cv2.bitwise_and(cv2.inRange(opacity, 1, 254), near_both)
    if photo.alpha is not None:
        mixed[photo.alpha < 255] = 0
    pure = without_background(photo.rgb, opacity, content, coarse) if hide_background else photo.rgb.copy()
    persons, background = (enlarge_at(mixed, mean, opacity.shape) for mean in colours_of_both_sides(content, coarse))
    for (rows, columns, inside), (_, _, outside) in zip(persons, background, strict=True):
        pure[rows, columns] = unmix(photo.rgb[rows, columns], opacity[rows, columns], inside, outside)
    return pure


def without_background(rgb: np.ndarray, opacity: np.ndarray, content: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Returns a copy of the photo, black where opacity is 0, but for a band around the persons of their mean colours.

    Those are taken of `content` and `coarse`: photo and opacity at the square's resolution.
    """
    weights = cv2.cvtColor(coarse, cv2.COLOR_GRAY2RGB).astype(np.float32) / 255
    weights **= 4  # all but leaves out mixed pixels wherever there are pure ones
    total = local_mean(weights, COLOUR_RADII[0])
    colours = weighted_mean(content.astype(np.float32), weights, total, np.float32(0), COLOUR_RADII[0])
    averaged = (total[..., 0] > NO_WEIGHT).astype(np.uint8) * 255
    known = cv2.erode(averaged, np.ones((3, 3), np.uint8))  # to be enlarged, a pixel needs its neighbours' colours too
    pure, band = cv2.bitwise_and(rgb, rgb, mask=opacity), cv2.inRange(opacity, 0, 0)
    for rows, columns, values in enlarge_at(band & enlarge_mask(known, opacity.shape), colours, opacity.shape):
        pure[rows, columns] = values + 0.5
    return pure


def colours_of_both_sides(picture: np.ndarray, opacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean colours of the persons and of the background around each pixel, float32 (h, w, 3), 0 to 255.

    The blur fusion of Forte 2021 ("Approximate Fast Foreground Colour Estimation") with the second pass that he
    recommends: a wide one, so that there are colours everywhere, then a narrow one.
    """
    colours, alpha = picture.astype(np.float32), cv2.cvtColor(opacity, cv2.COLOR_GRAY2RGB).astype(np.float32) / 255
    persons = background = mean_persons = mean_background = colours
    for radius in COLOUR_RADII:
        weight = local_mean(alpha, radius)
        mean_persons = weighted_mean(persons, alpha, weight, mean_persons, radius)
        mean_background = weighted_mean(background, 1 - alpha, 1 - weight, mean_background, radius)
        mixture = mean_persons * alpha + mean_background * (1 - alpha)
        persons, background = np.clip(mean_persons + alpha * (colours - mixture), 0, 255), mean_background
    return mean_persons, mean_background


def weighted_mean(
    colours: np.ndarray, weights: np.ndarray, total: np.ndarray, otherwise: np.ndarray, radius: int
) -> np.ndarray:
    """Returns the weighted mean of the colours around each pixel; `otherwise` where the weights' mean `total` is 0."""
    return np.where(total > NO_WEIGHT, local_mean(colours * weights, radius) / np.maximum(total, NO_WEIGHT), otherwise)


def unmix(mixed: np.ndarray, opacity: np.ndarray, persons: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Returns the persons' part of mixed colours, uint8 (n, 3), given both sides' mean colours, float32 (n, 3)."""
    alpha = opacity.astype(np.float32)[:, None] / 255
    pure = persons + alpha * (mixed - persons * alpha - background * (1 - alpha))  # plus what the means leave open
    return np.clip(pure + 0.5, 0, 255).astype(np.uint8)
