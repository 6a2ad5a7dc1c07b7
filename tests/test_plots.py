"""Figures show what was computed, and are drawn without a display."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from flexpg.analysis import palette, plots
from flexpg.analysis.flops import ModelShape
from flexpg.analysis.report import report, rollouts_from_lengths
from flexpg.masks import block_mask, dense_mask
from flexpg.tree import PrefixTree

ROOT = Path(__file__).parent.parent
TREE = PrefixTree.from_lengths([150, 70], [[30, 40, 50], [20, 20]])
ROLLOUTS = rollouts_from_lengths([150, 70], [[30, 40, 50], [20, 20]])
# A system prompt of two questions, one of whose completions continues in two ways; a duplicate; an unrelated sequence.
FOREST = PrefixTree.from_sequences(
    [
        [*range(40), *range(100, 130), *range(200, 220)],
        [*range(40), *range(100, 130), *range(200, 220)],
        [*range(40), *range(100, 130), *range(300, 360), 1, 2],
        [*range(40), *range(100, 130), *range(300, 360), 3],
        [*range(40), *range(400, 450), 4],
        [99, 98],
    ]
)
DEEP = PrefixTree.from_sequences([[*range(n), 1000 + n] for n in range(1, 301)])
SHAPE = ModelShape(2, 8, 2, 1, 4, 16, 50, 576)


def test_token_colors_are_white_exactly_where_the_mask_is_false():
    visible = dense_mask(TREE.end[: TREE.num_tokens]).numpy()
    assert ((plots._token_colors(TREE) == 1).all(-1) == ~visible).all()
    long = PrefixTree.from_lengths([1500], [[800, 700]])
    shown = torch.linspace(0, 2999, 2048).round().long()
    visible = dense_mask(long.end)[shown][:, shown].numpy()
    assert ((plots._token_colors(long) == 1).all(-1) == ~visible).all()


def test_colors_tell_tokens_of_several_sequences_from_tokens_of_one():
    is_shared = (plots._colors(FOREST) == to_rgb(palette.PROMPT)).all(-1)
    nodes_of = [(sequence.unique(), n) for n, sequence in enumerate(FOREST.node)]
    sequences = sum((torch.arange(FOREST.num_tokens)[:, None] == nodes).any(1).int() for nodes, _ in nodes_of)
    assert (is_shared == (sequences > 1).numpy()).all() and 0 < is_shared.sum() < len(is_shared)


@pytest.mark.parametrize("path", ["docs/figures.py", "flexpg/analysis/plots.py", "flexpg/training/run_curves.py"])
def test_colors_of_figures_are_those_of_the_palette(path):
    text = (ROOT / path).read_text().replace('TEXT = "#123456"', "")  # replaced by the color of the page
    assert "flexpg.analysis.palette import" in text
    assert not re.findall(r"""["'](?:#[0-9a-fA-F]{3,8}|tab:\w+|C\d|black|white|gr[ae]y|red|green|blue)["']""", text)


def test_block_kinds_match_the_mask():
    kinds = plots._block_kinds(TREE)
    n = len(kinds)
    blocks = dense_mask(TREE.end).view(n, 128, n, 128).transpose(1, 2)
    any_visible, all_visible = blocks.any(-1).any(-1).numpy(), blocks.all(-1).all(-1).numpy()
    assert (kinds == np.where(all_visible, 2, np.where(any_visible, 1, 0))).all()
    assert int((kinds == 1).sum()) == int(block_mask(TREE).kv_num_blocks.sum())


@pytest.mark.parametrize("tree", [TREE, FOREST, DEEP])
def test_plot_tree_draws_bars_over_positions_and_rows_of_their_segments(tree):
    bars = plots.plot_tree(tree).axes[0].patches
    positions = tree.position_ids.tolist()
    for bar, (start, stop, _) in zip(bars, tree.segments.tolist(), strict=True):
        (left, bottom), (right, top) = bar.get_bbox().get_points()
        assert (left, right) == (positions[start], positions[stop - 1] + 1)
        assert start <= min(bottom, top) < max(bottom, top) <= stop


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.plot_mask(TREE),
        lambda: plots.plot_reward([0.1, 0.5], {0: 0.2, 2: 0.9}),
        lambda: plots.plot_reward([-3.0, 7.0], {}),
        lambda: plots.plot_savings(ROLLOUTS),
        lambda: plots.plot_tree(DEEP),
        lambda: plots.plot_tree(PrefixTree.from_sequences([[7]])),
        lambda: plots.plot_tree(PrefixTree.from_lengths([3000], [[10, 20]])),
        lambda: plots.plot_report(report(ROLLOUTS, SHAPE, max_tokens=[128, 256, 512])),
        lambda: plots.plot_report(report(ROLLOUTS.select([0, 3]), SHAPE, max_tokens=[10])),
    ],
)
def test_plots_return_figures_that_a_notebook_shows(draw):
    figure = draw()
    assert isinstance(figure, Figure)
    image = imread(BytesIO(figure._repr_png_()))
    assert min(image.shape[:2]) > 300 and image.std() > 0.05
