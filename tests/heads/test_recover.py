"""recover: a retrained copy; the network given stays as it was."""

import copy

import pytest
import torch
from contract import Snapshot
from recovering import assert_same, batches, differ, loss, still, table
from torch import nn
from torch.nn import functional as F

from captum_classfilters import Checkpoint
from captum_classfilters.core.errors import EmptyLoaderError, HeadError, LabelError, NonFiniteError, OptionError
from captum_classfilters.heads import DecomposedLinear, decompose, recover


def test_the_loss_falls_and_the_given_network_stays(small_cnn):
    model = small_cnn().train()
    model.bn1.eval()
    (model(still()[0][0]).sum()).backward()
    before = Snapshot.of(model)
    better = recover(model, batches(), 8, lr=3e-2)
    Snapshot.of(model).assert_same(before)
    assert loss(better.eval(), still()) < 0.7 * loss(copy.deepcopy(model).eval(), still())
    assert all(parameter.grad is None for parameter in better.parameters())


def test_it_is_adam_on_the_cross_entropy(small_cnn):
    model, data = small_cnn(), still()
    model.dropout.p = 0.0
    found = recover(model, data, 2, lr=1e-3)
    expected = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3)
    for inputs, labels in data * 2:
        optimizer.zero_grad()
        F.cross_entropy(expected(inputs), labels).backward()
        optimizer.step()
    assert_same(found, expected.eval())


def test_modes_are_those_of_the_network_given(small_cnn):
    model = small_cnn().train()
    model.bn1.eval()
    model.fc.eval()
    trained = recover(model, batches(), validation=still())
    assert {n: m.training for n, m in trained.named_modules()} == {n: m.training for n, m in model.named_modules()}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_the_draws_are_the_seeds_and_torchs_own_state_is_left(grad, small_cnn):
    model = small_cnn()
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        first = recover(model, batches())
        state = torch.get_rng_state()
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert_same(recover(model, batches()), first)
        assert torch.is_grad_enabled() is grad
    assert differ(recover(model, batches(), seed=1), first)


def test_zeros_of_a_plain_head_stay_zero(small_cnn):
    small = decompose(small_cnn(), table(), 2, backend="dense")
    trained = recover(small, batches(), 2, lr=1e-2)
    assert torch.equal(trained.fc.weight != 0, table().mask(2))
    assert (trained.fc.weight != small.fc.weight).any(1).all()


def test_weights_that_all_begin_at_zero_are_trained(small_cnn):
    model = small_cnn()
    nn.init.zeros_(model.fc.weight)
    assert bool(recover(model, batches()).fc.weight.any(1).all())


@pytest.mark.parametrize("backend", ["csr", "bag"])
def test_a_decomposed_head_is_trained_as_the_dense_one_is(backend, small_cnn):
    model = small_cnn()
    small, dense = (decompose(model, table(), 2, backend=form) for form in (backend, "dense"))
    trained, expected = (recover(network, batches(), 2, lr=1e-3) for network in (small, dense))
    assert isinstance(trained.fc, DecomposedLinear)
    assert torch.equal(trained.fc.indices, small.fc.indices)
    torch.testing.assert_close(trained.fc.to_dense().weight, expected.fc.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.conv1.weight, expected.conv1.weight, rtol=1e-4, atol=1e-5)
    assert differ(trained, small)


def test_a_validation_iterator_is_refused_before_any_training(small_cnn):
    with pytest.raises(EmptyLoaderError, match="validation is an iterator, list_iterator, which can be read only once"):
        recover(small_cnn(), batches(), validation=iter(still()))


class TwoOutputs(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        logits = self.inner(x)
        return (logits, -logits) if self.training else logits


def test_of_auxiliary_outputs_the_first_is_trained(small_cnn):
    trained = recover(TwoOutputs(small_cnn()), batches(), validation=still())
    assert_same(trained.inner, recover(small_cnn(), batches(), validation=still()))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda logits: {"scores": logits}, "returns logits: a tensor .*got dict with the keys"),
        (lambda logits: logits[..., None], r"returns logits \(N, C\), got shape \(8, 4, 1\); wrap the model"),
    ],
)
def test_a_model_without_logits_is_refused(output, message, small_cnn):
    model = small_cnn()
    model.fc.register_forward_hook(lambda module, args, logits: output(logits))
    with pytest.raises(HeadError, match=message):
        recover(model, batches())


def test_frozen_parameters_stay(small_cnn):
    model = small_cnn()
    model.conv1.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    trained = recover(model, batches())
    assert {"conv1.weight", "conv1.bias", "fc.bias"}.isdisjoint(differ(trained, model))
    assert "fc.weight" in differ(trained, model)
    assert not trained.conv1.weight.requires_grad


def test_batch_norms_frozen_by_hand_stay_frozen(small_cnn):
    model = small_cnn().train()
    model.bn1.eval()
    trained = recover(model, batches(), 3, lr=1e-2, validation=still())
    assert torch.equal(trained.bn1.running_mean, model.bn1.running_mean)
    assert not torch.equal(trained.bn2.running_mean, model.bn2.running_mean)
    assert not trained.bn1.training
    assert trained.bn2.training
    whole = recover(small_cnn().eval(), batches())
    assert not torch.equal(whole.bn1.running_mean, model.bn1.running_mean)


def test_autocast_reaches_the_forward_pass(small_cnn):
    model, seen = small_cnn(), []
    handle = model.fc.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = recover(model, batches(), lr=1e-3)
        recover(model, batches(), validation=still())
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert trained.fc.weight.dtype == torch.float32
    plain = recover(model, batches(), lr=1e-3)
    torch.testing.assert_close(trained.fc.weight, plain.fc.weight, rtol=0, atol=5e-3)
    assert not torch.equal(trained.fc.weight, plain.fc.weight)
    assert not torch.allclose(trained.fc.weight, model.fc.weight, rtol=0, atol=2e-3)


def test_float64_and_mappings_and_several_inputs_do():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, a, b):
            return self.fc(a * b)

    rows = torch.rand(8, 3)
    trained = recover(Two(), [{"inputs": (rows, rows), "labels": torch.arange(8) % 2}])
    assert trained.fc.weight.dtype == torch.float64


@pytest.mark.parametrize("show", [True, False])
def test_the_loader_is_opened_once_for_each_epoch(show, small_cnn, capsys):
    class Counted:
        opened = 0

        def __iter__(self):
            self.opened += 1
            return iter(still(16))

    loader = Counted()
    recover(small_cnn(), loader, 3, show_progress=show)
    assert loader.opened == 3
    assert ("epoch 3/3" in capsys.readouterr().err) is show


# -- the best state ----------------------------------------------------------------------------------------------------


def test_validation_keeps_the_start_where_training_harms(small_cnn):
    model = recover(small_cnn(), batches(), 6, lr=1e-2)
    assert differ(recover(model, batches(), 2, lr=3.0), model)
    assert_same(recover(model, batches(), 2, lr=3.0, validation=still()), model)


def test_validation_keeps_the_best_epoch(small_cnn):
    model, right = small_cnn(), []
    after = [recover(model, batches(), epochs, lr=5e-2) for epochs in (1, 2, 3, 4)]
    for network in [model, *after]:
        with torch.no_grad():
            right.append(sum(int((network(inputs).argmax(1) == labels).sum()) for inputs, labels in still()))
    best = right.index(max(right))
    assert best > 0
    for epochs in (4, best):
        assert_same(recover(model, batches(), epochs, lr=5e-2, validation=still()), after[best - 1])


# -- stopped and resumed -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_before_the_step(small_cnn, tmp_path):
    data = still()
    bad = [*data[:3], (torch.full((2, 3, 8, 8), torch.nan), torch.tensor([0, 1])), *data[3:]]
    with pytest.raises(NonFiniteError, match=r"the loss is nan in epoch 1, step 4; this step was not taken") as caught:
        recover(small_cnn(), bad, 2, lr=1e-2, checkpoint=tmp_path / "checkpoint.pt")
    assert_same(caught.value.partial_result, recover(small_cnn(), data[:3], lr=1e-2))
    # without the bad batch it goes on
    whole = recover(small_cnn(), data, 2, lr=1e-2)
    assert_same(recover(small_cnn(), data, 2, lr=1e-2, checkpoint=tmp_path / "checkpoint.pt"), whole)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1; got 0"),
        ({"epochs": 1.5}, "epochs must be an integer of at least 1; got 1.5"),
        ({"epochs": True}, "got True"),
        ({"lr": 0}, "lr must be a finite number above 0; got 0"),
        ({"lr": -1e-4}, "lr must be a finite number above 0; got -0.0001"),
        ({"lr": float("nan")}, "lr must be a finite number above 0; got nan"),
    ],
)
def test_options_out_of_range_are_refused(options, message, small_cnn):
    with pytest.raises(OptionError, match=message):
        recover(small_cnn(), batches(), **options)


def test_a_checkpoint_is_written_after_a_positive_number_of_steps():
    for every in (0, 1.5, True):
        with pytest.raises(OptionError, match=f"every must be an integer of at least 1; got {every}"):
            Checkpoint("state.pt", every)


def test_networks_that_cannot_be_trained_are_refused(small_cnn):
    with pytest.raises(OptionError, match="no parameter of the model requires gradients"):
        recover(small_cnn().requires_grad_(False), batches())
    with pytest.raises(OptionError, match=r"float32 or float64 to be trained, got torch.bfloat16.* model.float\(\)"):
        recover(small_cnn().bfloat16(), batches())
    with pytest.raises(OptionError, match=r"the model must be an nn.Module, got function"):
        recover(lambda images: images, batches())


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], EmptyLoaderError, "the loader gave no sample"),
        (iter(still()), EmptyLoaderError, r"loader is an iterator, list_iterator, which can be read only once"),
        ([(still()[0][0], torch.full((8,), 4))], LabelError, r"labels must lie in \[0, 4\), got 4 in batch 0"),
        ([still()[0][0]], LabelError, "batch 0 has no labels"),
    ],
    ids=["empty", "iterator", "label", "no labels"],
)
def test_loaders_that_cannot_be_trained_on_are_refused(loader, error, message, small_cnn):
    model = small_cnn().train()
    before = Snapshot.of(model)
    with pytest.raises(error, match=message):
        recover(model, loader, 2)
    Snapshot.of(model).assert_same(before)


def test_an_empty_validation_is_refused(small_cnn):
    with pytest.raises(EmptyLoaderError, match="validation: the loader gave no sample"):
        recover(small_cnn(), batches(), validation=[])


def test_a_folder_that_is_not_there_is_refused_before_the_first_step(small_cnn, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to write checkpoint.pt into"):
        recover(small_cnn(), None, checkpoint=tmp_path / "nowhere" / "checkpoint.pt")
