"""Log-probabilities of a packed sequence, compared with a gather from the full [S, V] logits."""

from __future__ import annotations

import math

import pytest
import torch
from baseline import Operators
from torch import Tensor, nn

from flexpg.logprobs import token_logprobs
from flexpg.tree import PrefixTree

E, V = 8, 40
PROMPTS = [[1, 2, 3, 4], [5, 6]]
COMPLETIONS = [[[7, 8, 9], [7, 10, 11, 12, 13], [14]], [[15, 16], [3, 0, 0, 1]]]
TREE = PrefixTree.from_groups(PROMPTS, COMPLETIONS)
PROMPT_LENS = torch.tensor([4, 4, 4, 2, 2])
PRESENT = torch.arange(5) < (TREE.lengths - PROMPT_LENS)[:, None]  # [N, C]
MASK = PRESENT & torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool)  # with the tokens of a tool left out
MASK[2] = False  # a rollout without a loss token


def hidden_and_output(dtype=torch.float64, device="cpu") -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(0)
    hidden = torch.randn(1, TREE.padded_length, E, dtype=torch.float64)
    output = nn.Linear(E, V, dtype=torch.float64)
    return hidden.to(device, dtype).requires_grad_(), output.to(device, dtype)


def full_logits(hidden: Tensor, output: nn.Module, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies [N, C] of every completion token, from the logits of every position."""
    scores = (output(hidden[0]) / temperature).log_softmax(-1)  # [S, V]
    logprobs, entropies = (scores.new_zeros(PRESENT.shape) for _ in range(2))
    for n, step in PRESENT.nonzero().tolist():
        token = int(TREE.node[n, PROMPT_LENS[n] + step])
        at_parent = scores[TREE.parent[token]]
        logprobs[n, step] = at_parent[TREE.tokens[token]]
        entropies[n, step] = -(at_parent.exp() * at_parent).sum()
    return logprobs, entropies


def assert_close(values, expected, tolerance=1e-13):
    assert all((value - other).abs().max() < tolerance for value, other in zip(values, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_token_logprobs_values_and_gradients_match_full_logits(temperature):
    hidden, output = hidden_and_output()
    expected = full_logits(hidden, output, temperature)
    options = {"prompt_lens": PROMPT_LENS, "temperature": temperature}
    logprobs, entropies = token_logprobs(hidden, output, TREE, **options, return_entropy=True)
    assert_close((logprobs, entropies), expected)
    assert torch.equal(token_logprobs(hidden, output, TREE, **options), logprobs)
    weights, leaves = torch.randn_like(logprobs), (hidden, *output.parameters())
    assert_close(
        *(torch.autograd.grad((weights * x).sum(), leaves, retain_graph=True) for x in (logprobs, expected[0]))
    )
    assert not entropies.requires_grad
    results = token_logprobs(hidden, output, TREE, **options, return_entropy=True, entropy_grad=True, chunk_tokens=4)
    assert_close(results, expected)
    found = torch.autograd.grad((weights * results[0] + weights.flip(1) * results[1]).sum(), leaves)
    assert_close(
        found, torch.autograd.grad((weights * expected[0] + weights.flip(1) * expected[1]).sum(), leaves), 1e-12
    )


def test_token_logprobs_entropy_gradient_is_finite_where_a_probability_is_0():
    hidden, output = hidden_and_output()
    options = {"prompt_lens": PROMPT_LENS, "return_entropy": True, "entropy_grad": True}

    def masked_output(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(output(rows), (0, 3), value=float("-inf"))  # tokens that cannot be sampled

    expected, found = (token_logprobs(hidden, layer, TREE, **options)[1] for layer in (output, masked_output))
    assert_close(found, expected)
    leaves = (hidden, *output.parameters())
    assert_close(*(torch.autograd.grad(entropies.sum(), leaves) for entropies in (found, expected)))


def test_token_logprobs_first_token_is_predicted_by_the_prompts_last():
    hidden, output = hidden_and_output()
    scores = output(hidden[0]).log_softmax(-1)
    first = token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS)[:, 0]
    assert (first - scores[[3, 3, 3, 14, 14], [7, 7, 14, 15, 3]]).abs().max() < 1e-14


def test_token_logprobs_of_equal_and_overlapping_sequences():
    tree = PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 4]])
    hidden, output = hidden_and_output()
    scores = output(hidden[0]).log_softmax(-1)
    logprobs = token_logprobs(hidden, output, tree, prompt_lens=torch.tensor([1, 2, 3]))
    # Packed: 1 2 3 4 5 6. Tokens 4 and 5 are children of the 3 at index 2, and 6 is one of the 5 at index 4.
    expected = scores[[[0, 1, 2], [1, 2, 4], [2, 0, 0]], [[2, 3, 4], [3, 5, 6], [4, 0, 0]]]
    expected[2, 1:] = 0
    assert (logprobs - expected).abs().max() < 1e-14


# Only loss tokens, in chunks


class CountedRows(nn.Linear):
    """An output layer that records how many rows each call has."""

    def __init__(self, output: nn.Linear) -> None:
        super().__init__(E, V, dtype=output.weight.dtype)
        self.load_state_dict(output.state_dict())
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


def test_token_logprobs_loss_mask_scores_only_loss_tokens():
    hidden, output = hidden_and_output()
    counted = CountedRows(output)
    results = token_logprobs(hidden, counted, TREE, prompt_lens=PROMPT_LENS, loss_mask=MASK, return_entropy=True)
    assert counted.rows == [int(MASK.sum())]
    for value, expected in zip(results, full_logits(hidden, output), strict=True):
        assert (value - expected)[MASK].abs().max() < 1e-14
        assert not value[~MASK].any()


def test_token_logprobs_empty_loss_mask_is_zero_with_a_graph():
    hidden, output = hidden_and_output()
    logprobs = token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS, loss_mask=torch.zeros_like(MASK))
    logprobs.sum().backward()
    assert not logprobs.any() and not hidden.grad.any()


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 1000])
def test_token_logprobs_chunks_change_neither_values_nor_gradients(chunk_tokens):
    hidden, output = hidden_and_output()
    counted = CountedRows(output)
    weights, leaves = torch.randn(PRESENT.shape, dtype=torch.float64), (hidden, *output.parameters())
    expected = token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS)
    logprobs = token_logprobs(hidden, counted, TREE, prompt_lens=PROMPT_LENS, chunk_tokens=chunk_tokens)
    assert max(counted.rows) == min(chunk_tokens, 15) and sum(counted.rows) == 15  # no row for a prompt's tokens
    assert (logprobs - expected).abs().max() < 1e-14
    truth = torch.autograd.grad((weights * expected).sum(), leaves)
    assert_close(torch.autograd.grad((weights * logprobs).sum(), (hidden, *counted.parameters())), truth)


def test_token_logprobs_memory_is_one_chunk_of_logits():
    vocabulary, chunk_tokens = 5000, 32
    tree = PrefixTree.from_groups([[1] * 100], [[[2] * 60, [3] * 70]])
    hidden, output = torch.randn(1, tree.padded_length, 2, requires_grad=True), nn.Linear(2, vocabulary)
    lens = torch.tensor([100, 100])
    with Operators() as operators:
        options = {"prompt_lens": lens, "chunk_tokens": chunk_tokens, "return_entropy": True}
        logprobs, _ = token_logprobs(hidden, output, tree, **options)
        in_forward = operators.largest
        logprobs.sum().backward()
    assert in_forward == operators.largest == chunk_tokens * vocabulary
    assert operators.calls["special_entr"] == math.ceil(130 / chunk_tokens)  # entropies are not computed again


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_token_logprobs_saves_no_logits_for_the_backward(entropy_grad):
    hidden, output = hidden_and_output()
    saved: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        options = {"return_entropy": True, "entropy_grad": entropy_grad}
        token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS, chunk_tokens=4, **options)
    assert max(saved) <= int(PRESENT.sum()) * E


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_token_logprobs_results_are_float32_or_better(dtype, device):
    hidden, output = hidden_and_output(dtype, device)
    prompt_lens = PROMPT_LENS.to(device)
    results = token_logprobs(hidden, output, TREE.to(device), prompt_lens=prompt_lens, return_entropy=True)
    assert {x.dtype for x in results} == {torch.promote_types(dtype, torch.float32)}
    logits = output(hidden[0]).double().cpu()  # rounded as the layer rounds; the rest is float32
    assert_close((x.cpu() for x in results), full_logits(logits[None], nn.Identity()), 1e-5)


def test_token_logprobs_mask_past_the_completion_raises():
    hidden, output = hidden_and_output()
    for loss_mask in (torch.ones_like(MASK), MASK.int()):
        with pytest.raises(ValueError, match="loss_mask must be"):
            token_logprobs(hidden, output, TREE, prompt_lens=PROMPT_LENS, loss_mask=loss_mask)
