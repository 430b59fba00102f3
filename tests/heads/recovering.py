"""A small task to retrain on, shared by the tests of `recover`."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from captum_classfilters import ClassFilters

COUNT, BATCH = 40, 8  # five steps an epoch


class Noisy(Dataset):
    """Images whose class is told by their brightness in three channels; each reading draws its own noise."""

    def __init__(self, count=COUNT, noise=0.3):
        self.count, self.noise = count, noise

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label = index % 4
        image = torch.zeros(3, 8, 8)
        image[: label % 4] = 1.5
        return image + self.noise * torch.randn(3, 8, 8), label


def batches(count=COUNT, noise=0.3):
    return DataLoader(Noisy(count, noise), batch_size=BATCH, shuffle=True)


def still(count=COUNT):
    """The same images each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return list(DataLoader(Noisy(count), batch_size=BATCH))


def loss(model, loader):
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(inputs), labels)) for inputs, labels in loader)


def table(k_seed=0):
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(k_seed)).double()
    return ClassFilters(scores, scores.abs(), torch.ones(4, dtype=torch.int64), "histogram", "fc", tuple("abcd"))


def assert_same(actual, expected):
    """Bit for bit."""
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, value in actual.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def differ(a, b):
    return [name for name, value in a.state_dict().items() if not torch.equal(value, b.state_dict()[name])]


# -- what it does ------------------------------------------------------------------------------------------------------
