"""The torchdistill example, and its box against a plain loop."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from kd_balance import BilevelOptimizer, WeightedKDLoss
from tests.habits import assert_one_sentence
from tests.students import EVERY_STEP, relative_error

pytest.importorskip("sklearn", reason="the example's data are scikit-learn's")
pytest.importorskip(
    "torchvision",
    reason="torchdistill needs torchvision, which does not import beside a CPU build of torch",
    exc_type=Exception,
)
pytest.importorskip("torchdistill", reason="torchdistill is not installed")

FOLDER = Path(__file__).parent.parent / "examples" / "torchdistill"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("train", "digits"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import train

    return train


def test_the_example_trains_student_and_weight_net(example, windows_of_four, capsys):
    box = example.main(["--epochs", "2"])
    optimizer = box.optimizer
    assert isinstance(optimizer, BilevelOptimizer)
    assert optimizer.metrics["meta_updates"] == 4  # 280 images in batches of 32, twice
    assert optimizer.metrics["skipped_updates"] == 0
    assert optimizer.criterion.teacher_bias.any()
    assert optimizer.criterion.weight_net.layers[-2].weight.any()  # zero at the start
    assert "student, test: all" in capsys.readouterr().out


def configuration(example, **optimizer):
    from torchdistill.common import yaml_util
    from torchdistill.common.main_util import import_dependencies

    config = yaml_util.load_yaml_file(str(FOLDER / "digits.yaml"))
    import_dependencies(config["dependencies"])
    train = config["train"]
    train["train_data_loader"]["sampler"]["class_or_func"] = torch.utils.data.SequentialSampler
    train["scheduler"] = {"key": "MultiStepLR", "kwargs": {"milestones": [1], "gamma": 0.1}}
    train["num_epochs"] = 2
    train["optimizer"].update(optimizer)
    train["optimizer"]["kwargs"]["bilevel"] = EVERY_STEP
    return config


def boxed(example, config):
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.models.registry import get_model

    torch.manual_seed(0)
    teacher, student = get_model("convnet", width=4), get_model("convnet", width=2)
    torch.manual_seed(1)
    start = copy.deepcopy(student)
    box = get_distillation_box(
        teacher, student, config["datasets"], config["train"], torch.device("cpu"), None, False, 1
    )
    return box, teacher, start


def run(box, teacher):
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        teacher.eval()
        for inputs, targets, supp_dict in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(inputs, targets, supp_dict))
        box.post_epoch_process()


def test_it_is_the_plain_loop(example):
    """Its scheduler, clipping and accumulation."""
    config = configuration(example, grad_accum_step=3, max_grad_norm=0.1)
    box, teacher, student = boxed(example, config)
    run(box, teacher)

    import digits

    torch.manual_seed(1)
    criterion = WeightedKDLoss.long_tailed(digits.train_counts(), temperature=4.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    meta_loader = digits.meta_loader(50)
    optimizer = BilevelOptimizer(optimizer, student, criterion, meta_loader, **EVERY_STEP)
    loader = torch.utils.data.DataLoader(digits.dataset("train"), batch_size=32)
    for _ in range(2):
        for index, (inputs, targets) in enumerate(loader, 1):
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            (criterion(student(inputs), teacher_logits, targets) / 3).backward()
            if index % 3 == 0:
                assert clip_grad_norm_(student.parameters(), 0.1) > 0.1
                optimizer.step()
                optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
    assert box.optimizer.metrics["meta_updates"] == optimizer.metrics["meta_updates"] == 6
    assert box.optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    pairs = ((box.student_model, student), (box.optimizer.criterion, criterion))
    for boxed_module, module in pairs:
        assert relative_error(boxed_module.parameters(), module.parameters()) < 1e-5


def test_two_stages(example):
    config = configuration(example)
    stage = {key: value for key, value in config["train"].items() if key != "log_freq"}
    stage["num_epochs"] = 1
    config["train"] = {"stage1": stage, "stage2": copy.deepcopy(stage)}
    box, teacher, _ = boxed(example, config)
    first = box.optimizer
    run(box, teacher)
    assert box.stage_number == 2 and box.optimizer is not first
    assert [o.metrics["meta_updates"] for o in (first, box.optimizer)] == [9, 9]


@pytest.mark.parametrize(
    "match, change",
    [
        (
            "given list, expected the modules to train",
            lambda train: train["optimizer"].update(filters_params=True),
        ),
        (
            "0 losses with the key WeightedKDLoss",
            lambda train: train["criterion"]["kwargs"].update(sub_terms={}),
        ),
        (
            "given class_counts and weight_net, expected one of them",
            lambda train: train["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"][
                "kwargs"
            ].update(weight_net={}),
        ),
    ],
)
def test_a_configuration_that_lacks_a_part_is_refused(example, match, change):
    config = configuration(example)
    change(config["train"])
    with pytest.raises(ValueError, match=match) as error:
        boxed(example, config)
    assert_one_sentence(error)
