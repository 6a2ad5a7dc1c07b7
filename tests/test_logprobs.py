"""Log-probabilities from a packed row against the whole [S, V] logits, gathered token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from baseline import LargestTensor

from flexpg.logprobs import token_logprobs, token_logprobs_and_entropies
from flexpg.tree import PrefixTree

E, V = 8, 40
PROMPTS = [[1, 2, 3, 4], [5, 6]]
COMPLETIONS = [[[7, 8, 9], [7, 10, 11, 12, 13], [14]], [[15, 16], [3, 0, 0, 1]]]
TREE = PrefixTree.from_groups(PROMPTS, COMPLETIONS)
PROMPT_LENS = torch.tensor([4, 4, 4, 2, 2])
PRESENT = torch.arange(5) < (TREE.lengths - PROMPT_LENS)[:, None]  # [N, C]
MASK = PRESENT & torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool)  # a tool wrote every second token, or fourth
MASK[2] = False  # nothing of this rollout is trained


def hidden_and_output(dtype=torch.float64, device="cpu") -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(0)
    hidden = torch.randn(1, len(TREE), E, dtype=torch.float64)
    output = nn.Linear(E, V, dtype=torch.float64)
    return hidden.to(device, dtype).requires_grad_(), output.to(device, dtype)


def naive(hidden: Tensor, output: nn.Module, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N, C] of every completion token, from every logit of the row."""
    scores = (output(hidden[0]) / temperature).log_softmax(-1)  # [S, V]
    logprobs, entropies = (scores.new_zeros(PRESENT.shape) for _ in range(2))
    for n, step in PRESENT.nonzero().tolist():
        token = int(TREE.node[n, PROMPT_LENS[n] + step])
        at_parent = scores[TREE.parent[token]]
        logprobs[n, step] = at_parent[TREE.tokens[token]]
        entropies[n, step] = -(at_parent.exp() * at_parent).sum()
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_logprobs_entropies_and_gradients_are_those_of_the_full_logits(temperature):
    hidden, output = hidden_and_output()
    expected, expected_entropies = naive(hidden, output, temperature)
    options = {"prompt_lens": PROMPT_LENS, "temperature": temperature}
    logprobs, entropies = token_logprobs_and_entropies(hidden, output, TREE, **options)
    assert (logprobs - expected).abs().max() < 1e-14 and (entropies - expected_entropies).abs().max() < 1e-14
    assert torch.equal(token_logprobs(hidden, output, TREE, **options), logprobs)
    weights, leaves = torch.randn_like(expected), (hidden, *output.parameters())
    gradients, truth = (torch.autograd.grad((weights * x).sum(), leaves) for x in (logprobs, expected))
    assert all((value - other).abs().max() < 1e-13 for value, other in zip(gradients, truth, strict=True))
    assert not entropies.requires_grad


def test_the_first_completion_token_is_predicted_by_the_prompts_last():
    hidden, output = hidden_and_output()
    scores = output(hidden[0]).log_softmax(-1)
    first = token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS)[:, 0]
    last_of_prompt, tokens = [3, 3, 3, 14, 14], [7, 7, 14, 15, 3]
    assert (first - scores[last_of_prompt, tokens]).abs().max() < 1e-14
    index_before = [3, 6, 11, 14, 16]  # where a shift by one would look
    wrong = (first - scores[index_before, tokens]).abs() > 1e-3
    assert wrong.tolist() == [False, True, True, False, True]


def test_a_temperature_that_is_forgotten_shows():
    hidden, output = hidden_and_output()
    logprobs = token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS, temperature=0.5)
    assert (logprobs - naive(hidden, output)[0]).abs().max() > 0.1


def test_sequences_that_share_more_than_their_prompt_are_each_scored():
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 4]]
    tree = PrefixTree.from_sequences(sequences)
    hidden, output = hidden_and_output()
    scores = output(hidden[0]).log_softmax(-1)
    logprobs = token_logprobs(hidden, output, tree, prompt_lens=torch.tensor([1, 2, 3]))
    # Packed: 1 2 3 4 5 6, where 4 and 5 both hang under the 3 at index 2, and 6 under the 5 at index 4.
    expected = scores[[[0, 1, 2], [1, 2, 4], [2, 0, 0]], [[2, 3, 4], [3, 5, 6], [4, 0, 0]]]
    expected[2, 1:] = 0
    assert (logprobs - expected).abs().max() < 1e-14


# ---- trained positions only ------------------------------------------------------------------------------------------


class CountedRows(nn.Linear):
    """An output layer that remembers how many rows it was given, call by call."""

    def __init__(self, output: nn.Linear) -> None:
        super().__init__(E, V, dtype=output.weight.dtype)
        self.load_state_dict(output.state_dict())
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


def test_only_trained_positions_are_scored_and_the_others_are_zero():
    hidden, output = hidden_and_output()
    counted = CountedRows(output)
    logprobs, entropies = token_logprobs_and_entropies(hidden, counted, TREE, prompt_lens=PROMPT_LENS, mask=MASK)
    assert counted.rows == [int(MASK.sum())]
    for value, expected in zip((logprobs, entropies), naive(hidden, output), strict=True):
        assert (value - expected)[MASK].abs().max() < 1e-14
        assert not value[~MASK].any()


def test_without_a_mask_completion_tokens_alone_are_scored():
    hidden, output = hidden_and_output()
    counted = CountedRows(output)
    token_logprobs(hidden, counted, TREE, prompt_lens=PROMPT_LENS)
    assert counted.rows == [3 + 5 + 1 + 2 + 4]  # not one of them for the prompts' own 4 and 2 tokens


def test_with_nothing_trained_all_is_zero_and_the_graph_stands():
    hidden, output = hidden_and_output()
    logprobs = token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS, mask=torch.zeros_like(MASK))
    logprobs.sum().backward()
    assert not logprobs.any() and not hidden.grad.any()


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 1000])
def test_chunks_change_neither_values_nor_gradients(chunk_tokens):
    hidden, output = hidden_and_output()
    counted = CountedRows(output)
    weights, leaves = torch.randn(PRESENT.shape, dtype=torch.float64), (hidden, *output.parameters())
    expected = token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS)
    logprobs = token_logprobs(hidden, counted, TREE, prompt_lens=PROMPT_LENS, chunk_tokens=chunk_tokens)
    assert max(counted.rows) == min(chunk_tokens, 15) and sum(counted.rows) == 15
    assert (logprobs - expected).abs().max() < 1e-14
    truth = torch.autograd.grad((weights * expected).sum(), leaves)
    gradients = torch.autograd.grad((weights * logprobs).sum(), (hidden, *counted.parameters()))
    assert all((value - other).abs().max() < 1e-13 for value, other in zip(gradients, truth, strict=True))


def test_no_more_logits_than_a_chunks_exist_in_forward_and_backward():
    vocabulary, chunk_tokens = 5000, 32
    tree = PrefixTree.from_groups([[1] * 100], [[[2] * 60, [3] * 70]])
    hidden = torch.randn(1, len(tree), 2, requires_grad=True)
    output = nn.Linear(2, vocabulary)
    lens = torch.tensor([100, 100])
    with LargestTensor() as largest:
        logprobs, _ = token_logprobs_and_entropies(hidden, output, tree, prompt_lens=lens, chunk_tokens=chunk_tokens)
        in_forward = largest.numel
        logprobs.sum().backward()
    assert in_forward == largest.numel == chunk_tokens * vocabulary < len(tree) * vocabulary
    with LargestTensor() as largest:
        output(hidden[0])
    assert largest.numel == len(tree) * vocabulary  # the meter does see the full logits


def test_no_logits_are_kept_for_the_backward():
    hidden, output = hidden_and_output()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS, chunk_tokens=4)
        assert max(kept) <= int(PRESENT.sum()) * E
        naive(hidden, output)
        assert max(kept) == len(TREE) * V  # the hook does see logits


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_results_are_float32_or_better(dtype, expected, device):
    hidden, output = hidden_and_output(dtype, device)
    results = token_logprobs_and_entropies(hidden, output, TREE.to(device), prompt_lens=PROMPT_LENS.to(device))
    assert [x.dtype for x in results] == [expected, expected]
    logits = output(hidden[0]).double().cpu()  # rounded as the layer rounds; the rest is float32
    truth = naive(logits[None], nn.Identity())
    for value, other in zip(results, truth, strict=True):
        assert (value.cpu() - other).abs().max() < 1e-5
