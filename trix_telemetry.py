# SPDX-License-Identifier: Apache-2.0
"""Anonymous usage telemetry for a command-line tool, in one file to copy.

    import trix_telemetry
    trix_telemetry.track_command_execution("build")

For each command that a person runs, one OTLP/HTTP JSON data point is sent: the name of the
command, the name and version of the tool, two timestamps and a random fingerprint.
Never sent: arguments, paths, file contents, environment variables, user or host names.

Turn it off: DO_NOT_TRACK=1, TRIX_TELEMETRY=0, or `python -m trix_telemetry disable`.
Look at it: TRIX_TELEMETRY_DEBUG=1 shows what a command would send, and sends nothing.
Vendor it: copy this file under any name, for Python 3.11 or newer. Then call
initialize_telemetry(), or edit the values of `Settings`. Nothing else needs editing.

The path of a data point:

    track_command_execution()   the call, in a thread of the host
      start_delivery()          check settings, opt-out and config.toml, which the first run creates
    Delivery.run()              a daemon thread
      prepare()                 import, parse the config, choose the endpoint, encode
      send()                    one POST
    close_session()             at exit: wait for what is under way, not past its deadline

Each section uses those above it; a delivery and its session also use each other. So the call stands
near the end, and the command line is last. Modules are imported where they are used: a tool whose
telemetry is off imports no more than the four below.
"""

import os
import stat
import sys
import time

# As typing has it, which takes 7 ms to import. Names from below stand in quotes.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import io
    import socket
    import ssl
    import threading
    import urllib.request
    from collections.abc import Callable, Collection, Iterator
    from http.client import HTTPResponse
    from typing import Any

__version__ = "3.0.0"
__all__ = [
    "get_user_fingerprint",
    "initialize_telemetry",
    "main",
    "track_command_execution",
]


# Settings: what the tool says of itself, and the limits


def find_module_name() -> str:
    """Return the name for `python -m`; "" where this was loaded from memory."""
    spec = globals().get("__spec__")
    if spec is not None:
        return str(spec.name)
    path = globals().get("__file__") or ""
    return os.path.splitext(os.path.basename(path))[0]


MODULE = find_module_name()


class Settings:
    """What the tool says of itself: edit these values, or call initialize_telemetry()."""

    service_name = "trix-cli"
    service_version = "0.19.3"
    # The OTLP/HTTP base URL of the tool's own collector. Empty: there is none.
    endpoint = ""
    metric_name = "trix_command_invocation"
    # Where config.toml, fingerprint and backoff are kept.
    directory = "~/.tx3/trix"
    # A variable, and the prefix of two more: _ENDPOINT and _DEBUG.
    environment = "TRIX_TELEMETRY"
    # How a person reaches main(), such as "acme telemetry". Empty: texts name no command.
    prog = f"python -m {MODULE}" if MODULE else ""
    # The names that may be counted. None: any name of the right form.
    commands: "Collection[str] | None" = None
    # Sent to the tool's own endpoint only, such as an ingest token.
    headers: "dict[str, str] | None" = None
    # Where to read more, shown in the notice and in `status`.
    docs_url = ""
    # Whether telemetry is off until a person runs `enable`.
    opt_in = False


# What the first run writes. A config that is still the same needs no parser, which costs 7 ms.
NEW_CONFIG = b"""\
[telemetry]
enabled = true
timeout_ms = 2000
# otlp_endpoint = "https://collector.example.com"

# [telemetry.otlp_headers]
"""
DEFAULT_TIMEOUT_MS = 2000
MAX_TIMEOUT_MS = 60_000
# A host that calls in a loop does not pile up threads.
MAX_DELIVERIES = 4
BACKOFF_SECONDS = 600
# OTLP metrics data model, "Resets and Gaps": at least one whole millisecond, for stores that keep
# milliseconds.
MIN_INTERVAL_NS = 1_000_000
# An import that takes longer is stuck: neither a fork nor the end of the process waits for it.
MAX_IMPORT_SECONDS = 0.5
# Windows takes no Ctrl-C while a thread waits, so a long wait is made of short ones.
WAIT_SECONDS = 0.05
MAX_CONFIG_BYTES = 1 << 20
# At most this much of a response is read. An unread one would reset the collector's connection.
MAX_BODY_BYTES = 4096

# A variable that is empty says nothing, so both hold "".
FALSE_WORDS = ("", "0", "false", "no", "off")
TRUE_WORDS = ("", "1", "true", "yes", "on")
HEX_DIGITS = "0123456789abcdefABCDEF"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# RFC 3986: what a URL is written with, without the "?" and "#" that begin a query and a fragment.
URL_CHARACTERS = r"[A-Za-z0-9._~!$&'()*+,;=:@%/\[\]-]+"
# A host name or an IPv6 address, and a port; no user info.
AUTHORITY = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?"
# RFC 9110, section 5: the name and the value of a header.
HEADER_NAME = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
HEADER_VALUE = r"[\t -~\xa0-\xff]*"
RESERVED_HEADERS = (
    "connection",
    "content-length",
    "content-type",
    "host",
    "transfer-encoding",
    "user-agent",
)


# Errors: their types, and their text for a person


class NotSent(Exception):
    """Nothing is sent, and why."""


class InvalidSetting(NotSent):
    """A setting is invalid: its name and what is allowed, never its value."""


class CommandError(Exception):
    """A command of the command line failed, and why."""


def describe_tool(settings: Settings) -> str:
    """Return the name of the tool, also where it is not valid."""
    name = settings.service_name
    return make_printable(name if isinstance(name, str) else type(name).__name__)


def describe_error(error: Exception) -> str:
    """Return in one line what went wrong."""
    if isinstance(error, ImportError):
        return f"this Python has no module {error.name}"
    if isinstance(error, (NotSent, CommandError, OSError)):
        return make_printable(str(error))
    return make_printable(f"{type(error).__name__}: {error}")


def make_printable(text: str) -> str:
    """Return foreign text as one line of at most 1000 characters, none a control character."""
    return "".join(c if c.isprintable() else "?" for c in text.strip()[:1000])


# Checks: which values may be used; nothing outside this process is read or changed


def check_settings(settings: Settings) -> None:
    """Raise InvalidSetting where a value of the vendor's cannot be used."""
    required = ("service_name", "metric_name", "environment")
    for name in (*required, "service_version", "endpoint", "prog", "docs_url"):
        value = getattr(settings, name)
        is_line = isinstance(value, str) and value.isprintable()
        if not is_line or (name in required and value == ""):
            raise InvalidSetting(f"{name} of the tool must be one line of text")
    if not isinstance(settings.directory, str) or "\0" in settings.directory:
        raise InvalidSetting("directory of the tool must be a path")
    if settings.commands is not None and not is_collection_of_names(settings.commands):
        raise InvalidSetting("commands of the tool must be a collection of names")
    if settings.headers is not None:
        check_headers(settings.headers, "headers of the tool")
    if not isinstance(settings.opt_in, bool):
        raise InvalidSetting("opt_in of the tool must be True or False")


def is_collection_of_names(commands: "Any") -> bool:
    # A generator has no __contains__: it would be empty after the first look.
    if isinstance(commands, str) or not hasattr(commands, "__contains__"):
        return False
    return all(isinstance(name, str) for name in commands)


def check_command(name: "Any", commands: "Collection[str] | None") -> None:
    """Raise NotSent for what is not `[A-Za-z][A-Za-z0-9_-]{0,63}`, or not among the commands."""
    if not is_command_name(name):
        raise NotSent("a command name is a letter and up to 63 letters, digits, - or _")
    if commands is not None and name not in commands:
        raise NotSent(f"{name} is not among the tool's commands")


def is_command_name(name: "Any") -> bool:
    # By hand, for the host may not have imported re.
    if not isinstance(name, str) or not name.isascii() or len(name) > 64:
        return False
    letters = name.replace("-", "").replace("_", "")
    return name[:1].isalpha() and letters.isalnum()


def parse_endpoint(base: "Any", source: str) -> str:
    """Return the URL for metrics: OTLP specification, "OTLP/HTTP Request". Raise InvalidSetting."""
    import re
    from urllib.parse import urlsplit

    allowed = "an http or https base URL with a host, without user info, query or fragment"
    error = InvalidSetting(f"{source} must be {allowed}")
    if not isinstance(base, str) or not re.fullmatch(URL_CHARACTERS, base):
        raise error
    try:
        parts = urlsplit(base)
        port = parts.port
    except ValueError:
        raise error from None
    if parts.scheme not in ("http", "https") or port == 0:
        raise error
    if not re.fullmatch(AUTHORITY, parts.netloc):
        raise error
    path = parts.path.rstrip("/").removesuffix("/v1/metrics")
    return f"{parts.scheme}://{parts.netloc}{path}/v1/metrics"


def check_headers(headers: "Any", source: str) -> None:
    """Raise InvalidSetting for what is not a table of strings."""
    if not isinstance(headers, dict):
        raise InvalidSetting(f"{source} must be a table of strings")
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidSetting(f"{source} must be a table of strings")


def select_headers(headers: "dict[str, str]") -> "dict[str, str]":
    """Return the headers that HTTP can carry and that replace none which the request needs.

    A mistyped header is no reason to be off.
    """
    import re

    selected = {}
    for name, value in headers.items():
        is_valid = re.fullmatch(HEADER_NAME, name) and re.fullmatch(HEADER_VALUE, value)
        if is_valid and name.lower() not in RESERVED_HEADERS:
            selected[name] = value
    return selected


# The config: what config.toml says


def check_table(table: "Any") -> None:
    """Raise InvalidSetting for what is not a table whose `enabled`, if there is one, is a bool."""
    if not isinstance(table, dict):
        raise InvalidSetting("telemetry must be a table")
    if not isinstance(table.get("enabled", True), bool):
        raise InvalidSetting("telemetry.enabled must be true or false")


class TelemetryConfig:
    """The `[telemetry]` table of config.toml, checked; raises InvalidSetting.

    `timeout_ms` is in milliseconds, 1 to 60000. `enabled` and `otlp_endpoint` are None where they
    are missing.
    """

    def __init__(self, table: "Any") -> None:
        check_table(table)
        self.enabled: bool | None = table.get("enabled")
        self.timeout_ms: int = table.get("timeout_ms", DEFAULT_TIMEOUT_MS)
        self.otlp_endpoint: str | None = table.get("otlp_endpoint")
        self.otlp_headers: dict[str, str] = table.get("otlp_headers", {})
        # Not isinstance: True is an int, too.
        if type(self.timeout_ms) is not int or not 1 <= self.timeout_ms <= MAX_TIMEOUT_MS:
            raise InvalidSetting(f"telemetry.timeout_ms must be an integer, 1 to {MAX_TIMEOUT_MS}")
        # An empty one is valid: it means nowhere.
        if self.otlp_endpoint is not None and self.otlp_endpoint != "":
            parse_endpoint(self.otlp_endpoint, "telemetry.otlp_endpoint")
        check_headers(self.otlp_headers, "telemetry.otlp_headers")


def parse_toml(data: bytes, parse_float: "Callable[[str], Any]" = float) -> "dict[str, Any]":
    """Return the document in config.toml. Raise InvalidSetting, ImportError."""
    if data == NEW_CONFIG:
        return {"telemetry": {"enabled": True, "timeout_ms": DEFAULT_TIMEOUT_MS}}
    import tomllib

    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidSetting("config.toml must not be larger than 1 MiB")
    try:
        # Notepad and PowerShell put a byte order mark before the text.
        text = data.removeprefix(BYTE_ORDER_MARK).decode()
        return tomllib.loads(text, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        raise InvalidSetting(f"config.toml must be TOML in UTF-8: {error}") from None


def parse_config(data: bytes) -> TelemetryConfig:
    """Return the `[telemetry]` table of config.toml. Raise InvalidSetting, ImportError."""
    return TelemetryConfig(parse_toml(data).get("telemetry", {}))


def check_enabled(config: TelemetryConfig) -> None:
    """Raise NotSent unless config.toml says `enabled = true`."""
    if config.enabled is None:
        raise NotSent("config.toml has no telemetry.enabled")
    if not config.enabled:
        raise NotSent("config.toml says enabled = false")


# Opt-out: the environment, and standard streams that are closed


def check_opt_out(settings: Settings) -> None:
    """Raise NotSent where a variable turns telemetry off."""
    if os.environ.get("DO_NOT_TRACK", "").lower() not in FALSE_WORDS:
        raise NotSent("DO_NOT_TRACK is set")
    if os.environ.get(settings.environment, "").lower() not in TRUE_WORDS:
        raise NotSent(f"{settings.environment} is set, and not to 1, true, yes or on")


def check_streams() -> None:
    """Raise NotSent where a standard stream is closed: a socket would get its number, and then
    what the host writes there."""
    for descriptor, name in enumerate(("input", "output", "error")):
        try:
            os.fstat(descriptor)
        except OSError:
            raise NotSent(f"standard {name} is closed") from None


# Standard error: how the notice and the debug text are written


def write_stderr(text: str) -> None:
    """Write a line past the buffer, so that a failure is known at once. Raise OSError."""
    if sys.stderr is None:
        raise OSError("there is no standard error")
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        # A stream in memory, as of a test or a notebook.
        sys.stderr.write(f"{text}\n")
        return
    sys.stderr.flush()
    check_reader(descriptor)
    data = f"{text}\n".encode(sys.stderr.encoding or "utf-8", "backslashreplace")
    while data:
        written = os.write(descriptor, data)
        data = data[written:]


def check_reader(descriptor: int) -> None:
    """Raise OSError where nobody reads: a write would wait, or end the host by SIGPIPE."""
    import select

    # Windows has no poll, and eventlet takes it away.
    if sys.platform == "win32" or not hasattr(select, "poll"):
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    events = poll.poll(0)
    if not events or events[0][1] & (select.POLLERR | select.POLLHUP):
        raise OSError("standard error takes no text")


# The data point: all that is sent


class CommandMetric:
    """One run of a command: a data point of a cumulative sum, its times in Unix nanoseconds.
    Each point is a true reset: OpenTelemetry metrics data model, "Resets and Gaps"."""

    def __init__(self, name: str, command: str, start: int, end: int) -> None:
        self.name = name
        self.command = command
        self.start = start
        self.end = end

    def encode(self, resource: "dict[str, str]") -> bytes:
        """Return an ExportMetricsServiceRequest with these resource attributes, in JSON."""
        import json

        point = {
            "attributes": encode_attributes({"command_name": self.command}),
            "startTimeUnixNano": str(self.start),
            "timeUnixNano": str(self.end),
            "asInt": "1",
        }
        metric = {
            "name": self.name,
            "sum": {
                "dataPoints": [point],
                # AGGREGATION_TEMPORALITY_CUMULATIVE
                "aggregationTemporality": 2,
                "isMonotonic": True,
            },
        }
        resource_metrics = {
            "resource": {"attributes": encode_attributes(resource)},
            "scopeMetrics": [{"scope": {}, "metrics": [metric]}],
        }
        return json.dumps({"resourceMetrics": [resource_metrics]}, separators=(",", ":")).encode()


def encode_attributes(attributes: "dict[str, str]") -> "list[dict[str, Any]]":
    return [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items()]


def describe_resource(settings: Settings, fingerprint: str) -> "dict[str, str]":
    return {
        "service.name": settings.service_name,
        "service.version": settings.service_version,
        "user.fingerprint": fingerprint,
    }


def make_fingerprint() -> str:
    """Return SHA-256 over host, system and randomness that is not kept, as 64 hex digits."""
    import hashlib
    import socket

    # Not the module platform: on Windows it takes seconds, and in threads it can hang.
    if hasattr(os, "uname"):
        system = os.uname().sysname
        machine = os.uname().machine
    else:
        system = sys.platform
        machine = os.environ.get("PROCESSOR_ARCHITECTURE", "")
    text = "\0".join([socket.gethostname(), system, machine])
    return hashlib.sha256(text.encode(errors="replace") + os.urandom(32)).hexdigest()


# Files: reads and writes the tool's directory


def find_directory(settings: Settings) -> str:
    """Return the absolute path of the tool's directory. Raise NotSent, InvalidSetting."""
    path = settings.directory
    if path.startswith("~"):
        # Without HOME, expanduser() asks the password database, which may be a network away.
        if os.name == "nt" or os.environ.get("HOME"):
            path = os.path.expanduser(path)
        if not os.path.isabs(path):
            raise NotSent("HOME is not set to an absolute path")
    if not os.path.isabs(path):
        raise InvalidSetting("directory of the tool must be an absolute path, or begin with ~")
    return path.replace("/", os.sep)


def read_file(path: str, limit: int) -> bytes:
    """Return up to limit bytes of a regular file. Raise OSError."""
    # Before it is opened, which changes some devices.
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    # Python first makes a buffer of the size that is asked for.
    size = min(limit, found.st_size)
    with open(path, "rb", opener=open_at_once) as file:
        # A named pipe without data reads as None.
        return file.read(size) or b""


def open_at_once(path: str, flags: int) -> int:
    """Open a file; a named pipe that has just taken its place does not hold the host up."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_file(
    path: str,
    data: bytes,
    place: "Callable[[str, str], None]" = os.replace,
    mode: int = 0o600,
) -> None:
    """Put data at path in one step: into a temporary file, which `place` moves. Raise OSError."""
    temporary = f"{path}.{os.urandom(6).hex()}.tmp"
    try:
        with open(temporary, "xb", opener=open_private) as file:
            # Of the open file: its path could have become a link to a file of somebody else.
            if sys.platform != "win32":
                os.fchmod(file.fileno(), mode)
            file.write(data)
        place(temporary, path)
    finally:
        delete_file(temporary)


def open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def link_file(temporary: str, path: str) -> None:
    """Place a new file. Raise FileExistsError where there is one.

    Without hard links, of several that are placed at the same moment the last one stays.
    """
    try:
        os.link(temporary, path)
    except (OSError, AttributeError):
        if os.path.lexists(path):
            raise FileExistsError from None
        os.replace(temporary, path)


def replace_file(temporary: str, path: str) -> None:
    """Replace a file; on Windows, wait up to a second for other processes that read it."""
    deadline = time.monotonic() + 1
    while True:
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def delete_file(path: str) -> None:
    """Delete a file if that is possible: it may be missing, or a virus scanner may hold it open."""
    try:
        os.unlink(path)
    except OSError:
        pass


def make_directory(path: str) -> None:
    """Make a directory and its parents, each 0700 under any umask. Raise OSError."""
    if os.path.isdir(path):
        return
    make_directory(os.path.dirname(path))
    os.makedirs(path, 0o700, exist_ok=True)
    if sys.platform == "win32":
        return
    # A umask may have taken rights away.
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Even the right to read. Root sets no mode by path, for it could have become a link.
        if os.geteuid() == 0:
            raise
        os.chmod(path, 0o700)
        return
    try:
        os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def check_owner(path: str) -> None:
    """Raise NotSent where this is root, and a directory or link on the way to path is not root's.

    Whoever owns a directory can turn each path in it into a link to a file of root's.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    parent = os.path.dirname(path)
    if parent != path:
        check_owner(parent)
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if found.st_uid != 0 and not stat.S_ISREG(found.st_mode):
        raise NotSent(f"{path} belongs to user {found.st_uid}, and this is root")
    if stat.S_ISLNK(found.st_mode):
        # One that leads to itself would be followed for ever.
        if not os.path.exists(path):
            raise NotSent(f"{path} is a link that leads nowhere")
        check_owner(os.path.join(parent, os.readlink(path)))


def check_creatable(path: str) -> None:
    """Raise NotSent where a missing file cannot be created."""
    nearest = path
    while not os.path.lexists(nearest) and nearest != os.path.dirname(nearest):
        nearest = os.path.dirname(nearest)
    if os.path.islink(nearest) and not os.path.exists(nearest):
        raise NotSent(f"{nearest} is a link that leads nowhere")
    if not os.access(nearest, os.W_OK):
        raise NotSent(f"{path} cannot be created: {nearest} is not writable")


class Storage:
    """The three files of a tool: config.toml, fingerprint and backoff."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.config_path = os.path.join(directory, "config.toml")
        self.fingerprint_path = os.path.join(directory, "fingerprint")
        self.backoff_path = os.path.join(directory, "backoff")

    def read_config(self) -> "bytes | None":
        """Return what config.toml holds, None where there is none. Raise NotSent."""
        try:
            return read_file(self.config_path, MAX_CONFIG_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror or error
            raise NotSent(f"{self.config_path} cannot be read: {reason}") from None

    def read_fingerprint(self) -> str:
        """Return the stored fingerprint; "" where there is none of 1 to 64 hex digits."""
        try:
            stored = read_file(self.fingerprint_path, 128).decode().strip()
        except (OSError, ValueError):
            return ""
        is_hex = all(digit in HEX_DIGITS for digit in stored)
        return stored if is_hex and len(stored) <= 64 else ""

    def write_fingerprint(self, fingerprint: str) -> None:
        """Store a fingerprint unless a valid one is there. Raise OSError."""
        is_damaged = os.path.lexists(self.fingerprint_path) and not self.read_fingerprint()
        place = os.replace if is_damaged else link_file
        write_file(self.fingerprint_path, fingerprint.encode(), place)

    def describe_backoff(self, url: str) -> str:
        """Return how long a back-off for url still takes, and why; "" where there is none."""
        try:
            modified = os.stat(self.backoff_path).st_mtime
            text = read_file(self.backoff_path, MAX_BODY_BYTES).decode()
        except (OSError, ValueError):
            return ""
        age = time.time() - modified
        stored_url, _, reason = text.partition("\n")
        if stored_url != url or not 0 <= age < BACKOFF_SECONDS:
            return ""
        return f"{int(BACKOFF_SECONDS - age) + 1} s more: {make_printable(reason)}"

    def check_backoff(self, url: str) -> None:
        """Raise NotSent while a back-off for url runs."""
        backoff = self.describe_backoff(url)
        if backoff:
            raise NotSent(f"back-off for {backoff}")

    def begin_backoff(self, url: str, reason: str) -> None:
        """Begin ten minutes in which nothing is sent to url, if the disk can be written."""
        try:
            write_file(self.backoff_path, f"{url}\n{reason}\n".encode())
        except OSError:
            pass

    def heed_status(self, url: str, status: int) -> None:
        """Begin a back-off where the collector asks for one."""
        if status in (429, 503):
            self.begin_backoff(url, f"the collector answered HTTP {status}")


# The client: one HTTP request to one collector


class OtlpClient:
    """One collector: the URL for metrics, the headers that are added, and the timeout in seconds
    that a data point has from the call to the response."""

    def __init__(self, url: str, headers: "dict[str, str]", timeout: float) -> None:
        self.url = url
        self.headers = headers
        self.timeout = timeout

    def build_request(self, body: bytes) -> "urllib.request.Request":
        """Return a request that names each header that will be on the wire."""
        import urllib.request

        headers = {
            "Accept-Encoding": "identity",
            **self.headers,
            "User-Agent": f"trix-telemetry/{__version__}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Host": self.url.split("/")[2],
            "Connection": "close",
        }
        return urllib.request.Request(self.url, body, headers, method="POST")

    def post(self, body: bytes, deadline: float, is_prepared: "threading.Event") -> "HTTPResponse":
        """Return the response, whatever its status; `deadline` is one of the monotonic clock.

        The event is set while there is only the network to wait for. Raise OSError, ValueError,
        http.client.HTTPException.
        """
        request = self.build_request(body)
        if not needs_tls(self.url):
            is_prepared.set()
            return open_request(request, None, deadline)
        import ssl
        import urllib.error

        directory = find_hashed_directory()
        if directory is not None:
            context = ssl.create_default_context(capath=directory)
            is_prepared.set()
            try:
                return open_request(request, context, deadline)
            except urllib.error.URLError as error:
                # The bundle may know an authority that the directory does not.
                if not isinstance(error.reason, ssl.SSLCertVerificationError):
                    raise
            is_prepared.clear()
        context = ssl.create_default_context()
        is_prepared.set()
        return open_request(request, context, deadline)


def needs_tls(url: str) -> bool:
    """Return whether the collector, or the proxy on the way to it, speaks TLS."""
    proxy = find_proxies().get("http", "")
    return url.startswith("https:") or proxy.lower().startswith("https:")


def find_hashed_directory() -> "str | None":
    """Return the system's directory of authorities with hashed names, None where there is none.

    OpenSSL reads the one authority that it needs; to parse a bundle of all takes 25 ms.
    """
    import ssl

    paths = ssl.get_default_verify_paths()
    # A bundle that the variable SSL_CERT_FILE names goes first.
    if not paths.capath or os.environ.get(paths.openssl_cafile_env):
        return None
    names = os.listdir(paths.capath)
    return paths.capath if any(name.endswith(".0") for name in names) else None


def open_request(
    request: "urllib.request.Request", context: "ssl.SSLContext | None", deadline: float
) -> "HTTPResponse":
    import urllib.request

    # The default opener follows redirects, opens files, and raises for a status of 400 and more.
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler(find_proxies()))
    opener.add_handler(urllib.request.UnknownHandler())
    for handler in make_handlers(context, deadline):
        opener.add_handler(handler)
    remaining = max(deadline - time.monotonic(), 0.001)
    response: HTTPResponse = opener.open(request, timeout=remaining)
    return response


def make_handlers(
    context: "ssl.SSLContext | None", deadline: float
) -> "list[urllib.request.BaseHandler]":
    """Return handlers for http and, with a context, https.

    They are those of urllib, with two differences: a response heeds the deadline, and no connection
    takes the place of a standard stream.
    """
    import http.client
    import io
    import urllib.request

    class Stream(io.RawIOBase):
        """The bytes of a socket, whose own timeout would begin anew with each of them."""

        def __init__(self, sock: "socket.socket", file: "io.BufferedReader") -> None:
            self.sock = sock
            self.file = file

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: "Any") -> "int | None":
            self.sock.settimeout(max(deadline - time.monotonic(), 0.001))
            return self.file.raw.readinto(buffer)

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: "socket.socket", *arguments: "Any", **options: "Any") -> None:
            super().__init__(sock, *arguments, **options)
            self.fp = io.BufferedReader(Stream(sock, self.fp))

    class Connection(http.client.HTTPConnection):
        response_class = Response

        def connect(self) -> None:
            super().connect()
            # The host may have closed a standard stream while the name was looked up.
            if self.sock.fileno() <= 2:
                raise NotSent("a standard stream was closed")

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> "HTTPResponse":
            return self.do_open(Connection, req)

    # 0, for a debug level that the host has set would print the request.
    handlers: list[urllib.request.BaseHandler] = [Handler(debuglevel=0)]
    if context is None:
        return handlers

    class TlsConnection(http.client.HTTPSConnection, Connection):
        """Connects as Connection does, and then begins TLS."""

    class TlsHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> "HTTPResponse":
            return self.do_open(TlsConnection, req, context=context)

    handlers.append(TlsHandler(debuglevel=0, context=context))
    return handlers


def find_proxies() -> "dict[str, str]":
    import urllib.request

    # On macOS the look-up in the system's settings is not safe beside a fork.
    if sys.platform == "darwin":
        return urllib.request.getproxies_environment()
    return urllib.request.getproxies()


def configure_client(
    settings: Settings, config: TelemetryConfig, requested: "str | None" = None
) -> OtlpClient:
    """Return the client for the requested endpoint, else that of the environment, of config.toml,
    of the tool. An empty one counts, too: it means nowhere. Raise NotSent, InvalidSetting."""
    variable = f"{settings.environment}_ENDPOINT"
    headers = select_headers(config.otlp_headers)
    if requested is not None:
        base, source = requested, "--endpoint"
    elif variable in os.environ:
        base, source = os.environ[variable], variable
    elif config.otlp_endpoint is not None:
        base, source = config.otlp_endpoint, "telemetry.otlp_endpoint"
    else:
        base, source = settings.endpoint, "endpoint of the tool"
        # The headers of the tool go to its own endpoint alone.
        headers = select_headers(settings.headers or {}) | headers
    if not base:
        raise NotSent(f"there is no endpoint: {source} is empty")
    return OtlpClient(parse_endpoint(base, source), headers, config.timeout_ms / 1000)


# The first run: whether it may create the config, and the notice


def check_first_run(settings: Settings, storage: Storage) -> None:
    """Raise NotSent where config.toml, which is missing, may not or cannot be created."""
    if settings.opt_in:
        raise NotSent(f"it is opt-in, and {storage.config_path} does not exist")
    if os.environ.get("CI", "").lower() not in FALSE_WORDS:
        raise NotSent(f"CI is set, and {storage.config_path} does not exist")
    check_creatable(storage.config_path)


def format_notice(settings: Settings, storage: Storage, url: str) -> str:
    if settings.prog:
        inspect = f"{settings.prog} status"
        disable = f"{settings.prog} disable"
    else:
        inspect = f"set {settings.environment}_DEBUG=1"
        disable = f"enabled = false in\n             {storage.config_path}"
    lines = [
        f"{settings.service_name} sends anonymous usage telemetry: the name of each command,",
        "the version and a random fingerprint, never arguments, paths or file contents.",
        "This command is the first to be counted. This notice is shown once.",
        f"  Sent to:   {url}",
        f"  Inspect:   {inspect}",
        f"  Turn off:  set {settings.environment}=0 or DO_NOT_TRACK=1,",
        f"             or {disable}",
    ]
    if settings.docs_url:
        lines.append(f"  Read more: {settings.docs_url}")
    return "\n".join(lines)


def run_first(settings: Settings, storage: Storage, url: str) -> bytes:
    """Create config.toml, show the notice, and return the config. Raise NotSent, OSError."""
    make_directory(storage.directory)
    try:
        write_file(storage.config_path, NEW_CONFIG, link_file)
        write_stderr(format_notice(settings, storage, url))
    except FileExistsError:
        # Another process created it at the same moment, and shows the notice.
        return storage.read_config() or b""
    except BaseException:
        # The notice was not shown, so the file is taken back; also after a Ctrl-C.
        if storage.read_config() == NEW_CONFIG:
            delete_file(storage.config_path)
        raise
    return NEW_CONFIG


# The thread: one delivery, from the call of the tool to the response


class Call:
    """One call of track_command_execution: what is counted for whom, and when it was made, in
    Unix nanoseconds and in seconds of the monotonic clock."""

    def __init__(self, settings: Settings, command: str) -> None:
        self.settings = settings
        self.command = command
        self.time_ns = time.time_ns()
        self.moment = time.monotonic()


class Delivery:
    """One data point on its way to the collector, with a thread of its own."""

    def __init__(
        self, session: "Session", call: Call, storage: Storage, config_data: bytes
    ) -> None:
        import threading

        self.session = session
        self.call = call
        self.storage = storage
        self.config_data = config_data
        # Set where the network begins.
        self.client: OtlpClient | None = None
        # Until the config is parsed.
        self.deadline = call.moment + DEFAULT_TIMEOUT_MS / 1000
        # Set when all is imported and prepared: from here on, there is only the network.
        self.is_prepared = threading.Event()
        self.caller_id = threading.get_native_id()
        self.thread = threading.Thread(target=self.run, name="telemetry", daemon=True)

    def run(self) -> None:
        # So the caller goes on at once, and not after the interpreter's switch interval of 5 ms.
        time.sleep(0.001)
        try:
            block_signals(self.caller_id)
            client, body = self.prepare()
            self.send(client, body)
        except Exception:
            # The host learns of no failure; `track` shows it to the person who asks.
            pass
        finally:
            self.is_prepared.set()
            self.session.deliveries.discard(self)

    def prepare(self) -> "tuple[OtlpClient, bytes]":
        """Do all but the network. Raise NotSent, ImportError."""
        import_modules("re", "urllib.parse")
        if self.config_data != NEW_CONFIG:
            import_modules("tomllib")
        try:
            config = parse_config(self.config_data)
            check_enabled(config)
            client = configure_client(self.call.settings, config)
        except InvalidSetting as error:
            self.session.warn(error)
            raise
        self.deadline = self.call.moment + client.timeout
        self.storage.check_backoff(client.url)
        import_network(client.url)
        fingerprint = self.session.identify(self.storage)
        body = self.session.encode(self.call, fingerprint)
        self.client = client
        return client, body

    def send(self, client: OtlpClient, body: bytes) -> None:
        """Post the data point. Raise NotSent, and what OtlpClient.post raises."""
        # The host may have become a daemon by now.
        check_streams()
        with client.post(body, self.deadline, self.is_prepared) as response:
            self.storage.heed_status(client.url, response.status)
            response.read1(MAX_BODY_BYTES)

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def wait(self) -> float:
        """Wait for the end, not past the deadline. Return the seconds waited for the network."""
        self.is_prepared.wait(self.remaining())
        began = time.monotonic()
        while self.thread.is_alive() and self.remaining() > 0:
            self.thread.join(min(WAIT_SECONDS, self.remaining()))
        return time.monotonic() - began


def block_signals(caller_id: int) -> None:
    """Leave the signals to the threads of the host."""
    import_modules("signal")
    import signal
    import threading

    # With gevent and eventlet this is the caller's own thread.
    if threading.get_native_id() == caller_id:
        return
    if sys.platform != "win32" and hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def import_modules(*names: str) -> None:
    """Import what is used later; from then on an `import` only looks it up. Raise ImportError."""
    from importlib import import_module

    for name in names:
        try:
            import_module(name)
        except (ImportError, AttributeError):
            # Of two threads that import the same modules one can meet a half-made one.
            import_module(name)


def import_network(url: str) -> None:
    """Import what encoding and sending use, which takes 30 ms. Raise ImportError."""
    # A look-up encodes the name of the host.
    import_modules("json", "hashlib", "socket", "encodings.idna", "urllib.request")
    if needs_tls(url):
        import_modules("ssl")
    # The proxies of the system.
    if sys.platform == "win32":
        import_modules("winreg")


# The session: what all deliveries of a process share


class Session:
    """The deliveries of one process that are under way, and what they share."""

    def __init__(self) -> None:
        import threading

        # Python 3.13.0 breaks it where two threads import it at once, as a delivery and a host may.
        if sys.version_info[:3] == (3, 13, 0):
            import collections.abc  # noqa: F401

        # Reentrant: a signal handler may track in the middle of a track.
        self.lock = threading.RLock()
        self.deliveries: set[Delivery] = set()
        self.interval_end = 0
        self.fingerprint = ""
        self.has_warned = False

    def start(self, delivery: Delivery) -> None:
        """Start the delivery's thread. Raise NotSent; RuntimeError where threads cannot start."""
        with self.lock:
            if len(self.deliveries) >= MAX_DELIVERIES:
                raise NotSent(f"{MAX_DELIVERIES} deliveries are under way")
            try:
                # Before the start, which a signal handler that tracks may interrupt.
                self.deliveries.add(delivery)
                delivery.thread.start()
            except BaseException:
                # Threads cannot start, or a signal handler of the host's has raised.
                if not delivery.thread.is_alive():
                    self.deliveries.discard(delivery)
                raise

    def encode(self, call: Call, fingerprint: str) -> bytes:
        """Return the body, whose interval begins after that of the last point."""
        with self.lock:
            start = max(call.time_ns, self.interval_end)
            end = max(time.time_ns(), start + MIN_INTERVAL_NS)
            self.interval_end = end
        metric = CommandMetric(call.settings.metric_name, call.command, start, end)
        return metric.encode(describe_resource(call.settings, fingerprint))

    def identify(self, storage: Storage) -> str:
        """Return the stored fingerprint, made where there is none, or one of this process."""
        stored = storage.read_fingerprint()
        if stored:
            return stored
        proposed = self.propose_fingerprint()
        try:
            storage.write_fingerprint(proposed)
        except OSError:
            # Of many first writers another one won, or the disk cannot be written.
            pass
        stored = storage.read_fingerprint()
        if stored:
            # Forget it: after a `reset`, this process proposes a new one.
            self.fingerprint = ""
        return stored or proposed

    def propose_fingerprint(self) -> str:
        """Return the fingerprint that this process would store."""
        with self.lock:
            self.fingerprint = self.fingerprint or make_fingerprint()
            return self.fingerprint

    def warn(self, error: InvalidSetting) -> None:
        """Log, once, an invalid setting that a delivery has found, if the host uses logging."""
        logging = sys.modules.get("logging")
        if logging is None or self.has_warned:
            return
        self.has_warned = True
        logger = logging.getLogger(__name__)
        # Without a handler, logging would write to stderr.
        logger.addHandler(logging.NullHandler())
        logger.warning("telemetry is off: %s", error)

    def close(self) -> None:
        """Wait for each delivery; begin a back-off where the process waits long in all."""
        waited = 0.0
        for delivery in list(self.deliveries):
            waited += delivery.wait()
            client = delivery.client
            if client is not None and waited > client.timeout / 2:
                reason = f"a command waited {waited:.1f} s for the network"
                delivery.storage.begin_backoff(client.url, reason)

    def wait_for_imports(self) -> None:
        """Wait, half a second at most, until no delivery imports any more: an import that a fork
        or the end of the process cuts off leaves a lock for which others would wait for ever."""
        deadline = time.monotonic() + MAX_IMPORT_SECONDS
        for delivery in list(self.deliveries):
            delivery.is_prepared.wait(max(deadline - time.monotonic(), 0))


# The process: its one session, and its hooks for forks and the end


current_session: "Session | None" = None
has_hooks = False


def get_session() -> Session:
    """Return the session of this process; a forked child makes its own."""
    global current_session
    if current_session is None:
        session = Session()
        register_hooks()
        # Another thread may have been quicker.
        if current_session is None:
            current_session = session
    return current_session


def register_hooks() -> None:
    global has_hooks
    if has_hooks:
        return
    import atexit

    atexit.register(close_session)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=wait_for_imports, after_in_child=forget_session)
    has_hooks = True


def wait_for_imports() -> None:
    """Wait before a fork, before the end, and before the command line imports the same modules."""
    try:
        if current_session is not None:
            current_session.wait_for_imports()
    except BaseException:
        # What a signal handler raises ends the wait. From a hook, Python would only print it.
        pass


def forget_session() -> None:
    global current_session
    current_session = None


def flush_output() -> None:
    """Flush, so that who reads the host's pipes has all of the output before the wait."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            # It may be None, closed, or of a class of the host's own.
            pass


def close_session() -> None:
    """Wait at exit for the deliveries under way."""
    if current_session is None:
        return
    try:
        flush_output()
        current_session.close()
    except BaseException:
        # What a signal handler raises ends the wait. Python would print it, and any failure.
        pass
    wait_for_imports()
    repeat_interrupt()


def repeat_interrupt() -> None:
    """Let a host that dies of a Ctrl-C die by SIGINT, as a shell expects.

    Python notes how it ends, and forgets it where any thread runs code from a string, as some
    imports of a delivery do.
    """
    traceback = getattr(sys, "last_traceback", None)
    # What ended the main script has no caller; what a shell within the host has shown has one.
    if traceback is None or traceback.tb_frame.f_back is not None or hasattr(sys, "ps1"):
        return
    if sys.last_type is KeyboardInterrupt:
        try:
            # Python notes it for code from a string, too.
            exec("raise KeyboardInterrupt")  # noqa: S102
        except KeyboardInterrupt:
            pass


# The start of a delivery: the checks before its thread, also for those who only look


def check_call(call: Call) -> None:
    """Raise NotSent where nothing is sent, whatever config.toml says."""
    check_settings(call.settings)
    check_opt_out(call.settings)
    check_streams()
    check_command(call.command, call.settings.commands)


def start_delivery(call: Call) -> "threading.Thread":
    """Start the thread that delivers; on the first run of the tool, create its config.

    Raise NotSent, OSError, RuntimeError.
    """
    settings = call.settings
    check_call(call)
    storage = Storage(find_directory(settings))
    found = storage.read_config()
    config_data = NEW_CONFIG if found is None else found
    check_unparsed(settings, config_data)
    check_owner(storage.config_path)
    check_ending()
    if found is None:
        check_first_run(settings, storage)
        client = configure_client(settings, TelemetryConfig({}))
        config_data = run_first(settings, storage, client.url)
    session = get_session()
    delivery = Delivery(session, call, storage, config_data)
    session.start(delivery)
    return delivery.thread


def check_unparsed(settings: Settings, config_data: bytes) -> None:
    """Raise NotSent where no parser is needed to know that nothing is sent."""
    if b"true" not in config_data:
        raise NotSent("config.toml does not say enabled = true")
    if not may_have_endpoint(settings, config_data):
        raise NotSent("there is no endpoint")


def may_have_endpoint(settings: Settings, config_data: bytes) -> bool:
    variable = f"{settings.environment}_ENDPOINT"
    if variable in os.environ:
        return os.environ[variable] != ""
    if settings.endpoint != "":
        return True
    # The comment in NEW_CONFIG sets no endpoint. A quoted key may be spelled with backslashes.
    text = config_data.replace(b"# otlp_endpoint", b"")
    return b"endpoint" in text or b"\\" in text


def check_ending() -> None:
    """Raise NotSent in an exit hook: the process would end beside the new thread."""
    threading = sys.modules.get("threading")
    if threading is None:
        return
    # By then the main thread, in which the hooks run, counts as ended.
    main_thread = threading.main_thread()
    if threading.current_thread() is main_thread and not main_thread.is_alive():
        raise NotSent("the process is ending")


def plan_delivery(call: Call, requested: "str | None" = None) -> OtlpClient:
    """Return the client that start_delivery would send with, without making anything.

    `requested` is an endpoint in place of the configured one. Raise NotSent, ImportError.
    """
    settings = call.settings
    check_call(call)
    storage = Storage(find_directory(settings))
    check_owner(storage.config_path)
    found = storage.read_config()
    if found is None:
        check_first_run(settings, storage)
        found = NEW_CONFIG
    config = parse_config(found)
    check_enabled(config)
    client = configure_client(settings, config, requested)
    import_network(client.url)
    return client


def find_fingerprint(settings: Settings) -> str:
    """Return the stored fingerprint, else the one that the next send of this process stores."""
    try:
        check_settings(settings)
        stored = Storage(find_directory(settings)).read_fingerprint()
    except NotSent:
        stored = ""
    return stored or get_session().propose_fingerprint()


def format_preview(call: Call, client: OtlpClient) -> str:
    """Return the request as on the wire, the values of the added headers hidden."""
    body = get_session().encode(call, find_fingerprint(call.settings))
    request = client.build_request(body)
    hidden = [name.lower() for name in client.headers]
    lines = [f"POST {request.selector} HTTP/1.1"]
    for name, value in request.header_items():
        shown = "(hidden)" if name.lower() in hidden else value
        lines.append(f"{name.title()}: {shown}")
    return "\n".join([*lines, "", body.decode()])


def explain_delivery(call: Call) -> str:
    """Return what would be sent, or why nothing would."""
    tool = describe_tool(call.settings)
    try:
        client = plan_delivery(call)
        Storage(find_directory(call.settings)).check_backoff(client.url)
    except (NotSent, ImportError, OSError) as error:
        return f"{tool}: telemetry is off: {describe_error(error)}"
    return f"{tool}: telemetry would send\n{format_preview(call, client)}"


# What a tool calls: the public functions


current_settings = Settings()


def is_debugging(settings: Settings) -> bool:
    return os.environ.get(f"{settings.environment}_DEBUG", "").lower() not in FALSE_WORDS


def track_command_execution(name: str) -> "threading.Thread | None":
    """Count one run of the command `name`, which is `[A-Za-z][A-Za-z0-9_-]{0,63}`.

    Returns the daemon thread that delivers it, None where nothing will be sent. Raises nothing.
    At exit the process waits for what is left of `timeout_ms` since the call.
    """
    # A host that has not imported it has no signal handlers.
    signal: Any = sys.modules.get("signal")
    if not hasattr(signal, "pthread_sigmask"):
        return try_to_start(name)
    # What a handler raises is not ours to catch, so it runs before or after; unless another thread
    # of the host takes the signal.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # The standard signals; valid_signals() takes long.
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        return try_to_start(name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def try_to_start(command: str) -> "threading.Thread | None":
    """Start the delivery of a command, or explain it; None where nothing will be sent."""
    try:
        call = Call(current_settings, command)
        if is_debugging(call.settings):
            write_stderr(explain_delivery(call))
            return None
        return start_delivery(call)
    except Exception:
        # No failure reaches the host. At its end the interpreter may have cleared this module.
        return None


def initialize_telemetry(
    *,
    service_name: str,
    service_version: str,
    endpoint: str,
    metric_name: "str | None" = None,
    directory: "str | os.PathLike[str] | None" = None,
    environment: "str | None" = None,
    prog: "str | None" = None,
    commands: "Collection[str] | None" = None,
    headers: "dict[str, str] | None" = None,
    docs_url: "str | None" = None,
    opt_in: bool = False,
) -> None:
    """Say which tool this is, in place of the values of `Settings`, which explain each argument.

    `metric_name`, `directory` and `environment` follow from `service_name` where they are None.
    The last call before a track counts. A value that cannot be used raises nothing: telemetry is
    off, and `status` names it.
    """
    global current_settings
    slug = make_slug(service_name)
    settings = Settings()
    settings.service_name = service_name
    settings.service_version = service_version
    settings.endpoint = endpoint
    settings.metric_name = f"{slug}_command_invocation" if metric_name is None else metric_name
    settings.environment = f"{slug.upper()}_TELEMETRY" if environment is None else environment
    settings.prog = "" if prog is None else prog
    settings.commands = commands
    settings.headers = headers
    settings.docs_url = "" if docs_url is None else docs_url
    settings.opt_in = opt_in
    settings.directory = choose_directory(slug) if directory is None else find_path(directory)
    current_settings = settings


def make_slug(service_name: str) -> str:
    """Return ASCII letters and digits in lower case, all else as `_`."""
    if not isinstance(service_name, str):
        return "_"
    return "".join(c.lower() if c.isascii() and c.isalnum() else "_" for c in service_name)


def find_path(directory: "Any") -> "Any":
    """Return a path as text; what is none stays as it is, for check_settings to find."""
    try:
        return os.fspath(directory)
    except Exception:
        return directory


def choose_directory(slug: str) -> str:
    """Return the directory of a tool that names none."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if os.path.isabs(base):
        return f"{base}/{slug}/telemetry"
    path = f"~/.config/{slug}/telemetry"
    # Version 2 kept it there on Windows, too. Use it on, so that who turned it off stays off.
    if os.name == "nt" and not os.path.isdir(os.path.expanduser(path)):
        base = os.environ.get("APPDATA") or "~/AppData/Roaming"
        path = f"{base}/{slug}/telemetry"
    return path


def get_user_fingerprint() -> str:
    """Return the stored fingerprint, 1 to 64 hex digits, else the one that the next send stores."""
    return find_fingerprint(current_settings)


# The command line: from here on, nothing runs inside a host tool


def show(text: str) -> None:
    """Print text. Raise OSError."""
    print(escape(text))


def escape(text: str) -> str:
    """Return text with what the encoding of standard output lacks as backslash escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def show_error(text: str) -> None:
    # Without standard error, print would write to standard output.
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr)
    except (OSError, ValueError):
        # It is closed, and there is no other place.
        pass


def get_sample_command(settings: Settings) -> str:
    """Return a command that can be counted."""
    names = sorted(filter(is_command_name, settings.commands or ()))
    return names[0] if names else "build"


def guess_client(settings: Settings) -> OtlpClient:
    """Return the client of a tool whose telemetry may be off. Raise NotSent."""
    try:
        found = Storage(find_directory(settings)).read_config()
        config = parse_config(NEW_CONFIG if found is None else found)
    except (NotSent, ImportError):
        config = TelemetryConfig({})
    return configure_client(settings, config)


def find_reason(settings: Settings) -> "tuple[str | None, bool]":
    """Return why telemetry is off, None where it is on, and whether a setting is invalid."""
    try:
        check_settings(settings)
        plan_delivery(Call(settings, get_sample_command(settings)))
    except (NotSent, ImportError, OSError) as error:
        return describe_error(error), isinstance(error, InvalidSetting)
    return None, False


def collect_facts(settings: Settings, reason: "str | None") -> "dict[str, Any]":
    """Return what `status` shows, None for what there is not."""
    facts: dict[str, Any] = {
        "tool": describe_tool(settings),
        "enabled": reason is None,
        "reason": reason,
        "endpoint": None,
        "encrypted": None,
        "fingerprint": None,
        "backoff": None,
        "config": None,
        "docs_url": None,
    }
    try:
        check_settings(settings)
        facts["docs_url"] = settings.docs_url or None
        storage = Storage(find_directory(settings))
        facts["config"] = storage.config_path
        facts["fingerprint"] = storage.read_fingerprint() or None
        url = guess_client(settings).url
        facts["endpoint"] = url
        facts["encrypted"] = url.startswith("https:")
        facts["backoff"] = storage.describe_backoff(url) or None
    except NotSent:
        # What is known so far is shown, and the reason.
        pass
    return facts


def format_status(settings: Settings, facts: "dict[str, Any]") -> str:
    if facts["enabled"]:
        first = f"Telemetry of {facts['tool']} is on"
    else:
        first = f"Telemetry of {facts['tool']} is off: {facts['reason']}"
    endpoint = facts["endpoint"] or "none"
    if facts["encrypted"] is False:
        endpoint = f"{endpoint} (not encrypted)"
    change = "`enabled` in the config"
    if settings.prog:
        change = f"{settings.prog} enable, {settings.prog} disable"
    variable = settings.environment
    rows = {
        "Endpoint": endpoint,
        "Fingerprint": facts["fingerprint"] or "none",
        "Back-off": facts["backoff"],
        "Config": facts["config"],
        "Change": change,
        "Variables": f"DO_NOT_TRACK=1, {variable}=0, {variable}_DEBUG=1",
        "Read more": facts["docs_url"],
    }
    return "\n".join([first, *(f"  {label:<13}{text}" for label, text in rows.items() if text)])


def run_status(settings: Settings, options: "argparse.Namespace") -> int:
    import json

    reason, is_invalid = find_reason(settings)
    facts = collect_facts(settings, reason)
    show(json.dumps(facts, indent=2) if options.json else format_status(settings, facts))
    return 1 if is_invalid else 0


def replace_value(text: str, value: str) -> "Iterator[str]":
    """Yield texts of which one has another value of telemetry.enabled, however it is spelled."""
    import re

    start = max(text.find("telemetry"), 0)
    for match in re.compile(r"=[ \t]*(true|false)\b").finditer(text, start):
        yield text[: match.start(1)] + value + text[match.end(1) :]


def add_key(text: str, value: str) -> "Iterator[str]":
    """Yield texts of which one has telemetry.enabled added: below its header, or in a new table."""
    import re

    newline = "\r\n" if "\r\n" in text else "\n"
    line = f"enabled = {value}{newline}"
    for match in re.finditer(r"(?m)^[ \t]*\[[ \t]*[\"']?telemetry[\"']?[ \t]*\].*(\n|\Z)", text):
        before = text[: match.end()]
        if not before.endswith("\n"):
            before += newline
        yield before + line + text[match.end() :]
    if text and not text.endswith("\n"):
        text += newline
    yield f"{text}{newline}[telemetry]{newline}{line}"


def edit_config(data: bytes, is_enabled: bool) -> bytes:
    """Return config.toml with `enabled` set and every other byte kept.

    Raise InvalidSetting where it is damaged, CommandError where the text is too unusual.
    """
    # Floats as text, for nan is not equal to itself.
    before = parse_toml(data, str)
    table = before.get("telemetry", {})
    check_table(table)
    if table.get("enabled") is is_enabled:
        return data
    value = "true" if is_enabled else "false"
    wanted = {**before, "telemetry": {**table, "enabled": is_enabled}}
    mark = BYTE_ORDER_MARK if data.startswith(BYTE_ORDER_MARK) else b""
    edit = replace_value if "enabled" in table else add_key
    for text in edit(data.removeprefix(mark).decode(), value):
        edited = mark + text.encode()
        # The parser tells which of the texts says what is wanted, and nothing else.
        try:
            if parse_toml(edited, str) == wanted:
                return edited
        except InvalidSetting:
            continue
    raise CommandError(f"the text is too unusual: write enabled = {value} for telemetry by hand")


def save_enabled(storage: Storage, is_enabled: bool) -> None:
    """Set `enabled` in config.toml. Raise InvalidSetting, NotSent, CommandError, OSError."""
    check_owner(storage.config_path)
    data = storage.read_config()
    if data is None:
        check_creatable(storage.config_path)
        make_directory(storage.directory)
        value = b"true" if is_enabled else b"false"
        try:
            write_file(storage.config_path, NEW_CONFIG.replace(b"true", value), link_file)
            return
        except FileExistsError:
            # Another process has just created it.
            data = storage.read_config() or b""
    edited = edit_config(data, is_enabled)
    if edited == data:
        return
    # A link stays a link.
    path = os.path.realpath(storage.config_path)
    if not os.access(path, os.W_OK):
        raise CommandError("the file is read-only")
    write_file(path, edited, replace_file, stat.S_IMODE(os.stat(path).st_mode))


def run_switch(settings: Settings, options: "argparse.Namespace") -> int:
    storage = Storage(find_directory(settings))
    path = storage.config_path
    try:
        save_enabled(storage, options.enabled)
    except (CommandError, NotSent, OSError) as error:
        if isinstance(error, InvalidSetting) and not options.enabled:
            show(f"Telemetry is off already, but {path} needs mending: {error}")
            return 0
        raise CommandError(f"{path}: {describe_error(error)}; nothing was changed") from None
    if not options.enabled:
        show(f"Telemetry disabled (saved in {path})")
        return 0
    delete_file(storage.backoff_path)
    show(f"Telemetry enabled (saved in {path})")
    reason, _ = find_reason(settings)
    if reason:
        show(f"It stays off: {reason}")
    return 0


def run_preview(settings: Settings, options: "argparse.Namespace") -> int:
    command = options.command
    if command is None:
        command = get_sample_command(settings)
    check_command(command, settings.commands)
    call = Call(settings, command)
    reason, _ = find_reason(settings)
    if reason:
        show_error(f"This is not sent. Telemetry is off: {reason}")
    try:
        client = guess_client(settings)
    except NotSent:
        client = OtlpClient("http://no-endpoint.invalid/v1/metrics", {}, 0)
    show(format_preview(call, client))
    return 0


def check_response(response: "HTTPResponse") -> str:
    """Return what the collector says of a data point that it accepted. Raise CommandError for any
    other answer: OTLP specification, "OTLP/HTTP Response"."""
    words = f"HTTP {response.status}"
    body = response.read(MAX_BODY_BYTES)
    if not 200 <= response.status < 300:
        text = body.decode(errors="replace")
        location = response.headers.get("Location")
        if location:
            text = f"it redirects to {location}, which is not followed"
        raise CommandError(add_message(words, text))
    if response.headers.get_content_type() == "text/html":
        raise CommandError(
            f"{words}, but the answer is a web page: is this the URL of a collector?"
        )
    if len(body) == MAX_BODY_BYTES:
        return add_message(words, "the answer is too long to be read to its end")
    rejected, text = parse_partial_success(body)
    if rejected > 0:
        words = f"{words}: {rejected} data point rejected"
        raise CommandError(add_message(words, text or "no reason given"))
    return add_message(words, text)


def add_message(words: str, message: str) -> str:
    """Return our words, followed by the collector's message where there is one."""
    text = make_printable(message)[:200]
    return f"{words}: {text}" if text else words


def parse_partial_success(body: bytes) -> "tuple[int, str]":
    """Return how many data points were rejected, and the message of the collector."""
    import json

    try:
        partial = json.loads(body)["partialSuccess"]
        rejected = partial.get("rejectedDataPoints") or 0
        return int(rejected), str(partial.get("errorMessage") or "")
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # No partial success: an empty body, as a collector may send, or anything else.
        return 0, ""


def describe_failure(error: Exception) -> str:
    """Return why the collector has not accepted a data point."""
    from urllib.error import URLError

    if isinstance(error, URLError):
        return str(error.reason)
    if isinstance(error, (CommandError, OSError)):
        return str(error)
    # The text of another error may show the password of a proxy.
    return type(error).__name__


def send_and_wait(call: Call, client: OtlpClient, storage: Storage) -> str:
    """Send a data point and return what the collector says of it. Raise CommandError."""
    import threading

    session = get_session()
    body = session.encode(call, session.identify(storage))
    deadline = call.moment + client.timeout
    is_prepared = threading.Event()
    answers = []
    failures = []

    def post() -> None:
        try:
            with client.post(body, deadline, is_prepared) as response:
                storage.heed_status(client.url, response.status)
                answers.append(check_response(response))
        except Exception as error:
            failures.append(describe_failure(error))
        finally:
            is_prepared.set()

    # In a thread, for the look-up of a host name heeds no deadline.
    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    try:
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(WAIT_SECONDS)
    finally:
        # A process that ends while OpenSSL reads a bundle of authorities can crash.
        is_prepared.wait(MAX_IMPORT_SECONDS)
    elapsed = f"{(time.monotonic() - call.moment) * 1000:.0f} ms"
    if not answers:
        failure = failures[0] if failures else "timed out"
        raise CommandError(f"{client.url} after {elapsed}: {failure}")
    return f"Sent to {client.url} in {elapsed}: {answers[0]}"


def run_track(settings: Settings, options: "argparse.Namespace") -> int:
    check_command(options.command, settings.commands)
    # A wrong one is an error, not a reason to be off.
    if options.endpoint is not None:
        parse_endpoint(options.endpoint, "--endpoint")
    call = Call(settings, options.command)
    try:
        client = plan_delivery(call, options.endpoint)
        storage = Storage(find_directory(settings))
        config_data = storage.read_config()
        if config_data is None:
            config_data = run_first(settings, storage, client.url)
        # Another process may just have created it.
        check_enabled(parse_config(config_data))
    except (NotSent, ImportError, OSError) as error:
        show(f"Not sent. Telemetry is off: {describe_error(error)}")
        return 0
    text = send_and_wait(call, client, storage)
    delete_file(storage.backoff_path)
    show(text)
    return 0


def run_reset(settings: Settings, options: "argparse.Namespace") -> int:
    storage = Storage(find_directory(settings))
    check_owner(storage.config_path)
    try:
        os.unlink(storage.fingerprint_path)
    except (FileNotFoundError, NotADirectoryError):
        show("No fingerprint stored.")
    else:
        show("Fingerprint deleted; the next command makes a new one.")
    return 0


def start_collector(received: "list[tuple[str, bytes]]") -> "Any":
    """Start a collector on loopback that appends the head and the body of each request."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((f"{self.requestline}\n{self.headers}", body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def copy_module(directory: str) -> None:
    """Copy this file, whatever it is called and wherever it is loaded from. Raise CommandError."""
    loader: Any = globals().get("__loader__")
    path = globals().get("__file__")
    if path is None or not hasattr(loader, "get_data"):
        raise CommandError("selftest starts Python with this file, and here is none to start")
    ending = ".pyc" if path.endswith(".pyc") else ".py"
    write_file(os.path.join(directory, f"telemetry_copy{ending}"), loader.get_data(path))


def format_sample_tool(settings: Settings, directory: str, endpoint: str) -> str:
    """Return the source of a tool like this one that runs one command."""
    import json

    command = get_sample_command(settings)
    given = {name: getattr(settings, name) for name in vars(Settings) if not name.startswith("_")}
    given["directory"] = directory
    given["endpoint"] = endpoint
    given["commands"] = [command]
    # The request is shown, and they may hold an ingest token.
    given["headers"] = None
    given["opt_in"] = False
    return f"""
import json
import sys

sys.path.insert(0, {directory!r})
import telemetry_copy

telemetry_copy.initialize_telemetry(**json.loads({json.dumps(given)!r}))
telemetry_copy.track_command_execution({command!r})
"""


def clean_environment(settings: Settings) -> "dict[str, str]":
    """Return the environment without what turns telemetry off or on, and without a proxy."""
    names = ("CI", "DO_NOT_TRACK", settings.environment)
    env = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    env["no_proxy"] = "127.0.0.1"
    return env


def try_sample_tool(
    settings: Settings, source: str, received: "list[tuple[str, bytes]]"
) -> "tuple[str, list[str]]":
    """Run the tool four times. Return what it said, and a line for each outcome."""
    import subprocess

    variable = settings.environment
    env = clean_environment(settings)
    notices = []
    outcomes = []
    # What is tried, with which variables, and the number of requests so far.
    for text, variables, count in (
        ("the first run shows the notice and sends", {}, 1),
        ("the second run sends", {}, 2),
        ("DO_NOT_TRACK=1 turns it off", {"DO_NOT_TRACK": "1"}, 2),
        (f"{variable}=0 turns it off", {variable: "0"}, 2),
    ):
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-"],
            env=env | variables,
            input=source.encode(),
            capture_output=True,
        )
        said = done.stderr.decode(errors="replace").strip()
        if said:
            notices.append(said)
        is_unharmed = done.returncode == 0 and done.stdout == b""
        if is_unharmed and len(notices) == 1 and len(received) == count:
            outcomes.append(f"ok  {text}")
        else:
            outcomes.append(f"FAILED  {text}: {make_printable(said[-80:])}")
    return "\n".join(notices), outcomes


def run_selftest(settings: Settings, options: "argparse.Namespace") -> int:
    import json
    import tempfile

    if getattr(sys, "frozen", False) or not sys.executable:
        raise CommandError("selftest starts Python, and here is none to start")
    received: list[tuple[str, bytes]] = []
    with start_collector(received) as server, tempfile.TemporaryDirectory() as directory:
        check_owner(directory)
        copy_module(directory)
        source = format_sample_tool(settings, directory, f"http://127.0.0.1:{server.server_port}")
        notice, outcomes = try_sample_tool(settings, source, received)
        server.shutdown()
    show(f"What the first run says:\n\n{notice}\n")
    if received:
        head, body = received[0]
        show("What the collector receives for a command:\n")
        show(f"{head}{json.dumps(json.loads(body), indent=2)}\n")
    show("\n".join(outcomes))
    if any(outcome.startswith("FAILED") for outcome in outcomes):
        show("Failed.")
        return 1
    show("All passed.")
    return 0


def build_parser(settings: Settings) -> "argparse.ArgumentParser":
    import argparse

    tool = escape(describe_tool(settings))
    has_prog = isinstance(settings.prog, str) and settings.prog != ""
    prog = escape(settings.prog) if has_prog else tool
    text = f"Show or change the usage telemetry of {tool}."
    parser = argparse.ArgumentParser(prog, description=text)
    parser.add_argument("--version", action="version", version=f"telemetry {__version__}")
    parser.set_defaults(run=run_status, json=False)
    commands = parser.add_subparsers(metavar="COMMAND", help="status if none is given")

    def add(run: "Callable[..., int]", text: str, *names: str) -> "argparse.ArgumentParser":
        command = commands.add_parser(names[0], aliases=names[1:], help=text, description=text)
        command.set_defaults(run=run)
        return command

    status = add(run_status, "show whether telemetry is on, why, and where data goes", "status")
    status.add_argument("--json", action="store_true", help="show the same as JSON")
    add(run_switch, "turn telemetry on", "enable", "on").set_defaults(enabled=True)
    add(run_switch, "turn telemetry off", "disable", "off").set_defaults(enabled=False)
    text = "show the request that a command would send, and send nothing"
    preview = add(run_preview, text, "preview")
    preview.add_argument("command", metavar="COMMAND", nargs="?")
    track = add(run_track, "send one data point and show the response", "track")
    track.add_argument("command", metavar="COMMAND")
    track.add_argument("--endpoint", metavar="URL", help="send it there")
    add(run_reset, "delete the fingerprint", "reset")
    add(run_selftest, "test telemetry on this machine, with a collector of its own", "selftest")
    return parser


def run_command(settings: Settings, argv: "list[str] | None") -> int:
    """Run one command and return its exit code. Raise whatever says why it failed."""
    try:
        options = build_parser(settings).parse_args(argv)
    except SystemExit as stop:
        # argparse has shown the help (0) or what is wrong (2).
        code = 2 if stop.code else 0
    else:
        if options.run is not run_status:
            check_settings(settings)
        code = options.run(settings, options)
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def leave_stdout() -> None:
    """Keep Python from failing again when it flushes standard output at its end: documentation of
    signal, "Note on SIGPIPE"."""
    stdout = sys.__stdout__
    if stdout is None or stdout is not sys.stdout:
        return
    try:
        stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), stdout.fileno())
    except ValueError:
        # The host has closed it.
        pass


def is_reader_gone(error: Exception) -> bool:
    import errno

    # Windows has another error for it.
    is_invalid = isinstance(error, OSError) and error.errno == errno.EINVAL
    return isinstance(error, BrokenPipeError) or (os.name == "nt" and is_invalid)


def main(argv: "list[str] | None" = None, prog: "str | None" = None) -> int:
    """Run the command line, also under a tool's own command: `main(args, prog="acme telemetry")`.

    Returns the exit code: 0, 1 for an error or an invalid setting, 2 for a wrong usage, 130 after
    a Ctrl-C.
    """
    # An import beside that of a delivery can meet a half-made module.
    wait_for_imports()
    settings = Settings()
    vars(settings).update(vars(current_settings))
    if prog:
        settings.prog = prog
    try:
        return run_command(settings, argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # Whatever it is, a person reads one line, and no traceback.
        leave_stdout()
        if not is_reader_gone(error):
            show_error(f"{describe_tool(settings)}: error: {describe_error(error)}")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
