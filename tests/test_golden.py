"""Small schedules as files, in the grammar of torch's compute-only CSV: a change of one is seen in a diff.

After a change that is meant: ``python tests/test_golden.py`` writes them anew.
"""

from pathlib import Path

import pytest

from vocabpp_jax.schedules import SCHEDULES, Durations, build, methods_of
from vocabpp_jax.schedules.simulation import formats

GOLDEN = Path(__file__).parent / "golden"
CASES = [(schedule, method) for schedule in SCHEDULES for method in methods_of(schedule)]


def text_of(schedule: str, method: str) -> str:
    """The block repeated, and fitted to passes of different lengths: three devices, four microbatches."""
    counts = (2, 1, 1) if method == "redis" else None
    given = Durations(F=466, B=549, W=405, S=200, T=150, hidden_broadcast=4, grad_sum=8, stats=1, transfer=4)
    plain, fitted = (build(schedule, method, p=3, m=4, layer_counts=counts, durations=d) for d in (None, given))
    return f"# repeated\n{formats.to_csv(plain)}# fitted\n{formats.to_csv(fitted)}"


@pytest.mark.parametrize(("schedule", "method"), CASES)
def test_a_small_schedule_is_as_it_was(schedule, method):
    assert text_of(schedule, method) == (GOLDEN / f"{schedule}-{method}.csv").read_text()


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / f"{'-'.join(name)}.csv").write_text(text_of(*name))
