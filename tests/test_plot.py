"""The pictures show what was computed: colours are read back from the files."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from flexpg.masks import block_mask, dense_mask
from flexpg.plot import _block_kinds, _token_colours, plot_mask, plot_reward, plot_savings
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


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_mask(path, TREE),
        lambda path: plot_reward(path, [0.1, 0.5], {0: 0.2, 2: 0.9}),
        lambda path: plot_reward(path, [-3.0, 7.0], {0: 0.2, 2: 0.9}),
        lambda path: plot_savings(path, ROLLOUTS),
    ],
)
def test_pictures_are_written_without_a_display(tmp_path, draw):
    draw(tmp_path / "picture.png")
    image = imread(tmp_path / "picture.png")
    assert min(image.shape[:2]) > 300 and image.std() > 0.05
