"The few small things that every chapter uses: checks with one clear error, weights by name, whole files, compiled loops."
import os
import signal
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba.core import event
from torch import nn

from nncomp.core import (
    _interrupts_wait,
    _patient,
    as_bytes,
    atomic_path,
    check_fraction,
    check_int,
    check_plain,
    check_writable,
    checksum,
    compiled,
    default_device,
    named_weights,
    unwrap,
)


@given(st.floats(0, 1))
def test_fractions_come_back_as_floats(value):
    for same in (value, np.float64(value), torch.tensor(value, dtype=torch.double), np.array(value)):
        found = check_fraction(same)
        assert type(found) is float and found == value


@pytest.mark.parametrize("value, expected", [
    (0, 0.0), (1, 1.0), (True, 1.0), (np.int64(1), 1.0), (Fraction(1, 4), 0.25), (Decimal("0.5"), 0.5),
])
def test_any_single_number_is_a_fraction(value, expected):
    assert check_fraction(value) == expected


@pytest.mark.parametrize("value", [
    50, -1e-9, 1.0000001, float("nan"), float("inf"), "0.5", "half", b"0.5", None, [0.5], {}, object(), 1j,
    torch.tensor([0.2, 0.3]), torch.zeros(0), np.zeros(3), torch.tensor(2.0), torch.tensor(1j), lambda: 0.5,
])
def test_all_else_is_one_error_with_the_name(value):
    with pytest.raises(ValueError, match=r"floor must lie in \[0, 1\], got ") as error:
        check_fraction(value, "floor")
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("value", ["3", 3.0, None, True, torch.tensor(3), [3]])
def test_what_is_no_integer_is_named(value):
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got"):
        check_int(value, 1, name="k")


def test_compiled_without_a_folder_for_machine_code(monkeypatch):
    "A read-only installation with no home: nothing can be kept, and everything runs."
    from numba.core.caching import CacheImpl, CompileResultCacheImpl

    for kind in {CacheImpl, CompileResultCacheImpl}:
        monkeypatch.setattr(kind, "_locator_classes", [])
    from numba import njit

    with pytest.raises(RuntimeError, match="no locator"):
        njit(cache=True)(lambda x: x)

    @compiled(nogil=True)
    def three_times(x):
        return 3 * x

    assert three_times(14) == 42


@pytest.mark.parametrize("module, names", [
    (nn.LayerNorm([4, 4]), []),
    (nn.RMSNorm([4, 4]), []),
    (nn.BatchNorm2d(4), []),
    (nn.InstanceNorm3d(2, affine=True), []),
    (nn.Conv2d(8, 1, 1), ["weight"]),                                   # a kernel that is a vector stays a weight
    (nn.ConvTranspose1d(2, 3, 2), ["weight"]),
    (nn.Embedding(5, 3), ["weight"]),
    (nn.Bilinear(2, 3, 4), ["weight"]),
    (nn.LSTM(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
    (nn.MultiheadAttention(8, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
])
def test_what_counts_as_a_weight(module, names):
    assert list(named_weights(module)) == names
    extra = set(named_weights(module, biases=True)) - set(names)
    assert all(name.endswith("bias") for name in extra) and not (names == [] and extra)


def test_what_counts_as_a_weight_in_real_networks():
    import torchvision

    with torch.device("meta"):
        convnext, vit = torchvision.models.convnext_tiny(), torchvision.models.vit_b_16()
    found = named_weights(convnext)
    assert not [name for name in found if "layer_scale" in name] and all(name.endswith("weight") for name in found)
    assert "encoder.pos_embedding" in named_weights(vit) and "class_token" not in named_weights(vit)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))])
def test_unwrap(wrap):
    net = nn.Linear(2, 2)
    assert unwrap(wrap(net)) is net


def test_a_link_stays_a_link_and_devices_are_refused(tmp_path):
    (tmp_path / "v3.bin").write_bytes(b"old")
    (tmp_path / "latest.bin").symlink_to("v3.bin")
    with atomic_path(tmp_path / "latest.bin") as part:
        part.write_bytes(b"new")
    assert (tmp_path / "latest.bin").is_symlink() and (tmp_path / "v3.bin").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    odd = "not an ordinary file"
    refused = {tmp_path / "pipe": odd, os.devnull: odd, tmp_path: "is a folder", tmp_path / "no" / "x": "create it first"}
    for bad, told in refused.items():
        with pytest.raises(ValueError, match=told):
            check_writable(bad)
        with pytest.raises(ValueError, match=told), atomic_path(bad):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.bin", "pipe", "v3.bin"]


@given(st.lists(st.lists(st.floats(width=32), max_size=5), max_size=4), st.data())
def test_checksum_sees_every_bit(rows, data):
    tensors = [torch.tensor(row) for row in rows]
    assert checksum(tensors) == checksum([t.clone() for t in tensors])
    full = [i for i, t in enumerate(tensors) if t.numel()]
    if full:
        i = data.draw(st.sampled_from(full))
        changed = [t.clone() for t in tensors]
        changed[i].view(torch.int32)[data.draw(st.integers(0, len(changed[i]) - 1))] ^= 1 << data.draw(st.integers(0, 31))
        assert checksum(changed) != checksum(tensors)                    # a CRC sees any single bit


def test_the_default_device_has_float64(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_device().type in ("cuda", "cpu")


def test_names_that_only_look_computed():
    "A position table beside its embedding is nothing that a hook computes."
    net = nn.Linear(2, 2)
    net.pos, net.pos_embed = torch.arange(4), nn.Parameter(torch.ones(4, 2))
    check_plain(net, named_weights(net))
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm):
        odd = nn.Sequential(wrap(nn.Conv2d(8, 1, 1)))
        with pytest.raises(ValueError, match="0.weight is computed from 0"):
            check_plain(odd, named_weights(odd))


@pytest.mark.parametrize("weight", [None, 0.5, torch.ones(3)])
def test_a_bias_beside_what_is_no_matrix(weight):
    net = nn.Module()
    net.weight, net.bias = weight, nn.Parameter(torch.ones(3))
    assert named_weights(net, biases=True) == {}


def test_checksum_passes_over_what_is_no_tensor():
    assert checksum([torch.ones(2), {"extra": 1}, None]) == checksum([torch.ones(2)])


class Impatient(event.Listener):
    "Interrupts as soon as something is compiled."
    def on_start(self, event): signal.raise_signal(signal.SIGINT)
    def on_end(self, event): pass


def test_an_interrupt_waits_for_the_compiler(tmp_path, monkeypatch):
    "It is not lost, and what was compiled can be used."
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))  # an empty one, or nothing would be compiled the second time

    @compiled()
    def twice(x):
        return 2 * x

    before = signal.getsignal(signal.SIGINT)
    with event.install_listener("numba:compile", Impatient()), pytest.raises(KeyboardInterrupt):
        twice(21)
    assert len(twice.signatures) == 1, "the compiler was cut off"
    assert signal.getsignal(signal.SIGINT) is before and twice(21) == 42


def test_interrupts_are_held_back_in_the_main_thread_alone():
    done = []
    with pytest.raises(KeyboardInterrupt), _interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        done.append("to the end")
    thread = threading.Thread(target=lambda: _interrupts_wait().__enter__() or done.append("no handler set"))
    thread.start()
    thread.join()
    assert done == ["to the end", "no handler set"]


def test_bytes_of_every_kind_of_view():
    row = torch.arange(7.).view(1, 7)
    conjugate = torch.randn(3, dtype=torch.complex64).conj()
    for view in (row[:, 3], row.t()[3:4], torch.arange(10.)[::5][:1], conjugate, row.transpose(0, 1)[::2]):
        expected = view.resolve_conj().numpy().tobytes()
        assert as_bytes(view).numpy().tobytes() == expected


def test_long_names_can_be_written(tmp_path):
    for n in (100, 240, 255):
        path = tmp_path / ("x" * n)
        with atomic_path(path) as part:
            part.write_text("a")
        assert path.read_text() == "a"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="loop is a link that leads to itself"):
        check_writable(tmp_path / "loop")


def test_machine_code_that_cannot_be_kept_is_used_all_the_same():
    calls = []

    class Function:
        def _compile_for_args(self, x):
            calls.append(x)
            if len(calls) == 1:
                raise OSError(122, "Disk quota exceeded")
            return x + 1

    assert _patient(Function())._compile_for_args(3) == 4 and calls == [3, 3]
