"""The codebases whose library installs from the registry in a moment, run with the real library."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts, meta_loader
from tests.students import relative_error

FOLDER = Path(__file__).parent.parent / "examples" / "codebases"
LIBRARIES = {
    "ignite_engine": "ignite", "skorch_net": "skorch", "modelopt_convert": "modelopt",
    "torchtune_kd_recipe": "torchtune",
}
ERRORS = {"torchtune_kd_recipe": 1e-4}  # its positions are float32

pytestmark = [
    pytest.mark.filterwarnings("ignore:Teacher's Module:UserWarning"),  # modelopt's own
    pytest.mark.filterwarnings("ignore:.*is not tested with:UserWarning"),
]


@pytest.fixture
def example(monkeypatch):
    """Loads a script beside which its neighbours are found."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def loaded(name):
        pytest.importorskip(LIBRARIES[name], reason=f"{LIBRARIES[name]} is not installed")
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield loaded
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_example_trains_and_its_check_passes(name, example, monkeypatch, capsys):
    module = example(name)
    for arguments in ([], ["--check"]):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()
    printed = capsys.readouterr().out
    assert int(re.search(r"meta updates: (\d+)", printed)[1]) > 5
    assert float(re.search(r"a relative error of (\S+)", printed)[1]) < ERRORS.get(name, 1e-7)


def wrapped(module, **settings):
    torch.manual_seed(0)
    clouds = module.clouds(module.LONG_TAIL, seed=0)
    student, teacher = module.Mlp(12), module.Mlp(16).eval()
    criterion = WeightedKDLoss.long_tailed(class_counts(clouds))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    meta = meta_loader(module.clouds(module.BALANCED, seed=1))
    settings = {"teacher": teacher, "unroll": 2, "every": 2, **settings}
    optimizer = BilevelOptimizer(optimizer, student, criterion, meta, **settings)
    update = module.distillation_update(student, teacher, optimizer, criterion)
    batches = list(zip(*(t.split(32) for t in clouds.tensors)))
    return update, optimizer, student, criterion, batches


def test_ignite_resumes_from_its_checkpoint(example, tmp_path):
    module = example("ignite_engine")

    def trainer():
        update, optimizer, student, criterion, batches = wrapped(module)
        engine = module.Engine(update)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        engine.add_event_handler(
            module.Events.ITERATION_COMPLETED, lambda: scheduler.step()
        )
        objects = {"engine": engine, "optimizer": optimizer, "student": student,
                   "scheduler": scheduler}
        return engine, objects, criterion, batches

    engine, objects, criterion, batches = trainer()
    engine.run(batches[:6], max_epochs=2)
    expected = [*objects["student"].parameters(), *criterion.phi]

    engine, objects, _, batches = trainer()
    saver = module.Checkpoint(objects, module.DiskSaver(tmp_path), n_saved=1)
    engine.add_event_handler(module.Events.EPOCH_COMPLETED, saver)
    engine.run(batches[:6], max_epochs=1)

    engine, objects, criterion, batches = trainer()
    saved = torch.load(tmp_path / saver.last_checkpoint, weights_only=True)
    module.Checkpoint.load_objects(objects, saved)
    engine.run(batches[:6], max_epochs=2)
    assert relative_error([*objects["student"].parameters(), *criterion.phi], expected) == 0


def test_ignite_simulates_a_schedule_within_a_window_and_changes_nothing(example):
    module = example("ignite_engine")
    from ignite.handlers import LRScheduler

    found = []
    for simulates in (True, False):
        update, optimizer, _, _, batches = wrapped(module)
        update(None, batches[0])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        if simulates:
            LRScheduler.simulate_values(4, scheduler)
        update(None, batches[1])
        assert optimizer.metrics["meta_updates"] == 1
        found.append([p.grad for p in optimizer.criterion.phi])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_skorch_saves_and_loads_the_weight_net_with_the_optimizer(example, tmp_path):
    module = example("skorch_net")
    points, labels = (t.numpy() for t in module.clouds(module.LONG_TAIL, seed=0).tensors)

    def net():
        torch.manual_seed(0)
        return module.DistilledClassifier(
            module.Mlp, module__width=12, criterion=WeightedKDLoss,
            criterion__class_counts=class_counts(labels), optimizer=torch.optim.SGD,
            optimizer__momentum=0.9, lr=0.1, batch_size=32, max_epochs=1, train_split=None,
            verbose=0, teacher=module.Mlp(16).eval(), meta=module.clouds(module.BALANCED, seed=1),
        ).initialize()

    def left(net):
        return [*net.module_.parameters(), *net.criterion_.phi]

    first = net().partial_fit(points, labels)
    files = {"f_params": tmp_path / "params.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    first.save_params(**files)
    second = net()
    second.load_params(**files)
    assert relative_error(left(second), left(first)) == 0
    for each in (first, second):
        torch.manual_seed(5)
        each.partial_fit(points, labels)
    assert relative_error(left(second), left(first)) == 0
    assert second.optimizer_.metrics["meta_updates"] == 4  # twice 16 steps, 8 a window
