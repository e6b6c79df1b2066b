"""No rank is waited for in vain: when one dies or raises, all leave, wherever they hang."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet

from fabric_trainer.errors import FAILED, FINISHED

# seconds
SETTLE = 0.5  # an error may be the echo of another rank's end, whose news is then no further away than this
GRACE = 3.0  # between the news and leaving: a main thread that is raising an error of its own can print it
PARENT = GRACE + 2  # for rank 0 to leave first
PATIENCE = 60.0  # of rank 0 that has ended well, with ranks that have not
FORCE = 20.0  # for a rank that has failed to end by itself


class News(NamedTuple):
    """A rank's last word, as it travels."""

    code: int  # with which all are to leave; 0: it ended well
    line: str = ""


DONE = News(FINISHED)


class Lifeline:
    """Ends the whole job, within seconds and with the same exit code, when one of its ranks dies or raises.

    rank, world_size: of all processes of the job. broadcast: gives every rank rank 0's object; called once, on
    entering. code_of: the exit code, not 0, of a process that ends by this error. caller_prints: errors that the
    caller prints; others, except SystemExit, are printed here, and not once more by the interpreter. KeyboardInterrupt
    and SystemExit with code 0 are no failures. With one process nothing is opened and nothing happens. A process that
    has failed is ended 20 s later, should it still be there.

    Every rank keeps a TCP connection to rank 0, watched by a thread. It carries a word when a rank ends and the system
    closes it when the process dies, so there are no heartbeats and no false alarms. A rank in a collective whose peer
    has gone may never run Python in its main thread again: the thread prints why, and ends the process.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        broadcast: Callable[[Any], Any],
        code_of: Callable[[BaseException], int] = lambda error: FAILED,
        caller_prints: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.rank, self.world_size, self.broadcast = rank, world_size, broadcast
        self.code_of, self.caller_prints = code_of, caller_prints
        self._server: socket.socket | None = None
        self._peers: dict[Connection, int | None] = {}  # their ranks; None: has not said who it is
        self._to_come = set(range(1, world_size)) if rank == 0 else set()
        self._open_ends = max(world_size - 1, 0) if rank == 0 else 1  # peers that have not said goodbye
        self._token = ""
        self._lock = threading.Lock()  # no send meets a close, after which the descriptor could be another file's
        self._watcher = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._ended = False  # this rank has had its last word: nothing it hears is news
        self._failure: News | None = None
        self._heard = threading.Event()  # of the failure
        self._child_of_zero = False

    def __enter__(self) -> Lifeline:
        if self.world_size > 1:
            _entered.add(self)
            self._connect()
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.world_size == 1:
            return
        code = self._code(error)
        if error is not None and code != FINISHED:
            self._fail(error, code)
            return
        if self.rank == 0 and not isinstance(error, KeyboardInterrupt):
            self._watcher.join(PATIENCE)
        self._say(DONE)
        self._watcher.join(None if self._failure else 0.1)

    def leave(self, code: int, line: str) -> NoReturn:
        """End all ranks with ``code``, not 0, and this one at once; ``line`` says why, on every rank's stderr."""
        line = f"rank {self.rank}: {line}"
        _end_by_force(code, PARENT + GRACE)
        self._say(News(code, line))
        _print(line)
        self._let_zero_go_first()
        _exit(code)

    def close(self) -> None:
        """Close this process's ends without a word. In a child that was forked, this leaves the parent's open."""
        for end in self._ends():
            end.close()

    def _ends(self) -> list[Connection | socket.socket]:
        return [*self._peers, *([self._server] if self._server else [])]

    def _code(self, error: BaseException | None) -> int:
        if error is None or isinstance(error, KeyboardInterrupt):
            return FINISHED
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else FAILED if error.code else FINISHED
        return self.code_of(error)

    def _connect(self) -> None:
        if self.rank == 0:
            host = os.environ.get("MASTER_ADDR") or socket.gethostname()
            self._server, self._token = _listen(host, self.world_size), secrets.token_hex(16)
            self.broadcast((host, self._server.getsockname()[1], self._token, os.getpid()))
            return
        host, port, token, pid = self.broadcast(None)
        self._child_of_zero = os.getppid() == pid
        try:
            connection = _connection(socket.create_connection((host, port), timeout=FORCE))
        except OSError as error:
            raise ConnectionError(f"rank {self.rank} can't reach rank 0 at {host}, port {port}: {error}") from error
        _send(connection, [token, self.rank])
        self._peers[connection] = 0

    def _watch(self) -> None:
        """Hear what the others say until all have said goodbye. Rank 0 takes them in at any time: it can't know when
        another has received the broadcast."""
        while self._open_ends:
            for ready in wait(self._ends()):
                if isinstance(ready, Connection):
                    self._hear(ready)
                elif self._server:
                    self._peers[_connection(self._server.accept()[0])] = None
        self.close()

    def _hear(self, connection: Connection) -> None:
        rank, words = self._peers[connection], _receive(connection)
        if rank is None:
            self._take_in(connection, words)
            return
        news = News(*words) if words else News(FAILED, f"rank {rank} died without a word")
        if news == DONE or self._ended:
            self._drop(connection)
            self._open_ends -= 1
        else:
            self._leave_too(news, connection)

    def _take_in(self, connection: Connection, words: Any) -> None:
        """A rank shows the token; whoever else came to the port is turned away."""
        match words:
            case [str(token), int(rank)] if _same(token, self._token) and rank in self._to_come:
                self._peers[connection] = rank
                self._to_come.remove(rank)
            case _:
                self._drop(connection)
        if self._server and not self._to_come:
            self._server.close()
            self._server = None

    def _leave_too(self, news: News, source: Connection) -> NoReturn:
        self._failure = news
        self._heard.set()
        _end_by_force(news.code, PARENT + GRACE)
        self._tell(news, but=source)
        _print(f"{news.line}; this rank leaves too")
        time.sleep(GRACE)
        if self._child_of_zero:
            source.poll(PARENT - GRACE)
        _exit(news.code)

    def _fail(self, error: BaseException, code: int) -> None:
        """This rank raises. What has made it raise may be another's end: then it ends with that one's code."""
        if not isinstance(error, (SystemExit, *self.caller_prints)):
            traceback.print_exception(error)
            _print_only_once(error)
        self._heard.wait(SETTLE)
        if self._failure is None:
            line = (str(error).splitlines() or [""])[0][:200]
            self._say(News(code, f"rank {self.rank} failed: {type(error).__name__}: {line}"))
        elif self._failure.code != code:
            self._watcher.join()  # does not return: it ends the process
        _end_by_force(code, FORCE)
        self._let_zero_go_first()

    def _let_zero_go_first(self) -> None:
        """Where rank 0 launched this process, it may kill itself on seeing a child fail, and its code would be lost."""
        if self._child_of_zero:
            self._watcher.join(PARENT)

    def _say(self, news: News) -> None:
        """This rank's last word."""
        self._ended = True
        self._tell(news)

    def _tell(self, news: News, but: Connection | None = None) -> None:
        with self._lock:
            for connection, rank in list(self._peers.items()):
                if rank is not None and connection is not but:
                    with suppress(OSError):
                        _send(connection, news)

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            del self._peers[connection]
            connection.close()


_entered: WeakSet[Lifeline] = WeakSet()


def _close_in_child() -> None:
    """A data loader's worker inherits its rank's connection, and would keep it open after the rank's death."""
    for lifeline in _entered:
        lifeline.close()


os.register_at_fork(after_in_child=_close_in_child)


def _listen(host: str, backlog: int) -> socket.socket:
    """A port of the system's choice, open to other machines only where rank 0 is reached from there."""
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), backlog=backlog, family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _connection(connected: socket.socket) -> Connection:
    connected.setblocking(True)
    return Connection(connected.detach())


def _send(connection: Connection, words: Any) -> None:
    connection.send_bytes(json.dumps(words).encode())  # no pickle: it would run what a stranger sends


def _receive(connection: Connection) -> Any:
    """What the other end says; None where it has closed, or is no rank."""
    try:
        return json.loads(connection.recv_bytes(4096))
    except (EOFError, OSError, ValueError, RecursionError):
        return None


def _same(token: str, ours: str) -> bool:
    return token.isascii() and hmac.compare_digest(token, ours)


def _print(line: str) -> None:
    with suppress(Exception):  # nobody may be reading
        sys.stderr.write(f"{line}\n")


def _print_only_once(error: BaseException) -> None:
    """Keep the interpreter, where nobody catches this error, from printing it again."""
    hook = sys.excepthook
    sys.excepthook = lambda kind, value, trace: None if value is error else hook(kind, value, trace)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def _end_by_force(code: int, seconds: float) -> None:
    """End the process later, whatever holds it up: a stream that nobody reads, a destructor that waits for a peer."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
