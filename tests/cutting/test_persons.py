"""Specks and borders by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cutting.persons import continue_to_borders, keep_persons, largest_component

NO_PADDING = (0, 0, 0, 0)


def picture(*spots: tuple[slice, slice, float]) -> np.ndarray:
    probabilities = np.zeros((100, 100), np.float32)
    for rows, columns, probability in spots:
        probabilities[rows, columns] = probability
    return probabilities


def test_small_persons_of_a_group_are_kept_and_with_the_foreground_only_the_large_ones():
    large, half = (slice(10, 60), slice(10, 50), 0.99), (slice(10, 50), slice(55, 75), 0.3)  # the half is never sure
    small, unsure = (slice(70, 78), slice(10, 14), 0.95), (slice(70, 80), slice(30, 45), 0.89)
    hand, haze = (slice(60, 62), slice(50, 52), 0.06), (slice(62, 70), slice(0, 100), 0.04)  # the hand by a corner
    everybody = picture(large, half, small, unsure, hand, haze)
    kept = [keep_persons(everybody, NO_PADDING, only) for only in (False, True)]
    np.testing.assert_array_equal(kept, [picture(large, half, small, hand, haze), picture(large, half, hand, haze)])
    specks = picture((slice(0, 9), slice(0, 10), 0.8), (slice(90, 94), slice(0, 5), 0.95))
    assert keep_persons(specks, NO_PADDING, foreground_only=True).sum() == pytest.approx(20 * 0.95)  # not less than one
    a_third = picture(large, (slice(10, 60), slice(60, 73), 0.99))  # 650 of 2000
    np.testing.assert_array_equal(keep_persons(a_third, NO_PADDING, foreground_only=True), picture(large))
    assert not keep_persons(picture(), NO_PADDING).any()


def test_fractions_are_those_of_the_photo_and_not_of_its_bars():
    in_the_bar = (slice(0, 20), slice(0, 99), 1)
    two = picture((slice(30, 50), slice(10, 30), 0.6), (slice(30, 40), slice(80, 90), 1), in_the_bar)
    assert largest_component(two, (0, 25, 0, 25)) == 400 / 5000
    assert largest_component(two, NO_PADDING) == 20 * 99 / 10000
    assert largest_component(picture(), NO_PADDING) == 0
    speck = picture((slice(40, 50), slice(10, 19), 0.5))  # 90 pixels
    assert keep_persons(speck, (0, 25, 0, 25)).any()
    assert not keep_persons(speck, NO_PADDING).any()


FADING = np.array([0.1, 0.26, 0.5, 0.73, 0.84, 0.93, 0.95, 0.96], np.float32)  # from a border inwards


@pytest.mark.parametrize("side", range(4))  # turned, each border is the upper one once
@pytest.mark.parametrize(("start", "least", "depth"), [(8, 0, 6), (0, 0.5, 3)])  # beside a bar; at the square's edge
def test_a_person_cut_by_a_border_is_continued_to_it(side, start, least, depth):
    square = np.zeros((64, 64), np.float32)
    square[start : start + 8, 20:40] = np.maximum(FADING, least)[:, None]
    square[start + 8 : 50, 20:40] = 0.97
    expected = square.copy()
    expected[start : start + depth, 20:40] = FADING[depth]
    before = np.rot90(square, side).copy()
    padding = (start, 0, start, 0) if side % 2 else (0, start, 0, start)
    np.testing.assert_array_equal(continue_to_borders(before, padding, 6), np.rot90(expected, side))
    without = continue_to_borders(before, padding, 0)  # bars that nothing fades at
    np.testing.assert_array_equal(without, np.rot90(square if start else expected, side))
    np.testing.assert_array_equal(before, np.rot90(square, side))  # not modified


def test_beside_a_bar_thinner_than_the_fade_of_an_edge_the_rest_of_it_is_continued():
    square = np.full((64, 64), 0.97, np.float32)
    square[1:3] = 0.6  # a bar of one row, and two rows that fade
    continued = continue_to_borders(square, (0, 1, 0, 1), 0)
    np.testing.assert_array_equal(continued[1:3], square[3:5])


def test_who_ends_before_a_border_or_grows_towards_it_is_left_alone():
    square = np.zeros((64, 64), np.float32)
    square[12:40, 5:15] = 0.97  # ends 4 pixels before a bar
    square[8:40, 30:40] = np.linspace(1, 0.5, 32, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(continue_to_borders(square, (0, 8, 0, 8), 6), square)
    low = np.random.default_rng(2).random((64, 64), np.float32)
    continued = continue_to_borders(low, (0, 27, 0, 27), 6)  # ten rows: too few
    np.testing.assert_array_equal(continued[:, 3:-3], low[:, 3:-3])
