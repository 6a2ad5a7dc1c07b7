"""A dotpath in a configuration that does not exist is reported in one line that names the file and the nearest name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flexpg.training.components import component
from flexpg.training.config import build_loss
from flexpg.training.dotpaths import load_dotpath
from flexpg.training.environments import build_environment
from flexpg.training.rewards import build_rewards
from flexpg.training.tasks import Problem
from flexpg.training.tools import Tools


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Write modules of a user's, once because Python caches them, and return their folder."""
    tmp_path = tmp_path_factory.mktemp("modules")
    (tmp_path / "own_rewards.py").write_text("def correct_answer(completion, answer):\n    return 1.0\n")
    (tmp_path / "broken_rewards.py").write_text("import no_package_of_this_name\n")
    (tmp_path / "own_project").mkdir()
    (tmp_path / "own_project/__init__.py").write_text("")
    (tmp_path / "own_project/rewards.py").write_text("")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(tmp_path)
        yield tmp_path


MISTAKES = {
    "own_rewards.corect_answer": "{folder}/own_rewards.py has no corect_answer; did you mean correct_answer?",
    "own_rewards.something_else": "{folder}/own_rewards.py has no something_else",
    "own_reward.f": "there is no module own_reward in the environment or in {here}; did you mean own_rewards?",
    "own_project.reward.f": "{folder}/own_project/__init__.py has no reward; did you mean rewards?",
    "own_rewards.correct_answer.of": "own_rewards.correct_answer.of: 'function' object has no attribute 'of'",
    "broken_rewards.f": "broken_rewards.f cannot be imported: ModuleNotFoundError: No module named '",
    "own_rewards": "own_rewards must be a function or class, got module <module 'own_rewards' from ",
}


@pytest.mark.parametrize(("dotpath", "reason"), MISTAKES.items(), ids=MISTAKES)
def test_dotpath_with_a_mistake_is_one_line_with_the_nearest_name(dotpath, reason, modules):
    reason = reason.format(folder=modules, here=Path.cwd())
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}") as caught:
        load_dotpath(dotpath)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda dotpath: build_rewards({"correct": {"_component_": dotpath}}),
        lambda dotpath: build_environment({"_component_": dotpath}),
        lambda dotpath: build_loss(OmegaConf.create({"loss": {"_component_": dotpath}})),
        lambda dotpath: component(OmegaConf.create({"optimizer": {"_component_": dotpath}}), "optimizer"),
        lambda dotpath: Tools(Problem("", ""), [dotpath]),
    ],
    ids=["reward", "environment", "loss", "component", "tools"],
)
def test_misspelt_function_of_every_option_names_file_and_nearest(build, modules):
    words = re.escape(f"{modules}/own_rewards.py has no corect_answer; did you mean correct_answer?")
    with pytest.raises(ValueError, match=words):
        build("own_rewards.corect_answer")
