"""The edges of a cutout: alpha at the photo's own size, and the persons' colours where they mix with the background.

Both are found on the network's square and applied to every pixel of the photo: they cost little at any size.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from cutting.photos import strips
from loading.letterbox import resize, restore, unpadded

GUIDE_RADIUS = 2  # pixels of the square: an edge is looked for within so many
GUIDE_EPSILON = 1e-4  # variance of the colours, in [0, 1], below which they say nothing: 2.5 steps of 8 bits
FLAT = 1e-6  # variance of alpha below which there is no edge
HAZE = 0.05  # probabilities this near to 0 or 1 are taken for it
WITHOUT_STAIRS = np.float32([0.25, 0.5, 0.25])  # of the square, as a filter: then a linear enlargement shows no steps
CUT_SMOOTHING = 0.25  # pixels of the square: the sigma by which alpha is smoothed before it is cut
COLOUR_RADII = (6, 2)  # pixels of the square: from how far the colours of both sides of an edge are taken
NOTHING = 1e-3  # a mean of weights in [0, 1] below which there is nothing to be averaged


def alpha_of(probabilities: np.ndarray, square: np.ndarray, metadata: dict, rgb: np.ndarray) -> np.ndarray:
    """From the network's square to the photo's alpha: the one place where that happens.

    Where the photo is larger than the square, alpha follows the photo's own edges: the fast guided filter (He and
    Sun 2015), whose linear model of alpha by colour is fitted on the square and evaluated on the photo.

    Args:
        probabilities: of a person, float32 (S, S).
        square, metadata: what `letterbox` returned for the photo, uint8 (S, S, 3).
        rgb: the photo, uint8 (H, W, 3).

    Returns:
        float32 (H, W) in [0, 1], never stretched: where the model sees nobody it stays empty.
    """
    if metadata["scale"] >= 1:
        return restore(probabilities, metadata)
    factors, constant, edges = linear_model(*(unpadded(part, metadata["padding"]) for part in (square, probabilities)))
    alpha = resize(constant, rgb.shape[1::-1])
    reached = enlarged_mask(cv2.dilate(edges, np.ones((3, 3), np.uint8)), alpha.shape)  # by an interpolation from edges
    for rows, columns, local in enlarged_at(reached, factors, alpha.shape):
        alpha[rows, columns] += np.einsum("nc,nc->n", local, rgb[rows, columns])
    return np.clip(alpha, 0, 1, out=alpha)


def linear_model(guide: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Alpha (h, w) by the guide's colours around each pixel, which is uint8 (h, w, 3).

    The guided filter of He et al. 2013 for a colour guide, its equations 19 to 21. One thing is added: what the
    colours cannot explain, such as an edge between equal ones, stays as the network drew it, but for the filter that
    keeps a steep edge of the square from becoming a flight of stairs on a large photo.

    Returns:
        Factors of the colours, float32 (h, w, 3); the constant, float32 (h, w); where factors may differ from 0, uint8.
    """
    colours = guide.astype(np.float32) / 255
    mean, mean_alpha = mean_around(colours), mean_around(alpha)
    covariance = mean_around(colours * alpha[..., None]) - mean * mean_alpha[..., None]
    variance = mean_around(alpha * alpha) - mean_alpha**2
    edges = variance > FLAT  # elsewhere alpha's mean says it all
    factors = np.zeros_like(colours)
    factors[edges] = np.linalg.solve(covariances(colours, mean, edges), covariance[edges][..., None])[..., 0]
    constant = mean_around(mean_alpha - dot(factors, mean))
    explained = np.clip(dot(factors, covariance) / np.maximum(variance, FLAT), 0, 1)
    factors = mean_around(factors)
    unexplained = mean_around(1 - explained)
    smooth = cv2.sepFilter2D(alpha, -1, WITHOUT_STAIRS, WITHOUT_STAIRS, borderType=cv2.BORDER_REFLECT)
    drawn = alpha + unexplained * (smooth - alpha)
    constant += unexplained * (drawn - dot(factors, colours) - constant)
    reached = cv2.dilate(edges.astype(np.uint8), np.ones((2 * GUIDE_RADIUS + 1,) * 2, np.uint8))
    return factors / 255, constant, reached


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("hwc,hwc->hw", a, b)


def covariances(colours: np.ndarray, mean: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of the colours around each chosen pixel: float32 (n, 3, 3), never singular."""
    products = np.einsum("hwi,hwj->hwij", colours, colours).reshape(*colours.shape[:2], 9)
    means = np.einsum("ni,nj->nij", mean[chosen], mean[chosen])
    return mean_around(products)[chosen].reshape(-1, 3, 3) - means + GUIDE_EPSILON * np.eye(3, dtype=np.float32)


def mean_around(values: np.ndarray, radius: int = GUIDE_RADIUS) -> np.ndarray:
    return cv2.blur(values, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT)


def enlarged_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST)


def enlarged_at(mask: np.ndarray, picture: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple]:
    """A float32 picture (h, w, 3) as a resize to (height, width) would give it, at the pixels of the mask alone.

    Yields:
        Rows (n,), columns (n,) and values (n, 3), some thousand pixels at a time.
    """
    scale = np.divide(picture.shape[1::-1], shape[::-1]).astype(np.float32)
    for strip in strips(shape[0], 32):  # remap takes fewer than 2**15 places: of a wider photo several times
        found = cv2.findNonZero(mask[strip])  # x and y; None where there is none
        points = np.empty((0, 1, 2), np.int32) if found is None else found.reshape(-1, 1, 2) + (0, strip.start)
        for start in range(0, len(points), 2**14):
            chosen = points[start : start + 2**14]
            places = ((chosen + 0.5) * scale - 0.5).astype(np.float32)
            values = cv2.remap(picture, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            yield chosen[:, 0, 1], chosen[:, 0, 0], values.reshape(-1, 3)


def to_opacity(
    alpha: np.ndarray, photo_alpha: np.ndarray | None, threshold: float | None = None, scale: float = 1.0
) -> np.ndarray:
    """Alpha in [0, 1], float32 (H, W), as uint8 (H, W): soft, or with a threshold as `hard_edged` draws it.

    A network is never quite sure: without a margin a thin haze of the background would stay. With a threshold `alpha`
    is used up, and `scale` is the pixels of the square for one of the photo, by which it is smoothed; at 1 it is not.

    No more opaque than the photo was, by the smaller of the two: both draw the same person's edge, and a
    product would eat it away a little more each time that a cutout is cut out again.
    """
    if threshold is None:
        slope = 255 / (1 - 2 * HAZE)
        opacity = cv2.convertScaleAbs(np.clip(alpha, HAZE, 1 - HAZE), alpha=slope, beta=-slope * HAZE)
    else:
        opacity = hard_edged(alpha, threshold, scale)
    return opacity if photo_alpha is None else np.minimum(opacity, photo_alpha)


def hard_edged(alpha: np.ndarray, threshold: float, scale: float) -> np.ndarray:
    """255 where the smoothed alpha exceeds the threshold, 0 elsewhere, and between them one pixel of soft edge.

    Alpha follows every texture of the photo that crosses an edge, and a cut would be torn by it: it is smoothed first.
    The soft edge is how much of a pixel lies on the inside, of a contour that is straight within it.

    Args:
        alpha: float32 (H, W) in [0, 1]; it is used up where the photo is larger than the square.
        scale: pixels of the square for one of the photo.

    Returns:
        uint8 (H, W): 128 or more exactly where the smoothed alpha exceeds the threshold.
    """
    if scale < 1:
        cv2.GaussianBlur(alpha, (0, 0), CUT_SMOOTHING / scale, dst=alpha)  # a second one would be the peak of memory
        np.minimum(alpha, 1, out=alpha)  # a sum of weights, rounded, may exceed it
    opacity = (alpha > threshold).astype(np.uint8) * np.uint8(255)
    edge = cv2.morphologyEx(opacity, cv2.MORPH_GRADIENT, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    rows, columns = np.nonzero(edge)
    values, inside = alpha[rows, columns], opacity[rows, columns] > 0
    share = np.clip(0.5 + (values - threshold) / np.maximum(steepness(alpha, rows, columns), NOTHING), 0, 1)
    opacity[rows, columns] = np.where(inside, np.maximum(255 * share, 128), 255 * share)
    return opacity


def steepness(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The length of the gradient of values (H, W) at some pixels, by a pixel: (n,)."""
    below, right = np.minimum(rows + 1, values.shape[0] - 1), np.minimum(columns + 1, values.shape[1] - 1)
    above, left = np.maximum(rows - 1, 0), np.maximum(columns - 1, 0)
    down = (values[below, columns] - values[above, columns]) / np.maximum(below - above, 1)  # 1 at the border, else 2
    across = (values[rows, right] - values[rows, left]) / np.maximum(right - left, 1)
    return np.hypot(down, across)


def foreground(
    rgb: np.ndarray,
    opacity: np.ndarray,
    square: np.ndarray,
    metadata: dict,
    photo_alpha: np.ndarray | None = None,
    hide_background: bool = False,
) -> np.ndarray:
    """The persons' own colours: at a soft edge, without what the old background adds to them.

    Args:
        rgb, opacity: of the photo, uint8 (H, W, 3) and (H, W).
        square, metadata: what `letterbox` returned for the photo.
        photo_alpha: the photo's own, if it has one: where it is not opaque, its colours are pure already.
        hide_background: black where opacity is 0, but for a band along the persons that goes on with their colours:
            whoever scales a cutout mixes in what lies beside its edge.

    Returns:
        uint8 (H, W, 3); the photo's own pixels wherever opacity is 255, or 0 and the background not hidden.
    """
    content = unpadded(square, metadata["padding"])
    coarse = resize(opacity, content.shape[1::-1])
    mixed = cv2.inRange(opacity, 1, 254) & enlarged_mask(between_sides(coarse), opacity.shape)
    if photo_alpha is not None:
        mixed[photo_alpha < 255] = 0
    hide = hide_background and cv2.countNonZero(opacity) < opacity.size
    if not mixed.any() and not hide:
        return rgb
    pure = without_background(rgb, opacity, content, coarse) if hide else rgb.copy()
    enlarged = (enlarged_at(mixed, colours, opacity.shape) for colours in colours_of_both_sides(content, coarse))
    for (rows, columns, inside), (_, _, outside) in zip(*enlarged, strict=True):
        pure[rows, columns] = unmix(rgb[rows, columns], opacity[rows, columns], inside, outside)
    return pure


def without_background(rgb: np.ndarray, opacity: np.ndarray, content: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """A copy without the colours where opacity is 0; around persons theirs, as they are on the square, go on."""
    pure, (colours, known) = cv2.bitwise_and(rgb, rgb, mask=opacity), colours_beyond(content, coarse)
    band = cv2.inRange(opacity, 0, 0) & enlarged_mask(known, opacity.shape)
    for rows, columns, values in enlarged_at(band, colours, opacity.shape):
        pure[rows, columns] = values + 0.5
    return pure


def colours_beyond(picture: np.ndarray, opacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The persons' mean colours around each pixel, float32 (h, w, 3); where they and those beside are known, 0 or 255.

    The power all but leaves out the pixels that the background has a part in, wherever there are others.
    """
    weights = cv2.cvtColor(opacity, cv2.COLOR_GRAY2RGB).astype(np.float32) / 255
    weights **= 4
    total = mean_around(weights, COLOUR_RADII[0])
    colours = weighted_mean(picture.astype(np.float32), weights, total, np.float32(0), COLOUR_RADII[0])
    known = (total[..., 0] > NOTHING).astype(np.uint8) * 255
    return colours, cv2.erode(known, np.ones((3, 3), np.uint8))


def between_sides(opacity: np.ndarray) -> np.ndarray:
    """Where persons and background are both near, uint8 0 or 255: elsewhere the colours of one side are unknown."""
    window = np.ones((2 * COLOUR_RADII[0] + 1,) * 2, np.uint8)
    return cv2.dilate(cv2.inRange(opacity, 230, 255), window) & cv2.dilate(cv2.inRange(opacity, 0, 25), window)


def colours_of_both_sides(picture: np.ndarray, opacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean colours of the persons and of the background around each pixel: float32 (h, w, 3) in 0 to 255.

    The blur fusion of Forte 2021 ("Approximate Fast Foreground Colour Estimation") with the second pass that he
    recommends: far first, so that there are colours everywhere, then near.
    """
    colours, alpha = picture.astype(np.float32), cv2.cvtColor(opacity, cv2.COLOR_GRAY2RGB).astype(np.float32) / 255
    persons = background = near_persons = near_background = colours
    for radius in COLOUR_RADII:
        weight = mean_around(alpha, radius)
        near_persons = weighted_mean(persons, alpha, weight, near_persons, radius)
        near_background = weighted_mean(background, 1 - alpha, 1 - weight, near_background, radius)
        mixture = near_persons * alpha + near_background * (1 - alpha)
        persons, background = np.clip(near_persons + alpha * (colours - mixture), 0, 255), near_background
    return near_persons, near_background


def weighted_mean(
    colours: np.ndarray, weights: np.ndarray, total: np.ndarray, otherwise: np.ndarray, radius: int
) -> np.ndarray:
    """Of the colours around each pixel; `otherwise` where the weights there come to nothing."""
    return np.where(total > NOTHING, mean_around(colours * weights, radius) / np.maximum(total, NOTHING), otherwise)


def unmix(mixed: np.ndarray, opacity: np.ndarray, persons: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The persons' colours (n, 3), corrected by what their mixture with the background's leaves unexplained."""
    alpha = opacity.astype(np.float32)[:, None] / 255
    pure = persons + alpha * (mixed - persons * alpha - background * (1 - alpha))
    return np.clip(pure + 0.5, 0, 255).astype(np.uint8)
