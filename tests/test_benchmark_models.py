"""The networks carry RepDistiller's parameter names and shapes."""

import pytest
import torch

from longtail.models import MODELS, build

PARAMETERS = {  # of the published networks for 100 classes
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_2": 2_255_156,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_as_published(name):
    model = build(name, 100, seed=0)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name, parameter, shape",
    [
        ("resnet8x4", "conv1.weight", (32, 3, 3, 3)),
        ("resnet8x4", "layer1.0.downsample.0.weight", (64, 32, 1, 1)),
        ("resnet8x4", "layer1.0.downsample.1.running_var", (64,)),
        ("resnet32x4", "layer3.4.bn2.num_batches_tracked", ()),
        ("resnet20", "layer2.0.conv1.weight", (32, 16, 3, 3)),
        ("resnet56", "layer1.8.conv2.weight", (16, 16, 3, 3)),
        ("resnet8", "fc.weight", (100, 64)),
        ("wrn_40_2", "block1.layer.0.convShortcut.weight", (32, 16, 1, 1)),
        ("wrn_40_2", "block3.layer.5.bn2.weight", (128,)),
        ("wrn_16_2", "bn1.weight", (128,)),
        ("wrn_16_2", "fc.bias", (100,)),
    ],
)
def test_names_and_shapes_as_published(name, parameter, shape):
    assert build(name, 100, seed=0).state_dict()[parameter].shape == shape


def test_narrow_networks_have_no_shortcut_where_nothing_changes():
    names = build("resnet20", 10, seed=0).state_dict()
    assert not any(name.startswith("layer1") and "downsample" in name for name in names)
    names = build("wrn_16_2", 10, seed=0).state_dict()
    assert "block1.layer.1.convShortcut.weight" not in names


@pytest.mark.parametrize("name", MODELS)
def test_every_model_maps_a_batch_to_logits_and_back(name):
    model = build(name, 7, seed=0)
    width = next(model.parameters()).shape[1]
    inputs = torch.randn(2, width) if name.startswith("mlp") else torch.randn(2, 3, 32, 32)
    logits = model(inputs)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_seed_decides_the_initial_values_and_nothing_else_is_moved():
    before = torch.get_rng_state()
    one, same, other = (build("resnet8", 10, seed) for seed in (1, 1, 2))
    assert torch.equal(one.fc.weight, same.fc.weight)
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="'resnet9' is unknown"):
        build("resnet9", 10, seed=0)
