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

How a data point travels:

    track_command_execution()   the call, in a thread of the host
      Delivery.check()          settings, opt-out, config.toml, which the first run creates
      Delivery.start()          a daemon thread, which does the rest
        Delivery.prepare()      parse the config, choose the endpoint, encode
        Delivery.send()         one POST
    close_session()             at exit: wait for what is under way, not past its deadline

Each section uses those above it; a session and its deliveries also use each other. So the call
stands near the end, and the command line is last. Modules are imported where they are used: a tool
that is turned off, by `disable` or by a variable, imports no more than the four below.
"""

import os
import stat
import sys
import time

# As typing has it, which takes 7 ms to import. Annotations that Python evaluates stand in quotes.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import threading
    import urllib.request
    from collections.abc import Callable, Collection, Iterator
    from http.client import HTTPResponse
    from ssl import SSLContext
    from typing import Any

__version__ = "4.0.0"
__all__ = [
    "get_user_fingerprint",
    "initialize_telemetry",
    "main",
    "track_command_execution",
]


# Settings: what the tool says of itself, and the limits


class Settings:
    """What the tool says of itself: edit these values, or call initialize_telemetry()."""

    service_name = "trix-cli"
    service_version = "0.19.3"
    # The OTLP/HTTP base URL of the tool's own collector. Empty: there is none.
    endpoint = ""
    metric_name = "trix_command_invocation"
    # Where config.toml, fingerprint and backoff are kept.
    directory: "str | os.PathLike[str]" = "~/.tx3/trix"
    # A variable, and the prefix of two more: _ENDPOINT and _DEBUG.
    environment = "TRIX_TELEMETRY"
    # How a person reaches main(), such as "acme telemetry". Empty: texts name no command.
    prog = "python -m trix_telemetry"
    # The names that may be counted: a list, tuple, set or dict. None: any name of the right form.
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
MAX_REPLY_BYTES = 4096

# An empty variable counts as unset, so both hold "".
FALSE_WORDS = ("", "0", "false", "no", "off")
TRUE_WORDS = ("", "1", "true", "yes", "on")
HEX_DIGITS = "0123456789abcdefABCDEF"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


# Errors: their types, and their text for a person


class NotSent(Exception):
    """Nothing is sent, and why."""


class InvalidSetting(NotSent):
    """A setting is invalid: its name and what is allowed, never its value."""


class CommandError(Exception):
    """A command of the command line failed, and why."""


def describe_error(error: Exception) -> str:
    """Return in one line what went wrong."""
    if isinstance(error, ImportError):
        return f"this Python has no module {error.name}"
    if isinstance(error, (NotSent, CommandError, OSError)):
        return make_printable(str(error))
    # The text of another error may show the password of a proxy.
    return type(error).__name__


def make_printable(text: str) -> str:
    """Return foreign text as one line of at most 1000 characters, none a control character."""
    return "".join(c if c.isprintable() else "?" for c in text.strip()[:1000])


# Checks: which values may be used


def check_settings(settings: Settings) -> None:
    """Raise InvalidSetting where a value of the vendor's cannot be used."""
    required = ("service_name", "metric_name", "environment")
    for name in (*required, "service_version", "endpoint", "prog", "docs_url"):
        value = getattr(settings, name)
        is_line = isinstance(value, str) and value.isprintable()
        if not is_line or (name in required and value == ""):
            raise InvalidSetting(f"{name} of the tool must be one line of text")
    if settings.commands is not None:
        check_commands(settings.commands)
    if settings.headers is not None:
        check_headers(settings.headers, "headers of the tool")
    if not isinstance(settings.opt_in, bool):
        raise InvalidSetting("opt_in of the tool must be True or False")
    check_directory(settings.directory)


def check_directory(directory: "Any") -> None:
    """Raise InvalidSetting for what is no absolute path, and does not begin with ~."""
    if isinstance(directory, (str, os.PathLike)):
        path = os.fspath(directory)
        if (os.path.isabs(path) or path.startswith("~")) and "\0" not in path:
            return
    raise InvalidSetting("directory of the tool must be an absolute path, or begin with ~")


def check_commands(commands: "Any") -> None:
    """Raise InvalidSetting for what is no collection, or has no name that can be counted."""
    is_collection = isinstance(commands, (list, tuple, set, frozenset, dict))
    if not is_collection or not any(is_command_name(name) for name in commands):
        raise InvalidSetting("commands of the tool must be a list, tuple, set or dict with a name")


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


def check_headers(headers: "Any", source: str) -> None:
    """Raise InvalidSetting for what HTTP cannot carry: RFC 9110, section 5."""
    error = InvalidSetting(f"{source} must be a table of names and values in printable ASCII")
    if not isinstance(headers, dict):
        raise error
    for name, value in headers.items():
        for text in (name, value):
            if not isinstance(text, str) or not text.isascii() or not text.isprintable():
                raise error
        if name == "" or " " in name or ":" in name or name.lower() == "transfer-encoding":
            raise error


def parse_endpoint(base: "Any", source: str) -> str:
    """Return the URL for metrics: OTLP specification, "OTLP/HTTP Request". Raise InvalidSetting."""
    from urllib.parse import urlsplit

    allowed = "an http or https base URL with a host, without user info, query or fragment"
    error = InvalidSetting(f"{source} must be {allowed}")
    # urlsplit leaves out control characters, and takes an empty query or fragment for none.
    if not isinstance(base, str) or not base.isascii() or not base.isprintable():
        raise error
    if any(c in " ?#" for c in base):
        raise error
    try:
        parts = urlsplit(base)
        port = parts.port
    except ValueError:
        raise error from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise error
    # A host name or an IPv6 address, and a port; no user info.
    if not all(c.isalnum() or c in ".-_:[]" for c in parts.netloc):
        raise error
    path = parts.path.rstrip("/").removesuffix("/v1/metrics")
    return f"{parts.scheme}://{parts.netloc}{path}/v1/metrics"


# The config: what config.toml says


class TelemetryConfig:
    """The `[telemetry]` table of config.toml, as find_table() returns it; raises InvalidSetting.

    `timeout_ms` is in milliseconds, 1 to 60000. `enabled` and `otlp_endpoint` are None where they
    are missing.
    """

    def __init__(self, table: "dict[str, Any]") -> None:
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


def parse_config(data: bytes) -> TelemetryConfig:
    """Return what config.toml says. Raise InvalidSetting, ImportError."""
    if data == NEW_CONFIG:
        return TelemetryConfig({"enabled": True})
    return TelemetryConfig(find_table(parse_toml(data)))


def parse_toml(data: bytes) -> "dict[str, Any]":
    """Return the document in config.toml. Raise InvalidSetting, ImportError."""
    import tomllib

    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidSetting("config.toml must not be larger than 1 MiB")
    try:
        # Notepad and PowerShell put a byte order mark before the text.
        return tomllib.loads(data.removeprefix(BYTE_ORDER_MARK).decode())
    except (ValueError, RecursionError) as error:
        raise InvalidSetting(f"config.toml must be TOML in UTF-8: {error}") from None


def find_table(document: "dict[str, Any]") -> "dict[str, Any]":
    """Return the `[telemetry]` table, with a bool `enabled` if any. Raise InvalidSetting."""
    table = document.get("telemetry", {})
    if not isinstance(table, dict):
        raise InvalidSetting("telemetry must be a table")
    if not isinstance(table.get("enabled", True), bool):
        raise InvalidSetting("telemetry.enabled must be true or false")
    return table


def check_enabled(config: TelemetryConfig) -> None:
    """Raise NotSent unless config.toml says `enabled = true`."""
    if config.enabled is None:
        raise NotSent("config.toml has no telemetry.enabled")
    if not config.enabled:
        raise NotSent("config.toml says enabled = false")


# Opt-out: variables, standard streams that are closed, and the way to tell a person


def is_set(variable: str) -> bool:
    """Return whether a variable is anything but empty, 0, false, no or off."""
    return os.environ.get(variable, "").lower() not in FALSE_WORDS


def check_opt_out(settings: Settings) -> None:
    """Raise NotSent where a variable turns telemetry off."""
    if is_set("DO_NOT_TRACK"):
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


def write_stderr(text: str) -> None:
    """Write a line past the buffer, so that a failure is known at once.

    Raise OSError, and what a stream of the host's own class raises.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        # A stream in memory, as of a test or a notebook.
        sys.stderr.write(f"{text}\n")
        return
    sys.stderr.flush()
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    data = f"{text}\n".encode(encoding, "backslashreplace")
    while data:
        written = os.write(descriptor, data)
        data = data[written:]


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


def read_file(path: str, limit: int) -> bytes:
    """Return up to limit bytes of a regular file. Raise OSError."""
    # Before it is opened: a named pipe would wait, and some devices act on it.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file")
    with open(path, "rb") as file:
        return file.read(limit)


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
    """Place a new file. Raise FileExistsError where there is one."""
    try:
        os.link(temporary, path)
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError from None
        # A file system without hard links.
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
    """Make a directory and its parents, each 0700. Raise OSError."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    # The root of a drive that is not there is its own parent.
    if parent != path:
        make_directory(parent)
    # makedirs gives the mode to the last directory alone.
    os.makedirs(path, 0o700, exist_ok=True)


def check_owner(path: str) -> None:
    """Raise NotSent where this is root, and a directory or link on the way to path is not root's;
    OSError where it cannot be looked at.

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
    """The three files of a tool: config.toml, fingerprint and backoff.

    Raises InvalidSetting where the directory is no absolute path, NotSent where the home is not
    known or root must not follow it, OSError where it cannot be looked at.
    """

    def __init__(self, settings: Settings) -> None:
        check_directory(settings.directory)
        path = os.path.expanduser(settings.directory)
        if not os.path.isabs(path):
            raise NotSent("the home directory is not known")
        self.directory = path.replace("/", os.sep)
        self.config_path = os.path.join(self.directory, "config.toml")
        self.fingerprint_path = os.path.join(self.directory, "fingerprint")
        self.backoff_path = os.path.join(self.directory, "backoff")
        check_owner(self.config_path)

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
        """Store a fingerprint where there is no valid one. Raise OSError."""
        data = fingerprint.encode()
        try:
            write_file(self.fingerprint_path, data, link_file)
        except FileExistsError:
            # Of many first writers another one won, or what is there is damaged.
            if not self.read_fingerprint():
                write_file(self.fingerprint_path, data)

    def describe_backoff(self, url: str) -> str:
        """Return how long a back-off for url still takes, and why; "" where there is none."""
        try:
            modified = os.stat(self.backoff_path).st_mtime
            text = read_file(self.backoff_path, 4096).decode()
        except (OSError, ValueError):
            return ""
        age = time.time() - modified
        stored_url, _, reason = text.partition("\n")
        if stored_url != url or not 0 <= age < BACKOFF_SECONDS:
            return ""
        return f"{int(BACKOFF_SECONDS - age) + 1} s more: {make_printable(reason)}"

    def write_backoff(self, url: str, reason: str) -> None:
        """Begin ten minutes in which nothing is sent to url. Raise OSError."""
        write_file(self.backoff_path, f"{url}\n{reason}\n".encode())


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

        # Of two that are spelled alike but for capitals the later one counts.
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

    def build_opener(self) -> "urllib.request.OpenerDirector":
        """Return an opener for http and https. Raise ImportError, OSError.

        The default one follows redirects, opens files, and raises for a status of 400 and more.
        """
        import urllib.request

        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.ProxyHandler(find_proxies()))
        opener.add_handler(urllib.request.UnknownHandler())
        # 0, for a debug level that the host has set would print the request.
        opener.add_handler(urllib.request.HTTPHandler(debuglevel=0))
        if self.url.startswith("https:"):
            context = make_tls_context()
            opener.add_handler(urllib.request.HTTPSHandler(debuglevel=0, context=context))
        return opener


def find_proxies() -> "dict[str, str]":
    import urllib.request

    # On macOS the look-up in the system's settings is not safe beside a fork.
    if sys.platform == "darwin":
        return urllib.request.getproxies_environment()
    return urllib.request.getproxies()


def make_tls_context() -> "SSLContext":
    """Return a context that verifies with the authorities of the system."""
    import ssl

    paths = ssl.get_default_verify_paths()
    # A bundle that the variable SSL_CERT_FILE names goes first.
    if not paths.capath or os.environ.get(paths.openssl_cafile_env):
        return ssl.create_default_context()
    # From a directory of hashed names OpenSSL reads the one authority that it needs. To parse a
    # bundle of all takes 25 ms.
    if any(name.endswith(".0") for name in os.listdir(paths.capath)):
        return ssl.create_default_context(capath=paths.capath)
    return ssl.create_default_context()


def configure_client(
    settings: Settings, config: TelemetryConfig, requested: "str | None" = None
) -> OtlpClient:
    """Return the client for the requested endpoint, else that of the environment, of config.toml,
    of the tool. An empty one counts, too: it means nowhere. Raise NotSent, InvalidSetting."""
    variable = f"{settings.environment}_ENDPOINT"
    headers = config.otlp_headers
    if requested is not None:
        base, source = requested, "--endpoint"
    elif variable in os.environ:
        base, source = os.environ[variable], variable
    elif config.otlp_endpoint is not None:
        base, source = config.otlp_endpoint, "telemetry.otlp_endpoint"
    else:
        base, source = settings.endpoint, "endpoint of the tool"
        # The headers of the tool go to its own endpoint alone.
        headers = (settings.headers or {}) | headers
    if not base:
        raise NotSent(f"there is no endpoint: {source} is empty")
    return OtlpClient(parse_endpoint(base, source), headers, config.timeout_ms / 1000)


# The first run: whether it may create the config, and the notice


def check_first_run(settings: Settings, storage: Storage) -> None:
    """Raise NotSent where config.toml, which is missing, may not or cannot be created."""
    if settings.opt_in:
        raise NotSent(f"it is opt-in, and {storage.config_path} does not exist")
    if is_set("CI"):
        raise NotSent(f"CI is set, and {storage.config_path} does not exist")
    check_creatable(storage.config_path)


def create_config(settings: Settings, storage: Storage, url: str) -> bytes:
    """Create config.toml, show the notice, and return what the file says by then.

    Raise NotSent, OSError, and what the host's own stream raises.
    """
    make_directory(storage.directory)
    try:
        write_file(storage.config_path, NEW_CONFIG, link_file)
    except FileExistsError:
        # Another process has just created it: a first run, which tells, or a `disable`.
        return storage.read_config() or b""
    try:
        write_stderr(format_notice(settings, storage, url))
    except BaseException:
        # The notice was not shown, so the file is taken back, unless somebody has changed it; also
        # after a Ctrl-C.
        if storage.read_config() == NEW_CONFIG:
            delete_file(storage.config_path)
        raise
    return storage.read_config() or b""


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


# The session: what all deliveries of a process share, and its hooks for forks and the end


class Session:
    """The deliveries of one process that are under way, and what they share."""

    def __init__(self) -> None:
        import threading

        # Python 3.13.0 breaks collections.abc where two threads import it at once, as a delivery
        # and a host may.
        if sys.version_info[:3] == (3, 13, 0):
            import collections.abc  # noqa: F401

        # Reentrant: a signal handler may track in the middle of a track.
        self.lock = threading.RLock()
        self.deliveries: set[Delivery] = set()
        self.interval_end = 0
        self.fingerprint = ""
        self.has_warned = False

    def make_interval(self, start: int) -> "tuple[int, int]":
        """Return the start and the end of an interval, in Unix nanoseconds.

        It starts where the last one ended, if that is later, and takes a millisecond at least.
        """
        with self.lock:
            start = max(start, self.interval_end)
            self.interval_end = max(time.time_ns(), start + MIN_INTERVAL_NS)
            return start, self.interval_end

    def propose_fingerprint(self) -> str:
        """Return the fingerprint that this process would store."""
        # Without the lock: a host could wait for it in the middle of the same imports.
        if not self.fingerprint:
            self.fingerprint = make_fingerprint()
        return self.fingerprint

    def identify(self, storage: Storage, may_create: bool) -> str:
        """Return the stored fingerprint, else one of this process, which is stored if it may be."""
        stored = storage.read_fingerprint()
        if stored:
            return stored
        proposed = self.propose_fingerprint()
        if not may_create:
            return proposed
        try:
            storage.write_fingerprint(proposed)
        except OSError:
            # The disk cannot be written.
            return proposed
        # Forget it: after a `reset`, this process proposes a new one.
        self.fingerprint = ""
        return storage.read_fingerprint() or proposed

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
        """Wait for each delivery; begin a back-off where the process waits long in total."""
        waited = 0.0
        for delivery in list(self.deliveries):
            try:
                delivery.wait()
            finally:
                # Also where a Ctrl-C has ended the wait.
                waited += delivery.waited
                if waited > delivery.client.timeout / 2:
                    reason = f"a command waited {waited:.1f} s for the network"
                    delivery.storage.write_backoff(delivery.client.url, reason)


current_session: "Session | None" = None


def get_session() -> Session:
    """Return the session of this process, whose hooks are registered once."""
    global current_session
    if current_session is None:
        import atexit

        current_session = Session()
        atexit.register(close_session)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=wait_for_imports, after_in_child=renew_session)
    return current_session


def renew_session() -> None:
    """Give a forked child a session of its own."""
    global current_session
    current_session = Session()


def wait_for_imports() -> None:
    """Wait, half a second at most, until no delivery imports any more: an import that a fork or the
    end of the process cuts off leaves a lock for which others would wait for ever."""
    deadline = time.monotonic() + MAX_IMPORT_SECONDS
    try:
        for delivery in list(get_session().deliveries):
            delivery.is_prepared.wait(max(deadline - time.monotonic(), 0))
    except BaseException:
        # What a signal handler raises ends the wait. From a hook, Python would only print it.
        pass


def close_session() -> None:
    """Wait at exit for the deliveries under way."""
    try:
        # So that whoever reads the host's pipes has all of its output before the wait.
        flush(sys.stdout)
        flush(sys.stderr)
        get_session().close()
    except BaseException:
        # What a signal handler raises ends the wait. Python would print it, and any failure.
        pass
    wait_for_imports()


def flush(stream: "Any") -> None:
    try:
        stream.flush()
    except Exception:
        # It may be None, closed, or of a class of the host's own.
        pass


# A delivery: one data point, from the call to the response


class Delivery:
    """One data point on its way to the collector, in three steps: check(), prepare(), send().

    A host starts a thread after the first. `status` and `preview` take the first two, with
    `may_create` False. `requested` is an endpoint in place of the configured one.
    """

    # Set by check().
    storage: Storage
    config_data: bytes
    # Set by prepare().
    body: bytes
    request: "urllib.request.Request"
    opener: "urllib.request.OpenerDirector"
    # Set by start(). The event: prepare() has ended, and there is only the network to wait for.
    is_prepared: "threading.Event"
    thread: "threading.Thread"

    def __init__(
        self,
        settings: Settings,
        command: str,
        requested: "str | None" = None,
        may_create: bool = True,
    ) -> None:
        self.settings = settings
        self.command = command
        self.requested = requested
        self.may_create = may_create
        # When the call was made, in Unix nanoseconds and in seconds of the monotonic clock.
        self.time_ns = time.time_ns()
        self.moment = time.monotonic()
        # Nowhere, until the config is parsed.
        self.client = OtlpClient("", {}, DEFAULT_TIMEOUT_MS / 1000)
        # What came of it, and the seconds that the process has waited for the network.
        self.response: HTTPResponse | None = None
        self.reply: bytes | None = None
        self.failure: Exception | None = None
        self.waited = 0.0

    def check(self) -> None:
        """Check all that needs no parser; on the first run of the tool, create its config.

        Raise NotSent, OSError.
        """
        check_settings(self.settings)
        check_opt_out(self.settings)
        check_streams()
        check_command(self.command, self.settings.commands)
        self.storage = Storage(self.settings)
        found = self.storage.read_config()
        if found is None:
            check_first_run(self.settings, self.storage)
            client = configure_client(self.settings, TelemetryConfig({}), self.requested)
            found = NEW_CONFIG
            if self.may_create:
                found = create_config(self.settings, self.storage, client.url)
        self.config_data = found

    def start(self) -> "threading.Thread":
        """Start the thread that does the rest. Raise NotSent; RuntimeError where none can start."""
        import threading

        self.is_prepared = threading.Event()
        self.thread = threading.Thread(target=self.run, name="telemetry", daemon=True)
        session = get_session()
        with session.lock:
            if len(session.deliveries) >= MAX_DELIVERIES:
                raise NotSent(f"{MAX_DELIVERIES} deliveries are under way")
            session.deliveries.add(self)
        try:
            self.thread.start()
        except BaseException:
            # Threads cannot start, or a signal handler of the host's has raised.
            session.deliveries.discard(self)
            raise
        return self.thread

    def run(self) -> None:
        # So the caller goes on at once, and not after the interpreter's switch interval of 5 ms.
        time.sleep(0.001)
        session = get_session()
        try:
            try:
                self.prepare()
            except InvalidSetting as error:
                session.warn(error)
                raise
            except (ImportError, AttributeError):
                # Of two threads that import the same modules one can meet a half-made one.
                self.prepare()
            self.check_backoff()
            self.is_prepared.set()
            self.send()
        except Exception as error:
            # The host learns of no failure; `track` shows it to the person who asks.
            self.failure = error
        finally:
            self.is_prepared.set()
            session.deliveries.discard(self)

    def prepare(self) -> None:
        """Do all but the network. Raise NotSent, ImportError, OSError."""
        # A look-up of a host name would import it while sending.
        import encodings.idna  # noqa: F401

        config = parse_config(self.config_data)
        check_enabled(config)
        self.client = configure_client(self.settings, config, self.requested)
        session = get_session()
        resource = {
            "service.name": self.settings.service_name,
            "service.version": self.settings.service_version,
            "user.fingerprint": session.identify(self.storage, self.may_create),
        }
        start, end = session.make_interval(self.time_ns)
        metric = CommandMetric(self.settings.metric_name, self.command, start, end)
        self.body = metric.encode(resource)
        self.request = self.client.build_request(self.body)
        self.opener = self.client.build_opener()

    def check_backoff(self) -> None:
        """Raise NotSent while a back-off for the collector runs."""
        backoff = self.storage.describe_backoff(self.client.url)
        if backoff:
            raise NotSent(f"back-off for {backoff}")

    def send(self) -> None:
        """Post the data point, and keep the response. Raise what urllib raises, and NotSent."""
        # The host may have become a daemon by now.
        check_streams()
        timeout = max(self.measure_remaining(), 0.001)
        with self.opener.open(self.request, timeout=timeout) as response:
            self.response = response
            if response.status in (429, 503):
                reason = f"the collector answered HTTP {response.status}"
                self.storage.write_backoff(self.client.url, reason)
            self.reply = response.read1(MAX_REPLY_BYTES)

    def measure_remaining(self) -> float:
        """Return the seconds until the deadline."""
        return self.moment + self.client.timeout - time.monotonic()

    def wait(self) -> None:
        """Wait for the end, not past the deadline."""
        while not self.is_prepared.is_set() and self.measure_remaining() > 0:
            self.is_prepared.wait(min(WAIT_SECONDS, self.measure_remaining()))
        began = time.monotonic()
        try:
            while self.thread.is_alive() and self.measure_remaining() > 0:
                self.thread.join(min(WAIT_SECONDS, self.measure_remaining()))
        finally:
            self.waited = time.monotonic() - began


def plan_delivery(settings: Settings, command: str) -> Delivery:
    """Return a delivery that is ready to be sent, without making anything.

    Raise NotSent, ImportError, OSError.
    """
    delivery = Delivery(settings, command, may_create=False)
    delivery.check()
    delivery.prepare()
    return delivery


def explain_delivery(settings: Settings, command: str) -> str:
    """Return the request that would be sent, or why none would."""
    try:
        delivery = plan_delivery(settings, command)
        delivery.check_backoff()
    except (NotSent, ImportError, OSError) as error:
        return f"{settings.service_name}: telemetry is off: {describe_error(error)}"
    return f"{settings.service_name}: telemetry would send\n{format_request(delivery)}"


def format_request(delivery: Delivery) -> str:
    """Return the request as on the wire, the values of the added headers hidden."""
    client = delivery.client
    hidden = dict.fromkeys(client.headers, "(hidden)")
    request = OtlpClient(client.url, hidden, client.timeout).build_request(delivery.body)
    lines = [f"POST {request.selector} HTTP/1.1"]
    for name, value in request.header_items():
        lines.append(f"{name.title()}: {value}")
    return "\n".join([*lines, "", delivery.body.decode()])


# What a tool calls: the public functions


current_settings = Settings()


def track_command_execution(name: str) -> "threading.Thread | None":
    """Count one run of the command `name`, which is `[A-Za-z][A-Za-z0-9_-]{0,63}`.

    Returns the daemon thread that delivers it, None where nothing will be sent. Raises nothing.
    At exit the process waits for what is left of `timeout_ms` since the call.
    """
    # Called by a late destructor: the interpreter has cleared this module, or starts no thread.
    if sys is None or sys.is_finalizing():
        return None
    # A host that has not imported it has no handlers of its own.
    signal: Any = sys.modules.get("signal")
    if not hasattr(signal, "pthread_sigmask"):
        return start_delivery(name)
    # What a handler raises is not ours to catch, so it runs before or after. The mask is asked for
    # before it is set, for a handler may run at once.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # The standard signals; valid_signals() takes long. The thread inherits the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        return start_delivery(name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_delivery(command: str) -> "threading.Thread | None":
    """Start the delivery of a command, or explain it; None where nothing will be sent."""
    settings = current_settings
    try:
        if is_set(f"{settings.environment}_DEBUG"):
            write_stderr(explain_delivery(settings, command))
            return None
        delivery = Delivery(settings, command)
        delivery.check()
        # No parser is needed to know that it does not say enabled = true.
        if b"true" not in delivery.config_data:
            return None
        return delivery.start()
    except Exception:
        # No failure reaches the host.
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
    settings.directory = choose_directory(slug) if directory is None else directory
    settings.environment = f"{slug.upper()}_TELEMETRY" if environment is None else environment
    settings.prog = "" if prog is None else prog
    settings.commands = commands
    settings.headers = headers
    settings.docs_url = "" if docs_url is None else docs_url
    settings.opt_in = opt_in
    current_settings = settings


def make_slug(service_name: str) -> str:
    """Return ASCII letters and digits in lower case, all else as `_`."""
    # A name may be of another type by mistake.
    text = str(service_name)
    return "".join(c.lower() if c.isascii() and c.isalnum() else "_" for c in text)


def choose_directory(slug: str) -> str:
    """Return the directory of a tool that names none."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        base = "~/.config"
        if os.name == "nt":
            base = os.environ.get("APPDATA") or "~/AppData/Roaming"
    return f"{base}/{slug}/telemetry"


def get_user_fingerprint() -> str:
    """Return the stored fingerprint, 1 to 64 hex digits, else the one that the next send stores."""
    try:
        storage = Storage(current_settings)
    except (NotSent, OSError):
        return get_session().propose_fingerprint()
    return get_session().identify(storage, may_create=False)


# The command line: main(), and what runs only where a person asks for it


def show(text: str) -> None:
    """Print text, with what the encoding of standard output lacks as backslash escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def show_error(text: str) -> None:
    try:
        write_stderr(text)
    except Exception:
        # It is closed, or of a class of the host's own, and there is no other place.
        pass


def choose_sample(settings: Settings) -> str:
    """Return the alphabetically first command that can be counted."""
    if settings.commands is None:
        return "build"
    return min(name for name in settings.commands if is_command_name(name))


def run_status(settings: Settings, options: "argparse.Namespace") -> int:
    facts = collect_facts(settings)
    code = 0
    try:
        check_settings(settings)
        plan_delivery(settings, choose_sample(settings))
        facts["enabled"] = True
    except (NotSent, ImportError, OSError) as error:
        facts["reason"] = describe_error(error)
        if isinstance(error, InvalidSetting):
            code = 1
    if options.json:
        import json

        show(json.dumps(facts, indent=2))
    else:
        show(format_status(settings, facts))
    return code


def collect_facts(settings: Settings) -> "dict[str, Any]":
    """Return what `status` shows, None for what there is not."""
    facts: dict[str, Any] = {
        "tool": str(settings.service_name),
        "enabled": False,
        "reason": None,
        "endpoint": None,
        "encrypted": None,
        "fingerprint": None,
        "backoff": None,
        "config": None,
        "docs_url": None,
    }
    try:
        storage = Storage(settings)
        facts["config"] = storage.config_path
        facts["fingerprint"] = storage.read_fingerprint() or None
        check_settings(settings)
        facts["docs_url"] = settings.docs_url or None
        data = storage.read_config()
        url = configure_client(settings, parse_config(NEW_CONFIG if data is None else data)).url
        facts["endpoint"] = url
        facts["encrypted"] = url.startswith("https:")
        facts["backoff"] = storage.describe_backoff(url) or None
    except (NotSent, ImportError, OSError):
        # What is known so far is shown, and the reason.
        pass
    return facts


def format_status(settings: Settings, facts: "dict[str, Any]") -> str:
    if facts["enabled"]:
        first = f"Telemetry of {facts['tool']} is on"
    else:
        first = f"Telemetry of {facts['tool']} is off: {facts['reason']}"
    config = facts["config"]
    if facts["enabled"] and not os.path.exists(config):
        config = f"{config} (the first command creates it)"
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
        "Config": config,
        "Change": change,
        "Variables": f"DO_NOT_TRACK=1, {variable}=0, {variable}_DEBUG=1",
        "Read more": facts["docs_url"],
    }
    return "\n".join([first, *(f"  {label:<13}{text}" for label, text in rows.items() if text)])


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
    before = parse_toml(data)
    table = find_table(before)
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
            if parse_toml(edited) == wanted:
                return edited
        except InvalidSetting:
            continue
    raise CommandError(f"the text is too unusual: write enabled = {value} for telemetry by hand")


def save_enabled(storage: Storage, is_enabled: bool) -> None:
    """Set `enabled` in config.toml. Raise NotSent, CommandError, OSError."""
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
    if edited != data:
        # A link stays a link.
        path = os.path.realpath(storage.config_path)
        write_file(path, edited, replace_file, stat.S_IMODE(os.stat(path).st_mode))


def run_switch(settings: Settings, options: "argparse.Namespace") -> int:
    storage = Storage(settings)
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
    try:
        check_settings(settings)
        plan_delivery(settings, choose_sample(settings))
    except (NotSent, ImportError, OSError) as error:
        show(f"It stays off: {describe_error(error)}")
    return 0


def run_preview(settings: Settings, options: "argparse.Namespace") -> int:
    check_settings(settings)
    command = options.command
    if command is None:
        command = choose_sample(settings)
    show(explain_delivery(settings, command))
    return 0


def wait_for_answer(delivery: Delivery) -> str:
    """Wait for a delivery, and return what came of it.

    Raise CommandError where that is a failure, NotSent and ImportError where nothing was sent.
    """
    try:
        delivery.wait()
    finally:
        # The person has waited here, so the end of the process does not wait for it again.
        get_session().deliveries.discard(delivery)
        delivery.is_prepared.wait(MAX_IMPORT_SECONDS)
    elapsed = f"{(time.monotonic() - delivery.moment) * 1000:.0f} ms"
    if isinstance(delivery.failure, (NotSent, ImportError)):
        raise delivery.failure
    try:
        answer = read_answer(delivery)
    except CommandError as error:
        raise CommandError(f"{delivery.client.url} after {elapsed}: {error}") from None
    return f"Sent to {delivery.client.url} in {elapsed}: {answer}"


def read_answer(delivery: Delivery) -> str:
    """Return what the collector says of a data point that it accepted. Raise CommandError for any
    other answer, and for none: OTLP specification, "OTLP/HTTP Response"."""
    from urllib.error import URLError

    if isinstance(delivery.failure, URLError):
        raise CommandError(str(delivery.failure.reason))
    if delivery.failure is not None:
        raise CommandError(describe_error(delivery.failure))
    response = delivery.response
    reply = delivery.reply
    if response is None or reply is None:
        raise CommandError("timed out")
    words = f"HTTP {response.status}"
    if not 200 <= response.status < 300:
        text = reply.decode(errors="replace")
        location = response.headers.get("Location")
        if location:
            text = f"it redirects to {location}, which is not followed"
        raise CommandError(add_message(words, text))
    if response.headers.get_content_type() == "text/html":
        raise CommandError(
            f"{words}, but the answer is a web page: is this the URL of a collector?"
        )
    rejected, text = parse_partial_success(reply)
    if rejected > 0:
        words = f"{words}: {rejected} data point rejected"
        raise CommandError(add_message(words, text or "no reason given"))
    return add_message(words, text)


def add_message(words: str, message: str) -> str:
    """Return our words, followed by the collector's message where there is one."""
    text = make_printable(message)[:200]
    return f"{words}: {text}" if text else words


def parse_partial_success(reply: bytes) -> "tuple[int, str]":
    """Return how many data points were rejected, and the message of the collector."""
    import json

    try:
        partial = json.loads(reply)["partialSuccess"]
        rejected = partial.get("rejectedDataPoints") or 0
        return int(rejected), str(partial.get("errorMessage") or "")
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # No partial success: an empty body, as a collector may send, or anything else.
        return 0, ""


def run_track(settings: Settings, options: "argparse.Namespace") -> int:
    check_settings(settings)
    check_command(options.command, settings.commands)
    # An invalid URL is an error, not a reason to be off.
    if options.endpoint is not None:
        parse_endpoint(options.endpoint, "--endpoint")
    delivery = Delivery(settings, options.command, options.endpoint)
    try:
        delivery.check()
        delete_file(delivery.storage.backoff_path)
        delivery.start()
        text = wait_for_answer(delivery)
    except (NotSent, ImportError, OSError) as error:
        text = f"Not sent. Telemetry is off: {describe_error(error)}"
    show(text)
    return 0


def run_reset(settings: Settings, options: "argparse.Namespace") -> int:
    storage = Storage(settings)
    try:
        os.unlink(storage.fingerprint_path)
    except (FileNotFoundError, NotADirectoryError):
        show("No fingerprint stored.")
    else:
        show("Fingerprint deleted; the next send makes a new one.")
    return 0


def run_selftest(settings: Settings, options: "argparse.Namespace") -> int:
    check_settings(settings)
    variable = settings.environment
    kept = dict(os.environ)
    try:
        for name in ("CI", "DO_NOT_TRACK", variable, f"{variable}_ENDPOINT"):
            os.environ.pop(name, None)
        os.environ["no_proxy"] = "127.0.0.1"
        show(deliver_on_loopback(settings))
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return 0


def deliver_on_loopback(settings: Settings) -> str:
    """Deliver from a new home to a collector on loopback, and return what it received.

    Raise CommandError, NotSent, ImportError, OSError.
    """
    import copy
    import http.server
    import socketserver
    import tempfile

    received = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with (
        tempfile.TemporaryDirectory() as directory,
        socketserver.TCPServer(("127.0.0.1", 0), Collector) as server,
    ):
        server.timeout = DEFAULT_TIMEOUT_MS / 1000
        settings = copy.copy(settings)
        settings.directory = directory
        settings.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        settings.opt_in = False
        delivery = Delivery(settings, choose_sample(settings))
        delivery.check()
        delivery.start()
        server.handle_request()
        answer = wait_for_answer(delivery)
    return f"\nThe collector received:\n{received[0].decode()}\n\n{answer}"


def build_parser(settings: Settings) -> "argparse.ArgumentParser":
    import argparse

    # Either may be of another type by mistake.
    prog = str(settings.prog or settings.service_name)
    text = f"Show or change the usage telemetry of {settings.service_name}."
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
        code = options.run(settings, options)
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def leave_stdout() -> None:
    """Keep Python from failing again when it flushes standard output at its end: documentation of
    signal, "Note on SIGPIPE"."""
    stdout = sys.__stdout__
    if stdout is None:
        return
    try:
        stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), stdout.fileno())
    except ValueError:
        # The host has closed it.
        pass


def main(argv: "list[str] | None" = None, prog: "str | None" = None) -> int:
    """Run the command line, also under a tool's own command: `main(args, prog="acme telemetry")`.

    Returns the exit code: 0, 1 for an error or an invalid setting, 2 for a wrong usage, 130 after
    a Ctrl-C.
    """
    import copy

    settings = copy.copy(current_settings)
    if prog:
        settings.prog = prog
    try:
        return run_command(settings, argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # Whatever it is, a person reads one line, and no traceback.
        leave_stdout()
        # Nobody reads after `status | head`.
        if not isinstance(error, BrokenPipeError):
            show_error(f"{settings.service_name}: error: {describe_error(error)}")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
