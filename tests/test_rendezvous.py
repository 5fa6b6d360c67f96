"""Ranks of one machine meet on the loopback. What a whole run listens on, the campaign tells (`ways_out.py`)."""

import socket
from datetime import timedelta

import psutil
import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, rendezvous_handler_registry


def meeting(endpoint: str = "", nodes: int = 1) -> RendezvousHandler:
    """As torchrun makes it, which finds it by the package's entry point."""
    return rendezvous_handler_registry.create_handler(RendezvousParameters("loopback", endpoint, "a run", nodes, nodes))


def listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections()
    return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


def test_the_store_is_on_the_loopback_and_ranks_are_its_clients():
    before, handler = listening(), meeting()
    met = handler.next_rendezvous()
    where = met.bootstrap_store_info
    assert (met.rank, met.world_size, where.master_addr) == (0, 1, "127.0.0.1")
    assert listening() - before == {("127.0.0.1", where.master_port)}
    assert handler.use_agent_store and handler.num_nodes_waiting() == 0 and handler.get_run_id() == "a run"
    ranks = [
        TCPStore(where.master_addr, where.master_port, is_master=False, timeout=timedelta(seconds=30)) for _ in range(2)
    ]
    ranks[0].set("said", "here")
    assert ranks[1].get("said") == b"here"
    # What the agent says is its own.
    assert not met.store.check(["said"])
    assert handler.shutdown()
    del met, ranks
    assert listening() <= before


def test_others_do_not_reach_it():
    """Of the machine's other addresses, one of which is what torchrun's own would be reached by."""
    handler = meeting()
    met = handler.next_rendezvous()
    port = met.bootstrap_store_info.master_port
    addresses = [
        own.address for found in psutil.net_if_addrs().values() for own in found if own.family.name == "AF_INET"
    ]
    reached = []
    for address in [*addresses, "127.0.0.2"]:
        with socket.socket() as probe:
            probe.settimeout(5)
            if probe.connect_ex((address, port)) == 0:
                reached.append(address)
    assert reached == ["127.0.0.1"]


def test_ranks_that_start_again_meet_in_a_store_of_their_own():
    handler = meeting()
    first = handler.next_rendezvous()
    first.store.set("said", "before")
    second = handler.next_rendezvous()
    assert not second.store.check(["said"])
    port = second.bootstrap_store_info.master_port
    assert ("127.0.0.1", port) in listening()
    assert not handler.is_closed()
    handler.set_closed()
    assert handler.is_closed()


@pytest.mark.parametrize(("endpoint", "nodes"), [("", 2), ("localhost:0", 1)])
def test_several_machines_are_refused(endpoint, nodes):
    expected = (
        f"--nnodes is {nodes} and --rdzv-endpoint is '{endpoint}', expected 1 and none with --rdzv-backend loopback"
    )
    with pytest.raises(ValueError, match=expected):
        meeting(endpoint, nodes)
