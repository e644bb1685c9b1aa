"""The page of a report: HTML and CSS in one file without network, for light and dark screens and for paper.

Only what it is given as ``Html`` is taken for HTML; every other text is escaped.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def page(
    title: str, subtitle: str, tiles: Iterable[tuple[str, str]], sections: Sequence[tuple[str, Html]]
) -> Html:
    """Return the whole document: a heading, a row of numbers, and titled sections with links to them."""
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    numbers = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in tiles
    )
    body = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>{content}</section>'
        for i, (name, content) in enumerate(sections)
    )
    return Html(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_CSS}</style></head><body><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"
        f'<nav>{links}</nav><main><div class="tiles">{numbers}</div>{body}</main></body></html>'
    )


def note(text: str) -> Html:
    """Return a paragraph that explains what is to be seen."""
    return Html(f'<p class="note">{escape(text)}</p>')


def heading(text: str) -> Html:
    """Return a heading inside a section."""
    return Html(f"<h3>{escape(text)}</h3>")


def cards(contents: Iterable[Html], kind: str = "wide") -> Html:
    """Return contents side by side as far as there is room; ``kind``: wide, small, pairs or rows."""
    return Html(f'<div class="cards {kind}">' + "".join(f"<figure>{c}</figure>" for c in contents) + "</div>")


def table(columns: Sequence[str], rows: Iterable[Sequence[str | float]]) -> Html:
    """Return a table; columns of numbers are aligned to the right, and have four digits after the point.

    But a small number has two that count, and a whole one above 1 has none.
    """

    def cell(value: str | float) -> str:
        if isinstance(value, Html):
            return f"<td>{value}</td>"
        if isinstance(value, str):
            return f"<td>{escape(value)}</td>"
        is_whole = isinstance(value, int) or (value.is_integer() and value > 1)
        text = f"{value:,.0f}" if is_whole else f"{value:.2g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
        return f'<td class="number">{text}</td>'

    rows = [tuple(row) for row in rows]
    is_number = [any(not isinstance(value, str) for value in column) for column in zip(*rows, strict=True)]
    kinds = [' class="number"' if number else "" for number in is_number] or [""] * len(columns)
    head = "".join(f"<th{kind}>{escape(column)}</th>" for column, kind in zip(columns, kinds, strict=True))
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def terms(pairs: Iterable[tuple[str, str]]) -> Html:
    """Return names and what they mean or hold, in two columns that wrap on a narrow screen."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return Html(f"<dl>{rows}</dl>")


def picture(content: bytes, kind: str, text: str, mark: str = "") -> Html:
    """Return an image held by the page itself; ``text`` is shown on hover, ``mark`` is a class of the CSS."""
    data, text = base64.b64encode(content).decode(), escape(text)
    return Html(f'<img class="{mark}" src="data:image/{kind};base64,{data}" title="{text}" alt="{text}">')


def captioned(content: Html, text: str) -> Html:
    """Return a picture with what is to be seen in it below."""
    return Html(f"{content}<figcaption>{escape(text)}</figcaption>")


def pair(left: Html, right: Html, caption: str, detail: str) -> Html:
    """Return two images beside each other with a caption."""
    text = f"<figcaption><b>{escape(caption)}</b> {escape(detail)}</figcaption>"
    return Html(f'<div class="two">{left}{right}</div>{text}')


def strip(cells: Iterable[tuple[Html, str, str]]) -> Html:
    """Return a query and the images nearest to it: (image, caption, mark), a mark is same, other or empty."""
    parts = (f'<div class="{mark}">{image}<small>{escape(text)}</small></div>' for image, text, mark in cells)
    return Html(f'<div class="strip">{"".join(parts)}</div>')


def preformatted(text: str) -> Html:
    """Return text as it stands."""
    return Html(f"<pre>{escape(text)}</pre>")


def command(text: str) -> Html:
    """Return a command line, which wraps."""
    return Html(f'<pre class="command">{escape(text)}</pre>')


def folded(title: str, content: Html) -> Html:
    """Return something that opens on a click."""
    return Html(f"<details><summary>{escape(title)}</summary>{content}</details>")


_CSS = """
:root{--back:#f7f7f5;--card:#fff;--ink:#1d2126;--muted:#626a76;--grid:#e4e4e0;--accent:#2563eb;
--good:#15803d;--bad:#dc2626;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--back:#121316;--card:#1b1d22;--ink:#e7e8ea;--muted:#9aa1ac;
--grid:#30343b;--accent:#7aa7ff;--good:#4ade80;--bad:#f87171}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:48px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:0;overflow-wrap:anywhere}
header p{color:var(--muted);margin:.4em 0 1.2em;overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:1;background:var(--back);border-bottom:1px solid var(--grid);
display:flex;gap:20px;overflow-x:auto;scrollbar-width:none;padding:10px max(24px,calc(50% - 536px));
font-size:14px}
nav a{color:var(--muted);text-decoration:none;white-space:nowrap}nav a:hover{color:var(--accent)}
section{margin:48px 0;scroll-margin-top:56px}
h2{font-size:22px;letter-spacing:-.01em;margin:0 0 8px}
h3{font-size:16px;margin:28px 0 8px;overflow-wrap:anywhere}
.note{color:var(--muted);max-width:75ch;margin:0 0 16px;font-size:15px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px;margin-top:28px}
.tile{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:24px;line-height:1.2;letter-spacing:-.01em}
.tile span{display:block;color:var(--muted);font-size:13px;line-height:1.4;margin-top:4px;
overflow-wrap:anywhere}
.cards{display:grid;gap:14px;margin:12px 0}
.cards.wide{grid-template-columns:repeat(auto-fill,minmax(min(460px,100%),1fr))}
.cards.small{grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));align-items:start}
.cards.pairs{grid-template-columns:repeat(auto-fill,minmax(min(210px,100%),1fr))}
.cards.rows{gap:8px}
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:12px;
min-width:0}
figure>svg{display:block;width:100%;height:auto}svg text{fill:currentColor;font-family:inherit!important}
figcaption{font-size:13px;line-height:1.45;color:var(--muted);margin-top:8px;overflow-wrap:anywhere}
figcaption b{color:var(--ink)}
img{border-radius:6px}img.tiny{image-rendering:pixelated}
.two{display:flex;gap:6px}.two img{width:50%;aspect-ratio:1;object-fit:contain;background:var(--grid)}
.strip{display:grid;grid-template-columns:repeat(8,1fr);gap:8px}
.strip div{min-width:0}.strip div:first-child{border-right:1px solid var(--grid);padding-right:8px}
.strip img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:var(--grid);
border:3px solid transparent}
.strip small{display:block;font-size:12px;line-height:1.35;margin-top:3px;color:var(--muted);
overflow-wrap:anywhere}
.strip div:first-child small{color:var(--ink);font-weight:600}
.strip .same img{border-color:var(--good)}.strip .other img{border-color:var(--bad)}
.strip .other small::before{content:"\\2717  ";color:var(--bad)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--muted);font-weight:500}
th,td{padding:7px 0 7px 16px;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{padding-left:0}tbody tr:last-child td{border-bottom:0}
.number{text-align:right}
.number+:not(.number){padding-left:32px}
.small td{white-space:normal;overflow-wrap:break-word}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 20px;margin:12px 0;font-size:14px;
background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:14px 16px}
dt{color:var(--muted)}dd{margin:0;min-width:0;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:14px 16px;
overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre.command{white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:12px 0}summary{cursor:pointer;color:var(--accent)}
@media (max-width:640px){header,main{padding:0 14px}nav{padding:10px 14px}header{padding-top:28px}
.tiles{grid-template-columns:repeat(auto-fill,minmax(130px,1fr))}
.cards.pairs{grid-template-columns:1fr 1fr;gap:8px}.cards.pairs figure{padding:8px}
.strip{grid-template-columns:repeat(4,1fr)}.strip div:first-child{border-right:0;padding-right:0}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
@media print{:root{--back:#fff;--card:#fff;--ink:#000;--muted:#555;--grid:#ccc;--accent:#000;
--good:#15803d;--bad:#dc2626;color-scheme:light}
body,.note,table,dl,figcaption,.tile span{font-size:11px}
body{print-color-adjust:exact}nav{display:none}header,main{max-width:none;padding:0}
section{margin:24px 0}h2,h3,.note{break-after:avoid}figure,.tile,tr,dl{break-inside:avoid}
.cards.wide{grid-template-columns:1fr 1fr}.cards.small{grid-template-columns:repeat(3,1fr)}
.cards.pairs{grid-template-columns:repeat(4,1fr)}pre{white-space:pre-wrap}
details::details-content{content-visibility:visible;height:auto}}
"""
