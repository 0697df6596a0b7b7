"""The page of an exploration: whole, escaped, complete, and nothing from elsewhere."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

import m3jax
from m3jax.exploration.report.html import axes, svg
from m3jax.exploration.report.html.axes import Axis
from m3jax.exploration.report.html.page import render

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\u202e\x00"
VOID = {"meta"}


class Page(html.parser.HTMLParser):
    """Elements with their attributes, each closed in its turn."""

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def found(self, tag, **wanted):
        wanted = {
            name.rstrip("_").replace("_", "-"): own for name, own in wanted.items()
        }
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


def evaluator(parameters, budget, key):
    ratio = float(np.asarray(parameters["weight"])[0])
    score = math.nan if ratio < 0.1 else 1 - (ratio - 0.3) ** 2
    return {f"one{HOSTILE}": score, "two": 1 - (ratio - 0.7) ** 2}


def explore(folder=None, **options):
    models = [{"weight": jnp.array([1.0, 0.0])}, {"weight": jnp.array([0.0, 1.0])}]
    base = {"weight": jnp.zeros(2)}
    options = {"evaluator": evaluator, "draws": 12, "seed": 4, **options}
    return m3jax.explore(base, models, output=folder, **options)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    found = explore(folder, sampler="grid")
    return found, (folder / "report.html").read_text(), folder


def test_it_is_whole_and_needs_nothing_else(page):
    _, content, _ = page
    made = Page(content)
    assert content.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"https?:|//\w|url\(|@import", content)
    for tag, attributes in made.elements:
        assert tag not in ("img", "link", "iframe", "object", "base", "use")
        assert not {"src", "href", "style", "action"} & set(attributes)
    (policy,) = made.found("meta", http_equiv="Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; ")
    assert "unsafe" not in policy["content"]


def test_names_of_others_are_text(page):
    found, content, _ = page
    named = dataclasses.replace(
        found,
        models=(HOSTILE, HOSTILE * 20),
        replay={"models": [{"path": HOSTILE}]},
    )
    named = Page(render(named))
    for made in (Page(content), named):
        assert len(made.found("script")) == 1
        for _, attributes in made.elements:
            assert not [name for name in attributes if name.startswith("on")]
    assert "\x00" not in content
    assert "\u202e" not in content
    assert any("</script><img" in own for own in named.texts["h1"])
    recipe = json.loads("".join(named.texts["pre"]))
    assert recipe["models"] == [{"path": HOSTILE}]


def test_every_trial_is_in_every_chart_and_in_the_table(page):
    found, content, _ = page
    made = Page(content)
    lost = [t.index for t in found.draws if math.isnan(t.objective)]
    assert len(lost) == 1 + (found.draws[1].mean_ratios[0] < 0.1)
    every = {str(trial.index) for trial in found.trials}
    assert {own["data-draw"] for own in made.found("tr") if "data-draw" in own} == every
    lines = [
        own["data-draw"]
        for own in made.found("path")
        if own["class"].startswith("line ")
    ]
    assert sorted(lines) == sorted(every)
    circles = [own["data-draw"] for own in made.found("circle") if "data-draw" in own]
    left = len(every) - len(lost) - 1
    # λ against objective, one and two (of which all have a score), and the two tasks.
    assert len(circles) == left + left + (len(every) - 1) + left
    assert len(made.found("path", class_="winner")) == 4 + 1  # and in the legend
    assert f"{len(lost)} of 12 draws have no finite score." in made.texts["p"]


def test_parents_baselines_and_winner_are_marked(page):
    found, content, _ = page
    made = Page(content)
    styles = ["base", "parent0", "parent1", "baseline0", "baseline1"]
    legend = [own.strip() for own in made.texts["li"]]
    assert legend == ["draw", found.rows[-1].name, "on the Pareto front"] + [
        row.name for row in found.rows[:-1]
    ]
    for style in styles:
        marks = made.found("path", class_=f"mark {style}")
        assert marks or made.found("line", class_=f"row {style}"), style
    cells = made.texts["td"]
    assert all(row.name in cells for row in found.rows)


def test_it_holds_the_recipe_of_winner_json(page):
    _, content, folder = page
    recipe = "".join(Page(content).texts["pre"])
    assert json.loads(recipe) == json.loads((folder / "winner.json").read_text())


def test_the_table_is_that_of_summary_md(page):
    _, content, folder = page
    text = (folder / "summary.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    numbers = re.findall(r"-?\d\.\d{4}", "".join(rows))
    assert numbers
    assert set(numbers) <= set(re.findall(r"-?\d\.\d{4}", content))


def test_the_same_exploration_is_the_same_page(page, tmp_path):
    found, content, folder = page
    assert render(found) == content
    shutil.copytree(folder, tmp_path / "on")
    lines = (tmp_path / "on/trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "on/trials.jsonl").write_text("".join(lines[:5]))
    (tmp_path / "on/report.html").unlink()
    explore(tmp_path / "on", sampler="grid", resume=True)
    assert (tmp_path / "on/report.html").read_text() == content


def test_searched_fields_are_axes():
    recipe = m3jax.Recipe(method="task_arithmetic")
    search = ["ratios", "method=ties|slerp|task_arithmetic", "scaling", "trim_rate"]
    found = explore(recipe=recipe, sampler="sobol", search=search, draws=16)
    own = {axis.name: axis for axis in axes.parameters(found)}
    names = {"ties.scaling", "ties.trim_rate", "task_arithmetic.scaling"}
    assert set(own) == {"λ of model 0", "method"} | names
    assert own["method"].options == ("slerp", "task_arithmetic", "ties")
    for i, draw in enumerate(found.draws):
        assert own["method"].shown(i) == draw.recipe.method.name
        scaling = own["ties.scaling"].numbers[i]
        if draw.recipe.method.name == "ties":
            assert scaling == draw.recipe.method.scaling
        else:
            assert math.isnan(scaling)
    Page(render(found))


def test_halving_and_draws_that_differ_in_their_seed_alone():
    recipe = m3jax.Recipe(
        method="task_arithmetic",
        mixup=m3jax.Mixup(ratios=(0.4, 0.6)),
        transforms=(m3jax.Dare(drop_rate=0.5),),
    )

    def finite(parameters, budget, key):
        return {"norm": float(np.abs(np.asarray(parameters["weight"])).sum())}

    found = explore(recipe=recipe, evaluator=finite, halving=2, budget=4, draws=4)
    (axis,) = axes.parameters(found)
    assert (axis.name, axis.numbers) == ("draw", (0, 1, 2, 3))
    made = Page(render(found))
    rows = [own for own in made.found("tr") if "data-draw" in own]
    assert len(rows) == len(found.trials) == 7
    assert any("at a budget of 1" in own for own in made.texts["p"])


def test_pareto_front_is_that_of_all_pairs():
    generator = np.random.default_rng(0)
    numbers = generator.integers(0, 6, (3, 40)).astype(float)
    numbers[1, 7] = math.nan
    tasks = [Axis(str(i), tuple(own), lower=i == 1) for i, own in enumerate(numbers)]
    signed = numbers * np.array([1, -1, 1])[:, None]
    expected = [
        i
        for i in range(40)
        if i != 7
        and not any(
            (signed[:, j] >= signed[:, i]).all() and (signed[:, j] > signed[:, i]).any()
            for j in range(40)
        )
    ]
    assert axes.front(tasks) == expected
    assert 0 < len(expected) < 39


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-0.03, 0.11, ["0.00", "0.05", "0.10"]),
        (3, 3, ["3"]),
        (0, 5e-324, ["0"]),
        (1e9, 3e9, ["1.00e+09", "1.50e+09", "2.00e+09", "2.50e+09", "3.00e+09"]),
        (12, 52, ["20", "30", "40", "50"]),
    ],
)
def test_ticks(low, high, labels):
    assert [label for _, label in svg.ticks_of(low, high)] == labels


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(page, scheme, tmp_path):
    """Its script runs under its policy, and one score is shown at a time."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    _, _, folder = page
    ran = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            "--enable-logging=stderr",
            "--dump-dom",
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in ran.stderr, ran.stderr
    made = Page(ran.stdout)
    sections = made.found("section")
    assert [own.get("class") or "" for own in sections] == ["", "none", "none"]
    assert made.found("button", id="copy")[0]["class"] == ""
    assert made.found("label")[0]["class"] == ""
