"""The report: one file that needs no other, well-formed, with the pairs that brute force finds."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from small_run import make_run, pack_photos

from trainer import hardpairs, page, report
from trainer.config import BackboneConfig
from trainer.errors import UserError
from trainer.gallery import thumbnail
from trainer.hardpairs import hardest_pairs
from trainer.index import open_index
from trainer.report import report as write
from trainer.shards import write_shards

VOID = {"meta", "img", "br", "link", "input", "path", "use", "image", "rect", "stop"}


class Reader(HTMLParser):
    """Checks that what opens closes, and collects ids, links and sources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    data = pack_photos(root, "data", {"ant <b>": 4, "bee": 5, "cat": 3, "dog": 6}, (32, 32))
    run = make_run(root, data)
    (run / "log.txt").write_text(
        "07:00:00 run sheet\n  run      a\n  ranks    3 on cpu\n  command  train.py x=1\n07:00:01 step\n"
    )
    few_shot = json.dumps(
        {
            "few": {"protocol": "few_shot", "data": str(data), "ways": 3, "episodes": 5},
            "found": {"protocol": "retrieval", "data": str(data), "ks": [1], "bootstrap": 9},
        }
    )
    assert write(run, ["eval.batch_size=8", f"eval.protocols={few_shot}"]) == run / "report.html"
    return run


def test_the_file_is_well_formed_and_needs_no_other(run):
    text = (run / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    sources = [attrs["src"] for tag, attrs in reader.tags if tag == "img"]
    assert len(sources) > 40
    assert all(source.startswith("data:image/") for source in sources)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in reader.tags)
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert all(address.startswith("http://www.w3.org/") for address in addresses)  # names of XML, not fetched
    links = [attrs["href"] for tag, attrs in reader.tags if tag == "a"]
    ids = {attrs.get("id") for _, attrs in reader.tags}
    assert {link.removeprefix("#") for link in links} <= ids


def test_it_tells_results_curves_pairs_classes_and_how_it_was_made(run):
    text = (run / "report.html").read_text()
    parts = """same: accuracy|pairs: rank1|effective_rank|train/loss|Verification|cosine_nearest_mean|t-SNE
few: accuracy|Identification|at rank 50|<th class="number">loss</th>|step 7|95 % interval|false accept rate
yet far apart|yet close|nearest neighbours|principal axes|Classes that may be one|Weakest classes of same
does a class need images?|train.py x=1|embedding_dim: 12
same: AUC|What the figures mean|on 3 on cpu|run.name=again|<dt>ranks</dt>"""
    for part in parts.replace("\n", "|").split("|"):
        assert part in text, part
    assert "ant &lt;b&gt;" in text
    assert "ant <b>" not in text
    assert "prefers-color-scheme:dark" in text


def test_hardest_pairs_equal_brute_force(monkeypatch):
    monkeypatch.setattr(hardpairs, "_BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    x_ND = F.normalize(torch.randn(30, 5, generator=generator))
    labels_N = torch.randint(0, 4, (30,), generator=generator)
    labels_N[0] = 9  # alone: it has no partner of its class
    found = hardest_pairs(x_ND, labels_N, count=3)

    cosines = {(i, j): float(x_ND[i] @ x_ND[j]) for i in range(30) for j in range(i)}
    positives: dict[int, float] = {}
    negatives: dict[frozenset[int], float] = {}
    for (i, j), cosine in cosines.items():
        a, b = int(labels_N[i]), int(labels_N[j])
        if a == b:
            positives[a] = min(cosine, positives.get(a, 2.0))
        else:
            key = frozenset((a, b))
            negatives[key] = max(cosine, negatives.get(key, -2.0))
    assert [p[0] for p in found.positives] == pytest.approx(sorted(positives.values())[:3], abs=1e-6)
    assert found.negatives[0][0] == pytest.approx(max(negatives.values()), abs=1e-6)
    for cosine, i, j in (*found.positives, *found.negatives):
        assert cosine == pytest.approx(cosines[max(i, j), min(i, j)], abs=1e-6)
    assert len({frozenset((int(labels_N[i]), int(labels_N[j]))) for _, i, j in found.negatives}) == 3
    for i in range(30):
        others = [j for j in range(30) if j != i]
        nearest = max(others, key=lambda j: float(x_ND[i] @ x_ND[j]))
        assert bool(found.is_wrong_N[i]) == bool(labels_N[nearest] != labels_N[i])


def test_figures_have_their_interval_beside_them_and_numbers_are_aligned():
    text = report._with_intervals("set", {"map": 0.5, "map_low": 0.25, "map_high": 0.75, "num_queries": 4.0})
    assert '<td>map</td><td class="number">0.5000</td><td>0.2500 to 0.7500</td>' in text
    assert "map_low" not in text
    assert '<td class="number">4</td>' in text
    assert '<td class="number">6.1e-05</td>' in page.table(("a",), [(2**-14,)])
    assert text.count('<th class="number">') == 1
    assert "interval" not in report._with_intervals("set", {"a_low": 0.25})


def test_texts_are_escaped_and_html_is_not():
    assert page.table(("a<", "b", "c", "d"), [("<i>", page.Html("<b>x</b>"), 1.5, 2)]).count("&lt;") == 2
    assert "<b>x</b>" in page.table(("a",), [(page.Html("<b>x</b>"),)])
    assert 'title="&quot;q&quot;"' in page.picture(b"x", "png", '"q"')


def test_an_image_that_cannot_be_decoded_is_shown_as_grey_with_the_reason(tmp_path):
    write_shards([(b"\xff\xd8\xff cut", "jpg", 0)], tmp_path / "cut", ["only"])
    for channels, pixel in ((1, 128), (3, (128, 128, 128))):
        backbone = BackboneConfig(name="lenetpp", image_size=8, channels=channels)
        shown = thumbnail(open_index(tmp_path / "cut", "x"), 0, backbone, "class 0")
        assert 'alt="class 0: cannot decode: ' in shown
        content = base64.b64decode(re.search(r"base64,([^\"]+)", shown)[1])
        assert Image.open(io.BytesIO(content)).getpixel((3, 3)) == pixel


def test_a_run_without_a_checkpoint_is_refused_in_one_line(run, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        write(tmp_path)
    dist.destroy_process_group()  # a failed command leaves its group to the end of the process


def test_metrics_of_the_head_have_names_of_their_area(run):
    metrics = {json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert metrics == set(range(1, 8))  # judging again writes nothing into the run's own records
