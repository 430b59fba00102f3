"""What the processes of `test_fit.py` and `test_ranks_gated.py` run: ``gated_workers.py SCENARIO FOLDER``."""

import copy
import importlib
import os
import random
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler

from captum_classfilters import GatePenalty, GateSchedule, LabelSensitiveGate, LabelSensitiveTraining
from captum_classfilters.core.errors import FileFormatError, NonFiniteError

EPOCHS, COUNT, BATCH = 4, 16, 4
KINDS = ("global", "own", "batch sampler")


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class Drawn(Dataset):
    """Images whose class is told by their brightness; noise of torch's, numpy's and Python's making.

    ``at``, read so many times, it calls ``ends``.
    """

    def __init__(self, at=-1, ends=None):
        self.at, self.ends = at, ends

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if self.at == 0:
            self.ends()
        self.at -= 1
        noise = torch.randn(3, 8, 8) + torch.from_numpy(np.random.randn(3, 8, 8)).float() * random.random()
        return noise + index % 4, index % 4


def gate_of(seed=0):
    gate = LabelSensitiveGate(4, 6, generator=torch.Generator().manual_seed(seed))
    gate.is_noise = False  # a training takes it as it is
    return gate


def network(*noisy):
    """Four classes, six channels; ``noisy`` layers before the head: a model that was made alike each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm = [nn.BatchNorm2d(6)] if noisy else []
        layers = (nn.Conv2d(3, 6, 3), *norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *noisy, nn.Linear(6, 4))
        return nn.Sequential(*layers)


def batches_of(images):
    """Three, of 6, 6 and 4 samples, from the fixture ``images``."""
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    return [(images(count, seed), labels[:count]) for seed, count in ((1, 6), (2, 6), (3, 4))]


def states_of(*parts):
    """To be compared with later ones."""
    return [copy.deepcopy(part.state_dict()) for part in parts]


# -- killed and started again ------------------------------------------------------------------------------------------


def loader_of(kind, data, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind == "global":
        return DataLoader(data, BATCH, shuffle=True)
    if kind == "own":
        return DataLoader(data, BATCH, shuffle=True, generator=generator)
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator), BATCH, False))


def trained(kind, checkpoint=None, epochs=EPOCHS, seed=0, data=None):
    """A whole training of a network with dropout and batch norm: ``(model, gate, optimizer, history)``."""
    seed_all(seed)
    model, gate = network(nn.Dropout(0.3)), gate_of()
    optimizer = torch.optim.SGD([{"params": model.parameters()}, gate.parameter_group(0.1)], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.5)
    training = LabelSensitiveTraining(model, gate, schedule=GateSchedule(period=2, phase=0, scheme="alternating"))
    loader = loader_of(kind, data or Drawn(), seed)
    history = training.fit(loader, epochs, optimizer=optimizer, scheduler=schedule, checkpoint=checkpoint)
    return model, gate, optimizer, history


def outcome(model, gate, optimizer, history):
    """All that must be the same: one step more shows momentum and rate, one number more each generator's place."""
    state = {"network": model.state_dict(), "gate": gate.state_dict(), "optimizer": optimizer.state_dict()}
    draws = (torch.rand(()), float(np.random.rand()), random.random())
    return {**state, "history": history, "draws": draws}


def dies(folder, kind):
    """Ends in the third epoch, in the middle of a batch, as a machine does that is switched off."""
    data = Drawn(2 * COUNT + BATCH + 2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    trained(kind, folder / f"{kind}.pt", data=data)


def again(folder, kind):
    # what a new process would have at its start is not what the checkpoint has
    torch.save(outcome(*trained(kind, folder / f"{kind}.pt", seed=5)), folder / f"{kind} found.pt")


def killed(folder):
    """For each kind of loader one process that dies and one that goes on."""
    importlib.import_module("torch._dynamo")  # which every optimiser imports, for seconds
    for kind in KINDS:
        assert os.WTERMSIG(in_a_process(dies, folder, kind)) == signal.SIGKILL
        checkpoint = torch.load(folder / f"{kind}.pt", weights_only=True)
        assert [row["epoch"] for row in checkpoint["ranks"][0]["history"]] == [0, 1]
        assert in_a_process(again, folder, kind) == 0


def in_a_process(function, *arguments):
    """Forked, which spares it the imports; how it ended."""
    child = os.fork()
    if not child:
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


# -- two ranks ---------------------------------------------------------------------------------------------------------

SCHEMES = {
    "plain": {"warmup": 9},
    "gated": {"period": 1, "phase": 0, "scheme": "alternating"},
    "alternating": {"period": 2, "scheme": "alternating"},
    "joint": {"scheme": "joint"},
}


def whole_batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) * n % 4) for n in (1, 3, 5, 1)]


def steps(scheme, micro=1, rank=None, gate_seed=0):
    """Four steps in two epochs of a network without batch norm and dropout, where two halves give what a whole gives;
    ``rank`` sees its half of each batch, ``micro`` parts one after the other."""
    model, gate = network(), gate_of(gate_seed)
    wrapped = model if rank is None else DistributedDataParallel(model)
    training = LabelSensitiveTraining(
        wrapped, gate, schedule=GateSchedule(**SCHEMES[scheme]), penalty=GatePenalty(sparsity=0.05)
    )
    optimizer = torch.optim.SGD([{"params": model.parameters()}, gate.parameter_group(0.1)], lr=0.1, momentum=0.9)
    for index, (inputs, labels) in enumerate(whole_batches()):
        if rank is not None:
            inputs, labels = inputs.chunk(2)[rank], labels.chunk(2)[rank]
        optimizer.zero_grad()
        parts = list(zip(inputs.chunk(micro), labels.chunk(micro), strict=True))
        for x, y in parts[:-1]:
            with wrapped.no_sync():
                (training.loss(x, y, index // 2) / micro).backward()
        x, y = parts[-1]
        (training.loss(x, y, index // 2) / micro).backward()
        optimizer.step()
        training.after_step()
    return {**model.state_dict(), "gate": gate.weight.detach()}


def nan_on_rank_1(rank, epoch):
    model, gate = network(), gate_of()
    training = LabelSensitiveTraining(DistributedDataParallel(model), gate)
    inputs, labels = whole_batches()[0]
    try:
        training.loss(inputs * (float("nan") if rank else 1.0), labels, epoch)
    except NonFiniteError as error:
        return str(error)
    return "no error"


class Shard(DataLoader):
    """A rank's part; after so many batches it stops."""

    def __init__(self, rank, left=-1):
        data = Drawn()
        super().__init__(data, BATCH, sampler=DistributedSampler(data, 2, rank, seed=3))
        self.left = left

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def fitted(rank, loader, seed, checkpoint=None, epochs=EPOCHS):
    seed_all(seed + rank)
    model, gate = network(nn.Dropout(0.3)), gate_of(rank)
    training = LabelSensitiveTraining(DistributedDataParallel(model), gate)
    history = training.fit(loader, epochs, max_norm=1.0, checkpoint=checkpoint)
    return {"network": model.state_dict(), "gate": gate.state_dict(), "history": history, "draw": torch.rand(())}


def ranks(folder):
    """Everything that two ranks do together, one after the other."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    found = {scheme: steps(scheme, rank=rank) for scheme in SCHEMES}
    found |= {f"{scheme}, micro": steps(scheme, micro=2, rank=rank) for scheme in SCHEMES}
    found["gates differ"] = steps("gated", rank=rank, gate_seed=rank)
    found["nan"] = [nan_on_rank_1(rank, epoch) for epoch in (0, 1)]
    found["unbroken"] = fitted(rank, Shard(rank), 0)
    path = folder / "checkpoint.pt"
    try:
        # two steps an epoch: in the middle of the third
        fitted(rank, Shard(rank, 5), 0, path)
    except KeyboardInterrupt:
        found["at the stop"] = len(torch.load(path, weights_only=True)["ranks"][rank]["history"])
    dist.barrier()
    found["resumed"] = fitted(rank, Shard(rank), 7, path)
    # a rank that does not see the file, as where the disk is not shared
    try:
        fitted(rank, Shard(rank), 0, folder / ("checkpoint.pt" if rank else "other.pt"))
    except FileFormatError as error:
        found["not shared"] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # all is saved; gloo's threads now and then abort a process that takes its time to end


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"killed": killed, "ranks": ranks}[sys.argv[1]](Path(sys.argv[2]))
