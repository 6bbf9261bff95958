"""Layer inputs in host memory: what stays for the next micro-step of the same shape, and what is let go of."""

from __future__ import annotations

import torch

from drawplate.model.stream.layer_inputs import InputStore


def micro_step(store: InputStore, tokens: int, layers: int = 4) -> None:
    inputs = [torch.randn(tokens, 8) for _ in range(layers)]
    saved = [store.put(x, offload=True) for x in inputs]
    for x, put in zip(reversed(inputs), reversed(saved), strict=True):
        assert torch.equal(store.take(put), x)


def addresses(store: InputStore) -> set[int]:
    return {block.data_ptr() for block in store._spare}


def test_host_memory_stays_and_is_used_again() -> None:
    """A captured micro-step copies to where it was captured, for as long as its graph lives."""
    store = InputStore(torch.device("cpu"))
    micro_step(store, 16)
    store.settle()
    first, size = addresses(store), store.host_bytes
    assert len(first) == 4
    for tokens in (32, 16, 32):
        micro_step(store, tokens)
        store.settle()
    assert first <= addresses(store), "a larger micro-batch has memory of its own"
    assert store.host_bytes == 3 * size


def test_a_settled_store_holds_nothing_of_the_device() -> None:
    store = InputStore(torch.device("cpu"))
    micro_step(store, 16)
    assert store._return_buffers
    store.settle()
    assert not store._return_buffers
    assert store._leaving is None
    micro_step(store, 16)


def test_what_was_never_taken_is_given_back_after_settling() -> None:
    store = InputStore(torch.device("cpu"))
    for _ in range(3):
        store.put(torch.randn(16, 8), offload=True)
    store.settle()  # a capture that broke off between forward and backward
    store.forget()
    assert len(addresses(store)) == 3


def test_an_expected_input_is_on_its_way_before_it_is_taken() -> None:
    store = InputStore(torch.device("cpu"))
    inputs = [torch.randn(16, 8) for _ in range(3)]
    saved = [store.put(x, offload=True) for x in inputs]
    store.expect()
    assert [put.returning is not None for put in saved] == [False, False, True]
    for x, put in zip(reversed(inputs), reversed(saved), strict=True):
        assert torch.equal(store.take(put), x)
    store.expect()  # nothing is left


def test_shorter_micro_batches_use_the_blocks_of_the_longest() -> None:
    """Host memory is planned for the longest, which the rehearsal runs first."""
    store = InputStore(torch.device("cpu"))
    micro_step(store, 64)
    planned = store.host_bytes
    for tokens in (16, 48, 64, 32):
        micro_step(store, tokens)
    assert store.host_bytes == planned
