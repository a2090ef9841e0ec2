"""Every promise of trix_telemetry, met by real files, real processes and real sockets.

Nothing here touches the real home or leaves the loopback. `python -m pytest -m bench -s` measures.
"""

import ast
import contextlib
import email.utils
import fcntl
import http.server
import io
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

    def __init__(self):
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

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
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
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
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
        "--force", "a.b", "a=b", "me@example.com", "https://example.com", "b\u0443ild", "ｂuild",
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
        "# [telemetry]\n[telemetry]\ntimeout_ms = 5\n\nenabled   =   false\n[after]\nenabled = true\n",
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
            '"http://\u00fcber.example.com"', '"//example.com"', '" http://example.com"',
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
        ("HTTP://H", "HTTP://H/v1/metrics"),
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
    assert all(one[1] <= two[0] for one, two in zip(windows, windows[1:], strict=False))


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
