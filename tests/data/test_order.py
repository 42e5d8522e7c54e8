"""Orders and splits: the same everywhere, another for each seed and epoch, undisturbed by what is added."""

from __future__ import annotations

import numpy as np

from gdn.data import order


def test_keys_and_orders_never_change() -> None:
    """Written down once: a checkpoint of an older release must find its place, and a file must stay on its side."""
    units = order.keys(["stdlib/os.py", "packages/torch/nn/__init__.py"])
    assert units.tolist() == [1403741754345697724, 13892594932906708975]
    assert order.epoch_keys(units, seed=3, epoch=1).tolist() == [5774685719412014899, 14538316348068273646]
    assert order.block_keys(7, 2).tolist() == [13309476754707697221, 4414019431610648415]


def test_mix_is_splitmix64() -> None:
    """The first outputs of SplitMix64 with state 1234567, as published with the generator."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * gamma) % 2**64 for i in range(3)], dtype=np.uint64)
    assert order.mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_each_seed_and_epoch_has_its_order() -> None:
    units = order.keys([str(i) for i in range(1000)])
    orders = {tuple(np.argsort(order.epoch_keys(units, seed, epoch)).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_added_units_do_not_disturb_the_order_of_the_others() -> None:
    few, many = order.keys([str(i) for i in range(100)]), order.keys([str(i) for i in range(200)])
    old = np.argsort(order.epoch_keys(few, 0, 0)).tolist()
    new = [i for i in np.argsort(order.epoch_keys(many, 0, 0)).tolist() if i < 100]
    assert old == new


def test_the_fraction_held_out_is_the_fraction_asked_for() -> None:
    keys = order.keys([str(i) for i in range(20_000)]).tolist()
    for fraction in (0.0, 0.02, 0.3):
        held_out = np.mean([order.is_held_out(key, fraction) for key in keys])
        assert abs(held_out - fraction) < 4 * (fraction / 20_000) ** 0.5 + 1e-9
    assert not any(order.is_held_out(key, 0.0) for key in keys)
