"""What verbs say that are for one process, where a launcher starts several."""

import os

from vlm.errors import DistributedError


def refuse_several_processes(verb: str) -> None:
    """Refuse to be one of the processes that `accelerate launch` or torchrun started.

    Args:
        verb: The verb that each of them would do in full, such as `eval index`.

    Raises:
        DistributedError: there are several processes.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise DistributedError(
            f"`vlm {verb}` was launched as {ranks} processes, each of which would do all of it; "
            "expected one process, started without a launcher"
        )
