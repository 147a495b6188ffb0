"""The report as a file: well-formed, self-contained, escaped, honest about what it leaves out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from composer_plugins.errors import ConfigError, TraceError
from composer_plugins.report.html import write_report
from composer_plugins.report.run_folder import Check, ModelInfo, RunSummary, RunWriter, TokenView, ViewMessage

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"


class Page(HTMLParser):
    """Parses a page, checks that tags are balanced, and keeps elements and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.blocks: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)
        self.close()
        assert self.stack == [], f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-1:]} at {self.getpos()}"
        self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] in self.blocks:
            self.blocks[self.stack[-1]].append(data)
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def all(self, tag: str, **attributes: str) -> list[dict]:
        wanted = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
        return [
            a for t, a in self.elements if t == tag and all(v in (a.get(k) or "").split() for k, v in wanted.items())
        ]


def render(folder) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def chart_data(page: Page) -> dict:
    return json.loads(page.blocks["script"][0])


def test_the_demo_run_is_well_formed_and_small(demo):
    html, page = render(demo())
    assert html.startswith("<!doctype html>") and len(html.encode()) < 1_000_000
    assert "All 4 self-checks passed" in page.text and not page.all("div", class_="alert")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert targets and targets <= set(ids)


def test_nothing_is_loaded_from_outside(demo):
    html, page = render(demo())
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,"), (tag, name, value)
        assert tag not in {"iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") for name in attributes), attributes
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", html)
    assert "url(" not in html and "@import" not in html


def test_only_our_own_script_may_run(demo):
    _, page = render(demo())
    policy = page.all("meta", http_equiv="Content-Security-Policy")[0]["content"]
    scripts = page.blocks["script"]
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    assert len(scripts) == 2 and f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")


def planted(folder):
    with RunWriter(folder) as writer:
        writer.metrics(1, {"loss": 1.0, EVIL: 2.0, f"sdpo/{EVIL}": 3.0, f"{EVIL}/x": 4.0})
        writer.recipe({"composer": {"policy": {"weight": 1.0}}, EVIL: EVIL})
        writer.token_view(
            TokenView(
                step=1,
                kind="rollout",
                state_id=EVIL,
                messages=[ViewMessage(role=EVIL, content=EVIL)],
                action_turn=EVIL,
                hint=EVIL,
                error=EVIL,
                error_class=EVIL,
                tokens=[EVIL, "</span>", "</details>"],
                divergence=[1.0, 0.1, 0.2],
                mask=[True] * 3,
                teacher=EVIL,
                level=EVIL,
                source_ref=EVIL,
            )
        )
        writer.summary(
            RunSummary(
                name=EVIL,
                started=EVIL,
                host=EVIL,
                machine=EVIL,
                versions={EVIL: EVIL},
                command=EVIL,
                warnings=[EVIL],
                model=ModelInfo(reference=EVIL, source=EVIL, sha256=EVIL, note=EVIL),
                sized_down=[EVIL],
                counts={EVIL: 1},
                pairs_by_rule={EVIL: 1},
                provenance={"policy": EVIL},
                checks=[Check(name=EVIL, passed=False, found=EVIL)],
            )
        )
    return folder


def test_everything_from_logs_is_escaped(tmp_path):
    html, page = render(planted(tmp_path / "run"))
    assert [a for t, a in page.elements if t == "script"] == [{"type": "application/json", "id": "chart-data"}, {}]
    assert not page.all("img") and "<img" not in html and "<script>alert" not in html
    assert page.text.count("alert(1)") > 25  # it is shown, as text
    assert "{{7*7}}" in page.text and "{{49}}" not in page.text
    assert len(chart_data(page)) == 4


def test_the_same_folder_gives_the_same_bytes(demo, tmp_path):
    folder = demo()
    first = write_report(folder).read_bytes()
    assert write_report(folder, tmp_path / "elsewhere" / "again.html").read_bytes() == first
    assert write_report(demo("run2")).read_bytes() == first


def test_every_metric_is_drawn_with_unit_and_numbers(demo):
    _, page = render(demo())
    labels = " ".join(a["aria-label"] for a in page.all("svg"))
    for name in (
        "policy/loss",
        "sdpo/divergence",
        "replay_dpo/margin",
        "tools/failure_frequency",
        "my_plugin/queue_depth",
        "lr",
    ):
        assert name in labels
    assert "chosen: lowest" in labels and "rejected: lowest" in labels  # both on one chart
    assert "nats/token" in page.text and "optimizer step" in page.text
    for heading in (
        "Channel 1 · policy",
        "Channel 2 · sdpo",
        "Channel 3 · replay_dpo",
        "Rollouts",
        "my_plugin",
        "Whole step",
    ):
        assert heading in page.text


def test_the_table_holds_the_numbers_of_the_metrics_file(demo):
    folder = demo()
    _, page = render(folder)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        item = json.loads(line)
        assert f"{item['policy/active_tokens']}" in page.text
        assert f"{item['reward']:.4g}" in page.text


def test_token_cells_show_the_text_and_the_nats(demo):
    folder = demo(views=1)
    _, page = render(folder)
    view = json.loads((folder / "token_views.jsonl").read_text())
    titles = [a["title"] for a in page.all("span", class_="t")]
    assert len(titles) == len(view["tokens"])
    for i, (title, nats, inside) in enumerate(zip(titles, view["divergence"], view["mask"], strict=True)):
        assert title.startswith(f"token {i}: ")
        if inside:
            assert float(title.split()[2]) == pytest.approx(nats, rel=1e-3)
        else:
            assert title.endswith("no KL here")
    assert "↵" in page.text and "·" in page.text and view["hint"].split("\n")[0] in page.text


def test_recorded_and_rollout_errors_are_worded_differently(demo):
    _, page = render(demo(views=2))
    assert "In the recorded session, the action taken here ended in this error" in page.text
    assert "The action below ended in this error" in page.text


def test_at_most_forty_views_and_the_rest_counted(demo):
    _, page = render(demo(views=55))
    assert len(page.all("details", class_="turn")) == 40
    assert "the 40 largest of 55 recorded turns are shown, 15 are not" in page.text
    means = [float(x) for x in re.findall(r"([\d.]+) nats/token, max", page.text)]
    assert len(means) == 40 and means == sorted(means, reverse=True)


def test_without_token_views_it_says_so(demo):
    _, page = render(demo(views=0))
    assert "No token views were recorded" in page.text and not page.all("span", class_="t")


def test_signed_divergence_gets_the_diverging_ramp(demo):
    _, page = render(demo(signed=True))
    assert page.all("span", class_="n4") and "less probability than the teacher" in page.text
    _, page = render(demo("unsigned"))
    assert not page.all("span", class_="n4")


def test_one_step(demo):
    _, page = render(demo(steps=1))
    assert "one step, so each curve is one point" in page.text
    assert all(len(line["points"]) == 1 for c in chart_data(page).values() for line in c["lines"])


def test_two_thousand_steps_are_thinned_and_it_says_so(demo):
    html, page = render(demo(steps=2000, views=60))
    assert len(html.encode()) < 2_000_000
    assert "2,000 steps: each curve is drawn through the lowest and highest value of every 14 steps" in page.text
    assert "200 evenly spaced steps; 1800 more are in metrics.jsonl" in page.text
    assert all(len(line["points"]) <= 300 for c in chart_data(page).values() for line in c["lines"])


def test_nan_and_null_are_told_apart(tmp_path):
    with RunWriter(tmp_path) as writer:
        for step, loss in enumerate([1.0, float("nan"), 0.5], 1):
            writer.metrics(step, {"loss": loss, "sdpo/grad_norm": None if step == 2 else 0.1, "policy/grad_norm": None})
    html, page = render(tmp_path)
    assert "loss was not a finite number in 1 steps (first: step 2)" in page.text
    assert "not finite in 1 step" in page.text and "measured in 2 of 3 steps" in page.text
    assert "policy/grad_norm: Not measured in any step" in page.text
    assert not re.search(r'd="[^"]*(nan|inf)', html) and not re.search(r"\b(NaN|Infinity)\b", page.blocks["script"][0])


def test_runs_that_log_every_tenth_step_do_not_claim_totals(tmp_path):
    with RunWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.metrics(step, {"loss": 1.0, "replay_dpo/pairs": 4}, seconds=step * 2.0)
    page = render(tmp_path)[1]
    assert "optimizer steps30" in page.text and "2 s per step on average, 3 logged" in page.text
    assert "in 3 of 3 steps, logged steps only" in page.text


def silent(folder, active, weight=0.5, norms=None, warnings=()):
    with RunWriter(folder) as writer:
        writer.recipe({"composer": {"policy": {"weight": 1.0}, "sdpo": {"weight": weight}}})
        for step, tokens in enumerate(active, 1):
            metrics = {"loss": 1.0, "policy/active_tokens": 5}
            metrics |= {} if tokens is None else {"sdpo/active_tokens": tokens}
            writer.metrics(step, metrics | ({} if norms is None else {"sdpo/grad_norm": norms}))
        writer.summary(RunSummary(name="r", warnings=list(warnings)))
    return render(folder)[1]


def test_a_silent_channel_is_loud(tmp_path):
    page = silent(tmp_path / "a", [0, 0])
    assert (
        page.all("div", class_="alert") and "Channel sdpo was silent" in page.text and page.all("div", class_="silent")
    )
    assert "gradient norm was 0" in silent(tmp_path / "b", [9, 9], norms=0.0).text
    assert "nothing shows that it ran" in silent(tmp_path / "c", [None, None]).text
    assert not silent(tmp_path / "d", [0, 3]).all("div", class_="alert")
    off = silent(tmp_path / "e", [None, None], weight=0.0)
    assert not off.all("div", class_="alert") and "Off in this run" in off.text


def test_the_runs_own_warning_is_shown_and_not_repeated(tmp_path):
    page = silent(tmp_path / "a", [0, 0], warnings=["sdpo: no hints in the data"])
    assert "sdpo: no hints in the data" in page.text and "Channel sdpo was silent" not in page.text


def test_failed_and_missing_checks(demo, tmp_path):
    summary = RunSummary(
        name="r", checks=[Check(name="a", passed=True), Check(name="b", passed=False, found="0", expected="≥ 5")]
    )
    _, page = render(demo(summary=summary))
    assert "1 of 2 self-checks failed" in page.text and page.all("span", class_="bad")
    assert page.text.index("✗ fail") < page.text.index("✓ pass")
    _, page = render(demo("unfinished", finish=False))
    assert "Unfinished: this run wrote no summary" in page.text
    _, page = render(demo("unchecked", summary=RunSummary(name="r")))
    assert "No self-checks were recorded" in page.text


def test_provenance_says_what_is_ours_and_what_the_teachers_are(demo):
    _, page = render(demo())
    assert (
        "Channels 1 (policy) and 2 (sdpo) replicate Cursor's published Composer 2.5 recipe as far as it is public"
        in page.text
    )
    assert "Channel 3 (replay_dpo) is our own addition" in page.text
    assert "3 teachers, but only 2 distinct sets of weights" in page.text and "not independent votes" in page.text
    assert "demonstration only" in page.text and "composer-rl train recipes/trl/quickstart.yaml" in page.text
    assert "61 all agree with the recording" in page.text


def test_secrets_in_the_recipe_stay_out(demo):
    html, page = render(demo())
    assert "hf_notForTheReport" not in html and "hub_token: (hidden)" in page.text


def test_problems_of_the_folder_are_shown(demo):
    folder = demo()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "lo')
    (folder / "recipe.yaml").unlink()
    _, page = render(folder)
    assert "metrics.jsonl, line 25 is cut off" in page.text and "recipe.yaml is missing" in page.text


def test_on_an_error_the_old_report_stays_and_nothing_else(demo, tmp_path):
    folder = demo()
    old = write_report(folder).read_bytes()
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(TraceError):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == old
    assert sorted(p.name for p in folder.iterdir()) == [
        "metrics.jsonl", "recipe.yaml", "report.html", "summary.json", "token_views.jsonl",
    ]  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TraceError):
        write_report(empty)
    assert list(empty.iterdir()) == []


def test_an_output_that_cannot_be_written_names_the_fix(demo, tmp_path):
    folder = demo()
    with pytest.raises(ConfigError, match="is a folder"):
        write_report(folder, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="Name another file"):
        write_report(folder, tmp_path / "file" / "report.html")


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_readable_in_light_and_dark(demo, scheme):
    _, page = render(demo(views=1, steps=2))
    blocks = re.findall(r":root \{(.*?)\}", page.blocks["style"][0], flags=re.DOTALL)
    assert len(blocks) == 2
    css = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme == "dark"]))
    for ground in [f"k{i}" for i in range(7)] + [f"n{i}" for i in range(1, 7)] + ["page", "card", "note-bg"]:
        assert contrast(css["ink"], css[ground]) >= 4.5, ground
    for text, ground in [("soft", "card"), ("soft", "page"), ("soft", "note-bg"), ("faint", "card"), ("off", "page"),
                         ("good", "good-bg"), ("bad", "bad-bg"), ("warn", "warn-bg"), ("ink", "bad-bg")]:  # fmt: skip
        assert contrast(css[text], css[ground]) >= 4.5, (text, ground)
    for hue in ("policy", "sdpo", "replay_dpo", "rollouts", "other"):
        assert contrast(css[hue], css["card"]) >= 4.5, hue
    ramp = [luminance(css[f"k{i}"]) for i in range(7)]
    assert ramp == sorted(ramp, reverse=scheme == "light")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a chromium on the path")
def test_in_a_browser_our_script_runs_and_a_planted_one_does_not(tmp_path):
    folder = planted(tmp_path / "run")
    report = write_report(folder)
    report.write_text(report.read_text().replace("<main>", "<main><script>document.title = 'PWNED'</script>"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    dom = subprocess.run([*browser, "--dump-dom", report.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert '<div id="tip"' in dom  # made by our script
    assert "PWNED</title>" not in dom
