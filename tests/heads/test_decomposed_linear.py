"""DecomposedLinear: every form is the dense layer with masked weights, whatever surrounds it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from captum_classfilters.core.errors import FileFormatError, OptionError, ShapeError
from captum_classfilters.heads import DecomposedLinear
from captum_classfilters.heads.decomposed_linear import BACKENDS, transposed

K, C = 12, 5


def even(seed=0, k=3):
    """Three different inputs for each output, not in order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(K, generator=generator)[:k] for _ in range(C)])


def ragged(seed=0):
    """A mask with an empty row and a full one."""
    mask = torch.rand(C, K, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[1], mask[3] = False, True
    return mask


CHOICES = {"even": even, "ragged": ragged}


def as_mask(indices):
    if indices.dtype == torch.bool:
        return indices
    mask = torch.zeros(C, K, dtype=torch.bool)
    for row, channels in enumerate(indices.tolist()):
        mask[row, channels] = True
    return mask


def dense(bias=True, seed=1):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(K, C, bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def rows(*shape, seed=2):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed))


def small(choice="even", bias=True, backend="auto"):
    """The layer, and the dense one it came from with the same weights left out."""
    indices, linear = CHOICES[choice](), dense(bias)
    layer = DecomposedLinear.from_linear(linear, indices, backend)
    with torch.no_grad():
        linear.weight.mul_(as_mask(indices))
    return layer, linear


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1,), (5,), (40,), (), (0,), (2, 3), (5, 2, 4)], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_is_the_dense_layer_with_masked_weights(backend, choice, shape, bias):
    layer, linear = small(choice, bias, backend)
    inputs = rows(*shape)
    with torch.no_grad():
        found = layer(inputs)
        torch.testing.assert_close(found, F.linear(inputs, linear.weight, linear.bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.to_dense()(inputs), found, rtol=1e-5, atol=1e-5)
    assert found.shape == (*shape, C)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_mask_gives_what_a_float64_loop_gives(data):
    classes, features, count = (data.draw(st.integers(low, 9)) for low in (1, 1, 1))
    seed, backend = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(BACKENDS))
    cells = data.draw(st.lists(st.booleans(), min_size=classes * features, max_size=classes * features))
    generator = np.random.default_rng(seed)
    mask = torch.tensor(cells).view(classes, features)
    layer = DecomposedLinear(features, classes, mask, backend=backend, dtype=torch.float64)
    inputs, bias = generator.normal(size=(count, features)), generator.normal(size=classes)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor(bias))
        found = layer(torch.tensor(inputs)).numpy()
    kept, expected = iter(layer.weight.tolist()), np.tile(bias, (count, 1))
    for c in range(classes):
        for j in range(features):
            if mask[c, j]:
                expected[:, c] += next(kept) * inputs[:, j]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_computed_in_float64(backend, choice):
    layer, linear = small(choice, backend=backend)
    inputs = rows(5).double()
    with torch.no_grad():
        found = layer.to(torch.float64)(inputs)
        torch.testing.assert_close(found, linear.double()(inputs), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("backend", ["bag", "gather", "auto"])
def test_half_precision_works_where_it_can(backend, choice, dtype):
    layer, linear = small(choice, backend=backend)
    inputs = rows(5).to(dtype)
    with torch.no_grad():
        found = layer.to(dtype)(inputs)
        expected = linear.to(dtype).double()(inputs.double())
    assert found.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@torch.no_grad()
def test_csr_refuses_half_precision():
    layer, _ = small(backend="csr")
    with pytest.raises(OptionError, match=r'"csr" computes in float32 and float64, got torch.bfloat16; choose "bag"'):
        layer.bfloat16()(rows(5).bfloat16())


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_the_dtype_and_values_of_a_linear(backend, asked, own, grad):
    layer, linear = small(backend=backend)
    layer, linear, inputs = layer.to(own), linear.to(own), rows(5).to(own)
    with torch.autocast("cpu", dtype=asked), torch.set_grad_enabled(grad):
        found, expected = layer(inputs), linear(inputs)
        mixed = layer(inputs.to(asked)) if own == torch.float32 else found
    assert found.dtype == expected.dtype == mixed.dtype
    torch.testing.assert_close(found, expected, rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("backend", ["bag", "gather"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_layer_is_where_its_weights_are(device, assert_close, choice, backend, grad):
    expected, linear = small(choice, backend=backend)
    layer = copy.deepcopy(expected)
    with device.mode, torch.set_grad_enabled(grad):
        layer = moved(layer, device.name)
        for inputs in (rows(3), rows(40)):
            assert_close(layer(inputs.to(device.name)), expected(inputs).to(device.name))
        assert_close(layer.to_dense().weight, linear.weight.to(device.name))


def moved(layer, where):
    """``layer.to(where)``, also where that is a fake device."""
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(where)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(where))
    return layer


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (64, 64), (63, 65), (7, 9), (130, 50), (0, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_fast_transposition_is_a_transposition(shape, dtype):
    values = torch.arange(shape[0] * shape[1]).view(shape).to(dtype)
    for given_values in (values, values.T.contiguous().T):
        found = transposed(given_values)
        torch.testing.assert_close(found, values.T, rtol=0, atol=0)
        assert found.is_contiguous()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_masked_dense_layer(backend, choice):
    layer, linear = small(choice, backend=backend)
    mask = as_mask(CHOICES[choice]())
    mine, its = rows(2, 7).requires_grad_(), rows(2, 7).requires_grad_()
    layer(mine).square().sum().backward()
    F.linear(its, linear.weight * mask, linear.bias).square().sum().backward()
    torch.testing.assert_close(mine.grad, its.grad)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)
    torch.testing.assert_close(layer.weight.grad, linear.weight.grad[mask])


@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_changes_kept_weights_and_no_others(choice):
    layer, linear = small(choice)
    before = layer.to_dense().weight
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(rows(7)).square().sum().backward()
    optimizer.step()
    changed = layer.to_dense().weight != before
    assert torch.equal(changed, as_mask(CHOICES[choice]()))
    assert torch.equal(before, linear.weight)


def test_taking_over_weights_draws_no_random_numbers():
    linear = dense()
    before = torch.get_rng_state()
    DecomposedLinear.from_linear(linear, even()).to_dense()
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_weights_still_pass_a_gradient_to_the_inputs():
    layer, linear = small()
    layer.requires_grad_(False)
    inputs = rows(3).requires_grad_()
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, linear.weight.sum(0).expand(3, K))


def test_the_layer_takes_over_mode_and_frozen_parameters():
    linear = dense().eval()
    linear.bias.requires_grad_(False)
    layer = DecomposedLinear.from_linear(linear, even())
    assert (layer.training, layer.weight.requires_grad, layer.bias.requires_grad) == (False, True, False)
    assert not layer.to_dense().training


# -- copies and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_a_state_dict_brings_its_own_indices(choice):
    layer, _ = small(choice)
    other = {"even": even(seed=9), "ragged": ragged().flip(1)}[choice]
    target = DecomposedLinear(K, C, other)
    target.load_state_dict(layer.state_dict())
    inputs = rows(5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(target(inputs), layer(inputs), rtol=0, atol=0)
    torch.testing.assert_close(target.to_dense().weight, layer.to_dense().weight, rtol=0, atol=0)


def test_a_copy_stands_alone():
    layer, _ = small("ragged")
    double = copy.deepcopy(layer)
    with torch.no_grad():
        expected = layer(rows(5))
        layer.weight.zero_()
        torch.testing.assert_close(double(rows(5)), expected, rtol=0, atol=0)


def test_only_weights_follow_a_dtype():
    layer = small()[0].to(torch.float64)
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == {
        "weight": torch.float64, "bias": torch.float64, "indices": torch.int32, "offsets": torch.int32,
    }  # fmt: skip


def broken(name, change):
    def state():
        found = small()[0].state_dict()
        found[name] = change(found[name].clone())
        return found

    return state


def with_first(value):
    def change(tensor):
        tensor[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (broken("indices", with_first(K)), r"indices must lie in \[0, 12\), got .* to 12; the file is broken"),
        (broken("indices", with_first(-1)), r"indices must lie in \[0, 12\), got -1 to"),
        (broken("indices", lambda found: found.float().fill_(torch.nan)), r"indices must lie in \[0, 12\)"),
        (broken("offsets", with_first(1)), "another number of features for each class"),
        (lambda: DecomposedLinear(K, C, even(k=4)).state_dict(), "decompose with the k of the saved network first"),
        (lambda: small("ragged")[0].state_dict(), "decompose with the k of the saved network first"),
    ],
    ids=["too large", "negative", "not a number", "offsets", "other k", "ragged"],
)
def test_a_broken_state_dict_is_refused_before_anything_is_read_with_it(state, message):
    layer, linear = small()
    whole = nn.Sequential(nn.Identity(), layer)
    with pytest.raises(FileFormatError, match=message):
        whole.load_state_dict({f"1.{name}": tensor for name, tensor in state().items()})
    with torch.no_grad():
        torch.testing.assert_close(whole(rows(5)), linear(rows(5)))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (even().float(), ShapeError, r"indices must be integers .* got torch.float32 \(5, 3\)"),
        (even()[:4], ShapeError, r"shape \(5, k\) or a bool mask \(5, 12\); got torch.int64 \(4, 3\)"),
        (even()[0], ShapeError, r"got torch.int64 \(3,\)"),
        (even().tolist(), ShapeError, "got list"),
        (ragged()[:, :9], ShapeError, r"the mask must have shape \(5, 12\), got \(5, 9\)"),
        (even().index_fill(0, torch.tensor([2]), K), OptionError, r"lie in \[0, 12\), got \[12, 12, 12\] in row 2"),
        (even().index_fill(0, torch.tensor([1]), -1), OptionError, "row 1; -1 stands for a class without samples"),
        (even().index_fill(0, torch.tensor([4]), 7), OptionError, r"row 4 repeats one: \[7, 7, 7\]"),
    ],
    ids=["float", "rows", "one row", "list", "mask", "out of range", "minus one", "repeated"],
)
def test_indices_that_cannot_be_are_refused(indices, error, message):
    with pytest.raises(error, match=message):
        DecomposedLinear(K, C, indices)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_inputs_that_do_not_fit_are_refused(grad):
    layer, _ = small()
    with torch.set_grad_enabled(grad):
        with pytest.raises(ShapeError, match=r"expected inputs of torch.float32, got torch.float64; convert one"):
            layer(rows(3).double())
        with pytest.raises(ShapeError, match=r"expected inputs of shape \(..., 12\), got \(3, 11\)"):
            layer(rows(3)[:, :11])


def test_an_unknown_backend_and_another_layer_are_refused():
    with pytest.raises(OptionError, match=r"backend must be one of \['auto', 'csr', 'bag', 'gather'\], got 'dense'"):
        DecomposedLinear(K, C, even(), backend="dense")
    with pytest.raises(OptionError, match=r"expected an nn.Linear, got Conv2d"):
        DecomposedLinear.from_linear(nn.Conv2d(K, C, 1), even())


# -- compiled and exported ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_layer_compiles_into_one_graph(choice, backend, grad):
    layer, linear = small(choice, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for count in (5, 40):
        inputs = rows(count).requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            found = compiled(inputs)
        torch.testing.assert_close(found, linear(inputs), rtol=1e-5, atol=1e-5)
        if grad:
            mine, its = (torch.autograd.grad(out.square().sum(), inputs)[0] for out in (found, linear(inputs)))
            torch.testing.assert_close(mine, its)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("choice", CHOICES)
def test_an_exported_layer_takes_batches_of_any_size(choice):
    layer, linear = small(choice)
    program = torch.export.export(layer, (rows(4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("embedding_bag" in name or "sparse" in name for name in called)
    for count in (1, 3, 40):
        torch.testing.assert_close(program.module()(rows(count)), linear(rows(count)), rtol=1e-5, atol=1e-5)
