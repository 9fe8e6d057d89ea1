"""What the network's probabilities say about persons: how large they are, where a border cuts them, what is a speck.

Probabilities are those of the network's square, float32 (S, S); `padding` says where the photo lies in it.
"""

from __future__ import annotations

import cv2
import numpy as np

from loading.letterbox import unpadded

Padding = tuple[int, int, int, int]  # left, top, right, bottom, as in the metadata of `letterbox`

# Chosen by measurement: docs/looks.md.
BAR_DEPTHS = {"black": 6, "reflect": 0}  # rows that the network fades out beside a letterbox's bar, by its filling
EDGE_DEPTH = 3  # at the square's own edge, beyond which convolutions see zeros
GOES_ON = 0.4  # of the probability further in, halfway to the border: less where a person ends before it
VISIBLE = 0.05  # probability above which a pixel is drawn, and belongs to a component
SURE = 0.9  # probability that a person reaches somewhere, however small
SPECK, SMALL_SPECK = 0.1, 0.01  # of the largest component, and of the photo: below either, what is never sure is none
FOREGROUND = 1 / 3  # of the largest component: persons at least so large stand in front


def largest_component(probabilities: np.ndarray, padding: Padding) -> float:
    """Returns how much of the photo the largest connected area of persons covers, from 0 to 1."""
    areas = connected_components(unpadded(probabilities, padding) > 0.5)[1]
    return float(areas[1:].max(initial=0) / areas.sum())


def continue_to_borders(probabilities: np.ndarray, padding: Padding, bar_depth: int) -> np.ndarray:
    """Returns the probabilities with persons continued to the borders of the photo that cut them.

    A network fades out over the outermost rows, as many at any size: `bar_depth` of `BAR_DEPTHS` beside a bar, since
    one that was trained with black bars has learned that persons end there. They take at least the probability of the
    first row that does not fade.
    """
    continued = probabilities.copy()
    inside = unpadded(continued, padding)
    for rows, bar in zip((inside.T, inside, inside.T[::-1], inside[::-1]), padding, strict=True):
        depth = max(bar_depth if bar else 0, EDGE_DEPTH - bar)
        if 0 < 2 * depth < len(rows):
            goes_on = rows[depth // 2] >= GOES_ON * rows[depth]
            np.maximum(rows[:depth], goes_on * rows[depth], out=rows[:depth])
    return continued


def keep_persons(probabilities: np.ndarray, padding: Padding, foreground_only: bool = False) -> np.ndarray:
    """Returns the probabilities without specks: connected areas that are small and nowhere surely a person.

    With `foreground_only` areas much smaller than the largest one are left out as well, sure or not.
    """
    kept = probabilities.copy()
    inside = unpadded(kept, padding)
    labels, areas = connected_components(inside > VISIBLE)
    areas[0] = 0  # what is not drawn
    is_person = areas >= max(SPECK * areas.max(), SMALL_SPECK * inside.size)
    is_person[labels[inside > SURE]] = True
    if foreground_only:
        is_person &= areas >= FOREGROUND * areas[is_person].max(initial=0)
    is_person[0] = True  # the edges of the rest are computed from it
    inside[~is_person[labels]] = 0
    return kept


def connected_components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pixel's connected component, int32 (h, w), 0 outside of the mask, and the components' pixels."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return labels, statistics[:, cv2.CC_STAT_AREA]
