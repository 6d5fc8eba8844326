"""What torch's operations do to channels: which axes they keep, contract, cut, join, or depend on the order of."""

from typing import Any

import torch

from lmc_lightning.landscape.alignment.channels import Channels, freeze, product, regroup, unify
from lmc_lightning.landscape.alignment.layout_rules import LAYOUTS, met
from lmc_lightning.landscape.alignment.tracing import Axes, Call, Rule, tensors_of

aten = torch.ops.aten


def _pointwise(call: Call) -> None:
    """Axes that meet, after broadcasting, are one."""
    shapes = [call.axes(t) for t in call.tensors]
    for result in tensors_of([call.result]):
        call.gives(met(shapes, result.shape), result)


def _loss(call: Call) -> None:
    shapes = [call.axes(t) for t in call.tensors]
    axes = met(shapes, torch.broadcast_shapes(*(t.shape for t in call.tensors)))
    call.gives(axes if call.result.ndim else [])


def _negative_log_likelihood(call: Call) -> None:
    """Targets are places on the class axis."""
    classes = call.axes(call["self"])
    freeze(classes[1 if len(classes) > 1 else 0], "output")
    for result in tensors_of([call.result]):
        call.gives_fixed(result)


def _same(call: Call) -> None:
    call.gives(call.axes(call.tensors[0]))


def _copy(call: Call) -> None:
    call.gives(met([call.axes(call["self"]), call.axes(call["src"])], call.result.shape))


def _uniform(call: Call) -> None:
    """All entries are the same."""
    call.gives([Channels(n) for n in call.result.shape])


def _drawn(call: Call) -> None:
    call.gives_fixed(call.result)


def _ordered(call: Call) -> None:
    """Cumulative, sorted or moved along some axes."""
    axes = call.axes(call["self"])
    dims = call["dims"] if call["dim"] is None else [call["dim"]]
    call.freeze(*(axes[d] for d in dims or range(len(axes)) if axes))
    for result in tensors_of([call.result]):
        if result.ndim == len(axes) and all(n == a.size for n, a in zip(result.shape, axes, strict=True)):
            call.gives(axes, result)
        else:
            call.gives_fixed(result)


def _reduction(call: Call) -> None:
    if call["other"] is not None:
        return _pointwise(call)
    axes, dims = call.axes(call["self"]), call["dim"]
    reduced = range(len(axes)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    gone = {d % len(axes) for d in reduced} if axes else set()
    kept = [Channels(1) if i in gone else axis for i, axis in enumerate(axes) if i not in gone or call["keepdim"]]
    results = list(tensors_of([call.result]))
    for result in results:
        if not result.is_floating_point() and not result.is_complex() and result.dtype != torch.bool:
            call.freeze(*(axes[i] for i in gone))  # places, as of argmax, or sums of integers
        call.gives(kept, result)


# -- products ----------------------------------------------------------------------------------------------------------


def _matmul(one: str, other: str, added: str | None = None) -> Rule:
    def rule(call: Call) -> None:
        left, right = call.axes(call[one]), call.axes(call[other])
        unify(left[-1], right[-2 if len(right) > 1 else 0])
        rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else []
        batch = met([left[:-2], right[:-2]], call.result.shape[: max(0, len(left) - 2)])
        axes: Axes = [*batch, *rows, *columns]
        if added is not None:
            axes = met([axes, call.axes(call[added])], call.result.shape)
        call.gives(axes)

    return rule


def _convolution(call: Call) -> None:
    batch, channels, *space = call.axes(call["input"])
    first, second, *kernel = call.axes(call["weight"])
    groups = call["groups"]
    blocks = Channels(groups)
    outer, inner = (second, first) if call["transposed"] else (first, second)
    if call["transposed"]:  # (in, out / groups, …)
        unify(inner, channels)
        unify(channels, product([blocks, Channels(channels.size // groups)]))
        outer = product([blocks, outer])
    else:  # (out, in / groups, …)
        unify(channels, product([blocks, inner]))
        unify(outer, product([blocks, Channels(outer.size // groups)]))
    if call["bias"] is not None:
        unify(outer, call.axes(call["bias"])[0])
    freeze(product([*space, *kernel]), "space")
    call.gives([batch, outer, *(Channels(n, "space") for n in call.result.shape[2:])])


# -- layers ------------------------------------------------------------------------------------------------------------


def _batch_norm(call: Call) -> None:
    axes = call.axes(call["input"])
    names = ("weight", "bias", "running_mean", "running_var", "scale", "bn_weight", "bn_bias")
    for tensor in [call[name] for name in names if call[name] is not None]:
        unify(axes[1], call.axes(tensor)[0])
    first, *others = tensors_of([call.result])
    call.gives(axes, first)
    for result in others:
        call.gives([axes[1]] if result.shape == (axes[1].size,) else [Channels(n) for n in result.shape], result)


def _layer_norm(call: Call) -> None:
    axes = call.axes(call["input"])
    affine = [call.axes(call[name]) for name in ("weight", "bias") if call[name] is not None]
    axes = met([axes, *affine], call["input"].shape)
    first, *others = tensors_of([call.result])
    call.gives(axes, first)
    for result in others:
        call.gives(met([axes[: result.ndim]], result.shape), result)


def _group_norm(call: Call) -> None:
    """Whole groups can change places, and channels within a group."""
    axes = call.axes(call["input"])
    unify(axes[1], product([Channels(call["group"]), Channels(axes[1].size // call["group"])]))
    for name in ("weight", "bias"):
        if call[name] is not None:
            unify(axes[1], call.axes(call[name])[0])
    first, *others = tensors_of([call.result])
    call.gives(axes, first)
    for result in others:
        call.gives_fixed(result)


def _spatial(num_axes: int) -> Rule:
    """Pooling, resizing and padding: the last axes are space."""

    def rule(call: Call) -> None:
        axes = call.axes(call["self"])
        freeze(product(axes[-num_axes:]), "space")
        for result in tensors_of([call.result]):
            space = [Channels(n, "space") for n in result.shape[-num_axes:]]
            call.gives([*axes[:-num_axes], *space], result)

    return rule


def _pixel_shuffle(call: Call) -> None:
    *batch, channels, height, width = call.axes(call["self"])
    factor = call["upscale_factor"]
    freeze(product([height, width]), "space")
    outer, *_ = regroup([channels], [channels.size // factor**2, factor, factor])
    unify(channels, product([outer, Channels(factor**2, call.operator)]))
    call.gives([*batch, outer, *(Channels(n, "space") for n in call.result.shape[-2:])])


def _packets(names: str) -> list[Any]:
    return [getattr(aten, name) for name in names.split() if hasattr(aten, name)]


_BY_RULE: list[tuple[Rule, str]] = [
    (_same, "detach alias clone _to_copy lift_fresh lift contiguous _softmax _log_softmax resolve_conj resolve_neg"),
    (_copy, "copy_ copy"),
    (_uniform, "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full empty empty_like new_empty"),
    (_uniform, "empty_strided new_empty_strided scalar_tensor fill_ zero_ fill"),
    (_drawn, "rand randn randint randperm arange linspace eye rand_like randn_like bernoulli normal_ uniform_"),
    (_ordered, "cumsum cumprod logcumsumexp cummax cummin sort topk flip roll tril triu"),
    (_reduction, "sum mean amax amin max min argmax argmin prod logsumexp any all var std var_mean std_mean norm"),
    (_reduction, "linalg_vector_norm count_nonzero median nanmedian"),
    *LAYOUTS,
    (_batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    (_batch_norm, "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update _batch_norm_no_update"),
    (_layer_norm, "native_layer_norm _fused_rms_norm"),
    (_group_norm, "native_group_norm"),
    (_pixel_shuffle, "pixel_shuffle"),
    (_negative_log_likelihood, "nll_loss_forward nll_loss2d_forward"),
    (_loss, "mse_loss binary_cross_entropy smooth_l1_loss huber_loss soft_margin_loss"),
    (_spatial(1), "avg_pool1d _adaptive_avg_pool1d adaptive_max_pool1d reflection_pad1d replication_pad1d"),
    (_spatial(1), "upsample_nearest1d upsample_linear1d"),
    (_spatial(2), "avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_max_pool2d reflection_pad2d"),
    (_spatial(2), "replication_pad2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"),
    (_spatial(3), "avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_max_pool3d upsample_trilinear3d"),
]

_PRODUCTS: list[tuple[Rule, str, tuple[str, ...]]] = [
    (_matmul("self", "mat2"), "mm bmm", ("self", "mat2")),
    (_matmul("mat1", "mat2", "self"), "addmm _addmm_activation", ("mat1", "mat2")),
    (_matmul("batch1", "batch2", "self"), "baddbmm", ("batch1", "batch2")),
    (_matmul("self", "vec"), "mv", ("self", "vec")),
    (_matmul("mat", "vec", "self"), "addmv", ("mat", "vec")),
    (_matmul("self", "tensor"), "dot", ("self", "tensor")),
    (_convolution, "convolution", ("input", "weight")),
]

RULES: dict[Any, Rule] = {
    torch.Tag.pointwise: _pointwise,
    **{packet: rule for rule, names in _BY_RULE for packet in _packets(names)},
    **{packet: rule for rule, names, _ in _PRODUCTS for packet in _packets(names)},
}
"""The rules by operation, and that of all pointwise ones."""

PRODUCTS: dict[Any, tuple[str, ...]] = {packet: of for _, names, of in _PRODUCTS for packet in _packets(names)}
"""The operands of the operations that combine data with weights, or data with data."""
