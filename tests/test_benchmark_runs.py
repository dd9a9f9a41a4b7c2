"""Training runs of the benchmark: every method, resuming, skipping, sharing a plan."""

import json
from itertools import product

import numpy as np
import pytest
import torch

import long_tail
from longtail import results
from longtail.afterwards import AFTERWARDS, predict_with
from longtail.data import Raw, Task
from longtail.fit import Machine, fit
from longtail.methods import METHODS, make_method
from longtail.models import MLP
from longtail.protocol import Protocol
from tests.devices import on_devices

CPU = Machine(torch.device("cpu"))
SETTINGS = {
    "name": "test", "dataset": "snippets", "teacher": "mlp_large", "student": "mlp_small",
    "imbalance": 10, "imbalances": (10,), "head": 40, "meta_per_class": 4,
    "validation_per_class": 4,
    "epochs": 3, "teacher_epochs": 1, "batch_size": 20, "meta_batch_size": 8, "views": 2,
}


def blobs(features=6, per_class=60, classes=4):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(classes).repeat(per_class)
    centres = 2 * torch.randn(classes, features, generator=generator)
    inputs = centres[targets] + torch.randn(len(targets), features, generator=generator)
    return Raw(inputs, targets, inputs.clone(), targets.clone())


@pytest.fixture
def protocol():
    return Protocol(**SETTINGS)


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def task(protocol, device):
    return Task(blobs(), protocol, torch.device(device))


@pytest.fixture
def teacher_logits(task):
    logits = torch.randn(2, len(task.targets), 4, generator=torch.Generator().manual_seed(1))
    return logits.to(task.device)


def student():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLP((6, 8), 4)


def trained(method, teacher_logits, epochs=3, **more):
    model = student()
    done = fit(model, method, epochs, teacher_logits, Machine(method.task.device), **more)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu(), done, model


@on_devices(
    "name",
    cpu=product(METHODS),
    cuda=product(METHODS),
    standin=product(name for name in METHODS if "+" not in name),  # with a usual hard loss
)
def test_every_method_trains_a_student(name, task, protocol, teacher_logits):
    for method in make_method(name, task, protocol, seed=0).candidates():
        parameters, done, model = trained(method, teacher_logits)
        before = torch.cat([p.detach().flatten() for p in student().parameters()])
        assert parameters.isfinite().all() and not torch.equal(parameters, before)
        assert done.epoch == 3
        assert bool(done.weights) == ("bikd" in name)
        for derived in method.derived:
            predict = AFTERWARDS[derived](model, task, protocol, 0)
            assert predict(task.test.inputs).shape == (len(task.test.targets), 4)


def test_the_teachers_logits_are_those_of_the_very_views_the_student_sees(task, protocol):
    model = student()
    views = torch.arange(2)
    pool = torch.arange(len(task.targets))
    with torch.no_grad():
        logits = torch.stack([model(task.views(pool, view)) for view in views])
    calls = []

    class Compare(METHODS["kd+meta"]):
        def loss(self, student_logits, teacher_logits, targets, progress):
            torch.testing.assert_close(student_logits, teacher_logits)
            calls.append(progress)
            return 0 * student_logits.sum()

    still = protocol.replace(weight_decay=0.0)
    fit(model, Compare(task, still, 0), 3, logits, CPU)
    assert len(calls) == 3 * ((len(pool)) // 20) and calls[-1] == 1


@pytest.mark.parametrize("name", ["bs+kd", "bikd-online"])
def test_a_teacher_s_class_bias_is_taken_away_on_demand(name, task, protocol, teacher_logits):
    """Every method with the option then sees what a teacher without that bias would have said."""
    log_prior = (task.counts / task.counts.sum()).log()
    results = [
        trained(make_method(spec, task, protocol, seed=0), teacher_logits + shift)[0]
        for spec, shift in ((f"{name}:debias=1", 0), (f"{name}:debias=1", log_prior), (name, 0))
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
    assert (results[0] - results[2]).abs().max() > 1e-2


def test_the_meta_set_can_be_trained_on_too(task, protocol):
    method = make_method("bikd-online:with_meta=1,features=student_ce+frequency", task, protocol, 0)
    assert (method.counts - task.counts).tolist() == [4] * 4
    (column,) = [f for f in method.criterion.weight_net.features if callable(f)]
    expected = (method.counts / method.counts.sum()).log()
    torch.testing.assert_close(column(None, None, torch.arange(4)), expected)


def test_the_meta_set_can_be_in_the_training_set_several_times(task, protocol):
    numbers = torch.arange(len(task.targets)).float()
    seen = []

    class Count(METHODS["bs+kd+meta"]):
        def loss(self, student_logits, teacher_logits, targets, progress):
            seen.extend(teacher_logits[:, 0].tolist())
            return super().loss(student_logits, teacher_logits, targets, progress)

    method = Count(task, protocol.replace(batch_size=1), 0, copies=3)
    trained(method, numbers[:, None].expand(2, -1, 4), epochs=1)
    times = torch.bincount(torch.tensor(seen).long(), minlength=len(numbers))
    assert set(times[task.train].tolist()) == {1} and set(times[task.meta].tolist()) == {3}
    assert (method.counts - task.counts).tolist() == [3 * 4] * 4


def test_a_student_of_the_meta_set_alone_sees_nothing_else(task, protocol):
    method = make_method("meta-alone", task, protocol, 0)
    samples = method.samples()
    assert set(samples.tolist()) == set(task.meta.tolist())
    assert len(task.train) <= len(samples) < len(task.train) + len(task.meta)


def test_a_robust_hard_loss_hardly_minds_unlikely_labels(task, protocol):
    logits = torch.tensor([[9.0, 0, 0, 0]] * 2, requires_grad=True)
    gradients = {}
    for robust in (0, 1e-4, 1):
        method = make_method(f"bs+kd:hard=1,soft=0,robust={robust}", task, protocol, 0)
        loss = method.loss(logits, torch.zeros(2, 4), torch.tensor([0, 3]), 1.0)
        gradients[robust] = torch.autograd.grad(loss, logits)[0].norm(dim=1)
    plain, nearly_plain, robust = gradients.values()
    torch.testing.assert_close(nearly_plain, plain, rtol=1e-2, atol=0)
    torch.testing.assert_close(robust[0], plain[0], rtol=1e-2, atol=0)
    assert robust[1] < 0.01 * plain[1]


def test_learned_weights_keep_to_their_bound(task, protocol):
    method = make_method("bikd-online:scale=2", task, protocol, 0)
    plain = make_method("bikd-online", task, protocol, 0)
    features = torch.randn(50, 2)
    expected = 2 * plain.criterion.weight_net(features)
    torch.testing.assert_close(method.criterion.weight_net(features), expected)


def test_balanced_softmax_knows_whether_the_meta_set_joins(task, protocol):
    without = make_method("bs+kd", task, protocol, seed=0)
    joined = make_method("bs+kd+meta", task, protocol, seed=0)
    assert (joined.counts - without.counts).tolist() == [4] * 4
    assert without.counts.tolist() == task.counts.tolist()


def test_balanced_softmax_and_kd_take_other_fixed_weights(task, protocol):
    student, teacher = torch.randn(2, 20, 4)
    targets = torch.arange(20) % 4
    halves, hard, soft, both = (
        make_method(spec, task, protocol, 0).loss(student, teacher, targets, 1.0)
        for spec in ("bs+kd", "bs+kd:hard=1,soft=0", "bs+kd:hard=0,soft=1", "bs+kd:hard=1,soft=1")
    )
    torch.testing.assert_close(hard + soft, both)
    torch.testing.assert_close(2 * halves, both)


def test_hard_weights_that_fall_with_a_power_of_the_frequency(task, protocol):
    student, teacher = torch.randn(2, 4, 4)

    def by_class(spec):
        method = make_method(spec, task, protocol, 0)
        rows = [(student[[c]], teacher[[c]], torch.tensor([c])) for c in range(4)]
        return torch.stack([method.loss(*row, 1.0) for row in rows])

    counts = task.counts
    weights = by_class("bs+kd:hard=1,soft=0,tail=0.5") / by_class("bs+kd:hard=1,soft=0")
    torch.testing.assert_close(weights[3] / weights[0], (counts[0] / counts[3]).sqrt())
    torch.testing.assert_close((weights * counts).sum(), counts.sum().float())
    soft = by_class("bs+kd:hard=0,soft=1,tail=0.5") / by_class("bs+kd:hard=0,soft=1")
    torch.testing.assert_close(soft, torch.ones(4))


def test_the_ltkd_loss_is_kd_where_its_corrections_have_nothing_to_correct(task, protocol):
    """With equal group probabilities the cross-group term vanishes for equal students."""
    method = make_method("ltkd", task, protocol, seed=0)
    sizes = torch.zeros(1, 4)
    for group in task.groups.values():
        sizes[:, group] = -torch.tensor(float(len(group))).log()
    teacher = (sizes * protocol.temperature).repeat(5, 1)
    targets = torch.tensor([0, 1, 2, 3, 0])
    loss = method.loss(teacher, teacher, targets, 1.0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(teacher, targets))


def test_divergences_are_weighted_by_who_is_surer(task, protocol):
    method = make_method("bd-kd", task, protocol, seed=0)
    sure, unsure = torch.tensor([[8.0, 0, 0, 0]]), torch.zeros(1, 4)
    target = torch.tensor([0])

    def kl(p, q):
        p, q = ((x / 4).log_softmax(1) for x in (p, q))
        return 16 * (p.exp() * (p - q)).sum()

    hard = torch.nn.functional.cross_entropy
    expected = hard(sure, target) + 2 * kl(unsure, sure) + kl(sure, unsure)
    torch.testing.assert_close(method.loss(sure, unsure, target, 1.0), expected)
    expected = hard(unsure, target) + kl(sure, unsure) + 2 * kl(unsure, sure)
    torch.testing.assert_close(method.loss(unsure, sure, target, 1.0), expected)


def test_logit_adjustment_subtracts_the_training_frequencies(task, protocol):
    model = student()
    plain = predict_with(model)(task.test.inputs)
    adjusted = AFTERWARDS["logit-adjustment"](model, task, protocol, 0)(task.test.inputs)
    frequency = task.counts / task.counts.sum()
    torch.testing.assert_close(plain - adjusted, frequency.log().expand_as(plain))


def test_tuned_adjustment_takes_the_tau_that_is_best_on_the_validation_set(
    task, protocol, teacher_logits
):
    _, _, model = trained(make_method("ce", task, protocol, 0), teacher_logits, epochs=10)
    tuned = AFTERWARDS["tuned-adjustment"](model, task, protocol, 0)
    inputs, targets = task.validation.inputs, task.validation.targets
    shift = predict_with(model)(inputs) - tuned(inputs)
    tau = shift / (task.counts / task.counts.sum()).log()
    torch.testing.assert_close(tau, tau[0, 0].expand_as(tau))

    def accuracy(logits):
        return (logits.argmax(dim=1) == targets).double().mean().item()

    others = [predict_with(model)(inputs) - t * shift / tau for t in np.linspace(0, 1.5, 31)]
    assert accuracy(tuned(inputs)) == max(map(accuracy, others)) > accuracy(others[0])


@pytest.mark.parametrize("name", ["kd", "bs+bikd-online", "bikd-lookahead"])
def test_a_killed_run_goes_on_where_it_stood(
    name, task, protocol, teacher_logits, tmp_path, monkeypatch
):
    whole, done, _ = trained(make_method(name, task, protocol, 0), teacher_logits, epochs=4)

    class Killed(Exception):
        pass

    count = iter(range(3))

    def kill(share):
        if next(count) == 2:
            raise Killed

    clock = iter(range(0, 10**6, 100))  # every epoch seems to take minutes, so each is saved
    monkeypatch.setattr("longtail.fit.time.monotonic", lambda: float(next(clock)))
    file = tmp_path / "run.pt"
    with pytest.raises(Killed):
        trained(make_method(name, task, protocol, 0), teacher_logits, 4, checkpoint=file,
                advance=kill)
    assert file.exists()
    parts = []
    resumed, again, _ = trained(
        make_method(name, task, protocol, 0), teacher_logits, 4, checkpoint=file,
        advance=lambda share, found=False: parts.append((share, found)),
    )
    assert torch.equal(resumed, whole)
    assert again.weights == done.weights
    assert parts == [(0.75, True), (0.25, False)] and not file.exists()


def test_seeds_change_a_run_and_nothing_else_does(task, protocol, teacher_logits):
    def run(name, seed):
        return trained(make_method(name, task, protocol, seed), teacher_logits)[0]

    torch.manual_seed(1)
    one = run("kd", 0)
    torch.manual_seed(2)
    assert torch.equal(run("kd", 0), one)
    assert not torch.equal(run("kd", 1), one)


def test_unknown_methods_and_options_get_a_sentence(task, protocol):
    with pytest.raises(ValueError, match="'kdd' is unknown, expected one of ce, bs"):
        make_method("kdd", task, protocol, 0)
    with pytest.raises(ValueError, match="has no value, expected key=value"):
        make_method("bikd-online:every", task, protocol, 0)
    with pytest.raises(ValueError, match="'kd:every=1' cannot be made"):
        make_method("kd:every=1", task, protocol, 0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command line over the blobs, in place of a data set that takes seconds to read."""
    monkeypatch.setattr("longtail.runner.load_raw", lambda dataset, path: blobs(512))
    small = Protocol(**SETTINGS, plan=(("biased", ("kd", "ce")), ("debiased", ("kd", "ce"))))
    monkeypatch.setattr(long_tail, "load_protocol", lambda name: small.replace(seeds=(0,)))
    out = tmp_path / "out.jsonl"

    def command(*arguments):
        long_tail.main(
            ["--device", "cpu", "--cache", str(tmp_path / "cache"), "--out", str(out), *arguments]
        )
        return results.read(out)

    return command


def test_a_plan_makes_one_row_for_each_method_and_teacher(run):
    rows = [(r["teacher"], r["method"]) for r in run()]
    derived = ("+logit-adjustment", "+tuned-adjustment", "+retrain")
    assert rows == [
        *(("biased", f"kd{after}") for after in derived), ("biased", "kd"),
        ("none", "ce+logit-adjustment"), ("none", "ce"),
        *(("debiased", f"kd{after}") for after in derived), ("debiased", "kd"),
    ]


def test_a_result_says_how_it_was_made(run):
    row = run("--method", "bikd-online:every=2", "--teacher-kind", "biased")[-1]
    assert row["method"] == "bikd-online:every=2" and row["options"]["every"] == 2
    assert row["settings"]["batch_size"] == 20
    # packages leave the "+cu130" of torch's own version out
    assert torch.__version__.startswith(row["versions"]["torch"])
    assert row["class_counts"] == [40, 18, 8, 4] and row["commit"] != ""
    assert set(row["test"]) == {"overall", "many", "medium", "few", "worst", "ece", "per_class"}
    assert row["seconds"] > 0 and row["teacher_metrics"]["overall"] > 0
    epochs = [epoch for epoch, _ in row["weights"]]
    assert epochs == [1, 2, 3] and np.shape(row["weights"][0][1]) == (4, 2)


def test_runs_with_a_result_are_skipped_and_lines_never_change(run, tmp_path):
    run()
    before = (tmp_path / "out.jsonl").read_text()
    run()
    assert (tmp_path / "out.jsonl").read_text() == before
    run("--seeds", "0", "1")
    after = (tmp_path / "out.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 2 * len(before.splitlines())


def test_a_half_written_line_is_done_again_on_a_line_of_its_own(run, tmp_path):
    run()
    out = tmp_path / "out.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]) + lines[-1][:100])
    rows = run()
    assert [r["method"] for r in rows].count("kd") == 2
    assert out.read_text().endswith("\n")


def test_the_time_left_is_that_of_the_runs_without_a_result(run, capsys):
    run("--seeds", "0", "1", "--method", "kd", "--teacher-kind", "biased")
    capsys.readouterr()
    run("--seeds", "0", "1", "2", "--method", "kd", "--teacher-kind", "biased")
    assert "100%" in (shown := capsys.readouterr().err) and "1.0/1 plain runs" in shown


def test_the_teacher_is_trained_once(run, monkeypatch):
    run("--method", "kd", "--teacher-kind", "biased")
    monkeypatch.setattr("longtail.teachers._make", lambda *args: pytest.fail("trained again"))
    run("--method", "kd", "dkd", "--teacher-kind", "biased", "--seeds", "0", "1")


def test_a_run_that_another_process_does_is_left_to_it(run, tmp_path):
    row = run("--method", "ce", "--teacher-kind", "biased")[-1]
    (tmp_path / "out.jsonl").unlink()
    with results.claim(tmp_path / "cache" / "locks" / row["run"]) as mine:
        assert mine
        assert run("--method", "ce", "--teacher-kind", "biased") == []


def test_a_failing_run_does_not_end_the_plan(run, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("longtail.methods.distillation.KD.loss", fail)
    rows = run("--method", "kd", "ce", "--teacher-kind", "biased")
    assert {r["method"] for r in rows} == {"ce", "ce+logit-adjustment"}
    assert "no such luck" in capsys.readouterr().err


def test_a_published_checkpoint_can_be_the_teacher(run, tmp_path):
    from longtail.models import build

    file = tmp_path / "published.pt"
    torch.save({"model": build("mlp_large", 4, seed=3).state_dict()}, file)
    rows = run("--method", "kd", "--teacher-kind", str(file))
    assert rows[-1]["teacher"] == "published" and rows[-1]["teacher_seconds"] == 0


def test_results_are_plain_json_lines(run, tmp_path):
    run("--method", "ce", "--teacher-kind", "biased")
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        json.loads(line)
