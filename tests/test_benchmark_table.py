"""Metrics, and the report made of results."""

import math

import pytest
import torch

from longtail.metrics import evaluate, expected_calibration_error
from longtail.paired import against, paired_gain
from longtail.protocol import load_protocol
from longtail.table import grouped, markdown


def test_accuracies_by_group_are_means_over_classes():
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = torch.tensor([0, 0, 0, 1, 1, 1, 0, 2])
    logits = torch.nn.functional.one_hot(predictions, 3).float()
    values = evaluate(logits, targets, {"many": [0, 1], "few": [2]})
    assert values["overall"] == 75.0
    assert values["per_class"] == [75.0, 100.0, 50.0]
    assert (values["many"], values["few"], values["worst"]) == (87.5, 50.0, 50.0)


def test_calibration_error_of_a_coin_that_claims_certainty():
    logits = torch.tensor([[50.0, 0.0]] * 4)
    assert expected_calibration_error(logits, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.5)


def test_calibration_error_is_weighted_by_bin():
    p = math.log(0.7 / 0.3)
    logits = torch.tensor([[p, 0.0]] * 10 + [[50.0, 0.0]] * 10)
    targets = torch.tensor([0] * 7 + [1] * 3 + [0] * 8 + [1] * 2)
    assert expected_calibration_error(logits, targets) == pytest.approx(0.1)


def record(method, seed, overall, teacher="biased", few=1.0, **more):
    test = {"overall": overall, "many": 80.0, "medium": 40.0, "few": few, "worst": 0.0, "ece": 9.0}
    return {
        "method": method, "seed": seed, "teacher": teacher, "dataset": "cifar10", "test": test,
        "imbalance": 100, "protocol": "cpu", "settings": {"teacher": "resnet8x4"}, "versions": {},
        "machine": {"device": "cpu", "amp": False, "compile": False}, "cpu_seconds": 10.0, **more,
    }


RECORDS = [
    *(record("kd", seed, 40.0 + seed) for seed in range(3)),
    *(record("ours", seed, 45.0 + seed + 0.1 * (seed == 1), cpu_seconds=31.0) for seed in range(3)),
    *(record("bs", seed, 50.0, teacher="none") for seed in range(2)),
]


def test_the_paired_test_removes_what_seeds_share():
    tables = grouped(RECORDS)
    methods = next(iter(tables.values()))
    gain = paired_gain(methods["ours"], methods["kd"], "test", "overall")
    assert gain.mean == pytest.approx(5.0333, abs=1e-3) and gain.seeds == 3
    assert gain.deviation == pytest.approx(0.1 / 3**0.5)
    # t = mean / (sd / sqrt(3)) = 151 with two degrees of freedom
    assert gain.p == pytest.approx(4.385e-5, rel=0.01)


def test_one_common_seed_allows_no_test():
    gain = paired_gain([record("ours", 2, 47.0)], RECORDS[:3], "test", "overall")
    assert gain == (5.0, None, None, 1)


def test_differences_to_any_method():
    more = [
        record("third", 0, 44.0, few=3.0),
        record("fourth", 1, 45.0),
        record("elsewhere", 0, 1.0, teacher="debiased"),
    ]
    tables = {group.title: rows for group, rows in grouped([*RECORDS, *more]).items()}
    assert against("kd", tables, "test").split("\n") == [
        "## cifar10, imbalance 100: Teacher trained with cross entropy (biased)",
        "",
        "Against `kd`, seed by seed.",
        "",
        "| method | seeds | overall | few |",
        "|---|---:|---:|---:|",
        "| ours | 3 | +5.0 ± 0.1 (p = 4.4e-05) | +0.0 ± 0.0 |",
        "| third | 1 | +4.0 | +2.0 |",
        "| fourth | 1 | +4.0 | +0.0 |",
        "",
    ]


def test_wrong_labels_are_named_in_the_title():
    settings = {"teacher": "resnet8x4", "label_noise": 0.4}
    (group,) = grouped([record("kd", 0, 40.0, settings=settings)])
    assert group.title.startswith("cifar10, imbalance 100, 40% of the labels wrong: Teacher")


def test_of_a_repeated_seed_the_last_result_counts():
    tables = grouped([*RECORDS, record("ours", 0, 10.0)])
    ours = next(iter(tables.values()))["ours"]
    assert [r["test"]["overall"] for r in ours] == [10.0, 46.1, 47.0]


def test_the_report_shows_mean_spread_gain_and_cost():
    text = markdown(RECORDS, "test", "cpu.jsonl")
    rows = [line for line in text.splitlines() if line.startswith("| ours")]
    assert rows == [
        "| ours | 3 | 46.0 ± 1.0 | 80.0 ± 0.0 | 40.0 ± 0.0 | 1.0 ± 0.0 | 0.0 ± 0.0 | 9.0 ± 0.0 "
        "| +5.0 (p = 4.4e-05) | +0.0 | 3.1× |"
    ]
    wanted = ("| ours", "| kd")
    order = [line.split(" | ")[0] for line in text.splitlines() if line.startswith(wanted)]
    assert order == ["| ours", "| kd"]
    without = text.split("No teacher")[1]
    assert "| bs | 2 |" in without and "+9.5 (p = 0.033)" in without


def test_what_was_planned_and_not_run_is_listed():
    plan = (("biased", ("kd", "ours", "bs")), ("debiased", ("kd", "bs")))
    protocol = load_protocol("cpu").replace(plan=plan)
    text = markdown(RECORDS, "test", "cpu.jsonl", protocol=protocol)
    missing = text.split("## Planned and not run")[1].split("## Settings")[0]
    assert missing.split("\n") == [
        "",
        "",
        "- Imbalance 100. Teacher trained with balanced softmax (debiased). Seeds 0, 1, 2: `kd`.",
        "- Imbalance 100. No teacher. Seeds 2: `bs`.",
        "",
        "",
    ]
    protocol = protocol.replace(plan=(("biased", ("kd", "ours")),))
    assert "the plan is complete" in markdown(RECORDS, "test", "cpu.jsonl", protocol=protocol)
    assert "| method |" not in markdown([], "test", "cpu.jsonl", protocol=protocol)
