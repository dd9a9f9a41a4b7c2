"""What a history records of meta updates, and the page that is made of it."""

import base64
import csv
import io
import json
import re
import sys
import warnings
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_balance import WeightedKDLoss
from kd_balance.check import check_hypergradient
from kd_balance.history import WeightHistory
from kd_balance.report import read, write_report
from kd_balance.report.__main__ import main
from tests.devices import CUDA, STANDIN, never_waits
from tests.habits import Lab, assert_one_sentence, train
from tests.students import CLASSES


@pytest.fixture
def run():
    """A laboratory whose weight net learns, and the history of its six steps."""
    return recorded(6)


def recorded(steps, **settings):
    lab = Lab(dtype=settings.pop("dtype", torch.float64), device=settings.pop("device", "cpu"))
    lab.wrap(rate=0.1, **settings)
    history = WeightHistory(lab.criterion, optimizer=lab.optimizer)
    train(lab, lab.batches(steps))
    return lab, history


class Page(HTMLParser):
    """The parts of a report, by Python's own parser."""

    VOID = {"meta", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.tags, self.styles = [], [], [], [], []
        self.figures, self.texts, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [v for k, v in attributes.items() if k in ("href", "src", "xlink:href")]
        self.styles += [v for v in attributes.values() if v and "url(" in v]
        if tag == "figure":
            self.figures.append({"title": "", "drawings": 0, "labels": [], "csv": None})
        if "figure" in self.open:
            figure = self.figures[-1]
            if tag == "svg":
                figure["drawings"] += 1
            if tag == "a" and attributes.get("href", "").startswith("data:text/csv"):
                data = base64.b64decode(attributes["href"].partition("base64,")[2]).decode()
                figure["csv"] = list(csv.DictReader(io.StringIO(data)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "svg" in self.open and self.open[-1] == "text":
            self.figures[-1]["labels"].append(data)
        if self.open[-1:] == ["h3"]:
            self.figures[-1]["title"] += data
        if self.open[-1:] in (["th"], ["td"]):
            self.cells.append(data)


def page_of(history, tmp_path, **settings):
    history.report(tmp_path / "run.html", **settings)
    return Page((tmp_path / "run.html").read_text(encoding="utf-8"))


def figures(page):
    return {figure["title"]: figure["csv"] for figure in page.figures}


def column(rows, name):
    return np.array([float(row[name] or "nan") for row in rows])


def test_every_hypergradient_is_recorded_with_what_it_saw():
    lab = Lab()
    lab.wrap(rate=0.1, every=2, accumulate=2)
    history = WeightHistory(lab.criterion, optimizer=lab.optimizer)
    losses, norms = [], []
    for _ in range(4):
        train(lab, lab.batches(2))
        losses.append(lab.meta_loss())  # at the parameters that the step left
        norms.append(lab.optimizer.metrics["hypergradient_norm"])
    meta = history.as_dict()["meta"]
    assert meta["step"] == [2, 4, 6, 8]
    np.testing.assert_allclose(meta["meta_loss"], losses, rtol=1e-12)
    np.testing.assert_allclose(meta["hypergradient_norm"], norms, rtol=1e-12)
    assert meta["skipped"] == [False] * 4


def test_a_skipped_hypergradient_is_recorded_as_one(tmp_path):
    lab = Lab()
    calls = []

    def sometimes_infinite(logits, targets):
        calls.append(0)
        loss = F.cross_entropy(logits, targets)
        return loss * float("inf") if len(calls) > 9 and len(calls) % 3 == 0 else loss

    lab.wrap(rate=0.1, meta_loss=sometimes_infinite)
    history = WeightHistory(lab.criterion, optimizer=lab.optimizer)
    skipped = []
    for _ in range(12):
        train(lab, lab.batches(1))
        skipped.append(lab.optimizer.metrics["skipped_updates"])
    assert 0 < skipped[-1] < 12
    meta = history.as_dict()["meta"]
    assert np.cumsum(meta["skipped"]).tolist() == skipped
    assert [loss is None for loss in meta["meta_loss"]] == meta["skipped"]
    page = page_of(history, tmp_path)
    rows = figures(page)["Skipped updates"]
    assert column(rows, "not finite").tolist() == skipped
    losses = column(figures(page)["Meta loss"], "meta_loss")
    assert np.isnan(losses).tolist() == meta["skipped"]


@pytest.mark.parametrize("device", [CUDA, STANDIN])
def test_on_an_accelerator_nothing_waits_and_skipped_updates_have_their_cause(device, tmp_path):
    lab, history = recorded(3, dtype=torch.float32, device=device)
    batches = list(lab.batches(1))
    with never_waits(device):
        train(lab, batches)
    moved = lab.student.fc1.weight
    hook = lab.optimizer.optimizer.register_step_post_hook(lambda *_: moved.data.add_(0.1))
    train(lab, lab.batches(2))
    hook.remove()
    train(lab, lab.batches(1))
    meta = history.as_dict()["meta"]
    assert meta["skipped"] == [False] * 4 + [True] * 2 + [False]
    assert meta["skipped_by_step"] == [False] * 4 + [True] * 2 + [False]
    rows = figures(page_of(history, tmp_path))["Skipped updates"]
    assert column(rows, "step differs from formula").tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert "not finite" not in rows[0]


def test_the_record_goes_on_in_a_resumed_run():
    lab, whole = recorded(3)
    file = io.BytesIO()
    torch.save([whole.state_dict(), lab.optimizer.state_dict()], file)
    file.seek(0)
    state, of_optimizer = torch.load(file, weights_only=True)
    other = Lab()
    other.wrap(rate=0.1)
    resumed = WeightHistory(other.criterion, optimizer=other.optimizer)
    resumed.load_state_dict(state)
    other.student.load_state_dict(lab.student.state_dict())
    other.optimizer.load_state_dict(of_optimizer)
    other.generator.set_state(lab.generator.get_state())
    for each in (lab, other):
        train(each, each.batches(3))
    assert len(whole.as_dict()["meta"]["step"]) == 6
    assert resumed.as_dict() == whole.as_dict()
    del state["meta"]  # as it was before meta updates were recorded
    resumed.load_state_dict(state)


def test_a_check_of_the_hypergradient_leaves_no_trace():
    lab, history = recorded(2)
    before = history.as_dict()
    batches = list(lab.batches(3))
    check_hypergradient(lab.optimizer, lambda batch: train(lab, [batch]), batches)
    assert history.as_dict() == before


def test_a_closed_history_records_no_more(run):
    lab, history = run
    before = history.as_dict()
    history.close()
    train(lab, lab.batches(1))
    assert history.as_dict() == before


def test_settings_and_warnings_are_those_of_the_optimizer(tmp_path):
    lab = Lab()
    lab.wrap(rate=0.25, every=2, unroll=1)
    history = WeightHistory(lab.criterion, optimizer=lab.optimizer)
    train(lab, lab.batches(2))
    inputs, _, labels = next(lab.batches(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # a step of another loss alone
            lab.optimizer.zero_grad()
            F.cross_entropy(lab.student(inputs), labels).backward()
            lab.optimizer.step()
    text = str(caught[0].message)
    page = page_of(history, tmp_path)
    assert text in page.texts
    table = dict(zip(page.cells[::2], page.cells[1::2]))
    assert table["every"] == "2" and table["unroll"] == "1" and table["method"] == "online"
    assert table["temperature"] == "2" and table["its last learning rate"] == "0.25"
    assert table["torch"] == torch.__version__


def test_the_page_is_whole_in_itself(run, tmp_path):
    page = page_of(run[1], tmp_path)
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert all(re.search(r"url\(#", style) for style in page.styles)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    named = {link[1:] for link in page.links if link.startswith("#")}
    named |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert named <= set(page.ids)
    assert "width=device-width" in text


def test_all_colours_follow_the_light_or_dark_theme(run, tmp_path):
    page_of(run[1], tmp_path)
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    light, dark = re.findall(r":root { (?:color-scheme: light dark; )?(.*?) }", text)
    assert f"(prefers-color-scheme: dark) {{ :root {{ {dark}" in text
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6});", colors)) for colors in (light, dark))
    assert light.keys() == dark.keys() and all(light[name] != dark[name] for name in light)
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"(fill|stroke): ?#", drawings)
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(light)


def test_every_figure_has_a_title_its_labels_as_text_and_the_numbers_of_the_history(run, tmp_path):
    lab, history = run
    counts = [50, 10, 40, 30, 20]
    page = page_of(history, tmp_path, class_counts=counts)
    assert list(figures(page)) == [
        "Hard weight by class frequency", "Soft weight by class frequency",
        "Hard weight of every class", "Soft weight of every class",
        "Meta loss", "Hypergradient norm",
    ]
    for figure in page.figures:
        assert figure["title"] and figure["drawings"] == 1 and figure["csv"]
        assert {"training calls of the criterion", "student steps"} & set(figure["labels"])
    table, meta = history.table(), history.as_dict()["meta"]
    for name in ("hard", "soft"):
        rows = figures(page)[f"{name.capitalize()} weight of every class"]
        assert column(rows, "step").tolist() == table["step"].tolist()
        for c in range(CLASSES):
            np.testing.assert_allclose(column(rows, f"class {c}"), table[name][:, c], rtol=1e-6)
        rows = figures(page)[f"{name.capitalize()} weight by class frequency"]
        for group, classes in {"many": [0], "medium": [2, 3, 4], "few": [1]}.items():
            count = table["count"][:, classes]
            total = np.nansum(table[name][:, classes] * count, 1)
            expected = np.where(count.sum(1) > 0, total / np.maximum(count.sum(1), 1), np.nan)
            np.testing.assert_allclose(column(rows, group), expected, rtol=1e-6)
    for title, key in (("Meta loss", "meta_loss"), ("Hypergradient norm", "hypergradient_norm")):
        rows = figures(page)[title]
        np.testing.assert_allclose(column(rows, key), meta[key], rtol=1e-8)
        assert column(rows, "step").tolist() == meta["step"]


def test_a_long_record_is_drawn_by_the_means_of_stretches(tmp_path):
    _, history = recorded(120)
    page = page_of(history, tmp_path)
    table, meta = history.table(), history.as_dict()["meta"]
    rows = figures(page)["Soft weight of every class"]
    assert len(rows) == 50 and column(rows, "step")[-1] == 120
    before = 0
    for row in rows[:5]:
        stretch = slice(before, before := int(row["step"]))
        count, weights = table["count"][stretch, 1], table["soft"][stretch, 1]
        if count.any():
            expected = np.nansum(count * weights) / count.sum()
            np.testing.assert_allclose(float(row["class 1"]), expected, rtol=1e-6)
    losses = figures(page)["Meta loss"]
    first = int(losses[0]["step"])
    assert float(losses[0]["meta_loss"]) == pytest.approx(np.mean(meta["meta_loss"][:first]))
    assert any("mean over about 2 calls" in text for text in page.texts)


def test_a_history_of_the_weights_alone_has_a_page_too(tmp_path):
    criterion = WeightedKDLoss(alpha=(0.25, 0.75))
    history = WeightHistory(criterion)
    criterion(torch.rand(4, 2), torch.rand(4, 2), torch.tensor([0, 0, 1, 0]))
    page = page_of(history, tmp_path)
    assert len(page.figures) == 4
    assert column(figures(page)["Hard weight by class frequency"], "all").tolist() == [0.25]
    assert any("optimizer=optimizer" in text for text in page.texts)


def test_the_command_makes_the_same_page_of_a_saved_history(run, tmp_path):
    history = run[1]
    history.save(tmp_path / "history.json")
    json.loads((tmp_path / "history.json").read_text(), parse_constant=pytest.fail)  # no NaN
    history.report(tmp_path / "run.html")
    expected = (tmp_path / "run.html").read_bytes()
    main([str(tmp_path / "history.json"), str(tmp_path / "run.html")])
    assert (tmp_path / "run.html").read_bytes() == expected
    assert read(tmp_path / "history.json") == history.as_dict()


def test_names_are_text_and_no_markup(run, tmp_path):
    record = run[1].as_dict()
    record["weights"]["<b>$a_b$ & \"co\"</b>"] = record["weights"].pop("soft")
    record["warnings"], record["settings"] = ["<script>alert(1)</script>"], {"<i>": "<u>"}
    write_report(record, tmp_path / "run.html")
    page = Page((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert not {"script", "b", "i", "u"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.texts


def without_matplotlib(history, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    history.report(tmp_path / "run.html")


def before_training(history, tmp_path, monkeypatch):
    WeightHistory(WeightedKDLoss()).report(tmp_path / "run.html")


def other_counts(history, tmp_path, monkeypatch):
    history.report(tmp_path / "run.html", class_counts=[1, 2])


def plain_optimizer(history, tmp_path, monkeypatch):
    lab = Lab()
    WeightHistory(lab.criterion, optimizer=lab.optimizer)


def optimizer_of_another(history, tmp_path, monkeypatch):
    WeightHistory(WeightedKDLoss(), optimizer=Lab().wrap())


@pytest.mark.parametrize(
    "mistake, kind, sentence",
    [
        (without_matplotlib, ImportError, "pip install 'kd-balance[plot]'"),
        (before_training, RuntimeError, "Nothing was recorded"),
        (other_counts, ValueError, "class_counts has shape (2,), expected (5,)"),
        (plain_optimizer, TypeError, "optimizer is SGD, expected the BilevelOptimizer"),
        (optimizer_of_another, ValueError, "another WeightedKDLoss"),
    ],
)
def test_a_mistake_gets_one_sentence(mistake, kind, sentence, run, tmp_path, monkeypatch):
    with pytest.raises(kind) as error:
        mistake(run[1], tmp_path, monkeypatch)
    assert sentence in str(error.value)
    assert_one_sentence(error)
    assert not (tmp_path / "run.html").exists()


def change(*path, to):
    def changed(record):
        at = record
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to
        return json.dumps(record).encode()

    return changed


@pytest.mark.parametrize(
    "content, sentence",
    [
        (lambda record: b"PK\x03\x04\xff", "is no JSON file, expected a history"),
        (lambda record: b"step,hard\n1,2\n", "is no JSON file, expected a history"),
        (lambda record: b"[1, 2]", "is JSON but no history"),
        (lambda record: b'{"loss": 3}', "is JSON but no history"),
        (change("version", to=2), "version 2, expected 1"),
        (change("weights", to=None), "history is damaged"),
        (change("weights", "hard", to=[[0.5]]), "hard weights of shape (1, 1), expected (6, 5)"),
        (change("weights", "step", to=[1]), "counts of shape (6, 5) and 1 rows"),
        (change("meta", "meta_loss", to=[1.0]), "as many of each"),
        (change("class_counts", to=[1]), "class_counts has shape (1,)"),
        (
            change("weights", to={"step": [], "count": [], "hard": [], "soft": []}),
            "Nothing was recorded",
        ),
    ],
)
def test_the_command_says_what_is_wrong_with_a_file(content, sentence, run, tmp_path, capsys):
    (tmp_path / "history.json").write_bytes(content(run[1].as_dict()))
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "history.json"), str(tmp_path / "run.html")])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert sentence in message and message.endswith(".") and ". " not in message
    assert not (tmp_path / "run.html").exists()


def test_the_command_says_that_there_is_no_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.json"), str(tmp_path / "run.html")])
    assert "No such file" in capsys.readouterr().err


def test_in_a_notebook_it_displays_itself(run, tmp_path):
    _, history = run
    frame = history._repr_html_()
    (page,) = re.findall(r'^<iframe [^>]* srcdoc="([^"]*)"></iframe>$', frame)
    assert len(Page(unescape(page)).figures) == len(page_of(history, tmp_path).figures) > 3


def test_in_a_notebook_a_sentence_stands_for_a_report_that_cannot_be(monkeypatch):
    history = WeightHistory(WeightedKDLoss())
    assert history._repr_html_().startswith("<p>Nothing was recorded")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "kd-balance[plot]" in history._repr_html_()
