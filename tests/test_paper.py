import csv
import dataclasses
import json

import numpy as np
import pytest

import reproduce
from paper import beyond, calibration, claims, convergence, layer_balance, memory_section, page, scaling, tables, waits
from paper.settings import TABLES, published
from reports import least_squares
from vocabpp_jax.schedules.simulation.cost import Sizes
from vocabpp_jax.schedules.simulation.simulator import FREE, GPU


@pytest.fixture(scope="module")
def found():
    return {number: tables.outcomes(number) for number in TABLES}


@pytest.mark.parametrize("number", TABLES)
def test_every_published_row_has_ours_beside_it(found, number):
    with TABLES[number].open() as file:
        rows = list(csv.DictReader(file))
    assert len(found[number]) == len(rows)
    for outcome, row in zip(found[number], rows, strict=True):
        line = outcome.line()
        assert all(str(line[key]) == row[key] for key in ("gpus", "seq_length", "method", "vocab_size"))
        assert line["mfu_published"] == (float(row["mfu_percent"]) if row["mfu_percent"] else None)
        assert line["fitted_to"] == (row["method"] == "baseline") and 0 < line["mfu_process_per_device"] < 100


@pytest.mark.parametrize("number", TABLES)
def test_the_frozen_calibration_keeps_its_bars(found, number):
    mean, largest = tables.errors(found[number])
    assert mean <= tables.BARS[number][0] and largest <= tables.BARS[number][1]
    predictions = [outcome for outcome in found[number] if outcome.row.method != "baseline"]
    assert tables.errors(predictions)[0] <= tables.BARS[number][0]


@pytest.mark.parametrize("number", TABLES)
def test_the_bars_hold_whether_nodes_have_100_or_200_gigabits(number):
    gpu = calibration.frozen(number)
    faster = dataclasses.replace(gpu, inter_bandwidth=2 * gpu.inter_bandwidth)
    rows = [row for row in published(number) if row.mfu is not None and row.gpus > 8]
    off = [abs(calibration.predict(row, faster).mfu - row.mfu) for row in rows]
    assert np.mean(off) <= tables.BARS[number][0] and max(off) <= tables.BARS[number][1]


@pytest.mark.parametrize(("number", "pairs"), [(5, 100), (6, 14)])
def test_methods_come_in_the_published_order_wherever_that_is_clear(found, number, pairs):
    clear, wrong = tables.order(found[number])
    assert clear >= pairs and not wrong


def test_a_turned_order_is_found(found):
    rows = [o for o in found[5] if (o.row.gpus, o.row.seq, o.row.vocab_size) == (8, 2048, 256_000)]
    turned = [dataclasses.replace(o, mfu=100 - o.mfu) for o in rows]
    assert tables.order(rows)[1] == [] and len(tables.order(turned)[1]) == tables.order(turned)[0] > 0


@pytest.mark.parametrize("number", TABLES)
def test_the_frozen_constants_are_those_of_least_squares(number):
    constants = {
        name: getattr(calibration.frozen(number), name)
        for name in (calibration.FITTED if number == 5 else calibration.V_HALF)
    }
    r = calibration.residuals(number, constants)
    J = least_squares.jacobian(lambda c: calibration.residuals(number, c), constants, r)
    left = r + J @ np.linalg.lstsq(J, -r)[0]
    assert left @ left > 0.99 * (r @ r)


def test_least_squares_finds_the_constants_that_made_the_data():
    x = np.linspace(1, 3, 9)
    true = {"a": 2.0, "b": 0.5}

    def residuals(c):
        return np.log((c["a"] + c["b"] * x**2) / (true["a"] + true["b"] * x**2))

    at, error = least_squares.gauss_newton(residuals, {"a": 1.0, "b": 1.0}, iterations=30)
    assert at == pytest.approx(true, rel=1e-3) and (error < 1e-2).all()


def test_only_pass_times_and_baselines_are_fitted_to():
    assert {row.method for number in TABLES for row in calibration.baselines(number)} == {"baseline"}
    expected = len(calibration.compared_pass_times(calibration.A100)) + len(calibration.baselines(5))
    assert len(calibration.residuals(5, {})) == expected


def test_the_claims_come_out(found):
    redis, baseline, v_half = claims.speedups(found)
    assert redis["published, least"] == pytest.approx(0.0545, abs=1e-3)
    assert 0.05 <= redis["simulated, least"] and redis["simulated, most"] >= 0.51
    for line in (baseline, v_half):
        assert line["simulated, most"] > redis["simulated, most"]


def test_what_the_tables_lack_is_there():
    rows = beyond.new_rows()
    assert len({row.name for row in rows}) == len(rows)
    kinds = {(row.order, row.method, row.tied) for row in rows}
    for schedule in ("v-min", "v-zb", "zb-h1", "zb-h2"):
        assert {(schedule, method, False) for method in ("vocab-1", "vocab-2")} <= kinds
    assert {("v-half", "vocab-2", False), ("v-half", "vocab-2", True), ("1f1b", "vocab-2", True)} <= kinds
    line = beyond.simulated(rows[:1])[0]
    assert 0 < line["MFU"] < 100 and line["GB most"] >= line["least"]


def test_waits_stand_beside_those_of_the_published_generators():
    peers = [peer for peer in waits.peers() if (peer["schedule"], peer["stages"]) == ("zb-h1", "4")]
    for peer in peers:
        published = float(peer["wait_percent"])
        assert waits.longest_wait(peer, FREE) <= published + 0.2
        assert waits.longest_wait(peer, GPU) <= published + 1
    assert len(waits.peers()) == 45 and len(peers) == 3
    lines = [{"ours": wait, "published generators": 4.0} for wait in (3.0, 4.9, 5.1)]
    assert waits.within(lines, "ours", 1) == 2


def test_interlaced_is_faster_without_its_collectives_and_most_between_nodes():
    faster = {(line["GPUs"], line["V"]): line["faster by"] for line in beyond.ablation()}
    assert 0 < faster[8, 32_000] < 0.05 < faster[32, 32_000]


# --- Table 3, Table 4 and the figures --------------------------------------------------------------------------------


def test_table_3_has_every_row_and_its_output_layer_is_near():
    lines = scaling.simulated()
    assert len(lines) == len(scaling.published_rows()) == 18
    assert np.mean([abs(line["error"]) for line in lines if line["layer"] == "output vocab-1"]) < 4
    for line in lines:
        parts = sum(v or 0 for k, v in line.items() if k.split(",")[0] in scaling.PARTS)
        assert parts == pytest.approx(line["shard, ms"])


def test_table_4_is_the_papers_formulas():
    b, s, h, V = 1, 2048, 3072, 128_000
    found = layer_balance.table4(Sizes(layers=32, hidden=h, seq=s, vocab_size=V))
    assert found["transformer"] == (b * s * h * (72 * h + 12 * s), 12 * h * h)
    assert found["input"] == (3 * b * s * h, h * V) and found["output"] == (6 * b * s * h * V, h * V)


def test_our_output_layer_has_the_flops_of_table_4_and_a_shard_its_part():
    tokens, hidden, V = 64, 128, 512
    whole = layer_balance.output_layer(V, tokens, hidden)
    for method in ("vocab-1", "vocab-2"):
        assert whole[method] == pytest.approx(6 * tokens * hidden * V, rel=0.03)
    assert layer_balance.output_layer(V // 4, tokens, hidden)["vocab-1"] == pytest.approx(
        whole["vocab-1"] / 4, rel=0.01
    )


def test_figures_2_and_3_are_the_published_ratios():
    assert layer_balance.figure2(seq=4096)[-1]["output, compute"] == pytest.approx(5.0)
    lines = layer_balance.figure3()
    last = [line for line in lines if line["stage"] == 15]
    assert last[0]["compute"] - 2 == pytest.approx(2.4, abs=0.05)
    assert last[0]["parameters"] - 2 == pytest.approx(2.6, abs=0.05)
    for split in {line["split"] for line in lines}:
        assert sum(line["layers"] for line in lines if line["split"] == split) == 32


# --- memory, convergence, the page -----------------------------------------------------------------------------------


def test_compiled_memory_stands_beside_the_published(tmp_path):
    row = published(5)[0]
    report = {"name": row.name, "peak_bytes": 15 * 2**30, "loop_copy_bytes": 0, "imbalance": 0.1, "parts": {"x": 2**30}}
    line = memory_section.line(row, report)
    assert line["difference"] == pytest.approx(15 - row.memory) and line["x"] == 1
    file = tmp_path / "memory.jsonl"
    file.write_text(json.dumps(report) + "\n")
    outcome = tables.outcomes(5, file)[0]
    assert outcome.line()["memory_error_gb"] == pytest.approx(15 - row.memory)


def test_families_are_compared_over_the_rows_that_were_published():
    shares = {"vocab-1": (-0.1, -0.3), "redis": (None,)}
    lines = [
        {"schedule": "1f1b", "method": method, "share": share, "devices differ by": 0.05}
        for method, of in shares.items()
        for share in of
    ]
    sharded, redis = memory_section.by_family(lines)
    assert (sharded["rows"], sharded["on average"], sharded["highest"]) == (2, "-20.0%", "-10.0%")
    assert (redis["rows"], redis["with published"], redis["highest"]) == (1, 0, None)


@pytest.mark.parametrize(
    ("before", "between", "said"),
    [
        ([], ["F0"], "end: none. Of the 3 collectives and transfers of the 1 rows that fit on the GPU"),
        ([], ["F0"], "these start later than the program has them: none."),
        (["B0"], ["S"], "end: grad_sum in"),
        (["B0"], ["F0"], "than the program has them: grad_sum in"),
    ],
)
def test_a_collective_that_starts_late_or_that_no_transformer_pass_hides_is_named(before, between, said):
    row = next(row for row in published(5) if row.method == "vocab-2")
    collectives = [
        {"step": "grad_sum", "bytes": 2**20, "passes_before": before, "passes_between": between},
        {"step": "stats", "bytes": 2**10, "passes_before": [], "passes_between": []},
        {"step": "transfer", "bytes": 2**30, "passes_before": [], "passes_between": []},
    ]
    report = {"peak_bytes": 1, "memory_bytes": 2, "loop_copy_bytes": 2**21, "collectives": collectives}
    text = memory_section.loops([row], {row.name: report})
    assert said in text and f"{row.name} (2 MiB an interval)" in text


def test_curves_in_the_cache_are_not_trained_again(tmp_path, monkeypatch):
    trained = []

    def losses(method, steps, batches):
        trained.append(method)
        yield from np.linspace(8, 7, steps) + 1e-3 * len(trained)

    monkeypatch.setattr(convergence, "losses", losses)
    monkeypatch.setattr(
        convergence, "load_tokens", lambda *_, **__: type("T", (), {"train": np.zeros(4000, np.uint16)})
    )
    first = convergence.curves(tmp_path / "c.jsonl", 30, lambda _: None)
    assert convergence.curves(tmp_path / "c.jsonl", 30, lambda _: None) == first
    assert trained == ["one device", *convergence.METHODS]
    by = {line["method"]: line for line in convergence.differences(first)}
    assert by["one device"]["largest difference"] == 0
    assert by["vocab-1"]["largest difference"] == pytest.approx(2e-3)


def test_a_section_replaces_its_own_part_of_the_page(tmp_path):
    path = tmp_path / "results.md"
    page.update(path, ["a", "b", "c"], {"c": "third", "a": "first"})
    page.update(path, ["a", "b", "c"], {"b": "second", "a": "new"})
    text = path.read_text()
    assert text.startswith("# Results") and "first" not in text
    assert text.index("new") < text.index("second") < text.index("third")


def test_one_command_writes_page_tables_and_pictures(tmp_path, capsys):
    reproduce.main(["--only", "ablation", "--page", str(tmp_path / "r.md"), "--cache", str(tmp_path / "cache")])
    assert "[ablation.csv](r/ablation.csv)" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r" / "ablation.csv").exists() and "1/1 ablation" in capsys.readouterr().out


def test_every_section_is_on_the_page_once():
    assert sorted(reproduce.PAGE) == sorted(reproduce.SECTIONS)


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["--only", "table7"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "'table7'" in said and "table5" in said
