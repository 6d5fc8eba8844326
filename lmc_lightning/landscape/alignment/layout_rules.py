"""What operations that only rearrange entries do to channels: views, cuts, concatenations, embeddings."""

from collections.abc import Sequence

from lmc_lightning.landscape.alignment.channels import (
    Channels,
    Term,
    at,
    concat,
    freeze,
    pieces,
    product,
    reason_of,
    unify,
)
from lmc_lightning.landscape.alignment.tracing import Axes, Call, Rule, tensors_of


def met(operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """The axes of a result of this shape, in which the operands' axes meet after broadcasting."""
    found: Axes = []
    for distance in range(len(shape), 0, -1):
        size = shape[-distance]
        terms = [axes[-distance] for axes in operands if len(axes) >= distance and axes[-distance].size == size]
        for term in terms[1:]:
            unify(terms[0], term)
        found.append(terms[0] if terms else Channels(size))
    return found


def _view(call: Call) -> None:
    call.gives(call.tracer.views.view(call.axes(call["self"]), call.result.shape))


def _permute(call: Call) -> None:
    axes = call.axes(call["self"])
    call.gives([axes[d] for d in call["dims"]])


def _transpose(call: Call) -> None:
    axes = call.axes(call["self"])
    one, other = (0, 1) if call["dim0"] is None else (call["dim0"], call["dim1"])
    if len(axes) > 1:
        axes[one], axes[other] = axes[other], axes[one]
    call.gives(axes)


def _unsqueeze(call: Call) -> None:
    axes = call.axes(call["self"])
    axes.insert(call["dim"] % (len(axes) + 1), Channels(1))
    call.gives(axes)


def _squeeze(call: Call) -> None:
    axes, dims = call.axes(call["self"]), call["dim"]
    chosen = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(axes) for d in chosen if axes[d].size == 1} if axes else set()
    call.gives([axis for i, axis in enumerate(axes) if i not in gone])


def _expand(call: Call) -> None:
    axes, shape = call.axes(call["self"]), call.result.shape
    axes = [Channels(1)] * (len(shape) - len(axes)) + axes
    call.gives([axis if axis.size == n else Channels(n) for axis, n in zip(axes, shape, strict=True)])


def _repeat(call: Call) -> None:
    axes, times = call.axes(call["self"]), call["repeats"]
    axes = [Channels(1)] * (len(times) - len(axes)) + axes
    call.gives([product([Channels(n), axis]) for n, axis in zip(times, axes, strict=True)])


def _cat(call: Call) -> None:
    parts = [call.axes(t) for t in call["tensors"] if t.shape != (0,)]
    dim = (call["dim"] or 0) % len(parts[0])
    rest = met([[Channels(1) if i == dim else axis for i, axis in enumerate(axes)] for axes in parts], _but(call, dim))
    rest[dim] = concat([axes[dim] for axes in parts])
    call.gives(rest)


def _but(call: Call, dim: int) -> list[int]:
    return [1 if i == dim else n for i, n in enumerate(call.result.shape)]


def _stack(call: Call) -> None:
    dim = (call["dim"] or 0) % call.result.ndim
    shape = list(call.result.shape)
    size = shape.pop(dim)
    axes = met([call.axes(t) for t in call["tensors"]], shape)
    axes.insert(dim, Channels(size, call.operator))
    call.gives(axes)


def _split(call: Call) -> None:
    """Consecutive parts of one axis: split, chunk, unbind."""
    axes, results = call.axes(call["self"]), list(tensors_of([call.result]))
    dim = (call["dim"] or 0) % len(axes)
    gone = results[0].ndim < len(axes)
    sizes = [1 if gone else r.shape[dim] for r in results]
    axis, rest = axes[dim], [*axes[:dim], *axes[dim + 1 :]]
    call.tracer.views.cut(axis)
    for place, (result, piece) in enumerate(zip(results, _cut(axis, sizes), strict=True)):
        there = [at(term, axis, place) for term in rest] if sizes[0] == 1 else rest
        call.gives([*there[:dim], *([] if gone else [piece]), *there[dim:]], result)


def _cut(axis: Term, sizes: Sequence[int]) -> list[Term]:
    reason = reason_of(axis)
    return pieces(axis, sizes) if reason is None else [Channels(n, reason) for n in sizes]


def _part(call: Call) -> None:
    """A range of one axis, or one place of it."""
    axes = call.axes(call["self"])
    dim = (call["dim"] or 0) % len(axes)
    axis, selects = axes[dim], call.result.ndim < len(axes)
    length = 1 if selects else call.result.shape[dim]
    start = (call["index"] if selects else call["start"]) or 0
    start = min(start + axis.size if start < 0 else start, axis.size)
    if (call["step"] or 1) != 1:
        call.freeze(axis)
    rest = [*axes[:dim], *axes[dim + 1 :]]
    call.tracer.views.cut(axis)
    if length == 1:
        rest = [at(term, axis, start) for term in rest]
    piece = axis if length == axis.size else _cut(axis, [start, length, max(0, axis.size - start - length)])[1]
    piece = piece if piece.size == length else Channels(length, call.operator)
    call.gives([*rest[:dim], *([] if selects else [piece]), *rest[dim:]])


def _pad(call: Call) -> None:
    """A constant around some of the last axes."""
    axes, pad = call.axes(call["self"]), list(call["pad"])
    for i in range(len(pad) // 2):
        before, after = pad[2 * i : 2 * i + 2]
        if before or after:
            axis = axes[-1 - i]
            whole = min(before, after) >= 0
            axes[-1 - i] = (
                concat([Channels(before), axis, Channels(after)])
                if whole
                else Channels(axis.size + before + after, call.operator)
            )
            call.freeze(*(() if whole else (axis,)))
    call.gives(axes)


def _embedding(call: Call) -> None:
    """Indices are places among the rows."""
    rows, columns = call.axes(call["weight"])
    freeze(rows, "input")
    call.gives([*call.axes(call["indices"]), columns])


LAYOUTS: list[tuple[Rule, str]] = [
    (_view, "view _unsafe_view reshape _reshape_alias"),
    (_permute, "permute"),
    (_transpose, "t transpose swapaxes"),
    (_unsqueeze, "unsqueeze"),
    (_squeeze, "squeeze"),
    (_expand, "expand"),
    (_repeat, "repeat"),
    (_cat, "cat"),
    (_stack, "stack"),
    (_split, "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unbind"),
    (_part, "slice select narrow"),
    (_pad, "constant_pad_nd"),
    (_embedding, "embedding"),
]
"""Rules and the names of their operations."""
