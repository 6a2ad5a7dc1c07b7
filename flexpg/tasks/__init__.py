"""Problems: one task that needs no data, and those of any data set; and recorded conversations."""

from flexpg.tasks.arithmetic import arithmetic, arithmetic_reward
from flexpg.tasks.bytes import ByteTokenizer
from flexpg.tasks.dataset import problems
from flexpg.tasks.gsm8k import gsm8k
from flexpg.tasks.problem import Problem
from flexpg.tasks.tau_bench import tau_bench

__all__ = ["ByteTokenizer", "Problem", "arithmetic", "arithmetic_reward", "gsm8k", "problems", "tau_bench"]
