"""Tasks: lists of problems with a prompt and an answer."""

from flexpg.training.tasks.arithmetic import arithmetic, arithmetic_reward
from flexpg.training.tasks.bytes import ByteTokenizer
from flexpg.training.tasks.dataset import problems
from flexpg.training.tasks.gsm8k import gsm8k
from flexpg.training.tasks.problem import Problem
from flexpg.training.tasks.torchtune import torchtune_dataset

__all__ = ["ByteTokenizer", "Problem", "arithmetic", "arithmetic_reward", "gsm8k", "problems", "torchtune_dataset"]
