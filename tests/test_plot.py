"""The pictures show what was computed: colours are read back from the files."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from flexpg.analysis.flops import ModelShape
from flexpg.analysis.plots import (
    _block_kinds,
    _draw_segments,
    _label_segments,
    _segment_boxes,
    _segment_colours,
    _segment_parents,
    _token_colours,
    plot_mask,
    plot_report,
    plot_reward,
    plot_savings,
    plot_tree,
)
from flexpg.analysis.report import report
from flexpg.masks import block_mask, dense_mask
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

TREE = PrefixTree.from_lengths([150, 70], [[30, 40, 50], [20, 20]])
ROLLOUTS = Rollouts(
    [torch.arange(150), torch.arange(70)],
    [torch.full((length,), length) for length in (30, 40, 50, 20, 20)],
    torch.tensor([0, 0, 0, 1, 1]),
    torch.ones(5),
)


def test_the_token_picture_is_white_exactly_where_the_mask_is_false():
    picture = _token_colours(TREE)  # [size, size, 3]
    visible = dense_mask(TREE.end[: TREE.num_tokens]).numpy()
    assert ((picture == 1).all(-1) == ~visible).all()


def test_a_long_row_is_shown_by_tokens_from_all_of_it():
    tree = PrefixTree.from_lengths([1500], [[800, 700]])
    shown = torch.linspace(0, 2999, 2048).round().long()
    visible = dense_mask(tree.end)[shown][:, shown].numpy()
    assert ((_token_colours(tree) == 1).all(-1) == ~visible).all()


def test_the_token_picture_tells_neighbouring_segments_apart():
    picture = _token_colours(TREE)
    starts = TREE.segments[:, 0].tolist()
    own = [tuple(picture[start, start]) for start in starts]
    assert all(a != b for a, b in pairwise(own))


def test_the_block_picture_shows_the_tables():
    kinds = _block_kinds(TREE)
    n = len(kinds)
    blocks = dense_mask(TREE.end).view(n, 128, n, 128).transpose(1, 2)
    any_visible, all_visible = blocks.any(-1).any(-1).numpy(), blocks.all(-1).all(-1).numpy()
    assert (kinds == np.where(all_visible, 2, np.where(any_visible, 1, 0))).all()
    assert int((kinds == 1).sum()) == int(block_mask(TREE).kv_num_blocks.sum())


# A system prompt of 40 tokens over two prompts, one of whose completions goes on in two ways; and a root of its own.
FOREST = PrefixTree.from_sequences(
    [
        [*range(40), *range(100, 130), *range(200, 220)],
        [*range(40), *range(100, 130), *range(300, 360), 1, 2],
        [*range(40), *range(100, 130), *range(300, 360), 3],
        [*range(40), *range(400, 450), 4],
        [*range(40), *range(400, 450), 5, 6],
        [99, 98],
    ]
)
DEEP = PrefixTree.from_sequences([[*range(n), 1000 + n] for n in range(1, 301)])


@pytest.mark.parametrize("tree", [TREE, FOREST, DEEP, PrefixTree.from_sequences([[7]])])
def test_a_bar_runs_over_its_segments_positions_level_with_its_rows_of_the_mask(tree):
    positions = tree.position_ids.tolist()
    for (start, stop, _), box in zip(tree.segments.tolist(), _segment_boxes(tree).tolist(), strict=True):
        left, right, top, bottom = box
        assert (left, right) == (positions[start], positions[stop - 1] + 1)
        assert start <= top < bottom <= stop


@pytest.mark.parametrize("tree", [TREE, FOREST, DEEP])
def test_a_segment_hangs_on_the_one_that_holds_its_parent(tree):
    segments, parents = tree.segments.tolist(), _segment_parents(tree).tolist()
    for (start, _, _), found in zip(segments, parents, strict=True):
        parent = int(tree.parent[start])
        holders = [k for k, (first, stop, _) in enumerate(segments) if first <= parent < stop]
        assert [found] == (holders or [-1])


def drawn(tree):
    """The axes of the tree's picture, laid out."""
    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    axes = figure.subplots()
    _draw_segments(axes, tree)
    figure.draw_without_rendering()
    _label_segments(axes, tree)
    return axes


def test_every_segment_of_a_small_tree_has_its_length_beside_it_and_the_colour_of_the_mask():
    axes = drawn(TREE)
    assert [text.get_text() for text in axes.texts] == ["150", "70", "50", "40", "30", "20", "20"]
    colours = [to_rgb(bar.get_facecolor()) for bar in axes.patches]
    assert np.allclose(colours, _segment_colours(TREE))


@pytest.mark.parametrize("tree", [FOREST, DEEP])
def test_no_length_lies_on_another_or_on_a_bar(tree):
    axes = drawn(tree)
    labels = [text.get_window_extent() for text in axes.texts]
    bars = [bar.get_window_extent() for bar in axes.patches]
    assert 0 < len(labels) < len(bars)  # some have no room
    middles = np.array([label.padded(-2.5) for label in labels])  # an extent has room for descenders
    for i, (x0, y0, x1, y1) in enumerate(middles.reshape(-1, 4)):
        for other in [*labels[:i], *bars]:
            assert x1 <= other.x0 or other.x1 <= x0 or y1 <= other.y0 or other.y1 <= y0


SHAPE = ModelShape(2, 8, 2, 1, 4, 16, 50, 576)


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_mask(path, TREE),
        lambda path: plot_reward(path, [0.1, 0.5], {0: 0.2, 2: 0.9}),
        lambda path: plot_reward(path, [-3.0, 7.0], {0: 0.2, 2: 0.9}),
        lambda path: plot_savings(path, ROLLOUTS),
        lambda path: plot_tree(path, TREE),
        lambda path: plot_tree(path, FOREST),
        lambda path: plot_tree(path, DEEP),
        lambda path: plot_tree(path, PrefixTree.from_sequences([[7]])),
        lambda path: plot_tree(path, PrefixTree.from_lengths([3000], [[10, 20]])),
        lambda path: plot_report(path, report(ROLLOUTS, SHAPE, max_tokens=[128, 256, 512])),
        lambda path: plot_report(path, report(ROLLOUTS, SHAPE, max_tokens=[10])),
    ],
)
def test_pictures_are_written_without_a_display(tmp_path, draw):
    draw(tmp_path / "picture.png")
    image = imread(tmp_path / "picture.png")
    assert min(image.shape[:2]) > 300 and image.std() > 0.05
