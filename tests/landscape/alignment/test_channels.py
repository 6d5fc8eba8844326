"""The algebra of axes: what is unified is reordered together, and what cannot be cut alike stays."""

import pytest

from lmc_lightning.landscape.alignment.channels import (
    Channels,
    Concat,
    Product,
    Term,
    atoms,
    concat,
    freeze,
    pieces,
    product,
    reason_of,
    regroup,
    resolve,
    take_stack,
    unify,
)


def sizes(term: Term) -> list[int]:
    return [atom.size for atom in atoms(term)]


def test_an_axis_takes_the_form_of_what_it_meets() -> None:
    embedding, heads, width = Channels(12), Channels(3), Channels(4)
    unify(embedding, product([heads, width]))
    assert list(atoms(embedding)) == [heads, width]
    assert isinstance(resolve(embedding), Product)


def test_concatenations_are_cut_at_the_borders_of_both() -> None:
    one, other = Concat((Channels(2), Channels(5))), Concat((Channels(4), Channels(3)))
    unify(one, other)
    assert sizes(one) == sizes(other) == [2, 2, 3]
    assert list(atoms(one)) == list(atoms(other))


def test_products_are_cut_where_both_can_be() -> None:
    one, other = Product((Channels(6), Channels(2))), Product((Channels(2), Channels(6)))
    unify(one, other)
    assert sizes(one) == sizes(other) == [2, 3, 2]
    assert list(atoms(one)) == list(atoms(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Product((Channels(4), Channels(6))), lambda: Product((Channels(6), Channels(4)))),
        (lambda: Product((Channels(4), Channels(3))), lambda: Concat((Channels(5), Channels(7)))),
    ],
)
def test_what_is_cut_in_two_ways_stays_where_it_is(one: Term, other: Term) -> None:
    first, second = one(), other()  # type: ignore[operator]
    unify(first, second)
    assert reason_of(first) == reason_of(second)
    assert "cut in two ways" in str(reason_of(first))


def test_a_product_of_a_concatenation_is_a_concatenation_of_products() -> None:
    a, b, inner = Channels(2), Channels(3), Channels(4)
    assert product([concat([a, b]), inner]) == concat([product([a, inner]), product([b, inner])])
    assert product([Channels(1), a, Channels(1)]) is a


def test_a_reason_spreads_to_everything_that_is_unified_and_the_first_is_kept() -> None:
    fixed, one, other = Channels(6, "input"), Channels(6), product([Channels(2), Channels(3)])
    unify(one, other)
    unify(one, fixed)
    freeze(other, "later")
    assert [atom.reason for atom in atoms(other)] == ["input", "input"]
    assert reason_of(one) == "input"


def test_axes_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="An axis of size 2 cannot be that of size 3"):
        unify(Channels(2), Channels(3))


def test_a_view_and_its_inverse_give_the_axes_back() -> None:
    batch, channels, height, width = Channels(5, "input"), Channels(6), Channels(2), Channels(3)
    (first, flat) = regroup([batch, channels, height, width], [5, 36])
    assert first is batch
    assert list(atoms(flat)) == [channels, height, width]
    assert regroup([first, flat], [5, 6, 2, 3]) == [batch, channels, height, width]


def test_a_view_splits_channels_and_one_that_cuts_across_them_freezes_them() -> None:
    channels, others = Channels(6), Channels(4)
    heads, width = regroup([channels], [2, 3])
    assert list(atoms(channels)) == [heads, width]
    regroup([channels, others], [4, 6])
    assert reason_of(channels) == reason_of(others) == "a view that cuts across channels"


def test_pieces_are_parts_of_the_whole() -> None:
    whole = Channels(7)
    parts = pieces(whole, [2, 4, 1])
    assert [p.size for p in parts] == [2, 4, 1]
    assert list(atoms(whole)) == [a for p in parts for a in atoms(p)]


def test_a_cut_within_a_block_of_channels_freezes_it() -> None:
    whole = product([Channels(2), Channels(3)])
    pieces(whole, [2, 4])
    assert reason_of(whole) == "a cut within a block of channels"


def test_a_stack_has_channels_of_their_own_at_each_place_and_reads_as_their_concatenation() -> None:
    packed = Channels(12)
    cut = take_stack(packed, 3)
    assert cut is not None
    over, family = cut
    assert product([over, family]) == resolve(packed)
    assert sizes(packed) == [4, 4, 4]
    assert len(set(atoms(packed))) == 3
    heads, width = regroup([family], [2, 2])
    assert [sizes(part) for part in (heads, width)] == [[2, 2, 2]] * 2
    assert sizes(packed) == [2, 2] * 3
    unify(heads, Channels(2))
    assert len(set(atoms(heads))) == 1
