# SPDX-License-Identifier: Apache-2.0
"""Anonymous usage telemetry for a command-line tool, in one file to copy.

    import trix_telemetry
    trix_telemetry.track_command_execution("build")

For each command that a person runs, one OTLP/HTTP JSON data point is sent: the name of the
command, the name and version of the tool, two timestamps and a random fingerprint.
Never sent: arguments, paths, file contents, environment variables, user or host names.

Turn it off: DO_NOT_TRACK=1, TRIX_TELEMETRY=0, or `python -m trix_telemetry disable`.
Vendor it: copy this file under any name. Then call initialize_telemetry(), or edit the values of
`Settings`, and nothing else. What runs inside a tool ends where the command line begins.
Imports stand where they are used, so that a tool whose telemetry is off imports nothing.
"""

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import ssl
    import threading
    import urllib.request
    from collections.abc import Callable, Collection, Iterator
    from typing import Any

__version__ = "2.0.0"
MODULE = getattr(__spec__, "name", os.path.basename(__file__)[:-3])


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
    prog = f"python -m {MODULE}"
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
DEFAULT_TIMEOUT_MS, MAX_TIMEOUT_MS = 2000, 60_000
MAX_SENDS, BACKOFF_SECONDS = 4, 600
# OTLP metrics data model, "Resets and Gaps"; stores that keep milliseconds need a whole one.
MIN_INTERVAL_NS = 1_000_000
# How often the exit looks at a send. Later than this the host is busy; Windows counts 16 ms ticks.
POLL_SECONDS, LATE_SECONDS = 0.02, 0.035
# A response that is not read at all resets the connection of the collector.
MAX_CONFIG_BYTES, MAX_BODY = 1 << 20, 4096
NO = ("", "0", "false", "no", "off")
YES = ("", "1", "true", "yes", "on")
# RFC 3986: scheme, host or IPv6 address, port, path; neither user info, query nor fragment.
BASE_URL = r"(https?)://([\w.-]+|\[[\da-f:.]+\])(?::(\d{1,5}))?(/[\w.~!$&'()*+,;=:@%/-]*)?"
# RFC 9110, section 5: name and value, a line each; without those that the request needs.
HEADER = (
    r"(?!(?:user-agent|content-type|content-length|host|connection|transfer-encoding)\n)"
    r"[!#$%&'*+.^_`|~0-9a-z-]+\n[\t -~\xa0-\xff]*"
)


class NotSent(Exception):
    """Nothing is sent, and why."""


class InvalidSetting(NotSent):
    """A setting is invalid: its name and what is allowed, never its value."""


def check_command(name: object, commands: "Collection[str] | None") -> None:
    """Raise NotSent for what is not `[A-Za-z][A-Za-z0-9_-]{0,63}`, or not among the commands."""
    text = name if isinstance(name, str) else ""
    letters = text.replace("-", "").replace("_", "")
    if len(text) > 64 or not (text.isascii() and text[:1].isalpha() and letters.isalnum()):
        raise NotSent("a command name is a letter and up to 63 letters, digits, - or _")
    if commands is not None and text not in commands:
        raise NotSent(f"{text} is not among the tool's commands")


def parse_endpoint(base: "Any", source: str) -> str:
    """Return the URL for metrics: OTLP specification, "OTLP/HTTP Request". Raise InvalidSetting."""
    import re
    from urllib.parse import urlsplit

    match = isinstance(base, str) and re.fullmatch(BASE_URL, base, re.I | re.A)
    if not match or catch(urlsplit, base) or not 0 < int(match[3] or 80) < 65536:
        allowed = "an http or https base URL with a host, without user info, query or fragment"
        raise InvalidSetting(f"{source} must be {allowed}")
    scheme, authority = match[1].lower(), base[match.start(2) : max(match.end(2), match.end(3))]
    path = (match[4] or "").rstrip("/").removesuffix("/v1/metrics")
    return f"{scheme}://{authority}{path}/v1/metrics"


def select_headers(headers: "Any", source: str) -> "dict[str, str]":
    """Return the valid headers. Raise InvalidSetting for what is not a table of strings."""
    import re

    if not isinstance(headers, dict) or {*map(type, headers), *map(type, headers.values())} - {str}:
        raise InvalidSetting(f"{source} must be a table of strings")
    return {k: v for k, v in headers.items() if re.fullmatch(HEADER, f"{k}\n{v}", re.I | re.A)}


class TelemetryConfig:
    """The `[telemetry]` table of config.toml, checked: `timeout_ms` in milliseconds, 1 to 60000,
    `enabled` and `otlp_endpoint` None where they are missing. Raises InvalidSetting."""

    def __init__(self, table: "Any") -> None:
        if not isinstance(table, dict):
            raise InvalidSetting("telemetry must be a table")
        self.enabled: bool | None = table.get("enabled")
        if not isinstance(table.get("enabled", True), bool):
            raise InvalidSetting("telemetry.enabled must be true or false")
        self.timeout_ms: int = table.get("timeout_ms", DEFAULT_TIMEOUT_MS)
        if type(self.timeout_ms) is not int or not 1 <= self.timeout_ms <= MAX_TIMEOUT_MS:
            raise InvalidSetting(f"telemetry.timeout_ms must be an integer, 1 to {MAX_TIMEOUT_MS}")
        self.otlp_endpoint: str | None = table.get("otlp_endpoint")
        if table.get("otlp_endpoint", "") != "":
            parse_endpoint(self.otlp_endpoint, "telemetry.otlp_endpoint")
        self.otlp_headers = select_headers(table.get("otlp_headers", {}), "telemetry.otlp_headers")


class CommandMetric:
    """One run of a command: a data point of a cumulative sum, its times in Unix nanoseconds.
    Each point is a true reset: OpenTelemetry metrics data model, "Resets and Gaps"."""

    def __init__(self, name: str, command: str, start: int, end: int) -> None:
        self.name, self.command, self.start, self.end = name, command, start, end

    def encode(self, resource: "dict[str, str]") -> bytes:
        """Return an ExportMetricsServiceRequest with these resource attributes."""
        import json

        point = {
            "attributes": [{"key": "command_name", "value": {"stringValue": self.command}}],
            "startTimeUnixNano": str(self.start),
            "timeUnixNano": str(self.end),
            "asInt": "1",
        }
        # AGGREGATION_TEMPORALITY_CUMULATIVE is 2.
        total = {"dataPoints": [point], "aggregationTemporality": 2, "isMonotonic": True}
        attributes = [{"key": k, "value": {"stringValue": v}} for k, v in resource.items()]
        resource_metrics = {
            "resource": {"attributes": attributes},
            "scopeMetrics": [{"scope": {}, "metrics": [{"name": self.name, "sum": total}]}],
        }
        return json.dumps({"resourceMetrics": [resource_metrics]}, separators=(",", ":")).encode()


def check_settings(settings: Settings) -> None:
    """Raise InvalidSetting where a value of the vendor's cannot be used."""
    needed = ("service_name", "metric_name", "environment")
    for name in (*needed, "service_version", "endpoint", "directory", "prog", "docs_url"):
        value = getattr(settings, name)
        if not isinstance(value, str) or not value.isprintable() or (name in needed and not value):
            raise InvalidSetting(f"{name} of the tool must be one line of text")
    names: Any = settings.commands or ()
    is_collection = hasattr(names, "__contains__") and not isinstance(names, str)
    if not is_collection or not all(isinstance(name, str) for name in names):
        raise InvalidSetting("commands of the tool must be a collection of names")
    if not isinstance(settings.opt_in, bool):
        raise InvalidSetting("opt_in of the tool must be True or False")


def check_opt_out(settings: Settings) -> None:
    """Raise NotSent where a variable turns telemetry off, or a standard stream is closed."""
    if os.environ.get("DO_NOT_TRACK", "").lower() not in NO:
        raise NotSent("DO_NOT_TRACK is set")
    if os.environ.get(settings.environment, "").lower() not in YES:
        raise NotSent(f"{settings.environment} is set, and not to 1, true, yes or on")
    for descriptor, name in enumerate(("input", "output", "error")):
        try:
            os.fstat(descriptor)
        except OSError:
            # A socket would get its number, and what the host writes there.
            raise NotSent(f"standard {name} is closed") from None


def write_stderr(text: str) -> None:
    """Write past the buffer. Raise OSError, also for a pipe that is full or has no reader."""
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        # A stream in memory, as of a test or a notebook.
        sys.stderr.write(f"{text}\n")
        return
    sys.stderr.flush()
    if sys.platform != "win32":
        import select

        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        events = poll.poll(0)
        if not events or events[0][1] & (select.POLLERR | select.POLLHUP):
            raise OSError("standard error takes no text")
    data = f"{text}\n".encode(sys.stderr.encoding or "utf-8", "backslashreplace")
    while data:
        data = data[os.write(descriptor, data) :]


def catch(function: "Callable[..., object]", *args: "Any", **options: "Any") -> "Exception | None":
    """Call function and return what it raises, for no failure may reach the host."""
    try:
        function(*args, **options)
    except Exception as error:
        return error
    return None


def find_directory(settings: Settings) -> str:
    """Return the absolute path of the tool's directory. Raise NotSent where there is no home."""
    path = settings.directory
    # Without HOME, expanduser() asks the password database, which may be a network away.
    if path.startswith("~") and (os.name == "nt" or os.environ.get("HOME")):
        path = os.path.expanduser(path)
    if not os.path.isabs(path):
        raise NotSent(f"{path} is no absolute path; is HOME set to one?")
    return path.replace("/", os.sep)


def read_file(path: str, limit: int) -> bytes:
    """Return up to limit bytes of a regular file. Raise OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size))


def make_directory(path: str) -> None:
    """Make a directory and its parents, each 0700 under any umask. Raise OSError."""
    # A root that is missing, such as a drive without a disk, is its own parent.
    if path != os.path.dirname(path) and not os.path.isdir(path):
        make_directory(os.path.dirname(path))
        os.makedirs(path, 0o700, exist_ok=True)
        os.chmod(path, 0o700)


def write_file(path: str, data: bytes, place: "Callable[[str, str], None]" = os.replace) -> None:
    """Put data at path in one step. Raise OSError."""
    temporary = f"{path}.{os.urandom(6).hex()}.tmp"
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
        os.chmod(temporary, 0o600)
        place(temporary, path)
    finally:
        # Gone after a replace, not after a link; on Windows a virus scanner may hold it open.
        catch(os.unlink, temporary)


def link_file(temporary: str, path: str) -> None:
    """Give a file its place or raise FileExistsError; without hard links, the last one stays."""
    try:
        os.link(temporary, path)
    except (OSError, AttributeError):
        if os.path.lexists(path):
            raise FileExistsError from None
        os.replace(temporary, path)


def parse_toml(config: bytes, parse_float: "Callable[[str], Any]" = float) -> "dict[str, Any]":
    """Return the document in config.toml. Raise InvalidSetting."""
    if config == NEW_CONFIG:
        return {"telemetry": {"enabled": True, "timeout_ms": DEFAULT_TIMEOUT_MS}}
    import tomllib

    if len(config) > MAX_CONFIG_BYTES:
        raise InvalidSetting("config.toml must not be larger than 1 MiB")
    try:
        return tomllib.loads(config.decode(), parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        raise InvalidSetting(f"config.toml must be TOML in UTF-8: {error}") from None


def format_notice(settings: Settings, path: str, url: str) -> str:
    variable, prog = settings.environment, settings.prog
    inspect, disable = f"{prog} status", f"{prog} disable"
    if not prog:
        inspect, disable = f"set {variable}_DEBUG=1", f"enabled = false in\n             {path}"
    more = f"\n  Read more: {settings.docs_url}" * bool(settings.docs_url)
    return f"""\
{settings.service_name} sends anonymous usage telemetry: the name of each command,
the version and a random fingerprint, never arguments, paths or file contents.
This command is the first to be counted. This notice is shown once.
  Sent to:   {url}
  Inspect:   {inspect}
  Turn off:  set {variable}=0 or DO_NOT_TRACK=1,
             or {disable}{more}"""


def read_fingerprint(path: str) -> str:
    """Return the stored fingerprint; "" where there is none of 1 to 64 hex digits."""
    try:
        stored = read_file(path, 128).decode().strip()
    except (OSError, ValueError):
        return ""
    return stored * (len(stored) <= 64 and not stored.strip("0123456789abcdefABCDEF"))


def place_fingerprint(temporary: str, path: str) -> None:
    """Give a fingerprint its place unless a valid one has it; of many at once the last stays."""
    if os.path.lexists(path) and not read_fingerprint(path):
        os.replace(temporary, path)
        # Others that find the same damage replace it, too; then all read the last one.
        time.sleep(0.05)
    else:
        link_file(temporary, path)


def make_fingerprint() -> str:
    """Return SHA-256 over host, system and randomness that is not kept, as 64 hex digits."""
    import hashlib
    import socket

    # Not the module platform: on Windows it takes seconds, and in threads it can hang.
    parts = [socket.gethostname(), sys.platform, os.environ.get("PROCESSOR_ARCHITECTURE", "")]
    if sys.platform != "win32":
        parts[1:] = os.uname().sysname, os.uname().machine
    host = "\0".join(parts)
    return hashlib.sha256(host.encode(errors="replace") + os.urandom(32)).hexdigest()


def read_backoff(directory: str, url: str) -> "tuple[int, str]":
    """Return the seconds that a back-off for url still takes, 0 for none, and its reason."""
    path = os.path.join(directory, "backoff")
    try:
        age = time.time() - os.stat(path).st_mtime
        target, _, reason = read_file(path, 4096).decode().partition("\n")
    except (OSError, ValueError):
        return 0, ""
    if target != url or not 0 <= age < BACKOFF_SECONDS:
        return 0, ""
    return int(BACKOFF_SECONDS - age) + 1, "".join(filter(str.isprintable, reason))


def build_request(url: str, headers: "dict[str, str]", body: bytes) -> "urllib.request.Request":
    """Return a request that names each header that will be on the wire."""
    import urllib.request

    fixed = {
        "User-Agent": f"trix-telemetry/{__version__}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Host": url.split("/")[2],
        "Connection": "close",
    }
    headers = {"Accept-Encoding": "identity", **headers, **fixed}
    return urllib.request.Request(url, body, headers, method="POST")


def make_contexts(url: str) -> "Iterator[ssl.SSLContext | None]":
    """Yield what to verify the server with, in turn; None for http."""
    if not url.startswith("https:"):
        yield None
        return
    import ssl

    # OpenSSL reads one authority of a hashed directory; the bundle of all takes 25 ms to parse.
    paths = ssl.get_default_verify_paths()
    has_bundle = os.environ.get(paths.openssl_cafile_env)
    names = os.listdir(paths.capath) if paths.capath and not has_bundle else []
    if any(name.endswith(".0") for name in names):
        yield ssl.create_default_context(capath=paths.capath)
    yield ssl.create_default_context()


def post(request: "urllib.request.Request", delivery: "Delivery") -> "tuple[int, str, bytes]":
    """Return status, Location and one buffer of the body. Raise what urllib.request raises."""
    import urllib.error
    import urllib.request

    failure = urllib.error.URLError("no response")
    for context in make_contexts(request.full_url):
        # One that follows no redirect, opens no other scheme, and heeds no debug level of the host.
        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.ProxyHandler(urllib.request.getproxies_environment()))
        opener.add_handler(urllib.request.UnknownHandler())
        opener.add_handler(urllib.request.HTTPHandler(debuglevel=0))
        if context:
            opener.add_handler(urllib.request.HTTPSHandler(debuglevel=0, context=context))
        try:
            with opener.open(request, timeout=max(delivery.remaining(), 0.001)) as response:
                read = response.read if delivery.is_by_hand else response.read1
                return response.status, response.getheader("Location", ""), read(MAX_BODY)
        except urllib.error.URLError as error:
            # Only a certificate that is not verified has this: the bundle may know its authority.
            if not hasattr(error.reason, "verify_message"):
                raise
            failure = error
    raise failure


class Delivery:
    """One data point on its way; `override` is an endpoint in place of the configured one."""

    def __init__(self, settings: Settings, command: str, override: "str | None" = None) -> None:
        self.called, self.began = time.time_ns(), time.monotonic()
        self.settings, self.command, self.override = settings, command, override
        self.is_by_hand = self.is_connecting = False
        # No file is below the null device, for where there is no home.
        self.directory, self.path, self.url = os.devnull, "", ""
        self.config = b""
        self.headers: dict[str, str] = {}
        self.timeout = DEFAULT_TIMEOUT_MS / 1000
        self.table: TelemetryConfig | None = None
        self.thread: threading.Thread | None = None
        self.response: tuple[int, str, bytes] | None = None
        self.error: Exception | None = None

    def remaining(self) -> float:
        return self.began + self.timeout - time.monotonic()

    def prepare(self, is_dry: bool = False) -> None:
        """Do what the call waits for; in a dry run make nothing. Raise NotSent, OSError."""
        check_settings(self.settings)
        check_opt_out(self.settings)
        check_command(self.command, self.settings.commands)
        self.read_config(is_dry)

    def read_config(self, is_dry: bool) -> None:
        """Read config.toml, or make it. Raise NotSent, OSError."""
        if self.override is None:
            self.override = os.environ.get(f"{self.settings.environment}_ENDPOINT")
        self.directory = find_directory(self.settings)
        self.path = os.path.join(self.directory, "config.toml")
        is_new, config = not os.path.exists(self.path), NEW_CONFIG
        if not is_new:
            config = read_file(self.path, MAX_CONFIG_BYTES + 1)
        # Nothing is on without "true"; no key is spelled without "endpoint" or a backslash.
        has_key = b"endpoint" in config.replace(b"# otlp_endpoint", b"") or b"\\" in config
        has_base = self.override or (self.override is None and (self.settings.endpoint or has_key))
        if not (is_dry or self.is_by_hand or (has_base and b"true" in config)):
            raise NotSent("config.toml is off, or there is no endpoint")
        if is_new:
            config = self.run_first(is_dry)
        self.config = config

    def run_first(self, is_dry: bool) -> bytes:
        """Create config.toml, show the notice, and return the config. Raise NotSent, OSError."""
        path = os.path.realpath(self.path)
        if self.settings.opt_in:
            raise NotSent(f"it is opt-in, and {self.path} does not exist")
        if os.environ.get("CI", "").lower() not in NO:
            raise NotSent(f"CI is set, and {self.path} does not exist")
        self.choose_endpoint(TelemetryConfig({}))
        from importlib.util import find_spec

        for name in ("http", "json", "tomllib", "urllib", *["ssl"] * self.url.startswith("https:")):
            if find_spec(name) is None:
                raise NotSent(f"this Python has no module {name}")
        if is_dry:
            return NEW_CONFIG
        make_directory(self.directory)
        try:
            write_file(path, NEW_CONFIG, link_file)
            write_stderr(format_notice(self.settings, self.path, self.url))
        except FileExistsError:
            return read_file(path, MAX_CONFIG_BYTES + 1)
        except BaseException:
            if catch(read_file, path, 999) is None and read_file(path, 999) == NEW_CONFIG:
                os.unlink(path)
            raise
        return NEW_CONFIG

    def choose_endpoint(self, table: TelemetryConfig) -> None:
        """Set the URL and the headers. Raise NotSent, InvalidSetting."""
        settings, self.headers = self.settings, table.otlp_headers
        base, source = settings.endpoint, "endpoint of the tool"
        if self.override is not None:
            base, source = self.override, f"{settings.environment}_ENDPOINT"
        elif table.otlp_endpoint is not None:
            base, source = table.otlp_endpoint, "telemetry.otlp_endpoint"
        else:
            # The headers of the tool go to its own endpoint alone.
            own = select_headers(settings.headers or {}, "headers of the tool")
            self.headers = own | table.otlp_headers
        if not base:
            raise NotSent(f"there is no endpoint: {source} is empty")
        self.url = parse_endpoint(base, source)

    def resolve(self) -> None:
        """Parse the config, and choose by it. Raise NotSent, InvalidSetting."""
        self.table = table = TelemetryConfig(parse_toml(self.config).get("telemetry", {}))
        if not table.enabled:
            says = "has no telemetry.enabled" if table.enabled is None else "says enabled = false"
            raise NotSent(f"{self.path} {says}")
        self.timeout = table.timeout_ms / 1000
        self.choose_endpoint(table)
        seconds, reason = read_backoff(self.directory, self.url)
        if seconds and not self.is_by_hand:
            raise NotSent(f"back-off for {seconds} s more: {reason}")

    def write_backoff(self, reason: str) -> None:
        write_file(os.path.join(self.directory, "backoff"), f"{self.url}\n{reason}\n".encode())


class OtlpClient:
    """The session state of one process, without a queue: a send beyond four is dropped."""

    def __init__(self) -> None:
        import atexit
        import threading

        # Reentrant: a signal handler may track while the thread that it interrupts does.
        self.lock, self.importing, self.naming = (threading.RLock() for _ in range(3))
        self.deliveries: list[Delivery] = []
        self.interval_end, self.fingerprint = 0, ""
        self.is_closed = self.has_warned = False
        atexit.register(self.close)
        if sys.platform != "win32" and hasattr(os, "register_at_fork"):
            done = self.importing.release
            os.register_at_fork(before=self.hold_imports, after_in_parent=done, after_in_child=done)

    def start(self, delivery: Delivery) -> None:
        """Start a thread. Raise NotSent, and RuntimeError where threads cannot start."""
        import threading

        with self.lock:
            if len(self.deliveries) >= MAX_SENDS or not threading.main_thread().is_alive():
                raise NotSent(f"{MAX_SENDS} sends are under way, or the process is ending")
            # Before the start, which a signal handler that tracks may interrupt.
            self.deliveries.append(delivery)
            thread = threading.Thread(None, self.run, "telemetry", (delivery,), daemon=True)
            failure = catch(thread.start)
            if failure:
                self.deliveries.remove(delivery)
                raise failure
            delivery.thread = thread

    def run(self, delivery: Delivery) -> None:
        # The caller goes on at once; else it waits for the interpreter's switch interval of 5 ms.
        time.sleep(0.001)
        delivery.error = catch(self.deliver, delivery)
        catch(self.warn, delivery.error)
        catch(self.deliveries.remove, delivery)

    def deliver(self, delivery: Delivery) -> None:
        """Go from the config to the response. Raise NotSent, and what `post` raises."""
        self.load("signal")
        import signal

        # They belong to the threads of the host.
        if sys.platform != "win32" and hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.load("urllib.parse", *["tomllib"] * (delivery.config != NEW_CONFIG))
        # Python 3.15 imports a part of tomllib when it parses.
        with self.importing:
            delivery.resolve()
        self.load("json", "hashlib", "socket")
        body = self.encode(delivery, self.identify(delivery.directory))
        self.load("email.parser", "http.client", "tempfile", "encodings.idna", "urllib.request")
        request = build_request(delivery.url, delivery.headers, body)
        check_opt_out(delivery.settings)
        delivery.is_connecting = True
        delivery.response = post(request, delivery)
        if delivery.response[0] in (429, 503):
            delivery.write_backoff(f"the collector answered HTTP {delivery.response[0]}")

    def load(self, *names: str) -> None:
        """Import modules, none while the process forks or ends: a half-made one holds up others."""
        for name in names:
            with self.importing:
                if self.is_closed:
                    raise NotSent("the process is ending")
                try:
                    __import__(name)
                except (ImportError, AttributeError):
                    # Of two threads that import the same modules one can meet a half-made one.
                    __import__(name)

    def encode(self, delivery: Delivery, fingerprint: str) -> bytes:
        """Return the body, whose interval begins after that of the last point."""
        settings = delivery.settings
        with self.lock:
            start = max(delivery.called, self.interval_end)
            end = self.interval_end = max(time.time_ns(), start + MIN_INTERVAL_NS)
        resource = {
            "service.name": settings.service_name,
            "service.version": settings.service_version,
            "user.fingerprint": fingerprint,
        }
        return CommandMetric(settings.metric_name, delivery.command, start, end).encode(resource)

    def identify(self, directory: str, is_dry: bool = False) -> str:
        """Return the stored fingerprint, made where there is none, or one of this process."""
        path = os.path.join(directory, "fingerprint")
        stored = read_fingerprint(path)
        if stored:
            return stored
        with self.naming:
            self.fingerprint = fingerprint = self.fingerprint or make_fingerprint()
            if is_dry:
                return fingerprint
            catch(write_file, path, fingerprint.encode(), place_fingerprint)
            stored = read_fingerprint(path)
            self.fingerprint = "" if stored else fingerprint
            return stored or fingerprint

    def warn(self, error: "Exception | None") -> None:
        """Log an invalid setting, once, where the host has imported logging."""
        logging = sys.modules.get("logging")
        if logging and isinstance(error, InvalidSetting) and not self.has_warned:
            self.has_warned = True
            logger = logging.getLogger(__name__)
            # Without a handler, logging would write to stderr.
            logger.addHandler(logging.NullHandler())
            logger.warning("telemetry is off: %s", error)

    def close(self) -> None:
        """Wait at exit for the sends under way; a signal ends the wait."""
        try:
            catch(self.wait)
        except (KeyboardInterrupt, SystemExit):
            pass
        self.is_closed = True
        # An import under way comes to its end.
        if self.importing.acquire(timeout=0.1):
            self.importing.release()

    def wait(self) -> None:
        """Wait until each response or deadline; write the back-off if the network took long."""
        # The readers of the host's pipes have all output before the wait.
        catch(lambda: sys.stdout.flush())
        catch(lambda: sys.stderr.flush())
        waited = 0.0
        for delivery in [*self.deliveries]:
            while delivery.thread and delivery.thread.is_alive() and delivery.remaining() > 0:
                is_network, began = delivery.is_connecting, time.monotonic()
                delivery.thread.join(min(POLL_SECONDS, delivery.remaining()))
                elapsed = time.monotonic() - began
                waited += elapsed if is_network and elapsed < LATE_SECONDS else 0
            if delivery.is_connecting and waited > delivery.timeout / 2:
                delivery.write_backoff(f"a command waited {waited:.1f} s for the network")

    def hold_imports(self) -> None:
        """Let the import under way end before a fork."""
        import threading

        try:
            self.importing.acquire()
        except BaseException as error:
            # What is raised here is lost, so a thread raises it again after the fork.
            catch(self.importing.release)
            self.hold_imports()
            threading.Thread(target=self.interrupt, args=(error,), daemon=True).start()

    def interrupt(self, error: BaseException) -> None:
        import signal

        with self.importing:
            time.sleep(0.01)
            os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[isinstance(error, SystemExit)])


clients: "dict[int, OtlpClient]" = {}
current_settings = Settings()


def get_client() -> OtlpClient:
    """Return the one handle of this process; a forked child makes its own."""
    pid = os.getpid()
    return clients.get(pid) or clients.setdefault(pid, OtlpClient())


def preview(delivery: Delivery) -> str:
    """Return the request as on the wire, the values of the added headers hidden."""
    client = get_client()
    body = client.encode(delivery, client.identify(delivery.directory, is_dry=True))
    request = build_request(delivery.url, delivery.headers, body)
    shown = dict(request.header_items())
    shown |= {name.capitalize(): "(hidden)" for name in delivery.headers}
    lines = [f"{name.title()}: {value}" for name, value in shown.items()]
    return "\n".join([f"POST {request.selector} HTTP/1.1", *lines, "", body.decode()])


def track(delivery: Delivery) -> None:
    """Start the delivery; with _DEBUG show what it would send. Raise NotSent, OSError."""
    if os.environ.get(f"{delivery.settings.environment}_DEBUG", "").lower() in NO:
        delivery.prepare()
        get_client().start(delivery)
        return
    reason = catch(delivery.prepare, True) or catch(delivery.resolve)
    text = f"telemetry is off: {reason}" if reason else f"telemetry would send\n{preview(delivery)}"
    write_stderr(f"{delivery.settings.service_name}: {text}")


def track_command_execution(name: str) -> "threading.Thread | None":
    """Count one run of the command `name`, which is `[A-Za-z][A-Za-z0-9_-]{0,63}`.

    Returns the daemon thread that delivers it, None where nothing will be sent. Raises nothing.
    At exit the process waits for what is left of `timeout_ms` since the call.
    """
    try:
        delivery = Delivery(current_settings, name)
        catch(track, delivery)
        return delivery.thread
    except TypeError:
        # The interpreter is ending and has cleared this module.
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

    The last call before a track decides. A value of a wrong type raises nothing: telemetry is off.
    """
    global current_settings
    slug = "".join(c.lower() if c.isascii() and c.isalnum() else "_" for c in str(service_name))
    base = os.environ.get("XDG_CONFIG_HOME", "")
    base = base if os.path.isabs(base) else "~/.config"
    path = f"{base}/{slug}/telemetry" if directory is None else directory
    settings = Settings()
    settings.service_name, settings.service_version = service_name, service_version
    settings.endpoint, settings.headers = endpoint, headers
    settings.metric_name = f"{slug}_command_invocation" if metric_name is None else metric_name
    settings.directory = os.fspath(path) if isinstance(path, os.PathLike) else path
    settings.environment = f"{slug.upper()}_TELEMETRY" if environment is None else environment
    settings.prog, settings.docs_url = prog or "", docs_url or ""
    settings.commands, settings.opt_in = commands, opt_in
    current_settings = settings


def get_user_fingerprint() -> str:
    """Return the stored fingerprint, 1 to 64 hex digits, else the one that the next send stores."""
    delivery = Delivery(current_settings, "")
    catch(delivery.read_config, True)
    return get_client().identify(delivery.directory, is_dry=True)


# The command line: from here on, nothing runs inside a host tool.


class CommandError(Exception):
    """A command failed, and why."""


def make_printable(text: object) -> str:
    """Return foreign text as one line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(text).strip()[:1000])


def examine(settings: Settings) -> "tuple[Delivery, dict[str, Any]]":
    """Return a delivery that is not made, and what `status` shows. Raise InvalidSetting."""
    check_settings(settings)
    delivery = Delivery(settings, min(settings.commands or ["build"]))
    delivery.is_by_hand = True
    found = [catch(check_opt_out, settings), catch(delivery.read_config, True)]
    found += [catch(delivery.resolve), catch(__import__, "http.client")]
    parent = directory = delivery.directory
    while not os.path.lexists(parent) and parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
    if not os.path.exists(delivery.path) and not os.access(os.path.join(parent, ""), os.W_OK):
        found.append(NotSent(f"{directory} cannot be written: {parent} is not writable"))
    reasons = [make_printable(problem) for problem in found if problem]
    found.append(catch(delivery.choose_endpoint, delivery.table or TelemetryConfig({})))
    invalid = {make_printable(each) for each in found if isinstance(each, InvalidSetting)}
    variable, prog = settings.environment, settings.prog
    seconds, cause = read_backoff(directory, delivery.url)
    return delivery, {
        "tool": settings.service_name,
        "state": "off" if reasons else "on",
        "reason": [*reasons, ""][0],
        "invalid": "; ".join(sorted(invalid)),
        "endpoint": delivery.url,
        "encrypted": "no" * delivery.url.startswith("http:"),
        "fingerprint": read_fingerprint(os.path.join(directory, "fingerprint")),
        "back-off": f"{seconds} s more: {cause}" * bool(seconds),
        "config": os.path.join(directory, "config.toml") if delivery.path else "",
        "change": f"{prog} enable, {prog} disable" if prog else "`enabled` in the config",
        "variables": f"DO_NOT_TRACK=1, {variable}=0, {variable}_DEBUG=1",
        "read more": settings.docs_url,
    }


def run_status(settings: Settings, options: "argparse.Namespace") -> "tuple[str, int]":
    import json

    try:
        facts = examine(settings)[1]
    except InvalidSetting as error:
        tool = make_printable(settings.service_name)
        facts = {"tool": tool, "state": "off", "reason": str(error), "invalid": str(error)}
    code = int(facts["invalid"] != "")
    if options.json:
        return json.dumps(facts, indent=2), code
    tool, state, reason, *_ = facts.values()
    lines = [f"Telemetry of {tool} is {state}: {reason}".removesuffix(": ")]
    for label, text in list(facts.items())[3:]:
        if label in ("endpoint", "fingerprint") or text not in ("", reason):
            lines.append(f"  {label.capitalize():<13}{text or 'none'}")
    return "\n".join(lines), code


def list_edits(text: str, value: str) -> "Iterator[str]":
    """Yield texts of which one may have `enabled` set and nothing else changed."""
    import re

    newline = "\r\n" if "\r\n" in text else "\n"
    line = f"enabled = {value}{newline}"
    for header in re.finditer(r"(?m)^[ \t]*\[[ \t]*telemetry[ \t]*\].*(\n|\Z)", text):
        before, after = text[: header.end()], text[header.end() :]
        yield before + re.sub(
            r"(?m)^(\s*enabled\s*=\s*)(true|false)", rf"\g<1>{value}", after, count=1
        )
        yield f"{before}{newline * (not header[1])}{line}{after}"
    gap = newline * (1 + bool(text and not text.endswith("\n")))
    yield f"{text}{gap}[telemetry]{newline}{line}"


def edit_config(config: bytes, enabled: bool) -> bytes:
    """Return config with `enabled` set and every other byte kept. Raise what says why not."""
    # Floats as text, for nan is not equal to itself.
    before = parse_toml(config, str)
    table = before.get("telemetry", {})
    TelemetryConfig({"enabled": table.get("enabled", True)} if isinstance(table, dict) else table)
    if table.get("enabled") is enabled:
        return config
    value = str(enabled).lower()
    wanted = {**before, "telemetry": {**table, "enabled": enabled}}
    for edited in map(str.encode, list_edits(config.decode(), value)):
        if not catch(parse_toml, edited) and parse_toml(edited, str) == wanted:
            return edited
    raise CommandError(f"the text is too unusual: write enabled = {value} for telemetry by hand")


def place_edited(temporary: str, path: str) -> None:
    """Replace a file that a user wrote; its mode and its owner stay. Raise OSError."""
    before = os.stat(path)
    if sys.platform != "win32":
        os.chown(temporary, before.st_uid, -1)
        catch(os.chown, temporary, -1, before.st_gid)
    os.chmod(temporary, before.st_mode & 0o7777)
    deadline = time.monotonic() + 1
    while failure := catch(os.replace, temporary, path):
        # Windows refuses while another process reads the file.
        if os.name != "nt" or time.monotonic() > deadline:
            raise failure
        time.sleep(0.01)


def switch(path: str, enabled: bool) -> None:
    """Set `enabled` in config.toml. Raise CommandError, InvalidSetting, OSError."""
    if not os.path.exists(path):
        make_directory(os.path.dirname(path))
        write_file(path, NEW_CONFIG.replace(b"true", str(enabled).lower().encode()))
        return
    config = read_file(path, MAX_CONFIG_BYTES + 1)
    edited = edit_config(config, enabled)
    if edited != config:
        if not os.access(path, os.W_OK):
            raise CommandError("the file is read-only")
        write_file(path, edited, place_edited)


def run_switch(settings: Settings, options: "argparse.Namespace") -> "tuple[str, int]":
    directory = find_directory(settings)
    path = os.path.realpath(os.path.join(directory, "config.toml"))
    try:
        switch(path, options.enabled)
    except (CommandError, InvalidSetting, OSError) as error:
        if isinstance(error, InvalidSetting) and not options.enabled:
            return f"Telemetry is off already, but {path} needs mending: {error}", 0
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"{path}: {reason}; nothing was changed") from None
    if not options.enabled:
        return f"Telemetry disabled (saved in {path})", 0
    catch(os.unlink, os.path.join(directory, "backoff"))
    reason = examine(settings)[1]["reason"]
    more = f"\nIt stays off: {reason}" * bool(reason)
    return f"Telemetry enabled (saved in {path}){more}", 0


def run_preview(settings: Settings, options: "argparse.Namespace") -> "tuple[str, int]":
    delivery, facts = examine(settings)
    delivery.command = options.command or delivery.command
    check_command(delivery.command, settings.commands)
    delivery.url = delivery.url or "http://no-endpoint.invalid/v1/metrics"
    if facts["reason"] and sys.stderr:
        catch(print, f"This is not sent. Telemetry is off: {facts['reason']}", file=sys.stderr)
    return preview(delivery), 0


def check_response(status: int, location: str, body: bytes) -> "tuple[bool, str]":
    """Return whether the point is accepted (OTLP/HTTP response, partial success), and the words."""
    import json

    is_success, rejected = 200 <= status < 300, 0
    text: Any = body.decode(errors="replace")
    if is_success:
        try:
            partial: Any = dict(json.loads(text)["partialSuccess"])
            text, rejected = partial.get("errorMessage"), int(partial.get("rejectedDataPoints", 0))
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            text = ""
    elif location:
        text = f"it redirects to {location}, which is not followed"
    if rejected > 0:
        text = f"{str(rejected)[:20]} data point rejected: {text or 'no reason given'}"
    text = f"HTTP {status}: {make_printable(text or '')[:200]}".removesuffix(": ")
    return is_success and rejected <= 0, text


def run_track(settings: Settings, options: "argparse.Namespace") -> "tuple[str, int]":
    from urllib.error import URLError

    check_command(options.command, settings.commands)
    if options.endpoint is not None:
        parse_endpoint(options.endpoint, "--endpoint")
    delivery = Delivery(settings, options.command, options.endpoint)
    delivery.is_by_hand = True
    failure = catch(delivery.prepare) or catch(get_client().start, delivery)
    while delivery.thread and delivery.thread.is_alive() and delivery.remaining() > 0:
        delivery.thread.join(POLL_SECONDS)
    elapsed = f"{(time.monotonic() - delivery.began) * 1000:.0f} ms"
    error: Any = failure or delivery.error or TimeoutError("timed out")
    if failure or isinstance(error, NotSent):
        return f"Not sent. Telemetry is off: {error}", 0
    error = error.reason if isinstance(error, URLError) else error
    # The text of another error may show the password of a proxy.
    text = str(error) if isinstance(error, (OSError, str)) else type(error).__name__
    is_accepted = False
    if delivery.response:
        is_accepted, text = check_response(*delivery.response)
    if not is_accepted:
        raise CommandError(f"{delivery.url} after {elapsed}: {text}")
    catch(os.unlink, os.path.join(delivery.directory, "backoff"))
    return f"Sent to {delivery.url} in {elapsed}: {text}", 0


def run_reset(settings: Settings, options: "argparse.Namespace") -> "tuple[str, int]":
    try:
        os.unlink(os.path.join(find_directory(settings), "fingerprint"))
    except (FileNotFoundError, NotADirectoryError):
        return "No fingerprint stored.", 0
    return "Fingerprint deleted; the next command makes a new one.", 0


def start_collector(received: "list[bytes]") -> "Any":
    """Start a collector on loopback that appends each body to received."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def run_selftest(settings: Settings, options: "argparse.Namespace") -> "tuple[str, int]":
    import subprocess
    import tempfile

    if getattr(sys, "frozen", False) or not sys.executable:
        raise CommandError("selftest starts Python, and this program brings none")
    received: list[bytes] = []
    variable, command, lines = settings.environment, min(settings.commands or ["build"]), []
    others = ("CI", "DO_NOT_TRACK", variable, "PYTHON", "HTTP_PROXY", "http_proxy")
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    paths = sys.path if __package__ else [os.path.dirname(os.path.abspath(__file__)), *sys.path]
    given = {name: getattr(settings, name) for name in vars(Settings) if name[0] != "_"}
    with start_collector(received) as server, tempfile.TemporaryDirectory() as directory:
        given |= {"directory": directory, "opt_in": False, "commands": [command]}
        given["endpoint"] = f"http://127.0.0.1:{server.server_port}"
        program = f"import importlib, sys; sys.path[:] = {paths!r}\n"
        program += f"telemetry = importlib.import_module({MODULE!r})\n"
        program += f"telemetry.initialize_telemetry(**{given!r})\n"
        program += f"telemetry.track_command_execution({command!r})\n"
        for count, text, variables in (
            (1, "the first run shows the notice and sends", {}),
            (2, "the second run sends", {}),
            (2, "DO_NOT_TRACK=1 turns it off", {"DO_NOT_TRACK": "1"}),
            (2, f"{variable}=0 turns it off", {variable: "0"}),
        ):
            call, source = [sys.executable, "-B", "-"], program.encode()
            done = subprocess.run(call, env=env | variables, input=source, capture_output=True)
            found = (done.returncode, done.stdout, bool(done.stderr), len(received))
            is_passed = found == (0, b"", count == 1, count)
            words = f"FAILED  {text}: {done.stderr.decode(errors='replace')[-80:].strip()}"
            lines.append(f"ok  {text}" if is_passed else words)
        server.shutdown()
    code = int(any(line.startswith("FAILED") for line in lines))
    return "\n".join(map(make_printable, [*lines, ("All passed.", "Failed.")[code]])), code


def build_parser(settings: Settings) -> "argparse.ArgumentParser":
    import argparse

    text = f"Show or change the usage telemetry of {settings.service_name}."
    parser = argparse.ArgumentParser(settings.prog or settings.service_name, description=text)
    parser.add_argument("--version", action="version", version=f"telemetry {__version__}")
    parser.set_defaults(run=run_status, json=False)
    commands = parser.add_subparsers(metavar="COMMAND", help="status if none is given")

    def add(run: "Callable[..., tuple[str, int]]", text: str, *names: str) -> "Any":
        command = commands.add_parser(names[0], aliases=names[1:], help=text, description=text)
        command.set_defaults(run=run)
        return command

    status = add(run_status, "show whether telemetry is on, why, and where data goes", "status")
    status.add_argument("--json", action="store_true", help="show the same as JSON")
    add(run_switch, "turn telemetry on", "enable", "on").set_defaults(enabled=True)
    add(run_switch, "turn telemetry off", "disable", "off").set_defaults(enabled=False)
    text = "show the request that a command would send, and send nothing"
    add(run_preview, text, "preview").add_argument("command", metavar="COMMAND", nargs="?")
    track = add(run_track, "send one data point and show the response", "track")
    track.add_argument("command", metavar="COMMAND")
    track.add_argument("--endpoint", metavar="URL", help="send it there")
    add(run_reset, "delete the fingerprint", "reset")
    add(run_selftest, "test telemetry on this machine, with a collector of its own", "selftest")
    return parser


def main(argv: "list[str] | None" = None, prog: "str | None" = None) -> int:
    """Run the command line, also under a tool's own command: `main(args, prog="acme telemetry")`.

    Returns the exit code: 0, 1 for an error or an invalid config, 2 for a wrong usage.
    """
    import contextlib
    import errno
    import io

    settings, output, text = Settings(), io.StringIO(), ""
    vars(settings).update(vars(current_settings))
    settings.prog = prog or settings.prog
    failure: Exception | None = None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            options = build_parser(settings).parse_args(argv)
        if options.run is not run_status:
            check_settings(settings)
        text, code = options.run(settings, options)
    except SystemExit as stop:
        text, code = output.getvalue().strip() or sys.exit(stop.code), 2 * bool(stop.code)
        failure = CommandError(text.partition(": error: ")[2]) if code else None
    except KeyboardInterrupt:
        get_client().deliveries.clear()
        return 130
    except (NotSent, CommandError, OSError, ImportError, RuntimeError, TypeError, ValueError) as e:
        failure, code = e, 1
    if not failure:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        failure = catch(print, text, flush=True)
        if isinstance(failure, OSError) and sys.stdout is sys.__stdout__:
            # Python would try once more at exit: signal documentation, "Note on SIGPIPE".
            with open(os.devnull, "wb") as null:
                catch(lambda: os.dup2(null.fileno(), sys.stdout.fileno()))
    # A reader that is gone is no error to report; Windows calls it EINVAL.
    if failure and sys.stderr and getattr(failure, "errno", 0) not in (errno.EPIPE, errno.EINVAL):
        message = make_printable(f"{settings.service_name}: error: {failure}")
        catch(print, message, file=sys.stderr)
    return code or int(failure is not None)


if __name__ == "__main__":
    raise SystemExit(main())
