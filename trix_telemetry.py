# SPDX-License-Identifier: Apache-2.0
"""Anonymous usage telemetry for a command-line tool, in one file to copy.

    import trix_telemetry
    trix_telemetry.track_command_execution("build")

Sent, for each command that a person runs, as one OTLP/HTTP JSON counter point: the command's
name, the tool's name and version, two times, and a random fingerprint.
Never sent: arguments, paths, file contents, environment, user or host names.

Off: DO_NOT_TRACK=1, or TRIX_TELEMETRY=0, or `python -m trix_telemetry disable`, which writes
`enabled = false` into ~/.tx3/trix/config.toml. `status` and `preview` show everything. Without
an endpoint nothing is sent or made, and none is set as shipped.

To vendor it, copy the file anywhere, under any name: Python 3.11 or newer, standard library
only. Edit the constants below or call initialize_telemetry(); the rest is not a vendor's to
change, so that a newer copy can take its place. `__version__` says which one it is.

Never in the way: all that may be slow happens on a daemon thread, one budget (`timeout_ms`)
bounds it, and no failure reaches the tool. Modules are imported where they are used: when off,
none is needed, and the import with a call costs a seventh of `import json`. So there is nothing
here of typing, dataclasses or __future__, and annotations are quoted where they would cost.
What runs inside a tool ends where the command line begins.
"""

import os
import sys
import time

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    import argparse
    import http.client
    import socket
    import ssl
    import threading
    import urllib.request
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NoReturn, TypeVar

    _T = TypeVar("_T")

__version__ = "1.0.0"

# What a vendor edits: these eight constants. initialize_telemetry() sets the same.
SERVICE_NAME = "trix-cli"
SERVICE_VERSION = "0.19.3"
ENDPOINT = ""  # the tool's own OTLP/HTTP base URL; empty: nowhere
METRIC_NAME = "trix_command_invocation"
DIRECTORY = "~/.tx3/trix"  # of config.toml, fingerprint, cooldown
ENVIRONMENT = "TRIX_TELEMETRY"  # a variable, and the prefix of _ENDPOINT and _DEBUG
PROG = ""  # how a person reaches main(), such as "acme telemetry"; empty: python -m <module>
COMMANDS: "frozenset[str] | None" = None  # the names that may be counted; None: any

_TIMEOUT_MS, _TIMEOUT_MS_MAX = 2000, 60_000
_COOLDOWN_SECONDS, _COOLDOWN_SECONDS_MAX = 60, 3600
_SENDS_AT_ONCE = 4
_WINDOW_NS = 1_000_000  # stores that keep milliseconds need a whole one
_HEAD_BYTES = 1 << 16  # of a config, what the caller's side reads
_CONFIG_BYTES_MAX = 1 << 24
_ANSWER_BYTES_MAX = 1 << 18  # headers and all; no collector says as much
_ADDRESS_SHARES = 3  # a dead address costs a third of what is left, however many there are
_POLL_SECONDS = 0.05  # a config that was read meanwhile may have moved the deadline
_FALSE = ("0", "false", "no", "off")
_HEX_DIGITS = "0123456789abcdefABCDEF"
_NOT_IN_URL = frozenset(' "<>\\^`{|}?#')  # RFC 3986; a base URL has no query or fragment
_IN_HOST = "abcdefghijklmnopqrstuvwxyz0123456789-._"
_NOT_IN_HEADER_NAME = frozenset(' "(),/:;<=>?@[\\]{}')  # RFC 9110, section 5.6.2
_FIXED_HEADERS = ("content-type", "content-length", "host", "connection", "transfer-encoding")
_URL_ALLOWED = "an http or https base URL with a host and without user info, query or fragment"


class _Off(Exception):
    """Why nothing is sent, in one line."""


class _Invalid(_Off):
    """Which setting is wrong, what was found, and what is allowed."""


def _module_name() -> str:
    if __name__ != "__main__":
        return __name__
    return __spec__.name if __spec__ else os.path.basename(__file__).removesuffix(".py")


class _Tool:
    """What the host tool says of itself; `problem` tells what is wrong with that."""

    service_name = SERVICE_NAME
    service_version = SERVICE_VERSION
    endpoint = ENDPOINT
    metric_name = METRIC_NAME
    directory = DIRECTORY
    environment = ENVIRONMENT
    prog = PROG
    commands = COMMANDS
    problem = ""

    def __init__(self, **given: "Any") -> None:
        for name, value in given.items():
            if value is None:
                continue
            if name == "commands":
                value = None if isinstance(value, str) else _shielded(frozenset, value)
                is_good = value is not None and all(isinstance(n, str) for n in value)
            else:
                value = _shielded(os.fspath, value) if name == "directory" else value
                is_good = isinstance(value, str) and value.isprintable()
                if name == "environment":  # some locales have no other variables
                    is_good = is_good and str(value).isascii()
                may_be_empty = name in ("endpoint", "prog", "service_version")
                is_good = is_good and bool(value or may_be_empty)
            if is_good:
                setattr(self, name, value)
            else:
                allowed = "a set of names" if name == "commands" else "one line of text"
                self.problem = f"{name} of initialize_telemetry: allowed is {allowed}"
        self.prog = self.prog or f"python -m {_module_name()}"

    def label(self) -> str:
        return self.prog.removeprefix("python -m ")


_tool: "_Tool | None" = None  # of the last initialize_telemetry()


class _Call:
    """One tracked command on its way: what was seen at the call, its budget, its outcome."""

    thread: "threading.Thread"

    def __init__(self, tool: _Tool, command: "Any", endpoint: "str | None" = None) -> None:
        self.began, self.started = time.monotonic(), time.time_ns()
        self.deadline = self.began + _TIMEOUT_MS / 1000  # until the config is parsed
        self.tool, self.command = tool, command
        self.endpoint = endpoint or os.environ.get(f"{tool.environment}_ENDPOINT")
        self.directory, self.url = "", ""
        self.config: bytes | None = None
        self.is_by_hand = False  # somebody waits for the outcome, whatever a cool-down says
        self.is_given_up = False  # whether the end of the process has come first
        self.phase = "preparing"
        self.received = 0  # bytes
        self.outcome, self.text = "", ""  # sent, failed or off; and what to say of it

    def left(self) -> float:
        """Seconds of the budget, always some. Raises TimeoutError when it is used up."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    def is_used_up(self) -> bool:
        return time.monotonic() >= self.deadline

    def took(self) -> str:
        return f"after {(time.monotonic() - self.began) * 1000:.0f} ms"

    def timed_out(self) -> str:
        return f"timed out {self.took()}, {self.phase}"


def _plain(text: object, length: int = 160) -> str:
    """Foreign text made fit for a terminal and a log: one line, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:length])


def _shown(value: object) -> str:
    """What was found, for a message; what may be a URL's secret stays out of it."""
    if isinstance(value, str):
        if set("@?#") & set(value):
            return "not shown, since it holds @, ? or #"
        return repr(_plain(value))
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64):
        return str(value).lower()
    kind = value if isinstance(value, type) else type(value)
    return f"of type {kind.__name__}"


def _bad(key: str, found: object, allowed: str) -> _Invalid:
    return _Invalid(f"telemetry{key} is {_shown(found)}; allowed: {allowed}")


def _is_command(name: object, commands: "frozenset[str] | None") -> bool:
    """Whether it is `[A-Za-z][A-Za-z0-9_-]{0,63}`, and of the closed set where there is one."""
    return (
        isinstance(name, str)
        and 1 <= len(name) <= 64
        and name.isascii()
        and name[0].isalpha()
        and name.replace("-", "").replace("_", "").isalnum()
        and (commands is None or name in commands)
    )


def _is_header(name: str, value: str) -> bool:
    """Whether it may be added: RFC 9110, sections 5.1 and 5.5, in Latin-1."""
    return (
        name.lower() not in ("", *_FIXED_HEADERS)
        and all("!" <= c <= "~" and c not in _NOT_IN_HEADER_NAME for c in name)
        and all(c == "\t" or " " <= c <= "~" or "\xa0" <= c <= "\xff" for c in value)
    )


def _metrics_url(base: object) -> str:
    """The URL for metrics of an OTLP/HTTP base URL; "" for what is not one.

    OTLP specification, "OTLP/HTTP Request": `/v1/metrics`, relative to the base.
    """
    from urllib.parse import urlsplit

    if not isinstance(base, str) or not base.isascii() or not base.isprintable():
        return ""
    try:
        url = urlsplit(base)
        host, bracket, port = url.netloc.rpartition("]")
        is_host = bool(url.hostname) and not set(url.hostname or "").difference(_IN_HOST)
        if bracket:  # IPv6, whose digits urlsplit() has checked
            is_host = host.startswith("[") and port[:1] in ("", ":")
        good = is_host and url.scheme in ("http", "https") and url.port != 0
    except ValueError:  # broken IPv6, a port that is none
        return ""
    if not good or "@" in url.netloc or _NOT_IN_URL & set(base):
        return ""
    whole = url.scheme + base[len(url.scheme) :].rstrip("/")
    return whole if url.path.rstrip("/").endswith("/v1/metrics") else f"{whole}/v1/metrics"


def _retry_after(value: str) -> int:
    """Seconds, from 0 to an hour, of either form: RFC 9110, section 10.2.3."""
    import email.utils

    try:
        if value.isdigit():
            seconds = int(value[:9])
        else:
            seconds = int(email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return 0
    return min(max(seconds, 0), _COOLDOWN_SECONDS_MAX)


class TelemetryConfig:
    """The `[telemetry]` table of config.toml, checked. `timeout_ms` is in milliseconds;
    `otlp_endpoint` is None where the key is missing, "" where it says nowhere."""

    __slots__ = ("enabled", "is_stored", "otlp_endpoint", "otlp_headers", "timeout_ms")
    enabled: bool
    is_stored: bool
    timeout_ms: int
    otlp_endpoint: "str | None"
    otlp_headers: "dict[str, str]"

    def __init__(self, table: "Any") -> None:
        """Take a parsed table, None for defaults that no file holds. Raises _Invalid."""
        self.is_stored = table is not None
        table = {} if table is None else table
        if not isinstance(table, dict):
            raise _bad("", table, "a table")
        self.enabled = table.get("enabled", True)
        if type(self.enabled) is not bool:
            raise _bad(".enabled", self.enabled, "true or false")
        self.timeout_ms = table.get("timeout_ms", _TIMEOUT_MS)
        if type(self.timeout_ms) is not int or not 1 <= self.timeout_ms <= _TIMEOUT_MS_MAX:
            raise _bad(".timeout_ms", self.timeout_ms, f"an integer from 1 to {_TIMEOUT_MS_MAX}")
        self.otlp_endpoint = table.get("otlp_endpoint")
        if self.otlp_endpoint not in (None, "") and not _metrics_url(self.otlp_endpoint):
            raise _bad(".otlp_endpoint", self.otlp_endpoint, _URL_ALLOWED)
        headers = table.get("otlp_headers", {})
        if not isinstance(headers, dict):
            raise _bad(".otlp_headers", type(headers), "a table of strings")
        for name, value in headers.items():
            if not isinstance(value, str) or {"\r", "\n"} & set(name + value):
                found = type(value)  # never the value: it may be a secret
                raise _bad(f".otlp_headers.{_plain(name)}", found, "a string without line breaks")
        self.otlp_headers = {n: v for n, v in headers.items() if _is_header(n, v)}


def _attributes(values: "dict[str, str]") -> "list[dict[str, Any]]":
    return [{"key": key, "value": {"stringValue": value}} for key, value in values.items()]


class CommandMetric:
    """One run of a command: a data point of a cumulative sum. `start` and `end` are its window,
    in Unix nanoseconds, each a true reset (metrics data model, "Resets and Gaps")."""

    __slots__ = ("command", "end", "name", "start")

    def __init__(self, name: str, command: str, start: int, end: int) -> None:
        self.name, self.command, self.start, self.end = name, command, start, end

    def encode(self, resource: "dict[str, str]") -> "dict[str, Any]":
        """An ExportMetricsServiceRequest in OTLP's JSON Protobuf encoding."""
        point = {
            "attributes": _attributes({"command_name": self.command}),
            "startTimeUnixNano": str(self.start),
            "timeUnixNano": str(self.end),
            "asInt": "1",
        }
        cumulative = 2  # AGGREGATION_TEMPORALITY_CUMULATIVE
        total = {"dataPoints": [point], "aggregationTemporality": cumulative, "isMonotonic": True}
        scope_metrics = {"scope": {}, "metrics": [{"name": self.name, "sum": total}]}
        resource_metrics = {
            "resource": {"attributes": _attributes(resource)},
            "scopeMetrics": [scope_metrics],
        }
        return {"resourceMetrics": [resource_metrics]}


def _says_off(config: bytes) -> bool:
    """Whether `[telemetry]` plainly says `enabled = false`: what costs no TOML parser.

    Never true where tomllib would find it on; an unusual spelling is left to tomllib.
    """
    at = -1
    while (at := config.find(b"enabled", at + 1)) >= 0:
        start, end = config.rfind(b"\n", 0, at) + 1, config.find(b"\n", at)
        line = config[start : end if end >= 0 else None].partition(b"#")[0]
        header = config.rfind(b"[", 0, start)
        if b"".join(line.split()) == b"enabled=false" and config.startswith(b"[telemetry]", header):
            indent = config[config.rfind(b"\n", 0, header) + 1 : header]
            strange = (b'"""', b"'''", b"{")  # within which a line may mean something else
            return not (indent.strip() or any(mark in config[:at] for mark in strange))
    return False


def _debugs(tool: _Tool) -> bool:
    debug = os.environ.get(f"{tool.environment}_DEBUG", "")
    return debug.strip().lower() not in ("", *_FALSE)


def _check_switches(tool: _Tool) -> None:
    """Raises _Off where the environment says so, _Invalid where the tool is at fault."""
    do_not_track = os.environ.get("DO_NOT_TRACK", "")
    if do_not_track.lower() not in ("", *_FALSE):
        raise _Off(f"DO_NOT_TRACK is set to {_plain(do_not_track, 20)}")
    switch = os.environ.get(tool.environment, "").strip()
    if switch.lower() in _FALSE:
        raise _Off(f"{tool.environment} is set to {switch}")
    if tool.problem:
        raise _Invalid(tool.problem)


def _say(text: str) -> bool:
    """Write to stderr; whether that can have been read.

    Past the stream's buffer: a daemon thread that held its lock would abort the exit.
    """
    try:
        try:
            descriptor = sys.stderr.fileno()
        except (OSError, ValueError):  # a stream in memory, as of a test or a notebook
            descriptor = None
        if type(descriptor) is int:
            os.write(descriptor, f"{text}\n".encode(errors="replace"))
        else:
            sys.stderr.write(f"{text}\n")
    except (AttributeError, OSError, ValueError):  # none, broken, closed
        return False
    return True


def _debug(tool: _Tool, text: str) -> None:
    if _debugs(tool):
        _say("\n".join(f"{tool.label()}: {line}" for line in text.splitlines()))


def _shielded(function: "Callable[..., _T]", *args: "Any") -> "_T | None":
    """What function returns; None where it raises, for the host is not to know."""
    failure: Exception | None = None
    for _ in range(2):
        try:
            if failure is None:
                return function(*args)
            _debug(_tool or _Tool(), f"off: {type(failure).__name__}: {failure}")
        except Exception as error:  # whatever it is: the telling may fail, too
            failure = error
    return None


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return _plain(f"{error.filename}: {error.strerror}", 1000)
    return _plain(error, 1000)


def _private(path: str, flags: int) -> int:
    """An opener for open(): files for the user alone, and no waiting at a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o600)


def _read(path: str, limit: int) -> bytes:
    """A regular file, up to a limit. Raises OSError."""
    import stat

    with open(path, "rb", opener=_private) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path}: not a regular file")
        return file.read(limit)


def _write(path: str, data: bytes, is_new: "bool | None" = None) -> None:
    """Put data at path in one step. `is_new` tells whether a file has to be there already, which
    then lends its mode; None: either.

    A reader, or a process killed meanwhile, meets the old file or the new. Raises OSError.
    """
    temporary = f"{path}.{os.urandom(6).hex()}.tmp"
    try:
        with open(temporary, "xb", opener=_private) as file:
            file.write(data)
            if is_new is False:  # the user's own words: they outlast a power cut
                file.flush()
                os.fsync(file.fileno())
                os.chmod(temporary, os.stat(path).st_mode & 0o7777)
        if is_new:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


class _Lock:
    """Keeps other processes out of the state directory while a file in it changes."""

    def __init__(self, directory: str) -> None:
        os.makedirs(directory, 0o700, exist_ok=True)
        self.directory = directory
        self.descriptor = -1

    def __enter__(self) -> None:
        """Raises OSError, also where another process holds the lock for two seconds."""
        if sys.platform != "win32":
            self.descriptor = os.open(self.directory, os.O_RDONLY)
            deadline = time.monotonic() + 2
            while not self.flock("LOCK_EX"):
                if time.monotonic() > deadline:
                    os.close(self.descriptor)
                    raise TimeoutError(f"{self.directory} is locked by another process")
                time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        if self.descriptor >= 0:
            self.flock("LOCK_UN")  # a child forked meanwhile holds the descriptor, too
            os.close(self.descriptor)

    def flock(self, operation: str) -> bool:
        if sys.platform == "win32":
            return True
        try:
            import fcntl

            fcntl.flock(self.descriptor, getattr(fcntl, operation) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except (ImportError, OSError):  # some network file systems: go without
            pass
        return True


def _state_directory(tool: _Tool) -> str:
    """The absolute path of the state directory. Raises _Off where there is no home."""
    path = tool.directory
    if path.startswith("~") and (os.environ.get("HOME") or os.name == "nt"):
        path = os.path.expanduser(path)
    if not os.path.isabs(path):
        raise _Off(f"no home for {path}: HOME is not set to an absolute path")
    return path


def _config_path(directory: str) -> str:
    return f"{directory}/config.toml"


def _refuse(directory: str) -> None:
    raise _Off(f"{_config_path(directory)} says enabled = false")


def _read_config(directory: str, limit: int = _CONFIG_BYTES_MAX + 1) -> "bytes | None":
    """config.toml; None where there is no file. Raises OSError."""
    path = _config_path(directory)
    try:
        config = _read(path, limit)
    except FileNotFoundError:
        return None
    if len(config) > _CONFIG_BYTES_MAX:
        raise OSError(f"{path}: larger than {_CONFIG_BYTES_MAX >> 20} MiB")
    return config


def _parse(config: bytes, parse_float: "Callable[[str], Any]" = float) -> "dict[str, Any]":
    """The document in config.toml. Raises _Invalid."""
    import tomllib

    try:
        return tomllib.loads(config.decode(), parse_float=parse_float)
    except UnicodeDecodeError as error:
        raise _Invalid(f"not UTF-8, at byte {error.start}; allowed: TOML in UTF-8") from None
    except (ValueError, RecursionError) as error:
        bom = "a byte-order mark" if config.startswith(b"\xef\xbb\xbf") else _plain(error)
        raise _Invalid(f"not TOML: {bom}; allowed: TOML in UTF-8") from None


def _plain_table(config: bytes) -> "dict[str, Any] | None":
    """The `[telemetry]` of a config that holds its plainest settings and no more, as most do.

    None for any other: tomllib knows, but its import costs a seventh of a whole send.
    """
    table: dict[str, Any] | None = None
    for line in config.decode(errors="replace").replace("\r\n", "\n").split("\n"):
        key, _, value = (part.strip() for part in line.partition("="))
        inner = value[1:-1]
        if not (line.isascii() and line.isprintable()):
            return None
        if key.startswith("#") or not line.strip():
            continue
        if table is None and line.strip() == "[telemetry]":
            table = {}
        elif table is None or key in table:
            return None
        elif key == "enabled" and value in ("true", "false"):
            table[key] = value == "true"
        elif key == "timeout_ms" and value.isdigit() and value[0] != "0" and len(value) < 9:
            table[key] = int(value)
        elif key == "otlp_endpoint" and value == f'"{inner}"' and not {'"', "\\"} & set(inner):
            table[key] = inner
        else:
            return None
    return table


def _configured(directory: str, config: "bytes | None") -> TelemetryConfig:
    """The settings in a config. Raises _Invalid."""
    try:
        table = None if config is None else _plain_table(config)
        if config is not None and table is None:
            table = _parse(config).get("telemetry")
        return TelemetryConfig(table)
    except _Invalid as problem:
        raise _Invalid(f"{_config_path(directory)}: {problem}") from None


def _effective_url(tool: _Tool, override: "str | None", config: TelemetryConfig) -> str:
    """Where to send: the environment decides, else the file, else the tool. Raises _Off."""
    base, source = tool.endpoint, "the tool's own endpoint"
    if config.otlp_endpoint is not None:
        base, source = config.otlp_endpoint, "telemetry.otlp_endpoint"
    if override is not None:
        base, source = override, f"{tool.environment}_ENDPOINT"
    if not base:
        raise _Off(f"there is no endpoint to send to: {source} is empty")
    url = _metrics_url(base)
    if not url:
        raise _Invalid(f"{source} is {_shown(base)}; allowed: {_URL_ALLOWED}")
    return url


def _table(tool: _Tool, enabled: bool) -> str:
    """What a new config holds."""
    return (
        f"# Anonymous usage telemetry of {tool.service_name}; about it: {tool.prog} status\n"
        f"[telemetry]\nenabled = {str(enabled).lower()}\ntimeout_ms = {_TIMEOUT_MS}\n"
        f'# otlp_endpoint = "{tool.endpoint or "https://collector.example.com"}"\n'
    )


def _appended(config: str, table: str) -> bytes:
    """A config with a table at its end, in its own kind of lines."""
    newline = "\r\n" if "\r\n" in config else "\n"
    gap = newline if config.endswith("\n") else 2 * newline if config else ""
    return (config + gap + table.replace("\n", newline)).encode()


def _notice(tool: _Tool, url: str) -> str:
    return (
        f"{tool.service_name} counts which of its commands are run: the command's name, the\n"
        "version, a random ID; never arguments, paths or contents. This is said once.\n"
        f"  Sent to:      {url}\n"
        f"  Look inside:  {tool.prog} status\n"
        f"  Turn it off:  {tool.prog} disable\n"
        f"                or {tool.environment}=0, or DO_NOT_TRACK=1"
    )


def _introduce(call: _Call) -> bytes:
    """Make the missing file or table and say so, which one of many processes does.

    Returns the config. Raises OSError, _Off: where nobody can be told, nothing is sent.
    """
    if getattr(sys.stderr, "closed", True):  # None, where the descriptor was closed
        raise _Off("the first-run notice cannot be shown: stderr is closed")
    with _Lock(call.directory):
        found = _read_config(call.directory)
        if found is not None and _configured(call.directory, found).is_stored:
            return found
        config = _appended((found or b"").decode(), _table(call.tool, True))
        path = os.path.realpath(_config_path(call.directory))
        _write(path, config, is_new=found is None)
        if not _say(_notice(call.tool, call.url)):
            os.unlink(path) if found is None else _write(path, found, is_new=False)
            raise _Off("the first-run notice could not be written to stderr")
    return config


def _stored_fingerprint(directory: str) -> str:
    """The fingerprint on disk; "" where there is none that can be used."""
    try:
        stored = _read(f"{directory}/fingerprint", 128).decode().strip()
    except (OSError, ValueError):
        return ""
    return "" if len(stored) > 64 or stored.strip(_HEX_DIGITS) else stored


def _new_fingerprint() -> str:
    """SHA-256 over host, system and randomness that is not kept: there is no way back."""
    import hashlib
    import platform

    host = "\0".join((platform.node(), platform.system(), platform.machine()))
    return hashlib.sha256(host.encode(errors="replace") + os.urandom(32)).hexdigest()


def _kept_fingerprint(directory: str) -> str:
    """The fingerprint on disk, made where there is none. Raises OSError."""
    stored = _stored_fingerprint(directory)
    if not stored:
        with _Lock(directory):
            stored = _stored_fingerprint(directory)
            if not stored:
                stored = _new_fingerprint()
                _write(f"{directory}/fingerprint", stored.encode())
    return stored


def _read_cooldown(directory: str, url: str) -> "tuple[int, int, str]":
    """The last cool-down of this URL: seconds to go, its whole length, its reason."""
    try:
        text = _read(f"{directory}/cooldown", 4096).decode()
        until, length, target, reason = text.rstrip("\n").split(" ", 3)
        to_go, seconds = int(until) - int(time.time()), int(length)
    except (OSError, ValueError):
        return 0, 0, ""
    # More to go than the whole: it is from the future, or the clock was set back.
    if target != url or not 1 <= seconds <= _COOLDOWN_SECONDS_MAX or to_go > seconds:
        return 0, 0, ""
    return max(to_go, 0), seconds, _plain(reason)


def _start_cooldown(call: _Call, seconds: int = 0) -> None:
    """Spare the next commands the same wait, each time for twice as long."""
    to_go, last, _ = _read_cooldown(call.directory, call.url)
    if not call.url or (to_go and not seconds):  # begun by a process that ran beside this one
        return
    seconds = seconds or min(max(2 * last, _COOLDOWN_SECONDS), _COOLDOWN_SECONDS_MAX)
    text = f"{int(time.time()) + seconds} {seconds} {call.url} {call.text}\n"
    _shielded(_write, f"{call.directory}/cooldown", text.encode())


def _end_cooldown(directory: str) -> bool:
    """Whether there was one, running or not."""
    try:
        os.unlink(f"{directory}/cooldown")
    except OSError:
        return False
    return True


def _body(call: _Call, fingerprint: str, window: "tuple[int, int]") -> bytes:
    import json

    resource = {
        "service.name": call.tool.service_name,
        "service.version": call.tool.service_version,
        "user.fingerprint": fingerprint,
    }
    metric = CommandMetric(call.tool.metric_name, call.command, *window)
    return json.dumps(metric.encode(resource), separators=(",", ":")).encode()


def _request(call: _Call, config: TelemetryConfig, body: bytes) -> "urllib.request.Request":
    """The request, with each header that will be on the wire."""
    import urllib.request

    request = urllib.request.Request(call.url, data=body, method="POST")
    agent = f"trix-telemetry/{__version__}"
    headers = {"User-Agent": agent, "Accept-Encoding": "identity", **config.otlp_headers}
    headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    headers |= {"Host": request.host, "Connection": "close"}
    for name, value in headers.items():
        request.add_header(name, value)
    return request


def _rendered(request: "urllib.request.Request", config: TelemetryConfig) -> str:
    """The request as on the wire, but for the values of configured headers."""
    hidden = {name.lower() for name in config.otlp_headers}
    lines = [f"POST {request.selector} HTTP/1.1"]
    for name, value in request.header_items():
        lines.append(f"{name.title()}: {'(hidden)' if name.lower() in hidden else value}")
    body: bytes = request.data  # type: ignore[assignment]
    return "\n".join([*lines, "", body.decode()])


def _timed(kind: type, call: _Call) -> type:
    """A kind of socket of which every wait ends with the budget.

    A socket's own timeout is for one wait: a server that sends a byte a second outlives it.
    """

    class Timed(kind):  # type: ignore[misc]
        def do_handshake(self, *args: "Any") -> None:
            call.phase = "setting up TLS"
            self.settimeout(call.left())
            super().do_handshake(*args)

        def recv_into(self, *args: "Any") -> int:
            call.phase = "waiting for the answer"
            self.settimeout(call.left())
            count: int = super().recv_into(*args)
            call.received += count
            if call.received > _ANSWER_BYTES_MAX:
                raise OSError("the answer is too long")
            return count

    return Timed


def _dial(call: _Call, host: str, port: int) -> "socket.socket":
    """A connection to the first address of a host that takes one. Raises OSError."""
    import socket

    call.phase = f"looking up {host}"
    # Bytes, for a str goes through the idna codec, which takes 3 ms to import.
    name = host.encode() if host.isascii() else host
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    timed = _timed(socket.socket, call)
    for index, (family, kind, protocol, _, address) in enumerate(found):
        call.phase = f"connecting to {address[0]}"
        connection: socket.socket | None = None
        try:
            connection = timed(family, kind, protocol)
            connection.settimeout(call.left() / min(len(found) - index, _ADDRESS_SHARES))
            connection.connect(address)
            connection.settimeout(call.left())
            return connection
        except OSError as reason:
            error = reason
            if connection:
                connection.close()
    raise error


def _open(
    request: "urllib.request.Request", call: _Call, context: "ssl.SSLContext | None"
) -> "http.client.HTTPResponse":
    """Send, by an opener that knows no redirects and no other schemes. Raises OSError."""
    import http.client
    import urllib.request

    def connect(host: str, **options: "Any") -> http.client.HTTPConnection:
        if context:
            context.sslsocket_class = _timed(context.sslsocket_class, call)
            options["context"] = context
        made = (http.client.HTTPSConnection if context else http.client.HTTPConnection)(
            host, **options
        )
        # connect() stays as it is, with its proxy tunnel and TLS; only the dialling is ours.
        made._create_connection = lambda address, *_: _dial(call, *address)  # type: ignore[attr-defined]
        return made

    class Handler(urllib.request.AbstractHTTPHandler):
        def http_open(self, request: urllib.request.Request) -> "Any":
            if request.type != call.url.partition(":")[0]:
                raise OSError("a proxy of the environment is neither http nor none")
            return self.do_open(connect, request)

        https_open = http_open
        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler(urllib.request.getproxies_environment()))
    opener.add_handler(Handler(debuglevel=0))  # whatever the host has set
    response: http.client.HTTPResponse = opener.open(request, timeout=call.left())
    return response


def _tls_contexts() -> "Iterator[ssl.SSLContext]":
    """What to verify a server with, in turn: a hashed directory of authorities, of which OpenSSL
    reads the one that it needs; then the whole bundle, which takes 40 ms to parse."""
    import ssl

    paths = ssl.get_default_verify_paths()
    bundle = os.environ.get(paths.openssl_cafile_env)
    names = [] if bundle or not paths.capath else os.listdir(paths.capath)
    if any(name.endswith(".0") for name in names):
        yield ssl.create_default_context(capath=paths.capath)
    yield ssl.create_default_context()


def _partial_success(answer: bytes) -> "tuple[int, str]":
    """How many points were rejected, and the message: OTLP specification, "Partial Success"."""
    import json

    try:
        partial = json.loads(answer)["partialSuccess"]
        return int(partial.get("rejectedDataPoints", 0)), _plain(partial.get("errorMessage", ""))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return 0, ""  # nothing said, or in Protobuf


def _explained(error: Exception, call: _Call) -> str:
    """What failed, in plain words."""
    import http.client
    import socket

    hint = f"does the port speak {'http' if call.url.startswith('https') else 'https'}?"
    message = getattr(error, "verify_message", "")
    if isinstance(error, TimeoutError) or call.is_used_up():
        return call.timed_out()
    if isinstance(error, ConnectionRefusedError):
        return f"connection refused, {call.phase}"
    if isinstance(error, socket.gaierror):
        return f"unknown host, {call.phase}: {error.strerror}"
    if isinstance(error, ConnectionError):
        return f"connection closed, {call.phase}; {hint}"
    if isinstance(error, http.client.InvalidURL):
        return "a proxy of the environment is not a valid URL"
    if isinstance(error, http.client.HTTPException):
        return f"the answer is not HTTP, or too long; {hint}"
    if message:
        is_unknown = 18 <= getattr(error, "verify_code", 0) <= 21  # of X509_V_ERR_*
        gives = "; name the file of its authority in SSL_CERT_FILE" if is_unknown else ""
        return f"certificate not accepted: {_plain(message)}{gives}"
    if getattr(error, "library", "") == "SSL":
        return f"TLS failed, {call.phase}: {_plain(error)}; {hint}"
    # The text of a ValueError may show what it stumbled over, such as a proxy's password.
    text = _plain(error) if isinstance(error, OSError) else type(error).__name__
    return f"{text}, {call.phase}"


def _judge(response: "http.client.HTTPResponse", call: _Call) -> int:
    """OTLP specification, "OTLP/HTTP Response": of the statuses, 2xx alone is a success."""
    import http.client

    status = response.status
    call.text = f"HTTP {status} {call.took()}"
    call.outcome = "sent" if 200 <= status < 300 else "failed"
    try:
        is_read = call.is_by_hand or _debugs(call.tool)
        answer = response.read(_ANSWER_BYTES_MAX) if is_read else b""
    except (OSError, http.client.HTTPException):  # it comes late, or not whole
        answer = b""
    said = _plain(" ".join(answer.decode(errors="replace").split()))
    if call.outcome == "sent":
        rejected, said = _partial_success(answer)
        if rejected > 0:
            call.outcome = "failed"
            count = _plain(rejected, 20)
            said = f"the collector rejected {count} data point: {said or 'no reason given'}"
    elif 300 <= status < 400:
        where = _plain(response.getheader("Location", "nowhere"))
        said = f"redirect to {where}, which is not followed"
    call.text += f": {said}" if said else ""
    return _retry_after(response.getheader("Retry-After", "")) if status in (429, 503) else 0


def _send(call: _Call, config: TelemetryConfig, body: bytes) -> int:
    """Send, set the call's outcome and text, and return the seconds of a Retry-After."""
    import http.client

    contexts = _tls_contexts() if call.url.startswith("https:") else [None]
    for context in contexts:
        try:
            with _open(_request(call, config, body), call, context) as response:
                return _judge(response, call)
        except (OSError, http.client.HTTPException, ValueError) as error:
            wrapped = getattr(error, "reason", None)  # by urllib
            reason = wrapped if isinstance(wrapped, Exception) else error
            call.text = _explained(reason, call)
            if not hasattr(reason, "verify_message"):
                break
    call.outcome = "failed"  # not sooner: at exit it tells that the send has come to its end
    return 0


class OtlpClient:
    """The one handle of a process: its sends under way, the end of its last window, and where
    none can be stored, its fingerprint. There is no queue: a fifth send at once is dropped."""

    def __init__(self) -> None:
        import atexit
        import threading

        self.lock = threading.RLock()  # a signal handler may track, too
        self.importing = threading.RLock()
        self.is_ending = False
        self.calls: list[_Call] = []
        self.window_end = 0
        self.fingerprint = ""
        self.warned = False
        atexit.register(_at_exit)
        if sys.platform != "win32":
            done = self.importing.release
            os.register_at_fork(before=self.before_fork, after_in_parent=done, after_in_child=done)

    def start(self, call: _Call) -> "threading.Thread":
        """Raises _Off, and RuntimeError where threads cannot start."""
        import threading

        main = threading.main_thread()
        if threading.get_ident() == main.ident and not main.is_alive():
            raise _Off("the process is at its end")
        with self.lock:
            self.calls = [call for call in self.calls if call.thread.is_alive()]
            if len(self.calls) >= _SENDS_AT_ONCE:
                raise _Off(f"{_SENDS_AT_ONCE} sends are under way already")
            args = (self.run, call)
            call.thread = threading.Thread(None, _shielded, "telemetry", args, daemon=True)
            call.thread.start()
            self.calls.append(call)
        return call.thread

    def load(self, *names: str) -> None:
        """Import, but not while the process forks, and not after its end has begun.

        Whoever imports a module that a thread was importing when it vanished waits for ever: a
        forked child, or a destructor at the interpreter's shutdown.
        """
        for name in names:
            with self.importing:
                if self.is_ending:
                    raise _Off("the process is at its end")
                try:
                    __import__(name)
                except ImportError:  # whoever cannot do without it will say so
                    pass

    def before_fork(self) -> None:
        """Python 3.12 warns of forking beside a thread; of ours alone, it need not."""
        import threading
        import warnings

        self.importing.acquire()
        ours = [call for call in self.calls if call.thread.is_alive()]
        if ours and threading.active_count() == len(ours) + 1:
            warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)

    def run(self, call: _Call) -> None:
        """What the thread does."""
        time.sleep(0.001)  # the caller has the interpreter back; else it would wait for 5 ms
        try:
            self.load("signal")
            if sys.platform != "win32":
                import signal

                # Where the host has it end the process, a server could do that, too.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
            self.deliver(call)
        except (_Off, OSError, ImportError) as reason:
            if isinstance(reason, _Invalid):
                self.warn(reason)
            call.outcome, call.text = "off", _one_line(reason)
        _debug(call.tool, f"{call.outcome}: {call.text}")

    def deliver(self, call: _Call) -> None:
        """From the config to the answer. Raises _Off, OSError: nothing was sent."""
        self.load("urllib.parse")
        if not _stored_fingerprint(call.directory):  # it may be the first run
            self.load("hashlib", "platform", "fcntl")
        config = self.configure(call)
        to_go, _, reason = _read_cooldown(call.directory, call.url)
        if to_go and not call.is_by_hand:
            raise _Off(f"cooling down for {to_go} s: {reason}")
        self.load("json")
        body = _body(call, self.identify(call.directory), self.window(call.started))
        self.load("socket", "email.parser", "ssl", "http.client", "tempfile", "urllib.request")
        if call.url.startswith("https:"):
            self.load("encodings.idna")
        if _debugs(call.tool):
            _debug(call.tool, _rendered(_request(call, config, body), config))
        retry_after = _send(call, config, body)
        if call.outcome == "sent":
            _end_cooldown(call.directory)
        elif not call.is_given_up and (retry_after or call.is_used_up()):
            _start_cooldown(call, retry_after)

    def configure(self, call: _Call) -> TelemetryConfig:
        """The settings; the budget and the URL go to the call. Raises _Off, OSError."""
        if call.config and len(call.config) == _HEAD_BYTES:
            call.config = _read_config(call.directory)
        if call.config is not None and _plain_table(call.config) is None:
            self.load("tomllib")
        config = _configured(call.directory, call.config)
        if not config.enabled:
            _refuse(call.directory)
        call.deadline = call.began + config.timeout_ms / 1000
        call.url = _effective_url(call.tool, call.endpoint, config)
        if config.is_stored:
            return config
        call.config = _introduce(call)
        return self.configure(call)

    def identify(self, directory: str) -> str:
        """The fingerprint: the one on disk, or where none can be stored, one of this process."""
        try:
            if directory:
                return _kept_fingerprint(directory)
        except OSError:
            pass
        with self.lock:
            self.fingerprint = self.fingerprint or _new_fingerprint()
            return self.fingerprint

    def window(self, started: int) -> "tuple[int, int]":
        """The start and end of a point, after all those before it: Unix nanoseconds."""
        with self.lock:
            start = max(started, self.window_end)
            self.window_end = max(time.time_ns(), start + _WINDOW_NS)
            return start, self.window_end

    def warn(self, problem: _Invalid) -> None:
        """Once, and where nobody set logging up, not at all."""
        logging = sys.modules.get("logging")
        if logging and not self.warned:
            self.warned = True
            logger = logging.getLogger(_module_name())
            logger.addHandler(logging.NullHandler())  # or else it goes to stderr
            logger.warning("telemetry is off: %s", problem)

    def wait(self) -> None:
        """Until each send has come to its end, or to that of its budget."""
        alive = [call for call in self.calls if call.thread.is_alive()]
        if alive and sys.stdout:
            _shielded(sys.stdout.flush)  # who reads from a pipe need not wait, too
        for call in alive:
            while call.thread.is_alive() and (left := call.deadline - time.monotonic()) > 0:
                call.thread.join(min(left, _POLL_SECONDS))
            if call.outcome:
                call.thread.join(_POLL_SECONDS)  # it is about to end, perhaps with a cool-down
            elif call.thread.is_alive():
                call.is_given_up = True
                call.outcome, call.text = "failed", call.timed_out()
                _start_cooldown(call)
                _debug(call.tool, f"{call.outcome}: {call.text}")


_clients: "dict[int, OtlpClient]" = {}  # by process id: a forked child makes its own


def _client() -> OtlpClient:
    pid = os.getpid()
    return _clients.get(pid) or _clients.setdefault(pid, OtlpClient())


def _at_exit() -> None:
    client = _clients.get(os.getpid())
    try:
        if client:
            _shielded(client.wait)
            client.is_ending = True
            if client.importing.acquire(timeout=0.1):  # the import under way is done
                client.importing.release()
    except (KeyboardInterrupt, SystemExit):  # a signal: the wait is over
        pass


def _prepare(tool: _Tool, name: object, endpoint: "str | None" = None) -> _Call:
    """What must be seen at the call, and no more. Raises _Off, OSError."""
    call = _Call(tool, name, endpoint)
    if not _is_command(name, tool.commands):
        raise _Off("what was given is not the name of a command")
    _check_switches(tool)
    call.directory = _state_directory(tool)
    call.config = _read_config(call.directory, _HEAD_BYTES)
    head = call.config or b""
    if _says_off(head):
        _refuse(call.directory)
    in_file = b"endpoint" in head or b"\\" in head or len(head) == _HEAD_BYTES
    if not (tool.endpoint or in_file if call.endpoint is None else call.endpoint):
        raise _Off("there is no endpoint to send to")
    return call


def _track(name: object) -> "threading.Thread | None":
    if sys.is_finalizing():  # where no thread starts, and no import comes to its end
        return None
    tool = _tool or _Tool()
    try:
        call = _prepare(tool, name)
        return _client().start(call)
    except (_Off, OSError) as reason:
        _debug(tool, f"off: {_one_line(reason)}")
        return None


def track_command_execution(name: str) -> "threading.Thread | None":
    """Count one run of the command `name`, which is `[A-Za-z][A-Za-z0-9_-]{0,63}`.

    Returns the daemon thread that carries it, None where nothing will be sent. Raises nothing,
    prints nothing but the first run's notice. At exit the process waits for what is left of
    `timeout_ms`, and no longer.
    """
    return _shielded(_track, name)


def initialize_telemetry(
    *,
    service_name: "str | None" = None,
    service_version: "str | None" = None,
    endpoint: "str | None" = None,
    metric_name: "str | None" = None,
    directory: "str | os.PathLike[str] | None" = None,
    environment: "str | None" = None,
    prog: "str | None" = None,
    commands: "Iterable[str] | None" = None,
) -> None:
    """Say which tool this is; what is not given stays as in the constants, which explain each.

    Opens nothing and raises nothing. A value of the wrong type turns telemetry off, and
    `status` tells which. The last call before a track decides.
    """
    global _tool
    _tool = _Tool(**locals())


def _user_fingerprint() -> str:
    tool, directory = _tool or _Tool(), ""
    try:
        _check_switches(tool)
        path = _state_directory(tool)
        directory = path if _configured(path, _read_config(path)).enabled else ""
    except (_Off, OSError, ValueError):
        pass
    return _client().identify(directory)


def get_user_fingerprint() -> str:
    """The anonymous fingerprint: 64 lower-case hex digits (1 to 64, if another tool made it).

    Made and stored where there is none. Where telemetry is off, or it cannot be stored, one
    that serves this process alone. Raises nothing.
    """
    return _shielded(_user_fingerprint) or ""


# The command line: from here on, nothing runs inside a host tool.


def _check_writable(directory: str) -> None:
    """Raises _Off where the first run could not make the config."""
    while not os.path.exists(directory):
        directory = os.path.dirname(directory)
    if not os.access(directory, os.W_OK) or not os.path.isdir(directory):
        raise _Off(f"{directory} cannot be written to, so that no choice could be kept")


def _stored(directory: str) -> "tuple[str, TelemetryConfig, Exception | None]":
    """What config.toml holds: on, off, none, invalid or unreadable; its settings; and why
    nothing is sent by them."""
    stored, config = "unreadable", TelemetryConfig(None)
    try:
        found = _read_config(directory) if directory else None
        stored = "invalid"
        config = _configured(directory, found)
        stored = ("on" if config.enabled else "off") if config.is_stored else "none"
        if stored == "none":
            _check_writable(directory or "/")
        if stored == "off":
            _refuse(directory)
    except (_Off, OSError, ImportError) as problem:
        return stored, config, problem
    return stored, config, None


def _proxy(url: str) -> str:
    """Which proxy of the environment stands between, without its user info, or ""."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies_environment, proxy_bypass

    proxies = getproxies_environment()
    proxy = proxies.get(url.partition(":")[0], "")
    return "" if proxy and proxy_bypass(urlsplit(url).netloc) else _plain(proxy.rpartition("@")[2])


def _facts(tool: _Tool) -> "dict[str, Any]":
    """What `status` tells, by the keys of its JSON."""
    problems: list[Exception] = []

    def attempt(step: "Callable[..., Any]", *args: object) -> "Any":
        try:
            return step(*args)
        except (_Off, ImportError) as problem:
            problems.append(problem)

    attempt(_check_switches, tool)
    directory = attempt(_state_directory, tool) or ""
    stored, config, problem = _stored(directory)
    if problem:
        problems.append(problem)
    override = os.environ.get(f"{tool.environment}_ENDPOINT")
    url = attempt(_effective_url, tool, override, config) or ""
    to_go, _, reason = _read_cooldown(directory, url) if directory else (0, 0, "")
    why = f"{_config_path(directory)} says so" if stored == "on" else "it is the default"
    return {
        "state": "off" if problems else "on",
        "reason": _one_line(problems[0]) if problems else _plain(why, 1000),
        "invalid": [_one_line(p) for p in problems if isinstance(p, _Invalid)],
        "stored": stored,
        "endpoint": url or None,
        "encrypted": url.startswith("https:") if url else None,
        "proxy": _proxy(url) or None,
        "timeout_ms": config.timeout_ms,
        "headers": sorted(config.otlp_headers),
        "fingerprint": (_stored_fingerprint(directory) if directory else "") or None,
        "cooldown_seconds": to_go,
        "cooldown_reason": reason if to_go else None,
        "directory": directory or None,
        "config": _config_path(directory) if directory else None,
        "version": __version__,
    }


def _run_status(tool: _Tool, options: "argparse.Namespace") -> int:
    from json import dumps
    from urllib.parse import urlsplit

    facts = _facts(tool)
    if options.json:
        print(dumps(facts, indent=2))
        return 1 if facts["invalid"] else 0
    host = urlsplit(facts["endpoint"] or "").hostname or "localhost"
    is_loopback = host.startswith("127.") and host.replace(".", "").isdigit()
    is_local = is_loopback or host in ("localhost", "::1")
    in_clear = facts["encrypted"] is False and not is_local
    end = time.strftime("%H:%M:%S", time.localtime(time.time() + facts["cooldown_seconds"]))
    cooling = f"until {end} ({facts['cooldown_seconds']} s): {facts['cooldown_reason']}"
    others = [problem for problem in facts["invalid"] if problem != facts["reason"]]
    rows = {
        "because": facts["reason"],
        "invalid": "; ".join(others),
        "stored": facts["stored"].replace("none", "nothing yet"),
        "endpoint": facts["endpoint"] or "none",
        "note": "http is not encrypted; anybody on the way can read along" if in_clear else "",
        "proxy": facts["proxy"],
        "headers": ", ".join(facts["headers"]),
        "timeout": f"{facts['timeout_ms']} ms",
        "fingerprint": facts["fingerprint"] or "none yet",
        "cool-down": cooling if facts["cooldown_seconds"] else "none",
        "config": facts["config"] or "none",
        "change it": f"{tool.prog} enable | disable",
        "look inside": f"{tool.prog} preview",
    }
    print(f"Telemetry: {facts['state'].upper()}")
    for name, text in rows.items():
        if text:
            print(f"  {name:<13}{_plain(text, 1000)}")
    return 1 if facts["invalid"] else 0


def _span_of_enabled(text: str) -> "tuple[int, int]":
    """Where the value of telemetry.enabled stands. Raises _Invalid.

    A comment, a string or another table may hold the same text; so each value that it could be
    is given a number of its own, and one parse tells which of the numbers came to stand there.
    """
    import re

    # A bare word in place of a bare word: whatever it stands in, it stays well-formed.
    matches = list(re.finditer(r"""enabled["']?[ \t]*=[ \t]*(true|false)""", text))
    numbered, end = "", 0
    for number, match in enumerate(matches):
        numbered += f"{text[end : match.start(1)]}{number}"
        end = match.end(1)
    found = _parse(f"{numbered}{text[end:]}".encode())["telemetry"]["enabled"]
    return matches[found].span(1) if type(found) is int else (0, 0)


def _candidates(text: str, has_key: bool, value: str) -> "Iterator[bytes]":
    """Edits one of which should be the right one; a parser will tell."""
    import re

    newline = "\r\n" if "\r\n" in text else "\n"
    name = r"""(?:telemetry|"telemetry"|'telemetry')[ \t]*"""
    if has_key:
        start, end = _span_of_enabled(text)
        yield f"{text[:start]}{value}{text[end:]}".encode()
        return
    yield _appended(text, f"[telemetry]\nenabled = {value}\n")
    for header in re.finditer(rf"(?m)^[ \t]*\[[ \t]*{name}\].*\n?", text):
        gap = "" if header[0].endswith("\n") else newline
        line = f"{gap}enabled = {value}{newline}"
        yield f"{text[: header.end()]}{line}{text[header.end() :]}".encode()
    for inline in re.finditer(rf"{name}=[ \t]*\{{[ \t]*(\}}?)", text):
        at, comma = inline.start(1), "" if inline[1] else ", "
        yield f"{text[:at]}enabled = {value}{comma}{text[at:]}".encode()
    for dotted in re.finditer(rf"(?m)^[ \t]*{name}\.", text):
        at = dotted.start()
        yield f"{text[:at]}telemetry.enabled = {value}{newline}{text[at:]}".encode()


def _edited(found: "bytes | None", tool: _Tool, enabled: bool) -> bytes:
    """The config with telemetry.enabled set, and every other byte kept. Raises _Off."""
    from itertools import islice

    if found is None:
        return _table(tool, enabled).encode()
    before = _parse(found, str)  # floats as text, since nan is not equal to itself
    table = before.get("telemetry", {})
    if not isinstance(table, dict):
        raise _bad("", table, "a table")
    if "telemetry" in before and table.get("enabled", True) is enabled:
        return found
    if type(table.get("enabled", True)) is not bool:
        raise _bad(".enabled", table["enabled"], "true or false")
    value = str(enabled).lower()
    wanted = {**before, "telemetry": {**table, "enabled": enabled}}
    for config in islice(_candidates(found.decode(), "enabled" in table, value), 64):
        try:
            if _parse(config, str) == wanted:
                return config
        except (_Invalid, RecursionError):
            continue
    raise _Off(f"too unusual to be edited; write `enabled = {value}` into [telemetry] by hand")


def _run_enable(tool: _Tool, options: "argparse.Namespace") -> int:
    """Change the one value. Raises _Off, OSError: the file is then untouched."""
    enabled: bool = options.enabled
    directory = _state_directory(tool)
    path = os.path.realpath(_config_path(directory))
    with _Lock(directory):
        try:
            found = _read_config(directory)
            config = _edited(found, tool, enabled)
            if config != found:
                _write(path, config, is_new=found is None)
        except (_Off, OSError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise _Off(f"{path}: {reason}; nothing was changed") from None
    print(f"Telemetry is {'on' if enabled else 'off'} in {_plain(path, 1000)}")
    if enabled and _end_cooldown(directory):
        print("The cool-down was ended.")
    try:
        _check_switches(tool)
        facts = _facts(tool)
        if enabled and facts["state"] == "off":
            print(f"Nothing is sent all the same: {facts['reason']}")
    except _Off as why:
        print(f"{why}: so it is off, whatever the file says.")
    return 0


def _check_command(tool: _Tool, name: str) -> None:
    if not _is_command(name, None):
        raise _Off(f"{_shown(name)} is not a command name; it would be dropped")
    if not _is_command(name, tool.commands):
        raise _Off(f"{name} is not among the tool's commands; it would be dropped")


def _run_preview(tool: _Tool, options: "argparse.Namespace") -> int:
    _check_command(tool, options.command)
    facts = _facts(tool)
    call = _Call(tool, options.command)
    call.url = facts["endpoint"] or "http://no-endpoint/v1/metrics"
    _, config, _ = _stored(facts["directory"] or "")
    fingerprint = facts["fingerprint"] or 64 * "0"
    body = _body(call, fingerprint, _client().window(call.started))
    print(_rendered(_request(call, config, body), config))
    if facts["state"] == "off":
        _say(f"It is not sent, telemetry is off: {facts['reason']}")
    if not facts["fingerprint"]:
        _say("The fingerprint is yet to be made, by the first send.")
    if facts["proxy"]:
        _say(f"It goes through a proxy of the environment, {facts['proxy']}, and says so to it.")
    return 0


def _issuer(call: _Call) -> str:
    """Which authority signed a certificate that was not accepted, for whoever looks for it."""
    import re
    import ssl
    from urllib.parse import urlsplit

    if not call.text.startswith("certificate") or _proxy(call.url):
        return ""
    server = urlsplit(call.url)
    try:
        address = (server.hostname or "", server.port or 443)
        certificate = ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(address, timeout=1))
    except (OSError, ValueError):
        return ""
    # X.520 commonName, before the times of validity: RFC 5280, section 4.1.
    found = re.search(rb"^.*?\x06\x03\x55\x04\x03.(.)", certificate, re.S)
    if not found or re.search(rb"\x17\x0d|\x18\x0f", found[0]):
        return ""
    name = certificate[found.end() : found.end() + found[1][0]]
    return f"; it is signed by {_plain(name.decode(errors='replace'))}"


def _run_track(tool: _Tool, options: "argparse.Namespace") -> int:
    if options.endpoint is not None and not _metrics_url(options.endpoint):
        raise _Invalid(f"--endpoint is {_shown(options.endpoint)}; allowed: {_URL_ALLOWED}")
    _check_command(tool, options.command)
    try:
        call = _prepare(tool, options.command, options.endpoint)
        call.is_by_hand = True
        _client().start(call)
        _client().wait()
    except (_Off, OSError, RuntimeError) as reason:
        print(f"Not sent, telemetry is off: {_one_line(reason)}")
        return 0
    if call.outcome == "off":
        print(f"Not sent, telemetry is off: {call.text}")
    elif call.outcome == "sent":
        print(f"Sent to {call.url}: {call.text}")
    else:
        raise _Off(f"{call.url}: {call.text or call.phase}{_issuer(call)}")
    return 0


def _run_reset(tool: _Tool, options: "argparse.Namespace") -> int:
    path = f"{_state_directory(tool)}/fingerprint"
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        print(f"There is none: {_plain(path, 1000)}")
    else:
        print(f"Forgotten: {_plain(path, 1000)}")
    return 0


class _Selftest:
    """Steps, most of them a fresh process that ends right after its call, as a tool's would."""

    program = (
        "import importlib, json, sys\n"
        "name, sys.path[:], given = json.loads(sys.argv[1])\n"
        "module = importlib.import_module(name)\n"
        "module.initialize_telemetry(**given)\n"
        "module.track_command_execution('selftest')\n"
    )

    def __init__(self, tool: _Tool, home: str, url: str, bodies: "list[bytes]") -> None:
        import json

        self.tool, self.bodies, self.state, self.said = tool, bodies, f"{home}/state", ""
        self.notice = _notice(tool, f"{url}/v1/metrics")
        names = ("service_name", "service_version", "metric_name", "environment", "prog")
        given = {"endpoint": url, "directory": self.state}
        given |= {name: getattr(tool, name) for name in names}
        here = [] if __package__ else [os.path.dirname(os.path.abspath(__file__))]
        argument = json.dumps([_module_name(), [*here, *sys.path], given])
        self.command = [sys.executable, "-B", "-c", self.program, argument]
        others = ("DO_NOT_TRACK", tool.environment, "PYTHON")  # but for where modules are
        env = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
        env = {k: v for k, v in env.items() if not k.startswith(others) or k == "PYTHONPATH"}
        self.env = env | {"HOME": home}

    def passes(self) -> bool:
        off = {self.tool.environment: "0"}
        passed = [
            self.step("first run: notice, delivery", lambda: self.delivers(1, self.notice)),
            self.step("config: made and valid", lambda: _stored(self.state)[0] == "on"),
            self.step("fingerprint: 64 hex digits", lambda: len(self.fingerprint()) == 64),
            self.step("payload: as specified, to the byte", self.is_expected),
            self.step("second run: silent delivery", lambda: self.delivers(2)),
            self.step("off: DO_NOT_TRACK=1", lambda: self.delivers(2, DO_NOT_TRACK="1")),
            self.step(f"off: {self.tool.environment}=0", lambda: self.delivers(2, **off)),
            self.step("off: enabled = false", self.is_disabled),
        ]
        print(*(body.decode() for body in self.bodies[:1]))
        return all(passed)

    def step(self, name: str, check: "Callable[[], bool]") -> bool:
        began = time.perf_counter()
        passed = bool(_shielded(check))
        took = (time.perf_counter() - began) * 1000
        print(f"{'ok' if passed else 'FAILED':<8}{name:<44}{took:8.1f} ms")
        if not passed and self.said:
            print(f"        {_plain(self.said.splitlines()[-1])}")
        return passed

    def delivers(self, count: int, expected: str = "", **variables: str) -> bool:
        import subprocess

        env = self.env | variables
        done = subprocess.run(self.command, env=env, capture_output=True, check=False)
        self.said = done.stderr.decode(errors="replace").strip()
        return (done.returncode, self.said, len(self.bodies)) == (0, expected, count)

    def fingerprint(self) -> str:
        return _stored_fingerprint(self.state)

    def is_expected(self) -> bool:
        import re

        expected = _body(_Call(self.tool, "selftest"), self.fingerprint(), (0, 0))
        first, second = (re.sub(rb'Nano":"\d+', b"", b) for b in (expected, self.bodies[0]))
        return first == second

    def is_disabled(self) -> bool:
        _write(_config_path(self.state), _table(self.tool, False).encode())
        return self.delivers(2)


def _run_selftest(tool: _Tool, options: "argparse.Namespace") -> int:
    import tempfile
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    if getattr(sys, "frozen", False) or not sys.executable:
        raise _Off("selftest has to start Python, and this program brings none that it could start")
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with tempfile.TemporaryDirectory() as home:
            url = f"http://127.0.0.1:{server.server_port}"
            passed = _Selftest(tool, home, url, bodies).passes()
        server.shutdown()
    print("All passed." if passed else "FAILED.")
    return 0 if passed else 1


def _parser(tool: _Tool) -> "argparse.ArgumentParser":
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> "NoReturn":
            self.exit(2, f"{tool.label()}: error: {_plain(message, 1000)}\n")

    parser = Parser(prog=tool.prog, description="Look inside usage telemetry, and decide.")
    parser.add_argument("--version", action="version", version=f"{tool.label()} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(run: "Callable[..., int]", name: str, *alias: str, text: str) -> "Any":
        command = commands.add_parser(name, aliases=alias, help=text, description=text)
        command.set_defaults(run=run)
        return command

    status = add(_run_status, "status", text="tell whether it is on, why, and where to")
    status.add_argument("--json", action="store_true", help="the same facts as JSON")
    enable = add(_run_enable, "enable", "on", text="turn it on in config.toml")
    enable.set_defaults(enabled=True)
    disable = add(_run_enable, "disable", "off", text="turn it off in config.toml")
    disable.set_defaults(enabled=False)
    preview = add(_run_preview, "preview", text="show the exact request; send nothing")
    preview.add_argument(
        "command", metavar="COMMAND", nargs="?", default=min(tool.commands or ["build"])
    )
    track = add(_run_track, "track", text="send one data point, wait, and tell what came of it")
    track.add_argument("command", metavar="COMMAND")
    track.add_argument("--endpoint", metavar="URL", help="send it there")
    add(_run_reset, "reset", text="forget the fingerprint")
    add(
        _run_selftest, "selftest", text="try all of it on this machine, with a collector of its own"
    )
    return parser


def _run(tool: _Tool, argv: "list[str] | None") -> int:
    try:
        options = _parser(tool).parse_args(argv)
        return int(options.run(tool, options))
    except SystemExit as stop:  # of argparse: --help, --version, a wrong usage
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        raise
    except (_Off, OSError, ImportError) as error:
        _say(f"{tool.label()}: error: {_one_line(error)}")
        return 1


def main(argv: "list[str] | None" = None, prog: "str | None" = None) -> int:
    """The command line, also hung under a tool's own command: `main(args, prog="acme telemetry")`.

    Returns the exit code: 0, 1 for an error or an invalid config, 2 for a wrong usage.
    """
    tool = _tool or _Tool()
    if prog:
        tool.prog = prog
    if hasattr(sys.stdout, "reconfigure"):  # not every terminal has all characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(tool, argv)
        if sys.stdout:
            sys.stdout.flush()
        return code
    except OSError as error:  # nobody reads on, as with `| head -0`, or a disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where what is left goes at exit
        if not isinstance(error, BrokenPipeError):
            _say(f"{tool.label()}: error: {_one_line(error)}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
