import pytest
import torch

from lmc_lightning.data.order import EpochOrder, NoiseSeeds, derive_seed, derived_generator, epoch_order


def one_pass(order: EpochOrder, epoch: int) -> list[int]:
    order.set_epoch(epoch)
    return list(order)


def test_derived_seeds_are_pinned_63_bit_numbers():
    """A change of the derivation would silently change every published run."""
    assert derive_seed(0, "order", 3) == 8307221573466005009
    assert derive_seed(7) == 3193050612831425908
    assert all(0 <= derive_seed(seed, "x") < 2**63 for seed in range(100))


def test_derived_seeds_differ_between_streams():
    streams = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, 'a", "b'), (0, "a", 1), (0, "a", "1")]
    assert len({derive_seed(*stream) for stream in streams}) == len(streams)


def test_derived_generator_starts_at_the_derived_seed():
    assert derived_generator(3, "order", 1).initial_seed() == derive_seed(3, "order", 1)


@pytest.mark.parametrize("size", [1, 2, 97])
def test_an_epoch_visits_every_example_once(size):
    assert epoch_order(size, seed=3, epoch=5).sort().values.tolist() == list(range(size))


def test_order_is_a_function_of_seed_and_epoch():
    order = EpochOrder(50, NoiseSeeds(noise_seed=1))
    passes = [one_pass(order, epoch) for epoch in (0, 1, 2, 1, 0)]
    assert passes[0] == passes[4] == epoch_order(50, 1, 0).tolist()
    assert passes[1] == passes[3]
    distinct = [one_pass(EpochOrder(50, NoiseSeeds(seed)), epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(visited) for visited in distinct}) == 6


def test_an_iterator_made_before_set_epoch_serves_that_epoch():
    """Lightning makes the first iterator of a process before it announces the epoch."""
    order = EpochOrder(50, NoiseSeeds())
    iterator = iter(order)
    order.set_epoch(4)
    assert list(iterator) == epoch_order(50, 0, 4).tolist()


def test_seeds_and_epoch_of_a_pass_are_those_at_its_beginning():
    order = EpochOrder(50, seeds := NoiseSeeds(noise_seed=1))
    iterator = iter(order)
    first = next(iterator)
    seeds.noise_seed, order.epoch = 2, 9
    assert [first, *iterator] == epoch_order(50, 1, 0).tolist()
    assert order.current == (NoiseSeeds(noise_seed=1), 0)
    assert list(order) == epoch_order(50, 2, 9).tolist()
    assert order.current == (NoiseSeeds(noise_seed=2), 9)


def test_streams_follow_the_noise_seed_unless_they_have_their_own():
    assert (NoiseSeeds(5).order, NoiseSeeds(5).augmentation) == (5, 5)
    seeds = NoiseSeeds(5, order_seed=0, augmentation_seed=7)
    assert (seeds.order, seeds.augmentation) == (0, 7)


@pytest.mark.parametrize(("size", "replicas"), [(50, 2), (51, 2), (50, 3), (2, 5)])
def test_processes_take_turns_in_one_order(size, replicas):
    orders = [EpochOrder(size, NoiseSeeds(noise_seed=3), replicas, rank) for rank in range(replicas)]
    shards = [one_pass(order, 6) for order in orders]
    share = -(-size // replicas)
    assert [len(shard) for shard in shards] == [len(order) for order in orders] == [share] * replicas
    whole = epoch_order(size, 3, 6).repeat(replicas)[: share * replicas]
    assert torch.equal(torch.tensor(shards).T.flatten(), whole)


def test_no_global_generator_moves():
    before = torch.get_rng_state()
    one_pass(EpochOrder(50, NoiseSeeds()), 3)
    assert torch.equal(torch.get_rng_state(), before)
