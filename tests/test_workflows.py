"""The files for GitHub agree with Makefile, pyproject.toml and constraints.txt, and request few permissions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.name: path.read_text() for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
TARGETS = set(re.findall(r"(?m)^([a-z-]+):.*## ", (ROOT / "Makefile").read_text()))


def jobs(name: str) -> dict[str, dict]:
    return yaml.safe_load(WORKFLOWS[name])["jobs"]


def pinned(package: str) -> str:
    """Return the version that pyproject.toml's dev extra pins."""
    (version,) = (pin.partition("==")[2] for pin in PROJECT["optional-dependencies"]["dev"] if pin.startswith(package))
    return version


def version_range(specifier: str) -> tuple[str, str]:
    """Return the lowest version and the first one that is too high: ">=2.11,<2.15" -> ("2.11", "2.15")."""
    lowest, too_high = re.fullmatch(r"\D*>=([\d.]+),<([\d.]+)", specifier).groups()
    return lowest, too_high


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_calls_targets_of_the_makefile(name):
    commands = re.findall(r"run: make ([^\n#]*)", WORKFLOWS[name])
    assert commands
    for command in commands:
        called = re.sub(r'[A-Z]+=("[^"]*"|\$\{\{.*?\}\}|\S+)', "", command).split()
        assert called and set(called) <= TARGETS, command


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_has_read_permission_timeouts_and_no_credentials_in_checkouts(name):
    workflow = yaml.safe_load(WORKFLOWS[name])
    assert workflow["permissions"] == {"contents": "read"} and "group" in workflow["concurrency"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 40 and set(job.get("permissions", {})) <= {"pages", "id-token"}
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}


def test_actions_have_one_version_in_all_workflows():
    used = {line for text in WORKFLOWS.values() for line in re.findall(r"uses: (\S+)", text)}
    assert len({action.partition("@")[0] for action in used}) == len(used), used
    assert all(re.fullmatch(r"[\w/-]+@(v\d+|release/v1|[0-9a-f]{40})", action) for action in used), used


def test_tested_python_versions_begin_with_the_lowest_that_is_allowed():
    tested = jobs("test.yml")["python"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={tested[0]}"
    assert tested == [f"3.{11 + n}" for n in range(len(tested))]
    classifiers = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", text)]
    assert classifiers == tested[: len(classifiers)] and classifiers  # a new version is tested before it is claimed


def test_tested_torch_versions_are_the_oldest_and_the_newest_that_are_allowed():
    (torch,) = (requirement for requirement in PROJECT["dependencies"] if requirement.startswith("torch"))
    oldest, too_new = version_range(torch)
    tested = [job["torch"] for job in jobs("test.yml")["torch"]["strategy"]["matrix"]["include"]]
    minors = [version.rpartition(".")[0] for version in tested]
    assert minors == [oldest, f"2.{int(too_new.partition('.')[2]) - 1}"]


def test_pre_commit_runs_the_same_ruff_as_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {hook["repo"].rpartition("/")[2]: hook["rev"] for hook in hooks}
    assert revisions["ruff-pre-commit"] == f"v{pinned('ruff')}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_form_has_fields_with_ids_of_their_own(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
