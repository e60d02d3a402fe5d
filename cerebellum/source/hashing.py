"""The source read from end to end on threads of its own, while a run checks, opens and decodes."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Thread

from cerebellum.source import Source


class Hashing:
    """Two names of one content: the fingerprint that a run waits for, and the SHA-256 that is ready at its end.

    ``n_bytes`` of the SHA-256 are done. A file that cannot be read is told of where a name is asked for.
    """

    def __init__(self, source: Source) -> None:
        self.fingerprint: Future[str] = Future()
        self.sha256: Future[str] = Future()
        self.n_bytes = 0
        self._source = source
        Thread(
            target=self._work, name="hashing", daemon=True
        ).start()  # nobody waits for it who was interrupted

    def _work(self) -> None:
        try:
            self.fingerprint.set_result(self._source.fingerprint)
            self.sha256.set_result(self._source.sha256(self._progress))
        except BaseException as error:
            for name in (self.fingerprint, self.sha256):
                if not name.done():
                    name.set_exception(error)

    def _progress(self, n_bytes: int, _total: int) -> None:
        self.n_bytes = n_bytes
