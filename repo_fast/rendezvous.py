"""torchrun's rendezvous for the ranks of one machine, on the loopback: `torchrun --rdzv-backend loopback …`.

torchrun's own listens on every interface, and whoever reaches it can write into the store that ranks meet in. Such a
store is made here on a socket that is bound to 127.0.0.1. Nor does it need the host's name to lead anywhere, as
torchrun's own does.

torchrun finds it by the package's entry point (`repo_fast.launcher.rendezvous_plugin`).
"""

import socket

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

LOOPBACK = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """Of one agent, which there is nobody to wait for.

    Args:
        parameters: As torchrun was told.

    Raises:
        ValueError: There are several machines, or an endpoint, which would not be met at.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        if parameters.max_nodes > 1 or parameters.endpoint:
            raise ValueError(
                f"--nnodes is {parameters.max_nodes} and --rdzv-endpoint is {parameters.endpoint!r}, expected 1 and "
                f"none with --rdzv-backend {parameters.backend}, which is for the ranks of one machine"
            )
        self._backend, self._run_id = parameters.backend, parameters.run_id
        self._closed = False

    def get_backend(self) -> str:
        """The name that it is registered by."""
        return self._backend

    @property
    def use_agent_store(self) -> bool:
        """Ranks are clients of the store that is made here: none opens one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """A new store: ranks that are started again meet in another than those before."""
        with socket.socket() as bound:
            bound.bind((LOOPBACK, 0))
            bound.listen()
            port = bound.getsockname()[1]
            store = TCPStore(
                LOOPBACK,
                port,
                is_master=True,
                wait_for_workers=False,
                # The store closes it.
                master_listen_fd=bound.detach(),
            )
        # Ranks have the same store to themselves. It ends with the last that holds it, which is the agent.
        return RendezvousInfo(PrefixStore("agent", store), 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def is_closed(self) -> bool:
        """Whether `set_closed` was called."""
        return self._closed

    def set_closed(self) -> None:
        """Nobody else is to be told."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """None ever."""
        return 0

    def get_run_id(self) -> str:
        """torchrun's `--rdzv-id`."""
        return self._run_id

    def shutdown(self) -> bool:
        """There is nothing to close that the agent does not hold itself."""
        return True
