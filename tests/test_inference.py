"Layers for running compute what the dense ones do, whatever their shape; the calls that choose among them leave nothing broken."
import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nncomp.inference as inference
from nncomp.container import load, save
from nncomp.inference import CodebookLinear, SparseConv2d, SparseLinear, fastest, lightest, median_seconds, resident_bytes
from nncomp.models import create_model
from nncomp.weight_sharing import share_weights


def thin(layer, density, seed=0):
    "Leave about that fraction of the weights."
    with torch.no_grad():
        layer.weight *= torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < density
    return layer


@pytest.fixture
def sparse_wins(monkeypatch):
    "As on a machine on which every later form is faster."
    def timed(calls, x, repeats=11):
        return [call(x) is None or 1 / (i + 1) for i, call in enumerate(calls)]

    monkeypatch.setattr(inference, "median_seconds", timed)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([0., 0.1, 1.]), st.integers(0, 130), st.booleans(),
       st.sampled_from([torch.float32, torch.float64]))
def test_linear_forms(inputs, outputs, density, n, bias, dtype):
    torch.manual_seed(0)
    layer = thin(nn.Linear(inputs, outputs, bias=bias).to(dtype), density)
    share_weights(layer, 4)
    x = torch.randn(n, inputs, dtype=dtype)
    for form in (SparseLinear(layer), CodebookLinear(layer)):
        y = form(x)
        assert y.dtype == dtype and y.shape == (n, outputs)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
        assert form(x.view(n, 1, inputs)).shape == (n, 1, outputs)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2),
       st.integers(0, 4), st.booleans())
def test_convolutions(inputs, outputs, kh, kw, stride, padding, dilation, n, bias):
    torch.manual_seed(0)
    layer = thin(nn.Conv2d(inputs, outputs, (kh, kw), stride=stride, padding=padding, dilation=dilation, bias=bias), 0.3)
    x = torch.randn(n, inputs, 11, 9)
    torch.testing.assert_close(SparseConv2d(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_one_image_without_a_batch_and_inputs_that_do_not_fit():
    torch.manual_seed(0)
    conv, linear = thin(nn.Conv2d(3, 4, 3), 0.3), thin(nn.Linear(6, 4), 0.3)
    x = torch.randn(3, 8, 8)
    torch.testing.assert_close(SparseConv2d(conv)(x), conv(x), rtol=1e-4, atol=1e-5)
    for wrong, form in ((torch.randn(4, 3), SparseLinear(linear)), (torch.randn(2, 5, 8, 8), SparseConv2d(conv))):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            form(wrong)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_of_every_mode(mode):
    layer = thin(nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode), 0.3)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(SparseConv2d(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(30, 20), nn.Conv2d(3, 4, 3)])
def test_copies_and_pickles(layer):
    form = (SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d)(thin(layer, 0.2))
    x = torch.randn(2, 30) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 6, 6)
    twin, file = copy.deepcopy(nn.Sequential(form)), io.BytesIO()
    torch.save(form, file)
    file.seek(0)
    assert torch.equal(twin(x), form(x)) and torch.equal(torch.load(file, weights_only=False)(x), form(x))
    assert resident_bytes(twin) == resident_bytes(form)
    form.weight.values().zero_()
    assert not torch.equal(twin(x), form(x)), "a copy has tensors of its own"


def test_a_form_for_running_is_not_saved_in_silence(tmp_path):
    with pytest.raises(ValueError, match="weight.*must be dense"):
        save(SparseLinear(thin(nn.Linear(30, 20), 0.1)), tmp_path / "x.nncomp")
    assert not list(tmp_path.iterdir())
    coded = CodebookLinear(share(nn.Linear(30, 20)))
    save(coded, tmp_path / "coded.nncomp")
    again = load(tmp_path / "coded.nncomp", into=CodebookLinear(share(nn.Linear(30, 20))))
    assert torch.equal(again.assignments, coded.assignments)


def share(layer):
    share_weights(layer, 3)
    return layer


@pytest.mark.parametrize("wrong, message", [
    (lambda: SparseLinear(nn.Conv2d(1, 1, 1)), "must be a Linear, got Conv2d"),
    (lambda: SparseConv2d(nn.ConvTranspose2d(1, 1, 1)), "must be a Conv2d, got ConvTranspose2d"),
    (lambda: SparseConv2d(nn.Conv2d(4, 4, 3, groups=4)), "groups=4"),
    (lambda: CodebookLinear(nn.Linear(40, 40)), "1600 distinct weights"),
    (lambda: SparseLinear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), "parametrized"),
    (lambda: median_seconds([nn.Identity()], torch.ones(1), repeats=0), "repeats"),
])
def test_bad_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_lightest_takes_the_fewest_bytes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), thin(nn.Linear(64, 50), 0.05), nn.ReLU(), share(nn.Linear(50, 40)),
                        nn.ReLU(), nn.Linear(40, 3))
    light, choices = lightest(net)
    assert [(c.layer, c.form) for c in choices] == [("0", "dense"), ("3", "sparse"), ("5", "codebook"), ("7", "dense")]
    x = torch.randn(4, 8, 4, 4)
    torch.testing.assert_close(light(x), net(x), rtol=1e-4, atol=1e-5)
    assert resident_bytes(light) == sum(c.chosen for c in choices) < resident_bytes(net) == sum(c.dense for c in choices)
    assert not light.training and net.training and type(net[3]) is nn.Linear
    assert lightest(light)[1][0].form == "dense", "a light network can be given again"


def test_types_that_cannot_be_multiplied_sparsely_stay_dense():
    bytes_already = nn.Sequential(thin(nn.Linear(64, 64), 0.01).to(torch.float8_e4m3fn))
    assert [c.form for c in lightest(bytes_already)[1]] == ["dense"]


def test_fastest_replaces_every_place_of_a_module(sparse_wins):
    torch.manual_seed(0)
    shared = thin(nn.Linear(20, 20), 0.1)
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = shared, nn.Sequential(nn.ReLU(), shared)

        def forward(self, x):
            return self.b(self.a(x))

    quick, choices = fastest(Twice(), torch.randn(3, 20))
    assert quick.a is quick.b[1] and type(quick.a) is SparseLinear and [c.form for c in choices] == ["sparse"]
    x = torch.randn(5, 20)
    torch.testing.assert_close(quick(x), Twice()(x), rtol=1e-4, atol=1e-5)


def test_fastest_keeps_what_can_be_trained_and_what_is_not_called(sparse_wins):
    torch.manual_seed(0)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.norm = thin(nn.Linear(20, 20), 0.1), nn.Linear(20, 20), nn.BatchNorm1d(20)

        def forward(self, x):
            return self.norm(self.used(input=x) if x.shape[0] == 1 else self.used(x))

    quick, choices = fastest(nn.DataParallel(Half()), torch.randn(3, 20))
    assert [c.layer for c in choices] == ["used"] and type(quick) is Half and type(quick.unused) is nn.Linear
    quick.norm.weight.data.fill_(2.)  # an ordinary tensor: nothing was made in inference mode
    x = torch.randn(4, 20, requires_grad=True)
    quick(x).sum().backward()
    assert x.grad is not None and not any(p.is_inference() for p in quick.state_dict().values())
    assert fastest(Half(), torch.randn(1, 20))[1] == [], "a layer that is called by keyword is left alone"


def test_a_model_that_reads_its_own_weights_is_refused(sparse_wins):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = thin(nn.Linear(20, 20), 0.1)

        def forward(self, x):
            return self.one(x) + self.one.weight.view(-1).sum()

    with pytest.raises(ValueError, match="it may read their weights itself"):
        fastest(Reads(), torch.randn(3, 20))


def test_a_wrong_sparse_output_is_never_chosen(sparse_wins, monkeypatch):
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: torch.zeros(len(x), self.out_features))
    net = nn.Sequential(thin(nn.Linear(20, 20), 0.1))
    quick, choices = fastest(net, torch.randn(3, 20))
    assert [c.form for c in choices] == ["dense"] and type(quick[0]) is nn.Linear


def test_fastest_is_dense_where_the_whole_gains_nothing(monkeypatch):
    turns = iter([[1., 0.1], [1., 2.]])  # the layer gains, the network loses
    monkeypatch.setattr(inference, "median_seconds", lambda calls, x, repeats=11: next(turns))
    quick, choices = fastest(nn.Sequential(thin(nn.Linear(20, 20), 0.1)), torch.randn(3, 20))
    assert type(quick[0]) is nn.Linear and [(c.form, c.dense, c.chosen) for c in choices] == [("dense", 1., 1.)]


def test_a_whole_vgg(sparse_wins):
    torch.manual_seed(0)
    net = create_model("minivgg").eval()
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            thin(m, 0.05)
    quick, choices = fastest(net, torch.randn(2, 3, 32, 32))
    assert sum(isinstance(m, SparseConv2d) for m in quick.modules()) == 5 == sum(c.form == "sparse" for c in choices) - 1
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(quick(x), net(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seconds, last", [([2., 1.], True), ([1., 2.], False)])
def test_a_dense_model_gets_its_faster_layout(monkeypatch, seconds, last):
    monkeypatch.setattr(inference, "median_seconds", lambda calls, x, repeats=11: seconds[:len(calls)])
    monkeypatch.setattr(inference, "_sparse", lambda layer: None)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4))
    x = torch.randn(2, 3, 8, 8)
    quick, choices = fastest(net, x)
    assert quick[0].weight.is_contiguous(memory_format=torch.channels_last) is last and net[0].weight.is_contiguous()
    assert [c.form for c in choices] == ["dense", "dense"]
    torch.testing.assert_close(quick(x), net(x))


@pytest.mark.parametrize("sparse", [True, False])
def test_a_model_that_views_its_maps_runs_in_every_form(sparse_wins, monkeypatch, sparse):
    if not sparse:
        monkeypatch.setattr(inference, "_sparse", lambda layer: None)

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), thin(nn.Linear(288, 4), 0.1)

        def forward(self, x):
            return self.fc(self.conv(x).view(len(x), -1))

    net, x = Views(), torch.randn(2, 3, 8, 8)
    quick, choices = fastest(net, x)
    torch.testing.assert_close(quick(x), net(x), rtol=1e-4, atol=1e-5)
    assert {c.form for c in choices} == {"sparse" if sparse else "dense"} and (sparse or quick.conv.weight.is_contiguous())


def test_sparse_forms_of_a_layer_in_the_other_layout():
    torch.manual_seed(0)
    conv = thin(nn.Conv2d(5, 7, 3), 0.2)
    x, last = torch.randn(3, 5, 9, 9), copy.deepcopy(conv).to(memory_format=torch.channels_last)
    torch.testing.assert_close(SparseConv2d(last)(x), conv(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(SparseConv2d(last)(x.contiguous(memory_format=torch.channels_last)), conv(x), rtol=1e-4, atol=1e-5)


def test_fastest_leaves_the_example_alone():
    torch.manual_seed(0)
    net, example = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4)), torch.randn(3, 6)
    before = example.clone()
    fastest(net, example, repeats=1)
    assert torch.equal(example, before)


def test_light_layers_keep_the_mode_and_the_type():
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    share_weights(linear, 2)
    net = nn.Sequential(linear).eval()
    light, _ = lightest(net)
    assert not any(m.training for m in light.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert light(torch.randn(2, 64)).dtype == net(torch.randn(2, 64)).dtype == torch.bfloat16
