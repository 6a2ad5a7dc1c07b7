"""Data sets and rewards that need no download."""

from flexpg.tasks.arithmetic import arithmetic, arithmetic_reward
from flexpg.tasks.bytes import ByteTokenizer
from flexpg.tasks.gsm8k import gsm8k, gsm8k_closeness, gsm8k_reward
from flexpg.tasks.problem import Problem

__all__ = ["ByteTokenizer", "Problem", "arithmetic", "arithmetic_reward", "gsm8k", "gsm8k_closeness", "gsm8k_reward"]
