"""Every promise of trix_telemetry, met by real files, real processes and real sockets.

Nothing here touches the real home or leaves the loopback. `python -m pytest -m bench -s` measures.
"""

import ast
import contextlib
import email.utils
import http.server
import itertools
import json
import logging
import os
import pathlib
import random
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
import zipfile

import pytest

import trix_telemetry

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / "trix_telemetry.py"
FINGERPRINT = "0123456789abcdef" * 4
FAR = 30  # seconds: what a test may wait for, never what it measures


class Collector:
    """A real OTLP/HTTP collector on loopback: keeps each request, answers as it is told."""

    def __init__(self, tls=None):
        self.requests = []
        self.answer = (200, {"Content-Type": "application/json"}, b"{}")
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.requests.append((self.requestline, dict(self.headers), body))
                status, headers, answer = collector.answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(answer)

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def finish_request(self, request, address):
                with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                    if tls:
                        request = stack.enter_context(tls.wrap_socket(request, server_side=True))
                    super().finish_request(request, address)

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def points(self):
        return [Point(body) for _, _, body in self.requests]

    @property
    def commands(self):
        return [point.command for point in self.points]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Point:
    """The one data point of a body."""

    def __init__(self, body):
        resource = json.loads(body)["resourceMetrics"][0]
        attributes = resource["resource"]["attributes"]
        self.resource = {a["key"]: a["value"]["stringValue"] for a in attributes}
        self.metric = resource["scopeMetrics"][0]["metrics"][0]
        self.data = self.metric["sum"]["dataPoints"][0]
        self.command = self.data["attributes"][0]["value"]["stringValue"]
        self.start = int(self.data["startTimeUnixNano"])
        self.end = int(self.data["timeUnixNano"])


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home, an environment and a handle of its own for each test."""
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name.startswith(("TRIX_", "SSL_CERT_", "OTEL_")):
            monkeypatch.delenv(name)
    for name in ("DO_NOT_TRACK", "PYTHONUNBUFFERED", "PYTHONWARNINGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(trix_telemetry, "_tool", None)
    monkeypatch.setattr(trix_telemetry, "_clients", {})
    return tmp_path


@pytest.fixture
def state(home):
    return home / ".tx3" / "trix"


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def here(collector, monkeypatch):
    """The collector, as the environment's endpoint."""
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", collector.url)
    return collector


@pytest.fixture
def config(state):
    """Writes config.toml: a function of its text, or of the settings of the table."""

    def write(text=None, **settings):
        if text is None:
            lines = ["[telemetry]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
            text = "\n".join(lines) + "\n"
        state.mkdir(parents=True, exist_ok=True)
        path = state / "config.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def track(name="build"):
    """Track in this process, and wait for the thread as the end of the process would."""
    thread = trix_telemetry.track_command_execution(name)
    if thread is not None:
        thread.join(FAR)
        assert not thread.is_alive()
    return thread


def tool(code="trix_telemetry.track_command_execution('build')", *flags, **options):
    """Run a tool, a fresh process that imports the module and ends right after its code."""
    prelude = f"import sys; sys.path.insert(0, {str(HERE)!r}); import trix_telemetry\n"
    command = [sys.executable, *flags, "-c", prelude + textwrap.dedent(code)]
    env = {**os.environ, **options.pop("env", {})}
    env = {name: value for name, value in env.items() if value is not None}
    options.setdefault("capture_output", True)
    options.setdefault("timeout", FAR)
    return subprocess.run(command, text=True, env=env, check=False, **options)


def silent(done):
    """Whether a tool ended as it would have without telemetry."""
    return (done.returncode, done.stdout, done.stderr) == (0, "", "")


def cli(*arguments, **options):
    """Run the command line as a person would."""
    env = {**os.environ, **options.pop("env", {})}
    command = [sys.executable, str(MODULE), *arguments]
    options.setdefault("timeout", FAR)
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, **options)


# The shape of the file


def test_importing_loads_no_module_that_a_bare_interpreter_lacks():
    bare = "import os, sys, time; before = set(sys.modules)\n"
    code = f"{bare}sys.path.insert(0, {str(HERE)!r}); import trix_telemetry\n"
    code += "print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout == "['trix_telemetry']\n"


def test_off_loads_nothing_starts_no_thread_and_makes_nothing(config, state, here):
    config("[telemetry]\nenabled = false\n")
    done = tool(
        """
        import os
        before = set(sys.modules)
        assert trix_telemetry.track_command_execution("build") is None
        assert set(sys.modules) == before, set(sys.modules) - before
        assert len(os.listdir("/proc/self/task")) == 1
    """,
        "-S",
    )
    assert silent(done), done.stderr
    assert [path.name for path in state.iterdir()] == ["config.toml"]
    assert here.requests == []


def test_the_module_has_one_broad_except():
    handlers = [
        node
        for node in ast.walk(ast.parse(MODULE.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
    ]
    assert len(handlers) == 1


def test_constants_stand_in_one_block_at_the_top():
    assert trix_telemetry.SERVICE_NAME == "trix-cli"
    assert trix_telemetry.METRIC_NAME == "trix_command_invocation"
    assert trix_telemetry.ENDPOINT == ""


# Names


@pytest.mark.parametrize("name", ["build", "B", "a-b_c9", "x" * 64])
def test_a_command_name_is_sent(here, name):
    track(name)
    assert here.commands == [name]


@pytest.mark.parametrize(
    "name",
    [
        "", "x" * 65, "9build", "-build", "_build", "build ", "build\n", "./build", "/etc/passwd",
        "--force", "a.b", "a=b", "me@example.com", "https://example.com", "b\u0443ild",
        "\uff42uild",
        "build\0", "sk_live_51H/abc", "naïve", None, 7, b"build", ["build"], object(),
    ],
)  # fmt: skip
def test_what_is_not_a_command_name_is_dropped_whole(here, state, capfd, name):
    assert track(name) is None
    assert (here.requests, state.exists(), capfd.readouterr()) == ([], False, ("", ""))


def test_a_closed_set_of_commands(here):
    trix_telemetry.initialize_telemetry(commands={"build", "test"})
    track("build")
    track("bulid")
    assert here.commands == ["build"]


# Configuration


DEFAULT_CONFIG = """\
# Anonymous usage telemetry of trix-cli; about it: python -m trix_telemetry status
[telemetry]
enabled = true
timeout_ms = 2000
# otlp_endpoint = "https://collector.example.com"
"""


def test_a_first_run_makes_the_config_tells_and_counts(here, state, capfd):
    track()
    notice = capfd.readouterr().err
    assert (state / "config.toml").read_text() == DEFAULT_CONFIG
    assert notice.count("trix-cli") == 1
    assert f"{here.url}/v1/metrics" in notice
    assert "python -m trix_telemetry disable" in notice
    assert "DO_NOT_TRACK=1" in notice
    assert max(map(len, notice.splitlines())) <= 80
    assert here.commands == ["build"]


def test_a_second_run_says_nothing(here, capfd):
    track()
    capfd.readouterr()
    track()
    assert capfd.readouterr() == ("", "")
    assert here.commands == ["build", "build"]


def test_what_is_made_is_for_the_user_alone(here, state):
    track()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [state, *state.iterdir()]}
    assert modes == {"trix": 0o700, "config.toml": 0o600, "fingerprint": 0o600}


def test_a_created_config_leaves_the_endpoint_to_the_tool(collector, state, monkeypatch):
    trix_telemetry.initialize_telemetry(endpoint=collector.url)
    track()
    document = tomllib.loads((state / "config.toml").read_text())
    assert document == {"telemetry": {"enabled": True, "timeout_ms": 2000}}
    assert f'# otlp_endpoint = "{collector.url}"\n' in (state / "config.toml").read_text()


@pytest.mark.parametrize("before", ["", "a = 1", "a = 1\n", "[other]\r\nenabled = false\r\n"])
def test_a_missing_table_is_added_and_every_other_byte_kept(here, config, capfd, before):
    path = config(before)
    os.chmod(path, 0o640)
    track()
    after = path.read_bytes().decode()
    assert after.startswith(before)
    assert tomllib.loads(after)["telemetry"] == {"enabled": True, "timeout_ms": 2000}
    assert after.replace("\r\n", "").count("\n") == (0 if "\r" in before else after.count("\n"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert "trix-cli" in capfd.readouterr().err
    assert here.commands == ["build"]


def test_a_table_without_enabled_is_on_and_is_left_alone(here, config, capfd):
    text = "[telemetry]\n# enabled = false\ntimeout_ms = 2500\n"
    path = config(text)
    track()
    assert path.read_text() == text
    assert capfd.readouterr().err == ""
    assert here.commands == ["build"]


@pytest.mark.parametrize(
    "text",
    [
        "[telemetry]\nenabled = false\n",
        "[telemetry]\r\n\tenabled=false  # no\r\n",
        "[other]\nenabled = true\n[telemetry] # ours\nenabled = false",
        "# [telemetry]\n[telemetry]\nx = 5\n\nenabled   =   false\n[after]\nenabled = true\n",
        "[a]\nenabled = false\n[telemetry]\nenabled = false\n",
    ],
)
def test_the_plain_spelling_of_off_needs_no_thread(here, config, text):
    path = config(text)
    assert trix_telemetry.track_command_execution("build") is None
    assert here.requests == []
    assert path.read_bytes() == text.encode()


@pytest.mark.parametrize(
    "text",
    [
        "telemetry.enabled = false\n",
        "telemetry = { enabled = false }\n",
        '["telemetry"]\n"enabled" = false\n',
        '[telemetry]\n"\\u0065nabled" = false\n',
    ],
)
def test_any_spelling_of_off_is_off(here, config, state, text):
    config(text)
    track()
    assert here.requests == []
    assert [path.name for path in state.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    "text",
    [
        "# [telemetry]\n# enabled = false\n[telemetry]\nenabled = true\n",
        '[telemetry]\nenabled = true\n[note]\na = """\n[telemetry]\nenabled = false\n"""\n',
        "[telemetry.more]\nenabled = false\n[telemetry]\n",
        "[other]\nenabled = false\n[telemetry]\nenabled = true\n",
        "[[other]]\nenabled = false\n[telemetry]\nenabled = true\n",
        '[telemetry]\nx = """\nenabled = false\n"""\nenabled = true\n',
        "[telemetry]\nnot_enabled = false\nenabled = true\n",
    ],
)
def test_what_only_looks_like_off_is_on(here, config, text):
    config(text)
    track()
    assert here.commands == ["build"]


def test_generated_configs_are_off_exactly_where_a_parser_finds_it(state):
    lines = [
        "[telemetry]", "[other]", "  [telemetry]", "[[list]]", "enabled = false", "enabled = true",
        " enabled=false # so", "# enabled = false", "# [telemetry]", "x = [\n[1],\n]", 'y = """',
        '"""', "[telemetry.more]", "timeout_ms = 1", "z = '[telemetry]'", "telemetry.a = 1",
    ]  # fmt: skip
    found = 0
    for seed in range(4000):
        chosen = random.Random(seed).choices(lines, k=random.Random(seed).randint(1, 8))
        text = "\n".join(chosen)
        if trix_telemetry._says_off(text.encode()):
            with contextlib.suppress(tomllib.TOMLDecodeError):
                assert tomllib.loads(text)["telemetry"]["enabled"] is False, text
                found += 1
    assert found > 50


def test_what_is_read_without_a_parser_is_what_the_parser_reads():
    lines = [
        "[telemetry]", " [telemetry] ", "[telemetry] # c", "[other]", "enabled = true", "", "=",
        "= 1", "enabled=false", "enabled = true # c", "timeout_ms = 50", "timeout_ms = 0",
        "timeout_ms = 007",
        "timeout_ms = 1_0", "timeout_ms = +5", "timeout_ms = 123456789012", "# [telemetry] = x",
        'otlp_endpoint = "http://h:1/a?b#c"', 'otlp_endpoint = ""', 'otlp_endpoint = "', "#\ttab",
        'otlp_endpoint = "a\\n"', 'otlp_endpoint = "a" # "', 'otlp_endpoint = "a""', "a\rb",
        "x = 1", "otlp_endpoint = 'a'", "# caf\u00e9", '"enabled" = true', "enabled = True",
        "\x0cenabled = true",
    ]  # fmt: skip
    found = 0
    for seed in range(20_000):
        dice = random.Random(seed)
        text = dice.choice(["\n", "\n", "\r\n"]).join(dice.choices(lines, k=dice.randint(1, 5)))
        table = trix_telemetry._plain_table(text.encode())
        if table is not None:
            assert repr(tomllib.loads(text)) == repr({"telemetry": table}), text
            found += 1
    assert found > 200


BAD_CONFIGS = [
    ("not toml", "not TOML"),
    ("[telemetry]\nenabled = true\nenabled = true\n", "not TOML"),
    ("[telemetry]\nenabled = \0\n", "not TOML"),
    (b"[telemetry]\nenabled = true # \xff\n", "not UTF-8"),
    (b"\xef\xbb\xbf[telemetry]\nenabled = true\n", "byte-order mark"),
    ("x = " + "[" * 5000, "not TOML"),
    ("telemetry = 1\n", "telemetry is 1; allowed: a table"),
    ("[[telemetry]]\nenabled = true\n", "telemetry is of type list; allowed: a table"),
    ('[telemetry]\nenabled = "true"\n', "telemetry.enabled is 'true'; allowed: true or false"),
    ("[telemetry]\nenabled = 1\n", "telemetry.enabled is 1; allowed: true or false"),
    *(
        (f"[telemetry]\ntimeout_ms = {value}\n", "telemetry.timeout_ms is")
        for value in ("0", "-1", '"5"', "true", "2.5", "1_000_000_000_000", "nan", "60001", "[]")
    ),
    (f"[telemetry]\ntimeout_ms = 0x{'f' * 9000}\n", "telemetry.timeout_ms is of type int"),
    *(
        (f"[telemetry]\notlp_endpoint = {value}\n", "telemetry.otlp_endpoint is")
        for value in (
            '"file:///etc/passwd"', '"ftp://example.com"', '"example.com:4318"', '"http://"',
            '"http:///v1/metrics"', '"https://me:secret@example.com"', '"http://@example.com"',
            '"http://exam ple.com"', '"http://example.com/\\n"', '"http://example.com:99999"',
            '"http://example.com:http"', '"http://[::1"', '"http://example.com:0"', "7", "[]",
            '"http://example.com/?token=1"', '"http://example.com/#a"', '"http://example.com?"',
            '"http://\u00fcber.example.com"', '"http://[::1]abc:80"', '"http://a[::1]:80"', '"http://*"',
            '"//example.com"', '" http://example.com"',
        )
    ),
    ("[telemetry]\notlp_headers = []\n", "telemetry.otlp_headers is"),
    ("[telemetry.otlp_headers]\nA = 1\n", "telemetry.otlp_headers.A is of type int"),
    ('[telemetry.otlp_headers]\nA = "b\\r\\nC: secret"\n', "telemetry.otlp_headers.A is"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), BAD_CONFIGS)
def test_a_damaged_config_fails_closed_and_is_left_alone(here, config, state, capfd, text, says):
    path = config(text)
    before = path.read_bytes()
    track()
    assert capfd.readouterr() == ("", "")
    assert here.requests == []
    assert path.read_bytes() == before
    assert [path.name for path in state.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(("text", "says"), BAD_CONFIGS)
def test_status_names_the_key_and_exits_1(here, config, capsys, text, says):
    config(text)
    assert trix_telemetry.main(["status"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("Telemetry: OFF\n")
    assert says in out
    assert "secret" not in out
    assert trix_telemetry.main(["status", "--json"]) == 1


def test_one_warning_for_those_who_set_logging_up(here, config, caplog):
    config("[telemetry]\ntimeout_ms = 0\n")
    track()
    track()
    assert len(caplog.records) == 1
    assert caplog.records[0].name == "trix_telemetry"
    assert caplog.records[0].levelno == logging.WARNING
    assert "telemetry.timeout_ms is 0; allowed: an integer from 1 to 60000" in caplog.text


def test_no_warning_where_logging_is_only_imported(here, config):
    config("[telemetry]\ntimeout_ms = 0\n")
    code = "import logging; trix_telemetry.track_command_execution('build')"
    assert silent(tool(code))


def test_unknown_keys_are_ignored_and_kept(here, config):
    path = config(enabled=True, colour="blue")
    track()
    assert here.commands == ["build"]
    assert "colour" in path.read_text()


@pytest.mark.parametrize("place", ["fifo", "directory", "/dev/null", "/dev/zero", "loop"])
def test_what_is_no_file_is_off_and_left_alone(here, state, capfd, place):
    state.mkdir(parents=True)
    path = state / "config.toml"
    if place == "fifo":
        os.mkfifo(path)
    elif place == "directory":
        path.mkdir()
    else:
        path.symlink_to(path if place == "loop" else place)
    track()
    assert here.requests == []
    assert capfd.readouterr().err == ""
    assert [path.name for path in state.iterdir()] == ["config.toml"]


def test_a_link_is_followed_and_stays_one(here, home, state):
    target = home / "dotfiles.toml"
    state.mkdir(parents=True)
    (state / "config.toml").symlink_to(target)
    track()
    assert (state / "config.toml").is_symlink()
    assert tomllib.loads(target.read_text())["telemetry"]["enabled"] is True
    assert here.commands == ["build"]


def test_a_megabyte_of_comments_is_no_obstacle(here, config):
    path = config("# enabled = false \n" * 60_000 + "[telemetry]\nenabled = true\n")
    track()
    assert here.commands == ["build"]
    path.write_text("# enabled = false \n" * 60_000 + "[telemetry]\nenabled = false\n")
    track()
    assert here.commands == ["build"]


# Environment


@pytest.mark.parametrize("value", ["1", "true", "yes", "anything", " 1 "])
def test_do_not_track(here, state, monkeypatch, value):
    monkeypatch.setenv("DO_NOT_TRACK", value)
    assert track() is None
    assert (here.requests, state.exists()) == ([], False)


@pytest.mark.parametrize("value", ["", "0", "false", "No", "OFF"])
def test_do_not_track_that_does_not_say_so(here, monkeypatch, value):
    monkeypatch.setenv("DO_NOT_TRACK", value)
    track()
    assert here.commands == ["build"]


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF"])
def test_the_variable_of_the_tool_turns_off(here, state, monkeypatch, value):
    monkeypatch.setenv("TRIX_TELEMETRY", value)
    assert track() is None
    assert (here.requests, state.exists()) == ([], False)


def test_the_variable_of_the_tool_does_not_turn_on(here, config, monkeypatch):
    config(enabled=False)
    monkeypatch.setenv("TRIX_TELEMETRY", "1")
    assert track() is None


def test_without_an_endpoint_nothing_is_made_or_told(state, capfd):
    assert track() is None
    assert (state.exists(), capfd.readouterr()) == (False, ("", ""))


def test_the_environment_goes_before_the_file_and_the_file_before_the_tool(
    collector, config, monkeypatch
):
    config(otlp_endpoint=f"{collector.url}/file")
    trix_telemetry.initialize_telemetry(endpoint=f"{collector.url}/tool")
    track()
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", f"{collector.url}/environment/")
    track()
    monkeypatch.delenv("TRIX_TELEMETRY_ENDPOINT")
    config(enabled=True)
    track()
    assert [line.split()[1] for line, _, _ in collector.requests] == [
        "/file/v1/metrics",
        "/environment/v1/metrics",
        "/tool/v1/metrics",
    ]


def test_an_empty_endpoint_means_nowhere(collector, config, monkeypatch, state):
    trix_telemetry.initialize_telemetry(endpoint=collector.url)
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", "")
    assert track() is None
    assert not state.exists()
    monkeypatch.delenv("TRIX_TELEMETRY_ENDPOINT")
    config(otlp_endpoint="")
    track()
    assert collector.requests == []


def test_a_bad_endpoint_of_the_environment_is_off(state, monkeypatch, capfd):
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", "ftp://example.com")
    track()
    assert (state.exists(), capfd.readouterr().err) == (False, "")


def test_the_generic_variables_of_otel_are_not_read(collector, monkeypatch, state):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    assert track() is None
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", collector.url)
    track()
    assert "secret" not in str(collector.requests)


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://h", "http://h/v1/metrics"),
        ("https://h:8443/otlp/", "https://h:8443/otlp/v1/metrics"),
        ("http://h//", "http://h/v1/metrics"),
        ("http://h/v1/metrics", "http://h/v1/metrics"),
        ("http://h/a/v1/metrics/", "http://h/a/v1/metrics"),
        ("http://v1/metrics", "http://v1/metrics/v1/metrics"),
        ("http://[::1]:4318", "http://[::1]:4318/v1/metrics"),
        ("HTTP://H", "http://H/v1/metrics"),
    ],
)
def test_the_path_is_appended_once(base, url):
    assert trix_telemetry._metrics_url(base) == url


# Fingerprint


def test_the_fingerprint_is_made_once_and_kept(here, state):
    track()
    stored = (state / "fingerprint").read_bytes().decode()
    track()
    assert re.fullmatch("[0-9a-f]{64}", stored)
    assert [point.resource["user.fingerprint"] for point in here.points] == [stored, stored]
    assert trix_telemetry.get_user_fingerprint() == stored


def test_two_homes_have_two_fingerprints(home, monkeypatch):
    first = trix_telemetry.get_user_fingerprint()
    monkeypatch.setenv("HOME", str(home / "other"))
    assert trix_telemetry.get_user_fingerprint() != first


@pytest.mark.parametrize("stored", ["0123456789abcdef", "A", "f" * 64])
def test_a_fingerprint_from_elsewhere_is_accepted(here, state, stored):
    state.mkdir(parents=True)
    (state / "fingerprint").write_text(stored)
    track()
    assert here.points[0].resource["user.fingerprint"] == stored
    assert (state / "fingerprint").read_text() == stored


@pytest.mark.parametrize("junk", [b"", b"xyz", b"0" * 65, b"ab cd", b"\xff" * 16, b"0" * (4 << 20)])
def test_junk_in_place_of_the_fingerprint_is_replaced(here, state, junk):
    state.mkdir(parents=True)
    (state / "fingerprint").write_bytes(junk)
    track()
    assert re.fullmatch("[0-9a-f]{64}", (state / "fingerprint").read_text())
    assert here.points[0].resource["user.fingerprint"] == (state / "fingerprint").read_text()


def test_a_fingerprint_that_cannot_be_stored_serves_this_process(here, state):
    (state / "fingerprint").mkdir(parents=True)
    track()
    track()
    first, second = (point.resource["user.fingerprint"] for point in here.points)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == second
    assert (state / "fingerprint").is_dir()


def test_the_fingerprint_is_not_stored_where_telemetry_is_off(state, config, monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    first = trix_telemetry.get_user_fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert trix_telemetry.get_user_fingerprint() == first
    assert not state.exists()


# Encoding


def test_the_body_is_the_one_of_the_contract_to_the_byte():
    metric = trix_telemetry.CommandMetric(
        "trix_command_invocation", "build", 1640995200000000000, 1640995200250000000
    )
    resource = {
        "service.name": "trix-cli",
        "service.version": "0.19.3",
        "user.fingerprint": FINGERPRINT,
    }
    body = json.dumps(metric.encode(resource), separators=(",", ":"))
    assert body == (
        '{"resourceMetrics":[{"resource":{"attributes":['
        '{"key":"service.name","value":{"stringValue":"trix-cli"}},'
        '{"key":"service.version","value":{"stringValue":"0.19.3"}},'
        f'{{"key":"user.fingerprint","value":{{"stringValue":"{FINGERPRINT}"}}}}]}},'
        '"scopeMetrics":[{"scope":{},"metrics":[{"name":"trix_command_invocation","sum":{'
        '"dataPoints":[{"attributes":[{"key":"command_name","value":{"stringValue":"build"}}],'
        '"startTimeUnixNano":"1640995200000000000","timeUnixNano":"1640995200250000000",'
        '"asInt":"1"}],"aggregationTemporality":2,"isMonotonic":true}}]}]}]}'
    )
    assert len(body) < 1024


def test_the_window_begins_at_the_call_and_is_a_millisecond_at_least(here):
    before = time.time_ns()
    track()
    after = time.time_ns()
    (point,) = here.points
    assert before <= point.start <= after
    assert point.start + 1_000_000 <= point.end <= max(after, point.start + 1_000_000)


def test_windows_of_a_process_never_overlap(here, config):
    config(enabled=True)
    for _ in range(8):
        threads = [trix_telemetry.track_command_execution("build") for _ in range(4)]
        for thread in filter(None, threads):
            thread.join(FAR)
    windows = sorted((point.start, point.end) for point in here.points)
    assert len(windows) == 32
    assert all(end - start >= 1_000_000 for start, end in windows)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(windows))


def test_windows_go_on_when_the_clock_is_set_back():
    client = trix_telemetry.OtlpClient()
    ahead = time.time_ns() + 3600 * 10**9
    assert client.window(ahead) == (ahead, ahead + 1_000_000)
    assert client.window(time.time_ns()) == (ahead + 1_000_000, ahead + 2_000_000)


# Sending


def test_the_request_is_what_the_contract_says(here):
    track()
    ((line, headers, body),) = here.requests
    assert line == "POST /v1/metrics HTTP/1.1"
    assert headers == {
        "User-Agent": f"trix-telemetry/{trix_telemetry.__version__}",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Host": here.url.removeprefix("http://"),
        "Connection": "close",
    }


def test_configured_headers_are_added_by_the_rules(here, config):
    config("""
        [telemetry.otlp_headers]
        Authorization = "Bearer abc"
        "X-Caf\u00e9" = "name"
        "X Space" = "name"
        "X:Colon" = "name"
        "" = "name"
        X-Control = "\\u0001"
        X-Wide = "\u0416"
        X-Latin = "caf\u00e9"
        content-TYPE = "text/plain"
        Content-Length = "1"
        host = "elsewhere"
        connection = "keep-alive"
        Transfer-Encoding = "chunked"
    """)
    track()
    ((_, headers, body),) = here.requests
    assert headers["Authorization"] == "Bearer abc"
    assert headers["X-Latin"] == "caf\u00e9"
    assert headers["Content-Type"] == "application/json"
    assert headers["Content-Length"] == str(len(body))
    assert headers["Host"] == here.url.removeprefix("http://")
    assert headers["Connection"] == "close"
    assert len(headers) == 8


def test_a_proxy_of_the_environment_is_honoured(here, monkeypatch):
    proxy = Collector()
    monkeypatch.setenv("http_proxy", proxy.url)
    track()
    assert proxy.requests[0][0] == f"POST {here.url}/v1/metrics HTTP/1.1"
    assert proxy.requests[0][1]["Host"] == here.url.removeprefix("http://")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    track()
    assert (len(proxy.requests), len(here.requests)) == (1, 1)
    proxy.close()


# Delivery from a process that ends at once


def test_200_of_200_processes_that_end_at_once_deliver(here, config):
    config(timeout_ms=30_000)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import trix_telemetry as t\n"
    code += "t.track_command_execution('build')"
    running = []
    for _ in range(200):
        if len(running) == 8:
            assert running.pop(0).wait(FAR) == 0
        running.append(subprocess.Popen([sys.executable, "-c", code]))
    assert [process.wait(FAR) for process in running] == [0] * 8
    assert len(here.requests) == 200
    assert len({point.resource["user.fingerprint"] for point in here.points}) == 1


@pytest.mark.parametrize("table", [None, "[other]\na = 1\n"])
def test_40_first_runs_at_the_same_moment(here, state, config, table):
    if table:
        config(table)
    go = time.time() + 3
    code = f"import sys, time; sys.path.insert(0, {str(HERE)!r}); import trix_telemetry as t\n"
    code += f"time.sleep(max(0, {go} - time.time())); t._TIMEOUT_MS = 30_000\n"
    code += "t.track_command_execution('build')"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        for _ in range(40)
    ]
    notices = [process.communicate(timeout=2 * FAR)[1] for process in processes]
    assert sorted(map(bool, notices)) == [False] * 39 + [True]
    assert len(here.requests) == 40
    assert len({point.resource["user.fingerprint"] for point in here.points}) == 1
    assert sorted(path.name for path in state.iterdir()) == ["config.toml", "fingerprint"]
    assert (state / "config.toml").read_text().count("[telemetry]") == 1


def test_many_that_find_junk_agree_on_one_fingerprint(here, state, config):
    config(timeout_ms=30_000)
    (state / "fingerprint").write_text("junk")
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import trix_telemetry as t\n"
    code += "t.track_command_execution('build')"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(16)]
    assert [process.wait(FAR) for process in processes] == [0] * 16
    stored = (state / "fingerprint").read_text()
    assert {point.resource["user.fingerprint"] for point in here.points} == {stored}


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(state, config):
    wanted = {"[telemetry]\nenabled = true\n", "[telemetry]\nenabled = false\n"}
    path = config("[telemetry]\nenabled = true\n")
    code = f"""if True:
        import sys; sys.path.insert(0, {str(HERE)!r}); import trix_telemetry as t
        t.main(["status"])
        print("ready", flush=True)
        while True:
            t.main(["disable"]); t.main(["enable"])
    """
    for delay in range(12):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        while process.stdout.readline() != "ready\n":
            pass
        time.sleep(0.001 + delay * 0.0007)
        process.kill()
        process.communicate()
        assert path.read_text() in wanted
        assert trix_telemetry.main(["enable"]) == 0


def test_threads_that_call_at_once_share_one_handle(here, config):
    config(enabled=True)
    barrier = threading.Barrier(4)
    handles = []

    def call():
        barrier.wait()
        track()
        handles.append(trix_telemetry._client())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FAR)
    assert len(here.requests) == 4
    assert len(set(map(id, handles))) == 1


# A hostile network: raw servers on loopback, and a small budget


class Hostile:
    """A listening socket whose connections a function speaks with, each on its own thread."""

    def __init__(self, speak, backlog=16):
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.accepted = 0
        self.speak = speak
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.accepted += 1
                threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with contextlib.suppress(OSError), connection:
            self.speak(connection)

    def close(self):
        self.socket.close()


@pytest.fixture
def hostile():
    servers = []

    def serve(speak):
        servers.append(Hostile(speak))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


def drip(first, more, pause):
    def speak(connection):
        connection.recv(65536)
        connection.sendall(first)
        for _ in range(int(FAR / pause)):
            connection.sendall(more)
            time.sleep(pause)

    return speak


def say(*parts):
    def speak(connection):
        connection.recv(65536)
        for part in parts:
            connection.sendall(part)

    return speak


def silence(connection):
    time.sleep(FAR)


def reset(connection):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def flood(connection):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


OK = b"HTTP/1.1 200 OK\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HOLDS = {
    "says nothing": silence,
    "a header every 300 ms": drip(OK, b"X-A: b\r\n", 0.3),
    "endless 100 Continue": drip(b"", CONTINUE, 0.05),
    "a byte of the status every 100 ms": drip(b"", b"H", 0.1),
}
FAILS_AT_ONCE = {
    "a flood of 100 Continue": drip(b"", CONTINUE * 40_000, 1),
    "noise": say(random.Random(1).randbytes(4096)),
    "a reset": reset,
    "a close": say(),
    "an endless header": drip(OK, b"x" * 65536, 0.001),
}


@pytest.mark.parametrize("name", HOLDS)
def test_one_budget_for_whatever_holds_the_line(hostile, config, state, name):
    server = hostile(HOLDS[name])
    config(otlp_endpoint=f"http://{server.address}", timeout_ms=400)
    began = time.monotonic()
    done = tool()
    assert silent(done), done.stderr
    assert time.monotonic() - began < FAR / 3
    assert "timed out after" in (state / "cooldown").read_text()
    assert "waiting for the answer" in (state / "cooldown").read_text()


@pytest.mark.parametrize("name", HOLDS)
def test_the_thread_ends_with_the_budget_too(hostile, config, name):
    server = hostile(HOLDS[name])
    config(otlp_endpoint=f"http://{server.address}", timeout_ms=300)
    thread = trix_telemetry.track_command_execution("build")
    thread.join(FAR / 3)
    assert not thread.is_alive()


@pytest.mark.parametrize("name", FAILS_AT_ONCE)
def test_what_fails_at_once_costs_no_time_and_starts_no_cool_down(hostile, config, state, name):
    server = hostile(FAILS_AT_ONCE[name])
    config(otlp_endpoint=f"http://{server.address}", timeout_ms=1000 * FAR)
    assert silent(tool(timeout=FAR / 2))
    assert not (state / "cooldown").exists()


def test_a_body_of_10_gb_is_not_read(hostile, config, state):
    config(otlp_endpoint=f"http://{hostile(flood).address}", timeout_ms=1000 * FAR)
    assert silent(tool(timeout=FAR / 2))
    done = tool(env={"TRIX_TELEMETRY_DEBUG": "1"}, timeout=FAR / 2)
    assert "sent: HTTP 200" in done.stderr


def test_a_body_that_drips_does_not_hold_the_process(hostile, config, state):
    dripping = drip(OK + b"Content-Length: 1000\r\n\r\n", b"x", 0.2)
    config(otlp_endpoint=f"http://{hostile(dripping).address}", timeout_ms=1000 * FAR)
    assert silent(tool(timeout=FAR / 2))
    config(otlp_endpoint=f"http://{hostile(dripping).address}", timeout_ms=500)
    done = tool(env={"TRIX_TELEMETRY_DEBUG": "1"}, timeout=FAR / 2)
    assert "sent: HTTP 200" in done.stderr


def test_connects_that_never_complete(config, state):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        address = listening.getsockname()
        fill = [socket.socket() for _ in range(4)]
        for each in fill:
            each.setblocking(False)
            each.connect_ex(address)
        config(otlp_endpoint=f"http://127.0.0.1:{address[1]}", timeout_ms=400)
        done = tool(timeout=FAR / 3)
        for each in fill:
            each.close()
    assert silent(done)
    assert "connecting to 127.0.0.1" in (state / "cooldown").read_text()


RESOLVER = """
import socket, sys, time
def getaddrinfo(host, port, *args, **options):
    time.sleep({sleep})
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, {port})) for a in {addresses}]
socket.getaddrinfo = getaddrinfo
trix_telemetry.track_command_execution("build")
"""


def test_a_resolver_that_takes_20_seconds(config, state):
    config(otlp_endpoint="http://slow.example", timeout_ms=400)
    done = tool(RESOLVER.format(sleep=20, addresses=[], port=1), timeout=FAR / 2)
    assert silent(done)
    assert "looking up slow.example" in (state / "cooldown").read_text()


def test_a_dead_address_does_not_take_the_whole_budget(collector, config):
    port = collector.port
    listening = socket.create_server(("127.0.0.2", port), backlog=0)
    fill = [socket.socket() for _ in range(4)]
    for each in fill:
        each.setblocking(False)
        each.connect_ex(("127.0.0.2", port))
    config(otlp_endpoint="http://several.example", timeout_ms=4000)
    addresses = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    done = tool(RESOLVER.format(sleep=0, addresses=addresses, port=port))
    for each in (*fill, listening):
        each.close()
    assert silent(done)
    assert collector.commands == ["build"]


def test_three_dead_addresses_share_one_budget(config, state):
    listening = socket.create_server(("127.0.0.2", 0), backlog=0)
    port = listening.getsockname()[1]
    fill = [socket.socket() for _ in range(4)]
    for each in fill:
        each.setblocking(False)
        each.connect_ex(("127.0.0.2", port))
    config(otlp_endpoint="http://several.example", timeout_ms=600)
    code = RESOLVER.format(sleep=0, addresses=["127.0.0.2"] * 3, port=port)
    done = tool(f"{code}\ntime.sleep(0.9); import threading; assert threading.active_count() == 1")
    for each in (*fill, listening):
        each.close()
    assert silent(done), done.stderr
    assert (state / "cooldown").exists()


def test_a_name_that_does_not_resolve(config, state):
    config(otlp_endpoint="http://nowhere.invalid", timeout_ms=1000 * FAR)
    code = "import socket\ndef fail(*a, **k): raise socket.gaierror(-2, 'Name not known')\n"
    code += "socket.getaddrinfo = fail; trix_telemetry.track_command_execution('build')"
    assert silent(tool(code))
    done = tool(code, env={"TRIX_TELEMETRY_DEBUG": "1"})
    assert "failed: unknown host, looking up nowhere.invalid: Name not known" in done.stderr
    assert not (state / "cooldown").exists()


def test_a_refused_connection_starts_no_cool_down(config, state):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    config(otlp_endpoint=f"http://127.0.0.1:{port}", timeout_ms=1000 * FAR)
    assert silent(tool())
    assert not (state / "cooldown").exists()


@pytest.fixture
def debug(monkeypatch, capfd):
    """Tracks in this process, and returns what TRIX_TELEMETRY_DEBUG tells of it."""

    def told():
        monkeypatch.setenv("TRIX_TELEMETRY_DEBUG", "1")
        track()
        monkeypatch.delenv("TRIX_TELEMETRY_DEBUG")
        return capfd.readouterr().err

    return told


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["{url}/elsewhere", "file:///etc/passwd", "//other.invalid/"])
def test_redirects_are_not_followed(here, debug, status, target):
    here.answer = (status, {"Location": target.format(url=here.url)}, b"")
    told = debug()
    assert f"failed: HTTP {status} after" in told
    assert f"redirect to {target.format(url=here.url)}, which is not followed" in told
    assert len(here.requests) == 1


@pytest.mark.parametrize("status", [201, 202, 204, 299])
def test_any_2xx_is_a_success(here, debug, status):
    here.answer = (status, {}, b"")
    assert f"sent: HTTP {status}" in debug()


@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 502, 503])
def test_other_statuses_fail_in_silence(here, config, state, debug, capfd, status):
    config(enabled=True)
    here.answer = (status, {}, b"go away \x1b[31m")
    track()
    assert capfd.readouterr() == ("", "")
    assert re.search(rf"failed: HTTP {status} after \d+ ms: go away \?\[31m", debug())
    assert not (state / "cooldown").exists()


# TLS

# An authority, and a certificate of it for localhost and 127.0.0.1, both until the year 2126.
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBlTCCATygAwIBAgIUNmiDwmVQp4DOI6eNi+cvnAChRdgwCgYIKoZIzj0EAwIw
KDENMAsGA1UECgwEVGVzdDEXMBUGA1UEAwwOVGVzdCBBdXRob3JpdHkwIBcNMjYx
MTIzMDE1NDQyWhgPMjEyNjEwMzAwMTU0NDJaMCgxDTALBgNVBAoMBFRlc3QxFzAV
BgNVBAMMDlRlc3QgQXV0aG9yaXR5MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE
zGG7nRvl1M7P/c64uxxLKIaz1zv8MsDJax1WwYn0DDVHrZURlVTu9ZnUJPCz69VE
ueeOkCxmjvIchcW0m1/4fqNCMEAwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8E
BAMCAQYwHQYDVR0OBBYEFD83MH5DVjGULqRGNYKJt108Bf3VMAoGCCqGSM49BAMC
A0cAMEQCIDqexsFabE6sYXney5hDSCYxgKMvlR5dTckPbKgvPKanAiAgBWPX+h/u
c3Ss5cVyatiLuVLqi4JKnGMIhxRnvtYhOw==
-----END CERTIFICATE-----
"""
AUTHORITY_HASH = "00ad8108.0"  # openssl x509 -subject_hash
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBwTCCAWagAwIBAgIBAjAKBggqhkjOPQQDAjAoMQ0wCwYDVQQKDARUZXN0MRcw
FQYDVQQDDA5UZXN0IEF1dGhvcml0eTAgFw0yNjExMjMwMTU0NDJaGA8yMTI2MTAz
MDAxNTQ0MlowFDESMBAGA1UEAwwJY29sbGVjdG9yMFkwEwYHKoZIzj0CAQYIKoZI
zj0DAQcDQgAEr58ALSsGFGAza+DLXibBcsz+sXRlht6RX/kl28Hy/o0hsdU6Y/I0
+bNjmz8se0V21uD6zAJdTSAkuvIsjEaL6qOBkjCBjzAMBgNVHRMBAf8EAjAAMA4G
A1UdDwEB/wQEAwIHgDATBgNVHSUEDDAKBggrBgEFBQcDATAdBgNVHQ4EFgQUKuWj
IlFNeZN5E2gAQbDGyGY+fM8wHwYDVR0jBBgwFoAUPzcwfkNWMZQupEY1gom3XTwF
/dUwGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAoGCCqGSM49BAMCA0kAMEYC
IQD5Z7dqOKVrye+/VjdPi8r9CYsx7nXf9tdGLnmJQ/5qKgIhALg4L0nYPNpN8OS9
qSLRNdzDFSfJP2diXJacN4cfPjE4
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg0qEYYzJms2jYWjLI
v3JGa+BTBXS1D7z9oeOqAtGJZnWhRANCAASvnwAtKwYUYDNr4MteJsFyzP6xdGWG
3pFf+SXbwfL+jSGx1Tpj8jT5s2ObPyx7RXbW4PrMAl1NICS68iyMRovq
-----END PRIVATE KEY-----
"""


@pytest.fixture
def secure(home, monkeypatch):
    """A collector with a certificate, and no authority that anybody knows."""
    (home / "certificate.pem").write_text(CERTIFICATE)
    (home / "authority.pem").write_text(AUTHORITY)
    (home / "empty").mkdir()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "certificate.pem")
    collector = Collector(context)
    monkeypatch.setenv("SSL_CERT_DIR", str(home / "empty"))
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", collector.url)
    yield collector
    collector.close()


def test_tls_with_an_authority_in_a_file(secure, home, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(home / "authority.pem"))
    track()
    assert secure.commands == ["build"]


def test_tls_with_an_authority_in_a_hashed_directory(secure, home, config):
    (home / "empty" / AUTHORITY_HASH).write_text(AUTHORITY)
    config(enabled=True)
    done = tool("""
        import ssl
        made = []
        original = ssl.create_default_context
        def create(**options):
            made.append(options)
            return original(**options)
        ssl.create_default_context = create
        trix_telemetry.track_command_execution("build").join()
        print([list(options) for options in made])
    """)
    assert (done.stdout, done.stderr) == ("[['capath']]\n", "")
    assert secure.commands == ["build"]


def test_tls_with_a_hashed_directory_that_lacks_the_authority(secure, home, config):
    (home / "empty" / "01234567.0").write_text(AUTHORITY)
    config(enabled=True)
    authority = str(home / "authority.pem")
    done = tool(f"""
        import ssl
        original = ssl.create_default_context
        def create(**options):  # as if the system's bundle had it
            return original(**options) if options else original(cafile={authority!r})
        ssl.create_default_context = create
        trix_telemetry.track_command_execution("build")
    """)
    assert silent(done), done.stderr
    assert secure.commands == ["build"]


@pytest.mark.parametrize("hashed", [True, False])
def test_tls_with_an_unknown_authority(secure, home, config, state, hashed):
    if hashed:
        (home / "empty" / "01234567.0").write_text(AUTHORITY)
    config(enabled=True)
    assert silent(tool())
    assert secure.requests == []
    assert not (state / "cooldown").exists()
    done = cli("track", "build")
    assert done.returncode == 1
    assert "certificate not accepted: unable to get local issuer certificate" in done.stderr
    assert "SSL_CERT_FILE" in done.stderr
    assert "Test Authority" in done.stderr


def test_tls_with_another_host_name(secure, home, config, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(home / "authority.pem"))
    config(enabled=True)
    other = {"TRIX_TELEMETRY_ENDPOINT": f"https://127.0.0.2:{secure.port}"}
    code = "import socket; found = socket.getaddrinfo\n"
    code += "def lookup(host, *a, **k): return found('127.0.0.1', *a, **k)\n"
    code += "socket.getaddrinfo = lookup; trix_telemetry.track_command_execution('build')"
    assert silent(tool(code, env=other))
    done = tool(code, env={**other, "TRIX_TELEMETRY_DEBUG": "1"})
    assert "certificate not accepted: IP address mismatch" in done.stderr
    assert secure.requests == []


def test_tls_to_a_port_that_speaks_plain_http_and_the_reverse(secure, collector, config, state):
    config(enabled=True)
    for url in (f"https://127.0.0.1:{collector.port}", f"http://127.0.0.1:{secure.port}"):
        env = {"TRIX_TELEMETRY_ENDPOINT": url}
        assert silent(tool(env=env))
        done = tool(env={**env, "TRIX_TELEMETRY_DEBUG": "1"})
        assert (
            f"does the port speak {'http' if url.startswith('https') else 'https'}?" in done.stderr
        )
    assert (secure.requests, collector.requests) == ([], [])


def test_a_handshake_that_never_ends(hostile, config, state):
    config(otlp_endpoint=f"https://{hostile(silence).address}", timeout_ms=400)
    assert silent(tool(timeout=FAR / 3))
    assert "setting up TLS" in (state / "cooldown").read_text()


def test_tls_reading_is_bound_by_the_budget(secure, home, config, state, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(home / "authority.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "certificate.pem")

    def speak(connection):
        with context.wrap_socket(connection, server_side=True) as wrapped:
            drip(OK, b"X-A: b\r\n", 0.1)(wrapped)

    server = Hostile(speak)
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", f"https://{server.address}")
    config(timeout_ms=600)
    thread = trix_telemetry.track_command_execution("build")
    thread.join(FAR / 3)
    server.close()
    assert not thread.is_alive()
    assert "waiting for the answer" in (state / "cooldown").read_text()


# Cool-down


def hold(hostile, config, **settings):
    server = hostile(silence)
    config(otlp_endpoint=f"http://{server.address}", timeout_ms=150, **settings)
    return server


def cooldown(state):
    until, seconds, url, reason = (state / "cooldown").read_text().rstrip("\n").split(" ", 3)
    return int(until) - time.time(), int(seconds), url, reason


def test_a_budget_used_up_is_not_paid_for_again(hostile, config, state):
    server = hold(hostile, config)
    track()
    to_go, seconds, url, _ = cooldown(state)
    assert (seconds, url) == (60, f"http://{server.address}/v1/metrics")
    assert 50 < to_go <= 60
    track()
    assert silent(tool())
    assert server.accepted == 1
    assert stat.S_IMODE((state / "cooldown").stat().st_mode) == 0o600


def test_it_is_written_when_the_process_ends_first(config, state):
    config(otlp_endpoint="http://slow.example", timeout_ms=300)
    assert silent(tool(RESOLVER.format(sleep=20, addresses=[], port=1)))
    assert cooldown(state)[1] == 60


def test_it_doubles_to_an_hour(hostile, config, state):
    hold(hostile, config)
    lengths = []
    for _ in range(8):
        track()
        until, seconds, rest = (state / "cooldown").read_text().split(" ", 2)
        lengths.append(int(seconds))
        (state / "cooldown").write_text(f"{int(until) - 4000} {seconds} {rest}")
    assert lengths == [60, 120, 240, 480, 960, 1920, 3600, 3600]


def test_processes_beside_each_other_start_one_cool_down(hostile, config, state):
    hold(hostile, config)
    threads = [trix_telemetry.track_command_execution("build") for _ in range(4)]
    for thread in threads:
        thread.join(FAR)
    assert cooldown(state)[1] == 60


@pytest.mark.parametrize("end", ["success", "enable", "another endpoint"])
def test_what_ends_it(hostile, config, state, collector, end):
    hold(hostile, config)
    track()
    assert (state / "cooldown").exists()
    if end == "enable":
        trix_telemetry.main(["enable"])
    else:
        if end == "success":
            (state / "cooldown").write_text(f"0 60 {collector.url}/v1/metrics x\n")
        config(otlp_endpoint=collector.url)
        track()
        assert collector.commands == ["build"]
    assert not (state / "cooldown").exists()


def far(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("120", 120, 120), ("99999", 3600, 3600), ("9" * 5000, 3600, 3600), (far(600), 500, 600)],
)
def test_retry_after_is_honoured_within_an_hour(here, config, state, status, value, low, high):
    config(enabled=True)
    here.answer = (status, {"Retry-After": value}, b"")
    track()
    assert low <= cooldown(state)[1] <= high
    track()
    assert len(here.requests) == 1


@pytest.mark.parametrize("value", ["0", "-5", "soon", "", "\u00b2", far(-600), "Thu, 99 Foo"])
def test_a_retry_after_that_says_nothing(here, config, state, value):
    config(enabled=True)
    here.answer = (503, {"Retry-After": value}, b"")
    track()
    assert not (state / "cooldown").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "junk", "1 2", "{now} 60", "{soon} x {url} r", "{soon} 60 http://other/v1/metrics r",
        "{far} 60 {url} from the future", "{soon} 999999 {url} r", "{soon} 0 {url} r",
        "{soon} -60 {url} r", "9" * 5000 + " 60 {url} r", "nan 60 {url} r", "{past} 60 {url} ended",
    ],
)  # fmt: skip
def test_a_damaged_foreign_or_future_file_means_none(here, config, state, text):
    config(enabled=True)
    now = int(time.time())
    url = f"{here.url}/v1/metrics"
    times = {"now": now, "soon": now + 30, "far": now + 90, "past": now - 1}
    (state / "cooldown").write_text(text.format(url=url, **times))
    track()
    assert here.commands == ["build"]


def test_no_message_ends_a_cool_down_that_runs(here, config, state):
    config(enabled=True)
    (state / "cooldown").write_text(f"{int(time.time()) + 30} 60 {here.url}/v1/metrics r\n")
    done = tool(env={"TRIX_TELEMETRY_DEBUG": "1"})
    assert re.search(r"off: cooling down for \d+ s: r", done.stderr)
    assert here.requests == []


# The end of the process


def test_a_command_that_outlasts_its_request_waits_for_nothing(config, state):
    config(otlp_endpoint="http://slow.example", timeout_ms=100)
    code = RESOLVER.format(sleep=20, addresses=[], port=1)
    code += "time.sleep(1)\nbegan = time.monotonic()\nimport atexit, os\n"
    code += "trix_telemetry._at_exit()\nassert time.monotonic() - began < 10"
    assert silent(tool(code))


def test_output_arrives_before_the_wait(hostile, config):
    server = hostile(silence)
    config(otlp_endpoint=f"http://{server.address}", timeout_ms=1000 * FAR)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import trix_telemetry as t\n"
    code += "t.track_command_execution('build'); print('done')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    late = threading.Timer(FAR / 2, process.kill)
    late.start()
    assert process.stdout.readline() == "done\n"
    late.cancel()
    assert process.poll() is None
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 7), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_wait_at_once(hostile, config, sent, code):
    server = hostile(silence)
    config(otlp_endpoint=f"http://{server.address}", timeout_ms=1000 * FAR)
    script = f"import signal, sys; sys.path.insert(0, {str(HERE)!r}); import trix_telemetry as t\n"
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # if it was ignored
    script += "t.track_command_execution('build'); print('done'); sys.exit(7)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "done\n"
    time.sleep(1)  # the interpreter is at its end by then, and in the wait
    process.send_signal(sent)
    assert process.communicate(timeout=FAR / 2) == ("", "")
    assert process.returncode == code


def test_exit_code_and_streams_are_those_of_the_tool(hostile, config):
    hold(hostile, config)
    done = tool("""
        trix_telemetry.track_command_execution("build")
        print("out")
        raise ValueError("the tool's own")
    """)
    assert (done.returncode, done.stdout) == (1, "out\n")
    assert done.stderr.endswith("ValueError: the tool's own\n")
    assert "trix_telemetry.py" not in done.stderr


def test_a_reader_that_is_gone_changes_nothing(hostile, config):
    hold(hostile, config)
    code = f"print('x' * 10); import sys; sys.path.insert(0, {str(HERE)!r})\n"
    with_it = code + "import trix_telemetry as t; t.track_command_execution('build')"
    results = []
    for script in (code, with_it):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True
        )
        os.close(write)
        results.append((done.returncode, done.stderr))
    assert results[0] == results[1]
    assert results[0][0] == 120


def test_os_exit_waits_for_nothing(hostile, config):
    server = hostile(silence)
    config(otlp_endpoint=f"http://{server.address}", timeout_ms=1000 * FAR)
    done = tool("import os; trix_telemetry.track_command_execution('build'); os._exit(3)")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


@pytest.mark.parametrize("before", ["", "trix_telemetry.track_command_execution('first')\n"])
def test_a_track_at_interpreter_shutdown(here, config, before):
    config(enabled=True)
    code = "import atexit, weakref\nclass A: pass\na = A()\n"
    code += "atexit.register(trix_telemetry.track_command_execution, 'late')\n"
    code += f"{before}"
    code += (
        "class Last:\n    def __del__(self, t=trix_telemetry.track_command_execution): t('gone')\n"
    )
    code += "last = Last()\n"
    for _ in range(5):
        assert silent(tool(code))
    assert here.commands.count("first") == (5 if before else 0)


def test_the_thread_imports_only_while_nobody_can_fork(here):
    code = """
        import threading
        loose = []
        def audit(event, args):
            if event == "import" and threading.current_thread().name == "telemetry":
                if not trix_telemetry._client().importing._is_owned():
                    loose.append(args[0])
        sys.addaudithook(audit)
        trix_telemetry.track_command_execution("build").join()
        print(loose)
    """
    for _ in range(2):
        assert tool(code).stdout == "[]\n"
    assert here.commands == ["build", "build"]


def test_a_fork_at_any_moment_leaves_a_child_that_can_import(here, config):
    config(enabled=True)
    code = """
        import os, sys, time
        trix_telemetry.track_command_execution("parent")
        time.sleep({delay})
        child = os.fork()
        if child == 0:
            import tomllib, json, urllib.request, ssl
            trix_telemetry.track_command_execution("child").join()
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    for step in range(10):
        done = tool(code.format(delay=step * 0.007), "-W", "error")
        assert silent(done), done.stderr
    assert sorted(here.commands) == ["child"] * 10 + ["parent"] * 10


def test_an_import_cut_off_by_the_end_does_not_hang_the_process(here, config):
    config(timeout_ms=1)
    code = """
        class Last:
            def __del__(self):
                import tomllib, json, urllib.request, ssl
        last = Last()
        trix_telemetry.track_command_execution("build")
    """
    for _ in range(5):
        done = tool(code)
        assert done.returncode == 0
        (pathlib.Path(os.environ["HOME"]) / ".tx3/trix/cooldown").unlink(missing_ok=True)


def test_no_import_begins_once_the_end_has(home):
    client = trix_telemetry._client()
    client.load("json")
    trix_telemetry._at_exit()
    with pytest.raises(trix_telemetry._Off, match="at its end"):
        client.load("json")


def test_a_stderr_that_blocks_does_not_break_the_exit(here):
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    done = tool(capture_output=False, stderr=write, stdout=subprocess.DEVNULL)
    os.close(read)
    os.close(write)
    assert done.returncode == 0


def test_a_fork_sends_nothing_twice_and_says_nothing(here, config):
    config(enabled=True)
    done = tool(
        """
        import os, sys
        trix_telemetry.track_command_execution("parent")
        child = os.fork()
        if child == 0:
            trix_telemetry.track_command_execution("child")
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """,
        "-W",
        "error",
    )
    assert silent(done), done.stderr
    assert sorted(here.commands) == ["child", "parent"]


def test_a_forked_child_does_not_wait_for_its_parents_send(hostile, config):
    server = hostile(silence)
    config(otlp_endpoint=f"http://{server.address}", timeout_ms=1000 * FAR)
    done = tool(
        """
        import os, sys, time
        trix_telemetry.track_command_execution("parent")
        time.sleep(0.3)
        child = os.fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        os._exit(0)
    """,
        timeout=FAR / 2,
    )
    assert silent(done), done.stderr


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(here, config, home, method):
    config(enabled=True)
    script = home / "pool.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import multiprocessing, trix_telemetry as t\n"
        "def work(n):\n    t.track_command_execution('child').join()\n    return n\n"
        "if __name__ == '__main__':\n"
        "    t.track_command_execution('parent')\n"
        f"    with multiprocessing.get_context({method!r}).Pool(2) as pool:\n"
        "        assert pool.map(work, range(3)) == [0, 1, 2]\n"
        "        pool.close(); pool.join()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=2 * FAR)
    assert silent(done), done.stderr
    assert sorted(here.commands) == ["child"] * 3 + ["parent"]


def test_an_event_loop_goes_on(here, config):
    config(enabled=True)
    done = tool(
        """
        import asyncio
        async def main():
            trix_telemetry.track_command_execution("build")
            await asyncio.sleep(0)
        asyncio.run(main())
    """,
        "-X",
        "dev",
        "-W",
        "error",
    )
    assert silent(done), done.stderr
    assert here.commands == ["build"]


def test_a_signal_handler_may_track_too(here, config):
    config(enabled=True)
    done = tool("""
        import signal
        signal.signal(signal.SIGALRM, lambda *_: trix_telemetry.track_command_execution("alarm"))
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        for _ in range(300):
            trix_telemetry.track_command_execution("build")
        signal.setitimer(signal.ITIMER_REAL, 0)
    """)
    assert silent(done), done.stderr


def test_at_most_four_sends_are_under_way(hostile, config):
    server = hostile(silence)
    config(otlp_endpoint=f"http://{server.address}", timeout_ms=1500)
    threads = [trix_telemetry.track_command_execution("build") for _ in range(10)]
    assert [thread is not None for thread in threads] == [True] * 4 + [False] * 6
    for thread in threads[:4]:
        thread.join(FAR)
    assert server.accepted <= 4


def test_nothing_grows_over_10000_calls(here, config):
    config(enabled=True)

    def measure():
        for thread in threading.enumerate():
            if thread.name == "telemetry":
                thread.join(FAR)
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    track()
    before = measure()
    for _ in range(10_000):
        trix_telemetry.track_command_execution("build")
    after = measure()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 2  # of the collector, which runs in this process
    assert len(trix_telemetry._client().calls) <= 4


# Strange places


@pytest.mark.parametrize(
    "flags", [["-I"], ["-S"], ["-I", "-S"], ["-OO"], ["-X", "dev", "-W", "error"], ["-E", "-B"]]
)
def test_flags_of_the_interpreter(here, config, flags):
    config(enabled=True)
    assert silent(tool("trix_telemetry.track_command_execution('build')", *flags))
    assert here.commands == ["build"]


@pytest.mark.parametrize("value", [None, "", "relative", "/dev/null", "/proc"])
def test_a_home_that_is_none(here, value, home):
    done = tool(env={"HOME": value}, cwd=home)
    assert silent(done)
    assert here.requests == []
    assert list(home.iterdir()) == []


@pytest.fixture
def locked(home, state):
    """A home of which nothing can be changed, by us neither."""
    state.mkdir(parents=True)
    paths = [state, state.parent, home]
    parents = [path for path in home.parents if "pytest" in path.name]

    def lock():
        for path in (*paths, *state.iterdir()):
            path.chmod(0o555)
        for path in parents:
            path.chmod(path.stat().st_mode | 0o055)

    yield lock
    for path in paths:
        path.chmod(0o755)


NOBODY = """
import os
import email.utils, encodings.idna, fcntl, hashlib, json, platform, signal, tempfile, threading
import urllib.request
if os.geteuid() == 0:  # to whom no permission is denied
    os.setuid(65534)
"""


def test_a_disk_that_cannot_be_written_without_a_config(here, locked, state):
    locked()
    done = tool(f"{NOBODY}\ntrix_telemetry.track_command_execution('build')")
    assert silent(done), done.stderr
    assert here.requests == []
    assert list(state.iterdir()) == []


def test_a_disk_that_cannot_be_written_with_a_config(here, config, locked):
    locked_config = pathlib.Path(os.environ["HOME"]) / ".tx3" / "trix" / "config.toml"
    locked_config.write_text("[telemetry]\nenabled = true\n")
    locked()
    code = "t = trix_telemetry.track_command_execution\nt('build').join(); t('build').join()"
    done = tool(f"{NOBODY}\n{code}")
    assert silent(done), done.stderr
    first, second = (point.resource["user.fingerprint"] for point in here.points)
    assert first == second


def test_a_config_that_cannot_be_read(here, config, locked):
    path = config(enabled=True)
    locked()
    path.chmod(0)
    done = tool(f"{NOBODY}\ntrix_telemetry.track_command_execution('build')")
    assert silent(done), done.stderr
    assert here.requests == []


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk(here, config, state, there):
    if there:
        config(enabled=True)
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    assert silent(tool(f"{full}trix_telemetry.track_command_execution('build')"))
    assert here.commands == (["build"] if there else [])
    assert not state.exists() or [p.name for p in state.iterdir()] == ["config.toml"] * there


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
@pytest.mark.parametrize("there", [True, False])
def test_closed_streams(here, config, state, there, closed):
    if there:
        config(enabled=True)
    redirect = " ".join(f"{number}>&-" for number in closed.split())
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import trix_telemetry as t; "
    code += "t.track_command_execution('build'); sys.exit(5)"
    done = subprocess.run(
        ["sh", "-c", f'exec {sys.executable} -c "$0" {redirect}', code],
        capture_output=True, text=True, timeout=FAR,
    )  # fmt: skip
    told = there or "2" not in closed
    assert (done.returncode, done.stdout) == (5, "")
    assert bool(done.stderr) == (told and not there)
    assert here.commands == (["build"] if told else [])
    assert state.exists() == told


@pytest.mark.parametrize("stream", ["None", "open('/dev/full', 'w')", "closed"])
def test_a_stderr_that_takes_nothing(here, state, stream):
    replaced = "sys.stderr.close()" if stream == "closed" else f"sys.stderr = {stream}"
    done = tool(
        f"{replaced}\nimport os\n"
        "trix_telemetry.track_command_execution('build').join()\nos._exit(0)"
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert here.requests == []


@pytest.mark.parametrize(
    "module", ["tomllib", "urllib", "urllib.request", "threading", "json", "http.client", "hashlib",
               "socket", "atexit", "fcntl", "platform", "stat"]
)  # fmt: skip
def test_a_module_that_is_missing(here, config, module):
    config(enabled=True)
    done = tool(f"""
        sys.modules[{module!r}] = None
        thread = trix_telemetry.track_command_execution("build")
        if thread:
            thread.join()
        del sys.modules[{module!r}]
    """)
    assert silent(done), done.stderr


def test_without_ssl_plain_http_works(here, config):
    config(enabled=True)
    code = "sys.modules['ssl'] = sys.modules['_ssl'] = None\n"
    code += "trix_telemetry.track_command_execution('build')"
    assert silent(tool(code))
    assert here.commands == ["build"]
    assert silent(tool(code, env={"TRIX_TELEMETRY_ENDPOINT": "https://127.0.0.1:1"}))


def test_threads_that_cannot_start(here, config):
    config(enabled=True)
    done = tool("""
        import threading
        threading.stack_size(1 << 46)
        assert trix_telemetry.track_command_execution("build") is None
    """)
    assert silent(done), done.stderr


VENDORED = """
from acme._vendor import usage
usage.initialize_telemetry(
    service_name="acme", service_version="3", endpoint={url!r}, metric_name="acme_commands",
    directory="~/.acme", environment="ACME_USAGE", prog="acme telemetry", commands=["build"],
)
usage.track_command_execution("build")
usage.track_command_execution("other")
"""


@pytest.fixture
def acme(home):
    vendor = home / "lib" / "acme" / "_vendor"
    vendor.mkdir(parents=True)
    (vendor.parent / "__init__.py").touch()
    (vendor / "__init__.py").touch()
    (vendor / "usage.py").write_text(MODULE.read_text())
    return home / "lib"


def test_a_copy_under_another_name_shows_nothing_of_trix(collector, acme, home):
    done = tool(f"sys.path[0] = {str(acme)!r}\n{VENDORED.format(url=collector.url)}")
    (point,) = collector.points
    assert (point.resource["service.name"], point.resource["service.version"]) == ("acme", "3")
    assert point.metric["name"] == "acme_commands"
    assert sorted(path.name for path in home.iterdir()) == [".acme", "lib"]
    assert "acme telemetry disable" in done.stderr
    assert "ACME_USAGE=0" in done.stderr
    text = done.stderr + (home / ".acme" / "config.toml").read_text()
    assert "trix" not in text.lower()


def test_a_copy_with_its_constants_edited(collector, acme, home):
    ours = {
        "SERVICE_NAME": "acme", "SERVICE_VERSION": "3", "ENDPOINT": collector.url,
        "METRIC_NAME": "acme_commands", "DIRECTORY": "~/.acme", "ENVIRONMENT": "ACME_USAGE",
        "PROG": "acme telemetry",
    }  # fmt: skip
    text = MODULE.read_text()
    for name, value in ours.items():
        text, count = re.subn(rf'(?m)^{name} = "[^"]*"', f'{name} = "{value}"', text)
        assert count == 1
    text = re.sub(r"(?m)^(COMMANDS: .*) = None", r'\1 = frozenset({"build"})', text)
    (acme / "acme" / "_vendor" / "usage.py").write_text(text)
    code = f"sys.path[0] = {str(acme)!r}\nfrom acme._vendor import usage\n"
    code += "for name in ('build', 'other'):\n    usage.track_command_execution(name)\n"
    done = tool(f"{code}usage._client().wait()\nsys.exit(usage.main(['status']))")
    (point,) = collector.points
    assert (point.command, point.resource["service.name"]) == ("build", "acme")
    assert (home / ".acme" / "config.toml").exists()
    assert "acme telemetry disable" in done.stderr
    assert done.stdout.startswith("Telemetry: ON\n")
    assert "trix" not in (done.stdout + done.stderr).replace(str(home), "").lower()


def test_a_zipapp(collector, acme, home):
    archive = home / "acme.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        for path in acme.rglob("*.py"):
            file.write(path, path.relative_to(acme))
        main = "\nimport sys\nif sys.argv[1:]:\n    sys.exit(usage.main(sys.argv[1:]))\n"
        file.writestr("__main__.py", VENDORED.format(url=collector.url) + main)
    done = subprocess.run([sys.executable, archive], capture_output=True, text=True, timeout=FAR)
    assert (done.returncode, done.stdout) == (0, "")
    assert collector.commands == ["build"]
    done = subprocess.run([sys.executable, archive, "selftest"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_environment_of_a_copy_is_its_own(collector, acme):
    code = f"sys.path[0] = {str(acme)!r}\n{VENDORED.format(url=collector.url)}"
    assert silent(tool(code, env={"ACME_USAGE": "0"}))
    assert silent(tool(code, env={"ACME_USAGE_ENDPOINT": ""}))
    tool(code, env={"TRIX_TELEMETRY": "0", "TRIX_TELEMETRY_ENDPOINT": ""})
    assert collector.commands == ["build"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("endpoint", 5), ("service_name", b"x"), ("service_name", ""), ("service_version", 1.0),
        ("metric_name", []), ("directory", 7), ("directory", object()), ("environment", ""),
        ("prog", "a\nb"), ("commands", "build"), ("commands", 5), ("commands", ["a", 1]),
        ("commands", [[]]), ("endpoint", "\ud800"), ("service_name", "a\0"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_send_nothing_and_status_tells(here, capsys, name, value):
    trix_telemetry.initialize_telemetry(**{name: value})
    assert track() is None
    assert here.requests == []
    assert trix_telemetry.main(["status"]) == 1
    assert f"{name} of initialize_telemetry" in capsys.readouterr().out


def test_the_last_initialization_decides(here):
    trix_telemetry.initialize_telemetry(service_name="one", endpoint=5)
    trix_telemetry.initialize_telemetry(service_version="9")
    track()
    resource = here.points[0].resource
    assert (resource["service.name"], resource["service.version"]) == ("trix-cli", "9")


def test_initializing_opens_nothing(home):
    trix_telemetry.initialize_telemetry(directory=home / "a", endpoint="http://127.0.0.1:1")
    assert list(home.iterdir()) == []


# The command line: status


def status(capsys, code=0):
    assert trix_telemetry.main(["status", "--json"]) == code
    facts = json.loads(capsys.readouterr().out)
    assert trix_telemetry.main(["status"]) == code
    facts["text"] = capsys.readouterr().out
    return facts


def test_status_creates_nothing(here, home, capsys):
    facts = status(capsys)
    assert (facts["state"], facts["stored"], facts["fingerprint"]) == ("on", "none", None)
    assert facts["text"].startswith("Telemetry: ON\n")
    assert facts["endpoint"] == f"{here.url}/v1/metrics"
    assert list(home.iterdir()) == []


def test_status_says_why_it_is_off(here, config, capsys, monkeypatch):
    config(enabled=True)
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    facts = status(capsys)
    assert (facts["state"], facts["stored"]) == ("off", "on")
    assert "DO_NOT_TRACK" in facts["reason"]
    monkeypatch.delenv("DO_NOT_TRACK")
    config(enabled=False)
    facts = status(capsys)
    assert (facts["state"], facts["stored"]) == ("off", "off")
    assert "config.toml says enabled = false" in facts["reason"]


def test_status_without_an_endpoint(capsys):
    facts = status(capsys)
    assert (facts["state"], facts["endpoint"]) == ("off", None)
    assert "no endpoint" in facts["reason"]


def test_status_without_a_home(here, capsys, monkeypatch):
    monkeypatch.delenv("HOME")
    facts = status(capsys)
    assert (facts["state"], facts["directory"]) == ("off", None)
    assert "HOME" in facts["reason"]


def test_status_of_a_config_that_cannot_be_read(here, state, capsys):
    (state / "config.toml").mkdir(parents=True)
    facts = status(capsys)
    assert (facts["state"], facts["stored"]) == ("off", "unreadable")
    assert "config.toml" in facts["reason"]


@pytest.mark.parametrize(
    ("url", "noted"),
    [
        ("http://collector.example.com", True),
        ("https://collector.example.com", False),
        ("http://127.0.0.1:4318", False),
        ("http://localhost", False),
        ("http://[::1]:4318", False),
    ],
)
def test_status_notes_an_endpoint_that_is_not_encrypted(config, capsys, url, noted):
    config(otlp_endpoint=url)
    facts = status(capsys)
    assert facts["encrypted"] == url.startswith("https")
    assert ("not encrypted" in facts["text"]) == noted


def test_status_shows_a_running_cool_down(hostile, config, capsys):
    hold(hostile, config)
    track()
    facts = status(capsys)
    assert facts["state"] == "on"
    assert 50 < facts["cooldown_seconds"] <= 60
    assert "timed out" in facts["cooldown_reason"]
    assert "timed out" in facts["text"]


def test_status_hides_the_values_of_headers(config, capsys):
    config('[telemetry]\notlp_endpoint = "http://h"\n[telemetry.otlp_headers]\nA-B = "secret"\n')
    facts = status(capsys)
    assert facts["headers"] == ["A-B"]
    assert "secret" not in str(facts)


def test_status_names_a_bad_endpoint_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", "ftp://me:secret@h/?key=secret")
    facts = status(capsys, 1)
    assert facts["state"] == "off"
    assert "TRIX_TELEMETRY_ENDPOINT is not shown" in facts["reason"]
    assert "secret" not in str(facts)


# The command line: enable and disable

EDITS = [
    "[telemetry]\nenabled = true\n",
    "[telemetry]\r\n  enabled=true# yes\r\ntimeout_ms = 5\r\n",
    "[telemetry]\nenabled = true",
    "[other]\nenabled = true\n[telemetry]\nenabled = true\n[third]\nenabled = true\n",
    "telemetry.enabled = true\n[other]\nenabled = true\n",
    "telemetry = { timeout_ms = 5, enabled = true }\n",
    '["telemetry"]\n"enabled" = true\n',
    "['telemetry']\n'enabled'\t=\ttrue\n",
    '[telemetry]\nnote = """\nenabled = true\n"""\nenabled = true # enabled = true\n',
    "[[list]]\nenabled = true\n[[list]]\nenabled = true\n[telemetry]\nenabled = true\n",
    "x = nan\ny = inf\nz = 1979-05-27\n[telemetry]\nenabled = true\n",
    "#enabled = true\n[telemetry]\nenabled = true\nnot_enabled = true\n",
]


@pytest.mark.parametrize("text", EDITS)
def test_disable_changes_the_one_value_and_enable_gives_the_first_bytes_back(config, text):
    path = config(text)
    assert trix_telemetry.main(["disable"]) == 0
    once = path.read_bytes().decode()
    assert len(once) == len(text) + 1
    assert tomllib.loads(once)["telemetry"]["enabled"] is False
    assert trix_telemetry.main(["enable"]) == 0
    assert path.read_bytes().decode() == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a = 1",
        "# only words\r\n",
        "[telemetry]",
        "[telemetry] # ours\ntimeout_ms = 5\n",
        "[ telemetry ]\r\ntimeout_ms = 5\r\n[x]\r\n",
        "[telemetry.otlp_headers]\nA = 'b'\n",
        "telemetry.timeout_ms = 5\n[x]\ny = 1\n",
        "telemetry = {}\n",
        "telemetry = { timeout_ms = 5 }\n",
        "s = '''\n[telemetry]\n'''\n[telemetry]\ntimeout_ms = 5\n",
    ],
)
def test_disable_adds_the_key_where_it_is_missing(config, text):
    path = config(text)
    before = tomllib.loads(text)
    assert trix_telemetry.main(["disable"]) == 0
    after = path.read_bytes().decode()
    table = {**before.get("telemetry", {}), "enabled": False}
    assert tomllib.loads(after) == {**before, "telemetry": table}
    assert re.sub(r"\s|\[telemetry\]|(telemetry\.)?enabled = false,?", "", after) in (
        re.sub(r"\s|\[telemetry\]", "", text)
    )


def test_enable_leaves_alone_what_is_on_already(config):
    for text in ("[telemetry]\n", "[telemetry]\nenabled = true\n"):
        path = config(text)
        before = path.stat().st_ino
        assert trix_telemetry.main(["on"]) == 0
        assert (path.read_text(), path.stat().st_ino) == (text, before)


def test_generated_documents_are_edited_exactly_or_refused(config, capsys):
    keys = ["enabled", '"enabled"', "'enabled'", "telemetry.enabled", '"\\u0065nabled"']
    values = ["true", "false", "1", '"true"', "nan", "[true, [false]]", "{ enabled = true }"]
    values += ['"""\nenabled = true\n"""', "'''enabled = false'''", "1979-05-27 07:32:00", '"a#b"']
    headers = [
        "[telemetry]",
        "[other]",
        "[[list]]",
        "[ telemetry . deep ]",
        '["telemetry"]',
        "[a.telemetry]",
    ]
    edited = 0
    for seed in range(700):
        dice = random.Random(seed)
        lines = []
        for number in range(dice.randint(1, 7)):
            kind = dice.random()
            if kind < 0.3:
                lines.append(dice.choice(["", "  "]) + dice.choice(headers))
            elif kind < 0.7:
                space = dice.choice(["", " ", "\t"])
                lines.append(f"{dice.choice(keys)}{space}={space}{dice.choice(values)}")
            else:
                lines.append(
                    dice.choice([f"k{number} = 1", "# enabled = true", "", "telemetry = {}"])
                )
        text = dice.choice(["\n", "\r\n"]).join(lines) + dice.choice(["", "\n"])
        path = config(text)
        first = path.read_bytes()
        code = trix_telemetry.main(["disable"])
        err = capsys.readouterr().err
        try:
            before = tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            before = None
        if code:
            assert path.read_bytes() == first
            assert re.fullmatch("trix_telemetry: error: .*\n", err), err
            continue
        table = before.get("telemetry", {})
        wanted = repr(sorted_document({**before, "telemetry": {**table, "enabled": False}}))
        assert repr(sorted_document(tomllib.loads(path.read_bytes().decode()))) == wanted, text
        edited += 1
        if type(table.get("enabled")) is bool:
            assert trix_telemetry.main(["enable" if table["enabled"] else "disable"]) == 0
            assert path.read_bytes() == first
        capsys.readouterr()
    assert edited > 100


def sorted_document(value):
    if isinstance(value, dict):
        return sorted((key, sorted_document(each)) for key, each in value.items())
    return [sorted_document(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("text", "says"), BAD_CONFIGS)
@pytest.mark.parametrize("command", ["enable", "disable"])
def test_a_bad_config_is_changed_in_one_value_or_refused(config, capsys, text, says, command):
    path = config(text)
    before = path.read_bytes()
    code = trix_telemetry.main([command])
    err = capsys.readouterr().err
    if code == 0:
        document = tomllib.loads(path.read_text())
        assert document["telemetry"].get("enabled", True) is (command == "enable")
    else:
        assert (code, path.read_bytes()) == (1, before)
        assert re.fullmatch("trix_telemetry: error: .*; nothing was changed\n", err)
    assert [each.name for each in path.parent.iterdir()] == ["config.toml"]


def test_what_is_too_unusual_is_refused_with_a_word_on_what_to_write(config, capsys):
    path = config('[telemetry]\n"\\u0065nabled" = true\n')
    assert trix_telemetry.main(["disable"]) == 1
    err = capsys.readouterr().err
    assert "write `enabled = false` into [telemetry] by hand" in err
    assert "u0065" in path.read_text()


@pytest.mark.parametrize("command", ["enable", "disable", "on", "off"])
def test_a_config_is_made_where_there_is_none(state, capsys, command):
    assert trix_telemetry.main([command]) == 0
    table = tomllib.loads((state / "config.toml").read_text())["telemetry"]
    assert table == {"enabled": command in ("enable", "on"), "timeout_ms": 2000}
    assert stat.S_IMODE((state / "config.toml").stat().st_mode) == 0o600


def test_disable_keeps_the_notice_away(here, capfd):
    trix_telemetry.main(["disable"])
    capfd.readouterr()
    track()
    assert (here.requests, capfd.readouterr().err) == ([], "")


def test_an_edit_follows_a_link_and_keeps_the_mode(home, state, config):
    target = home / "dotfiles.toml"
    target.write_text("[telemetry]\nenabled = true\n")
    target.chmod(0o644)
    state.mkdir(parents=True)
    (state / "config.toml").symlink_to(target)
    trix_telemetry.main(["disable"])
    assert (state / "config.toml").is_symlink()
    assert target.read_text() == "[telemetry]\nenabled = false\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_enable_says_what_still_decides(here, config, capsys, monkeypatch):
    config(enabled=False)
    monkeypatch.setenv("TRIX_TELEMETRY", "off")
    trix_telemetry.main(["enable"])
    assert "TRIX_TELEMETRY is set to off" in capsys.readouterr().out


def test_enable_says_that_a_cool_down_was_ended(hostile, config, capsys):
    hold(hostile, config)
    track()
    trix_telemetry.main(["enable"])
    assert "cool-down was ended" in capsys.readouterr().out


def test_a_config_with_thousands_of_look_alikes_is_edited_in_no_time(config):
    text = "".join(f"[t{n}]\nenabled = true\n" for n in range(5000))
    path = config(f"{text}[telemetry]\nenabled = true\n")
    assert trix_telemetry.main(["disable"]) == 0
    assert path.read_text() == f"{text}[telemetry]\nenabled = false\n"


# The command line: preview, track, reset, selftest and the rest


def test_preview_is_what_track_sends(here, config, capsys):
    config('[telemetry]\nenabled = true\n[telemetry.otlp_headers]\nX-Key = "secret"\n')
    trix_telemetry.get_user_fingerprint()
    assert trix_telemetry.main(["preview", "build"]) == 0
    head, _, body = capsys.readouterr().out.partition("\n\n")
    assert here.requests == []
    track()
    line, headers, sent = here.requests[0]
    assert head.splitlines()[0] == line
    assert "secret" not in head
    shown = dict(row.split(": ", 1) for row in head.splitlines()[1:])
    assert shown == {**headers, "X-Key": "(hidden)"}
    assert list(shown) == list(headers)
    assert re.sub(r'UnixNano":"\d+', "", body.rstrip("\n")) == re.sub(
        r'UnixNano":"\d+', "", sent.decode()
    )


def test_preview_creates_nothing_and_works_when_off(home, capsys, monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    assert trix_telemetry.main(["preview"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.partition("\n\n")[2])
    assert "DO_NOT_TRACK" in err
    assert list(home.iterdir()) == []


def test_track_tells_what_came_of_it(here, config):
    config(enabled=True)
    done = cli("track", "build")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"Sent to {here.url}/v1/metrics: HTTP 200 after \d+ ms\n", done.stdout)


def test_track_sends_where_it_is_told(collector, config):
    config(enabled=True)
    assert cli("track", "build", "--endpoint", f"{collector.url}/x").returncode == 0
    assert collector.requests[0][0].split()[1] == "/x/v1/metrics"


@pytest.mark.parametrize("count", [1, '"1"'])
def test_track_tells_rejected_points_apart(here, config, count):
    config(enabled=True)
    partial = f'{{"partialSuccess":{{"rejectedDataPoints":{count},"errorMessage":"too old"}}}}'
    here.answer = (200, {}, partial.encode())
    done = cli("track", "build")
    assert done.returncode == 1
    assert "the collector rejected 1 data point: too old" in done.stderr
    assert (
        "the collector rejected 1 data point: too old"
        in tool(env={"TRIX_TELEMETRY_DEBUG": "1"}).stderr
    )


@pytest.mark.parametrize(
    "answer",
    [b"", b"[]", b"{", b"null", b'{"partialSuccess":null}', b'{"partialSuccess":[]}', b"\xff\x00",
     b'{"partialSuccess":{"rejectedDataPoints":"0","errorMessage":"a warning"}}',
     b'{"partialSuccess":{"rejectedDataPoints":"many"}}', b"[" * 4000, b"1" * 4000],
)  # fmt: skip
def test_any_other_answer_of_200_is_a_success(here, config, answer):
    config(enabled=True)
    here.answer = (200, {}, answer)
    done = cli("track", "build")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("a warning" in done.stdout) == (b"warning" in answer)


def test_track_in_a_cool_down_sends_all_the_same(here, config, state):
    config(enabled=True)
    (state / "cooldown").write_text(f"{int(time.time()) + 30} 60 {here.url}/v1/metrics r\n")
    assert cli("track", "build").returncode == 0
    assert here.commands == ["build"]
    assert not (state / "cooldown").exists()


@pytest.mark.parametrize("reason", ["off", "no endpoint", "invalid"])
def test_track_when_off(here, config, state, reason):
    if reason != "no endpoint":
        config("[telemetry]\n" + ("enabled = false\n" if reason == "off" else "timeout_ms = 0\n"))
    done = cli(
        "track", "build", env={} if reason != "no endpoint" else {"TRIX_TELEMETRY_ENDPOINT": ""}
    )
    assert done.returncode == 0
    assert done.stdout.startswith("Not sent, telemetry is off: ")
    assert here.requests == []


def test_track_that_fails(hostile, here, config):
    config(enabled=True, timeout_ms=500)
    here.answer = (404, {}, b"no such path\x1b[2J")
    done = cli("track", "build")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"trix_telemetry: error: http://.*: HTTP 404 after \d+ ms: no such path\?\[2J\n",
        done.stderr,
    )
    here.answer = (307, {"Location": "https://elsewhere.example/"}, b"")
    assert "redirect to https://elsewhere.example/" in cli("track", "build").stderr
    done = cli("track", "build", "--endpoint", "http://127.0.0.1:1")
    assert "connection refused, connecting to 127.0.0.1" in done.stderr
    server = hostile(silence)
    done = cli("track", "build", "--endpoint", f"http://{server.address}")
    assert re.search(r"timed out after \d+ ms, waiting for the answer", done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ["track", "../x"],
        ["track", "a", "--endpoint", "ftp://h"],
        ["track", "a", "--endpoint", ""],
        ["preview", "a b"],
    ],
)
def test_wrong_values_are_one_line(here, arguments):
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("trix_telemetry: error: .*\n", done.stderr)
    assert here.requests == []


@pytest.mark.parametrize("arguments", [["nonsense"], ["track"], ["status", "--yaml"], []])
def test_wrong_usage_is_one_line(arguments):
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("trix_telemetry: error: .*\n", done.stderr)


def test_reset_forgets_the_fingerprint(here, state, capsys):
    track()
    assert trix_telemetry.main(["reset"]) == 0
    assert not (state / "fingerprint").exists()
    track()
    first, second = (point.resource["user.fingerprint"] for point in here.points)
    assert first != second
    assert trix_telemetry.main(["reset"]) == 0


def test_version_and_help(capsys):
    assert trix_telemetry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trix_telemetry {trix_telemetry.__version__}\n"
    assert trix_telemetry.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: python -m trix_telemetry" in out
    assert max(map(len, out.splitlines())) <= 80


def test_debug_tells_what_is_sent_and_what_came_of_it(here, config, monkeypatch):
    config('[telemetry]\nenabled = true\n[telemetry.otlp_headers]\nX-Key = "secret"\n')
    done = tool(env={"TRIX_TELEMETRY_DEBUG": "1"})
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (0, "")
    assert all(line.startswith("trix_telemetry: ") for line in lines)
    assert lines[0] == "trix_telemetry: POST /v1/metrics HTTP/1.1"
    assert "trix_telemetry: X-Key: (hidden)" in lines
    assert f"trix_telemetry: {here.requests[0][2].decode()}" in lines
    assert re.fullmatch(r"trix_telemetry: sent: HTTP 200 after \d+ ms", lines[-1])
    assert "secret" not in done.stderr


@pytest.mark.parametrize("value", ["", "0", "no", "False", "off"])
def test_debug_that_is_not_asked_for(here, config, value):
    config(enabled=True)
    assert silent(tool(env={"TRIX_TELEMETRY_DEBUG": value}))


def test_debug_says_why_nothing_is_sent(here, config):
    config(enabled=False)
    debug = {"TRIX_TELEMETRY_DEBUG": "1"}
    assert "off: " in tool(env=debug).stderr
    assert "off: DO_NOT_TRACK is set to 1\n" in tool(env={**debug, "DO_NOT_TRACK": "1"}).stderr
    config("[telemetry]\ntimeout_ms = 0\n")
    assert "telemetry.timeout_ms is 0" in tool(env=debug).stderr


@pytest.mark.parametrize("arguments", [["status"], ["preview"], ["--help"], ["track", "build"]])
def test_a_closed_pipe_is_no_traceback(here, arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, MODULE, *arguments], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_closed_streams_of_the_command_line(here):
    for redirect in (">&-", "2>&-", ">&- 2>&- <&-"):
        for arguments in ("status", "disable", "--help", "track build", "nonsense"):
            done = subprocess.run(
                ["sh", "-c", f"exec {sys.executable} {MODULE} {arguments} {redirect}"],
                capture_output=True, text=True, timeout=FAR,
            )  # fmt: skip
            assert "Traceback" not in done.stderr
            assert done.returncode == (2 if arguments == "nonsense" else 0)


def test_the_name_of_a_copy_is_its_own(acme, here):
    env = {**os.environ, "PYTHONPATH": str(acme), "TRIX_TELEMETRY_ENDPOINT": ""}
    command = [sys.executable, "-m", "acme._vendor.usage"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, env=env)
    assert "usage: python -m acme._vendor.usage" in done.stdout
    done = subprocess.run([*command, "track", "/"], capture_output=True, text=True, env=env)
    assert done.stderr.startswith("acme._vendor.usage: error: ")


def test_the_command_line_hangs_under_a_tool_of_its_own(capsys):
    trix_telemetry.initialize_telemetry(prog="acme telemetry", service_name="acme")
    assert trix_telemetry.main(["--help"]) == 0
    assert trix_telemetry.main(["track", "/"], prog="acme usage") == 1
    out, err = capsys.readouterr()
    assert "usage: acme telemetry" in out
    assert err.startswith("acme usage: error: ")
    assert "trix" not in (out + err).lower()


@pytest.mark.parametrize("flags", [[], ["-I"], ["-OO"], ["-S"]])
def test_selftest_passes_where_everything_speaks_against_it(home, flags):
    home.chmod(0o555)
    env = {"DO_NOT_TRACK": "1", "http_proxy": "http://127.0.0.1:1", "TRIX_TELEMETRY": "0"}
    done = subprocess.run(
        [sys.executable, *flags, MODULE, "selftest"],
        capture_output=True, text=True, env={**os.environ, **env}, cwd=home, timeout=2 * FAR,
    )  # fmt: skip
    home.chmod(0o755)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "FAILED" not in done.stdout
    assert done.stdout.count("resourceMetrics") == 1
    assert list(home.iterdir()) == []


def test_selftest_fails_when_something_is_broken(home):
    broken = MODULE.read_text().replace('"asInt": "1"', '"asInt": 1 / 0')
    (home / "broken.py").write_text(broken)
    done = subprocess.run([sys.executable, home / "broken.py", "selftest"], capture_output=True)
    assert done.returncode == 1
    assert b"FAILED" in done.stdout


# What was once broken


def close_at_once(connection):
    pass


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_host_that_dies_of_sigpipe_does_not_die_of_ours(hostile, config, scheme):
    config(otlp_endpoint=f"{scheme}://{hostile(close_at_once).address}")
    code = "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
    code += "trix_telemetry.track_command_execution('build')"
    for _ in range(5):
        assert silent(tool(code))


def test_a_notice_to_a_reader_that_is_gone_does_not_kill(here, state):
    read, write = os.pipe()
    os.close(read)
    code = "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
    code += "trix_telemetry.track_command_execution('build')"
    done = tool(code, capture_output=False, stdout=subprocess.PIPE, stderr=write)
    os.close(write)
    assert (done.returncode, done.stdout) == (0, "")
    assert here.requests == []
    assert not (state / "config.toml").exists()


@pytest.mark.parametrize("before", [None, "a = 1\n"])
def test_what_could_not_be_told_is_undone(here, state, config, before):
    path = config(before) if before else state / "config.toml"
    with open("/dev/full", "w") as full:
        done = tool(capture_output=False, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, here.requests) == (0, [])
    assert (path.read_text() if path.exists() else None) == before
    assert "trix-cli" in tool().stderr
    assert here.commands == ["build"]


def test_a_thread_may_fork_when_the_process_is_at_its_end(here, config):
    config(enabled=True)
    done = tool(
        """
        import atexit, os, threading, time
        def fork():
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
        def late():
            try:
                thread = threading.Thread(target=fork, daemon=True)
                thread.start()
            except RuntimeError:  # Python 3.12 starts no threads here
                return
            thread.join()
        atexit.register(late)
        trix_telemetry.track_command_execution("build")
    """,
        "-W",
        "ignore",
    )
    assert silent(done), done.stderr


def test_a_child_forked_meanwhile_does_not_keep_the_lock(home):
    done = tool(f"""
        import os
        lock = trix_telemetry._Lock({str(home)!r})
        lock.__enter__()
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)  # until the parent has ended
            os._exit(0)
        lock.__exit__()
        with trix_telemetry._Lock({str(home)!r}):  # raises TimeoutError where it cannot be had
            pass
    """)
    assert silent(done), done.stderr


def test_a_lock_that_is_never_let_go_is_not_waited_for_for_ever(home):
    with trix_telemetry._Lock(str(home)), pytest.raises(TimeoutError, match="locked"):
        trix_telemetry._Lock(str(home)).__enter__()


def test_what_the_host_debugs_of_http_does_not_show_ours(here, config):
    config(enabled=True)
    code = "import http.client; http.client.HTTPConnection.debuglevel = 1\n"
    assert silent(tool(code + "trix_telemetry.track_command_execution('build')"))
    assert here.commands == ["build"]


@pytest.mark.parametrize(
    "proxy",
    [
        "https://me:secret@{}",
        "socks5://{}",
        "http://127.0.0.1:1/nothing",
        "http:/me:secret@{}",
        "http://me:secret@h:x",
    ],
)
def test_odd_proxies_get_nothing_and_show_nothing(here, collector, config, proxy):
    config(enabled=True)
    env = {"http_proxy": proxy.format(collector.url.removeprefix("http://"))}
    endpoint = {"TRIX_TELEMETRY_ENDPOINT": "http://127.0.0.2:1"}
    assert silent(tool(env=env | endpoint))
    done = tool(env=env | endpoint | {"TRIX_TELEMETRY_DEBUG": "1"})
    assert "failed: " in done.stderr
    assert "secret" not in done.stderr
    assert collector.requests == []


def tunnel(requests):
    """A proxy that knows CONNECT and no more."""

    def speak(connection):
        head = connection.recv(65536).decode()
        requests.append(head.splitlines()[0])
        host, port = head.split()[1].split(":")
        with socket.create_connection((host, int(port))) as server:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            copy = threading.Thread(target=pump, args=(server, connection), daemon=True)
            copy.start()
            pump(connection, server)
            copy.join(FAR)

    return speak


def pump(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("hashed", [True, False])
def test_tls_through_a_proxy(secure, hostile, home, config, hashed):
    requests = []
    proxy = hostile(tunnel(requests))
    config(enabled=True)
    authority = str(home / "authority.pem")
    if hashed:
        (home / "empty" / "01234567.0").write_text(AUTHORITY)
    code = f"""
        import ssl
        original = ssl.create_default_context
        def create(**options):
            return original(**options) if options else original(cafile={authority!r})
        ssl.create_default_context = create
        trix_telemetry.track_command_execution("build")
    """
    done = tool(code, env={"https_proxy": f"http://{proxy.address}"})
    assert silent(done), done.stderr
    assert [line for line, _, _ in secure.requests] == ["POST /v1/metrics HTTP/1.1"]
    assert len(requests) == (2 if hashed else 1)


def test_near_the_recursion_limit_nothing_is_raised(config):
    config(otlp_endpoint="http://127.0.0.1:1", timeout_ms=50)
    done = tool("""
        raised = []
        def sink(depth):
            if depth:
                return sink(depth - 1)
            try:
                trix_telemetry.track_command_execution("build")
            except RecursionError as error:
                return error.__traceback__.tb_next is not None
        sys.setrecursionlimit(200)
        for depth in range(100, 190):
            try:
                if sink(depth):
                    raised.append(depth)
            except RecursionError:
                break
        print(raised)
    """)
    assert len(json.loads(done.stdout)) <= 2  # with no room for any call of ours


@pytest.mark.parametrize("descriptor", ["None", "3.5", "'x'", "unittest.mock.MagicMock()"])
def test_a_stderr_with_an_odd_descriptor(here, config, descriptor):
    config(enabled=True)
    done = tool(
        f"""
        import unittest.mock
        class Odd:
            closed = False
            fileno = lambda self: {descriptor}
            write = flush = lambda self, *a: None
        sys.stderr = Odd()
        trix_telemetry.track_command_execution("build").join()
    """,
        env={"TRIX_TELEMETRY_DEBUG": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert here.commands == ["build"]


@pytest.mark.parametrize(
    "text", ["telemetry = {enabled = false}\n", "garbage", "[telemetry]\ntimeout_ms = 0\n"]
)
def test_no_fingerprint_is_stored_where_the_config_is_off(state, config, text):
    config(text)
    assert re.fullmatch("[0-9a-f]{64}", trix_telemetry.get_user_fingerprint())
    assert [path.name for path in state.iterdir()] == ["config.toml"]


def test_without_a_home_no_file_of_the_working_directory_counts(here, home, monkeypatch, capsys):
    (home / "fingerprint").write_text("deadbeef")
    (home / "cooldown").write_text("junk")
    monkeypatch.chdir(home)
    monkeypatch.delenv("HOME")
    assert trix_telemetry.get_user_fingerprint() != "deadbeef"
    assert trix_telemetry.main(["status"]) == 0
    assert "deadbeef" not in capsys.readouterr().out


@pytest.mark.skipif(sys.version_info < (3, 12), reason="earlier Pythons do not warn")
def test_a_forkpty_says_nothing_either(hostile, config):
    config(otlp_endpoint=f"http://{hostile(silence).address}", timeout_ms=300)
    done = tool(
        """
        import os, time
        trix_telemetry.track_command_execution("build")
        time.sleep(0.15)
        pid, fd = os.forkpty()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    """,
        "-W",
        "default",
    )
    assert silent(done), done.stderr


SECRETS = [
    'otlp_endpoint = "https://h/?token=SECRET"',
    'otlp_endpoint = "https://h/#SECRET"',
    'otlp_endpoint = "https://u:SE?CRET@h"',
    'otlp_endpoint = "https://u:SE#CRET@h"',
    'otlp_endpoint = "https://u:SECRET//x@h"',
    'otlp_endpoint = "http://h/?x=SE@CRET"',
    'otlp_headers = "Authorization=Bearer SECRET"',
    'otlp_headers = { Authorization = "SECRET\\r\\nX: CRET" }',
    "otlp_headers = { Authorization = ['SECRET'] }",
]


@pytest.mark.parametrize("line", SECRETS)
def test_no_message_shows_a_secret(here, config, caplog, capsys, monkeypatch, line):
    config(f"[telemetry]\n{line}\n")
    monkeypatch.setenv("TRIX_TELEMETRY_DEBUG", "1")
    track()
    for command in (["status"], ["status", "--json"], ["preview"], ["track", "build"], ["enable"]):
        trix_telemetry.main(command)
    out, err = capsys.readouterr()
    assert "telemetry.otlp_" in caplog.text
    assert "CRET" not in out + err + caplog.text


def test_do_not_track_that_is_a_blank(here, monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", " ")
    assert track() is None


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({"rejectedDataPoints": "1", "errorMessage": "x" * 5000}, 1),
        ({"rejectedDataPoints": float("inf")}, 0),
        ({"rejectedDataPoints": "-1"}, 0),
        ({"rejectedDataPoints": 10**300}, 1),
    ],
)
def test_odd_partial_successes(here, config, answer, code):
    config(enabled=True)
    here.answer = (200, {}, json.dumps({"partialSuccess": answer}).encode())
    done = cli("track", "build")
    assert done.returncode == code
    assert len(done.stderr + done.stdout) < 500


@pytest.mark.parametrize(
    "text",
    [
        '[telemetry]\nenabled = true\n[env]\ncmd = "enabled = \\"yes\\""\n',
        '[telemetry]\nenabled = true\n[x]\ncmd = \'set enabled = "\' # say "hi"\n',
        "[x]\nenabled = 1979-05-27 07:32:00\n[telemetry]\nenabled = true\n",
    ],
)
def test_strange_neighbours_of_the_value_do_not_matter(config, text):
    path = config(text)
    assert trix_telemetry.main(["disable"]) == 0
    assert tomllib.loads(path.read_text())["telemetry"]["enabled"] is False
    assert trix_telemetry.main(["enable"]) == 0
    assert path.read_text() == text


def test_thousands_of_look_alikes_of_a_table_take_no_minutes(config):
    text = "[telemetry.otlp_headers]\na = 'b'\n[other]\n" + "telemetry.x1 = 1\n".join(
        f"y{n} = 1\n" for n in range(4000)
    ).replace("telemetry.x1", "#telemetry.x1")
    path = config(text)
    assert trix_telemetry.main(["disable"]) == 0
    assert path.read_text().startswith(text)


def test_every_byte_of_a_config_is_kept_when_a_table_is_added(config):
    text = '[telemetry.otlp_headers]\na = "b"\n\n\n# end \u00a0\n\n'
    path = config(text)
    assert trix_telemetry.main(["disable"]) == 0
    assert path.read_bytes().decode().startswith(text)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437"])
def test_a_terminal_without_all_characters(config, encoding):
    config('[telemetry]\notlp_endpoint = "http://\u0416"\n')
    done = cli("status", env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "telemetry.otlp_endpoint" in done.stdout


def test_errors_stay_on_one_line(home):
    done = cli("status", "a\nb\x1b[31m")
    assert (done.returncode, done.stderr.count("\n"), "\x1b" in done.stderr) == (2, 1, False)
    odd = home / "a\nb\x1b[31m"
    odd.mkdir()
    (odd / ".tx3").write_text("")
    for command in ("status", "disable", "reset"):
        done = cli(command, env={"HOME": str(odd)})
        assert "\x1b" not in done.stdout + done.stderr
        assert done.stderr.count("\n") <= 1


def test_status_where_no_choice_could_be_kept(here, locked):
    locked()
    status = "trix_telemetry.main(['status'])\n"
    done = tool(f"{status}{NOBODY}\nprint()\n{status}")  # the first imports what it needs
    assert "Telemetry: ON\n" in done.stdout or os.geteuid() != 0
    done.stdout = done.stdout.partition("\n\n")[2]
    assert done.stdout.startswith("Telemetry: OFF\n")
    assert "cannot be written to" in done.stdout


def test_preview_of_a_closed_set(here, capsys):
    trix_telemetry.initialize_telemetry(commands={"run", "test"})
    assert trix_telemetry.main(["preview"]) == 0
    assert '"stringValue":"run"' in capsys.readouterr().out
    assert trix_telemetry.main(["preview", "build"]) == 1
    assert "not among" in capsys.readouterr().err


def test_status_and_preview_name_the_proxy(here, monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy.example:3128")
    assert status(capsys)["proxy"] == "proxy.example:3128"
    trix_telemetry.main(["preview"])
    err = capsys.readouterr().err
    assert "proxy.example:3128" in err
    assert "secret" not in err


def test_a_disk_that_takes_no_output():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, MODULE, "status"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert "Traceback" not in done.stderr
    assert "None" not in done.stderr


def test_reset_makes_nothing(home, capsys):
    assert trix_telemetry.main(["reset"]) == 0
    assert list(home.iterdir()) == []


def test_a_selftest_that_cannot_import_says_so(home):
    (home / "my.tool.py").write_text(MODULE.read_text())
    done = subprocess.run(
        [sys.executable, home / "my.tool.py", "selftest"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No module named" in done.stdout


# README.md

README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def readme_block(home, block):
    for library in ("click", "typer"):
        if f"import {library}" in block:
            pytest.importorskip(library)
    (home / "tool.py").write_text(block)
    (home / "trix_telemetry.py").write_text(MODULE.read_text())
    return [sys.executable, home / "tool.py"]


@pytest.mark.parametrize("block", BLOCKS)
def test_each_program_of_the_readme_delivers_one_point(collector, home, block):
    command = readme_block(home, block)
    prefix = "ACME_TELEMETRY" if "ACME_TELEMETRY" in block else "TRIX_TELEMETRY"
    env = {**os.environ, f"{prefix}_ENDPOINT": collector.url}
    done = subprocess.run([*command, "build"], capture_output=True, text=True, env=env, timeout=FAR)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("acme counts which of its commands are run")
    assert len(done.stderr.splitlines()) == 6
    (point,) = collector.points
    assert (point.command, point.resource["service.name"]) == ("build", "acme")


@pytest.mark.parametrize("block", [block for block in BLOCKS if "main(" in block])
def test_each_tool_of_the_readme_has_the_command_line(home, block):
    command = readme_block(home, block)
    for arguments in (["status", "--json"], ["--help"], ["disable"], ["status"]):
        done = subprocess.run(
            [*command, "telemetry", *arguments], capture_output=True, text=True, timeout=FAR
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Telemetry: OFF\n")
    assert "acme telemetry enable" in done.stdout


def test_the_readme_shows_what_is_sent(here):
    shown = re.search(r"```http\n(.*?)\n\n(.*?)```", README, re.S)
    track()
    line, headers, sent = here.requests[0]
    names = [row.partition(":")[0] for row in shown[1].splitlines()]
    assert names == [line, *headers]
    body = re.sub(r"\s", "", shown[2])
    assert json.loads(body).keys() == {"resourceMetrics"}
    assert re.sub(r'Value":"[^"]*|Nano":"\d+|"name":"[^"]*', "", body) == re.sub(
        r'Value":"[^"]*|Nano":"\d+|"name":"[^"]*', "", sent.decode()
    )


def test_the_readme_names_each_command_and_option_that_there_is(capsys):
    for name in ("status", "enable", "disable", "preview", "track", "reset", "selftest"):
        assert f"`{name}" in README or f" {name}" in README
        assert trix_telemetry.main([name, "--help"]) == 0


# The benchmark: python -m pytest -m bench -s

BENCH_PAIRS = int(os.environ.get("BENCH_PAIRS", "21"))
BENCH_ON = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import trix_telemetry
trix_telemetry.track_command_execution("build")
"""
BENCH_FLOOR = """
import atexit, json, os, threading, urllib.request
def send():
    value = {"stringValue": "x" * 64}
    body = json.dumps({"resourceMetrics": [{"a": {"key": "k", "value": value}} for _ in range(4)]})
    opener = urllib.request.OpenerDirector()
    opener.add_handler(getattr(urllib.request, os.environ["BENCH_HANDLER"])())
    url = os.environ["TRIX_TELEMETRY_ENDPOINT"] + "/v1/metrics"
    headers = {"Content-Type": "application/json"}
    opener.open(urllib.request.Request(url, body.encode(), headers), timeout=2).close()
thread = threading.Thread(target=send, daemon=True)
thread.start()
atexit.register(thread.join, 2)
"""
BENCH_SDK = """
import os
from opentelemetry.exporter.otlp.json.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
endpoint = os.environ["TRIX_TELEMETRY_ENDPOINT"] + "/v1/metrics"
provider = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=endpoint))])
provider.get_meter("trix").create_counter("trix_command_invocation").add(1)
"""
BENCH_CALLER = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import threading, time, trix_telemetry
def timed(function, *args):
    began = time.perf_counter()
    thread = function(*args)
    took = time.perf_counter() - began
    thread.join()
    return took * 1000
def bare():
    thread = threading.Thread(target=int, daemon=True)
    thread.start()
    return thread
timed(bare)
first = timed(trix_telemetry.track_command_execution, "build")
later = [timed(trix_telemetry.track_command_execution, "build") for _ in range(31)]
starts = [timed(bare) for _ in range(31)]
print(first, sorted(later)[15], sorted(starts)[15])
"""
BENCH_OFF = f"""
import sys, time; sys.path.insert(0, {str(HERE)!r})
began = time.perf_counter()
import trix_telemetry
trix_telemetry.track_command_execution("build")
middle = time.perf_counter()
import json
print((middle - began) * 1000, (time.perf_counter() - middle) * 1000)
"""


# The last thing that a process does is to tell its peak: this handler was the first registered.
BENCH_PEAK = """
import atexit, os
def tell():
    with open("/proc/self/status") as file:
        os.write(3, file.read().partition("VmHWM:")[2].split()[0].encode())
if os.path.exists("/proc/self/status"):
    atexit.register(tell)
"""


def measured(code, env):
    """CPU and wall milliseconds of a whole process, and its peak memory in KiB or None."""
    read, write = os.pipe()
    began = time.perf_counter()
    process = subprocess.Popen(
        ["sh", "-c", f'exec {sys.executable} -c "$0" 3>&{write}', BENCH_PEAK + code],
        env=env,
        pass_fds=[write],
    )
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    os.close(write)
    with open(read) as file:
        peak = file.read()
    assert process.returncode == 0
    return (usage.ru_utime + usage.ru_stime) * 1000, took * 1000, int(peak) if peak else None


def median(values):
    return sorted(values)[len(values) // 2]


@pytest.mark.bench
def test_bench(collector, secure, home, config, capsys, tmp_path_factory):
    """One table; each row's ratio is the median of pairs, measured in turn in this run."""
    on = config(enabled=True, timeout_ms=30_000).parent.parent.parent
    trix_telemetry.get_user_fingerprint()
    off = tmp_path_factory.mktemp("off")
    (off / ".tx3" / "trix").mkdir(parents=True)
    (off / ".tx3" / "trix" / "config.toml").write_text("[telemetry]\nenabled = false\n")
    (home / "empty" / AUTHORITY_HASH).write_text(AUTHORITY)
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SSL_", "PYTHONDONT"))}
    http = {**base, "TRIX_TELEMETRY_ENDPOINT": collector.url, "BENCH_HANDLER": "HTTPHandler"}
    tls = {**base, "TRIX_TELEMETRY_ENDPOINT": secure.url, "BENCH_HANDLER": "HTTPSHandler"}
    tls |= {"SSL_CERT_DIR": str(home / "empty")}
    rows = {
        "bare interpreter": ("", {**http, "HOME": str(on)}),
        "off": (BENCH_ON, {**http, "HOME": str(off)}),
        "on": (BENCH_ON, {**http, "HOME": str(on)}),
        "floor": (BENCH_FLOOR, http),
        "on, TLS": (BENCH_ON, {**tls, "HOME": str(on)}),
        "floor, TLS": (BENCH_FLOOR, tls),
    }
    with contextlib.suppress(ImportError):
        import opentelemetry.exporter.otlp.json.http.metric_exporter  # noqa: F401

        rows["official SDK"] = (BENCH_SDK, http)
    for code, env in rows.values():
        measured(code, env)
    results = {name: [] for name in rows}
    for _ in range(BENCH_PAIRS):
        for name, (code, env) in rows.items():
            results[name].append(measured(code, env))
    caller = subprocess.run(
        [sys.executable, "-c", BENCH_CALLER], env={**http, "HOME": str(on)}, capture_output=True
    ).stdout.split()
    imports = [
        subprocess.run(
            [sys.executable, "-c", BENCH_OFF], env={**http, "HOME": str(off)}, capture_output=True
        ).stdout.split()
        for _ in range(BENCH_PAIRS)
    ]
    table = bench_table(results, [float(x) for x in caller], [list(map(float, x)) for x in imports])
    with capsys.disabled():
        print(f"\n{table}")
    assert len(collector.requests) >= 2 * BENCH_PAIRS
    assert len(secure.requests) >= 2 * BENCH_PAIRS


def bench_table(results, caller, imports):
    bare = results["bare interpreter"]
    floors = {"on": "floor", "on, TLS": "floor, TLS", "official SDK": "floor"}
    lines = [f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {BENCH_PAIRS} runs each"]
    lines.append(f"{'median of whole processes':<26}{'CPU':>9}{'wall':>12}{'':>20}{'peak':>12}")
    for name, runs in results.items():
        is_bare = name == "bare interpreter"
        cpu, wall = (
            median([run[i] - (0 if is_bare else b[i]) for run, b in zip(runs, bare, strict=True)])
            for i in (0, 1)
        )
        ratio = peak = ""
        if name in floors:
            floor = results[floors[name]]
            value = median([run[0] / f[0] for run, f in zip(runs, floor, strict=True)])
            ratio = f"{value:.2f} of {floors[name]}"
        if runs[0][2]:
            peak = f"{median([run[2] for run in runs]) / 1024:.1f} MiB"
        sign = "" if is_bare else "+"
        figures = f"{f'{sign}{cpu:.1f} ms':>9}{f'{sign}{wall:.1f} ms':>12}"
        lines.append(f"{name:<26}{figures}{ratio:>20}{peak:>12}")
    first, later, start = caller
    lines.append(f"{'first call':<26}{first:.3f} ms, a bare Thread.start() {start:.3f} ms")
    lines.append(f"{'later calls':<26}{later:.3f} ms")
    ratio = median([ours / theirs for ours, theirs in imports])
    ours = median([ours for ours, _ in imports])
    lines.append(f"{'off: import and call':<26}{ours:.3f} ms, {ratio:.2f} of import json")
    return "\n".join(lines)
