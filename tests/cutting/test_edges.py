"""Edges at the photo's own size: alpha against a guided filter of naive loops, colours against known composites."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from cutting import edges
from cutting.edges import estimate_foreground, refine_alpha, to_opacity
from cutting.photos import Photo
from loading.letterbox import letterbox, restore

RNG = np.random.default_rng(0)


def scene(height: int = 150, width: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A reddish person on a greenish background: photo uint8, alpha float32 in [0, 1], the person's colours uint8."""
    noise = np.random.default_rng(0).normal(0, 3, (height, width, 3))
    person = np.clip(np.array([200, 90, 60]) + noise, 0, 255).round().astype(np.uint8)
    ground = np.clip(np.array([40, 130, 70]) + noise, 0, 255)
    alpha = np.zeros((height, width), np.float32)
    cv2.ellipse(alpha, (width // 2, height // 2), (width // 4, height // 3), 20, 0, 360, 1, -1)
    alpha = cv2.GaussianBlur(alpha, (0, 0), 1.5)
    photo = person * alpha[..., None] + ground * (1 - alpha[..., None])
    return photo.round().astype(np.uint8), alpha, person


def predicted(photo: np.ndarray, alpha: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """A perfect network's probabilities, a little blurred, with the square and its metadata."""
    square, metadata = letterbox(photo, size)
    exact = letterbox(np.dstack([(alpha * 255).astype(np.uint8)] * 3), size)[0][..., 0]
    return cv2.GaussianBlur(exact.astype(np.float32) / 255, (0, 0), 1), square, metadata


def windows(values: np.ndarray, radius: int) -> np.ndarray:
    """The values (h, w, c) in the square around each pixel, mirrored at the border: (h, w, pixels, c)."""
    padded = np.pad(values.astype(float), [(radius, radius), (radius, radius), (0, 0)], mode="symmetric")
    shape = (2 * radius + 1, 2 * radius + 1)
    return np.lib.stride_tricks.sliding_window_view(padded, shape, (0, 1)).reshape(*values.shape, -1).swapaxes(2, 3)


def naive_linear_model(guide: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of alpha on the colours in each window, averaged; what it does not explain is anti-aliased."""
    colours, values = windows(guide / 255, edges.GUIDE_RADIUS), windows(alpha[..., None], edges.GUIDE_RADIUS)
    models = np.zeros((*alpha.shape, 5))  # three factors, the constant, what is not explained
    for y, x in np.ndindex(*alpha.shape):
        inputs, outputs = colours[y, x], values[y, x, :, 0]
        covariance = np.cov(inputs.T, bias=True) + edges.GUIDE_EPSILON * np.eye(3)
        together = ((inputs - inputs.mean(0)) * outputs[:, None]).mean(0)
        factors = np.linalg.inv(covariance) @ together
        unexplained = 1 - factors @ together / max(outputs.var(), 1e-6)
        models[y, x] = *factors, outputs.mean() - factors @ inputs.mean(0), unexplained
    means = windows(models, edges.GUIDE_RADIUS).mean(axis=2)
    fitted = (means[..., :3] * guide / 255).sum(axis=2) + means[..., 3]
    antialiased = windows(alpha[..., None], 1)[..., 0] @ np.outer([1, 2, 1], [1, 2, 1]).ravel() / 16
    drawn = (1 - means[..., 4]) * alpha + means[..., 4] * antialiased
    return means[..., :3] / 255, means[..., 3] + means[..., 4] * (drawn - fitted)


def test_the_linear_model_is_a_ridge_regression_in_each_window():
    photo, alpha, _ = scene(24, 30)
    photo[:, :15] = 90  # an edge between equal colours stays as the network drew it
    factors, constant, _ = edges.fit_linear_model(photo, alpha)
    expected = naive_linear_model(photo, alpha)
    np.testing.assert_allclose(constant, expected[1], atol=5e-3)
    np.testing.assert_allclose(factors * 255, expected[0] * 255, atol=2e-3 * np.abs(expected[0] * 255).max())


def test_alpha_is_the_linear_model_applied_to_the_photo():
    photo, alpha, _ = scene()
    probabilities, square, metadata = predicted(photo, alpha, 64)
    factors, constant, _ = edges.fit_linear_model(square[8:56], probabilities[8:56])
    factors, constant = (cv2.resize(part, (200, 150)) for part in (factors, constant))
    found = refine_alpha(probabilities, square, metadata, photo)
    assert found.dtype == np.float32
    expected = np.clip((factors * photo).sum(axis=2) + constant, 0, 1)
    np.testing.assert_allclose(found, expected, atol=0.01)  # OpenCV 4 rounds coordinates to 1/32 pixel
    probabilities, square, metadata = predicted(photo, alpha, 256)  # a photo smaller than the square
    found = refine_alpha(probabilities, square, metadata, photo)
    np.testing.assert_array_equal(found, restore(probabilities, metadata))


@pytest.mark.parametrize(("channel", "value"), [(0, None), (0, 255)])
def test_alpha_follows_the_photos_edge_more_closely_than_an_enlargement(channel, value):
    photo, alpha, _ = scene(600, 800)
    if value is not None:
        photo[..., channel] = value  # it says nothing, as where the sky is burnt out
    probabilities, square, metadata = predicted(photo, alpha, 128)
    refined, plain = refine_alpha(probabilities, square, metadata, photo), restore(probabilities, metadata)
    assert np.abs(refined - alpha).sum() < 0.75 * np.abs(plain - alpha).sum()


@pytest.mark.parametrize(("shape", "count"), [((90, 100), 500), ((1, 40000), 40000), ((70, 1), 70)])
def test_single_pixels_are_enlarged_as_a_resize_does_it(shape, count):
    small = RNG.random((-(-shape[0] // 3), -(-shape[1] // 3), 3)).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask.ravel()[RNG.choice(mask.size, count, replace=False)] = 1
    expected, found = cv2.resize(small, shape[::-1]).reshape(*shape, 3), 0
    for rows, columns, values in edges.enlarge_at(mask, small, shape):
        np.testing.assert_allclose(values, expected[rows, columns], atol=0.02)  # OpenCV 4: 1/32 pixel
        assert mask[rows, columns].all()
        found += len(values)
    assert found == count


@pytest.mark.parametrize(("threshold", "slope"), [(0.04, 0.02), (0.5, 0.3)])  # no margin; the slope is of a pixel
def test_a_hard_edge_covers_its_pixels_as_a_disc_does(threshold, slope):
    """Against the fraction of 8 x 8 points in each pixel that lie inside the circle where alpha is the threshold."""
    y, x = np.mgrid[:90, :90] - 44.3
    alpha = np.clip(threshold + (30.4 - np.hypot(x, y)) * slope, 0, 1).astype(np.float32)
    y, x = np.mgrid[: 90 * 8, : 90 * 8] / 8 + 0.5 / 8 - 0.5 - 44.3
    coverage = (np.hypot(x, y) < 30.4).reshape(90, 8, 90, 8).mean(axis=(1, 3))
    opacity = to_opacity(alpha, None, threshold)
    np.testing.assert_allclose(opacity / 255, coverage, atol=0.12)
    np.testing.assert_array_equal(opacity > 127, alpha > threshold)
    assert 0.5 < np.count_nonzero(cv2.inRange(opacity, 1, 254)) / (2 * np.pi * 30) < 2  # one pixel of soft edge


def test_a_plateau_at_the_threshold_is_no_half_transparent_area():
    for value, threshold, opacity in ((0.5, 0.5, 0), (0.5, 0.4999, 255), (0, 0, 0), (1, 1, 0)):
        for scale in (0.05, 1.0):
            alpha = np.full((40, 50), value, np.float32)
            assert (to_opacity(alpha, None, threshold, scale) == opacity).all()


@pytest.mark.parametrize("scale", [0.1, 0.25])
def test_texture_does_not_tear_a_hard_edge(scale):
    """An edge as a network draws it, some pixels of its square wide, with the photo's texture in it."""
    columns = np.arange(400) - 199.5
    alpha = np.tile(np.clip(0.5 + columns * scale / 4, 0, 1), (300, 1))
    alpha = np.clip(alpha + RNG.normal(0, 0.1, alpha.shape), 0, 1).astype(np.float32)
    smooth = cv2.GaussianBlur(alpha, (0, 0), edges.CUT_SMOOTHING / scale) > 0.5
    torn, found = alpha > 0.5, to_opacity(alpha, None, 0.5, scale) > 127
    np.testing.assert_array_equal(found, smooth)
    assert np.count_nonzero(found != (columns > 0)) < 0.6 * np.count_nonzero(torn != (columns > 0))


def test_colours_at_a_soft_edge_lose_the_old_background_unless_the_photo_had_that_alpha():
    photo, alpha, person = scene(300, 400)
    square, metadata = letterbox(photo, 128)
    before, opacity = photo.copy(), (alpha * 255).round().astype(np.uint8)
    own = np.full_like(opacity, 255)
    own[:, :200] = 254  # where colours are pure already
    pure = estimate_foreground(Photo(photo, own), opacity, square, metadata)
    np.testing.assert_array_equal(photo, before)
    soft = (opacity > 0) & (opacity < 255) & (own == 255)
    np.testing.assert_array_equal(pure[~soft], photo[~soft])
    mixed = soft & (opacity > 25) & (opacity < 230)
    assert distance(photo[mixed], person[mixed]) > 20
    assert distance(pure[mixed], person[mixed]) < 0.3 * distance(photo[mixed], person[mixed])


def test_what_has_no_two_sides_keeps_the_photos_colours():
    photo = RNG.integers(1, 256, (90, 120, 3), dtype=np.uint8)
    square, metadata = letterbox(photo, 64)
    nobody, hard_edge = np.zeros((90, 120), np.uint8), np.repeat(np.uint8([[0, 255]]), 60, axis=1).repeat(90, axis=0)
    for opacity in (nobody, nobody + 128, nobody + 255, hard_edge):
        np.testing.assert_array_equal(estimate_foreground(Photo(photo), opacity, square, metadata), photo)
    assert not estimate_foreground(Photo(photo), nobody, square, metadata, True).any()


def distance(colours: np.ndarray, truth: np.ndarray) -> float:
    return np.abs(colours.astype(np.float32) - truth).mean()


@pytest.mark.parametrize(("size", "hard"), [((60, 80), False), ((300, 400), True), ((500, 40), True)])
def test_what_was_cut_away_is_gone_and_what_is_seen_stays(size, hard):
    photo, alpha, person = scene(*size)
    if hard:
        alpha = (alpha > 0.5).astype(np.float32)
        photo = np.where(alpha[..., None] > 0, person, np.uint8([40, 130, 70]))
    opacity = (alpha * 255).round().astype(np.uint8)
    square, metadata = letterbox(photo, 128)
    hidden, kept = (estimate_foreground(Photo(photo), opacity, square, metadata, hide) for hide in (True, False))
    np.testing.assert_array_equal(hidden[opacity > 0], kept[opacity > 0])
    reach = round((edges.COLOUR_RADII[0] + 1) * max(size) / 128) + 1  # as far from the persons as the band goes
    far = cv2.dilate(cv2.inRange(opacity, 1, 255), np.ones((2 * reach + 1,) * 2, np.uint8)) == 0
    assert (hidden[far] == 0).all()
    band = (opacity == 0) & hidden.any(axis=2)
    assert distance(hidden[band], person[band]) < 0.6 * distance(kept[band], person[band])
    touching = cv2.dilate(cv2.inRange(opacity, 128, 255), np.ones((3, 3), np.uint8)) & cv2.inRange(opacity, 0, 0)
    assert band[touching > 0].all()  # wherever an edge is no soft one
