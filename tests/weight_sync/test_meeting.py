"""Who may join: one secret for all ranks, and nothing that listens beyond the loopback."""

import os
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist
from helpers import assert_on_loopback, listening

from samebit.weight_sync import meeting
from samebit.weight_sync.meeting import (
    check_secret,
    host_store,
    is_loopback,
    loopback_listener,
    on_loopback,
    prove_secret,
    stay_on_loopback,
)

SECRET = "sixteen or more letters"


def proofs(pool, *known):
    """What each rank says of the others, which know these secrets; None is silent."""
    store, size = dist.HashStore(), len(known)
    futures = [
        pool.submit(prove_secret, store, rank, size, secret, timedelta(seconds=1))
        for rank, secret in enumerate(known)
        if secret is not None
    ]
    return [str(future.exception() or "") for future in futures]


@pytest.mark.parametrize("secret", [SECRET, ""])
def test_ranks_that_know_the_same_meet(pool, secret):
    assert proofs(pool, secret, secret, secret) == ["", "", ""]


def test_ranks_that_know_something_else_are_named(pool):
    """By those who know better, in one line that says what to do."""
    first, second, odd = proofs(pool, SECRET, SECRET, SECRET.upper())
    assert first.startswith("rank 2 has another SAMEBIT_SECRET than rank 0; set SAMEBIT_SECRET to")
    assert second.startswith("rank 2 has another SAMEBIT_SECRET than rank 1")
    assert odd.startswith("rank 0 has another SAMEBIT_SECRET than rank 2")
    with_one, without = proofs(pool, SECRET, "")
    assert with_one.startswith("rank 1 has no SAMEBIT_SECRET; set")
    assert without.startswith("rank 0 has another SAMEBIT_SECRET than rank 1")


def test_a_rank_that_says_nothing_is_named(pool):
    [alone] = proofs(pool, SECRET, None)
    assert alone == "rank 1 has not come within 1 s, or rank 0 is gone"


def test_what_a_rank_showed_before_is_no_proof(pool):
    """Words once heard, said again: the questions are new ones."""
    heard = dist.HashStore()
    futures = [pool.submit(prove_secret, heard, rank, 2, SECRET) for rank in (0, 1)]
    assert [future.exception() for future in futures] == [None, None]
    store = dist.HashStore()
    for key in ("question_1", "proof_1"):
        dist.PrefixStore("samebit_secret", store).set(
            key, dist.PrefixStore("samebit_secret", heard).get(key)
        )
    with pytest.raises(ValueError, match="rank 1 has another SAMEBIT_SECRET than rank 0"):
        prove_secret(store, 0, 2, SECRET, timedelta(seconds=1))


def test_the_store_outlives_those_who_read_it(pool):
    """Rank 0, which holds it, tells of another secret once the others have seen that too."""
    store = dist.HashStore()
    shown = dist.PrefixStore("samebit_secret", store)
    first = pool.submit(prove_secret, store, 0, 2, SECRET, timedelta(minutes=1))
    shown.set("question_1", "x")
    shown.set("proof_1", "y")
    with pytest.raises(TimeoutError):
        first.exception(timeout=1)
    shown.set("read_1", "")
    assert "rank 1 has another SAMEBIT_SECRET than rank 0" in str(first.exception())


def test_a_rank_cannot_show_what_another_showed(pool):
    """Its own question, and the first rank's proof as its own."""
    store = dist.HashStore()
    shown = dist.PrefixStore("samebit_secret", store)
    shown.set("question_1", "x")
    first = pool.submit(prove_secret, store, 0, 2, SECRET, timedelta(seconds=5))
    shown.set("proof_1", shown.get("proof_0"))
    assert "rank 1 has another SAMEBIT_SECRET than rank 0" in str(first.exception())


@pytest.mark.parametrize(
    ("secret", "why", "message"),
    [
        ("", "many machines", "^many machines, and SAMEBIT_SECRET is not set; set SAMEBIT_SECRET"),
        ("too short", "", "SAMEBIT_SECRET has 9 characters; it must have at least 16: set"),
        ("too short", "many machines", "SAMEBIT_SECRET has 9 characters"),
    ],
)
def test_secrets_that_are_none(secret, why, message):
    with pytest.raises(ValueError, match=message):
        check_secret(secret, why)
    check_secret("")
    check_secret("a" * 16, why)


def test_a_secret_is_kept_from_what_the_process_starts(monkeypatch):
    monkeypatch.setattr(meeting, "_given", [])
    monkeypatch.delenv("SAMEBIT_SECRET", raising=False)
    assert meeting.own_secret() == ""
    monkeypatch.setenv("SAMEBIT_SECRET", SECRET)
    assert meeting.own_secret() == meeting.own_secret() == SECRET
    assert "SAMEBIT_SECRET" not in os.environ


def test_groups_stay_on_the_loopback_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "x")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    stay_on_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_addresses(address):
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["", "0.0.0.0", "::", "10.0.0.1", "fd00::1", "node-7", "127"])
def test_other_addresses(address):
    assert not is_loopback(address)


def test_a_store_on_the_loopback_listens_nowhere_else(forkserver):
    """torch's own way to make one listens on every interface, and the check would notice."""
    with loopback_listener() as listener:
        address, port = listener.getsockname()
        store = host_store(listener)
        client = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        client.set("a", "b")
        assert store.get("a") == b"b"
        assert_on_loopback([os.getpid()])
    with pytest.raises(AssertionError, match="nothing listens"):
        assert_on_loopback([])
    everywhere = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(AssertionError, match="::"):
        assert_on_loopback([os.getpid()])
    del everywhere
    with socket.create_server(("0.0.0.0", 0)):
        assert "0.0.0.0" in listening([os.getpid()])


@pytest.mark.parametrize("given", [None, "eth1"])
def test_a_local_groups_interface(monkeypatch, given):
    """The loopback for as long as the group is made, for NCCL from then on; what is given stays."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, given or "")
        if given is None:
            monkeypatch.delenv(name)
    with on_loopback(False):
        assert os.environ.get("GLOO_SOCKET_IFNAME") == given
    with on_loopback(True):
        assert os.environ["GLOO_SOCKET_IFNAME"] == (given or "lo")
    assert os.environ.get("GLOO_SOCKET_IFNAME") == given
    assert os.environ["NCCL_SOCKET_IFNAME"] == (given or "lo")
