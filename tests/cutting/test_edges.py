"""Edges at the photo's own size: alpha against a guided filter of naive loops, colours against known composites."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from cutting import edges
from cutting.edges import alpha_of, foreground, to_opacity
from datasets import letterbox, restore

RNG = np.random.default_rng(0)


def scene(height: int = 150, width: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A reddish person on a greenish background: photo uint8, alpha float32 in [0, 1], the person's colours uint8."""
    noise = RNG.normal(0, 3, (height, width, 3))
    person = np.clip(np.array([200, 90, 60]) + noise, 0, 255).round().astype(np.uint8)
    ground = np.clip(np.array([40, 130, 70]) + noise, 0, 255)
    alpha = np.zeros((height, width), np.float32)
    cv2.ellipse(alpha, (width // 2, height // 2), (width // 4, height // 3), 20, 0, 360, 1, -1)
    alpha = cv2.GaussianBlur(alpha, (0, 0), 1.5)
    photo = person * alpha[..., None] + ground * (1 - alpha[..., None])
    return photo.round().astype(np.uint8), alpha, person


def seen(photo: np.ndarray, alpha: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """What a perfect network would make of it, a little blurred: square, probabilities, metadata."""
    square, metadata = letterbox(photo, size)
    exact = letterbox(np.dstack([(alpha * 255).astype(np.uint8)] * 3), size)[0][..., 0]
    return square, cv2.GaussianBlur(exact.astype(np.float32) / 255, (0, 0), 1), metadata


def naive_linear_model(guide: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of alpha on the colours in each window; their mean, and what of the rest they leave."""
    radius = edges.GUIDE_RADIUS
    margin = [(radius, radius)] * 2
    colours = np.pad(guide / 255.0, [*margin, (0, 0)], mode="symmetric")
    values = np.pad(alpha.astype(float), margin, mode="symmetric")
    models, explained = np.zeros((*alpha.shape, 4)), np.zeros(alpha.shape)
    for y, x in np.ndindex(*alpha.shape):
        window = (slice(y, y + 2 * radius + 1), slice(x, x + 2 * radius + 1))
        inputs, outputs = colours[window].reshape(-1, 3), values[window].ravel()
        covariance = np.cov(inputs.T, bias=True) + edges.GUIDE_EPSILON * np.eye(3)
        together = ((inputs - inputs.mean(0)) * outputs[:, None]).mean(0)
        factors = np.linalg.inv(covariance) @ together
        models[y, x] = *factors, outputs.mean() - factors @ inputs.mean(0)
        explained[y, x] = factors @ together / max(outputs.var(), 1e-6)
    padded = np.pad(np.dstack([models, 1 - explained]), [*margin, (0, 0)], mode="symmetric")
    side = 2 * radius + 1
    means = np.array([[padded[y : y + side, x : x + side].mean((0, 1)) for x in range(alpha.shape[1])]
                      for y in range(alpha.shape[0])])  # fmt: skip
    fitted = (means[..., :3] * guide / 255).sum(axis=2) + means[..., 3]
    drawn = (1 - means[..., 4]) * alpha + means[..., 4] * without_stairs(alpha)
    return means[..., :3] / 255, means[..., 3] + means[..., 4] * (drawn - fitted)


def without_stairs(alpha: np.ndarray) -> np.ndarray:
    """Half of each pixel and a quarter of its neighbours, along rows, then along columns."""
    for axis in (0, 1):
        padded = np.pad(alpha.astype(float), [(1, 1) if n == axis else (0, 0) for n in (0, 1)], mode="symmetric")
        alpha = sum(w * np.roll(padded, by, axis).take(range(1, alpha.shape[axis] + 1), axis)
                    for w, by in ((0.25, -1), (0.5, 0), (0.25, 1)))  # fmt: skip
    return alpha.astype(np.float32)


def test_the_linear_model_is_a_ridge_regression_in_each_window():
    photo, alpha, _ = scene(24, 30)
    factors, constant, _ = edges.linear_model(photo, alpha)
    expected = naive_linear_model(photo, alpha)
    np.testing.assert_allclose(constant, expected[1], atol=5e-3)
    np.testing.assert_allclose(factors * 255, expected[0] * 255, atol=2e-3 * np.abs(expected[0] * 255).max())


def test_alpha_is_the_model_applied_to_every_pixel_where_colours_explain_it():
    photo, alpha, _ = scene()
    square, probabilities, metadata = seen(photo, alpha, 64)
    guide, coarse = square[8:56], probabilities[8:56]
    factors, constant, _ = edges.linear_model(guide, coarse)
    enlarged = [cv2.resize(part, (200, 150)) for part in (factors, constant)]
    expected = np.clip((enlarged[0] * photo).sum(axis=2) + enlarged[1], 0, 1)
    found = alpha_of(probabilities, square, metadata, photo)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.01)  # OpenCV 4 rounds places to 1/32 pixel


def test_an_edge_between_equal_colours_stays_as_the_network_drew_it():
    photo = np.full((128, 128, 3), 90, np.uint8)
    probabilities = np.zeros((64, 64), np.float32)
    probabilities[:, 20:] = 1
    square, metadata = letterbox(photo, 64)
    found = alpha_of(probabilities, square, metadata, photo)
    np.testing.assert_allclose(found, restore(without_stairs(probabilities), metadata), atol=0.02)


@pytest.mark.parametrize("angle", [0.03, 0.1, 0.3, 0.7])
def test_a_steep_edge_of_the_square_is_no_flight_of_stairs_on_a_large_photo(angle):
    """Where the colours explain nothing: how far the place where alpha is one half strays from a straight line."""
    photo, (y, x) = np.full((1000, 1000, 3), 90, np.uint8), np.mgrid[:100, :100] - 49.5
    probabilities = np.clip(0.5 + x * np.cos(angle) + y * np.sin(angle), 0, 1).astype(np.float32)  # a pixel wide
    square, metadata = letterbox(photo, 100)
    straying = []
    for alpha in (restore(probabilities, metadata), alpha_of(probabilities, square, metadata, photo)):
        rows = np.arange(200, 800)
        after = (alpha[rows] > 0.5).argmax(axis=1)
        low, high = alpha[rows, after - 1], alpha[rows, after]
        columns = after - (high - 0.5) / (high - low)
        straying.append(np.abs((columns - 499.5) * np.cos(angle) + (rows - 499.5) * np.sin(angle)).max())
    assert straying[0] > 0.6, straying  # pixels of the photo, of which the square's has ten
    assert straying[1] < min(0.5, 0.8 * straying[0]), straying


@pytest.mark.parametrize(("channel", "value"), [(None, 0), (0, 255), (0, 0), (1, 255), (2, 0)])
def test_alpha_follows_the_photos_edge_more_closely_than_an_enlargement(channel, value):
    photo, alpha, _ = scene(600, 800)
    if channel is not None:
        photo[..., channel] = value  # one colour that says nothing, as where the sky is burnt out
    square, probabilities, metadata = seen(photo, alpha, 128)
    error, plain = (np.abs(found - alpha).sum() for found in
                    (alpha_of(probabilities, square, metadata, photo), restore(probabilities, metadata)))  # fmt: skip
    assert error < 0.75 * plain


def test_a_photo_smaller_than_the_square_and_flat_alpha_are_left_alone():
    photo, alpha, _ = scene(60, 80)
    square, probabilities, metadata = seen(photo, alpha, 96)
    np.testing.assert_array_equal(alpha_of(probabilities, square, metadata, photo), restore(probabilities, metadata))
    photo, _, _ = scene()
    square, metadata = letterbox(photo, 64)
    for value in (0.0, 1.0):
        flat = np.full((64, 64), value, np.float32)
        assert (alpha_of(flat, square, metadata, photo) == value).all()


@pytest.mark.parametrize(("shape", "count"), [((90, 100), 500), ((90, 100), 9000), ((1, 40000), 40000), ((70, 1), 70)])
def test_single_pixels_are_enlarged_as_a_resize_does_it(shape, count):
    small = RNG.random((-(-shape[0] // 3), -(-shape[1] // 3), 3)).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask.ravel()[RNG.choice(mask.size, count, replace=False)] = 1
    expected = cv2.resize(small, shape[::-1]).reshape(*shape, 3)
    found = 0
    for rows, columns, values in edges.enlarged_at(mask, small, shape):
        np.testing.assert_allclose(values, expected[rows, columns], atol=0.02)  # OpenCV 4 rounds places to 1/32 pixel
        assert mask[rows, columns].all()
        found += len(values)
    assert found == count


def test_soft_opacity_has_a_margin_and_a_threshold_none():
    alpha = np.array([[0, 0.04, 0.05, 0.275, 0.5, 0.725, 0.95, 0.97, 1]], np.float32)
    assert to_opacity(alpha, None).tolist() == [[0, 0, 0, 64, 128, 191, 255, 255, 255]]
    assert (to_opacity(alpha, None, 0.04) > 127).tolist() == [[False] * 2 + [True] * 7]
    half = np.full(alpha.shape, 100, np.uint8)
    assert to_opacity(alpha, half).tolist() == [[0, 0, 0, 64, 100, 100, 100, 100, 100]]


# --- a hard edge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.02, 0.3])  # of alpha, by a pixel
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_a_hard_edge_covers_its_pixels_as_a_disc_does(threshold, slope):
    """Against the share of 8 x 8 places within each pixel that lie inside the circle where alpha is the threshold."""
    y, x = np.mgrid[:90, :90] - 44.3
    alpha = np.clip(threshold + (30.4 - np.hypot(x, y)) * slope, 0, 1).astype(np.float32)
    y, x = np.mgrid[: 90 * 8, : 90 * 8] / 8 + 0.5 / 8 - 0.5 - 44.3
    share = (np.hypot(x, y) < 30.4).reshape(90, 8, 90, 8).mean(axis=(1, 3))
    opacity = to_opacity(alpha, None, threshold)
    np.testing.assert_allclose(opacity / 255, share, atol=0.12)
    np.testing.assert_array_equal(opacity > 127, alpha > threshold)  # nothing but the edge's soft pixel is added
    soft = cv2.inRange(opacity, 1, 254)
    assert 0.5 * 2 * np.pi * 30 < np.count_nonzero(soft) < 2 * 2 * np.pi * 30
    assert not (soft.astype(bool) & ((share == 0) | (share == 1)) & (np.abs(opacity / 255 - share) > 0.12)).any()


def test_a_plateau_at_the_threshold_is_no_half_transparent_area():
    for value, threshold in ((0.5, 0.5), (0.5, 0.4999), (0, 0), (1, 1)):
        alpha = np.full((40, 50), value, np.float32)
        assert (to_opacity(alpha, None, threshold) == (255 if value > threshold else 0)).all()
    alpha[:, 25:] = RNG.uniform(0.4995, 0.5005, (40, 25))
    opacity = to_opacity(alpha, None, 0.5)
    window = np.ones((3, 3), np.uint8)
    inside = (opacity > 127).astype(np.uint8)
    away = cv2.dilate(inside, window) == cv2.erode(inside, window)
    assert set(np.unique(opacity[away])) <= {0, 255}


def torn_edge(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """An edge as a network draws it, some pixels of its square wide, with the photo's texture in it; the true mask."""
    columns = np.arange(400) - 199.5
    alpha = np.tile(np.clip(0.5 + columns * scale / 4, 0, 1), (300, 1))
    return np.clip(alpha + RNG.normal(0, 0.1, alpha.shape), 0, 1).astype(np.float32), np.tile(columns > 0, (300, 1))


def test_texture_does_not_tear_a_hard_edge():
    for scale in (0.1, 0.25):
        alpha, truth = torn_edge(scale)
        found, torn = (opacity > 127 for opacity in (to_opacity(alpha.copy(), None, 0.5, scale), alpha * 255))
        lengths = [np.count_nonzero(np.diff(mask, axis=0)) for mask in (found, torn)]  # a straight edge has none
        assert lengths[0] < 0.2 * lengths[1]
        assert np.count_nonzero(found != truth) < 0.6 * np.count_nonzero(torn != truth)


def test_a_hard_edge_lies_where_the_smoothed_alpha_crosses_the_threshold():
    alpha, _ = torn_edge(0.2)
    smooth = cv2.GaussianBlur(alpha, (0, 0), edges.CUT_SMOOTHING / 0.2)
    np.testing.assert_array_equal(to_opacity(alpha, None, 0.4, 0.2) > 127, smooth > 0.4)


def test_a_photo_that_is_not_enlarged_is_cut_where_alpha_is():
    alpha = RNG.random((40, 50)).astype(np.float32)
    for scale in (1.0, 1.7):
        np.testing.assert_array_equal(to_opacity(alpha, None, 0.6, scale) > 127, alpha > 0.6)


def test_colours_at_a_soft_edge_lose_the_old_background():
    photo, alpha, person = scene(300, 400)
    square, metadata = letterbox(photo, 128)
    opacity = (alpha * 255).round().astype(np.uint8)
    before, pure = photo.copy(), foreground(photo, opacity, square, metadata)
    np.testing.assert_array_equal(photo, before)
    mixed = (opacity > 25) & (opacity < 230)
    error, spill = (np.abs(colours[mixed] - person[mixed].astype(float)).mean() for colours in (pure, photo))
    assert spill > 20
    assert error < 0.3 * spill
    np.testing.assert_array_equal(pure[~((opacity > 0) & (opacity < 255))], photo[~((opacity > 0) & (opacity < 255))])


def test_colours_of_an_alpha_that_the_photo_had_are_pure_already():
    photo, alpha, _ = scene()
    square, metadata = letterbox(photo, 64)
    opacity = (alpha * 255).round().astype(np.uint8)
    own = np.full_like(opacity, 255)
    own[:, :100] = 254
    pure = foreground(photo, opacity, square, metadata, own)
    np.testing.assert_array_equal(pure[:, :100], photo[:, :100])
    assert (pure[:, 100:] != photo[:, 100:]).any()
    assert foreground(photo, np.where(opacity > 127, 255, 0).astype(np.uint8), square, metadata) is photo


def test_colours_that_agree_with_the_background_stay():
    photo = np.full((90, 120, 3), (120, 80, 200), np.uint8)
    opacity = cv2.GaussianBlur(cv2.circle(np.zeros((90, 120), np.uint8), (60, 45), 25, 255, -1), (0, 0), 3)
    square, metadata = letterbox(photo, 64)
    np.testing.assert_allclose(foreground(photo, opacity, square, metadata).astype(int), photo, atol=1)


def test_an_unsure_area_keeps_the_photos_colours():
    photo = RNG.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    square, metadata = letterbox(photo, 64)
    assert foreground(photo, np.full((128, 128), 128, np.uint8), square, metadata) is photo


# --- what was cut away ------------------------------------------------------------------------------------


def cut_out(size: tuple[int, int], hard: bool = False) -> tuple[np.ndarray, ...]:
    """Of a photo the colours with the background hidden and with it, the opacity, the person's true colours."""
    photo, alpha, person = scene(*size)
    if hard:
        alpha = (alpha > 0.5).astype(np.float32)
        photo = np.where(alpha[..., None] > 0, person, np.uint8([40, 130, 70]))
    opacity = (alpha * 255).round().astype(np.uint8)
    square, metadata = letterbox(photo, 128)
    colours = [foreground(photo, opacity, square, metadata, None, hide) for hide in (True, False)]
    return *colours, opacity, person


def distance(colours: np.ndarray, truth: np.ndarray) -> float:
    return np.abs(colours.astype(np.float32) - truth).mean()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("size", [(300, 400), (60, 80), (500, 40), (1200, 1600)])
def test_what_was_cut_away_is_gone_and_what_is_seen_stays(size, hard):
    found, kept, opacity, person = cut_out(size, hard)
    np.testing.assert_array_equal(found[opacity > 0], kept[opacity > 0])
    reach = round((edges.COLOUR_RADII[0] + 1) * max(size) / 128) + 1  # as far from the persons as the band goes
    far = cv2.dilate(cv2.inRange(opacity, 1, 255), np.ones((2 * reach + 1,) * 2, np.uint8)) == 0
    assert (found[far] == 0).all()
    band = (opacity == 0) & found.any(axis=2)
    assert distance(found[band], person[band]) < 0.5 * distance(kept[band], person[band])
    touching = cv2.dilate(cv2.inRange(opacity, 128, 255), np.ones((3, 3), np.uint8)) & cv2.inRange(opacity, 0, 0)
    assert band[touching > 0].all()  # wherever an edge is no soft one


def scaled(picture: np.ndarray, size: tuple[int, int], how: int) -> np.ndarray:
    """As a program does it that knows nothing of alpha, each channel by itself."""
    return cv2.resize(picture.astype(np.float32), size, interpolation=how)


def over(ground: float, colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colours * alpha[..., None] / 255 + ground * (1 - alpha[..., None] / 255)


@pytest.mark.parametrize(("size", "how"), [((40, 30), cv2.INTER_AREA), ((160, 120), cv2.INTER_LINEAR),
                                           ((390, 290), cv2.INTER_CUBIC), ((1000, 800), cv2.INTER_CUBIC)])  # fmt: skip
@pytest.mark.parametrize("ground", [0, 255])
def test_a_cutout_that_is_scaled_has_no_dark_seam(size, how, ground):
    found, _, opacity, person = cut_out((300, 400), hard=True)
    black = np.where(opacity[..., None] > 0, found, 0)
    truth, alpha = scaled(person, size, how), np.clip(scaled(opacity, size, how), 0, 255)
    edge = (alpha > 5) & (alpha < 250)
    seen = over(ground, truth, alpha)[edge]
    errors = [distance(over(ground, scaled(colours, size, how), alpha)[edge], seen) for colours in (found, black)]
    assert errors[0] < 0.25 * errors[1]


@pytest.mark.parametrize("factor", [2, 4])
def test_a_cutout_scaled_down_has_the_persons_colours_at_its_edge(factor):
    """Straight alpha as most programs scale it: the colours by themselves, whatever alpha says of them."""
    found, _, opacity, person = cut_out((320, 400), hard=True)
    size = 400 // factor, 320 // factor
    alpha, truth = scaled(opacity, size, cv2.INTER_AREA), scaled(person, size, cv2.INTER_AREA)
    edge = (alpha > 5) & (alpha < 250)
    seen, black = (scaled(colours, size, cv2.INTER_AREA) for colours in (found, found * (opacity[..., None] > 0)))
    assert distance(seen[edge], truth[edge]) < 8
    assert (truth[edge] - seen[edge]).mean() < 2  # darker
    assert (truth[edge] - black[edge]).mean() > 10  # without the band of their colours


def test_nobody_leaves_nothing_and_a_person_everywhere_leaves_all():
    photo = RNG.integers(1, 256, (90, 120, 3), dtype=np.uint8)
    square, metadata = letterbox(photo, 64)
    assert not foreground(photo, np.zeros((90, 120), np.uint8), square, metadata, None, True).any()
    assert foreground(photo, np.full((90, 120), 255, np.uint8), square, metadata, None, True) is photo


def test_nothing_exceeds_a_threshold_of_one():
    for scale in (0.05, 0.1, 0.3, 0.9):
        assert not to_opacity(np.ones((200, 300), np.float32), None, 1.0, scale).any()


def test_a_soft_pixel_at_the_border_is_the_one_that_lies_within():
    ramp = np.tile(np.linspace(0, 1, 12, dtype=np.float32)[:, None], (1, 6))  # an edge that reaches both sides
    opacity = to_opacity(ramp.copy(), None, 0.5, 1.0)
    assert (opacity == opacity[:, :1]).all()
    across = to_opacity(ramp.T.copy(), None, 0.5, 1.0)
    assert np.array_equal(across, opacity.T)
    near_border = to_opacity(ramp[5:].copy(), None, 0.5, 1.0)
    assert np.array_equal(near_border[0], opacity[5])
