"""Python functions as tools that the model calls in an episode.

    tokenizer:
      _component_: flexpg.training.causal_lm.tokenizer
      path: /tmp/Qwen3-0.6B  # with a response_template, by which calls are parsed
      tools: [my_project.search, my_project.add]
    environment:
      _component_: flexpg.training.tools.Tools
      functions: ${tokenizer.tools}

The chat template tells the model their names, arguments and docstrings; `transformers.utils.get_json_schema` reads type
hints and docstrings in Google style. A turn without calls ends the episode; `rewards` score it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexpg.training.dotpaths import load_dotpath
from flexpg.training.tasks.problem import Problem


class Tools:
    """An environment that calls functions; see `flexpg.training.environments`.

    Args:
        problem: The problem of the episode; functions do not see it.
        functions: Their dotpaths.

    >>> tools = Tools(Problem("", ""), ["math.gcd"])
    >>> call = {"type": "function", "function": {"name": "gcd", "arguments": {}}}
    >>> tools.step([{"role": "assistant", "content": "", "tool_calls": [call]}])
    ([{'role': 'tool', 'name': 'gcd', 'content': '0'}], 0.0)
    """

    def __init__(self, problem: Problem, functions: Sequence[str]) -> None:
        self.functions = {function.__name__: function for function in map(load_dotpath, functions)}

    def step(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
        """Return what the called functions return; of one that raises, the error."""
        calls = [call["function"] for call in messages[-1].get("tool_calls", [])]
        return [{"role": "tool", "name": call["name"], "content": self._result(**call)} for call in calls], 0.0

    def _result(self, name: str, arguments: dict[str, Any]) -> str:
        if name not in self.functions:
            return f"error: there is no tool {name}, the tools are {', '.join(self.functions)}"
        try:
            return str(self.functions[name](**arguments))
        except Exception as error:  # the model chose the arguments, and sees what is wrong with them
            return f"error: {type(error).__name__}: {error}"
