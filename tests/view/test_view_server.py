"""The viewer answers its own user alone, and shows what others wrote as text."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser

import pytest
from viewed_runs import OBEYED, served, write_run

from gymexp.rollout.outcome import outcome_from_json
from gymexp.rollout.rollout_files import RolloutWriter, read_outcomes
from gymexp.view.access import Access, tunnel


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("hostile") / "run")
    with served(path) as one:
        yield one


TABS = ("", "/tokens", "/task", "/verdict", "/raw")
PAGES = [
    "", "steps", "steps?split=train", "step/step-000002", "step/eval-000000?sort=mean&order=down",
    "group/step-000002/0", "group/step-000002/0?a=1&b=2", "tasks", "tasks?split=train&kind=sometimes",
    "tasks?split=train&sort=best", "step/step-000002?text=alert", "rollouts?text=ALERT&split=train",
    "rollouts", "rollouts?env=office&outcome=failed", "rollouts?text=script&sort=reward&order=down",
    *[f"rollout/step-000002/{n}{tab}" for n in range(4) for tab in TABS],
    "rollout/step-000002/0/tokens?heat=ratio", "text/step-000002/2/2", "text/step-000002/0/verdict?page=2",
    "config", "logs", "log/office.log", "compare", "side/step-000002/0?of=step-000001&other=0",
]  # fmt: skip


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        (self.data if self._in_script else self.text).append(data)


@pytest.mark.parametrize("page", PAGES)
def test_what_others_wrote_is_text_on_every_page(viewer, page):
    answer = viewer.get(viewer.root + page)
    assert answer.status == 200, answer.text[-2000:]
    assert not OBEYED & set(answer.text)
    shown = Page(answer.text)
    for tag, attributes in shown.tags:
        assert tag not in ("iframe", "object", "embed", "base", "style"), tag
        assert not [name for name in attributes if name.startswith("on") or name == "style"], attributes
        for name in ("href", "src", "action"):
            address = attributes.get(name)
            assert address is None or re.match(r"/(?!/)|#|data:,$", address), address
        if tag == "script":
            assert attributes.get("src") or attributes.get("type") == "application/json"
    assert not [tag for tag, _ in shown.tags if tag == "img"]
    for data in filter(str.strip, shown.data):
        json.loads(data)
    assert len(answer.text) < 1_000_000


def test_groups_that_were_left_out_of_training_are_shown_as_such(tmp_path):
    path = write_run(tmp_path / "run")
    outcomes = [outcome_from_json(one) for one in read_outcomes(path / "rollouts" / "step-000002.jsonl.zst")]
    RolloutWriter(path / "rollouts", {}, last_step=99).write("filtered-000002", outcomes, len(outcomes))
    with served(path) as viewer:

        def text(page: str) -> str:
            return " ".join("".join(Page(viewer.get(viewer.root + page).text).text).split())

        assert "left out of step 2" in text("steps") and "left out of step 2" not in text("steps?split=train")
        assert "left out of step 2" in text("steps?split=left%20out")
        assert "left out 2" in text("rollouts?split=left%20out")
        assert "--filtered 2 --number 0" in text("rollout/filtered-000002/0")
        assert "not trained on, as left out" in text("rollout/filtered-000002/0/tokens")
        assert viewer.get(f"{viewer.root}tasks?split=left%20out").status == 200


def test_a_hostile_text_is_seen_whole_with_its_controls_named(viewer):
    page = Page(viewer.get(f"{viewer.root}rollout/step-000002/0").text)
    text = "".join(page.text)
    assert (
        "<script>alert(1)</script><img src=x onerror=alert(2)>␛]52;c;ZXZpbA==␇␛[2J‹U+009B›31m‹U+202E›gnp.exe"
        in text
    )
    assert "␀" in text and "‹U+E0041›" in text and "{{ 7*7 }}" in text
    names = [attributes["title"] for tag, attributes in page.tags if attributes.get("class") == "ctl"]
    assert "RIGHT-TO-LEFT OVERRIDE" in names


def test_a_long_text_is_folded_with_its_size_and_can_be_read_in_parts(viewer):
    began = time.monotonic()
    text = viewer.get(f"{viewer.root}rollout/step-000002/2").text
    assert "5.0 MB" in text and len(text) < 100_000
    part = viewer.get(f"{viewer.root}text/step-000002/2/2?page=50").text
    assert "page 50 of 50" in part and "x" * 100_000 in part and "x" * 100_001 not in part
    assert time.monotonic() - began < 5
    assert viewer.get(f"{viewer.root}text/step-000002/2/99").status == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "127.0.0.1"}, 400),
        ({"Host": "127.0.0.1:1"}, 400),
        ({"Host": "127.0.0.1.evil.example"}, 400),
        ({"Cookie": ""}, 403),
        ({"Cookie": "gymexp_1=x"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
    ],
)
def test_a_request_of_another_site_or_user_is_refused(viewer, headers, status):
    for path in (f"{viewer.root}steps", "/static/view.js", f"{viewer.root}rollouts.csv"):
        assert viewer.get(path, **headers).status == status
    for name, value in (("Host", "evil.example"), ("Cookie", "")):
        assert viewer.get("/nothing/here", **{name: value}).status in (400, 403), (
            "before any route is looked up"
        )


def test_localhost_with_the_port_is_this_machine_too(viewer):
    assert viewer.get(f"{viewer.root}steps", Host=f"localhost:{viewer.access.port}").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "X"])
def test_nothing_but_reading_is_answered(viewer, method):
    assert viewer.get(f"{viewer.root}steps", method).status in (400, 405)
    assert viewer.get(f"{viewer.root}steps", "HEAD").status == 200


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(viewer):
    answer = viewer.get(f"{viewer.root}steps?split=train&token={viewer.access.token}", Cookie="")
    assert answer.status == 303 and answer.headers["Location"] == f"{viewer.root}steps?split=train"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Path=/" in cookie
    assert len(viewer.access.token) >= 43, "256 bits in base64"
    wrong = viewer.get(f"/?token={'x' * 43}")
    assert wrong.status == 403 and "Set-Cookie" not in wrong.headers
    off = viewer.get(f"//evil.example/?token={viewer.access.token}", Cookie="")
    assert not off.headers.get("Location", "/").startswith("//")


def test_every_answer_has_the_policy(viewer):
    for path in ("/", f"{viewer.root}steps", "/static/plotly.js", "/nothing", f"{viewer.root}rollouts.csv"):
        headers = viewer.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    [
        "static/../../../../etc/passwd", "static/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "static/..%2fview.py",
        "r/x/steps", "log/..%2fconfig.yaml", "log/%2fetc%2fpasswd", "log/office.log%00",
        "step/..%2f..%2fx", "step/step-999999", "rollout/step-000002/99", "rollout/step-000002/-1",
        "rollout/step-000002/0%27", "rollout/step-000002/%D9%A3", "group/step-000002/9",
        "rollouts?sort=key;drop", "rollouts?min=x", "rollouts?order=x", "rollouts?page=-1",
        "rollout/step-000002/0/tokens?heat=x", "compare?with=none", "compare?a=x", "tasks?sort=1",
    ],
)  # fmt: skip
def test_a_path_that_is_none_of_the_viewers_is_not_found(viewer, path):
    address = f"/{path}" if path.startswith(("static", "r/")) else viewer.root + path
    answer = viewer.get(address)
    assert answer.status == 404 and "root:" not in answer.text


def test_the_csv_has_every_rollout(viewer):
    lines = viewer.get(f"{viewer.root}rollouts.csv?split=train").text.split("\r\n")
    assert lines[0].startswith("file,number") and len([line for line in lines if line]) == 1 + 12


def test_secrets_are_masked(viewer, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "actually-quite-secret")
    (viewer.run.path / "versions.txt").write_text("pip actually-quite-secret\n")
    text = viewer.get(f"{viewer.root}config").text
    assert "actually-quite-secret" not in text and "sk-0123456789" not in text and "***" in text


def test_filters_sorting_and_pages_select_what_they_say(viewer):
    def numbers(query: str) -> list[str]:
        found = re.findall(
            r'href="/r/[^"]+/rollout/(\w+-\d+)/(\d+)[^"]*" class="go"',
            viewer.get(f"{viewer.root}rollouts?{query}").text,
        )
        return [f"{file}:{number}" for file, number in found]

    assert numbers("env=office&sort=reward") == [f"step-000002:{n}" for n in (2, 3, 0, 1)]
    assert numbers("env=office&sort=reward&order=down") == [f"step-000002:{n}" for n in (0, 3, 2, 1)]
    assert numbers("why=timeout") == ["step-000002:1"] and numbers("outcome=truncated") == ["step-000002:2"]
    assert numbers("split=train&from=1&to=1&min=0.5&max=0.5") == ["step-000001:2"]
    assert numbers("text=SLOW") == ["step-000002:1"] and numbers("text=%25") == []
    assert len(numbers("task=sudoku/train/1")) == 8


def test_next_and_previous_stay_in_the_list(viewer):
    text = viewer.get(f"{viewer.root}rollout/step-000002/3?env=office&sort=reward").text
    before, after = (re.search(rf'data-key="{key}" href="([^"]+)"', text) for key in "kj")
    assert (
        "/rollout/step-000002/2?env=office" in before[1] and "/rollout/step-000002/0?env=office" in after[1]
    )


def test_a_comparison_has_the_paired_interval(viewer):
    text = "".join(Page(viewer.get(f"{viewer.root}compare").text).text)
    # Eight tasks: four by 1 better. Student t, 7 degrees: 0.5 ± 2.3646 · 0.5345 / √8.
    assert "+0.500" in text and "[+0.053, +0.947]" in text and "0.125" in text


def test_the_tunnel_is_named_where_the_reader_came_by_ssh():
    assert tunnel(81, {}) == ""
    assert tunnel(81, {"SSH_CONNECTION": "x"}).startswith("ssh -N -L 81:127.0.0.1:81 ")
    assert " -J " in tunnel(81, {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_HOST": "login1"})
    assert Access(81).token != Access(81).token
