"""The cluster examples: bash, SLURM's directives, Kubernetes' fields, and verbs and options that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.inside import eyas
from tests.support.paths import ROOT

EXAMPLES = ROOT / "docs/examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sbatch"))
MANIFESTS = sorted(EXAMPLES.glob("*.yaml"))
_COUNT, _MEMORY = r"[1-9]\d*", r"\d+[KMGT]"
DIRECTIVES = {
    "job-name": r"[\w-]+",
    "array": r"\d+-\d+",
    "nodes": _COUNT,
    "ntasks": _COUNT,
    "ntasks-per-node": _COUNT,
    "gpus-per-node": _COUNT,
    "gpus-per-task": _COUNT,
    "cpus-per-task": _COUNT,
    "mem": _MEMORY,
    "time": r"\d{2}:\d{2}:\d{2}",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"[%\w.-]+",
}
"""Options of sbatch (its manual page) that the examples use -> their values."""
API = {"Service": "v1", "Job": "batch/v1"}


def test_the_page_shows_every_example() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    assert len(SCRIPTS) == len(MANIFESTS) == 2
    assert all(f"examples/{path.name}" in page for path in (*SCRIPTS, *MANIFESTS))
    assert "not run on a cluster" in page


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_with_directives_that_slurm_knows(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False).stderr == ""
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash" and "set -euo pipefail" in lines
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert len(directives) > 8 and directives[-1] < first_command, "SLURM reads no directive behind a command"
    options = {}
    for number in directives:
        name, _, value = lines[number].removeprefix("#SBATCH --").partition("=")
        assert name not in options and re.fullmatch(DIRECTIVES[name], value), lines[number]
        options[name] = value
    assert {"job-name", "nodes", "time", "mem", "output"} <= set(options)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_which_variable_is_missing(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", path], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "RECIPE: the recipe file" in done.stderr


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_has_what_the_api_needs(path: Path) -> None:
    names = [document["metadata"]["name"] for document in documents(path)]
    for document in documents(path):
        assert document["apiVersion"] == API[document["kind"]]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", document["metadata"]["name"])
    job = next(document for document in documents(path) if document["kind"] == "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("OnFailure", "Never"), "a Job knows no other"
    assert 0 < spec["parallelism"] <= spec["completions"] and spec["backoffLimit"] > 0
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert all(isinstance(word, str) for word in container["command"]), "numbers need quotes"
        assert ":" in container["image"] and container["resources"]["limits"]["memory"]
        assert all(isinstance(variable.get("value", ""), str) for variable in container["env"])
        if spec.get("completionMode") == "Indexed":  # pod 0 is JOB-0.SUBDOMAIN, by the headless service
            assert pod["subdomain"] in names and f"--nnodes={spec['completions']}" in container["command"]
            endpoint = f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29400"
            assert endpoint in container["command"]
            (service,) = [document for document in documents(path) if document["kind"] == "Service"]
            assert service["spec"]["clusterIP"] == "None"
            assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Verb and options of every eyas command of the examples."""
    for path in SCRIPTS:
        text = path.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if found := re.search(r"(?:^eyas|-m eyas_host) (\w+) (.*)", line):
                yield found[1], [word for word in shlex.split(found[2]) if word.startswith("--")]
    for path in MANIFESTS:
        job = next(document for document in documents(path) if document["kind"] == "Job")
        words = job["spec"]["template"]["spec"]["containers"][0]["command"]
        start = words.index("eyas") if "eyas" in words else words.index("eyas_host")
        yield words[start + 1], [word for word in words[start + 2 :] if word.startswith("--")]


def test_the_verbs_and_options_exist(tmp_path: Path) -> None:
    found = list(commands())
    assert sorted(verb for verb, _ in found) == ["distill", "distill", "tune", "tune"]
    helps = {verb: eyas(tmp_path, verb, "--help").out for verb, _ in found}
    for verb, options in found:
        assert len(options) >= 2 and all(option in helps[verb] for option in options), (verb, options)
