"""`DecomposedLinear`: a linear layer of which each output reads only a few inputs, in forms that are really cheaper.

One function for each form; the module holds the weights and picks. K inputs, C outputs, n weights kept in all.
"""

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.core.check import one_of
from captum_classfilters.core.errors import FileFormatError, OptionError, ShapeError
from captum_classfilters.core.wide import full_precision

BACKENDS = ("auto", "csr", "bag", "gather")

# Measured on one CPU thread (`benchmarks/speed/head_speed.py`): the sparse product wins for fewer samples, the bag for
# more
BAG_FROM = 16
_CSR_DTYPES = (torch.float32, torch.float64)


class DecomposedLinear(nn.Module):
    """``nn.Linear`` with most weights left out: ``out[:, c] = sum over j in J_c of w_cj x_j + b_c``.

    Source: Badola et al. 2022, section 3.2. Differs from their code, which gathers ``x[:, J_c]`` and is several times
    *slower* than the dense layer: here it is a sparse product, or a weighted bag of rows of the transposed batch.

    It is faster under ``torch.no_grad`` or ``inference_mode``. Where gradients are wanted the kept weights are spread
    into a dense matrix, which makes it somewhat slower than a dense layer; only kept weights can change.
    ``torch.export`` takes the gather form, ``torch.compile`` the bag.

    Args:
        in_features: K.
        out_features: C.
        indices: Which inputs each output reads: ``(C, k)`` integers, or a ``(C, K)`` bool mask, whose rows need not
            have equally many.
        bias: Whether there is a bias.
        backend: ``"csr"``: sparse matrix product, best for few samples; on the CPU float32 and float64 only. ``"bag"``:
            ``embedding_bag`` over the transposed batch, best for many. ``"gather"``: plain indexing; slow, exports
            anywhere. ``"auto"``: csr below 16 samples, bag from there on.
        device: The parameters' device.
        dtype: The parameters' dtype.

    Shape:
        ``(..., K)`` to ``(..., C)``, in the dtype that ``nn.Linear`` would give. The result of csr and bag can be a
        transposed view: ``reshape`` it, not ``view``.

    Attributes:
        weight: ``(n,)``, row after row; in each row by ascending input.
        bias: ``(C,)`` or None.
        indices: ``(n,)`` int32, the input that each weight multiplies.
        offsets: ``(C + 1,)`` int32, where each row begins.

    Raises:
        ShapeError: ``indices`` is neither of the two.
        OptionError: An index is out of range or repeated in its row, or the backend is unknown.

    Example:
        >>> linear = nn.Linear(4, 2)
        >>> DecomposedLinear.from_linear(linear, torch.tensor([[0, 2], [1, 3]]))
        DecomposedLinear(in_features=4, out_features=2, kept=4, bias=True, backend='auto')
    """

    indices: Tensor
    offsets: Tensor
    rows: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        indices: Tensor,
        bias: bool = True,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of(backend, "backend", BACKENDS)
        mask = as_mask(indices, out_features, in_features)
        self.in_features, self.out_features, self.backend = in_features, out_features, backend
        # int32: what the sparse product computes with; all else it would convert in every call
        rows, columns = mask.nonzero().T
        self.register_buffer("indices", columns.to(device, torch.int32))
        self.register_buffer("offsets", F.pad(mask.sum(1).cumsum(0), (1, 0)).to(device, torch.int32))
        self.register_buffer("rows", rows.to(device), persistent=False)
        count = len(columns)
        self._even = count > 0 and bool((mask.sum(1) * out_features == count).all())
        self.weight = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        nn.init.normal_(self.weight, std=(out_features / max(count, 1)) ** 0.5)
        _quiet_csr()

    @classmethod
    def from_linear(cls, linear: nn.Linear, indices: Tensor, backend: str = "auto") -> "DecomposedLinear":
        """Keep some of a linear layer's weights, as they are, on its device and in its dtype.

        Args:
            linear: The layer; read, not changed.
            indices: As for the class.
            backend: As for the class.
        """
        if not isinstance(linear, nn.Linear):
            raise OptionError(f"expected an nn.Linear, got {type(linear).__name__}; pass the layer itself")
        weight, bias = linear.weight, linear.bias
        size = (linear.in_features, linear.out_features)
        with _no_draws(weight.device):
            small = cls(*size, indices, bias is not None, backend, weight.device, weight.dtype)
        with torch.no_grad():
            small.weight.copy_(weight.flatten()[small._positions()])
            if small.bias is not None:
                small.bias.copy_(bias)
        small.weight.requires_grad_(weight.requires_grad)
        if small.bias is not None:
            small.bias.requires_grad_(bias.requires_grad)
        return small.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A plain ``nn.Linear`` with zeros where weights were left out; same outputs."""
        linear = blank_linear(self.in_features, self.out_features, self.bias is not None, self.weight)
        with torch.no_grad():
            linear.weight.copy_(self._spread())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., C)``."""
        if inputs.shape[-1] != self.in_features:
            raise ShapeError(f"expected inputs of shape (..., {self.in_features}), got {tuple(inputs.shape)}")
        kind, weight = inputs.device.type, self.weight
        # float64 is not cast, as in nn.Linear
        casts = weight.dtype != torch.float64 and torch.is_autocast_enabled(kind)
        autocast = torch.get_autocast_dtype(kind) if casts else None
        if inputs.dtype != weight.dtype and autocast is None:
            raise ShapeError(f"expected inputs of {weight.dtype}, got {inputs.dtype}; convert one of the two")
        if torch.is_grad_enabled() and self._wants_gradients(inputs) and not _exporting():
            return F.linear(inputs, self._spread(), self.bias)
        flat = inputs if inputs.dim() == 2 else inputs.reshape(-1, self.in_features)
        if autocast is not None:
            with full_precision(kind):
                out = self._sparse(flat.to(weight.dtype), weight).to(autocast)
        else:
            out = self._sparse(flat, weight)
        return out if inputs.dim() == 2 else out.reshape(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kept={self.weight.numel()}, "
            f"bias={self.bias is not None}, backend={self.backend!r}"
        )

    def _wants_gradients(self, inputs: Tensor) -> bool:
        return inputs.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def _sparse(self, inputs: Tensor, weight: Tensor) -> Tensor:
        # each attribute is read once: at this size, reading a module's attributes costs time that shows
        form, bias = self._form(inputs), self.bias
        if form == "csr":
            return csr(inputs, weight, self.indices, self.offsets, bias)
        if form == "bag":
            out = bag(inputs, weight, self.indices, self.offsets)
        else:
            out = gather(inputs, weight, self.indices, self.rows, self.out_features, self._even)
        return out if bias is None else out.add_(bias)

    def _form(self, inputs: Tensor) -> str:
        if _exporting():
            return "gather"
        if torch.compiler.is_compiling():
            return "gather" if self.backend == "gather" else "bag"
        if self.backend != "auto":
            return self.backend
        return "csr" if inputs.shape[0] < BAG_FROM and inputs.dtype in _CSR_DTYPES else "bag"

    def _positions(self) -> Tensor:
        """Where each weight stands in the flattened dense matrix, ``(n,)`` int64."""
        return self.rows * self.in_features + self.indices

    def _spread(self) -> Tensor:
        """The dense matrix, ``(C, K)``; differentiable."""
        dense = self.weight.new_zeros(self.out_features * self.in_features)
        return dense.scatter(0, self._positions(), self.weight).view(self.out_features, self.in_features)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        indices, offsets = state_dict.get(f"{prefix}indices"), state_dict.get(f"{prefix}offsets")
        # the sparse product trusts its indices: a wrong one would read beyond the batch
        if indices is not None and not bool(((indices >= 0) & (indices < self.in_features)).all()):
            raise FileFormatError(
                f"{prefix}indices must lie in [0, {self.in_features}), got {indices.min().item()} to "
                f"{indices.max().item()}; the file is broken or another network's"
            )
        if offsets is not None and not torch.equal(offsets.cpu(), self.offsets.cpu()):
            raise FileFormatError(
                f"{prefix}offsets keep another number of features for each class; decompose with the k of the saved "
                "network first, then load"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


# -- the forms: (N, K) inputs, (n,) weights and indices, (C + 1,) offsets; (N, C) out ---------------------------------


def csr(inputs: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Sparse matrix product."""
    if inputs.dtype not in _CSR_DTYPES and inputs.device.type == "cpu":
        raise OptionError(f'backend "csr" computes in float32 and float64, got {inputs.dtype}; choose "bag" or "auto"')
    shape = (len(offsets) - 1, inputs.shape[1])
    matrix = torch.sparse_csr_tensor(offsets, indices, weight, shape, check_invariants=False)
    if inputs.shape[0] == 1:
        # one call: at this size the number of calls decides the time
        product = torch.mv(matrix, inputs[0]) if bias is None else torch.addmv(bias, matrix, inputs[0])
        return product.unsqueeze(0)
    table = transposed(inputs)
    return (torch.mm(matrix, table) if bias is None else torch.addmm(bias[:, None], matrix, table)).T


def bag(inputs: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """Each class is a bag of rows of the transposed batch, so that one weight multiplies a whole run of samples."""
    table = transposed(inputs)
    return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True).T


def gather(inputs: Tensor, weight: Tensor, indices: Tensor, rows: Tensor, classes: int, even: bool) -> Tensor:
    """Plain indexing, which any exported graph can hold; ``rows`` ``(n,)`` is the output each weight belongs to."""
    products = inputs.index_select(1, indices) * weight
    if even:
        return products.view(-1, classes, len(indices) // classes).sum(2)
    out = products.new_zeros(inputs.shape[0], classes)
    return out.scatter_add(1, rows.expand(inputs.shape[0], -1), products)


def transposed(inputs: Tensor) -> Tensor:
    """``(N, K)`` to ``(K, N)``, contiguous."""
    count, features = inputs.shape
    if inputs.device.type != "cpu" or count * features < 4096 or torch.compiler.is_compiling():
        return inputs.T.contiguous()
    # shuffling N groups of K channels is a transposition too, and the one that torch has vectorised: 3 times as fast
    lanes = inputs.reshape(1, 1, 1, -1).permute(0, 3, 1, 2)
    return torch.native_channel_shuffle(lanes, count).view(features, count)


def as_mask(indices: Tensor, classes: int, features: int) -> Tensor:
    """``(C, k)`` integers or a ``(C, K)`` bool mask as a ``(C, K)`` bool mask, checked."""
    if not isinstance(indices, Tensor) or indices.dim() != 2 or len(indices) != classes or indices.is_floating_point():
        got = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise ShapeError(
            f"indices must be integers of shape ({classes}, k) or a bool mask ({classes}, {features}); got {got}"
        )
    if indices.dtype == torch.bool:
        if indices.shape[1] != features:
            raise ShapeError(f"the mask must have shape ({classes}, {features}), got {tuple(indices.shape)}")
        return indices
    wrong = ((indices < 0) | (indices >= features)).any(1).nonzero().flatten().tolist()
    if wrong:
        raise OptionError(
            f"indices must lie in [0, {features}), got {indices[wrong[0]].tolist()[:10]} in row {wrong[0]}; -1 stands "
            "for a class without samples: leave it out or pass a mask"
        )
    mask = torch.zeros(classes, features, dtype=torch.bool, device=indices.device).scatter_(1, indices.long(), True)
    repeated = (mask.sum(1) < indices.shape[1]).nonzero().flatten().tolist()
    if repeated:
        raise OptionError(
            f"indices must be different in each row, row {repeated[0]} repeats one: "
            f"{sorted(indices[repeated[0]].tolist())[:10]}"
        )
    return mask


def blank_linear(features: int, classes: int, bias: bool, like: Tensor) -> nn.Linear:
    """An ``nn.Linear`` to be filled, on the device and in the dtype of ``like``."""
    # on meta: first values would move torch's random state
    linear = nn.Linear(features, classes, bias, device="meta", dtype=like.dtype)
    for name, parameter in list(linear.named_parameters()):
        setattr(linear, name, nn.Parameter(torch.empty_like(parameter, device=like.device)))
    return linear


def _no_draws(device: torch.device) -> AbstractContextManager[None]:
    """The first values are overwritten at once, so they must not move torch's random state."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _exporting() -> bool:
    # torch before 2.7 cannot tell exporting from compiling
    exporting: bool = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    return exporting


def _quiet_csr() -> None:
    """Torch warns once in a process that sparse matrices are in beta; here nobody sees it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0]), (1, 1))
