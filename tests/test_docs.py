"""The examples in the documents run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_gpu_packages

ROOT = Path(__file__).parent.parent
# cuDNN's attention is traced, which takes jax's GPU packages and no GPU.
PLANS = [pytest.mark.a100, needs_gpu_packages]
EXAMPLES = [
    pytest.param(code, id=f"{path}-{n}", marks=PLANS if path == "docs/planner.md" else ())
    for path in ("README.md", "docs/models.md", "docs/planner.md", "docs/schedules.md", "docs/simulator.md")
    for n, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL))
]


@pytest.mark.sampled(20)
@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs_in_a_fresh_process(code):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert not losses or losses[-1] < losses[0]


def test_the_readme_s_example_has_at_most_twenty_lines():
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in first.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, link
