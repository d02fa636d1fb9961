"Networks: counts, shapes, names, saving and one step of learning for each."
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nncomp import models
from nncomp.core import count_parameters, named_weights
from nncomp.models import VGG_PLANS, create_model, head_start_, model_input_shape, model_names, register_model

PARAMETERS = {
    "lenet-300-100": 266_610, "lenet-5": 431_080, "lenet-5-small": 44_426, "lenet-5-32": 61_706, "lenet-5-same": 655_596,
    "lenet-ullrich": 642_460, "mlp-1200-300-100": 1_333_410, "mlp-200": 159_010, "vgg11": 9_231_114, "vgg13": 9_416_010,
    "vgg16": 14_728_266, "vgg19": 20_040_522, "minivgg": 1_575_690,
}
SMALL = [name for name in PARAMETERS if not name.startswith("vgg")]


def shape_only(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.mark.parametrize("name", PARAMETERS)
def test_counts_and_outputs(name):
    net = shape_only(name)
    assert count_parameters(net) == PARAMETERS[name]
    assert isinstance(net, nn.Sequential) and all(not isinstance(m, nn.Sequential) for m in net)
    shape = model_input_shape(name)
    assert net(torch.zeros(3, *shape, device="meta")).shape == (3, 10)
    c, h, w = 5 - shape[0], *shape[1:]
    other = shape_only(name, num_classes=7, in_channels=c)
    assert other(torch.zeros(2, c, h, w, device="meta")).shape == (2, 7)


def test_vgg19_for_one_channel():
    assert count_parameters(shape_only("vgg19", in_channels=1)) == 20_039_370


@pytest.mark.parametrize("name", PARAMETERS)
def test_layer_names(name):
    net = shape_only(name)
    weights = [w.removesuffix(".weight") for w in named_weights(net)]
    kinds = {"conv": nn.Conv2d, "fc": nn.Linear}
    for prefix, kind in kinds.items():
        numbered = [w for w in weights if w.startswith(prefix)]
        assert numbered == [f"{prefix}{i}" for i in range(1, len(numbered) + 1)]
        assert all(type(net.get_submodule(w)) is kind for w in numbered)
    assert all(net.get_submodule(w).bias is not None for w in weights)


@pytest.mark.parametrize("plan, layers", [("vgg13", 36), ("minivgg", 21)])
def test_layers_before_the_classifier(plan, layers):
    assert [n for n, _ in shape_only(plan).named_children()].index("flatten") == layers


@pytest.mark.parametrize("name", SMALL)
def test_one_batch_can_be_learned(name):
    torch.manual_seed(0)
    net, y = create_model(name), torch.arange(8)
    x = torch.randn(8, *model_input_shape(name))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_round_trip_and_seed(name):
    torch.manual_seed(5)
    one = create_model(name)
    torch.manual_seed(5)
    two = create_model(name)
    state = one.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in two.state_dict().items())
    three = create_model(name)
    assert not torch.equal(three[-1].weight, one[-1].weight)
    three.load_state_dict(state)
    x = torch.randn(2, *model_input_shape(name))
    assert torch.equal(three.eval()(x), one.eval()(x))


def test_options():
    assert create_model("lenet-5-same").dropout.p == 0.2
    assert create_model("lenet-5-same", dropout=0).dropout.p == 0
    with pytest.raises(TypeError):
        create_model("lenet-5", dropout=0.5)
    with pytest.raises(ValueError, match="dropout"):
        create_model("lenet-5-same", dropout=50)


@pytest.mark.parametrize("name, value", [("num_classes", 0), ("num_classes", 2.5), ("in_channels", 0), ("in_channels", True)])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value}"):
        create_model("lenet-5-small", **{name: value})


def test_unknown_names():
    for call in (create_model, model_input_shape):
        with pytest.raises(ValueError, match="unknown model 'resnet'; choose from lenet-300-100, lenet-5"):
            call("resnet")


def test_register(monkeypatch):
    monkeypatch.setattr(models, "_REGISTRY", dict(models._REGISTRY))
    register_model("flat", models.mlp, (2, 28, 28))
    assert model_names()[-1] == "flat"
    assert create_model("flat", hidden=()).fc1.in_features == 2 * 784
    with pytest.raises(ValueError, match="already"):
        register_model("lenet-5", models.mlp, (1, 28, 28))
    with pytest.raises(ValueError, match="input_shape"):
        register_model("other", models.mlp, (1, 0, 28))


def test_names_are_listed_once():
    assert len(set(model_names())) == len(model_names())
    assert set(PARAMETERS) <= set(model_names()) and set(VGG_PLANS) <= set(model_names())


def test_a_head_start_needs_images_and_plain_tensors():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"images must be \(n, 3, h, w\) for the first convolution, got \(5, 1, 9, 9\)"):
        head_start_(net, torch.randn(5, 1, 9, 9))
    nn.utils.parametrizations.weight_norm(net[1])
    with pytest.raises(ValueError, match="parametrized"):
        head_start_(net, torch.randn(5, 3, 9, 9))
