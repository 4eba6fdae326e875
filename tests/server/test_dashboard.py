"""The Grafana dashboard asks for metrics, labels and kinds that a running server has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyramidinfer import LLM
from tests.server.live import STORY, beside, serving, until

FILE = Path(__file__).parents[2] / "deploy" / "grafana" / "pyramidinfer.json"
BOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS = [each for each in BOARD["panels"] if each["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
#: What Prometheus itself puts on every series.
OF_PROMETHEUS = {"job", "instance"}
#: Words of PromQL that stand where a name may.
WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless"}


class Asked(NamedTuple):
    """A series that an expression asks for."""

    name: str
    labels: frozenset[str]
    function: str  # what it is handed to


def parse(expression: str) -> tuple[list[Asked], set[str]]:
    """The series of an expression, and the labels that its results have."""
    plain = re.sub(r"\[[^\]]*\]", "", expression)
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", plain)
    labels = {each.strip() for group in grouped for each in group.split(",")}
    plain = re.sub(r"\b(?:by|without|on|ignoring)\s*\([^)]*\)", "", plain)
    asked = []
    for found in re.finditer(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\w*\s*\()", plain):
        name, selector = found[1], found[2] or ""
        rest = plain[found.end() :].lstrip()
        inside = re.search(r"\{[^}]*$", plain[: found.start()])
        if name in WORDS or rest.startswith("(") or inside:
            continue
        before = re.findall(r"(\w+)\s*\($", plain[: found.start()])
        names = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', selector))
        asked.append(Asked(name, frozenset(names), before[0] if before else ""))
    return asked, labels


@pytest.fixture(scope="module")
def series(llm: LLM) -> dict[str, tuple[set[str], str]]:
    """Labels and type of each series that a server shows after some requests."""
    with serving(beside(llm, kv_memory="32MiB")) as live:
        live.complete(STORY * 20)
        live.complete(bogus=1)
        until(lambda: live.service.worker.is_idle)
        text = live.http.get("/metrics").text
    return {
        sample.name: (set(sample.labels), family.type)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_parser_finds_what_is_asked() -> None:
    asked, labels = parse(
        'histogram_quantile(0.9, sum by (le, job) (rate(a:b_bucket{x="1{", y=~"$z"}[5m]))) / up'
    )
    assert asked == [
        Asked("a:b_bucket", frozenset({"x", "y"}), "rate"),
        Asked("up", frozenset(), ""),
    ]
    assert labels == {"le", "job"}


@pytest.mark.parametrize("target", TARGETS, ids=lambda each: str(each["expr"]))
def test_a_server_has_what_is_charted(
    target: dict[str, Any], series: dict[str, tuple[set[str], str]]
) -> None:
    asked, labels = parse(target["expr"])
    assert asked
    for name, selected, function in asked:
        assert name in series, name
        there, kind = series[name]
        assert selected <= there | OF_PROMETHEUS
        assert labels <= there | OF_PROMETHEUS, name
        counts = kind in ("counter", "histogram") or name == "process_cpu_seconds_total"
        assert (function in ("rate", "increase")) == counts, name
    shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert shown <= labels | OF_PROMETHEUS
    if "histogram_quantile" in target["expr"]:
        assert "le" in labels and all(name.endswith("_bucket") for name, _, _ in asked)


def test_variables_are_what_the_panels_use(series: dict[str, tuple[set[str], str]]) -> None:
    variables = {each["name"]: each for each in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD["panels"])))
    assert used - {"__rate_interval"} == variables.keys()
    found = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", variables["model_name"]["query"])
    assert found and found[2] in series[found[1]][0]


def test_panels_have_names_and_places_of_their_own() -> None:
    ids = [each["id"] for each in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for each in BOARD["panels"]:
        at = each["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, each["title"]
        taken |= cells
