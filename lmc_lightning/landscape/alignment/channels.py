"""What the places along an axis of a tensor stand for: channels that can be reordered, and how they are laid out.

An axis is a term: one set of channels, a product of such (a flattened ``(channels, height, width)``), or a
concatenation. Terms that must be reordered together are unified, which refines sets of channels where one side is
composite: an embedding that is viewed as heads × width can from then on be permuted by heads and within them only.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias


class Channels:
    """A set of places that may be reordered, until a reason is found why not.

    Args:
        size: how many places.
        reason: why they have to stay where they are.
    """

    def __init__(self, size: int, reason: str | None = None) -> None:
        self.size, self.reason = size, reason
        self._meaning: Term | None = None

    @property
    def meaning(self) -> "Term | None":
        """What these channels have turned out to be."""
        return self._meaning

    def mean(self, term: "Term") -> None:
        """Be ``term`` from now on."""
        self._meaning = term


@dataclass(frozen=True)
class Product:
    """Every combination of places of the factors, the last of which runs fastest."""

    parts: tuple["Term", ...]

    @property
    def size(self) -> int:
        """The number of places."""
        return prod(part.size for part in self.parts)


@dataclass(frozen=True)
class Concat:
    """The places of one part after those of the other."""

    parts: tuple["Term", ...]

    @property
    def size(self) -> int:
        """The number of places."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Stacked:
    """Places of an axis that mean something else at each place of another axis of the tensor.

    Queries, keys and values that are stacked along an axis of size 3 have one width, and each an order of its own.
    """

    over: Channels
    """The other axis, whose places stay where they are."""
    parts: tuple["Term", ...]
    """What the places mean at each place of it."""

    @property
    def size(self) -> int:
        """The number of places."""
        return self.parts[0].size


Term: TypeAlias = Channels | Product | Concat | Stacked


def resolve(term: Term) -> Term:
    """``term`` in its present meaning and in normal form.

    That has no nested concatenations or products, no factor of size 1 and no concatenation as the first of several.
    """
    if isinstance(term, Channels):
        return term if term.meaning is None else resolve(term.meaning)
    parts = [resolve(part) for part in term.parts]
    if isinstance(term, Stacked):
        return Stacked(term.over, tuple(parts))
    return _concat(parts) if isinstance(term, Concat) else _product(parts)


def product(parts: Sequence[Term]) -> Term:
    """The product of some terms in normal form."""
    return resolve(Product(tuple(parts)))


def concat(parts: Sequence[Term]) -> Term:
    """The concatenation of some terms in normal form."""
    return resolve(Concat(tuple(parts)))


def _product(parts: Sequence[Term]) -> Term:
    flat = [p for part in parts for p in (part.parts if isinstance(part, Product) else (part,)) if p.size != 1]
    if len(flat) < 2:
        return flat[0] if flat else Channels(1)
    first, rest = flat[0], flat[1:]
    if isinstance(first, Channels) and any(isinstance(p, Stacked) and p.over is first for p in rest):
        return _concat([_product([at(p, first, i) for p in rest]) for i in range(first.size)])
    if isinstance(first, Concat):
        return _concat([_product([piece, *rest]) for piece in first.parts])
    return Product(tuple(flat))


def _concat(parts: Sequence[Term]) -> Term:
    flat = [p for part in parts for p in (part.parts if isinstance(part, Concat) else (part,)) if p.size]
    return flat[0] if len(flat) == 1 else Concat(tuple(flat)) if flat else Channels(0)


def at(term: Term, over: Term, place: int) -> Term:
    """``term`` at one place of the axis ``over``."""
    term = resolve(term)
    return term.parts[place] if isinstance(term, Stacked) and term.over is over else term


def atoms(term: Term) -> Iterator[Channels]:
    """The sets of channels in a term."""
    term = resolve(term)
    if isinstance(term, Channels):
        yield term
    else:
        for part in term.parts:
            yield from atoms(part)


def freeze(term: Term, reason: str) -> None:
    """All places of ``term`` stay where they are; the first reason is kept."""
    for atom in atoms(term):
        atom.reason = atom.reason or reason


def reason_of(term: Term) -> str | None:
    """Why no place of ``term`` can move; ``None`` where one can. A single place cannot move anyhow."""
    reasons = [atom.reason for atom in atoms(term) if atom.size > 1]
    return None if None in reasons else (reasons or ["single"])[0]


def unify(one: Term, other: Term) -> None:
    """From now on both are reordered together; what they do not have in common stays where it is.

    Raises:
        ValueError: they differ in size.
    """
    one, other = resolve(one), resolve(other)
    if one.size != other.size:
        raise ValueError(f"An axis of size {one.size} cannot be that of size {other.size}.")
    if one is other:
        return
    for term, partner in ((one, other), (other, one)):
        reason = reason_of(term)
        if reason is not None:
            freeze(partner, reason)
            return
    if isinstance(one, Stacked) or isinstance(other, Stacked):
        _unify_stacked(one, other)
    elif isinstance(one, Channels):
        one.mean(other)
    elif isinstance(other, Channels):
        other.mean(one)
    else:
        _zip(one, other)


def _unify_stacked(one: Term, other: Term) -> None:
    if isinstance(one, Stacked) and isinstance(other, Stacked) and one.over is not other.over:
        unify(one, one.parts[0])
        other, one = one.parts[0], other
    stacked, partner = (one, other) if isinstance(one, Stacked) else (other, one)
    for place, part in enumerate(stacked.parts if isinstance(stacked, Stacked) else ()):
        unify(part, at(partner, stacked.over, place))  # type: ignore[union-attr]


def _zip(one: Term, other: Term) -> None:
    """Unify two composite terms part by part, the larger part being cut to the size of the smaller one."""
    kind = Product if isinstance(one, Product) and isinstance(other, Product) else Concat
    cut = take_factor if kind is Product else take_first
    left, right = _Parts([one], kind), _Parts([other], kind)
    while left and right:
        a, b = left.pop(), right.pop()
        if a.size != b.size:
            larger, smaller, rest = (a, b, left) if a.size > b.size else (b, a, right)
            cut_up = cut(larger, smaller.size)
            if cut_up is None:
                for term in (one, other):
                    freeze(term, f"axes of {one.size} that are cut in two ways")
                return
            rest.push(cut_up[1])
            a, b = cut_up[0], smaller
        unify(a, b)


class _Parts:
    """The parts of a term that are still to come, each in the meaning that it has by then."""

    def __init__(self, terms: Sequence[Term], kind: type[Product] | type[Concat]) -> None:
        self._kind, self._left = kind, list(terms)

    def __bool__(self) -> bool:
        return bool(self._left)

    def pop(self) -> Term:
        term = resolve(self._left.pop(0))
        while isinstance(term, self._kind):
            self._left = [*term.parts[1:], *self._left]
            term = resolve(term.parts[0])
        return term

    def push(self, term: Term) -> None:
        self._left.insert(0, term)


def take_factor(term: Term, size: int) -> tuple[Term, Term] | None:
    """``term`` as a product whose first factor has ``size`` places, which it means from now on, if it can."""
    term = resolve(term)
    if term.size == size:
        return term, Channels(1)
    if isinstance(term, Stacked):
        return _of_each(term, [take_factor(part, size) for part in term.parts])
    if not isinstance(term, Channels) or size == 0 or term.size % size:
        return None
    parts = Channels(size, term.reason), Channels(term.size // size, term.reason)
    term.mean(Product(parts))
    return parts


def take_first(term: Term, size: int) -> tuple[Term, Term] | None:
    """``term`` as a concatenation whose first part has ``size`` places, which it means from now on, if it can."""
    term = resolve(term)
    if isinstance(term, Stacked):
        return _of_each(term, [take_first(part, size) for part in term.parts])
    if isinstance(term, Channels):
        parts = Channels(size, term.reason), Channels(term.size - size, term.reason)
        if term.reason is None:
            term.mean(Concat(parts))
        return parts
    if isinstance(term, Product):
        inner = prod(part.size for part in term.parts[1:])
        found = take_first(term.parts[0], size // inner) if size % inner == 0 else None
        return found and (product([found[0], *term.parts[1:]]), product([found[1], *term.parts[1:]]))
    return None


def _of_each(stacked: Stacked, cuts: Sequence[tuple[Term, Term] | None]) -> tuple[Term, Term] | None:
    done = [cut for cut in cuts if cut is not None]
    if len(done) < len(cuts):
        return None
    return Stacked(stacked.over, tuple(c[0] for c in done)), Stacked(stacked.over, tuple(c[1] for c in done))


def take_stack(term: Term, size: int) -> tuple[Term, Term] | None:
    """``term`` as a stack of ``size`` parts, each of which has channels of its own, if it can."""
    term = resolve(term)
    if not isinstance(term, Channels) or term.reason is not None or term.size % size or term.size == size:
        return None
    over, parts = Channels(size, "stacked"), tuple(Channels(term.size // size) for _ in range(size))
    term.mean(Concat(parts))
    return over, Stacked(over, parts)


def pieces(term: Term, sizes: Sequence[int]) -> list[Term]:
    """Consecutive parts of ``term`` of these sizes; where it cannot be cut there, it stays as it is."""
    found, parts = [], _Parts([term], Concat)
    for size in sizes:
        taken: list[Term] = []
        missing = size
        while missing and parts:
            part = parts.pop()
            if part.size > missing:
                cut = take_first(part, missing)
                if cut is None:
                    freeze(term, "a cut within a block of channels")
                    return [Channels(n, "a cut within a block of channels") for n in sizes]
                part, rest = cut
                parts.push(rest)
            taken.append(part)
            missing -= part.size
        found.append(concat(taken))
    return found


def regroup(terms: Sequence[Term], sizes: Sequence[int], stacks: Collection[int] = ()) -> list[Term]:
    """The axes of a tensor after it has been viewed with other ``sizes`` of as many entries.

    Args:
        terms: its axes before.
        sizes: of its axes afterwards.
        stacks: sizes of axes along which parts are stacked that have nothing to do with one another.
    """
    left = _Parts(terms, Product)
    found: list[Term] = []
    for size in sizes:
        factors: list[Term] = []
        while (missing := size // prod(f.size for f in factors)) > 1:
            factor = left.pop()
            if factor.size > missing:
                cut = take_stack(factor, missing) if missing in stacks else None
                cut = cut or take_factor(factor, missing)
                if cut is None:
                    return _torn(terms, sizes)
                factor, rest = cut
                left.push(rest)
            factors.append(factor)
        if prod(f.size for f in factors) != size:
            return _torn(terms, sizes)
        found.append(product(factors))
    return found


def _torn(terms: Sequence[Term], sizes: Sequence[int]) -> list[Term]:
    reason = "a view that cuts across channels"
    for term in terms:
        freeze(term, reason)
    return [Channels(size, reason) for size in sizes]
