"""The signals that ask a run to end: the first one after the step at hand, a second one at once."""

import os
import signal
import socket
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm.batches.workers import SIGNALS
from vlm.distributed.groups import RankGroup
from vlm.errors import InterruptedRunError
from vlm.models.encoder import Encoder
from vlm.text.tokenizer import TokenBatch

_AGAIN_S = 1.0
"""A signal this soon after the first is the same request: a terminal sends Ctrl-C to the launcher
and its processes, and the launcher passes it on."""


class Interruption:
    """Listens to the signals while a run trains.

    A thread of its own reads their numbers from a socket, to which the interpreter writes them in
    the handler itself: Python's handlers would have to wait until the main thread leaves a
    collective, and a second signal must end the process also from within one.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first signal that came; None before."""
        self._first = 0.0

    def __enter__(self) -> "Interruption":
        self._listens = threading.current_thread() is threading.main_thread()
        if not self._listens:  # Python's handlers can be set by the main thread alone
            return self
        self._end, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, _nothing) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._listens:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._signals.close()  # which ends the thread
        self._thread.join()
        self._end.close()

    def asked(self) -> bool:
        """Return whether this process was asked to end."""
        return self.signal is not None

    def agreed(self, group: RankGroup, device: torch.device) -> bool:
        """Return whether any rank was asked to end; a collective operation, which waits."""
        if group.process_group is None:
            return self.asked()
        asked = torch.tensor(float(self.asked()), device=device)
        dist.all_reduce(asked, group=group.process_group)
        return bool(asked.item())

    def _listen(self) -> None:
        while numbers := self._end.recv(64):
            for number in numbers:
                if number not in SIGNALS:  # such as that of a data worker's end
                    continue
                if self.signal is None:
                    self.signal, self._first = signal.Signals(number), time.monotonic()
                elif time.monotonic() - self._first >= _AGAIN_S:
                    os._exit(128 + number)


class Stoppable(nn.Module):
    """An encoder in an evaluation, which refuses the next batch once a run is asked to end."""

    def __init__(self, encoder: Encoder, interruption: Interruption) -> None:
        super().__init__()
        self.encoder = encoder
        self.train(encoder.training)
        self._interruption = interruption

    @property
    def embed_dim(self) -> int:
        """Numbers in a feature."""
        return self.encoder.embed_dim

    @property
    def device(self) -> torch.device:
        """Where the encoder lies."""
        return self.encoder.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the features of images, or raise."""
        return self._or_end().encode_image(images)

    def encode_text(self, tokens: TokenBatch) -> Tensor:
        """Return the features of texts, or raise."""
        return self._or_end().encode_text(tokens)

    def _or_end(self) -> Encoder:
        if self._interruption.asked():
            raise InterruptedRunError("a signal has cut an evaluation short")
        return self.encoder


def _nothing(number: int, frame: FrameType | None) -> None:
    """Be a handler, without which the interpreter would not write a signal's number."""
